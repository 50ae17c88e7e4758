package main

import (
	"bufio"
	"bytes"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/backstory-dev/backstory/capture"
)

// TestFindingsOnATerminal: twenty findings fit into 80 columns; only SQL, which is there to be copied, is not broken.
func TestFindingsOnATerminal(t *testing.T) {
	found := []capture.Finding{
		{Check: "tls", Severity: capture.Info, What: "the connection to the source (10.0.0.7) is not encrypted", Risk: "whoever can listen in between reads every row", Remedy: "sslmode=verify-full&sslrootcert=… in the URL; without TLS on the server, turn it on there (ssl = on)"},
		{Check: "fsync", Severity: capture.Danger, What: "fsync is off", Risk: "after a crash the source may have lost transactions that the log holds, and use their places in the WAL for others: no tool could tell them apart", SQL: "ALTER SYSTEM SET fsync = 'on'; SELECT pg_reload_conf();", Cost: "slower commits"},
	}
	for i := range 18 {
		found = append(found, capture.Finding{Check: "inserts-only", Severity: capture.Warning, What: fmt.Sprintf("only inserts of public.visits_%d are captured: it has no primary key", i),
			Risk: "what its updates and deletes have made of its rows is found later, by comparing them with the log; who made them, and when, is lost", SQL: fmt.Sprintf(`ALTER TABLE "public"."visits; %d" REPLICA IDENTITY USING INDEX visits_%d_some_quite_long_name_key;`, i, i), Remedy: "then backstory init"})
	}
	var b bytes.Buffer
	s := &screen{Writer: bufio.NewWriter(&b), width: 80}
	printFindings(s, found)
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + b.String())
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	for _, l := range lines {
		if utf8.RuneCountInString(l) > 80 && !strings.HasSuffix(l, ";") {
			t.Errorf("too long: %s", l)
		}
	}
	if !strings.HasPrefix(lines[0], "danger   fsync is off") || lines[len(lines)-1] != "found    1 danger, 18 warnings, 1 note" {
		t.Errorf("it does not begin with the worst, or end with the sum:\n%s", b.String())
	}
	for _, want := range []string{"mend: ALTER SYSTEM SET fsync = 'on';\n               SELECT pg_reload_conf();\n", `      ALTER TABLE "public"."visits; 17" REPLICA IDENTITY USING INDEX visits_17_some_quite_long_name_key;` + "\n               -- then backstory init\n",
		"risk: what its updates and deletes have made of its rows is found\n               later, by comparing"} {
		if strings.Count(b.String(), want) != 1 {
			t.Errorf("%q is not there once:\n%s", want, b.String())
		}
	}
}
