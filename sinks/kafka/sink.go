package kafka

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
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
	only      *topic             // where there is no template
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
	s.enc = encoder{origin: []byte(start.Log + "/" + start.Reactor)}
	if name := s.cfg.topicFor(&eventlog.Event{}); name == s.cfg.Topic {
		t, err := s.openTopic(ctx, name)
		if err != nil {
			_ = s.Close(ctx)
			return 0, err
		}
		s.topics[name], s.only = t, t
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
				s.only = nil
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

// attempt sends what the topics do not have yet: while one part of it is on its way, the next is encoded.
func (s *Sink) attempt(ctx context.Context, events []*eventlog.Event) error {
	var part, sending []*partition // with something to send; with a request on its way
	for _, t := range s.topics {
		for _, p := range t.partitions {
			p.queue, p.busy, p.have, p.doubtful = nil, p.pending != nil, p.sent, 0
			if p.busy {
				p.doubtful = p.pending.last
				part = append(part, p)
			}
		}
	}
	done := make(chan error, 1)
	wait := func() error { // until what is on its way has arrived, or not
		if sending == nil {
			return nil
		}
		err := s.settle(sending, <-done)
		sending = nil
		return err
	}
	flush := func() error { // sends what has been encoded
		if err := wait(); err != nil {
			return err
		}
		for _, p := range part {
			p.sending, p.queue, p.busy = p.queue, nil, false
		}
		sending, part = part, nil
		go func(now []*partition) { done <- s.drainAll(ctx, now) }(sending)
		return nil
	}
	now, size := time.Now(), 0
	for i, e := range events {
		t, err := s.topic(ctx, e, wait)
		if err != nil {
			return errors.Join(wait(), err)
		}
		s.enc.encodeKey(e)
		p := t.partitions[partitionOf(s.enc.key, len(t.partitions))]
		if p.skip(e.Position) {
			continue
		}
		s.enc.encode(e)
		n := s.enc.size()
		if q := len(p.queue); q == 0 || len(p.queue[q-1].buf)+n > t.maxBytes {
			p.queue = append(p.queue, newBatch(s.buffer(), now))
		}
		b := p.queue[len(p.queue)-1]
		s.enc.add(b, e.Position)
		if t.present != nil {
			b.positions = append(b.positions, e.Position)
		}
		if !p.busy {
			p.busy = true
			part = append(part, p)
		}
		if size += n; size >= partBytes && i+1 < len(events) {
			if err := flush(); err != nil {
				return err
			}
			size = 0
		}
	}
	if err := flush(); err != nil {
		return err
	}
	if err := wait(); err != nil {
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

// partBytes is how much of a Send is encoded before it is sent.
const partBytes = 2 << 20

// drainAll drains partitions, several at a time, each by itself: what one of them meets is not the others' business.
func (s *Sink) drainAll(ctx context.Context, busy []*partition) error {
	errs := make([]error, len(busy))
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
	var first error
	for _, err := range errs {
		// What a person must mend first, then what is worth another attempt, then batches to be made smaller.
		if err != nil && (first == nil || errors.Is(first, errTooLarge) || eventlog.Hint(first) == "" && eventlog.Hint(err) != "") {
			first = err
		}
	}
	return first
}

// settle takes over what drained partitions have left for the sink, and passes on the error.
func (s *Sink) settle(drained []*partition, err error) error {
	for _, p := range drained {
		s.spare = append(s.spare, p.spare...)
		p.spare, p.sending = nil, nil
		p.topic.note(p)
		if p.tooLarge > 0 {
			p.topic.maxBytes = min(p.topic.maxBytes, max(1024, p.tooLarge/2))
			s.log.Info("the topic takes less in one batch", "topic", p.topic.name, "batch_bytes", p.topic.maxBytes)
			p.tooLarge = 0
		}
	}
	return err
}

// topic finds the topic of an event, and opens it if need be; before that it calls idle, since the client must not be in
// use then.
func (s *Sink) topic(ctx context.Context, e *eventlog.Event, idle func() error) (*topic, error) {
	if s.only != nil {
		return s.only, nil
	}
	k := nameKey{e.Aggregate, e.Relation}
	if t := s.names[k]; t != nil {
		return t, nil
	}
	name := s.cfg.topicFor(e)
	t := s.topics[name]
	if t == nil {
		if err := idle(); err != nil {
			return nil, err
		}
		var err error
		if t, err = s.openTopic(ctx, name); err != nil {
			return nil, err
		}
		s.topics[name] = t
		for _, p := range t.partitions {
			p.have = p.sent
		}
		if name == s.cfg.Topic {
			s.only = t
		}
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
	s.transport, s.client, s.topics, s.only, s.names, s.spare = nil, nil, nil, nil, nil, nil
	return nil
}

func (s *Sink) String() string { return fmt.Sprintf("kafka topic %s", s.cfg.Topic) }

func appendID(b []byte, id eventlog.ID) []byte {
	const digits = "0123456789abcdef"
	var x [36]byte
	n := 0
	for i, c := range id {
		if i == 4 || i == 6 || i == 8 || i == 10 {
			x[n] = '-'
			n++
		}
		x[n], x[n+1] = digits[c>>4], digits[c&15]
		n += 2
	}
	return append(b, x[:]...)
}
