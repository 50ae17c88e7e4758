package e2e

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/eventlog"
)

// TestInitBehindVacuum: init, the first one or another, waits for VACUUM or CREATE INDEX CONCURRENTLY of one table, says so, and holds nobody up meanwhile,
// who writes to another one. It gives up in the end with nothing done, or goes on.
func TestInitBehindVacuum(t *testing.T) {
	t.Parallel()
	for _, first := range []bool{true, false} {
		s := newSystem(t, where{})
		db := s.sql()
		if !first {
			db.do(`CREATE TABLE public.things (id int PRIMARY KEY)`)
			s.init()
		}
		db.do(`CREATE TABLE public.empty (id int PRIMARY KEY, v text); CREATE TABLE public.large (id int PRIMARY KEY); INSERT INTO public.large VALUES (1)`)
		vacuum, app := s.sql(), s.sql()
		vacuum.do(`BEGIN; LOCK TABLE public.large IN SHARE UPDATE EXCLUSIVE MODE`) // as VACUUM and CREATE INDEX CONCURRENTLY do
		pid := "pid " + vacuum.one(`SELECT pg_backend_pid()`)
		var mu sync.Mutex
		said := ""
		waiting := func(list []string) {
			mu.Lock()
			defer mu.Unlock()
			said += strings.Join(list, " ")
		}
		published := func() string {
			return db.one(`SELECT count(*) FROM pg_publication_rel WHERE prrelid IN ('public.empty'::regclass, 'public.large'::regclass)`)
		}
		s.cfg.Capture.BlockedAfter = 4 * time.Second
		began := time.Now()
		done := make(chan error, 1)
		go func() { _, err := s.tryInit(within(t, time.Minute), waiting); done <- err }()
		var slowest time.Duration
		var err error
		for n := 0; err == nil && len(done) == 0; n++ {
			at := time.Now()
			_, err = app.Exec(context.Background(), `BEGIN; INSERT INTO public.empty VALUES (1, 'a'); ROLLBACK`)
			slowest = max(slowest, time.Since(at))
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil || slowest > time.Second {
			t.Errorf("first init: %v: the application's INSERT into another table took up to %s: %v", first, slowest, err)
		}
		if err := <-done; err == nil || !strings.Contains(err.Error(), pid) || eventlog.Hint(err) == "" || published() != "0" {
			t.Errorf("first init: %v: after %s: %v (%s); published: %s", first, time.Since(began), err, eventlog.Hint(err), published())
		}
		if mu.Lock(); !strings.Contains(said, pid) {
			t.Errorf("first init: %v: while it waited it said %q", first, said)
		}
		mu.Unlock()
		s.cfg.Capture.BlockedAfter = time.Minute
		go func() { _, err := s.tryInit(within(t, time.Minute), nil); done <- err }()
		time.Sleep(2 * time.Second)
		vacuum.do(`COMMIT`)
		if err := <-done; err != nil || published() != "2" {
			t.Errorf("first init: %v: when nothing is in the way: %v; published: %s", first, err, published())
		}
	}
}

// TestAcceptGapKeepsTheSlotUntilItCan: a gap is accepted only where the rest can be done: otherwise the old slot, and what it keeps, stay.
func TestAcceptGapKeepsTheSlotUntilItCan(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY)`)
	s.init()
	db.do(`DROP PUBLICATION backstory_inserts; CREATE PUBLICATION backstory_inserts WITH (publish = 'insert, truncate'); CREATE TABLE public.later (id int PRIMARY KEY)`)
	owner, role := s.cfg.Capture.URL, "accepts_"+s.cfg.Capture.Slot
	db.do(`CREATE ROLE %s LOGIN REPLICATION; ALTER TABLE public.later OWNER TO %[1]s`, role)
	t.Cleanup(func() { db.do(`ALTER TABLE public.later OWNER TO CURRENT_USER; DROP ROLE %s`, role) })
	state := func() string {
		return db.one(`SELECT string_agg(slot_name || restart_lsn, ' ') FROM pg_replication_slots WHERE database = current_database()`) + s.logSQL().one(`SELECT position || coalesce(gap, '') FROM backstory.head`)
	}
	db.do(`ALTER PUBLICATION backstory SET (publish = 'insert')`) // a gap
	before := state()
	accept := func() error {
		_, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil)
		return err
	}
	s.cfg.Capture.URL = withUser(t, owner, role)
	if err := accept(); err == nil || !strings.Contains(err.Error(), "publication backstory") || !strings.Contains(eventlog.Hint(err), "init --accept-gap again") || state() != before {
		t.Errorf("by a role that owns no publication: %v (%s); before %s, after %s", err, eventlog.Hint(err), before, state())
	}
	s.cfg.Capture.URL, s.cfg.Capture.BlockedAfter = owner, time.Second
	vacuum := s.sql()
	vacuum.do(`BEGIN; LOCK TABLE public.later IN SHARE UPDATE EXCLUSIVE MODE`)
	if err := accept(); err == nil || !strings.Contains(err.Error(), "in use for") || state() != before {
		t.Errorf("behind a VACUUM: %v; before %s, after %s", err, before, state())
	}
	vacuum.do(`COMMIT; BEGIN; INSERT INTO public.later VALUES (1)`)
	s.cfg.Capture.BlockedAfter = 2 * time.Second
	if err := accept(); err == nil || !strings.Contains(err.Error(), "the gap is not accepted: waited 2s for open transactions") || !strings.Contains(err.Error(), "open for") || state() != before {
		t.Errorf("behind a transaction: %v (%s); before %s, after %s", err, eventlog.Hint(err), before, state())
	}
	s.cfg.Capture.BlockedAfter = time.Minute
	time.AfterFunc(3*time.Second, func() { vacuum.do(`COMMIT`) })
	told := 0
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, func(who []string) { told += len(who) }); err != nil || told == 0 {
		t.Fatalf("%v; told %d times for whom it waits", err, told)
	}
	s.once()
	s.equalsTables(db, s.openLog())
}
