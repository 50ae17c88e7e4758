package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// upgrading makes a system whose source can be upgraded to 18.
func upgrading(t *testing.T) *system {
	t.Helper()
	bin := pgservertest.WholeInstallation(t, "17")
	dir, err := os.MkdirTemp("", "backstory-upgrade-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil { // pg_upgrade runs as another user, and leaves files there
		t.Fatal(err)
	}
	return newSystem(t, where{own: true, apart: true, bin: bin, dir: filepath.Join(dir, "data")})
}

// upgrade upgrades the source, which was stopped.
func (s *system) upgrade() {
	s.t.Helper()
	cfg := quick(map[string]string{"port": strconv.Itoa(s.src.Port())})
	s.src = s.src.Upgrade(s.t, pgservertest.WholeInstallation(s.t, "18"), cfg)
}

// TestUpgrade: pg_upgrade, from 17 to 18, while existing rows are read: the sidecar, which was there when the old server was shut down, goes on by itself with
// the new one, which is another system. Nothing is missing or comes twice, ids are unique, and what was complete stays so.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	s := upgrading(t)
	db := s.sql()
	db.do(shopTables)
	db.do(`CREATE TYPE public.mood AS ENUM ('sad', 'glad'); CREATE TABLE public.people (id bigint PRIMARY KEY, m public.mood, gone int, big text); ALTER TABLE public.people DROP COLUMN gone, ADD COLUMN later int DEFAULT 7`)
	s.cfg.Capture.BaselineChunkBytes, s.cfg.Capture.BaselineBytesPerSecond = 4000, 20_000
	s.init()
	const work = `INSERT INTO public.people VALUES (%[1]d, 'sad', repeat('x', 9000)); UPDATE public.people SET m = 'glad' WHERE id = %[1]d - 1; UPDATE public.things SET v = 'new %[1]d' WHERE id %% 100 = %[1]d;
		INSERT INTO public.visits VALUES ('page', %[1]d); DELETE FROM public.visits WHERE n = %[1]d - 2`
	for i := range 20 {
		db.do(work, i)
	}
	r := s.start()
	l := s.logSQL()
	eventually(t, time.Minute, "some existing rows are read", func() (bool, error) {
		return l.one(`SELECT count(*) > 0 FROM backstory.baseline WHERE chunks > 0`) == "t", nil
	})
	if l.one(`SELECT count(*) > 0 FROM backstory.baseline WHERE done_at IS NULL`) != "t" {
		t.Error("all existing rows are read before the upgrade")
	}
	if err := s.src.Stop(pgserver.Fast); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the log knows that it has everything", func() (bool, error) { return l.one(`SELECT closed FROM backstory.head`) == "t", nil })
	was, err := s.openLog().Head(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	captured, err := s.openLog().Captured(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	s.upgrade()
	db = s.sql()
	for i := 20; i < 40; i++ { // also before the sidecar has seen it
		db.do(work, i)
	}
	db.do(`DELETE FROM public.people WHERE id = 3`)
	// What would speak against it.
	refused := func(what, says string, head eventlog.Head, captured []eventlog.Captured) {
		t.Helper()
		now, _, err := capture.Upgraded(within(t, time.Minute), s.cfg.Capture, head, captured)
		if now != nil || err == nil || !strings.Contains(eventlog.Hint(err), says) || !strings.Contains(err.Error(), "the log was made from") {
			t.Errorf("%s: %v (%s)", what, err, eventlog.Hint(err))
		}
	}
	with := func(f func(*eventlog.Head)) eventlog.Head { h := *was; f(&h); return h }
	refused("no sidecar at the shutdown", "no sidecar was there", with(func(h *eventlog.Head) { h.Closed = false }), captured)
	refused("16", "from PostgreSQL 17 on", with(func(h *eventlog.Head) { h.Version = 160004 }), captured)
	refused("the log is ahead", "not where pg_upgrade makes it", with(func(h *eventlog.Head) { h.EndLSN += 1 << 40 }), captured)
	el := s.openLog()
	eventually(t, time.Minute, "the sidecar goes on", func() (bool, error) {
		h, err := el.Head(context.Background())
		return err == nil && h.SystemID != was.SystemID && h.Version/10000 == 18 && !h.Closed && r.sc.Ready() == nil, r.sc.Ready()
	})
	s.baselineDone()
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	checkLog(t, s.openLog(), "public.things", "public.visits").sameTables(t, db, "n.nspname = 'public' AND c.relname <> 'visits'")
	s.sameRows("visits", "things", "people")
	if got := l.one(`SELECT count(*) FILTER (WHERE op = 'gap') || ' gaps, ' || count(*) FILTER (WHERE type LIKE '%%Healed') || ' healed, ' || count(*) FILTER (WHERE type LIKE '%%Altered') || ' altered, ' || count(*) - count(DISTINCT id) || ' ids twice' FROM backstory.events`); got != "0 gaps, 0 healed, 0 altered, 0 ids twice" {
		t.Error(got)
	}
	if got := l.one(`SELECT count(DISTINCT system_id) || ' ' || count(DISTINCT incarnation) FROM backstory.source`); got != "2 1" {
		t.Errorf("systems and incarnations: %s", got)
	}
	// The values before a change that the stream does not tell come from events of before the upgrade.
	if got := l.one(`SELECT length(before->>'big') FROM backstory.events WHERE relation = 'public.people' AND op = 'delete'`); got != "9000" {
		t.Errorf("before: %s", got)
	}
	refused("the slot has moved on since", "not where pg_upgrade makes it", *was, captured)
	db.do(`SELECT pg_drop_replication_slot('%[1]s'); SELECT pg_create_logical_replication_slot('%[1]s', 'pgoutput')`, s.cfg.Capture.Slot)
	refused("another slot", "not where pg_upgrade makes it", *was, captured)
}

// TestUpgradeWithoutTheSidecar: changes of which the log knows nothing, or of which it cannot know, are a gap as ever: the sidecar was not there when the
// server was shut down, although nothing is missing; a slot was made by hand; a captured table was altered before the sidecar saw it.
func TestUpgradeWithoutTheSidecar(t *testing.T) {
	t.Parallel()
	s := upgrading(t)
	db := s.sql()
	db.do(simple)
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	s.init()
	db.do(`INSERT INTO public.things VALUES (2, 'b')`)
	s.once()
	if err := s.src.Stop(pgserver.Fast); err != nil {
		t.Fatal(err)
	}
	s.upgrade()
	db = s.sql()
	err := s.tryOnce()
	if err == nil || !strings.Contains(err.Error(), "the log was made from") || !strings.Contains(eventlog.Hint(err), "no sidecar was there") || !strings.Contains(eventlog.Hint(err), "--accept-gap") {
		t.Errorf("%v (%s)", err, eventlog.Hint(err))
	}
	s.logSQL().do(`UPDATE backstory.head SET closed = true`)
	if got := written(newPatient(t, s, "").look()); !strings.Contains(got, "info: the source was upgraded with pg_upgrade → backstory run goes on with it") || strings.Contains(got, "the log does not go on") {
		t.Errorf("of a source that goes on doctor says:\n%s", got)
	}
	db.do(`ALTER TABLE public.things ADD COLUMN new int DEFAULT random() * 5`)
	if err := s.tryOnce(); err == nil || !strings.Contains(eventlog.Hint(err), "things was altered since the upgrade") {
		t.Errorf("%v (%s)", err, eventlog.Hint(err))
	}
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	s.once()
	verify(t, s.openLog())
	s.says(0, "", "checkout", "--at", "HEAD", "--schema", "of_now", "things")
	if got := s.logSQL().one(`SELECT string_agg(id || ' ' || v, ', ' ORDER BY id) FROM of_now.things`); got != "1 a, 2 b" {
		t.Errorf("the log has %s", got)
	}
}

// TestNoUpgrade: a dump restored to a later version, with a slot of the same name, is another source, also when everything of the old one is in the log, the
// tables happen to have the same OIDs and files, and the slot begins where one of pg_upgrade does; so is a restored one of the same version.
func TestNoUpgrade(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, version: "17"})
	name := databaseOf(t, s.cfg.Capture.URL)
	s.sql().do(simple)
	s.init()
	r := s.start()
	s.sql().do(`INSERT INTO public.things VALUES (1, 'a')`)
	l := s.logSQL()
	eventually(t, time.Minute, "it is in the log", func() (bool, error) { return l.one(`SELECT count(*) FROM backstory.events`) == "1", nil })
	port := strconv.Itoa(s.src.Port())
	if err := s.src.Stop(pgserver.Fast); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the log knows that it has everything", func() (bool, error) { return l.one(`SELECT closed FROM backstory.head`) == "t", nil })
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ version, hint string }{{"18", "It is not taken for the same source after pg_upgrade, since no row of the captured tables that can be read is older than its table"}, {"17", "Check BACKSTORY_SOURCE_URL"}} {
		cfg := quick(map[string]string{"port": port})
		cfg.Version = c.version
		other := pgservertest.Start(t, cfg)
		open(t, other.URL("postgres")).do(`CREATE DATABASE %s`, name)
		db := s.sql()
		for db.lsn(`SELECT pg_current_wal_lsn()`) < 0x9000000 { // beyond the log's end
			db.do(`SELECT pg_logical_emit_message(false, 'x', 'x')`)
			db.do(`SELECT pg_switch_wal()`)
		}
		db.do(simple)
		db.do(`INSERT INTO public.things VALUES (1, 'a'), (2, 'not in the log')`)
		db.do(`CREATE PUBLICATION backstory FOR TABLE public.things`)
		db.do(`CREATE PUBLICATION backstory_inserts WITH (publish = 'insert, truncate')`)
		db.do(`SELECT pg_switch_wal()`)
		db.do(`SELECT pg_create_logical_replication_slot('%s', 'pgoutput')`, s.cfg.Capture.Slot)
		if err := s.tryOnce(); err == nil || !strings.Contains(err.Error(), "the log was made from") || !strings.Contains(eventlog.Hint(err), c.hint) {
			t.Errorf("%s: %v (%s)", c.version, err, eventlog.Hint(err))
		}
		if got := l.one(`SELECT closed FROM backstory.head`); got != "t" {
			t.Error("the log has changed")
		}
		if err := other.Stop(pgserver.Immediate); err != nil {
			t.Fatal(err)
		}
	}
}
