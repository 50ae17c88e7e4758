package sinks

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// Config says where events come from. The reactors are added by Dispatcher.On.
type Config struct {
	// Log is read. Required.
	Log Log
	// Leases keeps the checkpoints. Default: those in Log, if that is an *eventlog.Log.
	Leases Leases
	// Watcher tells of new events. Default: Poll(Log, 200 ms).
	Watcher Watcher
	// StopTimeout is how long a Send may go on after Run's context has ended. Default 10 s.
	StopTimeout time.Duration
	// Logger is told of changes of state. Default: none.
	Logger *slog.Logger
}

// Dispatcher is the one place that says which reactor gets which event types, and runs the reactors: each on its own, so
// that a slow or dead destination holds back neither the others nor the log. It reads the live log only: a rebuild replays
// events through calculators and never meets a reactor.
type Dispatcher struct {
	cfg     Config
	log     *slog.Logger
	runners []*runner // in the order of their first On
	head    headFollower
	metrics *metrics

	mu      sync.Mutex // guards the following
	started bool
}

// New makes a dispatcher without reactors.
func New(cfg Config) (*Dispatcher, error) {
	if cfg.Log == nil {
		return nil, errors.New("dispatcher: no log")
	}
	if cfg.Leases == nil {
		l, ok := cfg.Log.(*eventlog.Log)
		if !ok {
			return nil, errors.New("dispatcher: no leases")
		}
		cfg.Leases = postgresLeases{l}
	}
	if cfg.Watcher == nil {
		cfg.Watcher = Poll(cfg.Log, 200*time.Millisecond)
	}
	if cfg.StopTimeout <= 0 {
		cfg.StopTimeout = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	d := &Dispatcher{cfg: cfg, log: cfg.Logger, metrics: newMetrics()}
	d.head.init(-1)
	return d, nil
}

// On gives a reactor the events whose type the pattern matches: OrderPaid, Order*, *Imported, *. It may be called for one
// reactor with several patterns, and for one pattern with several reactors, but not after Run.
func (d *Dispatcher) On(eventType string, r *Reactor) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.started {
		return errors.New("dispatcher: On after Run")
	}
	p := pattern(eventType)
	if err := p.validate(); err != nil {
		return err
	}
	for _, have := range d.runners {
		if have.origin == r {
			have.sel.patterns = append(have.sel.patterns, p)
			return nil
		}
	}
	c, err := r.withDefaults()
	if err != nil {
		return err
	}
	for _, have := range d.runners {
		if have.Name == c.Name {
			return fmt.Errorf("two reactors are called %s", c.Name)
		}
		if have.Sink == c.Sink {
			return fmt.Errorf("reactors %s and %s share a sink", have.Name, c.Name)
		}
	}
	d.runners = append(d.runners, newRunner(d, r, c, p))
	return nil
}

// Run forwards events until ctx ends, then lets what is being sent finish (StopTimeout), saves the checkpoints and
// returns nil. Errors of sinks and of the log's database do not end it; they are retried, and shown by Status.
func (d *Dispatcher) Run(ctx context.Context) error {
	d.mu.Lock()
	if d.started {
		d.mu.Unlock()
		return errors.New("dispatcher: Run twice")
	}
	d.started = true
	d.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { d.follow(ctx) })
	for _, r := range d.runners {
		wg.Go(func() { r.run(ctx) })
	}
	wg.Wait()
	return nil
}

// follow keeps the head known to all reactors.
func (d *Dispatcher) follow(ctx context.Context) {
	for wait := 100 * time.Millisecond; ; {
		p, err := d.cfg.Watcher.Wait(ctx, d.head.get())
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			d.head.fail(err)
			sleep(ctx, wait)
			wait = min(2*wait, 5*time.Second)
			if h, err := d.cfg.Log.Head(ctx); err == nil { // Wait may have nothing to tell for long
				d.head.set(h.Position)
			}
			continue
		}
		wait = 100 * time.Millisecond
		d.head.set(p)
	}
}

// CaughtUp waits until every reactor that is neither paused nor run by another process has sent what was selected up to
// a position, or until ctx ends; then the error says who has not, and why.
func (d *Dispatcher) CaughtUp(ctx context.Context, p eventlog.Position) error {
	for {
		var late []string
		for _, s := range d.Status() {
			if s.Position < p && s.State != StatePaused && s.State != StateStandby {
				why := ""
				if s.Error != "" {
					why = ": " + s.Error
				}
				late = append(late, fmt.Sprintf("%s at %d%s", s.Name, s.Position, why))
			}
		}
		if len(late) == 0 {
			return nil
		}
		if !sleep(ctx, 10*time.Millisecond) {
			return fmt.Errorf("wait for reactors to reach position %d: %s: %w", p, strings.Join(late, "; "), ctx.Err())
		}
	}
}

// Status tells how each reactor fares, in the order in which they were added.
func (d *Dispatcher) Status() []Status {
	out := make([]Status, 0, len(d.runners))
	head, since, err := d.head.state()
	for _, r := range d.runners {
		s := r.status.snapshot(head)
		if err != nil && s.Error == "" && s.State == StateRunning {
			s.State, s.Error, s.Hint, s.Since = StateRetrying, err.Error(), eventlog.Hint(err), since
		}
		out = append(out, s)
	}
	return out
}

// Names lists the reactors.
func (d *Dispatcher) Names() []string {
	var out []string
	for _, r := range d.runners {
		out = append(out, r.Name)
	}
	slices.Sort(out)
	return out
}

// headFollower is the last known head of the log, which many wait for.
type headFollower struct {
	mu      sync.Mutex // guards the following
	head    eventlog.Position
	changed chan struct{} // closed when head changes
	err     error         // why the head is not known at present
	since   time.Time     // of err
}

func (h *headFollower) init(p eventlog.Position) { h.head, h.changed = p, make(chan struct{}) }

func (h *headFollower) get() eventlog.Position {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.head
}

func (h *headFollower) set(p eventlog.Position) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.err = nil
	if p != h.head {
		h.head = p
		close(h.changed)
		h.changed = make(chan struct{})
	}
}

func (h *headFollower) fail(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil {
		h.since = time.Now().UTC()
	}
	h.err = err
}

func (h *headFollower) state() (head eventlog.Position, since time.Time, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.head, h.since, h.err
}

// wait returns the head as soon as it lies after a position.
func (h *headFollower) wait(ctx context.Context, after eventlog.Position) (eventlog.Position, error) {
	for {
		h.mu.Lock()
		p, changed := h.head, h.changed
		h.mu.Unlock()
		if p > after {
			return p, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}
