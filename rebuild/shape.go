package rebuild

import (
	"bytes"
	"slices"

	"github.com/backstory-dev/backstory/eventlog"
)

// version is one version of a captured table, as the row calculator uses it.
type version struct {
	id    int // in the schema history
	table int // index of the table
	rel   *eventlog.Relation
	names [][]byte
	// deferrable tells that before a transaction ends there may be several rows under a key.
	deferrable bool
	// emptyKey is what the members of an object hold if the key was the empty text; nil where it cannot be.
	emptyKey []byte
	// final gives for each column its place in the table's final shape, -1 where it has none.
	final []int
}

func newVersion(v eventlog.RelationVersion, table int) *version {
	x := &version{id: v.ID, table: table, rel: v.Relation}
	for _, c := range v.Columns {
		x.names = append(x.names, []byte(c.Name))
	}
	if len(v.Key) == 1 && v.Columns[v.Key[0]].Type.Kind == eventlog.KindText {
		x.emptyKey = append(eventlog.AppendString(nil, x.names[v.Key[0]]), `:""`...)
	}
	return x
}

// column finds a column by name, looking from the place where it is expected, and -1 if there is none. Objects hold their
// members in the order of the columns, so that one look usually is enough.
func (v *version) column(name []byte, expected int) int {
	for i := expected; i < len(v.names); i++ {
		if bytes.Equal(v.names[i], name) {
			return i
		}
	}
	for i := 0; i < expected && i < len(v.names); i++ {
		if bytes.Equal(v.names[i], name) {
			return i
		}
	}
	return -1
}

// each calls f for each member of an object with its column; members that are no columns are left out.
func (v *version) each(object []byte, f func(column int, value []byte)) error {
	next := 0
	return eventlog.EachMember(object, func(name, value []byte) error {
		if i := v.column(name, next); i >= 0 {
			next = i + 1
			f(i, value)
		}
		return nil
	})
}

// keyWasEmpty tells whether the values before a change say that the row's key was the empty text, which an event's previous
// id cannot say.
func (v *version) keyWasEmpty(before []byte) bool {
	if v.emptyKey == nil || !bytes.Contains(before, v.emptyKey) {
		return false
	}
	was := false
	_ = v.each(before, func(column int, value []byte) { was = was || column == v.rel.Key[0] && string(value) == `""` })
	return was
}

// sameIdentity tells whether two versions of a table name its rows in the same way: by the same key or, without one, by
// the same columns, under the same names.
func sameIdentity(a, b *version) bool {
	if len(a.rel.Key) != len(b.rel.Key) {
		return false
	}
	for i, k := range a.rel.Key {
		if !eventlog.SameColumn(&a.rel.Columns[k], &b.rel.Columns[b.rel.Key[i]]) {
			return false
		}
	}
	return len(a.rel.Key) > 0 || slices.EqualFunc(a.rel.Columns, b.rel.Columns, func(a, b eventlog.Column) bool { return a.Name == b.Name && eventlog.SameColumn(&a, &b) })
}

// keyKnown tells whether a row has a value in each column of the key.
func (v *version) keyKnown(values [][]byte) bool {
	for _, k := range v.rel.Key {
		if values[k] == nil || string(values[k]) == "null" {
			return false
		}
	}
	return true
}

// missing gives the value of a column in rows from before it was added, in the form of the log. Where nobody knows it, it is NULL.
func missing(c *eventlog.Column) []byte {
	if c.Missing == "" {
		return jsonNull
	}
	return []byte(c.Missing)
}

// object appends a row as the log writes it. A column that came later has the value with which it came.
func (v *version) object(dst []byte, values [][]byte) []byte {
	dst = append(dst, '{')
	for i, value := range values {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(eventlog.AppendString(dst, v.names[i]), ':')
		if value == nil {
			value = missing(&v.rel.Columns[i])
		}
		dst = append(dst, value...)
	}
	return append(dst, '}')
}

// mapTo finds the version's columns in the table's final shape.
func (v *version) mapTo(columns []eventlog.Column) { v.final = v.placesIn(columns) }

// placesIn finds its columns among others, -1 where there is none.
func (v *version) placesIn(columns []eventlog.Column) []int {
	places := make([]int, len(v.rel.Columns))
	for i := range v.rel.Columns {
		places[i] = slices.IndexFunc(columns, func(c eventlog.Column) bool { return eventlog.SameColumn(&v.rel.Columns[i], &c) })
	}
	return places
}
