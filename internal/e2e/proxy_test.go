package e2e

import (
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"
)

// proxy is a network between a program and a server, which can be cut.
type proxy struct {
	t  testing.TB
	l  net.Listener
	wg sync.WaitGroup

	mu       sync.Mutex // guards the following
	target   string
	conns    map[net.Conn]bool
	refusing bool
	refused  []time.Time // when somebody wanted to connect meanwhile
}

// newProxy listens before the server of a URL.
func newProxy(t testing.TB, raw string) *proxy {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, target: u.Host, l: l, conns: map[net.Conn]bool{}}
	p.wg.Go(p.accept)
	t.Cleanup(func() {
		_ = l.Close()
		p.cut()
		p.wg.Wait()
	})
	return p
}

// through gives the URL that leads through the proxy.
func (p *proxy) through(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		p.t.Fatal(err)
	}
	u.Host = p.l.Addr().String()
	return u.String()
}

func (p *proxy) accept() {
	for {
		c, err := p.l.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		refuse, target := p.refusing, p.target
		if refuse {
			p.refused = append(p.refused, time.Now())
		}
		p.mu.Unlock()
		if refuse {
			_ = c.Close()
			continue
		}
		s, err := net.Dial("tcp", target)
		if err != nil {
			_ = c.Close()
			continue
		}
		p.mu.Lock()
		p.conns[c], p.conns[s] = true, true
		p.mu.Unlock()
		pump := func(to, from net.Conn) {
			_, _ = io.Copy(to, from)
			_ = to.Close()
			_ = from.Close()
			p.mu.Lock()
			delete(p.conns, from)
			p.mu.Unlock()
		}
		p.wg.Go(func() { pump(c, s) })
		p.wg.Go(func() { pump(s, c) })
	}
}

// leadTo leads to another server from now on.
func (p *proxy) leadTo(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = target
}

// refuse lets nobody connect any more, and cuts.
func (p *proxy) refuse() {
	p.mu.Lock()
	p.refusing = true
	p.mu.Unlock()
	p.cut()
}

// attempts gives the times of attempts to connect while it refuses; what comes close together is one.
func (p *proxy) attempts() (list []time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var last time.Time
	for _, t := range p.refused {
		if t.Sub(last) > 40*time.Millisecond {
			list = append(list, t)
		}
		last = t
	}
	return list
}

// cut ends all connections, in the middle of whatever is being said. It tells how many.
func (p *proxy) cut() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.conns) / 2
	for c := range p.conns {
		if t, ok := c.(*net.TCPConn); ok {
			_ = t.SetLinger(0) // a reset, not a farewell
		}
		_ = c.Close()
	}
	return n
}
