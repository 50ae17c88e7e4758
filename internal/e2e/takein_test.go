package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestTablesMadeLater: a sidecar whose role may takes tables in that were made after init, without a restart: with their rows, with or without
// a key, and only those that init would have selected, whatever it is told itself.
func TestTablesMadeLater(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(simple)
	db.do(`CREATE UNLOGGED TABLE public.made_logged (id int PRIMARY KEY, v text); INSERT INTO public.made_logged SELECT i, 'not in the WAL' FROM generate_series(1, 100) i`)
	s.cfg.Capture.Tables, s.cfg.Capture.Exclude = []string{"public.*"}, []string{"public.not*"}
	s.init()
	s.cfg.Capture.Tables, s.cfg.Capture.Exclude = []string{"*.*"}, nil
	r := s.start()
	eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
	writer := s.sql()
	writer.do(`BEGIN; CREATE TABLE public.filled (id int PRIMARY KEY, v text); INSERT INTO public.filled SELECT i, 'a' FROM generate_series(1, 1000) i; COMMIT`)
	writer.do(`DELETE FROM public.made_logged WHERE id = 1; ALTER TABLE public.made_logged SET LOGGED; UPDATE public.made_logged SET v = 'in it' WHERE id = 2`)
	writer.do(`CREATE TABLE public.keyless (v text); CREATE TABLE public.notes (id int PRIMARY KEY); CREATE SCHEMA other; CREATE TABLE other.things (id int PRIMARY KEY);
		CREATE TABLE public.parted (id int PRIMARY KEY) PARTITION BY RANGE (id); CREATE TABLE public.parted_1 PARTITION OF public.parted FOR VALUES FROM (0) TO (100);
		INSERT INTO public.parted SELECT i FROM generate_series(1, 10) i`)
	writer.do(`BEGIN; INSERT INTO public.filled VALUES (2000, 'open'); UPDATE public.filled SET v = 'open' WHERE id = 1`)
	eventually(t, time.Minute, "they are captured", func() (bool, error) {
		got := db.one(`SELECT string_agg(name, ' ' ORDER BY name) FROM backstory.captured`)
		return got == "filled keyless made_logged parted_1 things", fmt.Errorf("captured: %s", got)
	})
	db.do(`UPDATE public.filled SET v = 'b' WHERE id = 2; INSERT INTO public.keyless VALUES ('a'); DELETE FROM public.parted WHERE id = 1`)
	writer.do(`COMMIT`)
	eventually(t, time.Minute, "their rows are in the log", func() (bool, error) {
		got := db.one(`SELECT string_agg(name, ' ' ORDER BY name) FROM backstory.captured WHERE complete`)
		return got == "filled made_logged parted_1 things", fmt.Errorf("complete: %s", got)
	})
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	checkLog(t, s.openLog(), "public.filled", "public.made_logged", "public.parted_1", "public.keyless").sameTables(t, db, "n.nspname = 'public' AND c.relname IN ('filled', 'made_logged', 'parted_1', 'things')")
	// init says otherwise: what it leaves out stays out.
	s.cfg.Capture.Tables, s.cfg.Capture.Exclude = []string{"public.*"}, []string{"public.not*", "public.filled"}
	r = s.start()
	s.init()
	time.Sleep(7 * time.Second) // in which the sidecar looks
	if got := db.one(`SELECT string_agg(name, ' ' ORDER BY name) FROM backstory.captured`); got != "keyless made_logged parted_1 things" {
		t.Errorf("captured: %s", got)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
}

// TestRightsOfTheFirstLevel: a role that is no superuser, but a member of the tables' owner, does by itself what README says of that level: takes tables in, moves one that
// loses its key, and reads what ALTER TABLE has rewritten.
func TestRightsOfTheFirstLevel(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{tables: []string{"public.*"}})
	super := s.sql()
	name := databaseOf(t, s.cfg.Capture.URL)
	side, app := "side_"+name, "owner_"+name
	super.do(`CREATE ROLE %[2]s LOGIN; CREATE ROLE %[1]s LOGIN REPLICATION; GRANT %[2]s TO %[1]s; GRANT CREATE, USAGE ON SCHEMA public TO %[2]s; GRANT CREATE ON DATABASE %[3]s TO %[1]s`, side, app, name)
	owner := open(t, withUser(t, s.cfg.Capture.URL, app))
	owner.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things VALUES (1, 'a')`)
	s.cfg.Capture.URL = withUser(t, s.cfg.Capture.URL, side)
	s.init()
	r := s.start()
	eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
	owner.do(`CREATE TABLE public.later (id int PRIMARY KEY, v text); INSERT INTO public.later SELECT i, 'x' FROM generate_series(1, 10) i; CREATE TABLE public.keyless (v text); INSERT INTO public.keyless VALUES ('k')`)
	eventually(t, time.Minute, "they are taken in", func() (bool, error) {
		got := super.one(`SELECT string_agg(name || ' ' || complete, ', ' ORDER BY name) FROM backstory.captured`)
		return got == "keyless false, later true, things true", fmt.Errorf("captured: %s", got)
	})
	owner.do(`ALTER TABLE public.things DROP CONSTRAINT things_pkey`)
	eventually(t, 20*time.Second, "its UPDATEs work again", func() (bool, error) {
		_, err := owner.Exec(t.Context(), `UPDATE public.things SET v = 'b'`)
		return err == nil, err
	})
	owner.do(`ALTER TABLE public.later ADD w int DEFAULT random() * 5; UPDATE public.later SET v = 'y' WHERE id = 1`)
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	s.once()
	s.sameRows("later", "things", "keyless")
}

// TestTablesMadeLaterThatMayNotBePublished: without the right, it is said at once which tables are not captured, and how that is mended.
func TestTablesMadeLaterThatMayNotBePublished(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(simple)
	s.init()
	owner, role := s.cfg.Capture.URL, "plain_"+s.cfg.Capture.Slot
	db.do(`CREATE ROLE %s LOGIN REPLICATION`, role)
	t.Cleanup(func() { db.do(`DROP ROLE %s`, role) })
	s.cfg.Capture.URL = withUser(t, owner, role)
	p := s.command(false, "run")
	eventually(t, time.Minute, "it streams", func() (bool, error) { return strings.Contains(p.out.String(), "streaming"), nil })
	time.Sleep(6 * time.Second) // the first look: what it finds is what doctor says
	db.do(`CREATE TABLE public.later (id int PRIMARY KEY)`)
	eventually(t, time.Minute, "it is said", func() (bool, error) {
		return strings.Contains(p.out.String(), "public.later is not captured"), fmt.Errorf("%s", p.out.tail(5))
	})
	s.says(0, "not captured: public.later", "status")
	s.cfg.Capture.URL = owner
	s.init()
	db.do(`INSERT INTO public.later VALUES (1)`)
	l := s.logSQL()
	eventually(t, time.Minute, "it is captured", func() (bool, error) {
		return l.one(`SELECT count(*) FROM backstory.events WHERE relation = 'public.later'`) == "1", context.Cause(t.Context())
	})
}

// TestManyTablesMadeLater: hundreds of tables that are made at once, each with rows, are taken in without a restart, whole, while others are
// written to as ever.
func TestManyTablesMadeLater(t *testing.T) {
	t.Parallel()
	t.Run("published by the sidecar", func(t *testing.T) { t.Parallel(); manyTables(t, 300, false) })
	t.Run("published with their schema", func(t *testing.T) { t.Parallel(); manyTables(t, 80, true) })
}

func manyTables(t *testing.T, tables int, bySchema bool) {
	s := newSystem(t, where{own: true, settings: map[string]string{"max_locks_per_transaction": "256"}})
	db := s.sql()
	db.do(simple)
	s.cfg.Capture.Tables = []string{"public.*"}
	s.init()
	if bySchema {
		if s.src.Major() < 15 {
			t.Skip("TABLES IN SCHEMA is new in PostgreSQL 15")
		}
		db.do(`ALTER PUBLICATION backstory_inserts ADD TABLES IN SCHEMA public`)
	}
	r := s.start()
	eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
	// The first of them is locked for as long as the others take.
	db.do(`CREATE TABLE public.many_0 (id int PRIMARY KEY, v text); INSERT INTO public.many_0 VALUES (1, 'a')`)
	other := s.sql()
	other.do(`BEGIN; LOCK TABLE public.many_0 IN SHARE MODE`)
	const rows = 50
	db.do(`DO $$ BEGIN FOR i IN 1..%d LOOP EXECUTE format('CREATE TABLE public.many_%%s (id int PRIMARY KEY, v text)', i); EXECUTE format('INSERT INTO public.many_%%s SELECT g, md5(g::text) FROM generate_series(1, %d) g', i); END LOOP; END $$`, tables, rows)
	began, slowest, written := time.Now(), time.Duration(0), 0
	eventually(t, 3*time.Minute, "all of them are complete", func() (bool, error) {
		for range 20 { // the application goes on
			written++
			at := time.Now()
			db.do(`INSERT INTO public.things VALUES (%d, 'a'); UPDATE public.many_%d SET v = 'b' || v WHERE id = %d`, written, 1+written%tables, 1+written%rows)
			slowest = max(slowest, time.Since(at))
			time.Sleep(10 * time.Millisecond)
		}
		got := db.one(`SELECT count(*) FROM backstory.captured WHERE complete AND name LIKE 'many%%' AND name <> 'many_0'`)
		return got == fmt.Sprint(tables), fmt.Errorf("%s are complete", got)
	})
	t.Logf("%d tables of %d rows were taken in in %s; the application's slowest two statements took %s", tables, rows, time.Since(began).Round(time.Second), slowest.Round(time.Millisecond))
	other.do(`COMMIT`)
	eventually(t, time.Minute, "the one that was locked is complete, too", func() (bool, error) {
		return db.one(`SELECT count(*) FROM backstory.captured WHERE complete AND name = 'many_0'`) == "1", nil
	})
	if slowest > 3*time.Second {
		t.Errorf("the application waited %s", slowest)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	l := s.openLog()
	s.equalsTables(db, l)
}
