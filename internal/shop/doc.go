// Package shop is a small web shop that works on its database as a legacy application does. It is what the demo shows,
// and a believable load for tests and benchmarks.
//
// # What is legacy about it
//
// The tables follow Rails' conventions: bigserial ids, created_at and updated_at, status columns, counter caches,
// lock_version, money as numeric, a jsonb column here and a text[] there, one table with a uuid for its key, one soft
// delete. Nobody has ever set a replica identity. Rows are overwritten and deleted: that an order was once pending, or
// what a price was last week, the database does not know.
//
// # What happens in it
//
// A few sessions work at the same time, each like one server process of the application with a connection of its own.
// Again and again a session picks somebody's work and does it, one transaction a step:
//
//   - a visit (visit.go): sign up or come back, put things into a cart, change and remove them, check out or walk away,
//     pay, perhaps fail to pay and try again, perhaps cancel;
//   - staff (staff.go): the warehouse ships, the carrier delivers, support edits, cancels and refunds, the catalogue gets
//     new prices, texts and products, and somebody repairs a row by hand in psql;
//   - jobs (jobs.go): carts that were left alone are marked and deleted, orders that nobody pays are cancelled, shelves
//     are filled, counters are counted again, all prices rise by 3 % in one UPDATE, or fall in a sale.
//
// Most transactions begin with a message that says who and why (pg_logical_emit_message with the prefix backstory), as
// an initializer of the application would emit it. Visits over the old mobile API and repairs by hand have none.
//
// Some transactions write and then roll back (the shelf was empty), some roll back to a savepoint (the product was in
// the cart already; the coupon was not valid), some meet a changed lock_version or a deadlock and are tried again.
//
// # Invariants
//
// Every commit leaves the tables consistent: an order's total is what its lines, shipping and discount say, counter
// caches are right, a paid order has a payment of its total. Check looks, in whatever schema the connection's
// search_path names; so it can also judge tables that were rebuilt as of any moment.
//
// # Failure handling
//
// The first connection has to succeed. Later a session that loses its connection comes back, with growing pauses,
// until Run's context ends, and what became of the transaction at hand is counted as unknown. An error of SQL that is
// not part of the play ends Run: it is a bug. When the context ends, each session finishes the transaction it is in.
//
// Goroutines: Run starts one for each session and waits for them.
//
// The choices come from the seed, but sessions are concurrent: the same seed gives a similar history, not the same.
package shop
