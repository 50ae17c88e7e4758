package eventlog

import (
	"bytes"
	"crypto/md5"
	"encoding/binary"
)

// keyHash gives the number under which a key that is not an integer is indexed: the first 64 bits of its MD5, so that
// backstory.key_hash in SQL gives the same. Different keys may share it, so a look-up compares the text too.
func keyHash(key []byte) int64 {
	h := md5.Sum(key)
	return int64(binary.BigEndian.Uint64(h[:8]))
}

// parseInt reads a canonical decimal integer of at most 64 bits, as Postgres prints it.
func parseInt(b []byte) (int64, bool) {
	i, neg := 0, false
	if len(b) > 1 && b[0] == '-' {
		i, neg = 1, true
	}
	if len(b) == i || len(b)-i > 19 || b[i] == '0' && (len(b)-i > 1 || neg) {
		return 0, false
	}
	var n uint64
	for ; i < len(b); i++ {
		c := b[i] - '0'
		if c > 9 {
			return 0, false
		}
		n = n*10 + uint64(c)
	}
	if neg {
		if n > 1<<63 {
			return 0, false
		}
		return -int64(n), true
	}
	if n > 1<<63-1 {
		return 0, false
	}
	return int64(n), true
}

// appendKey appends a key in the form of an aggregate id: the texts of its columns joined by a comma; commas and
// backslashes inside a text are escaped by a backslash where there are several columns.
func appendKey(dst []byte, cols []int, row []Value) []byte {
	if len(cols) == 1 {
		return append(dst, row[cols[0]].Text...)
	}
	for i, c := range cols {
		if i > 0 {
			dst = append(dst, ',')
		}
		t := row[c].Text
		if bytes.IndexByte(t, ',') < 0 && bytes.IndexByte(t, '\\') < 0 {
			dst = append(dst, t...)
			continue
		}
		for _, b := range t {
			if b == ',' || b == '\\' {
				dst = append(dst, '\\')
			}
			dst = append(dst, b)
		}
	}
	return dst
}

// RowID gives the id under which a row, a JSON object in the form of the log, is filed.
func RowID(r *Relation, object []byte) (string, error) {
	row := make([]Value, len(r.Columns))
	err := EachMember(object, func(name, value []byte) error {
		for _, k := range r.Key {
			if r.Columns[k].Name == string(name) {
				t, null, err := AppendText(nil, &r.Columns[k].Type, value)
				if err != nil {
					return err
				}
				if !null {
					row[k] = Value{StateText, t}
				}
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return string(appendKey(nil, r.Key, row)), nil
}
