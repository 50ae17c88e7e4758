package eventlog

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// With REPLICA IDENTITY DEFAULT or USING INDEX the stream does not tell a row's values before. They are the last state of
// the row as the log knows it: from a cache of bounded size, or from the row's last event in the log, of which a batch asks
// for all that it needs in one query.

// stateKey names a row: the aggregate, and the number of its identity, with the identity's text where that is not the
// number itself.
type stateKey struct {
	stream int32
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

// put keeps a row's state. changedAt is the event that holds the values longer than bigBytes; whole tells that it holds the
// unchanged ones too.
func (c *stateCache) put(k stateKey, frags []byte, off []int, at Position, chain int, whole bool) {
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

// evict brings the cache back below its bound.
func (c *stateCache) evict() {
	if c.bytes > c.half {
		c.old, c.young, c.bytes = c.young, make(map[stateKey]*rowState), 0
	}
}

// stateKey names the row that has these identity values.
func (w *Writer) stateKey(t *table, row []Value) stateKey {
	k := stateKey{stream: t.agg.id, byRow: t.byRow}
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
func (w *Writer) stateEntity(t *table, st *rowState) (id int64, text []byte, err error) {
	row := make([]Value, len(t.rel.Columns))
	for _, c := range t.rel.Key {
		f := st.frag(c)
		if len(f) == 0 {
			return 0, nil, errNoKey
		}
		if isBig(f) {
			return 0, nil, fmt.Errorf("%s has a key of more than %d bytes", t.rel, bigBytes)
		}
		txt, _, err := AppendText(nil, &t.rel.Columns[c].Type, f)
		if err != nil {
			return 0, nil, err
		}
		row[c] = Value{StateText, txt}
	}
	id, text, w.scratch.oldKey = w.entity(t, row, w.scratch.oldKey)
	return id, text, nil
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
	var seen map[stateKey]bool
	at := w.tx.lsn
	for i := range b.Items {
		it := &b.Items[i]
		if it.Kind == ItemBegin {
			at = it.CommitLSN
		}
		if it.Kind != ItemChange || it.Op == OpTruncate || it.Relation.ReplicaIdentity == 'f' || it.Relation.InsertOnly || at <= w.commit {
			continue
		}
		t := w.known(it.Relation)
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
	for _, p := range w.parts {
		if !p.indexed { // look-ups need the index; from now on it is kept row by row
			if err := w.log.index(ctx, w.conn, p); err != nil {
				return err
			}
		}
	}
	col := "id"
	if byRow {
		col = "row_id"
	}
	found := make([]*building, len(keys))
	if err := w.fetchPage(ctx, col, keys, found, 1); err != nil {
		return err
	}
	// A row whose last event does not hold all of it: a bounded number of earlier events does.
	for {
		var more []stateKey
		var idx []int
		for i, f := range found {
			if f != nil && !f.done {
				more, idx = append(more, keys[i]), append(idx, i)
			}
		}
		if len(more) == 0 {
			break
		}
		sub := make([]*building, len(more))
		for j, i := range idx {
			sub[j] = found[i]
			sub[j].rows = 0
		}
		if err := w.fetchPage(ctx, col, more, sub, 4*restChain); err != nil {
			return err
		}
		for j := range sub {
			if sub[j].rows < 4*restChain {
				sub[j].done = true // that is all there is
			}
		}
	}
	for i, k := range keys {
		if f := found[i]; f == nil || f.gone {
			w.state.putAbsent(k)
		} else {
			w.state.add(k, f.state())
		}
	}
	return nil
}

// building is a row state that is put together from events, newest first.
type building struct {
	t     *table
	cols  [][]byte // JSON form, or a big mark; nil where not known yet
	last  Position // of the oldest event seen
	rows  int
	chain int
	done  bool
	gone  bool
}

func (f *building) state() *rowState {
	s := &rowState{chain: f.chain}
	for _, c := range f.cols {
		s.frags = append(s.frags, c...)
		s.ends = append(s.ends, uint32(len(s.frags)))
	}
	return s
}

// fetchPage reads up to n events of each row, newest first, below what has been seen of it.
func (w *Writer) fetchPage(ctx context.Context, col string, keys []stateKey, found []*building, n int) error {
	streams, ids, texts, below := make([]int32, len(keys)), make([]int64, len(keys)), make([]*string, len(keys)), make([]int64, len(keys))
	for i, k := range keys {
		streams[i], ids[i], below[i] = k.stream, k.id, 1<<62
		if k.isText {
			texts[i] = &keys[i].text
		}
		if found[i] != nil {
			below[i] = int64(found[i].last)
		}
	}
	txt := "id_text"
	if col == "row_id" {
		txt = "row_text"
	}
	rows, err := w.conn.Query(ctx, `SELECT k.i, e.position, e.kind, e.data, e.rest
		FROM unnest($1::int4[], $2::int8[], $3::text[], $4::int8[]) WITH ORDINALITY AS k(stream, id, txt, below, i)
		CROSS JOIN LATERAL (SELECT e.position, e.kind, e.data, e.rest FROM backstory.event e
			WHERE e.stream = k.stream AND e.`+col+` = k.id AND e.`+txt+` IS NOT DISTINCT FROM k.txt AND e.position < k.below
			ORDER BY e.position DESC LIMIT $5) e ORDER BY k.i, e.position DESC`, streams, ids, texts, below, n)
	if err != nil {
		return fmt.Errorf("look up the last state of rows: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		v := rows.RawValues()
		i, pos, kindID := int(i64(v[0]))-1, Position(i64(v[1])), i32(v[2])
		f := found[i]
		if f == nil {
			f = &building{}
			found[i] = f
		}
		f.rows++
		f.last = pos
		if f.done {
			continue
		}
		k := w.log.dict.cached(kindID)
		if k == nil {
			return fmt.Errorf("the event log is damaged: an event refers to kind %d, which does not exist", kindID)
		}
		if k.op == OpDelete && f.cols == nil {
			f.done, f.gone = true, true
			continue
		}
		if f.t == nil {
			if f.t = w.current(k); f.t == nil {
				f.done, f.gone = true, true
				continue
			}
			f.cols = make([][]byte, len(f.t.rel.Columns))
		}
		if err := f.add(v[3], pos); err != nil {
			return err
		}
		if err := f.add(v[4], pos); err != nil {
			return err
		}
		f.done = v[4] != nil || k.op == OpInsert || k.op == OpImport || k.op == OpDelete
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

// current finds the table, in its present shape, whose events a kind tells of.
func (w *Writer) current(k *kind) *table {
	if k.relation == nil {
		return nil
	}
	return w.latest[k.relation.OID]
}

// add takes the columns that are not known yet from a JSON object of an event.
func (f *building) add(object []byte, at Position) error {
	if object == nil {
		return nil
	}
	return EachMember(object, func(name, value []byte) error {
		for i := range f.t.rel.Columns {
			if f.cols[i] == nil && f.t.rel.Columns[i].Name == string(name) {
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
	var data, rest []byte
	err := w.conn.QueryRow(ctx, `SELECT data, rest FROM backstory.event WHERE position = $1`, at).Scan(&data, &rest)
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
