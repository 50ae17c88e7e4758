package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// errNotMounted means that this user may not mount.
var errNotMounted = errors.New("a small disk can only be made by a user who may mount")

// smallDisk mounts a disk of a few megabytes that Postgres can write.
func smallDisk(t *testing.T, server *pgservertest.Server, megabytes int) (string, error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "backstory-disk-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=0777", megabytes)); err != nil {
		return "", fmt.Errorf("%w: %w", errNotMounted, err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	space := filepath.Join(dir, "pg")
	if err := os.Mkdir(space, 0o700); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(server.DataDir())
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	if err := os.Chown(space, int(st.Uid), int(st.Gid)); err != nil {
		t.Fatal(err)
	}
	return space, nil
}
