package localserver

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Scratch is a temporary directory for one server. Its path is short enough for a Unix socket in a directory of one
// letter below it, and other users can enter it.
type Scratch struct {
	Path string
	lock *os.File // an open, locked handle of the directory: says that its owner lives
}

// maxBase leaves room for the rest of a socket's path: the limit is 107 bytes on Linux and 103 on macOS.
const maxBase = 50

// NewScratch makes a directory whose name begins with prefix. Directories of that prefix whose process is gone are
// removed on the way.
func NewScratch(prefix string) (*Scratch, error) {
	base := os.TempDir()
	if len(base) > maxBase || os.Geteuid() == 0 && CheckAccess(base, nobody, nobody) != nil {
		base = "/tmp"
	}
	sweep(base, prefix)
	path, err := os.MkdirTemp(base, prefix)
	if err != nil {
		return nil, fmt.Errorf("create scratch directory: %w", err)
	}
	s := &Scratch{Path: path}
	if s.lock, err = os.Open(path); err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("open scratch directory: %w", err)
	}
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		s.Remove()
		return nil, fmt.Errorf("lock scratch directory: %w", err)
	}
	if err := os.Chmod(path, 0o755); err != nil {
		s.Remove()
		return nil, fmt.Errorf("open scratch directory to others: %w", err)
	}
	return s, nil
}

// Remove removes the directory and all that is in it.
func (s *Scratch) Remove() error {
	defer s.lock.Close()
	if err := os.RemoveAll(s.Path); err != nil {
		return fmt.Errorf("remove scratch directory: %w", err)
	}
	return nil
}

// sweep removes this user's scratch directories that nobody has locked. A very young one may be between MkdirTemp
// and Flock. Errors do not matter: the next sweep tries again.
func sweep(base, prefix string) {
	paths, _ := filepath.Glob(filepath.Join(base, prefix+"*"))
	for _, path := range paths {
		info, err := os.Lstat(path)
		if err != nil || !info.IsDir() || !ownedBy(info, os.Geteuid()) || time.Since(info.ModTime()) < time.Minute {
			continue
		}
		dir, err := os.Open(path)
		if err != nil {
			continue
		}
		if syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			os.RemoveAll(path)
		}
		dir.Close()
	}
}

const nobody = 65534

// CheckAccess returns an error that names the first directory on the way to path, path included, that the user may
// not enter. It looks at the classic permission bits only.
func CheckAccess(path string, uid, gid int) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	if parent := filepath.Dir(path); parent != path {
		if err := CheckAccess(parent, uid, gid); err != nil {
			return err
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	bit := os.FileMode(0o001)
	if st := info.Sys().(*syscall.Stat_t); int(st.Uid) == uid {
		bit = 0o100
	} else if int(st.Gid) == gid {
		bit = 0o010
	}
	if info.Mode()&bit == 0 {
		return fmt.Errorf("directory %s is closed to user id %d (mode %o)", path, uid, info.Mode().Perm())
	}
	return nil
}
