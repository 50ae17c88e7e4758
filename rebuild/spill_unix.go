//go:build unix && !linux

package rebuild

import "os"

func unnamedFile(dir string) (*os.File, error) { return removedFile(dir) }

const keepsName = false
