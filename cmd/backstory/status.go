package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/eventlog"
)

func newStatus() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "status",
		Short: "What each part is doing, and how far behind (exit code 3 if capture is stopped at a gap).",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
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
			if asJSON {
				if err := json.NewEncoder(out).Encode(st); err != nil {
					return err
				}
			} else {
				printStatus(out, st)
			}
			if st.Log.Gap != "" || st.Source.Hint == eventlog.GapHint { // it does not go on by itself
				return &exitError{code: exitFound}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "as one JSON object")
	return c
}

// status asks the log and the source, and the running sidecar for what only it knows.
func (s *settings) status(ctx context.Context) (*backstory.Status, error) {
	log, err := s.logger()
	if err != nil {
		return nil, err
	}
	cfg := s.config(log)
	if cfg.Capture.URL == "" && cfg.Log.URL == "" {
		return nil, usage("Set BACKSTORY_SOURCE_URL.", "no database is named")
	}
	live := s.askSidecar(ctx)
	if live == nil {
		return backstory.ReadStatus(ctx, cfg)
	}
	if isOurs(ctx, live, cfg) { // it knows most, also why the log cannot be read, and what it does about it
		return live, nil
	}
	st, err := backstory.ReadStatus(ctx, cfg)
	if err != nil {
		fmt.Fprintf(os.Stderr, "The sidecar at %s is another one: it captures %s into %s.\n", s.HTTPAddr, live.Source.Address, live.Log.Address)
	}
	return st, err
}

// isOurs tells whether a sidecar is the one for what is named here. The same database may be called by another name.
func isOurs(ctx context.Context, live *backstory.Status, cfg backstory.Config) bool {
	logURL := cmp.Or(cfg.Log.URL, cfg.Capture.URL)
	return live.Source.Slot == cfg.Capture.WithDefaults().Slot && live.Log.Address == eventlog.Address(logURL) &&
		(cfg.Capture.URL == "" || live.Source.Address == eventlog.Address(cfg.Capture.URL)) || isOf(ctx, live, logURL)
}

// isOf tells whether a status is that of a log which can be read.
func isOf(ctx context.Context, st *backstory.Status, logURL string) bool {
	l, err := eventlog.Open(ctx, eventlog.Config{URL: logURL})
	if err != nil {
		return false
	}
	defer l.Close()
	h, err := l.Head(ctx)
	return err == nil && st.Source.Slot == h.Slot && st.Source.SystemID == h.SystemID && st.Source.Database == h.Database
}

// askSidecar gives the status of a sidecar on this machine, nil if none answers.
func (s *settings) askSidecar(ctx context.Context) *backstory.Status {
	if s.HTTPAddr == "off" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 12*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.HTTPAddr+"/api/v1/status", nil)
	if err != nil {
		return nil
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil
	}
	defer resp.Body.Close()
	var st backstory.Status
	if resp.StatusCode != http.StatusOK || json.NewDecoder(resp.Body).Decode(&st) != nil {
		return nil
	}
	return &st
}

func printStatus(s *screen, st *backstory.Status) {
	now := time.Now()
	state := st.Source.State
	switch state {
	case "stopped":
		state = "no sidecar runs" // it is not the source that is stopped
	case "unknown":
		state = "not asked"
	}
	switch {
	case st.Source.Error != "":
		state = s.red(state)
	case state == "streaming":
		state = s.green(state)
	}
	fmt.Fprintf(s, "%s   %s", s.bold("source"), state)
	if !st.Source.Since.IsZero() {
		fmt.Fprintf(s, " for %s", strings.TrimSuffix(age(st.Source.Since, now), " ago"))
	}
	switch {
	case st.Source.WALLSN == "": // the source or the log cannot be asked
	case st.CaughtUp:
		fmt.Fprint(s, ", caught up")
	case st.Log.Gap != "":
		fmt.Fprint(s, ", stopped at a gap")
	case st.Source.WALStatus == "" && st.Source.LagBytes == 0: // there is no slot, as is said below
	default:
		fmt.Fprintf(s, ", %s behind", bytesText(st.Source.LagBytes))
		if st.Source.LagSeconds > 1 {
			fmt.Fprintf(s, " (%.0f s)", st.Source.LagSeconds)
		}
	}
	fmt.Fprintln(s)
	if st.Source.Error != "" {
		fmt.Fprintf(s, "         %s\n", s.red(st.Source.Error))
		if st.Source.Hint != "" {
			fmt.Fprintf(s, "         → %s\n", seen(st.Source.Hint))
		}
	}
	if st.Source.State == "stopped" && st.Source.Error == "" && st.Log.Gap == "" {
		fmt.Fprintln(s, "         → backstory run starts one.")
	}
	if st.Source.State == "unknown" {
		fmt.Fprintf(s, "         → BACKSTORY_SOURCE_URL, with the URL of database %s, lets it be asked.\n", st.Source.Database)
	}
	if st.Source.WALLSN != "" {
		slot, keeps := st.Source.Slot, "source"
		if st.Source.Standby != "" {
			slot, keeps = slot+" on standby "+st.Source.Standby, "standby"
		}
		fmt.Fprintf(s, "         %s, slot %s: received %s, ", st.Source.Address, slot, st.Source.ReceivedLSN)
		if st.Source.WALStatus == "" { // no slot
			fmt.Fprintf(s, "the WAL ends at %s\n", st.Source.WALLSN)
		} else {
			fmt.Fprintf(s, "confirmed %s, the WAL ends at %s; the %s keeps %s for us", st.Source.ConfirmedLSN, st.Source.WALLSN, keeps, bytesText(st.Source.RetainedBytes))
			if st.Source.SafeBytes >= 0 {
				fmt.Fprintf(s, " and may keep %s more", bytesText(st.Source.SafeBytes))
			}
			fmt.Fprintln(s)
			for _, why := range st.Source.HeldBack {
				fmt.Fprintf(s, "         %s\n", s.yellow(why))
			}
		}
	}
	if len(st.Source.Refused) > 0 {
		fmt.Fprintf(s, "         %s: %s\n", s.red("Postgres refuses the application's UPDATEs and DELETEs of published tables"), strings.Join(st.Source.Refused, "; "))
		fmt.Fprint(s, "         → A sidecar that runs, and may, mends this by itself; backstory doctor has the SQL.\n")
	}
	if len(st.Source.KeyLost) > 0 {
		fmt.Fprintf(s, "         %s: %s\n", s.yellow("only inserts are captured, since it has lost its key"), strings.Join(st.Source.KeyLost, ", "))
		fmt.Fprint(s, "         → Once it has one again, backstory init has updates and deletes captured; init --replica-identity-full does without.\n")
	}
	without := slices.DeleteFunc(slices.Clone(st.Source.NotCaptured), func(t string) bool { return slices.Contains(st.Source.InsertsOnly, t) })
	for _, l := range []struct {
		what   string
		tables []string
	}{{s.red("not captured"), without}, {s.yellow("only inserts are captured, through the schema"), st.Source.InsertsOnly}} {
		n := len(l.tables)
		if n == 0 {
			continue
		}
		fmt.Fprintf(s, "         %s: %s", l.what, strings.Join(l.tables[:min(n, 10)], ", "))
		if n > 10 {
			fmt.Fprintf(s, " and %d more", n-10)
		}
		fmt.Fprint(s, "\n         → backstory init takes them in, or says what has to be run for that; BACKSTORY_EXCLUDE leaves them out.\n")
	}
	if st.Log.Error != "" {
		fmt.Fprintf(s, "%s      %s", s.bold("log"), s.red("cannot be read now"))
	} else {
		fmt.Fprintf(s, "%s      %s", s.bold("log"), counted(int64(st.Log.Position), "event"))
	}
	if !st.Log.OccurredAt.IsZero() {
		fmt.Fprintf(s, ", the last one %s", age(st.Log.OccurredAt, now))
	}
	if st.Log.SizeBytes > 0 {
		fmt.Fprintf(s, "; %s on disk", bytesText(st.Log.SizeBytes))
	}
	if st.Log.GrowthBytesPerDay > 0 {
		fmt.Fprintf(s, ", %s of it from the last 24 hours", bytesText(st.Log.GrowthBytesPerDay))
	}
	fmt.Fprintln(s)
	if st.Log.Address != st.Source.Address {
		fmt.Fprintf(s, "         %s\n", st.Log.Address)
	}
	if st.Log.Error != "" {
		fmt.Fprintf(s, "         %s\n", s.red(st.Log.Error))
		if st.Log.Hint != "" {
			fmt.Fprintf(s, "         → %s\n", st.Log.Hint)
		}
	}
	if st.Log.Gap != "" {
		fmt.Fprintf(s, "         %s\n         → %s\n", s.red("gap: "+st.Log.Gap), seen(eventlog.GapHint))
	}
	if st.Running && st.Log.Events > 0 {
		fmt.Fprintf(s, "         since the start: %s", counted(st.Log.Events, "event"))
		if n := st.Log.ApplicationEvents; n > 0 {
			if n < st.Log.Events {
				fmt.Fprintf(s, "; %s of the application", counted(n, "event"))
			}
			fmt.Fprintf(s, ", %.0f %% without who and why", 100*st.Log.UnattributedShare)
		}
		fmt.Fprintln(s)
	}
	for _, p := range backstory.ContextProblems(st.Log.MalformedContext, st.Log.IgnoredContext) {
		fmt.Fprintf(s, "         %s\n         → %s\n", s.yellow("since the start: "+p.Error()), p.Hint)
	}
	printBaseline(s, &st.Baseline, st.Running)
	for _, r := range st.Reactors {
		printReactor(s, r)
	}
}

// seen is a hint without the advice to look where it is printed.
func seen(hint string) string {
	return strings.Replace(hint, "See backstory status and ", "See ", 1)
}

// printBaseline tells about rows that existed before the history.
func printBaseline(s *screen, b *backstory.BaselineStatus, running bool) {
	const indent = "         "
	list := func(names []string) {
		for i, t := range names {
			if i == 5 {
				fmt.Fprintf(s, " … (--json shows all)")
				break
			}
			fmt.Fprintf(s, " %s", t)
		}
		fmt.Fprintln(s)
	}
	rest := slices.DeleteFunc(slices.Clone(b.Incomplete), func(name string) bool { return slices.Contains(b.ToRead, name) || slices.Contains(b.ToCompare, name) })
	if n := len(b.Tables); n > 0 {
		if running {
			fmt.Fprintf(s, "%s taking over existing rows: %.0f %%, %s read", s.bold("baseline"), 100*b.Share, counted(b.Rows, "row"))
		} else {
			fmt.Fprintf(s, "%s %.0f %% of the existing rows are taken over; backstory run goes on with them", s.bold("baseline"), 100*b.Share)
		}
		if b.RowsPerSecond > 0 {
			fmt.Fprintf(s, ", %s/s", countText(int64(b.RowsPerSecond)))
		}
		if b.SecondsLeft > 0 {
			fmt.Fprintf(s, ", about %s left", leftText(b.SecondsLeft))
		}
		fmt.Fprintln(s)
		for i, t := range b.Tables {
			rest = slices.DeleteFunc(rest, func(name string) bool { return name == t.Table })
			if i >= 10 && t.Error == "" && len(t.WaitingFor) == 0 {
				continue
			}
			fmt.Fprintf(s, indent+"%-32s %-11s %12s of about %s\n", t.Table, t.State, countText(t.Rows), counted(t.TotalRows, "row"))
			if len(t.WaitingFor) > 0 {
				fmt.Fprintf(s, indent+"  waits for the transactions that were open when it was taken in or altered: %s\n", strings.Join(t.WaitingFor, "; "))
			}
			if t.Error != "" {
				fmt.Fprintf(s, indent+"  %s\n", s.red(t.Error))
				if t.Hint != "" {
					fmt.Fprintf(s, indent+"  → %s\n", t.Hint)
				}
			}
		}
		if n > 10 {
			fmt.Fprintf(s, indent+"… %s in all\n", counted(int64(n), "table"))
		}
	}
	if n := len(b.ToCompare); n > 0 {
		fmt.Fprintf(s, indent+"%s to be compared with the log:", counted(int64(n), "table")+map[bool]string{true: " is", false: " are"}[n == 1])
		list(b.ToCompare)
	}
	if n := len(b.ToRead); n > 0 {
		fmt.Fprintf(s, indent+"the rows of %s are to be taken over:", counted(int64(n), "table"))
		list(b.ToRead)
	}
	if n := len(rest); n > 0 {
		fmt.Fprintf(s, indent+"%s may have had rows before the history, which are known from their next change on:", counted(int64(n), "table"))
		list(rest)
	}
}
