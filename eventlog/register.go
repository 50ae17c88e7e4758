package eventlog

import (
	"context"
	"fmt"
	"hash/fnv"
	"math"
	"slices"
)

// newRow is a row for one of the small tables, written and sealed with the events that use it first.
type newRow struct {
	table smallTable
	args  []any
}

// table is what the writer knows of one version of a table.
type table struct {
	rel        *Relation
	id         int
	rules      *tableRules
	filings    []*tableRules // of rows that belong to entities of other aggregates
	links      []*tableRules // further entities under which events are found: their aggregates and keys
	chooser    func(*RowChange, bool) (int, error)
	agg        *aggregate
	keys       [][]byte // `"name":` of each column
	identity   []int    // the columns by which the source names a row
	byRow      bool     // identity is not the key: state is looked up by row_id
	intKey     bool
	deferrable bool // its key is, or was once: the catalogue, which tells it, may be newer than the stream
	kinds      map[kindKey]int32
	seen       LSN                   // up to here it is known to have had this shape; 0: this writer has not seen it
	since      map[int]*olderColumns // see columnsSince
}

type kindKey struct {
	source   int
	owner    *aggregate
	op       Op
	typ      string
	quiet    bool
	restates bool
}

// setSource finds the source's number for a timeline, or gives it one.
func (w *Writer) setSource(timeline uint32) error {
	if w.cur != nil && w.cur.timeline == timeline {
		return nil
	}
	if s := w.sources[timeline]; s != nil {
		w.cur = s
		return nil
	}
	s, err := w.source(w.head.SystemID, w.head.Database, w.head.Incarnation, timeline)
	if err != nil {
		return err
	}
	w.sources[timeline], w.cur = s, s
	return nil
}

func (w *Writer) source(system, database string, incarnation int, timeline uint32) (*source, error) {
	d := w.log.dict
	d.mu.Lock()
	defer d.mu.Unlock()
	used := map[uint32]bool{}
	for _, s := range d.sources {
		if s.systemID == system && s.database == database && s.incarnation == incarnation && s.timeline == timeline {
			return s, nil
		}
		used[s.tag] = true
	}
	h := fnv.New64a()
	fmt.Fprintf(h, "%s/%s/%d/%d", system, database, incarnation, timeline)
	tag := uint32(h.Sum64() & 0xffffff)
	for used[tag] { // two lineages of one log never share a tag
		tag = (tag + 1) & 0xffffff
	}
	w.nextIDs.source++
	s := &source{id: w.nextIDs.source, systemID: system, database: database, incarnation: incarnation, timeline: timeline, tag: tag}
	w.news = append(w.news, newRow{sourceTable,
		[]any{s.id, system, database, incarnation, int64(timeline), int64(tag)}})
	d.sources[s.id] = s
	return s, nil
}

func newTable(r *Relation) *table {
	t := &table{rel: r, kinds: map[kindKey]int32{}, intKey: r.IntegerKey()}
	for i := range r.Columns {
		t.keys = append(t.keys, append(AppendString(nil, []byte(r.Columns[i].Name)), ':'))
	}
	return t
}

// tableFor finds what the writer knows of a relation, registering a new version of it in the schema history.
func (w *Writer) tableFor(ctx context.Context, r *Relation, at LSN) (*table, error) {
	if t := w.tables[r]; t != nil {
		if w.latest[r.OID] != t { // another description of it came in between
			if err := w.arrive(ctx); err != nil {
				return nil, err
			}
			w.state.clear()
			w.latest[r.OID] = t
		}
		return t, nil
	}
	if whole := w.actual(r); whole != r {
		t, err := w.tableFor(ctx, whole, at)
		if err == nil {
			w.tables[r] = t
		}
		return t, err
	}
	t := newTable(r)
	for i, c := range r.Columns {
		if c.Identity && r.ReplicaIdentity != 'f' {
			t.identity = append(t.identity, i)
		}
	}
	if t.byRow = r.byRow(); !t.byRow {
		t.identity = r.Key
	}
	d := w.log.dict
	newest, last := d.newestVersion(r.OID)
	if last != nil && last.SameShape(r) {
		t.id = newest
	}
	if last != nil && (t.id == 0 || r.Doubted) {
		// What the cache holds is in the shape, or under the identity, of before, or changes of since are missing; from now on it is looked up in the log.
		if err := w.arrive(ctx); err != nil {
			return nil, err
		}
		w.state.clear()
	}
	if t.id == 0 {
		w.nextIDs.relation++
		t.id = w.nextIDs.relation
		columns, generated, key, err := r.marshal()
		if err != nil {
			return nil, err
		}
		if w.cur == nil {
			if err := w.setSource(w.head.Timeline); err != nil {
				return nil, err
			}
		}
		p := relationPlace{source: w.cur.id, incarnation: w.cur.incarnation, after: w.heldUntil(r.OID), at: at}
		w.news = append(w.news, newRow{relationTable,
			[]any{t.id, r.OID, r.Schema, r.Name, r.RootOID, r.RootSchema, r.RootName, columns, key, r.Deferrable, generated, string(r.ReplicaIdentity), r.InsertOnly, r.Complete, r.Dropped, p.source, p.after.String(), p.at.String(), int64(w.pos + 1)}})
		d.mu.Lock()
		d.relations[t.id], d.began[t.id] = r, p
		d.mu.Unlock()
		if last != nil && r.Generation == math.MaxInt64 && !r.Complete && !r.InsertOnly {
			w.compareLater(r.OID)
		}
	}
	t.deferrable = r.Deferrable || d.wasDeferrable(r.OID)
	w.retype(t)
	if was := w.latest[r.OID]; was != nil && was.rel.SameDefinition(r) {
		t.seen = was.seen
	}
	w.tables[r], w.latest[r.OID] = t, t
	for _, o := range w.tables { // what belongs to its rows
		if o != t && slices.ContainsFunc(slices.Concat(o.filings, o.links), func(f *tableRules) bool { return f.of == r.String() }) {
			w.retype(o)
		}
	}
	return t, nil
}

// relationPlace tells where a version of a table began to hold.
type relationPlace struct {
	source, incarnation int // whose WAL the two are of
	after, at           LSN
}

// heldUntil tells up to where a table is known to have had the shape of before the one that is registered now: 0 if nobody knows.
func (w *Writer) heldUntil(oid uint32) LSN {
	if w.held != 0 {
		return w.held
	}
	if t := w.latest[oid]; t != nil && t.seen != 0 {
		return t.seen
	}
	// Where the newest version is in the log: unless that has the same shape as the one before, which then is seen where that one was last.
	versions, ids := w.log.dict.shapes(oid)
	if len(ids) == 0 {
		return 0
	}
	w.log.dict.mu.Lock()
	p := w.log.dict.began[ids[0]]
	w.log.dict.mu.Unlock()
	switch {
	case p.incarnation != w.head.Incarnation:
		return 0
	case len(ids) > 1 && versions[1].SameDefinition(versions[0]):
		return p.after
	}
	return p.at
}

// aggregateOf finds the aggregate that a table has already, nil if it has none, and its name.
func (w *Writer) aggregateOf(r *Relation, given string) (name string, a *aggregate) {
	return w.log.dict.aggregateOf(r, given, func(a *aggregate) bool { return w.ownedBy(a, r, given == a.name) })
}

// ownedBy tells whether an aggregate's events are those of a table of this name, and of no other one.
func (w *Writer) ownedBy(a *aggregate, r *Relation, byRules bool) bool {
	for _, t := range w.latest {
		if t.agg == a {
			return t.rel.String() == r.String()
		}
	}
	return w.log.dict.ownedBy(a, r, byRules)
}

// known finds what the writer knows of a relation without registering anything: nil if its shape is new.
func (w *Writer) known(r *Relation) *table {
	if t := w.tables[r]; t != nil && w.latest[r.OID] == t {
		return t
	}
	if _, last := w.log.dict.newestVersion(r.OID); last == nil || !last.SameShape(w.actual(r)) {
		return nil
	}
	if _, a := w.aggregateOf(r, w.rulesOf(r).Aggregate); a == nil {
		return nil
	}
	t, err := w.tableFor(context.Background(), r, 0) // asks the log for nothing, as it is all known
	if err != nil {
		return nil
	}
	return t
}

func (w *Writer) newAggregate(name, idType string) *aggregate {
	w.nextIDs.aggregate++
	a := &aggregate{id: int32(w.nextIDs.aggregate), name: name, idType: idType}
	w.news = append(w.news, newRow{aggregateTable, []any{int(a.id), a.name, a.idType}})
	d := w.log.dict
	d.mu.Lock()
	defer d.mu.Unlock()
	d.aggregates[a.id] = a
	return a
}

func sameColumns(a, b []int) bool {
	if len(a) != len(b) {
		return false
	}
	seen := map[int]bool{}
	for _, x := range a {
		seen[x] = true
	}
	for _, x := range b {
		if !seen[x] {
			return false
		}
	}
	return true
}

// kindOf finds the number for what an event shares with others, or gives it one.
func (w *Writer) kindOf(t *table, owner *aggregate, op Op, p part) int32 {
	key := kindKey{w.cur.id, owner, op, p.typ, p.quiet, p.restates}
	if id, ok := t.kinds[key]; ok {
		return id
	}
	d := w.log.dict
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, k := range d.kinds {
		if k.source == w.cur && k.relationID == t.id && k.aggregate == t.agg && k.op == op && k.typ == p.typ && k.quiet == p.quiet && k.restates == p.restates && k.owner == owner && k.rulesVersion == w.rulesVersion {
			t.kinds[key] = id
			return id
		}
	}
	w.nextIDs.kind++
	k := &kind{id: int32(w.nextIDs.kind), source: w.cur, relation: t.rel, relationID: t.id, aggregate: t.agg, owner: owner, typ: p.typ, op: op, quiet: p.quiet, restates: p.restates, rulesVersion: w.rulesVersion}
	var rel, of any
	if t.id != 0 {
		rel = t.id
	}
	if owner != nil {
		of = int(owner.id)
	}
	w.news = append(w.news, newRow{kindTable,
		[]any{k.id, k.source.id, rel, int(k.aggregate.id), of, k.typ, string(k.op), k.quiet, k.restates, k.rulesVersion}})
	d.kinds[k.id], t.kinds[key] = k, k.id
	return k.id
}

// noteTable is the table of events that no row change made.
func (w *Writer) noteTable(aggregateName string) *table {
	t := &table{kinds: map[kindKey]int32{}, agg: w.log.dict.aggregateNamed(aggregateName)}
	if t.agg == nil {
		t.agg = w.newAggregate(aggregateName, "text")
	}
	return t
}
