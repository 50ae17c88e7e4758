package eventlog

import "errors"

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
	// ErrNoLog means that the database has no event log.
	ErrNoLog = errors.New("no event log in this database")
	// ErrNewerLog means that the log was made by a newer version of backstory.
	ErrNewerLog = errors.New("the event log was made by a newer version of backstory")
)

// Met when appending.
var (
	// ErrFenced means that another writer has taken over; what was being appended is not in the log.
	ErrFenced = errors.New("another backstory has taken over the event log")
)

// Met when reading.
var (
	// ErrBeforeHistory means that a moment before the log's first event was asked for.
	ErrBeforeHistory = errors.New("before the history begins")
)
