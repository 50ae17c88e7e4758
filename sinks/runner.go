package sinks

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

const (
	standbyEvery    = 5 * time.Second  // between attempts to get a lease that another process holds
	pausedEvery     = time.Second      // between looks at whether the pause is over
	recordEvery     = time.Minute      // between writes of the same error into the checkpoint
	logEvery        = time.Minute      // between lines in the log about the same error
	cleanupLimit    = 5 * time.Second  // for the last write of the checkpoint, for closing the sink
	leaseWatchLimit = 15 * time.Second // for taking a lease
)

// runner runs one reactor.
type runner struct {
	Reactor
	d       *Dispatcher
	origin  *Reactor
	sel     selection
	log     *slog.Logger
	status  statusBoard
	failure failure // owned by run
	batches [2]batch
	reader  batchReader
}

// failure is the error that a reactor is in, if any.
type failure struct {
	err      error
	since    time.Time
	retries  int
	logged   time.Time
	recorded time.Time
	text     string // as recorded
}

func newRunner(d *Dispatcher, origin *Reactor, r Reactor, p pattern) *runner {
	run := &runner{Reactor: r, d: d, origin: origin, log: d.log.With("reactor", r.Name),
		sel: selection{patterns: []pattern{p}, quiet: r.Quiet, sideEffect: r.SideEffect}}
	run.status.now = time.Now
	run.status.s = Status{Name: r.Name, State: StateStarting}
	run.reader = batchReader{log: d.cfg.Log, sel: &run.sel, maxBytes: r.MaxBatchBytes}
	// So that rates begin at 0.
	d.metrics.sent.WithLabelValues(r.Name)
	d.metrics.skipped.WithLabelValues(r.Name)
	d.metrics.errors.WithLabelValues(r.Name)
	return run
}

// run begins sessions until ctx ends or a bug is met.
func (r *runner) run(ctx context.Context) {
	defer r.state(StateStopped)
	for first := true; ctx.Err() == nil; first = false {
		if first {
			r.state(StateStarting)
		}
		err := r.session(ctx)
		if ctx.Err() != nil {
			return
		}
		switch {
		case errors.Is(err, eventlog.ErrLeaseHeld):
			if r.status.snapshot(0).State != StateStandby {
				r.log.Info("another process runs this reactor; waiting for it to end")
			}
			r.status.set(func(s *Status) { s.State, s.Error, s.Hint, s.Since, s.Retries = StateStandby, "", "", time.Time{}, 0 })
			r.failure = failure{}
			sleep(ctx, standbyEvery/2+rand.N(standbyEvery/2))
		case classify(err) == classLease:
			r.log.Warn("reactor lost its lease; beginning again", "err", err)
			sleep(ctx, r.MinBackoff)
		default:
			if !r.failed(ctx, nil, err) {
				return
			}
		}
	}
}

// session runs the reactor under one lease.
func (r *runner) session(ctx context.Context) (err error) {
	leaseCtx, cancelLease := context.WithTimeout(ctx, leaseWatchLimit)
	lease, err := r.d.cfg.Leases.Lease(leaseCtx, r.Name, r.Start)
	cancelLease()
	if err != nil {
		return err
	}
	// work ends with ctx or with the lease; send outlives ctx by StopTimeout, so that a batch on its way arrives.
	work, stopWork := context.WithCancelCause(ctx)
	send, stopSend := context.WithCancelCause(context.WithoutCancel(ctx))
	defer context.AfterFunc(ctx, func() {
		if !sleep(send, r.d.cfg.StopTimeout) {
			return
		}
		stopSend(context.Cause(ctx))
	})()
	var wg sync.WaitGroup
	wg.Go(func() {
		// The lease is kept while the last batch is on its way.
		if err := lease.Watch(send); err != nil {
			stopWork(err)
			stopSend(err)
		}
	})
	defer func() {
		stopWork(nil)
		stopSend(nil)
		wg.Wait()
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
		defer cancel()
		_ = lease.Release(clean)
	}()
	return r.forward(work, send, lease)
}

// forward opens the sink and sends until work ends.
func (r *runner) forward(work, send context.Context, lease Lease) (err error) {
	at := lease.Checkpoint()
	r.status.set(func(s *Status) { s.Position, s.Checkpoint = at.Position, at.Position })
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(work), cleanupLimit)
		defer cancel()
		if p := r.status.snapshot(0).Position; p > lease.Checkpoint().Position && lease.Valid() == nil {
			if serr := r.save(clean, lease, p); serr != nil && err == nil {
				err = serr
			}
		}
		if cerr := r.Sink.Close(clean); cerr != nil {
			r.log.Warn("close sink", "err", cerr)
		}
	}()

	from, err := r.open(work, lease)
	if err != nil {
		return err
	}
	r.status.set(func(s *Status) { s.Position = from })

	free, full := make(chan *batch, len(r.batches)), make(chan *batch)
	for i := range r.batches {
		free <- &r.batches[i]
	}
	reading, stopReading := context.WithCancelCause(work)
	var wg sync.WaitGroup
	wg.Go(func() { stopReading(r.read(reading, from, free, full)) })
	defer wg.Wait()
	defer stopReading(nil)

	tick := time.NewTicker(min(max(r.CheckpointEvery, 100*time.Millisecond), pausedEvery))
	defer tick.Stop()
	saved := time.Now()
	for {
		incoming := full
		if lease.Checkpoint().Paused {
			incoming = nil
			if r.status.snapshot(0).State != StatePaused {
				r.log.Info("reactor paused")
				r.state(StatePaused)
			}
		} else if r.failure.err == nil && r.status.snapshot(0).State != StateRunning {
			r.log.Info("reactor running", "position", r.status.snapshot(0).Position)
			r.state(StateRunning)
		}
		select {
		case b := <-incoming:
			if err := r.deliver(work, send, lease, b); err != nil {
				return err
			}
			free <- b
		case <-tick.C:
		case <-reading.Done():
			if work.Err() != nil {
				return context.Cause(work)
			}
			return context.Cause(reading)
		}
		p, c := r.status.snapshot(0).Position, lease.Checkpoint()
		due := r.CheckpointEvery < 0 || c.Paused || time.Since(saved) >= r.CheckpointEvery
		if p > c.Position && due || c.Error != "" && r.failure.err == nil {
			saved = time.Now()
			if err := r.save(send, lease, p); err != nil {
				return err
			}
		}
	}
}

// open opens the sink, as often as it takes.
func (r *runner) open(ctx context.Context, lease Lease) (eventlog.Position, error) {
	for {
		at := lease.Checkpoint()
		if at.Paused {
			r.state(StatePaused)
			if !sleep(ctx, pausedEvery) {
				return 0, context.Cause(ctx)
			}
			continue
		}
		var from eventlog.Position
		id, err := r.d.cfg.Log.Identity(ctx)
		if err == nil {
			err = guard(func() (err error) {
				from, err = r.Sink.Open(ctx, Start{After: at.Position, Log: id, Reactor: r.Name, First: at.Epoch == 1, Verify: r.verify})
				return err
			})
		}
		if err == nil {
			r.recovered()
			if from > at.Position {
				r.log.Info("the destination is ahead of the checkpoint; going on from there", "position", from, "checkpoint", at.Position)
			}
			return max(from, at.Position), nil
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if c := classify(err); c == classStop || c == classLease {
			return 0, err
		}
		if !r.failed(ctx, lease, err) {
			return 0, context.Cause(ctx)
		}
	}
}

// read fills batches ahead of the sending.
func (r *runner) read(ctx context.Context, after eventlog.Position, free <-chan *batch, full chan<- *batch) error {
	for {
		var b *batch
		select {
		case b = <-free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		head, err := r.d.head.wait(ctx, after)
		if err != nil {
			return err
		}
		if err := r.reader.fill(ctx, b, after, head); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
		after = b.through
		select {
		case full <- b:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// deliver sends a batch, as often as it takes.
func (r *runner) deliver(work, send context.Context, lease Lease, b *batch) error {
	r.status.pending(b.oldest)
	for len(b.events) > 0 {
		if err := lease.Valid(); err != nil {
			return err
		}
		if r.failure.err != nil && lease.Checkpoint().Paused {
			r.state(StatePaused)
			if !sleep(work, pausedEvery) {
				return context.Cause(work)
			}
			continue
		}
		began := time.Now()
		err := guard(func() error { return r.Sink.Send(send, b.events) })
		if err == nil {
			r.d.metrics.sendSeconds.WithLabelValues(r.Name).Observe(time.Since(began).Seconds())
			break
		}
		if lerr := lease.Valid(); lerr != nil {
			return lerr
		}
		if work.Err() != nil || send.Err() != nil {
			return context.Cause(work)
		}
		if c := classify(err); c == classStop || c == classLease {
			return err
		}
		if !r.failed(work, lease, err) {
			return context.Cause(work)
		}
	}
	n := len(b.events)
	r.recovered()
	r.status.pending(time.Time{})
	r.status.set(func(s *Status) { s.Position = b.through; s.Sent += int64(n) })
	r.d.metrics.sent.WithLabelValues(r.Name).Add(float64(n))
	r.d.metrics.skipped.WithLabelValues(r.Name).Add(float64(int64(b.through-b.after) - int64(n)))
	return nil
}

func (r *runner) save(ctx context.Context, lease Lease, p eventlog.Position) error {
	if err := lease.Save(ctx, p); err != nil {
		return err
	}
	r.status.set(func(s *Status) { s.Checkpoint = p })
	return nil
}

// failed notes an error, tells of it, and waits before the next attempt. It is false if there will be none: ctx ended, or
// the error is a bug.
func (r *runner) failed(ctx context.Context, lease Lease, err error) bool {
	f, now := &r.failure, time.Now()
	if f.err == nil {
		f.since = now
	}
	c := classify(err)
	same := f.err != nil && f.err.Error() == err.Error()
	f.err = err
	f.retries++
	r.d.metrics.errors.WithLabelValues(r.Name).Inc()
	state := StateRetrying
	if c == classStop {
		state = StateStopped
	}
	r.status.set(func(s *Status) {
		s.State, s.Error, s.Hint, s.Since, s.Retries = state, err.Error(), eventlog.Hint(err), f.since.UTC(), f.retries
	})
	if !same || now.Sub(f.logged) >= logEvery {
		f.logged = now
		level := slog.LevelWarn
		if c != classRetry {
			level = slog.LevelError
		}
		r.log.Log(ctx, level, "reactor cannot go on", "err", err, "hint", eventlog.Hint(err), "position", r.status.snapshot(0).Position, "attempts", f.retries)
	}
	if lease != nil && (f.text == "" || now.Sub(f.recorded) >= recordEvery || f.text != err.Error() && now.Sub(f.recorded) >= recordEvery/10) {
		f.recorded, f.text = now, err.Error()
		if ferr := lease.Fail(ctx, err); ferr != nil && ctx.Err() == nil {
			r.log.Warn("record the reactor's error", "err", ferr)
		}
	}
	if c == classStop {
		return false
	}
	least := r.MinBackoff
	if c == classTell {
		least = max(least, r.MaxBackoff/30) // a person is slower
	}
	wait := min(least<<min(f.retries-1, 20), r.MaxBackoff)
	return sleep(ctx, wait/2+rand.N(wait/2+1))
}

// recovered ends an error. The next Save clears it in the checkpoint, too.
func (r *runner) recovered() {
	if r.failure.err == nil {
		return
	}
	r.log.Info("reactor recovered", "attempts", r.failure.retries, "after", time.Since(r.failure.since).Round(time.Millisecond))
	r.failure = failure{}
	r.status.set(func(s *Status) { s.State, s.Error, s.Hint, s.Since, s.Retries = StateStarting, "", "", time.Time{}, 0 })
}

func (r *runner) state(st State) {
	r.status.set(func(s *Status) {
		if s.State != StateStopped || st == StateStarting { // a bug stays visible
			s.State = st
		}
	})
}

// verify is Start.Verify.
func (r *runner) verify(ctx context.Context, p eventlog.Position, id eventlog.ID) error {
	h, err := r.d.cfg.Log.Head(ctx)
	if err != nil {
		return err
	}
	if p > h.Position {
		return otherHistory(p, id, fmt.Sprintf("the log ends at %d", h.Position))
	}
	found := false
	err = r.d.cfg.Log.Read(ctx, eventlog.Selection{After: p - 1, Until: p, Quiet: true, NoMetadata: true}, func(e *eventlog.Event) error {
		found = true
		if e.ID != id {
			return otherHistory(p, id, fmt.Sprintf("in the log it is %s", e.ID))
		}
		return nil
	})
	if err == nil && !found {
		return otherHistory(p, id, "the log has none there")
	}
	return err
}

// guard turns a panic of a sink into ErrBug, so that it stays one reactor's.
func guard(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: panic in the sink: %v\n%s", ErrBug, v, debug.Stack())
		}
	}()
	return f()
}
