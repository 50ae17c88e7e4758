package capture

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/eventlog"
)

// Gap is a point at which the log may lack changes of the source. It stops the stream until a person has decided.
type Gap struct {
	Reason   string
	From, To eventlog.LSN // of the source's WAL; To is zero where nobody knows
	// Publication tells that a publication is not as it was recorded: perhaps only because init is altering it just now.
	Publication bool
	// PutBack tells that the source does not have all that the log has.
	PutBack bool
}

func (g *Gap) Error() string {
	return fmt.Sprintf("gap: %s (the log ends at %s, the source stands at %s)", g.Reason, g.From, g.To)
}

// ErrTablesChanged means that other tables are captured, or in another way, than the log said when the stream began: the next one has
// to be told anew.
var ErrTablesChanged = errors.New("the captured tables were changed")

// checkStart refuses to start where changes could be skipped in silence: START_REPLICATION itself refuses nothing
// (PostgreSQL manual, Streaming Replication Protocol).
func checkStart(sv *Server, slot *Slot, head *eventlog.Head, name string) error {
	if err := checkSource(sv, head); err != nil {
		// One that was put back has other transactions from where it was put back to, which was after its slot. Of one that was promoted it is known where.
		if g, ok := err.(*Gap); ok {
			g.PutBack = true
			if g.From = min(g.From, g.To); g.To == sv.FlushLSN && slot.Exists && name == head.Slot {
				g.From = min(g.From, slot.ConfirmedFlush)
			}
		}
		return err
	}
	if name != head.Slot {
		return WrongSlot(head.Slot, name)
	}
	gap := func(reason string, to eventlog.LSN) error { return &Gap{Reason: reason, From: head.EndLSN, To: to} }
	switch {
	case !slot.Exists:
		return gap("the replication slot "+name+" is gone", sv.FlushLSN)
	case slot.Plugin != "pgoutput" || slot.Database != sv.Database:
		return &eventlog.Problem{Err: fmt.Errorf("replication slot %s belongs to something else (plugin %q, database %q)", name, slot.Plugin, slot.Database), Hint: "Choose another name with BACKSTORY_SLOT."}
	case slot.WALStatus == "lost":
		return gap(slot.lost(name), sv.FlushLSN)
	case slot.ConfirmedFlush > head.EndLSN:
		return gap("the replication slot "+name+" was moved or made again by somebody else", slot.ConfirmedFlush)
	}
	return sv.replayed(head.EndLSN)
}

// checkSource tells whether a server is the log's source, and has all that the log has.
func checkSource(sv *Server, head *eventlog.Head) error {
	gap := func(reason string, to eventlog.LSN) error { return &Gap{Reason: reason, From: head.EndLSN, To: to} }
	if sv.SystemID != head.SystemID {
		return otherSystem(sv, head, "")
	}
	if err := checkDatabase(sv.Database, head); err != nil {
		return err
	}
	if sv.Timeline < head.Timeline {
		return gap(fmt.Sprintf("the source is on timeline %d, the log already on %d: it was restored from a backup", sv.Timeline, head.Timeline), sv.FlushLSN)
	}
	if sv.Timeline > head.Timeline {
		i := slices.IndexFunc(sv.switches, func(sw timelineSwitch) bool { return sw.timeline == head.Timeline })
		if i < 0 { // a standby that never followed it was promoted
			at := sv.FlushLSN
			for _, sw := range sv.switches { // the first that the log has not been through
				if sw.timeline >= head.Timeline {
					break
				}
				at = sw.at
			}
			return gap(fmt.Sprintf("the source is on timeline %d, which does not come from the log's timeline %d: transactions that the log holds are lost there", sv.Timeline, head.Timeline), at)
		}
		if sw := sv.switches[i]; head.EndLSN > sw.at {
			return gap(fmt.Sprintf("the source was promoted to timeline %d from %s: transactions that the log holds after that are lost there", sv.Timeline, sw.at), sw.at)
		}
	}
	if head.EndLSN > sv.FlushLSN {
		return gap("the source has lost transactions that the log holds", sv.FlushLSN)
	}
	return nil
}

// checkDatabase tells whether a database of the log's system is the log's source.
func checkDatabase(database string, head *eventlog.Head) error {
	if database == head.Database {
		return nil
	}
	return &eventlog.Problem{Err: fmt.Errorf("the log belongs to database %s, the source is %s", head.Database, database), Hint: "Check BACKSTORY_SOURCE_URL and BACKSTORY_LOG_URL; each database has a log of its own."}
}

// otherSystem is the error for a source that is not the log's. Not a gap yet: most likely a wrong URL, and a gap in the log cannot be taken back.
func otherSystem(sv *Server, head *eventlog.Head, why string) error {
	hint := "Check BACKSTORY_SOURCE_URL and BACKSTORY_LOG_URL. If the source was moved (dump and restore, pg_upgrade) and its history is to go on, run backstory init --accept-gap."
	if why != "" {
		hint += " It is not taken for the same source after pg_upgrade, since " + why + "."
	}
	return &eventlog.Problem{Err: fmt.Errorf("the source is database %s of system %s, the log was made from %s of system %s", sv.Database, sv.SystemID, head.Database, head.SystemID), Hint: hint}
}

// CheckStart tells whether a log can go on from its end: nil, a *Gap, or why it cannot be told.
func CheckStart(ctx context.Context, c Config, head eventlog.Head) error {
	sv, slot, err := c.WithDefaults().start(ctx)
	if err != nil {
		return err
	}
	return checkStart(sv, slot, &head, c.WithDefaults().Slot)
}

// PutBack gives the gap of a log's source that does not have all that the log has, nil if it has.
func PutBack(ctx context.Context, c Config, head eventlog.Head) (*Gap, error) {
	sv, slot, err := c.WithDefaults().start(ctx)
	if err != nil {
		return nil, err
	}
	var g *Gap
	if errors.As(checkStart(sv, slot, &head, c.WithDefaults().Slot), &g) && g.PutBack {
		return g, nil
	}
	return nil, nil
}

// start asks for what it depends on where a stream can start.
func (c Config) start(ctx context.Context) (*Server, *Slot, error) {
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	at, done, err := c.connectSlot(ctx, conn)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	repl, err := c.connectReplication(ctx, nil)
	if err != nil {
		return nil, nil, err
	}
	defer repl.Close(context.WithoutCancel(ctx))
	sv, err := c.server(ctx, conn, at, repl)
	if err != nil {
		return nil, nil, err
	}
	slot, err := c.ReadSlot(ctx, at)
	return sv, slot, err
}

// WrongSlot is the error for a log that was made from another slot than the one that is configured.
func WrongSlot(was, is string) error {
	return &eventlog.Problem{Err: fmt.Errorf("the log was made from replication slot %s, not %s", was, is), Hint: "Set BACKSTORY_SLOT to " + was + "."}
}

// streamError sorts what the source says in the middle of the stream.
func streamError(err error, c Config) error {
	var pe *pgconn.PgError
	if !errors.As(err, &pe) {
		return fmt.Errorf("receive from the source: %w", err)
	}
	switch {
	case pe.Code == "42704": // undefined_object: the publication did not exist at that point of the WAL
		return &Gap{Reason: "the source cannot decode its WAL from where the log ends: " + pe.Message}
	case pe.Code == "55000" && strings.Contains(pe.Message, "slot"):
		return &Gap{Reason: pe.Message}
	case pe.Code == "54000", pe.Code == "XX000" && strings.Contains(pe.Message, "alloc"):
		// program_limit_exceeded, or what palloc says, which has no code of its own: text is longer than 1 GB. It would fail again
		// at each attempt, and so would every other reader of the slot (and COPY).
		return &Gap{Reason: "the WAL holds a row that is too large for the source itself to send as text, and everything behind it waits: " + pe.Message}
	}
	err = fmt.Errorf("the source ended the stream: %w", err)
	if strings.HasPrefix(pe.Code, "XX") { // internal errors: could not map file, could not open relation with OID, pg_attribute catalog is missing …
		return &eventlog.Problem{Err: fmt.Errorf("%w: %w", errDecoding, err), Hint: "It is tried again. If it stays, no reader of the slot gets beyond this place: bring Postgres to its latest minor version; " +
			"otherwise give up what is waiting: SELECT pg_drop_replication_slot('" + c.Slot + "'); then backstory init --accept-gap, and the log is compared with the source."}
	}
	return err
}

// errDecoding means that the source fails in decoding its own WAL. Seen three times with PostgreSQL 15.18, and gone with the next attempt, among tables that were
// truncated in savepoints, or altered, or dropped and made again, while the stream was cut.
var errDecoding = errors.New("the source cannot read its own WAL here")

// forTheLog tells whether an error is something that the log has to note or to tell more of. The connection is as it was.
func forTheLog(err error) bool {
	var g *Gap
	var n *Narrowed
	var m *Missed
	return errors.As(err, &g) || errors.As(err, &n) || errors.As(err, &m) || errors.Is(err, ErrTablesChanged)
}

// retryable sorts errors: those that pass by themselves, and those that a person must look at.
func retryable(err error) bool {
	if forTheLog(err) || errors.Is(err, errNotTaken) || errors.Is(err, ErrClosed) {
		return false
	}
	state := eventlog.SQLState(err)
	switch {
	case errors.Is(err, errMalformed):
		return false
	case errors.Is(err, errDecoding):
		return true
	case strings.HasPrefix(state, "08"), strings.HasPrefix(state, "57"), strings.HasPrefix(state, "53"), state == "55006":
		return true
	case state != "":
		return false
	}
	var p *eventlog.Problem
	if errors.As(err, &p) {
		return strings.Contains(err.Error(), "connect to the source") || errors.Is(err, ErrSlotInUse) || errors.Is(err, ErrStandby) || errors.Is(err, errReplaying)
	}
	return true
}

// Run streams until ctx ends, or, with until not zero, until everything before it has been handed over. It connects again,
// with growing pauses, whenever that can help; another error, a *Gap among them, ends it. head gives the log's end as it
// is at the moment. A cause of ctx's end is what State shows as the error from then on.
func (s *Stream) Run(ctx context.Context, until eventlog.LSN, head func() eventlog.Head) error {
	defer close(s.out)
	known := map[uint32]*eventlog.Relation{}
	pause, first := 100*time.Millisecond, true
	var last string
	for {
		began := time.Now()
		err := s.session(ctx, head(), until, known)
		if err == nil || ctx.Err() != nil {
			if cause := context.Cause(ctx); cause != ctx.Err() {
				s.setState("waiting", cause)
			} else {
				s.setState("stopped", nil)
			}
			return nil
		}
		s.setState("waiting", err)
		if !retryable(err) || first && until != 0 {
			return err
		}
		first = false
		if time.Since(began) > 30*time.Second {
			pause = 100 * time.Millisecond
		}
		if err.Error() != last {
			last = err.Error()
			s.cfg.Logger.Warn("the stream was cut; trying again", "err", err, "hint", eventlog.Hint(err))
		}
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, 15*time.Second)
	}
}

// CurrentLSN asks the source for the end of its WAL, after everything that is committed by now, also with synchronous_commit = off
// (PostgreSQL manual, Asynchronous Commit): the commit of a message of ours makes the source write that to disk, before which it is not streamed.
func CurrentLSN(ctx context.Context, c Config) (eventlog.LSN, error) {
	conn, err := c.Connect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, `SET synchronous_commit = local; SELECT pg_logical_emit_message(true, 'backstory.end', '') WHERE NOT pg_is_in_recovery()`); err != nil {
		return 0, fmt.Errorf("ask the source for the end of its WAL: %w", err)
	}
	return currentLSN(ctx, conn)
}

// currentLSN asks for the end of what can be streamed.
func currentLSN(ctx context.Context, conn *pgx.Conn) (eventlog.LSN, error) {
	var n int64
	if err := conn.QueryRow(ctx, `SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END - '0/0')::bigint`).Scan(&n); err != nil {
		return 0, fmt.Errorf("ask the source for the end of its WAL: %w", err)
	}
	return eventlog.LSN(n), nil
}
