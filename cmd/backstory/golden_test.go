package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

var update = flag.Bool("update", false, "write testdata/*.golden as the program prints now; review the difference")

// history is what the application of the golden tests does, one transaction a line.
var history = []string{
	`SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "ann@shop.example", "reason": "checkout", "request_id": "4f1c"}');
	 INSERT INTO orders VALUES (17, 1, 'pending', 40.00, NULL, '2024-03-01 12:00:00+00', '2024-03-01 12:00:00+00');
	 INSERT INTO order_items VALUES (17, 1, 'TEA-100', 2), (17, 2, 'CUP', 1)`,
	`SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "payments", "reason": "card accepted"}');
	 UPDATE orders SET status = 'paid', updated_at = '2024-03-01 12:01:30+00' WHERE id = 17`,
	`SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "nightly", "job": "touch"}');
	 UPDATE orders SET updated_at = '2024-03-02 00:00:00+00' WHERE id = 17`, // quiet
	`UPDATE orders SET note = 'gift wrap, "Happy Birthday"' || chr(10) || 'no invoice' WHERE id = 17`, // by nobody knows whom
	`UPDATE order_items SET line = 3 WHERE line = 2`,                                                  // another key
	`SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "bob@shop.example", "reason": "GDPR request"}');
	 UPDATE customers SET email = NULL WHERE id = 1`, // a row from before the history
	`INSERT INTO orders VALUES (18, 1, 'pending', 9.50, 'test', '2024-03-03 08:00:00+00', '2024-03-03 08:00:00+00')`,
	`SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "bob@shop.example", "reason": "a test order"}');
	 DELETE FROM orders WHERE id = 18`,
	`INSERT INTO settings VALUES ('currency', '{"code": "EUR", "digits": 2}'), ('theme', '"dark"')`,
	`TRUNCATE settings`,
	`INSERT INTO imports VALUES ('2024-03-01;TEA-100;2')`, // no key
}

// TestGolden compares what a person sees of a small history with testdata.
func TestGolden(t *testing.T) {
	t.Parallel()
	g := newGolden(t)
	s := g.site
	reply := g.run

	// The source as it is before anything.
	reply("doctor", "doctor")
	reply("doctor", "doctor", "--json")
	reply("status", "status")
	reply("log", "log")
	reply("init", "init", "--print-sql")
	reply("init", "init", "--yes", "--no-baseline") // two rows whose history begins with their next change
	reply("init", "init", "--no-baseline")
	reply("init", "init", "--print-sql")
	if err := s.server.SetConfig(map[string]string{"max_slot_wal_keep_size": "2GB"}); err != nil {
		t.Fatal(err)
	}
	if err := s.server.Reload(context.Background()); err != nil {
		t.Fatal(err)
	}
	reply("doctor", "doctor")
	reply("doctor", "doctor", "--json")
	s.env["BACKSTORY_EXCLUDE"] = "public.imports"
	reply("doctor", "doctor")
	reply("doctor", "doctor", "--json")
	s.env["BACKSTORY_EXCLUDE"] = "public.Imports"
	s.env["BACKSTORY_TABLES"] = "public.ordres,public.order*,public.customers,public.settings,public.imports,billing.*"
	reply("doctor", "doctor")
	reply("init", "init", "--no-baseline")
	delete(s.env, "BACKSTORY_EXCLUDE")
	delete(s.env, "BACKSTORY_TABLES")
	reply("log", "log")
	reply("log", "log", "orders/17")
	reply("verify", "verify")
	reply("sink", "sink", "status")
	reply("sink", "sink", "pause")

	for i, tx := range history {
		if i > 0 {
			s.must("run", "--once") // so that each transaction is an append of its own
		}
		s.sql("BEGIN; %s; COMMIT", tx)
	}
	reply("status", "status")
	s.env["BACKSTORY_JSONL"] = filepath.Join(g.dir, "events.jsonl")
	reply("run", "run", "--once")
	g.readHistory()
	g.file("run", "events.jsonl")

	reply("status", "status")
	reply("status", "status", "--json")
	p := s.sidecar()
	s.until(30*time.Second, "the sidecar has nothing to do", p, func(st *backstory.Status) bool {
		return st.CaughtUp && len(st.Reactors) == 1 && st.Reactors[0].State == "running"
	})
	reply("status", "status")
	reply("status", "status", "--json")
	reply("sink", "sink", "status")
	reply("doctor", "doctor")
	if r := p.stop(); r.code != 0 {
		t.Errorf("the sidecar ended with exit code %d:\n%s", r.code, r.err)
	}
	s.env["BACKSTORY_HTTP_ADDR"] = "off"

	for _, args := range [][]string{
		{}, {"--quiet"}, {"--reverse", "--limit", "3"}, {"orders/17"}, {"orders/17", "--date", "iso"}, {"Order/17", "--reverse"}, {"order_items/17,3"}, {"orders"}, {"settings"}, {"settings/theme"}, {"settings/theme", "--reverse", "--limit", "2"}, {"settings/theme", "--since", "HEAD~2"}, {"orders/99"}, {"ordres/17"}, {"nothing_like_it"},
		{"--author", "ann"}, {"--author", "BOB@", "--limit", "1"}, {"--author", "nobody"}, {"--type", "OrderUpdated"}, {"--type", "OrderCreated,OrderDeleted"}, {"--type", "OrderPaid"}, {"--type", "OrderTouched"},
		{"--since", "HEAD~3"}, {"--until", "2"}, {"--since", g.when(2), "--until", g.when(4)}, {"--since", "1 hour ago", "--limit", "1"}, {"--until", "1 hour ago"}, {"--since", "1 hour ago", "--type", "CustomerUpdated", "--json"},
		{"--since", "tomorrow"},
		{"--json"}, {"--json", "--quiet", "--type", "OrderUpdated"}, {"orders/18", "--json", "--reverse"}, {"orders/99", "--json"}, {"--limit", "-1"},
	} {
		reply("log", append([]string{"log"}, args...)...)
	}
	for _, args := range [][]string{
		{"1"}, {"4"}, {"7"}, {"8"}, {"10"}, {"13"}, {g.id(4)}, {"99"}, {"orders"}, {"orders/17"}, {"orders/17", "--at", "3"}, {"orders/17", "--at", g.when(2)}, {"orders/17", "--at", "2001-01-01"},
		{"order_items/17,3"}, {"order_items/17,2"}, {"order_items/17,2", "--at", "6"}, {"customers/1"}, {"orders/18"}, {"orders/18", "--at", "9"}, {"orders/99"}, {"customers/99"}, {"imports/99"}, {"settings/theme"}, {"3", "--at", "HEAD"},
		{"4", "--json"}, {g.id(4), "--json"}, {"orders/17", "--json"}, {"orders/17", "--at", "3", "--json"}, {"99", "--json"},
	} {
		reply("show", append([]string{"show"}, args...)...)
	}
	reply("verify", "verify")
	reply("verify", "verify", "--json")
	s.sql(`SET backstory.maintenance = 'on'; UPDATE backstory.event SET occurred_at = occurred_at - interval '1 second' WHERE position = 4`)
	reply("verify", "verify")
	reply("verify", "verify", "--json")
	s.sql(`UPDATE backstory.event SET occurred_at = occurred_at + interval '1 second' WHERE position = 4; RESET backstory.maintenance`)

	csv, jsonl := filepath.Join(g.dir, "csv"), filepath.Join(g.dir, "jsonl")
	reply("checkout", "checkout", "--at", "HEAD", "--csv", csv)
	reply("checkout", "checkout", "--at", "HEAD", "--csv", csv, "orders", "order_items")
	g.file("checkout", "csv/orders.csv")
	g.file("checkout", "csv/order_items.csv")
	reply("checkout", "checkout", "--at", "3", "--jsonl", jsonl, "orders", "order_items")
	g.file("checkout", "jsonl/orders.jsonl")
	reply("checkout", "checkout", "--at", "3", "--jsonl", jsonl, "orders")
	reply("checkout", "checkout", "--at", "3", "--jsonl", jsonl, "--replace", "--json", "orders")
	reply("checkout", "checkout", "--at", g.when(2), "--schema", "past", "orders", "settings")
	g.query("checkout", "SELECT * FROM past.orders")
	reply("checkout", "checkout", "--at", "HEAD", "--schema", "past", "--partial", "--replace")
	reply("checkout", "checkout", "--at", "HEAD", "--schema", "past")
	reply("checkout", "checkout", "--schema", "past")
	reply("checkout", "checkout", "--at", "HEAD")

	reply("sink", "sink", "status")
	reply("sink", "sink", "status", "--json")
	reply("sink", "sink", "pause", "jsonl")
	reply("sink", "sink", "pause", "jsonl")
	reply("sink", "sink", "status")
	reply("sink", "sink", "resume")
	reply("sink", "sink", "pause", "--json")
	reply("sink", "sink", "resume", "jsonl", "--json")
	reply("sink", "sink", "status", "jsonl", "--json")
	for _, c := range []string{"status", "pause", "resume"} {
		reply("sink", "sink", c, "kafka")
	}
	reply("sink", "sink")

	// A source that has everything of which init should tell.
	g.site = g.busySource()
	reply("init", "init")
	reply("status", "status")
	reply("init", "init", "--yes")
	reply("doctor", "doctor")
	reply("status", "status")
	g.site.must("run", "--once")
	reply("status", "status")
	reply("log", "log", "--limit", "3")
	g.compare()
}

// busySource makes another database of the server, with 100 changes a minute.
func (g *golden) busySource() *site {
	g.t.Helper()
	s := *g.site
	s.db = "busy"
	url := s.server.URL(s.db)
	s.env = map[string]string{"BACKSTORY_SOURCE_URL": url, "BACKSTORY_HTTP_ADDR": "off", "BACKSTORY_SLOT": "busy", "BACKSTORY_TABLES": "public.*,crm.*", "BACKSTORY_BASELINE_TABLES": "1"}
	s.at(s.server.URL("postgres"), "CREATE DATABASE busy")
	s.at(url, `CREATE TABLE versions (id bigint PRIMARY KEY, item_type text, item_id bigint, event text, whodunnit text);
		CREATE SCHEMA crm; CREATE TABLE crm.notes (id bigint PRIMARY KEY DEFERRABLE, text text); ALTER TABLE crm.notes ENABLE ROW LEVEL SECURITY;
		CREATE TABLE crm.contacts (id bigint PRIMARY KEY); INSERT INTO crm.contacts VALUES (1);
		CREATE PUBLICATION warehouse FOR ALL TABLES;
		DO $$ BEGIN FOR i IN 1..21 LOOP EXECUTE format('CREATE TABLE t%%s (id bigint PRIMARY KEY)', to_char(i, 'FM00')); END LOOP; END $$`)
	s.at(url, `INSERT INTO versions SELECT i FROM generate_series(1, 6000) i; ANALYZE`)
	eventually(g.t, 20*time.Second, "the server has counted the changes", func() bool {
		return s.ask(url, "SELECT sum(n_tup_ins)::text FROM pg_stat_user_tables") == "6001"
	})
	return &s
}

// What the commands say of themselves.
func TestGoldenHelp(t *testing.T) {
	t.Parallel()
	g := &golden{t: t, site: &site{t: t}, replies: map[string]*strings.Builder{}, names: map[string]string{}}
	g.run("help", "--help")
	for _, c := range newRoot().Commands() {
		if name := c.Name(); name != "help" && name != "completion" {
			g.run("help", name, "--help")
		}
	}
	g.compare()
}

// golden records what the program replies.
type golden struct {
	t       *testing.T
	site    *site
	dir     string // for files
	began   time.Time
	replies map[string]*strings.Builder // by file
	names   map[string]string           // placeholders for what is different each time, by what it is
	events  []event
}

// event is what a golden test has to know of one.
type event struct {
	ID         string `json:"id"`
	OccurredAt string `json:"occurred_at"`
	XID        int64  `json:"xid"`
	CommitLSN  string `json:"commit_lsn"`
}

// newGolden makes a source on a server of its own, where nobody else writes WAL.
func newGolden(t *testing.T) *golden {
	t.Helper()
	server := pgservertest.Start(t, quick(map[string]string{"max_slot_wal_keep_size": "-1", "autovacuum": "off", "fsync": "on"}))
	s := &site{t: t, server: server, db: "shop", words: map[string]string{}}
	s.env = map[string]string{"BACKSTORY_SOURCE_URL": server.URL("shop"), "BACKSTORY_HTTP_ADDR": "off", "NO_COLOR": "1"}
	s.at(server.URL("postgres"), "CREATE DATABASE shop")
	s.app = s.open(server.URL("shop"))
	s.sql(`CREATE TABLE customers (id bigint PRIMARY KEY, name text NOT NULL, email text);
		CREATE TABLE orders (id bigint PRIMARY KEY, customer_id bigint NOT NULL, status text NOT NULL, total numeric(10,2), note text, created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL);
		CREATE TABLE order_items (order_id bigint, line int, sku text NOT NULL, quantity int NOT NULL, PRIMARY KEY (order_id, line));
		CREATE TABLE settings (name text PRIMARY KEY, value jsonb); ALTER TABLE settings REPLICA IDENTITY FULL;
		CREATE TABLE imports (line text);
		INSERT INTO customers VALUES (1, 'Ann', 'ann@shop.example'), (2, 'Zoë', NULL);
		ANALYZE`)
	return &golden{t: t, site: s, dir: t.TempDir(), began: time.Now(), replies: map[string]*strings.Builder{}, names: map[string]string{}}
}

// run runs the program and records all that it says.
func (g *golden) run(file string, args ...string) {
	g.t.Helper()
	r := g.site.run(args...)
	w := g.reply(file, "backstory "+quoted(args))
	if migration, err := eventlog.Migration(1); err == nil { // its text has tests of its own
		r.out = strings.Replace(r.out, strings.TrimSpace(migration), "<the first migration>", 1)
	}
	w.WriteString(r.out)
	said := slices.Collect(strings.Lines(r.err))
	if args[0] == "run" { // its parts begin at the same time
		slices.SortStableFunc(said, func(a, b string) int {
			_, a, _ = strings.Cut(a, " ")
			_, b, _ = strings.Cut(b, " ")
			return cmp.Compare(a, b)
		})
	}
	for _, line := range said {
		w.WriteString("2> " + line)
	}
	if r.code != 0 {
		fmt.Fprintf(w, "exit code %d\n", r.code)
	}
	if slices.Contains(args, "--json") {
		g.checkJSON(args, r.out)
	}
}

// reply begins a reply.
func (g *golden) reply(file, command string) *strings.Builder {
	w := g.replies[file]
	if w == nil {
		w = &strings.Builder{}
		g.replies[file] = w
	} else {
		w.WriteByte('\n')
	}
	w.WriteString("$ " + command + "\n")
	return w
}

// file records a file that the program has written.
func (g *golden) file(file, name string) {
	g.t.Helper()
	b, err := os.ReadFile(filepath.Join(g.dir, name))
	if err != nil {
		g.t.Error(err)
	}
	g.reply(file, "cat "+filepath.Join(g.dir, name)).Write(b)
}

// query records what the database holds.
func (g *golden) query(file, q string) {
	g.t.Helper()
	g.reply(file, "psql -c '"+q+"'").WriteString(g.site.ask(g.site.server.URL("shop"), "SELECT string_agg(x::text, E'\n') FROM (%s) x", q) + "\n")
}

func quoted(args []string) string {
	out := slices.Clone(args)
	for i, a := range out {
		if strings.ContainsAny(a, " ~{") {
			out[i] = "'" + a + "'"
		}
	}
	return strings.Join(out, " ")
}

// readHistory learns what is different in this run: the events' ids, times, transactions and LSNs. Events and transactions are
// numbered, so that a wrong one in its place would be seen.
func (g *golden) readHistory() {
	g.t.Helper()
	for line := range strings.Lines(g.site.must("log", "--json", "--quiet", "--reverse").out) {
		var e event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			g.t.Fatalf("%v: %s", err, line)
		}
		g.events = append(g.events, e)
		g.names[e.ID] = fmt.Sprintf("<id %d>", len(g.events))
		if n := len(g.events); n == 1 || g.events[n-2].CommitLSN != e.CommitLSN {
			tx := len(slices.CompactFunc(slices.Clone(g.events), func(a, b event) bool { return a.CommitLSN == b.CommitLSN }))
			g.names[e.OccurredAt] = fmt.Sprintf("<time %d>", tx)
			g.names[e.CommitLSN] = fmt.Sprintf("<lsn %d>", tx)
			g.names[fmt.Sprint(e.XID)] = fmt.Sprintf("<xid %d>", tx)
		}
	}
	if want := 14; len(g.events) != want {
		g.t.Fatalf("the log has %d events, want %d", len(g.events), want)
	}
}

// when is the moment of a transaction, by number, and id that of an event by position.
func (g *golden) when(tx int) string {
	for at, name := range g.names {
		if name == fmt.Sprintf("<time %d>", tx) {
			return at
		}
	}
	g.t.Fatalf("there is no transaction %d", tx)
	return ""
}

func (g *golden) id(position int) string { return g.events[position-1].ID }

// What is different each time.
var (
	volatileLSN   = regexp.MustCompile(`\b[0-9A-F]{1,8}/[0-9A-F]{5,8}\b`)
	volatileID    = regexp.MustCompile(`\b[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}\b`)
	volatileSeal  = regexp.MustCompile(`\b[0-9a-f]{64}\b`)
	volatileXID   = regexp.MustCompile(`("xid":|transaction +)(\d+)`)
	volatileTime  = regexp.MustCompile(`\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d|\+\d\d)?`)
	volatileAge   = regexp.MustCompile(`(just now|\d+ (second|minute)s? ago)(  +)?`)
	volatileOther = []struct {
		re *regexp.Regexp
		as string
	}{
		{regexp.MustCompile(`127\.0\.0\.1:\d+`), "127.0.0.1:<port>"},
		{regexp.MustCompile(`PostgreSQL \d+\.\d+`), "PostgreSQL <version>"},
		{regexp.MustCompile(`("system_id":")\d+`), "${1}<system>"},
		{regexp.MustCompile(`("(?:retained|safe|size)_bytes":)\d+`), "${1}<bytes>"},
		{regexp.MustCompile(`("seconds":)[0-9.e-]+`), "${1}<seconds>"},
		{regexp.MustCompile(`(keeps?) \d+(\.\d)? ([kMG]?B)`), "${1} <size>"},
		{regexp.MustCompile(`\d+(\.\d)? ([kMG]?B) on disk`), "<size> on disk"},
		{regexp.MustCompile(`\d+(\.\d)? ([kMG]?B) behind( \(\d+ s\))?`), "<size> behind"},
		{regexp.MustCompile(`(events? in) \d+\.\d s`), "${1} <seconds> s"},
		{regexp.MustCompile(`It grows by about (\d+ B) for each row change; the server has counted (none so far|them for less than a day, .*)\.`), "It grows by about $1 for each row change; <what the server has counted>."},
		{regexp.MustCompile(`again in [0-9hms]+`), "again in <time>"},
		{regexp.MustCompile(`streaming for \d+ (second|minute)s?`), "streaming for <time>"},
	}
)

// steady puts placeholders in the place of what is different each time, and leaves everything else as it is: times and numbers
// that the application has written are among it.
func (g *golden) steady(text string) string {
	seals := map[string]string{}
	named := func(s, otherwise string) string {
		if n, ok := g.names[s]; ok {
			return n
		}
		return otherwise
	}
	if g.dir != "" {
		text = strings.ReplaceAll(text, g.dir, "/tmp")
	}
	text = volatileLSN.ReplaceAllStringFunc(text, func(s string) string { return named(s, "<lsn>") })
	text = volatileID.ReplaceAllStringFunc(text, func(s string) string { return named(s, "<another id>") })
	text = volatileSeal.ReplaceAllStringFunc(text, func(s string) string {
		if seals[s] == "" {
			seals[s] = fmt.Sprintf("<seal %d>", len(seals)+1)
		}
		return seals[s]
	})
	text = volatileXID.ReplaceAllStringFunc(text, func(s string) string {
		m := volatileXID.FindStringSubmatch(s)
		return m[1] + named(m[2], "<another xid>")
	})
	text = volatileTime.ReplaceAllStringFunc(text, func(s string) string {
		norm := strings.Replace(s, " ", "T", 1)
		if !strings.HasSuffix(norm, "Z") && volatileTime.FindStringSubmatch(s)[2] == "" {
			norm += "Z"
		}
		at, err := time.Parse(time.RFC3339Nano, norm)
		if err != nil || at.Before(g.began.Add(-2*time.Second)) || at.After(time.Now()) {
			return s
		}
		return named(norm, "<time>")
	})
	text = volatileAge.ReplaceAllStringFunc(text, func(s string) string {
		if !strings.HasSuffix(s, " ") {
			return "<age>"
		}
		return fmt.Sprintf("%-*s", len(s), "<age>") // a column, whose width stays
	})
	for _, v := range volatileOther {
		text = v.re.ReplaceAllString(text, v.as)
	}
	return text
}

// compare compares the replies with testdata.
func (g *golden) compare() {
	g.t.Helper()
	for _, file := range slices.Sorted(maps.Keys(g.replies)) {
		got := []byte(g.steady(g.replies[file].String()))
		name := filepath.Join("testdata", file+".golden")
		if *update {
			if err := os.MkdirAll("testdata", 0o755); err != nil {
				g.t.Fatal(err)
			}
			if err := os.WriteFile(name, got, 0o644); err != nil {
				g.t.Fatal(err)
			}
		}
		want, err := os.ReadFile(name)
		if err != nil {
			g.t.Fatal(err)
		}
		if bytes.Equal(got, want) {
			continue
		}
		g.t.Errorf("%s: the program prints something else (go test ./cmd/backstory -run Golden -update writes it anew):\n%s", name, difference(string(want), string(got)))
	}
}

// difference shows the lines from where two texts differ.
func difference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	first := 0
	for first < len(w) && first < len(g) && w[first] == g[first] {
		first++
	}
	for len(w) > first && len(g) > first && w[len(w)-1] == g[len(g)-1] {
		w, g = w[:len(w)-1], g[:len(g)-1]
	}
	return fmt.Sprintf("line %d:\n- %s\n+ %s", first+1, strings.Join(w[first:], "\n- "), strings.Join(g[first:], "\n+ "))
}

// fields are the names that a command's JSON has to have; scripts depend on them.
var jsonFields = map[string][]string{
	"log": {"position", "id", "aggregate", "aggregate_id", "type", "op", "data", "before", "metadata", "occurred_at", "relation", "key",
		"source", "xid", "commit_lsn", "change", "part", "schema_version", "rules_version"},
	"status":      {"log.position", "source.received_lsn", "source.confirmed_lsn", "source.lag_bytes", "source.lag_seconds", "baseline.done", "caught_up", "reactors"},
	"doctor":      {"check", "severity", "what", "risk"},
	"verify":      {"events", "appends", "position", "seal"},
	"sink status": {"name", "state", "position", "lag_events", "lag_seconds"},
	"sink pause":  {"name", "paused"},
	"sink resume": {"name", "paused"},
	"checkout":    {"revision", "tables", "events", "seconds"},
}

// checkJSON wants one object per line, with the names that it has to have.
func (g *golden) checkJSON(args []string, out string) {
	g.t.Helper()
	command := args[0]
	if command == "sink" {
		command += " " + args[1]
	}
	for line := range strings.Lines(out) {
		var obj map[string]any
		if err := json.Unmarshal([]byte(line), &obj); err != nil {
			g.t.Errorf("backstory %s: a line is no JSON object: %v\n%s", quoted(args), err, line)
			continue
		}
		fields := jsonFields[command]
		if command == "show" {
			if fields = jsonFields["log"]; strings.Contains(args[1], "/") {
				fields = []string{"aggregate", "aggregate_id", "position", "row"}
			}
		}
		for _, f := range fields {
			var v any = obj
			for name := range strings.SplitSeq(f, ".") {
				m, _ := v.(map[string]any)
				v = m[name]
				if _, ok := m[name]; !ok {
					g.t.Errorf("backstory %s: no field %s in %s", quoted(args), f, line)
				}
			}
		}
	}
}
