package eventlog

import (
	"strings"
	"testing"
)

func TestNamesInQuotes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{ // parts and what comes after them, between bars; "": it is no such name
		`"Łódź".orders/100`:        `Łódź|orders|/100`,
		`"Łódź"."Orders"`:          `Łódź|Orders|`,
		`public."Orders"/a/b`:      `public|Orders|/a/b`,
		`"a.b"."c/d"/1`:            `a.b|c/d|/1`,
		`"say ""hi"""/"x"`:         `say "hi"|/"x"`,
		`""""`:                     `"|`,
		`orders/"17"`:              ``,
		`public.orders`:            ``,
		`"orders`:                  ``,
		`"orders"x/1`:              ``,
		`or"ders"`:                 ``,
		`""/1`:                     ``,
		`"a"./1`:                   ``,
		`."a"`:                     ``,
		`"shop"."public"."orders"`: ``,
	} {
		q, rest, ok := parseQuoted(text)
		if got := strings.Join(append(q.parts, rest), "|"); ok != (want != "") || ok && got != want {
			t.Errorf("%s: %s, %v", text, got, ok)
		}
	}
}
