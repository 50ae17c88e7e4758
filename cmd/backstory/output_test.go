package main

import (
	"bufio"
	"bytes"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/backstory-dev/backstory/eventlog"
)

func TestProgressBar(t *testing.T) {
	var w bytes.Buffer
	p := &progressBar{w: &w}
	began := time.Date(2026, 10, 31, 14, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		after       time.Duration
		what        string
		done, total int64
		want        string // empty: nothing new is shown
	}{
		{0, "reading", 0, 3_000_000, "reading [                              ]   0 %"},
		{50 * time.Millisecond, "reading", 10_000, 3_000_000, ""},
		{200 * time.Millisecond, "reading", 50_000, 3_000_000, "reading [                              ]   1 %"},
		{2 * time.Second, "reading", 500_000, 3_000_000, "reading [=====                         ]  16 %, 250,000/s, 10s left"},
		{12 * time.Second, "reading", 2_999_999, 3_000_000, "reading [============================= ]  99 %, 249,999/s, 0s left"},
		{12 * time.Second, "writing", 0, 0, ""},
		{13 * time.Second, "writing", 1, 1, "writing [==============================] 100 %, 1/s"},
		{15 * time.Second, "writing", 90, 100_000_000, "writing [                              ]   0 %, 30/s, 925h56m left"},
	} {
		w.Reset()
		p.update(began.Add(c.after), c.what, c.done, c.total)
		got := w.String()
		if c.want != "" {
			c.want = "\r\x1b[K" + c.want
		}
		if got != c.want {
			t.Errorf("after %s: %q, want %q", c.after, got, c.want)
		}
	}
	w.Reset()
	p.end()
	if w.String() != "\r\x1b[K" {
		t.Errorf("the end: %q", w.String())
	}
	nobody := &progressBar{}
	nobody.update(began, "reading", 1, 2) // off a terminal it is nothing
	nobody.end()
}

func TestCountsAndSizes(t *testing.T) {
	for _, c := range []struct{ got, want string }{
		{counted(0, "event"), "0 events"}, {counted(1, "event"), "1 event"}, {counted(1_234_567, "row"), "1,234,567 rows"}, {countText(-1234), "-1,234"},
		{bytesText(0), "0 B"}, {bytesText(1023), "1023 B"}, {bytesText(1 << 10), "1.0 kB"}, {bytesText(14<<30 + 1<<29), "14.5 GB"}, {bytesText(-1), "no limit"},
	} {
		if c.got != c.want {
			t.Errorf("%q, want %q", c.got, c.want)
		}
	}
}

// Colours change nothing but the colours, the columns least of all.
func TestColours(t *testing.T) {
	now := time.Date(2026, 10, 31, 14, 0, 0, 0, time.UTC)
	e := &eventlog.Event{Position: 7, Aggregate: "Order", AggregateID: "17", Type: "OrderDeleted", Op: eventlog.OpDelete, OccurredAt: now.Add(-time.Hour),
		Before: []byte(`{"id":17,"status":"paid"}`), Metadata: []byte(`{"actor":"ann","reason":"refund"}`)}
	plain, coloured := new(columns).eventLine(&screen{}, e, now), new(columns).eventLine(&screen{color: true}, e, now)
	if want := "      7  60 minutes ago   ann               OrderDeleted      Order/17    status: paid  (refund)"; plain != want {
		t.Errorf("%q\nwant %q", plain, want)
	}
	if bare := regexp.MustCompile("\x1b\\[[0-9]+m").ReplaceAllString(coloured, ""); bare != plain || strings.Count(coloured, "\x1b") != 10 {
		t.Errorf("%q", coloured)
	}
}

// A row that a comparison has found to be gone does not look like one that it has found to be there.
func TestHealedLines(t *testing.T) {
	for _, c := range []struct {
		op   eventlog.Op
		want string
	}{
		{eventlog.OpImport, "CustomerHealed    Customer/17  name: ann"},
		{eventlog.OpUpdate, "CustomerHealed    Customer/17  name: bob → ann"},
		{eventlog.OpDelete, "CustomerHealed    Customer/17  [gone]  name: bob"},
	} {
		e := &eventlog.Event{Position: 7, Aggregate: "Customer", AggregateID: "17", Type: "CustomerHealed", Op: c.op}
		if c.op != eventlog.OpDelete {
			e.Data = []byte(`{"name":"ann"}`)
		}
		if c.op != eventlog.OpImport {
			e.Before = []byte(`{"name":"bob"}`)
		}
		if got := new(columns).eventLine(&screen{}, e, time.Time{}); !strings.HasSuffix(got, c.want) {
			t.Errorf("%q, want %q", got, c.want)
		}
		e.Before = nil
		if got := new(columns).eventLine(&screen{}, e, time.Time{}); c.op == eventlog.OpDelete && !strings.HasSuffix(got, "Customer/17  [gone]") {
			t.Errorf("where nothing is known of it: %q", got)
		}
	}
}

// A gap's line says why first, and when it was found if that is long after the commit whose time it has.
func TestLineOfAGap(t *testing.T) {
	why := "replication slot backstory was moved or made again; what changed meanwhile is not in the stream"
	e := &eventlog.Event{Position: 7, Aggregate: "Source", AggregateID: "backstory", Type: "SourceGap", Op: eventlog.OpGap, OccurredAt: time.Date(2024, 3, 1, 12, 0, 0, 0, time.UTC)}
	line := func(found string, iso bool) string {
		e.Data = []byte(`{"found_at":"` + found + `","from_lsn":"0/1","reason":"` + why + `","to_lsn":"0/2"}`)
		return (&columns{iso: iso}).eventLine(&screen{}, e, time.Date(2024, 3, 1, 17, 0, 0, 0, time.UTC))
	}
	if got := line("2024-03-01T16:57:00.5Z", false); !strings.Contains(got, "5 hours ago") || !strings.HasSuffix(got, "  reason: "+why+", … 2 more  [found 2 minutes ago]") {
		t.Errorf("found late: %s", got)
	}
	if got := line("2024-03-01T16:57:00.5Z", true); !strings.HasSuffix(got, "  [found at 2024-03-01T16:57:00.500Z]") {
		t.Errorf("found late, in UTC: %s", got)
	}
	if got := line("2024-03-01T12:00:59Z", false); strings.Contains(got, "found") {
		t.Errorf("found at once: %s", got)
	}
	var b bytes.Buffer
	s := &screen{Writer: bufio.NewWriter(&b)}
	e.Type, e.AggregateID, e.Relation = "OrderGap", "", &eventlog.Relation{Schema: "public", Name: "orders"}
	printEvent(s, e)
	_ = s.Flush()
	if got := b.String(); !strings.Contains(got, "\ntable        public.orders\n") || !strings.Contains(got, "\nnote         its time is that of the commit before it") {
		t.Errorf("show:\n%s", got)
	}
}

// What is long does not hide what has changed, and columns stay columns.
func TestLongValues(t *testing.T) {
	long := strings.Repeat("The same words come first. ", 4)
	for _, c := range []struct{ old, value, want string }{
		{`"a"`, `"b"`, "a → b"},
		{`null`, `"b, c"`, `null → "b, c"`},
		{"", `1`, "(not known) → 1"},
		{`"` + long + `ann"`, `"` + long + `bob"`, "…come first. ann → …come first. bob"},
		{`"` + long + `"`, `"` + long + `bob"`, "…come first.  → …come first. bob"},
		{`"x"`, `"` + long + `"`, "x → The same words come first. The same words come …"},
		{`"äöü"`, `"äöß"`, "äöü → äöß"},
	} {
		var old []byte
		if c.old != "" {
			old = []byte(c.old)
		}
		if got := fromTo(old, []byte(c.value)); got != c.want {
			t.Errorf("%s to %s: %q, want %q", c.old, c.value, got, c.want)
		}
	}
	e := func(actor, id, data string) *eventlog.Event {
		return &eventlog.Event{Position: 7, Aggregate: "Order", AggregateID: id, Type: "OrderCreated", Op: eventlog.OpInsert, Data: []byte(data), Metadata: []byte(`{"actor":"` + actor + `"}`)}
	}
	var c columns
	long36 := "0191f2a4-7b1c-7c3d-9e2f-3a4b5c6d7e8f"
	lines := []string{
		c.eventLine(&screen{}, e(strings.Repeat("x", 50), long36, `{"a":1}`), time.Time{}),
		c.eventLine(&screen{}, e("ann", "17", `{"a":1}`), time.Time{}),
	}
	if at := strings.Index(lines[0], "a: 1"); at < 0 || !strings.Contains(lines[0], long36) || utf8.RuneCountInString(lines[0][:at]) != utf8.RuneCountInString(lines[1][:strings.Index(lines[1], "a: 1")]) {
		t.Errorf("the columns differ:\n%s", strings.Join(lines, "\n"))
	}
	// Saying that there is one more would take as much room.
	wide := `{"a":"` + strings.Repeat("x", 40) + `","b":"` + strings.Repeat("y", 40) + `","c":"last"`
	if got := changes(e("", "1", wide+"}"), 90); !strings.HasSuffix(got, "c: last") {
		t.Errorf("%q", got)
	}
	if got := changes(e("", "1", wide+`,"d":"`+strings.Repeat("z", 40)+`"}`), 90); !strings.HasSuffix(got, ", … 2 more") {
		t.Errorf("%q", got)
	}
}
