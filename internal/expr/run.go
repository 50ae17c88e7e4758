package expr

import (
	"cmp"
	"fmt"
	"math"
	"strings"

	"github.com/cockroachdb/apd/v3"
	"github.com/expr-lang/expr/ast"
)

const (
	maxSteps   = 1000000
	maxBytes   = 16 << 20 // of texts and lists that an expression makes
	valueBytes = 128      // of one value, about
)

// machine is what one run of an expression has.
type machine struct {
	vars    []Value
	locals  []Value
	changed func(column int) bool
	steps   int
	bytes   int
}

// failure is a panic that ends a run.
type failure struct{ err error }

func (m *machine) fail(n ast.Node, format string, args ...any) {
	panic(&failure{&Error{At: n.Location().From, Text: fmt.Sprintf(format, args...)}})
}

func (m *machine) step(n ast.Node) {
	if m.steps++; m.steps > maxSteps {
		m.fail(n, "more than %d steps", maxSteps)
	}
}

func (m *machine) grow(n ast.Node, bytes int) {
	if m.bytes += bytes; m.bytes > maxBytes {
		m.fail(n, "more than %d MiB of values", maxBytes>>20)
	}
}

func (m *machine) text(n ast.Node, s string) Value {
	m.grow(n, len(s))
	return TextOf(s)
}

func (m *machine) set(i int, v Value) {
	for len(m.locals) <= i {
		m.locals = append(m.locals, Value{})
	}
	m.locals[i] = v
}

func (m *machine) column(n ast.Node, row Value, i int) Value {
	if row.Kind == Null {
		return row
	}
	v, err := row.Record.Column(i)
	if err != nil {
		panic(&failure{err})
	}
	return v
}

// Env is what an expression runs with.
type Env struct {
	Vars []Value // by the index that Scope.Vars has
	// Changed tells whether a column of the row is another one than before; needed where Scope has Before and After.
	Changed func(column int) bool
}

// Run gives the value of the expression. An error of a row's column is returned as it is; any other is an *[Error].
func (p *Program) Run(env Env) (v Value, err error) {
	m := machine{vars: env.Vars, changed: env.Changed}
	defer func() {
		if r := recover(); r != nil {
			f, ok := r.(*failure)
			if !ok {
				panic(r)
			}
			v, err = Value{}, f.err
		}
	}()
	return p.run(&m), nil
}

func numericOf(n int64) Value { return Value{Kind: Numeric, Num: apd.New(n, 0)} }

func toNumeric(v *Value) *apd.Decimal {
	if v.Kind == Int {
		return apd.New(v.Int, 0)
	}
	return v.Num
}

func toFloat(v Value) float64 {
	switch v.Kind {
	case Int:
		return float64(v.Int)
	case Numeric:
		f, err := v.Num.Float64()
		if err != nil && f == 0 {
			return math.NaN()
		}
		return f
	}
	return v.Float
}

// arithmetic gives a op b.
func (m *machine) arithmetic(n ast.Node, op string, a, b Value) Value {
	m.step(n)
	switch {
	case a.Kind == Null || b.Kind == Null:
		return Value{}
	case a.Kind == Text && b.Kind == Text && op == "+":
		return m.text(n, a.Text+b.Text)
	case !a.Kind.isNumber() || !b.Kind.isNumber():
		m.fail(n, "%s %s %s: there is no such operation", a.Kind, op, b.Kind)
	case a.Kind == Float || b.Kind == Float:
		return m.floats(n, op, toFloat(a), toFloat(b))
	case a.Kind == Int && b.Kind == Int && op != "/":
		return m.integers(n, op, a.Int, b.Int)
	}
	return m.numerics(n, op, toNumeric(&a), toNumeric(&b))
}

func (m *machine) integers(n ast.Node, op string, a, b int64) Value {
	var r int64
	ok := true
	switch op {
	case "+":
		r = a + b
		ok = (r > a) == (b > 0)
	case "-":
		r = a - b
		ok = (r < a) == (b > 0)
	case "*":
		if r = a * b; a != 0 && (r/a != b || a == -1 && b == math.MinInt64) {
			ok = false
		}
	case "%":
		if b == 0 {
			m.fail(n, "division by zero")
		}
		if b != -1 {
			r = a % b
		}
	}
	if !ok {
		m.fail(n, "integer out of range: %d %s %d", a, op, b)
	}
	return IntOf(r)
}

func (m *machine) floats(n ast.Node, op string, a, b float64) Value {
	var r float64
	switch op {
	case "+":
		r = a + b
	case "-":
		r = a - b
	case "*":
		r = a * b
	default:
		if b == 0 {
			m.fail(n, "division by zero")
		}
		if r = a / b; op == "%" {
			r = math.Mod(a, b)
		}
	}
	if math.IsInf(r, 0) && !math.IsInf(a, 0) && !math.IsInf(b, 0) {
		m.fail(n, "float out of range")
	}
	return Value{Kind: Float, Float: r}
}

// numerics follows PostgreSQL manual, Numeric Types, in what it says of NaN and the infinities.
func (m *machine) numerics(n ast.Node, op string, a, b *apd.Decimal) Value {
	r := new(apd.Decimal)
	nan := func() Value { return Value{Kind: Numeric, Num: &apd.Decimal{Form: apd.NaN}} }
	inf := func(negative bool) Value {
		return Value{Kind: Numeric, Num: &apd.Decimal{Form: apd.Infinite, Negative: negative}}
	}
	switch {
	case a.Form > apd.Infinite || b.Form > apd.Infinite:
		return nan()
	case b.IsZero() && (op == "/" || op == "%"):
		m.fail(n, "division by zero")
	case a.Form == apd.Infinite || b.Form == apd.Infinite:
		both := a.Form == b.Form
		switch op {
		case "+", "-":
			if op == "-" {
				c := *b
				c.Negative = !b.Negative
				b = &c
			}
			if both && a.Negative != b.Negative {
				return nan()
			}
			return inf(a.Form == apd.Infinite && a.Negative || b.Form == apd.Infinite && b.Negative)
		case "*":
			if a.IsZero() || b.IsZero() {
				return nan()
			}
			return inf(a.Negative != b.Negative)
		case "/":
			if both {
				return nan()
			}
			if a.Form == apd.Infinite {
				return inf(a.Negative != b.Negative)
			}
			return numericOf(0)
		default:
			if a.Form == apd.Infinite {
				return nan()
			}
			r.Set(a)
			return Value{Kind: Numeric, Num: r}
		}
	}
	var err error
	switch op {
	case "+":
		_, err = exact.Add(r, a, b)
	case "-":
		_, err = exact.Sub(r, a, b)
	case "*":
		_, err = exact.Mul(r, a, b)
	case "/":
		if _, err = quotient.Quo(r, a, b); err == nil {
			if r.Reduce(r); r.Exponent > 0 {
				_, err = exact.Quantize(r, r, 0)
			}
		}
	case "%":
		_, err = exact.Rem(r, a, b)
	}
	if err != nil {
		m.fail(n, "numeric of more than %d digits", maxDigits)
	}
	m.grow(n, int(r.NumDigits())/2)
	return decimal(r)
}

// decimal makes a numeric, of which there is no -0.
func decimal(d *apd.Decimal) Value {
	if d.IsZero() {
		d.Negative = false
	}
	return Value{Kind: Numeric, Num: d}
}

// equal is IS NOT DISTINCT FROM.
func equal(a, b *Value) bool {
	if a.Kind == Null || b.Kind == Null {
		return a.Kind == b.Kind
	}
	switch {
	case a.Kind == List && b.Kind == List:
		if len(a.List) != len(b.List) {
			return false
		}
		for i := range a.List {
			if !equal(&a.List[i], &b.List[i]) {
				return false
			}
		}
		return true
	case a.Kind == Object && b.Kind == Object:
		names := func(v *Value) map[string]Value {
			out := map[string]Value{}
			for _, o := range v.Object {
				out[o.Name] = o.Value
			}
			return out
		}
		x, y := names(a), names(b)
		if len(x) != len(y) {
			return false
		}
		for name, v := range x {
			w, ok := y[name]
			if !ok || !equal(&v, &w) {
				return false
			}
		}
		return true
	}
	r, ok := compare(a, b)
	return ok && r == 0
}

// compare orders two values that are not NULL; ok is false for what has no order, and no equality beside this one.
func compare(a, b *Value) (r int, ok bool) {
	switch {
	case a.Kind == Text && b.Kind == Text:
		return strings.Compare(a.Text, b.Text), true
	case a.Kind == b.Kind && (a.Kind == Int || a.Kind == Bool || a.Kind == Time || a.Kind == Stamp || a.Kind == Date):
		return cmp.Compare(a.Int, b.Int), true
	case a.Kind == Date && b.Kind == Stamp:
		return cmp.Compare(midnight(a.Int), b.Int), true
	case a.Kind == Stamp && b.Kind == Date:
		return cmp.Compare(a.Int, midnight(b.Int)), true
	case !a.Kind.isNumber() || !b.Kind.isNumber():
		return 0, false
	case a.Kind == Float || b.Kind == Float:
		x, y := toFloat(*a), toFloat(*b)
		if math.IsNaN(x) || math.IsNaN(y) {
			return compareNaN(math.IsNaN(x), math.IsNaN(y)), true
		}
		return cmp.Compare(x, y), true
	}
	x, y := toNumeric(a), toNumeric(b)
	if xn, yn := x.Form > apd.Infinite, y.Form > apd.Infinite; xn || yn {
		return compareNaN(xn, yn), true
	}
	return x.Cmp(y), true
}

// compareNaN orders two numbers of which one, or each, is NaN, which is equal to itself and greater than all else.
func compareNaN(a, b bool) int {
	switch {
	case a && b:
		return 0
	case a:
		return 1
	}
	return -1
}

func midnight(day int64) int64 {
	if day == Infinity || day == -Infinity {
		return day
	}
	return day * dayMicros
}
