package rebuild

import (
	"cmp"
	"context"
	"slices"

	"github.com/backstory-dev/backstory/eventlog"
)

// Source gives the selected events in the order of the log. *eventlog.Log is one; a selection with edits (events skipped,
// replaced, inserted on the way) is another that wraps it.
type Source interface {
	Read(ctx context.Context, sel eventlog.Selection, f func(*eventlog.Event) error) error
}

var _ Source = (*eventlog.Log)(nil)

// Calculator is a function from events to rows: no clock, no randomness, no I/O. It has two halves, so that it can be
// spread over workers and beyond memory: Route splits an event into steps, each of which concerns one key of one table, and
// a Folder folds the steps of each key, in the order of the log, into the state of that key. What a step and a state hold
// is the calculator's own affair; both are bytes without pointers, since they may go to a file in between.
type Calculator interface {
	// Tables are the tables that the calculator fills. Their number is fixed; their columns are final when the last event
	// has been routed.
	Tables() []*Table
	// Route gives the steps that an event makes. One goroutine calls it, for one event after the other.
	Route(e *eventlog.Event, to *Router) error
	// NewFolder makes what one worker folds with. Folders are used while Route is called.
	NewFolder() Folder
}

// Folder is the half of a calculator that works on one key at a time. It may keep scratch memory, but nothing that one call
// leaves may change what another one gives.
type Folder interface {
	// Fold appends to dst the state of the step's key after the step, from the state before it; nil is the state of a key that
	// is not there, and so is appending nothing. dst, state and the step are valid until it returns, and do not overlap.
	Fold(dst, state []byte, s *Step) ([]byte, error)
	// Rows calls emit for each row that a key stands for in the end. The row and what it refers to are valid until emit
	// returns.
	Rows(s *State, emit func(*Row) error) error
}

// Step is what one event means for one key.
type Step struct {
	Table   int // index into the calculator's tables
	Key     []byte
	Payload []byte // what Route gave
	Tally   *Tally // to be counted in
}

// State is what a key has come to.
type State struct {
	Table int
	Key   []byte
	State []byte
	Tally *Tally
}

// Tally counts what people should know of a table beside its rows.
type Tally struct {
	// Orphans are changes of rows that the events do not tell of: what is known of the row is kept.
	Orphans int64
	// Replaced are rows whose key another row took without an event that says how.
	Replaced int64
	// Unknown counts, by column, the rows in which the column's value is not known.
	Unknown []int64
}

func (t *Tally) unknown(column, columns int) {
	if t.Unknown == nil {
		t.Unknown = make([]int64, columns)
	}
	t.Unknown[column]++
}

// in gives a tally by the columns of a table that the one it counts for is a part of (see columnsOf).
func (t *Tally) in(columns []place) *Tally {
	if columns == nil || t.Unknown == nil {
		return t
	}
	out := &Tally{Orphans: t.Orphans, Replaced: t.Replaced, Unknown: make([]int64, len(columns))}
	for i, c := range columns {
		if c.from >= 0 {
			out.Unknown[i] = t.Unknown[c.from]
		}
	}
	return out
}

func (t *Tally) add(o *Tally) {
	t.Orphans += o.Orphans
	t.Replaced += o.Replaced
	for i, n := range o.Unknown {
		if t.Unknown == nil {
			t.Unknown = make([]int64, len(o.Unknown))
		}
		t.Unknown[i] += n
	}
}

// Table is a table that a fold fills.
type Table struct {
	Schema, Name string
	Columns      []eventlog.Column
	Key          []int                // indexes into Columns; empty: rows may be there several times
	Generated    []eventlog.Generated // columns that the fold does not give: the database computes them
	// Root is the table that it is a part of, with the same columns by name; nil if it is one of its own.
	Root   *Table
	late   map[string]place    // by name, where columns are that it got later, or under another name
	before map[string][]string // by name, what columns were called before
}

// place is where a part has the value of a column: among its own, or, if from is -1, the same in all rows.
type place struct {
	from  int
	value Value
}

// parts gives the tables that are written, each with its parts by their index.
func parts(tables []*Table) (whole []*Table, of [][]int) {
	for i, t := range tables {
		if t.Root != nil {
			t = t.Root
		}
		j := slices.Index(whole, t)
		if j < 0 {
			j = len(whole)
			whole, of = append(whole, t), append(of, nil)
		}
		of[j] = append(of[j], i)
	}
	return whole, of
}

func targets(tables []*Table) []*Table {
	whole, _ := parts(tables)
	return whole
}

// inOrder puts the columns of a partition in the order in which its partitioned table has them. One of which that is not known stays behind the one before.
func (t *Table) inOrder() {
	rank, order := make([]int16, len(t.Columns)), make([]int, len(t.Columns))
	for i, c := range t.Columns {
		if order[i], rank[i] = i, c.Root; c.Root == 0 && i > 0 {
			rank[i] = rank[i-1]
		}
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(rank[a], rank[b]) })
	columns := t.Columns
	t.Columns, t.Key, t.Generated = make([]eventlog.Column, len(columns)), slices.Clone(t.Key), slices.Clone(t.Generated)
	for i, n := range order {
		t.Columns[i] = columns[n]
	}
	for i, k := range t.Key {
		t.Key[i] = slices.Index(order, k)
	}
	slices.SortStableFunc(t.Generated, func(a, b eventlog.Generated) int { return cmp.Compare(a.Root, b.Root) })
	for i := range t.Generated {
		g := &t.Generated[i]
		if g.Root == 0 { // behind the column that it was behind
			if g.Before > 0 {
				g.Before = slices.Index(order, g.Before-1) + 1
			}
			continue
		}
		if n := slices.IndexFunc(order, func(n int) bool { return rank[n] > g.Root }); n >= 0 {
			g.Before = n
		} else {
			g.Before = len(order)
		}
	}
	slices.SortStableFunc(t.Generated, func(a, b eventlog.Generated) int { return cmp.Compare(a.Before, b.Before) })
}

// columnsOf gives the place of each column of a table in one of its parts; nil if all are in the same place.
func (t *Table) columnsOf(part *Table) []place {
	same := true
	var out []place
	for i := range t.Columns {
		name := t.Columns[i].Name
		p := place{from: slices.IndexFunc(part.Columns, func(c eventlog.Column) bool { return c.Name == name })}
		if later, ok := part.late[name]; ok && p.from < 0 {
			p = later
		}
		if p.from < 0 && p.value.JSON == nil {
			p.from = slices.IndexFunc(part.Columns, func(c eventlog.Column) bool { return slices.Contains(t.before[name], c.Name) })
		}
		same, out = same && p.from == i, append(out, p)
	}
	if same && len(part.Columns) == len(t.Columns) {
		return nil
	}
	return out
}

// String gives the qualified name, without quotes.
func (t *Table) String() string { return t.Schema + "." + t.Name }

// Row is one row of a table.
type Row struct {
	Values []Value // by column of the table
}

// Value is one value of a row.
type Value struct {
	JSON []byte         // in the form of the log; nil: not known
	Type *eventlog.Type // under which it was stored
}
