package rebuild

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// chunkBytes is how much each piece of encoded rows holds.
const chunkBytes = 64 << 10

// write makes rows of the states and gives them to the target, one table after the other. Rows come in the order of their
// keys' hashes, whatever the memory and the number of workers were.
func (e *engine) write(ctx context.Context, result *Result) (err error) {
	tables := e.Calculator.Tables()
	if len(tables) != len(e.tables) {
		return fmt.Errorf("bug: the calculator has %d tables, and had %d", len(tables), len(e.tables))
	}
	rows, err := e.makeRoom()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			e.Target.Abort()
		}
	}()
	whole, partsOf := parts(tables)
	if err := e.Target.Begin(ctx, whole); err != nil {
		return err
	}
	w := &writing{engine: e, total: rows, began: time.Now(), tables: tables}
	for range e.Workers {
		w.emitters = append(w.emitters, &emitter{writing: w, loader: e.newLoader(e.MaxMemoryBytes / 2 / int64(e.Workers)), folder: e.Calculator.NewFolder()})
	}
	defer func() {
		for _, m := range w.emitters {
			result.SpilledBytes += m.loader.file.written
			err = errors.Join(err, m.loader.file.close())
		}
	}()
	for n, t := range whole {
		r := TableResult{Table: t, Parts: partsOf[n]}
		for try := 0; ; try++ {
			err := w.table(ctx, t, r.Parts)
			if err == nil {
				break
			}
			if !errors.Is(err, ErrAgain) || try == 8 {
				return fmt.Errorf("write %s: %w", t, err)
			}
		}
		for _, i := range r.Parts {
			columns := t.columnsOf(tables[i])
			r.Tally.add(e.moved[i].in(columns))
			for _, p := range e.parts[i*fanOut : (i+1)*fanOut] {
				r.Rows += p.written
				r.Tally.add(p.tally.in(columns))
				r.Tally.add(p.late.in(columns))
				p.forget()
			}
		}
		w.before += r.Rows
		result.Tables = append(result.Tables, r)
	}
	return e.Target.Commit(ctx)
}

// makeRoom prepares the memory for loading what was spilled. It tells how many rows there will be, or 0.
func (e *engine) makeRoom() (rows int64, err error) {
	spilled := 0
	for _, w := range e.workers {
		spilled += w.spilled
	}
	for _, w := range e.workers {
		if spilled > 0 {
			w.share /= 2
			if err := w.relieve(); err != nil {
				return 0, err
			}
		}
		w.scratch, w.in, w.idle = nil, nil, nil
	}
	for _, p := range e.parts {
		if p.run != nil {
			if err := p.run.flush(); err != nil {
				return 0, err
			}
			p.run.trim()
		}
		if p.store != nil {
			rows += int64(p.store.n)
		}
	}
	if spilled > 0 {
		rows = 0
	}
	return rows, nil
}

// writing is the second phase of a fold.
type writing struct {
	*engine
	tables   []*Table
	emitters []*emitter
	before   int64 // rows of the tables that are finished
	total    int64 // of all rows, or 0
	began    time.Time
	idle     sync.Pool // of *[]byte
}

// piece is some encoded rows of a part.
type piece struct {
	bytes *[]byte
	rows  int64
}

// table writes one table. The emitters take its parts in order and run ahead of the writer by a few pieces each; since the
// part that the writer waits for has always been taken, none waits for ever.
func (w *writing) table(ctx context.Context, t *Table, of []int) (err error) {
	tw, err := w.Target.Table(ctx, t)
	if err != nil {
		return err
	}
	inner, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer func() {
		cancel(err)
		wg.Wait()
		err = tw.Close(err)
	}()
	var parts []*part
	columns := map[int][]place{} // by table
	for _, i := range of {
		parts = append(parts, w.parts[i*fanOut:(i+1)*fanOut]...)
		columns[i] = t.columnsOf(w.tables[i])
	}
	out := make([]chan piece, len(parts))
	for j := range out {
		out[j] = make(chan piece, 2)
	}
	var next atomic.Int64
	for _, m := range w.emitters {
		m.encoder = tw.NewEncoder()
		wg.Go(func() {
			for {
				j := int(next.Add(1)) - 1
				if j >= len(parts) {
					return
				}
				m.columns = columns[parts[j].table]
				if err := m.write(inner, parts[j], out[j]); err != nil {
					cancel(err)
					return
				}
				close(out[j])
			}
		})
	}
	rows := int64(0)
	for _, ch := range out {
		for open := true; open; {
			select {
			case p, ok := <-ch:
				if open = ok; !ok {
					break
				}
				if err := tw.Write(*p.bytes); err != nil {
					return err
				}
				rows += p.rows
				*p.bytes = (*p.bytes)[:0]
				if cap(*p.bytes) <= 4*chunkBytes {
					w.idle.Put(p.bytes)
				}
				w.progress.tell("writing", w.before+rows, w.total, w.began)
			case <-inner.Done():
				return context.Cause(inner)
			}
		}
	}
	return nil
}

// emitter makes rows of states.
type emitter struct {
	*writing
	loader  loader
	folder  Folder
	encoder Encoder
	state   State
	columns []place // of the part's table, see columnsOf
	values  []Value
	part    *part // that is being written
	ctx     context.Context
	out     chan<- piece
	piece   piece
}

// write makes the rows of one part.
func (m *emitter) write(ctx context.Context, p *part, out chan<- piece) error {
	p.late, p.written = Tally{}, 0
	m.part, m.ctx, m.out, m.piece = p, ctx, out, piece{}
	err := m.loader.states(ctx, p, &p.late, func(key, state []byte) error {
		m.state = State{Table: p.table, Key: key, State: state, Tally: &p.late}
		return m.folder.Rows(&m.state, m.row)
	})
	if err == nil {
		err = m.send()
	}
	return err
}

// row encodes a row.
func (m *emitter) row(r *Row) error {
	if m.piece.bytes == nil {
		if m.piece.bytes, _ = m.idle.Get().(*[]byte); m.piece.bytes == nil {
			b := make([]byte, 0, chunkBytes+chunkBytes/4)
			m.piece.bytes = &b
		}
	}
	if m.columns != nil {
		m.values = m.values[:0]
		for _, c := range m.columns {
			if c.from < 0 {
				m.values = append(m.values, c.value)
			} else {
				m.values = append(m.values, r.Values[c.from])
			}
		}
		r = &Row{Values: m.values}
	}
	var err error
	if *m.piece.bytes, err = m.encoder.AppendRow(*m.piece.bytes, r); err != nil {
		return err
	}
	m.piece.rows++
	m.part.written++
	if len(*m.piece.bytes) >= chunkBytes {
		return m.send()
	}
	return nil
}

// send gives what has been encoded to the writer.
func (m *emitter) send() error {
	if m.piece.bytes == nil {
		return nil
	}
	select {
	case m.out <- m.piece:
		m.piece = piece{}
		return nil
	case <-m.ctx.Done():
		return context.Cause(m.ctx)
	}
}
