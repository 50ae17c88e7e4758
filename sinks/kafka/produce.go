package kafka

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	kafka "github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/protocol"

	"github.com/backstory-dev/backstory/eventlog"
)

// pendingLimit is how long a batch that may have been written is repeated as it is. The broker recognizes it as long as it
// remembers the producer (producer.id.expiration.ms, a day by default); after this much shorter time the end of the
// partition is read instead.
const pendingLimit = 10 * time.Minute

// drain sends what a partition has waiting, one request after another, until all is written or one is not.
func (s *Sink) drain(ctx context.Context, p *partition) error {
	if b := p.pending; b != nil {
		if err := s.produce(ctx, p, b); err != nil {
			return err
		}
	}
	for _, b := range p.sending {
		if err := b.stamp(p.producer, s.codec); err != nil {
			return fmt.Errorf("compress a batch for Kafka: %w", err)
		}
		if err := s.produce(ctx, p, b); err != nil {
			return err
		}
	}
	return nil
}

// produce sends a batch once and takes note of what came of it.
func (s *Sink) produce(ctx context.Context, p *partition, b *batch) error {
	tried := time.Now()
	res, err := s.client.RawProduce(ctx, &kafka.RawProduceRequest{Topic: p.topic.name, Partition: p.id, RequiredAcks: kafka.RequireAll,
		RawRecords: protocol.RawRecordSet{Reader: bytes.NewReader(b.buf)}})
	if err == nil {
		err = res.Error
	}
	v := judge(err)
	if v == written && p.inherited {
		v, err = s.readBack(ctx, p, b, res.BaseOffset)
	}
	switch {
	case v == written:
		if res.BaseOffset >= 0 {
			s.checkEnd(p, res.BaseOffset)
			p.next = res.BaseOffset + int64(b.count)
		}
		p.producer = p.producer.after(b.count)
		p.pending, p.inherited, p.resyncs = nil, false, 0
		p.sent = max(p.sent, b.last)
		p.acked = append(p.acked, b.positions...)
		if b.firstTried.IsZero() { // otherwise an earlier attempt may still be reading it
			p.spare = append(p.spare, b.buf)
		}
		b.buf = nil
		return nil
	case v == sequence:
		p.pending, p.lookAgain = nil, true
		return fmt.Errorf("send to Kafka topic %s, partition %d: %w: %w", p.topic.name, p.id, errSequence, err)
	case p.pending == b: // it may have been written before, whatever became of this attempt
	case v == tooLarge:
		if b.count > 1 {
			p.tooLarge = len(b.buf)
			return errTooLarge
		}
		return problem(fmt.Sprintf("Let the topic take it: kafka-configs.sh --bootstrap-server %s --alter --entity-type topics --entity-name %s --add-config max.message.bytes=%d "+
			"(and max.partition.fetch.bytes of consumers). Nothing is lost meanwhile.", s.cfg.Brokers[0], p.topic.name, len(b.buf)+len(b.buf)/8),
			"send event %d to Kafka topic %s: its %d bytes are more than the topic takes: %w", b.first, p.topic.name, len(b.buf), err)
	case v == uncertain:
		b.firstTried, p.pending = tried, b
	}
	return s.explain(err, "send to partition "+strconv.Itoa(p.id), p.topic.name)
}

// checkEnd compares where a partition ends with where it ended when our last batch was confirmed.
func (s *Sink) checkEnd(p *partition, end int64) {
	if end < p.next {
		s.log.Error("Kafka no longer has records that it had confirmed: the topic was deleted and made again, or an unclean leader election lost them",
			"topic", p.topic.name, "partition", p.id, "expected_offset", p.next, "offset", end,
			"hint", "The log still has the events. To send them again, stop the sidecar and move the reactor's checkpoint back: UPDATE backstory.checkpoint SET position = … WHERE name = …; what the topic still has is not sent twice.")
		p.next = end
	}
}

// readBack looks whether what the broker says it has written is our batch, and not the one that an earlier process had on
// its way under the same sequence.
func (s *Sink) readBack(ctx context.Context, p *partition, b *batch, base int64) (verdict, error) {
	var first, last eventlog.Position
	n := int32(0)
	_, err := s.readRange(ctx, p.topic.name, p.id, len(p.topic.partitions), base, base+int64(b.count), func(r record) {
		if n++; first == 0 {
			first = r.position
		}
		last = r.position
	})
	if err != nil {
		return uncertain, err
	}
	if n != b.count || first != b.first || last != b.last {
		return sequence, errors.New("the broker has a batch of an earlier process in its place")
	}
	return written, nil
}

// resync reads a partition's end again, where we do not know what it holds.
func (s *Sink) resync(ctx context.Context, p *partition) error {
	if s.cfg.NoIdempotence && p.pending != nil {
		// Nothing keeps the request from arriving later; all we can do is give it time.
		if wait := s.cfg.Settle - time.Since(p.pending.firstTried); wait > 0 {
			if err := sleep(ctx, wait); err != nil {
				return err
			}
		}
	}
	before := p.sent
	stop, collect := eventlog.Position(0), (func(eventlog.Position))(nil)
	if set := p.topic.present; set != nil {
		stop, collect = s.start.After, func(x eventlog.Position) { set.add(int64(x)) }
	}
	t, err := s.readTail(ctx, p.topic.name, p.id, len(p.topic.partitions), stop, collect)
	if err != nil {
		return err
	}
	s.checkEnd(p, t.end)
	p.pending, p.lookAgain = nil, false
	p.sent, p.next = max(p.sent, t.position), t.end
	p.producer, p.inherited = t.producer, true
	if p.resyncs++; p.producer.id < 0 || p.resyncs > 2 || s.cfg.NoIdempotence {
		p.inherited = false
		s.fresh = producer{id: -1}
		if p.producer, err = s.freshProducer(ctx); err != nil {
			p.lookAgain = true
			return err
		}
	}
	s.log.Info("read the end of a partition again", "topic", p.topic.name, "partition", p.id, "position_before", before, "position", p.sent)
	return nil
}

// freshProducer gives the producer that this process uses where there is none to continue.
func (s *Sink) freshProducer(ctx context.Context) (producer, error) {
	if s.cfg.NoIdempotence {
		return producer{id: -1, epoch: -1}, nil
	}
	if s.fresh.id >= 0 {
		return s.fresh, nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	m, err := s.transport.RoundTrip(ctx, s.client.Addr, &initProducerID{ProducerID: -1, ProducerEpoch: -1})
	if err != nil {
		return producer{}, s.explain(err, "get a producer id", "")
	}
	res := m.(*initProducerIDResponse)
	if res.ErrorCode != 0 {
		return producer{}, s.explain(kafka.Error(res.ErrorCode), "get a producer id", "")
	}
	s.fresh = producer{id: res.ProducerID, epoch: res.ProducerEpoch}
	return s.fresh, nil
}
