package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory/capture"
)

func newDoctor() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Looks for what would lose data or harm the application, with the SQL that mends it (exit code 3 if there is any).",
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
			cfg := s.config(log).Capture.WithDefaults()
			if err := cfg.Validate(); err != nil {
				return &exitError{exitUsage, err}
			}
			found, err := capture.Examine(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			out := openScreen(cmd, false)
			defer out.close()
			danger := 0
			for _, f := range found {
				if f.Severity == capture.Danger {
					danger++
				}
				if asJSON {
					if err := json.NewEncoder(out).Encode(f); err != nil {
						return err
					}
					continue
				}
				sev := map[capture.Severity]string{capture.Danger: out.red("danger "), capture.Warning: out.yellow("warning"), capture.Info: out.dim("info   ")}[f.Severity]
				fmt.Fprintf(out, "%s  %s\n         risk: %s\n", sev, f.What, f.Risk)
				if f.SQL != "" {
					fmt.Fprintf(out, "         mend: %s\n", f.SQL)
				}
				if f.Cost != "" {
					fmt.Fprintf(out, "         cost: %s\n", f.Cost)
				}
			}
			if len(found) == 0 && !asJSON {
				fmt.Fprintln(out, out.green("Nothing found: the source is safe to capture."))
			}
			if danger > 0 {
				return &exitError{code: exitFound}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "one JSON object per line")
	return c
}
