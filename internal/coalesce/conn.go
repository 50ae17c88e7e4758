// Package coalesce makes few large reads of many small ones. A server that sends much in small pieces (a change of the replication
// stream, 8 kB of a COPY) wakes whoever waits for its socket with each of them, which costs both sides more than the data. A reader
// that lets data gather while it is behind is woken once for many.
package coalesce

import (
	"net"
	"sync/atomic"
	"time"
)

// Conn is a connection whose reads are coalesced. What is not commented as usable by any goroutine belongs to the one that reads.
type Conn struct {
	net.Conn
	// Gather is how long to wait before the next read from the network; 0: not at all.
	Gather time.Duration
	// Enough bytes in one read make the next one come without waiting: the sender is ahead. 0: it always waits.
	Enough int
	// BeforeRead, if not nil, is called before each wait for the network, with everything received used up, and says how long that
	// may take; it may do other work first. AfterRead is called when something was received. Both only while Streaming is true.
	BeforeRead func() time.Duration
	AfterRead  func()
	// Streaming may be set by any goroutine; the hooks must not change meanwhile.
	Streaming atomic.Bool

	size int // of buf
	buf  []byte
	r, w int
}

// SetDeadline is called by who ends the connection, in a goroutine of its own that then reads what is left: the hooks, which belong
// to the one that has read so far, come no more.
func (c *Conn) SetDeadline(t time.Time) error {
	c.Streaming.Store(false)
	return c.Conn.SetDeadline(t)
}

// New makes reads of up to size bytes of the connection's.
func New(c net.Conn, size int) *Conn { return &Conn{Conn: c, size: size} }

// Read gives what has been received; when that is used up it waits for more.
func (c *Conn) Read(p []byte) (int, error) {
	if c.r == c.w {
		streaming := c.Streaming.Load()
		if streaming && c.BeforeRead != nil {
			wait := c.BeforeRead()
			if c.Gather > 0 {
				Pause(c.Gather)
				wait = max(0, wait-c.Gather)
			}
			if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
				return 0, err
			}
		} else if c.Gather > 0 && (c.Enough == 0 || c.w < c.Enough) {
			Pause(c.Gather)
		}
		if c.Gather == 0 && !streaming { // question and answer: nothing would come together
			return c.Conn.Read(p)
		}
		if c.buf == nil {
			c.buf = make([]byte, c.size)
		}
		n, err := c.Conn.Read(c.buf)
		if n == 0 {
			return 0, err
		}
		c.r, c.w = 0, n
		if streaming && c.AfterRead != nil {
			c.AfterRead()
		}
	}
	n := copy(p, c.buf[c.r:c.w])
	c.r += n
	return n, nil
}
