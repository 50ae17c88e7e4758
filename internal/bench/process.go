package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
)

// child is a process whose cost is measured.
type child struct {
	name   string
	cmd    *exec.Cmd
	proc   *localserver.Process
	began  time.Time
	ended  time.Time // valid once watched is closed
	peak   atomic.Int64
	stdout bytes.Buffer // valid once watched is closed
	stderr tail

	watched chan struct{}
}

// usage is what a process has cost.
type usage struct {
	wall time.Duration // from its start to its end
	cpu  time.Duration
	peak int64 // bytes of its resident set; 0: not known on this system
}

// stopLimit is how long a process may take to end when it is asked to.
const stopLimit = 60 * time.Second

// start starts a program. Its environment is ours without what would steer it, and env.
func start(path string, args []string, env ...string) (*child, error) {
	c := &child{name: filepath.Base(path), watched: make(chan struct{})}
	c.cmd = exec.Command(path, args...)
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "PG") && !strings.HasPrefix(kv, "BACKSTORY_") {
			c.cmd.Env = append(c.cmd.Env, kv)
		}
	}
	c.cmd.Env = append(c.cmd.Env, env...)
	c.cmd.Stdout, c.cmd.Stderr = &c.stdout, &c.stderr
	var err error
	c.began = time.Now()
	if c.proc, err = localserver.Start(c.cmd, syscall.SIGKILL); err != nil {
		return nil, err
	}
	go c.watch()
	return c, nil
}

// watch reads the peak of the resident set until the process has ended. getrusage tells it too, but for a child it begins
// with its parent's: Go starts processes by vfork.
func (c *child) watch() {
	defer close(c.watched)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	file := fmt.Sprintf("/proc/%d/status", c.proc.PID())
	for {
		select {
		case <-c.proc.Done():
			c.ended = time.Now()
			return
		case <-tick.C:
		}
		if kB, _, ok := strings.Cut(field(file, "VmHWM"), " "); ok {
			if n, err := strconv.ParseInt(kB, 10, 64); err == nil {
				c.peak.Store(max(c.peak.Load(), n<<10))
			}
		}
	}
}

// ownPeak is the peak of the resident set so far.
func (c *child) ownPeak() int64 { return c.peak.Load() }

// wait waits until the process has ended by itself, without an error. If ctx ends first, it is killed.
func (c *child) wait(ctx context.Context) (usage, error) {
	select {
	case <-c.watched:
	case <-ctx.Done():
		_ = c.proc.Kill(nil)
		<-c.watched
		return usage{}, context.Cause(ctx)
	}
	if err := c.proc.Err(); err != nil {
		return usage{}, fmt.Errorf("%s %s: %w\n%s", c.name, strings.Join(c.cmd.Args[1:], " "), err, c.stderr.String())
	}
	return c.usage(), nil
}

func (c *child) usage() usage {
	st := c.cmd.ProcessState
	return usage{wall: c.ended.Sub(c.began), cpu: st.UserTime() + st.SystemTime(), peak: c.ownPeak()}
}

// stop asks the process to end and waits for it.
func (c *child) stop(sig syscall.Signal) (usage, error) {
	if err := c.proc.Signal(sig); err != nil {
		return usage{}, err
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), stopLimit, errors.New(c.name+" did not end when it was asked to"))
	defer cancel()
	return c.wait(ctx)
}

// kill ends the process if it runs still: for the way out after an error.
func (c *child) kill() {
	if !c.proc.Ended() {
		_ = c.proc.Kill(nil)
	}
	<-c.watched
}

// gone is an error if the process has ended.
func (c *child) gone() error {
	if !c.proc.Ended() {
		return nil
	}
	<-c.watched
	return fmt.Errorf("%s ended (%v)\n%s", c.name, c.proc.Err(), c.stderr.String())
}

// runProgram runs a program to its end and gives what it printed.
func runProgram(ctx context.Context, path string, args []string, env ...string) (usage, string, error) {
	c, err := start(path, args, env...)
	if err != nil {
		return usage{}, "", err
	}
	u, err := c.wait(ctx)
	return u, c.stdout.String(), err
}

// tail keeps the end of what is written to it.
type tail struct {
	mu  sync.Mutex // guards the following
	buf []byte
}

const tailBytes = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if n := len(t.buf) - tailBytes; n > 0 {
		t.buf = append(t.buf[:0], t.buf[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.buf))
}

// ticksPerSecond is the unit of /proc/PID/stat on Linux (USER_HZ).
const ticksPerSecond = 100

// processCPU is the processor time that a process has used; false if it cannot be told.
func processCPU(pid int) (time.Duration, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	// "pid (name) state …": utime and stime are fields 14 and 15, the name may hold anything.
	i := bytes.LastIndex(b, []byte(") "))
	f := bytes.Fields(b[i+1:])
	if i < 0 || len(f) < 13 {
		return 0, false
	}
	user, err1 := strconv.ParseInt(string(f[11]), 10, 64)
	sys, err2 := strconv.ParseInt(string(f[12]), 10, 64)
	return time.Duration(user+sys) * time.Second / ticksPerSecond, err1 == nil && err2 == nil
}

// backends follows what server processes cost that work for somebody else. They are gone when that one ends, so they are
// looked at again and again.
type backends struct {
	stop context.CancelFunc
	done chan struct{}
	cost map[string]time.Duration // by kind; valid once done is closed
}

// watchBackends follows the walsenders of some databases and the sessions that write a log.
func (l *lab) watchBackends(ctx context.Context, dbs ...*database) *backends {
	ctx, stop := context.WithCancel(ctx)
	b := &backends{stop: stop, done: make(chan struct{}), cost: map[string]time.Duration{}}
	var names []string
	for _, d := range dbs {
		names = append(names, d.name)
	}
	go func() {
		defer close(b.done)
		conn, err := dbs[0].connect(ctx)
		if err != nil {
			return
		}
		defer conn.Close(context.WithoutCancel(ctx))
		kinds, last := map[int]string{}, map[int]time.Duration{}
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for n := 0; ; n++ {
			if n%10 == 0 {
				rows, err := conn.Query(ctx, `SELECT pid, CASE backend_type WHEN 'walsender' THEN 'walsender' ELSE 'log backend' END FROM pg_stat_activity
					WHERE datname = ANY ($1) AND (backend_type = 'walsender' OR application_name = 'backstory writer')`, names)
				if err == nil {
					var pid int
					var kind string
					for rows.Next() {
						if rows.Scan(&pid, &kind) == nil {
							kinds[pid] = kind
						}
					}
					rows.Close()
				}
			}
			for pid := range kinds {
				if t, ok := processCPU(pid); ok {
					last[pid] = t
				}
			}
			select {
			case <-ctx.Done():
				for pid, t := range last {
					b.cost[kinds[pid]] += t
				}
				return
			case <-tick.C:
			}
		}
	}()
	return b
}

// end stops looking and gives the costs.
func (b *backends) end() map[string]time.Duration {
	b.stop()
	<-b.done
	return b.cost
}

// cpuTimes is what all cores together have done since the machine started, in ticks.
type cpuTimes struct{ all, idle int64 }

func machineCPU() (t cpuTimes) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return t
	}
	line, _, _ := strings.Cut(string(b), "\n")
	for i, f := range strings.Fields(line)[1:] {
		n, _ := strconv.ParseInt(f, 10, 64)
		if i < 8 { // guest time is in user time
			t.all += n
		}
		if i == 3 || i == 4 { // idle, iowait
			t.idle += n
		}
	}
	return t
}

// busySince is the share of their time that was not idle since an earlier look.
func (t cpuTimes) busySince(before cpuTimes) float64 {
	if t.all == before.all {
		return 0
	}
	return 1 - float64(t.idle-before.idle)/float64(t.all-before.all)
}
