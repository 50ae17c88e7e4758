package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/yamlfile"
	"github.com/backstory-dev/backstory/rules"
)

// configFile is the file of rules where BACKSTORY_CONFIG names none, if it is there.
const configFile = "backstory.yaml"

// readRules reads the file of rules; nil: there is none.
func (s *settings) readRules() (*rules.File, error) {
	name := s.Config
	if name == "" {
		name = configFile
	}
	return readRules(name, s.Config != "")
}

func readRules(name string, must bool) (*rules.File, error) {
	b, err := os.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !must:
		return nil, nil
	case err != nil:
		return nil, usage("BACKSTORY_CONFIG names the file of rules; without it, "+configFile+" in the current directory counts if it is there.", "read the rules: %w", err)
	}
	f, err := rules.Parse(name, b)
	if err != nil {
		return nil, usage("backstory rules check tells when it is right.", "%s is not right:\n%w", name, err)
	}
	return f, nil
}

// reloadRules puts the file of rules into force whenever the process gets SIGHUP.
func (s *settings) reloadRules(ctx context.Context, sc *backstory.Sidecar, log *slog.Logger) (stop func()) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-done:
				return
			case <-hup:
			}
			f, err := s.readRules()
			switch {
			case err == nil && f == nil:
				err = &eventlog.Problem{Err: errors.New(configFile + " is not there"), Hint: "A restart without it goes on with the default events."}
			case err == nil && f.Aggregates() == 0:
				err = &eventlog.Problem{Err: fmt.Errorf("%s has no aggregates", s.rulesName(f)), Hint: "A restart with it goes on with the default events."}
			}
			if err == nil {
				err = sc.SetRules(ctx, f)
			}
			if err != nil {
				log.Error("the rules stay as they were", "err", err, "hint", eventlog.Hint(err))
			} else {
				log.Info("rules read again: they hold from the next transaction on", "rules", s.rulesName(f))
			}
		}
	}()
	return func() { signal.Stop(hup); close(done) }
}

// rulesName tells people which rules there are.
func (s *settings) rulesName(f *rules.File) string {
	switch {
	case f == nil:
		return "the default ones"
	case s.Config != "":
		return s.Config
	}
	return configFile
}

func newRules() *cobra.Command {
	c := &cobra.Command{
		Use:   "rules",
		Short: "What backstory.yaml makes of row changes.",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(&cobra.Command{
		Use:   "check [FILE]",
		Short: "Compares the rules with the tables of the source (exit code 3 if something is wrong).",
		Long: "Compares the rules with the tables of the source: each name and each expression, with file, line and column. The file is that of BACKSTORY_CONFIG,\n" +
			"or backstory.yaml. Exit codes: 0 right, 3 something is wrong.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := readSettings()
			if err != nil {
				return err
			}
			if len(args) > 0 {
				s.Config = args[0]
			}
			return s.checkRules(cmd)
		},
	})
	return c
}

// checkRules prints what is wrong with the rules.
func (s *settings) checkRules(cmd *cobra.Command) error {
	log, err := s.logger()
	if err != nil {
		return err
	}
	name := s.Config
	if name == "" {
		name = configFile
	}
	f, err := readRules(name, true)
	var wrong *exitError
	var problems yamlfile.Problems
	if errors.As(err, &wrong) && errors.As(err, &problems) {
		return &exitError{exitFound, fmt.Errorf("%s is not right:\n%w", name, problems)}
	}
	if err != nil {
		return err
	}
	cfg := s.config(log).Capture.WithDefaults()
	if err := cfg.Validate(); err != nil {
		return &exitError{exitUsage, err}
	}
	p, err := capture.Prepare(cmd.Context(), cfg)
	if err != nil {
		return err
	}
	var tables []*eventlog.Relation
	for _, t := range p.Tables {
		tables = append(tables, t.Relation)
	}
	out := openScreen(cmd, false)
	defer out.close()
	warnings, err := f.Check(tables)
	for i := range warnings {
		fmt.Fprintf(out, "%s %s\n", out.yellow("warning"), warnings[i].Error())
	}
	if err != nil {
		return &exitError{exitFound, fmt.Errorf("%s is not right:\n%w", name, err)}
	}
	fmt.Fprintf(out, "%s: %s\n", name, out.green(fmt.Sprintf("%s, %s; they fit the tables of the source", counted(int64(f.Aggregates()), "aggregate"), counted(int64(f.Events()), "event"))))
	return nil
}
