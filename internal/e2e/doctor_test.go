package e2e

import (
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/capture"
)

// TestDoctor: what lies in the way of capture, or will, is found on a server that is really like that, and not before.
func TestDoctor(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, settings: map[string]string{"max_replication_slots": "2", "max_wal_senders": "2", "max_slot_wal_keep_size": "48MB", "wal_keep_size": "0"}})
	db := s.sql()
	db.do("%s", simple)
	find := func() string {
		t.Helper()
		list, err := capture.Examine(t.Context(), s.cfg.Capture)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, f := range list {
			if f.Risk == "" {
				t.Errorf("%+v does not say why", f)
			}
			out = append(out, string(f.Severity)+": "+f.What+" → "+f.SQL+f.Remedy)
		}
		return strings.Join(out, "\n")
	}
	// with makes something so, and wants it to be found then, and only then.
	with := func(what string, makeSo, undo func()) {
		t.Helper()
		if got := find(); strings.Contains(got, what) {
			t.Errorf("without reason doctor says %q:\n%s", what, got)
		}
		makeSo()
		got := find()
		if !strings.Contains(got, what) {
			t.Errorf("doctor does not say %q:\n%s", what, got)
		}
		if !strings.Contains(got, "danger: fsync is off") { // it has looked at the rest, too
			t.Errorf("besides %q doctor says only:\n%s", what, got)
		}
		undo()
	}
	sql := func(q string) func() { return func() { t.Helper(); db.do("%s", q) } }

	with("warning: prepared transactions are open: forgotten (since ", sql(`BEGIN; INSERT INTO public.things VALUES (1, 'a'); PREPARE TRANSACTION 'forgotten'`), sql(`ROLLBACK PREPARED 'forgotten'`))
	with("warning: publication everything is FOR ALL TABLES", sql(`CREATE PUBLICATION everything FOR ALL TABLES`), sql(`DROP PUBLICATION everything`))
	with("info: public.things has row-level security", sql(`ALTER TABLE public.things ENABLE ROW LEVEL SECURITY`), sql(`ALTER TABLE public.things DISABLE ROW LEVEL SECURITY`))
	with("danger: all replication slots are in use → ALTER SYSTEM SET max_replication_slots = 12",
		sql(`SELECT pg_create_physical_replication_slot('a'), pg_create_physical_replication_slot('b')`), sql(`SELECT pg_drop_replication_slot('a'), pg_drop_replication_slot('b')`))
	own := s.cfg.Capture.URL
	with("lacks the right REPLICATION → As a superuser: ALTER ROLE \"weak\" REPLICATION",
		func() {
			db.do(`CREATE ROLE weak LOGIN`)
			u, err := url.Parse(own)
			if err != nil {
				t.Fatal(err)
			}
			u.User = url.User("weak")
			s.cfg.Capture.URL = u.String()
		}, func() { s.cfg.Capture.URL = own })

	// That one WAL sender is left is enough.
	sender := func() *pgconn.PgConn {
		t.Helper()
		cfg, err := pgconn.ParseConfig(own)
		if err != nil {
			t.Fatal(err)
		}
		cfg.RuntimeParams["replication"] = "database"
		conn, err := pgconn.ConnectConfig(within(t, time.Minute), cfg)
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	a := sender()
	var b *pgconn.PgConn
	with("Raise max_wal_senders on the source", func() { b = sender() }, func() {
		_ = a.Close(t.Context())
		_ = b.Close(t.Context())
		eventually(t, time.Minute, "the senders are gone", func() (bool, error) { return db.one(`SELECT count(*) FROM pg_stat_replication`) == "0", nil })
	})

	if s.src.Major() >= 18 {
		with("warning: idle_replication_slot_timeout is 10min", func() {
			db.do(`ALTER SYSTEM SET idle_replication_slot_timeout = '10min'`)
			db.do(`SELECT pg_reload_conf()`)
			eventually(t, time.Minute, "it is set", func() (bool, error) { return s.sql().one(`SHOW idle_replication_slot_timeout`) == "10min", nil })
		}, func() {
			db.do(`ALTER SYSTEM RESET idle_replication_slot_timeout`)
			db.do(`SELECT pg_reload_conf()`)
			eventually(t, time.Minute, "it is not set", func() (bool, error) { return s.sql().one(`SHOW idle_replication_slot_timeout`) == "0", nil })
		})
	}
	s.init()
	if s.src.Major() >= 17 { // the slot is one that standbys keep
		with("warning: synchronized_standby_slots is empty", sql(`SELECT pg_create_physical_replication_slot('standby')`), sql(`SELECT pg_drop_replication_slot('standby')`))
	}
	with("danger: replication slot "+s.cfg.Capture.Slot+" is about to be lost", func() {
		for range 8 {
			db.do(`SELECT pg_logical_emit_message(false, 'filler', repeat('x', 10000000))`)
		}
	}, func() {})
	with("danger: the server has removed WAL that replication slot "+s.cfg.Capture.Slot+" needed → backstory init --accept-gap", sql(`CHECKPOINT`), func() {})
}
