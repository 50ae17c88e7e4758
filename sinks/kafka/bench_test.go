package kafka

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	kafka "github.com/segmentio/kafka-go"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/kafkaserver"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
	"github.com/backstory-dev/backstory/sinks"
)

// BenchmarkKafka compares, in pairs one after the other, what a reactor forwards from a real log to a real broker with
// what the same client library sends when it is given the same messages ready-made: same keys, values, headers,
// partitions, batch size and acknowledgement. BACKSTORY_BENCH_EVENTS sets the number of events (default 400 000).
//
//	go test ./sinks/kafka -run '^$' -bench Kafka -benchtime 5x
func BenchmarkKafka(b *testing.B) {
	n := 400_000
	if s := os.Getenv("BACKSTORY_BENCH_EVENTS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			b.Fatal(err)
		}
	}
	const partitions = 4
	kafkaserver.Need(b)
	pg := pgservertest.ForTest(b, pgserver.Config{})
	b.Cleanup(pgservertest.StopShared)
	c := newCluster(b, kafkaserver.ForTest(b).Brokers())
	log := newPGLog(b, pg)
	log.fill(b, n)
	ready := prepare(b, log.Log, partitions)

	var forwarded, prepared []float64
	bytes := 0
	for _, p := range ready {
		for _, m := range p {
			bytes += len(m.Value)
		}
	}
	b.SetBytes(int64(bytes))
	b.ReportAllocs()
	once := func() {
		topic := c.newTopic(b, partitions)
		time.Sleep(300 * time.Millisecond)
		b.StartTimer()
		took := forward(b, log.Log, c, topic, n)
		b.StopTimer()
		forwarded = append(forwarded, float64(n)/took.Seconds())
		_, _ = c.client.DeleteTopics(context.Background(), &kafka.DeleteTopicsRequest{Topics: []string{topic}})

		topic = c.newTopic(b, partitions)
		time.Sleep(300 * time.Millisecond)
		took = produceReady(b, c, topic, ready)
		prepared = append(prepared, float64(n)/took.Seconds())
		_, _ = c.client.DeleteTopics(context.Background(), &kafka.DeleteTopicsRequest{Topics: []string{topic}})
	}
	b.StopTimer()
	once() // the broker's and our own first steps
	forwarded, prepared = nil, nil
	for range b.N {
		once()
	}
	var ratios []float64
	for i := range forwarded {
		ratios = append(ratios, forwarded[i]/prepared[i])
	}
	b.ReportMetric(median(forwarded), "events/s")
	b.ReportMetric(median(prepared), "prepared/s")
	b.ReportMetric(median(ratios), "ratio")
	b.ReportMetric(float64(bytes)/float64(n), "B/event")
}

func median(x []float64) float64 {
	x = slices.Sorted(slices.Values(x))
	if len(x) == 0 {
		return 0
	}
	return x[len(x)/2]
}

// forward runs a reactor from the log's beginning to its end.
func forward(b *testing.B, log *eventlog.Log, c *cluster, topic string, n int) time.Duration {
	s, err := New(Config{Brokers: c.brokers, Topic: topic})
	if err != nil {
		b.Fatal(err)
	}
	d, err := sinks.New(sinks.Config{Log: log})
	if err != nil {
		b.Fatal(err)
	}
	if err := d.On("*", &sinks.Reactor{Name: topic, Sink: s}); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	done := make(chan struct{})
	began := time.Now()
	go func() { defer close(done); _ = d.Run(ctx) }()
	if err := d.CaughtUp(ctx, eventlog.Position(n)); err != nil {
		b.Fatal(err)
	}
	took := time.Since(began)
	cancel()
	<-done
	return took
}

// prepare makes the log's events into messages, by partition.
func prepare(b *testing.B, log *eventlog.Log, partitions int) [][]kafka.Message {
	out := make([][]kafka.Message, partitions)
	err := log.Read(context.Background(), eventlog.Selection{}, func(e *eventlog.Event) error {
		m := kafka.Message{Key: []byte(e.Entity()), Value: e.AppendJSON(nil), Headers: []kafka.Header{
			{Key: headerID, Value: []byte(e.ID.String())}, {Key: headerType, Value: []byte(e.Type)}, {Key: headerPosition, Value: []byte(e.Position.String())},
			{Key: headerOccurredAt, Value: e.OccurredAt.AppendFormat(nil, time.RFC3339Nano)}, {Key: headerAggregate, Value: []byte(e.Aggregate)},
			{Key: headerRulesVersion, Value: fmt.Append(nil, e.RulesVersion)}, {Key: headerLog, Value: []byte("prepared/benchmark")}}}
		p := partitionOf(m.Key, partitions)
		out[p] = append(out[p], m)
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return out
}

// produceReady sends messages with kafka-go: each partition its requests of about 1 MB one after the other, all acks.
func produceReady(b *testing.B, c *cluster, topic string, ready [][]kafka.Message) time.Duration {
	tr := &kafka.Transport{MetadataTopics: []string{topic}}
	defer tr.CloseIdleConnections()
	client := &kafka.Client{Addr: kafka.TCP(c.brokers...), Transport: tr, Timeout: 10 * time.Second}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	errs := make([]error, len(ready))
	var wg sync.WaitGroup
	began := time.Now()
	for p, msgs := range ready {
		wg.Go(func() {
			var records []kafka.Record
			size := 0
			send := func() {
				res, err := client.Produce(ctx, &kafka.ProduceRequest{Topic: topic, Partition: p, RequiredAcks: kafka.RequireAll, Records: kafka.NewRecordReader(records...)})
				if err == nil {
					err = res.Error
				}
				if err != nil && errs[p] == nil {
					errs[p] = err
				}
				records, size = records[:0], 0
			}
			for i := range msgs {
				m := &msgs[i]
				n := len(m.Key) + len(m.Value) + 220
				if size+n > 1_000_000 {
					send()
				}
				size += n
				records = append(records, kafka.Record{Key: kafka.NewBytes(m.Key), Value: kafka.NewBytes(m.Value), Headers: m.Headers})
			}
			send()
		})
	}
	wg.Wait()
	took := time.Since(began)
	for _, err := range errs {
		if err != nil {
			b.Fatal(err)
		}
	}
	return took
}
