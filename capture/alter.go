package capture

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// Schema changes. The stream describes a table before its next row change, and not at all what ALTER TABLE did to the rows that it has. So
// the catalogue is looked at now and then: it tells which columns, keys, names and types have changed, and, by the table's file, whether it
// was rewritten. Where the rows of before may print otherwise than they did, all of them are compared with the log (package eventlog,
// Alter); a constant default and a new name need no event. (PostgreSQL manual, pg_attribute, attmissingval.)

// catalogue is what is remembered of a table's description.
type catalogue struct {
	File       int64  `json:"file"`           // pg_class.relfilenode: another one when the table was rewritten
	Name       string `json:"name"`           // schema and name
	Root       string `json:"root,omitempty"` // … of the partitioned table that it is a partition of
	Attributes string `json:"attributes"`     // its rows in pg_attribute: number, version (xmin), and m where it has a missing value
	Key        string `json:"key"`            // the OID of its primary key, which is another one when it was made anew
	Index      string `json:"index"`          // another index that its rows are named by: OID and version
	Identity   string `json:"identity"`       // pg_class.relreplident
	// Types are the elements of the user-defined types that its columns are made of: labels of enum types by their OIDs, attributes of
	// composite types.
	Types []string `json:"types,omitempty"`
	// Told is of none that was read: the log says instead that the table is to be compared, and that an event tells why.
	Told bool `json:"told,omitempty"`
}

func (c *catalogue) String() string {
	if c == nil {
		return ""
	}
	b, err := json.Marshal(c)
	if err != nil {
		return ""
	}
	return string(b)
}

func parseCatalogue(s string) (c catalogue) {
	_ = json.Unmarshal([]byte(s), &c) // what is not readable differs, and the table is described anew
	return c
}

// attributeVersions, keyVersion and indexVersion are expressions for what a catalogue has of a table c.
const (
	attributeVersions = `coalesce((SELECT string_agg(a.attnum || ':' || a.xmin || CASE WHEN a.atthasmissing THEN ':m' ELSE '' END, ' ' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0), '')`
	keyVersion        = `coalesce((SELECT k.oid::text FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'p'), '')`
	indexVersion      = `coalesce((SELECT i.indexrelid || ':' || i.xmin FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident AND NOT i.indisprimary), '')`
)

// catalogues reads those of some tables. One that is gone has none.
func catalogues(ctx context.Context, q queryer, oids []uint32) (map[uint32]*catalogue, error) {
	list := bigints(oids)
	out := map[uint32]*catalogue{}
	rows, err := q.Query(ctx, `
		SELECT c.oid::bigint, c.relfilenode::bigint, n.nspname || '.' || c.relname,
		       coalesce((SELECT rn.nspname || '.' || rc.relname FROM pg_class rc JOIN pg_namespace rn ON rn.oid = rc.relnamespace WHERE c.relispartition AND rc.oid = pg_partition_root(c.oid)), ''),
		       `+attributeVersions+`, `+keyVersion+`, `+indexVersion+`, c.relreplident::text
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY ($1::bigint[]::oid[])`, list)
	if err != nil {
		return nil, fmt.Errorf("look at the captured tables: %w", err)
	}
	var oid int64
	var file int64
	var name, root, attributes, key, index, identity string
	if _, err := pgx.ForEachRow(rows, []any{&oid, &file, &name, &root, &attributes, &key, &index, &identity}, func() error {
		out[uint32(oid)] = &catalogue{File: file, Name: name, Root: root, Attributes: attributes, Key: key, Index: index, Identity: identity}
		return nil
	}); err != nil {
		return nil, fmt.Errorf("look at the captured tables: %w", err)
	}
	rows, err = q.Query(ctx, `
		WITH RECURSIVE t(rel, typ) AS (
		  SELECT DISTINCT a.attrelid, a.atttypid FROM pg_attribute a WHERE a.attrelid = ANY ($1::bigint[]::oid[]) AND a.attnum > 0 AND NOT a.attisdropped AND a.atttypid >= 16384
		  UNION
		  SELECT t.rel, x.typ FROM t JOIN pg_type p ON p.oid = t.typ CROSS JOIN LATERAL (
		    SELECT p.typelem UNION ALL SELECT p.typbasetype
		    UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = p.typrelid AND p.typrelid <> 0 AND a.attnum > 0 AND NOT a.attisdropped
		    UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE r.rngtypid = p.oid OR r.rngmultitypid = p.oid
		  ) x(typ) WHERE x.typ >= 16384
		)
		SELECT t.rel::bigint, e.element FROM t CROSS JOIN LATERAL (
		  SELECT 'label ' || t.typ || ' ' || n.oid || ' ' || n.enumlabel FROM pg_enum n WHERE n.enumtypid = t.typ
		  UNION ALL
		  SELECT 'attribute ' || t.typ || ' ' || a.attnum || ' ' || a.atttypid FROM pg_type p JOIN pg_attribute a ON a.attrelid = p.typrelid
		  WHERE p.oid = t.typ AND p.typrelid <> 0 AND a.attnum > 0 AND NOT a.attisdropped
		) e(element) ORDER BY 1, 2`, list)
	if err != nil {
		return nil, fmt.Errorf("look at the types of the captured tables: %w", err)
	}
	if _, err := pgx.ForEachRow(rows, []any{&oid, &name}, func() error {
		if c := out[uint32(oid)]; c != nil {
			c.Types = append(c.Types, name)
		}
		return nil
	}); err != nil {
		return nil, fmt.Errorf("look at the types of the captured tables: %w", err)
	}
	return out, nil
}

// Altered finds the captured tables that are not in the catalogue as they were recorded, and describes them as they are to be recorded from now
// on.
//
// One that is missing was dropped, if this is the source of head: only then is that believed.
func Altered(ctx context.Context, c Config, captured []eventlog.Captured, head eventlog.Head) ([]eventlog.Alteration, error) {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	oids := oidsOf(captured)
	var out, dropped []eventlog.Alteration
	// In one snapshot, as far as the catalogue has one. What is printed newer than that is found again next time.
	err = pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SET LOCAL lock_timeout = '"+protectLock+"'"); err != nil {
			return err
		}
		now, err := catalogues(ctx, tx, oids)
		if err != nil {
			return err
		}
		for _, t := range captured {
			is := now[t.OID]
			if is == nil && !t.Dropped {
				gone := *t.Relation
				gone.Dropped = true
				dropped = append(dropped, eventlog.Alteration{Captured: eventlog.Captured{Relation: &gone, SinceLSN: t.SinceLSN, Published: t.Published, Catalogue: t.Catalogue}, Defined: true})
			}
			if is == nil || is.String() == t.Catalogue && !t.Dropped {
				continue
			}
			a, err := c.altered(ctx, tx, &t, is)
			if errors.Is(err, errGone) {
				continue
			}
			if err != nil {
				return err
			}
			out = append(out, *a)
		}
		return nil
	})
	if eventlog.SQLState(err) == "55P03" { // lock_not_available: an ALTER TABLE is at work, and is seen when it is done
		return nil, nil
	}
	if err != nil || len(dropped) == 0 {
		return out, err
	}
	repl, err := c.connectReplication(ctx, nil)
	if err != nil {
		return out, err
	}
	defer repl.Close(context.WithoutCancel(ctx))
	at, done, err := c.connectSlot(ctx, conn)
	if err != nil {
		return out, err
	}
	defer done()
	sv, err := c.server(ctx, conn, at, repl)
	if err != nil {
		return out, err
	}
	if checkSource(sv, &head) == nil {
		out = append(out, dropped...)
	}
	return out, nil
}

func oidsOf(captured []eventlog.Captured) (oids []uint32) {
	for _, t := range captured {
		oids = append(oids, t.OID)
	}
	return oids
}

// Gone gives those captured tables that the source does not have any more.
func Gone(ctx context.Context, c Config, captured []eventlog.Captured) ([]eventlog.Captured, error) {
	conn, err := c.WithDefaults().Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	oids := oidsOf(captured)
	rows, err := conn.Query(ctx, `SELECT oid::bigint FROM pg_class WHERE oid = ANY ($1::bigint[]::oid[])`, bigints(oids))
	if err != nil {
		return nil, fmt.Errorf("look for the captured tables: %w", err)
	}
	there, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return nil, fmt.Errorf("look for the captured tables: %w", err)
	}
	return slices.DeleteFunc(slices.Clone(captured), func(t eventlog.Captured) bool { return slices.Contains(there, int64(t.OID)) }), nil
}

// altered describes one.
func (c Config) altered(ctx context.Context, tx pgx.Tx, was *eventlog.Captured, is *catalogue) (*eventlog.Alteration, error) {
	r := &eventlog.Relation{OID: was.OID, Complete: was.Complete, InsertOnly: was.InsertOnly}
	a := &eventlog.Alteration{Captured: eventlog.Captured{Relation: r, SinceLSN: was.SinceLSN, Published: was.Published, Catalogue: is.String()}}
	var identity string
	err := tx.QueryRow(ctx, `SELECT n.nspname, c.relname, c.relreplident::text, greatest(c.reltuples, 0)::bigint, c.relpages * current_setting('block_size')::bigint, `+nextXID+`
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1::bigint::oid`, int64(was.OID)).Scan(&r.Schema, &r.Name, &identity, &a.Rows, &a.Bytes, &a.Next)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, errGone
	}
	if err != nil {
		return nil, fmt.Errorf("look at the captured tables: %w", err)
	}
	r.ReplicaIdentity = identity[0]
	if err := describe(ctx, tx, r, nil, 0); err != nil {
		return nil, err
	}
	before := parseCatalogue(was.Catalogue)
	knownMissing(r, was.Relation, before.File == is.File)
	a.Why = whyHeal(was.Relation, r, &before, is)
	a.Heal, a.Told = a.Why != "" && was.Catalogue != "", before.Told
	a.Defined = !r.SameDefinition(was.Relation)
	return a, nil
}

// knownMissing completes what is known of the values that columns have in rows from before they were added: was is how the table was before. A
// constant default is in the catalogue until the table is rewritten; without one, and without a rewrite, it is NULL.
func knownMissing(r, was *eventlog.Relation, sameFile bool) {
	for i := range r.Columns {
		c := &r.Columns[i]
		if c.Num == 0 || c.Missing != "" {
			continue
		}
		o := numbered(was, c.Num)
		computed := slices.ContainsFunc(was.Generated, func(g eventlog.Generated) bool { return g.Num == c.Num || g.Num == 0 && g.Name == c.Name })
		switch {
		case o >= 0:
			c.Missing = was.Columns[o].Missing
		case sameFile && !computed:
			c.Missing = "null"
		}
	}
}

// numbered finds a column by its number, which has to be known; -1 if there is none.
func numbered(r *eventlog.Relation, num int16) int {
	return slices.IndexFunc(r.Columns, func(c eventlog.Column) bool { return c.Num == num })
}

// whyHeal tells why rows of a table may have other values than the log has, although no row change told; "" if they cannot.
func whyHeal(was, now *eventlog.Relation, before, is *catalogue) string {
	if before.File != is.File && rewritten(before.Attributes, is.Attributes) {
		return "ALTER TABLE rewrote its rows"
	}
	for i := range now.Columns {
		c := &now.Columns[i]
		if c.Num == 0 {
			continue // the stream is behind the catalogue
		}
		o := numbered(was, c.Num)
		switch {
		case o < 0 && c.Missing == "":
			return fmt.Sprintf("what column %s was in rows of before is not in the catalogue", c.Name)
		case o >= 0 && was.Columns[o].Type.OID != c.Type.OID && !(c.Type.IsText() && was.Columns[o].Type.IsText()):
			return fmt.Sprintf("column %s has another type", c.Name)
		case slices.ContainsFunc(was.Columns, func(n eventlog.Column) bool { return n.Name == c.Name && n.Num != c.Num && (n.Num != 0 || o < 0) }):
			return fmt.Sprintf("column %s is another one than before", c.Name) // rows of in between may have been taken for rows with the new one
		}
	}
	if before.Key != is.Key {
		return "it has another key, or had none for a while" // when rows may have been under the same one, which the stream does not tell apart
	}
	if before.Index != is.Index && is.Index != "" || now.NamedAnew(was) && !slices.ContainsFunc(now.Columns, func(c eventlog.Column) bool { return c.Identity && c.Num == 0 }) {
		return "its rows are told apart by another index"
	}
	if printsOtherwise(before.Types, is.Types) {
		return "a type of its columns prints otherwise than before"
	}
	return ""
}

// printsOtherwise tells whether a type that is still in use has lost a label, or has other attributes.
func printsOtherwise(before, now []string) bool {
	of := func(list []string) map[string][]string {
		out := map[string][]string{}
		for _, e := range list {
			if kind, rest, ok := strings.Cut(e, " "); ok {
				typ, element, _ := strings.Cut(rest, " ")
				out[kind+" "+typ] = append(out[kind+" "+typ], element)
			}
		}
		return out
	}
	was, is := of(before), of(now)
	for typ, elements := range was {
		have, ok := is[typ]
		if !ok {
			continue
		}
		for _, e := range elements {
			if !slices.Contains(have, e) {
				return true
			}
		}
		if strings.HasPrefix(typ, "attribute ") && len(have) != len(elements) {
			return true
		}
	}
	return false
}

// rewritten tells whether ALTER TABLE may have changed values, of a table that has another file, by its attributes before and after. VACUUM FULL
// and CLUSTER write each attribute anew that had a missing value, and so does ALTER TABLE beside those that it alters: where only such were,
// it may have been either, and is taken for the latter.
func rewritten(before, after string) bool {
	is := map[string]string{}
	for _, a := range strings.Fields(after) {
		number, version, _ := strings.Cut(a, ":")
		is[number] = version
	}
	cleared, others := 0, len(is)
	for _, a := range strings.Fields(before) {
		number, version, _ := strings.Cut(a, ":")
		now, ok := is[number]
		switch {
		case !ok:
			return true
		case now == version:
		case strings.HasSuffix(version, ":m") && !strings.HasSuffix(now, ":m"):
			cleared++
		default:
			return true
		}
		others--
	}
	return others > 0 || cleared > 0
}
