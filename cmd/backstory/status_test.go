package main

import (
	"encoding/json"
	"io"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
)

// What `status --json` prints is what a sidecar on the same machine says of itself over HTTP.
func TestStatusIsThatOfTheSidecar(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.begin()
	p := s.sidecar()
	s.caughtUp(p)
	s.until(20*time.Second, "it has caught up", p, func(st *backstory.Status) bool { return st.CaughtUp })
	resp, err := http.Get("http://" + s.env["BACKSTORY_HTTP_ADDR"] + "/api/v1/status")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	overHTTP, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, r := s.status()
	if want, got := steady(t, overHTTP), steady(t, []byte(r.out)); !reflect.DeepEqual(want, got) {
		t.Errorf("status --json:\n%s\nover HTTP:\n%s", r.out, overHTTP)
	}
	if st := s.must("status").out; !strings.Contains(st, "caught up") || !strings.Contains(st, "5 events") {
		t.Errorf("status:\n%s", st)
	}
	if got := p.stop(); got.code != 0 {
		t.Errorf("exit code %d:\n%s", got.code, got.err)
	}
	// Without a sidecar, the log and the source are asked.
	st, _ := s.status()
	if st.Running || !st.CaughtUp || int(st.Log.Position) != s.rows || st.Source.State != "stopped" {
		t.Errorf("without a sidecar: %+v", st)
	}
	s.whole()
}

// steady reads a status, all names and what does not change by itself: other tests write to the same server.
func steady(t *testing.T, b []byte) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	src := m["source"].(map[string]any)
	for _, k := range []string{"wal_lsn", "received_lsn", "confirmed_lsn", "restart_lsn", "lag_bytes", "lag_seconds", "retained_bytes", "safe_bytes"} {
		src[k] = reflect.TypeOf(src[k]).String()
	}
	log := m["log"].(map[string]any)
	log["end_lsn"] = reflect.TypeOf(log["end_lsn"]).String()
	return m
}
