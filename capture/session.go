package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/coalesce"
)

// session is one connection's worth of streaming.
type session struct {
	*Stream
	net       *coalesce.Conn
	repl      *pgconn.PgConn
	sql       *pgx.Conn      // for the catalogue; opened when it is needed
	at        *pgx.Conn      // to the server of the slot, where that is another one; otherwise nil
	control   *pgconn.PgConn // tells the timeline of a standby; nil: what streams is none
	server    *Server
	relations map[uint32]*eventlog.Relation
	again     again
	// definitions are the last ones that the event trigger has told of each table.
	definitions map[uint32]*ddlMessage
	secret      string    // of the event triggers
	secretRead  time.Time // when it was read anew
	// secretMissed: it has been said why it is not known.
	secretMissed bool
	rewritten    []uint32 // tables that the command rewrites whose definition comes next
	batch        *eventlog.Batch
	ctx          context.Context
	describe     func(*eventlog.Relation, []relationColumn) error // what the catalogue says of a relation
	send         func([]byte) error                               // a message to the source
	inTx         bool
	xid          uint32       // of the transaction
	skipped      eventlog.LSN // a keepalive's position, not yet in a batch
	lastEnd      eventlog.LSN // of the last commit or progress handed over
	lastHand     time.Time
	lastTold     time.Time
	told         eventlog.LSN
	sureOf       int           // how many items of the batch are known to be on the session's timelines
	alive        time.Duration // how often the source hears from us at least
	until        eventlog.LSN  // 0, or where Run ends
	done         bool
	parted       bool // the source has taken leave, too
	err          error
}

// Stream connects and streams until ctx ends, the connection breaks, or, with until not zero, everything before until
// has been handed over. It returns nil in the first and the last case. known are relations of earlier sessions, so that
// unchanged ones keep their identity.
func (s *Stream) session(ctx context.Context, head eventlog.Head, until eventlog.LSN, known map[uint32]*eventlog.Relation) (err error) {
	s.connecting()
	x := &session{Stream: s, ctx: ctx, relations: map[uint32]*eventlog.Relation{}, until: until}
	x.describe, x.send = x.fromCatalog, x.toSource
	if x.sql, err = s.cfg.Connect(ctx); err != nil {
		return err
	}
	defer func() { _ = x.sql.Close(context.WithoutCancel(ctx)) }()
	at, done, err := s.cfg.connectSlot(ctx, x.sql)
	if err != nil {
		return err
	}
	defer done()
	if s.cfg.StandbyURL != "" {
		x.at = at
	}
	x.repl, err = s.cfg.connectReplication(ctx, func(cfg *pgconn.Config) {
		dial := cfg.DialFunc
		cfg.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dial(ctx, network, addr)
			if err != nil || x.repl != nil { // with a session, this is for the request to cancel what a broken one was doing
				return c, err
			}
			if t, ok := c.(*net.TCPConn); ok {
				_ = t.SetReadBuffer(4 << 20)
				_ = t.SetKeepAlivePeriod(15 * time.Second)
			}
			x.net = coalesce.New(coalesce.Detach(c), readBytes)
			return x.net, nil
		}
	})
	if err != nil {
		return err
	}
	defer x.hangUp()
	if x.server, err = s.cfg.server(ctx, x.sql, at, x.repl); err != nil {
		return err
	}
	if err := checkServer(x.server); err != nil {
		return err
	}
	if x.server.Standby != nil {
		if x.control, err = s.cfg.connectReplication(ctx, nil); err != nil {
			return err
		}
		defer func() { _ = x.control.Close(context.WithoutCancel(ctx)) }()
	}
	if err := x.server.awaitReplay(ctx, at, head.EndLSN); err != nil {
		return err
	}
	slot, err := s.cfg.ReadSlot(ctx, at)
	if err != nil {
		return err
	}
	if err := checkStart(x.server, slot, &head, s.cfg.Slot); err != nil {
		return err
	}
	s.stopped.Store(s.first)
	// A source that was put back may not publish what it did: then the gap begins where its slot is.
	if err := s.checkPublished(ctx, x.sql, min(head.EndLSN, slot.ConfirmedFlush), x.server.FlushLSN); err != nil {
		return err
	}
	// From where the slot is, not from where the log ends: what lies in between is told again, and shows whether it is the history that the
	// log has.
	start := pglogrepl.LSN(min(head.EndLSN, slot.ConfirmedFlush))
	x.again = newAgain(&head, eventlog.LSN(start))
	args := []string{"proto_version '1'", "publication_names '" + strings.ReplaceAll(eventlog.QuoteIdent(s.cfg.Publication)+","+eventlog.QuoteIdent(s.cfg.InsertPublication()), "'", "''") + "'", "messages 'true'"}
	if err := pglogrepl.StartReplication(ctx, x.repl, s.cfg.Slot, start, pglogrepl.StartReplicationOptions{PluginArgs: args}); err != nil {
		if eventlog.SQLState(err) == "55006" { // object_in_use
			return s.cfg.slotInUse(ctx, at)
		}
		return fmt.Errorf("start replication: %w", err)
	}
	if x.secret, err = x.readSecret(ctx); err != nil {
		return err
	}
	x.told, x.lastEnd = head.EndLSN, head.EndLSN
	if x.alive = aliveEvery; x.server.SenderTimeout > 0 {
		x.alive = min(aliveEvery, x.server.SenderTimeout/4)
	}
	s.serverAt.Store(uint64(x.server.FlushLSN))
	watch, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() { defer close(watched); s.watch(watch) }()
	defer func() { stop(); <-watched }()
	s.received.Store(uint64(head.EndLSN))
	s.setState("streaming", nil)
	s.cfg.Logger.Info("streaming", "slot", s.cfg.Slot, "lsn", head.EndLSN.String(), "timeline", x.server.Timeline)
	err = x.run(known)
	for oid, r := range x.relations {
		known[oid] = r
	}
	return err
}

// checkPublished makes sure that nothing that is published harms the application, and that everything captured is published. It
// returns a *Gap or a *Missed with its place in the source's WAL. Where less is published than before, the session ends when it has handed over
// everything before now.
//
// What is missing begins where everything was last seen to be published, which may be well before head, what the log has by now.
func (s *Stream) checkPublished(ctx context.Context, conn *pgx.Conn, head, now eventlog.LSN) error {
	from := head
	if s.memory != nil {
		if seen := eventlog.LSN(s.memory.published.Load()); seen > 0 {
			from = min(head, seen)
		}
	}
	if err := s.cfg.protect(ctx, conn); err != nil && ctx.Err() == nil {
		s.complain(err)
	}
	var list []eventlog.Captured
	for _, c := range s.captured {
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b eventlog.Captured) int { return strings.Compare(a.String(), b.String()) })
	err := s.cfg.checkPublications(ctx, conn, list)
	var gap *Gap
	var narrowed *Narrowed
	var missed *Missed
	switch {
	case errors.As(err, &gap):
		gap.From, gap.To = from, now
	case errors.As(err, &missed):
		to, e := currentLSN(ctx, conn)
		if e != nil {
			return e
		}
		missed.From, missed.To = from, to
	case errors.As(err, &narrowed):
		narrowed.From = from
		if narrowed.To, err = currentLSN(ctx, conn); err != nil { // they have been moved by then
			return err
		}
		s.stopped.CompareAndSwap(nil, &stop{narrowed, narrowed.To})
		return nil
	case err == nil && s.memory != nil:
		s.memory.published.Store(uint64(now))
	}
	return err
}

// complain logs a trouble of the source that the stream itself does not meet: at once where it is new, then every minute.
func (s *Stream) complain(err error) {
	if now := time.Now(); err.Error() != s.complaint || now.Sub(s.complained) >= time.Minute {
		s.complaint, s.complained = err.Error(), now
		s.cfg.Logger.Error("the application is harmed", "err", err, "hint", eventlog.Hint(err))
	}
}

// watch asks the source, on a connection of its own, for what the stream itself does not tell: the end of its WAL, how the
// slot fares, and whether it still publishes what is captured.
func (s *Stream) watch(ctx context.Context) {
	var conn, at *pgx.Conn // at: to the server of the slot, where that is another one
	var looked, checked time.Time
	defer func() {
		for _, c := range []*pgx.Conn{conn, at} {
			if c != nil {
				_ = c.Close(context.WithoutCancel(ctx))
			}
		}
	}()
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var end eventlog.LSN
		var err error
		for range 2 { // a connection that has been ended is made again at once: that tells why
			if conn == nil || conn.IsClosed() {
				if conn, err = s.cfg.Connect(ctx); err != nil {
					conn = nil
					break
				}
			}
			if end, err = currentLSN(ctx, conn); err == nil || !conn.IsClosed() {
				break
			}
		}
		slotAt := conn
		if s.cfg.StandbyURL != "" {
			var errAt error
			if at == nil || at.IsClosed() || at.Ping(ctx) != nil && at.IsClosed() {
				if at, _, errAt = s.cfg.connectSlot(ctx, nil); errAt != nil {
					at = nil
				}
			}
			if slotAt = at; errAt != nil && eventlog.SQLState(errAt) == "57P03" {
				s.stopped.Store(&stop{err: fmt.Errorf("%w: %w", errLeaving, errAt)})
			}
		}
		if conn == nil {
			// A server that is going down waits for us to confirm all of its WAL (PostgreSQL manual, Shutting Down the Server), which
			// we cannot while nobody takes a note of it; what is not confirmed comes again. Any other trouble the stream will meet
			// by itself.
			if eventlog.SQLState(err) == "57P03" { // cannot_connect_now
				s.stopped.Store(&stop{err: fmt.Errorf("%w: %w", errLeaving, err)})
			}
			continue
		}
		if err == nil {
			s.serverAt.Store(uint64(end))
		}
		if time.Since(checked) >= publishedEvery && err == nil {
			var gap *Gap
			var missed *Missed
			if err := s.checkPublished(ctx, conn, eventlog.LSN(s.flushed.Load()), end); errors.As(err, &gap) || errors.As(err, &missed) {
				s.stopped.Store(&stop{err: err})
			}
			checked = time.Now()
		}
		if time.Since(looked) > 10*time.Second && slotAt != nil {
			if sl, err := s.cfg.ReadSlot(ctx, slotAt); err == nil {
				s.slot.Store(sl)
				looked = time.Now()
			}
		}
	}
}

// run receives until the end. A cut leaves an ItemReset behind, so that the log forgets a transaction that was coming in.
func (x *session) run(known map[uint32]*eventlog.Relation) error {
	x.batch = x.fresh()
	x.net.BeforeRead = x.pause
	x.net.AfterRead = func() { x.lastSeen.Store(time.Now().UnixNano()) }
	x.net.AfterRead()
	x.net.Streaming.Store(true)
	for oid, r := range known {
		x.relations[oid] = r
	}
	for {
		// Asked between messages: where much is written, a read from the network ends in the middle of a transaction nearly always.
		if e := x.stopped.Load(); e != nil {
			if e.at == 0 || x.reached(e.at) {
				return x.end(e.err)
			}
		} else if x.until != 0 && !x.importing.Load() && x.reached(x.until) {
			return x.end(nil)
		}
		msg, err := x.repl.ReceiveMessage(context.Background())
		if x.err != nil {
			return x.end(x.err)
		}
		if x.done {
			return x.end(nil)
		}
		if err != nil {
			if isTimeout(err) {
				continue
			}
			if x.ctx.Err() != nil {
				return x.end(nil)
			}
			return x.end(streamError(err, x.cfg))
		}
		switch m := msg.(type) {
		case *pgproto3.CopyData:
			if err := x.data(m.Data); err != nil {
				return x.end(err)
			}
		case *pgproto3.ErrorResponse:
			return x.end(streamError(pgconn.ErrorResponseToPgError(m), x.cfg))
		case *pgproto3.CommandComplete:
			if !x.inTx && x.at == nil {
				return x.end(ErrClosed) // see closed
			}
			return x.end(errors.New("the source ended the stream"))
		case *pgproto3.CopyDone:
			return x.end(errors.New("the source ended the stream"))
		}
	}
}

// reached tells whether everything before a place in the WAL has been received, and nothing else is under way.
func (x *session) reached(l eventlog.LSN) bool { return !x.inTx && max(x.lastEnd, x.skipped) >= l }

// end hands over what is whole and says goodbye.
func (x *session) end(err error) error {
	x.net.Streaming.Store(false)
	if !x.repl.IsClosed() { // otherwise pgconn has set one
		_ = x.net.SetReadDeadline(time.Time{})
	}
	if x.inTx {
		x.batch.Add(eventlog.Item{Kind: eventlog.ItemReset})
	}
	patience := 30 * time.Second
	if errors.Is(err, errLeaving) {
		patience = time.Second
	}
	if e := x.handLast(patience); errors.Is(e, errNotTaken) {
		return errors.Join(err, e)
	} else if err == nil {
		err = e
	}
	_ = x.tell(time.Now(), true) // if the connection is gone, it is told the next time
	if errors.Is(err, errLeaving) && !x.inTx && x.at == nil && x.closed() {
		x.parted = true
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	if err == nil || forTheLog(err) || errors.Is(err, errLeaving) {
		x.goodbye()
	}
	return err
}

// closed tells whether the source, which is going down, says that everything that it has is confirmed: only then does it end the stream by itself
// (PostgreSQL manual, Shutting Down the Server; Streaming Replication Protocol). As long as it has more than was confirmed it asks for that.
func (x *session) closed() bool {
	limit := time.Now().Add(closedWithin)
	for !x.repl.IsClosed() {
		_ = x.net.SetReadDeadline(limit)
		msg, err := x.repl.ReceiveMessage(context.Background())
		if err != nil {
			return false
		}
		switch m := msg.(type) {
		case *pgproto3.CommandComplete:
			return true
		case *pgproto3.CopyData:
			if len(m.Data) == 0 || m.Data[0] != 'k' || x.data(m.Data) != nil { // a transaction is for another session
				return false
			}
			if x.skipped > x.lastEnd {
				x.batch = x.fresh()
				if x.handLast(time.Second) != nil || x.tell(time.Now(), true) != nil {
					return false
				}
			}
		}
	}
	return false
}

// closedWithin is how long the source is given for that.
const closedWithin = 3 * time.Second

// ErrClosed means that the source was shut down, and that everything of it is in the log.
var ErrClosed = errors.New("the source has shut down, and everything of it is in the log")

// handLast gives the last batch away, and waits until it has been dealt with: then the source can be told.
func (x *session) handLast(patience time.Duration) error {
	x.progress()
	unsure := x.sure()
	x.batch.Final = true
	limit := time.After(patience)
	for _, b := range []*eventlog.Batch{x.batch, eventlog.NewBatch(nil)} { // the second one is only taken after that
		select {
		case x.out <- b:
		case <-limit:
			return errNotTaken
		}
	}
	return unsure
}

var (
	// errLeaving: the source is going down, and waits for its clients.
	errLeaving = errors.New("the source is shutting down")
	// errNotTaken: the log has not dealt with what the session had last. Its writer does not know that the session is over, and must
	// not meet another one.
	errNotTaken = errors.New("the event log did not take the last batch")
)

// goodbye ends the stream by the protocol, so that the slot is free when the process is gone. In the middle of a large
// transaction the server does not listen (see hangUp).
func (x *session) goodbye() {
	if x.repl.IsClosed() {
		return
	}
	limit := time.Now().Add(time.Second)
	_ = x.net.SetDeadline(limit)
	f := x.repl.Frontend()
	f.Send(&pgproto3.CopyDone{})
	if f.Flush() != nil {
		return
	}
	for time.Now().Before(limit) {
		msg, err := x.repl.ReceiveMessage(context.Background())
		if err != nil {
			return
		}
		if _, ok := msg.(*pgproto3.ReadyForQuery); ok {
			x.parted = true
			return
		}
	}
}

// hangUp closes the replication connection. A walsender that has not taken leave may go on for long before it finds out, in
// the middle of a transaction or of WAL that is not ours, and keeps the slot meanwhile: it is ended.
func (x *session) hangUp() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(x.ctx), 2*time.Second)
	defer cancel()
	_ = x.repl.Close(ctx)
	if !x.parted {
		x.terminate(ctx)
	}
}

// pause runs before each wait for the network, when everything received has been looked at. It hands the batch over if
// somebody is there to take it, tells the source how far we are, and says how long to wait.
func (x *session) pause() time.Duration {
	now := time.Now()
	if x.ctx.Err() != nil {
		x.done = true
		return 0
	}
	if silent := now.Sub(x.LastSeen()); silent > deadAfter {
		x.err = fmt.Errorf("the source has been silent for %s", silent.Round(time.Second))
		return 0
	}
	behind := x.backlog() > behindBytes
	wait := min(500*time.Millisecond, x.alive/2)
	x.net.Gather = 0
	switch {
	case behind:
		x.net.Gather = gatherPause
	case x.inTx:
		x.net.Gather = txPause
	}
	if len(x.batch.Items) > 0 || x.batch.Ignored > 0 || x.skipped > x.lastEnd && now.Sub(x.lastHand) > time.Second {
		every := x.pace()
		switch since := now.Sub(x.lastHand); {
		case (behind || x.inTx && since < every+txPatience) && x.batch.Bytes() < x.cfg.MaxBatchBytes/2:
			wait = time.Millisecond
		case since < every:
			wait = every - since
			switch { // what comes until then need not be looked at one by one
			case behind:
			case every > handEvery:
				x.net.Gather = min(wait, gatherSeldom)
			default:
				x.net.Gather = wait
			}
		default:
			x.progress()
			if x.err = x.sure(); x.err != nil {
				return 0
			}
			x.batch.Backlog = x.backlog()
			select {
			case x.out <- x.batch:
				x.batch, x.lastHand = x.fresh(), now
			default:
				wait = time.Millisecond // the log is busy: more goes into this batch meanwhile
				x.net.Gather = max(x.net.Gather, txPause)
				if every > handEvery && !behind {
					x.net.Gather = gatherSeldom / 2
				}
			}
		}
	}
	if err := x.tell(now, false); err != nil {
		x.err = err
		return 0
	}
	return wait
}

func (x *session) backlog() eventlog.LSN {
	if r, end := x.Received(), x.Source(); end > r {
		return end - r
	}
	return 0
}

// progress notes that nothing is outstanding up to the last keepalive.
func (x *session) progress() {
	if !x.inTx && x.skipped > x.lastEnd {
		x.batch.Add(eventlog.Item{Kind: eventlog.ItemProgress, EndLSN: x.skipped, Timeline: x.server.timelineOf(x.skipped)})
		x.lastEnd = x.skipped
	}
}

// hand gives a full batch away, however long that takes; the source hears from us meanwhile.
func (x *session) hand() error {
	if err := x.sure(); err != nil {
		return err
	}
	x.batch.Backlog = x.backlog()
	tick := time.NewTicker(min(statusEvery, x.alive/2))
	defer tick.Stop()
	for {
		select {
		case x.out <- x.batch:
			x.batch, x.lastHand = x.fresh(), time.Now()
			return nil
		case now := <-tick.C:
			x.lastSeen.Store(now.UnixNano()) // it is not silent: nobody listens
			if e := x.stopped.Load(); e != nil && e.at == 0 {
				return e.err
			}
			if err := x.tell(now, false); err != nil {
				return err
			}
		case <-x.ctx.Done():
			x.done = true
			return nil
		}
	}
}

// tell sends a standby status update if one is due (PostgreSQL manual, Streaming Replication Protocol).
func (x *session) tell(now time.Time, must bool) error {
	flushed := eventlog.LSN(x.flushed.Load())
	since := now.Sub(x.lastTold)
	if !must && since < x.alive && (flushed == x.told || since < statusEvery) {
		return nil
	}
	ask := byte(0)
	if since >= x.alive {
		ask = 1 // for a sign of life
	}
	x.lastTold, x.told = now, flushed
	write := max(eventlog.LSN(x.received.Load()), flushed)
	b := make([]byte, 0, 34)
	b = append(b, 'r')
	b = binary.BigEndian.AppendUint64(b, uint64(write))
	b = binary.BigEndian.AppendUint64(b, uint64(flushed))
	b = binary.BigEndian.AppendUint64(b, uint64(flushed))
	b = binary.BigEndian.AppendUint64(b, uint64(now.UnixMicro()-946684800*1000000))
	b = append(b, ask)
	if err := x.send(b); err != nil {
		return fmt.Errorf("send a status update to the source: %w", err)
	}
	return nil
}

func (x *session) toSource(b []byte) error {
	if x.repl.IsClosed() { // pgconn is clearing up by itself
		return net.ErrClosed
	}
	_ = x.net.SetWriteDeadline(time.Now().Add(30 * time.Second))
	f := x.repl.Frontend()
	f.Send(&pgproto3.CopyData{Data: b})
	return f.Flush()
}

func (x *session) fresh() *eventlog.Batch {
	x.sureOf = 0
	select {
	case b := <-x.free:
		b.Reset()
		return b
	default:
		return eventlog.NewBatch(func(b *eventlog.Batch) {
			select {
			case x.free <- b:
			default:
			}
		})
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}
