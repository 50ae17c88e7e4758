package rebuild

import (
	"context"

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
