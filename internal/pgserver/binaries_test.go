package pgserver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func TestChoose(t *testing.T) {
	found := []binaries{
		{dir: "a", version: "14.20", major: 14}, {dir: "b", version: "16.9", major: 16},
		{dir: "c", version: "16.11", major: 16}, {dir: "d", version: "15.18", major: 15},
	}
	for want, dir := range map[string]string{"": "c", "14": "a", "15": "d", "16": "c", "16.9": "b", "17": "", "15.17": ""} {
		if b, ok := choose(found, want); b.dir != dir || ok != (dir != "") {
			t.Errorf("version %q: %q, %v; want %q", want, b.dir, ok, dir)
		}
	}
}

func TestFetchedVersion(t *testing.T) {
	for version, want := range map[string]string{"": "18.1.0", "14": "14.20.0", "17.4": "17.4.0", "16.9.0": "16.9.0", "12.1": "", "x": ""} {
		if got, err := fetchedVersion(version); got != want || (err != nil) != (want == "") {
			t.Errorf("version %q: %q, %v; want %q", version, got, err, want)
		}
	}
}

func TestLocalBinariesPassesOverWhatIsNoServer(t *testing.T) {
	dir := t.TempDir()
	script := func(path, text string) {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir) // hide this machine's
	script("16/bin/postgres", "echo 'postgres (PostgreSQL) 16.9 (Debian 16.9-1)'")
	script("16/bin/initdb", "")
	script("17/bin/postgres", "echo 'postgres (PostgreSQL) 17.7'") // client only: no initdb
	script("15/bin/postgres", "exit 1")
	script("15/bin/initdb", "")
	script("13/bin/postgres", "echo 'postgres (PostgreSQL) 13.1'")
	script("13/bin/initdb", "")
	found := localBinaries(t.Context(), []string{dir + "/*/bin"})
	if len(found) != 1 || found[0].version != "16.9" || found[0].major != 16 {
		t.Errorf("found %+v", found)
	}
}

const matrixEnv = "BACKSTORY_TEST_MATRIX"

func needMatrix(t *testing.T) {
	if os.Getenv(matrixEnv) == "" {
		t.Skipf("it fetches every major version; set %s=1 to run it", matrixEnv)
	}
}

func TestAllMajorsStart(t *testing.T) {
	needMatrix(t)
	for major := oldest; major <= newest; major++ {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			s := start(t, Config{Version: fmt.Sprint(major)})
			t.Logf("Postgres %s from %s", s.Version(), s.BinDir())
			if s.Major() != major {
				t.Errorf("major is %d", s.Major())
			}
			exec1(t, s.URL("postgres"), `CREATE EXTENSION hstore; CREATE TABLE kept AS SELECT 42 AS n`)
			exec1(t, s.URL("postgres"), `SELECT pg_create_logical_replication_slot('a', 'pgoutput')`)
			if err := s.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := s.Restart(t.Context(), Fast); err != nil {
				t.Fatal(err)
			}
			if err := s.Reload(t.Context()); err != nil {
				t.Error(err)
			}
			if got := query1(t, s.SocketURL("postgres"), `SELECT n || slot_name FROM kept, pg_replication_slots`); got != "42a" {
				t.Errorf("found %q", got)
			}
			if err := s.Stop(Smart); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestFetchFetchesOnceAndLeavesOnlyTheServer(t *testing.T) {
	needMatrix(t)
	cache := t.TempDir()
	if err := os.Chmod(filepath.Dir(cache), 0o755); err != nil {
		t.Fatal(err)
	}
	logs := len(tempLogs())
	var mu sync.Mutex // guards lines
	var lines []string
	cfg := Config{Version: "16.11.0", CacheDir: cache, Log: func(line string) {
		mu.Lock()
		defer mu.Unlock()
		lines = append(lines, line)
	}}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			b, err := fetchBinaries(context.Background(), cfg)
			if err != nil || b.version != "16.11" {
				t.Errorf("fetched %+v, %v", b, err)
			}
		})
	}
	wg.Wait()
	if len(lines) != 1 {
		t.Errorf("told %q, want one line", lines)
	}
	all, _ := os.ReadDir(cache + "/postgres")
	if len(all) != 2 { // the directory and the lock file
		t.Errorf("the cache has %v", all)
	}
	if inside, _ := os.ReadDir(cache + "/postgres/16.11.0"); len(inside) != 3 {
		t.Errorf("the version has %v, want bin, lib and share", inside)
	}
	if n := len(tempLogs()); n != logs {
		t.Errorf("%d log files of the library, before %d", n, logs)
	}
}
