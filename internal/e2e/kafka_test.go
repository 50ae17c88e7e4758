package e2e

import (
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/segmentio/kafka-go"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/kafkaserver"
)

// broker is a real Kafka of a test's own, with a topic.
type broker struct {
	*kafkaserver.Server
	topic      string
	partitions int
}

func newBroker(t testing.TB) *broker {
	t.Helper()
	b := &broker{Server: kafkaserver.StartForTest(t, kafkaserver.Config{}), topic: "shop", partitions: 5}
	if err := b.CreateTopic(within(t, time.Minute), b.topic, b.partitions); err != nil {
		t.Fatal(err)
	}
	return b
}

// restart starts the broker again after it was ended in some way, or else stops it first.
func (b *broker) restart(t testing.TB, end func() error) {
	was := b.PID()
	if err := end(); err != nil {
		t.Error(err)
	}
	if err := b.Restart(within(t, 4*time.Minute)); err != nil {
		t.Error(err)
	}
	if b.PID() == was {
		t.Error("the broker was not restarted")
	}
}

// size is how many messages the topic has.
func (b *broker) size(t testing.TB) (n int64) {
	t.Helper()
	var ask []kafka.OffsetRequest
	for p := range b.partitions {
		ask = append(ask, kafka.LastOffsetOf(p))
	}
	res, err := b.Client().ListOffsets(within(t, time.Minute), &kafka.ListOffsetsRequest{Topics: map[string][]kafka.OffsetRequest{b.topic: ask}})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range res.Topics[b.topic] {
		n += o.LastOffset
	}
	return n
}

// holds compares the topic with the log: each event that is news once, as the log has it, those of an entity in one partition
// and in the order of the log.
func (b *broker) holds(t testing.TB, l *eventlog.Log) {
	t.Helper()
	type message struct {
		partition int
		key       string
		value     string
	}
	have := map[int64]message{}
	partitions := map[string]int{}
	n := 0
	for p := range b.partitions {
		last := map[string]int64{} // by key
		b.read(t, p, func(m *kafka.Message) {
			n++
			h := map[string]string{}
			for _, x := range m.Headers {
				h[x.Key] = string(x.Value)
			}
			pos, err := strconv.ParseInt(h["position"], 10, 64)
			if err != nil {
				t.Fatalf("a message of partition %d has headers %v", p, h)
			}
			key := string(m.Key)
			if other, ok := have[pos]; ok {
				t.Errorf("event %d is in the topic twice: %s in partition %d, %s in %d", pos, other.key, other.partition, key, p)
			}
			have[pos] = message{p, key, string(m.Value)}
			if last[key] >= pos {
				t.Errorf("partition %d: event %d of %s comes after event %d", p, pos, key, last[key])
			}
			last[key] = pos
			if other, ok := partitions[key]; ok && other != p {
				t.Errorf("%s is in partitions %d and %d", key, other, p)
			}
			partitions[key] = p
		})
	}
	events, quiet := 0, 0
	err := l.Read(within(t, time.Minute), eventlog.Selection{Quiet: true}, func(e *eventlog.Event) error {
		if e.Quiet {
			quiet++
			if _, ok := have[int64(e.Position)]; ok {
				return fmt.Errorf("event %d is quiet, but in the topic", e.Position)
			}
			return nil
		}
		events++
		m, ok := have[int64(e.Position)]
		if !ok {
			return fmt.Errorf("event %d (%s of %s/%s) is not in the topic", e.Position, e.Type, e.Aggregate, e.AggregateID)
		}
		if want := string(e.AppendJSON(nil)); m.value != want || m.key != e.Aggregate+"/"+e.AggregateID {
			return fmt.Errorf("event %d is in the topic as %s %s; it is %s", e.Position, m.key, short(m.value), short(want))
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if n != events {
		t.Errorf("the topic has %d messages, the log %d events that are news", n, events)
	}
	t.Logf("the topic has %d messages in %d partitions; %d events are quiet", n, b.partitions, quiet)
}

// read calls f for each message of a partition, from its beginning to its end as it is now.
func (b *broker) read(t testing.TB, partition int, f func(*kafka.Message)) {
	t.Helper()
	ctx := within(t, time.Minute)
	conn, err := kafka.DialLeader(ctx, "tcp", b.Brokers()[0], b.topic, partition)
	if err != nil {
		t.Fatalf("read partition %d: %v", partition, err)
	}
	first, end, err := conn.ReadOffsets()
	_ = conn.Close()
	if err != nil {
		t.Fatalf("read partition %d: %v", partition, err)
	}
	r := kafka.NewReader(kafka.ReaderConfig{Brokers: b.Brokers(), Topic: b.topic, Partition: partition, MaxBytes: 16 << 20, MaxWait: 100 * time.Millisecond})
	defer r.Close()
	for next := first; next < end; {
		m, err := r.ReadMessage(ctx)
		if err != nil {
			t.Fatalf("read partition %d at %d of %d: %v", partition, next, end, err)
		}
		f(&m)
		next = m.Offset + 1
	}
}
