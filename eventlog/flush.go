package eventlog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// smallTable names one of the tables that events refer to by number, in the order in which they are sealed.
type smallTable int

const (
	sourceTable smallTable = iota
	aggregateTable
	relationTable
	kindTable
)

// smallColumns are the columns of the small tables that a seal covers, as the writer writes and verify reads them.
var smallColumns = map[smallTable]struct{ name, columns, read string }{
	sourceTable:    {"source", "id, system_id, database, incarnation, timeline, tag", "id, system_id, database, incarnation, timeline, tag"},
	aggregateTable: {"aggregate", "id, name, id_type", "id, name, id_type"},
	relationTable: {"relation", "id, oid, schema, name, columns, key, identity, insert_only, complete, after_lsn, at_lsn",
		"id, oid::bigint, schema, name, columns::text, key, identity, insert_only, complete, after_lsn::text, at_lsn::text"},
	kindTable: {"kind", "id, source, relation, aggregate, type, op, quiet, rules_version", "id, source, relation, aggregate, type, op, quiet, rules_version"},
}

// sealRow gives the bytes of a small table's row that a seal covers: a JSON array of its values.
func sealRow(t smallTable, values []any) []byte {
	b, err := json.Marshal(append([]any{smallColumns[t].name}, values...))
	if err != nil {
		panic("bug: a row of a small table is not JSON: " + err.Error())
	}
	return b
}

// nullSeal is the seal field of an event that does not end an append, in COPY's binary form.
var nullSeal = []byte{0xff, 0xff, 0xff, 0xff}

// contextRow appends a range of context in COPY's binary form.
func contextRow(dst []byte, c ctxRow, sealedAt Position) []byte {
	dst = binary.BigEndian.AppendUint16(dst, 4)
	for _, v := range []Position{c.first, c.last, sealedAt} {
		dst = binary.BigEndian.AppendUint32(dst, 8)
		dst = binary.BigEndian.AppendUint64(dst, uint64(v))
	}
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(c.meta)))
	return append(dst, c.meta...)
}

// step is one transaction of the log.
type step struct {
	rows     []byte // events in COPY's binary form, their seal fields NULL
	first    Position
	position Position // of the last of them
	part     bool     // they belong to a transaction that is still coming in: the head stays where it is
}

// flush writes what is gathered: whole transactions, and with part also the beginning of one that is still coming in.
func (w *Writer) flush(ctx context.Context, backlog LSN, part bool) error {
	open := w.tx.open && !w.tx.skip && w.pos >= w.tx.first
	whole := w.rows
	if open {
		whole = w.rows[:w.wholeEnd]
	}
	if len(w.rows) > 0 {
		if err := w.cover(ctx, backlog); err != nil {
			return err
		}
	}
	// A transaction of which all rows are written already still has to be made visible.
	if len(whole) > 0 || w.whole > w.head.Position {
		if err := w.write(ctx, step{rows: whole, first: w.head.Written + 1, position: w.whole}); err != nil {
			return err
		}
		n := copy(w.rows, w.rows[len(whole):])
		w.rows, w.wholeEnd = w.rows[:n], 0
	}
	if open && part && len(w.rows) > 0 {
		if n := len(w.tx.ranges); n > 1 {
			w.contexts = append(w.contexts, w.tx.ranges[:n-1]...)
			w.tx.ranges = append(w.tx.ranges[:0], w.tx.ranges[n-1])
		}
		if err := w.write(ctx, step{rows: w.rows, first: w.head.Written + 1, position: w.pos, part: true}); err != nil {
			return err
		}
		w.rows = w.rows[:0]
	}
	if len(w.rows) == 0 && cap(w.rows) > 2*flushBytes {
		w.rows = nil
	}
	if w.state.full() {
		if len(w.rows) > 0 {
			return w.flush(ctx, backlog, true)
		}
		w.state.evict()
	}
	return nil
}

// write commits one step and moves the head.
func (w *Writer) write(ctx context.Context, s step) error {
	next := w.head
	next.Written, next.Timeline = s.position, w.tl
	seal := w.seal
	contexts, news := w.contexts, []newRow(nil)
	if len(s.rows) > 0 || len(contexts) > 0 {
		h := sha256.New()
		h.Write(w.seal)
		h.Write(s.rows)
		var b []byte
		for _, c := range contexts {
			b = contextRow(b[:0], c, s.position)
			h.Write(b)
		}
		if len(s.rows) > 0 {
			news = w.news
			slices.SortStableFunc(news, func(a, b newRow) int { return int(a.table) - int(b.table) })
		}
		for _, n := range news {
			h.Write(sealRow(n.table, n.args))
		}
		seal = h.Sum(nil)
	}
	if !s.part {
		next.Position, next.Seal, next.EndLSN, next.CommitLSN, next.OccurredAt = s.position, seal, w.endLSN, w.commit, w.when
	}
	if err := w.send(ctx, s, &next, seal, contexts, news); err != nil {
		// The head refuses, or, where the other one is faster, the index of positions does.
		if c := code(err); c == "BS001" || c == "23505" {
			return fenced
		}
		return fmt.Errorf("append to the event log: %w", err)
	}
	w.seal, w.head = seal, next
	w.head.UpdatedAt, w.lastOut = time.Now(), time.Now()
	w.stats.Flushes.Add(1)
	if !s.part {
		w.stats.add(&w.made)
	}
	w.stats.Bytes.Add(int64(len(s.rows)))
	if len(s.rows) > 0 {
		w.news = w.news[:0]
	}
	w.contexts, w.ctxBytes = w.contexts[:0], 0
	w.publish()
	for _, n := range news {
		if n.table != aggregateTable {
			continue
		}
		a := w.log.dict.aggregate(int32(n.args[0].(int)))
		if err := w.log.createView(ctx, w.conn, a); err != nil {
			return err
		}
		for _, p := range w.parts {
			if err := w.log.indexKey(ctx, w.conn, p, a); err != nil {
				return err
			}
		}
	}
	return nil
}

// send makes one round trip of a step wherever it is small: the server reads the statements after COPY as soon as the
// copied rows end.
func (w *Writer) send(ctx context.Context, s step, next *Head, seal []byte, contexts []ctxRow, news []newRow) error {
	pc := w.conn.PgConn()
	var q strings.Builder
	late := len(s.rows) == 0
	if len(news) > 0 || len(contexts) > 16 && !late {
		if _, err := w.conn.Exec(ctx, "BEGIN"); err != nil {
			return err
		}
		for _, n := range news {
			t := smallColumns[n.table]
			var ph strings.Builder
			for i := range n.args {
				fmt.Fprintf(&ph, ", $%d", i+2)
			}
			args := append([]any{s.position}, n.args...)
			if _, err := w.conn.Exec(ctx, "INSERT INTO backstory."+t.name+" (sealed_at, "+t.columns+") VALUES ($1"+ph.String()+")", args...); err != nil {
				return err
			}
		}
		if len(contexts) > 0 {
			b := copyStart(nil)
			for _, c := range contexts {
				b = contextRow(b, c, s.position)
			}
			b = append(b, 0xff, 0xff)
			if _, err := pc.CopyFrom(ctx, bytes.NewReader(b), "COPY backstory.context (first_position, last_position, sealed_at, metadata) FROM STDIN (FORMAT binary)"); err != nil {
				return err
			}
		}
	} else {
		q.WriteString("BEGIN; ")
		if len(contexts) > 0 {
			q.WriteString("INSERT INTO backstory.context (first_position, last_position, sealed_at, metadata, late) VALUES ")
			for i, c := range contexts {
				if i > 0 {
					q.WriteByte(',')
				}
				fmt.Fprintf(&q, "(%d,%d,%d,%s,%t)", c.first, c.last, s.position, quoteLiteral(string(c.meta)), late)
			}
			q.WriteString("; ")
		}
	}
	if len(s.rows) > 0 {
		q.WriteString("COPY backstory." + w.target(s.first, s.position) + " FROM STDIN (FORMAT binary); ")
	}
	when := "NULL"
	if !next.OccurredAt.IsZero() {
		when = "'" + next.OccurredAt.UTC().Format("2006-01-02 15:04:05.999999Z07:00") + "'"
	}
	fmt.Fprintf(&q, `SELECT backstory.advance(%d, %d, %d, %d, '\x%x', %d, '%s', '%s', %s); COMMIT`, w.head.Epoch, w.head.Written,
		next.Position, next.Written, next.Seal, next.Timeline, next.EndLSN, next.CommitLSN, when)
	if len(s.rows) == 0 {
		_, err := pc.Exec(ctx, q.String()).ReadAll()
		return err
	}
	// The last event carries the seal in place of its NULL.
	end := binary.BigEndian.AppendUint32(nil, uint32(len(seal)))
	end = append(append(end, seal...), 0xff, 0xff)
	_, err := pc.CopyFrom(ctx, &pieces{[][]byte{copyStart(nil), s.rows[:len(s.rows)-len(nullSeal)], end}}, q.String())
	return err
}

// pieces reads several byte slices one after the other.
type pieces struct{ list [][]byte }

func (p *pieces) Read(b []byte) (n int, err error) {
	for len(p.list) > 0 && n < len(b) {
		m := copy(b[n:], p.list[0])
		n += m
		if p.list[0] = p.list[0][m:]; len(p.list[0]) == 0 {
			p.list = p.list[1:]
		}
	}
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

// target is the table that a run of events is copied into: their partition, or the parent where they lie in two.
func (w *Writer) target(first, last Position) string {
	for _, p := range w.parts {
		if p.first <= first && last <= p.last {
			return p.name()
		}
	}
	return "event"
}

// cover makes sure that there is a partition for everything gathered.
func (w *Writer) cover(ctx context.Context, backlog LSN) error {
	for {
		next := Position(1)
		if n := len(w.parts); n > 0 {
			if next = w.parts[n-1].last + 1; w.pos < next {
				return nil
			}
		}
		// A partition that is full gets its indexes before there is another.
		for _, p := range w.parts {
			if !p.indexed {
				if err := w.log.index(ctx, w.conn, p); err != nil {
					return err
				}
			}
		}
		p, err := w.log.createPartition(ctx, w.conn, next, w.mine)
		if err != nil {
			return err
		}
		w.parts = append(w.parts, p)
		if backlog < bulkBytes {
			if err := w.log.index(ctx, w.conn, p); err != nil {
				return err
			}
		}
	}
}

// settle gives the newest partition its indexes once the writer is no longer far behind.
func (w *Writer) settle(ctx context.Context, backlog LSN) error {
	n := len(w.parts)
	if n == 0 || w.parts[n-1].indexed || backlog >= bulkEndBytes {
		return nil
	}
	return w.log.index(ctx, w.conn, w.parts[n-1])
}

// Gap records that the log may lack changes of the source between two positions of its WAL, and why. Nothing is
// appended after it until a person has accepted it (AcceptGap).
func (w *Writer) Gap(ctx context.Context, reason string, from, to LSN) error {
	if w.tx.open {
		return errors.New("bug: a gap inside a transaction")
	}
	if err := w.setSource(w.head.Timeline); err != nil {
		return err
	}
	t, err := w.noteTable("Source")
	if err != nil {
		return err
	}
	data, err := json.Marshal(map[string]string{"reason": reason, "from_lsn": from.String(), "to_lsn": to.String()})
	if err != nil {
		return err
	}
	// A gap has no commit of its own: it lies after the last one, and its place in the log keeps its id apart, among
	// ordinals that no row change has.
	w.tx = openTx{lsn: w.commit, at: time.Now().UnixMicro() - pgEpoch, change: 1<<34 - 1 - int64(w.pos)&0xfffff, first: w.pos + 1}
	w.event(t, &eventRow{op: OpGap, part: part{typ: "SourceGap"}, text: []byte(w.head.Slot), data: data})
	w.whole, w.wholeEnd = w.pos, len(w.rows)
	if err := w.flush(ctx, 0, false); err != nil {
		return err
	}
	if _, err := w.conn.Exec(ctx, `UPDATE backstory.head SET gap = $1 WHERE epoch = $2`, reason, w.head.Epoch); err != nil {
		return fmt.Errorf("record the gap: %w", err)
	}
	w.head.Gap = reason
	w.publish()
	return nil
}

// GapHint says what to do about a gap.
const GapHint = "See backstory status and backstory log Source. Either bring the source back to where the log is, or run backstory init --accept-gap: " +
	"it notes the gap in the log and goes on from now with a new slot; no table counts as complete any more, and a checkout says so."

// fenced is what a writer gets that another one has replaced.
var fenced = &Problem{ErrFenced, "Only one backstory writes to a log at a time. If another one is meant to run, stop this one."}

// noteTable is the table of events that no row change made.
func (w *Writer) noteTable(aggregateName string) (*table, error) {
	t := &table{kinds: map[kindKey]int32{}, agg: w.log.dict.aggregateNamed(aggregateName)}
	if t.agg == nil {
		t.agg = w.newAggregate(aggregateName, "text")
	}
	return t, nil
}
