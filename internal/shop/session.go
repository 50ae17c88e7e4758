package shop

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	connectLimit = 15 * time.Second
	finishLimit  = 5 * time.Second // for the transaction at hand once the shop is closing
	maxTries     = 5               // of one transaction
)

// session is one server process of the application. It belongs to one goroutine.
type session struct {
	*shop
	ctx  context.Context // ends when the shop closes
	work context.Context // of SQL: ends a little later, so that a transaction is finished
	end  context.CancelFunc
	rand *rand.Rand
	conn *pgx.Conn
}

func (s *shop) newSession(ctx context.Context, r *rand.Rand) (*session, error) {
	x := &session{shop: s, ctx: ctx, rand: r}
	x.work, x.end = context.WithCancel(context.WithoutCancel(ctx))
	context.AfterFunc(ctx, func() { time.AfterFunc(finishLimit, x.end) })
	if err := x.connect(); err != nil {
		x.end()
		return nil, fmt.Errorf("connect to the shop's database: %w", err)
	}
	return x, nil
}

func (x *session) connect() error {
	ctx, cancel := context.WithTimeout(x.ctx, connectLimit)
	defer cancel()
	cfg, err := pgx.ParseConfig(x.cfg.URL)
	if err != nil {
		return err
	}
	if cfg.RuntimeParams["application_name"] == "" {
		cfg.RuntimeParams["application_name"] = "shop"
	}
	x.conn, err = pgx.ConnectConfig(ctx, cfg)
	return err
}

func (x *session) close() {
	_ = x.conn.Close(x.work)
	x.end()
}

// run does one piece of work after the other.
func (x *session) run() error {
	for x.ctx.Err() == nil {
		err := x.pick()(x)
		switch {
		case err == nil || errors.As(err, new(refusal)):
		case x.ctx.Err() != nil:
			return nil
		case x.lost(err):
			x.reconnect()
		default:
			return err
		}
	}
	return nil
}

// reconnect returns with a new connection, or when the shop closes.
func (x *session) reconnect() {
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		_ = x.conn.Close(x.work)
		old := x.conn
		if x.connect() == nil {
			x.add(&x.stats.Reconnects)
			return
		}
		x.conn = old
		select {
		case <-time.After(pause/2 + time.Duration(x.rand.Int64N(int64(pause)))):
		case <-x.ctx.Done():
			return
		}
	}
}

// who is the context of a transaction: who does it, and why. Nil: nobody knows.
type who struct {
	Actor     string `json:"actor"`
	Reason    string `json:"reason,omitempty"`
	RequestID string `json:"request_id,omitempty"`
	Path      string `json:"path,omitempty"`
}

// because gives the same person another reason and a new request.
func (w *who) because(x *session, reason string) *who {
	if w == nil {
		return nil
	}
	return &who{Actor: w.Actor, Reason: reason, RequestID: x.uuid(), Path: w.Path}
}

// as makes a context.
func (x *session) as(actor, reason string) *who {
	return &who{Actor: actor, Reason: reason, RequestID: x.uuid()}
}

// refusal is why the application rolled a transaction back.
type refusal string

func (r refusal) Error() string { return string(r) }

// errStale means that a row has another lock_version than the one that was read.
var errStale = errors.New("somebody else has changed the row")

// do runs one transaction when it is due. A refusal that it returns has been counted. Deadlocks and changed rows are
// tried again.
func (x *session) do(action string, w *who, f func(tx pgx.Tx) error) error {
	x.pace.wait(x.ctx, x.rand)
	for try := 1; ; try++ {
		if x.ctx.Err() != nil {
			return x.ctx.Err()
		}
		t := Transaction{Action: action, Outcome: RolledBack}
		if w != nil {
			t.Actor, t.Reason = w.Actor, w.Reason
		}
		committing := false
		err := pgx.BeginFunc(x.work, x.conn, func(tx pgx.Tx) error {
			if err := x.emit(tx, w); err != nil {
				return err
			}
			err := f(tx)
			committing = err == nil
			return err
		})
		var no refusal
		switch {
		case err == nil:
			t.Outcome = Committed
		case errors.As(err, &no):
			t.Refusal = string(no)
		case errors.Is(err, errStale) || sqlState(err) == "40P01" || sqlState(err) == "40001": // deadlock_detected, serialization_failure
			x.add(&x.stats.Retried)
			if try < maxTries {
				continue
			}
			t.Refusal = err.Error()
			err = refusal(t.Refusal)
		case committing && x.lost(err):
			t.Outcome = Unknown
		default:
			return fmt.Errorf("%s: %w", action, err)
		}
		x.count(t)
		return err
	}
}

// emit says who and why, as the application's initializer does at the beginning of each transaction.
func (x *session) emit(tx pgx.Tx, w *who) error {
	if w == nil {
		return nil
	}
	text, err := json.Marshal(w)
	if err != nil {
		return err
	}
	_, err = tx.Exec(x.work, `SELECT pg_logical_emit_message(true, 'backstory', $1)`, string(text))
	return err
}

// exec runs a statement and returns how many rows it concerned.
func (x *session) exec(tx pgx.Tx, sql string, args ...any) (int64, error) {
	tag, err := tx.Exec(x.work, sql, args...)
	return tag.RowsAffected(), err
}

// find reads one row outside a transaction, and reports whether there is one.
func (x *session) find(sql string, args []any, into ...any) (bool, error) {
	err := x.conn.QueryRow(x.work, sql, args...).Scan(into...)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil
	}
	return err == nil, err
}

// lost reports whether the connection is gone, or the server is not there for now.
func (x *session) lost(err error) bool {
	if x.conn.IsClosed() {
		return true
	}
	// Connection exceptions, insufficient resources, operator intervention (shutting down, starting up).
	state := sqlState(err)
	return strings.HasPrefix(state, "08") || strings.HasPrefix(state, "53") || strings.HasPrefix(state, "57")
}

func sqlState(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

// uuid gives a random one (version 4).
func (x *session) uuid() string {
	hi, lo := x.rand.Uint64(), x.rand.Uint64()
	hi, lo = hi&^0xf000|0x4000, lo&^(3<<62)|2<<62
	return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x", hi>>32, hi>>16&0xffff, hi&0xffff, lo>>48, lo&0xffffffffffff)
}

// chance is true with probability p.
func (x *session) chance(p float64) bool { return x.rand.Float64() < p }

// one of several.
func one[T any](x *session, of []T) T { return of[x.rand.IntN(len(of))] }

// now is the application's clock.
func now() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }
