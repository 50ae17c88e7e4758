package rebuild

import (
	"bytes"
	"context"
)

// Memory is a target that keeps all rows: for few.
type Memory struct {
	Tables []*MemoryTable // after Commit
}

// MemoryTable is a table in memory.
type MemoryTable struct {
	*Table
	Rows [][]byte // JSON objects in the form of the log
}

var _ Target = (*Memory)(nil)

// Begin begins.
func (m *Memory) Begin(context.Context, []*Table) error { m.Tables = nil; return nil }

// Table begins a table.
func (m *Memory) Table(_ context.Context, t *Table) (TableWriter, error) {
	w := &memoryWriter{MemoryTable{Table: t}}
	m.Tables = append(m.Tables, &w.MemoryTable)
	return w, nil
}

// Commit ends.
func (m *Memory) Commit(context.Context) error { return nil }

// Abort forgets all rows.
func (m *Memory) Abort() { m.Tables = nil }

type memoryWriter struct{ MemoryTable }

func (w *memoryWriter) NewEncoder() Encoder { return newJSONEncoder(w.Table) }

func (w *memoryWriter) Write(p []byte) error {
	p = bytes.Clone(p)
	for len(p) > 0 {
		n := bytes.IndexByte(p, '\n')
		w.Rows = append(w.Rows, p[:n:n])
		p = p[n+1:]
	}
	return nil
}

func (w *memoryWriter) Close(err error) error { return err }
