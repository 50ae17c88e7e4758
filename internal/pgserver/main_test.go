package pgserver

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// orphanEnv turns the test binary into a program that starts a server and waits to be killed.
const orphanEnv = "BACKSTORY_TEST_ORPHAN"

func TestMain(m *testing.M) {
	if os.Getenv(orphanEnv) != "" {
		orphan()
	}
	before := runtime.NumGoroutine()
	code := m.Run()
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<16)
			fmt.Fprintf(os.Stderr, "goroutines leaked:\n%s\n", buf[:runtime.Stack(buf, true)])
			code = 1
			break
		}
	}
	os.Exit(code)
}

func testConfig(t *testing.T, cfg Config) Config {
	if cfg.Version == "" && cfg.DataDir == "" {
		cfg.Version = os.Getenv("BACKSTORY_TEST_PG_VERSION")
	}
	if cfg.Log == nil {
		cfg.Log = func(line string) { t.Log(line) }
	}
	return cfg
}

// start starts a server that is stopped at the test's end.
func start(t *testing.T, cfg Config) *Server {
	t.Helper()
	s, err := Start(t.Context(), testConfig(t, cfg))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(Immediate); err != nil {
			t.Error(err)
		}
	})
	return s
}

// dataDir returns the path of a data directory that Postgres' user can reach.
func dataDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "backstory-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir + "/data"
}

func exec1(t *testing.T, url, sql string) {
	t.Helper()
	conn := connect(t, url)
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func query1(t *testing.T, url, sql string) string {
	t.Helper()
	conn := connect(t, url)
	defer conn.Close(context.Background())
	var value string
	if err := conn.QueryRow(t.Context(), sql).Scan(&value); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// memoryOf finds the shared memory of a running server; still says which of it is there. Others on the machine start and
// stop servers too, so that before and after cannot be compared.
func memoryOf(t *testing.T, s *Server) leftovers {
	t.Helper()
	tree, err := s.proc.Tree()
	if err != nil {
		t.Fatal(err)
	}
	found := findLeftovers(s.DataDir(), tree)
	if runtime.GOOS == "linux" && (found.sysv < 0 || len(found.posix) == 0 || len(still(found)) == 0) {
		t.Fatalf("found no shared memory of a running server: %+v", found)
	}
	return found
}

func still(l leftovers) (there []string) {
	segments, _ := os.ReadFile("/proc/sysvipc/shm")
	for line := range strings.Lines(string(segments)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[1] == fmt.Sprint(l.sysv) {
			there = append(there, "segment "+fields[1])
		}
	}
	for _, path := range l.posix {
		if exists(path) {
			there = append(there, path)
		}
	}
	return there
}
