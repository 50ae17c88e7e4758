package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// checkout measures `backstory checkout` of a table as it is at the end of its history, from a log that the sidecar wrote.
func (l *lab) checkout(ctx context.Context, g *group) error {
	w := workload{rows: 3 * l.opt.rows, updates: 2, perTx: 25, identity: "FULL", random: true}
	g.About = fmt.Sprintf("backstory checkout --at HEAD of %s rows out of %s; start to exit of the process; log in the source's own database",
		number(float64(w.inserts()), "rows"), w)
	source, err := l.database(ctx, "source", "")
	if err != nil {
		return err
	}
	defer source.drop(ctx)
	if err := w.prepare(ctx, source); err != nil {
		return err
	}
	in, err := l.install(ctx, source, source)
	if err != nil {
		return err
	}
	done, err := w.load(ctx, source)
	if err != nil {
		return err
	}
	progress("checkout: capturing %s events", number(float64(done.events), "rows"))
	if _, _, err := in.once(ctx, done); err != nil {
		return err
	}
	// Rows by rows the same as the source's table, or the figures mean nothing. It is also the run that nothing is in memory for.
	const schema = "bench_checkout"
	progress("checkout: comparing with the source's table")
	if _, err := l.checkOut(ctx, in, done, "--schema", schema); err != nil {
		return err
	}
	differ, err := ask[int64](ctx, source, `SELECT count(*) FROM ((SELECT * FROM orders EXCEPT ALL SELECT * FROM `+schema+`.orders)
		UNION ALL (SELECT * FROM `+schema+`.orders EXCEPT ALL SELECT * FROM orders)) x`)
	if err == nil && differ > 0 {
		err = fmt.Errorf("the checkout differs from the source's table in %d rows", differ)
	}
	if err != nil {
		return err
	}

	const toSchema, toCSV, reading = "checkout into a schema", "checkout into CSV files", "reading the events alone, one Go reader"
	for pair := range l.opt.pairs {
		rates := map[string]float64{}
		rate := func(side string, took time.Duration) {
			rates[side] = float64(w.changes()) / took.Seconds()
			progress("checkout: %-44s %7.2f s  %9.0f events/s", side, took.Seconds(), rates[side])
		}
		var peak int64
		sides := []func() error{
			func() error {
				if err := source.exec(ctx, `DROP SCHEMA `+schema+` CASCADE`); err != nil {
					return err
				}
				if err := l.calm(ctx); err != nil {
					return err
				}
				u, err := l.checkOut(ctx, in, done, "--schema", schema)
				rate(toSchema, u.wall)
				peak = u.peak
				return err
			},
			func() error {
				dir := filepath.Join(l.scratch.Path, "csv")
				u, err := l.checkOut(ctx, in, done, "--csv", dir)
				rate(toCSV, u.wall)
				return errors.Join(err, os.RemoveAll(dir))
			},
			func() error {
				took, err := readAll(ctx, in.log.url, done.events)
				rate(reading, took)
				return err
			},
		}
		progress("checkout: pair %d of %d", pair+1, l.opt.pairs)
		for i := range sides {
			if err := l.calm(ctx); err != nil {
				return err
			}
			if err := sides[(i+pair)%len(sides)](); err != nil {
				return err
			}
		}
		g.add(toSchema, "events/s", rates[toSchema], atLeast(300_000))
		g.add(toCSV, "events/s", rates[toCSV], nil)
		g.compare(toSchema, "events/s", rates[toSchema], reading, rates[reading], nil)
		if peak > 0 {
			g.add("peak memory of checkout", "MB", float64(peak)/1e6, nil)
		}
	}
	return nil
}

// checkOut runs the command and makes sure that it built the table.
func (l *lab) checkOut(ctx context.Context, in *installation, w *loaded, into ...string) (usage, error) {
	u, out, err := in.command(ctx, append([]string{"checkout", "--at", "HEAD", "--json", "orders"}, into...)...)
	if err != nil {
		return u, err
	}
	var rep struct {
		Events int64
		Tables []struct{ Rows int64 }
	}
	if err := json.Unmarshal([]byte(out), &rep); err != nil {
		return u, fmt.Errorf("read what checkout says: %w", err)
	}
	if rep.Events != int64(w.changes()) || len(rep.Tables) != 1 || rep.Tables[0].Rows != int64(w.inserts()) {
		return u, fmt.Errorf("checkout: folded %d events of %d into %+v", rep.Events, w.changes(), rep.Tables)
	}
	return u, nil
}

// readAll reads all events and throws them away.
func readAll(ctx context.Context, url string, want int64) (time.Duration, error) {
	began := time.Now()
	log, err := eventlog.Open(ctx, eventlog.Config{URL: url})
	if err != nil {
		return 0, err
	}
	defer log.Close()
	var n int64
	err = log.Read(ctx, eventlog.Selection{Quiet: true, NoMetadata: true}, func(*eventlog.Event) error { n++; return nil })
	took := time.Since(began)
	if err == nil && n != want {
		err = fmt.Errorf("read %d events of %d", n, want)
	}
	return took, err
}
