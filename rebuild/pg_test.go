package rebuild

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

// source plays the part of the captured database and of what captures it: it tells a real log of row changes.
type source struct {
	t     testing.TB
	ctx   context.Context
	url   string
	conn  *pgx.Conn // to the database, with the log's session settings
	log   *eventlog.Log
	w     *eventlog.Writer
	batch *eventlog.Batch
	lsn   eventlog.LSN
	xid   uint32
	at    time.Time
}

func newSource(t testing.TB, captured ...*eventlog.Relation) *source {
	t.Helper()
	srv := pgservertest.ForTest(t, pgserver.Config{})
	s := &source{t: t, ctx: context.Background(), url: srv.SocketURL(srv.NewDatabase(t)), lsn: 0x1000000, at: time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)}
	s.conn = connect(t, s.url)
	var err error
	if s.log, err = eventlog.Connect(s.ctx, eventlog.Config{URL: s.url}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.log.Close)
	if _, err := s.log.Create(s.ctx); err != nil {
		t.Fatal(err)
	}
	var list []eventlog.Captured
	for _, r := range captured {
		list = append(list, eventlog.Captured{Relation: r, SinceLSN: 0x1000000})
	}
	if err := s.log.Begin(s.ctx, eventlog.Head{SystemID: "1", Database: "test", Timeline: 1, EndLSN: s.lsn, Slot: "backstory"}, list); err != nil {
		t.Fatal(err)
	}
	if s.w, err = s.log.NewWriter(s.ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.w.Close(s.ctx) })
	s.batch = eventlog.NewBatch(nil)
	return s
}

func connect(t testing.TB, url string) *pgx.Conn {
	t.Helper()
	cfg, err := eventlog.ConnConfig(url, "test")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.ConnectConfig(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// tx gives the log a transaction of row changes.
func (s *source) tx(changes ...eventlog.Item) eventlog.Position {
	s.t.Helper()
	s.lsn += 0x100
	s.xid++
	s.at = s.at.Add(time.Second)
	s.batch.Add(eventlog.Item{Kind: eventlog.ItemBegin, XID: s.xid, Timeline: 1, CommitLSN: s.lsn, Time: s.at})
	for _, c := range changes {
		c.Kind, c.XID, c.Timeline, c.CommitLSN, c.Time = eventlog.ItemChange, s.xid, 1, s.lsn, s.at
		s.batch.Add(c)
	}
	s.batch.Add(eventlog.Item{Kind: eventlog.ItemCommit, XID: s.xid, Timeline: 1, CommitLSN: s.lsn, EndLSN: s.lsn + 0x40, Time: s.at})
	return s.flush()
}

func (s *source) flush() eventlog.Position {
	s.t.Helper()
	if err := s.w.Append(s.ctx, s.batch); err != nil {
		s.t.Fatal(err)
	}
	s.batch.Reset()
	return s.w.Head().Position
}

// row makes values of texts; nil is NULL.
func row(texts ...any) []eventlog.Value {
	v := make([]eventlog.Value, len(texts))
	for i, x := range texts {
		switch x := x.(type) {
		case nil:
			v[i].State = eventlog.StateNull
		case []byte:
			v[i] = eventlog.Value{State: eventlog.StateText, Text: x}
		default:
			v[i] = eventlog.Value{State: eventlog.StateText, Text: []byte(fmt.Sprint(x))}
		}
	}
	return v
}

func insert(r *eventlog.Relation, texts ...any) eventlog.Item {
	return eventlog.Item{Op: eventlog.OpInsert, Relation: r, New: row(texts...)}
}

func update(r *eventlog.Relation, old, now []eventlog.Value) eventlog.Item {
	return eventlog.Item{Op: eventlog.OpUpdate, Relation: r, Old: old, New: now, OldFull: r.ReplicaIdentity == 'f'}
}

func remove(r *eventlog.Relation, texts ...any) eventlog.Item {
	return eventlog.Item{Op: eventlog.OpDelete, Relation: r, Old: row(texts...), OldFull: r.ReplicaIdentity == 'f'}
}

// relation describes a table by columns of the form "id bigint".
func relation(name string, key []int, columns ...string) *eventlog.Relation {
	schema, table, ok := strings.Cut(name, ".")
	if !ok {
		schema, table = "public", name
	}
	r := &eventlog.Relation{Schema: schema, Name: table, ReplicaIdentity: 'f', Key: key, Complete: true}
	for _, c := range name {
		r.OID = r.OID*31 + uint32(c)
	}
	for i, c := range columns {
		n, typ, _ := strings.Cut(c, " ")
		typ, notNull := strings.CutSuffix(typ, " NOT NULL")
		col := eventlog.Column{Name: n, Type: eventlog.Type{OID: 25, Name: typ}, NotNull: notNull}
		switch typ {
		case "bigint", "integer":
			col.Type = eventlog.Type{OID: 20, Name: typ, Kind: eventlog.KindInt}
		case "numeric(12,2)":
			col.Type.OID = 1700
		case "timestamp with time zone":
			col.Type = eventlog.Type{OID: 1184, Name: typ, Kind: eventlog.KindTimestampTZ}
		case "text":
		default:
			col.Type.OID = 100000
		}
		for _, k := range key {
			col.NotNull = col.NotNull || k == i
		}
		r.Columns = append(r.Columns, col)
	}
	return r
}

func (s *source) exec(sql string) {
	s.t.Helper()
	execSQL(s.t, s.conn, sql)
}

func execSQL(t testing.TB, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.PgConn().Exec(context.Background(), sql).ReadAll(); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// query gives rows as Postgres prints them, NULL as ∅.
func query(t testing.TB, conn *pgx.Conn, sql string) []string {
	t.Helper()
	var out []string
	for _, v := range queryValues(t, conn, sql) {
		var texts []string
		for _, x := range v {
			if x.State == eventlog.StateNull {
				texts = append(texts, "∅")
			} else {
				texts = append(texts, string(x.Text))
			}
		}
		out = append(out, strings.Join(texts, "|"))
	}
	return out
}

func queryValues(t testing.TB, conn *pgx.Conn, sql string) (out [][]eventlog.Value) {
	t.Helper()
	results, err := conn.PgConn().Exec(context.Background(), sql).ReadAll()
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	for _, r := range results[len(results)-1].Rows {
		v := make([]eventlog.Value, len(r))
		for i := range r {
			if r[i] == nil {
				v[i].State = eventlog.StateNull
			} else {
				v[i] = eventlog.Value{State: eventlog.StateText, Text: r[i]}
			}
		}
		out = append(out, v)
	}
	return out
}

// describe reads a table of the source's database from the catalogue.
func (s *source) describe(table string) *eventlog.Relation {
	s.t.Helper()
	schema, name, _ := strings.Cut(table, ".")
	r := &eventlog.Relation{Schema: schema, Name: name, ReplicaIdentity: 'f', Complete: true}
	for _, v := range queryValues(s.t, s.conn, `SELECT a.attrelid, a.attname, a.atttypid, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated <> '',
			coalesce(array_position(i.indkey, a.attnum), -1)
		FROM pg_attribute a LEFT JOIN pg_index i ON i.indrelid = a.attrelid AND i.indisprimary
		WHERE a.attrelid = '`+table+`'::regclass AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum`) {
		var typ, pos int
		var c eventlog.Column
		scan(s.t, v[0], &r.OID)
		scan(s.t, v[2], &typ)
		scan(s.t, v[6], &pos)
		c.Name = string(v[1].Text)
		c.Type = s.typeOf(uint32(typ))
		c.Type.Name = string(v[3].Text)
		c.NotNull, c.Generated = string(v[4].Text) == "t", string(v[5].Text) == "t"
		if pos >= 0 {
			r.Key = append(r.Key, len(r.Columns))
		}
		r.Columns = append(r.Columns, c)
	}
	return r
}

func scan(t testing.TB, v eventlog.Value, into any) {
	t.Helper()
	if _, err := fmt.Sscan(string(v.Text), into); err != nil {
		t.Fatal(err)
	}
}

// typeOf finds the kind of a type through domains and arrays.
func (s *source) typeOf(oid uint32) eventlog.Type {
	if known, ok := eventlog.TypeKind(oid); ok {
		return known
	}
	v := queryValues(s.t, s.conn, fmt.Sprintf(`SELECT t.typbasetype, CASE WHEN t.typcategory = 'A' THEN t.typelem ELSE 0 END, e.typdelim
		FROM pg_type t LEFT JOIN pg_type e ON e.oid = t.typelem WHERE t.oid = %d`, oid))[0]
	var base, elem uint32
	scan(s.t, v[0], &base)
	scan(s.t, v[1], &elem)
	typ := eventlog.Type{OID: oid}
	switch {
	case base != 0:
		b := s.typeOf(base)
		typ.Kind, typ.Array, typ.Delim = b.Kind, b.Array, b.Delim
	case elem != 0:
		e := s.typeOf(elem)
		typ.Array = true
		if !e.Array {
			typ.Kind = e.Kind
		}
		if d := v[2].Text[0]; d != ',' {
			typ.Delim = d
		}
	}
	return typ
}

// checkout runs a checkout of everything at a position, 0 for the head.
func (s *source) checkout(at eventlog.Position, into Target, change ...func(*Config)) (*Report, error) {
	rev, err := s.log.Resolve(s.ctx, "HEAD", eventlog.RevisionOptions{})
	if err != nil {
		return nil, err
	}
	if at > 0 {
		rev = eventlog.Revision{Position: at, How: fmt.Sprintf("position %d", at)}
	}
	cfg := Config{Log: s.log, Revision: rev, Into: into, TempDir: tempDir}
	for _, f := range change {
		f(&cfg)
	}
	return Checkout(s.ctx, cfg)
}

func (s *source) mustCheckout(at eventlog.Position, into Target, change ...func(*Config)) *Report {
	s.t.Helper()
	r, err := s.checkout(at, into, change...)
	if err != nil {
		s.t.Fatalf("%v (%s)", err, eventlog.Hint(err))
	}
	return r
}

func revision(how string) eventlog.Revision { return eventlog.Revision{How: how} }
