package capture

import (
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// Config says what is captured, and from where.
type Config struct {
	// URL of the source database. Required. A role with REPLICATION that can read the catalogue is enough to stream.
	URL string
	// StandbyURL is the same database on a hot standby of the source (PostgreSQL 16 and later) that is to have the slot, and so does the work of
	// decoding. URL stays that of the primary, for everything else. Default: the slot is at the source.
	StandbyURL string
	// Slot is the name of the replication slot: a–z, 0–9 and _, at most 63 bytes. Default backstory.
	Slot string
	// Publication is the name of the publication of tables that have a usable replica identity. Default backstory. The
	// others are in a second one, which publishes inserts and truncates only and is called Publication + "_inserts".
	Publication string
	// Tables are patterns schema.table of the tables to capture; * stands for any run of characters. Default public.*
	Tables []string
	// Exclude are patterns of tables that Tables matches but that are not to be captured.
	Exclude []string
	// FullIdentity are patterns of tables to which Apply gives REPLICA IDENTITY FULL. Nothing else ever alters a table. Default none.
	FullIdentity []string
	// DDLTrigger tells whether Apply makes the event trigger, or removes it; nil: it stays as it is. Making one takes a superuser
	// (PostgreSQL manual, CREATE EVENT TRIGGER).
	DDLTrigger *bool
	// MaxBatchBytes bounds the memory of one batch of row changes; a few are in flight. A single larger row change
	// exceeds it. Default 1 MiB.
	MaxBatchBytes int
	// BaselineTables is how many tables' existing rows are read at a time. Default 2.
	BaselineTables int
	// BaselineChunkBytes is about how many bytes of existing rows, as text, are read in one transaction of the source. Of each table that is
	// being read, two chunks may be in memory. A single larger row exceeds it. Default 2 MiB.
	BaselineChunkBytes int
	// BaselineBytesPerSecond bounds how fast existing rows are read, as text. Default: no bound.
	BaselineBytesPerSecond int64
	// BlockedAfter is how long init waits for other transactions before it gives up: making the slot, and publishing tables that are in use. Default 5 minutes.
	BlockedAfter time.Duration
	// Logger is told of changes of state. Default: none.
	Logger *slog.Logger
}

// WithDefaults fills in what is not set.
func (c Config) WithDefaults() Config {
	if c.Slot == "" {
		c.Slot = "backstory"
	}
	if c.Publication == "" {
		c.Publication = "backstory"
	}
	if len(c.Tables) == 0 {
		c.Tables = []string{"public.*"}
	}
	if c.MaxBatchBytes == 0 {
		c.MaxBatchBytes = 1 << 20
	}
	if c.BaselineChunkBytes == 0 {
		c.BaselineChunkBytes = 2 << 20
	}
	if c.BaselineTables == 0 {
		c.BaselineTables = 2
	}
	if c.BlockedAfter == 0 {
		c.BlockedAfter = 5 * time.Minute
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// InsertPublication is the name of the publication of tables without a usable replica identity.
func (c Config) InsertPublication() string { return c.Publication + "_inserts" }

var slotName = regexp.MustCompile(`^[a-z0-9_]{1,63}$`)

// Validate checks what can be checked without a connection. Replication commands do not quote names, so the slot's name
// is held to what Postgres allows.
func (c Config) Validate() error {
	if c.URL == "" {
		return &eventlog.Problem{Err: errors.New("no source database is set"), Hint: "Set BACKSTORY_SOURCE_URL, for instance postgres://user@localhost:5432/shop."}
	}
	if !slotName.MatchString(c.Slot) {
		return &eventlog.Problem{Err: fmt.Errorf("slot name %q is not possible", c.Slot), Hint: "Use a–z, 0–9 and _ only, at most 63 of them (BACKSTORY_SLOT)."}
	}
	if c.Publication == "" || len(c.InsertPublication()) > 63 {
		return &eventlog.Problem{Err: fmt.Errorf("publication name %q is not possible", c.Publication), Hint: "Use at most 55 bytes (BACKSTORY_PUBLICATION)."}
	}
	for _, p := range slices.Concat(c.Tables, c.Exclude, c.FullIdentity) {
		if _, err := parsePattern(p); err != nil {
			return err
		}
	}
	return nil
}
