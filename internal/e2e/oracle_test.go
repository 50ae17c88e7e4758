package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
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
	logEqualsSource(t, nil)
}

// TestLogEqualsSourceWithRules does the same with rules that make several events of a row change, as they come.
func TestLogEqualsSourceWithRules(t *testing.T) {
	t.Parallel()
	logEqualsSource(t, splitting(seedOf(t)))
}

func logEqualsSource(t *testing.T, rules eventlog.Rules) {
	seed := seedOf(t)
	r := rand.New(rand.NewPCG(seed, 1))
	lasts := time.Duration(setting(t, "BACKSTORY_ORACLE_SECONDS", 6)) * time.Second
	s := newSystem(t, where{tables: captured, apart: r.IntN(2) == 0})
	s.cfg.Log.PartitionEvents = int64(500 + r.IntN(1000))
	s.cfg.Log.Rules = rules
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
	w.rules = rules != nil
	compared := 0
	again := map[eventlog.Position]contents{} // moments that are checked out
	var all []*eventlog.Event                 // one for each row change
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
	decoded(t, s, s.cfg.Capture.Slot+"_c", all)
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
			same(t, again, s.allEvents(), rules != nil)
		})
	}
}

// same fills another log of the same WAL and compares its events.
func same(t *testing.T, s *system, want []*eventlog.Event, rules bool) {
	s.once()
	made := s.openLog()
	w := newWorld()
	w.rules = rules
	w.replay(t, made, nil)
	n := 0
	err := made.Read(whole(t, made), eventlog.Selection{Quiet: true}, func(e *eventlog.Event) error {
		if n >= len(want) {
			return fmt.Errorf("event %d: there are only %d", e.Position, len(want))
		}
		o := want[n]
		n++
		switch {
		case e.ID != o.ID:
			return fmt.Errorf("event %d: id %s, was %s", e.Position, e.ID, o.ID)
		case e.Type != o.Type || e.Op != o.Op || e.Aggregate != o.Aggregate || e.AggregateID != o.AggregateID || e.PreviousID != o.PreviousID || e.Key != o.Key || e.PreviousKey != o.PreviousKey || e.Quiet != o.Quiet:
			return fmt.Errorf("event %d: %s %s %s/%s %q, was %s %s %s/%s %q", e.Position, e.Type, e.Op, e.Aggregate, e.AggregateID, e.PreviousID, o.Type, o.Op, o.Aggregate, o.AggregateID, o.PreviousID)
		case !bytes.Equal(e.Data, o.Data):
			return fmt.Errorf("event %d: data %s, was %s", e.Position, short(string(e.Data)), short(string(o.Data)))
		case !bytes.Equal(e.Before, o.Before):
			return fmt.Errorf("event %d: before %s, was %s", e.Position, short(string(e.Before)), short(string(o.Before)))
		case !bytes.Equal(e.Metadata, o.Metadata):
			return fmt.Errorf("event %d: metadata %s, was %s", e.Position, e.Metadata, o.Metadata)
		case !e.OccurredAt.Equal(o.OccurredAt) || e.XID != o.XID || e.CommitLSN != o.CommitLSN || e.Change != o.Change || e.Part != o.Part:
			return fmt.Errorf("event %d comes from elsewhere: %+v, was %+v", e.Position, e, o)
		case e.Restates != o.Restates || !bytes.Equal(e.Extra, o.Extra):
			return fmt.Errorf("event %d: %v %s, was %v %s", e.Position, e.Restates, e.Extra, o.Restates, o.Extra)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
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
	loose := false // who and why that says nothing is as none
	for _, e := range all {
		x := fmt.Sprint(e.XID)
		var meta map[string]json.RawMessage
		context := ""
		if e.Metadata != nil {
			if err := json.Unmarshal(e.Metadata, &meta); err != nil {
				t.Errorf("event %d: metadata %s: %v", e.Position, e.Metadata, err)
			}
			context = string(e.Metadata)
			if who, _, moved := strings.Cut(context, `"moved_from":`); moved { // that is of the event alone
				context = strings.TrimRight(who, ",") + "}"
				loose = true
			}
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
		for _, list := range [][]string{want, have} {
			for i := range list {
				if loose {
					list[i] = strings.TrimSuffix(list[i], "{}")
				}
			}
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

// decodedChange is a row change as test_decoding prints it (PostgreSQL manual, test_decoding): columns that it does not tell are not there.
type decodedChange struct {
	op       eventlog.Op
	relation string
	old, new map[string]*string // nil: NULL
}

func (c decodedChange) String() string { return c.op.String() + " of " + c.relation }

// decodedLine takes a line of test_decoding apart, which may be of several tables that were truncated; nil: it is not about rows.
func decodedLine(line string) ([]decodedChange, error) {
	rest, ok := strings.CutPrefix(line, "table ")
	if !ok {
		return nil, nil
	}
	name, rest, ok := cutName(rest, ": ")
	if !ok {
		return nil, fmt.Errorf("no table in %.100s", line)
	}
	op, rest, _ := strings.Cut(rest, ":")
	c := decodedChange{relation: unquoted(name)}
	switch op {
	case "INSERT":
		c.op = eventlog.OpInsert
	case "UPDATE":
		c.op = eventlog.OpUpdate
	case "DELETE":
		c.op = eventlog.OpDelete
	case "TRUNCATE":
		var out []decodedChange
		for more := true; more; {
			var one string
			one, name, more = cutName(name, ", ")
			out = append(out, decodedChange{op: eventlog.OpTruncate, relation: unquoted(one)})
		}
		return out, nil
	default:
		return nil, fmt.Errorf("an operation in %.100s", line)
	}
	var err error
	if after, ok := strings.CutPrefix(rest, " old-key:"); ok {
		if c.old, rest, err = decodedTuple(after); err != nil {
			return nil, err
		}
		rest = strings.TrimPrefix(rest, " new-tuple:")
	}
	tuple, rest, err := decodedTuple(rest)
	if err != nil || rest != "" {
		return nil, fmt.Errorf("%v; %.50q is left of %.100s", err, rest, line)
	}
	if c.new = tuple; c.op == eventlog.OpDelete {
		c.old, c.new = tuple, nil
	}
	return []decodedChange{c}, nil
}

// cutName cuts a line at the first separator outside of double quotes.
func cutName(s, separator string) (name, rest string, found bool) {
	quoted := false
	for i := range len(s) {
		if s[i] == '"' {
			quoted = !quoted
		}
		if !quoted && strings.HasPrefix(s[i:], separator) {
			return s[:i], s[i+len(separator):], true
		}
	}
	return s, "", false
}

// decodedTuple reads columns: name[type]:value, each behind a space.
func decodedTuple(s string) (tuple map[string]*string, rest string, err error) {
	tuple = map[string]*string{}
	if s == " (no-tuple-data)" {
		return tuple, "", nil
	}
	for s != "" && !strings.HasPrefix(s, " new-tuple:") {
		name, typed, ok := cutName(strings.TrimPrefix(s, " "), "[")
		_, value, typedToo := cutName(typed, "]:")
		if !ok || !typedToo {
			return nil, "", fmt.Errorf("no column in %.100s", s)
		}
		name = unquoted(name)
		switch bare, after, _ := strings.Cut(value, " "); {
		case bare == "null":
			tuple[name], s = nil, value[len(bare):]
		case bare == "unchanged-toast-datum":
			s = value[len(bare):]
		case value[0] == '\'' || strings.HasPrefix(value, "B'"):
			value = value[strings.IndexByte(value, '\'')+1:]
			var b strings.Builder
			for {
				part, more, ok := strings.Cut(value, "'")
				if !ok {
					return nil, "", fmt.Errorf("a text without an end: %.100s", value)
				}
				b.WriteString(part)
				if value = more; !strings.HasPrefix(more, "'") {
					break
				}
				b.WriteByte('\'')
				value = more[1:]
			}
			text := b.String()
			tuple[name], s = &text, value
		default:
			if after != "" {
				after = " " + after
			}
			if bare == "true" || bare == "false" {
				bare = bare[:1]
			}
			tuple[name], s = &bare, after
		}
	}
	return tuple, s, nil
}

// decoded compares the events with what another output plugin tells: the transactions in their order, in each the changes in their order, and
// each value.
func decoded(t *testing.T, s *system, slot string, all []*eventlog.Event) {
	t.Helper()
	db := s.sql()
	for name, value := range eventlog.SessionSettings {
		if _, err := db.Exec(context.Background(), "SELECT set_config($1, $2, false)", name, value); err != nil {
			t.Fatal(err)
		}
	}
	inserts := map[string]bool{"public.keyless": true, "public.nothing": true}
	told := map[uint32][]decodedChange{}
	var order []uint32
	for _, r := range db.ask(`SELECT xid, data FROM pg_logical_slot_get_changes('` + slot + `', NULL, NULL, 'include-timestamp', '0')`) {
		list, err := decodedLine(r[1])
		if err != nil {
			t.Fatal(err)
		}
		xid := uint32(atoi(t, r[0]))
		for _, c := range list {
			if strings.HasPrefix(c.relation, "audit.") || strings.HasPrefix(c.relation, "backstory.") || c.relation == "public.parted" || inserts[c.relation] && (c.op == eventlog.OpUpdate || c.op == eventlog.OpDelete) {
				continue
			}
			if len(order) == 0 || order[len(order)-1] != xid {
				order = append(order, xid)
			}
			told[xid] = append(told[xid], c)
		}
	}
	if len(told) < 50 || len(told) != len(order) {
		t.Fatalf("the other slot told of %d transactions, in %d pieces", len(told), len(order))
	}
	o := otherPlugin{t, map[string]worldRow{}, map[string]map[string]*string{}, map[string]*eventlog.Relation{}}
	changes, quiet := 0, 0
	for len(order) > 0 && len(all) > 0 && !t.Failed() {
		e := all[0]
		if e.Relation == nil || e.Op == eventlog.OpNote {
			all = all[1:]
			continue
		}
		list := told[order[0]]
		switch {
		case len(list) == 0:
			order = order[1:]
		case e.XID == order[0] && o.differs(e, list[0]) == "":
			o.fold(e)
			o.learn(list[0])
			told[order[0]], all, changes = list[1:], all[1:], changes+1
		case o.nothing(list[0]):
			o.learn(list[0])
			told[order[0]], quiet = list[1:], quiet+1
		default:
			t.Errorf("event %d, %s of %s %s in transaction %d, is not what the other slot tells next of transaction %d (%s): %v, %v → %v\ndata %s\nbefore %s", e.Position, e.Op, e.Relation.Own(), e.Key, e.XID, order[0],
				o.differs(e, list[0]), list[0], tupleText(list[0].old), tupleText(list[0].new), short(string(e.Data)), short(string(e.Before)))
		}
	}
	for _, xid := range order {
		for _, c := range told[xid] {
			if !o.nothing(c) && !t.Failed() {
				t.Errorf("the log has no event of transaction %d: %v, %v → %v", xid, c, tupleText(c.old), tupleText(c.new))
			}
			o.learn(c)
		}
	}
	for _, e := range all {
		if e.Relation != nil && e.Op != eventlog.OpNote && !t.Failed() {
			t.Errorf("event %d, %s of %s in transaction %d: the other slot does not tell of it", e.Position, e.Op, e.Relation.Own(), e.XID)
		}
	}
	t.Logf("%d changes in the same order with the same values as test_decoding tells, %d that changed nothing", changes, quiet)
}

func tupleText(tuple map[string]*string) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(tuple)) {
		if v := tuple[name]; v == nil {
			out = append(out, name+" NULL")
		} else {
			out = append(out, name+" "+short(*v))
		}
	}
	return strings.Join(out, ", ")
}

// otherPlugin compares events with changes that another plugin tells of, and keeps the rows by what the events say.
type otherPlugin struct {
	t      *testing.T
	rows   map[string]worldRow
	told   map[string]map[string]*string // the same by what the other plugin tells
	shapes map[string]*eventlog.Relation // the last version of each table
}

func rowOf(r *eventlog.Relation, id string) string { return r.String() + "\x00" + id }

// differs tells what an event does not say as a change does; empty: nothing.
func (o *otherPlugin) differs(e *eventlog.Event, c decodedChange) string {
	if e.Op != c.op || e.Relation.Own() != c.relation {
		return "it is of something else"
	}
	if id, ok := idOf(e.Relation, c); ok && id != e.Key {
		return "it is of another row"
	}
	known := o.rows[rowOf(e.Relation, cameFrom(e))]
	if e.Relation.Deferrable || len(e.Relation.Key) == 0 {
		known = nil // several rows may be under it
	}
	var parts [3]worldRow
	for i, p := range [][]byte{e.Data, e.Before, e.Rest} {
		var err error
		if parts[i], err = members(p); err != nil {
			o.t.Fatal(err)
		}
	}
	data, before, rest := parts[0], parts[1], parts[2]
	for _, col := range e.Relation.Columns {
		if want, ok := c.new[col.Name]; ok {
			have, ok := data[col.Name]
			if !ok {
				have, ok = rest[col.Name]
			}
			if !ok {
				have, ok = known[col.Name]
			}
			if ok && !o.equal(e, &col, have, want) || !ok && (known != nil || e.Op == eventlog.OpInsert) {
				return fmt.Sprintf("%s is %.100s", col.Name, have)
			}
		}
		want, ok := c.old[col.Name]
		if ok || c.old != nil && e.Relation.ReplicaIdentity == 'f' { // of a whole row, the other plugin leaves out NULLs
			have, ok := before[col.Name]
			if _, changed := data[col.Name]; !ok && !changed {
				if have, ok = rest[col.Name]; !ok {
					have, ok = known[col.Name]
				}
			}
			if ok && !o.equal(e, &col, have, want) || !ok && known != nil {
				return fmt.Sprintf("%s was %.100s", col.Name, have)
			}
		}
	}
	for name := range data { // nor more
		if _, ok := c.new[name]; !ok {
			return name + " is not told"
		}
	}
	return ""
}

// equal tells whether a value in the log is what the other plugin prints.
func (o *otherPlugin) equal(e *eventlog.Event, col *eventlog.Column, have string, want *string) bool {
	text, null, err := eventlog.AppendText(nil, &col.Type, []byte(have))
	if err != nil {
		o.t.Fatalf("event %d: %s: %v", e.Position, col.Name, err)
	}
	return null == (want == nil) && (null || string(text) == *want)
}

// key names a row as the other plugin knows it; false: it does not tell.
func (o *otherPlugin) key(c decodedChange, tuples ...map[string]*string) (string, bool) {
	r := o.shapes[c.relation]
	if r == nil {
		return "", false
	}
	out := c.relation
	for i := range r.Columns {
		col := &r.Columns[i]
		if r.ReplicaIdentity == 'f' && (r.Deferrable || !slices.Contains(r.Key, i)) || r.ReplicaIdentity != 'f' && !col.Identity {
			continue
		}
		i := slices.IndexFunc(tuples, func(t map[string]*string) bool { return t[col.Name] != nil })
		if i < 0 {
			return "", false
		}
		out += "\x00" + *tuples[i][col.Name]
	}
	return out, true
}

// idOf gives the key of the row after a change, or of the deleted one, as the log writes it; false: there is none, or it is not told.
func idOf(r *eventlog.Relation, c decodedChange) (string, bool) {
	var parts []string
	for _, k := range r.Key {
		name := r.Columns[k].Name
		v := c.new[name]
		if v == nil {
			v = c.old[name]
		}
		if v == nil {
			return "", false
		}
		parts = append(parts, *v)
	}
	if len(parts) > 1 {
		for i := range parts {
			parts[i] = strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(parts[i])
		}
	}
	return strings.Join(parts, ","), len(parts) > 0
}

func equalTexts(a, b *string) bool { return a == b || a != nil && b != nil && *a == *b }

// nothing tells whether a change leaves the row as it was, by what the other plugin has told.
func (o *otherPlugin) nothing(c decodedChange) bool {
	r := o.shapes[c.relation]
	if c.op != eventlog.OpUpdate || r == nil {
		return false
	}
	was := c.old
	if r.ReplicaIdentity != 'f' || c.old == nil { // a row of NULLs has an empty one
		key, ok := o.key(c, c.new, c.old)
		if was = o.told[key]; !ok || was == nil {
			return false
		}
	}
	for name, v := range c.new {
		if !equalTexts(v, was[name]) {
			return false
		}
	}
	return true
}

// learn keeps what the other plugin tells.
func (o *otherPlugin) learn(c decodedChange) {
	if c.op == eventlog.OpTruncate {
		maps.DeleteFunc(o.told, func(key string, _ map[string]*string) bool { return strings.HasPrefix(key, c.relation+"\x00") })
		return
	}
	now := map[string]*string{}
	if key, ok := o.key(c, c.old, c.new); ok {
		maps.Copy(now, o.told[key])
		delete(o.told, key)
	}
	maps.Copy(now, c.new)
	if key, ok := o.key(c, c.new, c.old); ok && c.new != nil {
		o.told[key] = now
	}
}

// cameFrom is the key that an event's row had before; one that was the empty text only the values before tell.
func cameFrom(e *eventlog.Event) string {
	if e.PreviousKey != "" || e.Op != eventlog.OpUpdate || len(e.Relation.Key) != 1 {
		return cmp.Or(e.PreviousKey, e.Key)
	}
	before, err := members(e.Before)
	if err == nil && before[e.Relation.Columns[e.Relation.Key[0]].Name] == `""` {
		return ""
	}
	return e.Key
}

// fold does what an event says.
func (o *otherPlugin) fold(e *eventlog.Event) {
	o.shapes[e.Relation.Own()] = e.Relation
	if e.Op == eventlog.OpTruncate {
		for k := range o.rows {
			if strings.HasPrefix(k, e.Relation.String()+"\x00") {
				delete(o.rows, k)
			}
		}
		return
	}
	now, err := members(e.Data)
	if err != nil {
		o.t.Fatal(err)
	}
	from := rowOf(e.Relation, cameFrom(e))
	was := o.rows[from]
	delete(o.rows, from)
	if e.Op == eventlog.OpDelete {
		return
	}
	if e.Op == eventlog.OpUpdate {
		was = maps.Clone(was)
		if was == nil {
			was = worldRow{}
		}
		maps.Copy(was, now)
		now = was
	}
	o.rows[rowOf(e.Relation, e.Key)] = now
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
