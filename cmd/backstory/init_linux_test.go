package main

import (
	"os/exec"
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
	} {
		s := newSite(t, shared(t))
		s.at(s.server.URL(s.db), "INSERT INTO orders SELECT i, 'open' FROM generate_series(1, 200000) i") // in hours at the most
		eventually(t, 20*time.Second, "the server has counted the changes", func() bool {
			return s.ask(s.server.URL(s.db), "SELECT sum(n_tup_ins)::text FROM pg_stat_user_tables") == "200000"
		})
		cmd := exec.Command(binary, "init")
		person := terminal(t, cmd)
		for k, v := range s.env {
			cmd.Env = append(cmd.Env, k+"="+v)
		}
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
		if r.code != c.code || !strings.Contains(r.err, c.says) {
			t.Errorf("answer %q: exit code %d\n%s%s", c.answer, r.code, r.out, r.err)
		}
		if got := s.run("status").code; got != c.code {
			t.Errorf("answer %q: status ends with exit code %d", c.answer, got)
		}
	}
}
