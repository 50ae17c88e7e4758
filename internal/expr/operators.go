package expr

import (
	"regexp"
	"slices"
	"strings"

	"github.com/expr-lang/expr/ast"
)

// binary compiles an operator between two parts.
func (c *compiler) binary(n *ast.BinaryNode) (Type, fn) {
	boolean := Type{Kind: Bool}
	switch op := n.Operator; op {
	case "and", "&&":
		a, b := c.truth(n.Left), c.truth(n.Right)
		return boolean, func(m *machine) Value { v := a(m); w := BoolOf(v.True()); return second(w.True(), b, m, w) }
	case "or", "||":
		a, b := c.truth(n.Left), c.truth(n.Right)
		return boolean, func(m *machine) Value { v := a(m); w := BoolOf(v.True()); return second(!w.True(), b, m, w) }
	case "==", "!=":
		a, b := c.sides(n, n.Left, n.Right, true)
		same := op == "=="
		return boolean, func(m *machine) Value {
			m.step(n)
			x, y := a(m), b(m)
			return BoolOf(equal(&x, &y) == same)
		}
	case "<", "<=", ">", ">=":
		a, b := c.sides(n, n.Left, n.Right, false)
		return boolean, func(m *machine) Value {
			m.step(n)
			x, y := a(m), b(m)
			if x.Kind == Null || y.Kind == Null {
				return BoolOf(false)
			}
			r, ok := compare(&x, &y)
			if !ok {
				m.fail(n, "%s and %s have no order", x.Kind, y.Kind)
			}
			return BoolOf(op == "<" && r < 0 || op == "<=" && r <= 0 || op == ">" && r > 0 || op == ">=" && r >= 0)
		}
	case "+", "-", "*", "/", "%":
		return c.arithmetic(n)
	case "??":
		at, a := c.node(n.Left)
		bt, b := c.node(n.Right)
		t, ok := joined(at, bt)
		if !ok {
			c.fail(n.Right, "%s in the place of %s", bt.Kind, at.Kind)
		}
		a, b = as(t, a), as(t, b)
		return t, func(m *machine) Value {
			if v := a(m); v.Kind != Null {
				return v
			}
			return b(m)
		}
	case "in":
		return boolean, c.in(n)
	case "contains", "startsWith", "endsWith":
		a, b := c.textual(n.Left), c.textual(n.Right)
		f := map[string]func(a, b string) bool{"contains": strings.Contains, "startsWith": strings.HasPrefix, "endsWith": strings.HasSuffix}[op]
		return boolean, func(m *machine) Value {
			m.step(n)
			x, y := a(m), b(m)
			return BoolOf(x.Kind == Text && y.Kind == Text && f(x.Text, y.Text))
		}
	case "matches":
		pattern, ok := n.Right.(*ast.StringNode)
		if !ok {
			c.fail(n.Right, "a pattern that is not a literal text")
		}
		re, err := regexp.Compile(pattern.Value)
		if err != nil {
			c.fail(n.Right, "malformed pattern: %s", strings.TrimPrefix(err.Error(), "error parsing regexp: "))
		}
		a := c.textual(n.Left)
		return boolean, func(m *machine) Value {
			m.step(n)
			x := a(m)
			return BoolOf(x.Kind == Text && re.MatchString(x.Text))
		}
	}
	c.fail(n, "there is no operator %s here", n.Operator)
	return Type{}, nil
}

// second goes on with the second condition, or is the first.
func second(on bool, b fn, m *machine, first Value) Value {
	if !on {
		return first
	}
	v := b(m)
	return BoolOf(v.True())
}

func (c *compiler) textual(n ast.Node) fn {
	t, f := c.node(n)
	if t.Kind != Text && t.Kind != Any && t.Kind != Null {
		c.fail(n, "%s in the place of text", t.Kind)
	}
	return func(m *machine) Value {
		v := f(m)
		if v.Kind != Text && v.Kind != Null {
			m.fail(n, "%s in the place of text", v.Kind)
		}
		return v
	}
}

// sides compiles what is compared.
func (c *compiler) sides(n, left, right ast.Node, equality bool) (a, b fn) {
	at, a := c.node(left)
	bt, b := c.node(right)
	if lit, ok := right.(*ast.StringNode); ok {
		if f := c.literal(lit, at, equality); f != nil {
			return a, f
		}
	}
	if lit, ok := left.(*ast.StringNode); ok {
		if f := c.literal(lit, bt, equality); f != nil {
			return f, b
		}
	}
	if at.Kind == Null || bt.Kind == Null {
		if !equality {
			c.fail(n, "nothing is less or greater than nil")
		}
		return a, b
	}
	if !comparable(at.Kind, bt.Kind) {
		hint := ""
		if pair := [2]Kind{at.Kind, bt.Kind}; pair == [2]Kind{Time, Date} || pair == [2]Kind{Date, Time} || pair == [2]Kind{Time, Stamp} || pair == [2]Kind{Stamp, Time} {
			hint = `: say in which zone, as in day(occurred_at, "America/New_York")`
		}
		c.fail(n, "%s and %s cannot be compared%s", at.Kind, bt.Kind, hint)
	}
	if !equality && (at.Kind == List || at.Kind == Object || at.Kind == Record) {
		c.fail(n, "%s has no order", at.Kind)
	}
	return a, b
}

func comparable(a, b Kind) bool {
	switch {
	case a == b || a == Any || b == Any:
		return true
	case number1(a) && number1(b):
		return true
	case (a == Date || a == Stamp) && (b == Date || b == Stamp):
		return true
	}
	return false
}

// literal reads a literal text beside a value of another type, nil where it stays text.
func (c *compiler) literal(lit *ast.StringNode, t Type, equality bool) fn {
	switch t.Kind {
	case Time, Stamp, Date:
		v, err := ParseTime(t.Kind, lit.Value)
		if err != nil {
			c.fail(lit, "%q is not %s: %s", lit.Value, t.Kind, err)
		}
		return constant(v)
	case Text:
		if equality && t.Labels != nil && !slices.Contains(t.Labels, lit.Value) {
			c.warn(lit, "can never be: there is no label %q%s", lit.Value, Nearest(lit.Value, t.Labels))
		}
	}
	return nil
}

func (c *compiler) in(n *ast.BinaryNode) fn {
	at, a := c.node(n.Left)
	if list, ok := n.Right.(*ast.ArrayNode); ok {
		var fs []fn
		for _, e := range list.Nodes {
			_, f := c.sides(n, n.Left, e, true)
			fs = append(fs, f)
		}
		return func(m *machine) Value {
			m.step(n)
			x := a(m)
			for _, f := range fs {
				if y := f(m); equal(&x, &y) {
					return BoolOf(true)
				}
			}
			return BoolOf(false)
		}
	}
	bt, b := c.node(n.Right)
	switch bt.Kind {
	case List:
		if !comparable(at.Kind, bt.elem().Kind) && at.Kind != Null {
			c.fail(n, "a list of %s never has %s in it", bt.elem().Kind.bare(), at.Kind)
		}
	case Any, Object, Null:
	default:
		c.fail(n.Right, "%s in the place of a list", bt.Kind)
	}
	return func(m *machine) Value {
		m.step(n)
		x, l := a(m), b(m)
		switch l.Kind {
		case Null:
		case List:
			for i := range l.List {
				m.step(n)
				if equal(&x, &l.List[i]) {
					return BoolOf(true)
				}
			}
		case Object:
			for _, o := range l.Object {
				if x.Kind == Text && o.Name == x.Text {
					return BoolOf(true)
				}
			}
		default:
			m.fail(n, "%s in the place of a list", l.Kind)
		}
		return BoolOf(false)
	}
}

func (c *compiler) arithmetic(n *ast.BinaryNode) (Type, fn) {
	at, a := c.node(n.Left)
	bt, b := c.node(n.Right)
	text := at.Kind == Text || bt.Kind == Text
	ok := number1(at.Kind) && number1(bt.Kind)
	if text && n.Operator == "+" {
		ok = (at.Kind == Text || at.Kind == Any || at.Kind == Null) && (bt.Kind == Text || bt.Kind == Any || bt.Kind == Null)
	}
	if !ok {
		c.fail(n, "%s %s %s: there is no such operation", at.Kind, n.Operator, bt.Kind)
	}
	t, _ := joined(at, bt)
	if n.Operator == "/" && t.Kind == Int {
		t.Kind = Numeric
	}
	op := n.Operator
	return t, func(m *machine) Value { return m.arithmetic(n, op, a(m), b(m)) }
}
