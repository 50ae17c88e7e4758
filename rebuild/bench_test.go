package rebuild

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// shopOrders is a table as applications have it.
func shopOrders() *eventlog.Relation {
	return relation("orders", []int{0}, "id bigint", "customer_id bigint NOT NULL", "status text NOT NULL", "total numeric(12,2)", "note text",
		"created_at timestamp with time zone NOT NULL", "updated_at timestamp with time zone NOT NULL")
}

var statuses = []string{"pending", "paid", "packed", "shipped", "delivered", "returned"}

// orderHistory gives the log rows that are inserted and then updated, times each, 25 changes in a transaction.
func (s *source) orderHistory(orders *eventlog.Relation, rows, updates int) {
	r := rand.New(rand.NewPCG(1, 1))
	base := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	state := make([]uint8, rows)
	made := func(i int) string {
		return base.Add(time.Duration(i)*time.Second).Format("2006-01-02 15:04:05.000000") + "+00"
	}
	values := func(i int, status uint8, at int) []eventlog.Value {
		v := s.batch.Values(7)
		for c, x := range [7]string{strconv.Itoa(i + 1), strconv.Itoa(i % 5000), statuses[status], strconv.Itoa(i%1000) + ".50", "a note of some length for order " + strconv.Itoa(i), made(i), made(at)} {
			v[c] = eventlog.Value{State: eventlog.StateText, Text: s.batch.Copy([]byte(x))}
		}
		return v
	}
	last := make([]int32, rows)
	change := func(n int) {
		it := eventlog.Item{Kind: eventlog.ItemChange, Relation: orders, Op: eventlog.OpInsert, OldFull: true}
		if n < rows {
			last[n] = int32(n)
			it.New = values(n, 0, n)
		} else {
			i := r.IntN(rows)
			it.Op, it.Old = eventlog.OpUpdate, values(i, state[i], int(last[i]))
			state[i] = (state[i] + 1) % uint8(len(statuses))
			last[i] = int32(n)
			it.New = values(i, state[i], n)
		}
		s.batch.Add(it)
	}
	for n := 0; n < rows+updates; {
		s.lsn += 0x100
		s.xid++
		s.at = s.at.Add(time.Millisecond)
		s.batch.Backlog = 1 << 40
		s.batch.Add(eventlog.Item{Kind: eventlog.ItemBegin, XID: s.xid, Timeline: 1, CommitLSN: s.lsn, Time: s.at})
		for range 25 {
			if n < rows+updates {
				change(n)
				n++
			}
		}
		s.batch.Add(eventlog.Item{Kind: eventlog.ItemCommit, XID: s.xid, Timeline: 1, CommitLSN: s.lsn, EndLSN: s.lsn + 0x40, Time: s.at})
		if s.batch.Bytes() > 4<<20 {
			s.flush()
		}
	}
	s.flush()
	s.batch.Final = true // and no backlog: the partition gets its indexes
	s.flush()
}

// cpu gives the processor time that this process and the Postgres server have used. Wall time says little on a machine with
// neighbours.
func (s *source) cpu() (client, server time.Duration) {
	var own syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		s.t.Fatal(err)
	}
	ticks := 0
	postmaster := strconv.Itoa(pgservertest.ForTest(s.t, pgserver.Config{}).PID())
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // from the third field on
		if f[1] != postmaster && filepath.Base(filepath.Dir(name)) != postmaster {
			continue
		}
		for i := 11; i < 15; i++ { // utime, stime, and of children that have ended
			n, _ := strconv.Atoi(f[i])
			ticks += n
		}
	}
	return time.Duration(own.Utime.Nano() + own.Stime.Nano()), time.Duration(ticks) * 10 * time.Millisecond
}

// BenchmarkCheckout builds 1 M rows out of 3 M events, times BACKSTORY_BENCH_SCALE (default 0.03).
func BenchmarkCheckout(b *testing.B) {
	scale := 0.03
	if v := os.Getenv("BACKSTORY_BENCH_SCALE"); v != "" {
		var err error
		if scale, err = strconv.ParseFloat(v, 64); err != nil {
			b.Fatal(err)
		}
	}
	rows := int(1e6 * scale)
	orders := shopOrders()
	s := newSource(b, orders)
	began := time.Now()
	s.orderHistory(orders, rows, 2*rows)
	b.Logf("made %d events in %v", 3*rows, time.Since(began).Round(time.Millisecond))
	s.exec("VACUUM ANALYZE backstory.event")
	for _, c := range []struct {
		name   string
		memory int64
		into   func(i int) Target
	}{
		{"read", 1 << 30, nil},
		{"memory", 1 << 30, func(int) Target { return discard{} }},
		{"schema", 0, func(i int) Target {
			return Schema(SchemaConfig{URL: s.url, Schema: fmt.Sprintf("then_%d", i), Replace: true})
		}},
		{"schema in 16 MiB", 16 << 20, func(i int) Target {
			return Schema(SchemaConfig{URL: s.url, Schema: fmt.Sprintf("then_%d", i), Replace: true})
		}},
		{"csv", 0, func(int) Target { return Files(FilesConfig{Dir: b.TempDir()}) }},
		{"jsonl", 0, func(int) Target { return Files(FilesConfig{Dir: b.TempDir(), Format: JSONLines}) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			client, server := s.cpu()
			for i := range b.N {
				if c.into == nil {
					if err := s.log.Read(s.ctx, eventlog.Selection{Quiet: true, NoMetadata: true}, func(*eventlog.Event) error { return nil }); err != nil {
						b.Fatal(err)
					}
					continue
				}
				var reading, writing float64
				r := s.mustCheckout(0, c.into(i), func(cfg *Config) {
					cfg.MaxMemoryBytes = c.memory
					cfg.Progress = func(p Progress) {
						if p.Phase == "reading" {
							reading = p.Elapsed.Seconds()
						} else {
							writing = p.Elapsed.Seconds()
						}
					}
				})
				if r.Tables[0].Rows != int64(rows) || r.Events != int64(3*rows) {
					b.Fatalf("%+v", r)
				}
				b.ReportMetric(reading, "s-reading")
				b.ReportMetric(writing, "s-all")
			}
			n := float64(3*rows) * float64(b.N)
			b.ReportMetric(n/b.Elapsed().Seconds(), "events/s")
			client2, server2 := s.cpu()
			b.ReportMetric(float64(client2-client)/n, "client-ns/event")
			b.ReportMetric(float64(server2-server)/n, "server-ns/event")
		})
	}
}

// orderStream is a log of orders that are inserted and then updated at random, made on the way.
type orderStream struct {
	rel           *eventlog.Relation
	rows, updates int
}

func (s orderStream) Read(_ context.Context, _ eventlog.Selection, f func(*eventlog.Event) error) error {
	r := rand.New(rand.NewPCG(1, 1))
	e := &eventlog.Event{Relation: s.rel, SchemaVersion: 1}
	var data, rest []byte
	for n := range s.rows + s.updates {
		e.Position++
		e.CommitLSN = eventlog.LSN(0x1000000 + n*64)
		i := n
		if n >= s.rows {
			i = r.IntN(s.rows)
		}
		e.Key = strconv.Itoa(i + 1)
		rest = append(append(rest[:0], `{"id":`...), e.Key...)
		rest = strconv.AppendInt(append(rest, `,"customer_id":`...), int64(i%5000), 10)
		rest = strconv.AppendInt(append(rest, `,"total":"`...), int64(i%1000), 10)
		rest = append(append(rest, `.50","note":"a note of some length for order `...), e.Key...)
		rest = append(rest, `","created_at":"2026-01-01T00:00:04.000000Z"`...)
		data = append(append(data[:0], `"status":"`...), statuses[n%6]...)
		data = append(data, `","updated_at":"2026-01-09T02:26:39.000000Z"}`...)
		if n < s.rows {
			e.Op, e.Data, e.Rest = eventlog.OpInsert, append(append(rest, ','), data...), nil
		} else {
			e.Op, e.Data, e.Rest = eventlog.OpUpdate, append([]byte{'{'}, data...), append(rest, '}')
		}
		if err := f(e); err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkFold is BenchmarkCheckout without Postgres.
func BenchmarkFold(b *testing.B) {
	const rows = 300_000
	orders := shopOrders()
	for _, c := range []struct {
		name   string
		memory int64
	}{{"in memory", 1 << 30}, {"in half of what it needs", 40 << 20}, {"in 8 MiB", 8 << 20}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			var own, now syscall.Rusage
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &own)
			for range b.N {
				f := Fold{Source: orderStream{orders, rows, 2 * rows}, Calculator: RowsOf([][]eventlog.RelationVersion{{{ID: 1, Relation: orders}}}, []int{0}),
					Target: discard{}, MaxMemoryBytes: c.memory, TempDir: b.TempDir()}
				r, err := f.Run(context.Background())
				if err != nil || r.Tables[0].Rows != rows {
					b.Fatal(r, err)
				}
				b.ReportMetric(float64(r.SpilledBytes)/(1<<20), "MiB-spilled")
			}
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &now)
			n := float64(b.N) * 3 * rows
			b.ReportMetric(n/b.Elapsed().Seconds(), "events/s")
			b.ReportMetric(float64(now.Utime.Nano()+now.Stime.Nano()-own.Utime.Nano()-own.Stime.Nano())/n, "cpu-ns/event")
		})
	}
}
