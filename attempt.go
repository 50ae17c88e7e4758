package backstory

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
)

// step is something that an attempt does and that should not take long.
type step struct {
	what  string
	since time.Time
}

// total counts over all writers of this process.
func (s *Sidecar) total() eventlog.Counts {
	var c eventlog.Counts
	if e := s.ended.Load(); e != nil {
		c = *e
	}
	if r := s.now.Load(); r != nil {
		c.Add(r.writer.Stats().Counts())
	}
	return c
}

// attempt runs one writer and one stream until either ends.
func (s *Sidecar) attempt(ctx context.Context, until eventlog.LSN) error {
	s.busy.Store(&step{"beginning to capture: the source or the event log hangs", time.Now()})
	defer s.busy.Store(nil)
	// First whatever speaks against it: a writer fences the one before, which may be at work.
	if err := s.log.Check(ctx); err != nil {
		return err
	}
	s.warn(ctx)
	head, err := s.log.Head(ctx)
	if err != nil {
		return err
	}
	if head.Gap != "" {
		return gapProblem(head.Gap)
	}
	if head.Slot != s.cfg.Capture.Slot {
		return capture.WrongSlot(head.Slot, s.cfg.Capture.Slot)
	}
	if err := s.upgraded(ctx, head); err != nil {
		return err
	}
	if err := capture.SlotFree(ctx, s.cfg.Capture); err != nil {
		return err
	}
	w, err := s.log.NewWriter(ctx)
	if err != nil {
		return eventlog.Remedy(err)
	}
	defer func() {
		w.Close(context.WithoutCancel(ctx))
		c := s.total() // only now: until then status shows what the stream ended with
		s.now.Store(nil)
		s.ended.Store(&c)
	}()
	if gap := w.Head().Gap; gap != "" {
		return gapProblem(gap)
	}
	// Only now: the sidecar before may sleep with locks of the log in its hands, which it has lost now.
	if s.lookedAt == nil {
		s.lookedAt = &head.Position
	}
	if err := s.alter(ctx); err != nil {
		return err
	}
	if s.met { // as many new tables as there are, at once: the stream would end for each
		s.met = false
		s.takeInNow(ctx)
	}
	captured, err := s.log.Captured(ctx)
	if err != nil {
		return err
	}
	if err := s.useRules(ctx, captured); err != nil {
		return err
	}
	streamCtx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	start := w.Head().EndLSN
	stream := capture.NewStream(s.cfg.Capture, captured, start)
	stream.Remember(&s.memory)
	stream.Recorded(s.log.CapturedTable)
	if err := s.retake(ctx, w, stream, captured); err != nil {
		return err
	}
	existing, err := s.existing(ctx, w, captured)
	if err != nil {
		return err
	}
	imp := stream.Import(existing, s.log.Keys, s.contents)
	s.now.Store(&running{w, stream, imp})
	done := make(chan error, 1)
	go func() { done <- stream.Run(streamCtx, until, w.Head) }()
	var looking sync.WaitGroup
	defer looking.Wait()
	defer stop(nil)
	looking.Go(func() { s.takeIn(streamCtx) })
	imported := make(chan error, 1)
	go func() { imported <- imp.Run(streamCtx, s.cfg.Once) }()
	// Appending goes on after ctx has ended, until what was received is in the log; an operator's second signal ends the process.
	appendCtx := context.WithoutCancel(ctx)
	var failed error
	work := func(items int, f func() error) {
		began := time.Now()
		s.busy.Store(&step{"working on one batch: the event log hangs", began})
		failed = f()
		s.busy.Store(nil)
		stream.Took(time.Since(began), items)
		if failed != nil {
			failed = eventlog.Remedy(failed)
			stop(failed)
			return
		}
		stream.Flushed(w.Head().EndLSN)
		stream.Applied(w.Seen())
	}
	s.busy.Store(nil)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	looked := time.Now()
	for open := true; open; {
		var b *eventlog.Batch
		select {
		case b, open = <-stream.Batches():
		case <-tick.C: // on an idle source there may be nothing to append for long
			s.noteContext(time.Minute)
			s.noteRules()
			s.noteBaseline(time.Now())
			if failed != nil {
				continue
			}
			if time.Since(looked) >= capturedEvery {
				looked = time.Now()
				// Somebody's lock on that table holds nothing up.
				short, cancel := context.WithTimeout(ctx, time.Second)
				now, err := s.log.Captured(short)
				head, errHead := s.log.Head(short)
				altered := err == nil && errHead == nil && s.alteredSince(short)
				cancel()
				if altered || err == nil && !sameTables(captured, now) || errHead == nil && head.Baseline != w.Head().Baseline {
					stop(capture.ErrTablesChanged)
				}
			}
			if w.Kept() {
				work(0, func() error { return w.Flush(appendCtx) })
			}
			// What goes wrong at once again, or with the next large transaction, is not over.
			if st := stream.State(); st.Doing == "streaming" && time.Since(st.Since) > 2*time.Second && failed == nil && (!w.Kept() || w.Head().EndLSN > start) {
				s.recovered(st.Since)
			}
		}
		if b == nil {
			continue
		}
		if failed == nil {
			work(len(b.Items), func() error { return w.Append(appendCtx, b) })
		}
		b.Release()
	}
	s.busy.Store(&step{"ending a stream: the source or the event log hangs", time.Now()})
	err = <-done
	stop(nil)
	unread := <-imported // with the stream, the reading of existing rows ends
	if failed != nil {
		return failed
	}
	if err == nil && ctx.Err() == nil && errors.Is(context.Cause(streamCtx), capture.ErrTablesChanged) {
		return capture.ErrTablesChanged
	}
	var narrowed *capture.Narrowed
	if errors.As(err, &narrowed) {
		if e := s.narrow(appendCtx, w, narrowed); e != nil {
			return fmt.Errorf("%w; record that: %w", narrowed, e)
		}
		return fmt.Errorf("%w: %w", capture.ErrTablesChanged, narrowed)
	}
	var missed *capture.Missed
	if errors.As(err, &missed) {
		if s.recorded(appendCtx, captured) {
			return fmt.Errorf("%w: %w", capture.ErrTablesChanged, missed)
		}
		if e := s.missed(appendCtx, w, missed); e != nil {
			return fmt.Errorf("%w; record that: %w", missed, e)
		}
		return fmt.Errorf("%w: %w", capture.ErrTablesChanged, missed)
	}
	var gap *capture.Gap
	if errors.As(err, &gap) {
		if gap.Publication && s.recorded(appendCtx, captured) {
			return fmt.Errorf("%w: %s", capture.ErrTablesChanged, gap.Reason)
		}
		if n := s.dropped.Swap(nil); n != nil {
			gap.Reason += fmt.Sprintf(": the sidecar dropped it, since the source kept %d MB of WAL for it (BACKSTORY_WAL_LIMIT)", *n/1e6)
		}
		if e := w.Gap(appendCtx, gap.Reason, gap.From, gap.To); e != nil {
			return fmt.Errorf("record a gap (%s): %w", gap.Reason, e)
		}
		return gapProblem(gap.Reason)
	}
	if errors.Is(err, capture.ErrClosed) {
		if e := w.SourceClosed(appendCtx); e != nil {
			return fmt.Errorf("%w; %w", err, e)
		}
	}
	if err == nil && s.cfg.Once {
		return unread
	}
	return err
}

// upgraded has the log go on where its source has become another system by pg_upgrade.
func (s *Sidecar) upgraded(ctx context.Context, head *eventlog.Head) error {
	captured, err := s.log.Captured(ctx)
	if err != nil {
		return err
	}
	now, tables, err := capture.Upgraded(ctx, s.cfg.Capture, *head, captured)
	if err != nil || now == nil {
		return err
	}
	if err := s.log.Upgrade(ctx, *head, *now, tables); err != nil {
		return err
	}
	s.cfg.Logger.Info("the source was upgraded with pg_upgrade; the log goes on", "from", head.Version/10000, "to", now.Version/10000, "system_id", now.SystemID, "lsn", now.EndLSN.String())
	return nil
}

// capturedEvery is how often it is looked whether init has changed what is captured.
const capturedEvery = 3 * time.Second

func sameTables(a, b []eventlog.Captured) bool {
	return slices.EqualFunc(a, b, func(a, b eventlog.Captured) bool {
		return a.OID == b.OID && a.Published == b.Published && a.SinceLSN == b.SinceLSN && a.InsertOnly == b.InsertOnly
	})
}

// retake notes which tables were not captured for a while: at once where the log is beyond that, otherwise the stream ends where a table
// is taken in, since only there can be told whether it has a history.
func (s *Sidecar) retake(ctx context.Context, w *eventlog.Writer, stream *capture.Stream, captured []eventlog.Captured) error {
	retaken, err := s.log.Retaken(ctx)
	if err != nil {
		return err
	}
	var later eventlog.LSN
	for _, c := range captured {
		switch {
		case c.InsertOnly && len(c.Key) == 0:
		case c.SinceLSN > w.Head().EndLSN:
			if !c.InsertOnly && w.Doubted(c.OID) {
				stream.Doubt(c.OID)
			}
			if later == 0 || c.SinceLSN < later {
				later = c.SinceLSN
			}
		case slices.Contains(retaken, c.OID):
			if err := w.Retaken(ctx, c); err != nil {
				return fmt.Errorf("record that %s was not captured for a while: %w", c, err)
			}
		}
	}
	if later > 0 {
		stream.PauseAt(later)
	}
	return nil
}

// warn tells the logger, once, what doctor would find: as soon as there is a source to ask.
func (s *Sidecar) warn(ctx context.Context) {
	if s.warned {
		return
	}
	found, err := capture.Examine(ctx, s.cfg.Capture)
	if err != nil {
		return // the attempt will meet it, too
	}
	s.warned = true
	for _, f := range found {
		if f.Severity != capture.Info {
			s.cfg.Logger.Warn(f.What, "risk", f.Risk, "remedy", f.Mend())
		}
	}
}

// narrow records that less of some tables is published than before: first as gaps in their histories, then for the next attempt.
func (s *Sidecar) narrow(ctx context.Context, w *eventlog.Writer, n *capture.Narrowed) error {
	var was, now []eventlog.Captured
	captured, err := s.log.Captured(ctx)
	if err != nil {
		return err
	}
	for _, t := range n.Tables {
		if err := w.TableGap(ctx, t.Relation, "updates and deletes are not published: "+t.Why, n.From, n.To); err != nil {
			return err
		}
		if i := slices.IndexFunc(captured, func(c eventlog.Captured) bool { return c.OID == t.OID }); i >= 0 {
			was, now = append(was, captured[i]), append(now, t.Captured)
		}
	}
	return s.log.ChangeCaptured(ctx, was, now)
}

// missed records that changes of some tables are missing: first as gaps in their histories. Those that are published by now are captured anew from here
// on; the others are taken in again by the next attempt, where the role may publish them.
func (s *Sidecar) missed(ctx context.Context, w *eventlog.Writer, m *capture.Missed) error {
	captured, err := s.log.Captured(ctx)
	if err != nil {
		return err
	}
	var was, now []eventlog.Captured
	for _, t := range m.Tables {
		i := slices.IndexFunc(captured, func(c eventlog.Captured) bool { return c.OID == t.OID })
		if i < 0 || captured[i].Published != t.Published {
			continue // init has left it out, or captures it anew
		}
		at, err := w.Missed(ctx, t.Relation, t.Why+"; what changed there meanwhile is not in the stream", m.From, m.To)
		if err != nil {
			return err
		}
		next := "its rows are compared with the log's"
		if was = append(was, captured[i]); t.Now == "" {
			s.met, next = true, "it is published again, and its rows compared with the log's, if the role may do that"
			if s.out == nil {
				s.out = map[string]bool{}
			}
			s.out[t.String()] = true
		} else {
			c := captured[i]
			r := *c.Relation
			r.Complete = false
			c.Relation, c.Published, c.SinceLSN = &r, t.Now, max(at, m.To)
			if r.InsertOnly && len(r.Key) == 0 { // the comparison of all rows tells the rest
				c.SinceLSN = at
			}
			now = append(now, c)
		}
		if !w.Head().Baseline {
			next = "its rows are not compared with the log's, since init --no-baseline"
		}
		s.cfg.Logger.Warn("changes of "+t.String()+" are missing: "+next, "reason", t.Why, "remedy", "what is to be captured say BACKSTORY_TABLES and BACKSTORY_EXCLUDE, with backstory init")
	}
	return s.log.ChangeCaptured(ctx, was, now)
}

// recorded tells whether what looks like a gap is the work of init, which first alters the publications and then records it.
func (s *Sidecar) recorded(ctx context.Context, was []eventlog.Captured) bool {
	for range 10 {
		now, err := s.log.Captured(ctx)
		if err == nil && !sameTables(was, now) {
			return capture.CheckPublications(ctx, s.cfg.Capture, now) == nil
		}
		time.Sleep(200 * time.Millisecond)
	}
	return false
}

func gapProblem(reason string) error {
	return &eventlog.Problem{Err: fmt.Errorf("%w: %s", ErrGap, reason), Hint: eventlog.GapHint}
}

// ErrGap means that the log may lack changes of the source, and says so in an event; a person has to decide how it goes on.
var ErrGap = errors.New("possible gap in the history")

// passes tells whether an error goes away by itself.
func passes(err error) bool {
	switch {
	case errors.Is(err, ErrGap):
		return false
	case errors.Is(err, eventlog.ErrFenced), errors.Is(err, eventlog.ErrReadOnly), errors.Is(err, capture.ErrSlotInUse), errors.Is(err, capture.ErrTablesChanged), errors.Is(err, capture.ErrStandby), errors.Is(err, capture.ErrClosed):
		return true
	}
	state := eventlog.SQLState(err)
	for _, class := range []string{"08", "57", "53", "25006", "40"} {
		if strings.HasPrefix(state, class) {
			return true
		}
	}
	if state != "" {
		return false
	}
	var p *eventlog.Problem
	if errors.As(err, &p) {
		return strings.Contains(err.Error(), "connect to")
	}
	return !strings.HasPrefix(err.Error(), "bug:")
}
