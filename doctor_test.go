package backstory

import (
	"strings"
	"testing"
)

func TestGrowthOfTheLogIsANote(t *testing.T) {
	if f := grows(500<<30, 1<<30-1); f != nil {
		t.Errorf("%+v, want nothing", f)
	}
	if f := grows(500<<30, 3<<30); f == nil || !strings.Contains(f.What, "500 GB of the source's own disk, and 3 GB more every day") {
		t.Errorf("%+v", f)
	}
}
