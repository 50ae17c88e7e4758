package eventlog

// Told is one event that rules make of a row change.
type Told struct {
	Type            string
	Quiet, Restates bool
	Columns         []bool // those in data or, of a delete, in before
	Extra           []byte
}

// Tell gives the events that rules make of a row change, in their order, as [Writer.Append] makes them; nil are the default rules. What it returns is valid until
// the rules are used again.
func Tell(r *Relation, rules *TableRules, c *RowChange) (out []Told, err error) {
	if rules == nil {
		rules = &TableRules{}
	}
	name, of := rules.Aggregate, &rules.RowRules
	if name == "" {
		name = AggregateName(r)
	}
	if len(rules.Filings) > 0 {
		n := 0
		if rules.File != nil {
			if n, err = rules.File(c, c.Op != OpDelete); err != nil {
				return nil, err
			}
		}
		if n >= 0 {
			of = &rules.Filings[n].RowRules
		}
	}
	t, all := rulesFor(r, name, of), make([]bool, len(r.Columns))
	for i := range all {
		all[i] = true
	}
	if c.Op == OpUpdate {
		var s scratch
		list, err := s.tell(c, t)
		if err != nil {
			return nil, err
		}
		for _, p := range list {
			columns := p.columns
			if columns == nil {
				columns = c.Changed
			}
			out = append(out, Told{Type: p.part.typ, Quiet: p.part.quiet, Columns: columns, Extra: p.extra})
		}
		return out, nil
	}
	parts, err := typed(c, t)
	if err != nil {
		return nil, err
	}
	for _, p := range parts {
		columns := p.Columns
		if columns == nil {
			columns = all
		}
		out = append(out, Told{Type: p.Type, Restates: true, Columns: columns, Extra: p.Extra})
	}
	if c.Op == OpDelete {
		return append(out, Told{Type: t.deleted.typ, Columns: all}), nil
	}
	return append([]Told{{Type: t.created.typ, Columns: all}}, out...), nil
}
