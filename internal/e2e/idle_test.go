package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// TestIdle: with the log in the source's own database, its own WAL is no reason to write more of it; and where only others
// write, the slot follows, so that no WAL is kept for nothing.
func TestIdle(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, tables: []string{"public.things"}, settings: map[string]string{"autovacuum": "off"}})
	db := s.sql()
	db.do(simple + `; CREATE TABLE public.others (id int)`)
	s.init()
	r := s.start()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	l := s.openLog()
	eventually(t, time.Minute, "the insert is in the log", func() (bool, error) {
		h, err := l.Head(t.Context())
		return err == nil && h.Position == 1, err
	})

	// Nobody writes.
	commits := func() int64 { return atoi(t, db.one(`SELECT pg_snapshot_xmax(pg_current_snapshot())`)) }
	wal := func() eventlog.LSN { return db.lsn(`SELECT pg_current_wal_insert_lsn()`) }
	confirmed := func() eventlog.LSN {
		return db.lsn(`SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '%s'`, s.cfg.Capture.Slot)
	}
	const lasts = 12 * time.Second
	n, at, began := commits(), wal(), time.Now()
	time.Sleep(lasts) // the only way to see that nothing happens
	took := time.Since(began)
	n, grown := commits()-n, wal()-at
	if float64(n) > took.Seconds() {
		t.Errorf("idle, the sidecar committed %d times in %s", n, took)
	}
	if grown > 64<<10 {
		t.Errorf("idle, the WAL grew by %d bytes in %s", grown, took)
	}

	// Others write; nothing of it is captured.
	before := confirmed()
	db.do(`INSERT INTO public.others SELECT generate_series(1, 20000)`)
	target := wal()
	n, began = commits(), time.Now()
	eventually(t, 30*time.Second, "the slot has followed", func() (bool, error) {
		c := confirmed()
		// Where a page of the WAL has just begun, what is flushed ends before its header, and what is inserted next begins behind it.
		return c+64 >= target, fmt.Errorf("it stands at %s, was at %s, should come to %s", c, before, target)
	})
	if n, took = commits()-n, time.Since(began); float64(n) > took.Seconds()+2 {
		t.Errorf("while others wrote, the sidecar committed %d times in %s", n, took)
	}
	t.Logf("idle: %d bytes of WAL; after others wrote, the slot followed in %s", grown, time.Since(began).Round(time.Millisecond))
	if err := r.end(); err != nil {
		t.Error(err)
	}
	if h, err := l.Head(t.Context()); err != nil || h.Position != 1 {
		t.Errorf("the log ends at %d, %v", h.Position, err)
	}
}

// TestForeignWALIsReleased: WAL without events is confirmed by size, too, not only by time.
func TestForeignWALIsReleased(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, tables: []string{"public.things"}, settings: map[string]string{"autovacuum": "off"}})
	db := s.sql()
	db.do(simple + `; CREATE TABLE public.others (v text)`)
	s.init()
	s.start()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	l := s.openLog()
	eventually(t, time.Minute, "the insert is in the log", func() (bool, error) {
		h, err := l.Head(t.Context())
		return err == nil && h.Position == 1, err
	})
	began := time.Now()
	start := db.lsn(`SELECT pg_current_wal_lsn()`)
	for range 5 {
		db.do(`INSERT INTO public.others SELECT repeat(md5(i::text), 30) FROM generate_series(1, 10000) i`)
	}
	written := db.lsn(`SELECT pg_current_wal_lsn()`) - start
	eventually(t, 8*time.Second, "most of it is confirmed", func() (bool, error) {
		c := db.lsn(`SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '%s'`, s.cfg.Capture.Slot)
		return c > start+written/2, fmt.Errorf("%s of %s to %s", c, start, start+written)
	})
	t.Logf("%d MB of foreign WAL, confirmed within %s", written>>20, time.Since(began).Round(time.Millisecond))
}
