package capture

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/backstory-dev/backstory/eventlog"
)

// FuzzDecode feeds a session what a broken or malicious server might send: messages of CopyData, as many as there are. It
// must neither panic nor take more memory than the input warrants, and what it decodes must encode to the same bytes.
func FuzzDecode(f *testing.F) {
	files, err := filepath.Glob("testdata/pgoutput_*.bin")
	if err != nil || len(files) == 0 {
		f.Fatalf("no recordings: %v", err)
	}
	for _, file := range files {
		rec, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(rec)
		// Each transaction alone, after the relations: short inputs are mutated to more effect.
		var relations, tx []byte
		for _, m := range messages(rec) {
			if m[0] != 'w' {
				f.Add(record(nil, m))
				continue
			}
			switch m[25] {
			case 'R':
				relations = record(relations, m)
			case 'C':
				f.Add(append(append([]byte(nil), relations...), record(tx, m)...))
				tx = nil
			default:
				tx = record(tx, m)
			}
		}
	}
	keepalive := append([]byte{'k'}, make([]byte, 17)...)
	keepalive[7], keepalive[17] = 1, 1
	f.Add(record(nil, keepalive)) // wants an answer
	f.Fuzz(func(t *testing.T, rec []byte) {
		x, _ := offline()
		for _, m := range messages(rec) {
			items := len(x.batch.Items)
			err := x.data(m)
			if n := x.batch.Bytes(); n > 256*len(rec)+1024 {
				t.Fatalf("%d bytes of input take %d bytes of memory", len(rec), n)
			}
			if err != nil {
				if !errors.Is(err, errMalformed) {
					t.Fatalf("not sorted as malformed: %v", err)
				}
				return // a session ends with its first error
			}
			if len(m) < 26 || m[0] != 'w' {
				continue
			}
			switch m[25] {
			case 'I', 'U', 'D':
				if len(x.batch.Items) != items+1 {
					t.Fatalf("%q gives %d items", m[25], len(x.batch.Items)-items)
				}
				it := &x.batch.Items[items]
				if again := encodeChange(it); !bytes.Equal(again, m[25:]) {
					t.Fatalf("%q\n decodes to %s and encodes to\n%q", m[25:], render(x.batch.Items[items:]), again)
				}
				for _, v := range append(append([]eventlog.Value(nil), it.Old...), it.New...) {
					if v.State == eventlog.StateUnknown {
						t.Fatalf("%q leaves a value unknown", m[25:])
					}
				}
			}
		}
	})
}

// FuzzRelation feeds descriptions of tables, of which the fuzzer would seldom find the way through a whole stream.
func FuzzRelation(f *testing.F) {
	f.Add([]byte("\x00\x00\x40\x01public\x00orders\x00d\x00\x02\x01id\x00\x00\x00\x00\x14\xff\xff\xff\xff\x00status\x00\x00\x00\x00\x19\xff\xff\xff\xff"))
	f.Add([]byte("\x00\x00\x40\x01\x00pg_class\x00n\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, _ := offline()
		m, err := decodeRelation(b)
		if err != nil {
			return
		}
		if err := x.relation(m); err != nil {
			t.Fatal(err)
		}
		r := x.relations[m.oid]
		if r == nil || len(r.Columns) != len(m.columns) {
			t.Fatalf("%q gives %+v", b, r)
		}
		for _, k := range r.Key {
			if k < 0 || k >= len(r.Columns) {
				t.Fatalf("%q gives key %v of %d columns", b, r.Key, len(r.Columns))
			}
		}
	})
}
