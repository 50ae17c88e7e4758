package pgserver

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// latest are the full versions that a major version stands for when it is fetched.
var latest = map[int]string{14: "14.20.0", 15: "15.15.0", 16: "16.11.0", 17: "17.7.0", 18: "18.1.0"}

// fetchedVersion turns "", "17", "17.4" or "17.4.0" into the name of an archive, "17.4.0".
func fetchedVersion(version string) (string, error) {
	if version == "" {
		return latest[newest], nil
	}
	major, err := majorOf(version)
	if err != nil {
		return "", err
	}
	switch strings.Count(version, ".") {
	case 0:
		return latest[major], nil
	case 1:
		return version + ".0", nil
	default:
		return version, nil
	}
}

// fetch has the library fetch and unpack one version, so that stage is what the archive holds: bin, lib, share.
//
// The library (v1.34) has no call that only fetches. Its Start, in this order: checks the port; creates an empty log
// file in the temporary directory, and forgets it; removes RuntimePath; fetches to CachePath, comparing the checksum
// that lies beside the archive; unpacks to BinariesPath; creates RuntimePath; removes DataPath and runs initdb in it.
// os.RemoveAll refuses a path that ends in a dot, so with such a DataPath Start ends there, having run nothing. That
// RuntimePath exists then shows that the unpacking was complete.
func fetch(version, stage string) error {
	work := filepath.Join(stage, ".fetch") // inside stage: goes with it whatever happens
	runtimePath := filepath.Join(work, "run")
	binariesPath := filepath.Join(work, "unpacked")
	logs := tempLogs()
	err := embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
		Version(embeddedpostgres.PostgresVersion(version)).
		Port(0).
		CachePath(filepath.Join(work, "archive")).
		RuntimePath(runtimePath).
		BinariesPath(binariesPath).
		DataPath(filepath.Join(work, "data") + "/.").
		Logger(nil)).Start()
	removeNewTempLog(logs)
	http.DefaultClient.CloseIdleConnections() // it is what the library uses
	if _, statErr := os.Stat(runtimePath); statErr != nil {
		return fmt.Errorf("fetch Postgres %s: %w", version, err)
	}
	entries, err := os.ReadDir(binariesPath)
	if err != nil {
		return fmt.Errorf("fetch Postgres %s: %w", version, err)
	}
	for _, e := range entries {
		if err := os.Rename(filepath.Join(binariesPath, e.Name()), filepath.Join(stage, e.Name())); err != nil {
			return fmt.Errorf("fetch Postgres %s: %w", version, err)
		}
	}
	return os.RemoveAll(work)
}

// tempLogs returns the library's log files in the temporary directory, everybody's.
func tempLogs() map[string]bool {
	paths, _ := filepath.Glob(filepath.Join(os.TempDir(), "embedded_postgres_log*"))
	logs := map[string]bool{}
	for _, path := range paths {
		logs[path] = true
	}
	return logs
}

// removeNewTempLog removes the log file that the library has just forgotten. Other programs that use the library may
// have made one too; ours is the one that we still have open.
func removeNewTempLog(before map[string]bool) {
	for path := range tempLogs() {
		info, err := os.Stat(path)
		if err != nil || before[path] {
			continue
		}
		want, ok := info.Sys().(*syscall.Stat_t)
		for fd := 0; ok && fd < 1024; fd++ {
			var st syscall.Stat_t
			if syscall.Fstat(fd, &st) == nil && st.Dev == want.Dev && st.Ino == want.Ino {
				os.Remove(path)
				break
			}
		}
	}
}
