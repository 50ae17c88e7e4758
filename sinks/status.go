package sinks

import (
	"sync"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// State says what a reactor is doing.
type State string

// The states of a reactor.
const (
	StateStarting State = "starting" // taking its lease, opening its sink
	StateRunning  State = "running"  // sending, or waiting for events
	StateRetrying State = "retrying" // something failed; it is tried again
	StatePaused   State = "paused"   // a person asked for it
	StateStandby  State = "standby"  // another process runs it
	StateStopped  State = "stopped"  // by a bug until the next start, or because the dispatcher ended
)

// Status is what is known of a reactor at a moment.
type Status struct {
	Name       string            `json:"name"`
	State      State             `json:"state"`
	Position   eventlog.Position `json:"position"`   // everything selected up to here has been sent
	Checkpoint eventlog.Position `json:"checkpoint"` // of which this much is saved
	LagEvents  int64             `json:"lag_events"` // events of the log behind Position, selected or not
	LagSeconds float64           `json:"lag_seconds"`
	Error      string            `json:"error,omitempty"`
	Hint       string            `json:"hint,omitempty"`
	Since      time.Time         `json:"since,omitzero"` // of the error
	Retries    int               `json:"retries,omitempty"`
	Sent       int64             `json:"sent"` // events since the start of the process
}

// statusBoard is where a runner writes and others read.
type statusBoard struct {
	mu     sync.Mutex // guards the following
	s      Status
	oldest time.Time // when the first event that is not yet sent happened; zero: not known, or there is none
	now    func() time.Time
}

func (b *statusBoard) set(f func(s *Status)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(&b.s)
}

func (b *statusBoard) pending(oldest time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.oldest = oldest
}

func (b *statusBoard) snapshot(head eventlog.Position) Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.s
	s.LagEvents = max(0, int64(head-s.Position))
	if s.LagEvents > 0 && !b.oldest.IsZero() {
		s.LagSeconds = max(0, b.now().Sub(b.oldest).Seconds())
	}
	return s
}
