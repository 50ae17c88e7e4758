package e2e

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/internal/pgserver"
)

// allowed is the most memory that a sidecar with default settings may ever have had, in bytes. It is tight, so that transactions
// of a size that make test can afford are several times as large: a sidecar that kept one in memory would fail.
func allowed(t testing.TB) int64 { return int64(setting(t, "BACKSTORY_MEMORY_BOUND_MB", 80)) << 20 }

var peakLine = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)

// peak reads how much memory a process has had at most.
func (p *program) peak() int64 {
	p.t.Helper()
	if runtime.GOOS != "linux" {
		p.t.Fatal("the peak of a process can be read on Linux only")
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	m := peakLine.FindSubmatch(b)
	if m == nil {
		p.t.Fatalf("no VmHWM in\n%s", b)
	}
	return atoi(p.t, string(m[1])) << 10
}

// bounded fails if a sidecar has ever had more memory than allowed.
func (p *program) bounded(what string) {
	p.t.Helper()
	if n, most := p.peak(), allowed(p.t); n > most {
		p.t.Errorf("%s: the sidecar has had %d MB of memory, %d are allowed", what, n>>20, most>>20)
	} else {
		p.t.Logf("%s: peak %d MB of %d", what, n>>20, most>>20)
	}
}

// reached waits until the log has so many events and, where the program sends, they are sent.
func (s *system) reached(l *session, p *program, position int64) {
	s.t.Helper()
	limit := time.Minute + time.Duration(position)*time.Millisecond/10
	eventually(s.t, limit, fmt.Sprintf("event %d is in the log", position), func() (bool, error) {
		if !p.running() {
			return false, fmt.Errorf("the sidecar ended:\n%s", p.out.tail(20))
		}
		at := l.one(`SELECT position FROM backstory.head`)
		return atoi(s.t, at) >= position, fmt.Errorf("it stands at %s; the sidecar says:\n%s", at, p.out.tail(10))
	})
	if s.sends {
		eventually(s.t, limit, fmt.Sprintf("event %d is sent", position), func() (bool, error) {
			at := l.one(`SELECT coalesce(max(position), -1) FROM backstory.checkpoint`)
			return atoi(s.t, at) >= position, fmt.Errorf("it stands at %s; the sidecar says:\n%s", at, p.out.tail(10))
		})
	}
}

// TestHugeTransaction has one transaction of many rows, far more than memory may hold, while the sidecar, the connection and
// the log's server fail in the middle of it. Readers never see any of it before all of it.
func TestHugeTransaction(t *testing.T) {
	t.Parallel()
	rows := int64(setting(t, "BACKSTORY_MEMORY_ROWS", 60_000))
	words := 3*allowed(t)/rows/32 + 1 // of 32 bytes in each row: the transaction has three times what is allowed
	s := newSystem(t, where{own: true, apart: true, logs: map[string]string{"wal_level": "replica"}})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id bigint PRIMARY KEY, v text, n int); ALTER TABLE public.things ALTER v SET STORAGE PLAIN;
		CREATE TABLE public.few (id int PRIMARY KEY)`)
	s.init()
	s.sends = true
	direct := s.cfg.Log.URL
	network := newProxy(t, s.cfg.Capture.URL)
	s.cfg.Capture.URL = network.through(s.cfg.Capture.URL)
	db.do(`INSERT INTO public.few VALUES (1)`)
	p := s.command(false, "run")
	l := s.logSQL()
	s.reached(l, p, 1)

	db.do(`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "import"}');
		INSERT INTO public.things SELECT i, repeat(md5(i::text), %d), 0 FROM generate_series(1, %d) i; COMMIT; INSERT INTO public.few VALUES (2)`, words, rows)
	part := func() {
		t.Helper()
		eventually(t, 2*time.Minute, "a part of the transaction is written", func() (bool, error) {
			if !p.running() {
				return false, fmt.Errorf("the sidecar ended:\n%s", p.out.tail(20))
			}
			r := l.rows(`SELECT written - position, position FROM backstory.head`)
			if atoi(t, r[0][1]) > 1 {
				t.Fatal("the transaction was over before anything could fail; it has to be larger")
			}
			return atoi(t, r[0][0]) > rows/10, nil
		})
		unseen(t, l)
	}
	part()
	p.kill()
	unseen(t, l)
	p = s.command(false, "run")
	eventually(t, time.Minute, "the next writer has removed what was left", func() (bool, error) { return l.one(`SELECT written = position FROM backstory.head`) == "t", nil })
	part()
	network.cut()
	eventually(t, time.Minute, "the writer has removed what was left", func() (bool, error) { return l.one(`SELECT written = position FROM backstory.head`) == "t", nil })
	part()
	if err := s.log.Restart(within(t, time.Minute), pgserver.Immediate); err != nil {
		t.Fatal(err)
	}
	l = open(t, direct)
	unseen(t, l)
	eventually(t, time.Minute, "the next writer has removed what was left", func() (bool, error) { return l.one(`SELECT written = position FROM backstory.head`) == "t", nil })

	// Now to the end, watched by a reader.
	ctx, stop := context.WithCancel(context.Background())
	watched := make(chan error, 1)
	looks := 0
	go func() {
		conn, err := dial(ctx, direct)
		if err != nil {
			watched <- err
			return
		}
		defer conn.Close(context.Background())
		for {
			r, err := textRows(context.Background(), conn, `SELECT h.position, (SELECT count(*) FROM backstory.events WHERE relation = 'public.things'), h.written > h.position FROM backstory.head h`)
			if err != nil {
				watched <- err
				return
			}
			if n := r[0][1]; n != "0" && n != fmt.Sprint(rows) {
				watched <- fmt.Errorf("a reader sees %s rows of %d, the head is %s", n, rows, r[0][0])
				return
			}
			if r[0][2] == "t" {
				looks++
			}
			select {
			case <-ctx.Done():
				watched <- nil
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	s.reached(l, p, rows+2)
	stop()
	if err := <-watched; err != nil {
		t.Fatal(err)
	}
	if looks == 0 {
		t.Error("no reader looked while a part was written")
	}
	p.bounded(fmt.Sprintf("%d inserts, %d MB, in one transaction", rows, rows*words*32>>20))

	// The same rows changed: the state before comes from the log.
	db.do(`UPDATE public.things SET n = n + 1; INSERT INTO public.few VALUES (3)`)
	s.reached(l, p, 2*rows+3)
	p.bounded("the same rows updated")
	p.kill()

	for _, table := range []string{"event", "context"} {
		if n := l.one(`SELECT count(*) FROM backstory.%s e, backstory.head h WHERE %s > h.position`, table, map[string]string{"event": "e.position", "context": "e.sealed_at"}[table]); n != "0" {
			t.Errorf("%s rows of %s are left beyond the head", n, table)
		}
	}
	if n := l.one(`SELECT count(*) FROM backstory.events WHERE metadata->>'actor' = 'import'`); n != fmt.Sprint(rows) {
		t.Errorf("%s events have the context, want %d", n, rows)
	}
	s.cfg.Log.URL = direct
	w := checkLog(t, s.openLog())
	w.sameTables(t, db, "n.nspname = 'public'")
	t.Logf("a reader looked %d times while a part was written", looks)
}

// unseen fails if a reader sees anything of the transaction.
func unseen(t testing.TB, l *session) {
	t.Helper()
	if n := l.one(`SELECT count(*) FROM backstory.events WHERE relation = 'public.things'`); n != "0" {
		t.Fatalf("a reader sees %s rows of a transaction that is still coming in", n)
	}
}

// TestHugeRows has rows of one megabyte, and a transaction with as much context.
func TestHugeRows(t *testing.T) {
	t.Parallel()
	mb := int64(setting(t, "BACKSTORY_MEMORY_MB", 160))
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.blobs (id int PRIMARY KEY, n int, v text, x bytea); ALTER TABLE public.blobs ALTER v SET STORAGE EXTERNAL, ALTER x SET STORAGE EXTERNAL;
		CREATE TABLE public.blobs_full (id int PRIMARY KEY, n int, v text); ALTER TABLE public.blobs_full REPLICA IDENTITY FULL;
		ALTER TABLE public.blobs_full ALTER v SET STORAGE EXTERNAL;
		CREATE TABLE public.noted (id int PRIMARY KEY);
		CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			PERFORM pg_logical_emit_message(true, 'backstory', json_build_object('n', NEW.id, 'pad', repeat('x', 4000))::text); RETURN NEW; END $$;
		CREATE TRIGGER note BEFORE INSERT ON public.noted FOR EACH ROW EXECUTE FUNCTION public.note()`)
	s.init()
	s.sends = true
	p := s.command(false, "run")
	l := s.logSQL()
	db.do(`INSERT INTO public.blobs SELECT i, 0, repeat(md5(i::text), 32768), decode(repeat(md5(i::text), 2048), 'hex') FROM generate_series(1, %d) i`, mb)
	s.reached(l, p, mb)
	p.bounded(fmt.Sprintf("%d rows of one megabyte in one transaction", mb))
	// Large values that do not change: only the log knows them, and some of these events and each delete hold them.
	for range 3 {
		db.do(`UPDATE public.blobs SET n = n + 1`)
	}
	db.do(`UPDATE public.blobs SET id = -id WHERE id <= 10`)
	db.do(`DELETE FROM public.blobs WHERE id > %d / 2`, mb)
	want := mb + 3*mb + min(10, mb) + mb - mb/2
	s.reached(l, p, want)
	p.bounded("the same rows, updated, moved and deleted")
	db.do(`INSERT INTO public.blobs_full SELECT id, n, v FROM public.blobs`)
	left := mb / 2
	db.do(`UPDATE public.blobs_full SET n = n + 1; DELETE FROM public.blobs_full`)
	want += 3 * left
	s.reached(l, p, want)
	p.bounded("the same with REPLICA IDENTITY FULL")
	db.do(`INSERT INTO public.noted SELECT i FROM generate_series(1, %d) i`, mb*256)
	want += mb * 256
	s.reached(l, p, want)
	p.bounded(fmt.Sprintf("%d megabytes of context in one transaction", mb))
	p.kill()
	if n := l.one(`SELECT count(*) FROM backstory.events WHERE relation = 'public.noted' AND metadata->>'n' = aggregate_id`); n != fmt.Sprint(mb*256) {
		t.Errorf("%s events have their context, want %d", n, mb*256)
	}
	w := checkLog(t, s.openLog())
	w.sameTables(t, db, "n.nspname = 'public'")
}
