package capture

import (
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
