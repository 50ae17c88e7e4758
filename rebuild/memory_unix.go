//go:build unix

package rebuild

import (
	"fmt"
	"syscall"
)

// osAlloc takes memory from the operating system.
func osAlloc(n int) []byte {
	b, err := syscall.Mmap(-1, 0, n, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		panic(fmt.Sprintf("out of memory: mmap of %d bytes: %v", n, err))
	}
	advise(b)
	return b
}

// osFree gives it back.
func osFree(b []byte) {
	if err := syscall.Munmap(b); err != nil {
		panic(fmt.Sprintf("bug: munmap: %v", err))
	}
}
