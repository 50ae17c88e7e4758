package kafka

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	kafka "github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/protocol"

	"github.com/backstory-dev/backstory/eventlog"
)

// tail is what the end of a partition tells.
type tail struct {
	start, end int64             // the partition's first offset; the offset that its next record gets
	position   eventlog.Position // highest of our records; 0: there is none, or it has expired
	id         eventlog.ID       // of that event
	producer   producer          // of our last batch, as its next batch must continue it; id -1: none
	elsewhere  bool              // a record of ours has a key that now belongs to another partition
}

// record is a record of ours as found in a partition.
type record struct {
	offset   int64
	position eventlog.Position
	id       eventlog.ID
	producer producer // continued after this record
	at       int      // partition to which its key belongs
}

// tailScanBytes bounds how far back a partition is searched for a record of ours, where others write to it, too.
const tailScanBytes = 256 << 20

// readTail reads a partition from its end backwards until it meets a record of ours, and then on to one whose position is
// not after stop: normally a record or a batch, and a few hundred kilobytes at most. collect, if not nil, gets each position
// met. With stop = 0 and collect the whole partition is read.
func (s *Sink) readTail(ctx context.Context, topic string, id, partitions int, stop eventlog.Position, collect func(eventlog.Position)) (tail, error) {
	t := tail{producer: producer{id: -1}}
	var err error
	if t.start, t.end, err = s.offsets(ctx, topic, id); err != nil {
		return t, err
	}
	scanned := int64(0)
	lastOffset := int64(-1)
	for hi, step := t.end, int64(1); hi > t.start; step *= 8 {
		lo := max(t.start, hi-step)
		found, reached := false, false
		n, err := s.readRange(ctx, topic, id, partitions, lo, hi, func(r record) {
			found = true
			reached = reached || r.position <= stop
			t.elsewhere = t.elsewhere || r.at != id
			if r.position > t.position {
				t.position, t.id = r.position, r.id
			}
			if r.offset > lastOffset {
				lastOffset, t.producer = r.offset, r.producer
			}
			if collect != nil {
				collect(r.position)
			}
		})
		if err != nil {
			return t, err
		}
		if reached || found && collect == nil {
			return t, nil
		}
		if scanned += n; collect == nil && scanned > tailScanBytes {
			s.log.Warn("no event of ours at the end of a partition that others write to; relying on the checkpoint",
				"topic", topic, "partition", id, "searched_bytes", scanned)
			return t, nil
		}
		hi = lo
	}
	return t, nil
}

func (s *Sink) offsets(ctx context.Context, topic string, id int) (start, end int64, err error) {
	res, err := s.client.ListOffsets(ctx, &kafka.ListOffsetsRequest{
		Topics: map[string][]kafka.OffsetRequest{topic: {kafka.FirstOffsetOf(id), kafka.LastOffsetOf(id)}},
	})
	if err != nil {
		return 0, 0, s.explain(err, "read the offsets of partition "+strconv.Itoa(id), topic)
	}
	list := res.Topics[topic]
	if len(list) != 1 {
		return 0, 0, fmt.Errorf("read the offsets of %s/%d: the broker did not answer", topic, id)
	}
	if list[0].Error != nil {
		return 0, 0, s.explain(list[0].Error, "read the offsets of partition "+strconv.Itoa(id), topic)
	}
	return list[0].FirstOffset, list[0].LastOffset, nil
}

// readRange calls f for each record of ours with an offset in [lo, hi), oldest first, and returns about how many bytes it
// read. Records of others, transaction markers and what compaction has removed are passed over.
func (s *Sink) readRange(ctx context.Context, topic string, id, partitions int, lo, hi int64, f func(record)) (n int64, err error) {
	for offset := lo; offset < hi; {
		res, err := s.client.Fetch(ctx, &kafka.FetchRequest{Topic: topic, Partition: id, Offset: offset, MinBytes: 1, MaxBytes: 1 << 20, MaxWait: s.cfg.RequestTimeout / 4})
		if err == nil {
			err = res.Error
		}
		if errors.Is(err, kafka.OffsetOutOfRange) { // expired while we were reading
			start, _, oerr := s.offsets(ctx, topic, id)
			if oerr != nil {
				return n, oerr
			}
			if start <= offset {
				return n, s.explain(err, "read the end of partition "+strconv.Itoa(id), topic)
			}
			offset = start
			continue
		}
		if err != nil {
			return n, s.explain(err, "read the end of partition "+strconv.Itoa(id), topic)
		}
		next := offset
		stream, ok := res.Records.(*protocol.RecordStream)
		if !ok { // nothing at all
			stream = &protocol.RecordStream{}
		}
		for _, set := range stream.Records {
			batch, _ := set.(*protocol.RecordBatch)
			for {
				rec, err := set.ReadRecord()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					return n, fmt.Errorf("read the end of %s/%d: %w", topic, id, err)
				}
				next = max(next, rec.Offset+1)
				key, err := readAll(rec.Key)
				if rec.Value != nil {
					n += int64(rec.Value.Len())
					_ = rec.Value.Close()
				}
				if err != nil {
					return n, fmt.Errorf("read the end of %s/%d: %w", topic, id, err)
				}
				n += int64(len(key)) + 100
				if batch == nil || rec.Offset < lo || rec.Offset >= hi { // a batch is sent whole, whatever offset was asked for
					continue
				}
				if r, ours := s.parse(rec, batch); ours {
					r.at = partitionOf(key, partitions)
					f(r)
				}
			}
		}
		if next == offset {
			// The batch that covers this offset has no record at it (compaction, an empty batch), and the client does not
			// say where the batch ends.
			next++
		}
		offset = next
	}
	return n, nil
}

func readAll(b protocol.Bytes) ([]byte, error) {
	if b == nil {
		return nil, nil
	}
	defer b.Close()
	return protocol.ReadAll(b)
}

// parse tells whether a record is of this log and reactor, and what it says.
func (s *Sink) parse(rec *protocol.Record, b *protocol.RecordBatch) (r record, ours bool) {
	var pos, id, log string
	for i := range rec.Headers {
		switch h := &rec.Headers[i]; h.Key {
		case headerPosition:
			pos = string(h.Value)
		case headerID:
			id = string(h.Value)
		case headerLog:
			log = string(h.Value)
		}
	}
	if log != string(s.enc.origin) {
		return r, false
	}
	p, err := strconv.ParseInt(pos, 10, 64)
	if err != nil || p <= 0 {
		return r, false
	}
	if r.id, err = eventlog.ParseID(id); err != nil {
		return r, false
	}
	r.offset, r.position = rec.Offset, eventlog.Position(p)
	r.producer = producer{id: -1}
	if b.ProducerID >= 0 && b.BaseSequence >= 0 {
		r.producer = producer{id: b.ProducerID, epoch: b.ProducerEpoch, next: b.BaseSequence}.after(int32(rec.Offset-b.BaseOffset) + 1)
	}
	return r, true
}
