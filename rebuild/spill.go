package rebuild

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// What a record in a batch or in a spilled run tells of its key.
const (
	recordStep  = iota // a step, to be folded
	recordState        // the state so far: nothing of the key comes before it
	recordClear        // the steps and states so far are void, for all keys
)

// recordHeader is [length of what follows, 32 bits] [kind, 8 bits] [hash, 64 bits] [key length, 32 bits]; key and payload follow.
const recordHeader = 17

// appendRecord appends a record whose payload is several pieces.
func appendRecord(dst []byte, kind byte, hash uint64, key []byte, payload ...[]byte) []byte {
	n := recordHeader - 4 + len(key)
	for _, p := range payload {
		n += len(p)
	}
	dst = binary.LittleEndian.AppendUint32(dst, uint32(n))
	dst = append(dst, kind)
	dst = binary.LittleEndian.AppendUint64(dst, hash)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(key)))
	dst = append(dst, key...)
	for _, p := range payload {
		dst = append(dst, p...)
	}
	return dst
}

// record is one as it lies in memory.
type record struct {
	kind         byte
	hash         uint64
	key, payload []byte
	raw          []byte // all of it
}

// nextRecord takes the first record from b.
func nextRecord(b []byte) (r record, rest []byte) {
	n := 4 + int(binary.LittleEndian.Uint32(b))
	k := recordHeader + int(binary.LittleEndian.Uint32(b[13:]))
	return record{kind: b[4], hash: binary.LittleEndian.Uint64(b[5:]), key: b[recordHeader:k:k], payload: b[k:n:n], raw: b[:n:n]}, b[n:]
}

const tempPattern = "backstory-spill-*"

// removedFile opens a temporary file and removes its name at once.
func removedFile(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, tempPattern)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// spillFile is a temporary file without a name, which the operating system removes with the process whatever happens.
// One goroutine writes to it, several may read.
type spillFile struct {
	dir     string
	file    *os.File
	size    int64
	written int64 // in all
}

func (s *spillFile) write(p []byte) (int64, error) {
	if s.file == nil {
		f, err := unnamedFile(s.dir)
		if err != nil {
			return 0, fmt.Errorf("make a temporary file: %w", err)
		}
		s.file = f
	}
	at := s.size
	if _, err := s.file.WriteAt(p, at); err != nil {
		return 0, fmt.Errorf("write a temporary file: %w", err)
	}
	s.size += int64(len(p))
	s.written += int64(len(p))
	return at, nil
}

// reset forgets the content.
func (s *spillFile) reset() error {
	s.size = 0
	if s.file == nil {
		return nil
	}
	if err := s.file.Truncate(0); err != nil {
		return fmt.Errorf("empty a temporary file: %w", err)
	}
	return nil
}

func (s *spillFile) close() error {
	if s.file == nil {
		return nil
	}
	err := s.file.Close()
	if keepsName {
		err = errors.Join(err, os.Remove(s.file.Name()))
	}
	s.file = nil
	return err
}

// run is a sequence of records in a spill file: of one part of one table, in order.
type run struct {
	file    *spillFile
	used    *int64 // the owner's count of bytes
	buf     []byte
	extents []extent
	states  int // how many of the records are states of a key
}

type extent struct {
	at   int64
	size int
}

// add appends a record; buffers larger than limit go to the file.
func (r *run) add(raw []byte, limit int) error {
	if len(r.buf)+len(raw) > limit {
		if err := r.flush(); err != nil {
			return err
		}
		if len(raw) > limit {
			return r.write(raw)
		}
	}
	c := cap(r.buf)
	r.buf = append(r.buf, raw...)
	*r.used += int64(cap(r.buf) - c)
	return nil
}

// flush writes what is buffered.
func (r *run) flush() error {
	if len(r.buf) == 0 {
		return nil
	}
	err := r.write(r.buf)
	r.buf = r.buf[:0]
	return err
}

func (r *run) write(p []byte) error {
	at, err := r.file.write(p)
	if err != nil {
		return err
	}
	c := cap(r.extents)
	r.extents = append(r.extents, extent{at, len(p)})
	*r.used += int64(16 * (cap(r.extents) - c))
	return nil
}

// held is how many bytes of memory the run has.
func (r *run) held() int64 { return int64(cap(r.buf) + 16*cap(r.extents)) }

// clear forgets all records.
func (r *run) clear() {
	*r.used -= r.held()
	r.buf, r.extents = nil, nil
}

// trim gives back the buffer, which has been flushed.
func (r *run) trim() {
	*r.used -= int64(cap(r.buf))
	r.buf = nil
}

// each calls f for the records, up to lookAhead at a time; they are valid until f returns. The run may be read again.
func (r *run) each(buf []byte, f func([]record) error) ([]byte, error) {
	var group [lookAhead]record
	for _, e := range r.extents {
		if cap(buf) < e.size {
			buf = make([]byte, e.size)
		}
		b := buf[:e.size]
		if _, err := r.file.file.ReadAt(b, e.at); err != nil && err != io.EOF {
			return buf, fmt.Errorf("read a temporary file: %w", err)
		}
		for len(b) > 0 {
			n := 0
			for ; n < len(group) && len(b) > 0; n++ {
				group[n], b = nextRecord(b)
			}
			if err := f(group[:n]); err != nil {
				return buf, err
			}
		}
	}
	return buf, nil
}
