package eventlog

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// contextRange is who and why for the events of a run of positions.
type contextRange struct {
	first, last Position
	metadata    []byte
}

// How many ranges, and how many bytes of them plus one range, a reader holds at once.
const (
	maxContextRanges = 4096
	maxContextBytes  = 4 << 20
)

// readContexts reads the ranges that hold between two positions, the first exclusive. Where that would be too many it
// returns those up to an earlier position, which it returns, too. Reading them once per window and merging them in is
// several times as fast as joining each event with its range.
func readContexts(ctx context.Context, conn *pgx.Conn, after, until Position) ([]contextRange, Position, error) {
	rows, err := conn.Query(ctx, `SELECT first_position, last_position, metadata, total FROM (
			SELECT first_position, last_position, metadata, count(*) OVER () AS total,
				sum(octet_length(metadata)) OVER (ORDER BY first_position ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
			FROM (SELECT first_position, last_position, metadata::text FROM backstory.context
				WHERE first_position <= $2 AND last_position > $1
				  AND first_position >= coalesce((SELECT max(first_position) FROM backstory.context WHERE first_position <= $1), 0)
				ORDER BY first_position LIMIT $3) x) y
		WHERE coalesce(before, 0) < $4`, after, until, maxContextRanges, maxContextBytes)
	if err != nil {
		return nil, 0, fmt.Errorf("read who and why: %w", err)
	}
	var total int
	ranges, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r contextRange, err error) {
		err = row.Scan(&r.first, &r.last, &r.metadata, &total)
		return r, err
	})
	if err != nil {
		return nil, 0, fmt.Errorf("read who and why: %w", err)
	}
	if n := len(ranges); n > 0 && (n < total || n == maxContextRanges) {
		until = min(until, ranges[n-1].last)
	}
	return ranges, until, nil
}
