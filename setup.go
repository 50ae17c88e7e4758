package backstory

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
)

// Plan is what Init would do, and what it will cost.
type Plan struct {
	*capture.Plan
	// LogExists tells that there is an event log already; Head is its end if it has a source.
	LogExists bool
	Head      *eventlog.Head
	// SameServer tells that the log will be kept by the source's own server.
	SameServer bool
	// Rows and Bytes of the selected tables as they are now, by the server's estimates.
	Rows, Bytes int64
}

// Prepare looks at source and log and changes nothing.
func Prepare(ctx context.Context, cfg Config) (*Plan, error) {
	cfg = cfg.withDefaults()
	cp, err := capture.Prepare(ctx, cfg.Capture)
	if err != nil {
		return nil, err
	}
	p := &Plan{Plan: cp}
	for _, t := range cp.Tables {
		p.Rows += t.Rows
		p.Bytes += t.Bytes
	}
	log, err := eventlog.Connect(ctx, cfg.Log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	var system string
	if err := log.Pool().QueryRow(ctx, `SELECT system_identifier::text FROM pg_control_system()`).Scan(&system); err == nil {
		p.SameServer = system == cp.Server.SystemID
	} else {
		p.SameServer = cfg.Log.URL == cfg.Capture.URL
	}
	old, err := eventlog.Open(ctx, cfg.Log)
	switch {
	case errors.Is(err, eventlog.ErrNoLog):
		return p, nil
	case errors.Is(err, eventlog.ErrNewerLog):
		return nil, err
	case err != nil:
		p.LogExists = true
		return p, nil
	}
	defer old.Close()
	p.LogExists = true
	if p.Head, err = old.Head(ctx); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return nil, err
	}
	if p.Head != nil && (p.Head.SystemID != cp.Server.SystemID || p.Head.Database != cp.Server.Database) {
		return nil, &eventlog.Problem{Err: fmt.Errorf("this event log belongs to another source (database %s of system %s)", p.Head.Database, p.Head.SystemID),
			Hint: "Give each source a log of its own (BACKSTORY_LOG_URL). If the source was rebuilt from a dump and the history is to go on, use backstory init --accept-gap."}
	}
	return p, nil
}

// Done is what Init did.
type Done struct {
	Created bool // the log's schema was made or brought up to date
	Start   eventlog.LSN
	Tables  []eventlog.Captured
}

// Init makes the log's schema, the publications and the slot. It is idempotent: what is there already stays.
// waiting is told, once a second, for whom making the slot waits.
func Init(ctx context.Context, cfg Config, p *Plan, waiting func([]string)) (*Done, error) {
	cfg = cfg.withDefaults()
	log, err := eventlog.Connect(ctx, cfg.Log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d := &Done{}
	if d.Created, err = log.Create(ctx); err != nil {
		return nil, err
	}
	head, err := log.Head(ctx)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return nil, err
	}
	before, err := log.Captured(ctx)
	if err != nil {
		return nil, err
	}
	if head == nil && !p.NewSlot {
		if p.Slot.Active {
			return nil, &eventlog.Problem{Err: fmt.Errorf("replication slot %s is in use (pid %d), but not by this log", cfg.Capture.Slot, p.Slot.ActivePID),
				Hint: "Choose another name with BACKSTORY_SLOT."}
		}
		// Left over from an init that did not finish, or from a log that is gone: it does not begin where this log does.
		if err := capture.DropSlot(ctx, cfg.Capture); err != nil {
			return nil, err
		}
		p.NewSlot = true
	}
	if head != nil && p.NewSlot {
		return nil, &eventlog.Problem{Err: fmt.Errorf("%w: the replication slot %s is gone", ErrGap, cfg.Capture.Slot), Hint: eventlog.GapHint}
	}
	res, err := capture.Apply(ctx, cfg.Capture, p.Plan, before, waiting)
	if err != nil {
		return nil, err
	}
	d.Start, d.Tables = res.Start, res.Tables
	if head != nil {
		return d, log.SetCaptured(ctx, res.Tables)
	}
	return d, log.Begin(ctx, eventlog.Head{SystemID: p.Server.SystemID, Database: p.Server.Database, Timeline: p.Server.Timeline, EndLSN: res.Start, Slot: cfg.Capture.Slot}, res.Tables)
}

// AcceptGap lets a log go on after a gap, with a new slot: what happened in between stays unknown, and no table counts as
// complete any more.
func AcceptGap(ctx context.Context, cfg Config, waiting func([]string)) (*Done, error) {
	cfg = cfg.withDefaults()
	log, err := eventlog.Open(ctx, cfg.Log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if err := capture.DropSlot(ctx, cfg.Capture); err != nil {
		return nil, err
	}
	p, err := capture.Prepare(ctx, cfg.Capture)
	if err != nil {
		return nil, err
	}
	head, err := log.Head(ctx)
	if err != nil {
		return nil, err
	}
	if head.Gap == "" { // the gap is recorded before it is accepted, so that the history says so
		w, err := log.NewWriter(ctx)
		if err != nil {
			return nil, err
		}
		err = w.Gap(ctx, "accepted by hand: the replication slot was made anew", head.EndLSN, p.Server.FlushLSN)
		if e := w.Close(ctx); err == nil {
			err = e
		}
		if err != nil {
			return nil, err
		}
	}
	res, err := capture.Apply(ctx, cfg.Capture, p, nil, waiting)
	if err != nil {
		return nil, err
	}
	for i := range res.Tables {
		res.Tables[i].Relation.Complete = false
	}
	if err := log.SetCaptured(ctx, res.Tables); err != nil {
		return nil, err
	}
	return &Done{Start: res.Start, Tables: res.Tables}, log.AcceptGap(ctx, eventlog.Head{SystemID: p.Server.SystemID, Database: p.Server.Database,
		Timeline: p.Server.Timeline, EndLSN: res.Start, Slot: cfg.Capture.Slot})
}
