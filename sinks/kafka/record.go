package kafka

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"strconv"
	"time"

	"github.com/segmentio/kafka-go/compress"

	"github.com/backstory-dev/backstory/eventlog"
)

// The names of the headers. Their values are text, so that every tool can read them.
const (
	headerID           = "id"            // the event's id: the idempotency key for consumers
	headerType         = "type"          // OrderPaid
	headerPosition     = "position"      // decimal; what the sink looks for when it starts
	headerOccurredAt   = "occurred_at"   // RFC 3339, UTC
	headerAggregate    = "aggregate"     // Order
	headerRulesVersion = "rules_version" // decimal
	headerLog          = "log"           // whose position it is: identity of the log, a slash, the reactor
)

// batch is a record batch, version 2, of one partition (Kafka documentation, Message Format), as bytes that are ready to
// be sent and never change once they have been sent: a broker recognizes a batch that it has already by producer and
// sequence, and must then be holding the same bytes.
//
//	 0 int32  length of the record set (framing of the Produce request)
//	 4 int64  base offset: 0
//	12 int32  length of what follows
//	16 int32  partition leader epoch: -1
//	20 int8   magic: 2
//	21 uint32 CRC-32C of what follows
//	25 int16  attributes: compression
//	27 int32  last offset delta
//	31 int64  first timestamp    39 int64 greatest timestamp
//	47 int64  producer id        55 int16 producer epoch     57 int32 first sequence
//	61 int32  number of records
//	65        records
type batch struct {
	buf         []byte
	count       int32
	first, last eventlog.Position
	positions   []eventlog.Position // only where the topic keeps a set of them
	stamped     bool                // has producer, sequence and CRC
	firstTried  time.Time           // of a batch that may be at the broker
}

const batchHeader = 65

func newBatch(buf []byte, now time.Time) *batch {
	buf = append(buf[:0], make([]byte, batchHeader)...)
	ms := uint64(now.UnixMilli())
	binary.BigEndian.PutUint32(buf[16:], 0xffffffff)
	buf[20] = 2
	binary.BigEndian.PutUint64(buf[31:], ms)
	binary.BigEndian.PutUint64(buf[39:], ms)
	return &batch{buf: buf}
}

// encoder turns events into records. It is used by one goroutine.
type encoder struct {
	origin  []byte // value of headerLog
	key     []byte
	value   []byte
	headers []byte

	// Neighbours usually have these in common, so they are kept as encoded.
	at          time.Time
	atHeader    []byte
	kind        kindHeaders
	kindHeaders []byte
}

// kindHeaders are what headers say of many events alike.
type kindHeaders struct {
	typ, aggregate string
	rulesVersion   int
}

// encodeKey prepares an event's key: Order/42.
func (enc *encoder) encodeKey(e *eventlog.Event) {
	enc.key = append(append(append(enc.key[:0], e.Aggregate...), '/'), e.AggregateID...)
}

// encode prepares an event's value and headers.
func (enc *encoder) encode(e *eventlog.Event) {
	enc.value = e.AppendJSON(enc.value[:0])
	var scratch [40]byte
	if !e.OccurredAt.Equal(enc.at) || enc.atHeader == nil {
		enc.at = e.OccurredAt
		enc.atHeader = appendHeader(enc.atHeader[:0], headerOccurredAt, e.OccurredAt.UTC().AppendFormat(scratch[:0], time.RFC3339Nano))
	}
	if k := (kindHeaders{e.Type, e.Aggregate, e.RulesVersion}); k != enc.kind || enc.kindHeaders == nil {
		enc.kind = k
		h := appendHeader(enc.kindHeaders[:0], headerType, []byte(k.typ))
		h = appendHeader(h, headerAggregate, []byte(k.aggregate))
		h = appendHeader(h, headerRulesVersion, strconv.AppendInt(scratch[:0], int64(k.rulesVersion), 10))
		enc.kindHeaders = appendHeader(h, headerLog, enc.origin)
	}
	h := append(enc.headers[:0], 7<<1) // how many, zigzag
	h = appendHeader(h, headerID, appendID(scratch[:0], e.ID))
	h = appendHeader(h, headerPosition, strconv.AppendInt(scratch[:0], int64(e.Position), 10))
	h = append(h, enc.atHeader...)
	enc.headers = append(h, enc.kindHeaders...)
}

// size is an upper bound of what add will append.
func (enc *encoder) size() int { return len(enc.key) + len(enc.value) + len(enc.headers) + 40 }

// add appends the prepared event to a batch.
func (enc *encoder) add(b *batch, p eventlog.Position) {
	delta := int64(b.count)
	n := 1 + 1 + varintLen(delta) + varintLen(int64(len(enc.key))) + len(enc.key) +
		varintLen(int64(len(enc.value))) + len(enc.value) + len(enc.headers)
	buf := binary.AppendVarint(b.buf, int64(n))
	buf = append(buf, 0, 0) // attributes, timestamp delta
	buf = binary.AppendVarint(buf, delta)
	buf = append(binary.AppendVarint(buf, int64(len(enc.key))), enc.key...)
	buf = append(binary.AppendVarint(buf, int64(len(enc.value))), enc.value...)
	b.buf = append(buf, enc.headers...)
	if b.count == 0 {
		b.first = p
	}
	b.count++
	b.last = p
}

// producer is what a broker recognizes repeated batches by, per partition.
type producer struct {
	id    int64 // -1: none
	epoch int16
	next  int32 // sequence of the next record
}

// after gives the producer's state when n more records have been written; sequences wrap from 2³¹-1 to 0.
func (p producer) after(n int32) producer {
	p.next = int32((int64(p.next) + int64(n)) & 0x7fffffff)
	return p
}

// stamp completes the batch: compression, producer and sequence, lengths, CRC.
func (b *batch) stamp(p producer, codec compress.Compression) error {
	if codec != compress.None {
		packed := bytes.NewBuffer(make([]byte, 0, batchHeader+len(b.buf)/2))
		packed.Write(b.buf[:batchHeader])
		w := codec.Codec().NewWriter(packed)
		if _, err := w.Write(b.buf[batchHeader:]); err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return err
		}
		b.buf = packed.Bytes()
		binary.BigEndian.PutUint16(b.buf[25:], uint16(codec))
	}
	buf := b.buf
	binary.BigEndian.PutUint32(buf, uint32(len(buf)-4))
	binary.BigEndian.PutUint32(buf[12:], uint32(len(buf)-16))
	binary.BigEndian.PutUint32(buf[27:], uint32(b.count-1))
	seq := p.next
	if p.id < 0 {
		seq = -1
	}
	binary.BigEndian.PutUint64(buf[47:], uint64(p.id))
	binary.BigEndian.PutUint16(buf[55:], uint16(p.epoch))
	binary.BigEndian.PutUint32(buf[57:], uint32(seq))
	binary.BigEndian.PutUint32(buf[61:], uint32(b.count))
	binary.BigEndian.PutUint32(buf[21:], crc32.Checksum(buf[25:], castagnoli))
	b.stamped = true
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func appendHeader(b []byte, name string, value []byte) []byte {
	b = append(binary.AppendVarint(b, int64(len(name))), name...)
	return append(binary.AppendVarint(b, int64(len(value))), value...)
}

func varintLen(v int64) int {
	u := uint64(v)<<1 ^ uint64(v>>63)
	n := 1
	for ; u >= 0x80; u >>= 7 {
		n++
	}
	return n
}
