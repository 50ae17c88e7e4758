package main

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// openLog opens the event log for a command that reads.
func openLog(ctx context.Context) (*settings, *eventlog.Log, error) {
	s, err := readSettings()
	if err != nil {
		return nil, nil, err
	}
	url := s.LogURL
	if url == "" {
		url = s.SourceURL
	}
	if url == "" {
		return nil, nil, usage("Set BACKSTORY_LOG_URL (or BACKSTORY_SOURCE_URL, where the log is kept in the source).", "no event log is named")
	}
	l, err := eventlog.Open(ctx, eventlog.Config{URL: url})
	if err != nil {
		return nil, nil, err
	}
	return s, l, nil
}

// resolve turns a revision as a person writes it into a position, and says what it took it for. A revision before the history
// is position 0 and eventlog.ErrBeforeHistory.
func (s *settings) resolve(ctx context.Context, l *eventlog.Log, text string, quiet bool) (eventlog.Revision, error) {
	opt := eventlog.RevisionOptions{Now: time.Now()}
	if !placeForm.MatchString(text) {
		var err error
		if opt.Zone, err = s.zone(ctx, l); err != nil {
			return eventlog.Revision{}, err
		}
	}
	r, err := l.Resolve(ctx, text, opt)
	if err != nil {
		return r, err
	}
	if !quiet && r.How != "position "+text { // which would tell nothing
		fmt.Fprintf(os.Stderr, "%s is %s\n", text, r.How)
	}
	if !r.Until.IsZero() {
		if lacks := s.lacks(ctx, r.Until); lacks != "" {
			fmt.Fprintln(os.Stderr, "warning: "+lacks)
		}
	}
	return r, nil
}

// lacks tells what the log may not have yet of before a moment, after which it has nothing; empty: it has everything. Where nobody streams it looks
// into the slot, which it holds for up to three seconds.
func (s *settings) lacks(ctx context.Context, until time.Time) string {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	st, err := s.status(ctx)
	switch {
	case err != nil || st.Source.State == "unreachable" || st.Source.State == "unknown":
		return "whether the source had committed more by then only the source can tell, and it cannot be asked; the log's last event is its newest"
	case st.CaughtUp:
		return ""
	case st.Log.Gap != "":
		return "the log ends at a gap: what was committed after that is not part of this; see backstory status"
	}
	behind, how := time.Duration(st.Source.LagSeconds*float64(time.Second)), bytesText(st.Source.LagBytes)
	if behind > 0 {
		if until.Before(time.Now().Add(-behind - 2*time.Second)) { // to within which it is known
			return ""
		}
		how = fmt.Sprintf("%.0f s, %s", behind.Seconds(), how)
	}
	is := "is"
	switch {
	case st.Running:
	case st.Source.State == "streaming":
		is, how = "may be", how+"; the sidecar that is at work cannot be asked from here"
	default:
		how += "; no sidecar runs"
	}
	return "the log " + is + " behind the source (" + how + "): what was committed meanwhile is not part of this"
}

// placeForm are the revisions that name a place in the log, not a moment: the time zone is nothing to them.
var placeForm = regexp.MustCompile(`^\s*([0-9]+|[0-9A-Fa-f]+/[0-9A-Fa-f]+|(?i:HEAD)(~[0-9]*)?)\s*$`)

// zone is the time zone of dates and times without one: BACKSTORY_TZ, otherwise that of the source, and of the log's database
// where the source is not named or cannot be asked.
func (s *settings) zone(ctx context.Context, l *eventlog.Log) (*time.Location, error) {
	if s.location != nil {
		return s.location, nil
	}
	var err error
	if s.TZ != "" {
		if s.location, err = time.LoadLocation(s.TZ); err != nil {
			return nil, usage("Use a name such as America/New_York or UTC.", "BACKSTORY_TZ %q is not a time zone", s.TZ)
		}
		return s.location, nil
	}
	where, name := "source", ""
	if s.SourceURL != "" {
		name, err = timeZone(ctx, s.SourceURL)
	}
	if s.SourceURL == "" || err != nil {
		if err != nil {
			fmt.Fprintf(os.Stderr, "warning: the source does not tell its time zone: %v. That of the log's database is used; BACKSTORY_TZ sets another.\n", err)
		}
		where = "log's database"
		if name, err = timeZone(ctx, l.URL()); err != nil {
			return nil, fmt.Errorf("ask the log's database for its time zone: %w", err)
		}
	}
	if s.location, err = time.LoadLocation(name); err != nil {
		return nil, usage("Set BACKSTORY_TZ to a name such as America/New_York or UTC.", "the TimeZone of the %s is %q, which is not the name of a time zone", where, name)
	}
	return s.location, nil
}

// timeZone is the TimeZone of a new session: that of the role in the database, of the database, of the role or of the server.
// It takes a session without our own settings, since what they hide only the server itself can tell.
func timeZone(ctx context.Context, url string) (string, error) {
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return "", eventlog.ErrBadURL // which has been parsed before
	}
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 5 * time.Second
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return "", eventlog.ConnError(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var name string
	err = conn.QueryRow(ctx, "SHOW TimeZone").Scan(&name)
	return name, err
}
