package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/rebuild"
)

// gapUntil finds the last gap up to a position, nil if there is none.
func gapUntil(ctx context.Context, l *eventlog.Log, p eventlog.Position) (gap *eventlog.Event, err error) {
	h, err := l.Head(ctx)
	if err != nil || h.Incarnation == 0 && h.Gap == "" { // most logs never have one
		return nil, err
	}
	err = l.Read(ctx, eventlog.Selection{Aggregates: []string{"Source"}, Types: []string{"SourceGap"}, Until: p, Newest: true, Limit: 1, Quiet: true}, func(e *eventlog.Event) error {
		gap = e.Clone()
		return nil
	})
	return gap, err
}

func newCheckout() *cobra.Command {
	var o struct {
		at, schema, database, csv, jsonl string
		shape                            string
		partial, replace, json           bool
		memory                           int64
		workers                          int
	}
	c := &cobra.Command{
		Use:   "checkout --at REV (--schema NAME | --database URL | --csv DIR | --jsonl DIR) [TABLE …]",
		Short: "The tables as they were, into another schema, another database, or files.",
		RunE: func(cmd *cobra.Command, tables []string) error {
			ctx := cmd.Context()
			if o.at == "" {
				return usage("For instance --at '1 hour ago', --at yesterday, --at HEAD, --at 1234.", "--at is missing")
			}
			if o.shape != "then" && o.shape != "now" {
				return usage("Use --shape then, or --shape now.", "--shape %s is unknown", o.shape)
			}
			targets := 0
			for _, t := range []string{o.schema, o.csv, o.jsonl} {
				if t != "" {
					targets++
				}
			}
			if o.database != "" && o.schema == "" {
				targets++
			}
			if targets != 1 || o.database != "" && (o.csv != "" || o.jsonl != "") {
				what := "where should the tables go?"
				if targets > 0 {
					what = "the tables can go to one place only"
				}
				return usage("Name one of --schema NAME, --database URL (with --schema, if you like), --csv DIR and --jsonl DIR.", "%s", what)
			}
			s, l, err := openLog(ctx)
			if err != nil {
				return err
			}
			defer l.Close()
			rev, err := s.resolve(ctx, l, o.at, o.json)
			if err != nil {
				return err
			}
			gap, err := gapUntil(ctx, l, rev.Position)
			if err != nil {
				return err
			}
			var into rebuild.Target
			switch {
			case o.csv != "":
				into = rebuild.Files(rebuild.FilesConfig{Dir: o.csv, Format: rebuild.CSV, Replace: o.replace, Revision: rev})
			case o.jsonl != "":
				into = rebuild.Files(rebuild.FilesConfig{Dir: o.jsonl, Format: rebuild.JSONLines, Replace: o.replace, Revision: rev})
			default:
				url := o.database
				if url == "" {
					url = l.URL()
				}
				into = rebuild.Schema(rebuild.SchemaConfig{URL: url, Schema: o.schema, Replace: o.replace, Revision: rev})
			}
			bar := newProgress()
			rep, err := rebuild.Checkout(ctx, rebuild.Config{Log: l, Revision: rev, Tables: tables, Partial: o.partial, ShapeOfNow: o.shape == "now", Into: into,
				MaxMemoryBytes: o.memory << 20, Workers: o.workers,
				Progress: func(p rebuild.Progress) { bar.update(time.Now(), p.Phase, p.Done, p.Total) }})
			bar.end()
			if gap != nil && (err == nil || errors.Is(err, rebuild.ErrIncomplete)) { // what is missing may be missing for another reason
				lack, err := rebuild.LackingSince(ctx, rebuild.Config{Log: l, Revision: rev, Tables: tables}, gap.Position)
				if err != nil {
					return err
				}
				if len(lack) == 0 {
					gap = nil
				}
			}
			if errors.Is(err, rebuild.ErrIncomplete) && !errors.Is(err, rebuild.ErrLaterGap) && gap != nil {
				before := ""
				rev.Position = gap.Position - 1
				if rebuild.Complete(ctx, rebuild.Config{Log: l, Revision: rev, Tables: tables}) == nil {
					before = fmt.Sprintf(" a revision of before: --at %d,", rev.Position)
				}
				return &eventlog.Problem{Err: fmt.Errorf("the history has a gap at position %d (%s), which is not healed at this revision: %w", gap.Position, member(gap.Data, "reason"), err),
					Hint: fmt.Sprintf("Rows may be missing or out of date. Use --partial all the same,%s or a revision of after it is healed (backstory status).", before)}
			}
			if err != nil {
				return err
			}
			out := openScreen(cmd, false)
			defer out.close()
			if gap != nil && slices.ContainsFunc(rep.Tables, func(t rebuild.TableReport) bool { return t.Incomplete && t.LaterGap == 0 }) {
				rep.Warnings = append(rep.Warnings, fmt.Sprintf("the history has a gap at position %d: rows may be missing or out of date since", gap.Position))
			}
			if o.json {
				return json.NewEncoder(out).Encode(rep)
			}
			for _, t := range rep.Tables {
				fmt.Fprintf(out, "%12s %-4s  %s → %s\n", countText(t.Rows), plural(t.Rows, "row"), t.Table, t.Into)
			}
			for _, w := range rep.Warnings {
				fmt.Fprintf(os.Stderr, "%s %s\n", out.yellow("warning:"), w)
			}
			fmt.Fprintf(out, "%s in %.1f s, as of %s.\n", counted(rep.Events, "event"), rep.Seconds, rev.How)
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&o.at, "at", "", "the moment: a position, an LSN, a time, '12 days ago', yesterday, HEAD")
	f.StringVar(&o.schema, "schema", "", "build the tables in this schema")
	f.StringVar(&o.database, "database", "", "build the tables in this database (URL), each in the schema of its own name, or in --schema")
	f.StringVar(&o.csv, "csv", "", "write a CSV file for each table into this directory")
	f.StringVar(&o.jsonl, "jsonl", "", "write a file of JSON lines for each table into this directory")
	f.StringVar(&o.shape, "shape", "then", "names, columns and keys of the tables: then or now")
	f.BoolVar(&o.partial, "partial", false, "also tables of which the log does not have all rows")
	f.BoolVar(&o.replace, "replace", false, "replace an earlier checkout in the same place")
	f.BoolVar(&o.json, "json", false, "report as one JSON object")
	f.Int64Var(&o.memory, "memory", 128, "memory for rows, in MiB; what does not fit goes through temporary files")
	f.IntVar(&o.workers, "workers", 0, "how many goroutines fold; default: one for each processor")
	return c
}
