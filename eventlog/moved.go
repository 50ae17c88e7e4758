package eventlog

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"
)

// A table is known by its OID, and a column by its number. Across a gap these may come to mean something else: in another system, which the source was
// restored in from a dump, and in one that was put back to an earlier state and has given numbers out again since. So where a gap is accepted it is
// recorded (backstory.moved) which number of now a table of before has, and its columns. What is stored of before stays as it was; it is read as if it had
// always had the numbers of now (dictionary.loadLocked), so everything else goes by one number a table.
//
// A table that is not there any more, or of which nobody can tell, gets a number that no table of any source has. Tried in thought and left: a number of
// the log's own in the place of the OID, which captured, baseline, the stream and each event trigger's message would have to be translated to, for good.

// firstOID is the first that Postgres gives to what users make (FirstNormalObjectId).
const firstOID = 16384

// Crossing tells how the source of after a gap is that of before.
type Crossing int

const (
	// SameSource: OIDs and numbers of columns mean what they did.
	SameSource Crossing = iota
	// PutBack: it is one system, and does not have all that the log has. What was made since may have numbers that the log knows of something else.
	PutBack
	// OtherSystem: another system or database; numbers mean nothing.
	OtherSystem
)

// Present is a table of the source as it is when a gap is accepted.
type Present struct {
	OID          uint32
	Schema, Name string
	Relation     *Relation // nil: it is not captured
}

// moved is a row of backstory.moved: which number a table of before has since.
type moved struct {
	id, until int    // it holds of the versions up to this one
	oid, now  uint32 // of the table, or of a partitioned one
	columns   []movedColumn
}

type movedColumn struct {
	Num     int16  `json:"num"`
	Now     int16  `json:"now"`            // below zero: it is not there any more
	Root    int16  `json:"root,omitempty"` // now, as Column.Root
	Type    uint32 `json:"type,omitempty"` // that was the same type by another number
	TypeNow uint32 `json:"type_now,omitempty"`
}

// asNow gives a version of a table as if its numbers had been those of now.
func asNow(list []moved, id int, r *Relation) *Relation {
	out := *r
	for i := 0; i < len(list); {
		var table, root *moved
		until := list[i].until
		for ; i < len(list) && list[i].until == until; i++ { // those of one gap at once: tables may have swapped numbers
			if m := &list[i]; id <= until && m.oid == out.OID {
				table = m
			}
			if m := &list[i]; id <= until && m.oid == out.RootOID {
				root = m
			}
		}
		if root != nil {
			out.RootOID = root.now
		}
		if table == nil {
			continue
		}
		out.OID = table.now
		if len(table.columns) == 0 {
			continue
		}
		of := map[int16]*movedColumn{}
		for n := range table.columns {
			of[table.columns[n].Num] = &table.columns[n]
		}
		out.Columns, out.Generated = slices.Clone(out.Columns), slices.Clone(out.Generated)
		for n := range out.Columns {
			c := &out.Columns[n]
			m := of[c.Num]
			if m == nil {
				continue
			}
			if c.Num, c.Root = m.Now, m.Root; m.TypeNow != 0 && c.Type.OID == m.Type {
				c.Type.OID = m.TypeNow
			}
		}
		for n := range out.Generated {
			if m := of[out.Generated[n].Num]; m != nil {
				out.Generated[n].Num, out.Generated[n].Root = m.Now, m.Root
			}
		}
	}
	return &out
}

// movedTable is a table of before on its way over a gap.
type movedTable struct {
	oid      uint32
	last     *Relation
	id       int // of that version
	versions []*Relation
	now      *Present // nil: there is none
}

func (t *movedTable) had(name string) bool {
	return slices.ContainsFunc(t.versions, func(r *Relation) bool { return r.Own() == name })
}

// crossed tells which tables of before are which ones of now. With the same numbers as before: those of one source, whatever their names are by then; of one
// that was put back, those that have a name which the log has seen them with. Otherwise those of the same name. What was dropped before is no table of now.
func (d *dictionary) crossed(how Crossing, present []Present) []*movedTable {
	d.mu.Lock()
	of := map[uint32]*movedTable{}
	for id, r := range d.relations {
		t := of[r.OID]
		if t == nil {
			t = &movedTable{oid: r.OID}
			of[r.OID] = t
		}
		if t.versions = append(t.versions, r); id > t.id {
			t.id, t.last = id, r
		}
	}
	d.mu.Unlock()
	tables := slices.SortedFunc(maps.Values(of), func(a, b *movedTable) int { return cmp.Compare(b.id, a.id) }) // the newest first
	tables = slices.DeleteFunc(tables, func(t *movedTable) bool { return t.oid < firstOID })
	byOID, byName, taken := map[uint32]*Present{}, map[string]*Present{}, map[*Present]bool{}
	for i := range present {
		p := &present[i]
		byOID[p.OID], byName[p.Schema+"."+p.Name] = p, p
	}
	for _, t := range tables {
		if p := byOID[t.oid]; p != nil && !t.last.Dropped && (how == SameSource || how == PutBack && t.had(p.Schema+"."+p.Name)) {
			t.now, taken[p] = p, true
		}
	}
	for _, t := range tables {
		if p := byName[t.last.Own()]; t.now == nil && p != nil && !t.last.Dropped && !taken[p] && p.Relation != nil {
			t.now, taken[p] = p, true
		}
	}
	return tables
}

// moves gives what has to be recorded of them.
func (d *dictionary) moves(how Crossing, tables []*movedTable, until, id int) (list []moved) {
	used, roots := map[uint32]bool{}, map[uint32]uint32{}
	d.mu.Lock()
	for _, r := range d.relations {
		used[r.OID], used[r.RootOID] = true, true
	}
	d.mu.Unlock()
	free := uint32(firstOID)
	nobodys := func() uint32 {
		for free--; used[free]; free-- {
		}
		return free
	}
	add := func(from, to uint32, columns []movedColumn) {
		if from != to || len(columns) > 0 {
			list = append(list, moved{id: id + 1 + len(list), until: until, oid: from, now: to, columns: columns})
		}
	}
	for _, t := range tables {
		switch p := t.now; {
		case p == nil && how != SameSource:
			add(t.oid, nobodys(), nil)
		case p == nil || p.Relation == nil:
		default:
			var columns []movedColumn
			if how != SameSource || p.OID != t.oid {
				columns = t.columns(how == PutBack && p.OID == t.oid)
			}
			add(t.oid, p.OID, columns)
			if was := t.last; was.RootOID != 0 && was.RootSchema == p.Relation.RootSchema && was.RootName == p.Relation.RootName {
				roots[was.RootOID] = p.Relation.RootOID
			}
		}
	}
	if how != SameSource {
		for _, t := range tables {
			for _, r := range t.versions {
				if _, ok := roots[r.RootOID]; !ok && r.RootOID >= firstOID {
					roots[r.RootOID] = nobodys()
				}
			}
		}
	}
	for _, from := range slices.Sorted(maps.Keys(roots)) {
		if !slices.ContainsFunc(list, func(m moved) bool { return m.oid == from }) {
			add(from, roots[from], nil)
		}
	}
	return list
}

// columns tells which column of now each column of before is; nil if all have the same numbers. With numbered, one of the same number and of a name that it
// once had is the same; otherwise it goes by the name that it had last.
func (t *movedTable) columns(numbered bool) []movedColumn {
	names, last, least := map[int16]map[string]bool{}, map[string]int16{}, int16(0)
	types := map[int16]Type{}
	see := func(num int16, name string) {
		if num == 0 {
			return
		}
		if names[num] == nil {
			names[num] = map[string]bool{}
		}
		names[num][name], least = true, min(least, num)
	}
	for _, r := range t.versions {
		for _, c := range r.Columns {
			see(c.Num, c.Name)
		}
		for _, g := range r.Generated {
			see(g.Num, g.Name)
		}
	}
	for _, c := range t.last.Columns {
		last[c.Name], types[c.Num] = c.Num, c.Type
	}
	for _, g := range t.last.Generated {
		last[g.Name] = g.Num
	}
	is, to := map[int16]Column{}, map[int16]int16{}
	for _, c := range t.now.Relation.Columns {
		is[c.Num] = c
	}
	for _, g := range t.now.Relation.Generated {
		is[g.Num] = Column{Name: g.Name, Num: g.Num, Root: g.Root}
	}
	given := map[int16]bool{}
	nums := slices.Sorted(maps.Keys(is))
	for _, num := range nums {
		if numbered && names[num][is[num].Name] {
			to[num], given[num] = num, true
		}
	}
	for _, num := range nums {
		was, ok := last[is[num].Name]
		if _, other := to[was]; ok && was != 0 && !given[num] && !other {
			to[was], given[num] = num, true
		}
	}
	var out []movedColumn
	same := true
	for _, num := range slices.Sorted(maps.Keys(names)) {
		now, ok := to[num]
		if !ok {
			if num < 0 {
				continue
			}
			least--
			out, same = append(out, movedColumn{Num: num, Now: least}), false
			continue
		}
		c := is[now]
		m := movedColumn{Num: num, Now: now, Root: c.Root}
		if was := types[num]; was.Name == c.Type.Name && was.OID != c.Type.OID {
			m.Type, m.TypeNow = was.OID, c.Type.OID
		}
		same = same && num == now && m.TypeNow == 0
		out = append(out, m)
	}
	if same {
		return nil
	}
	return out
}

// AcceptGap lets the log go on after a gap, from another point of the source, which is how that of before. Rows of before may have changed or vanished
// unseen, so no table counts as complete until it is compared with the source (heal.go). captured are the tables from now on, in present all that there are.
// It gives captured as it is recorded.
func (l *Log) AcceptGap(ctx context.Context, h Head, how Crossing, captured []Captured, present []Present) ([]Captured, error) {
	w, err := l.NewWriter(ctx)
	if err != nil {
		return nil, Remedy(err)
	}
	tables, err := w.acceptGap(ctx, h, how, captured, present)
	if e := w.Close(ctx); err == nil {
		err = e
	}
	if err != nil {
		return nil, fmt.Errorf("accept the gap: %w", err)
	}
	return tables, nil
}

func (w *Writer) acceptGap(ctx context.Context, h Head, how Crossing, captured []Captured, present []Present) ([]Captured, error) {
	before, err := w.log.Captured(ctx)
	if err != nil {
		return nil, err
	}
	captured = slices.Clone(captured)
	n := len(captured)
	for i := range present {
		if j := slices.IndexFunc(captured, func(c Captured) bool { return c.OID == present[i].OID }); j >= 0 {
			present[i].Relation = captured[j].Relation
		}
	}
	tables := w.log.dict.crossed(how, present)
	moves := w.log.dict.moves(how, tables, w.nextIDs.relation, w.nextIDs.moved)
	to := func(oid uint32) uint32 {
		if i := slices.IndexFunc(moves, func(m moved) bool { return m.oid == oid }); i >= 0 {
			return moves[i].now
		}
		return oid
	}
	known := func(oid uint32) *movedTable {
		if i := slices.IndexFunc(tables, func(t *movedTable) bool { return t.oid == oid }); i >= 0 {
			return tables[i]
		}
		return nil
	}
	there := func(is func(Present) bool) bool { return slices.ContainsFunc(present, is) }
	var gone []string
	for i := range captured {
		c := &captured[i]
		less := *c.Relation
		less.Complete, c.Relation = false, &less
	}
	for _, b := range before {
		t := known(b.OID)
		if t == nil && how != SameSource {
			continue // nothing of it is in the log
		}
		if i := slices.IndexFunc(captured, func(c Captured) bool { return c.OID == to(b.OID) && (t == nil || t.now != nil) }); i >= 0 {
			// Since then, but for the gap, which is noted; a source that has gone back to an earlier state uses these places again.
			captured[i].SinceLSN = min(captured[i].SinceLSN, b.SinceLSN)
			continue
		}
		switch {
		case t != nil && (t.now != nil || t.last.Dropped): // it is there, and not captured any more; or that is in the log
			continue
		case t == nil && there(func(p Present) bool { return p.OID == b.OID }):
			continue
		case t != nil && how != SameSource && there(func(p Present) bool {
			return p.Schema+"."+p.Name == t.last.Own() && !slices.ContainsFunc(tables, func(o *movedTable) bool { return o.now != nil && o.now.OID == p.OID })
		}):
			continue // perhaps it is that one, which is not captured
		}
		r := *b.Relation
		if how != SameSource {
			r = *t.last
			b.Published, gone = "", append(gone, r.Own())
		}
		r.OID, r.Complete, b.Relation, b.SinceLSN = to(b.OID), false, &r, min(b.SinceLSN, h.EndLSN)
		captured = append(captured, b) // which the sidecar finds to be gone
	}
	if err := w.recordMoves(moves, tables, gone, h, how); err != nil {
		return nil, err
	}
	w.endLSN, w.commit, w.tl = h.EndLSN, 0, h.Timeline
	w.also = func(ctx context.Context, tx execer) error {
		for _, q := range []string{`DELETE FROM backstory.baseline`, `DELETE FROM backstory.content`, `DELETE FROM backstory.captured`} {
			if _, err := tx.Exec(ctx, q); err != nil {
				return err
			}
		}
		if len(moves) > 0 { // the partitions that are not captured are looked for anew
			if _, err := tx.Exec(ctx, `UPDATE backstory.left_out SET gone_lsn = coalesce(gone_lsn, $1::pg_lsn), until_position = $2 WHERE until_position IS NULL`, h.EndLSN.String(), int64(w.pos)); err != nil {
				return err
			}
		}
		if err := setCaptured(ctx, tx, captured); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `UPDATE backstory.head SET gap = NULL, incarnation = incarnation + 1, system_id = $1, database = $2, slot = $3, server_version = $4, closed = false WHERE epoch = $5`,
			h.SystemID, h.Database, h.Slot, h.Version, w.head.Epoch)
		return err
	}
	if err := w.flush(ctx, 0, false); err != nil {
		return nil, err
	}
	return captured[:n], w.join(ctx)
}

// recordMoves makes the event with which they are sealed.
func (w *Writer) recordMoves(moves []moved, tables []*movedTable, gone []string, h Head, how Crossing) error {
	if len(moves) == 0 {
		return nil
	}
	same := []string{}
	for _, t := range tables {
		if t.now != nil && slices.ContainsFunc(moves, func(m moved) bool { return m.oid == t.oid }) {
			same = append(same, t.now.Schema+"."+t.now.Name)
		}
	}
	slices.Sort(same)
	slices.Sort(gone)
	told := struct {
		System   string   `json:"system_id,omitempty"`
		Database string   `json:"database,omitempty"`
		Tables   []string `json:"tables"`
		Gone     []string `json:"gone,omitempty"`
	}{Tables: same, Gone: gone}
	if how == OtherSystem {
		told.System, told.Database = h.SystemID, h.Database
	}
	data, err := json.Marshal(told)
	if err != nil {
		return err
	}
	for _, m := range moves {
		columns, err := json.Marshal(append([]movedColumn{}, m.columns...))
		if err != nil {
			return err
		}
		w.nextIDs.moved = m.id
		w.news = append(w.news, newRow{movedTableRow, []any{m.id, m.until, int64(m.oid), int64(m.now), string(columns)}})
	}
	return w.beside(w.noteTable(sourceAggregate), OpNote, "SourceMoved", []byte(w.head.Slot), data)
}

// loadMoved reads what is new of them; then versions and kinds have to be read again. With d.mu held.
func (d *dictionary) loadMoved(ctx context.Context, p pgx.Tx) error {
	rows, err := p.Query(ctx, `SELECT id, until, oid::bigint, now_oid::bigint, columns::text FROM backstory.moved WHERE sealed_at <= (SELECT position FROM backstory.head) ORDER BY id`)
	if err != nil {
		return err
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (m moved, err error) {
		var oid, now int64
		var columns string
		if err := row.Scan(&m.id, &m.until, &oid, &now, &columns); err != nil {
			return m, err
		}
		m.oid, m.now = uint32(oid), uint32(now)
		return m, json.Unmarshal([]byte(columns), &m.columns)
	})
	if err != nil {
		return err
	}
	if len(list) != len(d.moved) {
		clear(d.relations)
		clear(d.kinds)
	}
	d.moved = list
	return nil
}
