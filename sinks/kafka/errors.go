package kafka

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	kafka "github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/protocol"

	"github.com/backstory-dev/backstory/sinks"
)

// errSequence means that a partition is not in the state in which we believed it to be; its tail must be read again.
var errSequence = errors.New("the partition's producer state is not ours")

// errTooLarge means that a batch is more than its topic takes.
var errTooLarge = errors.New("batch too large")

// verdict says what an attempt to produce has led to.
type verdict uint8

const (
	written   verdict = iota // durable
	refused                  // certainly not written
	tooLarge                 // certainly not written: too many bytes
	sequence                 // not written now: producer or sequence are not what the broker expects
	uncertain                // may have been written, or may be yet
)

// judge sorts every outcome of a produce request. What is not known to be refused is uncertain.
func judge(err error) verdict {
	if err == nil {
		return written
	}
	var code kafka.Error
	if errors.As(err, &code) {
		switch code {
		case kafka.MessageSizeTooLarge, kafka.RecordListTooLarge:
			return tooLarge
		case kafka.OutOfOrderSequenceNumber, kafka.DuplicateSequenceNumber, kafka.InvalidProducerEpoch, kafka.UnknownProducerId,
			kafka.InvalidProducerIDMapping, kafka.ProducerFenced:
			return sequence
		case kafka.UnknownTopicOrPartition, kafka.LeaderNotAvailable, kafka.NotLeaderForPartition, kafka.ReplicaNotAvailable,
			kafka.BrokerNotAvailable, kafka.NotEnoughReplicas, kafka.TopicAuthorizationFailed, kafka.ClusterAuthorizationFailed,
			kafka.InvalidTopic, kafka.InvalidMessage, kafka.InvalidRecord, kafka.InvalidTimestamp, kafka.PolicyViolation,
			kafka.UnsupportedCompressionType, kafka.UnsupportedForMessageFormat, kafka.UnsupportedVersion, kafka.InvalidRequiredAcks,
			kafka.FencedLeaderEpoch, kafka.UnknownLeaderEpoch, kafka.UnknownTopicID, kafka.SASLAuthenticationFailed:
			return refused
		}
		return uncertain
	}
	if notSent(err) {
		return refused
	}
	return uncertain
}

// notSent tells whether an error happened before a request could leave.
func notSent(err error) bool {
	var op *net.OpError
	var dns *net.DNSError
	return errors.Is(err, protocol.ErrNoTopic) || errors.Is(err, protocol.ErrNoPartition) || errors.Is(err, protocol.ErrNoLeader) ||
		errors.As(err, &dns) || errors.As(err, &op) && op.Op == "dial"
}

// explain makes an error of the client or a broker one that says what to do. topic may be "".
func (s *Sink) explain(err error, doing, topic string) error {
	var code kafka.Error
	has := errors.As(err, &code)
	who := "the sidecar's principal"
	if s.cfg.User != "" {
		who = "User:" + s.cfg.User
	}
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case has && code == kafka.TopicAuthorizationFailed:
		return problem("Grant Describe, Write and Read (the sink reads the end of each partition, so as to send nothing twice): kafka-acls.sh "+
			"--bootstrap-server "+s.cfg.Brokers[0]+" --add --allow-principal "+who+" --operation Describe --operation Write --operation Read --topic "+topic,
			"%s: not authorised for Kafka topic %s: %w", doing, topic, code)
	case has && code == kafka.ClusterAuthorizationFailed:
		return problem("Grant Write on the topics to "+who+"; brokers before 2.8 also need IdempotentWrite on the cluster: kafka-acls.sh --bootstrap-server "+
			s.cfg.Brokers[0]+" --add --allow-principal "+who+" --operation IdempotentWrite --cluster",
			"%s: not authorised in the Kafka cluster: %w", doing, code)
	case has && code == kafka.SASLAuthenticationFailed:
		return problem("Check user, password and mechanism (BACKSTORY_KAFKA_USER, _PASSWORD, _SASL).", "%s: Kafka refused the user: %w", doing, code)
	case errors.Is(err, protocol.ErrNoTopic), errors.Is(err, protocol.ErrNoPartition), errors.Is(err, protocol.ErrNoLeader):
		// The client does not know where to send; the next attempt asks again, and is told why.
		return fmt.Errorf("%s: topic %s: %w: %w", doing, topic, sinks.ErrUnavailable, err)
	case has && code == kafka.UnknownTopicOrPartition:
		return problem("Create it: kafka-topics.sh --bootstrap-server "+s.cfg.Brokers[0]+" --create --topic "+topic+
			" --partitions 12 — or let backstory create topics: BACKSTORY_KAFKA_CREATE_TOPICS=true. If it exists, grant Describe on it.",
			"%s: Kafka topic %s does not exist", doing, topic)
	case has && code == kafka.InvalidTopic:
		return problem("Choose another BACKSTORY_KAFKA_TOPIC.", "%s: Kafka does not take the topic name %s", doing, topic)
	case has && code == kafka.NotEnoughReplicas:
		return problem("Brokers are down: fewer replicas are in sync than the topic's min.insync.replicas asks for. Start them; what was not confirmed is sent again.",
			"%s: topic %s: %w", doing, topic, fmt.Errorf("%w: %w", sinks.ErrUnavailable, code))
	case has && code == kafka.UnsupportedVersion:
		return problem("The brokers need Kafka 0.11 or newer; for those without idempotent producers set BACKSTORY_KAFKA_IDEMPOTENCE=off.", "%s: %w", doing, code)
	case has && code.Temporary(), has && code == kafka.BrokerNotAvailable:
		return fmt.Errorf("%s: topic %s: %w: %w", doing, topic, sinks.ErrUnavailable, code)
	case has:
		return fmt.Errorf("%s: topic %s: %w", doing, topic, code)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), isNet(err):
		return problem("Check that the brokers run, that BACKSTORY_KAFKA_BROKERS and the brokers' advertised.listeners can be reached from here, and whether they expect TLS or SASL.",
			"%s: Kafka at %s: %w: %w", doing, strings.Join(s.cfg.Brokers, ","), sinks.ErrUnavailable, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func isNet(err error) bool {
	var ne net.Error
	return errors.As(err, &ne)
}
