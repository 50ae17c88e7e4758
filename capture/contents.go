package capture

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// A table of which the stream does not tell what becomes of a row is read in one snapshot, which a transaction of its own holds until the end: the one
// exception to "no transaction longer than a chunk". That is one without a key, which is read in the order in which its rows lie in the file, and one of
// which only inserts are in the stream: a row that goes to another key meanwhile would be found under both, or neither. It holds the source's vacuum back, and no lock: each
// chunk is a transaction that borrows the snapshot (PostgreSQL manual, SET TRANSACTION SNAPSHOT), so that ALTER TABLE waits for a chunk
// and not for the table. What of it counts the log tells (eventlog, contents.go). It begins anew when it was interrupted.

// Contents prepares the log for the rows of a table without a key: what it knows of them at b.At, and what of that the snapshot does not see; where
// that cannot be told, the error is eventlog.ErrNotVisible. known is false if the log knows nothing.
type Contents func(ctx context.Context, r *eventlog.Relation, b eventlog.Baseline, snapshot string) (known bool, err error)

// scan is the reading of a table in one snapshot.
type scan struct {
	holder   *pgx.Conn // of the snapshot; it asks the catalogue nothing, whose locks it would keep
	look     *pgx.Conn // for the catalogue as it is now
	name     string    // of the snapshot, for SET TRANSACTION
	snapshot string    // as pg_current_snapshot prints it
	blocks   int64     // that the table had; rows in later ones the snapshot does not see
	begun    bool      // its beginning has its place in the log
	since    eventlog.Position
	known    bool
	span     int64 // blocks that a chunk looks at
	some     int   // how many rows of a block, where it has too much for a chunk; 0: all
	read     bool  // all of it
}

func (t *importing) keyless() bool { return len(t.rel.Key) == 0 && t.Pass != eventlog.PassShape }

// atOnce tells whether a table is read in one snapshot.
func (t *importing) atOnce() bool {
	return t.keyless() || t.rel.InsertOnly && t.Pass != eventlog.PassShape
}

// beginScan takes the snapshot and finds out what the log knows.
func (t *importing) beginScan(ctx context.Context, conn *pgx.Conn) (err error) {
	t.endScan(ctx)
	holder, err := t.imp.stream.cfg.Connect(ctx)
	if err != nil {
		return err
	}
	s := &scan{holder: holder, span: 32}
	t.scan = s
	if s.look, err = t.imp.stream.cfg.Connect(ctx); err != nil {
		t.endScan(ctx)
		return err
	}
	defer func() {
		if err != nil {
			t.endScan(ctx)
		}
	}()
	if _, err := holder.Exec(ctx, "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; SET LOCAL idle_in_transaction_session_timeout = 0"); err != nil {
		return fmt.Errorf("take a snapshot of the source: %w", err)
	}
	if err := holder.QueryRow(ctx, `SELECT pg_export_snapshot(), pg_current_snapshot()::text`).Scan(&s.name, &s.snapshot); err != nil {
		return fmt.Errorf("take a snapshot of the source: %w", err)
	}
	if err := s.look.QueryRow(ctx, `SELECT coalesce(pg_relation_size($1::bigint::oid), 0) / current_setting('block_size')::bigint`, int64(t.OID)).Scan(&s.blocks); err != nil {
		return fmt.Errorf("ask the source for the size of a table: %w", err)
	}
	if t.TotalBytes > 100<<20 {
		t.imp.stream.cfg.Logger.Info("the existing rows of a table of which not every update and delete is in the stream, or that has no key, are read in one transaction: until they are, the source's vacuum keeps what ends meanwhile, and CREATE INDEX CONCURRENTLY waits", "relation", t.Table, "bytes", t.TotalBytes)
	}
	began := &eventlog.Chunk{Begins: true}
	if err := t.begin(ctx, conn, nothing, &began.Snapshot, func([][]byte) bool { return true }); err != nil {
		return err
	}
	if err := t.mark(ctx, conn, began); err != nil {
		return err
	}
	// When it has arrived, everything that the snapshot sees is in the log.
	if err := t.takeOver(ctx, 1); err != nil {
		return err
	}
	s.since, s.begun = t.At, true
	if t.after = nil; !t.keyless() {
		return nil
	}
	if s.known, err = t.imp.contents(ctx, t.rel, t.Baseline, s.snapshot); err != nil {
		return err
	}
	t.after = []string{"(0,0)"}
	return nil
}

// endScan lets the snapshot go.
func (t *importing) endScan(ctx context.Context) {
	if t.scan != nil {
		_ = t.scan.holder.Close(context.WithoutCancel(ctx))
		if t.scan.look != nil {
			_ = t.scan.look.Close(context.WithoutCancel(ctx))
		}
	}
	t.scan = nil
}

// blockOf gives the block that a row is in, by its place in the form (block,number).
func blockOf(ctid string) (int64, error) {
	block, _, ok := strings.Cut(strings.TrimPrefix(ctid, "("), ",")
	n, err := strconv.ParseInt(block, 10, 64)
	if !ok || err != nil {
		return 0, fmt.Errorf("the source says that a row is at %q, which is no place in a table", ctid)
	}
	return n, nil
}

// readContents reads the rows of the next blocks of the file, in a transaction that is left open; where one block alone has too much for a chunk,
// some of its rows.
func (t *importing) readContents(ctx context.Context, conn *pgx.Conn) (*eventlog.Chunk, error) {
	s := t.scan
	first, err := blockOf(t.after[0])
	if err != nil {
		return nil, err
	}
	end := first + s.span
	c := &eventlog.Chunk{Since: s.since, Known: s.known}
	at, columns, order := fmt.Sprintf("(%d,0)", end), "ctid", ""
	if t.columns != "" {
		columns += ", " + t.columns
	}
	if s.some > 0 {
		order = fmt.Sprintf(" ORDER BY ctid LIMIT %d", s.some)
	}
	last := ""
	query := fmt.Sprintf("SELECT %s FROM ONLY %s WHERE ctid OPERATOR(pg_catalog.>) '%s' AND ctid OPERATOR(pg_catalog.<) '(%d,0)'%s", columns, t.name, t.after[0], end, order)
	err = t.begin(ctx, conn, query, &c.Snapshot, func(v [][]byte) bool {
		last = string(v[0])
		c.Add(v[1:])
		return c.Rows == 1 || c.Bytes <= 4*t.chunkBytes() && c.Rows <= 2*maxChunkRows
	})
	switch {
	case errors.Is(err, errTooMuch) && s.span > 1:
		s.span = max(1, s.span/8)
	case errors.Is(err, errTooMuch):
		s.some = max(1, c.Rows/4)
	}
	if err != nil {
		return nil, err
	}
	if s.some > 0 && c.Rows == s.some {
		at = last // and more of this block
	} else {
		c.Last, s.some = end >= s.blocks, 0
		most := min(4*s.span, 1<<15)
		if c.Rows > 0 {
			most = min(most, s.span*t.chunkBytes()/(c.Bytes+1), s.span*maxChunkRows/int64(c.Rows))
		}
		s.span = max(1, most)
	}
	c.AfterKey = []string{at}
	return c, nil
}

// patience waits for somebody's ALTER TABLE, keeping the snapshot: what was read is not read again, unless the table is another one then.
func (t *importing) patience(ctx context.Context, err error) bool {
	if t.scan == nil || !errors.Is(err, errLocked) {
		return false
	}
	t.set(func(s *ImportState) { s.Doing, s.Error = "interrupted", err })
	pass(ctx, time.Second)
	t.set(func(s *ImportState) { s.Doing = s.reads() })
	return ctx.Err() == nil
}
