package main

import (
	"os"
	"runtime/pprof"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory"
)

func newRun() *cobra.Command {
	var once bool
	c := &cobra.Command{
		Use:   "run",
		Short: "The sidecar: captures the source into the event log and feeds the reactors, until it is stopped.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := readSettings()
			if err != nil {
				return err
			}
			log, err := s.logger()
			if err != nil {
				return err
			}
			cfg := s.config(log)
			cfg.Once = once
			if f := os.Getenv("PROF"); f != "" {
				w, _ := os.Create(f)
				_ = pprof.StartCPUProfile(w)
				defer pprof.StopCPUProfile()
			}
			sc, err := backstory.New(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			defer sc.Close()
			return sc.Run(cmd.Context())
		},
	}
	c.Flags().BoolVar(&once, "once", false, "end when everything up to the source's WAL position at the start is in the log")
	return c
}
