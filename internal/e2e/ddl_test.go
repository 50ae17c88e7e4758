package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// definitions are commands that define tables otherwise, each of which changes something that a checkout shows, and row changes between them.
var definitions = []string{
	`ALTER TABLE public.things ADD a int DEFAULT 7`,
	`UPDATE public.things SET a = 8 WHERE id = 1`,
	`ALTER TABLE public.things ADD b text`,
	`ALTER TABLE public.things DROP b`,
	`ALTER TABLE public.things ADD b int`,
	`UPDATE public.things SET b = 1`,
	`ALTER TABLE public.things DROP b; ALTER TABLE public.things ADD b int`, // of the same name and type: the stream shows nothing
	`UPDATE public.things SET b = 2 WHERE id = 2`,
	`ALTER TABLE public.things RENAME v TO w`,
	`ALTER TABLE public.things ADD c public.mood DEFAULT 'glad', ADD t timestamptz DEFAULT '2026-10-31 12:00+02', ADD d interval DEFAULT '1 day 2 hours', ADD x bytea DEFAULT '\x00ff', ADD f float8 DEFAULT 0.1`,
	`ALTER TABLE public.things ALTER a SET NOT NULL`,
	`SAVEPOINT s; ALTER TABLE public.things DROP w; UPDATE public.things SET a = 9; ROLLBACK TO s`,
	`SAVEPOINT s; ALTER TABLE public.things ADD s text DEFAULT 's'; RELEASE s`,
	`DROP TYPE public.mood CASCADE`, // which drops column c
	`ALTER TABLE public.things RENAME TO stuff`,
	`ALTER TABLE public.stuff DROP CONSTRAINT things_pkey, ADD PRIMARY KEY (n)`,
	`INSERT INTO public.stuff (id, w, n, a) VALUES (10, 'ten', 10, 0)`,
	`ALTER TABLE public.stuff DROP CONSTRAINT stuff_pkey, ADD PRIMARY KEY (id)`,
	`ALTER TABLE public.stuff REPLICA IDENTITY FULL`,
	`ALTER TABLE public.stuff DROP CONSTRAINT stuff_pkey`, // which leaves no new row in the catalogue
	`INSERT INTO public.stuff (id, w, n, a) VALUES (10, 'another', 11, 0)`,
	`DELETE FROM public.stuff WHERE n = 10`,
	`ALTER TABLE public.stuff ADD PRIMARY KEY (id)`,
	`ALTER TABLE public.stuff REPLICA IDENTITY DEFAULT`,
	`ALTER TABLE public.stuff SET SCHEMA elsewhere`,
	`DELETE FROM elsewhere.stuff WHERE id = 2`,
	`ALTER SCHEMA elsewhere RENAME TO somewhere`,
	`UPDATE somewhere.stuff SET w = 'last'`,
}

// TestDDLTrigger: with the event trigger every command that alters a table has its exact place, between the row changes of its own transaction
// too, for a sidecar that comes when all is over. A checkout of each place shows the table as the source did.
func TestDDLTrigger(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ what, begin, between, end string }{
		{"one transaction", "BEGIN", "", "COMMIT"},
		{"a transaction each", "BEGIN", "COMMIT; BEGIN", "COMMIT"},
		{"as a replica", "SET session_replication_role = replica; BEGIN", "", "COMMIT"},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{tables: []string{"public.*"}})
			yes := true
			s.cfg.Capture.DDLTrigger = &yes
			db := s.sql()
			db.do(`SET search_path = public; CREATE SCHEMA elsewhere; CREATE TYPE public.mood AS ENUM ('sad', 'glad');
				CREATE TABLE public.things (id int PRIMARY KEY, v text, n int NOT NULL); CREATE TABLE public.marks (n int PRIMARY KEY); CREATE TABLE public.others (id int PRIMARY KEY)`)
			s.init()
			db.do(`INSERT INTO public.others VALUES (1); INSERT INTO public.things SELECT i, 'v' || i, i FROM generate_series(1, 5) i`)
			s.once()
			const all = "n.nspname IN ('public', 'elsewhere', 'somewhere') AND c.relname IN ('things', 'stuff')"
			type state struct {
				rows    contents
				columns map[string][]string
				shapes  map[string]string
			}
			var states []state
			mark := func() {
				columns := columnsOf(db, all)
				rows, err := dump(t.Context(), db, columns)
				if err != nil {
					t.Fatal(err)
				}
				states = append(states, state{rows, columns, shapes(db, all)})
				db.do(`INSERT INTO public.marks VALUES (%d)`, len(states))
			}
			// Other settings than ours change how defaults are printed; a role that owns nothing but the tables is enough.
			db.do(`SET DateStyle = 'SQL, DMY'; SET IntervalStyle = sql_standard; SET bytea_output = escape; SET extra_float_digits = -5; SET TimeZone = 'Asia/Tokyo'; SET search_path = public, elsewhere`)
			settings := func(ours bool) {
				if ours {
					db.do(`SET LOCAL DateStyle = 'ISO, YMD'; SET LOCAL IntervalStyle = postgres; SET LOCAL bytea_output = hex; SET LOCAL extra_float_digits = 1; SET LOCAL TimeZone = 'UTC'; SET LOCAL search_path = pg_catalog`)
				} else {
					db.do(`SET LOCAL DateStyle = 'SQL, DMY'; SET LOCAL IntervalStyle = sql_standard; SET LOCAL bytea_output = escape; SET LOCAL extra_float_digits = -5; SET LOCAL TimeZone = 'Asia/Tokyo'; SET LOCAL search_path = public, elsewhere`)
				}
			}
			db.do("%s", c.begin)
			altered := 0
			for _, q := range definitions {
				settings(false)
				db.do("%s", q)
				settings(true)
				mark()
				if c.between != "" {
					db.do("%s", c.between)
				}
				if !strings.Contains(q, "ROLLBACK") && !strings.Contains(q, "REPLICA IDENTITY") {
					altered += strings.Count(q, "ALTER ") - strings.Count(q, ", ALTER ") + strings.Count(q, "DROP TYPE")
				}
			}
			altered -= strings.Count(strings.Join(definitions, ";"), "TABLE public.things ALTER") // counted twice
			db.do("%s", c.end)
			s.once()
			l := s.openLog()
			verify(t, l)
			log, partial := s.logSQL(), false
			for i, want := range states {
				at := eventlog.Position(atoi(t, log.one(`SELECT position FROM backstory.events WHERE type = 'MarkCreated' AND aggregate_id = '%d'`, i+1)))
				url := s.log.URL(s.log.NewDatabase(t))
				table := tableOf(want.rows)
				args := []string{"checkout", "--at", fmt.Sprint(at), "--database", url, "--schema", "then", table}
				if partial = partial || strings.Contains(definitions[i], "ADD PRIMARY KEY"); partial {
					args = append(args, "--partial") // it does not count as complete until it is compared
				}
				p := s.command(false, args...)
				if p.wait(time.Minute) != 0 {
					t.Fatalf("checkout after %s:\n%s", definitions[i], p.out)
				}
				there := open(t, url)
				for name, columns := range want.columns {
					_, short, _ := strings.Cut(name, ".")
					have, err := dump(t.Context(), there, map[string][]string{"then." + short: columns})
					if err != nil {
						t.Fatalf("checkout after %s: %v\n%s", definitions[i], err, p.out)
					}
					if err := difference(name, "the checkout", have["then."+short], want.rows[name], columns); err != nil {
						t.Errorf("checkout of %d, after %s: %v", at, definitions[i], err)
					}
					if got, want := shapes(there, "n.nspname = 'then'")[short], strings.ReplaceAll(want.shapes[short], "public.mood", "text"); got != want {
						t.Errorf("after %s it was made as\n%s, it was\n%s", definitions[i], got, want)
					}
				}
				_ = there.Close(t.Context())
			}
			// Each has an event, between the marks before and after it; looking at the catalogue later finds nothing new.
			count := func() string {
				return log.one(`SELECT count(*) || ' ' || count(*) FILTER (WHERE data->>'exactly' = 'true') FROM backstory.events WHERE type LIKE '%%Altered'`)
			}
			// That its rows are compared, since it had another key for a while, is no change.
			want := fmt.Sprintf("%d %[1]d", altered)
			if count() != want {
				t.Errorf("there are %s events of tables altered, and exactly; want %s", count(), want)
			}
			r := s.start()
			eventually(t, time.Minute, "the catalogue is looked at", func() (bool, error) {
				return log.one(`SELECT count(*) FROM backstory.captured WHERE schema = 'somewhere' AND name = 'stuff'`) == "1", nil
			})
			db.do(`BEGIN; INSERT INTO public.marks VALUES (1000); DROP TABLE public.others; INSERT INTO public.marks VALUES (1001); COMMIT`)
			eventually(t, time.Minute, "the table that was dropped is captured no more", func() (bool, error) {
				return log.one(`SELECT count(*) FROM backstory.captured WHERE name = 'others'`) == "0", nil
			})
			if err := r.end(); err != nil {
				t.Fatal(err)
			}
			s.once()
			if count() != want {
				t.Errorf("after the catalogue was looked at there are %s events of tables altered, and exactly; want %s", count(), want)
			}
			if got := log.one(`SELECT string_agg(type, ' ' ORDER BY position) FROM backstory.events WHERE type LIKE 'Other%%' OR aggregate_id IN ('1000', '1001')`); got != "OtherCreated MarkCreated OtherDropped MarkCreated" {
				t.Errorf("of the table that was dropped the log says %s", got)
			}
			w := newWorld()
			w.byOID = true
			w.replay(t, l, nil)
			w.sameTables(t, s.sql(), all)
		})
	}
}

// TestDDLTriggerOfOthers: the event trigger works for whoever alters a table, and is no hindrance; it is made once, and removed when that is asked
// for, by a superuser. What it has said does not count once it was disabled.
func TestDDLTriggerOfOthers(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{tables: []string{"public.*"}})
	db := s.sql()
	role := "owner_" + databaseOf(t, s.cfg.Capture.URL)
	db.do(`CREATE ROLE %s LOGIN REPLICATION; GRANT CREATE ON SCHEMA public TO %[1]s; GRANT CREATE ON DATABASE %s TO %[1]s`, role, databaseOf(t, s.cfg.Capture.URL))
	db.do(`DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc WHERE proname = 'pg_logical_emit_message' LOOP EXECUTE 'REVOKE EXECUTE ON FUNCTION ' || f || ' FROM public'; END LOOP; END $$`)
	owner := open(t, withUser(t, s.cfg.Capture.URL, role))
	owner.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text)`)
	yes, no := true, false
	super := s.cfg.Capture.URL
	s.cfg.Capture.URL = withUser(t, super, role)
	s.cfg.Capture.DDLTrigger = &yes
	if _, err := s.tryInit(within(t, time.Minute), nil); err == nil || !strings.Contains(err.Error(), "superuser") || !strings.Contains(eventlog.Hint(err), "init --ddl-trigger --print-sql") {
		t.Fatalf("init of a role that is no superuser: %v (%s)", err, eventlog.Hint(err))
	}
	s.cfg.Capture.URL = super
	s.init()
	triggers := func() string {
		return db.one(`SELECT count(*) || ' ' || coalesce(min(oid), 0) || ' ' || (SELECT count(*) FROM pg_namespace WHERE nspname = 'backstory_ddl') FROM pg_event_trigger WHERE evtenabled = 'A'`)
	}
	made := triggers()
	if !strings.HasPrefix(made, "3 ") || !strings.HasSuffix(made, " 1") {
		t.Errorf("there are event triggers: %s", made)
	}
	s.init()
	if got := triggers(); got != made {
		t.Errorf("made again, they are %s; they were %s", got, made)
	}
	p := newPatient(t, s, "")
	p.with("warning: event trigger backstory_rewrite is not enabled for every session → ALTER EVENT TRIGGER", p.does(`ALTER EVENT TRIGGER backstory_rewrite ENABLE`), nil)
	p.with("warning: event trigger backstory_ddl is disabled → ALTER EVENT TRIGGER", p.does(`ALTER EVENT TRIGGER backstory_ddl DISABLE`), nil)
	if s.src.Major() >= 17 {
		p.with("warning: event_triggers is off for role "+role+" in database ", p.does(fmt.Sprintf(`ALTER ROLE %s IN DATABASE %s SET event_triggers = off`, role, databaseOf(t, super))), p.does(fmt.Sprintf(`ALTER ROLE %s IN DATABASE %s RESET event_triggers`, role, databaseOf(t, super))))
	}
	p.with("warning: event trigger backstory_drop is gone → backstory init --ddl-trigger", p.does(`DROP EVENT TRIGGER backstory_drop`), func() { s.init() })
	p.with("warning: event trigger backstory_rewrite was made by another version", p.does(`CREATE OR REPLACE FUNCTION backstory_ddl.rewritten() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'`), func() { s.init() })
	owner.do(`INSERT INTO public.things VALUES (1, 'a')`)
	owner.do(`ALTER TABLE public.things ADD w int`)
	log := s.logSQL()
	s.once()
	count := func(where string) string {
		return log.one(`SELECT count(*) FROM backstory.events WHERE type = 'ThingAltered' AND %s`, where)
	}
	if got := count(`data->>'exactly' = 'true'`); got != "1" {
		t.Errorf("%s of 1 alterations by its owner have their place", got)
	}
	// Altered while the event trigger is disabled: of the same name and type, it is another column.
	owner.do(`ALTER TABLE public.things ALTER w SET DEFAULT 3`)
	owner.do(`UPDATE public.things SET w = 5`)
	db.do(`ALTER EVENT TRIGGER backstory_ddl DISABLE`)
	owner.do(`ALTER TABLE public.things DROP w; ALTER TABLE public.things ADD w int DEFAULT 7`)
	db.do(`ALTER EVENT TRIGGER backstory_ddl ENABLE ALWAYS`)
	owner.do(`INSERT INTO public.things VALUES (2, 'b', 8)`)
	s.once()
	s.once() // which sees the catalogue
	s.once()
	checkLog(t, s.openLog()).sameTables(t, db, "n.nspname = 'public'")
	h, err := s.openLog().Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	columns := columnsOf(db, "n.nspname = 'public'")
	s.checkoutOfNow(db, h.Position, columns)
	s.cfg.Capture.DDLTrigger = &no
	s.init()
	if got := triggers(); got != "0 0 0" {
		t.Errorf("after they were removed there are event triggers: %s", got)
	}
	s.cfg.Capture.DDLTrigger = nil
	s.init()
	owner.do(`ALTER TABLE public.things DROP v`)
}

// TestDDLTriggerMadeMeanwhile: a superuser makes the event triggers while a sidecar runs as another role. It may read what their messages carry, and what
// they tell holds from then on.
func TestDDLTriggerMadeMeanwhile(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{tables: []string{"public.*"}})
	db, super := s.sql(), s.cfg.Capture.URL
	name := databaseOf(t, super)
	role := "sidecar_" + name
	db.do(`CREATE ROLE %s LOGIN REPLICATION; GRANT CREATE ON SCHEMA public TO %[1]s; GRANT CREATE ON DATABASE %s TO %[1]s`, role, name)
	s.cfg.Capture.URL = withUser(t, super, role)
	owner := s.sql()
	owner.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text)`)
	s.init()
	r := s.start()
	log := s.logSQL()
	arrives := func(n int) {
		t.Helper()
		owner.do(`INSERT INTO public.things (id) VALUES (%d)`, n)
		eventually(t, time.Minute, "the row is in the log", func() (bool, error) {
			return log.one(`SELECT count(*) FROM backstory.events WHERE type = 'ThingCreated' AND aggregate_id = '%d'`, n) == "1", nil
		})
	}
	arrives(1)
	yes := true
	s.cfg.Capture.URL, s.cfg.Capture.DDLTrigger = super, &yes
	s.init()
	read := `SELECT has_table_privilege('` + role + `', 'backstory_ddl.secret', 'SELECT')`
	if db.one("%s", read) != "t" {
		t.Error("the sidecar's role may not read the secret")
	}
	owner.do(`ALTER TABLE public.things ADD w int`)
	arrives(2)
	if got := log.one(`SELECT string_agg(coalesce(data->>'exactly', 'no'), ' ') FROM backstory.events WHERE type = 'ThingAltered'`); got != "true" {
		t.Errorf("altered exactly: %s", got)
	}
	// Another init mends a right that was taken away, when nobody runs, too.
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	db.do(`REVOKE ALL ON backstory_ddl.secret FROM %s`, role)
	owner.do(`ALTER TABLE public.things ADD x int`)
	s.cfg.Capture.URL, s.cfg.Capture.DDLTrigger = withUser(t, super, role), nil
	r = s.start()
	arrives(3)
	if st, err := r.sc.Status(t.Context()); err != nil || st.Log.IgnoredContext != 0 {
		t.Errorf("the application is said to have left context messages that were not transactional: %+v, %v", st.Log, err)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.cfg.Capture.URL, s.cfg.Capture.DDLTrigger = super, nil
	s.says(0, "sidecar_"+name+" is taken for the sidecar's role, since it owns the event log: it may read the secret", "init", "--ddl-trigger")
	if db.one("%s", read) != "t" {
		t.Error("another init has not let the sidecar's role read the secret again")
	}
	s.cfg.Capture.URL = withUser(t, super, role)
	newPatient(t, s, "").with("warning: role "+role+" may not read backstory_ddl.secret", func() { db.do(`REVOKE ALL ON backstory_ddl.secret FROM %s`, role) },
		func() { db.do(`GRANT SELECT ON backstory_ddl.secret TO %s`, role) })
}

// TestDDLTriggerIsNoWayIn: the functions of the event triggers run as a superuser, and what they look for is never found in the caller's temporary
// schema; what others leave in the WAL under their prefix counts for nothing, and stops nothing.
func TestDDLTriggerIsNoWayIn(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{tables: []string{"public.*"}})
	yes := true
	s.cfg.Capture.DDLTrigger = &yes
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text)`)
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	s.once()
	name := databaseOf(t, s.cfg.Capture.URL)
	role := "mallory_" + name
	db.do(`CREATE ROLE %s LOGIN; GRANT TEMPORARY ON DATABASE %s TO %[1]s; GRANT SELECT ON ALL TABLES IN SCHEMA pg_catalog TO %[1]s`, role, name)
	m := open(t, withUser(t, s.cfg.Capture.URL, role))
	m.do(`CREATE FUNCTION pg_temp.evil() RETURNS name LANGUAGE plpgsql AS $x$ BEGIN IF current_user <> session_user THEN EXECUTE 'ALTER ROLE %s SUPERUSER'; END IF; RETURN 'x'; END $x$`, role)
	for _, view := range []string{"pg_publication_tables", "pg_publication", "pg_publication_rel", "pg_publication_namespace", "pg_class", "pg_namespace", "pg_attribute", "pg_index", "pg_event_trigger", "pg_attrdef", "pg_type"} {
		m.do(`CREATE TEMP VIEW %s AS SELECT 1 AS oid, pg_temp.evil() AS pubname, pg_temp.evil() AS evtname`, view)
	}
	for _, typ := range []string{"xid", "xid8", "json", "bigint", "text"} {
		m.do(`CREATE DOMAIN pg_temp."%s" AS pg_catalog.text CHECK (pg_temp.evil() = 'x')`, typ)
	}
	m.do(`CREATE TEMP TABLE z (a int); ALTER TABLE z ADD c int; DROP TABLE z`)
	if got := db.one(`SELECT rolsuper FROM pg_roles WHERE rolname = '%s'`, role); got != "f" {
		t.Fatal("a role that may make temporary tables has become a superuser")
	}
	if _, err := m.Exec(t.Context(), `SELECT value FROM backstory_ddl.secret`); eventlog.SQLState(err) != "42501" {
		t.Errorf("the secret is read by anybody: %v", err)
	}
	oid := db.one(`SELECT 'public.things'::regclass::oid`)
	const columns = `"columns":[{"name":"id","num":1,"type":23,"type_name":"integer","base":23,"key":1,"identity":true}]`
	for _, msg := range []string{`{"dropped":[%s]}`, `{"secret":"","dropped":[%s]}`, `{"secret":"x","dropped":[%s]}`, `{"oid":%s,"schema":"public","name":"others","identity":"d",` + columns + `}`,
		`{"oid":%s,"schema":"public","name":"th\u0000ings","identity":"d",` + columns + `}`, `{"rewritten":%s}`, `%s`, `{`} {
		if strings.Contains(msg, "%s") {
			msg = fmt.Sprintf(msg, oid)
		}
		m.do(`SELECT pg_catalog.pg_logical_emit_message(true, 'backstory.ddl', %s)`, eventlog.QuoteLiteral(msg))
	}
	db.do(`INSERT INTO public.things VALUES (2, 'b')`)
	s.once()
	if got := s.logSQL().one(`SELECT string_agg(type, ' ' ORDER BY position) FROM backstory.events`); got != "ThingCreated ThingCreated" {
		t.Errorf("the log has %s", got)
	}
	// Nor do they count where there are no event triggers.
	no := false
	s.cfg.Capture.DDLTrigger = &no
	s.init()
	m.do(`SELECT pg_catalog.pg_logical_emit_message(true, 'backstory.ddl', '{"secret":"","dropped":[%s]}')`, oid)
	db.do(`INSERT INTO public.things VALUES (3, 'c')`)
	s.once()
	s.says(0, "3 rows", "checkout", "--at", "HEAD", "--schema", "past", "things")
}

// TestDDLTriggerIsNoHindrance: a command that alters a table waits for no other table, and what it takes does not grow with what its transaction has done.
func TestDDLTriggerIsNoHindrance(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{tables: []string{"public.*"}})
	yes := true
	s.cfg.Capture.DDLTrigger = &yes
	db, other := s.sql(), s.sql()
	const tables = 150
	db.do(`DO $$ BEGIN FOR i IN 1..%d LOOP EXECUTE format('CREATE TABLE public.t%%s (id int PRIMARY KEY, a text, b int, g int GENERATED ALWAYS AS (b + 1) STORED)', i); END LOOP; END $$`, tables)
	s.init()
	other.do(`BEGIN; LOCK TABLE public.t1 IN ACCESS EXCLUSIVE MODE; ALTER TABLE public.t3 ADD x int`)
	db.do(`SET lock_timeout = '10s'`)
	db.do(`ALTER TABLE public.t2 ADD x int`)
	db.do(`CREATE TEMP TABLE z (a int); ALTER TABLE z ADD b int; DROP TABLE z`)
	other.do(`COMMIT`)
	witness := s.cfg.Capture.Slot + "_w"
	db.do(`SELECT pg_create_logical_replication_slot('%s', 'test_decoding')`, witness)
	db.do(`DO $$ BEGIN FOR i IN 1..%d LOOP EXECUTE format('ALTER TABLE public.t%%s ADD y int', i); END LOOP; END $$`, tables)
	if got := db.one(`SELECT count(*) FROM pg_logical_slot_get_changes('%s', NULL, NULL) WHERE data LIKE '%%prefix: backstory.ddl,%%"oid"%%'`, witness); got != fmt.Sprint(tables) {
		t.Errorf("%d commands in one transaction have told of tables %s times", tables, got)
	}
	db.do(`SELECT pg_drop_replication_slot('%s')`, witness)
	s.once()
	if got := s.logSQL().one(`SELECT count(*) FROM backstory.captured WHERE columns::text LIKE '%%"y"%%'`); got != fmt.Sprint(tables) {
		t.Errorf("%s of %d tables are recorded with the new column", got, tables)
	}
}

// TestDDLTriggerNamesRows: from the very command on that attaches, detaches, renames or drops a table, its rows are those of the table that it is then.
func TestDDLTriggerNamesRows(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{tables: []string{"public.*"}})
	yes := true
	s.cfg.Capture.DDLTrigger = &yes
	db := s.sql()
	db.do(`CREATE TABLE public.orders (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); CREATE TABLE public.orders_1 PARTITION OF public.orders FOR VALUES FROM (0) TO (100);
		CREATE TABLE public.apart (id int PRIMARY KEY, v text); CREATE TABLE public.things (id int PRIMARY KEY, v text)`)
	s.init()
	db.do(`INSERT INTO public.orders VALUES (1, 'a'); INSERT INTO public.apart VALUES (101, 'b'); INSERT INTO public.things VALUES (1, 'c')`)
	s.once()
	db.do(`BEGIN; ALTER TABLE public.orders ATTACH PARTITION public.apart FOR VALUES FROM (100) TO (200); INSERT INTO public.orders VALUES (102, 'd'); COMMIT`)
	db.do(`INSERT INTO public.orders VALUES (103, 'e')`)
	db.do(`BEGIN; ALTER TABLE public.orders DETACH PARTITION public.apart; INSERT INTO public.apart VALUES (104, 'f'); COMMIT`)
	db.do(`INSERT INTO public.apart VALUES (105, 'g')`)
	db.do(`BEGIN; ALTER TABLE public.orders RENAME TO purchases; INSERT INTO public.purchases VALUES (2, 'h'); COMMIT`)
	db.do(`ALTER TABLE public.things RENAME TO stuff; ALTER TABLE public.stuff ADD w int DEFAULT 7`)
	db.do(`INSERT INTO public.stuff VALUES (2, 'i', 8); DROP TABLE public.stuff`)
	s.once()
	got := s.logSQL().one(`SELECT string_agg(type || CASE WHEN data->>'exactly' = 'true' THEN '!' ELSE coalesce(' ' || nullif(aggregate_id, ''), '') END, ', ' ORDER BY position) FROM backstory.events WHERE position > 3`)
	want := "OrderAltered!, OrderCreated 102, OrderCreated 103, ApartAltered!, ApartCreated 104, ApartCreated 105, PurchaseAltered!, PurchaseCreated 2, StuffAltered!, StuffAltered!, StuffCreated 2, StuffDropped!"
	if got != want {
		t.Errorf("the log has %s\nwant %s", got, want)
	}
	s.says(1, "public.stuff has been dropped by then", "checkout", "--at", "HEAD", "--schema", "past", "stuff")
}

// TestAlteredSaysWhat: each change has one event, which says what it was, with event triggers and without: that a partitioned table got another name is not
// that its partitions were detached; and of a table whose rows are compared for it nothing is said twice.
func TestAlteredSaysWhat(t *testing.T) {
	t.Parallel()
	for name, trigger := range map[string]bool{"event triggers": true, "none": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{tables: []string{"public.*"}})
			s.cfg.Capture.DDLTrigger = &trigger
			db := s.sql()
			db.do(`CREATE TABLE public.orders (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); CREATE TABLE public.low PARTITION OF public.orders FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (id);
				CREATE TABLE public.leaf PARTITION OF public.low DEFAULT; CREATE TABLE public.things (id int PRIMARY KEY, u int NOT NULL, v text); CREATE UNIQUE INDEX things_u ON public.things (u)`)
			s.init()
			db.do(`INSERT INTO public.orders VALUES (1, 'a'); INSERT INTO public.things VALUES (1, 1, 'a')`)
			s.once()
			l := s.logSQL()
			for _, x := range []struct{ sql, want string }{
				{`ALTER TABLE public.orders RENAME TO purchases`, `PurchaseAltered {"renamed_from":"public.orders"}`},
				{`ALTER TABLE public.leaf RENAME TO sheet`, `PurchaseAltered {"renamed_from":"public.leaf"}`},
				{`ALTER TABLE public.purchases DETACH PARTITION public.low`, `LowAltered {"partition":"public.sheet","detached_from":"public.purchases"}`},
				{`ALTER TABLE public.low DETACH PARTITION public.sheet`, `SheetAltered {"detached_from":"public.low"}`},
				{`ALTER TABLE public.purchases ATTACH PARTITION public.sheet DEFAULT`, `PurchaseAltered {"partition":"public.sheet"}`},
				{`ALTER TABLE public.things REPLICA IDENTITY USING INDEX things_u`, `ThingAltered {}`},
				{`ALTER TABLE public.things ALTER v TYPE varchar(1) USING 'x'`, `ThingAltered {"retyped":{"v":"character varying(1)"}}`},
			} {
				at := l.one(`SELECT position FROM backstory.head`)
				db.do("%s", x.sql)
				s.once()
				db.do(`UPDATE public.things SET v = upper(v)`)
				s.once() // by then the rows are compared
				got := l.one(`SELECT string_agg(type || ' ' || data::text, ', ' ORDER BY position) FROM backstory.events WHERE position > %s AND type LIKE '%%Altered'`, at)
				for _, exact := range []string{`"exactly":true,`, `"exactly":true`, `"rewritten":true,`} {
					if trigger {
						got = strings.Replace(got, exact, "", 1)
					}
				}
				if got != x.want {
					t.Errorf("%s: the log has %s, want %s", x.sql, got, x.want)
				}
			}
			s.sameRows("purchases", "things")
		})
	}
}

// TestDDLTriggerIsPassed: what a session alters without the event triggers (event_triggers, from PostgreSQL 17 on; ALTER EVENT TRIGGER … DISABLE), or what the
// function of one could not tell, is found by looking at the catalogue, in spite of what they have told before; only its place is not exact.
func TestDDLTriggerIsPassed(t *testing.T) {
	t.Parallel()
	number := 0
	for _, c := range []struct{ what, off, on string }{
		{"event_triggers = off", `SET event_triggers = off`, `RESET event_triggers`},
		{"disabled", `ALTER EVENT TRIGGER backstory_ddl DISABLE; ALTER EVENT TRIGGER backstory_rewrite DISABLE; ALTER EVENT TRIGGER backstory_drop DISABLE`,
			`ALTER EVENT TRIGGER backstory_ddl ENABLE ALWAYS; ALTER EVENT TRIGGER backstory_rewrite ENABLE ALWAYS; ALTER EVENT TRIGGER backstory_drop ENABLE ALWAYS`},
		{"failed", `ALTER TABLE backstory_ddl.secret RENAME TO gone`, `ALTER TABLE backstory_ddl.gone RENAME TO secret`},
	} {
		for _, alter := range []struct{ what, sql string }{
			{"another column of that name", `ALTER TABLE public.things DROP w; ALTER TABLE public.things ADD w int DEFAULT 7`},
			{"rewritten", `ALTER TABLE public.things ALTER w TYPE int USING w * 2`},
			{"swapped", `ALTER TABLE public.things RENAME w TO t; ALTER TABLE public.things RENAME x TO w; ALTER TABLE public.things RENAME t TO x`},
			{"another key", `ALTER TABLE public.things DROP CONSTRAINT things_pkey, ADD PRIMARY KEY (x)`},
		} {
			number++
			running := number%2 == 0 != (number > 4) // each way of passing them, and each alteration, at work and not
			t.Run(fmt.Sprintf("%s, %s, running: %v", c.what, alter.what, running), func(t *testing.T) {
				t.Parallel()
				s := newSystem(t, where{tables: []string{"public.*"}, version: pgservertest.AtLeast("17")})
				yes := true
				s.cfg.Capture.DDLTrigger = &yes
				db := s.sql()
				db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text, w int)`)
				s.init()
				db.do(`INSERT INTO public.things SELECT i, 'a', i FROM generate_series(1, 5) i; ALTER TABLE public.things ADD x int; UPDATE public.things SET x = 10 * id`)
				s.once()
				looks := s.once
				if running {
					r := s.start()
					looks = func() { time.Sleep(200 * time.Millisecond) }
					defer func() {
						if err := r.end(); err != nil {
							t.Error(err)
						}
					}()
				}
				db.do(`ALTER TABLE public.things ALTER x SET NOT NULL; UPDATE public.things SET w = 6 WHERE id = 1`) // which the event triggers tell
				looks()
				db.do("%s", c.off)
				db.do("%s", alter.sql)
				db.do("%s", c.on)
				db.do(`INSERT INTO public.things (id, v, w, x) VALUES (6, 'b', 8, 60); UPDATE public.things SET w = 9 WHERE id = 2; UPDATE public.things SET v = 'c' WHERE id = 3; DELETE FROM public.things WHERE id = 4`)
				looks()
				if running {
					l := s.logSQL()
					eventually(t, time.Minute, "it is seen", func() (bool, error) {
						return l.one(`SELECT count(*) FROM backstory.baseline WHERE done_at IS NOT NULL AND generation > 0`) != "0", nil
					})
				}
				db.do(`INSERT INTO public.things (id, v, w, x) VALUES (7, 'd', 11, 70); UPDATE public.things SET w = 12 WHERE id IN (2, 6); UPDATE public.things SET v = 'e' WHERE id = 5`)
				s.settles(db, running, "things")
				db.do(`ALTER TABLE public.things ADD y int DEFAULT 3; UPDATE public.things SET w = 13 WHERE id = 7`)
				s.settles(db, running, "things")
			})
		}
	}
}

// TestDDLTriggerMadeInABacklog: what was altered before the event triggers were made is found all the same, and what they tell of later holds in its place: with
// it and what the source says of it by now the shapes are right.
func TestDDLTriggerMadeInABacklog(t *testing.T) {
	t.Parallel()
	for what, untold := range map[string]string{
		"another column of that name":                `ALTER TABLE public.things DROP w; ALTER TABLE public.things ADD w int DEFAULT 7`,
		"another column of that name, and rows":      `ALTER TABLE public.things DROP w; ALTER TABLE public.things ADD w int DEFAULT 7; UPDATE public.things SET v = 'b' WHERE id = 2; INSERT INTO public.things VALUES (6, 'c', 60)`,
		"rewritten":                                  `ALTER TABLE public.things ALTER w TYPE int USING w * 2`,
		"another type, and rows":                     `ALTER TABLE public.things ALTER w TYPE text; UPDATE public.things SET v = 'b' WHERE id = 2`,
		"another name for a while, and rows":         `ALTER TABLE public.things RENAME w TO u; UPDATE public.things SET u = 3 WHERE id = 2; ALTER TABLE public.things RENAME u TO w`,
		"another key, and rows that are named by it": `ALTER TABLE public.things DROP CONSTRAINT things_pkey, ADD PRIMARY KEY (w); UPDATE public.things SET w = 44 WHERE id = 4`,
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{tables: []string{"public.*"}})
			db := s.sql()
			db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text, w int)`)
			s.init()
			db.do(`INSERT INTO public.things SELECT i, 'a', i FROM generate_series(1, 5) i`)
			s.once()
			db.do(`UPDATE public.things SET w = 100 WHERE id = 1`)
			db.do("%s", untold)
			yes := true
			s.cfg.Capture.DDLTrigger = &yes
			s.init()
			db.do(`ALTER TABLE public.things ADD x int DEFAULT 5`)
			db.do(`INSERT INTO public.things VALUES (7, 'd', 70, 1); UPDATE public.things SET v = 'e' WHERE id = 3`)
			db.do(`ALTER TABLE public.things RENAME w TO z`)
			db.do(`UPDATE public.things SET z = 33 WHERE id = 3; ALTER TABLE public.things DROP v`)
			s.once()
			for i, want := range []string{"id integer NOT NULL, v text, w %[1]s, x integer", "id integer NOT NULL, v text, z %[1]s, x integer", "id integer NOT NULL, z %[1]s, x integer"} {
				at := s.logSQL().one(`SELECT position FROM backstory.events WHERE type = 'ThingAltered' AND data->>'exactly' = 'true' ORDER BY position OFFSET %d LIMIT 1`, i)
				s.says(0, "", "checkout", "--partial", "--at", at, "--schema", "past", "--replace", "things")
				typ, key := "integer", "id"
				if strings.Contains(untold, "TYPE text") {
					typ = "text"
				}
				if want = fmt.Sprintf(want, typ); strings.Contains(untold, "PRIMARY KEY") {
					key = map[bool]string{true: "w", false: "z"}[i == 0]
					want = strings.Replace(want, key+" "+typ, key+" "+typ+" NOT NULL", 1)
				}
				if got := shapes(db, "n.nspname = 'past'")["things"]; got != want+" PRIMARY KEY ("+key+")" {
					t.Errorf("at %s it is %s, it was %s", at, got, want)
				}
			}
			s.settles(db, false, "things")
		})
	}
}

// settles waits until the log has what the source has of a table, while a sidecar runs or not, and no more.
func (s *system) settles(db *session, running bool, table string) {
	s.t.Helper()
	want := db.one(`SELECT string_agg(a::text, ' ' ORDER BY a::text) FROM public.%s a`, table)
	have := ""
	eventually(s.t, time.Minute, "the log has what the source has", func() (bool, error) {
		if !running {
			s.once()
		}
		p := s.command(false, "checkout", "--at", "HEAD", "--schema", "of_now", "--replace", table)
		if p.wait(time.Minute) != 0 {
			return false, fmt.Errorf("%s", p.out)
		}
		have = db.one(`SELECT coalesce(string_agg(a::text, ' ' ORDER BY a::text), '') FROM of_now.%s a`, table)
		return have == want, fmt.Errorf("it has %s, not %s", have, want)
	})
	verify(s.t, s.openLog())
}
