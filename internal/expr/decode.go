package expr

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/backstory-dev/backstory/eventlog"
)

// TypeOf gives the type in expressions of a column's type. What has no kind of its own (uuid, inet, ranges …) is text, as Postgres
// prints it.
func TypeOf(t *eventlog.Type) Type {
	if t.Array {
		e := Type{Kind: kindOf(t.Kind, strings.TrimSuffix(t.Name, "[]"))}
		return Type{Kind: List, Elem: &e}
	}
	return Type{Kind: kindOf(t.Kind, t.Name)}
}

func kindOf(k eventlog.Kind, name string) Kind {
	switch k {
	case eventlog.KindBool:
		return Bool
	case eventlog.KindInt:
		return Int
	case eventlog.KindFloat:
		return Float
	case eventlog.KindJSON:
		return Any
	case eventlog.KindTimestamp:
		return Stamp
	case eventlog.KindTimestampTZ:
		return Time
	}
	switch name, _, _ = strings.Cut(name, "("); name {
	case "numeric":
		return Numeric
	case "date":
		return Date
	}
	return Text
}

// FromJSON reads the stored form of a value of a type (eventlog.AppendJSON).
func FromJSON(t *eventlog.Type, j []byte) (Value, error) {
	if t.Array {
		return arrayFromJSON(t, j)
	}
	text, null, err := eventlog.AppendText(nil, t, j)
	if null || err != nil {
		return Value{}, err
	}
	return FromText(t, text)
}

// FromText reads what Postgres prints for a value of a type.
func FromText(t *eventlog.Type, text []byte) (Value, error) {
	if t.Array {
		return arrayFromJSON(t, eventlog.AppendJSON(nil, t, text))
	}
	return scalar(TypeOf(t).Kind, string(text))
}

func scalar(k Kind, s string) (v Value, err error) {
	switch k {
	case Bool:
		switch s {
		case "t", "true":
			return BoolOf(true), nil
		case "f", "false":
			return BoolOf(false), nil
		}
		err = errors.New("not a boolean")
	case Int:
		v.Kind = Int
		v.Int, err = strconv.ParseInt(s, 10, 64)
	case Float:
		v.Kind = Float
		if v.Float, err = strconv.ParseFloat(s, 64); errors.Is(err, strconv.ErrRange) {
			err = nil
		}
	case Numeric:
		return ParseNumeric(s)
	case Time, Stamp, Date:
		return ParseTime(k, s)
	case Any:
		return ParseJSON([]byte(s))
	default:
		v = TextOf(s)
	}
	return v, err
}

func arrayFromJSON(t *eventlog.Type, j []byte) (Value, error) {
	elem := TypeOf(t).Elem.Kind
	var raw any
	d := json.NewDecoder(bytes.NewReader(j))
	d.UseNumber()
	if err := d.Decode(&raw); err != nil {
		return Value{}, err
	}
	var list func(raw any, depth int) (Value, error)
	list = func(raw any, depth int) (Value, error) {
		switch r := raw.(type) {
		case nil:
			return Value{}, nil
		case []any:
			if depth > 6 {
				return Value{}, errors.New("an array of more than 6 dimensions")
			}
			v := Value{Kind: List, List: make([]Value, len(r))}
			for i := range r {
				var err error
				if v.List[i], err = list(r[i], depth+1); err != nil {
					return Value{}, err
				}
			}
			return v, nil
		case string:
			if depth == 0 { // with bounds of its own: as it is
				return TextOf(r), nil
			}
			return scalar(elem, r)
		case json.Number:
			return scalar(elem, r.String())
		case bool:
			return BoolOf(r), nil
		}
		return Value{}, errors.New("not an array")
	}
	return list(raw, 0)
}

// maxDepth bounds nested JSON.
const maxDepth = 200

// ParseJSON reads JSON. Numbers are integers where they are written as ones of 64 bits, otherwise numeric.
func ParseJSON(j []byte) (Value, error) {
	d := json.NewDecoder(bytes.NewReader(j))
	d.UseNumber()
	v, err := document(d, 0)
	if err != nil {
		return Value{}, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Value{}, errors.New("more than one JSON value")
	}
	return v, nil
}

func document(d *json.Decoder, depth int) (Value, error) {
	if depth > maxDepth {
		return Value{}, fmt.Errorf("JSON that is nested more than %d deep", maxDepth)
	}
	tok, err := d.Token()
	if err != nil {
		return Value{}, err
	}
	switch t := tok.(type) {
	case bool:
		return BoolOf(t), nil
	case string:
		return TextOf(t), nil
	case json.Number:
		if n, err := strconv.ParseInt(t.String(), 10, 64); err == nil {
			return IntOf(n), nil
		}
		return ParseNumeric(t.String())
	case json.Delim:
		v := Value{Kind: List}
		if t == '{' {
			v.Kind = Object
		}
		for d.More() {
			var m Member
			if v.Kind == Object {
				name, err := d.Token()
				if err != nil {
					return Value{}, err
				}
				m.Name = name.(string)
			}
			if m.Value, err = document(d, depth+1); err != nil {
				return Value{}, err
			}
			if v.Kind == Object {
				v.Object = append(v.Object, m)
			} else {
				v.List = append(v.List, m.Value)
			}
		}
		_, err := d.Token()
		return v, err
	}
	return Value{}, nil
}

// Member finds a member of an object; of several with one name the last, as jsonb does.
func (v *Value) Member(name string) Value {
	for i := len(v.Object) - 1; i >= 0; i-- {
		if v.Object[i].Name == name {
			return v.Object[i].Value
		}
	}
	return Value{}
}
