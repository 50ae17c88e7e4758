package expr

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"time"
)

// Infinity is the value of infinity in Int, of dates and times; its negative is that of -infinity.
const Infinity = math.MaxInt64

const dayMicros = 24 * 60 * 60 * 1000000

var errTime = errors.New("not a date or time")

// ParseTime reads what Postgres prints for a date, a timestamp or a timestamptz under ISO, the form that the event log has of it, and
// RFC 3339. A Time without a zone is an error.
func ParseTime(kind Kind, s string) (Value, error) {
	v := Value{Kind: kind}
	switch s {
	case "infinity":
		v.Int = Infinity
		return v, nil
	case "-infinity":
		v.Int = -Infinity
		return v, nil
	}
	s, bc := strings.CutSuffix(s, " BC")
	year, rest, ok := number(s, 4, 6)
	if !ok || rest == "" || rest[0] != '-' || year == 0 && !bc {
		return v, errTime
	}
	month, rest, ok := number(rest[1:], 2, 2)
	if !ok || rest == "" || rest[0] != '-' {
		return v, errTime
	}
	day, rest, ok := number(rest[1:], 2, 2)
	if !ok || month < 1 || month > 12 || day < 1 {
		return v, errTime
	}
	if bc {
		year = 1 - year
	}
	d := time.Date(year, time.Month(month), day, 0, 0, 0, 0, time.UTC)
	if d.Day() != day {
		return v, errTime
	}
	days := d.Unix() / (dayMicros / 1000000)
	if kind == Date && rest == "" {
		v.Int = days
		return v, nil
	}
	var micros int64
	if rest != "" && (rest[0] == ' ' || rest[0] == 'T') {
		var h, m, sec int
		if h, rest, ok = number(rest[1:], 2, 2); !ok || rest == "" || rest[0] != ':' || h > 24 {
			return v, errTime
		}
		if m, rest, ok = number(rest[1:], 2, 2); !ok || m > 59 {
			return v, errTime
		}
		if rest != "" && rest[0] == ':' {
			if sec, rest, ok = number(rest[1:], 2, 2); !ok || sec > 59 {
				return v, errTime
			}
		}
		micros = int64(h*3600+m*60+sec) * 1000000
		if rest != "" && rest[0] == '.' {
			n := 1
			for scale := int64(100000); n < len(rest) && rest[n] >= '0' && rest[n] <= '9'; n++ {
				micros += int64(rest[n]-'0') * scale
				scale /= 10
			}
			rest = rest[n:]
		}
	} else if rest != "" || kind != Stamp {
		return v, errTime
	}
	if kind == Time {
		switch {
		case rest == "Z":
		case rest == "":
			return v, errors.New("no zone: write 2026-10-31T00:00:00Z, or +02:00 in the place of Z")
		case rest[0] == '+' || rest[0] == '-':
			h, more, ok := number(rest[1:], 2, 2)
			var m int
			if ok && more != "" {
				m, more, ok = number(strings.TrimPrefix(more, ":"), 2, 2)
			}
			if !ok || more != "" || h > 15 || m > 59 {
				return v, errTime
			}
			off := int64(h*60+m) * 60000000
			if rest[0] == '+' {
				off = -off
			}
			micros += off
		default:
			return v, errTime
		}
	} else if rest != "" || kind == Date {
		return v, errTime
	}
	v.Int = days*dayMicros + micros
	return v, nil
}

// number reads a number of a least and a greatest number of digits.
func number(s string, least, most int) (n int, rest string, ok bool) {
	i := 0
	for i < len(s) && i < most && s[i] >= '0' && s[i] <= '9' {
		n = 10*n + int(s[i]-'0')
		i++
	}
	return n, s[i:], i >= least
}

func dateText(days int64) string {
	switch days {
	case Infinity:
		return "infinity"
	case -Infinity:
		return "-infinity"
	}
	t := time.Unix(days*(dayMicros/1000000), 0).UTC()
	y, era := t.Year(), ""
	if y <= 0 {
		y, era = 1-y, " BC"
	}
	return fmt.Sprintf("%04d-%02d-%02d%s", y, t.Month(), t.Day(), era)
}

// stampText gives the stored form of a timestamp: with T and Z in years of four digits of our era, otherwise as Postgres prints it.
func stampText(micros int64, sep byte, zone string) string {
	switch micros {
	case Infinity:
		return "infinity"
	case -Infinity:
		return "-infinity"
	}
	t := time.UnixMicro(micros).UTC()
	y, era := t.Year(), ""
	if y <= 0 {
		y, era = 1-y, " BC"
	}
	if y > 9999 || era != "" {
		if sep = ' '; zone != "" {
			zone = "+00"
		}
	}
	s := fmt.Sprintf("%04d-%02d-%02d%c%02d:%02d:%02d", y, t.Month(), t.Day(), sep, t.Hour(), t.Minute(), t.Second())
	if us := t.Nanosecond() / 1000; us != 0 {
		s += strings.TrimRight(fmt.Sprintf(".%06d", us), "0")
	}
	return s + zone + era
}
