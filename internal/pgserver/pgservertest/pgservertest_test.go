package pgservertest

import (
	"context"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/backstory-dev/backstory/internal/pgserver"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

func TestLeakedGivesTheStacks(t *testing.T) {
	before := runtime.NumGoroutine()
	end := make(chan struct{})
	go func() { <-end }()
	if left := Leaked(before, time.Millisecond); !strings.Contains(left, "TestLeakedGivesTheStacks") {
		t.Errorf("of a goroutine that is left it says %q", left)
	}
	close(end)
	if left := Leaked(before, time.Minute); left != "" {
		t.Errorf("of one that has ended it says %q", left)
	}
}

func TestAtLeast(t *testing.T) {
	for chosen, want := range map[string]string{"": "16", "14": "16", "16": "16", "18": "18"} {
		t.Setenv(VersionEnv, chosen)
		if got := AtLeast("16"); got != want {
			t.Errorf("at least 16, where %q is chosen, is %s", chosen, got)
		}
	}
}

func TestForTestSharesOneServerForEachConfig(t *testing.T) {
	var wg sync.WaitGroup
	servers := make([]*Server, 3)
	for i := range servers {
		wg.Go(func() { servers[i] = ForTest(t, pgserver.Config{}) })
	}
	wg.Wait()
	if servers[0] != servers[1] || servers[1] != servers[2] {
		t.Error("not one server for one config")
	}
	if other := ForTest(t, pgserver.Config{Settings: map[string]string{"fsync": "off"}}); other == servers[0] {
		t.Error("one server for two configs")
	}
}

func TestNewDatabaseIsDroppedWithAllThatHoldsIt(t *testing.T) {
	s := ForTest(t, pgserver.Config{Settings: map[string]string{"max_prepared_transactions": "5"}})
	count := func(sql string) (n int) {
		t.Helper()
		err := s.withConn(t.Context(), "postgres", func(conn *pgx.Conn) error { return conn.QueryRow(t.Context(), sql).Scan(&n) })
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	var names []string
	t.Run("use", func(t *testing.T) {
		busy, gone := s.NewDatabase(t), s.NewDatabase(t)
		names = append(names, busy, gone)
		err := s.withConn(t.Context(), busy, func(conn *pgx.Conn) error {
			_, err := conn.Exec(t.Context(), `SELECT pg_create_logical_replication_slot('idle_' || current_database(), 'pgoutput');
				SELECT pg_create_logical_replication_slot('busy_' || current_database(), 'pgoutput');
				CREATE TABLE t (n int); CREATE PUBLICATION p FOR TABLE t`)
			if err != nil {
				return err
			}
			_, err = conn.Exec(t.Context(), `BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'forgotten'`)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		walsender, err := pgx.Connect(context.Background(), s.URL(busy)+"&replication=database")
		if err != nil {
			t.Fatal(err)
		}
		// Left open, streaming.
		walsender.PgConn().Frontend().SendQuery(&pgproto3.Query{String: `START_REPLICATION SLOT busy_` + busy + ` LOGICAL 0/0 (proto_version '1', publication_names 'p')`})
		if err := walsender.PgConn().Frontend().Flush(); err != nil {
			t.Fatal(err)
		}
		for count(`SELECT count(*) FROM pg_replication_slots WHERE active`) == 0 {
		}
		err = s.withConn(t.Context(), "postgres", func(conn *pgx.Conn) error {
			_, err := conn.Exec(t.Context(), `DROP DATABASE `+gone)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	})
	if n := count(`SELECT count(*) FROM pg_database WHERE datname LIKE 'test%'`); n != 0 {
		t.Errorf("%d databases are left of %v", n, names)
	}
	if n := count(`SELECT count(*) FROM pg_replication_slots`); n != 0 {
		t.Errorf("%d slots are left", n)
	}
	if n := count(`SELECT count(*) FROM pg_prepared_xacts`); n != 0 {
		t.Errorf("%d prepared transactions are left", n)
	}
}

func TestAServerThatTheTestKilledIsNoFailure(t *testing.T) {
	var s *Server
	t.Run("use", func(t *testing.T) {
		s = Start(t, pgserver.Config{})
		s.NewDatabase(t)
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
	})
	if s.PID() != 0 {
		t.Error("it runs")
	}
}
