package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

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
			var all []string
			for _, r := range st.Reactors {
				all = append(all, r.Name)
			}
			names, err := reactors(args, all)
			if err != nil {
				return err
			}
			out := openScreen(cmd, false)
			defer out.close()
			for _, r := range st.Reactors {
				switch {
				case !slices.Contains(names, r.Name):
				case asJSON:
					if err := json.NewEncoder(out).Encode(r); err != nil {
						return err
					}
				default:
					printReactor(out, r)
				}
			}
			if len(names) == 0 && !asJSON {
				fmt.Fprintln(out, "There are no reactors. "+makeReactor)
			}
			return nil
		},
	}
	status.Flags().BoolVar(&asJSON, "json", false, "one JSON object per line")
	c.AddCommand(status,
		newPause("pause", "Lets a reactor, or all of them, rest; the log goes on, and they catch up later.", true),
		newPause("resume", "Lets a reactor, or all of them, go on.", false))
	return c
}

// newPause makes the command that lets reactors rest, or go on. The log keeps what it says, so it needs no running sidecar.
func newPause(verb, short string, paused bool) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   verb + " [NAME]",
		Short: short,
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, l, err := openLog(cmd.Context())
			if err != nil {
				return err
			}
			defer l.Close()
			checkpoints, err := l.Checkpoints(cmd.Context())
			if err != nil {
				return err
			}
			was := map[string]bool{}
			var all []string
			for _, c := range checkpoints {
				was[c.Name], all = c.Paused, append(all, c.Name)
			}
			names, err := reactors(args, all)
			if err != nil {
				return err
			}
			out := openScreen(cmd, false)
			defer out.close()
			for _, name := range names {
				if err := l.PauseCheckpoint(cmd.Context(), name, paused); err != nil {
					return err
				}
				if asJSON {
					if err := json.NewEncoder(out).Encode(pauseReport{name, paused, was[name] != paused}); err != nil {
						return err
					}
					continue
				}
				switch {
				case paused && was[name]:
					fmt.Fprintf(out, "%s was paused already; backstory sink resume %s lets it go on.\n", name, name)
				case paused:
					fmt.Fprintf(out, "%s pauses within a second, after what is on its way; backstory sink resume %s lets it go on.\n", name, name)
				case was[name]:
					fmt.Fprintf(out, "%s goes on.\n", name)
				default:
					fmt.Fprintf(out, "%s was not paused.\n", name)
				}
			}
			if len(names) == 0 && !asJSON {
				fmt.Fprintln(out, "There are no reactors. "+makeReactor)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "one JSON object per line")
	return c
}

// pauseReport is what `sink pause --json` and `sink resume --json` print for each reactor.
type pauseReport struct {
	Name    string `json:"name"`
	Paused  bool   `json:"paused"`
	Changed bool   `json:"changed"` // it was not so before
}

const makeReactor = "backstory run makes them: BACKSTORY_KAFKA_BROKERS and BACKSTORY_KAFKA_TOPIC, or BACKSTORY_JSONL, tell which."

// reactors are those that a command means: the one that it names, otherwise all.
func reactors(args, all []string) ([]string, error) {
	if len(args) == 0 {
		return all, nil
	}
	if slices.Contains(all, args[0]) {
		return args, nil
	}
	hint := "There are: " + strings.Join(all, ", ") + "."
	if near := similar(args[0], all); len(near) > 0 {
		hint = "Did you mean " + strings.Join(near, " or ") + "? " + hint
	}
	if len(all) == 0 {
		hint = "There are none. " + makeReactor
	}
	return nil, &eventlog.Problem{Err: fmt.Errorf("there is no reactor %q", args[0]), Hint: hint}
}

func printReactor(s *screen, r sinks.Status) {
	state := string(r.State)
	if r.Error != "" {
		state = s.red(state)
	}
	fmt.Fprintf(s, "%s  %s: %s, at position %s, ", s.bold("reactor"), r.Name, state, countText(int64(r.Position)))
	if r.LagEvents == 0 {
		fmt.Fprint(s, "caught up")
	} else {
		fmt.Fprintf(s, "%s behind", counted(r.LagEvents, "event"))
	}
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
	if r.State == sinks.StatePaused {
		fmt.Fprintf(s, "         → backstory sink resume %s lets it go on.\n", r.Name)
	}
}
