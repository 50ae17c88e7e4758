package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/eventlog"
)

// TestTableThatIsTakenInAgain: init leaves a table out and takes it in again. What happened to its rows in between is not in the log:
// the log says so in an event, and claims to know nothing of what a row was.
func TestTableThatIsTakenInAgain(t *testing.T) {
	t.Parallel()
	for _, runs := range []bool{false, true} {
		for _, pending := range []bool{false, true} { // changes of before that the log has not seen when init leaves it out
			t.Run(fmt.Sprintf("the sidecar runs: %v, is behind: %v", runs, pending), func(t *testing.T) {
				t.Parallel()
				s := newSystem(t, where{})
				db := s.sql()
				db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); CREATE TABLE public.other (id int PRIMARY KEY)`)
				s.cfg.NoBaseline = true // it is not compared with the source, for now
				s.init()
				var r *running
				db.do(`INSERT INTO public.things VALUES (1, 'a'), (2, 'a'), (3, 'a')`)
				if runs {
					r = s.start()
				} else if !pending {
					s.once()
				}
				marks := 0
				whole := func() {
					t.Helper()
					marks++
					db.do(`INSERT INTO public.other VALUES (%d)`, marks)
					if !runs {
						s.once()
					}
					eventually(t, 30*time.Second, "the log has everything", func() (bool, error) {
						return db.one(`SELECT count(*) FROM backstory.events WHERE relation = 'public.other'`) == fmt.Sprint(marks), nil
					})
				}
				if !pending {
					whole()
				}
				s.cfg.Capture.Exclude = []string{"public.things"}
				s.init()
				db.do(`UPDATE public.things SET v = 'unseen'; DELETE FROM public.things WHERE id = 2`)
				if !pending {
					whole()
				}
				s.cfg.Capture.Exclude = nil
				s.init()
				db.do(`UPDATE public.things SET v = 'seen' WHERE id = 1`)
				whole()
				db.do(`UPDATE public.things SET v = 'again' WHERE id = 1; DELETE FROM public.things WHERE id = 3`)
				whole()
				whole()
				got := db.one(`SELECT string_agg(op || ' ' || coalesce(aggregate_id, '') || ' ' || coalesce(before->>'v', ''), ', ' ORDER BY position) FROM backstory.events WHERE aggregate = 'Thing'`)
				want := "insert 1 , insert 2 , insert 3 , gap  , import 1 , update 1 seen, delete 3 "
				if got != want {
					t.Errorf("the log has %s\nwant        %s", got, want)
				}
				if r != nil {
					if err := r.end(); err != nil {
						t.Error(err)
					}
				}
				verify(t, s.openLog())
				s.cfg.NoBaseline = false
				s.init()
				s.once()
				if got := db.one(`SELECT string_agg(op || ' ' || key, ', ' ORDER BY position) FROM backstory.events WHERE type = 'ThingHealed'`); got != "delete 2" || s.complete() != "other things" {
					t.Errorf("compared with the source, the log has %s; complete: %s", got, s.complete())
				}
			})
		}
	}
}

// TestKeyDroppedOfATableTakenInLater: a sidecar that runs learns what init has taken in, and looks after that, too.
func TestKeyDroppedOfATableTakenInLater(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(simple)
	s.init()
	r := s.start()
	db.do(`CREATE TABLE public.late (id int PRIMARY KEY, v text)`)
	s.init()
	db.do(`INSERT INTO public.late VALUES (1, 'a')`)
	eventually(t, 30*time.Second, "it is captured", func() (bool, error) {
		return db.one(`SELECT count(*) FROM backstory.events WHERE relation = 'public.late'`) == "1", nil
	})
	db.do(`ALTER TABLE public.late DROP CONSTRAINT late_pkey`)
	eventually(t, 10*time.Second, "the application's UPDATE works", func() (bool, error) {
		_, err := db.Exec(t.Context(), `UPDATE public.late SET v = 'b'`)
		return err == nil, err
	})
	eventually(t, 20*time.Second, "the gap is recorded", func() (bool, error) {
		return db.one(`SELECT count(*) FROM backstory.events WHERE type = 'LateGap'`) == "1", nil
	})
	if err := r.end(); err != nil {
		t.Error(err)
	}
}

// TestGapThatIsNone: nothing is thrown away by accepting a gap that there is not.
func TestGapThatIsNone(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(simple)
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	_, err := backstory.AcceptGap(t.Context(), s.cfg, nil)
	var p *eventlog.Problem
	if !errors.As(err, &p) || !strings.Contains(err.Error(), "there is no gap") {
		t.Errorf("accepting it: %v", err)
	}
	if found := s.dangers(); strings.Contains(found, "the log") {
		t.Errorf("doctor finds %s", found)
	}
	s.once()
	if n := db.one(`SELECT count(*) FROM backstory.events`); n != "1" {
		t.Errorf("the log has %s events", n)
	}
	// With one there is something to accept, and doctor sees it before and after the sidecar has met it.
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	if found := s.dangers(); !strings.Contains(found, "the log does not go on: the replication slot "+s.cfg.Capture.Slot+" is gone") {
		t.Errorf("the slot is gone, doctor finds %s", found)
	}
	if err := s.tryOnce(); err == nil {
		t.Error("run --once goes on without a slot")
	}
	if found := s.dangers(); !strings.Contains(found, "the log does not go on: the replication slot "+s.cfg.Capture.Slot+" is gone") {
		t.Errorf("with the gap noted, doctor finds %s", found)
	}
	if _, err := backstory.AcceptGap(t.Context(), s.cfg, nil); err != nil {
		t.Error(err)
	}
	s.once()
	if n := db.one(`SELECT count(*) FROM backstory.events WHERE op = 'gap'`); n != "1" {
		t.Errorf("%s gaps are noted", n)
	}
}

// dangers is what doctor calls a danger.
func (s *system) dangers() string {
	s.t.Helper()
	list, err := backstory.Examine(s.t.Context(), s.cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	var out []string
	for _, f := range list {
		if f.Severity == "danger" {
			out = append(out, f.What)
		}
	}
	return strings.Join(out, "; ")
}
