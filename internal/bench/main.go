package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	quick   bool
	strict  bool
	pairs   int
	rows    int
	only    []string
	json    string
	version string // of Postgres

	latency, warm time.Duration // one window of the latency group, and what comes before it
	app           time.Duration // one run of pgbench
	rate          int           // transactions a second
	scale         int           // of pgbench
}

// groupNames are in the order in which they run. The first ones are interleaved: one pair of each after the other.
var groupNames = []string{"full", "rules", "default", "huge", "one-row", "steady", "latency", "app", "baseline", "checkout", "kafka"}

func parseFlags(args []string) (options, error) {
	var o options
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.BoolVar(&o.quick, "quick", false, "small sizes and one pair: shows that everything runs, and nothing else")
	f.BoolVar(&o.strict, "strict", false, "exit with 1 if a target is missed or something is not measured")
	f.IntVar(&o.pairs, "pairs", 5, "pairs to take the median of")
	f.IntVar(&o.rows, "rows", 1_000_000, "row changes of the workload; one-row has 0.3 times, checkout 3 times, baseline 5 times as many")
	only := f.String("only", "", "groups to run, separated by commas: "+strings.Join(groupNames, ", "))
	f.StringVar(&o.json, "json", "", "a file for the figures as JSON; - for standard output instead of the table")
	f.StringVar(&o.version, "pg", "", "PostgreSQL version: 14 to 18, or 17.4; default: the newest local one")
	f.DurationVar(&o.latency, "latency-time", 10*time.Second, "length of one window of latency")
	f.DurationVar(&o.app, "app-time", 20*time.Second, "length of one run of pgbench")
	f.IntVar(&o.rate, "rate", 2000, "transactions a second of latency")
	f.IntVar(&o.scale, "scale", 10, "scale of pgbench")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected %q", f.Arg(0))
	}
	given := map[string]bool{}
	f.Visit(func(f *flag.Flag) { given[f.Name] = true })
	o.warm = 3 * time.Second
	if o.quick {
		o.warm = 500 * time.Millisecond
		for name, set := range map[string]func(){
			"pairs": func() { o.pairs = 1 }, "rows": func() { o.rows = 20_000 }, "latency-time": func() { o.latency = 2 * time.Second },
			"app-time": func() { o.app = 2 * time.Second }, "scale": func() { o.scale = 1 }, "rate": func() { o.rate = 200 },
		} {
			if !given[name] {
				set()
			}
		}
	}
	o.only = groupNames
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	for _, n := range o.only {
		if !slices.Contains(groupNames, n) {
			return o, fmt.Errorf("-only: there is no group %q; there are %s", n, strings.Join(groupNames, ", "))
		}
	}
	if o.pairs < 1 || o.rows < 1000 || o.rate < 1 || o.scale < 1 || o.app < time.Second || o.latency < time.Second {
		return o, errors.New("-pairs, -rate and -scale must be at least 1, -rows at least 1000, times at least 1s")
	}
	return o, nil
}

func (o *options) runs(group string) bool { return slices.Contains(o.only, group) }

func main() {
	opt, err := parseFlags(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	go func() {
		<-ctx.Done()
		stop() // a second signal ends the process at once
	}()
	os.Exit(run(ctx, opt))
}

// run measures and prints; it returns the exit code.
func run(ctx context.Context, opt options) int {
	l, err := newLab(ctx, opt)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	defer func() {
		if err := l.close(); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
	}()
	r := &report{Quick: opt.quick, Pairs: opt.pairs, Began: time.Now().UTC().Truncate(time.Second)}
	if r.Machine, err = l.describe(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	l.streams(ctx, r)
	for _, g := range []struct {
		name string
		run  func(context.Context, *group) error
	}{{"latency", l.latency}, {"app", l.app}, {"baseline", l.baseline}, {"checkout", l.checkout}, {"kafka", l.kafka}} {
		if opt.runs(g.name) && ctx.Err() == nil {
			gr := r.group(g.name)
			gr.failed(g.run(ctx, gr))
		}
	}
	r.Seconds = time.Since(r.Began).Round(time.Second).Seconds()
	if ctx.Err() != nil {
		r.Interrupted = true
	}
	if err := r.write(os.Stdout, opt.json); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return r.exitCode(opt.strict)
}
