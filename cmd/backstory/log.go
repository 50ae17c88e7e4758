package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory/eventlog"
)

var errEnough = errors.New("enough")

func newLog() *cobra.Command {
	var o struct {
		json, quiet, reverse, noPager bool
		since, until, author          string
		date                          string
		types                         []string
		limit                         int
	}
	c := &cobra.Command{
		Use:   "log [ENTITY]",
		Short: "What happened: one line per event, newest first. ENTITY is orders/17 or Order/17, or orders for the whole table.",
		Long: "What happened: one line per event, newest first. ENTITY is orders/17 or Order/17, or orders for the whole table.\n" +
			"Times are those of commits. A gap (…Gap) has that of the commit before it, also for --since and --until, and says when it was found.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if o.limit < 0 {
				return usage("", "--limit must not be negative")
			}
			if o.date != "relative" && o.date != "iso" {
				return usage("Use relative or iso.", "--date cannot be %q", o.date)
			}
			if err := notEmpty(cmd, "since", "until", "author", "type"); err != nil {
				return err
			}
			s, l, err := openLog(ctx)
			if err != nil {
				return err
			}
			defer l.Close()
			sel := eventlog.Selection{Types: o.types, Quiet: o.quiet || len(o.types) > 0, Newest: !o.reverse} // what is asked for by name is shown
			var ent *eventlog.Entity
			if len(args) == 1 {
				e, err := l.Entity(ctx, args[0])
				if err != nil {
					return err
				}
				if ent = &e; !e.One() {
					ent = nil
				}
				of := e.Selection()
				sel.Aggregates, sel.OIDs, sel.EntityID, sel.EmptyID = of.Aggregates, of.OIDs, of.EntityID, of.EmptyID
			}
			if o.since != "" {
				r, err := s.resolve(ctx, l, o.since, o.json)
				switch {
				case errors.Is(err, eventlog.ErrBeforeHistory):
					if !o.json {
						fmt.Fprintf(os.Stderr, "%s is before the history begins\n", o.since)
					}
				case err != nil:
					return err
				}
				sel.After = r.Position
			}
			if o.until != "" {
				r, err := s.resolve(ctx, l, o.until, o.json)
				if err != nil {
					return err
				}
				sel.Until = r.Position
			}
			if o.author == "" {
				sel.Limit = o.limit
			}
			if err := checkTypes(cmd, l, o.types); err != nil {
				return err
			}
			out := openScreen(cmd, !o.json && !o.noPager)
			defer out.close()
			now, n := time.Now(), 0
			cols := columns{iso: o.date == "iso"}
			err = readEvents(ctx, l, sel, func(e *eventlog.Event) error {
				if o.author != "" && !strings.Contains(strings.ToLower(eventlog.WhoOf(e.Metadata).Actor), strings.ToLower(o.author)) {
					return nil
				}
				n++
				var err error
				if o.json {
					_, err = out.Write(append(e.AppendJSON(nil), '\n'))
				} else {
					_, err = fmt.Fprintln(out, cols.eventLine(out, e, now))
				}
				if err != nil || n == o.limit {
					return errors.Join(err, errEnough)
				}
				return nil
			})
			if errors.Is(err, errEnough) {
				err = nil
			}
			if err == nil && n == 0 && !o.json {
				fmt.Fprint(out, "No events.")
				if ent != nil {
					hint, err := keyHint(ctx, l, *ent)
					if err != nil {
						return err
					}
					fmt.Fprint(out, hint)
				}
				if !o.quiet && len(args)+len(o.types) > 0 {
					fmt.Fprint(out, " What was before backstory init is not in the log; changes of updated_at alone (…Touched) are shown with --quiet.")
				}
				fmt.Fprintln(out)
			}
			return err
		},
	}
	f := c.Flags()
	f.BoolVar(&o.json, "json", false, "one JSON object per line")
	f.StringVar(&o.since, "since", "", "only events after this revision: a position, an LSN, a time, '2 hours ago', yesterday")
	f.StringVar(&o.until, "until", "", "only events up to this revision")
	f.StringVar(&o.author, "author", "", "only events of actors whose name contains this")
	f.StringSliceVar(&o.types, "type", nil, "only these event types")
	f.StringVar(&o.date, "date", "relative", "how times are printed: relative, or iso (in UTC)")
	f.IntVar(&o.limit, "limit", 0, "at most this many")
	f.BoolVar(&o.quiet, "quiet", false, "also events that are no news, such as a change of updated_at alone (…Touched)")
	f.BoolVar(&o.noPager, "no-pager", false, "on a terminal, not through $PAGER (or less)")
	f.BoolVar(&o.reverse, "reverse", false, "oldest first")
	return c
}

// keyHint says what the key of a table is, where that of an entity cannot be one.
func keyHint(ctx context.Context, l *eventlog.Log, ent eventlog.Entity) (string, error) {
	r, err := tableAt(ctx, l, ent.Table, math.MaxInt64)
	if err != nil || r == nil || len(r.Key) == 0 {
		return "", err
	}
	var names []string
	for _, c := range r.Key {
		names = append(names, r.Columns[c].Name)
	}
	_, noNumber := strconv.ParseInt(ent.ID, 10, 64)
	switch {
	case len(names) > 1 && strings.Count(ent.ID, ",") < len(names)-1:
		return fmt.Sprintf(" The key of %s is (%s): %s/%s.", ent.Table, strings.Join(names, ", "), ent.Table, strings.ToUpper(strings.Join(names, ","))), nil
	case r.IntegerKey() && noNumber != nil:
		return fmt.Sprintf(" The key of %s, %s, is a number.", ent.Table, names[0]), nil
	}
	return "", nil
}

// readEvents reads a selection. Among an entity's own events come the TRUNCATEs that ended it: they are about no row in particular.
func readEvents(ctx context.Context, l *eventlog.Log, sel eventlog.Selection, f func(*eventlog.Event) error) error {
	if !sel.One() {
		return l.Read(ctx, sel, f)
	}
	var ends []*eventlog.Event // oldest first
	err := l.Read(ctx, eventlog.Selection{Aggregates: sel.Aggregates, OIDs: sel.OIDs, Ops: []eventlog.Op{eventlog.OpTruncate}, Until: sel.Until, Quiet: true},
		func(e *eventlog.Event) error { ends = append(ends, e.Clone()); return nil })
	if err != nil {
		return err
	}
	if len(ends) == 0 {
		return l.Read(ctx, sel, f)
	}
	// Whether the row was there is told by all its events, wanted or not.
	id, types, quiet, left := sel.EntityID, sel.Types, sel.Quiet, sel.Limit
	sel.Types, sel.Quiet, sel.Limit = nil, true, 0
	give := func(e *eventlog.Event) error {
		if e.Position <= sel.After || e.Quiet && !quiet || len(types) > 0 && !slices.Contains(types, e.Type) {
			return nil
		}
		err := f(e)
		if left--; left == 0 && err == nil {
			err = errEnough
		}
		return err
	}
	type moment struct {
		at    eventlog.Position
		there bool // the row, from then on
		table uint32
	}
	after := func(e *eventlog.Event) moment {
		m := moment{at: e.Position, there: e.Op != eventlog.OpDelete && e.Key == id}
		if e.Relation != nil {
			m.table = e.Relation.OID
		}
		return m
	}
	// end gives the TRUNCATE that ended the row between one of its events and the next.
	end := func(m moment, next eventlog.Position) error {
		i := slices.IndexFunc(ends, func(t *eventlog.Event) bool { return t.Position > m.at && t.Relation.OID == m.table })
		if !m.there || i < 0 || ends[i].Position >= next {
			return nil
		}
		return give(ends[i])
	}
	var before moment // the row when the selection begins
	if sel.After > 0 {
		if err := l.Read(ctx, eventlog.Selection{Aggregates: sel.Aggregates, OIDs: sel.OIDs, EntityID: id, EmptyID: sel.EmptyID, Rows: true, Until: sel.After, Quiet: true, Newest: true, Limit: 1},
			func(e *eventlog.Event) error { before = after(e); return nil }); err != nil {
			return err
		}
	}
	next := eventlog.Position(math.MaxInt64)
	if err := l.Read(ctx, sel, func(e *eventlog.Event) error {
		if e.Owned { // the row is another one, which belongs to it
			return give(e)
		}
		m, until := before, e.Position // oldest first: what came before this event, and then it
		if sel.Newest {
			m, until, next = after(e), next, e.Position
		} else {
			before = after(e)
		}
		if err := end(m, until); err != nil {
			return err
		}
		return give(e)
	}); err != nil {
		return err
	}
	return end(before, next)
}

// checkTypes refuses types that the log has never seen.
func checkTypes(cmd *cobra.Command, l *eventlog.Log, types []string) error {
	if len(types) == 0 {
		return nil
	}
	known, err := l.Types(cmd.Context())
	if err != nil {
		return err
	}
	for _, t := range types {
		found := false
		for _, k := range known {
			found = found || k == t
		}
		if !found {
			hint := "The log holds: " + strings.Join(known, ", ") + "."
			if near := similar(t, known); len(near) > 0 {
				hint = "Did you mean " + strings.Join(near, " or ") + "? " + hint
			}
			return &eventlog.Problem{Err: fmt.Errorf("the log has no event of type %s", t), Hint: hint}
		}
	}
	return nil
}

// columns are as wide as what has been in them so far, within limits.
type columns struct {
	actor, typ, entity int
	iso                bool // times, not ages
}

// pad fills a text up to the width of its column, which grows with it.
func pad(width *int, text string, least, most int) string {
	n := utf8.RuneCountInString(text)
	*width = max(*width, least, min(n, most))
	return text + strings.Repeat(" ", max(0, *width-n))
}

// eventLine tells an event in one line: position, age, actor, type, entity, what changed, why.
func (c *columns) eventLine(s *screen, e *eventlog.Event, now time.Time) string {
	when := age(e.OccurredAt, now)
	if c.iso {
		when = e.OccurredAt.UTC().Format("2006-01-02T15:04:05.000Z")
	}
	return c.line(s, e, s.dim(fmt.Sprintf("%-15s", when))+"  ", 32, 1<<10) + s.dim(c.found(e, now))
}

// found tells when a gap was found, whose time is that of the commit before it, where that is another one.
func (c *columns) found(e *eventlog.Event, now time.Time) string {
	if e.Op != eventlog.OpGap {
		return ""
	}
	at, err := time.Parse(time.RFC3339Nano, plain(member(e.Data, "found_at")))
	switch {
	case err != nil || at.Sub(e.OccurredAt) < time.Minute:
		return ""
	case c.iso:
		return "  [found at " + at.UTC().Format("2006-01-02T15:04:05.000Z") + "]"
	}
	return "  [found " + age(at, now) + "]"
}

// briefLine is for one that has just happened, where there is little room.
func (c *columns) briefLine(s *screen, e *eventlog.Event) string { return c.line(s, e, "", 16, 20) }

// line makes it; of actors and entities that are too long it has the beginning (show has them whole).
func (c *columns) line(s *screen, e *eventlog.Event, when string, actorWidth, entityWidth int) string {
	w := eventlog.WhoOf(e.Metadata)
	var b strings.Builder
	b.WriteString(s.yellow(fmt.Sprintf("%7d", e.Position)) + "  " + when)
	if w.Actor != "" {
		b.WriteString(s.cyan(pad(&c.actor, cut(printable(w.Actor), actorWidth), 16, actorWidth)) + "  ")
	} else {
		b.WriteString(s.dim(pad(&c.actor, "-", 16, actorWidth)) + "  ")
	}
	typ := s.bold
	switch e.Op {
	case eventlog.OpDelete, eventlog.OpTruncate, eventlog.OpGap:
		typ = s.red
	case eventlog.OpInsert:
		typ = s.green
	}
	b.WriteString(typ(pad(&c.typ, e.Type, 16, 40)) + "  ")
	b.WriteString(pad(&c.entity, cut(printable(entityName(e)), entityWidth), 10, 48))
	if e.Op == eventlog.OpDelete && !strings.HasSuffix(e.Type, "Deleted") { // found to be gone, by a comparison
		b.WriteString("  " + s.red("[gone]"))
	}
	if e.Op == eventlog.OpTruncate && e.Relation != nil && e.Relation.RootName != "" {
		b.WriteString("  " + s.red("[only the rows of "+e.Relation.Own()+"]"))
	}
	if d := changes(e, 100); d != "" {
		b.WriteString("  " + d)
	}
	if member(e.Metadata, "first_seen") != nil {
		b.WriteString("  " + s.dim("[first seen: what it was before is not known]"))
	}
	if rule := member(member(e.Metadata, "rule_error"), "rule"); rule != nil {
		b.WriteString("  " + s.red("[the rule "+short(rule)+" failed]"))
	}
	if w.Reason != "" {
		b.WriteString("  " + s.dim("("+printable(w.Reason)+")"))
	}
	return strings.TrimRight(b.String(), " ")
}

// cut shortens a text to so many characters.
func cut(t string, n int) string {
	if r := []rune(t); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return t
}

// entityName is Order/42, or Order where an event is about all of them: a TRUNCATE. Order/ is the row whose key is the empty text.
func entityName(e *eventlog.Event) string {
	if e.AggregateID == "" && !e.Op.OfRow() {
		return e.Aggregate
	}
	return e.Entity()
}

// printable takes out of a text what would move a terminal's cursor or begin another line: anybody who may write to the source
// can put that into a context or a key.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			return '\ufffd'
		}
		return r
	}, s)
}

// changes tells what an event changed: status: pending → paid.
func changes(e *eventlog.Event, width int) string {
	var parts []string
	add := func(p string) { parts = append(parts, p) }
	switch e.Op {
	case eventlog.OpUpdate:
		for _, quiet := range []bool{false, true} { // what is no news where there is nothing else
			_ = eventlog.EachMember(e.Data, func(name, value []byte) error {
				if n := string(name); eventlog.QuietByConvention(n) == quiet {
					add(n + ": " + fromTo(member(e.Before, n), value))
				}
				return nil
			})
			if len(parts) > 0 {
				break
			}
		}
	case eventlog.OpDelete:
		_ = eventlog.EachMember(e.Before, func(name, value []byte) error {
			if !dull(string(name), value) {
				add(string(name) + ": " + short(value))
			}
			return nil
		})
	case eventlog.OpGap: // why comes first, and whole
		if why := member(e.Data, "reason"); why != nil {
			add("reason: " + plain(why))
		}
		for _, name := range []string{"from_lsn", "to_lsn"} {
			if v := member(e.Data, name); v != nil {
				add(name + ": " + short(v))
			}
		}
	default:
		_ = eventlog.EachMember(e.Data, func(name, value []byte) error {
			if !dull(string(name), value) {
				add(string(name) + ": " + short(value))
			}
			return nil
		})
	}
	_ = eventlog.EachMember(e.Extra, func(name, value []byte) error {
		add(string(name) + ": " + short(value))
		return nil
	})
	line := ""
	for i, p := range parts {
		if over := len(line) + len(p) - width; i > 0 && over > 0 && (i < len(parts)-1 || over > 20) { // saying that there is one more takes room, too
			return line + fmt.Sprintf(", … %d more", len(parts)-i)
		}
		if i > 0 {
			line += ", "
		}
		line += p
	}
	return line
}

// dull members say nothing in one line: the key, what is NULL, when it was.
func dull(name string, value []byte) bool {
	return name == "id" || name == "created_at" || name == "updated_at" || bytes.Equal(value, []byte("null"))
}

// member finds a member of a JSON object, nil if there is none.
func member(obj []byte, name string) (found []byte) {
	if len(obj) == 0 {
		return nil
	}
	_ = eventlog.EachMember(obj, func(n, v []byte) error {
		if string(n) == name {
			found = v
		}
		return nil
	})
	return found
}

// shortest is the room that one value has in a line.
const shortest = 48

// short prints a JSON value in little room.
func short(v []byte) string { return cut(plain(v), shortest) }

// fromTo prints a value and the one it became in little room; of two long ones, where they begin to differ. old is nil where it is
// not known.
func fromTo(old, value []byte) string {
	if old == nil {
		return "(not known) → " + short(value)
	}
	a, b := []rune(plain(old)), []rune(plain(value))
	same := 0
	for same < min(len(a), len(b)) && a[same] == b[same] {
		same++
	}
	const context = 12
	if same > shortest-context && max(len(a), len(b)) > shortest {
		from := same - context
		a, b = append([]rune("…"), a[from:]...), append([]rune("…"), b[from:]...)
	}
	return cut(string(a), shortest) + " → " + cut(string(b), shortest)
}

// plain prints a JSON value on one line: strings without quotes where that is clear.
func plain(v []byte) string {
	t := strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, string(v))
	if len(t) >= 2 && t[0] == '"' {
		if txt, _, err := eventlog.AppendText(nil, &eventlog.Type{}, v); err == nil && len(txt) > 0 && !bytes.ContainsAny(txt, "\"\n,→") && !bytes.Contains(txt, []byte(": ")) {
			t = string(txt)
		}
	}
	return t
}
