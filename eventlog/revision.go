package eventlog

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Revision is a place in the log as a person named it.
type Revision struct {
	Position Position // of the last event that belongs to it; 0 is before the first
	Text     string   // what was asked
	How      string   // one line for people: what it was taken for
	// Until is the moment that was meant, where the log has nothing of after it. Whether it has everything of before, only the source can tell.
	Until time.Time
}

func (r Revision) String() string { return r.How }

// RevisionOptions say how words about time are meant.
type RevisionOptions struct {
	Now  time.Time      // what ages are counted from; zero: the clock
	Zone *time.Location // of dates and of times without one; nil: UTC
}

// Resolve finds the position that a revision means:
//
//	1234                          this position
//	16/B374D848                   the largest position whose transaction committed there or before
//	HEAD, HEAD~3                  the last event, and three before it
//	2026-10-31T14:00:05Z          (RFC 3339) what had happened by then
//	2026-10-31 14:00[:05]         the same, in the zone
//	2026-10-31, yesterday         what had happened by the end of that day, in the zone
//	today, now                    the present
//	12 days ago, @{12.days.ago}   seconds, minutes, hours; days, weeks, months, years by the calendar of the zone
//
// A moment means the largest position before the first event that is later: commit times are not monotonic, and so no
// event of the revision is later than the moment. A moment in the future is the head; one between the log's beginning and its first event
// is position 0. Before that the error is ErrBeforeHistory, and the revision is position 0 all the same. Errors come with a hint.
func (l *Log) Resolve(ctx context.Context, text string, opt RevisionOptions) (Revision, error) {
	r := Revision{Text: text}
	if opt.Now.IsZero() {
		opt.Now = time.Now()
	}
	if opt.Zone == nil {
		opt.Zone = time.UTC
	}
	spec, err := parseRevision(text, opt.Now, opt.Zone)
	if err != nil {
		return r, err
	}
	head, err := l.Head(ctx)
	if err != nil {
		return r, err
	}
	switch spec.form {
	case formHead:
		r.Position = head.Position - spec.back
	case formPosition:
		r.Position = spec.position
	case formLSN:
		r.Position, err = l.lastAtLSN(ctx, spec.lsn, head.Position)
	case formMoment:
		r.Position = head.Position
		if !spec.at.After(opt.Now) {
			if r.Position, err = l.lastUntil(ctx, spec.at, head.Position); r.Position == head.Position {
				r.Until = spec.at
			}
		}
	}
	if err != nil {
		return r, fmt.Errorf("resolve revision %q: %w", text, err)
	}
	switch {
	case r.Position > head.Position:
		return r, &Problem{fmt.Errorf("revision %q is beyond the head of the log, position %d", text, head.Position),
			"Use HEAD for the newest state; backstory status shows how far the log is behind the source."}
	case r.Position <= 0 && head.Position > 0:
		r.Position = 0
		var began, first time.Time
		var position Position
		err := l.pool.QueryRow(ctx, `SELECT h.began_at, e.position, e.occurred_at FROM backstory.head h, (SELECT position, occurred_at FROM backstory.event ORDER BY position LIMIT 1) e`).
			Scan(&began, &position, &first)
		if err != nil {
			return r, fmt.Errorf("read when the history began: %w", err)
		}
		if spec.form == formMoment && !spec.at.Before(began) {
			r.How = "position 0, where the history began, before the first event"
			return r, nil
		}
		if first.Before(began) { // the slot was made a moment before
			began = first
		}
		return r, &Problem{fmt.Errorf("revision %q lies %w", text, ErrBeforeHistory),
			fmt.Sprintf("The history begins at %s; its first event, position %d, is of %s.", showMoment(began.In(opt.Zone)), position, showMoment(first.In(opt.Zone)))}
	}
	r.How = "position " + r.Position.String()
	switch spec.form {
	case formHead:
		if spec.back > 0 {
			r.How += fmt.Sprintf(", %d before the head", spec.back)
		}
	case formLSN:
		r.How += ", the last event committed until " + spec.lsn.String()
		if spec.lsn >= head.EndLSN {
			r.How += "; the log has the source until " + head.EndLSN.String()
		}
	case formMoment:
		if spec.at.After(opt.Now) {
			r.How += ", the head (" + showMoment(spec.at) + " is in the future)"
		} else {
			r.How += ", the last event until " + showMoment(spec.at)
		}
	}
	if spec.form == formPosition || spec.form == formHead && spec.back > 0 {
		inside, chunk, err := l.insideTransaction(ctx, r.Position)
		switch {
		case err != nil:
			return r, err
		case chunk:
			r.How += ", in the middle of a chunk of existing rows, which were read together"
		case inside:
			r.How += ", in the middle of a transaction of the source"
		}
	}
	return r, nil
}

// showMoment prints a time in its zone, with as much of a fraction as it has.
func showMoment(t time.Time) string {
	zone := t.Location().String()
	if zone == "Local" || zone == "" {
		zone = t.Format("-07:00")
	}
	return t.Format("2006-01-02 15:04:05.999999 ") + zone
}

// insideTransaction tells whether a source transaction goes on after a position, and whether that is one of ours, by which a chunk of existing rows has its
// place: its events are what the chunk has, not what a transaction changed.
func (l *Log) insideTransaction(ctx context.Context, p Position) (inside, chunk bool, err error) {
	err = l.pool.QueryRow(ctx, `SELECT count(*) > 0, coalesce(bool_or(k.op = $2 AND coalesce(e.meta, '') NOT LIKE '%"first_seen"%' OR k.op <> $3 AND k.type LIKE '%Healed'), false)
		FROM backstory.event a JOIN backstory.event b ON b.position = $1 + 1 AND a.position = $1 AND a.xid = b.xid AND a.commit_lsn = b.commit_lsn AND a.xid <> 0,
		LATERAL (VALUES (a.kind, a.meta), (b.kind, b.meta)) e (kind, meta) JOIN backstory.kind k ON k.id = e.kind
		WHERE a.position = $1 AND b.position = $1 + 1`, int64(p), string(OpImport), string(OpNote)).Scan(&inside, &chunk)
	if err != nil {
		return false, false, fmt.Errorf("look for the end of the transaction at %d: %w", p, err)
	}
	return inside, chunk, nil
}

// lastUntil finds the largest position before the first event that is later than a moment.
//
// That first event is a minimum over all of the log, whose times are only nearly in order. Each partition has a block range
// index that tells in a few pages where later events can be at all, and a bitmap scan comes upon one of the first of them
// at once; what remains is to look between the partition's start and there.
func (l *Log) lastUntil(ctx context.Context, at time.Time, head Position) (Position, error) {
	last := head
	err := l.probing(ctx, func(p *prober) error {
		p.cond = "occurred_at > '" + at.UTC().Format("2006-01-02 15:04:05.999999Z07:00") + "'"
		for _, part := range p.parts {
			if part.first > head {
				break
			}
			found, err := p.any(ctx, part, 0, head)
			if err != nil {
				return err
			}
			if found == 0 {
				continue
			}
			for found != 0 {
				last = found - 1
				if found, err = p.least(ctx, part, last); err != nil {
					return err
				}
			}
			return nil
		}
		return nil
	})
	return last, err
}

// lastAtLSN finds the largest position whose transaction committed at an LSN or before. Commit LSNs are in order as long as
// the source lost nothing; after a lossy failover the newest lineage counts.
func (l *Log) lastAtLSN(ctx context.Context, lsn LSN, head Position) (Position, error) {
	var last Position
	err := l.probing(ctx, func(p *prober) error {
		p.cond = "commit_lsn <= '" + lsn.String() + "' AND commit_lsn > '0/0'"
		for i := len(p.parts) - 1; i >= 0; i-- {
			part := p.parts[i]
			if part.first > head {
				continue
			}
			found, err := p.any(ctx, part, 0, head)
			if err != nil {
				return err
			}
			if found == 0 {
				continue
			}
			for lo, hi := found, min(part.last, head); ; {
				last = lo
				if lo >= hi {
					return nil
				}
				mid := lo + (hi-lo+1)/2
				if found, err = p.any(ctx, part, mid, hi); err != nil {
					return err
				}
				if found != 0 {
					lo = found
				} else {
					hi = mid - 1
				}
			}
		}
		return nil
	})
	return last, err
}

// prober asks single partitions of the log for events that meet a condition, by their block range index.
type prober struct {
	tx    pgx.Tx
	parts []*partition
	cond  string
}

// probing runs f in a transaction in which the planner may only use what finds nothing quickly: it believes that matching
// events are everywhere, and so that a plain scan soon meets one.
func (l *Log) probing(ctx context.Context, f func(*prober) error) error {
	return pgx.BeginTxFunc(ctx, l.pool, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off;
			SET LOCAL max_parallel_workers_per_gather = 0; SET LOCAL jit = off`); err != nil {
			return err
		}
		parts, err := l.partitions(ctx, tx)
		if err != nil {
			return err
		}
		return f(&prober{tx: tx, parts: parts})
	})
}

// any gives one of the positions from lo to hi in a partition that meet the condition, 0 if there is none.
func (p *prober) any(ctx context.Context, part *partition, lo, hi Position) (Position, error) {
	q := "SELECT position FROM backstory." + part.name() + " WHERE " + p.cond
	if lo > part.first {
		q += fmt.Sprintf(" AND position >= %d", lo)
	}
	if hi < part.last {
		q += fmt.Sprintf(" AND position <= %d", hi)
	}
	return p.position(ctx, q+" LIMIT 1")
}

// least gives the smallest position in a partition, up to hi, that meets the condition, 0 if there is none.
func (p *prober) least(ctx context.Context, part *partition, hi Position) (Position, error) {
	return p.position(ctx, fmt.Sprintf("SELECT coalesce(min(position), 0) FROM backstory.%s WHERE %s AND position <= %d", part.name(), p.cond, hi))
}

func (p *prober) position(ctx context.Context, query string) (Position, error) {
	var pos int64
	err := p.tx.QueryRow(ctx, query, pgx.QueryExecModeSimpleProtocol).Scan(&pos)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, nil
	}
	return Position(pos), err
}

// revisionForm is a way to name a place in the log.
type revisionForm int

const (
	formPosition revisionForm = iota
	formLSN
	formHead
	formMoment
)

// revisionSpec is a revision as it was written, before the log has been asked.
type revisionSpec struct {
	form     revisionForm
	position Position
	lsn      LSN
	back     Position  // of formHead
	at       time.Time // of formMoment: what happened then belongs to the revision
}

const revisionHint = "Use a position (1234), an LSN (16/B374D848), HEAD or HEAD~3, a moment (2026-10-31T14:00:05Z, '2026-10-31 14:00'), " +
	"a day for its end (2026-10-31, yesterday), or an age ('12 days ago', @{1.hour.ago})."

var (
	digitsForm = regexp.MustCompile(`^[0-9]+$`)
	lsnForm    = regexp.MustCompile(`^[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}$`)
	headForm   = regexp.MustCompile(`^(?i:HEAD)(?:~([0-9]*))?$`)
	agePart    = regexp.MustCompile(`^(?:([0-9]+) ?|(?:an?|one) )([a-z]+) (?:and )?`)
)

// momentLayouts are the ways to write a moment; those with a zone come first. Go accepts a fraction after seconds.
var momentLayouts = []string{time.RFC3339, "2006-01-02T15:04Z07:00", "2006-01-02 15:04:05Z07:00", "2006-01-02 15:04:05Z07", "2006-01-02 15:04Z07:00",
	"2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02 15:04:05", "2006-01-02 15:04"}

// parseRevision reads a revision without asking the log.
func parseRevision(text string, now time.Time, zone *time.Location) (revisionSpec, error) {
	bad := func(format string, args ...any) (revisionSpec, error) {
		return revisionSpec{}, &Problem{fmt.Errorf("%w %q: %s", ErrBadRevision, text, fmt.Sprintf(format, args...)), revisionHint}
	}
	now = now.In(zone)
	s := strings.TrimSpace(text)
	if inner, ok := strings.CutPrefix(s, "@{"); ok {
		if inner, ok = strings.CutSuffix(inner, "}"); !ok {
			return bad("a brace is missing")
		}
		s = strings.TrimSpace(inner)
	}
	if s == "" {
		return bad("it is empty")
	}
	if digitsForm.MatchString(s) {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return bad("no position is that large")
		}
		return revisionSpec{form: formPosition, position: Position(n)}, nil
	}
	if lsnForm.MatchString(s) {
		lsn, err := ParseLSN(s)
		if err != nil {
			return bad("it is not an LSN")
		}
		return revisionSpec{form: formLSN, lsn: lsn}, nil
	}
	if m := headForm.FindStringSubmatch(s); m != nil {
		spec := revisionSpec{form: formHead}
		switch {
		case m[1] != "":
			n, err := strconv.ParseInt(m[1], 10, 64)
			if err != nil {
				return bad("no position is that large")
			}
			spec.back = Position(n)
		case strings.HasSuffix(s, "~"):
			spec.back = 1
		}
		return spec, nil
	}
	if at, ok := parseDay(s, now); ok {
		return revisionSpec{form: formMoment, at: at}, nil
	}
	if len(s) >= 8 && s[0] >= '0' && s[0] <= '9' && strings.Count(s, "-") >= 2 {
		t := strings.ToUpper(s)
		if utc, ok := strings.CutSuffix(t, " UTC"); ok {
			t = utc + "Z"
		}
		for _, layout := range momentLayouts {
			if at, err := time.ParseInLocation(layout, t, zone); err == nil {
				return revisionSpec{form: formMoment, at: at.Truncate(time.Microsecond)}, nil
			}
		}
		return bad("there is no such moment")
	}
	if at, ok := parseAge(s, now); ok {
		return revisionSpec{form: formMoment, at: at}, nil
	}
	return bad("it is none of the known forms")
}

// endOfDay gives the last microsecond of a day; days are not all 24 hours long.
func endOfDay(t time.Time) time.Time {
	return time.Date(t.Year(), t.Month(), t.Day()+1, 0, 0, 0, 0, t.Location()).Add(-time.Microsecond)
}

// parseDay reads a bare date, now, today and yesterday, the last two perhaps with a time of the day.
func parseDay(s string, now time.Time) (time.Time, bool) {
	zone := now.Location()
	word, clock, _ := strings.Cut(strings.ToLower(s), " ")
	if clock == "" {
		switch word {
		case "now", "today":
			return now, true
		case "yesterday":
			return endOfDay(now.AddDate(0, 0, -1)), true
		}
		day, err := time.ParseInLocation("2006-01-02", s, zone)
		return endOfDay(day), err == nil
	}
	back := 0
	switch word {
	case "today":
	case "yesterday":
		back = 1
	default:
		return now, false
	}
	for _, layout := range []string{"15:04", "15:04:05"} {
		if t, err := time.Parse(layout, strings.TrimSpace(clock)); err == nil {
			return time.Date(now.Year(), now.Month(), now.Day()-back, t.Hour(), t.Minute(), t.Second(), t.Nanosecond(), zone), true
		}
	}
	return now, false
}

// parseAge reads an age: 12 days ago, an hour ago, 1.week.2.days.ago, 90s ago.
func parseAge(s string, now time.Time) (time.Time, bool) {
	s = strings.Join(strings.FieldsFunc(strings.ToLower(s), func(r rune) bool { return r == ' ' || r == '.' || r == ',' || r == '\t' }), " ")
	at, any := now, false
	for s != "ago" {
		m := agePart.FindStringSubmatch(s)
		if m == nil {
			return now, false
		}
		n := 1
		if m[1] != "" {
			var err error
			if n, err = strconv.Atoi(m[1]); err != nil || n > 1e9 {
				return now, false
			}
		}
		var ok bool
		if at, ok = before(at, n, m[2]); !ok {
			return now, false
		}
		s, any = s[len(m[0]):], true
	}
	return at, any
}

// before goes back by n units: hours and less by the clock, days and more by the calendar.
func before(t time.Time, n int, unit string) (time.Time, bool) {
	if len(unit) > 3 {
		unit = strings.TrimSuffix(unit, "s")
	}
	years := t.Year() + 5000 // as far as a moment can be printed
	switch unit {
	case "s", "sec", "second":
		return t.Add(-time.Duration(n) * time.Second), true
	case "m", "min", "minute":
		return t.Add(-time.Duration(n) * time.Minute), n <= 1<<27
	case "h", "hr", "hour":
		return t.Add(-time.Duration(n) * time.Hour), n <= 1<<21
	case "d", "day":
		return t.AddDate(0, 0, -n), n <= years*366
	case "w", "week":
		return t.AddDate(0, 0, -7*n), n <= years*53
	case "mon", "month":
		return monthsBefore(t, n), n <= years*12
	case "y", "yr", "year":
		return monthsBefore(t, 12*n), n <= years
	}
	return t, false
}

// monthsBefore goes back by months; the day is the month's last where it has no such day.
func monthsBefore(t time.Time, n int) time.Time {
	first := time.Date(t.Year(), t.Month(), 1, t.Hour(), t.Minute(), t.Second(), t.Nanosecond(), t.Location()).AddDate(0, -n, 0)
	lastDay := first.AddDate(0, 1, -1).Day()
	return first.AddDate(0, 0, min(t.Day(), lastDay)-1)
}
