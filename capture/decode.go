package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// The messages of pgoutput, protocol version 1 (PostgreSQL manual, Logical Replication Message Formats).

// errMalformed means that a message is shorter than it says, or of a kind that protocol version 1 does not have.
var errMalformed = errors.New("malformed message from the source")

// cursor reads a message; once something is missing, bad stays set and everything reads as zero.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) take(n int) []byte {
	if n < 0 || n > len(c.b) {
		c.bad, c.b = true, nil
		return nil
	}
	p := c.b[:n:n]
	c.b = c.b[n:]
	return p
}

func (c *cursor) u8() byte {
	if p := c.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (c *cursor) u16() uint16 {
	if p := c.take(2); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if p := c.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if p := c.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

func (c *cursor) str() string {
	for i, x := range c.b {
		if x == 0 {
			s := string(c.b[:i])
			c.b = c.b[i+1:]
			return s
		}
	}
	c.bad, c.b = true, nil
	return ""
}

// time reads microseconds since 2000-01-01 UTC.
func (c *cursor) time() time.Time {
	return time.UnixMicro(int64(c.u64()) + 946684800*1000000).UTC()
}

// relationMessage is what the stream itself says of a table; the catalogue says the rest.
type relationMessage struct {
	oid          uint32
	schema, name string
	identity     byte
	columns      []relationColumn
}

type relationColumn struct {
	name     string
	identity bool
	typeOID  uint32
	typmod   int32
}

func decodeRelation(b []byte) (*relationMessage, error) {
	c := cursor{b: b}
	m := &relationMessage{oid: c.u32(), schema: c.str(), name: c.str(), identity: c.u8()}
	if m.schema == "" {
		m.schema = "pg_catalog"
	}
	n := int(c.u16())
	for i := 0; i < n && !c.bad; i++ {
		m.columns = append(m.columns, relationColumn{identity: c.u8()&1 != 0, name: c.str(), typeOID: c.u32(), typmod: int32(c.u32())})
	}
	if c.bad {
		return nil, fmt.Errorf("relation: %w", errMalformed)
	}
	return m, nil
}

// tuple reads a row into the batch, without copying the values: they must lie in the batch's memory already.
func (c *cursor) tuple(batch *eventlog.Batch, columns int) []eventlog.Value {
	n := int(c.u16())
	if c.bad || n != columns {
		c.bad = true
		return nil
	}
	row := batch.Values(n)
	for i := range row {
		switch c.u8() {
		case 'n':
			row[i].State = eventlog.StateNull
		case 'u':
			row[i].State = eventlog.StateUnchanged
		case 't':
			row[i].Text = c.take(int(c.u32()))
			row[i].State = eventlog.StateText
		default:
			c.bad = true
		}
		if c.bad {
			return nil
		}
	}
	return row
}

// decodeChange reads an INSERT, UPDATE or DELETE whose bytes lie in the batch's memory.
func decodeChange(kind byte, body []byte, rel *eventlog.Relation, batch *eventlog.Batch) (eventlog.Item, error) {
	c := cursor{b: body}
	it := eventlog.Item{Kind: eventlog.ItemChange, Relation: rel}
	n := len(rel.Columns)
	switch kind {
	case 'I':
		it.Op = eventlog.OpInsert
		if c.u8() != 'N' {
			c.bad = true
		}
		it.New = c.tuple(batch, n)
	case 'U':
		it.Op = eventlog.OpUpdate
		switch tag := c.u8(); tag {
		case 'K', 'O':
			it.Old, it.OldFull = c.tuple(batch, n), tag == 'O'
			if c.u8() != 'N' {
				c.bad = true
			}
		case 'N':
		default:
			c.bad = true
		}
		it.New = c.tuple(batch, n)
	case 'D':
		it.Op = eventlog.OpDelete
		switch tag := c.u8(); tag {
		case 'K', 'O':
			it.OldFull = tag == 'O'
		default:
			c.bad = true
		}
		it.Old = c.tuple(batch, n)
	default:
		c.bad = true
	}
	if c.bad || len(c.b) != 0 {
		return it, fmt.Errorf("%q of %s: %w", kind, rel, errMalformed)
	}
	return it, nil
}
