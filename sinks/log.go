package sinks

import (
	"context"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// Log is what a dispatcher reads. *eventlog.Log is one; sinktest has one in memory.
type Log interface {
	Head(ctx context.Context) (*eventlog.Head, error)
	Read(ctx context.Context, sel eventlog.Selection, f func(*eventlog.Event) error) error
	Identity(ctx context.Context) (string, error)
}

// Lease is the right to run one reactor; see eventlog.Lease.
type Lease interface {
	Checkpoint() eventlog.Checkpoint
	Valid() error
	Watch(ctx context.Context) error
	Save(ctx context.Context, p eventlog.Position) error
	Fail(ctx context.Context, cause error) error
	Release(ctx context.Context) error
}

// Leases gives out leases.
type Leases interface {
	Lease(ctx context.Context, name string, start eventlog.Start) (Lease, error)
}

// Watcher tells of new events: Wait returns the log's head as soon as it lies after a position.
type Watcher interface {
	Wait(ctx context.Context, after eventlog.Position) (eventlog.Position, error)
}

var (
	_ Log   = (*eventlog.Log)(nil)
	_ Lease = (*eventlog.Lease)(nil)
)

// postgresLeases are those of an event log in Postgres.
type postgresLeases struct{ log *eventlog.Log }

func (p postgresLeases) Lease(ctx context.Context, name string, start eventlog.Start) (Lease, error) {
	le, err := p.log.Lease(ctx, name, start)
	if err != nil {
		return nil, err
	}
	return le, nil
}

// Poll is a Watcher that looks at the head every interval: for a process that does not write the log itself.
func Poll(log Log, interval time.Duration) Watcher { return poller{log, interval} }

type poller struct {
	log      Log
	interval time.Duration
}

func (p poller) Wait(ctx context.Context, after eventlog.Position) (eventlog.Position, error) {
	for {
		h, err := p.log.Head(ctx)
		if err != nil {
			return 0, err
		}
		if h.Position > after {
			return h.Position, nil
		}
		if !sleep(ctx, p.interval) {
			return 0, ctx.Err()
		}
	}
}

// sleep waits; it is false if ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
