package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
)

func newDoctor() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Looks for what would lose data or harm the application, with the SQL that mends it (exit code 3 if there is danger).",
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
			if err := cfg.Capture.WithDefaults().Validate(); err != nil {
				return &exitError{exitUsage, err}
			}
			found, err := backstory.Examine(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			if live := s.askSidecar(cmd.Context()); live != nil && isOurs(cmd.Context(), live, cfg) {
				found = append(found, live.Findings()...)
			}
			out := openScreen(cmd, false)
			defer out.close()
			if asJSON {
				for _, f := range found {
					if err := json.NewEncoder(out).Encode(f); err != nil {
						return err
					}
				}
			} else {
				printFindings(out, found)
			}
			if slices.ContainsFunc(found, func(f capture.Finding) bool { return f.Severity == capture.Danger }) {
				return &exitError{code: exitFound}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "one JSON object per line")
	return c
}

// printFindings prints the worst first, and what they have in common once. What mends them can be copied as it stands.
func printFindings(s *screen, found []capture.Finding) {
	if len(found) == 0 {
		fmt.Fprintln(s, s.green("Nothing found: the source is safe to capture."))
		return
	}
	var sum []string
	for _, sev := range []struct {
		capture.Severity
		label, one string
		paint      func(string) string
	}{{capture.Danger, "danger ", "danger", s.red}, {capture.Warning, "warning", "warning", s.yellow}, {capture.Info, "info   ", "note", s.dim}} {
		n := int64(0)
		for i, f := range found {
			same := func(g capture.Finding) bool {
				return g.Check == f.Check && g.Severity == f.Severity && g.Risk == f.Risk && (g.SQL == "") == (f.SQL == "") && g.Remedy == f.Remedy && g.Cost == f.Cost
			}
			if f.Severity != sev.Severity {
				continue
			}
			n++
			if slices.ContainsFunc(found[:i], same) {
				continue
			}
			var mend []string
			for _, g := range found[i:] {
				if !same(g) {
					continue
				}
				fmt.Fprintf(s, "%s  %s\n", sev.paint(sev.label), s.wrapped(g.What, 9))
				for _, q := range g.Statements() {
					if !slices.Contains(mend, s.cyan(q)) || q == "BEGIN;" || q == "COMMIT;" {
						mend = append(mend, s.cyan(q))
					}
				}
			}
			fmt.Fprintf(s, "         risk: %s\n", s.wrapped(f.Risk, 15))
			if f.Remedy != "" && len(mend) > 0 {
				mend = append(mend, "-- "+f.Remedy)
			} else if f.Remedy != "" {
				mend = append(mend, s.wrapped(f.Remedy, 15))
			}
			if len(mend) > 0 {
				fmt.Fprintf(s, "         mend: %s\n", strings.Join(mend, "\n               "))
			}
			if f.Cost != "" {
				fmt.Fprintf(s, "         cost: %s\n", s.wrapped(f.Cost, 15))
			}
		}
		if n > 0 {
			sum = append(sum, counted(n, sev.one))
		}
	}
	fmt.Fprintf(s, "found    %s\n", strings.Join(sum, ", "))
}
