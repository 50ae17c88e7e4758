package rebuild

import (
	"encoding/binary"
	"testing"
)

// States that were spilled come back in the order of their hashes. The store they come back into is large enough from the beginning:
// one that grew with them would put all of them into its first slots, one behind the other.
func TestSpilledStatesFindTheirSlots(t *testing.T) {
	const n = 20_000
	pool := newPagePool(64 << 20)
	defer pool.close()
	var used int64
	from := newStore(pool, &used, 0)
	defer from.clear()
	key := make([]byte, 8)
	for i := range n {
		binary.LittleEndian.PutUint64(key, uint64(i))
		hash := hashKey(key)
		from.put(from.find(hash, key), hash, key, key)
	}
	file := spillFile{dir: t.TempDir()}
	defer file.close()
	p := &part{store: from}
	if err := p.spill(&file, &used, 4<<10); err != nil {
		t.Fatal(err)
	}
	if err := p.run.flush(); err != nil {
		t.Fatal(err)
	}
	if p.run.states != n {
		t.Fatalf("the run has %d states, want %d", p.run.states, n)
	}
	to := newStore(pool, &used, 0)
	defer to.clear()
	to.reserve(p.run.states, 8<<20)
	slots, far := len(to.slots), 0
	if _, err := p.run.each(nil, func(group []record) error {
		for _, r := range group {
			at := to.find(r.hash, r.key)
			far = max(far, at.slot-to.home(to.tag(r.hash)))
			to.put(at, r.hash, r.key, r.payload)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if to.n != n || len(to.slots) != slots || far > 200 {
		t.Errorf("%d of %d keys, %d slots that were %d, one of them %d slots away from where it belongs", to.n, n, len(to.slots), slots, far)
	}
}
