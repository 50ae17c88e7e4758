package e2e

import (
	"errors"
	"fmt"
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
	l := s.openLog()
	for i, x := range []struct {
		from  int
		alter string
	}{
		{15, `ALTER PUBLICATION backstory SET TABLE ONLY public.things WHERE (id > 1000000), ONLY public.others`},
		{15, `ALTER PUBLICATION backstory SET TABLE ONLY public.things (id), ONLY public.others`},
		{14, `ALTER PUBLICATION backstory SET (publish = 'insert')`},
		{14, `ALTER PUBLICATION backstory SET (publish_via_partition_root = true)`},
		{14, `BEGIN; ALTER PUBLICATION backstory DROP TABLE public.others; COMMIT; ALTER PUBLICATION backstory ADD TABLE public.others`},
		{14, `ALTER PUBLICATION backstory RENAME TO aside`},
		{14, `DROP PUBLICATION backstory; CREATE PUBLICATION backstory FOR TABLE public.things, public.others`},
	} {
		if s.src.Major() < x.from {
			continue
		}
		run := s.start()
		db.do(`INSERT INTO public.things VALUES (%d, 'a', 'b'); INSERT INTO public.others VALUES (%[1]d)`, i)
		eventually(t, time.Minute, "they are in the log", func() (bool, error) {
			n := 0
			h, err := l.Head(t.Context())
			if err == nil {
				n = int(h.Position)
			}
			return err == nil && run.sc.Ready() == nil && n >= 2*(i+1), err
		})
		db.do("%s", x.alter)
		db.do(`UPDATE public.things SET v = 'c', w = '%d'; INSERT INTO public.others VALUES (%d, 'missed')`, i, 100+i)
		if err := run.failed(time.Minute); !errors.Is(err, backstory.ErrGap) {
			t.Fatalf("after %s the sidecar ended with %v", x.alter, err)
		}
		if i == 5 {
			db.do(`DROP PUBLICATION aside`)
		}
		s.goesOn(func() { db.do(`UPDATE public.things SET v = 'd'; DELETE FROM public.others WHERE id = %d`, i) })
		h, err := l.Head(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		db.do(`DROP SCHEMA IF EXISTS of_now CASCADE`)
		s.checkoutOfNow(db, h.Position, columnsOf(db, "n.nspname = 'public'"))
	}
	if got := db.one(`SELECT count(*) FROM pg_publication_rel r JOIN pg_publication p ON p.oid = prpubid WHERE pubname = 'backstory' AND to_jsonb(r) ->> 'prqual' IS NULL AND to_jsonb(r) ->> 'prattrs' IS NULL AND pubupdate AND NOT pubviaroot`); got != "2" {
		t.Errorf("%s tables are published as they should be", got)
	}
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
