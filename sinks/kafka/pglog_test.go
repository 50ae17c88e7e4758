package kafka

import (
	"context"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// pgLog is a real event log, and something that writes to it.
type pgLog struct {
	*eventlog.Log
	w   *eventlog.Writer
	lsn eventlog.LSN
	xid uint32
	row int
	b   *eventlog.Batch
}

var orders = &eventlog.Relation{OID: 4711, Schema: "public", Name: "orders", ReplicaIdentity: 'f', Key: []int{0}, Complete: true, Columns: []eventlog.Column{
	{Name: "id", Type: eventlog.Type{OID: 20, Name: "bigint", Kind: eventlog.KindInt}, NotNull: true, Identity: true},
	{Name: "status", Type: eventlog.Type{OID: 25, Name: "text"}, Identity: true},
	{Name: "note", Type: eventlog.Type{OID: 25, Name: "text"}, Identity: true},
	{Name: "total", Type: eventlog.Type{OID: 1700, Name: "numeric(10,2)"}, Identity: true},
	{Name: "updated_at", Type: eventlog.Type{OID: 1184, Name: "timestamp with time zone", Kind: eventlog.KindTimestampTZ}, Identity: true},
}}

func newPGLog(t testing.TB, server *pgservertest.Server) *pgLog {
	t.Helper()
	ctx := context.Background()
	l, err := eventlog.Connect(ctx, eventlog.Config{URL: server.SocketURL(server.NewDatabase(t))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	if _, err := l.Create(ctx); err != nil {
		t.Fatal(err)
	}
	if err := l.Begin(ctx, eventlog.Head{SystemID: "7", Database: "shop", Timeline: 1, Slot: "s"}, nil); err != nil {
		t.Fatal(err)
	}
	p := &pgLog{Log: l, lsn: 0x1_0000_0000, xid: 700, b: eventlog.NewBatch(nil)}
	p.takeOver(t)
	return p
}

// takeOver opens a writer, as after a restart of the log's server.
func (p *pgLog) takeOver(t testing.TB) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		w, err := p.NewWriter(context.Background())
		if err == nil {
			p.w = w
			t.Cleanup(func() { _ = w.Close(context.Background()) })
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func (p *pgLog) text(s string) eventlog.Value {
	return eventlog.Value{State: eventlog.StateText, Text: p.b.Copy([]byte(s))}
}

func (p *pgLog) values(id int, status string, at time.Time) []eventlog.Value {
	v := p.b.Values(5)
	v[0], v[1], v[2] = p.text(strconv.Itoa(id)), p.text(status), p.text("left at the neighbour's")
	v[3], v[4] = p.text(strconv.Itoa(id%900)+".50"), p.text(at.UTC().Format("2006-01-02 15:04:05.999999")+"+00")
	return v
}

// append writes transactions of so many updates each, over so many orders.
func (p *pgLog) append(transactions, rows, orderCount int) error {
	p.b.Reset()
	for range transactions {
		p.lsn += 4096
		p.xid++
		at := time.Now().Truncate(time.Microsecond)
		p.b.Add(eventlog.Item{Kind: eventlog.ItemBegin, XID: p.xid, CommitLSN: p.lsn, Time: at, Timeline: 1})
		p.b.Add(eventlog.Item{Kind: eventlog.ItemMessage, Text: p.b.Copy(fmt.Appendf(nil, `{"actor":"user-%d","request":"r-%08x"}`, p.xid%50, p.xid))})
		for range rows {
			p.row++
			id := 1 + p.row*7919%orderCount
			it := eventlog.Item{Kind: eventlog.ItemChange, Op: eventlog.OpUpdate, Relation: orders, OldFull: true}
			it.Old, it.New = p.values(id, "pending", at.Add(-time.Hour)), p.values(id, "paid", at)
			p.b.Add(it)
		}
		p.b.Add(eventlog.Item{Kind: eventlog.ItemCommit, EndLSN: p.lsn + 64})
	}
	return p.w.Append(context.Background(), p.b)
}

// fill appends n events in transactions of 25.
func (p *pgLog) fill(t testing.TB, n int) {
	t.Helper()
	for left := n / 25; left > 0; left -= min(left, 400) {
		if err := p.append(min(left, 400), 25, 100_000); err != nil {
			t.Fatal(err)
		}
	}
}
