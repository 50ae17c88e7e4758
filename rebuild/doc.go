// Package rebuild makes tables of events: as they were at any revision, in a Postgres schema, another database, files or
// memory.
//
// # One engine
//
// Every verb that rebuilds something is a [Fold]: a selection of events × a [Calculator] → a [Target]. [Checkout] is the fold
// of a log until a revision with the row calculator into a schema or files; [Entity] is the fold of one entity's last events
// into memory. What comes later changes one of the three:
//
//   - Selections: eventlog.Selection says which events. A [Source] that wraps the log can skip, replace and insert events on
//     the way.
//   - Calculators: [Rows] reproduces captured tables. Another calculator splits each event into steps for keys (Route) and
//     folds the steps of one key (Fold); a calculator with expressions keeps its columns in the state, one that works on
//     batches of events by SQL keeps the events of a key there and gives them to its target as rows.
//   - Targets: [Schema], [Files], [Memory]. Another one implements Begin, Table, Commit and Abort.
//
// # Invariants
//
//   - The result is a function of the selected events and the calculator, to the byte and in the order of rows: not of
//     memory, workers, batches, time, or of how often it was interrupted. A fold that was interrupted begins anew.
//   - A target shows nothing before Commit, and nothing after Abort or a kill. Files are the exception in part: a kill can
//     leave files named .backstory-*.partial in their directory, which the next checkout into it removes.
//   - Nothing that a checkout has not made is ever replaced. What it has made is known by a comment on the schema and on each
//     table, or by backstory-checkout.json.
//   - Temporary files have no name from the beginning (O_TMPFILE; elsewhere the name is removed at once), so that they end with
//     the process whatever happens.
//   - What Postgres prints for a value in the source it prints for the value in a rebuilt table. A type that does not accept
//     its value any more becomes text, with a warning; that is never a failure.
//   - No error and no warning holds a row's value.
//
// # Life of an event
//
//	log ─ Read ─▶ Route ─ batches ─▶ workers: state of each key ─▶ rows, encoded by N goroutines ─▶ target
//	 (reader's goroutine)        (one owner for each part)      (part by part, table by table)
//
// The reader copies what a step needs into the batch of the worker to which the key belongs; it parses nothing. A worker
// looks up the key's state and folds. The row calculator only strings fragments together: the row as it came, then what
// changed; they are merged when the changes weigh as much as the row, and taken apart when the row is written.
//
// A table is divided into 16 parts by the first four bits of its keys' hashes. Each part has an open hash table of 8 bytes a
// slot whose references lead into pages from the operating system, so that the garbage collector neither scans the states nor
// lets them grow to twice the bound before it looks. Before a worker folds 16 steps it touches what all of them will look up:
// it waits for memory once instead of sixteen times.
//
// When a worker has used its share of Fold.MaxMemoryBytes, its largest part goes to its temporary file: the states, and from
// then on the steps. When all events are read, spilled parts are folded one by one, in half of the bound; a part that does
// not fit is divided by the next four bits, and so on. One key is never divided: the bound is exceeded by one row, and by
// some MiB of buffers. A temporary file holds each spilled step once, and once more for each further division.
//
// Rows are written in the order of the keys' hashes. Key order would need a sort of everything; COPY, CSV and JSON lines do
// not.
//
// # Rows, keys, transactions
//
// See [Rows] for what each operation does, and for DEFERRABLE keys. A table that gets another primary key, or a table without
// one that gets other columns, names its rows in another way from then on: the engine waits for all workers and puts the rows
// under their new keys ([Router.Rekey]).
//
// A table is known by its OID, so it keeps its rows when it is renamed, and a table that was dropped and made again begins
// empty. Where OIDs came to mean something else, the log says so (eventlog, "Numbers after a gap"). Its columns are known by their numbers (pg_attribute.attnum), and by name where those are not known: a renamed column is the same,
// one that was dropped and added again is not. A column that came later has in rows of before the value that the catalogue had for them.
//
// # Into a schema
//
// One transaction on one connection. Each table is made with the types and NOT NULLs of its relation and filled by COPY
// (FREEZE) under a savepoint; the primary key comes after that. If COPY fails because of a value, the savepoint is rolled back
// and the table written once more ([ErrAgain]): without NOT NULL, or with all columns as text, which then get their types
// one by one where that works. What replaces an earlier checkout is made in a schema that nobody else sees, and takes its
// place in the last statements, so that readers wait for moments, not for the load.
//
// # Failure handling
//
// Errors of the log or of the target end the fold; the target is told (Abort). Errors that a person can do something about
// carry a hint (eventlog.Problem). The first error counts: what it brings about elsewhere is not reported.
//
// # Goroutines
//
// Run starts one per worker for reading, and waits for them; then, for each table, one per worker that encodes, and waits for
// them. The schema target has one that feeds COPY while a table is written. All end with Run.
//
// # Speed
//
// Two cores of a Xeon at 2.8 GHz shared with others, Go 1.26, PostgreSQL 15 with fsync, Unix socket; BenchmarkCheckout: 1 M
// rows out of 3 M events, 7 columns, 350 bytes an event, REPLICA IDENTITY FULL. Processor time, since wall time there depends
// on the neighbours:
//
//	                                           here      server
//	reading the log, nothing else             0.9 µs     1.4 µs   per event
//	into JSON lines                           2.6 µs     1.3 µs
//	into a schema, with its primary key       3.3 µs     2.5 µs
//
// Wall time when the neighbours were fairly quiet: 650 k events/s for reading alone; with 128 MiB, so that half of the rows
// were spilled, 420 k into JSON lines and 285 k to 320 k into a schema. On another machine (AMD EPYC, dear system calls, Unix
// socket; make bench): 560 k for reading alone, 310 k to 330 k into CSV, 251 k to 280 k into a schema. What limits it there: half of
// the time one backend sends the log (1.8 µs an event) while the other core folds, and then one backend takes the rows
// (3.5 µs a row with its key) and builds the key alone.
//
// States that were spilled come back in the order of their hashes, so the store that they come back into has to be large enough
// before: one that grows puts them all into its first slots, and looking through those once took two fifths of all time.
//
// # Tried and rejected
//
//   - Maps of rows in Go: five times the memory, and the garbage collector's time.
//   - Merging each update into the row at once: costs a parse per event instead of one per row.
//   - Loading everything as text and converting it: a second pass over each table, for the few that need it.
//   - Sorting rows by key: see above. Several connections for loading: the result could not be seen at once.
package rebuild
