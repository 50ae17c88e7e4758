package capture

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/eventlog"
)

// Plan is what init found at the source and would do there.
type Plan struct {
	Server *Server
	Slot   *Slot
	Tables []*Table
	// SQL prepares the source; empty if it is prepared. The slot is made by a replication command afterwards.
	SQL []string
	// DDLTrigger is Config.DDLTrigger.
	DDLTrigger *bool
	// DDL is that part of SQL that makes or removes the event trigger, and Superuser whether this role may do so; both only if Config.DDLTrigger asks for it.
	DDL       []string
	Superuser bool
	// DDLReader is the role that the sidecar is taken to connect as, which reads what the event triggers' messages carry, and DDLReaderWhy how that is
	// known; empty: it is not, and taken to be this role.
	DDLReader, DDLReaderWhy string
	// NewSlot tells that the slot is to be made.
	NewSlot bool
	// Histories are tables in which a library keeps its own history.
	Histories []History
	// AllTables are publications FOR ALL TABLES: they would publish the event log's own tables too.
	AllTables []string
	// Role is who we are at the source.
	Role string
	// Unmatched are patterns that match no table.
	Unmatched []Finding
	// Outside are schemas of which nothing is selected.
	Outside []Outside
	// Span is how long the server has counted row changes (Table.PerDay); 0: not known.
	Span time.Duration
	// NotOwned are selected tables that this role may not add to a publication, NotIts the publications that it may not alter, or make.
	NotOwned []*Table
	// Left are they, if they are in no publication and there are other tables: those can do without them (LeaveOut).
	Left []*Table
	left struct { // what Tables and SQL are without Left
		tables []*Table
		sql    []string
	}
	NotIts []string
	// Replace, if it is set, is called as soon as nothing is left to be done but to make the slot: it drops the one that is there.
	Replace func() error
	locks   []string // the tables that SQL puts into a publication, or takes out of one
}

// Prepare looks at the source and says what init would do. It changes nothing.
func Prepare(ctx context.Context, c Config) (*Plan, error) {
	c = c.WithDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	repl, err := c.connectReplication(ctx, nil)
	if err != nil {
		return nil, err
	}
	defer repl.Close(context.WithoutCancel(ctx))
	at, done, err := c.connectSlot(ctx, conn)
	if err != nil {
		return nil, err
	}
	defer done()
	p := &Plan{}
	if p.Server, err = c.server(ctx, conn, at, repl); err != nil {
		return nil, err
	}
	if err := checkServer(p.Server); err != nil {
		return nil, err
	}
	if p.Slot, err = c.ReadSlot(ctx, at); err != nil {
		return nil, err
	}
	if p.Slot.Exists && (p.Slot.Plugin != "pgoutput" || p.Slot.Database != p.Server.Database) {
		return nil, &eventlog.Problem{Err: fmt.Errorf("replication slot %s belongs to something else (plugin %q, database %q)", c.Slot, p.Slot.Plugin, p.Slot.Database),
			Hint: "Choose another name with BACKSTORY_SLOT."}
	}
	p.NewSlot = !p.Slot.Exists
	all, err := c.tableNames(ctx, conn)
	if err != nil {
		return nil, err
	}
	p.Unmatched, p.Outside = c.unmatched(all), c.outsideSchemas(all)
	if p.Tables, err = c.tables(ctx, conn); err != nil {
		return nil, err
	}
	if len(p.Tables) == 0 {
		return nil, &eventlog.Problem{Err: fmt.Errorf("no table of %s matches %s", p.Server.Database, strings.Join(c.Tables, ", ")),
			Hint: "Set BACKSTORY_TABLES to patterns such as public.* or billing.invoices; create the tables first."}
	}
	if err := conn.QueryRow(ctx, `SELECT coalesce(array_agg(pubname::text ORDER BY pubname), '{}'), current_user::text FROM pg_publication WHERE puballtables`).Scan(&p.AllTables, &p.Role); err != nil {
		return nil, fmt.Errorf("list publications: %w", err)
	}
	p.Span = activity(ctx, conn, p.Tables)
	if p.Histories, err = histories(ctx, conn); err != nil {
		return nil, err
	}
	full, err := c.fullIdentity(p)
	if err != nil {
		return nil, err
	}
	sql, err := c.publicationSQL(ctx, conn, p.Tables, p)
	if err != nil {
		return nil, err
	}
	if len(p.NotOwned) > 0 && !slices.ContainsFunc(p.NotOwned, func(t *Table) bool { return t.Published || t.ToFull }) && len(p.NotOwned) < len(p.Tables) {
		p.Left = p.NotOwned
		p.left.tables = p.Taken()
		if p.left.sql, err = c.publicationSQL(ctx, conn, p.left.tables, p); err != nil {
			return nil, err
		}
	}
	err = c.ddlSQL(ctx, conn, p)
	// Another identity comes after the publications: with the table for itself, it waits for hardly anybody else's.
	p.SQL, p.left.sql = slices.Concat(sql, full, p.DDL), slices.Concat(p.left.sql, full, p.DDL)
	return p, err
}

// LeaveOut makes a plan of what this role may do, without Left.
func (p *Plan) LeaveOut() {
	if len(p.Left) > 0 {
		p.Tables, p.SQL = p.left.tables, p.left.sql
	}
}

// Taken are the tables of a plan that init takes in: all of them but Left.
func (p *Plan) Taken() []*Table {
	return slices.DeleteFunc(slices.Clone(p.Tables), func(t *Table) bool { return slices.Contains(p.Left, t) })
}

// PublishSQL is what has to be run for tables of NotOwned, by a superuser or a role that owns them and the publications, so that role can have them captured.
func (c Config) PublishSQL(role string, tables []*Table) (sql []string) {
	c = c.WithDefaults()
	var whole, inserts, schemas, names []string
	for _, t := range tables {
		if q := only(t.Schema, t.Name); t.InsertOnly {
			inserts = append(inserts, q)
		} else {
			whole = append(whole, q)
		}
		if q := eventlog.QuoteIdent(t.Schema); !slices.Contains(schemas, q) {
			schemas = append(schemas, q)
		}
		names = append(names, eventlog.QuoteQualified(t.Schema, t.Name))
	}
	if len(whole) > 0 {
		sql = append(sql, "ALTER PUBLICATION "+eventlog.QuoteIdent(c.Publication)+" ADD TABLE "+strings.Join(whole, ", ")+";")
	}
	if len(inserts) > 0 {
		sql = append(sql, "ALTER PUBLICATION "+eventlog.QuoteIdent(c.InsertPublication())+" ADD TABLE "+strings.Join(inserts, ", ")+";")
	}
	role = eventlog.QuoteIdent(role)
	return append(sql, "GRANT USAGE ON SCHEMA "+strings.Join(schemas, ", ")+" TO "+role+";", "GRANT SELECT ON "+strings.Join(names, ", ")+" TO "+role+";")
}

// Alters tells whether SQL gives a table another replica identity. ALTER TABLE wants the table for itself, and whoever comes after it
// waits with it: what --print-sql prints begins with LimitLock; init has bounds of its own.
func (p *Plan) Alters() bool {
	return slices.ContainsFunc(p.Tables, func(t *Table) bool { return t.ToFull })
}

// LimitLock keeps the application from waiting for long, where somebody else runs the SQL.
const LimitLock = "SET LOCAL lock_timeout = '2s'"

// lockTry is how long one attempt to get locks behind which the application's reads or writes have to wait may take, alterLimit for how long it is tried
// again where a table's replica identity is to be altered.
const (
	lockTry    = 300 * time.Millisecond
	alterLimit = 2 * time.Second
	alterTable = "ALTER TABLE "
)

// fullIdentity plans REPLICA IDENTITY FULL for the tables that are to have it.
func (c Config) fullIdentity(p *Plan) (sql []string, err error) {
	for _, s := range c.FullIdentity {
		if !slices.ContainsFunc(p.Tables, func(t *Table) bool { return matchAny([]string{s}, t.Relation) }) {
			return nil, &eventlog.Problem{Err: fmt.Errorf("no selected table is called %s, which is to have REPLICA IDENTITY FULL", s),
				Hint: "Name tables that BACKSTORY_TABLES selects, with their schema."}
		}
	}
	for _, t := range p.Tables {
		if !t.ToFull {
			continue
		}
		if t.InsertOnly { // 18, generated columns
			return nil, &eventlog.Problem{Err: fmt.Errorf("%s: REPLICA IDENTITY FULL would make its UPDATEs fail, since it has generated columns", t), Hint: "Instead, " + t.Remedy + "."}
		}
		sql = append(sql, alterTable+eventlog.QuoteQualified(t.Schema, t.Name)+" REPLICA IDENTITY FULL;")
		if !t.Owned && !slices.Contains(p.NotOwned, t) {
			p.NotOwned = append(p.NotOwned, t)
		}
	}
	return sql, nil
}

// activity asks the server's statistics what happens to tables: what did since they began, by the clock, is the best guess there is of
// tomorrow, and of a short time it is none. It is for information: what cannot be had stays 0.
func activity(ctx context.Context, conn *pgx.Conn, tables []*Table) (span time.Duration) {
	var seconds float64
	if err := conn.QueryRow(ctx, `SELECT extract(epoch FROM now() - coalesce(stats_reset, pg_postmaster_start_time()))::float8 FROM pg_stat_database WHERE datname = current_database()`).Scan(&seconds); err != nil {
		return 0
	}
	rows, err := conn.Query(ctx, `SELECT relid::bigint, (n_tup_ins * per.day)::bigint, (n_tup_upd * per.day)::bigint, (n_tup_del * per.day)::bigint
		FROM pg_stat_user_tables, (SELECT 86400 / greatest($1::float8, 3600) AS day) per`, seconds)
	if err != nil {
		return 0
	}
	defer rows.Close()
	found := map[uint32]Activity{}
	for rows.Next() {
		var oid int64
		var a Activity
		if err := rows.Scan(&oid, &a.Inserted, &a.Updated, &a.Deleted); err != nil {
			return 0
		}
		found[uint32(oid)] = a
	}
	for _, t := range tables {
		t.PerDay = found[t.OID]
	}
	return time.Duration(seconds * float64(time.Second))
}

// History is a table in which a library keeps a history of its own.
type History struct{ Table, Library string }

// histories finds the tables of PaperTrail, Audited, Logidze and Bemi by the columns they have.
func histories(ctx context.Context, conn *pgx.Conn) ([]History, error) {
	rows, err := conn.Query(ctx, `
		SELECT format('%I.%I', n.nspname, c.relname),
		       CASE WHEN a.cols @> '{item_type,item_id,event,whodunnit}' THEN 'PaperTrail'
		            WHEN a.cols @> '{auditable_type,auditable_id,audited_changes}' THEN 'Audited'
		            WHEN a.cols @> '{log_data}' THEN 'Logidze'
		            WHEN a.cols @> '{primary_key,before,after,context,committed_at}' THEN 'Bemi' END
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		CROSS JOIN LATERAL (SELECT array_agg(x.attname::text) AS cols FROM pg_attribute x WHERE x.attrelid = c.oid AND x.attnum > 0 AND NOT x.attisdropped) a
		WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'backstory')
		  AND (a.cols @> '{item_type,item_id,event,whodunnit}' OR a.cols @> '{auditable_type,auditable_id,audited_changes}'
		       OR a.cols @> '{log_data}' OR a.cols @> '{primary_key,before,after,context,committed_at}') ORDER BY 1`)
	if err != nil {
		return nil, fmt.Errorf("look for other histories: %w", err)
	}
	h, err := pgx.CollectRows(rows, pgx.RowToStructByPos[History])
	if err != nil {
		return nil, fmt.Errorf("look for other histories: %w", err)
	}
	return h, nil
}

// publicationSQL works out which statements bring the publications in line with a selection of tables, which of them this role may not run (p.NotOwned, p.NotIts), and which
// tables they lock (p.locks).
func (c Config) publicationSQL(ctx context.Context, conn *pgx.Conn, tables []*Table, p *Plan) (sql []string, err error) {
	p.NotIts, p.locks = nil, nil
	for _, pub := range []struct {
		name, publish string
		insertOnly    bool
	}{
		{c.Publication, "insert, update, delete, truncate", false},
		{c.InsertPublication(), "insert, truncate", true},
	} {
		var exists, all, ins, upd, del, trunc, viaRoot, may bool
		err := conn.QueryRow(ctx, `SELECT p.oid IS NOT NULL, coalesce(puballtables, false), coalesce(pubinsert, false), coalesce(pubupdate, false), coalesce(pubdelete, false), coalesce(pubtruncate, false), coalesce(pubviaroot, false),
			coalesce(pg_has_role(pubowner, 'USAGE'), has_database_privilege(current_database(), 'CREATE')) FROM (SELECT) one LEFT JOIN pg_publication p ON pubname = $1`, pub.name).
			Scan(&exists, &all, &ins, &upd, &del, &trunc, &viaRoot, &may)
		if err != nil {
			return nil, fmt.Errorf("read publication %s: %w", pub.name, err)
		}
		planned := len(sql)
		if all {
			return nil, &eventlog.Problem{Err: fmt.Errorf("publication %s is FOR ALL TABLES", pub.name), Hint: "backstory needs a publication of its own: choose another name with BACKSTORY_PUBLICATION."}
		}
		in := map[string]bool{} // tables in the publication, and whether as a part of their rows or columns (PostgreSQL 15 and later)
		// By name, not through its schema: that a superuser has decided (README, What Postgres needs).
		rows, err := conn.Query(ctx, `SELECT n.nspname::text, c.relname::text, coalesce(to_jsonb(r) ->> 'prqual', to_jsonb(r) ->> 'prattrs') IS NOT NULL FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
			JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = $1`, pub.name)
		if err != nil {
			return nil, fmt.Errorf("read publication %s: %w", pub.name, err)
		}
		for rows.Next() {
			var s, t string
			var part bool
			if err := rows.Scan(&s, &t, &part); err != nil {
				return nil, fmt.Errorf("read publication %s: %w", pub.name, err)
			}
			in[only(s, t)] = part
		}
		if err := rows.Err(); err != nil {
			return nil, fmt.Errorf("read publication %s: %w", pub.name, err)
		}
		var add, again, drop []string
		for _, t := range tables {
			q := only(t.Schema, t.Name)
			if t.InsertOnly != pub.insertOnly {
				continue
			}
			part, ok := in[q]
			if part {
				again = append(again, q)
			}
			if !ok || part {
				add = append(add, q)
				if !t.Owned && !slices.Contains(p.NotOwned, t) {
					p.NotOwned = append(p.NotOwned, t)
				}
			}
			delete(in, q)
		}
		for q := range in {
			drop = append(drop, q)
		}
		slices.Sort(drop)
		name := eventlog.QuoteIdent(pub.name)
		switch {
		case !exists && len(add) > 0:
			sql = append(sql, "CREATE PUBLICATION "+name+" FOR TABLE "+strings.Join(add, ", ")+" WITH (publish = '"+pub.publish+"');")
		case !exists: // pgoutput wants every publication it is told of to exist
			sql = append(sql, "CREATE PUBLICATION "+name+" WITH (publish = '"+pub.publish+"');")
		default:
			if !ins || !trunc || upd == pub.insertOnly || del == pub.insertOnly || viaRoot {
				sql = append(sql, "ALTER PUBLICATION "+name+" SET (publish = '"+pub.publish+"', publish_via_partition_root = false);")
			}
			if len(again) > 0 {
				sql = append(sql, "ALTER PUBLICATION "+name+" DROP TABLE "+strings.Join(again, ", ")+";")
			}
			if len(add) > 0 {
				sql = append(sql, "ALTER PUBLICATION "+name+" ADD TABLE "+strings.Join(add, ", ")+";")
			}
			if len(drop) > 0 {
				sql = append(sql, "ALTER PUBLICATION "+name+" DROP TABLE "+strings.Join(drop, ", ")+";")
			}
		}
		p.locks = append(append(p.locks, add...), drop...)
		if len(sql) > planned && !may {
			p.NotIts = append(p.NotIts, pub.name)
		}
	}
	// A table must leave one publication before the application's next UPDATE, and enter the other in the same transaction.
	return sql, nil
}

// only names a table in a publication. Without ONLY it would stand for its descendants, too (PostgreSQL manual, CREATE PUBLICATION).
func only(schema, name string) string { return "ONLY " + eventlog.QuoteQualified(schema, name) }

// Result is what Apply did.
type Result struct {
	Start  eventlog.LSN // from where on everything is captured
	At     time.Time    // when that was, by the source's clock
	Tables []eventlog.Captured
}

// Apply carries a plan out: the publications in one transaction, then the slot. It is idempotent. before are
// the tables that were captured, known the OIDs of those that the log has ever known. waiting is told, once a second, for whom it waits.
func Apply(ctx context.Context, c Config, p *Plan, before []eventlog.Captured, known []uint32, waiting func([]string)) (*Result, error) {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	published, err := c.publications(ctx, conn, 0)
	if err != nil {
		return nil, err
	}
	was := map[uint32]eventlog.Captured{}
	missed := map[uint32]bool{} // they were not published for a while, which the sidecar notes, in its place
	for _, b := range before {
		was[b.OID] = b
		is := published.of(c, b.OID, b.InsertOnly)
		missed[b.OID] = b.Published != "" && b.Published != is && (is != "" || published.of(c, b.OID, !b.InsertOnly) == "")
	}
	empty := map[uint32]bool{} // tables that are: every row that they will ever have is in the stream
	if len(p.SQL) > 0 {
		if err := c.prepare(ctx, conn, p, before, known, empty, waiting); err != nil {
			return nil, err
		}
	}
	if published, err = c.publications(ctx, conn, 0); err != nil {
		return nil, err
	}
	for _, t := range p.Tables { // or meanwhile: what this has altered is those that somebody had altered before, or that are captured in another way
		if b, ok := was[t.OID]; ok && b.Published != "" && b.InsertOnly == t.InsertOnly && b.Published != published.of(c, t.OID, t.InsertOnly) {
			missed[t.OID] = true
		}
	}
	// By now updates and deletes of tables of which only inserts were published reach the stream.
	var widened int64
	if err := conn.QueryRow(ctx, `SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint`).Scan(&widened); err != nil {
		return nil, fmt.Errorf("ask the source for its WAL position: %w", err)
	}
	res := &Result{}
	var waitFor int64
	record := func(start eventlog.LSN) {
		for _, t := range p.Tables {
			cap := eventlog.Captured{Relation: t.Relation, SinceLSN: start, Published: published.of(c, t.OID, t.InsertOnly), Rows: t.Rows, Bytes: t.Bytes, Catalogue: t.catalogue, Empty: empty[t.OID], WaitFor: waitFor}
			if b, ok := was[t.OID]; ok {
				if missed[t.OID] || t.InsertOnly && !b.InsertOnly { // the sidecar notes that, in its place (see Narrowed)
					res.Tables = append(res.Tables, b)
					continue
				}
				cap.SinceLSN, cap.Complete = b.SinceLSN, b.Complete
				if b.Catalogue != "" { // that it was altered since is found, and taken care of, by the sidecar (see Altered)
					r := *t.Relation
					r.Schema, r.Name, r.RootOID, r.RootSchema, r.RootName, r.Columns, r.Key, r.Deferrable, r.Generated = b.Schema, b.Name, b.RootOID, b.RootSchema, b.RootName, b.Columns, b.Key, b.Deferrable, b.Generated
					cap.Relation, cap.Catalogue = &r, b.Catalogue
				}
				if b.InsertOnly && !t.InsertOnly { // those of before are missing (eventlog.Log.Retaken)
					cap.SinceLSN, cap.Complete = max(start, eventlog.LSN(widened)), false
				}
			}
			if !t.InsertOnly && empty[t.OID] {
				cap.Complete = true
			}
			res.Tables = append(res.Tables, cap)
		}
	}
	if !p.NewSlot {
		record(p.Server.FlushLSN)
		return res, nil
	}
	repl, err := c.connectReplication(ctx, func(cfg *pgconn.Config) { cfg.RuntimeParams["statement_timeout"] = "0" })
	if err != nil {
		return nil, err
	}
	defer repl.Close(context.WithoutCancel(ctx))
	at, done, err := c.connectSlot(ctx, conn)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := c.replays(ctx, conn, at); err != nil {
		return nil, err
	}
	if p.Replace != nil {
		if p.Slot.Exists {
			if err := c.awaitTransactions(ctx, conn, waiting); err != nil {
				return nil, err
			}
		}
		if err := p.Replace(); err != nil {
			return nil, err
		}
	}
	err = c.createSlot(ctx, conn, repl, p.Server, waiting, func(snapshot string, start eventlog.LSN) error {
		res.Start = start
		// A transaction that began while the slot was made, and was committed before it begins, is not in the stream; it becomes visible later,
		// while it waits for a synchronous standby much later.
		if err := conn.QueryRow(ctx, `SELECT `+nextXID+`, clock_timestamp()`).Scan(&waitFor, &res.At); err != nil {
			return fmt.Errorf("ask the source for its transactions: %w", err)
		}
		// A table that is empty in the slot's own snapshot is complete.
		tx, err := at.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
		if err != nil {
			return err
		}
		defer tx.Rollback(context.WithoutCancel(ctx))
		if _, err := tx.Exec(ctx, "SET TRANSACTION SNAPSHOT '"+snapshot+"'"); err != nil {
			return fmt.Errorf("use the slot's snapshot: %w", err)
		}
		for _, t := range p.Tables {
			if empty[t.OID], err = isEmpty(ctx, tx, t); err != nil {
				return err
			}
		}
		record(start)
		return nil
	})
	return res, err
}

// AwaitLocks waits, as long as making the slot may wait for open transactions, until nobody has a lock on tables that keeps a plan's SQL from being carried out.
// Nothing is locked meanwhile. waiting is told for whom.
func AwaitLocks(ctx context.Context, c Config, p *Plan, waiting func([]string)) error {
	c = c.WithDefaults()
	conn, err := c.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return c.patiently(ctx, conn, p, waiting, func(ctx context.Context) error { return awaitLocks(ctx, conn, p.toLock()) })
}

// toLock gives the tables that a plan's SQL locks.
func (p *Plan) toLock() []string {
	locks := slices.Clone(p.locks)
	for _, t := range p.Tables {
		if q := only(t.Schema, t.Name); t.ToFull && !slices.Contains(locks, q) {
			locks = append(locks, q)
		}
	}
	return locks
}

// prepare carries out a plan's SQL. While somebody else's locks are in the way it is tried again: what the application may have to wait for is never locked for
// longer than lockTry.
func (c Config) prepare(ctx context.Context, conn *pgx.Conn, p *Plan, before []eventlog.Captured, known []uint32, empty map[uint32]bool, waiting func([]string)) error {
	return c.patiently(ctx, conn, p, waiting, func(ctx context.Context) error {
		if err := awaitLocks(ctx, conn, p.toLock()); err != nil {
			return err
		}
		clear(empty)
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			var until time.Time
			for _, q := range p.SQL {
				wait := lockTry
				if strings.HasPrefix(q, alterTable) {
					if until.IsZero() {
						until = time.Now().Add(lockTry)
					}
					wait = time.Until(until)
				}
				if _, err := tx.Exec(ctx, limitLock(wait)+q); err != nil {
					return err
				}
			}
			if p.NewSlot || p.Server.lossy() {
				return nil
			}
			return emptyTables(ctx, tx, p.Tables, before, known, empty, until)
		})
	})
}

// patiently tries something again while somebody's locks are in the way, up to a limit, and tells for whom it waits.
func (c Config) patiently(ctx context.Context, conn *pgx.Conn, p *Plan, waiting func([]string), try func(context.Context) error) error {
	watch, err := c.Connect(ctx)
	if err != nil {
		return err
	}
	defer watch.Close(context.WithoutCancel(ctx))
	limit := c.BlockedAfter
	if p.Alters() {
		limit = alterLimit
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	began := time.Now()
	go func() {
		err := try(ctx)
		for eventlog.SQLState(err) == "55P03" && time.Since(began) < limit && ctx.Err() == nil { // lock_not_available
			pass(ctx, 2*lockTry)
			err = try(ctx)
		}
		done <- err
	}()
	tick := time.NewTicker(lockTry / 2)
	defer tick.Stop()
	var blockers []string
	var told, asked time.Time
	for {
		select {
		case <-tick.C:
			if len(blockers) > 0 && time.Since(asked) < time.Second {
				continue
			}
			asked = time.Now()
			if b, err := blocking(ctx, watch, conn.PgConn().PID()); err == nil && len(b) > 0 {
				if blockers = b; waiting != nil && time.Since(told) >= time.Second {
					told = time.Now()
					waiting(b)
				}
			}
			continue
		case err = <-done:
		}
		break
	}
	switch eventlog.SQLState(err) {
	case "55P03":
		what := "a table that is to be published"
		if p.Alters() {
			what = "a table that is to be published, or to have REPLICA IDENTITY FULL,"
		}
		by := ""
		if len(blockers) > 0 {
			by = ": " + strings.Join(blockers, "; ")
		}
		return &eventlog.Problem{Err: fmt.Errorf("prepare the source: %s was in use for %s%s", what, limit, by),
			Hint: "Nothing of the source was changed. Run it again when that has ended: a long transaction, VACUUM, CREATE INDEX or ALTER TABLE."}
	case "42501":
		return &eventlog.Problem{Err: fmt.Errorf("prepare the publications: %w", err),
			Hint: "The role must own the tables (or be a member of their owner) and may CREATE in the database. Let their owner run what backstory init --print-sql prints, then run backstory init again."}
	}
	if err != nil {
		return fmt.Errorf("prepare the publications: %w", err)
	}
	return nil
}

// awaitLocks waits until nobody has a lock on tables that keeps them from being published, for one after the other and with nothing locked, so that
// nobody has to wait meanwhile; long enough for an autovacuum to make room (PostgreSQL manual, deadlock_timeout).
func awaitLocks(ctx context.Context, conn *pgx.Conn, tables []string) error {
	for _, t := range tables {
		_, err := conn.Exec(ctx, "SELECT set_config('lock_timeout', (setting::int + 500)::text, true) FROM pg_settings WHERE name = 'deadlock_timeout'; LOCK TABLE "+t+" IN SHARE UPDATE EXCLUSIVE MODE")
		if code := eventlog.SQLState(err); err != nil && code != "42501" && code != "42P01" { // without the right to lock it, or without the table, the attempt will tell
			return err
		}
	}
	return nil
}

// limitLock bounds the wait for each lock of a transaction.
func limitLock(wait time.Duration) string {
	return fmt.Sprintf("SET LOCAL lock_timeout = %d; ", max(wait.Milliseconds(), 1))
}

// isEmpty tells whether a table is known to be empty: without the right to look, and at all rows, it is not. Neither is one that was
// truncated or rewritten after the transaction's snapshot, in which it looks empty whatever it held (PostgreSQL manual, Caveats of
// concurrency control): its file is another one by now than in the snapshot.
func isEmpty(ctx context.Context, tx pgx.Tx, t *Table) (bool, error) {
	var may, some, same bool
	err := tx.QueryRow(ctx, "SELECT has_table_privilege($1::bigint::oid, 'SELECT') AND NOT row_security_active($1::bigint::oid)", int64(t.OID)).Scan(&may)
	if err == nil && may {
		err = tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM ONLY "+eventlog.QuoteQualified(t.Schema, t.Name)+" LIMIT 1)").Scan(&some)
	}
	if err == nil && may && !some {
		err = tx.QueryRow(ctx, "SELECT relfilenode = pg_relation_filenode(oid) FROM pg_class WHERE oid = $1::bigint::oid", int64(t.OID)).Scan(&same)
	}
	if err != nil {
		return false, fmt.Errorf("look whether %s is empty: %w", t, err)
	}
	return same, nil
}

// emptyTables finds the tables that are empty at the moment from which they are published, of those that the log knows nothing of: tx
// publishes them, and until it ends nobody can write to them. One that is in use is not waited for, nor for all of them together longer than lockTry.
func emptyTables(ctx context.Context, tx pgx.Tx, tables []*Table, before []eventlog.Captured, known []uint32, empty map[uint32]bool, until time.Time) error {
	if until.IsZero() {
		until = time.Now().Add(lockTry)
	}
	var seem []*Table
	for _, t := range tables {
		if time.Now().After(until) {
			break
		}
		if t.InsertOnly || slices.Contains(known, t.OID) || slices.ContainsFunc(before, func(b eventlog.Captured) bool { return b.OID == t.OID }) {
			continue
		}
		is, err := isEmpty(ctx, tx, t)
		if err != nil {
			return err
		}
		if is {
			seem = append(seem, t)
		}
	}
	for _, t := range seem {
		if time.Now().After(until) {
			break
		}
		sp, err := tx.Begin(ctx)
		if err != nil {
			return err
		}
		_, err = sp.Exec(ctx, limitLock(time.Until(until))+"LOCK TABLE ONLY "+eventlog.QuoteQualified(t.Schema, t.Name)+" IN SHARE MODE")
		if err != nil {
			if e := sp.Rollback(ctx); e != nil {
				return err
			}
			continue // its rows are known from their next change on
		}
		if empty[t.OID], err = isEmpty(ctx, sp, t); err != nil {
			return err
		}
		if err := sp.Commit(ctx); err != nil {
			return err
		}
	}
	return nil
}

// awaitTransactions waits, as long as making a slot may wait for them, until all transactions have ended that are open now.
func (c Config) awaitTransactions(ctx context.Context, conn *pgx.Conn, waiting func([]string)) error {
	var next int64
	if err := conn.QueryRow(ctx, `SELECT `+nextXID).Scan(&next); err != nil {
		return fmt.Errorf("ask the source for its transactions: %w", err)
	}
	began, told := time.Now(), time.Now()
	for {
		who, open, err := openBefore(ctx, conn, next)
		if err != nil || !open {
			return err
		}
		if time.Since(began) > c.BlockedAfter {
			return &eventlog.Problem{Err: fmt.Errorf("the gap is not accepted: waited %s for open transactions, for which a new replication slot would wait, too: %s", c.BlockedAfter, strings.Join(who, "; ")),
				Hint: "The old slot is still there. End them (SELECT pg_terminate_backend(pid), or COMMIT/ROLLBACK PREPARED 'gid'), then run it again."}
		}
		if waiting != nil && time.Since(told) >= time.Second && len(who) > 0 {
			told = time.Now()
			waiting(who)
		}
		if pass(ctx, 100*time.Millisecond); ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// DropSlot removes the slot from the server that has it.
func DropSlot(ctx context.Context, c Config) error {
	c = c.WithDefaults()
	conn, done, err := c.connectSlot(ctx, nil)
	if err != nil {
		return err
	}
	defer done()
	if _, err := conn.Exec(ctx, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1`, c.Slot); err != nil {
		return fmt.Errorf("drop the replication slot: %w", err)
	}
	return nil
}
