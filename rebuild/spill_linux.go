package rebuild

import (
	"os"

	"golang.org/x/sys/unix"
)

// unnamedFile opens a temporary file that never has a name, where the file system can do that.
func unnamedFile(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return removedFile(dir)
	}
	return os.NewFile(uintptr(fd), "temporary file in "+dir), nil
}

const keepsName = false
