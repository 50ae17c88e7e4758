//go:build unix

package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// terminalColumns tells how wide a terminal is; 0: nobody knows.
func terminalColumns(f *os.File) int {
	w, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	return int(w.Col)
}
