package expr

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

func TestMain(m *testing.M) { os.Exit(pgservertest.Main(m)) }

// both is an expression, and what it means in SQL.
type both struct {
	expr, sql string
	kind      Kind
}

var columns = []Column{{"i", typeOf(Int)}, {"j", typeOf(Int)}, {"n", typeOf(Numeric)}, {"m", typeOf(Numeric)}, {"f", typeOf(Float)}, {"b", typeOf(Bool)}, {"c", typeOf(Bool)}, {"s", typeOf(Text)}, {"t", typeOf(Text)}}

// values gives some of each column, as SQL and as here; each may be NULL.
func values(t *rapid.T) (sql []string, row Values) {
	for _, c := range columns {
		types := map[Kind]string{Int: "bigint", Numeric: "numeric", Float: "float8", Bool: "boolean", Text: "text"}
		some := map[Kind][]string{Int: {"0", "1", "-7", "42", "9223372036854775807", "-9223372036854775808"}, Numeric: {"0", "1.10", "-2.345", "100", "0.00", "NaN", "Infinity", "12345678901234567890.123456789"},
			Float: {"0", "0.5", "-1.25", "1e+20", "NaN", "3"}, Bool: {"true", "false"}, Text: {"", "a", "größe", "A b", "paid"}}[c.Type.Kind]
		v := rapid.SampledFrom(append([]string{"NULL"}, some...)).Draw(t, c.Name)
		if v == "NULL" {
			sql, row = append(sql, "NULL::"+types[c.Type.Kind]), append(row, Value{})
			continue
		}
		x, err := scalar(c.Type.Kind, v)
		if err != nil {
			t.Fatal(v, err)
		}
		sql, row = append(sql, "'"+v+"'::"+types[c.Type.Kind]), append(row, x)
	}
	return sql, row
}

// generator makes expressions of a kind and the SQL that says the same.
type generator struct{ *rapid.T }

func (g generator) pick(n int) int { return rapid.IntRange(0, n-1).Draw(g.T, "which") }

func (g generator) number(depth int) both {
	if depth == 0 {
		return []both{{"i", "i", Int}, {"j", "j", Int}, {"n", "n", Numeric}, {"m", "m", Numeric}, {"f", "f", Float}, {"3", "3::bigint", Int}, {"2.50", "2.50", Numeric}}[g.pick(7)]
	}
	a := g.number(depth - 1)
	switch n := g.pick(11); n {
	case 0, 1, 2, 3:
		b, op := g.number(depth-1), []string{"+", "-", "*", "%"}[n]
		kind := joinedKind(a.kind, b.kind)
		if op == "%" && kind == Float { // Postgres has none
			op = "+"
		}
		return both{"(" + a.expr + " " + op + " " + b.expr + ")", "(" + a.sql + " " + op + " " + b.sql + ")", kind}
	case 4:
		return both{"(-" + a.expr + ")", "(-" + a.sql + ")", a.kind}
	case 5:
		b := g.number(depth - 1)
		return both{"((" + a.expr + ") ?? (" + b.expr + "))", "coalesce(" + a.sql + ", " + b.sql + ")", joinedKind(a.kind, b.kind)}
	case 6:
		b, c := g.number(depth-1), g.boolean(depth-1)
		return both{"(" + c.expr + " ? " + a.expr + " : " + b.expr + ")", "CASE WHEN " + c.sql + " THEN " + a.sql + " ELSE " + b.sql + " END", joinedKind(a.kind, b.kind)}
	case 7:
		return both{"abs(" + a.expr + ")", "abs(" + a.sql + ")", a.kind}
	case 8:
		b, f := g.number(depth-1), g.pick(2)
		return both{[]string{"min", "max"}[f] + "(" + a.expr + ", " + b.expr + ")", []string{"least", "greatest"}[f] + "(" + a.sql + ", " + b.sql + ")", joinedKind(a.kind, b.kind)}
	case 9:
		if a.kind != Numeric {
			return a
		}
		f := g.pick(3)
		return both{[]string{"ceil(", "floor(", "round("}[f] + a.expr + []string{")", ")", ", 2)"}[f], []string{"ceil(", "floor(", "round("}[f] + a.sql + []string{")", ")", ", 2)"}[f], Numeric}
	}
	s := g.text(depth - 1)
	return both{"len(" + s.expr + ")", "length(" + s.sql + ")::bigint", Int}
}

func joinedKind(a, b Kind) Kind {
	t, _ := joined(typeOf(a), typeOf(b))
	return t.Kind
}

func (g generator) text(depth int) both {
	if depth == 0 {
		return []both{{"s", "s", Text}, {"t", "t", Text}, {`"a"`, "'a'::text", Text}, {`""`, "''::text", Text}}[g.pick(4)]
	}
	a := g.text(depth - 1)
	switch g.pick(5) {
	case 0:
		b := g.text(depth - 1)
		return both{"(" + a.expr + " + " + b.expr + ")", "(" + a.sql + " || " + b.sql + ")", Text}
	case 1:
		b := g.text(depth - 1)
		return both{"((" + a.expr + ") ?? (" + b.expr + "))", "coalesce(" + a.sql + ", " + b.sql + ")", Text}
	case 2:
		b, c := g.text(depth-1), g.boolean(depth-1)
		return both{"(" + c.expr + " ? " + a.expr + " : " + b.expr + ")", "CASE WHEN " + c.sql + " THEN " + a.sql + " ELSE " + b.sql + " END", Text}
	case 3:
		n := g.number(depth - 1)
		return both{"string(" + n.expr + ")", "(" + n.sql + ")::text", Text}
	}
	return a
}

func (g generator) boolean(depth int) both {
	if depth == 0 {
		return []both{{"b", "coalesce(b, false)", Bool}, {"c", "coalesce(c, false)", Bool}, {"true", "true", Bool}}[g.pick(3)]
	}
	of := func() both {
		if g.pick(2) == 0 {
			return g.number(depth - 1)
		}
		return g.text(depth - 1)
	}
	a := of()
	same := func() both {
		if a.kind == Text {
			return g.text(depth - 1)
		}
		return g.number(depth - 1)
	}
	collate := func(b both) string {
		if b.kind == Text {
			return b.sql + ` COLLATE "C"`
		}
		return b.sql
	}
	switch g.pick(8) {
	case 0, 1:
		b, op := same(), g.pick(2)
		return both{"(" + a.expr + []string{" == ", " != "}[op] + b.expr + ")", "(" + a.sql + []string{" IS NOT DISTINCT FROM ", " IS DISTINCT FROM "}[op] + b.sql + ")", Bool}
	case 2, 3:
		b, op := same(), []string{"<", "<=", ">", ">="}[g.pick(4)]
		return both{"(" + a.expr + " " + op + " " + b.expr + ")", "coalesce(" + collate(a) + " " + op + " " + collate(b) + ", false)", Bool}
	case 4:
		b, c, op := g.boolean(depth-1), g.boolean(depth-1), g.pick(2)
		return both{"(" + b.expr + []string{" and ", " or "}[op] + c.expr + ")", "(" + b.sql + []string{" AND ", " OR "}[op] + c.sql + ")", Bool}
	case 5:
		b := g.boolean(depth - 1)
		return both{"(not " + b.expr + ")", "(NOT " + b.sql + ")", Bool}
	case 6:
		b, c := same(), same()
		return both{"(" + a.expr + " in [" + b.expr + ", " + c.expr + "])", "(" + a.sql + " IS NOT DISTINCT FROM " + b.sql + " OR " + a.sql + " IS NOT DISTINCT FROM " + c.sql + ")", Bool}
	}
	x, y := g.text(depth-1), g.text(depth-1)
	op := g.pick(3)
	return both{"(" + x.expr + []string{" contains ", " startsWith ", " endsWith "}[op] + y.expr + ")",
		"coalesce(" + []string{"strpos(%[1]s, %[2]s) > 0", "starts_with(%[1]s, %[2]s)", "right(%[1]s, length(%[2]s)) = %[2]s"}[op] + ", false)", Bool}.fill(x.sql, y.sql)
}

func (b both) fill(args ...any) both {
	b.sql = fmt.Sprintf(b.sql, args...)
	return b
}

// TestAgreesWithPostgres: an expression gives what Postgres gives for the same in SQL, to the last digit, or fails as it does there.
func TestAgreesWithPostgres(t *testing.T) {
	server := pgservertest.ForTest(t, pgserver.Config{})
	conn, err := pgx.Connect(t.Context(), server.URL(server.NewDatabase(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	scope := &Scope{Vars: []Var{{"row", Type{Kind: Record, Columns: columns}}}, Bare: 0, Before: -1, After: -1}
	var names []string
	for _, c := range columns {
		names = append(names, c.Name)
	}
	gave, failed := 0, 0
	for range 15 { // rapid's checks, so many times
		rapid.Check(t, func(t *rapid.T) {
			g := generator{t}
			x := []func(int) both{g.number, g.text, g.boolean}[g.pick(3)](rapid.IntRange(1, 3).Draw(t, "depth"))
			sql, row := values(t)
			p, err := Compile(x.expr, scope, Anything)
			if err != nil {
				t.Fatalf("%s: %v", x.expr, err)
			}
			if p.Type.Kind != x.kind {
				t.Fatalf("%s is said to give %s, want %s", x.expr, p.Type.Kind, x.kind)
			}
			got, err := p.Run(Env{Vars: []Value{{Kind: Record, Record: row}}})
			var want *string
			query := "SELECT (" + x.sql + ")::text FROM (VALUES (" + strings.Join(sql, ", ") + ")) x(" + strings.Join(names, ", ") + ")"
			pgErr := conn.QueryRow(t.Context(), query).Scan(&want)
			switch {
			case (err != nil) != (pgErr != nil):
				t.Fatalf("%s: %v; Postgres: %v\n%s", x.expr, err, pgErr, query)
			case err != nil:
				failed++
			case (got.Kind == Null) != (want == nil) || want != nil && got.String() != *want:
				t.Fatalf("%s gives %q, Postgres %v\n%s", x.expr, got.String(), show(want), query)
			default:
				gave++
			}
		})
	}
	t.Logf("%d expressions with a value, %d errors", gave, failed)
	if gave < 500 || failed < 5 {
		t.Errorf("%d values and %d errors are too few", gave, failed)
	}
}

func show(s *string) string {
	if s == nil {
		return "NULL"
	}
	return fmt.Sprintf("%q", *s)
}
