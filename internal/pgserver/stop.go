package pgserver

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
)

// Mode is a mode of shutdown, as of pg_ctl stop.
type Mode int

// The modes, from patient to harsh.
const (
	Smart     Mode = iota // waits until all sessions have ended
	Fast                  // ends sessions, writes a checkpoint
	Immediate             // ends at once; the next start recovers from the WAL
)

var modeSignals = map[Mode]syscall.Signal{Smart: syscall.SIGTERM, Fast: syscall.SIGINT, Immediate: syscall.SIGQUIT}

func (m Mode) String() string {
	return map[Mode]string{Smart: "smart", Fast: "fast", Immediate: "immediate"}[m]
}

// Stop ends the server for good and removes what Start made, the data directory only if it was temporary. A shutdown
// that takes more than 30 seconds goes on to the next harsher mode, and the error says so. A second Stop does nothing.
func (s *Server) Stop(mode Mode) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return nil
	}
	err := s.shutDown(mode)
	if s.running() {
		return err
	}
	s.stopped = true
	return errors.Join(err, s.scratch.Remove())
}

// Kill ends the postmaster and all its children with SIGKILL, as a crash would, and returns when they are gone. The
// data stays: Restart recovers it.
func (s *Server) Kill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kill()
}

func (s *Server) kill() error {
	if !s.running() {
		return nil
	}
	return killTree(s.proc, s.dataDir)
}

func killTree(proc *localserver.Process, dataDir string) error {
	left := leftovers{sysv: -1}
	if err := proc.Kill(func(pids []int) { left = findLeftovers(dataDir, pids) }); err != nil {
		return fmt.Errorf("kill Postgres: %w", err)
	}
	left.remove()
	return nil
}

// Restart stops the server in the given mode, unless it was killed or has crashed, and starts it again on the same
// port and data. ctx bounds the start. After an error PID says whether the server runs (a shutdown may have become
// harsher than asked); if it does not, Restart may be tried again.
func (s *Server) Restart(ctx context.Context, mode Mode) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return ErrStopped
	}
	err := s.shutDown(mode)
	if s.running() {
		return err
	}
	return errors.Join(err, s.start(ctx))
}

func (s *Server) shutDown(mode Mode) error {
	asked := mode
	for ; s.running() && mode <= Immediate; mode++ {
		if err := s.proc.Signal(modeSignals[mode]); err != nil {
			return err
		}
		if s.proc.WaitFor(stopLimit) {
			if mode != asked {
				return fmt.Errorf("stop Postgres: the %s shutdown took more than %s; made it %s", asked, stopLimit, mode)
			}
			return nil
		}
	}
	if !s.running() {
		return nil
	}
	err := fmt.Errorf("stop Postgres: no shutdown ended within %s; killed it\n%s", stopLimit, localserver.LogTail(s.LogFile(), 0, logTailLines))
	return errors.Join(err, s.kill())
}
