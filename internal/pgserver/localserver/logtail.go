package localserver

import (
	"bytes"
	"io"
	"os"
	"strings"
)

// LogTail returns the last lines that were written to the file since offset, for an error's text; at most 4 kB.
func LogTail(path string, offset int64, lines int) string {
	const most = 4096
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err == nil && size-most > offset {
		offset = size - most
	}
	text, _ := io.ReadAll(io.NewSectionReader(f, offset, most))
	all := strings.Split(string(bytes.TrimSpace(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
