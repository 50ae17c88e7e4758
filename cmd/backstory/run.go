package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/eventlog"
)

func newRun() *cobra.Command {
	var once bool
	c := &cobra.Command{
		Use:   "run",
		Short: "The sidecar: captures the source into the event log and feeds the reactors, until it is stopped.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := readSettings()
			if err != nil {
				return err
			}
			log, err := s.logger()
			if err != nil {
				return err
			}
			cfg := s.config(log)
			cfg.Once = once
			if cfg.Rules, err = s.readRules(); err != nil {
				return err
			}
			if cfg.Reactors, err = s.reactors(log); err != nil {
				return err
			}
			if err := cfg.Capture.WithDefaults().Validate(); err != nil {
				return &exitError{exitUsage, err}
			}
			if os.Getenv("GOMEMLIMIT") == "" {
				debug.SetMemoryLimit(s.memory())
			}
			return s.run(cmd.Context(), cfg, log)
		},
	}
	c.Flags().BoolVar(&once, "once", false, "end when everything up to the source's WAL position at the start is in the log and sent")
	return c
}

// memory is how much the process is meant to use, in bytes: above it the garbage collector works harder, though nothing fails. A
// transaction's rows may be anything; beside the cache there are a few batches, and two steps of a few MB on their way to the log.
func (s *settings) memory() int64 { return int64(s.MaxCacheBytes) + 8*int64(s.MaxBatchBytes) + 20<<20 }

// run captures and serves HTTP until either ends.
func (s *settings) run(ctx context.Context, cfg backstory.Config, log *slog.Logger) error {
	logURL := s.LogURL
	if logURL == "" {
		logURL = s.SourceURL
	}
	log.Info("starting", "source", eventlog.Address(s.SourceURL), "log", eventlog.Address(logURL), "slot", s.Slot, "tables", strings.Join(s.Tables, ","),
		"http", s.HTTPAddr, "kafka", strings.Join(s.KafkaBrokers, ","), "topic", s.KafkaTopic, "rules", s.rulesName(cfg.Rules), "max_batch_bytes", s.MaxBatchBytes, "max_cache_bytes", s.MaxCacheBytes)
	var l net.Listener // before anything else: on one machine it keeps a second sidecar of the same settings away
	if !cfg.Once && s.HTTPAddr != "off" {
		var err error
		if l, err = backstory.Listen(s.HTTPAddr); err != nil {
			return err
		}
		defer l.Close()
	}
	sc, err := backstory.New(ctx, cfg)
	if err != nil {
		return err
	}
	defer sc.Close()
	defer s.reloadRules(ctx, sc, log)()
	if isTerminal(os.Stderr) {
		defer showBaseline(sc)()
	}
	if l == nil {
		return finish(sc, sc.Run(ctx), log)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() {
		served <- sc.ServeOn(ctx, l)
		stop()
	}()
	err = sc.Run(ctx)
	stop()
	return finish(sc, errors.Join(err, <-served), log)
}

// showBaseline shows, until it is stopped, how far existing rows are taken over.
func showBaseline(sc *backstory.Sidecar) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				stderr.show("")
				return
			case <-tick.C:
			}
			line := ""
			if b := sc.Baseline(); b != nil {
				p, comparing := b.Now()
				what := "existing rows"
				if comparing {
					what = "comparing rows"
				}
				line = barLine(what, p.Share, p.RowsPerSecond, p.SecondsLeft)
			}
			stderr.show(line)
		}
	}()
	return func() { close(done); <-ended }
}

func finish(sc *backstory.Sidecar, err error, log *slog.Logger) error {
	if trouble := sc.Interrupted(); err == nil && trouble != nil {
		log.Warn("stopped while capture was interrupted; the source keeps what is not in the log", "err", trouble, "hint", eventlog.Hint(trouble))
	} else if err == nil {
		log.Info("stopped; everything received is in the log and confirmed")
	}
	return err
}
