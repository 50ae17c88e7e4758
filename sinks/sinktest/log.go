package sinktest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
)

// Log is an event log in memory: the Log, Leases and Watcher of a dispatcher.
type Log struct {
	identity string

	mu          sync.Mutex // guards the following
	events      []*eventlog.Event
	changed     chan struct{}
	checkpoints map[string]*checkpoint
	readError   error
}

type checkpoint struct {
	eventlog.Checkpoint
	holder *Lease
	saves  int
	fails  int
}

var (
	_ sinks.Log     = (*Log)(nil)
	_ sinks.Leases  = (*Log)(nil)
	_ sinks.Watcher = (*Log)(nil)
	_ sinks.Lease   = (*Lease)(nil)
)

// NewLog makes an empty log with an identity.
func NewLog(identity string) *Log {
	return &Log{identity: identity, changed: make(chan struct{}), checkpoints: map[string]*checkpoint{}}
}

// Append puts events at the end of the log, and gives them their positions.
func (l *Log) Append(events ...*eventlog.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range events {
		e.Position = eventlog.Position(len(l.events) + 1)
		l.events = append(l.events, e)
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

// Events gives what is in the log.
func (l *Log) Events() []*eventlog.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.events)
}

// FailReads makes reading fail with err until it is called with nil.
func (l *Log) FailReads(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.readError = err
}

// Identity implements sinks.Log.
func (l *Log) Identity(context.Context) (string, error) { return l.identity, nil }

// Head implements sinks.Log.
func (l *Log) Head(context.Context) (*eventlog.Head, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := &eventlog.Head{Position: eventlog.Position(len(l.events))}
	if n := len(l.events); n > 0 {
		h.OccurredAt = l.events[n-1].OccurredAt
	}
	return h, l.readError
}

// Read implements sinks.Log, for the selections that dispatchers use.
func (l *Log) Read(ctx context.Context, sel eventlog.Selection, f func(*eventlog.Event) error) error {
	l.mu.Lock()
	events, err := l.events, l.readError
	l.mu.Unlock()
	if err != nil {
		return err
	}
	n := 0
	for _, e := range events {
		if e.Position <= sel.After || sel.Until > 0 && e.Position > sel.Until || e.Quiet && !sel.Quiet {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		c := e.Clone() // as with a real log, what is kept beyond f must be copied
		err := f(c)
		clear(c.Data)
		clear(c.Before)
		clear(c.Metadata)
		if err != nil {
			return err
		}
		if n++; n == sel.Limit {
			return nil
		}
	}
	return nil
}

// Wait implements sinks.Watcher.
func (l *Log) Wait(ctx context.Context, after eventlog.Position) (eventlog.Position, error) {
	for {
		l.mu.Lock()
		head, changed, err := eventlog.Position(len(l.events)), l.changed, l.readError
		l.mu.Unlock()
		if err != nil {
			return 0, err
		}
		if head > after {
			return head, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// Lease implements sinks.Leases.
func (l *Log) Lease(_ context.Context, name string, start eventlog.Start) (sinks.Lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.readError != nil {
		return nil, l.readError
	}
	c := l.checkpoints[name]
	if c == nil {
		c = &checkpoint{Checkpoint: eventlog.Checkpoint{Name: name}}
		if start == eventlog.FromHead {
			c.Position = eventlog.Position(len(l.events))
		}
		l.checkpoints[name] = c
	}
	if c.holder != nil {
		return nil, eventlog.ErrLeaseHeld
	}
	c.Epoch++
	c.holder = &Lease{log: l, name: name, epoch: c.Epoch, lost: make(chan struct{})}
	return c.holder, nil
}

// Checkpoint gives a reader's checkpoint, and how often it was saved since the log was made.
func (l *Log) Checkpoint(name string) (c eventlog.Checkpoint, saves int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if x := l.checkpoints[name]; x != nil {
		return x.Checkpoint, x.saves
	}
	return c, 0
}

// Revoke takes a reader's lease away, as when its session ends or another process takes over.
func (l *Log) Revoke(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.checkpoints[name]; c != nil && c.holder != nil {
		close(c.holder.lost)
		c.holder = nil
	}
}

// Pause sets or ends a reader's pause.
func (l *Log) Pause(name string, paused bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.checkpoints[name].Paused = paused
}

// Move puts a reader's checkpoint elsewhere.
func (l *Log) Move(name string, p eventlog.Position) {
	l.mu.Lock()
	l.checkpoints[name].Position = p
	l.mu.Unlock()
	l.Revoke(name)
}

// Lease is a lease of a Log.
type Lease struct {
	log   *Log
	name  string
	epoch int64
	lost  chan struct{}
}

// Checkpoint implements sinks.Lease.
func (le *Lease) Checkpoint() eventlog.Checkpoint {
	c, _ := le.log.Checkpoint(le.name)
	return c
}

// Valid implements sinks.Lease.
func (le *Lease) Valid() error {
	select {
	case <-le.lost:
		return fmt.Errorf("%w: reader %s", eventlog.ErrLeaseLost, le.name)
	default:
		return nil
	}
}

// Watch implements sinks.Lease.
func (le *Lease) Watch(ctx context.Context) error {
	select {
	case <-le.lost:
		return le.Valid()
	case <-ctx.Done():
		return nil
	}
}

// Save implements sinks.Lease.
func (le *Lease) Save(_ context.Context, p eventlog.Position) error {
	return le.write(func(c *checkpoint) {
		c.Position, c.Error, c.FailedAt = p, "", time.Time{}
		c.saves++
	})
}

// Fail implements sinks.Lease.
func (le *Lease) Fail(_ context.Context, cause error) error {
	return le.write(func(c *checkpoint) {
		c.Error = cause.Error()
		if c.FailedAt.IsZero() {
			c.FailedAt = time.Now()
		}
		c.fails++
	})
}

func (le *Lease) write(f func(*checkpoint)) error {
	le.log.mu.Lock()
	defer le.log.mu.Unlock()
	c := le.log.checkpoints[le.name]
	if c.holder != le {
		return fmt.Errorf("%w: reader %s", eventlog.ErrLeaseLost, le.name)
	}
	f(c)
	c.UpdatedAt = time.Now()
	return nil
}

// Release implements sinks.Lease.
func (le *Lease) Release(context.Context) error {
	le.log.mu.Lock()
	defer le.log.mu.Unlock()
	if c := le.log.checkpoints[le.name]; c.holder == le {
		close(le.lost)
		c.holder = nil
	}
	return nil
}
