package localserver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// CacheDir returns the directory for fetched programs and creates it: backstory in the user's cache directory. For
// root it is one that other users can enter, because Postgres never runs as root. For a user without a home it is a
// private directory under the temporary one.
func CacheDir() (string, error) {
	if os.Geteuid() == 0 {
		dir := systemCacheDir()
		return dir, os.MkdirAll(dir, 0o755)
	}
	if base, err := os.UserCacheDir(); err == nil {
		dir := filepath.Join(base, "backstory")
		if os.MkdirAll(dir, 0o755) == nil && syscall.Access(dir, 2 /* W_OK */) == nil {
			return dir, nil
		}
	}
	dir := filepath.Join(os.TempDir(), "backstory-cache-"+strconv.Itoa(os.Geteuid()))
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("create cache directory: %w", err)
	}
	// Anybody could have made a directory of this name: programs run only from one that is ours.
	info, err := os.Lstat(dir)
	if err != nil {
		return "", fmt.Errorf("read cache directory: %w", err)
	}
	if !info.IsDir() || !ownedBy(info, os.Geteuid()) || info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("use cache directory %s: it is not a private directory of this user", dir)
	}
	return dir, nil
}

func systemCacheDir() string {
	if runtime.GOOS == "darwin" {
		return "/Library/Caches/backstory"
	}
	return "/var/cache/backstory"
}

func ownedBy(info fs.FileInfo, uid int) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == uid
}

// Install returns the directory name (which may have slashes) in the cache directory cache, and has fetch fill it
// first if it does not exist. If cache is empty it is CacheDir, and an ordinary user is also given what root has
// installed on this machine.
//
// fetch fills stage, an empty directory. Where fetch cannot be interrupted and ctx ends, Install returns at once and
// fetch goes on behind it.
func Install(ctx context.Context, cache, name string, fetch func(ctx context.Context, stage string) error) (string, error) {
	if cache == "" {
		shared := filepath.Join(systemCacheDir(), name)
		if info, err := os.Stat(shared); err == nil && info.IsDir() && ownedBy(info, 0) {
			return shared, nil
		}
		var err error
		if cache, err = CacheDir(); err != nil {
			return "", err
		}
	}
	dir := filepath.Join(cache, name)
	if isDir(dir) {
		return dir, nil
	}
	done := make(chan error, 1)
	go func() { done <- install(ctx, dir, fetch) }()
	select {
	case err := <-done:
		return dir, err
	case <-ctx.Done():
		return "", fmt.Errorf("fetch %s: %w", name, context.Cause(ctx))
	}
}

func install(ctx context.Context, dir string, fetch func(context.Context, string) error) error {
	parent, name := filepath.Split(dir)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return fmt.Errorf("create cache directory: %w", err)
	}
	unlock, err := lockFile(ctx, filepath.Join(parent, "."+name+".lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if isDir(dir) {
		return nil // another process was faster
	}
	stage := filepath.Join(parent, "."+name+".stage")
	if err := os.RemoveAll(stage); err != nil { // what a killed process left; the lock says that nobody is at it
		return fmt.Errorf("remove old stage: %w", err)
	}
	defer os.RemoveAll(stage)
	if err := os.Mkdir(stage, 0o755); err != nil {
		return fmt.Errorf("create stage: %w", err)
	}
	if err := fetch(ctx, stage); err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		if err := openToAll(stage); err != nil {
			return fmt.Errorf("open %s to other users: %w", dir, err)
		}
	}
	if err := os.Rename(stage, dir); err != nil {
		return fmt.Errorf("move into the cache: %w", err)
	}
	return nil
}

// openToAll lets every user read what the owner reads and run what the owner runs.
func openToAll(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Type()&fs.ModeSymlink != 0 {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		owner := info.Mode().Perm() & 0o500
		return os.Chmod(path, info.Mode().Perm()|owner>>3|owner>>6)
	})
}

// lockFile waits for the lock on path; ctx bounds the wait. The file stays when it is unlocked: removing it would
// let two processes hold two different files of one name.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for the process that holds %s: %w", path, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
