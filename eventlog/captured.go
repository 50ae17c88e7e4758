package eventlog

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Captured is a table that is captured, in its present shape.
type Captured struct {
	*Relation
	SinceLSN LSN // from where on its changes are in the stream
	// Published says which rows of the source's catalogue publish it, and in which version (package capture writes and reads
	// it): if they are others, changes may be missing. Empty: not recorded.
	Published string
	// Catalogue is what the source's catalogue said of its columns and its file (package capture writes and reads it): if it says something
	// else, the table was altered. Empty: not recorded.
	Catalogue string
	// Rows and Bytes are about how large it was when it was taken in. They are for what is recorded of its existing rows, and not read back.
	Rows, Bytes int64
	// Empty says that it had no rows where its changes begin. It is not read back either.
	Empty bool
	// WaitFor is above every transaction of the source that has to end before existing rows are read: one that was committed before the changes
	// begin may become visible after that. It is not read back either.
	WaitFor int64
}

// RelationsOf gives the shapes of captured tables.
func RelationsOf(captured []Captured) (out []*Relation) {
	for _, c := range captured {
		out = append(out, c.Relation)
	}
	return out
}

// String gives its own name, not that of the partitioned table that it may belong to.
func (c Captured) String() string { return c.Own() }

// Captured gives the tables that are captured, by name.
func (l *Log) Captured(ctx context.Context) ([]Captured, error) {
	rows, err := l.pool.Query(ctx, `SELECT `+relationColumns+`, (since_lsn - '0/0')::bigint, published, catalogue
		FROM backstory.captured ORDER BY schema, name`)
	if err != nil {
		return nil, Remedy(fmt.Errorf("read the captured tables: %w", err))
	}
	defer rows.Close()
	var out []Captured
	for rows.Next() {
		var stored storedRelation
		var since int64
		var published, catalogue string
		if err := rows.Scan(append(stored.scan(), &since, &published, &catalogue)...); err != nil {
			return nil, fmt.Errorf("read the captured tables: %w", err)
		}
		r, err := stored.relation()
		if err != nil {
			return nil, fmt.Errorf("read the captured tables: %w", err)
		}
		out = append(out, Captured{Relation: r, SinceLSN: LSN(since), Published: published, Catalogue: catalogue})
	}
	return out, rows.Err()
}

// LeftOut is a partition that is not captured, of a partitioned table of which others are.
type LeftOut struct {
	OID                  uint32
	Schema, Name         string // its own
	RootSchema, RootName string // of the partitioned table
	Why                  string // "it is unlogged"
	Possible             bool   // it could be captured
}

// LeaveOut records which partitions are not captured, as of a look at the source, which stood at seen: from the position on that the log of head had
// before. Those that could be count only where that has been tried. What is so no longer is over when the log has come to where that was seen.
func (l *Log) LeaveOut(ctx context.Context, list []LeftOut, head *Head, seen LSN, tried bool) error {
	if len(list) == 0 { // as mostly: then nothing is written, unless something was
		var open bool
		if err := l.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM backstory.left_out WHERE until_position IS NULL)`).Scan(&open); err != nil || !open {
			return Remedy(err)
		}
	}
	oids, roots := []int64{}, []string{}
	for _, p := range list {
		oids, roots = append(oids, int64(p.OID)), append(roots, p.RootSchema+"."+p.RootName)
	}
	const listed = `EXISTS (SELECT FROM unnest($1::bigint[], $2::text[]) x(oid, root) WHERE x.oid = left_out.oid::bigint AND x.root = root_schema || '.' || root_name)`
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		for _, q := range []struct {
			sql  string
			more []any
		}{
			{`UPDATE backstory.left_out SET gone_lsn = NULL WHERE until_position IS NULL AND gone_lsn IS NOT NULL AND ` + listed, nil},
			{`UPDATE backstory.left_out SET gone_lsn = $3 WHERE until_position IS NULL AND gone_lsn IS NULL AND NOT ` + listed, []any{seen.String()}},
			{`UPDATE backstory.left_out SET until_position = $3 WHERE until_position IS NULL AND gone_lsn <= $4 AND NOT ` + listed, []any{head.Position, head.EndLSN.String()}},
		} {
			if _, err := tx.Exec(ctx, q.sql, append([]any{oids, roots}, q.more...)...); err != nil {
				return err
			}
		}
		for _, p := range list {
			if p.Possible && !tried {
				continue
			}
			if err := putLeftOut(ctx, tx, p, head.Position, nil); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Remedy(fmt.Errorf("record which partitions are not captured: %w", err))
	}
	return nil
}

// LeftOutUntilNow records that partitions had rows when they were taken in: from a position on, at which they were not there yet, the log does not have
// all rows of their partitioned tables.
func (l *Log) LeftOutUntilNow(ctx context.Context, taken []Captured, since Position) error {
	taken = slices.DeleteFunc(slices.Clone(taken), func(t Captured) bool { return t.RootName == "" || t.Complete })
	if len(taken) == 0 {
		return nil
	}
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		for _, t := range taken {
			gone := t.SinceLSN.String()
			if err := putLeftOut(ctx, tx, LeftOut{OID: t.OID, Schema: t.Schema, Name: t.Name, RootSchema: t.RootSchema, RootName: t.RootName, Why: "it had not been taken in"}, since, &gone); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Remedy(fmt.Errorf("record which partitions were not captured: %w", err))
	}
	return nil
}

func putLeftOut(ctx context.Context, tx pgx.Tx, p LeftOut, since Position, gone *string) error {
	_, err := tx.Exec(ctx, `INSERT INTO backstory.left_out (oid, schema, name, root_schema, root_name, why, since_position, gone_lsn) SELECT $1::bigint::oid, $2, $3, $4, $5, $6, $7, $8
		WHERE NOT EXISTS (SELECT FROM backstory.left_out WHERE oid = $1::bigint::oid AND until_position IS NULL) ON CONFLICT (oid, since_position) DO UPDATE SET until_position = NULL, gone_lsn = $8, why = $6, root_schema = $4, root_name = $5`,
		int64(p.OID), p.Schema, p.Name, p.RootSchema, p.RootName, p.Why, since, gone)
	return err
}

// LeftOut gives the partitions that were not captured at a position, by name.
func (l *Log) LeftOut(ctx context.Context, at Position) ([]LeftOut, error) {
	rows, err := l.pool.Query(ctx, `SELECT oid::bigint, schema, name, root_schema, root_name, why FROM backstory.left_out
		WHERE since_position <= $1 AND (until_position IS NULL OR until_position >= $1 AND $1 < (SELECT position FROM backstory.head)) ORDER BY schema, name`, at)
	if err != nil {
		return nil, Remedy(fmt.Errorf("read which partitions are not captured: %w", err))
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (p LeftOut, err error) {
		var oid int64
		err = row.Scan(&oid, &p.Schema, &p.Name, &p.RootSchema, &p.RootName, &p.Why)
		p.OID = uint32(oid)
		return p, err
	})
	if err != nil {
		return nil, fmt.Errorf("read which partitions are not captured: %w", err)
	}
	return list, nil
}

// CapturedTable gives a captured table by its OID, with the generation of its baseline; it is an error wrapping pgx.ErrNoRows if there is none.
func (l *Log) CapturedTable(ctx context.Context, oid uint32) (Captured, error) {
	var stored storedRelation
	var since int64
	var generation int64
	c := Captured{}
	err := l.pool.QueryRow(ctx, `SELECT `+relationColumns+`, (since_lsn - '0/0')::bigint, published, catalogue,
		coalesce((SELECT generation FROM backstory.baseline b WHERE b.oid = c.oid), 0) FROM backstory.captured c WHERE oid = $1::bigint::oid`, int64(oid)).
		Scan(append(stored.scan(), &since, &c.Published, &c.Catalogue, &generation)...)
	if err == nil {
		c.SinceLSN = LSN(since)
		if c.Relation, err = stored.relation(); err == nil {
			c.Generation = generation
		}
	}
	if err != nil {
		return c, Remedy(fmt.Errorf("read how a table is captured: %w", err))
	}
	return c, nil
}

// Retaken gives the OIDs of those captured tables with a history that were not captured, or only their inserts, for a while, as long as that is not recorded
// (Writer.Retaken): no version of them is as new as their SinceLSN. Of tables of which only inserts are captured that is not known.
func (l *Log) Retaken(ctx context.Context) ([]uint32, error) {
	captured, err := l.Captured(ctx)
	if err != nil {
		return nil, err
	}
	versions, err := l.Relations(ctx)
	if err != nil {
		return nil, err
	}
	newest := map[uint32]LSN{}
	for _, v := range versions {
		newest[v.OID] = max(newest[v.OID], v.AtLSN)
	}
	var oids []uint32
	for _, c := range captured {
		if at, ok := newest[c.OID]; ok && !c.InsertOnly && at < c.SinceLSN {
			oids = append(oids, c.OID)
		}
	}
	return oids, nil
}

// execer is a transaction, or a connection in one.
type execer interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

// SetCaptured records the tables that are captured; others are forgotten (their history stays). One that has become complete meanwhile
// stays so, if it is captured from the same place on.
func (l *Log) SetCaptured(ctx context.Context, tables []Captured) error {
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error { return setCaptured(ctx, tx, tables) })
	if err != nil {
		return fmt.Errorf("record the captured tables: %w", err)
	}
	return nil
}

// ChangeCaptured records how tables are captured from now on that were so as was says, of those that still are; others of was are forgotten. What somebody else has recorded
// meanwhile stays: a sidecar at work and init change it at the same time.
func (l *Log) ChangeCaptured(ctx context.Context, was, tables []Captured) error {
	type how struct {
		since     int64
		published string
		inserts   bool
	}
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `SELECT oid::bigint, (since_lsn - '0/0')::bigint, published, insert_only FROM backstory.captured ORDER BY oid FOR UPDATE`)
		if err != nil {
			return err
		}
		is := map[uint32]how{}
		var oid int64
		var h how
		if _, err := pgx.ForEachRow(rows, []any{&oid, &h.since, &h.published, &h.inserts}, func() error { is[uint32(oid)] = h; return nil }); err != nil {
			return err
		}
		read := map[uint32]how{}
		for _, c := range was {
			read[c.OID] = how{int64(c.SinceLSN), c.Published, c.InsertOnly}
		}
		for _, c := range tables {
			now, there := is[c.OID]
			if then, ok := read[c.OID]; there != ok || now != then {
				continue
			}
			if err := overwriteCaptured(ctx, tx, c); err != nil {
				return err
			}
		}
		for oid, then := range read {
			if now, there := is[oid]; !there || now != then || slices.ContainsFunc(tables, func(c Captured) bool { return c.OID == oid }) {
				continue
			}
			if _, err := tx.Exec(ctx, `DELETE FROM backstory.captured WHERE oid = $1::bigint::oid`, int64(oid)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Remedy(fmt.Errorf("record the captured tables: %w", err))
	}
	return nil
}

func overwriteCaptured(ctx context.Context, tx execer, c Captured) error {
	return putCaptured(ctx, tx, c, `DO UPDATE SET schema = $2, name = $3, columns = $4, key = $5, key_deferrable = $6, identity = $7, insert_only = $8,
		complete = $9 OR captured.complete AND captured.since_lsn = $10 AND captured.insert_only = $8, since_lsn = $10, published = $11, generated = $12, catalogue = $13, root_schema = $14, root_name = $15, root_oid = $16::bigint::oid`)
}

func setCaptured(ctx context.Context, tx execer, tables []Captured) error {
	oids := []int64{}
	for _, c := range tables {
		oids = append(oids, int64(c.OID))
		if err := overwriteCaptured(ctx, tx, c); err != nil {
			return err
		}
	}
	_, err := tx.Exec(ctx, `DELETE FROM backstory.captured WHERE NOT oid::bigint = ANY ($1)`, oids)
	return err
}

func putCaptured(ctx context.Context, tx execer, c Captured, conflict string) error {
	columns, generated, key, err := c.marshal()
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `INSERT INTO backstory.captured (oid, schema, name, columns, key, key_deferrable, identity, insert_only, complete, since_lsn, published, generated, catalogue, root_schema, root_name, root_oid)
		VALUES ($1::bigint::oid, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16::bigint::oid) ON CONFLICT (oid) `+conflict,
		int64(c.OID), c.Schema, c.Name, columns, key, c.Deferrable, string(c.ReplicaIdentity), c.InsertOnly, c.Complete, c.SinceLSN.String(), c.Published, generated, c.Catalogue, c.RootSchema, c.RootName, int64(c.RootOID))
	return err
}

// Begin ties a new log to its source: from start on, everything is in the log. It is an error if the log has a source. Where h.BeganAt is zero, it is
// the present by the clock of the log's server.
func (l *Log) Begin(ctx context.Context, h Head, tables []Captured) error {
	var began *time.Time
	if !h.BeganAt.IsZero() {
		began = &h.BeganAt
	}
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO backstory.head (epoch, position, written, seal, system_id, database, incarnation, timeline, end_lsn, commit_lsn, slot, baseline, tables, exclude, server_version, began_at)
			VALUES (0, 0, 0, $1, $2, $3, $4, $5, $6, '0/0', $7, $8, coalesce($9, '{}'::text[]), coalesce($10, '{}'::text[]), $11, coalesce($12, now()))`,
			genesis(h.SystemID, h.Database), h.SystemID, h.Database, h.Incarnation, int64(h.Timeline), h.EndLSN.String(), h.Slot, h.Baseline, h.Tables, h.Exclude, h.Version, began)
		if err != nil {
			return err
		}
		if err := setCaptured(ctx, tx, tables); err != nil {
			return err
		}
		for _, t := range tables {
			if t.Complete {
				continue
			}
			_, err := tx.Exec(ctx, `INSERT INTO backstory.baseline (oid, since_lsn, wait_for, total_rows, total_bytes, done_at) SELECT oid, since_lsn, $5, $2, $3, CASE WHEN $4 THEN now() END FROM backstory.captured WHERE oid = $1::bigint::oid`, int64(t.OID), t.Rows, t.Bytes, t.Empty, t.WaitFor)
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("tie the event log to its source: %w", err)
	}
	return nil
}

// Exclusive runs f while nobody else does so who changes what is captured. If yields is set, the next writer of the log ends that: a
// sidecar may be put to sleep in the middle of f, and nobody could take over otherwise.
func (l *Log) Exclusive(ctx context.Context, yields bool, f func() error) error {
	conn, err := l.pool.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("connect to the event log: %w", ConnError(err))
	}
	defer conn.Release()
	const key = `backstory.key_hash('backstory captured')`
	unlock := `SELECT pg_advisory_unlock(` + key + `)`
	if yields {
		if _, err := conn.Exec(ctx, `SELECT pg_try_advisory_lock_shared(`+writerLock+`)`); err != nil {
			return Remedy(fmt.Errorf("lock the captured tables: %w", err))
		}
		unlock = `SELECT pg_advisory_unlock_all()`
	}
	locked := false
	defer func() {
		if !locked && !yields {
			return
		}
		if _, err := conn.Exec(context.WithoutCancel(ctx), unlock); err != nil {
			_ = conn.Conn().Close(context.WithoutCancel(ctx)) // with it go the locks
		}
	}()
	for !locked { // not pg_advisory_lock: a statement that waits holds back the vacuum of the whole database
		if err := conn.QueryRow(ctx, `SELECT pg_try_advisory_lock(`+key+`)`).Scan(&locked); err != nil {
			return Remedy(fmt.Errorf("lock the captured tables: %w", err))
		}
		if !locked {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	return f()
}

// Select records by which patterns tables are selected, those that are made later too, and whether rows that existed before their table was
// captured are to be taken over.
func (l *Log) Select(ctx context.Context, tables, exclude []string, baseline bool) error {
	_, err := l.pool.Exec(ctx, `UPDATE backstory.head SET tables = coalesce($1, '{}'::text[]), exclude = coalesce($2, '{}'::text[]), baseline = $3`, tables, exclude, baseline)
	if err != nil {
		return Remedy(fmt.Errorf("record what is selected: %w", err))
	}
	return nil
}

// AddCaptured records more tables that are captured. One that is recorded already stays as it is.
func (l *Log) AddCaptured(ctx context.Context, tables []Captured) error {
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		for _, c := range tables {
			if err := putCaptured(ctx, tx, c, "DO NOTHING"); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("record the captured tables: %w", err)
	}
	return nil
}

// Alteration is a captured table as it is since its description in the source's catalogue was changed, or since it was dropped.
type Alteration struct {
	Captured
	// Defined tells that it has other columns, another key or another name.
	Defined bool
	// Heal tells that the values of its rows may have changed without a row change in the stream, and Why.
	Heal bool
	Why  string
	// Told tells that an event says so already.
	Told bool
	// Next is above every transaction of the source that had begun when this was seen.
	Next int64
}

// Alter records that tables were altered. Their new shape gets its place in the log with an …Altered event, made by an empty chunk (see
// Baseline); where rows may have changed without an event, all of them are compared then, and until that is done the log does not have all
// of the table. at is where the log ended before the catalogue was looked at: everything up to there all later snapshots see, once the transactions
// have ended that were open then.
func (l *Log) Alter(ctx context.Context, list []Alteration, at Position) error {
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		for _, a := range list {
			if _, err := tx.Exec(ctx, `SELECT FROM backstory.baseline WHERE oid = $1::bigint::oid FOR UPDATE`, int64(a.OID)); err != nil { // in the writer's order
				return err
			}
			columns, generated, key, err := a.marshal()
			if err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, `UPDATE backstory.captured SET schema = $2, name = $3, columns = $4, key = $5, key_deferrable = $6, generated = $7, catalogue = $8, complete = complete AND NOT $9, root_schema = $10, root_name = $11, dropped = $12, identity = $13, root_oid = $14::bigint::oid
				WHERE oid = $1::bigint::oid`, int64(a.OID), a.Schema, a.Name, columns, key, a.Deferrable, generated, a.Catalogue, a.Heal, a.RootSchema, a.RootName, a.Dropped, string(a.ReplicaIdentity), int64(a.RootOID)); err != nil {
				return err
			}
			if !a.Defined && !a.Heal {
				continue // there is nothing to do, beside taking a note
			}
			// One that is under way goes on, as the rows that it has still to come to are read in the new shape, unless all have to be.
			if _, err := tx.Exec(ctx, `INSERT INTO backstory.baseline (oid, since_lsn, wait_for, pass, heal, altered, began_position, total_rows, total_bytes)
				SELECT c.oid, c.since_lsn, $3, 0, $2, $8, $6, $4, $5 FROM backstory.captured c, backstory.head h WHERE c.oid = $1::bigint::oid
				AND ($2 OR c.complete OR c.insert_only OR c.dropped OR NOT h.baseline) -- otherwise its rows are still to be read, in its new shape
				ON CONFLICT (oid) DO UPDATE SET since_lsn = excluded.since_lsn, wait_for = greatest(excluded.wait_for, baseline.wait_for), pass = 0,
					heal = excluded.heal OR baseline.heal AND baseline.done_at IS NULL, altered = excluded.altered OR baseline.altered AND baseline.pass = 0 AND baseline.done_at IS NULL,
					began_position = CASE WHEN baseline.heal AND baseline.done_at IS NULL THEN least(baseline.began_position, excluded.began_position) ELSE excluded.began_position END, total_rows = excluded.total_rows, total_bytes = excluded.total_bytes,
					chunks = 0, after_key = NULL, again = false, rows = 0, bytes = 0, imported = 0, began_at = now(), updated_at = now(), done_at = NULL,
					generation = excluded.generation, done_before = CASE WHEN baseline.since_lsn = excluded.since_lsn THEN coalesce(baseline.done_at, CASE WHEN baseline.pass = 0 THEN baseline.done_before END) END
				WHERE excluded.heal OR $7 OR baseline.since_lsn = excluded.since_lsn AND (baseline.done_at IS NOT NULL OR baseline.pass = 0)`,
				int64(a.OID), a.Heal, a.Next, a.Rows, a.Bytes, at, a.Dropped, a.Heal && !a.Told && (!a.Defined || a.Complete)); err != nil {
				return err
			}
			if a.Heal {
				continue
			}
			// The rows that are still to be read of it tell of its new shape, or, if there are no more, an empty chunk behind them.
			if _, err := tx.Exec(ctx, `UPDATE backstory.baseline b SET altered = true FROM backstory.captured c WHERE b.oid = $1::bigint::oid AND c.oid = b.oid AND c.since_lsn = b.since_lsn AND b.done_at IS NULL AND b.pass <> 0`, int64(a.OID)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("record that tables were altered: %w", err)
	}
	return nil
}

// Upgrade lets the log go on with what its source has become by pg_upgrade: another system, whose WAL goes on from h.EndLSN, with the same tables, which are
// described anew. was is the log's end that this was decided by. What is in the log is the history of the same rows, so the incarnation stays; event ids
// are others since the system is. It is an error if the log has gone on meanwhile.
func (l *Log) Upgrade(ctx context.Context, was, h Head, tables []Captured) error {
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE backstory.head SET epoch = epoch + 1, system_id = $1, timeline = $2, end_lsn = $3, server_version = $4, closed = false, updated_at = now()
			WHERE epoch = $5 AND system_id = $6 AND end_lsn = $7 AND closed AND gap IS NULL`, h.SystemID, int64(h.Timeline), h.EndLSN.String(), h.Version, was.Epoch, was.SystemID, was.EndLSN.String())
		if err == nil && tag.RowsAffected() == 0 {
			err = fenced
		}
		if err != nil {
			return err
		}
		for _, c := range tables {
			if _, err := tx.Exec(ctx, `UPDATE backstory.captured SET published = $2, catalogue = $3 WHERE oid = $1::bigint::oid`, int64(c.OID), c.Published, c.Catalogue); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Remedy(fmt.Errorf("go on with the upgraded source: %w", err))
	}
	return nil
}
