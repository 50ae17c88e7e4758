package eventlog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

var (
	textType   = &Type{Name: "text"}
	intType    = &Type{Name: "bigint", Kind: KindInt}
	floatType  = &Type{Name: "double precision", Kind: KindFloat}
	boolType   = &Type{Name: "boolean", Kind: KindBool}
	jsonType   = &Type{Name: "json", Kind: KindJSON}
	stampType  = &Type{Name: "timestamp", Kind: KindTimestamp}
	zonedType  = &Type{Name: "timestamptz", Kind: KindTimestampTZ}
	byteaType  = &Type{Name: "bytea", Kind: KindBytea}
	scalars    = []*Type{textType, intType, floatType, boolType, jsonType, stampType, zonedType, byteaType}
	boxesType  = &Type{Name: "box[]", Array: true, Delim: ';'}
	docsType   = arrayOf(jsonType)
	textsType  = arrayOf(textType)
	intsType   = arrayOf(intType)
	stampsType = arrayOf(stampType)
)

func arrayOf(t *Type) *Type { return &Type{Name: t.Name + "[]", Kind: t.Kind, Array: true} }

func TestStoredForm(t *testing.T) {
	long := strings.Repeat("x", 1000)
	for _, c := range []struct {
		t          *Type
		text, json string
	}{
		{intType, "0", `0`},
		{intType, "-9223372036854775808", `-9223372036854775808`},
		{intType, "007", `"007"`}, // not what Postgres prints for an integer
		{intType, "-", `"-"`},
		{intType, "", `""`},

		{floatType, "1e+20", `1e+20`},
		{floatType, "-0", `-0`},
		{floatType, "0.1", `0.1`},
		{floatType, "2.2250738585072014e-308", `2.2250738585072014e-308`},
		{floatType, "NaN", `"NaN"`},
		{floatType, "Infinity", `"Infinity"`},
		{floatType, "-Infinity", `"-Infinity"`},
		{floatType, "", `""`},
		{floatType, "1.", `"1."`},

		{boolType, "t", `true`},
		{boolType, "f", `false`},
		{boolType, "true", `"true"`},

		{textType, "", `""`},
		{textType, "null", `"null"`},
		{textType, "1.10", `"1.10"`},
		{textType, "a\"b\\c/d<e>&", `"a\"b\\c/d<e>&"`},
		{textType, "\x01\b\t\n\v\f\r\x1f\x7f", `"\u0001\b\t\n\u000b\f\r\u001f` + "\x7f\""},
		{textType, "ü€😀\u2028\ufffd\U0010ffff", `"` + "ü€😀\u2028\ufffd\U0010ffff" + `"`},
		{textType, "bad \xff\xc3 utf-8", "\"bad \xff\xc3 utf-8\""},
		{textType, long + "\n" + long + `"`, `"` + long + `\n` + long + `\""`},

		{stampType, "2026-11-23 08:07:00.123", `"2026-11-23T08:07:00.123"`},
		{stampType, "2026-11-23 08:07:00", `"2026-11-23T08:07:00"`},
		{stampType, "12026-11-23 08:07:00", `"12026-11-23 08:07:00"`},
		{stampType, "0044-03-15 12:00:00 BC", `"0044-03-15 12:00:00 BC"`},
		{stampType, "2026-11-23 08:07:00.", `"2026-11-23 08:07:00."`},
		{stampType, "infinity", `"infinity"`},
		{stampType, "2026-11-23 08:07:00+00", `"2026-11-23 08:07:00+00"`},
		{stampType, "2026-11-23T08:07:00+00", `"2026-11-23T08:07:00+00"`},
		{zonedType, "2026-11-23 08:07:00.1+00", `"2026-11-23T08:07:00.1Z"`},
		{zonedType, "2026-11-23 08:07:00+00", `"2026-11-23T08:07:00Z"`},
		{zonedType, "2026-11-23 08:07:00+02", `"2026-11-23 08:07:00+02"`},
		{zonedType, "2026-11-23 08:07:00", `"2026-11-23 08:07:00"`},
		{zonedType, "0044-03-15 12:00:00+00 BC", `"0044-03-15 12:00:00+00 BC"`},
		{zonedType, "294276-12-31 23:59:59.999999+00", `"294276-12-31 23:59:59.999999+00"`},
		{zonedType, "-infinity", `"-infinity"`},

		{byteaType, `\x`, `"\\x"`},
		{byteaType, `\x00ff`, `"\\x00ff"`},

		{jsonType, `{"a": 1, "a": 1.0}`, `{"a": 1, "a": 1.0}`},
		{jsonType, `"x"`, `"x"`},
		{jsonType, `[]`, `[]`},
		{jsonType, `null`, `{"$json":null}`},
		{jsonType, ` null`, `{"$json_text":" null"}`},
		{jsonType, "\n[ 1 ]\t", `{"$json_text":"\n[ 1 ]\t"}`},
		{jsonType, "[1]\n", `{"$json_text":"[1]\n"}`},
		{jsonType, `{}`, `{}`},
		{jsonType, `{ }`, `{ }`},
		{jsonType, `{"a": 1, "$json": 2}`, `{"a": 1, "$json": 2}`},
		{jsonType, `{"$json":null}`, `{"$json":{"$json":null}}`},
		{jsonType, `{"$json_text":"x"}`, `{"$json":{"$json_text":"x"}}`},
		{jsonType, `{ "$ref": "#/a", "b": 1 }`, `{"$json":{ "$ref": "#/a", "b": 1 }}`},
		{jsonType, `{"\u0024json": 1}`, `{"$json":{"\u0024json": 1}}`},
		{jsonType, `{"\u0025json": 1}`, `{"\u0025json": 1}`},
		{jsonType, `"\ud800"`, `"\ud800"`},
		{jsonType, ``, `{"$json_text":""}`},

		{intsType, `{}`, `[]`},
		{intsType, `{1,-2,NULL}`, `[1,-2,null]`},
		{intsType, `{{1,2},{3,4}}`, `[[1,2],[3,4]]`},
		{intsType, `[2:3]={1,2}`, `"[2:3]={1,2}"`},
		{intsType, `[0:0][1:2]={{1,2}}`, `"[0:0][1:2]={{1,2}}"`},
		{intsType, `{{{{{{1}}}}}}`, `[[[[[[1]]]]]]`},
		{arrayOf(floatType), `{1e+20,NaN,-Infinity,NULL}`, `[1e+20,"NaN","-Infinity",null]`},
		{arrayOf(boolType), `{t,f,NULL}`, `[true,false,null]`},
		{stampsType, `{"2026-11-23 08:07:00",infinity}`, `["2026-11-23T08:07:00","infinity"]`},
		{arrayOf(zonedType), `{"2026-11-23 08:07:00+00","0044-03-15 12:00:00+00 BC"}`,
			`["2026-11-23T08:07:00Z","0044-03-15 12:00:00+00 BC"]`},
		{arrayOf(byteaType), `{"\\x","\\x01"}`, `["\\x","\\x01"]`},
		{textsType, `{"",a,"a b","NULL","null",nul,NULL}`, `["","a","a b","NULL","null","nul",null]`},
		{textsType, `{"{}","a,b","\"","\\","{\"a\": 1}"}`, `["{}","a,b","\"","\\","{\"a\": 1}"]`},
		{textsType, "{\"\t\",\"\n\",\"\v\",\"\f\",\"\r\",\x01,\"\x02 \\\"\",ü,\u00a0}",
			`["\t","\n","\u000b","\f","\r","\u0001","\u0002 \"","ü","` + "\u00a0" + `"]`},
		{docsType, `{1,"null","[1, 2]","{\"a\": \"b\"}","\"s\"",NULL}`, `["1","null","[1, 2]","{\"a\": \"b\"}","\"s\"",null]`},
		{docsType, `{{1},{2}}`, `[["1"],["2"]]`},
		{boxesType, `{(1,1),(0,0);(2,2),(1,1)}`, `["(1,1),(0,0)","(2,2),(1,1)"]`},
		{&Type{Array: true, Delim: 'x'}, `{1,2x"axb"}`, `["1,2","axb"]`},
		{textsType, `{(1;2)}`, `["(1;2)"]`},

		// Literals that array_out does not print.
		{textsType, ``, `""`},
		{textsType, `{`, `"{"`},
		{textsType, `}`, `"}"`},
		{textsType, `{}}`, `"{}}"`},
		{textsType, `{}{}`, `"{}{}"`},
		{textsType, `{a`, `"{a"`},
		{textsType, `{a,`, `"{a,"`},
		{textsType, `{a,}`, `"{a,}"`},
		{textsType, `{,a}`, `"{,a}"`},
		{textsType, `{{},}`, `"{{},}"`},
		{textsType, `{a b}`, `"{a b}"`},
		{textsType, `{null}`, `"{null}"`},
		{textsType, `{"a"}`, `"{\"a\"}"`},
		{textsType, `{"a b`, `"{\"a b"`},
		{textsType, `{"a b\`, `"{\"a b\\"`},
		{textsType, `{"\a b"}`, `"{\"\\a b\"}"`},
		{textsType, `{"a b"c}`, `"{\"a b\"c}"`},
		{textsType, `{a{b}}`, `"{a{b}}"`},
		{textsType, `{a\b}`, `"{a\\b}"`},
		{textsType, `a`, `"a"`},
		{intsType, `{{{{{{{1}}}}}}}`, `"{{{{{{{1}}}}}}}"`},
		{stampsType, `{"2026\\"}`, `"{\"2026\\\\\"}"`},
		{intsType, `{x,"a b"}`, `["x","a b"]`}, // not integers, but an array
	} {
		t.Run(c.t.Name+" "+c.text[:min(len(c.text), 20)], func(t *testing.T) {
			got := AppendJSON([]byte("dst"), c.t, []byte(c.text))
			if string(got) != "dst"+c.json {
				t.Fatalf("AppendJSON(%q) = %s, want %s", c.text, got[3:], c.json)
			}
			if !json.Valid(got[3:]) {
				t.Fatalf("not JSON: %s", got[3:])
			}
			back, null, err := AppendText([]byte("dst"), c.t, got[3:])
			if err != nil || null || string(back) != "dst"+c.text {
				t.Fatalf("AppendText(%s) = %q, null %v, error %v; want %q", got[3:], back, null, err, c.text)
			}
		})
	}
}

func TestEveryByteIsSeenInEveryPlace(t *testing.T) {
	for n := range 50 {
		for at := range n {
			for c := range 256 {
				for _, fill := range []byte{'x', ' ', '!', '#', '[', ']', 0x80, 0xdc, 0xff} {
					s := bytes.Repeat([]byte{fill}, n)
					s[at] = byte(c)
					want := n
					if c < ' ' || c == '"' || c == '\\' {
						want = at
					}
					if got := special(s, 0); got != want || plain(s) != (want == n) {
						t.Fatalf("%q: special at %d, plain %v, want %d", s, got, plain(s), want)
					}
				}
			}
		}
	}
}

func TestAppendTextTakesWhatOthersWrite(t *testing.T) {
	for _, c := range []struct {
		t          *Type
		json, text string
	}{
		{intType, " 42\n", "42"},
		{intType, `"42"`, "42"},
		{floatType, ` 1E5`, "1E5"},
		{floatType, `"NaN"`, "NaN"},
		{boolType, " true ", "t"},
		{boolType, `"yes"`, "yes"},
		{textType, `12.50`, "12.50"},
		{textType, `true`, "true"},
		{textType, `false`, "false"},
		{textType, `"\u00fc\u20AC\ud83d\ude00\/\b\f\n\r\t"`, "ü€😀/\b\f\n\r\t"},
		{textType, ` "a" `, "a"},
		{stampType, `"2026-11-23 08:07:00"`, "2026-11-23 08:07:00"},
		{stampType, `"2026\u002d11-23T08:07:00"`, "2026-11-23 08:07:00"},
		{zonedType, `"2026-11-23T10:07:00+02:00"`, "2026-11-23T10:07:00+02:00"},
		{zonedType, `"2026-11-23T10:07:00z"`, "2026-11-23T10:07:00z"},
		{byteaType, `"\u005cx01"`, `\x01`},
		{jsonType, ` { "$json" : null } `, "null"},
		{jsonType, `{"\u0024json": {"$ref": 1}}`, `{"$ref": 1}`},
		{jsonType, ` {"$json_text": " 1"}`, " 1"},
		{jsonType, `{"$json": 1, "other": 2}`, `{"$json": 1, "other": 2}`}, // no wrapper of ours
		{jsonType, `{"$ref": 1}`, `{"$ref": 1}`},
		{jsonType, `{"$\ud800": false}`, `{"$\ud800": false}`},
		{jsonType, `{"$json_text": 1}`, `{"$json_text": 1}`},
		{jsonType, "\t[1]", `[1]`},
		{intsType, " [ 1 , null , [ ] ] ", "{1,NULL,{}}"},
		{intsType, "[ ]", "{}"},
		{intsType, `["1", "2"]`, "{1,2}"},
		{intsType, `"{1,2}"`, "{1,2}"},
		{textsType, `[1, true, "a\u0020b", "\"", "\u006eull"]`, `{1,true,"a b","\"","null"}`},
		{docsType, `[{"a": [1]}, 2, "3", true, null]`, `{"{\"a\": [1]}",2,3,true,NULL}`},
	} {
		got, null, err := AppendText(nil, c.t, []byte(c.json))
		if err != nil || null || string(got) != c.text {
			t.Errorf("AppendText(%s, %s) = %q, null %v, error %v; want %q", c.t.Name, c.json, got, null, err, c.text)
		}
	}
	for _, typ := range slices.Concat(scalars, []*Type{textsType, docsType}) {
		got, null, err := AppendText([]byte("dst"), typ, []byte(" null "))
		if err != nil || !null || string(got) != "dst" {
			t.Errorf("%s: null gives %q, null %v, error %v", typ.Name, got, null, err)
		}
	}
}

func TestAppendTextRefuses(t *testing.T) {
	for _, c := range []struct {
		t         *Type
		json, why string
	}{
		{intType, ``, "decode value of type bigint: want an integer, a string or null at byte 0"},
		{intType, `1.5`, "want an integer, a string or null at byte 0"},
		{intType, `1e3`, "want an integer"},
		{intType, `1 2`, "want the end of the value at byte 2"},
		{intType, `true`, "want an integer"},
		{intType, `[1]`, "want an integer"},
		{intType, `-`, "want a JSON number at byte 0"},
		{intType, `nul`, "want null at byte 0"},
		{floatType, `.5`, "want a number"},
		{floatType, `1.`, "want a JSON number"},
		{floatType, `01`, "want a JSON number"},
		{floatType, `1e`, "want a JSON number"},
		{boolType, `1`, "want true, false"},
		{boolType, `tru`, "want true at byte 0"},
		{textType, `{}`, "want a string or null"},
		{textType, `"a`, "want the end of a string at byte 2"},
		{textType, `"a\`, "want an escape of JSON at byte 2"},
		{textType, `"a\x"`, "want an escape of JSON at byte 2"},
		{textType, `"\u12"`, "want an escape of JSON at byte 1"},
		{textType, `"\u12g4"`, "want an escape of JSON at byte 1"},
		{textType, "\"a\nb\"", "want an escape, not a control character at byte 2"},
		{textType, `"\ud83d"`, "want a whole surrogate pair at byte 1"},
		{textType, `"\ud83d\u0041"`, "want a whole surrogate pair"},
		{textType, `"\ude00\ud83d"`, "want a whole surrogate pair"},
		{textType, `"a\u0000"`, "want a character other than NUL at byte 2"},
		{textType, `"a"b`, "want the end of the value at byte 3"},
		{stampType, `20261123`, "want a string or null"},
		{byteaType, `12`, "want a string or null"},
		{jsonType, `{"a":}`, "want a value at byte 5"},
		{jsonType, `{"a" 1}`, "want a colon at byte 5"},
		{jsonType, `{"a":1,}`, "want a member's name at byte 7"},
		{jsonType, `{"a":1,"b"}`, "want a colon at byte 10"},
		{jsonType, `{"a":1,"b`, "want the end of a string at byte 9"},
		{jsonType, `{1:1}`, "want a member's name at byte 1"},
		{jsonType, `[1,]`, "want a value at byte 3"},
		{jsonType, `[1 2]`, "want a comma or ] at byte 3"},
		{jsonType, `[1}`, "want a comma or ]"},
		{jsonType, `{"a":1]`, "want a comma or }"},
		{jsonType, `[`, "want a value at byte 1"},
		{jsonType, strings.Repeat("[", 1_000_000), "want a value at byte 1000000"},
		{jsonType, `x`, "want a value at byte 0"},
		{jsonType, `{"$json_text":"\u0000"}`, "NUL"},
		{intsType, `1`, "want an array, a string or null"},
		{intsType, `{}`, "want an array"},
		{intsType, `[1`, "want a comma or ] at byte 2"},
		{intsType, `[1,`, "want an integer"},
		{intsType, `[,1]`, "want an integer"},
		{intsType, `[1,]`, "want an integer"},
		{intsType, `[nil]`, "want null"},
		{intsType, `[1]]`, "want the end of the value"},
		{intsType, `[[[[[[[1]]]]]]]`, "want at most 6 dimensions"},
		{docsType, `[{"a"}]`, "want a colon"},
		{&Type{OID: 12345, Kind: KindInt}, `x`, "decode value of type with oid 12345: want an integer"},
	} {
		got, null, err := AppendText([]byte("dst"), c.t, []byte(c.json))
		if err == nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("AppendText(%s, %.40s): error %v, want %q", c.t.Name, c.json, err, c.why)
		}
		if string(got) != "dst" || null {
			t.Errorf("AppendText(%s, %.40s) gives %q, null %v with an error", c.t.Name, c.json, got, null)
		}
	}
}

func TestDeepNestingIsWalkedWithoutRecursion(t *testing.T) {
	for _, n := range []int{1, 63, 64, 65, 127, 128, 129, 1000, 100_000} {
		for _, pair := range []string{"[]", `{"a":}`, `[{"a":[]}]`} {
			half := len(pair) - 1 - strings.Count(pair[1:len(pair)-1], "}") - strings.Count(pair[1:len(pair)-1], "]")
			doc := strings.Repeat(pair[:half], n) + "1" + strings.Repeat(pair[half:], n)
			if end, err := skipValue([]byte(doc), 0); err != nil || end != len(doc) {
				t.Fatalf("%d × %s: %d of %d, error %v", n, pair, end, len(doc), err)
			}
			wrong := strings.Repeat(pair[:half], n) + "1" + strings.Repeat("]", n) + "}"
			if end, err := skipValue([]byte(wrong), 0); err == nil && end == len(wrong) {
				t.Fatalf("%d × %s closed wrongly is accepted", n, pair)
			}
		}
	}
}

func TestEachMember(t *testing.T) {
	var got []string
	err := EachMember([]byte(" { \"a\" : 1 , \"b\\u0022c\":[1, {\"x\":\"}\"}] ,\"\": \"s\\\"\", \"n\":null,\"t\":true}\n"),
		func(name, value []byte) error {
			got = append(got, string(name)+"="+string(value))
			return nil
		})
	want := []string{`a=1`, `b"c=[1, {"x":"}"}]`, `="s\""`, `n=null`, `t=true`}
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("got %q, error %v, want %q", got, err, want)
	}
	for _, empty := range []string{`{}`, ` { } `} {
		if err := EachMember([]byte(empty), func(_, _ []byte) error { return io.EOF }); err != nil {
			t.Fatalf("%s: %v", empty, err)
		}
	}
	if err := EachMember([]byte(`{"a":1}`), func(_, _ []byte) error { return io.EOF }); err != io.EOF {
		t.Fatalf("the callback's error came back as %v", err)
	}
	for bad, why := range map[string]string{
		``:                "decode object: want an object at byte 0",
		`[]`:              "want an object at byte 0",
		`{`:               "want a member's name at byte 1",
		`{"a"`:            "want a colon at byte 4",
		`{"a":`:           "want a value at byte 5",
		`{"a":1`:          "want a comma or } at byte 6",
		`{"a":1,}`:        "want a member's name at byte 7",
		`{"a":1}}`:        "want the end of the object at byte 7",
		`{"a":1 "b":2}`:   "want a comma or } at byte 7",
		`{"a\ud800":1}`:   "want a whole surrogate pair",
		`{"a":{"b":tru}}`: "want true at byte 10",
	} {
		err := EachMember([]byte(bad), func(_, _ []byte) error { return nil })
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: error %v, want %q", bad, err, why)
		}
	}
}

func TestNothingIsAllocated(t *testing.T) {
	object := []byte(`{"id": 7, "status": "active", "tags": ["a", {"b": [1, 2]}], "at": "2026-11-23T08:07:00Z"}`)
	buf := make([]byte, 0, 4096)
	for name, f := range map[string]func(){
		"AppendJSON": func() {
			buf = AppendJSON(buf[:0], textType, []byte("active\n"))
			buf = AppendJSON(buf, zonedType, []byte("2026-11-23 08:07:00+00"))
			buf = AppendJSON(buf, textsType, []byte(`{a,"b \"c\"",NULL}`))
			buf = AppendJSON(buf, jsonType, []byte(`{"$a": [1]}`))
		},
		"AppendText": func() {
			buf, _, _ = AppendText(buf[:0], textType, []byte(`"active\n"`))
			buf, _, _ = AppendText(buf, zonedType, []byte(`"2026-11-23T08:07:00Z"`))
			buf, _, _ = AppendText(buf, textsType, []byte(`["a","b \"c\"",null]`))
			buf, _, _ = AppendText(buf, jsonType, []byte(`{"$json":{"$a": [1]}}`))
		},
		"EachMember": func() {
			n := 0
			if err := EachMember(object, func(_, value []byte) error { n += len(value); return nil }); err != nil || n == 0 {
				t.Error(n, err)
			}
		},
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

func TestTypeKind(t *testing.T) {
	for oid, want := range map[uint32]Type{
		20:   {OID: 20, Name: "bigint", Kind: KindInt},
		25:   {OID: 25, Name: "text"},
		199:  {OID: 199, Name: "json[]", Kind: KindJSON, Array: true},
		1020: {OID: 1020, Name: "box[]", Array: true, Delim: ';'},
		1700: {OID: 1700, Name: "numeric"},
		1185: {OID: 1185, Name: "timestamp with time zone[]", Kind: KindTimestampTZ, Array: true},
	} {
		if got, ok := TypeKind(oid); !ok || got != want {
			t.Errorf("TypeKind(%d) = %+v, %v", oid, got, ok)
		}
	}
	for _, oid := range []uint32{0, 1, 2249, 16384} {
		if got, ok := TypeKind(oid); ok {
			t.Errorf("TypeKind(%d) = %+v", oid, got)
		}
	}
}

// arrayOut is array_out of Postgres as its source has it, for a list of elements in which nil is NULL.
func arrayOut(elems []any, delim byte) string {
	var parts []string
	for _, e := range elems {
		switch e := e.(type) {
		case nil:
			parts = append(parts, "NULL")
		case []any:
			parts = append(parts, arrayOut(e, delim))
		case string:
			quote := e == "" || strings.EqualFold(e, "NULL") || strings.ContainsAny(e, "\"\\{} \t\n\r\v\f"+string(rune(delim)))
			if quote {
				e = `"` + strings.NewReplacer(`"`, `\"`, `\`, `\\`).Replace(e) + `"`
			}
			parts = append(parts, e)
		}
	}
	return "{" + strings.Join(parts, string(rune(delim))) + "}"
}

// someText draws text of every class of code points, with the characters that matter more often than not.
func someText() *rapid.Generator[string] {
	special := rapid.SampledFrom([]string{`"`, `\`, "{", "}", ",", ";", " ", "\t", "\n", "\v", "\f", "\r", "\x01", "\x7f",
		"NULL", "null", "$", "\u00a0", "\u2028", "\ufffd", "\ufeff", "é", "e\u0301", "漢", "😀", "\U0010ffff", "\ue000"})
	piece := rapid.OneOf(special, rapid.StringMatching(`[a-zA-Z0-9]{1,9}`), rapid.StringN(0, 5, -1))
	return rapid.Custom(func(t *rapid.T) string {
		s := strings.Join(rapid.SliceOfN(piece, 0, 8).Draw(t, "pieces"), "")
		return strings.ReplaceAll(s, "\x00", "")
	})
}

// someArray draws a rectangular array with the given lengths.
func someArray(t *rapid.T, lengths []int) []any {
	elems := make([]any, lengths[0])
	for i := range elems {
		switch {
		case len(lengths) > 1:
			elems[i] = someArray(t, lengths[1:])
		case rapid.IntRange(0, 9).Draw(t, "null") > 0:
			elems[i] = someText().Draw(t, "element")
		}
	}
	return elems
}

func TestTextComesBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := someText().Draw(t, "text")
		j := AppendJSON(nil, textType, []byte(s))
		var std string
		if err := json.Unmarshal(j, &std); err != nil || std != s {
			t.Fatalf("encoding/json reads %s as %q, error %v", j, std, err)
		}
		if back, null, err := AppendText(nil, textType, j); err != nil || null || string(back) != s {
			t.Fatalf("%q came back as %q, error %v", s, back, err)
		}
		if back, _, err := AppendText(nil, textType, marshal(s)); err != nil || string(back) != s {
			t.Fatalf("%s of encoding/json came back as %q, error %v", marshal(s), back, err)
		}
	})
}

func TestArraysComeBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		lengths := rapid.SliceOfN(rapid.IntRange(1, 3), 1, 4).Draw(t, "lengths")
		delim := rapid.SampledFrom([]byte{',', ';', '|'}).Draw(t, "delimiter")
		elems := someArray(t, lengths)
		literal := arrayOut(elems, delim)
		for _, kind := range []Kind{KindText, KindJSON, KindInt, KindTimestamp} {
			typ := &Type{Name: "drawn", Kind: kind, Array: true, Delim: delim}
			j := AppendJSON(nil, typ, []byte(literal))
			back, null, err := AppendText(nil, typ, j)
			if err != nil || null || string(back) != literal {
				t.Fatalf("kind %d: %s became %s, came back as %s, error %v", kind, literal, j, back, err)
			}
			if kind != KindText && kind != KindJSON {
				continue
			}
			var std any
			if err := json.Unmarshal(j, &std); err != nil {
				t.Fatalf("%s became %s: %v", literal, j, err)
			}
			if again, _ := json.Marshal(std); !bytes.Equal(again, marshal(elems)) {
				t.Fatalf("%s became %s", literal, j)
			}
			indented, _ := json.MarshalIndent(std, " ", "\t")
			if back, _, err := AppendText(nil, typ, indented); err != nil || string(back) != literal {
				t.Fatalf("%s came back as %s, want %s, error %v", indented, back, literal, err)
			}
		}
	})
}

func marshal(v any) []byte {
	j, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return j
}

func FuzzAppendText(f *testing.F) {
	for _, s := range []string{`null`, `"a\u00e9"`, `[1,[null,"x y"]]`, `{"$json":{"$a":1}}`, `{"$json_text":" 1"}`, `-1.5e+3`,
		`true`, `"2026-11-23T08:07:00.1Z"`, `["\"\\{},;\t"]`, `"[2:3]={1,2}"`, `"\ud83d\ude00"`} {
		f.Add([]byte(s), byte(0), byte(','))
		f.Add([]byte(s), byte(0x80|KindJSON), byte(';'))
	}
	f.Fuzz(func(t *testing.T, j []byte, kind, delim byte) {
		typ := &Type{Name: "fuzzed", Kind: Kind(kind & 7), Array: kind&0x80 != 0, Delim: delim}
		out, null, err := AppendText([]byte("dst"), typ, j)
		if !bytes.HasPrefix(out, []byte("dst")) {
			t.Fatalf("dst became %q", out)
		}
		if err != nil || null {
			if len(out) != 3 || err != nil && null {
				t.Fatalf("%q, null %v, error %v", out, null, err)
			}
			return
		}
		if !json.Valid(j) && bytes.Count(j, []byte("["))+bytes.Count(j, []byte("{")) < 10000 {
			t.Fatalf("%s is no JSON, yet gave %q", j, out)
		}
		comesBack(t, typ, out[3:])
	})
}

func FuzzArray(f *testing.F) {
	for _, s := range []string{`{}`, `{a,NULL,"NULL","",null}`, `{{1,2},{3,4}}`, `[2:3]={1,2}`, `{"a\"b\\","c d"}`, "{\"\t\x01\"}",
		`{"2026-11-23 08:07:00+00"}`, `{t,f}`, `{1e+20,NaN}`, `{(1,1),(0,0);(2,2),(1,1)}`} {
		f.Add([]byte(s), byte(0), byte(','))
		f.Add([]byte(s), byte(KindTimestampTZ), byte(';'))
	}
	f.Fuzz(func(t *testing.T, text []byte, kind, delim byte) {
		comesBack(t, &Type{Name: "fuzzed", Kind: Kind(kind & 7), Array: true, Delim: delim}, text)
	})
}

func FuzzScalar(f *testing.F) {
	for _, s := range []string{"", "a\"b", "-1", "1e+20", "t", "2026-11-23 08:07:00", "2026-11-23 08:07:00.5+00", `\x00`, ` {"$a":1}`} {
		for _, typ := range scalars {
			f.Add([]byte(s), byte(typ.Kind))
		}
	}
	f.Fuzz(func(t *testing.T, text []byte, kind byte) {
		comesBack(t, &Type{Name: "fuzzed", Kind: Kind(kind & 7)}, text)
	})
}

// comesBack checks the law, for any text whatever, except for what Postgres cannot print: a json that is none, and a
// timestamp in the stored form.
func comesBack(t *testing.T, typ *Type, text []byte) {
	if typ.Kind == KindJSON && !typ.Array && !json.Valid(text) {
		return
	}
	if (typ.Kind == KindTimestamp || typ.Kind == KindTimestampTZ) && bytes.IndexByte(text, 'T') >= 0 {
		return
	}
	if typ.Delim == '"' || typ.Delim == '\\' || typ.Delim == '{' || typ.Delim == '}' {
		return // CREATE TYPE takes any byte, but array_in could not tell where an element ends
	}
	j := AppendJSON(nil, typ, text)
	if !json.Valid(j) {
		t.Fatalf("%q gave %s", text, j)
	}
	back, null, err := AppendText(nil, typ, j)
	if bytes.IndexByte(text, 0) >= 0 && err != nil {
		return
	}
	if err != nil || null || !bytes.Equal(back, text) {
		t.Fatalf("%q became %s, came back as %q, null %v, error %v", text, j, back, null, err)
	}
}

func FuzzAppendString(f *testing.F) {
	f.Add([]byte("a\"\\\x00\x1f\x7f\xff üxxxxxxxxxxxxxxxxxx\n"))
	f.Fuzz(func(t *testing.T, s []byte) {
		j := AppendString(nil, s)
		var got string
		if err := json.Unmarshal(j, &got); err != nil {
			t.Fatalf("%q gave %s: %v", s, j, err)
		}
		if utf8.Valid(s) && got != string(s) {
			t.Fatalf("%q gave %s, which is %q", s, j, got)
		}
		if !bytes.Equal(AppendString(nil, s), appendEscaped(nil, s)) {
			t.Fatalf("%q gives %s and %s", s, j, appendEscaped(nil, s))
		}
	})
}

func FuzzEachMember(f *testing.F) {
	for _, s := range []string{`{}`, `{"a":1,"b":[{"c":"}"}]}`, ` { "\u00e9" : null } `, `{"a":1}x`, `{"a":"\ud800"}`, `{"a":-0.5e-7}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, obj []byte) {
		type member struct{ name, value string }
		var got, want []member
		err := EachMember(obj, func(name, value []byte) error {
			got = append(got, member{string(name), string(value)})
			return nil
		})
		if bytes.Count(obj, []byte("["))+bytes.Count(obj, []byte("{")) >= 10000 || !utf8.Valid(obj) {
			return // encoding/json has a limit of depth, and replaces what is not UTF-8
		}
		trimmed := bytes.TrimLeft(obj, " \t\r\n")
		valid := json.Valid(obj) && trimmed[0] == '{'
		if err != nil && valid && (strings.Contains(err.Error(), "surrogate") || strings.Contains(err.Error(), "NUL")) {
			return // a name that Postgres cannot hold
		}
		if valid != (err == nil) {
			t.Fatalf("%s: error %v, but encoding/json says valid: %v", obj, err, valid)
		}
		if !valid {
			return
		}
		d := json.NewDecoder(bytes.NewReader(obj))
		_, err = d.Token()
		for err == nil && d.More() {
			var name json.Token
			var value json.RawMessage
			if name, err = d.Token(); err == nil {
				err = d.Decode(&value)
				want = append(want, member{name.(string), string(value)})
			}
		}
		if err != nil && !errors.Is(err, io.EOF) || !slices.Equal(got, want) {
			t.Fatalf("%s: got %q, want %q, error %v", obj, got, want, err)
		}
	})
}

var benchValues = []struct {
	name, text string
	t          *Type
}{
	{"int", "1234567", intType},
	{"text6", "active", textType},
	{"text20", "hello wonderful worl", textType},
	{"text200", strings.Repeat("hello wonderful worl", 10), textType},
	{"numeric", "12.50", textType},
	{"bool", "t", boolType},
	{"float", "0.1234567", floatType},
	{"timestamptz", "2026-11-23 08:07:00.123456+00", zonedType},
	{"uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", textType},
	{"json", `{"a": 1, "b": [1, 2, 3], "cde": "hello wonderful world", "f": null}`, jsonType},
	{"ints", `{1,2,3,4,5}`, intsType},
	{"texts", `{foo,bar,"hello world","a\"b"}`, textsType},
}

func BenchmarkAppendJSON(b *testing.B) {
	for _, v := range benchValues {
		b.Run(v.name, func(b *testing.B) {
			buf, text := make([]byte, 0, 4096), []byte(v.text)
			b.ReportAllocs()
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				buf = AppendJSON(buf[:0], v.t, text)
			}
		})
	}
}

func BenchmarkAppendText(b *testing.B) {
	for _, v := range benchValues {
		b.Run(v.name, func(b *testing.B) {
			buf, j := make([]byte, 0, 4096), AppendJSON(nil, v.t, []byte(v.text))
			b.ReportAllocs()
			b.SetBytes(int64(len(j)))
			for b.Loop() {
				var err error
				if buf, _, err = AppendText(buf[:0], v.t, j); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkEachMember(b *testing.B) {
	var obj []byte
	for i, v := range benchValues {
		obj = fmt.Appendf(obj, `%s"%s":`, [2]string{"{", ","}[min(i, 1)], v.name)
		obj = AppendJSON(obj, v.t, []byte(v.text))
	}
	obj = append(obj, '}')
	b.ReportAllocs()
	b.SetBytes(int64(len(obj)))
	for b.Loop() {
		n := 0
		if err := EachMember(obj, func(_, _ []byte) error { n++; return nil }); err != nil || n != len(benchValues) {
			b.Fatal(n, err)
		}
	}
}
