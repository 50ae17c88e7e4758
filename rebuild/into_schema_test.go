package rebuild

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// typeSamples are values of all kinds, with the edges of each. The first column is the type, the rest are literals.
var typeSamples = [][]string{
	{"smallint", "-32768", "32767"}, {"integer", "-2147483648"}, {"bigint", "9223372036854775807", "-9223372036854775808"},
	{"numeric", "1.10", "NaN", "-0.000000000000000000000000000000001", "123456789012345678901234567890.12", "Infinity"}, {"numeric(12,2)", "1.10", "0.00"},
	{"real", "NaN", "-Infinity", "1e-45", "3.4028235e38", "-0"}, {"double precision", "0.1", "Infinity", "2.2250738585072014e-308", "NaN", "-0"},
	{"money", "-12345.67"}, {"boolean", "t", "f"}, {"text", "", "NULL", `\N`, `\.`, "a\tb\nc\rd\be\ff\vg\\h", `"quoted", with comma`, "é😀", " "},
	{"character varying(10)", "abc"}, {"character(5)", "ab", "     "}, {`"char"`, "x", `\200`}, {"name", "n"}, {"bytea", `\x`, `\x00ff5c`},
	{"date", "0044-03-15 BC", "infinity", "12345-01-01"}, {"time without time zone", "24:00:00", "01:02:03.000004"}, {"time with time zone", "01:02:03+15:59"},
	{"timestamp without time zone", "-infinity", "4713-01-01 00:00:00 BC", "2026-11-23 08:07:00", "294276-12-31 23:59:59.999999"},
	{"timestamp with time zone", "infinity", "2026-11-23 08:07:00.1+00", "0001-01-01 00:00:00+00 BC"}, {"timestamp(0) with time zone", "2026-11-23 08:07:00+00"},
	{"interval", "-1 year 2 mons -3 days 04:05:06.789", "178000000 years"}, {"interval day to second(3)", "1 day 02:03:04.567"},
	{"uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"}, {"json", `{"b": 1,  "a":[ 1.50 ,null]}`, "null", ` "x" `, `{"$json":1}`, "{\n\"a\":\t1}", `{"a":1,"a":2}`},
	{"jsonb", `{"a": 1.50}`, "null", `"\u0001"`, "[]"}, {"jsonpath", `$."a"[*]`}, {"xml", "<a>&amp;</a>"},
	{"inet", "10.0.0.1/8", "::1"}, {"cidr", "10.0.0.0/8"}, {"macaddr", "08:00:2b:01:02:03"}, {"macaddr8", "08:00:2b:01:02:03:04:05"},
	{"bit(3)", "101"}, {"bit varying", "", "10"}, {"tsvector", `'a':1A 'it''s':2`}, {"tsquery", "'a' & !'b'"},
	{"point", "(1,2)"}, {"line", "{1,2,3}"}, {"lseg", "[(1,2),(3,4)]"}, {"box", "(3,4),(1,2)"}, {"path", "((1,2),(3,4))"}, {"polygon", "((1,2),(3,4))"}, {"circle", "<(1,2),3>"},
	{"int4range", "empty", "[1,5)", "(,)"}, {"numrange", "[1.50,)"}, {"tsrange", `["2026-01-01 00:00:00","2026-01-02 00:00:00")`}, {"tstzrange", `["2026-01-01 00:00:00+00",)`},
	{"daterange", "[2026-01-01,2026-02-01)"}, {"int4multirange", "{[1,3),[5,8)}", "{}"}, {"pg_lsn", "16/B374D848"}, {"txid_snapshot", "10:20:10,14"}, {"xid", "5"}, {"oid", "4294967295"},
	{"integer[]", "{}", "{1,NULL,3}", "{{1,2},{3,4}}", "[2:3]={1,2}"}, {"text[]", `{"",NULL,"NULL","a\"b","c,d","{}"," x","\\"}`}, {"boolean[]", "{t,f}"},
	{"numeric[]", "{1.10,NaN}"}, {"json[]", `{"{\"a\": 1}","null",NULL}`}, {"bytea[]", `{"\\x00"}`}, {"timestamp with time zone[]", `{"2026-11-23 08:07:00+00",infinity}`},
	{"box[]", "{(3,4),(1,2);(5,6),(0,0)}"}, {"point[]", `{"(1,2)"}`}, {"uuid[]", "{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}"},
	{"app.mood", "sad", "it's ok"}, {"app.mood[]", `{sad,"it's ok"}`}, {"app.positive", "7"}, {"app.positive[]", "{7,8}"}, {"app.pair", `(1,"a ""b"", c")`, `(,)`},
	{"app.pair[]", `{"(1,x)","(2,\"y z\")"}`}, {"app.ints", "{1,2}"}, {`app."Odd ""Name"`, "x"}, {"regclass", "pg_class"}, {"regtype", "integer"}, {"int2vector", "1 2"}, {"oidvector", "1 2"},
}

const appTypes = `CREATE SCHEMA app; CREATE TYPE app.mood AS ENUM ('sad', 'it''s ok'); CREATE DOMAIN app.positive AS integer CHECK (VALUE > 0);
	CREATE TYPE app.pair AS (n integer, t text); CREATE DOMAIN app.ints AS integer[]; CREATE DOMAIN app."Odd ""Name" AS text;`

// allTypes makes a table with a column for each sample type, and rows with its values, and tells the log of them.
func allTypes(t *testing.T, s *source) *eventlog.Relation {
	s.exec(appTypes)
	cols := []string{"id bigint PRIMARY KEY"}
	rows := 0
	for i, sample := range typeSamples {
		cols = append(cols, `"c`+string(rune('a'+i%26))+strings.Repeat("x", i/26)+`" `+sample[0])
		rows = max(rows, len(sample))
	}
	s.exec("CREATE TABLE app.\"All types\" (" + strings.Join(cols, ", ") + ")")
	for r := range rows {
		values := []string{string(rune('1' + r))}
		for _, sample := range typeSamples {
			v := "NULL"
			if r+1 < len(sample) {
				v = "E'" + strings.ReplaceAll(strings.ReplaceAll(sample[r+1], `\`, `\\`), "'", "''") + "'"
				if strings.Contains(sample[0], "char\"") && strings.HasPrefix(sample[r+1], `\`) {
					v = `E'\\200'`
				}
			}
			values = append(values, v)
		}
		s.exec(`INSERT INTO app."All types" VALUES (` + strings.Join(values, ", ") + ")")
	}
	rel := s.describe(`app."All types"`)
	rel.Schema, rel.Name = "app", "All types"
	if err := s.log.SetCaptured(s.ctx, []eventlog.Captured{{Relation: rel, SinceLSN: s.lsn}}); err != nil {
		t.Fatal(err)
	}
	for _, v := range queryValues(t, s.conn, `SELECT * FROM app."All types"`) {
		s.tx(eventlog.Item{Op: eventlog.OpInsert, Relation: rel, New: v})
	}
	return rel
}

const shapeQuery = `SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, coalesce(i.indisprimary, false)
	FROM pg_attribute a LEFT JOIN pg_index i ON i.indrelid = a.attrelid AND a.attnum = ANY (i.indkey)
	WHERE a.attrelid = '%'::regclass AND a.attnum > 0 ORDER BY a.attnum`

func shapeOf(t testing.TB, s *source, table string) []string {
	t.Helper()
	return query(t, s.conn, strings.ReplaceAll(shapeQuery, "%", table))
}

func TestEveryTypeComesBackAsItWas(t *testing.T) {
	s := newSource(t)
	allTypes(t, s)
	r := s.mustCheckout(0, Schema(SchemaConfig{URL: s.url, Schema: "then"}))
	if len(r.Warnings) > 0 {
		t.Errorf("warnings: %q", r.Warnings)
	}
	want := query(t, s.conn, `SELECT * FROM app."All types" ORDER BY id`)
	if got := query(t, s.conn, `SELECT * FROM "then"."All types" ORDER BY id`); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if got, want := shapeOf(t, s, `"then"."All types"`), shapeOf(t, s, `app."All types"`); !slices.Equal(got, want) {
		t.Errorf("shape\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if r.Tables[0].Rows != int64(len(want)) || r.Tables[0].Into != "then.All types" || r.Tables[0].Table != "app.All types" || r.Events != int64(len(want)) {
		t.Errorf("report: %+v", r)
	}
}

func TestAnotherDatabaseWithoutTheTypes(t *testing.T) {
	s := newSource(t)
	allTypes(t, s)
	srv := pgservertest.ForTest(t, pgserver.Config{})
	url := srv.SocketURL(srv.NewDatabase(t))
	r := s.mustCheckout(0, Schema(SchemaConfig{URL: url}))
	there := connect(t, url)
	want := query(t, s.conn, `SELECT * FROM app."All types" ORDER BY id`)
	if got := query(t, there, `SELECT * FROM app."All types" ORDER BY id`); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if n := len(r.Warnings); n != 8 {
		t.Errorf("%d warnings: %q", n, r.Warnings)
	}
	for _, w := range r.Warnings {
		if !strings.Contains(w, "is text, since there is no type app.") {
			t.Error(w)
		}
	}
}

func TestValuesThatTheCatalogueNoLongerAcceptsBecomeText(t *testing.T) {
	s := newSource(t)
	rel := allTypes(t, s)
	want := query(t, s.conn, `SELECT * FROM app."All types" ORDER BY id`)
	s.exec(`ALTER TYPE app.mood RENAME VALUE 'sad' TO 'blue';
		ALTER DOMAIN app.positive DROP CONSTRAINT positive_check; ALTER DOMAIN app.positive ADD CHECK (VALUE > 10) NOT VALID;
		ALTER TYPE app.pair ADD ATTRIBUTE more text`)
	r := s.mustCheckout(0, Schema(SchemaConfig{URL: s.url, Schema: "then"}))
	if got := query(t, s.conn, `SELECT * FROM "then"."All types" ORDER BY id`); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	text := map[string]bool{"app.mood": true, "app.mood[]": true, "app.positive": true, "app.positive[]": true, "app.pair": true, "app.pair[]": true}
	for i, line := range shapeOf(t, s, `"then"."All types"`) {
		typ := strings.Split(line, "|")[1]
		if want := rel.Columns[i].Type.Name; typ != want && (typ != "text" || !text[want]) {
			t.Errorf("column %s has type %s, want %s", line, typ, want)
		}
		if text[rel.Columns[i].Type.Name] && typ != "text" {
			t.Errorf("column %s has type %s", line, typ)
		}
	}
	if len(r.Warnings) != len(text) {
		t.Errorf("warnings: %q", r.Warnings)
	}
	for _, w := range r.Warnings {
		if strings.Contains(w, "sad") {
			t.Errorf("a row's value is in %q", w)
		}
	}
	if key := query(t, s.conn, `SELECT conname FROM pg_constraint WHERE conrelid = '"then"."All types"'::regclass AND contype = 'p'`); len(key) != 1 {
		t.Errorf("primary key: %q", key)
	}
}

func TestSchemasThatAreNoCheckoutAreNeverTouched(t *testing.T) {
	orders := relation("orders", []int{0}, "id bigint", "status text")
	s := newSource(t, orders)
	s.tx(insert(orders, 1, "new"))
	for _, setup := range []string{
		`CREATE SCHEMA mine; CREATE TABLE mine.orders (id bigint)`,
		`CREATE SCHEMA mine; CREATE FUNCTION mine.f() RETURNS int LANGUAGE sql AS 'SELECT 1'`,
		`CREATE SCHEMA mine; CREATE TYPE mine.t AS ENUM ('a'); COMMENT ON SCHEMA mine IS 'not a backstory checkout'`,
	} {
		s.exec(`DROP SCHEMA IF EXISTS mine CASCADE;` + setup)
		for _, replace := range []bool{false, true} {
			_, err := s.checkout(0, Schema(SchemaConfig{URL: s.url, Schema: "mine", Replace: replace}))
			if !errors.Is(err, ErrNotCheckout) || eventlog.Hint(err) == "" {
				t.Errorf("%s: %v", setup, err)
			}
		}
	}
	for _, schema := range []string{"backstory", "pg_catalog", "pg_mine", "information_schema"} {
		if _, err := s.checkout(0, Schema(SchemaConfig{URL: s.url, Schema: schema, Replace: true})); err == nil {
			t.Errorf("checked out into %s", schema)
		}
	}
}

func TestAnEmptySchemaIsTaken(t *testing.T) {
	orders := relation("orders", []int{0}, "id bigint", "status text")
	s := newSource(t, orders)
	s.tx(insert(orders, 1, "new"))
	s.exec(`CREATE SCHEMA empty`)
	s.mustCheckout(0, Schema(SchemaConfig{URL: s.url, Schema: "empty", Revision: revision("it's position 1")}))
	got := query(t, s.conn, `SELECT obj_description('empty'::regnamespace), obj_description('empty.orders'::regclass)`)
	if want := []string{"backstory checkout, it's position 1|backstory checkout of public.orders, it's position 1"}; !slices.Equal(got, want) {
		t.Errorf("comments %q", got)
	}
}

func TestReplace(t *testing.T) {
	orders, items := relation("orders", []int{0}, "id bigint", "status text"), relation("items", []int{0}, "id bigint")
	s := newSource(t, orders, items)
	first := s.tx(insert(orders, 1, "new"), insert(items, 7))
	s.tx(insert(orders, 2, "new"))
	into := func(replace bool) Target { return Schema(SchemaConfig{URL: s.url, Schema: "then", Replace: replace}) }
	s.mustCheckout(first, into(false))
	_, err := s.checkout(0, into(false))
	if !errors.Is(err, ErrOccupied) || !strings.Contains(eventlog.Hint(err), "--replace") {
		t.Errorf("%v", err)
	}
	count := func() string { return query(t, s.conn, `SELECT count(*) FROM "then".orders`)[0] }
	if n := count(); n != "1" {
		t.Errorf("%s rows after a refused checkout", n)
	}
	s.exec(`CREATE TABLE "then".mine (id int); CREATE INDEX ON "then".orders (status)`)
	s.mustCheckout(0, into(true), func(c *Config) { c.Tables = []string{"orders"} })
	if n := count(); n != "2" {
		t.Errorf("%s rows", n)
	}
	got := query(t, s.conn, `SELECT relname FROM pg_class WHERE relnamespace = '"then"'::regnamespace AND relkind = 'r' ORDER BY 1`)
	if want := []string{"mine", "orders"}; !slices.Equal(got, want) { // items is not of this checkout; mine is not ours
		t.Errorf("tables %q", got)
	}
	if left := query(t, s.conn, `SELECT nspname FROM pg_namespace WHERE nspname LIKE 'backstory_checkout%'`); len(left) > 0 {
		t.Errorf("schemas %q are left", left)
	}

	s.exec(`CREATE VIEW "then".v AS SELECT * FROM "then".orders`)
	_, err = s.checkout(first, into(true))
	if err == nil || !strings.Contains(eventlog.Hint(err), "built on the earlier checkout") {
		t.Errorf("%v: %s", err, eventlog.Hint(err))
	}
	s.exec(`DROP VIEW "then".v; DROP TABLE "then".orders; CREATE TABLE "then".orders (mine int)`)
	_, err = s.checkout(first, into(true))
	if err == nil || !strings.Contains(eventlog.Hint(err), "in the way") {
		t.Errorf("%v: %s", err, eventlog.Hint(err))
	}
	if n := count(); n != "0" {
		t.Errorf("%s rows in a table that is not ours", n)
	}
}

func TestReadersSeeTheOldCheckoutOrTheNewOne(t *testing.T) {
	orders := relation("orders", []int{0}, "id bigint", "status text")
	s := newSource(t, orders)
	var changes []eventlog.Item
	for i := range 1000 {
		changes = append(changes, insert(orders, i, "new"))
	}
	first := s.tx(changes...)
	s.tx(insert(orders, 2000, "new"))
	s.mustCheckout(first, Schema(SchemaConfig{URL: s.url, Schema: "then"}))
	reader := connect(t, s.url)
	stop, done := make(chan bool), make(chan map[string]int)
	go func() {
		seen := map[string]int{}
		defer func() { done <- seen }()
		for {
			select {
			case <-stop:
				return
			default:
				var n string
				if err := reader.QueryRow(context.Background(), `SELECT count(*)::text FROM "then".orders`).Scan(&n); err != nil {
					// A table that was dropped between looking up its name and locking it is the only one that can be met.
					if eventlog.SQLState(err) != "42P01" && eventlog.SQLState(err) != "XX000" {
						seen[err.Error()]++
					}
					continue
				}
				seen[n]++
			}
		}
	}()
	for i := range 10 {
		at := first
		if i%2 == 0 {
			at = 0
		}
		s.mustCheckout(at, Schema(SchemaConfig{URL: s.url, Schema: "then", Replace: true}))
	}
	close(stop)
	for n := range <-done {
		if n != "1000" && n != "1001" {
			t.Errorf("a reader saw %s", n)
		}
	}
}

// TestNameInPublic: what a name means, and what its table is called in a checkout, does not change when a table of that name is made in another schema.
func TestNameInPublic(t *testing.T) {
	a, b, c := relation("public.orders", []int{0}, "id bigint"), relation("other.orders", []int{0}, "id bigint"), relation("third.orders", []int{0}, "id bigint")
	s := newSource(t, a, b, c)
	s.tx(insert(a, 1))
	first := s.flush()
	s.tx(insert(b, 2), insert(c, 3))
	for n, x := range []struct {
		at     eventlog.Position
		tables []string
		want   string
	}{
		{first, nil, "orders 1, other_orders 0, third_orders 0"}, {0, nil, "orders 1, other_orders 2, third_orders 3"}, {0, []string{"orders"}, "orders 1"}, {0, []string{"other.orders"}, "orders 2"},
		{0, []string{"public.orders", "other.orders"}, "orders 1, other_orders 2"}, {0, []string{"ord*"}, "orders 1, other_orders 2, third_orders 3"}, {0, []string{"other.*", "third.*"}, "other_orders 2, third_orders 3"},
	} {
		schema := fmt.Sprintf("then%d", n)
		r := s.mustCheckout(x.at, Schema(SchemaConfig{URL: s.url, Schema: schema}), func(cfg *Config) { cfg.Tables = x.tables })
		var got []string
		for _, table := range r.Tables {
			got = append(got, strings.TrimPrefix(table.Into, schema+".")+" "+query(t, s.conn, `SELECT coalesce(max(id), 0)::text FROM `+table.Into)[0])
		}
		slices.Sort(got)
		if s := strings.Join(got, ", "); s != x.want {
			t.Errorf("%v: %s, want %s", x.tables, s, x.want)
		}
	}
}

// TestNameInSeveralSchemas: a name that tables of several schemas have, none of them public, is refused.
func TestNameInSeveralSchemas(t *testing.T) {
	a, b := relation("sales.orders", []int{0}, "id bigint"), relation("shop.orders", []int{0}, "id bigint")
	s := newSource(t, a, b)
	s.tx(insert(a, 1), insert(b, 2))
	if _, err := s.checkout(0, Schema(SchemaConfig{URL: s.url, Schema: "then"}), func(c *Config) { c.Tables = []string{"orders"} }); err == nil || !strings.Contains(err.Error(), "orders can mean sales.orders or shop.orders") {
		t.Errorf("%v", err)
	}
}

func TestTablesOfOneNameInSeveralSchemas(t *testing.T) {
	a, b := relation("sales.orders", []int{0}, "id bigint"), relation("shop.orders", []int{0}, "id bigint")
	c := relation("public.sales_orders", []int{0}, "id bigint")
	s := newSource(t, a, b, c)
	s.tx(insert(a, 1), insert(b, 2), insert(c, 3))
	s.mustCheckout(0, Schema(SchemaConfig{URL: s.url, Schema: "then"}))
	got := query(t, s.conn, `SELECT 'c', id FROM "then".sales_orders UNION ALL SELECT 'a', id FROM "then".sales_orders_2 UNION ALL SELECT 'b', id FROM "then".shop_orders ORDER BY 1`)
	if want := []string{"a|1", "b|2", "c|3"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	r := s.mustCheckout(0, Files(FilesConfig{Dir: t.TempDir()}))
	var names []string
	for _, x := range r.Tables {
		names = append(names, x.Into[strings.LastIndexByte(x.Into, '/')+1:])
	}
	if want := []string{"sales_orders.csv", "sales.orders.csv", "shop.orders.csv"}; !slices.Equal(names, want) {
		t.Errorf("%q", names)
	}
}

func TestUnknownValuesLiftNotNull(t *testing.T) {
	orders := relation("orders", []int{0}, "id bigint", "status text NOT NULL", "note text NOT NULL", "n integer NOT NULL")
	orders.ReplicaIdentity, orders.Complete = 'd', false
	orders.Columns[0].Identity = true
	s := newSource(t, orders)
	now := row(1, "paid", "", 5)
	now[2] = eventlog.Value{State: eventlog.StateUnchanged} // TOAST that the stream does not repeat
	s.tx(update(orders, nil, now))
	s.tx(insert(orders, 2, "new", "x", 6))
	if _, err := s.checkout(0, Schema(SchemaConfig{URL: s.url, Schema: "then"})); !errors.Is(err, ErrIncomplete) || !strings.Contains(eventlog.Hint(err), "--partial") {
		t.Errorf("%v", err)
	}
	r := s.mustCheckout(0, Schema(SchemaConfig{URL: s.url, Schema: "then"}), func(c *Config) { c.Partial = true })
	got := query(t, s.conn, `SELECT * FROM "then".orders ORDER BY id`)
	if want := []string{"1|paid|∅|5", "2|new|x|6"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if r.Tables[0].Unknown["note"] != 1 || len(r.Warnings) != 3 {
		t.Errorf("%+v", r)
	}
	got = query(t, s.conn, `SELECT attname, attnotnull FROM pg_attribute WHERE attrelid = '"then".orders'::regclass AND attnum > 0 ORDER BY attnum`)
	if want := []string{"id|t", "status|t", "note|f", "n|t"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestTablesWithoutColumnsOrRows(t *testing.T) {
	none, empty := relation("none", nil), relation("empty", []int{1, 0}, "b text", "a bigint")
	s := newSource(t, none, empty)
	s.tx(insert(none), insert(none))
	r := s.mustCheckout(0, Schema(SchemaConfig{URL: s.url, Schema: "then"}))
	got := query(t, s.conn, `SELECT (SELECT count(*) FROM "then".none), (SELECT count(*) FROM "then".empty), pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = '"then".empty'::regclass AND contype = 'p'`)
	if want := []string{`2|0|PRIMARY KEY (a, b)`}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if len(r.Tables) != 2 || r.Tables[0].Rows != 0 || r.Tables[1].Rows != 2 {
		t.Errorf("%+v", r)
	}
}

func TestGeneratedColumns(t *testing.T) {
	r := relation("things", []int{0}, "id bigint", "n bigint", "v text")
	r.Generated = []eventlog.Generated{
		{Name: "double", Type: "bigint", Expression: "(n * 2)", Before: 0},
		{Name: "Up", Type: "text", Expression: "upper(v)", Before: 2},
		{Name: "inverse", Type: "numeric(12,2)", Expression: "(100 / n)", Before: 3},
	}
	gone := relation("others", []int{0}, "id bigint")
	gone.Generated = []eventlog.Generated{
		{Name: "same", Type: "bigint", Expression: "id", Before: 0},
		{Name: "lost", Type: "text", Expression: "public.lost(id)", Before: 1},
		{Name: "odd", Type: "public.nosuchtype", Expression: "(id)::public.nosuchtype", Before: 1},
	}
	s := newSource(t, r, gone)
	s.tx(insert(r, 1, 5, "a"), insert(gone, 7))
	fine := s.flush()
	s.tx(insert(r, 2, 0, "b"))
	s.tx(update(r, row(2, 0, "b"), row(2, 2, nil)))

	rep := s.mustCheckout(fine, Schema(SchemaConfig{URL: s.url, Schema: "then"}))
	if got, want := query(t, s.conn, `TABLE "then".things`), []string{"10|1|5|A|a|20.00"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := query(t, s.conn, `SELECT * FROM "then".others`), []string{"7|7"}; !slices.Equal(got, want) { // id, same
		t.Errorf("got %q, want %q", got, want)
	}
	lost := []string{
		"public.others: the generated column lost is left out, since its expression fails here (42883): public.lost(id)",
		"public.others: the generated column odd is left out, since its expression fails here (42704): (id)::public.nosuchtype",
	}
	if !slices.Equal(rep.Warnings, lost) {
		t.Errorf("warnings %q", rep.Warnings)
	}

	// A value that the expression refuses: the rest of the table is as it was.
	rep = s.mustCheckout(fine+1, Schema(SchemaConfig{URL: s.url, Schema: "refused"}))
	if got, want := query(t, s.conn, `SELECT * FROM refused.things ORDER BY id`), []string{"10|1|5|A|a", "0|2|0|B|b"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if want := append(lost, "public.things: the generated column inverse is left out, since its expression fails here (22012): (100 / n)"); !slices.Equal(rep.Warnings, want) {
		t.Errorf("warnings %q", rep.Warnings)
	}
	if got := shapeOf(t, s, "refused.things"); !slices.Contains(got, "n|bigint|f|f") {
		t.Errorf("columns that are not generated lost their types: %q", got)
	}

	rep = s.mustCheckout(0, Files(FilesConfig{Dir: t.TempDir()}), func(c *Config) { c.Tables = []string{"others"} })
	if len(rep.Warnings) != 3 || !strings.Contains(rep.Warnings[0], "the generated column same is not in the file") {
		t.Errorf("warnings %q", rep.Warnings)
	}
}
