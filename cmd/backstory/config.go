package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/kelseyhightower/envconfig"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
)

// settings is the environment, prefix BACKSTORY_. It is read here and nowhere else.
type settings struct {
	SourceURL       string   `split_words:"true"` // the database to capture
	SourceURLFile   string   `split_words:"true"`
	LogURL          string   `split_words:"true"` // the database of the event log; default: the source
	LogURLFile      string   `split_words:"true"`
	Slot            string   `default:"backstory"`
	Publication     string   `default:"backstory"`
	Tables          []string `default:"public.*"`
	Exclude         []string
	LogLevel        string `split_words:"true" default:"info"`
	LogFormat       string `split_words:"true" default:"text"`
	MaxBatchBytes   int    `split_words:"true" default:"1048576"`
	MaxCacheBytes   int    `split_words:"true" default:"16777216"`
	PartitionEvents int64  `split_words:"true" default:"8388608"`
}

// usage wraps an error of wrong use.
func usage(hint, format string, args ...any) error {
	return &exitError{exitUsage, &eventlog.Problem{Err: fmt.Errorf(format, args...), Hint: hint}}
}

func readSettings() (*settings, error) {
	var s settings
	if err := envconfig.Process("backstory", &s); err != nil {
		var pe *envconfig.ParseError
		if errors.As(err, &pe) { // its own text would print the value
			return nil, usage("See README, Settings.", "%s is not a %s", pe.KeyName, pe.TypeName)
		}
		return nil, err
	}
	for _, f := range []struct {
		value *string
		file  string
		name  string
	}{{&s.SourceURL, s.SourceURLFile, "BACKSTORY_SOURCE_URL"}, {&s.LogURL, s.LogURLFile, "BACKSTORY_LOG_URL"}} {
		if f.file == "" {
			continue
		}
		b, err := os.ReadFile(f.file)
		if err != nil {
			return nil, usage("It must be a readable file that holds the URL.", "read %s_FILE: %v", f.name, err)
		}
		*f.value = strings.TrimSpace(string(b))
	}
	return &s, nil
}

// config turns the environment into a sidecar's configuration.
func (s *settings) config(log *slog.Logger) backstory.Config {
	return backstory.Config{
		Capture: capture.Config{URL: s.SourceURL, Slot: s.Slot, Publication: s.Publication, Tables: s.Tables, Exclude: s.Exclude, MaxBatchBytes: s.MaxBatchBytes},
		Log:     eventlog.Config{URL: s.LogURL, PartitionEvents: s.PartitionEvents, MaxCacheBytes: s.MaxCacheBytes},
		Logger:  log,
	}
}

// logger writes to standard error.
func (s *settings) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(s.LogLevel)); err != nil {
		return nil, usage("Use debug, info, warn or error.", "BACKSTORY_LOG_LEVEL %q is not a level", s.LogLevel)
	}
	opt := &slog.HandlerOptions{Level: level}
	switch s.LogFormat {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, opt)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, opt)), nil
	}
	return nil, usage("Use text or json.", "BACKSTORY_LOG_FORMAT %q is not a format", s.LogFormat)
}
