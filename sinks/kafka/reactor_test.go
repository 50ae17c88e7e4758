package kafka

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/kafkaserver"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
	"github.com/backstory-dev/backstory/sinks"
	"github.com/backstory-dev/backstory/sinks/sinktest"
)

// The whole path from a real log to a real broker, while the broker is stopped, killed and started, the log's server is
// restarted, the reactor's process ends, and its checkpoint is lost. The topic holds the log, once.
func TestKafkaReactor(t *testing.T) {
	kafkaserver.Need(t)
	pg := pgservertest.Start(t, pgserver.Config{})
	broker := kafkaserver.StartForTest(t, kafkaserver.Config{})
	c := newCluster(t, broker.Brokers())
	topic := c.newTopic(t, 4)
	log := newPGLog(t, pg)

	// A writer that never rests: about 1 500 events a second.
	writing, stopWriting := context.WithCancel(t.Context())
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		for writing.Err() == nil {
			if err := log.append(10, 10, 300); err != nil {
				log.takeOver(t)
				log.lsn += 1 << 20
			}
			time.Sleep(60 * time.Millisecond)
		}
	}()

	var d *sinks.Dispatcher
	var stop func()
	run := func() {
		t.Helper()
		s, err := New(Config{Brokers: broker.Brokers(), Topic: topic, RequestTimeout: 3 * time.Second, Settle: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		d, err = sinks.New(sinks.Config{Log: log.Log, StopTimeout: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.On("*", &sinks.Reactor{Name: "kafka", Sink: s, MaxBackoff: 500 * time.Millisecond, MaxBatchBytes: 64 << 10, CheckpointEvery: 300 * time.Millisecond}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); _ = d.Run(ctx) }()
		stop = func() { cancel(); <-done }
	}
	run()
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	rest := func() { time.Sleep(time.Duration(200+r.IntN(800)) * time.Millisecond) }
	progress := func(what string) {
		t.Helper()
		h, err := log.Head(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := d.CaughtUp(ctx, h.Position); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		t.Logf("%s: caught up with position %d", what, h.Position)
	}
	restartBroker := func() {
		t.Helper()
		if err := broker.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	progress("at the start")
	for range 2 {
		rest()
		if err := broker.Kill(); err != nil {
			t.Fatal(err)
		}
		rest()
		for end := time.Now().Add(20 * time.Second); d.Status()[0].State != sinks.StateRetrying; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("a dead broker is not visible: %+v", d.Status()[0])
			}
		}
		if s := d.Status()[0]; s.Error == "" || s.LagEvents == 0 {
			t.Errorf("status with a dead broker is %+v", s)
		}
		restartBroker()
		progress("after a SIGKILL of the broker")
	}
	rest()
	restartBroker() // which stops it first
	progress("after a restart of the broker")

	for range 3 {
		rest()
		stop()
		if r.IntN(2) == 0 {
			if err := log.MoveCheckpoint(t.Context(), "kafka", 0); err != nil {
				t.Fatal(err)
			}
		}
		run()
	}
	progress("after restarts of the process, some without its checkpoint")

	rest()
	if err := pg.Restart(t.Context(), pgserver.Immediate); err != nil {
		t.Fatal(err)
	}
	rest()
	progress("after an immediate restart of the log's server")

	stopWriting()
	<-wrote
	progress("at the end")
	stop()

	var want []*eventlog.Event
	if err := log.Read(t.Context(), eventlog.Selection{}, func(e *eventlog.Event) error { want = append(want, e.Clone()); return nil }); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d events", len(want))
	sinktest.Check(t, want, c.contents(t, topic), false)
	if list, err := log.Checkpoints(t.Context()); err != nil || len(list) != 1 || list[0].Running || list[0].Error != "" || int(list[0].Position) != len(want) {
		t.Errorf("checkpoints at the end: %+v, %v", list, err)
	}
}
