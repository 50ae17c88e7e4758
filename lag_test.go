package backstory

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// While the log's server is away, at the start or later, nothing ends: what it is waited for is said, what the source keeps
// meanwhile is watched, and when the server is back everything arrives.
func TestLogIsAway(t *testing.T) {
	server := pgservertest.Start(t, quick())
	r := newRig(t, pgservertest.ForTest(t, quick()), server)
	away := func() {
		t.Helper()
		if err := server.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	back := func() {
		t.Helper()
		if err := server.Restart(context.Background(), pgserver.Immediate); err != nil {
			t.Fatal(err)
		}
	}
	away()
	once := r.cfg
	once.Once = true
	if _, err := New(t.Context(), once); err == nil || eventlog.Hint(err) == "" {
		t.Errorf("New with Once while the log is away: %v (%s)", err, eventlog.Hint(err))
	}
	wrong := r.cfg
	wrong.Log.URL = r.server.URL("no_such_database")
	if _, err := New(t.Context(), wrong); err == nil || eventlog.Hint(err) == "" {
		t.Errorf("New with a database that does not exist: %v (%s)", err, eventlog.Hint(err))
	}
	s, end := r.start()
	h := s.Handler()
	for i, when := range []string{"at the start", "later"} {
		r.sql(`INSERT INTO public.orders SELECT count(*) + 1, repeat('x', 100) FROM public.orders`)
		until(t, when+": /readyz says why", func() bool {
			code, body := get(h, "/readyz")
			return code == http.StatusServiceUnavailable && strings.Contains(body, "connect to the event log") && strings.Contains(body, "connection refused")
		})
		var m map[string]float64
		until(t, when+": the source is watched, and the lag grows", func() bool {
			m = samples(t, h)
			return m["backstory_lag_bytes"] > 0 && m["backstory_lag_seconds"] > 2 && m["backstory_slot_retained_bytes"] > 0
		})
		if age := float64(time.Now().Unix()) - m["backstory_source_seen_timestamp_seconds"]; age > 2*lookEvery.Seconds() || m["backstory_streaming"] != 0 || m["backstory_slot_safe_bytes"] != -1 {
			t.Errorf("%s: the source was seen %.0f s ago, streaming %v, safe %v", when, age, m["backstory_streaming"], m["backstory_slot_safe_bytes"])
		}
		var st Status
		if code, body := get(h, "/api/v1/status"); code != http.StatusOK || json.Unmarshal([]byte(body), &st) != nil || st.Log.Error == "" || st.Log.Hint == "" ||
			st.Source.State != "waiting" || st.Source.WALLSN == "" || st.Source.LagBytes <= 0 || st.Source.LagSeconds < 1 || st.Source.RetainedBytes <= 0 || st.CaughtUp {
			t.Errorf("%s: status %d %s", when, code, body)
		}
		if f := st.Findings(); len(f) != 1 || f[0].Check != "sidecar" || !strings.Contains(f[0].What, "the sidecar does not get on: ") || !strings.Contains(f[0].What, "connect to the event log") || f[0].Mend() == "" {
			t.Errorf("%s: doctor finds %+v", when, f)
		}
		if code, body := get(h, "/livez"); code != http.StatusOK {
			t.Errorf("%s: /livez %d %s", when, code, body)
		}
		back()
		until(t, when+": everything arrives", func() bool {
			m = samples(t, h)
			return m["backstory_log_position"] == float64(i+1) && m["backstory_lag_seconds"] == 0 && m["backstory_streaming"] == 1
		})
		if i == 0 {
			away()
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	if m := samples(t, h); m["backstory_log_position"] != 2 {
		t.Errorf("when it has ended: position %v", m["backstory_log_position"])
	}
}

// A log that takes nothing, for longer than the source waits for a sign of life, costs no connection and no event; the lag says for
// how long.
func TestLogHangs(t *testing.T) {
	cfg := quick()
	cfg.Settings["wal_sender_timeout"] = "2s"
	server := pgservertest.ForTest(t, cfg)
	r := newRig(t, server, nil)
	s, end := r.start()
	h := s.Handler()
	until(t, "it streams", func() bool { return s.Ready() == nil })
	walsender := func() string {
		return r.ask(`SELECT coalesce(active_pid::text, '') FROM pg_replication_slots WHERE slot_name = '%s'`, r.cfg.Capture.Slot)
	}
	before := walsender()
	lock := r.open(r.cfg.Capture.URL)
	if _, err := lock.Exec(t.Context(), `BEGIN; SELECT FROM backstory.head FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	const rows = 3000
	began := time.Now()
	for range rows / 1000 { // more than one batch, so that the stream has to wait, too
		r.sql(`INSERT INTO public.orders SELECT (SELECT count(*) FROM public.orders) + i, repeat('x', 1000) FROM generate_series(1, 1000) i`)
	}
	until(t, "the lag is longer than the source waits", func() bool { return samples(t, h)["backstory_lag_seconds"] > 7 })
	if m := samples(t, h); m["backstory_lag_bytes"] < rows*1000 || m["backstory_lag_seconds"] > time.Since(began).Seconds()+2 {
		t.Errorf("after %s: lag %v bytes, %v seconds", time.Since(began), m["backstory_lag_bytes"], m["backstory_lag_seconds"])
	}
	if now := walsender(); now != before {
		t.Errorf("the walsender was pid %s, now %q", before, now)
	}
	if _, err := lock.Exec(t.Context(), `ROLLBACK`); err != nil {
		t.Fatal(err)
	}
	until(t, "everything arrives", func() bool {
		m := samples(t, h)
		return m["backstory_log_position"] == rows && m["backstory_lag_seconds"] == 0
	})
	if now := walsender(); now != before {
		t.Errorf("afterwards: the walsender was pid %s, now %q", before, now)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

// How much the log grows in a day is the share of its size that the events of the last 24 hours have, once the history is as long.
func TestGrowth(t *testing.T) {
	r := newRig(t, pgservertest.ForTest(t, quick()), nil)
	s, end := r.start()
	r.sql(`INSERT INTO public.orders SELECT i, 'open' FROM generate_series(1, 300) i`)
	until(t, "they are in the log", func() bool { h, err := s.Log().Head(t.Context()); return err == nil && h.Position == 300 })
	if err := end(); err != nil {
		t.Fatal(err)
	}
	for days, want := range []int64{0, 1} {
		r.sql(fmt.Sprintf(`SET backstory.maintenance = on; UPDATE backstory.head SET began_at = now() - %d * interval '3 days'; UPDATE backstory.event SET occurred_at = occurred_at - %[1]d * interval '2 days' WHERE position <= 200`, days))
		st, err := ReadStatus(t.Context(), r.cfg)
		if err != nil {
			t.Fatal(err)
		}
		if got := st.Log.GrowthBytesPerDay; st.Log.SizeBytes == 0 || got != want*int64(float64(st.Log.SizeBytes)*100/300) {
			t.Errorf("of %d bytes, a third of one day, %d are said to have come in a day", st.Log.SizeBytes, got)
		}
	}
}

// Without a sidecar, too, the age of the oldest change that is not in the log is known: the slot itself tells.
func TestLagWithoutASidecar(t *testing.T) {
	r := newRig(t, pgservertest.ForTest(t, quick()), nil)
	read := func() *Status {
		t.Helper()
		st, err := ReadStatus(t.Context(), r.cfg)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	if st := read(); !st.CaughtUp || st.Source.LagSeconds != 0 {
		t.Errorf("with nothing outstanding: %+v", st.Source)
	}
	r.sql(`CREATE TABLE public.uncaptured (id int); INSERT INTO public.uncaptured VALUES (1)`)
	if st := read(); !st.CaughtUp || st.Source.LagSeconds != 0 || st.Source.LagBytes != 0 {
		t.Errorf("with nothing captured outstanding: %+v", st.Source)
	}
	r.sql(`INSERT INTO public.orders VALUES (1, 'open')`)
	at := time.Now()
	until(t, "the change is more than a second old", func() bool { return read().Source.LagSeconds > 1 })
	r.sql(`INSERT INTO public.orders VALUES (2, 'open')`)
	if st := read(); st.CaughtUp || st.Source.LagBytes <= 0 || st.Source.LagSeconds < 1 || st.Source.LagSeconds > time.Since(at).Seconds()+0.5 {
		t.Errorf("%s after the first change: %+v", time.Since(at), st.Source)
	}
}
