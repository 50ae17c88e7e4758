package expr

import (
	"errors"
	"math"
	"math/big"
	"strconv"
	"strings"

	"github.com/cockroachdb/apd/v3"

	"github.com/backstory-dev/backstory/eventlog"
)

// Kind is what a value is.
type Kind uint8

// The kinds. Any stands for what is known at run time only: members of JSON.
const (
	Null Kind = iota
	Any
	Bool
	Int
	Numeric
	Float
	Text
	Time  // with time zone: a moment
	Stamp // a timestamp without time zone
	Date
	List
	Object
	Record // a row, whose columns are known
)

var kindNames = [...]string{"nil", "anything", "a boolean", "an integer", "a numeric", "a float", "text", "a time", "a timestamp without time zone", "a date", "a list", "an object", "a row"}

func (k Kind) String() string { return kindNames[k] }

// bare is String without an article.
func (k Kind) bare() string { return strings.TrimPrefix(strings.TrimPrefix(k.String(), "an "), "a ") }

// isNumber tells whether values of the kind can be calculated with.
func (k Kind) isNumber() bool { return k == Int || k == Numeric || k == Float }

// Type is what is known of a value before there is one.
type Type struct {
	Kind    Kind
	Elem    *Type    // of a List; nil: anything
	Columns []Column // of a Record
	Labels  []string // of an enum, or those that a number is shown by; nil: any text
}

// Column is one column of a Record.
type Column struct {
	Name string
	Type Type
}

func (t Type) elem() Type {
	if t.Elem == nil {
		return Type{Kind: Any}
	}
	return *t.Elem
}

// Value is one value. The zero value is NULL.
type Value struct {
	Kind   Kind
	Int    int64 // also of Bool (0 and 1), Date (days since 1970-01-01), Time and Stamp (microseconds since 1970-01-01 00:00); the extreme ones are ±infinity
	Float  float64
	Text   string
	Num    *apd.Decimal
	List   []Value
	Object []Member
	Record Row
}

// Member is a member of an Object.
type Member struct {
	Name  string
	Value Value
}

// Row gives the columns of a row, by the index that its Type has.
type Row interface {
	// Column gives one; an error ends the expression.
	Column(i int) (Value, error)
}

// Values are a Row that has its values already.
type Values []Value

// Column gives one.
func (v Values) Column(i int) (Value, error) { return v[i], nil }

// BoolOf, IntOf and TextOf make values.
func BoolOf(b bool) Value {
	if b {
		return Value{Kind: Bool, Int: 1}
	}
	return Value{Kind: Bool}
}

// IntOf makes an integer.
func IntOf(n int64) Value { return Value{Kind: Int, Int: n} }

// TextOf makes a text.
func TextOf(s string) Value { return Value{Kind: Text, Text: s} }

// True tells whether a value holds in a boolean place: NULL does not.
func (v *Value) True() bool { return v.Kind == Bool && v.Int != 0 }

// maxDigits bounds a numeric.
const maxDigits = 2000

var (
	exact    = apd.Context{Precision: maxDigits, MaxExponent: maxDigits, MinExponent: -maxDigits, Traps: apd.DefaultTraps | apd.Inexact | apd.Rounded, Rounding: apd.RoundHalfUp}
	quotient = apd.Context{Precision: 34, MaxExponent: maxDigits, MinExponent: -maxDigits, Traps: apd.DefaultTraps, Rounding: apd.RoundHalfUp}
)

var errNumeric = errors.New("not a numeric")

// ParseNumeric reads what Postgres prints for a numeric.
func ParseNumeric(s string) (Value, error) {
	d := new(apd.Decimal)
	switch s {
	case "NaN":
		d.Form = apd.NaN
	case "Infinity":
		d.Form = apd.Infinite
	case "-Infinity":
		d.Form, d.Negative = apd.Infinite, true
	default:
		if len(s) > maxDigits+2 {
			return Value{}, errors.New("a numeric of more than 2000 digits")
		}
		if s == "" || strings.Trim(s, "0123456789.eE+-") != "" {
			return Value{}, errNumeric
		}
		if _, _, err := d.SetString(s); err != nil {
			return Value{}, errNumeric
		}
		if d.Exponent > 0 { // 1e3 is 1000
			if d.Exponent > maxDigits {
				return Value{}, errNumeric
			}
			if _, err := exact.Quantize(d, d, 0); err != nil {
				return Value{}, errNumeric
			}
		}
		if d.Exponent < -maxDigits {
			return Value{}, errNumeric
		}
	}
	return decimal(d), nil
}

func numericText(d *apd.Decimal) string {
	switch {
	case d.Form == apd.Infinite && d.Negative:
		return "-Infinity"
	case d.Form == apd.Infinite:
		return "Infinity"
	case d.Form != apd.Finite:
		return "NaN"
	}
	return d.Text('f')
}

func floatText(f float64) string {
	switch {
	case math.IsInf(f, 1):
		return "Infinity"
	case math.IsInf(f, -1):
		return "-Infinity"
	case math.IsNaN(f):
		return "NaN"
	}
	if math.Abs(f) >= 1<<53 {
		return largeText(f)
	}
	s := strconv.FormatFloat(f, 'g', -1, 64)
	if e := strings.IndexByte(s, 'e'); e >= 0 { // as Postgres prints it: 'e' from 1e+15 on and below 1e-05
		if x, _ := strconv.Atoi(s[e+1:]); x > -5 && x < 15 {
			return strconv.FormatFloat(f, 'f', -1, 64)
		}
		return s
	}
	if a := math.Abs(f); a >= 1e15 {
		return strconv.FormatFloat(f, 'e', -1, 64)
	}
	return s
}

// largeText is floatText of a large one. The shortest text may stand for a number in the middle between two floats there, which reading gives to the even one;
// Postgres prints one more digit then.
func largeText(f float64) string {
	for digits := -1; ; digits++ {
		s := strconv.FormatFloat(f, 'e', digits, 64)
		if digits < 0 {
			digits = len(strings.TrimLeft(s[:strings.IndexByte(s, 'e')], "-")) - 2
			digits = max(digits, 0)
		}
		back, err := strconv.ParseFloat(s, 64)
		if err == nil && back == f && (digits >= 16 || !between(s, f)) {
			return s
		}
	}
}

// between tells whether a decimal lies in the middle between a float and one of its neighbours.
func between(s string, f float64) bool {
	exact, ok := new(big.Rat).SetString(s)
	if !ok {
		return false
	}
	for _, to := range []float64{math.Inf(1), math.Inf(-1)} {
		if next := math.Nextafter(f, to); !math.IsInf(next, 0) {
			sum := new(big.Rat).Add(new(big.Rat).SetFloat64(f), new(big.Rat).SetFloat64(next))
			if exact.Cmp(sum.Mul(sum, big.NewRat(1, 2))) == 0 {
				return true
			}
		}
	}
	return false
}

// String gives what Postgres would print for the value, JSON for a list or an object, and nothing for NULL.
func (v *Value) String() string {
	switch v.Kind {
	case Bool:
		return strconv.FormatBool(v.Int != 0)
	case Int:
		return strconv.FormatInt(v.Int, 10)
	case Numeric:
		return numericText(v.Num)
	case Float:
		return floatText(v.Float)
	case Text:
		return v.Text
	case Date:
		return dateText(v.Int)
	case Stamp:
		return stampText(v.Int, 'T', "")
	case Time:
		return stampText(v.Int, 'T', "Z")
	case List, Object:
		return string(v.AppendJSON(nil))
	}
	return ""
}

// AppendJSON appends the value in the form that the event log has of it: integers and floats are numbers; numeric, NaN and infinities
// are strings.
func (v *Value) AppendJSON(b []byte) []byte {
	switch v.Kind {
	case Bool, Int:
		return append(b, v.String()...)
	case Float:
		if math.IsInf(v.Float, 0) || math.IsNaN(v.Float) {
			return appendQuoted(b, floatText(v.Float))
		}
		return append(b, floatText(v.Float)...)
	case Numeric, Text, Date, Stamp, Time:
		return appendQuoted(b, v.String())
	case List:
		b = append(b, '[')
		for i := range v.List {
			if i > 0 {
				b = append(b, ',')
			}
			b = v.List[i].AppendJSON(b)
		}
		return append(b, ']')
	case Object:
		b = append(b, '{')
		for i := range v.Object {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendQuoted(b, v.Object[i].Name)
			b = v.Object[i].Value.AppendJSON(append(b, ':'))
		}
		return append(b, '}')
	}
	return append(b, "null"...)
}

func appendQuoted(b []byte, s string) []byte { return eventlog.AppendString(b, []byte(s)) }
