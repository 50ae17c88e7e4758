package kafka

import "math/bits"

// partitionOf gives the partition of a key: murmur2 as the Java client, Kafka Streams, ksqlDB and librdkafka's
// murmur2_random compute it, so that topics written by us and by them join without a repartition. (kafka-go's own
// default, FNV-1a, agrees with Sarama only.)
func partitionOf(key []byte, partitions int) int {
	return int((murmur2(key) & 0x7fffffff) % uint32(partitions))
}

// murmur2 is org.apache.kafka.common.utils.Utils.murmur2.
func murmur2(data []byte) uint32 {
	const m = 0x5bd1e995
	h := uint32(0x9747b28c) ^ uint32(len(data))
	for len(data) >= 4 {
		k := uint32(data[0]) | uint32(data[1])<<8 | uint32(data[2])<<16 | uint32(data[3])<<24
		k *= m
		k ^= k >> 24
		k *= m
		h = h*m ^ k
		data = data[4:]
	}
	switch len(data) {
	case 3:
		h ^= uint32(data[2]) << 16
		fallthrough
	case 2:
		h ^= uint32(data[1]) << 8
		fallthrough
	case 1:
		h = (h ^ uint32(data[0])) * m
	}
	h = (h ^ h>>13) * m
	return h ^ h>>15
}

// positionSet is a set of positions after base.
type positionSet struct {
	base int64
	bits []uint64
}

func (s *positionSet) add(p int64) {
	i := p - s.base
	if i <= 0 {
		return
	}
	for int64(len(s.bits)) <= i/64 {
		s.bits = append(s.bits, make([]uint64, max(16, len(s.bits)))...)
	}
	s.bits[i/64] |= 1 << (i % 64)
}

func (s *positionSet) has(p int64) bool {
	i := p - s.base
	return i > 0 && i/64 < int64(len(s.bits)) && s.bits[i/64]&(1<<(i%64)) != 0
}

func (s *positionSet) len() (n int) {
	for _, w := range s.bits {
		n += bits.OnesCount64(w)
	}
	return n
}
