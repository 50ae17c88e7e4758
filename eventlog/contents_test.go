package eventlog_test

import (
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
		if err := l.PutContents(t.Context(), r.OID, at, func(put func(string, int64) error) error {
			return put(eventlog.ContentID([]byte(`{"v":"x"}`)), 3)
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
