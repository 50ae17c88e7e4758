package sinks

import (
	"fmt"
	"regexp"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// Reactor is a named reader of the log with a destination. Dispatcher.On says which events it gets. It must not be changed
// once it has been given to a dispatcher.
type Reactor struct {
	// Name is that of the checkpoint, in status, metrics and logs: [a-z0-9_-], at most 63 bytes. Whoever renames a
	// reactor makes a new one. Required.
	Name string
	// Sink is the destination. Required; no other reactor may use it.
	Sink Sink
	// SideEffect says that the destination does something with each event (a webhook, an e-mail), and does not only keep
	// it. Imported events then come only by a pattern that names them.
	SideEffect bool
	// Quiet includes quiet events.
	Quiet bool
	// Start says where the reactor begins when it runs for the first time. Default: the beginning of the log.
	Start eventlog.Start
	// MaxBatchBytes bounds the events handed to one Send, plus one event. Two batches are in memory, and what the
	// sink makes of one. Default 4 MiB.
	MaxBatchBytes int
	// CheckpointEvery is how often the checkpoint is saved while events are sent; it is saved on a graceful stop in any
	// case, and never while nothing is sent. Default 5 s, which is right for a sink that finds out itself what it
	// already holds. Negative: after each Send, for a sink that does not.
	CheckpointEvery time.Duration
	// MinBackoff and MaxBackoff bound the pause after an error; it doubles from one to the other. Defaults 100 ms, 30 s.
	MinBackoff, MaxBackoff time.Duration
}

var goodName = regexp.MustCompile(`^[a-z0-9_-]{1,63}$`)

func (r *Reactor) withDefaults() (Reactor, error) {
	c := *r
	if !goodName.MatchString(c.Name) {
		return c, &eventlog.Problem{Err: fmt.Errorf("read reactor name %q", c.Name),
			Hint: "Use lower-case letters, digits, _ and -, at most 63."}
	}
	if c.Sink == nil {
		return c, fmt.Errorf("reactor %s has no sink", c.Name)
	}
	if c.MaxBatchBytes <= 0 {
		c.MaxBatchBytes = 4 << 20
	}
	if c.CheckpointEvery == 0 {
		c.CheckpointEvery = 5 * time.Second
	}
	if c.MinBackoff <= 0 {
		c.MinBackoff = 100 * time.Millisecond
	}
	if c.MaxBackoff <= 0 {
		c.MaxBackoff = 30 * time.Second
	}
	c.MaxBackoff = max(c.MaxBackoff, c.MinBackoff)
	return c, nil
}
