package rebuild

import "syscall"

// advise asks for large pages: state is looked up all over the place, and the processor remembers where few pages are.
func advise(b []byte) {
	if len(b) >= 4<<20 {
		_ = syscall.Madvise(b, syscall.MADV_HUGEPAGE) // without them it is only slower
	}
}
