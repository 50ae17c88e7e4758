package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/eventlog"
)

// TestWriterThatSleptThroughATakeOver: a process that was stopped while another one took over has transactions in hand that
// the other one has written meanwhile. It cannot append them, and says why it ends.
func TestWriterThatSleptThroughATakeOver(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, settings: map[string]string{"wal_sender_timeout": "2s"}})
	db := s.sql()
	db.do(simple)
	s.init()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	wrote := make(chan error, 1)
	n := 0
	go func() {
		conn, err := dial(ctx, s.cfg.Capture.URL)
		if err != nil {
			wrote <- err
			return
		}
		defer conn.Close(context.Background())
		for ctx.Err() == nil {
			n++
			if _, err := conn.Exec(context.Background(), fmt.Sprintf(`INSERT INTO public.things VALUES (%d, 'x')`, n)); err != nil {
				wrote <- err
				return
			}
		}
		wrote <- nil
	}()
	l := s.logSQL()
	head := func(what string) int64 { return atoi(t, l.one(`SELECT %s FROM backstory.head`, what)) }
	first := s.command(true, "run")
	s.reached(l, first, 100)
	if err := first.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	epoch := head("epoch")
	second := s.command(true, "run")
	eventually(t, time.Minute, "the second one has taken over", func() (bool, error) {
		if !second.running() {
			return false, fmt.Errorf("it ended:\n%s", second.out.tail(20))
		}
		return head("epoch") > epoch, nil
	})
	at := head("position")
	s.reached(l, second, at+200)
	if err := first.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	at = head("position")
	s.reached(l, second, at+500)
	if !second.running() {
		t.Fatalf("the second one ended:\n%s", second.out.tail(20))
	}
	// The first one has noticed: it has ended, or waits for its turn. Either way it says so.
	eventually(t, time.Minute, "the first one says that it was replaced", func() (bool, error) {
		out := first.out.String()
		return strings.Contains(out, "taken over") || strings.Contains(out, "in use by another") || strings.Contains(out, "waiting to take over"), fmt.Errorf("it says:\n%s", first.out.tail(20))
	})
	if !first.running() && first.wait(time.Second) == 0 {
		t.Errorf("the first one returned 0:\n%s", first.out.tail(20))
	}
	stop()
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	s.reached(l, second, int64(n))
	second.kill()
	first.kill()
	w := checkLog(t, s.openLog())
	w.sameTables(t, db, "n.nspname = 'public'")
}

// TestSleeperWithLocks: a sidecar that was put to sleep while it looked for altered tables, or in the middle of an append, has locks of the
// log. Another one takes over all the same.
func TestSleeperWithLocks(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(simple)
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	s.once()
	for _, lock := range []string{`SELECT pg_advisory_lock(backstory.key_hash('backstory captured'))`, `BEGIN; SELECT FROM backstory.captured FOR UPDATE; SELECT FROM backstory.head FOR UPDATE`} {
		sleeper := s.logSQL()
		sleeper.do(`SELECT pg_advisory_lock_shared(backstory.key_hash('backstory writer'))`)
		sleeper.do("%s", lock)
		db.do(`ALTER TABLE public.things ADD COLUMN IF NOT EXISTS n int; UPDATE public.things SET n = coalesce(n, 0) + 1`)
		began := time.Now()
		s.once()
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("taking over took %s", took)
		}
	}
	checkLog(t, s.openLog()).sameTables(t, db, "n.nspname = 'public'")
}

// batch makes a transaction of inserts as the stream gives it; without an end if open.
func batch(rel *eventlog.Relation, lsn eventlog.LSN, xid uint32, ids []int, open bool) *eventlog.Batch {
	b := eventlog.NewBatch(nil)
	b.Add(eventlog.Item{Kind: eventlog.ItemBegin, CommitLSN: lsn, XID: xid, Timeline: 1, Time: time.Unix(1e9, 0)})
	for _, id := range ids {
		row := b.Values(2)
		row[0] = eventlog.Value{State: eventlog.StateText, Text: fmt.Append(nil, id)}
		row[1] = eventlog.Value{State: eventlog.StateText, Text: []byte(strings.Repeat("x", 1000))}
		b.Add(eventlog.Item{Kind: eventlog.ItemChange, Op: eventlog.OpInsert, Relation: rel, New: row})
	}
	if !open {
		b.Add(eventlog.Item{Kind: eventlog.ItemCommit, EndLSN: lsn + 8})
	}
	return b
}

// TestFencedWriter: a writer that was replaced can do nothing any more, whatever it was about to do, and harms nothing that
// the new one has written.
func TestFencedWriter(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.Log.PartitionEvents = 3000 // so that a part needs another partition, too
	db := s.sql()
	db.do(simple)
	s.init()
	_, tables := s.beginning()
	rel := tables[0].Relation
	// The new writer has a role that may not end the old one's session: only the epoch stands between them.
	db.do(`DO $$ BEGIN CREATE ROLE successor_e2e LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$`)
	db.do(`GRANT postgres TO successor_e2e`)
	successor := *s
	successor.cfg.Log.URL = withUser(t, s.logURL(), "successor_e2e")
	many := func(from int) (ids []int) {
		for i := range 6000 { // more than one part
			ids = append(ids, from+i)
		}
		return ids
	}
	ctx := within(t, time.Minute)
	for _, c := range []struct {
		name string
		do   func(old *eventlog.Writer) error
	}{
		{"it appends a transaction", func(old *eventlog.Writer) error {
			return old.Append(ctx, batch(rel, 1<<40, 9, []int{1}, false))
		}},
		{"it appends a part", func(old *eventlog.Writer) error { return old.Append(ctx, batch(rel, 1<<40, 9, many(1), true)) }},
		{"it goes on with a part", func(old *eventlog.Writer) error {
			b := eventlog.NewBatch(nil)
			b.Add(eventlog.Item{Kind: eventlog.ItemCommit, EndLSN: 1<<40 + 8})
			return old.Append(ctx, b)
		}},
		{"its stream is cut", func(old *eventlog.Writer) error {
			b := eventlog.NewBatch(nil)
			b.Add(eventlog.Item{Kind: eventlog.ItemReset})
			return old.Append(ctx, b)
		}},
		{"it records progress", func(old *eventlog.Writer) error {
			b := eventlog.NewBatch(nil)
			b.Add(eventlog.Item{Kind: eventlog.ItemProgress, EndLSN: 1 << 41})
			b.Final = true
			return old.Append(ctx, b)
		}},
		{"it records a gap", func(old *eventlog.Writer) error { return old.Gap(ctx, "none", 0, 0, false) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := s.openLog()
			old, err := l.NewWriter(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer old.Close(context.Background())
			if strings.Contains(c.name, "a part") && c.name != "it appends a part" || strings.Contains(c.name, "cut") {
				if err := old.Append(ctx, batch(rel, 1<<40, 9, many(1), true)); err != nil {
					t.Fatal(err)
				}
			}
			other := successor.openLog()
			now, err := other.NewWriter(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer now.Close(context.Background())
			// The new one is in the middle of a transaction.
			lsn := now.Head().EndLSN + 100
			if err := now.Append(ctx, batch(rel, lsn, 7, many(100_000), true)); err != nil {
				t.Fatal(err)
			}
			if h := now.Head(); h.Written <= h.Position {
				t.Fatalf("no part was written: %+v", h)
			}
			if err := c.do(old); !errors.Is(err, eventlog.ErrFenced) {
				t.Errorf("the old writer: %v, want ErrFenced", err)
			}
			end := eventlog.NewBatch(nil)
			end.Add(eventlog.Item{Kind: eventlog.ItemCommit, EndLSN: lsn + 8})
			if err := now.Append(ctx, end); err != nil {
				t.Errorf("the new writer: %v", err)
			}
			h, err := other.Head(ctx)
			if err != nil || h.Gap != "" || h.EndLSN != lsn+8 {
				t.Errorf("the head is %+v, %v", h, err)
			}
			verify(t, other)
		})
	}
}

// TestConfirmedIsDurable: a role whose commits are not synchronous does not make the log forget what the source was told is
// safe.
func TestConfirmedIsDurable(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, logs: map[string]string{"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB", "bgwriter_lru_maxpages": "0"}})
	l := s.logSQL()
	l.do(`ALTER ROLE postgres SET synchronous_commit = off`)
	l.do(`ALTER DATABASE %s SET synchronous_commit = off`, l.Config().Database)
	db := s.sql()
	db.do(simple)
	s.init()
	db.do(`INSERT INTO public.things VALUES (0, 'the partition and everything else is made')`)
	s.once()
	l.do(`CHECKPOINT`)
	r := s.start()
	var confirmed eventlog.LSN
	for i := range 20 {
		db.do(`INSERT INTO public.things VALUES (%d, 'x')`, i+1)
		at := db.lsn(`SELECT pg_current_wal_lsn()`)
		if i%10 == 9 {
			eventually(t, 30*time.Second, "the slot is confirmed", func() (bool, error) {
				confirmed = db.lsn(`SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '%s'`, s.cfg.Capture.Slot)
				return confirmed >= at, fmt.Errorf("%s of %s", confirmed, at)
			})
		}
	}
	if err := s.log.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.log.Restart(within(t, time.Minute), 0); err != nil {
		t.Fatal(err)
	}
	l = s.logSQL()
	if end := l.lsn(`SELECT end_lsn FROM backstory.head`); end < confirmed {
		t.Errorf("the source was told that everything before %s is safe; after a crash the log ends at %s", confirmed, end)
	}
	if n := l.one(`SELECT count(*) FROM backstory.events`); n != "21" {
		t.Errorf("%s events are left, want 21", n)
	}
	_ = r.end()
	checkLog(t, s.openLog()).sameTables(t, db, "n.nspname = 'public'")
}

// TestHistoryRefusesToBeChanged: nobody changes what is history by accident, the owner and a superuser included.
func TestHistoryRefusesToBeChanged(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.Log.PartitionEvents = 10
	db := s.sql()
	db.do(simple)
	s.init()
	db.do(`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "anna"}'); INSERT INTO public.things SELECT i, 'x' FROM generate_series(1, 25) i; COMMIT`)
	s.once()
	l := s.logSQL()
	tables := []string{"event", "event_p1", "event_p11", "context", "kind", "relation", "aggregate", "source", "events", "thing_events"}
	column := map[string]string{"event": "xid = 1", "event_p1": "xid = 1", "event_p11": "xid = 1", "context": "metadata = '{}'", "kind": "type = 'x'", "relation": "name = 'x'",
		"aggregate": "name = 'x'", "source": "database = 'x'", "events": "xid = 1", "thing_events": "data = '{}'"}
	for _, table := range tables {
		for _, q := range []string{"UPDATE backstory.%[1]s SET %[2]s", "DELETE FROM backstory.%[1]s", "TRUNCATE backstory.%[1]s CASCADE"} {
			if strings.HasPrefix(q, "TRUNCATE") && strings.HasSuffix(table, "events") {
				continue // a view
			}
			_, err := l.Exec(t.Context(), fmt.Sprintf(q, table, column[table]))
			var pe *pgconn.PgError
			if !errors.As(err, &pe) || pe.Code != "42501" || !strings.Contains(pe.Message, "append-only") || pe.Hint == "" {
				t.Errorf("%s: %v", fmt.Sprintf(q, table, column[table]), err)
			}
		}
	}
	// Maintenance is for the owner: whoever else was given all rights can say so, too, in vain.
	role := "meddler_" + strings.ToLower(s.cfg.Capture.Slot)
	l.do(`CREATE ROLE %s; GRANT USAGE ON SCHEMA backstory TO %[1]s; GRANT ALL ON ALL TABLES IN SCHEMA backstory TO %[1]s`, role)
	t.Cleanup(func() { open(t, s.logURL()).do(`DROP OWNED BY %s; DROP ROLE %[1]s`, role) })
	for _, table := range tables[:len(tables)-2] {
		for _, q := range []string{"UPDATE backstory.%[1]s SET %[2]s", "DELETE FROM backstory.%[1]s", "TRUNCATE backstory.%[1]s CASCADE"} {
			q = fmt.Sprintf(q, table, column[table])
			_, err := l.Exec(t.Context(), `BEGIN; SET LOCAL ROLE `+role+`; SET LOCAL backstory.maintenance = 'on'; `+q+`; ROLLBACK`)
			if err == nil || !strings.Contains(err.Error(), "append-only") {
				t.Errorf("by another role, in maintenance: %s: %v", q, err)
			}
			l.do("ROLLBACK")
		}
	}
	l.do(`BEGIN; SET LOCAL backstory.maintenance = 'on'; UPDATE backstory.event SET xid = xid; ROLLBACK`)
	if _, err := l.Exec(t.Context(), `INSERT INTO backstory.events (position, data) VALUES (99, '{}')`); err == nil {
		t.Error("an INSERT into the view is accepted")
	}
	if n := l.one(`SELECT count(*) FROM backstory.events`); n != "25" {
		t.Errorf("%s events", n)
	}
	verify(t, s.openLog())
}
