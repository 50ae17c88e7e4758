package expr

import (
	"fmt"
	"strings"
)

// Nearest is the end of a message about a name that is not known: which one was meant, or which there are.
func Nearest(name string, known []string) string {
	best, at := "", 4
	for _, k := range known {
		if d := distance(strings.ToLower(name), strings.ToLower(k), at); d < at && d <= max(1, len(k)/2) {
			best, at = k, d
		}
	}
	switch {
	case best != "":
		return "; did you mean " + best + "?"
	case len(known) == 0:
		return ""
	case len(known) > 30:
		return fmt.Sprintf("; known are %s and %d more", strings.Join(known[:30], ", "), len(known)-30)
	}
	return "; known are " + strings.Join(known, ", ")
}

// distance is that of Damerau and Levenshtein, or at least limit.
func distance(a, b string, limit int) int {
	if len(a) > 64 || len(b) > 64 || len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	var rows [3][65]int
	for j := range len(b) + 1 {
		rows[1][j] = j
	}
	for i := 1; i <= len(a); i++ {
		rows[2] = [65]int{i}
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			d := min(rows[1][j]+1, rows[2][j-1]+1, rows[1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d = min(d, rows[0][j-2]+1)
			}
			rows[2][j] = d
		}
		rows[0], rows[1] = rows[1], rows[2]
	}
	return min(limit, rows[1][len(b)])
}
