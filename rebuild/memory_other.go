//go:build !unix

package rebuild

func osAlloc(n int) []byte { return make([]byte, n) }

func osFree([]byte) {}
