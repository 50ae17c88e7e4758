package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
)

// without gives the words of one text that another does not have.
func without(a, b string) (out []string) {
	for _, w := range strings.Fields(a) {
		if !slices.Contains(strings.Fields(b), w) {
			out = append(out, w)
		}
	}
	return out
}

// TestPartitions: the rows of partitions are those of their partitioned table, at every moment: also those of a table that was attached, and
// not those of one that was detached, or dropped. Their events are those of one aggregate.
func TestPartitions(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.orders (id int, at date, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
		CREATE TABLE public.orders_1 PARTITION OF public.orders FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
		CREATE TABLE public.orders_2 (v text, gone int, at date NOT NULL, id int NOT NULL, PRIMARY KEY (id, at)); ALTER TABLE public.orders_2 DROP gone;
		ALTER TABLE public.orders ATTACH PARTITION public.orders_2 FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
		CREATE TABLE public.orders_3 PARTITION OF public.orders FOR VALUES FROM ('2026-03-01') TO ('2026-05-01') PARTITION BY HASH (id);
		CREATE TABLE public.orders_3_0 PARTITION OF public.orders_3 FOR VALUES WITH (MODULUS 2, REMAINDER 0); CREATE TABLE public.orders_3_1 PARTITION OF public.orders_3 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
		CREATE TABLE public.apart (id int, at date, v text, PRIMARY KEY (id, at));
		CREATE TABLE public.events (v text, n int) PARTITION BY LIST (n); CREATE TABLE public.events_0 PARTITION OF public.events FOR VALUES IN (0); CREATE TABLE public.events_1 PARTITION OF public.events FOR VALUES IN (1);
		ALTER TABLE public.events_0 REPLICA IDENTITY FULL; ALTER TABLE public.events_1 REPLICA IDENTITY FULL;
		INSERT INTO public.orders SELECT i, date '2026-01-01' + i, 'a' FROM generate_series(0, 99) i; INSERT INTO public.apart SELECT i, '2026-06-01', 'b' FROM generate_series(200, 210) i;
		INSERT INTO public.events SELECT 'x', i %% 2 FROM generate_series(1, 9) i`)
	s.init()
	const contents = `SELECT (SELECT string_agg(o::text, ' ' ORDER BY id, at) FROM %[1]s.orders o) || ' / ' || (SELECT string_agg(e::text, ' ' ORDER BY v, n) FROM %[1]s.events e)`
	type moment struct{ position, contents string }
	var moments []moment
	r := s.start()
	s.baselineDone()
	step := func(what, sql, event string) {
		t.Helper()
		before := db.one(`SELECT position FROM backstory.head`)
		db.do("%s", sql)
		eventually(t, time.Minute, what+" is in the log", func() (bool, error) {
			types := db.one(`SELECT coalesce(string_agg(DISTINCT type, ' ' ORDER BY type), '') FROM backstory.events WHERE position > %s`, before)
			return strings.Contains(types, event), fmt.Errorf("%s", types)
		})
		moments = append(moments, moment{db.one(`SELECT position FROM backstory.head`), db.one(contents, "public")})
	}
	step("existing rows", `UPDATE public.orders SET v = 'c' WHERE id = 1`, "OrderUpdated")
	step("a moved row", `UPDATE public.orders SET at = '2026-02-10', v = 'moved' WHERE id = 2; UPDATE public.events SET n = 1 WHERE ctid = (SELECT min(ctid) FROM public.events_0)`, "EventCreated")
	step("an attached table", `ALTER TABLE public.orders ATTACH PARTITION public.apart FOR VALUES FROM ('2026-06-01') TO ('2026-07-01')`, "OrderAltered")
	step("a change in it", `UPDATE public.orders SET v = 'd' WHERE id = 201; DELETE FROM public.orders WHERE id = 202`, "OrderDeleted")
	step("TRUNCATE of a partition", `TRUNCATE public.orders_3_0`, "OrderTruncated")
	step("a detached partition", `ALTER TABLE public.orders DETACH PARTITION public.orders_1`, "Orders1Altered")
	step("a change in what was detached", `UPDATE public.orders_1 SET v = 'e' WHERE id = 5; INSERT INTO public.orders VALUES (500, '2026-02-15', 'f')`, "OrderCreated")
	step("a dropped partition", `DROP TABLE public.orders_2`, "OrderPartitionDropped")
	step("a new partition", `CREATE TABLE public.orders_4 PARTITION OF public.orders FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')`, "")
	eventually(t, time.Minute, "the new partition is captured", func() (bool, error) {
		return db.one(`SELECT count(*) FROM backstory.captured WHERE name = 'orders_4' AND complete`) == "1", nil
	})
	step("a row in it", `INSERT INTO public.orders VALUES (600, '2026-01-15', 'g')`, "OrderCreated")
	step("another name", `ALTER TABLE public.orders RENAME TO purchases; ALTER TABLE public.purchases RENAME TO orders; DROP TABLE public.orders_1`, "Orders1Dropped")
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	for i, m := range moments {
		s.says(0, "", "checkout", "--at", m.position, "--schema", "past", "--replace", "orders", "events")
		if got := db.one(contents, "past"); got != m.contents {
			t.Errorf("at moment %d the log has too much: %v, and lacks %v", i, without(got, m.contents), without(m.contents, got))
		}
	}
	if got := db.one(`SELECT string_agg(DISTINCT concat_ws(' ', aggregate, relation, partition), ', ' ORDER BY concat_ws(' ', aggregate, relation, partition)) FROM backstory.events WHERE op = 'import'`); got !=
		"Apart public.apart, Event public.events public.events_0, Event public.events public.events_1, Order public.orders public.orders_1, Order public.orders public.orders_2, Order public.orders public.orders_3_0, Order public.orders public.orders_3_1" {
		t.Errorf("imported: %s", got)
	}
	s.says(1, "OrderPartitionDropped", "show", "orders/40,2026-02-10")
	s.says(1, "public.orders_1 has been dropped by then", "checkout", "--at", "HEAD", "--schema", "past", "orders_1")
	s.says(0, "OrderDeleted", "log", "orders/2,2026-01-03")
	// TRUNCATE of one partition ends its rows, and not those of others.
	for row, ended := range map[string]bool{`orders/60,2026-03-02`: true, `orders/61,2026-03-03`: false, `orders/201,2026-06-01`: false} {
		for verb, says := range map[string]string{"log": "[only the rows of public.orders_3_0]", "show": "was not there"} {
			p := s.command(true, verb, row)
			p.wait(time.Minute)
			if strings.Contains(p.out.String(), says) != ended {
				t.Errorf("backstory %s %s, of a row that TRUNCATE ended: %v: %s", verb, row, ended, strings.ReplaceAll(p.out.String(), "\n", " | "))
			}
		}
	}
	s.says(0, "", "checkout", "--at", moments[0].position, "--schema", "part", "orders_2")
	if got := db.one(`SELECT count(*) FROM part.orders_2`); got != "28" {
		t.Errorf("%s rows in one partition", got)
	}
	verify(t, s.openLog())
}

// TestRowsGivenBackToAPartitionedTable: a checkout of a partitioned table has its columns in its own order, not in that of a partition, whichever of these was
// described last: INSERT … SELECT * gives the rows back as they were.
func TestRowsGivenBackToAPartitionedTable(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.contact (gone int, id int PRIMARY KEY, first text, whole text GENERATED ALWAYS AS (first || ' ' || last) STORED, last text) PARTITION BY RANGE (id); ALTER TABLE public.contact DROP gone;
		CREATE TABLE public.contact_1 (last text, id int NOT NULL, whole text GENERATED ALWAYS AS (first || ' ' || last) STORED, first text); ALTER TABLE public.contact ATTACH PARTITION public.contact_1 FOR VALUES FROM (0) TO (100);
		INSERT INTO public.contact (id, first, last) VALUES (1, 'f', 'l')`)
	s.init()
	s.once()
	contents := func(at, want string) {
		t.Helper()
		s.says(0, "", "checkout", "--at", at, "--schema", "past", "--replace", "contact")
		if got := db.one(`SELECT (SELECT string_agg(attname, ',' ORDER BY attnum) FROM pg_attribute WHERE attrelid = 'past.contact'::regclass AND attnum > 0) || ' ' || string_agg(c::text, ' ' ORDER BY id) FROM past.contact c`); got != want {
			t.Errorf("at %s: %s, want %s", at, got, want)
		}
	}
	const first = "id,first,whole,last (1,f,\"f l\",l)"
	contents("HEAD", first)
	at := db.one(`SELECT position FROM backstory.head`)
	db.do(`CREATE TABLE public.contact_2 (first text, whole text GENERATED ALWAYS AS (first || ' ' || last) STORED, last text, id int NOT NULL); ALTER TABLE public.contact ATTACH PARTITION public.contact_2 FOR VALUES FROM (100) TO (200);
		INSERT INTO public.contact (id, first, last) VALUES (101, 'F', 'L')`)
	s.init()
	s.once()
	contents("HEAD", first+" (101,F,\"F L\",L)")
	db.do(`ALTER TABLE public.contact RENAME first TO given; ALTER TABLE public.contact RENAME last TO first; ALTER TABLE public.contact RENAME given TO last; ALTER TABLE public.contact ADD since int DEFAULT 5; UPDATE public.contact SET first = 'x' WHERE id = 101`)
	s.once()
	contents("HEAD", `id,last,whole,first,since (1,f,"f l",l,5) (101,F,"F x",x,5)`)
	contents(at, first)
	db.do(`DELETE FROM public.contact WHERE id = 1`)
	s.says(0, "", "checkout", "--at", "HEAD", "--schema", "past", "--replace", "contact")
	db.do(`ALTER TABLE past.contact DROP whole; INSERT INTO public.contact (id, last, first, since) SELECT * FROM past.contact WHERE id = 1`)
	if got := db.one(`SELECT last || ' ' || first FROM public.contact WHERE id = 1`); got != "f l" {
		t.Errorf("given back as %s", got)
	}
}

const twoOrders = `CREATE TABLE public.orders (id int, v text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
	CREATE TABLE public.orders_1 PARTITION OF public.orders FOR VALUES FROM (0) TO (100); CREATE TABLE public.orders_2 PARTITION OF public.orders FOR VALUES FROM (100) TO (200);
	CREATE TABLE public.plain (x int, y int, n numeric(10,2), PRIMARY KEY (y, x))`

// rowsOf checks a table out and gives its rows.
func (s *system) rowsOf(at, table string) string {
	s.t.Helper()
	s.says(0, "", "checkout", "--at", at, "--schema", "past", "--replace", "--database", s.cfg.Capture.URL, table)
	return s.sql().one(`SELECT coalesce(string_agg(whole_row::text, ' ' ORDER BY whole_row::text), '') FROM past.%s whole_row`, table)
}

// TestDroppedAndMadeAgain: a table that takes the name of one that was dropped is the one that checkouts have, whatever the log learns first; also
// when init is run before the sidecar.
func TestDroppedAndMadeAgain(t *testing.T) {
	for _, init := range []bool{false, true} {
		t.Run(fmt.Sprintf("init comes first: %v", init), func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			db := s.sql()
			db.do(twoOrders)
			s.init()
			db.do(`INSERT INTO public.orders VALUES (1, 'a'), (101, 'b'); INSERT INTO public.plain VALUES (1, 1, 1)`)
			s.once()
			before := db.one(`SELECT position FROM backstory.head`)
			var r *running
			if !init {
				r = s.start()
			}
			db.do(`DROP TABLE public.orders_2, public.plain; CREATE TABLE public.orders_2 PARTITION OF public.orders FOR VALUES FROM (100) TO (200); CREATE TABLE public.plain (x int PRIMARY KEY) PARTITION BY HASH (x);
				CREATE TABLE public.plain_0 PARTITION OF public.plain FOR VALUES WITH (MODULUS 1, REMAINDER 0)`)
			if init {
				s.init()
				s.once()
			}
			eventually(t, time.Minute, "the new tables are captured", func() (bool, error) {
				return db.one(`SELECT count(*) FROM backstory.captured WHERE oid IN ('public.orders_2'::regclass, 'public.plain_0'::regclass)`) == "2", nil
			})
			db.do(`INSERT INTO public.orders VALUES (102, 'new'); INSERT INTO public.plain VALUES (3)`)
			if init {
				s.once()
			} else {
				eventually(t, time.Minute, "the log knows what was dropped", func() (bool, error) {
					return db.one(`SELECT count(*) FROM backstory.relation WHERE dropped`) == "2", nil
				})
				if err := r.end(); err != nil {
					t.Fatal(err)
				}
				s.once()
			}
			s.says(0, "", "checkout", "--partial", "--at", "HEAD", "--schema", "everything")
			at := func(rev string) string { return s.rowsOf(rev, "orders") + " / " + s.rowsOf(rev, "plain") }
			if got := at("HEAD"); got != "(1,a) (102,new) / (3)" {
				t.Errorf("the log has %s", got)
			}
			if got := at(before); got != "(1,a) (101,b) / (1,1,1.00)" {
				t.Errorf("before the tables were dropped, the log has %s", got)
			}
			want := "(1,a) / orders"
			if init { // by which the new one is known before it is learned that the old one is gone
				want += " plain"
			}
			between := db.one(`SELECT max(position) FROM backstory.events WHERE op = 'note' AND type IN ('OrderPartitionDropped', 'PlainDropped')`)
			s.says(0, "", "checkout", "--partial", "--at", between, "--schema", "between")
			if got := s.rowsOf(between, "orders") + " / " + db.one(`SELECT string_agg(tablename, ' ' ORDER BY tablename) FROM pg_tables WHERE schemaname = 'between'`); got != want {
				t.Errorf("when they had been dropped, and not made again, the log has %s", got)
			}
		})
	}
}

// TestChangedAndDroppedWhileNobodyLooked: what was changed before it was dropped is filed as before.
func TestChangedAndDroppedWhileNobodyLooked(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(twoOrders)
	db.do(`CREATE TABLE public.whole (id int PRIMARY KEY, v text); ALTER TABLE public.whole REPLICA IDENTITY FULL`)
	s.init()
	db.do(`INSERT INTO public.plain VALUES (1, 10, 1), (2, 20, 2); INSERT INTO public.whole VALUES (1, 'a'); INSERT INTO public.orders VALUES (101, 'b')`)
	s.once()
	db.do(`UPDATE public.plain SET n = 3 WHERE x = 1; DELETE FROM public.plain WHERE x = 2; UPDATE public.whole SET v = 'z'; DELETE FROM public.orders WHERE id = 101; DROP TABLE public.plain, public.whole, public.orders_2`)
	s.once()
	if got := db.one(`SELECT string_agg(concat_ws(' ', type, aggregate_id, before, data), ', ' ORDER BY position) FROM backstory.events WHERE op <> 'insert' AND op <> 'note'`); got !=
		`PlainUpdated 10,1 {"n":"1.00"} {"n":"3.00"}, PlainDeleted 20,2 {"x":2,"y":20,"n":"2.00"}, WholeUpdated 1 {"v":"a"} {"v":"z"}, OrderDeleted 101 {"id":101,"v":"b"}` {
		t.Errorf("the log has %s", got)
	}
	verify(t, s.openLog())
}

// TestOtherSourceHasDroppedNothing: that tables are missing where somebody connects by mistake says nothing of them.
func TestOtherSourceHasDroppedNothing(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(twoOrders)
	s.init()
	s.once()
	url := s.cfg.Capture.URL
	s.cfg.Log.URL = url
	s.cfg.Capture.URL = s.src.URL(s.src.NewDatabase(t))
	if err := s.tryOnce(); err == nil || !strings.Contains(err.Error(), "the log belongs to database") {
		t.Errorf("elsewhere it says %v", err)
	}
	s.cfg.Capture.URL = url
	if got := db.one(`SELECT count(*) FROM backstory.captured WHERE dropped`); got != "0" {
		t.Errorf("%s tables count as dropped", got)
	}
}

// TestPartitionsBehind: what happened before a partition was detached, or the partitioned table got another name or column, is told as it was
// then, also by a sidecar that is behind, and while its rows are being read.
func TestPartitionsBehind(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(twoOrders)
	s.init()
	db.do(`INSERT INTO public.orders VALUES (1, 'a'), (101, 'b')`)
	s.once()
	db.do(`UPDATE public.orders SET v = 'c' WHERE id = 101; UPDATE public.orders SET v = 'c' WHERE id = 1; ALTER TABLE public.orders DETACH PARTITION public.orders_2`)
	s.once()
	at := db.one(`SELECT max(position) FROM backstory.events WHERE type = 'OrderUpdated'`)
	if got := s.rowsOf(at, "orders") + " / " + s.rowsOf("HEAD", "orders"); got != "(1,c) (101,c) / (1,c)" {
		t.Errorf("before and after DETACH the log has %s", got)
	}
	db.do(`ALTER TABLE public.orders ATTACH PARTITION public.orders_2 FOR VALUES FROM (100) TO (200); CREATE TABLE public.orders_d PARTITION OF public.orders DEFAULT`)
	s.init()
	s.once()
	r := s.start()
	time.Sleep(time.Second)
	db.do(`ALTER TABLE public.orders RENAME v TO w; ALTER TABLE public.orders ADD c text DEFAULT 'x'; INSERT INTO public.orders VALUES (102, 'n', 'y')`)
	eventually(t, time.Minute, "the row is in the log", func() (bool, error) {
		at = db.one(`SELECT coalesce(max(position), 0) FROM backstory.events WHERE op = 'insert' AND data::text LIKE '%%"y"%%'`)
		return at != "0", nil
	})
	early := s.rowsOf(at, "orders") // the other partitions' new shape may not be known yet
	eventually(t, time.Minute, "each partition's shape is known", func() (bool, error) {
		return db.one(`SELECT count(DISTINCT oid) FROM backstory.relation WHERE columns::text LIKE '%%"w"%%'`) == "3", nil
	})
	if late := s.rowsOf(at, "orders"); late != "(1,c,x) (101,c,x) (102,n,y)" || early != late && early != "(1,c,) (101,c,x) (102,n,y)" {
		t.Errorf("at first the log has %s, then %s", early, late)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	// Another name, while rows are being read.
	o := newSystem(t, where{})
	o.cfg.Capture.BaselineChunkBytes, o.cfg.Capture.BaselineBytesPerSecond = 2000, 20000
	db = o.sql()
	db.do(twoOrders)
	db.do(`INSERT INTO public.orders SELECT i, repeat('x', 400) FROM generate_series(0, 199) i`)
	o.init()
	r = o.start()
	eventually(t, time.Minute, "rows are being read", func() (bool, error) {
		return db.one(`SELECT count(*) FROM backstory.baseline WHERE chunks > 1`) == "2", nil
	})
	db.do(`ALTER TABLE public.orders RENAME TO purchases`)
	o.baselineDone()
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	o.once()
	o.says(0, "200 rows", "checkout", "--at", "HEAD", "--schema", "past", "purchases")
	o.says(1, "no such table", "checkout", "--at", "HEAD", "--schema", "none", "orders")
}

// TestPartitionsLeftOut: a partitioned table of which a partition is not captured is not whole, and is so again when that has gone. A checkout
// of it says which one, and why.
func TestPartitionsLeftOut(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.cfg.Capture.Exclude = []string{"public.orders_2"}
	db := s.sql()
	db.do(`CREATE TABLE public.orders (id int PRIMARY KEY, v text) PARTITION BY RANGE (id)`)
	for i := 1; i < 3; i++ {
		db.do(`CREATE TABLE public.orders_%d PARTITION OF public.orders FOR VALUES FROM (%d) TO (%d); INSERT INTO public.orders VALUES (%[2]d, 'a')`, i, 100*i, 100*(i+1))
	}
	s.init()
	s.once()
	at := db.one(`SELECT position FROM backstory.head`)
	says := "its partition public.orders_2 is not captured: BACKSTORY_TABLES and BACKSTORY_EXCLUDE leave it out"
	s.says(1, says, "checkout", "--at", "HEAD", "--schema", "a", "orders")
	s.says(0, says, "checkout", "--at", "HEAD", "--schema", "b", "--partial", "orders")
	s.says(0, "1 row", "checkout", "--at", "HEAD", "--schema", "c", "orders_1")
	// Detached, it is no part of the table from then on; the past stays as it was.
	db.do(`INSERT INTO public.orders VALUES (101, 'b'); ALTER TABLE public.orders DETACH PARTITION public.orders_2; INSERT INTO public.orders VALUES (102, 'c')`)
	s.once()
	eventually(t, time.Minute, "the log has come to where that was seen", func() (bool, error) {
		db.do(`UPDATE public.orders SET v = v || '.' WHERE id = 1`)
		s.once()
		p := s.command(false, "checkout", "--at", "HEAD", "--schema", "d", "--replace", "orders")
		return p.wait(time.Minute) == 0 && strings.Contains(p.out.String(), "3 rows"), fmt.Errorf("%s", p.out)
	})
	s.says(1, says, "checkout", "--at", at, "--schema", "e", "orders")
	db.do(`CREATE UNLOGGED TABLE public.orders_3 PARTITION OF public.orders FOR VALUES FROM (300) TO (400)`)
	s.once()
	s.says(1, "its partition public.orders_3 is not captured: it is unlogged", "checkout", "--at", "HEAD", "--schema", "f", "orders")
}

// TestPartitionTakenInWithRows: a partition that is made, and filled at once, is not captured for some seconds: the partitioned table is not whole at the
// positions of before that it may have been there at. Nor is one whole before the log has come to where an unlogged partition was made logged.
func TestPartitionTakenInWithRows(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.orders (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); CREATE TABLE public.orders_1 PARTITION OF public.orders FOR VALUES FROM (0) TO (100);
		CREATE UNLOGGED TABLE public.orders_2 PARTITION OF public.orders FOR VALUES FROM (100) TO (200)`)
	s.init()
	db.do(`INSERT INTO public.orders VALUES (1, 'a')`)
	s.once() // which sees that orders_2 is unlogged
	db.do(`INSERT INTO public.orders VALUES (2, 'b'), (101, 'in no WAL'); ALTER TABLE public.orders_2 SET LOGGED`)
	s.init()
	r := s.start()
	whole := func(what string) {
		t.Helper()
		eventually(t, time.Minute, what, func() (bool, error) {
			db.do(`INSERT INTO public.orders VALUES ((SELECT max(id) + 1 FROM public.orders WHERE id < 100), 'more')`)
			time.Sleep(500 * time.Millisecond)
			p := s.command(false, "checkout", "--at", "HEAD", "--schema", "now", "--replace", "orders")
			return p.wait(time.Minute) == 0, fmt.Errorf("%s", p.out)
		})
	}
	whole("the table is whole again")
	const refused = "is not captured"
	s.says(1, refused, "checkout", "--at", "2", "--schema", "a", "orders")
	before := db.one(`SELECT position FROM backstory.head`)
	db.do(`BEGIN; CREATE TABLE public.orders_3 PARTITION OF public.orders FOR VALUES FROM (200) TO (300); INSERT INTO public.orders VALUES (99, 'x'), (201, 'y'); COMMIT`)
	eventually(t, time.Minute, "its row is in the log", func() (bool, error) {
		return atoi(t, db.one(`SELECT position FROM backstory.head`)) > atoi(t, before), nil
	})
	at := db.one(`SELECT position FROM backstory.events WHERE aggregate_id = '99'`)
	eventually(t, time.Minute, "it is captured", func() (bool, error) {
		return db.one(`SELECT count(*) FROM backstory.captured WHERE name = 'orders_3'`) == "1", nil
	})
	db.do(`DELETE FROM public.orders WHERE id = 99`)
	whole("the table with the new partition is whole")
	s.says(1, refused, "checkout", "--at", at, "--schema", "b", "orders")
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
}

// TestHistoryOfARowAcrossNames: log and show follow a row through the names that its table had, as far as it is that table's.
func TestHistoryOfARowAcrossNames(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.orders (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); CREATE TABLE public.orders_1 PARTITION OF public.orders FOR VALUES FROM (0) TO (100);
		CREATE TABLE public.apart (id int PRIMARY KEY, v text); CREATE TABLE public.things (id int PRIMARY KEY, v text);
		CREATE TABLE public.parcels (id int NOT NULL, code text NOT NULL, k int) PARTITION BY LIST (k); CREATE TABLE public.parcels_1 PARTITION OF public.parcels (PRIMARY KEY (id)) FOR VALUES IN (1); CREATE TABLE public.parcels_2 PARTITION OF public.parcels (PRIMARY KEY (code)) FOR VALUES IN (2)`)
	s.init()
	db.do(`INSERT INTO public.parcels VALUES (1, 'x', 1), (2, 'y', 2); INSERT INTO public.orders VALUES (1, 'a'), (2, 'b'); INSERT INTO public.apart VALUES (101, 'c'), (2, 'of another table'); INSERT INTO public.things VALUES (1, 'd'), (2, 'e')`)
	s.once()
	at := db.one(`SELECT position FROM backstory.head`)
	db.do(`ALTER TABLE public.things RENAME TO stuff; DELETE FROM public.apart WHERE id = 2; ALTER TABLE public.orders ATTACH PARTITION public.apart FOR VALUES FROM (100) TO (200); ALTER TABLE public.orders DETACH PARTITION public.orders_1`)
	s.once()
	db.do(`UPDATE public.stuff SET v = 'D' WHERE id = 1; UPDATE public.orders SET v = 'C' WHERE id = 101; UPDATE public.orders_1 SET v = 'A' WHERE id = 1`)
	s.once()
	history := func(entity, want string) {
		t.Helper()
		p := s.command(false, "log", entity, "--json", "--reverse")
		if code := p.wait(time.Minute); code != 0 {
			t.Fatalf("log %s returned %d:\n%s", entity, code, p.out)
		}
		var got []string
		for _, line := range strings.Split(strings.TrimSpace(p.out.String()), "\n") {
			if _, rest, ok := strings.Cut(line, `"type":"`); ok {
				typ, _, _ := strings.Cut(rest, `"`)
				got = append(got, typ)
			}
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("log %s gives %s, want %s", entity, g, want)
		}
	}
	history("stuff/1", "ThingCreated StuffUpdated")
	history("stuff/2", "ThingCreated")
	history("things/1", "ThingCreated")
	history("orders/101", "ApartCreated OrderUpdated")
	history("orders/2", "OrderCreated ApartCreated ApartDeleted") // the other one was in a table that is a part of it now
	history("orders_1/1", "OrderCreated Orders1Updated")
	history("orders/1", "OrderCreated")
	history("parcels", "ParcelCreated ParcelsCreated") // keys of two types
	s.says(0, "x", "show", "parcels/1")
	s.says(0, "y", "show", "parcels/y")
	s.says(0, "D", "show", "stuff/1")
	s.says(0, "e", "show", "stuff/2") // nobody has changed it since
	s.says(0, "e", "show", "things/2", "--at", at)
	s.says(1, "its table had become public.stuff", "show", "things/1")
	s.says(0, "C", "show", "orders/101")
	s.says(0, "c", "show", "apart/101", "--at", at)
	s.says(1, "its table had become public.orders", "show", "apart/101")
	s.says(0, "A", "show", "orders_1/1")
	s.says(0, "b", "show", "orders_1/2")
	s.says(1, "its table had become public.orders_1", "show", "orders/1")
	s.says(0, "a", "show", "orders/1", "--at", at)
}

// TestMovedToAnotherPartitionInAGap: where the partitions' keys do not tell them apart, a row that went from one to the other while nobody looked is the
// same entity in both: the last event of it tells that it is there.
func TestMovedToAnotherPartitionInAGap(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.orders (id int, state int, u text NOT NULL, v text) PARTITION BY LIST (state)`)
	for i, identity := range []string{"DEFAULT", "FULL", "USING INDEX orders_3_u_key"} {
		db.do(`CREATE TABLE public.orders_%d PARTITION OF public.orders (PRIMARY KEY (id), UNIQUE (u)) FOR VALUES IN (%[1]d); ALTER TABLE public.orders_%[1]d REPLICA IDENTITY %s`, i+1, identity)
	}
	s.init()
	db.do(`INSERT INTO public.orders SELECT i, 1 + i %% 3, i, 'x' FROM generate_series(1, 12) i`)
	s.once()
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`UPDATE public.orders SET state = 1 + state %% 3, v = 'moved' WHERE id <= 6; UPDATE public.orders SET state = 1 + (state + 1) %% 3 WHERE id = 7; DELETE FROM public.orders WHERE id = 8`)
	s.gapFound("the slot was dropped", "gone")
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	s.once()
	s.sameRows("orders")
	if got := db.one(`SELECT string_agg(aggregate_id, ' ') FROM (SELECT DISTINCT ON (aggregate_id) aggregate_id, op FROM backstory.events WHERE aggregate_id <> '' ORDER BY aggregate_id, position DESC) e WHERE op = 'delete'`); got != "8" {
		t.Errorf("of these the last event is a delete: %s\n%v", got, db.rows(`SELECT position, type, op, partition, aggregate_id, data FROM backstory.events WHERE position > 12 ORDER BY position`))
	}
	s.says(0, "moved", "show", "orders/1")
	s.says(0, "x", "show", "orders/7")
	s.says(1, "was not there", "show", "orders/8")
	db.do(`UPDATE public.orders SET v = 'after'; UPDATE public.orders SET state = 1 + state %% 3, id = id + 100`)
	s.once()
	s.sameRows("orders")
	verify(t, s.openLog())
}

// TestSameKeyInTwoPartitions: where a key is unique in a partition alone, two rows may have the same. Each is what its own events make of it; show tells of the
// one that was changed last, and of the other.
func TestSameKeyInTwoPartitions(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.orders (id int, state int, v text) PARTITION BY LIST (state)`)
	for i, identity := range []string{"DEFAULT", "FULL"} {
		db.do(`CREATE TABLE public.orders_%d PARTITION OF public.orders (PRIMARY KEY (id)) FOR VALUES IN (%[1]d); ALTER TABLE public.orders_%[1]d REPLICA IDENTITY %s`, i+1, identity)
	}
	db.do(`INSERT INTO public.orders VALUES (1, 1, 'before'), (1, 2, 'before')`)
	s.init()
	s.once()
	db.do(`INSERT INTO public.orders VALUES (2, 1, 'a'), (2, 2, 'b')`)
	s.once()
	at := db.one(`SELECT position FROM backstory.head`)
	db.do(`DELETE FROM public.orders WHERE id = 1 AND state = 2; UPDATE public.orders SET v = 'A' WHERE id = 2 AND state = 1; UPDATE public.orders SET v = 'B' WHERE id = 2 AND state = 2`)
	s.once()
	s.sameRows("orders")
	db.do(`DROP SCHEMA IF EXISTS past CASCADE`)
	s.says(0, "4 rows", "checkout", "--at", at, "--schema", "past", "orders")
	for _, c := range []struct{ args, want string }{
		{"orders/1", `{"aggregate":"Order","aggregate_id":"1","position":%[1]d,"row":{"id":1,"state":1,"v":"before"}}`},
		{"orders/2", `{"aggregate":"Order","aggregate_id":"2","position":%[1]d,"row":{"id":2,"state":2,"v":"B"},"also_in":["public.orders_1"]}`},
		{"orders/2 --at " + at, `{"aggregate":"Order","aggregate_id":"2","position":` + at + `,"row":{"id":2,"state":2,"v":"b"},"also_in":["public.orders_1"]}`},
	} {
		want := strings.ReplaceAll(c.want, "%[1]d", db.one(`SELECT position FROM backstory.head`))
		s.says(0, want, append([]string{"show", "--json"}, strings.Fields(c.args)...)...)
	}
	s.says(0, "Order/2 is the key of another row, too: in public.orders_1", "show", "orders/2")
	db.do(`DELETE FROM public.orders WHERE id = 2`)
	s.once()
	s.says(1, "Order/2 was not there", "show", "orders/2")
	db.do(`SELECT pg_drop_replication_slot('%s')`, s.cfg.Capture.Slot)
	db.do(`DELETE FROM public.orders; INSERT INTO public.orders VALUES (1, 2, 'b'), (3, 1, 'c'), (3, 2, 'd')`)
	s.gapFound("the slot was dropped", "gone")
	if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
		t.Fatal(err)
	}
	s.once()
	s.sameRows("orders")
	verify(t, s.openLog())
}

// TestPartitionedTableReplaced: another partitioned table has the name of one that was dropped, its columns in another order, and one of its partitions: what is
// checked out is what was there, before and after, and a history is that of the name.
func TestPartitionedTableReplaced(t *testing.T) {
	t.Parallel()
	for name, trigger := range map[string]bool{"event triggers": true, "none": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{tables: []string{"public.*"}})
			s.cfg.Capture.DDLTrigger = &trigger
			db := s.sql()
			db.do(`CREATE TABLE public.orders (id int, region text, v text, PRIMARY KEY (region, id)) PARTITION BY LIST (region); CREATE TABLE public.orders_a PARTITION OF public.orders FOR VALUES IN ('a'); CREATE TABLE public.orders_b PARTITION OF public.orders FOR VALUES IN ('b')`)
			s.init()
			db.do(`INSERT INTO public.orders SELECT i, chr(97 + i %% 2), 'old' FROM generate_series(1, 4) i`)
			s.once()
			at := db.one(`SELECT position FROM backstory.head`)
			db.do(`ALTER TABLE public.orders DETACH PARTITION public.orders_b; DROP TABLE public.orders; CREATE TABLE public.orders (v text, id int, region text, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
				ALTER TABLE public.orders ATTACH PARTITION public.orders_b FOR VALUES IN ('b'); CREATE TABLE public.orders_a PARTITION OF public.orders FOR VALUES IN ('a')`)
			s.init()
			s.once()
			db.do(`INSERT INTO public.orders (id, region, v) VALUES (2, 'a', 'new'), (8, 'b', 'new'); UPDATE public.orders SET v = 'changed' WHERE id = 3`)
			s.once()
			if got := s.rowsOf(at, "orders") + " / " + s.rowsOf("HEAD", "orders"); got != "(1,b,old) (2,a,old) (3,b,old) (4,a,old) / (changed,3,b) (new,2,a) (new,8,b) (old,1,b)" {
				t.Errorf("before and after the log has %s", got)
			}
			s.says(0, `"v":"old"`, "show", "--json", "--at", at, "orders/a,2")
			s.says(0, `"v":"new"`, "show", "--json", "orders/a,2")
			s.says(1, "OrderPartitionDropped", "show", "orders/a,4")
			s.says(0, `"v":"old"`, "show", "--json", "orders/b,1")
			verify(t, s.openLog())
		})
	}
}
