package e2e

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// shutDown asks a server to end, in fast mode, and waits for that.
func shutDown(t testing.TB, s *pgservertest.Server, limit time.Duration) {
	t.Helper()
	pid := s.PID()
	began := time.Now()
	if err := syscall.Kill(pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	for syscall.Kill(pid, 0) == nil {
		if took := time.Since(began); took > limit {
			t.Errorf("the server has not ended within %s", took.Round(time.Millisecond))
			_ = s.Kill()
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("the server ended within %s", time.Since(began).Round(time.Millisecond))
}

// TestSourceMayEnd: at a fast shutdown a server waits until each walsender's client has confirmed all WAL (PostgreSQL manual,
// Shutting Down the Server; pg_ctl waits for a minute). A sidecar whose log refuses by then, for it is on the same server,
// cannot confirm anything and must let go.
func TestSourceMayEnd(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		apart bool
		busy  bool
	}{{name: "idle"}, {name: "at work", busy: true}, {name: "idle, log apart", apart: true}, {name: "at work, log apart", busy: true, apart: true}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{own: true, apart: c.apart})
			db := s.sql()
			db.do(loads)
			s.init()
			r := s.start()
			const limit = 5 * time.Second
			for round := range 3 {
				var stop func()
				if c.busy {
					ctx, cancel := context.WithCancel(t.Context())
					done := make(chan struct{})
					go func() {
						defer close(done)
						for ctx.Err() == nil {
							if _, err := db.Exec(context.Background(), `INSERT INTO public.loads (v) SELECT repeat(md5(i::text), 32) FROM generate_series(1, 20) i`); err != nil {
								return // the server is going down
							}
						}
					}()
					stop = func() { cancel(); <-done }
				} else {
					db.do(`INSERT INTO public.loads (v) VALUES ('a')`)
					db.do(`UPDATE public.loads SET v = v || 'b'`)
				}
				eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
				time.Sleep([]time.Duration{0, 1500 * time.Millisecond, 4 * time.Second}[round])
				shutDown(t, s.src, limit)
				if stop != nil {
					stop()
				}
				eventually(t, 10*time.Second, "readyz tells", func() (bool, error) { err := r.sc.Ready(); return err != nil, nil })
				st, err := r.sc.Status(within(t, 10*time.Second))
				if err != nil {
					t.Fatal(err)
				}
				if st.Source.State == "streaming" || !strings.Contains(st.Source.Error, "connect") && !strings.Contains(st.Source.Error, "shutting down") && !strings.Contains(st.Source.Error, "ended the stream") && !strings.Contains(st.Source.Error, "has shut down") {
					t.Errorf("the server is away, status says %s: %q", st.Source.State, st.Source.Error)
				}
				if err := s.src.Restart(within(t, time.Minute), pgserver.Fast); err != nil {
					t.Fatal(err)
				}
				db = s.sql()
			}
			l := s.openLog()
			target := db.lsn(`SELECT pg_current_wal_flush_lsn()`)
			eventually(t, time.Minute, "it has caught up", func() (bool, error) {
				h, err := l.Head(t.Context())
				if err != nil {
					return false, nil
				}
				return h.EndLSN >= target, fmt.Errorf("the log ends at %s, want %s", h.EndLSN, target)
			})
			if err := r.end(); err != nil {
				t.Fatal(err)
			}
			checkLog(t, l).sameTables(t, db, "n.nspname = 'public'")
		})
	}
}

// TestStoppedWhileInterrupted: who stops a sidecar while the log is away is told that not everything is there.
func TestStoppedWhileInterrupted(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(simple)
	s.init()
	direct := *s
	away := newProxy(t, s.cfg.Log.URL)
	s.cfg.Log.URL = away.through(s.cfg.Log.URL)
	p := s.command(true, "run")
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	s.reached(direct.logSQL(), p, 1)
	away.refuse()
	db.do(`INSERT INTO public.things VALUES (2, 'b')`)
	eventually(t, time.Minute, "it is interrupted", func() (bool, error) { return strings.Contains(p.out.String(), "capture is interrupted"), nil })
	stop := func(p *program) (int, string) {
		t.Helper()
		if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		code := p.wait(time.Minute)
		return code, p.out.String()
	}
	if code, out := stop(p); code != 0 || !strings.Contains(out, "stopped while capture was interrupted; the source keeps what is not in the log") || strings.Contains(out, "everything received is in the log") {
		t.Errorf("it returned %d:\n%s", code, out)
	}

	// A job that is ended while it waits has not done what it was for.
	lock := direct.logSQL()
	lock.do(`BEGIN; LOCK TABLE backstory.head`)
	p = direct.command(true, "run", "--once")
	eventually(t, time.Minute, "it waits", func() (bool, error) {
		return lock.one(`SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND relation = 'backstory.head'::regclass`) == "t", nil
	})
	if code, out := stop(p); code != 1 || !strings.Contains(out, "backstory: interrupted\n") {
		t.Errorf("run --once returned %d:\n%s", code, out)
	}
	lock.do(`ROLLBACK`)
	direct.once()
	if n := lock.one(`SELECT position FROM backstory.head`); n != "2" {
		t.Errorf("the log has %s events", n)
	}
}
