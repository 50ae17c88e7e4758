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

const (
	// examineLimit bounds each part of what Examine looks at in the log.
	examineLimit = 10 * time.Second
	// stoppedAfter is how long nobody may stream before that is a finding: a restart takes less.
	stoppedAfter = 10 * time.Minute
	// muchGrowth of the log in a day is worth a note where it lies on the source's own server.
	muchGrowth = 1 << 30
)

// Examine looks for everything about source and log that would lose data, harm the application or surprise its owner. It changes
// nothing, and what cannot be looked at is a finding, too.
func Examine(ctx context.Context, cfg Config) ([]capture.Finding, error) {
	cfg = cfg.withDefaults()
	found, err := capture.Examine(ctx, cfg.Capture)
	if err != nil {
		return nil, err
	}
	x := &logExamination{cfg: cfg, found: found, inSource: eventlog.Address(cfg.Log.URL) == eventlog.Address(cfg.Capture.URL)}
	opening, cancel := context.WithTimeout(ctx, examineLimit)
	x.log, err = eventlog.Open(opening, cfg.Log)
	cancel()
	parts := x.parts()
	switch {
	case errors.Is(err, eventlog.ErrNoLog):
		parts = x.partsBefore()
	case err != nil:
		x.add(capture.Finding{Check: "log", Severity: capture.Danger, What: err.Error(), Risk: "nothing is captured; the source keeps its WAL meanwhile", Remedy: eventlog.Hint(err)})
		return x.found, ctx.Err()
	default:
		defer x.log.Close()
	}
	for _, p := range parts {
		limited, cancel := context.WithTimeout(ctx, examineLimit)
		err := p.look(limited)
		cancel()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			x.add(capture.NotLookedAt(p.what, err))
		}
		if x.head == nil && x.log != nil {
			break // init has not finished; that there is no slot is found
		}
	}
	if !x.inSource { // then it is others' business
		x.drop(capture.AllTables)
	}
	return x.found, nil
}

// logExamination is one look at a log, after one at its source.
type logExamination struct {
	cfg      Config
	log      *eventlog.Log // nil: there is none yet
	head     *eventlog.Head
	captured []eventlog.Captured
	inSource bool // the log is in the source's database, or …
	sameDisk bool // … at least kept by its server
	found    []capture.Finding
}

type examinePart struct {
	what string
	look func(context.Context) error
}

func (x *logExamination) partsBefore() []examinePart {
	return []examinePart{{"what backstory init may do", x.mayInit}, {"the log's database", x.database}}
}

func (x *logExamination) parts() []examinePart {
	return []examinePart{{"the end of the log", x.end}, {"the connection to the log", x.server}, {"whether the log can go on", x.goesOn}, {"whether a sidecar is at work", x.atWork},
		{"which rows the log has", x.rows}, {"the reactors", x.reactors}, {"the size of the log", x.size}}
}

func (x *logExamination) add(f capture.Finding) { x.found = append(x.found, f) }

func (x *logExamination) has(check string) bool {
	return slices.ContainsFunc(x.found, func(f capture.Finding) bool { return f.Check == check })
}

// drop takes back what another finding says better.
func (x *logExamination) drop(checks ...string) {
	x.found = slices.DeleteFunc(x.found, func(f capture.Finding) bool { return slices.Contains(checks, f.Check) })
}

// mayInit tells what init may not do.
func (x *logExamination) mayInit(ctx context.Context) error {
	p, err := Prepare(ctx, x.cfg)
	if err != nil {
		return nil // what speaks against that has been found
	}
	err = p.permitted(true, "")
	if err == nil {
		return nil
	}
	severity, risk := capture.Danger, "backstory init cannot set up"
	if p.permitted(false, "") == nil && !leavesCaptured(p.Plan, x.captured) {
		severity, risk = capture.Warning, "backstory init goes on without them: their changes are not in the log"
		if !slices.ContainsFunc(p.Left, func(t *capture.Table) bool { return !t.Inserts }) {
			risk = "backstory init goes on without them: only their inserts are in the log, through their schema"
		}
	}
	f := capture.Finding{Check: "may-not-init", Severity: severity, What: err.Error(), Risk: risk, Remedy: eventlog.Hint(err), Cost: "the role may do what the tables' owner may"}
	var sql []string
	if !p.MayCreateLog {
		sql = append(sql, "GRANT CREATE ON DATABASE "+eventlog.QuoteIdent(p.LogDatabase)+" TO "+eventlog.QuoteIdent(p.LogRole)+";")
	}
	owners := []string{}
	for _, t := range p.NotOwned {
		if q := "GRANT " + eventlog.QuoteIdent(t.Owner) + " TO " + eventlog.QuoteIdent(p.Role) + ";"; !slices.Contains(sql, q) {
			sql, owners = append(sql, q), append(owners, t.Owner)
		}
	}
	conn, err := x.cfg.Capture.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var super bool // whose rights nobody should be given for that
	if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_roles WHERE rolsuper AND rolname = ANY ($1))`, owners).Scan(&super); err != nil {
		return fmt.Errorf("ask for the tables' owners: %w", err)
	}
	if x.inSource && !super { // or it takes more than one superuser
		f.SQL, f.Remedy = strings.Join(sql, " "), "as a superuser; or instead, let one run what backstory init --print-sql prints"
	}
	x.add(f)
	return nil
}

// database looks at the one in which the log will be.
func (x *logExamination) database(ctx context.Context) error {
	log, err := eventlog.Connect(ctx, x.cfg.Log)
	if err != nil {
		return err
	}
	defer log.Close()
	var encoding string
	if err := log.Pool().QueryRow(ctx, `SHOW server_encoding`).Scan(&encoding); err != nil {
		return fmt.Errorf("read the log's encoding: %w", err)
	}
	if encoding != "UTF8" && !x.inSource {
		x.add(capture.Finding{Check: "log-encoding", Severity: capture.Danger, What: "the log's database has encoding " + encoding, Risk: "backstory init cannot make the log",
			SQL: "CREATE DATABASE backstory ENCODING 'UTF8' TEMPLATE template0;", Remedy: "and name it in BACKSTORY_LOG_URL", Cost: "none"})
	}
	return nil
}

// end reads the end of the log.
func (x *logExamination) end(ctx context.Context) (err error) {
	if x.head, err = x.log.Head(ctx); errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err == nil {
		x.captured, err = x.log.Captured(ctx)
	}
	return err
}

// server looks at the log's server and at what the role may do there.
func (x *logExamination) server(ctx context.Context) error {
	c, err := x.log.Pool().Acquire(ctx)
	if err != nil {
		return err
	}
	defer c.Release()
	if !x.inSource {
		f, err := capture.Pooled(ctx, c.Conn(), "the log")
		if err != nil {
			return err
		}
		if f != nil {
			x.add(*f)
		}
	}
	var system, database, role, owner, fsync, readOnly string
	var standby, mayWrite, super bool
	err = c.QueryRow(ctx, `SELECT (SELECT system_identifier::text FROM pg_control_system()), current_database()::text, current_user::text, pg_get_userbyid(nspowner)::text, pg_has_role(nspowner, 'USAGE'),
		(SELECT rolsuper FROM pg_roles WHERE oid = nspowner), current_setting('fsync'), current_setting('default_transaction_read_only'), pg_is_in_recovery() FROM pg_namespace WHERE nspname = 'backstory'`).
		Scan(&system, &database, &role, &owner, &mayWrite, &super, &fsync, &readOnly, &standby)
	if err != nil {
		return fmt.Errorf("ask the log's server: %w", err)
	}
	x.sameDisk = system == x.head.SystemID
	x.inSource = x.sameDisk && database == x.head.Database
	if !mayWrite {
		f := capture.Finding{Check: "log-owner", Severity: capture.Danger, What: fmt.Sprintf("role %s does not own the log, which belongs to %s", role, owner), Risk: "backstory run cannot write; the source keeps its WAL meanwhile", Remedy: "use that role"}
		if !super { // whose rights nobody should be given for that
			f.SQL, f.Remedy, f.Cost = "GRANT "+eventlog.QuoteIdent(owner)+" TO "+eventlog.QuoteIdent(role)+";", "as a superuser; or use that role", "the role may do what the other may"
		}
		x.add(f)
	}
	if fsync == "off" && !x.sameDisk {
		x.add(capture.Finding{Check: "log-fsync", Severity: capture.Danger, What: "fsync is off at the log's server", Risk: "after a crash the log may have lost what the source was told is safe: changes are missing",
			SQL: "ALTER SYSTEM SET fsync = 'on'; SELECT pg_reload_conf();", Cost: "slower commits"})
	}
	switch {
	case standby:
		x.add(capture.Finding{Check: "log-read-only", Severity: capture.Danger, What: "the log's server is a standby", Risk: "backstory run cannot write; the source keeps its WAL meanwhile", Remedy: "give the URL of the primary (BACKSTORY_LOG_URL)"})
	case readOnly == "on":
		x.add(capture.Finding{Check: "log-read-only", Severity: capture.Danger, What: "default_transaction_read_only is on for role " + role + " in the log's database", Risk: "backstory run cannot write; the source keeps its WAL meanwhile",
			SQL: "ALTER ROLE " + eventlog.QuoteIdent(role) + " IN DATABASE " + eventlog.QuoteIdent(database) + " SET default_transaction_read_only = off;", Cost: "none for others"})
	}
	return nil
}

// goesOn tells whether the source still has, and publishes, everything after the end of the log.
func (x *logExamination) goesOn(ctx context.Context) error {
	reason, remedy := x.head.Gap, ""
	if now, _, err := capture.Upgraded(ctx, x.cfg.Capture, *x.head, x.captured); err == nil && now != nil && reason == "" {
		x.add(capture.Finding{Check: "upgraded", Severity: capture.Info, What: "the source was upgraded with pg_upgrade", Risk: "nothing is missing", Remedy: "backstory run goes on with it"})
		return nil
	}
	for head := x.head; reason == "" && !x.has("replication"); {
		err := capture.CheckStart(ctx, x.cfg.Capture, *head)
		if err == nil {
			err = capture.CheckPublications(ctx, x.cfg.Capture, x.captured)
		}
		var gap *capture.Gap
		var narrowed *capture.Narrowed
		var missed *capture.Missed
		switch {
		case errors.As(err, &missed):
			x.add(capture.Finding{Check: "missed", Severity: capture.Warning, What: missed.Error(), Risk: "what changed there meanwhile is not in the log",
				Remedy: "backstory run says so in the history, and compares the tables with it", Cost: "what happened to their rows meanwhile, and who did it, will not be known"})
			return nil
		case err == nil, errors.Is(err, capture.ErrSlotInUse), errors.As(err, &narrowed): // which the sidecar notes by itself
			return nil
		case errors.As(err, &gap):
			reason = gap.Reason
		case eventlog.Hint(err) != "":
			reason, remedy = err.Error(), eventlog.Hint(err)
		default:
			return err
		}
		// While a sidecar is at work, log and slot have moved between the two looks: only what stays is true.
		now, err := x.log.Head(ctx)
		if err != nil {
			return err
		}
		captured, err := x.log.Captured(ctx)
		if err != nil {
			return err
		}
		if now.EndLSN != head.EndLSN || !slices.EqualFunc(captured, x.captured, func(a, b eventlog.Captured) bool { return a.OID == b.OID && a.Published == b.Published }) {
			reason, remedy, head, x.captured = "", "", now, captured
		}
	}
	if reason == "" {
		return nil
	}
	x.drop(capture.NoSlot, capture.SlotLost) // with a log, init alone is no remedy for that
	f := capture.Finding{Check: "gap", Severity: capture.Danger, What: "the log does not go on: " + reason, Risk: "nothing is captured from where the log ends",
		Remedy: "bring the source back to where the log is, or backstory init --accept-gap", Cost: "a gap in the history: of what happened in it only the outcome will be known, and that when backstory run has compared the tables with the log"}
	if remedy != "" {
		if f.Remedy = remedy; !strings.Contains(remedy, "--accept-gap") {
			f.Cost = ""
		}
	}
	x.add(f)
	return nil
}

// atWork looks for a sidecar.
func (x *logExamination) atWork(ctx context.Context) error {
	conn, err := x.cfg.Capture.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	slot, err := x.cfg.Capture.ReadSlot(ctx, conn)
	if err != nil {
		return err
	}
	if since := time.Since(x.head.UpdatedAt); slot.Exists && !slot.Active && since > stoppedAfter && !x.has("gap") {
		x.add(capture.Finding{Check: "stopped", Severity: capture.Warning, What: fmt.Sprintf("no sidecar has been at work for %s", since.Round(time.Minute)),
			Risk: "the log falls behind, and the source keeps its WAL: its disk can fill, or the slot is lost", Remedy: "backstory run"})
	}
	return nil
}

// rows looks for tables of which the log does not have all rows.
func (x *logExamination) rows(ctx context.Context) error {
	begun, err := x.log.Baselines(ctx)
	if err != nil {
		return err
	}
	history, err := x.log.Histories(ctx, x.captured)
	if err != nil {
		return err
	}
	st := newBaselineStatus(x.head, x.captured, begun, history, nil)
	waiting := map[string]bool{}
	for _, t := range st.Tables {
		waiting[t.Table] = true
	}
	var unread, uncompared, never, behind []string
	for _, t := range x.captured {
		i := slices.IndexFunc(begun, func(b eventlog.Baseline) bool { return b.OID == t.OID })
		heals := i >= 0 && begun[i].Heal && !begun[i].Done
		switch {
		case t.Dropped:
		case heals && !x.head.Baseline:
			x.add(capture.Finding{Check: "not-compared", Severity: capture.Warning, What: fmt.Sprintf("%s was altered, and its rows are not compared with the log's, since init --no-baseline", t),
				Risk: "rows that have not changed since are in the log as they were before", Remedy: "backstory init, without --no-baseline, then backstory run", Cost: "all rows of the tables are read once"})
		case waiting[t.String()] && (heals || history[t.OID]):
			uncompared = append(uncompared, t.String())
		case waiting[t.String()]:
			unread = append(unread, t.String())
		case t.Complete || i >= 0 && begun[i].Done || t.InsertOnly && !x.head.Baseline: // what that lacks is another finding
		case !x.head.Baseline && history[t.OID]:
			behind = append(behind, t.String())
		case !x.head.Baseline:
			never = append(never, t.String())
		case history[t.OID]:
			uncompared = append(uncompared, t.String())
		default:
			unread = append(unread, t.String())
		}
	}
	for _, l := range []struct {
		check string
		sev   capture.Severity
		what  string
		names []string
	}{
		{"existing-rows", capture.Info, "the log does not have the rows that %s had before, since init --no-baseline left them out", never},
		{"not-compared", capture.Warning, "the log lacks changes of %s since a gap, and the rows are not compared with the log's, since init --no-baseline", behind},
	} {
		if len(l.names) > 0 {
			x.add(capture.Finding{Check: l.check, Severity: l.sev, What: fmt.Sprintf(l.what, capture.Some(l.names)), Risk: "a checkout needs --partial until that is mended",
				Remedy: "backstory init, without --no-baseline, then backstory run", Cost: "all rows of the tables are read once"})
		}
	}
	if len(unread) > 0 {
		x.add(capture.Finding{Check: "existing-rows", Severity: capture.Info, What: fmt.Sprintf("the log does not have all rows of %s yet (%.0f %% read)", capture.Some(unread), 100*st.Share),
			Risk: "a checkout needs --partial until then", Remedy: "backstory run reads them; backstory status tells how far it is, and what keeps it from that"})
	}
	if len(uncompared) > 0 {
		share := 0.0
		if st.Comparison != nil {
			share = st.Comparison.Share
		}
		x.add(capture.Finding{Check: "not-compared", Severity: capture.Info, What: fmt.Sprintf("the rows of %s are not all compared with the log's yet (%.0f %% read)", capture.Some(uncompared), 100*share),
			Risk: "rows may be in the log as they were before; a checkout needs --partial until then", Remedy: "backstory run compares them; backstory status tells how far it is, and what keeps it from that"})
	}
	return nil
}

// Findings are what a sidecar at work says of itself that only it knows: why existing rows are not taken over, or what it waits for.
func (st *Status) Findings() (list []capture.Finding) {
	if st.Source.Error != "" && st.Source.State != "standby" {
		list = append(list, capture.Finding{Check: "sidecar", Severity: capture.Warning, What: "the sidecar does not get on: " + st.Source.Error, Risk: "the log falls behind, and the source keeps its WAL", Remedy: cmp.Or(st.Source.Hint, "backstory status")})
	}
	const risk = "a checkout needs --partial until then"
	for _, t := range st.Baseline.Tables {
		check, rows, lack := "existing-rows", "existing rows of "+t.Table, "are not taken over"
		if t.Compared {
			check, rows, lack = "not-compared", "the rows of "+t.Table, "are not compared with the log's"
		}
		switch {
		case t.Error != "":
			list = append(list, capture.Finding{Check: check, Severity: capture.Warning, What: fmt.Sprintf("%s %s: %s", rows, lack, t.Error), Risk: risk, Remedy: cmp.Or(t.Hint, "backstory status")})
		case len(t.WaitingFor) > 0:
			list = append(list, capture.Finding{Check: check, Severity: capture.Info, What: fmt.Sprintf("%s wait for transactions to end: %s", rows, strings.Join(t.WaitingFor, "; ")), Risk: risk, Remedy: "let them end"})
		}
	}
	return list
}

// reactors tells which do not get on.
func (x *logExamination) reactors(ctx context.Context) error {
	list, err := x.log.Checkpoints(ctx)
	if err != nil {
		return err
	}
	for _, c := range list {
		switch {
		case c.Paused:
			x.add(capture.Finding{Check: "reactor", Severity: capture.Info, What: fmt.Sprintf("reactor %s is paused, %d events behind", c.Name, max(0, x.head.Position-c.Position)), Risk: "its destination gets nothing", Remedy: "backstory sink resume " + c.Name})
		case c.Error != "":
			x.add(capture.Finding{Check: "reactor", Severity: capture.Warning, What: fmt.Sprintf("reactor %s does not get on: %s", c.Name, c.Error), Risk: "its destination falls behind; the log goes on", Remedy: "backstory sink status"})
		}
	}
	return nil
}

// size looks how the log grows on the source's own disk.
func (x *logExamination) size(ctx context.Context) error {
	bytes, err := x.log.Size(ctx)
	if err != nil {
		return err
	}
	if f := grows(bytes, growth(ctx, x.log, x.head, bytes)); f != nil && x.sameDisk {
		x.add(*f)
	}
	return nil
}

func grows(bytes, day int64) *capture.Finding {
	if day < muchGrowth {
		return nil
	}
	return &capture.Finding{Check: "log-growth", Severity: capture.Info, What: fmt.Sprintf("the log takes %d GB of the source's own disk, and %d GB more every day", bytes>>30, day>>30),
		Risk: "the disk fills", Remedy: "more disk, or tables left out with BACKSTORY_EXCLUDE; a new log can be kept on another server (BACKSTORY_LOG_URL)"}
}
