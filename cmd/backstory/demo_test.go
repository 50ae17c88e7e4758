//go:build unix

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
	"github.com/backstory-dev/backstory/internal/shop"
)

// program is the program under test, where every user can run it.
func program(t *testing.T) string {
	t.Helper()
	if err := os.Chmod(filepath.Dir(binary), 0o755); err != nil {
		t.Fatal(err)
	}
	return binary
}

// demoDirForTest gives a directory that Postgres' user can reach, with a name that a shell has to quote.
func demoDirForTest(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "backstory demo's ")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "home")
}

// runningDemo is a demo in a process of its own.
type runningDemo struct {
	t    *testing.T
	cmd  *exec.Cmd
	dir  string
	done chan struct{} // closed when it has ended

	mu    sync.Mutex // guards the following
	lines []string
	more  chan struct{} // closed at the next line
}

// startDemo starts one. stdin is what it reads; nil: nothing.
func startDemo(t *testing.T, dir string, args ...string) *runningDemo {
	t.Helper()
	cmd := exec.Command(program(t), append([]string{"demo", "--dir", dir, "--pg", os.Getenv(pgservertest.VersionEnv)}, args...)...)
	// The settings of another backstory in the environment do not matter.
	cmd.Env = append(os.Environ(), "BACKSTORY_SOURCE_URL=postgres://nobody@192.0.2.1/x", "BACKSTORY_LOG_URL=nonsense", "BACKSTORY_SLOT=UPPER")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return follow(t, cmd, dir)
}

func follow(t *testing.T, cmd *exec.Cmd, dir string) *runningDemo {
	t.Helper()
	d := &runningDemo{t: t, cmd: cmd, dir: dir, done: make(chan struct{}), more: make(chan struct{})}
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		scan := bufio.NewScanner(r)
		scan.Buffer(nil, 1<<20)
		for scan.Scan() {
			d.mu.Lock()
			d.lines = append(d.lines, scan.Text())
			close(d.more)
			d.more = make(chan struct{})
			d.mu.Unlock()
		}
	}()
	go func() {
		_ = cmd.Wait()
		w.Close()
		<-read
		close(d.done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-d.done
		if t.Failed() {
			t.Logf("the demo in %s printed:\n%s", dir, d.text())
		}
		d.noProcessLeft()
	})
	return d
}

func (d *runningDemo) text() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return strings.Join(d.lines, "\n")
}

// waitFor waits until something that matches has been printed, and returns its groups.
func (d *runningDemo) waitFor(pattern string) []string {
	d.t.Helper()
	re := regexp.MustCompile(pattern)
	limit := time.After(2 * time.Minute)
	for {
		d.mu.Lock()
		text, more := strings.Join(d.lines, "\n"), d.more
		d.mu.Unlock()
		if m := re.FindStringSubmatch(text); m != nil {
			return m
		}
		select {
		case <-more:
		case <-d.done:
			if m := re.FindStringSubmatch(d.text()); m != nil {
				return m
			}
			d.t.Fatalf("the demo ended (%v) before it printed %q", d.cmd.ProcessState, pattern)
		case <-limit:
			d.t.Fatalf("the demo has not printed %q", pattern)
		}
	}
}

// ends waits for its end.
func (d *runningDemo) ends(within time.Duration, code int) {
	d.t.Helper()
	select {
	case <-d.done:
		if got := d.cmd.ProcessState.ExitCode(); got != code {
			d.t.Fatalf("the demo ended with %v, not with exit code %d", d.cmd.ProcessState, code)
		}
	case <-time.After(within):
		d.t.Fatalf("the demo has not ended after %s", within)
	}
}

// stop ends it as Ctrl-C does.
func (d *runningDemo) stop() {
	d.t.Helper()
	if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
		d.t.Fatal(err)
	}
	d.ends(20*time.Second, 0)
	d.waitFor(`Everything has stopped\.`)
	if strings.Contains(d.text(), "Not all of it could be taken in") {
		d.t.Error("the sidecar has not taken everything in")
	}
	d.noProcessLeft()
}

// noProcessLeft looks for processes that work in the demo's directory (Linux).
func (d *runningDemo) noProcessLeft() {
	d.t.Helper()
	var left []string
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		left = nil
		paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range paths {
			if text, err := os.ReadFile(p); err == nil && strings.Contains(string(text), d.dir) {
				left = append(left, p+": "+strings.ReplaceAll(string(text), "\x00", " "))
			}
		}
		if len(left) == 0 {
			return
		}
	}
	d.t.Errorf("still there:\n%s", strings.Join(left, "\n"))
}

// position is how far the log is.
func (d *runningDemo) position() (n int) {
	d.t.Helper()
	conn := d.connect("")
	if err := conn.QueryRow(context.Background(), `SELECT position FROM backstory.head`).Scan(&n); err != nil {
		d.t.Fatal(err)
	}
	return n
}

// connect opens the shop's database, by the address in demo.env.
func (d *runningDemo) connect(searchPath string) *pgx.Conn {
	d.t.Helper()
	text, err := os.ReadFile(filepath.Join(d.dir, "demo.env"))
	if err != nil {
		d.t.Fatal(err)
	}
	m := regexp.MustCompile(`SOURCE_URL='(.*)'`).FindSubmatch(text)
	cfg, err := pgx.ParseConfig(string(m[1]))
	if err != nil {
		d.t.Fatal(err)
	}
	if searchPath != "" {
		cfg.RuntimeParams["search_path"] = searchPath
	}
	conn, err := pgx.ConnectConfig(context.Background(), cfg)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// commands gives the lines of the last block of commands.
func (d *runningDemo) commands() (lines []string) {
	text := d.text()
	_, text, _ = strings.Cut(text[strings.LastIndex(text, "Type this in a second terminal."):], "\n")
	for line := range strings.Lines(text) {
		if command, ok := strings.CutPrefix(line, "    "); ok {
			lines = append(lines, strings.TrimSpace(command))
		} else if strings.HasPrefix(line, "─") {
			break
		}
	}
	return lines
}

func TestEveryCommandThatTheDemoPrintsWorks(t *testing.T) {
	t.Parallel()
	d := startDemo(t, demoDirForTest(t), "--rate", "20")
	d.waitFor(`Type this in a second terminal\.[\s\S]*ends the demo\.`)
	commands := d.commands()
	if len(commands) < 8 {
		t.Fatalf("only %q", commands)
	}
	for _, shell := range []string{"sh", "bash", "zsh"} {
		if _, err := exec.LookPath(shell); err != nil {
			t.Logf("no %s on this machine", shell)
			continue
		}
		for i, command := range commands {
			out, err := typed(t, shell, commands[0], command)
			if err != nil {
				t.Errorf("%s: %s: %v\n%s", shell, command, err, out)
			}
			// The order's next step in the shop may come in between.
			for try := 0; strings.HasSuffix(command, "--limit 1") && !strings.Contains(out, "changed at") && try < 3; try++ {
				_, _ = typed(t, shell, commands[0], commands[i-1])
				time.Sleep(100 * time.Millisecond)
				out, _ = typed(t, shell, commands[0], command)
			}
			// Support has perhaps not had anything to do yet.
			for try := 0; strings.HasPrefix(command, "backstory log --author") && strings.HasPrefix(out, "No events") && try < 300; try++ {
				time.Sleep(200 * time.Millisecond)
				out, _ = typed(t, shell, commands[0], command)
			}
			for pattern, want := range map[string]string{
				`^backstory log orders/\d+$`:          `status: pending → paid[\s\S]*OrderCreated`,
				`^backstory show orders/\d+ --at`:     `status +"pending"`,
				`^backstory show orders/\d+$`:         `status +"(shipped|delivered|refunded)"`,
				`^backstory log --author support:`:    `support:(ben|eva|joe)`,
				`^backstory checkout `:                `rows +public\.orders → before\.orders`,
				`^psql .*before\.orders`:              `\([1-9]\d* rows?\)`,
				`^psql .*UPDATE orders`:               `UPDATE 1`,
				`^backstory log orders/\d+ --limit 1`: `note: .* → .*changed at`,
				`^backstory status`:                   `streaming[\s\S]*since the start`,
				`^backstory verify`:                   `whole`,
			} {
				if regexp.MustCompile(pattern).MatchString(command) && !regexp.MustCompile(want).MatchString(out) {
					t.Errorf("%s: %s printed\n%s", shell, command, out)
				}
			}
		}
	}
	broken, err := shop.Check(t.Context(), d.connect("before"))
	if err != nil || len(broken) > 0 {
		t.Errorf("the tables as they were are not consistent: %v\n%s", err, strings.Join(broken, "\n"))
	}
	d.stop()
}

// typed runs a command in another terminal, where demo.env has been read: another environment, in which nothing of the demo
// is known.
func typed(t *testing.T, shell, env, command string) (string, error) {
	t.Helper()
	cmd := exec.Command(shell, "-c", "set -e\n"+env+"\n"+command+"\n")
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=" + t.TempDir(), "BACKSTORY_LOG_URL=nonsense", "BACKSTORY_TABLES=none.*"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestADemoGoesOnOrBeginsAnew(t *testing.T) {
	t.Parallel()
	dir := demoDirForTest(t)
	// The demos of other tests ask for the same ports, and could have them between two starts of this one: it begins with
	// ports of its own.
	for _, port := range []int{demoPort, demoHTTPPort} {
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			defer l.Close()
		}
	}
	d := startDemo(t, dir)
	d.waitFor(`a fresh database[\s\S]*Order[A-Z]`)
	before, env := d.position(), readFile(t, filepath.Join(dir, "demo.env"))

	second := startDemo(t, dir)
	second.ends(10*time.Second, 1)
	second.waitFor(`a demo is running in .* already[\s\S]*→ Look into it`)
	d.stop()

	d = startDemo(t, dir)
	d.waitFor(`Going on with the demo of [\s\S]*Order[A-Z]`)
	if after := d.position(); after <= before {
		t.Errorf("the log went from position %d to %d", before, after)
	}
	if again := readFile(t, filepath.Join(dir, "demo.env")); again != env {
		t.Errorf("a terminal that has read demo.env does not find the next demo:\n%s\n%s", env, again)
	}

	// The worst end, and at once the next start.
	before = d.position()
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-d.done
	d = startDemo(t, dir, "--continue")
	d.waitFor(`the database of [\s\S]*Order[A-Z]`)
	if after := d.position(); after < before {
		t.Errorf("the log went back from position %d to %d", before, after)
	}
	verify(t, d)
	d.stop()

	d = startDemo(t, dir, "--fresh", "--duration", "3s")
	d.waitFor(`Removing the demo of [\s\S]*a fresh database`)
	d.ends(30*time.Second, 0)
	d.waitFor(`the log holds \d+ events`)
}

// verify proves the log's seals.
func verify(t *testing.T, d *runningDemo) {
	t.Helper()
	cmd := exec.Command("sh", "-c", ". "+shellQuote(filepath.Join(d.dir, "demo.env"))+"; backstory verify")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("backstory verify: %v\n%s", err, out)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestADemoTakesAnotherPortWhereItsOwnIsInUse(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	d := startDemo(t, demoDirForTest(t), "--port", fmt.Sprint(port), "--duration", "3s")
	d.waitFor(fmt.Sprintf(`Port %d is in use; taking \d+\.`, port))
	d.ends(60*time.Second, 0)
	d.noProcessLeft()
}

func TestADemoThatIsStoppedWhileItStartsLeavesNothing(t *testing.T) {
	t.Parallel()
	dir := demoDirForTest(t)
	for _, after := range []time.Duration{20 * time.Millisecond, 400 * time.Millisecond, 1200 * time.Millisecond, 2 * time.Second} {
		d := startDemo(t, dir)
		time.Sleep(after) // wherever it is by then
		if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		select {
		case <-d.done:
		case <-time.After(20 * time.Second):
			t.Fatalf("stopped after %s, it has not ended", after)
		}
		d.noProcessLeft()
	}
	d := startDemo(t, dir, "--continue", "--duration", "3s")
	d.ends(60*time.Second, 0)
	d.waitFor(`the log holds \d+ events`)
}

func TestADemoIsKilledWhileItStarts(t *testing.T) {
	t.Parallel()
	dir := demoDirForTest(t)
	for _, after := range []time.Duration{300 * time.Millisecond, 1500 * time.Millisecond, 2200 * time.Millisecond} {
		d := startDemo(t, dir)
		time.Sleep(after)
		if err := d.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-d.done
	}
	d := startDemo(t, dir, "--continue", "--duration", "3s")
	d.ends(60*time.Second, 0)
	d.waitFor(`the log holds \d+ events`)
}

func TestASecondInterruptEndsTheDemoAtOnce(t *testing.T) {
	t.Parallel()
	d := startDemo(t, demoDirForTest(t))
	d.waitFor(`Order[A-Z]`)
	for range 200 {
		_ = d.cmd.Process.Signal(os.Interrupt)
		time.Sleep(5 * time.Millisecond)
	}
	select {
	case <-d.done:
	case <-time.After(5 * time.Second):
		t.Fatal("it has not ended")
	}
	d.noProcessLeft()
}

func TestADemoRunsAsAnOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("not root: all the other tests show it")
		return
	}
	t.Parallel()
	home := filepath.Dir(demoDirForTest(t))
	if err := os.Chown(home, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program(t), "demo", "--duration", "3s")
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=" + home}
	cmd.Dir = home
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	d := follow(t, cmd, filepath.Join(home, ".local/state/backstory/demo"))
	d.ends(60*time.Second, 0)
	d.waitFor(`the log holds \d+ events`)
	if _, err := os.Stat(filepath.Join(d.dir, "pg", "PG_VERSION")); err != nil {
		t.Error(err)
	}
	d.noProcessLeft()
}

func TestADemoTouchesNoDirectoryOfSomebodyElse(t *testing.T) {
	t.Parallel()
	dir := demoDirForTest(t)
	precious := filepath.Join(dir, "pg", "PG_VERSION")
	if err := os.MkdirAll(filepath.Dir(precious), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(precious, []byte("15\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	d := startDemo(t, dir, "--fresh")
	d.ends(10*time.Second, 1)
	d.waitFor(`is not empty and holds no demo`)
	if readFile(t, precious) != "15\n" {
		t.Error("it is gone")
	}
}

func TestDemoUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--fresh", "--continue"}, {"--rate", "0"}, {"--port", "70000"}, {"--nonsense"}, {"argument"}} {
		d := startDemo(t, demoDirForTest(t), args...)
		select {
		case <-d.done:
			if d.cmd.ProcessState.ExitCode() == 0 {
				t.Errorf("%q was taken", args)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%q was taken", args)
		}
	}
}

func TestCropCountsWhatIsSeen(t *testing.T) {
	for _, c := range []struct {
		line  string
		width int
		want  string
	}{
		{"a → b", 0, "a → b"},
		{"a → b", 5, "a → …"},
		{"a → b", 6, "a → b"},
		{"\x1b[33mab\x1b[0mcd", 5, "\x1b[33mab\x1b[0mcd"},
		{"\x1b[33mabcd\x1b[0m", 3, "\x1b[33mab…\x1b[0m"},
	} {
		if got := crop(c.line, c.width); got != c.want {
			t.Errorf("%q to %d: %q", c.line, c.width, got)
		}
	}
}
