package eventlog_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// emptyLog makes a log without events in a database of its own, with its head at a position.
func emptyLog(t *testing.T, server *pgservertest.Server, head eventlog.Position) *eventlog.Log {
	t.Helper()
	l, err := eventlog.Connect(t.Context(), eventlog.Config{URL: server.URL(server.NewDatabase(t))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	if _, err := l.Create(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := l.Begin(t.Context(), eventlog.Head{SystemID: "1", Database: "d", Timeline: 1, Slot: "s"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Pool().Exec(t.Context(), `UPDATE backstory.head SET position = $1, written = $1`, head); err != nil {
		t.Fatal(err)
	}
	return l
}

func mustLease(t *testing.T, l *eventlog.Log, name string, start eventlog.Start) *eventlog.Lease {
	t.Helper()
	le, err := l.Lease(t.Context(), name, start)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = le.Release(context.Background()) })
	return le
}

func TestLease(t *testing.T) {
	server := pgservertest.ForTest(t, pgserver.Config{})
	l := emptyLog(t, server, 50)
	ctx := t.Context()

	le := mustLease(t, l, "kafka", eventlog.FromBeginning)
	if c := le.Checkpoint(); c.Position != 0 || c.Epoch != 1 || c.Error != "" || c.Paused {
		t.Errorf("a new checkpoint is %+v", c)
	}
	if c := mustLease(t, l, "late", eventlog.FromHead).Checkpoint(); c.Position != 50 {
		t.Errorf("a reader from the head begins at %d", c.Position)
	}
	if _, err := l.Lease(ctx, "kafka", eventlog.FromBeginning); !errors.Is(err, eventlog.ErrLeaseHeld) {
		t.Errorf("a second lease: %v", err)
	}

	if err := le.Fail(ctx, &eventlog.Problem{Err: errors.New("topic missing"), Hint: "create it"}); err != nil {
		t.Fatal(err)
	}
	since := le.Checkpoint().FailedAt
	if err := le.Fail(ctx, errors.New("still")); err != nil {
		t.Fatal(err)
	}
	list, err := l.Checkpoints(ctx)
	if err != nil || len(list) != 2 || list[0].Name != "kafka" || list[0].Error != "still" || !list[0].FailedAt.Equal(since) || since.IsZero() || !list[0].Running {
		t.Errorf("Checkpoints: %+v, %v", list, err)
	}
	if err := le.Save(ctx, 20); err != nil {
		t.Fatal(err)
	}
	if c := le.Checkpoint(); c.Position != 20 || c.Error != "" || !c.FailedAt.IsZero() {
		t.Errorf("after Save, the checkpoint is %+v", c)
	}

	if err := le.Release(ctx); err != nil {
		t.Fatal(err)
	}
	if err := le.Save(ctx, 21); !errors.Is(err, eventlog.ErrLeaseLost) {
		t.Errorf("Save after Release: %v", err)
	}
	if list, _ := l.Checkpoints(ctx); list[0].Running {
		t.Error("a reader without a lease counts as running")
	}
	if c := mustLease(t, l, "kafka", eventlog.FromHead).Checkpoint(); c.Position != 20 || c.Epoch != 2 {
		t.Errorf("the next lease has %+v", c)
	}
}

// watch runs Watch and gives what it returns. It has returned before the test's lease is released.
func watch(t *testing.T, ctx context.Context, le *eventlog.Lease) <-chan error {
	done, ended := make(chan error, 1), make(chan struct{})
	go func() { done <- le.Watch(ctx); close(ended) }()
	t.Cleanup(func() { <-ended })
	return done
}

func lost(t *testing.T, le *eventlog.Lease, done <-chan error, within time.Duration) {
	t.Helper()
	select {
	case err := <-done:
		if !errors.Is(err, eventlog.ErrLeaseLost) || !errors.Is(le.Valid(), eventlog.ErrLeaseLost) {
			t.Errorf("Watch: %v; Valid: %v", err, le.Valid())
		}
	case <-time.After(within):
		t.Fatal("the loss of the lease was not noticed")
	}
	if err := le.Save(context.Background(), 30); !errors.Is(err, eventlog.ErrLeaseLost) {
		t.Errorf("Save with a lost lease: %v", err)
	}
}

func TestLeaseIsLost(t *testing.T) {
	server := pgservertest.ForTest(t, pgserver.Config{})
	t.Run("when its session is ended, at once, and another can have it", func(t *testing.T) {
		l := emptyLog(t, server, 50)
		le := mustLease(t, l, "r", eventlog.FromBeginning)
		done := watch(t, t.Context(), le)
		time.Sleep(50 * time.Millisecond)
		if _, err := l.Pool().Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'backstory reader r' AND datname = current_database()`); err != nil {
			t.Fatal(err)
		}
		lost(t, le, done, time.Second)
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) { // the server lets go of the session's locks a moment later
			next, err := l.Lease(t.Context(), "r", eventlog.FromBeginning)
			if err == nil {
				_ = next.Release(t.Context())
				break
			}
			if time.Now().After(end) {
				t.Fatal(err)
			}
		}
	})
	t.Run("when the checkpoint is moved", func(t *testing.T) {
		l := emptyLog(t, server, 50)
		le := mustLease(t, l, "r", eventlog.FromBeginning)
		if err := le.Save(t.Context(), 20); err != nil {
			t.Fatal(err)
		}
		done := watch(t, t.Context(), le)
		if err := l.MoveCheckpoint(t.Context(), "r", 5); err != nil {
			t.Fatal(err)
		}
		lost(t, le, done, 5*time.Second)
		if err := le.Release(t.Context()); err != nil {
			t.Error(err)
		}
		if c := mustLease(t, l, "r", eventlog.FromBeginning).Checkpoint(); c.Position != 5 {
			t.Errorf("the next lease begins at %d", c.Position)
		}
	})
	t.Run("to a process that cannot see it, by the epoch", func(t *testing.T) {
		l := emptyLog(t, server, 50)
		le := mustLease(t, l, "r", eventlog.FromBeginning)
		// The server gave the session up; the process was paused and knows nothing.
		if _, err := l.Pool().Exec(t.Context(), `UPDATE backstory.checkpoint SET epoch = epoch + 1, position = 40`); err != nil {
			t.Fatal(err)
		}
		if err := le.Save(t.Context(), 30); !errors.Is(err, eventlog.ErrLeaseLost) {
			t.Errorf("Save: %v", err)
		}
		if list, _ := l.Checkpoints(t.Context()); list[0].Position != 40 {
			t.Errorf("an old process moved the checkpoint to %d", list[0].Position)
		}
	})
	t.Run("when the checkpoint is deleted", func(t *testing.T) {
		l := emptyLog(t, server, 50)
		le := mustLease(t, l, "r", eventlog.FromBeginning)
		done := watch(t, t.Context(), le)
		if _, err := l.Pool().Exec(t.Context(), `DELETE FROM backstory.checkpoint`); err != nil {
			t.Fatal(err)
		}
		lost(t, le, done, 5*time.Second)
	})
	t.Run("not by an end of the context", func(t *testing.T) {
		l := emptyLog(t, server, 50)
		le := mustLease(t, l, "r", eventlog.FromBeginning)
		ctx, cancel := context.WithCancel(t.Context())
		done := watch(t, ctx, le)
		time.Sleep(2500 * time.Millisecond) // longer than a poll
		cancel()
		if err := <-done; err != nil || le.Valid() != nil {
			t.Errorf("Watch: %v; Valid: %v", err, le.Valid())
		}
		if err := le.Save(t.Context(), 30); err != nil {
			t.Error(err)
		}
	})
}

// The network swallows everything; the holder must stop before the server gives its session up.
func TestLeaseOfAProcessThatIsCutOff(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes as long as a lease is trusted")
	}
	t.Parallel()
	server := pgservertest.ForTest(t, pgserver.Config{})
	direct := emptyLog(t, server, 50)
	_, target, _ := strings.Cut(direct.URL(), "@")
	host, rest, _ := strings.Cut(target, "/")
	p := newBlackhole(t, host)
	url := strings.Replace(direct.URL(), host+"/"+rest, p.Addr()+"/"+rest, 1)
	l, err := eventlog.Open(t.Context(), eventlog.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	le := mustLease(t, l, "r", eventlog.FromBeginning)
	done := watch(t, t.Context(), le)
	p.swallow()
	began := time.Now()
	select {
	case err := <-done:
		if !errors.Is(err, eventlog.ErrLeaseLost) {
			t.Errorf("Watch: %v", err)
		}
	case <-time.After(40 * time.Second):
		t.Fatal("not noticed")
	}
	if took := time.Since(began); took > 25*time.Second || le.Valid() == nil {
		t.Errorf("noticed after %s; Valid: %v", took, le.Valid())
	}
}

// blackhole is a TCP proxy that can stop forwarding without closing anything.
type blackhole struct {
	ln    net.Listener
	gone  chan struct{}
	conns sync.WaitGroup
}

func newBlackhole(t *testing.T, target string) *blackhole {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &blackhole{ln: ln, gone: make(chan struct{})}
	var mu sync.Mutex
	var open []net.Conn
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		b.conns.Wait()
	})
	b.conns.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", target)
			if err != nil {
				c.Close()
				continue
			}
			mu.Lock()
			open = append(open, c, up)
			mu.Unlock()
			pipe := func(dst, src net.Conn) {
				buf := make([]byte, 32<<10)
				for {
					n, err := src.Read(buf)
					select {
					case <-b.gone: // swallowed
					default:
						if n > 0 {
							_, _ = dst.Write(buf[:n])
						}
						if err != nil {
							dst.Close()
						}
					}
					if err != nil {
						return
					}
				}
			}
			b.conns.Go(func() { pipe(up, c) })
			b.conns.Go(func() { pipe(c, up) })
		}
	})
	return b
}

func (b *blackhole) Addr() string { return b.ln.Addr().String() }
func (b *blackhole) swallow()     { close(b.gone) }

func TestCheckpointCommands(t *testing.T) {
	server := pgservertest.ForTest(t, pgserver.Config{})
	l := emptyLog(t, server, 50)
	ctx := t.Context()
	if err := l.PauseCheckpoint(ctx, "nobody", true); eventlog.Hint(err) == "" {
		t.Errorf("pause of an unknown reader: %v", err)
	}
	le := mustLease(t, l, "r", eventlog.FromHead)
	watching, stop := context.WithCancel(ctx)
	defer stop()
	done := watch(t, watching, le)
	for range 2 {
		if err := l.PauseCheckpoint(ctx, "r", true); err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(5 * time.Second); !le.Checkpoint().Paused; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the pause was not noticed")
		}
	}
	if err := l.PauseCheckpoint(ctx, "r", false); err != nil {
		t.Fatal(err)
	}
	stop()
	if err := <-done; err != nil {
		t.Fatalf("Watch: %v", err)
	}

	// The log's server was restored to an earlier state.
	if err := le.Release(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Pool().Exec(ctx, `UPDATE backstory.head SET position = 10, written = 10`); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Lease(ctx, "r", eventlog.FromHead); !errors.Is(err, eventlog.ErrAheadOfLog) || !strings.Contains(err.Error(), "position 50") ||
		!strings.Contains(err.Error(), "ends at 10") || eventlog.Hint(err) == "" {
		t.Errorf("a lease on a reader ahead of the log: %v", err)
	}

	a, err := l.Identity(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := emptyLog(t, server, 0).Identity(ctx); err != nil || a == b || a == "" {
		t.Errorf("two logs have the identities %q and %q, %v", a, b, err)
	}
}
