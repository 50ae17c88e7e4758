package capture

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// readBytes is how much one read of the replication connection takes at most.
const readBytes = 512 << 10

// gatherPause is how long a reader that is behind waits before it reads again. The server sends each change by a send() of
// its own, and on one machine each of them wakes whoever waits for the socket: data that gathers meanwhile costs neither
// side a wake-up.
const gatherPause = 200 * time.Microsecond

// conn is the replication connection as pgconn sees it: large reads, and a hook before each wait for the network.
type conn struct {
	net.Conn
	buf        []byte
	r, w       int
	gather     time.Duration        // to wait before the next read; owned by the reading goroutine
	streaming  atomic.Bool          // the following are called, which must not change meanwhile
	beforeRead func() time.Duration // how long the next read may wait; it may do other work first
	afterRead  func()               // something was received
}

func newConn(c net.Conn) *conn {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetReadBuffer(4 << 20)
		_ = t.SetKeepAlivePeriod(15 * time.Second)
	}
	return &conn{Conn: detach(c), buf: make([]byte, readBytes)}
}

// Read gives what has been received; when that is used up it waits for more, at most as long as beforeRead allows.
func (c *conn) Read(p []byte) (int, error) {
	if c.r == c.w {
		streaming := c.streaming.Load()
		if streaming {
			wait := c.beforeRead()
			if c.gather > 0 {
				pause(c.gather)
				wait = max(0, wait-c.gather)
			}
			if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
				return 0, err
			}
		}
		n, err := c.Conn.Read(c.buf)
		if n == 0 {
			return 0, err
		}
		c.r, c.w = 0, n
		if streaming {
			c.afterRead()
		}
	}
	n := copy(p, c.buf[c.r:c.w])
	c.r += n
	return n, nil
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}
