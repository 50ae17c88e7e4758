package e2e

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/eventlog"
)

// TestSchemaChanges: what a table is called, how its rows are identified and what columns it has may change while the
// sidecar runs, and may have changed again by the time it reads of it. No row is lost from sight by that.
func TestSchemaChanges(t *testing.T) {
	t.Parallel()
	big := strings.Repeat("x", 3000)
	for _, c := range []struct {
		name  string
		first []string // captured before the change
		then  []string
		// later statements, too, are read only after all of then has happened, if behind
	}{
		{"the table is renamed", []string{`INSERT INTO public.things VALUES (1, 'a', 1), (2, 'b', 2), (3, 'c', 3)`},
			[]string{`ALTER TABLE public.things RENAME TO stuff`, `UPDATE public.stuff SET v = 'x' WHERE id = 1`, `DELETE FROM public.stuff WHERE id = 2`, `UPDATE public.stuff SET id = 4 WHERE id = 3`}},
		{"it goes to another schema", []string{`INSERT INTO public.things VALUES (1, 'a', 1), (2, 'b', 2)`},
			[]string{`CREATE SCHEMA other; ALTER TABLE public.things SET SCHEMA other`, `UPDATE other.things SET v = 'x' WHERE id = 1`, `DELETE FROM other.things WHERE id = 2`}},
		{"it changes in the transaction that changes its rows", []string{`INSERT INTO public.things VALUES (1, 'a', 1)`},
			[]string{`BEGIN; INSERT INTO public.things VALUES (2, 'b', 2); UPDATE public.things SET v = 'y' WHERE id = 1; ALTER TABLE public.things ADD x text;
				UPDATE public.things SET n = 7; UPDATE public.things SET x = 'x' WHERE id = 2; DELETE FROM public.things WHERE id = 1; COMMIT`}},
		{"a column is dropped and added again", []string{`INSERT INTO public.things VALUES (1, 'a', 1), (2, 'b', 2)`},
			[]string{`ALTER TABLE public.things DROP n`, `UPDATE public.things SET v = 'x' WHERE id = 1`, `ALTER TABLE public.things ADD n text`, `UPDATE public.things SET n = 'n', v = 'y'`, `DELETE FROM public.things WHERE id = 2`}},
		{"a column is renamed", []string{`INSERT INTO public.things VALUES (1, 'a', 1), (2, 'b', 2)`},
			[]string{`ALTER TABLE public.things RENAME n TO m`, `UPDATE public.things SET v = 'x', m = 5`, `DELETE FROM public.things WHERE id = 2`}},
		{"its replica identity is made FULL and DEFAULT again", []string{`INSERT INTO public.things VALUES (1, 'a', 1), (2, 'b', 2), (3, '` + big + `', 3)`},
			[]string{`ALTER TABLE public.things REPLICA IDENTITY FULL`, `UPDATE public.things SET n = 5`, `DELETE FROM public.things WHERE id = 2`,
				`ALTER TABLE public.things REPLICA IDENTITY DEFAULT`, `UPDATE public.things SET n = 6`, `UPDATE public.things SET v = 'x'`, `DELETE FROM public.things WHERE id = 3`}},
		{"its primary key is dropped", []string{`INSERT INTO public.things VALUES (1, 'a', 1), (2, 'b', 2)`},
			[]string{`UPDATE public.things SET v = 'x' WHERE id = 1`, `DELETE FROM public.things WHERE id = 2`, `ALTER TABLE public.things DROP CONSTRAINT things_pkey`}},
		{"its primary key becomes another one", []string{`INSERT INTO public.things VALUES (1, 'a', 11), (2, 'b', 12)`},
			[]string{`UPDATE public.things SET v = 'x' WHERE id = 1`, `DELETE FROM public.things WHERE id = 2`, `ALTER TABLE public.things DROP CONSTRAINT things_pkey, ALTER n SET NOT NULL, ADD PRIMARY KEY (n)`}},
		{"it is dropped", []string{`INSERT INTO public.things VALUES (1, 'a', 1), (2, 'b', 2)`},
			[]string{`UPDATE public.things SET v = 'x' WHERE id = 1`, `DELETE FROM public.things WHERE id = 2`, `INSERT INTO public.things VALUES (3, NULL, 3)`, `DROP TABLE public.things`}},
	} {
		for _, behind := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, the sidecar is behind: %v", c.name, behind), func(t *testing.T) {
				t.Parallel()
				s := newSystem(t, where{tables: []string{"*.*"}})
				db := s.sql()
				db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text, n int); ALTER TABLE public.things ALTER v SET STORAGE EXTERNAL; CREATE TABLE public.zzz (id int PRIMARY KEY)`)
				s.init()
				for _, q := range c.first {
					db.do("%s", q)
				}
				s.once()
				var want contents
				columns := map[string][]string{}
				for _, q := range c.then {
					if strings.HasPrefix(q, "DROP TABLE") {
						columns = columnsOf(db, "n.nspname NOT IN ('audit')")
						var err error
						if want, err = dump(t.Context(), db, columns); err != nil {
							t.Fatal(err)
						}
					}
					db.do("%s", q)
					if !behind {
						s.once()
					}
				}
				s.once()
				l := s.openLog()
				w := newWorld()
				w.byOID = true
				w.replay(t, l, func(e *eventlog.Event) error {
					if e.Op == eventlog.OpImport && !strings.HasSuffix(e.Type, "Healed") { // by another key it comes once more
						return fmt.Errorf("a row that the log has seen counts as new")
					}
					return nil
				})
				verify(t, l)
				if want == nil {
					w.sameTables(t, db, "true")
				} else if err := w.differs(want, columns); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// alterations are ALTER TABLEs of all kinds, with few row changes in between: what they do to the other rows is in no stream.
var alterations = []string{
	`ALTER TABLE public.things ADD a int DEFAULT 7`,
	`ALTER TABLE public.things ADD b text`,
	`ALTER TABLE public.things ADD c uuid DEFAULT gen_random_uuid()`,
	`ALTER TABLE public.things RENAME v TO w`,
	`UPDATE public.things SET w = 'changed' WHERE id = 3`,
	`ALTER TABLE public.things ALTER n TYPE numeric(10,2) USING n * 2.5`,
	`ALTER TABLE public.things ALTER w TYPE text USING upper(w)`,
	`ALTER TABLE public.things DROP b; ALTER TABLE public.things ADD b int DEFAULT 3`,
	`ALTER TABLE public.things ADD t timestamptz DEFAULT now(), ADD arr text[] DEFAULT '{"a\"b",NULL,c,"","\\"}', ADD j jsonb DEFAULT '{"a": "x\"y"}', ADD e text DEFAULT '', ADD l text DEFAULT repeat('long', 300), ADD x bytea DEFAULT '\x00ff'`,
	`UPDATE public.things SET a = 8 WHERE id IN (3, 4)`,
	`VACUUM FULL public.things`,
	`UPDATE public.things SET n = 9 WHERE id = 5`,
	`ALTER TABLE public.things ALTER t TYPE timestamp`,
	`ALTER TYPE public.mood RENAME VALUE 'sad' TO 'blue'`,
	`ALTER TYPE public.mood ADD VALUE 'new'`,
	`ALTER TYPE public.pair ADD ATTRIBUTE more text`,
	`INSERT INTO public.things (id, w, n, m, p) VALUES (6, 'six', 6, 'new', '(1,2,3)')`,
	`ALTER TABLE public.things ALTER g DROP EXPRESSION`,
	`UPDATE public.things SET g = 'own' WHERE id = 6`,
	`ALTER TABLE public.things ALTER id TYPE bigint`,
	`ALTER TABLE public.things RENAME TO stuff`,
	`BEGIN; INSERT INTO public.stuff (id, w, n) VALUES (7, 'seven', 7); ALTER TABLE public.stuff ADD z int DEFAULT 1; UPDATE public.stuff SET z = 2 WHERE id = 3; ALTER TABLE public.stuff RENAME z TO y;
		ALTER TABLE public.stuff ALTER y TYPE text USING 'was ' || y; UPDATE public.stuff SET n = n + 1 WHERE id IN (1, 7); COMMIT`,
	`ALTER TABLE public.stuff ADD k uuid DEFAULT gen_random_uuid()`,
	`ALTER TABLE public.stuff DROP CONSTRAINT things_pkey, ADD PRIMARY KEY (k)`,
	`UPDATE public.stuff SET w = 'by its new key' WHERE id = 2; DELETE FROM public.stuff WHERE id = 5`,
	`ALTER TABLE public.stuff DROP arr, ADD arr int[] DEFAULT '{1,2}'`,
	`CREATE SCHEMA elsewhere; ALTER TABLE public.stuff SET SCHEMA elsewhere`,
}

// TestAlteredTables: a checkout before, between and after alterations gives the shape and the values of that moment, for rows too that
// nobody has changed since, whether the sidecar looks on, or comes later.
func TestAlteredTables(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"step by step", "behind", "running", "step by step, with the event trigger", "running, with the event trigger"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{tables: []string{"public.*"}})
			how, trigger, _ := strings.Cut(how, ", ")
			with := trigger != ""
			s.cfg.Capture.DDLTrigger = &with
			s.cfg.Capture.BaselineChunkBytes = 60 // a row or two
			db := s.sql()
			db.do(`CREATE TYPE public.mood AS ENUM ('sad', 'glad'); CREATE TYPE public.pair AS (a int, b text);
				CREATE TABLE public.things (id int PRIMARY KEY, v text, n int, m public.mood DEFAULT 'sad', p public.pair DEFAULT '(1,"x,y")', big text, g text GENERATED ALWAYS AS ('g' || id) STORED);
				ALTER TABLE public.things ALTER big SET STORAGE EXTERNAL;
				CREATE TABLE public.before (id int PRIMARY KEY, v text); INSERT INTO public.before VALUES (1, 'a')`)
			s.init()
			db.do(`INSERT INTO public.things (id, v, n, big) SELECT i, 'v' || i, i, repeat('big', 800) FROM generate_series(1, 5) i`)
			s.once()
			type state struct {
				what    string
				at      eventlog.Position
				rows    contents
				columns map[string][]string
				shapes  map[string]string
			}
			var states []state
			const all = "n.nspname IN ('public', 'elsewhere') AND c.relname IN ('things', 'stuff')"
			now := func(what string) {
				columns := columnsOf(db, all)
				rows, err := dump(t.Context(), db, columns)
				if err != nil {
					t.Fatal(err)
				}
				head, err := s.openLog().Head(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				states = append(states, state{what, head.Position, rows, columns, shapes(db, all)})
			}
			now("the beginning")
			var r *running
			hammer, rest := context.WithCancel(context.Background())
			var wg sync.WaitGroup
			defer wg.Wait()
			defer rest()
			written := 0
			if how == "running" {
				r = s.start()
				oid := db.one(`SELECT 'public.things'::regclass::oid`)
				wg.Go(func() { // the rows are written to all the while
					db := s.sql()
					for hammer.Err() == nil {
						var name string
						if err := db.QueryRow(hammer, `SELECT $1::text::oid::regclass::text`, oid).Scan(&name); err != nil {
							continue
						}
						column := []string{"n = n + 1", "big = 'small' || n", "big = repeat('wide', 600 + n::int)", "m = 'glad'"}[written%4]
						if _, err := db.Exec(hammer, fmt.Sprintf("UPDATE %s SET %s WHERE id = %d", name, column, 1+written%5)); err == nil {
							written++
						}
						time.Sleep(3 * time.Millisecond)
					}
				})
			}
			for _, q := range alterations {
				db.do("%s", q)
				switch how {
				case "step by step":
					s.once()
					now(q)
				case "running":
					time.Sleep(150 * time.Millisecond)
				}
			}
			if r != nil {
				time.Sleep(200 * time.Millisecond)
				rest()
				wg.Wait()
				if written < 100 {
					t.Errorf("only %d updates", written)
				}
				eventually(t, time.Minute, "what was altered is compared", func() (bool, error) {
					st, err := r.sc.Status(t.Context())
					return err == nil && st.CaughtUp && st.Baseline.Done && s.logSQL().one(`SELECT coalesce(max(schema), '') FROM backstory.captured WHERE name = 'stuff'`) == "elsewhere", err
				})
				if err := r.end(); err != nil {
					t.Fatal(err)
				}
			}
			s.once()
			now("the end")
			l := s.openLog()
			verify(t, l)
			check := func(i int, want *state) {
				url := s.log.URL(s.log.NewDatabase(t)) // old values need not be values of today's types
				if want.what == "the end" {
					url = s.cfg.Capture.URL
				}
				p := s.command(false, "checkout", "--at", fmt.Sprint(want.at), "--database", url, "--schema", fmt.Sprintf("of_%d", i), tableOf(want.rows))
				if p.wait(time.Minute) != 0 {
					t.Fatalf("checkout after %s:\n%s", want.what, p.out)
				}
				there := open(t, url)
				defer there.Close(context.Background())
				for name, columns := range want.columns {
					_, table, _ := strings.Cut(name, ".")
					in := fmt.Sprintf("of_%d.%s", i, table)
					have, err := dump(t.Context(), there, map[string][]string{in: columns})
					if err != nil {
						t.Fatalf("checkout after %s: %v\n%s", want.what, err, p.out)
					}
					if err := difference(name, "the checkout", have[in], want.rows[name], columns); err != nil {
						t.Errorf("checkout of %d, after %s: %v", want.at, want.what, err)
					}
					if want.what == "the end" {
						if got := shapes(there, fmt.Sprintf("n.nspname = 'of_%d'", i))[table]; got != want.shapes[table] {
							t.Errorf("after %s it was made as\n%s, it is\n%s", want.what, got, want.shapes[table])
						}
					}
				}
			}
			for i := range states {
				check(i, &states[i])
			}
			if how == "step by step" { // the same rows in the shape of now
				last, first := &states[len(states)-1], &states[0]
				s.says(0, "elsewhere.stuff", "checkout", "--at", fmt.Sprint(first.at), "--schema", "shape_of_now", "--shape", "now", tableOf(first.rows))
				// None of them had the key of now, and old values are not of today's types.
				want := strings.NewReplacer("k uuid NOT NULL", "k uuid", "PRIMARY KEY (k)", "PRIMARY KEY ()", "public.mood", "text", "public.pair", "text").Replace(last.shapes["stuff"])
				if got := shapes(db, "n.nspname = 'shape_of_now'")["stuff"]; got != want {
					t.Errorf("in the shape of now it was made as\n%s, it is\n%s", got, last.shapes["stuff"])
				}
				if got := db.one(`SELECT string_agg(id || ' ' || w || ' ' || n || ' ' || a || ' ' || b || ' ' || arr::text, ', ' ORDER BY id) FROM shape_of_now.stuff`); got != "1 v1 1.00 7 3 {1,2}, 2 v2 2.00 7 3 {1,2}, 3 v3 3.00 7 3 {1,2}, 4 v4 4.00 7 3 {1,2}, 5 v5 5.00 7 3 {1,2}" {
					t.Errorf("in the shape of now there is %s", got)
				}
			}
			w := newWorld()
			w.byOID = true
			w.unseen["public.before"] = true
			w.replay(t, l, nil)
			w.sameTables(t, db, all)
			t.Logf("%s", s.logSQL().one(`SELECT string_agg(type || ' ' || n, ', ' ORDER BY type) FROM (SELECT type, count(*) AS n FROM backstory.events GROUP BY type) x`))
		})
	}
}

// tableOf is the one table that is not empty.
func tableOf(c contents) string {
	for name, rows := range c {
		if len(rows) > 0 {
			return name
		}
	}
	return ""
}

// TestUnknownIsNotNull: of a row that was there before the log, the stream tells only the new values, without the large ones
// that did not change. What nobody told is neither NULL nor empty, and never read from the table as it is now.
func TestUnknownIsNotNull(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, n int, big text, maybe text); ALTER TABLE public.things ALTER big SET STORAGE EXTERNAL`)
	db.do(`INSERT INTO public.things SELECT i, 0, repeat('then', 1000), NULL FROM generate_series(1, 4) i`)
	s.init()
	db.do(`UPDATE public.things SET n = 1 WHERE id = 1`)                         // never seen
	db.do(`UPDATE public.things SET n = 2 WHERE id = 1`)                         // seen, big still unknown
	db.do(`UPDATE public.things SET big = repeat('now', 1000) WHERE id = 1`)     // from unknown to known
	db.do(`UPDATE public.things SET big = 'later', maybe = 'm' WHERE id = 1`)    // all known
	db.do(`UPDATE public.things SET id = 12 WHERE id = 2`)                       // never seen, and moves
	db.do(`DELETE FROM public.things WHERE id = 12`)                             // seen, big unknown
	db.do(`DELETE FROM public.things WHERE id = 3`)                              // never seen
	db.do(`INSERT INTO public.things VALUES (5, 5, repeat('five', 1000), NULL)`) // seen from its beginning
	db.do(`UPDATE public.things SET n = 6 WHERE id = 5`)
	s.once()
	now := `"` + strings.Repeat("now", 1000) + `"`
	five := `"` + strings.Repeat("five", 1000) + `"`
	for i, want := range []struct{ op, id, data, before, meta, previous string }{
		{"import", "1", `{"id":1,"n":1,"maybe":null}`, ``, `{"first_seen":true,"unknown":["big"]}`, ""},
		{"update", "1", `{"n":2}`, `{"n":1}`, `{"unknown":["big"]}`, ""},
		{"update", "1", `{"big":` + now + `}`, `{}`, `{"unknown":["big"]}`, ""},
		{"update", "1", `{"big":"later","maybe":"m"}`, `{"big":` + now + `,"maybe":null}`, ``, ""},
		{"import", "12", `{"id":12,"n":0,"maybe":null}`, ``, `{"first_seen":true,"unknown":["big"]}`, "2"},
		{"delete", "12", ``, `{"id":12,"n":0,"maybe":null}`, `{"unknown":["big"]}`, ""},
		{"delete", "3", ``, `{"id":3}`, `{"first_seen":true,"unknown":["n","big","maybe"]}`, ""},
		{"insert", "5", `{"id":5,"n":5,"big":` + five + `,"maybe":null}`, ``, ``, ""},
		{"update", "5", `{"n":6}`, `{"n":5}`, ``, ""},
	} {
		all := s.allEvents()
		if i >= len(all) {
			t.Fatalf("%d events only", len(all))
		}
		e := all[i]
		if e.Op.String() != want.op || e.AggregateID != want.id || string(e.Data) != want.data || string(e.Before) != want.before || string(e.Metadata) != want.meta || e.PreviousID != want.previous {
			t.Errorf("event %d: %s %s data %s before %s meta %s previous %q,\nwant %+v", i+1, e.Op, e.AggregateID, short(string(e.Data)), short(string(e.Before)), e.Metadata, e.PreviousID, want)
		}
	}
}

// TestAfterAGapTheLogKnowsNothing: what the log knew of a row before a gap may be wrong after it, so it is no before.
func TestAfterAGapTheLogKnowsNothing(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text)`)
	s.cfg.NoBaseline = true // it is not compared with the source
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'a'), (2, 'a')`)
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`UPDATE public.things SET v = 'unseen'`)
	s.gapFound("the slot was dropped", "gone")
	s.goesOn(func() {
		db.do(`UPDATE public.things SET v = 'b' WHERE id = 1`)
		db.do(`UPDATE public.things SET v = 'c' WHERE id = 1`)
		db.do(`DELETE FROM public.things WHERE id = 2`)
	})
	all := s.allEvents()[3:]
	if len(all) != 3 {
		t.Fatalf("%d events after the gap", len(all))
	}
	for i, want := range []struct{ op, before string }{{"import", ""}, {"update", `{"v":"b"}`}, {"delete", `{"id":2}`}} {
		if e := all[i]; e.Op.String() != want.op || string(e.Before) != want.before {
			t.Errorf("event %d: %s, before %s; want %+v", e.Position, e.Op, e.Before, want)
		}
	}
}

// TestNoLookupFoldsAHistory: the state of a row that changes all the time is found by a bounded number of its events.
func TestNoLookupFoldsAHistory(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, logs: map[string]string{"autovacuum": "off"}})
	s.cfg.Log.MaxCacheBytes = 1
	db := s.sql()
	db.do(`CREATE TABLE public.hot (id int PRIMARY KEY, n int, v text)`)
	s.init()
	db.do(`INSERT INTO public.hot VALUES (1, 0, repeat('wide', 200)), (2, 0, '')`)
	db.do(`DO $$ BEGIN FOR i IN 1..3000 LOOP UPDATE public.hot SET n = i WHERE id = 1; COMMIT; END LOOP; END $$`)
	s.once()
	l := s.logSQL()
	// fetched tells how many events were read so far; the server's statistics come late.
	fetched := func() (n int64) {
		before := int64(-1)
		eventually(t, 30*time.Second, "the statistics are at rest", func() (bool, error) {
			time.Sleep(500 * time.Millisecond)
			l.do(`SELECT pg_stat_clear_snapshot()`)
			n = atoi(t, l.one(`SELECT sum(coalesce(idx_tup_fetch, 0) + seq_tup_read) FROM pg_stat_user_tables WHERE relname LIKE 'event_p%%'`))
			defer func() { before = n }()
			return n == before, nil
		})
		return n
	}
	before := fetched()
	db.do(`UPDATE public.hot SET n = -1 WHERE id = 1`)
	s.once()
	switch n := fetched() - before; {
	case n == 0:
		t.Error("one update read no event: nothing was measured")
	case n > 500:
		t.Errorf("one update of a row with 3000 events read %d of them", n)
	default:
		t.Logf("one update of a row with 3000 events read %d of them", n)
	}
	checkLog(t, s.openLog()).sameTables(t, db, "n.nspname = 'public'")
}

// TestAlterationsOneByOne: each of these needs a care of its own. The sidecar looks before and after, not in between.
func TestAlterationsOneByOne(t *testing.T) {
	t.Parallel()
	const reset = "" // drops the slot and accepts the gap
	for _, c := range []struct {
		what     string
		table    string
		then     []string
		compared bool // all rows are
	}{
		{"a key whose values are rewritten", `a (id int PRIMARY KEY, v text)`, []string{`ALTER TABLE a ALTER id TYPE text USING 'u' || id`}, true},
		{"a key whose values are rewritten in their type", `a (id int PRIMARY KEY, v text)`, []string{`ALTER TABLE a ALTER id TYPE int USING id + 100`}, true},
		{"a key of numbers with another scale", `a (id numeric PRIMARY KEY, v text)`, []string{`ALTER TABLE a ALTER id TYPE numeric(10,2)`}, true},
		{"a key of moments without their zone", `a (id int, t timestamptz DEFAULT '2026-01-01 00:00:00Z', v text, PRIMARY KEY (id, t))`, []string{`ALTER TABLE a ALTER t TYPE timestamp`}, true},
		{"a key with a label of an enum type", `a (id int, m mood DEFAULT 'sad', v text, PRIMARY KEY (id, m))`, []string{`ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'`}, true},
		{"a key that other rows had before", `a (id int PRIMARY KEY, v text)`, []string{`UPDATE a SET id = 10 WHERE id = 2`, `ALTER TABLE a ADD k bigserial; ALTER TABLE a DROP CONSTRAINT a_pkey, ADD PRIMARY KEY (k)`}, true},
		{"another key after a gap", `a (id int PRIMARY KEY, v text)`, []string{reset, `ALTER TABLE a ADD k uuid DEFAULT gen_random_uuid(); ALTER TABLE a DROP CONSTRAINT a_pkey, ADD PRIMARY KEY (k)`}, true},
		{"rewritten after a gap", `a (id int PRIMARY KEY, v text)`, []string{reset, `ALTER TABLE a ALTER v TYPE text USING upper(v); UPDATE a SET v = 'x' WHERE id = 1`}, true},
		{"a column added, used and renamed", `a (id int PRIMARY KEY, v text)`, []string{`ALTER TABLE a ADD z int DEFAULT 1; UPDATE a SET z = 2 WHERE id = 3; ALTER TABLE a RENAME z TO y`}, true},
		{"a generated column renamed and made an ordinary one", `a (id int PRIMARY KEY, v text, g text GENERATED ALWAYS AS ('g' || id) STORED)`, []string{`ALTER TABLE a RENAME g TO h; ALTER TABLE a ALTER h DROP EXPRESSION`}, true},
		{"a key that some rows have by default", `a (id int PRIMARY KEY, v text)`, []string{`ALTER TABLE a ADD k int DEFAULT 1; UPDATE a SET k = id WHERE id > 1; ALTER TABLE a DROP CONSTRAINT a_pkey, ADD PRIMARY KEY (k)`}, true},
		{"VACUUM FULL with constant defaults", `a (id int PRIMARY KEY, v text)`, []string{`ALTER TABLE a ADD y int DEFAULT 1, ADD z int DEFAULT 2`, `VACUUM FULL a`, `UPDATE a SET v = 'x' WHERE id = 1`}, true},
		{"rewritten, of two columns with constant defaults", `a (id int PRIMARY KEY, v text)`, []string{`ALTER TABLE a ADD y int DEFAULT 1, ADD z int DEFAULT 2`, `ALTER TABLE a ALTER y TYPE int USING y * 2`}, true},
		{"VACUUM FULL without a key", `a (id int, v text)`, []string{`ALTER TABLE a ADD z int DEFAULT 1`, `VACUUM FULL a`, `UPDATE a SET v = 'x' WHERE id = 1`}, true},
		{"without a key, another name and a constant default", `a (id int, v text)`, []string{`ALTER TABLE a RENAME v TO w; ALTER TABLE a ADD z int DEFAULT 1`, `UPDATE a SET w = 'x' WHERE id = 1; DELETE FROM a WHERE id = 2`}, false},
		{"without a key, rewritten", `a (id int, v text)`, []string{`ALTER TABLE a ADD z double precision DEFAULT random(); ALTER TABLE a ALTER id TYPE bigint USING id * 2`, `UPDATE a SET v = 'x' WHERE id = 2; DELETE FROM a WHERE id = 4`}, true},
		{"a key is added, and dropped", `a (id int, v text)`, []string{`ALTER TABLE a ADD PRIMARY KEY (id)`, `UPDATE a SET v = 'x' WHERE id = 1`, `ALTER TABLE a DROP CONSTRAINT a_pkey`, `UPDATE a SET v = 'y' WHERE id < 3; DELETE FROM a WHERE id = 3`}, true},
		{"a column of an enum type is dropped", `a (id int PRIMARY KEY, v text, m mood DEFAULT 'sad')`, []string{`ALTER TABLE a DROP m`}, false},
		{"TRUNCATE and a default", `a (id int PRIMARY KEY, v text)`, []string{`TRUNCATE a; INSERT INTO a VALUES (1, 'x'); VACUUM FULL a`, `INSERT INTO a VALUES (2, 'y')`}, false},
		{"a table that is dropped and made again", `a (id int PRIMARY KEY, v text)`, []string{`DROP TABLE a`, `CREATE TABLE a (v text, id int PRIMARY KEY, z int); INSERT INTO a VALUES ('x', 1, 2)`}, true},
		{"a table that takes another one's name", `a (id int PRIMARY KEY, v text)`, []string{`ALTER TABLE a RENAME TO old; CREATE TABLE a (id int PRIMARY KEY, w text); INSERT INTO a VALUES (7, 'w')`}, true},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			db := s.sql()
			db.do(`SET search_path = public`)
			db.do(`CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE TABLE %s`, c.table)
			if !strings.Contains(c.table, "PRIMARY KEY") {
				db.do(`ALTER TABLE a REPLICA IDENTITY FULL`)
			}
			s.init()
			db.do(`INSERT INTO a (id, v) SELECT i, 'v' || i FROM generate_series(1, 5) i`)
			s.once()
			for _, q := range c.then {
				if q == reset {
					db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
					s.gapFound("the slot was dropped", "gone")
					if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
						t.Fatal(err)
					}
				} else {
					for _, q := range strings.Split(q, "; ") { // VACUUM is alone
						db.do("%s", q)
					}
				}
				if strings.Contains(q, "CREATE TABLE") { // whose rows are read then
					s.init()
				}
				s.once()
			}
			verify(t, s.openLog())
			s.says(0, "", "checkout", "--at", "HEAD", "--schema", "of_now")
			if got := db.one(`SELECT count(*) FROM (SELECT a::text FROM public.a EXCEPT ALL SELECT a::text FROM of_now.a) x`); got != "0" {
				t.Errorf("%s rows are only in the source", got)
			}
			if got := db.one(`SELECT count(*) FROM (SELECT a::text FROM of_now.a EXCEPT ALL SELECT a::text FROM public.a) x`); got != "0" {
				t.Errorf("%s rows are only in the checkout", got)
			}
			ended := atoi(t, s.logSQL().one(`SELECT count(*) FROM backstory.events WHERE type LIKE '%%BaselineEnded'`))
			if (ended > 0) != c.compared {
				t.Errorf("its rows were compared %d times", ended)
			}
		})
	}
}

// TestAlteredWithoutABaseline: where existing rows are left out, nothing is compared, and the log says that it does not have all of the table;
// another init makes up for that. A role that may not read the table sees its new shape all the same.
func TestAlteredWithoutABaseline(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	role := "blind_" + s.cfg.Capture.Slot
	db.do(`CREATE TABLE public.a (id int PRIMARY KEY, n int); CREATE ROLE %s LOGIN REPLICATION`, role)
	t.Cleanup(func() { db.do(`DROP ROLE %s`, role) })
	owner := s.cfg.Capture.URL
	s.cfg.NoBaseline = true
	s.init()
	db.do(`INSERT INTO public.a SELECT i, i FROM generate_series(1, 3) i`)
	s.once()
	s.cfg.Capture.URL = withUser(t, owner, role)
	db.do(`ALTER TABLE public.a ADD z int`)
	s.once()
	if got := s.logSQL().one(`SELECT string_agg(type, ' ' ORDER BY position) FROM backstory.events WHERE op = 'note'`); got != "AAltered" {
		t.Errorf("there are the notes %s", got)
	}
	s.says(0, "3 rows", "checkout", "--at", "HEAD", "--schema", "whole")
	db.do(`ALTER TABLE public.a ALTER n TYPE numeric USING n * 2.5`)
	s.once()
	s.says(1, "the log does not have all rows of public.a", "checkout", "--at", "HEAD", "--schema", "never")
	s.cfg.Capture.URL, s.cfg.NoBaseline = owner, false
	s.init()
	s.once()
	s.says(0, "3 rows", "checkout", "--at", "HEAD", "--schema", "of_now")
	if got := s.logSQL().one(`SELECT string_agg(n::text, ' ' ORDER BY id) FROM of_now.a`); got != "2.5 5.0 7.5" {
		t.Errorf("the log has %s", got)
	}
}

// TestAlteredWhileItIsRead: what was under way when a table was altered moves nothing on that began since; and a comparison comes to its end
// although rows are written to all the while.
func TestAlteredWhileItIsRead(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.a (id int PRIMARY KEY, n int, v text); INSERT INTO public.a SELECT i, i, repeat('v', 200) FROM generate_series(1, 30000) i`)
	s.cfg.Capture.BaselineChunkBytes = 4000
	s.init()
	r, l := s.start(), s.logSQL()
	eventually(t, time.Minute, "some rows are read", func() (bool, error) { return atoi(t, l.one(`SELECT sum(rows) FROM backstory.baseline`)) > 2000, nil })
	db.do(`ALTER TABLE public.a ALTER n TYPE numeric USING -n`)
	hammer, rest := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer rest()
	wg.Go(func() {
		db := s.sql()
		for i := 0; hammer.Err() == nil; i++ {
			db.do(`UPDATE public.a SET n = n + 1, v = md5(n::text) || md5(n::text) WHERE id = %d`, 1+i%20)
			time.Sleep(2 * time.Millisecond)
		}
	})
	eventually(t, 2*time.Minute, "the comparison ends", func() (bool, error) {
		return l.one(`SELECT count(*) FROM backstory.captured c JOIN backstory.baseline b USING (oid) WHERE complete AND b.done_at IS NOT NULL AND b.heal`) == "1", nil
	})
	rest()
	wg.Wait()
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	s.says(0, "30,000 rows", "checkout", "--at", "HEAD", "--schema", "of_now", "--database", s.cfg.Capture.URL)
	if got := db.one(`SELECT count(*) FROM (SELECT * FROM public.a EXCEPT SELECT * FROM of_now.a) x`); got != "0" {
		t.Errorf("%s rows differ", got)
	}
}

// TestAlteredAgainWhileItIsCompared: what is done to a table while it is compared for what was done before has an event, too: that it is rewritten again, and that
// it gets another name, which is no reason to begin anew.
func TestAlteredAgainWhileItIsCompared(t *testing.T) {
	t.Parallel()
	for name, trigger := range map[string]bool{"event triggers": true, "none": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{tables: []string{"public.*"}})
			s.cfg.Capture.DDLTrigger = &trigger
			s.cfg.Capture.BaselineChunkBytes, s.cfg.Capture.BaselineBytesPerSecond = 1000, 5000
			db := s.sql()
			db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text)`)
			s.init()
			db.do(`INSERT INTO public.things SELECT i, repeat('v', 200) FROM generate_series(1, 500) i`)
			s.once()
			r, l := s.start(), s.logSQL()
			altered := func(want string) {
				t.Helper()
				eventually(t, time.Minute, "the log says that it was altered, and compares it", func() (bool, error) {
					got := l.one(`SELECT coalesce(string_agg(type || ' ' || data::text, ', ' ORDER BY position), '') FROM backstory.events WHERE type LIKE '%%Altered'`)
					for _, exact := range []string{`"exactly":true,"rewritten":true`, `"exactly":true,`} {
						got = strings.ReplaceAll(got, exact, "")
					}
					under := l.one(`SELECT count(*) FROM backstory.baseline WHERE pass = 1 AND chunks > 1 AND done_at IS NULL`)
					return got == want && under == "1", fmt.Errorf("%s, under way: %s", got, under)
				})
			}
			for i := range 3 { // in the type that it has
				db.do(`ALTER TABLE public.things ALTER v TYPE text USING v || '%d'`, i)
				if i == 1 {
					db.do(`UPDATE public.things SET v = 'changed' WHERE id = 500`) // by which the stream describes it before anybody looks
				}
				altered("ThingAltered {}" + strings.Repeat(", ThingAltered {}", i))
			}
			generation := l.one(`SELECT generation FROM backstory.baseline`)
			db.do(`BEGIN; ALTER TABLE public.things ADD z int; ALTER TABLE public.things DROP z; ALTER TABLE public.things RENAME TO stuff; COMMIT`)
			altered("ThingAltered {}, ThingAltered {}, ThingAltered {}, " + map[bool]string{true: `ThingAltered {"added":["z"]}, ThingAltered {"dropped":["z"]}, `}[trigger] + `StuffAltered {"renamed_from":"public.things"}`)
			if got := l.one(`SELECT generation FROM backstory.baseline`); got != generation {
				t.Errorf("the comparison has begun anew")
			}
			if err := r.end(); err != nil {
				t.Fatal(err)
			}
			s.cfg.Capture.BaselineBytesPerSecond = 0
			s.once()
			s.once()
			if got := l.one(`SELECT count(*) FROM backstory.events WHERE type LIKE '%%Altered'`); got != map[bool]string{false: "4", true: "6"}[trigger] {
				t.Errorf("in the end there are %s events", got)
			}
			s.sameRows("stuff")
		})
	}
}

// TestAlteredBehindItsLastChunk: a table gets another name when all its rows have been read, and are not yet in the log.
func TestAlteredBehindItsLastChunk(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things SELECT i, 'v' FROM generate_series(1, 50) i`)
	s.init()
	l, look := s.logSQL(), s.logSQL()
	l.do(`BEGIN; LOCK TABLE backstory.event IN SHARE MODE`)
	r := s.start()
	eventually(t, time.Minute, "the log is to have the rows", func() (bool, error) {
		return look.one(`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' AND application_name LIKE 'backstory%%'`) != "0", nil
	})
	db.do(`ALTER TABLE public.things RENAME TO stuff`)
	eventually(t, time.Minute, "that is seen", func() (bool, error) {
		return look.one(`SELECT name FROM backstory.captured`) == "stuff", nil
	})
	l.do(`COMMIT`)
	eventually(t, time.Minute, "the log says so", func() (bool, error) {
		got := look.one(`SELECT coalesce(string_agg(type || ' ' || data::text, ', ' ORDER BY position), '') FROM backstory.events WHERE op = 'note'`)
		return got == `ThingBaselineEnded {"rows":50,"imported":50}, StuffAltered {"renamed_from":"public.things"}`, fmt.Errorf("%s", got)
	})
	s.baselineDone()
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.sameRows("stuff")
}

// TestKeyThatNobodyKnows: a row is changed whose new key is a column that was added since its last change, with a default that is not constant,
// before all rows are compared: it is told apart by another index.
func TestKeyThatNobodyKnows(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.NoBaseline = true // nothing is compared, so that nobody knows
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, u int NOT NULL, v text, big text); CREATE UNIQUE INDEX things_u ON public.things (u); ALTER TABLE public.things REPLICA IDENTITY USING INDEX things_u; ALTER TABLE public.things ALTER big SET STORAGE EXTERNAL`)
	s.init()
	db.do(`INSERT INTO public.things SELECT i, 10 + i, 'a', repeat('x', 3000) FROM generate_series(1, 4) i`)
	s.once()
	db.do(`ALTER TABLE public.things ADD k uuid DEFAULT gen_random_uuid()`)
	db.do(`ALTER TABLE public.things DROP CONSTRAINT things_pkey, ADD PRIMARY KEY (k)`)
	db.do(`UPDATE public.things SET v = 'b' WHERE u = 11`)
	db.do(`DELETE FROM public.things WHERE u = 12`)
	db.do(`UPDATE public.things SET u = 23 WHERE u = 13`)
	s.once()
	db.do(`UPDATE public.things SET v = 'c' WHERE u IN (11, 23)`)
	s.once()
	w := newWorld()
	w.byOID = true
	w.replay(t, s.openLog(), nil)
	verify(t, s.openLog())
	k := db.one(`SELECT k FROM public.things WHERE u = 11`)
	s.says(0, `"v":"c"`, "show", "--json", "things/"+k)
}
