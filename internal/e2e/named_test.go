package e2e

import (
	"fmt"
	"testing"
	"time"
)

// look stands among statements for a moment at which the sidecar looks on.
const look = ""

// sameAfter makes table a with six rows, which the log has, executes statements, and compares a checkout with the table: where the sidecar looks where it is
// told to, or runs all the while; with the event trigger and without it: for each case, by its number, two of the four ways.
func sameAfter(t *testing.T, number int, statements []string) {
	t.Helper()
	for _, running := range []bool{false, true} {
		trigger := running == (number%2 == 0)
		t.Run(fmt.Sprintf("running: %v, with the event trigger: %v", running, trigger), func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			s.cfg.Capture.DDLTrigger = &trigger
			s.cfg.Capture.BaselineChunkBytes = 60 // some rows
			db := s.sql()
			db.do(`SET search_path = public; CREATE TABLE a (id int PRIMARY KEY, v text, n int, m int)`)
			s.init()
			db.do(`INSERT INTO a (id, v, n) SELECT i, 'a' || i, i FROM generate_series(1, 6) i`)
			s.once()
			looks := s.once
			if running {
				r := s.start()
				looks = func() { time.Sleep(300 * time.Millisecond) }
				defer func() {
					if err := r.end(); err != nil {
						t.Error(err)
					}
				}()
			}
			for _, q := range statements {
				if q == look {
					looks()
				} else {
					db.do("%s", q)
				}
			}
			if running {
				want := db.one(`SELECT string_agg(a::text, ' ' ORDER BY a::text) FROM a`)
				eventually(t, 2*time.Minute, "the log has what the source has", func() (bool, error) {
					p := s.command(false, "checkout", "--at", "HEAD", "--schema", "of_now", "--replace", "a")
					return p.wait(time.Minute) == 0 && db.one(`SELECT coalesce(string_agg(a::text, ' ' ORDER BY a::text), '') FROM of_now.a`) == want, nil
				})
				verify(t, s.openLog())
				return
			}
			s.once()
			verify(t, s.openLog())
			s.says(0, "", "checkout", "--at", "HEAD", "--schema", "of_now", "--replace", "a")
			have, want := db.rows(`SELECT a::text FROM of_now.a ORDER BY 1`), db.rows(`SELECT a::text FROM a ORDER BY 1`)
			if fmt.Sprint(have) != fmt.Sprint(want) {
				t.Errorf("the log has\n%v, the source\n%v", have, want)
			}
		})
	}
}

// TestRowsNamedByAnotherIndex: what the stream tells of a row by another index than before is found in the log, although its events of before do not
// have that name; what happens before this is noticed is put right.
func TestRowsNamedByAnotherIndex(t *testing.T) {
	t.Parallel()
	const byN = `CREATE UNIQUE INDEX an ON a (n); ALTER TABLE a ALTER n SET NOT NULL; ALTER TABLE a REPLICA IDENTITY USING INDEX an`
	const byM = `CREATE UNIQUE INDEX am ON a (m); ALTER TABLE a ALTER m SET NOT NULL; ALTER TABLE a REPLICA IDENTITY USING INDEX am`
	const some = `DELETE FROM a WHERE id = 5; UPDATE a SET id = 103 WHERE id = 3; UPDATE a SET v = 'x' WHERE id = 2; UPDATE a SET n = 44, id = 104 WHERE id = 4`
	const all = `UPDATE a SET id = id + 1000; DELETE FROM a WHERE n = 2`
	for i, c := range []struct {
		what string
		then []string
	}{
		{"noticed at once", []string{byN, look, some, look, all}},
		{"noticed later", []string{byN, some, look, all}},
		{"in one transaction", []string{`BEGIN; UPDATE a SET v = 'x' WHERE id = 1; ` + byN + `; ` + some + `; COMMIT`, look, all}},
		{"keys that other rows take", []string{byN, `UPDATE a SET id = 103 WHERE id = 3; UPDATE a SET id = 3 WHERE id = 4; INSERT INTO a VALUES (4, 'new', 77)`, look, all}},
		{"FULL before", []string{`ALTER TABLE a REPLICA IDENTITY FULL`, `UPDATE a SET v = v || 'x'`, look, byN, some, look, all}},
		{"values that the other index had", []string{`UPDATE a SET m = 7 - n`, byN, look, `UPDATE a SET v = v || 'x'`, byM, some, look, all}},
		{"there and back", []string{byN, look, `ALTER TABLE a REPLICA IDENTITY DEFAULT; UPDATE a SET n = n + 10`, look, `ALTER TABLE a REPLICA IDENTITY USING INDEX an`, some, look, all}},
		{"the key's index before", []string{`CREATE UNIQUE INDEX ai ON a (id); ALTER TABLE a REPLICA IDENTITY USING INDEX ai`, `UPDATE a SET v = 'x'`, look, byN, some, look, all}},
		{"another key later", []string{`UPDATE a SET m = 7 - n; ALTER TABLE a ALTER m SET NOT NULL`, byN, look, `ALTER TABLE a DROP CONSTRAINT a_pkey, ADD PRIMARY KEY (m)`, some, `UPDATE a SET m = 101 WHERE n = 1`, look, `UPDATE a SET m = m + 1000`}},
		{"of two columns", []string{`CREATE UNIQUE INDEX av ON a (v, n); ALTER TABLE a ALTER n SET NOT NULL, ALTER v SET NOT NULL; ALTER TABLE a REPLICA IDENTITY USING INDEX av`, some, look, all}},
	} {
		t.Run(c.what, func(t *testing.T) { t.Parallel(); sameAfter(t, i, c.then) })
	}
}

// TestColumnsThatSwapNames: each value is of the column that had the name when its row was written, in the transaction itself in which the names are swapped too.
func TestColumnsThatSwapNames(t *testing.T) {
	t.Parallel()
	const swap = `ALTER TABLE a RENAME n TO t; ALTER TABLE a RENAME m TO n; ALTER TABLE a RENAME t TO m`
	const swapKey = `ALTER TABLE a RENAME id TO t; ALTER TABLE a RENAME n TO id; ALTER TABLE a RENAME t TO n`
	const first, later = `UPDATE a SET m = id * 1000 WHERE id < 4`, `UPDATE a SET v = 'q' WHERE id = 2; UPDATE a SET m = -5 WHERE id = 5`
	for i, c := range []struct {
		what string
		then []string
	}{
		{"rows before", []string{`BEGIN; ` + first + `; ` + swap + `; COMMIT`, look, `UPDATE a SET v = 'x' WHERE id = 1`}},
		{"rows before and after", []string{`BEGIN; ` + first + `; ` + swap + `; ` + later + `; COMMIT`, look, `UPDATE a SET v = 'x' WHERE id = 1`}},
		{"swapped in a subtransaction", []string{`BEGIN; ` + first + `; SAVEPOINT s; ` + swap + `; RELEASE s; ` + later + `; COMMIT`, look, `UPDATE a SET v = 'x' WHERE id = 1`}},
		{"rows of a subtransaction", []string{`BEGIN; SAVEPOINT s; ` + first + `; RELEASE s; ` + swap + `; ` + later + `; COMMIT`, look, `UPDATE a SET v = 'x' WHERE id = 1`}},
		{"and back again", []string{`BEGIN; ` + first + `; ` + swap + `; ` + later + `; COMMIT`, `UPDATE a SET m = -6 WHERE id = 6`, swap, `UPDATE a SET m = -2 WHERE id = 2`, look, `UPDATE a SET v = 'x' WHERE id = 1`}},
		{"with the key", []string{`BEGIN; UPDATE a SET n = n + 100; ` + swapKey + `; UPDATE a SET v = 'post' WHERE n = 2; COMMIT`, look, `UPDATE a SET v = 'x' WHERE n = 1`}},
		{"with the key, in a subtransaction", []string{`BEGIN; UPDATE a SET n = n + 100; SAVEPOINT s; ` + swapKey + `; RELEASE s; UPDATE a SET v = 'post' WHERE n = 2; COMMIT`, look, `UPDATE a SET v = 'x' WHERE n = 1`}},
		{"a new one that takes a dropped one's name", []string{`BEGIN; ` + first + `; ALTER TABLE a DROP n; ALTER TABLE a ADD n int DEFAULT 7; INSERT INTO a (id, v, n) VALUES (7, 'g', 60); COMMIT`, `ALTER TABLE a RENAME n TO z`, look, `UPDATE a SET v = 'x' WHERE id = 1`}},
		{"the same, while another one comes", []string{`BEGIN; ALTER TABLE a DROP n; ALTER TABLE a ADD n int DEFAULT 7; UPDATE a SET v = 'b' WHERE id = 2; INSERT INTO a (id, v, n) VALUES (7, 'g', 60); COMMIT`,
			`ALTER TABLE a ADD x int DEFAULT 5`, `ALTER TABLE a RENAME n TO z`, look, `UPDATE a SET v = 'x' WHERE id = 1`}},
		{"one that takes a dropped one's name", []string{`BEGIN; ` + first + `; ALTER TABLE a DROP n; ALTER TABLE a RENAME m TO n; UPDATE a SET n = -2 WHERE id = 2; COMMIT`, look, `UPDATE a SET v = 'x' WHERE id = 1`}},
	} {
		t.Run(c.what, func(t *testing.T) { t.Parallel(); sameAfter(t, i, c.then) })
	}
}

// TestDefaultOfAColumnRenamedInABacklog: a column that has another name by the time the stream tells of it, and beside which one of its type has come, is the
// one that it was: rows of before it was added have its default.
func TestDefaultOfAColumnRenamedInABacklog(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things SELECT i, 'a' FROM generate_series(1, 3) i`)
	s.init()
	s.once()
	db.do(`ALTER TABLE public.things ADD n int DEFAULT 7`)
	s.once()
	db.do(`UPDATE public.things SET v = 'b' WHERE id = 1`)
	s.once()
	db.do(`UPDATE public.things SET v = 'c' WHERE id = 1`)
	db.do(`ALTER TABLE public.things ADD x int; ALTER TABLE public.things RENAME n TO z`)
	s.once()
	s.once()
	s.sameRows("things")
	at := s.logSQL().one(`SELECT max(position) FROM backstory.events WHERE type = 'ThingUpdated'`)
	s.says(0, "", "checkout", "--partial", "--at", at, "--schema", "past", "--database", s.cfg.Capture.URL)
	if got := db.one(`SELECT string_agg(concat_ws(' ', id, v, n), ', ' ORDER BY id) FROM past.things`); got != "1 c 7, 2 a 7, 3 a 7" {
		t.Errorf("at %s the rows were %s", at, got)
	}
}

// TestNamedByAnotherIndexForAMoment: the catalogue is as it was when the sidecar looks next, but meanwhile the stream has told of rows by a name that the log does
// not know, or by another key.
func TestNamedByAnotherIndexForAMoment(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]struct{ there, back string }{
		"identity": {`ALTER TABLE public.things REPLICA IDENTITY USING INDEX things_u`, `ALTER TABLE public.things REPLICA IDENTITY DEFAULT`},
		"key":      {`ALTER TABLE public.things DROP CONSTRAINT things_pkey, ADD CONSTRAINT things_pkey PRIMARY KEY (u)`, `ALTER TABLE public.things DROP CONSTRAINT things_pkey, ADD CONSTRAINT things_pkey PRIMARY KEY (id)`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			db := s.sql()
			db.do(`CREATE TABLE public.things (id int NOT NULL CONSTRAINT things_pkey PRIMARY KEY, u int NOT NULL, v text, w text); CREATE UNIQUE INDEX things_u ON public.things (u); ALTER TABLE public.things ALTER w SET STORAGE EXTERNAL`)
			db.do(`INSERT INTO public.things SELECT i, 100 + i, 'a', repeat('w', 4000) FROM generate_series(1, 9) i`)
			s.init()
			s.once()
			run := s.start()
			eventually(t, time.Minute, "it streams", func() (bool, error) { err := run.sc.Ready(); return err == nil, err })
			db.do("%s", x.there)
			db.do(`DELETE FROM public.things WHERE id = 2; UPDATE public.things SET id = 33 WHERE id = 3; UPDATE public.things SET v = 'b', w = repeat('x', 5000) WHERE id = 4; UPDATE public.things SET u = 155 WHERE id = 5`)
			db.do("%s", x.back)
			db.do(`UPDATE public.things SET v = 'c' WHERE id IN (4, 6)`)
			time.Sleep(100 * time.Millisecond)
			if err := run.end(); err != nil {
				t.Fatal(err)
			}
			s.once()
			s.once()
			l := s.openLog()
			s.equalsTables(db, l)
			verify(t, l)
		})
	}
}

// TestKeyGoneForAMoment: a table has the key that it had when the sidecar looks next, but meanwhile several rows may have had the same one, which nobody
// can tell apart by what the stream says of them.
func TestKeyGoneForAMoment(t *testing.T) {
	t.Parallel()
	const full = `ALTER TABLE a REPLICA IDENTITY FULL`
	const byN = `CREATE UNIQUE INDEX an ON a (n); ALTER TABLE a ALTER n SET NOT NULL; ALTER TABLE a REPLICA IDENTITY USING INDEX an`
	const gone, back = `ALTER TABLE a DROP CONSTRAINT a_pkey`, `ALTER TABLE a ADD PRIMARY KEY (id)`
	const deferred = `ALTER TABLE a DROP CONSTRAINT a_pkey, ADD PRIMARY KEY (id) DEFERRABLE INITIALLY DEFERRED`
	const shift, twice = `UPDATE a SET id = id + 1`, `INSERT INTO a VALUES (1, 'new', 77); DELETE FROM a WHERE v = 'a1'`
	for i, c := range []struct {
		what string
		then []string
	}{
		{"FULL", []string{full, look, gone, shift, back}},
		{"FULL, in one transaction", []string{full, look, `BEGIN; ` + gone + `; ` + shift + `; ` + back + `; COMMIT`}},
		{"another row has it", []string{full, look, gone, twice, back}},
		{"another row has it, in one transaction", []string{full, look, `BEGIN; ` + gone + `; ` + twice + `; ` + back + `; COMMIT`}},
		{"deferrable", []string{full, look, `BEGIN; ` + deferred + `; ` + shift + `; SET CONSTRAINTS ALL IMMEDIATE; ` + gone + `, ADD PRIMARY KEY (id); COMMIT`}},
		{"USING INDEX", []string{byN, look, gone, shift, back}},
		{"USING INDEX, in one transaction", []string{byN, look, `BEGIN; ` + gone + `; ` + shift + `; ` + back + `; COMMIT`}},
		{"FULL as long as that", []string{look, `BEGIN; ` + gone + `; ` + full + `; ` + shift + `; ` + back + `; ALTER TABLE a REPLICA IDENTITY DEFAULT; COMMIT`}},
		{"the other index", []string{byN, look, full, `DROP INDEX an; UPDATE a SET n = 7 - n`, byN, `UPDATE a SET v = 'x', id = id + 100 WHERE n < 3; DELETE FROM a WHERE n = 4`}},
	} {
		t.Run(c.what, func(t *testing.T) { t.Parallel(); sameAfter(t, i, c.then) })
	}
}
