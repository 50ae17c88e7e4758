package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
)

// sameRows compares tables of which a row is known by its content alone, as they are and as a checkout has them.
func (s *system) sameRows(names ...string) {
	s.t.Helper()
	s.says(0, "", append([]string{"checkout", "--partial", "--at", "HEAD", "--schema", "of_now", "--database", s.cfg.Capture.URL}, names...)...)
	db := s.sql()
	for _, name := range names {
		const rows = `(SELECT x::text, count(*) FROM %s.%s x GROUP BY 1)`
		for _, way := range [][2]string{{"of_now", "public"}, {"public", "of_now"}} {
			if got := db.rows(rows+` EXCEPT `+rows+` ORDER BY 1 LIMIT 3`, way[0], name, way[1], name); len(got) > 0 {
				s.t.Errorf("%s: so often only in %s: %v", name, way[0], got)
			}
		}
	}
	db.do(`DROP SCHEMA of_now CASCADE`)
}

// TestRowsWithoutAKey: existing rows that are known by their content alone are taken over as often as they are there, while somebody
// changes these very rows, and alters or empties the table, whatever is killed; also where only inserts are in the stream. Where few
// contents are there many times each, and where there are many.
func TestRowsWithoutAKey(t *testing.T) {
	t.Parallel()
	seed := seedOf(t)
	r := rand.New(rand.NewPCG(seed, 3))
	s := newSystem(t, where{apart: r.IntN(2) == 0})
	db := s.sql()
	names := []string{"few", "many", "wide", "few_inserts", "many_inserts", "altered"}
	contents := map[string]string{"few": "'a' || %s %% 3, 1", "many": "md5((%s %% 10000)::text), 2", "wide": "repeat((%s %% 500)::text, 100), 3", "altered": "'a' || %s %% 100, 4"}
	contents["few_inserts"], contents["many_inserts"] = contents["few"], contents["many"]
	for _, name := range names {
		db.do(`CREATE TABLE public.%s (v text, n int)`, name)
		db.do("%s", fmt.Sprintf(`INSERT INTO public.%s SELECT `+contents[name]+` FROM generate_series(1, 20000) i`, name, "i"))
		if !strings.HasSuffix(name, "inserts") {
			db.do(`ALTER TABLE public.%s REPLICA IDENTITY FULL`, name)
		}
	}
	s.init()
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
	defer stop()
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w)))
			conn, err := dial(context.Background(), s.cfg.Capture.URL)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close(context.Background())
			for i := 0; ctx.Err() == nil; i++ {
				name := names[r.IntN(len(names))]
				some := fmt.Sprintf("ctid > '(%[1]d,%[2]d)' AND ctid < '(%[1]d,%[3]d)'", r.IntN(150), r.IntN(100), 100+r.IntN(30))
				q := ""
				switch n := r.IntN(100); {
				case n < 30:
					q = fmt.Sprintf(`INSERT INTO public.%s (v, n) SELECT `+contents[name]+` FROM generate_series(%d, %[3]d + 10) i`, name, "i", r.IntN(20000))
				case n < 45 && strings.HasPrefix(name, "many"): // both, of which perhaps one has been read
					q = fmt.Sprintf(`DELETE FROM public.%s WHERE v IN (SELECT md5(i::text) FROM generate_series(%d, %[2]d + 20) i)`, name, r.IntN(10000))
				case n < 60:
					q = fmt.Sprintf(`DELETE FROM public.%s WHERE %s`, name, some)
				case n < 98:
					q = fmt.Sprintf(`UPDATE public.%s SET v = 'a' || %d, n = n + %d WHERE %s`, name, r.IntN(3), r.IntN(2), some)
				case n == 98 && name == "altered":
					q = []string{`ALTER TABLE public.altered ADD COLUMN IF NOT EXISTS c int DEFAULT 7`, `ALTER TABLE public.altered ADD COLUMN IF NOT EXISTS d int DEFAULT random() * 5`, `ALTER TABLE public.altered DROP COLUMN IF EXISTS d`,
						`ALTER TABLE public.altered ALTER n TYPE bigint USING n / 2`, `VACUUM FULL public.altered`}[r.IntN(5)]
				case n == 99 && name == "altered" && r.IntN(2) == 0:
					q = `TRUNCATE public.altered`
				}
				if _, err := conn.Exec(context.Background(), q); err != nil {
					t.Errorf("%s: %v", q, err)
					return
				}
				time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
			}
		})
	}
	s.env = []string{"BACKSTORY_BASELINE_RATE=3000000", "BACKSTORY_BASELINE_TABLES=6", "BACKSTORY_COMPARE_INTERVAL=1s"}
	kills := 0
	for ctx.Err() == nil {
		p := s.command(false, "run")
		time.Sleep(time.Duration(1000+r.IntN(3000)) * time.Millisecond)
		if !p.running() {
			t.Fatalf("the sidecar ended:\n%s", p.out.tail(20))
		}
		p.kill()
		kills++
	}
	wg.Wait()
	s.env = []string{"BACKSTORY_COMPARE_INTERVAL=1s"}
	p := s.command(true, "run")
	l := s.logSQL()
	eventually(t, 2*time.Minute, "everything is taken over", func() (bool, error) {
		left := l.rows(`SELECT c.name, c.complete, b.pass, b.rows, b.done_at FROM backstory.captured c LEFT JOIN backstory.baseline b USING (oid) WHERE b.done_at IS NULL`)
		return len(left) == 0, fmt.Errorf("%v", left)
	})
	l.do(`UPDATE backstory.baseline SET began_at = done_at - interval '1 ms', changes = '' WHERE done_at IS NOT NULL`) // as if that had been quick, and somebody had changed something
	eventually(t, 2*time.Minute, "what has only inserts in the stream is compared", func() (bool, error) {
		left := l.rows(`SELECT c.name, b.pass, b.rows, b.done_at FROM backstory.captured c JOIN backstory.baseline b USING (oid) WHERE c.insert_only AND (changes = '' OR done_at IS NULL)`)
		return len(left) == 0, fmt.Errorf("%v", left)
	})
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	if p.wait(time.Minute) != 0 {
		t.Fatalf("run:\n%s", p.out.tail(20))
	}
	t.Logf("%d kills; events %v", kills, l.rows(`SELECT relation, type, count(*) FROM backstory.events GROUP BY 1, 2 ORDER BY 1, 2`))
	if got := s.complete(); got != "altered few many wide" {
		t.Errorf("complete: %s", got)
	}
	s.sameRows(names...)
	verify(t, s.openLog())
}

// TestRowsWithoutAKeyOfABusyTable: somebody always commits between the snapshot in which the rows are read and its place in the log. What the
// snapshot does not show of that is subtracted; the reading does not wait for a quiet moment, which may never come.
func TestRowsWithoutAKeyOfABusyTable(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.busy (v text, n int); ALTER TABLE public.busy REPLICA IDENTITY FULL; CREATE TABLE public.inserts (v text, n int);
		INSERT INTO public.busy SELECT 'a' || i %% 50, i %% 7 FROM generate_series(1, 5000) i; INSERT INTO public.inserts SELECT * FROM public.busy`)
	s.init()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(5, uint64(w)))
			conn, err := dial(context.Background(), s.cfg.Capture.URL)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close(context.Background())
			if _, err := conn.Exec(context.Background(), `SET synchronous_commit = off`); err != nil {
				t.Error(err)
			}
			for ctx.Err() == nil {
				v, n, block := fmt.Sprintf("'a%d'", r.IntN(50)), r.IntN(7), r.IntN(30)
				some := fmt.Sprintf("ctid = '(%d,%d)'", block, 1+r.IntN(100))
				q := []string{
					fmt.Sprintf(`INSERT INTO public.busy VALUES (%s, %d); INSERT INTO public.inserts VALUES (%[1]s, %[2]d)`, v, n),
					fmt.Sprintf(`UPDATE public.busy SET v = %s WHERE %s`, v, some),
					fmt.Sprintf(`DELETE FROM public.busy WHERE %s`, some),
				}[r.IntN(3)]
				if _, err := conn.Exec(context.Background(), q); err != nil {
					t.Errorf("%s: %v", q, err)
					return
				}
			}
		})
	}
	s.env = []string{"BACKSTORY_BASELINE_TABLES=2"}
	p := s.command(true, "run")
	l := s.logSQL()
	eventually(t, time.Minute, "everything is taken over", func() (bool, error) {
		left := l.rows(`SELECT c.name, b.chunks, b.rows, b.done_at FROM backstory.captured c LEFT JOIN backstory.baseline b USING (oid) WHERE b.done_at IS NULL`)
		return len(left) == 0, fmt.Errorf("%v", left)
	})
	stop()
	wg.Wait()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	if p.wait(time.Minute) != 0 || strings.Contains(p.out.String(), "not taken over") {
		t.Fatalf("run:\n%s", p.out.tail(20))
	}
	s.says(0, "", "run", "--once")
	s.sameRows("busy", "inserts")
	verify(t, s.openLog())
}

// TestGapInTablesWithoutAKey: what differs after a gap is as many rows more, or fewer, of a content, also of one that was filed in another shape.
func TestGapInTablesWithoutAKey(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.Capture.BaselineChunkBytes = 300
	db := s.sql()
	db.do(`CREATE TABLE public.loose (v text, n int); ALTER TABLE public.loose REPLICA IDENTITY FULL; CREATE TABLE public.reshaped (v text, n int); ALTER TABLE public.reshaped REPLICA IDENTITY FULL`)
	s.init()
	db.do(`INSERT INTO public.loose SELECT 'a', i %% 5 FROM generate_series(1, 100) i; INSERT INTO public.reshaped SELECT * FROM public.loose; UPDATE public.loose SET v = 'b' WHERE n = 0`)
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`UPDATE public.loose SET v = 'c' WHERE ctid IN (SELECT ctid FROM public.loose WHERE n = 1 LIMIT 7); DELETE FROM public.loose WHERE n = 2; INSERT INTO public.loose SELECT 'a', 3 FROM generate_series(1, 4);
		ALTER TABLE public.reshaped ADD c int DEFAULT 7; DELETE FROM public.reshaped WHERE ctid IN (SELECT ctid FROM public.reshaped WHERE n = 4 LIMIT 3)`)
	s.gapFound("the slot was dropped", "gone")
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	s.once()
	if got := s.complete(); got != "loose reshaped" {
		t.Errorf("complete: %s", got)
	}
	const found = `SELECT string_agg(concat_ws(' ', relation, op, n), ', ' ORDER BY relation, op) FROM (SELECT relation, op, count(*) AS n FROM backstory.events WHERE type LIKE '%%Healed' GROUP BY 1, 2) x`
	if got, want := db.one(found), "public.loose delete 27, public.loose import 11, public.reshaped delete 3"; got != want {
		t.Errorf("healed: %s, want %s", got, want)
	}
	s.sameRows("loose", "reshaped")
	db.do(`DELETE FROM public.loose WHERE v = 'c'; UPDATE public.reshaped SET c = 8 WHERE n = 4`)
	s.once()
	s.sameRows("loose", "reshaped")
	verify(t, s.openLog())
}

// TestColumnThatTakesAnothersName: of a row without a key, what a column held that was dropped is not the value of one that has its name now, though both
// have the same default, and VACUUM FULL has left nothing in the catalogue of what that is in rows of before.
func TestColumnThatTakesAnothersName(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int, v text, w int); ALTER TABLE public.things REPLICA IDENTITY FULL`)
	s.init()
	db.do(`INSERT INTO public.things SELECT i, 'a' || i FROM generate_series(1, 5) i`)
	const again = `ALTER TABLE public.things DROP w; ALTER TABLE public.things ADD w int DEFAULT 3`
	s.once()
	db.do(again)
	s.once()
	db.do(again + `; DELETE FROM public.things WHERE id = 2`)
	db.do(`VACUUM FULL public.things`)
	s.once()
	s.sameRows("things")
	db.do(`UPDATE public.things SET v = 'b' WHERE id = 4; DELETE FROM public.things WHERE id = 5`)
	s.once()
	s.sameRows("things")
	verify(t, s.openLog())
}

// TestTablesOfInsertsAreCompared: where only inserts are in the stream, what was updated and deleted is found by comparing the table with the
// log, when the source has counted such changes, and not otherwise.
func TestTablesOfInsertsAreCompared(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.CompareInterval = time.Second
	db := s.sql()
	db.do(`CREATE TABLE public.keyless (v text, n int); CREATE TABLE public.nothing (id int PRIMARY KEY, v text); ALTER TABLE public.nothing REPLICA IDENTITY NOTHING;
		CREATE TABLE public.deferred (id int PRIMARY KEY DEFERRABLE, v text); CREATE TABLE public.quiet (v text);
		INSERT INTO public.keyless SELECT 'a', i %% 5 FROM generate_series(1, 50) i; INSERT INTO public.nothing SELECT i, 'a' FROM generate_series(1, 50) i; INSERT INTO public.deferred SELECT * FROM public.nothing; INSERT INTO public.quiet VALUES ('a')`)
	s.init()
	r := s.start()
	s.baselineDone()
	time.Sleep(1500 * time.Millisecond)
	db.do(`UPDATE public.keyless SET v = 'b' WHERE n = 1; DELETE FROM public.keyless WHERE ctid = (SELECT min(ctid) FROM public.keyless WHERE n = 2); INSERT INTO public.keyless VALUES ('a', 3)`)
	for _, name := range []string{"nothing", "deferred"} {
		db.do(`UPDATE public.%[1]s SET v = 'b' WHERE id < 4; DELETE FROM public.%[1]s WHERE id = 5; UPDATE public.%[1]s SET id = 100 WHERE id = 6; INSERT INTO public.%[1]s VALUES (200, 'a'); UPDATE public.%[1]s SET v = 'c' WHERE id = 200`, name)
	}
	const found = `SELECT string_agg(concat_ws(' ', relation, op, n), ', ' ORDER BY relation, op) FROM (SELECT relation, op, count(*) AS n FROM backstory.events WHERE type LIKE '%%Healed' GROUP BY 1, 2) x`
	const want = "public.deferred delete 2, public.deferred import 1, public.deferred update 4, public.keyless delete 11, public.keyless import 10, public.nothing delete 2, public.nothing import 1, public.nothing update 4"
	eventually(t, time.Minute, "what has changed is found", func() (bool, error) {
		got := db.one(found)
		return got == want, fmt.Errorf("%s", got)
	})
	s.baselineDone()
	s.sameRows("keyless", "nothing", "deferred", "quiet")
	if got := db.one(`SELECT string_agg(concat_ws(' ', before, data), ', ' ORDER BY position) FROM backstory.events WHERE relation = 'public.nothing' AND op IN ('update', 'delete') AND key IN ('1', '5')`); got != `{"v":"a"} {"v":"b"}, {"id":5,"v":"a"}` {
		t.Errorf("the log says %s", got)
	}
	// Nor is one that took so long that it would be for more than a hundredth of the time.
	db.do(`UPDATE backstory.baseline SET began_at = done_at - interval '1 hour' WHERE oid = 'public.nothing'::regclass`)
	generations := db.one(`SELECT string_agg(oid::regclass || ' ' || generation, ' ' ORDER BY 1) FROM backstory.baseline`)
	db.do(`INSERT INTO public.quiet VALUES ('b'); UPDATE public.nothing SET v = 'not looked for'`)
	time.Sleep(takeInEvery + 4*time.Second)
	if got := db.one(`SELECT string_agg(oid::regclass || ' ' || generation, ' ' ORDER BY 1) FROM backstory.baseline`); got != generations {
		t.Errorf("nothing was updated or deleted, or it took an hour, and tables are compared again: %s, before %s", got, generations)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.sameRows("quiet")
	verify(t, s.openLog())
}

// TestRowsInsertedBeforeATableOfInsertsIsRead: what became of a row between its insert, which is in the stream, and the moment as of which the table is read
// is in no stream, and the log has it all the same, without another comparison.
func TestRowsInsertedBeforeATableOfInsertsIsRead(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.Capture.BaselineChunkBytes = 300
	db := s.sql()
	names := []string{"nothing", "deferred", "keyless"}
	db.do(`CREATE TABLE public.nothing (id int PRIMARY KEY, v text); ALTER TABLE public.nothing REPLICA IDENTITY NOTHING; CREATE TABLE public.deferred (id int PRIMARY KEY DEFERRABLE, v text); CREATE TABLE public.keyless (id int, v text)`)
	for _, name := range names {
		db.do(`INSERT INTO public.%s SELECT i, 'before' FROM generate_series(1, 50) i`, name)
	}
	s.init()
	for _, name := range names {
		db.do(`INSERT INTO public.%s SELECT i, 'new' FROM generate_series(101, 106) i; UPDATE public.%[1]s SET v = 'changed' WHERE id IN (50, 101); DELETE FROM public.%[1]s WHERE id IN (49, 102);
			UPDATE public.%[1]s SET id = id + 100 WHERE id IN (48, 103); DELETE FROM public.%[1]s WHERE id = 104; INSERT INTO public.%[1]s VALUES (104, 'again')`, name)
	}
	s.once()
	s.sameRows(names...)
	if got := db.one(`SELECT string_agg(concat_ws(' ', op, key, data), ', ' ORDER BY position) FILTER (WHERE type = 'NothingHealed') || '; imported: ' || count(*) FILTER (WHERE type = 'NothingImported') FROM backstory.events`); got !=
		`update 101 {"v":"changed"}, delete 102, delete 103; imported: 50` {
		t.Errorf("the log has %s", got)
	}
	verify(t, s.openLog())
}

// TestEmptyKeyIsGone: a row whose key is the empty text, deleted from a partition of which only inserts are in the stream, stays gone, although notes have no
// key either.
func TestEmptyKeyIsGone(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.CompareInterval = time.Second
	db := s.sql()
	db.do(`CREATE TABLE public.codes (code text, v text) PARTITION BY LIST (code); CREATE TABLE public.codes_1 PARTITION OF public.codes (PRIMARY KEY (code)) DEFAULT;
		ALTER TABLE public.codes_1 REPLICA IDENTITY NOTHING; INSERT INTO public.codes VALUES ('', 'x'), ('a', 'y'), ('b', 'z')`)
	s.init()
	r := s.start()
	s.baselineDone()
	l := s.logSQL()
	db.do(`DELETE FROM public.codes WHERE code = ''; UPDATE public.codes SET v = 'q' WHERE code = 'a'`)
	for range 2 { // what the first comparison finds, and one after that
		before := l.one(`SELECT min(done_at) FROM backstory.baseline`)
		eventually(t, time.Minute, "it is compared", func() (bool, error) {
			l.do(`UPDATE backstory.baseline SET began_at = done_at, changes = '' WHERE done_at IS NOT NULL`)
			return l.one(`SELECT count(*) FROM backstory.baseline WHERE done_at > '%s'`, before) == "1", nil
		})
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	s.sameRows("codes")
	if got := l.one(`SELECT string_agg(op || ' ' || aggregate_id, ', ' ORDER BY position) FROM backstory.events WHERE type = 'CodeHealed'`); got != "update a, delete " {
		t.Errorf("healed: %s", got)
	}
	verify(t, s.openLog())
}

// TestStatisticsGoBack: a crash of the source throws its statistics away. What it counts of a table since may come to what it had counted before, and the table
// is compared all the same. On those of the slot nothing depends.
func TestStatisticsGoBack(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	s.cfg.CompareInterval = time.Second
	db := s.sql()
	db.do(`CREATE TABLE public.keyless (v text, n int); INSERT INTO public.keyless SELECT 'a', i FROM generate_series(1, 9) i`)
	s.init()
	r := s.start()
	s.baselineDone()
	l := s.logSQL()
	counted := func() (string, error) {
		conn, err := dial(within(t, 5*time.Second), s.cfg.Capture.URL)
		if err != nil {
			return "", err
		}
		defer conn.Close(context.Background())
		var n string
		err = conn.QueryRow(t.Context(), `SELECT n_tup_upd || ' ' || n_tup_del FROM pg_stat_user_tables WHERE relname = 'keyless'`).Scan(&n)
		return n, err
	}
	counts := func(want string) {
		t.Helper()
		eventually(t, time.Minute, "the source has counted "+want, func() (bool, error) {
			got, err := counted()
			return got == want, fmt.Errorf("%s (%w)", got, err)
		})
	}
	compared := func(healed int) {
		t.Helper()
		eventually(t, time.Minute, "the table is compared", func() (bool, error) {
			got := l.one(`SELECT count(*) FROM backstory.events WHERE type = 'KeylessHealed' AND op = 'import'`)
			return got == fmt.Sprint(healed), fmt.Errorf("%s rows were healed", got)
		})
		s.baselineDone()
	}
	db.do(`UPDATE public.keyless SET v = v || 'b' WHERE n BETWEEN 1 AND 2`)
	compared(2)
	counts("2 0")
	eventually(t, time.Minute, "it is compared for no more than that", func() (bool, error) {
		return strings.HasPrefix(l.one(`SELECT changes FROM backstory.baseline`), "2 0 "), nil
	})
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(int(atoi(t, s.sql().one(`SELECT pg_backend_pid()`))), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	counts("0 0")
	db = s.sql()
	db.do(`SELECT pg_stat_reset_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`UPDATE public.keyless SET v = v || 'b' WHERE n BETWEEN 4 AND 5`)
	counts("2 0") // as before
	r = s.start()
	compared(4)
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	s.sameRows("keyless")
	verify(t, s.openLog())
	if got := l.one(`SELECT count(*) FROM backstory.events WHERE op = 'gap'`); got != "0" {
		t.Errorf("there are %s gaps", got)
	}
}

// TestTablesOfInsertsGetAnotherKey: where only inserts are in the stream, rows that were deleted before that, and not compared yet, cannot be found by the
// key that the table has then: what the log has is discarded, once for each key, and all rows come again.
func TestTablesOfInsertsGetAnotherKey(t *testing.T) {
	t.Parallel()
	for _, running := range []bool{false, true} {
		s := newSystem(t, where{})
		db := s.sql()
		db.do(`CREATE TABLE public.keyless (id int NOT NULL, k bigint NOT NULL, v text); CREATE TABLE public.nothing (id int PRIMARY KEY, k bigint NOT NULL, v text); ALTER TABLE public.nothing REPLICA IDENTITY NOTHING`)
		s.init()
		db.do(`INSERT INTO public.keyless SELECT i, 1000 + i, 'a' FROM generate_series(1, 5) i; INSERT INTO public.nothing SELECT * FROM public.keyless`)
		s.once()
		noticed := func() { s.once(); s.once() }
		if running {
			r := s.start()
			noticed = func() { time.Sleep(takeInEvery + 4*time.Second); s.baselineDone() }
			defer func() {
				if err := r.end(); err != nil {
					t.Error(err)
				}
			}()
		}
		for _, name := range []string{"keyless", "nothing"} {
			db.do(`DELETE FROM public.%s WHERE id < 4; UPDATE public.%[1]s SET v = 'b' WHERE id = 4; INSERT INTO public.%[1]s VALUES (6, 6, 'a')`, name)
		}
		db.do(`ALTER TABLE public.keyless ADD PRIMARY KEY (id); ALTER TABLE public.nothing DROP CONSTRAINT nothing_pkey, ADD PRIMARY KEY (k)`)
		noticed()
		s.sameRows("keyless", "nothing")
		for _, name := range []string{"keyless", "nothing"} {
			db.do(`DELETE FROM public.%s WHERE id = 5; ALTER TABLE public.%[1]s ADD w float DEFAULT random()`, name)
		}
		noticed()
		s.sameRows("keyless", "nothing")
		discarded := func(want string) {
			t.Helper()
			if got := s.logSQL().one(`SELECT string_agg(relation, ' ' ORDER BY relation) FROM backstory.events WHERE type LIKE '%%Discarded'`); got != want {
				t.Errorf("discarded: %s", got)
			}
		}
		discarded("public.keyless public.nothing")
		db.do(`DELETE FROM public.keyless WHERE id = 4; ALTER TABLE public.keyless DROP CONSTRAINT keyless_pkey, ADD PRIMARY KEY (k)`) // once more
		noticed()
		s.sameRows("keyless")
		discarded("public.keyless public.keyless public.nothing")
		verify(t, s.openLog())
	}
}

// TestTablesOfInsertsAreOfOneMoment: rows that go to other keys without a word in the stream, while their table is read chunk by chunk, are in the log as they
// all were at one moment.
func TestTablesOfInsertsAreOfOneMoment(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.CompareInterval, s.cfg.Capture.BaselineChunkBytes = time.Second, 300
	db := s.sql()
	db.do(`CREATE TABLE public.moving (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v int); INSERT INTO public.moving SELECT i, 0 FROM generate_series(1, 100) i`)
	s.init()
	done, stop := make(chan error, 1), make(chan struct{})
	mover := s.sql()
	go func() {
		for n := 1; ; n++ {
			select {
			case <-stop:
				done <- nil
				return
			case <-time.After(20 * time.Millisecond):
			}
			if _, err := mover.Exec(context.Background(), `UPDATE public.moving SET id = 201 - id, v = $1`, n); err != nil {
				done <- err
				return
			}
		}
	}()
	const ended = `SELECT coalesce(string_agg(position::text, ' ' ORDER BY position), '') FROM backstory.events WHERE type = 'MovingBaselineEnded'`
	wait := func(n int) {
		eventually(t, time.Minute, "it is compared", func() (bool, error) {
			db.do(`UPDATE backstory.baseline SET began_at = done_at WHERE done_at IS NOT NULL`) // however long it took, the next one may begin
			return len(strings.Fields(db.one(ended))) >= n, nil
		})
	}
	r := s.start()
	wait(3)
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	r = s.start() // perhaps in the middle of a comparison
	wait(5)
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	for _, at := range strings.Fields(db.one(ended)) {
		s.says(0, "", "checkout", "--partial", "--at", at, "--schema", "past", "--replace", "moving")
		if got := db.one(`SELECT concat_ws(' ', count(*), count(DISTINCT v), count(DISTINCT id <= 100)) FROM past.moving`); got != "100 1 1" {
			t.Errorf("at %s there are so many rows, of so many moments, in so many places: %s, want 100 1 1", at, got)
		}
	}
	verify(t, s.openLog())
}

const takeInEvery = 5 * time.Second // as in package backstory
