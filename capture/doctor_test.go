package capture

import (
	"net"
	"slices"
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
		{func(s *Slot) { s.WALStatus, s.Invalidation = "lost", "wal_removed" }, 170005, "danger: the server has removed WAL that replication slot history needed"},
		{func(s *Slot) { s.WALStatus, s.Invalidation = "lost", "idle_timeout" }, 180000, "danger: the server has given up replication slot history (idle_timeout)"},
		{func(s *Slot) { s.RetainedBytes, s.SafeBytes = 3<<30, 1<<30 }, 170005, ""},
		{func(s *Slot) { s.RetainedBytes, s.SafeBytes = 3<<30, 1<<30-4 }, 170005, "warning: only 1073 MB more may be written before replication slot history is in danger"},
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

func TestSettingsAreChangedWhereTheyComeFrom(t *testing.T) {
	for from, want := range map[string]string{
		"configuration file": "ALTER SYSTEM SET fsync = 'on'; SELECT pg_reload_conf();",
		"user":               `ALTER ROLE "o'brien" SET fsync = 'on';`,
		"database":           `ALTER DATABASE "my ""shop" SET fsync = 'on';`,
		"database user":      `ALTER ROLE "o'brien" IN DATABASE "my ""shop" SET fsync = 'on';`,
		"client":             "take fsync out of BACKSTORY_SOURCE_URL",
		"command line":       "the server is started with fsync on its command line: change it there to on",
	} {
		sv := &Server{Role: "o'brien", Database: `my "shop`, sources: map[string]string{"fsync": from}}
		sql, remedy := sv.set("fsync", "on")
		if got := sql + remedy; got != want {
			t.Errorf("%s: %s, want %s", from, got, want)
		}
	}
	for size, want := range map[string]int64{"-1": -1, "0": 0, "": 0, "64kB": 64 << 10, "48MB": 48 << 20, "2GB": 2 << 30, "1TB": 1 << 40, "100": 100} {
		if got := bytesOf(size); got != want {
			t.Errorf("%q: %d, want %d", size, got, want)
		}
	}
}

func TestStatementsOfAFinding(t *testing.T) {
	for sql, want := range map[string][]string{
		"": nil, "SELECT 1": {"SELECT 1"}, "A; B;": {"A;", "B;"},
		`ALTER TABLE "a; ""b" RENAME TO c; SELECT 'it''s; so';`: {`ALTER TABLE "a; ""b" RENAME TO c;`, `SELECT 'it''s; so';`},
	} {
		if got := (Finding{SQL: sql}).Statements(); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", sql, got, want)
		}
	}
}

// remote is a connection to an address.
type remote struct {
	net.Conn
	ip string
}

func (r remote) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.ParseIP(r.ip)} }

func TestPlainTextConnections(t *testing.T) {
	for ip, want := range map[string]Severity{"127.0.0.1": "", "::1": "", "10.1.2.3": Info, "192.168.0.7": Info, "fd00::1": Info, "fe80::1": Info, "203.0.113.9": Warning, "2001:db8::1": Warning} {
		var got Severity
		if f := plainText(remote{ip: ip}, "the source"); f != nil {
			got = f.Severity
		}
		if got != want {
			t.Errorf("%s: %q, want %q", ip, got, want)
		}
	}
}
