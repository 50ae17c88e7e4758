package rules

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/expr"
	"github.com/backstory-dev/backstory/internal/yamlfile"
)

// compiler keeps what a file was compiled to.
type compiler struct {
	mu      sync.Mutex // guards the following
	trouble []string
	tables  map[string]*eventlog.Relation // those that are known, by name
}

// Know tells the file of the tables that are captured: what their keys are.
func (f *File) Know(tables []*eventlog.Relation) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.know(tables...)
}

func (f *File) know(tables ...*eventlog.Relation) {
	if f.tables == nil {
		f.tables = map[string]*eventlog.Relation{}
	}
	for _, r := range tables {
		f.tables[r.String()] = r
	}
}

// Trouble tells which rules do not fit the tables as they have become since they were checked, and why.
func (f *File) Trouble() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.trouble)
}

// Table gives the rules of one version of a table; nil: the file does not speak of it. It belongs to one goroutine. Rules that do not fit are left out.
func (f *File) Table(r *eventlog.Relation) *eventlog.TableRules {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.know(r)
	t := f.compileTable(r, nil)
	if err := f.file.Take(); err != nil {
		for _, p := range err {
			if text := fmt.Sprintf("%s as it is now: %s", r, p); !slices.Contains(f.trouble, text) {
				f.trouble = append(f.trouble, text)
			}
		}
	}
	return t
}

// Finding is something about a file that is not wrong, but can hardly be meant.
type Finding = yamlfile.Problem

// Check compiles the file against the captured tables. The error is yamlfile.Problems: all that is wrong, in the file's order.
func (f *File) Check(tables []*eventlog.Relation) (warnings []Finding, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	warn := func(p yamlfile.Place, text string) {
		if w := *p.Problem("%s", text); !slices.Contains(warnings, w) {
			warnings = append(warnings, w)
		}
	}
	var known []string
	for _, r := range tables {
		known = append(known, short(r.String()))
	}
	slices.Sort(known)
	known = slices.Compact(known)
	for _, a := range f.aggregates {
		there := func(table string, p yamlfile.Place) {
			if !slices.ContainsFunc(tables, func(r *eventlog.Relation) bool { return r.String() == qualified(table) }) {
				p.Fail("no table %s is captured%s", table, expr.Nearest(table, known))
			}
		}
		there(a.table.Value, a.table.Place)
		for _, c := range a.children {
			there(c.table, c.place)
		}
	}
	f.know(tables...)
	for _, r := range tables {
		f.compileTable(r, warn)
	}
	if p := f.file.Take(); p != nil {
		return warnings, p
	}
	return warnings, nil
}

// short leaves the schema public out of a table's name.
func short(table string) string {
	if len(table) > 7 && table[:7] == "public." {
		return table[7:]
	}
	return table
}

// compileTable makes the rules of a version of a table; nil: the file does not speak of it. What is wrong is noted in the file's problems.
func (f *File) compileTable(r *eventlog.Relation, warn func(yamlfile.Place, string)) *eventlog.TableRules {
	if a := f.owner(r.String()); a != nil {
		return &eventlog.TableRules{Aggregate: a.name, RowRules: f.compile(a.of(nil), a.quiet, a.given, r, warn), Links: f.compileLinks(a.links, r, warn)}
	}
	out := &eventlog.TableRules{}
	row := newTyper(r)
	var wheres []*expr.Program
	dynamic := false
	for _, a := range f.aggregates {
		for _, c := range a.children {
			if qualified(c.table) != r.String() {
				continue
			}
			n := len(f.file.Noted())
			filing := f.filing(a, c.key, c.place, r, warn)
			for _, l := range f.compileLinks(c.links, r, warn) {
				if !slices.ContainsFunc(out.Links, func(o eventlog.Filing) bool { return o.Aggregate == l.Aggregate && slices.Equal(o.Key, l.Key) }) {
					out.Links = append(out.Links, l)
				}
			}
			var where *expr.Program
			if c.where != nil {
				where, dynamic = c.where.Compile(&expr.Scope{Vars: []expr.Var{{Name: "row", Type: row.record}}, Bare: 0, Before: -1, After: -1}, expr.Condition, warn), true
			}
			if len(f.file.Noted()) > n {
				continue
			}
			filing.RowRules = f.compile(a.of(c), c.quiet, c.given, r, warn)
			out.Filings, wheres = append(out.Filings, filing), append(wheres, where)
			if where == nil {
				dynamic = dynamic || len(wheres) > 1
			}
		}
	}
	if len(out.Filings) == 0 {
		return nil
	}
	if dynamic {
		out.File = func(c *eventlog.RowChange, after bool) (int, error) { return row.choose(wheres, c, after) }
	}
	return out
}

// filing says that rows belong to an aggregate's entities, by the columns that hold their key.
func (f *File) filing(a *aggregate, key []yamlfile.Text, place yamlfile.Place, r *eventlog.Relation, warn func(yamlfile.Place, string)) eventlog.Filing {
	out := eventlog.Filing{Aggregate: a.name, Table: qualified(a.table.Value)}
	var names []string
	for i := range r.Columns {
		names = append(names, r.Columns[i].Name)
	}
	for _, k := range key {
		if i := slices.Index(names, k.Value); i >= 0 {
			out.Key = append(out.Key, i)
		} else {
			k.Place.Fail("%s has no column %s%s", short(r.String()), k.Value, expr.Nearest(k.Value, names))
		}
	}
	of := f.tables[out.Table]
	if of == nil {
		return out
	}
	out.IDType = eventlog.IDType(of)
	if len(out.Key) == len(key) && len(key) != len(of.Key) {
		var columns []string
		for _, k := range of.Key {
			columns = append(columns, of.Columns[k].Name)
		}
		place.Fail("the key of %s has %d columns (%s), and this has %d", short(of.String()), len(of.Key), strings.Join(columns, ", "), len(key))
		return out
	}
	for i := 0; i < len(out.Key) && warn != nil; i++ {
		mine, theirs := &r.Columns[out.Key[i]], &of.Columns[of.Key[i]]
		if mine.Type.Kind != theirs.Type.Kind || eventlog.IDType(&eventlog.Relation{Columns: r.Columns, Key: out.Key[i : i+1]}) != eventlog.IDType(&eventlog.Relation{Columns: of.Columns, Key: of.Key[i : i+1]}) {
			warn(key[i].Place, fmt.Sprintf("%s.%s is %s, %s.%s is %s: a row whose value is none of that type belongs to nothing", short(r.String()), mine.Name, mine.Type.Name, short(of.String()), theirs.Name, theirs.Type.Name))
		}
	}
	return out
}

// compileLinks gives the further entities under which a table's events are found. Those that do not fit are noted, and left out.
func (f *File) compileLinks(list []link, r *eventlog.Relation, warn func(yamlfile.Place, string)) (out []eventlog.Filing) {
	for _, l := range list {
		for _, a := range f.aggregates {
			if n := len(f.file.Noted()); a.name == l.aggregate {
				if filing := f.filing(a, l.key, l.place, r, warn); len(f.file.Noted()) == n {
					out = append(out, filing)
				}
			}
		}
	}
	return out
}

// of gives the rules of an aggregate that are about rows of its children, or its own.
func (a *aggregate) of(c *child) (out []*rule) {
	for _, r := range a.rules {
		if r.child == c {
			out = append(out, r)
		}
	}
	return out
}

func newTyper(r *eventlog.Relation) *typer {
	t := &typer{rel: r, updates: make([][]int, len(r.Columns)), record: expr.Type{Kind: expr.Record}}
	for i := range r.Columns {
		c := &r.Columns[i]
		t.names = append(t.names, c.Name)
		t.record.Columns = append(t.record.Columns, expr.Column{Name: c.Name, Type: expr.TypeOf(&c.Type)})
	}
	t.before.of, t.after.of = t, t
	t.after.after = true
	return t
}

// choose gives the first of several conditions that holds for the row before or after a change; -1: none does.
func (t *typer) choose(wheres []*expr.Program, c *eventlog.RowChange, after bool) (int, error) {
	t.change = c
	row := &t.before
	if after {
		row = &t.after
	}
	for i, w := range wheres {
		if w == nil {
			return i, nil
		}
		v, err := run(w, expr.Env{Vars: []expr.Value{{Kind: expr.Record, Record: row}}})
		var source *sourceError
		switch {
		case errors.As(err, &source):
			return -1, source.error
		case errors.Is(err, errUnknown):
			return -1, nil
		case err != nil:
			c.Fail("where", err)
		case err == nil && v.True():
			return i, nil
		}
	}
	return -1, nil
}

// compile makes the rules of rows of a version of a table. What is wrong is noted in the file's problems.
func (f *File) compile(list []*rule, quiet []yamlfile.Text, given bool, r *eventlog.Relation, warn func(yamlfile.Place, string)) eventlog.RowRules {
	out, _ := f.typer(list, quiet, given, r, warn)
	return out
}

func (f *File) typer(list []*rule, quiet []yamlfile.Text, given bool, r *eventlog.Relation, warn func(yamlfile.Place, string)) (out eventlog.RowRules, t *typer) {
	t = newTyper(r)
	if given {
		out.Quiet = make([]bool, len(r.Columns))
		for _, q := range quiet {
			if i := slices.Index(t.names, q.Value); i >= 0 {
				out.Quiet[i] = true
			} else {
				q.Place.Fail("%s has no column %s%s", short(r.String()), q.Value, expr.Nearest(q.Value, t.names))
			}
		}
	}
	t.quiet = out.Quiet
	if t.quiet == nil {
		for _, n := range t.names {
			t.quiet = append(t.quiet, eventlog.QuietByConvention(n))
		}
	}
	scope := &expr.Scope{Vars: []expr.Var{{Name: "before", Type: t.record}, {Name: "after", Type: t.record}}, Bare: 1, Before: 0, After: 1}
	for _, rule := range list {
		n := len(f.file.Noted())
		scope.Bare = 1
		if rule.ops == [3]bool{onDelete: true} { // there is nothing after
			scope.Bare = 0
		}
		c := rule.compile(scope, r, t.names, warn)
		if len(f.file.Noted()) == n {
			t.add(c)
		}
	}
	if len(t.rules) > 0 {
		out.Type = t.parts
	}
	return out, t
}

// compiled is a rule for one version of a table.
type compiled struct {
	*rule
	columns []bool // data; nil: all
	when    *expr.Program
	with    []*expr.Program
	names   [][]byte // of these: "name":
}

func (r *rule) compile(scope *expr.Scope, rel *eventlog.Relation, names []string, warn func(yamlfile.Place, string)) *compiled {
	c := &compiled{rule: r}
	if r.data != nil {
		c.columns = make([]bool, len(names))
		for _, d := range r.data {
			i := slices.Index(names, d.Value)
			switch {
			case i >= 0:
				c.columns[i] = true
			case slices.ContainsFunc(rel.Generated, func(g eventlog.Generated) bool { return g.Name == d.Value }):
				d.Place.Fail("%s is a generated column, which the source does not tell: use those that it is made of, or with", d.Value)
			default:
				d.Place.Fail("%s has no column %s%s", short(rel.String()), d.Value, expr.Nearest(d.Value, names))
			}
		}
	}
	if r.when != nil {
		if c.when = r.when.Compile(scope, expr.Condition, warn); c.when != nil && warn != nil && r.never(c.when) {
			warn(r.when.Place(0), "this is never so "+map[bool]string{true: "on insert, as there every column is NULL before", false: "on delete, as there every column is NULL after"}[r.ops[onInsert]])
		}
	}
	for i := range r.with {
		w := &r.with[i]
		c.with = append(c.with, w.value.Compile(scope, expr.Anything, warn))
		c.names = append(c.names, append(eventlog.AppendString(nil, []byte(w.name)), ':'))
		if r.data == nil { // the event has it once
			n := slices.Index(names, w.name)
			if n >= 0 && r.ops[onUpdate] {
				w.place.Fail("%s is a column: an update's event has it already, or lacks it, as it changed or not. List the event's columns in data, or give the attribute another name", w.name)
			} else if n >= 0 {
				if c.columns == nil {
					c.columns = slices.Repeat([]bool{true}, len(names))
				}
				c.columns[n] = false
			}
		}
	}
	return c
}

// never tells whether a condition cannot hold in a rule of inserts alone, or of deletes alone, whatever the row is.
func (r *rule) never(when *expr.Program) bool {
	nothing, unknown := expr.Value{Kind: expr.Record, Record: blank{nil}}, expr.Value{Kind: expr.Record, Record: blank{errUnknown}}
	vars := []expr.Value{nothing, unknown}
	switch r.ops {
	case [3]bool{onInsert: true}:
	case [3]bool{onDelete: true}:
		vars = []expr.Value{unknown, nothing}
	default:
		return false
	}
	v, err := when.Run(expr.Env{Vars: vars, Changed: func(int) bool { return true }})
	return err == nil && !v.True()
}

// blank is a row of which every column is NULL, or gives an error.
type blank struct{ err error }

func (b blank) Column(int) (expr.Value, error) { return expr.Value{}, b.err }

// typer decides which events row changes of one version of a table become.
type typer struct {
	rel     *eventlog.Relation
	names   []string  // of the columns
	record  expr.Type // the row's
	quiet   []bool
	rules   []*compiled
	inserts []int
	deletes []int
	updates [][]int // by column: the rules that it concerns
	any     []int   // rules of updates that every change concerns that is not quiet

	change        *eventlog.RowChange
	before, after record
	parts_        []eventlog.Part
	extra         []byte
	candidates    []bool
}

func (t *typer) add(c *compiled) {
	n := len(t.rules)
	t.rules = append(t.rules, c)
	if c.ops[onInsert] {
		t.inserts = append(t.inserts, n)
	}
	if c.ops[onDelete] {
		t.deletes = append(t.deletes, n)
	}
	if !c.ops[onUpdate] {
		return
	}
	if c.data == nil {
		t.any = append(t.any, n)
		return
	}
	for i, on := range c.columns {
		if on {
			t.updates[i] = append(t.updates[i], n)
		}
	}
}

// record is the row before or after the change that is being typed.
type record struct {
	of    *typer
	after bool
}

var errUnknown = errors.New("the value before is not known")

// Column gives a value of the row.
func (r *record) Column(i int) (expr.Value, error) {
	state, value, json, err := r.of.change.Value(i, r.after)
	switch {
	case err != nil:
		return expr.Value{}, &sourceError{err}
	case state == eventlog.StateUnknown:
		return expr.Value{}, errUnknown
	case state == eventlog.StateNull:
		return expr.Value{}, nil
	case json:
		return expr.FromJSON(&r.of.rel.Columns[i].Type, value)
	}
	return expr.FromText(&r.of.rel.Columns[i].Type, value)
}

// sourceError is that of reading a value from the log.
type sourceError struct{ error }

// parts gives the events that the rules make of a row change, beside the default ones.
func (t *typer) parts(c *eventlog.RowChange) ([]eventlog.Part, error) {
	t.change, t.parts_, t.extra = c, t.parts_[:0], t.extra[:0]
	var err error
	switch c.Op {
	case eventlog.OpInsert, eventlog.OpDelete:
		list := t.inserts
		if c.Op == eventlog.OpDelete {
			list = t.deletes
		}
		for _, n := range list {
			var tells bool
			if tells, err = t.tells(t.rules[n]); tells && err == nil {
				err = t.fire(t.rules[n])
			}
			if err != nil {
				return nil, err
			}
		}
	case eventlog.OpUpdate:
		t.candidates = append(t.candidates[:0], make([]bool, len(t.rules))...)
		some, news := false, false
		for i, changed := range c.Changed {
			if !changed {
				continue
			}
			news = news || !t.quiet[i]
			if len(t.updates[i]) > 0 && c.Known(i) {
				some = true
				for _, n := range t.updates[i] {
					t.candidates[n] = true
				}
			}
		}
		if news {
			for _, n := range t.any {
				t.candidates[n], some = true, true
			}
		}
		for n := 0; some && n < len(t.rules); n++ {
			if t.candidates[n] {
				if err := t.fire(t.rules[n]); err != nil {
					return nil, err
				}
			}
		}
	}
	return t.parts_, nil
}

// tells tells whether one of a rule's columns is not NULL, in an insert or a delete.
func (t *typer) tells(c *compiled) (bool, error) {
	if c.data == nil {
		return true, nil
	}
	for i, of := range c.columns {
		if !of {
			continue
		}
		state, _, _, err := t.change.Value(i, t.change.Op == eventlog.OpInsert)
		if err != nil {
			return false, err
		}
		if state == eventlog.StateText {
			return true, nil
		}
	}
	return false, nil
}

// fire adds the event of a rule if its condition holds.
func (t *typer) fire(c *compiled) error {
	env := expr.Env{Vars: []expr.Value{{Kind: expr.Record, Record: &t.before}, {Kind: expr.Record, Record: &t.after}}, Changed: t.changed}
	if c.when != nil {
		v, err := run(c.when, env)
		if err != nil {
			return t.failed(c, err)
		}
		if !v.True() {
			return nil
		}
	}
	from := len(t.extra)
	for i, w := range c.with {
		v, err := run(w, env)
		if err != nil {
			t.extra = t.extra[:from]
			return t.failed(c, err)
		}
		if i == 0 {
			t.extra = append(t.extra, '{')
		} else {
			t.extra = append(t.extra, ',')
		}
		t.extra = append(t.extra, c.names[i]...)
		t.extra = v.AppendJSON(t.extra)
	}
	p := eventlog.Part{Type: c.name, Columns: c.columns}
	if len(c.with) > 0 {
		t.extra = append(t.extra, '}')
		p.Extra = t.extra[from:len(t.extra):len(t.extra)]
	}
	t.parts_ = append(t.parts_, p)
	return nil
}

// run gives the value of an expression. Whatever happens in it, the capture goes on.
func run(p *expr.Program, env expr.Env) (v expr.Value, err error) {
	defer func() {
		if r := recover(); r != nil {
			v, err = expr.Value{}, fmt.Errorf("bug in an expression: %v", r)
		}
	}()
	return p.Run(env)
}

// failed takes what went wrong with a rule.
func (t *typer) failed(c *compiled, err error) error {
	var source *sourceError
	switch {
	case errors.As(err, &source):
		return source.error
	case errors.Is(err, errUnknown):
		return nil
	}
	t.change.Fail(c.name, err)
	return nil
}

func (t *typer) changed(column int) bool {
	switch t.change.Op {
	case eventlog.OpUpdate:
		return t.change.Changed[column]
	default:
		state, _, _, err := t.change.Value(column, t.change.Op == eventlog.OpInsert)
		return err == nil && state == eventlog.StateText
	}
}
