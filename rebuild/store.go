package rebuild

import (
	"cmp"
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
	skip  int      // leading bits of the hash that all keys have in common
	bytes int64    // of pages and slots
	slots []uint64 // tag 24 bits, reference + 1: 40 bits; 0 is empty. Their order is nearly that of the tags
	bits  int      // of the number of slots
	n     int
	pages [][]byte
	next  int          // in the last page of the ordinary kind
	cur   int          // its number
	free  *[256]uint64 // by size class: reference + 1 of the first free record
	own   map[int]bool // the pages that hold one big record
	holes []int        // numbers of pages that are gone

	touched byte // keeps the compiler from leaving out what only warms
}

// reference: page number, and the offset in the page in units of 8 bytes.
const offsetBits = 15 // of pageBytes / 8

const (
	tagBits  = 24 // the first bits of the hash that are not common
	refBits  = 40
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

func newStore(pool *pagePool, used *int64, skip int) *store {
	return &store{pool: pool, used: used, skip: skip, cur: -1}
}

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

func (s *store) tag(hash uint64) uint64 { return hash << s.skip >> (64 - tagBits) }

// home is the slot in which a tag is put if it is free.
func (s *store) home(tag uint64) int { return int(tag >> (tagBits - s.bits)) }

// spot is where a key is in a store, or would be. It is valid until the next put or remove.
type spot struct {
	slot int
	ref  uint64
	ok   bool // it is there
}

func (s *store) find(hash uint64, key []byte) spot {
	if len(s.slots) == 0 {
		return spot{}
	}
	tag := s.tag(hash)
	for i := s.home(tag); ; i = (i + 1) & (len(s.slots) - 1) {
		v := s.slots[i]
		if v == 0 {
			return spot{slot: i}
		}
		if v>>refBits == tag {
			ref := v&(1<<refBits-1) - 1
			r := s.record(ref)
			n := int(binary.LittleEndian.Uint32(r) >> 8)
			if n == len(key) && string(r[header:header+n]) == string(key) {
				return spot{i, ref, true}
			}
		}
	}
}

// warm1 and warm2 bring near the processor what find will look at. Called for several keys before the first is looked for, they
// wait for memory once instead of several times.
func (s *store) warm1(hash uint64) uint64 {
	if len(s.slots) == 0 {
		return 0
	}
	return s.slots[s.home(s.tag(hash))]
}

func (s *store) warm2(slot uint64) byte {
	if slot == 0 {
		return 0
	}
	return s.record(slot&(1<<refBits-1) - 1)[0]
}

// warm does both for a group of records.
func (s *store) warm(group []record) {
	var slots [lookAhead]uint64
	for i := range group {
		slots[i] = s.warm1(group[i].hash)
	}
	for _, v := range slots {
		s.touched |= s.warm2(v)
	}
}

// state gives the state of a key that is there. It is valid until the next put or remove.
func (s *store) state(at spot) []byte {
	_, state := split(s.record(at.ref))
	return state
}

// split takes a record apart.
func split(r []byte) (key, state []byte) {
	n, m := int(binary.LittleEndian.Uint32(r)>>8), int(binary.LittleEndian.Uint32(r[4:]))
	return r[header : header+n : header+n], r[header+n : header+n+m : header+n+m]
}

// put sets the state of a key; it must not be part of the store's memory. It is false if the store can take no further key.
func (s *store) put(at spot, hash uint64, key, state []byte) bool {
	need := header + len(key) + len(state)
	if at.ok {
		r := s.record(at.ref)
		if c := int(r[0]); c == ownClass && need <= len(r) && need > len(r)/2 || c != ownClass && need <= classBytes[c] {
			binary.LittleEndian.PutUint32(r[4:], uint32(len(state)))
			copy(r[header+len(key):], state)
			return true
		}
		s.release(at.ref)
		need += need / 8 // what has grown may grow again
	} else {
		need += 16 // room for a change of a short value
		if len(key) >= 1<<24 {
			return false
		}
		if (s.n+1)*4 > len(s.slots)*3 {
			if s.bits == tagBits {
				return false
			}
			s.grow()
			at = s.find(hash, key)
		}
		s.n++
	}
	ref, r, class := s.alloc(need)
	binary.LittleEndian.PutUint32(r, uint32(len(key))<<8|uint32(class))
	binary.LittleEndian.PutUint32(r[4:], uint32(len(state)))
	copy(r[header:], key)
	copy(r[header+len(key):], state)
	s.slots[at.slot] = s.tag(hash)<<refBits | (ref + 1)
	return true
}

// remove forgets a key that is there.
func (s *store) remove(at spot) {
	s.release(at.ref)
	s.n--
	// Close the hole: move back what was put behind it for want of room.
	slot, mask := at.slot, len(s.slots)-1
	for i := (slot + 1) & mask; s.slots[i] != 0; i = (i + 1) & mask {
		home := s.home(s.slots[i] >> refBits)
		if (i-home)&mask >= (i-slot)&mask {
			s.slots[slot] = s.slots[i]
			slot = i
		}
	}
	s.slots[slot] = 0
}

// reserve makes an empty store large enough for n keys, if its slots take no more than most bytes. States that were dumped come back
// in the order of their hashes: in a store that grows with them they would all want the first slots.
func (s *store) reserve(n int, most int64) {
	for s.bits < tagBits && n*4 > len(s.slots)*3 && int64(16*len(s.slots)) <= most {
		s.grow()
	}
}

func (s *store) grow() {
	old := s.slots
	s.bits = max(3, s.bits+1)
	s.slots = make([]uint64, 1<<s.bits)
	s.count(int64(8 * (len(s.slots) - len(old))))
	for _, v := range old {
		if v == 0 {
			continue
		}
		i := s.home(v >> refBits)
		for s.slots[i] != 0 {
			i = (i + 1) & (len(s.slots) - 1)
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
	*s = store{pool: s.pool, used: s.used, skip: s.skip, cur: -1}
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
	list := make([]uint64, 0, s.n)
	for _, v := range s.slots {
		if v != 0 {
			list = append(list, v)
		}
	}
	const refMask = 1<<refBits - 1
	slices.SortFunc(list, func(a, b uint64) int {
		if a>>refBits != b>>refBits {
			return cmp.Compare(a, b)
		}
		x, _ := split(s.record(a&refMask - 1))
		y, _ := split(s.record(b&refMask - 1))
		return cmp.Or(cmp.Compare(hashKey(x), hashKey(y)), slices.Compare(x, y))
	})
	var touched byte
	for i, v := range list {
		if i%lookAhead == 0 {
			for _, w := range list[i:min(i+lookAhead, len(list))] {
				touched |= s.warm2(w)
			}
		}
		if err := f(split(s.record(v&refMask - 1))); err != nil {
			return err
		}
	}
	s.touched = touched
	return nil
}

// lookAhead is for how many keys memory is waited for at once.
const lookAhead = 16
