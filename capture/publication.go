package capture

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// A publication that somebody drops, makes again or alters leaves changes out of the stream, and nothing in the stream says
// so (PostgreSQL 18 even goes on without a publication that is not there). So it is recorded for each captured table which
// rows of the catalogue publish it, and in which version: eventlog.Captured.Published holds OID and xmin of the rows in
// pg_publication and pg_publication_rel, and the publication's name.

// publications is what the catalogue says of our two publications.
type publications struct {
	names  map[string]string   // name → "oid/xmin"
	tables map[string][]string // name, OID of a table → "oid/xmin" of the publication and of the table in it
	parts  map[string]bool     // the same, of which only some rows or columns are published
}

// publications reads all of that, or, where oid is not 0, what there is of one table.
func (c Config) publications(ctx context.Context, conn *pgx.Conn, oid uint32) (*publications, error) {
	rows, err := conn.Query(ctx, `SELECT p.pubname::text, p.oid || '/' || p.xmin::text, coalesce(r.prrelid::bigint, 0), coalesce(r.oid || '/' || r.xmin::text, ''), coalesce(to_jsonb(r) ->> 'prqual', to_jsonb(r) ->> 'prattrs') IS NOT NULL
		FROM pg_publication p LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND (r.prrelid = $3::bigint::oid OR $3 = 0)
		WHERE p.pubname IN ($1, $2)`, c.Publication, c.InsertPublication(), int64(oid))
	if err != nil {
		return nil, fmt.Errorf("read the publications: %w", err)
	}
	defer rows.Close()
	p := &publications{names: map[string]string{}, tables: map[string][]string{}, parts: map[string]bool{}}
	for rows.Next() {
		var name, pub, rel string
		var oid int64
		var part bool
		if err := rows.Scan(&name, &pub, &oid, &rel, &part); err != nil {
			return nil, fmt.Errorf("read the publications: %w", err)
		}
		p.names[name] = pub
		p.tables[member(name, uint32(oid))] = []string{pub, rel}
		p.parts[member(name, uint32(oid))] = part
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read the publications: %w", err)
	}
	return p, nil
}

func member(publication string, oid uint32) string { return fmt.Sprintf("%d %s", oid, publication) }

// of gives what Captured.Published holds of a table; "" if it is not published as it should be.
func (p *publications) of(c Config, oid uint32, insertOnly bool) string {
	name := c.Publication
	if insertOnly {
		name = c.InsertPublication()
	}
	if t := p.tables[member(name, oid)]; t != nil {
		return t[0] + " " + t[1] + " " + name
	}
	return ""
}

// CheckPublications makes sure that the source still publishes what is captured, and has done so without a break since it
// was recorded. A *Gap says that it has not; a *Missed, that it has not published some tables for a while; a *Narrowed, that it publishes less of
// some tables than before.
func CheckPublications(ctx context.Context, c Config, captured []eventlog.Captured) error {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return c.checkPublications(ctx, conn, captured)
}

func (c Config) checkPublications(ctx context.Context, conn *pgx.Conn, captured []eventlog.Captured) error {
	now, err := c.publications(ctx, conn, 0)
	if err != nil {
		return err
	}
	var reasons []string
	var narrowed []eventlog.Captured
	missed := &Missed{}
	because := func(format string, args ...any) {
		if r := fmt.Sprintf(format, args...); !slices.Contains(reasons, r) {
			reasons = append(reasons, r)
		}
	}
	for _, t := range captured {
		was := strings.SplitN(t.Published, " ", 3) // publication, table in it, name
		is := strings.SplitN(now.of(c, t.OID, t.InsertOnly), " ", 3)
		name := c.Publication
		if t.InsertOnly {
			name = c.InsertPublication()
		}
		switch {
		case len(was) == 3 && was[2] != name:
			return &eventlog.Problem{Err: fmt.Errorf("%s was captured by publication %s, not %s", t, was[2], name), Hint: "Check BACKSTORY_PUBLICATION."}
		case now.names[name] == "":
			because("publication %s was dropped", name)
		case len(is) < 3 && !t.InsertOnly && now.of(c, t.OID, true) != "":
			narrowed = append(narrowed, t)
		case len(is) < 3:
			var exists bool
			if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_class WHERE oid = $1::bigint::oid AND oid >= 16384)`, int64(t.OID)).Scan(&exists); err != nil {
				return fmt.Errorf("read the catalogue: %w", err)
			}
			if exists {
				missed.add(t, "", fmt.Sprintf("it was taken out of publication %s", name))
			}
		case len(was) < 3, t.Published == strings.Join(is, " "):
		case oidOf(was[0]) != oidOf(is[0]):
			because("publication %s was dropped and made again", name)
		case was[0] != is[0]:
			because("publication %s was altered", name)
		case now.parts[member(name, t.OID)]: // and still is, until init mends that
			because("publication %s has only a part of %s", name, t)
		case oidOf(was[1]) != oidOf(is[1]):
			missed.add(t, strings.Join(is, " "), fmt.Sprintf("it was taken out of publication %s and put back", name))
		default:
			missed.add(t, strings.Join(is, " "), fmt.Sprintf("publication %s was altered for it", name))
		}
	}
	// Postgres 14 to 17 refuse to stream while one of the two is missing.
	for _, name := range []string{c.Publication, c.InsertPublication()} {
		if now.names[name] == "" {
			because("publication %s was dropped", name)
		}
	}
	if len(reasons) == 0 {
		if len(missed.Tables) > 0 {
			return missed
		}
		if len(narrowed) == 0 {
			return nil
		}
		n, err := c.narrowed(ctx, conn, narrowed, now)
		if err != nil {
			return err
		}
		return n
	}
	if len(reasons) > 5 {
		reasons = append(reasons[:4], fmt.Sprintf("and %d more", len(reasons)-4))
	}
	return &Gap{Reason: strings.Join(reasons, "; ") + "; what changed there meanwhile is not in the stream", Publication: true}
}

func oidOf(version string) string {
	oid, _, _ := strings.Cut(version, "/")
	return oid
}

// Missed says that some tables were not published for a while, or only in part. The stream ends at once: what it tells of them from then on may lack
// something before it.
type Missed struct {
	Tables   []MissedTable
	From, To eventlog.LSN // of the source's WAL: somewhere in between
}

// MissedTable is a table as it was recorded as captured, why changes of it are missing, and what Captured.Published is to say by now: empty where it
// still is not published.
type MissedTable struct {
	eventlog.Captured
	Why, Now string
}

func (m *Missed) Error() string {
	var list []string
	for i, t := range m.Tables {
		if list = append(list, t.String()+": "+t.Why); i == 3 && len(m.Tables) > 4 {
			list = append(list, fmt.Sprintf("and %d more tables", len(m.Tables)-4))
			break
		}
	}
	return "changes are missing of " + strings.Join(list, "; ")
}

func (m *Missed) add(t eventlog.Captured, now, why string) {
	m.Tables = append(m.Tables, MissedTable{t, why, now})
}
