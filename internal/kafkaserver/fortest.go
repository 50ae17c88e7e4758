package kafkaserver

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	startLimit   = 5 * time.Minute // a fetch included
	cleanupLimit = 30 * time.Second
)

var shared struct {
	mu     sync.Mutex // guards the following; held while the broker starts
	server *Server
	err    error
}

// ForTest returns the broker that the tests of this process share, started if it is the first time: no users, topics
// are not created by themselves. Where tests have no Kafka (see Env) it skips this one. TestMain calls StopShared at the
// end; without it the broker ends with the process all the same (on Linux).
func ForTest(t testing.TB) *Server {
	t.Helper()
	Need(t)
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.server == nil && shared.err == nil {
		shared.server, shared.err = startForTest(Config{})
	}
	if shared.err != nil {
		t.Fatalf("no Kafka for this test: %v", shared.err)
	}
	return shared.server
}

// StartForTest returns a broker for this test alone, stopped in its Cleanup. A test that stops, kills or configures its
// broker takes one. It skips as ForTest does.
func StartForTest(t testing.TB, cfg Config) *Server {
	t.Helper()
	Need(t)
	s, err := startForTest(cfg)
	if err != nil {
		t.Fatalf("no Kafka for this test: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// StopShared stops the shared broker. Call it when all tests have ended.
func StopShared() {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.server != nil {
		if err := shared.server.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "kafkaserver:", err)
		}
		shared.server = nil
	}
}

func startForTest(cfg Config) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = func(line string) { fmt.Fprintln(os.Stderr, "kafkaserver:", line) }
	}
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	return Start(ctx, cfg)
}

var topics atomic.Int64

// NewTopic creates a topic for this test, deleted in its Cleanup if the broker runs then, and returns its name.
func (s *Server) NewTopic(t testing.TB, partitions int) string {
	t.Helper()
	name := fmt.Sprintf("test-%d-%d", os.Getpid(), topics.Add(1))
	ctx, cancel := context.WithTimeout(context.Background(), cleanupLimit)
	defer cancel()
	if err := s.CreateTopic(ctx, name, partitions); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), cleanupLimit)
		defer cancel()
		if s.PID() == 0 {
			return
		}
		if err := s.DeleteTopic(ctx, name); err != nil {
			t.Error(err)
		}
	})
	return name
}
