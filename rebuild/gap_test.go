package rebuild

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/backstory-dev/backstory/eventlog"
)

func (s *source) entity(aggregate, id string, at eventlog.Position) *EntityState {
	s.t.Helper()
	st, err := Entity(s.ctx, s.log, eventlog.Entity{Aggregate: aggregate, ID: id}, at)
	if err != nil {
		s.t.Fatal(err)
	}
	return st
}

func (s *source) head() eventlog.Position { return s.w.Head().Position }

// A gap may begin before the place where it is recorded: what lies between is not whole either.
func TestGapThatBeganBefore(t *testing.T) {
	customers, orders := relation("customers", []int{0}, "id bigint", "name text"), relation("orders", []int{0}, "id bigint")
	only := func(tables ...string) func(*Config) { return func(c *Config) { c.Tables = tables } }
	partial := func(c *Config) { c.Partial = true }
	for _, c := range []struct {
		name    string
		record  func(s *source, from eventlog.LSN) error
		ordered bool // orders lack nothing
	}{
		{"of a table", func(s *source, from eventlog.LSN) error {
			_, err := s.w.Missed(s.ctx, customers, "it was not published", from, s.lsn+0x1000)
			return err
		}, true},
		{"of the source", func(s *source, from eventlog.LSN) error {
			return s.w.Gap(s.ctx, "a publication was dropped", from, s.lsn+0x1000, false)
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSource(t, customers, orders)
			before := s.tx(insert(customers, 1, "Ann"))
			from := s.lsn + 0x80
			between := s.tx(insert(orders, 1))
			if err := c.record(s, from); err != nil {
				t.Fatal(err)
			}
			gap := s.head()
			s.mustCheckout(before, &Memory{})
			_, err := s.checkout(between, &Memory{})
			if !errors.Is(err, ErrIncomplete) || !errors.Is(err, ErrLaterGap) || !strings.Contains(err.Error(), "public.customers") || !strings.Contains(err.Error(), from.String()) ||
				strings.Contains(err.Error(), "public.orders") == c.ordered || !strings.Contains(eventlog.Hint(err), "--at "+from.String()) {
				t.Errorf("%v (%s)", err, eventlog.Hint(err))
			}
			if rev, err := s.log.Resolve(s.ctx, from.String(), eventlog.RevisionOptions{}); err != nil || rev.Position != before {
				t.Errorf("what the hint names is position %d, want %d: %v", rev.Position, before, err)
			}
			if _, err := s.checkout(between, &Memory{}, only("orders")); (err == nil) != c.ordered {
				t.Errorf("orders: %v", err)
			}
			r := s.mustCheckout(between, &Memory{}, only("customers"), partial)
			if x := r.Tables[0]; !x.Incomplete || x.LaterGap != gap || x.Rows != 1 || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "a gap begins before this position") {
				t.Errorf("%+v", r)
			}
			if _, err := s.checkout(gap, &Memory{}); !errors.Is(err, ErrIncomplete) || errors.Is(err, ErrLaterGap) {
				t.Errorf("at the gap itself: %v", err)
			}
			if g := s.entity("Customer", "1", before).Gap; g != nil {
				t.Errorf("customer 1 before the gap: %+v", g)
			}
			for _, at := range []eventlog.Position{between, gap} {
				if st := s.entity("Customer", "1", at); st.Gap == nil || st.Gap.Position != gap || st.Gap.From != from || st.Row == nil {
					t.Errorf("customer 1 at %d: %+v", at, st)
				}
			}
			if g := s.entity("Order", "1", gap).Gap; (g == nil) != c.ordered {
				t.Errorf("order 1: %+v", g)
			}
		})
	}
}

// One that begins where the log ended, or nobody knows where, takes nothing from what was there before.
func TestGapThatBeginsAtTheEnd(t *testing.T) {
	for name, from := range map[string]func(*source) eventlog.LSN{
		"where the last transaction ended":    func(s *source) eventlog.LSN { return s.w.Head().EndLSN },
		"where the last transaction is":       func(s *source) eventlog.LSN { return s.lsn },
		"nobody knows where, and it says 0/0": func(*source) eventlog.LSN { return 0 },
	} {
		t.Run(name, func(t *testing.T) {
			orders := relation("orders", []int{0}, "id bigint")
			s := newSource(t, orders)
			s.tx(insert(orders, 1))
			last := s.tx(insert(orders, 2))
			if err := s.w.Gap(s.ctx, "the slot is gone", from(s), s.lsn+0x1000, false); err != nil {
				t.Fatal(err)
			}
			s.mustCheckout(last, &Memory{})
			if g := s.entity("Order", "1", last).Gap; g != nil {
				t.Errorf("%+v", g)
			}
		})
	}
}

// Once a table is complete again, its rows are known for sure; so are they if it is not complete for another reason than a gap.
func TestGapThatIsHealed(t *testing.T) {
	orders := relation("orders", []int{0}, "id bigint", "v text")
	s := newSource(t, orders)
	s.tx(insert(orders, 1, "a"))
	if _, err := s.w.Missed(s.ctx, orders, "it was not published", s.lsn+0x40, 0); err != nil {
		t.Fatal(err)
	}
	gap := s.head()
	lacking := *orders
	lacking.Complete = false
	open := s.tx(insert(&lacking, 2, "b"))
	again := *orders
	healed := s.tx(insert(&again, 3, "c"))
	altered := *relation("orders", []int{0}, "id bigint", "w text")
	altered.Complete = false
	other := s.tx(insert(&altered, 4, "d"))
	for at, want := range map[eventlog.Position]eventlog.Position{gap - 1: 0, gap: gap, open: gap, healed: 0, other: 0} {
		st := s.entity("Order", "1", at)
		if got := st.Gap; got == nil && want != 0 || got != nil && got.Position != want || st.Row == nil {
			t.Errorf("at %d: %+v, want the gap at %d", at, got, want)
		}
	}
}

// A row has the shape that its table has at the position, whether it changed since the table was altered or not.
func TestEntityHasTheShapeOfThen(t *testing.T) {
	numbered := func(r *eventlog.Relation, nums ...int16) *eventlog.Relation {
		for i := range r.Columns {
			r.Columns[i].Num = nums[i]
		}
		return r
	}
	v1 := numbered(relation("sh", []int{0}, "id bigint", "a text", "d text"), 1, 2, 3)
	s := newSource(t, v1)
	first := s.tx(insert(v1, 1, "x", "y"), insert(v1, 2, "x", "y"))
	v2 := numbered(relation("sh", []int{0}, "number bigint", "alpha text", "k integer", "n integer"), 1, 2, 4, 5)
	v2.Columns[2].Missing, v2.Columns[3].Missing = "7", "null"
	second := s.tx(insert(v2, 3, "z", 8, 9))
	third := s.tx(update(v2, row(2, "x", 7, nil), row(2, "X", 7, 1)))
	for _, c := range []struct {
		id   string
		at   eventlog.Position
		want string
	}{
		{"1", first, `{"id":1,"a":"x","d":"y"}`},
		{"1", second, `{"number":1,"alpha":"x","k":7,"n":null}`},
		{"2", third, `{"number":2,"alpha":"X","k":7,"n":1}`},
		{"1", third, `{"number":1,"alpha":"x","k":7,"n":null}`},
	} {
		st := s.entity("Sh", c.id, c.at)
		if string(st.Row) != c.want || len(st.Unknown) > 0 {
			t.Errorf("%s at %d: %s, want %s; %q", c.id, c.at, st.Row, c.want, st.Unknown)
		}
		m := &Memory{}
		s.mustCheckout(c.at, m)
		if rows := rowsIn(m, "public.sh"); !slices.Contains(rows, string(st.Row)) {
			t.Errorf("%s at %d: %s, checkout has %q", c.id, c.at, st.Row, rows)
		}
	}
}
