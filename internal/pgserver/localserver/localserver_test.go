package localserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestInstallFetchesOnce(t *testing.T) {
	cache := t.TempDir()
	var fetched atomic.Int32
	fetch := func(_ context.Context, stage string) error {
		fetched.Add(1)
		return os.WriteFile(filepath.Join(stage, "program"), []byte("x"), 0o700)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			dir, err := Install(t.Context(), cache, "thing/1.0", fetch)
			if err != nil || dir != filepath.Join(cache, "thing/1.0") {
				t.Errorf("%q, %v", dir, err)
			}
			info, err := os.Stat(filepath.Join(dir, "program"))
			if err != nil {
				t.Error(err)
			} else if os.Geteuid() == 0 && info.Mode().Perm() != 0o755 {
				t.Errorf("mode %o: other users cannot run it", info.Mode().Perm())
			}
		})
	}
	wg.Wait()
	if n := fetched.Load(); n != 1 {
		t.Errorf("fetched %d times", n)
	}
}

// installEnv turns the test binary into a program that installs into the named cache.
const installEnv = "BACKSTORY_TEST_INSTALL"

func TestMain(m *testing.M) {
	if cache := os.Getenv(installEnv); cache != "" {
		_, err := Install(context.Background(), cache, "thing", func(_ context.Context, stage string) error {
			fmt.Println("fetching")
			for i := range 20 { // long enough for the others to come
				if err := os.WriteFile(filepath.Join(stage, fmt.Sprint(i)), nil, 0o600); err != nil {
					return err
				}
				time.Sleep(10 * time.Millisecond)
			}
			return nil
		})
		entries, _ := os.ReadDir(filepath.Join(cache, "thing"))
		fmt.Println("sees", len(entries), err)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestInstallByManyProcesses(t *testing.T) {
	cache := t.TempDir()
	program := func() *exec.Cmd {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), installEnv+"="+cache)
		return cmd
	}
	// The first is killed while it fetches. What it leaves must neither block nor confuse the others.
	first := program()
	out, err := first.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "fetching\n" {
		t.Fatalf("the first said %q", line)
	}
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()

	var fetched atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			out, err := program().Output()
			if err != nil || !strings.HasSuffix(string(out), "sees 20 <nil>\n") {
				t.Errorf("it said %q, %v", out, err)
			}
			fetched.Add(int32(strings.Count(string(out), "fetching")))
		})
	}
	wg.Wait()
	if n := fetched.Load(); n != 1 {
		t.Errorf("fetched %d times", n)
	}
	entries, _ := os.ReadDir(cache)
	if len(entries) != 2 { // the directory and the lock
		t.Errorf("the cache has %v", entries)
	}
}

func TestInstallThatFailsLeavesNothingAndMayBeTriedAgain(t *testing.T) {
	cache := t.TempDir()
	broken := errors.New("broken")
	_, err := Install(t.Context(), cache, "thing", func(_ context.Context, stage string) error {
		os.WriteFile(filepath.Join(stage, "half"), nil, 0o600)
		return broken
	})
	if !errors.Is(err, broken) || isDir(filepath.Join(cache, "thing")) || isDir(filepath.Join(cache, ".thing.stage")) {
		t.Errorf("Install: %v", err)
	}
	if _, err = Install(t.Context(), cache, "thing", func(context.Context, string) error { return nil }); err != nil {
		t.Error(err)
	}
}

func TestInstallReturnsWhenCtxEnds(t *testing.T) {
	cache := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	release, finished := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(finished)
		<-ctx.Done()
		dir, err := Install(ctx, cache, "thing", nil) // waits for the lock
		if !errors.Is(err, context.Canceled) {
			t.Errorf("second: %q, %v", dir, err)
		}
	}()
	_, err := Install(ctx, cache, "thing", func(context.Context, string) error {
		cancel()
		<-release // cannot be interrupted
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Install: %v", err)
	}
	<-finished
	close(release)
	if _, err := Install(t.Context(), cache, "thing", nil); err != nil { // the first has finished the work
		t.Error(err)
	}
}

func TestScratchIsSweptWhenItsOwnerIsGone(t *testing.T) {
	prefix := fmt.Sprintf("backstory-sweep%d-", os.Getpid())
	mine, err := NewScratch(prefix)
	if err != nil {
		t.Fatal(err)
	}
	gone, err := NewScratch(prefix)
	if err != nil {
		t.Fatal(err)
	}
	young, err := NewScratch(prefix)
	if err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	for _, s := range []*Scratch{mine, gone} {
		if err := os.Chtimes(s.Path, old, old); err != nil {
			t.Fatal(err)
		}
	}
	gone.lock.Close() // as the kernel does when the owner dies
	young.lock.Close()
	next, err := NewScratch(prefix)
	if err != nil {
		t.Fatal(err)
	}
	if !isDir(mine.Path) || isDir(gone.Path) || !isDir(young.Path) {
		t.Errorf("mine %v, gone %v, young %v; want true, false, true", isDir(mine.Path), isDir(gone.Path), isDir(young.Path))
	}
	for _, s := range []*Scratch{mine, young, next} {
		if err := s.Remove(); err != nil || isDir(s.Path) {
			t.Errorf("remove: %v", err)
		}
	}
}

func TestFreePortIsFreeAndGivenOnce(t *testing.T) {
	seen := map[int]bool{}
	for range 50 {
		port, err := FreePort()
		if err != nil || seen[port] || !PortFree(port) {
			t.Fatalf("port %d: %v, seen %v", port, err, seen[port])
		}
		seen[port] = true
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if PortFree(l.Addr().(*net.TCPAddr).Port) {
		t.Error("a port in use is called free")
	}
}

func TestKillEndsTheWholeTree(t *testing.T) {
	// Two generations, and a process that never stops forking.
	p, err := Start(exec.Command("sh", "-c", `sh -c 'sleep 300 & sleep 300; :' & sleep 300 & while :; do sleep 0.001; done`), syscall.SIGKILL)
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if tree, err := p.Tree(); err != nil || time.Now().After(end) {
			t.Fatalf("the tree is %v, %v", tree, err)
		} else if len(tree) >= 6 { // with the short-lived one
			break
		}
	}
	var pids []int
	if err := p.Kill(func(tree []int) { pids = tree }); err != nil {
		t.Fatal(err)
	}
	if len(pids) < 5 || !p.Ended() {
		t.Errorf("killed %v, ended %v", pids, p.Ended())
	}
	for _, pid := range pids {
		if alive(pid) {
			t.Errorf("process %d is alive", pid)
		}
	}
	if err := p.Kill(nil); err != nil {
		t.Errorf("second Kill: %v", err)
	}
}

func TestStartTellsWhatCannotBeStarted(t *testing.T) {
	if _, err := Start(exec.Command("/no/such/program"), syscall.SIGKILL); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("Start: %v", err)
	}
}

func TestLogTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("old\none\ntwo\nthree\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := LogTail(path, 4, 2); got != "two\nthree" {
		t.Errorf("tail %q", got)
	}
	if got := LogTail(path, 4, 9); got != "one\ntwo\nthree" {
		t.Errorf("tail %q", got)
	}
	if got := LogTail(path+"x", 0, 9); got != "" {
		t.Errorf("tail %q", got)
	}
}
