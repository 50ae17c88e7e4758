package eventlog

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Entity is what a person names: a kind of entity, or one of them.
type Entity struct {
	Aggregate string // Order
	ID        string // 42; empty: all of them
	Table     string // public.orders; empty for aggregates without a table
}

// ErrNoEntity means that the log knows nothing of that name.
var ErrNoEntity = errors.New("the log knows nothing of that name")

// Entity finds what a person means by Order/42, orders/42, public.orders/42, or the same without an id. Names are
// compared without regard to case where that is not ambiguous.
func (l *Log) Entity(ctx context.Context, text string) (Entity, error) {
	name, id, hasID := strings.Cut(text, "/")
	if name == "" || hasID && id == "" {
		return Entity{}, &Problem{fmt.Errorf("%q %w", text, ErrBadEntity), "Use the form Order/42 or orders/42, or Order for all orders."}
	}
	if err := l.dict.load(ctx); err != nil {
		return Entity{}, err
	}
	captured, err := l.Captured(ctx)
	if err != nil {
		return Entity{}, err
	}
	table := map[string]string{} // aggregate → its table
	names := map[string][]string{}
	add := func(name, aggregate string) {
		name = strings.ToLower(name)
		if !slices.Contains(names[name], aggregate) {
			names[name] = append(names[name], aggregate)
		}
	}
	addTable := func(r *Relation, aggregate string) {
		table[aggregate] = r.String()
		_, name := r.Table()
		add(name, aggregate)
		add(r.String(), aggregate)
	}
	known := map[string]bool{}
	l.dict.mu.Lock()
	for _, k := range l.dict.kinds {
		add(k.aggregate.name, k.aggregate.name)
		if k.relation != nil {
			addTable(k.relation, k.aggregate.name)
			known[k.relation.String()] = true
		}
	}
	l.dict.mu.Unlock()
	for _, c := range captured {
		if known[c.Relation.String()] { // its aggregate may have another name than the convention says
			continue
		}
		add(AggregateName(c.Relation), AggregateName(c.Relation))
		addTable(c.Relation, AggregateName(c.Relation))
	}
	found := names[strings.ToLower(name)]
	if len(found) > 1 && slices.Contains(found, name) {
		found = []string{name}
	}
	switch len(found) {
	case 1:
		return Entity{Aggregate: found[0], ID: id, Table: table[found[0]]}, nil
	case 0:
		var all []string
		for n := range names {
			all = append(all, n)
		}
		hint := "The log holds: " + strings.Join(list(names), ", ") + "."
		if near := Nearest(strings.ToLower(name), all); near != "" {
			hint = "Did you mean " + names[near][0] + "? " + hint
		} else {
			hint += " A table made since is taken in by backstory init; partitions go by the name of their partitioned table."
		}
		if len(all) == 0 {
			hint = "The log is empty: backstory status shows whether the sidecar runs."
		}
		return Entity{}, &Problem{fmt.Errorf("%w: %s", ErrNoEntity, name), hint}
	}
	slices.Sort(found)
	return Entity{}, &Problem{fmt.Errorf("%s can mean %s", name, strings.Join(found, " or ")), "Use one of these names, or the table with its schema."}
}

// list gives the aggregates once each, sorted.
func list(names map[string][]string) []string {
	var out []string
	for _, as := range names {
		for _, a := range as {
			if !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	slices.Sort(out)
	return out
}

// Nearest finds the name that is most like s, for "did you mean"; "" if none is much like it. names are sorted.
func Nearest(s string, names []string) string {
	best, bestD := "", len(s)/2+1
	slices.Sort(names)
	for _, n := range names {
		if d := distance(s, n); d < bestD {
			best, bestD = n, d
		}
	}
	return best
}

// distance is that of Levenshtein.
func distance(a, b string) int {
	prev := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := range len(a) {
		cur := make([]int, len(b)+1)
		cur[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			cur[j+1] = min(cur[j]+1, prev[j+1]+1, prev[j]+cost)
		}
		prev = cur
	}
	return prev[len(b)]
}

// Who and why in a context, whatever the application calls them, in the order of preference.
var (
	actorKeys   = []string{"actor", "user", "current_user", "user_email", "email", "username", "user_id", "current_user_id", "whodunnit"}
	reasonKeys  = []string{"reason", "message", "comment", "note", "action", "endpoint", "job"}
	requestKeys = []string{"request_id", "request", "req_id", "trace_id"}
)

// Who is the actor, the reason and the request that an event's metadata tell of; what they do not tell is empty.
type Who struct{ Actor, Reason, Request string }

// WhoOf reads the well-known names in an event's metadata.
func WhoOf(metadata []byte) Who {
	if len(metadata) == 0 {
		return Who{}
	}
	m := map[string]string{}
	_ = EachMember(metadata, func(name, value []byte) error {
		if txt, null, err := AppendText(nil, &Type{}, value); err == nil && !null {
			m[string(name)] = string(txt)
		} else if err != nil {
			m[string(name)] = string(value)
		}
		return nil
	})
	pick := func(keys []string) string {
		for _, k := range keys {
			if v := m[k]; v != "" {
				return v
			}
		}
		return ""
	}
	return Who{pick(actorKeys), pick(reasonKeys), pick(requestKeys)}
}
