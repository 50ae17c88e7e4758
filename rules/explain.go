package rules

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/expr"
)

// Explanation tells what rules make of a row change, and why.
type Explanation struct {
	// Aggregate is that under whose entities the row's events are filed; empty: the file does not speak of the row, and its events are the default ones.
	Aggregate string    `json:"aggregate"`
	Verdicts  []Verdict `json:"rules"`
	// Default is the ending of the default event beside those of rules, Created, Updated, Touched or Deleted, and Columns those that it tells of; empty: there is none.
	Default string   `json:"default,omitempty"`
	Columns []string `json:"columns,omitempty"`
}

// Verdict is what one rule makes of a row change.
type Verdict struct {
	Rule  string `json:"rule"`
	Line  int    `json:"line"`
	Fires bool   `json:"fires"`
	Why   string `json:"why"` // it does, or not
}

// Explain tells what the file's rules make of a change of a row of a table. Rules that do not fit the table are told, too.
func (f *File) Explain(r *eventlog.Relation, c *eventlog.RowChange) (*Explanation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.know(r)
	a, child, err := f.filed(r, c)
	if err != nil || a == nil {
		return &Explanation{Default: defaultOf(c.Op)}, err
	}
	list, quiet, given := a.of(child), a.quiet, a.given
	if child != nil {
		quiet, given = child.quiet, child.given
	}
	out := &Explanation{Aggregate: a.name}
	_ = f.file.Take()
	_, all := f.typer(nil, quiet, given, r, nil)
	taken := make([]bool, len(r.Columns))
	for _, one := range list {
		v := Verdict{Rule: one.name, Line: one.place.Line}
		_, t := f.typer([]*rule{one}, quiet, given, r, nil)
		if p := f.file.Take(); p != nil {
			v.Why = "it does not fit the table: " + p[0].Text
		} else if v.Fires, v.Why, err = t.verdict(c); err != nil {
			return nil, err
		}
		if v.Fires && c.Op == eventlog.OpUpdate {
			for i, changed := range c.Changed {
				columns := t.rules[0].columns
				taken[i] = taken[i] || changed && (columns == nil && !t.quiet[i] || columns != nil && columns[i])
			}
		}
		out.Verdicts = append(out.Verdicts, v)
	}
	out.Default = defaultOf(c.Op)
	if c.Op != eventlog.OpUpdate {
		return out, nil
	}
	fires := slices.ContainsFunc(out.Verdicts, func(v Verdict) bool { return v.Fires })
	news := false
	for i, changed := range c.Changed {
		if changed && !taken[i] && (!all.quiet[i] || !fires) {
			out.Columns, news = append(out.Columns, r.Columns[i].Name), news || !all.quiet[i]
		}
	}
	switch {
	case len(out.Columns) == 0:
		out.Default = ""
	case !news:
		out.Default = "Touched"
	}
	return out, nil
}

func defaultOf(op eventlog.Op) string {
	switch op {
	case eventlog.OpInsert:
		return "Created"
	case eventlog.OpDelete:
		return "Deleted"
	}
	return "Updated"
}

// filed tells whose rules are about a row: its own aggregate's, or those of a child; nil: nobody's.
func (f *File) filed(r *eventlog.Relation, c *eventlog.RowChange) (*aggregate, *child, error) {
	if a := f.owner(r.String()); a != nil {
		return a, nil, nil
	}
	t := f.compileTable(r, nil)
	_ = f.file.Take()
	if t == nil || len(t.Filings) == 0 {
		return nil, nil, nil
	}
	n := 0
	if t.File != nil {
		var err error
		if n, err = t.File(c, c.Op != eventlog.OpDelete); err != nil || n < 0 {
			return nil, nil, err
		}
	}
	for _, k := range t.Filings[n].Key {
		if state, _, _, err := c.Value(k, c.Op != eventlog.OpDelete); err != nil || state != eventlog.StateText {
			return nil, nil, err
		}
	}
	for _, a := range f.aggregates {
		if a.name != t.Filings[n].Aggregate {
			continue
		}
		for _, c := range a.children {
			if qualified(c.table) == r.String() {
				return a, c, nil
			}
		}
	}
	return nil, nil, nil
}

// verdict tells whether the only rule of a typer makes an event of a change, and why, or why not.
func (t *typer) verdict(c *eventlog.RowChange) (fires bool, why string, err error) {
	rule := t.rules[0]
	op := map[eventlog.Op]int{eventlog.OpInsert: onInsert, eventlog.OpUpdate: onUpdate, eventlog.OpDelete: onDelete}[c.Op]
	if !rule.ops[op] {
		var on []string
		for n, is := range rule.ops {
			if is {
				on = append(on, opNames[n])
			}
		}
		return false, "it is about " + strings.Join(on, " and ") + ", this is " + map[int]string{onInsert: "an insert", onUpdate: "an update", onDelete: "a delete"}[op], nil
	}
	var changed, unknown, data []string
	for i := range t.names {
		if rule.columns != nil && !rule.columns[i] || rule.data == nil && t.quiet[i] {
			continue
		}
		data = append(data, t.names[i])
		state, _, _, err := c.Value(i, c.Op == eventlog.OpInsert)
		switch {
		case err != nil:
			return false, "", err
		case c.Op == eventlog.OpUpdate && c.Changed[i] && !c.Known(i):
			unknown = append(unknown, t.names[i])
		case c.Op == eventlog.OpUpdate && c.Changed[i] || c.Op != eventlog.OpUpdate && state == eventlog.StateText:
			changed = append(changed, t.names[i])
		}
	}
	switch {
	case c.Op != eventlog.OpUpdate && rule.data == nil:
	case len(changed) == 0 && len(unknown) > 0:
		return false, "what was before is not known of " + strings.Join(unknown, ", "), nil
	case len(changed) == 0 && c.Op == eventlog.OpUpdate:
		return false, "none of its columns changed: " + strings.Join(data, ", "), nil
	case len(changed) == 0:
		return false, "all of its columns are NULL: " + strings.Join(data, ", "), nil
	}
	parts, err := t.parts(c)
	if err != nil {
		return false, "", err
	}
	reason := "on " + opNames[op]
	if c.Op == eventlog.OpUpdate {
		reason = strings.Join(changed, ", ") + " changed"
	}
	if len(parts) > 0 {
		if rule.when != nil {
			reason += ", and " + rule.rule.when.Text
		}
		return true, reason, nil
	}
	if text := c.Failure(); text != "" {
		return false, "it failed: " + strings.TrimPrefix(text, rule.name+": "), nil
	}
	env := expr.Env{Vars: []expr.Value{{Kind: expr.Record, Record: &t.before}, {Kind: expr.Record, Record: &t.after}}, Changed: t.changed}
	if rule.when != nil {
		if _, err := run(rule.when, env); errors.Is(err, errUnknown) {
			return false, "it reads a value before that is not known: " + rule.rule.when.Text, nil
		}
		return false, "this does not hold: " + rule.rule.when.Text, nil
	}
	return false, "it reads a value before that is not known", nil
}

// String gives an explanation in lines.
func (e *Explanation) String() string {
	var b strings.Builder
	width := 0
	for _, v := range e.Verdicts {
		width = max(width, len(v.Rule))
	}
	for _, v := range e.Verdicts {
		word := "no: "
		if v.Fires {
			word = "yes: "
		}
		fmt.Fprintf(&b, "  %-*s  %-5s%s\n", width, v.Rule, word, v.Why)
	}
	if e.Default != "" && len(e.Columns) > 0 {
		fmt.Fprintf(&b, "  and …%s: %s\n", e.Default, strings.Join(e.Columns, ", "))
	} else if e.Default != "" {
		fmt.Fprintf(&b, "  and …%s\n", e.Default)
	}
	return b.String()
}
