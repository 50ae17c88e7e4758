package eventlog

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"unicode/utf16"
	"unicode/utf8"
)

// AppendString appends s as a JSON string. Only what JSON demands is escaped: the quote, the backslash and bytes below
// 0x20. All else is copied, invalid UTF-8 too, since a source in UTF8 cannot send any and a replacement would be an
// alteration.
func AppendString(dst, s []byte) []byte {
	if !plain(s) {
		return appendEscaped(dst, s)
	}
	dst = append(dst, '"')
	dst = append(dst, s...)
	return append(dst, '"')
}

// appendEscaped is AppendString where something needs an escape.
func appendEscaped(dst, s []byte) []byte {
	dst = append(dst, '"')
	for {
		n := special(s, 0)
		dst = append(dst, s[:n]...)
		if n == len(s) {
			return append(dst, '"')
		}
		if c := s[n]; c < ' ' {
			dst = appendControl(dst, c)
		} else {
			dst = append(dst, '\\', c)
		}
		s = s[n+1:]
	}
}

// appendControl appends the escape for a byte below 0x20.
func appendControl(dst []byte, c byte) []byte {
	switch c {
	case '\b':
		return append(dst, '\\', 'b')
	case '\f':
		return append(dst, '\\', 'f')
	case '\n':
		return append(dst, '\\', 'n')
	case '\r':
		return append(dst, '\\', 'r')
	case '\t':
		return append(dst, '\\', 't')
	}
	const hex = "0123456789abcdef"
	return append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
}

// specials marks the bytes of w (the first one lowest) that a JSON string cannot hold as they are: quote, backslash and
// those below 0x20. The lowest mark is right; there may be wrong ones above it, but none if there is no right one.
func specials(w uint64) uint64 {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	// A byte c is a control or the quote, 0x22, exactly if c^2 < 0x21. Each subtraction borrows from a byte's highest
	// bit where it is smaller; bytes that had that bit set, beyond ASCII, do not count.
	return ((w ^ ones*2 - ones*0x21) | (w ^ ones*'\\' - ones)) &^ w & highs
}

// special gives the index of the first such byte in s at or after i, or len(s).
func special(s []byte, i int) int {
	for ; i+8 <= len(s); i += 8 {
		if m := specials(binary.LittleEndian.Uint64(s[i:])); m != 0 {
			return i + bits.TrailingZeros64(m)/8
		}
	}
	for ; i < len(s); i++ {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' {
			break
		}
	}
	return i
}

// plain tells whether s has no such byte. It looks at some bytes twice rather than at each by itself.
func plain(s []byte) bool {
	if len(s) >= 8 {
		last := specials(binary.LittleEndian.Uint64(s[len(s)-8:]))
		for len(s) > 16 {
			if specials(binary.LittleEndian.Uint64(s))|specials(binary.LittleEndian.Uint64(s[8:])) != 0 {
				return false
			}
			s = s[16:]
		}
		return last == 0 && (len(s) <= 8 || specials(binary.LittleEndian.Uint64(s)) == 0)
	}
	if len(s) >= 4 {
		first, last := binary.LittleEndian.Uint32(s), binary.LittleEndian.Uint32(s[len(s)-4:])
		return specials(uint64(first)|uint64(last)<<32) == 0
	}
	return special(s, 0) == len(s)
}

// EachMember calls f for the top-level members of a JSON object, in their order. The name has its escapes undone; the
// value is a fragment of obj without white space around it. Both are valid as long as obj. Members before a fault have
// been passed to f when the fault is reported; an error of f ends the walk and is returned as it is. The JSON of nested
// values is checked too, but duplicate names are not, nor what their strings stand for.
func EachMember(obj []byte, f func(name, value []byte) error) error {
	i := skipSpace(obj, 0)
	if i >= len(obj) || obj[i] != '{' {
		return objectError(wanted(i, "an object"))
	}
	if i = skipSpace(obj, i+1); i < len(obj) && obj[i] == '}' {
		i++
	} else {
		for {
			name, at, err := member(obj, i)
			if err != nil {
				return objectError(err)
			}
			if i, err = skipValue(obj, at); err != nil {
				return objectError(err)
			}
			if err := f(name, obj[at:i:i]); err != nil {
				return err
			}
			i = skipSpace(obj, i)
			if i >= len(obj) || obj[i] != ',' && obj[i] != '}' {
				return objectError(wanted(i, "a comma or }"))
			}
			if obj[i] == '}' {
				i++
				break
			}
			i = skipSpace(obj, i+1)
		}
	}
	if i = skipSpace(obj, i); i < len(obj) {
		return objectError(wanted(i, "the end of the object"))
	}
	return nil
}

func objectError(err error) error { return fmt.Errorf("decode object: %w", err) }

// wanted is the error for JSON that is not what is wanted at byte at. It never holds any of the JSON, which is data.
func wanted(at int, what string) error { return fmt.Errorf("want %s at byte %d", what, at) }

// member reads the name and the colon of the member at j[i], and gives the index of its value.
func member(j []byte, i int) (name []byte, at int, err error) {
	if i >= len(j) || j[i] != '"' {
		return nil, i, wanted(i, "a member's name")
	}
	if at = special(j, i+1); at < len(j) && j[at] == '"' {
		name = j[i+1 : at : at]
		at++
	} else if name, at, err = unquote(nil, j, i); err != nil {
		return nil, at, err
	}
	if at = skipSpace(j, at); at >= len(j) || j[at] != ':' {
		return nil, at, wanted(at, "a colon")
	}
	return name, skipSpace(j, at+1), nil
}

// onlyMember gives the name of the only member of the object that starts at obj[i] and ends with obj, and where its
// value starts. The object has been checked.
func onlyMember(obj []byte, i int) (name []byte, at int, only bool) {
	name, at, err := member(obj, skipSpace(obj, i+1))
	if err != nil {
		return nil, 0, false // a name that Postgres cannot hold is no wrapper's
	}
	end, err := skipValue(obj, at)
	return name, at, err == nil && skipSpace(obj, end) == len(obj)-1
}

// skipValue checks the JSON value at j[i] and gives the index after it.
func skipValue(j []byte, i int) (int, error) {
	if i < len(j) && (j[i] == '{' || j[i] == '[') {
		return skipNested(j, i)
	}
	return skipScalar(j, i)
}

// skipScalar is skipValue for all but objects and arrays.
func skipScalar(j []byte, i int) (int, error) {
	if i < len(j) {
		switch j[i] {
		case '"':
			return skipString(j, i)
		case 't':
			return skipWord(j, i, "true")
		case 'f':
			return skipWord(j, i, "false")
		case 'n':
			return skipWord(j, i, "null")
		}
		if end := numberEnd(j, i); end >= 0 {
			return end, nil
		}
	}
	return i, wanted(i, "a value")
}

// skipNested is skipValue for an object or array. It does not recurse, as the depth is up to whoever wrote j.
func skipNested(j []byte, i int) (int, error) {
	var (
		depth   int
		objects uint64   // bit n tells whether the nth level from the innermost is an object
		deep    []uint64 // objects as it was at each 64th level
		err     error
	)
	for {
		// A value starts here. first: what follows is the first in its container.
		first := i < len(j) && (j[i] == '{' || j[i] == '[')
		if first {
			if depth > 0 && depth%64 == 0 {
				deep = append(deep, objects)
			}
			depth++
			objects <<= 1
			if j[i] == '{' {
				objects |= 1
			}
			i++
		} else if i, err = skipScalar(j, i); err != nil {
			return i, err
		}
		// Containers end here.
		i = skipSpace(j, i)
		for i < len(j) && j[i] == closers[objects&1] {
			i++
			first = false
			depth--
			objects >>= 1
			if depth == 0 {
				return i, nil
			}
			if depth%64 == 0 {
				objects = deep[len(deep)-1]
				deep = deep[:len(deep)-1]
			}
			i = skipSpace(j, i)
		}
		// Another value is due.
		if !first {
			if i >= len(j) || j[i] != ',' {
				return i, wanted(i, separators[objects&1])
			}
			i = skipSpace(j, i+1)
		}
		if objects&1 == 1 {
			if i >= len(j) || j[i] != '"' {
				return i, wanted(i, "a member's name")
			}
			if i, err = skipString(j, i); err != nil {
				return i, err
			}
			if i = skipSpace(j, i); i >= len(j) || j[i] != ':' {
				return i, wanted(i, "a colon")
			}
			i = skipSpace(j, i+1)
		}
	}
}

// Of arrays and objects: what ends them, and what is wanted after a value in them.
var (
	closers    = [2]byte{']', '}'}
	separators = [2]string{"a comma or ]", "a comma or }"}
)

// skipString checks the JSON string at j[i], a quote, and gives the index after it.
func skipString(j []byte, i int) (int, error) {
	i++
	for {
		i = special(j, i)
		if i >= len(j) {
			return i, wanted(i, "the end of a string")
		}
		switch j[i] {
		case '"':
			return i + 1, nil
		case '\\':
			n := escapeLen(j, i)
			if n == 0 {
				return i, wanted(i, "an escape of JSON")
			}
			i += n
		default:
			return i, wanted(i, "an escape, not a control character")
		}
	}
}

// escapeLen tells how long the escape at j[i], a backslash, is; zero means that it is none.
func escapeLen(j []byte, i int) int {
	if i+1 < len(j) {
		switch j[i+1] {
		case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
			return 2
		case 'u':
			if _, ok := hex4(j, i+2); ok {
				return 6
			}
		}
	}
	return 0
}

// hex4 reads four hexadecimal digits at j[i].
func hex4(j []byte, i int) (r rune, ok bool) {
	if i+4 > len(j) {
		return 0, false
	}
	for _, c := range j[i : i+4] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c|' ' && c|' ' <= 'f':
			c = c | ' ' - 'a' + 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// unquote appends what the JSON string at j[i], a quote, stands for, and gives the index after it.
func unquote(dst, j []byte, i int) ([]byte, int, error) {
	i++
	for {
		n := special(j, i)
		dst = append(dst, j[i:n]...)
		i = n
		if i < len(j) && j[i] == '"' {
			return dst, i + 1, nil
		}
		if i >= len(j) || j[i] != '\\' || escapeLen(j, i) == 0 {
			_, err := skipString(j, i-1)
			return dst, i, err
		}
		switch c := j[i+1]; c {
		case 'b':
			dst = append(dst, '\b')
		case 'f':
			dst = append(dst, '\f')
		case 'n':
			dst = append(dst, '\n')
		case 'r':
			dst = append(dst, '\r')
		case 't':
			dst = append(dst, '\t')
		case 'u':
			r, _ := hex4(j, i+2)
			i += 4
			if utf16.IsSurrogate(r) {
				low, ok := rune(0), i+3 < len(j) && j[i+2] == '\\' && j[i+3] == 'u'
				if ok {
					low, ok = hex4(j, i+4)
				}
				if r = utf16.DecodeRune(r, low); !ok || r == utf8.RuneError {
					return dst, i, wanted(i-4, "a whole surrogate pair")
				}
				i += 6
			}
			if r == 0 {
				return dst, i, wanted(i-4, "a character other than NUL")
			}
			dst = utf8.AppendRune(dst, r)
		default:
			dst = append(dst, c)
		}
		i += 2
	}
}

// skipWord checks the literal word at j[i] and gives the index after it.
func skipWord(j []byte, i int, word string) (int, error) {
	if len(j)-i < len(word) || string(j[i:i+len(word)]) != word {
		return i, wanted(i, word)
	}
	return i + len(word), nil
}

// skipSpace gives the index of the first byte in j at or after i that is not JSON white space.
func skipSpace(j []byte, i int) int {
	for i < len(j) && isSpace(j[i]) {
		i++
	}
	return i
}

// isSpace tells whether c is white space to JSON.
func isSpace(c byte) bool { return c <= ' ' && (c == ' ' || c == '\n' || c == '\t' || c == '\r') }

func isDigit(c byte) bool { return c-'0' <= 9 }

// isInteger tells whether b is a JSON number without fraction and exponent.
func isInteger(b []byte) bool {
	digits := b
	if len(b) > 0 && b[0] == '-' {
		digits = b[1:]
	}
	for _, c := range digits {
		if !isDigit(c) {
			return false
		}
	}
	return len(digits) == 1 || len(digits) > 1 && digits[0] != '0'
}

// numberEnd gives the index after the JSON number at j[i], or -1 if there is none.
func numberEnd(j []byte, i int) int {
	if i < len(j) && j[i] == '-' {
		i++
	}
	whole := i
	if i = skipDigits(j, i); i == whole || j[whole] == '0' && i > whole+1 {
		return -1
	}
	if i < len(j) && j[i] == '.' {
		fraction := i + 1
		if i = skipDigits(j, fraction); i == fraction {
			return -1
		}
	}
	if i < len(j) && j[i]|' ' == 'e' {
		exponent := i + 1
		if exponent < len(j) && (j[exponent] == '+' || j[exponent] == '-') {
			exponent++
		}
		if i = skipDigits(j, exponent); i == exponent {
			return -1
		}
	}
	return i
}

func skipDigits(j []byte, i int) int {
	for i < len(j) && isDigit(j[i]) {
		i++
	}
	return i
}
