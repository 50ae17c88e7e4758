package rebuild

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// bulk makes a history of many rows in a few tables.
func bulk(seed uint64, rows, changes int) *model {
	r := rand.New(rand.NewPCG(seed, 2))
	m := &model{lsn: 8}
	orders := m.addTable("orders", 'd', []string{"id"}, "id bigint", "status text", "note text")
	items := m.addTable("items", 'f', []string{"order", "line"}, "order bigint", "line bigint", "what text")
	visits := m.addTable("visits", 'f', nil, "page text", "n bigint")
	for _, t := range m.tables {
		t.restless = 3
	}
	text := func(n int) string { return `"` + strings.Repeat(string(rune('a'+r.IntN(26))), r.IntN(n)) + `"` }
	for i := range rows {
		m.insert(orders, eventlog.OpInsert, modelRow{"id": fmt.Sprint(i), "status": `"new"`, "note": text(300)})
		if i%3 == 0 {
			m.insert(items, eventlog.OpInsert, modelRow{"order": fmt.Sprint(i), "line": fmt.Sprint(r.IntN(3)), "what": text(30)})
		}
		if i%5 == 0 {
			m.insert(visits, eventlog.OpInsert, modelRow{"page": text(3), "n": "1"})
		}
		m.lsn += 8
	}
	next := rows
	for n := range changes {
		if n == changes/2 { // keys and contents of many rows change at once
			rel := *items.now().Relation
			items.key = []string{"order"}
			m.alter(items, &rel)
			wider := *visits.now().Relation
			wider.Columns = append(slices.Clone(wider.Columns), eventlog.Column{Name: "more", Type: modelTypes["bigint"]})
			m.alter(visits, &wider)
		}
		t := m.tables[r.IntN(3)]
		if len(t.rows) == 0 {
			continue
		}
		i := r.IntN(len(t.rows))
		switch k := r.IntN(100); {
		case k < 60:
			c := t.now().Columns[len(t.now().Columns)-1]
			v := text(400)
			if c.Type.Kind == eventlog.KindInt {
				v = fmt.Sprint(r.IntN(3))
			}
			m.update(t, i, modelRow{c.Name: v})
		case k < 70 && t == orders:
			next++
			m.update(t, i, modelRow{"id": fmt.Sprint(next)})
		case k < 90:
			m.delete(t, i)
		case t == orders:
			next++
			m.insert(t, eventlog.OpInsert, modelRow{"id": fmt.Sprint(next), "status": `"late"`, "note": text(50)})
		}
		m.lsn += 8
		if t == visits && r.IntN(changes) == 0 {
			m.truncate(t)
		}
	}
	m.commit()
	return m
}

func TestResultIsTheSameWhateverMemoryAndWorkers(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	m := bulk(seed, 6000, 20000)
	last := eventlog.Position(len(m.events))
	var first *Memory
	for _, work := range []int{1, 2, 3, 4} {
		for _, memory := range []int64{64 << 20, 2 << 20, 256 << 10, 64 << 10, 16 << 10} {
			t.Run(fmt.Sprintf("%d workers, %d KiB", work, memory>>10), func(t *testing.T) {
				r, got := m.fold(t, folding{last, memory, work})
				if first == nil {
					first = got
					for i, lines := range got.sorted() {
						if want := m.states[last][i]; !slices.Equal(lines, want) {
							t.Fatalf("%s has %d rows, want %d", m.tables[i].now(), len(lines), len(want))
						}
					}
				}
				for i := range got.Tables {
					if !slices.EqualFunc(got.Tables[i].Rows, first.Tables[i].Rows, bytes.Equal) {
						t.Errorf("%s: rows or their order differ", m.tables[i].now())
					}
				}
				if spilled := r.SpilledBytes > 0; spilled != (memory < 4<<20) {
					t.Errorf("%d bytes were spilled", r.SpilledBytes)
				}
				if r.Events != int64(last) {
					t.Errorf("%d events, want %d", r.Events, last)
				}
			})
		}
	}
}

func TestStoreKeepsToItsBound(t *testing.T) {
	// A hot row, rows of a megabyte, and rows that grow and shrink: the memory that is counted stays near the bound.
	m := &model{lsn: 8}
	big := m.addTable("big", 'd', []string{"id"}, "id bigint", "v text")
	for i := range 40 {
		m.insert(big, eventlog.OpInsert, modelRow{"id": fmt.Sprint(i), "v": `"` + strings.Repeat("x", 1<<20) + `"`})
	}
	for i := range 2000 {
		m.update(big, i%3, modelRow{"v": `"` + strings.Repeat("y", i) + `"`})
	}
	m.commit()
	last := eventlog.Position(len(m.events))
	_, got := m.fold(t, folding{last, 4 << 20, 2})
	if want := m.states[last]; !slices.Equal(got.sorted()[0], want[0]) {
		t.Error("the rows differ")
	}
}

var errTest = errors.New("a test's error")

// failing is a calculator, source and target that fails somewhere.
type failing struct {
	calc   Calculator
	into   Memory
	source Source
	at     string
	mu     sync.Mutex // guards count
	count  int
}

func (f *failing) hit(where string, every int) error {
	if f.at != where {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.count++; f.count < every {
		return nil
	}
	return errTest
}

func (f *failing) Read(ctx context.Context, sel eventlog.Selection, g func(*eventlog.Event) error) error {
	return f.source.Read(ctx, sel, func(e *eventlog.Event) error {
		if err := f.hit("read", 5000); err != nil {
			return err
		}
		return g(e)
	})
}

func (f *failing) Route(e *eventlog.Event, to *Router) error {
	if err := f.hit("route", 5000); err != nil {
		return err
	}
	return f.calc.Route(e, to)
}

func (f *failing) Tables() []*Table { return f.calc.Tables() }

func (f *failing) NewFolder() Folder { return &failingFolder{f.calc.NewFolder(), f} }

type failingFolder struct {
	Folder
	f *failing
}

func (x *failingFolder) Fold(dst, state []byte, s *Step) ([]byte, error) {
	if err := x.f.hit("fold", 5000); err != nil {
		return dst, err
	}
	return x.Folder.Fold(dst, state, s)
}

func (x *failingFolder) Rows(s *State, emit func(*Row) error) error {
	if err := x.f.hit("rows", 500); err != nil {
		return err
	}
	return x.Folder.Rows(s, emit)
}

func (f *failing) Begin(ctx context.Context, t []*Table) error {
	if err := f.hit("begin", 0); err != nil {
		return err
	}
	return f.into.Begin(ctx, t)
}

func (f *failing) Table(ctx context.Context, t *Table) (TableWriter, error) {
	if err := f.hit("table", 2); err != nil {
		return nil, err
	}
	w, err := f.into.Table(ctx, t)
	return &failingWriter{w, f}, err
}

type failingWriter struct {
	TableWriter
	f *failing
}

func (w *failingWriter) Write(p []byte) error {
	if err := w.f.hit("write", 3); err != nil {
		return err
	}
	return w.TableWriter.Write(p)
}

func (w *failingWriter) Close(err error) error {
	if err != nil {
		return err
	}
	if err := w.f.hit("close", 2); err != nil {
		return err
	}
	if w.f.at == "again" && w.f.count < 3 {
		w.f.count++
		w.f.into.Tables = w.f.into.Tables[:len(w.f.into.Tables)-1]
		return ErrAgain
	}
	return w.TableWriter.Close(err)
}

func (f *failing) Commit(ctx context.Context) error {
	if err := f.hit("commit", 0); err != nil {
		return err
	}
	return f.into.Commit(ctx)
}

func TestEveryErrorSurfacesAndNothingIsLeft(t *testing.T) {
	m := bulk(1, 3000, 6000)
	last := eventlog.Position(len(m.events))
	goroutines := runtime.NumGoroutine()
	for _, at := range []string{"nowhere", "again", "read", "route", "fold", "rows", "begin", "table", "write", "close", "commit"} {
		for _, memory := range []int64{64 << 10, 64 << 20} {
			f := &failing{calc: m.calculator(), source: m.events, at: at}
			fold := Fold{Source: f, Selection: eventlog.Selection{Until: last}, Calculator: f, Target: f, MaxMemoryBytes: memory, Workers: 1, TempDir: tempDir}
			_, err := fold.Run(context.Background())
			if at == "nowhere" || at == "again" {
				if err != nil {
					t.Errorf("%s, %d: %v", at, memory, err)
				}
				for i, lines := range f.into.sorted() {
					if want := m.states[last][i]; !slices.Equal(lines, want) {
						t.Errorf("%s, %d: table %d differs", at, memory, i)
					}
				}
				continue
			}
			if !errors.Is(err, errTest) || f.into.Tables != nil {
				t.Errorf("%s, %d: %v, %d tables", at, memory, err, len(f.into.Tables))
			}
		}
	}
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) { // one that has told of its end is still there for a moment
		if time.Now().After(end) {
			t.Fatalf("%d goroutines are left", runtime.NumGoroutine()-goroutines)
		}
	}
}

func TestCancelledFoldStopsAndLeavesNothing(t *testing.T) {
	m := bulk(1, 3000, 6000)
	for _, at := range []int{1, 3000, 8000, len(m.events)} {
		ctx, cancel := context.WithCancelCause(context.Background())
		seen := 0
		out := &Memory{}
		f := Fold{Source: m.events, Selection: eventlog.Selection{Until: eventlog.Position(len(m.events))}, Target: out,
			Calculator: watching{m.calculator(), func() {
				if seen++; seen == at {
					cancel(errTest)
				}
			}}, MaxMemoryBytes: 64 << 10, TempDir: tempDir}
		if _, err := f.Run(ctx); !errors.Is(err, errTest) && !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled at %d: %v", at, err)
		}
		cancel(nil)
	}
}

type watching struct {
	Calculator
	f func()
}

func (w watching) Route(e *eventlog.Event, to *Router) error { w.f(); return w.Calculator.Route(e, to) }

func TestTemporaryFilesHaveNoName(t *testing.T) {
	dir := t.TempDir()
	m := bulk(1, 3000, 3000)
	seen := 0
	f := Fold{Source: m.events, Selection: eventlog.Selection{Until: eventlog.Position(len(m.events))}, Target: &Memory{},
		Calculator: watching{m.calculator(), func() {
			seen++
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Fatalf("after %d events: %v %v", seen, left, err)
			}
		}}, MaxMemoryBytes: 64 << 10, TempDir: dir}
	r, err := f.Run(context.Background())
	if err != nil || r.SpilledBytes == 0 {
		t.Errorf("%+v %v", r, err)
	}
}

func (f *failing) Abort() { f.into.Abort() }
