// Package sinks forwards events from the log to the world: reactors, and the dispatcher that runs them.
//
// # Purpose
//
// A reactor is a named reader of the event log with a durable checkpoint and a destination, its sink. The dispatcher is the
// one place that says which reactor gets which event types:
//
//	d, err := sinks.New(sinks.Config{Log: log})
//	err = d.On("*", &sinks.Reactor{Name: "kafka", Sink: k})
//	mail := &sinks.Reactor{Name: "mail", Sink: m, SideEffect: true}
//	err = d.On("OrderPaid", mail)
//	err = d.On("Payment*", mail)
//	err = d.Run(ctx)
//
// Each destination is a package of its own below this one and passes the suite in sinktest.
//
// # What is promised
//
//   - Each reactor gets every event that it selects at least once, in the order of the log, so in order per aggregate. A
//     sink that can find out what its destination holds makes that once (kafka, jsonl with a file).
//   - Only the live log is read. A rebuild runs calculators, which know nothing of this package.
//   - Reactors are isolated: each has its own goroutines, its own lease, its own memory, its own errors, a panic of its sink
//     included. None holds back another, nor the log: reading the log is all they do to the rest of the system, in short
//     statements, so a dead destination never delays the confirmation of the source's WAL.
//   - One process at a time runs a reactor (eventlog.Lease). A process that has lost its lease sends nothing more; what it
//     had on its way at that moment may arrive.
//   - Quiet events are left out unless Reactor.Quiet asks for them. Where SideEffect is set, imported events come only by a
//     pattern that names them: a type, or a pattern that does not end in a star (*Imported). Gaps are events like any
//     other: * selects them.
//
// # Life of an event
//
// The dispatcher follows the head of the log (Watcher) and wakes the reactors. A reactor's reading goroutine copies the next
// events into one of its two batches; its main goroutine hands the other one to Sink.Send. When Send has returned nil, the
// reactor's position moves, in memory. The checkpoint in the log's database follows every CheckpointEvery, and at once on a
// graceful stop. It is written only when the position has moved, so an idle log causes no writes; that matters because the
// log usually lives in the source's own server, where each write is WAL for the slot to read.
//
// # Failure handling
//
// classify sorts errors. What will pass, and what a person must mend (an error with a hint), is tried again for ever with
// pauses that double from MinBackoff to MaxBackoff, the latter beginning more slowly; nothing is skipped. The error, its hint
// and since when are in Status, in the metrics, in the checkpoint's row (where `status` of another process finds them), and
// once a minute in the log. A bug (a panic) stops the one reactor until the process starts again. A lost lease, or an error
// of the log's database, ends the session: the sink is closed, and after a pause everything begins again with a new lease and
// Sink.Open. When Run's context ends, a batch on its way gets StopTimeout.
//
// # Goroutines
//
//	what                owner           ends when
//	follow              Dispatcher.Run  ctx ends
//	runner.run          Dispatcher.Run  ctx ends, or a bug is met; one for each reactor, it calls the sink
//	lease.Watch         runner.session  the session ends
//	runner.read         runner.forward  the session ends
//	stop timer          runner.session  StopTimeout after ctx has ended, or the session ends
//
// # What will fit in here
//
// Dead letters that block only their aggregate: Send would return a typed error naming the event that the destination
// refuses; the runner parks it and later events of its entity in a table beside the checkpoint and goes on. Synchronous
// triggers run in the append transaction, not here; a dispatcher would hand them to the writer. Commands move checkpoints and
// pauses by eventlog.Log.MoveCheckpoint and PauseCheckpoint; a running reactor follows within two seconds. A replay into a
// sink that delivers once needs a destination of its own, since the old one has the events.
//
// # Tried and rejected
//
// One cursor or one LISTEN for all reactors: a slow one would hold it back. Reading with one long COPY while the sink takes
// its time: a statement that lives as long as a destination is dead holds back vacuum in the source's server; so statements
// are short and end by themselves. Heartbeats in a table instead of an advisory lock: they write.
package sinks
