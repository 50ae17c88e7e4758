package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// sessions is how many the load of the latency group is spread over. They are many more than are busy at a time, so that a commit
// that takes long holds no other transaction back.
const sessions = 16

// apart is how many transactions lie between the insert of a row and its update: some seconds.
const apart = 8000

// latency measures how long after its commit a transaction is visible in the log, in the default installation: the log in the
// source's own database, REPLICA IDENTITY DEFAULT, everything durable.
func (l *lab) latency(ctx context.Context, g *group) error {
	g.About = fmt.Sprintf("commit → visible in the log (the answer to COMMIT → a reader that polls the head each ms sees it); open loop, %d tx/s, half inserts, "+
		"half updates of rows inserted %.0f s before, each with a context; log in the source's own database, REPLICA IDENTITY DEFAULT, fsync and synchronous_commit on", l.opt.rate, apart/float64(l.opt.rate))
	source, err := l.database(ctx, "source", "")
	if err != nil {
		return err
	}
	defer source.drop(ctx)
	if err := source.exec(ctx, ordersTable); err != nil {
		return err
	}
	in, err := l.install(ctx, source, source)
	if err != nil {
		return err
	}
	p, err := in.run(ctx)
	if err != nil {
		return err
	}
	defer p.kill()
	// Rows for the first updates.
	err = source.exec(ctx, fmt.Sprintf(`INSERT INTO orders SELECT g, 1, 'pending', 1, 'Please leave it at the back door', now(), now() FROM generate_series(%d, -1) g`, -apart))
	if err == nil {
		err = in.reaches(ctx, p, apart)
	}
	if err != nil {
		return err
	}
	first := 0
	for window := range l.opt.pairs {
		if err := l.calm(ctx); err != nil {
			return err
		}
		progress("latency: window %d of %d", window+1, l.opt.pairs)
		before := machineCPU()
		res, err := l.window(ctx, in, first)
		if err != nil {
			return err
		}
		busy := machineCPU().busySince(before)
		first = res.next
		if err := p.gone(); err != nil {
			return err
		}
		progress("latency: p50 %.2f ms, p99 %.2f ms, at %.0f tx/s", percentile(res.visible, .5), percentile(res.visible, .99), res.rate)
		g.add("p50", "ms", percentile(res.visible, .5), below(5))
		g.add("p99", "ms", percentile(res.visible, .99), below(50))
		g.add("p99.9", "ms", percentile(res.visible, .999), nil)
		g.add("greatest", "ms", percentile(res.visible, 1), nil)
		g.add("from the beginning of the transaction, p50", "ms", percentile(res.whole, .5), nil)
		g.add("from the beginning of the transaction, p99", "ms", percentile(res.whole, .99), nil)
		g.add("the commit alone, p50", "ms", percentile(res.commit, .5), nil)
		g.add("transactions begun", "tx/s", res.rate, nil)
		g.add("begun later than planned, p99", "ms", percentile(res.late, .99), nil)
		g.add("between two looks of the reader, p50", "ms", percentile(res.looks, .5), nil)
		g.add("cores busy", "%", 100*busy, nil)
		if late := percentile(res.late, .99); late > 10 {
			g.note("1 %% of a window's transactions began more than %.0f ms late: somebody else was at work here, and the load came in bursts", late)
		}
		if res.rate < 0.97*float64(l.opt.rate) {
			g.note("the load reached only %.0f tx/s in a window: this machine cannot give %d", res.rate, l.opt.rate)
		}
	}
	u, err := in.stop(p)
	if err == nil && u.peak > 0 {
		g.add("peak memory of the sidecar", "MB", float64(u.peak)/1e6, nil)
	}
	return err
}

// sighting is a look of the reader that saw more than the one before: when its answer was there, and up to where the log was visible.
type sighting struct {
	at       time.Time
	position int64
}

// windowResult is what one window showed: milliseconds, sorted.
type windowResult struct {
	visible, whole, commit, late, looks []float64
	rate                                float64
	next                                int // number of the first transaction of the next window
}

// window runs the load once, warm-up first, and finds out when each transaction became visible.
func (l *lab) window(ctx context.Context, in *installation, first int) (*windowResult, error) {
	gap := time.Second / time.Duration(l.opt.rate)
	warm, n := int(l.opt.warm/gap), int((l.opt.warm+l.opt.latency)/gap)
	n -= n % 2
	began, committed := make([]time.Time, n), make([]time.Time, n)

	watcher, err := in.log.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer watcher.Close(context.WithoutCancel(ctx))
	var from int64
	if err := watcher.QueryRow(ctx, `SELECT position FROM backstory.head`).Scan(&from); err != nil {
		return nil, err
	}
	watchCtx, stopWatching := context.WithTimeoutCause(ctx, l.opt.warm+l.opt.latency+time.Minute, fmt.Errorf("the log did not show everything within a minute"))
	defer stopWatching()
	var seen []sighting
	var looks []float64
	watched := make(chan error, 1)
	go func() { watched <- look(watchCtx, watcher, from, from+int64(n), &seen, &looks) }()

	start := time.Now().Add(50 * time.Millisecond)
	if err := generate(ctx, in.source, sessions, n, func(conn *pgconn.PgConn, i int) error {
		due := start.Add(time.Duration(i) * gap)
		time.Sleep(time.Until(due))
		began[i] = time.Now()
		_, err := conn.Exec(ctx, transaction(first+i)).ReadAll()
		committed[i] = time.Now()
		return err
	}); err != nil {
		return nil, fmt.Errorf("run the load: %w", err)
	}
	if err := <-watched; err != nil {
		return nil, fmt.Errorf("watch the log: %w", err)
	}

	res := &windowResult{next: first + n, looks: looks}
	err = eventsOf(ctx, watcher, from, first, func(position int64, i int) error {
		if i < 0 || i >= n || committed[i].IsZero() {
			return fmt.Errorf("position %d is an event of transaction %d, which was not in this window", position, first+i)
		}
		if i < warm {
			return nil
		}
		k, _ := slices.BinarySearchFunc(seen, position, func(s sighting, p int64) int { return int(s.position - p) })
		if k == len(seen) {
			return fmt.Errorf("position %d was never seen", position)
		}
		res.visible = append(res.visible, ms(seen[k].at.Sub(committed[i])))
		res.whole = append(res.whole, ms(seen[k].at.Sub(began[i])))
		res.commit = append(res.commit, ms(committed[i].Sub(began[i])))
		res.late = append(res.late, ms(began[i].Sub(start.Add(time.Duration(i)*gap))))
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(res.visible) != n-warm {
		return nil, fmt.Errorf("the log shows %d of %d transactions", len(res.visible), n-warm)
	}
	res.rate = float64(n-warm) / committed[n-1].Sub(began[warm]).Seconds()
	for _, s := range [][]float64{res.visible, res.whole, res.commit, res.late, res.looks} {
		slices.Sort(s)
	}
	return res, nil
}

// transaction i inserts a row where i is even; where it is odd it updates the row that a much earlier one inserted. So each row is
// met by one insert and one update, and an event tells which transaction it is of.
func transaction(i int) string {
	message := fmt.Sprintf(`SELECT pg_logical_emit_message(true, 'backstory', '{"actor":"user-%d","request_id":"%08x"}')`, i%997, i)
	change := fmt.Sprintf(`INSERT INTO orders VALUES (%d, %d, 'pending', %d.50, 'Please leave it at the back door', now(), now())`, i, 1+i%100000, i%1000)
	if i%2 == 1 {
		change = fmt.Sprintf(`UPDATE orders SET status = 'paid', total = total + 1, updated_at = now() WHERE id = %d`, rowOfUpdate(i))
	}
	return "BEGIN; " + message + "; " + change + "; COMMIT"
}

// rowOfUpdate gives the row that transaction i, which is odd, updates: one that was inserted apart transactions before, or in advance.
func rowOfUpdate(i int) int { return i - 1 - apart }

// eventsOf reads the events after a position and tells of which transaction each is, counted from first.
func eventsOf(ctx context.Context, conn *pgx.Conn, from int64, first int, f func(position int64, i int) error) error {
	rows, err := conn.Query(ctx, `SELECT e.position, e.id, e.before IS NULL FROM backstory.event e
		WHERE e.position > $1 AND e.position <= (SELECT position FROM backstory.head) ORDER BY e.position`, from)
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var position, row int64
		var insert bool
		if err := rows.Scan(&position, &row, &insert); err != nil {
			return fmt.Errorf("read the log: %w", err)
		}
		i := int(row)
		if !insert {
			i += 1 + apart
		}
		if err := f(position, i-first); err != nil {
			return err
		}
	}
	return rows.Err()
}

// look asks for the head, a millisecond after each answer, until it has reached a position.
func look(ctx context.Context, conn *pgx.Conn, from, to int64, seen *[]sighting, looks *[]float64) error {
	last := time.Now()
	for p := from; p < to; {
		if !pause(ctx, time.Millisecond) {
			return context.Cause(ctx)
		}
		var now int64
		if err := conn.QueryRow(ctx, `SELECT position FROM backstory.head`).Scan(&now); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
		at := time.Now()
		*looks = append(*looks, ms(at.Sub(last)))
		last = at
		if now > p {
			p = now
			*seen = append(*seen, sighting{at, p})
		}
	}
	return nil
}

// generate spreads n pieces of work, in their order, over sessions.
func generate(ctx context.Context, d *database, sessions, n int, work func(conn *pgconn.PgConn, i int) error) error {
	var next atomic.Int64
	var wg sync.WaitGroup
	var conns []*pgx.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close(context.WithoutCancel(ctx))
		}
	}()
	for range sessions {
		c, err := d.connect(ctx)
		if err != nil {
			return err
		}
		conns = append(conns, c)
	}
	errs := make(chan error, sessions)
	for _, c := range conns {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := work(c.PgConn(), i); err != nil {
					errs <- err
					next.Store(int64(n))
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	if err := <-errs; err != nil {
		return err
	}
	return ctx.Err()
}
