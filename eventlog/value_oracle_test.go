package eventlog_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// samples has, for each built-in type by the name that format_type gives it, what is put in: a literal, or after "sql:"
// an expression.
var samples = map[string][]string{
	"boolean": {"t", "f"},
	"bytea":   {`\x`, `\x00`, `\x0102ff`, `\x5c5c22272c7b7d`},
	`"char"`:  {"a", "", " ", `"`, `\`, ",", "{", "sql:9::\"char\"", "sql:1::\"char\"", "sql:127::\"char\"", "sql:(-61)::\"char\""},
	"name":    {"x", "", "a b", `"q"`, "NULL", strings.Repeat("é", 31)},
	"bigint":  {"0", "-1", "9223372036854775807", "-9223372036854775808"},
	"smallint": {
		"0", "32767", "-32768"},
	"int2vector": {"", "1", "1 -2 3"},
	"integer":    {"0", "-1", "2147483647", "-2147483648"},
	"regproc":    {"pi", "-", "12345678"},
	"text": {"", " ", "a", "NULL", "null", "Null", "nullx", `"`, `\`, `\\"`, "{", "}", "{}", ",", ";", "a,b", "\t", "\n", "\v", "\f", "\r",
		"\x01\x02\x1f\x7f", "a b", "\u00a0", "\u2003", "\u2028", "\ufeff", "\ufffd", "é", "e\u0301", "漢字", "😀", "\U0010ffff",
		"2026-11-23T08:07:00", "[2:3]={1,2}", `{"a": 1}`, `{"$json":null}`, "$", "1", "true", strings.Repeat("long ", 5000)},
	"oid":          {"0", "1", "4294967295"},
	"tid":          {"(0,1)", "(4294967295,65535)"},
	"xid":          {"0", "4294967295"},
	"cid":          {"0", "4294967295"},
	"oidvector":    {"", "1 4294967295"},
	"json":         append(documents(), `"a\u0000"`, `{"\u0000": "\ud800"}`),
	"jsonb":        documents(),
	"xml":          {"", "a", "<a/>", "<a b=\"c\">\n&lt; {x},\\ </a>", "<?xml version=\"1.0\"?><a/>", "<!-- c --><a/>"},
	"pg_node_tree": {"sql:(SELECT adbin FROM pg_attrdef LIMIT 1)"},
	"pg_ndistinct": {"sql:(SELECT stxdndistinct FROM pg_statistic_ext_data LIMIT 1)"},
	"pg_dependencies": {
		"sql:(SELECT stxddependencies FROM pg_statistic_ext_data LIMIT 1)"},
	"pg_mcv_list":                 {"sql:(SELECT stxdmcv FROM pg_statistic_ext_data LIMIT 1)"},
	"point":                       {"(1,2)", "(-0,1e+300)", "(NaN,Infinity)", "(0.1,1e-300)"},
	"lseg":                        {"[(1,2),(3,4.5)]"},
	"path":                        {"[(1,2),(3,4)]", "((1,2),(3,4))"},
	"box":                         {"(3,4),(1,2)", "(0,0),(0,0)", "(Infinity,1),(-1,-Infinity)"},
	"polygon":                     {"((0,0),(1,1),(2,0))"},
	"line":                        {"{1,-1,0}"},
	"circle":                      {"<(1,2),3.5>"},
	"cidr":                        {"10.0.0.0/8", "2001:db8::/32", "::/0"},
	"inet":                        {"10.0.0.1", "10.0.0.1/8", "::1", "::ffff:1.2.3.4/128"},
	"real":                        {"0", "-0", "0.1", "1e20", "1e-20", "3.4028235e38", "1.1754944e-38", "1e-45", "NaN", "Infinity", "-Infinity", "16777217"},
	"double precision":            {"0", "-0", "0.1", "1e15", "1e20", "1e-5", "0.0001", "1.7976931348623157e308", "5e-324", "NaN", "Infinity", "-Infinity", "123456789012345680"},
	"macaddr8":                    {"08:00:2b:01:02:03:04:05"},
	"macaddr":                     {"08:00:2b:01:02:03"},
	"money":                       {"0", "1234.5", "-1234567.89", "-92233720368547758.08", "92233720368547758.07"},
	"aclitem":                     {"sql:makeaclitem(10, 10, 'SELECT', true)", "sql:makeaclitem(0, 10, 'SELECT', false)"},
	"bpchar":                      {"", "a ", " a", "NULL", "  "},
	"character varying":           {"", "a ", `"`, "NULL"},
	"date":                        {"2026-11-23", "0001-01-01", "0044-03-15 BC", "4713-01-01 BC", "5874897-12-31", "infinity", "-infinity"},
	"time without time zone":      {"00:00:00", "24:00:00", "12:34:56.789", "23:59:59.999999"},
	"timestamp without time zone": stamps(""),
	"timestamp with time zone":    append(stamps("+00"), "2026-11-23 08:07:00+05:30", "2026-11-23 08:07:00-15:59:59"),
	"interval": {"0", "1 year 2 mons 3 days 04:05:06.789", "-1 year +2 days -00:00:01", "1 mon -1 day", "@ 1 min ago", "178000000 years",
		"-178000000 years", "00:00:00.000001", "100000:00:00"},
	"time with time zone": {"00:00:00+00", "24:00:00-15:59:59", "12:34:56.789+05:30"},
	`"bit"`:               {"", "0", "10101"},
	"bit varying":         {"", "1", strings.Repeat("10", 100)},
	"numeric": {"0", "0.000", "1.10", "-1.10", "NaN", "Infinity", "-Infinity", "1e-20", "1e500", "123456789012345678901234567890.0123456789",
		"0." + strings.Repeat("0", 300) + "1"},
	"refcursor":      {"", "<unnamed portal 1>", `a"b`},
	"regprocedure":   {"sum(bigint)", "-", `pi()`},
	"regoper":        {"||/", "|/", "0"},
	"regoperator":    {"+(integer,integer)", "0", "!~~(text,text)"},
	"regclass":       {"pg_class", `public."Odd, ""Name"`, "-", "99999999"},
	"regtype":        {"integer", "timestamp with time zone", "text[]", `public."Mood, Now"`, "-"},
	"uuid":           {"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"},
	"txid_snapshot":  {"10:20:10,14,15", "1:1:"},
	"pg_lsn":         {"0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"},
	"tsvector":       {"", "a fat cat", "'a b':1A,2B 'it''s':3 'x\\y':4", "NULL"},
	"tsquery":        {"", "fat & (rat | !cat)", "'a b':*A <-> c", "NULL"},
	"regconfig":      {"english", "99999999"},
	"regdictionary":  {"simple"},
	"int4range":      {"empty", "[1,5)", "(,)", "[1,)", "(,5)"},
	"numrange":       {"empty", "[1.10,2.20]", "(,NaN)", "[-Infinity,Infinity]"},
	"tsrange":        {"empty", "[2026-11-23 08:07:00,infinity)", "(,)", "[\"0044-03-15 12:00:00 BC\",)"},
	"tstzrange":      {"empty", "[2026-11-23 08:07:00+00,2027-01-01 00:00:00+00)", "(-infinity,)"},
	"daterange":      {"empty", "[2026-11-23,2026-11-30)", "[-infinity,infinity]"},
	"int8range":      {"empty", "[1,9223372036854775807)"},
	"jsonpath":       {"$", `$."a b"[*] ? (@.x > 1 && @.y like_regex "^\"q")`, `strict $.a.size()`},
	"regnamespace":   {"pg_catalog", `"Odd Space"`},
	"regrole":        {"sql:10::oid::regrole", "99999999"},
	"regcollation":   {`"C"`, "ucs_basic"},
	"int4multirange": {"{}", "{[1,5),[7,9)}", "{(,)}"},
	"nummultirange":  {"{}", "{[1.10,2.20],(3,)}"},
	"tsmultirange":   {"{}", "{[2026-11-23 08:07:00,infinity)}"},
	"tstzmultirange": {"{}", "{[2026-11-23 08:07:00+00,2027-01-01 00:00:00+00),(2028-01-01 00:00:00+00,)}"},
	"datemultirange": {"{}", "{[2026-11-23,2026-11-30)}"},
	"int8multirange": {"{}", "{[1,2),[9223372036854775806,)}"},
	"pg_snapshot":    {"10:20:10,14,15", "1:1:"},
	"xid8":           {"0", "18446744073709551615"},
}

// noSamples are the types of which SQL can make no value: they live inside indexes.
var noSamples = map[string]bool{"gtsvector": true, "pg_brin_bloom_summary": true, "pg_brin_minmax_multi_summary": true}

// noInput are the types whose values SQL can read but not put in.
var noInput = map[string]bool{"pg_node_tree": true, "pg_ndistinct": true, "pg_dependencies": true, "pg_mcv_list": true}

func documents() []string {
	return []string{`null`, ` null`, "null\n", `{}`, `{ }`, `[]`, `[ ]`, `0`, `-0`, `1.0`, `1e400`, `1E+2`, `"x"`, `""`, `"null"`, ` "x" `,
		`true`, `{"a": 1, "a": 2}`, `{"b":1,"a":{"c":[1,2,{"d":null}]}}`, " {\n\t\"a\" : [ 1 , 2 ]\r\n} ", `{"$json":null}`,
		`{"$json": 1, "longer": 2}`, `{"longer": 2, "$json": 1}`, `{ "$json_text" : " x" }`, `{"$ref": "#/a", "$id": 1}`,
		`{"\u0024json": 1}`, `{"": 1}`, `{"\"": "\\\u00e9\ud83d\ude00\t"}`, `[[[[]]]]`, `"\u2028"`, `{"NULL": "{a,b}"}`,
		strings.Repeat("[", 1000) + strings.Repeat("]", 1000)}
}

func stamps(zone string) []string {
	all := []string{"infinity", "-infinity"}
	for _, s := range []string{"2026-11-23 08:07:00", "2026-11-23 08:07:00.1", "2026-11-23 08:07:00.123456", "0001-01-01 00:00:00",
		"9999-12-31 23:59:59.999999", "10000-01-01 00:00:00", "294276-12-31 23:59:59.999999", "2000-02-29 00:00:00"} {
		all = append(all, s+zone)
	}
	for _, s := range []string{"0001-12-31 23:59:59.5", "0044-03-15 12:00:00", "4713-01-01 00:00:00"} {
		all = append(all, s+zone+" BC")
	}
	return all
}

// TestPostgresValuesComeBack asks a real Postgres how it prints values of every type, and checks that the stored form is
// JSON, gives back the same bytes, and, read by Postgres, the same value.
func TestPostgresValuesComeBack(t *testing.T) {
	pg := openOracle(t)
	pg.run(`CREATE SCHEMA "Odd Space"`)
	pg.run(`CREATE TABLE public."Odd, ""Name" (a int DEFAULT 1 + 1, b int)`)
	pg.run(`CREATE TYPE public."Mood, Now" AS ENUM ('sad', 'NULL', 'a b', 'c"d', '')`)
	pg.run(`INSERT INTO public."Odd, ""Name" SELECT i % 7, i % 7 FROM generate_series(1, 1000) i`)
	pg.run(`CREATE STATISTICS public.correlated ON a, b FROM public."Odd, ""Name"`)
	pg.run(`ANALYZE public."Odd, ""Name"`)
	minor, _ := strconv.Atoi(string(pg.rows(`SHOW server_version_num`)[0][0]))

	for _, row := range pg.rows(`SELECT oid, format_type(oid, -1), typarray FROM pg_type
		WHERE oid < 10000 AND typtype IN ('b', 'r', 'm') AND (typcategory <> 'A' OR oid IN (22, 30)) ORDER BY oid`) {
		oid, name, array := row[0], string(row[1]), string(row[2])
		t.Run(name, func(t *testing.T) {
			pg := pg.on(t)
			list := samples[name]
			if len(list) == 0 && !noSamples[name] {
				t.Fatalf("no sample of type %s (oid %s)", name, oid)
			}
			if name == "interval" && minor >= 170000 {
				list = append(list[:len(list):len(list)], "infinity", "-infinity")
			}
			var values []string
			for _, s := range list {
				if expr, ok := strings.CutPrefix(s, "sql:"); ok {
					values = append(values, expr)
				} else {
					values = append(values, literal(s)+"::"+name)
				}
			}
			pg.checkAll(name, nil, values, !noInput[name])
			if array != "0" && len(values) > 0 {
				pg.checkArrays(name, nil, values)
			}
		})
	}
}

// TestPostgresTypesOfUsersComeBack does the same for types that the catalogue has to be asked about.
func TestPostgresTypesOfUsersComeBack(t *testing.T) {
	pg := openOracle(t)
	pg.run(`CREATE TYPE public.mood AS ENUM ('sad', 'NULL', 'a b', 'c"d\', '', ',')`)
	pg.run(`CREATE TYPE public.pair AS (a int, "B c" text, d text[])`)
	pg.run(`CREATE TYPE public.words AS RANGE (subtype = text, collation = "C")`)
	pg.run(`CREATE DOMAIN public.small AS int CHECK (value < 100)`)
	pg.run(`CREATE DOMAIN public.tags AS text[]`)
	pg.run(`CREATE DOMAIN public.doc AS json`)
	pg.run(`CREATE DOMAIN public.moment AS timestamptz(3)`)
	for _, c := range []struct {
		name   string
		t      eventlog.Type
		values []string
	}{
		{"public.mood", eventlog.Type{}, []string{`'sad'`, `'NULL'`, `'a b'`, `'c"d\'`, `''`, `','`}},
		{"public.pair", eventlog.Type{}, []string{`(1, 'x', '{a,"b c"}')`, `(NULL, '', NULL)`, `(-1, E'q"\\,() \n', '[2:3]={NULL,"NULL"}')`}},
		{"public.words", eventlog.Type{}, []string{`'empty'`, `'[a,b)'`, `'["","a\"b,c\\\\d"]'`, `'(,)'`}},
		{"public.small", eventlog.Type{Kind: eventlog.KindInt}, []string{`1`, `-1`}},
		{"public.tags", eventlog.Type{Array: true}, []string{`'{a,"b c",NULL}'`, `'{}'`, `'[2:2]={x}'`, `'{{a},{","}}'`}},
		{"public.doc", eventlog.Type{Kind: eventlog.KindJSON}, []string{`'null'`, `' {"$a": 1}'`, `'{"$a": 1}'`}},
		{"public.moment", eventlog.Type{Kind: eventlog.KindTimestampTZ}, []string{`'2026-11-23 08:07:00.123456+02'`, `'infinity'`}},
		{"numeric(10,2)", eventlog.Type{}, []string{`1.1`, `'NaN'`, `-0.001`}},
		{"character(5)", eventlog.Type{}, []string{`''`, `'a'`, `' a b'`}},
		{"bit(5)", eventlog.Type{}, []string{`'10101'`}},
		{"timestamp(0)", eventlog.Type{Kind: eventlog.KindTimestamp}, []string{`'2026-11-23 08:07:00.6'`}},
		{"interval day to second(2)", eventlog.Type{}, []string{`'1 day 02:03:04.567'`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			pg := pg.on(t)
			c.t.Name = c.name
			var values []string
			for _, v := range c.values {
				values = append(values, v+"::"+c.name)
			}
			pg.checkAll(c.name, &c.t, values, true)
			if !c.t.Array {
				array := c.t
				array.Array = true
				pg.checkArrays(c.name, &array, values)
			}
		})
	}
	t.Run("arrays of a domain over an array", func(t *testing.T) {
		// An array of a domain is an array of its own even where the domain is one: its elements are literals in text.
		pg := pg.on(t)
		pg.check(`'{"{a,\"b c\"}",NULL,"{}"}'::public.tags[]`, "public.tags[]", &eventlog.Type{Array: true}, true)
	})
}

func TestPostgresNumbersComeBack(t *testing.T) {
	pg := openOracle(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	var doubles, singles, stamps []string
	for range 2000 {
		doubles = append(doubles, strconv.FormatFloat(math.Float64frombits(r.Uint64()), 'g', -1, 64))
		singles = append(singles, strconv.FormatFloat(float64(math.Float32frombits(r.Uint32())), 'g', -1, 32))
		stamps = append(stamps, strconv.FormatInt(r.Int64N(9.1e18)-2e17, 10))
	}
	list := func(s []string) string {
		return strings.ReplaceAll(literal("{"+strings.Join(s, ",")+"}"), "Inf", "Infinity")
	}
	for _, c := range []struct{ name, array string }{
		{"float8", list(doubles) + "::float8[]"},
		{"float4", list(singles) + "::float4[]"},
		{"timestamp", "(SELECT array_agg('epoch'::timestamp + make_interval(secs => (s / 1e6)::float8)) FROM unnest(" + list(stamps) + "::int8[]) s)"},
		{"timestamptz", "(SELECT array_agg('epoch'::timestamptz + make_interval(secs => (s / 1e6)::float8)) FROM unnest(" + list(stamps) + "::int8[]) s)"},
	} {
		pg := pg.on(t)
		pg.check(c.array, c.name+"[]", nil, true)
		for _, row := range pg.rows("SELECT unnest(" + c.array + ")") {
			pg.comesBack(c.name, pg.lastType, row[0])
		}
	}
}

func TestPostgresTextOfEveryCodePointComesBack(t *testing.T) {
	pg := openOracle(t)
	const step = 1 << 14
	for from := rune(0); from <= utf8.MaxRune; from += step {
		var s []byte
		for r := from; r < from+step; r++ {
			if r != 0 && utf8.ValidRune(r) {
				s = utf8.AppendRune(s, r)
			}
		}
		value := literal(string(s)) + "::text"
		pg.check(value, "text", nil, true)
		pg.check("string_to_array("+value+", NULL)", "text[]", nil, true)
		if from == 0 {
			pg.check("to_json("+value+")", "json", nil, true)
			pg.check("ARRAY[to_json("+value+")]", "json[]", nil, true)
			pg.check("to_jsonb(string_to_array("+value+", NULL))", "jsonb", nil, true)
		}
	}
}

func TestTypeKindKnowsTheTypesOfPostgres(t *testing.T) {
	pg := openOracle(t)
	known := 0
	for _, row := range pg.rows(`SELECT t.oid, format_type(t.oid, -1), e.typdelim, t.typcategory = 'A' AND t.typlen = -1
			AND t.typelem <> 0 AND t.typsubscript = 'array_subscript_handler'::regproc AND t.oid NOT IN (22, 30) AS isarray
		FROM pg_type t LEFT JOIN pg_type e ON e.oid = t.typelem LEFT JOIN pg_class c ON c.oid IN (t.typrelid, e.typrelid) AND c.oid <> 0
		WHERE t.oid < 10000 AND t.typtype IN ('b', 'r', 'm') AND c.oid IS NULL
		AND e.typtype IS DISTINCT FROM 'p' ORDER BY t.oid`) {
		oid, _ := strconv.Atoi(string(row[0]))
		got, ok := eventlog.TypeKind(uint32(oid))
		if !ok {
			t.Errorf("type %d, %s, is not known", oid, row[1])
			continue
		}
		known++
		delim := byte(',')
		if got.Delim != 0 {
			delim = got.Delim
		}
		if got.Name != string(row[1]) || got.Array != (string(row[3]) == "t") || got.Array && delim != row[2][0] {
			t.Errorf("TypeKind(%d) = %+v, but Postgres says name %s, array %s, delimiter %s", oid, got, row[1], row[3], row[2])
		}
	}
	for oid := range uint32(100_000) {
		if _, ok := eventlog.TypeKind(oid); ok {
			known--
		}
	}
	if known != 0 {
		t.Errorf("TypeKind knows %d types that Postgres has not", -known)
	}
}

// oracle is a session under SessionSettings that gives values as Postgres prints them.
type oracle struct {
	*testing.T
	conn     *pgconn.PgConn
	lastType *eventlog.Type // of the last check
	checked  *int           // how many values have been put to the test
}

func openOracle(t *testing.T) *oracle {
	server := pgservertest.ForTest(t, pgserver.Config{})
	cfg, err := pgconn.ParseConfig(server.SocketURL(server.NewDatabase(t)))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range eventlog.SessionSettings {
		cfg.RuntimeParams[name] = value
	}
	conn, err := pgconn.ConnectConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.WithoutCancel(t.Context())) })
	checked := new(int)
	t.Cleanup(func() { t.Logf("%d values of Postgres %s", *checked, conn.ParameterStatus("server_version")) })
	return &oracle{T: t, conn: conn, checked: checked}
}

// on is the same session for a subtest.
func (pg *oracle) on(t *testing.T) *oracle { return &oracle{T: t, conn: pg.conn, checked: pg.checked} }

func (pg *oracle) run(sql string) {
	pg.Helper()
	if err := pg.conn.Exec(pg.Context(), sql).Close(); err != nil {
		pg.Fatalf("%.200s: %v", sql, err)
	}
}

func (pg *oracle) rows(sql string) [][][]byte {
	pg.Helper()
	results, err := pg.conn.Exec(pg.Context(), sql).ReadAll()
	if err != nil {
		pg.Fatalf("%.200s: %v", sql, err)
	}
	pg.lastType = nil
	if t, ok := eventlog.TypeKind(results[0].FieldDescriptions[0].DataTypeOID); ok {
		pg.lastType = &t
	}
	return results[0].Rows
}

// checkAll checks each value by itself.
func (pg *oracle) checkAll(name string, t *eventlog.Type, values []string, input bool) {
	pg.Helper()
	for _, v := range values {
		pg.check(v, name, t, input)
	}
	pg.check("NULL::"+name, name, t, input)
}

// checkArrays checks the values as elements, in several shapes.
func (pg *oracle) checkArrays(name string, t *eventlog.Type, values []string) {
	pg.Helper()
	first, last := values[0], values[len(values)-1]
	arrays := []string{
		"'{}'", "ARRAY[" + strings.Join(values, ",") + ",NULL]", "ARRAY[NULL]",
		"ARRAY[[" + strings.Join(values, ",") + "],[" + strings.Join(values, ",") + "]]",
		"ARRAY[[[" + first + ",NULL]],[[" + last + "," + first + "]]]",
		"ARRAY[[[[[[" + last + "]]]]]]",
		"array_fill(" + first + ", ARRAY[2], ARRAY[0])",
		"array_fill(" + last + ", ARRAY[1,2], ARRAY[-3,5])",
		"array_fill(" + last + ", ARRAY[1,2,1], ARRAY[1,1,2])",
	}
	for _, v := range values {
		arrays = append(arrays, "ARRAY["+v+"]")
	}
	for _, a := range arrays {
		pg.check(a+"::"+name+"[]", name+"[]", t, true)
	}
}

// check asks Postgres for the value of a SQL expression of the named type and puts it to the test. A nil t is looked up
// as a built-in type; input says that Postgres can read values of this type.
func (pg *oracle) check(expr, name string, t *eventlog.Type, input bool) {
	pg.Helper()
	value := pg.rows("SELECT " + expr)[0][0]
	if t == nil {
		if t = pg.lastType; t == nil {
			pg.Fatalf("type %s is not known", name)
		}
	}
	if value == nil {
		return
	}
	j := pg.comesBack(expr, t, value)
	if !input || !utf8.Valid(value) {
		return // the byte beyond ASCII of "char", which servers before 16 print but do not read
	}
	if again := pg.cast(string(value), name); !bytes.Equal(again, value) {
		pg.Errorf("%.200s: the text %q cast back prints %q", expr, value, again)
	}

	// Stored in a jsonb column and printed by it.
	if strings.HasPrefix(name, "json") && (bytes.Contains(value, []byte("1e400")) || bytes.Contains(value, []byte(`u0000`))) {
		return // jsonb prints all the digits, and refuses NUL
	}
	reprinted, err := pg.castErr(string(j), "jsonb")
	if err != nil {
		pg.Errorf("%.200s: jsonb refuses %.200s: %v", expr, j, err)
		return
	}
	text, null, err := eventlog.AppendText(nil, t, reprinted)
	if err != nil || null {
		pg.Errorf("%.200s: jsonb made it %.200s, which gives error %v, null %v", expr, reprinted, err, null)
	} else if t.Kind == eventlog.KindFloat {
		if again := pg.cast(string(text), name); !bytes.Equal(bytes.ReplaceAll(again, []byte("-0"), []byte("0")), bytes.ReplaceAll(value, []byte("-0"), []byte("0"))) {
			pg.Errorf("%.200s: jsonb made it %.200s, which gives %.200s", expr, reprinted, again)
		}
	} else if (t.Kind != eventlog.KindJSON || t.Array || strings.HasPrefix(name, "jsonb")) && !bytes.Equal(text, value) {
		pg.Errorf("%.200s: jsonb made it %.200s, which gives %.200s", expr, reprinted, text)
	}
}

// comesBack is the law. It gives the stored form.
func (pg *oracle) comesBack(expr string, t *eventlog.Type, value []byte) []byte {
	pg.Helper()
	*pg.checked++
	j := eventlog.AppendJSON(nil, t, value)
	if !json.Valid(j) {
		pg.Fatalf("%.200s: %.200q gives %.200s, which is no JSON", expr, value, j)
	}
	back, null, err := eventlog.AppendText(nil, t, j)
	if err != nil || null || !bytes.Equal(back, value) {
		pg.Fatalf("%.200s: %.200q became %.200s, came back as %.200q, null %v, error %v", expr, value, j, back, null, err)
	}
	if odd := bytes.HasPrefix(value, []byte("[")); t.Array && (j[0] == '"') != odd {
		pg.Errorf("%.200s: the array %.200q is stored as %.200s", expr, value, j)
	}
	return j
}

func (pg *oracle) cast(text, name string) []byte {
	pg.Helper()
	value, err := pg.castErr(text, name)
	if err != nil {
		pg.Errorf("cast %.200q to %s: %v", text, name, err)
	}
	return value
}

func (pg *oracle) castErr(text, name string) ([]byte, error) {
	r := pg.conn.ExecParams(pg.Context(), fmt.Sprintf("SELECT $1::%s", name), [][]byte{[]byte(text)}, nil, nil, nil).Read()
	if r.Err != nil {
		return nil, r.Err
	}
	return r.Rows[0][0], nil
}

func literal(s string) string {
	return " E'" + strings.NewReplacer(`\`, `\\`, `'`, `''`).Replace(s) + "'"
}
