package rebuild

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// tempDir is where the tests' folds put their temporary files. It must be empty at the end.
var tempDir string

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child(os.Args[1:])
		return
	}
	var err error
	if tempDir, err = os.MkdirTemp("", "backstory-rebuild-test-"); err != nil {
		panic(err)
	}
	code := pgservertest.Main(m)
	if left, err := os.ReadDir(tempDir); err != nil || len(left) > 0 {
		fmt.Println("temporary files are left:", left, err)
		code = 1
	}
	_ = os.RemoveAll(tempDir)
	os.Exit(code)
}

// discard is a target that drops its rows, made as for COPY.
type discard struct{}

func (discard) Begin(context.Context, []*Table) error              { return nil }
func (discard) Table(context.Context, *Table) (TableWriter, error) { return discard{}, nil }
func (discard) Commit(context.Context) error                       { return nil }
func (discard) Abort()                                             {}
func (discard) NewEncoder() Encoder                                { return &copyEncoder{} }
func (discard) Write([]byte) error                                 { return nil }
func (discard) Close(err error) error                              { return err }
