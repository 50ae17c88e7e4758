package shop

import (
	"context"
	_ "embed"
	"errors"
	"math/rand/v2"
	"sync"
	"time"
)

//go:embed schema.sql
var schema string

// Schema is the SQL that makes the shop's tables, in the first schema of the search_path.
func Schema() string { return schema }

//go:embed backstory.yaml
var config []byte

// Rules are what a backstory.yaml says of these tables.
func Rules() []byte { return config }

// Config of a shop.
type Config struct {
	// URL of the database, which has the tables of Schema. Required.
	URL string
	// Sessions is how many connections work at the same time. Default 4.
	Sessions int
	// Rate is how many transactions there are in a second, of all sessions together, at most. 0: as many as possible.
	Rate float64
	// Transactions is after how many commits Run ends; a few more may be under way then. 0: Run ends with its context.
	Transactions int64
	// Seed of the random choices.
	Seed uint64
	// Patience is how long a paid order waits for the warehouse; other things take a multiple of it. 0: nobody waits.
	Patience time.Duration
	// OnTransaction is told of every transaction that has ended, one at a time; the shop waits for it.
	OnTransaction func(Transaction)
}

// Transaction is one that has ended.
type Transaction struct {
	Action  string // "check out", "ship" …
	Actor   string // empty: the transaction had no context
	Reason  string
	Outcome Outcome
	Refusal string // why it was rolled back
	EndedAt time.Time
}

// Outcome is how a transaction ended.
type Outcome int

// The outcomes.
const (
	Committed  Outcome = iota
	RolledBack         // by the application
	Unknown            // the connection was lost before the answer
)

// Stats counts transactions by action.
type Stats struct {
	Committed, RolledBack map[string]int64
	Commits, Rollbacks    int64 // the sums
	Retried               int64 // because of a deadlock or a changed lock_version; not among the above
	Unknown               int64
	Reconnects            int64
}

// shop is what the sessions share.
type shop struct {
	cfg  Config
	pace pacer
	stop context.CancelFunc

	mu    sync.Mutex // guards the following
	stats Stats
}

// Run keeps the shop busy until ctx ends or Config.Transactions are done. A shop without products gets some first.
func Run(ctx context.Context, cfg Config) (Stats, error) {
	if cfg.Sessions == 0 {
		cfg.Sessions = 4
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	s := &shop{cfg: cfg, stop: stop, stats: Stats{Committed: map[string]int64{}, RolledBack: map[string]int64{}}}
	if cfg.Rate > 0 {
		s.pace.every = time.Duration(float64(time.Second) / cfg.Rate)
	}
	sessions := make([]*session, cfg.Sessions)
	defer func() {
		for _, x := range sessions {
			if x != nil {
				x.close()
			}
		}
	}()
	for i := range sessions {
		x, err := s.newSession(ctx, rand.New(rand.NewPCG(cfg.Seed, uint64(i))))
		if err != nil {
			if over(ctx) {
				err = nil
			}
			return s.stats, err
		}
		sessions[i] = x
	}
	if err := sessions[0].openShop(); err != nil {
		return s.stats, err
	}
	errs := make([]error, len(sessions))
	var wg sync.WaitGroup
	for i, x := range sessions {
		wg.Go(func() {
			if errs[i] = x.run(); errs[i] != nil {
				stop()
			}
		})
	}
	wg.Wait()
	return s.stats, errors.Join(errs...)
}

// over reports whether ctx has ended, or is about to: the network keeps its deadline a little earlier than ctx itself.
func over(ctx context.Context) bool {
	end, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(end)
}

// count notes how a transaction ended.
func (s *shop) count(t Transaction) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch t.Outcome {
	case Committed:
		s.stats.Committed[t.Action]++
		s.stats.Commits++
		if s.stats.Commits == s.cfg.Transactions {
			s.stop()
		}
	case RolledBack:
		s.stats.RolledBack[t.Action]++
		s.stats.Rollbacks++
	case Unknown:
		s.stats.Unknown++
	}
	if s.cfg.OnTransaction != nil {
		t.EndedAt = time.Now()
		s.cfg.OnTransaction(t)
	}
}

func (s *shop) add(n *int64) {
	s.mu.Lock()
	*n++
	s.mu.Unlock()
}

// pacer spreads the transactions of all sessions over time, unevenly as people do.
type pacer struct {
	every time.Duration // on average; 0: does not wait

	mu   sync.Mutex // guards the following
	next time.Time
}

// wait returns when the next transaction is due, or ctx ends.
func (p *pacer) wait(ctx context.Context, r *rand.Rand) {
	if p.every == 0 {
		return
	}
	now := time.Now()
	p.mu.Lock()
	due := p.next
	if due.Before(now) {
		due = now
	}
	p.next = due.Add(time.Duration(r.ExpFloat64() * float64(p.every)))
	p.mu.Unlock()
	select {
	case <-time.After(due.Sub(now)):
	case <-ctx.Done():
	}
}
