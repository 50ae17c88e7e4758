package rebuild

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// A child is this test binary run as a program of its own, which can be killed and whose memory can be measured.
const childEnv = "BACKSTORY_TEST_CHILD"

// child checks out into a schema or a directory. It says "reading" after some events and "writing" after some rows, waiting
// each time for a line that tells it to go on; "done" and its peak memory at the end.
func child(args []string) {
	url, kind, where, temp, memory := args[0], args[1], args[2], args[3], int64(0)
	if _, err := fmt.Sscan(args[4], &memory); err != nil {
		panic(err)
	}
	ctx := context.Background()
	log, err := eventlog.Open(ctx, eventlog.Config{URL: url})
	if err != nil {
		panic(err)
	}
	rev, err := log.Resolve(ctx, "HEAD", eventlog.RevisionOptions{})
	if err != nil {
		panic(err)
	}
	var into Target
	if kind == "schema" {
		into = Schema(SchemaConfig{URL: url, Schema: where, Replace: true})
	} else {
		into = Files(FilesConfig{Dir: where})
	}
	in := bufio.NewReader(os.Stdin)
	say := func(word string) {
		fmt.Println(word)
		if _, err := in.ReadString('\n'); err != nil {
			os.Exit(3)
		}
	}
	if _, err := Checkout(ctx, Config{Log: log, Revision: rev, Into: &pausing{Target: into, say: say}, TempDir: temp, MaxMemoryBytes: memory, Workers: 2,
		Progress: func(p Progress) {
			if p.Phase == "reading" { // the first call comes after 1024 events
				say("reading")
				say = func(string) {}
			}
		}}); err != nil {
		panic(err)
	}
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			fmt.Println("done", strings.TrimSpace(rest))
		}
	}
}

// pausing is a target that stops in the middle.
type pausing struct {
	Target
	say func(string)
	n   int
}

func (p *pausing) Table(ctx context.Context, t *Table) (TableWriter, error) {
	w, err := p.Target.Table(ctx, t)
	return &pausingWriter{w, p}, err
}

type pausingWriter struct {
	TableWriter
	p *pausing
}

func (w *pausingWriter) Write(b []byte) error {
	if w.p.n++; w.p.n == 3 {
		w.p.say("writing")
	}
	return w.TableWriter.Write(b)
}

type childProcess struct {
	t   *testing.T
	cmd *exec.Cmd
	out *bufio.Reader
	in  *os.File
}

func startChild(t *testing.T, args ...string) *childProcess {
	t.Helper()
	c := &childProcess{t: t, cmd: exec.Command(os.Args[0], args...)}
	c.cmd.Env = append(os.Environ(), childEnv+"=1")
	c.cmd.Stderr = os.Stderr
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.in, c.out = in.(*os.File), bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.cmd.Process.Kill(); _ = c.cmd.Wait() })
	return c
}

// until waits for the child to say a word, and sends it on at others.
func (c *childProcess) until(word string) string {
	c.t.Helper()
	for {
		line, err := c.out.ReadString('\n')
		if err != nil {
			c.t.Fatalf("the child ended before it said %s: %v", word, err)
		}
		if strings.HasPrefix(line, word) {
			return strings.TrimSpace(strings.TrimPrefix(line, word))
		}
		if _, err := c.in.WriteString("\n"); err != nil {
			c.t.Fatal(err)
		}
	}
}

func TestKilledCheckoutLeavesNothing(t *testing.T) {
	orders := shopOrders()
	s := newSource(t, orders)
	s.orderHistory(orders, 30000, 20000)
	temp := t.TempDir()
	clean := func(when string) {
		t.Helper()
		if left := names(t, temp); len(left) > 0 {
			t.Errorf("%s: files %q are left", when, left)
		}
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) { // the server notices in its own time
			left := query(t, s.conn, `SELECT nspname FROM pg_namespace WHERE nspname = 'then' OR nspname LIKE 'backstory_checkout%'
				UNION ALL SELECT 'a session' FROM pg_stat_activity WHERE application_name = 'backstory checkout'`)
			if len(left) == 0 {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %q is left", when, left)
			}
		}
	}
	for _, when := range []string{"reading", "writing"} {
		for _, memory := range []string{"60000", "100000000"} {
			c := startChild(t, s.url, "schema", "then", temp, memory)
			c.until(when)
			if err := c.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = c.cmd.Wait()
			clean(when + " in " + memory)
		}
	}
	dir := filepath.Join(t.TempDir(), "csv")
	c := startChild(t, s.url, "files", dir, temp, "300000")
	c.until("writing")
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
	clean("writing files")
	if left := names(t, dir); len(left) != 1 || !strings.HasSuffix(left[0], partialSuffix) {
		t.Errorf("%q", left)
	}
	startChild(t, s.url, "files", dir, temp, "300000").until("done")
	if got := names(t, dir); len(got) != 2 {
		t.Errorf("%q", got)
	}
	startChild(t, s.url, "schema", "then", temp, "300000").until("done")
	if n := query(t, s.conn, `SELECT count(*) FROM "then".orders`); n[0] != "30000" {
		t.Errorf("%s rows", n)
	}
}

func TestCancelledCheckoutLeavesNothing(t *testing.T) {
	orders := shopOrders()
	s := newSource(t, orders)
	s.orderHistory(orders, 20000, 5000)
	rev, err := s.log.Resolve(s.ctx, "HEAD", eventlog.RevisionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "csv")
	for name, into := range map[string]Target{"schema": Schema(SchemaConfig{URL: s.url, Schema: "then"}), "files": Files(FilesConfig{Dir: dir})} {
		ctx, cancel := context.WithCancel(s.ctx)
		_, err := Checkout(ctx, Config{Log: s.log, Revision: rev, TempDir: tempDir, MaxMemoryBytes: 1 << 20,
			Into: &pausing{Target: into, say: func(string) { cancel() }}})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("%v: %q", err, names(t, dir))
	}
	if left := query(t, s.conn, `SELECT nspname FROM pg_namespace WHERE nspname = 'then'`); len(left) > 0 {
		t.Errorf("%q", left)
	}
}

func TestMemoryStaysBounded(t *testing.T) {
	if testing.Short() || raceDetector {
		t.Skip("makes a log of 100 MB, and measures memory, of which the race detector needs its own")
	}
	wide := relation("wide", []int{0}, "id bigint", "body text", "n integer")
	s := newSource(t, wide)
	body := strings.Repeat("some words of a longer text, ", 30)
	const rows = 120_000
	for i := range rows {
		s.batch.Backlog = 1 << 40
		s.at = s.at.Add(time.Millisecond)
		s.lsn += 0x10
		s.batch.Add(eventlog.Item{Kind: eventlog.ItemBegin, XID: 1, Timeline: 1, CommitLSN: s.lsn, Time: s.at})
		s.batch.Add(eventlog.Item{Kind: eventlog.ItemChange, Op: eventlog.OpInsert, Relation: wide, New: row(i, body, 1)})
		s.batch.Add(eventlog.Item{Kind: eventlog.ItemCommit, XID: 1, Timeline: 1, CommitLSN: s.lsn, EndLSN: s.lsn + 8, Time: s.at})
		if len(s.batch.Items) > 3000 {
			s.flush()
		}
	}
	s.batch.Final = true
	s.flush()
	for _, memory := range []int{8 << 20, 32 << 20} {
		var kib int
		if _, err := fmt.Sscan(startChild(t, s.url, "files", filepath.Join(t.TempDir(), "csv"), t.TempDir(), fmt.Sprint(memory)).until("done"), &kib); err != nil {
			t.Fatal(err)
		}
		t.Logf("bound %d MiB: peak %d MiB, for %d MiB of rows", memory>>20, kib>>10, rows*len(body)>>20)
		if limit := memory>>10 + 48<<10; kib > limit {
			t.Errorf("bound %d MiB: peak memory %d MiB", memory>>20, kib>>10)
		}
	}
}
