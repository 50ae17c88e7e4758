package backstory

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/rebuild"
)

// existing finds the tables whose existing rows are still to be taken over, and makes the writer ready for them.
func (s *Sidecar) existing(ctx context.Context, w *eventlog.Writer, captured []eventlog.Captured) ([]capture.Existing, error) {
	begun, err := s.log.Baselines(ctx)
	if err != nil {
		return nil, err
	}
	s.generations = generations(begun)
	index := func(c eventlog.Captured) int {
		return slices.IndexFunc(begun, func(b eventlog.Baseline) bool { return b.OID == c.OID })
	}
	var wanted []eventlog.Captured
	var fresh []eventlog.Baseline
	shapeOnly := map[uint32]bool{}
	for _, c := range captured {
		i := index(c)
		if c.SinceLSN > w.Head().EndLSN || i >= 0 && begun[i].Done { // the stream pauses at the one
			continue
		}
		if altered := i >= 0 && (begun[i].Heal || begun[i].Pass == eventlog.PassShape); altered {
			compared := w.Head().Baseline
			if compared && begun[i].Heal && begun[i].Pass != eventlog.PassShape { // it had its shape when nothing was to be compared
				if lost, err := s.log.Lost(ctx, c.Relation); err != nil {
					return nil, err
				} else if lost {
					if err := s.log.BeginAnew(ctx, c.OID); err != nil {
						return nil, err
					}
					return s.existing(ctx, w, captured)
				}
			}
			if begun[i].Pass == eventlog.PassShape || compared {
				wanted = append(wanted, c)
			}
			shapeOnly[c.OID] = !compared
			continue
		}
		if c.Complete || !w.Head().Baseline {
			continue
		}
		if wanted = append(wanted, c); i < 0 || begun[i].Chunks == 0 {
			b := eventlog.Baseline{OID: c.OID, Pass: eventlog.PassRows}
			old, err := s.log.HasHistory(ctx, c.OID)
			if err != nil {
				return nil, err
			}
			if old && len(c.Key) > 0 {
				if b.Heal = c.InsertOnly; !s.log.Healable(c.Relation) || s.log.Reshaped(c.Relation) { // in the place of the empty chunk it has its new shape, or what the log has is discarded
					b.Pass, b.Heal = eventlog.PassShape, true
				}
			}
			fresh = append(fresh, b)
		}
	}
	if len(fresh) > 0 {
		var oids []uint32
		for _, b := range fresh {
			oids = append(oids, b.OID)
		}
		sizes, next, err := capture.Sizes(ctx, s.cfg.Capture, oids)
		if err != nil {
			return nil, err
		}
		for _, b := range fresh {
			// Recorded by init already where the slot was made after the table was published: that waited for everybody.
			size := sizes[b.OID]
			b.WaitFor, b.TotalRows, b.TotalBytes, b.Changes, b.Began = next, size.Rows, size.Bytes, size.Changes, w.Head().Position
			if err := s.log.BeginBaseline(ctx, b); err != nil {
				return nil, err
			}
		}
		if begun, err = s.log.Baselines(ctx); err != nil {
			return nil, err
		}
	}
	history, err := s.log.Histories(ctx, wanted)
	if err != nil {
		return nil, err
	}
	var out []capture.Existing
	var resumed []eventlog.Baseline
	for _, c := range wanted {
		i := index(c)
		if i < 0 {
			return nil, fmt.Errorf("bug: no baseline of %s was begun", c)
		}
		out = append(out, capture.Existing{Captured: c, Baseline: begun[i], ShapeOnly: begun[i].Pass == eventlog.PassShape && shapeOnly[c.OID], Compare: begun[i].Heal || history[c.OID]})
		resumed = append(resumed, begun[i])
	}
	if err := w.Resume(ctx, resumed); err != nil {
		return nil, err
	}
	return out, nil
}

// contents records what the log knows of a table without a key, before its rows are read.
func (s *Sidecar) contents(ctx context.Context, r *eventlog.Relation, b eventlog.Baseline, snapshot string) (known bool, err error) {
	for {
		head, err := s.log.Head(ctx)
		if err != nil {
			return false, err
		}
		if head.Position >= b.At {
			break
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
	running := s.now.Load()
	if running == nil {
		return false, context.Canceled // the attempt has ended
	}
	s.counting.Lock() // one at a time: each takes memory and connections
	defer s.counting.Unlock()
	err = s.log.PutContents(ctx, running.writer.Head().Epoch, r.OID, b.At, func(put func(id string, rows, pending int64) error) error {
		return rebuild.Contents(ctx, s.log, r.OID, b.Began, b.At, snapshot, func(id string, rows, pending int64) error {
			known = true
			return put(id, rows, pending)
		})
	})
	return known, err
}

// generations tells which tables are to be compared, or to get another shape in the log, since they were altered, and since when.
func generations(begun []eventlog.Baseline) map[uint32]int64 {
	out := map[uint32]int64{}
	for _, b := range begun {
		if !b.Done && (b.Heal || b.Pass == eventlog.PassShape) {
			out[b.OID] = b.Generation
		}
	}
	return out
}

// alteredSince tells whether something was recorded to be done since the attempt began, with a table that was altered. An attempt is not ended for
// that more often than every few seconds, and up to a minute, as long as tables are altered one after the other.
func (s *Sidecar) alteredSince(ctx context.Context) bool {
	begun, err := s.log.Baselines(ctx)
	if err != nil {
		return false
	}
	fresh := false
	for oid, g := range generations(begun) {
		if had, ok := s.generations[oid]; !ok || had < g {
			fresh = true
		}
	}
	now := time.Now()
	switch {
	case !fresh || now.Before(s.restartAt):
		return false
	case now.Sub(s.restartAt) > 5*time.Minute:
		s.restartEvery = 0
	}
	s.restartEvery = min(max(2*s.restartEvery, 3*time.Second), time.Minute)
	s.restartAt = now.Add(s.restartEvery)
	return true
}

// BaselineStatus tells about rows that existed before their table was captured, and about those that are compared with the log.
type BaselineStatus struct {
	// Done: the log has every row of every captured table; of those of which only inserts are captured, it has the rows of before.
	Done bool `json:"done"`
	// Wanted is false after init --no-baseline: such rows are known from their next change on.
	Wanted bool `json:"wanted"`
	// Incomplete are tables of which the log does not have all rows.
	Incomplete []string `json:"incomplete,omitempty"`
	// ToRead are those of Incomplete whose rows are to be taken over, and ToCompare those whose rows are to be compared with the log, where nothing of that has begun yet.
	ToRead    []string `json:"to_read,omitempty"`
	ToCompare []string `json:"to_compare,omitempty"`
	// Tables tells how far those are whose rows are being taken over, or compared with the log.
	Tables []TableBaseline `json:"tables,omitempty"`
	// Progress is how far taking over is, of all tables that had rows, and Comparison how far comparing is; nil: nothing is to be compared now.
	Progress
	Comparison *Progress `json:"comparison,omitempty"`
	// Comparisons are the tables of which only inserts are in the stream: what was updated and deleted is found by comparing them, again and again.
	Comparisons []TableComparison `json:"comparisons,omitempty"`
}

// Progress is how far rows have been read.
type Progress struct {
	// Rows is how many have been, of about TotalRows.
	Rows      int64 `json:"rows"`
	TotalRows int64 `json:"total_rows"`
	// Share is about how much is done, from 0 to 1.
	Share float64 `json:"share"`
	// RowsPerSecond is the rate of the last half minute, and SecondsLeft an estimate; 0 where nobody knows.
	RowsPerSecond float64 `json:"rows_per_second"`
	SecondsLeft   float64 `json:"seconds_left"`

	left, all float64 // of the work
}

func (p *Progress) add(b *eventlog.Baseline) {
	if b.Done && b.Rows == 0 && b.TotalRows == 0 { // there was nothing to do
		return
	}
	p.Rows += b.Rows
	p.TotalRows += max(b.TotalRows, b.Rows)
	p.all += b.Weight()
	p.left += b.Weight() * (1 - b.Share())
}

func (p *Progress) estimate(rate capture.ImportRate) {
	if p.Share = 1; p.all > 0 {
		p.Share = 1 - p.left/p.all
	}
	if p.RowsPerSecond = rate.Rows; rate.Weight > 0 {
		p.SecondsLeft = p.left / rate.Weight
	}
}

// TableComparison is when a table is compared with the log.
type TableComparison struct {
	Table string `json:"table"`
	// ReadAt is when all of its rows had been read last; left out until they have been once, and while they are again (Tables).
	ReadAt time.Time `json:"read_at,omitzero"`
	// NextAt is when it is compared next, at the earliest, if the source counts updates or deletes of it since ReadAt; left out where it is not to be.
	NextAt time.Time `json:"next_at,omitzero"`
	// Changed tells whether the source has counted some by now; left out where it was not asked.
	Changed *bool `json:"changed,omitempty"`
}

// TableBaseline is how far one table is.
type TableBaseline struct {
	Table string `json:"table"`
	// State is queued, waiting (WaitingFor), reading, comparing (with what the log has), interrupted (Error), or, where no sidecar tells, unfinished.
	State string `json:"state"`
	// Compared tells that its rows are compared with what the log has of before, rather than taken over.
	Compared bool  `json:"compared,omitempty"`
	Rows     int64 `json:"rows"` // that have been read, of about TotalRows; 0: nobody knows
	// Pass is 2 while rows that moved to another key meanwhile are looked for once more.
	Pass       int      `json:"pass"`
	TotalRows  int64    `json:"total_rows"`
	WaitingFor []string `json:"waiting_for,omitempty"`
	Error      string   `json:"error,omitempty"`
	Hint       string   `json:"hint,omitempty"`
}

// newBaselineStatus puts together what the log records and, if there is a process at work, what that knows. history has the tables of which the log holds
// events of before a gap, or before they were left out: their rows are compared with those.
func newBaselineStatus(h *eventlog.Head, captured []eventlog.Captured, begun []eventlog.Baseline, history map[uint32]bool, imp *capture.Import) BaselineStatus {
	s := BaselineStatus{Done: true, Wanted: h.Baseline}
	var states []capture.ImportState
	var taking, comparing capture.ImportRate
	if imp != nil {
		states, taking, comparing = imp.State()
	}
	var compared []*eventlog.Baseline
	since := time.Time{} // when the first comparison began that is not done
	for _, t := range captured {
		i := slices.IndexFunc(begun, func(b eventlog.Baseline) bool { return b.OID == t.OID })
		if i >= 0 && (begun[i].Pass != eventlog.PassShape || begun[i].Heal) {
			b := &begun[i]
			row := TableBaseline{Table: t.String(), State: "unfinished", Compared: b.Heal || history[t.OID]}
			if j := slices.IndexFunc(states, func(st capture.ImportState) bool { return st.OID == t.OID }); j >= 0 && states[j].Generation == b.Generation {
				st := &states[j]
				if row.State, row.WaitingFor = st.Doing, st.For; !b.Done && st.Chunks >= b.Chunks { // or the log is ahead of what it has been told
					b = &st.Baseline
				}
				if st.Error != nil {
					row.Error, row.Hint = st.Error.Error(), eventlog.Hint(st.Error)
				}
			}
			row.Rows, row.TotalRows, row.Pass = b.Rows, b.TotalRows, b.Pass
			if row.Compared {
				compared = append(compared, b)
			}
			if !row.Compared || b.Done {
				s.add(b)
			} else if since.IsZero() || b.BeganAt.Before(since) {
				since = b.BeganAt
			}
			if !b.Done && h.Baseline {
				s.Tables = append(s.Tables, row)
			}
		}
		if !t.Complete && !(t.InsertOnly && (i < 0 && !h.Baseline || i >= 0 && begun[i].Done)) {
			s.Done = false
			s.Incomplete = append(s.Incomplete, t.String())
			switch {
			case !h.Baseline || t.Dropped || i >= 0 && (begun[i].Done || begun[i].Pass != eventlog.PassShape || begun[i].Heal): // never, or told by Tables
			case history[t.OID]:
				s.ToCompare = append(s.ToCompare, t.String())
			default:
				s.ToRead = append(s.ToRead, t.String())
			}
		}
	}
	s.estimate(taking)
	if !since.IsZero() && h.Baseline {
		s.Comparison = &Progress{}
		for _, b := range compared { // with those that were done meanwhile
			if !b.Done || !b.UpdatedAt.Before(since) {
				s.Comparison.add(b)
			}
		}
		s.Comparison.estimate(comparing)
	}
	return s
}

// comparisons tells when the tables are compared of which only inserts are in the stream.
func comparisons(h *eventlog.Head, captured []eventlog.Captured, begun []eventlog.Baseline, every time.Duration) (list []TableComparison) {
	for _, t := range captured {
		if !t.InsertOnly || t.Dropped {
			continue
		}
		c := TableComparison{Table: t.String()}
		if i := slices.IndexFunc(begun, func(b eventlog.Baseline) bool { return b.OID == t.OID && b.Done }); i >= 0 {
			if c.ReadAt = begun[i].DoneAt; h.Baseline && every > 0 {
				c.NextAt = begun[i].Next(every)
			}
		}
		list = append(list, c)
	}
	return list
}

// changed asks the source which of the tables it counts updates or deletes of, since they were compared. What it does not tell stays open.
func (s *BaselineStatus) changed(ctx context.Context, c capture.Config, captured []eventlog.Captured, begun []eventlog.Baseline) {
	due := func(name string) *TableComparison {
		i := slices.IndexFunc(s.Comparisons, func(c TableComparison) bool { return c.Table == name && !c.NextAt.IsZero() })
		if i < 0 {
			return nil
		}
		return &s.Comparisons[i]
	}
	var oids []uint32
	for _, t := range captured {
		if t.InsertOnly && due(t.String()) != nil {
			oids = append(oids, t.OID)
		}
	}
	if len(oids) == 0 {
		return
	}
	sizes, _, err := capture.Sizes(ctx, c, oids)
	if err != nil {
		return
	}
	for _, t := range captured {
		size, ok := sizes[t.OID]
		i := slices.IndexFunc(begun, func(b eventlog.Baseline) bool { return b.OID == t.OID })
		if next := due(t.String()); ok && i >= 0 && next != nil {
			is := begun[i].Changes != size.Changes
			next.Changed = &is
		}
	}
}

// Baseline tells how far the tables are whose existing rows this process takes over or compares, without asking anybody; nil if there are none.
func (s *Sidecar) Baseline() *BaselineStatus {
	r := s.now.Load()
	if r == nil {
		return nil
	}
	b, compared := &BaselineStatus{Wanted: true, Done: true}, &Progress{}
	states, taking, comparing := r.rows.State()
	for _, t := range states {
		if t.Pass == eventlog.PassShape && !t.Heal {
			continue
		}
		p := &b.Progress
		if t.Compare {
			p = compared
		}
		if p.add(&t.Baseline); t.Doing == "done" {
			continue
		}
		if b.Done = false; t.Compare {
			b.Comparison = compared
		}
	}
	if b.Done {
		return nil
	}
	b.estimate(taking)
	compared.estimate(comparing)
	return b
}

// Now is how far that is which is being done: taking over existing rows, or, once all are, comparing rows with the log.
func (s *BaselineStatus) Now() (p *Progress, comparing bool) {
	if s.Comparison != nil && s.Share == 1 {
		return s.Comparison, true
	}
	return &s.Progress, false
}

// noteBaseline says now and then how far existing rows are.
func (s *Sidecar) noteBaseline(now time.Time) {
	b := s.Baseline()
	switch {
	case b == nil && s.baselineAt.IsZero():
	case b == nil:
		s.baselineAt = time.Time{}
		if s.compared {
			s.cfg.Logger.Info("the rows are compared with the log")
		} else {
			s.cfg.Logger.Info("the existing rows are in the log")
		}
	case now.Sub(s.baselineAt) >= 10*time.Second:
		first := s.baselineAt.IsZero()
		p, comparing := b.Now()
		what := "taking over existing rows"
		if comparing {
			what = "comparing rows with the log"
		}
		if s.baselineAt, s.compared = now, comparing; !first {
			s.cfg.Logger.Info(what, "done", fmt.Sprintf("%.0f%%", 100*p.Share), "rows", p.Rows, "rows_per_second", int64(p.RowsPerSecond),
				"left", time.Duration(p.SecondsLeft*float64(time.Second)).Round(time.Second))
		}
	}
}
