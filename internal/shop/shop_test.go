package shop

import (
	"context"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	pgservertest.StopShared()
	os.Exit(code)
}

// newShop makes a database with the shop's tables and returns its URL.
func newShop(t *testing.T, s *pgservertest.Server) string {
	t.Helper()
	url := s.URL(s.NewDatabase(t))
	if _, err := connect(t, url).Exec(t.Context(), Schema()); err != nil {
		t.Fatal(err)
	}
	return url
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// consistent fails the test if the shop's invariants do not hold.
func consistent(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	err := pgx.BeginTxFunc(t.Context(), conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		broken, err := Check(t.Context(), tx)
		if len(broken) > 0 {
			t.Errorf("broken:\n%s", strings.Join(broken, "\n"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func count(t *testing.T, conn *pgx.Conn, sql string) (n int64) {
	t.Helper()
	if err := conn.QueryRow(t.Context(), sql).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestEverythingHappensAndTheTablesStayConsistent(t *testing.T) {
	url := newShop(t, pgservertest.ForTest(t, pgserver.Config{Settings: map[string]string{"fsync": "off"}}))
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	missing := map[string]bool{}
	for _, what := range []string{
		"sign up", "open a cart", "add to cart", "change quantity", "remove from cart", "check out", "pay", "decline payment", "try another payment",
		"cancel", "ship", "deliver", "change address", "remove line", "refund", "change phone", "change preferences", "suspend customer", "reactivate customer",
		"forget customer", "change price", "edit description", "edit tags", "discontinue", "new product", "repair by hand", "mark abandoned carts", "delete old carts",
		"restock", "recount", "new price list",
		"refused: not enough in stock", "refused: the cart has been cleared away", "refused: the cart is empty", "refused: prices times 1.03: not approved",
	} {
		missing[what] = true
	}
	var attributed, total int64
	for round := uint64(0); len(missing) > 0; round++ { // rare things may take a few
		if round == 10 {
			t.Fatalf("these have never happened: %v", missing)
		}
		var ended int64
		stats, err := Run(t.Context(), Config{URL: url, Sessions: 6, Seed: seed + round, Transactions: 3000, OnTransaction: func(x Transaction) {
			ended++
			if x.Actor != "" {
				attributed++
			}
			if x.Outcome == Committed {
				delete(missing, x.Action)
			}
			delete(missing, "refused: "+x.Refusal)
		}})
		if err != nil {
			t.Fatal(err)
		}
		if stats.Commits < 3000 || ended != stats.Commits+stats.Rollbacks || stats.Unknown != 0 || stats.Reconnects != 0 || stats.Committed["open the shop"] != 1 {
			t.Errorf("%d ended, %+v", ended, stats)
		}
		total += ended
		consistent(t, connect(t, url))
	}
	if share := float64(attributed) / float64(total); share < 0.7 || share > 0.98 {
		t.Errorf("%.2f of the transactions say who", share)
	}
	conn := connect(t, url)
	consistent(t, conn)
	for _, sql := range []string{
		`SELECT count(*) FROM orders WHERE coupon_code IS NOT NULL AND discount > 0`,
		`SELECT count(*) FROM orders WHERE note LIKE 'coupon % is for orders of %' AND coupon_code IS NULL AND discount = 0`, // rolled back to a savepoint
		`SELECT count(*) FROM customers WHERE deleted_at IS NOT NULL`,
		`SELECT count(*) FROM payments WHERE response ? 'refund'`,
		`SELECT count(*) FROM products WHERE pg_column_size(description) > 2000`,
		`SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE relname = 'products'`,
	} {
		if count(t, conn, sql) == 0 {
			t.Errorf("none: %s", sql)
		}
	}
	if n := count(t, conn, `SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relreplident <> 'd'`); n != 0 {
		t.Errorf("%d tables have a replica identity of their own", n)
	}
}

func TestCheckFindsWhatIsWrong(t *testing.T) {
	url := newShop(t, pgservertest.ForTest(t, pgserver.Config{Settings: map[string]string{"fsync": "off"}}))
	if _, err := Run(t.Context(), Config{URL: url, Transactions: 600, Seed: 1}); err != nil {
		t.Fatal(err)
	}
	conn := connect(t, url)
	consistent(t, conn)
	for _, sql := range []string{
		`UPDATE order_items SET quantity = quantity + 1 WHERE id = (SELECT max(id) FROM order_items)`,
		`UPDATE orders SET total = total + 0.01 WHERE id = (SELECT max(id) FROM orders)`,
		`UPDATE orders SET status = 'paid' WHERE id = (SELECT max(id) FROM orders WHERE status IN ('pending', 'cancelled'))`,
		`UPDATE payments SET status = 'refunded' WHERE id = (SELECT max(id) FROM payments WHERE status = 'paid')`,
		`UPDATE carts SET items_count = items_count + 1 WHERE id = (SELECT id FROM carts LIMIT 1)`,
		`UPDATE customers SET orders_count = 77 WHERE id = 1`,
		`DELETE FROM order_items`,
		`SET LOCAL session_replication_role = replica; DELETE FROM orders WHERE id = (SELECT max(id) FROM orders)`,
	} {
		tx, err := conn.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
		broken, err := Check(t.Context(), tx)
		if err != nil || len(broken) == 0 {
			t.Errorf("%s: nothing found (%v)", sql, err)
		}
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTheRateIsKept(t *testing.T) {
	url := newShop(t, pgservertest.ForTest(t, pgserver.Config{Settings: map[string]string{"fsync": "off"}}))
	began := time.Now()
	if _, err := Run(t.Context(), Config{URL: url, Rate: 40, Seed: 2, Transactions: 60}); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d < 700*time.Millisecond { // 1.5 s on average; a busy machine takes longer
		t.Errorf("60 transactions at 40/s took %s", d)
	}
}

func TestPatienceLetsOrdersWait(t *testing.T) {
	url := newShop(t, pgservertest.ForTest(t, pgserver.Config{Settings: map[string]string{"fsync": "off"}}))
	stats, err := Run(t.Context(), Config{URL: url, Patience: time.Hour, Transactions: 400, Seed: 3})
	if err != nil {
		t.Fatal(err)
	}
	if stats.Committed["pay"] == 0 || stats.Committed["ship"] != 0 || stats.Committed["delete old carts"] != 0 {
		t.Errorf("%+v", stats)
	}
}

func TestAServerThatRestartsIsWaitedFor(t *testing.T) {
	s := pgservertest.Start(t, pgserver.Config{Settings: map[string]string{"fsync": "off"}})
	url := newShop(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	commits := make(chan struct{}, 1)
	done := make(chan error, 1)
	var stats Stats
	go func() {
		var err error
		stats, err = Run(ctx, Config{URL: url, Seed: 4, OnTransaction: func(x Transaction) {
			if x.Outcome == Committed {
				select {
				case commits <- struct{}{}:
				default:
				}
			}
		}})
		done <- err
	}()
	wait := func(n int) {
		for range n {
			select {
			case <-commits:
			case err := <-done:
				t.Fatalf("the shop ended: %v", err)
			}
		}
	}
	for _, mode := range []pgserver.Mode{pgserver.Immediate, pgserver.Fast} {
		wait(100)
		if err := s.Restart(ctx, mode); err != nil {
			t.Fatal(err)
		}
	}
	wait(100)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if stats.Reconnects < 2 {
		t.Errorf("%+v", stats)
	}
	consistent(t, connect(t, url))
}

func TestTheShopClosesWithItsContext(t *testing.T) {
	url := newShop(t, pgservertest.ForTest(t, pgserver.Config{Settings: map[string]string{"fsync": "off"}}))
	before := runtime.NumGoroutine()
	ctx, cancel := context.WithCancel(t.Context())
	var began time.Time
	n := 0
	stats, err := Run(ctx, Config{URL: url, Seed: 5, OnTransaction: func(Transaction) {
		if n++; n == 50 {
			began = time.Now()
			cancel()
		}
	}})
	if err != nil || stats.Unknown != 0 {
		t.Errorf("%v, %+v", err, stats)
	}
	if d := time.Since(began); d > 2*time.Second {
		t.Errorf("closing took %s", d)
	}
	if stats, err := Run(ctx, Config{URL: url}); err != nil || stats.Commits != 0 {
		t.Errorf("with a context that has ended: %v, %+v", err, stats)
	}
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines before, %d after", before, runtime.NumGoroutine())
		}
	}
	consistent(t, connect(t, url))
}

func TestWhatIsWrongFromTheStartIsAnError(t *testing.T) {
	s := pgservertest.ForTest(t, pgserver.Config{Settings: map[string]string{"fsync": "off"}})
	if _, err := Run(t.Context(), Config{URL: s.URL("nowhere")}); sqlState(err) != "3D000" {
		t.Errorf("a database that is not there: %v", err)
	}
	if _, err := Run(t.Context(), Config{URL: s.URL(s.NewDatabase(t))}); sqlState(err) != "42P01" {
		t.Errorf("no tables: %v", err)
	}
}

func TestRandomUUIDsAreWellFormed(t *testing.T) {
	url := newShop(t, pgservertest.ForTest(t, pgserver.Config{Settings: map[string]string{"fsync": "off"}}))
	var actors []string
	if _, err := Run(t.Context(), Config{URL: url, Seed: 6, Transactions: 50, OnTransaction: func(x Transaction) { actors = append(actors, x.Actor) }}); err != nil {
		t.Fatal(err)
	}
	if n := count(t, connect(t, url), `SELECT count(*) FROM carts WHERE id::text !~ '^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$'`); n != 0 {
		t.Errorf("%d keys are no random uuids", n)
	}
	if !slices.Contains(actors, "deploy:seed") {
		t.Errorf("nobody opened the shop: %q", actors)
	}
}
