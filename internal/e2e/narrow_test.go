package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/rebuild"
)

// keyless are ways in which a published table gets into a state in which Postgres refuses its UPDATEs and DELETEs, and out of it.
var keyless = []struct{ table, create, drop, back string }{
	{"a", `CREATE TABLE public.a (id int PRIMARY KEY, v text)`, `ALTER TABLE public.a DROP CONSTRAINT a_pkey`, `ALTER TABLE public.a ADD PRIMARY KEY (id)`},
	{"b", `CREATE TABLE public.b (id int NOT NULL, v text); CREATE UNIQUE INDEX bi ON public.b (id); ALTER TABLE public.b REPLICA IDENTITY USING INDEX bi`,
		`DROP INDEX public.bi`, `CREATE UNIQUE INDEX bi ON public.b (id); ALTER TABLE public.b REPLICA IDENTITY USING INDEX bi`},
	{"c", `CREATE TABLE public.c (id int PRIMARY KEY, v text)`, `ALTER TABLE public.c REPLICA IDENTITY NOTHING`, `ALTER TABLE public.c REPLICA IDENTITY DEFAULT`},
	{"d", `CREATE TABLE public.d (id int PRIMARY KEY, v text)`, `ALTER TABLE public.d DROP CONSTRAINT d_pkey, ADD PRIMARY KEY (id) DEFERRABLE`,
		`ALTER TABLE public.d DROP CONSTRAINT d_pkey, ADD PRIMARY KEY (id)`},
}

// TestKeyDroppedLater: an application's UPDATEs and DELETEs go on when the key by which we publish them is dropped, the log says
// from where on it does not have them, and does not claim to know rows afterwards that it knew before.
func TestKeyDroppedLater(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	for _, k := range keyless {
		db.do("%s", k.create)
	}
	db.do(`CREATE TABLE public.other (id int PRIMARY KEY, v text)`)
	s.init()
	r := s.start()
	for _, k := range keyless {
		db.do(`INSERT INTO public.%s VALUES (1, 'one'), (2, 'two'), (3, 'three'); UPDATE public.%[1]s SET v = 'uno' WHERE id = 1`, k.table)
	}
	whole := func() int64 { // the log is this far when it has all that was committed before
		t.Helper()
		db.do(`INSERT INTO public.other VALUES ((SELECT count(*) FROM public.other), 'mark')`)
		n := db.one(`SELECT count(*) FROM public.other`)
		l := s.logSQL()
		eventually(t, 30*time.Second, "the log has everything", func() (bool, error) {
			return l.one(`SELECT count(*) FROM backstory.events WHERE relation = 'public.other'`) == n, nil
		})
		h, err := r.sc.Log().Head(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return int64(h.Position)
	}
	before := whole()

	for _, k := range keyless {
		db.do("%s", k.drop)
	}
	for _, k := range keyless {
		eventually(t, 20*time.Second, "the application's UPDATE of "+k.table+" works", func() (bool, error) {
			_, err := db.Exec(t.Context(), fmt.Sprintf(`UPDATE public.%s SET v = 'unseen' WHERE id = 2`, k.table))
			return err == nil, err
		})
		db.do(`DELETE FROM public.%s WHERE id = 3; INSERT INTO public.%[1]s VALUES (4, 'four')`, k.table)
	}
	l := s.logSQL()
	eventually(t, 30*time.Second, "the gaps are recorded", func() (bool, error) {
		return l.one(`SELECT count(*) FROM backstory.captured WHERE insert_only AND NOT complete`) == fmt.Sprint(len(keyless)), nil
	})
	whole()
	for _, k := range keyless {
		var kinds []string
		for _, row := range l.ask(fmt.Sprintf(`SELECT op FROM backstory.events WHERE relation = 'public.%s' AND op <> 'note' ORDER BY position`, k.table)) {
			kinds = append(kinds, row[0])
		}
		got := strings.Join(kinds, ", ")
		if got != "insert, insert, insert, update, gap, insert" && got != "insert, insert, insert, update, insert, gap" {
			t.Errorf("%s: the log has %s", k.table, got)
		}
	}
	if got := l.one(`SELECT string_agg(data->>'reason', '; ' ORDER BY relation) FROM backstory.events WHERE op = 'gap'`); !strings.Contains(got, "no primary key") || !strings.Contains(got, "index of its replica identity is gone") {
		t.Errorf("the gaps' reasons are %q", got)
	}
	// Before the gap the tables are whole, since then they are not.
	log := s.openLog()
	check := func(rev string) error {
		at, err := log.Resolve(t.Context(), rev, eventlog.RevisionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = rebuild.Checkout(t.Context(), rebuild.Config{Log: log, Revision: at, Into: &rebuild.Memory{}})
		return err
	}
	if err := check(fmt.Sprint(before)); err != nil {
		t.Errorf("checkout of before the gap: %v", err)
	}
	if err := check("HEAD"); !errors.Is(err, rebuild.ErrIncomplete) {
		t.Errorf("checkout of after the gap: %v", err)
	}

	// With its key back, and after init, a table is captured in full again; what it was meanwhile is not known.
	for _, k := range keyless {
		db.do("%s", k.back)
	}
	s.cfg.NoBaseline = true // it is not compared with the source
	s.init()
	db.do(`INSERT INTO public.other VALUES (-1, 'so that the next session has begun')`)
	for _, k := range keyless {
		db.do(`UPDATE public.%s SET v = 'seen' WHERE id = 2; DELETE FROM public.%[1]s WHERE id = 1`, k.table)
	}
	whole()
	for _, k := range keyless {
		for _, row := range l.ask(fmt.Sprintf(`SELECT type, data, before, metadata FROM backstory.events WHERE relation = 'public.%s' AND position > (SELECT max(position) FROM backstory.events WHERE op = 'gap') AND op NOT IN ('insert', 'note')`, k.table)) {
			if strings.Contains(fmt.Sprint(row), "uno") || strings.Contains(fmt.Sprint(row), "two") || strings.Contains(fmt.Sprint(row), "unseen") || !strings.Contains(row[3], "first_seen") {
				t.Errorf("%s: after the gap the log claims to know %q", k.table, row)
			}
		}
	}
	if n := l.one(`SELECT count(*) FROM backstory.events WHERE metadata->>'first_seen' = 'true'`); n != fmt.Sprint(2*len(keyless)) {
		t.Errorf("%s rows are seen for the first time after the gap, want %d", n, 2*len(keyless))
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	verify(t, log)
}

// TestKeyDroppedWhileNobodyWatches: the table is moved before anything else is done, though the log is away or does not go on, and
// whoever moved it, the log says so at the next run, once; changes of before are not lost.
func TestKeyDroppedWhileNobodyWatches(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do("%s", simple)
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'one')`)
	s.once()
	db.do(`UPDATE public.things SET v = 'two'; ALTER TABLE public.things DROP CONSTRAINT things_pkey`)
	if _, err := db.Exec(t.Context(), `UPDATE public.things SET v = 'x'`); err == nil {
		t.Fatal("an UPDATE of a published table without a key works: this test shows nothing")
	}
	found := func(severity capture.Severity, what string) {
		t.Helper()
		all, err := capture.Examine(t.Context(), s.cfg.Capture)
		if err != nil || !slices.ContainsFunc(all, func(f capture.Finding) bool {
			return f.Severity == severity && strings.Contains(f.What, what) && f.Mend() != ""
		}) {
			t.Errorf("doctor does not find %q: %+v, %v", what, all, err)
		}
	}
	found(capture.Danger, "refuses the application's UPDATEs and DELETEs of public.things")
	s.says(0, "Postgres refuses the application's UPDATEs and DELETEs of published tables: public.things: it has no primary key", "status")
	// What init would do is printed as one transaction: one by one, its statements would make a gap.
	out := s.command(false, "init", "--print-sql")
	if out.wait(time.Minute) != 0 {
		t.Fatal(out.out)
	}
	_, sql, _ := strings.Cut(out.out.String(), "BEGIN;")
	if sql, _, _ = strings.Cut(sql, "COMMIT;"); strings.Count(sql, "ALTER PUBLICATION") != 2 || strings.Count(out.out.String(), "ALTER PUBLICATION") != 2 {
		t.Errorf("init --print-sql prints\n%s", out.out)
	}
	if err := capture.Protect(t.Context(), s.cfg.Capture); err != nil {
		t.Fatal(err)
	}
	found(capture.Warning, "only inserts of public.things are captured: it has no primary key")
	db.do(`UPDATE public.things SET v = 'three'`)
	s.init() // may come first, and hides nothing
	s.once()
	s.once()
	var got []string
	for _, e := range s.allEvents() {
		if e.Op == eventlog.OpNote || strings.HasSuffix(e.Type, "Healed") { // it has no key any more, and is compared in another way
			continue
		}
		got = append(got, fmt.Sprint(e.Op, " ", string(e.Data)))
	}
	if len(got) != 3 || got[1] != `update {"v":"two"}` || !strings.HasPrefix(got[2], "gap ") {
		t.Fatalf("the log has %q", got)
	}
	checkLog(t, s.openLog())
	db.do(`ALTER TABLE public.things ADD PRIMARY KEY (id)`)
	found(capture.Warning, "only inserts of public.things are captured, though it has a usable key")
}

// TestKeyDroppedWhileCaptureIsInterrupted: however long the log has been away, the application is looked after.
func TestKeyDroppedWhileCaptureIsInterrupted(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do("%s", simple)
	s.init()
	away := newProxy(t, s.cfg.Log.URL)
	s.cfg.Log.URL = away.through(s.cfg.Log.URL)
	r := s.start()
	eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
	away.refuse()
	db.do(`INSERT INTO public.things VALUES (1, 'one')`)
	time.Sleep(14 * time.Second) // by now the pauses between attempts are the longest
	db.do(`ALTER TABLE public.things DROP CONSTRAINT things_pkey`)
	eventually(t, 4*time.Second, "the application's UPDATE works", func() (bool, error) {
		_, err := db.Exec(t.Context(), `UPDATE public.things SET v = 'two'`)
		return err == nil, err
	})
	if err := r.end(); err != nil {
		t.Error(err)
	}
}
