package eventlog

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Captured is a table that is captured, in its present shape.
type Captured struct {
	*Relation
	SinceLSN LSN // from where on its changes are in the stream
	// Published says which rows of the source's catalogue publish it, and in which version (package capture writes and reads
	// it): if they are others, changes may be missing. Empty: not recorded.
	Published string
}

// Captured gives the tables that are captured, by name.
func (l *Log) Captured(ctx context.Context) ([]Captured, error) {
	rows, err := l.pool.Query(ctx, `SELECT `+relationColumns+`, (since_lsn - '0/0')::bigint, published
		FROM backstory.captured ORDER BY schema, name`)
	if err != nil {
		return nil, Remedy(fmt.Errorf("read the captured tables: %w", err))
	}
	defer rows.Close()
	var out []Captured
	for rows.Next() {
		var stored storedRelation
		var since int64
		var published string
		if err := rows.Scan(append(stored.scan(), &since, &published)...); err != nil {
			return nil, fmt.Errorf("read the captured tables: %w", err)
		}
		r, err := stored.relation()
		if err != nil {
			return nil, fmt.Errorf("read the captured tables: %w", err)
		}
		out = append(out, Captured{r, LSN(since), published})
	}
	return out, rows.Err()
}

// Retaken gives the OIDs of those captured tables with a history that were not captured, or only their inserts, for a while, as long as that is not recorded
// (Writer.Retaken): no version of them is as new as their SinceLSN. Of tables of which only inserts are captured that is not known.
func (l *Log) Retaken(ctx context.Context) ([]uint32, error) {
	rows, err := l.pool.Query(ctx, `SELECT c.oid::bigint FROM backstory.captured c
		CROSS JOIN LATERAL (SELECT max(r.at_lsn) AS at_lsn FROM backstory.relation r WHERE r.oid = c.oid AND r.sealed_at <= (SELECT position FROM backstory.head)) r
		WHERE NOT c.insert_only AND r.at_lsn < c.since_lsn`)
	if err != nil {
		return nil, Remedy(fmt.Errorf("read the captured tables: %w", err))
	}
	oids, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (uint32, error) {
		var oid int64
		err := row.Scan(&oid)
		return uint32(oid), err
	})
	if err != nil {
		return nil, Remedy(fmt.Errorf("read the captured tables: %w", err))
	}
	return oids, nil
}

// SetCaptured records the tables that are captured; others are forgotten (their history stays).
func (l *Log) SetCaptured(ctx context.Context, tables []Captured) error {
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error { return setCaptured(ctx, tx, tables) })
	if err != nil {
		return fmt.Errorf("record the captured tables: %w", err)
	}
	return nil
}

func setCaptured(ctx context.Context, tx pgx.Tx, tables []Captured) error {
	oids := []int64{}
	for _, c := range tables {
		columns, generated, key, err := c.marshal()
		if err != nil {
			return err
		}
		oids = append(oids, int64(c.OID))
		_, err = tx.Exec(ctx, `INSERT INTO backstory.captured (oid, schema, name, columns, key, key_deferrable, identity, insert_only, complete, since_lsn, published, generated)
			VALUES ($1::bigint::oid, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
			ON CONFLICT (oid) DO UPDATE SET schema = $2, name = $3, columns = $4, key = $5, key_deferrable = $6, identity = $7, insert_only = $8,
				complete = $9, since_lsn = $10, published = $11, generated = $12`,
			int64(c.OID), c.Schema, c.Name, columns, key, c.Deferrable, string(c.ReplicaIdentity), c.InsertOnly, c.Complete, c.SinceLSN.String(), c.Published, generated)
		if err != nil {
			return err
		}
	}
	_, err := tx.Exec(ctx, `DELETE FROM backstory.captured WHERE NOT oid::bigint = ANY ($1)`, oids)
	return err
}

// Begin ties a new log to its source: from start on, everything is in the log. It is an error if the log has a source.
func (l *Log) Begin(ctx context.Context, h Head, tables []Captured) error {
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO backstory.head (epoch, position, written, seal, system_id, database, incarnation, timeline, end_lsn, commit_lsn, slot)
			VALUES (0, 0, 0, $1, $2, $3, $4, $5, $6, '0/0', $7)`,
			genesis(h.SystemID, h.Database), h.SystemID, h.Database, h.Incarnation, int64(h.Timeline), h.EndLSN.String(), h.Slot)
		if err != nil {
			return err
		}
		return setCaptured(ctx, tx, tables)
	})
	if err != nil {
		return fmt.Errorf("tie the event log to its source: %w", err)
	}
	return nil
}

// AcceptGap lets the log go on after a gap, from another point of the source. Rows of before may have changed or vanished
// unseen, so no table counts as complete any more.
func (l *Log) AcceptGap(ctx context.Context, h Head) error {
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `UPDATE backstory.head SET epoch = epoch + 1, gap = NULL, incarnation = incarnation + 1, system_id = $1, database = $2,
			timeline = $3, end_lsn = $4, commit_lsn = '0/0', slot = $5, updated_at = now()`, h.SystemID, h.Database, int64(h.Timeline), h.EndLSN.String(), h.Slot)
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `UPDATE backstory.captured SET complete = false`)
		return err
	})
	if err != nil {
		return fmt.Errorf("accept the gap: %w", err)
	}
	return nil
}
