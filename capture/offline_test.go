package capture

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/backstory-dev/backstory/eventlog"
)

// offline makes a session without connections: relations are as the stream alone describes them, what it sends is
// counted.
func offline() (x *session, sent *int) {
	s := NewStream(Config{MaxBatchBytes: 1 << 30}, nil, 0) // a batch that is never full: there is nobody to take it
	x = &session{Stream: s, ctx: context.Background(), relations: map[uint32]*eventlog.Relation{}, server: &Server{Timeline: 1}}
	x.batch = eventlog.NewBatch(nil)
	sent = new(int)
	x.describe = func(*eventlog.Relation, []relationColumn) error { return errGone }
	x.send = func([]byte) error { *sent++; return nil }
	return x, sent
}

// messages splits a recording: each message has its length before it, in four bytes.
func messages(rec []byte) (list [][]byte) {
	for len(rec) >= 4 {
		n := min(int(binary.BigEndian.Uint32(rec)), len(rec)-4)
		list = append(list, rec[4:4+n])
		rec = rec[4+n:]
	}
	return list
}

// record appends a message to a recording.
func record(rec, msg []byte) []byte {
	return append(binary.BigEndian.AppendUint32(rec, uint32(len(msg))), msg...)
}

// encodeChange is the inverse of decodeChange: the message of a row change.
func encodeChange(it *eventlog.Item) []byte {
	b := []byte{map[eventlog.Op]byte{eventlog.OpInsert: 'I', eventlog.OpUpdate: 'U', eventlog.OpDelete: 'D'}[it.Op]}
	b = binary.BigEndian.AppendUint32(b, it.Relation.OID)
	tuple := func(tag byte, row []eventlog.Value) {
		b = binary.BigEndian.AppendUint16(append(b, tag), uint16(len(row)))
		for _, v := range row {
			switch v.State {
			case eventlog.StateNull:
				b = append(b, 'n')
			case eventlog.StateUnchanged:
				b = append(b, 'u')
			case eventlog.StateText:
				b = append(binary.BigEndian.AppendUint32(append(b, 't'), uint32(len(v.Text))), v.Text...)
			}
		}
	}
	if it.Old != nil {
		tuple(map[bool]byte{false: 'K', true: 'O'}[it.OldFull], it.Old)
	}
	if it.New != nil {
		tuple('N', it.New)
	}
	return b
}

// render prints items, a line each.
func render(items []eventlog.Item) string {
	var b strings.Builder
	row := func(name string, rel *eventlog.Relation, row []eventlog.Value) {
		if row == nil {
			return
		}
		fmt.Fprintf(&b, " %s", name)
		for i, v := range row {
			text := map[eventlog.State]string{eventlog.StateNull: "NULL", eventlog.StateUnchanged: "(unchanged)", eventlog.StateUnknown: "(unknown)"}[v.State]
			if v.State == eventlog.StateText {
				if text = fmt.Sprintf("%q", v.Text); len(text) > 60 {
					text = fmt.Sprintf("%s…\" (%d bytes)", text[:20], len(v.Text))
				}
			}
			fmt.Fprintf(&b, " %s=%s", rel.Columns[i].Name, text)
		}
	}
	for i := range items {
		it := &items[i]
		switch it.Kind {
		case eventlog.ItemBegin:
			fmt.Fprintf(&b, "begin %s xid %d at %s on timeline %d", it.CommitLSN, it.XID, it.Time.Format("2006-01-02T15:04:05.000000Z07:00"), it.Timeline)
		case eventlog.ItemCommit:
			fmt.Fprintf(&b, "commit, ends at %s", it.EndLSN)
		case eventlog.ItemProgress:
			fmt.Fprintf(&b, "progress to %s", it.EndLSN)
		case eventlog.ItemMessage:
			fmt.Fprintf(&b, "  context %q", it.Text)
		case eventlog.ItemReset:
			b.WriteString("reset")
		case eventlog.ItemChange:
			fmt.Fprintf(&b, "  %s %s", it.Op, it.Relation)
			old := "key"
			if it.OldFull {
				old = "old"
			}
			row(old, it.Relation, it.Old)
			row("new", it.Relation, it.New)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// renderRelations prints what the stream has said of tables.
func renderRelation(r *eventlog.Relation) string {
	var cols []string
	for _, c := range r.Columns {
		mark := ""
		if c.Identity {
			mark = " identity"
		}
		cols = append(cols, fmt.Sprintf("%s %s(%d)%s", c.Name, c.Type.Name, c.Type.OID, mark))
	}
	return fmt.Sprintf("relation %s replica identity %c: %s; key %v\n", r, r.ReplicaIdentity, strings.Join(cols, ", "), r.Key)
}
