package sinks

import (
	"errors"
	"fmt"

	"github.com/backstory-dev/backstory/eventlog"
)

// Met while forwarding.
var (
	// ErrUnavailable means that the destination does not answer. It will, most likely: tried again soon.
	ErrUnavailable = errors.New("destination unavailable")
	// ErrOtherHistory means that the destination holds events of another history than the log's, under the same name:
	// the log was restored to an earlier state, or is a copy that went its own way. Nothing is sent.
	ErrOtherHistory = errors.New("the destination holds events that this log does not have")
	// ErrBug means that a rule between dispatcher and sink was broken. The reactor stops until the process is restarted.
	ErrBug = errors.New("bug")
)

// class says what to do about an error.
type class uint8

const (
	classRetry class = iota // it will pass: again soon
	classTell               // a person must do something: shown with its hint, again less often
	classLease              // the right to run is gone: begin again with a new lease
	classStop               // a bug: nothing more is sent
)

// classify sorts every error that a reactor meets.
func classify(err error) class {
	switch {
	case errors.Is(err, ErrBug):
		return classStop
	case errors.Is(err, eventlog.ErrLeaseLost), errors.Is(err, eventlog.ErrLeaseHeld):
		return classLease
	case errors.Is(err, ErrUnavailable):
		return classRetry
	case eventlog.Hint(err) != "":
		return classTell
	}
	return classRetry
}

func otherHistory(p eventlog.Position, id eventlog.ID, why string) error {
	return &eventlog.Problem{
		Err: fmt.Errorf("%w: event %s at position %d; %s", ErrOtherHistory, id, p, why),
		Hint: "The log was restored to an earlier state, or this is a copy of another log. Give this log a destination (topic, file) " +
			"of its own, or remove the events after the point where the histories part.",
	}
}
