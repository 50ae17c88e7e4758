package eventlog

import (
	"encoding/json"
	"slices"
	"strings"
)

// Kind says how the text that Postgres prints for a value of a type is put into JSON, and back.
// The stored form of each kind is specified beside AppendJSON.
type Kind uint8

// The kinds. A domain has the kind of its base type; every type not named here is KindText.
const (
	KindText        Kind = iota // a JSON string holding what Postgres prints
	KindInt                     // int2, int4, int8, oid: a JSON number
	KindFloat                   // float4, float8: a JSON number; NaN and ±Infinity are strings
	KindBool                    // a JSON boolean
	KindJSON                    // json, jsonb: nested, its text kept
	KindTimestamp               // timestamp: ISO 8601 without zone
	KindTimestampTZ             // timestamptz: RFC 3339 in UTC
	KindBytea                   // bytea: a JSON string of hexadecimal digits as Postgres prints it, \x0102
)

// Type is what is known of a column's data type.
type Type struct {
	OID   uint32 `json:"oid"`             // of the type as the source has it, a domain's own OID included
	Name  string `json:"name"`            // as format_type prints it, type modifier included: numeric(10,2), text[]
	Kind  Kind   `json:"kind,omitempty"`  // of the value, or of the elements where Array is set
	Array bool   `json:"array,omitempty"` // the value is an array of Kind
	Delim byte   `json:"delim,omitempty"` // the array's delimiter; zero means a comma (only box uses another, ';')
}

// IsText tells whether a type prints its text as it is: text and varchar.
func (t *Type) IsText() bool { return t.OID == 25 || t.OID == 1043 }

// Column is one column of one version of a relation.
type Column struct {
	Name string `json:"name"`
	// Num is pg_attribute.attnum, by which a column is the same under another name; 0 where nobody knows.
	Num int16 `json:"num,omitempty"`
	// Root is the number that it has in the partitioned table of which this is a partition, whose order is another one; 0: in none, or nobody knows.
	Root int16 `json:"root,omitempty"`
	// Missing is the value, as JSON, of the column in rows that were there before it was (pg_attribute.attmissingval, or null); empty where
	// nobody knows, or where it always was there.
	Missing   string `json:"missing,omitempty"`
	Type      Type   `json:"type"`
	NotNull   bool   `json:"not_null,omitempty"`
	Identity  bool   `json:"identity,omitempty"`  // part of the replica identity
	Generated bool   `json:"generated,omitempty"` // GENERATED ALWAYS AS (…): computed by the source
}

// SameColumn tells whether a column of one version of a table is a column of another one: by its number, where both are known, and by its
// name otherwise.
func SameColumn(a, b *Column) bool {
	if a.Num != 0 && b.Num != 0 {
		return a.Num == b.Num
	}
	return a.Name == b.Name
}

// column finds the column of r that a column of another version is; -1 if there is none.
func (r *Relation) column(c *Column) int {
	return slices.IndexFunc(r.Columns, func(o Column) bool { return SameColumn(&o, c) })
}

// Generated is a column that Postgres computes from the other columns of its row (PostgreSQL manual, "Generated Columns").
type Generated struct {
	Name       string `json:"name"`
	Type       string `json:"type"`           // as format_type prints it
	Expression string `json:"expression"`     // as pg_get_expr prints it; names outside pg_catalog have their schema
	Num        int16  `json:"num,omitempty"`  // pg_attribute.attnum
	Root       int16  `json:"root,omitempty"` // as Column.Root
	Before     int    `json:"before"`         // the index in Columns of the column that follows it; len(Columns) at the end
}

// Relation is one version of a captured table: its shape from some position on. It is immutable once built.
type Relation struct {
	OID          uint32
	Schema, Name string // its own, as the source has it (see String)
	// RootSchema and RootName are those of the partitioned table that it is a partition of, at whatever depth; empty: of none.
	RootSchema, RootName string
	// RootOID is that of this table, by which it is the same under another name.
	RootOID uint32
	// Dropped says that the table is gone: it has no rows and no shape from here on.
	Dropped         bool
	ReplicaIdentity byte // 'd' default (the primary key), 'i' using index, 'f' full, 'n' nothing: pg_class.relreplident
	Columns         []Column
	Key             []int // the primary key's columns, as indexes into Columns, in key order; empty: the table has none
	// Deferrable says that the primary key is DEFERRABLE: before a transaction ends, several rows may have the same.
	Deferrable bool
	// Complete says that every row of the table is in the log: it was empty at the slot's consistent point.
	Complete bool
	// Generation is that of the table's baseline when this was described: Complete is as it was then, and a baseline of an earlier generation
	// that ends since changes nothing about it. It is no part of the version.
	Generation int64
	// Told says that an event trigger has described it, at a place before this: how complete it is, the version of that place says. It is no part
	// of the version.
	Told bool
	// Lately are the numbers of the columns that the catalogue has as the very transaction left them whose row changes this describes: some of
	// these may be from before. It is no part of the version.
	Lately []int16
	// Beside are columns that the catalogue has and the stream, which this describes, does not: one that is newer may have had the name of another one that
	// is gone. It is no part of the version.
	Beside []Column
	// InsertOnly says that updates and deletes of this table are not in the stream (it has no usable identity).
	InsertOnly bool
	// Doubted says that updates and deletes of the table are in the stream all the same, since the source described it in this way last: what it says of a row
	// from there on holds until it describes the table again. Changes of before may be missing. It is no part of the version.
	Doubted bool
	// Generated are the columns that the source computes from the others and does not send; they are not among Columns.
	Generated []Generated
}

// Table gives the name of the table that the relation's rows belong to: a partition's are those of its partitioned table.
func (r *Relation) Table() (schema, name string) {
	if r.RootName != "" {
		return r.RootSchema, r.RootName
	}
	return r.Schema, r.Name
}

// String gives the qualified name of that table, public.orders, without quotes.
func (r *Relation) String() string {
	schema, name := r.Table()
	return schema + "." + name
}

// Own gives the qualified name of the relation itself, which for a partition is public.orders_2026, without quotes.
func (r *Relation) Own() string { return r.Schema + "." + r.Name }

// IntegerKey tells whether the key is one integer column, so that entity ids are the integers themselves.
func (r *Relation) IntegerKey() bool {
	return len(r.Key) == 1 && r.Columns[r.Key[0]].Type.Kind == KindInt && !r.Columns[r.Key[0]].Type.Array
}

// byRow tells whether the source names the rows of a relation by other columns than its key, so that they are looked up by row_id.
func (r *Relation) byRow() bool {
	var identity []int
	for i := range r.Columns {
		if r.Columns[i].Identity {
			identity = append(identity, i)
		}
	}
	return r.ReplicaIdentity == 'i' && !sameColumns(identity, r.Key)
}

// sameRow tells whether the source names the rows of two versions of a table by the same columns.
func sameRow(a, b *Relation) bool {
	n := 0
	for i := range a.Columns {
		if !a.Columns[i].Identity {
			continue
		}
		n++
		if j := b.column(&a.Columns[i]); j < 0 || !b.Columns[j].Identity {
			return false
		}
	}
	for i := range b.Columns {
		if b.Columns[i].Identity {
			n--
		}
	}
	return n == 0
}

// followed tells whether the log's state of a row can be brought up to date from the stream.
func (r *Relation) followed() bool { return !r.InsertOnly || r.Doubted }

// NamedAnew tells whether the source names a table's rows by columns under which the log does not find those that it has from when the table was as it
// was: they are neither its key nor what it named them by then.
func (r *Relation) NamedAnew(was *Relation) bool {
	return !r.InsertOnly && r.byRow() && !(was.byRow() && sameRow(r, was))
}

// SameShape tells whether two versions of a relation need no new entry in the schema history.
func (r *Relation) SameShape(o *Relation) bool {
	if r.OID != o.OID || r.Own() != o.Own() || r.String() != o.String() || r.Dropped != o.Dropped || r.ReplicaIdentity != o.ReplicaIdentity ||
		r.Deferrable != o.Deferrable || r.InsertOnly != o.InsertOnly || r.Complete != o.Complete || len(r.Columns) != len(o.Columns) || len(r.Key) != len(o.Key) || !slices.Equal(r.Generated, o.Generated) {
		return false
	}
	for i := range r.Columns {
		if r.Columns[i] != o.Columns[i] {
			return false
		}
	}
	for i := range r.Key {
		if r.Key[i] != o.Key[i] {
			return false
		}
	}
	return true
}

// SameDefinition tells whether two versions of a table have the same name, columns and key, however it is captured.
func (r *Relation) SameDefinition(o *Relation) bool {
	same := *o
	same.Complete, same.InsertOnly, same.ReplicaIdentity = r.Complete, r.InsertOnly, r.ReplicaIdentity
	if len(r.Columns) == len(o.Columns) {
		same.Columns = slices.Clone(o.Columns)
		for i := range same.Columns {
			same.Columns[i].Identity = r.Columns[i].Identity
		}
	}
	return r.SameShape(&same)
}

// marshal gives what the log's tables hold as lists.
func (r *Relation) marshal() (columns, generated string, key []int32, err error) {
	c, err := json.Marshal(r.Columns)
	if err != nil {
		return "", "", nil, err
	}
	g, err := json.Marshal(append([]Generated{}, r.Generated...)) // [], not null
	key = make([]int32, len(r.Key))
	for i, k := range r.Key {
		key[i] = int32(k)
	}
	return string(c), string(g), key, err
}

// relationColumns are the columns of a relation in backstory.relation and backstory.captured, in the order of storedRelation.scan.
const relationColumns = "oid::bigint, schema, name, root_oid::bigint, root_schema, root_name, columns::text, key, key_deferrable, generated::text, identity, insert_only, complete, dropped"

// storedRelation is a relation on its way from one of these tables.
type storedRelation struct {
	r                         Relation
	oid, root                 int64
	columns, generated, ident string
	key                       []int32
}

func (s *storedRelation) scan() []any {
	return []any{&s.oid, &s.r.Schema, &s.r.Name, &s.root, &s.r.RootSchema, &s.r.RootName, &s.columns, &s.key, &s.r.Deferrable, &s.generated, &s.ident, &s.r.InsertOnly, &s.r.Complete, &s.r.Dropped}
}

// relation is what was scanned.
func (s *storedRelation) relation() (*Relation, error) {
	r := s.r
	if err := json.Unmarshal([]byte(s.columns), &r.Columns); err != nil {
		return nil, err
	}
	if err := json.Unmarshal([]byte(s.generated), &r.Generated); err != nil {
		return nil, err
	}
	for _, k := range s.key {
		r.Key = append(r.Key, int(k))
	}
	r.OID, r.RootOID, r.ReplicaIdentity = uint32(s.oid), uint32(s.root), s.ident[0]
	return &r, nil
}

// CheckoutMark begins the comment on every schema and table that a checkout has made. Nothing without it is ever replaced, and
// nothing with it is captured.
const CheckoutMark = "backstory checkout"

// QuoteIdent quotes a name for use in SQL.
func QuoteIdent(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }

// QuoteQualified quotes a schema-qualified name for use in SQL.
func QuoteQualified(schema, name string) string { return QuoteIdent(schema) + "." + QuoteIdent(name) }
