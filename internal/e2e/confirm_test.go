package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// confirmed is up to where the source was told that it may forget its WAL.
func (s *system) confirmed(db *session) eventlog.LSN {
	s.t.Helper()
	return db.lsn(`SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '%s'`, s.cfg.Capture.Slot)
}

// TestDeadKafkaHoldsNothingBack: with Kafka dead for the whole time the slot is confirmed up to what the log has, again and
// again, and the sidecar ends in time when asked to.
func TestDeadKafkaHoldsNothingBack(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		broker func(t *testing.T) string
	}{
		{"nobody listens", func(*testing.T) string { return "127.0.0.1:1" }},
		{"it takes everything and never answers", mute},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{apart: true})
			db := s.sql()
			db.do(simple)
			s.init()
			s.env = append(s.env, "BACKSTORY_KAFKA_BROKERS="+c.broker(t), "BACKSTORY_KAFKA_TOPIC=shop")
			l := s.logSQL()
			p := s.command(true, "run")
			const rounds, rows = 4, 1000
			last := s.confirmed(db)
			for n := range int64(rounds) {
				db.do(`INSERT INTO public.things SELECT i, 'x' FROM generate_series(%d, %d) i`, n*rows+1, (n+1)*rows)
				s.reached(l, p, (n+1)*rows)
				end := l.lsn(`SELECT end_lsn FROM backstory.head`)
				eventually(t, time.Minute, "the slot is confirmed up to what the log has", func() (bool, error) {
					now := s.confirmed(db)
					return now >= end, fmt.Errorf("it is at %s, the log ends at %s", now, end)
				})
				if now := s.confirmed(db); now <= last {
					t.Errorf("round %d: the slot was at %s and is at %s", n, last, now)
				} else {
					last = now
				}
			}
			if sent := l.one(`SELECT coalesce(max(position), 0) FROM backstory.checkpoint`); sent != "0" {
				t.Errorf("something was sent to a dead Kafka: the checkpoint is at %s", sent)
			}
			s.stops(p, db, l)
		})
	}
}

// mute listens and never answers.
func mute(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
		for _, c := range conns {
			_ = c.Close()
		}
	})
	return l.Addr().String()
}

// stops asks a sidecar to end. It drains: the source knows all that the log has.
func (s *system) stops(p *program, db, l *session) {
	s.t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	if code := p.wait(40 * time.Second); code != 0 {
		s.t.Fatalf("the sidecar, asked to end, returned %d:\n%s", code, p.out.tail(20))
	}
	if end, now := l.lsn(`SELECT end_lsn FROM backstory.head`), s.confirmed(db); now != end {
		s.t.Errorf("the sidecar has ended; the log ends at %s, the slot is confirmed up to %s", end, now)
	}
}

// load is an application that never rests.
type load struct {
	stop      func()
	committed atomic.Int64
}

// write begins a load of transactions of 20 rows of 1 kB, up to 100 a second in each session. It ends with the test, or before.
func (s *system) write(sessions int) *load {
	s.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	w := &load{stop: func() { stop(); wg.Wait() }}
	for range sessions {
		wg.Go(func() {
			conn, err := dial(ctx, s.cfg.Capture.URL)
			for err == nil && ctx.Err() == nil {
				if _, err = conn.Exec(context.Background(), `INSERT INTO public.loads (v) SELECT repeat(md5(i::text), 32) FROM generate_series(1, 20) i`); err == nil {
					w.committed.Add(1)
				}
				time.Sleep(10 * time.Millisecond)
			}
			if conn != nil {
				_ = conn.Close(context.Background())
			}
			if err != nil && ctx.Err() == nil {
				s.t.Errorf("the application: %v", err)
			}
		})
	}
	s.t.Cleanup(w.stop)
	return w
}

// more waits until so many more transactions are committed.
func (w *load) more(t testing.TB, n int64) {
	t.Helper()
	n += w.committed.Load()
	eventually(t, time.Minute, "the application works", func() (bool, error) { return w.committed.Load() >= n, nil })
}

const loads = `CREATE TABLE public.loads (id bigserial PRIMARY KEY, v text)`

// TestStoppedSidecarHasConfirmed: a sidecar that is asked to end, at work, appends what it has received, and tells the source
// of all that it has appended.
func TestStoppedSidecarHasConfirmed(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(seedOf(t), 4))
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(loads)
	s.init()
	l := s.logSQL()
	w := s.write(2)
	for range 4 {
		at := atoi(t, l.one(`SELECT position FROM backstory.head`))
		p := s.command(true, "run")
		s.reached(l, p, at+1+r.Int64N(4000))
		s.stops(p, db, l)
		w.more(t, 10)
	}
	// In the middle of a large transaction nothing of it is appended.
	w.stop()
	s.once()
	at := l.one(`SELECT position FROM backstory.head`)
	db.do(`INSERT INTO public.loads (v) SELECT repeat(md5(i::text), 32) FROM generate_series(1, 60000) i`)
	p := s.command(true, "run")
	eventually(t, time.Minute, "a part of the transaction is written", func() (bool, error) {
		return l.one(`SELECT written - position > 1000 FROM backstory.head`) == "t", nil
	})
	s.stops(p, db, l)
	if now := l.one(`SELECT position FROM backstory.head`); now != at {
		t.Errorf("the log went from %s to %s: the transaction was over before the sidecar was stopped", at, now)
	}
	s.once()
	checkLog(t, s.openLog()).sameTables(t, db, "n.nspname = 'public'")
}

// TestOnceEndsUnderLoad: run --once ends at the WAL position of its start, however much is written meanwhile.
func TestOnceEndsUnderLoad(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	db := s.sql()
	db.do(loads)
	s.init()
	l := s.logSQL()
	w := s.write(2)
	wal := func() eventlog.LSN { return db.lsn(`SELECT pg_current_wal_insert_lsn()`) }
	for range 2 {
		db.do(`INSERT INTO public.loads (v) SELECT repeat(md5(i::text), 32) FROM generate_series(1, 30000) i`) // takes a while
		before := wal()
		p := s.command(true, "run", "--once")
		eventually(t, time.Minute, "it streams", func() (bool, error) { return strings.Contains(p.out.String(), "msg=streaming") || !p.running(), nil })
		latest := wal() // it had chosen its end before this
		if code := p.wait(time.Minute); code != 0 {
			t.Fatalf("run --once returned %d:\n%s", code, p.out.tail(20))
		}
		after := wal()
		end := l.lsn(`SELECT end_lsn FROM backstory.head`)
		const slack = 128 << 10 // the transaction that reaches the end may end behind it
		switch {
		case end < before:
			t.Errorf("the source stood at %s when it began, the log ends at %s", before, end)
		case end > latest+slack:
			t.Errorf("the source stood at %s when it streamed, the log ends at %s: it ran after what is written meanwhile", latest, end)
		case after <= latest+slack:
			t.Errorf("from %s only to %s was written meanwhile: this proves nothing", latest, after)
		}
		t.Logf("began at %s to %s, the log ends at %s, the source at %s", before, latest, end, after)
	}
	w.stop()
	s.once()
	checkLog(t, s.openLog()).sameTables(t, db, "n.nspname = 'public'")
}
