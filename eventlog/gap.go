package eventlog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Gap records that the log may lack changes of the source between two positions of its WAL, and why. Nothing is
// appended after it until a person has accepted it (AcceptGap). No table counts as complete from there on. putBack says that the source does not have
// all that the log has.
func (w *Writer) Gap(ctx context.Context, reason string, from, to LSN, putBack bool) error {
	for _, r := range w.log.dict.newest() {
		if !r.Complete {
			continue
		}
		less := *r
		less.Complete = false
		if _, err := w.tableFor(ctx, &less, w.commit+1); err != nil { // which no event before the gap has
			return err
		}
	}
	if err := w.gap(ctx, w.noteTable(sourceAggregate), "SourceGap", []byte(w.head.Slot), reason, from, to, putBack); err != nil {
		return err
	}
	db, err := w.db(ctx)
	if err != nil {
		return err
	}
	if _, err := db.Exec(ctx, `UPDATE backstory.head SET gap = $1 WHERE epoch = $2`, reason, w.head.Epoch); err != nil {
		return fmt.Errorf("record the gap: %w", err)
	}
	w.head.Gap = reason
	w.publish(w.head)
	return nil
}

// SourceClosed records that the source was shut down when everything of it was in the log: until somebody streams from it again, nothing of it is missing.
func (w *Writer) SourceClosed(ctx context.Context) error {
	db, err := w.db(ctx)
	if err == nil {
		_, err = db.Exec(ctx, `UPDATE backstory.head SET closed = true WHERE epoch = $1`, w.head.Epoch)
	}
	if err != nil {
		return fmt.Errorf("record that the source was shut down: %w", err)
	}
	return nil
}

// TableGap records that from somewhere between two positions of the source's WAL on, only inserts of a table are in the log, and
// why; r is the table as it is captured from now on. It does nothing where that is recorded already.
func (w *Writer) TableGap(ctx context.Context, r *Relation, reason string, from, to LSN) error {
	// Its last shape is that of the entities which the gap concerns; it may have another one, under which they are not found, by now.
	_, last := w.log.dict.newestVersion(r.OID)
	if last == nil {
		last = r
	} else if last.InsertOnly {
		return nil
	}
	return w.tableGap(ctx, last, reason, from, to)
}

// Missed records that changes of a table are missing between two positions of the source's WAL, and why: from here on no more is promised of it than of
// one of which only inserts are in the log, until Retaken says otherwise. It gives the place in the WAL of that.
func (w *Writer) Missed(ctx context.Context, r *Relation, reason string, from, to LSN) (LSN, error) {
	if _, last := w.log.dict.newestVersion(r.OID); last != nil {
		r = last
	}
	at := w.commit + 1
	return at, w.tableGap(ctx, r, reason, from, to)
}

// Doubted tells whether changes of a table are missing before what the log has of it last.
func (w *Writer) Doubted(oid uint32) bool {
	_, last := w.log.dict.newestVersion(oid)
	return last != nil && last.InsertOnly
}

func (w *Writer) tableGap(ctx context.Context, last *Relation, reason string, from, to LSN) error {
	less := *last
	less.InsertOnly, less.Complete, less.Doubted = true, false, false
	t, err := w.tableFor(ctx, &less, w.commit+1) // which no event before the gap has
	if err != nil {
		return err
	}
	return w.gap(ctx, t, t.agg.name+"Gap", []byte{}, reason, from, to, false)
}

// Retaken records that a table was not captured, or only its inserts, for a while before c.SinceLSN: what the log holds of its rows may be outdated, and rows
// may be gone.
func (w *Writer) Retaken(ctx context.Context, c Captured) error {
	_, last := w.log.dict.newestVersion(c.OID)
	if last == nil {
		return nil
	}
	reason := "it was not captured for a while: what happened to its rows meanwhile is not in the log"
	if last.InsertOnly {
		reason = "until now only its inserts were captured for certain: updates and deletes of before may be missing"
	}
	// A version that is InsertOnly is where looking back ends (dictionary.places). Where the last one is, the new one only notes that
	// this is recorded.
	less := *last
	less.InsertOnly, less.Complete, less.Doubted = !last.InsertOnly, false, false
	t, err := w.tableFor(ctx, &less, max(w.commit+1, c.SinceLSN))
	if err != nil {
		return err
	}
	return w.gap(ctx, t, t.agg.name+"Gap", []byte{}, reason, min(w.commit, c.SinceLSN), c.SinceLSN, false) // which may be noticed late
}

func (w *Writer) gap(ctx context.Context, t *table, typ string, key []byte, reason string, from, to LSN, putBack bool) error {
	told := map[string]any{"reason": reason, "from_lsn": from.String(), "to_lsn": to.String(), "found_at": time.Now().UTC().Format(time.RFC3339Nano)}
	if putBack {
		told["put_back"] = true
	}
	data, err := json.Marshal(told)
	if err != nil {
		return err
	}
	if err := w.beside(t, OpGap, typ, key, data); err != nil {
		return err
	}
	if err := w.flush(ctx, 0, false); err != nil {
		return err
	}
	return w.join(ctx)
}

// beside makes an event that has no commit of its own: it lies after the last one, whose time it has, since commits that follow may be older than this moment
// (see lastUntil). Its place in the log keeps its id apart, among ordinals that no row change has.
func (w *Writer) beside(t *table, op Op, typ string, key, data []byte) error {
	if w.tx.open {
		return errors.New("bug: a gap inside a transaction")
	}
	if err := w.setSource(w.head.Timeline); err != nil {
		return err
	}
	at := w.when
	if at.IsZero() {
		at = w.head.BeganAt
	}
	w.tx = openTx{lsn: w.commit, at: at.UnixMicro() - pgEpoch, change: 1<<34 - 1 - int64(w.pos)&0xfffff, first: w.pos + 1}
	w.event(t, &eventRow{op: op, part: part{typ: typ}, text: key, data: data})
	w.whole, w.wholeEnd = w.pos, len(w.rows)
	return nil
}

// Gap is a gap as the log tells of it.
type Gap struct {
	Position Position // of its event: it was recorded there
	OID      uint32   // of the table whose changes may be missing; 0: of all tables
	Reason   string
	From, To LSN // as Writer.Gap and the others were told: zero where nobody knows
	PutBack  bool
	source   *source
}

// Gaps gives the gaps that were recorded after a position, until another one, in their order. It costs little where there are none: it asks for their
// events by the entities that they are of.
func (l *Log) Gaps(ctx context.Context, after, until Position) ([]Gap, error) {
	if after >= until {
		return nil, nil
	}
	if err := l.dict.upTo(ctx, until); err != nil {
		return nil, err
	}
	var kinds, streams []int32
	l.dict.mu.Lock()
	for id, k := range l.dict.kinds {
		if k.op == OpGap {
			kinds = append(kinds, id)
			if !slices.Contains(streams, k.aggregate.id) {
				streams = append(streams, k.aggregate.id)
			}
		}
	}
	l.dict.mu.Unlock()
	if len(kinds) == 0 { // as in most logs
		return nil, nil
	}
	h, err := l.Head(ctx)
	if err != nil {
		return nil, err
	}
	// A table's gap is of the entity without a key, the source's of its slot. Where that has got another name since, what the gap did to the tables that were
	// complete tells its place.
	rows, err := l.pool.Query(ctx, `SELECT position, kind, data FROM backstory.event WHERE id = ANY ($1) AND stream = ANY ($2) AND kind = ANY ($3) AND position > $4 AND position <= $5
		UNION SELECT position, kind, data FROM backstory.event WHERE kind = ANY ($3) AND position > $4 AND position <= $5
			AND position = ANY (ARRAY(SELECT at_position FROM backstory.relation WHERE NOT complete AND at_position > $4 AND at_position <= $5))
		ORDER BY position`, []int64{keyHash(nil), keyHash([]byte(h.Slot))}, streams, kinds, int64(after), int64(until))
	if err != nil {
		return nil, Remedy(fmt.Errorf("look for gaps: %w", err))
	}
	defer rows.Close()
	var out []Gap
	for rows.Next() {
		var g Gap
		var kind int32
		var data []byte
		if err := rows.Scan(&g.Position, &kind, &data); err != nil {
			return nil, fmt.Errorf("look for gaps: %w", err)
		}
		var told struct {
			Reason  string `json:"reason"`
			From    string `json:"from_lsn"`
			To      string `json:"to_lsn"`
			PutBack bool   `json:"put_back"`
		}
		err := json.Unmarshal(data, &told)
		if err == nil {
			g.From, err = ParseLSN(told.From)
		}
		if err == nil {
			g.To, err = ParseLSN(told.To)
		}
		if err != nil {
			return nil, fmt.Errorf("read the gap at position %d: %w", g.Position, err)
		}
		k := l.dict.cached(kind)
		if g.Reason, g.PutBack, g.source = told.Reason, told.PutBack, k.source; k.relation != nil {
			g.OID = k.relation.OID
		}
		out = append(out, g)
	}
	if err := rows.Err(); err != nil {
		return nil, Remedy(fmt.Errorf("look for gaps: %w", err))
	}
	return out, nil
}

// GapsBefore gives the gaps that were recorded after a position and begin before it: changes of until then may be missing. One of which nobody
// knows where it begins does so where the log ended.
func (l *Log) GapsBefore(ctx context.Context, at Position) ([]Gap, error) {
	if at <= 0 {
		return nil, nil
	}
	h, err := l.Head(ctx)
	if err != nil {
		return nil, err
	}
	gaps, err := l.Gaps(ctx, at, h.Position)
	if err != nil || len(gaps) == 0 {
		return nil, err
	}
	e, err := l.Get(ctx, at)
	if err != nil {
		return nil, err
	}
	l.dict.mu.Lock()
	defer l.dict.mu.Unlock()
	of := l.dict.sources[e.Source]
	return slices.DeleteFunc(gaps, func(g Gap) bool {
		// The LSNs of after a gap are of another stretch of WAL than those of before.
		return g.From == 0 || g.From >= e.CommitLSN || of == nil || g.source.incarnation != of.incarnation
	}), nil
}

// GapHint says what to do about a gap.
const GapHint = "See backstory status and backstory log Source. Either bring the source back to where the log is, or run backstory init --accept-gap: " +
	"it notes the gap in the log and goes on from now with a new slot. What has changed meanwhile backstory run finds by comparing the tables with the log; until then none counts as complete."

// fenced is what a writer gets that another one has replaced.
var fenced = &Problem{ErrFenced, "Only one backstory writes to a log at a time. If another one is meant to run, stop this one."}
