//go:build unix

package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// intro explains, once, what there is to be seen.
func (d *demo) intro() {
	state := "a fresh database"
	if d.old {
		state = "the database of " + d.home.since().Format("2006-01-02 15:04")
	}
	d.say(`
%s

  An ordinary shop works on Postgres %s: %s, in %s.
  It overwrites and deletes rows like any application, and remembers nothing. The sidecar reads the server's write-ahead log
  and keeps what happened as events, in schema backstory of the same database. A few of them, as they come:
`, d.out.bold("backstory demo: a shop, and its history"), d.server.Version(), state, d.home.dir)
}

// telling is what was printed last of the commands to type.
type telling struct {
	told bool
	back string // the age that was good enough then
}

// backs are ages of moments to look back to, the best first.
var backs = []struct {
	text string
	age  time.Duration
}{{"1 minute ago", time.Minute}, {"30 seconds ago", 30 * time.Second}, {"10 seconds ago", 10 * time.Second}}

// due tells whether the commands are to be printed: when there is enough history for them, and once more when there is
// more of it.
func (t telling) due(w *watcher) bool {
	back := lookingBack(w)
	if back == "" || w.story("") == nil {
		return false
	}
	return !t.told || back == backs[0].text && t.back != back
}

// lookingBack gives an age to which the history goes back, empty if it is too young.
func lookingBack(w *watcher) string {
	h := w.history()
	for _, b := range backs {
		if h > b.age+2*time.Second {
			return b.text
		}
	}
	return ""
}

// commands prints what can be typed in another terminal. Every line that begins with four spaces is a command.
func (d *demo) commands(w *watcher) telling {
	o, back := w.story(d.told), lookingBack(w)
	if o == nil || back == "" {
		d.say("In a few seconds there will be enough history to look back at.")
		return telling{}
	}
	d.told = o.id
	rule := d.out.dim("────────────────────────────────────────────────────────────────────────────────")
	about := func(text string) { fmt.Fprintf(d.out, "  %s\n", text) }
	command := func(format string, args ...any) {
		fmt.Fprintf(d.out, "    %s\n", d.out.green(fmt.Sprintf(format, args...)))
	}
	psql := func(sql string) {
		if d.psql != "" {
			command(`%s "$BACKSTORY_SOURCE_URL" -c "%s"`, d.psql, sql)
		}
	}
	fmt.Fprintf(d.out, "\n%s\n%s\n", rule, d.out.bold("Type this in a second terminal."))
	about("First, tell the shell where the demo is:")
	command(". %s", shellQuote(d.home.env()))
	about("What happened to one order: who did it, and why.")
	command("backstory log orders/%s", o.id)
	about("That order just before it was paid, and now.")
	command("backstory show orders/%s --at %d", o.id, o.beforePaid)
	command("backstory show orders/%s", o.id)
	about("What customer support has been doing.")
	command("backstory log --author support: --limit 5")
	about(fmt.Sprintf("All tables as they were %s, in a schema beside the present ones, and the orders that differ.", back))
	command("backstory checkout --at '%s' --schema before --replace", back)
	psql("SELECT id, b.status AS before, o.status AS now FROM before.orders b JOIN orders o USING (id) WHERE b.status <> o.status ORDER BY id DESC LIMIT 8")
	if d.psql != "" {
		about("Change a row yourself, behind the application's back, and see that it was noticed.")
		psql("UPDATE orders SET note = 'changed at ' || now() WHERE id = " + o.id)
		command("backstory log orders/%s --limit 1", o.id)
	}
	about("How the sidecar fares, and a proof that nobody has altered the history.")
	command("backstory status")
	command("backstory verify")
	if d.psql == "" {
		about("There is no psql on this machine; any client can connect to $BACKSTORY_SOURCE_URL.")
	}
	end := "Ctrl-C ends the demo."
	if foregroundTerminal(os.Stdin) {
		end = "Enter prints this again, with another order. Ctrl-C ends the demo."
	}
	d.say("%s\n%s\n", end, rule)
	return telling{true, back}
}

// summary prints the figures of the last seconds.
func (d *demo) summary(w *watcher) {
	s := w.take()
	line := fmt.Sprintf("%s  %s events of %s transactions in %.0f s", time.Now().Format("15:04:05"), countText(s.events), countText(s.transactions), sumEvery.Seconds())
	if n := len(s.lags); n > 0 {
		line += fmt.Sprintf("; from commit to log %s, at most %s", lagText(s.lags[n/2]), lagText(s.lags[n-1]))
	}
	d.say("%s", d.out.dim("── "+line+" ──"))
}

func lagText(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%.1f ms", float64(max(0, d))/float64(time.Millisecond))
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// width is how many characters fit into a line of the terminal, 0 if f is none.
func width(f *os.File) int {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	return int(size.Col)
}

// crop cuts a line after so many characters; escape sequences for colours are none.
func crop(line string, width int) string {
	if width == 0 {
		return line
	}
	var b strings.Builder
	n, escape, colored := 0, false, false
	for _, r := range line {
		switch {
		case r == '\x1b':
			escape, colored = true, true
		case escape:
			escape = r != 'm'
		default:
			if n++; n == width {
				b.WriteRune('…')
				if colored {
					b.WriteString("\x1b[0m")
				}
				return b.String()
			}
		}
		b.WriteRune(r)
	}
	return b.String()
}
