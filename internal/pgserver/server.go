package pgserver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
)

const (
	superuser     = "postgres"
	logName       = "server.log"
	logTailLines  = 15
	scratchPrefix = "backstory-pg-"
	stopLimit     = 30 * time.Second // after which a stop becomes harsher
	portTries     = 5
	pollEvery     = 10 * time.Millisecond
)

// ErrStopped is returned for a server that Stop has ended.
var ErrStopped = errors.New("postgres server was stopped for good")

// Server is a Postgres server. Its methods may be called from several goroutines.
type Server struct {
	cfg       Config
	bin       binaries
	account   account
	scratch   *localserver.Scratch // has the socket directory, and the data directory if it is temporary
	dataDir   string
	socketDir string

	mu       sync.Mutex // guards the following
	port     int        // changes in Start only
	settings map[string]string
	proc     *localserver.Process
	stopped  bool
}

// Start starts a server and waits until it accepts connections. ctx bounds the start, not the server's life. The
// caller has to Stop the server.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, settings: withDefaults(cfg.Settings)}
	var cluster string
	if cfg.DataDir != "" {
		var err error
		if s.dataDir, err = filepath.Abs(cfg.DataDir); err != nil {
			return nil, fmt.Errorf("read data directory: %w", err)
		}
		if cluster, err = clusterVersion(s.dataDir); err != nil {
			return nil, err
		}
		if cfg.Version == "" {
			cfg.Version = cluster
		}
	}
	var err error
	if s.bin, err = findBinaries(ctx, cfg); err != nil {
		return nil, err
	}
	if cluster != "" && cluster != strconv.Itoa(s.bin.major) {
		return nil, fmt.Errorf("use data directory %s: its cluster is of version %s, not %d", s.dataDir, cluster, s.bin.major)
	}
	if s.account, err = accountFor(s.dataDir, cluster != ""); err != nil {
		return nil, err
	}
	if s.scratch, err = localserver.NewScratch(scratchPrefix); err != nil {
		return nil, err
	}
	if err := s.firstStart(ctx, cluster == ""); err != nil {
		return nil, errors.Join(err, s.scratch.Remove())
	}
	return s, nil
}

func (s *Server) firstStart(ctx context.Context, fresh bool) error {
	s.socketDir = filepath.Join(s.scratch.Path, "s")
	if err := os.Mkdir(s.socketDir, 0o700); err != nil {
		return fmt.Errorf("create socket directory: %w", err)
	}
	if err := s.account.own(s.socketDir); err != nil {
		return err
	}
	temporary := s.dataDir == ""
	if temporary {
		s.dataDir = filepath.Join(s.scratch.Path, "data")
	}
	if fresh {
		if err := s.initCluster(ctx, temporary); err != nil {
			return err
		}
	} else if err := s.account.checkAccess(s.dataDir); err != nil {
		return err
	}
	if port, ok := s.settings["port"]; ok {
		s.port, _ = strconv.Atoi(port) // validated
		return s.start(ctx)
	}
	for try := 1; ; try++ {
		var err error
		if s.port, err = localserver.FreePort(); err != nil {
			return err
		}
		if err = s.start(ctx); err == nil || ctx.Err() != nil || try == portTries || localserver.PortFree(s.port) {
			return err
		}
	}
}

// start starts the postmaster and waits until it is ready. If that fails, nothing runs. The caller holds mu, or the
// only reference.
func (s *Server) start(ctx context.Context) error {
	if err := s.writeConf(s.settings); err != nil {
		return err
	}
	logFile, err := os.OpenFile(s.LogFile(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open server log: %w", err)
	}
	defer logFile.Close()
	if err := s.account.own(s.LogFile()); err != nil {
		return err
	}
	info, err := logFile.Stat()
	if err != nil {
		return fmt.Errorf("open server log: %w", err)
	}
	cmd := exec.Command(s.bin.path("postgres"), "-D", s.dataDir, "-p", strconv.Itoa(s.port), "-k", s.socketDir)
	s.account.prepare(cmd)
	cmd.Dir = s.dataDir
	cmd.Stdout, cmd.Stderr = logFile, logFile
	if s.proc, err = localserver.Start(cmd, syscall.SIGQUIT); err != nil {
		return err
	}
	if err := s.waitReady(ctx); err != nil {
		err = errors.Join(err, s.shutDown(Immediate))
		return fmt.Errorf("start Postgres %s: %w\n%s", s.bin.version, err, localserver.LogTail(s.LogFile(), info.Size(), logTailLines))
	}
	return nil
}

// waitReady waits until the postmaster has written "ready" or "standby" into postmaster.pid, as pg_ctl does.
func (s *Server) waitReady(ctx context.Context) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if lines := pidFile(s.dataDir); len(lines) > lineStatus && lines[linePID] == strconv.Itoa(s.proc.PID()) {
			if status := strings.TrimSpace(lines[lineStatus]); status == "ready" || status == "standby" {
				return nil
			}
		}
		select {
		case <-s.proc.Done():
			return fmt.Errorf("the server ended (%v)", s.proc.Err())
		case <-ctx.Done():
			return fmt.Errorf("wait for the server: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// URL is the address of a database over TCP, for the superuser.
func (s *Server) URL(db string) string {
	return fmt.Sprintf("postgres://%s@127.0.0.1:%d/%s?sslmode=disable", superuser, s.Port(), url.PathEscape(db))
}

// SocketURL is the address of a database over the Unix socket, for the superuser.
func (s *Server) SocketURL(db string) string { return s.socketURL(db, s.Port()) }

func (s *Server) socketURL(db string, port int) string {
	q := url.Values{"host": {s.socketDir}, "port": {strconv.Itoa(port)}, "sslmode": {"disable"}}
	return fmt.Sprintf("postgres://%s@/%s?%s", superuser, url.PathEscape(db), q.Encode())
}

// Port is the TCP port. It stays the same over Restart.
func (s *Server) Port() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.port
}

// SocketDir is the directory of the Unix socket.
func (s *Server) SocketDir() string { return s.socketDir }

// DataDir is the data directory.
func (s *Server) DataDir() string { return s.dataDir }

// BinDir is the directory of the server's programs. A local installation has psql, pgbench and the like there too.
func (s *Server) BinDir() string { return s.bin.dir }

// Run runs another program as the user that the server runs as, in a directory that this one can enter, and gives what it prints.
func (s *Server) Run(ctx context.Context, dir, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	s.account.prepare(cmd)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// LogFile is the server's log, in the data directory.
func (s *Server) LogFile() string { return filepath.Join(s.dataDir, logName) }

// Version is the server's version as it prints it: "15.18".
func (s *Server) Version() string { return s.bin.version }

// Major is the server's major version: 15.
func (s *Server) Major() int { return s.bin.major }

// PID is the postmaster's process id, 0 if it does not run.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.running() {
		return 0
	}
	return s.proc.PID()
}

func (s *Server) running() bool { return s.proc != nil && !s.proc.Ended() }

// SetConfig sets server settings for the next Restart, or Reload if they can change in a running server. It adds to
// the present ones; port cannot be set.
func (s *Server) SetConfig(settings map[string]string) error {
	if err := checkSettings(settings); err != nil {
		return err
	}
	if _, ok := settings["port"]; ok {
		return errors.New("set port: it is fixed for the server's life")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return ErrStopped
	}
	merged := maps.Clone(s.settings)
	maps.Copy(merged, settings)
	if err := s.writeConf(merged); err != nil {
		return err
	}
	s.settings = merged
	return nil
}

// Reload has the server read its configuration again and returns when every new session has it; a running session
// takes it up before its next command. A setting that needs a restart is no error.
func (s *Server) Reload(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.running() {
		return errors.New("reload Postgres: it does not run")
	}
	var before, now time.Time
	if err := s.queryRow(ctx, &before, `SELECT pg_conf_load_time()`); err != nil {
		return fmt.Errorf("reload Postgres: %w", err)
	}
	if err := s.proc.Signal(syscall.SIGHUP); err != nil {
		return err
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if err := s.queryRow(ctx, &now, `SELECT pg_conf_load_time()`); err != nil {
			return fmt.Errorf("reload Postgres: %w", err)
		}
		if now.After(before) {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("reload Postgres: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
	var bad string
	err := s.queryRow(ctx, &bad, `SELECT coalesce(string_agg(coalesce(name, 'line ' || sourceline) || ': ' || error, '; '), '')
		FROM pg_file_settings f WHERE error IS NOT NULL
		AND NOT EXISTS (SELECT FROM pg_settings s WHERE lower(s.name) = lower(f.name) AND s.pending_restart)`)
	if err != nil {
		return fmt.Errorf("reload Postgres: %w", err)
	}
	if bad != "" {
		return fmt.Errorf("reload Postgres: %s", bad)
	}
	return nil
}

// queryRow asks one value in a session of its own. The caller holds mu.
func (s *Server) queryRow(ctx context.Context, value any, sql string) error {
	conn, err := pgx.Connect(ctx, s.socketURL("postgres", s.port))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return conn.QueryRow(ctx, sql).Scan(value)
}
