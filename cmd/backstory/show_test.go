package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// head is the last position of the log.
func (s *site) head() int {
	s.t.Helper()
	n, err := strconv.Atoi(s.ask(s.logURL(), "SELECT position::text FROM backstory.head"))
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// What is shown of a row that may be outdated since a gap says so, until the gap is healed.
func TestShowAfterAGap(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.sql("CREATE TABLE emptied (id int PRIMARY KEY); INSERT INTO emptied VALUES (1)")
	s.begin()
	s.must("run", "--once")
	s.sql("DELETE FROM orders WHERE id = 5; TRUNCATE emptied")
	s.must("run", "--once")
	position := s.head()
	s.sql("SELECT pg_drop_replication_slot('%s'); UPDATE orders SET status = 'unseen' WHERE id = 1", s.slot())
	if r := s.run("run", "--once"); r.code != 1 {
		t.Fatalf("exit code %d:\n%s", r.code, r.err)
	}
	gap := s.head()
	const says = ", which is not healed at this position: the row may be outdated, or gone"
	r := s.must("show", "orders/1")
	if want := fmt.Sprintf("the history has a gap at position %d (the replication slot %s is gone)", gap, s.slot()); !strings.Contains(r.err, want+says) || !strings.Contains(r.out, `"open"`) {
		t.Errorf("want %q:\n%s%s", want, r.out, r.err)
	}
	var row struct {
		Row map[string]any
		Gap *struct {
			Position int
			FromLSN  string `json:"from_lsn"`
			Reason   string
		}
	}
	r = s.must("show", "orders/1", "--json")
	if err := json.Unmarshal([]byte(r.out), &row); err != nil || row.Gap == nil || row.Gap.Position != gap || row.Gap.Reason == "" || row.Gap.FromLSN == "" || row.Row["status"] != "open" || !strings.Contains(r.err, says) {
		t.Errorf("%v\n%s%s", err, r.out, r.err)
	}
	for row, why := range map[string]string{"orders/5": "OrderDeleted", "orders/99": "the log knows nothing of Order/99", "emptied/1": "EmptiedTruncated"} {
		const says = ", which is not healed at this position: the row may be there all the same"
		if r := s.run("show", row); r.code != 1 || !strings.Contains(r.err, fmt.Sprintf("the history has a gap at position %d (", gap)) || !strings.Contains(r.err, says) || !strings.Contains(r.message(), why) {
			t.Errorf("show %s, which is not there: exit code %d\n%s%s", row, r.code, r.out, r.err)
		}
		if r := s.run("show", row, "--at", fmt.Sprint(position)); r.code != 1 || strings.Contains(r.err, "gap") {
			t.Errorf("show %s before the gap: exit code %d\n%s%s", row, r.code, r.out, r.err)
		}
	}
	if r := s.must("show", "orders/1", "--at", fmt.Sprint(position)); strings.Contains(r.err, "gap") {
		t.Errorf("before the gap:\n%s", r.err)
	}
	s.must("init", "--accept-gap")
	s.must("run", "--once")
	if r := s.must("show", "orders/1"); strings.Contains(r.err, "gap") || !strings.Contains(r.out, `"unseen"`) {
		t.Errorf("after it is healed:\n%s%s", r.out, r.err)
	}
	if r := s.must("show", "orders/1", "--at", fmt.Sprint(gap)); !strings.Contains(r.err, says) {
		t.Errorf("at the gap, after it is healed:\n%s", r.err)
	}
	s.must("checkout", "--at", "HEAD", "--csv", filepath.Join(t.TempDir(), "csv"), "orders")
}

// A checkout says where the gap of a table is that it lacks something by, and with what it works.
func TestCheckoutAfterTheGapOfATable(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.sql("CREATE TABLE kept (id int PRIMARY KEY); INSERT INTO kept VALUES (1)")
	s.begin()
	s.must("run", "--once")
	p := s.sidecar()
	s.sql("ALTER TABLE orders DROP CONSTRAINT orders_pkey")
	gap := ""
	eventually(t, time.Minute, "the log has the gap", func() bool {
		gap = s.ask(s.logURL(), "SELECT coalesce(max(position), 0)::text FROM backstory.events WHERE type = 'OrderGap'")
		return gap != "0"
	})
	p.stop()
	checkout := func(more ...string) result {
		return s.run(append([]string{"checkout", "--csv", filepath.Join(t.TempDir(), "csv")}, more...)...)
	}
	r := checkout("--at", gap)
	if !strings.Contains(r.message(), "the log does not have all rows of public.orders: its history has a gap at position "+gap+" (") || !strings.Contains(r.message(), "which is not healed at this revision") {
		t.Errorf("at the gap: exit code %d\n%s", r.code, r.err)
	}
	_, before, _ := strings.Cut(r.remedy(), "A revision of before the gap is --at ")
	before = strings.TrimSuffix(before, ".")
	if r := checkout("--at", before); r.code != 0 {
		t.Errorf("at %q, before the gap: exit code %d\n%s", before, r.code, r.err)
	}
	r = checkout("--at", "HEAD")
	_, others, ok := strings.Cut(r.remedy(), "Use --partial for the rows that the log knows of, or name the others (")
	others, _, _ = strings.Cut(others, ")")
	if r.code != 1 || !ok {
		t.Errorf("at the head: exit code %d\n%s", r.code, r.err)
	}
	if r := checkout(append([]string{"--at", "HEAD"}, strings.Fields(others)...)...); r.code != 0 {
		t.Errorf("of the other tables (%s): exit code %d\n%s", others, r.code, r.err)
	}
	if r := checkout("--at", "HEAD", "--partial"); r.code != 0 {
		t.Errorf("in part: exit code %d\n%s", r.code, r.err)
	}
}

// A row is given back as README says, also where a column's type was altered since.
func TestRowGivenBackWithAnotherType(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.sql("CREATE TYPE order_status AS ENUM ('new', 'paid'); CREATE TABLE typed (id int PRIMARY KEY, status order_status)")
	s.begin()
	s.sql("INSERT INTO typed VALUES (17, 'new'), (18, 'paid')")
	s.must("run", "--once")
	position := s.head()
	s.sql("ALTER TYPE order_status RENAME VALUE 'new' TO 'pending'; UPDATE typed SET status = 'paid'")
	s.must("run", "--once")
	if r := s.must("checkout", "--at", fmt.Sprint(position), "--schema", "past", "typed"); !strings.Contains(r.err, "text") {
		t.Errorf("no warning:\n%s%s", r.out, r.err)
	}
	s.sql("UPDATE typed SET status = replace(p.status, 'new', 'pending')::order_status FROM past.typed p WHERE p.id = typed.id")
	if got := s.ask(s.logURL(), "SELECT string_agg(typed::text, ' ' ORDER BY id) FROM typed"); got != "(17,pending) (18,paid)" {
		t.Errorf("given back: %s", got)
	}
}

// A row that did not change since its table was altered is shown in the table's shape all the same.
func TestShowAfterAlterTable(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.sql("CREATE TABLE sh (id int PRIMARY KEY, a text, d text); INSERT INTO sh VALUES (1, 'x', 'y')")
	s.begin()
	s.must("run", "--once")
	position := s.head()
	s.sql("ALTER TABLE sh ADD k int DEFAULT 7, ADD n int; ALTER TABLE sh RENAME a TO alpha; ALTER TABLE sh DROP d")
	s.must("run", "--once")
	for at, want := range map[string]string{"HEAD": `{"id":1,"alpha":"x","k":7,"n":null}`, fmt.Sprint(position): `{"id":1,"a":"x","d":"y"}`} {
		if r := s.must("show", "sh/1", "--at", at, "--json"); !strings.Contains(r.out, `"row":`+want+"}") {
			t.Errorf("at %s: %swant the row %s", at, r.out, want)
		}
	}
	if r := s.must("show", "sh/1"); !strings.Contains(r.out, "alpha") || strings.Contains(r.out, "  d ") || strings.Contains(r.err, "gap") {
		t.Errorf("%s%s", r.out, r.err)
	}
}
