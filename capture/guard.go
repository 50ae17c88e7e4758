package capture

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// holdersBytes of WAL have to be kept for a slot before it is asked who keeps it from moving.
const holdersBytes = 64 << 20

// holders tells why a slot keeps so much WAL: decoding begins where the oldest transaction began that was open when the last confirmed one
// ended, so one that stays open holds restart_lsn back; everything after confirmed_flush_lsn waits for the log. (PostgreSQL manual,
// pg_replication_slots.)
func holders(ctx context.Context, q *pgx.Conn, s *Slot, end eventlog.LSN) (list []string, err error) {
	if s.RetainedBytes < holdersBytes {
		return nil, nil
	}
	if behind := int64(end - s.ConfirmedFlush); end > s.ConfirmedFlush && behind > s.RetainedBytes/2 {
		list = append(list, fmt.Sprintf("%s of it is not in the log yet", megabytes(behind)))
	}
	open, err := openTransactions(ctx, q, true)
	for _, o := range open {
		list = append(list, o.what)
	}
	return list, err
}

// openTransaction is one that has written and has not ended for ten seconds.
type openTransaction struct {
	what     string
	end      string // the SQL that ends it
	prepared bool
	dated    bool // it is known to be as old as that, which of other roles' it takes pg_monitor to see; otherwise it was open for stillOpen
	who      string
}

// stillOpen is how long a transaction has to stay open of which nobody tells when it began; it is looked whether they have ended in between, at first after firstLook.
const (
	stillOpen = time.Second
	firstLook = 10 * time.Millisecond
)

// openTransactions are the oldest of them, prepared ones too, a few of each kind. Those that nobody dates are left out unless undated is set: it
// takes up to stillOpen to tell that they are open for longer than a moment, and that only while there are some.
func openTransactions(ctx context.Context, q *pgx.Conn, undated bool) ([]openTransaction, error) {
	rows, err := q.Query(ctx, `
		SELECT format('pid %s (%s, %s) has had a transaction open%s', pid, usename, coalesce(nullif(application_name, ''), 'no application name'),
			coalesce(' for ' || date_trunc('second', clock_timestamp() - xact_start), ' for more than a second (how long, a role in pg_monitor sees)')),
			format('SELECT pg_terminate_backend(%s);', pid), false, xact_start IS NOT NULL, concat(pid, ' ', backend_xid)
		FROM (SELECT * FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND coalesce(xact_start < clock_timestamp() - interval '10 seconds', true) ORDER BY age(backend_xid) DESC LIMIT 3) a
		UNION ALL
		SELECT format('prepared transaction %L has been open for %s', gid, date_trunc('second', clock_timestamp() - prepared)), format('ROLLBACK PREPARED %L;', gid), true, true, ''
		FROM (SELECT * FROM pg_prepared_xacts WHERE prepared < clock_timestamp() - interval '10 seconds' ORDER BY age(transaction) DESC LIMIT 3) p`)
	if err != nil {
		return nil, fmt.Errorf("ask the source for its transactions: %w", err)
	}
	open, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (o openTransaction, err error) {
		err = row.Scan(&o.what, &o.end, &o.prepared, &o.dated, &o.who)
		return o, err
	})
	began := time.Now()
	for pause := firstLook; err == nil && slices.ContainsFunc(open, func(o openTransaction) bool { return !o.dated }); pause *= 2 {
		left := stillOpen - time.Since(began)
		if undated && left <= 0 {
			break
		}
		var still []string
		if undated {
			pass(ctx, min(pause, left))
			err = q.QueryRow(ctx, `SELECT coalesce(array_agg(concat(pid, ' ', backend_xid)), '{}') FROM pg_stat_activity WHERE backend_xid IS NOT NULL`).Scan(&still)
		}
		open = slices.DeleteFunc(open, func(o openTransaction) bool { return !o.dated && !slices.Contains(still, o.who) })
	}
	if err != nil {
		return nil, fmt.Errorf("ask the source for its transactions: %w", err)
	}
	return open, nil
}

func megabytes(n int64) string { return fmt.Sprintf("%d MB", n/1e6) }

// DropSlotAbove removes the slot from the source if it is one of ours and keeps more than limit bytes of WAL, whoever streams from it, and
// tells how many those were; 0 if it did not.
func DropSlotAbove(ctx context.Context, c Config, limit int64) (retained int64, err error) {
	c = c.WithDefaults()
	conn, done, err := c.connectSlot(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer done()
	var database string
	if err := conn.QueryRow(ctx, `SELECT current_database()`).Scan(&database); err != nil {
		return 0, fmt.Errorf("look at replication slot %s: %w", c.Slot, err)
	}
	for range 50 {
		s, err := c.ReadSlot(ctx, conn)
		if err != nil || !s.Exists || s.RetainedBytes <= limit || s.Plugin != "pgoutput" || s.Database != database {
			return 0, err
		}
		_, err = conn.Exec(ctx, `SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active_pid IS NOT NULL`, c.Slot)
		if err == nil {
			_, err = conn.Exec(ctx, `SELECT pg_drop_replication_slot($1)`, c.Slot)
		}
		if err == nil {
			return s.RetainedBytes, nil
		}
		if eventlog.SQLState(err) != "55006" { // object_in_use: it goes in a moment
			return 0, fmt.Errorf("drop replication slot %s, which keeps %s of WAL: %w", c.Slot, megabytes(s.RetainedBytes), err)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	return 0, errors.New("drop replication slot " + c.Slot + ": somebody streams from it again and again")
}
