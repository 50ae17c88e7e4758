package rebuild

import (
	"context"
)

// Rekey gives all states that a table has come to so far to f, in the order of their keys' hashes, and forgets them; f makes
// steps of them, for other keys perhaps. It is for the rare event after which keys mean something else: all workers wait for it.
func (r *Router) Rekey(table int, f func(key, state []byte) error) error {
	e := r.engine
	if err := r.rest(); err != nil {
		return err
	}
	// From here on the workers wait for the next batch; what is theirs may be looked at until the first one is sent.
	if r.loader.pool == nil {
		r.loader = e.newLoader(e.MaxMemoryBytes / 4)
		r.file = spillFile{dir: e.TempDir}
	}
	old, held := []part{}, int64(0)
	for _, p := range e.parts[table*fanOut : (table+1)*fanOut] {
		o := part{table: table, store: p.store, run: p.run}
		if p.store != nil {
			p.worker.stores--
			p.worker.used -= p.store.bytes
			r.used += p.store.bytes
			held += p.store.bytes
			o.store.used = &r.used
		}
		if p.run != nil {
			if err := p.run.flush(); err != nil {
				return err
			}
			p.run.trim()
			n := p.run.held()
			p.worker.spilled--
			p.worker.used -= n
			r.used += n
			o.run.used = &r.used
		}
		p.store, p.run = nil, nil
		old = append(old, o)
	}
	defer func() {
		for i := range old {
			old[i].forget()
		}
	}()
	if held > e.MaxMemoryBytes/4 { // the new states need the memory
		for i := range old {
			if o := &old[i]; o.store != nil {
				if err := o.spill(&r.file, &r.used, 64<<10); err != nil {
					return err
				}
				if err := o.run.flush(); err != nil {
					return err
				}
				o.run.trim()
			}
		}
	}
	for i := range old {
		if err := r.loader.states(r.ctx, &old[i], &e.moved[table], f); err != nil {
			return err
		}
		old[i].forget()
	}
	return nil
}

// rest waits until the workers have folded all that they were given.
func (r *Router) rest() error {
	if err := r.flush(); err != nil {
		return err
	}
	for _, w := range r.engine.workers {
		select {
		case w.in <- nil:
		case <-r.ctx.Done():
			return context.Cause(r.ctx)
		}
	}
	for _, w := range r.engine.workers {
		select {
		case <-w.rested:
		case <-r.ctx.Done():
			return context.Cause(r.ctx)
		}
	}
	return nil
}

// close ends what Rekey has used.
func (r *Router) close() error {
	r.engine.rekeyed += r.file.written + r.loader.file.written
	err := r.file.close()
	if e := r.loader.file.close(); err == nil {
		err = e
	}
	return err
}
