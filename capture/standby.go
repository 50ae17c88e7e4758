package capture

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// Decoding on a standby (PostgreSQL manual, Logical Decoding Concepts, Logical Decoding on Standby). The slot is on a hot standby, and so is the
// replication connection; all else is asked of the primary: catalogue, publications, existing rows, and the end of the WAL up to which the log has
// caught up. What the standby says is the truth of where the stream is: its timeline, and how far it has replayed.

// standbyVersion is the first one on whose standbys there are logical slots.
const standbyVersion = 160000

// ErrStandby means that a server is a standby that has to be the primary, or the other way round. In the middle of a failover that passes.
var ErrStandby = errors.New("not in the part that it has here")

// errReplaying means that the standby has not replayed its WAL up to where the log ends: it was restarted, and begins before.
var errReplaying = errors.New("the standby is still replaying")

// errTimeline means that the server of the slot has come to another timeline in the middle of a stream: what comes from there has to be known
// by it.
var errTimeline = errors.New("the standby has come to another timeline")

// slotServer gives the URL of the server that has the slot, and what to call it.
func (c Config) slotServer() (url, what string) {
	if c.StandbyURL != "" {
		return c.StandbyURL, "the source's standby"
	}
	return c.URL, "the source"
}

// connectSlot opens an ordinary connection to the server that has the slot. Where that is the source, it is the connection to it, which
// then stays open after done.
func (c Config) connectSlot(ctx context.Context, source *pgx.Conn) (at *pgx.Conn, done func(), err error) {
	if c.StandbyURL == "" && source != nil {
		return source, func() {}, nil
	}
	url, what := c.slotServer()
	if at, err = connectTo(ctx, url, what); err != nil {
		return nil, nil, err
	}
	return at, func() { _ = at.Close(context.WithoutCancel(ctx)) }, nil
}

// ofSlot gives the server that has the slot.
func (s *Server) ofSlot() *Server {
	if s.Standby != nil {
		return s.Standby
	}
	return s
}

// primary refuses a source that is a standby.
func (c Config) primary(s *Server) error {
	if !s.InRecovery {
		return nil
	}
	hint := "Let BACKSTORY_SOURCE_URL lead to the primary: it can name several servers, with target_session_attrs=read-write."
	if c.StandbyURL == "" && s.Version >= standbyVersion {
		hint += " To have this standby do the decoding, name it in BACKSTORY_STANDBY_URL."
	}
	return &eventlog.Problem{Err: fmt.Errorf("the source is %w: a standby", ErrStandby), Hint: hint}
}

// addStandby asks the server of the slot what it is, and makes sure that it is a standby of the source; or, promoted, the source itself.
func (c Config) addStandby(ctx context.Context, s *Server, conn, at *pgx.Conn) error {
	sb, err := settings(ctx, at)
	if err != nil {
		return err
	}
	// The start of a server tells it from any other one that has the same data.
	const identity = `SELECT system_identifier::text, current_database()::text, pg_postmaster_start_time() FROM pg_control_system()`
	var began, standbyBegan time.Time
	if err := conn.QueryRow(ctx, identity).Scan(&s.SystemID, &s.Database, &began); err != nil {
		return fmt.Errorf("identify the source: %w", err)
	}
	if err := at.QueryRow(ctx, identity).Scan(&sb.SystemID, &sb.Database, &standbyBegan); err != nil {
		return fmt.Errorf("identify the source's standby: %w", err)
	}
	const check = "Check BACKSTORY_STANDBY_URL: it names the same database as BACKSTORY_SOURCE_URL, on a hot standby of that server."
	switch {
	case sb.SystemID != s.SystemID || sb.Database != s.Database:
		return &eventlog.Problem{Err: fmt.Errorf("the standby has database %s of system %s, the source is %s of system %s", sb.Database, sb.SystemID, s.Database, s.SystemID), Hint: check}
	case sb.Version < standbyVersion:
		return &eventlog.Problem{Err: fmt.Errorf("the standby is PostgreSQL %d, which cannot decode on a standby", sb.Version/10000),
			Hint: "That takes PostgreSQL 16 or later. Leave BACKSTORY_STANDBY_URL out; the primary then decodes."}
	case sb.InRecovery && sb.Settings["wal_level"] != "logical":
		return &eventlog.Problem{Err: fmt.Errorf("the standby has wal_level = %s", sb.Settings["wal_level"]), Hint: "Set wal_level = logical on the standby, too, and restart it."}
	case !sb.InRecovery && !standbyBegan.Equal(began):
		return &eventlog.Problem{Err: fmt.Errorf("the standby is %w: it was promoted, or never was one, and the source is another server", ErrStandby),
			Hint: check + " If it was promoted, and the application writes to it now, let BACKSTORY_SOURCE_URL lead there as well: its slot goes on."}
	}
	if sb.InRecovery {
		s.Standby = sb
	}
	return nil
}

// awaitReplay waits a moment for a standby that was restarted to come to where the log ends.
func (s *Server) awaitReplay(ctx context.Context, at *pgx.Conn, head eventlog.LSN) (err error) {
	for end := time.Now().Add(10 * time.Second); s.replayed(head) != nil && head <= s.FlushLSN && time.Now().Before(end) && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		if s.Standby.FlushLSN, err = currentLSN(ctx, at); err != nil {
			return err
		}
	}
	return nil
}

// replayed makes sure that the standby has replayed what the log has: a standby that was restarted goes on from before.
func (s *Server) replayed(head eventlog.LSN) error {
	if s.Standby == nil || s.Standby.FlushLSN >= head {
		return nil
	}
	return &eventlog.Problem{Err: fmt.Errorf("%w: it stands at %s, the log ends at %s", errReplaying, s.Standby.FlushLSN, head),
		Hint: "That passes. If it stays, the standby gets no WAL: SELECT * FROM pg_stat_wal_receiver there."}
}

// sure makes sure that what is in the batch lies on the timelines that the session knows: with its primary a standby changes the timeline in the
// middle of a stream, and so it does when it is promoted, and the stream says nothing of that. It has replayed what it has sent; if it
// still is on the same timeline now, that is too. (PostgreSQL manual, Streaming Replication Protocol, IDENTIFY_SYSTEM.)
func (x *session) sure() error {
	if x.control == nil || len(x.batch.Items) == x.sureOf {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(x.ctx), sureWithin)
	defer cancel()
	id, err := pglogrepl.IdentifySystem(ctx, x.control)
	switch {
	case err != nil:
		err = fmt.Errorf("ask the source's standby for its timeline: %w", err)
	case uint32(id.Timeline) != x.server.Timeline:
		err = fmt.Errorf("%w: %d after %d", errTimeline, id.Timeline, x.server.Timeline)
	default:
		x.sureOf = len(x.batch.Items)
		return nil
	}
	// None of it is handed over: it comes again. What was handed over of an open transaction is forgotten.
	x.batch.Reset()
	x.batch.Add(eventlog.Item{Kind: eventlog.ItemReset})
	x.sureOf, x.skipped = len(x.batch.Items), 0
	return err
}

// sureWithin is how long that may take.
const sureWithin = 10 * time.Second

// replays waits until the standby has replayed everything that the primary has written so far, the publications before all.
func (c Config) replays(ctx context.Context, conn, at *pgx.Conn) error {
	if c.StandbyURL == "" {
		return nil
	}
	var end int64
	if err := conn.QueryRow(ctx, `SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint`).Scan(&end); err != nil {
		return fmt.Errorf("ask the source for its WAL position: %w", err)
	}
	for began := time.Now(); ; {
		is, err := currentLSN(ctx, at)
		if err != nil || is >= eventlog.LSN(end) {
			return err
		}
		if time.Since(began) > c.BlockedAfter {
			return &eventlog.Problem{Err: fmt.Errorf("create the replication slot: waited %s for the standby to replay up to %s; it stands at %s", c.BlockedAfter, eventlog.LSN(end), is),
				Hint: "See there whether it gets WAL (SELECT * FROM pg_stat_wal_receiver) and whether its replay is paused (SELECT pg_is_wal_replay_paused()); then run backstory init again."}
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// standbySnapshot has the primary write what the standby needs to make a slot: which transactions are running. A role that may not gets that from
// the background writer, within 15 seconds after something was written. (PostgreSQL manual, pg_log_standby_snapshot.)
func standbySnapshot(ctx context.Context, conn *pgx.Conn) {
	if _, err := conn.Exec(ctx, `SELECT pg_log_standby_snapshot()`); err != nil && eventlog.SQLState(err) == "42501" {
		_, _ = conn.Exec(ctx, `SELECT pg_logical_emit_message(false, 'backstory.standby', '')`)
	}
}

// writing tells which transactions of the primary may keep a standby from making a slot: those that write, and have done so for a moment.
func writing(ctx context.Context, conn *pgx.Conn) ([]string, error) {
	rows, err := conn.Query(ctx, `
		SELECT format('pid %s, %s, open for %s', pid, coalesce(nullif(application_name, ''), usename), date_trunc('second', clock_timestamp() - xact_start))
		FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() AND coalesce(xact_start < clock_timestamp() - interval '1 second', true)
		UNION ALL
		SELECT format('prepared transaction %L, open for %s', gid, date_trunc('second', clock_timestamp() - prepared)) FROM pg_prepared_xacts`)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// examineStandby judges the standby that decodes.
func examineStandby(sv *Server, add func(Finding)) {
	sb := sv.Standby
	if sb == nil {
		examineKeeping(sv, add)
		add(Finding{Check: "decoding-standby", Severity: Info, What: "the server of BACKSTORY_STANDBY_URL is the primary", Risk: "it decodes itself", Remedy: "leave BACKSTORY_STANDBY_URL out; a slot on another server is a new one, after backstory init --accept-gap", Cost: "a gap in the history, which is healed by comparing the tables with the log"})
		return
	}
	examineKeeping(sb, add)
	if sb.Settings["hot_standby_feedback"] != "on" {
		add(Finding{Check: "decoding-standby", Severity: Danger, What: "hot_standby_feedback is off on the standby that decodes",
			Risk: "the primary's vacuum removes what the slot needs of the catalogue, and the slot is lost: a gap", Remedy: "on it: ALTER SYSTEM SET hot_standby_feedback = on; SELECT pg_reload_conf();", Cost: "the primary's vacuum keeps what queries and the slot of the standby need"})
	}
	if sb.Settings["primary_slot_name"] == "" {
		add(Finding{Check: "decoding-standby", Severity: Warning, What: "primary_slot_name is not set on the standby that decodes",
			Risk: "while the standby is not connected, its hot_standby_feedback counts for nothing: the slot can be lost", Remedy: "SELECT pg_create_physical_replication_slot('standby'); on the primary, and primary_slot_name = 'standby' on the standby", Cost: "the primary keeps WAL for a standby that is away; max_slot_wal_keep_size limits that"})
	}
}

// terminate ends the walsender that streams from the slot, if it is still ours.
func (x *session) terminate(ctx context.Context) {
	const q = `SELECT pg_terminate_backend(active_pid, 1500) FROM pg_replication_slots WHERE slot_name = $1 AND active_pid = $2`
	at := x.sql
	if x.at != nil {
		at = x.at
	}
	if !at.IsClosed() {
		// What it may not do (another role's session) or cannot do any more takes longer, that is all.
		_, _ = at.Exec(ctx, q, x.cfg.Slot, int32(x.repl.PID()))
	}
}

// lost tells why a slot is of no use any more.
func (s *Slot) lost(name string) string {
	switch reason := s.Invalidation; {
	case reason == "" || strings.Contains(reason, "wal_removed"):
		return "the server has removed WAL that the replication slot " + name + " needed"
	default:
		return "the server has invalidated the replication slot " + name + " (" + reason + "), so that changes were not kept for it"
	}
}
