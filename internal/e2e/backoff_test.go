package e2e

import (
	"testing"
	"time"
)

// TestBackoff: a server that is away is asked again with growing pauses, whichever of the two it is, and whoever notices.
func TestBackoff(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name        string
		source, log bool // which of them is away
		start       bool // from the beginning
	}{
		{name: "source", source: true}, {name: "log", log: true}, {name: "both", source: true, log: true},
		{name: "source at the start", source: true, start: true}, {name: "log at the start", log: true, start: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{apart: true})
			db := s.sql()
			db.do(simple)
			s.init()
			l := s.logSQL()
			var away *proxy
			if c.source {
				away = newProxy(t, s.cfg.Capture.URL)
				s.cfg.Capture.URL = away.through(s.cfg.Capture.URL)
			}
			if c.log {
				p := newProxy(t, s.cfg.Log.URL)
				s.cfg.Log.URL = p.through(s.cfg.Log.URL)
				if away != nil {
					p.refuse()
				} else {
					away = p
				}
			}
			if c.start {
				away.refuse()
			}
			p := s.command(false, "run")
			if !c.start && !(c.source && c.log) {
				db.do(`INSERT INTO public.things VALUES (1, 'a')`)
				s.reached(l, p, 1)
			}
			away.refuse()
			if c.log {
				db.do(`INSERT INTO public.things VALUES (2, 'a')`) // something to append
			}
			eventually(t, 20*time.Second, "it tries to connect", func() (bool, error) { return len(away.attempts()) > 0, nil })
			time.Sleep(4 * time.Second)
			list := away.attempts()
			var gaps []time.Duration
			for i := range list[1:] {
				gaps = append(gaps, list[i+1].Sub(list[i]).Round(time.Millisecond))
			}
			t.Logf("pauses: %v", gaps)
			// 100 ms, 200 ms … each between a half and one and a half times that.
			if n := len(gaps); n < 2 || n > 12 {
				t.Errorf("in 4 s it tried %d times again", n)
			} else if longest := gaps[n-1] + gaps[n-2]; longest < 600*time.Millisecond {
				t.Errorf("the last pauses are not longer than the first: %v", gaps)
			}
			if !p.running() {
				t.Errorf("it ended:\n%s", p.out.tail(10))
			}
		})
	}
}
