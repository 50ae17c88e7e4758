package main

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"go.yaml.in/yaml/v3"

	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

func deployed(t *testing.T, name string) string {
	t.Helper()
	return repositoryFile(t, filepath.Join("deploy", name))
}

func repositoryFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The image is empty but for the binary, which therefore must not need a loader or a library.
func TestImageHasAStaticBinary(t *testing.T) {
	m := regexp.MustCompile(`(?m)^RUN CGO_ENABLED=0 go (build .*) -ldflags "(.*)" -o /backstory (\S+)$`).FindStringSubmatch(deployed(t, "Dockerfile"))
	if m == nil {
		t.Fatal("the Dockerfile builds nothing")
	}
	out := filepath.Join(t.TempDir(), "backstory")
	cmd := exec.Command("go", append(strings.Fields(m[1]), "-ldflags", strings.ReplaceAll(m[2], "${VERSION}", "1.2.3"), "-o", out, m[3])...)
	cmd.Dir = filepath.Join("..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	f, err := elf.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("the binary has a segment %s", p.Type)
		}
	}
	if runtime.GOOS != "linux" {
		return
	}
	if b, err := exec.Command(out, "--version").CombinedOutput(); err != nil || !strings.Contains(string(b), "1.2.3") {
		t.Errorf("--version: %v, %q", err, b)
	}
}

// What compose starts exists: the program's commands, the files, the services waited for; the table can be made.
func TestCompose(t *testing.T) {
	var c struct {
		Services map[string]struct {
			Image       string
			Build       struct{ Context, Dockerfile string }
			Command     []string
			Environment map[string]string
			Volumes     []string
			DependsOn   map[string]any `yaml:"depends_on"`
		}
		Volumes map[string]any
	}
	if err := yaml.Unmarshal([]byte(deployed(t, "compose.yaml")), &c); err != nil {
		t.Fatal(err)
	}
	ours := 0
	for name, s := range c.Services {
		if (s.Image == "") == (s.Build.Dockerfile == "") {
			t.Errorf("%s has an image or is built: %+v", name, s)
		}
		for d := range s.DependsOn {
			if _, ok := c.Services[d]; !ok {
				t.Errorf("%s waits for %s, which is no service", name, d)
			}
		}
		for _, v := range s.Volumes {
			from, _, _ := strings.Cut(v, ":")
			if file, is := strings.CutPrefix(from, "./"); is {
				deployed(t, file)
			} else if _, ok := c.Volumes[from]; !ok {
				t.Errorf("%s mounts %s, which is no volume", name, from)
			}
		}
		if s.Build.Dockerfile == "" {
			continue
		}
		ours++
		if _, err := os.Stat(filepath.Join("..", "..", "deploy", s.Build.Context, s.Build.Dockerfile)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		cmd, args, err := newRoot().Find(s.Command)
		if err == nil {
			err = cmd.ParseFlags(args)
		}
		if err != nil || !cmd.Runnable() {
			t.Errorf("%s runs %q: %v", name, s.Command, err)
		}
	}
	if ours != 2 {
		t.Errorf("compose runs the program %d times", ours)
	}
	srv := pgservertest.ForTest(t, pgserver.Config{})
	conn, err := pgx.Connect(t.Context(), srv.URL(srv.NewDatabase(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.PgConn().Exec(t.Context(), deployed(t, "example.sql")).ReadAll(); err != nil {
		t.Error(err)
	}
}

// Prometheus finds its rules, and the sidecar where compose lets it listen.
func TestPrometheus(t *testing.T) {
	var p struct {
		RuleFiles     []string `yaml:"rule_files"`
		ScrapeConfigs []struct {
			JobName       string                       `yaml:"job_name"`
			StaticConfigs []struct{ Targets []string } `yaml:"static_configs"`
		} `yaml:"scrape_configs"`
	}
	if err := yaml.Unmarshal([]byte(deployed(t, "prometheus.yml")), &p); err != nil {
		t.Fatal(err)
	}
	compose := deployed(t, "compose.yaml")
	for _, c := range p.ScrapeConfigs {
		if c.JobName != "backstory" || len(c.StaticConfigs) != 1 || !strings.Contains(compose, "BACKSTORY_HTTP_ADDR: "+c.StaticConfigs[0].Targets[0]) {
			t.Errorf("%+v", c)
		}
	}
	rules := 0
	for _, f := range p.RuleFiles {
		var r struct {
			Groups []struct {
				Rules []struct {
					Alert, Expr string
					Labels      struct{ Severity string }
					Annotations struct{ Summary string }
				}
			}
		}
		if err := yaml.Unmarshal([]byte(deployed(t, f)), &r); err != nil {
			t.Fatal(err)
		}
		for _, g := range r.Groups {
			for _, a := range g.Rules {
				rules++
				if a.Alert == "" || a.Expr == "" || a.Labels.Severity == "" || a.Annotations.Summary == "" {
					t.Errorf("%+v", a)
				}
			}
		}
	}
	if len(p.ScrapeConfigs) != 1 || rules < 5 {
		t.Errorf("%d jobs, %d alerts", len(p.ScrapeConfigs), rules)
	}
}

// systemd understands the unit.
func TestUnit(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		cannot(t, "systemd-analyze is not installed")
	}
	unit := deployed(t, "backstory.service")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(unit, "\nExecStart=/usr/local/bin/backstory run\n") {
		t.Error("the unit does not run the program")
	}
	file := filepath.Join(t.TempDir(), "backstory.service")
	if err := os.WriteFile(file, []byte(strings.Replace(unit, "/usr/local/bin/backstory", exe, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(analyze, "verify", file).CombinedOutput()
	if err != nil || strings.Contains(string(out), "backstory") {
		t.Errorf("%v\n%s", err, out)
	}
}
