package main

import (
	"bufio"
	"encoding/json"
	"io"
	"net/http"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/eventlog"
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

// status answers for the database that it is asked about, whoever listens on the port, and makes none up.
func TestStatusIsOfWhatIsNamed(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.begin()
	p := s.sidecar()
	s.caughtUp(p)
	source, port := s.env["BACKSTORY_SOURCE_URL"], strings.TrimPrefix(s.env["BACKSTORY_HTTP_ADDR"], "127.0.0.1:")

	// Another database, which has no log; the sidecar of the first one answers on the port.
	s.env["BACKSTORY_SOURCE_URL"] = s.server.URL(s.server.NewDatabase(t))
	r := s.run("status")
	if r.code == 0 || strings.Contains(r.out, "streaming") || !strings.Contains(r.err, "no event log in this database") || !strings.Contains(r.err, ":"+port+" is another one: it captures "+eventlog.Address(source)) {
		t.Errorf("of another database: exit code %d\n%s%s", r.code, r.out, r.err)
	}
	// A server that does not answer: the sidecar knows nothing of it either.
	s.env["BACKSTORY_SOURCE_URL"] = "postgres://postgres@127.0.0.1:1/shop"
	if r := s.run("status"); r.code == 0 || strings.Contains(r.out, "streaming") {
		t.Errorf("of a server that is away: exit code %d\n%s%s", r.code, r.out, r.err)
	}
	// The log alone is named: its sidecar is found all the same.
	delete(s.env, "BACKSTORY_SOURCE_URL")
	s.env["BACKSTORY_LOG_URL"] = source
	if r := s.must("status"); !strings.Contains(r.out, "streaming") || !strings.Contains(r.out, eventlog.Address(source)) {
		t.Errorf("of the log, with a sidecar:\n%s", r.out)
	}
	if got := p.stop(); got.code != 0 {
		t.Errorf("exit code %d:\n%s", got.code, got.err)
	}
	if r := s.must("status"); !strings.Contains(r.out, "not asked") || !strings.Contains(r.out, "BACKSTORY_SOURCE_URL") || strings.Contains(r.out, "refused") {
		t.Errorf("of the log alone:\n%s%s", r.out, r.err)
	}
}

// An application that says who and why in a way that cannot be read is told so, where its owner looks.
func TestContextThatCannotBeRead(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.begin()
	p := s.sidecar()
	s.sql(`SELECT pg_logical_emit_message(true, 'backstory', '{"actor": ')`)
	s.until(20*time.Second, "the one without a change is counted", p, func(st *backstory.Status) bool { return st.Log.MalformedContext == 1 })
	s.sql(`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', 'ann'); INSERT INTO orders VALUES (901, 'a'); COMMIT`)
	s.sql(`BEGIN; SELECT pg_logical_emit_message(false, 'backstory', '{"actor": "ann"}'); INSERT INTO orders VALUES (902, 'a'); COMMIT`)
	want := []string{"2 context messages were not a JSON object", `Emit {"actor"`, "1 context message was not transactional", "pg_logical_emit_message(true"}
	now := s.until(20*time.Second, "both are counted", p, func(st *backstory.Status) bool {
		return st.Log.MalformedContext == 2 && st.Log.IgnoredContext == 1 && st.Log.Events == 5
	})
	if now.Log.UnattributedShare != 0.8 { // three rows before, and the second of these
		t.Errorf("%.2f of the events are without who and why", now.Log.UnattributedShare)
	}
	st := s.must("status").out
	logged := p.stop().err
	for _, w := range want {
		if !strings.Contains(st, w) {
			t.Errorf("status lacks %q:\n%s", w, st)
		}
		if !strings.Contains(strings.ReplaceAll(logged, `\"`, `"`), w) {
			t.Errorf("run does not say %q:\n%s", w, logged)
		}
	}
}

// Who and why are missing only where the application could have said them: existing rows that are taken over, and what a comparison finds, do not count.
func TestShareWithoutWhoAndWhy(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.write(20)
	s.must("init")
	p := s.sidecar()
	s.until(20*time.Second, "existing rows are taken over", p, func(st *backstory.Status) bool { return st.Baseline.Done && st.Log.Events > 20 })
	if st, r := s.status(); st.Log.UnattributedShare != 0 || st.Log.ApplicationEvents != 0 || strings.Contains(s.must("status").out, "without who and why") {
		t.Errorf("before the application did anything: %s", r.out)
	}
	s.sql(`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "ann"}'); INSERT INTO orders VALUES (901, 'a'); COMMIT`)
	s.sql(`INSERT INTO orders VALUES (902, 'a')`)
	s.until(20*time.Second, "one of two events is without who and why", p, func(st *backstory.Status) bool {
		return st.Log.ApplicationEvents == 2 && st.Log.UnattributedShare == 0.5
	})
	if st := s.must("status").out; !strings.Contains(st, "2 events of the application, 50 % without who and why") {
		t.Errorf("status:\n%s", st)
	}
	p.stop()
}

// A table that has lost its key is named as long as it has none, not only until it is in the publication of inserts.
func TestStatusOfATableThatHasLostItsKey(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.sql("CREATE TABLE keyless (v int)")
	s.begin()
	p := s.sidecar()
	s.caughtUp(p)
	lost := func(want string) func(*backstory.Status) bool {
		return func(st *backstory.Status) bool {
			return strings.Join(st.Source.KeyLost, " ") == want && len(st.Source.Refused) == 0
		}
	}
	s.until(time.Second, "no key is lost", p, lost(""))
	s.sql("ALTER TABLE orders DROP CONSTRAINT orders_pkey")
	s.until(30*time.Second, "orders has lost its key", p, lost("public.orders"))
	if st := s.must("status").out; !strings.Contains(st, "only inserts are captured, since it has lost its key: public.orders\n") {
		t.Errorf("status:\n%s", st)
	}
	p.stop()
	if st, r := s.status(); !lost("public.orders")(st) {
		t.Errorf("without a sidecar: %s", r.out)
	}
	s.sql("ALTER TABLE orders ADD PRIMARY KEY (id)")
	s.must("init")
	if st, r := s.status(); !lost("")(st) {
		t.Errorf("with a key again: %s", r.out)
	}
}

// What compares rows with the log is not called taking over existing rows, with a sidecar and without.
func TestComparingIsNotTakingOver(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.sql("CREATE TABLE keyless (v int); INSERT INTO keyless VALUES (1)")
	s.must("init")
	s.sql("INSERT INTO orders SELECT i, repeat('x', 100) FROM generate_series(1, 60000) i; ANALYZE orders")
	s.must("run", "--once")
	next := func(st *backstory.Status) *backstory.TableComparison {
		t.Helper()
		if len(st.Baseline.Comparisons) != 1 || st.Baseline.Comparisons[0].Table != "public.keyless" {
			t.Fatalf("comparisons: %+v", st.Baseline.Comparisons)
		}
		return &st.Baseline.Comparisons[0]
	}
	st, _ := s.status()
	if c := next(st); c.NextAt.Sub(c.ReadAt) < 10*time.Minute || c.Changed == nil || *c.Changed {
		t.Errorf("of a table that has not changed: %+v", c)
	}
	if out := s.must("status").out; !regexp.MustCompile(`only inserts are captured of 1 table; what updates and deletes make of their rows is found by comparing them with the log:\n +public\.keyless +read (just now|[0-9]+ seconds? ago), again when the source counts an UPDATE or DELETE of it, in [0-9ms]+ at the earliest\n`).MatchString(out) {
		t.Errorf("status:\n%s", out)
	}
	s.sql("UPDATE keyless SET v = 2")
	eventually(t, 20*time.Second, "the source has counted that", func() bool { st, _ := s.status(); return *next(st).Changed })
	if out := s.must("status").out; !regexp.MustCompile(`public\.keyless +read (just now|[0-9]+ seconds? ago), again in [0-9ms]+\n`).MatchString(out) {
		t.Errorf("status of one that has:\n%s", out)
	}
	s.env["BACKSTORY_COMPARE_INTERVAL"] = "0"
	if st, _ := s.status(); !next(st).NextAt.IsZero() || !strings.Contains(s.must("status").out, "not again (BACKSTORY_COMPARE_INTERVAL is 0)") {
		t.Errorf("status of one that is not to be: %+v", next(st))
	}
	delete(s.env, "BACKSTORY_COMPARE_INTERVAL")

	s.sql("SELECT pg_drop_replication_slot('%s')", s.slot())
	if r := s.run("init"); r.code != exitFailed || strings.Contains(r.out, "takes them over") {
		t.Errorf("init at a gap: exit code %d\n%s%s", r.code, r.out, r.err)
	}
	s.must("init", "--accept-gap")
	s.env["BACKSTORY_BASELINE_RATE"] = "200000"
	p := s.sidecar()
	st = s.until(time.Minute, "rows are compared", p, func(st *backstory.Status) bool {
		c := st.Baseline.Comparison
		return c != nil && c.Rows > 0 && c.RowsPerSecond > 0 && c.SecondsLeft > 0
	})
	if st.Baseline.Share != 1 || !st.Baseline.Tables[0].Compared || st.Baseline.Comparison.Share >= 1 {
		t.Errorf("while rows are compared: %+v", st.Baseline)
	}
	if out := s.must("status").out; !regexp.MustCompile(`baseline comparing rows with the log: [0-9]+ %, [0-9,]+ rows read, [0-9,]+/s, about [0-9ms]+ left\n(.*\n)? +public\.orders +comparing +[0-9,]+ of about 60,000 rows`).MatchString(out) || strings.Contains(out, "existing rows") {
		t.Errorf("status:\n%s", out)
	}
	p.stop()
	if out := s.must("status").out; !regexp.MustCompile(`baseline [0-9]+ % of the rows are compared with the log; backstory run goes on with them\n`).MatchString(out) || strings.Contains(out, "existing rows") {
		t.Errorf("status without a sidecar:\n%s", out)
	}
	if out := s.run("doctor").out; !regexp.MustCompile(`the rows of .*public\.orders are not all compared with the log's yet \([0-9]+ % read\)`).MatchString(out) || strings.Contains(out, "does not have all rows") {
		t.Errorf("doctor:\n%s", out)
	}
}

// A table of which only inserts are in the log is not called one that is not captured.
func TestStatusOfTablesThatInitHasNotTakenIn(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	s := &screen{Writer: bufio.NewWriter(&b)}
	printStatus(s, &backstory.Status{Source: backstory.SourceStatus{State: "streaming", NotCaptured: []string{"public.a", "public.b"}, InsertsOnly: []string{"public.b"}}})
	_ = s.Flush()
	for _, want := range []string{" not captured: public.a\n", " only inserts are captured, through the schema: public.b\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("status lacks %q:\n%s", want, b.String())
		}
	}
}
