package pgserver

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
)

// The major versions that backstory supports.
const oldest, newest = 14, 18

// binaries are the programs of one version.
type binaries struct {
	dir     string // has initdb and postgres
	version string // "15.18"
	major   int
}

func (b binaries) path(program string) string { return filepath.Join(b.dir, program) }

// localDirs are the places where systems install Postgres.
var localDirs = []string{
	"/usr/lib/postgresql/*/bin", // Debian, Ubuntu
	"/usr/pgsql-*/bin",          // the PGDG packages for RHEL and Fedora
	"/usr/libexec/postgresql*",  // Alpine
	"/usr/local/pgsql/bin",      // make install
	"/opt/homebrew/opt/postgresql@*/bin",
	"/usr/local/opt/postgresql@*/bin",
	"/Applications/Postgres.app/Contents/Versions/*/bin",
}

// findBinaries returns the programs for Config.Version.
func findBinaries(ctx context.Context, cfg Config) (binaries, error) {
	if cfg.BinDir != "" {
		return inspect(ctx, cfg.BinDir)
	}
	found := localBinaries(ctx, localDirs)
	if b, ok := choose(found, cfg.Version); ok {
		return b, nil
	}
	return fetchBinaries(ctx, cfg)
}

// choose returns the newest of the installed ones that the wanted version allows.
func choose(found []binaries, want string) (best binaries, ok bool) {
	for _, b := range found {
		allowed := want == "" || want == b.version || want == fmt.Sprint(b.major)
		if allowed && (!ok || newer(b.version, best.version)) {
			best, ok = b, true
		}
	}
	return best, ok
}

func newer(a, b string) bool {
	var aMajor, aMinor, bMajor, bMinor int
	fmt.Sscanf(a, "%d.%d", &aMajor, &aMinor) // "19beta1" has no minor: 0
	fmt.Sscanf(b, "%d.%d", &bMajor, &bMinor)
	return aMajor > bMajor || aMajor == bMajor && aMinor > bMinor
}

// localBinaries returns all local installations of versions that we support. One that cannot be run is no
// installation.
func localBinaries(ctx context.Context, patterns []string) []binaries {
	var dirs []string
	for _, pattern := range patterns {
		matches, _ := filepath.Glob(pattern)
		dirs = append(dirs, matches...)
	}
	if path, err := exec.LookPath("postgres"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			dirs = append(dirs, filepath.Dir(path))
		}
	}
	if out, err := exec.CommandContext(ctx, "pg_config", "--bindir").Output(); err == nil {
		dirs = append(dirs, strings.TrimSpace(string(out)))
	}
	var found []binaries
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(dir, "initdb")); err != nil {
			continue // a client-only installation
		}
		if b, err := inspect(ctx, dir); err == nil && b.major >= oldest && b.major <= newest {
			found = append(found, b)
		}
	}
	return found
}

// inspect asks the programs in dir for their version, which also shows that they run on this machine.
func inspect(ctx context.Context, dir string) (binaries, error) {
	b := binaries{dir: dir}
	out, err := exec.CommandContext(ctx, b.path("postgres"), "--version").CombinedOutput()
	if err != nil {
		return b, fmt.Errorf("run %s: %w: %s", b.path("postgres"), err, strings.TrimSpace(string(out)))
	}
	// postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)
	fields := strings.Fields(string(out))
	if len(fields) < 3 {
		return b, fmt.Errorf("read the version of %s: %q", b.path("postgres"), out)
	}
	b.version = fields[2]
	if n, _ := fmt.Sscanf(b.version, "%d", &b.major); n != 1 {
		return b, fmt.Errorf("read the version of %s: %q", b.path("postgres"), out)
	}
	return b, nil
}

// fetchBinaries returns the programs from the cache, fetched if they are not there.
func fetchBinaries(ctx context.Context, cfg Config) (binaries, error) {
	full, err := fetchedVersion(cfg.Version)
	if err != nil {
		return binaries{}, err
	}
	dir, err := localserver.Install(ctx, cfg.CacheDir, "postgres/"+full, func(_ context.Context, stage string) error {
		cfg.log("fetching Postgres %s (about 15 MB)", full)
		return fetch(full, stage)
	})
	if err != nil {
		return binaries{}, fmt.Errorf("%w; a local installation of Postgres %d to %d would do too (Debian, Ubuntu: apt-get install postgresql)", err, oldest, newest)
	}
	return inspect(ctx, filepath.Join(dir, "bin"))
}
