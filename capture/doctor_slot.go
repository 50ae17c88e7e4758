package capture

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// idleSlotBytes of WAL for a replication slot that nobody uses are worth a note: it is no restart that takes a moment.
const idleSlotBytes = 128 << 20

// spilledTimes logical_decoding_work_mem have gone to the source's disk where that is too small.
const spilledTimes = 100

// slots looks at our replication slot and at others.
func (x *examination) slots(ctx context.Context) error {
	if x.at == nil {
		return nil // which is a finding
	}
	var left int
	err := x.at.QueryRow(ctx, `SELECT current_setting('max_replication_slots')::int - (SELECT count(*) FROM pg_replication_slots)::int`).Scan(&left)
	if err != nil {
		return fmt.Errorf("count the replication slots: %w", err)
	}
	if x.slot, err = x.ReadSlot(ctx, x.at); err != nil {
		return err
	}
	if !x.slot.Exists && left <= 0 {
		most, _ := strconv.Atoi(x.sv.ofSlot().Settings["max_replication_slots"])
		x.add(Finding{Check: "slots-in-use", Severity: Danger, What: "all replication slots are in use",
			Risk: "backstory init cannot make its own", SQL: "ALTER SYSTEM SET max_replication_slots = " + strconv.Itoa(most+10) + ";", Remedy: "then restart the server", Cost: "a restart of the server"})
	}
	x.examineSlot(x.slot, x.sv.ofSlot(), x.add)
	if x.slot.Exists && (x.slot.Plugin != "pgoutput" || x.slot.Database != x.sv.Database) {
		x.add(Finding{Check: "slot-of-another", Severity: Danger, What: fmt.Sprintf("replication slot %s belongs to something else (plugin %q, database %q)", x.Slot, x.slot.Plugin, x.slot.Database),
			Risk: "nothing is captured from this database", Remedy: "choose another name with BACKSTORY_SLOT"})
	}
	return errors.Join(x.slotUser(ctx), x.otherSlots(ctx), x.standbys(ctx), x.spilled(ctx))
}

// NoSlot is the check that says that there is no replication slot, as before init.
const NoSlot = "slot-missing"

// SlotLost is the check that says that the replication slot is of no use any more.
const SlotLost = "slot-lost"

// examineSlot judges the slot.
func (c Config) examineSlot(slot *Slot, sv *Server, add func(Finding)) {
	raise := func(f Finding, bytes int64) {
		f.Cost = "so much of the source's disk"
		if f.SQL, f.Remedy = sv.set("max_slot_wal_keep_size", fmt.Sprintf("%dGB", bytes>>30+1)); f.Remedy != "" {
			f.Remedy += ", and "
		}
		f.Remedy += "start the sidecar, or look with backstory status why it does not get on"
		add(f)
	}
	lost := Finding{Check: SlotLost, Severity: Danger, What: "the server has removed WAL that replication slot " + c.Slot + " needed",
		Risk: "changes are missing from the log", Remedy: "backstory init --accept-gap", Cost: "a gap in the history, which is healed by comparing the tables with the log"}
	switch {
	case !slot.Exists:
		add(Finding{Check: NoSlot, Severity: Info, What: "replication slot " + c.Slot + " does not exist", Risk: "nothing is captured", Remedy: "backstory init", Cost: "from then on the source keeps WAL for it, also while no sidecar runs"})
	case slot.WALStatus == "lost" && slot.Invalidation != "" && slot.Invalidation != "wal_removed":
		lost.What = "the server has given up replication slot " + c.Slot + " (" + slot.Invalidation + ")"
		add(lost)
	case slot.WALStatus == "lost":
		add(lost)
	case slot.WALStatus == "unreserved":
		raise(Finding{Check: "slot-limit", Severity: Danger, What: "replication slot " + c.Slot + " is about to be lost", Risk: "changes will be missing from the log"}, 2*slot.RetainedBytes)
	case slot.SafeBytes >= 0 && slot.SafeBytes < (slot.SafeBytes+slot.RetainedBytes)/4:
		raise(Finding{Check: "slot-limit", Severity: Warning, What: fmt.Sprintf("only %s more may be written before replication slot %s is in danger", megabytes(slot.SafeBytes), c.Slot),
			Risk: "it will be lost: a gap"}, 2*slot.RetainedBytes)
	case slot.RetainedBytes > 10<<30:
		add(Finding{Check: "slot-retained", Severity: Warning, What: fmt.Sprintf("the source keeps %d GB of WAL for replication slot %s", slot.RetainedBytes>>30, c.Slot),
			Risk: "its disk can fill", Remedy: "start the sidecar, or look with backstory status why it does not get on"})
	}
	if sv.Version >= 170000 && slot.Exists && !slot.Failover && !sv.InRecovery {
		add(Finding{Check: "slot-failover", Severity: Info, What: "replication slot " + c.Slot + " is not synchronised to standbys",
			Risk: "after a failover it is gone: a gap", Remedy: "as its owner, while the sidecar is stopped: ALTER_REPLICATION_SLOT " + c.Slot + " (FAILOVER true)", Cost: "standbys need sync_replication_slots = on, hot_standby_feedback = on, primary_slot_name and a dbname in primary_conninfo"})
	}
}

// slotUser looks who streams from the slot.
func (x *examination) slotUser(ctx context.Context) error {
	cfg, err := eventlog.ConnConfig(x.URL, "backstory")
	if err != nil || !x.slot.Active {
		return err
	}
	var pid int
	var name string
	err = x.at.QueryRow(ctx, `SELECT pid, application_name FROM pg_stat_replication WHERE pid = $1 AND application_name NOT IN ('', 'backstory', $2)`, x.slot.ActivePID, cfg.RuntimeParams["application_name"]).Scan(&pid, &name)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ask who uses the replication slot: %w", err)
	}
	x.add(Finding{Check: "slot-user", Severity: Warning, What: fmt.Sprintf("pid %d (%s) streams from replication slot %s", pid, name, x.Slot),
		Risk: "if it is no sidecar for this log, changes that it takes are missing from the log, and no sidecar can have the slot", SQL: fmt.Sprintf("SELECT pg_terminate_backend(%d);", pid), Remedy: "and give it a slot of its own", Cost: "its stream ends"})
	return nil
}

// otherSlots looks for slots that make the source keep WAL for nobody.
func (x *examination) otherSlots(ctx context.Context) error {
	rows, err := x.conn.Query(ctx, `SELECT slot_name::text, ((CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END) - restart_lsn)::bigint
		FROM pg_replication_slots WHERE NOT active AND slot_name <> $1 AND wal_status <> 'lost' ORDER BY 2 DESC`, x.Slot)
	if err != nil {
		return fmt.Errorf("look at other replication slots: %w", err)
	}
	var name string
	var bytes int64
	_, err = pgx.ForEachRow(rows, []any{&name, &bytes}, func() error {
		if bytes >= idleSlotBytes {
			severity := Info
			if bytes >= 8*idleSlotBytes {
				severity = Warning
			}
			x.add(Finding{Check: "idle-slot", Severity: severity, What: fmt.Sprintf("the source keeps %s of WAL for replication slot %s, which nobody uses", megabytes(bytes), name),
				Risk: "its disk can fill, and its VACUUM is held up", SQL: "SELECT pg_drop_replication_slot('" + name + "');", Cost: "whoever comes back for it has to begin anew"})
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("look at other replication slots: %w", err)
	}
	return nil
}

// standbys looks whether the log can run ahead of them, or has to wait for one that is gone (17 and later).
func (x *examination) standbys(ctx context.Context) error {
	if x.sv.Version < 170000 || !x.slot.Failover {
		return nil
	}
	rows, err := x.conn.Query(ctx, `SELECT slot_name::text, active FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary ORDER BY 1`)
	if err != nil {
		return fmt.Errorf("look for standbys: %w", err)
	}
	active := map[string]bool{}
	var all []string
	var name string
	var is bool
	if _, err := pgx.ForEachRow(rows, []any{&name, &is}, func() error {
		all, active[name] = append(all, name), is
		return nil
	}); err != nil {
		return fmt.Errorf("look for standbys: %w", err)
	}
	const setting = "synchronized_standby_slots"
	if x.sv.Settings[setting] == "" {
		if len(all) > 0 {
			f := Finding{Check: "standby-slots", Severity: Warning, What: setting + " is empty",
				Risk: "the log can run ahead of a standby; after a failover to it, it holds transactions that the new primary has lost: a gap", Cost: "capture waits for those that are named: leave out slots that are no standbys', such as a backup's"}
			f.SQL, f.Remedy = x.sv.set(setting, strings.Join(all, ", "))
			x.add(f)
		}
		return nil
	}
	var missing, rest []string
	for name := range strings.SplitSeq(x.sv.Settings[setting], ",") {
		if name = strings.TrimSpace(name); active[name] || name == "*" {
			rest = append(rest, name)
		} else {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		f := Finding{Check: "standby-slots", Severity: Warning, What: fmt.Sprintf("%s names %s, which no standby uses", setting, strings.Join(missing, ", ")),
			Risk: "capture stands still until it does, and the source keeps its WAL", Remedy: "start that standby", Cost: "without it, the log can run ahead of that standby"}
		f.SQL, f.Remedy = x.sv.set(setting, strings.Join(rest, ", "))
		f.Remedy = strings.TrimSpace(f.Remedy + " or start that standby")
		x.add(f)
	}
	return nil
}

// spilled looks whether decoding takes more memory than it may have.
func (x *examination) spilled(ctx context.Context) error {
	var bytes int64
	err := x.at.QueryRow(ctx, `SELECT coalesce(sum(spill_bytes), 0)::bigint FROM pg_stat_replication_slots WHERE slot_name = $1`, x.Slot).Scan(&bytes)
	if err != nil {
		return fmt.Errorf("ask for the statistics of the replication slot: %w", err)
	}
	mem := x.sv.Settings["logical_decoding_work_mem"]
	if has := bytesOf(mem); has > 0 && bytes > spilledTimes*has {
		f := Finding{Check: "decoding-memory", Severity: Info, What: fmt.Sprintf("the source has written %s of transactions to its disk, to decode them with logical_decoding_work_mem = %s", megabytes(bytes), mem),
			Risk: "capture is slower, and the source's disk has more to do", Cost: "so much memory of the source, while a large transaction is decoded; SELECT pg_stat_reset_replication_slot counts anew"}
		f.SQL, f.Remedy = x.sv.set("logical_decoding_work_mem", fmt.Sprintf("%dMB", max(64, 4*has>>20)))
		x.add(f)
	}
	return nil
}

// transactions looks for what lies in the way of the slot.
func (x *examination) transactions(ctx context.Context) error {
	exists := x.slot != nil && x.slot.Exists
	much := exists && x.slot.RetainedBytes >= holdersBytes
	open, err := openTransactions(ctx, x.conn, much)
	if err != nil {
		return err
	}
	for _, o := range open {
		f := Finding{Check: "open-transaction", Severity: Info, What: o.what, Risk: "backstory init, which makes the slot, waits for it", SQL: o.end, Remedy: "or let it commit", Cost: "what it has done is undone"}
		if o.prepared { // which no connection of an application ends by itself
			f.Severity = Warning
		}
		if exists {
			f.Severity, f.Risk = Warning, "the source keeps all WAL since it began"
		}
		if !exists || o.prepared || much {
			x.add(f)
		}
	}
	return nil
}

// Some joins names, the first few of many.
func Some(names []string) string {
	if n := len(names); n > 5 {
		return strings.Join(names[:4], ", ") + fmt.Sprintf(" and %d more", n-4)
	}
	return strings.Join(names, ", ")
}
