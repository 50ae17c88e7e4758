// Package backstory gives an existing application its history. It joins the parts: package capture tails the write-ahead
// log of a Postgres database, package eventlog keeps the typed events, package sinks forwards them, package rebuild makes
// tables of them again. The command in cmd/backstory uses the same door.
//
// A program that embeds the sidecar calls [Init] once, then [New] and [Sidecar.Run]; reactors of its own are given to the
// dispatcher in Config.Reactors.
//
// # Goroutines of Run
//
//	capture (Run's own)   appends batches; owns the writer                     ends with ctx, after draining
//	stream                receives from the source (capture.Stream.Run)        ends with ctx, or when an attempt fails
//	watch                 asks the source for the end of its WAL               ends with its session
//	import                reads existing rows, a few tables at a time          ends with the stream
//	takeIn                looks for tables that were altered or made           ends with the stream
//	guard                 looks how much WAL the source keeps for the slot     ends with ctx
//	dispatcher            one goroutine per reactor and one that follows the head   ends after capture
//
// An attempt is one writer and one stream. When the log's database fails, the attempt ends and a new one begins from what
// the log holds; batches in flight are thrown away and come again from the source. On a graceful stop the stream hands over
// what is whole, waits until it is in the log, tells the source, and only then closes.
package backstory
