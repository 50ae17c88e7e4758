//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/shop"
)

// demoHome is the directory in which a demo lives:
//
//	lock      held by the demo that runs, and the sign that the directory is a demo's
//	demo.env  to be read by a shell that wants to look into the demo
//	bin/      backstory, and psql where it is not on the PATH, for that shell
//	pg/       the data directory of Postgres
type demoHome struct {
	dir  string
	lock *os.File
}

// openDemoHome makes the directory, or takes over the one that an earlier demo has left.
func openDemoHome(dir string) (*demoHome, error) {
	var err error
	if dir == "" {
		dir, err = demoDir()
	}
	if err == nil {
		dir, err = filepath.Abs(dir)
	}
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		return nil, &eventlog.Problem{Err: fmt.Errorf("make the demo's directory: %w", err), Hint: "Choose another one with --dir."}
	}
	lock := filepath.Join(dir, "lock")
	if _, err := os.Stat(lock); errors.Is(err, os.ErrNotExist) {
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			return nil, &eventlog.Problem{Err: fmt.Errorf("the directory %s is not empty and holds no demo", dir), Hint: "Choose another one with --dir."}
		}
	}
	h := &demoHome{dir: dir}
	if h.lock, err = os.OpenFile(lock, os.O_CREATE|os.O_RDWR, 0o644); err != nil {
		return nil, &eventlog.Problem{Err: fmt.Errorf("open the demo's lock: %w", err), Hint: "Choose another directory with --dir."}
	}
	if err := unix.Flock(int(h.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		h.close()
		return nil, &eventlog.Problem{Err: fmt.Errorf("a demo is running in %s already", dir), Hint: "Look into it with . " + shellQuote(h.env()) + ", or start a second one with another --dir."}
	}
	return h, nil
}

func (h *demoHome) close() { _ = h.lock.Close() }

func (h *demoHome) data() string { return filepath.Join(h.dir, "pg") }
func (h *demoHome) env() string  { return filepath.Join(h.dir, "demo.env") }
func (h *demoHome) bin() string  { return filepath.Join(h.dir, "bin") }

// since tells when the data began, zero if there are none.
func (h *demoHome) since() time.Time {
	info, err := os.Stat(filepath.Join(h.data(), "PG_VERSION"))
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}

// empty removes the data.
func (h *demoHome) empty() error {
	if err := os.RemoveAll(h.data()); err != nil {
		return fmt.Errorf("remove the earlier demo: %w", err)
	}
	return nil
}

var envPort = regexp.MustCompile(`127\.0\.0\.1:([0-9]+)`)

// lastPorts are the ports of the last time, 0 if there was none: a shell that has read demo.env then finds the next demo
// too.
func (h *demoHome) lastPorts() (postgres, http int) {
	text, err := os.ReadFile(h.env())
	if err != nil {
		return 0, 0
	}
	if m := envPort.FindAllSubmatch(text, 2); len(m) == 2 {
		postgres, _ = strconv.Atoi(string(m[0][1]))
		http, _ = strconv.Atoi(string(m[1][1]))
	}
	return postgres, http
}

// writeEnv writes demo.env.
func (h *demoHome) writeEnv(url, http string) error {
	text := `# Written by backstory demo. In a shell: . ` + h.env() + `
# Settings of another backstory would get in the way here.
for name in $(env | sed -n 's/^\(BACKSTORY_[A-Z0-9_]*\)=.*/\1/p'); do unset "$name"; done
export BACKSTORY_SOURCE_URL=` + shellQuote(url) + `
export BACKSTORY_HTTP_ADDR=` + shellQuote(http) + `
export BACKSTORY_CONFIG=` + shellQuote(h.rules()) + `
case ":$PATH:" in
*:` + shellQuote(h.bin()) + `:*) ;;
*) export PATH=` + shellQuote(h.bin()) + `:"$PATH" ;;
esac
`
	if err := os.WriteFile(h.env()+".new", []byte(text), 0o644); err != nil {
		return fmt.Errorf("write demo.env: %w", err)
	}
	if err := os.Rename(h.env()+".new", h.env()); err != nil {
		return fmt.Errorf("write demo.env: %w", err)
	}
	return nil
}

// rules is the shop's backstory.yaml. One that is there already stays as it is: somebody may have edited it.
func (h *demoHome) rules() string { return filepath.Join(h.dir, "backstory.yaml") }

func (h *demoHome) writeRules() error {
	if _, err := os.Stat(h.rules()); err == nil {
		return nil
	}
	if err := os.WriteFile(h.rules(), shop.Rules(), 0o644); err != nil {
		return fmt.Errorf("write the shop's rules: %w", err)
	}
	return nil
}

// linkPrograms puts this program into bin, and psql if only the server's programs have it. It returns how psql is to be
// called, empty if there is none.
func (h *demoHome) linkPrograms(serverBin string) (psql string) {
	link := func(name, to string) bool {
		path := filepath.Join(h.bin(), name)
		_ = os.Remove(path)
		return os.Symlink(to, path) == nil
	}
	_ = os.MkdirAll(h.bin(), 0o755)
	if self, err := os.Executable(); err == nil {
		link("backstory", self)
	}
	if _, err := exec.LookPath("psql"); err == nil {
		return "psql"
	}
	theirs := filepath.Join(serverBin, "psql")
	if _, err := os.Stat(theirs); err == nil && link("psql", theirs) {
		return "psql"
	}
	return ""
}

// orphanLimit is how long the processes of a demo that was killed may take to end.
const orphanLimit = 15 * time.Second

// waitForOrphans waits for the Postgres, or the initdb, of a demo that was killed. On Linux they are told to end when the
// demo dies; elsewhere Postgres is told now. The lock is ours, so no living demo needs them.
func (h *demoHome) waitForOrphans(ctx context.Context) error {
	left := h.orphans()
	if runtime.GOOS != "linux" {
		for _, pid := range left {
			_ = unix.Kill(pid, syscall.SIGINT) // fast shutdown
		}
	}
	for deadline := time.Now().Add(orphanLimit); len(left) > 0; left = h.orphans() {
		if time.Now().After(deadline) {
			return &eventlog.Problem{Err: fmt.Errorf("the Postgres of an earlier demo still runs (process %d)", left[0]), Hint: fmt.Sprintf("End it with kill -INT %d.", left[0])}
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// orphans lists processes that work on our data.
func (h *demoHome) orphans() (pids []int) {
	if runtime.GOOS == "linux" {
		// All of them have their working directory there, and so has the shell of somebody who looks at the server's log.
		paths, _ := filepath.Glob("/proc/[0-9]*/cwd")
		for _, p := range paths {
			dir, err := os.Readlink(p)
			if err != nil || !strings.HasPrefix(dir, h.data()) {
				continue
			}
			name, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "comm"))
			if n := strings.TrimSpace(string(name)); n == "postgres" || n == "initdb" {
				pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
				pids = append(pids, pid)
			}
		}
		return pids
	}
	text, err := os.ReadFile(filepath.Join(h.data(), "postmaster.pid"))
	if err != nil {
		return nil
	}
	line, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || pid <= 1 {
		return nil
	}
	// Process ids are used again.
	out, err := exec.Command("ps", "-o", "command=", "-p", strconv.Itoa(pid)).Output()
	if err != nil || !strings.Contains(string(out), h.data()) {
		return nil
	}
	return []int{pid}
}

// foregroundTerminal tells whether a person can type here: f is a terminal, and the shell has put us into its foreground.
func foregroundTerminal(f *os.File) bool {
	group, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// shellQuote makes one word of a shell of s.
func shellQuote(s string) string {
	if regexp.MustCompile(`^[A-Za-z0-9_./:@%+=,-]+$`).MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
