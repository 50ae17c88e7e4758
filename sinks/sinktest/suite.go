package sinktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
)

// Harness is a destination for one test.
type Harness struct {
	// Sink makes another sink for the same destination, as a restarted process would. Required.
	Sink func(t *testing.T) sinks.Sink
	// Contents reads what the destination holds; the deliveries of one entity in their order. Required.
	Contents func(t *testing.T) []Delivered
	// Once says that the sink finds out what the destination holds, and sends each event once whatever the checkpoint.
	Once bool
	// Interrupt, if not nil, makes Sends fail after a part of them has arrived, until mend is called.
	Interrupt func(t *testing.T) (mend func())
	// BigBytes is the size of a big event. Default 1 MB.
	BigBytes int
}

// Delivered is an event as the destination holds it.
type Delivered struct {
	Position eventlog.Position
	Entity   string // Order/42
	JSON     []byte // as Event.AppendJSON gives it; nil: the destination keeps another form
}

const testTimeout = 2 * time.Minute

// Run runs the suite; newHarness makes an empty destination for each test.
func Run(t *testing.T, newHarness func(t *testing.T) Harness) {
	for _, test := range []struct {
		name string
		f    func(*suite)
	}{
		{"every event arrives once, in order per entity, as it is in the log", (*suite).arrives},
		{"no event arrives twice when the same events are sent again", (*suite).again},
		{"a killed process is continued from an older checkpoint", (*suite).killed},
		{"a process that knows nothing any more continues", (*suite).forgotten},
		{"a send that fails in the middle is completed", (*suite).interrupted},
		{"big events arrive", (*suite).big},
		{"an ended context ends a send, and nothing is lost by it", (*suite).ended},
		{"a destination with another history is refused", (*suite).otherHistory},
		{"a dispatcher leaves out quiet events, and imports for side effects", (*suite).filtered},
		{"a closed sink can be closed again and opened again", (*suite).closed},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
			defer cancel()
			s := &suite{T: t, ctx: ctx, h: newHarness(t), log: NewLog("testlog"), gen: NewGenerator(uint64(len(test.name)))}
			if s.h.BigBytes == 0 {
				s.h.BigBytes = 1 << 20
			}
			test.f(s)
		})
	}
}

type suite struct {
	*testing.T
	ctx context.Context
	h   Harness
	log *Log
	gen *Generator
}

func (s *suite) start(after eventlog.Position) sinks.Start {
	return sinks.Start{After: after, Log: "testlog", Reactor: "suite", First: after == 0, Verify: func(_ context.Context, p eventlog.Position, id eventlog.ID) error {
		events := s.log.Events()
		if p > eventlog.Position(len(events)) || events[p-1].ID != id {
			return fmt.Errorf("%w: %s at %d", sinks.ErrOtherHistory, id, p)
		}
		return nil
	}}
}

// open opens a sink and gives the events that it is to be sent next.
func (s *suite) open(sink sinks.Sink, after eventlog.Position) []*eventlog.Event {
	s.Helper()
	from, err := sink.Open(s.ctx, s.start(after))
	for errors.Is(err, sinks.ErrUnavailable) && s.ctx.Err() == nil { // as a reactor does: the destination may be new
		time.Sleep(20 * time.Millisecond)
		from, err = sink.Open(s.ctx, s.start(after))
	}
	if err != nil {
		s.Fatalf("Open: %v", err)
	}
	if from < after {
		s.Fatalf("Open(after %d) = %d, which is before it", after, from)
	}
	s.Cleanup(func() { _ = sink.Close(context.Background()) })
	return s.log.Events()[from:]
}

// send sends events in batches, and tries again as a reactor does.
func (s *suite) send(sink sinks.Sink, events []*eventlog.Event, batch int) {
	s.Helper()
	for b := range slices.Chunk(events, batch) {
		for {
			err := sink.Send(s.ctx, b)
			if err == nil {
				break
			}
			if s.ctx.Err() != nil {
				s.Fatalf("Send: %v", err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// check compares the destination with the log's first n events.
func (s *suite) check(n int, twice bool) {
	s.Helper()
	Check(s.T, s.log.Events()[:n], s.h.Contents(s.T), twice)
}

// Check compares what a destination holds with what it should: every event, in order per entity, and, unless twice is
// allowed, none more than once. When an event comes again, the ones after it may come again, too.
func Check(t *testing.T, want []*eventlog.Event, got []Delivered, twice bool) {
	t.Helper()
	byPosition := map[eventlog.Position]*eventlog.Event{}
	for _, e := range want {
		byPosition[e.Position] = e
	}
	seen := map[eventlog.Position]int{}
	highest := map[string]eventlog.Position{}
	bad := 0
	report := func(format string, args ...any) {
		t.Helper()
		if bad++; bad <= 10 {
			t.Errorf(format, args...)
		}
	}
	for _, d := range got {
		e := byPosition[d.Position]
		if e == nil {
			report("position %d (%s) arrived and should not have", d.Position, d.Entity)
			continue
		}
		if d.Entity != e.Entity() {
			report("position %d arrived as %s, the log has %s", d.Position, d.Entity, e.Entity())
		}
		if d.JSON != nil && !bytes.Equal(d.JSON, e.AppendJSON(nil)) {
			report("position %d arrived as\n%s\nthe log has\n%s", d.Position, d.JSON, e.AppendJSON(nil))
		}
		seen[d.Position]++
		if seen[d.Position] > 1 && !twice {
			report("position %d (%s) arrived %d times", d.Position, d.Entity, seen[d.Position])
		}
		if d.Position < highest[d.Entity] && seen[d.Position] == 1 {
			report("position %d (%s) arrived after %d", d.Position, d.Entity, highest[d.Entity])
		}
		highest[d.Entity] = max(highest[d.Entity], d.Position)
	}
	for _, e := range want {
		if seen[e.Position] == 0 {
			report("position %d (%s) did not arrive", e.Position, e.Entity())
		}
	}
	if bad > 10 {
		t.Errorf("and %d more; %d events in the log, %d deliveries", bad-10, len(want), len(got))
	}
}

func (s *suite) arrives() {
	s.log.Append(s.gen.Mix(3000, 40)...)
	sink := s.h.Sink(s.T)
	s.send(sink, s.open(sink, 0), 700)
	if err := sink.Send(s.ctx, nil); err != nil {
		s.Errorf("Send of nothing: %v", err)
	}
	s.check(3000, false)
}

func (s *suite) again() {
	s.log.Append(s.gen.Mix(500, 5)...)
	sink := s.h.Sink(s.T)
	events := s.open(sink, 0)
	s.send(sink, events, 200)
	if s.h.Once {
		_ = sink.Close(s.ctx)
		s.send(sink, s.open(sink, 100), 150)
		_ = sink.Close(s.ctx)
		s.send(sink, s.open(sink, 500), 150)
	}
	s.check(500, false)
}

func (s *suite) killed() {
	s.log.Append(s.gen.Mix(2000, 30)...)
	sink := s.h.Sink(s.T)
	s.send(sink, s.open(sink, 0)[:1100], 300)
	// Not closed; the next one begins behind the last checkpoint, which is a little older.
	next := s.h.Sink(s.T)
	s.send(next, s.open(next, 600), 450)
	s.check(2000, !s.h.Once)
}

func (s *suite) forgotten() {
	s.log.Append(s.gen.Mix(2000, 30)...)
	sink := s.h.Sink(s.T)
	s.send(sink, s.open(sink, 0)[:1500], 300)
	next := s.h.Sink(s.T)
	s.send(next, s.open(next, 0), 450)
	s.check(2000, !s.h.Once)
}

func (s *suite) interrupted() {
	if s.h.Interrupt == nil {
		s.Log("the destination of this harness cannot be interrupted")
		return
	}
	s.log.Append(s.gen.Mix(1500, 30)...)
	sink := s.h.Sink(s.T)
	events := s.open(sink, 0)
	s.send(sink, events[:500], 250)
	mend := s.h.Interrupt(s.T)
	err := sink.Send(s.ctx, events[500:1000])
	if err == nil {
		s.Error("Send to an interrupted destination: no error")
	}
	mend()
	// The reactor may come with more or fewer events the next time.
	s.send(sink, events[500:800], 300)
	s.send(sink, events[800:], 400)
	s.check(1500, !s.h.Once)
}

func (s *suite) big() {
	for i := range 6 {
		s.log.Append(s.gen.Mix(20, 3)...)
		s.log.Append(s.gen.Big(fmt.Sprintf("Order/%d", i%2), s.h.BigBytes))
	}
	sink := s.h.Sink(s.T)
	events := s.open(sink, 0)
	s.send(sink, events[:70], 30)
	next := s.h.Sink(s.T)
	rest := s.open(next, 10)
	s.send(next, rest, len(rest))
	s.check(len(events), !s.h.Once)
}

func (s *suite) ended() {
	s.log.Append(s.gen.Mix(900, 10)...)
	sink := s.h.Sink(s.T)
	events := s.open(sink, 0)
	s.send(sink, events[:300], 300)
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	began := time.Now()
	err := sink.Send(ctx, events[300:600])
	if took := time.Since(began); took > 5*time.Second {
		s.Errorf("Send with an ended context took %s", took)
	}
	from := 300
	if err == nil {
		from = 600
	}
	s.send(sink, events[from:], 250)
	s.check(900, !s.h.Once)
}

func (s *suite) otherHistory() {
	if !s.h.Once {
		return
	}
	s.log.Append(s.gen.Mix(300, 10)...)
	sink := s.h.Sink(s.T)
	s.send(sink, s.open(sink, 0), 300)
	_ = sink.Close(s.ctx)
	before := len(s.h.Contents(s.T))

	// The log was restored to an earlier state and went on differently.
	restored := NewLog("testlog")
	restored.Append(s.log.Events()[:200]...)
	s.log = restored
	other := NewGenerator(99)
	other.n = 1 << 20
	s.log.Append(other.Mix(300, 10)...)
	next := s.h.Sink(s.T)
	from, err := next.Open(s.ctx, s.start(200))
	if err == nil {
		defer next.Close(s.ctx)
		err = next.Send(s.ctx, s.log.Events()[from:])
	}
	if !errors.Is(err, sinks.ErrOtherHistory) {
		s.Errorf("a destination that holds another history: got error %v, want ErrOtherHistory", err)
	}
	if after := len(s.h.Contents(s.T)); after != before {
		s.Errorf("%d events were sent to a destination with another history", after-before)
	}
}

func (s *suite) filtered() {
	s.log.Append(s.gen.Mix(800, 10)...)
	for _, test := range []struct {
		name       string
		patterns   []string
		sideEffect bool
		quiet      bool
		want       func(e *eventlog.Event) bool
	}{
		{"defaults", []string{"*"}, false, false, func(e *eventlog.Event) bool { return !e.Quiet }},
		{"quiet too", []string{"*"}, false, true, func(*eventlog.Event) bool { return true }},
		{"side effects", []string{"Order*", "Gap"}, true, false, func(e *eventlog.Event) bool {
			return !e.Quiet && e.Op != eventlog.OpImport && (e.Aggregate == "Order" && e.Type != "CountryGuessed" || e.Op == eventlog.OpGap)
		}},
		{"side effects that name imports", []string{"*Imported"}, true, false, func(e *eventlog.Event) bool { return e.Op == eventlog.OpImport }},
	} {
		s.Run(test.name, func(t *testing.T) {
			sink := &counter{}
			log := NewLog("testlog")
			log.Append(s.log.Events()...)
			d, err := sinks.New(sinks.Config{Log: log, Leases: log, Watcher: log})
			if err != nil {
				t.Fatal(err)
			}
			r := &sinks.Reactor{Name: "r", Sink: sink, SideEffect: test.sideEffect, Quiet: test.quiet, MaxBatchBytes: 20_000}
			for _, p := range test.patterns {
				if err := d.On(p, r); err != nil {
					t.Fatal(err)
				}
			}
			RunUntil(t, d, 800)
			var want []*eventlog.Event
			for _, e := range log.Events() {
				if test.want(e) {
					want = append(want, e)
				}
			}
			Check(t, want, sink.got, false)
		})
	}
	// And the real sink, once.
	d, err := sinks.New(sinks.Config{Log: s.log, Leases: s.log, Watcher: s.log})
	if err != nil {
		s.Fatal(err)
	}
	if err := d.On("*", &sinks.Reactor{Name: "suite", Sink: s.h.Sink(s.T)}); err != nil {
		s.Fatal(err)
	}
	RunUntil(s.T, d, 800)
	Check(s.T, slices.DeleteFunc(s.log.Events(), func(e *eventlog.Event) bool { return e.Quiet }), s.h.Contents(s.T), false)
}

func (s *suite) closed() {
	s.log.Append(s.gen.Mix(300, 10)...)
	sink := s.h.Sink(s.T)
	if err := sink.Close(s.ctx); err != nil {
		s.Errorf("Close before Open: %v", err)
	}
	s.send(sink, s.open(sink, 0)[:100], 100)
	for range 2 {
		if err := sink.Close(s.ctx); err != nil {
			s.Errorf("Close: %v", err)
		}
	}
	s.send(sink, s.open(sink, 100), 100)
	s.check(300, false)
}

// counter is a sink that keeps what it gets.
type counter struct{ got []Delivered }

func (c *counter) Open(_ context.Context, start sinks.Start) (eventlog.Position, error) {
	return start.After, nil
}

func (c *counter) Send(_ context.Context, events []*eventlog.Event) error {
	for _, e := range events {
		c.got = append(c.got, Delivered{e.Position, e.Entity(), e.AppendJSON(nil)})
	}
	return nil
}

func (c *counter) Close(context.Context) error { return nil }

// RunUntil runs a dispatcher until its reactors have reached a position, and stops it.
func RunUntil(t *testing.T, d *sinks.Dispatcher, p eventlog.Position) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	done := make(chan error, 1)
	run, stop := context.WithCancel(ctx)
	go func() { done <- d.Run(run) }()
	err := d.CaughtUp(ctx, p)
	stop()
	if rerr := <-done; rerr != nil {
		t.Errorf("Run: %v", rerr)
	}
	cancel()
	if err != nil {
		t.Fatal(err)
	}
}
