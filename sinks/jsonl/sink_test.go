package jsonl

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
	"github.com/backstory-dev/backstory/sinks/sinktest"
)

func parse(t *testing.T, b []byte) (out []sinktest.Delivered) {
	t.Helper()
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Buffer(nil, 64<<20)
	for sc.Scan() {
		var e struct {
			Position     eventlog.Position
			Aggregate    string
			Aggregate_id string //nolint:revive // as in the file
		}
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			t.Fatalf("line %d: %v", len(out)+1, err)
		}
		out = append(out, sinktest.Delivered{Position: e.Position, Entity: e.Aggregate + "/" + e.Aggregate_id, JSON: bytes.Clone(sc.Bytes())})
	}
	return out
}

func TestFile(t *testing.T) {
	sinktest.Run(t, func(t *testing.T) sinktest.Harness {
		path := filepath.Join(t.TempDir(), "events.jsonl")
		var open *Sink
		return sinktest.Harness{
			Once: true,
			Sink: func(*testing.T) sinks.Sink { open = File(path); return open },
			Contents: func(t *testing.T) []sinktest.Delivered {
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				return parse(t, b)
			},
			Interrupt: func(t *testing.T) func() {
				// A write that gets half of its bytes into the file and then fails.
				good := open.file
				half, err := os.OpenFile(path, os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := half.WriteAt([]byte(`{"position":501,"id":"half a li`), open.size); err != nil {
					t.Fatal(err)
				}
				half.Close()
				open.file = half
				open.torn = true
				return func() { open.file = good }
			},
		}
	})
}

func TestStream(t *testing.T) {
	sinktest.Run(t, func(t *testing.T) sinktest.Harness {
		var out bytes.Buffer
		return sinktest.Harness{
			Sink:     func(*testing.T) sinks.Sink { return Stream(&out) },
			Contents: func(t *testing.T) []sinktest.Delivered { return parse(t, out.Bytes()) },
		}
	})
}

func TestOpen(t *testing.T) {
	gen := sinktest.NewGenerator(1)
	log := sinktest.NewLog("l")
	log.Append(gen.Mix(3, 3)...)
	log.Append(gen.Big("Order/1", 300<<10))
	var lines [][]byte
	for _, e := range log.Events() {
		lines = append(lines, append(e.AppendJSON(nil), '\n'))
	}
	all := bytes.Join(lines, nil)
	verify := func(_ context.Context, p eventlog.Position, id eventlog.ID) error {
		if log.Events()[p-1].ID != id {
			return fmt.Errorf("%w", sinks.ErrOtherHistory)
		}
		return nil
	}
	start := len(all) - len(lines[3])
	for _, test := range []struct {
		name    string
		content []byte
		after   eventlog.Position
		size    int
		err     string
	}{
		{"an empty file begins at the checkpoint", nil, 2, 0, ""},
		{"a file goes on behind its last line", all, 4, len(all), ""},
		{"half a line is cut off", all[:start+100], 3, start, ""},
		{"half a long line is cut off", all[:len(all)-1], 3, start, ""},
		{"only half a line", all[:10], 2, 0, ""},
		{"a line with a break after it and nothing else", all[:len(lines[0])], 2, len(lines[0]), ""},
		{"a file of something else is refused", []byte("hello\n"), 0, 6, "its last line is not an event"},
		{"a file that ends in an empty line is refused", []byte("\n"), 0, 1, "its last line is not an event"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(path, test.content, 0o600); err != nil {
				t.Fatal(err)
			}
			s := File(path)
			after, err := s.Open(t.Context(), sinks.Start{After: 2, Verify: verify})
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) || eventlog.Hint(err) == "" {
					t.Errorf("got error %v, want one with %q and a hint", err, test.err)
				}
			} else if err != nil || after != max(2, test.after) {
				t.Errorf("Open = %d, %v; want %d", after, err, test.after)
			}
			if err := s.Close(t.Context()); err != nil {
				t.Error(err)
			}
			if st, err := os.Stat(path); err != nil || st.Size() != int64(test.size) {
				t.Errorf("file has %d bytes, want %d", st.Size(), test.size)
			}
		})
	}
	t.Run("a directory that does not exist is a problem with a remedy", func(t *testing.T) {
		_, err := File(filepath.Join(t.TempDir(), "no", "f")).Open(t.Context(), sinks.Start{})
		if !errors.Is(err, os.ErrNotExist) || eventlog.Hint(err) == "" {
			t.Errorf("got %v", err)
		}
	})
}
