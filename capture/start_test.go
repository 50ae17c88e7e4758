package capture

import (
	"cmp"
	"errors"
	"strings"
	"testing"

	"github.com/backstory-dev/backstory/eventlog"
)

// A log goes on only where the source's history holds all of the log's.
func TestCheckStart(t *testing.T) {
	history := func(at ...eventlog.LSN) (list []timelineSwitch) { // timelines 1, 2 … were left at
		for i, lsn := range at {
			list = append(list, timelineSwitch{uint32(i + 1), lsn})
		}
		return list
	}
	for _, x := range []struct {
		what     string
		timeline uint32 // of the source
		history  []timelineSwitch
		flush    eventlog.LSN
		slot     Slot
		log      uint32 // its timeline; it ends at 200
		want     string // of the error; empty: it goes on
		to       eventlog.LSN
		from     eventlog.LSN // 0: from the log's end
	}{
		{"nothing has happened", 1, nil, 300, Slot{}, 1, "", 0, 0},
		{"and the log has everything", 1, nil, 200, Slot{}, 1, "", 0, 0},
		{"transactions are lost", 1, nil, 199, Slot{}, 1, "the source has lost transactions that the log holds", 199, 90},
		{"promoted after the log's end", 2, history(250), 300, Slot{}, 1, "", 0, 0},
		{"promoted at the log's end", 2, history(200), 300, Slot{}, 1, "", 0, 0},
		{"promoted before the log's end", 2, history(150), 300, Slot{}, 1, "the source was promoted to timeline 2 from 0/96: transactions", 150, 150},
		{"promoted twice", 3, history(100, 250), 300, Slot{}, 2, "", 0, 0},
		{"promoted twice, the second time before the log's end", 3, history(100, 150), 300, Slot{}, 2, "the source was promoted to timeline 3 from 0/96", 150, 150},
		{"a standby that never followed the log's timeline was promoted", 3, []timelineSwitch{{1, 100}}, 300, Slot{}, 2, "the source is on timeline 3, which does not come from the log's timeline 2", 100, 100},
		{"one of several that never did", 4, []timelineSwitch{{1, 100}, {3, 220}}, 300, Slot{}, 2, "the source is on timeline 4, which does not come from the log's timeline 2", 100, 100},
		{"restored from a backup", 1, nil, 300, Slot{}, 2, "it was restored from a backup", 300, 90},
		{"the slot is gone", 1, nil, 300, Slot{Plugin: "gone"}, 1, "the replication slot history is gone", 300, 0},
		{"the slot is lost", 1, nil, 300, Slot{WALStatus: "lost"}, 1, "the server has removed WAL", 300, 0},
		{"the slot was moved", 1, nil, 300, Slot{ConfirmedFlush: 201}, 1, "was moved or made again by somebody else", 201, 0},
	} {
		slot := x.slot
		if slot.Plugin == "gone" {
			slot = Slot{}
		} else {
			slot.Exists, slot.Plugin, slot.Database = true, "pgoutput", "shop"
		}
		if slot.ConfirmedFlush == 0 {
			slot.ConfirmedFlush = 90
		}
		err := checkStart(&Server{SystemID: "1", Database: "shop", Timeline: x.timeline, switches: x.history, FlushLSN: x.flush}, &slot,
			&eventlog.Head{SystemID: "1", Database: "shop", Timeline: x.log, EndLSN: 200, Slot: "history"}, "history")
		var gap *Gap
		switch {
		case x.want == "" && err != nil:
			t.Errorf("%s: %v", x.what, err)
		case x.want != "" && (!errors.As(err, &gap) || !strings.Contains(gap.Reason, x.want) || gap.From != cmp.Or(x.from, 200) || gap.To != x.to):
			t.Errorf("%s: %v (%+v), want %s", x.what, err, gap, x.want)
		}
	}
}
