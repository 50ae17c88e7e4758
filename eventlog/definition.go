package eventlog

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
)

// How tables are defined, from which place of the log on: by the event triggers, exactly there, and by looks at the catalogue, at the latest there.

// shapes gives the versions of a table, newest first, and their numbers.
func (d *dictionary) shapes(oid uint32) (out []*Relation, ids []int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, r := range d.relations {
		if r.OID == oid {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b int) int { return b - a })
	for _, id := range ids {
		out = append(out, d.relations[id])
	}
	return out, ids
}

// define takes the definition that a table has from this very place on. Its rows may have got other values there, which no row change tells:
// where it was rewritten, where a column has another type, and where one that was computed is not any more. Where it has another key, or the stream
// names its rows by other columns, the log does not know them by that. Then it is incomplete until they are compared (see Alter).
func (w *Writer) define(ctx context.Context, it *Item) error {
	before, ids := w.log.dict.shapes(it.Relation.OID)
	if len(before) == 0 || it.Relation.Dropped && before[0].Dropped {
		return nil // nothing of it is in the log yet, or nothing new
	}
	was, r := before[0], *it.Relation
	if r.Dropped { // as it was, under whatever name by then
		r = *was
		r.Dropped = true
	}
	r.Complete, r.Generation = was.Complete, was.Generation
	r.Columns = slices.Clone(r.Columns)
	anew := r.NamedAnew(was) && !r.Dropped
	whole := !it.Rewritten && sameKey(was, &r) && !anew
	for i := range r.Columns {
		c, o := &r.Columns[i], was.column(&r.Columns[i])
		computed := slices.ContainsFunc(was.Generated, func(g Generated) bool { return g.Num == c.Num })
		switch {
		case o >= 0 && c.Missing == "":
			c.Missing = was.Columns[o].Missing
		case o < 0 && c.Missing == "" && !it.Rewritten && !computed:
			c.Missing = "null"
		}
		if o < 0 && c.Missing == "" || o >= 0 && was.Columns[o].Type.OID != c.Type.OID && !(c.Type.IsText() && was.Columns[o].Type.IsText()) {
			whole = false
		}
	}
	if was.SameDefinition(&r) && !it.Rewritten && !anew {
		return nil
	}
	if !whole && !r.Dropped {
		r.Complete, r.Generation = false, math.MaxInt64
		w.compareLater(r.OID)
		w.toldLater(r.OID)
	}
	w.lastDML = w.tx.lsn // it held to here
	t, err := w.redefined(ctx, &r)
	if err != nil {
		return err
	}
	return w.altered(t, before, ids, &alteration{Exactly: true, Rewritten: it.Rewritten}, anew)
}

// compareLater has whoever looks at the catalogue next begin to compare a table's rows, even if the table is by then as it was before; unless that is
// about to begin.
func (w *Writer) compareLater(oid uint32) {
	w.tx.progress = fmt.Appendf(w.tx.progress, "UPDATE backstory.captured c SET catalogue = '{}', complete = false WHERE oid = %d AND catalogue NOT IN ('', '"+toldCatalogue+"') AND NOT EXISTS (SELECT FROM backstory.baseline b WHERE b.oid = c.oid AND b.since_lsn = c.since_lsn AND b.heal AND b.done_at IS NULL AND b.pass = 0 AND b.chunks = 0); ", oid)
}

// toldCatalogue is what Captured.Catalogue says of a table that is to be compared, where an event tells why, exactly there.
const toldCatalogue = `{"told":true}`

// toldLater keeps whoever looks at the catalogue, or has done so already, from having an event made that says again what one says here.
func (w *Writer) toldLater(oid uint32) {
	if b := w.baselines[oid]; b != nil && b.Pass == PassShape {
		b.altered = false
	}
	w.tx.progress = fmt.Appendf(w.tx.progress, "UPDATE backstory.captured SET catalogue = '%s' WHERE oid = %d AND catalogue = '{}'; UPDATE backstory.baseline SET altered = false WHERE oid = %[2]d AND pass = 0 AND done_at IS NULL; ", toldCatalogue, oid)
}

// redefined finds what the writer knows of a relation, as tableFor, whose partitioned table is known.
func (w *Writer) redefined(ctx context.Context, r *Relation) (*table, error) {
	w.rooted = true
	t, err := w.tableFor(ctx, r, w.tx.lsn)
	w.rooted = false
	if err != nil {
		return nil, err
	}
	for o, was := range w.tables { // what the stream has described before is as this tells from now on
		if o.OID == r.OID && was != t {
			delete(w.tables, o)
		}
	}
	return t, nil
}

// alteration is what an event says of an altered table.
type alteration struct {
	Exactly   bool   `json:"exactly,omitempty"`      // at this place, not somewhere before
	Rewritten bool   `json:"rewritten,omitempty"`    // rows may have got other values; told only if exactly
	Table     string `json:"renamed_from,omitempty"` // the table's own name before, or that of the partitioned table that it is a partition of
	// Partition is the table's own name, where it became a partition of the one that the event is of, or was one of Detached.
	Partition string            `json:"partition,omitempty"`
	Detached  string            `json:"detached_from,omitempty"`
	Added     []string          `json:"added,omitempty"`
	Dropped   []string          `json:"dropped,omitempty"`
	Renamed   map[string]string `json:"renamed,omitempty"`
	Retyped   map[string]string `json:"retyped,omitempty"`
	Key       *[]string         `json:"key,omitempty"`
	passing   bool              // beside rows: there is an event only if it has something to say
}

// empty tells whether it says nothing.
func (a *alteration) empty() bool {
	return a.Table == "" && a.Partition == "" && a.Detached == "" && len(a.Added)+len(a.Dropped)+len(a.Renamed)+len(a.Retyped) == 0 && a.Key == nil
}

// altered makes the event that says where a table has got another shape: exactly there, or at the latest. before are its versions, newest
// first, and their numbers; it may be that the stream has told of the last one already. Where such an event was made of the shape before, another
// one only says that its rows are compared.
func (w *Writer) altered(t *table, before []*Relation, ids []int, what *alteration, heal bool) error {
	i := slices.IndexFunc(before, func(r *Relation) bool { return !r.SameDefinition(t.rel) })
	if i >= 0 {
		ids = ids[:i]
	}
	said := w.log.dict.noted(ids)
	if said && !heal && !what.Rewritten {
		return nil
	}
	if i >= 0 && !said {
		old := before[i]
		moved := old.RootOID != t.rel.RootOID
		switch {
		case old.Own() != t.rel.Own():
			what.Table = old.Own()
		case !moved && old.String() != t.rel.String():
			what.Table = old.String()
		}
		if moved && t.rel.RootName != "" {
			what.Partition = t.rel.Own()
		}
		if moved && old.RootName != "" {
			what.Detached = old.String()
		}
		what.Renamed, what.Retyped = map[string]string{}, map[string]string{}
		for n := range t.rel.Columns {
			c := &t.rel.Columns[n]
			switch o := old.column(c); {
			case o < 0:
				what.Added = append(what.Added, c.Name)
			default:
				if was := &old.Columns[o]; was.Name != c.Name {
					what.Renamed[was.Name] = c.Name
				}
				if old.Columns[o].Type != c.Type {
					what.Retyped[c.Name] = c.Type.Name
				}
			}
		}
		for n := range old.Columns {
			if t.rel.column(&old.Columns[n]) < 0 {
				what.Dropped = append(what.Dropped, old.Columns[n].Name)
			}
		}
		if !sameKey(old, t.rel) {
			what.Key = &[]string{}
			for _, k := range t.rel.Key {
				*what.Key = append(*what.Key, t.rel.Columns[k].Name)
			}
		}
	}
	if what.passing && what.empty() {
		return nil
	}
	typ := "Altered"
	if t.rel.Dropped {
		if typ = "Dropped"; t.rel.RootName != "" {
			typ, what.Partition = "PartitionDropped", t.rel.Own()
		}
	}
	data, err := json.Marshal(what)
	if err != nil {
		return err
	}
	w.note(t, typ, data)
	return nil
}

// noted tells whether an event says that a table has got one of some versions.
func (d *dictionary) noted(versions []int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, k := range d.kinds {
		if k.op == OpNote && (strings.HasSuffix(k.typ, "Altered") || strings.HasSuffix(k.typ, "Dropped")) && slices.Contains(versions, k.relationID) {
			return true
		}
	}
	return false
}
