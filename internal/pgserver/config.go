package pgserver

import (
	"fmt"
	"maps"
	"strconv"
	"strings"
)

// Config says which server to start. The zero value is a fresh, temporary server of the newest local version.
type Config struct {
	// Version is a major version, "14" to "18": a local installation of it, otherwise fetched. A full version
	// ("17.4") is used locally if it is that one exactly, otherwise fetched. Empty: the version of the cluster in
	// DataDir if there is one, otherwise the newest local one, otherwise the newest that can be fetched.
	Version string

	// BinDir is the directory of the server's programs. Empty: an installation of Version is looked for, or fetched.
	BinDir string

	// DataDir is the data directory. A cluster in it is used as it is, and kept by Stop; otherwise it must be empty or
	// not exist. Empty: a temporary directory, removed by Stop.
	DataDir string

	// Settings are server settings beside or instead of the defaults: wal_level=logical, listen_addresses=127.0.0.1,
	// max_wal_senders=20, max_replication_slots=20, timezone and log_timezone=UTC, lc_messages=C. The setting port
	// fixes the TCP port, which is otherwise a free one. unix_socket_directories cannot be set.
	Settings map[string]string

	// HBA are lines of pg_hba.conf that come before ours, which let everybody in from the loopback interface and the
	// socket: "host all app 127.0.0.1/32 scram-sha-256".
	HBA []string

	// CacheDir is where fetched programs are kept. Empty: localserver.CacheDir.
	CacheDir string

	// Log is told of what takes long, one line at a time: "fetching Postgres 18.1.0 (about 15 MB)". Nil: nobody is.
	Log func(line string)
}

// CheckVersion tells what is wrong with a Config.Version.
func CheckVersion(v string) error {
	if v == "" {
		return nil
	}
	_, err := majorOf(v)
	return err
}

func (c Config) validate() error {
	if err := CheckVersion(c.Version); err != nil {
		return err
	}
	if err := checkSettings(c.Settings); err != nil {
		return err
	}
	if p, ok := c.Settings["port"]; ok {
		if n, err := strconv.Atoi(p); err != nil || n < 1 || n > 65535 {
			return fmt.Errorf("read setting port: %q is not a TCP port", p)
		}
	}
	for _, line := range c.HBA {
		if strings.ContainsAny(line, "\r\n") {
			return fmt.Errorf("read pg_hba line %q: one line only", line)
		}
	}
	return nil
}

func (c Config) log(format string, args ...any) {
	if c.Log != nil {
		c.Log(fmt.Sprintf(format, args...))
	}
}

func defaultSettings() map[string]string {
	return map[string]string{
		"wal_level":             "logical",
		"listen_addresses":      "127.0.0.1",
		"max_wal_senders":       "20",
		"max_replication_slots": "20",
		"timezone":              "UTC",
		"log_timezone":          "UTC",
		"lc_messages":           "C",
		"logging_collector":     "off",
		"log_destination":       "stderr",
		"log_line_prefix":       "%m [%p] %q%u@%d ",
	}
}

func withDefaults(settings map[string]string) map[string]string {
	all := defaultSettings()
	maps.Copy(all, settings)
	return all
}

// majorOf returns 17 for "17" and for "17.4".
func majorOf(version string) (int, error) {
	major, _, _ := strings.Cut(version, ".")
	n, err := strconv.Atoi(major)
	if err != nil || n < oldest || n > newest {
		return 0, fmt.Errorf("read Postgres version %q: want %d to %d, or a full version such as 17.4", version, oldest, newest)
	}
	return n, nil
}
