//go:build unix && !linux

package rebuild

func advise([]byte) {}
