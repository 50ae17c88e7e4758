package eventlog

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// history is a dictionary with versions of tables: each as "oid name column:number …".
func history(t *testing.T, versions ...string) *dictionary {
	t.Helper()
	d := newDictionary(nil)
	for i, v := range versions {
		r := described(t, v)
		d.relations[i+1] = r
	}
	return d
}

func described(t *testing.T, v string) *Relation {
	t.Helper()
	f := strings.Fields(v)
	r := &Relation{Schema: "public", Name: strings.TrimSuffix(f[1], "!"), Dropped: strings.HasSuffix(f[1], "!")}
	if _, err := fmt.Sscan(f[0], &r.OID); err != nil {
		t.Fatal(err)
	}
	for _, c := range f[2:] {
		name, num, _ := strings.Cut(c, ":")
		col := Column{Name: name, Type: Type{OID: 25, Name: "text"}}
		if _, err := fmt.Sscan(num, &col.Num); err != nil {
			t.Fatal(err)
		}
		r.Columns = append(r.Columns, col)
	}
	return r
}

func (r *Relation) brief() string {
	out := fmt.Sprintf("%d %s", r.OID, r.Name)
	for _, c := range r.Columns {
		out += fmt.Sprintf(" %s:%d", c.Name, c.Num)
	}
	return out
}

// TestNumbersAfterAGap: which table of now a table of before is, and which column.
func TestNumbersAfterAGap(t *testing.T) {
	for _, c := range []struct {
		what         string
		how          Crossing
		before, now  []string
		want         string // the versions of before, as they are read from then on
		left         string // a table that is there and not captured
		changesAtAll bool
	}{
		{"another system with the OIDs of each other", OtherSystem, []string{"20001 a x:1", "20002 b x:1"}, []string{"20002 a x:1", "20001 b x:1"}, "20002 a x:1, 20001 b x:1", "", true},
		{"another system in which everything is the same", OtherSystem, []string{"20001 a x:1"}, []string{"20001 a x:1"}, "20001 a x:1", "", false},
		{"another system, a rename is none", OtherSystem, []string{"20001 a x:1"}, []string{"20001 b x:1"}, "16383 a x:1", "", true},
		{"another system without the column that was dropped", OtherSystem, []string{"20001 a x:1 y:2 z:3", "20001 a x:1 z:3"}, []string{"20005 a x:1 z:2"}, "20005 a x:1 y:-1 z:2, 20005 a x:1 z:2", "", true},
		{"what was dropped is not what has its name now", OtherSystem, []string{"20001 a x:1", "20001 a! x:1"}, []string{"20001 a x:1"}, "16383 a x:1, 16383 a x:1", "", true},
		{"one that is not captured is nobody's", OtherSystem, []string{"20001 a x:1"}, nil, "16383 a x:1", "20001 a", true},
		{"put back, its OID is another one's", PutBack, []string{"20001 a x:1", "20002 lost x:1"}, []string{"20001 a x:1", "20002 fresh x:1"}, "20001 a x:1, 16383 lost x:1", "", true},
		{"put back to before it was renamed", PutBack, []string{"20001 a x:1", "20001 b x:1"}, []string{"20001 a x:1"}, "20001 a x:1, 20001 b x:1", "", false},
		{"put back to before it was dropped and made again", PutBack, []string{"20001 a x:1", "20001 a! x:1", "20002 a x:1"}, []string{"20001 a x:1"}, "16383 a x:1, 16383 a x:1, 20001 a x:1", "", true},
		{"put back, and made again", PutBack, []string{"20001 a x:1", "20002 b x:1"}, []string{"20002 a x:1", "20003 b x:1"}, "20002 a x:1, 20003 b x:1", "", true},
		{"put back to before two swapped names", PutBack, []string{"20001 a x:1", "20002 b x:1", "20001 b x:1", "20002 a x:1"}, []string{"20001 a x:1", "20002 b x:1"}, "20001 a x:1, 20002 b x:1, 20001 b x:1, 20002 a x:1", "", false},
		{"put back, the number is another column's", PutBack, []string{"20001 a x:1 lost:2"}, []string{"20001 a x:1 fresh:2"}, "20001 a x:1 lost:-1", "", true},
		{"put back to before a column was renamed", PutBack, []string{"20001 a x:1 y:2", "20001 a x:1 z:2"}, []string{"20001 a x:1 y:2"}, "20001 a x:1 y:2, 20001 a x:1 z:2", "", false},
		{"the same source", SameSource, []string{"20001 a x:1 y:2"}, []string{"20001 b z:1 y:2"}, "20001 a x:1 y:2", "", false},
		{"the same source, dropped and made again in the gap", SameSource, []string{"20001 a x:1 y:2 z:3"}, []string{"20009 a x:1 z:2"}, "20009 a x:1 y:-1 z:2", "", true},
		{"the same source, dropped in the gap", SameSource, []string{"20001 a x:1"}, nil, "20001 a x:1", "", false},
	} {
		d := history(t, c.before...)
		var present []Present
		for _, v := range c.now {
			r := described(t, v)
			present = append(present, Present{r.OID, r.Schema, r.Name, r})
		}
		if c.left != "" {
			r := described(t, c.left)
			present = append(present, Present{r.OID, r.Schema, r.Name, nil})
		}
		moves := d.moves(c.how, d.crossed(c.how, present), len(c.before), 0)
		if (len(moves) > 0) != c.changesAtAll {
			t.Errorf("%s: %+v", c.what, moves)
		}
		var got []string
		for i := range c.before {
			got = append(got, asNow(moves, i+1, d.relations[i+1]).brief())
		}
		if got := strings.Join(got, ", "); got != c.want {
			t.Errorf("%s: %s, want %s", c.what, got, c.want)
		}
		if later := described(t, "20001 a x:1"); asNow(moves, len(c.before)+1, later).brief() != later.brief() {
			t.Errorf("%s: what came later is read with other numbers", c.what)
		}
		// Once more, of what is read now: there is nothing to record any more.
		for i := range c.before {
			d.relations[i+1] = asNow(moves, i+1, d.relations[i+1])
		}
		if again := d.moves(c.how, d.crossed(c.how, present), len(c.before), len(moves)); len(again) > 0 {
			t.Errorf("%s: and then %+v", c.what, again)
		}
	}
}

// TestNumbersAfterTwoGaps: each is about what the one before made of them.
func TestNumbersAfterTwoGaps(t *testing.T) {
	d := history(t, "20001 a x:1 y:2 z:3", "20002 b x:1")
	first := d.moves(OtherSystem, d.crossed(OtherSystem, []Present{{20002, "public", "a", described(t, "20002 a x:1 z:2")}, {20001, "public", "b", described(t, "20001 b x:1")}}), 2, 0)
	for i := range 2 {
		d.relations[i+1] = asNow(first, i+1, d.relations[i+1])
	}
	d.relations[3] = described(t, "20002 a x:1 z:2 more:3")
	second := d.moves(OtherSystem, d.crossed(OtherSystem, []Present{{20007, "public", "a", described(t, "20007 a z:1 more:2")}}), 3, len(first))
	all := slices.Concat(first, second)
	for i, want := range []string{"20007 a x:-2 y:-1 z:1", "16383 b x:1", "20007 a x:-2 z:1 more:2"} {
		was := []string{"20001 a x:1 y:2 z:3", "20002 b x:1", "20002 a x:1 z:2 more:3"}[i]
		if got := asNow(all, i+1, described(t, was)).brief(); got != want {
			t.Errorf("%s is read as %s, want %s", was, got, want)
		}
	}
}
