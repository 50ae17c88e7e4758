package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// baseline measures how fast the rows of a table that existed before are taken over, against COPY FROM of the very events that come of
// it, finished in a file, into a log of the same layout, whose indexes are made afterwards.
func (l *lab) baseline(ctx context.Context, g *group) error {
	rows := 5 * l.opt.rows
	g.About = fmt.Sprintf("backstory run --once with an orders table of %s existing rows; start to exit of the process; log in another database of the same server", number(float64(rows), "rows"))
	source, err := l.database(ctx, "source", "")
	if err != nil {
		return err
	}
	defer source.drop(ctx)
	err = source.exec(ctx, ordersTable, fmt.Sprintf(`INSERT INTO orders (customer_id, status, total, note, created_at, updated_at)
		SELECT 1 + g * 7919::bigint %% 100000, 'pending', (g * 37::bigint %% 100000) / 100.0, CASE WHEN g %% 4 > 0 THEN 'Please leave it at the back door, order ' || g END,
			'2026-01-01'::timestamptz + g * interval '1 s', '2026-01-01'::timestamptz + g * interval '1 s' FROM generate_series(1, %d) g`, rows), `VACUUM ANALYZE orders`)
	if err != nil {
		return err
	}
	const taking, copying = "taking over existing rows", "COPY FROM of the finished events, then the indexes"
	const keyless = "the same rows without a key"
	file := filepath.Join(l.scratch.Path, "events")
	defer os.Remove(file)
	for pair := range l.opt.pairs {
		log, err := l.database(ctx, "log", "")
		if err != nil {
			return err
		}
		in, err := l.installWith(ctx, source, log)
		if err != nil {
			return errors.Join(err, log.drop(ctx))
		}
		rates := map[string]float64{}
		rate := func(side string, took time.Duration) {
			rates[side] = float64(rows) / took.Seconds()
			progress("baseline: %-50s %7.2f s  %9.0f rows/s", side, took.Seconds(), rates[side])
		}
		w := &loaded{workload: workload{rows: rows}, events: int64(rows) + 1} // and one that says that these are all
		var u usage
		var cpu map[string]time.Duration
		take := func() error {
			u, cpu, err = in.once(ctx, w)
			if err != nil {
				return err
			}
			rate(taking, u.wall)
			return copyOut(ctx, log, file)
		}
		put := func() error {
			took, err := l.copyIn(ctx, log, file, w.events)
			rate(copying, took)
			return err
		}
		progress("baseline: pair %d of %d", pair+1, l.opt.pairs)
		sides := []func() error{take, put} // in this order, as the first one makes what the second one copies
		for _, side := range sides {
			if err = l.calm(ctx); err == nil {
				err = side()
			}
			if err != nil {
				return errors.Join(err, log.drop(ctx))
			}
		}
		g.compare(taking, "rows/s", rates[taking], copying, rates[copying], atLeast(0.8))
		l.cost(g, &contest{label: taking}, w, u, cpu)
		_, _ = ask[int](ctx, source, `SELECT count(pg_drop_replication_slot(slot_name)) FROM pg_replication_slots WHERE database = current_database()`)
		if err := source.exec(ctx, `DROP PUBLICATION `+publication, `DROP PUBLICATION `+publication+`_inserts`); err != nil {
			return errors.Join(err, log.drop(ctx))
		}
		if err := log.drop(ctx); err != nil {
			return err
		}
		took, err := l.takeKeyless(ctx, source, rows)
		if err != nil {
			return err
		}
		rate(keyless, took)
		g.compare(keyless, "rows/s", rates[keyless], "with one", rates[taking], nil)
	}
	return nil
}

// takeKeyless measures how long it takes to take over the rows when their table has no key.
func (l *lab) takeKeyless(ctx context.Context, source *database, rows int) (time.Duration, error) {
	if err := source.exec(ctx, `ALTER TABLE orders DROP CONSTRAINT orders_pkey, REPLICA IDENTITY FULL`); err != nil {
		return 0, err
	}
	log, err := l.database(ctx, "log", "")
	if err != nil {
		return 0, err
	}
	in, err := l.installWith(ctx, source, log)
	if err == nil {
		err = l.calm(ctx)
	}
	var u usage
	if err == nil {
		u, _, err = in.once(ctx, &loaded{workload: workload{rows: rows}, events: int64(rows) + 2}) // and two that say where that began and ended
	}
	_, _ = ask[int](ctx, source, `SELECT count(pg_drop_replication_slot(slot_name)) FROM pg_replication_slots WHERE database = current_database()`)
	return u.wall, errors.Join(err, log.drop(ctx), source.exec(ctx, `DROP PUBLICATION IF EXISTS `+publication, `DROP PUBLICATION IF EXISTS `+publication+`_inserts`,
		`ALTER TABLE orders ADD PRIMARY KEY (id), REPLICA IDENTITY DEFAULT`))
}

// copyOut writes a log's events to a file, in COPY's binary form.
func copyOut(ctx context.Context, log *database, file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	conn, err := log.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	b := bufio.NewWriterSize(f, 1<<20)
	if _, err := conn.PgConn().CopyTo(ctx, b, `COPY (SELECT * FROM backstory.event ORDER BY position) TO STDOUT (FORMAT binary)`); err != nil {
		return fmt.Errorf("copy the events to a file: %w", err)
	}
	return b.Flush()
}

// copyIn makes a log whose event table has the partitions and the indexes of another one's, and copies the file into it. It returns how
// long copying and indexing took.
func (l *lab) copyIn(ctx context.Context, like *database, file string, events int64) (time.Duration, error) {
	to, err := l.database(ctx, "copy", "")
	if err != nil {
		return 0, err
	}
	defer to.drop(ctx)
	schema, err := eventlog.Migration(1)
	if err != nil {
		return 0, err
	}
	if err := to.exec(ctx, schema); err != nil {
		return 0, err
	}
	model, err := like.connect(ctx)
	if err != nil {
		return 0, err
	}
	defer model.Close(context.WithoutCancel(ctx))
	rows, err := model.Query(ctx, `SELECT format('CREATE TABLE backstory.%1$I PARTITION OF backstory.event %2$s', c.relname, pg_get_expr(c.relpartbound, c.oid)),
		ARRAY(SELECT pg_get_indexdef(x.indexrelid) FROM pg_index x WHERE x.indrelid = c.oid) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
		WHERE i.inhparent = 'backstory.event'::regclass ORDER BY c.relname`)
	if err != nil {
		return 0, err
	}
	var indexes []string
	var tables []string
	for rows.Next() {
		var table string
		var list []string
		if err := rows.Scan(&table, &list); err != nil {
			return 0, err
		}
		tables, indexes = append(tables, table), append(indexes, list...)
	}
	if err := rows.Err(); err != nil {
		return 0, err
	}
	if err := to.exec(ctx, tables...); err != nil {
		return 0, err
	}
	conn, err := to.connect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	began := time.Now()
	tag, err := conn.PgConn().CopyFrom(ctx, bufio.NewReaderSize(f, 1<<20), `COPY backstory.event FROM STDIN (FORMAT binary)`)
	if err != nil {
		return 0, fmt.Errorf("copy the events into a log: %w", err)
	}
	if tag.RowsAffected() != events {
		return 0, fmt.Errorf("copied %d events, not %d", tag.RowsAffected(), events)
	}
	copied := time.Since(began)
	if _, err := conn.Exec(ctx, `SET maintenance_work_mem = '128MB'`); err != nil {
		return 0, err
	}
	for _, q := range indexes {
		if _, err := conn.Exec(ctx, q, pgx.QueryExecModeSimpleProtocol); err != nil {
			return 0, fmt.Errorf("index a log: %w", err)
		}
	}
	took := time.Since(began)
	progress("baseline: of which COPY %.2f s, indexes %.2f s", copied.Seconds(), (took - copied).Seconds())
	return took, nil
}
