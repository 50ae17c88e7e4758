package e2e

import (
	"strings"
	"testing"
	"time"
)

// TestExistingRowsInOtherOrders: the index of a key may sort in another way than its columns do: by another collation, another operator class,
// downwards. Rows are read, and found again after a gap, as the index has them.
func TestExistingRowsInOtherOrders(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.Capture.BaselineChunkBytes = 1 // a row is a chunk
	db := s.sql()
	db.do(`SET search_path = public; CREATE SCHEMA "Other"; CREATE COLLATION "Other".ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
		CREATE TABLE descending (a int NOT NULL, b text NOT NULL, v text); CREATE UNIQUE INDEX di ON descending (a DESC, b); ALTER TABLE descending REPLICA IDENTITY USING INDEX di;
		CREATE TABLE pattern (b text NOT NULL, v text); CREATE UNIQUE INDEX pi ON pattern (b text_pattern_ops); ALTER TABLE pattern REPLICA IDENTITY USING INDEX pi;
		CREATE TABLE nocase (b text COLLATE "Other".ci PRIMARY KEY, v text);
		CREATE TABLE bytes (b text COLLATE "Other".ci NOT NULL, v text); CREATE UNIQUE INDEX cc ON bytes (b COLLATE "C"); ALTER TABLE bytes REPLICA IDENTITY USING INDEX cc;
		CREATE TABLE two (a text COLLATE "C" NOT NULL, b text COLLATE "Other".ci NOT NULL, v text); CREATE UNIQUE INDEX tt ON two (a COLLATE "Other".ci, b COLLATE "C"); ALTER TABLE two REPLICA IDENTITY USING INDEX tt;
		INSERT INTO descending SELECT i, j::text, 'x' FROM generate_series(1, 4) i, generate_series(1, 4) j;
		INSERT INTO pattern SELECT x, 'x' FROM unnest(ARRAY['a', 'B', 'b', 'A', 'ä', '-a', ' a', 'z']) x;
		INSERT INTO nocase SELECT x, 'x' FROM unnest(ARRAY['a', 'B', 'ä', '-a', ' a', 'z']) x;
		INSERT INTO bytes SELECT x, 'x' FROM unnest(ARRAY['a', 'A', 'B', 'b', 'z']) x;
		INSERT INTO two SELECT x, y, 'x' FROM unnest(ARRAY['a', 'B', 'c']) x, unnest(ARRAY['a', 'A', 'B', 'b']) y`)
	names := []string{"descending", "pattern", "nocase", "bytes", "two"}
	unseen := []string{"public.descending", "public.pattern", "public.nocase", "public.bytes", "public.two"}
	s.init()
	db.do(`UPDATE nocase SET b = 'A' WHERE b = 'a'; UPDATE nocase SET v = 'y' WHERE b = 'Z'`)
	s.once()
	checkLog(t, s.openLog(), unseen...).sameTables(t, db, "n.nspname = 'public'")
	s.sameRows(names...)

	s.gapAfter(db, func() {
		db.do(`DELETE FROM bytes WHERE b COLLATE "C" = 'a'; DELETE FROM two WHERE b COLLATE "C" = 'A'; DELETE FROM descending WHERE a = b::int; UPDATE pattern SET v = 'y'; UPDATE nocase SET b = 'Z' WHERE b = 'z'`)
	})
	s.once()
	checkLog(t, s.openLog(), unseen...).sameTables(t, db, "n.nspname = 'public'")
	s.sameRows(names...)
	if got := s.complete(); got != "bytes descending nocase pattern two" {
		t.Errorf("complete: %s", got)
	}
}

// gapAfter loses the slot, and what is written then.
func (s *system) gapAfter(db *session, missed func()) {
	s.t.Helper()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	missed()
	s.says(1, "gap", "run", "--once")
	s.says(0, "", "init", "--accept-gap")
}

// TestExistingRowsWithoutOverlaps: a key of PostgreSQL 18 whose ranges must not overlap has an index that sorts nothing. The types of its columns
// have an order all the same.
func TestExistingRowsWithoutOverlaps(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, version: "18"})
	s.cfg.Capture.BaselineChunkBytes = 1
	db := s.sql()
	db.do(`SET search_path = public; CREATE EXTENSION btree_gist; CREATE DOMAIN code AS varchar(9); CREATE TYPE mood AS ENUM ('z', 'a');
		CREATE TABLE prices (id int, during daterange, v text, PRIMARY KEY (id, during WITHOUT OVERLAPS));
		CREATE TABLE moods (k code, m mood, during datemultirange, v text, PRIMARY KEY (k, m, during WITHOUT OVERLAPS));
		CREATE TABLE other (id varchar NOT NULL, during daterange NOT NULL, v text, UNIQUE (id, during WITHOUT OVERLAPS)); ALTER TABLE other REPLICA IDENTITY USING INDEX other_id_during_key;
		CREATE TABLE orderless (id inet, during daterange, v text, PRIMARY KEY (id, during WITHOUT OVERLAPS));
		INSERT INTO prices SELECT i, daterange('2026-01-01'::date + j * 10, '2026-01-01'::date + j * 10 + 10), 'a' FROM generate_series(1, 4) i, generate_series(0, 3) j;
		INSERT INTO moods SELECT i, m, datemultirange(daterange('2026-01-01'::date + j * 10, '2026-01-01'::date + j * 10 + 10)), 'a' FROM generate_series(1, 2) i, generate_series(0, 2) j, unnest(enum_range(NULL::mood)) m;
		INSERT INTO other SELECT i, daterange('2026-01-01'::date + j * 10, NULLIF('2026-01-01'::date + j * 10 + 10, '2026-01-31')), 'a' FROM generate_series(1, 3) i, generate_series(0, 2) j;
		INSERT INTO orderless VALUES ('::1', '[2026-01-01,2026-02-01)'), ('1.2.3.4', '[2026-01-01,2026-02-01)');
		UPDATE pg_opclass SET opcdefault = false WHERE opcmethod = (SELECT oid FROM pg_am WHERE amname = 'btree') AND opcintype = 'inet'::regtype`)
	s.init()
	db.do(`UPDATE prices SET v = 'b' WHERE id = 2; DELETE FROM prices WHERE id = 3; UPDATE prices SET during = '[2027-01-01,2027-02-01)' WHERE id = 4 AND during @> '2026-01-05'::date; UPDATE other SET v = 'b' WHERE id = '2'`)
	// What has no order at all keeps nothing else up.
	if err := s.tryOnce(); err == nil || !strings.Contains(err.Error(), `there is none for inet, the type of "id"`) {
		t.Errorf("without an order: %v", err)
	}
	if got := s.complete(); got != "moods other prices" {
		t.Errorf("complete: %s", got)
	}
	db.do(`UPDATE pg_opclass SET opcdefault = true WHERE opcname = 'inet_ops' AND opcmethod = (SELECT oid FROM pg_am WHERE amname = 'btree')`)
	s.once()
	names := []string{"prices", "moods", "other", "orderless"}
	unseen := []string{"public.prices", "public.moods", "public.other", "public.orderless"}
	checkLog(t, s.openLog(), unseen...).sameTables(t, db, "n.nspname = 'public'")
	s.sameRows(names...)

	s.gapAfter(db, func() {
		db.do(`DELETE FROM prices WHERE id = 1; UPDATE moods SET v = 'c' WHERE m = 'z'; DELETE FROM other WHERE during @> '2026-01-15'::date; INSERT INTO other VALUES ('9', '[2026-01-01,)', 'd'); DELETE FROM orderless WHERE id = '::1'`)
	})
	s.once()
	checkLog(t, s.openLog(), unseen...).sameTables(t, db, "n.nspname = 'public'")
	s.sameRows(names...)
	if got := s.complete(); got != "moods orderless other prices" {
		t.Errorf("complete: %s", got)
	}
	p := s.command(true, "checkout", "--at", "HEAD", "--schema", "of_now", "prices")
	if p.wait(time.Minute) != 0 || db.one(`SELECT count(*) FROM of_now.prices`) != db.one(`SELECT count(*) FROM public.prices`) {
		t.Errorf("checkout:\n%s", p.out)
	}
}
