package rebuild

import (
	"context"
	"errors"
)

// Target takes the rows of a fold. Nothing of them may be seen before Commit.
type Target interface {
	// Begin is told of all tables, before the first row.
	Begin(ctx context.Context, tables []*Table) error
	// Table begins to write one of them; the one before is closed.
	Table(ctx context.Context, t *Table) (TableWriter, error)
	// Commit makes everything visible.
	Commit(ctx context.Context) error
	// Abort undoes everything; it is called after an error, of Begin and Commit too.
	Abort()
}

// TableWriter takes the rows of one table. Rows are encoded by several goroutines, each with its own encoder, and written by
// one.
type TableWriter interface {
	NewEncoder() Encoder
	// Write takes some encoded rows; p is valid until it returns.
	Write(p []byte) error
	// Close ends the table; it is called once. err is nil if all rows have been written, otherwise what went wrong, perhaps in
	// Write; Close returns it, or what it knows better. ErrAgain asks for all rows once more, from a new writer for the table.
	Close(err error) error
}

// Encoder turns rows into the target's form.
type Encoder interface {
	AppendRow(dst []byte, r *Row) ([]byte, error)
}

// ErrAgain means that a table has to be written once more, in another form.
var ErrAgain = errors.New("the table has to be written once more")
