package capture

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// Table is what the catalogue says of a table that could be captured.
type Table struct {
	*eventlog.Relation
	Rows  int64 // estimate
	Bytes int64 // with TOAST, without indexes
	// Why tells why updates and deletes of the table cannot be published without harm to the application; empty if they can.
	Why string
	// Remedy is what would let them be published.
	Remedy    string
	RLS       bool // row security is on
	Owned     bool // we may add it to a publication
	Owner     string
	Published bool // it is in one of our publications already
	Inserts   bool // it is in that of inserts, perhaps through its schema
	// ToFull tells that the plan is to give it REPLICA IDENTITY FULL (Config.FullIdentity).
	ToFull bool
	// PerDay is what the server counted; Prepare asks.
	PerDay Activity

	catalogue string // see alter.go
}

// String gives its own name, not that of the partitioned table that it may belong to.
func (t *Table) String() string { return t.Own() }

// Activity counts row changes of a day: the average since the server's statistics began. 0: none, or not known.
type Activity struct{ Inserted, Updated, Deleted int64 }

// Changes counts them all.
func (a Activity) Changes() int64 { return a.Inserted + a.Updated + a.Deleted }

// RowBytes is about what a row of the table takes; 100 where there are too few to tell.
func (t *Table) RowBytes() int64 {
	if t.Rows < 100 {
		return 100
	}
	return t.Bytes / t.Rows
}

// identityColumns are what insertOnly needs to know of a table c, in the order of identity.scan. A published table whose UPDATE or
// DELETE Postgres would refuse must not be in a publication that publishes them (PostgreSQL manual, Logical Replication,
// Publication, and ALTER TABLE … REPLICA IDENTITY).
const identityColumns = `c.relreplident::text,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary),
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid),
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident AND i.indimmediate AND i.indisvalid),
       EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> ''),
       EXISTS (SELECT FROM pg_index i, pg_attribute a WHERE i.indrelid = c.oid AND a.attrelid = c.oid AND a.attgenerated <> ''
         AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]) AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END),
       current_setting('server_version_num')::int`

// identity is how Postgres would tell the rows of a table apart in the stream.
type identity struct {
	kind                                                    string // pg_class.relreplident
	hasKey, keyUsable, indexUsable, generated, generatedKey bool
	version                                                 int
}

func (i *identity) scan() []any {
	return []any{&i.kind, &i.hasKey, &i.keyUsable, &i.indexUsable, &i.generated, &i.generatedKey, &i.version}
}

// insertOnly tells why Postgres would refuse UPDATE and DELETE on the table if they were published; "" if it would not.
func (i *identity) insertOnly() string {
	switch i.kind {
	case "d":
		switch {
		case !i.hasKey:
			return "it has no primary key"
		case !i.keyUsable:
			return "its primary key is deferrable"
		case i.generatedKey: // which is not in the stream
			return "its primary key has a generated column"
		}
	case "i":
		switch {
		case !i.indexUsable:
			return "the index of its replica identity is gone"
		case i.generatedKey:
			return "its replica identity has a generated column"
		}
	case "n":
		return "its replica identity is NOTHING"
	case "f":
		if i.generated && i.version >= 180000 {
			return "it has generated columns and REPLICA IDENTITY FULL"
		}
	}
	return ""
}

// remedy tells what would let updates and deletes of the table be published.
func (i *identity) remedy(schema, table string) string {
	q := eventlog.QuoteQualified(schema, table)
	switch {
	case i.kind != "d" && i.keyUsable:
		return "ALTER TABLE " + q + " REPLICA IDENTITY DEFAULT; then backstory init"
	case i.generated && i.version >= 180000: // FULL would not help
		return "give it a primary key without generated columns, and REPLICA IDENTITY DEFAULT; then backstory init"
	}
	return "give it a primary key (not deferrable, no generated column), then backstory init; or backstory init --replica-identity-full '" + schema + "." + table + "'"
}

// capturable are ordinary tables (partitions are published as leaves) that could be captured.
const capturable = `FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'backstory')
  AND n.nspname NOT LIKE 'pg\_toast%' AND n.nspname NOT LIKE 'pg\_temp%'
  AND NOT coalesce(starts_with(obj_description(c.oid, 'pg_class'), '` + eventlog.CheckoutMark + `'), false)
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')`

// published tells whether a table c is in one of our publications by name: that it is there through its schema is not the work of
// init.
const published = `EXISTS (SELECT FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid WHERE p.pubname IN ($1, $2) AND r.prrelid = c.oid)`

// root are the schema and name of the partitioned table that a table c is a part of, at whatever depth, or empty.
const root = `coalesce((SELECT rn.nspname FROM pg_class rc JOIN pg_namespace rn ON rn.oid = rc.relnamespace WHERE c.relispartition AND rc.oid = pg_partition_root(c.oid)), ''),
       coalesce((SELECT rc.relname FROM pg_class rc WHERE c.relispartition AND rc.oid = pg_partition_root(c.oid)), '')`

// estimatedRows is about how many rows a table c has.
const estimatedRows = `CASE WHEN c.reltuples >= 0 THEN c.reltuples::bigint ELSE coalesce(nullif(pg_stat_get_live_tuples(c.oid), 0), pg_relation_size(c.oid) / 100) END`

// tablesQuery lists what could be captured.
const tablesQuery = `
SELECT c.oid::bigint, n.nspname, c.relname, ` + root + `, ` + estimatedRows + `, pg_table_size(c.oid), c.relrowsecurity,
       pg_has_role(c.relowner, 'USAGE'), pg_get_userbyid(c.relowner),
       ` + published + `,
       EXISTS (SELECT FROM pg_publication_tables p WHERE p.pubname = $2 AND p.schemaname = n.nspname AND p.tablename = c.relname),
       ` + identityColumns + `
` + capturable + `
ORDER BY n.nspname, c.relname`

// tables lists the tables that the configuration selects.
func (c Config) tables(ctx context.Context, q *pgx.Conn) ([]*Table, error) {
	rows, err := q.Query(ctx, tablesQuery, c.Publication, c.InsertPublication())
	if err != nil {
		return nil, fmt.Errorf("list the source's tables: %w", err)
	}
	defer rows.Close()
	var out []*Table
	for rows.Next() {
		t := &Table{Relation: &eventlog.Relation{}}
		var oid int64
		var id identity
		if err := rows.Scan(append([]any{&oid, &t.Schema, &t.Name, &t.RootSchema, &t.RootName, &t.Rows, &t.Bytes, &t.RLS, &t.Owned, &t.Owner, &t.Published, &t.Inserts}, id.scan()...)...); err != nil {
			return nil, fmt.Errorf("list the source's tables: %w", err)
		}
		if !c.selected(t.Relation) {
			continue
		}
		t.OID = uint32(oid)
		if t.ToFull = id.kind != "f" && matchAny(c.FullIdentity, t.Relation); t.ToFull {
			id.kind = "f"
		}
		t.ReplicaIdentity, t.Why = id.kind[0], id.insertOnly()
		if t.InsertOnly = t.Why != ""; t.InsertOnly {
			t.Remedy = id.remedy(t.Schema, t.Name)
		}
		out = append(out, t)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("list the source's tables: %w", err)
	}
	var oids []uint32
	for _, t := range out {
		oids = append(oids, t.OID)
	}
	catalogues, err := catalogues(ctx, q, oids) // before the rest: what changes meanwhile is found later
	if err != nil {
		return nil, err
	}
	for _, t := range out {
		t.catalogue = catalogues[t.OID].String()
		if err := describe(ctx, q, t.Relation, nil, 0); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// errGone means that the catalogue does not have the table any more.
var errGone = errors.New("the table is gone from the catalogue")

// queryer is a connection or a transaction.
type queryer interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// describedColumns gives what has to be known of each column of a table: oid is an expression for its OID, xid for the transaction that
// the stream is at, or 0. It is asked of the catalogue as it is, or, by an event trigger, as it is in the middle of a transaction (ddl.go).
func describedColumns(oid, xid string) string {
	return strings.NewReplacer("$oid", oid, "$xid", xid).Replace(`
		SELECT a.attname AS name, a.attnum AS num, coalesce((SELECT p.attnum FROM pg_attribute p WHERE c.relispartition AND p.attrelid = pg_partition_root(c.oid) AND p.attname = a.attname), 0) AS root, CASE WHEN a.atthasmissing THEN a.attmissingval::text ELSE '' END AS missing, $xid <> 0 AND age(a.xmin) BETWEEN 0 AND age($xid::text::xid) - 1 AS newer, $xid <> 0 AND age(a.xmin) = age($xid::text::xid) AS own,
		       a.atttypid::bigint AS type, format_type(a.atttypid, a.atttypmod) AS type_name, a.attnotnull AS not_null, r.schema AS root_schema, r.name AS root_name, CASE WHEN c.relispartition THEN pg_partition_root(c.oid)::oid::bigint ELSE 0 END AS root_oid,
		       a.attgenerated <> '' AS generated, coalesce((SELECT pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d WHERE d.adrelid = a.attrelid AND d.adnum = a.attnum AND a.attgenerated <> ''), '') AS expression,
		       b.base::bigint, b.elem::bigint, b.elembase::bigint, b.delim::text, b.category::text,
		       coalesce((SELECT k.ord FROM pg_index i, unnest(i.indkey) WITH ORDINALITY k(num, ord)
		         WHERE i.indrelid = a.attrelid AND i.indisprimary AND k.ord <= i.indnkeyatts AND k.num = a.attnum), 0) AS key,
		       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisprimary AND NOT i.indimmediate) AS deferrable,
		       c.relreplident = 'f' OR EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1])
		         AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END) AS identity
		FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
		CROSS JOIN LATERAL (SELECT ` + root + `) r(schema, name)
		CROSS JOIN LATERAL (
		  WITH RECURSIVE base(oid) AS (
		    SELECT a.atttypid UNION ALL SELECT t.typbasetype FROM base JOIN pg_type t ON t.oid = base.oid WHERE t.typtype = 'd'
		  ), b AS (SELECT t.* FROM base JOIN pg_type t ON t.oid = base.oid WHERE t.typtype <> 'd'),
		  el(oid) AS (
		    SELECT b.typelem FROM b WHERE b.typelem <> 0 UNION ALL SELECT t.typbasetype FROM el JOIN pg_type t ON t.oid = el.oid WHERE t.typtype = 'd'
		  )
		  SELECT b.oid AS base, CASE WHEN b.typcategory = 'A' THEN b.typelem ELSE 0 END AS elem,
		         coalesce((SELECT t.oid FROM el JOIN pg_type t ON t.oid = el.oid WHERE t.typtype <> 'd'), 0) AS elembase,
		         coalesce((SELECT t.typdelim FROM pg_type t WHERE t.oid = b.typelem), ',') AS delim, b.typcategory AS category
		  FROM b
		) b
		WHERE a.attrelid = $oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum`)
}

// describedColumn is a row of describedColumns.
type describedColumn struct {
	Name       string
	Num        int16
	Root       int16
	Missing    string
	Newer      bool
	Own        bool // it is as that transaction itself has left it
	Type       uint32
	TypeName   string `json:"type_name"`
	NotNull    bool   `json:"not_null"`
	RootSchema string `json:"root_schema"`
	RootName   string `json:"root_name"`
	RootOID    uint32 `json:"root_oid"`
	Generated  bool
	Expression string
	Base       uint32
	Elem       uint32
	ElemBase   uint32
	Delim      string
	Category   string
	Key        int // its place in the primary key, from 1 on
	Deferrable bool
	Identity   bool
}

// describe fills in what the catalogue says of a relation: its columns (or, if the stream named them, their types), and
// its key. The catalogue may be newer than the stream, which is at transaction xid: columns that it does not have any more are read as
// text, and of those that were changed since it is not known which ones they are.
func describe(ctx context.Context, q queryer, r *eventlog.Relation, stream []relationColumn, xid uint32) error {
	rows, err := q.Query(ctx, "SELECT coalesce(json_agg(d), '[]')::text FROM ("+describedColumns("$1::bigint::oid", "$2::bigint")+") d", int64(r.OID), int64(xid))
	if err != nil {
		return fmt.Errorf("read the columns of %s: %w", r, err)
	}
	text, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[string])
	var columns []describedColumn
	if err == nil {
		err = json.Unmarshal([]byte(text), &columns)
	}
	if err != nil {
		return fmt.Errorf("read the columns of %s: %w", r, err)
	}
	if len(columns) == 0 && stream != nil {
		return errGone
	}
	fillIn(r, columns, stream)
	return nil
}

// fillIn completes a relation by its columns.
func fillIn(r *eventlog.Relation, columns []describedColumn, stream []relationColumn) {
	byName := map[string]eventlog.Column{}
	keyOrder := map[string]int{}
	var order []string
	expressions := map[string]string{} // of generated columns
	// What has the same columns in the same places is after everything that its transaction has done to them.
	asNow := sameColumns(columns, stream)
	for _, d := range columns {
		r.RootOID, r.RootSchema, r.RootName, r.Deferrable = d.RootOID, d.RootSchema, d.RootName, d.Deferrable
		col := eventlog.Column{Name: d.Name, Num: d.Num, Root: d.Root, NotNull: d.NotNull, Generated: d.Generated, Identity: d.Identity, Type: eventlog.Type{OID: d.Type, Name: d.TypeName}}
		t := &col.Type
		if known, ok := eventlog.TypeKind(d.Base); ok {
			t.Kind, t.Array, t.Delim = known.Kind, known.Array, known.Delim
		} else if d.Elem != 0 && d.Category == "A" {
			t.Array = true
			if known, ok := eventlog.TypeKind(d.ElemBase); ok && !known.Array {
				t.Kind = known.Kind
			}
			if d.Delim != "," && d.Delim != "" {
				t.Delim = d.Delim[0]
			}
		}
		if d.Own && !asNow {
			r.Lately = append(r.Lately, d.Num)
		}
		switch {
		case d.Newer:
			col.Num, col.Root = 0, 0
		case d.Missing != "":
			col.Missing = string(eventlog.AppendJSON(nil, t, oneElement(d.Missing)))
		}
		byName[col.Name], expressions[col.Name] = col, d.Expression
		if d.Key > 0 {
			keyOrder[col.Name] = d.Key
		}
		order = append(order, col.Name)
	}
	if stream == nil {
		for _, n := range order {
			if !byName[n].Generated { // not published: the source computes it from the others
				r.Columns = append(r.Columns, byName[n])
			}
		}
	}
	for _, s := range stream {
		col, ok := byName[s.name]
		if known, isKnown := eventlog.TypeKind(s.typeOID); !ok || col.Type.OID != s.typeOID {
			// Renamed, dropped or given another type since: what the stream says is right for these rows.
			col = eventlog.Column{Name: s.name, Type: eventlog.Type{Name: "text"}}
			if isKnown {
				col.Type = known
			} else {
				col.Type.OID = s.typeOID
			}
		}
		col.Identity = s.identity
		r.Columns = append(r.Columns, col)
	}
	for _, d := range columns {
		if stream != nil && !d.Generated && !slices.ContainsFunc(stream, func(s relationColumn) bool { return s.name == d.Name }) {
			r.Beside = append(r.Beside, eventlog.Column{Name: d.Name, Num: d.Num, Type: eventlog.Type{OID: d.Type}})
		}
	}
	before := 0
	for _, n := range order {
		if i := slices.IndexFunc(r.Columns, func(c eventlog.Column) bool { return c.Name == n }); i >= 0 {
			before = i + 1
		} else if byName[n].Generated {
			r.Generated = append(r.Generated, eventlog.Generated{Name: n, Num: byName[n].Num, Root: byName[n].Root, Type: byName[n].Type.Name, Expression: expressions[n], Before: before})
		}
	}
	r.Key = make([]int, len(keyOrder))
	for i, c := range r.Columns {
		if p := keyOrder[c.Name]; p > 0 {
			r.Key[p-1] = i
			keyOrder[c.Name] = -1
		}
	}
	for _, p := range keyOrder {
		if p > 0 { // a key column that the stream does not have: the key is newer than the row
			r.Key = nil
		}
	}
	if stream != nil && r.ReplicaIdentity == 'd' {
		r.Key = streamKey(r)
	}
	if len(r.Key) == 0 && r.ReplicaIdentity == 'i' { // what tells its rows apart in the stream is the best name they have
		r.Key = identityColumnsOf(r)
	}
}

// sameColumns tells whether the stream describes the very columns of a table that the catalogue has.
func sameColumns(columns []describedColumn, stream []relationColumn) bool {
	sent := slices.DeleteFunc(slices.Clone(columns), func(d describedColumn) bool { return d.Generated })
	return slices.EqualFunc(sent, stream, func(d describedColumn, s relationColumn) bool { return d.Name == s.name && d.Type == s.typeOID })
}

// oneElement gives the element of a one-dimensional array that has one, not NULL, as Postgres prints it (PostgreSQL manual, Arrays, Array
// Input and Output Syntax).
func oneElement(array string) []byte {
	s := strings.TrimSuffix(strings.TrimPrefix(array, "{"), "}")
	if !strings.HasPrefix(s, `"`) {
		return []byte(s)
	}
	out := []byte{}
	for i := 1; i < len(s)-1; i++ {
		if s[i] == '\\' {
			i++
		}
		out = append(out, s[i])
	}
	return out
}

// identityColumnsOf are the columns of a table's replica identity.
func identityColumnsOf(r *eventlog.Relation) (key []int) {
	for i, c := range r.Columns {
		if c.Identity {
			key = append(key, i)
		}
	}
	return key
}

// streamKey gives the primary key as it was when the rows were written, where the stream tells: the catalogue may have
// another one by now, or none. Only of the order of its columns the stream knows nothing.
func streamKey(r *eventlog.Relation) []int {
	key := identityColumnsOf(r)
	now := slices.Sorted(slices.Values(r.Key))
	if len(key) == 0 || slices.Equal(key, now) {
		return r.Key
	}
	return key
}

// tableName is a table that could be captured.
type tableName struct {
	eventlog.Relation      // its names alone
	published         bool // in one of our publications, by name
}

func (t tableName) String() string { return t.Own() }

// tableNames lists what could be captured, selected or not.
func (c Config) tableNames(ctx context.Context, q *pgx.Conn) ([]tableName, error) {
	rows, err := q.Query(ctx, `SELECT c.oid::bigint, n.nspname, c.relname, `+root+`, `+published+` `+capturable+` ORDER BY n.nspname, c.relname`, c.Publication, c.InsertPublication())
	if err != nil {
		return nil, fmt.Errorf("list the source's tables: %w", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (t tableName, err error) {
		var oid int64
		err = row.Scan(&oid, &t.Schema, &t.Name, &t.RootSchema, &t.RootName, &t.published)
		t.OID = uint32(oid)
		return t, err
	})
	if err != nil {
		return nil, fmt.Errorf("list the source's tables: %w", err)
	}
	return out, nil
}

// notCaptured lists the tables that the configuration selects and our publications lack: mostly made after init. A role that does
// not own them cannot add them by itself (PostgreSQL manual, ALTER PUBLICATION). inserts are those of them whose inserts are published with their schema.
func (c Config) notCaptured(ctx context.Context, q *pgx.Conn) (out, inserts []string, err error) {
	all, err := c.tableNames(ctx, q)
	if err != nil {
		return nil, nil, err
	}
	var oids []uint32
	for _, t := range all {
		if !t.published && c.selected(&t.Relation) {
			out, oids = append(out, t.String()), append(oids, t.OID)
		}
	}
	if len(out) == 0 {
		return nil, nil, nil // as mostly
	}
	rows, err := q.Query(ctx, `SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		JOIN pg_publication_tables p ON p.pubname = $2 AND p.schemaname = n.nspname AND p.tablename = c.relname WHERE c.oid = ANY ($1::bigint[]::oid[]) ORDER BY 1`, bigints(oids), c.InsertPublication())
	if err == nil {
		inserts, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the publications: %w", err)
	}
	return out, inserts, nil
}

// unmatched are the patterns that match no table, most likely misspelt.
func (c Config) unmatched(all []tableName) (out []Finding) {
	for _, list := range []struct {
		name     string
		patterns []string
		risk     string
	}{
		{"BACKSTORY_TABLES", c.Tables, "what it is meant to select is not captured"},
		{"BACKSTORY_EXCLUDE", c.Exclude, "what it is meant to leave out is captured"},
	} {
		for _, text := range list.patterns {
			p, err := parsePattern(text)
			if err != nil || slices.ContainsFunc(all, func(t tableName) bool { return matchAny([]string{text}, &t.Relation) }) {
				continue
			}
			var there []string // in the schema that it means, if that exists
			for _, t := range all {
				if p.schema.MatchString(t.Schema) {
					there = append(there, t.String())
				}
			}
			have := "there is no table in such a schema"
			if n := len(there); n > 0 {
				have = "there are " + strings.Join(there[:min(n, 12)], ", ")
				if n > 12 {
					have += fmt.Sprintf(" and %d more", n-12)
				}
			}
			remedy := "spell it as Postgres does (capitals count), or leave it out; "
			if strings.Contains(text, `"`) {
				remedy = "names are written without quotes here (capitals count); "
			}
			out = append(out, Finding{Check: "pattern", Severity: Warning, What: fmt.Sprintf("%s: %s matches no table", list.name, text), Risk: list.risk, Remedy: remedy + have, Cost: "none"})
		}
	}
	return out
}

// Outside is a schema of which BACKSTORY_TABLES selects nothing, and how many tables it has that could be captured.
type Outside struct {
	Schema string
	Tables int
}

// outsideSchemas finds them: people who have set nothing may not know of them. What BACKSTORY_EXCLUDE names is left out on purpose, and so is what is left
// out of a schema of which some is selected.
func (c Config) outsideSchemas(all []tableName) (out []Outside) {
	counts := map[string]int{}
	for _, t := range all {
		schema, _ := t.Table()
		n := counts[schema]
		switch {
		case n < 0:
		case matchAny(c.Tables, &t.Relation):
			counts[schema] = -1
		case !matchAny(c.Exclude, &t.Relation):
			counts[schema] = n + 1
		}
	}
	for _, schema := range slices.Sorted(maps.Keys(counts)) {
		if counts[schema] > 0 {
			out = append(out, Outside{schema, counts[schema]})
		}
	}
	return out
}

// TakingIn gives patterns that select other schemas, too.
func TakingIn(patterns []string, schemas []Outside) string {
	list := slices.Clone(patterns)
	for _, o := range schemas {
		list = append(list, o.Schema+".*")
	}
	return strings.Join(list, ",")
}

// bigints gives OIDs in the form in which they go to the server.
func bigints(oids []uint32) []int64 {
	out := make([]int64, len(oids))
	for i, o := range oids {
		out[i] = int64(o)
	}
	return out
}

// Size is about how large a table is.
type Size struct {
	Rows, Bytes int64
	// Changes is how many updates and deletes the source has counted of the table; another text, if there were some since.
	Changes string
}

// countedChanges is that of a table c: how many, and since when, as somebody may reset the statistics, and a crash throws them away, which the last of these
// times tells.
const countedChanges = `concat_ws(' ', pg_stat_get_tuples_updated(c.oid), pg_stat_get_tuples_deleted(c.oid), extract(epoch FROM pg_postmaster_start_time()), extract(epoch FROM pg_stat_get_db_stat_reset_time((SELECT oid FROM pg_database WHERE datname = current_database()))), extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time()))`

// nextXID is above every transaction that has begun. A snapshot's xmax is above those only that have ended; age counts from the next one
// that is to begin.
const nextXID = `(pg_snapshot_xmax(pg_current_snapshot())::text::bigint + age((pg_snapshot_xmax(pg_current_snapshot())::text::bigint & 4294967295)::text::xid))`

// Sizes estimates how large tables are, by OID. next is above every transaction of the source that has begun.
func Sizes(ctx context.Context, c Config, oids []uint32) (sizes map[uint32]Size, next int64, err error) {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := conn.QueryRow(ctx, `SELECT `+nextXID).Scan(&next); err != nil {
		return nil, 0, fmt.Errorf("ask the source for its transactions: %w", err)
	}
	rows, err := conn.Query(ctx, `SELECT c.oid::bigint, `+estimatedRows+`, coalesce(pg_table_size(c.oid), 0), `+countedChanges+` FROM pg_class c WHERE c.oid::bigint = ANY ($1)`, bigints(oids))
	if err != nil {
		return nil, 0, fmt.Errorf("ask the source for the sizes of its tables: %w", err)
	}
	defer rows.Close()
	sizes = map[uint32]Size{}
	for rows.Next() {
		var oid int64
		var s Size
		if err := rows.Scan(&oid, &s.Rows, &s.Bytes, &s.Changes); err != nil {
			return nil, 0, fmt.Errorf("ask the source for the sizes of its tables: %w", err)
		}
		sizes[uint32(oid)] = s
	}
	if err := rows.Err(); err != nil {
		return nil, 0, fmt.Errorf("ask the source for the sizes of its tables: %w", err)
	}
	return sizes, next, nil
}
