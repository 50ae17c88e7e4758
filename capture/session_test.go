package capture

import (
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/eventlog"
)

// While nobody takes a full batch nothing is read: the source is told all the same that somebody is there, and is not taken
// for silent afterwards.
func TestHandingOverABatchKeepsTheSourceInformed(t *testing.T) {
	x, _ := offline()
	x.alive = 200 * time.Millisecond
	told := make(chan byte, 10)
	x.send = func(b []byte) error { told <- b[0]; return nil }
	x.lastSeen.Store(time.Now().Add(-deadAfter).UnixNano())
	x.lastTold = time.Now()
	handed := make(chan error, 1)
	go func() { handed <- x.hand() }()
	for range 2 {
		select {
		case kind := <-told:
			if kind != 'r' {
				t.Fatalf("it sent %q", kind)
			}
		case <-time.After(3 * statusEvery):
			t.Fatal("the source hears nothing")
		}
	}
	<-x.Batches()
	if err := <-handed; err != nil {
		t.Fatal(err)
	}
	if silent := time.Since(x.LastSeen()); silent > deadAfter/2 {
		t.Errorf("the source counts as silent for %s", silent)
	}
}

// A log that does not answer keeps no source from shutting down, and what it has not taken it meets in no later session: its writer
// would add the transaction that comes again to the part of it that it has.
func TestBatchThatNobodyTakes(t *testing.T) {
	x, _ := offline()
	x.alive = 200 * time.Millisecond
	x.stopped.Store(&stop{err: errLeaving})
	if err := x.hand(); err != errLeaving {
		t.Errorf("while the source waits for its clients to leave, handing over ends with %v", err)
	}
	err := x.handLast(10 * time.Millisecond)
	if err == nil {
		t.Fatal("nobody has taken it")
	}
	for _, cause := range []error{nil, errLeaving, io.ErrUnexpectedEOF} {
		if retryable(errors.Join(cause, err)) {
			t.Errorf("after %v the same writer gets another session", cause)
		}
		if cause != nil && !retryable(cause) {
			t.Errorf("%v by itself passes", cause)
		}
	}
}

// TestWhatTheSourceEndsTheStreamWith: an internal error of its decoding is tried again, since each that was seen was gone then; what is a gap, or a person's to
// mend, is not.
func TestWhatTheSourceEndsTheStreamWith(t *testing.T) {
	for _, c := range []struct {
		code, message string
		again, gap    bool
	}{
		{"XX000", "pg_attribute catalog is missing 4 attribute(s) for relation OID 30875", true, false},
		{"XX000", "could not open relation with OID 30875", true, false},
		{"XX000", "could not map filenumber \"base/5/30875\" to relation OID", true, false},
		{"XX000", "invalid memory alloc request size 1073741824", false, true},
		{"42704", "publication \"backstory\" does not exist", false, true},
		{"57P01", "terminating connection due to administrator command", true, false},
		{"42501", "permission denied", false, false},
	} {
		err := streamError(&pgconn.PgError{Code: c.code, Message: c.message}, Config{Slot: "backstory"})
		var g *Gap
		if got := errors.As(err, &g); got != c.gap || retryable(err) != c.again {
			t.Errorf("%s %s: gap %v, tried again %v", c.code, c.message, got, retryable(err))
		}
		if c.again && strings.HasPrefix(c.code, "XX") && eventlog.Hint(err) == "" {
			t.Errorf("%s %s: no hint", c.code, c.message)
		}
	}
}
