package expr

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/expr-lang/expr/ast"
	"github.com/expr-lang/expr/conf"
	"github.com/expr-lang/expr/file"
	"github.com/expr-lang/expr/parser"
)

// Var is a variable that an expression can name.
type Var struct {
	Name string
	Type Type
}

// Scope says what an expression can name.
type Scope struct {
	Vars []Var
	// Bare is the index of the Record whose columns can be named without it; -1: none.
	Bare int
	// Before and After are the indexes of the Records of which changed and became speak; -1: there are none.
	Before, After int
}

// Error is what is wrong with an expression, and where.
type Error struct {
	At   int // of the first character, counted in runes from 0
	Text string
}

func (e *Error) Error() string { return e.Text }

// Use is a column that an expression reads.
type Use struct{ Var, Column int }

// Program is a compiled expression. It may be run by several goroutines.
type Program struct {
	// Type is that of the result.
	Type Type
	// Uses are the columns of Records that are read.
	Uses []Use
	// Warnings name what compiles and can never be so.
	Warnings []Error

	run fn
}

// fn gives the value of a part of an expression. What goes wrong is a panic with a *failure.
type fn func(m *machine) Value

// Want says what an expression is for.
type Want uint8

// What an expression is for.
const (
	Anything  Want = iota
	Condition      // a boolean
	Sequence       // a list
)

const (
	maxSource = 10000 // characters
	maxNodes  = 2000
)

// Compile checks an expression against a scope. An error is an *[Error].
func Compile(src string, scope *Scope, want Want) (p *Program, err error) {
	if n := utf8.RuneCountInString(src); n > maxSource {
		return nil, &Error{Text: fmt.Sprintf("an expression of %d characters; it may have %d", n, maxSource)}
	}
	if strings.TrimSpace(src) == "" {
		return nil, &Error{Text: "an empty expression"}
	}
	cfg := conf.CreateNew()
	cfg.MaxNodes = maxNodes
	tree, err := parser.ParseWithConfig(src, cfg)
	if err != nil {
		var e *file.Error
		if errors.As(err, &e) {
			return nil, &Error{At: e.From, Text: e.Message + meant(e.Message)}
		}
		return nil, &Error{Text: err.Error()}
	}
	c := &compiler{scope: scope, src: []rune(src), program: &Program{}}
	defer func() {
		if r := recover(); r != nil {
			e, ok := r.(*Error)
			if !ok {
				panic(r)
			}
			p, err = nil, e
		}
	}()
	if want == Condition {
		c.program.Type, c.program.run = Type{Kind: Bool}, c.truth(tree.Node)
	} else {
		c.program.Type, c.program.run = c.node(tree.Node)
	}
	if k := c.program.Type.Kind; want == Sequence && k != List && k != Any {
		c.fail(tree.Node, "%s in the place of a list", k)
	}
	return c.program, nil
}

// meant tells somebody who writes SQL how it is said here.
func meant(message string) string {
	for _, m := range []struct{ token, say string }{
		{`Operator("=")`, "; equal is =="}, {`Operator("<>")`, "; not equal is !="}, {`Operator(">")`, "; not equal is !="}, {`Identifier("AND")`, "; it is written and"}, {`Identifier("OR")`, "; it is written or"},
		{`Identifier("NOT")`, "; it is written not"}, {`Identifier("IS")`, "; IS NULL is == nil"}, {`Identifier("is")`, "; IS NULL is == nil"}, {`Identifier("LIKE")`, "; there are contains, startsWith, endsWith and matches"},
		{`Identifier("like")`, "; there are contains, startsWith, endsWith and matches"}, {`Identifier("IN")`, "; it is written in"}, {`Identifier("BETWEEN")`, "; it is written x in 1..10, or with >= and <="}} {
		if strings.Contains(message, m.token) {
			return m.say
		}
	}
	return ""
}

type compiler struct {
	scope   *Scope
	src     []rune
	program *Program
	locals  []Var // let, and the elements of lists that are gone through
	elems   []int // which of locals are elements, the innermost last
	slots   int
}

func (c *compiler) fail(n ast.Node, format string, args ...any) {
	panic(&Error{At: c.start(n), Text: fmt.Sprintf(format, args...)})
}

func (c *compiler) warn(n ast.Node, format string, args ...any) {
	c.program.Warnings = append(c.program.Warnings, Error{At: c.start(n), Text: fmt.Sprintf(format, args...)})
}

// start is where a part of the expression begins: the parser gives an operator's place to what it joins.
func (c *compiler) start(n ast.Node) int {
	at := n.Location().From
	ast.Walk(&n, visitor(func(n ast.Node) { at = min(at, n.Location().From) }))
	return at
}

type visitor func(ast.Node)

func (v visitor) Visit(n *ast.Node) { v(*n) }

func constant(v Value) fn { return func(*machine) Value { return v } }

// node compiles a part.
func (c *compiler) node(n ast.Node) (Type, fn) {
	switch n := n.(type) {
	case *ast.NilNode:
		return Type{Kind: Null}, constant(Value{})
	case *ast.BoolNode:
		return Type{Kind: Bool}, constant(BoolOf(n.Value))
	case *ast.IntegerNode:
		return Type{Kind: Int}, constant(IntOf(int64(n.Value)))
	case *ast.FloatNode:
		return c.decimal(n)
	case *ast.StringNode:
		return Type{Kind: Text}, constant(TextOf(n.Value))
	case *ast.IdentifierNode:
		return c.identifier(n)
	case *ast.MemberNode:
		return c.member(n)
	case *ast.ChainNode:
		return c.node(n.Node)
	case *ast.SliceNode:
		return c.slice(n)
	case *ast.UnaryNode:
		return c.unary(n)
	case *ast.BinaryNode:
		return c.binary(n)
	case *ast.ConditionalNode:
		return c.conditional(n)
	case *ast.ArrayNode:
		return c.array(n)
	case *ast.MapNode:
		return c.object(n)
	case *ast.VariableDeclaratorNode:
		return c.let(n)
	case *ast.PointerNode:
		return c.pointer(n)
	case *ast.BuiltinNode:
		return c.call(n, n.Name, n.Arguments)
	case *ast.CallNode:
		if f, ok := n.Callee.(*ast.IdentifierNode); ok {
			return c.call(n, f.Value, n.Arguments)
		}
		c.fail(n, "values have no methods")
	case *ast.SequenceNode:
		c.fail(n, "one expression is expected, not several with ;")
	}
	c.fail(n, "%s cannot be used here", strings.TrimSpace(n.String()))
	return Type{}, nil
}

// decimal takes a literal as it is written, since 1.10 is not 1.1, and a float has neither exactly.
func (c *compiler) decimal(n *ast.FloatNode) (Type, fn) {
	loc := n.Location()
	v, err := ParseNumeric(strings.ReplaceAll(string(c.src[loc.From:min(loc.To, len(c.src))]), "_", ""))
	if err != nil {
		c.fail(n, "malformed number")
	}
	return Type{Kind: Numeric}, constant(v)
}

func (c *compiler) use(v, column int) {
	if u := (Use{v, column}); !slices.Contains(c.program.Uses, u) {
		c.program.Uses = append(c.program.Uses, u)
	}
}

func (c *compiler) identifier(n *ast.IdentifierNode) (Type, fn) {
	for i := len(c.locals) - 1; i >= 0; i-- {
		if c.locals[i].Name == n.Value {
			return c.locals[i].Type, func(m *machine) Value { return m.locals[i] }
		}
	}
	for i, v := range c.scope.Vars {
		if v.Name == n.Value {
			return v.Type, func(m *machine) Value { return m.vars[i] }
		}
	}
	var known []string
	for _, v := range c.scope.Vars {
		known = append(known, v.Name)
	}
	if b := c.scope.Bare; b >= 0 {
		for i, col := range c.scope.Vars[b].Type.Columns {
			if col.Name == n.Value {
				c.use(b, i)
				return col.Type, func(m *machine) Value { return m.column(n, m.vars[b], i) }
			}
			known = append(known, col.Name)
		}
	}
	if strings.EqualFold(n.Value, "null") || n.Value == "None" {
		c.fail(n, "%s is not known here; NULL is written nil", n.Value)
	}
	c.fail(n, "%s is not known here%s", n.Value, Nearest(n.Value, known))
	return Type{}, nil
}

func (c *compiler) member(n *ast.MemberNode) (Type, fn) {
	t, of := c.node(n.Node)
	if name, ok := n.Property.(*ast.StringNode); ok {
		switch t.Kind {
		case Record:
			var known []string
			for i, col := range t.Columns {
				if col.Name == name.Value {
					if id, ok := n.Node.(*ast.IdentifierNode); ok {
						for v := range c.scope.Vars {
							if c.scope.Vars[v].Name == id.Value {
								c.use(v, i)
							}
						}
					}
					return col.Type, func(m *machine) Value { return m.column(n, of(m), i) }
				}
				known = append(known, col.Name)
			}
			panic(&Error{At: name.Location().From, Text: fmt.Sprintf("%s has no %s%s", strings.TrimSpace(n.Node.String()), name.Value, Nearest(name.Value, known))})
		case Any, Object, Null:
			return Type{Kind: Any}, func(m *machine) Value {
				m.step(n)
				switch v := of(m); v.Kind {
				case Null:
					return Value{}
				case Object:
					return v.Member(name.Value)
				default:
					m.fail(n, "%s has no member %s", v.Kind, name.Value)
					return Value{}
				}
			}
		}
		c.fail(n, "%s has no member %s", t.Kind, name.Value)
	}
	it, index := c.node(n.Property)
	switch {
	case t.Kind == List || t.Kind == Any:
		if it.Kind != Int && it.Kind != Any && it.Kind != Null && (t.Kind == List || it.Kind != Text) {
			c.fail(n.Property, "%s in the place of an index", it.Kind)
		}
		return t.elem(), func(m *machine) Value {
			m.step(n)
			l, i := of(m), index(m)
			switch {
			case l.Kind == Null || i.Kind == Null:
				return Value{}
			case l.Kind == Object && i.Kind == Text:
				return l.Member(i.Text)
			case l.Kind != List || i.Kind != Int:
				m.fail(n, "%s cannot be indexed by %s", l.Kind, i.Kind)
			}
			at := i.Int
			if at < 0 {
				at += int64(len(l.List))
			}
			if at < 0 || at >= int64(len(l.List)) {
				return Value{}
			}
			return l.List[at]
		}
	case t.Kind == Null:
		return t, constant(Value{})
	}
	c.fail(n, "%s cannot be indexed", t.Kind)
	return Type{}, nil
}

func (c *compiler) slice(n *ast.SliceNode) (Type, fn) {
	t, of := c.node(n.Node)
	if t.Kind != List && t.Kind != Text && t.Kind != Any && t.Kind != Null {
		c.fail(n, "%s has no parts", t.Kind)
	}
	bound := func(b ast.Node) fn {
		if b == nil {
			return nil
		}
		bt, f := c.node(b)
		if bt.Kind != Int && bt.Kind != Any && bt.Kind != Null {
			c.fail(b, "%s in the place of an index", bt.Kind)
		}
		return f
	}
	from, to := bound(n.From), bound(n.To)
	return t, func(m *machine) Value {
		m.step(n)
		v := of(m)
		var runes []rune
		size := len(v.List)
		switch v.Kind {
		case Null:
			return v
		case Text:
			runes = []rune(v.Text)
			size = len(runes)
		case List:
		default:
			m.fail(n, "%s has no parts", v.Kind)
		}
		at := func(f fn, without int) int {
			if f == nil {
				return without
			}
			switch i := f(m); {
			case i.Kind != Int:
				m.fail(n, "%s in the place of an index", i.Kind)
			case i.Int < 0:
				return int(max(0, i.Int+int64(size)))
			default:
				return int(min(i.Int, int64(size)))
			}
			return 0
		}
		a, b := at(from, 0), at(to, size)
		b = max(a, b)
		if v.Kind == Text {
			return m.text(n, string(runes[a:b]))
		}
		return Value{Kind: List, List: v.List[a:b:b]}
	}
}

// truth compiles a part that stands in a boolean place.
func (c *compiler) truth(n ast.Node) fn {
	t, f := c.node(n)
	switch t.Kind {
	case Bool, Null:
		return f
	case Any:
		return func(m *machine) Value {
			v := f(m)
			if v.Kind != Bool && v.Kind != Null {
				m.fail(n, "%s in the place of a condition", v.Kind)
			}
			return v
		}
	}
	c.fail(n, "%s in the place of a condition", t.Kind)
	return nil
}

func (c *compiler) unary(n *ast.UnaryNode) (Type, fn) {
	if n.Operator == "not" || n.Operator == "!" {
		f := c.truth(n.Node)
		return Type{Kind: Bool}, func(m *machine) Value { v := f(m); return BoolOf(!v.True()) }
	}
	t, f := c.node(n.Node)
	if !number1(t.Kind) {
		c.fail(n, "%s has no sign", t.Kind)
	}
	if n.Operator == "+" {
		return t, f
	}
	if t.Kind == Null {
		return t, constant(Value{})
	}
	return t, func(m *machine) Value {
		v := f(m)
		if v.Kind == Float { // also of 0
			v.Float = -v.Float
			return v
		}
		return m.arithmetic(n, "-", IntOf(0), v)
	}
}

// number1 tells whether a part may be a number.
func number1(k Kind) bool { return k.isNumber() || k == Any || k == Null }

// joined is the type of what is one or the other.
func joined(a, b Type) (Type, bool) {
	switch {
	case a.Kind == Null:
		return b, true
	case b.Kind == Null:
		return a, true
	case a.Kind == Any || b.Kind == Any:
		return Type{Kind: Any}, true
	case a.Kind == List && b.Kind == List:
		e, ok := joined(a.elem(), b.elem())
		if !ok {
			e = Type{Kind: Any}
		}
		return Type{Kind: List, Elem: &e}, true
	case a.Kind == b.Kind:
		if a.Kind == Text {
			return Type{Kind: Text}, true
		}
		return a, true
	case number1(a.Kind) && number1(b.Kind):
		if a.Kind == Float || b.Kind == Float {
			return Type{Kind: Float}, true
		}
		return Type{Kind: Numeric}, true
	}
	return Type{}, false
}

// as makes a value of the kind that the other branch has, where both are numbers.
func as(t Type, f fn) fn {
	switch t.Kind {
	case Numeric:
		return func(m *machine) Value {
			v := f(m)
			if v.Kind == Int {
				return numericOf(v.Int)
			}
			return v
		}
	case Float:
		return func(m *machine) Value {
			v := f(m)
			if v.Kind == Int || v.Kind == Numeric {
				return Value{Kind: Float, Float: toFloat(v)}
			}
			return v
		}
	}
	return f
}

func (c *compiler) conditional(n *ast.ConditionalNode) (Type, fn) {
	cond := c.truth(n.Cond)
	at, a := c.node(n.Exp1)
	bt, b := c.node(n.Exp2)
	t, ok := joined(at, bt)
	if !ok {
		c.fail(n.Exp2, "%s or %s: it is to be one of them", at.Kind, bt.Kind)
	}
	a, b = as(t, a), as(t, b)
	return t, func(m *machine) Value {
		if v := cond(m); v.True() {
			return a(m)
		}
		return b(m)
	}
}

func (c *compiler) array(n *ast.ArrayNode) (Type, fn) {
	elem := Type{Kind: Null}
	fs := make([]fn, len(n.Nodes))
	for i := range n.Nodes {
		t, f := c.node(n.Nodes[i])
		fs[i] = f
		var ok bool
		if elem, ok = joined(elem, t); !ok {
			elem = Type{Kind: Any}
		}
	}
	if elem.Kind == Null {
		elem.Kind = Any
	}
	return Type{Kind: List, Elem: &elem}, func(m *machine) Value {
		v := Value{Kind: List, List: make([]Value, len(fs))}
		m.grow(n, len(fs)*valueBytes)
		for i, f := range fs {
			v.List[i] = f(m)
		}
		return v
	}
}

func (c *compiler) object(n *ast.MapNode) (Type, fn) {
	names, fs := make([]string, len(n.Pairs)), make([]fn, len(n.Pairs))
	for i := range n.Pairs {
		p := n.Pairs[i].(*ast.PairNode)
		name, ok := p.Key.(*ast.StringNode)
		if !ok {
			c.fail(p.Key, "a name that is computed")
		}
		if slices.Contains(names[:i], name.Value) {
			c.fail(p.Key, "%s is given twice", name.Value)
		}
		names[i] = name.Value
		_, fs[i] = c.node(p.Value)
	}
	return Type{Kind: Object}, func(m *machine) Value {
		v := Value{Kind: Object, Object: make([]Member, len(fs))}
		m.grow(n, len(fs)*valueBytes)
		for i, f := range fs {
			v.Object[i] = Member{names[i], f(m)}
		}
		return v
	}
}

// local makes room for one more value while an expression runs.
func (c *compiler) local(name string, t Type) int {
	c.locals = append(c.locals, Var{name, t})
	c.slots = max(c.slots, len(c.locals))
	return len(c.locals) - 1
}

func (c *compiler) let(n *ast.VariableDeclaratorNode) (Type, fn) {
	t, value := c.node(n.Value)
	i := c.local(n.Name, t)
	bt, body := c.node(n.Expr)
	c.locals = c.locals[:i]
	return bt, func(m *machine) Value {
		m.set(i, value(m))
		return body(m)
	}
}

func (c *compiler) pointer(n *ast.PointerNode) (Type, fn) {
	if n.Name != "" || len(c.elems) == 0 {
		c.fail(n, "#%s is not known here", n.Name)
	}
	i := c.elems[len(c.elems)-1]
	return c.locals[i].Type, func(m *machine) Value { return m.locals[i] }
}
