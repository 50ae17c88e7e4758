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

// printBaseline tells about rows that existed before the history, and about those that are compared with the log.
func printBaseline(s *screen, b *backstory.BaselineStatus, running bool) {
	const indent = "         "
	label := s.bold("baseline") + " "
	progress := func(tables []backstory.TableBaseline, p *backstory.Progress, is, will string) {
		if len(tables) == 0 || p == nil {
			return
		}
		if running {
			fmt.Fprintf(s, label+is+": %.0f %%, %s read", 100*p.Share, counted(p.Rows, "row"))
		} else {
			fmt.Fprintf(s, label+will, 100*p.Share)
		}
		label = indent
		if p.RowsPerSecond > 0 {
			fmt.Fprintf(s, ", %s/s", countText(int64(p.RowsPerSecond)))
		}
		if p.SecondsLeft > 0 {
			fmt.Fprintf(s, ", about %s left", leftText(p.SecondsLeft))
		}
		fmt.Fprintln(s)
		for i, t := range tables {
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
		if n := len(tables); n > 10 {
			fmt.Fprintf(s, indent+"… %s in all\n", counted(int64(n), "table"))
		}
	}
	var taken, compared []backstory.TableBaseline
	told := slices.Concat(b.ToRead, b.ToCompare)
	for _, t := range b.Tables {
		if told = append(told, t.Table); t.Compared {
			compared = append(compared, t)
		} else {
			taken = append(taken, t)
		}
	}
	progress(taken, &b.Progress, "taking over existing rows", "%.0f %% of the existing rows are taken over; backstory run goes on with them")
	progress(compared, b.Comparison, "comparing rows with the log", "%.0f %% of the rows are compared with the log; backstory run goes on with them")
	if n := len(b.ToCompare); n > 0 {
		fmt.Fprintf(s, indent+"%s to be compared with the log:", counted(int64(n), "table")+map[bool]string{true: " is", false: " are"}[n == 1])
		printNames(s, b.ToCompare)
	}
	if n := len(b.ToRead); n > 0 {
		fmt.Fprintf(s, indent+"the rows of %s are to be taken over:", counted(int64(n), "table"))
		printNames(s, b.ToRead)
	}
	if rest := slices.DeleteFunc(slices.Clone(b.Incomplete), func(name string) bool { return slices.Contains(told, name) }); len(rest) > 0 {
		fmt.Fprintf(s, indent+"%s may have had rows before the history, which are known from their next change on:", counted(int64(len(rest)), "table"))
		printNames(s, rest)
	}
	printComparisons(s, slices.DeleteFunc(slices.Clone(b.Comparisons), func(c backstory.TableComparison) bool { return slices.Contains(told, c.Table) }), b.Wanted, running)
}

// printNames ends a line with the first few of some tables.
func printNames(s *screen, names []string) {
	for i, t := range names {
		if i == 5 {
			fmt.Fprintf(s, " … (--json shows all)")
			break
		}
		fmt.Fprintf(s, " %s", t)
	}
	fmt.Fprintln(s)
}

// printComparisons tells when tables are compared of which only inserts are in the stream.
func printComparisons(s *screen, tables []backstory.TableComparison, wanted, running bool) {
	if len(tables) == 0 {
		return
	}
	const indent, shown = "         ", 10
	fmt.Fprintf(s, indent+"only inserts are captured of %s; ", counted(int64(len(tables)), "table"))
	if !wanted {
		fmt.Fprint(s, "what updates and deletes make of their rows is not found, since init --no-baseline:")
		var names []string
		for _, c := range tables {
			names = append(names, c.Table)
		}
		printNames(s, names)
		return
	}
	fmt.Fprintln(s, "what updates and deletes make of their rows is found by comparing them with the log:")
	for i, c := range tables {
		if i == shown {
			fmt.Fprintf(s, indent+"… and %s more (--json shows all)\n", counted(int64(len(tables)-shown), "table"))
			break
		}
		fmt.Fprintf(s, indent+"%-32s %s\n", c.Table, nextComparison(c, running, time.Now()))
	}
}

// nextComparison tells when a table was compared, and when it is next.
func nextComparison(c backstory.TableComparison, running bool, now time.Time) string {
	if c.ReadAt.IsZero() {
		return "not read yet"
	}
	last := "read " + age(c.ReadAt, now)
	left := c.NextAt.Sub(now)
	switch {
	case c.NextAt.IsZero():
		return last + ", not again (BACKSTORY_COMPARE_INTERVAL is 0)"
	case c.Changed != nil && !*c.Changed:
		last += ", again when the source counts an UPDATE or DELETE of it"
		if left > 0 {
			last += ", in " + leftText(left.Seconds()) + " at the earliest"
		}
		return last
	case left > 0:
		return last + ", again in " + leftText(left.Seconds())
	case running:
		return last + ", again now"
	}
	return last + ", again as soon as backstory run is at work"
}
