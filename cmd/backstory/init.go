package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
)

// What an event takes in the log beside its values, indexes included. With the whole row for an insert or a delete and a third of it
// for an update, this gives what was measured: 395 MB for 1 million events of a table of seven columns, half inserts and half updates.
const eventBytes = 320

// logGrowth is about how much the log grows in a day, and for one change of any of the tables.
func logGrowth(tables []*capture.Table) (day, changes, each int64) {
	for _, t := range tables {
		w := t.RowBytes()
		day += (t.PerDay.Inserted+t.PerDay.Deleted)*(eventBytes+w) + t.PerDay.Updated*(eventBytes+w/3)
		changes += t.PerDay.Changes()
		each += eventBytes + w/2
	}
	return day, changes, each / int64(max(len(tables), 1))
}

// askAbove is the size of the log on the source's own disk above which init asks.
const askAbove = 10 << 30

func newInit() *cobra.Command {
	var o struct {
		printSQL, yes, acceptGap, noBaseline, ddlTrigger bool
		full                                             []string
	}
	c := &cobra.Command{
		Use:   "init",
		Short: "Sets up: shows what it will cost, then makes the event log, the publications and the replication slot.",
		Long: "Sets up: shows what it will cost, then makes the event log, the publications and the replication slot.\n" +
			"Running it again changes only what is missing or different.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			s, err := readSettings()
			if err != nil {
				return err
			}
			log, err := s.logger()
			if err != nil {
				return err
			}
			cfg := s.config(log)
			cfg.Capture.FullIdentity, cfg.NoBaseline = o.full, o.noBaseline
			if cmd.Flags().Changed("ddl-trigger") {
				cfg.Capture.DDLTrigger = &o.ddlTrigger
			}
			if err := cfg.Capture.WithDefaults().Validate(); err != nil {
				return &exitError{exitUsage, err}
			}
			out := openScreen(cmd, false)
			defer out.close()
			if o.acceptGap && o.printSQL {
				return usage("Leave one of them out.", "--accept-gap and --print-sql do not go together")
			}
			if o.acceptGap {
				return acceptGap(ctx, out, cfg)
			}
			p, err := backstory.Prepare(ctx, cfg)
			if err != nil {
				return err
			}
			if o.printSQL {
				return printSQL(out, cfg, p)
			}
			size := showPlan(out, cfg, p)
			if mustAsk(p, size) && !o.yes {
				_ = out.Flush()
				if err := ask(size); err != nil {
					return err
				}
			}
			_ = out.Flush()
			d, err := backstory.Init(ctx, cfg, p, waiting())
			if err != nil {
				return err
			}
			showDone(out, cfg, p, d)
			return nil
		},
	}
	c.Flags().BoolVar(&o.printSQL, "print-sql", false, "only print the SQL, for somebody with more rights to run")
	c.Flags().BoolVar(&o.yes, "yes", false, "do not ask")
	c.Flags().BoolVar(&o.acceptGap, "accept-gap", false, "go on after a gap: with a new slot; what happened in between stays unknown")
	c.Flags().BoolVar(&o.noBaseline, "no-baseline", false, "do not take over rows that exist already: their history begins with their next change")
	c.Flags().BoolVar(&o.ddlTrigger, "ddl-trigger", false, "make an event trigger, by which ALTER TABLE and DROP TABLE have their exact places in the history (takes a superuser); =false removes it")
	c.Flags().StringSliceVar(&o.full, "replica-identity-full", nil, "a `TABLE` (or pattern) that gets REPLICA IDENTITY FULL, so that updates and deletes without a key are captured; shows what that costs")
	return c
}

// mustAsk tells whether the log's size after a year is a reason to ask.
func mustAsk(p *backstory.Plan, year int64) bool {
	return p.SameServer && year > askAbove && p.Span > enoughSpan && p.Head == nil // with a log, it has been decided
}

// enoughSpan is how long the server has to have counted changes for that to tell anything of a year.
const enoughSpan = 24 * time.Hour

// waiting tells for whom init waits, whenever that changes.
func waiting() func([]string) {
	last := ""
	return func(blockers []string) {
		// How long they have been open changes every second.
		who := ages.ReplaceAllString(strings.Join(blockers, "; "), "")
		if who != last {
			last = who
			fmt.Fprintf(os.Stderr, "waiting for: %s\n", strings.Join(blockers, "; "))
		}
	}
}

var ages = regexp.MustCompile(`open for [^;]*`)

// ask wants a yes on the terminal to so large a log.
func ask(year int64) error {
	growth := fmt.Sprintf("the log may grow to %s within a year on the source's own disk", bytesText(year))
	if !isTerminal(os.Stdin) {
		return &eventlog.Problem{Err: errors.New(growth), Hint: "Nothing was changed. If that is all right, run backstory init --yes; otherwise keep the log on another server with BACKSTORY_LOG_URL."}
	}
	fmt.Fprintf(os.Stderr, "%s. Go on? [y/N] ", strings.ToUpper(growth[:1])+growth[1:])
	line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	if l := strings.ToLower(strings.TrimSpace(line)); l != "y" && l != "yes" {
		return errors.New("nothing was changed")
	}
	return nil
}

// showPlan says what there is, what will be made and what it will cost; it returns the expected size of the log after a
// year.
func showPlan(s *screen, cfg backstory.Config, p *backstory.Plan) int64 {
	v := p.Server.Version
	fmt.Fprintf(s, "%s   PostgreSQL %d.%d, database %s. wal_level is logical, so no restart is needed for that.\n", s.bold("source"), v/10000, v%10000, p.Server.Database)
	match, taken := "match", p.Taken()
	if len(p.Tables) == 1 {
		match = "matches"
	}
	fmt.Fprintf(s, "%s   %d %s %s", s.bold("tables"), len(p.Tables), match, strings.Join(cfg.Capture.WithDefaults().Tables, ", "))
	if len(p.Left) > 0 {
		fmt.Fprintf(s, "; init goes on with %d of them", len(taken))
	}
	fmt.Fprintf(s, ": %s, %s.\n", counted(p.Rows, "row"), bytesText(p.Bytes))
	const indent = "         "
	var existing, more int64
	full, memory := false, false
	largest := slices.SortedStableFunc(slices.Values(p.Tables), func(a, b *capture.Table) int { return cmp.Compare(b.Bytes, a.Bytes) })
	for i, t := range largest {
		how := ""
		switch {
		case slices.Contains(p.Left, t):
			how = "not captured"
			if t.Inserts {
				how = "only inserts are captured, through its schema"
			}
			how = "  " + s.yellow(how+": it belongs to "+t.Owner+", and "+p.Role+" may not publish it")
		case t.InsertOnly:
			how = "  " + s.yellow("inserts only: "+t.Why)
		case t.ToFull:
			full = true
			how = "  " + s.yellow("REPLICA IDENTITY FULL is to be set: an exclusive lock for a moment, and then "+moreWAL(p, t))
		case t.ReplicaIdentity == 'f':
			how, full = "  REPLICA IDENTITY FULL", true
		default:
			memory = true
		}
		if t.Rows > 0 && !slices.Contains(p.Left, t) {
			existing++
		}
		if i < 20 || t.InsertOnly || t.ToFull || slices.Contains(p.Left, t) {
			fmt.Fprintf(s, indent+"%-32s %12s %-4s  %10s%s\n", t, countText(t.Rows), plural(t.Rows, "row"), bytesText(t.Bytes), how)
		} else {
			more++
		}
	}
	if more > 0 {
		fmt.Fprintf(s, indent+"… and %s more\n", counted(more, "table"))
	}
	switch {
	case full && memory:
		fmt.Fprintln(s, indent+"What a row was before a change is told by the WAL where there is REPLICA IDENTITY FULL, by the log's own memory of the row elsewhere.")
	case memory:
		fmt.Fprintln(s, indent+"What a row was before a change is told by the log's own memory of the row: no ALTER TABLE is needed.")
	}
	day, changes, each := logGrowth(taken)
	year := 365 * day
	where := "another server"
	if p.SameServer {
		where = "the source's own server and disk"
	}
	fmt.Fprintf(s, "%s      schema backstory on %s. ", s.bold("log"), where)
	if changes > 0 {
		if p.Span > enoughSpan {
			fmt.Fprintf(s, "At the present rate of %s a day it grows by about %s a day, %s a year.\n", counted(changes, "change"), bytesText(day), bytesText(year))
		} else {
			fmt.Fprintf(s, "It grows by about %s for each row change; the server has counted them for less than a day, too short to tell how many there will be.\n", bytesText(each))
		}
	} else {
		fmt.Fprintf(s, "It grows by about %s for each row change; the server has counted none so far.\n", bytesText(each))
	}
	if p.Server.Settings["max_slot_wal_keep_size"] == "-1" {
		fmt.Fprintf(s, indent+"%s max_slot_wal_keep_size is not set: while the sidecar does not run, the source keeps all its WAL.\n", s.yellow("warning:"))
		fmt.Fprintln(s, indent+"→ ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf();")
	}
	for _, f := range p.Unmatched {
		fmt.Fprintf(s, indent+"%s %s: %s.\n", s.yellow("warning:"), f.What, f.Risk)
		fmt.Fprintf(s, indent+"→ %s\n", f.Remedy)
	}
	if len(p.Outside) > 0 {
		var list []string
		for _, o := range p.Outside {
			list = append(list, fmt.Sprintf("schema %s (%s)", o.Schema, counted(int64(o.Tables), "table")))
		}
		fmt.Fprintf(s, indent+"BACKSTORY_TABLES leaves out %s. To take them in: BACKSTORY_TABLES=%s\n", capture.Some(list), capture.TakingIn(cfg.Capture.WithDefaults().Tables, p.Outside))
	}
	for _, a := range p.AllTables {
		fmt.Fprintf(s, indent+"%s publication %s is FOR ALL TABLES: it would publish the log's tables too. Keep the log in another database (BACKSTORY_LOG_URL).\n", s.yellow("warning:"), a)
	}
	for _, h := range p.Histories {
		fmt.Fprintf(s, indent+"%s keeps a history of its own (%s); it stays as it is.\n", h.Table, h.Library)
	}
	if existing > 0 && p.NewSlot && p.Head == nil { // with a log, that its slot is gone is a gap
		have := "have"
		if existing == 1 {
			have = "has"
		}
		if cfg.NoBaseline {
			fmt.Fprintf(s, indent+"%s %s rows already. The history of such a row begins with its next change; a table that is empty now is complete.\n", counted(existing, "table"), have)
		} else {
			fmt.Fprintf(s, indent+"%s %s rows already. backstory run takes them over, without a lock and while it streams: %s, about %s of log. (--no-baseline leaves them out.)\n",
				counted(existing, "table"), have, counted(p.Rows, "event"), bytesText(p.Rows*eventBytes+p.Bytes))
		}
	}
	return year
}

// moreWAL says what REPLICA IDENTITY FULL will cost.
func moreWAL(p *backstory.Plan, t *capture.Table) string {
	if wal := (t.PerDay.Updated + t.PerDay.Deleted) * t.RowBytes(); wal > 0 && p.Span > enoughSpan {
		return "about " + bytesText(wal) + " more WAL a day (the old row of each UPDATE and DELETE)"
	}
	return "the whole old row in the WAL of each UPDATE and DELETE"
}

func showDone(s *screen, cfg backstory.Config, p *backstory.Plan, d *backstory.Done) {
	c := cfg.Capture.WithDefaults()
	did := false
	say := func(format string, a ...any) {
		did = true
		fmt.Fprintf(s, "%s     "+format+"\n", append([]any{s.bold("done")}, a...)...)
	}
	if d.Created {
		say("made the event log (schema backstory)")
	}
	for _, q := range p.SQL {
		say("%s", cut(q, 160))
	}
	if len(p.DDL) > 0 && p.DDLReader != "" {
		why := p.DDLReaderWhy
		if why == "" {
			why = "since nothing shows another one"
		}
		say("%s is taken for the sidecar's role, %s: it may read the secret of the event triggers. If it is another one, backstory doctor, run with that, prints the GRANT", p.DDLReader, why)
	}
	if p.NewSlot {
		say("made replication slot %s; history begins at %s, %s", c.Slot, d.Start, time.Now().Format("2006-01-02 15:04:05 MST"))
	}
	showLeft(s, c, d)
	if p.Head != nil && p.Head.Baseline == cfg.NoBaseline { // it is another choice than before
		if cfg.NoBaseline {
			say("existing rows that the log does not have yet are left out from now on (--no-baseline); a backstory init without it takes them over")
		} else {
			say("existing rows, which init --no-baseline had left out, are to be taken over: backstory run does that while it streams, and compares what was altered meanwhile")
		}
	}
	if !did {
		fmt.Fprintf(s, "%s     everything was there already (%s captured); nothing was changed\n", s.bold("done"), counted(int64(len(d.Tables)), "table"))
	}
	fmt.Fprintf(s, "%s     backstory run    (and backstory doctor, to see what could be safer)\n", s.bold("next"))
}

// showLeft names the tables that init went on without, and says what has to be run for them.
func showLeft(s *screen, c capture.Config, d *backstory.Done) {
	if len(d.Left) == 0 {
		return
	}
	var owners []string
	for _, t := range d.Left {
		what := t.String() + " is not captured"
		if t.Inserts {
			what = "only inserts of " + t.String() + " are captured, through its schema"
		}
		fmt.Fprintf(s, "%s  %s: it belongs to %s, and role %s may not publish it\n", s.yellow("warning"), what, t.Owner, d.Role)
		if !slices.Contains(owners, t.Owner) {
			owners = append(owners, t.Owner)
		}
	}
	fmt.Fprintln(s, "         Let a superuser run")
	for _, q := range c.PublishSQL(d.Role, d.Left) {
		fmt.Fprintf(s, "         → %s\n", q)
	}
	fmt.Fprintf(s, "         and then run backstory init again; or make %s a member of %s (README, What Postgres needs). BACKSTORY_EXCLUDE leaves a table out for good.\n", d.Role, strings.Join(owners, " and "))
}

// printSQL prints what init would run, for somebody who may.
func printSQL(s *screen, cfg backstory.Config, p *backstory.Plan) error {
	fmt.Fprintf(s, "-- In database %s, for the event log:\n", p.LogDatabase)
	if !p.LogExists {
		sql, err := eventlog.Migration(1)
		if err != nil {
			return err
		}
		role := eventlog.QuoteIdent(p.LogRole)
		if !p.MayCreateLog {
			fmt.Fprintf(s, "GRANT CREATE ON DATABASE %s TO %s;\n", eventlog.QuoteIdent(p.LogDatabase), role)
		}
		fmt.Fprintf(s, "BEGIN;\nSET LOCAL ROLE %s;  -- it has to own the log; whoever runs this is a superuser or a member of it\n", role)
		fmt.Fprintf(s, "%s\nINSERT INTO backstory.migration (number) VALUES (1);\nCOMMIT;\n", strings.TrimSpace(sql))
	} else {
		fmt.Fprintln(s, "-- nothing to do")
	}
	fmt.Fprintf(s, "\n-- In database %s, the source, as the owner of the tables, or a superuser:\n", p.Server.Database)
	publications := p.SQL[:len(p.SQL)-len(p.DDL)]
	atOnce := slices.ContainsFunc(publications, func(q string) bool { return strings.HasPrefix(q, "ALTER PUBLICATION") })
	if p.Alters() {
		for _, t := range p.Tables {
			if t.ToFull {
				fmt.Fprintf(s, "-- %s: REPLICA IDENTITY FULL costs an exclusive lock for a moment, and then %s.\n", t, moreWAL(p, t))
			}
		}
		fmt.Fprintln(s, "BEGIN;\n"+capture.LimitLock+";  -- so that the application does not have to wait behind it")
	} else if atOnce {
		fmt.Fprintln(s, "BEGIN;  -- all at once: a table that is in no publication for a moment would be a gap")
	}
	for _, q := range publications {
		fmt.Fprintln(s, q)
	}
	if atOnce || p.Alters() {
		fmt.Fprintln(s, "COMMIT;")
	}
	if len(p.DDL) > 0 {
		fmt.Fprintln(s, "-- The event triggers, as a superuser:")
		if p.DDLReader != "" && p.Superuser && p.DDLReaderWhy == "" {
			fmt.Fprintf(s, "-- %s is taken for the sidecar's role; if that is another one, put it into the GRANT\n", p.DDLReader)
		}
	}
	for _, q := range p.DDL {
		fmt.Fprintln(s, q)
	}
	if owner := soleOwner(p.Tables); owner != "" && slices.ContainsFunc(p.SQL, func(q string) bool { return strings.HasPrefix(q, "CREATE PUBLICATION") }) {
		c := cfg.Capture.WithDefaults()
		fmt.Fprintln(s, "-- Whoever owns the tables has to own the publications, too, for what comes later (and may CREATE in the database):")
		for _, pub := range []string{c.Publication, c.InsertPublication()} {
			fmt.Fprintf(s, "ALTER PUBLICATION %s OWNER TO %s;\n", eventlog.QuoteIdent(pub), eventlog.QuoteIdent(owner))
		}
	}
	var look, schemas []string
	for _, t := range p.NotOwned {
		look = append(look, eventlog.QuoteQualified(t.Schema, t.Name))
		if q := eventlog.QuoteIdent(t.Schema); !slices.Contains(schemas, q) {
			schemas = append(schemas, q)
		}
	}
	if len(look) > 0 {
		role := eventlog.QuoteIdent(p.Role)
		fmt.Fprintln(s, "-- So that backstory sees which tables are empty; those are complete in the log from the beginning:")
		fmt.Fprintf(s, "GRANT USAGE ON SCHEMA %s TO %s;\nGRANT SELECT ON %s TO %s;\n", strings.Join(schemas, ", "), role, strings.Join(look, ", "), role)
	}
	if len(p.SQL) == 0 {
		fmt.Fprintln(s, "-- nothing to do")
	}
	fmt.Fprintln(s, "\n-- Then run backstory init: it makes the replication slot"+slotNote(cfg, p)+".")
	return nil
}

// soleOwner is who owns all of the tables; "" if nobody does.
func soleOwner(tables []*capture.Table) string {
	for _, t := range tables {
		if t.Owner != tables[0].Owner {
			return ""
		}
	}
	return tables[0].Owner
}

func slotNote(cfg backstory.Config, p *backstory.Plan) string {
	if p.NewSlot {
		return " " + cfg.Capture.WithDefaults().Slot + " (its role needs REPLICATION) and ties the log to it"
	}
	return ", if it is missing, and ties the log to it"
}

func acceptGap(ctx context.Context, s *screen, cfg backstory.Config) error {
	d, err := backstory.AcceptGap(ctx, cfg, waiting())
	if err != nil {
		return err
	}
	fmt.Fprintf(s, "%s     the gap is accepted; the history goes on at %s with a new replication slot %s\n", s.bold("done"), d.Start, cfg.Capture.WithDefaults().Slot)
	fmt.Fprintln(s, "         backstory run compares the tables with the log; what differs becomes …Healed events. Until then no table counts as complete: a checkout wants --partial.")
	showLeft(s, cfg.Capture.WithDefaults(), d)
	return nil
}
