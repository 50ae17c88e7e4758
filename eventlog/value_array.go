package eventlog

// maxDim is how many dimensions an array of Postgres can have (MAXDIM).
const maxDim = 6

// quoted marks the bytes for which array_out puts an element in quotes; the delimiter is one more.
var quoted = [256]bool{'"': true, '\\': true, '{': true, '}': true,
	' ': true, '\t': true, '\n': true, '\r': true, '\v': true, '\f': true}

// needsQuotes tells whether array_out prints the element in quotes (PostgreSQL manual, Arrays, "Array Input and Output
// Syntax").
func needsQuotes(elem []byte, delim byte) bool {
	for _, c := range elem {
		if quoted[c] || c == delim {
			return true
		}
	}
	return len(elem) == 0 || isNullWord(elem)
}

// isNullWord tells whether the element unquoted would be read as NULL.
func isNullWord(elem []byte) bool {
	return len(elem) == 4 && elem[0]|' ' == 'n' && elem[1]|' ' == 'u' && elem[2]|' ' == 'l' && elem[3]|' ' == 'l'
}

// delim is the delimiter of the array's elements.
func (t *Type) delim() byte {
	if t.Delim == 0 {
		return ','
	}
	return t.Delim
}

// elementKind is the Kind that decides the form of the array's elements.
func (t *Type) elementKind() Kind {
	if t.Kind == KindJSON {
		return KindText
	}
	return t.Kind
}

// appendArrayJSON is AppendJSON for an array. Only literals exactly as array_out prints them become JSON arrays, so
// that nothing is lost about the others.
func appendArrayJSON(dst []byte, t *Type, text []byte) []byte {
	start := len(dst)
	kind, delim := t.elementKind(), t.delim()
	depth, i := 0, 0
	for i < len(text) {
		// A value starts here.
		if text[i] == '{' {
			if depth++; depth > maxDim {
				break
			}
			dst = append(dst, '[')
			if i++; i >= len(text) || text[i] != '}' {
				continue
			}
		} else if depth == 0 {
			break
		} else {
			var ok bool
			if dst, i, ok = appendElementJSON(dst, kind, delim, text, i); !ok {
				break
			}
		}
		// A value ended here, or an empty array is about to.
		for i < len(text) && text[i] == '}' && depth > 0 {
			dst = append(dst, ']')
			depth--
			i++
		}
		if depth == 0 {
			if i == len(text) {
				return dst
			}
			break
		}
		if i >= len(text) || text[i] != delim {
			break
		}
		dst = append(dst, ',')
		i++
	}
	return AppendString(dst[:start], text)
}

// appendElementJSON appends the JSON form of the element at text[i]; false means that array_out did not print it.
func appendElementJSON(dst []byte, kind Kind, delim byte, text []byte, i int) ([]byte, int, bool) {
	if text[i] != '"' {
		end := i
		for end < len(text) && text[end] != delim && !quoted[text[end]] {
			end++
		}
		elem := text[i:end]
		if isNullWord(elem) {
			return append(dst, "null"...), end, string(elem) == "NULL"
		}
		if len(elem) == 0 {
			return dst, end, false
		}
		return appendScalarJSON(dst, kind, elem), end, true
	}

	i++
	end, escaped, control := i, false, false
	for ; end < len(text) && text[end] != '"'; end++ {
		if text[end] == '\\' {
			escaped = true
			if end++; end >= len(text) || text[end] != '"' && text[end] != '\\' {
				return dst, end, false
			}
		}
		control = control || text[end] < ' '
	}
	if end >= len(text) {
		return dst, end, false
	}
	elem := text[i:end]
	switch {
	case !escaped && !needsQuotes(elem, delim):
		return dst, end, false
	case kind != KindText && kind != KindBytea:
		if escaped {
			return dst, end, false
		}
		return appendScalarJSON(dst, kind, elem), end + 1, true
	case !control:
		return append(dst, text[i-1:end+1]...), end + 1, true // array_out and JSON escape the same two bytes alike
	}
	dst = append(dst, '"')
	for _, c := range elem {
		if c < ' ' {
			dst = appendControl(dst, c)
		} else {
			dst = append(dst, c)
		}
	}
	return append(dst, '"'), end + 1, true
}

// appendArrayText appends the literal for the array at j[i], which is not null.
func appendArrayText(dst []byte, t *Type, j []byte, i int) ([]byte, int, error) {
	if i < len(j) && j[i] == '"' {
		return unquote(dst, j, i)
	}
	if i >= len(j) || j[i] != '[' {
		return dst, i, wanted(i, "an array, a string or null")
	}
	delim := t.delim()
	depth := 0
	for {
		// A value starts here.
		switch {
		case i < len(j) && j[i] == '[':
			if depth++; depth > maxDim {
				return dst, i, wanted(i, "at most 6 dimensions")
			}
			dst = append(dst, '{')
			if i = skipSpace(j, i+1); i >= len(j) || j[i] != ']' {
				continue
			}
		case i < len(j) && j[i] == 'n':
			var err error
			if i, err = skipWord(j, i, "null"); err != nil {
				return dst, i, err
			}
			dst = append(dst, "NULL"...)
		default:
			var err error
			start := len(dst)
			if t.Kind == KindJSON && i < len(j) && j[i] != '"' {
				var end int
				if end, err = skipValue(j, i); err == nil {
					dst, i = append(dst, j[i:end]...), end
				}
			} else {
				dst, i, err = appendScalarText(dst, t.elementKind(), j, i)
			}
			if err != nil {
				return dst, i, err
			}
			if needsQuotes(dst[start:], delim) {
				dst = quoteElement(dst, start)
			}
		}
		// A value ended here, or an empty array is about to.
		i = skipSpace(j, i)
		for i < len(j) && j[i] == ']' {
			dst = append(dst, '}')
			i++
			if depth--; depth == 0 {
				return dst, i, nil
			}
			i = skipSpace(j, i)
		}
		if i >= len(j) || j[i] != ',' {
			return dst, i, wanted(i, "a comma or ]")
		}
		dst = append(dst, delim)
		i = skipSpace(j, i+1)
	}
}

// quoteElement puts the element b[start:] in quotes, in place.
func quoteElement(b []byte, start int) []byte {
	n := len(b)
	extra := 2
	for _, c := range b[start:] {
		if c == '"' || c == '\\' {
			extra++
		}
	}
	for range extra {
		b = append(b, '"')
	}
	to := len(b) - 1 // holds the closing quote
	for from := n - 1; from >= start; from-- {
		to--
		b[to] = b[from]
		if c := b[from]; c == '"' || c == '\\' {
			to--
			b[to] = '\\'
		}
	}
	b[start] = '"'
	return b
}
