package eventlog

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
	_ "time/tzdata"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

func zone(t testing.TB, name string) *time.Location {
	t.Helper()
	z, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return z
}

func TestRevisionForms(t *testing.T) {
	berlin := zone(t, "Europe/Berlin")
	now := time.Date(2026, 11, 23, 9, 30, 15, 123456000, berlin)
	pos := func(p Position) revisionSpec { return revisionSpec{form: formPosition, position: p} }
	lsn := func(l LSN) revisionSpec { return revisionSpec{form: formLSN, lsn: l} }
	head := func(n Position) revisionSpec { return revisionSpec{form: formHead, back: n} }
	at := func(s string) revisionSpec {
		m, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t.Fatal(err)
		}
		return revisionSpec{form: formMoment, at: m}
	}
	for _, c := range []struct {
		text string
		want revisionSpec
	}{
		{"1234", pos(1234)},
		{" 1234 ", pos(1234)},
		{"0", pos(0)},
		{"2026", pos(2026)},
		{"9223372036854775807", pos(1<<63 - 1)},
		{"16/B374D848", lsn(0x16B374D848)},
		{"0/1", lsn(1)},
		{"ffffffff/ffffffff", lsn(1<<64 - 1)},
		{"12/34", lsn(0x1200000034)},
		{"HEAD", head(0)},
		{"head", head(0)},
		{"HEAD~3", head(3)},
		{"HEAD~", head(1)},
		{"HEAD~0", head(0)},
		{"2026-10-31T14:00:05Z", at("2026-10-31T14:00:05Z")},
		{"2026-10-31t14:00:05z", at("2026-10-31T14:00:05Z")},
		{"2026-10-31T14:00:05.123456789+02:00", at("2026-10-31T14:00:05.123456+02:00")},
		{"2026-10-31 14:00:05.5+00", at("2026-10-31T14:00:05.5Z")},
		{"2026-10-31 14:00:05+05:30", at("2026-10-31T14:00:05+05:30")},
		{"2026-10-31 14:00:05 UTC", at("2026-10-31T14:00:05Z")},
		{"2026-10-31 14:00", at("2026-10-31T14:00:00+01:00")},
		{"2026-10-31 14:00:05", at("2026-10-31T14:00:05+01:00")},
		{"2026-10-31T14:00", at("2026-10-31T14:00:00+01:00")},
		{"2026-07-01 14:00", at("2026-07-01T14:00:00+02:00")},
		{"2026-10-31", at("2026-10-31T23:59:59.999999+01:00")},
		{"2026-10-25", at("2026-10-25T23:59:59.999999+01:00")}, // 25 hours long
		{"2026-03-29", at("2026-03-29T23:59:59.999999+02:00")}, // 23 hours long
		{"2026-12-31", at("2026-12-31T23:59:59.999999+01:00")},
		{"@{2026-10-31}", at("2026-10-31T23:59:59.999999+01:00")},
		{"now", at("2026-11-23T09:30:15.123456+01:00")},
		{"today", at("2026-11-23T09:30:15.123456+01:00")},
		{"today 08:15", at("2026-11-23T08:15:00+01:00")},
		{"yesterday", at("2026-11-22T23:59:59.999999+01:00")},
		{"Yesterday 17:45:30", at("2026-11-22T17:45:30+01:00")},
		{"@{yesterday}", at("2026-11-22T23:59:59.999999+01:00")},
		{"12 days ago", at("2026-11-11T09:30:15.123456+01:00")},
		{"12.days.ago", at("2026-11-11T09:30:15.123456+01:00")},
		{"@{12.days.ago}", at("2026-11-11T09:30:15.123456+01:00")},
		{"@{ 12 days ago }", at("2026-11-11T09:30:15.123456+01:00")},
		{"1 minute ago", at("2026-11-23T09:29:15.123456+01:00")},
		{"90 seconds ago", at("2026-11-23T09:28:45.123456+01:00")},
		{"90s ago", at("2026-11-23T09:28:45.123456+01:00")},
		{"an hour ago", at("2026-11-23T08:30:15.123456+01:00")},
		{"a minute ago", at("2026-11-23T09:29:15.123456+01:00")},
		{"one week ago", at("2026-11-16T09:30:15.123456+01:00")},
		{"2 weeks, 3 days and 1 hour ago", at("2026-11-06T08:30:15.123456+01:00")},
		{"1.month.ago", at("2026-10-23T09:30:15.123456+02:00")}, // the same hour by the wall clock
		{"30 days ago", at("2026-10-24T09:30:15.123456+02:00")},
		{"720 hours ago", at("2026-10-24T10:30:15.123456+02:00")},
		{"9 months ago", at("2026-02-23T09:30:15.123456+01:00")},
		{"3 years ago", at("2023-11-23T09:30:15.123456+01:00")},
	} {
		got, err := parseRevision(c.text, now, berlin)
		if err != nil {
			t.Errorf("%q: %v", c.text, err)
			continue
		}
		if !got.at.Equal(c.want.at) {
			t.Errorf("%q: %v, want %v", c.text, got.at, c.want.at)
		}
		if got.at, c.want.at = (time.Time{}), (time.Time{}); got != c.want {
			t.Errorf("%q: %+v, want %+v", c.text, got, c.want)
		}
	}
}

func TestRevisionMonthsEndWithTheirLastDay(t *testing.T) {
	for _, c := range []struct{ now, text, want string }{
		{"2026-03-31T12:00:00Z", "1 month ago", "2026-02-28T12:00:00Z"},
		{"2024-03-31T12:00:00Z", "1 month ago", "2024-02-29T12:00:00Z"},
		{"2024-02-29T12:00:00Z", "1 year ago", "2023-02-28T12:00:00Z"},
		{"2026-01-31T12:00:00Z", "2 months ago", "2025-11-30T12:00:00Z"},
		{"2026-05-15T12:00:00Z", "17 months ago", "2024-12-15T12:00:00Z"},
	} {
		now, _ := time.Parse(time.RFC3339, c.now)
		got, err := parseRevision(c.text, now, time.UTC)
		if err != nil || got.at.Format(time.RFC3339) != c.want {
			t.Errorf("%s, %s: %v %v, want %s", c.text, c.now, got.at, err, c.want)
		}
	}
}

func TestRevisionsThatAreNone(t *testing.T) {
	for _, text := range []string{"", " ", "-1", "1.5", "12 days", "days ago", "ago", "a ago", "12 fortnights ago", "12 ago", "1 day ago ago",
		"2026-02-30", "2026-10-31 25:00", "2026-13-01", "2026-10-31 14:00 CEST", "HEAD~x", "HEAD^", "HEAD3", "@{12.days.ago", "@{}", "tomorrow", "yesterday 99:00",
		"16/", "/1", "123456789/0", "99999999999999999999", "99999999999 days ago", "9999999 years ago", "orders/17", "1; DROP TABLE x", "'", "'; --"} {
		got, err := parseRevision(text, time.Now(), time.UTC)
		if err == nil {
			t.Errorf("%q is taken for %+v", text, got)
			continue
		}
		if Hint(err) != revisionHint {
			t.Errorf("%q: the hint is %q", text, Hint(err))
		}
	}
}

func FuzzParseRevision(f *testing.F) {
	for _, s := range []string{"1", "16/B374D848", "HEAD~3", "2026-10-31T14:00:05Z", "@{12.days.ago}", "a week and 2 days ago", "yesterday 14:00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		now := time.Date(2026, 11, 23, 9, 30, 15, 0, time.UTC)
		spec, err := parseRevision(s, now, time.UTC)
		if err == nil && spec.form == formMoment && (spec.at.Year() < -5000 || spec.at.Year() > 9999) {
			t.Errorf("%q: %v", s, spec.at)
		}
	})
}

// logEvent is what a revision depends on.
type logEvent struct {
	lsn LSN
	xid int
	at  time.Time
}

// makeLog makes a log that holds such events, spread over partitions of a given size.
func makeLog(t testing.TB, perPartition int64, events []logEvent) *Log {
	t.Helper()
	ctx := context.Background()
	srv := pgservertest.ForTest(t, pgserver.Config{})
	l, err := Connect(ctx, Config{URL: srv.SocketURL(srv.NewDatabase(t)), PartitionEvents: perPartition})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	if _, err := l.Create(ctx); err != nil {
		t.Fatal(err)
	}
	conn, err := l.pool.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	_, err = conn.Exec(ctx, `INSERT INTO backstory.source VALUES (1, 'test', 'test', 0, 1, 1, 0);
		INSERT INTO backstory.aggregate VALUES (1, 'Order', 'bigint', 0);
		INSERT INTO backstory.kind (id, source, aggregate, type, op, quiet, restates, rules_version, sealed_at) VALUES (1, 1, 1, 'OrderNoted', 'n', false, false, 1, 0)`, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		t.Fatal(err)
	}
	var parts []*partition
	for first := Position(1); first <= Position(len(events)); first += Position(perPartition) {
		p, err := l.createPartition(ctx, conn.Conn(), first, int64(perPartition))
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, p)
	}
	var lsns []string
	var xids []int
	var times []time.Time
	for _, e := range events {
		lsns, xids, times = append(lsns, e.lsn.String()), append(xids, e.xid), append(times, e.at)
	}
	if _, err := conn.Exec(ctx, `INSERT INTO backstory.event (position, kind, stream, id, occurred_at, commit_lsn, xid, change, part, data)
		SELECT i, 1, 1, i, t, l::pg_lsn, x, 1, 1, '{"filler":"some text of the usual length, so that there are pages and pages of it"}'
		FROM unnest($1::text[], $2::bigint[], $3::timestamptz[]) WITH ORDINALITY AS e(l, x, t, i) ORDER BY i`, lsns, xids, times); err != nil {
		t.Fatal(err)
	}
	for i, p := range parts { // the newest one is not indexed yet, as while a writer is far behind
		if i+1 < len(parts) || len(parts) == 1 {
			if err := l.index(ctx, conn.Conn(), p); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := conn.Exec(ctx, `VACUUM ANALYZE backstory.`+p.name()); err != nil {
			t.Fatal(err)
		}
	}
	var end LSN
	for _, e := range events {
		end = max(end, e.lsn+100)
	}
	_, err = conn.Exec(ctx, `INSERT INTO backstory.head (epoch, position, written, seal, system_id, database, incarnation, timeline, end_lsn, commit_lsn, slot)
		VALUES (1, $1, $1, '', 'test', 'test', 0, 1, $2::text::pg_lsn, '0/0', 'backstory')`, len(events), end.String())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestResolve(t *testing.T) {
	berlin := zone(t, "Europe/Berlin")
	day := func(d, h int) time.Time { return time.Date(2026, 11, d, h, 0, 0, 0, berlin) }
	l := makeLog(t, 4, []logEvent{
		{0x100, 1, day(1, 8)}, {0x100, 1, day(1, 8)}, {0x200, 2, day(1, 20)},
		{0x300, 3, day(2, 10)}, {0x400, 4, day(2, 9)}, // the clock went back
		{0x500, 5, day(3, 8)}, {0x500, 5, day(3, 8)}, {0x500, 5, day(3, 8)}, {0x600, 6, day(4, 8)}})
	opt := RevisionOptions{Now: day(4, 10), Zone: berlin}
	for _, c := range []struct {
		text string
		want Position
		how  string
	}{
		{"HEAD", 9, "position 9"},
		{"HEAD~1", 8, "position 8, 1 before the head"},
		{"HEAD~2", 7, "position 7, 2 before the head, in the middle of a transaction of the source"},
		{"3", 3, "position 3"},
		{"1", 1, "position 1, in the middle of a transaction of the source"},
		{"9", 9, "position 9"},
		{"0/100", 2, "position 2, the last event committed until 0/100"},
		{"0/1FF", 2, "position 2, the last event committed until 0/1FF"},
		{"0/4FF", 5, "position 5, the last event committed until 0/4FF"},
		{"0/500", 8, "position 8, the last event committed until 0/500"},
		{"1/0", 9, "position 9, the last event committed until 1/0; the log has the source until 0/664"},
		{"2026-11-01", 3, "position 3, the last event until 2026-11-01 23:59:59.999999 Europe/Berlin"},
		{"2026-11-01 08:00", 2, "position 2, the last event until 2026-11-01 08:00:00 Europe/Berlin"},
		{"2026-11-02 09:30", 3, "position 3, the last event until 2026-11-02 09:30:00 Europe/Berlin"}, // not 5: event 4 is later
		{"2026-11-02 10:00", 5, "position 5, the last event until 2026-11-02 10:00:00 Europe/Berlin"},
		{"2026-11-02T09:30:00Z", 5, "position 5, the last event until 2026-11-02 09:30:00 UTC"},
		{"yesterday", 8, "position 8, the last event until 2026-11-03 23:59:59.999999 Europe/Berlin"},
		{"2 days ago", 5, "position 5, the last event until 2026-11-02 10:00:00 Europe/Berlin"},
		{"now", 9, "position 9, the last event until 2026-11-04 10:00:00 Europe/Berlin"},
		{"2030-01-01", 9, "position 9, the head (2030-01-01 23:59:59.999999 Europe/Berlin is in the future)"},
	} {
		r, err := l.Resolve(context.Background(), c.text, opt)
		if err != nil {
			t.Errorf("%q: %v", c.text, err)
		} else if r.Position != c.want || r.How != c.how || r.Text != c.text || r.String() != c.how {
			t.Errorf("%q: %+v, want %d, %q", c.text, r, c.want, c.how)
		}
	}
	for _, text := range []string{"2026-10-31", "0", "0/FF", "HEAD~9", "HEAD~1000", "10 years ago"} {
		r, err := l.Resolve(context.Background(), text, opt)
		if !errors.Is(err, ErrBeforeHistory) || r.Position != 0 {
			t.Errorf("%q: %+v, %v", text, r, err)
		} else if want := "The history begins at 2026-11-01 08:00:00 Europe/Berlin; its first event, position 1, is of 2026-11-01 08:00:00 Europe/Berlin."; Hint(err) != want {
			t.Errorf("%q: the hint is %q", text, Hint(err))
		} else if want := fmt.Sprintf("revision %q lies before the history begins", text); err.Error() != want {
			t.Errorf("%q: %v", text, err)
		}
	}
	_, err := l.Resolve(context.Background(), "10", opt)
	if err == nil || err.Error() != `revision "10" is beyond the head of the log, position 9` || Hint(err) == "" {
		t.Errorf("beyond the head: %v", err)
	}
}

func TestResolveInAnEmptyLog(t *testing.T) {
	l := makeLog(t, 4, nil)
	for _, text := range []string{"HEAD", "now", "2020-01-01", "0/10"} {
		if r, err := l.Resolve(context.Background(), text, RevisionOptions{}); err != nil || r.Position != 0 {
			t.Errorf("%q: %+v %v", text, r, err)
		}
	}
}

func TestResolveFindsTheFirstLaterEventHoweverTimesAreOrdered(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var events []logEvent
	lsn := LSN(0x100000)
	for i := range 5000 {
		if i == 3000 {
			lsn -= 0x8000 // a lossy failover: LSNs are used again
		}
		lsn += LSN(r.IntN(3)) * 8
		jitter := time.Duration(r.IntN(2000)) * time.Millisecond
		if r.IntN(500) == 0 {
			jitter = time.Duration(r.IntN(2e6)) * time.Millisecond
		}
		events = append(events, logEvent{lsn, 1, start.Add(time.Duration(i)*time.Second + jitter)})
	}
	l := makeLog(t, 1300, events)
	for range 60 {
		at := start.Add(time.Duration(r.IntN(5200e3)) * time.Millisecond)
		want := slices.IndexFunc(events, func(e logEvent) bool { return e.at.After(at) })
		if want < 0 {
			want = len(events)
		}
		got, err := l.lastUntil(context.Background(), at, Position(len(events)))
		if err != nil || got != Position(want) {
			t.Fatalf("%v: %d %v, want %d", at, got, err, want)
		}
		lsn := events[r.IntN(len(events))].lsn + LSN(r.IntN(8))
		want = len(events)
		for want > 0 && events[want-1].lsn > lsn {
			want--
		}
		got, err = l.lastAtLSN(context.Background(), lsn, Position(len(events)))
		if err != nil || got != Position(want) {
			t.Fatalf("%v: %d %v, want %d", lsn, got, err, want)
		}
	}
}

func TestResolveUsesTheBlockRangeIndex(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var events []logEvent
	for i := range 200_000 {
		events = append(events, logEvent{LSN(0x1000 + i), 1, start.Add(time.Duration(i) * time.Second)})
	}
	l := makeLog(t, 1e6, events)
	for _, at := range []int{1, 100_000, 199_998} {
		err := l.probing(context.Background(), func(p *prober) error {
			p.tx = explaining{t, p.tx}
			p.cond = "occurred_at > '" + start.Add(time.Duration(at)*time.Second).Format(time.RFC3339) + "'"
			if _, err := p.any(context.Background(), p.parts[0], 0, 200_000); err != nil {
				return err
			}
			_, err := p.least(context.Background(), p.parts[0], Position(at))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// explaining runs each query under EXPLAIN too, and fails the test if it reads much.
type explaining struct {
	t *testing.T
	pgx.Tx
}

func (e explaining) QueryRow(ctx context.Context, q string, args ...any) pgx.Row {
	rows, err := e.Query(ctx, "EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF) "+q, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		e.t.Fatal(err)
	}
	plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		e.t.Fatal(err)
	}
	text := strings.Join(plan, "\n")
	var hit, read int
	for _, line := range plan {
		if _, rest, ok := strings.Cut(line, "Buffers: shared "); ok {
			for f := range strings.FieldsSeq(rest) {
				_, _ = fmt.Sscanf(f, "hit=%d", &hit)
				_, _ = fmt.Sscanf(f, "read=%d", &read)
			}
			break
		}
	}
	if !strings.Contains(text, "Bitmap Index Scan") || hit+read > 200 {
		e.t.Errorf("%s\nreads %d pages:\n%s", q, hit+read, text)
	}
	return e.Tx.QueryRow(ctx, q, args...)
}
