package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/internal/pgserver"
)

// TestWALGuard: while the log's server is down, the source keeps its WAL, up to the limit: then the slot is dropped, and somebody streaming from it
// does not prevent that. When the log is back it says why changes are missing, and is compared with the source.
func TestWALGuard(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, settings: map[string]string{"max_wal_size": "1GB"}})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); CREATE TABLE public.noise (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text)`)
	s.cfg.WALLimitBytes, s.cfg.WALAlarmBytes = 100<<20, 30<<20
	var said lines
	s.cfg.Logger = slog.New(slog.NewTextHandler(&said, nil))
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	r := s.start()
	eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
	time.Sleep(3 * time.Second) // within which it has taken note of that
	if err := s.log.Kill(); err != nil {
		t.Fatal(err)
	}
	slots := func() string { return db.one(`SELECT count(*) FROM pg_replication_slots`) }
	fill := func(mb int) {
		for range mb / 10 {
			db.do(`INSERT INTO public.noise (v) SELECT repeat(md5(i::text), 30) FROM generate_series(1, 10000) i`)
		}
	}
	fill(70)
	time.Sleep(6 * time.Second)
	if slots() != "1" {
		t.Fatal("the slot was dropped below the limit")
	}
	eventually(t, time.Minute, "somebody is alarmed", func() (bool, error) {
		return strings.Contains(said.String(), "the source keeps much WAL for the replication slot"), fmt.Errorf("%s", said.tail(10))
	})
	rec := httptest.NewRecorder()
	r.sc.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	for _, name := range []string{"backstory_slot_confirmed_bytes_behind", "backstory_slot_retained_bytes"} {
		_, rest, _ := strings.Cut(rec.Body.String(), "\n"+name+" ")
		value, _, _ := strings.Cut(rest, "\n")
		if n, err := strconv.ParseFloat(value, 64); err != nil || n < 60<<20 || n > 100<<20 {
			t.Errorf("%s is %q after 70 MB, %v", name, value, err)
		}
	}
	fill(70)
	eventually(t, time.Minute, "the slot is dropped", func() (bool, error) { return slots() == "0", nil })
	eventually(t, 20*time.Second, "it is said loudly", func() (bool, error) {
		return strings.Contains(said.String(), `level=ERROR msg="the replication slot was dropped, so that the source's disk does not fill up" slot=`+s.cfg.Capture.Slot+" retained_bytes=1"), fmt.Errorf("%s", said.tail(10))
	})
	db.do(`UPDATE public.things SET v = 'unseen'`)
	if err := s.log.Restart(t.Context(), pgserver.Immediate); err != nil {
		t.Fatal(err)
	}
	var err error
	select {
	case err = <-r.done:
		r.done <- err
	case <-time.After(time.Minute):
		t.Fatal("the sidecar goes on without a slot")
	}
	if err == nil || !strings.Contains(err.Error(), "the sidecar dropped it, since the source kept") {
		t.Fatalf("the sidecar ended with %v", err)
	}
	s.healed("1 unseen")
}

// TestWhoHoldsWAL: status names the transaction for which the source keeps its WAL.
func TestWhoHoldsWAL(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, settings: map[string]string{"max_wal_size": "1GB"}})
	db := s.sql()
	db.do(simple)
	s.init()
	other := s.sql()
	pid := other.one(`SELECT pg_backend_pid()`)
	other.do(`BEGIN; INSERT INTO public.things VALUES (1, 'open')`)
	db.do(`CREATE TABLE public.noise AS SELECT repeat(md5(i::text), 30) AS v FROM generate_series(1, 100000) i`)
	s.once()
	eventually(t, 2*time.Minute, "it is said who holds the WAL", func() (bool, error) {
		st, err := backstory.ReadStatus(t.Context(), s.cfg)
		return err == nil && strings.Contains(strings.Join(st.Source.HeldBack, " "), "pid "+pid), err
	})

	// A role that may not see since when others' transactions are open is told of those only that stay so.
	db.do(`CREATE ROLE weak LOGIN REPLICATION; GRANT CONNECT ON DATABASE %s TO weak`, databaseOf(t, s.cfg.Capture.URL))
	own := s.cfg.Capture.URL
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	writer := s.sql()
	brief := writer.one(`SELECT pg_backend_pid()`)
	wg.Go(func() {
		for ctx.Err() == nil {
			_, _ = writer.Exec(t.Context(), `BEGIN; INSERT INTO public.noise VALUES ('x'); SELECT pg_sleep(0.3); COMMIT`)
		}
	})
	s.cfg.Capture.URL = withUser(t, own, "weak")
	for range 3 {
		st, err := backstory.ReadStatus(t.Context(), s.cfg)
		held := ""
		if err == nil {
			held = strings.Join(st.Source.HeldBack, " ")
		}
		if !strings.Contains(held, "pid "+pid) || strings.Contains(held, "pid "+brief) {
			t.Errorf("held back by %q, %v; want pid %s, and not %s", held, err, pid, brief)
		}
	}
	stop()
	wg.Wait()
	s.cfg.Capture.URL = own
	other.do(`COMMIT`)
}
