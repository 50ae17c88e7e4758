package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/internal/kafkaserver"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// binary is the program under test, built by TestMain.
var binary string

func TestMain(m *testing.M) {
	if os.Getenv(asksEnv) != "" {
		os.Exit(asks())
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "backstory-cmd-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		binary = filepath.Join(dir, "backstory")
		if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build the program: %v\n%s", err, out)
			return 1
		}
		before := runtime.NumGoroutine()
		code := m.Run()
		pgservertest.StopShared()
		if broker.server != nil {
			if err := broker.server.Stop(); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
		if left := pgservertest.Leaked(before, 10*time.Second); left != "" {
			fmt.Fprintln(os.Stderr, left)
			return max(code, 1)
		}
		return code
	}())
}

const kafkaPassword = "app-secret-4711"

// secret is the password in every URL that has one; no output may ever have it.
const secret = "Geheim%21-7391" // "Geheim!-7391" to the server

// quick are the settings of servers under test: fsync matters only when the machine fails.
func quick(more map[string]string) pgserver.Config {
	s := map[string]string{"fsync": "off", "max_replication_slots": "60", "max_wal_senders": "40", "max_connections": "150", "shared_buffers": "64MB",
		"max_slot_wal_keep_size": "2GB"}
	for k, v := range more {
		s[k] = v
	}
	return pgserver.Config{Settings: s, HBA: []string{"host all +needs_password 127.0.0.1/32 scram-sha-256"}}
}

// site is a source with its application, and an event log.
type site struct {
	t      *testing.T
	server *pgservertest.Server
	db     string
	env    map[string]string
	app    *pgx.Conn // the application's session, as superuser
	rows   int       // rows that the application has inserted; each is one event, sooner or later
	lost   int       // of them, those that the log cannot have, since they are from before it and not taken over

	was       map[string]string    // settings before swap
	words     map[string]string    // names for expand
	last      *process             // the sidecar
	first     *process             // the one that was there before it
	other     *pgconn.PgConn       // see occupy
	logServer *pgservertest.Server // where it is one that the test kills
	quiet     bool                 // there is no trouble to be seen
}

var names atomic.Int64

// newSite makes a source with one empty table; without init, and with the log in the source.
func newSite(t *testing.T, server *pgservertest.Server) *site {
	t.Helper()
	s := &site{t: t, server: server, db: server.NewDatabase(t), words: map[string]string{}}
	s.env = map[string]string{
		"BACKSTORY_SOURCE_URL": server.URL(s.db),
		"BACKSTORY_SLOT":       s.unique("slot"),
		"BACKSTORY_HTTP_ADDR":  "off",
	}
	s.app = s.open(server.URL(s.db))
	s.sql(`CREATE SCHEMA other; CREATE TABLE public.orders (id bigint PRIMARY KEY, status text NOT NULL)`)
	return s
}

// unique gives a name that nobody else on the server has.
func (s *site) unique(what string) string {
	return fmt.Sprintf("%s_%d_%d", what, os.Getpid(), names.Add(1))
}

func (s *site) open(url string) *pgx.Conn {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		s.t.Fatal(err)
	}
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// sql runs statements as the source's superuser.
func (s *site) sql(q string, args ...any) {
	s.t.Helper()
	if s.app.IsClosed() { // its server was restarted
		s.app = s.open(s.server.URL(s.db))
	}
	if _, err := s.app.Exec(context.Background(), fmt.Sprintf(q, args...)); err != nil {
		s.t.Fatalf(q+": %v", append(args, err)...)
	}
}

// at runs statements in another database.
func (s *site) at(url, q string, args ...any) {
	s.t.Helper()
	conn := s.open(url)
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), fmt.Sprintf(q, args...)); err != nil {
		s.t.Fatalf(q+": %v", append(args, err)...)
	}
}

// ask asks a database for one value.
func (s *site) ask(url, q string, args ...any) string {
	s.t.Helper()
	conn := s.open(url)
	defer conn.Close(context.Background())
	var v string
	if err := conn.QueryRow(context.Background(), fmt.Sprintf(q, args...)).Scan(&v); err != nil {
		s.t.Fatalf(q+": %v", append(args, err)...)
	}
	return v
}

// write has the application insert rows.
func (s *site) write(n int) {
	s.t.Helper()
	s.sql(`INSERT INTO public.orders SELECT i, 'open' FROM generate_series(%d, %d) i`, s.rows+1, s.rows+n)
	s.rows += n
}

// role makes a role that may do nothing but log in, and makes it that of the sidecar. password: it needs secret.
func (s *site) role(options string, password bool) string {
	s.t.Helper()
	r := s.unique("r")
	if password {
		options += " PASSWORD 'Geheim!-7391'"
	}
	s.sql(`CREATE ROLE %s LOGIN %s`, r, options)
	if password {
		s.sql(`DO $$ BEGIN CREATE ROLE needs_password; EXCEPTION WHEN duplicate_object OR unique_violation THEN END $$`)
		s.sql(`GRANT needs_password TO %s`, r)
	}
	s.t.Cleanup(func() {
		ctx := context.Background()
		if s.server.PID() == 0 {
			return
		}
		conn, err := pgx.Connect(ctx, s.server.URL(s.db))
		if err != nil {
			return
		}
		defer conn.Close(ctx)
		_, _ = conn.Exec(ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '"+r+"'")
		_, _ = conn.Exec(ctx, "REASSIGN OWNED BY "+r+" TO postgres; DROP OWNED BY "+r)
		if _, err := conn.Exec(ctx, "DROP ROLE "+r); err != nil {
			s.t.Errorf("drop role: %v", err)
		}
	})
	return r
}

// url is the address of a database for a role.
func (s *site) url(role, db string) string {
	return fmt.Sprintf("postgres://%s@127.0.0.1:%d/%s?sslmode=disable", role, s.server.Port(), db)
}

// logURL is where the log is.
func (s *site) logURL() string {
	if u := s.env["BACKSTORY_LOG_URL"]; u != "" {
		return u
	}
	return s.env["BACKSTORY_SOURCE_URL"]
}

// logApart gives the log a database of its own on a server.
func (s *site) logApart(server *pgservertest.Server) (db string) {
	s.t.Helper()
	db = server.NewDatabase(s.t)
	s.env["BACKSTORY_LOG_URL"] = server.URL(db)
	return db
}

func (s *site) slot() string { return s.env["BACKSTORY_SLOT"] }

// begin is init, then some changes, of which some are in the log.
func (s *site) begin() {
	s.t.Helper()
	s.beginWith()
}

// beginWith does so with flags for init.
func (s *site) beginWith(args ...string) {
	s.t.Helper()
	s.must(append([]string{"init"}, args...)...)
	s.write(2)
	s.must("run", "--once")
	s.write(3)
}

// result is what a run of the program gave.
type result struct {
	code     int
	out, err string
}

// message is the error that the program ended with, and remedy the hint behind it.
func (r result) message() string { return field(r.err, "backstory: ") }
func (r result) remedy() string  { return field(r.err, "  → ") }

func field(text, prefix string) string {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, prefix); ok {
			return strings.TrimRight(rest, "\n")
		}
	}
	return ""
}

// process is the program at work.
type process struct {
	t        *testing.T
	cmd      *exec.Cmd
	out, err *output
	done     chan struct{}
}

// output collects what a process prints.
type output struct {
	mu  sync.Mutex // guards the following
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// start starts the program. It never sees variables of the test's own environment that steer it or Postgres' clients.
func (s *site) start(args ...string) *process {
	s.t.Helper()
	p := &process{t: s.t, cmd: exec.Command(binary, args...), out: &output{}, err: &output{}, done: make(chan struct{})}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "BACKSTORY_") && !strings.HasPrefix(e, "PG") {
			p.cmd.Env = append(p.cmd.Env, e)
		}
	}
	for k, v := range s.env {
		p.cmd.Env = append(p.cmd.Env, k+"="+v)
	}
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.err
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	s.t.Cleanup(func() { // a test that failed
		_ = p.cmd.Process.Kill()
		<-p.done
	})
	return p
}

// wait waits for the end of the program by itself.
func (p *process) wait(limit time.Duration) result {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(limit):
		_ = p.cmd.Process.Signal(syscall.SIGQUIT)
		select {
		case <-p.done:
		case <-time.After(5 * time.Second):
		}
		p.t.Fatalf("%s did not end within %s:\n%s\n%s", p.cmd.Args[1:], limit, p.out, p.err)
	}
	r := result{p.cmd.ProcessState.ExitCode(), p.out.String(), p.err.String()}
	if clear := strings.ReplaceAll(secret, "%21", "!"); strings.Contains(r.out+r.err, secret) || strings.Contains(r.out+r.err, clear) || strings.Contains(r.out+r.err, kafkaPassword) {
		p.t.Errorf("%s printed the password:\n%s\n%s", p.cmd.Args[1:], r.out, r.err)
	}
	return r
}

// stop ends the program as an operator does.
func (p *process) stop() result {
	p.t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	return p.wait(20 * time.Second)
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// run runs the program to its end.
func (s *site) run(args ...string) result {
	s.t.Helper()
	return s.start(args...).wait(90 * time.Second)
}

// must runs the program, which has to succeed.
func (s *site) must(args ...string) result {
	s.t.Helper()
	r := s.run(args...)
	if r.code != 0 {
		s.t.Fatalf("backstory %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
	}
	return r
}

// sidecar starts `run` with HTTP, and waits until it streams.
func (s *site) sidecar() *process {
	s.t.Helper()
	p := s.sidecarNow()
	s.until(30*time.Second, "the sidecar streams", p, func(st *backstory.Status) bool { return st.Running && st.Source.State == "streaming" })
	return p
}

// sidecarNow starts `run` with HTTP.
func (s *site) sidecarNow() *process {
	s.t.Helper()
	s.env["BACKSTORY_HTTP_ADDR"] = freeAddr(s.t)
	s.last = s.start("run")
	return s.last
}

// freeAddr is an address at which nobody listens.
func freeAddr(t testing.TB) string {
	t.Helper()
	port, err := localserver.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}

// status is what `status --json` prints; nil if it fails.
func (s *site) status() (*backstory.Status, result) {
	s.t.Helper()
	r := s.run("status", "--json")
	if r.code != 0 && r.code != exitFound {
		return nil, r
	}
	var st backstory.Status
	if err := json.Unmarshal([]byte(r.out), &st); err != nil {
		s.t.Fatalf("status --json: %v\n%s", err, r.out)
	}
	return &st, r
}

// until waits until status shows something.
func (s *site) until(limit time.Duration, what string, p *process, ok func(*backstory.Status) bool) *backstory.Status {
	s.t.Helper()
	var last result
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		var st *backstory.Status
		if st, last = s.status(); st != nil && ok(st) {
			return st
		}
		if !p.running() {
			s.t.Fatalf("waited for this: %s. But the sidecar ended:\n%s", what, p.err)
		}
	}
	s.t.Fatalf("waited %s for this: %s. status says:\n%s%s\nthe sidecar says:\n%s", limit, what, last.out, last.err, p.err)
	return nil
}

// eventually waits for a condition.
func eventually(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %s for this: %s", limit, what)
		}
	}
}

// count is how many of the application's changes are in the log.
func (s *site) count() int {
	s.t.Helper()
	n, err := strconv.Atoi(s.ask(s.logURL(), `SELECT count(*)::text FROM backstory.events WHERE relation = 'public.orders' AND op NOT IN ('gap', 'note')`))
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// caughtUp waits until everything written is in the log.
func (s *site) caughtUp(p *process) {
	s.t.Helper()
	s.until(30*time.Second, "everything written is in the log", p, func(st *backstory.Status) bool { return st.CaughtUp && s.count() == s.rows-s.lost })
}

// whole checks that nothing is lost: after one more change and a run, every change of the source is in the log, the log is
// whole, and the table made of it is the source's.
func (s *site) whole() {
	s.t.Helper()
	s.write(1)
	s.must("run", "--once")
	if n := s.count(); n != s.rows-s.lost {
		s.t.Errorf("the log has %d events of %d changes, %d of which it cannot have", n, s.rows, s.lost)
	}
	s.must("verify")
	dir := s.t.TempDir()
	args := []string{"checkout", "--at", "HEAD", "--jsonl", filepath.Join(dir, "now"), "orders"}
	if s.lost > 0 {
		if r := s.run(args...); r.code != exitFailed || !strings.Contains(r.remedy(), "--partial") {
			s.t.Errorf("a checkout of a table of which rows are missing: exit code %d\n%s", r.code, r.err)
		}
		args = append(args, "--partial")
	}
	s.must(args...)
	files, err := filepath.Glob(filepath.Join(dir, "now", "*orders.jsonl"))
	if err != nil || len(files) != 1 {
		s.t.Fatalf("a checkout made the files %q (%v)", files, err)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		s.t.Fatal(err)
	}
	if n := bytes.Count(b, []byte("\n")); n != s.rows-s.lost {
		s.t.Errorf("the table made of the log has %d rows, the source %d", n, s.rows)
	}
}

// broker is the Kafka of these tests.
var broker struct {
	once   sync.Once
	server *kafkaserver.Server
	err    error
}

// kafka gives a real broker with a user "app" who may do nothing.
func kafkaBroker(t *testing.T) *kafkaserver.Server {
	t.Helper()
	kafkaserver.Need(t)
	broker.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		broker.server, broker.err = kafkaserver.Start(ctx, kafkaserver.Config{Users: map[string]string{"app": kafkaPassword},
			Log: func(line string) { fmt.Fprintln(os.Stderr, line) }})
	})
	if broker.err != nil {
		t.Fatal(broker.err)
	}
	return broker.server
}
