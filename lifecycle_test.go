package backstory

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
	"github.com/backstory-dev/backstory/sinks"
)

// counter is a sink that counts.
type counter struct{ got chan eventlog.Position }

func (c counter) Open(_ context.Context, start sinks.Start) (eventlog.Position, error) {
	return start.After, nil
}

func (c counter) Send(_ context.Context, events []*eventlog.Event) error {
	for _, e := range events {
		c.got <- e.Position
	}
	return nil
}

func (c counter) Close(context.Context) error { return nil }

// New → Run → cancel → Close leaves nothing behind: no goroutine, no connection, and a slot that the next one can have at once.
func TestLifecycle(t *testing.T) {
	server := pgservertest.ForTest(t, quick())
	for _, c := range []struct {
		name    string
		reactor bool
		work    bool // wait until it streams, and let it work
	}{{"at work", false, true}, {"at work, with a reactor", true, true}, {"stopped while it starts", true, false}} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, server, nil)
			before := runtime.NumGoroutine()
			got := make(chan eventlog.Position, 100)
			if c.reactor {
				r.cfg.Reactors = func(d *sinks.Dispatcher) error {
					return d.On("*", &sinks.Reactor{Name: "counter", Sink: counter{got}})
				}
			}
			for round := range 2 { // the second one finds the slot free
				s, end := r.start()
				if c.work {
					until(t, "it streams", func() bool { return s.Ready() == nil })
					r.sql(`INSERT INTO public.orders SELECT count(*) + 1 FROM public.orders`)
					until(t, "the insert is in the log", func() bool { h, err := s.Log().Head(t.Context()); return err == nil && int(h.Position) == round+1 })
					if c.reactor {
						select {
						case p := <-got:
							if int(p) != round+1 {
								t.Errorf("the reactor got position %d", p)
							}
						case <-time.After(10 * time.Second):
							t.Error("the reactor got nothing")
						}
					}
				}
				if err := end(); err != nil {
					t.Fatalf("Run: %v", err)
				}
				if active := r.ask(`SELECT active::text FROM pg_replication_slots WHERE slot_name = '%s'`, r.cfg.Capture.Slot); c.work && active != "false" {
					t.Error("the slot is still held")
				}
				if left := leaked(before); left != "" {
					t.Fatal(left)
				}
				until(t, "the connections are gone", func() bool {
					return r.ask(`SELECT count(*)::text FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'backstory%%'`) == "0"
				})
			}
		})
	}
}

// Errors of New and Run leave nothing behind, too.
func TestLifecycleOfFailures(t *testing.T) {
	server := pgservertest.ForTest(t, quick())
	r := newRig(t, server, nil)
	before := runtime.NumGoroutine()
	cfg := r.cfg
	cfg.Reactors = func(*sinks.Dispatcher) error { return errors.New("no") }
	if _, err := New(t.Context(), cfg); err == nil {
		t.Error("New hides what Reactors says")
	}
	cfg = r.cfg
	cfg.Capture.Slot = "another"
	cfg.Reactors = func(d *sinks.Dispatcher) error {
		return d.On("*", &sinks.Reactor{Name: "counter", Sink: counter{make(chan eventlog.Position, 1)}})
	}
	s, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil || eventlog.Hint(err) == "" {
		t.Errorf("Run with another slot: %v", err)
	}
	s.Close()
	cfg = r.cfg
	cfg.Once = true
	r.sql(`INSERT INTO public.orders VALUES (1); SELECT pg_drop_replication_slot('` + r.cfg.Capture.Slot + `')`)
	if s, err = New(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); !errors.Is(err, ErrGap) || eventlog.Hint(err) != eventlog.GapHint {
		t.Errorf("Run without its slot: %v", err)
	}
	s.Close()
	if left := leaked(before); left != "" {
		t.Error(left)
	}
}
