package capture

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/eventlog"
)

const (
	// chunksAhead of one table may be read before the log has taken them over.
	chunksAhead = 3
	// chunkPrefix is that of the message that marks a chunk's place in the WAL.
	chunkPrefix = "backstory.chunk"
	// chunkLock is how long a chunk waits for somebody's ALTER TABLE, before it is tried again.
	chunkLock = "2s"
	// maxChunkRows bounds what a chunk of narrow rows costs beside their bytes.
	maxChunkRows = 50000
)

// Existing is a table whose existing rows are to be taken over, and how far that is.
type Existing struct {
	eventlog.Captured
	eventlog.Baseline
	// ShapeOnly tells that nothing is to be read of it: only its new shape is to get a place in the log.
	ShapeOnly bool
	// Compare tells that its rows are compared with those that the log has of before, rather than taken over.
	Compare bool
}

// Import is the taking over of the existing rows of some tables. See package eventlog, Baseline, for how their places among the row
// changes are found.
type Import struct {
	stream *Stream
	rate   limiter
	known  Known
	// contents is for tables without a key.
	contents Contents

	mu     sync.Mutex // guards the following
	tables []*importing
	rates  []rateMark // of the last half minute, oldest first
}

// Known gives keys under which the log has events of a table, up to limit of them after a place, and the place of the last one.
type Known func(ctx context.Context, r *eventlog.Relation, after []string, limit int) (keys []eventlog.Key, next []string, err error)

// ImportRate is how fast existing rows have been taken over of late, per second.
type ImportRate struct {
	Rows   float64
	Weight float64 // of eventlog.Baseline
}

type rateMark struct {
	at              time.Time
	taken, compared ImportRate // in all, not per second
}

// ImportState is what the import of a table is doing.
type ImportState struct {
	eventlog.Baseline
	Table   string
	Compare bool // as Existing.Compare
	// Doing is queued, waiting (for transactions of the source, see For), reading, comparing (with what the log has), interrupted (by Error) or done.
	Doing string
	For   []string
	Error error
	Since time.Time // of Doing
}

// reads is what it is doing while rows are read.
func (s *ImportState) reads() string {
	if s.Compare {
		return "comparing"
	}
	return "reading"
}

// importing is the import of one table.
type importing struct {
	ImportState
	imp           *Import
	rel           *eventlog.Relation
	print         string // of the catalogue, when rel was described
	name          string // quoted
	schema, table string
	columns       string
	order         []keyColumn
	after         []string
	number        int64
	limit         int
	done          chan eventlog.Baseline // what the log has taken over
	ahead         []ahead
	pause         time.Duration // before the next attempt
	passes        int           // for what rows lack
	shape         bool          // only its new shape is to get a place in the log
	scan          *scan         // of a table that is read in one snapshot
	// Guarded by the import's mutex, as is what is embedded:
	busy, over bool
	again      time.Time
}

// keyColumn is a column by which a table is read in order.
type keyColumn struct {
	name      string // quoted
	index     int    // in the relation
	typ       string
	collate   string // a clause, where its index has another collation than the column
	schema    string // of the operators of its index, or of its type
	next, eq  string // next: > in ascending order
	direction string // the operator that sorts
}

// Import begins to take over the existing rows of tables, whose chunks then come through Batches. Run ends by itself, where it
// was told where, only when Import's own Run has ended. It is called before both. known is asked for tables of which the log has rows that
// may be gone, contents for those without a key.
func (s *Stream) Import(tables []Existing, known Known, contents Contents) *Import {
	i := &Import{stream: s, known: known, contents: contents, rate: limiter{perSecond: s.cfg.BaselineBytesPerSecond}}
	for _, t := range tables {
		i.tables = append(i.tables, &importing{imp: i, ImportState: ImportState{Baseline: t.Baseline, Table: t.Captured.String(), Compare: t.Compare, Doing: "queued", Since: time.Now()}, shape: t.ShapeOnly,
			after: t.AfterKey, number: t.Chunks, done: make(chan eventlog.Baseline, chunksAhead+1)})
	}
	s.importing.Store(len(tables) > 0)
	return i
}

// State tells how far each table is, and how fast rows are taken over and compared.
func (i *Import) State() (tables []ImportState, taking, comparing ImportRate) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, t := range i.tables {
		tables = append(tables, t.ImportState)
	}
	now := i.mark()
	if n := len(i.rates); n > 0 {
		if first := i.rates[0]; now.at.Sub(first.at) > time.Second {
			s := now.at.Sub(first.at).Seconds()
			since := func(now, first ImportRate) ImportRate {
				return ImportRate{max(0, now.Rows-first.Rows) / s, max(0, now.Weight-first.Weight) / s} // one that is read anew goes back
			}
			taking, comparing = since(now.taken, first.taken), since(now.compared, first.compared)
		}
	}
	return tables, taking, comparing
}

// mark sums up how far everything is.
func (i *Import) mark() rateMark {
	m := rateMark{at: time.Now()}
	for _, t := range i.tables {
		sum := &m.taken
		if t.Compare {
			sum = &m.compared
		}
		sum.Rows += float64(t.Rows)
		sum.Weight += t.Weight() * t.Share()
	}
	return m
}

// remaining is about how many bytes are still to be read after a chunk of a table.
func (i *Import) remaining(of *importing, c *eventlog.Chunk) (n int64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, t := range i.tables {
		if (t.Doing == "reading" || t.Doing == "comparing") && t.Pass == eventlog.PassRows && !(t == of && c.Last) {
			n += int64(float64(t.TotalBytes) * (1 - t.Share()))
		}
	}
	return n
}

func (t *importing) chunkBytes() int64 { return int64(t.imp.stream.cfg.BaselineChunkBytes) }

func (t *importing) set(f func(*ImportState)) {
	t.imp.mu.Lock()
	defer t.imp.mu.Unlock()
	if m := t.imp.mark(); len(t.imp.rates) == 0 || m.at.Sub(t.imp.rates[len(t.imp.rates)-1].at) >= time.Second {
		t.imp.rates = append(t.imp.rates, m)
		for len(t.imp.rates) > 1 && m.at.Sub(t.imp.rates[0].at) > 30*time.Second {
			t.imp.rates = t.imp.rates[1:]
		}
	}
	was := t.Doing
	if f(&t.ImportState); t.Doing != was {
		t.Since = time.Now()
	}
}

// Run takes the tables over, a few at a time, and returns when all are, or ctx ends. A table that has to wait, or that something keeps from
// it, is tried again, while others have their turn. With once, such an error is returned instead, of the first table that has one, when the
// others are done.
func (i *Import) Run(ctx context.Context, once bool) error {
	defer i.stream.importing.Store(false)
	var wg sync.WaitGroup
	for range min(i.stream.cfg.BaselineTables, len(i.tables)) {
		wg.Go(func() {
			for {
				t, wait := i.next()
				switch {
				case t != nil:
					t.run(ctx, once)
				case wait < 0:
					return
				default:
					pass(ctx, wait)
				}
				if ctx.Err() != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	states, _, _ := i.State()
	for _, s := range states {
		if s.Error != nil && ctx.Err() == nil {
			return fmt.Errorf("take over the existing rows of %s: %w", s.Table, s.Error)
		}
	}
	return nil
}

// next picks a table to go on with; without one, it tells how long to wait for it: less than 0 if there is nothing more to do.
func (i *Import) next() (*importing, time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now, wait := time.Now(), time.Duration(-1)
	for _, t := range i.tables {
		if t.over {
			continue
		}
		left := t.again.Sub(now)
		if t.busy {
			left = time.Second
		} else if left <= 0 {
			t.busy = true
			return t, 0
		}
		if left = min(left, 200*time.Millisecond); wait < 0 || left < wait {
			wait = left
		}
	}
	return nil, wait
}

// pass lets time pass.
func pass(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// run goes on with a table until it is taken over, or something keeps it from that.
func (t *importing) run(ctx context.Context, once bool) {
	before := t.number
	err := t.attempt(ctx)
	if ctx.Err() != nil {
		return
	}
	var news, over bool
	pause := waitingEvery
	switch {
	case errors.Is(err, errWaiting), errors.Is(err, ErrTablesChanged):
	case err == nil:
		over = true
		t.set(func(s *ImportState) { s.Doing, s.Error, s.For = "done", nil, nil })
	default:
		t.set(func(s *ImportState) {
			news = s.Error == nil || s.Error.Error() != err.Error()
			s.Doing, s.Error, s.For = "interrupted", err, nil
		})
		if t.pause = min(2*t.pause, time.Minute); t.pause == 0 || t.number > before {
			t.pause = time.Second
		}
		pause, over = t.pause, once && !retryable(err) && !errors.Is(err, errLocked) && !errors.Is(err, errLost) && !errors.Is(err, eventlog.ErrNotVisible) || errors.Is(err, ErrNoOrder)
	}
	if news {
		t.imp.stream.cfg.Logger.Warn("existing rows are not taken over", "relation", t.Table, "err", err, "hint", eventlog.Hint(err), "again_in", pause)
	}
	t.imp.mu.Lock()
	defer t.imp.mu.Unlock()
	t.busy, t.over, t.again = false, over, time.Now().Add(pause)
}

// attempt goes on with a table, on a connection of its own, until all is taken over.
func (t *importing) attempt(ctx context.Context) error {
	cfg := t.imp.stream.cfg
	conn, err := cfg.Connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	defer t.endScan(ctx)
	if t.Pass != eventlog.PassShape {
		if err := t.othersEnded(ctx, conn); err != nil {
			return err
		}
	}
	t.set(func(s *ImportState) {
		s.Doing, s.For = s.reads(), nil
	})
	for t.rel = nil; !t.Done; {
		if t.rel == nil {
			gone, err := t.describe(ctx, conn)
			if was := t.imp.stream.captured[t.OID].Relation; gone && err == nil && was != nil && was.Dropped {
				t.rel, gone = was, false // there is nothing to be read; only that is to get its place in the log
			}
			if err != nil || gone {
				return err
			}
			t.endScan(ctx)
		}
		if t.atOnce() && t.scan == nil {
			if err := t.beginScan(ctx, conn); errors.Is(err, errShape) {
				t.rel = nil
				continue
			} else if err != nil {
				return err
			}
		}
		if err := t.takeOver(ctx, chunksAhead); err != nil {
			return err
		}
		which := t.Pass
		c, err := t.read(ctx, conn)
		if errors.Is(err, errShape) {
			t.rel = nil
			continue
		}
		if t.patience(ctx, err) {
			continue
		}
		if err != nil {
			return err
		}
		t.imp.stream.cfg.Logger.Debug("read a chunk of existing rows", "relation", t.Table, "number", c.Number, "rows", c.Rows, "bytes", c.Bytes, "last", c.Last)
		if c.Last {
			if err := t.takeOver(ctx, 1); err != nil {
				return err
			}
			t.after = t.AfterKey // none, if there is another pass
			if which == eventlog.PassShape && (t.shape || t.rel.Dropped) {
				return nil
			}
			if which == eventlog.PassShape && !t.Done {
				t.rel = nil // it has to have an order now
				if err := t.othersEnded(ctx, conn); err != nil {
					return err
				}
			}
			if !t.Done && (t.Pass == eventlog.PassMoved || t.Pass == which) { // perhaps for a transaction that still has to become visible
				t.passes++
				t.endScan(ctx)
				pass(ctx, time.Duration(min(t.passes, 30))*time.Second)
			}
		}
		if err := t.imp.rate.wait(ctx, c.Bytes); err != nil {
			return err
		}
	}
	return nil
}

// takeOver waits until fewer than n chunks are on their way, and no more bytes than two usual ones have.
func (t *importing) takeOver(ctx context.Context, n int) error {
	for {
		var bytes int64
		for _, a := range t.ahead {
			bytes += a.bytes
		}
		if len(t.ahead) < n && bytes < 2*t.chunkBytes() {
			return nil
		}
		select {
		case b := <-t.done:
			t.ahead = t.ahead[1:]
			t.set(func(s *ImportState) { s.Baseline, s.Compare, s.Error = b, s.Compare || b.Heal, nil })
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
			// What is received beyond the mark of a chunk comes after it. Where the mark did not come, the source has failed over to a
			// server that never had it: those rows are read again.
			if a := t.ahead[0]; t.imp.stream.Received() > a.mark && len(t.done) == 0 && t.imp.stream.chunks.withdraw(a.nonce) {
				for _, a := range t.ahead[1:] {
					t.imp.stream.chunks.withdraw(a.nonce)
				}
				t.ahead, t.number, t.after = nil, t.Chunks, t.AfterKey
				return errLost
			}
		}
	}
}

// ahead is a chunk that is on its way.
type ahead struct {
	nonce string
	bytes int64
	mark  eventlog.LSN // behind its mark
}

// waitingEvery is how often it is looked whether transactions have ended.
const waitingEvery = 500 * time.Millisecond

var errWaiting = errors.New("transactions are open that were so when the table was taken in")

// othersEnded returns errWaiting until the transactions that had begun when the table was taken in have ended: what they wrote before that
// is not in the stream, and only then visible.
func (t *importing) othersEnded(ctx context.Context, conn *pgx.Conn) error {
	who, open, err := openBefore(ctx, conn, t.WaitFor)
	if err != nil || !open {
		return err
	}
	first := false
	t.set(func(s *ImportState) { first, s.Doing, s.For = s.Doing != "waiting", "waiting", who })
	if first {
		t.imp.stream.cfg.Logger.Info("existing rows are taken over when the transactions have ended that were open when the table was taken in", "relation", t.Table, "waiting_for", strings.Join(who, "; "))
	}
	return errWaiting
}

// openBefore tells whether there are open transactions below a number, and which.
func openBefore(ctx context.Context, conn *pgx.Conn, next int64) (who []string, open bool, err error) {
	var oldest int64
	if err := conn.QueryRow(ctx, `SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint`).Scan(&oldest); err != nil {
		return nil, false, fmt.Errorf("ask the source for its transactions: %w", err)
	}
	if oldest >= next {
		return nil, false, nil
	}
	rows, err := conn.Query(ctx, `
		SELECT format('pid %s, %s, open for %s', pid, coalesce(nullif(application_name, ''), usename), date_trunc('second', clock_timestamp() - xact_start))
		FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND age(backend_xid) >= age(($1::bigint & 4294967295)::text::xid) AND pid <> pg_backend_pid()
		UNION ALL
		SELECT format('prepared transaction %L, open for %s', gid, date_trunc('second', clock_timestamp() - prepared)) FROM pg_prepared_xacts
		WHERE age(transaction) >= age(($1::bigint & 4294967295)::text::xid)`, next-1)
	if err != nil {
		return nil, false, fmt.Errorf("ask the source for its transactions: %w", err)
	}
	if who, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
		return nil, false, fmt.Errorf("ask the source for its transactions: %w", err)
	}
	return who, true, nil
}

// errShape means that the table is not as it was described.
var errShape = errors.New("the table was altered")

// ErrNoOrder means that a table has no key by which its rows could be read in order.
var ErrNoOrder = errors.New("it has no key by which its rows could be read in order")

// describe looks the table up. It is gone if it was dropped.
func (t *importing) describe(ctx context.Context, conn *pgx.Conn) (gone bool, err error) {
	r := &eventlog.Relation{OID: t.OID}
	var identity string
	err = conn.QueryRow(ctx, `SELECT n.nspname, c.relname, c.relreplident::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1::bigint::oid`, int64(t.OID)).
		Scan(&r.Schema, &r.Name, &identity)
	if errors.Is(err, pgx.ErrNoRows) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read the catalogue: %w", err)
	}
	r.ReplicaIdentity = identity[0]
	t.name, t.schema, t.table = eventlog.QuoteQualified(r.Schema, r.Name), r.Schema, r.Name
	err = conn.QueryRow(ctx, t.fingerprintQuery()).Scan(&t.print, new(string)) // before the rest, lest it be altered meanwhile
	if errors.Is(err, pgx.ErrNoRows) {                                         // it has another name by now
		return false, errShape
	}
	if err != nil {
		return false, fmt.Errorf("read the catalogue: %w", err)
	}
	if !strings.HasPrefix(t.print, fmt.Sprintf("%d/", t.OID)) { // another one has its name by now
		return false, errShape
	}
	if err := describe(ctx, conn, r, nil, 0); err != nil {
		return false, err
	}
	was := t.imp.stream.captured[t.OID]
	if t.Pass != eventlog.PassShape && !eventlog.SameKeyColumns(was.Relation, r) {
		// How far the reading is tells the key of before, and so does the log. That it has another one is to be recorded first.
		err := fmt.Errorf("%w: %s has another key", ErrTablesChanged, r)
		t.imp.stream.stopped.Store(&stop{err: err})
		return false, err
	}
	r.InsertOnly, r.Complete, r.Generation = was.InsertOnly, was.Complete && !t.Heal, t.Generation
	knownMissing(r, was.Relation, false)
	if t.order = nil; len(r.Key) > 0 || t.Pass == eventlog.PassShape {
		if err := t.findOrder(ctx, conn, r); err != nil {
			return false, err
		}
	}
	var names []string
	for _, c := range r.Columns {
		names = append(names, eventlog.QuoteIdent(c.Name))
	}
	t.columns, t.rel = strings.Join(names, ", "), r
	if t.limit == 0 { // what a row takes is an estimate: the first chunk is a small one
		t.limit = 200
		if t.TotalRows > 0 && t.TotalBytes > 0 {
			t.limit = int(min(max(t.chunkBytes()/4/(t.TotalBytes/t.TotalRows+1), 1), 2000))
		}
	}
	return false, nil
}

// findOrder finds the key by which a table's rows are read in order. An index that is not a btree, as that of WITHOUT OVERLAPS, has no order: that
// is then the one that Postgres takes for the column's type where nobody names one (PostgreSQL manual, Operator Classes and Operator Families).
func (t *importing) findOrder(ctx context.Context, conn *pgx.Conn, r *eventlog.Relation) error {
	rows, err := conn.Query(ctx, `
		SELECT a.attname, format_type(a.atttypid, a.atttypmod), coalesce(n.nspname, ''), coalesce(o.amopstrategy, 0), coalesce(p.oprname, ''), k.option & 1, coalesce(quote_ident(cn.nspname) || '.' || quote_ident(co.collname), '')
		FROM (SELECT i.* FROM pg_index i WHERE i.indrelid = $1::bigint::oid AND i.indisunique AND (i.indisprimary OR i.indisreplident) ORDER BY i.indisprimary DESC LIMIT 1) i
		CROSS JOIN LATERAL unnest(i.indkey[0:i.indnkeyatts - 1]::int2[], i.indclass::oid[], i.indoption::int2[], i.indcollation::oid[]) WITH ORDINALITY k(num, class, option, coll, ord)
		JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.num
		LEFT JOIN (pg_collation co JOIN pg_namespace cn ON cn.oid = co.collnamespace) ON co.oid = k.coll AND k.coll <> a.attcollation
		LEFT JOIN LATERAL (
		  WITH RECURSIVE base AS (SELECT y.* FROM pg_type y WHERE y.oid = a.atttypid UNION ALL SELECT y.* FROM base b JOIN pg_type y ON y.oid = b.typbasetype WHERE b.typtype = 'd')
		  SELECT c.opcfamily, c.opcintype FROM pg_opclass c JOIN pg_am m ON m.oid = c.opcmethod AND m.amname = 'btree' JOIN pg_type y ON y.oid = c.opcintype CROSS JOIN (SELECT * FROM base WHERE typtype <> 'd') b
		  WHERE c.oid = k.class OR c.opcdefault AND NOT EXISTS (SELECT FROM pg_opclass own WHERE own.oid = k.class AND own.opcmethod = m.oid) AND (c.opcintype = b.oid
		    OR c.opcintype = CASE WHEN b.typtype = 'e' THEN 'anyenum'::regtype WHEN b.typtype = 'r' THEN 'anyrange'::regtype WHEN b.typtype = 'm' THEN 'anymultirange'::regtype
		      WHEN b.typtype = 'c' THEN 'record'::regtype WHEN b.typcategory = 'A' THEN 'anyarray'::regtype END
		    OR EXISTS (SELECT FROM pg_cast x WHERE x.castsource = b.oid AND x.casttarget = c.opcintype AND x.castmethod = 'b' AND x.castcontext = 'i'))
		  ORDER BY c.opcintype = b.oid DESC, y.typispreferred DESC LIMIT 1) c ON true
		LEFT JOIN pg_amop o ON o.amopfamily = c.opcfamily AND o.amoplefttype = c.opcintype AND o.amoprighttype = c.opcintype AND o.amopstrategy IN (1, 3, 5)
		LEFT JOIN pg_operator p ON p.oid = o.amopopr LEFT JOIN pg_namespace n ON n.oid = p.oprnamespace
		ORDER BY k.ord, o.amopstrategy`, int64(t.OID))
	if err != nil {
		return fmt.Errorf("read the key of %s: %w", r, err)
	}
	defer rows.Close()
	for rows.Next() {
		var name, typ, schema, op, collation string
		var strategy, desc int16
		if err := rows.Scan(&name, &typ, &schema, &strategy, &op, &desc, &collation); err != nil {
			return fmt.Errorf("read the key of %s: %w", r, err)
		}
		i := slices.IndexFunc(r.Columns, func(c eventlog.Column) bool { return c.Name == name })
		if i < 0 && t.Pass == eventlog.PassShape {
			continue
		}
		if i < 0 { // generated, and not in the stream: neither is it in the log
			return ErrNoOrder
		}
		if strategy == 0 && t.Pass == eventlog.PassShape {
			continue
		}
		if strategy == 0 {
			return &eventlog.Problem{Err: fmt.Errorf("%w: there is none for %s, the type of %s", ErrNoOrder, typ, eventlog.QuoteIdent(name)),
				Hint: "The table's changes are captured all the same. Its existing rows can be read when there is a default operator class of that type for btree (CREATE OPERATOR CLASS)."}
		}
		if n := len(t.order); n == 0 || t.order[n-1].index != i {
			t.order = append(t.order, keyColumn{name: eventlog.QuoteIdent(name), index: i, typ: typ, schema: eventlog.QuoteIdent(schema)})
		}
		k := &t.order[len(t.order)-1]
		if collation != "" {
			k.collate = " COLLATE " + collation
		}
		switch {
		case strategy == 3:
			k.eq = op
		case strategy == 1 && desc == 0, strategy == 5 && desc == 1:
			k.direction = op
		default:
			k.next = op
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read the key of %s: %w", r, err)
	}
	if len(t.order) == 0 && t.Pass != eventlog.PassShape {
		return ErrNoOrder
	}
	return nil
}

// fingerprintQuery changes whenever a table's columns, indexes or names do, or the partitioned table that it is a part of.
func (t *importing) fingerprintQuery() string {
	return `SELECT concat_ws('/', c.oid, c.xmin, (SELECT string_agg(xmin::text, ',' ORDER BY attnum) FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0),
		(SELECT string_agg(xmin::text, ',' ORDER BY indexrelid) FROM pg_index WHERE indrelid = c.oid),
		(SELECT rc.relnamespace || '.' || rc.relname FROM pg_class rc WHERE c.relispartition AND rc.oid = pg_partition_root(c.oid))) AS ` + fingerprintName + `, pg_current_snapshot()::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ` + literal(t.schema) + ` AND c.relname = ` + literal(t.table)
}

const fingerprintName = "backstory_fingerprint"

// literal quotes a string whatever standard_conforming_strings is.
func literal(s string) string {
	return ` E'` + strings.NewReplacer(`\`, `\\`, `'`, `''`).Replace(s) + `'`
}

// query selects the next rows in the order of the key.
func (t *importing) query() string {
	var b strings.Builder
	fmt.Fprintf(&b, "SELECT %s FROM ONLY %s", t.columns, t.name)
	if t.after != nil {
		b.WriteString(" WHERE ")
		same := true
		for _, k := range t.order {
			same = same && k.schema == t.order[0].schema && k.next == t.order[0].next
		}
		op := func(k keyColumn, op string) string { return " OPERATOR(" + k.schema + "." + op + ") " }
		value := func(i int) string { return literal(t.after[i]) + "::" + t.order[i].typ }
		if same {
			var names, values []string
			for i, k := range t.order {
				names, values = append(names, k.name+k.collate), append(values, value(i))
			}
			b.WriteString("ROW(" + strings.Join(names, ", ") + ")" + op(t.order[0], t.order[0].next) + "ROW(" + strings.Join(values, ", ") + ")")
		} else {
			for i := range t.order {
				if i > 0 {
					b.WriteString(" OR ")
				}
				for j, k := range t.order[:i+1] {
					if j > 0 {
						b.WriteString(" AND ")
					}
					if j < i {
						b.WriteString(k.name + k.collate + op(k, k.eq) + value(j))
					} else {
						b.WriteString(k.name + k.collate + op(k, k.next) + value(j))
					}
				}
			}
		}
	}
	b.WriteString(" ORDER BY ")
	for i, k := range t.order {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(k.name + k.collate + " USING OPERATOR(" + k.schema + "." + k.direction + ")")
	}
	fmt.Fprintf(&b, " LIMIT %d", t.limit)
	return b.String()
}

// read reads the next chunk and leaves its mark. All of it is one transaction, of which the lock on the table comes first: the table
// keeps its shape until the mark is in the WAL, and is not rewritten, which a snapshot does not survive (PostgreSQL manual, Caveats of
// concurrency control).
func (t *importing) read(ctx context.Context, conn *pgx.Conn) (*eventlog.Chunk, error) {
	var c *eventlog.Chunk
	var err error
	switch {
	case t.rel.Dropped:
		c = &eventlog.Chunk{Last: true}
		_, err = conn.PgConn().Exec(ctx, "BEGIN").ReadAll()
	case t.Pass == eventlog.PassShape:
		c = &eventlog.Chunk{Last: true}
		err = t.begin(ctx, conn, nothing, &c.Snapshot, func([][]byte) bool { return true })
	case t.Pass == eventlog.PassGone:
		c, err = t.readGone(ctx, conn)
	default:
		read := t.readRows
		if t.keyless() {
			read = t.readContents
		}
		c, err = read(ctx, conn)
		for errors.Is(err, errTooMuch) {
			c, err = read(ctx, conn)
		}
		if err == nil && c.Rows > 0 && !t.keyless() {
			t.limit = int(min(max(t.chunkBytes()/(c.Bytes/int64(c.Rows)+1), 1), int64(4*t.limit), maxChunkRows))
		}
	}
	if err != nil {
		return nil, err
	}
	return c, t.mark(ctx, conn, c)
}

// mark leaves a chunk's mark in the WAL and ends its transaction.
func (t *importing) mark(ctx context.Context, conn *pgx.Conn, c *eventlog.Chunk) error {
	c.Number, c.Relation, c.Remaining = t.number+1, t.rel, t.imp.remaining(t, c)
	var nonce [16]byte
	_, _ = rand.Read(nonce[:])
	name, known := hex.EncodeToString(nonce[:]), &t.imp.stream.chunks
	c.Done = func(b eventlog.Baseline) {
		known.forget(name)
		t.done <- b // which has room for all that are on their way
	}
	known.offer(name, c)
	answer, err := conn.PgConn().Exec(ctx, "SELECT pg_catalog.pg_logical_emit_message(true, '"+chunkPrefix+"', '"+name+"'); COMMIT; SELECT pg_current_wal_insert_lsn()").ReadAll()
	if err != nil && known.withdraw(name) {
		return fmt.Errorf("mark a chunk of existing rows: %w", err) // the stream will not know the mark, if there is one
	}
	t.number, t.after = c.Number, c.AfterKey
	a := ahead{nonce: name, bytes: c.Bytes, mark: 1<<64 - 1}
	if err == nil && len(answer) > 0 {
		if a.mark, err = eventlog.ParseLSN(string(answer[len(answer)-1].Rows[0][0])); err != nil {
			return err
		}
	}
	t.ahead = append(t.ahead, a)
	return nil
}

func (t *importing) keyIndexes() []int {
	out := make([]int, len(t.order))
	for i, k := range t.order {
		out[i] = k.index
	}
	return out
}

var (
	errLocked = errors.New("is locked by somebody else's ALTER TABLE or the like")
	errLost   = errors.New("the source has lost the place of a chunk in its WAL: it has failed over")
)

var errTooMuch = errors.New("a chunk holds more than expected")

// readGone finds out which of the next rows that the log has the source does not have any more, in a transaction that is left open.
func (t *importing) readGone(ctx context.Context, conn *pgx.Conn) (*eventlog.Chunk, error) {
	const limit = 2000
	keys, next, err := t.imp.known(ctx, t.rel, t.after, limit)
	if err != nil {
		return nil, err
	}
	c := &eventlog.Chunk{Last: len(keys) < limit, AfterKey: next}
	if t.keyless() {
		c.Since, c.Known, t.scan.read = t.scan.since, t.scan.known, true
		_ = t.scan.holder.Close(context.WithoutCancel(ctx))
	}
	there := make([]bool, len(keys))
	for _, byText := range []bool{false, true} {
		query := nothing
		if len(keys) > 0 && len(t.rel.Key) > 0 {
			if query, err = t.goneQuery(keys, byText); err != nil {
				return nil, err
			}
		}
		clear(there)
		err = t.begin(ctx, conn, query, &c.Snapshot, func(v [][]byte) bool {
			n, _ := strconv.Atoi(string(v[0]))
			there[n] = true
			return true
		})
		// A key of before is none of the type that it has now: a data exception, what a domain checks, what a type's parser says.
		if state := eventlog.SQLState(err); err == nil || !(strings.HasPrefix(state, "22") || strings.HasPrefix(state, "23") || state == "42601") {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	for n := range keys {
		if !there[n] {
			c.AddKey(&keys[n])
		}
	}
	return c, nil
}

// goneQuery asks which of the keys are there: found by the key's own operators, unless byText is set, and printed as the log has them.
func (t *importing) goneQuery(keys []eventlog.Key, byText bool) (string, error) {
	var b strings.Builder
	b.WriteString("SELECT v.n FROM (VALUES ")
	for n, k := range keys {
		if len(k.Columns) != len(t.rel.Key) {
			return "", fmt.Errorf("the log has a row of %s under a key of %d columns, its key has %d", t.name, len(k.Columns), len(t.rel.Key))
		}
		if n > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "(%d", n)
		for i, v := range k.Columns {
			b.WriteString("," + literal(v) + "::pg_catalog.text")
			if !byText {
				b.WriteString("," + literal(v) + "::" + t.rel.Columns[t.rel.Key[i]].Type.Name)
			}
		}
		b.WriteString(")")
	}
	b.WriteString(") v(n")
	for i := range t.rel.Key {
		fmt.Fprintf(&b, ", t%d", i)
		if !byText {
			fmt.Fprintf(&b, ", k%d", i)
		}
	}
	b.WriteString(") WHERE EXISTS (SELECT FROM ONLY " + t.name + " t WHERE ")
	for i, c := range t.rel.Key {
		if i > 0 {
			b.WriteString(" AND ")
		}
		o := t.order[slices.IndexFunc(t.order, func(k keyColumn) bool { return k.index == c })]
		if !byText {
			fmt.Fprintf(&b, "t.%s%s OPERATOR(%s.%s) v.k%d AND ", o.name, o.collate, o.schema, o.eq, i)
		}
		fmt.Fprintf(&b, "(pg_catalog.format('%%s', t.%s) COLLATE pg_catalog.\"C\") OPERATOR(pg_catalog.=) v.t%d", o.name, i)
	}
	b.WriteString(")")
	return b.String(), nil
}

// readRows reads the rows of a chunk, in a transaction that is left open.
func (t *importing) readRows(ctx context.Context, conn *pgx.Conn) (*eventlog.Chunk, error) {
	c := &eventlog.Chunk{}
	err := t.begin(ctx, conn, t.query(), &c.Snapshot, func(v [][]byte) bool {
		c.Add(v)
		if c.Bytes > 4*t.chunkBytes() && c.Rows < t.limit {
			t.limit = max(1, c.Rows/4)
			return false
		}
		return true
	})
	c.Last = c.Rows < t.limit
	if c.AfterKey = t.after; c.Rows > 0 {
		c.AfterKey = c.Key(t.keyIndexes())
	}
	return c, err
}

// nothing is a query for no row.
const nothing = "SELECT 0 WHERE false"

// begin begins a chunk's transaction and reads the rows of a query in it, until take does not want any more: that is errTooMuch. Where there
// is no error, the transaction is left open.
func (t *importing) begin(ctx context.Context, conn *pgx.Conn, query string, snapshot *string, take func([][]byte) bool) (err error) {
	pc := conn.PgConn()
	defer func() {
		if err != nil && !conn.IsClosed() {
			_, _ = pc.Exec(context.WithoutCancel(ctx), "ROLLBACK").ReadAll()
		}
	}()
	lock := "LOCK TABLE ONLY " + t.name + " IN ACCESS SHARE MODE; "
	if t.Pass == eventlog.PassShape { // no row is read, which needs a right; what is altered meanwhile is found by the next look
		lock = ""
	}
	const isolation = "BEGIN ISOLATION LEVEL REPEATABLE READ READ WRITE; "
	prepare := "SET LOCAL synchronous_commit = local; SET LOCAL lock_timeout = '" + chunkLock + "'; " + lock
	var print string
	var results *pgconn.MultiResultReader
	if s := t.scan; s == nil || s.read || !s.begun {
		results = pc.Exec(ctx, isolation+prepare+t.fingerprintQuery()+"; "+query)
	} else if _, err := pc.Exec(ctx, isolation+"SET TRANSACTION SNAPSHOT '"+s.name+"'; "+prepare).ReadAll(); err != nil {
		return t.unread(conn, err)
	} else if err := s.look.QueryRow(ctx, t.fingerprintQuery()).Scan(&print, new(string)); err != nil { // as it is now, while nobody can alter it
		return t.unread(conn, err)
	} else {
		*snapshot = s.snapshot
		results = pc.Exec(ctx, query)
	}
	for results.NextResult() {
		rows := results.ResultReader()
		names := rows.FieldDescriptions()
		for rows.NextRow() {
			v := rows.Values()
			if names[0].Name == fingerprintName {
				print, *snapshot = string(v[0]), string(v[1])
				continue
			}
			if !take(v) {
				err = errTooMuch
				_ = pc.CancelRequest(ctx)
				break
			}
		}
		if err != nil {
			break
		}
	}
	if e := results.Close(); err != nil {
		return err
	} else if e != nil {
		return t.unread(conn, e)
	}
	if print != t.print {
		return errShape
	}
	return nil
}

// unread tells why rows could not be read.
func (t *importing) unread(conn *pgx.Conn, e error) error {
	if errors.Is(e, pgx.ErrNoRows) { // it has another name by now
		return errShape
	}
	switch eventlog.SQLState(e) {
	case "42P01", "42703": // undefined_table, undefined_column
		return errShape
	case "55P03": // lock_not_available
		return &eventlog.Problem{Err: fmt.Errorf("%s %w", t.name, errLocked), Hint: "Its existing rows are read when that is over."}
	case "54000", "XX000": // program_limit_exceeded of the row, or what palloc says of a value: text is longer than 1 GB
		if eventlog.SQLState(e) == "54000" || strings.Contains(e.Error(), "alloc") {
			return &eventlog.Problem{Err: fmt.Errorf("a row of %s is too large for the source itself to print: %w", t.name, e), Hint: "Make its values smaller, or leave the table out (BACKSTORY_EXCLUDE, backstory init). Its changes are captured all the same."}
		}
	case "42501": // insufficient_privilege, row security too
		if strings.Contains(e.Error(), "row-level security") {
			return &eventlog.Problem{Err: e, Hint: "Let a superuser run: ALTER ROLE " + eventlog.QuoteIdent(conn.Config().User) + " BYPASSRLS;"}
		}
		if strings.Contains(e.Error(), "for schema") {
			return &eventlog.Problem{Err: e, Hint: "Let the schema's owner run: GRANT USAGE ON SCHEMA " + eventlog.QuoteIdent(t.rel.Schema) + " TO " + eventlog.QuoteIdent(conn.Config().User) + "; (and for the table: GRANT SELECT ON " + t.name + ")"}
		}
		return &eventlog.Problem{Err: e, Hint: "Let the table's owner run: GRANT SELECT ON " + t.name + " TO " + eventlog.QuoteIdent(conn.Config().User) + ";"}
	}
	return fmt.Errorf("read existing rows of %s: %w", t.name, e)
}

// chunks are those that are read and whose mark has not been met, by their nonces.
type chunks struct {
	mu    sync.Mutex // guards the following
	known map[string]*offered
}

type offered struct {
	*eventlog.Chunk
	taken bool
}

func (c *chunks) offer(nonce string, chunk *eventlog.Chunk) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil {
		c.known = map[string]*offered{}
	}
	c.known[nonce] = &offered{Chunk: chunk}
}

// take finds the chunk of a mark, nil if it is somebody else's or of another time. It may be met again, if the stream is cut.
func (c *chunks) take(nonce []byte) *eventlog.Chunk {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.known[string(nonce)]
	if o == nil {
		return nil
	}
	o.taken = true
	return o.Chunk
}

// withdraw forgets a chunk, unless the stream has met its mark: then it is false.
func (c *chunks) withdraw(nonce string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if o := c.known[nonce]; o == nil || o.taken {
		return false
	}
	delete(c.known, nonce)
	return true
}

// forget forgets a chunk that the log has.
func (c *chunks) forget(nonce string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.known, nonce)
}

// limiter holds reading down to a number of bytes in a second, over all tables.
type limiter struct {
	perSecond int64
	mu        sync.Mutex // guards the following
	next      time.Time
}

func (l *limiter) wait(ctx context.Context, bytes int64) error {
	if l.perSecond <= 0 {
		return nil
	}
	l.mu.Lock()
	now := time.Now()
	if l.next.Before(now) {
		l.next = now
	}
	l.next = l.next.Add(time.Duration(float64(bytes) / float64(l.perSecond) * float64(time.Second)))
	until := l.next
	l.mu.Unlock()
	select {
	case <-time.After(time.Until(until)):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
