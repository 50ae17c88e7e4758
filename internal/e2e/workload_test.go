package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/eventlog"
)

// A column of a table that workers write to.
type column struct {
	name, typ string
	gen       gen
}

// subject is a table that workers write to.
type subject struct {
	schema, name string
	columns      []column
	key          []string // their names
	after        []string // SQL after CREATE TABLE; %s stands for the table
	parts        []string // names of partitions, which are what is captured
	identities   []string // REPLICA IDENTITY …, changed while workers run
	inserts      bool     // updates and deletes are not in the stream
	deferrable   bool
}

func (s *subject) String() string { return eventlog.QuoteQualified(s.schema, s.name) }

func (s *subject) isKey(c string) bool { return slices.Contains(s.key, c) }

// Names of 63 bytes, as long as they can be: of tables, with a letter by which they differ, and of a column.
const (
	longest       = "Straße; \"x\" 日本 -- a table whose name is as long as it can"
	longestColumn = "Spalte; 'x' 日本 -- as long as a column's name can be, or: Ω"
)

var _, _ [63]bool = [len(longest) + 1]bool{}, [len(longestColumn)]bool{}

// subjects are tables of every kind.
func subjects() []*subject {
	orders := func(name string, more []column, after ...string) *subject {
		s := &subject{schema: "public", name: name, key: []string{"id"}, after: after, columns: append([]column{
			{"id", "bigint", intBelow(40)},
			{"status", "text", oneOf("new", "paid", "sent")},
			{"inline", "text", wide},
			{"big", "text", wide},
			{"amount", "numeric", oneOf("0", "1.10", "1.1", "-3", "NaN")},
			{"doc", "jsonb", documents},
			{"updated_at", "timestamptz", stamps("+00")},
			{"items_count", "int", intBelow(3)},
		}, more...)}
		return s
	}
	external := `ALTER TABLE %s ALTER big SET STORAGE EXTERNAL`
	var scalars, arrays []column
	for i, t := range typed {
		scalars = append(scalars, column{fmt.Sprintf("c%d", i), t.name, t.gen})
		if !t.no {
			arrays = append(arrays, column{fmt.Sprintf("c%d", i), t.name + "[]", arrayOf(t.name, t.gen)})
		}
	}
	number := column{"id", "int", intBelow(12)}
	list := []*subject{
		{schema: "public", name: "scalars", key: []string{"id"}, columns: append([]column{number}, scalars...)},
		{schema: "public", name: "arrays", key: []string{"id"}, columns: append([]column{number}, arrays...), after: []string{`ALTER TABLE %s REPLICA IDENTITY FULL`}},
		orders("orders", nil, external),
		orders("orders_full", nil, external, `ALTER TABLE %s REPLICA IDENTITY FULL`),
		orders("orders_by_index", []column{{"u", "int NOT NULL", intBelow(60)}}, external,
			`CREATE UNIQUE INDEX by_u ON %s (u)`, `ALTER TABLE %s REPLICA IDENTITY USING INDEX by_u`),
		orders("orders_by_text_index", []column{{"u", "text NOT NULL", either(oddText, words(1, 2))}, {"w", "date NOT NULL", oneOf("2026-11-23", "0044-03-15 BC", "infinity")}}, external,
			`ALTER TABLE %s DROP CONSTRAINT orders_by_text_index_pkey`, `ALTER TABLE %s ADD PRIMARY KEY (id) DEFERRABLE`,
			`CREATE UNIQUE INDEX by_uw ON %s (w, u)`, `ALTER TABLE %s REPLICA IDENTITY USING INDEX by_uw`),
		// No primary key: the index that is the replica identity tells the rows apart.
		{schema: "public", name: "index_alone", key: []string{"code"}, columns: []column{{"n", "int", intBelow(9)}, {"code", "text NOT NULL", either(oddText, words(1, 2))}, {"big", "text", wide}},
			after: []string{`ALTER TABLE %s DROP CONSTRAINT index_alone_pkey`, `ALTER TABLE %s ALTER big SET STORAGE EXTERNAL`, `CREATE UNIQUE INDEX alone_code ON %s (code)`, `ALTER TABLE %s REPLICA IDENTITY USING INDEX alone_code`}},
		{schema: "public", name: "indexes_alone", key: []string{"b", "a"}, columns: []column{{"a", "int NOT NULL", intBelow(5)}, {"v", "text", wide}, {"b", "text NOT NULL", oddText}},
			after: []string{`ALTER TABLE %s DROP CONSTRAINT indexes_alone_pkey`, `CREATE UNIQUE INDEX alone_ba ON %s (b, a)`, `ALTER TABLE %s REPLICA IDENTITY USING INDEX alone_ba`}},
		orders("orders_changing", []column{{"u", "int NOT NULL", intBelow(60)}}, external, `CREATE UNIQUE INDEX changing_u ON %s (u)`),
		{schema: "public", name: "composites", key: []string{"b", "a"}, columns: []column{{"a", "int", intBelow(5)}, {"x", "text", wide}, {"b", "text", oddText}, {"v", "text", wide}}},
		{schema: "public", name: "texts", key: []string{"k"}, columns: []column{{"v", "text", wide}, {"k", "text", either(oddText, words(2400, 2600))}, {"w", "text", wide}}},
		{schema: "public", name: "text", key: []string{"k"}, columns: []column{{"k", "int", intBelow(9)}, {"v", "text", wide}}}, // the same aggregate by its name
		{schema: "public", name: "uuids", key: []string{"k"}, columns: []column{{"k", "uuid", func(r *rand.Rand) string { return fmt.Sprintf("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a%02x", r.IntN(30)) }}, {"v", "text", wide}}},
		{schema: "public", name: "uuid", key: []string{"k"}, columns: []column{{"k", "text", oddText}, {"v", "text", wide}}},
		{schema: "public", name: "numerics", key: []string{"k"}, columns: []column{{"k", "numeric", oneOf("0", "1", "1.0", "1.00", "2", "2.0", "NaN", "1e20", "-3")}, {"v", "text", oddText}}},
		{schema: "public", name: "moments", key: []string{"k"}, columns: []column{{"k", "timestamptz", stamps("+00")}, {"v", "text", oddText}}},
		{schema: "public", name: "enums", key: []string{"k", "j"}, columns: []column{{"j", "public.pair", oneOf(`(1,x,"{a}")`, `(2,"y,",)`)}, {"k", "public.mood", oneOf("sad", "NULL", "a b", `c"d\`, ",")}, {"v", "text", oddText}}},
		{schema: "Größe 1", name: longest + "c", key: []string{`Ω,"y"`}, columns: []column{{`Ω,"y"`, "int", intBelow(30)}, {"select", "text", oddText}, {`a b\`, "text", wide}, {`"`, "int", intBelow(5)}, {longestColumn, "text", wide}}},
		{schema: "Größe 1", name: longest + "d", key: []string{"k"}, columns: []column{{"k", "text", oddText}, {"v", "text", oddText}}},
		{schema: "public", name: "including", key: []string{"id"}, columns: []column{number, {"v", "text", oddText}, {"w", "text", wide}},
			after: []string{`ALTER TABLE %s DROP CONSTRAINT including_pkey`, `ALTER TABLE %s ADD PRIMARY KEY (id) INCLUDE (v)`}},
		{schema: "public", name: "ordinary", key: []string{"id"}, columns: []column{number}},
		{schema: "public", name: "keyless_full", columns: []column{{"v", "text", oneOf("a", "b", "")}, {"n", "int", intBelow(3)}, {"big", "text", wide}}, after: []string{`ALTER TABLE %s REPLICA IDENTITY FULL`}},
		{schema: "public", name: "keyless", inserts: true, columns: []column{{"v", "text", wide}, {"n", "int", intBelow(3)}}},
		{schema: "public", name: "nothing", inserts: true, columns: nil},
		{schema: "public", name: "swaps", key: []string{"id"}, deferrable: true, columns: []column{{"id", "int", intBelow(12)}, {"v", "text", wide}, {"n", "int", intBelow(3)}}, after: []string{`ALTER TABLE %s REPLICA IDENTITY FULL`}},
		{schema: "public", name: "generated", key: []string{"id"}, columns: []column{number, {"a", "int", intBelow(100)}, {"z", "text", wide}},
			after: []string{`ALTER TABLE %s DROP z, ADD b numeric(10,2) GENERATED ALWAYS AS (a * 2.5) STORED, ADD z text`, `ALTER TABLE %s ADD "C" text GENERATED ALWAYS AS (public.shorter(z)) STORED`}},
		{schema: "public", name: "gaps", key: []string{"id"}, columns: []column{number, {"a", "text", wide}},
			after: []string{`ALTER TABLE %s ADD b int, ADD c int, ADD d text`, `ALTER TABLE %s DROP b, DROP d`}},
		{schema: "public", name: "parted", key: []string{"id", "region"}, parts: []string{"parted_a", "parted_b"},
			columns: []column{{"region", "text", oneOf("a", "b")}, {"id", "int", intBelow(20)}, {"v", "text", wide}}},
	}
	for _, s := range list {
		if s.name == "orders_changing" {
			s.identities = []string{"DEFAULT", "FULL"}
		}
	}
	return list
}

// create makes the tables, and triggers that write down each row change.
func create(db *session, list []*subject) {
	db.t.Helper()
	db.do("%s", `
		CREATE SCHEMA "Größe 1"; CREATE SCHEMA audit;
		CREATE TYPE public.mood AS ENUM ('sad', 'NULL', 'a b', 'c"d\', ',');
		CREATE TYPE public.pair AS (a int, "B c" text, d text[]);
		CREATE TYPE public.words AS RANGE (subtype = text, collation = "C");
		CREATE DOMAIN public.small AS int CHECK (value < 100);
		CREATE DOMAIN public.tags AS text[];
		CREATE DOMAIN public.doc AS json;
		CREATE DOMAIN public.moment AS timestamptz(3);
		CREATE FUNCTION public.shorter(text) RETURNS text IMMUTABLE LANGUAGE sql AS $$SELECT left($1, 20) || '…'$$;
		CREATE TABLE public.marker (id int PRIMARY KEY);
		CREATE TABLE public.noops (id int PRIMARY KEY, v text, big text);
		CREATE TABLE audit.change (n bigserial, xid bigint, relation text, op text, same boolean, context text);
		CREATE FUNCTION audit.row() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO audit.change (xid, relation, op, same, context) VALUES (pg_current_xact_id()::text::bigint % 4294967296, TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME,
				lower(TG_OP), TG_OP = 'UPDATE' AND OLD::text IS NOT DISTINCT FROM NEW::text, current_setting('audit.context', true));
			RETURN NULL;
		END $$`)
	for _, s := range list {
		var cols []string
		for _, c := range s.columns {
			cols = append(cols, eventlog.QuoteIdent(c.name)+" "+c.typ)
		}
		if len(s.key) > 0 {
			var key []string
			for _, k := range s.key {
				key = append(key, eventlog.QuoteIdent(k))
			}
			pk := "PRIMARY KEY (" + strings.Join(key, ", ") + ")"
			if s.deferrable {
				pk += " DEFERRABLE INITIALLY DEFERRED"
			}
			cols = append(cols, pk)
		}
		q := "CREATE TABLE " + s.String() + " (" + strings.Join(cols, ", ") + ")"
		leaves := []string{s.String()}
		if len(s.parts) > 0 {
			q, leaves = q+" PARTITION BY LIST (region)", nil
		}
		db.do("%s", q)
		for i, p := range s.parts {
			leaf := eventlog.QuoteQualified(s.schema, p)
			db.do("CREATE TABLE %s PARTITION OF %s FOR VALUES IN ('%c')", leaf, s, 'a'+i)
			leaves = append(leaves, leaf)
		}
		for _, a := range s.after {
			db.do("%s", strings.ReplaceAll(a, "%s", s.String()))
		}
		for _, leaf := range leaves {
			db.do("CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON %s FOR EACH ROW EXECUTE FUNCTION audit.row()", leaf)
			db.do("CREATE TRIGGER audit_truncate AFTER TRUNCATE ON %s FOR EACH STATEMENT EXECUTE FUNCTION audit.row()", leaf)
		}
	}
	db.do("CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON public.noops FOR EACH ROW EXECUTE FUNCTION audit.row()")
	db.do("CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON public.marker FOR EACH ROW EXECUTE FUNCTION audit.row()")
}

// gate is the advisory lock that every worker's transaction shares and that a recording session has for itself: while it
// holds it, no transaction of a worker is open, prepared ones included, so what it reads is what all transactions with a
// smaller commit LSN than its own have made, and its own row says where that is.
const gate = 7001

// worker writes.
type worker struct {
	t    testing.TB
	id   int
	r    *rand.Rand
	conn *pgx.Conn
	list []*subject
	xact int
	// counts of what happened
	committed, refused int
}

// expected are errors that a concurrent workload brings about by itself.
var expected = []string{
	"23505", // unique_violation
	"40P01", // deadlock_detected
	"40001", // serialization_failure
	"55P03", // lock_not_available
	"21000", // cardinality_violation: ON CONFLICT DO UPDATE meets a row twice
	"54000", // program_limit_exceeded: a key too long for its index
	"23502", // not_null_violation
	"55006", // object_in_use: a TRUNCATE or ALTER TABLE meets triggers that still have to run
}

func isExpected(err error) bool {
	var pe *pgconn.PgError
	return errors.As(err, &pe) && slices.Contains(expected, pe.Code)
}

// work runs random transactions on some sessions until ctx ends.
func work(ctx context.Context, t testing.TB, url string, seed uint64, sessions int, list []*subject) []*worker {
	t.Helper()
	return workAt(ctx, t, url, seed, sessions, list, 0)
}

// workAt does so with a pause after each transaction.
func workAt(ctx context.Context, t testing.TB, url string, seed uint64, sessions int, list []*subject, pause time.Duration) []*worker {
	t.Helper()
	var wg sync.WaitGroup
	var all []*worker
	for i := range sessions {
		conn, err := dial(context.Background(), url)
		if err != nil {
			t.Fatal(err)
		}
		w := &worker{t: t, id: i, r: rand.New(rand.NewPCG(seed, uint64(i))), conn: conn, list: list}
		all = append(all, w)
		wg.Go(func() {
			defer conn.Close(context.Background())
			if _, err := conn.Exec(context.Background(), `SET lock_timeout = '2s'`); err != nil {
				t.Error(err)
				return
			}
			for ctx.Err() == nil {
				if err := w.transaction(); err != nil {
					t.Errorf("worker %d: %v", w.id, err)
					return
				}
				time.Sleep(pause)
			}
		})
	}
	wg.Wait()
	return all
}

func (w *worker) exec(q string) error {
	_, err := w.conn.Exec(context.Background(), q)
	if err != nil && !isExpected(err) {
		return fmt.Errorf("%s: %w", short(q), err)
	}
	return err
}

// chance is true in one of n cases.
func (w *worker) chance(n int) bool { return w.r.IntN(n) == 0 }

// transaction runs one. Only what a workload does not expect is an error.
func (w *worker) transaction() error {
	w.xact++
	if err := w.exec(fmt.Sprintf("BEGIN; SELECT pg_advisory_xact_lock_shared(%d); SELECT set_config('audit.context', '', true)", gate)); err != nil {
		if !isExpected(err) {
			return err
		}
		w.refused++
		return w.exec("ROLLBACK")
	}
	n := 1 + w.r.IntN(6)
	if w.chance(25) {
		n = 60
	}
	subject := w.list[w.r.IntN(len(w.list))]
	for range n {
		if w.chance(2) {
			subject = w.list[w.r.IntN(len(w.list))]
		}
		var err error
		if w.chance(4) {
			err = w.savepoint(subject)
		} else {
			err = w.step(subject)
		}
		if err != nil {
			if !isExpected(err) {
				return err
			}
			w.refused++
			return w.exec("ROLLBACK")
		}
	}
	end := "COMMIT"
	switch w.r.IntN(20) {
	case 0:
		end = "ROLLBACK"
	case 1, 2:
		gid := fmt.Sprintf("w%d-%d", w.id, w.xact)
		if err := w.exec("PREPARE TRANSACTION '" + gid + "'"); err != nil {
			if isExpected(err) {
				w.refused++
				return w.exec("ROLLBACK")
			}
			return err
		}
		end = "COMMIT PREPARED '" + gid + "'"
		if w.chance(4) {
			end = "ROLLBACK PREPARED '" + gid + "'"
		}
	}
	if err := w.exec(end); err != nil {
		if !isExpected(err) {
			return err
		}
		w.refused++
		return nil
	}
	w.committed++
	return nil
}

// savepoint runs some steps that may be taken back.
func (w *worker) savepoint(s *subject) error {
	if err := w.exec("SAVEPOINT s"); err != nil {
		return err
	}
	var failed error
	for range 1 + w.r.IntN(3) {
		if failed = w.step(s); failed != nil {
			break
		}
	}
	if failed != nil && !isExpected(failed) {
		return failed
	}
	if failed != nil || w.chance(3) {
		return w.exec("ROLLBACK TO s")
	}
	return w.exec("RELEASE s")
}

// value makes a value as SQL.
func (w *worker) value(s *subject, c column) string {
	if !s.isKey(c.name) && !strings.Contains(c.typ, "NOT NULL") && w.chance(8) {
		return "NULL"
	}
	return quoteLit(c.gen(w.r)) + "::" + strings.TrimSuffix(c.typ, " NOT NULL")
}

func (w *worker) row(s *subject) string {
	var vals []string
	for _, c := range s.columns {
		vals = append(vals, w.value(s, c))
	}
	return "(" + strings.Join(vals, ", ") + ")"
}

func columnList(s *subject) string {
	var cols []string
	for _, c := range s.columns {
		cols = append(cols, eventlog.QuoteIdent(c.name))
	}
	return strings.Join(cols, ", ")
}

// some is a condition that selects a few rows.
func (w *worker) some(s *subject, n int) string {
	return fmt.Sprintf("(tableoid, ctid) IN (SELECT tableoid, ctid FROM %s ORDER BY md5(ctid::text || '%d') LIMIT %d)", s, w.r.Uint32(), n)
}

// assignments sets a few columns, keys too if asked.
func (w *worker) assignments(s *subject, keys bool) string {
	var free []column
	for _, c := range s.columns {
		if s.isKey(c.name) == keys || keys && strings.Contains(c.typ, "NOT NULL") {
			free = append(free, c)
		}
	}
	if len(free) == 0 {
		return ""
	}
	w.r.Shuffle(len(free), func(i, j int) { free[i], free[j] = free[j], free[i] })
	var set []string
	for _, c := range free[:1+w.r.IntN(min(3, len(free)))] {
		set = append(set, eventlog.QuoteIdent(c.name)+" = "+w.value(s, c))
	}
	return strings.Join(set, ", ")
}

// step runs one statement or two.
func (w *worker) step(s *subject) error {
	if w.chance(6) {
		if err := w.context(); err != nil {
			return err
		}
	}
	if s.inserts {
		switch {
		case w.chance(60):
			return w.exec("TRUNCATE " + s.String())
		case len(s.columns) == 0:
			return w.exec("INSERT INTO " + s.String() + " DEFAULT VALUES")
		case w.chance(3):
			return w.copyIn(s, 1+w.r.IntN(8))
		}
		return w.insert(s, "")
	}
	switch k := w.r.IntN(100); {
	case k < 22:
		return w.insert(s, w.conflict(s))
	case k < 28:
		return w.copyIn(s, 1+w.r.IntN(5))
	case k < 54:
		if set := w.assignments(s, false); set != "" {
			return w.exec("UPDATE " + s.String() + " SET " + set + " WHERE " + w.some(s, 1+w.r.IntN(3)))
		}
		return nil
	case k < 60: // one column of many rows
		if set := w.assignments(s, false); set != "" {
			return w.exec("UPDATE " + s.String() + " SET " + set)
		}
		return nil
	case k < 66: // nothing
		c := s.columns[w.r.IntN(len(s.columns))]
		n := eventlog.QuoteIdent(c.name)
		if err := w.exec("UPDATE " + s.String() + " SET " + n + " = " + n + " WHERE " + w.some(s, 4)); err != nil {
			return err
		}
		return w.exec("UPDATE public.noops SET v = v, big = big WHERE id % 3 = " + fmt.Sprint(w.r.IntN(3)))
	case k < 76: // the key, or what identifies the row
		set := w.assignments(s, true)
		if set == "" {
			return nil
		}
		if s.deferrable || s.name == "orders_by_text_index" {
			return w.swap(s)
		}
		return w.exec("UPDATE " + s.String() + " SET " + set + " WHERE " + w.some(s, 1))
	case k < 90:
		return w.exec("DELETE FROM " + s.String() + " WHERE " + w.some(s, 1+w.r.IntN(2)))
	case k < 95: // the same row again
		return w.again(s)
	case k < 97:
		if w.chance(6) {
			other := w.list[w.r.IntN(len(w.list))]
			return w.exec("TRUNCATE " + s.String() + ", " + other.String())
		}
		return nil
	default:
		if n := len(s.identities); n > 0 {
			return w.exec("ALTER TABLE " + s.String() + " REPLICA IDENTITY " + s.identities[w.r.IntN(n)])
		}
		return nil
	}
}

func (w *worker) insert(s *subject, tail string) error {
	var rows []string
	for range 1 + w.r.IntN(4) {
		rows = append(rows, w.row(s))
	}
	return w.exec("INSERT INTO " + s.String() + " (" + columnList(s) + ") VALUES " + strings.Join(rows, ", ") + tail)
}

func (w *worker) conflict(s *subject) string {
	if len(s.key) == 0 {
		return ""
	}
	if s.deferrable || s.name == "orders_by_text_index" || w.chance(2) {
		if s.deferrable || s.name == "orders_by_text_index" {
			return "" // a deferrable key can be no arbiter
		}
		return " ON CONFLICT DO NOTHING"
	}
	var key []string
	for _, k := range s.key {
		key = append(key, eventlog.QuoteIdent(k))
	}
	set := w.assignments(s, false)
	if set == "" {
		return " ON CONFLICT DO NOTHING"
	}
	return " ON CONFLICT (" + strings.Join(key, ", ") + ") DO UPDATE SET " + set
}

// copyIn copies rows in.
func (w *worker) copyIn(s *subject, n int) error {
	var b strings.Builder
	esc := strings.NewReplacer(`\`, `\\`, "\t", `\t`, "\n", `\n`, "\r", `\r`)
	for range n {
		for i, c := range s.columns {
			if i > 0 {
				b.WriteByte('\t')
			}
			if !s.isKey(c.name) && !strings.Contains(c.typ, "NOT NULL") && w.chance(8) {
				b.WriteString(`\N`)
			} else {
				b.WriteString(esc.Replace(c.gen(w.r)))
			}
		}
		b.WriteByte('\n')
	}
	_, err := w.conn.PgConn().CopyFrom(context.Background(), strings.NewReader(b.String()), "COPY "+s.String()+" ("+columnList(s)+") FROM STDIN")
	if err != nil && !isExpected(err) {
		return fmt.Errorf("copy into %s: %w", s, err)
	}
	return err
}

// swap moves rows among the keys of each other, which only a DEFERRABLE key allows.
func (w *worker) swap(s *subject) error {
	switch w.r.IntN(3) {
	case 0:
		return w.exec("UPDATE " + s.String() + " SET id = id + 1")
	case 1:
		return w.exec("UPDATE " + s.String() + " SET id = (SELECT min(id) + max(id) FROM " + s.String() + ") - id")
	}
	return w.exec("UPDATE " + s.String() + " SET id = id - 1, " + w.assignments(s, false) + " WHERE id > 3")
}

// again deletes a row and inserts another one under its key.
func (w *worker) again(s *subject) error {
	var cols []string
	for _, c := range s.columns {
		if s.isKey(c.name) || strings.Contains(c.typ, "NOT NULL") || w.chance(2) {
			cols = append(cols, "d."+eventlog.QuoteIdent(c.name))
		} else {
			cols = append(cols, w.value(s, c))
		}
	}
	return w.exec(fmt.Sprintf("WITH d AS (DELETE FROM %s WHERE %s RETURNING *) INSERT INTO %s (%s) SELECT %s FROM d", s, w.some(s, 1), s, columnList(s), strings.Join(cols, ", ")))
}

// context emits a logical message. What the transaction's rows have from now on is also in a setting, which a savepoint
// takes back just as it does the message.
func (w *worker) context() error {
	n := w.r.IntN(12)
	text := fmt.Sprintf(`{"actor": "w%d", "reason": %d, "odd": "\\ ' \" é"}`, w.id, w.r.IntN(1000))
	prefix, flag, content := "backstory", "true", quoteLit(text)
	switch n {
	case 0:
		prefix = "_bemi"
	case 1:
		prefix, text = "other", ""
	case 2:
		flag, text = "false", ""
	case 3:
		text = "not JSON"
		content = quoteLit(text)
	case 4:
		text = "malformed"
		content = `'\x7b2261223a22ff227d'::bytea` // {"a":"\xff"}
	case 5:
		text = "malformed"
		content = `'\x7b2261223a2200227d'::bytea` // {"a":"\x00"}
	case 6:
		text = `{"n": 1e999999, "s": "\ud800"}`
		content = quoteLit(text)
	case 7:
		text = `{}`
		content = quoteLit(text)
	}
	if err := w.exec("SELECT pg_logical_emit_message(" + flag + ", '" + prefix + "', " + content + ")"); err != nil {
		return err
	}
	if text == "" {
		return nil
	}
	return w.exec("SELECT set_config('audit.context', " + quoteLit(text) + ", true); INSERT INTO audit.change (xid, op, same, context) VALUES (" +
		"pg_current_xact_id()::text::bigint % 4294967296, 'message', false, " + quoteLit(text) + ")")
}

// moment is what a recording session found.
type moment struct {
	contents contents
	columns  map[string][]string
}

// mark writes down tables while no transaction of a worker is open, and leaves a row in marker, by which the moment is found in the log.
func mark(s *session, id int, columns map[string][]string) (moment, error) {
	s.do("BEGIN; SELECT pg_advisory_xact_lock(%d)", gate)
	c, err := dump(context.Background(), s, columns)
	if err == nil {
		s.do("INSERT INTO public.marker VALUES (%d); COMMIT", id)
	}
	return moment{c, columns}, err
}

// record writes down all tables at random moments until ctx ends. The row that it inserts into marker says to which
// position of the log each belongs.
func record(ctx context.Context, t testing.TB, url string, seed uint64, columns map[string][]string) map[int]moment {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1<<32))
	s := open(t, url)
	moments := map[int]moment{}
	for id := 1; ; id++ {
		select {
		case <-ctx.Done():
			return moments
		case <-time.After(time.Duration(100+r.IntN(400)) * time.Millisecond):
		}
		m, err := mark(s, id, columns)
		if err != nil {
			t.Error(err)
			return moments
		}
		moments[id] = m
	}
}
