package eventlog

import (
	"context"
	"crypto/md5"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

// With REPLICA IDENTITY DEFAULT or USING INDEX the stream does not tell a row's values before. They are the last state of
// the row as the log knows it: from a cache of bounded size, or from the row's last event in the log, of which a batch asks
// for all that it needs in one query.

// stateKey names the row that has these identity values.
func (w *Writer) stateKey(t *table, row []Value) stateKey {
	k := stateKey{oid: t.rel.OID, byRow: t.byRow}
	id, text := w.rowIdentity(t, row)
	if text != nil {
		k.id, k.text, k.isText = keyHash(text), string(text), true
	} else {
		k.id = id
	}
	return k
}

// rowIdentity gives the values of the replica identity as a key.
func (w *Writer) rowIdentity(t *table, row []Value) (id int64, text []byte) {
	s := &w.scratch
	if len(t.identity) == 1 {
		c := t.identity[0]
		if ty := &t.rel.Columns[c].Type; ty.Kind == KindInt && !ty.Array {
			if n, ok := parseInt(row[c].Text); ok {
				return n, nil
			}
		}
	}
	s.rowKey = appendKey(s.rowKey[:0], t.identity, row)
	return 0, s.rowKey
}

// namesRow tells whether a row's state has its key: where a column of another key was added since the row's last change, with a default that is
// not constant, nobody knows yet what it is there.
func (t *table) namesRow(st rowState) bool {
	for _, c := range t.rel.Key {
		if len(st.frag(c)) == 0 {
			return false
		}
	}
	return true
}

// stateEntity gives the key of a row from its state, which names it.
func (w *Writer) stateEntity(ctx context.Context, t *table, st rowState) (id int64, text []byte, err error) {
	row := make([]Value, len(t.rel.Columns))
	for _, c := range t.rel.Key {
		if row[c], err = w.stateValue(ctx, t, st, c); err != nil {
			return 0, nil, err
		}
	}
	id, text, w.scratch.oldKey = w.entity(t, row, w.scratch.oldKey)
	return id, text, nil
}

// stateValue gives the value of a key's column from a row's state.
func (w *Writer) stateValue(ctx context.Context, t *table, st rowState, col int) (v Value, err error) {
	f := st.frag(col)
	if len(f) == 0 {
		return v, errNoKey
	}
	if isBig(f) {
		if f, err = w.load(ctx, t, col, f); err != nil {
			return v, err
		}
	}
	text, _, err := AppendText(nil, &t.rel.Columns[col].Type, f)
	return Value{StateText, text}, err
}

// appendContentKey gives the key of a row that has none: a digest of its content.
func appendContentKey(dst, object []byte) []byte {
	d := md5.Sum(object)
	return hex.AppendEncode(dst, d[:])
}

// keySet is a set of rows.
type keySet struct {
	numbers map[numberKey]bool
	texts   map[stateKey]bool
}

// add tells whether a row is new in the set.
func (s *keySet) add(k *stateKey) bool {
	if k.isText {
		if s.texts[*k] {
			return false
		}
		s.texts[*k] = true
		return true
	}
	n := k.number()
	if s.numbers[n] {
		return false
	}
	s.numbers[n] = true
	return true
}

func (s *keySet) clear() {
	if s.numbers == nil {
		s.numbers, s.texts = map[numberKey]bool{}, map[stateKey]bool{}
	}
	clear(s.numbers)
	clear(s.texts)
}

// prefetch asks the log, in one query, for the last states of all rows that a batch needs and the cache does not have.
func (w *Writer) prefetch(ctx context.Context, b *Batch) error {
	var wants [2][]stateKey // by key, by row
	versions := map[uint32]*Relation{}
	seen := &w.scratch.seen
	seen.clear()
	at := w.tx.lsn
	for i := range b.Items {
		it := &b.Items[i]
		if it.Kind == ItemBegin {
			at = it.CommitLSN
		}
		if it.Kind == ItemDefinition && at > w.commit {
			break // as with a shape that changes
		}
		if it.Kind != ItemChange || at <= w.commit {
			continue
		}
		r := it.Relation
		if v, ok := versions[r.OID]; ok && v != r {
			break // its shape changes in this batch: what is known now will not be what counts then
		} else if !ok {
			versions[r.OID] = r
		}
		if it.Op == OpTruncate || r.ReplicaIdentity == 'f' || r.InsertOnly {
			continue
		}
		t := w.known(r)
		if t == nil {
			break // a new shape is registered in its turn; from there on rows are looked up one by one
		}
		ident := it.New
		if it.Old != nil {
			ident = it.Old
		}
		k := w.stateKey(t, ident)
		fresh := seen.add(&k)
		if fresh && it.New != nil && it.Old != nil {
			now := w.stateKey(t, it.New)
			seen.add(&now) // the row will be known under its new key
		}
		if !fresh || it.Op == OpInsert || it.Op == OpImport {
			continue
		}
		if _, ok := w.state.get(&k); ok {
			continue
		}
		n := 0
		if k.byRow {
			n = 1
		}
		wants[n] = append(wants[n], k)
	}
	for n, keys := range wants {
		if len(keys) > 0 {
			if err := w.fetch(ctx, n == 1, keys); err != nil {
				return err
			}
		}
	}
	return nil
}

// lookup finds a row's last state, nil if the log has no such row, or may lack what happened to it since.
func (w *Writer) lookup(ctx context.Context, t *table, k *stateKey) (rowState, error) {
	if !t.rel.followed() {
		return nil, nil
	}
	s, ok := w.state.get(k)
	if !ok && t.rel.Doubted {
		return nil, nil // what is in the log may be from before changes that are missing
	}
	if !ok {
		if err := w.fetch(ctx, k.byRow, []stateKey{*k}); err != nil {
			return nil, err
		}
		s, _ = w.state.get(k)
	}
	if s.gone() {
		return nil, nil
	}
	if t := w.latest[k.oid]; s != nil && t != nil && !t.namesRow(s) {
		return nil, nil // a row without a name is as one that was never seen
	}
	return s, nil
}

// fetch reads the last states of rows from the log into the cache.
func (w *Writer) fetch(ctx context.Context, byRow bool, keys []stateKey) error {
	w.stats.Lookups.Add(int64(len(keys)))
	// Everything that the cache forgets has arrived; but it never had the rows of the baseline.
	if w.uncached > w.published.Load().Written {
		if err := w.flush(ctx, w.backlog, true); err != nil {
			return err
		}
		if err := w.join(ctx); err != nil {
			return err
		}
	}
	places := map[uint32][]place{}
	found := make([]building, len(keys))
	for i, k := range keys {
		list, ok := places[k.oid]
		if !ok {
			list = w.log.dict.places(k.oid, w.head.Incarnation, byRow)
			places[k.oid] = list
		}
		found[i] = building{t: w.latest[k.oid], last: 1<<63 - 1, places: list, cache: true}
	}
	if err := w.find(ctx, byRow, keys, found); err != nil {
		return err
	}
	for i := range keys {
		switch f := &found[i]; {
		case f.kept:
		case f.gone:
			w.state.putGone(&keys[i])
		case f.cols == nil:
			w.state.putAbsent(&keys[i])
		default:
			w.keep(&keys[i], f)
		}
	}
	return nil
}

// find puts the last states of rows together, in the places where they are to be looked for.
func (w *Writer) find(ctx context.Context, byRow bool, keys []stateKey, found []building) error {
	if err := w.indexAll(ctx); err != nil { // look-ups need the index; from now on it is kept row by row
		return err
	}
	// The last event of most rows holds all of the row; where it does not, a bounded number of earlier ones does.
	for n := 1; ; n = 4 * restChain {
		var open []int
		for i := range found {
			f := &found[i]
			if len(f.places) == 0 {
				f.done = true
			}
			if !f.done {
				open = append(open, i)
			}
		}
		if len(open) == 0 {
			break
		}
		for _, of := range byPlaces(found, open) {
			if err := w.fetchPage(ctx, byRow, keys, found, of, n); err != nil {
				return err
			}
		}
		for _, i := range open {
			f := &found[i]
			if f.rows < n { // that is all there is
				f.done = true
			}
			f.rows = 0
		}
	}
	return nil
}

// place is where events of a table are: the number of its aggregate, and the kinds of those that are the table's. A table
// that was renamed has several.
type place struct {
	stream int32
	kinds  []int32
	newest int32
}

// places tells where the events of a table are, newest first. Those of before a gap do not count, nor those of before and while
// only inserts of the table were published: what they say of a row may be wrong by now, until the table is complete again. Nor do,
// where rows are looked for by their key, those from when the table had another one: under the same number there is another row; nor, until all rows have been
// compared, those of before that, since the rows may have changed under the other key. The same is true of another replica identity, where they are looked for by that.
func (d *dictionary) places(oid uint32, incarnation int, byRow bool) []place {
	d.mu.Lock()
	defer d.mu.Unlock()
	inserts := d.barrier(oid)
	_, r := d.newestOf(oid)
	other := 0 // the newest version with another key that has events of rows
	if r != nil && !r.Complete && !byRow {
		for _, k := range d.kinds {
			if o := k.relation; o != nil && o.OID == oid && k.op != OpGap && k.op != OpNote && k.op != OpTruncate && !SameKeyColumns(o, r) {
				other = max(other, k.relationID)
			}
		}
	}
	return d.placesOf(oid, func(k *kind) bool {
		return k.relationID > other && (r != nil && r.Complete || k.source.incarnation == incarnation && k.relationID > inserts) && (r == nil || byRow && sameRow(k.relation, r) || !byRow && SameKeyColumns(k.relation, r))
	})
}

// allPlaces tells where all events of a table are.
func (d *dictionary) allPlaces(oid uint32) []place {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.placesOf(oid, func(*kind) bool { return true })
}

// placesOf does so for the kinds that count. d.mu is held.
func (d *dictionary) placesOf(oid uint32, counts func(*kind) bool) []place {
	var out []place
	for id, k := range d.kinds {
		if k.relation == nil || k.relation.OID != oid || k.op == OpGap || k.op == OpNote || k.op == OpTruncate || k.restates || !counts(k) {
			continue
		}
		i := slices.IndexFunc(out, func(p place) bool { return p.stream == k.aggregate.id })
		if i < 0 {
			i = len(out)
			out = append(out, place{stream: k.aggregate.id})
		}
		out[i].kinds, out[i].newest = append(out[i].kinds, id), max(out[i].newest, id)
	}
	slices.SortFunc(out, func(a, b place) int { return int(b.newest - a.newest) })
	return out
}

// barrier is the newest version of a table of which only inserts were published; 0: there is none. d.mu is held.
func (d *dictionary) barrier(oid uint32) (newest int) {
	for id, r := range d.relations {
		if r.OID == oid && r.InsertOnly {
			newest = max(newest, id)
		}
	}
	return newest
}

// building is a row state that is put together from events, newest first.
type building struct {
	t      *table
	places []place  // where to look
	cols   [][]byte // JSON form, or a big mark; nil where not known yet. nil altogether: there is no such row
	last   Position // of the oldest event seen
	rows   int      // that the last page gave
	chain  int
	done   bool
	cache  bool // it is for the cache
	kept   bool // it is in the cache already
	gone   bool // its last event is its end
}

// keep puts a state into the cache.
func (w *Writer) keep(k *stateKey, f *building) {
	w.scratch.state = f.append(w.scratch.state[:0])
	w.state.add(k, w.scratch.state)
	f.kept = true
}

// append appends the state.
func (f *building) append(b []byte) []byte {
	b = beginState(b, len(f.cols), f.chain)
	for i, c := range f.cols {
		b = append(b, c...)
		endColumn(b, 0, len(f.cols), i)
	}
	return b
}

// state gives the state; nil: there is no such row.
func (f *building) state() rowState {
	switch {
	case f.gone:
		return rowGone
	case f.cols == nil:
		return nil
	}
	return f.append(nil)
}

// byPlaces groups open rows by where they are looked for.
func byPlaces(found []building, open []int) map[*place][]int {
	out := map[*place][]int{}
	for _, i := range open {
		p := &found[i].places[0]
		out[p] = append(out[p], i)
	}
	return out
}

// fetchPage reads up to n events of each open row, newest first, below what has been seen of it. All are looked for in the same places.
func (w *Writer) fetchPage(ctx context.Context, byRow bool, keys []stateKey, found []building, open []int, n int) error {
	ids, texts, below := make([]int64, len(open)), make([]*string, len(open)), make([]int64, len(open))
	for j, i := range open {
		ids[j], below[j] = keys[i].id, int64(found[i].last)
		if keys[i].isText {
			texts[j] = &keys[i].text
		}
	}
	col, txt := "id", "id_text"
	if byRow {
		col, txt = "row_id", "row_text"
	}
	reads, err := w.reader(ctx)
	if err != nil {
		return err
	}
	args := []any{ids, texts, below, n}
	var each []string
	for _, p := range found[open[0]].places {
		each = append(each, fmt.Sprintf(`(SELECT e.position, e.kind, e.data, e.rest, e.old_id, e.meta FROM backstory.event e
			WHERE e.stream = $%d AND e.%s = k.id AND e.%s IS NOT DISTINCT FROM k.txt AND e.position < k.below AND e.kind = ANY ($%d::int4[])
			ORDER BY e.position DESC LIMIT $4)`, len(args)+1, col, txt, len(args)+2))
		args = append(args, p.stream, p.kinds)
	}
	from := each[0]
	if len(each) > 1 {
		from = "(SELECT * FROM (" + strings.Join(each, " UNION ALL ") + ") u ORDER BY u.position DESC LIMIT $4)"
	}
	rows, err := reads.Query(ctx, `SELECT k.i, e.position, e.kind, e.data, e.rest, e.old_id IS NULL AND coalesce(e.meta LIKE '%"unknown"%', false)
		FROM unnest($1::int8[], $2::text[], $3::int8[]) WITH ORDINALITY AS k(id, txt, below, i)
		CROSS JOIN LATERAL `+from+` e ORDER BY k.i, e.position DESC`, args...)
	if err != nil {
		return fmt.Errorf("look up the last state of rows: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		v := rows.RawValues()
		i := open[i64(v[0])-1]
		f, pos, kindID := &found[i], Position(i64(v[1])), i32(v[2])
		f.rows++
		f.last = pos
		if f.done {
			continue
		}
		k := w.log.dict.cached(kindID)
		if k == nil {
			return fmt.Errorf("the event log is damaged: an event refers to kind %d, which does not exist", kindID)
		}
		if k.op == OpDelete {
			f.done, f.gone = true, f.cols == nil
			continue
		}
		first := f.cols == nil
		if first { // which is all there is to most rows
			f.cols = append(w.scratch.cols[:0], make([][]byte, len(f.t.rel.Columns))...)
			w.scratch.cols = f.cols
		}
		from := w.columnsSince(f.t, k.relationID, k.relation)
		if err := f.add(v[3], pos, from); err != nil {
			return err
		}
		if err := f.add(v[4], pos, from); err != nil {
			return err
		}
		whole := v[4] != nil || k.op == OpInsert || k.op == OpImport
		if whole {
			for _, i := range from.added {
				if m := f.t.rel.Columns[i].Missing; f.cols[i] == nil && m != "" && len(m) <= bigBytes {
					f.cols[i] = []byte(m)
				}
			}
		}
		// What was not known of a row while the log was incomplete may be in an event of before, which counts again.
		lacks := v[5][0] != 0
		if f.done = whole && !(lacks && f.t.rel.Complete && !k.relation.Complete); !f.done {
			f.chain = min(f.chain+1, restChain)
			f.done = true
			for _, c := range f.cols {
				f.done = f.done && c != nil
			}
		}
		if first && f.done && f.cache {
			w.keep(&keys[i], f)
			continue
		}
		// What is known so far is needed longer than this row of the answer.
		cols := make([][]byte, len(f.cols))
		for j, c := range f.cols {
			if c != nil {
				cols[j] = append([]byte{}, c...)
			}
		}
		f.cols = cols
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("look up the last state of rows: %w", err)
	}
	return nil
}

// olderColumns tells what the columns of an older version of a table are by now.
type olderColumns struct {
	rel   *Relation
	now   []int // by column of the older version: the present column, -1 if it is gone
	added []int // present columns that it had not
}

// columnsSince tells which columns of a table are those of an older version. Where the number of one is not known, it has been there, by
// its name, in every version since.
func (w *Writer) columnsSince(t *table, version int, rel *Relation) *olderColumns {
	if o := t.since[version]; o != nil {
		return o
	}
	d := w.log.dict
	d.mu.Lock()
	defer d.mu.Unlock()
	o := &olderColumns{rel: rel}
	had := make([]bool, len(t.rel.Columns))
	for n := range rel.Columns {
		c := &rel.Columns[n]
		i := t.rel.column(c)
		if i >= 0 {
			had[i] = true
			if c.Num == 0 || t.rel.Columns[i].Num == 0 {
				for id, r := range d.relations {
					if r.OID == t.rel.OID && id > version && id < t.id && r.column(c) < 0 {
						i = -1
						break
					}
				}
			}
		}
		o.now = append(o.now, i)
	}
	for i := range had {
		if !had[i] {
			o.added = append(o.added, i)
		}
	}
	if t.since == nil {
		t.since = map[int]*olderColumns{}
	}
	t.since[version] = o
	return o
}

// add takes the columns that are not known yet, and are there now, from a JSON object of an event. They lie in it.
func (f *building) add(object []byte, at Position, from *olderColumns) error {
	if object == nil {
		return nil
	}
	next, columns := 0, from.rel.Columns
	return EachMember(object, func(name, value []byte) error {
		n := next // members come in the order of columns
		for n < len(columns) && columns[n].Name != string(name) {
			n++
		}
		if n == len(columns) {
			for n = 0; n < next && columns[n].Name != string(name); n++ {
			}
			if n == next {
				return nil
			}
		}
		next = n + 1
		i := from.now[n]
		if i < 0 || f.cols[i] != nil {
			return nil
		}
		if f.cols[i] = value; len(value) > bigBytes {
			f.cols[i] = appendBig(nil, value, at)
		}
		return nil
	})
}

// load reads a big value from the event that holds it.
func (w *Writer) load(ctx context.Context, t *table, col int, big []byte) ([]byte, error) {
	at := Position(binary.BigEndian.Uint64(big[1:]))
	if at > w.head.Written {
		if err := w.flush(ctx, 0, true); err != nil {
			return nil, err
		}
	}
	if err := w.indexAll(ctx); err != nil {
		return nil, err
	}
	db, err := w.db(ctx)
	if err != nil {
		return nil, err
	}
	var data, rest []byte
	var kind int32
	err = db.QueryRow(ctx, `SELECT data, rest, kind FROM backstory.event WHERE position = $1`, at).Scan(&data, &rest, &kind)
	if err != nil {
		return nil, fmt.Errorf("read a value of event %d: %w", at, err)
	}
	name := t.rel.Columns[col].Name // that it had there
	if k := w.log.dict.cached(kind); k != nil && k.relation != nil {
		if i := k.relation.column(&t.rel.Columns[col]); i >= 0 {
			name = k.relation.Columns[i].Name
		}
	}
	var found []byte
	for _, o := range [][]byte{data, rest} {
		if o == nil {
			continue
		}
		if err := EachMember(o, func(member, value []byte) error {
			if name == string(member) {
				found = append(found[:0:0], value...)
			}
			return nil
		}); err != nil {
			return nil, err
		}
	}
	if found == nil {
		return nil, fmt.Errorf("the event log is damaged: event %d does not hold %s of %s", at, t.rel.Columns[col].Name, t.rel)
	}
	return found, nil
}
