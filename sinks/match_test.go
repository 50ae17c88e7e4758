package sinks

import (
	"testing"

	"github.com/backstory-dev/backstory/eventlog"
)

func TestPattern(t *testing.T) {
	for _, test := range []struct {
		pattern, typ string
		match, names bool
	}{
		{"OrderPaid", "OrderPaid", true, true},
		{"OrderPaid", "OrderPaidLate", false, true},
		{"Order*", "OrderPaid", true, false},
		{"Order*", "Order", true, false},
		{"Order*", "CartOrder", false, false},
		{"*", "X", true, false},
		{"*Imported", "OrderImported", true, true},
		{"*Imported", "OrderImportedTwice", false, true},
		{"O*P*d", "OrderPaid", true, true},
		{"O*P*d", "OrderPai", false, true},
		{"O*d*d", "Order_d", true, true},
		{"ab*ba", "aba", false, true},
		{"*a*a*", "banana", true, false},
		{"*a*a*a*a", "banana", false, true},
	} {
		p := pattern(test.pattern)
		if p.match(test.typ) != test.match || p.names() != test.names {
			t.Errorf("%s on %s: match %v, names %v", test.pattern, test.typ, p.match(test.typ), p.names())
		}
	}
}

func TestSelection(t *testing.T) {
	imported := &eventlog.Event{Type: "OrderImported", Op: eventlog.OpImport}
	quiet := &eventlog.Event{Type: "OrderTouched", Op: eventlog.OpUpdate, Quiet: true}
	for _, test := range []struct {
		name string
		sel  selection
		e    *eventlog.Event
		want bool
	}{
		{"imports go to sinks that keep", selection{patterns: []pattern{"*"}}, imported, true},
		{"imports do not go to side effects", selection{patterns: []pattern{"*", "Order*"}, sideEffect: true}, imported, false},
		{"unless they name them", selection{patterns: []pattern{"*", "*Imported"}, sideEffect: true}, imported, true},
		{"or one of them", selection{patterns: []pattern{"OrderImported"}, sideEffect: true}, imported, true},
		{"quiet events stay out", selection{patterns: []pattern{"*", "OrderTouched"}}, quiet, false},
		{"unless asked for", selection{patterns: []pattern{"*"}, quiet: true}, quiet, true},
	} {
		for range 2 { // the second answer is remembered
			if test.sel.takes(test.e) != test.want {
				t.Errorf("%s: got %v", test.name, !test.want)
			}
		}
	}
}
