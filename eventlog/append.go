package eventlog

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// scratch is memory that one row change after the other uses.
type scratch struct {
	key, oldKey, rowKey []byte
	data, before, rest  []byte
	told                []byte
	masks               [][]bool
	tellings            []telling
	frags               []byte
	off                 []int
	changed             []bool
	seen                keySet
	cols                [][]byte
	state               []byte
}

// eventRow is what differs between the events of a transaction.
type eventRow struct {
	op                       Op
	part                     part
	number                   int // of the part
	id                       int64
	text                     []byte // nil where the key is an integer
	rowID                    int64
	rowText                  []byte // nil where the row is the entity, or its identity is an integer
	hasRow                   bool
	oldID                    int64
	oldText                  []byte
	moved                    bool
	data, before, rest, meta []byte
	extra                    []byte
	filing
	also []int64 // link_hash of further entities
}

// event appends one event in COPY's binary form.
func (w *Writer) event(t *table, e *eventRow) {
	w.pos++
	w.made.Events++
	kind := w.kindOf(t, e.owner, e.op, e.part)
	b := w.rows
	b = binary.BigEndian.AppendUint16(b, 24)
	b = appendInt8(b, int64(w.pos))
	b = appendInt4(b, kind)
	b = appendInt4(b, t.agg.id)
	if e.text != nil {
		e.id = keyHash(e.text)
	}
	b = appendInt8(b, e.id)
	b = appendBytes(b, e.text)
	if e.hasRow {
		if e.rowText != nil {
			e.rowID = keyHash(e.rowText)
		}
		b = appendInt8(b, e.rowID)
		b = appendBytes(b, e.rowText)
	} else {
		b = append(b, nullSeal...)
		b = append(b, nullSeal...)
	}
	if e.moved {
		if e.oldText != nil {
			e.oldID = keyHash(e.oldText)
		}
		b = appendInt8(b, e.oldID)
		b = appendBytes(b, e.oldText)
	} else {
		b = append(b, nullSeal...)
		b = append(b, nullSeal...)
	}
	if e.owner != nil {
		b = appendInt4(b, e.owner.id)
		b = appendInt8(b, e.ownerID)
		b = appendBytes(b, e.ownerText)
	} else {
		b = append(append(append(b, nullSeal...), nullSeal...), nullSeal...)
	}
	b = appendInt8s(b, e.also)
	b = appendInt8(b, w.tx.at)
	b = appendInt8(b, int64(w.tx.lsn))
	b = appendInt8(b, int64(w.tx.xid))
	b = appendInt8(b, w.tx.change)
	b = appendInt4(b, int32(e.number))
	b = appendBytes(b, e.data)
	b = appendBytes(b, e.before)
	b = appendBytes(b, e.rest)
	b = appendBytes(b, e.extra)
	b = appendBytes(b, e.meta)
	w.rows = append(b, nullSeal...)
	if len(w.baselines) > 0 && !e.part.restates {
		w.touch(t, e)
	}
}

func appendInt8(b []byte, v int64) []byte {
	return binary.BigEndian.AppendUint64(append(b, 0, 0, 0, 8), uint64(v))
}

// appendInt8s appends an array; nil is NULL (PostgreSQL source, array_send: dimensions, has no NULLs, type of the elements, length and lower bound of the dimension).
func appendInt8s(b []byte, list []int64) []byte {
	if list == nil {
		return append(b, nullSeal...)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(20+12*len(list)))
	for _, n := range []int{1, 0, 20, len(list), 1} {
		b = binary.BigEndian.AppendUint32(b, uint32(n))
	}
	for _, v := range list {
		b = appendInt8(b, v)
	}
	return b
}

func appendInt4(b []byte, v int32) []byte {
	return binary.BigEndian.AppendUint32(append(b, 0, 0, 0, 4), uint32(v))
}

// appendBytes appends a field; nil is NULL.
func appendBytes(b, v []byte) []byte {
	if v == nil {
		return append(b, nullSeal...)
	}
	return append(binary.BigEndian.AppendUint32(b, uint32(len(v))), v...)
}

// change turns one row change into its events.
func (w *Writer) change(ctx context.Context, it *Item) error {
	w.tx.change++
	t, err := w.tableFor(ctx, it.Relation, w.tx.lsn)
	if err != nil {
		return err
	}
	t.seen = w.tx.lsn
	switch it.Op {
	case OpTruncate:
		w.event(t, &eventRow{op: OpTruncate, part: t.rules.truncated, text: []byte{}})
		return nil
	case OpInsert:
		return w.insert(ctx, t, it, OpInsert, asCreated)
	case OpImport:
		return w.insert(ctx, t, it, OpImport, asImported)
	}
	full := it.OldFull || t.rel.ReplicaIdentity == 'f'
	switch {
	case it.Op == OpUpdate && full:
		return w.updateFull(ctx, t, it)
	case it.Op == OpUpdate:
		return w.updateFromState(ctx, t, it)
	case it.Op == OpDelete && full:
		return w.deleteFull(ctx, t, it)
	case it.Op == OpDelete:
		return w.deleteFromState(ctx, t, it)
	}
	return fmt.Errorf("bug: row change of kind %q", it.Op)
}

// entity gives the id under which a row is filed. A row without a key is known by its content.
func (w *Writer) entity(t *table, row []Value, buf []byte) (id int64, text, keep []byte) {
	switch {
	case t.intKey:
		if n, ok := parseInt(row[t.rel.Key[0]].Text); ok {
			return n, nil, buf
		}
		if text = row[t.rel.Key[0]].Text; text == nil { // unknown, where another index tells rows apart: it is not 0
			text = []byte{}
		}
		return 0, text, buf
	case len(t.rel.Key) == 0:
		buf = t.object(row, buf[:0])
		buf = appendContentKey(buf[:0], buf)
		return 0, buf, buf
	}
	buf = appendKey(buf[:0], t.rel.Key, row)
	return 0, buf, buf
}

// object appends all known columns of a row as a JSON object.
func (t *table) object(row []Value, b []byte) []byte {
	b = append(b, '{')
	for i := range row {
		if row[i].State != StateUnknown {
			b = t.member(b, i, &row[i])
		}
	}
	return append(b, '}')
}

// member appends one column as a member of a JSON object.
func (t *table) member(b []byte, i int, v *Value) []byte {
	if b[len(b)-1] != '{' {
		b = append(b, ',')
	}
	b = append(b, t.keys[i]...)
	if v.State == StateText {
		return AppendJSON(b, &t.rel.Columns[i].Type, v.Text)
	}
	return append(b, "null"...)
}

// insert makes the events of a new row, or that of one that existed before.
func (w *Writer) insert(ctx context.Context, t *table, it *Item, op Op, as func(*tableRules) part) error {
	s := &w.scratch
	if len(it.New) != len(t.rel.Columns) {
		return fmt.Errorf("bug: %s has %d columns, the row change %d", t.rel, len(t.rel.Columns), len(it.New))
	}
	c := RowChange{Op: op, w: w, ctx: ctx, t: t, now: it.New}
	e := eventRow{op: op}
	if err := w.fileUnder(&c, &e); err != nil {
		return err
	}
	e.part = as(e.rules)
	e.id, e.text, s.key = w.entity(t, it.New, s.key)
	s.data = t.object(it.New, s.data[:0])
	e.data = s.data
	if t.byRow {
		e.hasRow = true
		e.rowID, e.rowText = w.rowIdentity(t, it.New)
	}
	var parts []Part
	if op == OpInsert {
		var err error
		if parts, err = typed(&c, e.rules); err != nil {
			return err
		}
		e.meta = c.mark(nil)
	}
	w.event(t, &e)
	at := w.pos
	for i := range parts {
		if err := w.restate(&c, &e, &parts[i], i+1); err != nil {
			return err
		}
	}
	if t.rel.ReplicaIdentity != 'f' && t.rel.followed() {
		key := w.stateKey(t, it.New)
		if w.importing && !w.state.has(&key) { // a million of them would drive out what is needed
			w.uncached = w.pos
			return nil
		}
		s.frags, s.off = s.frags[:0], append(s.off[:0], 0)
		for i := range it.New {
			s.frags = t.fragment(i, &it.New[i], s.frags)
			s.off = append(s.off, len(s.frags))
		}
		w.state.put(&key, s.frags, s.off, at, 0)
	}
	return nil
}

// restate makes an event that rules have made of an insert or a delete, beside that which tells of the row.
func (w *Writer) restate(c *RowChange, row *eventRow, p *Part, number int) error {
	s := &w.scratch
	e := *row
	e.number, e.part, e.extra, e.meta = number, part{typ: p.Type, restates: true}, p.Extra, nil
	s.told = append(s.told[:0], '{')
	var err error
	for i := range c.t.rel.Columns {
		if p.Columns != nil && !p.Columns[i] {
			continue
		}
		if s.told, _, err = c.member(s.told, i, c.Op == OpInsert); err != nil {
			return err
		}
	}
	s.told = append(s.told, '}')
	if c.Op == OpInsert {
		e.data = s.told
	} else {
		e.before = s.told
	}
	w.event(c.t, &e)
	return nil
}

func (t *table) fragment(i int, v *Value, b []byte) []byte {
	switch v.State {
	case StateText:
		return AppendJSON(b, &t.rel.Columns[i].Type, v.Text)
	case StateNull:
		return append(b, "null"...)
	}
	return b
}

// updateFull makes the events of an update whose row before came whole with the stream (REPLICA IDENTITY FULL).
func (w *Writer) updateFull(ctx context.Context, t *table, it *Item) error {
	s, old, now := &w.scratch, it.Old, it.New
	if len(now) != len(t.rel.Columns) || len(old) != len(now) {
		return fmt.Errorf("bug: %s has %d columns, the row change %d and %d", t.rel, len(t.rel.Columns), len(old), len(now))
	}
	any := false
	s.changed = append(s.changed[:0], make([]bool, len(now))...)
	for i := range now {
		n, o := &now[i], &old[i]
		if n.State == StateUnchanged {
			*n = *o
		}
		if n.State != o.State || n.State == StateText && !bytes.Equal(n.Text, o.Text) {
			s.changed[i], any = true, true
		}
	}
	if !any {
		return nil // an UPDATE that changed nothing is no news
	}
	e := eventRow{op: OpUpdate}
	e.id, e.text, s.key = w.entity(t, now, s.key)
	if len(t.rel.Key) == 0 || anyOf(s.changed, t.rel.Key) {
		e.moved = true
		e.oldID, e.oldText, s.oldKey = w.entity(t, old, s.oldKey)
	}
	// Unchanged attributes are carried now and then only, enough for no look-up to fold a long history.
	rest := !t.rel.Complete || (uint64(w.tx.lsn>>3)+uint64(w.tx.change))*0x9e3779b97f4a7c15>>60 == 0
	c := RowChange{Op: OpUpdate, Changed: s.changed, w: w, ctx: ctx, t: t, old: old, now: now}
	_, err := w.update(&c, &e, rest)
	return err
}

func anyOf(set []bool, cols []int) bool {
	for _, c := range cols {
		if set[c] {
			return true
		}
	}
	return false
}

func (w *Writer) deleteFull(ctx context.Context, t *table, it *Item) error {
	e := eventRow{op: OpDelete}
	e.id, e.text, w.scratch.key = w.entity(t, it.Old, w.scratch.key)
	return w.delete(&RowChange{Op: OpDelete, w: w, ctx: ctx, t: t, old: it.Old}, &e)
}

// updateFromState makes the event of an update whose row before is known from the log alone (REPLICA IDENTITY DEFAULT or
// USING INDEX).
func (w *Writer) updateFromState(ctx context.Context, t *table, it *Item) error {
	s, now := &w.scratch, it.New
	if len(now) != len(t.rel.Columns) {
		return fmt.Errorf("bug: %s has %d columns, the row change %d", t.rel, len(t.rel.Columns), len(now))
	}
	ident := now
	if it.Old != nil {
		ident = it.Old
		for i := range now { // an unchanged key that is stored out of line comes with the old row only
			if now[i].State == StateUnchanged && it.Old[i].State == StateText {
				now[i] = it.Old[i]
			}
		}
	}
	key := w.stateKey(t, ident)
	st, err := w.lookup(ctx, t, &key)
	if err != nil {
		return err
	}
	for _, c := range t.rel.Key {
		if now[c].State == StateUnchanged && st != nil {
			if now[c], err = w.stateValue(ctx, t, st, c); err != nil {
				return err
			}
		}
	}
	e := eventRow{op: OpUpdate}
	e.id, e.text, s.key = w.entity(t, now, s.key)
	if t.byRow {
		e.hasRow = true
		e.rowID, e.rowText = w.rowIdentity(t, now)
	}
	if t.byRow && it.Old != nil && w.baselines[t.rel.OID] != nil {
		w.touched.add(t.rel.OID, key.id)
	}
	if st == nil {
		return w.firstSeen(ctx, t, it, &e, key)
	}
	// What the source did not send is as it was.
	s.frags, s.off = s.frags[:0], append(s.off[:0], 0)
	for i := range now {
		start, o := len(s.frags), st.frag(i)
		if now[i].State != StateUnchanged {
			s.frags = t.fragment(i, &now[i], s.frags)
		}
		if now[i].State == StateUnchanged || isBig(o) && sameAsBig(o, s.frags[start:]) {
			s.frags = append(s.frags[:start], o...) // so that it stays known which event holds a big one
		}
		s.off = append(s.off, len(s.frags))
	}
	any := false
	s.changed = append(s.changed[:0], make([]bool, len(now))...)
	for i := range now {
		if !bytes.Equal(s.frags[s.off[i]:s.off[i+1]], st.frag(i)) {
			s.changed[i], any = true, true
		}
	}
	if !any {
		return nil
	}
	if anyOf(s.changed, t.rel.Key) {
		e.moved = true
		e.oldID, e.oldText, err = w.stateEntity(ctx, t, st)
		if err != nil {
			return err
		}
	}
	// An event under a new identity has the whole row, since the ones before it are not found under that.
	rest := t.byRow && anyOf(s.changed, t.identity) || st.chain()+1 >= restChain || !t.rel.Complete
	c := RowChange{Op: OpUpdate, Changed: s.changed, w: w, ctx: ctx, t: t, st: st, frags: s.frags, off: s.off}
	chain, err := w.update(&c, &e, rest)
	if err != nil {
		return err
	}
	newKey := w.stateKey(t, now)
	if newKey != key {
		w.state.putGone(&key)
	}
	if c.keptOff == nil {
		c.kept, c.keptOff = c.frags, c.off
	}
	w.state.put(&newKey, c.kept, c.keptOff, w.pos, chain)
	return nil
}

// firstSeen makes the event of a row that existed before the log first saw it: an import of what is known of it.
func (w *Writer) firstSeen(ctx context.Context, t *table, it *Item, e *eventRow, key stateKey) error {
	s := &w.scratch
	w.made.FirstSeen++
	e.op = OpImport
	s.frags, s.off = s.frags[:0], append(s.off[:0], 0)
	s.data = append(s.data[:0], '{')
	var unknown []byte
	for i := range it.New {
		v := &it.New[i]
		s.frags = t.fragment(i, v, s.frags)
		if f := s.frags[s.off[i]:]; len(f) > 0 {
			s.data = memberRaw(s.data, t.keys[i], f)
		} else {
			unknown = appendName(unknown, t.keys[i])
		}
		s.off = append(s.off, len(s.frags))
	}
	s.data = append(s.data, '}')
	e.data = s.data
	if err := w.fileUnder(&RowChange{Op: OpImport, w: w, ctx: ctx, t: t, now: it.New}, e); err != nil {
		return err
	}
	e.part = e.rules.imported
	e.meta = []byte(`{"first_seen":true`)
	if unknown != nil {
		e.meta = append(append(append(e.meta, `,"unknown":[`...), unknown...), ']')
	}
	e.meta = append(e.meta, '}')
	if it.Old != nil && !t.byRow {
		id, text, buf := w.entity(t, it.Old, s.oldKey)
		s.oldKey = buf
		if id != e.id || !bytes.Equal(text, e.text) {
			e.moved, e.oldID, e.oldText = true, id, text
		}
	}
	w.event(t, e)
	if !t.rel.followed() {
		return nil
	}
	newKey := w.stateKey(t, it.New)
	if newKey != key {
		w.state.putGone(&key)
	}
	w.state.put(&newKey, s.frags, s.off, w.pos, 0)
	return nil
}

// deleteFromState makes the event of a delete of which the stream tells only the replica identity.
func (w *Writer) deleteFromState(ctx context.Context, t *table, it *Item) error {
	s := &w.scratch
	key := w.stateKey(t, it.Old)
	st, err := w.lookup(ctx, t, &key)
	if err != nil {
		return err
	}
	e := eventRow{op: OpDelete}
	if t.byRow {
		e.hasRow = true
		e.rowID, e.rowText = w.rowIdentity(t, it.Old)
	}
	if st != nil {
		if e.id, e.text, err = w.stateEntity(ctx, t, st); err != nil {
			return err
		}
	} else {
		w.made.FirstSeen++
		e.id, e.text, s.key = w.entity(t, it.Old, s.key)
	}
	c := RowChange{Op: OpDelete, w: w, ctx: ctx, t: t, st: st}
	if st == nil {
		c.old, c.firstSeen = it.Old, true
	}
	if err := w.delete(&c, &e); err != nil {
		return err
	}
	w.state.putGone(&key)
	return nil
}

// memberRaw appends a member whose value is JSON already.
func memberRaw(b, key, value []byte) []byte {
	if b[len(b)-1] != '{' {
		b = append(b, ',')
	}
	return append(append(b, key...), value...)
}

// metaUnknown gives the metadata that name columns whose values nobody knows.
func metaUnknown(names []byte) []byte {
	return append(append([]byte(`{"unknown":[`), names...), "]}"...)
}

// appendName appends a column's quoted name to a list.
func appendName(list, key []byte) []byte {
	if len(list) > 0 {
		list = append(list, ',')
	}
	return append(list, key[:len(key)-1]...)
}

var errNoKey = errors.New("bug: a row's state lacks its key")
