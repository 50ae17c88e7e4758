package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"syscall"
	"time"
)

// installation is a source, its log and the program's settings for them.
type installation struct {
	lab    *lab
	source *database
	log    *database // the source itself, or another one
	slot   string
	env    []string
}

// install has `backstory init` set everything up; rows that exist already are left out.
func (l *lab) install(ctx context.Context, source, log *database) (*installation, error) {
	return l.installWith(ctx, source, log, "--no-baseline")
}

// installWith does so with other flags for init.
func (l *lab) installWith(ctx context.Context, source, log *database, flags ...string) (*installation, error) {
	in := &installation{lab: l, source: source, log: log, slot: source.name}
	in.env = []string{"BACKSTORY_SOURCE_URL=" + source.url, "BACKSTORY_LOG_URL=" + log.url, "BACKSTORY_SLOT=" + in.slot,
		"BACKSTORY_PUBLICATION=" + publication, "BACKSTORY_HTTP_ADDR=off", "BACKSTORY_LOG_LEVEL=warn"}
	_, _, err := in.command(ctx, append([]string{"init", "--yes"}, flags...)...)
	return in, err
}

// command runs one of the program's commands to its end.
func (in *installation) command(ctx context.Context, args ...string) (usage, string, error) {
	return runProgram(ctx, in.lab.sidecar, args, in.env...)
}

// once runs `backstory run --once` and makes sure that everything is in the log, with its indexes.
func (in *installation) once(ctx context.Context, w *loaded) (usage, map[string]time.Duration, error) {
	costs := in.lab.watchBackends(ctx, slices.Compact([]*database{in.source, in.log})...)
	u, _, err := in.command(ctx, "run", "--once")
	cpu := costs.end()
	if err == nil {
		err = in.check(ctx, w)
	}
	return u, cpu, err
}

// check makes sure that the log has the workload, readable and indexed: nothing was put off until after the clock was stopped.
func (in *installation) check(ctx context.Context, w *loaded) error {
	position, err := ask[int64](ctx, in.log, `SELECT position FROM backstory.head`)
	if err != nil {
		return err
	}
	if position != w.events {
		return fmt.Errorf("the log has %d events, not %d", position, w.events)
	}
	bare, err := ask[int](ctx, in.log, `SELECT count(*) FROM pg_inherits i WHERE i.inhparent = 'backstory.event'::regclass
		AND (SELECT count(*) FROM pg_index x WHERE x.indrelid = i.inhrelid AND x.indisvalid) < 7`)
	if err == nil && bare > 0 {
		err = fmt.Errorf("%d partitions of the log have no indexes", bare)
	}
	return err
}

// run starts `backstory run` and waits until it streams.
func (in *installation) run(ctx context.Context) (*child, error) {
	c, err := start(in.lab.sidecar, []string{"run"}, in.env...)
	if err != nil {
		return nil, err
	}
	if err := in.lab.streaming(ctx, c, in.slot); err != nil {
		c.kill()
		return nil, err
	}
	return c, nil
}

// streaming waits until a process streams from a slot.
func (l *lab) streaming(ctx context.Context, c *child, slot string) error {
	return within(ctx, time.Minute, 5*time.Millisecond, "wait for "+c.name+" to stream", func(ctx context.Context) (ok bool, err error) {
		if err := c.gone(); err != nil {
			return false, err
		}
		err = l.admin.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_replication_slots s JOIN pg_stat_replication r ON r.pid = s.active_pid
			WHERE s.slot_name = $1 AND r.state IN ('catchup', 'streaming'))`, slot).Scan(&ok)
		return ok, err
	})
}

// reaches waits until the log has a position.
func (in *installation) reaches(ctx context.Context, p *child, position int64) error {
	return in.waits(ctx, p, `SELECT position >= $1 FROM backstory.head`, position)
}

// passes makes a change in the source and waits until the log has it, and so everything before it.
func (in *installation) passes(ctx context.Context, p *child, change string) error {
	before, err := ask[string](ctx, in.source, `SELECT pg_current_wal_insert_lsn()::text`)
	if err != nil {
		return err
	}
	if err := in.source.exec(ctx, change); err != nil {
		return err
	}
	return in.waits(ctx, p, `SELECT commit_lsn >= $1::pg_lsn FROM backstory.head`, before)
}

// waits waits for something of the log.
func (in *installation) waits(ctx context.Context, p *child, query string, arg any) error {
	conn, err := in.log.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return within(ctx, 30*time.Minute, 10*time.Millisecond, "wait for the log", func(ctx context.Context) (done bool, err error) {
		if err := p.gone(); err != nil {
			return false, err
		}
		err = conn.QueryRow(ctx, query, arg).Scan(&done)
		return done, err
	})
}

// stop ends a running sidecar as an operator does.
func (in *installation) stop(c *child) (usage, error) { return c.stop(syscall.SIGTERM) }

// size is what the log takes on disk.
type size struct{ heap, indexes, rest int64 }

func (in *installation) size(ctx context.Context) (s size, err error) {
	conn, err := in.log.connect(ctx)
	if err != nil {
		return s, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	err = conn.QueryRow(ctx, `SELECT
		(SELECT sum(pg_table_size(i.inhrelid)) FROM pg_inherits i WHERE i.inhparent = 'backstory.event'::regclass),
		(SELECT sum(pg_indexes_size(i.inhrelid)) FROM pg_inherits i WHERE i.inhparent = 'backstory.event'::regclass),
		(SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c WHERE c.relnamespace = 'backstory'::regnamespace AND c.relkind = 'r'
			AND NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid))`).Scan(&s.heap, &s.indexes, &s.rest)
	if err != nil {
		err = fmt.Errorf("measure the log: %w", err)
	}
	return s, err
}

// verify runs `backstory verify`.
func (in *installation) verify(ctx context.Context, events int64) (usage, error) {
	u, out, err := in.command(ctx, "verify", "--json")
	if err != nil {
		return u, err
	}
	var v struct {
		Events int64
		Broken string
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		return u, fmt.Errorf("read what verify says: %w", err)
	}
	if v.Broken != "" || v.Events != events {
		return u, fmt.Errorf("verify: %d events of %d, %s", v.Events, events, v.Broken)
	}
	return u, nil
}
