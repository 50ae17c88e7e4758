package kafka

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/segmentio/kafka-go/compress"
	"github.com/segmentio/kafka-go/sasl"
	"github.com/segmentio/kafka-go/sasl/plain"
	"github.com/segmentio/kafka-go/sasl/scram"

	"github.com/backstory-dev/backstory/eventlog"
)

// Config says where the cluster is and what goes into which topic.
type Config struct {
	// Brokers are some of the cluster's brokers, host:port. Required.
	Brokers []string
	// Topic is the topic, or a template for it: {aggregate}, {schema} and {table} stand for the event's own, with
	// characters that no topic may have replaced by _. A note or gap, which belongs to no table, has its aggregate in the
	// place of {table} and nothing in that of {schema}. Examples: shop, shop.{aggregate}, shop.{schema}.{table}. Required.
	Topic string
	// CreateTopics makes topics that do not exist. Default: nobody does; that is an error with a remedy.
	CreateTopics *CreateTopics
	// Compression of batches: none, gzip, snappy, lz4 or zstd. Default none.
	Compression string
	// MaxBatchBytes bounds the records in one request to one partition, before compression, plus nothing: an event that
	// is bigger goes alone. Default 1 000 000, which fits a broker's default message.max.bytes; where a topic allows
	// less, the sink finds out and halves it.
	MaxBatchBytes int
	// Requests is how many requests are on their way at once, never two to the same partition. Default 8.
	Requests int
	// RequestTimeout is how long to wait for an answer. Half of it is what the broker gives its replicas. Default 10 s.
	RequestTimeout time.Duration
	// Settle is how long to wait, where nothing else can fence it, for a request of an earlier process to arrive or be
	// gone: after Open, while a topic holds none of our events; with NoIdempotence after every uncertain write. Default 5 s.
	Settle time.Duration
	// NoIdempotence sends without producer id and sequence, for brokers that do not have them. See doc.go for what is
	// lost.
	NoIdempotence bool
	// ClientID is our name in the brokers' logs and quotas. Default backstory.
	ClientID string
	// TLS is used where not nil.
	TLS *tls.Config
	// SASL, User and Password authenticate: plain, scram-sha-256 or scram-sha-512. Default: none.
	SASL, User, Password string
	// Logger is told of what the sink finds out. Default: none.
	Logger *slog.Logger
}

// CreateTopics says how topics are made. Zero values leave the choice to the brokers.
type CreateTopics struct {
	Partitions  int
	Replication int
}

func (c Config) withDefaults() (Config, error) {
	if len(c.Brokers) == 0 {
		return c, problem("Set BACKSTORY_KAFKA_BROKERS to host:port of one broker or several, separated by commas.", "no Kafka brokers given")
	}
	for _, b := range c.Brokers {
		if _, _, err := net.SplitHostPort(b); err != nil {
			return c, problem("Write each broker as host:port, for example kafka1:9092,kafka2:9092.", "read Kafka broker %q: %w", b, err)
		}
	}
	if err := c.checkTopic(); err != nil {
		return c, err
	}
	if _, err := c.codec(); err != nil {
		return c, err
	}
	if _, err := c.mechanism(); err != nil {
		return c, err
	}
	if c.MaxBatchBytes <= 0 {
		c.MaxBatchBytes = 1_000_000
	}
	if c.Requests <= 0 {
		c.Requests = 8
	}
	if c.RequestTimeout <= 0 {
		c.RequestTimeout = 10 * time.Second
	}
	if c.Settle == 0 {
		c.Settle = 5 * time.Second
	}
	if c.ClientID == "" {
		c.ClientID = "backstory"
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

func (c Config) checkTopic() error {
	const hint = "Use letters, digits, '.', '_' and '-', with {aggregate}, {schema} or {table} where one topic is not enough: shop.{aggregate}."
	rest := strings.NewReplacer("{aggregate}", "", "{schema}", "", "{table}", "").Replace(c.Topic)
	if c.Topic == "" || len(c.Topic) > 200 || cleanTopic(rest) != rest || c.Topic == "." || c.Topic == ".." {
		return problem(hint, "read Kafka topic %q", c.Topic)
	}
	return nil
}

func (c Config) codec() (compress.Compression, error) {
	switch c.Compression {
	case "", "none":
		return compress.None, nil
	case "gzip":
		return compress.Gzip, nil
	case "snappy":
		return compress.Snappy, nil
	case "lz4":
		return compress.Lz4, nil
	case "zstd":
		return compress.Zstd, nil
	}
	return 0, problem("Use none, gzip, snappy, lz4 or zstd.", "read Kafka compression %q", c.Compression)
}

func (c Config) mechanism() (sasl.Mechanism, error) {
	switch c.SASL {
	case "":
		return nil, nil
	case "plain":
		return plain.Mechanism{Username: c.User, Password: c.Password}, nil
	case "scram-sha-256":
		return scramMechanism(scram.SHA256, c)
	case "scram-sha-512":
		return scramMechanism(scram.SHA512, c)
	}
	return nil, problem("Use plain, scram-sha-256 or scram-sha-512.", "read Kafka SASL mechanism %q", c.SASL)
}

func scramMechanism(algo scram.Algorithm, c Config) (sasl.Mechanism, error) {
	m, err := scram.Mechanism(algo, c.User, c.Password)
	if err != nil { // says what of them cannot be used, which must not get into a log
		return nil, &eventlog.Problem{Err: errors.New("prepare Kafka user and password for SCRAM"), Hint: "Use characters that SASLprep (RFC 4013) allows."}
	}
	return m, nil
}

func problem(hint, format string, args ...any) error {
	return &eventlog.Problem{Err: fmt.Errorf(format, args...), Hint: hint}
}

// topicFor fills the template.
func (c *Config) topicFor(e *eventlog.Event) string {
	if !strings.Contains(c.Topic, "{") {
		return c.Topic
	}
	schema, table := "", e.Aggregate
	if e.Relation != nil {
		schema, table = e.Relation.Table()
	}
	t := strings.NewReplacer("{aggregate}", cleanTopic(e.Aggregate), "{schema}", cleanTopic(schema), "{table}", cleanTopic(table)).Replace(c.Topic)
	return t[:min(len(t), 249)]
}

func cleanTopic(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-' {
			return r
		}
		return '_'
	}, s)
}
