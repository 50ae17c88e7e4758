//go:build !linux

package main

import (
	"errors"
	"testing"

	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

func smallDisk(*testing.T, *pgservertest.Server, int) (string, error) {
	return "", errors.New("a small disk is made on Linux only")
}
