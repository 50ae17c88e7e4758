// Package pgserver starts real Postgres servers for the demo, the tests and the benchmarks.
//
// # Purpose
//
// Nothing has to be prepared: a local installation is used where there is one, otherwise the server's programs are
// fetched once (14 to 18, about 15 MB each, 60 MB unpacked) and kept in the user's cache directory. It is not a way to
// run a database for production: everybody who can reach the loopback interface is let in as superuser.
//
// # Life of a server
//
// Start finds the programs (binaries.go, fetch.go), runs initdb unless the data directory holds a cluster, writes
// backstory.conf and backstory_hba.conf into it, starts the postmaster and waits for the line "ready" in
// postmaster.pid. Port, socket directory and data directory stay the same over Restart and Kill. Stop is the end; it
// removes what Start made, but never a data directory that the caller named.
//
// Settings live in backstory.conf, which postgresql.conf includes last, so ALTER SYSTEM still wins over them, as in
// any other installation. Port and socket directory are on the command line, where nothing wins over them.
//
// # Users
//
// Postgres refuses to run as root. Then initdb and postgres run as the owner of an existing data directory, else as
// the user postgres, or nobody if there is none; the data directory is given to that user, and every directory on the
// way to it must be open to them (an error names the one that is not; /root usually is not).
//
// # Failure handling
//
//   - The server does not come up: the error has the end of its log. A port that somebody took between our look and
//     the server's bind is replaced by another one, unless the caller had set it.
//   - ctx ends during Start or Restart: the server is killed, and nothing is left behind.
//   - A stop that takes too long (stopLimit) goes on to the next harsher mode, and the error says so.
//   - We die: the kernel sends the postmaster SIGQUIT (immediate shutdown; Linux only). A temporary data directory is
//     swept away by the next Start of anybody's. See package localserver.
//   - Kill leaves no process and no shared memory: the postmaster is stopped first, so that it forks nothing more.
//   - Two processes fetch the same version: the second waits for the first. See localserver.Install.
//   - initdb is cut short: a data directory that Start created appears by rename, when it is complete; one that existed
//     empty is emptied again, unless we are killed during initdb.
//
// # Tried and rejected
//
// The library that fetches the programs can also start them, but neither as another user nor with the log and the
// modes of shutdown that we need; so it only fetches (see fetch.go for how it is kept from more). pg_ctl: it would
// stand between us and the postmaster, which then could not be told that we died. The fetched programs are initdb,
// postgres and pg_ctl with the contrib extensions; there is no psql, pg_dump or pgbench among them.
package pgserver
