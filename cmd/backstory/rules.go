package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/yamlfile"
	"github.com/backstory-dev/backstory/rebuild"
	"github.com/backstory-dev/backstory/rules"
)

// configFile is the file of rules where BACKSTORY_CONFIG names none, if it is there.
const configFile = "backstory.yaml"

// readRules reads the file of rules; nil: there is none.
func (s *settings) readRules() (*rules.File, error) {
	return readRules(s.rulesFile(), s.Config != "")
}

// rulesFile names the file of rules, whether it is there or not.
func (s *settings) rulesFile() string { return cmp.Or(s.Config, configFile) }

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
	if f == nil {
		return "the default ones"
	}
	return s.rulesFile()
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
	}, newExplain(), newRulesTest())
	return c
}

func newExplain() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "explain POSITION|ID|ENTITY",
		Short: "Tells what the rules make of a row change, and why others make nothing of it.",
		Long: "Tells what the rules make of a row change that is in the log, of an entity its last one, and why others make nothing of it. The file is that of\n" +
			"BACKSTORY_CONFIG, or backstory.yaml, as it is now: what the log has may have been made by others.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, l, err := openLog(cmd.Context())
			if err != nil {
				return err
			}
			defer l.Close()
			f, err := readRules(s.rulesFile(), true)
			if err != nil {
				return err
			}
			out := openScreen(cmd, false)
			defer out.close()
			return explain(cmd.Context(), l, f, args[0], out, asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "as one JSON object")
	return c
}

// explain tells what rules make of the row change that an event belongs to.
func explain(ctx context.Context, l *eventlog.Log, f *rules.File, what string, out *screen, asJSON bool) error {
	e, err := eventOf(ctx, l, what)
	if err != nil {
		return err
	}
	if e.Relation == nil || e.Op != eventlog.OpInsert && e.Op != eventlog.OpUpdate && e.Op != eventlog.OpDelete || strings.HasSuffix(e.Type, "Healed") {
		return usage("Rules are about inserts, updates and deletes: backstory log --quiet shows them.", "event %d (%s) is no such change of a row", e.Position, e.Type)
	}
	before, after, err := rowsAround(ctx, l, e)
	if err != nil {
		return err
	}
	x, err := f.Explain(e.Relation, eventlog.RowChangeOf(e.Relation, e.Op, before, after))
	if err != nil {
		return err
	}
	if asJSON {
		return json.NewEncoder(out).Encode(x)
	}
	of := x.Aggregate
	if of == "" {
		of = "nothing that the file speaks of"
	}
	fmt.Fprintf(out, "%s  %s of %s, a row of %s\n%s", out.yellow(fmt.Sprintf("event %d", e.Position)), e.Op, printable(rowName(e)), of, x)
	return nil
}

// eventOf finds the event that a person names; of an entity, the last change of its row.
func eventOf(ctx context.Context, l *eventlog.Log, what string) (*eventlog.Event, error) {
	if e, err := namedEvent(ctx, l, what); e != nil || err != nil {
		return e, err
	}
	ent, err := l.Entity(ctx, what)
	if err != nil {
		return nil, err
	}
	if !ent.One() {
		return nil, usage("Use a position (1234), an event's id, or an entity (orders/17).", "%q names no event and no entity", what)
	}
	sel := ent.Selection()
	sel.Rows, sel.Quiet, sel.Newest, sel.Limit, sel.Ops = true, true, true, 1, []eventlog.Op{eventlog.OpInsert, eventlog.OpUpdate, eventlog.OpDelete}
	var last *eventlog.Event
	if err := l.Read(ctx, sel, func(e *eventlog.Event) error { last = e.Clone(); return nil }); err != nil {
		return nil, err
	}
	if last == nil {
		return nil, &eventlog.Problem{Err: fmt.Errorf("the log has no change of %s", what), Hint: "backstory log shows what there is."}
	}
	return last, nil
}

// rowsAround gives the row before and after the change that an event belongs to, as far as the log knows them.
func rowsAround(ctx context.Context, l *eventlog.Log, e *eventlog.Event) (before, after []byte, err error) {
	var parts []*eventlog.Event
	first := e.Position - eventlog.Position(e.Part)
	err = l.Read(ctx, eventlog.Selection{After: first - 1, Until: first + eventlog.MaxParts, Quiet: true}, func(p *eventlog.Event) error {
		if p.CommitLSN == e.CommitLSN && p.Change == e.Change && p.Source == e.Source {
			parts = append(parts, p.Clone())
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	switch e.Op {
	case eventlog.OpInsert:
		return nil, parts[0].Data, nil
	case eventlog.OpDelete:
		return parts[len(parts)-1].Before, nil, nil
	}
	key := e.Key
	if k := parts[0].PreviousKey; k != "" {
		key = k
	}
	schema, table := e.Relation.Table()
	ent, err := l.Entity(ctx, eventlog.QuoteQualified(schema, table)+"/"+key)
	if err != nil {
		return nil, nil, err
	}
	st, err := rebuild.Entity(ctx, l, ent, first-1)
	if err != nil {
		return nil, nil, err
	}
	was, now := map[string][]byte{}, map[string][]byte{}
	into := func(m map[string][]byte, object []byte) {
		if object != nil {
			_ = eventlog.EachMember(object, func(name, value []byte) error { m[string(name)] = value; return nil })
		}
	}
	into(was, st.Row)
	for _, p := range parts {
		into(was, p.Before)
		into(now, p.Rest)
	}
	for name, v := range was {
		if _, ok := now[name]; !ok {
			now[name] = v
		}
	}
	for _, p := range parts {
		into(now, p.Data)
	}
	if len(parts) == 1 {
		into(was, parts[0].Rest)
	}
	return object(was), object(now), nil
}

// object makes a JSON object of its members.
func object(m map[string][]byte) []byte {
	b := []byte{'{'}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		if len(b) > 1 {
			b = append(b, ',')
		}
		b = append(append(eventlog.AppendString(b, []byte(name)), ':'), m[name]...)
	}
	return append(b, '}')
}

// checkRules prints what is wrong with the rules.
func (s *settings) checkRules(cmd *cobra.Command) error {
	log, err := s.logger()
	if err != nil {
		return err
	}
	name := s.rulesFile()
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
