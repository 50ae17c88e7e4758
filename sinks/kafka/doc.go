// Package kafka sends events to Kafka topics, each once, in order per aggregate.
//
// # What arrives
//
// Key: Order/42 (ids alone would collide in a topic that several aggregates share). Value: the event as JSON
// (eventlog.Event.AppendJSON). Headers: id (the idempotency key for consumers), type, position, occurred_at, aggregate,
// rules_version, and log, which names the log and the reactor whose position it is. Partition: murmur2 of the key, as the Java
// client computes it. Timestamp: when it was sent, not when it happened, because brokers delete by it: replayed history would
// be gone at once from a topic with retention. There are no tombstones: a deleted row is an event, too.
//
// One topic, or a template with {aggregate}, {schema}, {table}. A topic is never created unless Config.CreateTopics says so.
//
// # Once, not twice
//
// kafka-go has no idempotent producer. It has what is needed to be one: InitProducerId and a request that takes batches
// already encoded. So the sink encodes record batches itself (record.go) and gives them a producer id and sequence numbers; with
// at most one request on its way per partition.
//
//   - A write whose outcome is not known (time-out, connection lost) is repeated as the same bytes. The broker recognizes
//     producer and sequence: if it has the batch it says "written" and writes nothing. A request that was delayed and arrives
//     after its repetition is recognized in the same way.
//   - A new process (or one without its checkpoint) reads each partition's end backwards to the last record with our log
//     header. Its position tells what the partition has: events go into a partition in the order of their positions. Its
//     batch tells producer, epoch and sequence of our last write, and the new process continues them. That is a
//     compare-and-set on the end of the partition: if a request of the dead process arrives later, one of the two comes
//     first, and the broker refuses the other. Where the broker says "written" to the first batch, the sink reads it back,
//     since that may be the dead process's batch under the same sequence. A paused process that wakes up is refused, too.
//   - A sequence that the broker does not expect ends the attempt; before the next one the end of the partition is read again.
//
// Special cases: records of others and transaction markers are passed over. An end that retention has emptied: the checkpoint
// holds. Partitions that were added change where keys go; so when a key at a partition's end belongs elsewhere, or a partition
// has nothing of ours while others are ahead of the checkpoint, the topic is read back to the checkpoint and events are
// compared one by one. While a process runs, new partitions are used from the first Send after a complete one. A topic that
// holds events which the log does not have (the log was restored, or cloned) is refused (sinks.ErrOtherHistory).
//
// # What is not promised
//
//   - A topic that holds nothing of ours gives no producer to continue. A reactor that has run before waits Settle after its
//     start before it writes to one; a first batch of a dead process that arrives later than that comes twice.
//   - The broker forgets a producer a day after its last write (producer.id.expiration.ms). A request that is delayed by more
//     than that comes twice.
//   - With NoIdempotence, a request that is delayed by more than Settle comes twice.
//   - If retention empties a partition between our last write and a restart, events between checkpoint and that write are sent
//     again (without those that they repeat).
//   - A crash in the seconds after a restart that followed an increase of partitions, twice in a row, can repeat events.
//   - If Kafka loses what it has confirmed (unclean leader election, a topic deleted and made again), that is logged as an
//     error with both offsets; the events are still in the log, and are not sent again by themselves.
//   - Order per aggregate does not span an increase of partitions; that is Kafka's own rule.
//   - In a topic that others fill with more than 256 MB after our last record, the checkpoint is relied upon, and said so.
//
// # Failure handling
//
// judge sorts the outcome of each request: written, certainly not written, too large (batches are halved; a single event that
// the topic does not take is an error with the command that raises the limit), out of sequence, or uncertain, which is
// everything that is not known to be one of the others. explain adds to an error what to do about it. After any failure the
// transport's connections and its knowledge of leaders are thrown away.
//
// # Speed
//
// Send encodes 2 MB, and while that is on its way encodes the next; requests hold up to MaxBatchBytes per partition. Encoding
// straight into the bytes of a batch costs less than kafka-go's records do, which pays for part of reading the log.
// BenchmarkKafka compares with kafka-go sending the same messages ready-made; make bench does so as part of the whole program.
//
// Where the time goes, per event of 300 B, log and broker on the same two cores (AMD EPYC VM, PostgreSQL 15, Kafka 4.1): 2.9 µs in the
// log's backend, which sends fourteen columns at some 60 ns each and the row; 4.2 µs in Go, of which 1.4 µs take the row apart, 0.7 µs
// write the JSON, and the rest is the record batch, its checksum and system calls; 5.4 µs in the broker. Ready-made messages cost the
// broker's share and 2 µs. So 0.74 of their rate is what is left (0.63–0.82), and the wanted 0.8 would take a log that is read for half
// a microsecond less. Tried: leaving columns out (done: those that are NULL cost nothing), merging who and why here instead of by a join
// (done: −0.9 µs), two reading connections (no gain: the cores are busy), larger windows and batches (noise).
//
// # Goroutines
//
//	what                     owner          ends when
//	drainAll, one at a time  Sink.attempt   its part is written, or failed
//	drain, up to Requests    Sink.drainAll  a partition's batches are written, or one failed
//	readTails                Sink.openTopic the partitions are read
//	those of kafka-go        its Transport  Close; a request that outlives its context ends with RequestTimeout
//
// # Tried and rejected
//
// kafka.Writer: it retries by itself with new bytes, and hides which partition failed. Transactions: consumers would have to
// read committed, and each batch would cost two more round trips. A transactional id only to fence the old process: the fence
// falls when the new one first writes, the sequence holds before. Fencing by waiting alone: too short is wrong, too long is
// slow.
package kafka
