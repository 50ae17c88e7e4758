package eventlog

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// A filter may err, but never forgets a row.
func TestTouchedForgetsNothing(t *testing.T) {
	var f touched
	if f.has(1, 1) {
		t.Error("an empty filter has a row")
	}
	r := rand.New(rand.NewPCG(1, 2))
	type row struct {
		oid uint32
		id  int64
	}
	var rows []row
	for range 100_000 {
		rows = append(rows, row{uint32(r.IntN(5)), int64(r.Uint64())})
		f.add(rows[len(rows)-1].oid, rows[len(rows)-1].id)
	}
	for i := range int64(1000) { // as keys mostly are
		rows = append(rows, row{7, i})
		f.add(7, i)
	}
	for _, x := range rows {
		if !f.has(x.oid, x.id) {
			t.Fatalf("%v is forgotten", x)
		}
	}
	wrong := 0
	for i := range int64(100_000) {
		if f.has(7, 1_000_000+i) {
			wrong++
		}
	}
	if wrong > 100 {
		t.Errorf("of 100,000 rows that were never touched it has %d", wrong)
	}
	f.all()
	if !f.has(9, 9) {
		t.Error("a full filter lacks a row")
	}
}

func TestSnapshotSees(t *testing.T) {
	for _, c := range []struct {
		snapshot string
		xid      int64
		sees     bool
	}{
		{"100:100:", 99, true}, {"100:100:", 100, false}, {"100:110:103,105", 102, true}, {"100:110:103,105", 103, false}, {"100:110:103,105", 105, false},
		{"100:110:103,105", 110, false}, {"100:110:100", 100, false}, // 2^32 + 104 and so on: events have the lower half of a transaction's number
		{"4294967400:4294967410:4294967403", 102, true}, {"4294967400:4294967410:4294967403", 107, false}, {"4294967400:4294967410:4294967403", 113, true},
		{"4294967400:4294967410:4294967403", 114, false}, {"4294967400:4294967410:4294967403", 4294967290, true}, {"", 5, false},
	} {
		if got := Sees(c.snapshot, uint32(c.xid)); got != c.sees {
			t.Errorf("snapshot %q sees transaction %d: %v, want %v", c.snapshot, c.xid, got, c.sees)
		}
	}
}

// What appendKey joins, splitKey takes apart.
func TestSplitKey(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 10_000 {
		n := 2 + r.IntN(3)
		var want []string
		row := make([]Value, n)
		cols := make([]int, n)
		for i := range n {
			var b strings.Builder
			for range r.IntN(6) {
				b.WriteByte(`,\a é`[r.IntN(6)])
			}
			want = append(want, b.String())
			row[i], cols[i] = Value{StateText, []byte(b.String())}, i
		}
		if got := splitKey(string(appendKey(nil, cols, row))); !slices.Equal(got, want) {
			t.Fatalf("%q became %q", want, got)
		}
	}
}
