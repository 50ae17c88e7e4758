package eventlog

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/jackc/pgx/v5"
)

// source is a row of backstory.source.
type source struct {
	id                 int
	systemID, database string
	incarnation        int
	timeline           uint32
	tag                uint32
}

// aggregate is a row of backstory.aggregate.
type aggregate struct {
	id     int32
	name   string
	idType string
}

// kind is a row of backstory.kind: what an event shares with others.
type kind struct {
	id           int32
	source       *source
	relation     *Relation
	relationID   int
	aggregate    *aggregate
	owner        *aggregate // of the entity that rules file the event under; nil: the row is its own
	typ          string
	op           Op
	quiet        bool
	restates     bool
	rulesVersion int
}

// dictionary holds the small tables that events refer to by number. Their rows never change, so a copy never goes stale;
// it is only read again when a number is met that it does not have.
type dictionary struct {
	log *Log

	mu         sync.Mutex // guards the following
	sources    map[int]*source
	aggregates map[int32]*aggregate
	relations  map[int]*Relation
	kinds      map[int32]*kind
	rules      map[int]string // by version of the rules: what they were made of
	loaded     Position       // what events up to here refer to is in the copy
}

func newDictionary(l *Log) *dictionary {
	return &dictionary{log: l, sources: map[int]*source{}, aggregates: map[int32]*aggregate{}, relations: map[int]*Relation{}, kinds: map[int32]*kind{}, rules: map[int]string{}}
}

// reload forgets everything and reads what is in the database: a writer before may have left what was never committed, or
// was taken back.
func (d *dictionary) reload(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.sources)
	clear(d.aggregates)
	clear(d.relations)
	clear(d.kinds)
	clear(d.rules)
	d.loaded = 0
	return d.read(ctx)
}

// cached finds a kind by number among those already read, or nil.
func (d *dictionary) cached(id int32) *kind {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.kinds[id]
}

// kind finds a kind by number.
func (d *dictionary) kind(ctx context.Context, id int32) (*kind, error) {
	if k := d.cached(id); k != nil {
		return k, nil
	}
	if err := d.load(ctx); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if k := d.kinds[id]; k != nil {
		return k, nil
	}
	return nil, fmt.Errorf("the event log is damaged: an event refers to kind %d, which does not exist", id)
}

// aggregate finds an aggregate by number, or nil.
func (d *dictionary) aggregate(id int32) *aggregate {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.aggregates[id]
}

// aggregateNamed finds an aggregate by name, or nil.
func (d *dictionary) aggregateNamed(name string) *aggregate {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range d.aggregates {
		if a.name == name {
			return a
		}
	}
	return nil
}

// aggregateOf gives the name of a table's aggregate, and the aggregate if the table has it already: owned tells whether one is the table's, given is the name
// that rules have for it.
// A table whose key has got another type, so that its ids are no longer what they were, gets another one.
func (d *dictionary) aggregateOf(r *Relation, given string, owned func(*aggregate) bool) (name string, a *aggregate) {
	for n := 0; ; n++ {
		if name = aggregateName(r, given, n); name == sourceAggregate {
			continue
		}
		if a = d.aggregateNamed(name); a == nil || owned(a) && a.idType == IDType(r) {
			return name, a
		}
	}
}

// newestVersion finds the newest version of a table in the schema history, nil if there is none.
func (d *dictionary) newestVersion(oid uint32) (id int, r *Relation) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.newestOf(oid)
}

// newestOf does so with d.mu held.
func (d *dictionary) newestOf(oid uint32) (id int, r *Relation) {
	for n, o := range d.relations {
		if n > id && o.OID == oid {
			id, r = n, o
		}
	}
	return id, r
}

// wasDeferrable tells whether a table's key is DEFERRABLE in one of its versions.
func (d *dictionary) wasDeferrable(oid uint32) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range d.relations {
		if r.OID == oid && r.Deferrable {
			return true
		}
	}
	return false
}

// newest gives the newest version of each table, by its number in the schema history.
func (d *dictionary) newest() []*Relation {
	d.mu.Lock()
	defer d.mu.Unlock()
	last := map[uint32]int{}
	for n, r := range d.relations {
		last[r.OID] = max(last[r.OID], n)
	}
	var out []*Relation
	for _, n := range slices.Sorted(maps.Values(last)) {
		out = append(out, d.relations[n])
	}
	return out
}

// ownedBy tells whether all events of an aggregate are those of a table of this name. Notes and gaps are nobody's.
func (d *dictionary) ownedBy(a *aggregate, r *Relation) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, k := range d.kinds {
		if k.aggregate == a && (k.relation == nil || k.relation.String() != r.String()) {
			return false
		}
	}
	return true
}

// upTo makes sure that the copy has what events up to a position refer to.
func (d *dictionary) upTo(ctx context.Context, p Position) error {
	d.mu.Lock()
	known := p <= d.loaded
	d.mu.Unlock()
	if known {
		return nil
	}
	return d.load(ctx)
}

// load reads what is new in the small tables.
func (d *dictionary) load(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.read(ctx)
}

// read adds what is final. Rows that were written with a part of a transaction are not: they may go again, and their
// numbers be given to others.
func (d *dictionary) read(ctx context.Context) error {
	err := pgx.BeginTxFunc(ctx, d.log.pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly},
		func(tx pgx.Tx) error { return d.loadLocked(ctx, tx) })
	if err != nil {
		return fmt.Errorf("read the log's dictionary: %w", err)
	}
	return nil
}

func (d *dictionary) loadLocked(ctx context.Context, p pgx.Tx) error {
	var head Position // in the same snapshot; 0 before init has finished
	if err := p.QueryRow(ctx, `SELECT coalesce((SELECT position FROM backstory.head), 0)`).Scan(&head); err != nil {
		return err
	}
	rows, err := p.Query(ctx, `SELECT id, system_id, database, incarnation, timeline, tag FROM backstory.source WHERE NOT id = ANY($1) AND sealed_at <= (SELECT position FROM backstory.head)`, keys(d.sources))
	if err != nil {
		return err
	}
	for rows.Next() {
		s := &source{}
		var tl, tag int64
		if err := rows.Scan(&s.id, &s.systemID, &s.database, &s.incarnation, &tl, &tag); err != nil {
			return err
		}
		s.timeline, s.tag = uint32(tl), uint32(tag)
		d.sources[s.id] = s
	}
	if err := rows.Err(); err != nil {
		return err
	}
	rows, err = p.Query(ctx, `SELECT id, name, id_type FROM backstory.aggregate WHERE NOT id = ANY($1) AND sealed_at <= (SELECT position FROM backstory.head)`, keys(d.aggregates))
	if err != nil {
		return err
	}
	for rows.Next() {
		a := &aggregate{}
		if err := rows.Scan(&a.id, &a.name, &a.idType); err != nil {
			return err
		}
		d.aggregates[a.id] = a
	}
	if err := rows.Err(); err != nil {
		return err
	}
	rows, err = p.Query(ctx, `SELECT id, `+relationColumns+` FROM backstory.relation WHERE NOT id = ANY($1) AND sealed_at <= (SELECT position FROM backstory.head)`, keys(d.relations))
	if err != nil {
		return err
	}
	for rows.Next() {
		var id int
		var stored storedRelation
		if err := rows.Scan(append([]any{&id}, stored.scan()...)...); err != nil {
			return err
		}
		r, err := stored.relation()
		if err != nil {
			return fmt.Errorf("relation %d: %w", id, err)
		}
		d.relations[id] = r
	}
	if err := rows.Err(); err != nil {
		return err
	}
	rows, err = p.Query(ctx, `SELECT id, source, coalesce(relation, 0), aggregate, coalesce(owner, 0), type, op, quiet, restates, rules_version FROM backstory.kind WHERE NOT id = ANY($1) AND sealed_at <= (SELECT position FROM backstory.head)`, keys(d.kinds))
	if err != nil {
		return err
	}
	for rows.Next() {
		k := &kind{}
		var src int
		var agg, owner int32
		var op string
		if err := rows.Scan(&k.id, &src, &k.relationID, &agg, &owner, &k.typ, &op, &k.quiet, &k.restates, &k.rulesVersion); err != nil {
			return err
		}
		k.op, k.source, k.aggregate, k.relation = Op(op[0]), d.sources[src], d.aggregates[agg], d.relations[k.relationID]
		k.owner = d.aggregates[owner]
		d.kinds[k.id] = k
	}
	if err := rows.Err(); err != nil {
		return err
	}
	rows, err = p.Query(ctx, `SELECT id, text FROM backstory.rules WHERE NOT id = ANY($1) AND sealed_at <= (SELECT position FROM backstory.head)`, keys(d.rules))
	if err != nil {
		return err
	}
	for rows.Next() {
		var id int
		var text string
		if err := rows.Scan(&id, &text); err != nil {
			return err
		}
		d.rules[id] = text
	}
	if err := rows.Err(); err != nil {
		return err
	}
	d.loaded = head
	return nil
}

func keys[K comparable, V any](m map[K]V) []K {
	out := make([]K, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	return out
}

// Types gives all event types in the log, sorted.
func (l *Log) Types(ctx context.Context) ([]string, error) {
	if err := l.dict.load(ctx); err != nil {
		return nil, err
	}
	l.dict.mu.Lock()
	defer l.dict.mu.Unlock()
	var out []string
	for _, k := range l.dict.kinds {
		if !slices.Contains(out, k.typ) {
			out = append(out, k.typ)
		}
	}
	slices.Sort(out)
	return out, nil
}

// Aggregates gives the names of all aggregates in the log.
func (l *Log) Aggregates(ctx context.Context) ([]string, error) {
	if err := l.dict.load(ctx); err != nil {
		return nil, err
	}
	l.dict.mu.Lock()
	defer l.dict.mu.Unlock()
	var out []string
	for _, a := range l.dict.aggregates {
		out = append(out, a.name)
	}
	return out, nil
}

// RelationVersion is one version of a captured table in the schema history.
type RelationVersion struct {
	ID int
	*Relation
	AfterLSN, AtLSN LSN      // it holds from some point after AfterLSN, from AtLSN at the latest
	AtPosition      Position // events are of it from here on
}

// Relations gives the schema history, oldest first.
func (l *Log) Relations(ctx context.Context) ([]RelationVersion, error) {
	if err := l.dict.load(ctx); err != nil {
		return nil, err
	}
	rows, err := l.pool.Query(ctx, `SELECT id, (after_lsn - '0/0')::bigint, (at_lsn - '0/0')::bigint, at_position FROM backstory.relation ORDER BY id`)
	if err != nil {
		return nil, fmt.Errorf("read the schema history: %w", err)
	}
	defer rows.Close()
	var out []RelationVersion
	l.dict.mu.Lock()
	defer l.dict.mu.Unlock()
	for rows.Next() {
		var v RelationVersion
		var after, at int64
		if err := rows.Scan(&v.ID, &after, &at, &v.AtPosition); err != nil {
			return nil, fmt.Errorf("read the schema history: %w", err)
		}
		v.AfterLSN, v.AtLSN = LSN(after), LSN(at)
		if v.Relation = l.dict.relations[v.ID]; v.Relation != nil {
			out = append(out, v)
		}
	}
	return out, rows.Err()
}
