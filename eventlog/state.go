package eventlog

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
)

// With REPLICA IDENTITY DEFAULT or USING INDEX the stream does not tell a row's values before. They are the last state of
// the row as the log knows it: from a cache of bounded size, or from the row's last event in the log, of which a batch asks
// for all that it needs in one query.

// stateKey names a row: the table, and the number of its identity, with the identity's text where that is not the number
// itself. Not the aggregate: several tables may share one.
type stateKey struct {
	oid    uint32
	byRow  bool
	isText bool
	id     int64
	text   string
}

// bigBytes: longer values are not kept in the cache; it remembers where in the log they are.
const bigBytes = 1024

// rowState is the last known state of one row: the JSON form of each column; empty where it is not known.
type rowState struct {
	frags []byte
	ends  []uint32
	chain int // events since the last one that held the whole row
}

func (r *rowState) frag(i int) []byte {
	if i >= len(r.ends) {
		return nil
	}
	start := uint32(0)
	if i > 0 {
		start = r.ends[i-1]
	}
	return r.frags[start:r.ends[i]]
}

// A big value in the cache: a byte that begins no JSON, the position of the event that holds it, and a digest of it.
const bigMark, bigLen = 0x01, 1 + 8 + 16

func isBig(f []byte) bool { return len(f) == bigLen && f[0] == bigMark }

func appendBig(dst, value []byte, at Position) []byte {
	d := sha256.Sum256(value)
	dst = binary.BigEndian.AppendUint64(append(dst, bigMark), uint64(at))
	return append(dst, d[:16]...)
}

func sameAsBig(big, value []byte) bool {
	if len(value) <= bigBytes {
		return false
	}
	d := sha256.Sum256(value)
	return bytes.Equal(big[9:], d[:16])
}

// stateCache keeps row states in two generations: what is used moves to the young one, and when that has grown to half of
// the bound, the old one is dropped. Nothing is dropped while a batch is worked on.
type stateCache struct {
	half       int
	young, old map[stateKey]*rowState // a nil state: the log has no such row
	bytes      int                    // of the young generation
}

func newStateCache(maxBytes int) *stateCache {
	return &stateCache{half: maxBytes / 2, young: map[stateKey]*rowState{}, old: map[stateKey]*rowState{}}
}

func (c *stateCache) clear() {
	clear(c.young)
	clear(c.old)
	c.bytes = 0
}

func (c *stateCache) get(k stateKey) (*rowState, bool) {
	if s, ok := c.young[k]; ok {
		return s, true
	}
	s, ok := c.old[k]
	if ok {
		delete(c.old, k)
		c.add(k, s)
	}
	return s, ok
}

func (c *stateCache) add(k stateKey, s *rowState) {
	c.young[k] = s
	c.bytes += 120 + len(k.text)
	if s != nil {
		c.bytes += 80 + cap(s.frags) + 4*cap(s.ends)
	}
}

func (c *stateCache) putAbsent(k stateKey) { c.add(k, nil) }

// put keeps a row's state. The event at holds the values longer than bigBytes, except those that are big marks already.
func (c *stateCache) put(k stateKey, frags []byte, off []int, at Position, chain int) {
	s := &rowState{chain: chain, ends: make([]uint32, 0, len(off)-1)}
	for i := 0; i+1 < len(off); i++ {
		f := frags[off[i]:off[i+1]]
		if len(f) > bigBytes {
			s.frags = appendBig(s.frags, f, at)
		} else {
			if s.frags == nil {
				s.frags = make([]byte, 0, min(len(frags), 4*bigBytes))
			}
			s.frags = append(s.frags, f...)
		}
		s.ends = append(s.ends, uint32(len(s.frags)))
	}
	c.add(k, s)
}

// full tells that the cache has to forget something. What it forgets is looked up in the log, so it must be there first.
func (c *stateCache) full() bool { return c.bytes > c.half }

// evict brings the cache back below its bound.
func (c *stateCache) evict() { c.old, c.young, c.bytes = c.young, make(map[stateKey]*rowState), 0 }

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

// stateEntity gives the key of a row from its state.
func (w *Writer) stateEntity(ctx context.Context, t *table, st *rowState) (id int64, text []byte, err error) {
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
func (w *Writer) stateValue(ctx context.Context, t *table, st *rowState, col int) (v Value, err error) {
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

// prefetch asks the log, in one query, for the last states of all rows that a batch needs and the cache does not have.
func (w *Writer) prefetch(ctx context.Context, b *Batch) error {
	type want struct {
		t    *table
		keys []stateKey
	}
	wants := map[bool]*want{}
	versions := map[uint32]*Relation{}
	var seen map[stateKey]bool
	at := w.tx.lsn
	for i := range b.Items {
		it := &b.Items[i]
		if it.Kind == ItemBegin {
			at = it.CommitLSN
		}
		if it.Kind != ItemChange || at <= w.commit {
			continue
		}
		r := it.Relation
		if v, ok := versions[r.OID]; ok && v != r {
			break // its shape changes in this batch: what is known now will not be what counts then
		}
		versions[r.OID] = r
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
		if seen == nil {
			seen = map[stateKey]bool{}
		}
		if seen[k] {
			continue
		}
		seen[k] = true
		if it.New != nil && it.Old != nil {
			seen[w.stateKey(t, it.New)] = true // the row will be known under its new key
		}
		if it.Op == OpInsert || it.Op == OpImport {
			continue
		}
		if _, ok := w.state.get(k); ok {
			continue
		}
		x := wants[k.byRow]
		if x == nil {
			x = &want{t: t}
			wants[k.byRow] = x
		}
		x.keys = append(x.keys, k)
	}
	for byRow, x := range wants {
		if err := w.fetch(ctx, byRow, x.keys); err != nil {
			return err
		}
	}
	return nil
}

// lookup finds a row's last state, nil if the log has no such row.
func (w *Writer) lookup(ctx context.Context, t *table, k stateKey) (*rowState, error) {
	if s, ok := w.state.get(k); ok {
		return s, nil
	}
	if err := w.fetch(ctx, k.byRow, []stateKey{k}); err != nil {
		return nil, err
	}
	s, _ := w.state.get(k)
	return s, nil
}

// fetch reads the last states of rows from the log into the cache.
func (w *Writer) fetch(ctx context.Context, byRow bool, keys []stateKey) error {
	w.stats.Lookups.Add(int64(len(keys)))
	if err := w.indexAll(ctx); err != nil { // look-ups need the index; from now on it is kept row by row
		return err
	}
	places := map[uint32][]place{}
	found := make([]*building, len(keys))
	for i, k := range keys {
		if _, ok := places[k.oid]; !ok {
			places[k.oid] = w.log.dict.places(k.oid, w.head.Incarnation)
		}
		found[i] = &building{t: w.latest[k.oid], last: 1<<63 - 1, places: places[k.oid]}
	}
	// The last event of most rows holds all of the row; where it does not, a bounded number of earlier ones does.
	for n := 1; ; n = 4 * restChain {
		var open []int
		for i, f := range found {
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
		if err := w.fetchPage(ctx, byRow, keys, found, open, n); err != nil {
			return err
		}
		for _, i := range open {
			f := found[i]
			if f.rows < n { // that is all there is in this place
				f.places = f.places[1:]
			}
			f.rows = 0
		}
	}
	for i, k := range keys {
		if f := found[i]; f.cols == nil {
			w.state.putAbsent(k)
		} else {
			w.state.add(k, f.state())
		}
	}
	return nil
}

// place is where events of a table are: the number of its aggregate, and the kinds of those that are the table's, as an
// array literal. A table that was renamed has several.
type place struct {
	stream int32
	kinds  string
	newest int32
}

// places tells where the events of a table are, newest first. Those of before a gap do not count: what they say of a row
// may be wrong by now.
func (d *dictionary) places(oid uint32, incarnation int) []place {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []place
	for id, k := range d.kinds {
		if k.relation == nil || k.relation.OID != oid || k.source.incarnation != incarnation {
			continue
		}
		i := slices.IndexFunc(out, func(p place) bool { return p.stream == k.aggregate.id })
		if i < 0 {
			i = len(out)
			out = append(out, place{stream: k.aggregate.id, kinds: "{"})
		}
		if p := &out[i]; len(p.kinds) > 1 {
			p.kinds += "," + itoa(id)
		} else {
			p.kinds += itoa(id)
		}
		out[i].newest = max(out[i].newest, id)
	}
	for i := range out {
		out[i].kinds += "}"
	}
	slices.SortFunc(out, func(a, b place) int { return int(b.newest - a.newest) })
	return out
}

// building is a row state that is put together from events, newest first.
type building struct {
	t      *table
	places []place  // where to look, the first one first
	cols   [][]byte // JSON form, or a big mark; nil where not known yet. nil altogether: there is no such row
	last   Position // of the oldest event seen
	rows   int      // that the last page gave
	chain  int
	done   bool
}

func (f *building) state() *rowState {
	s := &rowState{chain: f.chain}
	for _, c := range f.cols {
		s.frags = append(s.frags, c...)
		s.ends = append(s.ends, uint32(len(s.frags)))
	}
	return s
}

// fetchPage reads up to n events of each open row, newest first, below what has been seen of it.
func (w *Writer) fetchPage(ctx context.Context, byRow bool, keys []stateKey, found []*building, open []int, n int) error {
	streams, ids, texts, below, kinds := make([]int32, len(open)), make([]int64, len(open)), make([]*string, len(open)), make([]int64, len(open)), make([]string, len(open))
	for j, i := range open {
		p := found[i].places[0]
		streams[j], ids[j], below[j], kinds[j] = p.stream, keys[i].id, int64(found[i].last), p.kinds
		if keys[i].isText {
			texts[j] = &keys[i].text
		}
	}
	col, txt := "id", "id_text"
	if byRow {
		col, txt = "row_id", "row_text"
	}
	db, err := w.db(ctx)
	if err != nil {
		return err
	}
	rows, err := db.Query(ctx, `SELECT k.i, e.position, e.kind, e.data, e.rest
		FROM unnest($1::int4[], $2::int8[], $3::text[], $4::int8[], $5::text[]) WITH ORDINALITY AS k(stream, id, txt, below, kinds, i)
		CROSS JOIN LATERAL (SELECT e.position, e.kind, e.data, e.rest FROM backstory.event e
			WHERE e.stream = k.stream AND e.`+col+` = k.id AND e.`+txt+` IS NOT DISTINCT FROM k.txt AND e.position < k.below AND e.kind = ANY (k.kinds::int4[])
			ORDER BY e.position DESC LIMIT $6) e ORDER BY k.i, e.position DESC`, streams, ids, texts, below, kinds, n)
	if err != nil {
		return fmt.Errorf("look up the last state of rows: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		v := rows.RawValues()
		f, pos, kindID := found[open[i64(v[0])-1]], Position(i64(v[1])), i32(v[2])
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
			f.done = true
			continue
		}
		if f.cols == nil {
			f.cols = make([][]byte, len(f.t.rel.Columns))
		}
		same := w.columnsSince(f.t, k.relationID)
		if err := f.add(v[3], pos, same); err != nil {
			return err
		}
		if err := f.add(v[4], pos, same); err != nil {
			return err
		}
		f.done = v[4] != nil || k.op == OpInsert || k.op == OpImport
		if !f.done {
			f.chain++
			f.done = true
			for _, c := range f.cols {
				f.done = f.done && c != nil
			}
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("look up the last state of rows: %w", err)
	}
	return nil
}

// columnsSince tells which columns of a table are those of an older version: they have been there, by their names, in every
// version since. A column that was dropped and added again is another one.
func (w *Writer) columnsSince(t *table, version int) []bool {
	if same := t.since[version]; same != nil {
		return same
	}
	d := w.log.dict
	d.mu.Lock()
	defer d.mu.Unlock()
	same := make([]bool, len(t.rel.Columns))
	for i := range same {
		same[i] = true
	}
	for id, r := range d.relations {
		if r.OID != t.rel.OID || id < version || id >= t.id {
			continue
		}
		has := map[string]bool{}
		for _, c := range r.Columns {
			has[c.Name] = true
		}
		for i := range same {
			same[i] = same[i] && has[t.rel.Columns[i].Name]
		}
	}
	if t.since == nil {
		t.since = map[int][]bool{}
	}
	t.since[version] = same
	return same
}

// add takes the columns that are not known yet, and are the same as now, from a JSON object of an event.
func (f *building) add(object []byte, at Position, same []bool) error {
	if object == nil {
		return nil
	}
	return EachMember(object, func(name, value []byte) error {
		for i := range f.t.rel.Columns {
			if f.cols[i] == nil && same[i] && f.t.rel.Columns[i].Name == string(name) {
				if len(value) > bigBytes {
					f.cols[i] = appendBig(nil, value, at)
				} else {
					f.cols[i] = append([]byte(nil), value...)
				}
				break
			}
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
	db, err := w.db(ctx)
	if err != nil {
		return nil, err
	}
	var data, rest []byte
	err = db.QueryRow(ctx, `SELECT data, rest FROM backstory.event WHERE position = $1`, at).Scan(&data, &rest)
	if err != nil {
		return nil, fmt.Errorf("read a value of event %d: %w", at, err)
	}
	var found []byte
	for _, o := range [][]byte{data, rest} {
		if o == nil {
			continue
		}
		if err := EachMember(o, func(name, value []byte) error {
			if t.rel.Columns[col].Name == string(name) {
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
