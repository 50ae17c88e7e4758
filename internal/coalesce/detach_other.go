//go:build !linux

package coalesce

import (
	"net"
	"time"
)

// Detach does nothing where sockets outside the network poller are not worth their while.
func Detach(c net.Conn) net.Conn { return c }

func Pause(d time.Duration) { time.Sleep(d) }
