package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory/eventlog"
)

func newVerify() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "verify",
		Short: "Proves that no event was changed, removed or inserted (exit code 3 if one was).",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, l, err := openLog(cmd.Context())
			if err != nil {
				return err
			}
			defer l.Close()
			bar := newProgress("verifying")
			v, err := l.Verify(cmd.Context(), func(done, total eventlog.Position) { bar.update(int64(done), int64(total)) })
			bar.end()
			if err != nil {
				return err
			}
			out := openScreen(cmd, false)
			defer out.close()
			switch {
			case asJSON:
				if err := json.NewEncoder(out).Encode(v); err != nil {
					return err
				}
			case v.Broken == "":
				fmt.Fprintf(out, "%s  %s events in %s appends, positions 1 to %d\n", out.green("The log is whole."), countText(v.Events), countText(v.Appends), v.Position)
				fmt.Fprintf(out, "Its seal is %s; kept elsewhere, it proves later that nothing before was changed.\n", v.Seal)
			default:
				fmt.Fprintf(out, "%s  at or before position %d: %s.\n", out.red("The log was tampered with or is damaged"), v.At, v.Broken)
				fmt.Fprintf(out, "Everything before that append is as it was sealed. Restore the log from a backup, or read the events around it: backstory log --since %d --limit 20.\n", max(0, v.At-10))
			}
			if v.Broken != "" {
				return &exitError{code: exitFound}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "as one JSON object")
	return c
}
