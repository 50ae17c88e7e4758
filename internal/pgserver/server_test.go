package pgserver

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestStartGivesAServerForLogicalDecoding(t *testing.T) {
	s := start(t, Config{Settings: map[string]string{"max_prepared_transactions": "7", "application_name": `it's a \ test`}})
	for _, url := range []string{s.URL("postgres"), s.SocketURL("postgres")} {
		for name, want := range map[string]string{
			"wal_level": "logical", "max_replication_slots": "20", "max_wal_senders": "20", "fsync": "on",
			"max_prepared_transactions": "7", "application_name": `it's a \ test`, "lc_messages": "C",
			"TimeZone": "UTC", "server_encoding": "UTF8", "is_superuser": "on", "port": strconv.Itoa(s.Port()),
		} {
			if got := query1(t, url, "SHOW "+name); got != want {
				t.Errorf("%s: %s is %q, want %q", url, name, got, want)
			}
		}
	}
	if got := query1(t, s.URL("postgres"), `SELECT datcollate FROM pg_database WHERE datname = 'postgres'`); got != "C" {
		t.Errorf("locale is %q, want C", got)
	}
	if got := query1(t, s.URL("postgres"), `SELECT split_part(version(), ' ', 2)`); got != s.Version() {
		t.Errorf("Version() is %q, the server says %q", s.Version(), got)
	}
	if len(filepath.Join(s.SocketDir(), ".s.PGSQL.65535")) > 103 {
		t.Errorf("socket directory %s is too long", s.SocketDir())
	}
	slot := query1(t, s.URL("postgres"), `SELECT slot_name FROM pg_create_logical_replication_slot('a', 'pgoutput')`)
	if slot != "a" {
		t.Errorf("made slot %q", slot)
	}
}

func TestStopLeavesNothing(t *testing.T) {
	for _, mode := range []Mode{Smart, Fast, Immediate} {
		t.Run(mode.String(), func(t *testing.T) {
			s := start(t, Config{})
			memory := memoryOf(t, s)
			if err := s.Stop(mode); err != nil {
				t.Fatal(err)
			}
			if exists(s.scratch.Path) || exists(s.DataDir()) || s.PID() != 0 {
				t.Error("something is left of the server")
			}
			if left := still(memory); len(left) > 0 {
				t.Errorf("shared memory is left: %v", left)
			}
			if err := s.Stop(mode); err != nil {
				t.Errorf("second Stop: %v", err)
			}
			if err := s.Restart(t.Context(), Fast); !errors.Is(err, ErrStopped) {
				t.Errorf("Restart after Stop: %v", err)
			}
		})
	}
}

func TestRestartKeepsPortAndData(t *testing.T) {
	for _, mode := range []Mode{Smart, Fast, Immediate} {
		t.Run(mode.String(), func(t *testing.T) {
			s := start(t, Config{})
			port, pid := s.Port(), s.PID()
			exec1(t, s.URL("postgres"), `CREATE TABLE kept AS SELECT 42 AS n`)
			if err := s.Restart(t.Context(), mode); err != nil {
				t.Fatal(err)
			}
			if s.Port() != port || s.PID() == pid {
				t.Errorf("port %d → %d, pid %d → %d", port, s.Port(), pid, s.PID())
			}
			if got := query1(t, s.URL("postgres"), `SELECT n::text FROM kept`); got != "42" {
				t.Errorf("kept %q", got)
			}
		})
	}
}

func TestDataSurvivesKill(t *testing.T) {
	s := start(t, Config{})
	exec1(t, s.URL("postgres"), `CREATE TABLE kept (n int)`)
	busy := connect(t, s.URL("postgres")) // a child that does not wait on the postmaster
	defer busy.Close(context.Background())
	asleep := make(chan error, 1)
	go func() {
		_, err := busy.Exec(t.Context(), `SELECT pg_sleep(600)`)
		asleep <- err
	}()
	for round := range 3 {
		exec1(t, s.URL("postgres"), fmt.Sprintf(`INSERT INTO kept VALUES (%d)`, round))
		tree, err := s.proc.Tree()
		if err != nil || len(tree) < 5 {
			t.Fatalf("processes %v, %v", tree, err)
		}
		memory := memoryOf(t, s)
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		if s.PID() != 0 {
			t.Error("killed, but has a pid")
		}
		for _, pid := range tree {
			if state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(state), ") Z") {
				t.Errorf("process %d is still there: %s", pid, state)
			}
		}
		if left := still(memory); len(left) > 0 {
			t.Errorf("shared memory is left: %v", left)
		}
		if err := s.Kill(); err != nil {
			t.Errorf("second Kill: %v", err)
		}
		if err := s.Restart(t.Context(), Fast); err != nil {
			t.Fatal(err)
		}
		if got, want := query1(t, s.URL("postgres"), `SELECT count(*)::text FROM kept`), strconv.Itoa(round+1); got != want {
			t.Errorf("%s rows after restart, want %s", got, want)
		}
	}
	if err := <-asleep; err == nil {
		t.Error("the session outlived its server")
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(Fast); err != nil || exists(s.scratch.Path) {
		t.Errorf("Stop after Kill: %v", err)
	}
}

func TestSetConfig(t *testing.T) {
	s := start(t, Config{})
	show := func(name string) string { return query1(t, s.URL("postgres"), "SHOW "+name) }
	if err := s.SetConfig(map[string]string{"work_mem": "5MB", "max_wal_senders": "6"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if show("work_mem") != "5MB" || show("max_wal_senders") != "20" {
		t.Errorf("after Reload: %s, %s", show("work_mem"), show("max_wal_senders"))
	}
	if err := s.Restart(t.Context(), Fast); err != nil {
		t.Fatal(err)
	}
	if show("work_mem") != "5MB" || show("max_wal_senders") != "6" || show("wal_level") != "logical" {
		t.Errorf("after Restart: %s, %s, %s", show("work_mem"), show("max_wal_senders"), show("wal_level"))
	}
	t.Run("a bad value is told by Reload", func(t *testing.T) {
		if err := s.SetConfig(map[string]string{"work_mem": "much"}); err != nil {
			t.Fatal(err)
		}
		if err := s.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), "work_mem") {
			t.Errorf("Reload: %v", err)
		}
	})
	t.Run("a bad value is told by Restart with the server's log, and can be mended", func(t *testing.T) {
		err := s.Restart(t.Context(), Fast)
		if err == nil || !strings.Contains(err.Error(), `invalid value for parameter "work_mem"`) || s.PID() != 0 {
			t.Errorf("Restart: %v, pid %d", err, s.PID())
		}
		if err := s.SetConfig(map[string]string{"work_mem": "6MB"}); err != nil {
			t.Fatal(err)
		}
		if err := s.Restart(t.Context(), Fast); err != nil || show("work_mem") != "6MB" {
			t.Errorf("Restart: %v", err)
		}
	})
	for name, bad := range map[string]map[string]string{
		"no name": {"work mem": "1MB"}, "two lines": {"work_mem": "1MB\nfsync=off"}, "port": {"port": "1"},
		"socket": {"unix_socket_directories": "/tmp"},
	} {
		if err := s.SetConfig(bad); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestDataDirIsKeptAndReused(t *testing.T) {
	dir := dataDir(t)
	first := start(t, Config{DataDir: dir, Version: os.Getenv("BACKSTORY_TEST_PG_VERSION")})
	exec1(t, first.URL("postgres"), `CREATE TABLE kept AS SELECT 42 AS n`)
	t.Run("not by two servers", func(t *testing.T) {
		if _, err := Start(t.Context(), testConfig(t, Config{DataDir: dir})); err == nil || !strings.Contains(err.Error(), "postmaster.pid") {
			t.Errorf("started a second server: %v", err)
		}
	})
	if err := first.Stop(Fast); err != nil {
		t.Fatal(err)
	}
	if exists(first.scratch.Path) || !exists(dir) {
		t.Fatal("Stop has to remove the scratch directory and keep the data directory")
	}
	second := start(t, Config{DataDir: dir, Settings: map[string]string{"work_mem": "7MB"}})
	if got := query1(t, second.URL("postgres"), `SELECT n::text || current_setting('work_mem') FROM kept`); got != "427MB" {
		t.Errorf("found %q", got)
	}
	if second.Major() != first.Major() {
		t.Errorf("major %d, then %d", first.Major(), second.Major())
	}
	if err := second.Stop(Fast); err != nil {
		t.Fatal(err)
	}
	conf, _ := os.ReadFile(filepath.Join(dir, "postgresql.conf"))
	if n := bytes.Count(conf, []byte(includeLine)); n != 1 {
		t.Errorf("postgresql.conf includes ours %d times", n)
	}
	t.Run("not by another version", func(t *testing.T) {
		if err := os.WriteFile(filepath.Join(dir, "PG_VERSION"), []byte("13\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Start(t.Context(), testConfig(t, Config{DataDir: dir})); err == nil || !strings.Contains(err.Error(), `"13"`) {
			t.Errorf("Start: %v", err)
		}
		if _, err := Start(t.Context(), testConfig(t, Config{DataDir: dir, Version: strconv.Itoa(first.Major())})); err == nil || !strings.Contains(err.Error(), "version 13") {
			t.Errorf("Start: %v", err)
		}
	})
}

func TestDataDirOfOthersIsLeftAlone(t *testing.T) {
	dir := dataDir(t)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	letter := filepath.Join(dir, "letter")
	if err := os.WriteFile(letter, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), testConfig(t, Config{DataDir: dir})); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("Start: %v", err)
	}
	if !exists(letter) {
		t.Error("the file is gone")
	}
}

func TestEmptyDataDirIsUsed(t *testing.T) {
	dir := dataDir(t)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := start(t, Config{DataDir: dir})
	if got := query1(t, s.URL("postgres"), `SHOW data_directory`); got != dir {
		t.Errorf("data directory %s, want %s", got, dir)
	}
}

func TestClosedDirectoryIsNamed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("an ordinary user runs Postgres as itself: only root has this problem")
		return
	}
	dir := dataDir(t)
	closed := filepath.Join(filepath.Dir(dir), "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := Start(t.Context(), testConfig(t, Config{DataDir: closed + "/data"}))
	if err == nil || !strings.Contains(err.Error(), closed+" is closed") {
		t.Errorf("Start: %v", err)
	}
	if exists(closed+"/data") || exists(closed+"/data.initdb") {
		t.Error("something is left")
	}
}

func TestHBALinesComeFirst(t *testing.T) {
	s := start(t, Config{HBA: []string{"host all app 127.0.0.1/32 reject"}})
	exec1(t, s.URL("postgres"), `CREATE ROLE app LOGIN; CREATE ROLE other LOGIN`)
	for user, want := range map[string]bool{"app": false, "other": true} {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.Port()))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "\x00\x00\x00%c\x00\x03\x00\x00user\x00%s\x00database\x00postgres\x00\x00", 4+4+5+len(user)+1+9+9+1, user)
		answer, err := bufio.NewReader(conn).ReadByte()
		if err != nil || (answer == 'R') != want {
			t.Errorf("user %s: answer %q, %v", user, answer, err)
		}
		conn.Close()
	}
}

func TestFailedStartTellsTheLogAndLeavesNothing(t *testing.T) {
	scratches := scratchDirs()
	_, err := Start(t.Context(), testConfig(t, Config{Settings: map[string]string{"shared_preload_libraries": "no_such_library"}}))
	if err == nil || !strings.Contains(err.Error(), `could not access file "no_such_library"`) {
		t.Errorf("Start: %v", err)
	}
	t.Run("port taken", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		_, err = Start(t.Context(), testConfig(t, Config{Settings: map[string]string{"port": port}}))
		if err == nil || !strings.Contains(err.Error(), "could not bind") {
			t.Errorf("Start: %v", err)
		}
	})
	t.Run("ctx ends", func(t *testing.T) {
		for _, after := range []time.Duration{0, 100 * time.Millisecond, 400 * time.Millisecond} {
			ctx, cancel := context.WithTimeout(t.Context(), after)
			defer cancel()
			s, err := Start(ctx, testConfig(t, Config{}))
			if err == nil { // a fast machine
				s.Stop(Immediate)
			} else if !errors.Is(err, context.DeadlineExceeded) && after > 0 {
				t.Errorf("after %s: %v", after, err)
			}
		}
	})
	if after := scratchDirs(); after != scratches {
		t.Errorf("directories before: %s, after: %s", scratches, after)
	}
}

// scratchDirs lists the scratch directories that this process holds.
func scratchDirs() string {
	fds, _ := os.ReadDir("/proc/self/fd")
	var held []string
	for _, fd := range fds {
		if target, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.Contains(target, scratchPrefix) {
			held = append(held, target)
		}
	}
	return fmt.Sprint(held)
}

func TestConfigIsValidated(t *testing.T) {
	for name, cfg := range map[string]Config{
		"old version":    {Version: "13"},
		"new version":    {Version: "19"},
		"no version":     {Version: "latest"},
		"setting's name": {Settings: map[string]string{"a b": "c"}},
		"port":           {Settings: map[string]string{"port": "x"}},
		"hba":            {HBA: []string{"local all all\ntrust"}},
	} {
		if _, err := Start(t.Context(), cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// orphan is the program of TestServerDiesWithUs: it starts a server, says its pid and waits to be killed.
func orphan() {
	s, err := Start(context.Background(), Config{Version: os.Getenv("BACKSTORY_TEST_PG_VERSION")})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println(s.PID(), s.scratch.Path)
	select {}
}

func TestServerDiesWithUs(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), orphanEnv+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	var scratch string
	if n, _ := fmt.Sscan(line, &pid, &scratch); n != 2 {
		t.Fatalf("the program said %q", line)
	}
	if err := syscall.Kill(pid, 0); err != nil {
		t.Fatalf("the server does not run: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	t.Cleanup(func() { os.RemoveAll(scratch) })
	for end := time.Now().Add(15 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the server outlived its program: %s", stat)
		}
	}
	if !exists(scratch) {
		t.Fatal("the scratch directory is gone: what did we test?")
	}
	old := time.Now().Add(-2 * time.Minute) // a sweep spares young ones
	if err := os.Chtimes(scratch, old, old); err != nil {
		t.Fatal(err)
	}
	start(t, Config{})
	if exists(scratch) {
		t.Error("the next Start has not removed the directory")
	}
}
