package e2e

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// world is the state of all tables after some events, by its own simple fold: a map from table and key to rows. It checks
// each event against the state before it.
type world struct {
	tables   map[string]*worldTable
	position eventlog.Position
	ids      map[eventlog.ID]eventlog.Position
	xid      uint32
	lsn      eventlog.LSN
	change   int64
	xids     map[uint32]bool      // transactions that are over
	touched  map[*worldTable]bool // by the transaction that is open
	counts   map[countKey]int     // row changes by transaction and table
	// byOID knows tables by their OIDs, where names change.
	byOID bool
	// unseen are tables of which the log does not have all rows.
	unseen map[string]bool
	// healing: what it has may be outdated.
	healing bool
	// rules: a row change can become several events.
	rules bool
}

type worldTable struct {
	name string
	rel  *eventlog.Relation // the newest version
	// rows by key. There can be several under one key inside a transaction, where the key is DEFERRABLE, and of tables
	// without a key.
	rows map[string][]worldRow
	// compared: it was altered, and its rows are being compared with the source.
	compared bool
	// rekeyed: it got another key before the log had all its rows.
	rekeyed bool
}

// worldRow has the JSON of each column.
type worldRow map[string]string

type countKey struct {
	xid      uint32
	relation string
	op       eventlog.Op
}

func newWorld() *world {
	return &world{tables: map[string]*worldTable{}, ids: map[eventlog.ID]eventlog.Position{}, xids: map[uint32]bool{}, touched: map[*worldTable]bool{},
		counts: map[countKey]int{}, unseen: map[string]bool{}}
}

func members(object []byte) (worldRow, error) {
	if object == nil {
		return nil, nil
	}
	m := worldRow{}
	err := eventlog.EachMember(object, func(name, value []byte) error {
		if _, ok := m[string(name)]; ok {
			return fmt.Errorf("member %s twice", name)
		}
		m[string(name)] = string(value)
		return nil
	})
	return m, err
}

// apply folds one event. It returns what is wrong with it.
func (w *world) apply(e *eventlog.Event) error {
	if err := w.place(e); err != nil {
		return fmt.Errorf("event %d (%s, %s of %s/%s in transaction %d): %w", e.Position, e.Type, e.Op, e.Aggregate, short(e.Key), e.XID, err)
	}
	if e.Relation == nil || e.Op == eventlog.OpGap {
		return nil
	}
	if e.Op == eventlog.OpNote {
		return w.baselineEnded(e)
	}
	if err := w.row(e); err != nil {
		return fmt.Errorf("event %d (%s, %s of %s %s in transaction %d, change %d): %w\ndata %s\nbefore %s\nrest %s\nmeta %s\nprevious %q", e.Position, e.Type, e.Op,
			e.Relation, short(e.Key), e.XID, e.Change, err, short(string(e.Data)), short(string(e.Before)), short(string(e.Rest)), e.Metadata, e.PreviousKey)
	}
	return nil
}

// baselineEnded: from here on the log has all of a table's rows, and all of each.
func (w *world) baselineEnded(e *eventlog.Event) error {
	if w.byOID && e.Relation.Dropped {
		return nil // another one may have its name by now
	}
	if strings.HasSuffix(e.Type, "Altered") || strings.HasSuffix(e.Type, "Dropped") && e.Relation.Dropped {
		w.table(e.Relation)
		return nil
	}
	if strings.HasSuffix(e.Type, "BaselineBegan") && len(e.Relation.Key) == 0 {
		w.table(e.Relation)
		return nil
	}
	if !strings.HasSuffix(e.Type, "BaselineEnded") {
		return fmt.Errorf("event %d: a note %s", e.Position, e.Type)
	}
	unheard := w.healing && w.tables[e.Relation.Own()] == nil // before the gap, too
	t := w.table(e.Relation)
	if !w.unseen[t.name] && !t.compared && !e.Relation.InsertOnly && !unheard {
		return fmt.Errorf("event %d: the baseline of %s ends, but there was none to come", e.Position, t.name)
	}
	delete(w.unseen, t.name)
	t.compared, t.rekeyed = false, false
	if e.Relation.InsertOnly {
		return nil
	}
	if !e.Relation.Complete {
		return fmt.Errorf("event %d: %s is not complete when its baseline has ended", e.Position, t.name)
	}
	for k, rows := range t.rows {
		if err := t.whole(rows[0]); err != nil {
			return fmt.Errorf("event %d: the baseline of %s ends, and row %s has %w", e.Position, t.name, short(k), err)
		}
	}
	return nil
}

func short(s string) string {
	if len(s) > 700 {
		return s[:700] + "…"
	}
	return s
}

// place checks what does not depend on rows: positions, order, identity.
func (w *world) place(e *eventlog.Event) error {
	if e.Position-eventlog.Position(e.Part) != w.position+1 { // a joined event has the place of its last part
		return fmt.Errorf("position %d follows %d", e.Position, w.position)
	}
	w.position = e.Position
	if p, ok := w.ids[e.ID]; ok {
		return fmt.Errorf("id %s is that of event %d too", e.ID, p)
	}
	w.ids[e.ID] = e.Position
	if e.Relation == nil || e.Op == eventlog.OpGap {
		return nil
	}
	if e.XID != w.xid || e.CommitLSN != w.lsn {
		if err := w.commit(); err != nil {
			return err
		}
		if e.CommitLSN <= w.lsn {
			return fmt.Errorf("commit LSN %s follows %s", e.CommitLSN, w.lsn)
		}
		if w.xids[e.XID] {
			return fmt.Errorf("transaction %d comes a second time", e.XID)
		}
		w.xid, w.lsn, w.change = e.XID, e.CommitLSN, 0
		w.xids[e.XID] = true
	}
	if e.Change <= w.change {
		return fmt.Errorf("change %d follows %d", e.Change, w.change)
	}
	w.change = e.Change
	return nil
}

// commit checks what holds between transactions: a key has one row.
func (w *world) commit() error {
	for t := range w.touched {
		if t.rel != nil && len(t.rel.Key) > 0 {
			for k, rows := range t.rows {
				if len(rows) > 1 && (w.unseen[t.name] || t.compared) { // the others are outdated
					t.rows[k] = rows[len(rows)-1:]
				} else if len(rows) > 1 {
					return fmt.Errorf("%s has %d rows under key %q after transaction %d", t.name, len(rows), short(k), w.xid)
				}
			}
		}
	}
	clear(w.touched)
	return nil
}

// move gives a table another name.
func (w *world) move(t *worldTable, name string) {
	delete(w.tables, t.name)
	if w.unseen[t.name] {
		delete(w.unseen, t.name)
		w.unseen[name] = true
	}
	w.tables[name], t.name = t, name
}

// gap is that of an event: what the log has may be outdated from here on, and the source may be another one, whose WAL lies elsewhere.
func (w *world) gap() {
	for name := range w.tables {
		w.unseen[name], w.healing = true, true
	}
	w.lsn = 0
	clear(w.xids)
}

func (w *world) table(r *eventlog.Relation) *worldTable {
	name := r.Own()
	if w.byOID {
		for old, t := range w.tables {
			switch {
			case t.rel.OID == r.OID && old != name: // it was renamed
				w.move(t, name)
			case t.rel.OID != r.OID && old == name: // it was dropped, or renamed, which the log tells of later
				w.move(t, fmt.Sprintf("%s (%d)", name, t.rel.OID))
			}
		}
	}
	t := w.tables[name]
	if t == nil {
		t = &worldTable{name: name, rows: map[string][]worldRow{}}
		w.tables[name] = t
		if w.byOID && !r.Complete {
			w.unseen[name] = true // it had rows when it was taken in
		}
	}
	t.compared = t.compared || t.rel != nil && t.rel.Complete && !r.Complete && !r.InsertOnly
	old := t.rel
	if old != nil && old != r {
		t.reshape(r)
	}
	if t.rel = r; old != nil && !slices.EqualFunc(old.Key, r.Key, func(a, b int) bool { return eventlog.SameColumn(&old.Columns[a], &r.Columns[b]) }) {
		t.rekeyed = t.rekeyed || w.unseen[name]
		was := t.rows
		t.rows = map[string][]worldRow{}
		for _, rows := range was {
			for _, row := range rows {
				if now, err := t.key(row); err == nil { // the others come again
					t.rows[now] = append(t.rows[now], row)
				}
			}
		}
	}
	return t
}

// reshape gives the rows the columns of another version of the table. What is added has the value that the catalogue had for it.
func (t *worldTable) reshape(r *eventlog.Relation) {
	for _, rows := range t.rows {
		for n, row := range rows {
			now := worldRow{}
			for i := range r.Columns {
				c := &r.Columns[i]
				o := slices.IndexFunc(t.rel.Columns, func(o eventlog.Column) bool { return eventlog.SameColumn(&o, c) })
				if o >= 0 {
					if v, ok := row[t.rel.Columns[o].Name]; ok {
						now[c.Name] = v
					}
				} else if c.Missing != "" {
					now[c.Name] = c.Missing
				}
			}
			rows[n] = now
		}
	}
}

// unknown are the columns whose values before the event nobody told.
func unknown(e *eventlog.Event) (list []string) {
	var meta struct{ Unknown []string }
	if e.Metadata != nil {
		_ = json.Unmarshal(e.Metadata, &meta)
	}
	return meta.Unknown
}

func (w *world) row(e *eventlog.Event) error {
	t := w.table(e.Relation)
	w.counts[countKey{e.XID, t.name, e.Op}]++
	if e.Op == eventlog.OpTruncate {
		clear(t.rows)
		return nil
	}
	if len(t.rel.Key) > 0 && t.rel.ReplicaIdentity != 'd' {
		w.touched[t] = true
	}
	data, err := members(e.Data)
	if err != nil {
		return fmt.Errorf("data: %w", err)
	}
	before, err := members(e.Before)
	if err != nil {
		return fmt.Errorf("before: %w", err)
	}
	rest, err := members(e.Rest)
	if err != nil {
		return fmt.Errorf("rest: %w", err)
	}
	unseen, lacks := w.unseen[t.name] || t.compared, unknown(e)
	if !unseen && bytes.Contains(e.Metadata, []byte(`"first_seen":`)) {
		return fmt.Errorf("a row is new although the log has the table's whole life")
	}
	// Only of a column that was added after the row nobody may know.
	added := func(old worldRow) error {
		for _, c := range lacks {
			if v, ok := old[c]; ok && len(v) <= 1024 { // a long default is known by the version of the table alone
				return fmt.Errorf("%s is unknown although the log has it", c)
			}
		}
		return nil
	}
	if w.healing && unseen || (t.compared || t.rekeyed && unseen) && (strings.HasSuffix(e.Type, "Healed") || bytes.Contains(e.Metadata, []byte(`"first_seen":`))) { // by its new key, which the log had not
		return t.overwrite(e, data, rest)
	}
	switch e.Op {
	case eventlog.OpInsert:
		if e.Before != nil || e.Rest != nil || e.PreviousKey != "" {
			return fmt.Errorf("an insert with something before it")
		}
		if err := t.whole(data); err != nil {
			return err
		}
		return t.put(e.Key, data)
	case eventlog.OpImport:
		// Of a table of inserts a row can go to another key without a word; that it is compared, an event need not say.
		if !unseen && !(e.Relation.InsertOnly && strings.HasSuffix(e.Type, "Healed")) {
			return fmt.Errorf("an import of a row of a table whose whole life is in the log")
		}
		switch {
		case e.Rest != nil: // what it lacked is filled in; what was known is the same
			old, err := t.take(e.Key, rest)
			if err != nil {
				return err
			}
			if !maps.Equal(old, rest) {
				return fmt.Errorf("more was known of it: %v", old)
			}
			maps.Copy(data, rest)
		case len(t.rel.Key) > 0 && len(t.rows[e.Key]) > 0 && !bytes.Contains(e.Metadata, []byte(`"first_seen":`)):
			return fmt.Errorf("an import of a row that the log has")
		}
		return t.put(e.Key, data)
	case eventlog.OpDelete:
		if e.Data != nil || e.Rest != nil {
			return fmt.Errorf("a delete that sets something")
		}
		if unseen {
			t.complete(e.Key, before)
		}
		old, err := t.take(e.Key, before)
		if unseen && (len(t.rows[e.Key]) == 0 || err != nil && t.rel.Deferrable) {
			return nil // it need not be there; before a transaction ends, another row may have its key
		}
		if err != nil {
			return err
		}
		if len(lacks) == 0 {
			if err := t.whole(before); err != nil {
				return fmt.Errorf("before: %w", err)
			}
		}
		if len(old) != len(before) {
			return fmt.Errorf("the row had other columns: %v", names(old))
		}
		return added(old)
	case eventlog.OpUpdate:
	default:
		return fmt.Errorf("operation %s", e.Op)
	}
	if len(data) == 0 {
		return fmt.Errorf("an update that changes nothing")
	}
	if len(lacks) == 0 && !slices.Equal(names(data), names(before)) && !unseen {
		return fmt.Errorf("sets %v, but before has %v", names(data), names(before))
	}
	known := maps.Clone(before)
	for k, v := range data {
		if b, ok := before[k]; ok && b == v {
			return fmt.Errorf("%s is the same before and after", k)
		}
		if _, ok := rest[k]; ok {
			return fmt.Errorf("%s changed, but is among the unchanged", k)
		}
	}
	if e.Rest != nil {
		maps.Copy(known, rest)
		if !unseen && len(known)+len(lacks) != len(t.rel.Columns) {
			return fmt.Errorf("before and rest together have %d columns, the table has %d", len(known), len(t.rel.Columns))
		}
	}
	from := e.Key
	if key, err := t.key(known); err == nil && len(t.rel.Key) > 0 {
		from = key // the whole key is among what is known of the row before
		if key != e.Key && e.PreviousKey != key {
			return fmt.Errorf("the key was %q, the previous id is %q", key, e.PreviousKey)
		}
	} else if e.PreviousKey != "" {
		from = e.PreviousKey
	}
	if e.PreviousKey != "" && from != e.PreviousKey {
		return fmt.Errorf("the key was %q, the previous id is %q", from, e.PreviousKey)
	}
	if e.PreviousKey == "" && from != e.Key && from != "" {
		return fmt.Errorf("the key was %q, but there is no previous id", from)
	}
	if unseen {
		t.complete(from, known)
	}
	old, err := t.take(from, known)
	if err != nil && unseen && t.rel.ReplicaIdentity == 'f' && e.Rest != nil { // it was not known before, and is now
		maps.Copy(data, rest)
		return t.put(e.Key, data)
	}
	if err != nil {
		return err
	}
	if err := added(old); err != nil {
		return err
	}
	now := maps.Clone(old)
	maps.Copy(now, data)
	return t.put(e.Key, now)
}

// complete adds what a row lacked and is told by now.
func (t *worldTable) complete(key string, known worldRow) {
	rows := t.rows[key]
	if len(rows) != 1 {
		return
	}
	for c, v := range known {
		if _, ok := rows[0][c]; !ok {
			rows[0][c] = v
		}
	}
}

// overwrite takes an event for what it says, whatever the log had before.
func (t *worldTable) overwrite(e *eventlog.Event, data, rest worldRow) error {
	if len(t.rel.Key) == 0 || t.rel.Deferrable && e.Op != eventlog.OpImport {
		return t.recount(e, data, rest)
	}
	if e.PreviousKey != "" {
		delete(t.rows, e.PreviousKey)
	} else if before, err := members(e.Before); err == nil && e.Op == eventlog.OpUpdate {
		if key, err := t.key(before); err == nil && key == "" { // an empty text, which is no previous id either
			delete(t.rows, key)
		}
	}
	if e.Op == eventlog.OpDelete {
		delete(t.rows, e.Key)
		return nil
	}
	now := worldRow{}
	if old := t.rows[e.Key]; len(old) > 0 {
		maps.Copy(now, old[0])
	}
	maps.Copy(now, data)
	maps.Copy(now, rest)
	delete(t.rows, e.Key)
	return t.put(e.Key, now)
}

// recount does so where there can be several rows under a key. A row that is not there cannot be taken away.
func (t *worldTable) recount(e *eventlog.Event, data, rest worldRow) error {
	from, now := e.PreviousKey, worldRow{}
	if from == "" {
		from = e.Key
	}
	if rows := t.rows[from]; len(rows) > 0 && (e.Op == eventlog.OpDelete || e.Op == eventlog.OpUpdate) {
		before, _ := members(e.Before)
		is := max(0, slices.IndexFunc(rows, func(r worldRow) bool {
			for c, v := range before {
				if r[c] != v {
					return false
				}
			}
			return true
		}))
		maps.Copy(now, rows[is])
		if t.rows[from] = slices.Delete(slices.Clone(rows), is, is+1); len(rows) == 1 {
			delete(t.rows, from)
		}
	}
	if e.Op == eventlog.OpDelete {
		return nil
	}
	maps.Copy(now, data)
	maps.Copy(now, rest)
	return t.put(e.Key, now)
}

func names(r worldRow) []string { return slices.Sorted(maps.Keys(r)) }

// whole checks that a row has every column.
func (t *worldTable) whole(r worldRow) error {
	if len(r) != len(t.rel.Columns) {
		return fmt.Errorf("%d columns of %d: %v", len(r), len(t.rel.Columns), names(r))
	}
	for _, c := range t.rel.Columns {
		if _, ok := r[c.Name]; !ok {
			return fmt.Errorf("no column %s", c.Name)
		}
	}
	return nil
}

// key makes the key of a row as an aggregate id, or its content where there is no key.
func (t *worldTable) key(r worldRow) (string, error) {
	if len(t.rel.Key) == 0 {
		var members []string
		for _, c := range t.rel.Columns {
			members = append(members, string(eventlog.AppendString(nil, []byte(c.Name)))+":"+r[c.Name])
		}
		return eventlog.ContentID([]byte("{" + strings.Join(members, ",") + "}")), nil
	}
	var parts []string
	for _, i := range t.rel.Key {
		c := &t.rel.Columns[i]
		j, ok := r[c.Name]
		if !ok {
			return "", fmt.Errorf("no key column %s", c.Name)
		}
		text, null, err := eventlog.AppendText(nil, &c.Type, []byte(j))
		if err != nil || null {
			return "", fmt.Errorf("key column %s: null %v, %w", c.Name, null, err)
		}
		s := string(text)
		if len(t.rel.Key) > 1 {
			s = strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(s)
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, ","), nil
}

// put adds a row.
func (t *worldTable) put(key string, r worldRow) error {
	if len(t.rel.Key) > 0 {
		k, err := t.key(r)
		if err != nil {
			return err
		}
		if k != key {
			return fmt.Errorf("the row's key is %q, the aggregate id %q", short(k), short(key))
		}
		if t.rel.ReplicaIdentity == 'd' && len(t.rows[key]) > 0 {
			return fmt.Errorf("there is a row under this key already")
		}
	}
	t.rows[key] = append(t.rows[key], r)
	return nil
}

// take removes the row that had the values known of it.
func (t *worldTable) take(key string, known worldRow) (worldRow, error) {
	rows := t.rows[key]
	var differs string
	for i, r := range rows {
		same := true
		for k, v := range known {
			if now, ok := r[k]; !ok || now != v {
				same, differs = false, fmt.Sprintf("%s is %s, before says %s", k, short(now), short(v))
				break
			}
		}
		if !same {
			continue
		}
		if len(rows) == 1 {
			delete(t.rows, key)
		} else {
			t.rows[key] = slices.Delete(slices.Clone(rows), i, i+1)
		}
		return r, nil
	}
	if len(rows) == 0 {
		return nil, fmt.Errorf("there is no row under %q", short(key))
	}
	return nil, fmt.Errorf("%d rows under %q, but none is like this before: %s", len(rows), short(key), differs)
}

// contents are the printed rows of tables, sorted.
type contents map[string][]string

const ( // what no text in Postgres holds
	fieldMark = "\x00 | "
	nullMark  = "\x00NULL"
)

// printed gives a value in a form that is short enough to keep.
func printed(text []byte) string {
	if len(text) > 200 {
		return fmt.Sprintf("%s… (%d bytes, md5 %x)", text[:40], len(text), md5.Sum(text))
	}
	return string(text)
}

// print gives the rows of a table as Postgres prints them, by columns.
func (t *worldTable) print(columns []string) ([]string, error) {
	types := map[string]*eventlog.Type{}
	for i := range t.rel.Columns {
		types[t.rel.Columns[i].Name] = &t.rel.Columns[i].Type
	}
	var out []string
	var text []byte
	for _, rows := range t.rows {
		for _, r := range rows {
			var fields []string
			for _, c := range columns {
				if _, ok := r[c]; !ok { // added after the row was last written
					fields = append(fields, nullMark)
					continue
				}
				if types[c] == nil {
					return nil, fmt.Errorf("the log knows no column %s", c)
				}
				var null bool
				var err error
				if text, null, err = eventlog.AppendText(text[:0], types[c], []byte(r[c])); err != nil {
					return nil, err
				}
				if null {
					fields = append(fields, nullMark)
				} else {
					fields = append(fields, printed(text))
				}
			}
			out = append(out, strings.Join(fields, fieldMark))
		}
	}
	slices.Sort(out)
	return out, nil
}

// differs compares the state with what tables hold.
func (w *world) differs(want contents, columns map[string][]string) error {
	for name, rows := range want {
		var have []string
		t := w.tables[name]
		if w.unseen[name] {
			if t != nil && len(t.rel.Key) > 0 {
				if err := t.amongst(rows, columns[name]); err != nil {
					return err
				}
			}
			continue
		}
		if t != nil {
			var err error
			if have, err = t.print(columns[name]); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if err := difference(name, "the log", have, rows, columns[name]); err != nil {
			return err
		}
	}
	return nil
}

// amongst makes sure that what is known of the rows of a table is so in the source. Not every row need be known.
func (t *worldTable) amongst(rows, columns []string) error {
	var key []int // where the key's columns are
	for _, k := range t.rel.Key {
		key = append(key, slices.Index(columns, t.rel.Columns[k].Name))
	}
	byKey := map[string][]string{}
	of := func(fields []string) string {
		var list []string
		for _, k := range key {
			list = append(list, fields[k])
		}
		return strings.Join(list, fieldMark)
	}
	for _, r := range rows {
		fields := strings.Split(r, fieldMark)
		byKey[of(fields)] = fields
	}
	for _, rows := range t.rows {
		for _, r := range rows {
			one := &worldTable{name: t.name, rel: t.rel, rows: map[string][]worldRow{"": {r}}}
			printed, err := one.print(columns)
			if err != nil {
				return err
			}
			fields := strings.Split(printed[0], fieldMark)
			is := byKey[of(fields)]
			if is == nil {
				return fmt.Errorf("%s: the log has a row that is not there: %s", t.name, short(strings.Join(fields, " | ")))
			}
			for i, c := range columns {
				if _, known := r[c]; known && fields[i] != is[i] {
					return fmt.Errorf("%s: %s is %s, the log has %s, in row %s", t.name, c, short(is[i]), short(fields[i]), short(strings.Join(is, " | ")))
				}
			}
		}
	}
	return nil
}

// difference compares printed rows with those of a table.
func difference(name, whose string, have, rows, columns []string) error {
	if slices.Equal(have, rows) {
		return nil
	}
	in := map[string]int{}
	for _, r := range rows {
		in[r]++
	}
	for _, r := range have {
		in[r]--
	}
	msg := fmt.Sprintf("%s: %s has %d rows, the table %d; columns %q", name, whose, len(have), len(rows), columns)
	shown := 0
	for r, n := range in {
		if n != 0 && shown < 6 {
			who := "only in the table"
			if n < 0 {
				who = "only in " + whose
			}
			msg += fmt.Sprintf("\n  %s: %s", who, short(strings.ReplaceAll(r, fieldMark, " | ")))
			shown++
		}
	}
	return errors.New(msg)
}

// columnsOf lists the columns of captured tables that are in the stream: all but generated ones.
func columnsOf(s *session, where string) map[string][]string {
	s.t.Helper()
	out := map[string][]string{}
	for _, r := range s.ask(`SELECT n.nspname, c.relname, coalesce((SELECT json_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0
		AND NOT a.attisdropped AND a.attgenerated = ''), '[]') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'backstory') AND ` + where) {
		var cols []string
		if err := json.Unmarshal([]byte(r[2]), &cols); err != nil {
			s.t.Fatal(err)
		}
		out[r[0]+"."+r[1]] = cols
	}
	return out
}

// dump reads whole tables.
func dump(ctx context.Context, s *session, columns map[string][]string) (contents, error) {
	out := contents{}
	for name, cols := range columns {
		schema, table, _ := strings.Cut(name, ".")
		var list []string
		for _, c := range cols {
			list = append(list, eventlog.QuoteIdent(c))
		}
		res, err := s.PgConn().Exec(ctx, "SELECT "+strings.Join(list, ", ")+" FROM ONLY "+eventlog.QuoteQualified(schema, table)).ReadAll()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		rows := []string{}
		for _, r := range res[0].Rows {
			var fields []string
			for _, v := range r {
				if v == nil {
					fields = append(fields, nullMark)
				} else {
					fields = append(fields, printed(v))
				}
			}
			rows = append(rows, strings.Join(fields, fieldMark))
		}
		slices.Sort(rows)
		out[name] = rows
	}
	return out, nil
}

// patience is how long a look at the whole log, or at the tables that it makes, may take.
func patience(events eventlog.Position) time.Duration {
	return 5*time.Minute + time.Duration(events)*time.Millisecond/5
}

// whole is a context for a look at the whole log.
func whole(t testing.TB, l *eventlog.Log) context.Context {
	t.Helper()
	h, err := l.Head(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	return within(t, patience(h.Position))
}

// replay folds the whole log, calling each after each event.
func (w *world) replay(t testing.TB, l *eventlog.Log, each func(e *eventlog.Event) error) {
	t.Helper()
	faults := 0
	one := func(e *eventlog.Event) error {
		err := w.apply(e)
		if err == nil && each != nil {
			err = each(e)
		}
		if err != nil {
			if faults++; faults > 5 {
				return err
			}
			t.Error(err)
		}
		return nil
	}
	var j joiner
	err := l.Read(whole(t, l), eventlog.Selection{After: w.position, Quiet: true}, func(e *eventlog.Event) error {
		if !w.rules {
			return one(e)
		}
		return j.add(e, one)
	})
	if err == nil {
		err = j.flush(one)
	}
	if err == nil {
		err = w.commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	if t.Failed() {
		t.FailNow()
	}
}

// checkLog proves what must hold of every log, and gives the state at its end.
func checkLog(t testing.TB, l *eventlog.Log, unseen ...string) *world {
	t.Helper()
	w := newWorld()
	for _, u := range unseen {
		w.unseen[u] = true
	}
	w.replay(t, l, nil)
	verify(t, l)
	return w
}

func verify(t testing.TB, l *eventlog.Log) *eventlog.Verdict {
	t.Helper()
	v, err := l.Verify(whole(t, l), nil)
	if err != nil {
		t.Fatalf("verify: %v", err)
	}
	if v.Broken != "" {
		t.Fatalf("verify: %s at %d", v.Broken, v.At)
	}
	return v
}

// sameTables compares the log's end with the source as it is.
func (w *world) sameTables(t testing.TB, s *session, where string) {
	t.Helper()
	columns := columnsOf(s, where)
	now, err := dump(within(t, patience(w.position)), s, columns)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.differs(now, columns); err != nil {
		t.Fatalf("the tables differ at the end (position %d): %v", w.position, err)
	}
}

func atoi(t testing.TB, s string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
