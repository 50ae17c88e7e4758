package main

import (
	"encoding/json"
	"fmt"
	"time"

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
			bar := newProgress()
			v, err := l.Verify(cmd.Context(), func(done, total eventlog.Position) { bar.update(time.Now(), "verifying", int64(done), int64(total)) })
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
				fmt.Fprintf(out, "%s  %s in %s", out.green("The log is whole."), counted(v.Events, "event"), counted(v.Appends, "append"))
				if v.Events > 0 {
					fmt.Fprintf(out, ", positions 1 to %d", v.Position)
				}
				fmt.Fprintln(out)
				fmt.Fprintf(out, "Its seal is %s; kept elsewhere, it proves later that nothing before was changed.\n", v.Seal)
			default:
				fmt.Fprintf(out, "%s, at or before position %d: %s.\n", out.red("The log was tampered with or is damaged"), v.At, v.Broken)
				if v.Appends > 0 {
					fmt.Fprintln(out, "Everything before that append is as it was sealed.")
				}
				fmt.Fprintf(out, "Restore the log from a backup, or look at the events before it: backstory log --quiet --until %d --limit 20\n", max(1, v.At))
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
