package backstory

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
)

// takeInEvery is how often it is looked for tables that were made since.
const takeInEvery = 5 * time.Second

// oidsOf gives the OIDs of versions of tables.
func oidsOf(versions []eventlog.RelationVersion) []uint32 {
	var out []uint32
	for _, v := range versions {
		out = append(out, v.OID)
	}
	return out
}

// alter records which captured tables were altered since that was last looked for.
func (s *Sidecar) alter(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var altered []eventlog.Alteration
	var counted []string
	compared := true
	err := s.log.Exclusive(ctx, true, func() error {
		head, err := s.log.Head(ctx)
		if err != nil {
			return err
		}
		compared = head.Baseline
		captured, err := s.log.Captured(ctx)
		if err != nil {
			return err
		}
		if altered, err = capture.Altered(ctx, s.cfg.Capture, captured, *head); err != nil {
			return err
		}
		if len(altered) > 0 {
			if err := s.log.Alter(ctx, altered, head.Position); err != nil {
				return err
			}
		}
		if err := s.leaveOut(ctx, head, captured, false); err != nil {
			return err
		}
		if compared {
			counted, err = s.compare(ctx, captured, head.Position)
		}
		return err
	})
	if len(counted) > 0 {
		s.cfg.Logger.Debug("tables without a usable key are compared with the log: the source counts updates or deletes of them", "relations", strings.Join(counted, " "))
	}
	for _, a := range altered {
		switch {
		case !a.Heal || err != nil:
		case compared:
			s.cfg.Logger.Info(a.String()+" was altered: its rows are compared with the log's", "reason", a.Why)
		default:
			s.cfg.Logger.Warn(a.String()+" was altered; its rows are not compared with the log's, since init --no-baseline", "reason", a.Why, "risk", "rows that have not changed since are in the log as they were before")
		}
	}
	return err
}

// leaveOut records which partitions are not captured, of partitioned tables that are. One that could be is about to be taken in, unless that has been
// tried.
func (s *Sidecar) leaveOut(ctx context.Context, head *eventlog.Head, captured []eventlog.Captured, tried bool) error {
	cfg := s.cfg.Capture
	cfg.Tables, cfg.Exclude = head.Tables, head.Exclude
	out, seen, err := capture.LeftOut(ctx, cfg, captured)
	if err != nil {
		return err
	}
	return s.log.LeaveOut(ctx, out, head, seen, tried)
}

// compare has the tables compared with the log of which only inserts are in the stream, if it is time for that. at is where the log ended before.
func (s *Sidecar) compare(ctx context.Context, captured []eventlog.Captured, at eventlog.Position) (counted []string, err error) {
	if s.cfg.CompareInterval <= 0 {
		return nil, nil
	}
	if r := s.now.Load(); r != nil { // a comparison begins with another attempt, and tables without a key would be read anew in that
		states, _, _ := r.rows.State()
		if slices.ContainsFunc(states, func(t capture.ImportState) bool { return t.Doing == "reading" || t.Doing == "comparing" }) {
			return nil, nil
		}
	}
	var oids []uint32
	for _, c := range captured {
		if c.InsertOnly {
			oids = append(oids, c.OID)
		}
	}
	if len(oids) == 0 {
		return nil, nil
	}
	sizes, next, err := capture.Sizes(ctx, s.cfg.Capture, oids)
	if err != nil {
		return nil, err
	}
	for _, c := range captured {
		size, ok := sizes[c.OID]
		if !ok || !c.InsertOnly {
			continue
		}
		begun, err := s.log.Compare(ctx, eventlog.Baseline{OID: c.OID, WaitFor: next, Began: at, TotalRows: size.Rows, TotalBytes: size.Bytes, Changes: size.Changes}, s.cfg.CompareInterval)
		if err != nil {
			return nil, err
		}
		if begun {
			counted = append(counted, c.String())
		}
	}
	return counted, nil
}

// takeIn takes in tables that were made since init, and that it would have selected, until ctx ends.
func (s *Sidecar) takeIn(ctx context.Context) {
	tick := time.NewTicker(takeInEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := s.alter(ctx)
		if err != nil && ctx.Err() == nil && !passes(err) {
			s.cfg.Logger.Warn("it could not be looked for altered tables; trying again", "err", err, "hint", eventlog.Hint(err))
		}
		s.takeInNow(ctx)
	}
}

// takeInNow publishes and records such tables. What the role may not publish is said, once for each: those that were there at the first look
// are what doctor finds, too.
func (s *Sidecar) takeInNow(ctx context.Context) {
	var left []*capture.Table
	err := s.log.Exclusive(ctx, true, func() (err error) { // not while init is at work
		head, err := s.log.Head(ctx)
		if err != nil {
			return err
		}
		captured, err := s.log.Captured(ctx)
		if err != nil {
			return err
		}
		versions, err := s.log.Relations(ctx)
		if err != nil {
			return err
		}
		cfg := s.cfg.Capture
		cfg.Tables, cfg.Exclude = head.Tables, head.Exclude
		since := *s.lookedAt
		left, err = capture.TakeIn(ctx, cfg, captured, oidsOf(versions), func(t eventlog.Captured) error {
			// What is published is recorded, though the stream may have met its first row and ended.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			one := []eventlog.Captured{t}
			err := errors.Join(s.log.AddCaptured(ctx, one), s.log.LeftOutUntilNow(ctx, one, since))
			if err == nil {
				captured = append(captured, t)
				s.cfg.Logger.Info(t.String()+" is captured from now on", "inserts_only", t.InsertOnly, "empty", t.Complete)
			}
			return err
		})
		s.lookedAt = &head.Position
		return errors.Join(err, s.leaveOut(ctx, head, captured, true))
	})
	if err != nil && ctx.Err() == nil && !passes(err) {
		s.cfg.Logger.Warn("new tables could not be taken in; trying again", "err", err, "hint", eventlog.Hint(err))
	}
	first := s.left == nil
	if first {
		s.left = map[string]bool{}
	}
	for _, t := range left {
		name, what, risk := t.String(), t.String()+" is not captured", "its changes are not in the log"
		if t.Inserts {
			what, risk = "only inserts of "+name+" are captured, through its schema", "its updates and deletes are not in the log"
		}
		if !s.left[name] && (!first || s.out[name]) {
			s.cfg.Logger.Warn(what, "risk", risk, "remedy", "let its owner run what backstory init --print-sql prints, and then backstory init")
		}
		s.left[name] = true
	}
}
