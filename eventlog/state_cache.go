package eventlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
)

// stateKey names a row: the table, and the number of its identity, or the identity's text where that is not a number. Not the
// aggregate: several tables may share one.
type stateKey struct {
	oid    uint32
	byRow  bool
	isText bool
	id     int64
	text   string
}

// numberKey is a stateKey of a number: small, quick to hash, and nothing that the garbage collector has to look into.
type numberKey struct {
	id    int64
	table int64
}

func (k *stateKey) number() numberKey {
	t := int64(k.oid) << 1
	if k.byRow {
		t |= 1
	}
	return numberKey{k.id, t}
}

// bigBytes: longer values are not kept in the cache; it remembers where in the log they are.
const bigBytes = 1024

// rowState is the last known state of one row: the JSON form of each column; empty where it is not known. nil: there is no row.
//
//	0 uint16  number of columns
//	2 uint16  events since the last one that held the whole row
//	4 uint32  for each column: where it ends, counted from the first one's beginning
//	  …       the columns
type rowState []byte

// gone tells that the log knows the row's end.
func (r rowState) gone() bool { return len(r) == len(rowGone) }

// partial tells whether a column is not known.
func (r rowState) partial() bool {
	for i := range r.columns() {
		if len(r.frag(i)) == 0 {
			return true
		}
	}
	return false
}

// rowGone is the state of a row that was deleted, or has another identity by now.
var rowGone = beginState(nil, 0, 0)

func (r rowState) columns() int { return int(binary.LittleEndian.Uint16(r)) }
func (r rowState) chain() int   { return int(binary.LittleEndian.Uint16(r[2:])) }

func (r rowState) frag(i int) []byte {
	n := r.columns()
	if i >= n {
		return nil
	}
	start, base := uint32(0), r[4+4*n:]
	if i > 0 {
		start = binary.LittleEndian.Uint32(r[4*i:])
	}
	end := binary.LittleEndian.Uint32(r[4+4*i:])
	return base[start:end:end]
}

// beginState appends the head of a row's state; its columns follow, each with endColumn.
func beginState(dst []byte, columns, chain int) []byte {
	dst = binary.LittleEndian.AppendUint16(dst, uint16(columns))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(chain))
	for range columns {
		dst = append(dst, 0, 0, 0, 0)
	}
	return dst
}

// endColumn notes where a column ends, of the state that begins at start.
func endColumn(dst []byte, start, columns, i int) {
	binary.LittleEndian.PutUint32(dst[start+4+4*i:], uint32(len(dst)-start-4-4*columns))
}

// A big value in the cache: a byte that begins no JSON, the position of the event that holds it, and a digest of it.
const bigMark, bigLen = 0x01, 1 + 8 + 16

func isBig(f []byte) bool { return len(f) == bigLen && f[0] == bigMark }

func appendBig(dst, value []byte, at Position) []byte {
	d := sha256.Sum256(value)
	dst = binary.BigEndian.AppendUint64(append(dst, bigMark), uint64(at))
	return append(dst, d[:16]...)
}

func sameAsBig(big, value []byte) bool {
	if len(value) <= bigBytes {
		return false
	}
	d := sha256.Sum256(value)
	return bytes.Equal(big[9:], d[:16])
}

// appendCached appends a value as the cache has it. The event at holds it, unless it is a mark already.
func appendCached(dst, value []byte, at Position) []byte {
	if len(value) > bigBytes {
		return appendBig(dst, value, at)
	}
	return append(dst, value...)
}

// stateCache keeps row states in two generations: what is used moves to the young one, and when that has grown to half of
// the bound, the old one is dropped, between two row changes. States lie in one piece of memory for each
// generation, so that a million of them are nothing to the garbage collector; one that is replaced stays there until then.
type stateCache struct {
	half       int
	young, old *generation
}

type generation struct {
	numbers map[numberKey]span
	texts   map[stateKey]span
	arena   []byte
	keys    int // bytes of the maps, roughly
}

// span is where in the arena a state lies; an empty one says that the log has no such row.
type span struct{ from, to uint32 }

func newGeneration() *generation {
	return &generation{numbers: map[numberKey]span{}, texts: map[stateKey]span{}}
}

func newStateCache(maxBytes int) *stateCache {
	return &stateCache{half: min(maxBytes/2, 1<<30), young: newGeneration(), old: newGeneration()}
}

func (c *stateCache) clear() { c.young, c.old = newGeneration(), newGeneration() }

func (g *generation) find(k *stateKey) (span, bool) {
	if k.isText {
		s, ok := g.texts[*k]
		return s, ok
	}
	s, ok := g.numbers[k.number()]
	return s, ok
}

// set notes where a state lies that begins at from and ends with the arena.
func (g *generation) set(k *stateKey, from int) {
	s := span{uint32(from), uint32(len(g.arena))}
	if k.isText {
		g.texts[*k] = s
		g.keys += 80 + len(k.text)
		return
	}
	g.numbers[k.number()] = s
	g.keys += 40
}

func (g *generation) at(s span) rowState {
	if s.from == s.to {
		return nil
	}
	return g.arena[s.from:s.to:s.to]
}

// get finds a row's state, which is valid until evict.
func (c *stateCache) get(k *stateKey) (rowState, bool) {
	if s, ok := c.young.find(k); ok {
		return c.young.at(s), true
	}
	s, ok := c.old.find(k)
	if !ok {
		return nil, false
	}
	st := c.old.at(s)
	c.add(k, st)
	return st, true
}

// add keeps a state as it is; nil: the log has no such row.
func (c *stateCache) add(k *stateKey, s rowState) {
	from := len(c.young.arena)
	c.young.arena = append(c.young.arena, s...)
	c.young.set(k, from)
}

func (c *stateCache) putAbsent(k *stateKey) { c.add(k, nil) }
func (c *stateCache) putGone(k *stateKey)   { c.add(k, rowGone) }

// has tells whether the cache knows of a row.
func (c *stateCache) has(k *stateKey) bool {
	if _, ok := c.young.find(k); ok {
		return true
	}
	_, ok := c.old.find(k)
	return ok
}

// put keeps a row's state, given its columns one after the other. The event at holds the values longer than bigBytes, except
// those that are marks already.
func (c *stateCache) put(k *stateKey, frags []byte, off []int, at Position, chain int) {
	g, n := c.young, len(off)-1
	from := len(g.arena)
	g.arena = beginState(g.arena, n, chain)
	for i := range n {
		g.arena = appendCached(g.arena, frags[off[i]:off[i+1]], at)
		endColumn(g.arena, from, n, i)
	}
	g.set(k, from)
}

// full tells that the cache has to forget something. What it forgets is looked up in the log, so it must be there first.
func (c *stateCache) full() bool { return len(c.young.arena)+c.young.keys > c.half }

// evict brings the cache back below its bound; states that were given out before are no longer valid. What was put since the
// last time stays until the next time, and by then the step that it belongs to has arrived: so a look-up need not wait for
// what is on its way.
func (c *stateCache) evict() {
	c.old, c.young = c.young, c.old
	g := c.young
	clear(g.numbers)
	clear(g.texts)
	g.arena, g.keys = g.arena[:0], 0
}
