package yamlfile

import (
	"fmt"
	"strings"
	"testing"

	"github.com/backstory-dev/backstory/internal/expr"
)

var scope = &expr.Scope{Vars: []expr.Var{{Name: "after", Type: expr.Type{Kind: expr.Record, Columns: []expr.Column{{Name: "status", Type: expr.Type{Kind: expr.Text}}, {Name: "total", Type: expr.Type{Kind: expr.Numeric}}}}}}, Bare: 0, Before: -1, After: -1}

// read takes a file of rules, each with a condition, limit and columns, and gives what it understood.
func read(src string) (string, error) {
	f, root, err := Parse("backstory.yaml", []byte(src))
	if err != nil || root == nil {
		return "", err
	}
	var out []string
	for _, m := range root.Members("the file") {
		m.Value.Fields("a rule", map[string]func(*Node){
			"when": func(n *Node) {
				if e, ok := n.Expression("when"); ok && e.Compile(scope, expr.Condition, nil) != nil {
					out = append(out, m.Name+" when "+e.Text)
				}
			},
			"on":    func(n *Node) { out = append(out, fmt.Sprint(m.Name, " on ", len(n.Texts("on")))) },
			"limit": func(n *Node) { out = append(out, fmt.Sprint(m.Name, " limit ", n.Int("limit", 1, 10))) },
			"quiet": func(n *Node) { out = append(out, fmt.Sprint(m.Name, " quiet ", n.Bool("quiet"))) },
		})
	}
	return strings.Join(out, "; "), f.Problems()
}

func TestWhatIsUnderstood(t *testing.T) {
	for _, c := range []struct{ src, want string }{
		{"# nothing\n", ""},
		{"a: {on: [insert, update], when: 'status == \"x\"'}   # a comment behind a mapping\n", `a on 2; a when status == "x"`},
		{"a:\n  on: update   # of one\n  when: total > 1\n", `a on 1; a when total > 1`},
		{"a:\n  when: true\n", `a when true`},
		{"a:\n  # any(x, # > 1)\n  when: |\n    total > 1 and\n    status == \"x\"\n", "a when total > 1 and\nstatus == \"x\"\n"},
		{"a:\n  when: \"status in ['#1', 'b']\"\n", `a when status in ['#1', 'b']`},
		{"a: {limit: 7, quiet: true}\nb:\n", `a limit 7; a quiet true`},
	} {
		if got, err := read(c.src); err != nil || got != c.want {
			t.Errorf("%q: %q, %v; want %q", c.src, got, err, c.want)
		}
	}
}

func TestWhatIsWrongAndWhere(t *testing.T) {
	for _, c := range []struct{ src, want string }{
		{"a:\n  wehn: true\n", "2:3: a rule has no wehn; did you mean when?"},
		{"a:\n  when: stauts == 'x'\n", "2:9: stauts is not known here; did you mean status?"},
		{"a: {when: 'total > 1 and stauts == 2'}\n", "1:26: stauts is not known here; did you mean status?"},
		{"a:\n  when: |\n    total > 1 and\n      stauts == 2\n", "4:7: stauts is not known here; did you mean status?"},
		{"a:\n  when: !after.total\n", "2:9: !after.total is a YAML tag here: put the text in quotes"},
		{"a:\n  when: !x status\n", "2:9: !x is a YAML tag here"},
		{"a:\n  when: total > 1 # and status == \"x\"\n", "2:19: a # begins a comment, which cuts this expression off"},
		{"a:\n  when:\n", "2:9: when is to be an expression"},
		{"a:\n  when: ''\n", "2:9: when is to be an expression"},
		{"a:\n  when: [x]\n", "2:9: when is to be an expression"},
		{"a:\n  on: [insert, insert]\n", "2:16: insert is given twice"},
		{"a:\n  limit: 11\n", "2:10: limit is to be an integer from 1 to 10"},
		{"a:\n  limit: seven\n", "2:10: limit is to be an integer from 1 to 10"},
		{"a:\n  quiet: yes\n", "2:10: quiet is to be true or false"},
		{"a: &x {limit: 1}\n", "1:4: anchors and aliases are not taken"},
		{"a: 7\n", "1:4: a rule is to be a mapping"},
		{"a: {limit: 1\n", "1:"},
		{"a:\n\tlimit: 1\n", "2:"},
		{"a: {limit: 1}\n---\nb: {limit: 1}\n", "3:1: a second document"},
		{"a: {limit: 99}\nb: {when: x}\n", "1:12: limit is to be an integer from 1 to 10\nbackstory.yaml:2:11: x is not known here"},
	} {
		_, err := read(c.src)
		if err == nil || !strings.HasPrefix(err.Error(), "backstory.yaml:"+c.want) {
			t.Errorf("%q: %v; want %q", c.src, err, c.want)
		}
	}
}

func TestNameGivenTwice(t *testing.T) {
	_, err := read("a: {limit: 1}\nb: {limit: 1}\na: {limit: 2}\n")
	if err == nil || !strings.Contains(err.Error(), ":3:1:") {
		t.Errorf("%v", err)
	}
}

// FuzzParse: whatever is in a file, it is understood or there is a place where it is wrong.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"a: {on: [insert], when: 'total > 1'}\n", "a:\n  when: |\n    true\n", "? a\n: b\n", "a: !x\n", "- a\n- {b: c}\n", "a: &b\nc: *b\n", "<<: {a: 1}\n", "a: >-\n  x\n  y\n", "\"a\\n\": {when: \"\\u0041\"}\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, src string) {
		_, err := read(src)
		if err != nil && !strings.HasPrefix(err.Error(), "backstory.yaml:") {
			t.Fatalf("%q", err)
		}
	})
}
