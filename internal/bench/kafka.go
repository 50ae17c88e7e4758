package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/protocol"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/kafkaserver"
	"github.com/backstory-dev/backstory/sinks"
	sink "github.com/backstory-dev/backstory/sinks/kafka"
)

const (
	topicPartitions = 4
	requestBytes    = 1_000_000 // of one request to one partition, the sink's default
	readyMessages   = 100_000   // kept in memory, and sent again and again
)

// kafka measures what a reactor forwards from a log that the sidecar wrote, against what the same client library sends when it is
// given such messages ready-made: same keys, values, headers, partitions, request size and acknowledgement.
func (l *lab) kafka(ctx context.Context, g *group) error {
	w := workload{rows: l.opt.rows, updates: 1, perTx: 25, identity: "FULL"}
	g.About = fmt.Sprintf("Kafka %s, one broker on the same cores, %d partitions, acks=all, no compression: a reactor from the log's beginning to its end; %s",
		kafkaserver.Version, topicPartitions, w)
	broker, err := kafkaserver.Start(ctx, kafkaserver.Config{Log: func(line string) { progress("%s", line) }})
	if errors.Is(err, kafkaserver.ErrNoJava) {
		g.notMeasured("%v", err)
		return nil
	}
	if err != nil {
		return err
	}
	defer broker.Stop()
	source, err := l.database(ctx, "source", "")
	if err != nil {
		return err
	}
	defer source.drop(ctx)
	if err := w.prepare(ctx, source); err != nil {
		return err
	}
	in, err := l.install(ctx, source, source)
	if err != nil {
		return err
	}
	done, err := w.load(ctx, source)
	if err != nil {
		return err
	}
	progress("kafka: capturing %s events", number(float64(done.events), "rows"))
	if _, _, err := in.once(ctx, done); err != nil {
		return err
	}
	log, err := eventlog.Open(ctx, eventlog.Config{URL: source.url})
	if err != nil {
		return err
	}
	defer log.Close()

	const forwarded, ready, raw = "log → Kafka", "the same client, messages ready-made", "the same client, record batches ready-made"
	for pair := -1; pair < l.opt.pairs; pair++ { // the first one is for the broker to warm up
		rates := map[string]float64{}
		rate := func(side string, took time.Duration) {
			rates[side] = float64(done.events) / took.Seconds()
			progress("kafka: %-44s %7.2f s  %9.0f events/s", side, took.Seconds(), rates[side])
		}
		var size float64
		sides := []func(topic string) error{
			func(topic string) error {
				took, err := forward(ctx, log, broker, topic, done.events)
				rate(forwarded, took)
				return err
			},
			func(topic string) error {
				msgs, err := readMessages(ctx, log, min(readyMessages, int(done.events)))
				if err != nil {
					return err
				}
				size = meanSize(msgs)
				took, err := produce(ctx, broker, topic, msgs, done.events, false)
				rate(ready, took)
				return err
			},
			func(topic string) error {
				msgs, err := readMessages(ctx, log, min(readyMessages, int(done.events)))
				if err != nil {
					return err
				}
				took, err := produce(ctx, broker, topic, msgs, done.events, true)
				rate(raw, took)
				return err
			},
		}
		if pair < 0 && l.opt.quick {
			continue
		}
		if pair < 0 {
			progress("kafka: warming up")
		} else {
			progress("kafka: pair %d of %d", pair+1, l.opt.pairs)
		}
		for i := range sides {
			k := (i + max(pair, 0)) % len(sides)
			topic := fmt.Sprintf("bench-%d-%d", pair+1, k)
			if err := broker.CreateTopic(ctx, topic, topicPartitions); err != nil {
				return err
			}
			runtime.GC() // so that no side works with a heap that another one has filled
			if err := l.calm(ctx); err != nil {
				return err
			}
			if err := sides[k](topic); err != nil {
				return err
			}
			if err := complete(ctx, broker, topic, done.events); err != nil {
				return err
			}
			if err := broker.DeleteTopic(ctx, topic); err != nil {
				return err
			}
		}
		if pair < 0 {
			continue
		}
		g.compare(forwarded, "events/s", rates[forwarded], ready, rates[ready], atLeast(0.8))
		g.compare(forwarded, "events/s", rates[forwarded], raw, rates[raw], nil)
		g.add("key, value and headers of a message", "B", size, nil)
	}
	return nil
}

// forward runs a reactor until it has sent everything, and returns how long that took from its start.
func forward(ctx context.Context, log *eventlog.Log, broker *kafkaserver.Server, topic string, events int64) (time.Duration, error) {
	k, err := sink.New(sink.Config{Brokers: broker.Brokers(), Topic: topic})
	if err != nil {
		return 0, err
	}
	d, err := sinks.New(sinks.Config{Log: log})
	if err != nil {
		return 0, err
	}
	if err := d.On("*", &sinks.Reactor{Name: topic, Sink: k}); err != nil {
		return 0, err
	}
	runCtx, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	began := time.Now()
	go func() { ended <- d.Run(runCtx) }()
	limit, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	err = d.CaughtUp(limit, eventlog.Position(events))
	took := time.Since(began)
	stop()
	return took, errors.Join(err, <-ended)
}

// readMessages makes messages of the first n events, as the sink would, by partition.
func readMessages(ctx context.Context, log *eventlog.Log, n int) ([][]kafka.Message, error) {
	out := make([][]kafka.Message, topicPartitions)
	balance := kafka.Hash{}
	partitions := make([]int, topicPartitions)
	for i := range partitions {
		partitions[i] = i
	}
	err := log.Read(ctx, eventlog.Selection{Limit: n}, func(e *eventlog.Event) error {
		m := kafka.Message{Key: []byte(e.Entity()), Value: e.AppendJSON(nil), Headers: []kafka.Header{
			{Key: "id", Value: []byte(e.ID.String())}, {Key: "type", Value: []byte(e.Type)}, {Key: "position", Value: []byte(e.Position.String())},
			{Key: "occurred_at", Value: e.OccurredAt.AppendFormat(nil, time.RFC3339Nano)}, {Key: "aggregate", Value: []byte(e.Aggregate)},
			{Key: "rules_version", Value: fmt.Append(nil, e.RulesVersion)}, {Key: "log", Value: []byte("bench-ready-made-messages")}}}
		p := balance.Balance(m, partitions...)
		out[p] = append(out[p], m)
		return nil
	})
	for p := range out {
		if err == nil && len(out[p]) == 0 {
			err = fmt.Errorf("no message is for partition %d", p)
		}
	}
	return out, err
}

func meanSize(msgs [][]kafka.Message) float64 {
	size, n := 0, 0
	for _, p := range msgs {
		for i := range p {
			size += messageSize(&p[i])
		}
		n += len(p)
	}
	return float64(size) / float64(n)
}

func messageSize(m *kafka.Message) int {
	n := len(m.Key) + len(m.Value)
	for _, h := range m.Headers {
		n += len(h.Key) + len(h.Value)
	}
	return n
}

// produce sends n messages, those of each partition in requests of about requestBytes one after the other, the partitions at the
// same time. With raw the client gets finished record batches, otherwise it encodes the messages.
func produce(ctx context.Context, broker *kafkaserver.Server, topic string, msgs [][]kafka.Message, n int64, raw bool) (time.Duration, error) {
	tr := &kafka.Transport{MetadataTopics: []string{topic}}
	defer tr.CloseIdleConnections()
	client := &kafka.Client{Addr: kafka.TCP(broker.Brokers()...), Transport: tr, Timeout: 10 * time.Second}
	var requests [topicPartitions][][]kafka.Message
	var batches [topicPartitions][][]byte
	for p := range msgs {
		requests[p] = cut(msgs[p])
		for _, r := range requests[p] {
			if raw {
				batches[p] = append(batches[p], recordBatch(r))
			}
		}
	}
	errs := make([]error, topicPartitions)
	var wg sync.WaitGroup
	began := time.Now()
	for p := range topicPartitions {
		share := n / topicPartitions
		if p == 0 {
			share += n % topicPartitions
		}
		wg.Go(func() {
			var records []kafka.Record
			for i := 0; share > 0 && errs[p] == nil; i = (i + 1) % len(requests[p]) {
				r := requests[p][i]
				whole := int64(len(r)) <= share
				r = r[:min(int64(len(r)), share)]
				share -= int64(len(r))
				var res *kafka.ProduceResponse
				var err error
				if raw {
					b := batches[p][i]
					if !whole {
						b = recordBatch(r)
					}
					res, err = client.RawProduce(ctx, &kafka.RawProduceRequest{Topic: topic, Partition: p, RequiredAcks: kafka.RequireAll,
						RawRecords: protocol.RawRecordSet{Reader: bytes.NewReader(b)}})
				} else {
					records = records[:0]
					for j := range r {
						records = append(records, kafka.Record{Key: kafka.NewBytes(r[j].Key), Value: kafka.NewBytes(r[j].Value), Headers: r[j].Headers})
					}
					res, err = client.Produce(ctx, &kafka.ProduceRequest{Topic: topic, Partition: p, RequiredAcks: kafka.RequireAll, Records: kafka.NewRecordReader(records...)})
				}
				if err == nil {
					err = res.Error
				}
				errs[p] = err
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return 0, fmt.Errorf("send ready-made messages: %w", err)
	}
	return time.Since(began), nil
}

// cut divides messages into requests.
func cut(msgs []kafka.Message) (requests [][]kafka.Message) {
	const overhead = 40 // of a record, about
	from, size := 0, 0
	for i := range msgs {
		n := messageSize(&msgs[i]) + overhead
		if size+n > requestBytes && i > from {
			requests = append(requests, msgs[from:i])
			from, size = i, 0
		}
		size += n
	}
	return append(requests, msgs[from:])
}

// recordBatch encodes messages as a record batch without a producer (Kafka documentation, Message Format, Record Batch), with the
// length that frames it in a request.
func recordBatch(msgs []kafka.Message) []byte {
	const header = 65
	b := make([]byte, header, requestBytes+requestBytes/8)
	var record []byte
	for i := range msgs {
		m := &msgs[i]
		record = append(record[:0], 0, 0) // attributes, timestamp delta
		record = binary.AppendVarint(record, int64(i))
		record = append(binary.AppendVarint(record, int64(len(m.Key))), m.Key...)
		record = append(binary.AppendVarint(record, int64(len(m.Value))), m.Value...)
		record = binary.AppendVarint(record, int64(len(m.Headers)))
		for _, h := range m.Headers {
			record = append(binary.AppendVarint(record, int64(len(h.Key))), h.Key...)
			record = append(binary.AppendVarint(record, int64(len(h.Value))), h.Value...)
		}
		b = append(binary.AppendVarint(b, int64(len(record))), record...)
	}
	now := uint64(time.Now().UnixMilli())
	put32, put64 := binary.BigEndian.PutUint32, binary.BigEndian.PutUint64
	put32(b, uint32(len(b)-4))
	put32(b[12:], uint32(len(b)-16))
	put32(b[16:], 1<<32-1) // leader epoch: -1
	b[20] = 2              // magic
	put32(b[27:], uint32(len(msgs)-1))
	put64(b[31:], now)
	put64(b[39:], now)
	put64(b[47:], 1<<64-1) // producer id, epoch and sequence: none
	binary.BigEndian.PutUint16(b[55:], 1<<16-1)
	put32(b[57:], 1<<32-1)
	put32(b[61:], uint32(len(msgs)))
	put32(b[21:], crc32.Checksum(b[25:], crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// complete makes sure that a topic has all messages.
func complete(ctx context.Context, broker *kafkaserver.Server, topic string, want int64) error {
	var ask []kafka.OffsetRequest
	for p := range topicPartitions {
		ask = append(ask, kafka.LastOffsetOf(p))
	}
	res, err := broker.Client().ListOffsets(ctx, &kafka.ListOffsetsRequest{Topics: map[string][]kafka.OffsetRequest{topic: ask}})
	if err != nil {
		return fmt.Errorf("count the messages of %s: %w", topic, err)
	}
	var n int64
	offsets := res.Topics[topic]
	for _, o := range offsets {
		n += o.LastOffset
	}
	if n != want || slices.ContainsFunc(offsets, func(o kafka.PartitionOffsets) bool { return o.Error != nil }) {
		return fmt.Errorf("topic %s has %d messages, not %d", topic, n, want)
	}
	return nil
}
