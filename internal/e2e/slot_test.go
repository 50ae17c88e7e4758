package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
)

// TestInitSaysForWhomItWaits: making a slot waits for every open transaction, for a prepared one that nobody remembers for
// ever, and no timeout of the server ends it. Init says who it is, gives up in the end, and leaves nothing behind.
func TestInitSaysForWhomItWaits(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true})
	db := s.sql()
	db.do(simple)
	other := s.sql()
	var mu sync.Mutex
	var said []string
	waiting := func(list []string) {
		mu.Lock()
		defer mu.Unlock()
		said = append(said, list...)
	}
	slots := func() string { return db.one(`SELECT count(*) FROM pg_replication_slots`) }

	t.Run("an open transaction", func(t *testing.T) {
		said = nil
		other.do(`BEGIN; INSERT INTO public.things VALUES (1, 'open')`)
		pid := other.one(`SELECT pg_backend_pid()`)
		s.cfg.Capture.BlockedAfter = 2500 * time.Millisecond
		_, err := s.tryInit(within(t, time.Minute), waiting)
		if err == nil || !strings.Contains(err.Error(), "pid "+pid) || eventlog.Hint(err) == "" {
			t.Fatalf("init while pid %s has a transaction open: %v (%s)", pid, err, eventlog.Hint(err))
		}
		if len(said) == 0 || !strings.Contains(said[0], "pid "+pid) {
			t.Errorf("while it waited it said %q", said)
		}
		eventually(t, 10*time.Second, "no slot is left", func() (bool, error) { return slots() == "0", nil })
	})
	t.Run("a prepared one", func(t *testing.T) {
		said = nil
		other.do(`PREPARE TRANSACTION 'forgotten ''one'''`)
		_, err := s.tryInit(within(t, time.Minute), waiting)
		if err == nil || !strings.Contains(err.Error(), "forgotten ''one") || eventlog.Hint(err) == "" {
			t.Fatalf("init while a prepared transaction is open: %v (%s)", err, eventlog.Hint(err))
		}
		if len(said) == 0 || !strings.Contains(said[0], "forgotten") {
			t.Errorf("while it waited it said %q", said)
		}
		eventually(t, 10*time.Second, "no slot is left", func() (bool, error) { return slots() == "0", nil })
	})
	t.Run("until it ends", func(t *testing.T) {
		s.cfg.Capture.BlockedAfter = time.Minute
		once := sync.OnceFunc(func() {
			if _, err := other.Exec(context.Background(), `COMMIT PREPARED 'forgotten ''one'''`); err != nil {
				t.Error(err)
			}
		})
		if _, err := s.tryInit(within(t, time.Minute), func([]string) { once() }); err != nil {
			t.Fatal(err)
		}
	})
	// The row that was in the way is older than the slot; the next ones are not.
	db.do(`INSERT INTO public.things VALUES (2, 'b')`)
	s.once()
	if got := s.logSQL().one(`SELECT string_agg(type || ' ' || aggregate_id, ', ' ORDER BY type) FROM backstory.events`); got != "ThingBaselineEnded , ThingCreated 2, ThingImported 1" {
		t.Fatalf("the log has %s", got)
	}
}

// TestApplicationIsNeverHarmed: after init, and after the sidecar has run, every UPDATE and DELETE that worked before works
// on tables of every kind, though Postgres refuses them for a published table without a usable replica identity.
func TestApplicationIsNeverHarmed(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{tables: []string{"*.*"}})
	db := s.sql()
	major := s.src.Major()
	tables := map[string]string{
		"no_key":             `CREATE TABLE public.no_key (id int, v text)`,
		"deferrable":         `CREATE TABLE public.deferrable (id int PRIMARY KEY DEFERRABLE, v text)`,
		"deferred":           `CREATE TABLE public.deferred (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v text)`,
		"dropped_index":      `CREATE TABLE public.dropped_index (id int NOT NULL, v text); CREATE UNIQUE INDEX di ON public.dropped_index (id); ALTER TABLE public.dropped_index REPLICA IDENTITY USING INDEX di; DROP INDEX public.di`,
		"dropped_index_pk":   `CREATE TABLE public.dropped_index_pk (id int PRIMARY KEY, u int NOT NULL, v text); CREATE UNIQUE INDEX dip ON public.dropped_index_pk (u); ALTER TABLE public.dropped_index_pk REPLICA IDENTITY USING INDEX dip; DROP INDEX public.dip`,
		"nothing":            `CREATE TABLE public.nothing (id int PRIMARY KEY, v text); ALTER TABLE public.nothing REPLICA IDENTITY NOTHING`,
		"full_keyless":       `CREATE TABLE public.full_keyless (id int, v text); ALTER TABLE public.full_keyless REPLICA IDENTITY FULL`,
		"full_deferrable":    `CREATE TABLE public.full_deferrable (id int PRIMARY KEY DEFERRABLE, v text); ALTER TABLE public.full_deferrable REPLICA IDENTITY FULL`,
		"generated":          `CREATE TABLE public.generated (id int PRIMARY KEY, v text, g int GENERATED ALWAYS AS (id * 2) STORED)`,
		"generated_full":     `CREATE TABLE public.generated_full (id int PRIMARY KEY, v text, g int GENERATED ALWAYS AS (id * 2) STORED); ALTER TABLE public.generated_full REPLICA IDENTITY FULL`,
		"generated_key":      `CREATE TABLE public.generated_key (id int, v text, g int GENERATED ALWAYS AS (id * 2) STORED PRIMARY KEY)`,
		"generated_identity": `CREATE TABLE public.generated_identity (id int PRIMARY KEY, v text, g int GENERATED ALWAYS AS (id * 2) STORED NOT NULL); CREATE UNIQUE INDEX gi ON public.generated_identity (g); ALTER TABLE public.generated_identity REPLICA IDENTITY USING INDEX gi`,
		"usual":              `CREATE TABLE public.usual (id int PRIMARY KEY, v text)`,
		"partitioned":        `CREATE TABLE public.partitioned (id int, v text) PARTITION BY HASH (id); CREATE TABLE public.partitioned_0 PARTITION OF public.partitioned FOR VALUES WITH (MODULUS 1, REMAINDER 0)`,
		"partitioned_pk":     `CREATE TABLE public.partitioned_pk (id int PRIMARY KEY, v text) PARTITION BY HASH (id); CREATE TABLE public.partitioned_pk_0 PARTITION OF public.partitioned_pk FOR VALUES WITH (MODULUS 1, REMAINDER 0)`,
		"parent":             `CREATE TABLE public.parent (id int, v text); CREATE TABLE public.child () INHERITS (public.parent)`,
		"secured":            `CREATE TABLE public.secured (id int PRIMARY KEY, v text); ALTER TABLE public.secured ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY`,
	}
	if major >= 18 {
		tables["virtual"] = `CREATE TABLE public.virtual (id int PRIMARY KEY, v text, g int GENERATED ALWAYS AS (id * 2) VIRTUAL)`
		tables["virtual_full"] = `CREATE TABLE public.virtual_full (id int PRIMARY KEY, v text, g int GENERATED ALWAYS AS (id * 2) VIRTUAL); ALTER TABLE public.virtual_full REPLICA IDENTITY FULL`
	}
	for _, sql := range tables {
		db.do("%s", sql)
	}
	use := func(when string) {
		t.Helper()
		for name := range tables {
			for _, q := range []string{
				`INSERT INTO public.%s (id, v) VALUES (1, 'a'), (2, 'b')`, `UPDATE public.%s SET v = v || 'x'`, `UPDATE public.%s SET id = id + 10`,
				`DELETE FROM public.%s WHERE id = 11`, `TRUNCATE public.%s CASCADE`} {
				if name == "dropped_index_pk" {
					q = strings.Replace(strings.Replace(q, "(id, v) VALUES (1, 'a'), (2, 'b')", "(id, u, v) VALUES (1, 1, 'a'), (2, 2, 'b')", 1), "(id, v)", "(id, u, v)", 1)
				}
				if _, err := db.Exec(t.Context(), fmt.Sprintf(q, name)); err != nil {
					t.Errorf("%s: the application's %s fails: %v", when, fmt.Sprintf(q, name), err)
				}
			}
		}
	}
	use("before")
	if t.Failed() {
		return
	}
	s.init()
	use("after init")
	s.once()
	use("after a run")
	s.init() // a second time, with everything there
	use("after another init")
	s.once()
	for _, r := range db.ask(`SELECT pubname, puballtables FROM pg_publication`) {
		if r[1] != "f" {
			t.Errorf("publication %s is for all tables", r[0])
		}
	}
	if n := db.one(`SELECT count(*) FROM pg_publication_tables WHERE schemaname = 'backstory'`); n != "0" {
		t.Errorf("%s tables of the log itself are published", n)
	}
	w := checkLog(t, s.openLog())
	want := map[string]bool{}
	for _, r := range db.ask(`SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND n.nspname = 'public'`) {
		want["public."+r[0]] = true
	}
	for _, table := range w.tables {
		delete(want, table.name)
	}
	delete(want, "public.child") // which nothing was inserted into
	for name := range want {
		t.Errorf("the log knows nothing of %s", name)
	}
}

// TestRunWarnsOfUnlimitedWAL: a dead sidecar keeps all WAL, unless the server has a limit of its own.
func TestRunWarnsOfUnlimitedWAL(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(simple)
	s.init()
	s.says(0, "max_slot_wal_keep_size", "run", "--once")
	s.says(3, `{"check":"wal-limit","severity":"danger","what":"max_slot_wal_keep_size is not set"`, "doctor", "--json") // fsync is off, too
}

// TestNetOfInserts: a superuser may give the publication of inserts a whole schema: then the inserts of a table made later are in the
// log before init has seen it, and no UPDATE of one without a key fails. init leaves the schema where it is.
func TestNetOfInserts(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	if s.src.Major() < 15 {
		t.Skip("TABLES IN SCHEMA is new in PostgreSQL 15")
	}
	db := s.sql()
	db.do(simple)
	s.init()
	db.do(`ALTER PUBLICATION backstory_inserts ADD TABLES IN SCHEMA public`)
	// A role that owns neither tables nor publications.
	owner, role := s.cfg.Capture.URL, "plain_"+s.cfg.Capture.Slot
	db.do(`CREATE ROLE %s LOGIN REPLICATION`, role)
	t.Cleanup(func() { db.do(`DROP ROLE %s`, role) })
	s.cfg.Capture.URL = withUser(t, owner, role)
	r := s.start()
	s.cfg.Capture.URL = owner
	l := s.logSQL()
	eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
	db.do(`CREATE TABLE public.news (id int PRIMARY KEY, v text); CREATE TABLE public.keyless (v text)`)
	db.do(`INSERT INTO public.things VALUES (1, 'a'); INSERT INTO public.news VALUES (1, 'a'); INSERT INTO public.keyless VALUES ('a')`)
	db.do(`UPDATE public.things SET v = 'b'; UPDATE public.news SET v = 'b'; UPDATE public.keyless SET v = 'b'; DELETE FROM public.keyless`)
	events := func(n int, want string) {
		t.Helper()
		eventually(t, time.Minute, "all is in the log", func() (bool, error) {
			at := l.one(`SELECT position FROM backstory.head`)
			return atoi(t, at) >= int64(n), fmt.Errorf("it stands at %s", at)
		})
		if got := l.one(`SELECT string_agg(type, ' ' ORDER BY position) FROM backstory.events`); got != want {
			t.Fatalf("the log holds %s, want %s", got, want)
		}
	}
	events(4, "ThingCreated NewsCreated KeylessCreated ThingUpdated")
	find := func() (found []string) {
		t.Helper()
		list, err := capture.Examine(t.Context(), s.cfg.Capture)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range list {
			if strings.Contains(f.What, "inserts of") {
				found = append(found, f.What)
			}
		}
		return found
	}
	want := "only inserts of public.keyless are captured: it has no primary key|only inserts of public.keyless are captured, through its schema|only inserts of public.news are captured, through its schema"
	if got := strings.Join(find(), "|"); got != want {
		t.Errorf("doctor finds %s", got)
	}
	if st, err := r.sc.Status(t.Context()); err != nil || strings.Join(st.Source.NotCaptured, " ") != "public.keyless public.news" || !slices.Equal(st.Source.InsertsOnly, st.Source.NotCaptured) {
		t.Errorf("status: not captured: %v, of those only inserts: %v, %v", st.Source.NotCaptured, st.Source.InsertsOnly, err)
	}
	s.init()
	eventually(t, time.Minute, "the sidecar knows", func() (bool, error) { // what comes before that is TestNetOfInsertsTakenIn's
		err := r.sc.Ready()
		return err == nil && l.one(`SELECT count(*) FROM backstory.events WHERE type = 'NewsGap'`) == "1", err
	})
	db.do(`UPDATE public.news SET v = 'c'; INSERT INTO public.keyless VALUES ('b')`)
	db.do(`DELETE FROM public.news; DELETE FROM public.keyless`)
	events(8, "ThingCreated NewsCreated KeylessCreated ThingUpdated NewsGap NewsImported KeylessCreated NewsDeleted") // its updates were missing
	if got := db.one(`SELECT count(*) FROM pg_publication_namespace`); got != "1" {
		t.Errorf("%s schemas are published after init", got)
	}
	if got := strings.Join(find(), "|"); got != "only inserts of public.keyless are captured: it has no primary key" {
		t.Errorf("after init doctor finds %s", got)
	}
	if err := r.end(); err != nil {
		t.Error(err)
	}
}

// TestNetOfInsertsTakenIn: init has taken in a table of which inserts alone were captured, and the running sidecar has noticed that, or not yet: updates
// and deletes that come before it has say nothing of what the rows were, which they may no longer have been, and their table counts as incomplete until it is compared.
func TestNetOfInsertsTakenIn(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what    string
		noticed bool
		want    string
	}{
		{"noticed before", true, `NewsGap, NewsHealed 1 {"v":"a"}, NewsHealed 2 {"v":"a"}, NewsHealed 4 {"v":"a"}, NewsHealed 3 {"id":3,"v":"a","w":null}, NewsBaselineEnded, NewsUpdated 1 {"w":null}, NewsUpdated 4 {"v":"b"}, NewsDeleted 2 {"id":2,"v":"b","w":null}, NewsCreated 5`},
		{"noticed later", false, `NewsImported 1, NewsImported 4, NewsDeleted 2 {"id":2}, NewsCreated 5, NewsGap, NewsHealed 3 {"id":3,"v":"a","w":null}, NewsBaselineEnded`},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{apart: true})
			if s.src.Major() < 15 {
				t.Skip("TABLES IN SCHEMA is new in PostgreSQL 15")
			}
			db := s.sql()
			db.do(simple)
			s.init()
			db.do(`ALTER PUBLICATION backstory_inserts ADD TABLES IN SCHEMA public`)
			owner, role := s.cfg.Capture.URL, "reading_"+s.cfg.Capture.Slot
			db.do(`CREATE ROLE %s LOGIN REPLICATION; GRANT pg_read_all_data TO %[1]s`, role)
			t.Cleanup(func() { db.do(`DROP ROLE %s`, role) })
			s.cfg.Capture.URL = withUser(t, owner, role)
			r := s.start()
			s.cfg.Capture.URL = owner
			l := s.logSQL()
			has := func(what string, n int) {
				t.Helper()
				eventually(t, time.Minute, what+" is in the log", func() (bool, error) {
					return l.one(`SELECT count(*) FROM backstory.events WHERE type = '%s'`, what) == fmt.Sprint(n), nil
				})
			}
			eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
			db.do(`CREATE TABLE public.news (id int PRIMARY KEY, v text, w text); INSERT INTO public.news SELECT i, 'a' FROM generate_series(1, 4) i`)
			has("NewsCreated", 4)
			db.do(`UPDATE public.news SET v = 'b'; DELETE FROM public.news WHERE id = 3`) // in no stream
			s.init()
			if c.noticed {
				has("NewsBaselineEnded", 1)
			} else { // it cannot look
				l.do(`BEGIN; LOCK TABLE backstory.captured`)
			}
			db.do(`UPDATE public.news SET w = 'c' WHERE id = 1; UPDATE public.news SET v = 'c' WHERE id = 4; DELETE FROM public.news WHERE id = 2; INSERT INTO public.news VALUES (5, 'e')`)
			has("NewsDeleted", 1)
			if !c.noticed {
				l.do(`COMMIT`)
			}
			has("NewsBaselineEnded", 1)
			if err := r.end(); err != nil {
				t.Fatal(err)
			}
			s.once()
			if got := l.one(`SELECT string_agg(concat_ws(' ', type, nullif(aggregate_id, ''), before), ', ' ORDER BY position) FROM backstory.events WHERE NOT (type = 'NewsCreated' AND aggregate_id <> '5')`); got != c.want {
				t.Errorf("the log has %s\nwant %s", got, c.want)
			}
			if got := l.one(`SELECT (data->>'from_lsn')::pg_lsn <= (data->>'to_lsn')::pg_lsn FROM backstory.events WHERE type = 'NewsGap'`); got != "t" {
				t.Error("the gap ends before it begins")
			}
			// At every position before the comparison has ended, the table counts as incomplete.
			last := atoi(t, l.one(`SELECT position FROM backstory.events WHERE type = 'NewsBaselineEnded'`))
			for at := last - 3; at < last; at++ {
				s.says(1, "--partial", "checkout", "--at", fmt.Sprint(at), "--schema", "past", "--database", owner, "news")
			}
			s.says(0, "", "checkout", "--at", fmt.Sprint(last), "--schema", "past", "--database", owner, "news")
			s.sameRows("news")
			verify(t, s.openLog())
		})
	}
}
