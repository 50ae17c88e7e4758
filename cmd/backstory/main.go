// Command backstory gives an existing application its history.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	_ "time/tzdata" // BACKSTORY_TZ works in an image that has no zones

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory/eventlog"
)

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2 // wrong use
	exitFound  = 3 // a check found something
)

// version is set when the binary is built.
var version = "unknown"

// exitError ends the program with a code of its own.
type exitError struct {
	code int
	err  error // nil: everything has been said
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	go func() {
		<-ctx.Done()
		stop() // a second signal ends the process at once
	}()
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	root := newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	code := exitFailed
	var ee *exitError
	switch {
	case errors.As(err, &ee):
		code = ee.code
		if ee.err == nil {
			return code
		}
	case errors.Is(err, eventlog.ErrBadRevision), errors.Is(err, eventlog.ErrBadEntity), errors.Is(err, eventlog.ErrBadURL):
		code = exitUsage
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "backstory: interrupted")
		return code
	}
	err = eventlog.Remedy(err)
	fmt.Fprintln(os.Stderr, "backstory:", err)
	if hint := eventlog.Hint(err); hint != "" {
		fmt.Fprintln(os.Stderr, "  →", hint)
	}
	return code
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Version: version,
		Use:     "backstory",
		Short:   "Gives an existing application its history: tails the write-ahead log of its Postgres database into an event log.",
		Long: "Gives an existing application its history: tails the write-ahead log of its Postgres database into an event log.\n\n" +
			"Settings are environment variables. BACKSTORY_SOURCE_URL names the database to capture: postgres://user:password@host:5432/shop.\n" +
			"The log is kept in it, unless BACKSTORY_LOG_URL names another. README, Settings, has all of them.\n\n" +
			"Begin with doctor, then init, then run. Exit codes: 0 done, 1 failed, 2 wrong use, 3 a check found something.",
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.AddCommand(newDemo(), newInit(), newRun(), newStatus(), newLog(), newShow(), newCheckout(), newVerify(), newSink(), newRules(), newDoctor())
	strict(root)
	return root
}
