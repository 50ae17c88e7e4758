package pgserver

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
)

// account is the user that initdb and postgres run as. The zero value is our own.
type account struct {
	cred *syscall.Credential
	name string
}

func (a account) String() string {
	if a.cred == nil {
		return "this user"
	}
	return "user " + a.name
}

// accountFor chooses the account for a data directory; see "Users" in the package comment.
func accountFor(dataDir string, initialised bool) (account, error) {
	if os.Geteuid() != 0 {
		return account{}, nil
	}
	if initialised {
		info, err := os.Stat(dataDir)
		if err != nil {
			return account{}, fmt.Errorf("read data directory: %w", err)
		}
		st := info.Sys().(*syscall.Stat_t)
		if st.Uid == 0 {
			return account{}, fmt.Errorf("use data directory %s: it belongs to root, as whom Postgres does not run; chown -R it to another user", dataDir)
		}
		return account{cred: &syscall.Credential{Uid: st.Uid, Gid: st.Gid}, name: "id " + strconv.Itoa(int(st.Uid))}, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return account{}, fmt.Errorf("read user %s: %w", name, err)
		}
		return account{cred: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, name: name}, nil
	}
	return account{}, errors.New("choose a user for Postgres: we are root, as whom it does not run, and there is neither a user postgres nor nobody; add one")
}

// own gives a file or directory to the account.
func (a account) own(path string) error {
	if a.cred == nil {
		return nil
	}
	if err := os.Lchown(path, int(a.cred.Uid), int(a.cred.Gid)); err != nil {
		return fmt.Errorf("give %s to %s: %w", path, a, err)
	}
	return nil
}

// checkAccess finds out whether the account can come to a directory at all: Postgres' own message names only the end
// of the way.
func (a account) checkAccess(dir string) error {
	if a.cred == nil {
		return nil
	}
	if err := localserver.CheckAccess(dir, int(a.cred.Uid), int(a.cred.Gid)); err != nil {
		return fmt.Errorf("reach %s as %s, because Postgres does not run as root: %w; choose a place that is open to all, or run as an ordinary user", dir, a, err)
	}
	return nil
}

// prepare sets the account and the environment: ours without what would steer Postgres.
func (a account) prepare(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: a.cred}
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "PG") && !strings.HasPrefix(kv, "LC_") && !strings.HasPrefix(kv, "LANG") && !strings.HasPrefix(kv, "TZ=") {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	cmd.Env = append(cmd.Env, "LC_ALL=C", "TZ=UTC")
}
