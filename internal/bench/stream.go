package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// The targets of the groups that stream, and what they are compared with.
const (
	ofDecoding    = 0.35
	ofReceiving   = 0.5
	ofFull        = 0.5
	ofSteady      = 0.25
	ofUntyped     = 0.85
	ofSmall       = 0.8
	memoryMB      = 64
	againstServer = "the server's own decoding"
	againstSocket = "pg_recvlogical, Unix socket"
	againstTCP    = "pg_recvlogical, TCP"
)

// contest is one workload and the sides that read it.
type contest struct {
	group   string
	label   string // begins the lines of its figures
	w       workload
	receive bool     // pg_recvlogical is a side
	steady  bool     // the log is in the source's own database
	rules   bool     // thirty of them are on the table
	than    *contest // of the same pair, before it: what its rate is compared with, beside others
	primary bool     // size and verify are measured on its log
	bound   bool     // its ratio to the server's own decoding has a target
}

// streams runs the groups full, default, one-row and steady: a pair of each, then the next pair of each, so that a slow minute of
// the machine meets all of them.
func (l *lab) streams(ctx context.Context, r *report) {
	w := workload{rows: l.opt.rows, updates: 1, perTx: 25, identity: "FULL"}
	byDefault, random, steady := w, w, w
	byDefault.identity = "DEFAULT"
	random.identity, random.random = "DEFAULT", true
	single := w
	single.rows, single.perTx = max(1000, l.opt.rows*3/10), 1
	bare := single
	bare.bare = true
	small := w
	small.updates = 0
	huge := small
	huge.perTx = huge.rows
	full := &contest{group: "full", label: "WAL → durable log", w: w, receive: true, primary: true, bound: true}
	many := &contest{group: "huge", label: "the same rows, 25 a transaction", w: small}
	contests := []*contest{
		full,
		{group: "rules", label: "30 rules on the table", w: w, rules: true, than: full},
		{group: "default", label: "DEFAULT, rows updated in order", w: byDefault, than: full},
		{group: "default", label: "DEFAULT, rows updated at random", w: random, than: full},
		many,
		{group: "huge", label: "one transaction", w: huge, than: many},
		{group: "one-row", label: "one-row transactions", w: single, receive: true, bound: true},
		{group: "one-row", label: "one-row transactions, no context", w: bare, receive: true, bound: true},
		{group: "steady", label: "WAL → log in the source, own WAL passed", w: steady, steady: true},
	}
	var chosen []*contest
	for _, c := range contests {
		if l.opt.runs(c.group) || c == full && (l.opt.runs("default") || l.opt.runs("rules")) {
			chosen = append(chosen, c)
			if g := r.group(c.group); g.About == "" {
				g.About = c.w.String()
			}
		}
	}
	if l.opt.runs("huge") {
		r.group("huge").About = number(float64(small.rows), "rows") + " rows inserted by one transaction, and by many, each with a context, REPLICA IDENTITY FULL"
	}
	if l.opt.runs("rules") {
		r.group("rules").About = "as full, with 30 rules on the table: of an update 13 conditions are evaluated, of an insert 6"
	}
	if g := r.group("default"); l.opt.runs("default") {
		g.About = "as full, with REPLICA IDENTITY DEFAULT: the values before come from the log's own state"
	} else {
		r.drop(g)
	}
	failed := map[*contest]bool{}
	for pair := range l.opt.pairs {
		rates := map[*contest]float64{}
		for _, c := range chosen {
			if ctx.Err() != nil || failed[c] {
				continue
			}
			g := r.group(c.group)
			progress("%s: pair %d of %d: %s", c.group, pair+1, l.opt.pairs, c.w)
			rate, err := l.contest(ctx, g, c, pair, rates[c.than])
			if err != nil {
				if ctx.Err() == nil {
					g.failed(fmt.Errorf("%s, pair %d: %w", c.label, pair+1, err))
				}
				failed[c] = true
				continue
			}
			rates[c] = rate
		}
	}
}

// thirtyRules are rules of which one takes each update of the workload. Thirteen are about its columns, six about inserts, the others do not concern it.
func thirtyRules() string {
	var b strings.Builder
	b.WriteString("aggregates:\n  Order:\n    table: orders\n    events:\n")
	b.WriteString("      OrderPaid: {on: update, when: 'before.status == \"pending\" and after.status startsWith \"paid\"', data: [status, total], with: {customer_id: after.customer_id}}\n")
	for i := range 12 {
		fmt.Fprintf(&b, "      OrderState%d: {on: update, when: 'became(\"status\", \"state %d\")', data: [status]}\n", i, i)
	}
	for i := range 6 {
		fmt.Fprintf(&b, "      OrderOdd%d: {on: insert, when: after.total < %d and after.customer_id < 0, data: [total]}\n", i, i)
	}
	for i := range 6 {
		fmt.Fprintf(&b, "      NoteTaken%d: {on: update, when: after.note contains \"note %d\", data: [note]}\n", i, i)
	}
	for i := range 5 {
		fmt.Fprintf(&b, "      OrderHandedOver%d: {on: update, when: after.customer_id == %d, data: [customer_id]}\n", i, i)
	}
	return b.String()
}

// drop takes a group out again.
func (r *report) drop(g *group) {
	for i, x := range r.Groups {
		if x == g {
			r.Groups = append(r.Groups[:i], r.Groups[i+1:]...)
			return
		}
	}
}

// contest measures one pair of a contest and returns the sidecar's rate. than is that of c.than, if it is known.
func (l *lab) contest(ctx context.Context, g *group, c *contest, pair int, than float64) (float64, error) {
	source, err := l.database(ctx, "source", "")
	if err != nil {
		return 0, err
	}
	log := source
	if !c.steady {
		if log, err = l.database(ctx, "log", ""); err != nil {
			return 0, err
		}
	}
	defer func() {
		for _, d := range []*database{log, source} {
			if err := d.drop(ctx); err != nil {
				progress("%v", err)
			}
			if log == source {
				break
			}
		}
	}()
	if err := c.w.prepare(ctx, source); err != nil {
		return 0, err
	}
	in, err := l.install(ctx, source, log)
	if err != nil {
		return 0, err
	}
	if c.rules {
		file := filepath.Join(l.scratch.Path, "rules.yaml")
		if err := os.WriteFile(file, []byte(thirtyRules()), 0o600); err != nil {
			return 0, err
		}
		in.env = append(in.env, "BACKSTORY_CONFIG="+file)
	}
	idle, _, err := in.command(ctx, "run", "--once") // also brings the program into memory
	if err != nil {
		return 0, err
	}
	w, err := c.w.load(ctx, source)
	if err != nil {
		return 0, err
	}
	bySQL, bySocket, byTCP := in.slot+"_sql", in.slot+"_unix", in.slot+"_tcp"
	if err := copySlots(ctx, source, in.slot, bySQL, bySocket, byTCP); err != nil {
		return 0, err
	}

	rates := map[string]float64{}
	var costs func() // noted below the rates
	rate := func(side string, took time.Duration) {
		rates[side] = float64(w.changes()) / took.Seconds()
		progress("%s: %-44s %7.2f s  %9.0f rows/s", g.Name, side, took.Seconds(), rates[side])
	}
	sides := []func() error{
		func() error {
			took, err := w.decode(ctx, source, bySQL)
			if err == nil {
				rate(againstServer, took)
			}
			return err
		},
		func() error {
			if c.steady {
				took, note, err := l.steady(ctx, g, c, in, w)
				if err == nil {
					rate(c.label, took)
				}
				costs = note
				return err
			}
			u, cpu, err := in.once(ctx, w)
			if err == nil {
				rate(c.label, u.wall)
			}
			costs = func() { l.cost(g, c, w, u, cpu) }
			return err
		},
	}
	switch {
	case !c.receive:
	case l.recvlogical == "":
		g.notMeasured(noClient, "pg_recvlogical")
	default:
		for _, s := range []struct{ side, slot, url string }{{againstSocket, bySocket, source.url}, {againstTCP, byTCP, source.tcp}} {
			sides = append(sides, func() error {
				u, err := w.receive(ctx, source, s.slot, s.url)
				if err == nil {
					rate(s.side, u.wall)
				}
				return err
			})
		}
	}
	for i := range sides {
		if err := l.calm(ctx); err != nil {
			return 0, err
		}
		if err := sides[(i+pair)%len(sides)](); err != nil {
			return 0, err
		}
	}
	own := rates[c.label]
	switch {
	case than == 0:
	case c.rules:
		g.compare(c.label, "rows/s", own, "the same without rules", than, atLeast(ofUntyped))
	case c.group == "huge":
		g.compare(c.label, "rows/s", own, c.than.label, than, atLeast(ofSmall))
		g.add("a transaction that commits right after it is in the log after", "s", float64(w.changes())/own, nil)
	default:
		g.compare(c.label, "rows/s", own, "the same with FULL", than, atLeast(ofFull))
	}
	for _, x := range []struct {
		against string
		t       *target
	}{{againstServer, c.target()}, {againstSocket, atLeast(ofReceiving)}, {againstTCP, atLeast(ofReceiving)}} {
		if limit := rates[x.against]; limit > 0 {
			g.compare(c.label, "rows/s", own, x.against, limit, x.t)
		}
	}
	costs()
	if c.primary {
		g.add("run --once with nothing to do, start to exit", "ms", ms(idle.wall), nil)
		return own, l.after(ctx, g, in, w)
	}
	return own, nil
}

func (c *contest) target() *target {
	switch {
	case c.steady:
		return atLeast(ofSteady)
	case c.bound:
		return atLeast(ofDecoding)
	}
	return nil
}

// cost notes what a run has cost beside time.
func (l *lab) cost(g *group, c *contest, w *loaded, u usage, cpu map[string]time.Duration) {
	if u.peak > 0 {
		g.add(c.label+": peak memory of the sidecar", "MB", float64(u.peak)/1e6, atMost(memoryMB))
	} else {
		g.notMeasured("peak memory: this system has no /proc")
	}
	perMillion := 1e6 / float64(w.changes())
	g.add(c.label+": CPU of the sidecar, 1 M rows", "s", u.cpu.Seconds()*perMillion, nil)
	for _, kind := range []string{"walsender", "log backend"} {
		if t, ok := cpu[kind]; ok {
			g.add(c.label+": CPU of the "+kind+", 1 M rows", "s", t.Seconds()*perMillion, nil)
		}
	}
}

// after measures what can be measured of a finished log.
func (l *lab) after(ctx context.Context, g *group, in *installation, w *loaded) error {
	s, err := in.size(ctx)
	if err != nil {
		return err
	}
	n := float64(w.events)
	g.add("WAL of the source per row change", "B", float64(w.walBytes)/float64(w.changes()), nil)
	g.add("log per event, table and indexes", "B", float64(s.heap+s.indexes+s.rest)/n, nil)
	g.add("  of which indexes", "B", float64(s.indexes)/n, nil)
	g.add("  of which context and the small tables", "B", float64(s.rest)/n, nil)
	if err := l.calm(ctx); err != nil {
		return err
	}
	u, err := in.verify(ctx, w.events)
	if err != nil {
		return err
	}
	g.add("verify", "events/s", n/u.wall.Seconds(), nil)
	return nil
}

// steady runs the sidecar, not --once, until it has passed all that it wrote itself into the source's WAL. It returns how long that
// took, and a function that notes what it cost.
func (l *lab) steady(ctx context.Context, g *group, c *contest, in *installation, w *loaded) (took time.Duration, note func(), err error) {
	p, err := start(l.sidecar, []string{"run"}, in.env...)
	if err != nil {
		return 0, nil, err
	}
	defer p.kill()
	conn, err := in.source.connect(ctx)
	if err != nil {
		return 0, nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	costs := l.watchBackends(ctx, in.source)
	defer costs.end()
	until := func(what, query string, args ...any) error {
		return within(ctx, 30*time.Minute, 10*time.Millisecond, what, func(ctx context.Context) (done bool, err error) {
			if err := p.gone(); err != nil {
				return false, err
			}
			err = conn.QueryRow(ctx, query, args...).Scan(&done)
			return done, err
		})
	}
	if err := until("wait for the log", `SELECT position >= $1 FROM backstory.head`, w.events); err != nil {
		return 0, nil, err
	}
	appended := time.Since(p.began)
	var end string
	if err := conn.QueryRow(ctx, `SELECT pg_current_wal_flush_lsn()::text`).Scan(&end); err != nil {
		return 0, nil, err
	}
	err = until("wait for the sidecar to pass its own WAL", `SELECT coalesce(bool_or(r.sent_lsn >= $2::pg_lsn), false) FROM pg_replication_slots s
		JOIN pg_stat_replication r ON r.pid = s.active_pid WHERE s.slot_name = $1`, in.slot, end)
	if err != nil {
		return 0, nil, err
	}
	took = time.Since(p.began)
	cpu := costs.end()
	u, err := in.stop(p)
	if err == nil {
		err = in.check(ctx, w)
	}
	return took, func() {
		g.add("  of which until the last event was in the log", "s", appended.Seconds(), nil)
		g.add("  of which passing its own WAL", "s", (took - appended).Seconds(), nil)
		l.cost(g, c, w, u, cpu)
	}, err
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
