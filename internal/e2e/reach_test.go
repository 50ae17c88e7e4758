package e2e

import (
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMomentThatTheLogHasNotReached: whoever asks for the tables as of a moment is told where the log may lack what was committed by then; and not where
// it has everything, be it that nobody has written for long.
func TestMomentThatTheLogHasNotReached(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things VALUES (1, 'a')`)
	s.init()
	s.env = append(s.env, "BACKSTORY_HTTP_ADDR="+free(t)) // by which the others ask it
	p := s.command(true, "run")
	l := s.logSQL()
	eventually(t, time.Minute, "the row is in the log", func() (bool, error) {
		return l.one(`SELECT count(*) FROM backstory.captured WHERE complete`) == "1", nil
	})
	warned := func(args ...string) bool {
		t.Helper()
		p := s.command(true, args...)
		if p.wait(time.Minute) != 0 {
			t.Fatalf("%v:\n%s", args, p.out)
		}
		return strings.Contains(p.out.String(), "warning:")
	}
	time.Sleep(3 * time.Second)
	if warned("show", "things/1", "--at", "1 second ago") {
		t.Error("a warning, although the log has everything")
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	p.wait(time.Minute)
	if warned("show", "things/1", "--at", "1 second ago") {
		t.Error("a warning without a sidecar, although the log has everything")
	}
	db.do(`UPDATE public.things SET v = 'b'`)
	at := db.one(`SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')`)
	time.Sleep(100 * time.Millisecond)
	s.says(0, "the log is behind the source (", "checkout", "--at", at, "--schema", "past", "--database", s.cfg.Capture.URL)
	s.says(0, "; no sidecar runs): what was committed meanwhile is not part of this", "show", "things/1", "--at", at)
	if got := db.one(`SELECT v FROM past.things`); got != "a" {
		t.Errorf("the log had %s", got)
	}
	s.once()
	if warned("show", "things/1", "--at", at) {
		t.Error("a warning, although the log has caught up")
	}
	s.says(0, "b", "show", "things/1", "--at", at)
}

// free gives an address of this machine that nobody listens on.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
