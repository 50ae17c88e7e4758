package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/backstory-dev/backstory"
)

func newInit() *cobra.Command {
	c := &cobra.Command{
		Use:  "init",
		Args: cobra.NoArgs,
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
			p, err := backstory.Prepare(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			d, err := backstory.Init(cmd.Context(), cfg, p, func(b []string) { fmt.Println("waiting for", b) })
			if err != nil {
				return err
			}
			fmt.Printf("%+v\n", d)
			return nil
		},
	}
	return c
}
