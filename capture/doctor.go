package capture

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// Severity of a finding.
type Severity string

// The severities: Danger would lose data or harm the application.
const (
	Danger  Severity = "danger"
	Warning Severity = "warning"
	Info    Severity = "info"
)

// Finding is something about the source that its owner should know.
type Finding struct {
	Severity Severity `json:"severity"`
	What     string   `json:"what"`
	Risk     string   `json:"risk"`             // what would happen
	SQL      string   `json:"sql,omitempty"`    // what mends it, if SQL does
	Remedy   string   `json:"remedy,omitempty"` // what mends it otherwise
	Cost     string   `json:"cost,omitempty"`   // what the mending costs
}

// lossy are the minor releases before which adding a table to a publication could lose rows for good (release notes of
// 14.18, 15.13, 16.9 and 17.5).
var lossy = map[int]int{14: 18, 15: 13, 16: 9, 17: 5}

// notSQL begins a remedy that is no SQL.
const notSQL = "-- "

// Examine looks for everything about the source that would lose data, harm the application or surprise its owner. It changes
// nothing.
func Examine(ctx context.Context, c Config) ([]Finding, error) {
	c = c.WithDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var out []Finding
	add := func(s Severity, what, risk, mend, cost string) {
		f := Finding{Severity: s, What: what, Risk: risk, Cost: cost}
		if remedy, ok := strings.CutPrefix(mend, notSQL); ok {
			f.Remedy = remedy
		} else {
			f.SQL = mend
		}
		out = append(out, f)
	}
	repl, err := c.connectReplication(ctx, nil)
	if err != nil {
		if eventlog.Hint(err) == "" {
			return nil, err
		}
		add(Danger, err.Error(), "nothing can be captured", notSQL+eventlog.Hint(err), "")
		return out, nil
	}
	defer repl.Close(context.WithoutCancel(ctx))
	sv, err := server(ctx, conn, repl)
	if err != nil {
		return nil, err
	}
	if err := checkServer(sv); err != nil {
		add(Danger, err.Error(), "nothing can be captured", notSQL+eventlog.Hint(err), "a restart of the server")
	}
	if minor, ok := lossy[sv.Version/10000]; ok && sv.Version%10000 < minor {
		add(Warning, fmt.Sprintf("PostgreSQL %d.%d can lose rows of a table that is added to a publication", sv.Version/10000, sv.Version%10000),
			"rows written by transactions that are open at that moment never reach the log", notSQL+fmt.Sprintf("update the server to %d.%d or later", sv.Version/10000, minor), "a restart of the server")
	}
	if sv.Settings["max_slot_wal_keep_size"] == "-1" {
		add(Danger, "max_slot_wal_keep_size is not set", "while the sidecar does not run, the source keeps all WAL and its disk can fill",
			"ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf();", "beyond the limit the slot is lost, and the log says so")
	}
	if sv.Settings["fsync"] == "off" {
		add(Danger, "fsync is off", "after a crash the source may have lost transactions that the log holds, and use their places in the WAL for others: no tool could tell them apart",
			"ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf();", "slower commits")
	}
	if err := c.examineSlots(ctx, conn, sv, add); err != nil {
		return nil, err
	}
	tables, err := c.tables(ctx, conn)
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		q := eventlog.QuoteQualified(t.Schema, t.Name)
		if t.InsertOnly {
			add(Warning, fmt.Sprintf("only inserts of %s are captured: %s", t, t.Why), "its updates and deletes are not in the log",
				"ALTER TABLE "+q+" REPLICA IDENTITY FULL;  -- or give it a primary key", "a short exclusive lock, and the whole old row in the WAL of every UPDATE and DELETE")
		}
		if t.RLS {
			add(Info, fmt.Sprintf("%s has row-level security", t), "its changes are captured in full; reading existing rows needs BYPASSRLS", "", "")
		}
		if !t.Published {
			add(Warning, fmt.Sprintf("%s is not captured", t), "its changes are not in the log", notSQL+"backstory init", "")
		}
	}
	if err := c.examinePublished(ctx, conn, tables, add); err != nil {
		return nil, err
	}
	if err := examineApplication(ctx, conn, add); err != nil {
		return nil, err
	}
	return out, nil
}

func (c Config) examineSlots(ctx context.Context, conn *pgx.Conn, sv *Server, add func(Severity, string, string, string, string)) error {
	var slots, senders int
	err := conn.QueryRow(ctx, `SELECT current_setting('max_replication_slots')::int - (SELECT count(*) FROM pg_replication_slots)::int,
		current_setting('max_wal_senders')::int - (SELECT count(*) FROM pg_stat_replication)::int`).Scan(&slots, &senders)
	if err != nil {
		return fmt.Errorf("count the replication slots: %w", err)
	}
	slot, err := c.ReadSlot(ctx, conn)
	if err != nil {
		return err
	}
	if !slot.Exists && slots <= 0 {
		most, _ := strconv.Atoi(sv.Settings["max_replication_slots"])
		add(Danger, "all replication slots are in use", "backstory init cannot make its own", "ALTER SYSTEM SET max_replication_slots = "+strconv.Itoa(most+10)+";", "a restart of the server")
	}
	if senders <= 0 && !slot.Active {
		add(Danger, "all WAL senders are in use", "the sidecar cannot connect", "ALTER SYSTEM SET max_wal_senders = 10;", "a restart of the server")
	}
	switch {
	case !slot.Exists:
		add(Info, "replication slot "+c.Slot+" does not exist", "nothing is captured", notSQL+"backstory init", "")
	case slot.WALStatus == "lost":
		add(Danger, "the server has removed WAL that replication slot "+c.Slot+" needed", "changes are missing from the log", notSQL+"backstory init --accept-gap", "a gap in the history")
	case slot.WALStatus == "unreserved":
		add(Danger, "replication slot "+c.Slot+" is about to be lost", "changes will be missing from the log", notSQL+"start the sidecar; raise max_slot_wal_keep_size", "")
	case slot.RetainedBytes > 10<<30:
		add(Warning, fmt.Sprintf("the source keeps %d GB of WAL for replication slot %s", slot.RetainedBytes>>30, c.Slot), "its disk can fill", notSQL+"start the sidecar, or look with backstory status why it does not get on", "")
	}
	if sv.Version >= 170000 && slot.Exists && !slot.Failover && !sv.InRecovery {
		add(Info, "replication slot "+c.Slot+" is not synchronised to standbys", "after a failover it is gone: a gap", notSQL+"as its owner, while the sidecar is stopped: ALTER_REPLICATION_SLOT "+c.Slot+" (FAILOVER true)", "standbys need sync_replication_slots = on, hot_standby_feedback = on, primary_slot_name and a dbname in primary_conninfo")
	}
	if sv.Version >= 170000 && slot.Failover && sv.Settings["synchronized_standby_slots"] == "" {
		var standbys int
		if err := conn.QueryRow(ctx, `SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'physical'`).Scan(&standbys); err == nil && standbys > 0 {
			add(Warning, "synchronized_standby_slots is empty", "the log can run ahead of a standby; after a failover to it, it holds transactions that the new primary has lost: a gap",
				"ALTER SYSTEM SET synchronized_standby_slots = '<the standby''s physical slot>'; SELECT pg_reload_conf();", "capture waits for that standby")
		}
	}
	return nil
}

// examineApplication looks for what lies in the way: other publications, forgotten transactions.
func examineApplication(ctx context.Context, conn *pgx.Conn, add func(Severity, string, string, string, string)) error {
	rows, err := conn.Query(ctx, `SELECT pubname::text FROM pg_publication WHERE puballtables`)
	if err != nil {
		return fmt.Errorf("list publications: %w", err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("list publications: %w", err)
	}
	for _, p := range all {
		add(Warning, "publication "+p+" is FOR ALL TABLES", "with the log in this database, its tables are published too, and UPDATEs of its bookkeeping reach that subscriber",
			notSQL+"keep the log in another database: BACKSTORY_LOG_URL", "")
	}
	var prepared []string
	rows, err = conn.Query(ctx, `SELECT format('%s (since %s)', gid, date_trunc('second', prepared)) FROM pg_prepared_xacts WHERE database = current_database()`)
	if err == nil {
		prepared, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil {
		return fmt.Errorf("list prepared transactions: %w", err)
	}
	if len(prepared) > 0 {
		add(Warning, "prepared transactions are open: "+strings.Join(prepared, ", "), "making the slot waits for them; the source keeps WAL for them", "ROLLBACK PREPARED 'gid';  -- or COMMIT PREPARED", "ends that transaction")
	}
	return nil
}
