package eventlog_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// newLog makes an event log in a database of its own, tied to a source that exists only in the test.
func newLog(t *testing.T, cfg eventlog.Config) *eventlog.Log {
	t.Helper()
	srv := pgservertest.ForTest(t, pgserver.Config{})
	cfg.URL = srv.URL(srv.NewDatabase(t))
	l, err := eventlog.Connect(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	if created, err := l.Create(t.Context()); err != nil || !created {
		t.Fatalf("create: %v, %v", created, err)
	}
	if created, err := l.Create(t.Context()); err != nil || created {
		t.Fatalf("create again: %v, %v; it must be idempotent", created, err)
	}
	if err := l.Begin(t.Context(), eventlog.Head{SystemID: "7", Database: "shop", Timeline: 1, EndLSN: 100, Slot: "backstory"}, nil); err != nil {
		t.Fatal(err)
	}
	return l
}

func newWriter(t *testing.T, l *eventlog.Log) *eventlog.Writer {
	t.Helper()
	w, err := l.NewWriter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close(context.Background()) })
	return w
}

func typ(oid uint32) eventlog.Type {
	t, ok := eventlog.TypeKind(oid)
	if !ok {
		panic(oid)
	}
	return t
}

// table makes a relation (id, status text, note text, n_count int) with the given key type and identity.
func table(name string, keyOID uint32, identity byte) *eventlog.Relation {
	return &eventlog.Relation{OID: 16384, Schema: "public", Name: name, ReplicaIdentity: identity, Complete: true, Key: []int{0},
		Columns: []eventlog.Column{{Name: "id", Type: typ(keyOID), NotNull: true, Identity: true}, {Name: "status", Type: typ(25)},
			{Name: "note", Type: typ(25)}, {Name: "n_count", Type: typ(23)}}}
}

// row makes a tuple: "" is NULL, "?" is unchanged TOAST.
func row(vals ...string) []eventlog.Value {
	out := make([]eventlog.Value, len(vals))
	for i, v := range vals {
		switch v {
		case "":
			out[i].State = eventlog.StateNull
		case "?":
			out[i].State = eventlog.StateUnchanged
		default:
			out[i] = eventlog.Value{State: eventlog.StateText, Text: []byte(v)}
		}
	}
	return out
}

// source makes batches as a stream would.
type source struct {
	lsn eventlog.LSN
	xid uint32
}

func (s *source) begin(b *eventlog.Batch) {
	s.lsn += 1000
	s.xid++
	b.Add(eventlog.Item{Kind: eventlog.ItemBegin, CommitLSN: s.lsn, XID: s.xid, Timeline: 1, Time: time.Unix(1700000000+int64(s.xid), 0)})
}

func (s *source) commit(b *eventlog.Batch) {
	b.Add(eventlog.Item{Kind: eventlog.ItemCommit, EndLSN: s.lsn + 100})
}

// tx makes a batch of one transaction.
func (s *source) tx(items ...eventlog.Item) *eventlog.Batch {
	b := eventlog.NewBatch(nil)
	s.begin(b)
	for _, it := range items {
		b.Add(it)
	}
	s.commit(b)
	return b
}

func change(op eventlog.Op, r *eventlog.Relation, old, now []eventlog.Value) eventlog.Item {
	return eventlog.Item{Kind: eventlog.ItemChange, Op: op, Relation: r, Old: old, New: now, OldFull: old != nil && r.ReplicaIdentity == 'f'}
}

func message(json string) eventlog.Item {
	return eventlog.Item{Kind: eventlog.ItemMessage, Text: []byte(json)}
}

func appendAll(t *testing.T, w *eventlog.Writer, batches ...*eventlog.Batch) {
	t.Helper()
	for _, b := range batches {
		if err := w.Append(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
}

// events reads the log into lines: position type entity data before metadata.
func events(t *testing.T, l *eventlog.Log) []string {
	t.Helper()
	var out []string
	err := l.Read(t.Context(), eventlog.Selection{Quiet: true}, func(e *eventlog.Event) error {
		out = append(out, fmt.Sprintf("%d %s %s %s %s %s", e.Position, e.Type, e.Entity(), e.Data, e.Before, e.Metadata))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func wantEvents(t *testing.T, l *eventlog.Log, want ...string) {
	t.Helper()
	got := events(t, l)
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("the log holds\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
	v, err := l.Verify(t.Context(), nil)
	if err != nil || v.Broken != "" {
		t.Errorf("verify: %+v, %v", v, err)
	}
}

func TestContextAppliesFromItsMessageOnAndTheFirstOneBackwards(t *testing.T) {
	l := newLog(t, eventlog.Config{})
	w, s, r := newWriter(t, l), &source{}, table("orders", 20, 'f')
	appendAll(t, w, s.tx(
		change(eventlog.OpInsert, r, nil, row("1", "a", "", "0")),
		message(`{"actor":"ann"}`),
		change(eventlog.OpInsert, r, nil, row("2", "a", "", "0")),
		message(`{"actor":"ben"}`),
		message(`not json`),
		change(eventlog.OpDelete, r, row("1", "a", "", "0"), nil),
	), s.tx(change(eventlog.OpDelete, r, row("2", "a", "", "0"), nil)))
	wantEvents(t, l,
		`1 OrderCreated Order/1 {"id":1,"status":"a","note":null,"n_count":0}  {"actor":"ann"}`,
		`2 OrderCreated Order/2 {"id":2,"status":"a","note":null,"n_count":0}  {"actor":"ann"}`,
		`3 OrderDeleted Order/1  {"id":1,"status":"a","note":null,"n_count":0} {"malformed":"not json"}`,
		`4 OrderDeleted Order/2  {"id":2,"status":"a","note":null,"n_count":0} `)
	if c := w.Stats().Counts(); c.Unattributed != 1 || c.MalformedContext != 1 {
		t.Errorf("counted %+v", c)
	}
}

func TestUpdatesWithoutOldRowTakeItFromTheLog(t *testing.T) {
	big := strings.Repeat("big ", 2000)
	l := newLog(t, eventlog.Config{MaxCacheBytes: 1}) // nothing stays in the cache from batch to batch
	w, s, r := newWriter(t, l), &source{}, table("orders", 20, 'd')
	appendAll(t, w,
		s.tx(change(eventlog.OpInsert, r, nil, row("1", "a", big, "0"))),
		s.tx(change(eventlog.OpUpdate, r, nil, row("1", "b", "?", "0"))),
		s.tx(change(eventlog.OpUpdate, r, nil, row("1", "b", "?", "0"))), // nothing changed: no event
		s.tx(change(eventlog.OpUpdate, r, nil, row("1", "b", "?", "1"))), // quiet
		s.tx(change(eventlog.OpUpdate, r, nil, row("1", "b", big, "1"))), // sent again, but the same
		s.tx(change(eventlog.OpUpdate, r, row("1", "", "", ""), row("2", "b", "?", "1"))),
		s.tx(change(eventlog.OpUpdate, r, nil, row("9", "x", "?", "1"))), // never seen
		s.tx(change(eventlog.OpDelete, r, row("2", "", "", ""), nil)),
		s.tx(change(eventlog.OpDelete, r, row("8", "", "", ""), nil))) // never seen
	wantEvents(t, l,
		`1 OrderCreated Order/1 {"id":1,"status":"a","note":"`+big+`","n_count":0}  `,
		`2 OrderUpdated Order/1 {"status":"b"} {"status":"a"} `,
		`3 OrderTouched Order/1 {"n_count":1} {"n_count":0} `,
		`4 OrderUpdated Order/2 {"id":2} {"id":1} `,
		`5 OrderImported Order/9 {"id":9,"status":"x","n_count":1}  {"first_seen":true,"unknown":["note"]}`,
		`6 OrderDeleted Order/2  {"id":2,"status":"b","note":"`+big+`","n_count":1} `,
		`7 OrderDeleted Order/8  {"id":8} {"first_seen":true,"unknown":["status","note","n_count"]}`)
	if n := w.Stats().FirstSeen.Load(); n != 2 {
		t.Errorf("counted %d rows as first seen, want 2", n)
	}
}

func TestRowsAreFoundByTheirReplicaIdentityIndex(t *testing.T) {
	l := newLog(t, eventlog.Config{MaxCacheBytes: 1})
	w, s, r := newWriter(t, l), &source{}, table("orders", 20, 'i')
	r.Columns[0].Identity, r.Columns[1].Identity = false, true // the index is on status, the key is id
	appendAll(t, w,
		s.tx(change(eventlog.OpInsert, r, nil, row("1", "u1", "x", "0"))),
		s.tx(change(eventlog.OpUpdate, r, nil, row("2", "u1", "x", "0"))),                   // the key changed, and no old row was sent
		s.tx(change(eventlog.OpUpdate, r, row("", "u1", "", ""), row("2", "u2", "?", "0"))), // the identity changed
		s.tx(change(eventlog.OpDelete, r, row("", "u2", "", ""), nil)))                      // the key is not sent
	wantEvents(t, l,
		`1 OrderCreated Order/1 {"id":1,"status":"u1","note":"x","n_count":0}  `,
		`2 OrderUpdated Order/2 {"id":2} {"id":1} `,
		`3 OrderUpdated Order/2 {"status":"u2"} {"status":"u1"} `,
		`4 OrderDeleted Order/2  {"id":2,"status":"u2","note":"x","n_count":0} `)
}

func TestNoLookupFoldsALongHistory(t *testing.T) {
	wide := strings.Repeat("w", 600) // too wide to ride in every event, too small to be kept apart
	l := newLog(t, eventlog.Config{MaxCacheBytes: 1})
	w, s, r := newWriter(t, l), &source{}, table("orders", 20, 'd')
	appendAll(t, w, s.tx(change(eventlog.OpInsert, r, nil, row("1", "s0", wide, "0"))))
	for i := 1; i <= 100; i++ {
		appendAll(t, w, s.tx(change(eventlog.OpUpdate, r, nil, row("1", fmt.Sprint("s", i), wide, "0"))))
	}
	var whole []eventlog.Position
	err := l.Read(t.Context(), eventlog.Selection{}, func(e *eventlog.Event) error {
		if e.Op == eventlog.OpInsert || e.Rest != nil {
			whole = append(whole, e.Position)
		}
		if e.Op == eventlog.OpUpdate && string(e.Before) != fmt.Sprintf(`{"status":"s%d"}`, e.Position-2) {
			t.Errorf("event %d: before is %s", e.Position, e.Before)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i < len(whole); i++ {
		if whole[i]-whole[i-1] > 16 {
			t.Errorf("no event between %d and %d holds the whole row", whole[i-1], whole[i])
		}
	}
	if len(whole) < 6 || len(whole) > 12 {
		t.Errorf("%d of 101 events hold the whole row", len(whole))
	}
}

func TestHugeTransactionIsSeenWholeOrNotAtAll(t *testing.T) {
	l := newLog(t, eventlog.Config{PartitionEvents: 1000})
	w, s, r := newWriter(t, l), &source{}, table("orders", 20, 'f')
	appendAll(t, w, s.tx(change(eventlog.OpInsert, r, nil, row("1", "first", "", "0"))))
	seal := w.Head().Seal
	part := func(from, to int) *eventlog.Batch {
		b := eventlog.NewBatch(nil)
		for i := from; i < to; i++ {
			b.Add(change(eventlog.OpInsert, r, nil, row(fmt.Sprint(i), strings.Repeat("x", 3000), "", "0")))
		}
		return b
	}
	b := eventlog.NewBatch(nil)
	s.begin(b)
	appendAll(t, w, b, part(10, 2000), part(2000, 4000))
	h, err := l.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if h.Position != 1 || h.Written < 2000 || string(h.Seal) != string(seal) || len(events(t, l)) != 1 {
		t.Fatalf("in the middle of the transaction the head is %d, written %d, and %d events are seen", h.Position, h.Written, len(events(t, l)))
	}
	// The stream is cut, and the transaction comes again from its beginning.
	cut := eventlog.NewBatch(nil)
	cut.Add(eventlog.Item{Kind: eventlog.ItemReset})
	appendAll(t, w, cut)
	if h, _ := l.Head(t.Context()); h.Written != 1 {
		t.Fatalf("after a cut, rows are written up to %d", h.Written)
	}
	s.lsn -= 1000
	b = eventlog.NewBatch(nil)
	s.begin(b)
	appendAll(t, w, b, part(10, 3000))
	// The process dies, and its successor removes what is unfinished.
	w2 := newWriter(t, l)
	if h := w2.Head(); h.Position != 1 || h.Written != 1 {
		t.Fatalf("after a crash the head is %d, written %d", h.Position, h.Written)
	}
	s.lsn -= 1000
	b = eventlog.NewBatch(nil)
	s.begin(b)
	end := eventlog.NewBatch(nil)
	s.commit(end)
	appendAll(t, w2, b, part(10, 2000), part(2000, 4000), end)
	if got := len(events(t, l)); got != 3991 {
		t.Errorf("%d events, want 3991", got)
	}
	if v, err := l.Verify(t.Context(), nil); err != nil || v.Broken != "" || v.Events != 3991 {
		t.Errorf("verify: %+v, %v", v, err)
	}
	// Its session was ended by the successor; what the epoch does where that cannot be is TestFencedWriter's (internal/e2e).
	if err := w.Append(t.Context(), s.tx(change(eventlog.OpInsert, r, nil, row("5", "late", "", "0")))); err == nil {
		t.Error("the writer of before appended after a take-over")
	}
	if got := len(events(t, l)); got != 3991 {
		t.Errorf("after the old writer's attempt there are %d events, want 3991", got)
	}
}

func TestRedeliveryChangesNothing(t *testing.T) {
	l := newLog(t, eventlog.Config{})
	s, r := &source{}, table("orders", 20, 'f')
	batches := func() []*eventlog.Batch {
		*s = source{lsn: 1000}
		var out []*eventlog.Batch
		for i := 1; i <= 5; i++ {
			out = append(out, s.tx(change(eventlog.OpInsert, r, nil, row(fmt.Sprint(i), "a", "", "0")), change(eventlog.OpInsert, r, nil, row(fmt.Sprint(i+100), "a", "", "0"))))
		}
		return out
	}
	appendAll(t, newWriter(t, l), batches()[:3]...)
	before := events(t, l)
	appendAll(t, newWriter(t, l), batches()...)
	after := events(t, l)
	if len(after) != 10 || strings.Join(after[:6], "\n") != strings.Join(before, "\n") {
		t.Errorf("after redelivery:\n%s", strings.Join(after, "\n"))
	}
}

func TestPartitionsFollowOneAnotherAndGetTheirIndexes(t *testing.T) {
	l := newLog(t, eventlog.Config{PartitionEvents: 10})
	w, s, r := newWriter(t, l), &source{}, table("orders", 20, 'f')
	ins := func(n int, backlog eventlog.LSN) {
		var items []eventlog.Item
		for range n {
			items = append(items, change(eventlog.OpInsert, r, nil, row(fmt.Sprint(len(items)+int(s.lsn)), "a", "", "0")))
		}
		b := s.tx(items...)
		b.Backlog = backlog
		appendAll(t, w, b)
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	indexed := func() string {
		var out string
		err := l.Pool().QueryRow(t.Context(), `SELECT string_agg(CASE WHEN EXISTS (SELECT FROM pg_index x WHERE x.indrelid = i.inhrelid AND x.indisunique) THEN 'i' ELSE '-' END, '' ORDER BY length(i.inhrelid::regclass::text), i.inhrelid::regclass::text)
			FROM pg_inherits i WHERE i.inhparent = 'backstory.event'::regclass`).Scan(&out)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	ins(3, 1<<30) // far behind: no b-trees yet
	if got := indexed(); got != "-" {
		t.Errorf("partitions %s, want the first without b-trees", got)
	}
	ins(12, 1<<30) // the second begins: the first is full and gets them meanwhile
	for end := time.Now().Add(20 * time.Second); indexed() != "i-" && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if got := indexed(); got != "i-" {
		t.Errorf("partitions %s", got)
	}
	ins(1, 0) // caught up
	if got := indexed(); got != "ii" {
		t.Errorf("partitions %s", got)
	}
	ins(25, 0)
	if got := indexed(); got != "iiiii" {
		t.Errorf("partitions %s", got)
	}
	if n := len(events(t, l)); n != 41 {
		t.Errorf("%d events", n)
	}
}

func TestViewOfAnAggregateIsJoinedByIndexAndRefusesWrites(t *testing.T) {
	l := newLog(t, eventlog.Config{})
	w, s := newWriter(t, l), &source{}
	orders, things, codes := table("orders", 20, 'f'), table("things", 2950, 'f'), table("codes", 25, 'f')
	things.OID, codes.OID = 16385, 16386
	var items []eventlog.Item
	for i := range 2000 {
		items = append(items, change(eventlog.OpInsert, orders, nil, row(fmt.Sprint(i), "a", "", "0")),
			change(eventlog.OpInsert, things, nil, row(fmt.Sprintf("00000000-0000-0000-0000-%012d", i), "a", "", "0")),
			change(eventlog.OpInsert, codes, nil, row(fmt.Sprint("c", i), "a", "", "0")))
	}
	appendAll(t, w, s.tx(items...))
	ctx := t.Context()
	pool := l.Pool()
	if _, err := pool.Exec(ctx, `CREATE TABLE public.orders (id int PRIMARY KEY); INSERT INTO public.orders VALUES (7), (8);
		CREATE TABLE public.things (id uuid PRIMARY KEY); INSERT INTO public.things VALUES ('00000000-0000-0000-0000-000000000007');
		CREATE TABLE public.codes (id text PRIMARY KEY); INSERT INTO public.codes VALUES ('c7');
		ANALYZE; ANALYZE backstory.event`); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ view, table, id, index string }{{"order_events", "orders", "7", "(stream, id"}, {"thing_events", "things", "'00000000-0000-0000-0000-000000000007'", "id_text)::uuid"}, {"code_events", "codes", "'c7'", "id_text"}} {
		q := fmt.Sprintf(`SELECT v.type FROM public.%s t JOIN backstory.%s v ON v.aggregate_id = t.id WHERE t.id = %s`, c.table, c.view, c.id)
		var typ string
		if err := pool.QueryRow(ctx, q).Scan(&typ); err != nil || !strings.HasSuffix(typ, "Created") {
			t.Errorf("%s: %q, %v", c.view, typ, err)
		}
		rows, err := pool.Query(ctx, "EXPLAIN (COSTS OFF) "+q)
		if err != nil {
			t.Fatal(err)
		}
		plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		if p := strings.Join(plan, "\n"); strings.Contains(p, "Seq Scan on event") || !strings.Contains(p, "event_p1") || !strings.Contains(p, "Index") {
			t.Errorf("%s is not joined by an index:\n%s", c.view, p)
		}
		for _, q := range []string{"INSERT INTO backstory.%s (type) VALUES ('x')", "UPDATE backstory.%s SET type = 'x'", "DELETE FROM backstory.%s"} {
			if _, err := pool.Exec(ctx, fmt.Sprintf(q, c.view)); eventlog.SQLState(err) != "42501" {
				t.Errorf("%s: %v, want it refused", fmt.Sprintf(q, c.view), err)
			}
		}
	}
	var last int64
	if err := pool.QueryRow(ctx, `SELECT id FROM backstory.order_events ORDER BY id DESC LIMIT 1`).Scan(&last); err != nil || last != 5998 {
		t.Errorf("the last event of orders is %d, %v", last, err)
	}
}

func TestHistoryIsRefusedToBeChanged(t *testing.T) {
	l := newLog(t, eventlog.Config{})
	w, s, r := newWriter(t, l), &source{}, table("orders", 20, 'f')
	appendAll(t, w, s.tx(message(`{"actor":"ann"}`), change(eventlog.OpInsert, r, nil, row("1", "a", "", "0"))))
	for _, q := range []string{
		"UPDATE backstory.event SET data = NULL", "DELETE FROM backstory.event", "TRUNCATE backstory.event", "UPDATE backstory.event_p1 SET data = NULL",
		"DELETE FROM backstory.event_p1", "TRUNCATE backstory.event_p1", "UPDATE backstory.context SET metadata = '{}'", "DELETE FROM backstory.context",
		"TRUNCATE backstory.context", "UPDATE backstory.kind SET type = 'x'", "DELETE FROM backstory.relation", "UPDATE backstory.aggregate SET name = 'x'",
		"UPDATE backstory.source SET tag = 0", "DELETE FROM backstory.events",
	} {
		if _, err := l.Pool().Exec(t.Context(), q); eventlog.SQLState(err) != "42501" {
			t.Errorf("%s: %v, want it refused", q, err)
		}
	}
}

func TestIDsAreComputedAlikeInSQLAndGo(t *testing.T) {
	l := newLog(t, eventlog.Config{})
	w, s, r := newWriter(t, l), &source{lsn: 0x16_B374D848}, table("orders", 20, 'f')
	for range 3 {
		appendAll(t, w, s.tx(change(eventlog.OpInsert, r, nil, row("1", "a", "", "0")), change(eventlog.OpDelete, r, row("1", "a", "", "0"), nil)))
	}
	err := l.Read(t.Context(), eventlog.Selection{}, func(e *eventlog.Event) error {
		var id string
		if err := l.Pool().QueryRow(t.Context(), `SELECT id::text FROM backstory.events WHERE position = $1`, e.Position).Scan(&id); err != nil {
			return err
		}
		if id != e.ID.String() {
			t.Errorf("event %d: SQL says %s, Go %s", e.Position, id, e.ID)
		}
		parsed, err := eventlog.ParseID(id)
		if err != nil {
			return err
		}
		found, err := l.Find(t.Context(), parsed)
		if err != nil || found.Position != e.Position {
			t.Errorf("find %s: %v, %v", id, found, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestLookupsSeeWhatIsOnItsWay: while much is to come, a step is on its way to the log when the next rows are looked up, and a
// cache that forgets everything at once forgets its rows, too.
func TestLookupsSeeWhatIsOnItsWay(t *testing.T) {
	l := newLog(t, eventlog.Config{MaxCacheBytes: 1})
	w, s, r := newWriter(t, l), &source{}, table("orders", 20, 'd')
	for id := 1; id <= 40; id++ {
		appendAll(t, w, s.tx(change(eventlog.OpInsert, r, nil, row(fmt.Sprint(id), "0", "", "0"))))
	}
	send := func(id int, status string) {
		b := s.tx(change(eventlog.OpUpdate, r, nil, row(fmt.Sprint(id), status, "", "0")))
		b.Backlog = 1 << 30
		appendAll(t, w, b)
	}
	const rounds = 150
	for i := 1; i <= rounds; i++ {
		send(1, fmt.Sprint(i))
		for n := range 1 + i%3 { // look-ups of rows that do not change
			send(2+(i*3+n)%39, "0")
		}
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := events(t, l)
	if len(got) != 40+rounds {
		t.Fatalf("%d events, want %d", len(got), 40+rounds)
	}
	for i, line := range got[40:] {
		if want := fmt.Sprintf(`{"status":"%d"} {"status":"%d"} `, i+1, i); !strings.HasSuffix(strings.TrimSuffix(line, "\n"), want) {
			t.Fatalf("%s; want %s", line, want)
		}
	}
}
