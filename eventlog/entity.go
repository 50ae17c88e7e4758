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
	ID        string // 42; empty: all of them, or, with EmptyID, the one whose key is the empty text
	EmptyID   bool
	Table     string // public.orders; empty for aggregates without a table
	// Others are other aggregates under which its history lies: those of before its table was renamed, or attached as a partition, and those of
	// partitions with keys of other types. Of these only the events of the tables OIDs count.
	Others []string
	OIDs   []uint32
}

// Selection selects the events of it.
func (e Entity) Selection() Selection {
	return Selection{Aggregates: append([]string{e.Aggregate}, e.Others...), OIDs: e.OIDs, EntityID: e.ID, EmptyID: e.EmptyID}
}

// One tells whether it is one entity, not all of them.
func (e Entity) One() bool { return e.ID != "" || e.EmptyID }

// ErrNoEntity means that the log knows nothing of that name.
var ErrNoEntity = errors.New("the log knows nothing of that name")

// Entity finds what a person means by Order/42, orders/42, public.orders/42, or the same without an id; orders/ is the one whose key is
// the empty text. Names are compared without regard to case where that is not ambiguous, and need no quotes; that of a table may have them where Postgres
// prints them: public."Orders"/42.
func (l *Log) Entity(ctx context.Context, text string) (Entity, error) {
	name, id, hasID := strings.Cut(text, "/")
	if name == "" {
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
	exact := map[string][]*Relation{} // by the name of a table, with its schema or without, as it is written
	of := map[string][]string{}       // table → its aggregates
	var tables []namedTable
	add := func(name, aggregate string) {
		name = strings.ToLower(name)
		if !slices.Contains(names[name], aggregate) {
			names[name] = append(names[name], aggregate)
		}
	}
	addTable := func(r *Relation, aggregate string) {
		table[aggregate] = r.String()
		tables = append(tables, namedTable{r, aggregate})
		_, name := r.Table()
		add(name, aggregate)
		add(r.String(), aggregate)
		for _, n := range []string{name, r.String()} {
			exact[n] = append(exact[n], r)
		}
		if !slices.Contains(of[r.String()], aggregate) {
			of[r.String()] = append(of[r.String()], aggregate)
		}
	}
	known := map[string]bool{}
	l.dict.mu.Lock()
	for _, k := range l.dict.kinds {
		add(k.aggregate.name, k.aggregate.name)
		if k.owner != nil {
			add(k.owner.name, k.owner.name)
		}
		if k.relation != nil {
			addTable(k.relation, k.aggregate.name)
			known[k.relation.String()] = true
		}
	}
	l.dict.mu.Unlock()
	for _, c := range captured {
		if known[c.Relation.String()] {
			continue
		}
		aggregate, _ := l.dict.aggregateOf(c.Relation, "", func(a *aggregate) bool { return l.dict.ownedBy(a, c.Relation) }) // what it will be
		add(aggregate, aggregate)
		addTable(c.Relation, aggregate)
	}
	found := names[strings.ToLower(name)]
	if q, rest, ok := parseQuoted(text); ok && len(found) == 0 {
		name, found = q.String(), q.find(tables)
		id, hasID = strings.CutPrefix(rest, "/")
	}
	if len(found) > 1 { // what is spelt like that counts first
		if t := theTable(exact[name]); t != "" {
			found = slices.Clone(of[t])
		} else if slices.Contains(found, name) {
			found = []string{name}
		}
	}
	one := len(found) > 1 && table[found[0]] != "" && !slices.ContainsFunc(found, func(a string) bool { return table[a] != table[found[0]] })
	switch {
	case len(found) == 1 || one:
		slices.Sort(found)
		e := Entity{Aggregate: found[0], ID: id, EmptyID: hasID && id == "", Table: table[found[0]]}
		e.Others, e.OIDs = l.dict.others(e.Aggregate, e.Table)
		return e, nil
	case len(found) == 0:
		var all []string
		for n := range names {
			all = append(all, n)
		}
		hint := "The log holds: " + strings.Join(list(names), ", ") + "."
		if near := Nearest(strings.ToLower(name), all); near != "" {
			hint = "Did you mean " + names[near][0] + "? " + hint
		} else {
			hint += " A table made since is taken in by a sidecar that runs, or by backstory init; partitions go by the name of their partitioned table."
		}
		if len(all) == 0 {
			hint = "The log is empty: backstory status shows whether the sidecar runs."
		}
		return Entity{}, &Problem{fmt.Errorf("%w: %s", ErrNoEntity, name), hint}
	}
	slices.Sort(found)
	return Entity{}, &Problem{fmt.Errorf("%s can mean %s", name, strings.Join(found, " or ")), "Use one of these names, or the table with its schema."}
}

// namedTable is a table, and what its rows are called.
type namedTable struct {
	*Relation
	aggregate string
}

// quotedName is the name of a table, perhaps with that of its schema, of which Postgres prints at least one in quotes (PostgreSQL manual, Identifiers and Key
// Words).
type quotedName struct {
	parts  []string
	quoted []bool
}

// UnquoteTable reads the name of a table as Postgres prints it; schema is empty where there is none. It is false where nothing is in quotes.
func UnquoteTable(text string) (schema, name string, ok bool) {
	q, rest, ok := parseQuoted(text)
	if !ok || rest != "" {
		return "", "", false
	}
	if len(q.parts) == 2 {
		schema = q.parts[0]
	}
	return schema, q.parts[len(q.parts)-1], true
}

// parseQuoted reads such a name, up to the end or a slash. Within quotes, a dot or a slash is a part of the name, and a quote is written twice.
func parseQuoted(text string) (q quotedName, rest string, ok bool) {
	for rest = text; ; rest = rest[1:] { // behind a dot
		part, end, quoted := "", 0, strings.HasPrefix(rest, `"`)
		if quoted {
			for end = 1; ; end++ {
				i := strings.IndexByte(rest[end:], '"')
				if i < 0 {
					return q, text, false
				}
				part += rest[end : end+i]
				if end += i + 1; !strings.HasPrefix(rest[end:], `"`) {
					break
				}
				part += `"`
			}
		} else if end = strings.IndexAny(rest, `./"`); end < 0 {
			end = len(rest)
		}
		if !quoted {
			part = rest[:end]
		}
		if part == "" {
			return q, text, false
		}
		q.parts, q.quoted, rest = append(q.parts, part), append(q.quoted, quoted), rest[end:]
		if rest == "" || rest[0] != '.' {
			return q, rest, (rest == "" || rest[0] == '/') && len(q.parts) <= 2 && slices.Contains(q.quoted, true)
		}
	}
}

// String gives it without quotes.
func (q *quotedName) String() string { return strings.Join(q.parts, ".") }

// means tells whether it is the name of a table; what stands without quotes may have other capitals where fold is set.
func (q *quotedName) means(r *Relation, fold bool) bool {
	schema, name := r.Table()
	of := []string{schema, name}
	for i, o := range of[2-len(q.parts):] {
		if q.parts[i] != o && (q.quoted[i] || !fold || !strings.EqualFold(q.parts[i], o)) {
			return false
		}
	}
	return true
}

// find gives the aggregates of the table that it means, or of all that it can mean.
func (q *quotedName) find(tables []namedTable) (found []string) {
	for _, fold := range []bool{false, true} {
		var meant []*Relation
		for _, t := range tables {
			if q.means(t.Relation, fold) {
				meant = append(meant, t.Relation)
			}
		}
		one := theTable(meant)
		for _, t := range tables {
			if q.means(t.Relation, fold) && (one == "" || t.Relation.String() == one) && !slices.Contains(found, t.aggregate) {
				found = append(found, t.aggregate)
			}
		}
		if len(found) > 0 {
			break
		}
	}
	return found
}

// theTable is the one that is meant by a name that all these tables have: that of schema public, or the only one; "" if there is none.
func theTable(list []*Relation) string {
	var names []string
	for _, r := range list {
		if schema, _ := r.Table(); schema == "public" {
			return r.String()
		}
		if !slices.Contains(names, r.String()) {
			names = append(names, r.String())
		}
	}
	if len(names) != 1 {
		return ""
	}
	return names[0]
}

// others finds the other aggregates of a table's rows, and the tables by whose events they are that: those that have its name, as long as they had
// it, and before.
func (d *dictionary) others(aggregate, table string) (others []string, oids []uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	until := map[uint32]int{} // the last version of that name
	for id, r := range d.relations {
		if r.String() == table {
			until[r.OID] = max(until[r.OID], id)
		}
	}
	for _, k := range d.kinds {
		if k.relation == nil || k.aggregate.name == aggregate || k.relationID > until[k.relation.OID] {
			continue
		}
		if !slices.Contains(others, k.aggregate.name) {
			others = append(others, k.aggregate.name)
		}
	}
	if len(others) > 0 {
		for oid := range until {
			oids = append(oids, oid)
		}
	}
	slices.Sort(others)
	slices.Sort(oids)
	return others, oids
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
