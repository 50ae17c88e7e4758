package kafka

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// faults disturbs the Produce requests of a sink on their way to the broker.
type faults struct {
	mu    sync.Mutex // guards the following
	mode  faultMode
	left  int // so many requests are still to be disturbed
	count int // so many were
	delay time.Duration
	late  sync.WaitGroup // requests that are on their way although their sender is gone
}

type faultMode uint8

const (
	healthy      faultMode = iota
	loseRequest            // the connection breaks before the request
	loseHalf               // the connection breaks in the middle of the request
	loseResponse           // the broker has done what it was asked; the connection breaks before its answer
	delayRequest           // the connection breaks, and the request reaches the broker later
	unreachable            // nothing can be reached, from now on
)

// next makes the next n requests meet a fault.
func (f *faults) next(mode faultMode, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mode, f.left = mode, n
}

func (f *faults) met() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count
}

func (f *faults) take() (faultMode, time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left <= 0 || f.mode == healthy {
		return healthy, 0
	}
	f.left--
	f.count++
	return f.mode, f.delay
}

// dial is the dial of a sink under test.
func (f *faults) dial(ctx context.Context, network, address string) (net.Conn, error) {
	f.mu.Lock()
	down := f.mode == unreachable && f.left > 0
	f.mu.Unlock()
	if down {
		return nil, &net.OpError{Op: "dial", Net: network, Err: errors.New("connection refused (test)")}
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &faultConn{Conn: c, f: f}, nil
}

// faultConn takes the stream of requests apart: int32 length, int16 API key, …
type faultConn struct {
	net.Conn
	f       *faults
	left    int // bytes of the current request still to come
	mode    faultMode
	delay   time.Duration
	held    []byte
	dropped bool
}

var errCut = &net.OpError{Op: "write", Net: "tcp", Err: errors.New("connection cut (test)")}

func (c *faultConn) Write(p []byte) (int, error) {
	if c.dropped {
		return 0, errCut
	}
	if c.left == 0 {
		c.left = 4 + int(binary.BigEndian.Uint32(p))
		c.mode = healthy
		if key := binary.BigEndian.Uint16(p[4:]); key == 0 {
			c.mode, c.delay = c.f.take()
		}
	}
	c.left -= len(p)
	switch c.mode {
	case loseRequest, unreachable:
		return 0, c.cut()
	case loseHalf:
		_, _ = c.Conn.Write(p[:len(p)/2])
		return 0, c.cut()
	case delayRequest:
		c.held = append(c.held, p...)
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c *faultConn) Read(p []byte) (int, error) {
	switch {
	case c.dropped:
		return 0, io.EOF
	case c.mode == loseResponse && c.left == 0:
		_, _ = c.Conn.Read(p)
		return 0, c.cut()
	case c.mode == delayRequest && c.left == 0:
		c.dropped = true
		held, conn, delay := c.held, c.Conn, c.delay
		c.Conn = closed{c.Conn}
		c.f.late.Go(func() {
			defer conn.Close()
			time.Sleep(delay)
			_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := conn.Write(held); err == nil {
				_, _ = conn.Read(make([]byte, 1<<10))
			}
		})
		return 0, io.EOF
	}
	return c.Conn.Read(p)
}

func (c *faultConn) cut() error {
	c.dropped = true
	_ = c.Conn.Close()
	return errCut
}

// closed is a connection that belongs to somebody else now.
type closed struct{ net.Conn }

func (closed) Close() error                { return nil }
func (closed) SetDeadline(time.Time) error { return nil }
