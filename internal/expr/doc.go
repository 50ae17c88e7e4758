// Package expr is the language of conditions and computed attributes: what stands in backstory.yaml behind when, with, where, set, key and
// each. Its grammar is that of expr-lang/expr, whose parser it uses; what an expression means is decided here, because values are
// those of Postgres:
//
//   - NULL (nil) in a boolean place is false; == and != are IS NOT DISTINCT FROM and its negation, so nil == nil is true; <, <=, >, >= with
//     a NULL are false; arithmetic and functions of a NULL are NULL; a member of NULL is NULL.
//   - numeric is decimal and exact, with its scale: 1.10 + 2.20 is 3.30. A quotient is numeric, also of two integers, rounded to 34
//     significant digits. Integers that overflow are an error, as they are in Postgres.
//   - Text compares by its bytes (COLLATE "C").
//   - A text literal beside a date or a time is read as one, once, when the expression is compiled.
//
// An expression is checked against the types of what it names before anything runs; an error has its place. It is pure: no clock, no
// randomness, nothing outside its variables. It is bounded: a million steps, 16 MiB of made values, numbers of 2 000 digits; beyond that, and for
// anything else that goes wrong at run time, [Program.Run] returns an error. Regular expressions are RE2's, and take linear time.
//
// Tried in thought and left: expr's own checker and machine with overloaded operators. Nullable columns become any there, which the checker
// lets pass; "not x" and conditions cannot be overloaded, so NULL would end an expression with an error; int64 wraps around.
package expr
