package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
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
	s.says(1, "public.orders_1 has been dropped by then", "checkout", "--at", "HEAD", "--schema", "past", "orders_1")
	s.says(0, "OrderDeleted", "log", "orders/2,2026-01-03")
	s.says(0, "", "checkout", "--at", moments[0].position, "--schema", "part", "orders_2")
	if got := db.one(`SELECT count(*) FROM part.orders_2`); got != "28" {
		t.Errorf("%s rows in one partition", got)
	}
	verify(t, s.openLog())
}
