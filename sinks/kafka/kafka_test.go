package kafka

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	kafka "github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/protocol"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/kafkaserver"
	"github.com/backstory-dev/backstory/sinks"
	"github.com/backstory-dev/backstory/sinks/sinktest"
)

func TestMain(m *testing.M) {
	before := runtime.NumGoroutine()
	code := m.Run()
	kafkaserver.StopShared()
	for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before+1; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<16)
			fmt.Fprintf(os.Stderr, "goroutines leaked:\n%s\n", buf[:runtime.Stack(buf, true)])
			code = max(code, 1)
			break
		}
	}
	os.Exit(code)
}

// onBoth runs a test against kfake and against a real broker.
func onBoth(t *testing.T, test func(t *testing.T, c *cluster)) {
	t.Run("fake", func(t *testing.T) { c, _ := fake(t); test(t, c) })
	t.Run("real", func(t *testing.T) { test(t, realCluster(t)) })
}

func realCluster(t testing.TB) *cluster {
	t.Helper()
	return newCluster(t, kafkaserver.ForTest(t).Brokers())
}

var topicNumber atomic.Int64

func (c *cluster) newTopic(t testing.TB, partitions int, config ...kafka.ConfigEntry) string {
	return c.topic(t, fmt.Sprintf("t-%d-%d", os.Getpid(), topicNumber.Add(1)), partitions, config...)
}

func TestKafkaSuite(t *testing.T) {
	t.Run("fake", func(t *testing.T) {
		conform(t, func(t *testing.T) *cluster { c, _ := fake(t); return c }, Config{}, shapes...)
	})
	t.Run("real", func(t *testing.T) {
		conform(t, func(t *testing.T) *cluster { return realCluster(t) }, Config{}, shapes[:2]...)
	})
	t.Run("real, zstd, small batches", func(t *testing.T) {
		conform(t, func(t *testing.T) *cluster { return realCluster(t) }, Config{Compression: "zstd", MaxBatchBytes: 10_000}, shapes[2])
	})
}

// bench is a log, a topic and sinks on it.
type bench struct {
	*testing.T
	c     *cluster
	topic string
	log   *sinktest.Log
	gen   *sinktest.Generator
	f     *faults
	cfg   Config
}

func newBench(t *testing.T, c *cluster, partitions int, config ...kafka.ConfigEntry) *bench {
	b := &bench{T: t, c: c, log: sinktest.NewLog("testlog"), gen: sinktest.NewGenerator(3), f: &faults{}}
	b.topic = c.newTopic(t, partitions, config...)
	b.cfg = Config{Brokers: c.brokers, Topic: b.topic, Settle: 600 * time.Millisecond, RequestTimeout: 5 * time.Second}
	return b
}

// open opens a sink as a new process would, and gives the events that follow.
func (b *bench) open(after eventlog.Position) (*Sink, []*eventlog.Event) {
	b.Helper()
	s := newSink(b, b.cfg, b.f)
	events, err := b.reopen(s, after)
	for i := 0; errors.Is(err, sinks.ErrUnavailable) && i < 200; i++ { // a new topic has no leaders yet
		time.Sleep(20 * time.Millisecond)
		events, err = b.reopen(s, after)
	}
	if err != nil {
		b.Fatalf("Open: %v", err)
	}
	return s, events
}

func (b *bench) reopen(s *Sink, after eventlog.Position) ([]*eventlog.Event, error) {
	events := b.log.Events()
	from, err := s.Open(b.Context(), sinks.Start{After: after, Log: "testlog", Reactor: "bench", First: after == 0 && b.f.met() == 0,
		Verify: func(_ context.Context, p eventlog.Position, id eventlog.ID) error {
			if events[p-1].ID != id {
				return sinks.ErrOtherHistory
			}
			return nil
		}})
	b.Cleanup(func() { _ = s.Close(context.Background()) })
	return events[from:], err
}

func (b *bench) mustSend(s *Sink, events []*eventlog.Event) {
	b.Helper()
	if err := b.trySend(s, events, 50); err != nil {
		b.Fatalf("Send: %v", err)
	}
}

func (b *bench) trySend(s *Sink, events []*eventlog.Event, attempts int) (err error) {
	for range attempts {
		ctx, cancel := context.WithTimeout(b.Context(), 10*time.Second)
		err = s.Send(ctx, events)
		cancel()
		if err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

func (b *bench) check() {
	b.Helper()
	b.f.late.Wait()
	sinktest.Check(b.T, b.log.Events(), b.c.contents(b, b.topic), false)
}

// Processes are killed, requests are lost, cut, delayed beyond the death of their process, and answers are lost, at
// random; checkpoints are old. The topic must hold the log, once.
func TestKafkaOnceWhateverHappens(t *testing.T) {
	onBoth(t, func(t *testing.T, c *cluster) {
		seeds := 6
		for i := range seeds {
			seed := uint64(time.Now().UnixNano())
			t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
				r := rand.New(rand.NewPCG(seed, 1))
				b := newBench(t, c, []int{1, 2, 5, 16}[i%4])
				b.cfg.Compression = []string{"", "lz4", "snappy"}[i%3]
				b.f.delay = time.Duration(r.IntN(250)) * time.Millisecond
				b.log.Append(b.gen.Mix(1500, 20)...)
				confirmed := eventlog.Position(0)
				lives, attempts, failures := 0, 0, 0
				for confirmed < 1500 {
					lives++
					b.f.next([]faultMode{healthy, loseRequest, loseHalf, loseResponse, delayRequest, delayRequest}[r.IntN(6)], r.IntN(4))
					checkpoint := max(0, confirmed-eventlog.Position(r.IntN(400)))
					if r.IntN(5) == 0 {
						checkpoint = 0
					}
					s := newSink(b, b.cfg, b.f)
					events, err := b.reopen(s, checkpoint)
					if err != nil {
						continue // killed while opening
					}
					for len(events) > 0 {
						attempts++
						n := min(len(events), 1+r.IntN(250))
						if err := b.trySend(s, events[:n], 1); err == nil {
							confirmed = max(confirmed, events[n-1].Position)
							events = events[n:]
						} else if failures++; r.IntN(3) > 0 {
							break // killed
						}
						if r.IntN(4) == 0 {
							b.f.next([]faultMode{loseRequest, loseHalf, loseResponse, delayRequest}[r.IntN(4)], 1+r.IntN(3))
						}
						if r.IntN(12) == 0 {
							break // killed between two batches
						}
					}
				}
				b.check()
				t.Logf("%d processes, %d attempts, %d failed, %d requests disturbed", lives, attempts, failures, b.f.met())
			})
		}
	})
}

// A process dies with a request on its way, which arrives after its successor has read the end of the partition.
func TestKafkaRequestOfADeadProcess(t *testing.T) {
	for _, test := range []struct {
		name  string
		delay time.Duration // of the dead process's request
		wait  time.Duration // before the successor's first batch
		same  bool          // the successor's first batch is cut the same way
	}{
		{"arrives before the successor's first batch", 50 * time.Millisecond, 400 * time.Millisecond, false},
		{"arrives before the successor's first batch, which is the same", 50 * time.Millisecond, 400 * time.Millisecond, true},
		{"arrives after the successor's first batch", 400 * time.Millisecond, 0, false},
		{"arrives after the successor's first batch, which is the same", 400 * time.Millisecond, 0, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, c *cluster) {
				b := newBench(t, c, 2)
				b.log.Append(b.gen.Mix(300, 10)...)
				s, events := b.open(0)
				b.mustSend(s, events[:100])
				b.f.delay = test.delay
				b.f.next(delayRequest, 2)
				if err := b.trySend(s, events[100:200], 1); err == nil {
					t.Fatal("a lost connection was not noticed")
				}
				b.f.next(healthy, 0)
				next, events := b.open(80)
				time.Sleep(test.wait)
				n := 220 - 80
				if test.same {
					n = 200 - 80
				}
				b.mustSend(next, events[:n])
				b.mustSend(next, events[n:])
				b.check()
			})
		})
	}
}

// The dead process selected other events than its successor does: the broker takes the successor's first batch for the one
// that it has, since both have the same sequences, and the sink must see that it is not.
func TestKafkaRequestOfADeadProcessWithAnotherSelection(t *testing.T) {
	onBoth(t, func(t *testing.T, c *cluster) {
		b := newBench(t, c, 1)
		b.log.Append(b.gen.Mix(120, 10)...)
		s, events := b.open(0)
		b.mustSend(s, events[:100])
		b.f.delay = 50 * time.Millisecond
		b.f.next(delayRequest, 1)
		if err := b.trySend(s, events[100:101], 1); err == nil {
			t.Fatal("a lost connection was not noticed")
		}
		next, _ := b.open(100)
		time.Sleep(400 * time.Millisecond)
		b.mustSend(next, events[101:102])
		b.mustSend(next, events[102:])
		b.check()
	})
}

// A paused process wakes up after another one has taken over and gone on.
func TestKafkaProcessThatWakesUp(t *testing.T) {
	onBoth(t, func(t *testing.T, c *cluster) {
		b := newBench(t, c, 2)
		b.log.Append(b.gen.Mix(400, 10)...)
		old, events := b.open(0)
		b.mustSend(old, events[:100])
		next, rest := b.open(90)
		b.mustSend(next, rest[:200])
		// Its lease is gone, but it does not know yet.
		if err := b.trySend(old, events[100:180], 1); err == nil {
			t.Error("the old process was told that its events were written")
		}
		b.mustSend(next, rest[200:])
		b.check()
	})
}

// Others write to the topic, too; some of them in transactions, whose markers take the last offsets.
func TestKafkaForeignMessages(t *testing.T) {
	onBoth(t, func(t *testing.T, c *cluster) {
		b := newBench(t, c, 2)
		b.log.Append(b.gen.Mix(400, 10)...)
		foreign := func(n int, log string) {
			t.Helper()
			cl, err := kgo.NewClient(kgo.SeedBrokers(c.brokers...), kgo.TransactionalID("foreign"+b.topic), kgo.DefaultProduceTopic(b.topic))
			if err != nil {
				t.Fatal(err)
			}
			defer cl.Close()
			for _, commit := range []kgo.TransactionEndTry{kgo.TryCommit, kgo.TryAbort} {
				if err := cl.BeginTransaction(); err != nil {
					t.Fatal(err)
				}
				for i := range n {
					r := &kgo.Record{Key: fmt.Appendf(nil, "k%d", i), Value: []byte("hello"), Headers: []kgo.RecordHeader{
						{Key: "position", Value: fmt.Append(nil, 100_000+i)}, {Key: "id", Value: []byte(b.log.Events()[0].ID.String())}, {Key: "log", Value: []byte(log)}}}
					if err := cl.ProduceSync(t.Context(), r).FirstErr(); err != nil {
						t.Fatal(err)
					}
				}
				if err := cl.EndTransaction(t.Context(), commit); err != nil {
					t.Fatal(err)
				}
			}
		}
		foreign(3, "")
		s, events := b.open(0)
		b.mustSend(s, events[:150])
		foreign(120, "testlog/another-reactor")
		next, events := b.open(0)
		b.mustSend(next, events[:200])
		foreign(2, "otherlog/bench")
		b.mustSend(next, events[200:])
		var got []sinktest.Delivered
		for _, m := range c.messages(t, b.topic) {
			if m.headers["log"] == "testlog/bench" {
				p := eventlog.Position(0)
				_, _ = fmt.Sscan(m.headers["position"], &p)
				got = append(got, sinktest.Delivered{Position: p, Entity: m.key, JSON: m.value})
			}
		}
		sinktest.Check(t, b.log.Events(), got, false)
	})
}

// Retention has emptied a partition: there is no tail, the checkpoint holds.
func TestKafkaEmptiedPartitions(t *testing.T) {
	onBoth(t, func(t *testing.T, c *cluster) {
		b := newBench(t, c, 3)
		b.log.Append(b.gen.Mix(300, 10)...)
		s, events := b.open(0)
		b.mustSend(s, events[:200])
		before := len(c.messages(t, b.topic))
		cl, err := kgo.NewClient(kgo.SeedBrokers(c.brokers...))
		if err != nil {
			t.Fatal(err)
		}
		defer cl.Close()
		req := kmsg.NewPtrDeleteRecordsRequest()
		req.TimeoutMillis = 5000
		rt := kmsg.NewDeleteRecordsRequestTopic()
		rt.Topic = b.topic
		for i := range 3 {
			rp := kmsg.NewDeleteRecordsRequestTopicPartition()
			rp.Partition, rp.Offset = int32(i), -1
			rt.Partitions = append(rt.Partitions, rp)
		}
		req.Topics = append(req.Topics, rt)
		if _, err := req.RequestWith(t.Context(), cl); err != nil {
			t.Fatal(err)
		}
		if n := len(c.messages(t, b.topic)); before != 200 || n != 0 {
			t.Fatalf("%d messages, %d after deletion", before, n)
		}
		next, events := b.open(200)
		b.mustSend(next, events)
		sinktest.Check(t, b.log.Events()[200:], c.contents(t, b.topic), false)
	})
}

// Partitions are added, while a process runs and while none does: keys move, and still nothing comes twice.
func TestKafkaPartitionsAreAdded(t *testing.T) {
	grow := func(t *testing.T, c *cluster, topic string, n int) {
		t.Helper()
		res, err := c.client.CreatePartitions(t.Context(), &kafka.CreatePartitionsRequest{Topics: []kafka.TopicPartitionsConfig{{Name: topic, Count: int32(n)}}})
		if err == nil {
			err = res.Errors[topic]
		}
		if err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			c.client.Transport.(*kafka.Transport).CloseIdleConnections()
			m, err := c.client.Metadata(t.Context(), &kafka.MetadataRequest{Topics: []string{topic}})
			if err == nil && len(m.Topics[0].Partitions) == n {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("partitions were not added")
			}
		}
	}
	contents := func(b *bench) (out []sinktest.Delivered) {
		for _, m := range b.c.messages(b, b.topic) {
			p := eventlog.Position(0)
			_, _ = fmt.Sscan(m.headers["position"], &p)
			out = append(out, sinktest.Delivered{Position: p, Entity: m.key, JSON: m.value})
		}
		// Across its two partitions a key's order is that of positions, or there is none.
		slices.SortStableFunc(out, func(a, b sinktest.Delivered) int { return int(a.Position - b.Position) })
		return out
	}
	t.Run("while no process runs", func(t *testing.T) {
		onBoth(t, func(t *testing.T, c *cluster) {
			b := newBench(t, c, 3)
			b.log.Append(b.gen.Mix(900, 40)...)
			s, events := b.open(0)
			b.mustSend(s, events[:300])
			b.f.next(loseHalf, 1) // one partition does not get its share of the second batch
			if err := b.trySend(s, events[300:600], 1); err == nil {
				t.Fatal("the fault was not met")
			}
			grow(t, c, b.topic, 7)
			next, events := b.open(120)
			b.mustSend(next, events[:250])
			b.mustSend(next, events[250:600])
			last, events := b.open(300)
			b.mustSend(last, events)
			sinktest.Check(t, b.log.Events(), contents(b), false)
		})
	})
	t.Run("while a process runs", func(t *testing.T) {
		onBoth(t, func(t *testing.T, c *cluster) {
			b := newBench(t, c, 2)
			b.log.Append(b.gen.Mix(900, 40)...)
			s, events := b.open(0)
			b.mustSend(s, events[:300])
			grow(t, c, b.topic, 5)
			s.transport.CloseIdleConnections()
			b.f.next(loseResponse, 1)
			for part := range slices.Chunk(events[300:], 50) {
				s.looked = time.Time{} // the new partitions may have no leaders yet
				b.mustSend(s, part)
			}
			used := map[int]bool{}
			for _, m := range c.messages(t, b.topic) {
				used[m.partition] = true
			}
			if len(used) != 5 {
				t.Errorf("%d partitions of 5 are used", len(used))
			}
			sinktest.Check(t, b.log.Events(), contents(b), false)
		})
	})
}

// A topic that takes smaller batches than we make, and an event that it does not take at all.
func TestKafkaTooLarge(t *testing.T) {
	c := realCluster(t)
	b := newBench(t, c, 2, kafka.ConfigEntry{ConfigName: "max.message.bytes", ConfigValue: "20000"})
	b.log.Append(b.gen.Mix(500, 10)...)
	s, events := b.open(0)
	if err := b.trySend(s, events, 1); err != nil {
		t.Fatalf("Send of batches larger than the topic takes: %v", err)
	}
	b.check()
	b.log.Append(b.gen.Big("Order/7", 100_000))
	b.log.Append(b.gen.Mix(10, 10)...)
	events = b.log.Events()[500:]
	err := b.trySend(s, events, 1)
	if err == nil || !strings.Contains(err.Error(), "event 501") || !strings.Contains(eventlog.Hint(err), "max.message.bytes=") {
		t.Fatalf("Send of an event larger than the topic takes: %v (hint %q)", err, eventlog.Hint(err))
	}
	res, err := c.client.AlterConfigs(t.Context(), &kafka.AlterConfigsRequest{Resources: []kafka.AlterConfigRequestResource{{
		ResourceType: kafka.ResourceTypeTopic, ResourceName: b.topic, Configs: []kafka.AlterConfigRequestConfig{{Name: "max.message.bytes", Value: "200000"}}}}})
	if err != nil || len(res.Errors) > 1 {
		t.Fatal(err, res)
	}
	b.mustSend(s, events)
	b.check()
}

// What a topic held is gone, because it was deleted and made again. That is said aloud, and the rest arrives.
func TestTopicMadeAgain(t *testing.T) {
	c, _ := fake(t)
	b := newBench(t, c, 2)
	var logged testLogger
	b.cfg.Logger = logged.logger()
	b.log.Append(b.gen.Mix(300, 10)...)
	s, events := b.open(0)
	b.mustSend(s, events[:200])
	if _, err := c.client.DeleteTopics(t.Context(), &kafka.DeleteTopicsRequest{Topics: []string{b.topic}}); err != nil {
		t.Fatal(err)
	}
	c.topic(t, b.topic, 2)
	b.mustSend(s, events[200:])
	sinktest.Check(t, b.log.Events()[200:], c.contents(t, b.topic), false)
	if !strings.Contains(logged.String(), "Kafka no longer has records that it had confirmed") {
		t.Errorf("nothing was said of the loss: %s", logged.String())
	}
}

func TestKafkaTopicMissing(t *testing.T) {
	onBoth(t, func(t *testing.T, c *cluster) {
		b := newBench(t, c, 1)
		b.topic = "missing-" + b.topic
		b.cfg.Topic = b.topic
		b.log.Append(b.gen.Mix(100, 10)...)
		s := newSink(t, b.cfg, b.f)
		for range 2 {
			_, err := b.reopen(s, 0)
			if err == nil || !strings.Contains(err.Error(), "topic "+b.topic+" does not exist") || !strings.Contains(eventlog.Hint(err), "kafka-topics.sh") {
				t.Fatalf("got %v (hint %q)", err, eventlog.Hint(err))
			}
		}
		c.topic(t, b.topic, 3)
		var events []*eventlog.Event
		var err error
		for range 100 { // a broker learns of it a little later
			if events, err = b.reopen(s, 0); err == nil {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if err != nil {
			t.Fatal(err)
		}
		b.mustSend(s, events)
		b.check()
	})
}

func TestKafkaTopicsAreCreated(t *testing.T) {
	onBoth(t, func(t *testing.T, c *cluster) {
		b := newBench(t, c, 1)
		prefix := "made-" + b.topic
		b.cfg.Topic = prefix + ".{aggregate}"
		b.cfg.CreateTopics = &CreateTopics{Partitions: 3}
		b.log.Append(b.gen.Mix(300, 10)...)
		s, events := b.open(0)
		b.mustSend(s, events)
		next, events := b.open(0)
		b.mustSend(next, events)
		byTopic := map[string][]*eventlog.Event{}
		for _, e := range b.log.Events() {
			byTopic[prefix+"."+e.Aggregate] = append(byTopic[prefix+"."+e.Aggregate], e)
		}
		if len(byTopic) != 4 {
			t.Errorf("%d topics", len(byTopic))
		}
		for topic, want := range byTopic {
			sinktest.Check(t, want, c.contents(t, topic), false)
		}
	})
}

func TestKafkaNotAuthorised(t *testing.T) {
	server := kafkaserver.StartForTest(t, kafkaserver.Config{Users: map[string]string{"sidecar": "secret"}})
	c := newCluster(t, server.Brokers())
	b := newBench(t, c, 2)
	b.cfg.Brokers, b.cfg.SASL, b.cfg.User, b.cfg.Password = server.SASLBrokers(), "plain", "sidecar", "wrong"
	b.log.Append(b.gen.Mix(100, 10)...)
	s := newSink(t, b.cfg, nil)
	if _, err := b.reopen(s, 0); err == nil || !strings.Contains(err.Error(), "refused the user") || eventlog.Hint(err) == "" || strings.Contains(err.Error(), "wrong") {
		t.Errorf("wrong password: got %v (hint %q)", err, eventlog.Hint(err))
	}
	b.cfg.Password = "secret"
	s = newSink(t, b.cfg, nil)
	allow := func(op kafka.ACLOperationType) {
		t.Helper()
		if err := server.Allow(t.Context(), "sidecar", b.topic, op); err != nil {
			t.Fatal(err)
		}
	}
	var events []*eventlog.Event
	wait := func(what string, ok func(err error) bool, f func() error) {
		t.Helper()
		var err error
		for range 200 {
			if err = f(); ok(err) {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Fatalf("%s: got %v (hint %q)", what, err, eventlog.Hint(err))
	}
	denied := func(err error) bool {
		return err != nil && strings.Contains(err.Error(), "not authorised") && strings.Contains(eventlog.Hint(err), "kafka-acls.sh") && strings.Contains(eventlog.Hint(err), "User:sidecar")
	}
	open := func() (err error) { events, err = b.reopen(s, 0); return err }
	wait("nothing is granted", denied, open)
	allow(kafka.ACLOperationTypeDescribe)
	time.Sleep(300 * time.Millisecond)
	wait("only Describe is granted", denied, open)
	allow(kafka.ACLOperationTypeWrite)
	wait("Write is granted, not Read", func(err error) bool { return err == nil || denied(err) }, open)
	allow(kafka.ACLOperationTypeRead)
	wait("all is granted", func(err error) bool { return err == nil }, open)
	b.mustSend(s, events)
	b.check()
}

// Every write asks for the confirmation of all replicas in sync, with and without idempotence. A broker that stands alone would not
// tell the difference.
func TestAllAcks(t *testing.T) {
	for _, plain := range []bool{false, true} {
		c, k := fake(t)
		var asked, otherwise atomic.Int64
		k.ControlKey(int16(kmsg.Produce), func(r kmsg.Request) (kmsg.Response, error, bool) {
			k.KeepControl()
			asked.Add(1)
			if r.(*kmsg.ProduceRequest).Acks != -1 {
				otherwise.Add(1)
			}
			return nil, nil, false
		})
		b := newBench(t, c, 2)
		b.cfg.NoIdempotence = plain
		b.log.Append(b.gen.Mix(200, 10)...)
		s, events := b.open(0)
		b.mustSend(s, events)
		b.check()
		if asked.Load() == 0 || otherwise.Load() > 0 {
			t.Errorf("without idempotence %t: %d of %d writes do not ask for all acks", plain, otherwise.Load(), asked.Load())
		}
	}
}

func TestUnreachable(t *testing.T) {
	c, _ := fake(t)
	b := newBench(t, c, 2)
	b.log.Append(b.gen.Mix(100, 10)...)
	s, events := b.open(0)
	b.mustSend(s, events[:50])
	b.f.next(unreachable, 1000)
	for range 2 {
		err := b.trySend(s, events[50:], 1)
		if !errors.Is(err, sinks.ErrUnavailable) || eventlog.Hint(err) == "" {
			t.Errorf("got %v (hint %q)", err, eventlog.Hint(err))
		}
	}
	if _, err := b.reopen(newSink(t, b.cfg, b.f), 50); !errors.Is(err, sinks.ErrUnavailable) || !strings.Contains(err.Error(), c.brokers[0]) {
		t.Errorf("got %v", err)
	}
	b.f.next(healthy, 0)
	b.mustSend(s, events[50:])
	b.check()
}

// Without idempotence: uncertain writes are settled by waiting and looking.
func TestKafkaNoIdempotence(t *testing.T) {
	onBoth(t, func(t *testing.T, c *cluster) {
		b := newBench(t, c, 3)
		b.cfg.NoIdempotence = true
		b.cfg.Settle = 300 * time.Millisecond
		b.f.delay = 100 * time.Millisecond
		b.log.Append(b.gen.Mix(600, 10)...)
		s, events := b.open(0)
		for i, mode := range []faultMode{loseResponse, loseRequest, delayRequest, loseHalf} {
			b.mustSend(s, events[100*i:100*i+50])
			b.f.next(mode, 2)
			b.mustSend(s, events[100*i+50:100*i+100])
		}
		b.f.next(delayRequest, 2)
		_ = b.trySend(s, events[400:500], 1)
		next, events := b.open(350)
		b.mustSend(next, events)
		b.check()
	})
}

func TestPartitionOf(t *testing.T) {
	java := kafka.Murmur2Balancer{}
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 300 {
		key := make([]byte, n%40)
		for i := range key {
			key[i] = byte(r.Uint32())
		}
		partitions := make([]int, 1+r.IntN(50))
		for i := range partitions {
			partitions[i] = i
		}
		if got, want := partitionOf(key, len(partitions)), java.Balance(kafka.Message{Key: key}, partitions...); got != want {
			t.Fatalf("key %x, %d partitions: got %d, want %d", key, len(partitions), got, want)
		}
	}
	// From the Java client's own tests.
	for key, want := range map[string]int32{"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536, "abc": 479470107} {
		if got := int32(murmur2([]byte(key))); got != want {
			t.Errorf("murmur2(%q) = %d, want %d", key, got, want)
		}
	}
}

func TestBatchIsWhatTheClientReads(t *testing.T) {
	gen := sinktest.NewGenerator(5)
	events := append(gen.Mix(200, 9), gen.Big("Order/1", 200_000))
	for _, compression := range []string{"", "gzip", "snappy", "lz4", "zstd"} {
		t.Run("compression "+compression, func(t *testing.T) {
			codec, err := Config{Compression: compression}.codec()
			if err != nil {
				t.Fatal(err)
			}
			enc := encoder{origin: []byte("l/r")}
			now := time.UnixMilli(1_790_000_000_123)
			b := newBatch(nil, now)
			for i, e := range events {
				e.Position = eventlog.Position(i + 1)
				before := len(b.buf)
				enc.encodeKey(e)
				enc.encode(e)
				enc.add(b, e.Position)
				if n := len(b.buf) - before; n > enc.size() {
					t.Fatalf("event %d took %d bytes, size said at most %d", i, n, enc.size())
				}
			}
			if err := b.stamp(producer{7, 3, 0x7ffffff0}, codec); err != nil {
				t.Fatal(err)
			}
			var set protocol.RecordSet
			if _, err := set.ReadFrom(strings.NewReader(string(b.buf))); err != nil {
				t.Fatal(err)
			}
			rb := set.Records.(*protocol.RecordStream).Records[0].(*protocol.RecordBatch)
			if rb.ProducerID != 7 || rb.ProducerEpoch != 3 || rb.BaseSequence != 0x7ffffff0 {
				t.Errorf("batch has producer %d, epoch %d, sequence %d", rb.ProducerID, rb.ProducerEpoch, rb.BaseSequence)
			}
			s := &Sink{enc: enc}
			for i, e := range events {
				rec, err := rb.ReadRecord()
				if err != nil {
					t.Fatal(err)
				}
				k, _ := protocol.ReadAll(rec.Key)
				v, _ := protocol.ReadAll(rec.Value)
				r, ours := s.parse(rec, rb)
				if string(k) != e.Entity() || string(v) != string(e.AppendJSON(nil)) || !rec.Time.Equal(now) || !ours || r.position != e.Position || r.id != e.ID ||
					r.offset != int64(i) || r.producer != (producer{7, 3, int32((0x7ffffff0 + int64(i) + 1) & 0x7fffffff)}) {
					t.Fatalf("event %d came back as key %s, value %s, time %s, %+v", i, k, v, rec.Time, r)
				}
			}
		})
	}
}

func TestPositionSet(t *testing.T) {
	s := positionSet{base: 1000}
	want := map[int64]bool{}
	r := rand.New(rand.NewPCG(1, 1))
	for range 500 {
		p := 900 + int64(r.IntN(5000))
		s.add(p)
		if p > 1000 {
			want[p] = true
		}
	}
	for p := int64(0); p < 7000; p++ {
		if s.has(p) != want[p] {
			t.Fatalf("has(%d) = %v", p, s.has(p))
		}
	}
	if s.len() != len(want) {
		t.Errorf("len = %d, want %d", s.len(), len(want))
	}
}

func TestConfig(t *testing.T) {
	good := Config{Brokers: []string{"a:9092"}, Topic: "shop"}
	for name, change := range map[string]func(*Config){
		"no brokers":          func(c *Config) { c.Brokers = nil },
		"a broker, no port":   func(c *Config) { c.Brokers = []string{"kafka"} },
		"no topic":            func(c *Config) { c.Topic = "" },
		"a bad topic":         func(c *Config) { c.Topic = "my shop" },
		"an unknown template": func(c *Config) { c.Topic = "x.{id}" },
		"compression":         func(c *Config) { c.Compression = "rar" },
		"mechanism":           func(c *Config) { c.SASL = "kerberos" },
	} {
		t.Run(name, func(t *testing.T) {
			c := good
			change(&c)
			if _, err := New(c); err == nil || eventlog.Hint(err) == "" {
				t.Errorf("got %v without a hint", err)
			}
		})
	}
	c := good
	e := &eventlog.Event{Aggregate: "Läden Order", Relation: &eventlog.Relation{Schema: "public", Name: "orders"}}
	for template, want := range map[string]string{"shop": "shop", "shop.{aggregate}": "shop.L_den_Order", "{schema}.{table}": "public.orders"} {
		if c.Topic = template; c.topicFor(e) != want {
			t.Errorf("topic for %s is %s, want %s", template, c.topicFor(e), want)
		}
	}
	if binary.MaxVarintLen64 != 10 {
		t.Error("encoder.size counts on it")
	}
}
