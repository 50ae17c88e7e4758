package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// What follows is pgbench's "TPC-B (sort of)" for machines without pgbench (PostgreSQL manual, pgbench, "What Is the Transaction
// Actually Performed in pgbench?"): the same tables, statements and protocol.

func fillTPCB(ctx context.Context, d *database, scale int) error {
	return d.exec(ctx,
		`CREATE TABLE pgbench_branches (bid int NOT NULL, bbalance int, filler char(88)) WITH (fillfactor = 100)`,
		`CREATE TABLE pgbench_tellers (tid int NOT NULL, bid int, tbalance int, filler char(84)) WITH (fillfactor = 100)`,
		`CREATE TABLE pgbench_accounts (aid int NOT NULL, bid int, abalance int, filler char(84)) WITH (fillfactor = 100)`,
		`CREATE TABLE pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22))`,
		fmt.Sprintf(`INSERT INTO pgbench_branches (bid, bbalance) SELECT g, 0 FROM generate_series(1, %d) g`, scale),
		fmt.Sprintf(`INSERT INTO pgbench_tellers (tid, bid, tbalance) SELECT g, (g - 1) / 10 + 1, 0 FROM generate_series(1, %d) g`, 10*scale),
		fmt.Sprintf(`INSERT INTO pgbench_accounts (aid, bid, abalance, filler) SELECT g, (g - 1) / 100000 + 1, 0, '' FROM generate_series(1, %d) g`, 100_000*scale),
		`ALTER TABLE pgbench_branches ADD PRIMARY KEY (bid)`, `ALTER TABLE pgbench_tellers ADD PRIMARY KEY (tid)`, `ALTER TABLE pgbench_accounts ADD PRIMARY KEY (aid)`,
		`VACUUM ANALYZE`)
}

// portTPCB runs the transactions with as many sessions as pgbench would.
func portTPCB(ctx context.Context, d *database, scale int, length time.Duration) (n int64, tps float64, err error) {
	var done atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, clients)
	ready, begin := make(chan struct{}, clients), make(chan time.Time)
	for c := range clients {
		wg.Go(func() {
			conn, err := d.connect(ctx)
			ready <- struct{}{}
			if err != nil {
				errs[c] = err
				return
			}
			defer conn.Close(context.WithoutCancel(ctx))
			end := <-begin
			pg := conn.PgConn()
			for time.Now().Before(end) && ctx.Err() == nil {
				aid, bid, tid, delta := 1+rand.IntN(100_000*scale), 1+rand.IntN(scale), 1+rand.IntN(10*scale), rand.IntN(10001)-5000
				for _, q := range []string{
					"BEGIN",
					fmt.Sprintf("UPDATE pgbench_accounts SET abalance = abalance + %d WHERE aid = %d", delta, aid),
					fmt.Sprintf("SELECT abalance FROM pgbench_accounts WHERE aid = %d", aid),
					fmt.Sprintf("UPDATE pgbench_tellers SET tbalance = tbalance + %d WHERE tid = %d", delta, tid),
					fmt.Sprintf("UPDATE pgbench_branches SET bbalance = bbalance + %d WHERE bid = %d", delta, bid),
					fmt.Sprintf("INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (%d, %d, %d, %d, CURRENT_TIMESTAMP)", tid, bid, aid, delta),
					"END",
				} {
					if _, err := pg.Exec(ctx, q).ReadAll(); err != nil {
						errs[c] = err
						return
					}
				}
				done.Add(1)
			}
		})
	}
	for range clients {
		<-ready
	}
	began := time.Now()
	for range clients {
		select {
		case begin <- began.Add(length):
		case <-time.After(time.Second): // a session that did not come about
		}
	}
	wg.Wait()
	took := time.Since(began)
	return done.Load(), float64(done.Load()) / took.Seconds(), errors.Join(append(errs, ctx.Err())...)
}
