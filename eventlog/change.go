package eventlog

import "time"

// State says which of the three cases a Value is. A value that is absent from the message is StateUnknown:
// neither NULL nor empty.
type State uint8

// The cases of a Value.
const (
	StateUnknown   State = iota // the source did not say, and the log does not know
	StateNull                   // SQL NULL
	StateText                   // Text holds what Postgres prints
	StateUnchanged              // unchanged TOAST: the value is that of the row before
)

// Value is one column's value in a row change, in the source's text form under fixed session settings
// (see SessionSettings). Text is valid as long as the Batch that holds it.
type Value struct {
	State State
	Text  []byte
}

// Op is what happened to the row, or that no row was concerned.
type Op byte

// The operations. Their letters are what the log stores.
const (
	OpInsert   Op = 'i'
	OpUpdate   Op = 'u'
	OpDelete   Op = 'd'
	OpTruncate Op = 't'
	OpImport   Op = 'b' // a row that existed before the log first saw it (baseline, or first sight)
	OpNote     Op = 'n' // an appended or derived event; no row change made it
	OpGap      Op = 'g' // the log may lack changes here
)

// OfRow tells whether an event is about one row, not about a table or the source.
func (o Op) OfRow() bool { return o != OpTruncate && o != OpNote && o != OpGap }

var opNames = [256]string{OpInsert: "insert", OpUpdate: "update", OpDelete: "delete", OpTruncate: "truncate",
	OpImport: "import", OpNote: "note", OpGap: "gap"}

func (o Op) String() string { return opNames[o] }

// ItemKind says what an Item is.
type ItemKind uint8

// The kinds of items. Begin … Commit enclose one source transaction, which may span several batches.
const (
	ItemBegin      ItemKind = iota + 1 // XID, CommitLSN, Time
	ItemChange                         // Op, Relation, Old, New
	ItemMessage                        // Text: transactional context, JSON
	ItemCommit                         // EndLSN
	ItemProgress                       // EndLSN: nothing is outstanding up to here; no transaction is open
	ItemReset                          // the stream was cut: forget the open transaction, it comes again
	ItemChunk                          // Chunk: rows that were there before, as of this place
	ItemDefinition                     // Relation: how a table is defined from here on, or that it was dropped
)

// Item is one thing the source said.
type Item struct {
	Kind      ItemKind
	Op        Op
	Rewritten bool // the rows of the table were written anew, and may have other values
	OldFull   bool // Old is the whole row, not only its replica identity
	XID       uint32
	Timeline  uint32    // on which CommitLSN lies
	Relation  *Relation // of a change, or the definition
	CommitLSN LSN       // start of the commit record; orders transactions
	EndLSN    LSN       // the byte after the commit record; what is acknowledged
	Time      time.Time // commit time
	Old, New  []Value   // nil: not sent
	Text      []byte    // of a message
	Chunk     *Chunk
}

// Batch is a run of items in stream order. It owns the memory that its items point to: whoever receives one hands it
// back by Release, and nothing taken from it is valid afterwards.
type Batch struct {
	Items []Item
	// Backlog is how much WAL the source had beyond this batch when it ended, in bytes.
	Backlog LSN
	// Final asks that progress is recorded now: nothing more comes, or somebody waits for it.
	Final bool
	// Ignored counts context messages that belong to no transaction.
	Ignored int64
	arena   []byte
	values  []Value
	size    int // bytes of memory handed out since Reset
	release func(*Batch)
}

// NewBatch makes an empty batch; release, if not nil, is called by Release.
func NewBatch(release func(*Batch)) *Batch { return &Batch{release: release} }

// Bytes tells how much memory the batch's items hold.
func (b *Batch) Bytes() int { return b.size + 160*len(b.Items) }

// Copy keeps a copy of p in the batch.
func (b *Batch) Copy(p []byte) []byte {
	if len(b.arena)+len(p) > cap(b.arena) {
		b.arena = make([]byte, 0, max(len(p), 256<<10)) // the old one stays alive through the items that use it
	}
	b.size += len(p)
	n := len(b.arena)
	b.arena = append(b.arena, p...)
	return b.arena[n:len(b.arena):len(b.arena)]
}

// Values gives n empty values that live in the batch.
func (b *Batch) Values(n int) []Value {
	if len(b.values)+n > cap(b.values) {
		b.values = make([]Value, 0, max(n, 4096))
	}
	b.size += 32 * n
	l := len(b.values)
	b.values = b.values[:l+n]
	v := b.values[l : l+n : l+n]
	clear(v)
	return v
}

// Add appends an item.
func (b *Batch) Add(it Item) { b.Items = append(b.Items, it) }

// Release gives the batch back to whoever made it.
func (b *Batch) Release() {
	if b.release != nil {
		b.release(b)
	}
}

// Reset empties the batch for another use, keeping moderate memory.
func (b *Batch) Reset() {
	clear(b.Items)
	b.Items = b.Items[:0]
	b.arena = b.arena[:0]
	b.values = b.values[:0]
	b.size, b.Backlog, b.Final, b.Ignored = 0, 0, false, 0
}

// SessionSettings are set on every connection that reads or writes values of captured rows, whatever the role or the database has: each
// of them changes the text that Postgres prints or reads, how long a session may take, or what a transaction sees (PostgreSQL manual, Client
// Connection Defaults).
var SessionSettings = map[string]string{
	"DateStyle":                           "ISO, YMD",
	"IntervalStyle":                       "postgres",
	"TimeZone":                            "UTC",
	"extra_float_digits":                  "1",
	"bytea_output":                        "hex",
	"xmloption":                           "content",
	"client_encoding":                     "UTF8",
	"search_path":                         "pg_catalog",
	"quote_all_identifiers":               "off",
	"lc_monetary":                         "C",
	"array_nulls":                         "on",
	"standard_conforming_strings":         "on",
	"row_security":                        "off",
	"statement_timeout":                   "0",
	"lock_timeout":                        "0",
	"idle_in_transaction_session_timeout": "0",
	"idle_session_timeout":                "0",
	"default_transaction_isolation":       "read committed",
}
