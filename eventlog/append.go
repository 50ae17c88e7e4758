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
}

// event appends one event in COPY's binary form.
func (w *Writer) event(t *table, e *eventRow) {
	w.pos++
	w.made.Events++
	kind := w.kindOf(t, e.op, e.part)
	b := w.rows
	b = binary.BigEndian.AppendUint16(b, 19)
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
	b = appendInt8(b, w.tx.at)
	b = appendInt8(b, int64(w.tx.lsn))
	b = appendInt8(b, int64(w.tx.xid))
	b = appendInt8(b, w.tx.change)
	b = appendInt4(b, int32(e.number))
	b = appendBytes(b, e.data)
	b = appendBytes(b, e.before)
	b = appendBytes(b, e.rest)
	b = appendBytes(b, e.meta)
	w.rows = append(b, nullSeal...)
	if len(w.baselines) > 0 {
		w.touch(t, e)
	}
}

func appendInt8(b []byte, v int64) []byte {
	return binary.BigEndian.AppendUint64(append(b, 0, 0, 0, 8), uint64(v))
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
	switch it.Op {
	case OpTruncate:
		w.event(t, &eventRow{op: OpTruncate, part: t.rules.truncated, text: []byte{}})
		return nil
	case OpInsert:
		return w.insert(t, it, OpInsert, t.rules.created)
	case OpImport:
		return w.insert(t, it, OpImport, t.rules.imported)
	}
	full := it.OldFull || t.rel.ReplicaIdentity == 'f'
	switch {
	case it.Op == OpUpdate && full:
		return w.updateFull(t, it)
	case it.Op == OpUpdate:
		return w.updateFromState(ctx, t, it)
	case it.Op == OpDelete && full:
		w.deleteFull(t, it)
		return nil
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

// insert makes the event of a new row, or of one that existed before.
func (w *Writer) insert(t *table, it *Item, op Op, p part) error {
	s := &w.scratch
	if len(it.New) != len(t.rel.Columns) {
		return fmt.Errorf("bug: %s has %d columns, the row change %d", t.rel, len(t.rel.Columns), len(it.New))
	}
	e := eventRow{op: op, part: p}
	e.id, e.text, s.key = w.entity(t, it.New, s.key)
	s.data = t.object(it.New, s.data[:0])
	e.data = s.data
	if t.byRow {
		e.hasRow = true
		e.rowID, e.rowText = w.rowIdentity(t, it.New)
	}
	w.event(t, &e)
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
		w.state.put(&key, s.frags, s.off, w.pos, 0)
	}
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

// updateFull makes the event of an update whose row before came whole with the stream (REPLICA IDENTITY FULL).
func (w *Writer) updateFull(t *table, it *Item) error {
	s, old, now := &w.scratch, it.Old, it.New
	if len(now) != len(t.rel.Columns) || len(old) != len(now) {
		return fmt.Errorf("bug: %s has %d columns, the row change %d and %d", t.rel, len(t.rel.Columns), len(old), len(now))
	}
	quiet, any := true, false
	s.changed = append(s.changed[:0], make([]bool, len(now))...)
	for i := range now {
		n, o := &now[i], &old[i]
		if n.State == StateUnchanged {
			*n = *o
		}
		if n.State != o.State || n.State == StateText && !bytes.Equal(n.Text, o.Text) {
			s.changed[i], any = true, true
			quiet = quiet && t.rules.quiet[i]
		}
	}
	if !any {
		return nil // an UPDATE that changed nothing is no news
	}
	e := eventRow{op: OpUpdate, part: t.rules.updated}
	if quiet {
		e.part = t.rules.touched
	}
	e.id, e.text, s.key = w.entity(t, now, s.key)
	if len(t.rel.Key) == 0 || anyOf(s.changed, t.rel.Key) {
		e.moved = true
		e.oldID, e.oldText, s.oldKey = w.entity(t, old, s.oldKey)
	}
	s.data, s.before = append(s.data[:0], '{'), append(s.before[:0], '{')
	for i := range now {
		if s.changed[i] {
			s.data = t.member(s.data, i, &now[i])
			s.before = t.member(s.before, i, &old[i])
		}
	}
	s.data, s.before = append(s.data, '}'), append(s.before, '}')
	e.data, e.before = s.data, s.before
	// Unchanged attributes are carried now and then only, enough for no look-up to fold a long history.
	if e.moved || !t.rel.Complete || (uint64(w.tx.lsn>>3)+uint64(w.tx.change))*0x9e3779b97f4a7c15>>60 == 0 {
		s.rest = append(s.rest[:0], '{')
		for i := range now {
			if !s.changed[i] {
				s.rest = t.member(s.rest, i, &now[i])
			}
		}
		s.rest = append(s.rest, '}')
		e.rest = s.rest
	}
	w.event(t, &e)
	return nil
}

func anyOf(set []bool, cols []int) bool {
	for _, c := range cols {
		if set[c] {
			return true
		}
	}
	return false
}

func (w *Writer) deleteFull(t *table, it *Item) {
	s := &w.scratch
	e := eventRow{op: OpDelete, part: t.rules.deleted}
	e.id, e.text, s.key = w.entity(t, it.Old, s.key)
	s.before = t.object(it.Old, s.before[:0])
	e.before = s.before
	w.event(t, &e)
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
	e := eventRow{op: OpUpdate, part: t.rules.updated}
	e.id, e.text, s.key = w.entity(t, now, s.key)
	if t.byRow {
		e.hasRow = true
		e.rowID, e.rowText = w.rowIdentity(t, now)
	}
	if t.byRow && it.Old != nil && w.baselines[t.rel.OID] != nil {
		w.touched.add(t.rel.OID, key.id)
	}
	if st == nil {
		return w.firstSeen(t, it, &e, key)
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
	quiet, any, restSize, unknown := true, false, 0, []byte(nil)
	s.changed = append(s.changed[:0], make([]bool, len(now))...)
	for i := range now {
		n, o := s.frags[s.off[i]:s.off[i+1]], st.frag(i)
		if bytes.Equal(n, o) {
			restSize += len(n) + len(t.keys[i])
			if isBig(n) {
				restSize += restBytes
			}
			continue
		}
		s.changed[i], any = true, true
		quiet = quiet && t.rules.quiet[i]
	}
	if !any {
		return nil
	}
	if quiet {
		e.part = t.rules.touched
	}
	if anyOf(s.changed, t.rel.Key) {
		e.moved = true
		e.oldID, e.oldText, err = w.stateEntity(ctx, t, st)
		if err != nil {
			return err
		}
	}
	s.data, s.before = append(s.data[:0], '{'), append(s.before[:0], '{')
	for i := range now {
		if !s.changed[i] {
			continue
		}
		s.data = memberRaw(s.data, t.keys[i], s.frags[s.off[i]:s.off[i+1]])
		o := st.frag(i)
		switch {
		case len(o) == 0:
			unknown = appendName(unknown, t.keys[i])
		case isBig(o):
			if o, err = w.load(ctx, t, i, o); err != nil {
				return err
			}
			fallthrough
		default:
			s.before = memberRaw(s.before, t.keys[i], o)
		}
	}
	s.data, s.before = append(s.data, '}'), append(s.before, '}')
	e.data, e.before = s.data, s.before
	chain := st.chain() + 1
	// An event under a new identity has the whole row, since the ones before it are not found under that.
	if restSize <= restBytes || e.moved || t.byRow && anyOf(s.changed, t.identity) || chain >= restChain || !t.rel.Complete {
		s.rest = append(s.rest[:0], '{')
		for i := range now {
			if s.changed[i] {
				continue
			}
			f := s.frags[s.off[i]:s.off[i+1]]
			if isBig(f) {
				if f, err = w.load(ctx, t, i, f); err != nil {
					return err
				}
			}
			if len(f) == 0 {
				unknown = appendName(unknown, t.keys[i])
				continue
			}
			s.rest = memberRaw(s.rest, t.keys[i], f)
		}
		s.rest = append(s.rest, '}')
		e.rest, chain = s.rest, 0
	}
	if unknown != nil {
		e.meta = append(append([]byte(`{"unknown":[`), unknown...), "]}"...)
	}
	w.event(t, &e)
	newKey := w.stateKey(t, now)
	if newKey != key {
		w.state.putGone(&key)
	}
	w.state.put(&newKey, s.frags, s.off, w.pos, chain)
	return nil
}

// firstSeen makes the event of a row that existed before the log first saw it: an import of what is known of it.
func (w *Writer) firstSeen(t *table, it *Item, e *eventRow, key stateKey) error {
	s := &w.scratch
	w.made.FirstSeen++
	e.op, e.part = OpImport, t.rules.imported
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
	e := eventRow{op: OpDelete, part: t.rules.deleted}
	if t.byRow {
		e.hasRow = true
		e.rowID, e.rowText = w.rowIdentity(t, it.Old)
	}
	s.before = append(s.before[:0], '{')
	var unknown []byte
	for i := range t.rel.Columns {
		var f []byte
		if st != nil {
			f = st.frag(i)
			if isBig(f) {
				if f, err = w.load(ctx, t, i, f); err != nil {
					return err
				}
			}
		} else if it.Old[i].State == StateText {
			s.frags = t.fragment(i, &it.Old[i], s.frags[:0])
			f = s.frags
		}
		if len(f) == 0 {
			unknown = appendName(unknown, t.keys[i])
			continue
		}
		s.before = memberRaw(s.before, t.keys[i], f)
	}
	s.before = append(s.before, '}')
	e.before = s.before
	if st != nil {
		if e.id, e.text, err = w.stateEntity(ctx, t, st); err != nil {
			return err
		}
	} else {
		w.made.FirstSeen++
		e.id, e.text, s.key = w.entity(t, it.Old, s.key)
	}
	if unknown != nil {
		e.meta = append(append([]byte(`{"unknown":[`), unknown...), "]}"...)
		if st == nil {
			e.meta = append([]byte(`{"first_seen":true,`), e.meta[1:]...)
		}
	}
	w.event(t, &e)
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

// appendName appends a column's quoted name to a list.
func appendName(list, key []byte) []byte {
	if len(list) > 0 {
		list = append(list, ',')
	}
	return append(list, key[:len(key)-1]...)
}

var errNoKey = errors.New("bug: a row's state lacks its key")
