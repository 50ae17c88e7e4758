package capture

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/eventlog"
)

// Server is what a source says of itself.
type Server struct {
	SystemID   string
	Database   string
	Version    int // server_version_num: 150018
	Timeline   uint32
	FlushLSN   eventlog.LSN
	InRecovery bool
	// SenderTimeout is wal_sender_timeout: after so much silence the source ends the connection; 0: never.
	SenderTimeout time.Duration
	Settings      map[string]string // those that doctor and the stream look at
	Role          string            // who we are there
	// sources tells where each of Settings comes from (pg_settings.source).
	sources map[string]string
	// switches tells where each older timeline was left.
	switches []timelineSwitch
	// Standby is the server that has the slot, where that is a standby; then the identity, timeline and SenderTimeout are what it says.
	Standby *Server
}

type timelineSwitch struct {
	timeline uint32
	at       eventlog.LSN
}

// timelineOf tells on which timeline a commit lies.
func (s *Server) timelineOf(commit eventlog.LSN) uint32 {
	for _, sw := range s.switches {
		if commit < sw.at {
			return sw.timeline
		}
	}
	return s.Timeline
}

// Connect opens an ordinary connection to the source.
func (c Config) Connect(ctx context.Context) (*pgx.Conn, error) {
	return connectTo(ctx, c.URL, "the source")
}

// connConfig is that of a connection to a source. Whom default_transaction_read_only is to keep from writing, as a rule, are others: a table
// that has lost its key has to leave the publication, or the application could not write to it. A standby takes no writes in spite of it.
func connConfig(url, application string) (*pgx.ConnConfig, error) {
	cfg, err := eventlog.ConnConfig(url, application)
	if err != nil {
		return nil, err
	}
	const readOnly = "default_transaction_read_only"
	maps.DeleteFunc(cfg.RuntimeParams, func(name, _ string) bool { return strings.EqualFold(name, readOnly) })
	cfg.RuntimeParams[readOnly] = "off"
	return cfg, nil
}

func connectTo(ctx context.Context, url, what string) (*pgx.Conn, error) {
	cfg, err := connConfig(url, "backstory capture")
	if err != nil {
		return nil, err
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", what, eventlog.ConnError(err))
	}
	return conn, nil
}

// connectReplication opens a connection to the server of the slot on which replication commands are understood.
func (c Config) connectReplication(ctx context.Context, adapt func(*pgconn.Config)) (*pgconn.PgConn, error) {
	url, what := c.slotServer()
	cfg, err := connConfig(url, "backstory")
	if err != nil {
		return nil, err
	}
	cfg.RuntimeParams["replication"] = "database"
	if adapt != nil {
		adapt(&cfg.Config)
	}
	conn, err := pgconn.ConnectConfig(ctx, &cfg.Config)
	if err != nil {
		if eventlog.SQLState(err) == "42501" { // insufficient_privilege
			return nil, &eventlog.Problem{Err: fmt.Errorf("connect to %s for replication: role %s lacks the right REPLICATION", what, cfg.User),
				Hint: "As a superuser: ALTER ROLE " + eventlog.QuoteIdent(cfg.User) + " REPLICATION; (on managed services, grant the provider's replication role.)"}
		}
		if eventlog.SQLState(err) == "53300" { // too_many_connections: of either kind
			return nil, &eventlog.Problem{Err: fmt.Errorf("connect to %s for replication: %w", what, eventlog.ConnError(err)),
				Hint: "Raise max_wal_senders on " + what + " (restart needed), or end a replication connection that nobody uses: SELECT * FROM pg_stat_replication. If max_connections is reached, raise that."}
		}
		return nil, fmt.Errorf("connect to %s for replication: %w", what, eventlog.ConnError(err))
	}
	return conn, nil
}

var settingNames = []string{"wal_level", "max_replication_slots", "max_wal_senders", "wal_sender_timeout", "max_slot_wal_keep_size", "fsync",
	"server_encoding", "TimeZone", "hot_standby_feedback", "primary_slot_name", "synchronized_standby_slots", "sync_replication_slots", "logical_decoding_work_mem", "idle_replication_slot_timeout",
	"max_wal_size", "max_connections"}

// settings asks the source for its version and settings.
func settings(ctx context.Context, conn *pgx.Conn) (*Server, error) {
	s := &Server{Settings: map[string]string{}, sources: map[string]string{}}
	var flush, timeout int64
	err := conn.QueryRow(ctx, `SELECT current_setting('server_version_num')::int, pg_is_in_recovery(),
		(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END - '0/0')::bigint,
		(SELECT setting::bigint FROM pg_settings WHERE name = 'wal_sender_timeout'), current_database(), current_user`).Scan(&s.Version, &s.InRecovery, &flush, &timeout, &s.Database, &s.Role)
	if err != nil {
		return nil, fmt.Errorf("ask the source for its version: %w", err)
	}
	s.FlushLSN, s.SenderTimeout = eventlog.LSN(flush), time.Duration(timeout)*time.Millisecond
	rows, err := conn.Query(ctx, `SELECT name, current_setting(name), source FROM pg_settings WHERE name = ANY ($1)`, settingNames)
	if err != nil {
		return nil, fmt.Errorf("read the source's settings: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var k, v, from string
		if err := rows.Scan(&k, &v, &from); err != nil {
			return nil, fmt.Errorf("read the source's settings: %w", err)
		}
		s.Settings[k], s.sources[k] = v, from
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read the source's settings: %w", err)
	}
	return s, nil
}

// server asks the source what it is, and at, the server of the slot, which repl is connected to as well.
func (c Config) server(ctx context.Context, conn, at *pgx.Conn, repl *pgconn.PgConn) (*Server, error) {
	id, err := pglogrepl.IdentifySystem(ctx, repl)
	if err != nil {
		return nil, fmt.Errorf("identify the source: %w", err)
	}
	s, err := settings(ctx, conn)
	if err != nil {
		return nil, err
	}
	if err := c.primary(s); err != nil {
		return nil, err
	}
	if c.StandbyURL != "" {
		if err := c.addStandby(ctx, s, conn, at); err != nil {
			return nil, err
		}
	}
	if s.Standby != nil {
		s.SenderTimeout = s.Standby.SenderTimeout
	}
	s.SystemID, s.Database, s.Timeline = id.SystemID, id.DBName, uint32(id.Timeline)
	if s.Timeline > 1 {
		h, err := pglogrepl.TimelineHistory(ctx, repl, int32(s.Timeline))
		if err != nil {
			return nil, fmt.Errorf("read the source's timeline history: %w", err)
		}
		for _, line := range strings.Split(string(h.Content), "\n") {
			f := strings.Fields(line)
			if len(f) < 2 || strings.HasPrefix(f[0], "#") {
				continue
			}
			tl, err := strconv.ParseUint(f[0], 10, 32)
			if err != nil {
				return nil, fmt.Errorf("read the source's timeline history: %w", err)
			}
			at, err := eventlog.ParseLSN(f[1])
			if err != nil {
				return nil, fmt.Errorf("read the source's timeline history: %w", err)
			}
			s.switches = append(s.switches, timelineSwitch{uint32(tl), at})
		}
	}
	return s, nil
}

// checkServer refuses sources that cannot be captured at all.
func checkServer(s *Server) error {
	switch {
	case s.Version < 140000:
		return &eventlog.Problem{Err: fmt.Errorf("the source is PostgreSQL %d", s.Version/10000), Hint: "backstory captures PostgreSQL 14 to 18."}
	case s.Settings["wal_level"] != "logical":
		return &eventlog.Problem{Err: fmt.Errorf("the source has wal_level = %s", s.Settings["wal_level"]),
			Hint: "ALTER SYSTEM SET wal_level = logical; and restart the server (on managed services: the parameter for logical replication)."}
	case s.Settings["server_encoding"] != "UTF8":
		return &eventlog.Problem{Err: fmt.Errorf("the source's encoding is %s", s.Settings["server_encoding"]), Hint: "backstory captures databases with encoding UTF8."}
	}
	return nil
}

// Slot is what the source says of the replication slot.
type Slot struct {
	Exists         bool
	Plugin         string
	Database       string
	Active         bool
	ActivePID      int
	ConfirmedFlush eventlog.LSN
	Restart        eventlog.LSN
	WALStatus      string // reserved, extended, unreserved, lost
	RetainedBytes  int64  // of WAL that the slot keeps from being removed
	SafeBytes      int64  // that may still be written before the slot is in danger; -1: without limit
	Failover       bool
	Invalidation   string // why the slot is lost, as Postgres says it (16 and later)
}

// ReadSlot asks the server that has it for the slot.
func (c Config) ReadSlot(ctx context.Context, conn *pgx.Conn) (*Slot, error) {
	s := &Slot{}
	err := conn.QueryRow(ctx, `SELECT true, coalesce(plugin, ''), coalesce(database, ''), active, coalesce(active_pid, 0),
		coalesce(confirmed_flush_lsn - '0/0', 0)::bigint, coalesce(restart_lsn - '0/0', 0)::bigint, coalesce(wal_status, ''),
		coalesce(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END - restart_lsn, 0)::bigint,
		coalesce(safe_wal_size, -1), coalesce((to_jsonb(s)->>'failover')::bool, false),
		coalesce(to_jsonb(s)->>'invalidation_reason', CASE WHEN (to_jsonb(s)->>'conflicting')::bool THEN 'conflicting' END, '')
		FROM pg_replication_slots s WHERE slot_name = $1`, c.Slot).
		Scan(&s.Exists, &s.Plugin, &s.Database, &s.Active, &s.ActivePID, (*int64lsn)(&s.ConfirmedFlush), (*int64lsn)(&s.Restart), &s.WALStatus, &s.RetainedBytes, &s.SafeBytes, &s.Failover, &s.Invalidation)
	if errors.Is(err, pgx.ErrNoRows) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the replication slot: %w", err)
	}
	return s, nil
}

// ErrSlotInUse means that another process streams from the slot: it may be a sidecar for the same log, or a connection of
// ours that the server has not yet given up. Both pass.
var ErrSlotInUse = errors.New("in use")

// SlotFree returns ErrSlotInUse, in a Problem that says by whom, while another process streams from the slot.
func SlotFree(ctx context.Context, c Config) error {
	c = c.WithDefaults()
	at, done, err := c.connectSlot(ctx, nil)
	if err != nil {
		return err
	}
	defer done()
	s, err := c.ReadSlot(ctx, at)
	if err != nil || !s.Active {
		return err
	}
	return c.slotInUse(ctx, at)
}

func (c Config) slotInUse(ctx context.Context, conn *pgx.Conn) error {
	by := "another process"
	// Others' sessions are hidden from a role that is not pg_monitor; then there is the pid alone.
	_ = conn.QueryRow(ctx, `SELECT format('pid %s%s%s', s.active_pid, ', ' || nullif(a.application_name, ''), ' from ' || host(a.client_addr))
		FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = $1 AND s.active_pid IS NOT NULL`, c.Slot).Scan(&by)
	return &eventlog.Problem{Err: fmt.Errorf("replication slot %s is %w: %s", c.Slot, ErrSlotInUse, by),
		Hint: "If that is another backstory for this log, this one takes over when it ends. If it is something else, choose another name with BACKSTORY_SLOT " +
			"before the log is made. The server frees the slot of a connection that has died after wal_sender_timeout."}
}

// int64lsn scans a bigint into an LSN.
type int64lsn eventlog.LSN

// Scan implements sql.Scanner.
func (l *int64lsn) Scan(v any) error {
	n, ok := v.(int64)
	if !ok {
		return fmt.Errorf("scan LSN from %T", v)
	}
	*l = int64lsn(n)
	return nil
}

// createSlot makes the slot and calls f with the snapshot that shows the database exactly as it is where the slot begins.
// While it waits for open transactions it calls waiting with who they are.
func (c Config) createSlot(ctx context.Context, conn *pgx.Conn, repl *pgconn.PgConn, sv *Server, waiting func([]string), f func(snapshot string, start eventlog.LSN) error) error {
	cmd := "CREATE_REPLICATION_SLOT " + c.Slot + " LOGICAL pgoutput "
	switch {
	case sv.Version >= 170000 && sv.Standby == nil: // a standby refuses it
		cmd += "(SNAPSHOT 'export', FAILOVER true)"
	case sv.Version >= 150000:
		cmd += "(SNAPSHOT 'export')"
	default:
		cmd += "EXPORT_SNAPSHOT"
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		res []*pgconn.Result
		err error
	}
	done := make(chan result, 1)
	go func() {
		res, err := repl.Exec(ctx, cmd).ReadAll()
		done <- result{res, err}
	}()
	every := time.Second
	if sv.Standby != nil {
		every = 200 * time.Millisecond
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	began := time.Now()
	told := began
	var blockers []string
	for {
		select {
		case r := <-done:
			if r.err != nil {
				return slotError(c.Slot, r.err)
			}
			if len(r.res) == 0 || len(r.res[0].Rows) == 0 || len(r.res[0].Rows[0]) < 3 {
				return errors.New("create the replication slot: the server gave no answer")
			}
			row := r.res[0].Rows[0]
			start, err := eventlog.ParseLSN(string(row[1]))
			if err != nil {
				return fmt.Errorf("create the replication slot: %w", err)
			}
			return f(string(row[2]), start)
		case <-tick.C:
			if sv.Standby != nil {
				standbySnapshot(ctx, conn)
				if time.Since(told) < time.Second {
					continue
				}
				told = time.Now()
			}
			var b []string
			var err error
			if sv.Standby != nil {
				b, err = writing(ctx, conn)
			} else {
				b, err = blocking(ctx, conn, repl.PID())
			}
			if err == nil && len(b) > 0 {
				blockers = b
				if waiting != nil {
					waiting(b)
				}
			}
			if time.Since(began) > c.BlockedAfter {
				cancel()
				<-done
				return &eventlog.Problem{Err: fmt.Errorf("create the replication slot: waited %s for open transactions: %s", c.BlockedAfter, strings.Join(blockers, "; ")),
					Hint: "End them (SELECT pg_terminate_backend(pid), or COMMIT/ROLLBACK PREPARED 'gid'), then run it again."}
			}
		}
	}
}

// blocking tells which transactions a backend waits for, prepared ones too.
func blocking(ctx context.Context, conn *pgx.Conn, pid uint32) ([]string, error) {
	rows, err := conn.Query(ctx, `
		SELECT format('pid %s, %s, open for %s', a.pid, coalesce(nullif(a.application_name, ''), a.usename, a.backend_type), date_trunc('second', now() - a.xact_start))
		FROM unnest(pg_blocking_pids($1)) b(pid) JOIN pg_stat_activity a ON a.pid = b.pid AND b.pid <> 0
		UNION ALL
		SELECT format('prepared transaction %L, open for %s', p.gid, date_trunc('second', now() - p.prepared)) FROM pg_prepared_xacts p
		WHERE 0 = ANY (pg_blocking_pids($1))`, int32(pid))
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func slotError(slot string, err error) error {
	switch eventlog.SQLState(err) {
	case "42710":
		return &eventlog.Problem{Err: fmt.Errorf("create the replication slot: %s exists already", slot), Hint: "Another backstory may use it: choose another name with BACKSTORY_SLOT, or drop it: SELECT pg_drop_replication_slot('" + slot + "')."}
	case "53400":
		return &eventlog.Problem{Err: errors.New("create the replication slot: all slots of the server are in use"), Hint: "Raise max_replication_slots (restart needed), or drop a slot that nobody uses: SELECT * FROM pg_replication_slots."}
	case "42501":
		return &eventlog.Problem{Err: errors.New("create the replication slot: the role lacks the right REPLICATION"), Hint: "As a superuser: ALTER ROLE … REPLICATION."}
	case "55000":
		return &eventlog.Problem{Err: fmt.Errorf("create the replication slot: %w", err), Hint: "Set wal_level = logical and restart the server."}
	}
	return fmt.Errorf("create the replication slot: %w", err)
}
