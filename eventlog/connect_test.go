package eventlog

import (
	"strings"
	"testing"
)

// What a URL or the environment says of a setting that changes the text of values is not sent, in whatever letters: of two values for
// one setting the server would take either.
func TestOurSettingsAreTheOnlyOnes(t *testing.T) {
	t.Setenv("PGTZ", "Asia/Tokyo")
	cfg, err := ConnConfig("postgres://u@h/d?timezone=Asia/Tokyo&datestyle=SQL,DMY&EXTRA_FLOAT_DIGITS=-5&application_name=mine&work_mem=8MB", "backstory")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	for k, v := range cfg.RuntimeParams {
		if old, ok := seen[strings.ToLower(k)]; ok {
			t.Errorf("%s is sent as %q and %q", k, old, v)
		}
		seen[strings.ToLower(k)] = v
	}
	for k, v := range SessionSettings {
		if seen[strings.ToLower(k)] != v {
			t.Errorf("%s is %q, want %q", k, seen[strings.ToLower(k)], v)
		}
	}
	if seen["application_name"] != "mine" || seen["work_mem"] != "8MB" {
		t.Errorf("other settings are %v", seen)
	}
}
