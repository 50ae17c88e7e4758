package main

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What README and deploy/ tell to set is a setting, README has them all, and the example can be used as it is.
func TestSettingsInDocumentsExist(t *testing.T) {
	root := filepath.Join("..", "..")
	read := func(name string) string { return repositoryFile(t, name) }
	known := fields()
	name := regexp.MustCompile(`BACKSTORY_[A-Z0-9_]*[A-Z0-9]`)
	deployed, err := filepath.Glob(filepath.Join(root, "deploy", "*"))
	if err != nil || len(deployed) < 5 {
		t.Fatalf("deploy has %v, %v", deployed, err)
	}
	readme := read("README.md")
	texts := map[string]string{"README.md": readme, "CHANGELOG.md": read("CHANGELOG.md")}
	for _, f := range deployed {
		n := filepath.Join("deploy", filepath.Base(f))
		texts[n] = read(n)
	}
	for where, text := range texts {
		for _, n := range name.FindAllString(text, -1) {
			if _, ok := known[n]; !ok {
				t.Errorf("%s names %s, which is no setting", where, n)
			}
		}
	}
	for n := range known {
		if !strings.HasSuffix(n, "_FILE") && !strings.Contains(readme, "`"+n+"`") {
			t.Errorf("README does not have %s", n)
		}
	}

	example := read(filepath.Join("deploy", "backstory.env.example"))
	used := 0
	for _, m := range regexp.MustCompile(`(?m)^#?(BACKSTORY_[A-Z_]+)=(.*)$`).FindAllStringSubmatch(example, -1) {
		t.Setenv(m[1], m[2])
		used++
	}
	s, err := readSettings()
	if err != nil || used < 5 || s.SourceURL == "" {
		t.Errorf("the example has %d settings: %v", used, err)
	} else if err := s.config(nil).Capture.WithDefaults().Validate(); err != nil {
		t.Errorf("the example: %v", err)
	}

	// The image is built with the Go that go.mod asks for.
	if m := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(read("go.mod")); m == nil || !strings.Contains(texts["deploy/Dockerfile"], "FROM golang:"+m[1]+" ") {
		t.Errorf("go.mod says %v, the Dockerfile another Go", m)
	}
}
