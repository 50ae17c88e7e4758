package e2e

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
	"github.com/backstory-dev/backstory/rebuild"
)

// gapFound checks that a gap has stopped everything: the sidecar ends with an error, the log says so in one event, and nothing
// is appended any more, until a person accepts it.
func (s *system) gapFound(what string, words ...string) {
	s.t.Helper()
	l := s.openLog()
	before, err := l.Head(within(s.t, time.Minute))
	if err != nil {
		s.t.Fatal(err)
	}
	p := s.command(true, "run")
	if code := p.wait(time.Minute); code == 0 {
		s.t.Fatalf("%s: the sidecar returned 0:\n%s", what, p.out.tail(20))
	}
	for _, w := range append(words, "--accept-gap") {
		if !strings.Contains(p.out.String(), w) {
			s.t.Errorf("%s: the sidecar does not speak of %q:\n%s", what, w, p.out.tail(60))
		}
	}
	h, err := l.Head(within(s.t, time.Minute))
	if err != nil {
		s.t.Fatal(err)
	}
	if h.Position != before.Position+1 || h.Gap == "" || h.EndLSN != before.EndLSN {
		s.t.Fatalf("%s: the log went from %d (%s) to %d (%s), gap %q; want one event more, and no progress", what, before.Position, before.EndLSN, h.Position, h.EndLSN, h.Gap)
	}
	e, err := l.Get(within(s.t, time.Minute), h.Position)
	if err != nil {
		s.t.Fatal(err)
	}
	if e.Op != eventlog.OpGap || e.Relation != nil || !strings.Contains(string(e.Data), "reason") {
		s.t.Fatalf("%s: the event is %s %s %s", what, e.Type, e.Op, e.Data)
	}
	// It stays stopped, and says it once.
	if err := s.tryOnce(); !errors.Is(err, backstory.ErrGap) {
		s.t.Fatalf("%s: run after the gap: %v", what, err)
	}
	if again, err := l.Head(within(s.t, time.Minute)); err != nil || again.Position != h.Position {
		s.t.Fatalf("%s: the log goes on after a gap: %d, %v", what, again.Position, err)
	}
	// What was complete is so no longer, from the gap on; where it begins before the last transaction in the log, so is what was there before it was recorded.
	var was error
	var gap struct {
		From string `json:"from_lsn"`
	}
	err = json.Unmarshal(e.Data, &gap)
	from, e2 := eventlog.ParseLSN(gap.From)
	if err != nil || e2 != nil {
		s.t.Fatalf("%s: the event is %s: %v, %v", what, e.Data, err, e2)
	}
	if from > 0 && from < before.CommitLSN {
		was = rebuild.ErrLaterGap
	}
	for rev, want := range map[string]error{"HEAD": rebuild.ErrIncomplete, "HEAD~1": was} {
		if before.Position == 0 {
			break
		}
		at, err := l.Resolve(within(s.t, time.Minute), rev, eventlog.RevisionOptions{})
		if err == nil {
			_, err = rebuild.Checkout(within(s.t, time.Minute), rebuild.Config{Log: l, Revision: at, Into: &rebuild.Memory{}})
		}
		if !errors.Is(err, want) {
			s.t.Errorf("%s: checkout of %s: %v, want %v", what, rev, err, want)
		}
	}
	verify(s.t, l)
}

// goesOn accepts the gap and checks that capture works again, from here on, and that the log has what the tables of schema public have.
func (s *system) goesOn(insert func()) {
	s.t.Helper()
	l := s.openLog()
	before, err := l.Head(within(s.t, time.Minute))
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := backstory.AcceptGap(within(s.t, time.Minute), s.cfg, nil); err != nil {
		s.t.Fatalf("accept the gap: %v", err)
	}
	insert()
	s.once()
	h, err := l.Head(within(s.t, time.Minute))
	if err != nil {
		s.t.Fatal(err)
	}
	if h.Gap != "" || h.Position <= before.Position || h.Incarnation != before.Incarnation+1 {
		s.t.Fatalf("after the gap was accepted: %+v", h)
	}
	verify(s.t, l)
	ids := map[eventlog.ID]bool{}
	err = l.Read(within(s.t, time.Minute), eventlog.Selection{Quiet: true}, func(e *eventlog.Event) error {
		if ids[e.ID] {
			s.t.Errorf("event %d has an id that another one has", e.Position)
		}
		ids[e.ID] = true
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	if s.cfg.NoBaseline { // nothing is compared
		return
	}
	db := s.sql()
	s.equalsTables(db, l)
	db.do(`DROP SCHEMA of_now CASCADE`)
}

const simple = `CREATE TABLE public.things (id int PRIMARY KEY, v text)`

// TestSlotThatIsNotWhereItWas: whatever happens to the slot, no change is skipped in silence.
func TestSlotThatIsNotWhereItWas(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		do   func(s *system, db *session)
		says string
	}{
		{"it was dropped", func(s *system, db *session) {
			db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
		}, "gone"},
		{"it was dropped and made again", func(s *system, db *session) {
			db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
			db.do(`INSERT INTO public.things VALUES (2, 'lost')`)
			db.do(`SELECT pg_create_logical_replication_slot('%s', 'pgoutput')`, s.cfg.Capture.Slot)
		}, "moved or made again"},
		{"it was moved forward", func(s *system, db *session) {
			db.do(`INSERT INTO public.things VALUES (2, 'lost')`)
			db.do(`SELECT pg_replication_slot_advance('%s', pg_current_wal_flush_lsn())`, s.cfg.Capture.Slot)
		}, "moved or made again"},
		{"somebody else read it", func(s *system, db *session) {
			db.do(`INSERT INTO public.things VALUES (2, 'lost')`)
			db.do(`SELECT count(*) FROM pg_logical_slot_get_binary_changes('%s', NULL, NULL, 'proto_version', '1', 'publication_names', 'backstory')`, s.cfg.Capture.Slot)
		}, "moved or made again"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{apart: true})
			db := s.sql()
			db.do(simple)
			s.init()
			db.do(`INSERT INTO public.things VALUES (1, 'a')`)
			s.once()
			c.do(s, db)
			s.gapFound(c.name, c.says)
			s.goesOn(func() { db.do(`INSERT INTO public.things VALUES (3, 'b'); UPDATE public.things SET v = 'c'`) })
		})
	}
}

// TestSlotDroppedWhileTheSidecarRuns: it notices at once.
func TestSlotDroppedWhileTheSidecarRuns(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(simple)
	s.init()
	r := s.start()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	l := s.openLog()
	eventually(t, time.Minute, "the insert is in the log", func() (bool, error) {
		h, err := l.Head(t.Context())
		return err == nil && h.Position == 1, err
	})
	eventually(t, time.Minute, "the slot can be dropped", func() (bool, error) {
		_, err := db.Exec(t.Context(), `SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '`+s.cfg.Capture.Slot+`' AND active;
			SELECT pg_drop_replication_slot('`+s.cfg.Capture.Slot+`')`)
		return err == nil, err
	})
	if err := r.failed(time.Minute); !errors.Is(err, backstory.ErrGap) {
		t.Fatalf("the sidecar ended with %v", err)
	}
	s.goesOn(func() { db.do(`INSERT INTO public.things VALUES (2, 'b')`) })
}

// clusterOf gives a server whose data directory can be copied and put back. Killed, it has no process that writes.
func clusterOf(t testing.TB, s *pgservertest.Server) (save, restore func(name string)) {
	dir := t.TempDir()
	copyTo := func(from, to string) {
		t.Helper()
		if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
			t.Fatalf("copy a cluster: %v\n%s", err, out)
		}
	}
	again := func() {
		t.Helper()
		if err := s.Restart(within(t, time.Minute), pgserver.Immediate); err != nil {
			t.Fatal(err)
		}
	}
	save = func(name string) {
		t.Helper()
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		copyTo(s.DataDir(), filepath.Join(dir, name))
		again()
	}
	restore = func(name string) {
		t.Helper()
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(s.DataDir()); err != nil {
			t.Fatal(err)
		}
		copyTo(filepath.Join(dir, name), s.DataDir())
		_ = os.Remove(filepath.Join(s.DataDir(), "postmaster.pid"))
		again()
	}
	return save, restore
}

// promote makes a server end its timeline and begin the next one, with its slots.
func promote(t *testing.T, s *pgservertest.Server) {
	t.Helper()
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", filepath.Join(s.DataDir(), "PG_VERSION"), filepath.Join(s.DataDir(), "standby.signal")).CombinedOutput(); err != nil {
		t.Fatalf("make a standby: %v\n%s", err, out)
	}
	if err := s.Restart(within(t, time.Minute), pgserver.Immediate); err != nil {
		t.Fatal(err)
	}
	db := open(t, s.URL("postgres"))
	db.do(`SELECT pg_promote()`)
	eventually(t, time.Minute, "the server is promoted", func() (bool, error) { return db.one(`SELECT pg_is_in_recovery()`) == "f", nil })
	db.do(`CHECKPOINT`)
	_ = db.Close(t.Context())
}

// TestSourceThatLostTransactions: a source that comes back from a backup, or a promoted standby that had not got everything,
// uses the same LSNs again. The server would start there without a word and skip what lies below.
func TestSourceThatLostTransactions(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, says string
		after      func(t *testing.T, s *system)
	}{
		{"its WAL ends before the log does", "lost transactions", func(*testing.T, *system) {}},
		{"it was put back, and has more WAL than the log by now", "put back to an earlier state", func(t *testing.T, s *system) {
			db := s.sql()
			for range 3 {
				db.do(`SELECT pg_switch_wal(); INSERT INTO public.things SELECT i, 'other' FROM generate_series(1000, 1200) i; DELETE FROM public.things WHERE id >= 1000`)
			}
			_ = db.Close(t.Context())
		}},
		{"it was put back, and has more WAL than the log by now, of nothing that is captured", "put back to an earlier state", func(t *testing.T, s *system) {
			db := s.sql()
			for range 4 {
				db.do(`SELECT pg_switch_wal(); CREATE TEMPORARY TABLE nobody_asks_for AS SELECT 1; DROP TABLE nobody_asks_for`)
			}
			_ = db.Close(t.Context())
		}},
		{"it was promoted, and has more WAL than the log by now", "promoted", func(t *testing.T, s *system) {
			promote(t, s.src)
			db := s.sql()
			for range 3 { // beyond where the log ends
				db.do(`SELECT pg_switch_wal(); INSERT INTO public.things SELECT i, 'other' FROM generate_series(1000, 1200) i; DELETE FROM public.things WHERE id >= 1000`)
			}
			_ = db.Close(t.Context())
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{own: true, apart: true})
			save, restore := clusterOf(t, s.src)
			db := s.sql()
			db.do(simple)
			s.init()
			db.do(`INSERT INTO public.things VALUES (1, 'a')`)
			s.once()
			then := db.lsn(`SELECT pg_current_wal_insert_lsn()`)
			_ = db.Close(t.Context())
			save("then")
			db = s.sql()
			db.do(`INSERT INTO public.things VALUES (2, 'lost'); SELECT pg_switch_wal(); INSERT INTO public.things VALUES (3, 'lost')`)
			s.once()
			_ = db.Close(t.Context())
			restore("then")
			c.after(t, s)
			s.gapFound(c.name, c.says)
			// What the source has had since then is another history than the log's, in the same places.
			l := s.logSQL()
			if c.says == "promoted" { // from there on
				then = l.lsn(`SELECT data ->> 'to_lsn' FROM backstory.events WHERE type = 'SourceGap'`)
			}
			if from := l.lsn(`SELECT data ->> 'from_lsn' FROM backstory.events WHERE type = 'SourceGap'`); from > then {
				t.Errorf("the gap begins at %s, the source was put back to %s", from, then)
			}
			db = s.sql()
			s.goesOn(func() { db.do(`INSERT INTO public.things VALUES (4, 'b')`) })
		})
	}
}

// TestLogThatLostEvents: a log restored from a backup, or failed over to a standby that had not got everything, is behind
// what the slot was told.
func TestLogThatLostEvents(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	save, restore := clusterOf(t, s.log)
	db := s.sql()
	db.do(simple)
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	s.once()
	save("then")
	// The slot is told when the next run starts at the latest.
	db.do(`INSERT INTO public.things VALUES (2, 'lost')`)
	s.once()
	s.once()
	end := db.lsn(`SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '%s'`, s.cfg.Capture.Slot)
	restore("then")
	h, err := s.openLog().Head(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if h.EndLSN >= end {
		t.Fatalf("the log ends at %s, the slot was told %s: nothing was lost", h.EndLSN, end)
	}
	s.gapFound("the log was restored", "moved or made again")
	s.goesOn(func() { db.do(`INSERT INTO public.things VALUES (3, 'b')`) })
}

// TestIDsAreTheSameOnEveryTimeline: a transaction that is captured after the source was promoted has the id that it would
// have had before, since it lies on the older timeline.
func TestIDsAreTheSameOnEveryTimeline(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	db := s.sql()
	db.do(simple)
	s.init()
	begin, tables := s.beginning()
	db.do(`SELECT pg_copy_logical_replication_slot('%[1]s', '%[1]s_b')`, s.cfg.Capture.Slot)
	db.do(`INSERT INTO public.things VALUES (1, 'before both')`)
	s.once()
	db.do(`INSERT INTO public.things VALUES (2, 'on the first timeline'); UPDATE public.things SET v = 'x'`)
	_ = db.Close(t.Context())
	early := s.another(t, "_b", begin, tables)
	early.once()
	promote(t, s.src)
	db = s.sql()
	db.do(`INSERT INTO public.things VALUES (3, 'on the second timeline')`)
	s.once()
	first, second := s.allEvents(), early.allEvents()
	if len(second) != 4 || len(first) != 5 {
		t.Fatalf("%d and %d events, want 5 and 4", len(first), len(second))
	}
	for i, e := range second {
		if first[i].ID != e.ID {
			t.Errorf("event %d is %s when captured before the promotion, %s after it", e.Position, e.ID, first[i].ID)
		}
	}
	if first[3].Source == first[4].Source {
		t.Error("events of both timelines have the same source")
	}
	l := s.openLog()
	h, err := l.Head(t.Context())
	if err != nil || h.Timeline != 2 {
		t.Errorf("the head is on timeline %d, %v", h.Timeline, err)
	}
	checkLog(t, l).sameTables(t, db, "n.nspname = 'public'")
}

// beginning gives what another log of the same WAL begins with.
func (s *system) beginning() (*eventlog.Head, []eventlog.Captured) {
	s.t.Helper()
	l := s.openLog()
	h, err := l.Head(within(s.t, time.Minute))
	if err != nil {
		s.t.Fatal(err)
	}
	tables, err := l.Captured(within(s.t, time.Minute))
	if err != nil {
		s.t.Fatal(err)
	}
	return h, tables
}

// another gives a system with an empty log of its own for the same source, by a copy of the slot that was made when the first
// one was empty.
func (s *system) another(t testing.TB, suffix string, h *eventlog.Head, tables []eventlog.Captured) *system {
	t.Helper()
	o := &system{t: t, src: s.src, log: s.log, cfg: s.cfg}
	o.cfg.Capture.Slot += suffix
	o.cfg.Log.URL = s.log.URL(s.log.NewDatabase(t))
	ctx := within(t, time.Minute)
	l, err := eventlog.Connect(ctx, o.cfg.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.Create(ctx); err != nil {
		t.Fatal(err)
	}
	begin := *h
	begin.Slot = o.cfg.Capture.Slot
	tables = slices.Clone(tables)
	for i := range tables {
		tables[i].Empty = true // where it does not say so itself: as the first log found it
	}
	if err := l.Begin(ctx, begin, tables); err != nil {
		t.Fatal(err)
	}
	return o
}

// allEvents reads the whole log.
func (s *system) allEvents() []*eventlog.Event {
	s.t.Helper()
	var all []*eventlog.Event
	if err := s.openLog().Read(within(s.t, time.Minute), eventlog.Selection{Quiet: true}, func(e *eventlog.Event) error {
		all = append(all, e.Clone())
		return nil
	}); err != nil {
		s.t.Fatal(err)
	}
	return all
}

// TestLogOfAnotherDatabase: a sidecar whose log belongs to another database of the same server ends with what to do, also while that log's own sidecar is at
// work, for which it waited as for one that it is to relieve.
func TestLogOfAnotherDatabase(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	s.sql().do(simple)
	s.init()
	r := s.start()
	eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
	own := s.cfg.Capture.URL
	s.cfg.Capture.URL = s.src.URL(s.src.NewDatabase(t))
	s.says(1, "the log belongs to database "+databaseOf(t, own), "run")
	s.says(1, "Check BACKSTORY_SOURCE_URL and BACKSTORY_LOG_URL", "run")
	s.cfg.Capture.URL = own
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
}

// TestInitGoesOnWithoutOthersTables: a table that somebody else owns, and that nobody has published, keeps init from none of the others. It says what has to be
// run for that one, and after that it takes it in.
func TestInitGoesOnWithoutOthersTables(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{tables: []string{"public.*"}})
	super := s.sql()
	name := databaseOf(t, s.cfg.Capture.URL)
	app, boss := "app_"+name, "boss_"+name
	super.do(`CREATE ROLE %s LOGIN REPLICATION; CREATE ROLE %s; GRANT CREATE, USAGE ON SCHEMA public TO %[1]s, %[2]s; GRANT CREATE ON DATABASE %[3]s TO %[1]s`, app, boss, name)
	bosses := func(sql string) { super.do(`SET ROLE %s; %s; RESET ROLE`, boss, sql) }
	bosses(`CREATE TABLE public.others (id int PRIMARY KEY, v text); CREATE TABLE public.keyless (v text); INSERT INTO public.others VALUES (1, 'a')`)
	s.cfg.Capture.URL = withUser(t, s.cfg.Capture.URL, app)
	// With nothing but others' tables there is nothing to go on with.
	s.says(1, "role "+app+" may not publish public.others, public.keyless, which it does not own", "init")
	s.sql().do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things VALUES (1, 'a')`)
	if got := written(newPatient(t, s, "").look()); !strings.Contains(got, "warning: role "+app+" may not publish public.others, public.keyless, which it does not own → GRANT") {
		t.Errorf("doctor finds %s", got)
	}
	captured := func(want string) {
		t.Helper()
		if got := super.one(`SELECT string_agg(name, ' ' ORDER BY name) FROM backstory.captured`); got != want {
			t.Errorf("captured: %s, want %s", got, want)
		}
	}
	// left runs init, and what it says has to be run for tables that it leaves out.
	left := func(tables ...string) (sql []string) {
		t.Helper()
		p := s.command(true, "init", "--yes")
		if code := p.wait(time.Minute); code != 0 {
			t.Fatalf("init returned %d:\n%s", code, p.out)
		}
		if len(tables) > 0 && !strings.Contains(p.out.String(), "tables   3 match public.*; init goes on with 1 of them: ") {
			t.Errorf("init does not count what it leaves out:\n%s", p.out)
		}
		for _, line := range strings.Split(p.out.String(), "\n") {
			if q, ok := strings.CutPrefix(strings.TrimSpace(line), "→ "); ok && !strings.HasPrefix(q, "ALTER SYSTEM") {
				sql = append(sql, q)
			}
		}
		for _, table := range tables {
			if !strings.Contains(p.out.String(), table+" is not captured: it belongs to "+boss+", and role "+app+" may not publish it") {
				t.Errorf("init does not say that %s is left out:\n%s", table, p.out)
			}
		}
		if len(tables) == 0 != (len(sql) == 0) {
			t.Errorf("without %s init wants this to be run: %s", tables, sql)
		}
		return sql
	}
	sql := left("public.keyless", "public.others")
	captured("things")
	super.do(`UPDATE public.things SET v = 'b'; UPDATE public.others SET v = 'b'`)
	s.once()
	left("public.keyless", "public.others") // as they are still
	captured("things")
	super.do("%s", strings.Join(sql, " "))
	left()
	captured("keyless others things")
	super.do(`UPDATE public.others SET v = 'c'; INSERT INTO public.keyless VALUES ('a')`)
	s.once()
	s.once()
	if got := super.one(`SELECT string_agg(DISTINCT type, ' ') FROM backstory.events WHERE op IN ('import', 'insert', 'update')`); got != "KeylessCreated OtherImported ThingImported" {
		t.Errorf("the log has %s", got)
	}
	// A gap is accepted without others' tables, too.
	bosses(`CREATE TABLE public.more (id int PRIMARY KEY)`)
	super.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	const more = "public.more is not captured: it belongs to "
	s.says(0, more+boss+", and role "+app+" may not publish it\n         Let a superuser run\n         → ALTER PUBLICATION \"backstory\" ADD TABLE ONLY \"public\".\"more\";\n", "init", "--accept-gap")
	captured("keyless others things")
	s.once()
	if s.src.Major() >= 15 { // one whose inserts are captured through its schema is not called one that is not captured
		super.do(`ALTER PUBLICATION backstory_inserts ADD TABLES IN SCHEMA public`)
		p := s.command(true, "init")
		const inserts = "only inserts are captured, through its schema: it belongs to "
		if code := p.wait(time.Minute); code != 0 || !strings.Contains(p.out.String(), inserts+boss) || !strings.Contains(p.out.String(), "only inserts of public.more are captured, through its schema") || strings.Contains(p.out.String(), "not captured") {
			t.Errorf("init returned %d:\n%s", code, p.out)
		}
		if got := written(newPatient(t, s, "").look()); !strings.Contains(got, `only inserts of public.more are captured, through its schema → ALTER PUBLICATION "backstory" ADD TABLE ONLY "public"."more";`) || strings.Contains(got, "public.more is not captured") || strings.Contains(got, "may not read") {
			t.Errorf("doctor finds %s", got)
		}
		super.do(`ALTER PUBLICATION backstory_inserts DROP TABLES IN SCHEMA public`)
	}
	// A table that is captured is not left out in silence.
	super.do(`ALTER PUBLICATION backstory DROP TABLE public.others`)
	s.says(1, "may not publish public.more, public.others", "init")
	captured("keyless others things")
}
