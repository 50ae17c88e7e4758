package capture

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

var update = flag.Bool("update", false, "record the messages of real servers anew, and write what they mean; review the difference")

// versions whose messages are in testdata.
var versions = []string{"14", "15", "16", "17", "18"}

// golden is a workload with everything that pgoutput says in protocol version 1.
var golden = []string{
	`CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN price AS numeric(8,2)`,
	`CREATE TABLE orders (id bigint PRIMARY KEY, status text, total price, mood mood, note text, tags text[], data jsonb, "Zeit ü" timestamptz)`,
	`ALTER TABLE orders ALTER note SET STORAGE EXTERNAL`,
	`CREATE TABLE items (a int, b text, c int, PRIMARY KEY (b, a))`,
	`CREATE TABLE whole (id int PRIMARY KEY, v text); ALTER TABLE whole REPLICA IDENTITY FULL`,
	`CREATE TABLE byindex (id int PRIMARY KEY, u text NOT NULL, v int); CREATE UNIQUE INDEX byindex_u ON byindex (u); ALTER TABLE byindex REPLICA IDENTITY USING INDEX byindex_u`,
	`CREATE TABLE keyless (v text)`,
	`CREATE TABLE elsewhere (id int PRIMARY KEY)`,
	`CREATE PUBLICATION backstory FOR TABLE orders, items, whole, byindex WITH (publish = 'insert, update, delete, truncate')`,
	`CREATE PUBLICATION backstory_inserts FOR TABLE keyless WITH (publish = 'insert, truncate')`,
	`SELECT pg_create_logical_replication_slot('golden', 'pgoutput')`,

	`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "ann"}'); ` +
		`INSERT INTO orders VALUES (1, 'open', 12.5, 'happy', repeat('x', 2100), '{a,"b c",NULL}', '{"k": [1, 2]}', '2026-10-31 14:00:05.123456+00'), (2, '', NULL, NULL, NULL, '{}', 'null', '-infinity'); ` +
		`SELECT pg_logical_emit_message(true, '_bemi', '{"user": "bob"}'); SELECT pg_logical_emit_message(true, 'other', 'x'); UPDATE orders SET status = 'paid' WHERE id = 1; COMMIT`,
	`UPDATE orders SET id = 3 WHERE id = 1`,
	`DELETE FROM orders WHERE id = 3`,
	`INSERT INTO items VALUES (1, 'x,y', 2); UPDATE items SET c = 3; UPDATE items SET a = 2; DELETE FROM items`,
	`INSERT INTO whole VALUES (1, 'é'), (2, NULL); UPDATE whole SET v = NULL WHERE id = 1; DELETE FROM whole WHERE id = 2`,
	`INSERT INTO byindex VALUES (1, 'u', 1); UPDATE byindex SET id = 2; UPDATE byindex SET u = 'w'; DELETE FROM byindex`,
	`BEGIN; INSERT INTO keyless VALUES ('a'); SAVEPOINT s; INSERT INTO keyless VALUES ('rolled back'); ROLLBACK TO s; INSERT INTO keyless VALUES ('b'); COMMIT`,
	`INSERT INTO elsewhere VALUES (1)`,
	`SELECT pg_logical_emit_message(false, 'backstory', 'not transactional')`,
	`BEGIN; INSERT INTO orders (id) VALUES (8); ROLLBACK`,
	`ALTER TABLE whole ADD w int DEFAULT 7; INSERT INTO whole VALUES (5, 'five')`,
	`ALTER TABLE whole RENAME v TO vv; ALTER TABLE whole DROP w; UPDATE whole SET vv = 'x'`,
	`SELECT pg_replication_origin_create('far'); SELECT pg_replication_origin_session_setup('far'); INSERT INTO items VALUES (9, 'o', 9); SELECT pg_replication_origin_session_reset()`,
	`TRUNCATE whole, orders CASCADE; TRUNCATE keyless RESTART IDENTITY`,
	`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', 'said of nothing'); COMMIT`,
}

func TestGolden(t *testing.T) {
	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			bin, txt := filepath.Join("testdata", "pgoutput_"+v+".bin"), filepath.Join("testdata", "pgoutput_"+v+".txt")
			if *update {
				write(t, bin, capturedFrom(t, v))
			}
			rec, err := os.ReadFile(bin)
			if err != nil {
				t.Fatal(err)
			}
			got := meaning(t, rec)
			if *update {
				write(t, txt, []byte(got))
			}
			want, err := os.ReadFile(txt)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s means something else now (go test -update writes it):\n%s", bin, got)
			}
		})
	}
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// meaning decodes a recording as a session would.
func meaning(t *testing.T, rec []byte) string {
	t.Helper()
	x, sent := offline()
	var b strings.Builder
	known := map[uint32]*eventlog.Relation{}
	for i, m := range messages(rec) {
		if err := x.data(m); err != nil {
			t.Fatalf("message %d, %q: %v", i, m, err)
		}
		for oid, r := range x.relations {
			if known[oid] != r {
				known[oid] = r
				b.WriteString(renderRelation(r))
			}
		}
		if !x.inTx { // a whole transaction, or nothing of ours in one
			b.WriteString(render(x.batch.Items))
			x.batch.Reset()
		}
	}
	fmt.Fprintf(&b, "skipped to %s, %d answers\n", x.skipped, *sent)
	return b.String()
}

// capturedFrom records what a server says of the workload, as it comes from the replication connection.
func capturedFrom(t *testing.T, version string) []byte {
	t.Helper()
	server := pgservertest.Start(t, pgserver.Config{Version: version, Settings: map[string]string{"fsync": "off"}})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg, err := eventlog.ConnConfig(server.URL("postgres"), "golden")
	if err != nil {
		t.Fatal(err)
	}
	cfg.RuntimeParams["search_path"] = "public"
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	for _, q := range golden {
		for _, statement := range split(q) {
			if _, err := conn.Exec(ctx, statement); err != nil {
				t.Fatalf("%s: %v", statement, err)
			}
		}
	}
	end, err := currentLSN(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	repl, err := Config{URL: server.URL("postgres")}.connectReplication(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer repl.Close(ctx)
	if err := pglogrepl.StartReplication(ctx, repl, "golden", 0, pglogrepl.StartReplicationOptions{
		PluginArgs: []string{"proto_version '1'", "publication_names 'backstory,backstory_inserts'", "messages 'true'"}}); err != nil {
		t.Fatal(err)
	}
	var rec []byte
	for {
		m, err := repl.ReceiveMessage(ctx)
		var pe *pgconn.PgError
		if err != nil || errors.As(err, &pe) {
			t.Fatal(err)
		}
		d, ok := m.(*pgproto3.CopyData)
		if !ok {
			t.Fatalf("the server sends %T", m)
		}
		if d.Data[0] == 'k' && bytes.Equal(d.Data[17:], []byte{0}) && len(rec) == 0 {
			continue // how many of them come first is chance
		}
		rec = record(rec, d.Data)
		if d.Data[0] == 'k' {
			if c := (cursor{b: d.Data[1:]}); eventlog.LSN(c.u64()) >= end {
				return rec
			}
		}
		// Its answer, which all servers give: a keepalive that does not ask for one.
		if err := pglogrepl.SendStandbyStatusUpdate(ctx, repl, pglogrepl.StandbyStatusUpdate{WALWritePosition: 1, WALFlushPosition: 1, WALApplyPosition: 1, ReplyRequested: false}); err != nil {
			t.Fatal(err)
		}
	}
}

// split takes statements apart, except within a transaction block; each is a transaction of its own then.
func split(q string) []string {
	if strings.HasPrefix(q, "BEGIN") {
		return []string{q}
	}
	return strings.Split(q, "; ")
}
