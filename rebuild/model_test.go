package rebuild

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/backstory-dev/backstory/eventlog"
)

// eventList is a log in memory.
type eventList []*eventlog.Event

func (l eventList) Read(ctx context.Context, sel eventlog.Selection, f func(*eventlog.Event) error) error {
	for _, e := range l {
		if e.Position <= sel.After || sel.Until != 0 && e.Position > sel.Until ||
			len(sel.Relations) > 0 && (e.Relation == nil || !slices.Contains(sel.Relations, e.Relation.String())) {
			continue
		}
		c := e.Clone()
		err := f(c)
		for _, b := range [][]byte{c.Data, c.Before, c.Rest, c.Metadata} { // whoever kept them will notice
			for i := range b {
				b[i] = '#'
			}
		}
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

// model is a database without any cleverness, and the events that a log would have of it.
type model struct {
	tables []*modelTable
	events eventList
	lsn    eventlog.LSN
	// states are what the tables held after each position at which a transaction ended.
	states map[eventlog.Position][][]string
}

type modelTable struct {
	versions []eventlog.RelationVersion
	key      []string // names; empty: none
	rows     []modelRow
	restless int // every so many updates, one carries no unchanged attributes
	updates  int
}

type modelRow map[string]string // JSON by column

var modelTypes = map[string]eventlog.Type{
	"bigint": {OID: 20, Name: "bigint", Kind: eventlog.KindInt},
	"text":   {OID: 25, Name: "text"},
	"json":   {OID: 114, Name: "json", Kind: eventlog.KindJSON},
}

func (m *model) addTable(name string, identity byte, key []string, columns ...string) *modelTable {
	t := &modelTable{key: key}
	rel := &eventlog.Relation{OID: uint32(1000 + len(m.tables)), Schema: "public", Name: name, ReplicaIdentity: identity, Complete: true, Deferrable: name == "deferrable"}
	for _, c := range columns {
		n, typ, _ := strings.Cut(c, " ")
		rel.Columns = append(rel.Columns, eventlog.Column{Name: n, Type: modelTypes[typ]})
	}
	m.tables = append(m.tables, t)
	m.alter(t, rel)
	return t
}

// alter gives the table another version.
func (m *model) alter(t *modelTable, rel *eventlog.Relation) {
	rel.Key = nil
	for _, k := range t.key {
		rel.Key = append(rel.Key, slices.IndexFunc(rel.Columns, func(c eventlog.Column) bool { return c.Name == k }))
	}
	id := 1
	for _, t := range m.tables {
		id += len(t.versions)
	}
	t.versions = append(t.versions, eventlog.RelationVersion{ID: id, Relation: rel, AtLSN: m.lsn + 1})
	for i, r := range t.rows { // a new column is there, and NULL, in every row
		t.rows[i] = maps.Clone(r)
		for _, c := range rel.Columns {
			if _, ok := r[c.Name]; !ok {
				t.rows[i][c.Name] = "null"
			}
		}
	}
}

func (t *modelTable) now() eventlog.RelationVersion { return t.versions[len(t.versions)-1] }

// object gives a row, or some of its columns, as the log stores it.
func (t *modelTable) object(r modelRow, want func(string) bool) []byte {
	var parts []string
	for _, c := range t.now().Columns {
		if v, ok := r[c.Name]; ok && want(c.Name) {
			parts = append(parts, strconv.Quote(c.Name)+":"+v)
		}
	}
	return []byte("{" + strings.Join(parts, ",") + "}")
}

func all(string) bool { return true }

// id gives the key by which the log knows a row.
func (t *modelTable) id(r modelRow) string {
	if len(t.key) == 0 {
		d := md5.Sum(t.object(r, all))
		return hex.EncodeToString(d[:])
	}
	var parts []string
	for _, k := range t.key {
		v := r[k]
		if strings.HasPrefix(v, `"`) {
			if err := json.Unmarshal([]byte(v), &v); err != nil {
				panic(err)
			}
		}
		if len(t.key) > 1 {
			v = strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(v)
		}
		parts = append(parts, v)
	}
	return strings.Join(parts, ",")
}

func (m *model) event(t *modelTable, op eventlog.Op, id string) *eventlog.Event {
	e := &eventlog.Event{Position: eventlog.Position(len(m.events) + 1), Op: op, AggregateID: id, Key: id, CommitLSN: m.lsn,
		OccurredAt: time.Unix(int64(m.lsn), 0)}
	if t != nil {
		e.Relation, e.SchemaVersion = t.now().Relation, t.now().ID
	}
	m.events = append(m.events, e)
	return e
}

func (m *model) insert(t *modelTable, op eventlog.Op, r modelRow) {
	t.rows = append(t.rows, r)
	e := m.event(t, op, t.id(r))
	e.Data = t.object(r, all)
}

// update changes the i-th row.
func (m *model) update(t *modelTable, i int, set modelRow) {
	old := t.rows[i]
	now := maps.Clone(old)
	maps.Copy(now, set)
	if maps.Equal(old, now) {
		return
	}
	t.rows[i] = now
	e := m.event(t, eventlog.OpUpdate, t.id(now))
	changed := func(c string) bool { return old[c] != now[c] }
	e.Data, e.Before = t.object(now, changed), t.object(old, changed)
	moved := len(t.key) == 0 || t.id(old) != t.id(now)
	if moved {
		e.PreviousKey = t.id(old)
	}
	if t.updates++; moved || t.restless == 0 || t.updates%t.restless != 0 {
		e.Rest = t.object(now, func(c string) bool { return !changed(c) })
	}
}

func (m *model) delete(t *modelTable, i int) {
	r := t.rows[i]
	t.rows = slices.Delete(slices.Clone(t.rows), i, i+1)
	e := m.event(t, eventlog.OpDelete, t.id(r))
	e.Before = t.object(r, all)
}

func (m *model) truncate(t *modelTable) {
	t.rows = nil
	m.event(t, eventlog.OpTruncate, "")
}

// commit ends a transaction.
func (m *model) commit() {
	m.lsn += 8
	if m.states == nil {
		m.states = map[eventlog.Position][][]string{}
	}
	var s [][]string
	for _, t := range m.tables {
		s = append(s, t.lines())
	}
	m.states[eventlog.Position(len(m.events))] = s
}

// lines gives the rows of the table in its present shape, sorted.
func (t *modelTable) lines() []string {
	out := []string{}
	for _, r := range t.rows {
		full := modelRow{}
		for _, c := range t.now().Columns {
			full[c.Name] = "null"
			if v, ok := r[c.Name]; ok {
				full[c.Name] = v
			}
		}
		out = append(out, string(t.object(full, all)))
	}
	sort.Strings(out)
	return out
}

// calculator gives the row calculator for all tables, in the shape they have after the last event.
func (m *model) calculator() *Rows {
	var versions [][]eventlog.RelationVersion
	var shape []int
	for _, t := range m.tables {
		versions = append(versions, t.versions)
		shape = append(shape, len(t.versions)-1)
	}
	return RowsOf(versions, shape)
}

type folding struct {
	until  eventlog.Position
	memory int64
	work   int
}

func (m *model) fold(t failer, o folding) (*Result, *Memory) {
	t.Helper()
	out := &Memory{}
	f := Fold{Source: m.events, Selection: eventlog.Selection{Until: o.until}, Calculator: m.calculator(), Target: out,
		MaxMemoryBytes: o.memory, Workers: o.work, TempDir: tempDir}
	r, err := f.Run(context.Background())
	if err != nil {
		t.Fatalf("%+v: %v", o, err)
	}
	return r, out
}

// sorted gives the lines of each table.
func (m *Memory) sorted() (out [][]string) {
	for _, t := range m.Tables {
		lines := []string{}
		for _, r := range t.Rows {
			lines = append(lines, string(r))
		}
		sort.Strings(lines)
		out = append(out, lines)
	}
	return out
}

// draw makes a random history.
func draw(t *rapid.T) *model {
	m := &model{lsn: 8}
	m.addTable("plain", 'd', []string{"id"}, "id bigint", "a text", "b bigint", "j json")
	m.addTable("deferrable", 'f', []string{"id"}, "id bigint", "a text")
	m.addTable("pairs", 'd', []string{"x", "y"}, "a text", "y text", "x text")
	m.addTable("keyless", 'f', nil, "a bigint", "b text")
	m.addTable("words", 'f', []string{"w"}, "w text", "n bigint")
	m.addTable("codes", 'f', []string{"id"}, "id bigint", "code text", "n bigint")
	for _, x := range m.tables {
		x.restless = rapid.SampledFrom([]int{0, 1, 2, 5}).Draw(t, "restless")
	}
	text := rapid.SampledFrom([]string{`""`, `"x"`, `"a,b"`, `"a\\b"`, `"é\n"`, `null`, `"` + strings.Repeat("long", 100) + `"`})
	value := func(c eventlog.Column, key bool) string {
		switch {
		case c.Type.Kind == eventlog.KindInt && key:
			return strconv.Itoa(rapid.IntRange(1, 12).Draw(t, "key"))
		case c.Type.Kind == eventlog.KindInt:
			return rapid.SampledFrom([]string{"null", "0", "-5", "9223372036854775807"}).Draw(t, "int")
		case c.Type.Kind == eventlog.KindJSON:
			return rapid.SampledFrom([]string{"null", `{"a": [1, "x"], "id":""}`, `{"$json":null}`, `"s"`, "1.50"}).Draw(t, "json")
		case key:
			return rapid.SampledFrom([]string{`""`, `"x"`, `"y"`, `"a,b"`, `"\\"`, `"a\\,"`}).Draw(t, "text key")
		}
		return text.Draw(t, "text")
	}
	row := func(x *modelTable) modelRow {
		r := modelRow{}
		for _, c := range x.now().Columns {
			r[c.Name] = value(c, slices.Contains(x.key, c.Name))
		}
		return r
	}
	free := func(x *modelTable, r modelRow, but int) bool {
		for i, o := range x.rows {
			if len(x.key) > 0 && i != but && x.id(o) == x.id(r) {
				return false
			}
		}
		return true
	}
	for range rapid.IntRange(1, 40).Draw(t, "transactions") {
		for range rapid.IntRange(1, 6).Draw(t, "changes") {
			x := m.tables[rapid.IntRange(0, len(m.tables)-1).Draw(t, "table")]
			i := -1
			if len(x.rows) > 0 {
				i = rapid.IntRange(0, len(x.rows)-1).Draw(t, "row")
			}
			switch k := rapid.IntRange(0, 99).Draw(t, "what"); {
			case k < 30 || i < 0:
				if r := row(x); free(x, r, -1) {
					op := eventlog.OpInsert
					if k < 3 {
						op = eventlog.OpImport
					}
					m.insert(x, op, r)
				}
			case k < 65:
				set := modelRow{}
				for _, c := range x.now().Columns {
					if isKey := slices.Contains(x.key, c.Name); !isKey && rapid.Bool().Draw(t, "set") {
						set[c.Name] = value(c, false)
					}
				}
				m.update(x, i, set)
			case k < 80:
				r := row(x)
				set := modelRow{}
				for _, n := range x.key {
					set[n] = r[n]
				}
				if now := maps.Clone(x.rows[i]); len(x.key) > 0 {
					maps.Copy(now, set)
					if free(x, now, i) {
						m.update(x, i, set)
					}
				}
			case k < 90:
				m.delete(x, i)
			case k < 92:
				m.truncate(x)
			case k < 94:
				m.event(nil, eventlog.OpNote, "note").Data = []byte(`{"id":1}`)
			case k < 95:
				rel := *x.now().Relation
				rel.Columns = append(slices.Clone(rel.Columns), eventlog.Column{Name: fmt.Sprintf("new%d", len(x.versions)), Type: modelTypes["text"]})
				m.alter(x, &rel)
			case k < 96:
				m.dropColumn(t, x)
			case k < 98 && x.now().Name == "codes":
				m.changeKey(t, x)
			default:
				if x.now().Name == "deferrable" {
					m.shift(t, x)
				}
			}
		}
		m.commit()
	}
	return m
}

// dropColumn drops a column that is not in the key, if there is one to spare.
func (m *model) dropColumn(t *rapid.T, x *modelTable) {
	rel := *x.now().Relation
	var spare []int
	for i, c := range rel.Columns {
		if !slices.Contains(x.key, c.Name) && c.Name != "id" && c.Name != "code" {
			spare = append(spare, i)
		}
	}
	if len(spare) < 2 {
		return
	}
	i := rapid.SampledFrom(spare).Draw(t, "dropped column")
	name := rel.Columns[i].Name
	rel.Columns = slices.Delete(slices.Clone(rel.Columns), i, i+1)
	for i, r := range x.rows {
		x.rows[i] = maps.Clone(r)
		delete(x.rows[i], name)
	}
	m.alter(x, &rel)
}

// changeKey gives the table another primary key, or none, if its rows allow it.
func (m *model) changeKey(t *rapid.T, x *modelTable) {
	key := rapid.SampledFrom([][]string{{"id"}, {"code"}, {"code", "id"}, nil}).Draw(t, "new key")
	seen, old := map[string]bool{}, x.key
	x.key = key
	for _, r := range x.rows {
		id := x.id(r)
		for _, k := range key {
			if r[k] == "null" {
				x.key = old
			}
		}
		if len(key) > 0 && seen[id] {
			x.key = old
		}
		seen[id] = true
	}
	rel := *x.now().Relation
	m.alter(x, &rel)
}

// shift gives rows other keys in an order that only a key that is checked at the end allows.
func (m *model) shift(t *rapid.T, x *modelTable) {
	var keys []string
	for _, r := range x.rows {
		keys = append(keys, r["id"])
	}
	spare := strconv.Itoa(rapid.IntRange(13, 20).Draw(t, "spare"))
	if !slices.Contains(keys, spare) {
		keys = append(keys, spare)
	}
	keys = rapid.Permutation(keys).Draw(t, "keys")
	order := make([]int, len(x.rows))
	for i := range order {
		order[i] = i
	}
	for _, i := range rapid.Permutation(order).Draw(t, "order") {
		m.update(x, i, modelRow{"id": keys[i]})
	}
	if rapid.Bool().Draw(t, "and delete") {
		m.delete(x, rapid.IntRange(0, len(x.rows)-1).Draw(t, "deleted"))
	}
}

func TestFoldEqualsTheModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := draw(t)
		all := slices.Sorted(maps.Keys(m.states))
		until := rapid.SampledFrom(all).Draw(t, "until")
		if until == 0 {
			return
		}
		// The shape is that of the end, so the states are compared where it was that already, or at the end.
		last := all[len(all)-1]
		for _, p := range []eventlog.Position{until, last} {
			if p != last && !sameShapes(m, p) {
				continue
			}
			r, got := m.fold(t, folding{p, rapid.SampledFrom([]int64{4 << 10, 64 << 10, 16 << 20}).Draw(t, "memory"), rapid.IntRange(1, 4).Draw(t, "workers")})
			for i, lines := range got.sorted() {
				if want := m.states[p][i]; !slices.Equal(lines, want) {
					t.Fatalf("%s at %d:\n got %q\nwant %q", m.tables[i].now(), p, lines, want)
				}
				if tally := r.Tables[i].Tally; tally.Orphans != 0 || tally.Replaced != 0 || tally.Unknown != nil {
					t.Fatalf("%s at %d: %+v", m.tables[i].now(), p, tally)
				}
			}
		}
	})
}

func sameShapes(m *model, p eventlog.Position) bool {
	for _, e := range m.events[p:] {
		for _, t := range m.tables {
			if e.Relation != nil && e.Relation.OID == t.now().OID && len(t.versions) > 1 {
				return false
			}
		}
	}
	for _, t := range m.tables {
		if len(t.versions) > 1 {
			return false
		}
	}
	return true
}

// failer is a testing.TB or a rapid.T.
type failer interface {
	Helper()
	Fatalf(format string, args ...any)
}
