package main

import (
	"strings"
	"testing"
)

// Of the names that differ in capitals and underscores alone, the one that is spelt like a table means that.
func TestNamesThatAreAlike(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.begin()
	s.must("run", "--once")
	s.sql(`CREATE SCHEMA other_one; CREATE TABLE order_s (id int PRIMARY KEY); CREATE TABLE "Orders" (id int PRIMARY KEY); CREATE TABLE other_one.orders (id int PRIMARY KEY)`)
	s.must("init")
	s.sql(`INSERT INTO order_s VALUES (1); INSERT INTO "Orders" VALUES (1)`)
	s.must("run", "--once")
	for name, want := range map[string]string{"orders/1": "Order/1 as of", "Order/1": "Order/1 as of", "public.orders/1": "Order/1 as of", "order_s/1": "OrderS/1 as of", "OrderS/1": "OrderS/1 as of", "Orders/1": "Orders/1 as of"} {
		if r := s.run("show", name); r.code != 0 || !strings.Contains(r.out, want) {
			t.Errorf("show %s: exit code %d\n%s%s", name, r.code, r.out, r.err)
		}
	}
	if r := s.run("show", "ORDERS/1"); r.code == 0 || !strings.Contains(r.err, "can mean Order or OrderS or Orders") {
		t.Errorf("show ORDERS/1: exit code %d\n%s%s", r.code, r.out, r.err)
	}
}

// A position between existing rows that were read together is not called one in a transaction of the application.
func TestPositionInAChunk(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.write(4)
	s.must("init")
	s.must("run", "--once")
	s.sql("BEGIN; INSERT INTO orders VALUES (901, 'a'); INSERT INTO orders VALUES (902, 'a'); COMMIT")
	s.must("run", "--once")
	const chunk = "in the middle of a chunk of existing rows"
	if r := s.run("show", "orders/1", "--at", "3"); !strings.Contains(r.err, chunk) {
		t.Errorf("between rows of a chunk:\n%s", r.err)
	}
	if r := s.run("show", "orders/901", "--at", "HEAD~1"); strings.Contains(r.err, chunk) || !strings.Contains(r.err, "in the middle of a transaction of the source") {
		t.Errorf("in a transaction:\n%s", r.err)
	}
}
