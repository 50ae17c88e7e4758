package rebuild

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/backstory-dev/backstory/eventlog"
)

// Contents tells what the log knows at a position of a table whose version then has no key: put is called once with each content's id
// (eventlog.ContentID) and how many rows of it there are, never by two goroutines at once. pending is what of that, after since, a snapshot of
// the source, as pg_current_snapshot prints it, does not see: how many rows more, or fewer, there are of the content than it shows. It is
// eventlog.ErrNotVisible where that cannot be said in numbers: the table was emptied or altered by a transaction that the snapshot does not see,
// or too much was changed.
func Contents(ctx context.Context, log *eventlog.Log, oid uint32, since, at eventlog.Position, snapshot string, put func(id string, rows, pending int64) error) error {
	versions, err := log.Relations(ctx)
	if err != nil {
		return err
	}
	versions = slices.DeleteFunc(versions, func(v eventlog.RelationVersion) bool { return v.OID != oid })
	if len(versions) == 0 {
		return nil
	}
	sel := eventlog.Selection{Until: at, Quiet: true, NoMetadata: true}
	for _, v := range versions {
		if n := v.Relation.Own(); !slices.Contains(sel.Relations, n) {
			sel.Relations = append(sel.Relations, n)
		}
	}
	rows := RowsOf([][]eventlog.RelationVersion{versions}, []int{len(versions) - 1})
	sel.NoBefore = !rows.needsBefore()
	source := &pendingEvents{Source: log, oid: oid, version: versions[len(versions)-1].ID, since: since, snapshot: snapshot, pending: map[string]int64{}}
	c := &contents{Rows: rows, put: func(id string, rows int64) error {
		n := source.pending[id]
		delete(source.pending, id)
		return put(id, rows, n)
	}}
	// A sidecar is at work in this process: what does not fit into little memory goes to files.
	if _, err := (&Fold{Source: source, Selection: sel, Calculator: c, Target: noTarget{}, MaxMemoryBytes: 16 << 20}).Run(ctx); err != nil {
		return fmt.Errorf("count the rows of %s in the log: %w", versions[len(versions)-1].Relation, err)
	}
	for id, n := range source.pending { // of which the log knows no row
		if err := put(id, 0, n); err != nil {
			return err
		}
	}
	return nil
}

// maxPending is of how many contents it is kept in mind what a snapshot does not see.
const maxPending = 100000

// pendingEvents are those of a log; what of them a snapshot does not see is counted on the way.
type pendingEvents struct {
	Source
	oid      uint32
	version  int // of the table, in the schema history
	since    eventlog.Position
	snapshot string
	pending  map[string]int64 // by content: rows added less those taken away
}

func (s *pendingEvents) Read(ctx context.Context, sel eventlog.Selection, f func(*eventlog.Event) error) error {
	return s.Source.Read(ctx, sel, func(e *eventlog.Event) error {
		if e.Position > s.since && e.Op != eventlog.OpNote && e.Relation != nil && e.Relation.OID == s.oid && !eventlog.Sees(s.snapshot, e.XID) {
			if e.SchemaVersion != s.version || len(s.pending) > maxPending {
				return eventlog.ErrNotVisible
			}
			switch e.Op {
			case eventlog.OpInsert:
				s.pending[e.Key]++
			case eventlog.OpUpdate:
				s.pending[e.Key]++
				s.pending[e.PreviousKey]--
			case eventlog.OpDelete:
				s.pending[e.Key]--
			default:
				return eventlog.ErrNotVisible
			}
		}
		return f(e)
	})
}

// contents is the calculator of rows; of each content it gives how often it is there, instead of rows.
type contents struct {
	*Rows
	mu  sync.Mutex // guards the following
	put func(id string, n int64) error
}

func (c *contents) NewFolder() Folder { return &contentsFolder{c.Rows.NewFolder(), c, nil} }

type contentsFolder struct {
	Folder
	contents *contents
	rows     []storedRow
}

func (f *contentsFolder) Rows(s *State, _ func(*Row) error) (err error) {
	if f.rows, err = parseRows(f.rows[:0], s.State); err != nil {
		return err
	}
	for _, r := range f.rows {
		if r.flags&flagCounted == 0 {
			return fmt.Errorf("bug: a row of a table without a key has one")
		}
		f.contents.mu.Lock()
		err := f.contents.put(string(s.Key), int64(r.number))
		f.contents.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// noTarget is for calculators that make no rows.
type noTarget struct{}

func (noTarget) Begin(context.Context, []*Table) error              { return nil }
func (noTarget) Table(context.Context, *Table) (TableWriter, error) { return noTarget{}, nil }
func (noTarget) Commit(context.Context) error                       { return nil }
func (noTarget) Abort()                                             {}
func (noTarget) NewEncoder() Encoder                                { return noTarget{} }
func (noTarget) AppendRow(dst []byte, _ *Row) ([]byte, error)       { return dst, nil }
func (noTarget) Write([]byte) error                                 { return nil }
func (noTarget) Close(err error) error                              { return err }
