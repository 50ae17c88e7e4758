package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
)

// machine is where and with what a run was made: without it a figure says nothing.
type machine struct {
	CPU      string    `json:"cpu"`
	Cores    int       `json:"cores"`
	Memory   string    `json:"memory"`
	Kernel   string    `json:"kernel"`
	Load     string    `json:"load"` // averages when the run began
	Go       string    `json:"go"`
	Postgres string    `json:"postgres"`
	Client   string    `json:"client_programs"`
	Revision string    `json:"revision"`
	Settings []setting `json:"settings"`
}

type setting struct{ Name, Value string }

// shown are the server's settings that a reader has to know.
var shown = []string{"fsync", "synchronous_commit", "full_page_writes", "wal_level", "wal_compression", "shared_buffers", "max_wal_size",
	"checkpoint_timeout", "logical_decoding_work_mem", "work_mem", "maintenance_work_mem", "autovacuum"}

// describe asks the machine and the server what they are.
func (l *lab) describe(ctx context.Context) (machine, error) {
	m := machine{CPU: field("/proc/cpuinfo", "model name"), Cores: runtime.NumCPU(), Memory: field("/proc/meminfo", "MemTotal"), Kernel: runtime.GOOS + "/" + runtime.GOARCH,
		Go: runtime.Version(), Postgres: l.srv.Version(), Client: l.clientPrograms(), Revision: revision(l.module)}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel += " " + strings.TrimSpace(string(b))
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load = strings.Join(strings.Fields(string(b))[:3], " ")
	}
	for _, name := range shown {
		var v string
		if err := l.admin.QueryRow(ctx, `SELECT current_setting($1)`, name).Scan(&v); err != nil {
			return m, fmt.Errorf("read the server's settings: %w", err)
		}
		m.Settings = append(m.Settings, setting{name, v})
	}
	return m, nil
}

// field reads "name : value" from a file of /proc.
func field(file, name string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

// revision says which source was measured.
func revision(dir string) string {
	git := func(args ...string) string {
		out, err := exec.Command("git", append([]string{"-C", dir}, args...)...).Output()
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(out))
	}
	rev := git("rev-parse", "--short=12", "HEAD")
	if rev == "" {
		return "unknown"
	}
	if git("status", "--porcelain") != "" {
		rev += ", with changes that are not committed"
	}
	return rev
}

// disturbed tells whether others were at work when the run began: then the figures are worthless. The build that go run has just
// done is in the load average of one minute, so a little is allowed.
func (m *machine) disturbed() bool {
	var one float64
	_, err := fmt.Sscan(m.Load, &one)
	return err == nil && one > float64(m.Cores)
}

func (m *machine) print(w io.Writer) {
	fmt.Fprintf(w, "machine   %s, %d cores, %s, %s; load before: %s\n", m.CPU, m.Cores, m.Memory, m.Kernel, m.Load)
	fmt.Fprintf(w, "versions  backstory %s; %s; PostgreSQL %s; client programs: %s\n", m.Revision, m.Go, m.Postgres, m.Client)
	var s []string
	for _, x := range m.Settings {
		s = append(s, x.Name+"="+x.Value)
	}
	if m.disturbed() {
		fmt.Fprintln(w, "DISTURBED others are at work on this machine: take no figure from this run")
	}
	fmt.Fprintln(w, wrap("server    one for source and log: "+strings.Join(s, " "), 150, "          "))
}
