package capture

import (
	"context"
	"fmt"

	"github.com/backstory-dev/backstory/eventlog"
)

// Sight is how a source looks from outside, without a stream.
type Sight struct {
	WAL      eventlog.LSN // the end of its WAL
	Slot     *Slot
	Received eventlog.LSN // what the sidecar's connection says it has received; 0 without one
	// Idle: nobody streams, and the slot holds nothing that is captured.
	Idle bool
}

// Look asks a source how it stands.
func Look(ctx context.Context, c Config) (*Sight, error) {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	s := &Sight{}
	var wal, received int64
	err = conn.QueryRow(ctx, `SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END - '0/0')::bigint,
		coalesce((SELECT (r.write_lsn - '0/0')::bigint FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid WHERE s.slot_name = $1), 0)`, c.Slot).Scan(&wal, &received)
	if err != nil {
		return nil, fmt.Errorf("ask the source for the end of its WAL: %w", err)
	}
	s.WAL, s.Received = eventlog.LSN(wal), eventlog.LSN(received)
	if s.Slot, err = c.ReadSlot(ctx, conn); err != nil {
		return nil, err
	}
	if s.Slot.Exists && !s.Slot.Active && s.Slot.WALStatus != "lost" {
		// The server itself can tell whether there is anything to come. It may take long, then nobody knows. Before 15 it also sends
		// transactions that hold nothing for us, such as the log's own: then all of them have to be looked at.
		if _, err := conn.Exec(ctx, "SET statement_timeout = '3s'"); err == nil {
			var some bool
			err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_logical_slot_peek_binary_changes($1, NULL,
				CASE WHEN current_setting('server_version_num')::int >= 150000 THEN 1 END, 'proto_version', '1', 'publication_names', $2)
				WHERE get_byte(data, 0) NOT IN (ascii('B'), ascii('C')))`,
				c.Slot, eventlog.QuoteIdent(c.Publication)+","+eventlog.QuoteIdent(c.InsertPublication())).Scan(&some)
			s.Idle = err == nil && !some
		}
	}
	return s, nil
}
