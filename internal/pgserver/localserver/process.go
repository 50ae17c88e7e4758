package localserver

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// Process is a running child. Its methods may be called from several goroutines.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; set before done is closed
}

// Start starts cmd, in its own process group. If this process dies, the child gets onDeath (Linux only).
func Start(cmd *exec.Cmd, onDeath syscall.Signal) (*Process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	setDeathSignal(cmd.SysProcAttr, onDeath)
	p := &Process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // see the package comment
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return p, nil
}

// PID is the child's process id. It may belong to somebody else once Done is closed.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the child has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Ended reports whether the child has ended.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Err says how the child ended; it is valid once Done is closed.
func (p *Process) Err() error { return p.err }

// Signal sends sig. A child that has ended is no error.
func (p *Process) Signal(sig syscall.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("send %s to process %d: %w", sig, p.PID(), err)
	}
	return nil
}

// WaitFor waits until the child has ended, at most limit, and reports whether it has.
func (p *Process) WaitFor(limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.done:
		return true
	case <-timer.C:
		return p.Ended()
	}
}

// Tree returns the process ids of the child and of all that descend from it, the child's first.
func (p *Process) Tree() ([]int, error) {
	parents, err := parentIDs()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	tree := []int{p.PID()}
	for i := 0; i < len(tree); i++ {
		for pid, parent := range parents {
			if parent == tree[i] {
				tree = append(tree, pid)
			}
		}
	}
	return tree, nil
}

const (
	killLimit   = 10 * time.Second
	freezeLimit = time.Second // then they are killed as they are
)

// Kill ends the child and all that descend from it with SIGKILL, and waits until they are gone. before, unless nil, is
// called with their process ids while they still exist.
func (p *Process) Kill(before func(pids []int)) error {
	if p.Ended() {
		return nil
	}
	tree, err := p.freeze()
	if err == nil && before != nil {
		before(tree)
	}
	for i := len(tree) - 1; i > 0; i-- {
		_ = syscall.Kill(tree[i], syscall.SIGKILL) // it may have ended
	}
	if killErr := p.Signal(syscall.SIGKILL); killErr != nil {
		return killErr
	}
	deadline := time.Now().Add(killLimit)
	if !p.WaitFor(killLimit) {
		return fmt.Errorf("kill process %d: still there after %s", p.PID(), killLimit)
	}
	for _, pid := range tree[min(1, len(tree)):] {
		for alive(pid) {
			if time.Now().After(deadline) {
				return fmt.Errorf("kill process %d, a child of %d: still there after %s", pid, p.PID(), killLimit)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return err
}

// freeze stops the child and all that descend from it, so that none forks while they are being killed, and returns
// them. A stop takes effect a moment after the signal; until then the process may still fork, hence the rounds.
func (p *Process) freeze() ([]int, error) {
	stopped := map[int]bool{}
	deadline := time.Now().Add(freezeLimit)
	for {
		tree, err := p.Tree()
		if err != nil {
			return nil, err
		}
		fresh := false
		for _, pid := range tree {
			if !stopped[pid] {
				stopped[pid], fresh = true, true
				_ = syscall.Kill(pid, syscall.SIGSTOP) // it may have ended
			}
		}
		if !fresh {
			return tree, nil
		}
		for pid := range stopped {
			for !halted(pid) && time.Now().Before(deadline) {
				time.Sleep(time.Millisecond)
			}
		}
	}
}
