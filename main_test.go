package backstory

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

func TestMain(m *testing.M) {
	before := runtime.NumGoroutine()
	code := m.Run()
	pgservertest.StopShared()
	if left := leaked(before); left != "" {
		fmt.Fprintln(os.Stderr, left)
		code = 1
	}
	os.Exit(code)
}

// leaked waits until there are no more goroutines than before, or tells which there are.
func leaked(before int) string {
	http.DefaultClient.CloseIdleConnections()
	return pgservertest.Leaked(before, 10*time.Second)
}

// rig is a source with one table and its log.
type rig struct {
	t      *testing.T
	server *pgservertest.Server
	db     string
	cfg    Config
	app    *pgx.Conn
}

var rigs atomic.Int64

func quick() pgserver.Config {
	return pgserver.Config{Settings: map[string]string{"fsync": "off", "shared_buffers": "64MB", "max_replication_slots": "40", "max_wal_senders": "40"}}
}

// newRig makes slot and log; logServer, if not nil, is where the log is.
func newRig(t *testing.T, server, logServer *pgservertest.Server) *rig {
	t.Helper()
	r := &rig{t: t, server: server, db: server.NewDatabase(t)}
	r.cfg = Config{Capture: capture.Config{URL: server.URL(r.db), Slot: fmt.Sprintf("root_%d_%d", os.Getpid(), rigs.Add(1))}}
	if logServer != nil {
		r.cfg.Log.URL = logServer.URL(logServer.NewDatabase(t))
	}
	r.app = r.open(server.URL(r.db))
	r.sql(`CREATE TABLE public.orders (id bigint PRIMARY KEY, status text)`)
	p, err := Prepare(t.Context(), r.cfg)
	if err == nil {
		_, err = Init(t.Context(), r.cfg, p, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) open(url string) *pgx.Conn {
	r.t.Helper()
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		r.t.Fatal(err)
	}
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	conn, err := pgx.ConnectConfig(r.t.Context(), cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func (r *rig) sql(q string) {
	r.t.Helper()
	if _, err := r.app.Exec(r.t.Context(), q); err != nil {
		r.t.Fatalf("%s: %v", q, err)
	}
}

func (r *rig) ask(q string, args ...any) string {
	r.t.Helper()
	var v string
	if err := r.app.QueryRow(r.t.Context(), fmt.Sprintf(q, args...)).Scan(&v); err != nil {
		r.t.Fatalf("%s: %v", q, err)
	}
	return v
}

// start runs a sidecar; end stops it and gives what Run returned.
func (r *rig) start() (s *Sidecar, end func() error) {
	r.t.Helper()
	s, err := New(r.t.Context(), r.cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stopped := false
	end = func() error {
		if stopped {
			return nil
		}
		stopped = true
		stop()
		select {
		case err := <-ended:
			s.Close()
			return err
		case <-time.After(30 * time.Second):
			r.t.Fatal("Run does not end")
			return nil
		}
	}
	r.t.Cleanup(func() { _ = end() })
	return s, end
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// get asks the sidecar's handler.
func get(h http.Handler, path string) (code int, body string) {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	b, _ := io.ReadAll(w.Body)
	return w.Code, strings.TrimSpace(string(b))
}
