package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// captured selects the tables of the oracle test.
var captured = []string{"public.*", "Größe 1.*"}

const capturedSQL = `n.nspname IN ('public', 'Größe 1')`

// TestLogEqualsSource runs random concurrent workloads over every type and every kind of table, and compares the log with
// three witnesses that know nothing of it: triggers that wrote down every row change, a slot of its own with another output
// plugin, and a session that read all tables at moments of which it left a mark in the WAL. Then other writers, with hardly
// any memory, make logs of the same WAL: they must be the same.
func TestLogEqualsSource(t *testing.T) {
	t.Parallel()
	seed := seedOf(t)
	r := rand.New(rand.NewPCG(seed, 1))
	lasts := time.Duration(setting(t, "BACKSTORY_ORACLE_SECONDS", 6)) * time.Second
	s := newSystem(t, where{tables: captured, apart: r.IntN(2) == 0})
	s.cfg.Log.PartitionEvents = int64(500 + r.IntN(1000))
	db := s.sql()
	list := subjects()
	create(db, list)
	s.init()
	db.do(`INSERT INTO public.noops SELECT i, 'v', repeat(md5(i::text), 200) FROM generate_series(1, 9) i`)
	// Other slots, from the same point on.
	db.do(`SELECT pg_copy_logical_replication_slot('%[1]s', '%[1]s_a'), pg_copy_logical_replication_slot('%[1]s', '%[1]s_b'),
		pg_copy_logical_replication_slot('%[1]s', '%[1]s_c', false, 'test_decoding')`, s.cfg.Capture.Slot)
	head, tables := s.beginning()

	sidecar := s.start()
	ctx, stop := context.WithTimeout(context.Background(), lasts)
	defer stop()
	columns := columnsOf(db, capturedSQL)
	delete(columns, "public.marker") // whose row is inserted after the look
	var moments map[int]moment
	recorded := make(chan struct{})
	go func() {
		defer close(recorded)
		moments = record(ctx, t, s.cfg.Capture.URL, seed, columns)
	}()
	workers := work(ctx, t, s.cfg.Capture.URL, seed, 4, list)
	<-recorded
	if t.Failed() {
		return
	}
	committed, refused := 0, 0
	for _, w := range workers {
		committed, refused = committed+w.committed, refused+w.refused
	}
	if err := sidecar.end(); err != nil {
		t.Fatalf("the sidecar: %v", err)
	}
	s.once()

	l := s.openLog()
	w := newWorld()
	compared := 0
	again := map[eventlog.Position]contents{} // moments that are checked out
	var all []*eventlog.Event
	w.replay(t, l, func(e *eventlog.Event) error {
		all = append(all, e.Clone())
		if e.Relation.String() != "public.marker" || e.Op != eventlog.OpInsert {
			return nil
		}
		var id int
		if _, err := fmt.Sscan(e.AggregateID, &id); err != nil {
			return err
		}
		m, ok := moments[id]
		if !ok {
			return fmt.Errorf("moment %d was not recorded", id)
		}
		compared++
		if len(again) < 3 && (compared == 1 || r.IntN(4) == 0) {
			again[e.Position] = m.contents
		}
		if err := w.differs(m.contents, map[string][]string(columns)); err != nil {
			return fmt.Errorf("at moment %d: %w", id, err)
		}
		return nil
	})
	w.sameTables(t, db, capturedSQL)
	verify(t, l)
	if compared != len(moments) || compared == 0 {
		t.Errorf("%d moments were recorded, %d are in the log", len(moments), compared)
	}
	if len(again) == 0 {
		t.Error("no moment was checked out")
	}
	rows := witnessed(t, db, all)
	decoded(t, db, s.cfg.Capture.Slot+"_c", w)
	s.checkouts(db, w.position, columns, again)
	counts := map[eventlog.Op]int{}
	for _, e := range all {
		counts[e.Op]++
	}
	t.Logf("%d transactions, %d refused, %d row changes by the triggers, %d events %v, %d moments, log apart: %v", committed, refused, rows, len(all), counts, compared, s.log != s.src)
	for _, e := range all {
		if e.Relation.String() == "public.noops" && e.Op == eventlog.OpUpdate {
			t.Errorf("event %d: an update that changed nothing", e.Position)
		}
	}

	for i, c := range []struct{ batch, cache int }{{1 << 10, 1}, {1 + r.IntN(100<<10), 1 + r.IntN(300<<10)}} {
		t.Run(fmt.Sprintf("again with batches of %d and a cache of %d bytes", c.batch, c.cache), func(t *testing.T) {
			again := s.another(t, "_"+string(rune('a'+i)), head, tables)
			again.cfg.Capture.MaxBatchBytes, again.cfg.Log.MaxCacheBytes = c.batch, c.cache
			again.cfg.Log.PartitionEvents = int64(500 + r.IntN(5000))
			same(t, again, all)
		})
	}
}

// same fills another log of the same WAL and compares its events.
func same(t *testing.T, s *system, want []*eventlog.Event) {
	s.once()
	made := s.openLog()
	w := newWorld()
	n := 0
	w.replay(t, made, func(e *eventlog.Event) error {
		if n >= len(want) {
			return fmt.Errorf("event %d: there are only %d", e.Position, len(want))
		}
		o := want[n]
		n++
		switch {
		case e.ID != o.ID:
			return fmt.Errorf("event %d: id %s, was %s", e.Position, e.ID, o.ID)
		case e.Type != o.Type || e.Op != o.Op || e.Aggregate != o.Aggregate || e.AggregateID != o.AggregateID || e.PreviousID != o.PreviousID || e.Quiet != o.Quiet:
			return fmt.Errorf("event %d: %s %s %s/%s %q, was %s %s %s/%s %q", e.Position, e.Type, e.Op, e.Aggregate, e.AggregateID, e.PreviousID, o.Type, o.Op, o.Aggregate, o.AggregateID, o.PreviousID)
		case !bytes.Equal(e.Data, o.Data):
			return fmt.Errorf("event %d: data %s, was %s", e.Position, short(string(e.Data)), short(string(o.Data)))
		case !bytes.Equal(e.Before, o.Before):
			return fmt.Errorf("event %d: before %s, was %s", e.Position, short(string(e.Before)), short(string(o.Before)))
		case !bytes.Equal(e.Metadata, o.Metadata):
			return fmt.Errorf("event %d: metadata %s, was %s", e.Position, e.Metadata, o.Metadata)
		case !e.OccurredAt.Equal(o.OccurredAt) || e.XID != o.XID || e.CommitLSN != o.CommitLSN || e.Change != o.Change || e.Part != o.Part:
			return fmt.Errorf("event %d comes from elsewhere: %+v, was %+v", e.Position, e, o)
		}
		return nil
	})
	if n != len(want) {
		t.Fatalf("%d events, want %d", n, len(want))
	}
	verify(t, made)
}

// witnessed compares the events with what triggers wrote down: the same changes of the same tables in the same order in
// each transaction, but for updates that changed nothing, with the context that applied.
func witnessed(t *testing.T, db *session, all []*eventlog.Event) int {
	t.Helper()
	type change struct{ what, context string }
	seen := map[string][]change{}
	n := 0
	for _, r := range db.ask(`SELECT xid, relation, CASE WHEN same THEN 'nothing' ELSE op END, context FROM audit.change ORDER BY n`) {
		seen[r[0]] = append(seen[r[0]], change{r[2] + " " + r[1], r[3]})
	}
	logged := map[string][]change{}
	for _, e := range all {
		x := fmt.Sprint(e.XID)
		var meta map[string]json.RawMessage
		context := ""
		if e.Metadata != nil {
			if err := json.Unmarshal(e.Metadata, &meta); err != nil {
				t.Errorf("event %d: metadata %s: %v", e.Position, e.Metadata, err)
			}
			context = string(e.Metadata)
			if raw, ok := meta["malformed"]; ok {
				context = "malformed"
				if string(raw) == `"not JSON"` {
					context = "not JSON"
				}
			}
		}
		logged[x] = append(logged[x], change{e.Op.String() + " " + e.Relation.Own(), context})
	}
	for x, list := range seen {
		// The latest message before a row applies to it; rows before any message take the transaction's first.
		now := ""
		for _, c := range list {
			if c.what == "message " {
				now = c.context
				break
			}
		}
		var want, have []string
		for _, c := range list {
			switch {
			case c.what == "message ":
				now = c.context
			case strings.HasPrefix(c.what, "nothing "): // an update that changed nothing
			default:
				n++
				want = append(want, c.what+" "+now)
			}
		}
		for _, c := range logged[x] {
			have = append(have, c.what+" "+c.context)
		}
		truncatesInOrder(want)
		truncatesInOrder(have)
		if !slices.Equal(want, have) {
			i := 0
			for i < len(want) && i < len(have) && want[i] == have[i] {
				i++
			}
			t.Errorf("transaction %s: triggers saw %d changes, the log has %d; they differ from number %d on:\n%q\n%q", x, len(want), len(have), i,
				want[i:min(len(want), i+3)], have[i:min(len(have), i+3)])
		}
		delete(logged, x)
	}
	for x, list := range logged {
		t.Errorf("transaction %s has %d events, but triggers saw none", x, len(list))
	}
	return n
}

// truncatesInOrder sorts each run of truncates: one TRUNCATE names several tables in an order of its own.
func truncatesInOrder(list []string) {
	for i := 0; i < len(list); {
		j := i
		for j < len(list) && strings.HasPrefix(list[j], "truncate ") {
			j++
		}
		slices.Sort(list[i:j])
		i = j + 1
	}
}

var decodedLine = regexp.MustCompile(`^table (.*?): (INSERT|UPDATE|DELETE|TRUNCATE):`)

// decoded compares the number of events with the number of row changes that another output plugin tells of.
func decoded(t *testing.T, db *session, slot string, w *world) {
	t.Helper()
	want := map[countKey]int{}
	inserts := map[string]bool{"public.keyless": true, "public.nothing": true}
	for _, r := range db.ask(`SELECT xid, data FROM pg_logical_slot_get_changes('` + slot + `', NULL, NULL, 'include-timestamp', '0')`) {
		m := decodedLine.FindStringSubmatch(r[1])
		if m == nil {
			continue
		}
		xid := uint32(atoi(t, r[0]))
		for _, name := range strings.Split(m[1], ", ") {
			rel := unquoted(name)
			op := map[string]eventlog.Op{"INSERT": eventlog.OpInsert, "UPDATE": eventlog.OpUpdate, "DELETE": eventlog.OpDelete, "TRUNCATE": eventlog.OpTruncate}[m[2]]
			if strings.HasPrefix(rel, "audit.") || strings.HasPrefix(rel, "backstory.") || rel == "public.parted" || inserts[rel] && (op == eventlog.OpUpdate || op == eventlog.OpDelete) {
				continue
			}
			want[countKey{xid, rel, op}]++
		}
	}
	if len(want) == 0 {
		t.Fatal("the other slot told nothing")
	}
	for k, n := range want {
		have := w.counts[k]
		if k.op == eventlog.OpUpdate && have > n || k.op != eventlog.OpUpdate && have != n {
			t.Errorf("transaction %d: %d times %s of %s, the log has %d", k.xid, n, k.op, k.relation, have)
		}
	}
	for k, n := range w.counts {
		if want[k] < n {
			t.Errorf("transaction %d: the log has %d times %s of %s, the WAL %d", k.xid, n, k.op, k.relation, want[k])
		}
	}
}

// unquoted undoes the quotes of a qualified name.
func unquoted(name string) string {
	var b strings.Builder
	quoted := false
	for i := 0; i < len(name); i++ {
		switch {
		case name[i] == '"' && quoted && i+1 < len(name) && name[i+1] == '"':
			b.WriteByte('"')
			i++
		case name[i] == '"':
			quoted = !quoted
		default:
			b.WriteByte(name[i])
		}
	}
	return b.String()
}
