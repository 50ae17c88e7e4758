// Package jsonl writes events as JSON lines, to a file or to a stream such as standard output.
//
// # Purpose
//
// One event is one line, in the form of `backstory log --json` (eventlog.Event.AppendJSON). For pipes, for other programs'
// tail -f, for looking at what a reactor would send.
//
// # Once, not twice
//
// A file: the last whole line tells which event came last, so Open cuts off half a line that a crash has left, and the
// reactor goes on behind that event, whatever the checkpoint says. Send ends with fsync. After a failed write (disk full)
// the file is cut back to its last whole line before the next attempt. A file that is empty, or was moved away by log
// rotation before a start, begins at the checkpoint.
//
// A stream cannot be asked what it holds: events after the last saved checkpoint come again after a crash (at least once).
//
// # Invariants
//
//   - Positions in a file ascend; the file holds every selected event from where it began up to its last line.
//   - One writer: the reactor's lease. The file is not locked beyond that.
//
// # Goroutines
//
// None.
package jsonl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
)

// Sink appends JSON lines.
type Sink struct {
	path   string
	stream io.Writer // instead of a file

	file *os.File // nil while closed
	size int64    // of the whole lines in the file
	torn bool     // there may be more than that
	buf  []byte
}

var _ sinks.Sink = (*Sink)(nil)

// File makes a sink that appends to a file, which it creates if need be.
func File(path string) *Sink { return &Sink{path: path} }

// Stream makes a sink that writes to w, usually os.Stdout.
func Stream(w io.Writer) *Sink { return &Sink{stream: w} }

// Open implements sinks.Sink.
func (s *Sink) Open(ctx context.Context, start sinks.Start) (eventlog.Position, error) {
	if s.stream != nil {
		return start.After, nil
	}
	if err := s.Close(ctx); err != nil {
		return 0, err
	}
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE, 0o640)
	if err != nil {
		return 0, s.problem("open", err)
	}
	line, size, err := lastLine(f)
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		// A file that was just made must survive a crash, too.
		err = syncDir(filepath.Dir(s.path))
	}
	if err != nil {
		_ = f.Close()
		return 0, s.problem("open", err)
	}
	after := start.After
	if line != nil {
		var last struct {
			Position eventlog.Position `json:"position"`
			ID       string            `json:"id"`
		}
		err := json.Unmarshal(line, &last)
		id, idErr := eventlog.ParseID(last.ID)
		if err != nil || idErr != nil || last.Position <= 0 {
			_ = f.Close()
			return 0, &eventlog.Problem{Err: fmt.Errorf("open %s: its last line is not an event", s.path),
				Hint: "The file belongs to something else: choose another, or move it away."}
		}
		if err := start.Verify(ctx, last.Position, id); err != nil {
			_ = f.Close()
			return 0, fmt.Errorf("open %s: %w", s.path, err)
		}
		after = max(after, last.Position)
	}
	s.file, s.size, s.torn = f, size, false
	return after, nil
}

// Send implements sinks.Sink.
func (s *Sink) Send(ctx context.Context, events []*eventlog.Event) error {
	if s.stream == nil && s.file == nil {
		return errors.New("send to a file: the sink is not open")
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s.buf = s.buf[:0]
	for _, e := range events {
		s.buf = append(e.AppendJSON(s.buf), '\n')
	}
	if cap(s.buf) > 16<<20 {
		defer func() { s.buf = nil }()
	}
	if s.stream != nil {
		if _, err := s.stream.Write(s.buf); err != nil {
			return fmt.Errorf("write events: %w", err)
		}
		return nil
	}
	if s.torn {
		if err := s.file.Truncate(s.size); err != nil {
			return s.problem("cut off half a line of", err)
		}
	}
	s.torn = true
	if _, err := s.file.WriteAt(s.buf, s.size); err != nil {
		return s.problem("append to", err)
	}
	if err := s.file.Sync(); err != nil {
		return s.problem("sync", err)
	}
	s.size += int64(len(s.buf))
	s.torn = false
	return nil
}

// Close implements sinks.Sink.
func (s *Sink) Close(context.Context) error {
	if s.file == nil {
		return nil
	}
	f := s.file
	s.file = nil
	if s.torn {
		_ = f.Truncate(s.size) // Open would do it, too
	}
	if err := f.Close(); err != nil {
		return s.problem("close", err)
	}
	return nil
}

func (s *Sink) String() string {
	if s.stream != nil {
		return "stream"
	}
	return s.path
}

func (s *Sink) problem(doing string, err error) error {
	hint := "Nothing is lost: it is tried again."
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		hint = "Free some space on the file's disk, or rotate the file away and restart. Nothing is lost: it is tried again."
	case errors.Is(err, fs.ErrPermission):
		hint = "Give the user that runs backstory the right to write the file and its directory."
	case errors.Is(err, fs.ErrNotExist):
		hint = "Create the file's directory."
	}
	return &eventlog.Problem{Err: fmt.Errorf("%s %s: %w", doing, s.path, err), Hint: hint}
}

// lastLine finds the last whole line of a file, without its line break, and where it ends. line is nil if there is none.
func lastLine(f *os.File) (line []byte, size int64, err error) {
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if !st.Mode().IsRegular() {
		return nil, 0, errors.New("not a regular file")
	}
	end := int64(-1) // of the last whole line, after its line break
	for lo, step := st.Size(), int64(64<<10); lo > 0; step *= 2 {
		lo = max(0, lo-step)
		hi := end - 1
		if end < 0 {
			hi = st.Size()
		}
		b := make([]byte, hi-lo)
		if _, err := f.ReadAt(b, lo); err != nil {
			return nil, 0, err
		}
		if end < 0 {
			i := bytes.LastIndexByte(b, '\n')
			if i < 0 {
				continue
			}
			end = lo + int64(i) + 1
			b = b[:i]
		}
		if i := bytes.LastIndexByte(b, '\n'); i >= 0 || lo == 0 {
			return b[i+1:], end, nil
		}
	}
	return nil, 0, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOTSUP) {
		return err
	}
	return nil
}
