// Command bench measures how fast backstory is: make bench, or go run ./internal/bench.
//
// # Purpose
//
// A figure of one machine says little about another one, and these machines have neighbours. So every figure that can be
// is a ratio to a limit that was taken in the same run on the same WAL: the server's own decoding, pg_recvlogical, the
// same Kafka client with messages that are ready. A run is a number of pairs; each pair measures both sides one after the
// other, in an order that rotates, and what is printed is the median of the pairs' ratios with the smallest and the
// greatest. The sidecar is measured as users run it: the program itself, as a process of its own.
//
// # What is measured
//
// Groups, by the names that -only takes:
//
//	full       1 M row changes, 25 per transaction, REPLICA IDENTITY FULL: run --once, against decoding and pg_recvlogical;
//	           memory, CPU, bytes per event, verify
//	rules      the same with 30 rules on the table, against full
//	default    the same with REPLICA IDENTITY DEFAULT, against full; rows updated in the order in which they were made,
//	           and at random
//	huge       1 M rows inserted by one transaction, against the same in transactions of 25
//	one-row    0.3 M transactions of one row, with context and without
//	steady     like full, but the log is in the source's own database and its own WAL is to be passed too
//	latency    commit → visible, 2 000 transactions a second
//	app        pgbench TPC-B with the sidecar, with pg_recvlogical, with nothing attached
//	baseline   5 M existing rows, against COPY FROM of the events that come of them, finished in a file, into a log of the same
//	           partitions, whose indexes are made afterwards; the same table without a key
//	checkout   1 M rows out of 3 M events
//	kafka      a log into a topic of a real broker
//
// The workload is that of an orders table (workload.go): half inserts, then half updates, each row once; every transaction
// has a context. It is loaded by one session on the server, not timed, with synchronous_commit off: that changes nothing in
// the WAL. Each pair loads it anew into a new database, so that all sides of a pair read the same WAL, all of it hot in the
// page cache, and none reads what another one has written: the slot is copied before the first side runs, decoding and
// pg_recvlogical are told where to end, and the sidecar ends at the WAL's end as it was when it started, before its log grew.
//
// # What could mislead
//
//   - The sidecar's time is that of the process, from start to exit: connecting, asking the source for everything that
//     start-up asks, building the indexes, ending. The decoding's time is that of one statement on an open connection.
//     Of small workloads (-quick) most is start-up; quick figures say only that everything runs.
//   - pg_logical_slot_peek_binary_changes keeps its result in a tuplestore, which goes to a file beyond work_mem. That is
//     part of the limit, as it was when the targets were set.
//   - Everything is on one machine. The log's writer, the walsender, the sidecar and the load share its cores; with more
//     cores the sidecar gains more than its limits, which are single processes.
//   - autovacuum is off and checkpoints come between the measurements, not in them (full-page images of old pages, too).
//     All sides gain by that.
//   - steady decodes the log's own WAL after the workload's, not in between: the sidecar has nothing else to do meanwhile,
//     so real life, where both overlap, is not slower than this figure.
//   - Latency is seen by a reader that asks for the head every millisecond, which is in the figure; a transaction's clock
//     starts when its client has got the answer to COMMIT, so the time the commit itself takes is not in it. The load
//     generator is open-loop: it does not wait for us; how late it was is printed beside the figure.
//   - app saturates both cores on purpose. The sidecar may fall behind meanwhile, which would flatter it: how far, and how
//     long it took to catch up, is printed, and a second ratio counts that time.
//   - The tables of app hold rows before the history begins (init --no-baseline), so each row's first change finds nothing in the log.
//   - The limit of baseline makes its indexes one after the other, as psql would; the sidecar makes two of them at a time.
//   - The memory is the peak of the resident set (VmHWM), read every 10 ms: getrusage's figure of a child begins with that
//     of its parent. It includes the program's own pages.
//   - The Kafka limit is one broker of one copy on the same cores. Ready messages are sent by the same client through
//     Produce, which encodes them; finished record batches through RawProduce are printed too: what the broker takes.
//
// # Failure handling
//
// What cannot be measured here (a program is missing, no Java) is printed in capital letters, and is no error. A side that
// does not do all of its work is one: every run checks that what it measured happened (positions, indexes, slot, rows,
// offsets). A group that fails does not keep the next ones from running; the exit code is 1 then. A missed target makes it 1
// only with -strict. Ctrl-C ends servers and processes and prints what there is.
package main
