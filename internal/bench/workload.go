package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// workload is a history of an orders table: rows are inserted, then each is updated so and so many times.
type workload struct {
	rows     int    // row changes in all
	updates  int    // of each row
	perTx    int    // row changes in a transaction
	identity string // REPLICA IDENTITY: FULL, DEFAULT
	random   bool   // rows are updated in an order that has nothing to do with that of their making
	bare     bool   // without context
}

// inserts is the number of rows that the table has in the end.
func (w workload) inserts() int { return w.rows / (1 + w.updates) }

// changes is the number of row changes: rows, but for a remainder.
func (w workload) changes() int { return w.inserts() * (1 + w.updates) }

// transactions is the number of transactions; the last one of each pass may be smaller.
func (w workload) transactions() int {
	return (w.inserts() + w.perTx - 1) / w.perTx * (1 + w.updates)
}

func (w workload) String() string {
	s := number(float64(w.changes()), "rows") + " row changes ("
	switch w.updates {
	case 0:
		s += "inserts"
	case 1:
		s += number(float64(w.inserts()), "rows") + " inserts, then 1 update of each row"
	default:
		s += fmt.Sprintf("%s inserts, then %d updates of each row", number(float64(w.inserts()), "rows"), w.updates)
	}
	if w.random {
		s += ", in random order"
	}
	if w.perTx == 1 {
		s += "), one row a transaction"
	} else {
		s += fmt.Sprintf("), %d rows a transaction", w.perTx)
	}
	if w.bare {
		s += ", no context"
	} else {
		s += ", each with a context"
	}
	return s + ", REPLICA IDENTITY " + w.identity
}

// ordersTable is a table as applications have it. markers is there to tell readers of the stream that the workload is over.
const ordersTable = `CREATE TABLE orders (
	id bigserial PRIMARY KEY, customer_id bigint NOT NULL, status text NOT NULL, total numeric(12,2) NOT NULL, note text,
	created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL);
	CREATE TABLE markers (id bigint PRIMARY KEY)`

// loader runs one pass of a workload in transactions of its own. Its arguments: which pass (0 inserts), rows, rows in a
// transaction, random, bare. The order of a random pass is i → i·48271 mod rows, which meets each row once unless the prime
// 48271 divides rows.
const loader = `CREATE PROCEDURE bench_pass(pass int, n int, per_tx int, random bool, bare bool) LANGUAGE plpgsql AS $$
DECLARE
	lo int := 0;
	hi int;
	at timestamptz;
BEGIN
	WHILE lo < n LOOP
		hi := least(lo + per_tx, n);
		at := clock_timestamp();
		IF NOT bare THEN
			PERFORM pg_logical_emit_message(true, 'backstory', format('{"actor":"user-%s","request_id":"%s","action":"%s"}',
				lo % 997, md5(pass || '-' || lo), CASE pass WHEN 0 THEN 'orders#create' ELSE 'orders#pay' END));
		END IF;
		IF pass = 0 THEN
			INSERT INTO orders (customer_id, status, total, note, created_at, updated_at)
				SELECT 1 + g * 7919::bigint % 100000, 'pending', (g * 37::bigint % 100000) / 100.0,
					CASE WHEN g % 4 > 0 THEN 'Please leave it at the back door, order ' || g END, at, at FROM generate_series(lo, hi - 1) g;
		ELSIF random THEN
			UPDATE orders SET status = 'paid ' || pass, total = total + 1, updated_at = at
				WHERE id = ANY (ARRAY(SELECT 1 + g * 48271::bigint % n FROM generate_series(lo, hi - 1) g));
		ELSE
			UPDATE orders SET status = 'paid ' || pass, total = total + 1, updated_at = at WHERE id BETWEEN lo + 1 AND hi;
		END IF;
		COMMIT;
		lo := hi;
	END LOOP;
END $$`

// prepare makes the tables, empty, so that the log will have their whole life.
func (w workload) prepare(ctx context.Context, d *database) error {
	return d.exec(ctx, ordersTable, `ALTER TABLE orders REPLICA IDENTITY `+w.identity, loader)
}

// loaded is what a workload left in the WAL.
type loaded struct {
	workload
	begin, end string // LSNs around it
	walBytes   int64
	events     int64 // that it makes in a log: its changes, and the marker
}

// load runs the workload, then one transaction more, beyond its end, into markers.
func (w workload) load(ctx context.Context, d *database) (*loaded, error) {
	conn, err := d.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	l := &loaded{workload: w, events: int64(w.changes()) + 1}
	began := time.Now()
	steps := []string{
		`SET synchronous_commit = off`, // of no consequence for what is in the WAL
		`SET enable_seqscan = off`,     // there are no statistics to plan by
	}
	for pass := 0; pass <= w.updates; pass++ {
		steps = append(steps, fmt.Sprintf(`CALL bench_pass(%d, %d, %d, %t, %t)`, pass, w.inserts(), w.perTx, w.random && pass > 0, w.bare))
	}
	steps = append(steps, `SET synchronous_commit = on`)
	if l.begin, err = insertLSN(ctx, conn); err != nil {
		return nil, err
	}
	for _, q := range steps {
		if _, err := conn.Exec(ctx, q, pgx.QueryExecModeSimpleProtocol); err != nil {
			return nil, fmt.Errorf("load the workload: %.60s: %w", q, err)
		}
	}
	if l.end, err = insertLSN(ctx, conn); err != nil {
		return nil, err
	}
	err = conn.QueryRow(ctx, `WITH m AS (INSERT INTO markers VALUES (1)) SELECT ($1::pg_lsn - $2::pg_lsn)::bigint`, l.end, l.begin).Scan(&l.walBytes)
	if err != nil {
		return nil, fmt.Errorf("load the workload: %w", err)
	}
	progress("%s: loaded %s changes in %.1f s, %.0f MB of WAL", d.name, number(float64(w.changes()), "rows"), time.Since(began).Seconds(), float64(l.walBytes)/1e6)
	return l, nil
}

func insertLSN(ctx context.Context, conn *pgx.Conn) (lsn string, err error) {
	if err := conn.QueryRow(ctx, `SELECT pg_current_wal_insert_lsn()::text`).Scan(&lsn); err != nil {
		return "", fmt.Errorf("ask for the end of the WAL: %w", err)
	}
	return lsn, nil
}

// options of pgoutput for those who read a workload beside the sidecar.
const proto, publication = "1", "backstory"

// decode lets the server decode the workload and throw it away: the limit of everything that reads its WAL. It returns how long
// that took.
func (l *loaded) decode(ctx context.Context, d *database, slot string) (time.Duration, error) {
	conn, err := d.connect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var messages int
	began := time.Now()
	err = conn.QueryRow(ctx, `SELECT count(*) FROM pg_logical_slot_peek_binary_changes($1, $2, NULL, 'proto_version', $3, 'publication_names', $4)`,
		slot, l.end, proto, publication).Scan(&messages)
	took := time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("let the server decode: %w", err)
	}
	// One message for each change, BEGIN and COMMIT, and a few descriptions of tables.
	if least := l.changes() + 2*l.transactions(); messages < least || messages > least+100 {
		return 0, fmt.Errorf("let the server decode: it gave %d messages, not %d", messages, least)
	}
	return took, nil
}

// receive has pg_recvlogical stream the workload to /dev/null.
func (l *loaded) receive(ctx context.Context, d *database, slot, url string) (usage, error) {
	u, _, err := runProgram(ctx, d.lab.recvlogical, []string{"--dbname", url, "--slot", slot, "--start", "--no-loop", "--endpos", l.end,
		"--option", "proto_version=" + proto, "--option", "publication_names=" + publication, "--file", "/dev/null"})
	if err != nil {
		return u, err
	}
	passed, err := ask[bool](ctx, d, `SELECT confirmed_flush_lsn >= $2::pg_lsn FROM pg_replication_slots WHERE slot_name = $1`, slot, l.end)
	if err == nil && !passed {
		err = fmt.Errorf("pg_recvlogical ended before the workload's end, %s", l.end)
	}
	return u, err
}

// copySlots copies a slot before anybody reads from it, so that each side has one that begins where the workload does.
func copySlots(ctx context.Context, d *database, slot string, names ...string) error {
	for _, n := range names {
		if err := d.exec(ctx, fmt.Sprintf(`SELECT pg_copy_logical_replication_slot('%s', '%s')`, slot, n)); err != nil {
			return err
		}
	}
	return nil
}
