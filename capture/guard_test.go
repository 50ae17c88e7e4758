package capture

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// A role that cannot see when others' transactions began is told of those that stay open, after a second; while there are none but such as end at once, or
// where nobody wants to know, it does not wait for that.
func TestTransactionsThatNobodyDates(t *testing.T) {
	ctx, server := context.Background(), pgservertest.ForTest(t, pgserver.Config{})
	database := server.NewDatabase(t)
	connect := func(user string) *pgx.Conn {
		t.Helper()
		cfg, err := pgx.ParseConfig(server.URL(database))
		if err != nil {
			t.Fatal(err)
		}
		if user != "" {
			cfg.User = user
		}
		conn, err := pgx.ConnectConfig(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close(ctx) })
		return conn
	}
	super, app := connect(""), connect("")
	do := func(c *pgx.Conn, sql string) {
		t.Helper()
		if _, err := c.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	role := "undated_" + database
	do(super, `CREATE ROLE `+role+` LOGIN`)
	t.Cleanup(func() { do(super, `DROP ROLE `+role) })
	weak, pid := connect(role), fmt.Sprintf("pid %d ", app.PgConn().PID())
	look := func(undated bool) (found bool, took time.Duration) {
		t.Helper()
		began := time.Now()
		open, err := openTransactions(ctx, weak, undated)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range open {
			found = found || strings.HasPrefix(o.what, pid)
		}
		return found, time.Since(began)
	}
	do(app, `BEGIN; SELECT pg_current_xact_id()`)
	if found, took := look(false); found || took >= stillOpen {
		t.Errorf("where nobody wants to know: found %v, after %s", found, took)
	}
	if found, took := look(true); !found || took < stillOpen || took > 2*stillOpen {
		t.Errorf("that stays open: found %v, after %s", found, took)
	}
	ended := make(chan struct{})
	defer func() { <-ended }() // before its connection is closed
	go func() {
		defer close(ended)
		time.Sleep(100 * time.Millisecond)
		_ = app.PgConn().Exec(ctx, `COMMIT`).Close()
	}()
	if found, took := look(true); found || took >= stillOpen { // other tests have transactions open on the same server for a moment
		t.Errorf("that ends at once: found %v, after %s", found, took)
	}
}
