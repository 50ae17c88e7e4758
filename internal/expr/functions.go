package expr

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // zones are those of the binary, so that a fold gives the same everywhere

	"github.com/cockroachdb/apd/v3"
	"github.com/expr-lang/expr/ast"
)

// off are functions of the grammar that an expression cannot have, and why.
var off = map[string]string{
	"now":  "it would give another answer each time; an event has occurred_at",
	"date": `it would depend on where it runs; use day(t, zone)`,
	"keys": "members have no order", "values": "members have no order", "toPairs": "members have no order", "groupBy": "members have no order",
}

// functions gives those that there are, for messages.
var functions = []string{"changed", "became", "day", "week", "month", "year", "seconds", "int", "float", "numeric", "string", "abs", "ceil", "floor", "round", "min", "max",
	"len", "lower", "upper", "trim", "join", "split", "first", "last", "sum", "count", "all", "any", "none", "one", "filter", "map", "find"}

// call compiles a function.
func (c *compiler) call(n ast.Node, name string, args []ast.Node) (Type, fn) {
	if why, ok := off[name]; ok {
		c.fail(n, "there is no %s here: %s", name, why)
	}
	switch name {
	case "changed", "became":
		return Type{Kind: Bool}, c.transition(n, name, args)
	case "all", "any", "none", "one", "filter", "map", "find":
		c.arity(n, name, args, 2, 2)
		return c.predicate(n, name, args)
	case "sum", "count":
		c.arity(n, name, args, 1, 2)
		return c.predicate(n, name, args)
	case "min", "max":
		c.arity(n, name, args, 1, 100)
		return c.extreme(n, name, args)
	}
	f, ok := plain[name]
	if !ok {
		c.fail(n, "there is no function %s%s", name, Nearest(name, functions))
	}
	c.arity(n, name, args, f.least, len(f.args))
	fs := make([]fn, len(args))
	gives := Type{Kind: f.gives}
	for i, a := range args {
		t, g := c.node(a)
		if fs[i] = g; i == 0 && f.gives == Null { // what its first argument is, or an element of that
			if gives = t; t.Kind == List {
				gives = t.elem()
			}
		}
		if t.Kind != Any && t.Kind != Null && !slices.Contains(f.args[i], t.Kind) {
			c.fail(a, "%s in the place of %s", t.Kind, f.args[i][0])
		}
		if t.Kind == Time && f.zoned && len(args) < 2 {
			c.fail(n, "%s", noZone)
		}
		if lit, ok := a.(*ast.StringNode); ok && f.check != nil {
			if err := f.check(i, lit.Value); err != nil {
				c.fail(a, "%s", err)
			}
		}
	}
	return gives, func(m *machine) Value {
		m.step(n)
		var room [3]Value
		vals := room[:0]
		for i, g := range fs {
			v := g(m)
			if v.Kind == Null {
				return Value{}
			}
			if !slices.Contains(f.args[i], v.Kind) {
				m.fail(n, "%s in the place of %s in %s", v.Kind, f.args[i][0], name)
			}
			vals = append(vals, v)
		}
		return f.run(m, n, vals)
	}
}

func (c *compiler) arity(n ast.Node, name string, args []ast.Node, least, most int) {
	if len(args) >= least && len(args) <= most {
		return
	}
	want := strconv.Itoa(least)
	if most > least {
		want = fmt.Sprintf("%d to %d", least, most)
	}
	c.fail(n, "%s takes %s arguments, not %d", name, want, len(args))
}

// transition compiles changed and became.
func (c *compiler) transition(n ast.Node, name string, args []ast.Node) fn {
	if c.scope.Before < 0 || c.scope.After < 0 {
		c.fail(n, "there is no %s here: nothing is known of a row before and after", name)
	}
	most := 1
	if name == "became" {
		most = 2
	}
	c.arity(n, name, args, 1, most)
	lit, ok := args[0].(*ast.StringNode)
	if !ok {
		c.fail(args[0], `%s wants a column's name as a literal text, as in %s("status")`, name, name)
	}
	before, after := c.scope.Before, c.scope.After
	cols := c.scope.Vars[after].Type.Columns
	i := slices.IndexFunc(cols, func(col Column) bool { return col.Name == lit.Value })
	if i < 0 {
		var known []string
		for _, col := range cols {
			known = append(known, col.Name)
		}
		c.fail(args[0], "there is no column %s%s", lit.Value, Nearest(lit.Value, known))
	}
	c.use(after, i)
	if name == "changed" {
		return func(m *machine) Value { return BoolOf(m.changed(i)) }
	}
	if len(args) == 1 {
		c.use(before, i)
		return func(m *machine) Value {
			if !m.changed(i) {
				return BoolOf(false)
			}
			was, is := m.column(n, m.vars[before], i), m.column(n, m.vars[after], i)
			return BoolOf(was.Kind == Null && is.Kind != Null)
		}
	}
	column := &ast.MemberNode{Node: &ast.IdentifierNode{Value: c.scope.Vars[after].Name}, Property: &ast.StringNode{Value: lit.Value}}
	loc := n.Location()
	column.SetLocation(loc)
	column.Node.SetLocation(loc)
	column.Property.SetLocation(loc)
	a, b := c.sides(n, column, args[1], true)
	return func(m *machine) Value {
		if !m.changed(i) {
			return BoolOf(false)
		}
		x, y := a(m), b(m)
		return BoolOf(equal(&x, &y))
	}
}

// predicate compiles what goes through a list.
func (c *compiler) predicate(n ast.Node, name string, args []ast.Node) (Type, fn) {
	t, list := c.node(args[0])
	if t.Kind != List && t.Kind != Any && t.Kind != Null {
		c.fail(args[0], "%s in the place of a list", t.Kind)
	}
	elem := t.elem()
	slot, body, bt := -1, fn(nil), elem
	if len(args) == 2 {
		p, ok := args[1].(*ast.PredicateNode)
		if !ok {
			c.fail(args[1], "a condition on each element is expected, as in any(list, # > 1)")
		}
		slot = c.local("", elem)
		c.elems = append(c.elems, slot)
		if name == "map" || name == "sum" {
			bt, body = c.node(p.Node)
		} else {
			body = c.truth(p.Node)
		}
		c.elems = c.elems[:len(c.elems)-1]
		c.locals = c.locals[:slot]
	}
	if name == "count" && body == nil {
		if elem.Kind != Bool && elem.Kind != Any {
			c.fail(args[0], "count of a list counts what is true in it; for the number of elements there is len")
		}
	}
	if name == "sum" && !number1(bt.Kind) {
		c.fail(args[0], "a list of %s has no sum", bt.Kind.bare())
	}
	var gives Type
	switch name {
	case "all", "any", "none", "one":
		gives = Type{Kind: Bool}
	case "filter":
		gives = Type{Kind: List, Elem: &elem}
	case "map":
		gives = Type{Kind: List, Elem: &bt}
	case "find":
		gives = elem
	case "count":
		gives = Type{Kind: Int}
	case "sum":
		if gives = bt; gives.Kind == Null {
			gives.Kind = Int
		}
	}
	zero := IntOf(0)
	if gives.Kind == Numeric {
		zero = numericOf(0)
	} else if gives.Kind == Float {
		zero = Value{Kind: Float}
	}
	return gives, func(m *machine) Value {
		m.step(n)
		l := list(m)
		if l.Kind == Null {
			if gives.Kind == Bool {
				return BoolOf(name == "all" || name == "none")
			}
			return Value{}
		}
		if l.Kind != List {
			m.fail(n, "%s in the place of a list in %s", l.Kind, name)
		}
		found, sum := int64(0), zero
		var out []Value
		for i := range l.List {
			m.step(n)
			v := l.List[i]
			if body != nil {
				m.set(slot, l.List[i])
				v = body(m)
			}
			switch name {
			case "map":
				m.grow(n, valueBytes)
				out = append(out, v)
				continue
			case "sum":
				if v.Kind != Null { // as in SQL
					sum = m.arithmetic(n, "+", sum, v)
				}
				continue
			}
			if !v.True() {
				if name == "all" {
					return BoolOf(false)
				}
				continue
			}
			found++
			switch name {
			case "any":
				return BoolOf(true)
			case "none":
				return BoolOf(false)
			case "find":
				return l.List[i]
			case "filter":
				m.grow(n, valueBytes)
				out = append(out, l.List[i])
			}
		}
		switch name {
		case "all", "none":
			return BoolOf(true)
		case "any":
			return BoolOf(false)
		case "one":
			return BoolOf(found == 1)
		case "count":
			return IntOf(found)
		case "sum":
			return sum
		case "find":
			return Value{}
		}
		return Value{Kind: List, List: out}
	}
}

// extreme compiles min and max, of arguments or of a list. NULLs do not count, as in SQL.
func (c *compiler) extreme(n ast.Node, name string, args []ast.Node) (Type, fn) {
	t := Type{Kind: Null}
	fs := make([]fn, len(args))
	for i, a := range args {
		at, f := c.node(a)
		fs[i] = f
		if len(args) == 1 {
			if at.Kind != List && at.Kind != Any && at.Kind != Null {
				c.fail(a, "%s of one %s", name, at.Kind.bare())
			}
			at = at.elem()
		}
		if at.Kind == List || at.Kind == Object || at.Kind == Record {
			c.fail(a, "%s has no order", at.Kind)
		}
		var ok bool
		if t, ok = joined(t, at); !ok {
			c.fail(a, "%s is not like the others", at.Kind)
		}
	}
	return t, as(t, func(m *machine) Value {
		m.step(n)
		var vals []Value
		for _, f := range fs {
			vals = append(vals, f(m))
		}
		if len(fs) == 1 {
			if vals[0].Kind != List && vals[0].Kind != Null {
				m.fail(n, "%s in the place of a list in %s", vals[0].Kind, name)
			}
			vals = vals[0].List
		}
		var best Value
		for i := range vals {
			m.step(n)
			if v := vals[i]; v.Kind == Null {
			} else if best.Kind == Null {
				best = v
			} else if r, ok := compare(&v, &best); !ok {
				m.fail(n, "%s and %s have no order", v.Kind, best.Kind)
			} else if r < 0 && name == "min" || r > 0 && name == "max" {
				best = v
			}
		}
		return best
	})
}

// function is one whose arguments are values. Of a NULL it is NULL.
type function struct {
	args  [][]Kind // what each may be, what it should be first
	least int
	gives Kind // Null: what the first argument is
	zoned bool // a moment needs a zone beside it
	check func(i int, literal string) error
	run   func(m *machine, n ast.Node, v []Value) Value
}

var (
	aNumber = []Kind{Numeric, Int, Float}
	aText   = []Kind{Text}
	aTime   = []Kind{Time, Stamp, Date}
)

var plain map[string]function

func init() {
	plain = map[string]function{
		"day":   calendar(func(t time.Time) time.Time { return t }),
		"week":  calendar(func(t time.Time) time.Time { return t.AddDate(0, 0, -(int(t.Weekday())+6)%7) }),
		"month": calendar(func(t time.Time) time.Time { return t.AddDate(0, 0, 1-t.Day()) }),
		"year":  calendar(func(t time.Time) time.Time { return t.AddDate(0, 1-int(t.Month()), 1-t.Day()) }),
		"seconds": {args: [][]Kind{aTime, aTime}, least: 2, gives: Numeric, run: func(m *machine, n ast.Node, v []Value) Value {
			if v[0].Kind != v[1].Kind {
				m.fail(n, "seconds from %s to %s", v[0].Kind, v[1].Kind)
			}
			a, b := v[0].Int, v[1].Int
			if v[0].Kind == Date {
				a, b = midnight(a), midnight(b)
			}
			for _, x := range []int64{a, b} {
				if x == Infinity || x == -Infinity {
					m.fail(n, "seconds from or to infinity")
				}
			}
			return Value{Kind: Numeric, Num: apd.New(b-a, -6)}
		}},
		"int":     {args: [][]Kind{{Text, Int, Numeric, Float, Bool}}, least: 1, gives: Int, run: toInt},
		"numeric": {args: [][]Kind{{Text, Int, Numeric, Float}}, least: 1, gives: Numeric, run: toNumericValue},
		"float": {args: [][]Kind{{Text, Int, Numeric, Float}}, least: 1, gives: Float, run: func(m *machine, n ast.Node, v []Value) Value {
			if v[0].Kind != Text {
				return Value{Kind: Float, Float: toFloat(v[0])}
			}
			f, err := scalar(Float, strings.TrimSpace(v[0].Text))
			if err != nil {
				m.fail(n, "%.40q is not a float", v[0].Text)
			}
			return f
		}},
		"string": {args: [][]Kind{{Text, Int, Numeric, Float, Bool, Time, Stamp, Date, List, Object}}, least: 1, gives: Text,
			run: func(m *machine, n ast.Node, v []Value) Value { return m.text(n, v[0].String()) }},
		"abs": {args: [][]Kind{aNumber}, least: 1, run: func(m *machine, n ast.Node, v []Value) Value {
			if zero := IntOf(0); v[0].Kind == Float {
				v[0].Float = math.Abs(v[0].Float)
			} else if r, _ := compare(&v[0], &zero); r < 0 {
				return m.arithmetic(n, "-", zero, v[0])
			}
			return v[0]
		}},
		"ceil":  whole(apd.RoundCeiling, math.Ceil),
		"floor": whole(apd.RoundFloor, math.Floor),
		"round": {args: [][]Kind{aNumber, {Int}}, least: 1, run: round},
		"len": {args: [][]Kind{{Text, List, Object}}, least: 1, gives: Int, run: func(_ *machine, _ ast.Node, v []Value) Value {
			switch v[0].Kind {
			case Text:
				return IntOf(int64(len([]rune(v[0].Text))))
			case List:
				return IntOf(int64(len(v[0].List)))
			}
			return IntOf(int64(len(v[0].Object)))
		}},
		"lower": textual(strings.ToLower), "upper": textual(strings.ToUpper), "trim": textual(strings.TrimSpace),
		"join": {args: [][]Kind{{List}, aText}, least: 1, gives: Text, run: func(m *machine, n ast.Node, v []Value) Value {
			sep := ""
			if len(v) > 1 {
				sep = v[1].Text
			}
			var b strings.Builder
			for i := range v[0].List {
				m.step(n)
				e := v[0].List[i].String()
				m.grow(n, len(e)+len(sep))
				if i > 0 {
					b.WriteString(sep)
				}
				b.WriteString(e)
			}
			return TextOf(b.String())
		}},
		"split": {args: [][]Kind{aText, aText}, least: 2, gives: List, run: func(m *machine, n ast.Node, v []Value) Value {
			m.grow(n, (strings.Count(v[0].Text, v[1].Text)+1)*valueBytes)
			out := Value{Kind: List}
			for _, s := range strings.Split(v[0].Text, v[1].Text) {
				out.List = append(out.List, TextOf(s))
			}
			return out
		}},
		"first": {args: [][]Kind{{List}}, least: 1, run: func(_ *machine, _ ast.Node, v []Value) Value {
			if len(v[0].List) == 0 {
				return Value{}
			}
			return v[0].List[0]
		}},
		"last": {args: [][]Kind{{List}}, least: 1, run: func(_ *machine, _ ast.Node, v []Value) Value {
			if len(v[0].List) == 0 {
				return Value{}
			}
			return v[0].List[len(v[0].List)-1]
		}},
	}
}

func textual(f func(string) string) function {
	return function{args: [][]Kind{aText}, least: 1, gives: Text, run: func(m *machine, n ast.Node, v []Value) Value { return m.text(n, f(v[0].Text)) }}
}

const noZone = `a time without the zone whose days are meant: write it as in day(occurred_at, "America/New_York")`

// calendar makes a function that gives the first day of the span in which a time lies; a moment needs a zone for that.
func calendar(f func(time.Time) time.Time) function {
	return function{args: [][]Kind{aTime, aText}, least: 1, gives: Date, zoned: true,
		check: func(i int, literal string) error {
			if i != 1 {
				return nil
			}
			_, err := zone(literal)
			return err
		},
		run: func(m *machine, n ast.Node, v []Value) Value {
			t := v[0]
			if t.Int == Infinity || t.Int == -Infinity {
				return Value{Kind: Date, Int: t.Int}
			}
			var at time.Time
			switch {
			case t.Kind == Date:
				at = time.UnixMicro(midnight(t.Int)).UTC()
			case t.Kind == Stamp:
				at = time.UnixMicro(t.Int).UTC()
			case len(v) < 2:
				m.fail(n, "%s", noZone)
			default:
				loc, err := zone(v[1].Text)
				if err != nil {
					m.fail(n, "%s", err)
				}
				at = time.UnixMicro(t.Int).In(loc)
			}
			y, mon, d := at.Date()
			day := f(time.Date(y, mon, d, 0, 0, 0, 0, time.UTC))
			return Value{Kind: Date, Int: day.Unix() / (dayMicros / 1000000)}
		}}
}

// zone finds a time zone by its name in the IANA database.
func zone(name string) (*time.Location, error) {
	if name == "" || name == "Local" {
		return nil, fmt.Errorf("%q is not a time zone; write one as in America/New_York", name)
	}
	loc, err := time.LoadLocation(name)
	if err != nil {
		return nil, fmt.Errorf("%.60q is not a time zone; write one as in America/New_York", name)
	}
	return loc, nil
}

func toInt(m *machine, n ast.Node, v []Value) Value {
	switch a := v[0]; a.Kind {
	case Text:
		i, err := strconv.ParseInt(strings.TrimSpace(a.Text), 10, 64)
		if err != nil {
			m.fail(n, "%.40q is not an integer", a.Text)
		}
		return IntOf(i)
	case Bool:
		return IntOf(a.Int)
	case Float:
		if r := math.RoundToEven(a.Float); r >= -(1<<63) && r < 1<<63 {
			return IntOf(int64(r))
		}
	case Numeric:
		r := new(apd.Decimal)
		if a.Num.Form == apd.Finite {
			if _, err := rounding.Quantize(r, a.Num, 0); err == nil {
				if i, err := r.Int64(); err == nil {
					return IntOf(i)
				}
			}
		}
	default:
		return a
	}
	m.fail(n, "integer out of range")
	return Value{}
}

// rounding rounds halves away from zero, as Postgres does with numeric.
var rounding = apd.Context{Precision: maxDigits, MaxExponent: maxDigits, MinExponent: -maxDigits, Traps: apd.DefaultTraps, Rounding: apd.RoundHalfUp}

func toNumericValue(m *machine, n ast.Node, v []Value) Value {
	switch a := v[0]; a.Kind {
	case Text:
		d, err := ParseNumeric(strings.TrimSpace(a.Text))
		if err != nil {
			m.fail(n, "%.40q is not a numeric", a.Text)
		}
		return d
	case Int:
		return numericOf(a.Int)
	case Float:
		d, err := ParseNumeric(floatText(a.Float))
		if err != nil {
			m.fail(n, "numeric of more than %d digits", maxDigits)
		}
		return d
	default:
		return a
	}
}

func round(m *machine, n ast.Node, v []Value) Value {
	var digits int64
	if len(v) > 1 {
		digits = v[1].Int
	}
	if digits < 0 || digits > 100 {
		m.fail(n, "round to %d places", digits)
	}
	switch a := v[0]; a.Kind {
	case Numeric:
		return m.quantize(n, &rounding, a, int32(-digits))
	case Float:
		if digits == 0 {
			return Value{Kind: Float, Float: math.RoundToEven(a.Float)}
		}
		m.fail(n, "a float rounded to places: make it a numeric first, as in round(numeric(x), 2)")
	}
	return v[0]
}

// quantize rounds a numeric to an exponent, in a context's way.
func (m *machine) quantize(n ast.Node, ctx *apd.Context, a Value, exponent int32) Value {
	if a.Num.Form != apd.Finite {
		return a
	}
	r := new(apd.Decimal)
	if _, err := ctx.Quantize(r, a.Num, exponent); err != nil {
		m.fail(n, "numeric of more than %d digits", maxDigits)
	}
	return decimal(r)
}

// whole makes ceil and floor.
func whole(rounder apd.Rounder, float func(float64) float64) function {
	ctx := rounding
	ctx.Rounding = rounder
	return function{args: [][]Kind{aNumber}, least: 1, run: func(m *machine, n ast.Node, v []Value) Value {
		switch a := v[0]; a.Kind {
		case Float:
			return Value{Kind: Float, Float: float(a.Float)}
		case Numeric:
			return m.quantize(n, &ctx, a, 0)
		}
		return v[0]
	}}
}
