//go:build !linux

package capture

import (
	"net"
	"time"
)

// detach does nothing where sockets outside the network poller are not worth their while.
func detach(c net.Conn) net.Conn { return c }

func pause(d time.Duration) { time.Sleep(d) }
