package rebuild

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/backstory-dev/backstory/eventlog"
)

// half is a target that does not commit.
type half struct {
	Target
	*failing
}

func (h *half) Begin(ctx context.Context, t []*Table) error { return h.Target.Begin(ctx, t) }
func (h *half) Table(ctx context.Context, t *Table) (TableWriter, error) {
	return h.Target.Table(ctx, t)
}
func (h *half) Commit(context.Context) error { return errTest }
func (h *half) Abort()                       { h.Target.Abort() }

func rowsIn(m *Memory, table string) []string {
	out := []string{}
	for _, t := range m.Tables {
		if t.String() == table {
			for _, r := range t.Rows {
				out = append(out, string(r))
			}
		}
	}
	slices.Sort(out)
	return out
}

func TestCheckoutAtEachPosition(t *testing.T) {
	orders := relation("orders", []int{0}, "id bigint", "status text")
	visits := relation("visits", nil, "page text")
	s := newSource(t, orders, visits)
	type state struct{ orders, visits []string }
	states := map[eventlog.Position]state{}
	note := func(p eventlog.Position, orders, visits []string) { states[p] = state{orders, visits} }
	note(s.tx(insert(orders, 1, "new"), insert(orders, 2, nil)), []string{`{"id":1,"status":"new"}`, `{"id":2,"status":null}`}, []string{})
	note(s.tx(insert(visits, "/a"), insert(visits, "/a")), []string{`{"id":1,"status":"new"}`, `{"id":2,"status":null}`}, []string{`{"page":"/a"}`, `{"page":"/a"}`})
	note(s.tx(update(orders, row(1, "new"), row(1, "paid")), update(visits, row("/a"), row("/b"))), []string{`{"id":1,"status":"paid"}`, `{"id":2,"status":null}`}, []string{`{"page":"/a"}`, `{"page":"/b"}`})
	note(s.tx(update(orders, row(2, nil), row(3, nil)), update(orders, row(1, "paid"), row(2, "paid"))), []string{`{"id":2,"status":"paid"}`, `{"id":3,"status":null}`}, []string{`{"page":"/a"}`, `{"page":"/b"}`})
	note(s.tx(remove(orders, 3, nil), remove(visits, "/a")), []string{`{"id":2,"status":"paid"}`}, []string{`{"page":"/b"}`})
	note(s.tx(eventlog.Item{Op: eventlog.OpTruncate, Relation: orders}, insert(orders, 9, "x")), []string{`{"id":9,"status":"x"}`}, []string{`{"page":"/b"}`})
	for p, want := range states {
		m := &Memory{}
		r := s.mustCheckout(p, m)
		if got := rowsIn(m, "public.orders"); !slices.Equal(got, want.orders) {
			t.Errorf("orders at %d: %q, want %q", p, got, want.orders)
		}
		if got := rowsIn(m, "public.visits"); !slices.Equal(got, want.visits) {
			t.Errorf("visits at %d: %q, want %q", p, got, want.visits)
		}
		if len(r.Tables) != 2 || len(r.Warnings) != 0 || r.Position != p {
			t.Errorf("at %d: %+v", p, r)
		}
		for _, id := range []string{"1", "2", "3", "9"} {
			st, err := Entity(t.Context(), s.log, eventlog.Entity{Aggregate: "Order", ID: id}, p)
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(want.orders, func(row string) bool { return strings.HasPrefix(row, `{"id":`+id+",") })
			if i < 0 && st.Row != nil || i >= 0 && string(st.Row) != want.orders[i] {
				t.Errorf("order %s at %d: %s, want one of %q", id, p, st.Row, want.orders)
			}
		}
	}
}

func TestCheckoutWithReplicaIdentityDefault(t *testing.T) {
	// Wide rows: most updates carry only what changed.
	docs := relation("docs", []int{0}, "id bigint", "body text", "n integer")
	docs.ReplicaIdentity = 'd'
	docs.Columns[0].Identity = true
	s := newSource(t, docs)
	body := strings.Repeat("long ", 1000)
	s.tx(insert(docs, 1, body, 0), insert(docs, 2, body, 0))
	unchanged := row(1, body, 0)
	unchanged[1] = eventlog.Value{State: eventlog.StateUnchanged}
	for i := range 40 {
		now := slices.Clone(unchanged)
		now[2] = row(i + 1)[0]
		s.tx(update(docs, nil, now))
	}
	moved := slices.Clone(unchanged)
	moved[0], moved[2] = row(7)[0], row(41)[0]
	s.tx(update(docs, row(1, nil, nil), moved))
	s.tx(remove(docs, 2, nil, nil))
	m := &Memory{}
	r := s.mustCheckout(0, m)
	if got, want := rowsIn(m, "public.docs"), []string{fmt.Sprintf(`{"id":7,"body":"%s","n":41}`, body)}; !slices.Equal(got, want) || len(r.Warnings) > 0 {
		t.Errorf("%.100q %q", got, r.Warnings)
	}
}

func TestCheckoutHasTheShapeOfThen(t *testing.T) {
	v1 := relation("orders", []int{0}, "id bigint", "status text")
	s := newSource(t, v1)
	first := s.tx(insert(v1, 1, "new"), insert(v1, 2, "new"))
	v2 := relation("orders", []int{0}, "id bigint", "status text", "total numeric(12,2)")
	second := s.tx(insert(v2, 3, "new", "1.50"))
	v3 := relation("orders", []int{0}, "id bigint", "total numeric(12,2)", "note text")
	v3.Name = "purchases"
	v3.OID = v1.OID
	third := s.tx(update(v3, row(1, nil, nil), row(1, nil, "hi")))
	for _, c := range []struct {
		at    eventlog.Position
		table string
		want  []string
	}{
		{first, "public.orders", []string{`{"id":1,"status":"new"}`, `{"id":2,"status":"new"}`}},
		{second, "public.orders", []string{`{"id":1,"status":"new","total":null}`, `{"id":2,"status":"new","total":null}`, `{"id":3,"status":"new","total":"1.50"}`}},
		{third, "public.purchases", []string{`{"id":1,"total":null,"note":"hi"}`, `{"id":2,"total":null,"note":null}`, `{"id":3,"total":"1.50","note":null}`}},
	} {
		m := &Memory{}
		r := s.mustCheckout(c.at, m)
		if got := rowsIn(m, c.table); !slices.Equal(got, c.want) || len(r.Tables) != 1 || r.Tables[0].Unknown != nil {
			t.Errorf("at %d: %q %+v", c.at, got, r)
		}
	}
}

func TestRowsKeepTheirPlaceWhenTheKeyChanges(t *testing.T) {
	v1 := relation("visits", nil, "page text", "n bigint")
	s := newSource(t, v1)
	s.tx(insert(v1, "/a", 1), insert(v1, "/a", 1), insert(v1, "/b", nil))
	v2 := relation("visits", nil, "page text", "n bigint", "who text")
	s.tx(remove(v2, "/a", 1, nil), update(v2, row("/b", nil, nil), row("/b", 2, "me")), insert(v2, "/a", 3, nil))
	m := &Memory{}
	r := s.mustCheckout(0, m)
	if got, want := rowsIn(m, "public.visits"), []string{`{"page":"/a","n":1,"who":null}`, `{"page":"/a","n":3,"who":null}`, `{"page":"/b","n":2,"who":"me"}`}; !slices.Equal(got, want) || len(r.Warnings) > 0 {
		t.Errorf("without a key: %q %q", got, r.Warnings)
	}
	v3 := relation("visits", []int{1}, "page text", "n bigint", "who text")
	s.tx(remove(v3, "/a", 1, nil), update(v3, row("/a", 3, nil), row("/a", 4, nil)))
	r = s.mustCheckout(0, m)
	if got, want := rowsIn(m, "public.visits"), []string{`{"page":"/a","n":4,"who":null}`, `{"page":"/b","n":2,"who":"me"}`}; !slices.Equal(got, want) || len(r.Warnings) > 0 {
		t.Errorf("with a key: %q %q", got, r.Warnings)
	}
	v4 := relation("visits", []int{1}, "page text", "number bigint", "who text")
	s.tx(update(v4, row("/a", 4, nil), row("/a", 4, "you")))
	r = s.mustCheckout(0, m)
	if got, want := rowsIn(m, "public.visits"), []string{`{"page":"/a","number":4,"who":"you"}`, `{"page":"/b","number":2,"who":"me"}`}; !slices.Equal(got, want) || len(r.Warnings) > 0 {
		t.Errorf("with a key of another name: %q %q", got, r.Warnings)
	}
}

func TestWhichTables(t *testing.T) {
	orders, items := relation("orders", []int{0}, "id bigint"), relation("order_items", []int{0}, "id bigint")
	invoices, late := relation("billing.invoices", []int{0}, "id bigint"), relation("late", []int{0}, "id bigint")
	old := relation("old", []int{0}, "id bigint")
	old.Complete = false
	s := newSource(t, orders, items, invoices)
	first := s.tx(insert(orders, 1))
	s.tx(insert(items, 1))
	if err := s.log.SetCaptured(s.ctx, []eventlog.Captured{{Relation: orders, SinceLSN: 1}, {Relation: items, SinceLSN: 1}, {Relation: invoices, SinceLSN: 1},
		{Relation: late, SinceLSN: s.lsn + 1}, {Relation: old, SinceLSN: s.lsn + 1}}); err != nil {
		t.Fatal(err)
	}
	s.tx(insert(late, 1), insert(old, 1))
	for _, c := range []struct {
		at     eventlog.Position
		tables []string
		want   string
		err    error
		hint   string
	}{
		{first, nil, "billing.invoices:0 public.order_items:0 public.orders:1", nil, ""},
		{0, []string{"orders"}, "public.orders:1", nil, ""},
		{0, []string{"public.*"}, "", ErrIncomplete, "--partial"},
		{0, []string{"public.order*", "late"}, "public.late:1 public.order_items:1 public.orders:1", nil, ""},
		{0, []string{"*.invoices", "billing.invoices"}, "billing.invoices:0", nil, ""},
		{0, []string{"*_*"}, "public.order_items:1", nil, ""},
		{0, nil, "", ErrIncomplete, "--partial"},
		{first, []string{"late"}, "", ErrNoSuchTable, "later revision"},
		{first, []string{"order"}, "", ErrNoSuchTable, "Did you mean public.orders?"},
		{first, []string{"public.ordres"}, "", ErrNoSuchTable, "Did you mean public.orders?"},
		{first, []string{"nonsense"}, "", ErrNoSuchTable, "There are billing.invoices, public.order_items, public.orders."},
		{first, []string{"nothing.*"}, "", ErrNoSuchTable, "There are"},
	} {
		r, err := s.checkout(c.at, &Memory{}, func(cfg *Config) { cfg.Tables = c.tables })
		if !errors.Is(err, c.err) || !strings.Contains(eventlog.Hint(err), c.hint) {
			t.Errorf("%q at %d: %v (%s)", c.tables, c.at, err, eventlog.Hint(err))
			continue
		}
		if err != nil {
			continue
		}
		var got []string
		for _, x := range r.Tables {
			got = append(got, fmt.Sprintf("%s:%d", x.Table, x.Rows))
		}
		if strings.Join(got, " ") != c.want || len(r.Warnings) > 0 {
			t.Errorf("%q at %d: %q, want %q; %q", c.tables, c.at, got, c.want, r.Warnings)
		}
	}
	r := s.mustCheckout(0, &Memory{}, func(cfg *Config) { cfg.Partial = true })
	if len(r.Tables) != 5 || len(r.Warnings) != 1 || !strings.HasPrefix(r.Warnings[0], "public.old: ") {
		t.Errorf("%+v", r)
	}
}

func TestWhichVersionHolds(t *testing.T) {
	rel := func(oid uint32, name string) *eventlog.Relation {
		return &eventlog.Relation{OID: oid, Schema: "public", Name: name}
	}
	versions := []eventlog.RelationVersion{
		{ID: 1, Relation: rel(1, "a"), AtPosition: 10}, {ID: 2, Relation: rel(2, "b"), AtPosition: 400}, {ID: 3, Relation: rel(1, "c"), AtPosition: 500},
		// the source moved to another server, where LSNs are small and OIDs are others
		{ID: 4, Relation: rel(7, "b"), AtPosition: 999_000}, {ID: 5, Relation: rel(8, "c"), AtPosition: 1_000_000},
	}
	captured := []eventlog.Captured{{Relation: rel(7, "b"), SinceLSN: 0x8}, {Relation: rel(8, "c"), SinceLSN: 0x8}, {Relation: rel(9, "new"), SinceLSN: 0x30}}
	for _, c := range []struct {
		moment
		want string
	}{
		{moment{at: 5, lsn: 0x100}, "b:7 c:8 new:9"}, // that they came so late is told by nothing
		{moment{at: 10, lsn: 0x100}, "a:1 b:7 c:8 new:9"},
		{moment{at: 499, lsn: 0x280}, "a:1 b:2 c:8 new:9"},
		{moment{at: 500, lsn: 0x300}, "b:2 c:1 new:9"},
		{moment{at: 2000, lsn: 0x900}, "b:2 c:1 new:9"},
		{moment{at: 1_000_000, lsn: 0x20}, "b:7 c:8"},
		{moment{at: 2_000_000, lsn: 0x40}, "b:7 c:8 new:9"},
		{moment{now: true, at: 2_000_001}, "b:7 c:8 new:9"},
	} {
		var got []string
		for _, h := range group(versions, captured, c.moment) {
			if h.shape >= 0 {
				got = append(got, fmt.Sprintf("%s:%d", h.relation().Name, h.relation().OID))
			}
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%d: %s, want %s", c.at, s, c.want)
		}
	}
}

func TestEmptyLog(t *testing.T) {
	s := newSource(t, relation("orders", []int{0}, "id bigint"))
	m := &Memory{}
	r := s.mustCheckout(0, m)
	if len(r.Tables) != 1 || r.Tables[0].Rows != 0 || r.Events != 0 {
		t.Errorf("%+v", r)
	}
	r = newSource(t).mustCheckout(0, m)
	if len(r.Tables) != 0 {
		t.Errorf("%+v", r)
	}
}

func TestDroppedAndCreatedAgain(t *testing.T) {
	before, after := relation("orders", []int{0}, "id bigint"), relation("orders", []int{0}, "id bigint", "new text")
	after.OID++
	s := newSource(t, before)
	first := s.tx(insert(before, 1))
	s.tx(insert(after, 2, "x"))
	m := &Memory{}
	s.mustCheckout(0, m)
	if got, want := rowsIn(m, "public.orders"), []string{`{"id":2,"new":"x"}`}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	s.mustCheckout(first, m)
	if got, want := rowsIn(m, "public.orders"), []string{`{"id":1}`}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestHistoryWithHoles(t *testing.T) {
	// What an engine without all rows makes of each change.
	orders := relation("orders", []int{0}, "id bigint", "a text", "b text")
	pairs := relation("pairs", []int{1, 0}, "y text", "x text", "z text")
	m := &model{}
	o := m.addTable("orders", 'd', []string{"id"}, "id bigint", "a text", "b text")
	p := m.addTable("pairs", 'd', []string{"x", "y"}, "y text", "x text", "z text")
	v := m.addTable("visits", 'f', nil, "a text")
	d := m.addTable("deferrable", 'f', []string{"id"}, "id bigint", "a text")
	_, _ = orders, pairs
	ev := func(t *modelTable, op eventlog.Op, id, previous, data, before, rest string) {
		e := m.event(t, op, id)
		e.PreviousKey = previous
		for to, s := range map[*[]byte]string{&e.Data: data, &e.Before: before, &e.Rest: rest} {
			if s != "" {
				*to = []byte(s)
			}
		}
	}
	ev(o, eventlog.OpUpdate, "1", "", `{"a":"x"}`, "", "")                          // an orphan: only a and the key are known
	ev(o, eventlog.OpUpdate, "2", "", `{"a":"x"}`, "", `{"id":2,"b":"y"}`)          // whole
	ev(o, eventlog.OpUpdate, "3", "4", `{"id":3}`, `{"id":4}`, `{"a":"x","b":"y"}`) // whole, from where nothing is known
	ev(o, eventlog.OpDelete, "5", "", "", `{"id":5}`, "")                           // nothing to delete
	ev(o, eventlog.OpUpdate, "6", "", `{"a":"x"}`, "", "")                          // an orphan …
	ev(o, eventlog.OpUpdate, "6", "", `{"a":"z"}`, "", `{"id":6,"b":"y"}`)          // … that becomes whole
	ev(o, eventlog.OpInsert, "2", "", `{"id":2,"a":"new","b":null}`, "", "")        // in the place of another
	ev(o, eventlog.OpImport, "3", "", `{"id":3,"a":"imported"}`, "", "")            // b is not known
	ev(p, eventlog.OpUpdate, `a\,b,c\\d`, "", `{"z":"1"}`, "", "")                  // an orphan with a key of two columns
	ev(v, eventlog.OpDelete, "hash", "", "", `{"a":"1"}`, "")                       // nothing to delete
	ev(v, eventlog.OpUpdate, "hash2", "hash", `{"a":"2"}`, `{"a":"1"}`, `{}`)       // one more row
	ev(d, eventlog.OpInsert, "1", "", `{"id":1,"a":"A"}`, "", "")                   //
	m.lsn += 8                                                                      //
	ev(d, eventlog.OpUpdate, "2", "1", `{"id":2}`, `{"id":1}`, `{"a":"A"}`)         // A goes to 2, where B must have been …
	ev(d, eventlog.OpUpdate, "3", "2", `{"id":3}`, `{"id":2}`, `{"a":"B"}`)         // … since B goes on to 3: A stays
	r, got := m.fold(t, folding{eventlog.Position(len(m.events)), 1 << 20, 2})
	want := [][]string{
		{`{"id":1,"a":"x"}`, `{"id":2,"a":"new","b":null}`, `{"id":3,"a":"imported"}`, `{"id":6,"a":"z","b":"y"}`},
		{`{"y":"c\\d","x":"a,b","z":"1"}`}, {`{"a":"2"}`}, {`{"id":2,"a":"A"}`, `{"id":3,"a":"B"}`}}
	for i, lines := range got.sorted() {
		if !slices.Equal(lines, want[i]) {
			t.Errorf("%s: %q, want %q", r.Tables[i].Table, lines, want[i])
		}
	}
	for i, w := range []Tally{{Orphans: 4, Replaced: 1, Unknown: []int64{0, 0, 2}}, {Orphans: 1}, {Orphans: 2}, {Orphans: 1}} {
		if g := r.Tables[i].Tally; g.Orphans != w.Orphans || g.Replaced != w.Replaced || !slices.Equal(g.Unknown, w.Unknown) {
			t.Errorf("%s: %+v, want %+v", r.Tables[i].Table, g, w)
		}
	}
}
