package eventlog

import "sync/atomic"

// Stats counts what a writer has done since it began.
type Stats struct {
	Events, Transactions, Flushes atomic.Int64
	// ApplicationEvents counts the events of the application's transactions, and Unattributed those of them without who and why.
	ApplicationEvents, Unattributed atomic.Int64
	// FirstSeen counts rows that existed before the log first saw them.
	FirstSeen atomic.Int64
	// MalformedContext counts context messages that are not a JSON object.
	MalformedContext atomic.Int64
	// IgnoredContext counts context messages that belong to no transaction.
	IgnoredContext atomic.Int64
	// RuleErrors counts row changes that a rule could not be applied to.
	RuleErrors atomic.Int64
	// Bytes counts the bytes sent to the log.
	Bytes atomic.Int64
	// Lookups counts rows whose last state was read from the log.
	Lookups atomic.Int64
}

// add counts what is durable now.
func (s *Stats) add(c *Counts) {
	s.Events.Add(c.Events)
	s.Transactions.Add(c.Transactions)
	s.ApplicationEvents.Add(c.ApplicationEvents)
	s.Unattributed.Add(c.Unattributed)
	s.FirstSeen.Add(c.FirstSeen)
	s.MalformedContext.Add(c.MalformedContext)
	s.RuleErrors.Add(c.RuleErrors)
	*c = Counts{}
}

// Counts is what Stats stood at.
type Counts struct {
	Events, Transactions, Flushes, ApplicationEvents, Unattributed, FirstSeen, MalformedContext, IgnoredContext, RuleErrors, Bytes, Lookups int64
}

// Counts reads the counters.
func (s *Stats) Counts() Counts {
	return Counts{s.Events.Load(), s.Transactions.Load(), s.Flushes.Load(), s.ApplicationEvents.Load(), s.Unattributed.Load(), s.FirstSeen.Load(), s.MalformedContext.Load(), s.IgnoredContext.Load(), s.RuleErrors.Load(), s.Bytes.Load(), s.Lookups.Load()}
}

// Add adds what another writer counted.
func (c *Counts) Add(o Counts) {
	c.Events += o.Events
	c.Transactions += o.Transactions
	c.Flushes += o.Flushes
	c.ApplicationEvents += o.ApplicationEvents
	c.Unattributed += o.Unattributed
	c.FirstSeen += o.FirstSeen
	c.MalformedContext += o.MalformedContext
	c.IgnoredContext += o.IgnoredContext
	c.RuleErrors += o.RuleErrors
	c.Bytes += o.Bytes
	c.Lookups += o.Lookups
}
