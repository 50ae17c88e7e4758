package eventlog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

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
	full    *partition // one that is to get its indexes; nil: none
	index   *indexing  // of one that is getting them; nil: none
	tables  map[*Relation]*table
	latest  map[uint32]*table  // by OID: the present shape
	sources map[uint32]*source // by timeline
	cur     *source
	state   *stateCache

	rules        Rules                  // nil: the default ones
	rulesVersion int                    // their number in the log
	ruleError    atomic.Pointer[string] // see RuleError
	taken        *Rules                 // what Log.SetRules gave when they were taken; nil: before that

	baselines map[uint32]*Baseline // by OID: tables whose existing rows are being taken over
	heals     map[uint32]bool      // those whose last state is compared, since changes may be missing
	completed map[uint32]int64     // tables of which that has ended meanwhile: the generation
	touched   touched              // rows of theirs that the stream has told of
	importing bool                 // the event that is made is that of such a row
	rooted    bool                 // what is described tells of which partitioned table it is a partition; the stream does not
	uncached  Position             // of the last such event of a row that the cache does not have
	remaining LSN                  // about how much of them is still to come, in bytes
	lastChunk time.Time
	progress  []byte                              // SQL that records how far they are, for the next step that moves the head
	also      func(context.Context, execer) error // and what else is done with that step

	rows     []byte   // gathered events in COPY's binary form
	spare    []byte   // memory for the next ones
	wholeEnd int      // where in rows the open transaction begins
	contexts []ctxRow // of whole transactions; when a part is written, those of the open one that are closed
	ctxBytes int      // of contexts gathered
	news     []newRow // rows for the small tables
	nextIDs  struct{ source, relation, aggregate, kind, rules, moved int }
	scratch  scratch
	lastOut  time.Time // of the last flush
	held     LSN       // where a table is known to have got the shape that is registered; 0: somewhere between two places
	backlog  LSN       // of the last batch

	published atomic.Pointer[Head]
	seen      atomic.Uint64
	mu        sync.Mutex // guards the following
	changed   chan struct{}

	stats Stats
	made  Counts // since the last step that moved the head; counted when the next one does
}

// NewWriter takes over the log: whoever wrote before is fenced, and what a transaction left unfinished is removed.
func (l *Log) NewWriter(ctx context.Context) (*Writer, error) {
	w := &Writer{log: l, slog: l.log, tables: map[*Relation]*table{}, latest: map[uint32]*table{}, sources: map[uint32]*source{},
		completed: map[uint32]int64{}, changed: make(chan struct{})}
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
	if w.index != nil {
		w.index.stop()
		<-w.index.done
		w.index = nil
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
	if err := w.conn.QueryRow(ctx, `UPDATE backstory.head SET epoch = epoch + 1, closed = false, updated_at = now() RETURNING epoch`).Scan(&epoch); err != nil {
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
		(SELECT coalesce(max(id), 0) FROM backstory.aggregate), (SELECT coalesce(max(id), 0) FROM backstory.kind), (SELECT coalesce(max(id), 1) FROM backstory.rules),
		(SELECT coalesce(max(id), 0) FROM backstory.moved)`
	n := &w.nextIDs
	if err := w.conn.QueryRow(ctx, q).Scan(&n.source, &n.relation, &n.aggregate, &n.kind, &n.rules, &n.moved); err != nil {
		return fmt.Errorf("read the log's dictionary: %w", err)
	}
	if err := w.log.dict.reload(ctx); err != nil {
		return err
	}
	w.rulesVersion, _ = w.log.dict.newestRules() // until the first transaction
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
		if err := w.conn.QueryRow(ctx, `SELECT to_regclass('backstory.' || quote_ident($1)) IS NOT NULL`, d.viewName(a)).Scan(&there); err != nil {
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
		for _, t := range []string{"context", "moved", "rules", "kind", "aggregate", "relation", "source"} {
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

// rewind goes back to the log as it is in the database.
func (w *Writer) rewind(ctx context.Context) error {
	if err := w.join(ctx); err != nil {
		return err
	}
	w.rows, w.wholeEnd, w.contexts, w.news = w.rows[:0], 0, w.contexts[:0], w.news[:0]
	w.tables, w.latest, w.sources, w.cur = map[*Relation]*table{}, map[uint32]*table{}, map[uint32]*source{}, nil
	w.tx, w.ctxBytes, w.made, w.progress, w.also = openTx{}, 0, Counts{}, nil, nil
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
	w.taken = nil // what they were registered by may be gone
	return w.log.dict.reload(ctx)
}
