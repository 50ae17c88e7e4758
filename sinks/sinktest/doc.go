// Package sinktest holds what every sink must pass, and an event log in memory to test sinks and dispatchers with.
//
// A sink's test says how to make a destination and how to read it back, and calls Run:
//
//	func TestSink(t *testing.T) {
//		sinktest.Run(t, func(t *testing.T) sinktest.Harness {
//			path := filepath.Join(t.TempDir(), "events.jsonl")
//			return sinktest.Harness{
//				Once:     true,
//				Sink:     func(*testing.T) sinks.Sink { return jsonl.File(path) },
//				Contents: func(t *testing.T) []sinktest.Delivered { return read(t, path) },
//			}
//		})
//	}
//
// Log keeps events, checkpoints and leases in memory with the rules of package eventlog, as far as sinks can see them. It
// runs no goroutines.
package sinktest
