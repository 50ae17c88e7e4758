package eventlog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/jackc/pgx/v5"
)

// Existing rows of a table without a key. There is nothing by which they could be read in order, or told apart: a row is its content, and
// what can be compared is how often a content is there. All of them are read in one snapshot of the source, chunk by chunk, from a first
// chunk on, which is empty and holds the place before which everything that the snapshot sees is in the log. For a content,
//
//   - seen is how many rows of the snapshot have been read so far, plus what transactions have added and taken away that the snapshot does not
//     see: behind the first chunk, or before it, as they committed while the snapshot was taken or a standby holds them back;
//   - rows is how many the log knows of, as a fold counts them: a row that is not there cannot be taken away.
//
// Once all are read, seen is the truth. A chunk imports what rows lacks of seen, and never more: where only some are read, what the
// log knows of may be the others. Whatever an earlier reading has imported, before a kill, is among rows, so that reading anew
// imports nothing twice. In the end, where the log may know of too many (after a gap, or as only inserts are in the stream), what rows has
// more than seen is deleted.
//
// Most contents are neither known before nor touched meanwhile, and are imported without a question. The counts of the others
// are kept beside the log, each as of a position, and brought up to date from the index when they are needed.

// ErrNotVisible means that the log has changes of a table that a snapshot of the source does not show, and that nobody can subtract.
var ErrNotVisible = errors.New("the table was altered or emptied, or much of it changed, at the moment in which its rows were to be read, or a standby (synchronous_standby_names) has not answered to that yet")

// ContentID gives the entity's id of a row without a key from its JSON object, as the log files it.
func ContentID(object []byte) string { return string(appendContentKey(nil, object)) }

// PutContents records, before the existing rows of a table without a key are read, how often which content is there according to the log up to
// a position, and how many of these, or how many more, the snapshot in which they are read does not see: fill calls put with the ids of contents, each
// once. What was recorded before is forgotten.
//
// It is done for the writer of an epoch: if another one has taken over meanwhile, nothing is recorded, and the error is ErrFenced.
func (l *Log) PutContents(ctx context.Context, epoch int64, oid uint32, at Position, fill func(put func(id string, rows, pending int64) error) error) error {
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `DELETE FROM backstory.content WHERE oid = $1::bigint::oid OR NOT oid IN (SELECT oid FROM backstory.baseline WHERE done_at IS NULL)`, int64(oid)); err != nil {
			return err
		}
		r, w := io.Pipe()
		filled := make(chan error, 1)
		go func() {
			var line []byte
			err := fill(func(id string, rows, pending int64) error {
				line = append(strconv.AppendUint(line[:0], uint64(oid), 10), '\t')
				line = append(append(line, id...), '\t')
				line = append(strconv.AppendInt(line, rows, 10), '\t')
				line = append(strconv.AppendInt(line, pending, 10), '\t')
				line = append(strconv.AppendInt(line, int64(at), 10), '\n')
				_, err := w.Write(line)
				return err
			})
			w.CloseWithError(err)
			filled <- err
		}()
		_, err := tx.Conn().PgConn().CopyFrom(ctx, r, `COPY backstory.content (oid, id, rows, seen, position) FROM STDIN`)
		_ = r.CloseWithError(err)
		if e := <-filled; e != nil && err != nil {
			return e
		}
		if err != nil {
			return err
		}
		var mine bool
		if err := tx.QueryRow(ctx, `SELECT epoch = $1 FROM backstory.head FOR SHARE`, epoch).Scan(&mine); err != nil || !mine {
			return errors.Join(err, fenced)
		}
		return nil
	})
	if err != nil {
		return Remedy(fmt.Errorf("record what the log knows of a table without a key: %w", err))
	}
	return nil
}

// surplus gives contents of which the log may know too many rows, in the order of their ids.
func (l *Log) surplus(ctx context.Context, r *Relation, after []string, limit int) (keys []Key, next []string, err error) {
	if next = after; len(after) == 0 {
		after = []string{"00000000000000000000000000000000"}
	}
	rows, err := l.pool.Query(ctx, `SELECT replace(id::text, '-', '') FROM backstory.content WHERE oid = $1::bigint::oid AND id > $2::text::uuid AND rows > seen ORDER BY id LIMIT $3`, int64(r.OID), after[0], limit)
	if err != nil {
		return nil, nil, Remedy(fmt.Errorf("read what the log knows of %s: %w", r, err))
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, nil, Remedy(fmt.Errorf("read what the log knows of %s: %w", r, err))
	}
	for i := range ids {
		keys, next = append(keys, Key{Text: &ids[i]}), ids[i:i+1]
	}
	return keys, next, nil
}

// contentsQuery brings the counts of contents up to date, adds rows that a chunk has of them, and gives how many of these the log lacks, and
// how many rows it has too many.
const contentsQuery = `
WITH k AS (
  -- A chunk that comes again, since the stream was cut, has been counted.
  SELECT k.*, coalesce(c.rows, 0) AS rows, coalesce(c.seen - CASE WHEN c.chunk = $10 THEN c.skipped ELSE 0 END, 0) AS seen, coalesce(c.position, $5) AS since
  FROM unnest($1::text[], $2::int8[], $3::int8[]) AS k(id, hash, n) LEFT JOIN backstory.content c ON c.oid = $4::bigint::oid AND c.id = k.id::uuid
), change AS (
  SELECT k.id, e.position, CASE e.kind = ANY ($8::int4[]) WHEN true THEN -1 ELSE 1 END AS n FROM k
  JOIN backstory.event e ON e.stream = ANY ($6::int4[]) AND e.id = k.hash AND e.id_text = k.id AND e.kind = ANY ($7::int4[]) AND e.position > $5 AND e.position > k.since
  UNION ALL
  SELECT k.id, e.position, -1 FROM k
  JOIN backstory.event e ON e.stream = ANY ($6::int4[]) AND e.old_id = k.hash AND e.old_text = k.id AND e.kind = ANY ($7::int4[]) AND e.position > $5 AND e.position > k.since
), running AS (
  SELECT id, n, sum(n) OVER (PARTITION BY id ORDER BY position) AS total FROM change
), changed AS (
  SELECT id, sum(n)::int8 AS n, min(total)::int8 AS least FROM running GROUP BY id
), now AS (
  SELECT k.id, k.n, k.rows + coalesce(c.n, 0) - least(0, k.rows + coalesce(c.least, 0)) AS rows, k.seen + coalesce(c.n, 0) AS seen
  FROM k LEFT JOIN changed c USING (id)
), judged AS (
  SELECT *, least(n, greatest(0, seen + n - rows)) AS lacks FROM now
), put AS (
  INSERT INTO backstory.content (oid, id, rows, seen, position, chunk, skipped) SELECT $4::bigint::oid, id::uuid, rows, seen + n - lacks, $9, $10, n - lacks FROM judged WHERE $11 = (SELECT epoch FROM backstory.head)
  ON CONFLICT (oid, id) DO UPDATE SET rows = excluded.rows, seen = excluded.seen, position = excluded.position, chunk = excluded.chunk, skipped = excluded.skipped
)
SELECT id, lacks, rows - seen FROM judged WHERE $11 = (SELECT epoch FROM backstory.head)`

// counted is what the log makes of a content: how many of a chunk's rows it lacks, and how many it has more than there are.
type counted struct{ lacks, surplus int64 }

// contents judges contents by how many rows a chunk has of them.
func (w *Writer) contents(ctx context.Context, t *table, c *Chunk, n map[string]int64) (map[string]counted, error) {
	out := map[string]counted{}
	if len(n) == 0 {
		return out, nil
	}
	if err := w.arrive(ctx); err != nil {
		return nil, err
	}
	if err := w.indexAll(ctx); err != nil {
		return nil, err
	}
	reads, err := w.reader(ctx)
	if err != nil {
		return nil, err
	}
	var ids []string
	var hashes, counts []int64
	for id, n := range n {
		ids, hashes, counts = append(ids, id), append(hashes, keyHash([]byte(id))), append(counts, n)
	}
	kinds, deletes, streams := []int32{}, []int32{}, []int32{}
	for _, p := range w.log.dict.allPlaces(t.rel.OID) {
		kinds, streams = append(kinds, p.kinds...), append(streams, p.stream)
	}
	for _, k := range kinds {
		if w.log.dict.cached(k).op == OpDelete {
			deletes = append(deletes, k)
		}
	}
	rows, err := reads.Query(ctx, contentsQuery, ids, hashes, counts, int64(t.rel.OID), c.Since, streams, kinds, deletes, w.pos, c.Number, w.head.Epoch)
	if err != nil {
		return nil, fmt.Errorf("count rows without a key: %w", err)
	}
	var id string
	var now counted
	if _, err := pgx.ForEachRow(rows, []any{&id, &now.lacks, &now.surplus}, func() error { out[id] = now; return nil }); err != nil {
		return nil, fmt.Errorf("count rows without a key: %w", err)
	}
	if len(out) < len(ids) {
		return nil, fenced
	}
	return out, nil
}

// existingContents takes over the rows of a chunk of a table without a key.
func (w *Writer) existingContents(ctx context.Context, t *table, c *Chunk, as func(*tableRules) part) error {
	row := make([]Value, len(t.rel.Columns))
	asked := map[string]int64{}
	data := c.data
	for range c.Rows {
		data = c.next(data, row)
		_, id, buf := w.entity(t, row, w.scratch.key)
		if w.scratch.key = buf; c.Known || w.touched.has(t.rel.OID, keyHash(id)) {
			asked[string(id)]++
		}
	}
	known, err := w.contents(ctx, t, c, asked)
	if err != nil {
		return err
	}
	data = c.data
	for range c.Rows {
		data = c.next(data, row)
		w.tx.change++
		_, id, buf := w.entity(t, row, w.scratch.key)
		w.scratch.key = buf
		if n, ok := known[string(id)]; ok {
			if n.lacks == 0 {
				continue
			}
			n.lacks--
			known[string(id)] = n
		}
		if err := w.insert(ctx, t, &Item{Op: OpImport, New: row}, OpImport, as); err != nil {
			return err
		}
		if err := w.relieve(ctx); err != nil {
			return err
		}
	}
	return nil
}

// surplusContents deletes rows without a key of which the log has more than the source.
func (w *Writer) surplusContents(ctx context.Context, t *table, c *Chunk) error {
	pair := make([]Value, 2)
	asked := map[string]int64{}
	var ids []string
	data := c.data
	for range c.Rows {
		data = c.next(data, pair)
		id := string(pair[1].Text)
		ids, asked[id] = append(ids, id), 0
	}
	known, err := w.contents(ctx, t, c, asked)
	if err != nil {
		return err
	}
	for _, id := range ids {
		w.tx.change++
		n := known[id].surplus
		if n <= 0 {
			continue
		}
		before, err := w.contentOf(ctx, t, id)
		if err != nil {
			return err
		}
		e := eventRow{op: OpDelete, text: []byte(id), before: before}
		if err := w.fileRow(ctx, t, &e, asHealed); err != nil {
			return err
		}
		if before == nil { // it was filed before the table was altered, and has got its id since
			var unknown []byte
			for _, k := range t.keys {
				unknown = appendName(unknown, k)
			}
			e.meta = metaUnknown(unknown)
		}
		for range n {
			w.event(t, &e)
			if err := w.relieve(ctx); err != nil {
				return err
			}
			w.tx.change++
		}
	}
	return nil
}

// contentOf gives the content of a row without a key by its id; nil if no event has it under that.
func (w *Writer) contentOf(ctx context.Context, t *table, id string) ([]byte, error) {
	reads, err := w.reader(ctx)
	if err != nil {
		return nil, err
	}
	var data, before, rest []byte
	for _, p := range w.log.dict.allPlaces(t.rel.OID) {
		err := reads.QueryRow(ctx, `SELECT data, CASE WHEN data IS NULL THEN before END, rest FROM backstory.event WHERE stream = $1 AND id = $2 AND id_text = $3 AND kind = ANY ($4::int4[]) ORDER BY position DESC LIMIT 1`,
			p.stream, keyHash([]byte(id)), id, p.kinds).Scan(&data, &before, &rest)
		if err == pgx.ErrNoRows {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look for a row without a key: %w", err)
		}
		break
	}
	if rest == nil {
		if before != nil {
			return before, nil
		}
		return data, nil
	}
	members := map[string][]byte{}
	for _, o := range [][]byte{data, rest} {
		if err := EachMember(o, func(name, value []byte) error { members[string(name)] = value; return nil }); err != nil {
			return nil, err
		}
	}
	out := []byte{'{'}
	for i, k := range t.keys {
		if v, ok := members[t.rel.Columns[i].Name]; ok {
			out = memberRaw(out, k, v)
		}
	}
	return append(out, '}'), nil
}
