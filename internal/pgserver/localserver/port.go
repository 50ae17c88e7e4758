package localserver

import (
	"errors"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
)

// The ports lie below those that systems give to outgoing connections (32768 and up on Linux, 49152 and up on macOS).
// Otherwise a client that keeps dialling a stopped server's port would sooner or later be given that very port as its
// own, be connected to itself, and keep the server from coming back.
const firstPort, lastPort = 20000, 32767

var handedOut = struct {
	mu    sync.Mutex // guards the following
	ports map[int]bool
}{ports: map[int]bool{}}

// FreePort returns a TCP port of 127.0.0.1 on which nobody listens now. It gives each port to one caller only; against
// other processes the caller has to be ready to try another (see PortFree).
func FreePort() (int, error) {
	handedOut.mu.Lock()
	defer handedOut.mu.Unlock()
	for range 1000 {
		port := firstPort + rand.IntN(lastPort-firstPort+1)
		if !handedOut.ports[port] && PortFree(port) {
			handedOut.ports[port] = true
			return port, nil
		}
	}
	return 0, errors.New("find a free port: none in 1000 tries")
}

// PortFree reports whether a server can listen on the port of 127.0.0.1 now.
func PortFree(port int) bool {
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return false
	}
	l.Close()
	return true
}
