package eventlog

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
	"unsafe"
)

// ID is an event's identity: a UUID (version 8) that is a function of where the event comes from, so that redelivery,
// restart and replay give the same one. Its 122 free bits hold, from the left: the source's tag (24: lineage, timeline and
// incarnation), the commit LSN (56), the ordinal of the row change in its transaction (34), the part within the row
// change (8). backstory.event_id in SQL makes the same.
type ID [16]byte

// makeID packs the parts.
func makeID(tag uint32, lsn LSN, change int64, part int) ID {
	var id ID
	l := uint64(lsn)
	binary.BigEndian.PutUint64(id[:8], uint64(tag)<<40|(l>>32&0xffffff)<<16|0x8000|l>>20&0xfff)
	binary.BigEndian.PutUint64(id[8:], 1<<63|(l&0xfffff)<<42|uint64(change)<<8|uint64(part))
	return id
}

// unpack gives the parts back.
func (id ID) unpack() (tag uint32, lsn LSN, change int64, part int) {
	hi, lo := binary.BigEndian.Uint64(id[:8]), binary.BigEndian.Uint64(id[8:])
	tag = uint32(hi >> 40)
	lsn = LSN((hi>>16&0xffffff)<<32 | (hi&0xfff)<<20 | lo>>42&0xfffff)
	return tag, lsn, int64(lo >> 8 & (1<<34 - 1)), int(lo & 0xff)
}

func (id ID) String() string {
	var b [36]byte
	return string(id.Append(b[:0]))
}

// Append appends what String gives.
func (id ID) Append(b []byte) []byte {
	const digits = "0123456789abcdef"
	var x [36]byte
	n := 0
	for i, c := range id {
		if i == 4 || i == 6 || i == 8 || i == 10 {
			x[n] = '-'
			n++
		}
		x[n], x[n+1] = digits[c>>4], digits[c&15]
		n += 2
	}
	return append(b, x[:]...)
}

// ErrNotID is returned by ParseID for text that is not an event id.
var ErrNotID = errors.New("not an event id")

// ParseID reads the form that String prints.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return id, ErrNotID
	}
	if _, err := hex.Decode(id[:], []byte(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])); err != nil || id[6]>>4 != 8 {
		return ID{}, ErrNotID
	}
	return id, nil
}

// Event is one typed, immutable fact. The byte slices of an event that a Reader hands out are valid until the reader's
// callback returns; Clone keeps one.
type Event struct {
	Position    Position
	ID          ID
	Aggregate   string // Order
	AggregateID string // 42; the values of a composite key joined by a comma, escaped
	Type        string // OrderUpdated
	Op          Op
	Quiet       bool   // stored, but left out of log and sinks unless asked
	Data        []byte // JSON object: the attributes this event sets; nil where it sets none
	Before      []byte // JSON object: their values before, or the whole row of a delete; nil where there were none
	// Rest is a JSON object of the unchanged attributes, on some updates: Data and Rest together are the whole row.
	Rest []byte
	// Extra is a JSON object of attributes that are no columns: what the rules added to Data.
	Extra []byte
	// Restates says that another event of the same row change tells the same of the row: folds of rows leave it out.
	Restates   bool
	Metadata   []byte    // JSON object: who and why, and what is known of this event alone; nil if nothing
	OccurredAt time.Time // when its transaction was committed, by the source's clock; of a gap, the transaction before it
	Relation   *Relation // nil for notes and gaps
	// PreviousID is the entity's id before, where this event changed its key; otherwise empty.
	PreviousID string
	// Key and PreviousKey are those of the row: AggregateID and PreviousID, unless rules file the row's events under another entity.
	Key, PreviousKey string
	// Owned says that the row is not the entity itself: rules file its events under that.
	Owned         bool
	Source        int // number of the source in the log: lineage and timeline
	XID           uint32
	CommitLSN     LSN
	Change        int64
	Part          int
	SchemaVersion int
	RulesVersion  int

	// StreamID is Aggregate's number in the log.
	StreamID int32
	// EntityHash is the number by which the entity is indexed: its key where that is an integer.
	EntityHash int64
}

// Clone gives a copy whose bytes stay valid.
func (e *Event) Clone() *Event {
	c := *e
	c.Data, c.Before = append([]byte(nil), e.Data...), append([]byte(nil), e.Before...)
	c.Rest, c.Extra, c.Metadata = append([]byte(nil), e.Rest...), append([]byte(nil), e.Extra...), append([]byte(nil), e.Metadata...)
	return &c
}

// Entity gives the name by which a person calls the event's entity: Order/42.
func (e *Event) Entity() string { return e.Aggregate + "/" + e.AggregateID }

// AppendJSON appends the event as one JSON object with the field names of the event log. It is what `log --json` prints,
// what sinks send in the format json, and is append-only: fields may be added.
func (e *Event) AppendJSON(b []byte) []byte {
	b = append(b, `{"position":`...)
	b = strconv.AppendInt(b, int64(e.Position), 10)
	b = append(b, `,"id":"`...)
	b = e.ID.Append(b)
	b = append(b, `","aggregate":`...)
	b = appendText(b, e.Aggregate)
	b = append(b, `,"aggregate_id":`...)
	b = appendText(b, e.AggregateID)
	b = append(b, `,"type":`...)
	b = appendText(b, e.Type)
	b = append(b, `,"op":"`...)
	b = append(b, e.Op.String()...)
	b = append(b, `","data":`...)
	b = appendObject(b, e.Data)
	if len(e.Extra) > 2 {
		if b[len(b)-1] = ','; b[len(b)-2] == '{' {
			b = b[:len(b)-1]
		}
		b = appendObject(b, e.Extra[1:])
	}
	b = append(b, `,"before":`...)
	b = appendObject(b, e.Before)
	b = append(b, `,"metadata":`...)
	b = appendObject(b, e.Metadata)
	b = append(b, `,"occurred_at":"`...)
	b = e.OccurredAt.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, `","relation":`...)
	if e.Relation != nil {
		schema, name := e.Relation.Table()
		b = appendText(b, schema)
		b[len(b)-1] = '.' // for the closing quote
		n := len(b)
		b = appendText(b, name)
		b = append(b[:n], b[n+1:]...) // without the opening one
		b = append(b, `,"key":`...)
		b = appendText(b, e.Key)
	} else {
		b = append(b, `null,"key":null`...)
	}
	if e.PreviousID != "" {
		b = append(b, `,"previous_id":`...)
		b = appendText(b, e.PreviousID)
	}
	b = append(b, `,"source":`...)
	b = strconv.AppendInt(b, int64(e.Source), 10)
	b = append(b, `,"xid":`...)
	b = strconv.AppendUint(b, uint64(e.XID), 10)
	b = append(b, `,"commit_lsn":"`...)
	b = e.CommitLSN.append(b)
	b = append(b, `","change":`...)
	b = strconv.AppendInt(b, e.Change, 10)
	b = append(b, `,"part":`...)
	b = strconv.AppendInt(b, int64(e.Part), 10)
	b = append(b, `,"schema_version":`...)
	b = strconv.AppendInt(b, int64(e.SchemaVersion), 10)
	b = append(b, `,"rules_version":`...)
	b = strconv.AppendInt(b, int64(e.RulesVersion), 10)
	if e.Quiet {
		b = append(b, `,"quiet":true`...)
	}
	if e.Restates {
		b = append(b, `,"restates":true`...)
	}
	if e.Relation != nil && e.Relation.RootName != "" {
		b = append(b, `,"partition":`...)
		b = appendText(b, e.Relation.Own())
	}
	return append(b, '}')
}

// MarshalJSON gives what AppendJSON appends.
func (e *Event) MarshalJSON() ([]byte, error) {
	b := e.AppendJSON(nil)
	if !json.Valid(b) {
		return nil, fmt.Errorf("event %d holds invalid JSON", e.Position)
	}
	return b, nil
}

func appendObject(b, obj []byte) []byte {
	if len(obj) == 0 {
		return append(b, '{', '}')
	}
	n := len(b)
	b = append(b, obj...)
	// A json column's text is kept as it was, line breaks between its tokens included; one event is one line here.
	for _, c := range []byte{'\n', '\r'} {
		for i := n; ; i++ {
			k := bytes.IndexByte(b[i:], c)
			if k < 0 {
				break
			}
			i += k
			b[i] = ' '
		}
	}
	return b
}

// appendText is AppendString for a string.
func appendText(b []byte, s string) []byte {
	return AppendString(b, unsafe.Slice(unsafe.StringData(s), len(s))) // which only reads it
}
