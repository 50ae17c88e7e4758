package rules

import (
	"bytes"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/backstory-dev/backstory/eventlog"
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
	name     string
	place    yamlfile.Place
	table    yamlfile.Text
	quiet    []yamlfile.Text
	given    bool // quiet is given, though perhaps empty
	rules    []*rule
	children []*child
	links    []link
}

// link says that events are found under a further entity.
type link struct {
	aggregate string
	place     yamlfile.Place
	key       []yamlfile.Text
}

// child is a table whose rows belong to an aggregate's entities.
type child struct {
	of    *aggregate
	place yamlfile.Place
	table string
	key   []yamlfile.Text // columns with the key of the entity
	as    string
	where *yamlfile.Expression
	quiet []yamlfile.Text
	given bool
	links []link
}

// rule is an event that a row change can become.
type rule struct {
	name  string
	place yamlfile.Place
	on    []yamlfile.Text
	child *child  // whose rows it is about; nil: the aggregate's own
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
	for i, line := range bytes.Split(src, []byte{'\n'}) {
		if !utf8.Valid(line) || bytes.IndexByte(line, 0) >= 0 {
			return nil, yamlfile.Problems{{File: name, Line: i + 1, Column: 1, Text: "this line is not UTF-8 text: save the file as UTF-8"}}
		}
	}
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
		var events []yamlfile.Member
		m.Value.Fields("an aggregate", map[string]func(*yamlfile.Node){
			"links": func(n *yamlfile.Node) { a.links = parseLinks(n) },
			"children": func(n *yamlfile.Node) {
				for _, c := range n.Members("children") {
					a.parseChild(c)
				}
			},
			"table": func(n *yamlfile.Node) { a.table = yamlfile.Text{Value: n.Text("table"), Place: n.Place()} },
			"quiet": func(n *yamlfile.Node) { a.quiet, a.given = n.Texts("a quiet column"), true },
			"events": func(n *yamlfile.Node) {
				for _, e := range n.Members("events") {
					if other := types[e.Name]; other != "" {
						e.Place.Fail("%s is an event of %s already", e.Name, other)
						continue
					}
					types[e.Name] = a.name
					events = append(events, e)
				}
			},
		})
		for _, e := range events { // which can name the children
			a.parseRule(e)
		}
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
	for _, a := range f.aggregates {
		for _, list := range append([]*child{nil}, a.children...) {
			if n := len(a.of(list)); n > eventlog.MaxParts {
				a.place.Fail("%d events of one table; there may be %d", n, eventlog.MaxParts)
			}
		}
		f.checkLinks(a.links)
		for _, c := range a.children {
			f.checkLinks(c.links)
			if o := f.owner(c.table); o != nil {
				c.place.Fail("%s is the table of %s: its rows are entities of their own", c.table, o.name)
			}
		}
	}
}

func (f *File) checkLinks(list []link) {
	var known []string
	for _, a := range f.aggregates {
		known = append(known, a.name)
	}
	for _, l := range list {
		if !slices.Contains(known, l.aggregate) {
			l.place.Fail("the file has no aggregate %s%s", l.aggregate, expr.Nearest(l.aggregate, known))
		}
		if len(l.key) == 0 {
			l.place.Fail("%s needs the column that holds its key", l.aggregate)
		}
	}
}

// owner is the aggregate whose table this is.
func (f *File) owner(table string) *aggregate {
	for _, a := range f.aggregates {
		if qualified(a.table.Value) == qualified(table) {
			return a
		}
	}
	return nil
}

func parseLinks(n *yamlfile.Node) (out []link) {
	for _, m := range n.Members("links") {
		out = append(out, link{m.Name, m.Place, m.Value.Texts("key")})
	}
	return out
}

func (a *aggregate) parseChild(m yamlfile.Member) {
	c := &child{of: a, place: m.Place, table: m.Name, as: m.Name[strings.LastIndex(m.Name, ".")+1:]}
	m.Value.Fields("a child", map[string]func(*yamlfile.Node){
		"key":   func(n *yamlfile.Node) { c.key = n.Texts("key") },
		"as":    func(n *yamlfile.Node) { c.as = n.Text("as") },
		"links": func(n *yamlfile.Node) { c.links = parseLinks(n) },
		"where": func(n *yamlfile.Node) {
			if e, ok := n.Expression("where"); ok {
				c.where = &e
			}
		},
		"quiet": func(n *yamlfile.Node) { c.quiet, c.given = n.Texts("a quiet column"), true },
	})
	if len(c.key) == 0 {
		m.Place.Fail("%s needs key: the column that holds the key of its %s", m.Name, a.name)
	}
	for _, o := range a.children {
		if o.as == c.as {
			m.Place.Fail("%s has %s already: give this one another name by as", a.name, c.as)
		}
	}
	a.children = append(a.children, c)
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
	for i, on := range r.on {
		as, name, of := strings.Cut(on.Value, ".")
		var child *child
		if !of {
			name = on.Value
		} else {
			var known []string
			for _, c := range a.children {
				if known = append(known, c.as); c.as == as {
					child = c
				}
			}
			if child == nil {
				on.Place.Fail("%s has no children %s%s", a.name, as, expr.Nearest(as, known))
				continue
			}
		}
		if i > 0 && child != r.child {
			on.Place.Fail("one event is about rows of one table: %s and %s are two", r.on[0].Value, on.Value)
			continue
		}
		r.child = child
		op := slices.Index(opNames[:], name)
		if op < 0 {
			on.Place.Fail("on is insert, update or delete, or items.insert of children, not %s%s", on.Value, expr.Nearest(name, opNames[:]))
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
				m.Place.Fail("%s is a name that the log itself has for what happens: give it another one", m.Name)
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

// Names gives the events that the file's rules make, in its order.
func (f *File) Names() (out []string) {
	for _, a := range f.aggregates {
		for _, r := range a.rules {
			out = append(out, r.name)
		}
	}
	return out
}
