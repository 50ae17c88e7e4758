package main

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kelseyhightower/envconfig"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
	"github.com/backstory-dev/backstory/sinks/jsonl"
	"github.com/backstory-dev/backstory/sinks/kafka"
)

// settings is the environment, prefix BACKSTORY_. It is read here and nowhere else; README, Settings, tells what each means.
type settings struct {
	SourceURL      string   `split_words:"true"` // the database to capture
	SourceURLFile  string   `split_words:"true"` // … or a file that holds it
	StandbyURL     string   `split_words:"true"` // the same on a standby, which is to decode
	StandbyURLFile string   `split_words:"true"`
	LogURL         string   `split_words:"true"` // the database of the event log; default: the source
	LogURLFile     string   `split_words:"true"`
	Slot           string   `default:"backstory"`
	Publication    string   `default:"backstory"`
	Tables         []string `default:"public.*"`
	Exclude        []string
	Config         string // the file of rules; default: backstory.yaml, if it is there
	HTTPAddr       string `split_words:"true" default:"127.0.0.1:8800"` // off: no HTTP
	TZ             string // of dates and times without one

	KafkaBrokers      []string `split_words:"true"`
	KafkaTopic        string   `split_words:"true"` // shop, shop.{aggregate} …
	KafkaCompression  string   `split_words:"true"`
	KafkaCreateTopics bool     `split_words:"true"`
	KafkaPartitions   int      `split_words:"true"`
	KafkaIdempotence  string   `split_words:"true" default:"on"` // off: for brokers without idempotent producers
	KafkaTLS          bool     `split_words:"true"`
	KafkaSASL         string   `split_words:"true"`
	KafkaUser         string   `split_words:"true"`
	KafkaPassword     string   `split_words:"true"`
	KafkaPasswordFile string   `split_words:"true"`
	JSONL             string   // a file, or - for standard output

	LogLevel        string        `split_words:"true" default:"info"`
	LogFormat       string        `split_words:"true" default:"text"`
	MaxBatchBytes   int           `split_words:"true" default:"1048576"`
	MaxCacheBytes   int           `split_words:"true" default:"16777216"`
	PartitionEvents int64         `split_words:"true" default:"8388608"`
	WALAlarm        int64         `split_words:"true" default:"10000000000"` // bytes of WAL that the source may keep for the slot before that is said; 0: never
	WALLimit        int64         `split_words:"true"`                       // … before the slot is dropped; 0: never
	BaselineRate    int64         `split_words:"true"`                       // bytes of existing rows, as text, that are read in a second; 0: as fast as it goes
	BaselineTables  int           `split_words:"true" default:"2"`
	CompareInterval time.Duration `split_words:"true" default:"10m"` // between two comparisons of a table without a usable key; 0: none

	location *time.Location // see zone
}

// readSettings reads the environment, checks what can be checked without a connection, and warns of names that mean nothing.
func readSettings() (*settings, error) {
	for name := range fields() {
		if v, ok := os.LookupEnv(name); ok && v == "" {
			_ = os.Unsetenv(name) // as compose files have it: empty is not set
		}
	}
	var s settings
	if err := envconfig.Process("backstory", &s); err != nil {
		var pe *envconfig.ParseError
		if errors.As(err, &pe) { // its own text would print the value
			want := map[string]string{"int": "a whole number", "int64": "a whole number", "bool": "true or false", "time.Duration": "a duration such as 10m or 1h"}[pe.TypeName]
			return nil, usage(defaultHint(pe.KeyName), "%s is not %s", pe.KeyName, want)
		}
		return nil, err
	}
	log, err := s.logger()
	if err != nil {
		return nil, err
	}
	for _, name := range unknown() {
		log.Warn("unknown setting", "name", name, "meant", strings.Join(similar(name, slices.Sorted(maps.Keys(fields()))), " or "))
	}
	for _, f := range []struct {
		value *string
		file  string
		name  string
	}{{&s.SourceURL, s.SourceURLFile, "BACKSTORY_SOURCE_URL"}, {&s.StandbyURL, s.StandbyURLFile, "BACKSTORY_STANDBY_URL"}, {&s.LogURL, s.LogURLFile, "BACKSTORY_LOG_URL"}, {&s.KafkaPassword, s.KafkaPasswordFile, "BACKSTORY_KAFKA_PASSWORD"}} {
		if f.file == "" {
			continue
		}
		b, err := os.ReadFile(f.file)
		if err != nil {
			return nil, usage("It must name a readable file that holds the value of "+f.name+".", "read %s_FILE: %v", f.name, err)
		}
		if *f.value = strings.TrimSpace(string(b)); *f.value == "" {
			return nil, usage("It must hold the value of "+f.name+".", "%s_FILE names a file that is empty (%s)", f.name, f.file)
		}
	}
	for _, u := range []struct{ name, value string }{{"BACKSTORY_SOURCE_URL", s.SourceURL}, {"BACKSTORY_STANDBY_URL", s.StandbyURL}, {"BACKSTORY_LOG_URL", s.LogURL}} {
		if u.value == "" {
			continue
		}
		if _, err := eventlog.ConnConfig(u.value, ""); err != nil {
			return nil, usage(eventlog.Hint(err), "%s: %w", u.name, err)
		}
	}
	for _, n := range []struct {
		name  string
		value int64
	}{{"BACKSTORY_MAX_BATCH_BYTES", int64(s.MaxBatchBytes)}, {"BACKSTORY_MAX_CACHE_BYTES", int64(s.MaxCacheBytes)}, {"BACKSTORY_PARTITION_EVENTS", s.PartitionEvents},
		{"BACKSTORY_BASELINE_TABLES", int64(s.BaselineTables)}} {
		if n.value <= 0 {
			return nil, usage(defaultHint(n.name), "%s has to be more than 0", n.name)
		}
	}
	if s.WALAlarm < 0 || s.WALLimit < 0 {
		return nil, usage("They are numbers of bytes; 0 means never.", "BACKSTORY_WAL_ALARM and BACKSTORY_WAL_LIMIT must not be negative")
	}
	if s.BaselineRate < 0 {
		return nil, usage("It is a number of bytes in a second; 0 means no bound.", "BACKSTORY_BASELINE_RATE must not be negative")
	}
	if s.CompareInterval < 0 {
		return nil, usage("It is a duration such as 10m or 1h; 0 means never.", "BACKSTORY_COMPARE_INTERVAL must not be negative")
	}
	if s.KafkaPartitions < 0 {
		return nil, usage(defaultHint("BACKSTORY_KAFKA_PARTITIONS"), "BACKSTORY_KAFKA_PARTITIONS must not be negative")
	}
	if s.HTTPAddr != "off" {
		if err := backstory.CheckAddr(s.HTTPAddr); err != nil {
			return nil, usage(eventlog.Hint(err), "BACKSTORY_HTTP_ADDR: %w", err)
		}
	}
	if len(s.KafkaBrokers) > 0 && s.KafkaTopic == "" {
		return nil, usage("Set it to a topic, or to a template such as shop.{aggregate}.", "BACKSTORY_KAFKA_BROKERS is set, BACKSTORY_KAFKA_TOPIC is not")
	}
	if len(s.KafkaBrokers) == 0 && s.KafkaTopic != "" {
		return nil, usage("Set it to host:port of one broker or several, separated by commas.", "BACKSTORY_KAFKA_TOPIC is set, BACKSTORY_KAFKA_BROKERS is not")
	}
	return &s, nil
}

// fields gives the settings by their names in the environment.
func fields() map[string]reflect.StructField {
	out := map[string]reflect.StructField{}
	t := reflect.TypeFor[settings]()
	for i := range t.NumField() {
		if f := t.Field(i); f.IsExported() {
			out[envName(f.Name)] = f
		}
	}
	return out
}

func defaultHint(name string) string {
	if d := fields()[name].Tag.Get("default"); d != "" {
		return "The default is " + d + "; README, Settings, tells what it means."
	}
	return "README, Settings, tells what it means."
}

// unknown gives the names in the environment that begin with our prefix and mean nothing.
func unknown() []string {
	known := fields()
	var out []string
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		_, ok := known[name]
		if strings.HasPrefix(name, "BACKSTORY_") && !ok && !strings.HasPrefix(name, "BACKSTORY_TEST_") && !strings.HasPrefix(name, "BACKSTORY_BENCH_") && !strings.HasPrefix(name, "BACKSTORY_CRASH_") {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

var words = regexp.MustCompile(`([A-Z]+)([A-Z][a-z])|([a-z])([A-Z])`)

// envName is the environment's name of a field: KafkaTopic is BACKSTORY_KAFKA_TOPIC.
func envName(field string) string {
	return "BACKSTORY_" + strings.ToUpper(words.ReplaceAllString(field, "${1}${3}_${2}${4}"))
}

// config turns the environment into a sidecar's configuration.
func (s *settings) config(log *slog.Logger) backstory.Config {
	return backstory.Config{
		Capture: capture.Config{URL: s.SourceURL, StandbyURL: s.StandbyURL, Slot: s.Slot, Publication: s.Publication, Tables: s.Tables, Exclude: s.Exclude, MaxBatchBytes: s.MaxBatchBytes,
			BaselineTables: s.BaselineTables, BaselineBytesPerSecond: s.BaselineRate},
		Log:           eventlog.Config{URL: s.LogURL, PartitionEvents: s.PartitionEvents, MaxCacheBytes: s.MaxCacheBytes},
		WALAlarmBytes: s.WALAlarm, WALLimitBytes: s.WALLimit, CompareInterval: s.CompareInterval,
		Logger: log,
	}
}

// reactors gives the dispatcher the sinks that the environment names.
func (s *settings) reactors(log *slog.Logger) (func(*sinks.Dispatcher) error, error) {
	var list []*sinks.Reactor
	if len(s.KafkaBrokers) > 0 {
		cfg := kafka.Config{Brokers: s.KafkaBrokers, Topic: s.KafkaTopic, Compression: s.KafkaCompression, SASL: s.KafkaSASL, User: s.KafkaUser, Password: s.KafkaPassword, Logger: log}
		if s.KafkaCreateTopics {
			cfg.CreateTopics = &kafka.CreateTopics{Partitions: s.KafkaPartitions}
		}
		switch s.KafkaIdempotence {
		case "on":
		case "off":
			cfg.NoIdempotence = true
		default:
			return nil, usage("The default is on.", "BACKSTORY_KAFKA_IDEMPOTENCE is neither on nor off: %q", s.KafkaIdempotence)
		}
		if s.KafkaTLS {
			cfg.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		k, err := kafka.New(cfg)
		if err != nil {
			return nil, &exitError{exitUsage, err}
		}
		list = append(list, &sinks.Reactor{Name: "kafka", Sink: k})
	}
	if s.JSONL != "" {
		j, every := jsonl.File(s.JSONL), time.Duration(0)
		if s.JSONL == "-" { // what was printed is nowhere to be read again
			j, every = jsonl.Stream(os.Stdout), -1
		}
		list = append(list, &sinks.Reactor{Name: "jsonl", Sink: j, CheckpointEvery: every})
	}
	if len(list) == 0 {
		return nil, nil
	}
	return func(d *sinks.Dispatcher) error {
		for _, r := range list {
			if err := d.On("*", r); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// logger writes to standard error.
func (s *settings) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(s.LogLevel)); err != nil {
		return nil, usage("Use debug, info, warn or error.", "BACKSTORY_LOG_LEVEL %q is not a level", s.LogLevel)
	}
	opt := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == "hint" && a.Value.Kind() == slog.KindString && a.Value.String() == "" {
			return slog.Attr{} // there is nothing to be done
		}
		return a
	}}
	switch s.LogFormat {
	case "text":
		return slog.New(slog.NewTextHandler(stderr, opt)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(stderr, opt)), nil
	}
	return nil, usage("Use text or json.", "BACKSTORY_LOG_FORMAT %q is not a format", s.LogFormat)
}
