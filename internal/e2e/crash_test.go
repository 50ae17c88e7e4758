package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/kafkaserver"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/shop"
)

// crashes runs a workload while everything fails that can: the sidecar is killed, both servers crash, connections are cut.
type crashes struct {
	*system
	r        *rand.Rand
	direct   system // the source and the log without the network that fails
	source   *proxy
	logs     *proxy
	program  *program
	broker   *broker        // nil without Kafka
	starting sync.WaitGroup // the broker
	work     string         // the table in which each unit of the application's work leaves a row
	done     map[string]int
	down     atomic.Int64 // how often the source went down,
	up       atomic.Int64 // and how often it came back
}

// newCrashes makes servers and a network, and a Kafka where there is one; tables are made before init.
func newCrashes(t *testing.T, tables, work string, captured ...string) *crashes {
	seed := seedOf(t)
	// The log is in the source itself, as it is by default, or on a server of its own.
	s := newSystem(t, where{own: true, apart: seed%2 == 0, tables: captured, logs: map[string]string{"wal_level": "replica"}})
	t.Logf("the log is on a server of its own: %v", seed%2 == 0)
	s.cfg.Log.PartitionEvents = 20_000
	db := s.sql()
	db.do("%s", tables)
	_ = db.Close(context.Background())
	c := crashesOf(s, seed, work)
	if kafkaserver.Wanted(t) {
		c.broker = newBroker(t)
		s.env = append(s.env, "BACKSTORY_KAFKA_BROKERS="+strings.Join(c.broker.Brokers(), ","), "BACKSTORY_KAFKA_TOPIC="+c.broker.topic)
	}
	c.initialise()
	return c
}

// crashesOf puts a network between a sidecar and its servers.
func crashesOf(s *system, seed uint64, work string) *crashes {
	c := &crashes{system: s, r: rand.New(rand.NewPCG(seed, 2)), direct: *s, work: work, done: map[string]int{}}
	c.source, c.logs = newProxy(s.t, s.cfg.Capture.URL), newProxy(s.t, s.logURL())
	s.cfg.Capture.URL, s.cfg.Log.URL = c.source.through(s.cfg.Capture.URL), c.logs.through(s.logURL())
	return c
}

func (c *crashes) initialise(more ...string) {
	c.t.Helper()
	if p := c.command(true, append([]string{"init", "--yes"}, more...)...); p.wait(time.Minute) != 0 {
		c.t.Fatalf("init:\n%s", p.out)
	}
}

// failure is something that fails.
type failure struct {
	name   string
	weight int  // how often it happens compared with others
	must   bool // in every run at least once
	do     func()
}

func (c *crashes) failures() []failure {
	list := []failure{
		{"kill the sidecar", 6, true, func() { c.program.kill(); c.pause(200); c.start() }},
		{"end the sidecar", 1, false, func() {
			_ = c.program.cmd.Process.Signal(syscall.SIGTERM)
			if code := c.program.wait(40 * time.Second); code != 0 {
				c.t.Errorf("the sidecar, asked to end, returned %d:\n%s", code, c.program.out.tail(20))
			}
			c.start()
		}},
		{"stop the log's server immediately", 3, true, func() { c.restart(c.log.Server, false) }},
		{"kill the log's server", 1, false, func() { c.restart(c.log.Server, true) }},
		{"stop the source immediately", 2, true, func() { c.restart(c.src.Server, false) }},
		{"kill the source", 1, false, func() { c.restart(c.src.Server, true) }},
		{"cut the source's connections", 3, true, func() { c.cut(c.source) }},
		{"cut the log's connections", 3, true, func() { c.cut(c.logs) }},
		{"kill the sidecar while the log's server stops", 1, false, func() {
			var wg sync.WaitGroup
			wg.Go(func() { c.restart(c.log.Server, false) })
			c.program.kill()
			wg.Wait()
			c.start()
		}},
	}
	if c.broker != nil {
		kill := c.r.IntN(2) == 0 // or else stop: one of them is enough for a short run
		list = append(list,
			failure{"kill the broker", 2, kill, func() { c.sends(); c.restartBroker(c.broker.Kill) }},
			failure{"stop the broker", 1, !kill, func() { c.sends(); c.restartBroker(func() error { return nil }) }},
			failure{"kill the sidecar and the broker", 1, false, func() { c.program.kill(); c.restartBroker(c.broker.Kill); c.start() }})
	}
	return list
}

// fail lets things fail at random moments: first, in a random order, all that must happen, then whatever chance wants, until
// the time is over.
func (c *crashes) fail(list []failure, lasts time.Duration) {
	c.t.Helper()
	c.start()
	defer c.starting.Wait()
	began := time.Now()
	total := 0
	var must []failure
	for _, f := range list {
		total += f.weight
		if f.must {
			must = append(must, f)
		}
	}
	c.r.Shuffle(len(must), func(i, j int) { must[i], must[j] = must[j], must[i] })
	for len(must) > 0 || time.Since(began) < lasts {
		// Most failures meet a sidecar and an application at work, some follow upon another one.
		if len(must) > 0 || c.r.IntN(4) > 0 {
			c.works()
		}
		c.pause(1000)
		if !c.program.running() {
			c.t.Fatalf("the sidecar ended by itself after %v:\n%s", c.done, c.program.out.tail(30))
		}
		var f failure
		if len(must) > 0 {
			f, must = must[0], must[1:]
		} else {
			n := c.r.IntN(total)
			for _, f = range list {
				if n -= f.weight; n < 0 {
					break
				}
			}
		}
		f.do()
		c.done[f.name]++
	}
	c.starting.Wait()
	c.works()
	for _, f := range list {
		if f.must && c.done[f.name] == 0 {
			c.t.Errorf("this did not happen: %s", f.name)
		}
	}
}

// works waits until the application has done something, and the sidecar has appended something.
func (c *crashes) works() {
	c.t.Helper()
	db, l := c.direct.sql(), c.direct.logSQL()
	defer db.Close(context.Background())
	defer l.Close(context.Background())
	count := func() int64 { return atoi(c.t, db.one(`SELECT count(*) FROM %s`, c.work)) }
	position := func() int64 { return atoi(c.t, l.one(`SELECT position FROM backstory.head`)) }
	n, at := count(), position()
	eventually(c.t, 3*time.Minute, fmt.Sprintf("after %v the application works and the sidecar appends", c.done), func() (bool, error) {
		m, p := count(), position()
		return m >= n+20 && p > at, fmt.Errorf("the application went from %d to %d, the log from %d to %d; the sidecar says:\n%s", n, m, at, p, c.program.out.tail(20))
	})
}

// sends waits until the sidecar has sent something to Kafka.
func (c *crashes) sends() {
	c.t.Helper()
	c.starting.Wait()
	n := c.broker.size(c.t)
	eventually(c.t, 3*time.Minute, fmt.Sprintf("after %v the sidecar sends to Kafka", c.done), func() (bool, error) {
		return c.broker.size(c.t) > n, fmt.Errorf("%d messages; the sidecar says:\n%s", n, c.program.out.tail(20))
	})
}

func (c *crashes) pause(ms int) { time.Sleep(time.Duration(c.r.IntN(ms)) * time.Millisecond) }

func (c *crashes) start() {
	c.t.Helper()
	c.program = c.command(true, "run")
}

func (c *crashes) restart(s *pgserver.Server, kill bool) {
	if s == c.src.Server {
		c.down.Add(1)
		defer c.up.Add(1)
	}
	was := s.PID()
	if kill {
		if err := s.Kill(); err != nil {
			c.t.Error(err)
		}
	}
	if err := s.Restart(within(c.t, time.Minute), pgserver.Immediate); err != nil {
		c.t.Error(err)
	}
	if s.PID() == was {
		c.t.Error("the server was not restarted")
	}
}

// restartBroker ends the broker in some way and starts it again, which takes long: other things fail meanwhile.
func (c *crashes) restartBroker(end func() error) {
	c.starting.Wait()
	c.starting.Go(func() { c.broker.restart(c.t, end) })
}

// cut cuts connections, of which there are some when the sidecar works.
func (c *crashes) cut(p *proxy) {
	eventually(c.t, 3*time.Minute, "there is a connection to be cut", func() (bool, error) { return p.cut() > 0, nil })
}

// excused tells whether an application's error is that of a source that is down, and it was since up was as it is told.
func (c *crashes) excused(err error, up int64) bool {
	state := eventlog.SQLState(err)
	return c.down.Load() > up && (state == "" || strings.HasPrefix(state, "08") || strings.HasPrefix(state, "57P"))
}

// settle ends the sidecar by a kill, and lets another one catch up.
func (c *crashes) settle() {
	c.t.Helper()
	c.program.kill()
	p := c.command(true, "run", "--once")
	if code := p.wait(5 * time.Minute); code != 0 {
		c.t.Fatalf("run --once returned %d:\n%s", code, p.out.tail(30))
	}
	if p = c.command(true, "verify"); p.wait(5*time.Minute) != 0 {
		c.t.Fatalf("verify:\n%s", p.out)
	}
}

// looked is what a reader has seen while everything failed.
type looked struct {
	looks int // how often it looked
	grew  int // how often it saw more than the time before
}

// enough fails if a reader has seen next to nothing.
func (k looked) enough(t *testing.T) {
	t.Helper()
	if k.looks < 10 || k.grew < 3 {
		t.Errorf("a reader looked %d times, and saw more %d times", k.looks, k.grew)
	}
}

// watch asks the log, again and again, for two numbers that are the same after each whole transaction.
func (c *crashes) watch(ctx context.Context, query string) (k looked) {
	last := "0"
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close(context.Background())
		}
	}()
	for ; ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		var err error
		if conn == nil || conn.IsClosed() {
			if conn, err = dial(ctx, c.direct.logURL()); err != nil {
				continue
			}
		}
		rows, err := textRows(ctx, conn, query)
		if err != nil {
			if ctx.Err() == nil && !conn.IsClosed() && !strings.HasPrefix(eventlog.SQLState(err), "57P") {
				c.t.Errorf("watch: %v", err)
				return k
			}
			continue
		}
		k.looks++
		if rows[0][0] != rows[0][1] {
			c.t.Errorf("a reader sees half a transaction: %v", rows)
			return k
		}
		if rows[0][0] != last {
			k.grew, last = k.grew+1, rows[0][0]
		}
	}
	return k
}

func crashSeconds(t testing.TB) time.Duration {
	return time.Duration(setting(t, "BACKSTORY_CRASH_SECONDS", 10)) * time.Second
}

// TestCrashesUnderPgbench runs TPC-B.
func TestCrashesUnderPgbench(t *testing.T) {
	t.Parallel()
	c := newCrashes(t, `
		CREATE TABLE public.pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22));
		CREATE TABLE public.pgbench_tellers (tid int NOT NULL PRIMARY KEY, bid int, tbalance int, filler char(84)) WITH (fillfactor = 100);
		CREATE TABLE public.pgbench_accounts (aid int NOT NULL PRIMARY KEY, bid int, abalance int, filler char(84)) WITH (fillfactor = 100);
		CREATE TABLE public.pgbench_branches (bid int NOT NULL PRIMARY KEY, bbalance int, filler char(88)) WITH (fillfactor = 100)`, "public.pgbench_history")
	db := c.direct.sql()
	db.do(`BEGIN; INSERT INTO public.pgbench_branches VALUES (1, 0, NULL);
		INSERT INTO public.pgbench_tellers SELECT i, 1, 0, NULL FROM generate_series(1, 10) i;
		INSERT INTO public.pgbench_accounts SELECT i, 1, 0, '' FROM generate_series(1, 100000) i; COMMIT`)
	_ = db.Close(context.Background())
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	confirmed := int64(0)
	wg.Go(func() { confirmed = c.pgbench(ctx) })
	var seen looked
	wg.Go(func() {
		// Each transaction updates a teller by what its history says.
		seen = c.watch(ctx, `SELECT
			coalesce((SELECT sum((data->>'delta')::bigint) FROM backstory.events WHERE relation = 'public.pgbench_history'), 0),
			coalesce((SELECT sum((data->>'tbalance')::bigint - (before->>'tbalance')::bigint) FROM backstory.events WHERE relation = 'public.pgbench_tellers' AND op = 'update'), 0)`)
	})
	c.fail(c.failures(), crashSeconds(t))
	stop()
	wg.Wait()
	if t.Failed() {
		return
	}
	c.settle()
	l := c.direct.openLog()
	w := checkLog(t, l)
	db = c.direct.sql()
	w.sameTables(t, db, "n.nspname = 'public'")
	c.direct.checkoutOfNow(db, w.position, columnsOf(db, "n.nspname = 'public'"))
	if c.broker != nil {
		c.broker.holds(t, l)
	}
	seen.enough(t)
	history := atoi(t, db.one(`SELECT count(*) FROM public.pgbench_history`))
	moved := atoi(t, db.one(`SELECT count(*) FROM public.pgbench_history WHERE delta <> 0`))
	count := map[string]int{}
	for k, n := range w.counts {
		count[fmt.Sprint(k.op, " ", k.relation)] += n
	}
	if confirmed < 100 || history < confirmed {
		t.Errorf("%d transactions in the history, %d were confirmed to the application", history, confirmed)
	}
	for _, k := range []struct {
		what string
		want int64
	}{{"insert public.pgbench_history", history}, {"update public.pgbench_tellers", moved}, {"update public.pgbench_branches", moved}, {"update public.pgbench_accounts", moved}} {
		if int64(count[k.what]) != k.want {
			t.Errorf("%d times %s, want %d", count[k.what], k.what, k.want)
		}
	}
	t.Logf("%d transactions, of which %d were confirmed, %d events; a reader %+v; what failed: %v", history, confirmed, w.position, seen, c.done)
}

// pace is how many transactions a second an application does, where it can: enough for a backlog after each failure, and few
// enough for whatever has failed to come back soon on a small machine.
const pace = 400

// rest lets one of four sessions keep the pace.
func rest() { time.Sleep(rand.N(2 * 4 * time.Second / pace)) }

var processed = regexp.MustCompile(`transactions actually processed: (\d+)`)

// pgbench runs the program, or the same transactions where it is not installed, until ctx ends. It gives the number of
// transactions that were confirmed.
func (c *crashes) pgbench(ctx context.Context) (confirmed int64) {
	path := filepath.Join(c.src.BinDir(), "pgbench")
	if _, err := os.Stat(path); err != nil {
		found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pgbench")
		if len(found) == 0 {
			return c.tpcb(ctx)
		}
		path = found[0]
	}
	for ctx.Err() == nil {
		up := c.up.Load()
		// A second each time: it tells what it has done only at its end. All its errors end it.
		out, err := exec.Command(path, "-n", "-c", "4", "-s", "1", "-R", fmt.Sprint(pace), "-T", "1", c.direct.cfg.Capture.URL).CombinedOutput()
		if m := processed.FindSubmatch(out); m != nil {
			confirmed += atoi(c.t, string(m[1]))
		} else if err == nil {
			err = errors.New("it does not tell how many transactions there were")
		}
		if err != nil {
			if c.down.Load() == up || bytes.Contains(out, []byte("ERROR:")) { // a server that goes down says FATAL, or nothing
				c.t.Errorf("pgbench: %v\n%s", err, out)
				return confirmed
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return confirmed
}

// tpcb is pgbench's transaction, again and again.
func (c *crashes) tpcb(ctx context.Context) int64 {
	var confirmed atomic.Int64
	session := func(r *rand.Rand) error {
		conn, err := dial(ctx, c.direct.cfg.Capture.URL)
		if err != nil {
			time.Sleep(20 * time.Millisecond)
			return err
		}
		defer conn.Close(context.Background())
		for ctx.Err() == nil {
			aid, tid, delta := 1+r.IntN(100000), 1+r.IntN(10), r.IntN(10001)-5000
			if _, err := conn.Exec(context.Background(), fmt.Sprintf(`BEGIN; UPDATE public.pgbench_accounts SET abalance = abalance + %[3]d WHERE aid = %[1]d;
				SELECT abalance FROM public.pgbench_accounts WHERE aid = %[1]d; UPDATE public.pgbench_tellers SET tbalance = tbalance + %[3]d WHERE tid = %[2]d;
				UPDATE public.pgbench_branches SET bbalance = bbalance + %[3]d WHERE bid = 1;
				INSERT INTO public.pgbench_history (tid, bid, aid, delta, mtime) VALUES (%[2]d, 1, %[1]d, %[3]d, CURRENT_TIMESTAMP); COMMIT`, aid, tid, delta)); err != nil {
				return err
			}
			confirmed.Add(1)
			rest()
		}
		return nil
	}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(3, uint64(i)))
			c.again(ctx, func() error { return session(r) })
		})
	}
	wg.Wait()
	return confirmed.Load()
}

// again runs a session of the application again and again until ctx ends. What is not the fault of a source that was down is
// an error.
func (c *crashes) again(ctx context.Context, session func() error) {
	for ctx.Err() == nil {
		up := c.up.Load()
		if err := session(); err != nil && ctx.Err() == nil && !c.excused(err, up) {
			c.t.Errorf("the application: %v", err)
			return
		}
	}
}

// TestCrashesUnderShop runs two shops: the demo's, in the schema legacy, which finds its tables consistent after every transaction, those
// that are checked out too; and one on tables with every kind of replica identity.
func TestCrashesUnderShop(t *testing.T) {
	t.Parallel()
	c := newCrashes(t, `
		CREATE TABLE public.customers (id bigserial PRIMARY KEY, email text UNIQUE NOT NULL, note text, updated_at timestamptz DEFAULT now());
		CREATE TABLE public.products (sku text PRIMARY KEY, title text, price numeric(10,2), stock int, description text);
		ALTER TABLE public.products ALTER description SET STORAGE EXTERNAL;
		CREATE TABLE public.carts (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), customer_id bigint NOT NULL REFERENCES public.customers, token text NOT NULL);
		CREATE UNIQUE INDEX carts_by_token ON public.carts (token);
		ALTER TABLE public.carts REPLICA IDENTITY USING INDEX carts_by_token;
		CREATE TABLE public.cart_items (cart_id uuid REFERENCES public.carts ON DELETE CASCADE, sku text REFERENCES public.products, quantity int, PRIMARY KEY (cart_id, sku));
		CREATE TABLE public.orders (id bigserial PRIMARY KEY, customer_id bigint NOT NULL REFERENCES public.customers, status text, total numeric(10,2), lines jsonb, updated_at timestamptz DEFAULT now());
		ALTER TABLE public.orders REPLICA IDENTITY FULL;
		CREATE TABLE public.payments (id bigserial PRIMARY KEY, order_id bigint NOT NULL REFERENCES public.orders, amount numeric(10,2), at timestamptz DEFAULT now());
		CREATE TABLE public.visits (path text, at timestamptz DEFAULT now());
		CREATE SCHEMA legacy; SET search_path = legacy; `+shop.Schema(), "public.payments", "public.*", "legacy.*")
	const both = "n.nspname IN ('public', 'legacy')"
	db := c.direct.sql()
	db.do(`INSERT INTO public.customers (email) SELECT 'c' || i || '@example.com' FROM generate_series(1, 50) i;
		INSERT INTO public.products SELECT 'sku-' || i, 'product ' || i, i, 100, repeat(md5(i::text), 200) FROM generate_series(1, 40) i`)
	_ = db.Close(context.Background())
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	var confirmed sync.Map
	var n atomic.Int64
	seed := c.r.Uint64()
	for i := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			c.again(ctx, func() error { return c.shop(ctx, r, &confirmed, &n) })
		})
	}
	var legacyDid shop.Stats
	wg.Go(func() {
		var err error
		legacyDid, err = shop.Run(ctx, shop.Config{URL: c.direct.cfg.Capture.URL + "&search_path=legacy", Rate: pace / 4, Seed: seed})
		if err != nil {
			t.Errorf("the demo's shop: %v", err)
		}
	})
	var seen looked
	wg.Go(func() {
		// An order is paid in the transaction in which its payment is made.
		seen = c.watch(ctx, `SELECT
			(SELECT count(*) FROM backstory.events WHERE relation = 'public.orders' AND data->>'status' = 'paid'),
			(SELECT count(*) FROM backstory.events WHERE relation = 'public.payments' AND op = 'insert')`)
	})
	c.fail(c.failures(), crashSeconds(t))
	stop()
	wg.Wait()
	if t.Failed() {
		return
	}
	c.settle()
	l := c.direct.openLog()
	w := checkLog(t, l)
	db = c.direct.sql()
	w.sameTables(t, db, both)
	c.direct.checkoutOfNow(db, w.position, columnsOf(db, both))
	if legacyDid.Commits < 100 {
		t.Errorf("the demo's shop did little: %+v", legacyDid)
	}
	c.consistent(t)
	if c.broker != nil {
		c.broker.holds(t, l)
	}
	seen.enough(t)
	paid := map[string]bool{}
	for _, rows := range w.tables["public.payments"].rows {
		paid[rows[0]["id"]] = true
	}
	payments := 0
	confirmed.Range(func(id, _ any) bool {
		payments++
		if !paid[fmt.Sprint(id)] {
			t.Errorf("payment %v was confirmed to the application and is not in the log", id)
		}
		return true
	})
	if payments < 100 {
		t.Errorf("only %d payments were confirmed to the application", payments)
	}
	t.Logf("%d transactions, %d payments of which %d were confirmed, %d events; a reader %+v; what failed: %v", n.Load(), len(paid), payments, w.position, seen, c.done)
	t.Logf("the demo's shop: %+v", legacyDid)
}

// consistent has the demo's shop judge its tables as they were after some transactions, in the log's database.
func (c *crashes) consistent(t *testing.T) {
	t.Helper()
	ends := c.direct.logSQL().ask(`SELECT p FROM (SELECT max(position) AS p FROM backstory.events GROUP BY commit_lsn) x ORDER BY random() LIMIT 5`)
	if len(ends) < 5 {
		t.Fatalf("transactions: %v", ends)
	}
	for _, end := range ends {
		schema := "past_" + end[0]
		if p := c.direct.command(false, "checkout", "legacy.*", "--at", end[0], "--schema", schema); p.wait(time.Minute) != 0 {
			t.Fatalf("checkout of position %s:\n%s", end[0], p.out)
		}
		db := c.direct.logSQL()
		db.do("SET search_path = %s", schema)
		broken, err := shop.Check(t.Context(), db)
		if err != nil || len(broken) > 0 {
			t.Errorf("the shop as of position %s: %v\n%s", end[0], err, strings.Join(broken, "\n"))
		}
	}
}

// shop is one session of the application, until ctx ends or the connection does.
func (c *crashes) shop(ctx context.Context, r *rand.Rand, confirmed *sync.Map, n *atomic.Int64) error {
	conn, err := dial(ctx, c.direct.cfg.Capture.URL)
	if err != nil {
		time.Sleep(20 * time.Millisecond)
		return err
	}
	defer conn.Close(context.Background())
	for ; ctx.Err() == nil; rest() {
		customer, sku, amount := 1+r.IntN(50), fmt.Sprintf("sku-%d", 1+r.IntN(40)), 1+r.IntN(5)
		q := ""
		switch r.IntN(12) {
		case 0:
			q = fmt.Sprintf(`UPDATE public.customers SET note = %s, updated_at = now() WHERE id = %d`, quoteLit(oddText(r)), customer)
		case 1:
			q = fmt.Sprintf(`UPDATE public.customers SET updated_at = clock_timestamp() WHERE id %% 10 = %d`, r.IntN(10))
		case 2:
			q = fmt.Sprintf(`UPDATE public.products SET stock = stock - %d WHERE sku = '%s'`, amount, sku)
		case 3:
			q = fmt.Sprintf(`UPDATE public.products SET description = %s, price = price + 0.01 WHERE sku = '%s'`, quoteLit(wide(r)), sku)
		case 4, 5:
			q = fmt.Sprintf(`WITH c AS (INSERT INTO public.carts (customer_id, token) VALUES (%d, gen_random_uuid()) RETURNING id)
				INSERT INTO public.cart_items SELECT c.id, p.sku, %d FROM c, public.products p ORDER BY md5(p.sku || '%d') LIMIT 3`, customer, amount, r.Uint32())
		case 6:
			q = fmt.Sprintf(`UPDATE public.carts SET token = gen_random_uuid() WHERE id IN (SELECT id FROM public.carts WHERE customer_id = %d LIMIT 2)`, customer)
		case 7:
			q = fmt.Sprintf(`DELETE FROM public.carts WHERE id IN (SELECT id FROM public.carts WHERE customer_id = %d LIMIT 3)`, customer)
		case 8, 9:
			var id int64
			// The order is made, paid and delivered; a savepoint takes some of it back.
			err := pgx.BeginFunc(context.Background(), conn, func(tx pgx.Tx) error {
				if r.IntN(3) > 0 {
					if _, err := tx.Exec(context.Background(), fmt.Sprintf(`SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "customer %d"}')`, customer)); err != nil {
						return err
					}
				}
				var order int64
				if err := tx.QueryRow(context.Background(), fmt.Sprintf(`INSERT INTO public.orders (customer_id, status, total, lines) VALUES (%d, 'new', %d, '[{"sku": "%s"}]') RETURNING id`,
					customer, amount, sku)).Scan(&order); err != nil {
					return err
				}
				_, err := tx.Exec(context.Background(), fmt.Sprintf(`SAVEPOINT s; UPDATE public.orders SET status = 'lost' WHERE id = %d; ROLLBACK TO s; UPDATE public.orders SET status = 'paid' WHERE id = %d`, order, order))
				if err != nil {
					return err
				}
				return tx.QueryRow(context.Background(), fmt.Sprintf(`INSERT INTO public.payments (order_id, amount) VALUES (%d, %d) RETURNING id`, order, amount)).Scan(&id)
			})
			if err == nil {
				confirmed.Store(id, true)
				n.Add(1)
				continue
			}
			if !isExpected(err) {
				return err
			}
			continue
		case 10:
			q = `INSERT INTO public.visits (path) SELECT '/' || i FROM generate_series(1, 20) i`
		case 11:
			q = `BEGIN; UPDATE public.products SET price = price * 2; ROLLBACK`
			if r.IntN(5) == 0 {
				q = `UPDATE public.products SET price = price + 1`
			}
		}
		if _, err := conn.Exec(context.Background(), q); err != nil {
			if isExpected(err) || errors.Is(err, context.Canceled) {
				_, _ = conn.Exec(context.Background(), "ROLLBACK")
				continue
			}
			return fmt.Errorf("%s: %w", short(q), err)
		}
		n.Add(1)
	}
	return nil
}
