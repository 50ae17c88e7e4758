package eventlog

import (
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// limitUnanswered bounds how long what was sent over a connection may stay unacknowledged: TCP alone tries for a quarter of an hour (tcp(7),
// TCP_USER_TIMEOUT).
func limitUnanswered(network, _ string, c syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter.Milliseconds()))
	}); e != nil {
		return e
	}
	return err
}
