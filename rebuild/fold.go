package rebuild

import (
	"context"
	"errors"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// Fold is a selection of events, a calculator and a target: every verb that rebuilds something is one.
type Fold struct {
	Source     Source
	Selection  eventlog.Selection
	Calculator Calculator
	Target     Target
	// MaxMemoryBytes bounds the memory for state, beside one row change and a few MiB of buffers. What does not fit goes to
	// temporary files and is folded part by part. Default 128 MiB.
	MaxMemoryBytes int64
	// Workers fold and write rows; one more goroutine reads. Default: as many as processors.
	Workers int
	// TempDir is where temporary files go; on a disk, if memory is to be spared. Default: os.TempDir.
	TempDir string
	// Progress is called about five times a second, by one goroutine at a time. Optional.
	Progress func(Progress)
}

// Result tells what a fold has done.
type Result struct {
	Events       int64 // folded
	Tables       []TableResult
	SpilledBytes int64 // written to temporary files
}

// TableResult tells what a fold has made of one table.
type TableResult struct {
	*Table
	Parts []int // of the calculator's tables, by their index: itself, or the partitions whose rows it has
	Rows  int64
	Tally Tally
}

// fanOut is into how many parts a table is divided by the first bits of its keys' hashes, and again each part that does not
// fit into memory.
const (
	fanBits = 4
	fanOut  = 1 << fanBits
)

// engine is a running fold.
type engine struct {
	*Fold
	pool     *pagePool
	tables   []*Table
	parts    []*part // fanOut for each table
	workers  []*worker
	batch    int // bytes
	events   int64
	moved    []Tally // by table: of what was folded by Rekey
	rekeyed  int64   // bytes written to temporary files by Rekey
	progress progress
}

// part is the keys of one table whose hashes begin with the same bits. It belongs to one worker until all events are read.
type part struct {
	table   int
	worker  *worker
	store   *store // nil once it is spilled, and before the first step
	run     *run   // not nil once it is spilled
	tally   Tally  // of what was folded while reading
	late    Tally  // of what was folded, and of the rows that were made, while writing
	written int64  // rows
}

// Run folds. When it returns nil, the target holds the rows of the selected events, and only then.
func (f *Fold) Run(ctx context.Context) (result *Result, err error) {
	e := &engine{Fold: f}
	if f.MaxMemoryBytes <= 0 {
		f.MaxMemoryBytes = 128 << 20
	}
	if f.Workers <= 0 {
		f.Workers = runtime.GOMAXPROCS(0)
	}
	if f.TempDir == "" {
		f.TempDir = os.TempDir()
	}
	e.pool = newPagePool(f.MaxMemoryBytes)
	e.batch = int(min(max(f.MaxMemoryBytes/256, 4<<10), 128<<10))
	e.tables = f.Calculator.Tables()
	e.moved = make([]Tally, len(e.tables))
	for range f.Workers {
		e.workers = append(e.workers, &worker{engine: e, share: f.MaxMemoryBytes / int64(f.Workers), in: make(chan []byte, 4), idle: make(chan []byte, 6), rested: make(chan struct{}, 1),
			file: spillFile{dir: f.TempDir}, folder: f.Calculator.NewFolder()})
	}
	for i := range len(e.tables) * fanOut {
		e.parts = append(e.parts, &part{table: i / fanOut, worker: e.workers[i%len(e.workers)]})
	}
	for i, p := range e.parts {
		p.worker.parts = append(p.worker.parts, e.parts[i])
	}
	defer func() {
		for _, p := range e.parts {
			p.forget()
		}
		for _, w := range e.workers {
			err = errors.Join(err, w.file.close())
		}
		e.pool.close()
	}()
	e.progress = progress{report: f.Progress, began: time.Now(), until: f.Selection.Until}
	if err := e.read(ctx); err != nil {
		return nil, err
	}
	result = &Result{Events: e.events}
	if err := e.write(ctx, result); err != nil {
		return nil, err
	}
	result.SpilledBytes += e.rekeyed
	for _, w := range e.workers {
		result.SpilledBytes += w.file.written
	}
	return result, nil
}

// read folds all events into the parts.
func (e *engine) read(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, w := range e.workers {
		wg.Go(func() {
			if err := w.run(); err != nil {
				cancel(err)
				for range w.in { // until the reader has noticed
				}
			}
		})
	}
	r := &Router{engine: e, out: make([][]byte, len(e.workers)), ctx: ctx}
	err := e.Source.Read(ctx, e.Selection, func(ev *eventlog.Event) error {
		e.events++
		if e.events&0x3ff == 0 {
			e.progress.read(ev.Position, e.events)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
		return e.Calculator.Route(ev, r)
	})
	if err == nil {
		err = r.flush()
	}
	for _, w := range e.workers {
		close(w.in)
	}
	wg.Wait()
	if e := r.close(); err == nil {
		err = e
	}
	if ctx.Err() != nil {
		return context.Cause(ctx) // what a worker met, rather than what followed from it
	}
	return err
}

// Router takes the steps that Route gives to the workers. A calculator does not keep it.
type Router struct {
	engine *engine
	ctx    context.Context
	out    [][]byte  // by worker: the batch that is being filled
	used   int64     // memory of what Rekey has taken from the workers
	file   spillFile // for that
	loader loader    // of Rekey
}

// Step gives a step for a key; its payload may come in pieces. Nothing is kept of the arguments.
func (r *Router) Step(table int, key []byte, payload ...[]byte) error {
	hash := hashKey(key)
	n := table*fanOut + int(hash>>(64-fanBits))
	return r.give(n, recordStep, hash, key, payload)
}

// Clear forgets all keys of a table.
func (r *Router) Clear(table int) error {
	r.engine.moved[table] = Tally{}
	for n := table * fanOut; n < (table+1)*fanOut; n++ {
		if err := r.give(n, recordClear, 0, nil, nil); err != nil {
			return err
		}
	}
	return nil
}

// give appends a record to the batch for the part's worker, behind the part's number.
func (r *Router) give(n int, kind byte, hash uint64, key []byte, payload [][]byte) error {
	i := n % len(r.out)
	b := r.out[i]
	if b == nil {
		select {
		case b = <-r.engine.workers[i].idle:
		default:
			b = make([]byte, 0, r.engine.batch+r.engine.batch/4)
		}
	}
	b = append(b, byte(n), byte(n>>8), byte(n>>16), byte(n>>24))
	b = appendRecord(b, kind, hash, key, payload...)
	r.out[i] = b
	if len(b) < r.engine.batch {
		return nil
	}
	return r.send(i)
}

func (r *Router) send(i int) error {
	select {
	case r.engine.workers[i].in <- r.out[i]:
		r.out[i] = nil
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

func (r *Router) flush() error {
	for i, b := range r.out {
		if len(b) > 0 {
			if err := r.send(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// worker folds the steps of its parts while the events are read.
type worker struct {
	*engine
	parts   []*part
	share   int64       // of the memory
	used    int64       // by its parts
	stores  int         // how many of them are in memory
	spilled int         // how many are not
	in      chan []byte // batches, in order; nil asks to be told when it is reached
	idle    chan []byte // batches to be filled again
	rested  chan struct{}
	file    spillFile
	folder  Folder
	scratch []byte
	step    Step
	touched byte
}

func (w *worker) run() error {
	var ahead [lookAhead]struct {
		record
		part *part
		slot uint64
	}
	for batch := range w.in {
		if batch == nil {
			w.rested <- struct{}{}
			continue
		}
		for b := batch; len(b) > 0; {
			n := 0
			for ; n < len(ahead) && len(b) > 0; n++ {
				x := &ahead[n]
				x.part = w.engine.parts[uint32(b[0])|uint32(b[1])<<8|uint32(b[2])<<16|uint32(b[3])<<24]
				x.record, b = nextRecord(b[4:])
				if x.slot = 0; x.part.store != nil {
					x.slot = x.part.store.warm1(x.hash)
				}
			}
			for i := range ahead[:n] {
				if x := &ahead[i]; x.slot != 0 {
					w.touched |= x.part.store.warm2(x.slot)
				}
			}
			for i := range ahead[:n] {
				if err := w.apply(ahead[i].part, &ahead[i].record); err != nil {
					return err
				}
				if w.used > w.share && w.stores > 0 {
					if err := w.relieve(); err != nil {
						return err
					}
				}
			}
		}
		if cap(batch) <= 2*w.batch {
			select {
			case w.idle <- batch[:0]:
			default:
			}
		}
	}
	return nil
}

// apply does what a record says.
func (w *worker) apply(p *part, r *record) error {
	if r.kind == recordClear {
		if p.run != nil {
			w.spilled--
		}
		if p.store != nil {
			w.stores--
		}
		p.forget()
		p.tally = Tally{}
		return nil
	}
	if p.run != nil {
		return p.run.add(r.raw, w.buffer())
	}
	if p.store == nil {
		p.store = newStore(w.pool, &w.used, fanBits)
		w.stores++
	}
	var err error
	w.scratch, err = fold(w.folder, &w.step, w.scratch, p.store, p.table, r, &p.tally)
	if errors.Is(err, errStoreFull) {
		if err := w.spill(p); err != nil {
			return err
		}
		return p.run.add(r.raw, w.buffer())
	}
	return err
}

// errStoreFull means that a store can take no more keys, whatever the memory.
var errStoreFull = errors.New("bug: too many keys, or too long a key, in one part of a table")

// fold folds one step into a store.
func fold(f Folder, s *Step, scratch []byte, st *store, table int, r *record, tally *Tally) ([]byte, error) {
	at := st.find(r.hash, r.key)
	if r.kind == recordState {
		if !st.put(at, r.hash, r.key, r.payload) {
			return scratch, errStoreFull
		}
		return scratch, nil
	}
	*s = Step{Table: table, Key: r.key, Payload: r.payload, Tally: tally}
	var before []byte
	if at.ok {
		before = st.state(at)
	}
	scratch, err := f.Fold(scratch[:0], before, s)
	switch {
	case err != nil:
		return scratch, err
	case len(scratch) > 0:
		if !st.put(at, r.hash, r.key, scratch) {
			return scratch, errStoreFull
		}
	case at.ok:
		st.remove(at)
	}
	if cap(scratch) > 1<<20 {
		scratch = nil
	}
	return scratch, nil
}

// buffer is how much each spilled part may buffer.
func (w *worker) buffer() int {
	return int(min(max(w.share/4/int64(w.spilled+1), 1<<10), 64<<10))
}

// relieve brings the memory back below the worker's share: the largest part goes to the file, and what it gets from now on.
// Beyond that there are only buffers, which buffer bounds.
func (w *worker) relieve() error {
	for w.used > w.share && w.stores > 0 {
		var largest *part
		for _, p := range w.parts {
			if p.store != nil && (largest == nil || p.store.bytes > largest.store.bytes) {
				largest = p
			}
		}
		if err := w.spill(largest); err != nil {
			return err
		}
	}
	return nil
}

// spill moves a part to the file.
func (w *worker) spill(p *part) error {
	w.spilled++
	w.stores--
	return p.spill(&w.file, &w.used, w.buffer())
}

// spill moves a part to a file.
func (p *part) spill(file *spillFile, used *int64, limit int) error {
	p.run = &run{file: file, used: used, states: p.store.n}
	err := dump(p.store, func(raw []byte, _ uint64) error { return p.run.add(raw, limit) })
	p.store.clear()
	p.store = nil
	return err
}

// dump gives the records that make a store again.
func dump(st *store, f func(raw []byte, hash uint64) error) error {
	var raw []byte
	return st.all(func(key, state []byte) error {
		hash := hashKey(key)
		raw = appendRecord(raw[:0], recordState, hash, key, state)
		return f(raw, hash)
	})
}

// forget drops all that a part holds.
func (p *part) forget() {
	if p.store != nil {
		p.store.clear()
		p.store = nil
	}
	if p.run != nil {
		p.run.clear()
		p.run = nil
	}
}

// progress tells people how far a fold is.
type progress struct {
	report func(Progress)
	began  time.Time
	until  eventlog.Position
	last   time.Time
	events int64
}

// Progress tells how far a fold is.
type Progress struct {
	Phase     string        // "reading" or "writing"
	Done      int64         // positions of the log that have been passed, or rows that have been written
	Total     int64         // 0: not known
	Events    int64         // folded so far
	Rate      float64       // Done per second, in this phase
	Elapsed   time.Duration // since the fold began
	Remaining time.Duration // of this phase, by the rate so far; 0: not known
}

const progressEvery = 200 * time.Millisecond

func (p *progress) read(at eventlog.Position, events int64) {
	p.events = events
	p.tell("reading", int64(at), int64(p.until), p.began)
}

func (p *progress) tell(phase string, done, total int64, since time.Time) {
	now := time.Now()
	if p.report == nil || now.Sub(p.last) < progressEvery {
		return
	}
	p.last = now
	t := Progress{Phase: phase, Done: done, Total: total, Events: p.events, Elapsed: now.Sub(p.began)}
	if d := now.Sub(since).Seconds(); d > 0 {
		t.Rate = float64(done) / d
		if total > done && t.Rate > 0 {
			t.Remaining = time.Duration(float64(total-done) / t.Rate * float64(time.Second))
		}
	}
	p.report(t)
}
