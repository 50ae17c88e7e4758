package eventlog

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Healing: where the log lacks changes of a table (after a gap, or while it was not captured) its last state may be outdated. It is
// compared with the source in the same chunks in which existing rows are taken over, at their places in the WAL, and only what differs
// becomes an event, …Healed. What the stream has told of a row since then stands above both. When all rows have been compared, those that
// the log has and the source does not are looked for by their keys, in chunks as well: at their place it is known that they are gone.
// Then the table is complete again, and everything that the log ever said of it counts.

// A table that was altered is compared in the same way, where the source may have given its rows other values without a row change: ALTER
// TABLE that rewrites it, a column added with a default that is not constant, another label of an enum type. All that the log has of
// its rows counts, then, except in these columns: each row is looked up, and what the chunk has of it is newer unless the
// row's last change is one that the chunk's snapshot does not see.

// So is one whose rows the stream names by another index than before. What the log has of a row it does not find by that, and so it can miss that the row
// was deleted or has another key by now; the comparison finds this out. Each row of which the log does not know that name becomes an event, even if
// it is as the log has it.

// Passes of a baseline.
const (
	PassShape = 0 // an empty chunk: from its place on, the table has another shape
	PassRows  = 1 // all rows of the table
	PassMoved = 2 // once more, for what rows lack that moved to another key meanwhile
	PassGone  = 3 // rows that the log has, and the source perhaps not
)

// Key is the key of a row as the log has it, and the texts of its columns.
type Key struct {
	ID      int64
	Text    *string // nil where the key is an integer
	Columns []string
}

// HasHistory tells whether the log holds events of a table from before a gap, or from before it was left out for a while: what it says of a
// row may be outdated then.
func (l *Log) HasHistory(ctx context.Context, oid uint32) (bool, error) {
	h, err := l.Head(ctx)
	if err != nil {
		return false, err
	}
	if err := l.dict.load(ctx); err != nil {
		return false, err
	}
	return l.dict.before(oid, h.Incarnation), nil
}

// Histories gives those of the captured tables that are not complete and have such a history.
func (l *Log) Histories(ctx context.Context, captured []Captured) (map[uint32]bool, error) {
	h, err := l.Head(ctx)
	if err != nil {
		return nil, err
	}
	if err := l.dict.load(ctx); err != nil {
		return nil, err
	}
	has := map[uint32]bool{}
	for _, c := range captured {
		if !c.Complete && l.dict.before(c.OID, h.Incarnation) {
			has[c.OID] = true
		}
	}
	return has, nil
}

// Lost tells whether the log may have rows of a table that the source does not have any more, and that cannot be found by the key that it has now.
func (l *Log) Lost(ctx context.Context, r *Relation) (bool, error) {
	h, err := l.Head(ctx)
	if err != nil {
		return false, err
	}
	if err := l.dict.load(ctx); err != nil {
		return false, err
	}
	return l.lost(r, h.Incarnation), nil
}

// lost does so: since a gap, since only inserts of the table were captured, or since the stream, which names its rows by an index, may have given them
// other keys without a word of those of before.
func (l *Log) lost(r *Relation, incarnation int) bool {
	missed := r.InsertOnly || r.byRow() || l.dict.before(r.OID, incarnation) && !l.dict.healed(r.OID, incarnation)
	return missed && len(r.Key) > 0 && !r.Dropped && !l.Healable(r)
}

// healed tells whether the log has had all rows of a table since the last gap, and since it was left out last.
func (d *dictionary) healed(oid uint32, incarnation int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	barrier := d.barrier(oid)
	for _, k := range d.kinds {
		if r := k.relation; r != nil && r.OID == oid && r.Complete && k.source.incarnation == incarnation && k.relationID > barrier {
			return true
		}
	}
	return false
}

// Healable tells whether a table's rows can be found in the log by the key it has now: the log has had all of them by that key, or none, and by no other
// one since.
func (l *Log) Healable(r *Relation) bool {
	d := l.dict
	d.mu.Lock()
	defer d.mu.Unlock()
	since := 0
	for id, o := range d.relations {
		if o.OID == r.OID && o.Complete && sameKey(o, r) {
			since = max(since, id)
		}
	}
	for _, k := range d.kinds {
		if k.relation != nil && k.relation.OID == r.OID && k.op == OpTruncate {
			since = max(since, k.relationID)
		}
	}
	for _, k := range d.kinds {
		if o := k.relation; o != nil && o.OID == r.OID && k.op != OpGap && k.op != OpNote && k.op != OpTruncate && !sameKey(o, r) && k.relationID >= since { // rows of after a TRUNCATE have its version, too
			return false
		}
	}
	return true
}

// Reshaped tells whether a table has another shape than the log knows.
func (l *Log) Reshaped(r *Relation) bool {
	_, last := l.dict.newestVersion(r.OID)
	return last != nil && !last.SameDefinition(r)
}

// discard makes the event by which the log's rows of a table do not count any more, since nobody can tell by its present key which of them are still there.
// All that the source has come after it.
func (w *Writer) discard(t *table) {
	w.tx.change++
	w.event(t, &eventRow{op: OpTruncate, part: part{typ: t.agg.name + "Discarded"}, text: []byte{}, data: []byte(`{"reason":"it had another key, by which the log knows its rows"}`)})
}

func sameKey(a, b *Relation) bool {
	return IDType(a) == IDType(b) && SameKeyColumns(a, b)
}

// SameKeyColumns tells whether two versions of a table have the same columns for their key, in the same order.
func SameKeyColumns(a, b *Relation) bool {
	if len(a.Key) != len(b.Key) {
		return false
	}
	for i := range a.Key {
		if !SameColumn(&a.Columns[a.Key[i]], &b.Columns[b.Key[i]]) {
			return false
		}
	}
	return true
}

// Keys gives keys under which the log has events of a table, in the order in which it has them indexed: up to limit of them after a
// place, which is the two texts that the call before returned, nil at the beginning.
// Of a table without a key, they are the contents of which the log may have too many rows.
func (l *Log) Keys(ctx context.Context, r *Relation, after []string, limit int) (keys []Key, next []string, err error) {
	if len(r.Key) == 0 {
		return l.surplus(ctx, r, after, limit)
	}
	if err := l.dict.load(ctx); err != nil {
		return nil, nil, err
	}
	var streams, kinds []int32
	for _, p := range l.dict.keyed(r) {
		streams, kinds = append(streams, p.stream), append(kinds, p.kinds...)
	}
	from := int64(-1 << 63)
	text := ""
	if len(after) == 2 {
		if from, err = strconv.ParseInt(after[0], 10, 64); err != nil {
			return nil, nil, fmt.Errorf("read the keys of %s: %w", r, err)
		}
		text = after[1]
	}
	rows, err := l.pool.Query(ctx, `SELECT id, id_text FROM backstory.event WHERE stream = ANY ($1) AND kind = ANY ($2) AND id >= $3 AND (id > $3 OR $6 OR coalesce(id_text, '') > $4 COLLATE "C")
		GROUP BY id, id_text ORDER BY id, coalesce(id_text, '') COLLATE "C" LIMIT $5`, streams, kinds, from, text, limit, len(after) != 2)
	if err != nil {
		return nil, nil, Remedy(fmt.Errorf("read the keys of %s: %w", r, err))
	}
	keys, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (k Key, err error) { return k, row.Scan(&k.ID, &k.Text) })
	if err != nil {
		return nil, nil, Remedy(fmt.Errorf("read the keys of %s: %w", r, err))
	}
	for i := range keys {
		switch k := &keys[i]; {
		case k.Text == nil:
			k.Columns = []string{strconv.FormatInt(k.ID, 10)}
		case len(r.Key) == 1:
			k.Columns = []string{*k.Text}
		default:
			k.Columns = splitKey(*k.Text)
		}
	}
	next = after
	if n := len(keys); n > 0 {
		next = []string{strconv.FormatInt(keys[n-1].ID, 10), ""}
		if t := keys[n-1].Text; t != nil {
			next[1] = *t
		}
	}
	return keys, next, nil
}

// splitKey is the reverse of appendKey for several columns.
func splitKey(s string) []string {
	var out []string
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		case s[i] == ',':
			out = append(out, b.String())
			b.Reset()
		default:
			b.WriteByte(s[i])
		}
	}
	return append(out, b.String())
}

// keyed tells where the events are of a table while it had the key that it has, of whatever type.
func (d *dictionary) keyed(r *Relation) []place {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.placesOf(r.OID, func(k *kind) bool { return SameKeyColumns(k.relation, r) })
}

// AddKey appends a key to a chunk of keys that the source does not have.
func (c *Chunk) AddKey(k *Key) {
	id := strconv.AppendInt(nil, k.ID, 10)
	if k.Text == nil {
		c.Add([][]byte{id, nil})
	} else {
		c.Add([][]byte{id, []byte(*k.Text)})
	}
}

// oldStates gives the last states that the log has of rows, whatever has been missed since: nil where it has none, or knows the row's end. Where every
// is set it gives the last events of all of them, too, and otherwise of those.
func (w *Writer) oldStates(ctx context.Context, t *table, keys []stateKey, every bool) ([]rowState, []lastEvent, error) {
	return w.statesIn(ctx, t, keys, every, w.log.dict.keyed(t.rel))
}

// statesIn does so by what is in some places.
func (w *Writer) statesIn(ctx context.Context, t *table, keys []stateKey, every bool, all []place) ([]rowState, []lastEvent, error) {
	found := make([]building, len(keys))
	for i := range found {
		found[i] = building{t: t, last: 1<<63 - 1, places: all}
	}
	if err := w.find(ctx, false, keys, found); err != nil {
		return nil, nil, err
	}
	out := make([]rowState, len(keys))
	var ask []int
	for i := range found {
		if st := found[i].state(); st != nil && !st.gone() {
			out[i] = st
		} else if !every {
			continue
		}
		ask = append(ask, i)
	}
	// It may have gone to another key, or with all the others.
	var some []stateKey
	for _, i := range ask {
		some = append(some, keys[i])
	}
	of, err := w.lastOf(ctx, some, all)
	if err != nil {
		return nil, nil, err
	}
	last := make([]lastEvent, len(keys))
	truncated, err := w.truncated(ctx, t.rel.OID)
	if err != nil {
		return nil, nil, err
	}
	for n, i := range ask {
		last[i] = of[n]
		l := &last[i]
		gone := l.old > l.id || l.id < truncated
		if gone && t.rel.Deferrable && l.id > truncated && out[i] != nil {
			stays, err := w.stays(ctx, &keys[i], l.old, all)
			if err != nil {
				return nil, nil, err
			}
			if gone = !stays; stays {
				l.old = 0
			}
		}
		if gone {
			out[i] = nil
		}
	}
	return out, last, nil
}

// stays tells whether there is a row under a key after the transaction of an event. Where the key is deferrable, a row may take it before the one that had
// it leaves: then the last event that names the key is of the row that has left.
func (w *Writer) stays(ctx context.Context, key *stateKey, at Position, places []place) (bool, error) {
	reads, err := w.reader(ctx)
	if err != nil {
		return false, err
	}
	var text *string
	if key.isText {
		text = &key.text
	}
	rows := 0
	for _, p := range places {
		var comes, deletes []int32
		for _, k := range p.kinds {
			switch w.log.dict.cached(k).op {
			case OpInsert, OpImport:
				comes = append(comes, k)
			case OpDelete:
				deletes = append(deletes, k)
			}
		}
		var n int
		err := reads.QueryRow(ctx, `WITH tx AS (SELECT xid, commit_lsn FROM backstory.event WHERE position = $1),
			named AS (SELECT e.position, e.xid = tx.xid AND e.commit_lsn = tx.commit_lsn AS inside,
				CASE WHEN e.old_id = $3 AND e.old_text IS NOT DISTINCT FROM $4 OR e.kind = ANY ($6::int4[]) THEN -1 WHEN e.old_id IS NOT NULL OR e.kind = ANY ($5::int4[]) THEN 1 ELSE 0 END AS n
				FROM backstory.event e, tx WHERE e.stream = $2 AND e.kind = ANY ($7::int4[]) AND (e.id = $3 AND e.id_text IS NOT DISTINCT FROM $4 OR e.old_id = $3 AND e.old_text IS NOT DISTINCT FROM $4))
			SELECT coalesce(sum(n) FILTER (WHERE inside), 0) + coalesce((SELECT greatest(n, 0) FROM named WHERE NOT inside AND n <> 0 AND position < $1 ORDER BY position DESC LIMIT 1), 0) FROM named`,
			at, p.stream, key.id, text, comes, deletes, p.kinds).Scan(&n)
		if err != nil {
			return false, fmt.Errorf("look whether a row has kept its key: %w", err)
		}
		rows += n
	}
	return rows > 0, nil
}

// truncated is the position of the last TRUNCATE of a table, 0 if there is none.
func (w *Writer) truncated(ctx context.Context, oid uint32) (Position, error) {
	var kinds []int32
	d := w.log.dict
	d.mu.Lock()
	for id, k := range d.kinds {
		if k.relation != nil && k.relation.OID == oid && k.op == OpTruncate {
			kinds = append(kinds, id)
		}
	}
	d.mu.Unlock()
	if len(kinds) == 0 {
		return 0, nil
	}
	reads, err := w.reader(ctx)
	if err != nil {
		return 0, err
	}
	var p Position
	// Such an event has the empty text for a key, which is indexed as any.
	err = reads.QueryRow(ctx, `SELECT coalesce(max(position), 0) FROM backstory.event WHERE id = backstory.key_hash('') AND id_text = '' AND kind = ANY ($1)`, kinds).Scan(&p)
	if err != nil {
		return 0, fmt.Errorf("look for the last TRUNCATE: %w", err)
	}
	return p, nil
}

// entityKey names a row by the entity that it is.
func (w *Writer) entityKey(t *table, id int64, text []byte) stateKey {
	if text != nil {
		return stateKey{oid: t.rel.OID, id: keyHash(text), text: string(text), isText: true}
	}
	return stateKey{oid: t.rel.OID, id: id}
}

// named tells whether the last event of a row names it as the source does now.
func (w *Writer) named(t *table, l *lastEvent, row []Value) bool {
	if !t.byRow {
		return true
	}
	k := w.stateKey(t, row)
	return l.hasRow && sameRow(w.log.dict.cached(l.kind).relation, t.rel) && (l.rowText != nil) == k.isText && (k.isText && *l.rowText == k.text || !k.isText && l.rowID == k.id)
}

// compare gives the old states of some of a chunk's rows, by their number; and those that the log does not find by what the source names them by.
func (w *Writer) compare(ctx context.Context, t *table, c *Chunk, which func(int) bool) (out map[int]rowState, nameless map[int]bool, err error) {
	row := make([]Value, len(t.rel.Columns))
	var keys []stateKey
	var numbers []int
	data := c.data
	for i := range c.Rows {
		data = c.next(data, row)
		if !which(i) {
			continue
		}
		id, text, buf := w.entity(t, row, w.scratch.key)
		w.scratch.key = buf
		keys, numbers = append(keys, w.entityKey(t, id, text)), append(numbers, i)
	}
	states, last, err := w.oldStates(ctx, t, keys, false)
	if err != nil {
		return nil, nil, err
	}
	out, nameless = map[int]rowState{}, map[int]bool{}
	data = c.data
	j := 0
	for i := range c.Rows {
		data = c.next(data, row)
		if j == len(numbers) || numbers[j] != i {
			continue
		}
		if states[j] != nil {
			out[i], nameless[i] = states[j], !w.named(t, &last[j], row)
		}
		j++
	}
	return out, nameless, nil
}

// compareAll judges all rows of a chunk of a table that was altered: those that yield, as nil, and the states of the others, by their number.
// Where a row yields of which the stream need not have told everything since, another pass has to follow. nameless are those that the log does not find
// by what the source names them by.
func (w *Writer) compareAll(ctx context.Context, t *table, c *Chunk, b *Baseline) (yield, old map[int]rowState, nameless map[int]bool, err error) {
	if c.Rows == 0 {
		return nil, nil, nil, nil
	}
	row := make([]Value, len(t.rel.Columns))
	var keys, names []stateKey
	data := c.data
	for range c.Rows {
		data = c.next(data, row)
		id, text, buf := w.entity(t, row, w.scratch.key)
		w.scratch.key = buf
		keys = append(keys, w.entityKey(t, id, text))
		if t.byRow {
			names = append(names, w.stateKey(t, row))
		}
	}
	if err := w.arrive(ctx); err != nil {
		return nil, nil, nil, err
	}
	states, last, err := w.oldStates(ctx, t, keys, true)
	if err != nil {
		return nil, nil, nil, err
	}
	moved, err := w.movedByName(ctx, t, keys, names, c, b)
	if err != nil {
		return nil, nil, nil, err
	}
	yield, old, nameless = map[int]rowState{}, map[int]rowState{}, map[int]bool{}
	data = c.data
	for i, st := range states {
		data = c.next(data, row)
		if !unseen(&last[i], c, b) {
			if moved[i] { // the log did not know it by its name, and has it under both keys until those that are gone are looked for
				yield[i], b.again = nil, true
			} else if st != nil {
				old[i], nameless[i] = st, !w.named(t, &last[i], row)
			}
			continue
		}
		yield[i] = nil
		if st == nil || t.rel.ReplicaIdentity == 'f' {
			continue
		}
		var told map[string]bool
		for n := range row {
			// It may have been left out of the change as unchanged TOAST, and not be what it was before the table was altered. Where it is as
			// the chunk has it, it is right.
			s := &w.scratch
			f := st.frag(n)
			s.frags = t.fragment(n, &row[n], s.frags[:0])
			if len(f) > 0 && (!isBig(f) && len(f) <= minToast || bytes.Equal(f, s.frags) || isBig(f) && sameAsBig(f, s.frags)) {
				continue
			}
			if told == nil {
				if told, err = w.toldOf(ctx, t, &keys[i], c, b); err != nil {
					return nil, nil, nil, err
				}
			}
			b.again = b.again || !told[t.rel.Columns[n].Name]
		}
	}
	return yield, old, nameless, nil
}

// movedByName tells which rows of a chunk the stream has told of under another key since, by what it names them by: that of a change that the chunk's
// snapshot does not see.
func (w *Writer) movedByName(ctx context.Context, t *table, keys, names []stateKey, c *Chunk, b *Baseline) (map[int]bool, error) {
	moved := map[int]bool{}
	if len(names) == 0 {
		return moved, nil
	}
	reads, err := w.reader(ctx)
	if err != nil {
		return nil, err
	}
	ids, texts := make([]int64, len(names)), make([]*string, len(names))
	for i := range names {
		if ids[i] = names[i].id; names[i].isText {
			texts[i] = &names[i].text
		}
	}
	for _, p := range w.log.dict.places(t.rel.OID, w.head.Incarnation, true) {
		rows, err := reads.Query(ctx, `SELECT k.i, e.id, e.id_text, e.xid FROM unnest($1::int8[], $2::text[]) WITH ORDINALITY AS k(id, txt, i)
			CROSS JOIN LATERAL (SELECT e.position, e.id, e.id_text, e.xid FROM backstory.event e WHERE e.stream = $3 AND e.row_id = k.id AND e.row_text IS NOT DISTINCT FROM k.txt
				AND e.kind = ANY ($4::int4[]) ORDER BY e.position DESC LIMIT 1) e WHERE e.position > $5`, ids, texts, p.stream, p.kinds, b.Began)
		if err != nil {
			return nil, fmt.Errorf("look for the last events of rows: %w", err)
		}
		var i, id, xid int64
		var text *string
		if _, err := pgx.ForEachRow(rows, []any{&i, &id, &text, &xid}, func() error {
			k := &keys[i-1]
			if !Sees(c.Snapshot, uint32(xid)) && (id != k.id || (text != nil) != k.isText || k.isText && *text != k.text) {
				moved[int(i-1)] = true
			}
			return nil
		}); err != nil {
			return nil, fmt.Errorf("look for the last events of rows: %w", err)
		}
	}
	return moved, nil
}

// toldOf gives the columns that the changes of a row set which a chunk's snapshot does not see.
func (w *Writer) toldOf(ctx context.Context, t *table, k *stateKey, c *Chunk, b *Baseline) (map[string]bool, error) {
	reads, err := w.reader(ctx)
	if err != nil {
		return nil, err
	}
	var text *string
	if k.isText {
		text = &k.text
	}
	rows, err := reads.Query(ctx, `SELECT xid, data FROM backstory.event WHERE stream = $1 AND id = $2 AND id_text IS NOT DISTINCT FROM $3 AND position > $4 AND data IS NOT NULL ORDER BY position DESC LIMIT 100`,
		t.agg.id, k.id, text, b.Began)
	if err != nil {
		return nil, fmt.Errorf("look for the last changes of a row: %w", err)
	}
	told := map[string]bool{}
	var xid int64
	var data string
	_, err = pgx.ForEachRow(rows, []any{&xid, &data}, func() error {
		if Sees(c.Snapshot, uint32(xid)) {
			return nil
		}
		return EachMember([]byte(data), func(name, _ []byte) error { told[string(name)] = true; return nil })
	})
	if err != nil {
		return nil, fmt.Errorf("look for the last changes of a row: %w", err)
	}
	return told, nil
}

// unseen tells whether the last change of a row is one that a chunk's snapshot does not see. Those of before the comparison began it sees all.
func unseen(l *lastEvent, c *Chunk, b *Baseline) bool {
	at, xid := l.id, l.xid
	if l.old > at {
		at, xid = l.old, l.oldXID
	}
	return at > b.Began && !Sees(c.Snapshot, uint32(xid))
}

// minToast is the shortest value that Postgres stores out of line (toast_tuple_target is 128 bytes at least, for the whole row).
const minToast = 32

// nameless tells whether rows may hold values of a column whose number nobody knew, and which has another name by now.
func nameless(before []*Relation, now *Relation) bool {
	for _, r := range before {
		for i := range r.Columns {
			if c := &r.Columns[i]; c.Num == 0 && now.column(c) < 0 {
				return true
			}
		}
	}
	return false
}

// heal makes the event of a row that is not as the log has it, or that is nameless; st is nil if the log does not have it.
func (w *Writer) heal(ctx context.Context, t *table, row []Value, st rowState, nameless bool) error {
	if st == nil {
		return w.insert(ctx, t, &Item{Op: OpImport, New: row}, OpImport, asHealed)
	}
	s := &w.scratch
	s.frags, s.off = s.frags[:0], append(s.off[:0], 0)
	s.data, s.before, s.rest = append(s.data[:0], '{'), append(s.before[:0], '{'), append(s.rest[:0], '{')
	any := false
	for i := range row {
		start := len(s.frags)
		s.frags = t.fragment(i, &row[i], s.frags)
		s.off = append(s.off, len(s.frags))
		n, o := s.frags[start:], st.frag(i)
		if isBig(o) && sameAsBig(o, n) || bytes.Equal(n, o) {
			s.rest = memberRaw(s.rest, t.keys[i], n)
			continue
		}
		any = true
		s.data = memberRaw(s.data, t.keys[i], n)
		if isBig(o) {
			var err error
			if o, err = w.load(ctx, t, i, o); err != nil {
				return err
			}
		}
		if len(o) > 0 {
			s.before = memberRaw(s.before, t.keys[i], o)
		}
	}
	if !any && !nameless {
		return nil
	}
	e := eventRow{op: OpUpdate, data: append(s.data, '}'), before: append(s.before, '}'), rest: append(s.rest, '}')}
	if err := w.fileRow(ctx, t, &e, asHealed); err != nil {
		return err
	}
	s.data, s.before, s.rest = e.data, e.before, e.rest
	was := RowChange{Op: OpUpdate, w: w, ctx: ctx, t: t, objects: [][]byte{e.before, e.rest}}
	if gone, err := w.leavesFor(&was, &e.filing); err != nil {
		return err
	} else if gone != nil {
		e.also, e.meta = append(e.also, gone.also...), withMember(e.meta, gone.meta)
	}
	e.id, e.text, s.key = w.entity(t, row, s.key)
	if t.byRow {
		e.hasRow = true
		e.rowID, e.rowText = w.rowIdentity(t, row)
	}
	w.event(t, &e)
	if t.rel.ReplicaIdentity != 'f' && !t.rel.InsertOnly {
		key := w.stateKey(t, row)
		if !w.state.has(&key) {
			w.uncached = w.pos
		} else {
			w.state.put(&key, s.frags, s.off, w.pos, 0)
		}
	}
	return nil
}

// goneRows makes the events of rows that the source does not have, by their keys.
func (w *Writer) goneRows(ctx context.Context, t *table, c *Chunk, b *Baseline) error {
	pair := make([]Value, 2)
	var keys, asked []stateKey
	data := c.data
	for range c.Rows {
		data = c.next(data, pair)
		id, ok := parseInt(pair[0].Text)
		if !ok {
			return errNoKey
		}
		k := stateKey{oid: t.rel.OID, id: id}
		if pair[1].State == StateText {
			k.isText, k.text = true, string(pair[1].Text)
		}
		keys = append(keys, k)
		if !b.Heal && w.touched.has(k.oid, k.id) {
			asked = append(asked, k)
		}
	}
	if err := w.arrive(ctx); err != nil {
		return err
	}
	// What the stream has told of a row since stands above this.
	told := map[stateKey]bool{}
	last, err := w.lastOf(ctx, asked, w.log.dict.events(t.rel.OID, w.head.Incarnation))
	if err != nil {
		return err
	}
	for i, l := range last {
		told[asked[i]] = l.id > 0 || l.old > 0
	}
	states, ends, err := w.oldStates(ctx, t, keys, b.Heal)
	if err != nil {
		return err
	}
	var gone []stateKey
	for i, st := range states {
		if b.Heal && unseen(&ends[i], c, b) {
			told[keys[i]] = true
		}
		w.tx.change++
		if st == nil || told[keys[i]] {
			continue
		}
		gone = append(gone, keys[i])
		e := eventRow{op: OpDelete}
		if e.before, e.meta, err = w.wholeRow(ctx, t, st); err != nil {
			return err
		}
		if err := w.healed(ctx, t, &keys[i], &e); err != nil {
			return err
		}
	}
	return w.elsewhere(ctx, t, gone)
}

// wholeRow gives all that is known of a row, and metadata that tell what is not; nil if nothing is missing.
func (w *Writer) wholeRow(ctx context.Context, t *table, st rowState) (row, meta []byte, err error) {
	s := &w.scratch
	s.before = append(s.before[:0], '{')
	var unknown []byte
	for i := range t.rel.Columns {
		f := st.frag(i)
		if isBig(f) {
			if f, err = w.load(ctx, t, i, f); err != nil {
				return nil, nil, err
			}
		}
		if len(f) == 0 {
			unknown = appendName(unknown, t.keys[i])
			continue
		}
		s.before = memberRaw(s.before, t.keys[i], f)
	}
	s.before = append(s.before, '}')
	if unknown != nil {
		meta = metaUnknown(unknown)
	}
	return s.before, meta, nil
}

// healed makes an event of a row.
func (w *Writer) healed(ctx context.Context, t *table, k *stateKey, e *eventRow) error {
	if err := w.fileRow(ctx, t, e, asHealed); err != nil {
		return err
	}
	if e.id = k.id; k.isText {
		e.text = []byte(k.text)
	}
	w.event(t, e)
	return w.relieve(ctx)
}

// elsewhere tells once more of the rows that other partitions have under keys of rows that are gone from this one: they may have moved there while nobody
// looked, and have been told of already, but the last event of an entity has to tell that it is there.
func (w *Writer) elsewhere(ctx context.Context, t *table, gone []stateKey) error {
	if t.rel.RootName == "" || len(gone) == 0 {
		return nil
	}
	var others []int32 // kinds of events of rows: notes have the empty text for a key, which a row may have, too
	d := w.log.dict
	d.mu.Lock()
	for id, k := range d.kinds {
		if k.aggregate == t.agg && k.relation != nil && k.relation.OID != t.rel.OID && k.op.OfRow() {
			others = append(others, id)
		}
	}
	d.mu.Unlock()
	if len(others) == 0 {
		return nil
	}
	reads, err := w.reader(ctx)
	if err != nil {
		return err
	}
	ids, texts := make([]int64, len(gone)), make([]*string, len(gone))
	for i := range gone {
		if ids[i] = gone[i].id; gone[i].isText {
			texts[i] = &gone[i].text
		}
	}
	rows, err := reads.Query(ctx, `SELECT k.i, e.kind FROM unnest($1::int8[], $2::text[]) WITH ORDINALITY AS k(id, txt, i)
		CROSS JOIN LATERAL (SELECT e.kind FROM backstory.event e WHERE e.stream = $3 AND e.id = k.id AND e.id_text IS NOT DISTINCT FROM k.txt AND e.kind = ANY ($4::int4[]) ORDER BY e.position DESC LIMIT 1) e ORDER BY k.i`,
		ids, texts, t.agg.id, others)
	if err != nil {
		return fmt.Errorf("look for rows in other partitions: %w", err)
	}
	there := map[*Relation][]stateKey{}
	var order []*Relation
	var i int64
	var kind int32
	if _, err := pgx.ForEachRow(rows, []any{&i, &kind}, func() error {
		k := w.log.dict.cached(kind)
		if k.op == OpDelete {
			return nil
		}
		_, r := w.log.dict.newestVersion(k.relation.OID)
		if r.RootSchema != t.rel.RootSchema || r.RootName != t.rel.RootName || r.Dropped {
			return nil
		}
		if there[r] == nil {
			order = append(order, r)
		}
		key := gone[i-1]
		key.oid = r.OID
		there[r] = append(there[r], key)
		return nil
	}); err != nil {
		return fmt.Errorf("look for rows in other partitions: %w", err)
	}
	for _, r := range order {
		o, keys := w.latest[r.OID], there[r]
		if o == nil {
			if o, err = w.tableFor(ctx, r, w.tx.lsn); err != nil {
				return err
			}
		}
		states, _, err := w.statesIn(ctx, o, keys, false, w.log.dict.events(r.OID, w.head.Incarnation))
		if err != nil {
			return err
		}
		for i, st := range states {
			if w.tx.change++; st == nil {
				continue
			}
			e := eventRow{op: OpImport}
			if e.data, e.meta, err = w.wholeRow(ctx, o, st); err != nil {
				return err
			}
			if o.byRow {
				row := make([]Value, len(r.Columns))
				for _, c := range o.identity {
					if row[c], err = w.stateValue(ctx, o, st, c); err != nil {
						return err
					}
				}
				e.hasRow = true
				e.rowID, e.rowText = w.rowIdentity(o, row)
			}
			if b := w.baselines[r.OID]; b != nil && b.Heal { // its chunks that are on their way take this for a change that they do not see
				b.again = true
			}
			if err := w.healed(ctx, o, &keys[i], &e); err != nil {
				return err
			}
		}
	}
	return nil
}

// lastEvent is what the log has last of an entity: the positions of its last event and of the last one that took it to another key, 0 for
// none, and the identity of the row in the former.
type lastEvent struct {
	id, old     Position
	xid, oldXID int64 // of their transactions
	kind        int32 // of the former
	hasRow      bool
	rowID       int64
	rowText     *string
}

// lastOf looks for the last events of entities, in some places.
func (w *Writer) lastOf(ctx context.Context, keys []stateKey, places []place) ([]lastEvent, error) {
	last := make([]lastEvent, len(keys))
	if len(keys) == 0 {
		return last, nil
	}
	if err := w.indexAll(ctx); err != nil {
		return nil, err
	}
	reads, err := w.reader(ctx)
	if err != nil {
		return nil, err
	}
	ids, texts := make([]int64, len(keys)), make([]*string, len(keys))
	for i := range keys {
		if ids[i] = keys[i].id; keys[i].isText {
			texts[i] = &keys[i].text
		}
	}
	for _, p := range places {
		rows, err := reads.Query(ctx, `SELECT k.i, coalesce(e.position, 0), coalesce(o.position, 0), coalesce(e.xid, 0), coalesce(o.xid, 0), coalesce(e.kind, 0), e.row_id, e.row_text FROM unnest($1::int8[], $2::text[]) WITH ORDINALITY AS k(id, txt, i)
			LEFT JOIN LATERAL (SELECT e.position, e.xid, e.kind, e.row_id, e.row_text FROM backstory.event e WHERE e.stream = $3 AND e.id = k.id AND e.id_text IS NOT DISTINCT FROM k.txt
				AND e.kind = ANY ($4::int4[]) ORDER BY e.position DESC LIMIT 1) e ON true
			LEFT JOIN LATERAL (SELECT e.position, e.xid FROM backstory.event e WHERE e.stream = $3 AND e.old_id = k.id AND e.old_text IS NOT DISTINCT FROM k.txt
				AND e.kind = ANY ($4::int4[]) ORDER BY e.position DESC LIMIT 1) o ON true
			WHERE e.position IS NOT NULL OR o.position IS NOT NULL`, ids, texts, p.stream, p.kinds)
		if err != nil {
			return nil, fmt.Errorf("look for the last events of rows: %w", err)
		}
		for rows.Next() {
			var i int64
			var e lastEvent
			var rowID *int64
			if err := rows.Scan(&i, &e.id, &e.old, &e.xid, &e.oldXID, &e.kind, &rowID, &e.rowText); err != nil {
				return nil, fmt.Errorf("look for the last events of rows: %w", err)
			}
			l := &last[i-1]
			if e.old > l.old {
				l.old, l.oldXID = e.old, e.oldXID
			}
			if e.id > l.id {
				l.id, l.xid, l.kind, l.rowText, l.rowID, l.hasRow = e.id, e.xid, e.kind, e.rowText, 0, rowID != nil
				if rowID != nil {
					l.rowID = *rowID
				}
			}
		}
		if err := rows.Err(); err != nil {
			return nil, fmt.Errorf("look for the last events of rows: %w", err)
		}
	}
	return last, nil
}
