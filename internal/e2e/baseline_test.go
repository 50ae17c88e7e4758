package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// TestExistingRows hammers tables of every kind, with rows, before they are captured and while their rows are read in small
// chunks, by a sidecar that is stopped and started meanwhile, while somebody forges the chunks' marks. At every moment that a session recorded, what the log knows of a row is what the
// row was, and from the end of a table's baseline on the log has all of it.
func TestExistingRows(t *testing.T) {
	t.Parallel()
	seed := seedOf(t)
	r := rand.New(rand.NewPCG(seed, 2))
	s := newSystem(t, where{tables: captured, apart: r.IntN(2) == 0})
	s.cfg.Log.PartitionEvents = int64(2000 + r.IntN(8000))
	s.cfg.Log.MaxCacheBytes = []int{20 << 10, 16 << 20}[r.IntN(2)]
	s.cfg.Capture.BaselineChunkBytes = []int{1, 2 << 10, 50 << 10}[r.IntN(3)]
	s.cfg.Capture.BaselineTables = 1 + r.IntN(4)
	db := s.sql()
	list := slices.DeleteFunc(subjects(), func(s *subject) bool { return s.inserts })
	create(db, list)
	before, stop := context.WithTimeout(context.Background(), 1500*time.Millisecond)
	defer stop()
	work(before, t, s.cfg.Capture.URL, seed+1, 4, list)
	if t.Failed() {
		return
	}

	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	columns := columnsOf(db, capturedSQL)
	delete(columns, "public.marker")
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	// They hammer for a while only: on a slow machine the sidecar, which is ended time and again, would never come to where they are.
	hammer, rest := context.WithTimeout(ctx, 40*time.Second)
	defer rest()
	wg.Go(func() { workAt(hammer, t, s.cfg.Capture.URL, seed, 3, list, 10*time.Millisecond) })
	s.init()
	forged := 0
	wg.Go(func() { // anybody may emit marks, also while chunks are on their way
		anybody := s.sql()
		for ; ctx.Err() == nil; forged++ {
			anybody.do(`SELECT pg_logical_emit_message(true, 'backstory.chunk', md5(random()::text))`)
			time.Sleep(20 * time.Millisecond)
		}
	})
	var moments map[int]moment
	wg.Go(func() { moments = record(ctx, t, s.cfg.Capture.URL, seed, columns) })
	restarts := 0
	l := s.openLog()
	for began := time.Now(); ; restarts++ {
		sidecar := s.start()
		for end := time.Now().Add(time.Duration(500+r.IntN(4000)+1000*restarts) * time.Millisecond); time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		if err := sidecar.end(); err != nil {
			t.Fatalf("the sidecar: %v", err)
		}
		tables, err := l.Captured(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(tables, func(c eventlog.Captured) bool { return !c.Complete }) {
			break
		}
		if time.Since(began) > 3*time.Minute {
			t.Fatalf("after %s not every table is complete: %v", time.Since(began), s.logSQL().rows(`SELECT c.name, b.* FROM backstory.captured c LEFT JOIN backstory.baseline b USING (oid) WHERE NOT complete`))
		}
	}
	stop()
	wg.Wait()
	s.once()

	w := newWorld()
	for name := range columns {
		w.unseen[name] = true
	}
	for _, r := range s.logSQL().rows(`SELECT schema || '.' || name FROM backstory.captured c WHERE NOT EXISTS (SELECT FROM backstory.baseline b WHERE b.oid = c.oid)`) {
		delete(w.unseen, r[0]) // it was empty
	}
	compared, early := 0, 0
	counts := map[eventlog.Op]int{}
	w.replay(t, l, func(e *eventlog.Event) error {
		counts[e.Op]++
		if e.Relation.String() != "public.marker" || e.Op != eventlog.OpInsert {
			return nil
		}
		var id int
		if _, err := fmt.Sscan(e.AggregateID, &id); err != nil {
			return err
		}
		m, ok := moments[id]
		if !ok {
			return nil // between init and the first look
		}
		if compared++; len(w.unseen) > 0 {
			early++
		}
		if err := w.differs(m.contents, columns); err != nil {
			return fmt.Errorf("at moment %d, while %d tables were incomplete: %w", id, len(w.unseen), err)
		}
		return nil
	})
	if len(w.unseen) > 0 {
		t.Errorf("incomplete at the end: %v", w.unseen)
	}
	w.sameTables(t, db, capturedSQL)
	verify(t, l)
	s.checkoutOfNow(db, w.position, columns)
	t.Logf("%d moments, %d of them while tables were incomplete; %d restarts; events %v; chunks of %d bytes, cache of %d, log apart: %v",
		compared, early, restarts, counts, s.cfg.Capture.BaselineChunkBytes, s.cfg.Log.MaxCacheBytes, s.log != s.src)
	if early == 0 || forged < 100 {
		t.Errorf("%d moments fell into the baseline, %d marks were forged", early, forged)
	}
}

// baselineDone waits until every table's existing rows are in the log.
func (s *system) baselineDone() {
	s.t.Helper()
	l := s.openLog()
	eventually(s.t, 3*time.Minute, "the existing rows are in the log", func() (bool, error) {
		list, err := l.Baselines(context.Background())
		return err == nil && len(list) > 0 && !slices.ContainsFunc(list, func(b eventlog.Baseline) bool { return !b.Done }), fmt.Errorf("%+v (%w)", list, err)
	})
}

// TestCommitHeldBack: a commit that waits for a synchronous standby is in the WAL, and in the log, before anybody's snapshot sees it. A row
// that was read without it does not come after it.
func TestCommitHeldBack(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v int, big text); ALTER TABLE public.things ALTER big SET STORAGE EXTERNAL;
		INSERT INTO public.things SELECT i, 10, repeat(i::text, 5000) FROM generate_series(1, 9) i;
		CREATE TABLE public.loose (v text); ALTER TABLE public.loose REPLICA IDENTITY FULL; INSERT INTO public.loose SELECT chr(96 + i) FROM generate_series(1, 6) i, generate_series(1, 3)`)
	s.init()
	db.do(`ALTER SYSTEM SET synchronous_standby_names = 'nobody'`)
	db.do(`SELECT pg_reload_conf()`)
	eventually(t, 20*time.Second, "the setting holds", func() (bool, error) {
		return open(t, s.cfg.Capture.URL).one(`SHOW synchronous_standby_names`) == "nobody", nil
	})
	writer, ended := open(t, s.cfg.Capture.URL), make(chan error, 1)
	go func() {
		_, err := writer.Exec(context.Background(), `BEGIN; UPDATE public.things SET v = 20 WHERE id < 4; DELETE FROM public.things WHERE id = 4; UPDATE public.things SET id = 50 WHERE id = 5;
			UPDATE public.things SET id = 70 WHERE id = 7; UPDATE public.things SET id = 7 WHERE id = 8;
			UPDATE public.loose SET v = 'b' WHERE v = 'a'; DELETE FROM public.loose WHERE v = 'c'; INSERT INTO public.loose VALUES ('d'), ('new'); DELETE FROM public.loose WHERE ctid = (SELECT min(ctid) FROM public.loose WHERE v = 'e'); COMMIT`)
		ended <- err
	}()
	eventually(t, 20*time.Second, "the commit waits", func() (bool, error) {
		return db.one(`SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'`) == "1", nil
	})
	r := s.start()
	l := s.logSQL()
	eventually(t, time.Minute, "every row has been read", func() (bool, error) { // what moved lacks a value, which nobody may take from the row that was there
		return l.one(`SELECT string_agg(b.pass || ' ' || (b.done_at IS NOT NULL), ', ' ORDER BY name) FROM backstory.baseline b JOIN backstory.captured USING (oid)`) == "1 true, 2 false", nil
	})
	if got := db.one(`SELECT count(*) FROM public.things WHERE v = 20`); got != "0" || len(ended) > 0 {
		t.Fatalf("the commit was visible to %s rows before its time", got)
	}
	db.do(`SET synchronous_commit = local`)
	db.do(`ALTER SYSTEM RESET synchronous_standby_names`)
	db.do(`SELECT pg_reload_conf()`)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	s.baselineDone()
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	checkLog(t, s.openLog(), "public.things", "public.loose").sameTables(t, db, "n.nspname = 'public'")
	s.sameRows("loose")
}

// TestCommitHeldBackWhileTheSlotIsMade: a transaction that begins while the slot is made, after the last one that making it waits for, is committed before
// the slot begins, and so is not in the stream. As long as it waits for a synchronous standby no snapshot sees it either: existing rows are read when
// it has become visible.
func TestCommitHeldBackWhileTheSlotIsMade(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things VALUES (1, 'a'), (2, 'b'); CREATE TABLE public.noise (i int);
		CREATE TABLE public.loose (v text); ALTER TABLE public.loose REPLICA IDENTITY FULL; INSERT INTO public.loose VALUES ('x')`)
	first, second, writer, ended := open(t, s.cfg.Capture.URL), open(t, s.cfg.Capture.URL), open(t, s.cfg.Capture.URL), make(chan error, 1)
	first.do(`BEGIN; INSERT INTO public.noise VALUES (1)`)
	step := 0
	_, err := s.tryInit(within(t, time.Minute), func(who []string) {
		switch step++; step {
		case 1: // the slot waits for the first: who begins now is waited for next
			second.do(`BEGIN; INSERT INTO public.noise VALUES (2)`)
			first.do(`ROLLBACK`)
		case 2: // … and who begins now for no longer
			time.Sleep(time.Second)
			db.do(`ALTER SYSTEM SET synchronous_standby_names = 'nobody'`)
			db.do(`SELECT pg_reload_conf()`)
			eventually(t, 20*time.Second, "the setting holds", func() (bool, error) { return writer.one(`SHOW synchronous_standby_names`) == "nobody", nil })
			go func() {
				_, err := writer.Exec(context.Background(), `BEGIN; INSERT INTO public.things VALUES (3, 'held back'); UPDATE public.things SET v = 'changed' WHERE id = 1; DELETE FROM public.things WHERE id = 2; INSERT INTO public.loose VALUES ('y'); COMMIT`)
				ended <- err
			}()
			eventually(t, 20*time.Second, "the commit waits", func() (bool, error) {
				return db.one(`SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'`) == "1", nil
			})
			second.do(`ROLLBACK`)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if step < 2 {
		t.Fatalf("init waited %d times", step)
	}
	if got := db.one(`SELECT count(*) FROM public.things WHERE v = 'held back'`); got != "0" || len(ended) > 0 {
		t.Fatal("the commit was visible before its time")
	}
	r := s.start()
	time.Sleep(1500 * time.Millisecond) // enough for reading the rows, if nothing kept it from that
	db.do(`SET synchronous_commit = local`)
	db.do(`ALTER SYSTEM RESET synchronous_standby_names`)
	db.do(`SELECT pg_reload_conf()`)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	s.baselineDone()
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	if got := s.logSQL().one(`SELECT count(*) FROM backstory.events WHERE op IN ('insert', 'update', 'delete')`); got != "0" {
		t.Errorf("the transaction was in the stream after all (%s events)", got)
	}
	s.once()
	checkLog(t, s.openLog(), "public.things", "public.loose").sameTables(t, db, "n.nspname = 'public' AND c.relname <> 'loose'")
	s.sameRows("loose")
}

// TestTransactionsOpenWhenATableIsTakenIn: what they wrote before that is in no stream, and is in the log all the same, as are the rows of
// everybody else; nobody who writes meanwhile waits.
func TestTransactionsOpenWhenATableIsTakenIn(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); CREATE TABLE public.later (id int PRIMARY KEY, v text); INSERT INTO public.later SELECT i, 'a' FROM generate_series(1, 100) i`)
	s.cfg.Capture.Tables = []string{"public.things"}
	s.init()
	r := s.start()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	writer := s.sql()
	pid := writer.one(`SELECT pg_backend_pid()`)
	writer.do(`BEGIN; INSERT INTO public.later VALUES (200, 'early'); UPDATE public.later SET v = 'early' WHERE id IN (1, 2); DELETE FROM public.later WHERE id = 3`)
	db.do(`BEGIN; UPDATE public.later SET v = 'prepared' WHERE id = 4; PREPARE TRANSACTION '%s'`, s.cfg.Capture.Slot)
	s.cfg.Capture.Tables = []string{"public.*"}
	s.init()
	eventually(t, 30*time.Second, "it is said who is waited for", func() (bool, error) {
		st, err := r.sc.Status(context.Background())
		if err != nil {
			return false, err
		}
		said := written(st.Findings())
		return strings.HasPrefix(said, "info: existing rows of public.later wait for transactions to end: ") && strings.Contains(said, "pid "+pid) && strings.Contains(said, "prepared transaction '"+s.cfg.Capture.Slot+"'"), fmt.Errorf("%s", said)
	})
	db.do(`UPDATE public.later SET v = 'b' WHERE id = 5; INSERT INTO public.later VALUES (300, 'b')`)
	writer.do(`UPDATE public.later SET v = 'late' WHERE id = 2; INSERT INTO public.later VALUES (201, 'late'); COMMIT`)
	time.Sleep(time.Second)
	if got := db.one(`SELECT count(*) FROM backstory.baseline WHERE chunks > 0`); got != "0" {
		t.Error("the prepared transaction was not waited for")
	}
	db.do(`COMMIT PREPARED '%s'`, s.cfg.Capture.Slot)
	s.baselineDone()
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	checkLog(t, s.openLog(), "public.later").sameTables(t, db, "n.nspname = 'public'")
}

// TestBaselineIsKilled: it goes on where it was, whatever is killed, and no row comes twice. It keeps to the rate that it is given.
func TestBaselineIsKilled(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	const rows = 300_000
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things SELECT i, md5(i::text) || md5(i::text) FROM generate_series(1, %d) i; ANALYZE public.things`, rows)
	s.init()
	l := s.sql()
	s.env = []string{"BACKSTORY_BASELINE_RATE=6000000"}
	last := int64(0)
	for range 3 {
		p := s.command(true, "run")
		eventually(t, time.Minute, "some more rows are there", func() (bool, error) {
			if !p.running() {
				t.Fatalf("the sidecar ended:\n%s", p.out.tail(20))
			}
			now := atoi(t, l.one(`SELECT rows FROM backstory.baseline`))
			if now < last {
				t.Fatalf("it began again: %d rows after %d", now, last)
			}
			if now > last {
				last = now
				return true, nil
			}
			return false, nil
		})
		p.kill()
	}
	if last >= rows {
		t.Error("everything was read before anything was killed; it has to be slower")
	}
	read, began := atoi(t, l.one(`SELECT bytes FROM backstory.baseline`)), time.Now()
	p := s.command(false, "run", "--once")
	if p.wait(2*time.Minute) != 0 {
		t.Fatalf("run --once:\n%s", p.out.tail(20))
	}
	if left := atoi(t, l.one(`SELECT bytes FROM backstory.baseline`)) - read; left < 6<<20 || time.Since(began) < time.Duration(float64(left)/6e6*0.8*float64(time.Second)) {
		t.Errorf("the last %d bytes were read in %s, at 6 MB a second", left, time.Since(began))
	}
	if got := l.one(`SELECT count(*) || ' ' || count(DISTINCT aggregate_id) || ' ' || min(op) || ' ' || max(op) FROM backstory.events WHERE relation = 'public.things' AND op <> 'note'`); got != fmt.Sprintf("%d %[1]d import import", rows) {
		t.Errorf("the log has %s", got)
	}
	checkLog(t, s.openLog(), "public.things").sameTables(t, db, "n.nspname = 'public'")
}

// TestNoBaseline: init may be told that the history of existing rows begins with their next change; another init changes that.
func TestNoBaseline(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things SELECT i, 'a' FROM generate_series(1, 10) i`)
	s.says(0, "1 table has rows already. The history of such a row begins with its next change", "init", "--no-baseline")
	db.do(`UPDATE public.things SET v = 'b' WHERE id = 1`)
	s.once()
	if got := db.one(`SELECT string_agg(type || ' ' || aggregate_id, ', ') FROM backstory.events`); got != "ThingImported 1" {
		t.Errorf("the log has %s", got)
	}
	s.says(1, "the log does not have all rows of public.things: rows that it had before it was captured were left out by init --no-baseline", "checkout", "--at", "HEAD", "--schema", "of_now")
	s.says(0, "1 table may have had rows before the history, which are known from their next change on: public.things", "status")
	s.says(0, "nothing was changed", "init", "--no-baseline")
	s.says(0, "existing rows, which init --no-baseline had left out, are to be taken over", "init")
	s.says(0, "nothing was changed", "init")
	s.once()
	if got := db.one(`SELECT count(*) FROM backstory.events WHERE op = 'import'`); got != "10" {
		t.Errorf("%s rows were imported", got)
	}
	s.says(0, "10 rows", "checkout", "--at", "HEAD", "--schema", "of_now")
}

// TestRowsThatMayNotBeRead: without the right to read all rows of a table, its baseline waits and says so; the stream goes on, and --once fails.
func TestRowsThatMayNotBeRead(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	role := "reader_" + s.cfg.Capture.Slot
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); CREATE TABLE public.secret (id int PRIMARY KEY, v text); CREATE TABLE public.own (id int PRIMARY KEY, v text);
		INSERT INTO public.things VALUES (1, 'a'); INSERT INTO public.secret SELECT i, 'a' FROM generate_series(1, 10) i; INSERT INTO public.own SELECT i, 'a' FROM generate_series(1, 10) i;
		ALTER TABLE public.own ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON public.own USING (id < 5);
		CREATE ROLE %[1]s LOGIN REPLICATION; GRANT SELECT ON public.things, public.own TO %[1]s`, role)
	t.Cleanup(func() { db.do(`DROP OWNED BY %[1]s; DROP ROLE %[1]s`, role) })
	s.init()
	s.cfg.Capture.URL = withUser(t, s.cfg.Capture.URL, role)
	r := s.start()
	db.do(`INSERT INTO public.secret VALUES (100, 'b')`)
	l := s.logSQL()
	eventually(t, 30*time.Second, "what can be done is done, and the rest is said", func() (bool, error) {
		st, err := r.sc.Status(context.Background())
		if err != nil {
			return false, err
		}
		said := fmt.Sprintf("%+v", st.Baseline)
		return strings.Contains(said, "permission denied for table secret") && strings.Contains(said, "row-level security") && strings.Contains(said, `GRANT SELECT ON "public"."secret"`) &&
			l.one(`SELECT string_agg(name, ' ' ORDER BY name) FROM backstory.captured WHERE complete`) == "things" &&
			l.one(`SELECT count(*) FROM backstory.events WHERE relation = 'public.secret' AND op = 'insert'`) == "1", fmt.Errorf("%s", said)
	})
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	if err := s.tryOnce(); err == nil || !strings.Contains(err.Error(), "take over the existing rows of public.") {
		t.Errorf("run --once: %v", err)
	}
	db.do(`GRANT SELECT ON public.secret TO %[1]s; ALTER ROLE %[1]s BYPASSRLS`, role)
	s.once()
	if got := s.complete(); got != "own secret things" {
		t.Errorf("complete: %s", got)
	}
}

// TestHugeExistingRows: rows of ten megabytes are taken over one by one.
func TestHugeExistingRows(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.blobs (id int PRIMARY KEY, v text); ALTER TABLE public.blobs ALTER v SET STORAGE EXTERNAL`)
	db.do(`INSERT INTO public.blobs SELECT i, 'small' FROM generate_series(1, 20000) i`)
	db.do(`ANALYZE public.blobs`) // which makes it look as if all rows were small
	db.do(`INSERT INTO public.blobs SELECT 20000 + i, repeat(md5(i::text), 327680) FROM generate_series(1, 30) i`)
	db.do(`CREATE TABLE public.loose (id int, v text); ALTER TABLE public.loose REPLICA IDENTITY FULL; ALTER TABLE public.loose ALTER v SET STORAGE EXTERNAL; INSERT INTO public.loose SELECT i, v FROM public.blobs, generate_series(id, id) i WHERE id %% 2000 = 0 OR id > 20020`)
	s.init()
	s.env = []string{"BACKSTORY_BASELINE_TABLES=1"} // each table has chunks of its own on their way
	p, l := s.command(false, "run"), s.logSQL()
	eventually(t, 2*time.Minute, "the rows are in the log", func() (bool, error) {
		if !p.running() {
			t.Fatalf("the sidecar ended:\n%s", p.out.tail(20))
		}
		return l.one(`SELECT count(*) FROM backstory.captured WHERE complete`) == "2", nil
	})
	const bound = 128 << 20
	if n := p.peak(); n > bound {
		t.Errorf("the sidecar has had %d MB of memory", n>>20)
	} else {
		t.Logf("peak %d MB for rows of 10 MB", n>>20)
	}
	if !strings.Contains(p.out.String(), `and CREATE INDEX CONCURRENTLY waits" relation=public.loose bytes=`) {
		t.Errorf("that a large table without a key is read in one transaction was not announced:\n%s", p.out.tail(20))
	}
	p.kill()
	if got := l.one(`SELECT count(*) || ' ' || sum(length(data->>'v')) FROM backstory.events WHERE op = 'import'`); got != fmt.Sprintf("20050 %d", 20010*5+40*327680*32) {
		t.Errorf("the log has %s", got)
	}
}

// TestBaselineHoldsNothingUp: while existing rows are read, for however long, no transaction of ours is open for longer than a chunk takes, and
// so ALTER TABLE, which wants the table for itself, has it at once.
func TestBaselineHoldsNothingUp(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	s.cfg.Capture.BaselineChunkBytes, s.cfg.Capture.BaselineBytesPerSecond = 4000, 40_000
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things SELECT i, md5(i::text) FROM generate_series(1, 10000) i`)
	s.init()
	r, l := s.start(), s.openLog()
	chunks := func() int64 {
		list, err := l.Baselines(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range list {
			if !b.Done && b.TotalRows > 1000 {
				return b.Chunks
			}
		}
		return 0
	}
	eventually(t, time.Minute, "rows are read", func() (bool, error) { return chunks() > 5, nil })
	altering := s.sql()
	altering.do(`SET lock_timeout = '1s'`)
	oldest, slowest, open, began := time.Duration(0), time.Duration(0), 0, time.Now()
	for i := range 10 {
		for range 40 {
			ms := db.one(`SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start) * 1000)::int::text, '') FROM pg_stat_activity WHERE application_name LIKE 'backstory%%' AND backend_type = 'client backend' AND xact_start IS NOT NULL`)
			if ms != "" {
				open++
				oldest = max(oldest, time.Duration(atoi(t, ms))*time.Millisecond)
			}
			time.Sleep(5 * time.Millisecond)
		}
		if i == 4 {
			at := time.Now()
			altering.do(`ALTER TABLE public.things ALTER v SET STATISTICS 10`)
			slowest = max(slowest, time.Since(at))
		}
	}
	at := time.Now()
	altering.do(`ALTER TABLE public.things ADD w int DEFAULT 7`)
	slowest = max(slowest, time.Since(at))
	if chunks() < 10 {
		t.Fatal("the rows had been read already")
	}
	t.Logf("in %s of reading, the oldest of %d transactions that were seen was %s old; ALTER TABLE took %s", time.Since(began).Round(time.Second), open, oldest, slowest)
	if open == 0 || oldest > time.Second {
		t.Errorf("of %d transactions that were seen the oldest was open for %s", open, oldest)
	}
	s.cfg.Capture.BaselineBytesPerSecond = 0
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	s.equalsTables(db, l)
}
