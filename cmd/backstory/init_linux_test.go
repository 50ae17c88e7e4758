package main

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// On a terminal init asks before it makes a log that may grow large, and takes no for an answer.
func TestInitAsks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		answer, says string
		code         int
	}{
		{"\n", "backstory: nothing was changed", exitFailed},
		{"no\n", "backstory: nothing was changed", exitFailed},
		{"y\n", "", exitDone},
		{"YES\n", "", exitDone},
	} {
		// The server has not counted for a day, so init itself would not ask here (TestGrowthOfTheLog tells when it does).
		cmd := exec.Command(os.Args[0])
		person := terminal(t, cmd, io.Discard)
		cmd.Env = append(os.Environ(), asksEnv+"=1")
		p := &process{t: t, cmd: cmd, out: &output{}, err: &output{}, done: make(chan struct{})}
		cmd.Stdout, cmd.Stderr = p.out, p.err
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() {
			_ = cmd.Wait()
			close(p.done)
		}()
		eventually(t, 20*time.Second, "it asks", func() bool { return strings.HasSuffix(p.err.String(), "Go on? [y/N] ") || !p.running() })
		if _, err := person.WriteString(c.answer); err != nil {
			t.Fatal(err)
		}
		r := p.wait(30 * time.Second)
		if r.code != c.code || !strings.Contains(r.err, c.says) || !strings.Contains(r.err, "The log may grow to 17.0 GB within a year on the source's own disk. Go on?") {
			t.Errorf("answer %q: exit code %d\n%s%s", c.answer, r.code, r.out, r.err)
		}
	}
}

// Long work shows on a terminal how far it is, and leaves nothing of that behind.
func TestProgressOnATerminal(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.must("init")
	s.sql("INSERT INTO orders SELECT i, repeat('x', 100) FROM generate_series(1, 150000) i")
	s.must("run", "--once")
	for _, args := range [][]string{
		{"verify"},
		{"checkout", "--at", "HEAD", "--csv", filepath.Join(t.TempDir(), "csv")},
		{"checkout", "--at", "HEAD", "--schema", "past"},
	} {
		cmd := exec.Command(binary, args...)
		var shown output
		terminal(t, cmd, &shown)
		cmd.Stderr = cmd.Stdin.(*os.File)
		for k, v := range s.env {
			cmd.Env = append(cmd.Env, k+"="+v)
		}
		if out, err := cmd.Output(); err != nil {
			t.Fatalf("%v: %v\n%s%s", args, err, out, shown.String())
		}
		eventually(t, 5*time.Second, "the bar is taken away", func() bool { return strings.HasSuffix(shown.String(), clearLine) })
		if bars := regexp.MustCompile(`\[=* *\] +[0-9]+ %`).FindAllString(shown.String(), -1); len(bars) == 0 {
			t.Errorf("%v shows %q", args, shown.String())
		}
	}
}

// On a terminal, and only there, log goes through a pager, which may be left before the end.
func TestLogOnATerminal(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.must("init")
	s.sql("INSERT INTO orders SELECT i, repeat('x', 100) FROM generate_series(1, 5000) i")
	s.must("run", "--once")
	for _, c := range []struct {
		args  []string
		lines int
	}{{[]string{"log"}, 3}, {[]string{"log", "--no-pager"}, 5000}, {[]string{"log", "--json"}, 5000}} {
		cmd := exec.Command(binary, c.args...)
		var shown output
		terminal(t, cmd, &shown)
		cmd.Env = append(cmd.Env, "PAGER=head -3")
		for k, v := range s.env {
			cmd.Env = append(cmd.Env, k+"="+v)
		}
		cmd.Stdout, cmd.Stderr = cmd.Stdin.(*os.File), cmd.Stdin.(*os.File)
		err := cmd.Run()
		lines := func() int { return strings.Count(shown.String(), "OrderCreated") }
		eventually(t, 5*time.Second, "all of it is shown", func() bool { return lines() >= c.lines })
		if err != nil || lines() != c.lines || strings.Contains(shown.String(), "backstory:") {
			t.Errorf("%v: %v, %d lines\n%.2000s", c.args, err, lines(), shown.String())
		}
	}
	s.env["PAGER"] = "false"
	if r := s.must("log"); strings.Count(r.out, "\n") != 5000 {
		t.Errorf("off a terminal: %d lines", strings.Count(r.out, "\n"))
	}
}

// On a terminal run shows how far the existing rows are, below what it logs; status tells the same, with how long it will still take.
func TestExistingRowsOnATerminal(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.sql("INSERT INTO orders SELECT i, repeat('x', 100) FROM generate_series(1, 60000) i; ANALYZE orders")
	s.must("init")
	s.env["BACKSTORY_BASELINE_RATE"] = "200000"
	s.env["BACKSTORY_HTTP_ADDR"] = freeAddr(t)
	cmd := exec.Command(binary, "run")
	var shown output
	terminal(t, cmd, &shown)
	cmd.Stderr = cmd.Stdin.(*os.File)
	for k, v := range s.env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	bar := regexp.MustCompile(`existing rows \[=* *\] +[0-9]+ %, [0-9,]+/s, [0-9ms]+ left`)
	defer func() {
		if t.Failed() {
			t.Logf("it shows %q", shown.String()[max(0, len(shown.String())-2000):])
		}
	}()
	eventually(t, time.Minute, "it shows how far it is", func() bool { return bar.MatchString(shown.String()) })
	if out := s.must("status").out; !regexp.MustCompile(`baseline taking over existing rows: [0-9]+ %, [0-9,]+ rows read, [0-9,]+/s, about [0-9ms]+ left\n +public\.orders +reading +[0-9,]+ of about 60,000 rows`).MatchString(out) {
		t.Errorf("status says:\n%s", out)
	}
	for _, line := range strings.Split(shown.String(), "\n") {
		if i := strings.LastIndex(line, clearLine); strings.Contains(line, "level=") && strings.Contains(line[i+1:], "existing rows [") {
			t.Errorf("the bar is left in what is logged: %q", line)
		}
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, shown.String())
	}
	eventually(t, 5*time.Second, "the bar is taken away", func() bool {
		text := shown.String()
		return !strings.Contains(text[strings.LastIndex(text, clearLine)+len(clearLine):], "existing rows [")
	})
}
