package yamlfile

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/backstory-dev/backstory/internal/expr"
)

// Problem is what is wrong, and where. Lines and columns count from 1.
type Problem struct {
	File         string
	Line, Column int
	Text         string
}

func (p *Problem) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Text)
}

// Problems is everything that is wrong with a file, in its order.
type Problems []*Problem

func (p Problems) Error() string {
	var b strings.Builder
	for i, x := range p {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(x.Error())
	}
	return b.String()
}

// File collects what is wrong with one.
type File struct {
	name     string
	lines    []string
	problems Problems
}

// Node is a part of a file.
type Node struct {
	file *File
	n    ast.Node
}

// Parse reads a file. A nil node and no error mean that it has nothing but comments.
func Parse(name string, src []byte) (*File, *Node, error) {
	f := &File{name: name, lines: strings.Split(string(src), "\n")}
	tree, err := parser.ParseBytes(src, 0)
	if err != nil {
		var syntax interface {
			GetToken() *token.Token
			GetMessage() string
		}
		p := &Problem{File: name, Line: 1, Column: 1, Text: err.Error()}
		if errors.As(err, &syntax) && syntax.GetToken() != nil {
			at := syntax.GetToken().Position
			p.Line, p.Column, p.Text = at.Line, at.Column, syntax.GetMessage()
		}
		return f, nil, Problems{p}
	}
	var docs []*ast.DocumentNode
	for _, d := range tree.Docs {
		if d.Body != nil {
			docs = append(docs, d)
		}
	}
	switch len(docs) {
	case 0:
		return f, nil, nil
	case 1:
		return f, &Node{f, docs[0].Body}, nil
	}
	return f, nil, Problems{{File: name, Line: docs[1].Body.GetToken().Position.Line, Column: 1, Text: "a second document; a file is to have one"}}
}

// Problems gives what was found to be wrong, in the file's order; nil if nothing was.
func (f *File) Problems() error {
	if len(f.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(f.problems, func(a, b *Problem) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return f.problems
}

// Noted gives what was found to be wrong so far.
func (f *File) Noted() Problems { return f.problems }

// Take gives what Problems gives, and forgets it.
func (f *File) Take() Problems {
	_ = f.Problems()
	p := f.problems
	f.problems = nil
	return p
}

// Place is a place in a file.
type Place struct {
	file         *File
	Line, Column int
}

// Fail notes what is wrong there.
func (p Place) Fail(format string, args ...any) {
	p.file.problems = append(p.file.problems, p.Problem(format, args...))
}

// Problem gives what Fail notes.
func (p Place) Problem(format string, args ...any) *Problem {
	return &Problem{p.file.name, p.Line, p.Column, fmt.Sprintf(format, args...)}
}

// Place tells where a part begins.
func (n *Node) Place() Place {
	at := n.n.GetToken().Position
	if m, ok := n.n.(*ast.MappingNode); ok && !m.IsFlowStyle && len(m.Values) > 0 {
		at = m.Values[0].Key.GetToken().Position
	}
	return Place{n.file, at.Line, at.Column}
}

// Fail notes what is wrong with a part.
func (n *Node) Fail(format string, args ...any) { n.Place().Fail(format, args...) }

// plain refuses what makes a part something else than it looks like.
func (n *Node) plain() bool {
	switch n.n.(type) {
	case *ast.TagNode:
		n.Fail("%s is a YAML tag here: put the text in quotes", strings.Fields(n.n.GetToken().Value + " ")[0])
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		n.Fail("anchors and aliases are not taken: write it out")
	default:
		return true
	}
	return false
}

// Member is a name in a mapping and what it stands for.
type Member struct {
	Name  string
	Place Place
	Value *Node
}

// Members gives those of a mapping, in the file's order; what says what it is, in messages.
func (n *Node) Members(what string) (out []Member) {
	if !n.plain() {
		return nil
	}
	var values []*ast.MappingValueNode
	switch m := n.n.(type) {
	case *ast.MappingNode:
		values = m.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{m}
	case *ast.NullNode:
		return nil
	default:
		n.Fail("%s is to be a mapping, name: value", what)
		return nil
	}
	for _, v := range values {
		key := &Node{n.file, v.Key}
		if !key.plain() {
			continue
		}
		name, ok := key.scalar()
		if !ok {
			key.Fail("a name is expected")
			continue
		}
		if slices.ContainsFunc(out, func(o Member) bool { return o.Name == name }) {
			key.Fail("%s is given twice", name)
			continue
		}
		out = append(out, Member{name, key.Place(), &Node{n.file, v.Value}})
	}
	return out
}

// Fields calls for each member of a mapping the function of its name. Another name is wrong.
func (n *Node) Fields(what string, fields map[string]func(*Node)) {
	for _, m := range n.Members(what) {
		f := fields[m.Name]
		if f == nil {
			var known []string
			for k := range fields {
				known = append(known, k)
			}
			slices.Sort(known)
			m.Place.Fail("%s has no %s%s", what, m.Name, expr.Nearest(m.Name, known))
			continue
		}
		f(m.Value)
	}
}

// Items gives the parts of a list. A single value stands for a list of it.
func (n *Node) Items() (out []*Node) {
	if !n.plain() {
		return nil
	}
	if s, ok := n.n.(*ast.SequenceNode); ok {
		for _, v := range s.Values {
			out = append(out, &Node{n.file, v})
		}
		return out
	}
	if _, ok := n.n.(*ast.NullNode); ok {
		return nil
	}
	return []*Node{n}
}

// scalar gives the text of a value that is neither a list nor a mapping, as it is written.
func (n *Node) scalar() (string, bool) {
	switch v := n.n.(type) {
	case *ast.StringNode:
		return v.Value, true
	case *ast.LiteralNode:
		return v.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.NullNode, *ast.InfinityNode, *ast.NanNode:
		return v.GetToken().Value, true
	}
	return "", false
}

// Text gives a text; what says what it is.
func (n *Node) Text(what string) string {
	if !n.plain() {
		return ""
	}
	s, ok := n.scalar()
	if _, null := n.n.(*ast.NullNode); !ok || null || s == "" {
		n.Fail("%s is to be a text", what)
		return ""
	}
	return s
}

// Texts gives a list of texts, of which none is there twice.
func (n *Node) Texts(what string) (out []Text) {
	for _, i := range n.Items() {
		t := Text{i.Text(what), i.Place()}
		if slices.ContainsFunc(out, func(o Text) bool { return o.Value == t.Value && t.Value != "" }) {
			i.Fail("%s is given twice", t.Value)
			continue
		}
		if t.Value != "" {
			out = append(out, t)
		}
	}
	return out
}

// Text is a text and where it stands.
type Text struct {
	Value string
	Place Place
}

// Bool gives true or false.
func (n *Node) Bool(what string) bool {
	b, ok := n.n.(*ast.BoolNode)
	if !ok {
		n.Fail("%s is to be true or false", what)
		return false
	}
	return b.Value
}

// Int gives an integer of a range.
func (n *Node) Int(what string, least, most int64) int64 {
	if i, ok := n.n.(*ast.IntegerNode); ok {
		var v int64
		switch x := i.Value.(type) {
		case int64:
			v = x
		case uint64:
			if v = int64(min(x, 1<<62)); x > 1<<62 {
				v = 1 << 62
			}
		}
		if v >= least && v <= most {
			return v
		}
	}
	n.Fail("%s is to be an integer from %d to %d", what, least, most)
	return least
}

// IsMapping tells whether a part is one.
func (n *Node) IsMapping() bool {
	switch n.n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return true
	}
	return false
}

// Expression is the text of an expression and where it stands.
type Expression struct {
	Text string
	at   Place
	// lines of a block scalar begin at this column; 0: it is no block.
	indent int
	quote  int // 1 where it is in quotes
}

// Expression gives a part as the text of an expression.
func (n *Node) Expression(what string) (Expression, bool) {
	if !n.plain() {
		return Expression{}, false
	}
	s, ok := n.scalar()
	if _, null := n.n.(*ast.NullNode); null || !ok || strings.TrimSpace(s) == "" {
		n.Fail("%s is to be an expression; one that begins with ! or has a # in it has to be in quotes", what)
		return Expression{}, false
	}
	e := Expression{Text: s, at: n.Place()}
	tok := n.n.GetToken()
	if l, ok := n.n.(*ast.LiteralNode); ok {
		line := l.Start.Position.Line // its text begins in the next one
		e.at.Line = line + 1
		if line < len(n.file.lines) {
			text := n.file.lines[line]
			e.indent = len(text) - len(strings.TrimLeft(text, " ")) + 1
		}
		return e, true
	}
	if tok.Type == token.SingleQuoteType || tok.Type == token.DoubleQuoteType {
		e.quote = 1
		return e, true
	}
	if next := tok.Next; next != nil && next.Type == token.CommentType && next.Position.Line == tok.Position.Line {
		Place{n.file, next.Position.Line, next.Position.Column}.Fail("a # begins a comment, which cuts this expression off: put the expression in quotes, or the comment in a line of its own")
		return Expression{}, false
	}
	return e, true
}

// Place tells where a character of the expression stands, counted from 0.
func (e *Expression) Place(at int) Place {
	p := e.at
	if e.indent == 0 {
		p.Column += e.quote + at
		return p
	}
	p.Column = e.indent
	for i, r := range []rune(e.Text) {
		if i == at {
			break
		}
		p.Column++
		if r == '\n' {
			p.Line++
			p.Column = e.indent
		}
	}
	return p
}

// Compile compiles the expression, and notes what is wrong with it; nil then. warn is told of what can never be.
func (e *Expression) Compile(scope *expr.Scope, want expr.Want, warn func(Place, string)) *expr.Program {
	p, err := expr.Compile(e.Text, scope, want)
	if err != nil {
		var x *expr.Error
		if errors.As(err, &x) {
			e.Place(x.At).Fail("%s", x.Text)
		} else {
			e.at.Fail("%s", err)
		}
		return nil
	}
	for _, w := range p.Warnings {
		if warn != nil {
			warn(e.Place(w.At), w.Text)
		}
	}
	return p
}
