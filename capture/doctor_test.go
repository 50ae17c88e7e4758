package capture

import (
	"strings"
	"testing"
)

// What depends on the version alone, or on tens of gigabytes of WAL; the rest is found on real servers (internal/e2e).
func TestFindingsOfAServerAndItsSlot(t *testing.T) {
	find := func(f func(add func(Finding))) string {
		var out []string
		f(func(f Finding) {
			if f.Risk == "" || f.Mend() == "" {
				t.Errorf("%+v does not say why, or what to do", f)
			}
			out = append(out, string(f.Severity)+": "+f.What)
		})
		return strings.Join(out, "; ")
	}
	good := map[string]string{"wal_level": "logical", "server_encoding": "UTF8", "max_slot_wal_keep_size": "50GB", "fsync": "on", "idle_replication_slot_timeout": "0"}
	for version, want := range map[int]string{
		140017: "warning: PostgreSQL 14.17 can lose rows of a table that is added to a publication", 140018: "",
		150012: "warning: PostgreSQL 15.12 can lose rows of a table that is added to a publication", 150013: "",
		160008: "warning: PostgreSQL 16.8 can lose rows of a table that is added to a publication", 160009: "",
		170004: "warning: PostgreSQL 17.4 can lose rows of a table that is added to a publication", 170005: "",
		180000: "", 130020: "danger: the source is PostgreSQL 13",
	} {
		if got := find(func(add func(Finding)) { examineServer(&Server{Version: version, Settings: good}, add) }); got != want {
			t.Errorf("%d: %q, want %q", version, got, want)
		}
	}
	c := Config{Slot: "history"}
	healthy := Slot{Exists: true, WALStatus: "reserved", SafeBytes: -1, Failover: true}
	for _, x := range []struct {
		change  func(*Slot)
		version int
		want    string
	}{
		{func(*Slot) {}, 170005, ""},
		{func(s *Slot) { s.RetainedBytes = 10 << 30 }, 170005, ""},
		{func(s *Slot) { s.RetainedBytes = 12 << 30 }, 170005, "warning: the source keeps 12 GB of WAL for replication slot history"},
		{func(s *Slot) { s.WALStatus = "unreserved" }, 170005, "danger: replication slot history is about to be lost"},
		{func(s *Slot) { s.WALStatus = "lost" }, 170005, "danger: the server has removed WAL that replication slot history needed"},
		{func(s *Slot) { s.Failover = false }, 170005, "info: replication slot history is not synchronised to standbys"},
		{func(s *Slot) { s.Failover = false }, 160009, ""},
		{func(s *Slot) { *s = Slot{} }, 170005, "info: replication slot history does not exist"},
	} {
		s := healthy
		x.change(&s)
		if got := find(func(add func(Finding)) { c.examineSlot(&s, &Server{Version: x.version}, add) }); got != x.want {
			t.Errorf("%+v: %q, want %q", s, got, x.want)
		}
	}
}
