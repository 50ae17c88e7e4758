package e2e

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/backstory-dev/backstory/eventlog"
)

// splitting are rules for every table, made of a seed: some columns each, perhaps the same ones twice, perhaps all, now and then none; and events of inserts and deletes.
type splitting uint64

func (s splitting) Text() string { return fmt.Sprintf("seed %d", uint64(s)) }

func (s splitting) Table(r *eventlog.Relation) *eventlog.TableRules {
	h := fnv.New64a()
	fmt.Fprintf(h, "%d %s", uint64(s), r.String())
	if r.String() == "public.marker" {
		return nil
	}
	rnd := rand.New(rand.NewPCG(uint64(s), h.Sum64()))
	var parts []eventlog.Part
	var ops []eventlog.Op
	for i := range rnd.IntN(6) {
		p := eventlog.Part{Type: fmt.Sprintf("Part%d", i)}
		if rnd.IntN(4) > 0 {
			p.Columns = make([]bool, len(r.Columns))
			for c := range p.Columns {
				p.Columns[c] = rnd.IntN(3) == 0
			}
		}
		if rnd.IntN(3) == 0 {
			p.Extra = []byte(`{"id":"not that of the row","more":[1]}`)
		}
		parts = append(parts, p)
		ops = append(ops, []eventlog.Op{eventlog.OpUpdate, eventlog.OpUpdate, eventlog.OpInsert, eventlog.OpDelete}[rnd.IntN(4)])
	}
	out := &eventlog.TableRules{}
	if columns := len(r.Columns); columns > 0 && rnd.IntN(2) == 0 { // rows belong to something, according to some column, or to another one
		out.Filings = []eventlog.Filing{{Aggregate: "Owner", Table: "nowhere.owners", Key: []int{rnd.IntN(columns)}, IDType: "bigint"}, {Aggregate: "Other", Table: "nowhere.others", Key: []int{rnd.IntN(columns), rnd.IntN(columns)}, IDType: "text"}}
		if by := rnd.IntN(columns); rnd.IntN(3) > 0 {
			out.File = func(c *eventlog.RowChange, after bool) (int, error) {
				state, value, _, err := c.Value(by, after)
				if err != nil || state != eventlog.StateText || len(value) == 0 {
					return -1, err
				}
				return int(value[len(value)/2])%3 - 1, nil
			}
		}
	}
	typer := func(c *eventlog.RowChange) ([]eventlog.Part, error) {
		var made []eventlog.Part
		for i, p := range parts {
			concerns := c.Op != eventlog.OpUpdate || p.Columns == nil
			for n, changed := range c.Changed {
				concerns = concerns || changed && p.Columns[n]
			}
			if ops[i] == c.Op && concerns {
				made = append(made, p)
			}
		}
		if c.Op == eventlog.OpUpdate { // of which one that takes nothing is no event
			quiet := true
			for n, changed := range c.Changed {
				quiet = quiet && (!changed || eventlog.QuietByConvention(r.Columns[n].Name))
			}
			if quiet {
				made = nil
			}
		}
		return made, nil
	}
	out.Type = typer
	for i := range out.Filings {
		out.Filings[i].Type = typer
	}
	return out
}

// joiner makes one event of those of a row change, and checks that they fit together.
type joiner struct {
	pending *eventlog.Event // the parts so far
	main    *eventlog.Event // the insert that later parts restate
}

func (j *joiner) flush(f func(*eventlog.Event) error) error {
	e := j.pending
	if j.pending = nil; e == nil {
		return nil
	}
	if e.Restates {
		return fmt.Errorf("event %d restates a delete that does not come", e.Position)
	}
	return f(e)
}

func (j *joiner) add(e *eventlog.Event, f func(*eventlog.Event) error) error {
	of := j.pending
	if of == nil {
		of = j.main
	}
	if e.Part == 0 || of == nil || e.XID != of.XID || e.CommitLSN != of.CommitLSN || e.Change != of.Change {
		if err := j.flush(f); err != nil {
			return err
		}
		j.main = nil
		if e.Part != 0 {
			return fmt.Errorf("event %d is part %d, of what?", e.Position, e.Part)
		}
		switch {
		case e.Op == eventlog.OpInsert:
			if e.Restates {
				return fmt.Errorf("event %d restates nothing", e.Position)
			}
			j.pending = e.Clone()
			return nil
		case e.Op == eventlog.OpUpdate || e.Op == eventlog.OpDelete && e.Restates:
			j.pending = e.Clone()
			return nil
		}
		return f(e)
	}
	p := j.pending
	if p == nil || e.Part != p.Part+1 || e.Op != p.Op || e.AggregateID != p.AggregateID || e.Key != p.Key || e.Owned != p.Owned || e.SchemaVersion != p.SchemaVersion || !bytes.Equal(e.Metadata, p.Metadata) && !bytes.Contains(slices.Concat(e.Metadata, p.Metadata), []byte("unknown")) && !bytes.Contains(p.Metadata, []byte("moved_from")) {
		return fmt.Errorf("event %d is no further part of event %d", e.Position, of.Position)
	}
	switch e.Op {
	case eventlog.OpInsert:
		if !e.Restates || e.PreviousKey != "" || e.Before != nil || e.Rest != nil {
			return fmt.Errorf("event %d: a second insert of a row", e.Position)
		}
		if err := within2(e.Data, p.Data); err != nil {
			return fmt.Errorf("event %d restates: %w", e.Position, err)
		}
		p.Part, p.Position = e.Part, e.Position
	case eventlog.OpDelete:
		mine, theirs := e, p
		if e.Restates {
			mine, theirs = p, e
		}
		_ = mine
		if err := within2(theirs.Before, e.Before); !e.Restates && err != nil {
			return fmt.Errorf("event %d restates: %w", p.Position, err)
		}
		c := e.Clone()
		j.pending = c
		if !e.Restates {
			return j.flush(f)
		}
	case eventlog.OpUpdate:
		return j.update(p, e)
	}
	return nil
}

// update adds a part of an update.
func (j *joiner) update(p, e *eventlog.Event) error {
	whole := p.Rest != nil // the first one has all: the others restate it
	if e.PreviousKey != "" || e.Restates != whole {
		return fmt.Errorf("event %d: a later part that moves the row, or restates what is not said: %v", e.Position, e.Restates)
	}
	if len(e.Data) <= 2 || len(p.Data) <= 2 {
		return fmt.Errorf("event %d: a part that sets nothing", e.Position)
	}
	data, err := members(p.Data)
	if err != nil {
		return err
	}
	before, _ := members(p.Before)
	rest, _ := members(e.Rest)
	first, _ := members(p.Rest)
	more, err := members(e.Data)
	if err != nil {
		return err
	}
	moreBefore, _ := members(e.Before)
	for k, v := range more {
		if old, ok := data[k]; ok && old != v {
			return fmt.Errorf("event %d sets %s to another value than the one before", e.Position, k)
		}
		if old, ok := first[k]; first != nil && (!ok || old != v) && data[k] == "" {
			return fmt.Errorf("event %d sets %s, which the rest of the one before has as %q", e.Position, k, old)
		}
	}
	for k, v := range moreBefore {
		if old, ok := before[k]; ok && old != v {
			return fmt.Errorf("event %d: %s was another value than according to the one before", e.Position, k)
		}
	}
	maps.Copy(data, more)
	maps.Copy(before, moreBefore)
	c := e.Clone()
	c.PreviousKey, c.Metadata, c.Restates = p.PreviousKey, joinUnknown(p, c), false
	c.Data, c.Before = object(data), object(before)
	if e.Rest != nil {
		for k := range data {
			if old, ok := rest[k]; ok && old != data[k] {
				return fmt.Errorf("event %d: the rest has %s as %s, which the change set to %s", e.Position, k, old, data[k])
			}
			delete(rest, k)
		}
		c.Rest = object(rest)
	} else if p.Rest != nil {
		for k := range data {
			delete(first, k)
		}
		c.Rest = object(first)
	}
	j.pending = c
	return nil
}

// joinUnknown gives the metadata of a joined event.
func joinUnknown(p, e *eventlog.Event) []byte {
	if len(e.Metadata) >= len(p.Metadata) {
		return e.Metadata
	}
	return p.Metadata
}

func object(m worldRow) []byte {
	b := []byte{'{'}
	for k, v := range m {
		if len(b) > 1 {
			b = append(b, ',')
		}
		b = append(append(eventlog.AppendString(b, []byte(k)), ':'), v...)
	}
	return append(b, '}')
}

// within2 tells whether all members of one object are in another.
func within2(some, all []byte) error {
	a, err := members(some)
	if err != nil {
		return err
	}
	b, err := members(all)
	if err != nil {
		return err
	}
	for k, v := range a {
		if o, ok := b[k]; !ok || o != v {
			return fmt.Errorf("%s is %s, but %s in the whole row", k, v, o)
		}
	}
	return nil
}
