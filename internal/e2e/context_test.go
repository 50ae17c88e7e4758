package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestContext: who and why come from transactional messages with our prefixes, and from no others; what is no JSON object
// is kept as it is and counted, and can stop nothing, whoever sends it.
func TestContext(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(simple)
	db.do(`DO $$ BEGIN CREATE ROLE anybody_e2e LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$`)
	s.init()
	r := s.start()
	id := 0
	var want []string
	transaction := func(expected string, emit ...string) {
		t.Helper()
		id++
		db.do("BEGIN; %s; INSERT INTO public.things VALUES (%d, ''); COMMIT", strings.Join(append(emit, "SELECT 1"), "; "), id)
		want = append(want, expected)
	}
	const valid = `{"actor": "anna", "reason": "a \"quoted\" \\ é", "n": [1, {"x": null}]}`
	transaction("")
	transaction(valid, `SELECT pg_logical_emit_message(true, 'backstory', `+quoteLit(valid)+`)`)
	transaction(valid, `SELECT pg_logical_emit_message(true, '_bemi', `+quoteLit(valid)+`)`)
	transaction("", `SELECT pg_logical_emit_message(false, 'backstory', '{"actor": "nobody"}')`)
	transaction("", `SELECT pg_logical_emit_message(true, 'somebody else', '{"actor": "nobody"}')`)
	transaction("", `SELECT pg_logical_emit_message(true, 'Backstory', '{"actor": "nobody"}')`)
	transaction("", `SAVEPOINT s; SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "nobody"}'); ROLLBACK TO s`)
	transaction(`{}`, `SELECT pg_logical_emit_message(true, 'backstory', '{}')`)
	// Malformed in every way that has stopped something.
	malformed := 0
	for _, content := range []string{`'no JSON'`, `''`, `'[1]'`, `'null'`, `'"x"'`, `'{"a": 1'`, `'{"a": 1}}'`, `'\xff'::bytea`, `'\x7b2261223a22ff227d'::bytea`,
		`'\x7b2261223a2200227d'::bytea`, `'{"a": "\u0000"}'`, `(repeat('[', 20000) || repeat(']', 20000))`, `('{"a":' || repeat('[', 5000) || repeat(']', 5000) || '}')`,
		`('{"a":' || repeat('{"a":', 9000) || '1' || repeat('}', 9000) || '}')`} {
		transaction("malformed", `SELECT pg_logical_emit_message(true, 'backstory', `+content+`)`)
		malformed++
	}
	// Valid JSON that jsonb would refuse.
	for _, odd := range []string{`{"a": 1e999999}`, `{"a": "\ud800"}`, ` {"a" : 1 , "a" : 2 } `, "{\n}"} {
		transaction(odd, `SELECT pg_logical_emit_message(true, 'backstory', `+quoteLit(odd)+`)`)
	}
	// Anybody may send messages, even where nothing may be written.
	anybody := open(t, withUser(t, s.cfg.Capture.URL, "anybody_e2e"))
	anybody.do(`SET default_transaction_read_only = on`)
	anybody.do(`SELECT pg_logical_emit_message(false, 'backstory', '{"actor": "nobody"}')`)
	anybody.do(`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "nobody"}'); COMMIT`)
	for _, prefix := range []string{"backstory.chunk", "backstory.ddl"} { // the sidecar's own
		for _, content := range []string{"", "x", "{", `{"dropped":[1]}`, "1/1/1"} {
			anybody.do(`SELECT pg_logical_emit_message(true, '%s', '%s')`, prefix, content)
		}
	}
	transaction("")
	l := s.logSQL()
	eventually(t, time.Minute, "all of it is in the log", func() (bool, error) {
		select {
		case err := <-r.done:
			t.Fatalf("the sidecar ended: %v", err)
		default:
		}
		return l.one(`SELECT position FROM backstory.head`) == fmt.Sprint(id), nil
	})
	status, err := r.sc.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}

	counted := 0
	all := s.allEvents()
	if len(all) != len(want) {
		t.Fatalf("%d events, want %d", len(all), len(want))
	}
	for i, e := range all {
		got := string(e.Metadata)
		var m map[string]json.RawMessage
		if e.Metadata != nil && json.Unmarshal(e.Metadata, &m) != nil {
			t.Errorf("event %d: metadata %s is no JSON object", i+1, short(got))
		}
		if _, ok := m["malformed"]; ok {
			got = "malformed"
			counted++
		}
		if got != want[i] {
			t.Errorf("event %d: metadata %s, want %s", i+1, short(got), short(want[i]))
		}
	}
	if counted != malformed || status.Log.MalformedContext != int64(malformed) {
		t.Errorf("%d are kept as malformed, %d were counted, want %d", counted, status.Log.MalformedContext, malformed)
	}
	// The view can be read whatever the context is, also beside what is known of an event alone.
	if n := l.one(`SELECT count(metadata) FROM backstory.events`); n != fmt.Sprint(malformed+7) {
		t.Errorf("the view has %s contexts, want %d", n, malformed+7)
	}
	if n := l.one(`SELECT count(*) FROM backstory.thing_events`); n != l.one(`SELECT count(*) FROM backstory.events`) {
		t.Errorf("the view of the aggregate has %s events", n)
	}
	for in, out := range map[string]string{`{}`: `{"first_seen":true}`, ` { } `: `{"first_seen":true}`, `{"a":1e999999}`: `{"a":1e999999,"first_seen":true}`,
		"{\"a\":\"\\ud800\"}\n": `{"a":"\ud800","first_seen":true}`} {
		if got := l.one(`SELECT backstory.merged(%s::json, '{"first_seen":true}')`, quoteLit(in)); got != out {
			t.Errorf("merged(%q) = %s, want %s", in, got, out)
		}
	}
	verify(t, s.openLog())
}
