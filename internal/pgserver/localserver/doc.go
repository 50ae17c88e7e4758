// Package localserver has what pgserver and kafkaserver need alike: a cache for fetched programs, a scratch
// directory, a free port, and a child process that does not outlive us.
//
// Invariants:
//
//   - A directory in the cache is whole: it is filled beside its place under a file lock and renamed into it.
//     Several processes may ask for the same one at the same time; one fetches, the others wait.
//   - A scratch directory belongs to the process that holds the lock on it. The kernel drops the lock when the
//     process dies, however it dies, and the next NewScratch sweeps the directory away.
//   - A child gets a signal when we die (Linux only). It has its own process group, so Ctrl-C in a terminal reaches
//     us and not the child: we end it in our own order.
//
// Goroutines: Start runs one for each child, locked to its thread because Linux sends the death signal when the
// thread that forked ends, not the process; it stops when the child has ended. Install runs one for each call; when
// ctx ends first, it finishes the fetch behind the caller's back and then stops, so that the cache stays whole.
//
// Not promised: on other systems than Linux a child lives on when we are killed with SIGKILL. Postgres then stops by
// itself within a minute of the sweep, because its lock file is gone.
//
// Windows is not supported.
package localserver
