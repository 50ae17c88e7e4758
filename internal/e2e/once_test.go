package e2e

import (
	"fmt"
	"testing"
)

// TestOnceHasWhatIsCommittedAsynchronously: with synchronous_commit = off a commit is visible before it is on the source's disk, and only then
// streamed. run --once ends with it all the same.
func TestOnceHasWhatIsCommittedAsynchronously(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, settings: map[string]string{"wal_writer_delay": "10s"}})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY)`)
	s.init()
	db.do(`SET synchronous_commit = off`)
	l := s.logSQL()
	for i := range 3 {
		db.do(`INSERT INTO public.things VALUES (%d)`, i)
		s.once()
		if got := l.one(`SELECT count(*) FROM backstory.events WHERE type = 'ThingCreated'`); got != fmt.Sprint(i+1) {
			t.Errorf("after %d commits %s are in the log", i+1, got)
		}
	}
}
