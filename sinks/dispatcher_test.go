package sinks_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
	"github.com/backstory-dev/backstory/sinks/sinktest"
)

func TestMain(m *testing.M) {
	before := runtime.NumGoroutine()
	code := m.Run()
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<16)
			fmt.Fprintf(os.Stderr, "goroutines leaked:\n%s\n", buf[:runtime.Stack(buf, true)])
			code = max(code, 1)
			break
		}
	}
	os.Exit(code)
}

// probe is a sink whose behaviour a test decides.
type probe struct {
	open func(start sinks.Start) (eventlog.Position, error)
	send func(ctx context.Context, events []*eventlog.Event) error

	mu     sync.Mutex // guards the following
	got    []sinktest.Delivered
	opened int
	closed int
	most   int // bytes of a batch
}

func (p *probe) Open(_ context.Context, start sinks.Start) (eventlog.Position, error) {
	p.mu.Lock()
	p.opened++
	p.mu.Unlock()
	if p.open != nil {
		return p.open(start)
	}
	return start.After, nil
}

func (p *probe) Send(ctx context.Context, events []*eventlog.Event) error {
	if p.send != nil {
		if err := p.send(ctx, events); err != nil {
			return err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, e := range events {
		n += len(e.Data)
		p.got = append(p.got, sinktest.Delivered{Position: e.Position, Entity: e.Entity(), JSON: e.AppendJSON(nil)})
	}
	p.most = max(p.most, n)
	return nil
}

func (p *probe) Close(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed++
	return nil
}

func (p *probe) delivered() []sinktest.Delivered {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]sinktest.Delivered(nil), p.got...)
}

func newLog(n int) *sinktest.Log {
	log := sinktest.NewLog("l")
	gen := sinktest.NewGenerator(1)
	for _, e := range gen.Mix(n, 10) {
		e.Quiet = false
		log.Append(e)
	}
	return log
}

func dispatcher(t *testing.T, log *sinktest.Log, rs ...*sinks.Reactor) *sinks.Dispatcher {
	t.Helper()
	d, err := sinks.New(sinks.Config{Log: log, Leases: log, Watcher: log, StopTimeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rs {
		if r.MinBackoff == 0 {
			r.MinBackoff, r.MaxBackoff = time.Millisecond, 20*time.Millisecond
		}
		if err := d.On("*", r); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// start runs a dispatcher until stop is called.
func start(t *testing.T, d *sinks.Dispatcher) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run did not end")
		}
	})
	t.Cleanup(stop)
	return stop
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func status(d *sinks.Dispatcher, name string) sinks.Status {
	for _, s := range d.Status() {
		if s.Name == name {
			return s
		}
	}
	return sinks.Status{}
}

func TestEventsArriveWhileTheLogGrows(t *testing.T) {
	log := newLog(500)
	p := &probe{}
	d := dispatcher(t, log, &sinks.Reactor{Name: "r", Sink: p, MaxBatchBytes: 5000})
	stop := start(t, d)
	gen := sinktest.NewGenerator(2)
	for range 50 {
		for _, e := range gen.Mix(10, 5) {
			e.Quiet = false
			log.Append(e)
		}
		time.Sleep(time.Millisecond)
	}
	if err := d.CaughtUp(t.Context(), 1000); err != nil {
		t.Fatal(err)
	}
	if s := status(d, "r"); s.State != sinks.StateRunning || s.Position != 1000 || s.LagEvents != 0 || s.LagSeconds != 0 || s.Sent != 1000 || s.Error != "" {
		t.Errorf("status is %+v", s)
	}
	stop()
	sinktest.Check(t, log.Events(), p.delivered(), false)
	if p.most > 5000 {
		t.Errorf("a batch had %d bytes of data", p.most)
	}
	if c, saves := log.Checkpoint("r"); c.Position != 1000 || saves != 1 || p.closed != 1 {
		t.Errorf("checkpoint at %d after %d saves; sink closed %d times", c.Position, saves, p.closed)
	}
	if s := status(d, "r"); s.State != sinks.StateStopped || s.Checkpoint != 1000 {
		t.Errorf("after the end, status is %+v", s)
	}
}

func TestAnIdleLogCausesNoWrites(t *testing.T) {
	log := newLog(100)
	d := dispatcher(t, log, &sinks.Reactor{Name: "r", Sink: &probe{}, CheckpointEvery: 20 * time.Millisecond})
	start(t, d)
	until(t, "the checkpoint to be saved", func() bool { c, _ := log.Checkpoint("r"); return c.Position == 100 })
	_, before := log.Checkpoint("r")
	time.Sleep(500 * time.Millisecond)
	if _, after := log.Checkpoint("r"); after != before {
		t.Errorf("%d writes on an idle log", after-before)
	}
}

func TestCheckpointAfterEachSend(t *testing.T) {
	log := newLog(100)
	var bad []string
	p := &probe{}
	p.send = func(_ context.Context, events []*eventlog.Event) error {
		// Everything before this batch is saved.
		if c, _ := log.Checkpoint("r"); c.Position != events[0].Position-1 {
			bad = append(bad, fmt.Sprintf("batch from %d while the checkpoint is at %d", events[0].Position, c.Position))
		}
		return nil
	}
	d := dispatcher(t, log, &sinks.Reactor{Name: "r", Sink: p, CheckpointEvery: -1, MaxBatchBytes: 2000})
	sinktest.RunUntil(t, d, 100)
	if len(bad) > 0 {
		t.Error(strings.Join(bad, "\n"))
	}
}

func TestADeadSinkHoldsBackNobody(t *testing.T) {
	log := newLog(300)
	good, slow := &probe{}, &probe{}
	release := make(chan struct{})
	slow.send = func(ctx context.Context, _ []*eventlog.Event) error {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return ctx.Err()
	}
	dead := &probe{open: func(sinks.Start) (eventlog.Position, error) { return 0, errors.New("no route") }}
	mad := &probe{send: func(context.Context, []*eventlog.Event) error { panic("nil map") }}
	d := dispatcher(t, log, &sinks.Reactor{Name: "good", Sink: good}, &sinks.Reactor{Name: "slow", Sink: slow},
		&sinks.Reactor{Name: "dead", Sink: dead}, &sinks.Reactor{Name: "mad", Sink: mad})
	stop := start(t, d)
	until(t, "the good reactor to finish", func() bool { return status(d, "good").Position == 300 })
	until(t, "the dead one to try often", func() bool { return status(d, "dead").Retries > 5 })
	until(t, "the mad one to stop", func() bool { return status(d, "mad").State == sinks.StateStopped })
	if s := status(d, "slow"); s.LagEvents != 300 || s.LagSeconds <= 0 || s.State != sinks.StateRunning {
		t.Errorf("status of the slow one is %+v", s)
	}
	if s := status(d, "dead"); s.State != sinks.StateRetrying || s.Error != "no route" || s.Since.IsZero() || s.LagEvents != 300 {
		t.Errorf("status of the dead one is %+v", s)
	}
	if s := status(d, "mad"); !strings.Contains(s.Error, "panic in the sink: nil map") {
		t.Errorf("status of the mad one is %+v", s)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := d.CaughtUp(ctx, 300); err == nil || !strings.Contains(err.Error(), "dead at 0: no route") || !strings.Contains(err.Error(), "slow at 0") {
		t.Errorf("CaughtUp: %v", err)
	}
	close(release)
	until(t, "the slow reactor to finish", func() bool { return status(d, "slow").Position == 300 })
	stop()
	sinktest.Check(t, log.Events(), good.delivered(), false)
	sinktest.Check(t, log.Events(), slow.delivered(), false)
}

func TestErrorsAreVisibleAndPass(t *testing.T) {
	log := newLog(100)
	var out bytes.Buffer
	var mu sync.Mutex
	failing := true
	p := &probe{}
	p.send = func(context.Context, []*eventlog.Event) error {
		mu.Lock()
		defer mu.Unlock()
		if failing {
			return &eventlog.Problem{Err: errors.New("topic missing"), Hint: "create it"}
		}
		return nil
	}
	d, err := sinks.New(sinks.Config{Log: log, Leases: log, Watcher: log, Logger: slog.New(slog.NewTextHandler(&out, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.On("*", &sinks.Reactor{Name: "r", Sink: p, MinBackoff: time.Millisecond, MaxBackoff: 10 * time.Millisecond, CheckpointEvery: time.Hour}); err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(d)
	stop := start(t, d)
	until(t, "some retries", func() bool { return status(d, "r").Retries >= 10 })
	if s := status(d, "r"); s.State != sinks.StateRetrying || s.Error != "topic missing" || s.Hint != "create it" || s.LagEvents != 100 {
		t.Errorf("status is %+v", s)
	}
	if c, _ := log.Checkpoint("r"); c.Error != "topic missing" || c.FailedAt.IsZero() || c.Position != 0 {
		t.Errorf("checkpoint is %+v", c)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if problems, err := promlint.NewWithMetricFamilies(families).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("metrics: %v %v", problems, err)
	}
	values := map[string]float64{}
	for _, f := range families {
		values[f.GetName()] = f.GetMetric()[0].GetGauge().GetValue() + f.GetMetric()[0].GetCounter().GetValue()
	}
	if values["backstory_reactor_errors_total"] < 10 || values["backstory_reactor_lag_events"] != 100 || values["backstory_reactor_lag_seconds"] <= 0 ||
		values["backstory_reactor_running"] != 0 || values["backstory_reactor_retrying_seconds"] <= 0 {
		t.Errorf("metrics are %v", values)
	}
	mu.Lock()
	failing = false
	mu.Unlock()
	until(t, "the reactor to go on", func() bool { return status(d, "r").State == sinks.StateRunning })
	until(t, "the error to be cleared in the checkpoint", func() bool { c, _ := log.Checkpoint("r"); return c.Error == "" && c.Position == 100 })
	stop()
	sinktest.Check(t, log.Events(), p.delivered(), false)
	if n := strings.Count(out.String(), "reactor cannot go on"); n != 1 {
		t.Errorf("the same error was logged %d times", n)
	}
	if !strings.Contains(out.String(), "reactor recovered") {
		t.Error("the end of the error was not logged")
	}
}

func TestOneProcessRunsAReactor(t *testing.T) {
	log := newLog(300)
	first, second := &probe{}, &probe{}
	hold, held := make(chan struct{}), make(chan struct{})
	hangs := sync.OnceFunc(func() { close(held) })
	first.send = func(ctx context.Context, events []*eventlog.Event) error {
		if events[0].Position > 100 {
			hangs()
			<-hold // a pause of the whole process
		}
		return nil
	}
	a := dispatcher(t, log, &sinks.Reactor{Name: "r", Sink: first, MaxBatchBytes: 3000, CheckpointEvery: -1})
	stopA := start(t, a)
	select {
	case <-held: // before that it would take its lease again at once
	case <-time.After(10 * time.Second):
		t.Fatal("the first does not hang")
	}
	b := dispatcher(t, log, &sinks.Reactor{Name: "r", Sink: second, MaxBatchBytes: 3000})
	stopB := start(t, b)
	until(t, "the second to stand by", func() bool { return status(b, "r").State == sinks.StateStandby })
	if len(second.delivered()) > 0 || second.opened > 0 {
		t.Error("the second runs while the first has the lease")
	}
	sent := len(first.delivered())
	log.Revoke("r") // the first one's session is cut
	until(t, "the second to take over", func() bool { return status(b, "r").Position == 300 })
	close(hold)
	until(t, "the first to stand by", func() bool { return status(a, "r").State == sinks.StateStandby })
	if n := len(first.delivered()); n > sent+20 {
		t.Errorf("the first sent %d events after it had lost its lease", n-sent)
	}
	if c, _ := log.Checkpoint("r"); c.Position > 300 {
		t.Errorf("checkpoint is %+v", c)
	}
	stopB()
	stopA()
	sinktest.Check(t, log.Events(), append(first.delivered()[:sent], second.delivered()...), true)
}

func TestPause(t *testing.T) {
	log := newLog(100)
	p := &probe{}
	d := dispatcher(t, log, &sinks.Reactor{Name: "r", Sink: p, CheckpointEvery: 10 * time.Millisecond})
	start(t, d)
	until(t, "events", func() bool { return status(d, "r").Position == 100 })
	log.Pause("r", true)
	until(t, "the pause", func() bool { return status(d, "r").State == sinks.StatePaused })
	log.Append(newLog(10).Events()...)
	time.Sleep(50 * time.Millisecond)
	if n := len(p.delivered()); n != 100 {
		t.Errorf("%d events were sent during the pause", n-100)
	}
	if err := d.CaughtUp(t.Context(), 110); err != nil {
		t.Errorf("CaughtUp waits for a paused reactor: %v", err)
	}
	log.Pause("r", false)
	until(t, "events", func() bool { return status(d, "r").Position == 110 })
}

func TestStartsAndMoves(t *testing.T) {
	log := newLog(100)
	head, ahead := &probe{}, &probe{open: func(s sinks.Start) (eventlog.Position, error) { return max(s.After, 60), nil }}
	d := dispatcher(t, log, &sinks.Reactor{Name: "head", Sink: head, Start: eventlog.FromHead}, &sinks.Reactor{Name: "ahead", Sink: ahead})
	start(t, d)
	until(t, "the reactors to run", func() bool {
		return status(d, "head").State == sinks.StateRunning && status(d, "ahead").Position == 100
	})
	log.Append(newLog(10).Events()...)
	if err := d.CaughtUp(t.Context(), 110); err != nil {
		t.Fatal(err)
	}
	sinktest.Check(t, log.Events()[100:], head.delivered(), false)
	sinktest.Check(t, log.Events()[60:], ahead.delivered(), false)
	log.Move("head", 40)
	until(t, "a replay", func() bool { return len(head.delivered()) == 10+70 })
	sinktest.Check(t, log.Events()[40:], head.delivered()[10:], false)
}

func TestStop(t *testing.T) {
	t.Run("a batch on its way arrives and is saved", func(t *testing.T) {
		log := newLog(50)
		begun := make(chan struct{})
		p := &probe{send: func(ctx context.Context, _ []*eventlog.Event) error {
			close(begun)
			select {
			case <-time.After(200 * time.Millisecond):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}}
		d := dispatcher(t, log, &sinks.Reactor{Name: "r", Sink: p})
		stop := start(t, d)
		<-begun
		stop()
		if c, _ := log.Checkpoint("r"); c.Position != 50 || len(p.delivered()) != 50 || p.closed != 1 {
			t.Errorf("checkpoint at %d, %d events delivered, closed %d times", c.Position, len(p.delivered()), p.closed)
		}
	})
	t.Run("a sink that hangs is given up after StopTimeout", func(t *testing.T) {
		log := newLog(50)
		begun := make(chan struct{})
		p := &probe{send: func(ctx context.Context, _ []*eventlog.Event) error { close(begun); <-ctx.Done(); return ctx.Err() }}
		d := dispatcher(t, log, &sinks.Reactor{Name: "r", Sink: p})
		stop := start(t, d)
		<-begun
		at := time.Now()
		stop()
		if took := time.Since(at); took < time.Second || took > 4*time.Second {
			t.Errorf("stop took %s", took)
		}
		if c, _ := log.Checkpoint("r"); c.Position != 0 {
			t.Errorf("checkpoint at %d", c.Position)
		}
	})
	t.Run("a reactor that retries stops at once", func(t *testing.T) {
		log := newLog(50)
		p := &probe{send: func(context.Context, []*eventlog.Event) error { return errors.New("no") }}
		d := dispatcher(t, log, &sinks.Reactor{Name: "r", Sink: p, MinBackoff: time.Hour, MaxBackoff: time.Hour})
		stop := start(t, d)
		until(t, "an error", func() bool { return status(d, "r").Retries > 0 })
		at := time.Now()
		stop()
		if took := time.Since(at); took > time.Second {
			t.Errorf("stop took %s", took)
		}
	})
}

func TestTheLogFails(t *testing.T) {
	log := newLog(100)
	p := &probe{}
	d := dispatcher(t, log, &sinks.Reactor{Name: "r", Sink: p})
	log.FailReads(errors.New("log server is down"))
	start(t, d)
	until(t, "the error to be visible", func() bool { return status(d, "r").Error == "log server is down" })
	log.FailReads(nil)
	if err := d.CaughtUp(t.Context(), 100); err != nil {
		t.Fatal(err)
	}
	log.FailReads(errors.New("log server is down again"))
	log.Append(newLog(10).Events()...)
	until(t, "the error to be visible", func() bool { return status(d, "r").Error == "log server is down again" })
	log.FailReads(nil)
	until(t, "the error to be gone", func() bool { return status(d, "r").Error == "" })
	if err := d.CaughtUp(t.Context(), 110); err != nil {
		t.Fatal(err)
	}
	until(t, "the error to be gone", func() bool { return status(d, "r").Error == "" })
	sinktest.Check(t, log.Events(), p.delivered(), false)
}

// Sinks fail at random, leases are lost at random, the log fails at random: everything arrives, in order.
func TestAtLeastOnceWhateverHappens(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	log := sinktest.NewLog("l")
	gen := sinktest.NewGenerator(seed)
	var mu sync.Mutex // guards r
	roll := func(n int) int { mu.Lock(); defer mu.Unlock(); return r.IntN(n) }
	chance := func(n int) bool { return roll(n) == 0 }
	var reactors []*sinks.Reactor
	var probes []*probe
	for i := range 5 {
		p := &probe{}
		p.open = func(s sinks.Start) (eventlog.Position, error) {
			if chance(3) {
				return 0, errors.New("open fails")
			}
			return s.After, nil
		}
		p.send = func(_ context.Context, events []*eventlog.Event) error {
			if chance(6) {
				// Some of it arrived.
				p.mu.Lock()
				for _, e := range events[:len(events)/2] {
					p.got = append(p.got, sinktest.Delivered{Position: e.Position, Entity: e.Entity(), JSON: e.AppendJSON(nil)})
				}
				p.mu.Unlock()
				return errors.New("send fails")
			}
			return nil
		}
		probes = append(probes, p)
		reactors = append(reactors, &sinks.Reactor{Name: fmt.Sprint("r", i), Sink: p, Quiet: true, MaxBatchBytes: 20_000, CheckpointEvery: time.Duration(i-1) * 5 * time.Millisecond})
	}
	d := dispatcher(t, log, reactors...)
	stop := start(t, d)
	for range 200 {
		log.Append(gen.Mix(20, 20)...)
		if chance(5) {
			log.Append(gen.Big("Order/3", 50_000))
		}
		if chance(10) {
			log.Revoke(fmt.Sprint("r", roll(5)))
		}
		if chance(40) {
			log.FailReads(errors.New("log fails"))
			time.Sleep(5 * time.Millisecond)
			log.FailReads(nil)
		}
		time.Sleep(time.Duration(rand.N(3)) * time.Millisecond)
	}
	if err := d.CaughtUp(t.Context(), eventlog.Position(len(log.Events()))); err != nil {
		t.Fatal(err)
	}
	stop()
	for _, p := range probes {
		sinktest.Check(t, log.Events(), p.delivered(), true)
	}
}

func TestOn(t *testing.T) {
	log := newLog(1)
	d := dispatcher(t, log)
	r := &sinks.Reactor{Name: "r", Sink: &probe{}}
	for _, bad := range []struct {
		pattern string
		r       *sinks.Reactor
	}{{"", r}, {"Order Paid", r}, {"Order?", r}, {"*", &sinks.Reactor{Name: "No Name", Sink: &probe{}}}, {"*", &sinks.Reactor{Name: "x"}}} {
		if err := d.On(bad.pattern, bad.r); err == nil {
			t.Errorf("On(%q, %+v): no error", bad.pattern, bad.r)
		}
	}
	if err := d.On("OrderPaid", r); err != nil {
		t.Error(err)
	}
	if err := d.On("Cart*", r); err != nil {
		t.Error(err)
	}
	if err := d.On("*", &sinks.Reactor{Name: "r", Sink: &probe{}}); err == nil {
		t.Error("two reactors of one name: no error")
	}
	if err := d.On("*", &sinks.Reactor{Name: "s", Sink: r.Sink}); err == nil {
		t.Error("one sink for two reactors: no error")
	}
}
