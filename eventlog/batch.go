package eventlog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"
)

// openTx is the source transaction that is coming in.
type openTx struct {
	open, skip bool
	xid        uint32
	lsn        LSN
	at         int64 // commit time, microseconds since 2000
	time       time.Time
	change     int64
	first      Position  // of its first event
	ranges     []ctxRow  // closed and open ranges of context
	context    []byte    // what applies now; nil before the first message
	chunk      *Chunk    // of existing rows, which the transaction marks the place of
	baseline   *Baseline // how far they are then
	progress   []byte    // SQL, for when it is whole
	malformed  int64     // contexts that are not a JSON object
}

type ctxRow struct {
	first, last Position
	meta        []byte
}

// Append puts a batch into the log. When it returns nil, every transaction whose commit the batch holds is durable and
// visible, unless the batch says that much more is to come (Backlog): then they may still be on their way, together with
// those of the next one, until Head says so; ctx has to last that long. After an error nothing more may be appended: the
// writer must be closed and a new one opened, and the source asked again from Head().EndLSN.
func (w *Writer) Append(ctx context.Context, b *Batch) error {
	if w.head.Gap != "" {
		return &Problem{fmt.Errorf("the log has a gap: %s", w.head.Gap), GapHint}
	}
	chunks := false
	w.backlog = max(b.Backlog, w.remaining)
	w.stats.IgnoredContext.Add(b.Ignored)
	if err := w.prefetch(ctx, b); err != nil {
		return err
	}
	for i := range b.Items {
		it := &b.Items[i]
		switch it.Kind {
		case ItemBegin:
			w.beginTx(it)
			if w.tx.skip {
				continue
			}
			w.takeRules()
			if err := w.setSource(it.Timeline); err != nil {
				return err
			}
		case ItemChange:
			if w.tx.skip {
				continue
			}
			if !w.tx.open {
				return errors.New("bug: a row change outside a transaction")
			}
			if err := w.change(ctx, it); err != nil {
				return err
			}
			if err := w.relieve(ctx); err != nil {
				return err
			}
		case ItemMessage:
			if !w.tx.skip && w.tx.open {
				w.message(it.Text)
				if err := w.relieve(ctx); err != nil {
					return err
				}
			}
		case ItemDefinition:
			if w.tx.skip || !w.tx.open {
				continue
			}
			if err := w.define(ctx, it); err != nil {
				return err
			}
		case ItemChunk:
			if w.tx.skip {
				continue
			}
			w.remaining, chunks = LSN(it.Chunk.Remaining), true
			if err := w.chunk(ctx, it.Chunk); err != nil {
				return err
			}
		case ItemCommit:
			w.commitTx(it)
		case ItemProgress:
			if !w.tx.open && it.EndLSN > w.endLSN {
				w.endLSN = it.EndLSN
				if it.Timeline != 0 {
					w.tl = it.Timeline
				}
			}
		case ItemReset:
			if err := w.reset(ctx); err != nil {
				return err
			}
		}
	}
	switch {
	case chunks:
		w.lastChunk = time.Now()
	case w.remaining > 0 && time.Since(w.lastChunk) > time.Second: // nothing of it comes now
		w.remaining = 0
	}
	backlog := max(b.Backlog, w.remaining)
	behind := b.Backlog >= bulkEndBytes && !b.Final || chunks && backlog >= bulkEndBytes
	if behind && !w.state.full() && (len(w.rows) < gatherBytes || len(w.rows) < flushBytes && w.flight.busy()) {
		return w.failed // fewer and larger steps, and no waiting for the one before
	}
	if err := w.flush(ctx, backlog, false); err != nil {
		return err
	}
	if err := w.trim(ctx, backlog); err != nil {
		return err
	}
	if behind {
		return nil
	}
	if err := w.join(ctx); err != nil {
		return err
	}
	// Progress without events is recorded rarely: recording it is WAL too.
	if ahead := w.endLSN - w.head.EndLSN; ahead > 0 && !w.tx.open &&
		(b.Final || ahead >= progressBytes || time.Since(w.lastOut) >= progressEvery) {
		if err := w.write(ctx, step{position: w.pos}); err != nil {
			return err
		}
		if err := w.join(ctx); err != nil {
			return err
		}
	}
	if len(w.rows) == 0 {
		w.seen.Store(uint64(w.endLSN))
	}
	return w.settle(ctx, backlog)
}

// relieve writes what is gathered, of an open transaction too, once that is much.
func (w *Writer) relieve(ctx context.Context) error {
	if len(w.rows) == 0 || len(w.rows)+w.ctxBytes < flushBytes {
		return nil
	}
	if err := w.flush(ctx, w.backlog, true); err != nil {
		return err
	}
	return w.trim(ctx, w.backlog)
}

// Kept tells whether Append has kept something back, or not waited for it.
func (w *Writer) Kept() bool { return len(w.rows) > 0 || w.flight != nil }

// Flush brings to the log what Append has kept back because more was to come, and waits for it.
func (w *Writer) Flush(ctx context.Context) error {
	if err := w.flush(ctx, w.backlog, false); err != nil {
		return err
	}
	return w.join(ctx)
}

func (w *Writer) beginTx(it *Item) {
	t := &w.tx
	*t = openTx{open: true, xid: it.XID, lsn: it.CommitLSN, time: it.Time, at: it.Time.UnixMicro() - pgEpoch,
		first: w.pos + 1, ranges: t.ranges[:0]}
	// The source sends again what it does not know to be confirmed; what the log has, it skips.
	t.skip = it.CommitLSN <= w.commit && w.commit != 0
}

func (w *Writer) commitTx(it *Item) {
	t := &w.tx
	if t.skip {
		t.open, t.skip = false, false
		return
	}
	w.closeContext()
	if w.pos >= t.first || t.chunk != nil {
		if t.chunk == nil {
			n := int64(w.pos - t.first + 1)
			if w.made.ApplicationEvents += n; t.context == nil {
				w.made.Unattributed += n
			}
		}
		w.made.MalformedContext += t.malformed
		w.contexts = append(w.contexts, t.ranges...)
		w.commit, w.when = t.lsn, t.time
		if t.chunk == nil {
			w.made.Transactions++
		}
	} else { // nothing is written by which that would count
		w.stats.MalformedContext.Add(t.malformed)
	}
	w.whole, w.wholeEnd, w.endLSN = w.pos, len(w.rows), it.EndLSN
	if w.cur != nil {
		w.tl = w.cur.timeline
	}
	if t.chunk != nil {
		w.commitChunk()
	}
	w.progress = append(w.progress, t.progress...)
	t.open = false
}

// reset forgets an open transaction, which the source will send again from its beginning.
func (w *Writer) reset(ctx context.Context) error {
	if !w.tx.open {
		return nil
	}
	if w.tx.skip {
		w.tx = openTx{}
		return nil
	}
	// What is whole goes out first, so that only the open transaction is lost.
	if err := w.flush(ctx, 0, false); err != nil {
		return err
	}
	w.tx.open = false
	w.state.clear()
	return w.rewind(ctx)
}

// message begins a range of context: the latest message before a row applies to it, and rows before any message take
// the transaction's first.
func (w *Writer) message(text []byte) {
	t := &w.tx
	meta, ok := cleanContext(text)
	if !ok {
		t.malformed++
	}
	if bytes.Equal(t.context, meta) {
		return
	}
	w.ctxBytes += len(meta) + 64
	if t.context != nil {
		w.closeContext()
		t.ranges = append(t.ranges, ctxRow{first: w.pos + 1, meta: meta})
	} else {
		t.ranges = append(t.ranges, ctxRow{first: t.first, meta: meta})
	}
	t.context = meta
}

// closeContext ends the open range at the last event made; a range without events vanishes.
func (w *Writer) closeContext() {
	t := &w.tx
	if n := len(t.ranges); n > 0 && t.ranges[n-1].last == 0 {
		t.ranges[n-1].last = w.pos
		if t.ranges[n-1].last < t.ranges[n-1].first {
			t.ranges = t.ranges[:n-1]
		}
	}
}

// maxContextDepth is how deep a context may be nested. Postgres reads JSON recursively, with a stack of its own size.
const maxContextDepth = 100

// cleanContext makes sure that a context is a JSON object that Postgres can store; anything else is kept raw. A message is
// bytes, not text: it need not be valid in any encoding.
func cleanContext(text []byte) (meta []byte, ok bool) {
	object := bytes.HasPrefix(bytes.TrimLeft(text, " \t\r\n"), []byte{'{'})
	if object && utf8.Valid(text) && depth(text) <= maxContextDepth && json.Valid(text) && !hasNulEscape(text) {
		return append([]byte(nil), text...), true
	}
	if len(text) > 8<<10 {
		text = text[:8<<10]
	}
	text = bytes.ReplaceAll(validUTF8(text), []byte{0}, []byte("\ufffd")) // json takes \u0000, but nobody could read it
	return append(AppendString([]byte(`{"malformed":`), text), '}'), false
}

// depth tells how deep JSON is nested, at most.
func depth(text []byte) (deepest int) {
	n := 0
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '"':
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			n++
			deepest = max(deepest, n)
		case '}', ']':
			n--
		}
	}
	return deepest
}

// hasNulEscape finds \u0000, which is JSON but which jsonb does not take.
func hasNulEscape(b []byte) bool { return bytes.Contains(b, []byte(`\u0000`)) }

func validUTF8(b []byte) []byte {
	if utf8.Valid(b) {
		return b
	}
	return bytes.ToValidUTF8(b, []byte("\ufffd"))
}
