package sinks

import (
	"context"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// batch is what one Send delivers: a run of the log, and of it the selected events. It owns their bytes and is used again.
type batch struct {
	events  []*eventlog.Event
	store   []eventlog.Event
	arena   []byte
	bytes   int
	after   eventlog.Position // exclusive
	through eventlog.Position // everything selected in (after, through] is in events
	oldest  time.Time         // of the first event, selected or not
}

func (b *batch) reset(after eventlog.Position) {
	clear(b.events)
	clear(b.store) // lets go of strings and of what was too big for the arena
	b.events, b.store, b.arena = b.events[:0], b.store[:0], b.arena[:0]
	b.bytes, b.after, b.through, b.oldest = 0, after, after, time.Time{}
}

// add keeps a copy of an event.
func (b *batch) add(e *eventlog.Event) {
	if len(b.store) == cap(b.store) {
		// The events handed out point into the old array, which lives on with them.
		b.store = make([]eventlog.Event, 0, max(256, 2*cap(b.store)))
	}
	b.store = append(b.store, *e)
	c := &b.store[len(b.store)-1]
	c.Data, c.Before, c.Rest, c.Metadata = b.keep(e.Data), b.keep(e.Before), b.keep(e.Rest), b.keep(e.Metadata)
	b.events = append(b.events, c)
	b.bytes += eventBytes(e)
}

func (b *batch) keep(p []byte) []byte {
	if p == nil {
		return nil
	}
	if len(b.arena)+len(p) > cap(b.arena) {
		if len(p) > minArenaBytes {
			return append(make([]byte, 0, len(p)), p...)
		}
		// Grows until one piece holds a whole batch; from then on nothing is allocated.
		b.arena = make([]byte, 0, min(max(minArenaBytes, 2*cap(b.arena)), maxArenaBytes))
	}
	n := len(b.arena)
	b.arena = append(b.arena, p...)
	return b.arena[n:len(b.arena):len(b.arena)]
}

// The size of the pieces in which a batch takes memory.
const (
	minArenaBytes = 64 << 10
	maxArenaBytes = 4 << 20
)

// eventBytes is about what an event takes in memory.
func eventBytes(e *eventlog.Event) int {
	return len(e.Data) + len(e.Before) + len(e.Rest) + len(e.Metadata) + 300
}

const (
	minBatchEvents = 16
	maxBatchEvents = 16 << 10
)

// batchReader reads the log in batches of bounded bytes. A statement is always read to its end, so that its connection
// can be used again; limit, which follows the size of the events, keeps what is thrown away small.
type batchReader struct {
	log      Log
	sel      *selection
	maxBytes int
	limit    int
}

// fill reads what follows after, at most up to head.
func (r *batchReader) fill(ctx context.Context, b *batch, after, head eventlog.Position) error {
	b.reset(after)
	if r.limit == 0 {
		r.limit = 1024
	}
	read, seen, full, last := 0, 0, false, after
	err := r.log.Read(ctx, eventlog.Selection{After: after, Until: head, Limit: r.limit, Quiet: r.sel.quiet, NoRest: true}, func(e *eventlog.Event) error {
		if full {
			return nil
		}
		n := eventBytes(e)
		if read > 0 && seen+n > r.maxBytes {
			full = true
			return nil
		}
		if read == 0 {
			b.oldest = e.OccurredAt
		}
		read++
		seen += n
		last = e.Position
		if r.sel.takes(e) {
			b.add(e)
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.through = last
	if !full && read < r.limit {
		b.through = head // what lies behind the last one is quiet
	}
	if full {
		r.limit = max(minBatchEvents, read)
	} else if read > 0 {
		r.limit = min(max(minBatchEvents, r.maxBytes/(seen/read)), 2*r.limit, maxBatchEvents)
	}
	return nil
}
