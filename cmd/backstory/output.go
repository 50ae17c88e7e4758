package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// screen is where a command writes: through a pager and in colour on a terminal, plainly otherwise.
type screen struct {
	*bufio.Writer
	color bool
	width int // columns of the terminal; 0: there is none
	close func()
}

// wrapped breaks a text between words where the terminal ends; all but its first line are indented, as the first one is by what stands before
// it.
func (s *screen) wrapped(text string, indent int) string {
	if s.width < 40 {
		return text
	}
	var b strings.Builder
	at := indent
	for i, word := range strings.Fields(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case at+1+n > s.width:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			at = indent
		default:
			b.WriteByte(' ')
			at++
		}
		b.WriteString(word)
		at += n
	}
	return b.String()
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
	s := &screen{color: os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb", width: terminalColumns(f)}
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
	case d < time.Second:
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

// counted prints a count and what is counted: 1 event, 1,200 events.
func counted(n int64, what string) string { return countText(n) + " " + plural(n, what) }

func plural(n int64, what string) string {
	if n == 1 {
		return what
	}
	return what + "s"
}

// progressBar shows how far long work is, on standard error and only on a terminal.
type progressBar struct {
	w     io.Writer // nil: nobody looks
	what  string
	began time.Time // of what
	last  time.Time
}

func newProgress() *progressBar {
	if !isTerminal(os.Stderr) {
		return &progressBar{}
	}
	return &progressBar{w: os.Stderr}
}

// update shows that so much of something is done. Another thing than before begins anew.
func (p *progressBar) update(now time.Time, what string, done, total int64) {
	if what != p.what {
		p.what, p.began, p.last = what, now, time.Time{}
	}
	if p.w == nil || total <= 0 || now.Sub(p.last) < 100*time.Millisecond {
		return
	}
	p.last = now
	fmt.Fprint(p.w, clearLine+progressLine(what, done, total, now.Sub(p.began)))
}

func (p *progressBar) end() {
	if p.w != nil && !p.last.IsZero() {
		fmt.Fprint(p.w, clearLine)
	}
}

const clearLine = "\r\x1b[K"

// progressLine is narrower than 80 columns, since a line that wraps cannot be cleared.
func progressLine(what string, done, total int64, spent time.Duration) string {
	if done == 0 || spent < time.Second { // it is too early for a guess
		return barLine(what, float64(done)/float64(total), 0, 0)
	}
	rate := float64(done) / spent.Seconds()
	return barLine(what, float64(done)/float64(total), rate, float64(total-done)/rate)
}

// barLine shows a share of something, and, where they are known, a rate per second and the seconds that are left.
func barLine(what string, share, rate, left float64) string {
	full := int(30 * share)
	line := fmt.Sprintf("%s [%s%s] %3d %%", what, strings.Repeat("=", full), strings.Repeat(" ", 30-full), int(100*share))
	if rate > 0 {
		line += ", " + countText(int64(rate)) + "/s"
	}
	if left > 0 {
		line += ", " + leftText(left) + " left"
	}
	return line
}

// leftText prints how long something will still take.
func leftText(seconds float64) string {
	left := time.Duration(seconds * float64(time.Second)).Round(time.Second)
	if left > time.Hour {
		left = left.Round(time.Minute)
	}
	return strings.Replace(left.String(), "m0s", "m", 1)
}

// statusLine is standard error with a line at its end that changes. What is written goes above it.
type statusLine struct {
	mu    sync.Mutex // guards the following
	w     io.Writer
	shown bool
}

// stderr is where the logger writes.
var stderr = &statusLine{w: os.Stderr}

func (l *statusLine) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shown {
		l.shown = false
		_, _ = io.WriteString(l.w, clearLine)
	}
	return l.w.Write(p)
}

// show changes the line; "" takes it away.
func (l *statusLine) show(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if line != "" || l.shown {
		_, _ = io.WriteString(l.w, clearLine+line)
	}
	l.shown = line != ""
}
