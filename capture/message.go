package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// data takes one CopyData message: XLogData or a keepalive.
func (x *session) data(b []byte) error {
	c := cursor{b: b}
	switch c.u8() {
	case 'w':
		c.take(24) // start and end of what is sent, and the server's clock
		if c.bad || len(c.b) == 0 {
			return errMalformed
		}
		return x.message(c.b)
	case 'k':
		end, _, reply := eventlog.LSN(c.u64()), c.u64(), c.u8()
		if c.bad {
			return errMalformed
		}
		if !x.inTx && end > x.skipped {
			if err := x.again.reached(end); err != nil {
				return err
			}
			x.skipped = end
			if end > eventlog.LSN(x.received.Load()) {
				x.received.Store(uint64(end))
			}
		}
		if reply != 0 {
			return x.tell(time.Now(), true)
		}
		return nil
	}
	return errMalformed
}

// message takes one message of pgoutput.
func (x *session) message(b []byte) error {
	kind := b[0]
	switch kind {
	case 'I', 'U', 'D':
		if !x.inTx || len(b) < 5 {
			return errMalformed
		}
		if x.again.past {
			return nil
		}
		rel, err := x.described(binary.BigEndian.Uint32(b[1:]))
		if err != nil {
			return err
		}
		if rel == nil {
			return fmt.Errorf("row change of a relation that the source did not describe: %w", errMalformed)
		}
		it, err := decodeChange(kind, x.batch.Copy(b[5:]), rel, x.batch)
		if err != nil {
			return err
		}
		x.batch.Add(it)
		if x.batch.Bytes() >= x.cfg.MaxBatchBytes {
			return x.hand()
		}
		return nil
	}
	c := cursor{b: b[1:]}
	switch kind {
	case 'B':
		lsn, at, xid := eventlog.LSN(c.u64()), c.time(), c.u32()
		if c.bad || x.inTx {
			return errMalformed
		}
		if e := x.stopped.Load(); e != nil && e.at != 0 && lsn >= e.at { // transactions come in the order of their commits
			x.skipped = max(x.skipped, e.at)
			return e.err
		}
		if err := x.again.begin(lsn, at); err != nil {
			return err
		}
		if x.inTx, x.xid = true, xid; x.again.past {
			return nil
		}
		x.batch.Add(eventlog.Item{Kind: eventlog.ItemBegin, CommitLSN: lsn, Time: at, XID: xid, Timeline: x.server.timelineOf(lsn)})
	case 'C':
		c.u8()
		c.u64()
		end := eventlog.LSN(c.u64())
		if c.bad || !x.inTx {
			return errMalformed
		}
		if x.inTx, x.rewritten = false, nil; x.again.past {
			x.again.past = false
			return nil
		}
		if n := len(x.batch.Items); n > 0 && x.batch.Items[n-1].Kind == eventlog.ItemBegin { // nothing of ours in it
			x.batch.Items[n-1] = eventlog.Item{Kind: eventlog.ItemProgress, EndLSN: end, Timeline: x.batch.Items[n-1].Timeline}
		} else {
			x.batch.Add(eventlog.Item{Kind: eventlog.ItemCommit, EndLSN: end})
		}
		x.lastEnd = end
		x.received.Store(uint64(end))
		if x.batch.Bytes() >= x.cfg.MaxBatchBytes {
			return x.hand()
		}
	case 'R':
		m, err := decodeRelation(b[1:])
		if err != nil {
			return err
		}
		if x.again.relations == nil {
			x.again.relations = map[uint32]*relationMessage{}
		}
		x.again.relations[m.oid] = m
		if x.again.past { // perhaps of a table that is not captured any more; later changes of others are described by this, too
			return nil
		}
		_, err = x.described(m.oid)
		return err
	case 'T':
		if x.again.past {
			return nil
		}
		n, _ := int(c.u32()), c.u8()
		for i := 0; i < n && !c.bad; i++ {
			rel, err := x.described(c.u32())
			if err != nil {
				return err
			}
			if rel == nil || c.bad {
				return fmt.Errorf("TRUNCATE of a relation that the source did not describe: %w", errMalformed)
			}
			x.batch.Add(eventlog.Item{Kind: eventlog.ItemChange, Op: eventlog.OpTruncate, Relation: rel})
		}
		if c.bad {
			return errMalformed
		}
	case 'M':
		if x.again.past {
			return nil
		}
		flags, _, prefix := c.u8(), c.u64(), c.str()
		content := c.take(int(c.u32()))
		if c.bad {
			return errMalformed
		}
		if prefix == chunkPrefix && flags&1 != 0 && x.inTx {
			if chunk := x.chunks.take(content); chunk != nil {
				x.batch.Add(eventlog.Item{Kind: eventlog.ItemChunk, Chunk: chunk})
			}
			return nil
		}
		if prefix == ddlPrefix && flags&1 != 0 && x.inTx {
			x.defined(content)
			return nil
		}
		if prefix != "backstory" && prefix != "_bemi" {
			return nil
		}
		if flags&1 == 0 || !x.inTx { // not transactional: anybody may send one, and it belongs to no row
			x.batch.Ignored++
			return nil
		}
		x.batch.Add(eventlog.Item{Kind: eventlog.ItemMessage, Text: x.batch.Copy(content)})
	case 'Y', 'O':
		// the name of a type, and the origin of a transaction: the catalogue tells the one, nobody asks for the other
	default:
		return fmt.Errorf("message %q: %w", kind, errMalformed)
	}
	return nil
}

// described gives the relation that the source has described last under a number; nil if there is none.
func (x *session) described(oid uint32) (*eventlog.Relation, error) {
	if m := x.again.relations[oid]; m != nil {
		delete(x.again.relations, oid)
		if err := x.relation(m); err != nil {
			return nil, err
		}
	}
	return x.relations[oid], nil
}

// again is what the source tells again at the beginning of a session: transactions that the log has, down to the last one, which has to be
// the one that the log has last. A source that was put back to an earlier state, and went on from there, has others in their places.
type again struct {
	start     eventlog.LSN // from where on the source tells; it was put back to something behind that
	end       eventlog.LSN // of the log: what was committed before is in it
	last      eventlog.LSN // of the last transaction in the log, as long as it has not been met; 0: it is not told again
	when      time.Time
	past      bool                        // the transaction that is coming in is in the log
	relations map[uint32]*relationMessage // described, and not looked up yet
}

func newAgain(head *eventlog.Head, start eventlog.LSN) again {
	a := again{start: start, end: head.EndLSN}
	if head.CommitLSN >= start && !head.OccurredAt.IsZero() {
		a.last, a.when = head.CommitLSN, head.OccurredAt
	}
	return a
}

// begin is told of a transaction that begins.
func (a *again) begin(commit eventlog.LSN, at time.Time) error {
	a.past = commit < a.end
	if a.last == 0 || commit < a.last {
		return nil
	}
	if commit > a.last || !at.Equal(a.when) {
		return a.other(commit)
	}
	a.last = 0
	return nil
}

// reached is told how far the source has read its WAL, between two transactions: what it has passed without a word is not there.
func (a *again) reached(end eventlog.LSN) error {
	if a.last == 0 || end <= a.last {
		return nil
	}
	return a.other(end)
}

func (a *again) other(to eventlog.LSN) error {
	return &Gap{Reason: fmt.Sprintf("the source has other transactions than the log: it does not have the one of %s (WAL position %s). It was put back to an earlier state, and has gone on from there",
		a.when.UTC().Format(time.RFC3339), a.last), From: min(a.start, a.end), To: to, PutBack: true}
}

// relation takes the description of a table, which comes before its first row in a session and after its shape changed.
func (x *session) relation(m *relationMessage) error {
	r := &eventlog.Relation{OID: m.oid, Schema: m.schema, Name: m.name, ReplicaIdentity: m.identity}
	if cap, ok := x.captured[m.oid]; ok {
		r.Complete, r.InsertOnly, r.Doubted = cap.Complete, cap.InsertOnly || x.doubted[m.oid], x.doubted[m.oid]
		r.RootOID, r.RootSchema, r.RootName = cap.RootOID, cap.RootSchema, cap.RootName // unless the catalogue knows better
		// The source describes a table anew, too, when its publication has changed: before its first row of after that.
		if x.sql != nil && cap.Published != "" {
			if err := x.ask(); err != nil {
				return err
			}
			now, err := x.cfg.publications(x.ctx, x.sql, m.oid)
			if err != nil {
				return err
			}
			is := now.of(x.cfg, m.oid, cap.InsertOnly)
			if is == "" && cap.InsertOnly {
				is = now.of(x.cfg, m.oid, false) // more of it by now
			}
			if is != "" && is != cap.Published {
				return x.unknown(r)
			}
		}
	} else if x.memory != nil {
		if !x.memory.unknown[m.oid] {
			return x.unknown(r)
		}
		r.InsertOnly = true // more is not promised
	}
	if err := x.describe(r, m.columns); err != nil {
		if !errors.Is(err, errGone) {
			return err
		}
		if old := x.relations[m.oid]; old != nil && sameNames(old, m) {
			if r.Doubted {
				again := *old
				x.relations[m.oid] = &again
			}
			return nil // dropped since; its shape was this one
		}
		if cap, ok := x.captured[m.oid]; ok && sameNames(cap.Relation, m) { // … or as it was recorded
			was := *cap.Relation
			was.Dropped, was.Complete, was.InsertOnly, was.Doubted = false, r.Complete, r.InsertOnly, r.Doubted
			was.Columns = slices.Clone(was.Columns)
			for i := range was.Columns {
				was.Columns[i].Identity = m.columns[i].identity
			}
			x.relations[m.oid] = &was
			return nil
		}
		x.cfg.Logger.Warn("a table was dropped before its rows were read; types are taken from the stream", "relation", r.String())
		for i, c := range m.columns {
			t, ok := eventlog.TypeKind(c.typeOID)
			if !ok {
				t = eventlog.Type{OID: c.typeOID, Name: "text"}
			}
			r.Columns = append(r.Columns, eventlog.Column{Name: c.name, Type: t, Identity: c.identity})
			if c.identity && m.identity == 'd' {
				r.Key = append(r.Key, i)
			}
		}
	}
	if old := x.relations[m.oid]; old == nil || r.Doubted || !old.SameShape(r) || old.Generation != r.Generation {
		x.relations[m.oid] = r
	}
	return nil
}

// unknown ends the stream before a change of a table that is not captured, or not in this way, as far as the log said. Either init has
// just taken it in, or it is published without that, through its schema for instance: then the next stream takes it as it is.
func (x *session) unknown(r *eventlog.Relation) error {
	if x.memory != nil {
		if x.memory.unknown == nil {
			x.memory.unknown = map[uint32]bool{}
		}
		x.memory.unknown[r.OID], x.memory.met = true, true
	}
	return fmt.Errorf("%w: %s is in the stream, but not recorded as captured in this way", ErrTablesChanged, r)
}

// fromCatalog describes a relation by what the event trigger has told of it, if there is one, or else by the source's catalogue, on a
// connection that is idle otherwise, and so may have been cut.
func (x *session) fromCatalog(r *eventlog.Relation, stream []relationColumn) error {
	if err := x.ask(); err != nil {
		return err
	}
	told, err := x.toldBy(r.OID, r.ReplicaIdentity, stream)
	if err != nil {
		return err
	}
	if told != nil {
		fillIn(r, told.Columns, stream)
		r.Told = true
	} else if err := describe(x.ctx, x.sql, r, stream, x.xid); err != nil {
		return err
	}
	return x.complete(r)
}

// complete finds out whether every row of a relation is in the log as it is under this description.
func (x *session) complete(r *eventlog.Relation) error {
	was, ok := x.captured[r.OID]
	if !ok || x.recorded == nil {
		return nil
	}
	short, cancel := context.WithTimeout(x.ctx, time.Second) // somebody's lock in the log holds nothing up
	now, err := x.recorded(short, r.OID)
	late := short.Err() != nil && x.ctx.Err() == nil
	cancel()
	if late {
		err = nil
	} else {
		was = now
	}
	if errors.Is(err, pgx.ErrNoRows) || err == nil && was.Catalogue == "" {
		return nil
	}
	if err != nil {
		return err
	}
	r.Complete, r.Generation = was.Complete, was.Generation
	// A column that was not there when the table was last looked at has a value in the rows of before all the same.
	list, err := catalogues(x.ctx, x.sql, []uint32{r.OID})
	if err != nil {
		return err
	}
	is, before := list[r.OID], parseCatalogue(was.Catalogue)
	switch {
	case is == nil && r.Told:
		return nil
	case is == nil:
		r.Columns, r.Key, r.Generated = nil, nil, nil
		return errGone
	}
	knownMissing(r, was.Relation, before.File == is.File)
	if whyHeal(was.Relation, r, &before, is) != "" { // which the sidecar is about to see
		r.Complete, r.Generation = false, math.MaxInt64
	}
	return nil
}

// ask makes sure that there is a connection for the catalogue.
func (x *session) ask() error {
	if !x.sql.IsClosed() {
		return nil
	}
	conn, err := x.cfg.Connect(x.ctx)
	if err == nil {
		x.sql = conn
	}
	return err
}

func sameNames(r *eventlog.Relation, m *relationMessage) bool {
	if len(r.Columns) != len(m.columns) || r.ReplicaIdentity != m.identity {
		return false
	}
	for i, c := range m.columns {
		if r.Columns[i].Name != c.name || r.Columns[i].Type.OID != c.typeOID {
			return false
		}
	}
	return true
}
