package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/rules"
)

func newRulesTest() *cobra.Command {
	var last int
	var asJSON bool
	c := &cobra.Command{
		Use:   "test",
		Short: "Tells what the last row changes in the log would become by the rules as they are now, and whether rows come back.",
		Long: "Tells what the last row changes in the log would become by the file of BACKSTORY_CONFIG, or backstory.yaml, as it is now: how many events of each type,\n" +
			"which columns no rule takes, which rules never make an event, and which fail. And it proves that each row comes back from them. Nothing is written.\n" +
			"Exit codes: 0, or 3 if a rule failed or a row would not come back.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if last < 1 {
				return usage("The default is 1000.", "--last has to be more than 0")
			}
			s, l, err := openLog(cmd.Context())
			if err != nil {
				return err
			}
			defer l.Close()
			name := s.rulesFile()
			f, err := readRules(name, true)
			if err != nil {
				return err
			}
			captured, err := l.Captured(cmd.Context())
			if err != nil {
				return err
			}
			if _, err := f.Check(eventlog.RelationsOf(captured)); err != nil {
				return &exitError{exitFound, fmt.Errorf("%s does not fit the tables:\n%w", name, err)}
			}
			out := openScreen(cmd, false)
			defer out.close()
			bar := newProgress()
			r, err := tryRules(cmd.Context(), l, f, last, func(done, total int) { bar.update(time.Now(), "typing row changes", int64(done), int64(total)) })
			bar.end()
			if err != nil {
				return err
			}
			if asJSON {
				err = json.NewEncoder(out).Encode(r)
			} else {
				r.print(out, name)
			}
			if err == nil && (len(r.Failed) > 0 || r.Lost != "") {
				return &exitError{code: exitFound}
			}
			return err
		},
	}
	c.Flags().IntVar(&last, "last", 1000, "how many row changes")
	c.Flags().BoolVar(&asJSON, "json", false, "as one JSON object")
	return c
}

// trial is what rules make of some row changes.
type trial struct {
	Changes int                       `json:"changes"`
	Types   map[string]int            `json:"types"`
	Quiet   map[string]bool           `json:"-"`
	Columns map[string]map[string]int `json:"no_rule"` // by type of the default event: how often a column was in one
	Never   []string                  `json:"never"`
	Failed  map[string]int            `json:"failed"`         // by rule and error
	Lost    string                    `json:"lost,omitempty"` // the first change from whose events the row does not come back
}

// tryRules types the last row changes of a log by rules.
func tryRules(ctx context.Context, l *eventlog.Log, f *rules.File, last int, progress func(done, total int)) (*trial, error) {
	r := &trial{Types: map[string]int{}, Quiet: map[string]bool{}, Columns: map[string]map[string]int{}, Failed: map[string]int{}}
	var changes []*eventlog.Event // the first of each
	errEnd := errors.New("enough")
	sel := eventlog.Selection{Ops: []eventlog.Op{eventlog.OpInsert, eventlog.OpUpdate, eventlog.OpDelete}, Quiet: true, Newest: true, NoMetadata: true}
	if err := l.Read(ctx, sel, func(e *eventlog.Event) error {
		if e.Part > 0 || strings.HasSuffix(e.Type, "Healed") {
			return nil
		}
		if changes = append(changes, e.Clone()); len(changes) == last {
			return errEnd
		}
		return nil
	}); err != nil && !errors.Is(err, errEnd) {
		return nil, err
	}
	slices.Reverse(changes)
	versions := map[int]*eventlog.TableRules{}
	for i, e := range changes {
		if i%50 == 0 {
			progress(i, len(changes))
		}
		before, after, err := rowsAround(ctx, l, e)
		if err != nil {
			return nil, err
		}
		of, ok := versions[e.SchemaVersion]
		if !ok {
			of = f.Table(e.Relation)
			versions[e.SchemaVersion] = of
		}
		c := eventlog.RowChangeOf(e.Relation, e.Op, before, after)
		told, err := eventlog.Tell(e.Relation, of, c)
		if err != nil {
			return nil, err
		}
		if text := c.Failure(); text != "" {
			r.Failed[text]++
		}
		r.count(e, c, told)
	}
	r.Changes = len(changes)
	for _, name := range f.Names() {
		if r.Types[name] == 0 {
			r.Never = append(r.Never, name)
		}
	}
	return r, nil
}

// count counts the events of a change, and makes sure that they tell all that became of the row.
func (r *trial) count(e *eventlog.Event, c *eventlog.RowChange, told []eventlog.Told) {
	have := make([]bool, len(e.Relation.Columns))
	for _, t := range told {
		r.Types[t.Type]++
		r.Quiet[t.Type] = t.Quiet
		for i, has := range t.Columns {
			have[i] = have[i] || has && !t.Restates
			if has && e.Op == eventlog.OpUpdate && (strings.HasSuffix(t.Type, "Updated") || t.Quiet) {
				if r.Columns[t.Type] == nil {
					r.Columns[t.Type] = map[string]int{}
				}
				r.Columns[t.Type][e.Relation.Columns[i].Name]++
			}
		}
	}
	for i := range have {
		if want := e.Op != eventlog.OpUpdate || c.Changed[i]; want != have[i] && r.Lost == "" {
			r.Lost = fmt.Sprintf("event %d, %s of %s: %s", e.Position, e.Op, rowName(e), e.Relation.Columns[i].Name)
		}
	}
}

func (r *trial) print(s *screen, name string) {
	fmt.Fprintf(s, "the last %s by %s\n", counted(int64(r.Changes), "row change"), name)
	types := slices.Collect(maps.Keys(r.Types))
	slices.SortFunc(types, func(a, b string) int { return cmp.Or(r.Types[b]-r.Types[a], strings.Compare(a, b)) })
	width := 0
	for _, t := range types {
		width = max(width, len(t))
	}
	for _, t := range types {
		line := fmt.Sprintf("  %-*s  %7d", width, t, r.Types[t])
		if columns := r.Columns[t]; len(columns) > 0 {
			names := slices.Collect(maps.Keys(columns))
			slices.SortFunc(names, func(a, b string) int { return cmp.Or(columns[b]-columns[a], strings.Compare(a, b)) })
			for i, n := range names {
				names[i] = fmt.Sprintf("%s %d", n, columns[n])
			}
			what := "no rule takes"
			if r.Quiet[t] {
				what = "quiet"
			}
			line += s.dim("  " + what + ": " + strings.Join(names, ", "))
		}
		fmt.Fprintln(s, line)
	}
	if len(r.Never) > 0 {
		fmt.Fprintf(s, "%s %s\n", s.yellow("never   "), strings.Join(r.Never, ", "))
	}
	for _, text := range slices.Sorted(maps.Keys(r.Failed)) {
		fmt.Fprintf(s, "%s %d × %s\n", s.red("failed  "), r.Failed[text], text)
	}
	if r.Lost != "" {
		fmt.Fprintf(s, "%s %s: that is a bug\n", s.red("lost    "), r.Lost)
	} else {
		fmt.Fprintln(s, s.green("Every row comes back from these events."))
	}
}
