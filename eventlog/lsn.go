package eventlog

import (
	"fmt"
	"strconv"
	"strings"
)

// Position is an event's dense number in the event log: 1, 2, 3 … in commit order. Zero is "before the first event".
type Position int64

func (p Position) String() string { return strconv.FormatInt(int64(p), 10) }

// LSN is a byte position in the source's write-ahead log, printed as Postgres prints it: 16/B374D848.
// Zero means "none".
type LSN uint64

func (l LSN) String() string {
	var b [17]byte
	return string(l.append(b[:0]))
}

// append appends what String gives.
func (l LSN) append(b []byte) []byte {
	n := len(b)
	b = strconv.AppendUint(b, uint64(l>>32), 16)
	b = append(b, '/')
	b = strconv.AppendUint(b, uint64(uint32(l)), 16)
	for i := n; i < len(b); i++ {
		if b[i] >= 'a' {
			b[i] -= 'a' - 'A'
		}
	}
	return b
}

// ParseLSN reads the form that String prints.
func ParseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	if !ok {
		return 0, fmt.Errorf("parse LSN %q: no slash, expected a form like 16/B374D848", s)
	}
	h, err := strconv.ParseUint(hi, 16, 32)
	if err != nil {
		return 0, fmt.Errorf("parse LSN %q: expected a form like 16/B374D848", s)
	}
	l, err := strconv.ParseUint(lo, 16, 32)
	if err != nil {
		return 0, fmt.Errorf("parse LSN %q: expected a form like 16/B374D848", s)
	}
	return LSN(h<<32 | l), nil
}
