package eventlog

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// Checkpoint says up to which position one named reader of the log is finished, and how it fares.
type Checkpoint struct {
	Name      string
	Position  Position  // everything up to here is finished
	Epoch     int64     // rises with every Lease and every Move; a writer with an older one is refused
	Running   bool      // a process holds the lease now
	Paused    bool      // a person wants it to rest
	Error     string    // why it does not get on; empty if it does
	FailedAt  time.Time // since when there is Error
	UpdatedAt time.Time // of the last write, not of the last look
}

// Start says where a reader begins that the log does not know yet.
type Start uint8

// The places to begin.
const (
	FromBeginning Start = iota // with the first event of the log
	FromHead                   // with what comes next
)

// Met with leases and checkpoints.
var (
	// ErrLeaseHeld means that another process runs this reader. It will do for long; trying again later is no error.
	ErrLeaseHeld = errors.New("another process runs this reader")
	// ErrLeaseLost means that the reader must stop at once: its session with the log's database ended, or its
	// checkpoint was taken over or moved. What it saved before holds.
	ErrLeaseLost = errors.New("the lease on this reader is lost")
	// ErrAheadOfLog means that a checkpoint, or a sink, knows positions that the log does not have.
	ErrAheadOfLog = errors.New("the reader is ahead of the log")
)

const (
	// leasePoll is how often a lease is proven. It costs one SELECT and no WAL.
	leasePoll = 2 * time.Second
	// leaseTTL is how long a proof holds. It is well below the time after which the server gives up on a session whose
	// client has vanished (the keepalive settings below: 60 s), so a cut-off holder stops before another can begin.
	leaseTTL = 20 * time.Second
)

// Lease is the right to run one named reader, and the only way to move its checkpoint.
//
// Two things make it, since each alone has a hole. An advisory lock of a session of its own decides who may run: the
// server gives it back the moment the process dies, without waiting for a time-out, and holding it writes nothing (a
// heartbeat in a table would write WAL into what is usually the source's own server). The checkpoint's epoch decides
// who may write: it rises with each lease, so a process that slept through a take-over cannot move the checkpoint.
//
// Watch proves again and again that the session lives; Valid tells without any I/O. An advisory lock belongs to a
// session, so the log's URL must not go through a pooler in transaction mode.
type Lease struct {
	log  *Log
	name string
	conn *pgx.Conn // owned by Watch while it runs

	mu     sync.Mutex // guards the following
	saved  Checkpoint
	proven time.Time // monotonic
	lost   error
}

// Lease takes the lease on a reader and makes its checkpoint if there is none. ErrLeaseHeld means that somebody else has
// it. The caller runs Watch, and gives the lease back by Release.
func (l *Log) Lease(ctx context.Context, name string, start Start) (*Lease, error) {
	head, err := l.Head(ctx)
	if err != nil {
		return nil, err
	}
	cfg, err := ConnConfig(l.cfg.URL, "backstory reader "+name)
	if err != nil {
		return nil, err
	}
	// Ignored on a Unix socket, where a vanished client is seen at once.
	for k, v := range map[string]string{"tcp_keepalives_idle": "30", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "3"} {
		cfg.RuntimeParams[k] = v
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to the event log: %w", ConnError(err))
	}
	le := &Lease{log: l, name: name, conn: conn, proven: time.Now()}
	if err := le.take(ctx, start, head.Position); err != nil {
		_ = closeConn(ctx, conn)
		return nil, err
	}
	return le, nil
}

func (le *Lease) take(ctx context.Context, start Start, head Position) error {
	var got bool
	// Not pg_advisory_lock: a statement that waits holds a snapshot, and so back the vacuum of the whole database.
	err := le.conn.QueryRow(ctx, `SELECT pg_try_advisory_lock(`+leaseKey+`)`, le.name).Scan(&got)
	if err != nil {
		return fmt.Errorf("lock reader %s: %w", le.name, err)
	}
	if !got {
		return fmt.Errorf("lock reader %s: %w", le.name, ErrLeaseHeld)
	}
	at := Position(0)
	if start == FromHead {
		at = head
	}
	err = pgx.BeginFunc(ctx, le.conn, func(tx pgx.Tx) error {
		// An epoch that a crash of the server takes back could be given out twice.
		if _, err := tx.Exec(ctx, `SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') IN ('off', 'local')`); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, `INSERT INTO backstory.checkpoint AS c (name, position, epoch) VALUES ($1, $2, 1)
			ON CONFLICT (name) DO UPDATE SET epoch = c.epoch + 1 RETURNING `+checkpointColumns, le.name, at)
		if err != nil {
			return err
		}
		le.saved, err = pgx.CollectExactlyOneRow(rows, scanCheckpoint)
		return err
	})
	if err != nil {
		return fmt.Errorf("take the checkpoint of %s: %w", le.name, err)
	}
	if le.saved.Position > head {
		return &Problem{fmt.Errorf("%w: %s is at position %d, the log ends at %d", ErrAheadOfLog, le.name, le.saved.Position, head),
			"The log was restored to an earlier state, or replaced. If that was meant, let the reader begin anew: DELETE FROM backstory.checkpoint WHERE name = '" + le.name + "'; as the log's owner. What the reader already has comes again then, with the same ids."}
	}
	return nil
}

// leaseKey is the advisory lock of the reader named $1.
const leaseKey = `backstory.key_hash('backstory reader ' || $1::text)`

const checkpointColumns = `c.name, c.position, c.epoch, c.paused, coalesce(c.error, ''), c.failed_at, c.updated_at`

func scanCheckpoint(row pgx.CollectableRow) (c Checkpoint, err error) {
	var failed *time.Time
	err = row.Scan(&c.Name, &c.Position, &c.Epoch, &c.Paused, &c.Error, &failed, &c.UpdatedAt)
	if failed != nil {
		c.FailedAt = *failed
	}
	return c, err
}

// Checkpoint gives the checkpoint as this lease last wrote or saw it.
func (le *Lease) Checkpoint() Checkpoint {
	le.mu.Lock()
	defer le.mu.Unlock()
	return le.saved
}

// Valid returns ErrLeaseLost, wrapped, when the reader must not go on. It does no I/O.
func (le *Lease) Valid() error {
	le.mu.Lock()
	defer le.mu.Unlock()
	if le.lost == nil && time.Since(le.proven) > leaseTTL {
		le.lost = fmt.Errorf("%w: reader %s: no answer from the log's database for %s", ErrLeaseLost, le.name, leaseTTL)
	}
	return le.lost
}

func (le *Lease) lose(format string, args ...any) error {
	le.mu.Lock()
	defer le.mu.Unlock()
	if le.lost == nil {
		le.lost = fmt.Errorf("%w: reader %s: %s", ErrLeaseLost, le.name, fmt.Sprintf(format, args...))
	}
	return le.lost
}

// Watch proves the lease until ctx ends (nil) or the lease is lost (ErrLeaseLost, wrapped). A session that the server
// ends is noticed at once, one that has gone silent within leaseTTL.
func (le *Lease) Watch(ctx context.Context) error {
	for {
		wait, cancel := context.WithTimeout(ctx, leasePoll)
		_, err := le.conn.WaitForNotification(wait) // reads, so a closed connection is seen; nobody notifies
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		var timeout net.Error
		if err != nil && !errors.Is(err, context.DeadlineExceeded) && !(errors.As(err, &timeout) && timeout.Timeout()) {
			return le.lose("the session with the log's database ended")
		}
		if err := le.prove(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

// prove asks the database, on the session that holds the lock, whether the epoch is still ours.
func (le *Lease) prove(ctx context.Context) error {
	asked := time.Now()
	ctx, cancel := context.WithTimeout(ctx, leaseTTL/2)
	defer cancel()
	rows, err := le.conn.Query(ctx, `SELECT `+checkpointColumns+` FROM backstory.checkpoint c WHERE name = $1`, le.name)
	if err != nil {
		return le.lose("the session with the log's database ended")
	}
	c, err := pgx.CollectExactlyOneRow(rows, scanCheckpoint)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return le.lose("its checkpoint was deleted")
	case err != nil:
		return le.lose("the session with the log's database ended")
	}
	le.mu.Lock()
	if c.Epoch == le.saved.Epoch {
		le.proven = asked
		le.saved.Paused = c.Paused
		le.mu.Unlock()
		return nil
	}
	le.mu.Unlock()
	return le.lose("its checkpoint was moved or taken over")
}

// Save moves the checkpoint and clears its error. The caller says only what its sink holds durably. It writes a few bytes
// of WAL, so readers that can find out where they were save seldom.
func (le *Lease) Save(ctx context.Context, p Position) error {
	return le.write(ctx, `UPDATE backstory.checkpoint AS c SET position = $3, error = NULL, failed_at = NULL, updated_at = now()
		WHERE name = $1 AND epoch = $2 RETURNING `+checkpointColumns, p)
}

// Fail records why the reader does not get on; the time of the first failure stays. Save clears it.
func (le *Lease) Fail(ctx context.Context, cause error) error {
	msg := firstLine(cause.Error())
	if hint := Hint(cause); hint != "" {
		msg += " — " + hint
	}
	return le.write(ctx, `UPDATE backstory.checkpoint AS c SET error = $3, failed_at = coalesce(failed_at, now()), updated_at = now()
		WHERE name = $1 AND epoch = $2 RETURNING `+checkpointColumns, msg)
}

func (le *Lease) write(ctx context.Context, sql string, arg any) error {
	if err := le.Valid(); err != nil {
		return err
	}
	rows, err := le.log.pool.Query(ctx, sql, le.name, le.Checkpoint().Epoch, arg)
	if err != nil {
		return fmt.Errorf("save the checkpoint of %s: %w", le.name, err)
	}
	c, err := pgx.CollectExactlyOneRow(rows, scanCheckpoint)
	if errors.Is(err, pgx.ErrNoRows) {
		return le.lose("its checkpoint was moved or taken over")
	}
	if err != nil {
		return fmt.Errorf("save the checkpoint of %s: %w", le.name, err)
	}
	le.mu.Lock()
	le.saved = c
	le.mu.Unlock()
	return nil
}

// Release gives the lease back, so that another process can have it at once. Watch must have returned.
func (le *Lease) Release(ctx context.Context) error {
	_ = le.lose("given back")
	// The end of a session is noticed by the server a moment later; giving the lock back is not.
	unlock, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	_, _ = le.conn.Exec(unlock, `SELECT pg_advisory_unlock_all()`)
	return closeConn(ctx, le.conn)
}

func closeConn(ctx context.Context, c *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return c.Close(ctx)
}

// Checkpoints lists all readers by name.
func (l *Log) Checkpoints(ctx context.Context) ([]Checkpoint, error) {
	rows, err := l.pool.Query(ctx, `SELECT `+checkpointColumns+`, EXISTS (
			SELECT FROM pg_locks k WHERE k.locktype = 'advisory' AND k.granted AND k.objsubid = 1
			AND k.database = (SELECT oid FROM pg_database WHERE datname = current_database())
			AND (k.classid::bigint << 32 | k.objid::bigint) = backstory.key_hash('backstory reader ' || c.name))
		FROM backstory.checkpoint c ORDER BY c.name`)
	if err != nil {
		return nil, fmt.Errorf("read the checkpoints: %w", err)
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (c Checkpoint, err error) {
		var failed *time.Time
		err = row.Scan(&c.Name, &c.Position, &c.Epoch, &c.Paused, &c.Error, &failed, &c.UpdatedAt, &c.Running)
		if failed != nil {
			c.FailedAt = *failed
		}
		return c, err
	})
	if err != nil {
		return nil, fmt.Errorf("read the checkpoints: %w", err)
	}
	return list, nil
}

// PauseCheckpoint asks a reader to rest, or to go on. A running one obeys within seconds.
func (l *Log) PauseCheckpoint(ctx context.Context, name string, paused bool) error {
	return l.alterCheckpoint(ctx, name, `UPDATE backstory.checkpoint SET paused = $2, updated_at = now() WHERE name = $1 AND paused <> $2`, paused)
}

// MoveCheckpoint makes a reader go on from after another position. Its epoch rises, so a running one stops and begins
// again from there within seconds. What a sink already holds it may refuse to take twice (see package sinks).
func (l *Log) MoveCheckpoint(ctx context.Context, name string, p Position) error {
	return l.alterCheckpoint(ctx, name, `UPDATE backstory.checkpoint SET position = $2, epoch = epoch + 1, error = NULL, failed_at = NULL,
		updated_at = now() WHERE name = $1`, p)
}

func (l *Log) alterCheckpoint(ctx context.Context, name, sql string, arg any) error {
	tag, err := l.pool.Exec(ctx, sql, name, arg)
	if err != nil {
		return fmt.Errorf("change the checkpoint of %s: %w", name, err)
	}
	if tag.RowsAffected() > 0 {
		return nil
	}
	var exists bool
	if err := l.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM backstory.checkpoint WHERE name = $1)`, name).Scan(&exists); err != nil {
		return fmt.Errorf("change the checkpoint of %s: %w", name, err)
	}
	if !exists {
		return &Problem{fmt.Errorf("no reader is called %q", name), "backstory sink status lists them."}
	}
	return nil
}

// Identity tells this log from every other one, also in what sinks have written long ago: the moment of its creation. A
// copy of a log (a restored backup, a clone) has the same; the ids of events tell those apart.
func (l *Log) Identity(ctx context.Context) (string, error) {
	var us int64
	err := l.pool.QueryRow(ctx, `SELECT (extract(epoch FROM applied_at) * 1000000)::bigint FROM backstory.migration WHERE number = 1`).Scan(&us)
	if err != nil {
		return "", fmt.Errorf("read the log's identity: %w", err)
	}
	return strconv.FormatInt(us, 36), nil
}
