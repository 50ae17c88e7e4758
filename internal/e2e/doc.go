// Package e2e proves the promises of the whole sidecar against real servers: a source, an event log, Kafka. It has no code
// but tests.
//
//   - oracle_test.go: random concurrent workloads over every type and every kind of table. The log is compared with what
//     triggers saw, what a second slot saw, what a session recorded at known positions, and the tables themselves.
//   - crash_test.go: the sidecar, both servers, the network and Kafka fail at random moments while applications work. Each
//     kind of failure comes in each run, and meets a sidecar and an application that are at work.
//   - nemesis_test.go: everything that may happen in a long life, at random: crashes, alterations, partitions, a sidecar that sleeps, failovers,
//     slots and publications that are lost. After each gap the log has to be equal to the source again.
//   - memory_test.go: transactions and rows far larger than the memory that is allowed.
//   - confirm_test.go: what the source is told: all that the log has, whatever Kafka does, and when the sidecar ends.
//   - baseline_test.go, keyless_test.go, heal_test.go, takein_test.go: rows that were there before, and comparisons after a gap.
//   - schema_test.go, ddl_test.go, partition_test.go, kinds_test.go: tables that are altered, attached, dropped; event triggers.
//   - failover_test.go, decoding_test.go, upgrade_test.go, standby_test.go, guard_test.go: the life of the slot, on several servers.
//   - doctor_test.go: what doctor finds is really so, and its SQL mends it.
//   - start_test.go, slot_test.go, idle_test.go, context_test.go, writer_test.go, tamper_test.go, settings_test.go: what
//     Postgres really does, one fact at a time.
//
// The oracle of all of them is world (world_test.go), a fold of the log that knows nothing of package rebuild: a map from
// table and key to rows, which checks each event against the state before it.
//
// Environment:
//
//	BACKSTORY_TEST_PG_VERSION=14 … 18   the server's version
//	BACKSTORY_SEED=n                    the seed of every random choice; the default is another one each time, and is printed
//	BACKSTORY_ORACLE_SECONDS=n          how long the workloads of the oracle test last
//	BACKSTORY_CRASH_SECONDS=n           how long each crash test lasts
//	BACKSTORY_NEMESIS_SECONDS=n         how long the nemesis is at work, or longer, until everything has happened that must
//	BACKSTORY_MEMORY_ROWS=n             rows of the large transaction
//	BACKSTORY_MEMORY_MB=n               megabytes of rows of one megabyte
//	BACKSTORY_MEMORY_BOUND_MB=n         megabytes of memory that the sidecar may have
//
// make crash, make soak and make memory run these tests longer and larger. BACKSTORY_TEST_KAFKA: see internal/kafkaserver.
package e2e
