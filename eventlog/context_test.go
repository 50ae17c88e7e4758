package eventlog

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// Who and why is merged in on one way of reading and joined on the other; both say the same, whatever the window.
func TestReadWhoAndWhy(t *testing.T) {
	const n = 11_000
	at := time.Date(2026, 11, 1, 8, 0, 0, 0, time.UTC)
	events := make([]logEvent, n)
	for i := range events {
		events[i] = logEvent{LSN(0x1000 + 16*i), 1 + i, at.Add(time.Duration(i) * time.Second)}
	}
	l := makeLog(t, n, events)
	r := rand.New(rand.NewPCG(1, 2))
	var first, last []int64
	var meta []string
	for p := int64(1); p <= n; {
		end := p + int64(r.IntN(3))
		if r.IntN(4) > 0 {
			first, last = append(first, p), append(last, min(end, n))
			size := 10
			if r.IntN(50) == 0 {
				size = 80_000
			}
			meta = append(meta, fmt.Sprintf(`{"actor":"%d","reason":"%s"}`, p, strings.Repeat("x", size)))
		}
		p = end + 1
	}
	if _, err := l.pool.Exec(t.Context(), `INSERT INTO backstory.context SELECT f, l, 0, m::json FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS c(f, l, m)`, first, last, meta); err != nil {
		t.Fatal(err)
	}
	want := map[Position]string{}
	if err := l.Read(t.Context(), Selection{Newest: true, Quiet: true}, func(e *Event) error { want[e.Position] = string(e.Metadata); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(want) != n || len(first) < maxContextRanges {
		t.Fatalf("%d events, %d ranges", len(want), len(first))
	}
	for _, step := range []int{0, 1, 7, 1000, 6000} {
		after, seen := Position(0), 0
		if step == 1 {
			after = n - 300
		}
		if step == 7 {
			after = n - 2000
		}
		begin := after
		for after < n {
			count := 0
			err := l.Read(t.Context(), Selection{After: after, Until: n, Quiet: true, Limit: step}, func(e *Event) error {
				if e.Position != after+1 {
					t.Fatalf("limit %d: position %d after %d", step, e.Position, after)
				}
				if string(e.Metadata) != want[e.Position] {
					t.Fatalf("limit %d: position %d has metadata %.60s, want %.60s", step, e.Position, e.Metadata, want[e.Position])
				}
				after = e.Position
				seen++
				count++
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if step > 0 && count != min(step, n-int(after)+count) {
				t.Fatalf("limit %d gave %d events", step, count)
			}
		}
		if seen != n-int(begin) {
			t.Errorf("limit %d: %d events", step, seen)
		}
	}
	if s := l.pool.Stat(); s.NewConnsCount() > 12 {
		t.Errorf("%d connections were opened: a limited read must leave its connection usable", s.NewConnsCount())
	}
}
