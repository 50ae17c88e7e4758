package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/rebuild"
)

func newShow() *cobra.Command {
	var o struct {
		json bool
		at   string
	}
	c := &cobra.Command{
		Use:   "show POSITION|ID|ENTITY",
		Short: "An event in full, or an entity (orders/17) as it is or was (--at).",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if err := notEmpty(cmd, "at"); err != nil {
				return err
			}
			s, l, err := openLog(ctx)
			if err != nil {
				return err
			}
			defer l.Close()
			out := openScreen(cmd, false)
			defer out.close()
			what := args[0]
			e, err := namedEvent(ctx, l, what)
			if err != nil {
				return err
			}
			if e != nil {
				if o.at != "" {
					return usage("Leave it out, or name an entity such as orders/17.", "--at goes with an entity; %s is an event", what)
				}
				if o.json {
					_, err := out.Write(append(e.AppendJSON(nil), '\n'))
					return err
				}
				printEvent(out, e)
				return nil
			}
			if !strings.Contains(what, "/") {
				return usage("Use a position (1234), an event's id, or an entity (orders/17).", "%q names no event and no entity", what)
			}
			ent, err := l.Entity(ctx, what)
			if err != nil {
				return err
			}
			at := o.at
			if at == "" {
				at = "HEAD"
			}
			rev, err := s.resolve(ctx, l, at, o.json || o.at == "")
			if err != nil && !(o.at == "" && errors.Is(err, eventlog.ErrBeforeHistory)) {
				return err
			}
			pos := rev.Position
			st, err := rebuild.Entity(ctx, l, ent, pos)
			if err != nil {
				return err
			}
			name := ent.Aggregate + "/" + ent.ID
			perhaps := "the row may be outdated, or gone"
			if st.Row == nil {
				perhaps = "the row may be there all the same"
			}
			if g := st.Gap; g != nil && g.Position > pos {
				fmt.Fprintf(os.Stderr, "%s the history has a gap (event %d: %s) that begins before this position, at %s: %s\n",
					out.yellow("warning:"), g.Position, printable(g.Reason), g.From, perhaps)
			} else if g != nil {
				fmt.Fprintf(os.Stderr, "%s the history has a gap at position %d (%s), which is not healed at this position: %s\n",
					out.yellow("warning:"), g.Position, printable(g.Reason), perhaps)
			}
			if len(st.AlsoIn) > 0 {
				fmt.Fprintf(os.Stderr, "%s %s is the key of another row, too: in %s. This one was changed last\n", out.yellow("warning:"), name, strings.Join(st.AlsoIn, ", "))
			}
			if st.Row == nil {
				if st.Last == nil {
					hint := "backstory log " + ent.Aggregate + " shows what it knows of others."
					r, err := tableAt(ctx, l, ent.Table, pos)
					if err != nil {
						return err
					}
					switch {
					case r != nil && len(r.Key) == 0:
						hint += " Its table has no key: its rows have no id but a hash of their values, which is shown there."
					case ent.Table == "" || rebuild.Complete(ctx, rebuild.Config{Log: l, Revision: rev, Tables: []string{ent.Table}}) != nil: // the log may lack it
						hint += " A row from before the history is known from its next change on."
					}
					return &eventlog.Problem{Err: fmt.Errorf("the log knows nothing of %s at position %d", name, pos), Hint: hint}
				}
				if k := st.Rekeyed; k != nil {
					now := "it has none any more"
					if len(k.Key) > 0 {
						var names []string
						for _, c := range k.Key {
							names = append(names, k.Columns[c].Name)
						}
						now = "it is (" + strings.Join(names, ", ") + ")"
					}
					return &eventlog.Problem{Err: fmt.Errorf("whether %s was there at position %d cannot be told by this key: its table had another one from position %d on; %s", name, pos, st.From, now),
						Hint: fmt.Sprintf("backstory show %s --at %d shows it as it was until then.", name, st.From-1)}
				}
				if st.Became != "" {
					return &eventlog.Problem{Err: fmt.Errorf("%s was not there at position %d: its table had become %s, or a part of that", name, pos, st.Became),
						Hint: "backstory show " + st.Became + "/" + ent.ID + " shows it."}
				}
				if st.Last.PreviousKey == ent.ID && st.Last.Key != ent.ID {
					return &eventlog.Problem{Err: fmt.Errorf("%s was not there at position %d: its key became %s%s", name, pos, st.Last.Key, byAndAt(st.Last)),
						Hint: "backstory show " + rowName(st.Last) + " shows it."}
				}
				hint := fmt.Sprintf("backstory show %s --at %d shows it just before.", name, st.Last.Position-1)
				if st.Last.Op == eventlog.OpDelete { // of which that may be the first that the log knows
					hint = fmt.Sprintf("backstory show %d shows what it was.", st.Last.Position)
				}
				return &eventlog.Problem{Err: fmt.Errorf("%s was not there at position %d: %s%s", name, pos, st.Last.Type, byAndAt(st.Last)), Hint: hint}
			}
			if o.json {
				b := eventlog.AppendString([]byte(`{"aggregate":`), []byte(ent.Aggregate))
				b = eventlog.AppendString(append(b, `,"aggregate_id":`...), []byte(ent.ID))
				b = fmt.Appendf(b, `,"position":%d,"row":%s`, pos, oneLine(st.Row))
				if g := st.Gap; g != nil {
					b = eventlog.AppendString(fmt.Appendf(b, `,"gap":{"position":%d,"from_lsn":"%s","reason":`, g.Position, g.From), []byte(g.Reason))
					b = append(b, '}')
				}
				for i, table := range st.AlsoIn {
					b = eventlog.AppendString(append(b, []string{`,"also_in":[`, `,`}[min(i, 1)]...), []byte(table))
				}
				if len(st.AlsoIn) > 0 {
					b = append(b, ']')
				}
				_, err := out.Write(append(b, "}\n"...))
				return err
			}
			fmt.Fprintf(out, "%s as of position %d, last changed %s", out.bold(name), pos, age(st.Last.OccurredAt, time.Now()))
			if w := eventlog.WhoOf(st.Last.Metadata); w.Actor != "" {
				fmt.Fprintf(out, " by %s", out.cyan(printable(w.Actor)))
			}
			fmt.Fprintf(out, " (%s)\n", st.Last.Type)
			printObject(out, st.Row, st.Last.Data)
			return nil
		},
	}
	c.Flags().BoolVar(&o.json, "json", false, "as one JSON object")
	c.Flags().StringVar(&o.at, "at", "", "the moment: a position, an LSN, a time, '12 days ago', yesterday")
	return c
}

// namedEvent finds the event that a person names by its position or its id; nil: the text is neither.
func namedEvent(ctx context.Context, l *eventlog.Log, what string) (*eventlog.Event, error) {
	if id, err := eventlog.ParseID(what); err == nil {
		return l.Find(ctx, id)
	}
	n, err := strconv.ParseInt(what, 10, 64)
	switch {
	case err != nil:
		return nil, nil
	case n < 1:
		return nil, usage("Positions begin with 1; backstory log shows them.", "there is no event at position %d", n)
	}
	return l.Get(ctx, eventlog.Position(n))
}

// rowName is the name by which a person calls the row that an event is about.
func rowName(e *eventlog.Event) string {
	if e.Owned {
		return e.Relation.String() + "/" + e.Key
	}
	return e.Entity()
}

// byAndAt says by whom an event was, if that is known, and when.
func byAndAt(e *eventlog.Event) string {
	at := " at " + e.OccurredAt.UTC().Format(time.RFC3339)
	if w := eventlog.WhoOf(e.Metadata); w.Actor != "" {
		return " by " + printable(w.Actor) + at
	}
	return at
}

func oneLine(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\r' {
			return ' '
		}
		return r
	}, string(b))
}

// printEvent shows an event in full.
func printEvent(s *screen, e *eventlog.Event) {
	fmt.Fprintf(s, "%s  %s  %s\n", s.yellow(fmt.Sprintf("event %d", e.Position)), s.bold(e.Type), printable(entityName(e)))
	line := func(k, v string) {
		if v != "" {
			fmt.Fprintf(s, "%-12s %s\n", k, v)
		}
	}
	w := eventlog.WhoOf(e.Metadata)
	line("id", e.ID.String())
	line("when", e.OccurredAt.UTC().Format(time.RFC3339Nano)+" ("+age(e.OccurredAt, time.Now())+")")
	line("who", w.Actor)
	line("why", w.Reason)
	line("request", w.Request)
	switch {
	case e.Relation == nil:
	case e.Op == eventlog.OpTruncate:
		line("table", e.Relation.String()+", all rows")
	case !e.Op.OfRow() && e.AggregateID == "":
		line("table", e.Relation.String())
	default:
		line("row", e.Relation.String()+" "+printable(e.Key))
	}
	line("was", e.PreviousID)
	line("transaction", fmt.Sprintf("%d at %s, change %d", e.XID, e.CommitLSN, e.Change))
	if len(e.Metadata) > 0 {
		line("metadata", oneLine(e.Metadata))
	}
	if member(e.Metadata, "first_seen") != nil {
		line("note", "the log had not seen this row before: what it was until then is not known")
	}
	if e.Op == eventlog.OpGap {
		line("note", "its time is that of the commit before it, since what is missing may be as old; found_at is when it was found")
	}
	if e.Op == eventlog.OpTruncate {
		return
	}
	if rule := member(e.Metadata, "rule_error"); rule != nil {
		line("rule failed", oneLine(rule))
	}
	if e.Restates {
		line("note", "what it says of the row, another event of the same row change says too")
	}
	defer func() {
		if len(e.Extra) > 0 {
			fmt.Fprintln(s, s.dim("Added by the rules:"))
			printObject(s, e.Extra, nil)
		}
	}()
	fmt.Fprintln(s)
	if e.Op == eventlog.OpUpdate {
		_ = eventlog.EachMember(e.Data, func(name, value []byte) error {
			old := member(e.Before, string(name))
			if old == nil {
				old = []byte("(not known)")
			}
			fmt.Fprintf(s, "  %s\n    %s\n    %s\n", name, s.red("- "+oneLine(old)), s.green("+ "+oneLine(value)))
			return nil
		})
		return
	}
	obj := e.Data
	if e.Op == eventlog.OpDelete {
		obj = e.Before
		fmt.Fprintln(s, s.dim("What the row was:"))
	}
	printObject(s, obj, nil)
}

// printObject prints a JSON object member by member; those that are in fresh too are marked.
func printObject(s *screen, obj, fresh []byte) {
	width := 0
	_ = eventlog.EachMember(obj, func(name, _ []byte) error { width = max(width, len(name)); return nil })
	_ = eventlog.EachMember(obj, func(name, value []byte) error {
		v := oneLine(value)
		if member(fresh, string(name)) != nil {
			v = s.green(v)
		}
		fmt.Fprintf(s, "  %-*s  %s\n", width, name, v)
		return nil
	})
}

// tableAt is the version that a table of a name had at a position; nil: the log has none.
func tableAt(ctx context.Context, l *eventlog.Log, table string, pos eventlog.Position) (r *eventlog.Relation, err error) {
	versions, err := l.Relations(ctx)
	for _, v := range versions { // oldest first
		if v.String() == table && v.AtPosition <= pos {
			r = v.Relation
		}
	}
	return r, err
}
