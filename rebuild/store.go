package rebuild

import (
	"encoding/binary"
	"math/bits"
	"slices"
)

// store keeps the states of many keys in memory: an open hash table of references into pages, without a pointer per key.
//
// A record is [key length 24 bits, size class 8 bits] [state length 32 bits] [key] [state], aligned to 8 bytes. Freed
// records wait in a list of their size class. Records that would not fit several times into a page have memory of their
// own.
type store struct {
	pool  *pagePool
	used  *int64   // the owner's count of bytes
	bytes int64    // of pages and slots
	slots []uint64 // tag 24 bits, reference + 1: 40 bits; 0 is empty
	n     int
	pages [][]byte
	next  int          // in the last page of the ordinary kind
	cur   int          // its number
	free  *[256]uint64 // by size class: reference + 1 of the first free record
	own   map[int]bool // the pages that hold one big record
	holes []int        // numbers of pages that are gone
}

// reference: page number, and the offset in the page in units of 8 bytes.
const offsetBits = 15 // of pageBytes / 8

const (
	tagBits  = 24
	refBits  = 40
	maxSlots = 1 << tagBits
	header   = 8
	ownClass = 255
)

// classBytes are the sizes of records, one eighth apart.
var classBytes = func() (sizes []int) {
	for s := 16; s <= pageBytes/4; s = max(s+8, s*9/8&^7) {
		sizes = append(sizes, s)
	}
	if len(sizes) >= ownClass {
		panic("too many size classes")
	}
	return sizes
}()

// classOf gives the smallest class that holds n bytes, or ownClass.
func classOf(n int) int {
	c, _ := slices.BinarySearch(classBytes, n)
	if c == len(classBytes) {
		return ownClass
	}
	return c
}

func newStore(pool *pagePool, used *int64) *store { return &store{pool: pool, used: used, cur: -1} }

// hashKey spreads keys; it is fixed, since the order of rows in files follows it.
func hashKey(key []byte) uint64 {
	const prime = 0x9e3779b97f4a7c15
	h := uint64(len(key)) * prime
	for len(key) >= 8 {
		h = mix(h ^ binary.LittleEndian.Uint64(key))
		key = key[8:]
	}
	var last uint64
	for i, c := range key {
		last |= uint64(c) << (8 * i)
	}
	return mix(mix(h^last) ^ prime)
}

func mix(x uint64) uint64 {
	hi, lo := bits.Mul64(x^0xa0761d6478bd642f, 0xe7037ed1a0b428db)
	return hi ^ lo
}

func (s *store) count(n int64) {
	s.bytes += n
	*s.used += n
}

func (s *store) record(ref uint64) []byte {
	return s.pages[ref>>offsetBits][(ref&(1<<offsetBits-1))<<3:]
}

// find gives the slot in which a key is, or would be.
func (s *store) find(hash uint64, key []byte) (slot int, ref uint64, ok bool) {
	if len(s.slots) == 0 {
		return 0, 0, false
	}
	mask := len(s.slots) - 1
	tag := hash & (maxSlots - 1)
	for slot = int(tag) & mask; ; slot = (slot + 1) & mask {
		v := s.slots[slot]
		if v == 0 {
			return slot, 0, false
		}
		if v>>refBits == tag {
			ref = v&(1<<refBits-1) - 1
			r := s.record(ref)
			n := int(binary.LittleEndian.Uint32(r) >> 8)
			if n == len(key) && string(r[header:header+n]) == string(key) {
				return slot, ref, true
			}
		}
	}
}

// get gives the state of a key, nil if there is none. It is valid until the next put or remove.
func (s *store) get(hash uint64, key []byte) []byte {
	_, ref, ok := s.find(hash, key)
	if !ok {
		return nil
	}
	_, state := split(s.record(ref))
	return state
}

// split takes a record apart.
func split(r []byte) (key, state []byte) {
	n, m := int(binary.LittleEndian.Uint32(r)>>8), int(binary.LittleEndian.Uint32(r[4:]))
	return r[header : header+n : header+n], r[header+n : header+n+m : header+n+m]
}

// put sets the state of a key; it must not be part of the store's memory. It is false if the store can take no further key.
func (s *store) put(hash uint64, key, state []byte) bool {
	slot, ref, ok := s.find(hash, key)
	need := header + len(key) + len(state)
	if ok {
		r := s.record(ref)
		if c := int(r[0]); c == ownClass && need <= len(r) && need > len(r)/2 || c != ownClass && need <= classBytes[c] {
			binary.LittleEndian.PutUint32(r[4:], uint32(len(state)))
			copy(r[header+len(key):], state)
			return true
		}
		s.release(ref)
		need += need / 8 // what has grown may grow again
	} else {
		if len(key) >= 1<<24 {
			return false
		}
		if (s.n+1)*4 > len(s.slots)*3 {
			if len(s.slots) == maxSlots {
				return false
			}
			s.grow()
			slot, _, _ = s.find(hash, key)
		}
		s.n++
	}
	ref, r, class := s.alloc(need)
	binary.LittleEndian.PutUint32(r, uint32(len(key))<<8|uint32(class))
	binary.LittleEndian.PutUint32(r[4:], uint32(len(state)))
	copy(r[header:], key)
	copy(r[header+len(key):], state)
	s.slots[slot] = hash<<refBits | (ref + 1)
	return true
}

// remove forgets a key.
func (s *store) remove(hash uint64, key []byte) {
	slot, ref, ok := s.find(hash, key)
	if !ok {
		return
	}
	s.release(ref)
	s.n--
	// Close the hole: move back what was put behind it for want of room.
	mask := len(s.slots) - 1
	for i := (slot + 1) & mask; s.slots[i] != 0; i = (i + 1) & mask {
		home := int(s.slots[i]>>refBits) & mask
		if (i-home)&mask >= (i-slot)&mask {
			s.slots[slot] = s.slots[i]
			slot = i
		}
	}
	s.slots[slot] = 0
}

func (s *store) grow() {
	old := s.slots
	s.slots = make([]uint64, max(8, 2*len(old)))
	s.count(int64(8 * (len(s.slots) - len(old))))
	mask := len(s.slots) - 1
	for _, v := range old {
		if v == 0 {
			continue
		}
		i := int(v>>refBits) & mask
		for s.slots[i] != 0 {
			i = (i + 1) & mask
		}
		s.slots[i] = v
	}
}

// alloc gives memory for a record of n bytes.
func (s *store) alloc(n int) (ref uint64, r []byte, class int) {
	class = classOf(n)
	if class == ownClass {
		return s.allocOwn(n)
	}
	if s.free != nil && s.free[class] != 0 {
		ref = s.free[class] - 1
		r = s.record(ref)
		s.free[class] = binary.LittleEndian.Uint64(r)
		return ref, r, class
	}
	size := classBytes[class]
	if s.cur < 0 || s.next+size > len(s.pages[s.cur]) {
		s.addPage(size)
	}
	ref = uint64(s.cur)<<offsetBits | uint64(s.next>>3)
	s.next += size
	return ref, s.record(ref), class
}

// addPage begins a new page: the first ones are small, since most tables are.
func (s *store) addPage(size int) {
	n := 1 << 10
	if s.cur >= 0 {
		n = 2 * len(s.pages[s.cur])
	}
	for n < 4*size {
		n *= 2
	}
	var page []byte
	if n >= pageBytes {
		page = s.pool.page()
	} else {
		page = make([]byte, n)
	}
	s.cur, s.next = s.number(page), 0
	s.count(int64(len(page)))
}

// number files a page.
func (s *store) number(page []byte) int {
	if n := len(s.holes); n > 0 {
		i := s.holes[n-1]
		s.holes = s.holes[:n-1]
		s.pages[i] = page
		return i
	}
	s.pages = append(s.pages, page)
	return len(s.pages) - 1
}

func (s *store) allocOwn(n int) (uint64, []byte, int) {
	page := osAlloc((n + 4095) &^ 4095)
	i := s.number(page)
	if s.own == nil {
		s.own = map[int]bool{}
	}
	s.own[i] = true
	s.count(int64(len(page)))
	return uint64(i) << offsetBits, page, ownClass
}

// release frees a record's memory.
func (s *store) release(ref uint64) {
	r := s.record(ref)
	class := int(r[0])
	if class == ownClass {
		i := int(ref >> offsetBits)
		s.count(-int64(len(s.pages[i])))
		osFree(s.pages[i])
		delete(s.own, i)
		s.pages[i] = nil
		s.holes = append(s.holes, i)
		return
	}
	if s.free == nil {
		s.free = new([256]uint64)
	}
	binary.LittleEndian.PutUint64(r, s.free[class])
	s.free[class] = ref + 1
}

// clear forgets all keys and gives back all memory.
func (s *store) clear() {
	for i, p := range s.pages {
		switch {
		case p == nil:
		case s.own[i]:
			osFree(p)
		case len(p) == pageBytes:
			s.pool.giveBack(p)
		}
	}
	s.count(-s.bytes)
	*s = store{pool: s.pool, used: s.used, cur: -1}
}

// all calls f for every key, in no order.
func (s *store) all(f func(key, state []byte) error) error {
	for _, v := range s.slots {
		if v != 0 {
			if err := f(split(s.record(v&(1<<refBits-1) - 1))); err != nil {
				return err
			}
		}
	}
	return nil
}

// sorted calls f for every key in the order of their hashes, and of the keys where those are the same: an order that
// depends on nothing but the keys.
func (s *store) sorted(f func(key, state []byte) error) error {
	type entry struct{ hash, ref uint64 }
	list := make([]entry, 0, s.n)
	for _, v := range s.slots {
		if v != 0 {
			ref := v&(1<<refBits-1) - 1
			key, _ := split(s.record(ref))
			list = append(list, entry{hashKey(key), ref})
		}
	}
	slices.SortFunc(list, func(a, b entry) int {
		switch {
		case a.hash < b.hash:
			return -1
		case a.hash > b.hash:
			return 1
		}
		x, _ := split(s.record(a.ref))
		y, _ := split(s.record(b.ref))
		return slices.Compare(x, y)
	})
	for _, e := range list {
		if err := f(split(s.record(e.ref))); err != nil {
			return err
		}
	}
	return nil
}
