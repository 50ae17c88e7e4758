package eventlog

import (
	"strconv"
	"strings"
	"unicode"

	"github.com/jinzhu/inflection"
)

// part is one event that a row change becomes.
type part struct {
	typ      string
	quiet    bool
	restates bool
}

// tableRules are the typing rules of one version of a table.
type tableRules struct {
	quiet                                                   []bool // by column: a change of only such columns is not news
	created, updated, touched, deleted, truncated, imported part
	healed                                                  part // what a comparison with the source has found
	typer                                                   func(*RowChange) ([]Part, error)
	owner                                                   *aggregate // of the entities that the rows belong to, and the columns with its key
	key                                                     []int
	of                                                      string // the table of these
}

// rulesFor gives the rules of a table. Without any of a file, subscriptions becomes SubscriptionCreated, SubscriptionUpdated (only the changed
// attributes), SubscriptionTouched (only quiet columns changed), SubscriptionDeleted, SubscriptionTruncated, SubscriptionImported.
func rulesFor(r *Relation, name string, from *RowRules) *tableRules {
	t := &tableRules{quiet: make([]bool, len(r.Columns)),
		created: part{typ: name + "Created"}, updated: part{typ: name + "Updated"}, touched: part{typ: name + "Touched", quiet: true},
		deleted: part{typ: name + "Deleted"}, truncated: part{typ: name + "Truncated"}, imported: part{typ: name + "Imported"}, healed: part{typ: name + "Healed"}}
	for i, c := range r.Columns {
		t.quiet[i] = QuietByConvention(c.Name)
	}
	if from.Quiet != nil {
		t.quiet = from.Quiet
	}
	t.typer = from.Type
	return t
}

// QuietByConvention tells whether a change of only a column of this name is no news unless rules say otherwise.
func QuietByConvention(column string) bool {
	return column == "updated_at" || column == "lock_version" || strings.HasSuffix(column, "_count")
}

// IDType is the type in which the view of a table's aggregate offers the keys of its entities: bigint, uuid, numeric or text.
func IDType(r *Relation) string {
	if len(r.Key) == 1 {
		switch ty := r.Columns[r.Key[0]].Type; {
		case r.IntegerKey():
			return "bigint"
		case ty.Name == "uuid" || ty.Name == "numeric":
			return ty.Name // as these can be indexed in their own type: their text form is immutable
		}
	}
	return "text"
}

// sourceAggregate is that of events about the source as a whole. No table has it.
const sourceAggregate = "Source"

// aggregateName gives the nth choice of a name for a table's aggregate. An aggregate belongs to one table, so where the
// convention gives two tables the same one (item and items), the later one gets its table's name as it is, or a number, behind an
// underscore: no name by the convention has one, so that Order_2 never is what another table's would be. given is the name that rules have for it.
func aggregateName(r *Relation, given string, n int) string {
	if given != "" {
		if n > 0 {
			given += "_" + strconv.Itoa(n+1)
		}
		return given
	}
	name := AggregateName(r)
	schema, table := r.Table()
	if plain := camelTable(schema, table); plain != name {
		if n == 1 {
			return plain
		}
		n = max(0, n-1)
	}
	if n == 0 {
		return name
	}
	return name + "_" + strconv.Itoa(n+1)
}

// AggregateName gives the aggregate of a table by Rails' convention: order_items becomes OrderItem. Tables outside the
// schema public carry their schema: billing.invoices becomes BillingInvoice.
func AggregateName(r *Relation) string {
	schema, name := r.Table()
	return camelTable(schema, inflection.Singular(name))
}

func camelTable(schema, name string) string {
	n := camel(name)
	if schema != "public" {
		n = camel(schema) + n
	}
	if n == "" || !unicode.IsLetter([]rune(n)[0]) {
		n = "T" + n
	}
	return n
}

func camel(s string) string {
	var b strings.Builder
	up := true
	for _, r := range s {
		switch {
		case !unicode.IsLetter(r) && !unicode.IsDigit(r):
			up = true
		case up:
			b.WriteRune(unicode.ToUpper(r))
			up = false
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// snake gives the name of an aggregate in the form of a table's name: OrderItem becomes order_item.
func snake(s string) string {
	var b strings.Builder
	for i, r := range s {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
