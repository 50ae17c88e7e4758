package expr

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func typeOf(k Kind) Type { return Type{Kind: k} }

var order = []Column{
	{"id", typeOf(Int)}, {"status", Type{Kind: Text, Labels: []string{"pending", "paid", "shipped"}}}, {"total", typeOf(Numeric)}, {"rate", typeOf(Float)},
	{"paid", typeOf(Bool)}, {"paid_at", typeOf(Time)}, {"due", typeOf(Date)}, {"made", typeOf(Stamp)}, {"note", typeOf(Text)}, {"extra", typeOf(Any)},
	{"tags", Type{Kind: List, Elem: &Type{Kind: Text}}},
}

var scope = &Scope{Vars: []Var{{"before", Type{Kind: Record, Columns: order}}, {"after", Type{Kind: Record, Columns: order}}, {"items", Type{Kind: List}}}, Bare: 1, Before: 0, After: 1}

func num(s string) Value {
	v, err := ParseNumeric(s)
	if err != nil {
		panic(err)
	}
	return v
}

func moment(k Kind, s string) Value {
	v, err := ParseTime(k, s)
	if err != nil {
		panic(err)
	}
	return v
}

func parsed(s string) Value {
	v, err := ParseJSON([]byte(s))
	if err != nil {
		panic(err)
	}
	return v
}

func env() Env {
	before := Values{IntOf(7), TextOf("pending"), num("1.10"), {Kind: Float, Float: 0.5}, {}, {}, moment(Date, "2026-10-31"), moment(Stamp, "2026-10-31 23:30:00"), TextOf("a"), {}, {}}
	after := Values{IntOf(7), TextOf("paid"), num("2.20"), {Kind: Float, Float: 0.5}, BoolOf(true), moment(Time, "2026-11-01T03:59:00Z"), moment(Date, "2026-10-31"), moment(Stamp, "2026-10-31 23:30:00"), {},
		parsed(`{"a":{"b":[1,2.50,"x"]},"n":null,"c":true}`), {Kind: List, List: []Value{TextOf("x"), {}, TextOf("z")}}}
	return Env{Vars: []Value{{Kind: Record, Record: before}, {Kind: Record, Record: after}, parsed(`[{"sku":"a","price":"1.10","n":2},{"sku":"b","price":"0.90","n":1}]`)},
		Changed: func(i int) bool { return i == 1 || i == 2 || i == 4 || i == 5 || i == 8 || i == 9 || i == 10 }}
}

// TestMeaning: each line is an expression and the JSON of its value.
func TestMeaning(t *testing.T) {
	for _, line := range []struct{ src, want string }{
		{`became("status", "paid")`, `true`},
		{`became("status", "shipped")`, `false`},
		{`became("due", "2026-10-31")`, `false`}, // it is so, but was before
		{`became("paid_at")`, `true`},
		{`became("note")`, `false`}, // to NULL
		{`changed("note") and not changed("id")`, `true`},
		{`changed("due") or changed("made")`, `false`},
		{`status == "paid" && after.status == status`, `true`},
		{`before.total + after.total`, `"3.30"`},
		{`1.10 + 2.20`, `"3.30"`},
		{`1.10 * 2`, `"2.20"`},
		{`total * 1.5`, `"3.300"`},
		{`7 / 2`, `"3.5"`},
		{`-7 % 4`, `-3`},
		{`2 - -3`, `5`},
		{`1 / 3.0`, `"0.3333333333333333333333333333333333"`},
		{`rate + 1`, `1.5`},
		{`rate == 0.5`, `true`},
		{`before.paid == nil`, `true`},
		{`nil == nil`, `true`},
		{`before.paid`, `null`},
		{`not before.paid`, `true`},
		{`before.paid or after.paid`, `true`},
		{`before.paid and true`, `false`},
		{`before.paid_at < after.paid_at`, `false`}, // with a NULL
		{`before.paid_at != after.paid_at`, `true`},
		{`(before.paid_at ?? after.paid_at) == "2026-11-01T05:59:00+02:00"`, `true`},
		{`note + "x"`, `null`},
		{`before.note + "x"`, `"ax"`},
		{`paid ? 1 : 2.5`, `"1"`},
		{`before.paid ? "a" : "b"`, `"b"`},
		{`status in ["paid", "shipped"]`, `true`},
		{`status not in ["paid", "shipped"]`, `false`},
		{`nil in [1, nil]`, `true`},
		{`id in [1.0, 7.0]`, `true`},
		{`"x" in tags`, `true`},
		{`"y" in tags`, `false`},
		{`extra.a.b[1]`, `"2.50"`},
		{`extra.a.b[-1]`, `"x"`},
		{`extra.a.b[9]`, `null`},
		{`extra.n.x.y`, `null`},
		{`extra.c`, `true`},
		{`before.extra.a.b`, `null`},
		{`day(paid_at, "America/New_York")`, `"2026-10-31"`},
		{`day(paid_at, "UTC")`, `"2026-11-01"`},
		{`week(due)`, `"2026-10-26"`},
		{`month(made)`, `"2026-10-01"`},
		{`year(due)`, `"2026-01-01"`},
		{`due == made`, `false`},
		{`due < made`, `true`},
		{`due >= "2026-10-31"`, `true`},
		{`seconds("2026-11-01T03:58:59.5Z", paid_at)`, ``},
		{`sum(items, numeric(.price) * .n)`, `"3.10"`},
		{`sum(map(items, .n))`, `3`},
		{`sum([])`, `0`},
		{`count(items, .n > 1)`, `1`},
		{`filter(items, .sku != "a")`, `[{"sku":"b","price":"0.90","n":1}]`},
		{`map(items, ({sku: .sku, twice: .n * 2}))`, `[{"sku":"a","twice":4},{"sku":"b","twice":2}]`},
		{`any(items, any(tags, # == "x") and .n == 2)`, `true`},
		{`all([], # > 1)`, `true`},
		{`none(items, .n > 5) and one(items, .n == 1)`, `true`},
		{`find(items, .n == 1).sku`, `"b"`},
		{`max(map(items, .n))`, `2`},
		{`min(3, 1.5, nil)`, `"1.5"`},
		{`let x = id * 2; x + 1`, `15`},
		{`len("größe") + len(tags)`, `8`},
		{`upper("a") + lower("B") + trim(" c ")`, `"Abc"`},
		{`int("42") + int(2.5)`, `45`},
		{`string(total) + string(paid)`, `"2.20true"`},
		{`abs(-3) + abs(-1.50)`, `"4.50"`},
		{`round(2.345, 2)`, `"2.35"`},
		{`round(-2.5)`, `"-3"`},
		{`ceil(1.2) + floor(-1.2)`, `"0"`},
		{`join(split("a,b", ","), "-")`, `"a-b"`},
		{`first(tags) == "x" and last(tags) == "z"`, `true`},
		{`"abc" contains "b" and "abc" startsWith "a" and "abc" endsWith "c"`, `true`},
		{`note contains "b"`, `false`},
		{`"abc" matches "^a.c$"`, `true`},
		{`"größe"[1:3]`, `"rö"`},
		{`tags[1:]`, `[null,"z"]`},
		{`{a: 1, b: [true, nil]}`, `{"a":1,"b":[true,null]}`},
		{`extra == {c: true, a: {b: [1, 2.5, "x"]}, n: nil}`, `true`},
		{`numeric("NaN") == numeric("NaN") and numeric("NaN") > numeric("Infinity")`, `true`},
		{`numeric("Infinity") - numeric("Infinity")`, `"NaN"`},
		{`float("1.0300000000000001e+22")`, `1.0300000000000001e+22`},
		{`float("1e+20")`, `1e+20`},
		{`9223372036854775807 + 0.0`, `"9223372036854775807.0"`},
	} {
		if line.want == "" {
			continue
		}
		p, err := Compile(line.src, scope, Anything)
		if err != nil {
			t.Errorf("%s: %v", line.src, err)
			continue
		}
		v, err := p.Run(env())
		if got := string(v.AppendJSON(nil)); err != nil || got != line.want {
			t.Errorf("%s gives %s, %v; want %s", line.src, got, err, line.want)
		}
	}
}

// TestWhatIsRefused: each line is an expression, where the error points to, and how it begins.
func TestWhatIsRefused(t *testing.T) {
	for _, line := range []struct {
		src  string
		at   int
		want string
	}{
		{`after.stauts == "paid"`, 6, `after has no stauts; did you mean status?`},
		{`stauts == "paid"`, 0, `stauts is not known here; did you mean status?`},
		{`id == "7"`, 0, `an integer and text cannot be compared`},
		{`true and note`, 9, `text in the place of a condition`},
		{`id + note`, 0, `an integer + text: there is no such operation`},
		{`now()`, 0, `there is no now here`},
		{`groupBy(items, .n)`, 0, `there is no groupBy here`},
		{`became("statsu", "paid")`, 7, `there is no column statsu; did you mean status?`},
		{`became(status)`, 7, `became wants a column's name as a literal text`},
		{`changed("status", 1)`, 0, `changed takes 1 arguments, not 2`},
		{`lenn(note)`, 0, `there is no function lenn; did you mean len?`},
		{`day(paid_at)`, 0, `a time without the zone`},
		{`day(paid_at, "Mars/Olympus")`, 13, `"Mars/Olympus" is not a time zone`},
		{`paid_at > due`, 0, `a time and a date cannot be compared: say in which zone`},
		{`paid_at > "yesterday"`, 10, `"yesterday" is not a time`},
		{`paid_at > "2026-10-31T00:00:00"`, 10, `"2026-10-31T00:00:00" is not a time: no zone`},
		{`note matches "("`, 13, `malformed pattern`},
		{`note matches status`, 13, `a pattern that is not a literal text`},
		{`1..5`, 0, `there is no operator ..`},
		{`2 ** 3`, 0, `there is no operator **`},
		{`id; id`, 0, `one expression is expected`},
		{`#`, 0, `unexpected token`},
		{`len(1)`, 4, `an integer in the place of text`},
		{`sum(tags)`, 4, `a list of text has no sum`},
		{`id == `, 5, `unexpected token EOF`},
		{` `, 0, `an empty expression`},
		{`note.foo`, 0, `text has no member foo`},
		{`"x" < nil`, 0, `nothing is less or greater than nil`},
		{`{a: 1, a: 2}`, 7, `a is given twice`},
		{`paid ? 1 : "x"`, 11, `an integer or text`},
		{strings.Repeat("(", 20000), 0, `an expression of 20000 characters`},
		{strings.Repeat("1+", 3000) + "1", -1, `compilation failed: expression exceeds maximum allowed nodes`},
	} {
		_, err := Compile(line.src, scope, Anything)
		var e *Error
		if !errors.As(err, &e) || !strings.HasPrefix(e.Text, line.want) || line.at >= 0 && e.At != line.at {
			t.Errorf("%.60s: %+v; want %q at %d", line.src, e, line.want, line.at)
		}
	}
	if _, err := Compile(`id`, scope, Condition); err == nil {
		t.Error("a number passed for a condition")
	}
	if _, err := Compile(`id`, scope, Sequence); err == nil {
		t.Error("a number passed for a list")
	}
}

// TestWhatCanNeverBe: it compiles, with a warning.
func TestWhatCanNeverBe(t *testing.T) {
	for src, want := range map[string]string{
		`became("status", "payed")`:         `can never be: there is no label "payed"; did you mean paid?`,
		`before.status in ["paid", "gone"]`: `can never be: there is no label "gone"`,
		`became("status", "paid")`:          ``,
	} {
		p, err := Compile(src, scope, Condition)
		if err != nil {
			t.Fatal(src, err)
		}
		if got := fmt.Sprint(p.Warnings); want == "" && len(p.Warnings) != 0 || want != "" && !strings.Contains(got, want) {
			t.Errorf("%s: %s; want %q", src, got, want)
		}
	}
}

// TestWhatFailsAtRunTime: an error, not a panic, a wrong number or a run without an end.
func TestWhatFailsAtRunTime(t *testing.T) {
	for src, want := range map[string]string{
		`9223372036854775807 + id`:            `integer out of range`,
		`-9223372036854775807 - id`:           `integer out of range`,
		`4611686018427387904 * id`:            `integer out of range`,
		`id / (id - 7)`:                       `division by zero`,
		`id % 0`:                              `division by zero`,
		`int("x")`:                            `"x" is not an integer`,
		`extra.c.d`:                           `a boolean has no member d`,
		`extra.a and true`:                    `an object in the place of a condition`,
		`extra.c + 1`:                         `a boolean + an integer`,
		`extra.a.b[0] < extra.c`:              `an integer and a boolean have no order`,
		`numeric("1e1999") * numeric("1e99")`: `numeric of more than 2000 digits`,
		nested(8):                             `more than 1000000 steps`,
		`let a = "` + strings.Repeat("x", 4000) + `"; let b = join(map(split(a, ""), a)); let c = join(map(split(a, ""), b)); len(c)`: `MiB`,
	} {
		p, err := Compile(src, scope, Anything)
		if err != nil {
			t.Errorf("%.80s: %v", src, err)
			continue
		}
		if v, err := p.Run(env()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s gives %s, %v; want %q", src, v.String(), err, want)
		}
	}
	unknown := errors.New("unknown")
	p, err := Compile(`before.id == 1`, scope, Condition)
	if err != nil {
		t.Fatal(err)
	}
	e := env()
	e.Vars[0].Record = failing{unknown}
	if _, err := p.Run(e); err != unknown {
		t.Errorf("the error of a column: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Column(int) (Value, error) { return Value{}, f.err }

// nested goes through a list of ten, for each of its elements, and so on.
func nested(depth int) string {
	s := "1"
	for range depth {
		s = "sum(l, " + s + ")"
	}
	return "let l = [1,2,3,4,5,6,7,8,9,10]; " + s
}

// TestUses: what an expression reads is known, for rules are looked up by the columns that changed.
func TestUses(t *testing.T) {
	p, err := Compile(`became("status", "paid") and before.total > 1 and note == nil`, scope, Condition)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(p.Uses); got != "[{1 1} {0 2} {1 8}]" {
		t.Error(got)
	}
}

func TestTimesComeBack(t *testing.T) {
	for _, line := range []struct {
		kind Kind
		in   string
		want string
	}{
		{Date, "2026-10-31", "2026-10-31"}, {Date, "infinity", "infinity"}, {Date, "0044-03-15 BC", "0044-03-15 BC"}, {Date, "294276-12-31", "294276-12-31"},
		{Stamp, "2026-10-31 23:59:59.1", "2026-10-31T23:59:59.1"}, {Stamp, "2026-10-31T23:59:59.123456", "2026-10-31T23:59:59.123456"}, {Stamp, "4713-01-01 00:00:00 BC", "4713-01-01 00:00:00 BC"},
		{Time, "2026-10-31 23:59:59+00", "2026-10-31T23:59:59Z"}, {Time, "2026-10-31T23:59:59.5-05:30", "2026-11-01T05:29:59.5Z"}, {Time, "-infinity", "-infinity"},
		{Time, "12026-10-31 00:00:00+00", "12026-10-31 00:00:00+00"},
	} {
		v, err := ParseTime(line.kind, line.in)
		if got := v.String(); err != nil || got != line.want {
			t.Errorf("%s: %s, %v; want %s", line.in, got, err, line.want)
		}
	}
	for _, bad := range []string{"", "2026", "2026-13-01", "2026-02-30", "2026-02-28 25:00:00", "2026-02-28x", "2026-02-28 10:00:00+"} {
		for _, k := range []Kind{Date, Stamp, Time} {
			if v, err := ParseTime(k, bad); err == nil {
				t.Errorf("%q as %s: %s", bad, k, v.String())
			}
		}
	}
}

// FuzzCompile: whatever is written, it is an error or runs to an end.
func FuzzCompile(f *testing.F) {
	for _, s := range []string{`became("status", "paid")`, `sum(items, numeric(.price) * .n) ?? 0`, `let x = 1; x in [1, 2.5, nil] ? {a: #} : tags[1:-1]`, `not (paid or extra.a?.b[0] matches "x")`,
		`day(paid_at, "UTC") >= "2026-01-01"`, `if paid { 1 } else { 2 }`, `items | map(.n) | sum()`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, src string) {
		p, err := Compile(src, scope, Anything)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("%T", err)
			}
			return
		}
		v, err := p.Run(env())
		if err == nil {
			v.AppendJSON(nil)
		}
	})
}

// TestStaticTypesHold: whatever is compiled gives a value of the type that it was said to have, or NULL, or an error.
func TestStaticTypesHold(t *testing.T) {
	leaf := rapid.SampledFrom([]string{"id", "status", "total", "rate", "paid", "before.paid", "paid_at", "due", "made", "note", "extra", "tags", "nil", "1", "2.50", `"x"`, "true", "items", "before.total", "[]", `"2026-10-31"`})
	var gen func(depth int) *rapid.Generator[string]
	gen = func(depth int) *rapid.Generator[string] {
		if depth == 0 {
			return leaf
		}
		sub := gen(depth - 1)
		return rapid.Custom(func(t *rapid.T) string {
			a, b, c := sub.Draw(t, "a"), sub.Draw(t, "b"), sub.Draw(t, "c")
			form := rapid.SampledFrom([]string{
				"(" + a + " + " + b + ")", "(" + a + " * " + b + ")", "(" + a + " / " + b + ")", "(" + a + " % " + b + ")", "(" + a + " == " + b + ")", "(" + a + " < " + b + ")",
				"(" + a + " and " + b + ")", "(not " + a + ")", "(-" + a + ")", "(" + a + " ? " + b + " : " + c + ")", "((" + a + ") ?? (" + b + "))", "[" + a + ", " + b + "]", "(" + a + " in " + b + ")",
				"max(" + a + ", " + b + ")", "sum(" + a + ")", "map(" + a + ", #)", "filter(" + a + ", # == " + b + ")", "len(" + a + ")", "round(" + a + ")", "(" + a + ")[0]", "first(" + a + ")",
				"string(" + a + ")", "int(" + a + ")", "numeric(" + a + ")", "abs(" + a + ")", "day(" + a + `, "UTC")`, "find(" + a + ", # != nil)",
			}).Draw(t, "form")
			if _, err := Compile(form, scope, Anything); err != nil {
				return a
			}
			return form
		})
	}
	compiled := 0
	rapid.Check(t, func(t *rapid.T) {
		src := gen(3).Draw(t, "src")
		p, err := Compile(src, scope, Anything)
		if err != nil {
			t.Fatal(src, err)
		}
		v, err := p.Run(env())
		if err != nil {
			return
		}
		compiled++
		if v.Kind != Null && p.Type.Kind != Any && v.Kind != p.Type.Kind {
			t.Fatalf("%s gives %s, and was said to give %s", src, v.Kind, p.Type.Kind)
		}
	})
	if compiled < 50 {
		t.Errorf("only %d of the expressions ran", compiled)
	}
}
