package eventlog

import "fmt"

// AppendJSON appends to dst the JSON form of text, which is what Postgres prints under SessionSettings for a value of
// type t. SQL NULL is not a text; its JSON form is null, and the caller writes it. AppendJSON allocates nothing but
// room in dst. AppendText is its inverse.
//
// # Stored form of values, format 1
//
// The law: for every text that Postgres prints, AppendText gives back the same bytes. By Kind of the type:
//
//   - KindInt: a JSON number.
//   - KindFloat: the printed text as a JSON number where it is one (1e+20, -0, 0.1), otherwise (NaN, Infinity,
//     -Infinity) a string. The digits are Postgres's own.
//   - KindBool: true or false.
//   - KindTimestamp: 2026-11-23 08:07:00.123 becomes "2026-11-23T08:07:00.123". Text of another shape (a year beyond
//     9999, BC, infinity) is a string as Postgres prints it.
//   - KindTimestampTZ: 2026-11-23 08:07:00.1+00 becomes "2026-11-23T08:07:00.1Z". Text of another shape, or not in
//     UTC, is a string as Postgres prints it, which never has a T in that place.
//   - KindBytea: a string of hexadecimal digits as Postgres prints it, "\\x0102".
//   - KindJSON: the text itself, nested, with its white space, number forms and duplicate keys. Two wrappers, each an
//     object of one member, keep apart what would otherwise be lost:
//     text with white space before or after it is the string in {"$json_text":" [1]\n"};
//     otherwise null (SQL NULL is the bare one) and an object whose first member's name begins with $ are the value in
//     {"$json":null} and {"$json":{"$ref":"#/a"}}.
//     An object that is not exactly one of these two wrappers stands for itself.
//   - KindText, and so every other type: a string.
//
// Where the text of a number or boolean is not of the shape expected, it is a string, too. A KindJSON text is trusted
// to be JSON.
//
// An array is a JSON array, nested by dimension: elements in the form of their Kind, NULL elements null, the empty
// array []. Elements of json and jsonb are strings that hold their text, so that dimension and value cannot be taken
// for one another. A literal with explicit bounds, [2:3]={1,2}, is a string that holds the literal; so is any literal
// that array_out would not have printed.
//
// The form survives a consumer that parses and re-prints it, except for what such a consumer does to the digits of
// numbers and to the inside of nested json.
func AppendJSON(dst []byte, t *Type, text []byte) []byte {
	switch {
	case t.Array:
		return appendArrayJSON(dst, t, text)
	case t.Kind == KindText:
		return AppendString(dst, text)
	case t.Kind == KindJSON:
		return appendDocumentJSON(dst, text)
	}
	return appendScalarJSON(dst, t.Kind, text)
}

// appendScalarJSON is AppendJSON for what is neither an array nor a json document of its own.
func appendScalarJSON(dst []byte, kind Kind, text []byte) []byte {
	switch kind {
	case KindInt:
		if isInteger(text) {
			return append(dst, text...)
		}
	case KindFloat:
		if len(text) > 0 && numberEnd(text, 0) == len(text) {
			return append(dst, text...)
		}
	case KindBool:
		if len(text) == 1 {
			switch text[0] {
			case 't':
				return append(dst, "true"...)
			case 'f':
				return append(dst, "false"...)
			}
		}
	case KindTimestamp:
		if n := len(text); stampEnd(text, ' ') == n && n > 0 {
			dst = append(append(dst, '"'), text...)
			dst[len(dst)-n+stampSep] = 'T'
			return append(dst, '"')
		}
	case KindTimestampTZ:
		if n := stampEnd(text, ' '); n > 0 && string(text[n:]) == "+00" {
			dst = append(append(dst, '"'), text[:n]...)
			dst[len(dst)-n+stampSep] = 'T'
			return append(dst, 'Z', '"')
		}
	}
	return AppendString(dst, text)
}

// appendDocumentJSON is AppendJSON for one value of type json or jsonb.
func appendDocumentJSON(dst, text []byte) []byte {
	if len(text) == 0 || isSpace(text[0]) || isSpace(text[len(text)-1]) {
		dst = append(dst, `{"$json_text":`...)
		dst = AppendString(dst, text)
		return append(dst, '}')
	}
	if string(text) == "null" || text[0] == '{' && startsReserved(text) {
		dst = append(dst, `{"$json":`...)
		dst = append(dst, text...)
		return append(dst, '}')
	}
	return append(dst, text...)
}

// startsReserved tells whether the name of an object's first member begins with $.
func startsReserved(obj []byte) bool {
	i := skipSpace(obj, 1)
	if i >= len(obj) || obj[i] != '"' {
		return false
	}
	name := obj[i+1:]
	return len(name) > 0 && name[0] == '$' || len(name) >= 6 && string(name[:6]) == `\u0024`
}

// AppendText appends to dst the text that Postgres prints under SessionSettings for the value of type t whose JSON form
// is j; null tells SQL NULL, for which nothing is appended.
//
// It takes every form that AppendJSON gives, and what a person or another program would write for it: white space,
// escapes, a number or boolean for a KindText value, a string for any value (its content is then the text, as Postgres
// would read it), any JSON for an element of an array of json except an array. It does not know what else a type
// demands: the text may still be refused by Postgres. Malformed JSON, the wrong kind of JSON, and strings that Postgres
// cannot hold (NUL, half a surrogate pair) are errors, which name the type but never the value; dst is then returned
// as it came.
func AppendText(dst []byte, t *Type, j []byte) (out []byte, null bool, err error) {
	if n := len(j); !t.Array && n > 0 { // the two commonest need no more than this
		if t.Kind == KindText && n > 1 && j[0] == '"' && j[n-1] == '"' && plain(j[1:n-1]) {
			return append(dst, j[1:n-1]...), false, nil
		}
		if t.Kind == KindInt && isInteger(j) {
			return append(dst, j...), false, nil
		}
	}
	i := skipSpace(j, 0)
	end := i
	switch {
	case i < len(j) && j[i] == 'n':
		null = true
		out = dst
		end, err = skipWord(j, i, "null")
	case t.Array:
		out, end, err = appendArrayText(dst, t, j, i)
	case t.Kind == KindJSON:
		out, end, err = appendDocumentText(dst, j, i)
	default:
		out, end, err = appendScalarText(dst, t.Kind, j, i)
	}
	if err == nil && end < len(j) {
		if end = skipSpace(j, end); end < len(j) {
			err = wanted(end, "the end of the value")
		}
	}
	if err != nil {
		return dst, false, fmt.Errorf("decode value of type %s: %w", t.name(), err)
	}
	return out, null, nil
}

// name is for errors.
func (t *Type) name() string {
	if t.Name == "" {
		return fmt.Sprintf("with oid %d", t.OID)
	}
	return t.Name
}

// appendScalarText appends the text of the value at j[i], which is not null, and tells where the value ends.
func appendScalarText(dst []byte, kind Kind, j []byte, i int) ([]byte, int, error) {
	if i >= len(j) {
		return dst, i, wanted(i, wants[kind])
	}
	switch c := j[i]; {
	case c == '"':
		start := len(dst)
		dst, end, err := unquote(dst, j, i)
		if err == nil && (kind == KindTimestamp || kind == KindTimestampTZ) {
			dst = printedStamp(dst, start, kind)
		}
		return dst, end, err
	case c == '-' || '0' <= c && c <= '9':
		end := numberEnd(j, i)
		if end < 0 {
			return dst, i, wanted(i, "a JSON number")
		}
		if kind == KindFloat || kind == KindText || kind == KindInt && isInteger(j[i:end]) {
			return append(dst, j[i:end]...), end, nil
		}
	case c == 't' && (kind == KindBool || kind == KindText):
		end, err := skipWord(j, i, "true")
		if kind == KindBool {
			return append(dst, 't'), end, err
		}
		return append(dst, "true"...), end, err
	case c == 'f' && (kind == KindBool || kind == KindText):
		end, err := skipWord(j, i, "false")
		if kind == KindBool {
			return append(dst, 'f'), end, err
		}
		return append(dst, "false"...), end, err
	}
	return dst, i, wanted(i, wants[kind])
}

// wants says what a scalar's JSON form has to be.
var wants = [...]string{
	KindText:        "a string or null",
	KindInt:         "an integer, a string or null",
	KindFloat:       "a number, a string or null",
	KindBool:        "true, false, a string or null",
	KindJSON:        "a JSON value",
	KindTimestamp:   "a string or null",
	KindTimestampTZ: "a string or null",
	KindBytea:       "a string or null",
}

// appendDocumentText appends the text of the json or jsonb value at j[i], which is not null.
func appendDocumentText(dst, j []byte, i int) ([]byte, int, error) {
	end, err := skipValue(j, i)
	if err != nil {
		return dst, i, err
	}
	if j[i] == '{' && startsReserved(j[i:end]) {
		if name, at, only := onlyMember(j[:end], i); only {
			switch {
			case string(name) == "$json":
				last, err := skipValue(j, at)
				return append(dst, j[at:last]...), end, err
			case string(name) == "$json_text" && j[at] == '"':
				dst, _, err = unquote(dst, j, at)
				return dst, end, err
			}
		}
	}
	return append(dst, j[i:end]...), end, nil
}

// stampSep is where the date ends in a timestamp.
const stampSep = len("2026-11-23")

// stampEnd tells how long the timestamp of the common shape is that b begins with: YYYY-MM-DD, sep, HH:MM:SS, and
// perhaps a fraction. Zero means that b does not begin with one.
func stampEnd(b []byte, sep byte) int {
	const short = len("2026-11-23 08:07:00")
	if len(b) < short {
		return 0
	}
	s := b[:short]
	if s[4] != '-' || s[7] != '-' || s[10] != sep || s[13] != ':' || s[16] != ':' ||
		!(isDigit(s[0]) && isDigit(s[1]) && isDigit(s[2]) && isDigit(s[3]) && isDigit(s[5]) && isDigit(s[6]) &&
			isDigit(s[8]) && isDigit(s[9]) && isDigit(s[11]) && isDigit(s[12]) && isDigit(s[14]) && isDigit(s[15]) &&
			isDigit(s[17]) && isDigit(s[18])) {
		return 0
	}
	if len(b) == short || b[short] != '.' {
		return short
	}
	n := short + 1
	for n < len(b) && isDigit(b[n]) {
		n++
	}
	if n == short+1 {
		return 0
	}
	return n
}

// printedStamp turns the stored form of a timestamp at b[start:] into the printed one.
func printedStamp(b []byte, start int, kind Kind) []byte {
	n := stampEnd(b[start:], 'T')
	if n == 0 {
		return b
	}
	rest := b[start+n:]
	if kind == KindTimestamp && len(rest) == 0 {
		b[start+stampSep] = ' '
	} else if kind == KindTimestampTZ && len(rest) == 1 && rest[0] == 'Z' {
		b[start+stampSep] = ' '
		b = append(b[:start+n], "+00"...)
	}
	return b
}
