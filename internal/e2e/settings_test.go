package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// TestValueTooLargeToSend: a value, or a row, whose text is longer than 1 GB is sent to nobody: a gap. Once that is accepted, the other tables are healed, and the changes of
// this one are captured; that its rows cannot be read, and what to do, is said, until they can.
func TestValueTooLargeToSend(t *testing.T) {
	s := newSystem(t, where{own: true})
	db := s.sql()
	db.do(`CREATE TABLE public.blobs (id int PRIMARY KEY, x bytea, y bytea, z bytea); CREATE TABLE public.others (id int PRIMARY KEY, v text)`)
	s.init()
	db.do(`INSERT INTO public.blobs VALUES (1, 'x'), (9, 'z'); INSERT INTO public.others VALUES (1, 'a')`)
	s.once()
	l := s.logSQL()
	for i, large := range []string{`(id, x) SELECT 2, convert_to(repeat('a', 512 << 20), 'UTF8')`, `(id, y, z) SELECT 2, v, v FROM convert_to(repeat('a', 256 << 20), 'UTF8') v`} {
		db.do(`INSERT INTO public.blobs %s`, large)
		db.do(`UPDATE public.others SET v = 'missed %d'`, i)
		s.gapFound("a value that is too large", "too large for the source itself to send")
		if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
			t.Fatal(err)
		}
		r := s.start()
		db.do(`INSERT INTO public.blobs VALUES (%d, 'y')`, 20+i)
		eventually(t, time.Minute, "the rest goes on, and it is said what does not", func() (bool, error) {
			st, err := r.sc.Status(t.Context())
			if err != nil {
				return false, err
			}
			got := written(st.Findings())
			return l.one(`SELECT string_agg(name, ' ') FROM backstory.captured WHERE complete`) == "others" && l.one(`SELECT count(*) FROM backstory.events WHERE type = 'BlobCreated' AND aggregate_id = '%d'`, 20+i) == "1" &&
				strings.Contains(got, "the rows of public.blobs are not compared with the log's: a row of \"public\".\"blobs\" is too large for the source itself to print") && strings.Contains(got, "→ Make its values smaller"), fmt.Errorf("%s", got)
		})
		if err := r.end(); err != nil {
			t.Fatal(err)
		}
		s.says(1, "too large for the source itself to print", "run", "--once")
		db.do(`UPDATE public.blobs SET x = 'smaller', y = NULL, z = NULL WHERE id = 2`)
		s.once()
		s.equalsTables(db, s.openLog())
		db.do(`DROP SCHEMA of_now CASCADE; DELETE FROM public.blobs WHERE id = 2`)
		s.once()
	}
}

// TestSettingsChangeNoValue: roles and databases may have settings that change what Postgres prints, and limits on how long a
// session may take.
func TestSettingsChangeNoValue(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true})
	db := s.sql()
	db.do(`CREATE SCHEMA app; CREATE TYPE app.mood AS ENUM ('so so'); CREATE TABLE public.odd (id int PRIMARY KEY, i interval, m money, b bytea, f float8, t timestamptz, d date, r regclass, q regtype, e app.mood, n numeric, v text, a text[], doc xml)`)
	const insert = `INSERT INTO public.odd VALUES (%d, '1 year 2 mons -3 days 04:05:06.7', 1234.5, '\x00ff', 0.1::float8 + 0.2::float8, '2026-11-26 01:02:03.04+09', '2026-11-05', 'pg_class', 'app.mood', 'so so', 1.10, E'ä € \\ '' "', ARRAY[NULL, 'NULL', E'\\'], 'text<a/>')`
	db.do(insert, 1) // an existing row
	// A locale that prints money in another way is not on every machine.
	locale := "POSIX"
	for _, l := range []string{"de_DE.utf8", "ja_JP.utf8"} {
		if _, err := db.Exec(t.Context(), `SET lc_monetary = '`+l+`'; RESET lc_monetary`); err == nil {
			locale = l
		}
	}
	for _, server := range []struct {
		db   *session
		name string
	}{{db, databaseOf(t, s.cfg.Capture.URL)}, {s.logSQL(), databaseOf(t, s.cfg.Log.URL)}} {
		for _, set := range []string{`search_path = app, public`, `quote_all_identifiers = on`, `IntervalStyle = 'iso_8601'`, `DateStyle = 'SQL, DMY'`, `TimeZone = 'Asia/Tokyo'`,
			`extra_float_digits = -5`, `bytea_output = 'escape'`, `synchronous_commit = off`, `statement_timeout = '300ms'`, `lock_timeout = '300ms'`,
			`idle_in_transaction_session_timeout = '300ms'`, `idle_session_timeout = '300ms'`, `row_security = on`, `array_nulls = off`, `default_transaction_isolation = 'serializable'`, `client_encoding = 'LATIN1'`,
			`standard_conforming_strings = off`, `backslash_quote = off`, `xmloption = document`, `lc_monetary = '` + locale + `'`} {
			server.db.do(`ALTER ROLE postgres SET %s`, set)
			server.db.do(`ALTER DATABASE %s SET %s`, server.name, set)
		}
	}
	s.init()
	r := s.start()
	eventually(t, time.Minute, "it streams", func() (bool, error) { err := r.sc.Ready(); return err == nil, err })
	time.Sleep(time.Second) // in which every session is idle
	db.do(insert, 2)
	db.do(`UPDATE public.odd SET f = 1.0 / 3, i = i * 2, t = t + interval '1 us' WHERE id = 2`)
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	checkLog(t, s.openLog(), "public.odd").sameTables(t, db, "n.nspname = 'public'")
	s.says(0, "", "checkout", "--partial", "--at", "HEAD", "--schema", "of_now", "--database", s.cfg.Capture.URL, "odd")
	if got := db.rows(`SELECT (SELECT string_agg(concat_ws(' ', pg_typeof(doc), o::text), ' ' ORDER BY id) FROM of_now.odd o) AS now, (SELECT string_agg(concat_ws(' ', pg_typeof(doc), o::text), ' ' ORDER BY id) FROM public.odd o) AS want`); got[0][0] != got[0][1] {
		t.Errorf("checked out: %s\nwant %s", got[0][0], got[0][1])
	}
	conn, err := s.cfg.Capture.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	var got string
	if err := conn.QueryRow(t.Context(), `SHOW lc_monetary`).Scan(&got); err != nil || got != "C" {
		t.Errorf("lc_monetary is %s (%v)", got, err)
	}
	l := s.logSQL()
	l.do(`SET client_encoding = 'UTF8'; SET statement_timeout = 0`)
	for _, got := range l.rows(`SELECT data::jsonb ->> 'id', data FROM backstory.events WHERE op IN ('import', 'insert')`) {
		want := `{"id":` + got[0] + `,"i":"1 year 2 mons -3 days +04:05:06.7","m":"$1,234.50","b":"\\x00ff","f":0.30000000000000004,"t":"2026-11-25T16:02:03.04Z","d":"2026-11-05","r":"pg_class","q":"app.mood","e":"so so","n":"1.10","v":"ä € \\ ' \"","a":[null,"NULL","\\"],"doc":"text<a/>"}`
		if got[1] != want {
			t.Errorf("the log has %s\nwant %s", got[1], want)
		}
	}
}

// TestTransactionTimeout: a limit for transactions, which a role or a database may have from 17 on, does not end a stream in the middle of one that takes
// longer to decode.
func TestTransactionTimeout(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, version: pgservertest.AtLeast("17")})
	db := s.sql()
	db.do(simple)
	db.do(`ALTER DATABASE %s SET transaction_timeout = '100ms'`, databaseOf(t, s.cfg.Capture.URL))
	s.init()
	db.do(`INSERT INTO public.things SELECT i, repeat('x', 500) FROM generate_series(1, 200000) i`)
	s.once()
	if got := s.logSQL().one(`SELECT position FROM backstory.head`); got != "200000" {
		t.Errorf("the log has %s events", got)
	}
}

// TestSourceNeverSpillsForUs: the source decodes the log's own transactions, too, where they are in its database, and what does not fit
// into logical_decoding_work_mem goes to its disk, which no limit on WAL covers. After a backlog of small transactions there is nothing
// to spill, whatever the log has made of it.
func TestSourceNeverSpillsForUs(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true})
	db := s.sql()
	db.do(simple)
	s.init()
	const n = 200_000
	db.do(`SET synchronous_commit = off`)
	db.do(`DO $$ BEGIN FOR i IN 1..%d LOOP INSERT INTO public.things VALUES (i, md5(i::text)); COMMIT; END LOOP; END $$`, n)
	spilled := func(why string, want bool) {
		t.Helper()
		eventually(t, 20*time.Second, why, func() (bool, error) { // what a walsender has counted comes with a delay
			rows := db.rows(`SELECT total_txns, spill_txns, spill_bytes FROM pg_stat_replication_slots WHERE slot_name = '%s'`, s.cfg.Capture.Slot)
			if len(rows) != 1 {
				return false, errors.New("no statistics")
			}
			return atoi(t, rows[0][0]) > n && (atoi(t, rows[0][1]) > 0) == want, fmt.Errorf("of %s transactions, %s were spilled, %s bytes", rows[0][0], rows[0][1], rows[0][2])
		})
	}
	s.once()
	s.once() // this one passes what the one before has written
	if got := db.one(`SELECT count(*) FROM backstory.event`); got != fmt.Sprint(n) {
		t.Errorf("the log has %s events", got)
	}
	spilled("nothing is spilled", false)
	// It would have been counted.
	db.do(`ALTER TABLE public.things ALTER v SET STORAGE PLAIN`)
	db.do(`INSERT INTO public.things SELECT i, repeat(md5(i::text), 100) FROM generate_series(%d, %d) i`, n+1, n+40_000)
	s.once()
	spilled("a large transaction is spilled", true)
}
