package backstory

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
)

// lag is how far the log is behind its source, for status and metrics alike, whatever works at the moment: the stream tells where
// the source's WAL ends; without a stream the source is asked; and what nobody can tell stays as it was last seen.
type lag struct {
	mu   sync.Mutex // guards the following
	seen time.Time  // when the source was last heard
	wal  eventlog.LSN
	done eventlog.LSN // everything captured up to here is in the log
	slot *capture.Slot
	size int64         // of the log, in bytes; 0: it was never asked
	head eventlog.Head // as last known; zero: it never was
	// marks are ends of WAL that lie beyond done, and when they were first seen, oldest first.
	marks []mark
}

type mark struct {
	lsn eventlog.LSN
	at  time.Time
}

// maxMarks bounds the memory for marks; beyond, every second one goes.
const maxMarks = 1024

// look notes how things stand. Arguments that are zero or nil are not known.
func (l *lag) look(now time.Time, wal, done eventlog.LSN, slot *capture.Slot) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.done = max(l.done, done); slot != nil {
		l.slot, l.done = slot, max(l.done, slot.ConfirmedFlush) // which the log has
	}
	l.marks = slices.DeleteFunc(l.marks, func(m mark) bool { return m.lsn <= l.done })
	if wal == 0 {
		return
	}
	l.seen, l.wal = now, wal
	if wal > l.done && (len(l.marks) == 0 || wal > l.marks[len(l.marks)-1].lsn) {
		if len(l.marks) >= maxMarks {
			n := 0
			for i := 0; i < len(l.marks); i += 2 {
				l.marks[n] = l.marks[i]
				n++
			}
			l.marks = l.marks[:n]
		}
		l.marks = append(l.marks, mark{wal, now})
	}
}

// behind gives the WAL that may hold changes which are not in the log yet, in bytes, and for how long the oldest of it has been
// there, to within a second or two: 0 when everything was in the log that there was at the last look.
func (l *lag) behind(now time.Time) (bytes int64, seconds float64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wal > l.done {
		bytes = int64(l.wal - l.done)
	}
	if len(l.marks) > 0 {
		seconds = max(0, now.Sub(l.marks[0].at).Seconds())
	}
	return bytes, seconds
}

func (l *lag) lastHead() eventlog.Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// lookEvery is how often the source is asked while nothing is streamed; a stream knows by itself.
const (
	noteEvery  = time.Second
	lookEvery  = 5 * time.Second
	sizeEvery  = time.Minute
	guardEvery = 5 * time.Second
)

// watch keeps the lag known until ctx ends.
func (s *Sidecar) watch(ctx context.Context) {
	tick := time.NewTicker(noteEvery)
	defer tick.Stop()
	var asked, sized time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if now.Sub(sized) >= sizeEvery {
				if n, err := s.log.Size(ctx); err == nil {
					sized = now
					s.lag.mu.Lock()
					s.lag.size = n
					s.lag.mu.Unlock()
				}
			}
			if s.note(now) || now.Sub(asked) < lookEvery {
				continue
			}
			asked = now
			if src, err := capture.Glance(ctx, s.cfg.Capture); err == nil {
				s.lag.look(now, src.WAL, 0, src.Slot)
			}
		}
	}
}

// note takes over what the attempt that runs knows. It is false if nothing is streamed.
func (s *Sidecar) note(now time.Time) bool {
	r := s.now.Load()
	if r == nil {
		return false
	}
	s.lag.mu.Lock()
	s.lag.head = r.writer.Head()
	s.lag.mu.Unlock()
	if r.stream.State().Doing != "streaming" {
		s.lag.look(now, 0, r.stream.Progress(), nil)
		return false
	}
	s.streamed.Store(true)
	s.lag.look(now, r.stream.Source(), r.stream.Progress(), r.stream.SlotSeen())
	return true
}

// guard keeps the slot from filling the source's disk, until ctx ends: above the alarm it says so, once a minute, above the limit it drops the
// slot. That is a gap, which the next attempt finds. It waits for nothing of the log's, and begins when this process has streamed from the
// slot, and so knows it for the log's own.
func (s *Sidecar) guard(ctx context.Context) {
	tick := time.NewTicker(guardEvery)
	defer tick.Stop()
	var alarmed time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !s.streamed.Load() {
			continue
		}
		short, cancel := context.WithTimeout(ctx, 15*time.Second)
		if limit := s.cfg.WALLimitBytes; limit > 0 {
			retained, err := capture.DropSlotAbove(short, s.cfg.Capture, limit)
			switch {
			case retained > 0:
				s.dropped.Store(&retained)
				s.cfg.Logger.Error("the replication slot was dropped, so that the source's disk does not fill up", "slot", s.cfg.Capture.Slot, "retained_bytes", retained, "limit_bytes", limit,
					"risk", "changes from here on are missing in the log", "hint", eventlog.GapHint)
			case err != nil && ctx.Err() == nil && !passes(err):
				s.cfg.Logger.Error("the replication slot keeps too much WAL, and cannot be dropped", "err", err)
			}
		}
		if alarm := s.cfg.WALAlarmBytes; alarm > 0 && time.Since(alarmed) >= time.Minute {
			if src, err := capture.Glance(short, s.cfg.Capture); err == nil && src.Slot.RetainedBytes >= alarm {
				alarmed = time.Now()
				s.cfg.Logger.Warn("the source keeps much WAL for the replication slot", "slot", s.cfg.Capture.Slot, "retained_bytes", src.Slot.RetainedBytes, "safe_bytes", src.Slot.SafeBytes,
					"why", strings.Join(src.HeldBack, "; "))
			}
		}
		cancel()
	}
}
