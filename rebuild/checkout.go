package rebuild

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// Config says what to check out, and where to.
type Config struct {
	// Log holds the history. Required.
	Log *eventlog.Log
	// Revision is the moment; Log.Resolve makes it of what a person says.
	Revision eventlog.Revision
	// Tables are names or patterns: orders, public.orders, billing.*, public.order_*. Empty: all tables that there are at the revision. Of tables that
	// several schemas have, a name without one means that of public.
	Tables []string
	// ShapeOfNow gives the tables the names, columns and keys that they have now, instead of those of the revision. A column that came later
	// has the value that it gave to the rows of before, or NULL.
	ShapeOfNow bool
	// Partial allows tables of which the log does not have all rows.
	Partial bool
	// Into is where the tables go: Schema, Files, a Memory. Required.
	Into Target
	// MaxMemoryBytes, Workers, TempDir and Progress are those of Fold.
	MaxMemoryBytes int64
	Workers        int
	TempDir        string
	Progress       func(Progress)
}

func (c *Config) validate() error {
	switch {
	case c.Log == nil:
		return errors.New("check out: no log is given")
	case c.Into == nil:
		return errors.New("check out: no target is given")
	}
	return nil
}

// Report tells what a checkout has made.
type Report struct {
	Revision     string            `json:"revision"`
	Position     eventlog.Position `json:"position"`
	Events       int64             `json:"events"` // folded
	Tables       []TableReport     `json:"tables"`
	Warnings     []string          `json:"warnings,omitempty"`
	Seconds      float64           `json:"seconds"`
	SpilledBytes int64             `json:"spilled_bytes,omitempty"`
}

// TableReport tells of one table.
type TableReport struct {
	Table string `json:"table"`          // in the source: public.orders
	Into  string `json:"into,omitempty"` // where it is now
	Rows  int64  `json:"rows"`
	// Incomplete says that the log does not have all rows of the table, or may have outdated ones.
	Incomplete bool `json:"incomplete,omitempty"`
	// LaterGap is the position of a gap that was recorded after the revision and begins before it, if the table is incomplete only because of that.
	LaterGap eventlog.Position `json:"later_gap,omitempty"`
	// Orphans are changes of rows that the log does not have.
	Orphans int64 `json:"orphans,omitempty"`
	// Unknown counts, by column, the rows in which its value is not known; it is NULL there, or left out.
	Unknown map[string]int64 `json:"unknown,omitempty"`
}

// Met by Checkout.
var (
	// ErrNoSuchTable means that a table was asked for that the log does not have at the revision.
	ErrNoSuchTable = errors.New("no such table at this revision")
	// ErrIncomplete means that the log does not have all rows of a table.
	ErrIncomplete = errors.New("the log does not have all rows")
	// ErrLaterGap comes with ErrIncomplete where a gap that was recorded after the revision is the only reason.
	ErrLaterGap = errors.New("a gap begins before this revision")
)

// Checkout builds tables as they were at a revision. When it returns nil, the target holds all of them; after an error it
// holds nothing new.
func Checkout(ctx context.Context, cfg Config) (*Report, error) {
	began := time.Now()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	tables, out, err := cfg.chosen(ctx)
	if err != nil {
		return nil, err
	}
	if err := cfg.checkComplete(ctx, tables, out); err != nil {
		return nil, err
	}
	var whole []bool
	for _, t := range tables {
		whole = append(whole, t.root)
	}
	f := &Fold{Source: cfg.Log, Target: cfg.Into, MaxMemoryBytes: cfg.MaxMemoryBytes, Workers: cfg.Workers, TempDir: cfg.TempDir, Progress: cfg.Progress,
		Selection: eventlog.Selection{Until: cfg.Revision.Position, Quiet: true, Lean: true}}
	if cfg.Revision.Position == 0 {
		f.Source = nothing{}
	}
	var versions [][]eventlog.RelationVersion
	var shape []int
	for _, t := range tables {
		at := t.shape
		if cfg.ShapeOfNow {
			at = len(t.versions) - 1
		}
		versions, shape = append(versions, t.versions), append(shape, at)
		for _, v := range t.versions {
			if n := v.Relation.Own(); !slices.Contains(f.Selection.Relations, n) {
				f.Selection.Relations = append(f.Selection.Relations, n)
			}
		}
	}
	if len(tables) == 0 {
		f.Source = nothing{}
	}
	calc := RowsOf(versions, shape)
	calc.join(whole)
	if err := distinct(calc.Tables()); err != nil {
		return nil, err
	}
	f.Calculator, f.Selection.NoBefore = calc, !calc.needsBefore()
	result, err := f.Run(ctx)
	if err != nil {
		return nil, fmt.Errorf("check out %s: %w", cfg.Revision.How, err)
	}
	r := report(result, calc, tables, out, cfg)
	r.Seconds = time.Since(began).Seconds()
	return r, nil
}

// Complete tells whether the log has all rows of the tables at the revision: nil, an error that is ErrIncomplete, or why that is not known. Of the
// configuration it wants what names them.
func Complete(ctx context.Context, cfg Config) error {
	tables, out, err := cfg.chosen(ctx)
	if err != nil {
		return err
	}
	cfg.Partial = false
	return cfg.checkComplete(ctx, tables, out)
}

// LackingSince gives those of the tables that the log knew before a gap and has not had all rows of since then, until the revision. Those of which only inserts
// are captured never have all; they count until they have been compared with the source. Of the configuration it wants what names them.
func LackingSince(ctx context.Context, cfg Config, gap eventlog.Position) ([]string, error) {
	tables, _, err := cfg.chosen(ctx)
	if err != nil {
		return nil, err
	}
	begun, err := cfg.Log.Baselines(ctx)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, t := range tables {
		r := t.relation()
		lacks := !r.Complete && t.versions[0].AtPosition <= gap
		if r.InsertOnly {
			lacks = lacks && !slices.ContainsFunc(begun, func(b eventlog.Baseline) bool { return b.OID == r.OID && b.Done })
		} else {
			lacks = lacks && !slices.ContainsFunc(t.versions[:t.shape+1], func(v eventlog.RelationVersion) bool { return v.Complete && v.AtPosition > gap })
		}
		if lacks && !slices.Contains(names, r.String()) {
			names = append(names, r.String())
		}
	}
	return names, nil
}

// chosen finds the tables to build, and the partitions of theirs that are not captured.
func (c Config) chosen(ctx context.Context) ([]*history, []eventlog.LeftOut, error) {
	all, err := tablesAt(ctx, c.Log, c.Revision.Position)
	if err != nil {
		return nil, nil, err
	}
	tables, err := choose(all, c.Tables, c.Revision)
	if err != nil {
		return nil, nil, err
	}
	gaps, err := c.Log.GapsBefore(ctx, c.Revision.Position)
	if err != nil {
		return nil, nil, err
	}
	for _, t := range tables {
		if r := t.relation(); !r.Complete || r.InsertOnly {
			continue // for other reasons
		}
		if i := slices.IndexFunc(gaps, func(g eventlog.Gap) bool { return g.OID == 0 || g.OID == t.relation().OID }); i >= 0 {
			t.gap = &gaps[i]
		}
	}
	out, err := c.Log.LeftOut(ctx, c.Revision.Position)
	if err != nil {
		return nil, nil, err
	}
	return tables, slices.DeleteFunc(out, func(p eventlog.LeftOut) bool {
		return !slices.ContainsFunc(tables, func(t *history) bool {
			schema, name := t.relation().Table()
			return t.root && schema == p.RootSchema && name == p.RootName
		})
	}), nil
}

// distinct makes sure that no two tables have one name: today one may have the name that another one had.
func distinct(tables []*Table) error {
	seen := map[string]bool{}
	for _, t := range targets(tables) {
		if seen[t.String()] {
			return &eventlog.Problem{Err: fmt.Errorf("two of the tables are called %s in the shape that they have now", t), Hint: "Name one of them, or take the shape of then."}
		}
		seen[t.String()] = true
	}
	return nil
}

// nothing is a source without events.
type nothing struct{}

func (nothing) Read(context.Context, eventlog.Selection, func(*eventlog.Event) error) error {
	return nil
}

// history is a captured table as the log knows it at a revision.
type history struct {
	versions []eventlog.RelationVersion // all it has ever had, oldest first
	shape    int                        // the one that holds at the revision; -1: the table is not there yet
	captured bool                       // now
	gone     bool                       // it has been dropped by then
	root     bool                       // it is a part of the partitioned table of its name
	gap      *eventlog.Gap              // recorded after the revision, and begins before it: changes of until then may be missing
	rank     int                        // of several tables that have had one name, the highest counts
}

func (h *history) relation() *eventlog.Relation { return h.versions[max(h.shape, 0)].Relation }

// tablesAt reads which tables there are at a position: those known by then, with or without rows. A table is known by its
// OID, so that a new name is no new table; of several tables that have had one name the newest counts. One that init leaves out keeps
// its last rows.
func tablesAt(ctx context.Context, log *eventlog.Log, at eventlog.Position) ([]*history, error) {
	versions, err := log.Relations(ctx)
	if err != nil {
		return nil, err
	}
	head, err := log.Head(ctx)
	if err != nil {
		return nil, err
	}
	captured, err := log.Captured(ctx)
	if err != nil {
		return nil, err
	}
	m := moment{at: at}
	switch {
	case at > head.Position:
		return nil, fmt.Errorf("check out position %d: the log ends at %d", at, head.Position)
	case at == head.Position:
		m.now = true
	case at == 0: // the tables that there were when the log began
		for i, c := range captured {
			if i == 0 || c.SinceLSN < m.lsn {
				m.lsn = c.SinceLSN
			}
		}
	case at > 0:
		e, err := log.Get(ctx, at)
		if err != nil {
			return nil, err
		}
		m.lsn = e.CommitLSN
	}
	return group(versions, captured, m), nil
}

// moment is a position, and what tells which tables were captured there.
type moment struct {
	now bool // it is the head
	at  eventlog.Position
	lsn eventlog.LSN // of the transaction there
}

// group puts together the versions of each table, and finds the one that holds at a moment. The schema history has a table's
// first version only from its first event on; before that it is captured and empty.
func group(versions []eventlog.RelationVersion, captured []eventlog.Captured, m moment) []*history {
	var all []*history
	byOID := map[uint32]*history{}
	next := 1
	for _, v := range versions {
		next = max(next, v.ID+1)
		h := byOID[v.OID]
		if h == nil {
			h = &history{shape: -1}
			byOID[v.OID] = h
			all = append(all, h)
		}
		if v.AtPosition <= m.at {
			h.shape, h.rank = len(h.versions), v.ID
		}
		h.versions = append(h.versions, v)
	}
	for _, c := range captured {
		h := byOID[c.OID]
		if h == nil {
			h = &history{shape: -1, versions: []eventlog.RelationVersion{{ID: next, Relation: c.Relation, AtLSN: c.SinceLSN}}}
			if m.now {
				h.rank = next
			}
			next++
			all = append(all, h)
		}
		h.captured = true
		if h.shape < 0 && (m.now || c.SinceLSN <= m.lsn) {
			h.shape = 0
		}
	}
	for _, h := range all {
		h.gone = h.shape >= 0 && h.versions[h.shape].Dropped
	}
	first := map[string]*history{}
	for _, h := range all {
		n := h.relation().Own()
		if o := first[n]; h.shape >= 0 && (o == nil || o.gone && !h.gone || o.gone == h.gone && o.rank < h.rank) { // that one is gone may be known later than that another one is there
			first[n] = h
		}
	}
	var out []*history
	for _, h := range all {
		if h.shape < 0 || first[h.relation().Own()] == h {
			out = append(out, h)
		}
	}
	slices.SortFunc(out, byName)
	return out
}

func byName(a, b *history) int {
	return cmp.Or(strings.Compare(a.relation().String(), b.relation().String()), strings.Compare(a.relation().Own(), b.relation().Own()))
}

// choose finds the tables that names and patterns mean.
func choose(all []*history, names []string, rev eventlog.Revision) ([]*history, error) {
	var chosen []*history
	var known []string
	for _, h := range all {
		if n := h.relation().String(); h.shape >= 0 && !h.gone {
			if !slices.Contains(known, n) {
				known = append(known, n)
			}
			if len(names) == 0 {
				h.root = h.relation().RootName != ""
				chosen = append(chosen, h)
			}
		}
	}
	for _, asked := range names {
		if schema, name, ok := eventlog.UnquoteTable(asked); ok {
			if asked = name; schema != "" {
				asked = schema + "." + name
			}
		}
		n, err := theTable(all, asked)
		if err != nil {
			return nil, err
		}
		found, later, gone := false, "", ""
		for _, h := range all {
			r := h.relation()
			table := matches(n, r.Table)
			if !table && !matches(n, func() (string, string) { return r.Schema, r.Name }) {
				continue
			}
			switch {
			case h.shape < 0:
				later = r.Own()
				continue
			case h.gone:
				gone = r.Own()
				continue
			}
			found = true
			h.root = h.root || table && r.RootName != ""
			if !slices.Contains(chosen, h) {
				chosen = append(chosen, h)
			}
		}
		switch {
		case found:
		case gone != "":
			return nil, &eventlog.Problem{Err: fmt.Errorf("%s: %w (position %d): %s has been dropped by then", n, ErrNoSuchTable, rev.Position, gone),
				Hint: "Use an earlier revision; backstory log " + n + " shows what happened until then."}
		case later != "":
			return nil, &eventlog.Problem{Err: fmt.Errorf("%s: %w (position %d): the log knows of %s only from a later position on", n, ErrNoSuchTable, rev.Position, later),
				Hint: "Use a later revision, for instance HEAD."}
		default:
			hint := "The log has no table at this revision."
			if near := nearest(n, known); near != "" {
				hint = "Did you mean " + near + "?"
			} else if len(known) > 0 {
				hint = "There are " + shorten(known) + "."
			}
			return nil, &eventlog.Problem{Err: fmt.Errorf("%s: %w (position %d)", n, ErrNoSuchTable, rev.Position), Hint: hint}
		}
	}
	slices.SortFunc(chosen, byName)
	return chosen, nil
}

// theTable adds the schema to a name that has none, and that tables of several schemas have: it means that of public, as for log and show.
func theTable(all []*history, name string) (string, error) {
	var schemas []string
	for _, h := range all {
		r := h.relation()
		schema, table := r.Table()
		if table != name {
			schema, table = r.Schema, r.Name
		}
		if table == name && h.shape >= 0 && !h.gone && !slices.Contains(schemas, schema) {
			schemas = append(schemas, schema)
		}
	}
	switch {
	case len(schemas) < 2:
		return name, nil
	case slices.Contains(schemas, "public"):
		return "public." + name, nil
	}
	return "", &eventlog.Problem{Err: fmt.Errorf("%s can mean %s.%[1]s", name, strings.Join(schemas, "."+name+" or ")), Hint: "Use one of these names, or several."}
}

// matches tells whether a name or pattern means a table. A pattern without a schema means tables of any.
func matches(pattern string, of func() (schema, name string)) bool {
	inSchema, table := of()
	if pattern == table || pattern == inSchema+"."+table {
		return true
	}
	schema, name, ok := strings.Cut(pattern, ".")
	if !ok {
		return wildcard(pattern, table)
	}
	return wildcard(schema, inSchema) && wildcard(name, table)
}

// wildcard tells whether a name matches a pattern in which * stands for any run of characters.
func wildcard(pattern, name string) bool {
	pieces := strings.Split(pattern, "*")
	if len(pieces) == 1 {
		return pattern == name
	}
	name, ok := strings.CutPrefix(name, pieces[0])
	for _, p := range pieces[1 : len(pieces)-1] {
		_, name2, found := strings.Cut(name, p)
		name, ok = name2, ok && found
	}
	return ok && strings.HasSuffix(name, pieces[len(pieces)-1])
}

func shorten(names []string) string {
	if len(names) > 12 {
		return strings.Join(names[:12], ", ") + fmt.Sprintf(" and %d more", len(names)-12)
	}
	return strings.Join(names, ", ")
}

// nearest finds the table whose name, with its schema or without, is most like what was asked; "" if none is.
func nearest(asked string, tables []string) string {
	table := map[string]string{}
	for _, t := range tables {
		table[t] = t
		if _, bare, ok := strings.Cut(t, "."); ok && !strings.Contains(asked, ".") {
			table[bare] = t
		}
	}
	return table[eventlog.Nearest(asked, slices.Collect(maps.Keys(table)))]
}

// checkComplete refuses tables of which the log does not have all rows.
func (c Config) checkComplete(ctx context.Context, tables []*history, out []eventlog.LeftOut) error {
	if c.Partial {
		return nil
	}
	var names, inserts, others, why []string
	var gaps []*eventlog.Gap
	var recorded []eventlog.Gap // until the revision
	var ofTable *eventlog.Gap   // the first of them by which a table lacks something
	if slices.ContainsFunc(tables, func(t *history) bool { r := t.relation(); return r.InsertOnly || !r.Complete }) {
		var err error
		if recorded, err = c.Log.Gaps(ctx, 0, c.Revision.Position); err != nil {
			return err
		}
	}
	lacking := map[eventlog.Position][]string{} // by gap
	add := func(list *[]string, name string) {  // partitions have the name of their partitioned table
		if !slices.Contains(*list, name) {
			*list = append(*list, name)
		}
	}
	for _, t := range tables {
		r := t.relation()
		complete, last := completeUntil(t.versions, c.Revision.Position)
		own := slices.IndexFunc(recorded, func(g eventlog.Gap) bool { return !complete && g.OID == r.OID && g.Position > last })
		switch {
		case own >= 0:
			g := &recorded[own]
			add(&why, fmt.Sprintf("%s: its history has a gap at position %d (%s), which is not healed at this revision", r, g.Position, g.Reason))
			if ofTable == nil || g.Position < ofTable.Position {
				ofTable = g
			}
		case r.InsertOnly:
			add(&inserts, r.String())
		case !r.Complete:
			add(&names, r.String())
		case t.gap != nil:
			list := lacking[t.gap.Position]
			if list == nil {
				gaps = append(gaps, t.gap)
			}
			add(&list, r.String())
			lacking[t.gap.Position] = list
		default:
			add(&others, r.String())
		}
	}
	if len(names) > 0 {
		h, err := c.Log.Head(ctx)
		if err != nil {
			return err
		}
		reason := "not every row that it had before it was captured is in it yet (backstory status tells how far that is)"
		if !h.Baseline {
			reason = "rows that it had before it was captured were left out by init --no-baseline (backstory init, without that, has them taken over from then on)"
		}
		why = append(why, shorten(names)+": "+reason)
	}
	if len(inserts) > 0 {
		why = append(why, fmt.Sprintf("%s: without a usable key what updates and deletes have made of their rows is known only from comparing them with the source now and then", shorten(inserts)))
	}
	for _, p := range out {
		why = append(why, fmt.Sprintf("%s.%s: its partition %s.%s is not captured: %s", p.RootSchema, p.RootName, p.Schema, p.Name, p.Why))
	}
	later := len(why) == 0
	var from eventlog.LSN
	for _, g := range gaps {
		why = append(why, shorten(lacking[g.Position])+": "+laterGap(g))
		if from == 0 || g.From < from {
			from = g.From
		}
	}
	if len(why) == 0 {
		return nil
	}
	err := fmt.Errorf("%w of %s", ErrIncomplete, strings.Join(why, "; of "))
	if !later {
		hint := "Use --partial for the rows that the log knows of, or name other tables."
		others = slices.DeleteFunc(others, func(name string) bool {
			return slices.ContainsFunc(out, func(p eventlog.LeftOut) bool { return name == p.RootSchema+"."+p.RootName })
		})
		if n := len(others); n > 0 && n <= 12 {
			hint = fmt.Sprintf("Use --partial for the rows that the log knows of, or name the others (%s).", strings.Join(others, " "))
		}
		if before := c; ofTable != nil {
			before.Revision.Position = ofTable.Position - 1
			if Complete(ctx, before) == nil {
				hint += fmt.Sprintf(" A revision of before the gap is --at %d.", before.Revision.Position)
			}
		}
		return &eventlog.Problem{Err: err, Hint: hint}
	}
	return &eventlog.Problem{Err: &laterGapError{err}, Hint: fmt.Sprintf("Use --partial for what the log knows, or a revision of before the gap begins: --at %s.", from)}
}

// laterGapError is ErrIncomplete and ErrLaterGap, in the words of the first.
type laterGapError struct{ error }

func (e *laterGapError) Unwrap() []error { return []error{e.error, ErrLaterGap} }

// laterGap says what a gap means that was recorded after a position and begins before it.
func laterGap(g *eventlog.Gap) string {
	return fmt.Sprintf("changes may be missing, since a gap begins before this position, at %s (event %d: %s)", g.From, g.Position, g.Reason)
}

// report says what people should know.
func report(res *Result, calc *Rows, tables []*history, out []eventlog.LeftOut, cfg Config) *Report {
	r := &Report{Revision: cfg.Revision.How, Position: cfg.Revision.Position, Events: res.Events, SpilledBytes: res.SpilledBytes, Tables: []TableReport{}}
	placer, _ := cfg.Into.(interface{ Place(*Table) string })
	warn := func(format string, args ...any) { r.Warnings = append(r.Warnings, fmt.Sprintf(format, args...)) }
	for _, t := range res.Tables {
		var rel eventlog.Relation // what is true of one of its parts
		captured := true
		var gap *eventlog.Gap
		for n, i := range t.Parts {
			r := calc.Relation(i)
			if cfg.ShapeOfNow {
				r = tables[i].relation()
			}
			if n == 0 {
				rel = *r
			}
			rel.Complete, rel.InsertOnly, captured = rel.Complete && r.Complete, rel.InsertOnly || r.InsertOnly, captured && tables[i].captured
			gap = cmp.Or(gap, tables[i].gap)
		}
		tr := TableReport{Table: t.String(), Rows: t.Rows, Incomplete: !rel.Complete, Orphans: t.Tally.Orphans}
		if placer != nil {
			tr.Into = placer.Place(t.Table)
		}
		for _, p := range out {
			if t.String() == p.RootSchema+"."+p.RootName {
				tr.Incomplete = true
				warn("%s: its partition %s.%s is not captured: %s", t, p.Schema, p.Name, p.Why)
			}
		}
		if gap != nil {
			if !tr.Incomplete {
				tr.Incomplete, tr.LaterGap = true, gap.Position
			}
			warn("%s: %s", t, laterGap(gap))
		}
		if !rel.Complete && !rel.InsertOnly {
			warn("%s: the log does not have all rows, and may have some that are gone or outdated", t)
		}
		if !captured {
			warn("%s is no longer captured, perhaps dropped: its rows are those that the log knew last", t)
		}
		if rel.InsertOnly {
			warn("%s: the source tells only of inserts; what was updated or deleted since it was last compared with the log is missing", t)
		}
		if n := t.Tally.Orphans; n > 0 {
			warn("%s: of rows that the log does not have there are changes (%d); what they say is in the result", t, n)
		}
		if n := t.Tally.Replaced; n > 0 {
			warn("%s: rows took the place of others whose end the log does not have (%d times)", t, n)
		}
		for i, n := range t.Tally.Unknown {
			c := &t.Columns[i]
			if n > 0 {
				if tr.Unknown == nil {
					tr.Unknown = map[string]int64{}
				}
				tr.Unknown[c.Name] = n
				warn("%s: the value of %s is not known in %d rows; it is empty there", t, c.Name, n)
			}
		}
		r.Tables = append(r.Tables, tr)
	}
	if w, ok := cfg.Into.(interface{ Warnings() []string }); ok {
		r.Warnings = append(r.Warnings, w.Warnings()...)
	}
	return r
}
