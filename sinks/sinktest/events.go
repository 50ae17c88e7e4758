package sinktest

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// Generator makes believable events: several aggregates, composite and odd keys, NULLs, quotes, quiet events, imports,
// truncates, notes and gaps. It is deterministic.
type Generator struct {
	rand *rand.Rand
	n    uint64
	now  time.Time
}

// NewGenerator makes a generator from a seed.
func NewGenerator(seed uint64) *Generator {
	return &Generator{rand: rand.New(rand.NewPCG(seed, 7)), now: time.Date(2026, 3, 1, 9, 30, 0, 123456000, time.UTC)}
}

var relations = map[string]*eventlog.Relation{
	"Order":    {Schema: "public", Name: "orders"},
	"CartItem": {Schema: "public", Name: "cart_items"},
	"Kunde":    {Schema: "läden", Name: "kunden"},
}

// Event makes one event of a type for an entity: "OrderUpdated", "Order/42". Its position is the log's business.
func (g *Generator) Event(typ, entity string, op eventlog.Op) *eventlog.Event {
	g.n++
	g.now = g.now.Add(time.Duration(g.rand.IntN(5000)) * time.Microsecond)
	aggregate, id, _ := strings.Cut(entity, "/")
	e := &eventlog.Event{
		Aggregate: aggregate, AggregateID: id, Type: typ, Op: op,
		Data:       fmt.Appendf(nil, `{"status":%q,"total":"%d.50","note":"line\nbreak, \"quotes\", ü","n":%d}`, "paid", g.rand.IntN(1000), g.n),
		Metadata:   fmt.Appendf(nil, `{"actor":"user-%d","request":"r-%x"}`, g.rand.IntN(9), g.rand.Uint32()),
		OccurredAt: g.now, Relation: relations[aggregate], Source: 1, XID: uint32(700 + g.n/3), CommitLSN: eventlog.LSN(0x1A2B3C00 + g.n*96),
		Change: int64(g.n % 3), Part: 0, SchemaVersion: 2, RulesVersion: 1, StreamID: int32(len(aggregate)),
	}
	if op == eventlog.OpUpdate || op == eventlog.OpDelete {
		e.Before = fmt.Appendf(nil, `{"status":"pending","total":null}`)
	}
	binary.BigEndian.PutUint64(e.ID[:], 0x00abcdef_0000_8000|g.n>>40)
	binary.BigEndian.PutUint64(e.ID[8:], 1<<63|g.n)
	return e
}

// Mix makes n events of all kinds over the given number of entities per aggregate. Quiet ones are among them.
func (g *Generator) Mix(n, entities int) []*eventlog.Event {
	out := make([]*eventlog.Event, 0, n)
	for range n {
		k := g.rand.IntN(entities)
		var e *eventlog.Event
		switch x := g.rand.IntN(100); {
		case x < 15:
			e = g.Event("OrderCreated", fmt.Sprintf("Order/%d", k), eventlog.OpInsert)
		case x < 55:
			e = g.Event("OrderUpdated", fmt.Sprintf("Order/%d", k), eventlog.OpUpdate)
		case x < 60:
			e = g.Event("OrderDeleted", fmt.Sprintf("Order/%d", k), eventlog.OpDelete)
		case x < 75:
			e = g.Event("CartItemUpdated", fmt.Sprintf(`CartItem/%d,a\,b %d`, k, k%3), eventlog.OpUpdate)
		case x < 85:
			e = g.Event("KundeUpdated", fmt.Sprintf("Kunde/ä\"%d", k), eventlog.OpUpdate)
		case x < 90:
			e = g.Event("OrderImported", fmt.Sprintf("Order/%d", k), eventlog.OpImport)
		case x < 95:
			e = g.Event("OrderTouched", fmt.Sprintf("Order/%d", k), eventlog.OpUpdate)
			e.Quiet = true
		case x < 97:
			e = g.Event("CountryGuessed", fmt.Sprintf("Order/%d", k), eventlog.OpNote)
			e.Relation = nil
		case x < 98:
			e = g.Event("OrderTruncated", "Order/", eventlog.OpTruncate)
		default:
			e = g.Event("Gap", "Backstory/", eventlog.OpGap)
			e.Relation, e.Data = nil, []byte(`{"reason":"slot lost"}`)
		}
		out = append(out, e)
	}
	return out
}

// Big makes an event whose data is about so many bytes.
func (g *Generator) Big(entity string, bytes int) *eventlog.Event {
	e := g.Event("OrderUpdated", entity, eventlog.OpUpdate)
	var b strings.Builder
	b.WriteString(`{"document":"`)
	for b.Len() < bytes {
		fmt.Fprintf(&b, "%016x", g.rand.Uint64())
	}
	b.WriteString(`"}`)
	e.Data = []byte(b.String())
	return e
}
