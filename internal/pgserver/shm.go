package pgserver

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// leftovers are the shared memory of a server, which outlives its processes when they are killed. Postgres removes it
// at the next start in the same data directory; after Kill there may be none.
type leftovers struct {
	sysv  int      // id of the segment that guards the data directory; −1: none
	posix []string // files in /dev/shm (Linux)
}

// findLeftovers looks for the shared memory of running processes. PostgreSQL source, miscadmin.h, "lock file contents":
// line 7 of postmaster.pid has the key and the id of the System V segment.
func findLeftovers(dataDir string, pids []int) leftovers {
	found := leftovers{sysv: -1}
	if lines := pidFile(dataDir); len(lines) > lineShm {
		var key uint64
		fmt.Sscan(lines[lineShm], &key, &found.sysv)
	}
	seen := map[string]bool{}
	for _, pid := range pids {
		f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
		if err != nil {
			continue
		}
		for scan := bufio.NewScanner(f); scan.Scan(); {
			if i := strings.Index(scan.Text(), "/dev/shm/PostgreSQL."); i >= 0 {
				if path := strings.TrimSuffix(scan.Text()[i:], " (deleted)"); !seen[path] {
					seen[path] = true
					found.posix = append(found.posix, path)
				}
			}
		}
		f.Close()
	}
	return found
}

// remove removes the shared memory once the processes are gone. What cannot be removed does no harm.
func (l leftovers) remove() {
	if l.sysv >= 0 {
		var desc unix.SysvShmDesc
		if _, err := unix.SysvShmCtl(l.sysv, unix.IPC_STAT, &desc); err == nil && desc.Nattch == 0 {
			unix.SysvShmCtl(l.sysv, unix.IPC_RMID, nil)
		}
	}
	for _, path := range l.posix {
		os.Remove(path)
	}
}

// Lines of postmaster.pid, counted from 0.
const (
	linePID    = 0
	lineShm    = 6
	lineStatus = 7
)

func pidFile(dataDir string) []string {
	text, err := os.ReadFile(filepath.Join(dataDir, "postmaster.pid"))
	if err != nil {
		return nil
	}
	return strings.Split(string(text), "\n")
}
