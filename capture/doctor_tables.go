package capture

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

const shortLock = "an exclusive lock for a moment (SET lock_timeout = '2s' first, lest the application wait behind it)"

// selectedTables looks at the tables that the configuration selects, and at what is captured besides.
func (x *examination) selectedTables(ctx context.Context) (err error) {
	if x.tables, err = x.Config.tables(ctx, x.conn); err != nil {
		return err
	}
	identities, err := x.identities(ctx)
	if err != nil {
		return err
	}
	now, err := x.publications(ctx, x.conn, 0)
	if err != nil {
		return err
	}
	x.begun = now.names[x.Publication] != "" // before init, nothing is captured, and that is said once
	for _, t := range x.tables {
		if id, ok := identities[t.OID]; ok {
			what := "only inserts of %s are captured: %s"
			if !t.Published && !t.Inserts {
				what = "only inserts of %s can be captured: %s"
			}
			f := Finding{Check: "inserts-only", Severity: Warning, What: fmt.Sprintf(what, t, t.Why),
				Risk: "what its updates and deletes have made of its rows is found later, by comparing them with the log; who made them, and when, is lost", Remedy: t.Remedy, Cost: shortLock}
			if f.SQL = id.sql(t); f.SQL != "" {
				f.Remedy = "then backstory init"
			}
			if strings.HasSuffix(f.SQL, " FULL;") {
				f.Remedy += ", which with --replica-identity-full does both and gives up the lock after 2 s; or instead, give it a primary key"
				f.Cost += "; from then on, the whole old row in the WAL of every UPDATE and DELETE, which a primary key saves"
			}
			x.add(f)
		}
		switch {
		case t.Published || !x.begun:
		default:
			f := Finding{Check: "not-captured", Severity: Warning, What: fmt.Sprintf("%s is not captured", t), Risk: "its changes are not in the log", Remedy: "backstory init", Cost: "its rows are read once, and its events take room in the log"}
			if t.Inserts {
				f.Check, f.What, f.Risk = "inserts-only", fmt.Sprintf("only inserts of %s are captured, through its schema", t), "its updates and deletes are not in the log"
				f.Cost = comparedOnce
			}
			if !t.Owned {
				f.SQL = strings.Join(x.PublishSQL(x.sv.Role, []*Table{t}), " ")
				f.Remedy = "as a superuser, or the owner of both; then backstory init"
			}
			x.add(f)
		}
		if !t.InsertOnly && now.of(x.Config, t.OID, true) != "" {
			x.add(Finding{Check: "inserts-only", Severity: Warning, What: fmt.Sprintf("only inserts of %s are captured, though it has a usable key by now", t),
				Risk: "its updates and deletes are not in the log", Remedy: "backstory init", Cost: comparedOnce})
		}
	}
	all, err := x.tableNames(ctx, x.conn)
	if err != nil {
		return err
	}
	x.found = append(x.found, x.unmatched(all)...)
	for _, o := range x.outsideSchemas(all) {
		have := fmt.Sprintf("%d tables", o.Tables)
		if o.Tables == 1 {
			have = "a table"
		}
		x.add(Finding{Check: "schema-left-out", Severity: Info, What: fmt.Sprintf("schema %s has %s that BACKSTORY_TABLES leaves out", o.Schema, have), Risk: "changes there are not in the log",
			Remedy: "BACKSTORY_TABLES=" + TakingIn(x.Tables, []Outside{o}) + ", then backstory init; or, if that is meant, BACKSTORY_EXCLUDE=" + o.Schema + ".*, and this is not said again", Cost: "events of those tables take room in the log"})
	}
	for _, t := range all {
		if t.published && !x.selected(&t.Relation) {
			x.add(Finding{Check: "captured-besides", Severity: Warning, What: fmt.Sprintf("%s is captured, though BACKSTORY_TABLES and BACKSTORY_EXCLUDE leave it out", t),
				Risk: "its changes reach the log and the reactors: what is captured changes with backstory init alone", Remedy: "backstory init", Cost: "its history ends there; captured again, the log has a gap of it"})
		}
	}
	return nil
}

// usable is an identity, and an index that could be one.
type usable struct {
	identity
	index   string // quoted; empty: there is none
	primary bool
}

// identities are those of the selected tables of which only inserts can be captured. An index is usable if it is unique, NOT NULL, complete, not
// deferrable, and in the stream (PostgreSQL manual, ALTER TABLE, REPLICA IDENTITY).
func (x *examination) identities(ctx context.Context) (map[uint32]*usable, error) {
	var oids []uint32
	for _, t := range x.tables {
		if t.InsertOnly {
			oids = append(oids, t.OID)
		}
	}
	out := map[uint32]*usable{}
	rows, err := x.conn.Query(ctx, `SELECT c.oid::bigint, coalesce(u.name, ''), coalesce(u.indisprimary, false), `+identityColumns+`
		FROM pg_class c LEFT JOIN LATERAL (
		  SELECT quote_ident(n.relname) AS name, i.indisprimary FROM pg_index i JOIN pg_class n ON n.oid = i.indexrelid
		  WHERE i.indrelid = c.oid AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
		    AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]) AND (NOT a.attnotnull OR a.attgenerated <> ''))
		  ORDER BY NOT i.indisprimary, i.indnkeyatts, n.relname LIMIT 1) u ON true
		WHERE c.oid::bigint = ANY ($1)`, bigints(oids))
	if err != nil {
		return nil, fmt.Errorf("look for keys of tables without one: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var oid int64
		u := &usable{}
		if err := rows.Scan(append([]any{&oid, &u.index, &u.primary}, u.scan()...)...); err != nil {
			return nil, fmt.Errorf("look for keys of tables without one: %w", err)
		}
		out[uint32(oid)] = u
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("look for keys of tables without one: %w", err)
	}
	return out, nil
}

// sql lets updates and deletes of the table be published; "" where it takes another key.
func (u *usable) sql(t *Table) string {
	alter := "ALTER TABLE " + eventlog.QuoteQualified(t.Schema, t.Name) + " REPLICA IDENTITY "
	switch {
	case u.primary:
		return alter + "DEFAULT;"
	case u.index != "":
		return alter + "USING INDEX " + u.index + ";"
	case u.generated && u.version >= 180000: // FULL would not help
		return ""
	}
	return alter + "FULL;"
}

// reading looks whether the role may read the existing rows.
func (x *examination) reading(ctx context.Context) error {
	var oids []uint32
	for _, t := range x.tables {
		if t.Published || !x.begun || t.Owned { // with others, that comes with being captured at all
			oids = append(oids, t.OID)
		}
	}
	rows, err := x.conn.Query(ctx, `SELECT n.nspname::text, c.relname::text, has_schema_privilege(n.oid, 'USAGE'), has_table_privilege(c.oid, 'SELECT'), row_security_active(c.oid)
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid::bigint = ANY ($1) ORDER BY 1, 2`, bigints(oids))
	if err != nil {
		return fmt.Errorf("look at the rights to read: %w", err)
	}
	role := eventlog.QuoteIdent(x.sv.Role)
	const risk = "its changes are captured in full, but rows that existed before are not, nor can they be compared after a gap or ALTER TABLE"
	var schema, table string
	var use, read, secured bool
	_, err = pgx.ForEachRow(rows, []any{&schema, &table, &use, &read, &secured}, func() error {
		if !use || !read {
			sql := "GRANT SELECT ON TABLE " + eventlog.QuoteQualified(schema, table) + " TO " + role + ";"
			if !use {
				sql = "GRANT USAGE ON SCHEMA " + eventlog.QuoteIdent(schema) + " TO " + role + "; " + sql
			}
			x.add(Finding{Check: "may-not-read", Severity: Warning, What: fmt.Sprintf("role %s may not read the existing rows of %s.%s", x.sv.Role, schema, table), Risk: risk,
				SQL: sql, Cost: "none: it sees their changes anyway"})
		}
		if secured {
			x.add(Finding{Check: "row-security", Severity: Warning, What: fmt.Sprintf("row-level security hides rows of %s.%s from role %s", schema, table, x.sv.Role), Risk: risk,
				SQL: "ALTER ROLE " + role + " BYPASSRLS;", Remedy: "as a superuser", Cost: "the role sees all rows; it sees their changes anyway"})
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("look at the rights to read: %w", err)
	}
	return nil
}

// outside looks for what the configuration seems to select, but no WAL tells of.
func (x *examination) outside(ctx context.Context) error {
	rows, err := x.conn.Query(ctx, `SELECT n.nspname::text, c.relname::text, `+root+`, c.relkind = 'f' FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE (c.relkind = 'r' AND c.relpersistence = 'u' OR c.relkind = 'f' AND c.relispartition) AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'backstory')
		  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e') ORDER BY 1, 2`)
	if err != nil {
		return fmt.Errorf("list unlogged and foreign tables: %w", err)
	}
	var r eventlog.Relation
	var foreign bool
	_, err = pgx.ForEachRow(rows, []any{&r.Schema, &r.Name, &r.RootSchema, &r.RootName, &foreign}, func() error {
		if !x.selected(&r) {
			return nil
		}
		f := Finding{Check: "unlogged", Severity: Info, What: r.Own() + " is unlogged", Risk: "its rows and their changes are not in the log, and gone after a crash of the source",
			SQL: "ALTER TABLE " + eventlog.QuoteQualified(r.Schema, r.Name) + " SET LOGGED;", Remedy: "then backstory init; or leave it out with BACKSTORY_EXCLUDE", Cost: "it is written anew, and into the WAL, under an exclusive lock"}
		if foreign {
			f = Finding{Check: "foreign-partition", Risk: "its rows and their changes are not in the log", Remedy: "capture the server that it lies on", Cost: "another sidecar, and another log"}
		}
		if r.RootName != "" {
			f.Severity = Warning
			f.What = fmt.Sprintf("%s, a partition of %s.%s, is %s", r.Own(), r.RootSchema, r.RootName, map[bool]string{false: "unlogged", true: "a foreign table"}[foreign])
		}
		x.add(f)
		return nil
	})
	if err != nil {
		return fmt.Errorf("list unlogged and foreign tables: %w", err)
	}
	var large bool
	if err := x.conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_largeobject_metadata)`).Scan(&large); err != nil {
		return fmt.Errorf("look for large objects: %w", err)
	}
	if large {
		x.add(Finding{Check: "large-objects", Severity: Info, What: "the database has large objects", Risk: "of those, the log has only the numbers that rows refer to them by: logical decoding leaves out what they hold",
			Remedy: "keep such values in columns of type bytea", Cost: "a change of the application"})
	}
	return nil
}

// altering looks whether the role may make the publications, or, once they are made, alter them and the tables in them.
func (x *examination) altering(ctx context.Context) error {
	role := eventlog.QuoteIdent(x.sv.Role)
	var create, super bool
	var foreign, tables, owners []string
	err := x.conn.QueryRow(ctx, `WITH pub AS (SELECT oid, pubname::text AS name, pubowner AS owner FROM pg_publication WHERE pubname IN ($1, $2)),
		tab AS (SELECT DISTINCT c.relowner AS owner FROM pub JOIN pg_publication_rel r ON r.prpubid = pub.oid JOIN pg_class c ON c.oid = r.prrelid),
		other AS (SELECT oid, rolname::text AS name, rolsuper FROM pg_roles WHERE oid IN (SELECT owner FROM pub UNION SELECT owner FROM tab) AND NOT pg_has_role(oid, 'USAGE'))
		SELECT has_database_privilege(current_database(), 'CREATE'), ARRAY(SELECT name FROM pub WHERE owner IN (SELECT oid FROM other) ORDER BY 1),
		ARRAY(SELECT name FROM other WHERE oid IN (SELECT owner FROM tab) ORDER BY 1), ARRAY(SELECT name FROM other ORDER BY 1), EXISTS (SELECT FROM other WHERE rolsuper)`, x.Publication, x.InsertPublication()).
		Scan(&create, &foreign, &tables, &owners, &super)
	if err != nil {
		return fmt.Errorf("look at the rights to alter: %w", err)
	}
	now, err := x.publications(ctx, x.conn, 0)
	if err != nil {
		return err
	}
	if len(now.names) == 0 && !create {
		x.add(Finding{Check: "may-not-create", Severity: Danger, What: fmt.Sprintf("role %s may not make publications in database %s", x.sv.Role, x.sv.Database), Risk: "backstory init cannot set up",
			SQL: "GRANT CREATE ON DATABASE " + eventlog.QuoteIdent(x.sv.Database) + " TO " + role + ";", Remedy: "or let a superuser run what backstory init --print-sql prints", Cost: "the role may make schemas and publications"})
	}
	if len(owners) == 0 {
		return nil
	}
	var sql, what []string
	if len(foreign) > 0 {
		what = append(what, "the publications "+strings.Join(foreign, ", "))
	}
	if len(tables) > 0 {
		what = append(what, "the tables of "+Some(tables))
	}
	for _, o := range owners {
		sql = append(sql, "GRANT "+eventlog.QuoteIdent(o)+" TO "+role+";")
	}
	f := Finding{Check: "may-not-alter", Severity: Warning, What: fmt.Sprintf("role %s may not alter %s", x.sv.Role, strings.Join(what, " and ")),
		Risk: "the sidecar takes in no table that is made later; and where a table loses its key, the application's UPDATEs and DELETEs of it fail until somebody takes it out of the publication",
		SQL:  strings.Join(sql, " "), Remedy: "as a superuser", Cost: "the role may do what the tables' owner may"}
	if super { // whose rights nobody should be given for that; and ALTER PUBLICATION … OWNER would be a gap
		f.SQL, f.Remedy = "", "give tables to a role of the application's, of which the sidecar's is a member; let that own the publications before backstory init"
	}
	x.add(f)
	return nil
}

// published looks for tables whose updates and deletes Postgres refuses, because they are published.
func (x *examination) published(ctx context.Context) error {
	refused, err := x.refused(ctx, x.conn)
	if err != nil {
		return err
	}
	for _, t := range refused {
		x.add(Finding{Check: "updates-refused", Severity: Danger, What: fmt.Sprintf("Postgres refuses the application's UPDATEs and DELETEs of %s: it is published, and %s", t.name, t.why),
			Risk: "the application fails", SQL: x.moveAtOnce(t), Cost: "its updates and deletes are not in the log any more, and the log says so; a sidecar that runs does this by itself if it owns table and publications"})
	}
	return nil
}

// publication looks how our publications are set, and for others that get in our way.
func (x *examination) publication(ctx context.Context) error {
	rows, err := x.conn.Query(ctx, `SELECT pubname::text, puballtables, pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot, coalesce(to_jsonb(p) ->> 'pubgencols', 'n') <> 'n' FROM pg_publication p WHERE puballtables OR pubname IN ($1, $2) ORDER BY 1`, x.Publication, x.InsertPublication())
	if err != nil {
		return fmt.Errorf("look at the publications: %w", err)
	}
	var name string
	var all, ins, upd, del, trunc, viaRoot, generated bool
	_, err = pgx.ForEachRow(rows, []any{&name, &all, &ins, &upd, &del, &trunc, &viaRoot, &generated}, func() error {
		whole, publish := name == x.Publication, "insert, truncate"
		if whole {
			publish = "insert, update, delete, truncate"
		}
		ours := whole || name == x.InsertPublication()
		set := func(f Finding, options string) {
			f.Severity, f.SQL = Danger, "ALTER PUBLICATION "+eventlog.QuoteIdent(name)+" SET ("+options+");"
			f.Cost = "none; changes of before stay missing"
			x.add(f)
		}
		switch {
		case all && ours:
			x.add(Finding{Check: "publication-of-all", Severity: Danger, What: "publication " + name + " is FOR ALL TABLES", Risk: "the application's UPDATEs and DELETEs of tables without a key fail, and the log's own tables are published",
				SQL: "DROP PUBLICATION " + eventlog.QuoteIdent(name) + ";", Remedy: "then backstory init; or another name with BACKSTORY_PUBLICATION", Cost: "whoever subscribes to it gets nothing"})
		case all:
			x.add(Finding{Check: AllTables, Severity: Warning, What: "publication " + name + " is FOR ALL TABLES",
				Risk: "with the log in this database, its tables are published too, and UPDATEs of its bookkeeping reach that subscriber", Remedy: "keep the log in another database: BACKSTORY_LOG_URL", Cost: "the log begins anew there"})
		case !ins || !trunc || whole && (!upd || !del):
			set(Finding{Check: "publication-options", What: fmt.Sprintf("publication %s does not publish everything that it should", name), Risk: "changes are missing from the log"}, "publish = '"+publish+"'")
		case !whole && (upd || del):
			set(Finding{Check: "publication-options", What: fmt.Sprintf("publication %s publishes updates and deletes", name), Risk: "the application's UPDATEs and DELETEs of its tables fail: they have no usable key"}, "publish = '"+publish+"'")
		}
		if ours && viaRoot {
			set(Finding{Check: "publication-options", What: fmt.Sprintf("publication %s has publish_via_partition_root", name), Risk: "the log does not learn which partition a row is in, nor of a partition's TRUNCATE"}, "publish_via_partition_root = false")
		}
		if ours && generated { // PostgreSQL 18
			set(Finding{Check: "publication-options", What: fmt.Sprintf("publication %s has publish_generated_columns", name), Risk: "the log takes tables with generated columns for altered, time and again"}, "publish_generated_columns = none")
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("look at the publications: %w", err)
	}
	return x.narrowedMembers(ctx)
}

// comparedOnce is what it costs to capture updates and deletes, too.
const comparedOnce = "its rows are compared with the log's once"

// AllTables is the check that finds publications FOR ALL TABLES, which matter where the log is in the source's database.
const AllTables = "publication-all-tables"

// narrowedMembers looks for tables of which less is published than everything, and for whole schemas (PostgreSQL 15 and later).
func (x *examination) narrowedMembers(ctx context.Context) error {
	if x.sv.Version < 150000 {
		return nil
	}
	rows, err := x.conn.Query(ctx, `SELECT p.pubname::text, n.nspname::text, c.relname::text, r.prqual IS NOT NULL, r.prattrs IS NOT NULL FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
		JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname IN ($1, $2) AND (r.prqual IS NOT NULL OR r.prattrs IS NOT NULL) ORDER BY 1, 2, 3`, x.Publication, x.InsertPublication())
	if err != nil {
		return fmt.Errorf("look at the publications: %w", err)
	}
	var name, schema, table string
	var filter, list bool
	_, err = pgx.ForEachRow(rows, []any{&name, &schema, &table, &filter, &list}, func() error {
		var has []string
		if filter {
			has = append(has, "some rows")
		}
		if list {
			has = append(has, "some columns")
		}
		p, t := eventlog.QuoteIdent(name), only(schema, table)
		x.add(Finding{Check: "publication-part", Severity: Danger, What: fmt.Sprintf("publication %s has only %s of %s.%s", name, strings.Join(has, " and "), schema, table), Risk: "the others are missing from the log",
			SQL: "BEGIN; ALTER PUBLICATION " + p + " DROP TABLE " + t + "; ALTER PUBLICATION " + p + " ADD TABLE " + t + "; COMMIT;", Cost: "what was left out stays missing: a gap"})
		return nil
	})
	if err != nil {
		return fmt.Errorf("look at the publications: %w", err)
	}
	rows, err = x.conn.Query(ctx, `SELECT n.nspname::text FROM pg_publication p JOIN pg_publication_namespace s ON s.pnpubid = p.oid JOIN pg_namespace n ON n.oid = s.pnnspid WHERE p.pubname = $1 ORDER BY 1`, x.Publication)
	if err != nil {
		return fmt.Errorf("look at the publications: %w", err)
	}
	schemas, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("look at the publications: %w", err)
	}
	for _, s := range slices.Compact(schemas) {
		x.add(Finding{Check: "publication-schema", Severity: Danger, What: fmt.Sprintf("publication %s has all tables of schema %s", x.Publication, s), Risk: "the application's UPDATEs and DELETEs of tables there without a key fail, and of those that are made later",
			SQL: "ALTER PUBLICATION " + eventlog.QuoteIdent(x.Publication) + " DROP TABLES IN SCHEMA " + eventlog.QuoteIdent(s) + ";", Remedy: "then backstory init, which adds its tables one by one", Cost: "changes of tables that were captured through the schema alone are missing until then"})
	}
	return nil
}
