// Package rules reads backstory.yaml and makes typing rules of it: which events a row change becomes.
//
// A [File] is parsed once ([Parse]): its syntax, its names, what needs no table. It is compiled against each version of a table that its
// rules are about ([File.Table]), when the writer meets it: expressions are typed against the real columns. [File.Check] does so with the tables that
// there are, before anything runs, and tells what is wrong with its place in the file. What does not fit a version that comes later, since a column has
// been dropped, say, is left out and told ([File.Trouble]): rules never stop the capture.
//
// # Meaning
//
// A rule of an update fires if at least one of its data columns changed, or, without data, if any column changed that is not quiet, and when holds. One of an
// insert or delete fires if one of its data columns is not NULL, or, without data, always. Rules do not compete: each that fires becomes an event, in the
// order of the file.
//
//   - On update the event has those of its data columns that changed, without data all that changed. What no rule took becomes …Updated.
//   - On insert …Created comes first, with all columns; then those of the rules, with their data columns, or all. They restate what …Created has
//     (eventlog.Event.Restates), so that a fold of rows leaves them out.
//   - On delete those of the rules come first, and …Deleted, with the whole row, last.
//
// A rule does not run where it reads a value before the change that nobody knows. An expression that fails at run time (an integer overflows, a text is no number)
// leaves the change to the default events, whose metadata say so (rule_error), and is counted.
//
// # Cost
//
// Rules are indexed by column: a row pays for those that its changed columns name, and an expression reads only the columns that it uses.
package rules
