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

func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint32(l>>32), uint32(l)) }

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
