package backstory

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/rules"
	"github.com/backstory-dev/backstory/sinks"
)

// Config of a sidecar.
type Config struct {
	Capture capture.Config
	Log     eventlog.Config // an empty URL means the source's database
	// Rules decide which events row changes become. Default: those of no file, or Log.Rules.
	Rules *rules.File
	// Once ends Run when everything up to the source's WAL position at its start is in the log, and all existing rows are.
	Once bool
	// NoBaseline makes Init record that rows that existed before their table was captured are not to be taken over.
	NoBaseline bool
	// WALAlarmBytes is how much WAL the source may keep for the slot before that is said, once a minute; 0: it never is.
	WALAlarmBytes int64
	// WALLimitBytes is how much the source may keep for the slot before the slot is dropped, lest the source's disk fill up: a gap; 0: it is
	// never dropped.
	WALLimitBytes int64
	// CompareInterval is how often the tables of which only inserts are in the stream are compared with the source, if it counts updates or deletes
	// of them since; more rarely where a comparison takes longer than a hundredth of that. 0: never.
	CompareInterval time.Duration
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
	if c.Rules != nil {
		c.Log.Rules = c.Rules
	}
	return c
}

// Sidecar captures a source into its event log.
type Sidecar struct {
	cfg      Config
	log      *eventlog.Log
	dispatch *sinks.Dispatcher // nil without reactors
	started  time.Time

	counting sync.Mutex // see contents

	lag    lag
	warned bool // of what doctor would find; owned by capture
	now    atomic.Pointer[running]
	bad    atomic.Pointer[trouble]
	stuck  time.Duration                   // how long one batch may take before the process counts as stuck
	busy   atomic.Pointer[step]            // what an attempt is waiting for, beside the stream itself; nil: nothing
	ended  atomic.Pointer[eventlog.Counts] // what writers that have ended counted

	memory capture.Memory  // owned by capture, as the next
	told   eventlog.Counts // the counts of context messages that were last complained of
	toldAt time.Time

	out          map[string]bool    // tables that somebody took out of the publications
	met          bool               // the last attempt met a table that was not recorded as captured
	lookedAt     *eventlog.Position // where the log ended when it was last looked for new tables, or when the process began to capture
	left         map[string]bool    // tables that the role may not publish, of which that was said; nil before the first look
	generations  map[uint32]int64   // of what was to be done with altered tables when the attempt began; owned by capture, as the next
	restartAt    time.Time          // before then an attempt is not ended for such a table
	restartEvery time.Duration

	dropped    atomic.Pointer[int64] // how much WAL the slot kept when the guard dropped it
	streamed   atomic.Bool           // this process has
	baselineAt time.Time             // when it was last said how far existing rows are; zero: none are taken over
	compared   bool                  // … and that they were being compared

	rules    atomic.Pointer[rules.File] // nil: those of no file
	fit      bool                       // they have been compared with the tables; owned by capture, as the next
	noted    *rules.File                // whose troubles were said, and how many
	troubles int

	ruleErrors   int64 // how many were said, and when
	ruleErrorsAt time.Time

	unprotected   string // what protect said last, owned by capture as well
	unprotectedAt time.Time
}

// running is one attempt: a writer, a stream, and the taking over of existing rows.
type running struct {
	writer *eventlog.Writer
	stream *capture.Stream
	rows   *capture.Import
}

// trouble is why attempts end.
type trouble struct {
	err   error
	since time.Time
	said  time.Time // when it was last logged
	times int
}

// New opens the event log. The sidecar does nothing before Run. If the log's server does not answer, that is an error with
// Config.Once; otherwise Run waits for it, as it does whenever that happens later.
func New(ctx context.Context, cfg Config) (*Sidecar, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Capture.Validate(); err != nil {
		return nil, err
	}
	log, err := eventlog.Attach(cfg.Log)
	if err != nil {
		return nil, err
	}
	if err := log.Check(ctx); err != nil && (cfg.Once || !passes(err)) {
		log.Close()
		return nil, err
	}
	s := &Sidecar{cfg: cfg, log: log, started: time.Now(), stuck: 2 * time.Minute}
	s.rules.Store(cfg.Rules)
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
//
// With Config.Once it ends by itself, and an earlier end of ctx is an error.
func (s *Sidecar) Run(ctx context.Context) error {
	err := s.run(ctx)
	if err == nil && s.cfg.Once && ctx.Err() != nil {
		err = fmt.Errorf("ended before everything was in the log: %w", ctx.Err())
	}
	return err
}

func (s *Sidecar) run(ctx context.Context) error {
	watchCtx, end := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() { defer close(watched); s.watch(watchCtx) }()
	var guarded sync.WaitGroup
	guarded.Go(func() { s.guard(watchCtx) })
	defer func() { end(); <-watched; guarded.Wait() }()
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

// standbyLimit is how long a run that ends by itself waits for somebody else's use of the slot to end: mostly a connection
// of the run before, which the server has not yet given up.
const standbyLimit = 10 * time.Second

// capture runs attempts until one ends for good.
func (s *Sidecar) capture(ctx context.Context) error {
	var until eventlog.LSN
	if s.cfg.Once {
		var err error
		if until, err = capture.CurrentLSN(ctx, s.cfg.Capture); err != nil {
			return err
		}
	}
	defer s.noteContext(0)
	started := time.Now()
	const shortest, longest = 100 * time.Millisecond, 5 * time.Second
	pause, planned := shortest, 0
	for {
		err := s.attempt(ctx, until)
		if err == nil {
			s.bad.Store(nil)
			return nil
		}
		if ctx.Err() != nil {
			if !errors.Is(err, context.Canceled) {
				s.bad.Store(&trouble{err: err, since: time.Now()})
			}
			return nil
		}
		standby := errors.Is(err, capture.ErrSlotInUse)
		again := !s.cfg.Once || standby && time.Since(started) < standbyLimit || errors.Is(err, capture.ErrTablesChanged)
		if !passes(err) || !again {
			return err
		}
		if s.bad.Load() == nil { // it had worked
			pause = shortest
		}
		if errors.Is(err, eventlog.ErrReadOnly) { // a session that began read-only stays so, whatever becomes of the server
			s.log.Pool().Reset()
		}
		s.trouble(err)
		// A stream that init has ended begins anew at once; but not for ever, should that not help.
		if s.memory.Met() {
			s.met, planned = true, 0
		}
		if planned++; !errors.Is(err, capture.ErrTablesChanged) {
			planned = 0
		} else if planned <= 10 {
			pause = shortest
		}
		if !s.wait(ctx, pause/2+rand.N(pause)) {
			return nil
		}
		if pause = min(2*pause, longest); standby {
			pause = min(pause, time.Second) // whoever takes over should not be long in coming
		}
	}
}

// wait lets time pass between two attempts, and looks after the application meanwhile: without a stream nobody else does. It is false
// when ctx has ended.
func (s *Sidecar) wait(ctx context.Context, d time.Duration) bool {
	const protectEvery = 2 * time.Second
	for until := time.Now().Add(d); ; {
		s.protect(ctx)
		left := time.Until(until)
		select {
		case <-time.After(min(left, protectEvery)):
		case <-ctx.Done():
			return false
		}
		if left <= protectEvery {
			return true
		}
	}
}

// protect takes tables that have lost their key out of the publication. What keeps it from that is said when it is new, then every minute.
func (s *Sidecar) protect(ctx context.Context) {
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := capture.Protect(short, s.cfg.Capture)
	if err == nil || passes(err) || short.Err() != nil { // then it was just told what is wrong
		return
	}
	if text := err.Error(); text != s.unprotected || time.Since(s.unprotectedAt) >= time.Minute {
		s.unprotected, s.unprotectedAt = text, time.Now()
		s.cfg.Logger.Warn("what is published could not be looked after", "err", err, "hint", eventlog.Hint(err))
	}
}

// trouble notes why there is no capture, and says so: at once where the reason is new, then every minute.
func (s *Sidecar) trouble(err error) {
	now := time.Now()
	t := &trouble{err: err, since: now, said: now}
	if old := s.bad.Load(); old != nil && old.err.Error() == err.Error() {
		t.since, t.said, t.times = old.since, old.said, old.times
	}
	t.times++
	if t.times == 1 || now.Sub(t.said) >= time.Minute {
		t.said = now
		if errors.Is(err, capture.ErrTablesChanged) && t.times == 1 {
			s.cfg.Logger.Info("what is captured has changed; the stream begins anew", "reason", err)
		} else if errors.Is(err, capture.ErrSlotInUse) {
			s.cfg.Logger.Info("another process captures this source; waiting to take over", "err", err, "hint", eventlog.Hint(err), "attempts", t.times)
		} else {
			s.cfg.Logger.Warn("capture is interrupted; trying again", "err", err, "hint", eventlog.Hint(err), "attempts", t.times)
		}
	}
	s.bad.Store(t)
}

// recovered ends the trouble, which was over at a time.
func (s *Sidecar) recovered(at time.Time) {
	if t := s.bad.Swap(nil); t != nil {
		s.cfg.Logger.Info("capture goes on", "after", at.Sub(t.since).Round(time.Millisecond), "attempts", t.times)
	}
}

// ContextProblems tells what an application does wrong when it says who and why, given how many of its context messages were
// malformed and how many ignored; nil if nothing.
func ContextProblems(malformed, ignored int64) (out []*eventlog.Problem) {
	were := func(n int64, what string) error {
		if n == 1 {
			return fmt.Errorf("1 context message was %s", what)
		}
		return fmt.Errorf("%d context messages were %s", n, what)
	}
	if malformed > 0 {
		out = append(out, &eventlog.Problem{Err: were(malformed, "not a JSON object that Postgres can store"),
			Hint: `What was said is kept in the metadata of the events of its transaction, if there are any, under "malformed". Emit {"actor": "…", "reason": "…"}.`})
	}
	if ignored > 0 {
		out = append(out, &eventlog.Problem{Err: were(ignored, "not transactional, and so without a change to belong to"),
			Hint: "Emit them with true: SELECT pg_logical_emit_message(true, 'backstory', '{…}'), in the transaction that makes the changes, before them."})
	}
	return out
}

// noteContext says what is wrong with the application's context messages, where there were more of them since it was last said.
func (s *Sidecar) noteContext(every time.Duration) {
	now := s.total()
	if now.MalformedContext == s.told.MalformedContext && now.IgnoredContext == s.told.IgnoredContext || time.Since(s.toldAt) < every {
		return
	}
	s.told, s.toldAt = now, time.Now()
	for _, p := range ContextProblems(now.MalformedContext, now.IgnoredContext) {
		s.cfg.Logger.Warn("who and why cannot be read", "err", p.Err, "hint", p.Hint)
	}
}

// Interrupted tells, after Run has ended, why not everything that was received is in the log; nil: it is. The source keeps what is
// not.
func (s *Sidecar) Interrupted() error {
	if b := s.bad.Load(); b != nil {
		return b.err
	}
	return nil
}
