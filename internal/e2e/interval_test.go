package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// TestPlaceOfAnAlteration: between the two places that the log has of a version of a table the table got that shape, whatever other tables do; with the event
// trigger both are the commit that did it.
func TestPlaceOfAnAlteration(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name           string
		trigger, apart bool // apart: nobody looks while the table is altered
		then           string
	}{
		{"its next row tells of it", false, false, `INSERT INTO public.a VALUES (2, 'y', 3)`},
		{"the catalogue tells of it", false, false, ``},
		{"its next row tells of it to another sidecar", false, true, `INSERT INTO public.a VALUES (2, 'y', 3)`},
		{"the catalogue tells of it to another sidecar", false, true, ``},
		{"the event trigger tells of it", true, false, ``},
		{"the event trigger tells of it to another sidecar", true, true, `INSERT INTO public.a VALUES (2, 'y', 3)`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			if c.trigger {
				s.cfg.Capture.DDLTrigger = &c.trigger
			}
			db := s.sql()
			db.do(`CREATE TABLE public.a (id int PRIMARY KEY, v text); CREATE TABLE public.b (id int PRIMARY KEY)`)
			s.init()
			db.do(`INSERT INTO public.a VALUES (1, 'x'); INSERT INTO public.b VALUES (1)`)
			s.once()
			var r *running
			l := s.logSQL()
			row := func(table, id string) {
				db.do(`INSERT INTO public.%s (id) VALUES (%s)`, table, id)
				if r != nil {
					eventually(t, time.Minute, "the row is in the log", func() (bool, error) {
						return l.one(`SELECT count(*) FROM backstory.events WHERE relation = 'public.%s' AND key = '%s'`, table, id) == "1", nil
					})
				}
			}
			if !c.apart {
				r = s.start()
			}
			row("a", "10")
			last := db.lsn(`SELECT pg_current_wal_insert_lsn()`) // behind a's last row of before
			row("b", "10")
			before := db.lsn(`SELECT pg_current_wal_insert_lsn()`)
			db.do(`ALTER TABLE public.a ADD w int`)
			after := db.lsn(`SELECT pg_current_wal_insert_lsn()`)
			row("b", "11")
			if c.then != "" {
				db.do("%s", c.then)
			}
			end := db.lsn(`SELECT pg_current_wal_insert_lsn()`)
			if r != nil {
				eventually(t, time.Minute, "the log knows of it", func() (bool, error) {
					return l.one(`SELECT count(*) FROM backstory.relation WHERE name = 'a' AND columns::text LIKE '%%"w"%%'`) != "0", nil
				})
				if err := r.end(); err != nil {
					t.Fatal(err)
				}
			}
			s.once()
			rows := l.rows(`SELECT after_lsn, at_lsn FROM backstory.relation WHERE name = 'a' AND columns::text LIKE '%%"w"%%' ORDER BY id`)
			if len(rows) == 0 {
				t.Fatal("the log does not know of it")
			}
			from, err := eventlog.ParseLSN(rows[0][0])
			to, e2 := eventlog.ParseLSN(rows[0][1])
			if err != nil || e2 != nil {
				t.Fatal(err, e2)
			}
			what := fmt.Sprintf("altered between %s and %s, recorded as from after %s on, from %s at the latest", before, after, from, to)
			if from >= after || to < before {
				t.Error(what)
			}
			switch {
			case c.trigger && (from != to || from < before || from > after):
				t.Errorf("with the event trigger: %s", what)
			case !c.trigger && from > last:
				t.Errorf("a's last row of before is before %s: %s", last, what)
			case !c.trigger && from == 0:
				t.Errorf("the log knew the table before: %s", what)
			case c.then != "" && to > end:
				t.Errorf("a's next row is before %s: %s", end, what)
			}
			// The table itself is in the log from its first row on, and how long it was so before nobody knows.
			if got := l.one(`SELECT after_lsn FROM backstory.relation WHERE name = 'a' ORDER BY id LIMIT 1`); got != "0/0" {
				t.Errorf("the first version holds from after %s on", got)
			}
		})
	}
}
