package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// TestReplicaIdentityFull: init alters a table only where it is told to, says what that costs, does not keep the application waiting,
// and from then on updates and deletes without a key are in the log, at work or after a pause.
func TestReplicaIdentityFull(t *testing.T) {
	for _, atWork := range []bool{false, true} {
		t.Run(fmt.Sprintf("the sidecar runs: %v", atWork), func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			db := s.sql()
			db.do(`CREATE TABLE public.things (v text, n int); CREATE TABLE public.others (v text);
				CREATE TABLE public.computed (v text, n int GENERATED ALWAYS AS (length(v)) STORED)`)
			s.init()
			identity := func() string {
				return db.one(`SELECT string_agg(relname || relreplident::text, ' ' ORDER BY relname) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'`)
			}
			const before, after = "computedd othersd thingsd", "computedd othersd thingsf"
			var r *running
			if atWork {
				r = s.start()
			}
			db.do(`INSERT INTO public.things SELECT 'a', i FROM generate_series(1, 3) i`)
			db.do(`UPDATE public.things SET v = 'lost' WHERE n = 3; INSERT INTO public.others VALUES ('x'); UPDATE public.others SET v = 'y'`)
			if atWork {
				eventually(t, time.Minute, "the inserts are there", func() (bool, error) {
					return db.one(`SELECT position >= 4 FROM backstory.head`) == "t", nil
				})
			} else {
				s.once()
			}
			said := func(code int, want string, args ...string) {
				t.Helper()
				s.says(code, want, append([]string{"init"}, args...)...)
			}
			said(1, "no selected table is called public.nosuch", "--yes", "--replica-identity-full", "public.nosuch")
			if s.src.Major() >= 18 {
				said(1, "would make its UPDATEs fail", "--yes", "--replica-identity-full", "public.computed")
			}
			said(0, `ALTER TABLE "public"."things" REPLICA IDENTITY FULL;`, "--print-sql", "--replica-identity-full", "public.things")
			if got := identity(); got != before {
				t.Fatalf("nothing was to be altered: %s", got)
			}

			// A transaction that reads the table: init does not queue behind it for long, and nobody behind init.
			reader := s.sql()
			reader.do(`BEGIN; SELECT FROM public.things LIMIT 1`)
			began := time.Now()
			said(1, "was in use for 2s", "--yes", "--replica-identity-full", "public.things")
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("init kept the application waiting for up to %v", took)
			}
			if got := identity() + db.one(`SELECT count(*) FROM pg_publication_tables WHERE pubname = '%s'`, s.cfg.Capture.Publication); got != before+"0" {
				t.Errorf("init failed and changed something: %s", got)
			}
			reader.do(`ROLLBACK`)

			said(0, "REPLICA IDENTITY FULL is to be set: an exclusive lock for a moment, and then ", "--yes", "--replica-identity-full", "public.things")
			if got := identity(); got != after {
				t.Fatalf("after init: %s", got)
			}
			said(0, "everything was there already", "--yes", "--replica-identity-full", "public.things")
			db.do(`UPDATE public.things SET v = 'b' WHERE n = 1; DELETE FROM public.things WHERE n = 2; INSERT INTO public.things VALUES ('a', 4)`)
			db.do(`UPDATE public.things SET v = 'c' WHERE n = 3; UPDATE public.others SET v = 'z'`)
			if atWork {
				eventually(t, time.Minute, "the changes are there", func() (bool, error) {
					return db.one(`SELECT count(*) = 1 FROM backstory.events WHERE data->>'v' = 'c'`) == "t", nil
				})
				if err := r.end(); err != nil {
					t.Fatal(err)
				}
			}
			s.once()
			var got []string
			for _, e := range s.allEvents() {
				if e.Relation.Name != "things" || e.Op == eventlog.OpNote || strings.HasSuffix(e.Type, "Healed") {
					continue
				}
				what := e.Op.String()
				if e.Op != eventlog.OpGap {
					what += " " + string(e.Before) + string(e.Data)
				}
				got = append(got, what)
			}
			want := `insert {"v":"a","n":1}, insert {"v":"a","n":2}, insert {"v":"a","n":3}, gap, ` +
				`update {"v":"a"}{"v":"b"}, delete {"v":"a","n":2}, insert {"v":"a","n":4}, update {"v":"lost"}{"v":"c"}`
			if have := strings.Join(got, ", "); have != want {
				t.Errorf("the log has\n%s\nwant\n%s", have, want)
			}
			if why := db.one(`SELECT data->>'reason' FROM backstory.events WHERE op = 'gap'`); !strings.Contains(why, "until now only its inserts were captured") {
				t.Errorf("the gap says %s", why)
			}
			l := s.openLog()
			verify(t, l)
			s.sameRows("things")
			if got := s.complete(); got != "things" {
				t.Errorf("complete: %s", got)
			}
			if got := db.one(`SELECT count(*) FROM backstory.events WHERE aggregate = 'Other' AND op <> 'note' AND type NOT LIKE '%%Healed'`); got != "1" {
				t.Errorf("%s events of a table that was to be left as it is", got)
			}
		})
	}
}

// TestRowWithoutAName: a row that the log has never seen, and of which the stream tells another index alone, has no name; it is not that of
// a row whose key is 0.
func TestRowWithoutAName(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.NoBaseline = true
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, u int NOT NULL); CREATE UNIQUE INDEX things_u ON public.things (u); ALTER TABLE public.things REPLICA IDENTITY USING INDEX things_u; INSERT INTO public.things VALUES (5, 50)`)
	s.init()
	db.do(`INSERT INTO public.things VALUES (0, 10); DELETE FROM public.things WHERE u = 50`)
	s.once()
	if got := s.logSQL().one(`SELECT string_agg(type || ' "' || aggregate_id || '"', ', ' ORDER BY position) FROM backstory.events`); got != `ThingCreated "0", ThingDeleted ""` {
		t.Errorf("the log has %s", got)
	}
	s.says(0, "10", "show", "things/0")
}
