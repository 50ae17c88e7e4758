package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/eventlog"
)

// healed accepts a gap, and makes sure that the log has these rows of public.things (see simple) after that.
func (s *system) healed(want string) {
	s.t.Helper()
	if _, err := backstory.AcceptGap(within(s.t, time.Minute), s.cfg, nil); err != nil {
		s.t.Fatal(err)
	}
	s.once()
	s.says(0, "", "checkout", "--at", "HEAD", "--schema", "of_now", "things")
	if got := s.logSQL().one(`SELECT string_agg(id || ' ' || v, ', ') FROM of_now.things`); got != want {
		s.t.Errorf("the log has %s", got)
	}
}

// TestGapWhileExistingRowsAreUnfinished: a gap is recorded as at any other time.
func TestGapWhileExistingRowsAreUnfinished(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things SELECT i, 'a' FROM generate_series(1, 10) i`)
	s.init()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`UPDATE public.things SET v = 'b' WHERE id = 1`)
	s.gapFound("the slot was dropped", "gone")
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	s.once()
	checkLog(t, s.openLog(), "public.things").sameTables(t, db, "n.nspname = 'public'")
}

// TestGapIsHealed: changes that the log has missed are found by comparing it with the source. Exactly what differs becomes events, each
// with what the log had before, and then the log has every row again, also of those that somebody changes meanwhile.
func TestGapIsHealed(t *testing.T) {
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("while somebody writes: %v", busy), func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			s.cfg.Capture.BaselineChunkBytes = 20000
			db := s.sql()
			const plain = "id int PRIMARY KEY, v text, big text, d jsonb"
			tables := map[string]string{"things": plain, "whole": plain, "by_index": plain + ", u int NOT NULL", "texts": "id text, v text, big text, d jsonb, PRIMARY KEY (v, id)"}
			for name, columns := range tables {
				db.do("CREATE TABLE public.%s (%s)", name, columns)
				db.do("ALTER TABLE public.%s ALTER big SET STORAGE EXTERNAL", name)
			}
			db.do(`CREATE SCHEMA audit; CREATE TABLE public.emptied (id int PRIMARY KEY, v text); CREATE TABLE public.same (id int PRIMARY KEY, v text);
				ALTER TABLE public.whole REPLICA IDENTITY FULL; CREATE UNIQUE INDEX by_u ON public.by_index (u); ALTER TABLE public.by_index REPLICA IDENTITY USING INDEX by_u`)
			s.init()
			fill := func(name, id string) {
				more, value := "", ""
				if name == "by_index" {
					more, value = ", u", ", i"
				}
				db.do(`INSERT INTO public.%s (id, v, big, d%s) SELECT %s, 'a,' || i %% 7, repeat(md5(i::text), 100), jsonb_build_object('n', i)%s FROM generate_series(1, 200) i`, name, more, id, value)
			}
			for name := range tables {
				id := "i"
				if name == "texts" {
					id = `'k\,' || i`
				}
				fill(name, id)
			}
			db.do(`INSERT INTO public.emptied SELECT i FROM generate_series(1, 50) i; INSERT INTO public.same SELECT i, 'x' FROM generate_series(1, 50) i;
				UPDATE public.same SET v = 'y' WHERE id < 10; DELETE FROM public.same WHERE id = 50; UPDATE public.things SET id = 1000 WHERE id = 200; TRUNCATE public.emptied; INSERT INTO public.emptied SELECT i FROM generate_series(1, 20) i`)
			s.once()
			// What nobody captures, and how much of it there is in the end.
			for name := range tables {
				db.do(`CREATE TABLE audit.%[1]s AS SELECT * FROM public.%[1]s`, name)
			}
			db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
			for name := range tables {
				n := "substr(id::text, 1)"
				if name == "texts" {
					n = "substr(id, 4)"
				}
				db.do(`UPDATE public.%[1]s SET v = v || 'b' WHERE (%[2]s)::int %% 20 = 0; UPDATE public.%[1]s SET big = repeat('new', 900) WHERE (%[2]s)::int %% 50 = 1;
					UPDATE public.%[1]s SET d = NULL WHERE (%[2]s)::int %% 50 = 2; DELETE FROM public.%[1]s WHERE (%[2]s)::int %% 30 = 3`, name, n)
			}
			db.do(`UPDATE public.things SET id = 2000 WHERE id = 4; INSERT INTO public.things VALUES (33, 'again'), (3000, 'new'); UPDATE public.by_index SET u = -u WHERE id = 5; TRUNCATE public.emptied; INSERT INTO public.emptied VALUES (7, 'z')`)
			s.gapFound("the slot was dropped", "gone")
			if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
				t.Fatal(err)
			}
			l := s.openLog()
			gap, err := l.Head(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			differ := 0
			for name := range tables {
				key := "id"
				if name == "texts" {
					key = "v, id"
				}
				differ += int(atoi(t, db.one(`SELECT count(*) FROM audit.%[1]s a FULL JOIN public.%[1]s b USING (%[2]s) WHERE a IS DISTINCT FROM b`, name, key)))
			}
			differ += 1 + 19 // of emptied
			if busy {
				ctx, stop := context.WithCancel(context.Background())
				done := make(chan struct{})
				go func() {
					defer close(done)
					conn, err := dial(context.Background(), s.cfg.Capture.URL)
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close(context.Background())
					for i := 0; ctx.Err() == nil; i++ {
						time.Sleep(5 * time.Millisecond)
						for name := range tables {
							id := fmt.Sprint(i*7%200 + 1)
							if name == "texts" {
								id = fmt.Sprintf(`'k\,%s'`, id)
							}
							for _, q := range []string{`UPDATE public.%s SET d = '{"busy": %d}' WHERE id = %s`, `UPDATE public.%s SET v = 'moved %d' WHERE id = %s`, `DELETE FROM public.%s WHERE %[2]d %% 5 = 0 AND id = %[3]s`} {
								if _, err := conn.Exec(context.Background(), fmt.Sprintf(q, name, i, id)); err != nil {
									t.Error(err)
									return
								}
							}
						}
					}
				}()
				r := s.start()
				time.Sleep(500 * time.Millisecond)
				s.baselineDone()
				stop()
				<-done
				if err := r.end(); err != nil {
					t.Fatal(err)
				}
			}
			s.once()
			if got := s.complete(); got != "by_index emptied same texts things whole" {
				t.Errorf("complete: %s", got)
			}
			counts := db.one(`SELECT count(*) || ' ' || count(DISTINCT (relation, key)) FROM backstory.events WHERE type LIKE '%%Healed' AND position > %d`, gap.Position)
			t.Logf("%d rows differed, %s events and rows were healed", differ, counts)
			if !busy && counts != fmt.Sprintf("%d %[1]d", differ) {
				t.Errorf("%s events and rows were healed, want %d", counts, differ)
				for _, r := range db.rows(`SELECT relation, op, count(*) FROM backstory.events WHERE type LIKE '%%Healed' GROUP BY 1, 2 ORDER BY 1, 2`) {
					t.Log(r)
				}
			}
			if !busy {
				if n := db.one(`SELECT count(*) FROM backstory.events WHERE type NOT LIKE '%%Healed' AND op <> 'note' AND position > %d`, gap.Position); n != "0" {
					t.Errorf("%s other events were made", n)
				}
			}
			w := newWorld()
			w.replay(t, l, func(e *eventlog.Event) error {
				if e.Position == gap.Position {
					for name := range w.tables {
						w.unseen[name], w.healing = true, true
					}
				}
				return nil
			})
			w.sameTables(t, db, "n.nspname = 'public'")
			head, err := l.Head(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			columns := columnsOf(db, "n.nspname = 'public'")
			s.checkoutOfNow(db, head.Position, columns)
			// What happens now has its values of before.
			db.do(`UPDATE public.same SET v = 'after' WHERE id = 20; UPDATE public.things SET v = 'after' WHERE id = 8`)
			s.once()
			if got := db.one(`SELECT string_agg(op || ' ' || (before::jsonb ? 'v')::text, ', ') FROM backstory.events WHERE position > %d`, head.Position); got != "update true, update true" {
				t.Errorf("then: %s", got)
			}
		})
	}
}

// TestOtherKeySinceAGap: a table gets another key before it was compared after a gap. Rows that went in the gap are known by the former key alone, and
// nobody can tell by the new one: what the log has is discarded, and all rows come again. What was compared before stays.
func TestOtherKeySinceAGap(t *testing.T) {
	t.Parallel()
	for _, healed := range []bool{false, true} {
		s := newSystem(t, where{})
		db := s.sql()
		db.do(`CREATE TABLE public.things (id int PRIMARY KEY, n int NOT NULL UNIQUE, v text)`)
		s.init()
		db.do(`INSERT INTO public.things SELECT i, 100 + i, 'a' FROM generate_series(1, 5) i`)
		s.once()
		db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
		db.do(`DELETE FROM public.things WHERE id = 2`)
		if err := s.tryOnce(); !errors.Is(err, backstory.ErrGap) {
			t.Fatalf("without a slot: %v", err)
		}
		if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
			t.Fatal(err)
		}
		if healed {
			s.once()
			s.once()
		}
		db.do(`ALTER TABLE public.things DROP CONSTRAINT things_pkey, ADD PRIMARY KEY (n)`)
		db.do(`UPDATE public.things SET v = 'b' WHERE id = 3`)
		for range 3 {
			s.once()
		}
		s.says(0, "4 rows", "checkout", "--at", "HEAD", "--schema", "past")
		discarded := "1"
		if healed {
			discarded = "0"
		}
		if got := s.logSQL().one(`SELECT count(*) FROM backstory.events WHERE type = 'ThingDiscarded'`); got != discarded {
			t.Errorf("%s times the log's rows were discarded, want %s", got, discarded)
		}
	}
}

// TestAlteredInAGap: a table that was altered in a gap gets its new shape with an event, as otherwise.
func TestAlteredInAGap(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things SELECT i, 'a' FROM generate_series(1, 5) i`)
	s.init()
	s.once()
	db.do(`ALTER TABLE public.things ADD n int DEFAULT 4, DROP v; DELETE FROM public.things WHERE id = 2; SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	s.gapFound("the slot was dropped", "gone")
	s.goesOn(func() { db.do(`INSERT INTO public.things VALUES (6, 6)`) })
	if got := s.logSQL().one(`SELECT string_agg(data::text, ' ') FROM backstory.events WHERE type = 'ThingAltered'`); got != `{"added":["n"],"dropped":["v"]}` {
		t.Errorf("the events that tell of its shape: %s", got)
	}
}

// halfCompared waits until more than n chunks of the only table whose rows are compared have been, and gives how many have.
func halfCompared(t *testing.T, l *eventlog.Log, n int64) (chunks int64) {
	t.Helper()
	eventually(t, time.Minute, "half of the rows are compared", func() (bool, error) {
		list, err := l.Baselines(t.Context())
		if err != nil || len(list) != 1 {
			return false, err
		}
		chunks = list[0].Chunks
		return chunks > n, nil
	})
	return chunks
}

// TestOtherKeyInTheMiddleOfAComparison: what was compared so far was so by the key of before. With another one it begins anew, once that is recorded.
func TestOtherKeyInTheMiddleOfAComparison(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.Capture.BaselineChunkBytes, s.cfg.Capture.BaselineBytesPerSecond = 1, 20_000
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, n int NOT NULL UNIQUE, v text)`)
	s.init()
	db.do(`INSERT INTO public.things SELECT i, -i, repeat(md5(i::text), 100) FROM generate_series(1, 30) i`)
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`DELETE FROM public.things WHERE id %% 10 = 3; UPDATE public.things SET v = 'missed' WHERE id = 25`)
	s.gapFound("the slot was dropped", "gone")
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	l, run := s.openLog(), s.start()
	chunks := halfCompared(t, l, 10)
	db.do(`ALTER TABLE public.things DROP CONSTRAINT things_pkey, ADD PRIMARY KEY (n)`)
	time.Sleep(time.Second) // the next chunks are read
	if err := run.end(); err != nil {
		t.Fatal(err)
	}
	if chunks > 20 {
		t.Fatalf("%d chunks had been compared: nothing is left to compare", chunks)
	}
	s.once()
	s.once()
	s.equalsTables(db, l)
}

// TestKeyThatComesBack: what the log knew of a row by a key, before the table had another one for a while, is no state of it.
func TestKeyThatComesBack(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int CONSTRAINT things_key PRIMARY KEY, n int NOT NULL UNIQUE, v text)`)
	s.init()
	db.do(`INSERT INTO public.things SELECT i, -i, 'a' FROM generate_series(1, 3) i`)
	s.once()
	db.do(`ALTER TABLE public.things DROP CONSTRAINT things_key, ADD CONSTRAINT things_key PRIMARY KEY (n)`)
	s.once()
	s.once()
	db.do(`UPDATE public.things SET v = 'b' WHERE id = 1`)
	s.once()
	db.do(`ALTER TABLE public.things DROP CONSTRAINT things_key, ADD CONSTRAINT things_key PRIMARY KEY (id)`)
	db.do(`UPDATE public.things SET v = 'a' WHERE id = 1`) // as it was by this key
	s.once()
	s.once()
	s.equalsTables(db, s.openLog())
}

// TestFormerKeysAreNoHindrance: what key a table had once does not keep it from being compared, nor that it had none for a while, nor that only its
// inserts are captured.
func TestFormerKeysAreNoHindrance(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	for _, name := range []string{"rekeyed", "unkeyed", "deferred"} {
		db.do(`CREATE TABLE public.%s (id int CONSTRAINT %[1]s_pkey PRIMARY KEY, n int NOT NULL UNIQUE, v text)`, name)
	}
	db.do(`ALTER TABLE public.deferred DROP CONSTRAINT deferred_pkey, ADD CONSTRAINT deferred_pkey PRIMARY KEY (id) DEFERRABLE`)
	s.init()
	for _, name := range []string{"rekeyed", "unkeyed", "deferred"} {
		db.do(`INSERT INTO public.%s SELECT i, 100 + i, 'a' FROM generate_series(1, 20) i`, name)
	}
	s.once()
	db.do(`ALTER TABLE public.rekeyed DROP CONSTRAINT rekeyed_pkey, ADD PRIMARY KEY (n)`)
	s.once()
	s.once()
	s.says(1, "cannot be told by this key: its table had another one from position ", "show", "rekeyed/3")
	s.says(0, "\"v\"", "show", "--json", "rekeyed/103")
	s.says(0, "103", "show", "rekeyed/3", "--at", "50")
	s.says(0, "The key of public.rekeyed, n, is a number", "log", "rekeyed/abc")
	// Without a key for a while: then only inserts are captured.
	run := s.start()
	db.do(`ALTER TABLE public.unkeyed DROP CONSTRAINT unkeyed_pkey`)
	eventually(t, time.Minute, "it may be updated", func() (bool, error) {
		_, err := db.Exec(t.Context(), `UPDATE public.unkeyed SET v = 'untold' WHERE id = 7`)
		return err == nil, err
	})
	db.do(`DELETE FROM public.unkeyed WHERE id = 8; INSERT INTO public.unkeyed VALUES (21, 121, 'came'), (22, 122, 'came and went')`)
	db.do(`DELETE FROM public.unkeyed WHERE id = 22`)
	l := s.logSQL()
	eventually(t, time.Minute, "the inserts are in the log", func() (bool, error) {
		got := l.one(`SELECT count(*) FROM backstory.events WHERE relation = 'public.unkeyed' AND op = 'insert'`)
		return got == "22", fmt.Errorf("%s inserts", got)
	})
	db.do(`ALTER TABLE public.unkeyed ADD PRIMARY KEY (id)`)
	s.init()
	db.do(`UPDATE public.unkeyed SET v = 'told' WHERE id = 9`)
	if err := run.end(); err != nil {
		t.Fatal(err)
	}
	equal := func(when string, names ...string) {
		t.Helper()
		for range 2 {
			s.once()
		}
		columns := map[string][]string{}
		for _, name := range names {
			columns["public."+name] = []string{"id", "n", "v"}
		}
		head, err := s.openLog().Head(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		db.do(`DROP SCHEMA IF EXISTS of_now CASCADE`)
		s.checkoutOfNow(db, head.Position, columns)
		if t.Failed() {
			t.Fatal(when)
		}
	}
	equal("with its key back", "rekeyed", "unkeyed")
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	for _, name := range []string{"rekeyed", "unkeyed", "deferred"} {
		db.do(`DELETE FROM public.%s WHERE id = 2; UPDATE public.%[1]s SET v = 'missed' WHERE id = 3; INSERT INTO public.%[1]s VALUES (50, 150, 'missed')`, name)
	}
	if err := s.tryOnce(); !errors.Is(err, backstory.ErrGap) {
		t.Fatalf("without a slot: %v", err)
	}
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	equal("after a gap", "rekeyed", "unkeyed")
	db.do(`DROP SCHEMA of_now CASCADE`)
	s.sameRows("deferred")
	if got := l.one(`SELECT count(*) FROM backstory.events WHERE type LIKE '%%Discarded'`); got != "1" {
		t.Errorf("%s times the log's rows were discarded, want once, when the key was back", got)
	}
}

// TestCheckoutAfterAGap: what is not complete is named once, a partitioned table too, and a revision is advised only if it is complete.
func TestCheckoutAfterAGap(t *testing.T) {
	t.Parallel()
	for _, complete := range []bool{true, false} {
		s := newSystem(t, where{})
		db := s.sql()
		db.do(`CREATE TABLE public.things (id int PRIMARY KEY) PARTITION BY LIST (id)`)
		for i := range 3 {
			db.do(`CREATE TABLE public.things_%d PARTITION OF public.things FOR VALUES IN (%[1]d)`, i)
		}
		if !complete {
			s.cfg.NoBaseline = true
			db.do(`INSERT INTO public.things VALUES (0), (1), (2)`)
		}
		s.init()
		db.do(`DELETE FROM public.things; INSERT INTO public.things VALUES (0)`)
		s.once()
		db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
		if err := s.tryOnce(); !errors.Is(err, backstory.ErrGap) {
			t.Fatalf("without a slot: %v", err)
		}
		p := s.command(false, "checkout", "--at", "HEAD", "--schema", "past")
		if p.wait(time.Minute) != 1 || !strings.Contains(p.out.String(), "all rows of public.things: "+map[bool]string{true: "not every", false: "rows that it had before it was captured were left out"}[complete]) {
			t.Errorf("checkout says\n%s", p.out)
		}
		if advised := strings.Contains(p.out.String(), "a revision of before: --at"); advised != complete {
			t.Errorf("complete before the gap: %v; checkout says\n%s", complete, p.out)
		}
	}
}

// TestCheckoutAfterAHealedGap: what is missing for another reason is not put down to a gap that is healed.
func TestCheckoutAfterAHealedGap(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.keyless (v text); INSERT INTO public.keyless VALUES ('a'); CREATE TABLE public.whole (id int PRIMARY KEY); INSERT INTO public.whole VALUES (1);
		CREATE TABLE public.parted (id int PRIMARY KEY) PARTITION BY LIST (id); CREATE TABLE public.parted_1 PARTITION OF public.parted FOR VALUES IN (1); CREATE UNLOGGED TABLE public.parted_2 PARTITION OF public.parted FOR VALUES IN (2)`)
	s.init()
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	s.says(0, "", "init", "--accept-gap")
	const blamed = "the history has a gap"
	for _, table := range []string{"keyless", "whole"} {
		s.says(1, blamed, "checkout", "--at", "HEAD", "--schema", "past", table)
	}
	s.once()
	s.says(0, "1 row", "checkout", "--at", "HEAD", "--schema", "whole", "whole")
	for _, table := range []string{"keyless", "parted"} {
		for _, partial := range []bool{false, true} {
			p := s.command(false, "checkout", "--at", "HEAD", "--schema", "past_"+table, fmt.Sprintf("--partial=%v", partial), table)
			if code := p.wait(time.Minute); (code == 0) != partial || strings.Contains(p.out.String(), blamed) {
				t.Errorf("checkout of %s, partial: %v: exit code %d\n%s", table, partial, code, p.out)
			}
		}
	}
}

// TestShiftedKeysAreHealed: rows that hand their keys on to each other in one transaction, each before the next one has left, as a deferrable key lets
// them, are known by them after a gap.
func TestShiftedKeysAreHealed(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v text); ALTER TABLE public.things REPLICA IDENTITY FULL`)
	s.init()
	db.do(`INSERT INTO public.things SELECT i, 'row ' || i FROM generate_series(1, 6) i`)
	db.do(`UPDATE public.things SET id = id + 1`)
	db.do(`UPDATE public.things SET v = v || '!' WHERE id = 6`)
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`DELETE FROM public.things WHERE id = 3; UPDATE public.things SET v = 'changed' WHERE id = 5`)
	if err := s.tryOnce(); !errors.Is(err, backstory.ErrGap) {
		t.Fatalf("without a slot: %v", err)
	}
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	s.once()
	checkLog(t, s.openLog()).sameTables(t, db, "n.nspname = 'public'")
	s.says(0, "5 rows", "checkout", "--at", "HEAD", "--schema", "past")
	if got := s.logSQL().one(`SELECT string_agg(aggregate_id || ' ' || op, ', ' ORDER BY aggregate_id) FROM backstory.events WHERE type LIKE '%%Healed'`); got != "3 delete, 5 update" {
		t.Errorf("there was healed: %s", got)
	}
}

// TestColumnWithoutANameSinceAGap: a column is added, set and renamed in one transaction after a gap, before the table is compared: what the stream told of it, by a
// name that the catalogue does not have any more, does not count as known.
func TestColumnWithoutANameSinceAGap(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(simple)
	s.init()
	db.do(`INSERT INTO public.things SELECT i, 'a' FROM generate_series(1, 9) i`)
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	if err := s.tryOnce(); !errors.Is(err, backstory.ErrGap) {
		t.Fatalf("without a slot: %v", err)
	}
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	db.do(`BEGIN; ALTER TABLE public.things ADD c int DEFAULT 1; UPDATE public.things SET c = 2 WHERE id %% 3 = 0; ALTER TABLE public.things RENAME c TO d; COMMIT`)
	s.once()
	s.equalsTables(db, s.openLog())
}

// TestOnlyWhatChangesIsToldOfAComparedRow: a row that has been compared and is as the log had it leaves no event. When it changes before all
// the others are compared, unchanged TOAST is left out of the change: the log has it from before the gap.
func TestOnlyWhatChangesIsToldOfAComparedRow(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.Capture.BaselineChunkBytes, s.cfg.Capture.BaselineBytesPerSecond = 1, 20_000
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, n int, v text); ALTER TABLE public.things ALTER v SET STORAGE EXTERNAL`)
	s.init()
	db.do(`INSERT INTO public.things SELECT i, 0, repeat(md5(i::text), 100) FROM generate_series(1, 30) i`)
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`UPDATE public.things SET v = repeat('missed', 600) WHERE id %% 10 = 3`)
	s.gapFound("the slot was dropped", "gone")
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	l, run := s.openLog(), s.start()
	chunks := halfCompared(t, l, 15)
	db.do(`UPDATE public.things SET n = 1`)               // each row is seen for the first time since the gap
	db.do(`UPDATE public.things SET n = 2 WHERE id < 20`) // … and again
	if err := run.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	if chunks > 25 {
		t.Fatalf("%d chunks had been compared: nothing is left to compare", chunks)
	}
	db.do(`DELETE FROM public.things WHERE id IN (1, 2, 3, 23, 29)`)
	s.once()
	lacking := 0
	err := l.Read(t.Context(), eventlog.Selection{}, func(e *eventlog.Event) error {
		if e.Op == eventlog.OpImport && e.Rest == nil && len(unknown(e)) > 0 {
			lacking++
		}
		if e.Op == eventlog.OpDelete && len(unknown(e)) > 0 {
			t.Errorf("of the deleted row %s nobody knows %v", e.AggregateID, unknown(e))
		}
		return nil
	})
	if err != nil || lacking < 20 {
		t.Errorf("%v; %d rows were seen without v", err, lacking)
	}
	s.equalsTables(db, l)
}

// TestFormerKeyAndNoBaseline: where nothing is to be compared the log's rows are not discarded, either; they are once that is asked for.
func TestFormerKeyAndNoBaseline(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, n int NOT NULL UNIQUE, v text)`)
	s.init()
	db.do(`INSERT INTO public.things SELECT i, 100 + i, 'a' FROM generate_series(1, 5) i`)
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`DELETE FROM public.things WHERE id = 2; ALTER TABLE public.things DROP CONSTRAINT things_pkey, ADD PRIMARY KEY (n)`)
	if err := s.tryOnce(); !errors.Is(err, backstory.ErrGap) {
		t.Fatalf("without a slot: %v", err)
	}
	s.cfg.NoBaseline = true
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	db.do(`UPDATE public.things SET v = 'b' WHERE id = 3`)
	discarded := func(want string) {
		t.Helper()
		s.once()
		s.once()
		if got := s.logSQL().one(`SELECT count(*) FROM backstory.events WHERE type = 'ThingDiscarded'`); got != want {
			t.Errorf("%s times the log's rows were discarded, want %s", got, want)
		}
	}
	discarded("0")
	s.says(1, "the log does not have all rows of public.things", "checkout", "--at", "HEAD", "--schema", "past")
	s.cfg.NoBaseline = false
	s.init()
	discarded("1")
	head, err := s.openLog().Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.checkoutOfNow(db, head.Position, columnsOf(db, "n.nspname = 'public'"))
}
