package kafka

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	kafka "github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/compress"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
)

const (
	metadataTTL = 15 * time.Second // how old the transport's knowledge of topics and leaders may be
	growEvery   = 15 * time.Second // between looks at whether partitions were added
	dialTimeout = 5 * time.Second
)

// Sink writes events into Kafka topics, each once and in order per aggregate. See doc.go for how, and how far.
type Sink struct {
	cfg   Config
	codec compress.Compression
	log   *slog.Logger
	enc   encoder

	// The following lives from Open to Close.
	start     sinks.Start
	opened    time.Time
	transport *kafka.Transport
	client    *kafka.Client
	topics    map[string]*topic
	names     map[nameKey]*topic // topics by what the template is filled with
	fresh     producer
	failed    bool // the last Send did not deliver everything
	looked    time.Time
	spare     [][]byte // buffers for batches
	dial      func(ctx context.Context, network, address string) (net.Conn, error)
}

type nameKey struct {
	aggregate string
	relation  *eventlog.Relation
}

var _ sinks.Sink = (*Sink)(nil)

// New makes a sink. It does not connect.
func New(cfg Config) (*Sink, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Sink{cfg: cfg, log: cfg.Logger, dial: (&net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}).DialContext}
	s.codec, _ = cfg.codec()
	return s, nil
}

// Open implements sinks.Sink. A single topic is looked at here; those of a template when their first event comes.
func (s *Sink) Open(ctx context.Context, start sinks.Start) (eventlog.Position, error) {
	_ = s.Close(ctx)
	mechanism, err := s.cfg.mechanism()
	if err != nil {
		return 0, err
	}
	s.transport = &kafka.Transport{Dial: s.dial, DialTimeout: dialTimeout, ClientID: s.cfg.ClientID, TLS: s.cfg.TLS, SASL: mechanism,
		MetadataTTL: metadataTTL, IdleTimeout: 4 * time.Minute, MetadataTopics: []string{}}
	s.client = &kafka.Client{Addr: kafka.TCP(s.cfg.Brokers...), Timeout: s.cfg.RequestTimeout, Transport: s.transport}
	s.start, s.opened, s.looked, s.failed = start, time.Now(), time.Now(), false
	s.topics, s.names, s.fresh = map[string]*topic{}, map[nameKey]*topic{}, producer{id: -1}
	s.enc.origin = []byte(start.Log + "/" + start.Reactor)
	if name := s.cfg.topicFor(&eventlog.Event{}); name == s.cfg.Topic {
		t, err := s.openTopic(ctx, name)
		if err != nil {
			_ = s.Close(ctx)
			return 0, err
		}
		s.topics[name] = t
	}
	return start.After, nil
}

// Send implements sinks.Sink.
func (s *Sink) Send(ctx context.Context, events []*eventlog.Event) error {
	if s.client == nil {
		return errors.New("send to Kafka: the sink is not open")
	}
	if err := s.prepare(ctx); err != nil {
		s.failed = true
		return err
	}
	for {
		err := s.attempt(ctx, events)
		s.failed = err != nil
		if !errors.Is(err, errTooLarge) {
			return err
		}
	}
}

// prepare settles what the last Send has left undecided, as far as that takes other requests than Produce, and looks for
// new partitions and, after a failure, for new leaders.
func (s *Sink) prepare(ctx context.Context) error {
	if s.failed {
		s.transport.CloseIdleConnections() // and with them what the transport knows of topics and leaders
	}
	look := !s.failed && time.Since(s.looked) > growEvery
	for _, name := range slices.Sorted(maps.Keys(s.topics)) {
		t := s.topics[name]
		if s.failed {
			if _, err := s.partitionCount(ctx, name); err != nil {
				return err
			}
		}
		for _, p := range t.partitions {
			if p.lookAgain || p.pending != nil && (s.cfg.NoIdempotence || time.Since(p.pending.firstTried) > pendingLimit) {
				if err := s.resync(ctx, p); err != nil {
					return err
				}
			}
		}
		if look {
			if err := s.grow(ctx, t); errors.Is(err, errReopen) {
				s.log.Error("a topic was deleted and made again; what it held is gone", "topic", name, "err", err)
				delete(s.topics, name)
				clear(s.names)
			} else if err != nil {
				return err
			}
		}
	}
	if look {
		s.looked = time.Now()
	}
	return nil
}

// attempt sends what the topics do not have yet.
func (s *Sink) attempt(ctx context.Context, events []*eventlog.Event) error {
	var busy []*partition
	for _, t := range s.topics {
		for _, p := range t.partitions {
			p.queue, p.busy = nil, p.pending != nil
			if p.busy {
				busy = append(busy, p)
			}
		}
	}
	now := time.Now()
	for _, e := range events {
		t, err := s.topic(ctx, e)
		if err != nil {
			return err
		}
		s.enc.encodeKey(e)
		p := t.partitions[partitionOf(s.enc.key, len(t.partitions))]
		if p.skip(e.Position) || p.pending != nil && e.Position <= p.pending.last {
			continue
		}
		s.enc.encode(e)
		if n := len(p.queue); n == 0 || len(p.queue[n-1].buf)+s.enc.size() > t.maxBytes {
			p.queue = append(p.queue, newBatch(s.buffer(), now))
		}
		b := p.queue[len(p.queue)-1]
		s.enc.add(b, e.Position)
		if t.present != nil {
			b.positions = append(b.positions, e.Position)
		}
		if !p.busy {
			p.busy = true
			busy = append(busy, p)
		}
	}
	if err := s.drainAll(ctx, busy); err != nil {
		return err
	}
	if len(events) > 0 {
		for _, t := range s.topics {
			if t.present != nil && events[len(events)-1].Position >= t.upTo {
				t.present = nil
			}
		}
	}
	return nil
}

// drainAll drains partitions, several at a time, each by itself: what one of them meets is not the others' business.
func (s *Sink) drainAll(ctx context.Context, busy []*partition) error {
	errs := make([]error, len(busy))
	if len(busy) == 1 {
		errs[0] = s.drain(ctx, busy[0])
	} else {
		var wg sync.WaitGroup
		slots := make(chan struct{}, s.cfg.Requests)
		for i, p := range busy {
			slots <- struct{}{}
			wg.Go(func() {
				errs[i] = s.drain(ctx, p)
				<-slots
			})
		}
		wg.Wait()
	}
	var first error
	for i, p := range busy {
		s.spare = append(s.spare, p.spare...)
		p.spare = nil
		p.topic.note(p)
		if p.tooLarge > 0 {
			p.topic.maxBytes = min(p.topic.maxBytes, max(1024, p.tooLarge/2))
			s.log.Info("the topic takes less in one batch", "topic", p.topic.name, "batch_bytes", p.topic.maxBytes)
			p.tooLarge = 0
		}
		// What a person must mend first, then what is worth another attempt, then batches to be made smaller.
		if err := errs[i]; err != nil && (first == nil || errors.Is(first, errTooLarge) || eventlog.Hint(first) == "" && eventlog.Hint(err) != "") {
			first = err
		}
	}
	return first
}

// topic finds the topic of an event, and opens it if need be.
func (s *Sink) topic(ctx context.Context, e *eventlog.Event) (*topic, error) {
	k := nameKey{e.Aggregate, e.Relation}
	if t := s.names[k]; t != nil {
		return t, nil
	}
	name := s.cfg.topicFor(e)
	t := s.topics[name]
	if t == nil {
		var err error
		if t, err = s.openTopic(ctx, name); err != nil {
			return nil, err
		}
		s.topics[name] = t
	}
	if len(s.names) > 10_000 { // relations have versions
		clear(s.names)
	}
	s.names[k] = t
	return t, nil
}

func (s *Sink) buffer() []byte {
	if n := len(s.spare); n > 0 {
		b := s.spare[n-1]
		s.spare = s.spare[:n-1]
		return b
	}
	return nil
}

// Close implements sinks.Sink.
func (s *Sink) Close(context.Context) error {
	if s.transport != nil {
		s.transport.CloseIdleConnections()
	}
	s.transport, s.client, s.topics, s.names, s.spare = nil, nil, nil, nil, nil
	return nil
}

func (s *Sink) String() string { return fmt.Sprintf("kafka topic %s", s.cfg.Topic) }

func appendID(b []byte, id eventlog.ID) []byte {
	var x [36]byte
	hex.Encode(x[:8], id[:4])
	hex.Encode(x[9:13], id[4:6])
	hex.Encode(x[14:18], id[6:8])
	hex.Encode(x[19:23], id[8:10])
	hex.Encode(x[24:], id[10:])
	x[8], x[13], x[18], x[23] = '-', '-', '-', '-'
	return append(b, x[:]...)
}

func appendInt(b []byte, n int64) []byte { return strconv.AppendInt(b, n, 10) }
