//go:build unix

package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
	"github.com/backstory-dev/backstory/internal/shop"
)

const (
	demoPort     = 25432
	demoHTTPPort = 8800
	demoPatience = 8 * time.Second // of the people in the shop: an order's life fits into a minute
	drainLimit   = 5 * time.Second
	showEvery    = 900 * time.Millisecond // an event on the screen
	sumEvery     = 10 * time.Second       // a summary
)

func newDemo() *cobra.Command {
	var o demoOptions
	c := &cobra.Command{
		Use:   "demo",
		Short: "A small shop at work on a Postgres of its own, with the sidecar on it: nothing has to be installed.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case o.fresh && o.resume:
				return usage("Use one of them.", "--fresh and --continue contradict each other")
			case o.rate <= 0:
				return usage("For instance --rate 10.", "--rate has to be more than 0")
			case o.port < 0 || o.port > 65535:
				return usage("", "--port %d is not a TCP port", o.port)
			}
			if err := pgserver.CheckVersion(o.version); err != nil {
				return usage("For instance --pg 17.", "--pg: %w", err)
			}
			d := &demo{demoOptions: o, out: openScreen(cmd, false)}
			defer d.out.close()
			return d.run(cmd.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&o.dir, "dir", "", "where the demo keeps its data (default: backstory/demo in the user's state directory, /var/lib for root)")
	f.BoolVar(&o.fresh, "fresh", false, "throw away what an earlier demo has left")
	f.BoolVar(&o.resume, "continue", false, "go on with what an earlier demo has left, without asking")
	f.Float64Var(&o.rate, "rate", 10, "transactions of the shop per second")
	f.DurationVar(&o.duration, "duration", 0, "end when the shop has been at work for this time; default: with Ctrl-C")
	f.StringVar(&o.version, "pg", "", "version of Postgres: 14 to 18, or a full one; default: the newest one installed, otherwise the newest one")
	f.IntVar(&o.port, "port", 0, fmt.Sprintf("TCP port of Postgres (default %d); another one is taken where it is in use", demoPort))
	return c
}

type demoOptions struct {
	dir           string
	fresh, resume bool
	rate          float64
	duration      time.Duration
	version       string
	port          int
}

// demo is Postgres, the shop and the sidecar in one process.
type demo struct {
	demoOptions
	out  *screen
	cols columns // of the events that are shown
	told string  // the order that was told of last
	home *demoHome
	old  bool // it goes on with what an earlier one has left

	server *pgserver.Server
	url    string // of the shop's database
	psql   string // how the command is called, empty if there is none
	http   string // address, empty if there is none
}

func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.out, format+"\n", args...)
	_ = d.out.Flush()
}

// run is the demo's life: each step has what the steps before it made, and leaves it in reverse order.
func (d *demo) run(ctx context.Context) (err error) {
	// Reading the terminal from the background would stop the whole process.
	signal.Ignore(syscall.SIGTTIN)
	if os.Geteuid() == 0 {
		syscall.Umask(0o022) // Postgres, as another user, has to get to its data
	}
	if d.home, err = openDemoHome(d.dir); err != nil {
		return err
	}
	defer d.home.close()
	if err := d.choose(ctx); err != nil {
		return leftByUser(ctx, err)
	}
	if err := d.startPostgres(ctx); err != nil {
		return leftByUser(ctx, err)
	}
	defer func() {
		if e := d.server.Stop(pgserver.Fast); e != nil && err == nil {
			err = e
		}
		if err == nil {
			d.say("Everything has stopped. %s", d.left())
		}
	}()
	if err := d.prepare(ctx); err != nil {
		return leftByUser(ctx, err)
	}
	return d.work(ctx)
}

// leftByUser makes an error that comes of Ctrl-C none.
func leftByUser(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// left tells what remains.
func (d *demo) left() string {
	return fmt.Sprintf("The data stays in %s: the next start goes on with it, --fresh begins anew.", d.home.dir)
}

// choose decides whether an earlier demo goes on.
func (d *demo) choose(ctx context.Context) error {
	if err := d.home.waitForOrphans(ctx); err != nil {
		return err
	}
	since := d.home.since()
	if since.IsZero() {
		return nil
	}
	switch {
	case d.fresh:
		d.say("Removing the demo of %s.", since.Format("2006-01-02 15:04"))
		return d.home.empty()
	case !d.resume && foregroundTerminal(os.Stdin):
		fmt.Fprintf(d.out, "There is a demo from %s in %s. Go on with it, or start afresh and lose it? [Continue/fresh] ", since.Format("2006-01-02 15:04"), d.home.dir)
		_ = d.out.Flush()
		answer, err := readLine(ctx)
		if err != nil {
			return err
		}
		if answer == "f" || answer == "fresh" {
			return d.home.empty()
		}
	case !d.resume:
		d.say("Going on with the demo of %s (--fresh starts anew).", since.Format("2006-01-02 15:04"))
	}
	d.old = true
	return nil
}

// startPostgres starts the server, on the port of the last time if that is free.
func (d *demo) startPostgres(ctx context.Context) error {
	last, _ := d.home.lastPorts()
	wanted := cmp.Or(d.port, last, demoPort)
	port := wanted
	for try := 1; ; try++ {
		if !localserver.PortFree(port) {
			var err error
			if port, err = localserver.FreePort(); err != nil {
				return err
			}
			d.say("Port %d is in use; taking %d.", wanted, port)
		}
		var err error
		d.server, err = pgserver.Start(ctx, pgserver.Config{
			Version: d.version,
			DataDir: d.home.data(),
			Settings: map[string]string{
				"port":                   strconv.Itoa(port),
				"max_slot_wal_keep_size": "1GB",
				"log_min_messages":       "warning",
			},
			Log: func(line string) { d.say("%s", line) },
		})
		if err == nil {
			break
		}
		if ctx.Err() != nil || localserver.PortFree(port) || try == 3 {
			return d.hint(err)
		}
	}
	d.url = d.server.URL("shop")
	return nil
}

// hint adds to an error of a demo that goes on that it need not.
func (d *demo) hint(err error) error {
	if err == nil || !d.old || eventlog.Hint(err) != "" {
		return err
	}
	return &eventlog.Problem{Err: err, Hint: "backstory demo --fresh throws away what an earlier demo has left in " + d.home.dir + "."}
}

// prepare makes the shop's database and, while its tables are still empty, the event log.
func (d *demo) prepare(ctx context.Context) error {
	err := d.withConn(ctx, d.server.URL("postgres"), func(conn *pgx.Conn) error {
		var exists bool
		if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_database WHERE datname = 'shop')`).Scan(&exists); err != nil || exists {
			return err
		}
		_, err := conn.Exec(ctx, `CREATE DATABASE shop`)
		return err
	})
	if err == nil {
		err = d.withConn(ctx, d.url, func(conn *pgx.Conn) error {
			var exists bool
			if err := conn.QueryRow(ctx, `SELECT to_regclass('public.payments') IS NOT NULL`).Scan(&exists); err != nil || exists {
				return err
			}
			return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, shop.Schema())
				return err
			})
		})
	}
	if err != nil {
		return d.hint(fmt.Errorf("make the shop's database: %w", err))
	}
	if err := d.home.writeRules(); err != nil {
		return err
	}
	plan, err := backstory.Prepare(ctx, d.config())
	if err != nil {
		return d.hint(err)
	}
	if _, err := backstory.Init(ctx, d.config(), plan, waiting()); err != nil {
		return d.hint(err)
	}
	d.psql = d.home.linkPrograms(d.server.BinDir())
	return nil
}

func (d *demo) withConn(ctx context.Context, url string, f func(*pgx.Conn) error) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return f(conn)
}

// config is the sidecar's. It owes nothing to the environment, which may speak of another database.
func (d *demo) config() backstory.Config {
	return backstory.Config{
		Capture: capture.Config{URL: d.url},
		Logger:  slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
}

// work runs sidecar and shop until ctx ends, the time is over, or something fails. Then it stops them in the order in which
// data flows.
func (d *demo) work(ctx context.Context) error {
	cfg := d.config()
	var err error
	if cfg.Rules, err = readRules(d.home.rules(), true); err != nil {
		return err
	}
	sidecar, err := backstory.New(ctx, cfg)
	if err != nil {
		return d.hint(leftByUser(ctx, err))
	}
	defer sidecar.Close()

	// The sidecar outlives the shop, so that what the shop did last is still captured.
	sideCtx, stopSidecar := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSidecar()
	captured := make(chan error, 1)
	go func() { captured <- sidecar.Run(sideCtx) }()
	served := make(chan error, 1)
	d.http = d.freeHTTP()
	go func() { served <- sidecar.Serve(sideCtx, d.http) }()
	if err := d.home.writeEnv(d.url, d.http); err != nil {
		return err
	}

	d.intro()
	waitReady(ctx, sidecar)

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if d.duration > 0 {
		defer time.AfterFunc(d.duration, stop).Stop()
	}
	shopCtx, closeShop := context.WithCancel(ctx)
	defer closeShop()
	var stats shop.Stats
	sold := make(chan error, 1)
	go func() {
		var err error
		stats, err = shop.Run(shopCtx, shop.Config{URL: d.url, Rate: d.rate, Seed: uint64(time.Now().UnixNano()), Patience: demoPatience})
		sold <- err
	}()
	watch := newWatcher(sidecar)
	watched := make(chan error, 1)
	go func() { watched <- watch.run(sideCtx) }()

	var failed error
	shopEnded, sidecarEnded := false, false
	lines := enterKeys()
	show, sum := time.NewTicker(showEvery), time.NewTicker(sumEvery)
	defer show.Stop()
	defer sum.Stop()
	var told telling
	for failed == nil && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case failed = <-sold:
			shopEnded = true
			if failed == nil && ctx.Err() == nil {
				failed = errors.New("bug: the shop closed by itself")
			}
		case failed = <-captured:
			sidecarEnded = true
			if failed == nil {
				failed = errors.New("bug: the sidecar ended by itself")
			}
		case err := <-served:
			d.say("No HTTP: %v", err)
			d.http, served = "", nil
		case failed = <-watched:
			watched <- nil
		case <-lines:
			told = d.commands(watch)
		case <-show.C:
			if e := watch.sample(); e != nil {
				d.say("%s", crop(d.cols.briefLine(d.out, e), width(os.Stdout)))
			}
			if told.due(watch) {
				told = d.commands(watch)
			}
		case <-sum.C:
			d.summary(watch)
			if d.server.PID() == 0 {
				failed = fmt.Errorf("the demo's Postgres has ended by itself; see %s", d.server.LogFile())
			}
		}
	}

	if failed == nil {
		d.say("\nStopping: the shop closes, the sidecar takes in the rest, Postgres shuts down.")
	}
	closeShop()
	if !shopEnded {
		failed = errors.Join(failed, <-sold)
	}
	drained := failed == nil && !sidecarEnded && waitCaughtUp(ctx, sidecar)
	stopSidecar()
	if !sidecarEnded {
		failed = errors.Join(failed, <-captured)
	}
	<-watched
	if served != nil {
		<-served
	}
	if failed != nil {
		return d.hint(failed)
	}
	h, err := sidecar.Log().Head(context.WithoutCancel(ctx))
	if err != nil {
		return d.hint(err)
	}
	d.say("The shop committed %s transactions in this run and rolled %s back; the log holds %s events.", countText(stats.Commits), countText(stats.Rollbacks), countText(int64(h.Position)))
	if !drained {
		d.say("Not all of it could be taken in; the next start goes on there: nothing is lost.")
	}
	return nil
}

// waitReady lets the sidecar connect before the shop opens: the first events then come as soon as all others. Where it
// cannot, that shows later.
func waitReady(ctx context.Context, sidecar *backstory.Sidecar) {
	for end := time.Now().Add(drainLimit); sidecar.Ready() != nil && ctx.Err() == nil && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
}

// waitCaughtUp waits until the log has everything that the shop did.
func waitCaughtUp(ctx context.Context, sidecar *backstory.Sidecar) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainLimit)
	defer cancel()
	for ctx.Err() == nil {
		if st, err := sidecar.Status(ctx); err == nil && st.CaughtUp {
			return true
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return false
}

// freeHTTP gives an address for HTTP.
func (d *demo) freeHTTP() string {
	_, last := d.home.lastPorts()
	port := cmp.Or(last, demoHTTPPort)
	if !localserver.PortFree(port) {
		if p, err := localserver.FreePort(); err == nil {
			port = p
		}
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}

// readLine reads a line from the terminal, or returns when ctx ends.
func readLine(ctx context.Context) (string, error) {
	type result struct {
		text string
		err  error
	}
	done := make(chan result, 1)
	go func() { // lives on when ctx ends; the process ends soon
		var text string
		_, err := fmt.Fscanln(os.Stdin, &text)
		if text == "" { // Enter alone, or the end of input
			err = nil
		}
		done <- result{text, err}
	}()
	select {
	case r := <-done:
		return r.text, r.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// enterKeys gives a sign for each line that is typed on the terminal; nil where there is none.
func enterKeys() <-chan struct{} {
	if !foregroundTerminal(os.Stdin) {
		return nil
	}
	ch := make(chan struct{})
	go func() { // lives as long as the process
		for scan := bufio.NewScanner(os.Stdin); scan.Scan(); {
			ch <- struct{}{}
		}
	}()
	return ch
}

// demoDir is where a demo lives if the user does not say.
func demoDir() (string, error) {
	if os.Geteuid() == 0 {
		return "/var/lib/backstory/demo", nil // Postgres, which does not run as root, could not enter /root
	}
	base := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(base) {
		if home, err := os.UserHomeDir(); err == nil {
			base = filepath.Join(home, ".local", "state")
		}
	}
	dir := filepath.Join(base, "backstory", "demo")
	if base != "" && os.MkdirAll(dir, 0o755) == nil {
		return dir, nil
	}
	cache, err := localserver.CacheDir() // a user without a home
	return filepath.Join(cache, "demo"), err
}
