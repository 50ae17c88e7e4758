package main

import (
	"context"
	"fmt"
	"os"
	"time"

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

// resolve turns a revision as a person writes it into a position, and says what it took it for.
func (s *settings) resolve(ctx context.Context, l *eventlog.Log, text string, quiet bool) (eventlog.Position, error) {
	zone, err := s.zone(ctx, l)
	if err != nil {
		return 0, err
	}
	r, err := l.Resolve(ctx, text, eventlog.RevisionOptions{Now: time.Now(), Zone: zone})
	if err != nil {
		return 0, err
	}
	if !quiet {
		fmt.Fprintf(os.Stderr, "%s is %s\n", text, r.How)
	}
	return r.Position, nil
}

// zone is the time zone of dates and times without one: BACKSTORY_TZ, or the server's own.
func (s *settings) zone(ctx context.Context, l *eventlog.Log) (*time.Location, error) {
	name := s.TZ
	if name == "" {
		// The session's own setting is UTC; what the database would use is the reset value.
		if err := l.Pool().QueryRow(ctx, `SELECT coalesce((SELECT split_part(c, '=', 2) FROM pg_db_role_setting s, unnest(s.setconfig) c
			WHERE s.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()) AND c ILIKE 'timezone=%' LIMIT 1),
			(SELECT setting FROM pg_file_settings WHERE name ILIKE 'timezone' AND applied ORDER BY seqno DESC LIMIT 1), 'UTC')`).Scan(&name); err != nil {
			name = "UTC" // pg_file_settings is for superusers
		}
	}
	z, err := time.LoadLocation(name)
	if err != nil {
		if s.TZ == "" {
			return time.UTC, nil
		}
		return nil, usage("Use a name such as America/New_York or UTC.", "BACKSTORY_TZ %q is not a time zone", name)
	}
	return z, nil
}
