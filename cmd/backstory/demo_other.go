//go:build !unix

package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func newDemo() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "A small shop at work on a Postgres of its own, with the sidecar on it (not on this system).",
		RunE: func(*cobra.Command, []string) error {
			return errors.New("the demo runs on Linux and macOS only")
		},
	}
}
