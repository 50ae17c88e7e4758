package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
)

func newSink() *cobra.Command {
	c := &cobra.Command{Use: "sink", Short: "The reactors: status, pause, resume.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usage("Say which: status, pause or resume.", "sink does nothing by itself")
		}}
	var asJSON bool
	status := &cobra.Command{
		Use:   "status [NAME]",
		Short: "How far each reactor is, and why it does not get on.",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := readSettings()
			if err != nil {
				return err
			}
			st, err := s.status(cmd.Context())
			if err != nil {
				return err
			}
			out := openScreen(cmd, false)
			defer out.close()
			n := 0
			for _, r := range st.Reactors {
				if len(args) == 1 && r.Name != args[0] {
					continue
				}
				n++
				if asJSON {
					if err := json.NewEncoder(out).Encode(r); err != nil {
						return err
					}
					continue
				}
				printReactor(out, r)
			}
			if n == 0 && len(args) == 1 {
				return &eventlog.Problem{Err: fmt.Errorf("there is no reactor %s", args[0]), Hint: "backstory sink status shows all."}
			}
			if n == 0 && !asJSON {
				fmt.Fprintln(out, "There are no reactors. BACKSTORY_KAFKA_BROKERS and BACKSTORY_KAFKA_TOPIC, or BACKSTORY_JSONL, make one.")
			}
			return nil
		},
	}
	status.Flags().BoolVar(&asJSON, "json", false, "one JSON object per line")
	pause := func(use, short, done string, paused bool) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				_, l, err := openLog(cmd.Context())
				if err != nil {
					return err
				}
				defer l.Close()
				if err := l.PauseCheckpoint(cmd.Context(), args[0], paused); err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", args[0], done)
				return nil
			}}
	}
	c.AddCommand(status,
		pause("pause NAME", "Lets a reactor rest; the log goes on, and it catches up later.", "rests; backstory sink resume lets it go on", true),
		pause("resume NAME", "Lets a reactor go on.", "goes on", false))
	return c
}

func printReactor(s *screen, r sinks.Status) {
	state := string(r.State)
	if r.Error != "" {
		state = s.red(state)
	}
	fmt.Fprintf(s, "%s  %s: %s, at position %s, %s events behind", s.bold("reactor"), r.Name, state, countText(int64(r.Position)), countText(r.LagEvents))
	if r.LagSeconds >= 1 {
		fmt.Fprintf(s, " (%.0f s)", r.LagSeconds)
	}
	fmt.Fprintln(s)
	if r.Error != "" {
		fmt.Fprintf(s, "         %s\n", s.red(r.Error))
		if r.Hint != "" {
			fmt.Fprintf(s, "         → %s\n", r.Hint)
		}
	}
}
