package capture

import (
	"errors"
	"io"
	"testing"
	"time"
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
