package rebuild_test

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/rebuild"
)

// payments is a log in memory; *eventlog.Log is one in Postgres.
type payments []*eventlog.Event

func (p payments) Read(_ context.Context, _ eventlog.Selection, f func(*eventlog.Event) error) error {
	for _, e := range p {
		if err := f(e); err != nil {
			return err
		}
	}
	return nil
}

var (
	text   = eventlog.Type{Name: "text"}
	number = eventlog.Type{Name: "bigint", Kind: eventlog.KindInt}
)

// sales is a calculator: how many orders each customer has paid.
type sales struct{ table *rebuild.Table }

func (s sales) Tables() []*rebuild.Table { return []*rebuild.Table{s.table} }

// Route gives one step for the customer of each paid order. A step may hold what it likes.
func (s sales) Route(e *eventlog.Event, to *rebuild.Router) error {
	if e.Type != "OrderPaid" {
		return nil
	}
	return eventlog.EachMember(e.Data, func(name, value []byte) error {
		if string(name) != "customer" {
			return nil
		}
		return to.Step(0, value)
	})
}

func (s sales) NewFolder() rebuild.Folder { return s }

// Fold counts: the state is the count in digits.
func (s sales) Fold(dst, state []byte, _ *rebuild.Step) ([]byte, error) {
	n, _ := strconv.Atoi(string(state))
	return strconv.AppendInt(dst, int64(n+1), 10), nil
}

func (s sales) Rows(st *rebuild.State, emit func(*rebuild.Row) error) error {
	return emit(&rebuild.Row{Values: []rebuild.Value{{JSON: st.Key, Type: &text}, {JSON: st.State, Type: &number}}})
}

// A program's own calculator, folded into memory.
func Example() {
	log := payments{
		{Position: 1, Type: "OrderPaid", Data: []byte(`{"customer":"ann"}`)},
		{Position: 2, Type: "OrderPaid", Data: []byte(`{"customer":"bob"}`)},
		{Position: 3, Type: "OrderShipped", Data: []byte(`{"customer":"ann"}`)},
		{Position: 4, Type: "OrderPaid", Data: []byte(`{"customer":"ann"}`)},
	}
	table := &rebuild.Table{Schema: "public", Name: "sales", Columns: []eventlog.Column{{Name: "customer", Type: text}, {Name: "paid", Type: number}}, Key: []int{0}}
	into := &rebuild.Memory{}
	fold := rebuild.Fold{Source: log, Calculator: sales{table}, Target: into}
	if _, err := fold.Run(context.Background()); err != nil {
		fmt.Println(err)
		return
	}
	var rows []string
	for _, r := range into.Tables[0].Rows {
		rows = append(rows, string(r))
	}
	slices.Sort(rows)
	for _, r := range rows {
		fmt.Println(r)
	}
	// Output:
	// {"customer":"ann","paid":2}
	// {"customer":"bob","paid":1}
}
