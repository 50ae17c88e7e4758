package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
)

// How much the log will grow is told by what the server has counted in more than a day, and by the width of the rows; init asks where
// that is much, on the source's own disk, and the log is new.
func TestGrowthOfTheLog(t *testing.T) {
	plan := func(change func(*backstory.Plan)) (said string, asks bool) {
		table := func(rows, bytes int64, a capture.Activity) *capture.Table {
			return &capture.Table{Relation: &eventlog.Relation{Schema: "public", Name: "t", ReplicaIdentity: 'd'}, Rows: rows, Bytes: bytes, PerDay: a}
		}
		p := &backstory.Plan{SameServer: true, Plan: &capture.Plan{Server: &capture.Server{Version: 170005}, Span: 48 * time.Hour,
			Tables: []*capture.Table{table(1000, 300_000, capture.Activity{Inserted: 20_000, Updated: 50_000, Deleted: 1_000}), table(0, 8192, capture.Activity{Inserted: 2_000})}}}
		if change != nil {
			change(p)
		}
		var b bytes.Buffer
		s := &screen{Writer: bufio.NewWriter(&b)}
		asks = mustAsk(p, showPlan(s, backstory.Config{}, p))
		_ = s.Flush()
		return b.String(), asks
	}
	// 21,000 × (320 + 300) + 50,000 × (320 + 100) + 2,000 × (320 + 100) bytes
	const rate = "At the present rate of 73,000 changes a day it grows by about 33.2 MB a day, 11.9 GB a year."
	if said, asks := plan(nil); !strings.Contains(said, rate) || !asks {
		t.Errorf("asks: %v\n%s", asks, said)
	}
	for _, change := range []func(*backstory.Plan){
		func(p *backstory.Plan) { p.SameServer = false },
		func(p *backstory.Plan) { p.Head = &eventlog.Head{} },
		func(p *backstory.Plan) { p.Tables[0].PerDay.Inserted = 10_000 },
	} {
		if said, asks := plan(change); asks {
			t.Errorf("it asks without reason:\n%s", said)
		}
	}
	said, asks := plan(func(p *backstory.Plan) { p.Span = 23 * time.Hour })
	if !strings.Contains(said, "It grows by about 420 B for each row change; the server has counted them for less than a day") || asks {
		t.Errorf("after 23 hours asks: %v\n%s", asks, said)
	}
	if err := ask(11 << 30); err == nil || !strings.Contains(eventlog.Hint(err), "run backstory init --yes") {
		t.Errorf("without a terminal: %v", err)
	}
}

// asksEnv makes the test's own program one that asks, and ends.
const asksEnv = "BACKSTORY_TEST_ASKS"

func asks() int {
	if err := ask(17 << 30); err != nil {
		fmt.Fprintln(os.Stderr, "backstory:", err)
		return exitFailed
	}
	return exitDone
}
