package eventlog

import (
	"bytes"
	"context"
	"regexp"
	"slices"
)

// Rules decide which events the row changes of tables become. Package rules makes them of backstory.yaml; without any, every table has the
// default ones (see [AggregateName]).
type Rules interface {
	// Text is what they were made of. The log keeps it: the same text is the same version of the rules.
	Text() string
	// Table gives the rules of one version of a table; nil: the default ones.
	Table(r *Relation) *TableRules
}

// TableRules are the rules of one version of a table. They belong to one goroutine.
type TableRules struct {
	// Aggregate is the name of the table's own aggregate; empty: by convention.
	Aggregate string
	// RowRules are those of rows that are their own entity.
	RowRules
	// Filings are the ways in which rows belong to entities of other aggregates.
	Filings []Filing
	// File chooses one of them for the row before or after a change; -1: the row is its own entity. nil: the first one, always.
	File func(c *RowChange, after bool) (int, error)
	// Links are further entities under which the rows' events are found, too.
	Links []Filing
}

// RowRules say which events changes of rows become.
type RowRules struct {
	// Quiet tells which columns are no news: a change of only such ones becomes …Touched. nil: those by convention.
	Quiet []bool
	// Type decides which events an insert, update or delete becomes, beside the default ones. What it returns is valid until it is called again.
	Type func(c *RowChange) ([]Part, error)
}

// Filing says how rows belong to entities of another aggregate, as an order's items do. Their events are those of that entity. Where its key is NULL or not known,
// the row is its own entity.
type Filing struct {
	RowRules
	// Aggregate is that of the entities, and Table theirs, public.orders.
	Aggregate, Table string
	// Key are the columns that hold the entity's key, in the order of that.
	Key []int
	// IDType is the type of that, as IDType gives it; empty: that of these columns.
	IDType string
}

// MaxParts is how many events rules may make of one row change: the number of each in it has eight bits of its id.
const MaxParts = 250

// Part is one event that rules make of a row change.
type Part struct {
	Type string
	// Columns are those that it tells of: of an update, as far as they changed; of an insert or delete, all of them. nil: all columns.
	Columns []bool
	// Extra is a JSON object of further attributes, or nil.
	Extra []byte
}

// RowChange is an insert, update or delete on its way to its events. It is valid until Type returns.
type RowChange struct {
	Op      Op
	Changed []bool // by column, of an update

	w         *Writer
	ctx       context.Context
	t         *table
	old, now  []Value // the rows as the source sent them; nil where the log's own state is used
	st        rowState
	objects   [][]byte // the row, told by members of these, where it is neither
	was       [][]byte // the row before, if that is another one than objects tell
	frags     []byte   // of an update whose row before is a state: the row after, a column after the other
	off       []int
	kept      []byte // the row after as the cache is to have it, if that is another form
	keptOff   []int
	firstSeen bool // of a delete: the log does not know the row
	failed    []byte
	failure   string
}

// Value gives a column's value before or after the change, in the form of Postgres' text or, if json, in that of the log. Before an insert and after a delete
// every column is NULL.
func (c *RowChange) Value(column int, after bool) (state State, value []byte, json bool, err error) {
	switch row := c.row(after); {
	case after && c.Op == OpDelete || !after && c.Op == OpInsert:
		return StateNull, nil, false, nil
	case row != nil && c.firstSeen && row[column].State != StateText: // only its name came
		return StateUnknown, nil, false, nil
	case row != nil:
		return row[column].State, row[column].Text, false, nil
	case c.objects != nil:
		row := c.objects
		if !after && c.was != nil {
			row = c.was
		}
		for _, o := range row {
			if f := c.t.valueIn(o, column); f != nil {
				return jsonState(f), f, true, nil
			}
		}
		return StateUnknown, nil, false, nil
	}
	f, err := c.fragment(column, after)
	if err != nil || len(f) == 0 {
		return StateUnknown, nil, false, err
	}
	return jsonState(f), f, true, nil
}

// jsonState tells whether a value in the form of the log is NULL. A json null is as that there.
func jsonState(f []byte) State {
	if string(f) == "null" {
		return StateNull
	}
	return StateText
}

// valueIn gives a column's member of a JSON object; nil: it has none.
func (t *table) valueIn(object []byte, column int) (found []byte) {
	if object == nil {
		return nil
	}
	_ = EachMember(object, func(name, value []byte) error {
		if string(name) == t.rel.Columns[column].Name {
			found = value
		}
		return nil
	})
	return found
}

// RowChangeOf makes a change of what is known of the row before and after it: JSON objects in the form of the log, of which a column that is missing is not known. An
// insert has no row before, a delete none after.
func RowChangeOf(r *Relation, op Op, before, after []byte) *RowChange {
	c := &RowChange{Op: op, t: newTable(r), objects: [][]byte{after}, was: [][]byte{before}}
	if op == OpUpdate {
		for i := range r.Columns {
			a, b := c.t.valueIn(before, i), c.t.valueIn(after, i)
			c.Changed = append(c.Changed, b != nil && !bytes.Equal(a, b))
		}
	}
	return c
}

// Failure tells what went wrong with a rule; empty: nothing.
func (c *RowChange) Failure() string { return c.failure }

// Known tells whether a column's value before an update is known.
func (c *RowChange) Known(column int) bool {
	if c.was != nil {
		return c.t.valueIn(c.was[0], column) != nil
	}
	if c.old != nil {
		return c.old[column].State != StateUnknown
	}
	return len(c.st.frag(column)) > 0
}

// Fail notes that a rule could not be applied: what it is about becomes a default event, which says so.
func (c *RowChange) Fail(rule string, err error) {
	if c.failed == nil {
		c.failure = rule + ": " + err.Error()
		if c.w != nil {
			c.w.made.RuleErrors++
			c.w.ruleError.Store(&c.failure)
		}
		c.failed = append(AppendString([]byte(`"rule_error":{"rule":`), []byte(rule)), `,"error":`...)
		c.failed = append(AppendString(c.failed, validUTF8([]byte(err.Error()))), '}')
	}
}

// RuleError tells which rule could not be applied last, and why; empty: none. Any goroutine may call it.
func (w *Writer) RuleError() string {
	if s := w.ruleError.Load(); s != nil {
		return *s
	}
	return ""
}

// mark adds to an event's metadata what went wrong with a rule.
func (c *RowChange) mark(meta []byte) []byte {
	return withMember(meta, c.failed)
}

// withMember adds a member to a JSON object, nil is none.
func withMember(object, member []byte) []byte {
	switch {
	case member == nil:
		return object
	case object == nil:
		return append(append([]byte{'{'}, member...), '}')
	}
	return append(append(append(object[:len(object)-1], ','), member...), '}')
}

// row gives the row before or after as the source sent it; nil: it is known from the log.
func (c *RowChange) row(after bool) []Value {
	if after {
		return c.now
	}
	return c.old
}

// fragment gives a column's value in the form of the log, empty where it is not known, of a row that is known from the log.
func (c *RowChange) fragment(i int, after bool) (f []byte, err error) {
	if after {
		f = c.frags[c.off[i]:c.off[i+1]]
	} else {
		f = c.st.frag(i)
	}
	if isBig(f) {
		return c.w.load(c.ctx, c.t, i, f)
	}
	return f, nil
}

// member appends a column's value before or after, where it is known.
func (c *RowChange) member(b []byte, i int, after bool) (out []byte, known bool, err error) {
	if row := c.row(after); row != nil {
		if row[i].State == StateUnknown {
			return b, false, nil
		}
		return c.t.member(b, i, &row[i]), true, nil
	}
	f, err := c.fragment(i, after)
	if err != nil || len(f) == 0 {
		return b, false, err
	}
	return memberRaw(b, c.t.keys[i], f), true, nil
}

// size tells how many bytes a column takes in an update's event, or that it is long.
func (c *RowChange) size(i int) int {
	n := c.off[i+1] - c.off[i]
	if isBig(c.frags[c.off[i]:c.off[i+1]]) {
		n += restBytes
	}
	return n + len(c.t.keys[i])
}

// typed gives what the rules make of a row change.
func typed(c *RowChange, rules *tableRules) ([]Part, error) {
	if rules.typer == nil {
		return nil, nil
	}
	parts, err := rules.typer(c)
	return parts[:min(len(parts), MaxParts)], err
}

// telling is one event of an update that is about to be made.
type telling struct {
	part    part
	columns []bool // nil: all that changed
	extra   []byte
}

// tell gives the events of an update. What no rule takes becomes …Updated. A key that changes comes first, as what follows is filed under it; columns that
// are no news go with the first event, or become …Touched.
func (s *scratch) tell(c *RowChange, rules *tableRules) ([]telling, error) {
	parts, err := typed(c, rules)
	if err != nil {
		return nil, err
	}
	list := s.tellings[:0]
	left, quiet := s.mask(0, c.Changed), true
	for i := range parts {
		p := &parts[i]
		columns := s.mask(i+1, c.Changed)
		for n := range columns {
			columns[n] = columns[n] && (p.Columns == nil && !rules.quiet[n] || p.Columns != nil && p.Columns[n])
			left[n] = left[n] && !columns[n]
		}
		list = append(list, telling{part: part{typ: p.Type}, columns: columns, extra: p.Extra})
	}
	any := false
	for n := range left {
		any = any || left[n]
		quiet = quiet && (!left[n] || rules.quiet[n])
	}
	switch {
	case len(list) == 0 && quiet:
		list = append(list, telling{part: rules.touched})
	case len(list) == 0:
		list = append(list, telling{part: rules.updated})
	case !any:
	case !quiet && anyOf(left, c.t.rel.Key):
		list = slices.Insert(list, 0, telling{part: rules.updated, columns: left})
	default:
		rest := rules.touched
		for n := range left {
			switch {
			case !left[n]:
			case !rules.quiet[n]:
				rest = rules.updated
			case !bytes.Contains(list[0].extra, c.t.keys[n]): // which may have an attribute of that name
				list[0].columns[n], left[n] = true, false
			}
		}
		if slices.Contains(left, true) {
			list = append(list, telling{part: rest, columns: left})
		}
	}
	s.tellings = list
	return list, nil
}

// mask gives scratch memory with a copy of flags.
func (s *scratch) mask(n int, flags []bool) []bool {
	for len(s.masks) <= n {
		s.masks = append(s.masks, nil)
	}
	s.masks[n] = append(s.masks[n][:0], flags...)
	return s.masks[n]
}

// update makes the events of an update. whole asks that they hold the whole row; otherwise they do where that is little. It tells how many events in a row do
// not, this update's included. What is long in c.frags is marked with the event that has it where that is not the last one.
func (w *Writer) update(c *RowChange, e *eventRow, whole bool) (chain int, err error) {
	t, s := c.t, &w.scratch
	if err := w.fileUnder(c, e); err != nil {
		return 0, err
	}
	links := e.also
	was, err := w.leaves(c, &e.filing)
	if err != nil {
		return 0, err
	}
	list, err := s.tell(c, e.rules)
	if err != nil {
		return 0, err
	}
	// Where a row goes to another key, or several may have its key for a while, the first event has all of it: what follows restates that.
	first := e.moved || t.deferrable && len(list) > 1
	for n := range list {
		p := &list[n]
		last := n == len(list)-1
		columns := p.columns
		if columns == nil {
			columns = c.Changed
		}
		e.number, e.part, e.extra, e.rest = n, p.part, p.extra, nil
		if first && n > 0 {
			e.moved, e.part.restates = false, true
		}
		if e.also = links; was != nil {
			e.also = append(slices.Clone(links), was.also...)
		}
		var unknown []byte
		var known bool
		s.data, s.before = append(s.data[:0], '{'), append(s.before[:0], '{')
		rest := 0
		for i := range columns {
			if columns[i] {
				if s.data, _, err = c.member(s.data, i, true); err != nil {
					return 0, err
				}
			} else if c.frags != nil {
				rest += c.size(i)
			}
			if columns[i] || first && n == 0 && c.Changed[i] {
				if s.before, known, err = c.member(s.before, i, false); err != nil {
					return 0, err
				}
				if !known {
					unknown = appendName(unknown, t.keys[i])
				}
			}
		}
		s.data, s.before = append(s.data, '}'), append(s.before, '}')
		e.data, e.before = s.data, s.before
		if first && n == 0 || last && !first && (whole || c.frags != nil && rest <= restBytes) {
			s.rest = append(s.rest[:0], '{')
			for i := range columns {
				if columns[i] {
					continue
				}
				if s.rest, known, err = c.member(s.rest, i, true); err != nil {
					return 0, err
				}
				if !known && !c.Changed[i] {
					unknown = appendName(unknown, t.keys[i])
				}
			}
			s.rest = append(s.rest, '}')
			e.rest = s.rest
		}
		e.meta = nil
		if unknown != nil {
			e.meta = metaUnknown(unknown)
		}
		if last {
			e.meta = c.mark(e.meta)
		}
		if was != nil {
			e.meta = withMember(e.meta, was.meta)
		}
		w.event(t, e)
		switch {
		case first && n == 0 && !last:
			c.keepPlace(nil)
		case !first && !last:
			c.keepPlace(columns)
		}
	}
	if first || e.rest != nil {
		return 0, nil
	}
	if c.st != nil {
		chain = c.st.chain()
	}
	return chain + len(list), nil
}

// keepPlace marks long values among what the last event told, nil: everything, with its position, for the cache.
func (c *RowChange) keepPlace(columns []bool) {
	if c.frags == nil {
		return
	}
	from, fromOff := c.kept, c.keptOff
	if fromOff == nil {
		from, fromOff = c.frags, c.off
	}
	long := func(i int) bool {
		return (columns == nil || columns[i]) && fromOff[i+1]-fromOff[i] > bigBytes
	}
	some := false
	for i := range c.t.rel.Columns {
		some = some || long(i)
	}
	if !some {
		return
	}
	var kept []byte
	off := []int{0}
	for i := range c.t.rel.Columns {
		if f := from[fromOff[i]:fromOff[i+1]]; long(i) {
			kept = appendBig(kept, f, c.w.pos)
		} else {
			kept = append(kept, f...)
		}
		off = append(off, len(kept))
	}
	c.kept, c.keptOff = kept, off
}

// delete makes the events of a delete: those of rules, and then the row's own.
func (w *Writer) delete(c *RowChange, e *eventRow) (err error) {
	t, s := c.t, &w.scratch
	if err := w.fileUnder(c, e); err != nil {
		return err
	}
	var parts []Part
	if !c.firstSeen {
		if parts, err = typed(c, e.rules); err != nil {
			return err
		}
	}
	for i := range parts {
		if err := w.restate(c, e, &parts[i], i); err != nil {
			return err
		}
	}
	e.number, e.part = len(parts), e.rules.deleted
	s.before = append(s.before[:0], '{')
	var unknown []byte
	for i := range t.rel.Columns {
		known := !c.firstSeen || c.old[i].State == StateText // of a row that the log does not know only its name came
		if known {
			if s.before, known, err = c.member(s.before, i, false); err != nil {
				return err
			}
		}
		if !known {
			unknown = appendName(unknown, t.keys[i])
		}
	}
	s.before = append(s.before, '}')
	e.before = s.before
	switch {
	case unknown != nil && c.firstSeen:
		e.meta = append(append([]byte(`{"first_seen":true,"unknown":[`), unknown...), "]}"...)
	case unknown != nil:
		e.meta = metaUnknown(unknown)
	}
	e.meta = c.mark(e.meta)
	w.event(t, e)
	return nil
}

// SetRules gives the rules by which the writer makes events of the next transaction on; nil: the default ones.
func (l *Log) SetRules(r Rules) { l.rules.Store(&r) }

// RulesInForce gives the version and the text of the rules that the log ends with; 1 and no text are those of no file.
func (l *Log) RulesInForce(ctx context.Context) (version int, text string, err error) {
	if err := l.dict.load(ctx); err != nil {
		return 0, "", err
	}
	version, text = l.dict.newestRules()
	return version, text, nil
}

// takeRules puts new rules into force, between two transactions. Where they are not those that the log ended with, they become a version of their own, with the
// position from which they hold.
func (w *Writer) takeRules() {
	next := w.log.rules.Load()
	if next == w.taken {
		return
	}
	w.rules, w.taken = *next, next
	text := ""
	if w.rules != nil {
		text = w.rules.Text()
	}
	d := w.log.dict
	id, stored := d.newestRules()
	if stored != text {
		w.nextIDs.rules++
		id = w.nextIDs.rules
		w.news = append(w.news, newRow{rulesTable, []any{id, text, int64(w.pos + 1)}})
		d.mu.Lock()
		d.rules[id] = text
		d.mu.Unlock()
	}
	w.rulesVersion = id
	for _, t := range w.tables {
		w.retype(t)
	}
}

// rulesOf gives the rules of a table that are in force; never nil.
func (w *Writer) rulesOf(r *Relation) *TableRules {
	if w.rules != nil {
		if t := w.rules.Table(r); t != nil {
			return t
		}
	}
	return &TableRules{}
}

// retype gives a table the rules that are in force, and the aggregates that it has by them.
func (w *Writer) retype(t *table) {
	from := w.rulesOf(t.rel)
	var name string
	if name, t.agg = w.aggregateOf(t.rel, from.Aggregate); t.agg == nil {
		t.agg = w.newAggregate(name, IDType(t.rel))
	}
	t.rules, t.kinds = rulesFor(t.rel, t.agg.name, &from.RowRules), map[kindKey]int32{}
	t.filings, t.chooser = nil, from.File
	t.links = nil
	for i := range from.Links {
		t.links = append(t.links, &tableRules{key: from.Links[i].Key, of: from.Links[i].Table, owner: w.aggregateOfTable(&from.Links[i], t)})
	}
	for i := range from.Filings {
		f := &from.Filings[i]
		r := rulesFor(t.rel, AggregateName(t.rel), &f.RowRules)
		r.key, r.of, r.owner = f.Key, f.Table, w.aggregateOfTable(f, t)
		t.filings = append(t.filings, r)
	}
}

// aggregateOfTable finds the aggregate of the entities that rows belong to: that which their table has, or will have.
func (w *Writer) aggregateOfTable(f *Filing, child *table) *aggregate {
	if r := w.log.dict.newestNamed(f.Table); r != nil {
		if _, a := w.aggregateOf(r, f.Aggregate); a != nil {
			return a
		}
	}
	if a := w.log.dict.aggregateNamed(f.Aggregate); a != nil {
		return a
	}
	typ := f.IDType
	if typ == "" { // as a reference has it
		key := *child.rel
		key.Key = f.Key
		typ = IDType(&key)
	}
	return w.newAggregate(f.Aggregate, typ)
}

// filing is under which entity the events of a row are.
type filing struct {
	rules     *tableRules // the row's
	owner     *aggregate  // nil: the row is its own
	ownerID   int64
	ownerText []byte
}

// file tells under which entity the row before or after a change is.
func (w *Writer) file(c *RowChange, after bool) (f filing, err error) {
	t, n := c.t, 0
	if f.rules = t.rules; len(t.filings) == 0 {
		return f, nil
	}
	if t.chooser != nil {
		if n, err = t.chooser(c, after); err != nil || n < 0 {
			return f, err
		}
	}
	of := t.filings[n]
	id, err := w.keyOf(c, of.key, after)
	if err != nil || id == nil {
		return f, err
	}
	number, text, ok := keyAs(of.owner.idType, id)
	if !ok {
		return f, nil
	}
	f.rules, f.owner, f.ownerID, f.ownerText = of, of.owner, number, text
	return f, nil
}

// keyAs gives a key of an aggregate's type: the number, or 64 bits of its hash and the text as Postgres prints it. Not ok: no entity has such a key, and the
// index of that type would refuse it.
func keyAs(idType string, id []byte) (number int64, text []byte, ok bool) {
	switch idType {
	case "bigint":
		number, ok = parseInt(id)
		return number, nil, ok
	case "uuid":
		u := uuidForm.FindSubmatch(id)
		if u == nil {
			return 0, nil, false
		}
		id = bytes.ToLower(bytes.Join(u[1:], []byte{'-'}))
	case "numeric":
		if !numericForm.Match(id) {
			return 0, nil, false
		}
	}
	return keyHash(id), id, true
}

var (
	uuidForm    = regexp.MustCompile(`(?i)^([0-9a-f]{8})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{12})$`)
	numericForm = regexp.MustCompile(`^-?[0-9]{1,1000}(\.[0-9]{1,1000})?$`)
)

// keyOf gives the key that some columns of the row before or after a change hold; nil: it is not known, or NULL.
func (w *Writer) keyOf(c *RowChange, columns []int, after bool) ([]byte, error) {
	row, order := make([]Value, len(columns)), make([]int, len(columns))
	for i, k := range columns {
		state, text, json, err := c.Value(k, after)
		if err != nil || state != StateText {
			return nil, err
		}
		if json {
			if text, _, err = AppendText(nil, &c.t.rel.Columns[k].Type, text); err != nil {
				return nil, err
			}
		}
		row[i], order[i] = Value{StateText, text}, i
	}
	return appendKey([]byte{}, order, row), nil
}

// links gives the further entities under which the events of a row change are found.
func (w *Writer) links(c *RowChange) (also []int64, err error) {
	for _, l := range c.t.links {
		for _, after := range []bool{false, true} {
			if after && c.Op == OpDelete || !after && c.Op != OpDelete && c.Op != OpUpdate {
				continue
			}
			id, err := w.keyOf(c, l.key, after)
			if err != nil {
				return nil, err
			}
			if id != nil {
				if _, text, ok := keyAs(l.owner.idType, id); !ok {
					continue
				} else if text != nil {
					id = text
				}
			}
			if h := linkHash(l.owner.id, string(id)); id != nil && !slices.Contains(also, h) {
				also = append(also, h)
			}
		}
	}
	return also, nil
}

// left is what tells of the entity that a row belonged to before.
type left struct {
	also []int64
	meta []byte
}

// leaves tells which entity a row leaves by an update; nil: none.
func (w *Writer) leaves(c *RowChange, now *filing) (*left, error) {
	t := c.t
	if len(t.filings) == 0 {
		return nil, nil
	}
	if t.chooser == nil && now.owner != nil && !anyOf(c.Changed, now.rules.key) {
		return nil, nil
	}
	return w.leavesFor(c, now)
}

// leavesFor does so for a row that may have gone to another one.
func (w *Writer) leavesFor(c *RowChange, now *filing) (*left, error) {
	was, err := w.file(c, false)
	if err != nil || was.owner == now.owner && was.ownerID == now.ownerID && string(was.ownerText) == string(now.ownerText) || was.owner == nil {
		return nil, err
	}
	id := string(was.ownerText)
	if was.ownerText == nil {
		id = itoa(was.ownerID)
	}
	return &left{[]int64{linkHash(was.owner.id, id)}, AppendString([]byte(`"moved_from":`), []byte(was.owner.name+"/"+id))}, nil
}

// linkHash is backstory.link_hash.
func linkHash(stream int32, id string) int64 { return keyHash([]byte(itoa(stream) + "/" + id)) }

// fileUnder files an event of a row change: under its entity, and where else it is found.
func (w *Writer) fileUnder(c *RowChange, e *eventRow) (err error) {
	if e.filing, err = w.file(c, c.Op != OpDelete); err == nil {
		e.also, err = w.links(c)
	}
	return err
}

// fileRow files an event that tells all that is known of a row, and says which of its table's default events it is.
func (w *Writer) fileRow(ctx context.Context, t *table, e *eventRow, as func(*tableRules) part) error {
	c := RowChange{Op: e.op, w: w, ctx: ctx, t: t, objects: [][]byte{e.data, e.rest}}
	switch e.op {
	case OpDelete:
		c.objects = [][]byte{e.before}
	case OpUpdate: // all that is known is what it is now
		c.Op = OpImport
	}
	err := w.fileUnder(&c, e)
	e.part = as(e.rules)
	return err
}

func asImported(r *tableRules) part { return r.imported }
func asHealed(r *tableRules) part   { return r.healed }
func asCreated(r *tableRules) part  { return r.created }

// newestRules gives the rules that the log ends with: 1 and no text are those of no file.
func (d *dictionary) newestRules() (id int, text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	id = 1
	for n, s := range d.rules {
		if n > id {
			id, text = n, s
		}
	}
	return id, text
}
