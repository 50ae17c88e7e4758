package eventlog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Selection says which events, in which order. The zero value selects the whole log, oldest first, without quiet events.
type Selection struct {
	After      Position // only later events
	Until      Position // only this one and earlier; 0 means the head at the start of reading
	Aggregates []string // only these
	OIDs       []uint32 // of all aggregates but the first, only events of these tables
	EntityID   string   // with aggregates: only this entity, by its id; events that moved it away count too
	Rows       bool     // with an entity: only events of the row that it is, not of what belongs to it
	EmptyID    bool     // with aggregates: only the entity whose id is the empty text
	Types      []string // only these
	Relations  []string // only row changes of these tables, public.orders
	Tables     []uint32 // the same, by their OIDs
	Ops        []Op     // only these
	Quiet      bool     // quiet events too
	Newest     bool     // newest first
	Limit      int      // at most so many; 0 means all
	// NoMetadata leaves Event.Metadata to what is known of the event alone, for readers that do not want who and why.
	NoMetadata bool
	// Lean leaves out what a fold of rows does not need, which makes reading a third cheaper: who and why, and ID, OccurredAt,
	// XID, Change, Part and StreamID are zero.
	Lean bool
	// NoBefore and NoRest leave out Event.Before and Event.Rest.
	NoBefore, NoRest bool
}

// windowEvents is how many positions one statement reads, so that no statement on the log is a long one (G11).
const windowEvents = 128 << 10

// One tells whether only the events of one entity are selected.
func (s *Selection) One() bool { return s.EntityID != "" || s.EmptyID }

// Read calls f for each selected event. The event is valid until f returns. An error of f ends the reading and is returned.
func (l *Log) Read(ctx context.Context, sel Selection, f func(*Event) error) error {
	if sel.Until == 0 {
		h, err := l.Head(ctx)
		if err != nil {
			return err
		}
		sel.Until = h.Position
	}
	if err := l.dict.upTo(ctx, sel.Until); err != nil {
		return err
	}
	conn, err := l.pool.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("connect to the event log: %w", ConnError(err))
	}
	defer conn.Release()
	left := sel.Limit
	count := func(e *Event) error {
		left--
		return f(e)
	}
	if sel.One() {
		return l.scan(ctx, conn.Conn(), sel, sel.After, sel.Until, sel.Limit, nil, f)
	}
	// Where most events are wanted, who and why is merged in here; otherwise each event is joined with its range.
	sel.NoMetadata = sel.NoMetadata || sel.Lean
	merge := !sel.NoMetadata && !sel.Newest && len(sel.Aggregates)+len(sel.Types)+len(sel.Relations)+len(sel.Ops) == 0
	window := Position(windowEvents)
	if sel.Limit > 0 {
		window = Position(min(windowEvents, max(1000, 4*sel.Limit)))
		if merge { // nothing but quiet events is left out
			window = Position(min(windowEvents, max(1000, sel.Limit+sel.Limit/4)))
		}
	}
	for lo, hi := sel.After, sel.Until; lo < hi; {
		a, b := lo, min(hi, lo+window)
		if sel.Newest {
			a, b = max(lo, hi-window), hi
		}
		contexts := []contextRange(nil)
		if merge {
			if contexts, b, err = readContexts(ctx, conn.Conn(), a, b); err != nil {
				return err
			}
			if contexts == nil {
				contexts = []contextRange{}
			}
		}
		if err := l.scan(ctx, conn.Conn(), sel, a, b, max(left, 0), contexts, count); err != nil {
			return err
		}
		if sel.Limit > 0 && left <= 0 { // the statement ended by itself, so its connection can be used again
			return nil
		}
		if sel.Newest {
			hi = a
		} else {
			lo = b
		}
		window = min(windowEvents, 2*window)
	}
	return nil
}

// eventColumns are what a seal covers, in this order.
const eventColumns = `e.position, e.kind, e.stream, e.id, e.id_text, e.row_id, e.row_text, e.old_id, e.old_text, e.owner, e.owner_id, e.owner_text, e.also, e.occurred_at, e.commit_lsn, e.xid,
	e.change, e.part, e.data, e.before, e.rest, e.extra, e.meta`

// scanColumns are what a scan reads: each column that is not NULL costs the server some 60 ns.
const scanColumns = `e.position, e.kind, e.id, e.id_text, e.old_id, e.old_text, e.owner_id, e.owner_text, e.occurred_at, e.commit_lsn, e.xid, e.change, e.part, e.data, e.before, e.rest, e.extra, e.meta`

// leanColumns are those of Selection.Lean.
const leanColumns = `e.position, e.kind, e.id, e.id_text, e.old_id, e.old_text, e.commit_lsn, e.data, e.before, e.rest, e.meta`

// where gives the condition for a selection; the second result is false where nothing can match.
func (l *Log) where(sel Selection, after, until Position) (string, bool) {
	var w strings.Builder
	fmt.Fprintf(&w, "e.position > %d AND e.position <= %d", after, until)
	d := l.dict
	d.mu.Lock()
	defer d.mu.Unlock()
	linked := len(d.rules) > 0 // only by rules are events found under entities that are not their row
	if len(sel.Aggregates) > 0 || len(sel.Types) > 0 || len(sel.Relations) > 0 || len(sel.Tables) > 0 || len(sel.Ops) > 0 || sel.EmptyID || !sel.Quiet {
		var ids []string
		for id, k := range d.kinds {
			if len(sel.Aggregates) > 0 && !slices.Contains(sel.Aggregates, k.aggregate.name) && !(k.owner != nil && slices.Contains(sel.Aggregates, k.owner.name)) && !(sel.One() && !sel.Rows && linked) ||
				len(sel.OIDs) > 0 && slices.Contains(sel.Aggregates[1:], k.aggregate.name) && (k.relation == nil || !slices.Contains(sel.OIDs, k.relation.OID)) ||
				len(sel.Types) > 0 && !slices.Contains(sel.Types, k.typ) ||
				len(sel.Relations) > 0 && (k.relation == nil || !slices.Contains(sel.Relations, k.relation.String()) && !slices.Contains(sel.Relations, k.relation.Own())) ||
				len(sel.Tables) > 0 && (k.relation == nil || !slices.Contains(sel.Tables, k.relation.OID)) ||
				len(sel.Ops) > 0 && !slices.Contains(sel.Ops, k.op) ||
				sel.EmptyID && !k.op.OfRow() ||
				k.quiet && !sel.Quiet {
				continue
			}
			ids = append(ids, itoa(id))
		}
		if len(ids) == 0 {
			return "", false
		}
		if len(ids) < len(d.kinds) {
			slices.Sort(ids)
			fmt.Fprintf(&w, " AND e.kind = ANY ('{%s}')", strings.Join(ids, ","))
		}
	}
	if sel.One() {
		var or []string
		for _, a := range d.aggregates {
			if !slices.Contains(sel.Aggregates, a.name) {
				continue
			}
			hash, text := entityHash(a, sel.EntityID)
			cond := func(id, txt string) string {
				c := fmt.Sprintf("e.stream = %d AND e.%s = %d", a.id, id, hash)
				if text {
					return c + " AND e." + txt + " = " + QuoteLiteral(sel.EntityID)
				}
				return c
			}
			owned := fmt.Sprintf("e.owner = %d AND e.owner_id = %d", a.id, hash)
			if text {
				owned += " AND e.owner_text = " + QuoteLiteral(sel.EntityID)
			}
			or = append(or, "("+cond("id", "id_text")+")", "("+cond("old_id", "old_text")+")")
			if linked && !sel.Rows {
				or = append(or, "("+owned+")", fmt.Sprintf("(e.also @> ARRAY[%d]::bigint[])", linkHash(a.id, sel.EntityID)))
			}
		}
		if len(or) == 0 {
			return "", false
		}
		w.WriteString(" AND (" + strings.Join(or, " OR ") + ")")
	}
	return w.String(), true
}

// entityHash gives the number under which an entity is indexed, and whether its text is stored beside it.
func entityHash(a *aggregate, id string) (hash int64, text bool) {
	if a.idType == "bigint" {
		if n, ok := parseInt([]byte(id)); ok {
			return n, false
		}
	}
	return keyHash([]byte(id)), true
}

// QuoteLiteral quotes a text for use in SQL, whatever standard_conforming_strings is.
func QuoteLiteral(s string) string {
	q := "'" + strings.ReplaceAll(s, "'", "''") + "'"
	if strings.Contains(s, `\`) {
		return " E" + strings.ReplaceAll(q, `\`, `\\`)
	}
	return q
}

// scan reads one range with one statement. contexts, if not nil, are the ranges of who and why in it; otherwise the statement
// joins them, unless they are not wanted.
func (l *Log) scan(ctx context.Context, conn *pgx.Conn, sel Selection, after, until Position, limit int, contexts []contextRange, f func(*Event) error) error {
	where, ok := l.where(sel, after, until)
	if !ok {
		return nil
	}
	s := scanner{log: l, ctx: ctx, f: f, contexts: !sel.NoMetadata && contexts == nil, ranges: contexts}
	var q strings.Builder
	columns, emit := scanColumns, s.emit
	if sel.Lean {
		columns, emit = leanColumns, s.emitLean
	}
	if sel.NoBefore {
		columns = strings.Replace(columns, "e.before", "NULL::text", 1)
	}
	if sel.NoRest {
		columns = strings.Replace(columns, "e.rest", "NULL::text", 1)
	}
	q.WriteString("COPY (SELECT " + columns)
	if s.contexts {
		q.WriteString(", c.metadata FROM backstory.event e LEFT JOIN LATERAL (SELECT x.last_position, x.metadata FROM backstory.context x " +
			"WHERE x.first_position <= e.position ORDER BY x.first_position DESC LIMIT 1) c ON c.last_position >= e.position")
	} else {
		q.WriteString(" FROM backstory.event e")
	}
	q.WriteString(" WHERE " + where + " ORDER BY e.position")
	if sel.Newest {
		q.WriteString(" DESC")
	}
	if limit > 0 {
		fmt.Fprintf(&q, " LIMIT %d", limit)
	}
	q.WriteString(") TO STDOUT (FORMAT binary)")
	return copyOut(ctx, conn.PgConn(), q.String(), emit)
}

// scanner makes events of the rows of one statement.
type scanner struct {
	log      *Log
	ctx      context.Context
	f        func(*Event) error
	contexts bool           // the statement's last column is who and why
	ranges   []contextRange // or it is here
	event    Event
	merged   []byte
	kind     *kind
	kindID   int32
}

func i64(b []byte) int64 { return int64(binary.BigEndian.Uint64(b)) }
func i32(b []byte) int32 { return int32(binary.BigEndian.Uint32(b)) }

// pgEpoch is the zero of binary timestamps, in microseconds of Unix time.
const pgEpoch = 946684800 * 1000000

func (s *scanner) emit(_ []byte, f [][]byte) error {
	if err := s.begin(f[0], f[1]); err != nil {
		return err
	}
	k, e := s.kind, &s.event
	if e.StreamID = k.aggregate.id; k.owner != nil {
		e.StreamID = k.owner.id
	}
	s.entity(f[2], f[3], f[4], f[5])
	s.owner(f[6], f[7])
	f = f[8:]
	us := i64(f[0]) + pgEpoch
	e.OccurredAt = time.UnixMicro(us).UTC()
	e.CommitLSN = LSN(i64(f[1]))
	e.XID = uint32(i64(f[2]))
	e.Change, e.Part = i64(f[3]), int(i32(f[4]))
	e.ID = makeID(k.source.tag, e.CommitLSN, e.Change, e.Part)
	e.Data, e.Before, e.Rest, e.Extra, e.Metadata = f[5], f[6], f[7], f[8], f[9]
	var who []byte
	if s.contexts && len(f) > 10 {
		who = f[10]
	}
	for len(s.ranges) > 1 && s.ranges[1].first <= e.Position {
		s.ranges = s.ranges[1:]
	}
	if len(s.ranges) > 0 && s.ranges[0].first <= e.Position && e.Position <= s.ranges[0].last {
		who = s.ranges[0].metadata
	}
	if who != nil {
		if e.Metadata == nil {
			e.Metadata = who
		} else {
			s.merged = mergeObjects(s.merged[:0], who, e.Metadata)
			e.Metadata = s.merged
		}
	}
	return s.f(e)
}

// emitLean is emit for leanColumns.
func (s *scanner) emitLean(_ []byte, f [][]byte) error {
	if err := s.begin(f[0], f[1]); err != nil {
		return err
	}
	s.entity(f[2], f[3], f[4], f[5])
	e := &s.event
	e.CommitLSN = LSN(i64(f[6]))
	e.Data, e.Before, e.Rest, e.Metadata = f[7], f[8], f[9], f[10]
	return s.f(e)
}

// begin takes an event's position and what it shares with others.
func (s *scanner) begin(position, kindID []byte) error {
	e := &s.event
	e.Position = Position(i64(position))
	id := i32(kindID)
	if s.kind != nil && id == s.kindID {
		return nil
	}
	k, err := s.log.dict.kind(s.ctx, id)
	if err != nil {
		return err
	}
	s.kind, s.kindID = k, id
	e.Aggregate, e.Type, e.Op, e.Quiet, e.Restates, e.Relation = k.aggregate.name, k.typ, k.op, k.quiet, k.restates, k.relation
	if e.Owned = k.owner != nil; e.Owned {
		e.Aggregate = k.owner.name
	}
	e.Source, e.SchemaVersion, e.RulesVersion = k.source.id, k.relationID, k.rulesVersion
	return nil
}

// entity takes the keys of an event's row, of now and of before. They are the ids of its entity, unless it has an owner.
func (s *scanner) entity(id, text, oldID, oldText []byte) {
	e := &s.event
	e.EntityHash = i64(id)
	if text != nil {
		e.Key = string(text)
	} else {
		e.Key = itoa(e.EntityHash)
	}
	switch {
	case oldText != nil:
		e.PreviousKey = string(oldText)
	case oldID != nil:
		e.PreviousKey = itoa(i64(oldID))
	default:
		e.PreviousKey = ""
	}
	e.AggregateID, e.PreviousID = e.Key, e.PreviousKey
}

// owner takes the id of the entity that rules file the event under.
func (s *scanner) owner(id, text []byte) {
	e := &s.event
	if s.kind.owner == nil {
		return
	}
	e.PreviousID = ""
	if e.EntityHash = i64(id); text != nil {
		e.AggregateID = string(text)
	} else {
		e.AggregateID = itoa(e.EntityHash)
	}
}

// mergeObjects appends a JSON object with the members of a and then of b.
func mergeObjects(dst, a, b []byte) []byte {
	trim := func(o []byte) []byte {
		o = []byte(strings.TrimSpace(string(o)))
		if len(o) < 2 {
			return nil
		}
		return o[1 : len(o)-1]
	}
	x, y := trim(a), trim(b)
	dst = append(dst, '{')
	dst = append(dst, x...)
	if len(strings.TrimSpace(string(x))) > 0 && len(strings.TrimSpace(string(y))) > 0 {
		dst = append(dst, ',')
	}
	dst = append(dst, y...)
	return append(dst, '}')
}

// Get reads one event. It returns pgx.ErrNoRows in a Problem where there is none.
func (l *Log) Get(ctx context.Context, p Position) (*Event, error) {
	var found *Event
	err := l.Read(ctx, Selection{After: p - 1, Until: p, Quiet: true}, func(e *Event) error { found = e.Clone(); return nil })
	if err == nil && found == nil {
		err = &Problem{fmt.Errorf("no event at position %d", p), "backstory log shows what there is; backstory status shows the last position."}
	}
	return found, err
}

// Find reads one event by its id.
func (l *Log) Find(ctx context.Context, id ID) (*Event, error) {
	tag, lsn, change, part := id.unpack()
	var p *Position
	err := l.pool.QueryRow(ctx, `SELECT e.position FROM backstory.event e JOIN backstory.kind k ON k.id = e.kind JOIN backstory.source s ON s.id = k.source
		WHERE s.tag = $1 AND e.commit_lsn = $2::bigint::numeric + '0/0'::pg_lsn AND e.change = $3 AND e.part = $4
		  AND e.position <= (SELECT position FROM backstory.head)`, int64(tag), int64(lsn), change, part).Scan(&p)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, &Problem{fmt.Errorf("no event with id %s", id), "backstory log --json shows the ids of events."}
	}
	if err != nil {
		return nil, fmt.Errorf("find event %s: %w", id, err)
	}
	return l.Get(ctx, *p)
}
