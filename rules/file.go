package rules

import (
	"slices"
	"strings"

	"github.com/backstory-dev/backstory/internal/expr"
	"github.com/backstory-dev/backstory/internal/yamlfile"
)

// File is backstory.yaml.
type File struct {
	name       string
	text       string
	file       *yamlfile.File
	aggregates []*aggregate

	compiler
}

// aggregate is what the file says of one.
type aggregate struct {
	name  string
	place yamlfile.Place
	table yamlfile.Text
	quiet []yamlfile.Text
	given bool // quiet is given, though perhaps empty
	rules []*rule
}

// rule is an event that a row change can become.
type rule struct {
	name  string
	place yamlfile.Place
	on    []yamlfile.Text
	ops   [3]bool // insert, update, delete
	when  *yamlfile.Expression
	data  []yamlfile.Text // columns
	with  []attribute
}

// attribute is one that a rule adds.
type attribute struct {
	name  string
	place yamlfile.Place
	value yamlfile.Expression
}

const (
	onInsert = iota
	onUpdate
	onDelete
)

var opNames = [...]string{"insert", "update", "delete"}

// Parse reads a file. What is wrong with it comes as yamlfile.Problems, each with its place; nil and no error: it says nothing.
func Parse(name string, src []byte) (*File, error) {
	y, root, err := yamlfile.Parse(name, src)
	if err != nil {
		return nil, err
	}
	f := &File{name: name, text: string(src), file: y}
	if root != nil {
		root.Fields("backstory.yaml", map[string]func(*yamlfile.Node){"aggregates": f.parseAggregates})
	}
	if err := y.Problems(); err != nil {
		return nil, err
	}
	return f, nil
}

// Text is what the rules were made of.
func (f *File) Text() string { return f.text }

// Aggregates and Events tell how many of them the file speaks of.
func (f *File) Aggregates() int { return len(f.aggregates) }

// Events tells how many events the file's rules make.
func (f *File) Events() (n int) {
	for _, a := range f.aggregates {
		n += len(a.rules)
	}
	return n
}

func (f *File) parseAggregates(n *yamlfile.Node) {
	types := map[string]string{}
	for _, m := range n.Members("aggregates") {
		a := &aggregate{name: m.Name, place: m.Place}
		if !isName(m.Name) {
			m.Place.Fail("%q is no name of an aggregate: letters, digits and _, a letter first", m.Name)
		}
		if m.Name == "Source" {
			m.Place.Fail("Source is the aggregate of what happens to the source as a whole")
		}
		m.Value.Fields("an aggregate", map[string]func(*yamlfile.Node){
			"table": func(n *yamlfile.Node) { a.table = yamlfile.Text{Value: n.Text("table"), Place: n.Place()} },
			"quiet": func(n *yamlfile.Node) { a.quiet, a.given = n.Texts("a quiet column"), true },
			"events": func(n *yamlfile.Node) {
				for _, e := range n.Members("events") {
					if other := types[e.Name]; other != "" {
						e.Place.Fail("%s is an event of %s already", e.Name, other)
						continue
					}
					types[e.Name] = a.name
					a.parseRule(e)
				}
			},
		})
		if a.table.Value == "" {
			m.Place.Fail("%s needs a table", m.Name)
			continue
		}
		for _, o := range f.aggregates {
			if qualified(o.table.Value) == qualified(a.table.Value) {
				a.table.Place.Fail("%s is the table of %s already", a.table.Value, o.name)
			}
		}
		f.aggregates = append(f.aggregates, a)
	}
}

// taken are the endings of default events that no rule may have, and the operations for which that is so; none: for all.
var taken = map[string][]int{"Created": {onInsert}, "Deleted": {onDelete}, "Updated": nil, "Touched": nil, "Imported": nil, "Truncated": nil, "Healed": nil,
	"Altered": nil, "Discarded": nil, "BaselineEnded": nil, "Restored": nil, "Reverted": nil}

func (a *aggregate) parseRule(m yamlfile.Member) {
	r := &rule{name: m.Name, place: m.Place}
	if !isName(m.Name) {
		m.Place.Fail("%q is no name of an event: letters, digits and _, a letter first", m.Name)
	}
	m.Value.Fields("an event", map[string]func(*yamlfile.Node){
		"on": func(n *yamlfile.Node) { r.on = n.Texts("on") },
		"when": func(n *yamlfile.Node) {
			if e, ok := n.Expression("when"); ok {
				r.when = &e
			}
		},
		"data": func(n *yamlfile.Node) { r.data = n.Texts("a column") },
		"with": func(n *yamlfile.Node) {
			for _, w := range n.Members("with") {
				if e, ok := w.Value.Expression("an attribute"); ok {
					r.with = append(r.with, attribute{w.Name, w.Place, e})
				}
			}
		},
	})
	for _, on := range r.on {
		op := slices.Index(opNames[:], on.Value)
		if op < 0 {
			on.Place.Fail("on is insert, update or delete, not %s%s", on.Value, expr.Nearest(on.Value, opNames[:]))
			continue
		}
		r.ops[op] = true
	}
	if len(r.on) == 0 {
		m.Place.Fail("%s needs on: insert, update or delete, or a list of them", m.Name)
	}
	for ending, ops := range taken {
		if strings.TrimPrefix(m.Name, a.name) != ending {
			continue
		}
		for op, on := range r.ops {
			if on && (ops == nil || slices.Contains(ops, op)) {
				m.Place.Fail("%s is what an %s becomes without a rule: give it another name", m.Name, opNames[op])
				break
			}
		}
	}
	for _, w := range r.with {
		if slices.ContainsFunc(r.data, func(c yamlfile.Text) bool { return c.Value == w.name }) {
			w.place.Fail("%s is in data already", w.name)
		}
	}
	a.rules = append(a.rules, r)
}

// isName tells whether a text can be the name of an aggregate or an event.
func isName(s string) bool {
	for i, r := range s {
		letter := r == '_' && i > 0 || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r > 127
		if !letter && (i == 0 || r < '0' || r > '9') {
			return false
		}
	}
	return s != ""
}

// qualified gives a table's name with its schema, which is public where none is given.
func qualified(table string) string {
	if strings.Contains(table, ".") {
		return table
	}
	return "public." + table
}
