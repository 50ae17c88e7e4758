package rebuild

import (
	"bytes"

	"github.com/backstory-dev/backstory/eventlog"
)

// text gives what Postgres prints for a value, in scratch memory if need be; null tells SQL NULL, which stands for what is not
// known too.
func (v *Value) text(scratch []byte) (text, keep []byte, null bool, err error) {
	j := v.JSON
	if j == nil {
		return nil, scratch, true, nil
	}
	if !v.Type.Array && len(j) > 0 {
		switch c := j[0]; {
		case c == '"' && v.Type.Kind == eventlog.KindText && bytes.IndexByte(j, '\\') < 0:
			return j[1 : len(j)-1], scratch, false, nil
		case v.Type.Kind == eventlog.KindInt && (c == '-' || '0' <= c && c <= '9'):
			return j, scratch, false, nil
		}
	}
	scratch, null, err = eventlog.AppendText(scratch[:0], v.Type, j)
	return scratch, scratch, null, err
}

// copyEncoder makes rows in COPY's text format (PostgreSQL manual, COPY, Text Format).
type copyEncoder struct{ scratch []byte }

func (e *copyEncoder) AppendRow(dst []byte, r *Row) ([]byte, error) {
	for i := range r.Values {
		if i > 0 {
			dst = append(dst, '\t')
		}
		var text []byte
		var null bool
		var err error
		if text, e.scratch, null, err = r.Values[i].text(e.scratch); err != nil {
			return dst, err
		}
		if null {
			dst = append(dst, '\\', 'N')
		} else {
			dst = appendCopyText(dst, text)
		}
	}
	return append(dst, '\n'), nil
}

// copyEscapes are the letters by which COPY's text format writes what it cannot hold as it is.
var copyEscapes = [256]byte{'\\': '\\', '\t': 't', '\n': 'n', '\r': 'r', '\b': 'b', '\f': 'f', '\v': 'v'}

func appendCopyText(dst, text []byte) []byte {
	from := 0
	for i, c := range text {
		if e := copyEscapes[c]; e != 0 {
			dst = append(append(dst, text[from:i]...), '\\', e)
			from = i + 1
		}
	}
	return append(dst, text[from:]...)
}

// csvEncoder makes lines as COPY … (FORMAT csv) does.
type csvEncoder struct{ scratch []byte }

func (e *csvEncoder) AppendRow(dst []byte, r *Row) ([]byte, error) {
	for i := range r.Values {
		if i > 0 {
			dst = append(dst, ',')
		}
		var text []byte
		var null bool
		var err error
		if text, e.scratch, null, err = r.Values[i].text(e.scratch); err != nil {
			return dst, err
		}
		if !null {
			dst = appendCSV(dst, text, len(r.Values) == 1)
		}
	}
	return append(dst, '\n'), nil
}

// appendCSV appends a field that is not NULL; alone tells that it is the only one of its line.
func appendCSV(dst, text []byte, alone bool) []byte {
	if len(text) > 0 && !bytes.ContainsAny(text, ",\"\r\n") && !(alone && string(text) == `\.`) {
		return append(dst, text...)
	}
	dst = append(dst, '"')
	for {
		i := bytes.IndexByte(text, '"')
		if i < 0 {
			return append(append(dst, text...), '"')
		}
		dst = append(append(dst, text[:i]...), '"', '"')
		text = text[i+1:]
	}
}

// jsonEncoder makes one JSON object per line, in the form of the log. What is not known is left out.
type jsonEncoder struct{ names [][]byte }

func newJSONEncoder(t *Table) *jsonEncoder {
	e := &jsonEncoder{}
	for _, c := range t.Columns {
		e.names = append(e.names, append(eventlog.AppendString(nil, []byte(c.Name)), ':'))
	}
	return e
}

func (e *jsonEncoder) AppendRow(dst []byte, r *Row) ([]byte, error) {
	dst = append(dst, '{')
	first := true
	for i := range r.Values {
		v := &r.Values[i]
		if v.JSON == nil {
			continue
		}
		if !first {
			dst = append(dst, ',')
		}
		first = false
		dst = append(dst, e.names[i]...)
		n := len(dst)
		dst = append(dst, v.JSON...)
		if v.Type.Kind == eventlog.KindJSON {
			// The text of a json column is kept as it was, line breaks between its tokens included.
			for k := n; k < len(dst); k++ {
				if dst[k] == '\n' || dst[k] == '\r' {
					dst[k] = ' '
				}
			}
		}
	}
	return append(dst, '}', '\n'), nil
}
