package eventlog

import (
	"os"
	"testing"

	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

func TestMain(m *testing.M) { os.Exit(pgservertest.Main(m)) }
