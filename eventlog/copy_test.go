package eventlog_test

import (
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// TestReadingThatIsCutShort: whoever ends a reading in the middle of a long answer gets what he ended it with, and can read again. What
// is left of the answer is read by another goroutine, which the race detector looks at: it waits here for that to have begun.
func TestReadingThatIsCutShort(t *testing.T) {
	t.Parallel()
	l := newLog(t, eventlog.Config{})
	w, s := newWriter(t, l), &source{}
	r, note := table("orders", 20, 'd'), strings.Repeat("x", 1000)
	const rows = 3000
	var items []eventlog.Item
	for i := range rows {
		items = append(items, change(eventlog.OpInsert, r, nil, row(strconv.Itoa(i), "new", note, "1")))
	}
	appendAll(t, w, s.tx(items...))
	enough, read := errors.New("enough"), 0
	for range 3 {
		read = 0
		err := l.Read(t.Context(), eventlog.Selection{}, func(e *eventlog.Event) error {
			if read++; read == 500 { // by then the connection gathers
				return enough
			}
			return nil
		})
		if err != enough || read != 500 {
			t.Fatalf("after %d: %v", read, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	read = 0
	if err := l.Read(t.Context(), eventlog.Selection{}, func(*eventlog.Event) error { read++; return nil }); err != nil || read != rows {
		t.Errorf("%d read, %v", read, err)
	}
}
