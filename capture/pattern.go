package capture

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/backstory-dev/backstory/eventlog"
)

// pattern matches schema-qualified table names.
type pattern struct{ schema, table *regexp.Regexp }

// parsePattern reads schema.table or table (in any schema but the system's), with * for any run of characters. Names are
// taken as they are stored, without quotes and without folding.
func parsePattern(s string) (pattern, error) {
	schema, table, ok := strings.Cut(s, ".")
	if !ok {
		schema, table = "*", s
	}
	if schema == "" || table == "" {
		return pattern{}, &eventlog.Problem{Err: fmt.Errorf("table pattern %q is not of the form schema.table", s), Hint: "For instance public.*, billing.invoices or *.events (BACKSTORY_TABLES, BACKSTORY_EXCLUDE)."}
	}
	compile := func(t string) *regexp.Regexp {
		return regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(t), `\*`, ".*") + "$")
	}
	return pattern{compile(schema), compile(table)}, nil
}

func (p pattern) matches(schema, table string) bool {
	return p.schema.MatchString(schema) && p.table.MatchString(table)
}

// selected tells whether a table is to be captured.
func (c Config) selected(t *eventlog.Relation) bool {
	return matchAny(c.Tables, t) && !matchAny(c.Exclude, t)
}

// matchAny tells whether one of the patterns means the table, or the partitioned table that it is a part of.
func matchAny(patterns []string, t *eventlog.Relation) bool {
	return slices.ContainsFunc(patterns, func(s string) bool {
		p, err := parsePattern(s)
		return err == nil && (p.matches(t.Schema, t.Name) || p.matches(t.Table()))
	})
}
