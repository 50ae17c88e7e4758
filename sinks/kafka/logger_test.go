package kafka

import (
	"bytes"
	"log/slog"
	"sync"
)

// testLogger keeps what is logged.
type testLogger struct {
	mu  sync.Mutex // guards the following
	buf bytes.Buffer
}

func (l *testLogger) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *testLogger) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *testLogger) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }
