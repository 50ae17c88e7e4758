package capture

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// TakeIn publishes the tables that the configuration selects and that are not captured yet, mostly made since, where the role may: it
// owns the table and the publication (PostgreSQL manual, ALTER PUBLICATION). It hands each over as it is to be recorded as soon as it is
// published, and returns those that it may not publish. One that is locked does not keep it from the others, nor does it wait
// for each. captured are those that are captured, known the OIDs of those that the log has ever known.
func TakeIn(ctx context.Context, c Config, captured []eventlog.Captured, known []uint32, record func(eventlog.Captured) error) (left []*Table, err error) {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	is := func(oid uint32) bool {
		return slices.ContainsFunc(captured, func(e eventlog.Captured) bool { return e.OID == oid })
	}
	names, err := c.tableNames(ctx, conn)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(names, func(t tableName) bool { return !is(t.OID) && c.selected(&t.Relation) }) {
		return nil, nil // as nearly always
	}
	var publications int
	if err := conn.QueryRow(ctx, `SELECT count(*) FROM pg_publication WHERE pubname IN ($1, $2) AND pg_has_role(pubowner, 'USAGE')`, c.Publication, c.InsertPublication()).Scan(&publications); err != nil {
		return nil, fmt.Errorf("read the publications: %w", err)
	}
	sv, err := settings(ctx, conn)
	if err != nil {
		return nil, err
	}
	all, err := c.tables(ctx, conn)
	if err != nil {
		return nil, err
	}
	wait := protectLock
	var locked error
	for _, t := range all {
		if is(t.OID) {
			continue
		}
		if !t.Published && (!t.Owned || publications < 2) {
			left = append(left, t)
			continue
		}
		e, err := c.takeIn(ctx, conn, sv, t, known, wait)
		if eventlog.SQLState(err) == "55P03" { // lock_not_available
			if wait = "50ms"; locked == nil {
				locked = &eventlog.Problem{Err: fmt.Errorf("%s is locked, and so cannot be published: %w", t, err), Hint: "It is tried again every few seconds. Until then its changes are not in the log; its rows will be, as they are then."}
			}
			continue
		}
		if err == nil {
			err = record(e)
		}
		if err != nil {
			return left, err
		}
	}
	return left, locked
}

// takeIn publishes one table.
func (c Config) takeIn(ctx context.Context, conn *pgx.Conn, sv *Server, t *Table, known []uint32, wait string) (e eventlog.Captured, err error) {
	empty := map[uint32]bool{}
	if !t.Published {
		name := c.Publication
		if t.InsertOnly {
			name = c.InsertPublication()
		}
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if !sv.lossy() {
				if err := emptyTables(ctx, tx, []*Table{t}, nil, known, empty, time.Time{}); err != nil {
					return err
				}
			}
			// Nobody waits long behind it, should somebody else have the table's lock.
			for _, q := range []string{"SET LOCAL synchronous_commit = on", "SET LOCAL lock_timeout = '" + wait + "'",
				"ALTER PUBLICATION " + eventlog.QuoteIdent(name) + " ADD TABLE " + only(t.Schema, t.Name)} {
				if _, err := tx.Exec(ctx, q); err != nil {
					return err
				}
			}
			return nil
		})
		if code := eventlog.SQLState(err); err != nil && code != "42710" { // duplicate_object: somebody else was faster
			return e, fmt.Errorf("publish %s: %w", t, err)
		}
	}
	published, err := c.publications(ctx, conn, t.OID)
	if err != nil {
		return e, err
	}
	t.Relation.Complete = empty[t.OID] && !t.InsertOnly
	return eventlog.Captured{Relation: t.Relation, SinceLSN: sv.FlushLSN, Published: published.of(c, t.OID, t.InsertOnly), Catalogue: t.catalogue}, nil
}

// LeftOut finds the partitions that are not captured, of partitioned tables of which others are. seen is where the source stood; 0: nobody looked, as
// no partition is captured.
func LeftOut(ctx context.Context, c Config, captured []eventlog.Captured) (list []eventlog.LeftOut, seen eventlog.LSN, err error) {
	if !slices.ContainsFunc(captured, func(t eventlog.Captured) bool { return t.RootName != "" && !t.Dropped }) {
		return nil, 0, nil // as mostly
	}
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	rows, err := conn.Query(ctx, `SELECT c.oid::bigint, n.nspname, c.relname, `+root+`, c.relkind::text, c.relpersistence::text
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relispartition AND c.relkind IN ('r', 'f') AND NOT c.oid = ANY ($1::bigint[]::oid[])
		AND pg_partition_root(c.oid) IN (SELECT pg_partition_root(p.oid) FROM pg_class p WHERE p.oid = ANY ($1::bigint[]::oid[]) AND p.relispartition) ORDER BY 2, 3`, bigints(oidsOf(captured)))
	if err != nil {
		return nil, 0, fmt.Errorf("look for partitions that are not captured: %w", err)
	}
	list, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (p eventlog.LeftOut, err error) {
		var oid int64
		var kind, persistence string
		err = row.Scan(&oid, &p.Schema, &p.Name, &p.RootSchema, &p.RootName, &kind, &persistence)
		p.OID = uint32(oid)
		switch {
		case kind == "f":
			p.Why = "it is a foreign table"
		case persistence != "p":
			p.Why = "it is unlogged"
		case !c.selected(&eventlog.Relation{Schema: p.Schema, Name: p.Name, RootSchema: p.RootSchema, RootName: p.RootName}):
			p.Why = "BACKSTORY_TABLES and BACKSTORY_EXCLUDE leave it out"
		default:
			p.Why, p.Possible = "it has not been taken in", true
		}
		return p, err
	})
	if err != nil {
		return nil, 0, fmt.Errorf("look for partitions that are not captured: %w", err)
	}
	seen, err = currentLSN(ctx, conn)
	return list, seen, err
}
