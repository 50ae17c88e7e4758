package kafka

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	kafka "github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/protocol"
	"github.com/twmb/franz-go/pkg/kfake"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
	"github.com/backstory-dev/backstory/sinks/sinktest"
)

// cluster is a Kafka to test against: kfake, or a real one.
type cluster struct {
	brokers []string
	client  *kafka.Client
}

func newCluster(t testing.TB, brokers []string) *cluster {
	tr := &kafka.Transport{MetadataTTL: time.Second}
	t.Cleanup(tr.CloseIdleConnections)
	return &cluster{brokers, &kafka.Client{Addr: kafka.TCP(brokers...), Transport: tr, Timeout: 20 * time.Second}}
}

func fake(t testing.TB, opts ...kfake.Opt) (*cluster, *kfake.Cluster) {
	t.Helper()
	k, err := kfake.NewCluster(append([]kfake.Opt{kfake.NumBrokers(3)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return newCluster(t, k.ListenAddrs()), k
}

// topic makes a topic.
func (c *cluster) topic(t testing.TB, name string, partitions int, config ...kafka.ConfigEntry) string {
	t.Helper()
	res, err := c.client.CreateTopics(t.Context(), &kafka.CreateTopicsRequest{Topics: []kafka.TopicConfig{{Topic: name, NumPartitions: partitions,
		ReplicationFactor: -1, ConfigEntries: config}}})
	if err == nil {
		err = res.Errors[name]
	}
	if err != nil {
		t.Fatalf("create topic %s: %v", name, err)
	}
	return name
}

// message is a record as a consumer sees it.
type message struct {
	partition int
	offset    int64
	key       string
	value     []byte
	headers   map[string]string
}

// messages reads a whole topic, each partition from its start to its end.
func (c *cluster) messages(t testing.TB, topic string) (out []message) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c.client.Transport.(*kafka.Transport).CloseIdleConnections()
	meta, err := c.client.Metadata(ctx, &kafka.MetadataRequest{Topics: []string{topic}})
	if err != nil {
		t.Fatalf("read topic %s: %v", topic, err)
	}
	for _, p := range meta.Topics[0].Partitions {
		offs, err := c.client.ListOffsets(ctx, &kafka.ListOffsetsRequest{Topics: map[string][]kafka.OffsetRequest{topic: {kafka.FirstOffsetOf(p.ID), kafka.LastOffsetOf(p.ID)}}})
		if err != nil {
			t.Fatalf("read topic %s: %v", topic, err)
		}
		o := offs.Topics[topic][0]
		for next := o.FirstOffset; next < o.LastOffset; {
			res, err := c.client.Fetch(ctx, &kafka.FetchRequest{Topic: topic, Partition: p.ID, Offset: next, MinBytes: 1, MaxBytes: 4 << 20, MaxWait: time.Second})
			if err == nil {
				err = res.Error
			}
			if err != nil {
				t.Fatalf("read topic %s/%d at %d of %d: %v", topic, p.ID, next, o.LastOffset, err)
			}
			before := next
			for {
				r, err := res.Records.ReadRecord()
				if err != nil {
					break
				}
				k, _ := protocol.ReadAll(r.Key)
				v, _ := protocol.ReadAll(r.Value)
				if r.Offset < next {
					continue
				}
				m := message{p.ID, r.Offset, string(k), v, map[string]string{}}
				for _, h := range r.Headers {
					m.headers[h.Key] = string(h.Value)
				}
				out = append(out, m)
				next = r.Offset + 1
			}
			if next == before {
				next++ // a transaction marker, or compacted
			}
		}
	}
	return out
}

// contents gives what a topic holds of events, and checks what surrounds them.
func (c *cluster) contents(t testing.TB, topic string) (out []sinktest.Delivered) {
	t.Helper()
	msgs := c.messages(t, topic)
	partitions := map[string]int{}
	for _, m := range msgs {
		if m.headers["log"] == "" {
			continue
		}
		pos, err := strconv.ParseInt(m.headers["position"], 10, 64)
		if err != nil {
			t.Fatalf("header position: %v", err)
		}
		for _, want := range []string{fmt.Sprintf(`{"position":%d,"id":"%s",`, pos, m.headers["id"]), `"type":"` + m.headers["type"] + `"`,
			`"occurred_at":"` + m.headers["occurred_at"] + `"`, `"rules_version":` + m.headers["rules_version"], `"aggregate":"` + m.headers["aggregate"] + `"`} {
			if !bytes.Contains(m.value, []byte(want)) {
				t.Fatalf("headers %v do not say what the value says: no %s in %.300s", m.headers, want, m.value)
			}
		}
		if p, ok := partitions[m.key]; ok && p != m.partition {
			t.Fatalf("key %s is in partitions %d and %d", m.key, p, m.partition)
		}
		partitions[m.key] = m.partition
		out = append(out, sinktest.Delivered{Position: eventlog.Position(pos), Entity: m.key, JSON: m.value})
	}
	return out
}

// shape is a topic, and how Sends to it are interrupted.
type shape struct {
	name       string
	partitions int
	mode       faultMode
}

var shapes = []shape{
	{"one partition, lost responses", 1, loseResponse},
	{"seven partitions, lost requests", 7, loseRequest},
	{"three partitions, half requests", 3, loseHalf},
}

// conform runs the suite.
func conform(t *testing.T, newCluster func(t *testing.T) *cluster, with Config, shapes ...shape) {
	for _, shape := range shapes {
		t.Run(shape.name, func(t *testing.T) {
			c := newCluster(t)
			n := 0
			sinktest.Run(t, func(t *testing.T) sinktest.Harness {
				n++
				topic := c.topic(t, fmt.Sprintf("suite-%s-%d", strings.ReplaceAll(shape.name[:3], " ", ""), n)+time.Now().Format("-150405.000"), shape.partitions,
					kafka.ConfigEntry{ConfigName: "max.message.bytes", ConfigValue: "2000000"})
				f := &faults{}
				return sinktest.Harness{
					Once: true,
					Sink: func(t *testing.T) sinks.Sink {
						cfg := with
						cfg.Brokers, cfg.Topic, cfg.Settle, cfg.RequestTimeout = c.brokers, topic, 50*time.Millisecond, 5*time.Second
						return newSink(t, cfg, f)
					},
					Contents: func(t *testing.T) []sinktest.Delivered { return c.contents(t, topic) },
					Interrupt: func(t *testing.T) func() {
						f.next(shape.mode, 1)
						return func() {
							if f.met() == 0 {
								t.Error("no request met the fault")
							}
							f.next(healthy, 0)
						}
					},
				}
			})
		})
	}
}

func newSink(t testing.TB, cfg Config, f *faults) *Sink {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if f != nil {
		s.dial = f.dial
	}
	return s
}
