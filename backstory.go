package backstory

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
)

// Config of a sidecar.
type Config struct {
	Capture capture.Config
	Log     eventlog.Config // an empty URL means the source's database
	// Once ends Run when everything up to the source's WAL position at its start is in the log.
	Once bool
	// Reactors, if not nil, tells the dispatcher which reactor gets which events.
	Reactors func(*sinks.Dispatcher) error
	// Logger is told of changes of state. Default: none.
	Logger *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Capture = c.Capture.WithDefaults()
	c.Capture.Logger, c.Log.Logger = c.Logger, c.Logger
	if c.Log.URL == "" {
		c.Log.URL = c.Capture.URL
	}
	return c
}

// Sidecar captures a source into its event log.
type Sidecar struct {
	cfg      Config
	log      *eventlog.Log
	dispatch *sinks.Dispatcher // nil without reactors
	started  time.Time

	now   atomic.Pointer[running]
	bad   atomic.Pointer[trouble]
	busy  atomic.Int64                    // since when, in unix nanoseconds, the log has been working on one batch; 0: it is not
	ended atomic.Pointer[eventlog.Counts] // what writers that have ended counted
}

// running is one attempt: a writer and a stream.
type running struct {
	writer *eventlog.Writer
	stream *capture.Stream
}

// trouble is why an attempt ended.
type trouble struct {
	err   error
	since time.Time
}

// New opens the event log. The sidecar does nothing before Run.
func New(ctx context.Context, cfg Config) (*Sidecar, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Capture.Validate(); err != nil {
		return nil, err
	}
	log, err := eventlog.Open(ctx, cfg.Log)
	if err != nil {
		return nil, err
	}
	s := &Sidecar{cfg: cfg, log: log, started: time.Now()}
	if cfg.Reactors == nil {
		return s, nil
	}
	if s.dispatch, err = sinks.New(sinks.Config{Log: log, Watcher: s, Logger: cfg.Logger}); err == nil {
		err = cfg.Reactors(s.dispatch)
	}
	if err != nil {
		log.Close()
		return nil, err
	}
	return s, nil
}

// Log gives the sidecar's event log.
func (s *Sidecar) Log() *eventlog.Log { return s.log }

// Close ends the connections.
func (s *Sidecar) Close() { s.log.Close() }

// Wait returns the log's last position as soon as it lies beyond after: at once when this process appended it, within a
// second when another did.
func (s *Sidecar) Wait(ctx context.Context, after eventlog.Position) (eventlog.Position, error) {
	for {
		short, cancel := context.WithTimeout(ctx, time.Second)
		if r := s.now.Load(); r != nil {
			p, err := r.writer.Wait(short, after)
			cancel()
			if err == nil || ctx.Err() != nil {
				return p, err
			}
			continue
		}
		h, err := s.log.Head(ctx)
		if err == nil && h.Position > after {
			cancel()
			return h.Position, nil
		}
		<-short.Done()
		cancel()
		if ctx.Err() != nil {
			return after, ctx.Err()
		}
	}
}

// Run captures until ctx ends, then drains: what is whole is appended and confirmed. Errors that pass by themselves (a
// server that restarts, a network that is cut) are waited out; any other is returned, with a hint what to do.
func (s *Sidecar) Run(ctx context.Context) error {
	if s.dispatch == nil {
		return s.capture(ctx)
	}
	// The reactors outlive the capture, so that what it appended last is still sent.
	reactCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	reacted := make(chan error, 1)
	go func() { reacted <- s.dispatch.Run(reactCtx) }()
	err := s.capture(ctx)
	if err == nil && s.cfg.Once {
		err = s.drain(ctx)
	}
	stop()
	if e := <-reacted; err == nil {
		err = e
	}
	return err
}

// drain waits until every reactor has sent what is in the log. One that cannot is an error.
func (s *Sidecar) drain(ctx context.Context) error {
	h, err := s.log.Head(ctx)
	if err != nil {
		return err
	}
	for {
		done := true
		for _, r := range s.dispatch.Status() {
			switch {
			case r.Position >= h.Position || r.State == sinks.StatePaused || r.State == sinks.StateStandby:
			case r.State == sinks.StateStopped, r.State == sinks.StateRetrying && r.Retries >= 5:
				return &eventlog.Problem{Err: fmt.Errorf("reactor %s stands at position %d of %d: %s", r.Name, r.Position, h.Position, r.Error), Hint: r.Hint}
			default:
				done = false
			}
		}
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// capture runs attempts until one ends for good.
func (s *Sidecar) capture(ctx context.Context) error {
	var until eventlog.LSN
	if s.cfg.Once {
		var err error
		if until, err = capture.CurrentLSN(ctx, s.cfg.Capture); err != nil {
			return err
		}
	}
	pause := 100 * time.Millisecond
	for {
		began := time.Now()
		err := s.attempt(ctx, until)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return nil
		}
		s.bad.Store(&trouble{err, time.Now()})
		if s.cfg.Once || !passes(err) {
			return err
		}
		if time.Since(began) > 30*time.Second {
			pause = 100 * time.Millisecond
		}
		s.cfg.Logger.Warn("capture was interrupted; trying again", "err", err, "hint", eventlog.Hint(err))
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, 15*time.Second)
	}
}

// total counts over all writers of this process.
func (s *Sidecar) total() eventlog.Counts {
	var c eventlog.Counts
	if e := s.ended.Load(); e != nil {
		c = *e
	}
	if r := s.now.Load(); r != nil {
		c.Add(r.writer.Stats().Counts())
	}
	return c
}

// attempt runs one writer and one stream until either ends.
func (s *Sidecar) attempt(ctx context.Context, until eventlog.LSN) error {
	captured, err := s.log.Captured(ctx)
	if err != nil {
		return err
	}
	w, err := s.log.NewWriter(ctx)
	if err != nil {
		return err
	}
	defer w.Close(context.WithoutCancel(ctx))
	if gap := w.Head().Gap; gap != "" {
		return gapProblem(gap)
	}
	streamCtx, stop := context.WithCancel(ctx)
	defer stop()
	stream := capture.NewStream(s.cfg.Capture, captured, w.Head().EndLSN)
	s.now.Store(&running{w, stream})
	defer func() {
		c := s.total()
		s.now.Store(nil)
		s.ended.Store(&c)
	}()
	done := make(chan error, 1)
	go func() { done <- stream.Run(streamCtx, until, w.Head) }()
	// Appending goes on after ctx has ended, until what was received is in the log; an operator's second signal ends the process.
	appendCtx := context.WithoutCancel(ctx)
	var failed error
	for b := range stream.Batches() {
		if failed == nil {
			s.busy.Store(time.Now().UnixNano())
			failed = w.Append(appendCtx, b)
			s.busy.Store(0)
			if failed == nil {
				stream.Flushed(w.Head().EndLSN)
				stream.Applied(w.Seen())
				s.bad.Store(nil)
			} else {
				stop()
			}
		}
		b.Release()
	}
	err = <-done
	if failed != nil {
		return failed
	}
	var gap *capture.Gap
	if errors.As(err, &gap) {
		if e := w.Gap(appendCtx, gap.Reason, gap.From, gap.To); e != nil {
			return fmt.Errorf("record a gap (%s): %w", gap.Reason, e)
		}
		return gapProblem(gap.Reason)
	}
	return err
}

func gapProblem(reason string) error {
	return &eventlog.Problem{Err: fmt.Errorf("%w: %s", ErrGap, reason), Hint: eventlog.GapHint}
}

// ErrGap means that the log may lack changes of the source, and says so in an event; a person has to decide how it goes on.
var ErrGap = errors.New("possible gap in the history")

// passes tells whether an error goes away by itself.
func passes(err error) bool {
	if errors.Is(err, ErrGap) || errors.Is(err, eventlog.ErrFenced) {
		return false
	}
	state := eventlog.SQLState(err)
	for _, class := range []string{"08", "57", "53", "25006", "40"} {
		if strings.HasPrefix(state, class) {
			return true
		}
	}
	if state != "" {
		return false
	}
	var p *eventlog.Problem
	if errors.As(err, &p) {
		return strings.Contains(err.Error(), "connect to")
	}
	return !strings.HasPrefix(err.Error(), "bug:")
}
