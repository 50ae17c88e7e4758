package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
)

// moment gives the present by the source's clock, a while after what was before and before what comes.
func (s *session) moment() string {
	time.Sleep(300 * time.Millisecond)
	defer time.Sleep(300 * time.Millisecond)
	return s.one(`SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')`)
}

// TestMomentsAroundATableGap: a gap that is found by a sidecar which is behind stands before commits that are older than its being found: a moment
// between them is none of before the gap. Also where the log has no commit yet.
func TestMomentsAroundATableGap(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"missed", "missed before the first commit", "narrowed", "retaken"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			db := s.sql()
			db.do(`CREATE TABLE public.a (id int PRIMARY KEY, v text); CREATE TABLE public.b (id int PRIMARY KEY, v text)`)
			s.init()
			const insert = `INSERT INTO public.a VALUES (1, 'old'); INSERT INTO public.b VALUES (1, 'old')`
			early := how == "missed before the first commit"
			if !early {
				db.do(insert)
				s.once()
			}
			// No sidecar runs from here on.
			switch how {
			case "narrowed":
				db.do(`BEGIN; ALTER PUBLICATION backstory DROP TABLE public.b; ALTER PUBLICATION backstory_inserts ADD TABLE public.b; COMMIT`)
			case "retaken":
				s.cfg.Capture.Exclude = []string{"public.b"}
				s.init()
				s.cfg.Capture.Exclude = nil
				s.init()
			default:
				db.do(`ALTER PUBLICATION backstory DROP TABLE public.b; ALTER PUBLICATION backstory ADD TABLE public.b`)
			}
			if early {
				db.do(insert)
			}
			before := db.moment()
			db.do(`UPDATE public.a SET v = 'new'`)
			between := db.moment()
			db.do(`UPDATE public.a SET v = 'newer'`)
			s.once()
			if got := s.rowsOf(before, "a") + s.rowsOf(between, "a") + s.rowsOf("HEAD", "a"); got != "(1,old)(1,new)(1,newer)" {
				t.Errorf("before, between and after two updates the log has %s:\n%v", got, db.rows(`SELECT position, occurred_at, type, data FROM backstory.events ORDER BY position`))
			}
		})
	}
}

// TestMomentsAroundWhatTheSidecarWrites: no event that the sidecar makes by itself is, by its time, later than one that follows it, and a checkout
// of any moment has what was committed by then.
func TestMomentsAroundWhatTheSidecarWrites(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.a (id int PRIMARY KEY, v text); CREATE TABLE public.b (id int PRIMARY KEY, v text); CREATE TABLE public.c (id int PRIMARY KEY); INSERT INTO public.b VALUES (1, 'b'), (2, 'b'); INSERT INTO public.c VALUES (1)`)
	s.init()
	want := map[string]string{} // what a had at moments
	change := func(what string, args ...any) {
		t.Helper()
		db.do(what, args...)
		db.do(`INSERT INTO public.a VALUES ((SELECT count(*) FROM public.a), 'a')`)
		want[db.moment()] = db.one(`SELECT string_agg(x::text, ' ' ORDER BY x::text) FROM public.a x`)
	}
	change(``)
	s.once() // …Imported, …BaselineEnded
	change(`ALTER TABLE public.b ADD w int DEFAULT 1`)
	change(`DROP TABLE public.c`)
	s.once() // …Altered and …Dropped, each in the place of an empty chunk
	change(`ALTER TABLE public.b ALTER w TYPE bigint USING w + 1`)
	change(`UPDATE public.b SET v = 'B' WHERE id = 1`)
	s.once() // …Healed
	change(`ALTER PUBLICATION backstory DROP TABLE public.b; UPDATE public.b SET v = 'missed'; ALTER PUBLICATION backstory ADD TABLE public.b`)
	change(`UPDATE public.b SET v = 'BB' WHERE id = 1`)
	s.once() // BGap, …Healed
	change(`DELETE FROM public.b WHERE id = 2`)
	db.do(`INSERT INTO public.a VALUES (100, 'after all moments')`)
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`UPDATE public.b SET v = 'lost'`)
	lost := db.moment()
	s.gapFound("the slot was dropped", "gone")
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	s.once() // …Healed
	for at, rows := range want {
		if got := s.rowsOf(at, "a"); got != rows {
			t.Errorf("as of %s table a had %s, the log has %s", at, rows, got)
		}
	}
	s.says(1, "--partial", "checkout", "--at", lost, "--schema", "past", "b") // what was lost by then is not in the log
	s.sameRows("a", "b")
	types := db.one(`SELECT string_agg(DISTINCT type, ' ') FROM backstory.events`)
	for _, typ := range []string{"BImported", "BBaselineEnded", "BAltered", "CDropped", "BHealed", "BGap", "SourceGap"} {
		if !strings.Contains(" "+types+" ", " "+typ+" ") {
			t.Errorf("there is no %s; the test has to be made anew: %s", typ, types)
		}
	}
	// Chunks of two tables are committed at about the same time.
	if got := db.rows(`SELECT position, type, occurred_at, latest FROM (SELECT *, max(occurred_at) OVER (ORDER BY position ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS latest FROM backstory.events) e
		WHERE occurred_at < latest - interval '100 ms' OR op = 'gap' AND occurred_at > latest`); len(got) > 0 {
		t.Errorf("by their times these are not in their order: %v", got)
	}
}
