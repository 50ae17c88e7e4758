package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// restored makes another server the source, as if the database had been restored there from a dump.
func (s *system) restored(sql string) *session {
	s.t.Helper()
	name := databaseOf(s.t, s.cfg.Capture.URL)
	other := pgservertest.Start(s.t, quick(nil))
	open(s.t, other.URL("postgres")).do(`CREATE DATABASE %s`, name)
	s.cfg.Capture.URL, s.src = other.URL(name), other
	db := s.sql()
	db.do("%s", sql)
	return db
}

// tells prints the events after a position and what they say.
func (s *system) tells(after string) string {
	s.t.Helper()
	var out []string
	for _, r := range s.logSQL().rows(`SELECT type, coalesce(key, ''), coalesce(before::text, ''), coalesce(data::text, '') FROM backstory.events WHERE position > %s AND type !~ 'Baseline' AND type <> 'SourceGap' ORDER BY type, key, data::text`, after) {
		out = append(out, strings.Join(r, " "))
	}
	return strings.Join(out, "\n")
}

// pastIs compares a checkout of a position with what the source had then.
func (s *system) pastIs(at string, want map[string]string) {
	s.t.Helper()
	args := []string{"checkout", "--partial", "--at", at, "--schema", "past", "--replace", "--database", s.logURL()}
	l := s.logSQL()
	for name := range want {
		args = append(args, name)
	}
	s.says(0, "", args...)
	for name, rows := range want {
		if got := l.one(`SELECT coalesce(string_agg(x, ' ' ORDER BY x), '') FROM (SELECT t::text COLLATE "C" AS x FROM past.%s t) y`, name); got != rows {
			s.t.Errorf("%s as of %s: %s, want %s", name, at, got, rows)
		}
	}
}

// TestRestoredFromADump: in another system tables have other OIDs, or those of each other, and columns other numbers. Tables and columns go by their names; what
// differs becomes an event, and the past stays as it was.
func TestRestoredFromADump(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.other (id int PRIMARY KEY); CREATE TYPE public.mood AS ENUM ('sad', 'glad');
		CREATE TABLE public.things (id int PRIMARY KEY, junk int, v text, m public.mood); CREATE TABLE public.keyless (v text);
		CREATE TABLE public.gone (id int PRIMARY KEY); CREATE TABLE public.parted (id int, junk int, n int, PRIMARY KEY (id, n)) PARTITION BY LIST (n);
		CREATE TABLE public.p1 PARTITION OF public.parted FOR VALUES IN (1); CREATE TABLE public.p2 (id int NOT NULL, n int NOT NULL, junk int); ALTER TABLE public.parted ATTACH PARTITION public.p2 FOR VALUES IN (2)`)
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 7, 'a', 'sad'), (2, 8, 'b', 'glad'), (3, 9, 'c', 'sad'); INSERT INTO public.other VALUES (1); INSERT INTO public.keyless VALUES ('k');
		INSERT INTO public.gone VALUES (1), (2); INSERT INTO public.parted VALUES (1, 5, 1), (2, 6, 2)`)
	s.once()
	first := s.logSQL().one(`SELECT position FROM backstory.head`)
	db.do(`ALTER TABLE public.things DROP junk; ALTER TABLE public.things ADD more int DEFAULT 4; ALTER TABLE public.parted DROP junk; ALTER TABLE public.parted ADD more int;
		UPDATE public.things SET v = 'a2' WHERE id = 1; UPDATE public.parted SET more = 9 WHERE id = 1`)
	s.once()
	l := s.logSQL()
	before := l.one(`SELECT position FROM backstory.head`)
	was := map[string]string{"things": "(1,a2,sad,4) (2,b,glad,4) (3,c,sad,4)", "other": "(1)", "parted": "(1,1,9) (2,2,)", "gone": "(1) (2)"}
	s.pastIs(before, was)

	db = s.restored(`CREATE TYPE public.mood AS ENUM ('sad', 'glad'); CREATE TABLE public.parted (id int, n int, more int, PRIMARY KEY (id, n)) PARTITION BY LIST (n);
		CREATE TABLE public.p2 PARTITION OF public.parted FOR VALUES IN (2); CREATE TABLE public.p1 PARTITION OF public.parted FOR VALUES IN (1);
		CREATE TABLE public.things (id int PRIMARY KEY, v text, m public.mood, more int DEFAULT 4); CREATE TABLE public.other (id int PRIMARY KEY); CREATE TABLE public.keyless (v text); CREATE TABLE public.fresh (id int PRIMARY KEY);
		INSERT INTO public.things VALUES (1, 'a2', 'sad', 4), (2, 'changed', 'glad', 4), (4, 'new', 'sad', 4); INSERT INTO public.other VALUES (1); INSERT INTO public.keyless VALUES ('k'), ('l');
		INSERT INTO public.parted VALUES (1, 1, 9), (2, 2, 3); INSERT INTO public.fresh VALUES (5)`)
	if err := s.tryOnce(); err == nil || !strings.Contains(err.Error(), "the log was made from") {
		t.Fatal(err)
	}
	s.says(0, "", "init", "--accept-gap")
	s.once()
	s.once()
	s.equalsTables(db, s.openLog())
	name := databaseOf(t, s.cfg.Capture.URL)
	want := fmt.Sprintf(`FreshImported 5  {"id":5}
GoneDropped   {}
KeylessHealed
PartedHealed 2,2 {"more":null} {"more":3}
SourceMoved   %s
ThingHealed 2 {"v":"b"} {"v":"changed"}
ThingHealed 3 {"id":3,"v":"c","m":"sad","more":4} 
ThingHealed 4  {"id":4,"v":"new","m":"sad","more":4}`,
		fmt.Sprintf(`{"system_id":"%s","database":"%s","tables":["public.keyless","public.other","public.p1","public.p2","public.things"],"gone":["public.gone"]}`, db.one(`SELECT system_identifier FROM pg_control_system()`), name))
	if got := s.tells(before); !sameLines(got, want, "KeylessHealed") {
		t.Errorf("the log tells:\n%s\nwant:\n%s", got, want)
	}
	if reason := l.one(`SELECT data ->> 'reason' FROM backstory.events WHERE type = 'SourceGap'`); !strings.Contains(reason, "the source is database "+name+" of system "+db.one(`SELECT system_identifier FROM pg_control_system()`)) {
		t.Errorf("the gap says: %s", reason)
	}
	s.pastIs(before, was)
	s.pastIs(first, map[string]string{"things": "(1,7,a,sad) (2,8,b,glad) (3,9,c,sad)", "other": "(1)", "gone": "(1) (2)"})
	s.pastIs("HEAD", map[string]string{"things": "(1,a2,sad,4) (2,changed,glad,4) (4,new,sad,4)", "other": "(1)", "parted": "(1,1,9) (2,2,3)"})
	for _, c := range []struct {
		want string
		code int
		args []string
	}{
		{"a2", 0, []string{"show", "things/1", "--at", before}},
		{"junk", 0, []string{"show", "things/1", "--at", first}},
		{"was not there", 1, []string{"show", "things/3"}},
		{"was not there", 1, []string{"show", "gone/1"}},
		{"[gone]", 0, []string{"log", "things/3"}},
	} {
		s.says(c.code, c.want, c.args...)
	}
	// What comes now, and comes again after another gap, of the same system this time.
	db.do(`UPDATE public.things SET v = 'z'; ALTER TABLE public.other RENAME TO others; INSERT INTO public.others VALUES (2)`)
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s'); DELETE FROM public.things WHERE id = 4; ALTER TABLE public.things RENAME TO theirs`, s.cfg.Capture.Slot)
	if err := s.tryOnce(); !errors.Is(err, backstory.ErrGap) {
		t.Fatal(err)
	}
	at := l.one(`SELECT position FROM backstory.head`)
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	s.once()
	db.do(`DROP SCHEMA IF EXISTS of_now CASCADE`)
	s.equalsTables(db, s.openLog())
	if got := s.tells(at); !strings.Contains(got, `"renamed_from":"public.things"`) || strings.Contains(got, "SourceMoved") || strings.Contains(got, "Imported") {
		t.Errorf("after a gap of one system: %s", got)
	}
	s.pastIs(before, was)
	verify(t, s.openLog())
	l.do(`SET backstory.maintenance = on; UPDATE backstory.moved SET now_oid = '1'::oid WHERE id = 1`)
	if v, err := s.openLog().Verify(within(t, time.Minute), nil); err != nil || v.Broken == "" {
		t.Errorf("numbers that somebody has changed: %+v, %v", v, err)
	}
}

// sameLines compares line by line; of those that begin with but, only that is compared.
func sameLines(got, want, but string) bool {
	a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] && !(strings.HasPrefix(a[i], but) && strings.HasPrefix(b[i], but)) {
			return false
		}
	}
	return true
}

// TestNumbersGivenOutAgain: a source that was put back to an earlier state gives the OIDs and the numbers of columns of what it lost to other tables and columns.
func TestNumbersGivenOutAgain(t *testing.T) {
	t.Parallel()
	for _, found := range []bool{true, false} {
		t.Run(map[bool]string{true: "and has gone on since that was found", false: "accepted at once"}[found], func(t *testing.T) {
			t.Parallel()
			givenOutAgain(t, found)
		})
	}
}

func givenOutAgain(t *testing.T, found bool) {
	s := newSystem(t, where{own: true, apart: true, tables: []string{"public.*"}})
	save, restore := clusterOf(t, s.src)
	db := s.sql()
	db.do(simple)
	db.do(`CREATE TABLE public.early (id int PRIMARY KEY)`)
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'a'), (2, 'b'); INSERT INTO public.early VALUES (1)`)
	s.once()
	_ = db.Close(t.Context())
	save("then")
	db = s.sql()
	db.do(`CREATE TABLE public.lost (id int PRIMARY KEY, w text); CREATE TABLE public.same (id int PRIMARY KEY, w text)`)
	s.init()
	db.do(`INSERT INTO public.lost VALUES (1, 'lost'), (2, 'lost'); INSERT INTO public.same VALUES (1, 'one'), (2, 'two'); ALTER TABLE public.things ADD x text; UPDATE public.things SET x = 'x' WHERE id = 1;
		ALTER TABLE public.early RENAME TO late; INSERT INTO public.late VALUES (2); SELECT pg_switch_wal()`)
	s.once()
	was := db.one(`SELECT 'public.lost'::regclass::oid`)
	before := s.logSQL().one(`SELECT position FROM backstory.head`)
	_ = db.Close(t.Context())
	restore("then")
	db = s.sql()
	db.do(`CREATE TABLE public.fresh (id int PRIMARY KEY, v int); INSERT INTO public.fresh VALUES (1, 10), (3, 30); CREATE TABLE public.between (id serial PRIMARY KEY); CREATE TABLE public.same (id int PRIMARY KEY, w text);
		INSERT INTO public.same VALUES (1, 'one'), (3, 'three'); ALTER TABLE public.things ADD y text; INSERT INTO public.things VALUES (3, 'c', 'y')`)
	if is := db.one(`SELECT 'public.fresh'::regclass::oid`); is != was {
		t.Fatalf("public.fresh has OID %s, public.lost had %s: nothing is shown", is, was)
	}
	if found {
		s.gapFound("the source was put back", "has lost transactions")
		end := s.logSQL().one(`SELECT end_lsn FROM backstory.head`)
		for db.one(`SELECT pg_current_wal_flush_lsn() > '%s'`, end) != "t" {
			db.do(`INSERT INTO public.between DEFAULT VALUES; DELETE FROM public.between; SELECT pg_switch_wal()`)
		}
	}
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	s.once()
	s.once()
	s.equalsTables(db, s.openLog())
	if got := s.logSQL().one(`SELECT data ->> 'put_back' || ' ' || (data ->> 'reason') FROM backstory.events WHERE type = 'SourceGap'`); !strings.Contains(got, "true ") || !strings.Contains(got, "has lost transactions") {
		t.Errorf("the gap says %s", got)
	}
	const want = `EarlyAltered   {"renamed_from":"public.late"}
EarlyHealed 2 {"id":2} 
FreshImported 1  {"id":1,"v":10}
FreshImported 3  {"id":3,"v":30}
LostDropped   {}
SameHealed 2 {"id":2,"w":"two"} 
SameHealed 3  {"id":3,"w":"three"}
SourceMoved   {"tables":["public.same","public.things"],"gone":["public.lost"]}
ThingAltered   {"added":["y"],"dropped":["x"]}
ThingHealed 1 {} {"y":null}
ThingHealed 2 {} {"y":null}
ThingHealed 3  {"id":3,"v":"c","y":"y"}`
	if got := s.tells(before); got != want {
		t.Errorf("the log tells:\n%s\nwant:\n%s", got, want)
	}
	s.pastIs(before, map[string]string{"things": "(1,a,x) (2,b,)", "lost": "(1,lost) (2,lost)", "same": "(1,one) (2,two)", "late": "(1) (2)"})
	s.says(1, "was not there", "show", "lost/2")
	s.says(0, "LostCreated", "log", "lost/2")
	s.says(1, "knows nothing", "show", "fresh/2")
	db.do(`UPDATE public.things SET v = 'z', y = 'yy'; DROP TABLE public.fresh; INSERT INTO public.same VALUES (4, 'four')`)
	s.once()
	db.do(`DROP SCHEMA IF EXISTS of_now CASCADE`)
	s.equalsTables(db, s.openLog())
	verify(t, s.openLog())
}
