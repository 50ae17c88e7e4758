package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// screen is where a command writes: through a pager and in colour on a terminal, plainly otherwise.
type screen struct {
	*bufio.Writer
	color bool
	close func()
}

func isTerminal(f *os.File) bool {
	st, err := f.Stat()
	if err != nil || st.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull) // a character device, too
	return err != nil || !os.SameFile(st, null)
}

// openScreen prepares standard output; paged output goes through $PAGER, or less, on a terminal.
func openScreen(cmd *cobra.Command, paged bool) *screen {
	out := cmd.OutOrStdout()
	f, ok := out.(*os.File)
	if !ok || !isTerminal(f) {
		w := bufio.NewWriterSize(out, 64<<10)
		return &screen{Writer: w, close: func() { _ = w.Flush() }}
	}
	s := &screen{color: os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
	var dst io.Writer = f
	s.close = func() { _ = s.Flush() }
	if paged {
		if pipe, wait := startPager(); pipe != nil {
			dst = pipe
			s.close = func() { _ = s.Flush(); _ = pipe.Close(); wait() }
		}
	}
	s.Writer = bufio.NewWriter(dst)
	return s
}

func startPager() (io.WriteCloser, func()) {
	pager := os.Getenv("PAGER")
	if pager == "" {
		pager = "less"
	}
	if pager == "cat" {
		return nil, nil
	}
	f := strings.Fields(pager)
	c := exec.Command(f[0], f[1:]...)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.Env = os.Environ()
	if os.Getenv("LESS") == "" {
		c.Env = append(c.Env, "LESS=FRX")
	}
	pipe, err := c.StdinPipe()
	if err != nil || c.Start() != nil {
		return nil, nil
	}
	return pipe, func() { _ = c.Wait() }
}

// Colours, empty off a terminal.
func (s *screen) paint(code, text string) string {
	if !s.color || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s *screen) dim(t string) string    { return s.paint("2", t) }
func (s *screen) bold(t string) string   { return s.paint("1", t) }
func (s *screen) yellow(t string) string { return s.paint("33", t) }
func (s *screen) green(t string) string  { return s.paint("32", t) }
func (s *screen) red(t string) string    { return s.paint("31", t) }
func (s *screen) cyan(t string) string   { return s.paint("36", t) }

// age says how long ago something was, as git does.
func age(t, now time.Time) string {
	d := now.Sub(t)
	unit := func(n int, name string) string {
		if n == 1 {
			return "1 " + name + " ago"
		}
		return fmt.Sprintf("%d %ss ago", n, name)
	}
	switch {
	case d < 0:
		return "just now"
	case d < 90*time.Second:
		return unit(int(d/time.Second), "second")
	case d < 90*time.Minute:
		return unit(int(d/time.Minute), "minute")
	case d < 36*time.Hour:
		return unit(int(d/time.Hour), "hour")
	case d < 60*24*time.Hour:
		return unit(int(d/(24*time.Hour)), "day")
	case d < 730*24*time.Hour:
		return unit(int(d/(30*24*time.Hour)), "month")
	}
	return unit(int(d/(365*24*time.Hour)), "year")
}

// bytesText prints a number of bytes for people.
func bytesText(n int64) string {
	const k = 1 << 10
	switch {
	case n < 0:
		return "no limit"
	case n < k:
		return fmt.Sprintf("%d B", n)
	case n < k*k:
		return fmt.Sprintf("%.1f kB", float64(n)/k)
	case n < k*k*k:
		return fmt.Sprintf("%.1f MB", float64(n)/k/k)
	}
	return fmt.Sprintf("%.1f GB", float64(n)/k/k/k)
}

// countText prints a count with thousands apart.
func countText(n int64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// progressBar shows how far long work is, on standard error and only on a terminal.
type progressBar struct {
	what  string
	began time.Time
	last  time.Time
	shown bool
}

func newProgress(what string) *progressBar { return &progressBar{what: what, began: time.Now()} }

func (p *progressBar) update(done, total int64) {
	if !isTerminal(os.Stderr) || time.Since(p.last) < 100*time.Millisecond || total <= 0 {
		return
	}
	p.last, p.shown = time.Now(), true
	spent := time.Since(p.began)
	rate := float64(done) / spent.Seconds()
	left := ""
	if rate > 0 && done < total {
		left = ", " + (time.Duration(float64(total-done)/rate) * time.Second).Round(time.Second).String() + " left"
	}
	full := int(30 * done / total)
	fmt.Fprintf(os.Stderr, "\r\x1b[K%s [%s%s] %3d %%, %s/s%s", p.what, strings.Repeat("=", full), strings.Repeat(" ", 30-full), 100*done/total, countText(int64(rate)), left)
}

func (p *progressBar) end() {
	if p.shown {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}
