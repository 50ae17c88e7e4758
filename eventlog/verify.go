package eventlog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"sort"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Each append ends with a seal: SHA-256 over the seal before it, the events of the append in PostgreSQL's COPY BINARY form
// (eventColumns, and the seal field as NULL), the ranges of context and then the rows of the small tables that were written
// with it, in the order of table and number. So no event, no context and no meaning of a number can be changed,
// removed or inserted without every later seal being wrong; format 1.
//
// A transaction whose events are all written before it ends may leave one range of context over (late): then the seal of the
// append that makes it visible is SHA-256 over the seal before and that range, and stands in the head alone until the next
// one, which is chained to it.

// genesis is the seal before the first.
func genesis(systemID, database string) []byte {
	h := sha256.Sum256([]byte("backstory 1 " + systemID + " " + database))
	return h[:]
}

// Verdict is what Verify found.
type Verdict struct {
	Events   int64    `json:"events"`
	Appends  int64    `json:"appends"`
	Position Position `json:"position"` // of the last event checked
	Seal     string   `json:"seal"`     // the last seal, to be kept elsewhere as a proof
	Broken   string   `json:"broken,omitempty"`
	At       Position `json:"at,omitempty"` // where: the fault lies at or before this position, after the seal before it
}

// Verify proves that no event was changed, removed or inserted. progress, if not nil, is called now and then.
func (l *Log) Verify(ctx context.Context, progress func(done, total Position)) (*Verdict, error) {
	head, err := l.Head(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := l.pool.Acquire(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to the event log: %w", ConnError(err))
	}
	defer conn.Release()
	v := &verifier{log: l, ctx: ctx, head: head, want: 1, verdict: &Verdict{}}
	// The first source row tells which lineage the log began with; the head names the present one.
	var sys, db string
	err = l.pool.QueryRow(ctx, `SELECT system_id, database FROM backstory.source ORDER BY id LIMIT 1`).Scan(&sys, &db)
	if errors.Is(err, pgx.ErrNoRows) {
		sys, db = head.SystemID, head.Database
	} else if err != nil {
		return nil, fmt.Errorf("read the log's sources: %w", err)
	}
	v.seal = genesis(sys, db)
	// What no position of the log can have sealed, but readers would use.
	for _, q := range []struct{ what, sql string }{
		{"an event before the first position", `SELECT min(position) FROM backstory.event WHERE position < 1`},
		{"context that was never sealed", `SELECT min(first_position) FROM backstory.context WHERE sealed_at < 1 OR sealed_at > $1 AND first_position <= $1`},
		{"an event of a kind that was never sealed", `SELECT min(id) FROM (
			SELECT id, sealed_at FROM backstory.kind UNION ALL SELECT id, sealed_at FROM backstory.aggregate
			UNION ALL SELECT id, sealed_at FROM backstory.relation UNION ALL SELECT id, sealed_at FROM backstory.source UNION ALL SELECT id, sealed_at FROM backstory.rules UNION ALL SELECT id, sealed_at FROM backstory.moved) x WHERE sealed_at < 1 AND $1 > 0`},
	} {
		var at *int64
		args := []any{head.Position}
		if q.what == "an event before the first position" {
			args = nil
		}
		if err := l.pool.QueryRow(ctx, q.sql, args...).Scan(&at); err != nil {
			return nil, fmt.Errorf("read the event log: %w", err)
		}
		if at != nil {
			v.verdict.Broken, v.verdict.At = q.what, Position(*at)
			return v.verdict, nil
		}
	}
	v.begin()
	pc := conn.Conn().PgConn()
	for lo := Position(0); lo < head.Position; lo += windowEvents {
		hi := min(lo+windowEvents, head.Position)
		if err := v.window(pc, lo, hi); err != nil {
			if errors.Is(err, errBroken) {
				return v.verdict, nil
			}
			return nil, fmt.Errorf("read the event log: %w", err)
		}
		if progress != nil {
			progress(hi, head.Position)
		}
	}
	if v.want != head.Position+1 {
		v.broken("events are missing at the end", head.Position)
	} else if v.open {
		v.broken("the last events are not sealed", head.Position)
	} else if !bytes.Equal(v.seal, head.Seal) {
		v.broken("the head does not carry the last seal", head.Position)
	}
	v.verdict.Position, v.verdict.Seal = v.want-1, fmt.Sprintf("%x", v.seal)
	return v.verdict, nil
}

var errBroken = errors.New("the chain of seals is broken")

type verifier struct {
	log     *Log
	ctx     context.Context
	head    *Head
	want    Position
	last    Position // of the last seal
	seal    []byte
	hash    hash.Hash
	open    bool
	verdict *Verdict
	extras  []extra // what was sealed in this window with events, beside them, in order
	late    []extra // what was sealed after an event, by itself
}

// extra is something other than an event that a seal covers.
type extra struct {
	at    Position
	bytes []byte
}

// window reads a range of positions: first what was sealed there beside events, then the events.
func (v *verifier) window(pc *pgconn.PgConn, lo, hi Position) error {
	v.extras, v.late = v.extras[:0], v.late[:0]
	for _, x := range []struct {
		where string
		list  *[]extra
	}{{"NOT late", &v.extras}, {"late", &v.late}} {
		q := fmt.Sprintf("COPY (SELECT first_position, last_position, sealed_at, metadata FROM backstory.context WHERE sealed_at > %d AND sealed_at <= %d AND %s ORDER BY sealed_at, first_position) TO STDOUT (FORMAT binary)", lo, hi, x.where)
		err := copyOut(v.ctx, pc, q, func(raw []byte, f [][]byte) error {
			*x.list = append(*x.list, extra{Position(i64(f[2])), append([]byte(nil), raw...)})
			return nil
		})
		if err != nil {
			return err
		}
	}
	for t := sourceTable; t <= movedTableRow; t++ {
		rows, err := v.log.pool.Query(v.ctx, "SELECT sealed_at, "+smallColumns[t].read+" FROM backstory."+smallColumns[t].name+" WHERE sealed_at > $1 AND sealed_at <= $2 ORDER BY sealed_at, id", lo, hi)
		if err != nil {
			return err
		}
		for rows.Next() {
			vals, err := rows.Values()
			if err != nil {
				return err
			}
			v.extras = append(v.extras, extra{Position(vals[0].(int64)), sealRow(t, vals[1:])})
		}
		if err := rows.Err(); err != nil {
			return err
		}
	}
	sort.SliceStable(v.extras, func(i, j int) bool { return v.extras[i].at < v.extras[j].at })
	q := fmt.Sprintf("COPY (SELECT %s, e.seal FROM backstory.event e WHERE e.position > %d AND e.position <= %d ORDER BY e.position) TO STDOUT (FORMAT binary)", eventColumns, lo, hi)
	if err := copyOut(v.ctx, pc, q, v.row); err != nil {
		return err
	}
	for _, left := range [][]extra{v.extras, v.late} {
		if len(left) > 0 {
			return v.broken("context or a small table's row that was not sealed with any event", left[0].at)
		}
	}
	return nil
}

func (v *verifier) begin() {
	v.hash = sha256.New()
	v.hash.Write(v.seal)
	v.open = false
}

func (v *verifier) broken(what string, at Position) error {
	if v.verdict.Broken == "" {
		v.verdict.Broken, v.verdict.At = what, at
	}
	return errBroken
}

// row takes one event: its bytes, and its fields.
func (v *verifier) row(raw []byte, f [][]byte) error {
	p := Position(i64(f[0]))
	if p != v.want {
		if p < v.want {
			return v.broken(fmt.Sprintf("position %d is there twice", p), p)
		}
		return v.broken(fmt.Sprintf("no event at position %d", v.want), v.want)
	}
	v.want++
	v.verdict.Events++
	seal := f[len(f)-1]
	n := len(raw)
	if seal != nil {
		n -= len(seal)
	}
	v.hash.Write(raw[:n-4])
	v.hash.Write(nullSeal)
	v.open = true
	if seal == nil {
		return nil
	}
	for len(v.extras) > 0 && v.extras[0].at == p {
		v.hash.Write(v.extras[0].bytes)
		v.extras = v.extras[1:]
	}
	if got := v.hash.Sum(nil); !bytes.Equal(got, seal) {
		where := fmt.Sprintf("position %d", p)
		if v.last+1 < p {
			where = fmt.Sprintf("positions %d to %d", v.last+1, p)
		}
		return v.broken("what was appended at "+where+" is not what was sealed", p)
	}
	v.seal, v.last = append([]byte(nil), seal...), p
	v.verdict.Appends++
	v.begin()
	if len(v.late) > 0 && v.late[0].at == p {
		for len(v.late) > 0 && v.late[0].at == p {
			v.hash.Write(v.late[0].bytes)
			v.late = v.late[1:]
		}
		v.seal = v.hash.Sum(nil)
		v.begin()
	}
	return nil
}
