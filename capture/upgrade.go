package capture

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// pg_upgrade (PostgreSQL manual, pg_upgrade, Prepare for publisher upgrades) brings the logical slots of 17 and later along, if nothing is waiting in
// them. What it makes is another system, with timeline 1, whose WAL goes on behind the old one's; tables, their files, indexes and types keep
// their OIDs, publications do not, and every row of the catalogue is a new one. The slots are made last, at the beginning of a segment of the
// WAL, before anybody can write.
//
// That nothing is missing takes both ends: the old server itself said, when it was shut down, that all of it was confirmed (ErrClosed), and here
// the slot is as pg_upgrade makes it, the files are the old ones (olderRows), and nobody has altered a captured table or a publication since.
// Anything else is no upgrade, but another source.

// upgradedSlotBytes is how far behind the beginning of a segment the slots of an upgrade lie at most: a hundred of them take less.
const upgradedSlotBytes = 64 << 10

// Upgraded tells whether the source is what pg_upgrade has made of the source of a log that ends at head: then it gives from where that goes on, and its tables as
// they are to be recorded from now on. If the source is the log's, both are nil. If it is another one, the error says why it is not taken for the same.
func Upgraded(ctx context.Context, c Config, head eventlog.Head, captured []eventlog.Captured) (*eventlog.Head, []eventlog.Captured, error) {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var system, database string
	if err := conn.QueryRow(ctx, `SELECT system_identifier::text, current_database()::text FROM pg_control_system()`).Scan(&system, &database); err != nil {
		return nil, nil, fmt.Errorf("identify the source: %w", err)
	}
	if system == head.SystemID {
		return nil, nil, checkDatabase(database, &head)
	}
	at, done, err := c.connectSlot(ctx, conn)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	repl, err := c.connectReplication(ctx, nil)
	if err != nil {
		return nil, nil, err
	}
	defer repl.Close(context.WithoutCancel(ctx))
	sv, err := c.server(ctx, conn, at, repl)
	if err != nil {
		return nil, nil, err
	}
	slot, err := c.ReadSlot(ctx, at)
	if err != nil {
		return nil, nil, err
	}
	if sv.Version/10000 <= head.Version/10000 {
		return nil, nil, otherSystem(sv, &head, "")
	}
	tables, why, err := c.upgraded(ctx, conn, sv, slot, &head, captured)
	if err != nil {
		return nil, nil, err
	}
	if why != "" {
		return nil, nil, otherSystem(sv, &head, why)
	}
	head.SystemID, head.Timeline, head.EndLSN, head.Version = sv.SystemID, sv.Timeline, slot.ConfirmedFlush, sv.Version
	return &head, tables, nil
}

// upgraded gives the tables as they are after an upgrade, or why it was none.
func (c Config) upgraded(ctx context.Context, conn *pgx.Conn, sv *Server, slot *Slot, head *eventlog.Head, captured []eventlog.Captured) (tables []eventlog.Captured, why string, err error) {
	var segment int64
	if err := conn.QueryRow(ctx, `SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'`).Scan(&segment); err != nil {
		return nil, "", fmt.Errorf("read the source's settings: %w", err)
	}
	begins := slot.Restart % eventlog.LSN(max(segment, 1))
	switch {
	case head.Version < 170000:
		return nil, fmt.Sprintf("pg_upgrade takes slots along from PostgreSQL 17 on, and it was %d", head.Version/10000), nil
	case sv.Database != head.Database || sv.Standby != nil || sv.Timeline != 1:
		return nil, "it is another database, another timeline, or a standby", nil
	case !head.Closed:
		return nil, "when the old server was shut down, no sidecar was there to confirm all that it had", nil
	case !slot.Exists || slot.Plugin != "pgoutput" || slot.Database != sv.Database || slot.WALStatus == "lost":
		return nil, "the replication slot " + c.Slot + " was not taken along", nil
	case slot.ConfirmedFlush < head.EndLSN || begins > upgradedSlotBytes || slot.ConfirmedFlush-slot.Restart > upgradedSlotBytes:
		return nil, "the replication slot " + c.Slot + " is not where pg_upgrade makes it: it is another one, or was moved", nil
	}
	// Whatever is altered after the slot was made has another version.
	var altered []string
	rows, err := conn.Query(ctx, `
		SELECT DISTINCT what FROM (
			SELECT a.attrelid::regclass::text, a.xmin FROM pg_attribute a WHERE a.attnum > 0 AND a.attrelid = ANY ($1::bigint[]::oid[])
			UNION ALL SELECT i.indrelid::regclass::text, i.xmin FROM pg_index i WHERE (i.indisprimary OR i.indisreplident) AND i.indrelid = ANY ($1::bigint[]::oid[])
			UNION ALL SELECT 'publication ' || p.pubname, p.xmin FROM pg_publication p WHERE p.pubname IN ($2, $3)
			UNION ALL SELECT 'publication ' || p.pubname, r.xmin FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid WHERE p.pubname IN ($2, $3)
		) x(what, version) WHERE age(version) <= (SELECT age(catalog_xmin) FROM pg_replication_slots WHERE slot_name = $4) ORDER BY 1`, bigints(oidsOf(captured)), c.Publication, c.InsertPublication(), c.Slot)
	if err == nil {
		altered, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil {
		return nil, "", fmt.Errorf("look at the captured tables: %w", err)
	}
	if len(altered) > 0 {
		return nil, strings.Join(altered[:min(len(altered), 5)], ", ") + " was altered since the upgrade, or the slot is older than that", nil
	}
	now, err := catalogues(ctx, conn, oidsOf(captured))
	if err != nil {
		return nil, "", err
	}
	published, err := c.publications(ctx, conn, 0)
	if err != nil {
		return nil, "", err
	}
	for _, t := range captured {
		if t.Dropped {
			continue
		}
		is, was := now[t.OID], parseCatalogue(t.Catalogue)
		if is == nil || !is.upgradeOf(&was) {
			return nil, t.String() + " is not the table that it was", nil
		}
		if t.Published = published.of(c, t.OID, t.InsertOnly); t.Published == "" {
			return nil, t.String() + " is not published any more", nil
		}
		t.Catalogue = is.String()
		tables = append(tables, t)
	}
	for i := range tables {
		if older, err := olderRows(ctx, conn, &tables[i]); err != nil || older {
			return tables, "", err
		}
	}
	return nil, "no row of the captured tables that can be read is older than its table: they were copied, and not taken over by pg_upgrade", nil
}

// olderRows tells whether a table has a row that was written before the table was made: only pg_upgrade does that, which makes the tables anew and takes over
// the files. A dump that was restored can have the same OIDs. The description of a system column is never altered.
func olderRows(ctx context.Context, conn *pgx.Conn, t *eventlog.Captured) (older bool, err error) {
	err = conn.QueryRow(ctx, `SELECT has_table_privilege($1::bigint::oid, 'SELECT') AND NOT row_security_active($1::bigint::oid)`, int64(t.OID)).Scan(&older)
	if err == nil && older {
		err = conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM (SELECT xmin AS version FROM ONLY `+eventlog.QuoteQualified(t.Schema, t.Name)+` LIMIT 10000) r
			WHERE r.version::text::bigint >= 3 AND age(r.version) > (SELECT age(a.xmin) FROM pg_attribute a WHERE a.attrelid = $1::bigint::oid AND a.attnum = -1))`, int64(t.OID)).Scan(&older)
	}
	if err != nil {
		return false, fmt.Errorf("look how old the rows of %s are: %w", t, err)
	}
	return older, nil
}

// upgradeOf tells whether a table is what it was, but for the versions of its rows in the catalogue.
func (c *catalogue) upgradeOf(was *catalogue) bool {
	return c.File == was.File && c.Name == was.Name && c.Root == was.Root && withoutVersions(c.Attributes) == withoutVersions(was.Attributes) && slices.Equal(c.Types, was.Types)
}

// withoutVersions takes the versions out of catalogue.Attributes.
func withoutVersions(attributes string) string {
	list := strings.Fields(attributes)
	for i, a := range list {
		f := strings.Split(a, ":")
		if len(f) > 1 {
			list[i] = strings.Join(append(f[:1:1], f[2:]...), ":")
		}
	}
	return strings.Join(list, " ")
}
