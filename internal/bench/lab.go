package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
)

// lab is what the measurements share: a server, the program, a place for files.
type lab struct {
	opt     options
	module  string // directory of the module
	scratch *localserver.Scratch
	srv     *pgserver.Server
	admin   *pgx.Conn // to database postgres
	sidecar string    // the program
	// recvlogical and pgbench are empty where they are not found.
	recvlogical, pgbench string
	made                 int // databases
}

// serverSettings are those that a benchmark needs beside the defaults: room for the WAL that slots keep, no checkpoint and no
// vacuum at a moment of their own choice. What is durable stays durable: fsync, full_page_writes and synchronous_commit are on.
var serverSettings = map[string]string{
	"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on",
	"shared_buffers": "1GB", "max_wal_size": "16GB", "checkpoint_timeout": "1h", "autovacuum": "off",
	"max_connections": "100",
}

func newLab(ctx context.Context, opt options) (*lab, error) {
	l := &lab{opt: opt}
	if err := l.open(ctx); err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

func (l *lab) open(ctx context.Context) (err error) {
	if l.scratch, err = localserver.NewScratch("backstory-bench-"); err != nil {
		return err
	}
	if err := l.build(ctx); err != nil {
		return err
	}
	progress("starting Postgres")
	l.srv, err = pgserver.Start(ctx, pgserver.Config{Version: l.opt.version, Settings: serverSettings, Log: func(line string) { progress("%s", line) }})
	if err != nil {
		return err
	}
	if l.admin, err = pgx.Connect(ctx, l.srv.SocketURL("postgres")); err != nil {
		return fmt.Errorf("connect to Postgres: %w", err)
	}
	l.recvlogical, l.pgbench = l.find("pg_recvlogical"), l.find("pgbench")
	return nil
}

func (l *lab) close() error {
	var errs []error
	if l.admin != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		errs = append(errs, l.admin.Close(ctx))
		cancel()
	}
	if l.srv != nil {
		errs = append(errs, l.srv.Stop(pgserver.Immediate))
	}
	if l.scratch != nil {
		errs = append(errs, l.scratch.Remove())
	}
	return errors.Join(errs...)
}

// build builds the program once, as make build does.
func (l *lab) build(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return fmt.Errorf("find the module: %w", err)
	}
	l.module = filepath.Dir(strings.TrimSpace(string(out)))
	l.sidecar = filepath.Join(l.scratch.Path, "backstory")
	progress("building backstory")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", l.sidecar, "./cmd/backstory")
	cmd.Dir, cmd.Env = l.module, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build backstory: %w\n%s", err, out)
	}
	return nil
}

// find looks for one of PostgreSQL's client programs: beside the server's, then in the path, then where Debian puts them, any
// version, the newest first.
func (l *lab) find(program string) string {
	places := []string{filepath.Join(l.srv.BinDir(), program)}
	if p, err := exec.LookPath(program); err == nil {
		places = append(places, p)
	}
	for v := 19; v >= 14; v-- {
		places = append(places, fmt.Sprintf("/usr/lib/postgresql/%d/bin/%s", v, program), fmt.Sprintf("/usr/pgsql-%d/bin/%s", v, program))
	}
	for _, p := range places {
		if exec.Command(p, "--version").Run() == nil {
			return p
		}
	}
	return ""
}

// clientPrograms says which ones were found.
func (l *lab) clientPrograms() string {
	var found []string
	for _, p := range []string{l.recvlogical, l.pgbench} {
		if p == "" {
			continue
		}
		if out, err := exec.Command(p, "--version").Output(); err == nil {
			found = append(found, strings.TrimSpace(string(out)))
		}
	}
	if len(found) == 0 {
		return "none"
	}
	return strings.Join(found, ", ")
}

// noClient says what to do about a missing client program.
const noClient = "%s is not installed (Debian, Ubuntu: apt-get install postgresql-client, for pgbench postgresql)"

// database is one of the server's.
type database struct {
	lab  *lab
	name string
	url  string // over the Unix socket
	tcp  string
}

// database makes an empty one, or a copy of another one.
func (l *lab) database(ctx context.Context, purpose, template string) (*database, error) {
	l.made++
	name := fmt.Sprintf("%s_%d", purpose, l.made)
	if template == "" {
		template = "template0"
	}
	if _, err := l.admin.Exec(ctx, `CREATE DATABASE `+name+` TEMPLATE `+template); err != nil {
		return nil, fmt.Errorf("create database %s: %w", name, err)
	}
	return &database{l, name, l.srv.SocketURL(name), l.srv.URL(name)}, nil
}

// connect opens a connection for the benchmark's own use.
func (d *database) connect(ctx context.Context) (*pgx.Conn, error) {
	conn, err := pgx.Connect(ctx, d.url)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", d.name, err)
	}
	return conn, nil
}

// exec runs statements, each by itself.
func (d *database) exec(ctx context.Context, statements ...string) error {
	conn, err := d.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, q := range statements {
		if _, err := conn.Exec(ctx, q); err != nil {
			return fmt.Errorf("%.80s: %w", q, err)
		}
	}
	return nil
}

// ask asks for one value.
func ask[T any](ctx context.Context, d *database, query string, args ...any) (v T, err error) {
	conn, err := d.connect(ctx)
	if err != nil {
		return v, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := conn.QueryRow(ctx, query, args...).Scan(&v); err != nil {
		return v, fmt.Errorf("%.80s: %w", query, err)
	}
	return v, nil
}

// drop ends whoever is connected and removes the database with its slots, so that the server can let go of WAL.
func (d *database) drop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	for {
		var left int
		_, err := d.lab.admin.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1`, d.name)
		if err == nil {
			// A slot that is in use yet becomes free when its walsender has noticed its end.
			_, _ = d.lab.admin.Exec(ctx, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = $1 AND NOT active`, d.name)
			err = d.lab.admin.QueryRow(ctx, `SELECT count(*) FROM pg_replication_slots WHERE database = $1`, d.name).Scan(&left)
		}
		if err == nil && left == 0 {
			if _, err = d.lab.admin.Exec(ctx, `DROP DATABASE IF EXISTS `+d.name+` WITH (FORCE)`); err == nil {
				return nil
			}
		}
		if err == nil {
			err = fmt.Errorf("%d replication slots are in use", left)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("drop database %s: %w", d.name, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// calm brings everything to disk and waits a moment, so that a measurement does not pay for what came before it.
func (l *lab) calm(ctx context.Context) error {
	if _, err := l.admin.Exec(ctx, `CHECKPOINT`); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if !l.opt.quick {
		pause(ctx, 300*time.Millisecond)
	}
	return ctx.Err()
}

// pause waits; it is false if ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// within asks again and again until cond holds.
func within(ctx context.Context, limit, every time.Duration, what string, cond func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s: it took more than %s", what, limit))
	defer cancel()
	for {
		ok, err := cond(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if ok {
			return nil
		}
		if !pause(ctx, every) {
			return context.Cause(ctx)
		}
	}
}
