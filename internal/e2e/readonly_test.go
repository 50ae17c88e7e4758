package e2e

import (
	"errors"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// TestSourceIsReadOnlyByDefault: default_transaction_read_only, of a database or a role, does not bind the sidecar on the source. Otherwise a table
// that loses its key stayed where the application cannot update it any more.
func TestSourceIsReadOnlyByDefault(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things SELECT i, 'a' FROM generate_series(1, 5) i`)
	db.do(`ALTER DATABASE %s SET default_transaction_read_only = on; ALTER ROLE postgres SET default_transaction_read_only = on`, databaseOf(t, s.cfg.Capture.URL))
	defer db.do(`ALTER ROLE postgres RESET default_transaction_read_only`)
	s.init()
	r, l := s.start(), s.logSQL()
	eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
	db.do(`CREATE TABLE public.later (id int PRIMARY KEY); INSERT INTO public.later VALUES (1)`)
	eventually(t, time.Minute, "a later table is taken in", func() (bool, error) {
		got := l.one(`SELECT string_agg(name, ' ' ORDER BY name) FROM backstory.captured WHERE complete`)
		return got == "later things", errors.New(got)
	})
	db.do(`ALTER TABLE public.things DROP CONSTRAINT things_pkey`)
	eventually(t, time.Minute, "the application can update it", func() (bool, error) {
		_, err := db.Exec(t.Context(), `UPDATE public.things SET v = 'b' WHERE id = 1`)
		return err == nil, err
	})
	if err := r.end(); err != nil {
		t.Error(err)
	}

	// In the log's own place the setting still is a wish. Nothing is left of an init that it has stopped.
	s = newSystem(t, where{})
	db = s.sql()
	db.do(simple)
	db.do(`ALTER DATABASE %s SET default_transaction_read_only = on`, databaseOf(t, s.cfg.Capture.URL))
	if _, err := s.tryInit(within(t, time.Minute), nil); !errors.Is(err, eventlog.ErrReadOnly) {
		t.Errorf("with the log in a database that is read-only: %v", err)
	}
	if got := db.one(`SELECT (SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_replication_slots WHERE slot_name = '%s')`, s.cfg.Capture.Slot); got != "0" {
		t.Errorf("init has left %s of slot and publications", got)
	}
}
