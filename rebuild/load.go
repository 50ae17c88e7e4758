package rebuild

import (
	"context"
	"errors"
)

// loader gives the states of parts, also of those that were spilled.
type loader struct {
	pool    *pagePool
	folder  Folder
	budget  int64     // of memory, for what was spilled
	file    spillFile // for what has to be divided further
	used    int64
	scratch []byte
	reading [][]byte // by depth
	step    Step

	ctx   context.Context // of states
	table int
	tally *Tally
}

func (e *engine) newLoader(budget int64) loader {
	return loader{pool: e.pool, folder: e.Calculator.NewFolder(), budget: budget, file: spillFile{dir: e.TempDir}}
}

// states calls f for each key of a part, in the order of the hashes. What is folded on the way is counted in tally.
func (l *loader) states(ctx context.Context, p *part, tally *Tally, f func(key, state []byte) error) error {
	l.ctx, l.table, l.tally = ctx, p.table, tally
	switch {
	case p.store != nil:
		return p.store.sorted(f)
	case p.run != nil:
		err := l.run(p.run, 1, f)
		if e := l.file.reset(); err == nil {
			err = e
		}
		return err
	}
	return nil
}

// run folds a spilled run: in memory if there is room, otherwise it is divided by the next bits of the hash.
func (l *loader) run(r *run, depth int, f func(key, state []byte) error) (err error) {
	st := newStore(l.pool, &l.used, fanBits*depth)
	defer st.clear()
	st.reserve(r.states, l.budget/4)
	limit := int(min(max(l.budget/4/fanOut, 1<<10), 64<<10))
	var kids []*run
	defer func() {
		for _, k := range kids {
			k.clear()
		}
	}()
	kid := func(hash uint64) *run { return kids[hash>>(64-fanBits*(depth+1))&(fanOut-1)] }
	for len(l.reading) <= depth {
		l.reading = append(l.reading, nil)
	}
	one := func(rec *record) error {
		if kids != nil {
			return kid(rec.hash).add(rec.raw, limit)
		}
		var err error
		l.scratch, err = fold(l.folder, &l.step, l.scratch, st, l.table, rec, l.tally)
		full := errors.Is(err, errStoreFull)
		if err != nil && !full {
			return err
		}
		if !full && (st.bytes <= l.budget || st.n < 2) || (depth+1)*fanBits >= 64 {
			return err
		}
		for range fanOut {
			kids = append(kids, &run{file: &l.file, used: &l.used})
		}
		if err := dump(st, func(raw []byte, hash uint64) error {
			k := kid(hash)
			k.states++
			return k.add(raw, limit)
		}); err != nil {
			return err
		}
		st.clear()
		if full {
			return kid(rec.hash).add(rec.raw, limit)
		}
		return nil
	}
	n := 0
	l.reading[depth], err = r.each(l.reading[depth], func(group []record) error {
		if n++; n&0xff == 0 && l.ctx.Err() != nil {
			return context.Cause(l.ctx)
		}
		if kids == nil {
			st.warm(group)
		}
		for i := range group {
			if err := one(&group[i]); err != nil {
				return err
			}
		}
		return nil
	})
	if cap(l.reading[depth]) > 1<<20 {
		l.reading[depth] = nil
	}
	if err != nil {
		return err
	}
	if kids == nil {
		return st.sorted(f)
	}
	for _, k := range kids {
		if err := k.flush(); err != nil {
			return err
		}
		k.trim()
	}
	for _, k := range kids {
		if err := l.run(k, depth+1, f); err != nil {
			return err
		}
		k.clear()
	}
	return nil
}
