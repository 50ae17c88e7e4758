package coalesce

import (
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// Detach takes a connection away from Go's network poller. The poller's epoll is woken by every packet that arrives, also
// while nobody reads; for a stream of small packets that costs more than decoding them. What comes back reads and writes
// with blocking system calls whose time limits are socket options.
func Detach(c net.Conn) net.Conn {
	f, ok := c.(interface{ File() (*os.File, error) })
	if !ok {
		return c
	}
	dup, err := f.File() // a duplicate, in blocking mode
	if err != nil {
		return c
	}
	fd := int(dup.Fd())
	own, err := syscall.Dup(fd)
	_ = dup.Close()
	if err != nil {
		return c
	}
	syscall.CloseOnExec(own)
	if err := syscall.SetNonblock(own, false); err != nil {
		_ = syscall.Close(own)
		return c
	}
	b := &blockingConn{fd: own, local: c.LocalAddr(), remote: c.RemoteAddr()}
	_ = c.Close() // the poller forgets the socket, which lives on in our descriptor
	return b
}

// Pause is time.Sleep that can be shorter than a millisecond, which is what Go's own timers take at least while nothing else
// runs: longer than it takes the server to fill the socket's buffer. A longer system call would keep Go's scheduler awake.
func Pause(d time.Duration) {
	if d >= time.Millisecond {
		time.Sleep(d)
		return
	}
	ts := syscall.NsecToTimespec(int64(d))
	_ = syscall.Nanosleep(&ts, nil) // an early end does no harm
}

// blockingConn is a socket outside the network poller. One goroutine reads, one writes; Close and the deadlines may be
// used by any, and take effect at the next call (Close at once).
type blockingConn struct {
	fd            int
	local, remote net.Addr
	closed        atomic.Bool
	done          atomic.Int32 // calls under way; the last one after Close gives the descriptor back
	readBy        atomic.Int64 // unix nanoseconds; 0: no limit
	writeBy       atomic.Int64
	readOpt       time.Duration // what the socket option stands at
	writeOpt      time.Duration
}

func (b *blockingConn) enter() error {
	b.done.Add(1)
	if b.closed.Load() {
		b.leave()
		return net.ErrClosed
	}
	return nil
}

func (b *blockingConn) leave() {
	if b.done.Add(-1) == 0 && b.closed.Load() && b.done.CompareAndSwap(0, -1<<30) {
		_ = syscall.Close(b.fd)
	}
}

// limit brings the socket option in line with a deadline; it answers false where the deadline has passed.
func (b *blockingConn) limit(by int64, opt int, now *time.Duration) (bool, error) {
	var d time.Duration
	if by != 0 {
		if d = time.Duration(by - time.Now().UnixNano()); d <= 0 {
			return false, nil
		}
		d = max(d.Round(time.Millisecond), time.Millisecond) // coarse, so that it seldom changes
	}
	if d == *now {
		return true, nil
	}
	tv := syscall.NsecToTimeval(int64(d))
	if err := syscall.SetsockoptTimeval(b.fd, syscall.SOL_SOCKET, opt, &tv); err != nil {
		return false, os.NewSyscallError("setsockopt", err)
	}
	*now = d
	return true, nil
}

func (b *blockingConn) Read(p []byte) (int, error) {
	if err := b.enter(); err != nil {
		return 0, err
	}
	defer b.leave()
	by := b.readBy.Load()
	for {
		wait, err := b.limit(by, syscall.SO_RCVTIMEO, &b.readOpt)
		if err != nil {
			return 0, err
		}
		flags := 0
		if !wait {
			flags = syscall.MSG_DONTWAIT
		}
		n, _, err := syscall.Recvfrom(b.fd, p, flags)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			if by != 0 && b.readBy.Load() != 0 {
				return 0, os.ErrDeadlineExceeded
			}
			if by = b.readBy.Load(); b.closed.Load() {
				return 0, net.ErrClosed
			}
			continue
		case b.closed.Load():
			return 0, net.ErrClosed
		case err != nil:
			return 0, os.NewSyscallError("recv", err)
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

func (b *blockingConn) Write(p []byte) (int, error) {
	if err := b.enter(); err != nil {
		return 0, err
	}
	defer b.leave()
	n := 0
	for n < len(p) {
		wait, err := b.limit(b.writeBy.Load(), syscall.SO_SNDTIMEO, &b.writeOpt)
		if err != nil {
			return n, err
		}
		if !wait {
			return n, os.ErrDeadlineExceeded
		}
		m, err := syscall.SendmsgN(b.fd, p[n:], nil, nil, syscall.MSG_NOSIGNAL)
		switch {
		case err == syscall.EINTR, err == syscall.EAGAIN:
		case err != nil:
			return n, os.NewSyscallError("send", err)
		}
		n += max(m, 0)
	}
	return n, nil
}

func (b *blockingConn) Close() error {
	if b.closed.Swap(true) {
		return net.ErrClosed
	}
	b.done.Add(1)
	_ = syscall.Shutdown(b.fd, syscall.SHUT_RDWR) // wakes a call that waits
	b.leave()
	return nil
}

func (b *blockingConn) LocalAddr() net.Addr  { return b.local }
func (b *blockingConn) RemoteAddr() net.Addr { return b.remote }

func (b *blockingConn) SetDeadline(t time.Time) error {
	_ = b.SetReadDeadline(t)
	return b.SetWriteDeadline(t)
}

func (b *blockingConn) SetReadDeadline(t time.Time) error {
	b.readBy.Store(deadline(t))
	return nil
}

func (b *blockingConn) SetWriteDeadline(t time.Time) error {
	b.writeBy.Store(deadline(t))
	return nil
}

func deadline(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return max(t.UnixNano(), 1)
}
