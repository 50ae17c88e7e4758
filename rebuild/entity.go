package rebuild

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/backstory-dev/backstory/eventlog"
)

// EntityState is one row as it was.
type EntityState struct {
	Row      []byte             // a JSON object in the form of the log; nil if it was not there
	Last     *eventlog.Event    // the last event about it until then; nil if there was none
	Relation *eventlog.Relation // with the table's shape of then, if there is a row; otherwise with that of the last event
	Unknown  []string           // columns whose value is not known
	Became   string             // public.purchases: the table that its rows belonged to by then, if that is not the one that was asked for
	// Rekeyed is the key that the table had by then, and From where on in the log, if that is another one than the row is known by: perhaps none.
	Rekeyed *eventlog.Relation
	From    eventlog.Position
	// Gap says why the row may be outdated, gone, or there all the same: changes may be missing since a gap that is not healed by then, or since one that
	// is recorded later and begins before. Nil where it is known for sure.
	Gap *eventlog.Gap
	// AlsoIn are other partitions that have a row of this key, where that is unique in a partition alone: Row is the one that was changed last.
	AlsoIn []string
}

var errWhole = errors.New("the whole row is known")

// Entity folds one entity until a revision. It begins at the last event that holds the whole row, so that its cost does not
// grow with the length of the history.
func Entity(ctx context.Context, log *eventlog.Log, e eventlog.Entity, until eventlog.Position) (*EntityState, error) {
	if until == 0 {
		return &EntityState{}, nil
	}
	st, err := entityIn(ctx, log, e, until, nil)
	if err != nil || st.Last == nil || st.Relation == nil || st.Relation.RootName == "" {
		return st, err
	}
	versions, err := log.Relations(ctx)
	if err != nil {
		return nil, err
	}
	parts := map[uint32]bool{} // that it may be in, too
	for _, v := range versions {
		if v.AtPosition > until {
			continue
		}
		if delete(parts, v.OID); v.String() == e.Table && !v.Dropped && v.OID != st.Relation.OID {
			parts[v.OID] = true
		}
	}
	for len(parts) > 0 {
		o, err := entityIn(ctx, log, e, until, slices.Sorted(maps.Keys(parts)))
		if err != nil {
			return nil, err
		}
		if o.Last == nil {
			break
		}
		delete(parts, o.Relation.OID)
		switch {
		case o.Row == nil:
		case st.Row == nil:
			st = o
		default:
			st.AlsoIn = append(st.AlsoIn, o.Relation.Own())
		}
	}
	return st, nil
}

// entityIn does so by the events of one of some tables, nil for all: of the one that has the last event.
func entityIn(ctx context.Context, log *eventlog.Log, e eventlog.Entity, until eventlog.Position, tables []uint32) (*EntityState, error) {
	st := &EntityState{}
	sel := e.Selection()
	sel.Tables = tables
	sel.Until, sel.Quiet, sel.Newest, sel.Limit, sel.Rows = until, true, true, 64, true
	for {
		n, whole := 0, false
		var oldest eventlog.Position
		err := log.Read(ctx, sel, func(ev *eventlog.Event) error {
			n++
			oldest = ev.Position
			if ev.Relation == nil || ev.Restates {
				return nil
			}
			if st.Last == nil {
				st.Last, st.Relation = ev.Clone(), ev.Relation
			}
			if ev.Relation.OID != st.Relation.OID { // another row, in another partition
				return nil
			}
			if ev.Op == eventlog.OpInsert || ev.Op == eventlog.OpDelete || (ev.Op == eventlog.OpImport || ev.Rest != nil) && !hasUnknown(ev.Metadata) {
				whole = true
				return errWhole
			}
			return nil
		})
		if err != nil && !errors.Is(err, errWhole) {
			return nil, err
		}
		if whole || n < sel.Limit {
			sel.After = max(oldest-1, 0)
			break
		}
		sel.Until = oldest - 1
	}
	versions, err := log.Relations(ctx)
	if err != nil {
		return nil, err
	}
	var mine []eventlog.RelationVersion
	for _, v := range versions {
		if st.Last != nil && v.OID == st.Relation.OID {
			mine = append(mine, v)
		}
	}
	if st.Last == nil {
		st.Gap, err = gapOfAny(ctx, log, versions, e.Table, until)
		return st, err
	}
	// TRUNCATE and DROP are about no row in particular.
	err = log.Read(ctx, eventlog.Selection{Aggregates: sel.Aggregates, OIDs: sel.OIDs, Ops: []eventlog.Op{eventlog.OpTruncate, eventlog.OpNote}, After: st.Last.Position, Until: until}, func(ev *eventlog.Event) error {
		if ev.Relation == nil || ev.Relation.OID != st.Relation.OID || ev.Op == eventlog.OpNote && !ev.Relation.Dropped { // perhaps of another partition
			return nil
		}
		st.Last = ev.Clone()
		return errWhole
	})
	if errors.Is(err, errWhole) {
		err = nil
	}
	if err != nil || st.Last.Op == eventlog.OpNote {
		return st, err
	}
	if st.Last.Op == eventlog.OpTruncate && len(mine) > 0 {
		st.Gap, err = gapOf(ctx, log, mine, until)
		return st, err
	}
	shape := 0
	for i, v := range mine {
		if v.AtPosition > until {
			continue
		}
		shape = i
		if st.Became = ""; e.Table != "" && v.String() != e.Table {
			st.Became = v.String()
		}
		switch same := slices.EqualFunc(v.Key, st.Relation.Key, func(a, b int) bool { return eventlog.SameColumn(&v.Columns[a], &st.Relation.Columns[b]) }); {
		case same:
			st.Rekeyed = nil
		case st.Rekeyed == nil && v.AtPosition > st.Last.Position && st.Last.Op != eventlog.OpDelete && (st.Last.PreviousKey != e.ID || st.Last.Key == e.ID):
			st.Rekeyed, st.From = v.Relation, v.AtPosition
		}
	}
	if st.Became != "" || st.Rekeyed != nil {
		return st, nil
	}
	if len(mine) == 0 {
		return nil, fmt.Errorf("the event log is damaged: no shape of %s is known", st.Relation)
	}
	sel.Until, sel.Newest, sel.Limit, sel.NoMetadata = until, false, 0, true
	mem := &Memory{}
	calc := RowsOf([][]eventlog.RelationVersion{mine}, []int{shape})
	f := &Fold{Source: log, Selection: sel, Calculator: calc, Target: mem, Workers: 1}
	res, err := f.Run(ctx)
	if err != nil {
		return nil, err
	}
	st.Relation = calc.Relation(0) // the table may have been altered since the row's last event
	for _, t := range res.Tables {
		for i, n := range t.Tally.Unknown {
			if n > 0 {
				st.Unknown = append(st.Unknown, st.Relation.Columns[i].Name)
			}
		}
	}
	for _, t := range mem.Tables {
		for _, row := range t.Rows {
			// An event that gave the row another key brings the row under that key too.
			if id, err := eventlog.RowID(st.Relation, row); err == nil && (id == e.ID || len(st.Relation.Key) == 0) {
				st.Row = append([]byte(nil), row...)
			}
		}
	}
	if st.Gap, err = gapOf(ctx, log, mine, until); err == nil && st.Gap == nil && st.Row == nil { // it may have come to another partition
		st.Gap, err = gapOfAny(ctx, log, versions, e.Table, until)
	}
	return st, err
}

// gapOfAny finds the first gap by which one of the tables that have a name at a position is not complete: a row of a partitioned table may be in any partition.
func gapOfAny(ctx context.Context, log *eventlog.Log, versions []eventlog.RelationVersion, name string, at eventlog.Position) (*eventlog.Gap, error) {
	of, last := map[uint32][]eventlog.RelationVersion{}, map[uint32]eventlog.RelationVersion{}
	var oids []uint32
	for _, v := range versions { // oldest first
		if of[v.OID] == nil {
			oids = append(oids, v.OID)
		}
		if of[v.OID] = append(of[v.OID], v); v.AtPosition <= at {
			last[v.OID] = v
		}
	}
	for _, oid := range oids {
		if v := last[oid]; v.Relation == nil || v.Dropped || v.String() != name {
			continue
		}
		if g, err := gapOf(ctx, log, of[oid], at); g != nil || err != nil {
			return g, err
		}
	}
	return nil, nil
}

// completeUntil tells whether a table is complete at a position, and where it was last, or the log knew nothing of it. versions are the table's.
func completeUntil(versions []eventlog.RelationVersion, at eventlog.Position) (complete bool, last eventlog.Position) {
	last = max(versions[0].AtPosition-1, 0)
	for i, v := range versions {
		if v.AtPosition > at {
			break
		}
		if complete = v.Complete; complete {
			last = v.AtPosition
		} else if i > 0 && versions[i-1].Complete {
			last = v.AtPosition - 1
		}
	}
	return complete, last
}

// gapOf finds the gap by which a table is not complete at a position, nil if there is none. versions are the table's.
func gapOf(ctx context.Context, log *eventlog.Log, versions []eventlog.RelationVersion, at eventlog.Position) (*eventlog.Gap, error) {
	complete, last := completeUntil(versions, at)
	gaps, err := log.GapsBefore(ctx, at)
	if err == nil && !complete {
		var since []eventlog.Gap
		since, err = log.Gaps(ctx, last, at)
		gaps = append(since, gaps...)
	}
	if err != nil {
		return nil, err
	}
	for _, g := range gaps {
		if g.OID == 0 || g.OID == versions[0].OID {
			return &g, nil
		}
	}
	return nil, nil
}
