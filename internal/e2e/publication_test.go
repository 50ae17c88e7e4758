package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
)

// TestPublicationAlteredWhileTheSidecarRuns: whoever alters a publication in any way leaves changes out of the stream, without a word in it. It
// is a gap, and once that is accepted everything is published again.
func TestPublicationAlteredWhileTheSidecarRuns(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text, w text); CREATE TABLE public.others (id int PRIMARY KEY, v text)`)
	s.init()
	events := s.logSQL()
	for i, x := range []struct {
		from  int
		alter string
	}{
		{15, `ALTER PUBLICATION backstory SET TABLE ONLY public.things WHERE (id > 1000000), ONLY public.others`},
		{15, `ALTER PUBLICATION backstory SET TABLE ONLY public.things (id), ONLY public.others`},
		{14, `ALTER PUBLICATION backstory SET (publish = 'insert')`},
		{14, `ALTER PUBLICATION backstory SET (publish_via_partition_root = true)`},
		{14, `ALTER PUBLICATION backstory RENAME TO aside`},
		{14, `DROP PUBLICATION backstory; CREATE PUBLICATION backstory FOR TABLE public.things, public.others`},
	} {
		if s.src.Major() < x.from {
			continue
		}
		run := s.start()
		db.do(`INSERT INTO public.things VALUES (%d, 'a', 'b'); INSERT INTO public.others VALUES (%[1]d)`, i)
		eventually(t, time.Minute, "they are in the log", func() (bool, error) {
			return run.sc.Ready() == nil && events.one(`SELECT count(*) FROM backstory.events WHERE aggregate_id = '%d' AND type IN ('ThingCreated', 'OtherCreated')`, i) == "2", nil
		})
		db.do("%s", x.alter)
		db.do(`UPDATE public.things SET v = 'c', w = '%d'; INSERT INTO public.others VALUES (%d, 'missed')`, i, 100+i)
		if err := run.failed(time.Minute); !errors.Is(err, backstory.ErrGap) {
			t.Fatalf("after %s the sidecar ended with %v", x.alter, err)
		}
		if i == 4 {
			db.do(`DROP PUBLICATION aside`)
		}
		s.goesOn(func() { db.do(`UPDATE public.things SET v = 'd'; DELETE FROM public.others WHERE id = %d`, i) })
	}
	if got := db.one(`SELECT count(*) FROM pg_publication_rel r JOIN pg_publication p ON p.oid = prpubid WHERE pubname = 'backstory' AND to_jsonb(r) ->> 'prqual' IS NULL AND to_jsonb(r) ->> 'prattrs' IS NULL AND pubupdate AND NOT pubviaroot`); got != "2" {
		t.Errorf("%s tables are published as they should be", got)
	}
}

// TestPublicationAlteredWhileNobodyRuns: a publication that is dropped, and made again as it was or not, is a gap also where nobody was told. From WAL of before PostgreSQL 14 to
// 17 cannot go on, and 18 goes on without its tables.
func TestPublicationAlteredWhileNobodyRuns(t *testing.T) {
	t.Parallel()
	for what, again := range map[string]string{"dropped": "", "made again": `CREATE PUBLICATION backstory FOR TABLE ONLY public.things WITH (publish = 'insert, update, delete, truncate')`} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			db := s.sql()
			db.do(simple)
			s.init()
			db.do(`INSERT INTO public.things VALUES (1, 'a')`)
			s.once()
			db.do(`INSERT INTO public.things VALUES (2, 'before')`)
			db.do(`DROP PUBLICATION backstory`)
			db.do(`INSERT INTO public.things VALUES (3, 'while it is gone')`)
			db.do("%s", again)
			db.do(`INSERT INTO public.things VALUES (4, 'after'); UPDATE public.things SET v = 'changed' WHERE id = 1`)
			s.gapFound(what, "publication backstory was dropped")
			s.goesOn(func() { db.do(`INSERT INTO public.things VALUES (5, 'at last')`) })
		})
	}
}

// TestTablesThatWereNotPublishedForAWhile: one that is taken out of its publication, put back or not, gets a gap of its own. Nobody has to accept that, and
// of the others nothing is missing. What is told of it before it is captured again claims nothing that may be wrong.
func TestTablesThatWereNotPublishedForAWhile(t *testing.T) {
	t.Parallel()
	const out, back = `ALTER PUBLICATION backstory DROP TABLE public.things; ALTER PUBLICATION backstory_inserts DROP TABLE public.keyless, public.nothing`,
		`ALTER PUBLICATION backstory ADD TABLE public.things; ALTER PUBLICATION backstory_inserts ADD TABLE public.keyless, public.nothing`
	for name, x := range map[string]struct{ running, back, init bool }{
		"taken out at work":                          {running: true},
		"taken out and put back at work":             {running: true, back: true},
		"taken out while it is stopped":              {},
		"taken out and put back while it is stopped": {back: true},
		"taken out, and init puts it back":           {init: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{apart: true})
			db := s.sql()
			db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text, w text); ALTER TABLE public.things ALTER w SET STORAGE EXTERNAL; CREATE TABLE public.keyless (v text); CREATE TABLE public.others (id int PRIMARY KEY, v text)`)
			db.do(`CREATE TABLE public.nothing (id int PRIMARY KEY, v text); ALTER TABLE public.nothing REPLICA IDENTITY NOTHING; INSERT INTO public.nothing SELECT i, 'first' FROM generate_series(1, 9) i`)
			db.do(`INSERT INTO public.things SELECT i, 'first', repeat('w', 5000) FROM generate_series(1, 9) i; INSERT INTO public.keyless VALUES ('first')`)
			s.init()
			s.once()
			l := s.logSQL()
			since := l.one(`SELECT max(since_lsn) FROM backstory.captured`)
			var run *running
			if x.running {
				run = s.start()
				eventually(t, time.Minute, "it streams", func() (bool, error) { err := run.sc.Ready(); return err == nil, err })
			}
			db.do(`UPDATE public.things SET v = 'before' WHERE id <= 5; INSERT INTO public.keyless VALUES ('before'); INSERT INTO public.others VALUES (1, 'before')`)
			from := db.one(`SELECT pg_current_wal_insert_lsn()`)
			db.do("BEGIN; " + out + "; COMMIT")
			db.do(`UPDATE public.things SET v = 'missed'; DELETE FROM public.things WHERE id = 2; INSERT INTO public.things VALUES (10, 'missed', 'w'); INSERT INTO public.keyless VALUES ('missed'); DELETE FROM public.nothing WHERE id = 7; UPDATE public.nothing SET v = 'missed' WHERE id < 3; INSERT INTO public.nothing VALUES (11, 'missed'); UPDATE public.others SET v = 'meanwhile'`)
			if x.back {
				db.do("BEGIN; " + back + "; COMMIT")
			}
			if x.init {
				s.init()
			}
			db.do(`UPDATE public.things SET v = 'after' WHERE id IN (1, 10); UPDATE public.things SET w = repeat('x', 6000) WHERE id = 3; INSERT INTO public.things VALUES (2, 'after', 'w'); INSERT INTO public.keyless VALUES ('after'); UPDATE public.others SET v = 'after'`)
			if !x.running {
				run = s.start()
			}
			eventually(t, time.Minute, "all is complete, by itself", func() (bool, error) {
				got := l.one(`SELECT coalesce(string_agg(c.name, ' '), '') FROM backstory.captured c JOIN backstory.baseline b USING (oid) WHERE b.done_at IS NOT NULL AND b.since_lsn = c.since_lsn AND (c.complete OR c.insert_only)
					AND c.since_lsn > '%s' AND EXISTS (SELECT FROM backstory.events WHERE relation = 'public.' || c.name AND type LIKE '%%Gap')`, since)
				return len(got) == len("keyless nothing things"), fmt.Errorf("%s; the gaps are %s", got, l.one(`SELECT string_agg(type || data, ' ') FROM backstory.events WHERE type LIKE '%%Gap'`))
			})
			db.do(`UPDATE public.things SET v = v || ' and done'; UPDATE public.others SET v = 'done'`)
			if err := run.end(); err != nil {
				t.Fatal(err)
			}
			s.once()
			// Nothing of the other table is missing, and it has no gap.
			if got := l.one(`SELECT string_agg(type || ' ' || (data ->> 'v'), ', ' ORDER BY position) FROM backstory.events WHERE relation = 'public.others'`); got != "OtherCreated before, OtherUpdated meanwhile, OtherUpdated after, OtherUpdated done" {
				t.Errorf("the other table: %s", got)
			}
			if got := l.one(`SELECT count(*) FROM backstory.events WHERE type = 'SourceGap'`); got != "0" {
				t.Errorf("%s gaps of all tables", got)
			}
			if got := l.one(`SELECT count(*) FROM backstory.events WHERE relation = 'public.things' AND data ->> 'v' = 'before'`); got != "5" {
				t.Errorf("%s updates of before are in the log", got)
			}
			if got := l.one(`SELECT count(DISTINCT relation) FROM backstory.events WHERE type LIKE '%%Gap' AND (data ->> 'from_lsn')::pg_lsn <= '%s'`, from); got != "3" {
				t.Errorf("the gaps of %s tables begin before they were taken out, want 3", got)
			}
			// No event says that a row was what it was before something that is missing.
			for _, r := range l.ask(`SELECT position, type, aggregate_id, coalesce(before::text, ''), data FROM backstory.events WHERE relation = 'public.things' AND type <> 'ThingHealed' AND data ->> 'v' LIKE 'after%%' AND before ->> 'v' IN ('first', 'before')`) {
				t.Errorf("an event claims what it cannot know: %v", r)
			}
			if t.Failed() {
				for _, r := range l.ask(`SELECT position, type, aggregate_id, left(coalesce(before::text, ''), 60), left(data::text, 200) FROM backstory.events ORDER BY position`) {
					t.Logf("%v", r)
				}
			}
			log := s.openLog()
			verify(t, log)
			s.equalsTables(db, log)
		})
	}
}

// TestRowsThatAreKnownAfterMissedChanges: while nobody knows yet where changes of a table are missing, only the first event of a row on either side is in doubt.
// An UPDATE that changes nothing after it is no event, and what the row was before it is known from there.
func TestRowsThatAreKnownAfterMissedChanges(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]struct {
		identity string
		atOnce   bool // in one transaction
	}{"by key": {"DEFAULT", false}, "by index": {"USING INDEX things_u", false}, "in one transaction": {"DEFAULT", true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{apart: true})
			db := s.sql()
			db.do(`CREATE TABLE public.things (id int PRIMARY KEY, u int NOT NULL CONSTRAINT things_u UNIQUE, v text, w text); ALTER TABLE public.things ALTER w SET STORAGE EXTERNAL; ALTER TABLE public.things REPLICA IDENTITY %s;
				INSERT INTO public.things SELECT i, i, 'first', repeat('w', 5000) FROM generate_series(1, 3) i`, x.identity)
			s.init()
			s.once()
			const change = `UPDATE public.things SET v = '%[1]s 1' WHERE id < 3; UPDATE public.things SET v = '%[1]s 1' WHERE id = 1; UPDATE public.things SET v = '%[1]s 2' WHERE id = 1; `
			steps := []string{fmt.Sprintf(change, "before"), `ALTER PUBLICATION backstory DROP TABLE public.things; `, fmt.Sprintf(change, "missed"), `ALTER PUBLICATION backstory ADD TABLE public.things; `,
				fmt.Sprintf(change, "after") + `UPDATE public.things SET w = 'short' WHERE id = 2; DELETE FROM public.things WHERE id = 1; INSERT INTO public.things VALUES (1, 1, 'new', 'w'); UPDATE public.things SET v = 'newer' WHERE id = 1`}
			if x.atOnce {
				steps = []string{"BEGIN; " + strings.Join(steps, "") + "; COMMIT"}
			}
			for _, q := range steps {
				db.do("%s", q)
			}
			s.once()
			s.once()
			for id, want := range map[int]string{
				1: "import  before 1, update before 1 before 2, import  after 1, update after 1 after 2, delete after 2 , insert  new, update new newer",
				2: "import  before 1, import  after 1, update  ",
			} {
				if got := s.logSQL().one(`SELECT string_agg(concat_ws(' ', op, coalesce(before ->> 'v', ''), coalesce(data ->> 'v', '')), ', ' ORDER BY position) FROM backstory.events WHERE relation = 'public.things' AND op <> 'gap'
					AND type NOT LIKE '%%Healed' AND (metadata ->> 'first_seen' = 'true' OR op <> 'import') AND aggregate_id = '%d' AND type NOT LIKE '%%Ended'`, id); got != want {
					t.Errorf("row %d: %s, want %s", id, got, want)
				}
			}
			l := s.openLog()
			verify(t, l)
			s.equalsTables(db, l)
		})
	}
}

// TestTakenOutWhileInitWaits: init, which waits for somebody's lock, does not record as if nothing had happened what has happened meanwhile.
func TestTakenOutWhileInitWaits(t *testing.T) {
	t.Parallel()
	for _, running := range []bool{false, true} {
		t.Run(fmt.Sprintf("a sidecar runs: %v", running), func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{apart: true})
			db, locker := s.sql(), s.sql()
			db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things SELECT i, 'first' FROM generate_series(1, 9) i`)
			s.init()
			s.once()
			end := func() {}
			if running {
				run := s.start()
				eventually(t, time.Minute, "it streams", func() (bool, error) { err := run.sc.Ready(); return err == nil, err })
				end = func() {
					if err := run.end(); err != nil {
						t.Fatal(err)
					}
				}
			}
			db.do(`CREATE TABLE public.later (id int)`)
			locker.do(`BEGIN; LOCK TABLE public.later IN SHARE UPDATE EXCLUSIVE MODE`)
			done := make(chan error, 1)
			go func() { _, err := s.tryInit(within(t, time.Minute), nil); done <- err }()
			eventually(t, 30*time.Second, "init waits", func() (bool, error) {
				return db.one(`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%%LOCK TABLE%%later%%' AND now() - query_start > interval '300 ms'`) != "0", nil
			})
			db.do(`ALTER PUBLICATION backstory DROP TABLE public.things`)
			db.do(`UPDATE public.things SET v = 'missed' WHERE id < 5; DELETE FROM public.things WHERE id = 9`)
			db.do(`ALTER PUBLICATION backstory ADD TABLE public.things`)
			time.Sleep(5 * time.Second) // the sidecar may have seen it
			locker.do(`COMMIT`)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			end()
			db.do(`UPDATE public.things SET v = 'after' WHERE id = 1; DROP TABLE public.later`)
			s.once()
			s.once()
			l := s.openLog()
			s.equalsTables(db, l)
		})
	}
}

// TestRowsMadeWhileOnlyInsertsWereCaptured: a row that the stream has told of while its table had no identity is compared like all others once it
// has one again: what became of it meanwhile is not in the stream.
func TestRowsMadeWhileOnlyInsertsWereCaptured(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things VALUES (1, 'first')`)
	s.init()
	s.once()
	db.do(`ALTER TABLE public.things REPLICA IDENTITY NOTHING`)
	run := s.start()
	eventually(t, time.Minute, "only inserts are published", func() (bool, error) {
		_, err := db.Exec(t.Context(), `UPDATE public.things SET v = 'updated'`)
		return err == nil, err
	})
	db.do(`INSERT INTO public.things VALUES (2, 'inserted'), (3, 'inserted')`)
	l := s.logSQL()
	eventually(t, 10*time.Second, "the rows are in the log", func() (bool, error) {
		return l.one(`SELECT count(*) FROM backstory.events WHERE type = 'ThingCreated'`) == "2", fmt.Errorf("%s", l.one(`SELECT string_agg(position || ' ' || type || coalesce(data::text, ''), ', ' ORDER BY position) FROM backstory.events`))
	})
	if err := run.end(); err != nil {
		t.Fatal(err)
	}
	db.do(`UPDATE public.things SET v = 'updated'; DELETE FROM public.things WHERE id = 3; ALTER TABLE public.things REPLICA IDENTITY DEFAULT`)
	s.init()
	s.once()
	s.equalsTables(db, s.openLog())
}

// TestDescendantsArePublishedByThemselves: a table that others inherit from enters and leaves a publication alone.
func TestDescendantsArePublishedByThemselves(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.parent (id int PRIMARY KEY, v text); CREATE TABLE public.child (PRIMARY KEY (id)) INHERITS (public.parent); CREATE TABLE public.secret (PRIMARY KEY (id)) INHERITS (public.parent)`)
	s.cfg.Capture.Exclude = []string{"public.secret"}
	published := func(want string) {
		t.Helper()
		got := db.one(`SELECT string_agg(pubname || ' ' || tablename, ', ' ORDER BY pubname, tablename) FROM pg_publication_tables WHERE pubname LIKE 'backstory%%'`)
		if got != want {
			t.Errorf("published: %s, want %s", got, want)
		}
	}
	s.init()
	published("backstory child, backstory parent")
	run := s.start()
	db.do(`INSERT INTO public.parent VALUES (1, 'a'); INSERT INTO public.child VALUES (1, 'a'); INSERT INTO public.secret VALUES (1, 'a')`)
	db.do(`ALTER TABLE public.parent DROP CONSTRAINT parent_pkey`)
	eventually(t, time.Minute, "the parent is moved", func() (bool, error) {
		_, err := db.Exec(t.Context(), `UPDATE ONLY public.parent SET v = 'b'`)
		return err == nil, fmt.Errorf("%w", err)
	})
	published("backstory child, backstory_inserts parent")
	db.do(`UPDATE public.child SET v = 'b'`)
	if err := run.end(); err != nil {
		t.Fatal(err)
	}
	s.cfg.Capture.Exclude = append(s.cfg.Capture.Exclude, "public.parent")
	s.init()
	published("backstory child")
	db.do(`UPDATE public.child SET v = 'c'; UPDATE public.secret SET v = 'c'`)
	s.once()
	if got := s.logSQL().one(`SELECT string_agg(DISTINCT relation || ' ' || n, ', ') FROM (SELECT relation, count(*) OVER (PARTITION BY relation) AS n FROM backstory.events WHERE type LIKE '%%Updated' OR relation = 'public.secret') e`); got != "public.child 2" {
		t.Errorf("updates in the log: %s", got)
	}
}
