package e2e

import (
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
)

// gen makes an input text for a value.
type gen func(r *rand.Rand) string

func oneOf(list ...string) gen { return func(r *rand.Rand) string { return list[r.IntN(len(list))] } }

func either(a, b gen) gen {
	return func(r *rand.Rand) string {
		if r.IntN(2) == 0 {
			return a(r)
		}
		return b(r)
	}
}

func intBelow(n int64) gen {
	return func(r *rand.Rand) string { return strconv.FormatInt(r.Int64N(n), 10) }
}

var oddText = oneOf("", " ", "a", "NULL", "null", `"`, `\`, `\\"`, "{", "}", "{}", ",", ";", "a,b", `a\,b`, "\t", "\n", "\r\n", "\x01\x02\x1f\x7f", "a b", "\u00a0", "\u2028",
	"\ufeff", "é", "e\u0301", "漢字", "😀", "\U0010ffff", "2026-11-23T08:07:00", "[2:3]={1,2}", `{"a": 1}`, `{"$json":null}`, "$", "1", "true", "'", "''", "$$", "--", "\\N", "\\.")

// words makes some text of random length; what is random does not compress.
func words(from, to int) gen {
	return func(r *rand.Rand) string {
		n := from + r.IntN(to-from+1)
		b := make([]byte, (n+1)/2)
		for i := range b {
			b[i] = byte(r.IntN(256))
		}
		return hex.EncodeToString(b)[:n]
	}
}

// zeros makes text that compresses well.
func zeros(from, to int) gen {
	return func(r *rand.Rand) string {
		return strings.Repeat(string(rune('a'+r.IntN(26))), from+r.IntN(to-from+1))
	}
}

// wide makes text around every limit that matters: inline, the bound of what the cache keeps, TOAST.
var wide = func(r *rand.Rand) string {
	switch r.IntN(12) {
	case 0, 1:
		return words(0, 40)(r)
	case 2, 3:
		return words(1000, 1050)(r)
	case 4, 5:
		return words(1200, 1900)(r)
	case 6, 7:
		return words(2000, 5000)(r)
	case 8:
		return words(8000, 40000)(r)
	case 9:
		return zeros(100_000, 300_000)(r)
	case 10:
		return zeros(1100, 3000)(r)
	}
	return oddText(r)
}

var documents = oneOf(`null`, ` null`, "null\n", `{}`, `{ }`, `[]`, `0`, `-0`, `1.0`, `1e400`, `1E+2`, `"x"`, `""`, `"null"`, ` "x" `, `true`, `{"a": 1, "a": 2}`,
	`{"b":1,"a":{"c":[1,2,{"d":null}]}}`, " {\n\t\"a\" : [ 1 , 2 ]\r\n} ", `{"$json":null}`, `{"$json": 1, "longer": 2}`, `{"longer": 2, "$json": 1}`,
	`{ "$json_text" : " x" }`, `{"$ref": "#/a", "$id": 1}`, `{"\u0024json": 1}`, `{"": 1}`, `{"\"": "\\\u00e9\ud83d\ude00\t"}`, `"\u2028"`, `{"NULL": "{a,b}"}`,
	strings.Repeat("[", 400)+strings.Repeat("]", 400))

// typed are the built-in types, with values for each; an array of each is made of the same values.
var typed = []struct {
	name string
	gen  gen
	no   bool // there is no array of it
}{
	{"boolean", oneOf("t", "f"), false},
	{"bytea", oneOf(`\x`, `\x00`, `\x0102ff`, `\x5c5c22272c7b7d`), false},
	{`"char"`, oneOf("a", "", " ", `"`, ",", "{"), false},
	{"name", oneOf("x", "", "a b", `"q"`, "NULL", strings.Repeat("é", 31)), false},
	{"bigint", oneOf("0", "-1", "9223372036854775807", "-9223372036854775808"), false},
	{"smallint", oneOf("0", "32767", "-32768"), false},
	{"int2vector", oneOf("", "1", "1 -2 3"), false},
	{"integer", either(oneOf("0", "-1", "2147483647", "-2147483648"), intBelow(100)), false},
	{"regproc", oneOf("pi", "-", "12345678"), false},
	{"text", oddText, false},
	{"oid", oneOf("0", "1", "4294967295"), false},
	{"tid", oneOf("(0,1)", "(4294967295,65535)"), false},
	{"xid", oneOf("0", "4294967295"), false},
	{"cid", oneOf("0", "4294967295"), false},
	{"oidvector", oneOf("", "1 4294967295"), false},
	{"json", either(documents, oneOf(`"a\u0000"`, `{"\u0000": "\ud800"}`)), false},
	{"jsonb", documents, false},
	{"xml", oneOf("", "a", "<a/>", "<a b=\"c\">\n&lt; {x},\\ </a>", "<?xml version=\"1.0\"?><a/>", "<!-- c --><a/>"), false},
	{"point", oneOf("(1,2)", "(-0,1e+300)", "(NaN,Infinity)", "(0.1,1e-300)"), false},
	{"lseg", oneOf("[(1,2),(3,4.5)]"), false},
	{"path", oneOf("[(1,2),(3,4)]", "((1,2),(3,4))"), false},
	{"box", oneOf("(3,4),(1,2)", "(0,0),(0,0)", "(Infinity,1),(-1,-Infinity)"), false},
	{"polygon", oneOf("((0,0),(1,1),(2,0))"), false},
	{"line", oneOf("{1,-1,0}"), false},
	{"circle", oneOf("<(1,2),3.5>"), false},
	{"cidr", oneOf("10.0.0.0/8", "2001:db8::/32", "::/0"), false},
	{"inet", oneOf("10.0.0.1", "10.0.0.1/8", "::1", "::ffff:1.2.3.4/128"), false},
	{"real", oneOf("0", "-0", "0.1", "1e20", "1e-20", "3.4028235e38", "1e-45", "NaN", "Infinity", "-Infinity", "16777217"), false},
	{"double precision", oneOf("0", "-0", "0.1", "1e15", "1e20", "1e-5", "1.7976931348623157e308", "5e-324", "NaN", "Infinity", "-Infinity", "123456789012345680"), false},
	{"macaddr8", oneOf("08:00:2b:01:02:03:04:05"), false},
	{"macaddr", oneOf("08:00:2b:01:02:03"), false},
	{"money", oneOf("0", "1234.5", "-1234567.89", "-92233720368547758.08", "92233720368547758.07"), false},
	{"aclitem", oneOf("=r/postgres", "postgres=arw/postgres"), false},
	{"bpchar", oneOf("", "a ", " a", "NULL", "  "), false},
	{"character varying", oneOf("", "a ", `"`, "NULL"), false},
	{"date", oneOf("2026-11-23", "0001-01-01", "0044-03-15 BC", "4713-01-01 BC", "5874897-12-31", "infinity", "-infinity"), false},
	{"time without time zone", oneOf("00:00:00", "24:00:00", "12:34:56.789"), false},
	{"timestamp without time zone", stamps(""), false},
	{"timestamp with time zone", either(stamps("+00"), oneOf("2026-11-23 08:07:00+05:30", "2026-11-23 08:07:00-15:59:59")), false},
	{"interval", oneOf("0", "1 year 2 mons 3 days 04:05:06.789", "-1 year +2 days -00:00:01", "1 mon -1 day", "178000000 years", "00:00:00.000001", "100000:00:00"), false},
	{"time with time zone", oneOf("00:00:00+00", "24:00:00-15:59:59", "12:34:56.789+05:30"), false},
	{`"bit"`, oneOf("0", "10101"), false},
	{"bit varying", oneOf("", "1", strings.Repeat("10", 100)), false},
	{"numeric", oneOf("0", "0.000", "1.10", "-1.10", "NaN", "Infinity", "-Infinity", "1e-20", "1e500", "123456789012345678901234567890.0123456789"), false},
	{"refcursor", oneOf("", "<unnamed portal 1>", `a"b`), false},
	{"regprocedure", oneOf("sum(bigint)", "-", "pi()"), false},
	{"regoper", oneOf("||/", "|/", "0"), false},
	{"regoperator", oneOf("+(integer,integer)", "0", "!~~(text,text)"), false},
	{"regclass", oneOf("pg_class", "-", "99999999"), false},
	{"regtype", oneOf("integer", "timestamp with time zone", "text[]", "-"), false},
	{"uuid", func(r *rand.Rand) string {
		return fmt.Sprintf("%08x-0000-4000-8000-%012x", r.Uint32(), r.Uint64()>>16)
	}, false},
	{"txid_snapshot", oneOf("10:20:10,14,15", "1:1:"), false},
	{"pg_lsn", oneOf("0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"), false},
	{"tsvector", oneOf("", "a fat cat", "'a b':1A,2B 'it''s':3 'x\\y':4", "NULL"), false},
	{"tsquery", oneOf("", "fat & (rat | !cat)", "'a b':*A <-> c", "NULL"), false},
	{"regconfig", oneOf("english", "99999999"), false},
	{"regdictionary", oneOf("simple"), false},
	{"int4range", oneOf("empty", "[1,5)", "(,)", "[1,)", "(,5)"), false},
	{"numrange", oneOf("empty", "[1.10,2.20]", "(,NaN)", "[-Infinity,Infinity]"), false},
	{"tsrange", oneOf("empty", "[2026-11-23 08:07:00,infinity)", "(,)", "[\"0044-03-15 12:00:00 BC\",)"), false},
	{"tstzrange", oneOf("empty", "[2026-11-23 08:07:00+00,2027-01-01 00:00:00+00)", "(-infinity,)"), false},
	{"daterange", oneOf("empty", "[2026-11-23,2026-11-30)", "[-infinity,infinity]"), false},
	{"int8range", oneOf("empty", "[1,9223372036854775807)"), false},
	{"jsonpath", oneOf("$", `$."a b"[*] ? (@.x > 1 && @.y like_regex "^\"q")`, `strict $.a.size()`), false},
	{"regnamespace", oneOf("pg_catalog"), false},
	{"regrole", oneOf("postgres", "99999999"), false},
	{"regcollation", oneOf(`"C"`, "ucs_basic"), false},
	{"int4multirange", oneOf("{}", "{[1,5),[7,9)}", "{(,)}"), false},
	{"nummultirange", oneOf("{}", "{[1.10,2.20],(3,)}"), false},
	{"tsmultirange", oneOf("{}", "{[2026-11-23 08:07:00,infinity)}"), false},
	{"tstzmultirange", oneOf("{}", "{[2026-11-23 08:07:00+00,2027-01-01 00:00:00+00),(2028-01-01 00:00:00+00,)}"), false},
	{"datemultirange", oneOf("{}", "{[2026-11-23,2026-11-30)}"), false},
	{"int8multirange", oneOf("{}", "{[1,2),[9223372036854775806,)}"), false},
	{"pg_snapshot", oneOf("10:20:10,14,15", "1:1:"), false},
	{"xid8", oneOf("0", "18446744073709551615"), false},
	// The types of the oracle's own schema.
	{"public.mood", oneOf("sad", "NULL", "a b", `c"d\`, ","), false},
	{"public.pair", oneOf(`(1,x,"{a,""b c""}")`, `(,"",)`, `(-1,"q""\\,() ","[2:3]={NULL,""NULL""}")`), false},
	{"public.words", oneOf("empty", "[a,b)", `["","a""b,c\\d"]`, "(,)"), false},
	{"public.small", oneOf("1", "-1", "99"), false},
	{"public.tags", oneOf(`{a,"b c",NULL}`, `{}`, `[2:2]={x}`, `{{a},{","}}`), true},
	{"public.doc", documents, false},
	{"public.moment", oneOf("2026-11-23 08:07:00.123456+02", "infinity"), false},
	{"numeric(10,2)", oneOf("1.1", "NaN", "-0.001"), false},
	{"character(5)", oneOf("", "a", " a b"), false},
	{"bit(5)", oneOf("10101", "00000"), false},
	{"timestamp(0)", oneOf("2026-11-23 08:07:00.6"), false},
	{"interval day to second(2)", oneOf("1 day 02:03:04.567"), false},
}

func stamps(zone string) gen {
	all := []string{"infinity", "-infinity"}
	for _, s := range []string{"2026-11-23 08:07:00", "2026-11-23 08:07:00.1", "2026-11-23 08:07:00.123456", "0001-01-01 00:00:00", "9999-12-31 23:59:59.999999",
		"10000-01-01 00:00:00", "294276-12-31 23:59:59.999999"} {
		all = append(all, s+zone)
	}
	for _, s := range []string{"0001-12-31 23:59:59.5", "0044-03-15 12:00:00", "4713-01-01 00:00:00"} {
		all = append(all, s+zone+" BC")
	}
	return oneOf(all...)
}

// arrayOf makes array literals: of one dimension or two, with NULLs, with odd bounds.
func arrayOf(typ string, elem gen) gen {
	delim := ","
	if typ == "box" {
		delim = ";"
	}
	return func(r *rand.Rand) string {
		row := func(n int) string {
			var parts []string
			for range n {
				if r.IntN(6) == 0 {
					parts = append(parts, "NULL")
				} else {
					parts = append(parts, `"`+strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(elem(r))+`"`)
				}
			}
			return "{" + strings.Join(parts, delim) + "}"
		}
		switch r.IntN(6) {
		case 0:
			return "{}"
		case 1:
			return "[2:3]=" + row(2)
		case 2:
			n := 1 + r.IntN(2)
			return "{" + row(n) + delim + row(n) + "}"
		}
		return row(1 + r.IntN(3))
	}
}
