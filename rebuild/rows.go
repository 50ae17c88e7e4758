package rebuild

import (
	"bytes"
	"crypto/md5"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/backstory-dev/backstory/eventlog"
)

// Rows is the built-in calculator that reproduces captured tables, row by row, by the table and the row's key; notes and
// gaps are nothing to it.
//
//   - An insert or import is a whole row.
//   - An update sets attributes. One that tells the unchanged attributes too (Rest) makes the row where there is none; of
//     another the known attributes are kept, and it is counted as an orphan.
//   - An update that changed the key (PreviousKey) takes the row away from its old key and puts the whole row under the new one.
//   - A row of a table without a key is known by its content: it is counted how often it is there.
//
// Order within a transaction. Events come in the order of the WAL. Where the key is checked row by row, that order never has
// two rows under one key. A DEFERRABLE key is checked later: UPDATE t SET id = id + 1 may put a row under 2 before the row
// that was there goes on to 3. So until the transaction ends there can be several rows under a key, and what takes a row
// away from a key takes the one that has the content that the event says it had. This is looked after where the key of the table is
// DEFERRABLE, or was so once: the catalogue, which tells it, may be newer than the rows.
type Rows struct {
	tables   []*Table
	versions []*version // by number in the schema history
	newest   []int      // by table: the number of the version whose shape it has
	current  []*version // by table: of the last event
	roots    []*Table   // by table: the one that it is a part of, nil for none
	head     []byte     // scratch of Route
	key      []byte
}

// RowsOf makes the calculator for tables, each given by the versions it has had, oldest first. The table has the shape of
// the version seen last; shape tells which that is at least, by index.
func RowsOf(tables [][]eventlog.RelationVersion, shape []int) *Rows {
	c := &Rows{}
	for i, versions := range tables {
		deferrable := slices.ContainsFunc(versions, func(v eventlog.RelationVersion) bool { return v.Deferrable })
		for _, v := range versions {
			for len(c.versions) <= v.ID {
				c.versions = append(c.versions, nil)
			}
			c.versions[v.ID] = newVersion(v, i)
			c.versions[v.ID].deferrable = deferrable
		}
		c.newest = append(c.newest, versions[shape[i]].ID)
		c.current = append(c.current, nil)
		c.tables = append(c.tables, &Table{})
	}
	c.Tables()
	return c
}

var _ Calculator = (*Rows)(nil)

// Tables gives the tables in the shape that they have after the events routed so far.
func (c *Rows) Tables() []*Table {
	for i, id := range c.newest {
		r := c.versions[id].rel
		*c.tables[i] = Table{Schema: r.Schema, Name: r.Name, Columns: r.Columns, Key: r.Key, Generated: r.Generated}
		if now := c.current[i]; now != nil && !sameIdentity(now, c.versions[id]) { // it has got another key since
			c.tables[i].Key = nil
		}
	}
	c.shapeRoots()
	for _, v := range c.versions {
		if v != nil {
			v.mapTo(c.tables[v.table].Columns)
		}
	}
	return c.tables
}

// join makes those tables parts of the partitioned tables of their names for which that is wanted, by table.
func (c *Rows) join(wanted []bool) {
	c.roots = make([]*Table, len(c.tables))
	byName := map[string]*Table{}
	for i, id := range c.newest {
		if n := c.versions[id].rel.String(); wanted[i] {
			if byName[n] == nil {
				byName[n] = &Table{}
			}
			c.roots[i] = byName[n]
		}
	}
	c.Tables()
}

// shapeRoots gives partitioned tables the shape of that part whose shape is the newest. All have the same columns, perhaps in another order than the partitioned table itself, which counts; where
// ALTER TABLE is known of some of them only, the others' later versions tell which column is which.
func (c *Rows) shapeRoots() {
	lead := map[*Table]int{}
	rank := func(i int) int { // one of which there is no event has the number of no version
		if c.current[i] == nil {
			return 0
		}
		return c.newest[i]
	}
	for i, root := range c.roots {
		if n, ok := lead[root]; root != nil && (!ok || rank(i) > rank(n)) {
			lead[root] = i
		}
	}
	for root, n := range lead {
		*root = *c.tables[n]
		root.Root, root.late, root.before = nil, nil, map[string][]string{}
		root.inOrder()
		for _, v := range c.versions {
			if v == nil || v.table != n || v.id >= c.newest[n] {
				continue
			}
			for i := range root.Columns {
				if o := slices.IndexFunc(v.rel.Columns, func(o eventlog.Column) bool { return eventlog.SameColumn(&o, &root.Columns[i]) }); o >= 0 {
					root.before[root.Columns[i].Name] = append(root.before[root.Columns[i].Name], v.rel.Columns[o].Name)
				}
			}
		}
		root.Schema, root.Name = c.versions[c.newest[n]].rel.Table()
	}
	for i, root := range c.roots {
		if root == nil {
			continue
		}
		t := c.tables[i]
		t.Root, t.late = root, map[string]place{}
		for _, v := range c.versions {
			if v == nil || v.table != i || v.id <= c.newest[i] {
				continue
			}
			for n := range v.rel.Columns {
				col := &v.rel.Columns[n]
				if _, ok := t.late[col.Name]; ok {
					continue
				}
				p := place{from: slices.IndexFunc(t.Columns, func(o eventlog.Column) bool { return eventlog.SameColumn(&o, col) })}
				if p.from < 0 && col.Missing != "" {
					p.value = Value{[]byte(col.Missing), &col.Type}
				}
				t.late[col.Name] = p
			}
		}
		if !slices.EqualFunc(root.Key, t.Key, func(a, b int) bool { return root.Columns[a].Name == t.Columns[b].Name }) {
			root.Key = nil
		}
	}
}

// needsBefore tells whether the values before a change matter.
func (c *Rows) needsBefore() bool {
	return slices.ContainsFunc(c.versions, func(v *version) bool { return v != nil && (v.deferrable || v.emptyKey != nil) })
}

// Relation gives the version of a table whose shape it has after the events routed so far.
func (c *Rows) Relation(table int) *eventlog.Relation { return c.versions[c.newest[table]].rel }

// A step is [kind, 8 bits] [number of the version] [commit LSN] [data] [rest] [before], numbers as uvarints and objects
// behind their lengths.
const (
	stepPut    = iota // data and rest are the whole row
	stepArrive        // the same, of a row that was elsewhere or nowhere before
	stepPatch         // data are the attributes that changed
	stepLearn         // data is what is known of a row by now
	stepTake          // the row is deleted; before and rest are what it was, where that may be needed
	stepLeave         // the same, of a row that goes to another key
	stepAdd           // one more row like data and rest, of a table without a key
	stepDrop          // one row less
	stepMinus         // the same, of a row whose content changes
	stepRekey         // a row as it is in a state, from another key
)

// Route gives the steps of an event.
func (c *Rows) Route(e *eventlog.Event, to *Router) error {
	if e.Relation == nil || e.Restates || e.SchemaVersion < 0 {
		return nil
	}
	if e.SchemaVersion >= len(c.versions) || c.versions[e.SchemaVersion] == nil {
		return nil // of a table that is not asked for
	}
	v := c.versions[e.SchemaVersion]
	if now := c.current[v.table]; now != v {
		c.newest[v.table] = max(c.newest[v.table], v.id)
		c.current[v.table] = v
		if now != nil && !sameIdentity(now, v) {
			if err := c.rekey(v, to); err != nil {
				return err
			}
		}
	}
	c.key = append(c.key[:0], e.Key...)
	var before []byte
	if v.deferrable {
		before = e.Before
	}
	keyed := len(v.rel.Key) > 0
	switch e.Op {
	case eventlog.OpTruncate:
		return to.Clear(v.table)
	case eventlog.OpDelete:
		if !keyed {
			return c.step(to, v, stepDrop, e, nil, nil, nil)
		}
		return c.step(to, v, stepTake, e, nil, nil, before)
	case eventlog.OpInsert, eventlog.OpImport, eventlog.OpUpdate:
	default:
		return nil
	}
	moved := e.PreviousKey != "" || e.Op == eventlog.OpUpdate && v.keyWasEmpty(e.Before)
	if moved {
		c.key = append(c.key[:0], e.PreviousKey...)
		var err error
		switch {
		case !keyed:
			err = c.step(to, v, stepMinus, e, nil, nil, nil)
		case before != nil:
			err = c.step(to, v, stepLeave, e, nil, e.Rest, before)
		default:
			err = c.step(to, v, stepLeave, e, nil, nil, nil)
		}
		if err != nil {
			return err
		}
		c.key = append(c.key[:0], e.Key...)
	}
	switch {
	case !keyed:
		return c.step(to, v, stepAdd, e, e.Data, e.Rest, nil)
	case e.Op == eventlog.OpInsert || moved:
		return c.step(to, v, stepArrive, e, e.Data, e.Rest, nil)
	case (e.Op == eventlog.OpImport || e.Rest != nil) && !hasUnknown(e.Metadata):
		return c.step(to, v, stepPut, e, e.Data, e.Rest, before)
	case e.Op == eventlog.OpImport:
		// A row that changed for the first time since a gap. What it was before the log has, or a later event tells.
		return c.step(to, v, stepLearn, e, e.Data, e.Rest, before)
	default:
		return c.step(to, v, stepPatch, e, e.Data, e.Rest, before)
	}
}

// hasUnknown tells whether an event says that it does not know all of its row.
func hasUnknown(metadata []byte) bool { return bytes.Contains(metadata, []byte(`"unknown"`)) }

func (c *Rows) step(to *Router, v *version, kind byte, e *eventlog.Event, data, rest, before []byte) error {
	h := append(c.head[:0], kind)
	h = binary.AppendUvarint(h, uint64(v.id))
	h = binary.AppendUvarint(h, uint64(e.CommitLSN))
	h = binary.AppendUvarint(h, uint64(len(data)))
	h = binary.AppendUvarint(h, uint64(len(rest)))
	c.head = binary.AppendUvarint(h, uint64(len(before)))
	return to.Step(v.table, c.key, c.head, data, rest, before)
}

// rekey puts the rows that a table has so far under the keys that a version of it has. A row of which the new key is not
// known, since the source filled it in without an event, is left out: all rows are compared with the source then, and it comes with its key.
func (c *Rows) rekey(v *version, to *Router) error {
	f := &rowFolder{calc: c}
	values := make([][]byte, len(v.names))
	var rows []storedRow
	var object, payload []byte
	return to.Rekey(v.table, func(key, state []byte) error {
		var err error
		if rows, err = parseRows(rows[:0], state); err != nil {
			return err
		}
		for _, r := range rows {
			clear(values)
			if err := f.valuesIn(v, r, values); err != nil {
				return err
			}
			if err := f.missingIn(v, r, values); err != nil {
				return err
			}
			object = v.object(object[:0], values)
			switch {
			case len(v.rel.Key) == 0:
				if r.flags&flagCounted == 0 {
					r.flags, r.number = r.flags|flagCounted, 1
				}
				d := md5.Sum(object)
				c.key = hex.AppendEncode(c.key[:0], d[:])
			case v.keyKnown(values):
				id, err := eventlog.RowID(v.rel, object)
				if err != nil {
					return err
				}
				c.key = append(c.key[:0], id...)
			case slices.ContainsFunc(v.rel.Key, func(k int) bool { return v.rel.Columns[k].Num == 0 }):
				c.key = append(c.key[:0], key...) // perhaps the column has only got another name
			default:
				continue
			}
			if len(v.rel.Key) > 0 && r.flags&flagCounted != 0 {
				r.flags, r.number = r.flags&^flagCounted, 0
			}
			payload = appendRow(append(payload[:0], stepRekey), r)
			if err := to.Step(v.table, c.key, payload); err != nil {
				return err
			}
		}
		return nil
	})
}

// rowStep is a step, taken apart.
type rowStep struct {
	kind               byte
	version            uint64
	lsn                uint64
	data, rest, before []byte
}

var errState = fmt.Errorf("bug: a step or state of a row is malformed")

func parseStep(b []byte) (s rowStep, err error) {
	if len(b) == 0 {
		return s, errState
	}
	s.kind = b[0]
	b = b[1:]
	var n [5]uint64
	for i := range n {
		var w int
		if n[i], w = binary.Uvarint(b); w <= 0 {
			return s, errState
		}
		b = b[w:]
	}
	s.version, s.lsn = n[0], n[1]
	if uint64(len(b)) != n[2]+n[3]+n[4] {
		return s, errState
	}
	s.data, b = b[:n[2]], b[n[2]:]
	s.rest, s.before = b[:n[3]], b[n[3]:]
	return s, nil
}

// NewFolder makes a folder of rows.
func (c *Rows) NewFolder() Folder {
	f := &rowFolder{calc: c}
	f.member = func(name, value []byte) error { // made once, not for each object
		if i := f.from.column(name, f.next); i >= 0 {
			f.next = i + 1
			if j := f.from.final[i]; j >= 0 {
				f.vals[j] = Value{value, &f.from.rel.Columns[i].Type}
			}
		}
		return nil
	}
	return f
}

// rowFolder folds rows.
//
// The state of a key is its rows, oldest first: usually one, several only inside a transaction with a DEFERRABLE key. A row
// is [length of what follows] [flags, 8 bits] [commit LSN of the transaction that put it there, or, without a key, how often
// it is there] and fragments: [number of the version] [length] [object], newest last. Numbers are uvarints.
type rowFolder struct {
	calc    *Rows
	rows    []storedRow
	vals    []Value
	member  func(name, value []byte) error // puts a member of an object of version from into vals
	from    *version
	next    int // column where the next member is expected
	text    []byte
	extra   []byte
	merged  []byte
	placed  map[[2]int][]int // see places
	objects [][]byte
}

const (
	flagPartial = 1 // only what has changed is known of the row
	flagCounted = 2 // the row has no key: its number is a count
)

// storedRow is a row of a state, taken apart.
type storedRow struct {
	flags     byte
	number    uint64 // commit LSN, or count
	fragments []byte
}

func parseRows(dst []storedRow, state []byte) ([]storedRow, error) {
	for len(state) > 0 {
		n, w := binary.Uvarint(state)
		if w <= 0 || n < 2 || uint64(len(state)-w) < n {
			return nil, errState
		}
		b := state[w : w+int(n)]
		state = state[w+int(n):]
		number, k := binary.Uvarint(b[1:])
		if k <= 0 {
			return nil, errState
		}
		dst = append(dst, storedRow{b[0], number, b[1+k:]})
	}
	return dst, nil
}

func appendRow(dst []byte, r storedRow) []byte {
	dst = binary.AppendUvarint(dst, uint64(1+uvarintLen(r.number)+len(r.fragments)))
	dst = append(dst, r.flags)
	dst = binary.AppendUvarint(dst, r.number)
	return append(dst, r.fragments...)
}

func uvarintLen(n uint64) int {
	l := 1
	for ; n >= 0x80; n >>= 7 {
		l++
	}
	return l
}

// fragment takes the first fragment from b.
func nextFragment(b []byte) (version uint64, object, rest []byte, err error) {
	version, w := binary.Uvarint(b)
	if w <= 0 {
		return 0, nil, nil, errState
	}
	n, k := binary.Uvarint(b[w:])
	if k <= 0 || uint64(len(b)-w-k) < n {
		return 0, nil, nil, errState
	}
	b = b[w+k:]
	return version, b[:n:n], b[n:], nil
}

func appendFragment(dst []byte, version uint64, object []byte) []byte {
	if len(object) == 0 {
		return dst
	}
	dst = binary.AppendUvarint(dst, version)
	dst = binary.AppendUvarint(dst, uint64(len(object)))
	return append(dst, object...)
}

// appendWhole appends a row made of a step's data and rest.
func (f *rowFolder) appendWhole(dst []byte, s *rowStep, flags byte, number uint64) []byte {
	n := 0
	for _, o := range [2][]byte{s.data, s.rest} {
		if len(o) > 0 {
			n += uvarintLen(s.version) + uvarintLen(uint64(len(o))) + len(o)
		}
	}
	dst = binary.AppendUvarint(dst, uint64(1+uvarintLen(number)+n))
	dst = append(dst, flags)
	dst = binary.AppendUvarint(dst, number)
	dst = appendFragment(dst, s.version, s.data)
	return appendFragment(dst, s.version, s.rest)
}

// Fold folds a step into the state of a key.
func (f *rowFolder) Fold(dst, state []byte, st *Step) ([]byte, error) {
	if len(st.Payload) > 0 && st.Payload[0] == stepRekey {
		return f.foldRekeyed(dst, state, st)
	}
	s, err := parseStep(st.Payload)
	if err != nil {
		return dst, err
	}
	switch s.kind {
	case stepAdd, stepDrop, stepMinus:
		return f.foldCounted(dst, state, st, &s)
	}
	if len(state) == 0 {
		switch s.kind {
		case stepTake, stepLeave:
			f.orphan(st, &s)
			return dst, nil
		case stepPatch:
			if len(s.rest) == 0 {
				st.Tally.Orphans++
				return f.appendWhole(dst, &s, flagPartial, s.lsn), nil
			}
		}
		return f.appendWhole(dst, &s, 0, s.lsn), nil
	}
	if f.rows, err = parseRows(f.rows[:0], state); err != nil {
		return dst, err
	}
	rows := f.rows
	if n := len(rows); n > 1 && rows[n-1].number != s.lsn {
		// The transaction that had several rows under this key is over; the one put there last has it.
		st.Tally.Replaced += int64(len(rows) - 1)
		rows = rows[len(rows)-1:]
	}
	switch s.kind {
	case stepArrive:
		if v := f.calc.versions[s.version]; !v.deferrable {
			if v.rel.Complete { // elsewhere, that is to be expected
				st.Tally.Replaced++
			}
			return f.appendWhole(dst, &s, 0, s.lsn), nil
		}
		for _, r := range rows {
			dst = appendRow(dst, r)
		}
		return f.appendWhole(dst, &s, 0, s.lsn), nil
	case stepTake, stepLeave:
		i, err := f.which(rows, &s)
		if err != nil {
			return dst, err
		}
		if i < 0 {
			f.orphan(st, &s)
		}
		for j, r := range rows {
			if j != i {
				dst = appendRow(dst, r)
			}
		}
		return dst, nil
	}
	i := 0
	if len(rows) > 1 {
		if i, err = f.which(rows, &s); err != nil {
			return dst, err
		}
		i = max(i, 0)
	}
	for j, r := range rows {
		switch {
		case j != i:
			dst = appendRow(dst, r)
		case s.kind == stepPut:
			dst = f.appendWhole(dst, &s, 0, r.number)
		default:
			if dst, err = f.patch(dst, r, &s); err != nil {
				return dst, err
			}
		}
	}
	return dst, nil
}

// orphan counts a step that finds no row to take away. As long as the log does not have all rows, that is no surprise, and of a row that
// is gone, or whole under another key, nothing is missing.
func (f *rowFolder) orphan(st *Step, s *rowStep) {
	if f.calc.versions[s.version].rel.Complete {
		st.Tally.Orphans++
	}
}

// which finds the row that a step takes or changes; -1 means that it is none of these.
func (f *rowFolder) which(rows []storedRow, s *rowStep) (int, error) {
	if len(rows) == 1 && (rows[0].number != s.lsn || len(s.before) == 0) {
		return 0, nil // a key has one row whenever a transaction begins
	}
	for i, r := range rows {
		same, err := f.matches(r, s)
		if err != nil || same {
			return i, err
		}
	}
	return -1, nil
}

// places tells where the columns of a version are in another one of the same table.
func (f *rowFolder) places(from, to *version) []int {
	key := [2]int{from.id, to.id}
	p := f.placed[key]
	if p == nil {
		if p = from.placesIn(to.rel.Columns); f.placed == nil {
			f.placed = map[[2]int][]int{}
		}
		f.placed[key] = p
	}
	return p
}

// valuesIn fills in the values of a row, by column of a version.
func (f *rowFolder) valuesIn(v *version, r storedRow, values [][]byte) error {
	for b := r.fragments; len(b) > 0; {
		n, object, rest, err := nextFragment(b)
		if err != nil {
			return err
		}
		b = rest
		from := f.calc.versions[n]
		place := f.places(from, v)
		if err := from.each(object, func(column int, value []byte) {
			if i := place[column]; i >= 0 {
				values[i] = value
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

// missingIn fills in the values of columns that came after a row was last written as a whole, as far as they are known.
func (f *rowFolder) missingIn(v *version, r storedRow, values [][]byte) error {
	if r.flags&flagPartial != 0 {
		return nil
	}
	n, _, _, err := nextFragment(r.fragments)
	if err != nil {
		return err
	}
	had := f.places(f.calc.versions[n], v)
	for i := range values {
		if m := v.rel.Columns[i].Missing; values[i] == nil && m != "" && !slices.Contains(had, i) {
			values[i] = []byte(m)
		}
	}
	return nil
}

// matches tells whether a row has all the values that it had according to the step, as far as both are known.
func (f *rowFolder) matches(r storedRow, s *rowStep) (bool, error) {
	v := f.calc.versions[s.version]
	now := make([][]byte, len(v.names))
	if err := f.valuesIn(v, r, now); err != nil {
		return false, err
	}
	same, had := true, make([]bool, len(v.names))
	each := func(object []byte, f func(column int, value []byte)) error {
		if len(object) == 0 {
			return nil
		}
		return v.each(object, f)
	}
	differs := func(column int, value []byte) bool { return now[column] != nil && !bytes.Equal(now[column], value) }
	if err := each(s.before, func(column int, value []byte) {
		had[column] = true
		same = same && !differs(column, value)
	}); err != nil {
		return false, err
	}
	err := each(s.rest, func(column int, value []byte) {
		same = same && (had[column] || !differs(column, value)) // what changed is as it is after the change there
	})
	return same, err
}

// patch appends a row with what an update changed. So that a row that changes often does not grow, its fragments are merged
// once the changes weigh as much as the row.
func (f *rowFolder) patch(dst []byte, r storedRow, s *rowStep) ([]byte, error) {
	if r.flags&flagPartial != 0 && len(s.rest) > 0 {
		r.flags &^= flagPartial
		r.fragments = appendFragment(slices.Clone(r.fragments), s.version, s.rest)
	}
	_, object, _, err := nextFragment(r.fragments)
	if err != nil {
		return dst, err
	}
	start := len(dst)
	grown := len(r.fragments) + len(s.data) + 2*binary.MaxVarintLen64
	if grown <= 2*len(object)+256 {
		dst = binary.AppendUvarint(dst, uint64(1+uvarintLen(r.number)+len(r.fragments)+uvarintLen(s.version)+uvarintLen(uint64(len(s.data)))+len(s.data)))
		dst = append(dst, r.flags)
		dst = binary.AppendUvarint(dst, r.number)
		dst = append(dst, r.fragments...)
		return appendFragment(dst, s.version, s.data), nil
	}
	f.extra = appendFragment(append(f.extra[:0], r.fragments...), s.version, s.data)
	f.text, err = f.merge(f.text[:0], f.extra)
	if err != nil {
		return dst[:start], err
	}
	r.fragments = f.text
	return appendRow(dst, r), nil
}

// merge appends one fragment for each version that a row's fragments are of.
func (f *rowFolder) merge(dst, fragments []byte) ([]byte, error) {
	for len(fragments) > 0 {
		n, object, rest, err := nextFragment(fragments)
		if err != nil {
			return dst, err
		}
		v := f.calc.versions[n]
		f.objects = append(f.objects[:0], make([][]byte, len(v.names))...)
		for {
			if err := v.each(object, func(column int, value []byte) { f.objects[column] = value }); err != nil {
				return dst, err
			}
			fragments = rest
			if len(rest) == 0 {
				break
			}
			var m uint64
			if m, object, rest, err = nextFragment(fragments); err != nil {
				return dst, err
			}
			if m != n {
				break
			}
		}
		merged := append(f.merged[:0], '{')
		for i, value := range f.objects {
			if value != nil {
				if len(merged) > 1 {
					merged = append(merged, ',')
				}
				merged = eventlog.AppendString(merged, v.names[i])
				merged = append(merged, ':')
				merged = append(merged, value...)
			}
		}
		f.merged = append(merged, '}')
		dst = appendFragment(dst, n, f.merged)
	}
	return dst, nil
}

// foldCounted folds a step of a table without a key.
func (f *rowFolder) foldCounted(dst, state []byte, st *Step, s *rowStep) ([]byte, error) {
	if len(state) == 0 {
		if s.kind != stepAdd {
			f.orphan(st, s)
			return dst, nil
		}
		return f.appendWhole(dst, s, flagCounted, 1), nil
	}
	var err error
	if f.rows, err = parseRows(f.rows[:0], state); err != nil {
		return dst, err
	}
	r := f.rows[0]
	if s.kind == stepAdd {
		r.number++
	} else if r.number--; r.number == 0 {
		return dst, nil
	}
	return appendRow(dst, r), nil
}

// foldRekeyed folds a row that comes from another key.
func (f *rowFolder) foldRekeyed(dst, state []byte, st *Step) ([]byte, error) {
	var err error
	if f.rows, err = parseRows(f.rows[:0], st.Payload[1:]); err != nil || len(f.rows) != 1 {
		return dst, errState
	}
	r := f.rows[0]
	if f.rows, err = parseRows(f.rows[:0], state); err != nil {
		return dst, err
	}
	switch {
	case r.flags&flagCounted != 0:
		for _, o := range f.rows {
			r.number += o.number
		}
	default:
		st.Tally.Replaced += int64(len(f.rows))
	}
	return appendRow(dst, r), nil
}

// Rows gives the rows of a key.
func (f *rowFolder) Rows(s *State, emit func(*Row) error) error {
	var err error
	if f.rows, err = parseRows(f.rows[:0], s.State); err != nil {
		return err
	}
	if len(f.rows) == 0 {
		return nil
	}
	last := f.rows[len(f.rows)-1]
	s.Tally.Replaced += int64(len(f.rows) - 1)
	t := f.calc.tables[s.Table]
	f.vals = append(f.vals[:0], make([]Value, len(t.Columns))...)
	var base *version
	for b := last.fragments; len(b) > 0; {
		n, object, rest, err := nextFragment(b)
		if err != nil {
			return err
		}
		v := f.calc.versions[n]
		if base == nil {
			base = v // the first fragment is of the whole row
		}
		f.from, f.next = v, 0
		if err := eventlog.EachMember(object, f.member); err != nil {
			return fmt.Errorf("row of %s: %w", t, err)
		}
		b = rest
	}
	times := uint64(1)
	if last.flags&flagCounted != 0 {
		times = last.number
	}
	f.complete(s, t, base, last.flags&flagPartial != 0)
	row := Row{Values: f.vals}
	for range times {
		if err := emit(&row); err != nil {
			return err
		}
	}
	return nil
}

// jsonNull is SQL NULL in the form of the log.
var jsonNull = []byte("null")

// complete fills in what a row's events do not say: its key, and columns that came later. What is left is not known.
func (f *rowFolder) complete(s *State, t *Table, base *version, partial bool) {
	f.text = f.text[:0]
	for i := range f.vals {
		if f.vals[i].JSON != nil {
			continue
		}
		c := &t.Columns[i]
		if k := slices.Index(t.Key, i); k >= 0 {
			n := len(f.text)
			f.text = eventlog.AppendJSON(f.text, &c.Type, []byte(keyPart(string(s.Key), k, len(t.Key))))
			f.vals[i] = Value{f.text[n:len(f.text):len(f.text)], &c.Type}
			continue
		}
		was := partial
		for j := range base.rel.Columns {
			was = was || base.final[j] == i
		}
		switch {
		case !was:
			f.vals[i] = Value{missing(c), &c.Type}
		default:
			s.Tally.unknown(i, len(t.Columns))
		}
	}
}

// keyPart gives one of the n texts that a key is joined of.
func keyPart(key string, i, n int) string {
	if n == 1 {
		return key
	}
	var b strings.Builder
	for ; ; i-- {
		b.Reset()
		for key != "" && key[0] != ',' {
			if key[0] == '\\' && len(key) > 1 {
				key = key[1:]
			}
			b.WriteByte(key[0])
			key = key[1:]
		}
		if i == 0 || key == "" {
			return b.String()
		}
		key = key[1:]
	}
}
