package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"syscall"
	"time"
)

// clients is how many sessions pgbench works with: enough to saturate two cores, and for commits to share a flush.
const clients = 8

// The sides of the app group.
const (
	nobody      = "nothing attached"
	receiver    = "pg_recvlogical attached"
	withSidecar = "the sidecar attached"
)

// outcome is one run of pgbench.
type outcome struct {
	tps, busy float64
	// behind is how many transactions the sidecar had yet to put into the log when pgbench ended, catchUp how long that took;
	// whole is the rate over both times.
	behind  float64
	catchUp time.Duration
	whole   float64
	usage   usage // of the sidecar
}

// app measures what the sidecar costs an application that wants all of the machine: pgbench's TPC-B on tables as pgbench makes them.
func (l *lab) app(ctx context.Context, g *group) error {
	with := "pgbench"
	if l.pgbench == "" {
		with = "the same transactions by a Go program, since pgbench is not installed: it takes more CPU than pgbench"
	}
	g.About = fmt.Sprintf("cost to the application: TPC-B by %s, scale %d, %d clients, %s a run, all on the same cores; log in the source's own database; the tables held rows before",
		with, l.opt.scale, clients, l.opt.app)
	template, err := l.database(ctx, "pgbench", "")
	if err != nil {
		return err
	}
	defer template.drop(ctx)
	if err := l.fillTPCB(ctx, template); err != nil {
		return err
	}
	sides := []string{nobody, receiver, withSidecar}
	if l.recvlogical == "" {
		g.notMeasured("the target is against pg_recvlogical, and "+noClient, "pg_recvlogical")
		sides = []string{nobody, withSidecar}
	}
	for round := range l.opt.pairs {
		got := map[string]outcome{}
		for i := range sides {
			side := sides[(i+round)%len(sides)]
			progress("app: round %d of %d: %s", round+1, l.opt.pairs, side)
			o, err := l.tpcb(ctx, template, side)
			if err != nil {
				return fmt.Errorf("%s: %w", side, err)
			}
			progress("app: %s: %.0f tps, cores %.0f %% busy, behind by %.0f transactions, caught up in %.1f s", side, o.tps, 100*o.busy, o.behind, o.catchUp.Seconds())
			got[side] = o
		}
		free, sidecar := got[nobody], got[withSidecar]
		if r, ok := got[receiver]; ok {
			g.compare(withSidecar, "tps", sidecar.tps, "with "+receiver, r.tps, atLeast(0.9))
			g.compare(withSidecar+", catching up included", "tps", sidecar.whole, "with "+receiver, r.tps, nil)
			g.compare(receiver, "tps", r.tps, "with "+nobody, free.tps, nil)
		}
		g.compare(withSidecar, "tps", sidecar.tps, "with "+nobody, free.tps, nil)
		g.add("cores busy with nothing attached", "%", 100*free.busy, nil)
		g.add("cores busy with the sidecar", "%", 100*sidecar.busy, nil)
		g.add("the sidecar's lag when pgbench ended", "transactions", sidecar.behind, nil)
		g.add("  caught up after", "s", sidecar.catchUp.Seconds(), nil)
		if sidecar.usage.peak > 0 {
			g.add("peak memory of the sidecar", "MB", float64(sidecar.usage.peak)/1e6, nil)
		}
		if free.busy < 0.9 {
			g.note("the cores were %.0f %% busy only with nothing attached: the disk was the limit, and the ratio says less about cost", 100*free.busy)
		}
		if sidecar.catchUp > l.opt.app/10 && !l.opt.quick {
			g.note("the sidecar did not keep up in a run: it needed %.1f s after it", sidecar.catchUp.Seconds())
		}
	}
	return nil
}

// tpcb runs one side on a fresh copy of the tables.
func (l *lab) tpcb(ctx context.Context, template *database, side string) (o outcome, err error) {
	d, err := l.database(ctx, "tpcb", template.name)
	if err != nil {
		return o, err
	}
	defer d.drop(ctx)
	var p *child
	var in *installation
	switch side {
	case receiver:
		slot := d.name
		err = d.exec(ctx, `CREATE PUBLICATION `+publication+` FOR TABLE pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history`,
			`SELECT pg_create_logical_replication_slot('`+slot+`', 'pgoutput')`)
		if err != nil {
			return o, err
		}
		p, err = start(l.recvlogical, []string{"--dbname", d.url, "--slot", slot, "--start", "--no-loop", "--option", "proto_version=" + proto,
			"--option", "publication_names=" + publication, "--file", "/dev/null"})
		if err != nil {
			return o, err
		}
		defer p.kill()
		if err := l.streaming(ctx, p, slot); err != nil {
			return o, err
		}
	case withSidecar:
		if in, err = l.install(ctx, d, d); err != nil {
			return o, err
		}
		if p, err = in.run(ctx); err != nil {
			return o, err
		}
		defer p.kill()
	}
	if err := l.calm(ctx); err != nil {
		return o, err
	}
	before, began := machineCPU(), time.Now()
	n, tps, err := l.runTPCB(ctx, d)
	if err != nil {
		return o, err
	}
	ended := time.Now()
	o.tps, o.busy = tps, machineCPU().busySince(before)
	if in != nil {
		const changes = 4 // of a transaction: three updates, an insert
		position, err := ask[int64](ctx, d, `SELECT position FROM backstory.head`)
		if err != nil {
			return o, err
		}
		o.behind = max(0, float64(n*changes-position)/changes)
		if err := in.passes(ctx, p, `INSERT INTO pgbench_history (tid, bid, aid, delta) VALUES (0, 0, 0, 0)`); err != nil {
			return o, err
		}
		o.catchUp = time.Since(ended)
		o.whole = float64(n) / time.Since(began).Seconds()
		// More events would mean that something was captured twice. An update by 0 changes nothing, and is none.
		zeros, err := ask[int64](ctx, d, `SELECT count(*) FROM pgbench_history WHERE delta = 0`)
		if err != nil {
			return o, err
		}
		position, err = ask[int64](ctx, d, `SELECT position FROM backstory.head`)
		if most := n*changes + 1; err == nil && (position > most || position < most-3*zeros) {
			err = fmt.Errorf("the log has %d events of %d transactions, %d of which change nothing", position, n, zeros)
		}
		if err != nil {
			return o, err
		}
	}
	if p != nil {
		if err := p.gone(); err != nil {
			return o, err
		}
		sig := syscall.SIGINT
		if in != nil {
			sig = syscall.SIGTERM
		}
		if o.usage, err = p.stop(sig); err != nil {
			return o, err
		}
	}
	return o, nil
}

// fillTPCB makes pgbench's tables.
func (l *lab) fillTPCB(ctx context.Context, d *database) error {
	if l.pgbench == "" {
		return fillTPCB(ctx, d, l.opt.scale)
	}
	_, _, err := runProgram(ctx, l.pgbench, []string{"--initialize", "--quiet", "--scale", strconv.Itoa(l.opt.scale), d.url})
	return err
}

var (
	tpsLine = regexp.MustCompile(`(?m)^tps = ([0-9.]+)`)
	txLine  = regexp.MustCompile(`(?m)^number of transactions actually processed: (\d+)`)
)

// runTPCB runs the transactions for a while; it returns how many there were, and their rate without connecting.
func (l *lab) runTPCB(ctx context.Context, d *database) (n int64, tps float64, err error) {
	if l.pgbench == "" {
		return portTPCB(ctx, d, l.opt.scale, l.opt.app)
	}
	_, out, err := runProgram(ctx, l.pgbench, []string{"--no-vacuum", "--client", strconv.Itoa(clients), "--jobs", "2",
		"--time", strconv.Itoa(int(l.opt.app.Seconds())), d.url})
	if err != nil {
		return 0, 0, err
	}
	t, x := tpsLine.FindStringSubmatch(out), txLine.FindStringSubmatch(out)
	if t == nil || x == nil {
		return 0, 0, errors.New("read what pgbench says:\n" + out)
	}
	n, err1 := strconv.ParseInt(x[1], 10, 64)
	tps, err2 := strconv.ParseFloat(t[1], 64)
	return n, tps, errors.Join(err1, err2)
}
