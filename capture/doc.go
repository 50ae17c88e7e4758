// Package capture turns the write-ahead log of a Postgres source into batches of row changes. It is the only package that
// knows the replication protocol; what it hands over are the types of package eventlog.
//
// # Life of a session
//
// [Stream.Run] makes sessions until its context ends. A session connects twice: once for replication commands, once for
// the catalogue. Before it starts it asks the server who it is, on which timeline, how far its WAL is flushed, where the slot
// stands and what is published, since START_REPLICATION itself refuses nothing: beyond the server's end it would skip in
// silence (checkStart, checkPublications). It starts from where the slot is, which may be before the end of the log: what it is told
// again has to be what the log has (again), which no position tells of a source that was put back to an earlier state. A point where the log may lack changes is a [Gap]: it ends the stream, is written into
// the log as an event, and waits for a person. Everything else that passes by itself (restart, cut network, slot still held by
// the connection before) is tried again with growing pauses.
//
// One goroutine, that of Run, owns the replication connection: it receives, decodes into the batch at hand, answers
// keepalives, and hands batches over. While the log is busy it goes on receiving until the batch is full (Config.MaxBatchBytes),
// then it waits, still answering; memory is bounded by a few batches plus one row change. A second goroutine asks the source
// once a second for the end of its WAL, which the stream does not tell, and so finds out when the server takes nobody any more: a
// fast shutdown waits for the walsenders' clients to confirm everything, without limit, and a log on the same server can confirm
// nothing by then. The session ends, and the server can.
//
// # A standby that decodes
//
// With Config.StandbyURL the slot is on a hot standby (standby.go): so are the replication connection and whatever concerns the slot. Everything
// else stays with the primary, and what the catalogue says may be newer than the stream by the standby's lag, which changes nothing (see Tables). The
// slot is made when the standby has replayed the publications; what it needs for that, the list of running transactions, the primary writes
// (pg_log_standby_snapshot). Whether a table is empty where the slot begins is looked up on the standby, in the snapshot that came with it; existing rows
// are read on the primary, after all transactions have ended that had begun when the slot was there.
//
// In the middle of a stream a standby comes to another timeline, when it is promoted or follows another primary, and the stream does not say so. Event ids
// and the check for lost transactions go by the timeline, so before each batch is handed over the standby is asked on which one it is, on
// a replication connection of its own: it has replayed what it has sent. If that is another one than when the session began, the batch is dropped
// and comes again in the next session, which knows where the timeline changed (session.sure). A standby that was restarted may be behind the
// log's end for a moment: only what the primary has lost is a gap.
//
// # pg_upgrade
//
// It makes another system of the source, which is the same source all the same if nothing can be missing (upgrade.go). Half of the proof is made when the old
// server is shut down: a walsender ends the stream by itself only when everything that the server has is confirmed, so a session waits for that
// ([ErrClosed]), and the log takes a note, which the next writer removes. Tried and left: the same OIDs, which a restored dump can have; the WAL's
// positions alone, since a slot may be made by hand anywhere; the number of transactions, of which nobody knows what others have used.
//
// # Acknowledgement
//
// The source is told what the log has durably committed, never more (Stream.Flushed): after each second in which that
// moved, every ten seconds otherwise, and whenever it asks. All three positions of a status update are set. A keepalive's
// position counts only while no transaction is open and nothing is unflushed; it is recorded by the log at most every ten
// seconds, or the log's own WAL would keep an idle server busy for ever.
//
// # Existing rows
//
// [Import] reads the rows that existed before a table was captured: each chunk in one REPEATABLE READ transaction, whose lock on the table comes
// before its snapshot (a snapshot older than a rewrite would see an empty table), and which ends with a logical message, the chunk's
// mark. When the session meets the mark, it puts the chunk into the batch; what becomes of its rows is decided by package eventlog, since
// only the log knows what has changed meanwhile. The order of WAL is not that of visibility: a commit may be in the stream and
// not yet in the snapshot, as long as it waits for a synchronous standby. So nothing depends on when a chunk was read, only on where its mark
// lies: everything that the snapshot sees was committed before the mark. The mark carries a nonce, as anybody may emit messages; one that is
// not known any more (of a process before, of a transaction that was rolled back) means nothing, and its rows are read again. The mark's
// commit does not wait for synchronous standbys.
//
// Rows are read by the key's own operators, those of its index: an extension's type may have others than the ones that are found by
// name. Two chunks of a table may be on their way, so that reading and appending overlap.
//
// # Speed
//
// The server sends every row change by a send() of its own. While the stream is behind, the reader sleeps 0.2 ms before each
// read, so that one read takes many changes, and the socket is kept out of Go's network poller, whose epoll would be woken by
// each of them (internal/coalesce): 10 s of CPU for 1 M rows with the poller, 4 s without. The sleep is a system call, since a
// timer of Go takes a millisecond when nothing else runs, in which a Unix socket's buffer (some 170 changes) fills up and the
// server has to wait. Two batches follow each other after 2 ms at the earliest, so that under load many transactions share one
// commit of the log, and after up to 30 ms where the log works longer over them than what is in them takes: the machine is busy
// then, and each batch, each read, each look-up costs the application something whatever is in it (pgbench on both cores: 0.79 of
// what pg_recvlogical leaves with 20 ms at most and reads every 2 ms, 0.85 so; 8 % of the processor goes to the log's backend, 5 % to
// the sidecar, half of that to waking up, 1 % to look-ups, and the walsender passes the log's own rows).
//
// From a commit to its being visible in the log (2,000 transactions a second, log in the source's database): the walsender's wake-up,
// up to 2 ms until the batch is handed over, then a COPY and a commit of the log, whose flush shares the disk with the application's
// own. On a quiet machine the median is 3.1 to 5 ms, of which the log's step is 2.5 to 3; where commits of the application alone take
// 3 ms and 84 % of the cores are busy, it is 12 ms without the pauses above and 25 ms with them: they trade it for the application's
// rate. Tried and left: handing over at once (each commit of the log then costs more processor than what is in it), and letting readers
// see what is not yet flushed (a crash of the log's server would take back what a reactor has sent).
//
// Of the server's side nothing can be saved: for each record of the WAL the walsender asks its socket for news, for each change it
// sends. Tried and left: pgoutput's option binary (within the noise here); reading by pg_logical_slot_peek_binary_changes, which
// needs no system calls (half the CPU), but decodes again from the slot's restart_lsn with each call, and keeps its whole result
// on the source's disk.
//
// # Tables
//
// Partitions are published as leaves: publish_via_partition_root drops the TRUNCATE of one, and neither way tells of ATTACH, DETACH and DROP. Each
// is captured, read and looked up as the table that it is, with its own columns, key and identity; to the log it says which partitioned
// table its rows belong to (eventlog.Relation.Table), and a checkout joins what belongs together at its moment. That it was attached,
// detached or dropped the catalogue tells (alter.go). Tried in thought and left: rows of an attached table as imports and of a detached one as
// deletes, which are as many events as it has rows and say less than one.
//
// Tables with a usable replica identity are in one publication. The others, whose UPDATE or DELETE Postgres would refuse if
// they were in it (no key, a deferrable one, a dropped identity index, NOTHING, on 18 FULL with generated columns), are in
// a second one that publishes inserts and truncates only: the application is never harmed. A table that loses its identity later
// is moved there within seconds, by the session's watch or, while there is no session, by whoever waits for one (Protect); the
// stream then ends where that was found, a [Narrowed], so that the log notes from where on it lacks changes (narrow.go). Tried in
// thought and left: a logical message in the transaction that moves the table would give the exact place, but anybody may emit
// one, and who moves a table by hand does not. A table that somebody takes out of its publication ends the stream at once, a [Missed] (publication.go):
// it gets a gap of its own, and what the stream tells of it until it is captured anew says nothing of what was before. Relation messages carry names and
// types; key, type names and domains come from the catalogue, which may be newer than the stream: what it does not know any
// more is taken as text.
//
// Generated columns are not in the stream. Before PostgreSQL 18 no source sends them (PostgreSQL manual, "Generated Column Replication"); from 18 on
// publish_generated_columns = stored could, and the publications leave it at none. What the source computes from the other columns follows from
// them and the expression, which the log has of each revision, and which Postgres wants immutable: a checkout computes it again (rebuild.Schema).
// So rows have one form on every version, a publication that was made before goes on after pg_upgrade, STORED and VIRTUAL columns, which no
// publication can send, are the same to the log, and SET EXPRESSION, which gives every row another value, makes no event of a row. What that costs: an expression that
// calls a function whose body somebody has replaced gives what it gives now, and 18 refuses updates of a published table with REPLICA IDENTITY FULL and
// STORED columns, of which only inserts are captured therefore. Where somebody sets the option, that is an alteration of the publication, a gap, and doctor says
// so (publication-options): the stream then describes such a table otherwise than the catalogue, as if it were altered time and again.
//
// What ALTER TABLE does to the rows that are there is in no stream, and the description of a table comes with its next row change. So the catalogue
// is looked at (alter.go): versions of its rows in pg_attribute, the table's file, its key, what its user-defined types are made of. Attributes
// that were changed and another file together mean a rewrite; a file alone is VACUUM FULL, CLUSTER or TRUNCATE. Where the only change of
// attributes is that their missing values went away, it is VACUUM FULL or ALTER TABLE, and taken for the latter. Attributes whose
// catalogue rows are newer than the transaction that the stream is at may be others than they were: their numbers are not taken. Those that this very
// transaction has written may be newer than the row change, too; where the stream has the same columns in the same places, they are not.
//
// With event triggers (ddl.go) the transaction itself tells, in its place. What they say of a table describes its rows until they say something
// else, also where the catalogue is far ahead; and how complete a table is then follows from what the log had before it, not from the
// catalogue. The catalogue is looked at all the same: a trigger may be disabled, and types are not in what it tells.
//
// # Doctor
//
// Examine looks at everything that README, What doctor looks for, lists: a table of parts (doctor.go), each of which may fail alone, within bounds
// of time and locks. A check has to be false on a healthy server, and its SQL has to make it so: internal/e2e makes each thing really so, looks, runs
// the SQL, and looks again. SQL never gives a superuser's rights away, and never touches a publication's row in the catalogue where that would
// be a gap. Tried and left: values over 1 GB, which nothing cheap tells of (the statistics have the width of TOAST pointers); the role's
// statement_timeout, transaction_timeout, lock_timeout and the idle timeouts, which our sessions set themselves; generated columns, which every
// healthy source may have.
//
// # Values over 1 GB
//
// The source makes text of each value, and of each row one message, for which it has 1 GB: beyond, it fails at this place of its WAL, for every reader and at each
// attempt (streamError), and when the row is read (unread). That is a gap, named as such, since whatever lies behind waits for it; the table has no baseline until the value is smaller.
// Tried and left: pgoutput's option binary, with which the source sends such a bytea. The log could not hold it, as its JSON is text of the same 1 GB; every type would
// need a second decoder, to the very text that the source prints, where types of extensions have no binary form that anybody has written down; a text or a row of more than
// 1 GB fails all the same; and memory would be bounded by such a row.
//
// # Protocol 2
//
// The stream is of protocol 1: a transaction comes when it is committed. With protocol 2 the source would send large ones while they are open, and
// the sidecar would keep them on its disk until then. That would spare others the time that the source takes to decode a large transaction,
// which is not what they mostly wait for: 1 M rows inserted by one transaction took 9.0 s (8.2 to 9.5) from the WAL to the log, the same in
// transactions of 25, which the source decodes more than twice as fast, 7.6 s (make bench, group huge: median of five pairs, AMD EPYC VM, 2 cores, PG 15.18). The log takes events in the order
// of commits, at the rate at which its server takes them. What is open would be written three times then, in the WAL, here and in the log. Left out for that;
// the source's own spilling, which logical_decoding_work_mem bounds, and pg_stat_replication_slots counts, stays.
//
// # Not obvious
//
//   - A table without a primary key whose replica identity is an index is known by the columns of that index: they are its key in
//     the log, and a checkout makes them the primary key.
//   - The walEnd of XLogData is the position of the change itself, not the end of the server's WAL.
//   - Old tuples of kind K have NULL in every column that is not part of the identity: that is not a NULL of the row.
//   - Only messages that are transactional and have the prefix backstory or _bemi are context; anybody who can log in may
//     emit others.
//   - regclass, regtype and the like are in the log by the names that they printed as at the time, as the source sends them: its OIDs are in no
//     message. Renamed or dropped since, a name may mean nothing to the source of now; a checkout then keeps it as text.
//   - A transactional message has its end for its place in the WAL, which is where the next record begins: a row change right after it, of the
//     transaction around its subtransaction, is sent before it.
//   - Nothing is decided by the slot's statistics, which may go back at any time. A slot that was made again begins beyond the log's end, or where
//     nothing is missing; what one that was not tells again has to be what the log has.
//   - Slot names are not quoted by replication commands, so they are held to [a-z0-9_].
package capture
