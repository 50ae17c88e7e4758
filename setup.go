package backstory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

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
	// LogDatabase is where the log is or will be, LogRole who we are there, and MayCreateLog whether that is enough to make it.
	LogDatabase, LogRole string
	MayCreateLog         bool
	// Rows and Bytes of the tables that are taken in, as they are now, by the server's estimates.
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
	for _, t := range cp.Taken() {
		p.Rows += t.Rows
		p.Bytes += t.Bytes
	}
	log, err := eventlog.Connect(ctx, cfg.Log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	err = log.Pool().QueryRow(ctx, `SELECT current_database()::text, current_user::text, has_database_privilege(current_database(), 'CREATE')`).
		Scan(&p.LogDatabase, &p.LogRole, &p.MayCreateLog)
	if err != nil {
		return nil, fmt.Errorf("ask the log's server: %w", err)
	}
	var owner string
	err = log.Pool().QueryRow(ctx, `SELECT pg_get_userbyid(nspowner)::text FROM pg_namespace WHERE nspname = 'backstory' AND NOT pg_has_role(nspowner, 'USAGE')`).Scan(&owner)
	if err == nil {
		return nil, &eventlog.Problem{Err: fmt.Errorf("schema backstory in database %s belongs to role %s; %s has to own the event log", p.LogDatabase, owner, p.LogRole),
			Hint: "If it is another log, use that role, or keep this one in another database (BACKSTORY_LOG_URL). If it was made by mistake and holds nothing, drop it (DROP SCHEMA backstory CASCADE) and let a superuser, " +
				"or a member of both roles, run what backstory init --print-sql prints."}
	} else if !errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("look for the event log: %w", err)
	}
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
			Hint: "Give each source a log of its own (BACKSTORY_LOG_URL). If this is the log's source after pg_upgrade, backstory run goes on by itself, or says why it cannot. If the source was rebuilt from a dump and the history is to go on, use backstory init --accept-gap."}
	}
	return p, nil
}

// permitted says what the role may not do, before anything is done; also to the tables that can be left out, if all of them are wanted; again
// is what to run when it may, if not init.
func (p *Plan) permitted(all bool, again string) error {
	var lacks []string
	if !p.LogExists && !p.MayCreateLog {
		lacks = append(lacks, fmt.Sprintf("make the schema of the event log in database %s", p.LogDatabase))
	}
	if len(p.NotOwned) > 0 && (all || len(p.Left) == 0) {
		var names []string
		for _, t := range p.NotOwned {
			if names = append(names, t.String()); len(names) == 5 && len(p.NotOwned) > 5 {
				names[4] = fmt.Sprintf("%d more tables", len(p.NotOwned)-4)
				break
			}
		}
		lacks = append(lacks, "publish "+strings.Join(names, ", ")+", which it does not own")
	}
	if len(p.NotIts) > 0 {
		lacks = append(lacks, "make or alter publication "+strings.Join(p.NotIts, " or "))
	}
	if len(p.DDL) > 0 && !p.Superuser {
		lacks = append(lacks, "make or remove an event trigger, which takes a superuser")
	}
	if len(lacks) == 0 {
		return nil
	}
	who, how := "a superuser, or a role that is a member of both "+p.Role+" and the tables' owner,", "backstory init" // it makes the log as the one
	if p.LogExists {
		who = "the tables' owner, or a superuser,"
	}
	if len(p.DDL) > 0 {
		who, how = "a superuser", "backstory init --ddl-trigger"
		if !*p.DDLTrigger {
			how += "=false"
		}
	}
	return &eventlog.Problem{Err: fmt.Errorf("role %s may not %s", p.Role, strings.Join(lacks, ", nor ")),
		Hint: "Let " + who + " run what " + how + " --print-sql prints; then run " + cmp.Or(again, how) + " again."}
}

// leavesCaptured tells whether a table that may be left out is captured, and so is no new one.
func leavesCaptured(p *capture.Plan, captured []eventlog.Captured) bool {
	return slices.ContainsFunc(p.Left, func(t *capture.Table) bool {
		return slices.ContainsFunc(captured, func(c eventlog.Captured) bool { return c.OID == t.OID })
	})
}

// Done is what Init did.
type Done struct {
	Created bool // the log's schema was made or brought up to date
	Start   eventlog.LSN
	Tables  []eventlog.Captured
	// Left are the selected tables that it went on without, since Role may not publish them.
	Left []*capture.Table
	Role string
}

// Init makes the log's schema, the publications and the slot. It is idempotent: what is there already stays.
// waiting is told, once a second, for whom it waits.
func Init(ctx context.Context, cfg Config, p *Plan, waiting func([]string)) (*Done, error) {
	cfg = cfg.withDefaults()
	if err := p.permitted(false, ""); err != nil {
		return nil, err
	}
	log, err := eventlog.Connect(ctx, cfg.Log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	making := "backstory init is making replication slot " + cfg.Capture.Slot
	if p.Head == nil && !p.NewSlot {
		if err := leftOver(ctx, cfg, log, p, making); err != nil {
			return nil, err
		}
		p.NewSlot = true
	}
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
	if head == nil {
		if err := note(ctx, log, making); err != nil {
			return nil, err
		}
	}
	if head != nil {
		if err := mayGoOn(ctx, cfg, p, head, before); err != nil {
			return nil, err
		}
	}
	if leavesCaptured(p.Plan, before) {
		return nil, p.permitted(true, "")
	}
	p.LeaveOut()
	versions, err := log.Relations(ctx)
	if err != nil {
		return nil, err
	}
	if head != nil {
		if err := capture.AwaitLocks(ctx, cfg.Capture, p.Plan, waiting); err != nil { // now, when no sidecar waits for us
			return nil, err
		}
		short := cfg.Capture
		short.BlockedAfter = min(short.BlockedAfter, 10*time.Second)
		return d, log.Exclusive(ctx, false, func() error { // a sidecar may be looking for new tables
			// What is selected comes first: from then on no sidecar takes in what is taken out here.
			if err := log.Select(ctx, cfg.Capture.Tables, cfg.Capture.Exclude, !cfg.NoBaseline); err != nil {
				return err
			}
			if before, err = log.Captured(ctx); err != nil {
				return err
			}
			if p.Plan, err = capture.Prepare(ctx, cfg.Capture); err != nil { // one may just have done so
				return err
			}
			p.LeaveOut()
			res, err := capture.Apply(ctx, short, p.Plan, before, oidsOf(versions), waiting)
			if err != nil {
				return err
			}
			gone, err := capture.Gone(ctx, cfg.Capture, before) // which the sidecar notes, in its place
			if err != nil {
				return err
			}
			d.Start, d.Tables, d.Left, d.Role = res.Start, res.Tables, p.Left, p.Role
			return log.ChangeCaptured(ctx, before, append(slices.Clone(res.Tables), gone...))
		})
	}
	res, err := capture.Apply(ctx, cfg.Capture, p.Plan, before, oidsOf(versions), waiting)
	if err != nil {
		return nil, err
	}
	d.Start, d.Tables, d.Left, d.Role = res.Start, res.Tables, p.Left, p.Role
	err = log.Begin(ctx, eventlog.Head{SystemID: p.Server.SystemID, Database: p.Server.Database, Timeline: p.Server.Timeline, EndLSN: res.Start, BeganAt: res.At, Slot: cfg.Capture.Slot, Version: p.Server.Version, Baseline: !cfg.NoBaseline,
		Tables: cfg.Capture.Tables, Exclude: cfg.Capture.Exclude}, res.Tables)
	if err == nil {
		err = note(ctx, log, "the event log of backstory")
	}
	return d, err
}

// note puts a comment on the log's schema: between a slot and the log that it is for there is nothing else that a crash
// would leave.
func note(ctx context.Context, log *eventlog.Log, text string) error {
	if _, err := log.Pool().Exec(ctx, `COMMENT ON SCHEMA backstory IS '`+text+`'`); err != nil {
		return eventlog.Remedy(fmt.Errorf("prepare the event log: %w", err))
	}
	return nil
}

// leftOver drops the slot of an init that did not finish, since it does not begin where the log will. Any other slot of
// that name may be that of another log, whose changes it keeps.
func leftOver(ctx context.Context, cfg Config, log *eventlog.Log, p *Plan, making string) error {
	slot := cfg.Capture.Slot
	if p.Slot.Active {
		return &eventlog.Problem{Err: fmt.Errorf("replication slot %s is in use (pid %d), but not by this log", slot, p.Slot.ActivePID), Hint: "Choose another name with BACKSTORY_SLOT."}
	}
	var comment string
	if err := log.Pool().QueryRow(ctx, `SELECT coalesce(obj_description(oid, 'pg_namespace'), '') FROM pg_namespace WHERE nspname = 'backstory'`).Scan(&comment); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return fmt.Errorf("look at the event log: %w", err)
	}
	if comment != making {
		return &eventlog.Problem{Err: fmt.Errorf("replication slot %s exists already, but this log has not made it", slot),
			Hint: "If another log uses it, choose another name with BACKSTORY_SLOT. If its log is gone for good, drop it: SELECT pg_drop_replication_slot('" + slot + "');"}
	}
	return capture.DropSlot(ctx, cfg.Capture)
}

// mayGoOn refuses what would hide that changes may be missing.
func mayGoOn(ctx context.Context, cfg Config, p *Plan, head *eventlog.Head, captured []eventlog.Captured) error {
	if head.Gap != "" {
		return gapProblem(head.Gap)
	}
	if head.Slot != cfg.Capture.Slot {
		return capture.WrongSlot(head.Slot, cfg.Capture.Slot)
	}
	if p.NewSlot {
		return gapProblem("the replication slot " + cfg.Capture.Slot + " is gone")
	}
	err := capture.CheckPublications(ctx, cfg.Capture, captured)
	var gap *capture.Gap
	if errors.As(err, &gap) {
		return gapProblem(gap.Reason)
	}
	var narrowed *capture.Narrowed
	var missed *capture.Missed
	if errors.As(err, &narrowed) || errors.As(err, &missed) { // which the sidecar notes when it comes to that point
		return nil
	}
	return err
}

// AcceptGap lets a log go on after a gap, with a new slot: what happened in between stays unknown, and no table counts as
// complete until the sidecar has compared it with the source.
func AcceptGap(ctx context.Context, cfg Config, waiting func([]string)) (*Done, error) {
	cfg = cfg.withDefaults()
	log, err := eventlog.Open(ctx, cfg.Log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	head, err := log.Head(ctx)
	if err != nil {
		return nil, err
	}
	p, err := capture.Prepare(ctx, cfg.Capture) // refuses a slot that is not ours
	if err != nil {
		return nil, err
	}
	if p.Slot.Active {
		return nil, &eventlog.Problem{Err: fmt.Errorf("replication slot %s is in use (pid %d)", cfg.Capture.Slot, p.Slot.ActivePID),
			Hint: "Stop the sidecar first: accepting a gap makes a new slot."}
	}
	before, err := log.Captured(ctx)
	if err != nil {
		return nil, err
	}
	needed := leavesCaptured(p, before)
	if !needed {
		p.LeaveOut()
	}
	if head.Gap == "" && mayGoOn(ctx, cfg, &Plan{Plan: p}, head, before) == nil && capture.CheckStart(ctx, cfg.Capture, *head) == nil {
		return nil, &eventlog.Problem{Err: errors.New("there is no gap: the slot, the publications and the log fit together"), Hint: "Nothing was changed. backstory run goes on where the log ends."}
	}
	if err := (&Plan{Plan: p, LogExists: true}).permitted(needed, "backstory init --accept-gap"); err != nil {
		return nil, err
	}
	reason, dropped := whyAccepted(ctx, cfg, log, p), false
	p.NewSlot = true
	p.Replace = func() error {
		if head.Gap == "" { // the gap is recorded before it is accepted, so that the history says so
			w, err := log.NewWriter(ctx)
			if err != nil {
				return eventlog.Remedy(err)
			}
			if h := w.Head(); h.Gap == "" { // nobody has gone on, or found it, meanwhile
				err = w.Gap(ctx, reason, h.EndLSN, max(h.EndLSN, p.Server.FlushLSN))
			}
			if e := w.Close(ctx); err == nil {
				err = e
			}
			if err != nil {
				return err
			}
		}
		if !p.Slot.Exists {
			return nil
		}
		err := capture.DropSlot(ctx, cfg.Capture)
		dropped = err == nil
		return err
	}
	// What is selected comes first: from then on no sidecar takes in what is left out here.
	if err := log.Select(ctx, cfg.Capture.Tables, cfg.Capture.Exclude, !cfg.NoBaseline); err != nil {
		return nil, err
	}
	res, err := capture.Apply(ctx, cfg.Capture, p, nil, nil, waiting)
	if err != nil && dropped {
		err = &eventlog.Problem{Err: fmt.Errorf("the gap is not accepted, and the old replication slot is gone: %w", err), Hint: strings.TrimSpace(eventlog.Hint(err) + " Run backstory init --accept-gap again; the log waits for that.")}
	}
	if err != nil {
		return nil, err
	}
	for i, t := range res.Tables {
		t.Relation.Complete = false
		if j := slices.IndexFunc(before, func(b eventlog.Captured) bool { return b.OID == t.OID }); j >= 0 {
			// Since then, but for the gap, which is noted; a source that has gone back to an earlier state uses these places again.
			res.Tables[i].SinceLSN = min(before[j].SinceLSN, res.Start)
		}
	}
	gone, err := capture.Gone(ctx, cfg.Capture, before)
	if err != nil {
		return nil, err
	}
	if err := log.SetCaptured(ctx, append(slices.Clone(res.Tables), gone...)); err != nil {
		return nil, err
	}
	return &Done{Start: res.Start, Tables: res.Tables, Left: p.Left, Role: p.Role}, log.AcceptGap(ctx, eventlog.Head{SystemID: p.Server.SystemID, Database: p.Server.Database,
		Timeline: p.Server.Timeline, EndLSN: res.Start, Slot: cfg.Capture.Slot, Version: p.Server.Version})
}

// whyAccepted is the reason of a gap that a person accepts before the sidecar has met it.
func whyAccepted(ctx context.Context, cfg Config, log *eventlog.Log, p *capture.Plan) string {
	reason := "accepted by hand: the replication slot was made anew"
	captured, err := log.Captured(ctx)
	if err != nil {
		return reason
	}
	var gap *capture.Gap
	if errors.As(capture.CheckPublications(ctx, cfg.Capture, captured), &gap) {
		return "accepted by hand: " + gap.Reason
	}
	if p.NewSlot {
		return "accepted by hand: the replication slot " + cfg.Capture.Slot + " is gone"
	}
	return reason
}
