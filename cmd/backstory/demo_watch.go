//go:build unix

package main

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/eventlog"
)

// watcher reads the event log as it grows, for the demo's screen. It is a reader like any other, but one without a
// checkpoint: it begins a little before the end.
type watcher struct {
	sidecar *backstory.Sidecar

	mu     sync.Mutex // guards the following
	began  time.Time  // of the history; zero: it is empty
	stats  watchStats // since the last summary
	best   *eventlog.Event
	shown  []string // kinds of the events shown last
	orders map[string]*orderStory
	latest []string // the keys of orders, the oldest first
	tx     eventlog.Position
	lsn    eventlog.LSN
}

type watchStats struct {
	events, transactions int64
	lags                 []time.Duration // from a commit until its events could be read here
}

// orderStory is what is known of an order that might be shown.
type orderStory struct {
	id         string
	beforePaid eventlog.Position // the last one before the transaction that paid it; 0: it has not been paid
	shipped    bool
	changes    int
	actors     []string
}

const (
	keptOrders   = 300
	lookBack     = 20000 // events read at the start
	shownMemory  = 15
	lagsRecorded = 10000
)

func newWatcher(s *backstory.Sidecar) *watcher {
	return &watcher{sidecar: s, orders: map[string]*orderStory{}}
}

// run reads until ctx ends.
func (w *watcher) run(ctx context.Context) error {
	log := w.sidecar.Log()
	head, err := log.Head(ctx)
	if err != nil {
		return leftByUser(ctx, err)
	}
	after := max(0, head.Position-lookBack)
	if head.Position > 0 {
		err := log.Read(ctx, eventlog.Selection{Limit: 1, Quiet: true, NoMetadata: true}, func(e *eventlog.Event) error { w.began = e.OccurredAt; return nil })
		if err == nil {
			err = log.Read(ctx, eventlog.Selection{After: after, Until: head.Position, Quiet: true}, func(e *eventlog.Event) error { w.note(e, false); return nil })
		}
		if err != nil {
			return leftByUser(ctx, err)
		}
	}
	for after = head.Position; ; {
		until, err := w.sidecar.Wait(ctx, after)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			err = log.Read(ctx, eventlog.Selection{After: after, Until: until, Quiet: true}, func(e *eventlog.Event) error { w.note(e, true); return nil })
		}
		if err != nil {
			// The server is restarting, perhaps; if the sidecar cannot go on, it will say so itself.
			select {
			case <-time.After(time.Second):
				continue
			case <-ctx.Done():
				return nil
			}
		}
		after = until
	}
}

// note takes one event in. e is valid until it returns.
func (w *watcher) note(e *eventlog.Event, live bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.began.IsZero() {
		w.began = e.OccurredAt
	}
	if e.CommitLSN != w.lsn {
		w.lsn, w.tx = e.CommitLSN, e.Position
		if live {
			w.stats.transactions++
			if len(w.stats.lags) < lagsRecorded {
				w.stats.lags = append(w.stats.lags, time.Since(e.OccurredAt))
			}
		}
	}
	if live {
		w.stats.events++
	}
	if e.Quiet {
		return
	}
	if live && (w.best == nil || w.interest(e) > w.interest(w.best)) {
		w.best = e.Clone()
	}
	if e.Aggregate == "Order" && !e.Owned {
		w.order(e)
	}
}

// order adds to the story of one.
func (w *watcher) order(e *eventlog.Event) {
	o := w.orders[e.AggregateID]
	if o == nil {
		if e.Op != eventlog.OpInsert {
			return // its beginning is further back
		}
		o = &orderStory{id: e.AggregateID}
		w.orders[o.id] = o
		w.latest = append(w.latest, o.id)
		if len(w.latest) > keptOrders {
			delete(w.orders, w.latest[0])
			w.latest = w.latest[1:]
		}
	}
	o.changes++
	if actor := eventlog.WhoOf(e.Metadata).Actor; actor != "" && !slices.Contains(o.actors, actor) {
		o.actors = append(o.actors, actor)
	}
	switch string(member(e.Data, "status")) {
	case `"paid"`:
		o.beforePaid = w.tx - 1
	case `"shipped"`:
		o.shipped = true
	}
}

// interest tells how much an event has to say to somebody who sees only a few. The caller holds mu.
func (w *watcher) interest(e *eventlog.Event) float64 {
	base, ok := map[string]float64{"OrderPaid": 8, "OrderShipped": 8, "OrderDelivered": 6, "OrderRefunded": 9, "OrderCancelled": 9, "OrderDiscounted": 7, "AddressCorrected": 8, "OrderPlaced": 6, "OrderUpdated": 5,
		"OrderCreated": 3, "OrderItemDeleted": 9, "OrderItemCreated": 1, "PaymentReceived": 6, "PaymentFailed": 9, "PaymentRefunded": 9, "PaymentUpdated": 4, "PaymentCreated": 1,
		"CustomerUpdated": 7, "CustomerCreated": 4, "CustomerSuspended": 9, "CustomerErased": 9, "ProductRepriced": 6, "ProductRestocked": 6, "ProductSold": 1, "CartCreated": 1, "CartItemCreated": 2,
		"CartItemAmended": 4, "CartItemDeleted": 4, "CartDeleted": 5, "CartAbandoned": 6, "CartOrdered": 2}[e.Type]
	if !ok {
		base = 6
	}
	for _, k := range w.shown {
		if k == kindOf(e) {
			base *= 0.6
		}
	}
	return base
}

// kindOf tells events apart that look different on the screen.
func kindOf(e *eventlog.Event) string { return e.Type + string(member(e.Data, "status")) }

// sample gives the most interesting event since the last call, nil if there was none.
func (w *watcher) sample() *eventlog.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.best
	if w.best = nil; e != nil {
		w.shown = append(w.shown, kindOf(e))
		if len(w.shown) > shownMemory {
			w.shown = w.shown[1:]
		}
	}
	return e
}

// take gives the figures since the last call.
func (w *watcher) take() watchStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.stats
	w.stats = watchStats{}
	slices.Sort(s.lags)
	return s
}

// history tells how far back the history goes.
func (w *watcher) history() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.began.IsZero() {
		return 0
	}
	return time.Since(w.began)
}

// story gives the order that has the most to tell, another one than the last if there is one, nil as long as none has been paid and
// shipped.
func (w *watcher) story(last string) *orderStory {
	w.mu.Lock()
	defer w.mu.Unlock()
	var best *orderStory
	for _, id := range w.latest {
		o := w.orders[id]
		if o.beforePaid == 0 || !o.shipped {
			continue
		}
		if best == nil || best.id == last || o.id != last && o.score() >= best.score() {
			best = o
		}
	}
	if best == nil {
		return nil
	}
	found := *best
	return &found
}

func (o *orderStory) score() int { return 2*len(o.actors) + o.changes }
