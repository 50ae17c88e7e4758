package e2e

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

func TestMain(m *testing.M) {
	code := pgservertest.Main(m)
	if bin.dir != "" {
		_ = os.RemoveAll(bin.dir)
	}
	os.Exit(code)
}

var bin struct {
	once [2]sync.Once
	mu   sync.Mutex // guards the following
	dir  string
	err  [2]error
}

// binary builds cmd/backstory once per run of the tests. With the race detector on, race asks for a program that has it
// too; one whose memory is measured has not.
func binary(t testing.TB, race bool) string {
	t.Helper()
	n, name, args := 0, "backstory", []string{"build"}
	if race && raceEnabled {
		n, name, args = 1, "backstory-race", append(args, "-race")
	}
	bin.once[n].Do(func() {
		bin.mu.Lock()
		defer bin.mu.Unlock()
		if bin.dir == "" {
			if bin.dir, bin.err[n] = os.MkdirTemp("", "backstory-e2e-"); bin.err[n] != nil {
				return
			}
		}
		cmd := exec.Command("go", append(args, "-o", filepath.Join(bin.dir, name), "../../cmd/backstory")...)
		if out, err := cmd.CombinedOutput(); err != nil {
			bin.err[n] = fmt.Errorf("%w\n%s", err, out)
		}
	})
	bin.mu.Lock()
	defer bin.mu.Unlock()
	if bin.err[n] != nil {
		t.Fatalf("build the program: %v", bin.err[n])
	}
	return filepath.Join(bin.dir, name)
}

// seedOf gives the seed of a test, and prints it.
func seedOf(t testing.TB) uint64 {
	t.Helper()
	seed := rand.Uint64() % 1_000_000
	if s := os.Getenv("BACKSTORY_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("BACKSTORY_SEED: %v", err)
		}
	}
	t.Logf("seed %d (BACKSTORY_SEED=%d repeats it)", seed, seed)
	return seed
}

// setting reads a number from the environment.
func setting(t testing.TB, name string, otherwise int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// eventually waits until a condition holds; what tells what is waited for. An error of the condition is shown at the end.
func eventually(t testing.TB, limit time.Duration, what string, condition func() (bool, error)) {
	t.Helper()
	var err error
	for end := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		var ok bool
		if ok, err = condition(); ok {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("waited %s for this: %s (%v)", limit, what, err)
		}
	}
}

// lines collects what a program prints.
type lines struct {
	mu  sync.Mutex // guards the following
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// tail gives the last lines.
func (l *lines) tail(n int) string {
	all := strings.Split(strings.TrimRight(l.String(), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-n):], "\n")
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}
