package kafkaserver

import (
	"strings"
	"testing"
)

func TestWhenTestsHaveAKafka(t *testing.T) {
	const runs, skips, fails = "runs", "skips", "fails"
	for _, c := range []struct {
		value         string
		ci, short, no bool // no: neither Java nor Maven
		want          string
	}{
		{want: runs},
		{ci: true, want: runs},
		{ci: true, short: true, want: runs},
		{short: true, want: skips},
		{no: true, want: skips},
		{no: true, ci: true, want: fails},
		{value: "1", want: runs},
		{value: "1", short: true, want: runs},
		{value: "1", no: true, want: fails},
		{value: "0", want: skips},
		{value: "0", ci: true, want: skips},
		{value: "0", no: true, ci: true, want: skips},
		{value: "yes", want: fails},
	} {
		var absent error
		if c.no {
			absent = ErrNoJava
		}
		why, err := rule(c.value, c.ci, c.short, absent)
		got := runs
		switch {
		case err != nil:
			got = fails
		case why != "":
			got = skips
		}
		if got != c.want || got == skips && !strings.Contains(why, Env) {
			t.Errorf("%+v: %s (%s, %v)", c, got, why, err)
		}
	}
}
