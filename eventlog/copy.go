package eventlog

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/internal/coalesce"
)

// copyHeader is the signature of COPY's binary form (PostgreSQL manual, COPY, Binary Format).
const copyHeader = "PGCOPY\n\xff\r\n\x00"

// copyStart appends the header of COPY's binary form.
func copyStart(dst []byte) []byte {
	return append(append(dst, copyHeader...), 0, 0, 0, 0, 0, 0, 0, 0)
}

// copyOut runs COPY … TO STDOUT (FORMAT binary) and calls row for each row, with its bytes and its fields, which are valid
// until row returns. An error of row ends it, at the price of the connection, and is returned as it is.
func copyOut(ctx context.Context, pc *pgconn.PgConn, sql string, row func(raw []byte, fields [][]byte) error) error {
	r := copyRows{row: row}
	if c := coalescing(pc); c != nil {
		r.wait = func() { c.Gather, c.Enough = copyPause, copyEnough }
		defer func() {
			if !pc.IsClosed() { // otherwise pgconn reads what is left of it, in a goroutine of its own
				c.Gather = 0
			}
		}()
	}
	_, err := pc.CopyTo(ctx, &r, sql)
	if r.err != nil {
		return r.err
	}
	if err != nil {
		return fmt.Errorf("read the event log: %w", err)
	}
	return nil
}

// copyPause is for how long what the server sends gathers before it is read. It sends 8 kB at a time.
const copyPause = 200 * time.Microsecond

// copyEnough is how much in one read shows that there is no need to wait.
const copyEnough = 48 << 10

// gatherAfter is after how many bytes of an answer more is expected to come.
const gatherAfter = 64 << 10

// coalescing gives the connection below a session, nil if it is of another kind.
func coalescing(pc *pgconn.PgConn) *coalesce.Conn {
	c := pc.Conn()
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	cc, _ := c.(*coalesce.Conn)
	return cc
}

// copyRows takes the stream apart.
type copyRows struct {
	wait    func() // makes the connection gather; nil once it does, and where it cannot
	came    int    // bytes until then
	row     func(raw []byte, fields [][]byte) error
	buf     []byte // the beginning of a row whose end has not come yet
	started bool
	fields  [][]byte
	err     error
}

// Write takes a piece of the stream. Postgres sends a row in a piece, so usually nothing is copied.
func (s *copyRows) Write(p []byte) (int, error) {
	n := len(p)
	if s.wait != nil {
		if s.came += n; s.came > gatherAfter {
			s.wait()
			s.wait = nil
		}
	}
	if len(s.buf) > 0 {
		s.buf = append(s.buf, p...)
		p = s.buf
	}
	rest, err := s.rows(p)
	if err != nil {
		s.err = err
		return 0, err
	}
	s.buf = append(s.buf[:0], rest...)
	return n, nil
}

var errCopy = errors.New("read the event log: malformed COPY stream")

func (s *copyRows) rows(p []byte) ([]byte, error) {
	if !s.started {
		if len(p) < 19 {
			return p, nil
		}
		if string(p[:11]) != copyHeader {
			return nil, errCopy
		}
		p, s.started = p[19:], true
	}
	for {
		if len(p) < 2 {
			return p, nil
		}
		n := int(int16(binary.BigEndian.Uint16(p)))
		if n < 0 {
			return nil, nil // the trailer
		}
		s.fields = s.fields[:0]
		q := p[2:]
		for range n {
			if len(q) < 4 {
				return p, nil
			}
			l := int(int32(binary.BigEndian.Uint32(q)))
			q = q[4:]
			if l < 0 {
				s.fields = append(s.fields, nil)
				continue
			}
			if len(q) < l {
				return p, nil
			}
			s.fields = append(s.fields, q[:l:l])
			q = q[l:]
		}
		if err := s.row(p[:len(p)-len(q)], s.fields); err != nil {
			return nil, err
		}
		p = q
	}
}
