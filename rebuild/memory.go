package rebuild

import "sync"

// pageBytes is the size of a full page of state.
const pageBytes = 256 << 10

// pagePool hands out the memory in which state is kept. Pages come straight from the operating system where that can be
// had: a bound in bytes means nothing for memory that a garbage collector lets grow to twice its size before it looks.
// All pages go back when the pool is closed; nothing may refer to them any more.
type pagePool struct {
	slab int // bytes asked for at once

	mu    sync.Mutex // guards the following
	free  [][]byte
	slabs [][]byte
}

func newPagePool(maxBytes int64) *pagePool {
	return &pagePool{slab: int(min(max(maxBytes/32, pageBytes), 4<<20)) / pageBytes * pageBytes}
}

// page gives pageBytes of memory, not cleared.
func (p *pagePool) page() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.free) == 0 {
		slab := osAlloc(p.slab)
		p.slabs = append(p.slabs, slab)
		for len(slab) > 0 {
			p.free = append(p.free, slab[:pageBytes:pageBytes])
			slab = slab[pageBytes:]
		}
	}
	n := len(p.free) - 1
	page := p.free[n]
	p.free = p.free[:n]
	return page
}

// giveBack takes a page that page gave.
func (p *pagePool) giveBack(page []byte) {
	p.mu.Lock()
	p.free = append(p.free, page)
	p.mu.Unlock()
}

func (p *pagePool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.slabs {
		osFree(s)
	}
	p.slabs, p.free = nil, nil
}
