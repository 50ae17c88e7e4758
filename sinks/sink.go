package sinks

import (
	"context"

	"github.com/backstory-dev/backstory/eventlog"
)

// Sink is a destination for events. One goroutine uses it: Open, then Send as often as it likes, then Close; after Close
// it may be opened again. Package sinktest holds the tests that every sink must pass.
type Sink interface {
	// Open connects and finds out what the destination already holds. It returns the position after which the reactor
	// goes on: start.After, or a later one if the destination is known to hold all selected events up to there.
	// It may be called again after an error.
	Open(ctx context.Context, start Start) (after eventlog.Position, err error)

	// Send delivers events in the order given and returns nil only when all of them are durable at the destination. They
	// are valid until Send returns.
	//
	// After an error the sink stays open, and the reactor calls Send again with the same events at the beginning: what
	// had been delivered of them is not delivered again, as far as the sink can know (its doc.go says how far that is).
	// When ctx ends, Send returns soon.
	Send(ctx context.Context, events []*eventlog.Event) error

	// Close gives up what Open took. It sends nothing. Closing a sink that is not open is no error.
	Close(ctx context.Context) error
}

// Start is what a sink is told when it is opened.
type Start struct {
	// After is the reactor's checkpoint: every selected event up to here has been sent. More may have been.
	After eventlog.Position
	// Log is the identity of the log (eventlog.Log.Identity). A sink that writes it beside its events can tell them from
	// another log's.
	Log string
	// Reactor is the reactor's name: with Log it tells what this reactor has written from what another one of the same
	// log has written to the same place.
	Reactor string
	// First says that nobody has run this reactor before, so nothing of its can be on its way.
	First bool
	// Verify tells whether the log has the event with this id at this position: nil, or ErrOtherHistory (wrapped, with
	// a hint), or that the log could not be read. A sink calls it with what it finds at its destination before it
	// relies on positions there. It may be called until Close.
	Verify func(ctx context.Context, p eventlog.Position, id eventlog.ID) error
}
