package capture

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// Paces of the stream.
const (
	statusEvery = time.Second      // how often a flushed position that has moved is told to the source
	aliveEvery  = 10 * time.Second // how often the source hears from us at least, four times as often as it wants to
	watchEvery  = time.Second      // how often the source is asked for the end of its WAL
	// handEvery is the shortest time between two small batches: under load many transactions share a commit of the log.
	handEvery      = 2 * time.Millisecond
	handSeldom     = 30 * time.Millisecond  // the same where the log takes long over them …
	busyAfter      = 6 * time.Millisecond   // … that is, longer than this, …
	itemTakes      = 12 * time.Microsecond  // … and this for each item
	gatherSeldom   = 12 * time.Millisecond  // what comes in meanwhile is read as seldom as the socket's buffer allows
	txPause        = 100 * time.Microsecond // for the rest of a transaction to come in
	txPatience     = 10 * time.Millisecond  // how long a small one may take to come in whole before a part of it is handed over
	publishedEvery = 3 * time.Second        // how often it is checked that the source publishes what is captured, and may do so
	behindBytes    = 1 << 20                // of WAL not yet received make the reader gather
	gatherPause    = 200 * time.Microsecond // … for so long before each read (package coalesce)
	readBytes      = 512 << 10              // that one read takes at most
	// deadAfter is how long the source may be silent before the connection counts as dead: it is asked for a sign every
	// aliveEvery.
	deadAfter = 45 * time.Second
)

// Stream receives the row changes of a source from its replication slot. One goroutine, that of Run, owns the connection.
type Stream struct {
	cfg Config

	// Captured tells of a table whether the log has all its rows and whether it is insert-only.
	captured map[uint32]eventlog.Captured
	doubted  map[uint32]bool                                                  // changes of it may be missing before those that come
	recorded func(ctx context.Context, oid uint32) (eventlog.Captured, error) // nil: nobody knows
	// out takes batches; its receiver releases them. It has no room: what was taken from it has been dealt with when the next one is
	// (see session.end).
	out  chan *eventlog.Batch
	free chan *eventlog.Batch

	flushed  atomic.Uint64 // what the log holds durably: told to the source
	applied  atomic.Uint64 // everything captured up to here is in the log, recorded as such or not
	received atomic.Uint64
	serverAt atomic.Uint64 // the end of the source's WAL as last heard
	lastSeen atomic.Int64  // unix nanoseconds of the last message
	took     atomic.Int64  // nanoseconds, of late

	state   atomic.Pointer[State]
	first   *stop                // where a session has to end in any case; nil: nowhere
	memory  *Memory              // nil: there is none
	stopped atomic.Pointer[stop] // why the session must end, as the catalogue has it
	slot    atomic.Pointer[Slot]

	chunks    chunks      // of existing rows, on their way
	importing atomic.Bool // more are to come

	complaint  string // owned, as the next, by who checks what is published: first the session, then its watch
	complained time.Time
}

// stop is a reason for which the session must end, at once or when everything before a place in the WAL has been handed over.
type stop struct {
	err error
	at  eventlog.LSN
}

// State is what the stream is doing now.
type State struct {
	Doing string    // connecting, streaming, waiting
	Since time.Time // from when on
	Error string    // why it does not stream; while it connects, why it last did not
	Hint  string
}

// NewStream prepares a stream. from is what the log holds durably.
func NewStream(cfg Config, captured []eventlog.Captured, from eventlog.LSN) *Stream {
	s := &Stream{cfg: cfg.WithDefaults(), captured: map[uint32]eventlog.Captured{}, out: make(chan *eventlog.Batch), free: make(chan *eventlog.Batch, 4)}
	for _, c := range captured {
		s.captured[c.OID] = c
	}
	s.flushed.Store(uint64(from))
	s.applied.Store(uint64(from))
	s.received.Store(uint64(from))
	s.setState("starting", nil)
	return s
}

// Memory is what is kept from one Stream of a source to the next. The zero value is ready to use.
type Memory struct {
	unknown map[uint32]bool // tables that were in the stream though the log did not know them as captured
	met     bool
	// published is where the source stood when everything that is captured was last seen to be published; 0: not yet.
	published atomic.Uint64
}

// Met tells whether the stream has met another such table since this was last asked.
func (m *Memory) Met() bool {
	met := m.met
	m.met = false
	return met
}

// Remember gives the stream its memory, before Run.
func (s *Stream) Remember(m *Memory) { s.memory = m }

// Recorded gives the stream a way to ask how a table is recorded as captured by now: since it began, the table may have been found altered. It
// is called before Run.
func (s *Stream) Recorded(f func(ctx context.Context, oid uint32) (eventlog.Captured, error)) {
	s.recorded = f
}

// PauseAt makes Run end with ErrTablesChanged when everything before a place in the WAL, where a table is captured anew, has been handed
// over. It is called before Run.
func (s *Stream) PauseAt(l eventlog.LSN) {
	s.first = &stop{fmt.Errorf("%w: a table is captured again from here on", ErrTablesChanged), l}
}

// Doubt says that changes of a table may be missing among those that are received: of it, no more is promised than of one of which only inserts are captured. They are missing
// from where it was taken out of its publication to where it was put back, and before its first row of after that the source describes it again.
// It is called before Run.
func (s *Stream) Doubt(oid uint32) {
	if s.doubted == nil {
		s.doubted = map[uint32]bool{}
	}
	s.doubted[oid] = true
}

// Batches gives what is received, in order. The channel is closed when Run returns.
func (s *Stream) Batches() <-chan *eventlog.Batch { return s.out }

// Flushed tells the stream up to where the log holds everything durably; the source may forget that.
func (s *Stream) Flushed(l eventlog.LSN) { s.flushed.Store(uint64(l)) }

// Took tells the stream how long the log worked on a batch of so many items. Where that is long, the machine is busy: then the log
// gets fewer and larger ones, since each costs something whatever is in it, and that is better left to the application.
func (s *Stream) Took(d time.Duration, items int) {
	s.took.Store((7*s.took.Load() + int64(d) - int64(items)*int64(itemTakes)) / 8)
}

// pace is the shortest time between two small batches.
func (s *Stream) pace() time.Duration {
	if took := time.Duration(s.took.Load()); took > busyAfter {
		return min(8*took, handSeldom)
	}
	return handEvery
}

// Applied tells the stream up to where everything captured is in the log.
func (s *Stream) Applied(l eventlog.LSN) {
	if uint64(l) > s.applied.Load() {
		s.applied.Store(uint64(l))
	}
}

// Progress is up to where everything captured is in the log: nothing before it is outstanding.
func (s *Stream) Progress() eventlog.LSN { return eventlog.LSN(s.applied.Load()) }

// Received is how far the stream has received; Source is the end of the source's WAL as last heard.
func (s *Stream) Received() eventlog.LSN { return eventlog.LSN(s.received.Load()) }

// Source is the end of the source's WAL as last heard.
func (s *Stream) Source() eventlog.LSN { return eventlog.LSN(s.serverAt.Load()) }

// LastSeen is when the source was last heard.
func (s *Stream) LastSeen() time.Time { return time.Unix(0, s.lastSeen.Load()) }

// SlotSeen is how the source described the slot a few seconds ago; nil before the first look.
func (s *Stream) SlotSeen() *Slot { return s.slot.Load() }

// State tells what the stream is doing.
func (s *Stream) State() State { return *s.state.Load() }

func (s *Stream) setState(doing string, err error) {
	st := State{Doing: doing}
	if err != nil {
		st.Error, st.Hint = err.Error(), eventlog.Hint(err)
	}
	s.put(st)
}

// connecting begins another try: what ended the one before has not proved to be over.
func (s *Stream) connecting() {
	st := s.State()
	st.Doing = "connecting"
	s.put(st)
}

func (s *Stream) put(st State) {
	st.Since = time.Now()
	if old := s.state.Load(); old != nil && old.Doing == st.Doing && old.Error == st.Error {
		st.Since = old.Since
	}
	s.state.Store(&st)
}
