package sinks

import (
	"fmt"
	"strings"

	"github.com/backstory-dev/backstory/eventlog"
)

// pattern selects event types: Order*, *Imported, OrderPaid. A star stands for any run of characters, also none.
type pattern string

func (p pattern) validate() error {
	if p == "" || strings.ContainsAny(string(p), " \t\n?[]{}") {
		return &eventlog.Problem{Err: fmt.Errorf("read event type pattern %q", string(p)),
			Hint: "Use an event type, where * stands for any run of characters: OrderPaid, Order*, *Imported, *."}
	}
	return nil
}

func (p pattern) match(typ string) bool {
	head, rest, star := strings.Cut(string(p), "*")
	if !star {
		return typ == head
	}
	if !strings.HasPrefix(typ, head) {
		return false
	}
	typ = typ[len(head):]
	for {
		part, more, star := strings.Cut(rest, "*")
		if !star {
			return strings.HasSuffix(typ, part)
		}
		i := strings.Index(typ, part)
		if i < 0 {
			return false
		}
		typ, rest = typ[i+len(part):], more
	}
}

// names tells whether the pattern speaks of the types that it matches, and does not merely cover them: it does unless it
// ends in a star. OrderImported and *Imported name imports, Order* does not.
func (p pattern) names() bool { return !strings.HasSuffix(string(p), "*") }

// selection decides which events a reactor gets.
type selection struct {
	patterns   []pattern
	quiet      bool
	sideEffect bool
	known      map[selectionKey]bool
}

type selectionKey struct {
	typ    string
	op     eventlog.Op
	hidden bool
}

func (s *selection) takes(e *eventlog.Event) bool {
	k := selectionKey{e.Type, e.Op, e.Quiet}
	takes, ok := s.known[k]
	if !ok {
		for _, p := range s.patterns {
			takes = takes || p.match(e.Type) && (!s.sideEffect || e.Op != eventlog.OpImport || p.names())
		}
		takes = takes && (s.quiet || !e.Quiet)
		if s.known == nil || len(s.known) > 10_000 {
			s.known = map[selectionKey]bool{}
		}
		s.known[k] = takes
	}
	return takes
}
