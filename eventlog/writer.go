package eventlog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
)

// Sizes that bound the writer's memory and the log's transactions.
const (
	// flushBytes is how much is gathered before it is written although the batch has not ended: a log transaction stays
	// far below logical_decoding_work_mem, so that the source's own decoding never spills because of us.
	flushBytes = 2 << 20
	// gatherBytes is how much is gathered before it is written while much more is to come.
	gatherBytes = 1 << 20
	// progressEvery is how often progress without events is recorded at most.
	progressEvery = 10 * time.Second
	// progressBytes of WAL without events are recorded sooner.
	progressBytes = 16 << 20
	// bulkBytes of backlog make a fresh partition wait for its indexes; it gets them when the backlog is below bulkEndBytes.
	bulkBytes    = 64 << 20
	bulkEndBytes = 8 << 20
	// bulkEvents is how large such a partition is at most: until it is full, whoever reads from it reads all of it.
	bulkEvents = 1 << 20
	// restBytes: an update carries its unchanged attributes if they are at most so many bytes …
	restBytes = 256
	// … or if it would be the restChain-th event in a row that does not.
	restChain = 16
)

// Writer appends to the log. There is one at a time: a new one fences the one before by the epoch in the head. It belongs to
// one goroutine, but Head, Wait and Stats may be called by any.
type Writer struct {
	log   *Log
	conn  *pgx.Conn
	reads *pgx.Conn // for look-ups, which need not wait for what is on its way; opened when it is needed
	slog  *slog.Logger

	head    Head     // as in the database, when what is on its way has arrived
	pos     Position // of the last event made
	seal    []byte   // chain, up to the last flush
	flight  *flight  // what is on its way to the database; nil: nothing
	failed  error    // why nothing more can be appended
	evicted *flight  // what was on its way when the cache last forgot something
	endLSN  LSN      // everything before it is in the log once what is gathered is flushed
	commit  LSN
	whole   Position // of the last event of the last whole transaction
	when    time.Time
	tl      uint32
	tx      openTx
	parts   []*partition
	tables  map[*Relation]*table
	latest  map[uint32]*table  // by OID: the present shape
	sources map[uint32]*source // by timeline
	cur     *source
	state   *stateCache

	rows     []byte   // gathered events in COPY's binary form
	spare    []byte   // memory for the next ones
	wholeEnd int      // where in rows the open transaction begins
	contexts []ctxRow // of whole transactions; when a part is written, those of the open one that are closed
	ctxBytes int      // of contexts gathered
	news     []newRow // rows for the small tables
	nextIDs  struct{ source, relation, aggregate, kind int }
	scratch  scratch
	lastOut  time.Time // of the last flush
	lastDML  LSN
	backlog  LSN // of the last batch

	published atomic.Pointer[Head]
	seen      atomic.Uint64
	mu        sync.Mutex // guards the following
	changed   chan struct{}

	stats Stats
	made  Counts // since the last step that moved the head; counted when the next one does
}

// Stats counts what a writer has done since it began.
type Stats struct {
	Events, Transactions, Flushes atomic.Int64
	// Unattributed counts the events without who and why.
	Unattributed atomic.Int64
	// FirstSeen counts rows that existed before the log first saw them.
	FirstSeen atomic.Int64
	// MalformedContext counts context messages that are not a JSON object.
	MalformedContext atomic.Int64
	// Bytes counts the bytes sent to the log.
	Bytes atomic.Int64
	// Lookups counts rows whose last state was read from the log.
	Lookups atomic.Int64
}

// add counts what is durable now.
func (s *Stats) add(c *Counts) {
	s.Events.Add(c.Events)
	s.Transactions.Add(c.Transactions)
	s.Unattributed.Add(c.Unattributed)
	s.FirstSeen.Add(c.FirstSeen)
	s.MalformedContext.Add(c.MalformedContext)
	*c = Counts{}
}

// Counts is what Stats stood at.
type Counts struct {
	Events, Transactions, Flushes, Unattributed, FirstSeen, MalformedContext, Bytes, Lookups int64
}

// Counts reads the counters.
func (s *Stats) Counts() Counts {
	return Counts{s.Events.Load(), s.Transactions.Load(), s.Flushes.Load(), s.Unattributed.Load(), s.FirstSeen.Load(), s.MalformedContext.Load(), s.Bytes.Load(), s.Lookups.Load()}
}

// Add adds what another writer counted.
func (c *Counts) Add(o Counts) {
	c.Events += o.Events
	c.Transactions += o.Transactions
	c.Flushes += o.Flushes
	c.Unattributed += o.Unattributed
	c.FirstSeen += o.FirstSeen
	c.MalformedContext += o.MalformedContext
	c.Bytes += o.Bytes
	c.Lookups += o.Lookups
}

// openTx is the source transaction that is coming in.
type openTx struct {
	open, skip bool
	xid        uint32
	lsn        LSN
	at         int64 // commit time, microseconds since 2000
	time       time.Time
	change     int64
	first      Position // of its first event
	ranges     []ctxRow // closed and open ranges of context
	context    []byte   // what applies now; nil before the first message
}

type ctxRow struct {
	first, last Position
	meta        []byte
}

// newRow is a row for one of the small tables, written and sealed with the events that use it first.
type newRow struct {
	table smallTable
	args  []any
}

// table is what the writer knows of one version of a table.
type table struct {
	rel      *Relation
	id       int
	rules    *tableRules
	agg      *aggregate
	keys     [][]byte // `"name":` of each column
	identity []int    // the columns by which the source names a row
	byRow    bool     // identity is not the key: state is looked up by row_id
	intKey   bool
	kinds    map[kindKey]int32
	since    map[int][]bool // see columnsSince
}

type kindKey struct {
	source int
	op     Op
	typ    string
}

// NewWriter takes over the log: whoever wrote before is fenced, and what a transaction left unfinished is removed.
func (l *Log) NewWriter(ctx context.Context) (*Writer, error) {
	w := &Writer{log: l, slog: l.log, tables: map[*Relation]*table{}, latest: map[uint32]*table{}, sources: map[uint32]*source{},
		changed: make(chan struct{})}
	w.scratch = scratch{key: []byte{}, oldKey: []byte{}, rowKey: []byte{}} // never nil: an empty key is not an absent one
	w.state = newStateCache(l.cfg.MaxCacheBytes)
	var err error
	if w.conn, err = w.connect(ctx, "backstory writer"); err != nil {
		return nil, err
	}
	if err := w.begin(ctx); err != nil {
		_ = w.conn.Close(context.WithoutCancel(ctx))
		return nil, err
	}
	return w, nil
}

func (w *Writer) connect(ctx context.Context, name string) (*pgx.Conn, error) {
	cfg, err := ConnConfig(w.log.cfg.URL, name)
	if err != nil {
		return nil, err
	}
	cfg.DefaultQueryExecMode = pgx.QueryExecModeCacheStatement
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to the event log: %w", ConnError(err))
	}
	return conn, nil
}

// Close ends the writer's connections.
func (w *Writer) Close(ctx context.Context) error {
	if w.failed == nil {
		w.failed = errClosed
	}
	if f := w.flight; f != nil {
		_ = w.conn.PgConn().Conn().SetDeadline(time.Now()) // whatever it waits for
		<-f.done
		w.flight = nil
	}
	if w.reads != nil {
		_ = w.reads.Close(ctx)
	}
	return w.conn.Close(ctx)
}

var errClosed = errors.New("the writer is closed")

func (w *Writer) begin(ctx context.Context) error {
	// A role or database setting must not weaken the promise that what is confirmed is durable.
	if _, err := w.conn.Exec(ctx, `SELECT set_config('synchronous_commit', 'on', false)
		WHERE current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')`); err != nil {
		return fmt.Errorf("set synchronous_commit: %w", err)
	}
	var ro string
	if err := w.conn.QueryRow(ctx, `SELECT CASE WHEN pg_is_in_recovery() THEN 'its server is a standby' WHEN current_setting('transaction_read_only')::bool THEN 'default_transaction_read_only is on' ELSE '' END`).Scan(&ro); err != nil {
		return fmt.Errorf("ask the log's server: %w", err)
	}
	if ro != "" {
		return &Problem{fmt.Errorf("%w: %s", ErrReadOnly, ro), readOnlyHint}
	}
	if err := w.endOthers(ctx); err != nil {
		return fmt.Errorf("take over the event log: %w", err)
	}
	var epoch int64
	if err := w.conn.QueryRow(ctx, `UPDATE backstory.head SET epoch = epoch + 1, updated_at = now() RETURNING epoch`).Scan(&epoch); err != nil {
		if errors.Is(err, pgx.ErrNoRows) {
			return noSource
		}
		return fmt.Errorf("take over the event log: %w", err)
	}
	if err := w.reload(ctx); err != nil {
		return err
	}
	if w.head.Epoch != epoch {
		return fenced
	}
	var err error
	if w.parts, err = w.log.partitions(ctx, w.conn); err != nil {
		return err
	}
	if err := w.cleanUp(ctx); err != nil {
		return err
	}
	q := `SELECT (SELECT coalesce(max(id), 0) FROM backstory.source), (SELECT coalesce(max(id), 0) FROM backstory.relation),
		(SELECT coalesce(max(id), 0) FROM backstory.aggregate), (SELECT coalesce(max(id), 0) FROM backstory.kind)`
	n := &w.nextIDs
	if err := w.conn.QueryRow(ctx, q).Scan(&n.source, &n.relation, &n.aggregate, &n.kind); err != nil {
		return fmt.Errorf("read the log's dictionary: %w", err)
	}
	if err := w.log.dict.reload(ctx); err != nil {
		return err
	}
	return w.createViews(ctx)
}

// createViews makes the views that a crash left unmade.
func (w *Writer) createViews(ctx context.Context) error {
	d := w.log.dict
	d.mu.Lock()
	var aggs []*aggregate
	for _, a := range d.aggregates {
		aggs = append(aggs, a)
	}
	d.mu.Unlock()
	for _, a := range aggs {
		var there bool
		if err := w.conn.QueryRow(ctx, `SELECT to_regclass('backstory.' || quote_ident($1)) IS NOT NULL`, viewName(a)).Scan(&there); err != nil {
			return fmt.Errorf("look for the view of %s: %w", a.name, err)
		}
		if !there {
			if err := w.log.createView(ctx, w.conn, a); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *Writer) reload(ctx context.Context) error {
	h, err := readHead(ctx, w.conn)
	if err != nil {
		return err
	}
	w.head = *h
	w.pos, w.whole, w.seal, w.endLSN, w.commit, w.when, w.tl = h.Position, h.Position, h.Seal, h.EndLSN, h.CommitLSN, h.OccurredAt, h.Timeline
	w.publish(w.head)
	return nil
}

// cleanUp removes what an unfinished source transaction left beyond the head; it comes again from the source.
func (w *Writer) cleanUp(ctx context.Context) error {
	if w.head.Written > w.head.Position {
		w.slog.Info("removing an unfinished transaction from the log", "position", w.head.Position, "written", w.head.Written)
	}
	err := pgx.BeginFunc(ctx, w.conn, func(tx pgx.Tx) error {
		if err := w.mine(ctx, tx); err != nil { // otherwise beyond the head is what another one is writing
			return err
		}
		if _, err := tx.Exec(ctx, `SET LOCAL backstory.maintenance = 'on'`); err != nil {
			return err
		}
		if w.head.Written > w.head.Position {
			for _, p := range w.parts {
				var err error
				switch {
				case p.first > w.head.Position:
					_, err = tx.Exec(ctx, `TRUNCATE backstory.`+p.name())
				case p.last > w.head.Position:
					_, err = tx.Exec(ctx, `DELETE FROM backstory.`+p.name()+` WHERE position > $1`, w.head.Position)
				}
				if err != nil {
					return err
				}
			}
		}
		for _, t := range []string{"context", "kind", "aggregate", "relation", "source"} {
			if _, err := tx.Exec(ctx, `DELETE FROM backstory.`+t+` WHERE sealed_at > $1`, w.head.Position); err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, `UPDATE backstory.head SET written = position WHERE epoch = $1`, w.head.Epoch)
		return err
	})
	if err != nil {
		return fmt.Errorf("remove an unfinished transaction from the log: %w", err)
	}
	w.head.Written = w.head.Position
	w.publish(w.head)
	return nil
}

// mine makes sure, until the transaction ends, that nobody has taken over.
func (w *Writer) mine(ctx context.Context, tx pgx.Tx) error {
	var mine bool
	if err := tx.QueryRow(ctx, `SELECT epoch = $1 FROM backstory.head FOR UPDATE`, w.head.Epoch).Scan(&mine); err != nil {
		return err
	}
	if !mine {
		return fenced
	}
	return nil
}

// writerLock is the advisory lock by which the session of a writer is found.
const writerLock = `backstory.key_hash('backstory writer')`

// endOthers ends the sessions of writers before this one. The epoch keeps them from appending; but one whose process sleeps or
// whose machine is gone may hold locks, in a transaction that it will not end, and the server would wait for it for hours. A
// session of another role can only be left alone.
func (w *Writer) endOthers(ctx context.Context) error {
	const others = `SELECT l.pid FROM pg_locks l WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.pid <> pg_backend_pid()
		AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
		AND (l.classid::bigint << 32 | l.objid::bigint) = ` + writerLock
	for range 100 {
		rows, err := w.conn.Query(ctx, others)
		if err != nil {
			return err
		}
		pids, err := pgx.CollectRows(rows, pgx.RowTo[int32])
		if err != nil {
			return err
		}
		ended := 0
		for _, pid := range pids {
			_, err := w.conn.Exec(ctx, `SELECT pg_terminate_backend($1)`, pid)
			if err != nil && code(err) != "42501" { // insufficient_privilege
				return err
			}
			if err == nil {
				ended++
			}
		}
		if ended == 0 {
			break
		}
		w.slog.Info("ending the session of the writer before", "pids", pids)
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	_, err := w.conn.Exec(ctx, `SELECT pg_try_advisory_lock_shared(`+writerLock+`)`)
	return err
}

// Head gives the end of the log as this writer knows it.
func (w *Writer) Head() Head { return *w.published.Load() }

// Seen is up to where everything that the source captured for this log is in it, recorded as such or not.
func (w *Writer) Seen() LSN { return LSN(w.seen.Load()) }

// Stats gives the writer's counters.
func (w *Writer) Stats() *Stats { return &w.stats }

func (w *Writer) publish(h Head) {
	w.published.Store(&h)
	w.mu.Lock()
	close(w.changed)
	w.changed = make(chan struct{})
	w.mu.Unlock()
}

// Wait returns the log's last position as soon as it lies beyond after.
func (w *Writer) Wait(ctx context.Context, after Position) (Position, error) {
	for {
		w.mu.Lock()
		ch := w.changed
		w.mu.Unlock()
		if p := w.published.Load().Position; p > after {
			return p, nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return after, ctx.Err()
		}
	}
}

// Append puts a batch into the log. When it returns nil, every transaction whose commit the batch holds is durable and
// visible, unless the batch says that much more is to come (Backlog): then they may still be on their way, together with
// those of the next one, until Head says so; ctx has to last that long. After an error nothing more may be appended: the
// writer must be closed and a new one opened, and the source asked again from Head().EndLSN.
func (w *Writer) Append(ctx context.Context, b *Batch) error {
	if w.head.Gap != "" {
		return &Problem{fmt.Errorf("the log has a gap: %s", w.head.Gap), GapHint}
	}
	w.backlog = b.Backlog
	if err := w.prefetch(ctx, b); err != nil {
		return err
	}
	for i := range b.Items {
		it := &b.Items[i]
		switch it.Kind {
		case ItemBegin:
			w.beginTx(it)
			if w.tx.skip {
				continue
			}
			if err := w.setSource(it.Timeline); err != nil {
				return err
			}
		case ItemChange:
			if w.tx.skip {
				continue
			}
			if !w.tx.open {
				return errors.New("bug: a row change outside a transaction")
			}
			if err := w.change(ctx, it); err != nil {
				return err
			}
			w.lastDML = w.tx.lsn
			if len(w.rows) >= flushBytes {
				if err := w.flush(ctx, b.Backlog, true); err != nil {
					return err
				}
				if err := w.trim(ctx, b.Backlog); err != nil {
					return err
				}
			}
		case ItemMessage:
			if !w.tx.skip && w.tx.open {
				w.message(it.Text)
				if len(w.rows)+w.ctxBytes >= flushBytes && len(w.rows) > 0 {
					if err := w.flush(ctx, b.Backlog, true); err != nil {
						return err
					}
				}
			}
		case ItemCommit:
			w.commitTx(it)
		case ItemProgress:
			if !w.tx.open && it.EndLSN > w.endLSN {
				w.endLSN = it.EndLSN
				if it.Timeline != 0 {
					w.tl = it.Timeline
				}
			}
		case ItemReset:
			if err := w.reset(ctx); err != nil {
				return err
			}
		}
	}
	behind := b.Backlog >= bulkEndBytes && !b.Final
	if behind && !w.state.full() && (len(w.rows) < gatherBytes || len(w.rows) < flushBytes && w.flight.busy()) {
		return w.failed // fewer and larger steps, and no waiting for the one before
	}
	if err := w.flush(ctx, b.Backlog, false); err != nil {
		return err
	}
	if err := w.trim(ctx, b.Backlog); err != nil {
		return err
	}
	if behind {
		return nil
	}
	if err := w.join(ctx); err != nil {
		return err
	}
	// Progress without events is recorded rarely: recording it is WAL too.
	if ahead := w.endLSN - w.head.EndLSN; ahead > 0 && !w.tx.open &&
		(b.Final || ahead >= progressBytes || time.Since(w.lastOut) >= progressEvery) {
		if err := w.write(ctx, step{position: w.pos}); err != nil {
			return err
		}
		if err := w.join(ctx); err != nil {
			return err
		}
	}
	if len(w.rows) == 0 {
		w.seen.Store(uint64(w.endLSN))
	}
	return w.settle(ctx, b.Backlog)
}

// Kept tells whether Append has kept something back, or not waited for it.
func (w *Writer) Kept() bool { return len(w.rows) > 0 || w.flight != nil }

// Flush brings to the log what Append has kept back because more was to come, and waits for it.
func (w *Writer) Flush(ctx context.Context) error {
	if err := w.flush(ctx, w.backlog, false); err != nil {
		return err
	}
	return w.join(ctx)
}

func (w *Writer) beginTx(it *Item) {
	t := &w.tx
	*t = openTx{open: true, xid: it.XID, lsn: it.CommitLSN, time: it.Time, at: it.Time.UnixMicro() - pgEpoch,
		first: w.pos + 1, ranges: t.ranges[:0]}
	// The source sends again what it does not know to be confirmed; what the log has, it skips.
	t.skip = it.CommitLSN <= w.commit && w.commit != 0
}

func (w *Writer) commitTx(it *Item) {
	t := &w.tx
	if t.skip {
		t.open, t.skip = false, false
		return
	}
	w.closeContext()
	if w.pos >= t.first {
		if t.context == nil {
			w.made.Unattributed += int64(w.pos - t.first + 1)
		}
		w.contexts = append(w.contexts, t.ranges...)
		w.commit, w.when = t.lsn, t.time
		w.made.Transactions++
	}
	w.whole, w.wholeEnd, w.endLSN = w.pos, len(w.rows), it.EndLSN
	if w.cur != nil {
		w.tl = w.cur.timeline
	}
	t.open = false
}

// reset forgets an open transaction, which the source will send again from its beginning.
func (w *Writer) reset(ctx context.Context) error {
	if !w.tx.open {
		return nil
	}
	if w.tx.skip {
		w.tx = openTx{}
		return nil
	}
	// What is whole goes out first, so that only the open transaction is lost.
	if err := w.flush(ctx, 0, false); err != nil {
		return err
	}
	w.tx.open = false
	w.state.clear()
	return w.rewind(ctx)
}

// rewind goes back to the log as it is in the database.
func (w *Writer) rewind(ctx context.Context) error {
	if err := w.join(ctx); err != nil {
		return err
	}
	w.rows, w.wholeEnd, w.contexts, w.news = w.rows[:0], 0, w.contexts[:0], w.news[:0]
	w.tables, w.latest, w.sources, w.cur = map[*Relation]*table{}, map[uint32]*table{}, map[uint32]*source{}, nil
	w.tx, w.ctxBytes, w.made = openTx{}, 0, Counts{}
	epoch := w.head.Epoch
	if err := w.reload(ctx); err != nil {
		return err
	}
	if w.head.Epoch != epoch {
		return fenced
	}
	if err := w.cleanUp(ctx); err != nil {
		return err
	}
	return w.log.dict.reload(ctx)
}

// message begins a range of context: the latest message before a row applies to it, and rows before any message take
// the transaction's first.
func (w *Writer) message(text []byte) {
	meta := cleanContext(text, &w.made)
	t := &w.tx
	if bytes.Equal(t.context, meta) {
		return
	}
	w.ctxBytes += len(meta) + 64
	if t.context != nil {
		w.closeContext()
		t.ranges = append(t.ranges, ctxRow{first: w.pos + 1, meta: meta})
	} else {
		t.ranges = append(t.ranges, ctxRow{first: t.first, meta: meta})
	}
	t.context = meta
}

// closeContext ends the open range at the last event made; a range without events vanishes.
func (w *Writer) closeContext() {
	t := &w.tx
	if n := len(t.ranges); n > 0 && t.ranges[n-1].last == 0 {
		t.ranges[n-1].last = w.pos
		if t.ranges[n-1].last < t.ranges[n-1].first {
			t.ranges = t.ranges[:n-1]
		}
	}
}

// maxContextDepth is how deep a context may be nested. Postgres reads JSON recursively, with a stack of its own size.
const maxContextDepth = 100

// cleanContext makes sure that a context is a JSON object that Postgres can store; anything else is kept raw. A message is
// bytes, not text: it need not be valid in any encoding.
func cleanContext(text []byte, made *Counts) []byte {
	object := bytes.HasPrefix(bytes.TrimLeft(text, " \t\r\n"), []byte{'{'})
	if object && utf8.Valid(text) && depth(text) <= maxContextDepth && json.Valid(text) && !hasNulEscape(text) {
		return append([]byte(nil), text...)
	}
	made.MalformedContext++
	if len(text) > 8<<10 {
		text = text[:8<<10]
	}
	text = bytes.ReplaceAll(validUTF8(text), []byte{0}, []byte("\ufffd")) // json takes \u0000, but nobody could read it
	return append(AppendString([]byte(`{"malformed":`), text), '}')
}

// depth tells how deep JSON is nested, at most.
func depth(text []byte) (deepest int) {
	n := 0
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '"':
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			n++
			deepest = max(deepest, n)
		case '}', ']':
			n--
		}
	}
	return deepest
}

// setSource finds the source's number for a timeline, or gives it one.
func (w *Writer) setSource(timeline uint32) error {
	if w.cur != nil && w.cur.timeline == timeline {
		return nil
	}
	if s := w.sources[timeline]; s != nil {
		w.cur = s
		return nil
	}
	s, err := w.source(w.head.SystemID, w.head.Database, w.head.Incarnation, timeline)
	if err != nil {
		return err
	}
	w.sources[timeline], w.cur = s, s
	return nil
}

func (w *Writer) source(system, database string, incarnation int, timeline uint32) (*source, error) {
	d := w.log.dict
	d.mu.Lock()
	defer d.mu.Unlock()
	used := map[uint32]bool{}
	for _, s := range d.sources {
		if s.systemID == system && s.database == database && s.incarnation == incarnation && s.timeline == timeline {
			return s, nil
		}
		used[s.tag] = true
	}
	h := fnv.New64a()
	fmt.Fprintf(h, "%s/%s/%d/%d", system, database, incarnation, timeline)
	tag := uint32(h.Sum64() & 0xffffff)
	for used[tag] { // two lineages of one log never share a tag
		tag = (tag + 1) & 0xffffff
	}
	w.nextIDs.source++
	s := &source{id: w.nextIDs.source, systemID: system, database: database, incarnation: incarnation, timeline: timeline, tag: tag}
	w.news = append(w.news, newRow{sourceTable,
		[]any{s.id, system, database, incarnation, int64(timeline), int64(tag)}})
	d.sources[s.id] = s
	return s, nil
}

// tableFor finds what the writer knows of a relation, registering a new version of it in the schema history.
func (w *Writer) tableFor(ctx context.Context, r *Relation, at LSN) (*table, error) {
	if t := w.tables[r]; t != nil {
		return t, nil
	}
	t := &table{rel: r, kinds: map[kindKey]int32{}, intKey: r.IntegerKey()}
	for i, c := range r.Columns {
		k := AppendString(nil, []byte(c.Name))
		t.keys = append(t.keys, append(k, ':'))
		if c.Identity && r.ReplicaIdentity != 'f' {
			t.identity = append(t.identity, i)
		}
	}
	t.byRow = r.ReplicaIdentity == 'i' && !sameColumns(t.identity, r.Key)
	if !t.byRow {
		t.identity = r.Key
	}
	d := w.log.dict
	newest, last := d.newestVersion(r.OID)
	if last != nil && last.SameShape(r) {
		t.id = newest
	}
	if t.id == 0 {
		if last != nil {
			// What the cache holds is in the shape, or under the identity, of before; from now on it is looked up in the log.
			if err := w.flush(ctx, 0, true); err != nil {
				return nil, err
			}
			if err := w.join(ctx); err != nil {
				return nil, err
			}
			w.state.clear()
		}
		w.nextIDs.relation++
		t.id = w.nextIDs.relation
		cols, err := json.Marshal(r.Columns)
		if err != nil {
			return nil, err
		}
		key := make([]int32, len(r.Key))
		for i, k := range r.Key {
			key[i] = int32(k)
		}
		w.news = append(w.news, newRow{relationTable,
			[]any{t.id, r.OID, r.Schema, r.Name, string(cols), key, string(r.ReplicaIdentity), r.InsertOnly, r.Complete, w.lastDML.String(), at.String()}})
		d.mu.Lock()
		d.relations[t.id] = r
		d.mu.Unlock()
	}
	if t.agg = w.aggregateOf(r); t.agg == nil {
		t.agg = w.newAggregate(w.freeAggregate(r), idType(r))
	}
	t.rules = defaultRules(r, t.agg.name)
	w.tables[r], w.latest[r.OID] = t, t
	return t, nil
}

// aggregateOf finds the aggregate that a table has already, nil if it has none. A table whose key has got another type, so
// that its ids are no longer what they were, gets another one.
func (w *Writer) aggregateOf(r *Relation) *aggregate {
	d := w.log.dict
	for n := 0; ; n++ {
		a := d.aggregateNamed(aggregateName(r, n))
		if a == nil {
			return nil
		}
		if w.ownedBy(a, r) && a.idType == idType(r) {
			return a
		}
	}
}

// freeAggregate finds a name for a new aggregate.
func (w *Writer) freeAggregate(r *Relation) string {
	for n := 0; ; n++ {
		if name := aggregateName(r, n); w.log.dict.aggregateNamed(name) == nil {
			return name
		}
	}
}

// ownedBy tells whether an aggregate's events are those of a table of this name, and of no other one.
func (w *Writer) ownedBy(a *aggregate, r *Relation) bool {
	for _, t := range w.latest {
		if t.agg == a {
			return t.rel.String() == r.String()
		}
	}
	return w.log.dict.ownedBy(a, r)
}

// known finds what the writer knows of a relation without registering anything: nil if its shape is new.
func (w *Writer) known(r *Relation) *table {
	if t := w.tables[r]; t != nil {
		return t
	}
	if _, last := w.log.dict.newestVersion(r.OID); last == nil || !last.SameShape(r) || w.aggregateOf(r) == nil {
		return nil
	}
	t, err := w.tableFor(context.Background(), r, 0) // asks the log for nothing, as it is all known
	if err != nil {
		return nil
	}
	return t
}

func (w *Writer) newAggregate(name, idType string) *aggregate {
	w.nextIDs.aggregate++
	a := &aggregate{id: int32(w.nextIDs.aggregate), name: name, idType: idType}
	w.news = append(w.news, newRow{aggregateTable, []any{int(a.id), a.name, a.idType}})
	d := w.log.dict
	d.mu.Lock()
	defer d.mu.Unlock()
	d.aggregates[a.id] = a
	return a
}

func sameColumns(a, b []int) bool {
	if len(a) != len(b) {
		return false
	}
	seen := map[int]bool{}
	for _, x := range a {
		seen[x] = true
	}
	for _, x := range b {
		if !seen[x] {
			return false
		}
	}
	return true
}

// kindOf finds the number for what an event shares with others, or gives it one.
func (w *Writer) kindOf(t *table, op Op, p part) int32 {
	key := kindKey{w.cur.id, op, p.typ}
	if id, ok := t.kinds[key]; ok {
		return id
	}
	d := w.log.dict
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, k := range d.kinds {
		if k.source == w.cur && k.relationID == t.id && k.aggregate == t.agg && k.op == op && k.typ == p.typ && k.quiet == p.quiet && k.rulesVersion == RulesVersion {
			t.kinds[key] = id
			return id
		}
	}
	w.nextIDs.kind++
	k := &kind{id: int32(w.nextIDs.kind), source: w.cur, relation: t.rel, relationID: t.id, aggregate: t.agg, typ: p.typ, op: op, quiet: p.quiet, rulesVersion: RulesVersion}
	var rel any
	if t.id != 0 {
		rel = t.id
	}
	w.news = append(w.news, newRow{kindTable,
		[]any{k.id, k.source.id, rel, k.aggregate.id, k.typ, string(k.op), k.quiet, k.rulesVersion}})
	d.kinds[k.id], t.kinds[key] = k, k.id
	return k.id
}
