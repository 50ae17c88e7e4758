package pgserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
)

const initdbStopLimit = 5 * time.Second

// clusterVersion returns the major version of the cluster in dir, "" if there is none and one may be made there.
func clusterVersion(dir string) (string, error) {
	text, err := os.ReadFile(filepath.Join(dir, "PG_VERSION"))
	if err == nil {
		return strings.TrimSpace(string(text)), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read data directory: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read data directory: %w", err)
	}
	if len(entries) > 0 {
		return "", fmt.Errorf("use data directory %s: it is not empty and holds no cluster", dir)
	}
	return "", nil
}

// initCluster makes a cluster in s.dataDir, which is empty or does not exist.
func (s *Server) initCluster(ctx context.Context, temporary bool) error {
	target := s.dataDir
	_, err := os.Stat(target)
	exists := err == nil
	if !exists {
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return fmt.Errorf("create data directory: %w", err)
		}
		target += ".initdb"
		if err := os.RemoveAll(target); err != nil {
			return fmt.Errorf("remove what an earlier initdb left: %w", err)
		}
		if err := os.Mkdir(target, 0o700); err != nil {
			return fmt.Errorf("create data directory: %w", err)
		}
	}
	if err := s.runInitdb(ctx, target, temporary); err != nil {
		if exists {
			empty(target)
		} else {
			os.RemoveAll(target)
		}
		return err
	}
	if !exists {
		if err := os.Rename(target, s.dataDir); err != nil {
			return fmt.Errorf("move the new cluster into place: %w", err)
		}
	}
	return nil
}

func (s *Server) runInitdb(ctx context.Context, dir string, temporary bool) error {
	if err := s.account.checkAccess(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := s.account.own(dir); err != nil {
		return err
	}
	args := []string{"-D", dir, "-U", superuser, "-A", "trust", "-E", "UTF8", "--locale=C"}
	if temporary {
		args = append(args, "--no-sync") // who loses the machine loses the directory
	}
	cmd := exec.Command(s.bin.path("initdb"), args...)
	s.account.prepare(cmd)
	cmd.Dir = dir // a directory that the account can enter
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	proc, err := localserver.Start(cmd, syscall.SIGTERM)
	if err != nil {
		return err
	}
	select {
	case <-proc.Done():
	case <-ctx.Done():
		err := fmt.Errorf("run initdb: %w", context.Cause(ctx))
		if proc.Signal(syscall.SIGTERM) == nil && proc.WaitFor(initdbStopLimit) {
			return err // it has cleaned up after itself
		}
		return errors.Join(err, killTree(proc, dir))
	}
	if err := proc.Err(); err != nil {
		return fmt.Errorf("run initdb as %s: %w: %s", s.account, err, strings.TrimSpace(out.String()))
	}
	return nil
}

func empty(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		os.RemoveAll(filepath.Join(dir, e.Name()))
	}
}
