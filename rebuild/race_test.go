//go:build race

package rebuild

const raceDetector = true
