package rebuild

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"

	"github.com/backstory-dev/backstory/eventlog"
)

// rowsOf splits what COPY wrote into its header and its rows, sorted; rows may hold line breaks.
func rowsOf(t *testing.T, text string) []string {
	t.Helper()
	header, body, ok := strings.Cut(text, "\n")
	if !ok {
		t.Fatalf("no header in %q", text)
	}
	var rows []string
	var b strings.Builder
	quoted := false
	for _, c := range []byte(body) {
		if c == '"' {
			quoted = !quoted
		}
		b.WriteByte(c)
		if c == '\n' && !quoted {
			rows = append(rows, b.String())
			b.Reset()
		}
	}
	if b.Len() > 0 {
		t.Fatalf("a line has no end: %q", b.String())
	}
	sort.Strings(rows)
	return append([]string{header}, rows...)
}

func TestCSVIsWhatCopyWrites(t *testing.T) {
	s := newSource(t)
	allTypes(t, s)
	dir := filepath.Join(t.TempDir(), "a", "b")
	r := s.mustCheckout(0, Files(FilesConfig{Dir: dir}))
	got, err := os.ReadFile(r.Tables[0].Into)
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	if _, err := s.conn.PgConn().CopyTo(s.ctx, &want, `COPY app."All types" TO STDOUT (FORMAT csv, HEADER)`); err != nil {
		t.Fatal(err)
	}
	if g, w := rowsOf(t, string(got)), rowsOf(t, want.String()); !slices.Equal(g, w) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(g, ""), strings.Join(w, ""))
	}
	lines, err := csv.NewReader(bytes.NewReader(got)).ReadAll()
	if err != nil || len(lines) != 10 || len(lines[0]) != len(typeSamples)+1 {
		t.Errorf("%d lines, %v", len(lines), err)
	}
}

func TestCSVKeepsNullAndEmptyApart(t *testing.T) {
	words := relation("words", []int{0}, "id bigint", `word"s text`, "last text")
	s := newSource(t, words)
	s.tx(insert(words, 1, "", nil))
	r := s.mustCheckout(0, Files(FilesConfig{Dir: t.TempDir()}))
	if got, _ := os.ReadFile(r.Tables[0].Into); string(got) != "id,\"word\"\"s\",last\n1,\"\",\n" {
		t.Errorf("%q", got)
	}
}

func TestJSONLinesHaveTheFormOfTheLog(t *testing.T) {
	s := newSource(t)
	rel := allTypes(t, s)
	r := s.mustCheckout(0, Files(FilesConfig{Dir: t.TempDir(), Format: JSONLines}))
	text, err := os.ReadFile(r.Tables[0].Into)
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string][]string{}
	for line := range strings.Lines(string(text)) {
		if !json.Valid([]byte(line)) {
			t.Fatalf("%q", line)
		}
		var id string
		var texts []string
		i := 0
		if err := eventlog.EachMember([]byte(line), func(name, value []byte) error {
			c := rel.Columns[i]
			i++
			if c.Name != string(name) {
				t.Errorf("%s where %s should be", name, c.Name)
			}
			text, null, err := eventlog.AppendText(nil, &c.Type, value)
			if null {
				text = []byte("∅")
			}
			if c.Type.Kind == eventlog.KindJSON {
				text = bytes.ReplaceAll(text, []byte("\n"), []byte(" "))
			}
			if c.Name == "id" {
				id = string(text)
			}
			texts = append(texts, string(text))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		rows[id] = texts
	}
	for _, v := range queryValues(t, s.conn, `SELECT * FROM app."All types"`) {
		got := rows[string(v[0].Text)]
		for i, x := range v {
			want := string(x.Text)
			if x.State == eventlog.StateNull {
				want = "∅"
			}
			if rel.Columns[i].Type.Kind == eventlog.KindJSON {
				want = strings.ReplaceAll(want, "\n", " ")
			}
			if i >= len(got) || got[i] != want {
				t.Errorf("row %s, %s: %q, want %q", v[0].Text, rel.Columns[i].Type.Name, got[i], want)
			}
		}
	}
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestDirectoryIsReplacedOnlyIfItIsACheckout(t *testing.T) {
	orders, items := relation("orders", []int{0}, "id bigint"), relation("public.odd/../name", []int{0}, "id bigint")
	s := newSource(t, orders, items)
	s.tx(insert(orders, 1), insert(items, 2))
	dir := t.TempDir()
	mine := filepath.Join(dir, "mine.csv")
	if err := os.WriteFile(mine, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	into := func(replace bool) Target { return Files(FilesConfig{Dir: dir, Replace: replace}) }
	for _, replace := range []bool{false, true} {
		if _, err := s.checkout(0, into(replace)); err == nil || eventlog.Hint(err) == "" {
			t.Errorf("%v", err)
		}
	}
	if got := names(t, dir); !slices.Equal(got, []string{"mine.csv"}) {
		t.Errorf("%q", got)
	}
	if err := os.Remove(mine); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".backstory-orders.csv.partial"), nil, 0o644); err != nil { // of one that was killed
		t.Fatal(err)
	}
	s.mustCheckout(0, into(false))
	if got, want := names(t, dir), []string{"backstory-checkout.json", "odd%2F..%2Fname.csv", "orders.csv"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if _, err := s.checkout(0, into(false)); err == nil || !strings.Contains(eventlog.Hint(err), "--replace") {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(mine, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.mustCheckout(0, into(true), func(c *Config) { c.Tables = []string{"orders"} })
	if got, want := names(t, dir), []string{"backstory-checkout.json", "mine.csv", "orders.csv"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestFailedFilesLeaveNothing(t *testing.T) {
	orders := relation("orders", []int{0}, "id bigint")
	s := newSource(t, orders)
	s.tx(insert(orders, 1))
	dir := filepath.Join(t.TempDir(), "new")
	into := &failing{at: "commit"}
	_, err := s.checkout(0, &half{Target: Files(FilesConfig{Dir: dir}), failing: into})
	if err == nil {
		t.Fatal("no error")
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the directory is there: %v %q", err, names(t, dir))
	}
}
