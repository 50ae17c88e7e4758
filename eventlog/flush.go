package eventlog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// smallTable names one of the tables that events refer to by number, in the order in which they are sealed.
type smallTable int

const (
	sourceTable smallTable = iota
	aggregateTable
	relationTable
	kindTable
	rulesTable
)

// smallColumns are the columns of the small tables that a seal covers, as the writer writes and verify reads them.
var smallColumns = map[smallTable]struct{ name, columns, read string }{
	sourceTable:    {"source", "id, system_id, database, incarnation, timeline, tag", "id, system_id, database, incarnation, timeline, tag"},
	aggregateTable: {"aggregate", "id, name, id_type", "id, name, id_type"},
	relationTable: {"relation", "id, oid, schema, name, root_oid, root_schema, root_name, columns, key, key_deferrable, generated, identity, insert_only, complete, dropped, after_lsn, at_lsn, at_position",
		"id, oid::bigint, schema, name, root_oid::bigint, root_schema, root_name, columns::text, key, key_deferrable, generated::text, identity, insert_only, complete, dropped, after_lsn::text, at_lsn::text, at_position"},
	kindTable:  {"kind", "id, source, relation, aggregate, owner, type, op, quiet, restates, rules_version", "id, source, relation, aggregate, owner, type, op, quiet, restates, rules_version"},
	rulesTable: {"rules", "id, text, at_position", "id, text, at_position"},
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

// flight is a step that is on its way to the log, while the writer makes the events of the next one.
type flight struct {
	step
	from, next Head
	seal       []byte // of the last event
	buf        []byte // in which the rows lie
	contexts   []ctxRow
	news       []newRow
	made       Counts
	progress   []byte // SQL
	seen       LSN    // everything that was captured before it is in the log then; 0: not everything that was made is in this step
	done       chan error
}

// busy tells whether a step has not arrived yet.
func (f *flight) busy() bool { return f != nil && len(f.done) == 0 }

// flush writes what is gathered: whole transactions, and with part also the beginning of one that is still coming in. What it
// writes is durable when join has returned.
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
	if len(whole) > 0 || w.whole > w.head.Position || len(w.progress) > 0 {
		if err := w.write(ctx, step{rows: whole, first: w.head.Written + 1, position: w.whole}); err != nil {
			return err
		}
	}
	if open && part && len(w.rows) > 0 {
		if n := len(w.tx.ranges); n > 1 {
			w.contexts = append(w.contexts, w.tx.ranges[:n-1]...)
			w.tx.ranges = append(w.tx.ranges[:0], w.tx.ranges[n-1])
		}
		if err := w.write(ctx, step{rows: w.rows, first: w.head.Written + 1, position: w.pos, part: true}); err != nil {
			return err
		}
	}
	return nil
}

// trim keeps the cache within its bound. It is called between row changes, as it takes back the states that are in use.
func (w *Writer) trim(ctx context.Context, backlog LSN) error {
	if !w.state.full() {
		return nil
	}
	if len(w.rows) > 0 {
		if err := w.flush(ctx, backlog, true); err != nil {
			return err
		}
	}
	// What is dropped now was made before the last time; its step may still be on its way if nothing was made since.
	if w.flight != nil && w.flight == w.evicted {
		if err := w.join(ctx); err != nil {
			return err
		}
	}
	w.state.evict()
	w.evicted = w.flight
	return nil
}

// write sends one step, which moves the head. One is on its way at a time.
func (w *Writer) write(ctx context.Context, s step) error {
	if err := w.join(ctx); err != nil {
		return err
	}
	f := &flight{step: s, from: w.head, next: w.head, seal: w.seal, buf: w.rows, contexts: w.contexts, done: make(chan error, 1)}
	f.next.Written, f.next.Timeline = s.position, w.tl
	if len(s.rows) > 0 || len(f.contexts) > 0 {
		h := sha256.New()
		h.Write(w.seal)
		h.Write(s.rows)
		var b []byte
		for _, c := range f.contexts {
			b = contextRow(b[:0], c, s.position)
			h.Write(b)
		}
		if len(s.rows) > 0 {
			f.news, w.news = w.news, nil
			slices.SortStableFunc(f.news, func(a, b newRow) int { return int(a.table) - int(b.table) })
		}
		for _, n := range f.news {
			h.Write(sealRow(n.table, n.args))
		}
		f.seal = h.Sum(nil)
	}
	if !s.part {
		f.next.Position, f.next.Seal, f.next.EndLSN, f.next.CommitLSN, f.next.OccurredAt = s.position, f.seal, w.endLSN, w.commit, w.when
		f.made, w.made = w.made, Counts{}
		f.progress, w.progress = w.progress, nil
	}
	w.rows = append(w.spare[:0], w.rows[len(s.rows):]...)
	w.wholeEnd, w.spare, w.contexts, w.ctxBytes = 0, nil, nil, 0
	if len(w.rows) == 0 && !s.part {
		f.seen = w.endLSN
	}
	w.head, w.seal, w.flight = f.next, f.seal, f
	go func() { f.done <- w.fly(ctx, f) }()
	return nil
}

// fly brings a step to the log. Until it has ended, the connection is its own.
func (w *Writer) fly(ctx context.Context, f *flight) error {
	if err := w.send(ctx, f); err != nil {
		// The head refuses, or, where the other one is faster, the index of positions does.
		if c := code(err); c == "BS001" || c == "23505" {
			return fenced
		}
		return fmt.Errorf("append to the event log: %w", err)
	}
	w.stats.Flushes.Add(1)
	w.stats.add(&f.made)
	w.stats.Bytes.Add(int64(len(f.rows)))
	if f.seen != 0 {
		w.seen.Store(uint64(f.seen))
	}
	f.next.UpdatedAt = time.Now()
	w.publish(f.next)
	return nil
}

// arrive brings to the log what has been made so far, of an open transaction too, and waits for it.
func (w *Writer) arrive(ctx context.Context) error {
	if err := w.flush(ctx, 0, true); err != nil {
		return err
	}
	return w.join(ctx)
}

// join waits until everything that was written is durable. Whoever needs the connection calls it first (see db).
func (w *Writer) join(ctx context.Context) error {
	f := w.flight
	if f == nil {
		return w.failed
	}
	w.flight = nil
	if w.failed = <-f.done; w.failed != nil {
		return w.failed
	}
	w.lastOut = time.Now()
	if cap(f.buf) <= 2*flushBytes {
		w.spare = f.buf
	}
	w.indexBehind(ctx)
	for _, n := range f.news {
		if n.table != aggregateTable {
			continue
		}
		if err := w.indexed(); err != nil {
			return err
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

// db gives the connection to the log, with all steps done.
func (w *Writer) db(ctx context.Context) (*pgx.Conn, error) { return w.conn, w.join(ctx) }

// send makes one round trip of a step wherever it is small: the server reads the statements after COPY as soon as the
// copied rows end.
func (w *Writer) send(ctx context.Context, f *flight) error {
	pc := w.conn.PgConn()
	var q strings.Builder
	late := len(f.rows) == 0
	if len(f.news) > 0 || len(f.contexts) > 16 && !late {
		if _, err := w.conn.Exec(ctx, "BEGIN"); err != nil {
			return err
		}
		for _, n := range f.news {
			t := smallColumns[n.table]
			var ph strings.Builder
			for i := range n.args {
				fmt.Fprintf(&ph, ", $%d", i+2)
			}
			args := append([]any{f.position}, n.args...)
			if _, err := w.conn.Exec(ctx, "INSERT INTO backstory."+t.name+" (sealed_at, "+t.columns+") VALUES ($1"+ph.String()+")", args...); err != nil {
				return err
			}
		}
		if len(f.contexts) > 0 {
			b := copyStart(nil)
			for _, c := range f.contexts {
				b = contextRow(b, c, f.position)
			}
			b = append(b, 0xff, 0xff)
			if _, err := pc.CopyFrom(ctx, bytes.NewReader(b), "COPY backstory.context (first_position, last_position, sealed_at, metadata) FROM STDIN (FORMAT binary)"); err != nil {
				return err
			}
		}
	} else {
		q.WriteString("BEGIN; ")
		if len(f.contexts) > 0 {
			q.WriteString("INSERT INTO backstory.context (first_position, last_position, sealed_at, metadata, late) VALUES ")
			for i, c := range f.contexts {
				if i > 0 {
					q.WriteByte(',')
				}
				fmt.Fprintf(&q, "(%d,%d,%d,%s,%t)", c.first, c.last, f.position, QuoteLiteral(string(c.meta)), late)
			}
			q.WriteString("; ")
		}
	}
	q.Write(f.progress)
	if len(f.rows) > 0 {
		q.WriteString("COPY backstory." + w.target(f.first, f.position) + " FROM STDIN (FORMAT binary); ")
	}
	when := "NULL"
	if !f.next.OccurredAt.IsZero() {
		when = "'" + f.next.OccurredAt.UTC().Format("2006-01-02 15:04:05.999999Z07:00") + "'"
	}
	fmt.Fprintf(&q, `SELECT backstory.advance(%d, %d, %d, %d, '\x%x', %d, '%s', '%s', %s); COMMIT`, f.from.Epoch, f.from.Written,
		f.next.Position, f.next.Written, f.next.Seal, f.next.Timeline, f.next.EndLSN, f.next.CommitLSN, when)
	if len(f.rows) == 0 {
		_, err := pc.Exec(ctx, q.String()).ReadAll()
		return err
	}
	// The last event carries the seal in place of its NULL.
	end := binary.BigEndian.AppendUint32(nil, uint32(len(f.seal)))
	end = append(append(end, f.seal...), 0xff, 0xff)
	_, err := pc.CopyFrom(ctx, &pieces{[][]byte{copyStart(nil), f.rows[:len(f.rows)-len(nullSeal)], end}}, q.String())
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
		db, err := w.db(ctx)
		if err != nil {
			return err
		}
		// A partition that is full gets its indexes before there is another; if much more is to come, while the next one fills.
		if n := len(w.parts); n > 0 && backlog >= bulkBytes && !w.parts[n-1].indexed {
			if err := w.indexed(); err != nil {
				return err
			}
			w.full = w.parts[n-1]
		} else if err := w.indexAll(ctx); err != nil {
			return err
		} else if n > 0 {
			if err := w.log.summarize(ctx, db, w.parts[n-1]); err != nil {
				return err
			}
		}
		size := w.log.cfg.PartitionEvents
		if backlog >= bulkBytes {
			size = min(size, bulkEvents)
		}
		p, err := w.log.createPartition(ctx, db, next, size, w.mine)
		if err != nil {
			return err
		}
		w.parts = append(w.parts, p)
		if backlog < bulkBytes {
			if err := w.log.index(ctx, db, p); err != nil {
				return err
			}
		}
	}
}

// settle gives the newest partition its indexes once the writer is no longer far behind.
func (w *Writer) settle(ctx context.Context, backlog LSN) error {
	if backlog >= bulkEndBytes {
		return nil
	}
	return w.indexAll(ctx)
}

// indexBehind begins to give the partition that is full its indexes, when everything that is in it has arrived.
func (w *Writer) indexBehind(ctx context.Context) {
	p := w.full
	if p == nil || w.published.Load().Written < p.last {
		return
	}
	w.full = nil
	ctx, stop := context.WithCancel(ctx)
	w.index = &indexing{stop: stop, done: make(chan error, 1)}
	go func(done chan<- error) {
		defer stop()
		conn, err := w.connect(ctx, "backstory index")
		if err == nil {
			// Who takes over ends this session, too.
			if _, err = conn.Exec(ctx, `SELECT pg_try_advisory_lock_shared(`+writerLock+`)`); err == nil {
				err = w.log.index(ctx, conn, p)
			}
			_ = conn.Close(context.WithoutCancel(ctx))
		}
		done <- err
	}(w.index.done)
}

// indexing is the making of a partition's indexes, on connections of its own.
type indexing struct {
	stop func()
	done chan error
}

// indexed waits until no partition's indexes are being made.
func (w *Writer) indexed() error {
	if w.index == nil {
		return nil
	}
	err := <-w.index.done
	w.index = nil
	return err
}

// indexAll gives all partitions their indexes.
func (w *Writer) indexAll(ctx context.Context) error {
	if err := w.indexed(); err != nil {
		return err
	}
	w.full = nil
	for _, p := range w.parts {
		if p.indexed {
			continue
		}
		db, err := w.db(ctx)
		if err != nil {
			return err
		}
		if err := w.log.index(ctx, db, p); err != nil {
			return err
		}
	}
	return nil
}
