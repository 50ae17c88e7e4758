// Package eventlog is the centre of backstory: the append-only log of typed events, and everything that is true of it
// whatever fills or reads it. It knows neither the source (package capture) nor calculators (rebuild) nor destinations
// (sinks).
//
// # Life of a row change
//
// The source's words arrive as a [Batch] of items: begin, row changes, context messages, commit. [Writer.Append] turns each
// row change into events by the table's typing rules, gathers them in COPY's binary form and commits them, many source
// transactions at a time, together with the head of the log. What [Writer.Head] says is durable and visible, and only then may
// the source be told (EndLSN). While much more is to come (Batch.Backlog), one step is on its way to the log in a goroutine of
// its own, and the events of the next are made meanwhile; otherwise Append waits for its step.
//
// # Invariants
//
//   - Positions are dense: 1, 2, 3 … in commit order. A reader never goes beyond head.position, so it never sees half a
//     transaction and never misses one that commits late.
//   - A transaction larger than 2 MiB is written in several transactions of the log, beyond the head; the head moves
//     over all of it at once. What a crash leaves beyond the head is removed by the next writer, and comes again from the
//     source. So a log transaction stays small, and the source's own decoding never spills because of us.
//   - One writer: a new one raises the epoch in the head, and every append is a compare-and-set on it. A process that slept
//     through a take-over cannot append (ErrFenced).
//   - synchronous_commit of the append session is never below on, whatever the role's settings say.
//   - An event's id is a function of (system, database, incarnation, timeline of the commit, commit LSN, ordinal of the row
//     change, part): see [ID]. Nothing of it is stored that is not needed to compute it.
//   - The log skips transactions whose commit LSN it already holds: redelivery changes nothing.
//   - Unknown is not NULL. What the source did not send and the log does not know is named in metadata.unknown.
//
// # Before and after
//
// With REPLICA IDENTITY FULL the row before comes with the stream. Otherwise it is the row's last state as the log itself
// knows it: from a cache of bounded size (Config.MaxCacheBytes), or from the row's last event, of which a batch asks for
// all that it needs in one query a table, on a connection of its own. No look-up folds a history: an update carries its
// unchanged attributes too (column rest) where they are small (256 bytes), and otherwise at the latest in every 16th event of a
// row (FULL, which needs no look-ups: in a sixteenth of all, by a hash of its place). Values longer than 1 KiB are not cached;
// the cache remembers which event holds them. A row that the log has never seen becomes an import with metadata.first_seen.
// So does one that changes for the first time since a gap: what such an event does not know is as it was, once the log is complete again.
// What a row was before a comparison (…Healed) is what was last told of it by its key: what happened while its table had none is told of rows that are known by
// their content.
//
// The cache has two generations, each in one piece of memory (state_cache.go). What is dropped was put before the last time
// that something was dropped, and so belongs to a step that has arrived: a look-up never misses what is on its way.
//
// # Existing rows
//
// Chunks of rows that existed before their table was captured come with the stream, each at a place in the WAL (baseline.go): at that place it
// is decided which of its rows are news. Imported rows are not put into the cache, where a million of them would drive out what is
// needed; a look-up waits for those that are on their way. How far a table is, is recorded in the transaction of the log that has the
// chunk. The last one makes the table complete, from the note …BaselineEnded on.
//
// A row can lack a column then only if it was changed before its chunk came (unchanged TOAST is not sent) and went by that to a key that
// the chunks had passed: such a table is read a second time, for what its touched rows lack. Tried in thought and left: remembering
// those keys (a set without a bound, lost with the process); reading by blocks of the table instead of by its key (a rewrite or a repack
// moves rows without a word in the stream).
//
// Tables without a key are read by blocks, in one snapshot (contents.go). Tried in thought and left for them: a second slot whose exported
// snapshot has an exact place (what is held back by a synchronous standby is not in it either, and a slot waits for every open transaction);
// going on where a kill interrupted it (a row that moved within the file would be counted twice, or never); the source sorting by
// content (its temporary files).
//
// So are tables with a key of which only inserts are in the stream, in the order of that: nothing would tell of a row that goes to another key
// between two chunks. Read anew, they are compared with what was imported before; and so is, the first time, what the stream has inserted before the snapshot.
//
// Where the log has a history of the table that may be outdated (a gap, a time in which it was left out), the same chunks are compared with
// the last state that it ever had of their rows, and then its own keys are looked for in the source (heal.go).
//
// # Altered tables
//
// A version of a table in the schema history says which columns it has, by number, and what value a column has in rows from before it was
// added (Column.Missing), so neither a new name nor a constant default needs an event: who puts a row's state together from events of
// several versions maps them by number (columnsSince). What the catalogue, which may be newer than the stream, does not tell of a version
// is taken from the version before (Writer.actual). Rows that ALTER TABLE may have changed are compared: unlike after a gap, everything that the
// log has of them counts, so each row of a chunk is looked up, and yields only to a change that the chunk's snapshot does not see
// (compareAll). The log's position when the comparison began tells old changes from new ones: transaction ids of before it may have been
// used again.
//
// Each alteration has an event, made by an empty chunk before the rows are compared; whether an event trigger has told of it already is recorded with the baseline.
// A table that is being read, and whose rows need not be compared for it, goes on to be read: its chunks tell of its new shape.
//
// A table whose rows the stream names by another index than before (REPLICA IDENTITY USING INDEX) is compared as well, and each row becomes an event
// even if nothing of it differs: events of before do not have its new name (row_id), under which it is looked up from now on. Until then
// a delete finds no row, and a change of the key is an import under the new one; the comparison ends what the source does not have any more.
// Tried in thought and left: looking for such rows in the events' data, which no index helps with.
//
// The source sends the columns of a row in the order of their numbers. Where a description has them in another order, by their names, these have been
// swapped since, and the order counts (inOrder).
//
// # Physical shape
//
// One row per event in backstory.event, partitioned by position. What events have in common (source, table version,
// aggregate, type, operation, version of the rules) is one number, kind. An entity is indexed by (id, stream, position),
// where id is the key itself for integers and 64 bits of its MD5 otherwise, with the text beside it. JSON objects are text and
// not jsonb: -0 and 1.10 and the order of members are kept; and not json, since Postgres would read each once more, and one
// that is nested too deeply for the log's server would stop the capture for good. The views cast.
//
// Measured before it was chosen (PostgreSQL 15, 1 M events of a table of seven columns in COPY BINARY, batches of 8 192,
// Xeon 2.8 GHz, server CPU per event and WAL per event):
//
//	heap alone                                        2.5 µs  287 B
//	+ unique b-tree on position                       4.1 µs  353 B
//	+ BRIN on position                                3.1 µs  287 B
//	+ b-tree (stream, id, position), keys in order    5.4 µs  388 B
//	+ the same, keys at random                        8.8 µs  405 B
//	both b-trees, in order / at random                7.2 µs / 9.6 µs
//	both b-trees built at once over 1 M rows          ≈ 1 µs
//
// and on another machine (AMD EPYC with dear system calls, PostgreSQL 15, the table of internal/bench, one and three objects in
// an event), server CPU per event:
//
//	three columns json / text                         3.9 and 4.9 µs / 2.8 and 3.6 µs
//	index built (stream, id, position)                1.1–1.4 µs; two partial indexes 0.65 µs
//	index built (id, stream, position), no dedup      0.6–0.8 µs; partial ones kept from the beginning: not measurable
//	the log's backend in all, before and after        10.1 µs / 5.2 µs
//
// Hence: while the writer is more than 64 MiB of WAL behind, a new partition holds at most 1 M events, has no indexes but two
// small partial ones, and gets the others at once, when it is full, when the backlog is below 8 MiB, or when a look-up needs
// them; the two large b-trees are built at the same time, those of a full partition while the next one fills. In the steady state every event is indexed as it is appended. Tried
// and left: compressed blocks of a batch (a tenth of the append's cost, but no plain SQL, no
// index that a join can use, no has_many); one index entry by a hash of the stream alone (no gain over three columns);
// row states in a table of their own beside the log (each update then writes a dead tuple, on the source's disk); BRIN from the
// beginning (it looks at two pages for each row, and ranges are of no use before they are summarized).
//
// Reading all events costs the server 0.65 to 0.9 µs an event to /dev/null, each column that is not NULL 60 ns of that, the descent
// in the index 0.26 µs, and as much again for sending them 8 kB at a time to a reader that each piece wakes; so reads are coalesced
// (internal/coalesce). Tried and left: reading by pages (TID ranges) instead of by the index. The order of pages is not that of
// positions: each COPY begins in whatever page the free space map gives.
//
// # Seals
//
// Each append ends with a seal in its last event: SHA-256 over the seal before, the appended events, context and small rows;
// verify.go has the exact form. [Log.Verify] recomputes the chain.
//
// # What is refused
//
// UPDATE, DELETE and TRUNCATE on anything that is history, by triggers, for the owner too. backstory.maintenance = on in a
// transaction of the owner, and of nobody else, lifts that: for the removal of an unfinished transaction.
package eventlog
