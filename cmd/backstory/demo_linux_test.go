package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal starts a command as the foreground job of a terminal of its own and returns the side on which a person types. What is
// shown there, echo and all, goes to shown.
func terminal(t *testing.T, cmd *exec.Cmd, shown io.Writer) *os.File {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	cmd.Stdin = theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true} // of descriptor 0
	cmd.Env = append(os.Environ(), "TERM=xterm")
	go func() { _, _ = io.Copy(shown, person) }()
	return person
}

func TestADemoInATerminalAsksAndListens(t *testing.T) {
	t.Parallel()
	dir := demoDirForTest(t)
	first := startDemo(t, dir)
	first.waitFor(`Order[A-Z]`)
	first.stop()

	start := func() (*runningDemo, *os.File) {
		cmd := exec.Command(program(t), "demo", "--dir", dir)
		person := terminal(t, cmd, io.Discard)
		return follow(t, cmd, dir), person
	}
	typed := func(person *os.File, text string) {
		t.Helper()
		if _, err := person.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}

	// Ctrl-C instead of an answer.
	d, person := start()
	time.Sleep(500 * time.Millisecond) // the question has no end of line to wait for
	typed(person, "\x03")
	d.ends(10*time.Second, 0)
	d.waitFor(`There is a demo from .*\[Continue/fresh\]`)

	// Enter: it goes on, and Enter prints the commands.
	d, person = start()
	typed(person, "\n")
	d.waitFor(`the database of [\s\S]*Enter prints this again`)
	typed(person, "\n")
	for end := time.Now().Add(20 * time.Second); strings.Count(d.text(), "Type this in a second terminal") < 2; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("Enter does not print the commands again")
		}
	}
	typed(person, "\x03") // as the terminal's Ctrl-C
	d.ends(20*time.Second, 0)
	d.waitFor(`Everything has stopped\.`)
	d.noProcessLeft()

	d, person = start()
	typed(person, "fresh\n")
	d.waitFor(`a fresh database`)
	typed(person, "\x03")
	d.ends(20*time.Second, 0)
	d.noProcessLeft()
}
