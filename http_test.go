package backstory

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
	"github.com/backstory-dev/backstory/sinks"
)

func TestLivez(t *testing.T) {
	t.Run("is false while the log hangs on a batch", func(t *testing.T) {
		r := newRig(t, pgservertest.ForTest(t, quick()), nil)
		s, end := r.start()
		h := s.Handler()
		until(t, "it streams", func() bool { return s.Ready() == nil })
		s.stuck = 300 * time.Millisecond
		if code, body := get(h, "/livez"); code != http.StatusOK || body != "ok" {
			t.Errorf("at work: %d %s", code, body)
		}
		lock := r.open(r.cfg.Capture.URL)
		if _, err := lock.Exec(t.Context(), `BEGIN; SELECT FROM backstory.head FOR UPDATE`); err != nil {
			t.Fatal(err)
		}
		r.sql(`INSERT INTO public.orders VALUES (1, 'open')`)
		until(t, "/livez is false", func() bool { code, _ := get(h, "/livez"); return code == http.StatusServiceUnavailable })
		if _, body := get(h, "/livez"); !strings.Contains(body, "it has been working on one batch: the event log hangs") {
			t.Errorf("/livez says %q", body)
		}
		if _, err := lock.Exec(t.Context(), `ROLLBACK`); err != nil {
			t.Fatal(err)
		}
		until(t, "/livez is true again", func() bool { code, _ := get(h, "/livez"); return code == http.StatusOK })
		until(t, "the insert is in the log", func() bool { h, err := s.Log().Head(t.Context()); return err == nil && h.Position == 1 })
		if err := end(); err != nil {
			t.Error(err)
		}
	})
	for _, locked := range []string{`SELECT FROM backstory.head FOR UPDATE`, `LOCK TABLE backstory.head`, `LOCK TABLE backstory.captured`} {
		t.Run("is false while the log hangs at the start: "+locked, func(t *testing.T) {
			r := newRig(t, pgservertest.ForTest(t, quick()), nil)
			lock := r.open(r.cfg.Capture.URL)
			if _, err := lock.Exec(t.Context(), `BEGIN; `+locked); err != nil {
				t.Fatal(err)
			}
			s, end := r.start()
			s.stuck = 300 * time.Millisecond
			h := s.Handler()
			until(t, "/livez is false", func() bool { code, _ := get(h, "/livez"); return code == http.StatusServiceUnavailable })
			if _, err := lock.Exec(t.Context(), `ROLLBACK`); err != nil {
				t.Fatal(err)
			}
			until(t, "it streams", func() bool { return s.Ready() == nil })
			if code, body := get(h, "/livez"); code != http.StatusOK {
				t.Errorf("at work: %d %s", code, body)
			}
			if err := end(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("is true while somebody locks what is only looked at, and capture goes on", func(t *testing.T) {
		r := newRig(t, pgservertest.ForTest(t, quick()), nil)
		s, end := r.start()
		h := s.Handler()
		until(t, "it streams", func() bool { return s.Ready() == nil })
		s.stuck = 3 * time.Second
		lock := r.open(r.cfg.Capture.URL)
		if _, err := lock.Exec(t.Context(), `BEGIN; LOCK TABLE backstory.captured`); err != nil {
			t.Fatal(err)
		}
		for i, began := 1, time.Now(); time.Since(began) < 3*capturedEvery; i++ { // it is looked at in between
			r.sql(fmt.Sprintf(`INSERT INTO public.orders VALUES (%d, 'open')`, i))
			until(t, "the insert is in the log", func() bool {
				h, err := s.Log().Head(t.Context())
				return err == nil && h.Position == eventlog.Position(i)
			})
			if code, body := get(h, "/livez"); code != http.StatusOK {
				t.Fatalf("/livez: %d %s", code, body)
			}
			time.Sleep(200 * time.Millisecond)
		}
		if _, err := lock.Exec(t.Context(), `ROLLBACK`); err != nil {
			t.Fatal(err)
		}
		if err := end(); err != nil {
			t.Error(err)
		}
	})
	t.Run("is true while the source is away", func(t *testing.T) {
		server := pgservertest.Start(t, quick())
		r := newRig(t, server, pgservertest.ForTest(t, quick()))
		s, end := r.start()
		h := s.Handler()
		if code, body := get(h, "/readyz"); code != http.StatusServiceUnavailable || body == "" {
			t.Errorf("/readyz while it starts: %d %q", code, body)
		}
		until(t, "/readyz is true", func() bool { code, body := get(h, "/readyz"); return code == http.StatusOK && body == "ok" })
		s.stuck = 500 * time.Millisecond
		if err := server.Kill(); err != nil {
			t.Fatal(err)
		}
		until(t, "/readyz says why", func() bool {
			code, body := get(h, "/readyz")
			return code == http.StatusServiceUnavailable && strings.Contains(body, "connection refused")
		})
		for end := time.Now().Add(2 * s.stuck); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if code, body := get(h, "/livez"); code != http.StatusOK {
				t.Fatalf("/livez: %d %s", code, body)
			}
		}
		if code, body := get(h, "/api/v1/status"); code != http.StatusOK || !strings.Contains(body, "connection refused") {
			t.Errorf("/api/v1/status: %d %s", code, body)
		}
		if err := server.Restart(context.Background(), pgserver.Immediate); err != nil {
			t.Fatal(err)
		}
		until(t, "/readyz is true again", func() bool { code, _ := get(h, "/readyz"); return code == http.StatusOK })
		if err := end(); err != nil {
			t.Error(err)
		}
	})
}

// metricNames are the metrics, as README and deploy/alerts.yml speak of them.
var metricNames = []string{
	"backstory_events_appended_total", "backstory_transactions_appended_total", "backstory_log_commits_total", "backstory_log_bytes_total",
	"backstory_events_unattributed_total", "backstory_rows_first_seen_total", "backstory_rule_errors_total", "backstory_context_malformed_total", "backstory_context_ignored_total", "backstory_row_lookups_total",
	"backstory_log_position", "backstory_log_size_bytes", "backstory_streaming", "backstory_lag_bytes", "backstory_lag_seconds", "backstory_slot_retained_bytes", "backstory_slot_safe_bytes",
	"backstory_source_seen_timestamp_seconds", `backstory_reactor_lag_events{reactor="counter"}`, `backstory_reactor_lag_seconds{reactor="counter"}`, `backstory_reactor_position{reactor="counter"}`,
	`backstory_reactor_running{reactor="counter"}`, `backstory_reactor_sent_events_total{reactor="counter"}`, `backstory_reactor_errors_total{reactor="counter"}`,
	"go_goroutines", "process_resident_memory_bytes",
}

func TestMetrics(t *testing.T) {
	r := newRig(t, pgservertest.ForTest(t, quick()), nil)
	got := make(chan eventlog.Position, 100)
	r.cfg.Reactors = func(d *sinks.Dispatcher) error {
		return d.On("*", &sinks.Reactor{Name: "counter", Sink: counter{got}})
	}
	s, end := r.start()
	h := s.Handler()
	until(t, "it streams", func() bool { return s.Ready() == nil })
	for _, q := range []string{`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', '{"actor":"ann"}'); INSERT INTO public.orders VALUES (1, 'open'), (2, 'open'); COMMIT`,
		`SELECT pg_logical_emit_message(false, 'backstory', '{"actor":"mallory"}')`, `SELECT pg_logical_emit_message(false, 'another', 'x')`,
		`UPDATE public.orders SET status = 'paid' WHERE id = 1`, `BEGIN; SELECT pg_logical_emit_message(true, 'backstory', 'by hand'); DELETE FROM public.orders WHERE id = 2; COMMIT`} {
		r.sql(q)
	}
	for range 4 {
		<-got
	}
	var m map[string]float64
	until(t, "the slot has been looked at, and nothing is outstanding", func() bool {
		m = samples(t, h)
		_, ok := m["backstory_slot_retained_bytes"]
		return ok && m["backstory_lag_seconds"] == 0
	})
	for _, name := range metricNames {
		if _, ok := m[name]; !ok {
			t.Errorf("there is no metric %s", name)
		}
	}
	for name, want := range map[string]float64{
		"backstory_events_appended_total": 4, "backstory_transactions_appended_total": 3, "backstory_events_unattributed_total": 1,
		"backstory_context_malformed_total": 1, "backstory_context_ignored_total": 1, "backstory_rows_first_seen_total": 0, "backstory_log_position": 4, "backstory_streaming": 1, "backstory_lag_seconds": 0,
		"backstory_slot_safe_bytes": -1, `backstory_reactor_position{reactor="counter"}`: 4, `backstory_reactor_sent_events_total{reactor="counter"}`: 4,
		`backstory_reactor_running{reactor="counter"}`: 1, `backstory_reactor_lag_events{reactor="counter"}`: 0, `backstory_reactor_errors_total{reactor="counter"}`: 0,
	} {
		if m[name] != want {
			t.Errorf("%s is %v, want %v", name, m[name], want)
		}
	}
	for name, most := range map[string]float64{"backstory_slot_retained_bytes": 1 << 30, "backstory_lag_bytes": 1 << 30, "backstory_log_bytes_total": 10_000, "backstory_log_commits_total": 20} {
		if v := m[name]; v < 0 || v > most || name == "backstory_log_bytes_total" && v < 100 {
			t.Errorf("%s is %v", name, v)
		}
	}
	alerts, err := os.ReadFile("deploy/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range regexp.MustCompile(`\bbackstory_[a-z_]+`).FindAllString(string(alerts), -1) {
		_, plain := m[name]
		_, labelled := m[name+`{reactor="counter"}`]
		if !plain && !labelled {
			t.Errorf("deploy/alerts.yml speaks of %s, which does not exist", name)
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	if m = samples(t, h); m["backstory_streaming"] != 0 || m["backstory_events_appended_total"] != 4 {
		t.Errorf("when it has ended: streaming %v, events %v", m["backstory_streaming"], m["backstory_events_appended_total"])
	}
}

// samples reads the samples of /metrics.
func samples(t *testing.T, h http.Handler) map[string]float64 {
	t.Helper()
	code, body := get(h, "/metrics")
	if code != http.StatusOK {
		t.Fatalf("/metrics: %d %s", code, body)
	}
	m := map[string]float64{}
	for line := range strings.Lines(body) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(strings.TrimSpace(line[i+1:]), 64)
		if err != nil {
			t.Fatalf("/metrics: %s: %v", line, err)
		}
		m[line[:i]] = v
	}
	return m
}

func TestStatusOverHTTP(t *testing.T) {
	r := newRig(t, pgservertest.ForTest(t, quick()), nil)
	s, end := r.start()
	h := s.Handler()
	until(t, "it streams", func() bool { return s.Ready() == nil })
	r.sql(`INSERT INTO public.orders VALUES (1, 'open')`)
	code, body := get(h, "/api/v1/status")
	var st map[string]any
	if err := json.Unmarshal([]byte(body), &st); err != nil || code != http.StatusOK {
		t.Fatalf("/api/v1/status: %d %v\n%s", code, err, body)
	}
	// The names that scripts depend on.
	for _, path := range []string{"caught_up", "log.position", "source.received_lsn", "source.confirmed_lsn", "source.lag_bytes", "source.lag_seconds", "baseline.done", "reactors"} {
		var v any = st
		for _, name := range strings.Split(path, ".") {
			o, _ := v.(map[string]any)
			v = o[name]
		}
		if v == nil {
			t.Errorf("there is no %s in\n%s", path, body)
		}
	}
	if fmt.Sprint(st["caught_up"], st["log"].(map[string]any)["position"], st["running"]) != "true 1 true" {
		t.Errorf("after an insert: %s", body)
	}
	for _, path := range []string{"/", "/api/v1/nothing"} {
		if code, _ := get(h, path); code != http.StatusNotFound {
			t.Errorf("%s: %d", path, code)
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

func TestCheckAddr(t *testing.T) {
	for addr, ok := range map[string]bool{"127.0.0.1:8800": true, "localhost:0": true, "[::1]:8800": true, "127.0.0.2:1": true,
		":8800": false, "0.0.0.0:8800": false, "[::]:8800": false, "192.168.1.2:8800": false, "example.com:80": false, "8800": false, "": false} {
		if err := CheckAddr(addr); (err == nil) != ok || err != nil && eventlog.Hint(err) == "" {
			t.Errorf("%q: %v", addr, err)
		}
	}
}
