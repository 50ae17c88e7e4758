package capture

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// Sight is how a source looks from outside, without a stream.
type Sight struct {
	WAL      eventlog.LSN // the end of its WAL
	Slot     *Slot
	Received eventlog.LSN // what the sidecar's connection says it has received; 0 without one
	// Idle: nobody streams, and the slot holds nothing that is captured.
	Idle bool
	// Oldest is the commit time of the oldest captured change that the slot holds; zero if there is none, or nobody knows.
	Oldest time.Time
	// HeldBack tells why the slot keeps as much WAL as it does, where that is much: which transactions of the source are open, what the log
	// has not taken yet.
	HeldBack []string
	// NotCaptured are tables that the configuration selects, public.orders, but no publication of ours holds.
	NotCaptured []string
	// InsertsOnly are those of them whose inserts are captured all the same, since their schema is in the publication of inserts.
	InsertsOnly []string
	// Refused are tables whose UPDATEs and DELETEs Postgres refuses since our publication has them, and why; a sidecar that may mends
	// that by itself.
	Refused []string
}

// Glance asks a source how it stands, without looking into its WAL.
func Glance(ctx context.Context, c Config) (*Sight, error) {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	at, done, err := c.connectSlot(ctx, conn)
	if err != nil {
		return nil, err
	}
	defer done()
	return c.glance(ctx, conn, at)
}

func (c Config) glance(ctx context.Context, conn, at *pgx.Conn) (*Sight, error) {
	s := &Sight{}
	var received int64
	var err error
	if s.WAL, err = currentLSN(ctx, conn); err != nil {
		return nil, err
	}
	if s.Slot, err = c.ReadSlot(ctx, at); err != nil {
		return nil, err
	}
	err = at.QueryRow(ctx, `SELECT coalesce((SELECT (write_lsn - '0/0')::bigint FROM pg_stat_replication WHERE pid = $1), 0)`, s.Slot.ActivePID).Scan(&received)
	if err != nil {
		return nil, fmt.Errorf("ask the source what it has sent: %w", err)
	}
	s.Received = eventlog.LSN(received)
	if s.Slot.Exists {
		if s.HeldBack, err = holders(ctx, conn, s.Slot, s.WAL); err != nil {
			return nil, err
		}
		if s.NotCaptured, s.InsertsOnly, err = c.notCaptured(ctx, conn); err != nil {
			return nil, err
		}
		refused, err := c.refused(ctx, conn)
		if err != nil {
			return nil, err
		}
		for _, t := range refused {
			s.Refused = append(s.Refused, t.name+": "+t.why)
		}
	}
	return s, nil
}

// Look asks a source how it stands. Where nobody streams it looks into the slot's WAL, and so holds the slot for up to three
// seconds: a process that wants to stream has to wait for that.
func Look(ctx context.Context, c Config) (*Sight, error) {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	at, done, err := c.connectSlot(ctx, conn)
	if err != nil {
		return nil, err
	}
	defer done()
	s, err := c.glance(ctx, conn, at)
	if err != nil {
		return nil, err
	}
	replayed, err := currentLSN(ctx, at)
	if err != nil {
		return nil, err
	}
	if s.Slot.Exists && !s.Slot.Active && s.Slot.WALStatus != "lost" {
		// The server itself can tell whether there is anything to come. It may take long, then nobody knows. Before 15 it also sends
		// transactions that hold nothing for us, such as the log's own: then all of them have to be looked at.
		if _, err := at.Exec(ctx, "SET statement_timeout = '3s'"); err == nil {
			var oldest *int64
			err := at.QueryRow(ctx, `WITH peeked AS MATERIALIZED (SELECT xid, data FROM pg_logical_slot_peek_binary_changes($1, NULL,
					CASE WHEN current_setting('server_version_num')::int >= 150000 THEN 1 END, 'proto_version', '1', 'publication_names', $2)),
				first AS (SELECT xid FROM peeked WHERE get_byte(data, 0) NOT IN (ascii('B'), ascii('C')) LIMIT 1)
				SELECT ('x' || encode(substr(p.data, 10, 8), 'hex'))::bit(64)::bigint FROM peeked p, first f WHERE p.xid = f.xid AND get_byte(p.data, 0) = ascii('B') LIMIT 1`,
				c.Slot, eventlog.QuoteIdent(c.Publication)+","+eventlog.QuoteIdent(c.InsertPublication())).Scan(&oldest)
			switch {
			case errors.Is(err, pgx.ErrNoRows):
				s.Idle = c.StandbyURL == "" || replayed >= s.WAL // what a standby has not replayed it cannot tell of
			case err == nil && oldest != nil:
				s.Oldest = time.UnixMicro(*oldest + 946684800*1000000).UTC()
			}
		}
	}
	return s, nil
}
