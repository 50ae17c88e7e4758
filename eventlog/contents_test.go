package eventlog_test

import (
	"errors"
	"testing"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// TestChunkOfContentsComesAgain: a chunk of rows without a key whose transaction was cut, and comes again, is counted once: three of its four
// rows are known.
func TestChunkOfContentsComesAgain(t *testing.T) {
	t.Parallel()
	for _, cut := range []bool{false, true} {
		srv := pgservertest.ForTest(t, pgserver.Config{})
		l, err := eventlog.Connect(t.Context(), eventlog.Config{URL: srv.URL(srv.NewDatabase(t))})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(l.Close)
		if _, err := l.Create(t.Context()); err != nil {
			t.Fatal(err)
		}
		r := &eventlog.Relation{OID: 16384, Schema: "public", Name: "loose", ReplicaIdentity: 'f', Columns: []eventlog.Column{{Name: "v", Num: 1, Type: typ(25)}}}
		if err := l.Begin(t.Context(), eventlog.Head{SystemID: "7", Database: "shop", Timeline: 1, EndLSN: 100, Slot: "backstory", Baseline: true}, []eventlog.Captured{{Relation: r, SinceLSN: 100}}); err != nil {
			t.Fatal(err)
		}
		list, err := l.Baselines(t.Context())
		if err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		w, s := newWriter(t, l), &source{}
		if err := w.Resume(t.Context(), list); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			appendAll(t, w, s.tx(change(eventlog.OpInsert, r, nil, row("x"))))
		}
		var at eventlog.Position
		appendAll(t, w, s.tx(eventlog.Item{Kind: eventlog.ItemChunk, Chunk: &eventlog.Chunk{Relation: r, Number: 1, Begins: true, Done: func(b eventlog.Baseline) { at = b.At }}}))
		if err := l.PutContents(t.Context(), w.Head().Epoch, r.OID, at, func(put func(string, int64, int64) error) error {
			return put(eventlog.ContentID([]byte(`{"v":"x"}`)), 3, 0)
		}); err != nil {
			t.Fatal(err)
		}
		c := &eventlog.Chunk{Relation: r, Number: 2, Since: at, Known: true, Last: true}
		for range 4 {
			c.Add([][]byte{[]byte("x")})
		}
		if cut {
			b := eventlog.NewBatch(nil)
			again := *s
			again.begin(b)
			b.Add(eventlog.Item{Kind: eventlog.ItemChunk, Chunk: c})
			appendAll(t, w, b)
			b = eventlog.NewBatch(nil)
			b.Add(eventlog.Item{Kind: eventlog.ItemReset})
			appendAll(t, w, b)
		}
		appendAll(t, w, s.tx(eventlog.Item{Kind: eventlog.ItemChunk, Chunk: c}))
		var imported int
		if err := l.Pool().QueryRow(t.Context(), `SELECT count(*) FROM backstory.events WHERE op = 'import'`).Scan(&imported); err != nil || imported != 1 {
			t.Errorf("cut: %v: %d rows were imported, want 1 (%v)", cut, imported, err)
		}
	}
}

// TestCountsOfAFormerWriter: one that slept through a take-over counts nothing.
func TestCountsOfAFormerWriter(t *testing.T) {
	t.Parallel()
	l := newLog(t, eventlog.Config{})
	r := &eventlog.Relation{OID: 16384, Schema: "public", Name: "loose", ReplicaIdentity: 'f', Columns: []eventlog.Column{{Name: "v", Num: 1, Type: typ(25)}}}
	if err := l.SetCaptured(t.Context(), []eventlog.Captured{{Relation: r, SinceLSN: 100}}); err != nil {
		t.Fatal(err)
	}
	if err := l.BeginBaseline(t.Context(), eventlog.Baseline{OID: r.OID}); err != nil {
		t.Fatal(err)
	}
	put := func(epoch, rows int64) error {
		return l.PutContents(t.Context(), epoch, r.OID, 1, func(put func(string, int64, int64) error) error {
			return put(eventlog.ContentID([]byte(`{"v":"x"}`)), rows, 0)
		})
	}
	rows := func() (n int64) {
		if err := l.Pool().QueryRow(t.Context(), `SELECT sum(rows) FROM backstory.content`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	list, err := l.Baselines(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	old := newWriter(t, l)
	if err := old.Resume(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	var s source
	var at eventlog.Position
	appendAll(t, old, s.tx(change(eventlog.OpInsert, r, nil, row("x"))))
	appendAll(t, old, s.tx(eventlog.Item{Kind: eventlog.ItemChunk, Chunk: &eventlog.Chunk{Relation: r, Number: 1, Begins: true, Done: func(b eventlog.Baseline) { at = b.At }}}))
	epoch := old.Head().Epoch
	if err := put(epoch, 3); err != nil || rows() != 3 {
		t.Fatalf("%d rows are counted (%v), want 3", rows(), err)
	}
	now := newWriter(t, l)
	if err := put(epoch, 5); !errors.Is(err, eventlog.ErrFenced) || rows() != 3 {
		t.Errorf("after a take-over a former writer's count gives %v, and %d rows; want ErrFenced and 3", err, rows())
	}
	c := &eventlog.Chunk{Relation: r, Number: 2, Since: at, Known: true, Last: true}
	c.Add([][]byte{[]byte("x")})
	b := eventlog.NewBatch(nil)
	s.begin(b)
	b.Add(eventlog.Item{Kind: eventlog.ItemChunk, Chunk: c})
	var seen int64
	if err := old.Append(t.Context(), b); err == nil {
		t.Error("a former writer judges a chunk")
	}
	if err := l.Pool().QueryRow(t.Context(), `SELECT sum(seen) FROM backstory.content`).Scan(&seen); err != nil || seen != 0 {
		t.Errorf("a former writer has counted %d rows (%v)", seen, err)
	}
	if err := put(now.Head().Epoch, 5); err != nil || rows() != 5 {
		t.Errorf("the writer of now counts %d rows (%v), want 5", rows(), err)
	}
}
