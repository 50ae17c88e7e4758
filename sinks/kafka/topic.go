package kafka

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	kafka "github.com/segmentio/kafka-go"
	"golang.org/x/sync/errgroup"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
)

// topic is a topic that we write to, and what we know of it.
type topic struct {
	name       string
	partitions []*partition
	maxBytes   int // of a batch; halved when the topic takes less
	// present holds the positions in (start.After, upTo] that the topic has, where the partitions' tails do not tell:
	// after partitions were added, a key's events may lie in another partition than the one where they would go now.
	present *positionSet
	upTo    eventlog.Position
}

// partition is one of a topic's partitions. While a request is on its way, the goroutine of that request owns it, but for
// what is Send's.
type partition struct {
	topic *topic
	id    int

	// Send's:
	have     eventlog.Position // sent, as it was when the attempt began
	doubtful eventlog.Position // of the last event in pending
	queue    []*batch          // encoded in this attempt
	busy     bool              // has something in queue, or in pending

	sent     eventlog.Position // of the last event of ours that the partition is known to hold
	producer producer          // of the next batch
	// inherited says that the producer state was continued from the tail of an earlier process, and no batch has been
	// confirmed since: the first answer "written" may then mean that process's batch, and is checked.
	inherited bool
	resyncs   int      // in a row without a batch written
	lookAgain bool     // the end must be read before anything is sent
	next      int64    // offset that follows our last batch, or the end when it was last read
	pending   *batch   // may have been written; is sent again as it is before anything else
	sending   []*batch // to be sent after it
	tooLarge  int      // bytes of a batch that the topic did not take
	acked     []eventlog.Position
	spare     [][]byte // buffers to be used again
}

// note adds what was just written to the topic's set of positions.
func (t *topic) note(p *partition) {
	if t.present != nil {
		for _, x := range p.acked {
			t.present.add(int64(x))
		}
	}
	p.acked = nil
}

// skip tells whether the topic has an event already, or a request with it that comes first.
func (p *partition) skip(pos eventlog.Position) bool {
	if pos <= p.doubtful {
		return true
	}
	if p.topic.present != nil && pos <= p.topic.upTo {
		return p.topic.present.has(int64(pos))
	}
	return pos <= p.have
}

// openTopic finds out what a topic holds of ours. It makes the topic if it is missing and we may.
func (s *Sink) openTopic(ctx context.Context, name string) (*topic, error) {
	n, err := s.partitionCount(ctx, name)
	if isMissing(err) && s.cfg.CreateTopics != nil {
		n, err = s.createTopic(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	t := &topic{name: name, maxBytes: s.cfg.MaxBatchBytes}
	tails, err := s.readTails(ctx, t, n)
	if err != nil {
		return nil, err
	}
	empty := !slices.ContainsFunc(tails, func(t tail) bool { return t.position > 0 })
	if wait := s.cfg.Settle - time.Since(s.opened); (empty || s.cfg.NoIdempotence) && !s.start.First && wait > 0 {
		// Nothing fences a first batch that an earlier process may have on its way: its producer is not known.
		s.log.Info("waiting for a request that an earlier process may have left", "topic", name, "wait", wait.Round(time.Millisecond))
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
		if tails, err = s.readTails(ctx, t, n); err != nil {
			return nil, err
		}
	}
	newest, moved := tail{producer: producer{id: -1}}, false
	holes := false
	for _, x := range tails {
		if x.position > newest.position {
			newest = x
		}
		moved = moved || x.elsewhere
		holes = holes || x.position == 0
	}
	if newest.position > 0 {
		if err := s.start.Verify(ctx, newest.position, newest.id); err != nil {
			return nil, fmt.Errorf("Kafka topic %s: %w", name, err)
		}
	}
	if newest.position > s.start.After && (moved || holes) {
		if tails, err = s.readPresent(ctx, t, n); err != nil {
			return nil, err
		}
	}
	for i, x := range tails {
		p := &partition{topic: t, id: i, sent: x.position, producer: x.producer, inherited: true, next: x.end}
		if p.producer.id < 0 && newest.producer.id >= 0 {
			p.producer = producer{id: newest.producer.id, epoch: newest.producer.epoch}
		}
		if p.producer.id < 0 || s.cfg.NoIdempotence {
			p.inherited = false
			if p.producer, err = s.freshProducer(ctx); err != nil {
				return nil, err
			}
		}
		t.partitions = append(t.partitions, p)
	}
	s.log.Info("topic opened", "topic", name, "partitions", n, "position", newest.position, "checkpoint", s.start.After)
	return t, nil
}

// readTails reads the ends of all partitions, several at a time.
func (s *Sink) readTails(ctx context.Context, t *topic, n int) ([]tail, error) {
	tails := make([]tail, n)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(s.cfg.Requests)
	for i := range n {
		g.Go(func() (err error) {
			tails[i], err = s.readTail(ctx, t.name, i, n, 0, nil)
			return err
		})
	}
	return tails, g.Wait()
}

// readPresent reads all partitions back to the checkpoint and notes which events are there.
func (s *Sink) readPresent(ctx context.Context, t *topic, n int) ([]tail, error) {
	began := time.Now()
	t.present = &positionSet{base: int64(s.start.After)}
	tails := make([]tail, n)
	for i := range n { // one at a time: the set is not guarded, and the memory for one fetch is enough
		var err error
		if tails[i], err = s.readTail(ctx, t.name, i, n, s.start.After, func(p eventlog.Position) { t.present.add(int64(p)) }); err != nil {
			return nil, err
		}
		t.upTo = max(t.upTo, tails[i].position)
	}
	s.log.Info("read the topic back to the checkpoint, since keys may have changed their partition", "topic", t.name,
		"checkpoint", s.start.After, "position", t.upTo, "events", t.present.len(), "took", time.Since(began).Round(time.Millisecond))
	return tails, nil
}

// grow takes notice of partitions that were added. It is called only while nothing is undecided, since it changes where
// keys go.
func (s *Sink) grow(ctx context.Context, t *topic) error {
	n, err := s.partitionCount(ctx, t.name)
	if err != nil || n == len(t.partitions) {
		return err
	}
	if n < len(t.partitions) {
		return fmt.Errorf("topic %s: had %d partitions, now %d: it was deleted and made again: %w", t.name, len(t.partitions), n, errReopen)
	}
	s.log.Info("partitions were added; new events of a key may follow in another partition than its old ones",
		"topic", t.name, "before", len(t.partitions), "now", n)
	var added []*partition // all at once or none: their number decides where keys go
	for i := len(t.partitions); i < n; i++ {
		x, err := s.readTail(ctx, t.name, i, n, 0, nil)
		if err != nil {
			return err
		}
		p := &partition{topic: t, id: i, sent: x.position, next: x.end}
		if p.producer, err = s.freshProducer(ctx); err != nil {
			return err
		}
		added = append(added, p)
	}
	t.partitions = append(t.partitions, added...)
	return nil
}

var (
	errReopen  = errors.New("the topic must be opened again")
	errMissing = errors.New("topic missing")
)

func isMissing(err error) bool { return errors.Is(err, errMissing) }

// partitionCount asks how many partitions a topic has. The answer is the transport's, at most metadataTTL old, unless
// the topic is new to us.
func (s *Sink) partitionCount(ctx context.Context, name string) (int, error) {
	if !slices.Contains(s.transport.MetadataTopics, name) {
		// The transport asks for these alone: a cluster may have thousands that are not our business, and only for a
		// topic that is asked for by name does the broker say "not authorised" instead of nothing.
		s.transport.MetadataTopics = append(slices.Clone(s.transport.MetadataTopics), name)
		s.transport.CloseIdleConnections()
	}
	doing := "look up the topic"
	res, err := s.client.Metadata(ctx, &kafka.MetadataRequest{Topics: []string{name}})
	if err != nil {
		return 0, s.explain(err, doing, name)
	}
	for _, t := range res.Topics {
		if t.Name != name {
			continue
		}
		if t.Error != nil {
			s.transport.CloseIdleConnections() // ask again next time
			err := s.explain(t.Error, doing, name)
			if errors.Is(t.Error, kafka.UnknownTopicOrPartition) {
				err = fmt.Errorf("%w%w", noText{errMissing}, err)
			}
			return 0, err
		}
		for _, p := range t.Partitions {
			if p.Error != nil && !errors.Is(p.Error, kafka.ReplicaNotAvailable) {
				s.transport.CloseIdleConnections()
				return 0, s.explain(p.Error, fmt.Sprintf("look up partition %d", p.ID), name)
			}
		}
		if len(t.Partitions) > 0 {
			return len(t.Partitions), nil
		}
	}
	s.transport.CloseIdleConnections()
	return 0, fmt.Errorf("%w%w", noText{errMissing}, s.explain(kafka.UnknownTopicOrPartition, doing, name))
}

// noText marks an error without a word in its text.
type noText struct{ error }

func (noText) Error() string   { return "" }
func (n noText) Unwrap() error { return n.error }

// createTopic makes a topic and waits until its partitions have leaders. It returns how many there are.
func (s *Sink) createTopic(ctx context.Context, name string) (int, error) {
	c := kafka.TopicConfig{Topic: name, NumPartitions: s.cfg.CreateTopics.Partitions, ReplicationFactor: s.cfg.CreateTopics.Replication}
	if c.NumPartitions == 0 {
		c.NumPartitions = -1
	}
	if c.ReplicationFactor == 0 {
		c.ReplicationFactor = -1
	}
	res, err := s.client.CreateTopics(ctx, &kafka.CreateTopicsRequest{Topics: []kafka.TopicConfig{c}})
	if err == nil {
		err = res.Errors[name]
	}
	if err != nil && !errors.Is(err, kafka.TopicAlreadyExists) {
		return 0, s.explain(err, "create the topic", name)
	}
	s.log.Info("topic created", "topic", name)
	for end := time.Now().Add(s.cfg.RequestTimeout); ; {
		s.transport.CloseIdleConnections()
		n, err := s.partitionCount(ctx, name)
		for i := 0; err == nil && i < n; i++ {
			_, _, err = s.offsets(ctx, name, i)
		}
		if err == nil || time.Now().After(end) || !isMissing(err) && !errors.Is(err, sinks.ErrUnavailable) {
			return n, err
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
