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
)

// crashes runs a workload while everything fails that can: the sidecar is killed, both servers crash, connections are cut.
type crashes struct {
	*system
	r        *rand.Rand
	direct   system // the source and the log without the network that fails
	source   *proxy
	logs     *proxy
	program  *program
	broker   *broker // nil without Kafka
	done     map[string]int
	restarts atomic.Int64 // of the source
}

// newCrashes makes servers and a network, and a Kafka where kafka asks for it; tables are made before init.
func newCrashes(t *testing.T, tables string, kafka bool) *crashes {
	seed := seedOf(t)
	s := newSystem(t, where{own: true, apart: true, logs: map[string]string{"wal_level": "replica"}})
	s.cfg.Log.PartitionEvents = 20_000
	db := s.sql()
	db.do("%s", tables)
	_ = db.Close(context.Background())
	c := &crashes{system: s, r: rand.New(rand.NewPCG(seed, 2)), direct: *s, done: map[string]int{}}
	c.source, c.logs = newProxy(t, s.cfg.Capture.URL), newProxy(t, s.cfg.Log.URL)
	s.cfg.Capture.URL, s.cfg.Log.URL = c.source.through(s.cfg.Capture.URL), c.logs.through(s.cfg.Log.URL)
	if kafka {
		c.broker = newBroker(t)
		s.env = append(s.env, "BACKSTORY_KAFKA_BROKERS="+strings.Join(c.broker.Brokers(), ","), "BACKSTORY_KAFKA_TOPIC="+c.broker.topic)
	}
	if p := s.command(true, "init", "--yes"); p.wait(time.Minute) != 0 {
		t.Fatalf("init:\n%s", p.out)
	}
	return c
}

// fail lets things fail at random moments until ctx ends, then lets the sidecar catch up.
func (c *crashes) fail(ctx context.Context) {
	c.t.Helper()
	c.start()
	type action struct {
		name   string
		weight int
		do     func()
	}
	actions := []action{
		{"kill the sidecar", 6, func() { c.program.kill(); c.pause(200); c.start() }},
		{"end the sidecar", 1, func() {
			_ = c.program.cmd.Process.Signal(syscall.SIGTERM)
			if code := c.program.wait(40 * time.Second); code != 0 {
				c.t.Errorf("the sidecar, asked to end, returned %d:\n%s", code, c.program.out.tail(20))
			}
			c.start()
		}},
		{"stop the log's server immediately", 3, func() { c.restart(c.log.Server, false) }},
		{"kill the log's server", 1, func() { c.restart(c.log.Server, true) }},
		{"stop the source immediately", 2, func() { c.restarts.Add(1); c.restart(c.src.Server, false) }},
		{"kill the source", 1, func() { c.restarts.Add(1); c.restart(c.src.Server, true) }},
		{"cut the source's connections", 3, func() { c.source.cut() }},
		{"cut the log's connections", 3, func() { c.logs.cut() }},
		{"kill the sidecar while the log's server stops", 1, func() {
			var wg sync.WaitGroup
			wg.Go(func() { c.restart(c.log.Server, false) })
			c.program.kill()
			wg.Wait()
			c.start()
		}},
	}
	if c.broker != nil {
		actions = append(actions,
			action{"kill the broker", 2, func() { c.broker.restart(c.t, c.broker.Kill) }},
			action{"stop the broker", 1, func() { c.broker.restart(c.t, func() error { return nil }) }},
			action{"kill the sidecar and the broker", 1, func() { c.program.kill(); c.broker.restart(c.t, c.broker.Kill); c.start() }})
	}
	total := 0
	for _, a := range actions {
		total += a.weight
	}
	for first := true; ; first = false {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Duration(200+c.r.IntN(900)) * time.Millisecond):
		}
		if !c.program.running() {
			c.t.Errorf("the sidecar ended by itself after %v:\n%s", c.done, c.program.out.tail(30))
			return
		}
		n := c.r.IntN(total)
		if first {
			n = 0 // at least one kill, however short the test
		}
		a := actions[0]
		for _, a = range actions {
			if n -= a.weight; n < 0 {
				break
			}
		}
		c.done[a.name]++
		a.do()
	}
}

func (c *crashes) pause(ms int) { time.Sleep(time.Duration(c.r.IntN(ms)) * time.Millisecond) }

func (c *crashes) start() {
	c.t.Helper()
	c.program = c.command(true, "run")
}

func (c *crashes) restart(s *pgserver.Server, kill bool) {
	if kill {
		if err := s.Kill(); err != nil {
			c.t.Error(err)
		}
	}
	if err := s.Restart(within(c.t, time.Minute), pgserver.Immediate); err != nil {
		c.t.Error(err)
	}
}

// settle ends the sidecar by a kill, and lets another one catch up.
func (c *crashes) settle() {
	c.t.Helper()
	c.program.kill()
	p := c.command(true, "run", "--once")
	if code := p.wait(2 * time.Minute); code != 0 {
		c.t.Fatalf("run --once returned %d:\n%s", code, p.out.tail(30))
	}
	if p = c.command(true, "verify"); p.wait(2*time.Minute) != 0 {
		c.t.Fatalf("verify:\n%s", p.out)
	}
}

// watch asks the log, again and again, for something that holds after each whole transaction. It tells how often it did.
func (c *crashes) watch(ctx context.Context, query string) int {
	n := 0
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close(context.Background())
		}
	}()
	for ctx.Err() == nil {
		if conn == nil || conn.IsClosed() {
			var err error
			if conn, err = dial(ctx, c.direct.cfg.Log.URL); err != nil {
				conn = nil
				time.Sleep(20 * time.Millisecond)
				continue
			}
		}
		rows, err := textRows(ctx, conn, query)
		if err != nil {
			if ctx.Err() == nil && !conn.IsClosed() && eventlog.SQLState(err) != "57P01" {
				c.t.Errorf("watch: %v", err)
				return n
			}
			continue
		}
		n++
		for _, r := range rows {
			c.t.Errorf("a reader sees half a transaction: %v", r)
			return n
		}
		time.Sleep(20 * time.Millisecond)
	}
	return n
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
		CREATE TABLE public.pgbench_branches (bid int NOT NULL PRIMARY KEY, bbalance int, filler char(88)) WITH (fillfactor = 100)`, false)
	db := c.direct.sql()
	db.do(`BEGIN; INSERT INTO public.pgbench_branches VALUES (1, 0, NULL);
		INSERT INTO public.pgbench_tellers SELECT i, 1, 0, NULL FROM generate_series(1, 10) i;
		INSERT INTO public.pgbench_accounts SELECT i, 1, 0, '' FROM generate_series(1, 100000) i; COMMIT`)
	_ = db.Close(context.Background())
	ctx, stop := context.WithTimeout(context.Background(), crashSeconds(t))
	defer stop()
	var wg sync.WaitGroup
	var committed atomic.Int64
	wg.Go(func() { c.pgbench(ctx, &committed) })
	looks := 0
	wg.Go(func() {
		// Each transaction updates a teller by what its history says.
		looks = c.watch(ctx, `SELECT h, s FROM (SELECT
			(SELECT sum((data->>'delta')::bigint) FROM backstory.events WHERE relation = 'public.pgbench_history') h,
			(SELECT sum((data->>'tbalance')::bigint - (before->>'tbalance')::bigint) FROM backstory.events WHERE relation = 'public.pgbench_tellers' AND op = 'update') s) x
			WHERE coalesce(h, 0) <> coalesce(s, 0)`)
	})
	c.fail(ctx)
	wg.Wait()
	if t.Failed() {
		return
	}
	c.settle()
	l := c.direct.openLog()
	w := checkLog(t, l)
	db = c.direct.sql()
	w.sameTables(t, db, "n.nspname = 'public'")
	history := atoi(t, db.one(`SELECT count(*) FROM public.pgbench_history`))
	moved := atoi(t, db.one(`SELECT count(*) FROM public.pgbench_history WHERE delta <> 0`))
	count := map[string]int{}
	for k, n := range w.counts {
		count[fmt.Sprint(k.op, " ", k.relation)] += n
	}
	if history < 100 || history < committed.Load() {
		t.Errorf("%d transactions in the history, %d were confirmed to the application", history, committed.Load())
	}
	for _, k := range []struct {
		what string
		want int64
	}{{"insert public.pgbench_history", history}, {"update public.pgbench_tellers", moved}, {"update public.pgbench_branches", moved}, {"update public.pgbench_accounts", moved}} {
		if int64(count[k.what]) != k.want {
			t.Errorf("%d times %s, want %d", count[k.what], k.what, k.want)
		}
	}
	t.Logf("%d transactions, %d events, %d looks of a reader; what failed: %v", history, w.position, looks, c.done)
}

// pgbench runs the program, or the same transactions where it is not installed, until ctx ends.
func (c *crashes) pgbench(ctx context.Context, committed *atomic.Int64) {
	path := filepath.Join(c.src.BinDir(), "pgbench")
	if _, err := os.Stat(path); err != nil {
		if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pgbench"); len(found) > 0 {
			path = found[0]
		} else {
			path = ""
		}
	}
	for ctx.Err() == nil {
		if path == "" {
			c.tpcb(ctx, committed)
			continue
		}
		cmd := exec.CommandContext(ctx, path, "-n", "-c", "4", "-s", "1", "-T", "3600", c.direct.cfg.Capture.URL)
		cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Run(); err != nil && ctx.Err() == nil && c.restarts.Load() == 0 {
			c.t.Errorf("pgbench: %v\n%s", err, out.String())
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// tpcb is pgbench's transaction.
func (c *crashes) tpcb(ctx context.Context, committed *atomic.Int64) {
	var wg sync.WaitGroup
	for i := range 4 {
		r := rand.New(rand.NewPCG(uint64(i), c.r.Uint64()))
		wg.Go(func() {
			conn, err := dial(ctx, c.direct.cfg.Capture.URL)
			if err != nil {
				time.Sleep(20 * time.Millisecond)
				return
			}
			defer conn.Close(context.Background())
			for ctx.Err() == nil {
				aid, tid, delta := 1+r.IntN(100000), 1+r.IntN(10), r.IntN(10001)-5000
				_, err := conn.Exec(context.Background(), fmt.Sprintf(`BEGIN; UPDATE public.pgbench_accounts SET abalance = abalance + %[3]d WHERE aid = %[1]d;
					SELECT abalance FROM public.pgbench_accounts WHERE aid = %[1]d; UPDATE public.pgbench_tellers SET tbalance = tbalance + %[3]d WHERE tid = %[2]d;
					UPDATE public.pgbench_branches SET bbalance = bbalance + %[3]d WHERE bid = 1;
					INSERT INTO public.pgbench_history (tid, bid, aid, delta, mtime) VALUES (%[2]d, 1, %[1]d, %[3]d, CURRENT_TIMESTAMP); COMMIT`, aid, tid, delta))
				if err != nil {
					return
				}
				committed.Add(1)
			}
		})
	}
	wg.Wait()
}

// TestCrashesUnderShop runs a shop on tables with every kind of replica identity.
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
		CREATE TABLE public.visits (path text, at timestamptz DEFAULT now())`, kafkaserver.Wanted(t))
	db := c.direct.sql()
	db.do(`INSERT INTO public.customers (email) SELECT 'c' || i || '@example.com' FROM generate_series(1, 50) i;
		INSERT INTO public.products SELECT 'sku-' || i, 'product ' || i, i, 100, repeat(md5(i::text), 200) FROM generate_series(1, 40) i`)
	_ = db.Close(context.Background())
	ctx, stop := context.WithTimeout(context.Background(), crashSeconds(t))
	defer stop()
	var wg sync.WaitGroup
	var confirmed sync.Map
	var n atomic.Int64
	seed := c.r.Uint64()
	for i := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			for ctx.Err() == nil {
				if err := c.shop(ctx, r, &confirmed, &n); err != nil && ctx.Err() == nil && c.restarts.Load() == 0 {
					t.Error(err)
					return
				}
			}
		})
	}
	looks := 0
	wg.Go(func() {
		// An order is paid in the transaction in which its payment is made.
		looks = c.watch(ctx, `SELECT o, p FROM (SELECT
			(SELECT count(*) FROM backstory.events WHERE relation = 'public.orders' AND data->>'status' = 'paid') o,
			(SELECT count(*) FROM backstory.events WHERE relation = 'public.payments' AND op = 'insert') p) x WHERE o <> p`)
	})
	c.fail(ctx)
	wg.Wait()
	if t.Failed() {
		return
	}
	c.settle()
	l := c.direct.openLog()
	w := checkLog(t, l)
	db = c.direct.sql()
	w.sameTables(t, db, "n.nspname = 'public'")
	if c.broker != nil {
		c.broker.holds(t, l)
	}
	paid := map[string]bool{}
	for _, rows := range w.tables["public.payments"].rows {
		paid[rows[0]["id"]] = true
	}
	confirmed.Range(func(id, _ any) bool {
		if !paid[fmt.Sprint(id)] {
			t.Errorf("payment %v was confirmed to the application and is not in the log", id)
		}
		return true
	})
	t.Logf("%d transactions, %d payments, %d events, %d looks of a reader; what failed: %v", n.Load(), len(paid), w.position, looks, c.done)
}

// shop is one session of the application, until ctx ends or the connection does.
func (c *crashes) shop(ctx context.Context, r *rand.Rand, confirmed *sync.Map, n *atomic.Int64) error {
	conn, err := dial(ctx, c.direct.cfg.Capture.URL)
	if err != nil {
		time.Sleep(20 * time.Millisecond)
		return err
	}
	defer conn.Close(context.Background())
	for ctx.Err() == nil {
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
