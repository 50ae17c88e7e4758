package main

import (
	"fmt"
	"strings"
	"testing"
)

// Of the names that differ in capitals and underscores alone, the one that is spelt like a table means that.
func TestNamesThatAreAlike(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.begin()
	s.must("run", "--once")
	s.sql(`CREATE SCHEMA other_one; CREATE TABLE order_s (id int PRIMARY KEY); CREATE TABLE "Orders" (id int PRIMARY KEY); CREATE TABLE other_one.orders (id int PRIMARY KEY)`)
	s.must("init")
	s.sql(`INSERT INTO order_s VALUES (1); INSERT INTO "Orders" VALUES (1)`)
	s.must("run", "--once")
	for name, want := range map[string]string{"orders/1": "Order/1 as of", "Order/1": "Order/1 as of", "public.orders/1": "Order/1 as of", "order_s/1": "OrderS/1 as of", "OrderS/1": "OrderS/1 as of", "Orders/1": "Orders/1 as of"} {
		if r := s.run("show", name); r.code != 0 || !strings.Contains(r.out, want) {
			t.Errorf("show %s: exit code %d\n%s%s", name, r.code, r.out, r.err)
		}
	}
	if r := s.run("show", "ORDERS/1"); r.code == 0 || !strings.Contains(r.err, "can mean Order or OrderS or Orders") {
		t.Errorf("show ORDERS/1: exit code %d\n%s%s", r.code, r.out, r.err)
	}
}

// A table is found by its name as Postgres prints it, in quotes, as well as without them.
func TestNamesThatPostgresQuotes(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.env["BACKSTORY_TABLES"] = "*.*"
	s.sql(`CREATE SCHEMA "Łódź"; CREATE TABLE "Łódź".orders (id int PRIMARY KEY, v text); CREATE TABLE "Łódź"."Big Ones" (id int PRIMARY KEY, v text);
		CREATE SCHEMA "a.b"; CREATE TABLE "a.b"."c/d" (id int PRIMARY KEY, v text); CREATE TABLE "say ""hi""" (id text PRIMARY KEY, v text)`)
	s.must("init")
	s.sql(`INSERT INTO orders VALUES (100, 'public'); INSERT INTO "Łódź".orders VALUES (100, 'polish'); INSERT INTO "Łódź"."Big Ones" VALUES (1, 'big'); INSERT INTO "a.b"."c/d" VALUES (1, 'odd'); INSERT INTO "say ""hi""" VALUES ('a/"b"', 'quoted')`)
	s.must("run", "--once")
	for name, want := range map[string]string{
		`Łódź.orders/100`: "polish", `"Łódź".orders/100`: "polish", `"Łódź"."orders"/100`: "polish", `"Łódź".ORDERS/100`: "polish", `"orders"/100`: "public", `public."orders"/100`: "public",
		`"Łódź"."Big Ones"/1`: "big", `"Big Ones"/1`: "big", `"a.b"."c/d"/1`: "odd", `"c/d"/1`: "odd", `public."say ""hi"""/a/"b"`: "quoted",
	} {
		for _, command := range []string{"log", "show"} {
			if r := s.run(command, name); r.code != 0 || !strings.Contains(r.out, want) {
				t.Errorf("%s %s: exit code %d, want %s\n%s%s", command, name, r.code, want, r.out, r.err)
			}
		}
	}
	if r := s.must("log", `"a.b"."c/d"`); strings.Count(r.out, "\n") != 1 {
		t.Errorf("log of a whole table:\n%s", r.out)
	}
	for _, name := range []string{`"łódź".orders/100`, `"Łódź"."Orders"/100`, `"Łódź.orders"/100`, `"Łódź.orders/100`} {
		if r := s.run("log", name); r.code != exitFailed || !strings.Contains(r.err, "the log knows nothing of that name") {
			t.Errorf("log %s: exit code %d\n%s%s", name, r.code, r.out, r.err)
		}
	}
	if r := s.must("checkout", "--at", "HEAD", "--jsonl", t.TempDir(), `"Łódź"."Big Ones"`, `public."orders"`, `"a.b"."c/d"`); !strings.Contains(r.out, "Łódź.Big Ones") || strings.Contains(r.out, "Łódź.orders") {
		t.Errorf("checkout:\n%s%s", r.out, r.err)
	}
	s.env["BACKSTORY_TABLES"] = `public.*,"Łódź".orders`
	if r := s.run("doctor"); !strings.Contains(r.out, "names are written without quotes here") {
		t.Errorf("doctor:\n%s", r.out)
	}
}

// The aggregate that a table gets with another kind of key, or since another table has the conventional one, is that of no other table, met before or later.
func TestAggregatesOfOneTable(t *testing.T) {
	t.Parallel()
	for _, before := range []bool{true, false} {
		t.Run(fmt.Sprintf("the other tables are there before: %v", before), func(t *testing.T) {
			t.Parallel()
			s := newSite(t, shared(t))
			s.sql(`CREATE TABLE t (id bigint PRIMARY KEY); CREATE TABLE items (id int PRIMARY KEY); CREATE TABLE sources (id int PRIMARY KEY)`)
			others := func() { s.sql(`CREATE TABLE t2 (id bigint PRIMARY KEY); CREATE TABLE item (id int PRIMARY KEY)`) }
			if before {
				others()
			}
			s.begin()
			s.sql(`INSERT INTO t VALUES (1); INSERT INTO items VALUES (1); INSERT INTO sources VALUES (1)`)
			s.must("run", "--once")
			s.sql(`ALTER TABLE t ALTER id TYPE text; INSERT INTO t VALUES ('x')`)
			s.must("run", "--once")
			if !before {
				others()
				s.must("init")
			}
			for _, name := range []string{"t2/1", "item/1"} { // which have no event yet
				if r := s.must("log", name); !strings.HasPrefix(r.out, "No events.") {
					t.Errorf("log %s, which is not there:\n%s", name, r.out)
				}
			}
			s.sql(`INSERT INTO t2 VALUES (1); INSERT INTO item VALUES (1); SELECT pg_drop_replication_slot('%s')`, s.slot())
			s.run("run", "--once")
			s.must("init", "--accept-gap")
			s.must("run", "--once")
			s.sql(`INSERT INTO t2 VALUES (2); INSERT INTO item VALUES (2); INSERT INTO t VALUES ('y'); INSERT INTO sources VALUES (2)`)
			s.must("run", "--once")
			for _, c := range []struct{ what, query, want string }{
				{"tables of each aggregate", `SELECT string_agg(x, ' ' ORDER BY x) FROM (SELECT DISTINCT aggregate || ':' || coalesce(relation, '-') FROM backstory.events WHERE aggregate !~ 'Order') e(x)`,
					"Item:public.items Item_2:public.item Source:- Sources:public.sources T2:public.t2 T:public.t T_2:public.t"},
				{"the view of t2", `SELECT string_agg(aggregate_id::text, ' ' ORDER BY id) FROM backstory.t2_events WHERE type ~ 'Created|Imported|Healed'`, "1 2"},
				{"the view of t with its second kind of key", `SELECT string_agg(DISTINCT aggregate_id, ' ') FROM backstory.t_2_events WHERE aggregate_id <> ''`, "1 x y"},
			} {
				if got := s.ask(s.logURL(), "%s", c.query); got != c.want {
					t.Errorf("%s: %s, want %s", c.what, got, c.want)
				}
			}
			if r := s.must("log", "Source"); strings.Count(r.out, "\n") != 1 || !strings.Contains(r.out, "SourceGap") {
				t.Errorf("log Source:\n%s", r.out)
			}
			if r := s.must("log", "t2"); strings.Contains(r.out, "T_2") {
				t.Errorf("log t2:\n%s", r.out)
			}
		})
	}
}

// A row whose key is the empty text has a name, too; events about the whole table are not its.
func TestRowWithoutAName(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.sql(`CREATE TABLE notes (code text PRIMARY KEY, v int); INSERT INTO notes VALUES ('', 1), ('a', 1)`)
	s.begin()
	s.must("run", "--once")
	s.sql(`UPDATE notes SET v = v + 1`)
	s.must("run", "--once")
	if r := s.must("log", "notes/"); strings.Count(r.out, "\n") != 2 || strings.Count(r.out, "  Note/ ") != 2 || !strings.Contains(r.out, "v: 1 → 2") {
		t.Errorf("log notes/:\n%s", r.out)
	}
	if r := s.must("show", "notes/"); !strings.Contains(r.out, "Note/ as of position") || !strings.Contains(r.out, `code  ""`) {
		t.Errorf("show notes/:\n%s", r.out)
	}
	if r := s.must("show", "Note/", "--json"); !strings.Contains(r.out, `"row":{"code":"","v":2}`) {
		t.Errorf("show Note/ --json: %s", r.out)
	}
	if r := s.must("log", "notes"); strings.Count(r.out, "\n") != 5 {
		t.Errorf("log notes:\n%s", r.out)
	}
	s.sql(`UPDATE notes SET code = 'b' WHERE code = ''`)
	s.must("run", "--once")
	if r := s.run("show", "notes/"); r.code == 0 || !strings.Contains(r.message(), "its key became b") {
		t.Errorf("show notes/, which became notes/b:\n%s%s", r.out, r.err)
	}
	s.sql(`INSERT INTO notes VALUES ('', 3); DELETE FROM notes`)
	s.must("run", "--once")
	if r := s.run("show", "notes/"); r.code == 0 || !strings.Contains(r.message(), "was not there") || !strings.Contains(r.message(), "NoteDeleted") {
		t.Errorf("show notes/, which is gone:\n%s%s", r.out, r.err)
	}
	if r := s.must("log", "orders/"); !strings.Contains(r.out, "The key of public.orders, id, is a number.") {
		t.Errorf("log orders/:\n%s", r.out)
	}
}

// A position between existing rows that were read together is not called one in a transaction of the application.
func TestPositionInAChunk(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.write(4)
	s.must("init")
	s.must("run", "--once")
	s.sql("BEGIN; INSERT INTO orders VALUES (901, 'a'); INSERT INTO orders VALUES (902, 'a'); COMMIT")
	s.must("run", "--once")
	const chunk = "in the middle of a chunk of existing rows"
	if r := s.run("show", "orders/1", "--at", "3"); !strings.Contains(r.err, chunk) {
		t.Errorf("between rows of a chunk:\n%s", r.err)
	}
	if r := s.run("show", "orders/901", "--at", "HEAD~1"); strings.Contains(r.err, chunk) || !strings.Contains(r.err, "in the middle of a transaction of the source") {
		t.Errorf("in a transaction:\n%s", r.err)
	}
}
