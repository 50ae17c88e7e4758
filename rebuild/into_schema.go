package rebuild

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/eventlog"
)

// SchemaConfig says which Postgres schema tables are built in.
type SchemaConfig struct {
	// URL of the database: the log's, the source's or any other. Required.
	URL string
	// Schema for all tables. Empty: each goes to the schema whose name its own has in the source.
	Schema string
	// Replace lets checkouts that are in the schema already be replaced. Without it the schema must be empty or not exist.
	Replace bool
	// Revision is noted on the schema and its tables.
	Revision eventlog.Revision
}

// Schema makes a target that builds tables in Postgres: with the columns, types, NOT NULL and primary keys of their
// relations, and no other constraint, index or default. It is one transaction: others see all of it or nothing, and what is
// replaced until the last moment.
//
// Generated columns are generated here as well (STORED, whether they are that or VIRTUAL in the source) by their expressions of the revision; one
// whose expression fails in this database, since it calls a function that is not there or refuses a value, is left out
// with a warning. A function that an expression calls runs as the role of the checkout.
//
// A column becomes text, with a warning, where its type does not exist in this database, or does not accept a value
// that it once had: an enum's label has been renamed, a domain got another check.
func Schema(cfg SchemaConfig) Target { return &schemaTarget{cfg: cfg} }

// ErrNotCheckout means that something is in the way that no checkout has made.
var ErrNotCheckout = errors.New("is not a checkout")

// ErrOccupied means that an earlier checkout is in the way.
var ErrOccupied = errors.New("holds a checkout already")

type schemaTarget struct {
	cfg      SchemaConfig
	conn     *pgx.Conn
	tx       pgx.Tx
	stage    string // a schema that only this transaction sees, where tables are made that will replace others
	schemas  []*targetSchema
	place    map[*Table]*placed
	types    map[string]bool // by name: it exists here
	warnings []string
}

// targetSchema is a schema that tables go to.
type targetSchema struct {
	name   string
	exists bool
	marked bool
	old    []string // tables of an earlier checkout
}

// placed is what is known of a table here.
type placed struct {
	schema  *targetSchema
	name    string
	text    bool // all columns are loaded as text, and converted afterwards
	lenient bool // NOT NULL is set after loading, where it holds
	late    bool // generated columns are added after loading, where they can be
}

// Warnings are what people should know of the tables that were made.
func (s *schemaTarget) Warnings() []string { return s.warnings }

// Place tells where a table goes.
func (s *schemaTarget) Place(t *Table) string {
	p := s.place[t]
	return p.schema.name + "." + p.name
}

func (s *schemaTarget) warn(format string, args ...any) {
	if w := fmt.Sprintf(format, args...); !slices.Contains(s.warnings, w) {
		s.warnings = append(s.warnings, w)
	}
}

func (s *schemaTarget) Begin(ctx context.Context, tables []*Table) error {
	cfg, err := eventlog.ConnConfig(s.cfg.URL, "backstory checkout")
	if err != nil {
		return err
	}
	if s.conn, err = pgx.ConnectConfig(ctx, cfg); err != nil {
		return fmt.Errorf("connect to the target database: %w", eventlog.ConnError(err))
	}
	if s.tx, err = s.conn.Begin(ctx); err != nil {
		return fmt.Errorf("begin the checkout's transaction: %w", err)
	}
	if err := s.plan(ctx, tables); err != nil {
		return explain(err)
	}
	return nil
}

// plan looks at what is there, and makes the schemas.
func (s *schemaTarget) plan(ctx context.Context, tables []*Table) error {
	s.place = map[*Table]*placed{}
	if s.cfg.Schema != "" {
		ts, err := s.schema(ctx, s.cfg.Schema)
		if err != nil {
			return err
		}
		for t, name := range placeNames(tables, "_") {
			s.place[t] = &placed{schema: ts, name: name}
		}
	} else {
		for _, t := range tables {
			ts, err := s.schema(ctx, t.Schema)
			if err != nil {
				return err
			}
			s.place[t] = &placed{schema: ts, name: t.Name}
		}
	}
	for _, ts := range s.schemas {
		if ts.exists {
			continue
		}
		if _, err := s.tx.Exec(ctx, "CREATE SCHEMA "+eventlog.QuoteIdent(ts.name)); err != nil {
			return fmt.Errorf("create schema %s: %w", ts.name, err)
		}
	}
	if slices.ContainsFunc(s.schemas, func(ts *targetSchema) bool { return len(ts.old) > 0 }) {
		s.stage = fmt.Sprintf("backstory_checkout_%d", s.conn.PgConn().PID())
		if _, err := s.tx.Exec(ctx, "CREATE SCHEMA "+s.stage); err != nil {
			return fmt.Errorf("create schema %s: %w", s.stage, err)
		}
	}
	return s.findTypes(ctx, tables)
}

// schema looks at a schema and refuses it if something is in the way.
func (s *schemaTarget) schema(ctx context.Context, name string) (*targetSchema, error) {
	for _, ts := range s.schemas {
		if ts.name == name {
			return ts, nil
		}
	}
	ts := &targetSchema{name: name}
	s.schemas = append(s.schemas, ts)
	var comment string
	var things int
	err := s.tx.QueryRow(ctx, `SELECT coalesce(obj_description(n.oid, 'pg_namespace'), ''),
		(SELECT count(*) FROM pg_class WHERE relnamespace = n.oid) + (SELECT count(*) FROM pg_proc WHERE pronamespace = n.oid) +
		(SELECT count(*) FROM pg_type WHERE typnamespace = n.oid)
		FROM pg_namespace n WHERE nspname = $1`, name).Scan(&comment, &things)
	if errors.Is(err, pgx.ErrNoRows) {
		return ts, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at schema %s: %w", name, err)
	}
	ts.exists, ts.marked = true, strings.HasPrefix(comment, eventlog.CheckoutMark)
	switch {
	case things == 0:
		return ts, nil
	case !ts.marked:
		return nil, &eventlog.Problem{Err: fmt.Errorf("schema %s is not empty and %w", name, ErrNotCheckout),
			Hint: "Check out into a schema that does not exist yet; what a checkout has not made is never touched."}
	case !s.cfg.Replace:
		return nil, &eventlog.Problem{Err: fmt.Errorf("schema %s %w: %s", name, ErrOccupied, comment),
			Hint: "Use --replace to replace it, or name another schema."}
	}
	rows, err := s.tx.Query(ctx, `SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = $1 AND c.relkind = 'r' AND starts_with(obj_description(c.oid, 'pg_class'), $2) ORDER BY 1`, name, eventlog.CheckoutMark)
	if err == nil {
		ts.old, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil {
		return nil, fmt.Errorf("look at schema %s: %w", name, err)
	}
	return ts, nil
}

// findTypes finds out which data types there are. What it accepts as a type's name is safe to stand in a statement.
func (s *schemaTarget) findTypes(ctx context.Context, tables []*Table) error {
	s.types = map[string]bool{"text": true}
	for _, t := range tables {
		names := make([]string, 0, len(t.Columns)+len(t.Generated))
		for _, c := range t.Columns {
			names = append(names, c.Type.Name)
		}
		for _, g := range t.Generated {
			names = append(names, g.Type)
		}
		for _, n := range names {
			if _, ok := s.types[n]; ok {
				continue
			}
			s.types[n] = false
			if n == "" {
				continue
			}
			sp, err := s.tx.Begin(ctx)
			if err != nil {
				return err
			}
			var oid *string
			if err := sp.QueryRow(ctx, "SELECT to_regtype($1)::text", n).Scan(&oid); err == nil {
				s.types[n] = oid != nil
			} else if eventlog.SQLState(err) == "" {
				return fmt.Errorf("look for type %s: %w", n, err)
			}
			if err := sp.Rollback(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// Table makes a table and begins to copy rows into it.
func (s *schemaTarget) Table(ctx context.Context, t *Table) (TableWriter, error) {
	p := s.place[t]
	w := &schemaWriter{target: s, table: t, placed: p, schema: p.schema.name, ctx: ctx, done: make(chan struct{})}
	if s.stage != "" {
		w.schema = s.stage
	}
	w.name = eventlog.QuoteQualified(w.schema, p.name)
	generated := t.Generated
	if p.late {
		generated = nil
	}
	var cols, names []string
	compute := func(before int) {
		for ; len(generated) > 0 && generated[0].Before <= before; generated = generated[1:] {
			cols = append(cols, s.generate(&generated[0]))
		}
	}
	for i, c := range t.Columns {
		compute(i)
		typ := "text"
		switch {
		case !s.types[c.Type.Name]:
			s.warn("%s: column %s is text, since there is no type %s in this database", t, c.Name, c.Type.Name)
		case !p.text:
			typ = c.Type.Name
		}
		def := eventlog.QuoteIdent(c.Name) + " " + typ
		if c.NotNull && !c.Generated && !p.lenient || slices.Contains(t.Key, i) {
			def += " NOT NULL"
		}
		cols, names = append(cols, def), append(names, eventlog.QuoteIdent(c.Name))
	}
	compute(len(t.Columns))
	var err error
	if w.tx, err = s.tx.Begin(ctx); err != nil {
		return nil, err
	}
	if _, err := w.tx.Exec(ctx, "CREATE TABLE "+w.name+" ("+strings.Join(cols, ", ")+")"); err != nil {
		if len(t.Generated) > 0 && !p.late && ctx.Err() == nil { // an expression may be what fails
			if err := w.tx.Rollback(ctx); err != nil {
				return nil, err
			}
			p.late = true
			return s.Table(ctx, t)
		}
		return nil, explain(fmt.Errorf("create table %s: %w", w.name, err))
	}
	list := ""
	if len(names) > 0 {
		list = " (" + strings.Join(names, ", ") + ")"
	}
	// FREEZE spares readers and vacuum a second visit: the table is of this transaction and nobody sees it before.
	r, pw := io.Pipe()
	w.pipe = pw
	go func() {
		defer close(w.done)
		_, err := s.conn.PgConn().CopyFrom(ctx, r, "COPY "+w.name+list+" FROM STDIN (FREEZE)")
		w.err = err
		_ = r.CloseWithError(errCopyEnded)
	}()
	return w, nil
}

// generate defines a generated column.
func (s *schemaTarget) generate(g *eventlog.Generated) string {
	typ := g.Type
	if !s.types[typ] {
		typ = "text"
	}
	return eventlog.QuoteIdent(g.Name) + " " + typ + " GENERATED ALWAYS AS (" + g.Expression + ") STORED"
}

// errCopyEnded is what Write meets after COPY has failed; Close knows why.
var errCopyEnded = errors.New("COPY has ended")

// schemaWriter copies one table.
type schemaWriter struct {
	target *schemaTarget
	table  *Table
	placed *placed
	schema string
	name   string // quoted, with the schema
	ctx    context.Context
	tx     pgx.Tx // a savepoint
	pipe   *io.PipeWriter
	done   chan struct{}
	err    error // of COPY; to be read after done
}

func (w *schemaWriter) NewEncoder() Encoder { return &copyEncoder{} }

func (w *schemaWriter) Write(p []byte) error {
	_, err := w.pipe.Write(p)
	return err
}

// Close ends COPY and finishes the table.
func (w *schemaWriter) Close(err error) error {
	if errors.Is(err, errCopyEnded) {
		err = nil // w.err says why
	}
	_ = w.pipe.CloseWithError(err)
	<-w.done
	if err != nil {
		return err
	}
	if w.ctx.Err() != nil {
		return context.Cause(w.ctx)
	}
	if w.err != nil {
		return w.again(w.err)
	}
	if err := w.finish(); err != nil {
		return explain(fmt.Errorf("finish table %s: %w", w.name, err))
	}
	return nil
}

// again decides what follows from a failed COPY: values that the present types do not accept are loaded as text.
func (w *schemaWriter) again(err error) error {
	p := w.placed
	code := eventlog.SQLState(err)
	err = explain(fmt.Errorf("copy rows into %s: %w", w.name, err))
	switch {
	case code == "23502" && !p.lenient: // not_null_violation
		p.lenient = true
	case !p.text && (strings.HasPrefix(code, "22") || strings.HasPrefix(code, "23") || strings.HasPrefix(code, "42") || code == "0A000" || code == "XX000"):
		p.text, p.lenient, p.late = true, true, true
	default:
		return err
	}
	if e := w.tx.Rollback(w.ctx); e != nil {
		return err
	}
	return ErrAgain
}

// finish gives a loaded table its types, its key and its comment.
func (w *schemaWriter) finish() error {
	if w.placed.text {
		if err := w.convert(); err != nil {
			return err
		}
	}
	if w.placed.late {
		for i := range w.table.Generated {
			g := &w.table.Generated[i]
			if code, err := w.try("ADD COLUMN " + w.target.generate(g)); err != nil {
				return err
			} else if code != "" {
				w.target.warn("%s: the generated column %s is left out, since its expression fails here (%s): %s", w.table, g.Name, code, g.Expression)
			}
		}
		if err := w.arrange(); err != nil {
			return err
		}
	}
	if w.placed.lenient {
		for i, c := range w.table.Columns {
			if !c.NotNull || c.Generated || slices.Contains(w.table.Key, i) {
				continue
			}
			if ok, err := w.try("ALTER COLUMN " + eventlog.QuoteIdent(c.Name) + " SET NOT NULL"); err != nil {
				return err
			} else if ok != "" {
				w.target.warn("%s: column %s is not NOT NULL, since its value is not known in all rows", w.table, c.Name)
			}
		}
	}
	if len(w.table.Key) > 0 {
		var key []string
		for _, k := range w.table.Key {
			key = append(key, eventlog.QuoteIdent(w.table.Columns[k].Name))
		}
		if code, err := w.try("ADD PRIMARY KEY (" + strings.Join(key, ", ") + ")"); err != nil {
			return err
		} else if code != "" {
			w.target.warn("%s: the table has no primary key here (%s)", w.table, code)
		}
	}
	if _, err := w.tx.Exec(w.ctx, "COMMENT ON TABLE "+w.name+" IS "+w.target.comment(" of "+w.table.String())); err != nil {
		return err
	}
	return w.tx.Commit(w.ctx)
}

// arrange makes the table anew where generated columns that were added to its end belong elsewhere.
func (w *schemaWriter) arrange() error {
	var order []string
	generated := w.table.Generated
	for i := range len(w.table.Columns) + 1 {
		for ; len(generated) > 0 && generated[0].Before <= i; generated = generated[1:] {
			order = append(order, generated[0].Name)
		}
		if i < len(w.table.Columns) {
			order = append(order, w.table.Columns[i].Name)
		}
	}
	var is bool
	var columns, stored string
	err := w.tx.QueryRow(w.ctx, `SELECT array_agg(a.attnum ORDER BY o.n) = array_agg(a.attnum ORDER BY a.attnum), coalesce(string_agg(quote_ident(a.attname), ', ') FILTER (WHERE a.attgenerated = ''), ''),
			string_agg(format('%I %s%s%s', a.attname, format_type(a.atttypid, a.atttypmod), ' GENERATED ALWAYS AS (' || pg_get_expr(d.adbin, d.adrelid) || ') STORED', CASE WHEN a.attnotnull THEN ' NOT NULL' END), ', ' ORDER BY o.n)
		FROM unnest($2::text[]) WITH ORDINALITY o(name, n) JOIN pg_attribute a ON a.attname = o.name LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
		WHERE a.attrelid = $1::text::regclass AND a.attnum > 0`, w.name, order).Scan(&is, &stored, &columns)
	if err != nil || is {
		return err
	}
	last := fmt.Sprintf("backstory_%d", w.target.conn.PgConn().PID())
	moved := eventlog.QuoteQualified(w.schema, last)
	_, err = w.tx.Exec(w.ctx, "ALTER TABLE "+w.name+" RENAME TO "+eventlog.QuoteIdent(last)+"; CREATE TABLE "+w.name+" ("+columns+"); INSERT INTO "+w.name+" ("+stored+") SELECT "+stored+" FROM "+moved+"; DROP TABLE "+moved, pgx.QueryExecModeSimpleProtocol)
	return err
}

// convert gives columns that were loaded as text their types: first all together that are not likely to fail, which takes
// one pass over the table, then each of the others.
func (w *schemaWriter) convert() error {
	var sure, others []int
	for i, c := range w.table.Columns {
		switch {
		case c.Type.Name == "text" || !w.target.types[c.Type.Name]:
		case c.Type.OID < 10000 && !strings.HasPrefix(c.Type.Name, "reg"):
			sure = append(sure, i)
		default:
			others = append(others, i)
		}
	}
	change := func(i int) string {
		c := &w.table.Columns[i]
		n := eventlog.QuoteIdent(c.Name)
		return "ALTER COLUMN " + n + " TYPE " + c.Type.Name + " USING " + n + "::" + c.Type.Name
	}
	if len(sure) > 0 {
		var all []string
		for _, i := range sure {
			all = append(all, change(i))
		}
		code, err := w.try(strings.Join(all, ", "))
		if err != nil {
			return err
		}
		if code != "" {
			others = append(sure, others...)
		}
	}
	for _, i := range others {
		code, err := w.try(change(i))
		if err != nil {
			return err
		}
		if code != "" {
			c := &w.table.Columns[i]
			w.target.warn("%s: column %s is text, since the type %s does not accept every value that it had (%s)", w.table, c.Name, c.Type.Name, code)
		}
	}
	return nil
}

// try alters the table, or leaves it as it is and tells the SQLSTATE of the reason.
func (w *schemaWriter) try(action string) (code string, err error) {
	sp, err := w.tx.Begin(w.ctx)
	if err != nil {
		return "", err
	}
	if _, err = sp.Exec(w.ctx, "ALTER TABLE "+w.name+" "+action); err == nil {
		return "", sp.Commit(w.ctx)
	}
	switch code = eventlog.SQLState(err); {
	case code == "" || strings.HasPrefix(code, "57") || strings.HasPrefix(code, "53") || strings.HasPrefix(code, "58"): // cancelled, out of resources, I/O
		return "", err
	}
	return code, sp.Rollback(w.ctx)
}

// comment gives the comment by which a checkout's things are known, as a literal.
func (s *schemaTarget) comment(of string) string {
	c := eventlog.CheckoutMark + of + ", " + s.cfg.Revision.How
	return "'" + strings.ReplaceAll(c, "'", "''") + "'"
}

// Commit puts the tables where they belong.
func (s *schemaTarget) Commit(ctx context.Context) error {
	if err := s.settle(ctx); err != nil {
		return explain(err)
	}
	if err := s.tx.Commit(ctx); err != nil {
		return explain(fmt.Errorf("commit the checkout: %w", err))
	}
	return s.conn.Close(ctx)
}

func (s *schemaTarget) settle(ctx context.Context) error {
	for _, ts := range s.schemas {
		for _, old := range ts.old {
			if _, err := s.tx.Exec(ctx, "DROP TABLE "+eventlog.QuoteQualified(ts.name, old)); err != nil {
				return fmt.Errorf("drop the earlier checkout's table %s.%s: %w", ts.name, old, err)
			}
		}
	}
	if s.stage != "" {
		for _, p := range s.place {
			if _, err := s.tx.Exec(ctx, "ALTER TABLE "+eventlog.QuoteQualified(s.stage, p.name)+" SET SCHEMA "+eventlog.QuoteIdent(p.schema.name)); err != nil {
				return fmt.Errorf("move table %s to schema %s: %w", p.name, p.schema.name, err)
			}
		}
		if _, err := s.tx.Exec(ctx, "DROP SCHEMA "+s.stage); err != nil {
			return fmt.Errorf("drop schema %s: %w", s.stage, err)
		}
	}
	for _, ts := range s.schemas {
		sp, err := s.tx.Begin(ctx)
		if err != nil {
			return err
		}
		_, err = sp.Exec(ctx, "COMMENT ON SCHEMA "+eventlog.QuoteIdent(ts.name)+" IS "+s.comment(""))
		switch {
		case err == nil:
			err = sp.Commit(ctx)
		case ts.exists && eventlog.SQLState(err) == "42501":
			s.warn("schema %s cannot be marked as a checkout, since it belongs to another role; --replace will refuse it", ts.name)
			err = sp.Rollback(ctx)
		}
		if err != nil {
			return fmt.Errorf("mark schema %s: %w", ts.name, err)
		}
	}
	return nil
}

// Abort ends the connection, and the transaction with it.
func (s *schemaTarget) Abort() {
	if s.conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = s.conn.Close(ctx)
}

// explain adds the remedy for the errors of Postgres that have one, and takes row values out of them.
func explain(err error) error {
	var pe *pgconn.PgError
	var problem *eventlog.Problem
	if err == nil || errors.As(err, &problem) || !errors.As(err, &pe) {
		return err
	}
	if strings.HasPrefix(pe.Code, "22") || strings.HasPrefix(pe.Code, "23") {
		text := strings.TrimSuffix(err.Error(), pe.Error())
		err = fmt.Errorf("%sthe server refuses a value (SQLSTATE %s)", text, pe.Code)
	}
	if hint := hints[pe.Code]; hint != "" {
		return &eventlog.Problem{Err: err, Hint: hint}
	}
	return err
}

// hints are the remedies by SQLSTATE.
var hints = map[string]string{
	"42501": "GRANT CREATE ON DATABASE … TO the role of the checkout, or use a URL whose role may create schemas.", // insufficient_privilege
	"25006": "The target must be a primary that accepts writes.",                                                   // read_only_sql_transaction
	"2BP01": "Something was built on the earlier checkout: drop it first, or check out into another schema.",       // dependent_objects_still_exist
	"53100": "The target's disk is full; nothing of the checkout is left there.",                                   // disk_full
	"22P05": "Check out into a database with encoding UTF8.",                                                       // untranslatable_character
	"42P07": "A table of this name that no checkout has made is in the way: check out into another schema.",        // duplicate_table
}
