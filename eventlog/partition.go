package eventlog

import (
	"context"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// partition is one table of events by position. While the writer is far behind, the newest partition has none but small
// partial indexes, is smaller, and gets its indexes when it is full or the writer has caught up: building them at once costs
// half of what inserting row by row does.
type partition struct {
	first, last Position // last is inclusive
	indexed     bool
}

func (p *partition) name() string { return fmt.Sprintf("event_p%d", p.first) }

// partitions reads what partitions there are, in order.
func (l *Log) partitions(ctx context.Context, q interface {
	Query(context.Context, string, ...any) (pgx.Rows, error)
}) ([]*partition, error) {
	rows, err := q.Query(ctx, `
		SELECT (regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \(''?(\d+)''?\) TO \(''?(\d+)''?\)'))[1]::bigint,
		       (regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \(''?(\d+)''?\) TO \(''?(\d+)''?\)'))[2]::bigint - 1,
		       to_regclass('backstory.' || c.relname || '_position') IS NOT NULL
		FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
		WHERE i.inhparent = 'backstory.event'::regclass ORDER BY 1`)
	if err != nil {
		return nil, fmt.Errorf("read the log's partitions: %w", err)
	}
	defer rows.Close()
	var out []*partition
	for rows.Next() {
		p := &partition{}
		if err := rows.Scan(&p.first, &p.last, &p.indexed); err != nil {
			return nil, fmt.Errorf("read the log's partitions: %w", err)
		}
		out = append(out, p)
	}
	return out, rows.Err()
}

// createPartition makes the partition that begins at first. It attaches rather than creates in place, since CREATE TABLE …
// PARTITION OF would wait for every reader (PostgreSQL manual, Table Partitioning).
// before is called at the beginning of the transaction; an error of it prevents the partition.
func (l *Log) createPartition(ctx context.Context, conn *pgx.Conn, first Position, events int64, before ...func(context.Context, pgx.Tx) error) (*partition, error) {
	p := &partition{first: first, last: first + Position(events) - 1}
	n := "backstory." + p.name()
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		for _, f := range before {
			if err := f(ctx, tx); err != nil {
				return err
			}
		}
		for _, q := range []string{
			fmt.Sprintf(`CREATE TABLE %s (LIKE backstory.event INCLUDING DEFAULTS)`, n),
			fmt.Sprintf(`ALTER TABLE %s SET (toast_tuple_target = 4080)`, n),
			// Somebody else's publication FOR ALL TABLES refuses a DELETE on a table without identity, and so ours of an
			// unfinished transaction. FULL costs nothing until then.
			fmt.Sprintf(`ALTER TABLE %s REPLICA IDENTITY FULL`, n),
			// Few events have an entry in these: kept from the beginning they cost less than another two passes over a full partition.
			fmt.Sprintf(`CREATE INDEX ON %s (old_id, stream, position) WHERE old_id IS NOT NULL`, n),
			fmt.Sprintf(`CREATE INDEX ON %s (row_id, stream, position) WHERE row_id IS NOT NULL`, n),
			fmt.Sprintf(`CREATE INDEX ON %s (owner_id, owner, position) WHERE owner IS NOT NULL`, n),
			fmt.Sprintf(`CREATE INDEX ON %s USING gin (also) WHERE also IS NOT NULL`, n),
			fmt.Sprintf(`CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON %s FOR EACH STATEMENT EXECUTE FUNCTION backstory.refuse()`, n),
			fmt.Sprintf(`ALTER TABLE backstory.event ATTACH PARTITION %s FOR VALUES FROM (%d) TO (%d)`, n, p.first, p.last+1),
		} {
			if _, err := tx.Exec(ctx, q); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("create a partition of the event log: %w", err)
	}
	return p, nil
}

// index gives a partition its indexes: by position, by entity, by block ranges for times and LSNs; and one per aggregate
// whose key is not an integer, in the key's own type. The one by position, which becomes visible last, says that all are there.
func (l *Log) index(ctx context.Context, conn *pgx.Conn, p *partition) error {
	for try := 0; ; try++ {
		err := l.makeIndexes(ctx, conn, p)
		// A server may still be making one for a process that was killed, and it comes to be while this one waits.
		if c := code(err); c != "23505" && c != "42P07" || try == 20 {
			return err
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (l *Log) makeIndexes(ctx context.Context, conn *pgx.Conn, p *partition) error {
	n := p.name()
	// The id first, since it is what differs: the sort compares one number. Positions make all entries distinct.
	byEntity := fmt.Sprintf(`CREATE INDEX IF NOT EXISTS %[1]s_entity ON backstory.%[1]s (id, stream, position) WITH (deduplicate_items = off)`, n)
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET LOCAL maintenance_work_mem = '128MB'`); err != nil {
			return err
		}
		var large bool
		if err := tx.QueryRow(ctx, `SELECT pg_relation_size($1::text::regclass) > 32 << 20`, "backstory."+n).Scan(&large); err != nil {
			return err
		}
		g, ctx := errgroup.WithContext(ctx)
		if large { // on a connection of its own, at the same time
			g.Go(func() error {
				_, err := l.pool.Exec(ctx, `SET maintenance_work_mem = '128MB'; `+byEntity+`; RESET maintenance_work_mem`, pgx.QueryExecModeSimpleProtocol)
				return err
			})
		}
		g.Go(func() error {
			for _, q := range []string{
				fmt.Sprintf(`CREATE UNIQUE INDEX IF NOT EXISTS %[1]s_position ON backstory.%[1]s (position)`, n),
				fmt.Sprintf(`CREATE INDEX IF NOT EXISTS %[1]s_range ON backstory.%[1]s USING brin (position, commit_lsn, occurred_at) WITH (pages_per_range = 32, autosummarize = on)`, n),
			} {
				if _, err := tx.Exec(ctx, q); err != nil {
					return err
				}
			}
			if large {
				return nil
			}
			_, err := tx.Exec(ctx, byEntity)
			return err
		})
		return g.Wait()
	})
	if err != nil {
		return fmt.Errorf("index a partition of the event log: %w", err)
	}
	p.indexed = true
	if err := l.dict.load(ctx); err != nil {
		return err
	}
	l.dict.mu.Lock()
	var aggs []*aggregate
	for _, a := range l.dict.aggregates {
		aggs = append(aggs, a)
	}
	l.dict.mu.Unlock()
	for _, a := range aggs {
		if err := l.indexKey(ctx, conn, p, a); err != nil {
			return err
		}
	}
	return nil
}

// summarize brings the block ranges of a partition up to date, which otherwise waits for autovacuum.
func (l *Log) summarize(ctx context.Context, conn *pgx.Conn, p *partition) error {
	if _, err := conn.Exec(ctx, `SELECT brin_summarize_new_values($1::text::regclass)`, "backstory."+p.name()+"_range"); err != nil {
		return fmt.Errorf("summarize a partition of the event log: %w", err)
	}
	return nil
}

// indexKey adds the index by which the view of an aggregate whose key is not an integer is joined. A type whose text form
// is not immutable cannot have one; its view then offers the key as text.
func (l *Log) indexKey(ctx context.Context, conn *pgx.Conn, p *partition, a *aggregate) error {
	if a.idType == "bigint" || !p.indexed {
		return nil
	}
	_, err := conn.Exec(ctx, fmt.Sprintf(`CREATE INDEX IF NOT EXISTS %s ON backstory.%s ((%s), position) WHERE stream = %d`,
		QuoteIdent(fmt.Sprintf("%s_key_%d", p.name(), a.id)), p.name(), a.keyExpression("id_text"), a.id))
	if err == nil {
		_, err = conn.Exec(ctx, fmt.Sprintf(`CREATE INDEX IF NOT EXISTS %s ON backstory.%s ((%s), position) WHERE owner = %d`,
			QuoteIdent(fmt.Sprintf("%s_owner_%d", p.name(), a.id)), p.name(), a.keyExpression("owner_text"), a.id))
	}
	if err != nil {
		return fmt.Errorf("index the keys of %s: %w", a.name, err)
	}
	return nil
}

// keyExpression is the key of an aggregate's entities in its own type, as the index has it and the view offers it. It takes
// every key there can be, since one that an index refuses could never be appended: a TRUNCATE has none, and a key may be longer
// than an entry of an index (2 704 bytes); the view has NULL for it.
func (a *aggregate) keyExpression(c string) string {
	if a.idType == "text" {
		return "CASE WHEN octet_length(" + c + ") <= 2000 THEN " + c + " END"
	}
	return "nullif(" + c + ", '')::" + a.idType
}

// viewName is the name of an aggregate's view: order_events.
func viewName(a *aggregate) string {
	const tail, longest = "_events", 63
	name := snake(a.name)
	if len(name)+len(tail) <= longest {
		return name + tail
	}
	number := "_" + itoa(a.id) // Postgres would cut it off, and two of them might become one
	cut := longest - len(tail) - len(number)
	for !utf8.RuneStart(name[cut]) {
		cut--
	}
	return name[:cut] + number + tail
}

// createView makes the aggregate's view in the shape of an event table, order_events(id, event_id, aggregate_id, type,
// data, metadata, created_at): id is the position, so that the last one is the newest.
func (l *Log) createView(ctx context.Context, conn *pgx.Conn, a *aggregate) error {
	id, owner := "e.id", "e.owner_id"
	if a.idType != "bigint" {
		id, owner = a.keyExpression("e.id_text"), a.keyExpression("e.owner_text")
	}
	name := viewName(a)
	// A branch each, so that a join by aggregate_id goes by an index in both.
	branch := func(id, where string) string {
		return fmt.Sprintf(`SELECT e.position AS id, backstory.event_id(s.tag, e.commit_lsn, e.change, e.part) AS event_id, %s AS aggregate_id, k.type,
			       backstory.merged(e.data::json, e.extra::json) AS data, e.before::json AS before,
			       backstory.merged(c.metadata, e.meta::json) AS metadata,
			       e.occurred_at AS created_at
			FROM backstory.event e
			JOIN backstory.kind k ON k.id = e.kind
			JOIN backstory.source s ON s.id = k.source
			LEFT JOIN LATERAL (SELECT x.last_position, x.metadata FROM backstory.context x
				WHERE x.first_position <= e.position ORDER BY x.first_position DESC LIMIT 1) c ON c.last_position >= e.position
			WHERE %s AND e.position <= (SELECT h.position FROM backstory.head h) AND NOT k.quiet`, id, where)
	}
	// Both from the beginning: another definition later would wait for whoever reads the view.
	query := branch(id, fmt.Sprintf("e.stream = %d AND e.owner IS NULL", a.id)) + " UNION ALL " + branch(owner, fmt.Sprintf("e.owner = %d", a.id))
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, fmt.Sprintf(`CREATE OR REPLACE VIEW backstory.%s AS %s`, QuoteIdent(name), query)); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, fmt.Sprintf(`CREATE OR REPLACE TRIGGER append_only INSTEAD OF INSERT OR UPDATE OR DELETE ON backstory.%s
			FOR EACH ROW EXECUTE FUNCTION backstory.refuse()`, QuoteIdent(name)))
		return err
	})
	if err != nil {
		return fmt.Errorf("create the view %s: %w", name, err)
	}
	return nil
}
