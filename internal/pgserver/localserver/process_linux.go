package localserver

import (
	"bytes"
	"os"
	"strconv"
	"syscall"
)

func setDeathSignal(attr *syscall.SysProcAttr, sig syscall.Signal) { attr.Pdeathsig = sig }

// parentIDs maps every process to its parent.
func parentIDs() (map[int]int, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	parents := map[int]int{}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if _, parent, ok := stat(pid); ok {
			parents[pid] = parent
		}
	}
	return parents, nil
}

// alive is false for a process that has ended and only waits to be reaped: in a container nobody may ever reap it.
func alive(pid int) bool {
	state, _, ok := stat(pid)
	return ok && state != 'Z' && state != 'X'
}

// halted reports whether the process is stopped, has ended, or is asleep in the kernel: there it may wait for a stopped
// child, which it made by vfork, and will stop before it comes back.
func halted(pid int) bool {
	state, _, ok := stat(pid)
	return !ok || bytes.IndexByte([]byte("TtZXD"), state) >= 0
}

// stat reads the state and the parent from /proc/PID/stat: "pid (name) state parent …"; the name may hold anything.
func stat(pid int) (state byte, parent int, ok bool) {
	line, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, false
	}
	_, rest, found := cutLast(line, ") ")
	fields := bytes.Fields(rest)
	if !found || len(fields) < 2 {
		return 0, 0, false
	}
	parent, err = strconv.Atoi(string(fields[1]))
	return fields[0][0], parent, err == nil
}

func cutLast(s []byte, sep string) (before, after []byte, found bool) {
	i := bytes.LastIndex(s, []byte(sep))
	if i < 0 {
		return s, nil, false
	}
	return s[:i], s[i+len(sep):], true
}
