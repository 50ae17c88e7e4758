package eventlog

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/backstory-dev/backstory/internal/coalesce"
)

//go:embed migrations/*.sql
var migrations embed.FS

// schemaNumber is the number of the newest migration.
const schemaNumber = 1

// Config says where the log is and how it is kept.
type Config struct {
	// URL of the log's database. Required.
	URL string
	// PartitionEvents is the number of events in one partition. Default 8 million.
	PartitionEvents int64
	// MaxCacheBytes bounds the memory for the last known state of rows, which tables with REPLICA IDENTITY DEFAULT need.
	// Default 16 MiB.
	MaxCacheBytes int
	// Rules decide which events row changes become. Default: those of no file. Log.SetRules gives others later.
	Rules Rules
	// Logger is told of changes of state. Default: none.
	Logger *slog.Logger
}

// Log is an event log in a Postgres database. Its methods may be called by several goroutines.
type Log struct {
	cfg   Config
	pool  *pgxpool.Pool
	dict  *dictionary
	log   *slog.Logger
	rules atomic.Pointer[Rules] // never nil
}

// Attach prepares to use an event log, whose database need not answer yet. Before anything else is done with the log, Check has to
// have returned nil once.
func Attach(cfg Config) (*Log, error) {
	if cfg.PartitionEvents == 0 {
		cfg.PartitionEvents = 8 << 20
	}
	if cfg.MaxCacheBytes == 0 {
		cfg.MaxCacheBytes = 16 << 20
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	pc, err := pgxpool.ParseConfig(cfg.URL)
	if err != nil {
		return nil, cleanURLError(err)
	}
	prepare(&pc.ConnConfig.Config, "backstory log")
	dial := pc.ConnConfig.DialFunc
	pc.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return coalesce.New(c, 256<<10), nil
	}
	// Values are compared and copied as text and bytes: no need for more than the unnamed statement.
	pc.MaxConns = max(pc.MaxConns, 8)
	pool, err := pgxpool.NewWithConfig(context.Background(), pc)
	if err != nil {
		return nil, fmt.Errorf("connect to the event log: %w", err)
	}
	l := &Log{cfg: cfg, pool: pool, log: cfg.Logger}
	l.dict = newDictionary(l)
	l.SetRules(cfg.Rules)
	return l, nil
}

// Connect opens the database of an event log without asking whether there is one; Create makes it.
func Connect(ctx context.Context, cfg Config) (*Log, error) {
	l, err := Attach(cfg)
	if err != nil {
		return nil, err
	}
	if err := l.pool.Ping(ctx); err != nil {
		l.Close()
		return nil, fmt.Errorf("connect to the event log: %w", ConnError(err))
	}
	return l, nil
}

// Open opens an existing event log. ErrNoLog and ErrNewerLog come with a hint.
func Open(ctx context.Context, cfg Config) (*Log, error) {
	l, err := Connect(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := l.Check(ctx); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Check makes sure that there is a log, and that its schema is the one that this version knows.
func (l *Log) Check(ctx context.Context) error {
	n, err := l.schemaNumber(ctx)
	switch {
	case err != nil:
		return err
	case n == 0:
		return &Problem{ErrNoLog, "Run backstory init first, or point BACKSTORY_LOG_URL to the database that holds the event log."}
	case n > schemaNumber:
		return &Problem{ErrNewerLog, "Use the newer backstory for this log."}
	case n < schemaNumber:
		return &Problem{fmt.Errorf("the event log has the schema of an older version (%d, this one needs %d)", n, schemaNumber),
			"Run backstory init to upgrade it; nothing stored is rewritten."}
	}
	return nil
}

// schemaNumber reads which migration was applied last; 0 means no log.
func (l *Log) schemaNumber(ctx context.Context) (n int, err error) {
	err = l.pool.QueryRow(ctx, `SELECT coalesce(max(number), 0) FROM backstory.migration`).Scan(&n)
	if code(err) == "42P01" || code(err) == "3F000" { // undefined_table, invalid_schema_name
		return 0, nil
	}
	if err != nil {
		return 0, Remedy(fmt.Errorf("open the event log: %w", err))
	}
	return n, nil
}

// Create makes the log's schema, or brings it up to date. It is idempotent; created tells whether it did anything.
func (l *Log) Create(ctx context.Context) (created bool, err error) {
	n, err := l.schemaNumber(ctx)
	if err != nil {
		return false, err
	}
	if n > schemaNumber {
		return false, &Problem{ErrNewerLog, "Use the newer backstory for this log."}
	}
	var enc string
	if err := l.pool.QueryRow(ctx, `SHOW server_encoding`).Scan(&enc); err != nil {
		return false, fmt.Errorf("read the log's encoding: %w", err)
	}
	if enc != "UTF8" {
		return false, &Problem{fmt.Errorf("the log's database has encoding %s", enc),
			"An event log needs a database with encoding UTF8: CREATE DATABASE backstory ENCODING 'UTF8' TEMPLATE template0, and set BACKSTORY_LOG_URL."}
	}
	for ; n < schemaNumber; n++ {
		sql, err := Migration(n + 1)
		if err != nil {
			return created, err
		}
		err = pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `INSERT INTO backstory.migration (number) VALUES ($1)`, n+1)
			return err
		})
		if err != nil {
			return created, Remedy(fmt.Errorf("create the event log: %w", err))
		}
		created = true
	}
	return created, nil
}

// Migration gives the SQL of one numbered migration of the log's schema, for those who apply it by hand.
func Migration(n int) (string, error) {
	names, err := fs.Glob(migrations, "migrations/"+fmt.Sprintf("%03d", n)+"_*.sql")
	if err != nil || len(names) != 1 {
		return "", fmt.Errorf("no migration %d", n)
	}
	b, err := migrations.ReadFile(names[0])
	return string(b), err
}

// Size tells how many bytes the log takes on its server's disk, indexes and small tables included.
func (l *Log) Size(ctx context.Context) (bytes int64, err error) {
	err = l.pool.QueryRow(ctx, `SELECT coalesce(sum(pg_total_relation_size(oid)), 0)::bigint FROM pg_class WHERE relnamespace = to_regnamespace('backstory') AND relkind = 'r'`).Scan(&bytes)
	if err != nil {
		return 0, Remedy(fmt.Errorf("ask for the size of the log: %w", err))
	}
	return bytes, nil
}

// Close ends the log's connections.
func (l *Log) Close() { l.pool.Close() }

// Pool gives the connections to the log's database, for what is kept beside the log (checkpoints, projections).
func (l *Log) Pool() *pgxpool.Pool { return l.pool }

// URL of the log's database.
func (l *Log) URL() string { return l.cfg.URL }

// Head is the end of the log, and how far the source is in it.
type Head struct {
	Epoch       int64
	Position    Position // of the last event; readers go no further
	Written     Position // rows beyond Position belong to a transaction that is still coming in
	Seal        []byte   // of the last append
	SystemID    string
	Database    string
	Incarnation int
	Timeline    uint32
	EndLSN      LSN       // everything before it is in the log
	CommitLSN   LSN       // of the last transaction in the log
	OccurredAt  time.Time // its commit time; zero if there was none
	Slot        string
	Version     int       // of the source, as server_version_num, when the log was tied to it; 0: not known
	Closed      bool      // the source was shut down when all of it was in the log, and was not streamed from since
	Gap         string    // why the log must not go on without a person's word; normally empty
	Baseline    bool      // rows that existed before their table was captured are taken over
	Tables      []string  // patterns by which init selected the tables, and …
	Exclude     []string  // … those that it left out: what is made later is taken in by them
	BeganAt     time.Time // from then on everything is in the log, by the source's clock
	UpdatedAt   time.Time
}

const headColumns = `epoch, position, written, seal, system_id, database, incarnation, timeline, (end_lsn - '0/0')::bigint, (commit_lsn - '0/0')::bigint,
	occurred_at, slot, server_version, closed, coalesce(gap, ''), baseline, tables, exclude, began_at, updated_at`

// Head reads the end of the log. It is pgx.ErrNoRows while init has not finished.
func (l *Log) Head(ctx context.Context) (*Head, error) { return readHead(ctx, l.pool) }

type querier interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func readHead(ctx context.Context, q querier) (*Head, error) {
	var h Head
	var at *time.Time
	var tl, end, commit int64
	err := q.QueryRow(ctx, `SELECT `+headColumns+` FROM backstory.head`).Scan(&h.Epoch, &h.Position, &h.Written, &h.Seal, &h.SystemID,
		&h.Database, &h.Incarnation, &tl, &end, &commit, &at, &h.Slot, &h.Version, &h.Closed, &h.Gap, &h.Baseline, &h.Tables, &h.Exclude, &h.BeganAt, &h.UpdatedAt)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, noSource
	}
	if err != nil {
		return nil, Remedy(fmt.Errorf("read the log's head: %w", err))
	}
	h.Timeline, h.EndLSN, h.CommitLSN = uint32(tl), LSN(end), LSN(commit)
	if at != nil {
		h.OccurredAt = *at
	}
	return &h, nil
}

// code gives the SQLSTATE of an error, or "".
func code(err error) string {
	var pe *pgconn.PgError
	if errors.As(err, &pe) {
		return pe.Code
	}
	return ""
}

// SQLState gives the SQLSTATE of an error that Postgres returned, or "".
func SQLState(err error) string { return code(err) }

func itoa[T ~int | ~int32 | ~int64 | ~uint32](v T) string { return strconv.FormatInt(int64(v), 10) }
