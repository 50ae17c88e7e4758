package pgservertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/internal/pgserver"
)

// Standby starts a streaming standby of a server, with a physical replication slot of the name given, made from a base backup (PostgreSQL manual,
// Making a Base Backup Using the Low Level API). It has the primary's settings and more, and is stopped in the test's Cleanup. db is the
// database by which it asks for the primary's logical slots.
func (s *Server) Standby(t testing.TB, cfg pgserver.Config, slot, db string) *Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "backstory-standby-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	if err := s.withConn(ctx, "postgres", func(conn *pgx.Conn) error { return s.backUp(ctx, conn, slot, data) }); err != nil {
		t.Fatalf("make a standby: %v", err)
	}
	cfg.Settings = maps.Clone(cfg.Settings)
	cfg.Settings["primary_conninfo"] = fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=%s application_name=%s", s.Port(), db, slot)
	cfg.Settings["primary_slot_name"] = slot
	cfg.DataDir = data
	return Start(t, cfg)
}

func (s *Server) backUp(ctx context.Context, conn *pgx.Conn, slot, data string) error {
	if _, err := conn.Exec(ctx, `SELECT pg_create_physical_replication_slot($1, true)`, slot); err != nil {
		return err
	}
	begin, end := `SELECT pg_backup_start('standby', true)`, `SELECT labelfile FROM pg_backup_stop(false)`
	if s.Major() < 15 {
		begin, end = `SELECT pg_start_backup('standby', true, false)`, `SELECT labelfile FROM pg_stop_backup(false, false)`
	}
	if _, err := conn.Exec(ctx, begin); err != nil {
		return err
	}
	if err := copyCluster(s.DataDir(), data); err != nil {
		return err
	}
	var label string
	if err := conn.QueryRow(ctx, end).Scan(&label); err != nil {
		return err
	}
	for name, text := range map[string]string{"backup_label": label, "standby.signal": ""} {
		if err := os.WriteFile(filepath.Join(data, name), []byte(text), 0o600); err != nil {
			return err
		}
		if err := sameOwner(s.DataDir(), filepath.Join(data, name)); err != nil {
			return err
		}
	}
	return nil
}

// copyCluster copies the files of a cluster that is at work, but for those that a base backup leaves out. What vanishes meanwhile was not
// needed.
func copyCluster(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		name, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, name)
		if d.IsDir() && strings.HasPrefix(name, "pg_replslot/") {
			return fs.SkipDir
		}
		if d.IsDir() {
			if err := os.Mkdir(target, 0o700); err != nil {
				return err
			}
			return sameOwner(path, target)
		}
		for _, left := range []string{"pg_wal/", "pg_replslot/", "pg_stat_tmp/", "pg_notify/", "pg_subtrans/", "pg_dynshmem/", "postmaster.", "server.log"} {
			if strings.HasPrefix(name, left) {
				return nil
			}
		}
		in, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := os.OpenFile(target, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if _, err := io.Copy(out, in); err != nil {
			return errors.Join(err, out.Close())
		}
		if err := out.Close(); err != nil {
			return err
		}
		return sameOwner(path, target)
	})
}

// sameOwner gives a file the owner that another one has.
func sameOwner(as, path string) error {
	info, err := os.Stat(as)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	return os.Chown(path, int(st.Uid), int(st.Gid))
}
