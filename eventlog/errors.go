package eventlog

import (
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Problem is an error with a remedy: what a person should do about it. It stops what was being done ("stop and tell").
type Problem struct {
	Err  error
	Hint string // a command or a setting
}

func (p *Problem) Error() string { return p.Err.Error() }
func (p *Problem) Unwrap() error { return p.Err }

// Hint finds the remedy in an error, or "".
func Hint(err error) string {
	var p *Problem
	if errors.As(err, &p) {
		return p.Hint
	}
	return ""
}

// Met when opening a log.
var (
	// ErrBadURL means that a database URL cannot be parsed.
	ErrBadURL = errors.New("parse the database URL")
	// ErrNoLog means that the database has no event log.
	ErrNoLog = errors.New("no event log in this database")
	// ErrNewerLog means that the log was made by a newer version of backstory.
	ErrNewerLog = errors.New("the event log was made by a newer version of backstory")
)

// noSource is pgx.ErrNoRows for a log that init has made but not yet tied to a source.
var noSource = &Problem{noSourceError{}, "Run backstory init: it has not finished."}

type noSourceError struct{}

func (noSourceError) Error() string        { return "the event log has no source yet" }
func (noSourceError) Is(target error) bool { return target == pgx.ErrNoRows }

// Met when appending.
var (
	// ErrFenced means that another writer has taken over; what was being appended is not in the log.
	ErrFenced = errors.New("another backstory has taken over the event log")
	// ErrReadOnly means that the log's server takes no writes at present: it is a standby, or set so.
	ErrReadOnly = errors.New("the event log is read-only")
)

// Met when reading.
var (
	// ErrBeforeHistory means that a moment before the log's first event was asked for.
	ErrBeforeHistory = errors.New("before the history begins")
	// ErrBadRevision means that a text is no revision, whatever the log holds.
	ErrBadRevision = errors.New("read revision")
	// ErrBadEntity means that a text cannot name an entity, whatever the log holds.
	ErrBadEntity = errors.New("does not name an entity")
)

// Remedy adds what to do about an error that the log's server has returned, where that is known and nobody has said so.
func Remedy(err error) error {
	if err == nil || Hint(err) != "" {
		return err
	}
	var ce *pgconn.ConnectError
	if errors.As(err, &ce) {
		return fmt.Errorf("connect to the event log: %w", ConnError(err))
	}
	switch code(err) {
	case "25006": // read_only_sql_transaction
		return &Problem{fmt.Errorf("%w: %w", ErrReadOnly, err), readOnlyHint}
	case "42501": // insufficient_privilege
		return &Problem{err, "To read, a role needs GRANT USAGE ON SCHEMA backstory and GRANT SELECT ON ALL TABLES IN SCHEMA backstory; to write, it has to own that schema. " +
			"To make it, a role needs GRANT CREATE ON DATABASE; backstory init --print-sql prints what somebody with more rights can run instead."}
	case "53100": // disk_full
		return &Problem{err, "Make room on the disk of the log's server. Nothing is lost meanwhile: the source keeps its WAL until the log has taken it, within max_slot_wal_keep_size."}
	case "53200": // out_of_memory
		return &Problem{err, "The log's server has no memory left. What was not appended is asked for again."}
	}
	return err
}

const readOnlyHint = "Point BACKSTORY_LOG_URL to the primary, or turn default_transaction_read_only off for the role and its database. Nothing is lost meanwhile: the source keeps its WAL until the log has taken it."
