package eventlog

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// The baseline: rows that existed before their table was captured become …Imported events, while streaming goes on and without a lock.
//
// A chunk of rows is read in one snapshot of the source, and a message is left in its WAL before that transaction ends: the chunk's
// mark. When the stream comes to the mark, everything that was committed before it is in the log. What the snapshot shows of a row
// is right at that place unless a transaction that it does not see has changed the row; such a transaction was committed before the mark,
// and so is in the log, or after it, and so comes later. Rows are judged when the mark comes and never before:
//
//   - The log has no event of the row: it is imported.
//   - The log knows the row, or its end: the chunk's row yields.
//   - The log knows it except for columns that were never sent (unchanged TOAST at first sight): these are taken from the chunk, since
//     nobody has changed them from before the first sight until now.
//
// Most rows are not touched meanwhile; a filter of those that were keeps the log from being asked for the others.

// Baseline is how far the rows that existed before their table was captured have been taken over.
type Baseline struct {
	OID        uint32
	WaitFor    int64    // transactions of the source below this one had begun when the table was taken in: they have to end first; 0: none
	Chunks     int64    // that are in the log
	AfterKey   []string // of the last row taken over, as the source prints it; nil before the first
	Pass       int      // PassShape, PassRows, PassMoved or PassGone
	Rows       int64    // read, in this pass
	Bytes      int64    // of these rows as text
	Imported   int64    // events made of them
	TotalRows  int64    // estimates of the table when it began; 0: unknown
	TotalBytes int64
	Changes    string // how many updates and deletes the source had counted of the table (package capture)
	BeganAt    time.Time
	UpdatedAt  time.Time
	Done       bool
	DoneAt     time.Time // zero, unless Done
	// Heal: the table was altered, and rows of before may have other values now, which no row change told: all are compared.
	Heal bool
	// Generation goes up when it begins anew, since the table was altered.
	Generation int64
	// Began is where the log ended when it began: what was committed by then, every snapshot sees once WaitFor is over.
	Began Position
	// At is where the log ended behind its last chunk.
	At    Position
	again bool
	// altered: the table was altered, which no event says yet.
	altered bool
	shaped  bool // this chunk says it
	first   bool // this chunk is where reading began
	gone    bool // the table was dropped, which is in the log now
	doubt   bool // that rows have to be compared has turned out with the last chunk
}

// Share is about how much of the table has been taken over, from 0 to 1.
func (b *Baseline) Share() float64 {
	switch {
	case b.Done:
		return 1
	case b.Pass > PassRows:
		return 0.99
	case b.TotalRows > 0:
		return min(0.99, float64(b.Rows)/float64(b.TotalRows))
	case b.TotalBytes > 0:
		return min(0.99, float64(b.Bytes)/float64(b.TotalBytes))
	}
	return 0
}

// Weight is how much of the work the table is, beside others.
func (b *Baseline) Weight() float64 { return float64(max(b.TotalBytes, 8192)) }

// Chunk is a run of existing rows of one table, as of one place in the source's WAL. It is immutable once it is handed over.
type Chunk struct {
	Relation *Relation
	Number   int64 // 1, 2, 3 … of the table
	Rows     int
	AfterKey []string // of its last row
	Last     bool     // the table has no more
	Bytes    int64    // of its rows as text
	// Remaining is about how many bytes of existing rows are still to come, of all tables.
	Remaining int64
	// Done is called when the chunk's rows have been made events, or dropped, with how far the table is then. It must not block.
	Done func(Baseline)
	// Snapshot is what it was read in, as pg_current_snapshot prints it.
	Snapshot string
	// Begins is of a table that is read in one snapshot: the empty chunk that reading begins with, from the first row on.
	Begins bool
	// Since and Known are of a table without a key (contents.go): what Baseline.At was behind that chunk, and whether the log knew rows of it by then.
	Since Position
	Known bool
	data  []byte
	last  int // where its last row begins
}

// Add appends a row: its values as the source prints them, nil for NULL. They are copied.
func (c *Chunk) Add(values [][]byte) {
	c.last = len(c.data)
	for _, v := range values {
		if v == nil {
			c.data = append(c.data, nullSeal...)
			continue
		}
		c.data = append(binary.BigEndian.AppendUint32(c.data, uint32(len(v))), v...)
		c.Bytes += int64(len(v))
	}
	c.Rows++
}

// Key gives the values of some columns of the last row. They are not NULL.
func (c *Chunk) Key(columns []int) []string {
	row := make([]Value, slices.Max(columns)+1)
	c.next(c.data[c.last:], row)
	out := make([]string, len(columns))
	for i, n := range columns {
		out[i] = string(row[n].Text)
	}
	return out
}

// next takes a row from b. The values lie in it.
func (c *Chunk) next(b []byte, row []Value) (rest []byte) {
	for i := range row {
		n := int32(binary.BigEndian.Uint32(b))
		if b = b[4:]; n < 0 {
			row[i] = Value{State: StateNull}
			continue
		}
		row[i] = Value{StateText, b[:n:n]}
		b = b[n:]
	}
	return b
}

// touchedBits is the size of the filter: 4 MiB. With a million rows touched it errs for one of 1 600, with ten million for one of four; an
// error costs a look-up, nothing else.
const touchedBits = 1 << 25

// resumeEvents is how many events a writer that goes on with a baseline looks through, for the rows that were touched so far. Where there
// are more, it counts all as touched, lest nothing be streamed for minutes.
const resumeEvents = 10_000_000

// touched is a Bloom filter of rows.
type touched struct{ bits []uint64 }

func (f *touched) hashes(oid uint32, id int64) (uint64, uint64) {
	h := (uint64(id) ^ uint64(oid)<<40) * 0x9e3779b97f4a7c15
	h ^= h >> 32
	h *= 0xd6e8feb86659fd93
	h ^= h >> 32
	return h, h>>25 | 1
}

func (f *touched) add(oid uint32, id int64) {
	if f.bits == nil {
		f.bits = make([]uint64, touchedBits/64)
	}
	a, b := f.hashes(oid, id)
	for i := range uint64(4) {
		n := (a + i*b) & (touchedBits - 1)
		f.bits[n>>6] |= 1 << (n & 63)
	}
}

// all makes it count every row as touched.
func (f *touched) all() {
	f.add(0, 0)
	for i := range f.bits {
		f.bits[i] = 1<<64 - 1
	}
}

func (f *touched) has(oid uint32, id int64) bool {
	if f.bits == nil {
		return false
	}
	a, b := f.hashes(oid, id)
	for i := range uint64(4) {
		if n := (a + i*b) & (touchedBits - 1); f.bits[n>>6]&(1<<(n&63)) == 0 {
			return false
		}
	}
	return true
}

// Baselines tells how far the existing rows of the captured tables have been taken over: of those that the log does not have whole
// or did not have whole once. begun is false where nothing has been done yet.
func (l *Log) Baselines(ctx context.Context) ([]Baseline, error) {
	rows, err := l.pool.Query(ctx, `SELECT b.oid::bigint, b.wait_for, b.chunks, b.after_key, b.again, b.pass, b.rows, b.bytes, b.imported, b.total_rows, b.total_bytes, b.began_at, b.updated_at, b.done_at, b.heal, b.altered, b.began_position, b.generation, b.changes
		FROM backstory.baseline b JOIN backstory.captured c USING (oid) WHERE b.since_lsn = c.since_lsn ORDER BY c.schema, c.name`)
	if err != nil {
		return nil, Remedy(fmt.Errorf("read how far the existing rows are: %w", err))
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (b Baseline, err error) {
		var oid int64
		var done *time.Time
		err = row.Scan(&oid, &b.WaitFor, &b.Chunks, &b.AfterKey, &b.again, &b.Pass, &b.Rows, &b.Bytes, &b.Imported, &b.TotalRows, &b.TotalBytes, &b.BeganAt, &b.UpdatedAt, &done, &b.Heal, &b.altered, &b.Began, &b.Generation, &b.Changes)
		if b.OID, b.Done = uint32(oid), done != nil; b.Done {
			b.DoneAt = *done
		}
		return b, err
	})
	if err != nil {
		return nil, fmt.Errorf("read how far the existing rows are: %w", err)
	}
	return list, nil
}

// BeginBaseline records, before its first chunk, that a table's existing rows are to be taken over, from b.Pass on. What was recorded before of a table
// that was taken in anew since is forgotten.
func (l *Log) BeginBaseline(ctx context.Context, b Baseline) error {
	// One that was begun with the log itself has no estimates yet.
	_, err := l.pool.Exec(ctx, `UPDATE backstory.baseline b SET total_rows = $2, total_bytes = $3, changes = $4, pass = $5, heal = $6 FROM backstory.captured c
		WHERE b.oid = $1::bigint::oid AND c.oid = b.oid AND c.since_lsn = b.since_lsn AND b.chunks = 0`, int64(b.OID), b.TotalRows, b.TotalBytes, b.Changes, b.Pass, b.Heal)
	if err == nil {
		_, err = l.pool.Exec(ctx, `INSERT INTO backstory.baseline (oid, since_lsn, wait_for, total_rows, total_bytes, began_position, changes, pass, heal)
		SELECT oid, since_lsn, $2, $3, $4, $5, $6, $7, $8 FROM backstory.captured WHERE oid = $1::bigint::oid
		ON CONFLICT (oid) DO UPDATE SET since_lsn = excluded.since_lsn, wait_for = excluded.wait_for, total_rows = excluded.total_rows, total_bytes = excluded.total_bytes, began_position = excluded.began_position, changes = excluded.changes,
			chunks = 0, after_key = NULL, again = false, pass = excluded.pass, heal = excluded.heal, altered = false, generation = excluded.generation, rows = 0, bytes = 0, imported = 0, began_at = now(), updated_at = now(), done_at = NULL
		WHERE baseline.since_lsn <> excluded.since_lsn`, int64(b.OID), b.WaitFor, b.TotalRows, b.TotalBytes, b.Began, b.Changes, b.Pass, b.Heal)
	}
	if err != nil {
		return Remedy(fmt.Errorf("record that existing rows are to be taken over: %w", err))
	}
	return nil
}

// BeginAnew records that a comparison of a table's rows begins again, with the empty chunk.
func (l *Log) BeginAnew(ctx context.Context, oid uint32) error {
	_, err := l.pool.Exec(ctx, `UPDATE backstory.baseline SET pass = 0, chunks = 0, after_key = NULL, again = false, rows = 0, bytes = 0, imported = 0, generation = nextval('backstory.generation'), began_at = now(), updated_at = now(), done_at = NULL
		WHERE oid = $1::bigint::oid AND heal`, int64(oid))
	if err != nil {
		return Remedy(fmt.Errorf("record that a table is to be compared with the source: %w", err))
	}
	return nil
}

// Compare records that the existing rows of a table, all of which have been taken over, are to be compared with the log's, if the source counts
// other changes of it by now: not before every has passed, nor a hundred times what the last comparison took. b.WaitFor and b.Began are as for
// BeginBaseline. It tells whether that is so.
func (l *Log) Compare(ctx context.Context, b Baseline, every time.Duration) (bool, error) {
	tag, err := l.pool.Exec(ctx, `UPDATE backstory.baseline b SET wait_for = $2, began_position = $3, total_rows = $4, total_bytes = $5, changes = $6, heal = true, pass = 1, chunks = 0, after_key = NULL, again = false,
			rows = 0, bytes = 0, imported = 0, generation = nextval('backstory.generation'), began_at = now(), updated_at = now(), done_at = NULL
		FROM backstory.captured c WHERE b.oid = $1::bigint::oid AND c.oid = b.oid AND c.since_lsn = b.since_lsn AND b.changes <> $6 AND now() - b.done_at > greatest($7::interval, 100 * (b.done_at - b.began_at))`,
		int64(b.OID), b.WaitFor, b.Began, b.TotalRows, b.TotalBytes, b.Changes, every)
	if err != nil {
		return false, Remedy(fmt.Errorf("record that a table is to be compared with the source: %w", err))
	}
	return tag.RowsAffected() > 0, nil
}

// Next is when Compare has a table compared at the earliest of which all is done, if the source counts other changes of it by then.
func (b *Baseline) Next(every time.Duration) time.Time {
	return b.DoneAt.Add(max(every, 100*b.DoneAt.Sub(b.BeganAt)))
}

// Resume makes the writer ready to take over chunks of the tables, which BeginBaseline has recorded. It is called before the first
// Append.
func (w *Writer) Resume(ctx context.Context, list []Baseline) error {
	w.baselines, w.heals = map[uint32]*Baseline{}, map[uint32]bool{}
	var kinds []int32
	for _, b := range list {
		if b.Done {
			continue
		}
		w.baselines[b.OID] = &b
		w.heals[b.OID] = w.log.dict.before(b.OID, w.head.Incarnation)
		if (b.Heal || b.Pass == PassShape) && !w.heals[b.OID] {
			continue // each row is looked up
		}
		if _, r := w.log.dict.newestVersion(b.OID); r != nil && len(r.Key) == 0 {
			continue // what was before the first chunk is known otherwise
		}
		for _, p := range w.log.dict.events(b.OID, w.head.Incarnation) {
			kinds = append(kinds, p.kinds...)
		}
	}
	if len(kinds) == 0 {
		return nil
	}
	var since Position
	if err := w.conn.QueryRow(ctx, `SELECT min(sealed_at) FROM backstory.kind WHERE id = ANY ($1)`, kinds).Scan(&since); err != nil {
		return fmt.Errorf("read which rows were touched: %w", err)
	}
	if w.head.Position-since > resumeEvents {
		w.touched.all()
		for _, b := range w.baselines {
			_, r := w.log.dict.newestVersion(b.OID)
			b.again = b.again || b.Pass == PassRows && !(r != nil && r.InsertOnly) // of which no row lacks anything
		}
		return nil
	}
	// Rows that the stream has touched. Those that chunks have imported do not count: no chunk has them again, and the stream's next event of
	// them does.
	conn, err := w.connect(ctx, "backstory baseline")
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	imports := []int32{}
	for _, k := range kinds {
		if w.log.dict.cached(k).op == OpImport {
			imports = append(imports, k)
		}
	}
	rows, err := conn.Query(ctx, `SELECT k.relation, e.id, e.row_id, e.old_id, coalesce(e.meta LIKE '%"unknown"%' AND (e.old_id IS NOT NULL OR e.row_id IS NOT NULL), false)
		FROM backstory.event e JOIN backstory.kind k ON k.id = e.kind
		WHERE e.kind = ANY ($1) AND NOT (e.kind = ANY ($2) AND e.meta IS NULL)
		  AND e.position > $3`, kinds, imports, since-flushBytes/40) // more than a step has
	if err != nil {
		return fmt.Errorf("read which rows were touched: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var relation int
		var id int64
		var row, old *int64
		var moved bool
		if err := rows.Scan(&relation, &id, &row, &old, &moved); err != nil {
			return fmt.Errorf("read which rows were touched: %w", err)
		}
		oid := w.log.dict.version(relation).OID
		w.touched.add(oid, id)
		for _, n := range []*int64{row, old} {
			if n != nil {
				w.touched.add(oid, *n)
			}
		}
		if b := w.baselines[oid]; moved {
			b.again = true
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read which rows were touched: %w", err)
	}
	return nil
}

// touch notes the rows of an event whose table's existing rows are being taken over.
func (w *Writer) touch(t *table, e *eventRow) {
	if t.rel == nil || w.importing || w.baselines[t.rel.OID] == nil {
		return
	}
	b := w.baselines[t.rel.OID]
	w.touched.add(t.rel.OID, e.id)
	if e.hasRow {
		w.touched.add(t.rel.OID, e.rowID)
	}
	if e.moved {
		w.touched.add(t.rel.OID, e.oldID)
	}
	// A row that lacks something, and may have gone to where the chunks have been already.
	if (e.moved || e.hasRow) && bytes.Contains(e.meta, []byte(`"unknown"`)) {
		b.again = true
	}
}

// chunk takes over a chunk of existing rows.
func (w *Writer) chunk(ctx context.Context, c *Chunk) error {
	was := w.baselines[c.Relation.OID]
	if was == nil || c.Number != was.Chunks+1 {
		return fmt.Errorf("chunk %d of %s came where another one was expected", c.Number, c.Relation) // one before it was lost
	}
	rel := c.Relation
	before, ids := w.log.dict.shapes(rel.OID)
	// What the stream has told of a row may be the value of a column that nobody finds by its name any more: then all rows have to be compared,
	// those of earlier chunks too.
	doubt := !was.Heal && len(rel.Key) > 0 && !rel.InsertOnly && nameless(before, rel)
	if doubt && was.Pass == PassShape {
		less := *rel
		less.Complete, rel = false, &less
		delete(w.completed, rel.OID)
	}
	if rel.Dropped && len(before) > 0 && before[0].Dropped {
		rel = before[0]
	}
	t, err := w.redefined(ctx, rel)
	if err != nil {
		return err
	}
	w.importing = true
	defer func() { w.importing = false }()
	if was.Pass != PassShape && !rel.Dropped { // it was altered while its rows are being read, and goes on to be
		if err := w.altered(t, before, ids, &alteration{passing: true}, false); err != nil {
			return err
		}
	}
	heals, made := w.heals[t.rel.OID], w.pos
	keyless := len(t.rel.Key) == 0
	differs := heals || was.Heal // otherwise there was nothing that the log could have known wrongly
	switch {
	case was.Pass == PassShape:
		if was.Heal && w.head.Baseline && w.log.lost(t.rel, w.head.Incarnation) {
			w.discard(t)
		}
		err = w.altered(t, before, ids, &alteration{}, was.Heal && was.altered)
	case keyless && c.Begins:
		w.note(t, "BaselineBegan", []byte(`{}`))
		made = w.pos
	case c.Begins:
	case keyless && was.Pass == PassGone:
		err = w.surplusContents(ctx, t, c)
	case keyless && differs:
		err = w.existingContents(ctx, t, c, asHealed)
	case keyless:
		err = w.existingContents(ctx, t, c, asImported)
	case was.Pass == PassGone:
		err = w.goneRows(ctx, t, c, was)
	default:
		err = w.existing(ctx, t, c, was, heals)
	}
	if err != nil {
		return err
	}
	b := *was // which holds until the transaction is whole
	b.Chunks, b.UpdatedAt, b.AfterKey, b.At = c.Number, time.Now(), c.AfterKey, w.pos
	if was.Pass == PassShape {
		made = w.pos
	}
	b.Heal, b.doubt = b.Heal || doubt, doubt
	b.again = b.again || doubt && was.Pass != PassShape
	b.first, b.shaped = c.Begins || c.Number == 1, was.Pass == PassShape
	if c.Begins {
		b.Pass, b.Rows, b.Bytes = PassRows, 0, 0
		b.Heal = b.Heal || !keyless && was.Rows > 0 // what was imported in another snapshot may have gone since
	}
	if was.Pass != PassGone {
		b.Rows += int64(c.Rows)
		b.Bytes += c.Bytes
	}
	b.Imported += int64(w.pos - made)
	if c.Last && b.Pass == PassRows && !keyless && t.rel.InsertOnly && w.log.dict.inserted(t.rel.OID, w.head.Incarnation) {
		b.Heal = true // what has been inserted may have gone before the table was read
	}
	switch {
	case !c.Last:
	case t.rel.Dropped:
		b.Done, b.gone = true, true
	case b.Pass == PassShape && b.Heal:
		b.Pass = PassRows
	case b.Pass == PassShape:
		b.Done = true
	case keyless && b.Pass == PassRows && c.Known && (differs || t.rel.InsertOnly):
		b.Pass, b.AfterKey = PassGone, nil
	case keyless:
		b.again = false
		if err := w.wholeNow(ctx, t, &b); err != nil {
			return err
		}
	case b.again && b.Heal:
		b.again, b.Pass, b.AfterKey, b.Rows, b.Bytes = false, PassRows, nil, 0, 0
	case b.Heal && b.Pass == PassRows:
		b.Pass, b.AfterKey = PassGone, nil
	case b.again:
		b.again, b.Pass, b.AfterKey, b.Rows, b.Bytes = false, PassMoved, nil, 0, 0
	case heals && b.Pass != PassGone:
		b.Pass, b.AfterKey = PassGone, nil
	default:
		if err := w.wholeNow(ctx, t, &b); err != nil {
			return err
		}
	}
	w.tx.chunk, w.tx.baseline = c, &b
	return nil
}

// wholeNow ends a baseline: the log has every row of the table.
func (w *Writer) wholeNow(ctx context.Context, t *table, b *Baseline) (err error) {
	b.Done = true
	if !t.rel.InsertOnly {
		whole := *t.rel
		whole.Complete = true
		if t, err = w.tableFor(ctx, &whole, w.tx.lsn); err != nil {
			return err
		}
	}
	if t.rel.InsertOnly && b.Heal && b.Imported == 0 && len(t.rel.Key) > 0 && w.log.dict.ended(t.rel.OID) { // it was compared, and nothing had happened; no event says that it began
		return nil
	}
	w.note(t, "BaselineEnded", fmt.Appendf(nil, `{"rows":%d,"imported":%d}`, b.Rows, b.Imported))
	return nil
}

// note makes an event that is about a table and none of its rows.
func (w *Writer) note(t *table, what string, data []byte) {
	w.tx.change++
	w.event(t, &eventRow{op: OpNote, part: part{typ: t.agg.name + what}, text: []byte{}, data: data})
}

// existing takes over the rows of a chunk.
func (w *Writer) existing(ctx context.Context, t *table, c *Chunk, b *Baseline, heals bool) error {
	pass := b.Pass
	var hits, old map[int]rowState
	var nameless, seen map[int]bool
	var err error
	if b.Heal && pass == PassRows {
		heals = true
		hits, old, nameless, err = w.compareAll(ctx, t, c, b)
	} else if hits, seen, err = w.judge(ctx, t, c); err == nil && pass == PassRows && (heals || len(seen) > 0) {
		old, nameless, err = w.compare(ctx, t, c, func(i int) bool { _, judged := hits[i]; return seen[i] || heals && !judged })
	}
	if err != nil {
		return err
	}
	row := make([]Value, len(t.rel.Columns))
	data := c.data
	for i := range c.Rows {
		data = c.next(data, row)
		w.tx.change++
		if st, ok := hits[i]; ok {
			err = w.fill(ctx, t, row, st)
		} else if pass != PassRows {
			continue // the first pass had it
		} else if heals || seen[i] {
			err = w.heal(ctx, t, row, old[i], nameless[i])
		} else {
			err = w.insert(ctx, t, &Item{Op: OpImport, New: row}, OpImport, asImported)
		}
		if err == nil {
			err = w.relieve(ctx)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// commitChunk makes a chunk whole, with its transaction.
func (w *Writer) commitChunk() {
	b := w.tx.baseline
	w.progress = append(w.progress, b.sql()...)
	w.baselines[b.OID] = b
	if b.Done {
		delete(w.baselines, b.OID)
		if b.Pass != PassShape {
			w.completed[b.OID] = b.Generation
		}
		for r := range w.tables {
			if r.OID == b.OID && !r.Complete {
				delete(w.tables, r)
			}
		}
	}
	if len(w.baselines) == 0 {
		w.touched = touched{}
	}
	if w.tx.chunk.Done != nil {
		w.tx.chunk.Done(*b)
	}
}

// actual gives a relation as it is by now: the source's stream, which described it earlier, does not know that the log has all of it; and
// what the catalogue does not tell of its columns any more, because it is newer than the stream or the table was rewritten, is as it was.
func (w *Writer) actual(r *Relation) *Relation {
	out := *r
	changed := false
	if g, ok := w.completed[r.OID]; ok && g >= r.Generation && !r.Complete && !r.InsertOnly {
		out.Complete, changed = true, true
	}
	if _, last := w.log.dict.newestVersion(r.OID); last != nil {
		if r.Told && !w.rooted && out.Complete != last.Complete && !r.InsertOnly {
			out.Complete, out.Generation, changed = last.Complete, last.Generation, true
		}
		if !w.rooted && (r.RootSchema != last.RootSchema || r.RootName != last.RootName) { // whether it was attached or detached by then the stream does not tell
			out.RootOID, out.RootSchema, out.RootName, changed = last.RootOID, last.RootSchema, last.RootName, true
		}
		out.Columns = slices.Clone(r.Columns)
		out.Lately, out.Beside = nil, slices.Clone(r.Beside)
		for _, num := range r.Lately {
			i := slices.IndexFunc(out.Columns, func(c Column) bool { return c.Num == num })
			if i < 0 {
				continue
			}
			// Another one had its name before: that is the one which the first row changes are of, or, if this one is new, perhaps are not.
			c := &out.Columns[i]
			out.Beside = append(out.Beside, *c)
			if o := slices.IndexFunc(last.Columns, func(o Column) bool { return o.Name == c.Name && o.Num != 0 && o.Num != num }); o >= 0 {
				c.Num, c.Root, c.Missing, changed = 0, 0, "", true
			}
		}
		unknown := 0
		for i := range out.Columns {
			if out.Columns[i].Num == 0 {
				unknown++
			}
		}
		for i := range out.Columns {
			c := &out.Columns[i]
			if c.Num == 0 {
				o := slices.IndexFunc(last.Columns, func(o Column) bool { return o.Name == c.Name && o.Num != 0 })
				// A column that is still there, under another name, is one of the stream's: this one, if no other may be it.
				still := o >= 0 && unknown == 1 && slices.ContainsFunc(out.Beside, func(b Column) bool { return b.Num == last.Columns[o].Num })
				if o >= 0 && !still && slices.ContainsFunc(out.Beside, func(b Column) bool { return b.Type.OID == c.Type.OID && last.column(&b) < 0 }) {
					continue // or a newer one: which rows that have to be compared for it tells the catalogue (nameless)
				}
				if o >= 0 && !slices.ContainsFunc(out.Columns, func(c Column) bool { return c.Num == last.Columns[o].Num }) {
					c.Num, c.NotNull, changed = last.Columns[o].Num, last.Columns[o].NotNull, true
				}
			}
			if o := last.column(c); o >= 0 && c.Num != 0 && c.Missing == "" && last.Columns[o].Missing != "" {
				c.Missing, changed = last.Columns[o].Missing, true
			}
		}
		changed = inOrder(out.Columns, last) || changed
		changed = inRoot(&out, r, last) || changed
	}
	if !changed {
		return r
	}
	return &out
}

// inRoot fills in what nobody told of the places of a relation's columns in its partitioned table, which are as they were; all of them, if it is another
// one's partition by now than described says. It tells whether that changed anything.
func inRoot(r, described, last *Relation) (changed bool) {
	if r.RootSchema != last.RootSchema || r.RootName != last.RootName || r.RootName == "" && described.RootName == "" {
		return false
	}
	moved := r.RootSchema != described.RootSchema || r.RootName != described.RootName
	for i := range r.Columns {
		c := &r.Columns[i]
		if was := c.Root; was == 0 || moved {
			if c.Root = 0; last.column(c) >= 0 {
				c.Root = last.Columns[last.column(c)].Root
			}
			changed = changed || c.Root != was
		}
	}
	if moved {
		r.Generated = slices.Clone(r.Generated)
		for i := range r.Generated {
			g := &r.Generated[i]
			g.Root = 0
			for _, o := range last.Generated {
				if o.Num == g.Num {
					g.Root = o.Root
				}
			}
		}
	}
	return changed
}

// inOrder numbers the columns of a relation anew where they are not in the order of their numbers, in which the source always has them: they have swapped
// names since they were numbered by these. It tells whether it has.
func inOrder(columns []Column, last *Relation) (changed bool) {
	var nums []int16
	for i := range columns {
		if columns[i].Num != 0 {
			nums = append(nums, columns[i].Num)
		}
	}
	if slices.IsSorted(nums) {
		return false
	}
	slices.Sort(nums)
	for i := range columns {
		c := &columns[i]
		if c.Num == 0 {
			continue
		}
		if num := nums[0]; num != c.Num {
			c.Num, c.Root, c.NotNull, c.Missing = num, 0, false, ""
			if o := last.column(c); o >= 0 && last.Columns[o].Num == num {
				was := &last.Columns[o]
				if c.NotNull, c.Missing = was.NotNull, was.Missing; c.Type.OID == was.Type.OID {
					c.Type = was.Type
				}
			}
		}
		nums = nums[1:]
	}
	return true
}

// sql records how far the baseline is.
func (b *Baseline) sql() string {
	key := "NULL"
	if b.AfterKey != nil {
		list := make([]string, len(b.AfterKey))
		for i, k := range b.AfterKey {
			list[i] = QuoteLiteral(k)
		}
		key = "ARRAY[" + strings.Join(list, ",") + "]"
	}
	done := ""
	if b.first {
		done = ", began_at = clock_timestamp()"
	}
	if b.Done {
		done += ", done_at = clock_timestamp()"
	}
	if b.gone {
		return fmt.Sprintf("DELETE FROM backstory.content WHERE oid = %d; DELETE FROM backstory.captured WHERE oid = %[1]d; ", b.OID)
	}
	if b.Done && b.Pass == PassShape { // nothing was read; whether there is something to read is as it was
		return fmt.Sprintf("UPDATE backstory.baseline SET pass = 1, altered = false, done_at = done_before, updated_at = clock_timestamp() WHERE oid = %d AND generation = %d AND done_before IS NOT NULL; "+
			"DELETE FROM backstory.baseline WHERE oid = %[1]d AND generation = %[2]d AND done_before IS NULL; ", b.OID, b.Generation)
	}
	q := fmt.Sprintf("UPDATE backstory.baseline SET chunks = %d, after_key = %s, again = %t, pass = %d, rows = %d, bytes = %d, imported = %d, heal = %t, altered = altered AND NOT %t, updated_at = clock_timestamp()%s WHERE oid = %d AND generation = %d; ",
		b.Chunks, key, b.again, b.Pass, b.Rows, b.Bytes, b.Imported, b.Heal, b.shaped, done, b.OID, b.Generation)
	if b.Done {
		q += fmt.Sprintf("DELETE FROM backstory.content WHERE oid = %d; ", b.OID)
	}
	if b.Done || b.doubt {
		q += fmt.Sprintf("UPDATE backstory.captured c SET complete = %t AND NOT insert_only FROM backstory.baseline b WHERE b.oid = c.oid AND b.since_lsn = c.since_lsn AND c.oid = %d AND b.generation = %d; ", b.Done, b.OID, b.Generation)
	}
	if b.Done { // altered after its last chunk was read, perhaps: its shape gets a place of its own
		q += fmt.Sprintf("UPDATE backstory.baseline SET pass = 0, heal = false, altered = false, chunks = 0, after_key = NULL, done_before = done_at, done_at = NULL, generation = nextval('backstory.generation') WHERE oid = %d AND generation = %d AND altered; ", b.OID, b.Generation)
	}
	return q
}

// judge finds the rows of a chunk of which the log knows already, by their number in it: their last state, nil if the log knows that the
// row is gone. seen are rows whose insert the chunk's snapshot sees, of a table of which only inserts are in the stream: what became of these the chunk alone tells.
func (w *Writer) judge(ctx context.Context, t *table, c *Chunk) (hits map[int]rowState, seen map[int]bool, err error) {
	if w.touched.bits == nil || c.Rows == 0 {
		return nil, nil, nil
	}
	row := make([]Value, len(t.rel.Columns))
	var keys, named []stateKey // by identity, by entity
	var numbers []int
	s, data := &w.scratch, c.data
	for i := range c.Rows {
		data = c.next(data, row)
		id, text, buf := w.entity(t, row, s.key)
		if s.key = buf; text != nil {
			id = keyHash(text)
		}
		k := w.stateKey(t, row)
		if !w.touched.has(t.rel.OID, id) && !(t.byRow && w.touched.has(t.rel.OID, k.id)) {
			continue
		}
		keys, named, numbers = append(keys, k), append(named, w.entityKey(t, id, text)), append(numbers, i)
	}
	if len(keys) == 0 {
		return nil, nil, nil
	}
	// The log is asked for the last states of rows, and what is on its way has to be there.
	if err := w.arrive(ctx); err != nil {
		return nil, nil, err
	}
	states, err := w.states(ctx, t, keys)
	if err != nil {
		return nil, nil, err
	}
	hits, seen = map[int]rowState{}, map[int]bool{}
	var open []int // of which the log's entities have to be asked
	for j, st := range states {
		if st.gone() {
			hits[numbers[j]] = nil
			continue
		}
		if st != nil {
			hits[numbers[j]] = nil
			if !st.partial() {
				continue
			}
			hits[numbers[j]] = append(rowState(nil), st...) // what follows may make the cache forget it
		}
		open = append(open, j)
	}
	var entities []stateKey
	for _, j := range open {
		entities = append(entities, named[j])
	}
	last, err := w.lastOf(ctx, entities, w.log.dict.events(t.rel.OID, w.head.Incarnation))
	if err != nil {
		return nil, nil, err
	}
	for i, l := range last {
		k, n := &keys[open[i]], numbers[open[i]]
		st, known := hits[n]
		switch {
		case l.id == 0 && l.old == 0 && !known: // nothing: the filter was wrong
		case t.rel.InsertOnly && l.id > l.old && Sees(c.Snapshot, uint32(l.xid)):
			seen[n] = true
		case st == nil, l.old > l.id, t.byRow && (l.rowID != k.id || (l.rowText != nil) != k.isText || k.isText && *l.rowText != k.text):
			hits[n] = nil // it goes by another name by now
		case !Sees(c.Snapshot, uint32(l.xid)):
			// The row that was read under this key may be another one, which has made room since. Once more, then.
			hits[n], w.baselines[t.rel.OID].again = nil, true
		}
	}
	return hits, seen, nil
}

// states gives the last states of rows, as of now.
func (w *Writer) states(ctx context.Context, t *table, keys []stateKey) ([]rowState, error) {
	out := make([]rowState, len(keys))
	if t.rel.InsertOnly {
		return out, nil
	}
	if t.rel.ReplicaIdentity == 'f' { // the cache does not follow what happens to these
		found := make([]building, len(keys))
		places := w.log.dict.places(t.rel.OID, w.head.Incarnation, t.byRow)
		for i := range found {
			found[i] = building{t: t, last: 1<<63 - 1, places: places}
		}
		if err := w.find(ctx, t.byRow, keys, found); err != nil {
			return nil, err
		}
		for i := range found {
			out[i] = found[i].state()
		}
		return out, nil
	}
	var asked []stateKey
	for _, k := range keys {
		if _, ok := w.state.get(&k); !ok {
			asked = append(asked, k)
		}
	}
	if len(asked) > 0 {
		if err := w.fetch(ctx, t.byRow, asked); err != nil {
			return nil, err
		}
	}
	for i := range keys {
		out[i], _ = w.state.get(&keys[i])
	}
	return out, nil
}

// Sees tells whether a snapshot, in the form of pg_current_snapshot (PostgreSQL manual, System Information Functions), sees a transaction
// that has committed. Transactions of our time lie within 2^31 of each other.
func Sees(snapshot string, xid uint32) bool {
	parts := strings.Split(snapshot, ":")
	if len(parts) != 3 {
		return false
	}
	before := func(a, b uint32) bool { return int32(a-b) < 0 }
	number := func(s string) uint32 {
		n, _ := strconv.ParseUint(s, 10, 64)
		return uint32(n)
	}
	if before(xid, number(parts[0])) {
		return true
	}
	if !before(xid, number(parts[1])) {
		return false
	}
	for _, s := range strings.Split(parts[2], ",") {
		if s != "" && number(s) == xid {
			return false
		}
	}
	return true
}

// reader gives the connection for look-ups.
func (w *Writer) reader(ctx context.Context) (*pgx.Conn, error) {
	if w.reads == nil {
		var err error
		if w.reads, err = w.connect(ctx, "backstory look-ups"); err != nil {
			return nil, err
		}
	}
	return w.reads, nil
}

// fill makes an event of what a chunk tells of a row that the log knows only in part; st is nil where it knows enough.
func (w *Writer) fill(ctx context.Context, t *table, row []Value, st rowState) error {
	if st == nil {
		return nil
	}
	s := &w.scratch
	s.data, s.rest = append(s.data[:0], '{'), append(s.rest[:0], '{')
	s.frags, s.off = s.frags[:0], append(s.off[:0], 0)
	for i := range row {
		f := st.frag(i)
		start := len(s.frags)
		if len(f) == 0 {
			s.frags = t.fragment(i, &row[i], s.frags)
			s.data = memberRaw(s.data, t.keys[i], s.frags[start:])
		} else {
			s.frags = append(s.frags, f...)
			if isBig(f) {
				var err error
				if f, err = w.load(ctx, t, i, f); err != nil {
					return err
				}
			}
			s.rest = memberRaw(s.rest, t.keys[i], f)
		}
		s.off = append(s.off, len(s.frags))
	}
	s.data, s.rest = append(s.data, '}'), append(s.rest, '}')
	e := eventRow{op: OpImport, data: s.data, rest: s.rest}
	if err := w.fileRow(ctx, t, &e, asImported); err != nil {
		return err
	}
	// Under the key that the log knows it by: the chunk's may be one of before.
	if t.namesRow(st) {
		var err error
		if e.id, e.text, err = w.stateEntity(ctx, t, st); err != nil {
			return err
		}
	} else {
		e.id, e.text, s.key = w.entity(t, row, s.key)
	}
	if t.byRow {
		e.hasRow = true
		e.rowID, e.rowText = w.rowIdentity(t, row)
	}
	w.event(t, &e)
	if t.rel.ReplicaIdentity != 'f' {
		key := w.stateKey(t, row)
		w.state.put(&key, s.frags, s.off, w.pos, 0)
	}
	return nil
}

// before tells whether there are events of a table that do not count (see places).
func (d *dictionary) before(oid uint32, incarnation int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	barrier := d.barrier(oid)
	newest, _ := d.newestOf(oid)
	for _, k := range d.kinds {
		if k.relation == nil || k.relation.OID != oid {
			continue
		}
		// Where only inserts are captured, and only inserts ever were, all of them count, as long as none was missed.
		if k.op == OpGap || k.source.incarnation != incarnation || k.relationID <= barrier && !(k.relation.InsertOnly && newest == barrier) {
			return true
		}
	}
	return false
}

// events tells where the events of a table are that count, and of one of which only inserts are captured all.
func (d *dictionary) events(oid uint32, incarnation int) []place {
	out := d.places(oid, incarnation, false)
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, r := d.newestOf(oid); len(out) > 0 || r == nil || !r.InsertOnly {
		return out
	}
	return d.placesOf(oid, func(k *kind) bool { return k.relation.InsertOnly && k.source.incarnation == incarnation })
}

// inserted tells whether there are rows of a table that the stream has told of from their beginning.
func (d *dictionary) inserted(oid uint32, incarnation int) bool {
	return d.hasKind(func(k *kind) bool {
		return k.op == OpInsert && k.relation != nil && k.relation.OID == oid && k.source.incarnation == incarnation
	})
}

// ended tells whether a baseline of a table has come to its end.
func (d *dictionary) ended(oid uint32) bool {
	return d.hasKind(func(k *kind) bool {
		return k.op == OpNote && k.relation != nil && k.relation.OID == oid && strings.HasSuffix(k.typ, "BaselineEnded")
	})
}

func (d *dictionary) hasKind(is func(*kind) bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, k := range d.kinds {
		if is(k) {
			return true
		}
	}
	return false
}

// version gives a version of a table by its number; nil: there is none.
func (d *dictionary) version(id int) *Relation {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.relations[id]
}
