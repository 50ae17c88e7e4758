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

func (s *Server) lossy() bool { return s.Version%10000 < lossy[s.Version/10000] }

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
	add := func(f Finding) { out = append(out, f) }
	if repl, err := c.connectReplication(ctx, nil); err == nil {
		_ = repl.Close(context.WithoutCancel(ctx))
	} else if eventlog.Hint(err) == "" {
		return nil, err
	} else {
		add(Finding{Severity: Danger, What: err.Error(), Risk: "nothing can be captured", Remedy: eventlog.Hint(err)})
	}
	sv, err := settings(ctx, conn)
	if err != nil {
		return nil, err
	}
	examineServer(sv, add)
	if err := c.examineSlots(ctx, conn, sv, add); err != nil {
		return nil, err
	}
	tables, err := c.tables(ctx, conn)
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		if t.InsertOnly {
			what := "only inserts of %s are captured: %s"
			if !t.Published && !t.Inserts {
				what = "only inserts of %s can be captured: %s"
			}
			add(Finding{Severity: Warning, What: fmt.Sprintf(what, t, t.Why),
				Risk: "what its updates and deletes have made of its rows is found later, by comparing them with the log; who made them, and when, is lost", Remedy: t.Remedy, Cost: "a short exclusive lock; with FULL, the whole old row in the WAL of every UPDATE and DELETE"})
		}
		if t.RLS {
			add(Finding{Severity: Info, What: fmt.Sprintf("%s has row-level security", t),
				Risk: "its changes are captured in full; reading existing rows needs BYPASSRLS"})
		}
		switch {
		case t.Published:
		case t.Inserts:
			add(Finding{Severity: Warning, What: fmt.Sprintf("only inserts of %s are captured, through its schema", t),
				Risk: "its updates and deletes are not in the log", Remedy: "backstory init"})
		default:
			add(Finding{Severity: Warning, What: fmt.Sprintf("%s is not captured", t),
				Risk: "its changes are not in the log", Remedy: "backstory init"})
		}
	}
	all, err := c.tableNames(ctx, conn)
	if err != nil {
		return nil, err
	}
	out = append(out, c.unmatched(all)...)
	for _, t := range all {
		if t.published && !c.selected(&t.Relation) {
			add(Finding{Severity: Warning, What: fmt.Sprintf("%s is captured, though BACKSTORY_TABLES and BACKSTORY_EXCLUDE leave it out", t),
				Risk: "its changes reach the log and the reactors: what is captured changes with backstory init alone", Remedy: "backstory init"})
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

// examineServer judges version and settings.
func examineServer(sv *Server, add func(Finding)) {
	if err := checkServer(sv); err != nil {
		add(Finding{Severity: Danger, What: err.Error(),
			Risk: "nothing can be captured", Remedy: eventlog.Hint(err), Cost: "a restart of the server"})
	}
	if sv.lossy() {
		add(Finding{Severity: Warning, What: fmt.Sprintf("PostgreSQL %d.%d can lose rows of a table that is added to a publication", sv.Version/10000, sv.Version%10000),
			Risk: "rows written by transactions that are open at that moment never reach the log", Remedy: fmt.Sprintf("update the server to %d.%d or later", sv.Version/10000, lossy[sv.Version/10000]), Cost: "a restart of the server"})
	}
	if sv.Settings["max_slot_wal_keep_size"] == "-1" {
		add(Finding{Severity: Danger, What: "max_slot_wal_keep_size is not set",
			Risk: "while the sidecar does not run, the source keeps all WAL and its disk can fill", SQL: "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf();", Cost: "beyond the limit the slot is lost, and the log says so"})
	}
	if idle := sv.Settings["idle_replication_slot_timeout"]; idle != "" && idle != "0" { // 18
		add(Finding{Severity: Warning, What: "idle_replication_slot_timeout is " + idle,
			Risk: "when the sidecar has not run for so long, its slot is lost: a gap", SQL: "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();", Cost: "other slots that nobody uses stay; max_slot_wal_keep_size limits what they keep"})
	}
	if sv.Settings["fsync"] == "off" {
		add(Finding{Severity: Danger, What: "fsync is off",
			Risk: "after a crash the source may have lost transactions that the log holds, and use their places in the WAL for others: no tool could tell them apart", SQL: "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf();", Cost: "slower commits"})
	}
}

// NoSlot is what Examine finds before init.
func NoSlot(slot string) Finding {
	return Finding{Severity: Info, What: "replication slot " + slot + " does not exist", Risk: "nothing is captured", Remedy: "backstory init"}
}

func (c Config) examineSlots(ctx context.Context, conn *pgx.Conn, sv *Server, add func(Finding)) error {
	var slots int
	err := conn.QueryRow(ctx, `SELECT current_setting('max_replication_slots')::int - (SELECT count(*) FROM pg_replication_slots)::int`).Scan(&slots)
	if err != nil {
		return fmt.Errorf("count the replication slots: %w", err)
	}
	slot, err := c.ReadSlot(ctx, conn)
	if err != nil {
		return err
	}
	if !slot.Exists && slots <= 0 {
		most, _ := strconv.Atoi(sv.Settings["max_replication_slots"])
		add(Finding{Severity: Danger, What: "all replication slots are in use",
			Risk: "backstory init cannot make its own", SQL: "ALTER SYSTEM SET max_replication_slots = " + strconv.Itoa(most+10) + ";", Cost: "a restart of the server"})
	}
	c.examineSlot(slot, sv, add)
	if sv.Version >= 170000 && slot.Failover && sv.Settings["synchronized_standby_slots"] == "" {
		var standbys int
		if err := conn.QueryRow(ctx, `SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'physical'`).Scan(&standbys); err == nil && standbys > 0 {
			add(Finding{Severity: Warning, What: "synchronized_standby_slots is empty",
				Risk: "the log can run ahead of a standby; after a failover to it, it holds transactions that the new primary has lost: a gap", SQL: "ALTER SYSTEM SET synchronized_standby_slots = '<the standby''s physical slot>'; SELECT pg_reload_conf();", Cost: "capture waits for that standby"})
		}
	}
	return nil
}

// examineSlot judges the slot.
func (c Config) examineSlot(slot *Slot, sv *Server, add func(Finding)) {
	switch {
	case !slot.Exists:
		add(NoSlot(c.Slot))
	case slot.WALStatus == "lost":
		add(Finding{Severity: Danger, What: "the server has removed WAL that replication slot " + c.Slot + " needed",
			Risk: "changes are missing from the log", Remedy: "backstory init --accept-gap", Cost: "a gap in the history"})
	case slot.WALStatus == "unreserved":
		add(Finding{Severity: Danger, What: "replication slot " + c.Slot + " is about to be lost",
			Risk: "changes will be missing from the log", Remedy: "start the sidecar; raise max_slot_wal_keep_size"})
	case slot.RetainedBytes > 10<<30:
		add(Finding{Severity: Warning, What: fmt.Sprintf("the source keeps %d GB of WAL for replication slot %s", slot.RetainedBytes>>30, c.Slot),
			Risk: "its disk can fill", Remedy: "start the sidecar, or look with backstory status why it does not get on"})
	}
	if sv.Version >= 170000 && slot.Exists && !slot.Failover && !sv.InRecovery {
		add(Finding{Severity: Info, What: "replication slot " + c.Slot + " is not synchronised to standbys",
			Risk: "after a failover it is gone: a gap", Remedy: "as its owner, while the sidecar is stopped: ALTER_REPLICATION_SLOT " + c.Slot + " (FAILOVER true)", Cost: "standbys need sync_replication_slots = on, hot_standby_feedback = on, primary_slot_name and a dbname in primary_conninfo"})
	}
}

// examineApplication looks for what lies in the way: other publications, forgotten transactions.
func examineApplication(ctx context.Context, conn *pgx.Conn, add func(Finding)) error {
	rows, err := conn.Query(ctx, `SELECT pubname::text FROM pg_publication WHERE puballtables`)
	if err != nil {
		return fmt.Errorf("list publications: %w", err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("list publications: %w", err)
	}
	for _, p := range all {
		add(Finding{Severity: Warning, What: "publication " + p + " is FOR ALL TABLES",
			Risk: "with the log in this database, its tables are published too, and UPDATEs of its bookkeeping reach that subscriber", Remedy: "keep the log in another database: BACKSTORY_LOG_URL"})
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
		add(Finding{Severity: Warning, What: "prepared transactions are open: " + strings.Join(prepared, ", "),
			Risk: "making the slot waits for them; the source keeps WAL for them", SQL: "ROLLBACK PREPARED 'gid';  -- or COMMIT PREPARED", Cost: "ends that transaction"})
	}
	return nil
}
