package e2e

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// quick are the settings of servers under test. Nothing here weakens what a server promises when its processes are killed:
// fsync matters only when the machine fails.
func quick(more map[string]string) pgserver.Config {
	s := map[string]string{"fsync": "off", "max_prepared_transactions": "20", "deadlock_timeout": "50ms", "max_connections": "120", "shared_buffers": "64MB"}
	for k, v := range more {
		s[k] = v
	}
	return pgserver.Config{Settings: s}
}

// system is a source and a log.
type system struct {
	t   testing.TB
	src *pgservertest.Server
	log *pgservertest.Server
	cfg backstory.Config
	env []string // more of a program's environment
	// sends: the program has a reactor that prints every event; what it prints is not kept.
	sends bool
	// warned matches what a checkout warns of where that is so.
	warned *regexp.Regexp
}

var systems atomic.Int64

// where says where a system lives.
type where struct {
	own      bool              // servers of its own, which may be stopped and killed
	apart    bool              // the log is on another server than the source
	settings map[string]string // more settings of the source
	logs     map[string]string // more settings of the log's server, if that is its own
	tables   []string
	hba      []string
	version  string // of the source; empty: that of all tests
	bin, dir string // of the source's programs and of its data, if it is not for the server to find a place
}

// newSystem makes databases, not yet a log.
func newSystem(t testing.TB, w where) *system {
	t.Helper()
	s := &system{t: t}
	cfg := quick(w.settings)
	cfg.Version, cfg.HBA, cfg.BinDir, cfg.DataDir = w.version, w.hba, w.bin, w.dir
	if w.own {
		s.src = pgservertest.Start(t, cfg)
	} else {
		s.src = pgservertest.ForTest(t, cfg)
	}
	s.log = s.src
	if w.apart {
		if w.own {
			s.log = pgservertest.Start(t, quick(w.logs))
		} else {
			s.log = pgservertest.ForTest(t, quick(map[string]string{"wal_level": "replica"}))
		}
	}
	db := s.src.NewDatabase(t)
	s.cfg = backstory.Config{
		Capture: capture.Config{URL: s.src.URL(db), Slot: fmt.Sprintf("s%d_%d", os.Getpid(), systems.Add(1)), Tables: w.tables, BlockedAfter: 30 * time.Second},
		Logger:  slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelInfo})),
	}
	if w.apart {
		s.cfg.Log.URL = s.log.URL(s.log.NewDatabase(t))
	}
	return s
}

// testWriter lets a logger write to a test, as long as the test runs.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	if w.t.Context().Err() == nil {
		w.t.Log(strings.TrimRight(string(p), "\n"))
	}
	return len(p), nil
}

func (s *system) logURL() string {
	if s.cfg.Log.URL != "" {
		return s.cfg.Log.URL
	}
	return s.cfg.Capture.URL
}

// sql opens a session on the source under the settings under which values are printed.
func (s *system) sql() *session { return open(s.t, s.cfg.Capture.URL) }

// logSQL opens one on the log's database.
func (s *system) logSQL() *session { return open(s.t, s.logURL()) }

// init makes slot and log.
func (s *system) init() *backstory.Done {
	s.t.Helper()
	d, err := s.tryInit(within(s.t, time.Minute), nil)
	if err != nil {
		s.t.Fatalf("init: %v", err)
	}
	return d
}

func (s *system) tryInit(ctx context.Context, waiting func([]string)) (*backstory.Done, error) {
	p, err := backstory.Prepare(ctx, s.cfg)
	if err != nil {
		return nil, err
	}
	return backstory.Init(ctx, s.cfg, p, waiting)
}

// once runs a sidecar in this process until it has caught up.
func (s *system) once() {
	s.t.Helper()
	if err := s.tryOnce(); err != nil {
		s.t.Fatalf("run --once: %v", err)
	}
}

func (s *system) tryOnce() error {
	cfg := s.cfg
	cfg.Once = true
	ctx := within(s.t, 3*time.Minute)
	sc, err := backstory.New(ctx, cfg)
	if err != nil {
		return err
	}
	defer sc.Close()
	if err := sc.Run(ctx); err != nil {
		return err
	}
	return ctx.Err()
}

// running is a sidecar in this process.
type running struct {
	t    testing.TB
	sc   *backstory.Sidecar
	stop context.CancelFunc
	done chan error
}

// start runs a sidecar in this process until the test ends or stops it.
func (s *system) start() *running {
	s.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	sc, err := backstory.New(ctx, s.cfg)
	if err != nil {
		stop()
		s.t.Fatalf("open the sidecar: %v", err)
	}
	r := &running{s.t, sc, stop, make(chan error, 1)}
	go func() {
		defer sc.Close()
		r.done <- sc.Run(ctx)
	}()
	s.t.Cleanup(func() { _ = r.end() })
	return r
}

// end stops it and gives what it returned.
func (r *running) end() error {
	r.t.Helper()
	r.stop()
	select {
	case err := <-r.done:
		r.done <- err
		return err
	case <-time.After(time.Minute):
		r.t.Fatal("the sidecar does not stop")
		return nil
	}
}

// failed waits until the sidecar ends by itself.
func (r *running) failed(limit time.Duration) error {
	r.t.Helper()
	select {
	case err := <-r.done:
		r.done <- err
		if err == nil {
			r.t.Fatal("the sidecar ended without an error")
		}
		return err
	case <-time.After(limit):
		r.t.Fatalf("the sidecar did not end within %s", limit)
		return nil
	}
}

// openLog opens the event log for reading.
func (s *system) openLog() *eventlog.Log {
	s.t.Helper()
	cfg := s.cfg.Log
	cfg.URL = s.logURL()
	l, err := eventlog.Open(within(s.t, 10*time.Second), cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(l.Close)
	return l
}

// environment configures a program as this system is configured.
func (s *system) environment() []string {
	env := append(os.Environ(), "BACKSTORY_SOURCE_URL="+s.cfg.Capture.URL, "BACKSTORY_SLOT="+s.cfg.Capture.Slot, "BACKSTORY_LOG_LEVEL=info",
		"BACKSTORY_HTTP_ADDR=127.0.0.1:0")
	if s.cfg.Capture.StandbyURL != "" {
		env = append(env, "BACKSTORY_STANDBY_URL="+s.cfg.Capture.StandbyURL)
	}
	if s.cfg.Log.URL != "" {
		env = append(env, "BACKSTORY_LOG_URL="+s.cfg.Log.URL)
	}
	if len(s.cfg.Capture.Tables) > 0 {
		env = append(env, "BACKSTORY_TABLES="+strings.Join(s.cfg.Capture.Tables, ","))
	}
	if n := s.cfg.Log.PartitionEvents; n > 0 {
		env = append(env, fmt.Sprintf("BACKSTORY_PARTITION_EVENTS=%d", n))
	}
	if s.sends {
		env = append(env, "BACKSTORY_JSONL=-")
	}
	return append(env, s.env...)
}

// program is the sidecar as a process.
type program struct {
	t    testing.TB
	cmd  *exec.Cmd
	out  *lines
	done chan struct{}
	err  error // valid after done
}

// says runs the program to its end, which has to be this exit code, and wants to read something.
func (s *system) says(code int, want string, args ...string) {
	s.t.Helper()
	p := s.command(true, args...)
	if got := p.wait(time.Minute); got != code || !strings.Contains(p.out.String(), want) {
		s.t.Errorf("backstory %v returned %d, want %d and %q:\n%s", args, got, code, want, p.out)
	}
}

// command starts the program.
func (s *system) command(race bool, args ...string) *program {
	s.t.Helper()
	p := &program{t: s.t, cmd: exec.Command(binary(s.t, race), args...), out: &lines{}, done: make(chan struct{})}
	p.cmd.Env = s.environment()
	if p.cmd.Stderr = p.out; !s.sends {
		p.cmd.Stdout = p.out
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	s.t.Cleanup(p.kill)
	return p
}

// kill ends it as the kernel would.
func (p *program) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// wait waits for its end and gives the exit code.
func (p *program) wait(limit time.Duration) int {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(limit):
		_ = p.cmd.Process.Signal(syscall.SIGQUIT)
		time.Sleep(500 * time.Millisecond)
		p.kill()
		p.t.Fatalf("the program did not end within %s:\n%s", limit, p.out.tail(120))
	}
	var ee *exec.ExitError
	if p.err != nil && !errors.As(p.err, &ee) {
		p.t.Fatal(p.err)
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *program) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// session is a connection whose errors end the test.
type session struct {
	t testing.TB
	*pgx.Conn
}

func open(t testing.TB, url string) *session {
	t.Helper()
	conn, err := dial(within(t, 20*time.Second), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return &session{t, conn}
}

// dial connects under the settings under which values are printed, and sends statements as they are.
func dial(ctx context.Context, url string) (*pgx.Conn, error) {
	cfg, err := eventlog.ConnConfig(url, "test")
	if err != nil {
		return nil, err
	}
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	return pgx.ConnectConfig(ctx, cfg)
}

// do runs statements.
func (s *session) do(format string, args ...any) {
	s.t.Helper()
	q := fmt.Sprintf(format, args...)
	if _, err := s.Exec(context.Background(), q); err != nil {
		s.t.Fatalf("%.300s: %v", q, err)
	}
}

// one asks for one value as text; NULL is "".
func (s *session) one(format string, args ...any) string {
	s.t.Helper()
	rows := s.rows(format, args...)
	if len(rows) != 1 || len(rows[0]) != 1 {
		s.t.Fatalf("%s: %d rows, want one value", format, len(rows))
	}
	return rows[0][0]
}

// rows asks for rows as text; NULL is "".
func (s *session) rows(format string, args ...any) [][]string {
	s.t.Helper()
	return s.ask(fmt.Sprintf(format, args...))
}

// ask is rows for a statement that has percent signs.
func (s *session) ask(q string) [][]string {
	s.t.Helper()
	out, err := textRows(context.Background(), s.Conn, q)
	if err != nil {
		s.t.Fatalf("%.300s: %v", q, err)
	}
	return out
}

func textRows(ctx context.Context, conn *pgx.Conn, q string) ([][]string, error) {
	res, err := conn.PgConn().Exec(ctx, q).ReadAll()
	if err != nil {
		return nil, err
	}
	var out [][]string
	for _, row := range res[len(res)-1].Rows {
		var r []string
		for _, v := range row {
			r = append(r, string(v))
		}
		out = append(out, r)
	}
	return out, nil
}

// lsn reads an LSN.
func (s *session) lsn(format string, args ...any) eventlog.LSN {
	s.t.Helper()
	l, err := eventlog.ParseLSN(s.one(format, args...))
	if err != nil {
		s.t.Fatal(err)
	}
	return l
}

// databaseOf gives the name of a URL's database.
func databaseOf(t testing.TB, raw string) string {
	t.Helper()
	cfg, err := pgx.ParseConfig(raw)
	if err != nil {
		t.Fatal(err)
	}
	return cfg.Database
}

// withUser changes the user of a URL.
func withUser(t testing.TB, raw, user string) string {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.User(user)
	return u.String()
}

func quoteLit(s string) string {
	q := "'" + strings.ReplaceAll(s, "'", "''") + "'"
	if strings.Contains(s, `\`) {
		return "E" + strings.ReplaceAll(q, `\`, `\\`)
	}
	return q
}
