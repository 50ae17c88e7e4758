package pgserver

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const (
	confName    = "backstory.conf"
	hbaName     = "backstory_hba.conf"
	includeLine = "include_if_exists = '" + confName + "'"
)

var settingName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?$`)

func checkSettings(settings map[string]string) error {
	for name, value := range settings {
		switch {
		case !settingName.MatchString(name):
			return fmt.Errorf("read setting %q: not a name", name)
		case strings.ContainsAny(value, "\r\n\x00"):
			return fmt.Errorf("read setting %s: the value has more than one line", name)
		case name == "unix_socket_directories" || name == "hba_file" || name == "data_directory":
			return fmt.Errorf("read setting %s: it belongs to pgserver", name)
		}
	}
	return nil
}

// confText is backstory.conf. The quoting is that of postgresql.conf: quotes and backslashes are doubled.
func confText(dataDir string, settings map[string]string) string {
	var b strings.Builder
	b.WriteString("# Written by backstory at every start; ALTER SYSTEM wins over it.\n")
	quote := strings.NewReplacer(`'`, `''`, `\`, `\\`)
	fmt.Fprintf(&b, "hba_file = '%s'\n", quote.Replace(filepath.Join(dataDir, hbaName)))
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		if name != "port" { // on the command line
			fmt.Fprintf(&b, "%s = '%s'\n", name, quote.Replace(settings[name]))
		}
	}
	return b.String()
}

func hbaText(lines []string) string {
	all := append([]string{"# Written by backstory at every start."}, lines...)
	all = append(all,
		"local all         all              trust",
		"host  all         all 127.0.0.1/32 trust",
		"host  all         all ::1/128      trust",
		"local replication all              trust",
		"host  replication all 127.0.0.1/32 trust",
		"host  replication all ::1/128      trust")
	return strings.Join(all, "\n") + "\n"
}

// writeConf writes both files, and has postgresql.conf include the first.
func (s *Server) writeConf(settings map[string]string) error {
	if err := s.writeFile(hbaName, hbaText(s.cfg.HBA)); err != nil {
		return err
	}
	if err := s.writeFile(confName, confText(s.dataDir, settings)); err != nil {
		return err
	}
	main := filepath.Join(s.dataDir, "postgresql.conf")
	text, err := os.ReadFile(main)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read postgresql.conf: %w", err)
	}
	if slices.Contains(strings.Split(string(text), "\n"), includeLine) {
		return nil
	}
	return s.writeFile("postgresql.conf", string(text)+"\n"+includeLine+"\n")
}

// writeFile replaces a file of the data directory as a whole: the server may be reading it.
func (s *Server) writeFile(name, text string) error {
	path := filepath.Join(s.dataDir, name)
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := s.account.own(tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}
