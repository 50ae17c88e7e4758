package e2e

import (
	"fmt"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backstory-dev/backstory/eventlog"
)

// TestHalfOpenConnections: a firewall that forgets connections, without a word to either end, costs a minute or two and no change. (Linux can play one.)
func TestHalfOpenConnections(t *testing.T) {
	for _, what := range []string{"source", "log"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{apart: true})
			db := s.sql()
			db.do(simple)
			s.init()
			direct := *s
			url := &s.cfg.Capture.URL
			if what == "log" {
				url = &s.cfg.Log.URL
			}
			p := newProxy(t, *url)
			*url = p.through(*url)
			run, l := s.start(), direct.openLog()
			at := func(position eventlog.Position) func() (bool, error) {
				return func() (bool, error) {
					h, err := l.Head(t.Context())
					return err == nil && h.Position >= position, fmt.Errorf("the log is at %v, the sidecar says: %v", h, run.sc.Ready())
				}
			}
			db.do(`INSERT INTO public.things VALUES (1, 'a')`)
			eventually(t, time.Minute, "it works", at(1))
			if n := p.forget(); n == 0 {
				t.Fatal("there are no connections")
			}
			began := time.Now()
			db.do(`INSERT INTO public.things VALUES (2, 'b')`)
			eventually(t, 2*time.Minute, "it goes on", at(2))
			t.Logf("it went on after %s", time.Since(began).Round(time.Second))
			if spent := time.Since(began); spent > 100*time.Second {
				t.Errorf("it went on after %s", spent)
			}
			if err := run.end(); err != nil {
				t.Fatal(err)
			}
			checkLog(t, l, "public.things").sameTables(t, db, "n.nspname = 'public'")
		})
	}
}

// forget makes all connections half-open, as a firewall does that has forgotten them: nothing that arrives is answered, not even by the
// kernel, and nobody is told. It tells how many.
func (p *proxy) forget() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		if err := ignoreAll(c.(*net.TCPConn)); err != nil {
			p.t.Fatal(err)
		}
	}
	return len(p.conns) / 2
}

// ignoreAll makes the kernel drop every packet that comes for a socket, before TCP sees it: a filter that lets nothing pass.
func ignoreAll(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	nothing := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing})
	})
	if err != nil {
		return err
	}
	return set
}
