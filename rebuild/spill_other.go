//go:build !unix

package rebuild

import "os"

// unnamedFile opens a temporary file. Here it keeps its name until it is closed.
func unnamedFile(dir string) (*os.File, error) { return os.CreateTemp(dir, tempPattern) }

const keepsName = true
