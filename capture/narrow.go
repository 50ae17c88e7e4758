package capture

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// Somebody may drop a table's primary key, or the index of its replica identity, at any time. From then on Postgres refuses the
// application's every UPDATE and DELETE of the table, because we publish them. So the table is moved, as soon as that is seen, to
// the publication that publishes inserts alone. That its updates and deletes are missing from then on is recorded as a gap of the
// table: not when it is moved, but when the stream has come to that point, and found by comparing the publications with what is
// recorded, so that it holds whoever moves it, and whatever is killed meanwhile.

// protectLock is how long moving a table may wait for others' locks on it. While it waits, a VACUUM or CREATE INDEX of the
// application would have to wait behind it.
const protectLock = "1s"

// Protect moves tables whose UPDATEs and DELETEs Postgres refuses, because they are published, to the publication of inserts. It
// needs no event log.
func Protect(ctx context.Context, c Config) error {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return c.protect(ctx, conn)
}

func (c Config) protect(ctx context.Context, conn *pgx.Conn) error {
	tables, err := c.refused(ctx, conn)
	if err != nil || len(tables) == 0 {
		return err
	}
	for _, t := range tables {
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			// What is recorded of it relies on its being durable, whatever the role's settings are.
			for _, q := range append([]string{"SET LOCAL synchronous_commit = on", "SET LOCAL lock_timeout = '" + protectLock + "'"}, c.moveSQL(t)...) {
				if _, err := tx.Exec(ctx, q); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return &eventlog.Problem{Err: fmt.Errorf("the application's UPDATEs and DELETEs of %s fail, since publication %s publishes them and %s; take it out of there: %w", t.name, c.Publication, t.why, err),
				Hint: "Let a superuser, or whoever owns both the table and the publications, run: " + c.moveAtOnce(t)}
		}
		c.Logger.Warn("only inserts of a table are published from now on: Postgres would refuse its updates and deletes", "relation", t.name, "reason", t.why)
	}
	return nil
}

// refusedTable is a table whose updates and deletes must not be published.
type refusedTable struct {
	name, only, why string
	inserts         bool // it is in the publication of inserts, too
}

// moveSQL moves a table between the publications.
func (c Config) moveSQL(t refusedTable) []string {
	q := []string{"ALTER PUBLICATION " + eventlog.QuoteIdent(c.Publication) + " DROP TABLE " + t.only}
	if !t.inserts {
		q = append(q, "ALTER PUBLICATION "+eventlog.QuoteIdent(c.InsertPublication())+" ADD TABLE "+t.only)
	}
	return q
}

// moveAtOnce is moveSQL for a person to run: one by one, the statements would leave the table in no publication for a while, which is a gap.
func (c Config) moveAtOnce(t refusedTable) string {
	q := c.moveSQL(t)
	if len(q) == 1 {
		return q[0] + ";"
	}
	return "BEGIN; " + strings.Join(q, "; ") + "; COMMIT;"
}

// refused lists the tables of which our publication makes Postgres refuse UPDATE and DELETE.
func (c Config) refused(ctx context.Context, conn *pgx.Conn) ([]refusedTable, error) {
	rows, err := conn.Query(ctx, `SELECT n.nspname, c.relname, EXISTS (SELECT FROM pg_publication_rel o, pg_publication q WHERE o.prrelid = c.oid AND q.oid = o.prpubid AND q.pubname = $2), `+identityColumns+`
		FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE p.pubname = $1 AND (p.pubupdate OR p.pubdelete) ORDER BY 1, 2`, c.Publication, c.InsertPublication())
	if err != nil {
		return nil, fmt.Errorf("look at the keys of the published tables: %w", err)
	}
	defer rows.Close()
	var out []refusedTable
	for rows.Next() {
		var schema, name string
		var t refusedTable
		var id identity
		if err := rows.Scan(append([]any{&schema, &name, &t.inserts}, id.scan()...)...); err != nil {
			return nil, fmt.Errorf("look at the keys of the published tables: %w", err)
		}
		if t.why = id.insertOnly(); t.why == "" {
			continue
		}
		t.name, t.only = schema+"."+name, only(schema, name)
		out = append(out, t)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("look at the keys of the published tables: %w", err)
	}
	return out, nil
}

// Narrowed says that updates and deletes of tables are no longer published, which the log has to note. Everything before To has
// been handed over.
type Narrowed struct {
	Tables   []NarrowedTable
	From, To eventlog.LSN // of the source's WAL: somewhere in between
}

// NarrowedTable is a table as it is to be recorded from now on, and why.
type NarrowedTable struct {
	eventlog.Captured
	Why string
}

func (n *Narrowed) Error() string {
	var names []string
	for _, t := range n.Tables {
		names = append(names, t.String())
	}
	return "only inserts are published from now on of " + strings.Join(names, ", ")
}

// narrowed describes captured tables that are found in the publication of inserts.
func (c Config) narrowed(ctx context.Context, conn *pgx.Conn, tables []eventlog.Captured, now *publications) (*Narrowed, error) {
	n := &Narrowed{}
	for _, t := range tables {
		var id identity
		if err := conn.QueryRow(ctx, `SELECT `+identityColumns+` FROM pg_class c WHERE c.oid = $1::bigint::oid`, int64(t.OID)).Scan(id.scan()...); err != nil {
			return nil, fmt.Errorf("look at the key of %s: %w", t, err)
		}
		why := id.insertOnly()
		if why == "" {
			why = "somebody moved it to publication " + c.InsertPublication()
		}
		r := *t.Relation
		r.InsertOnly, r.Complete = true, false
		n.Tables = append(n.Tables, NarrowedTable{eventlog.Captured{Relation: &r, SinceLSN: t.SinceLSN, Published: now.of(c, t.OID, true), Catalogue: t.Catalogue}, why})
	}
	return n, nil
}
