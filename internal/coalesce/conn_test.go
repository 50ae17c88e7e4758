package coalesce

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// pair gives both ends of a connection over the network stack.
func pair(t *testing.T, network string) (client, server net.Conn) {
	t.Helper()
	addr := "127.0.0.1:0"
	if network == "unix" {
		addr = t.TempDir() + "/s"
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		got <- c
	}()
	if client, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	server = <-got
	t.Cleanup(func() { _, _ = client.Close(), server.Close() })
	return client, server
}

// What is sent in small pieces is read in few large ones, byte for byte; without Gather nothing waits.
func TestReadsAreCoalesced(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			client, server := pair(t, network)
			c := New(Detach(client), 64<<10)
			defer c.Close()
			if _, err := server.Write([]byte("?")); err != nil {
				t.Fatal(err)
			}
			one := make([]byte, 10)
			if n, err := c.Read(one); n != 1 || err != nil {
				t.Fatalf("without Gather: %d, %v", n, err)
			}
			const pieces, size = 200, 100
			go func() {
				for i := range pieces {
					_, _ = server.Write(make([]byte, size-1))
					_, _ = server.Write([]byte{byte(i)})
				}
			}()
			c.Gather = 20 * time.Millisecond
			buf := make([]byte, pieces*size)
			began := time.Now()
			if _, err := io.ReadFull(c, buf); err != nil {
				t.Fatal(err)
			}
			for i := range pieces {
				if buf[(i+1)*size-1] != byte(i) {
					t.Fatalf("piece %d ends with %d", i, buf[(i+1)*size-1])
				}
			}
			// Each read from the network waited: there were few of them.
			if took := time.Since(began); took < c.Gather || took > 20*c.Gather {
				t.Errorf("reading took %s", took)
			}
			c.Enough = 1 // one byte in the last read was enough
			began = time.Now()
			if _, err := server.Write([]byte("!")); err != nil {
				t.Fatal(err)
			}
			if n, err := c.Read(one); n != 1 || err != nil || time.Since(began) > c.Gather {
				t.Errorf("with enough in the read before: %d, %v after %s", n, err, time.Since(began))
			}
		})
	}
}

// Whoever ends a connection reads what is left without the hooks, which use what belongs to somebody else.
func TestNoHooksOnceItIsEnded(t *testing.T) {
	client, server := pair(t, "tcp")
	c := New(Detach(client), 64<<10)
	defer c.Close()
	var before, after int
	c.BeforeRead = func() time.Duration { before++; return time.Second }
	c.AfterRead = func() { after++ }
	c.Streaming.Store(true)
	read := func() {
		t.Helper()
		if _, err := server.Write([]byte("?")); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 10)); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	if read(); before != 1 || after != 1 {
		t.Fatalf("hooks called %d and %d times", before, after)
	}
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if read(); before != 1 || after != 1 {
		t.Errorf("hooks called %d and %d times after the end", before, after)
	}
}

// A detached connection keeps its deadlines, says that it is at its end, and is woken by Close.
func TestDetachedConnection(t *testing.T) {
	client, server := pair(t, "tcp")
	c := Detach(client)
	buf := make([]byte, 10)
	if err := c.SetReadDeadline(time.Now().Add(30 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if n, err := io.ReadFull(server, buf[:5]); n != 5 || err != nil || string(buf[:5]) != "hello" {
		t.Errorf("the other end got %q, %v", buf[:n], err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 10))
		ended <- err
	}()
	time.Sleep(20 * time.Millisecond) // most likely it waits by then; if not, it has to end all the same
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a read of a closed connection gives no error")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Close does not wake a read")
	}
}
