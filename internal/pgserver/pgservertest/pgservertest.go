// Package pgservertest gives tests a real Postgres.
//
// ForTest shares one server between the tests of a process that ask for the same Config; each test makes a database of
// its own there. A test that stops, kills or reconfigures its server takes one for itself with Start.
//
// A package whose tests use ForTest stops the shared servers at the end, and sees that no goroutine is left:
//
//	func TestMain(m *testing.M) { os.Exit(pgservertest.Main(m)) }
//
// Without it the servers end with the process all the same (on Linux), and the next Start removes their directories.
//
// The environment variable BACKSTORY_TEST_PG_VERSION ("14" to "18") chooses the version for tests that do not name one,
// or (AtLeast) an older one.
// If no Postgres can be had, the test fails; it is never skipped.
package pgservertest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/internal/pgserver"
)

// VersionEnv names the environment variable that chooses the version.
const VersionEnv = "BACKSTORY_TEST_PG_VERSION"

const (
	startLimit   = 3 * time.Minute // a fetch included
	cleanupLimit = 30 * time.Second
)

// Server is a running server with helpers for tests.
type Server struct {
	*pgserver.Server
}

var shared = struct {
	mu      sync.Mutex // guards the following; held while a server starts
	servers map[string]*result
}{servers: map[string]*result{}}

type result struct {
	server *Server
	err    error
}

// Main runs the tests of a package and stops the shared servers. It gives the exit code, which is not 0 if a goroutine is
// left either.
func Main(m *testing.M) (code int) {
	before := runtime.NumGoroutine()
	code = m.Run()
	StopShared()
	if f := flag.Lookup("test.fuzz"); f != nil && f.Value.String() != "" {
		return code // fuzzing itself leaves the goroutine of its signals behind
	}
	if left := Leaked(before, 10*time.Second); left != "" {
		fmt.Fprintln(os.Stderr, left)
		code = max(code, 1)
	}
	return code
}

// Leaked waits until there are no more goroutines than before, or gives the stacks of all. Some take a moment to end after
// what they worked for.
func Leaked(before int, limit time.Duration) string {
	for end := time.Now().Add(limit); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<18)
			return fmt.Sprintf("goroutines leaked: %d before, %d now\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
		}
	}
	return ""
}

// ForTest returns the shared server for cfg, started if it is the first time. cfg.DataDir must be empty.
func ForTest(t testing.TB, cfg pgserver.Config) *Server {
	t.Helper()
	if cfg.DataDir != "" {
		t.Fatal("pgservertest.ForTest: a shared server has no DataDir of the caller; use Start")
	}
	cfg = withVersion(cfg)
	key := fmt.Sprintf("%q %q %q %q", cfg.Version, cfg.Settings, cfg.HBA, cfg.CacheDir) // maps print sorted
	shared.mu.Lock()
	defer shared.mu.Unlock()
	r, ok := shared.servers[key]
	if !ok {
		r = &result{}
		r.server, r.err = start(cfg)
		shared.servers[key] = r
	}
	if r.err != nil {
		t.Fatalf("no Postgres for this test: %v", r.err)
	}
	return r.server
}

// Start returns a server for this test alone, stopped in its Cleanup.
func Start(t testing.TB, cfg pgserver.Config) *Server {
	t.Helper()
	s, err := start(withVersion(cfg))
	if err != nil {
		t.Fatalf("no Postgres for this test: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Stop(pgserver.Immediate); err != nil {
			t.Error(err)
		}
	})
	return s
}

// StopShared stops the shared servers. Call it when all tests have ended.
func StopShared() {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	for key, r := range shared.servers {
		if r.err == nil {
			if err := r.server.Stop(pgserver.Immediate); err != nil {
				fmt.Fprintln(os.Stderr, "pgservertest:", err)
			}
		}
		delete(shared.servers, key)
	}
}

// AtLeast gives the version for a test of something that Postgres has from a version on: that one, or the newer one that VersionEnv chooses.
func AtLeast(version string) string {
	return max(version, os.Getenv(VersionEnv)) // each begins with two digits
}

func withVersion(cfg pgserver.Config) pgserver.Config {
	if cfg.Version == "" {
		cfg.Version = os.Getenv(VersionEnv)
	}
	return cfg
}

func start(cfg pgserver.Config) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = func(line string) { fmt.Fprintln(os.Stderr, "pgservertest:", line) }
	}
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	s, err := pgserver.Start(ctx, cfg)
	return &Server{s}, err
}

var databases atomic.Int64

// NewDatabase makes an empty database for this test and returns its name. In the test's Cleanup it is dropped, with
// its replication slots, its prepared transactions and whoever is connected. A server that does not run then is left
// alone.
func (s *Server) NewDatabase(t testing.TB) string {
	t.Helper()
	db := fmt.Sprintf("test_%d_%d", os.Getpid(), databases.Add(1))
	ctx, cancel := context.WithTimeout(context.Background(), cleanupLimit)
	defer cancel()
	err := s.withConn(ctx, "postgres", func(conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `CREATE DATABASE `+db+` TEMPLATE template0`)
		return err
	})
	if err != nil {
		t.Fatalf("create database for this test: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), cleanupLimit)
		defer cancel()
		if s.PID() == 0 {
			return
		}
		if err := s.dropDatabase(ctx, db); err != nil {
			t.Errorf("drop database of this test: %v", err)
		}
	})
	return db
}

func (s *Server) withConn(ctx context.Context, db string, do func(*pgx.Conn) error) error {
	conn, err := pgx.Connect(ctx, s.SocketURL(db))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return do(conn)
}

func (s *Server) dropDatabase(ctx context.Context, db string) error {
	err := s.withConn(ctx, "postgres", func(conn *pgx.Conn) error {
		var exists bool
		if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)`, db).Scan(&exists); err != nil || !exists {
			return err
		}
		return s.dropSlots(ctx, conn, db)
	})
	if err != nil {
		return err
	}
	err = s.withConn(ctx, db, func(conn *pgx.Conn) error { return rollbackPrepared(ctx, conn) })
	if pgCode(err) == "3D000" { // invalid_catalog_name: the test has dropped it
		return nil
	}
	if err != nil {
		return err
	}
	return s.withConn(ctx, "postgres", func(conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `DROP DATABASE IF EXISTS `+db+` WITH (FORCE)`)
		return err
	})
}

// dropSlots drops the slots of the database. One in use becomes free when its walsender has noticed its end, and a
// client may come back once more: hence the loop, which ctx bounds.
func (s *Server) dropSlots(ctx context.Context, conn *pgx.Conn, db string) error {
	const drop = `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = $1 AND NOT active`
	const end = `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1`
	for {
		if _, err := conn.Exec(ctx, end, db); err != nil {
			return err
		}
		_, err := conn.Exec(ctx, drop, db)
		if code := pgCode(err); err != nil && code != "55006" && code != "42704" { // object_in_use, undefined_object
			return err
		}
		var left int
		if err := conn.QueryRow(ctx, `SELECT count(*) FROM pg_replication_slots WHERE database = $1`, db).Scan(&left); err != nil {
			return err
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("drop %d replication slots: %w", left, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func rollbackPrepared(ctx context.Context, conn *pgx.Conn) error {
	rows, err := conn.Query(ctx, `SELECT format('ROLLBACK PREPARED %L', gid) FROM pg_prepared_xacts WHERE database = current_database()`)
	if err != nil {
		return err
	}
	commands, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, command := range commands {
		if _, err := conn.Exec(ctx, command); err != nil {
			return err
		}
	}
	return nil
}

func pgCode(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}
