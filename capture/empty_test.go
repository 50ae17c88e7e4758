package capture

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// A table that was truncated, or rewritten, after a snapshot looks empty in it. It was not, and the log would call the table complete.
func TestEmptyInASnapshot(t *testing.T) {
	ctx, server := context.Background(), pgservertest.ForTest(t, pgserver.Config{})
	c := Config{URL: server.URL(server.NewDatabase(t))}
	var conns [2]*pgx.Conn
	for i := range conns {
		conn, err := c.Connect(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(ctx)
		conns[i] = conn
	}
	do := func(sql string) {
		t.Helper()
		if _, err := conns[1].Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	do(`CREATE TABLE public.truncated (id int); CREATE TABLE public.rewritten (id int); CREATE TABLE public.empty (id int); CREATE TABLE public.emptied (id int);
		INSERT INTO public.truncated VALUES (1); INSERT INTO public.rewritten VALUES (1); INSERT INTO public.emptied VALUES (1)`)
	tx, err := conns[0].BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(ctx)
	if err := tx.QueryRow(ctx, `SELECT 1`).Scan(new(int)); err != nil { // from here on it has its snapshot
		t.Fatal(err)
	}
	do(`TRUNCATE public.truncated; ALTER TABLE public.rewritten ALTER id TYPE bigint; DELETE FROM public.emptied; INSERT INTO public.empty VALUES (1)`)
	for name, want := range map[string]bool{"truncated": false, "rewritten": false, "emptied": false, "empty": true} {
		table := &Table{Relation: &eventlog.Relation{Schema: "public", Name: name}}
		if err := conns[1].QueryRow(ctx, `SELECT ('public.' || $1)::regclass::oid::bigint`, name).Scan(&table.OID); err != nil {
			t.Fatal(err)
		}
		got, err := isEmpty(ctx, tx, table)
		if err != nil || got != want {
			t.Errorf("%s: %v (%v), want %v", name, got, err, want)
		}
	}
}
