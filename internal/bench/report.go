package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// report is everything that a run has found.
type report struct {
	Machine     machine   `json:"machine"`
	Began       time.Time `json:"began"`
	Seconds     float64   `json:"seconds"`
	Pairs       int       `json:"pairs"`
	Quick       bool      `json:"quick,omitempty"` // sizes too small for the figures to mean anything
	Interrupted bool      `json:"interrupted,omitempty"`
	Groups      []*group  `json:"groups"`
}

// group is what belongs together: one workload, several figures.
type group struct {
	Name        string    `json:"name"`
	About       string    `json:"about"`
	Figures     []*figure `json:"figures"`
	Notes       []string  `json:"notes,omitempty"`
	NotMeasured []string  `json:"not_measured,omitempty"`
	Error       string    `json:"error,omitempty"`
}

// figure is one line: what was measured, pair by pair, and what it is compared with. Figures without a target are there to
// understand the others by.
type figure struct {
	What    string    `json:"what"`
	Unit    string    `json:"unit"`
	Samples []float64 `json:"samples"`
	Against string    `json:"against,omitempty"`
	Limits  []float64 `json:"limits,omitempty"` // pair by pair, in the same unit
	Target  *target   `json:"target,omitempty"`

	// What follows is made of the above by judge.
	Figure  float64  `json:"figure"` // medians
	Limit   float64  `json:"limit,omitempty"`
	Ratio   *float64 `json:"ratio,omitempty"` // the median of the pairs' ratios, which is not the ratio of the medians
	Min     float64  `json:"min"`             // of the ratios, or of the samples where there is no limit
	Max     float64  `json:"max"`
	Verdict string   `json:"verdict,omitempty"` // PASS or MISS
}

// target says what a figure's ratio, or the figure itself where it has no limit, is to be.
type target struct {
	AtLeast float64 `json:"at_least,omitempty"`
	AtMost  float64 `json:"at_most,omitempty"`
	Below   float64 `json:"below,omitempty"`
}

func atLeast(x float64) *target { return &target{AtLeast: x} }
func atMost(x float64) *target  { return &target{AtMost: x} }
func below(x float64) *target   { return &target{Below: x} }

func (t *target) met(x float64) bool {
	switch {
	case t.AtLeast != 0:
		return x >= t.AtLeast
	case t.AtMost != 0:
		return x <= t.AtMost
	}
	return x < t.Below
}

func (t *target) text(unit string) string {
	switch {
	case t.AtLeast != 0:
		return "≥ " + amount(t.AtLeast, unit)
	case t.AtMost != 0:
		return "≤ " + amount(t.AtMost, unit)
	}
	return "< " + amount(t.Below, unit)
}

// group begins a group, or finds it.
func (r *report) group(name string) *group {
	for _, g := range r.Groups {
		if g.Name == name {
			return g
		}
	}
	g := &group{Name: name}
	r.Groups = append(r.Groups, g)
	return g
}

// figure finds the line, or begins it.
func (g *group) figure(what, unit string) *figure {
	for _, f := range g.Figures {
		if f.What == what {
			return f
		}
	}
	f := &figure{What: what, Unit: unit}
	g.Figures = append(g.Figures, f)
	return f
}

// add takes one sample.
func (g *group) add(what, unit string, sample float64, t *target) {
	f := g.figure(what, unit)
	f.Samples, f.Target = append(f.Samples, sample), t
}

// compare takes one sample and what it is compared with.
func (g *group) compare(what, unit string, sample float64, against string, limit float64, t *target) {
	f := g.figure(what+" / "+against, unit)
	f.Samples, f.Limits, f.Target, f.Against = append(f.Samples, sample), append(f.Limits, limit), t, against
}

// note adds a remark once.
func (g *group) note(format string, args ...any) {
	if n := fmt.Sprintf(format, args...); !slices.Contains(g.Notes, n) {
		g.Notes = append(g.Notes, n)
	}
}

// notMeasured says so, loudly.
func (g *group) notMeasured(format string, args ...any) {
	if n := fmt.Sprintf(format, args...); !slices.Contains(g.NotMeasured, n) {
		g.NotMeasured = append(g.NotMeasured, n)
		progress("%s: NOT MEASURED: %s", g.Name, n)
	}
}

func (g *group) failed(err error) {
	if err != nil && g.Error == "" {
		g.Error = err.Error()
		progress("%s: FAILED: %v", g.Name, err)
	}
}

// judge takes the medians.
func (f *figure) judge(quick bool) {
	f.Figure = median(f.Samples)
	counts := f.Samples
	if f.Limits != nil {
		counts = make([]float64, len(f.Samples))
		for i := range counts {
			counts[i] = f.Samples[i] / f.Limits[i]
		}
		f.Limit = median(f.Limits)
		ratio := median(counts)
		f.Ratio = &ratio
	}
	f.Min, f.Max = slices.Min(counts), slices.Max(counts)
	if f.Target != nil && !quick {
		f.Verdict = "MISS"
		if f.Target.met(median(counts)) {
			f.Verdict = "PASS"
		}
	}
}

func median(x []float64) float64 {
	s := slices.Sorted(slices.Values(x))
	n := len(s)
	if n == 0 {
		return math.NaN()
	}
	return (s[(n-1)/2] + s[n/2]) / 2
}

// percentile gives the smallest sample that is not exceeded by the share p of all. x is sorted.
func percentile(x []float64, p float64) float64 {
	if len(x) == 0 {
		return math.NaN()
	}
	return x[min(max(int(math.Ceil(p*float64(len(x))))-1, 0), len(x)-1)]
}

// write prints the table, and JSON where it was asked for.
func (r *report) write(out io.Writer, jsonFile string) error {
	for _, g := range r.Groups {
		g.Figures = slices.DeleteFunc(g.Figures, func(f *figure) bool { return len(f.Samples) == 0 })
		for _, f := range g.Figures {
			f.judge(r.Quick)
		}
	}
	var js []byte
	if jsonFile != "" {
		var err error
		if js, err = json.MarshalIndent(r, "", "  "); err != nil {
			return fmt.Errorf("write the figures: %w", err)
		}
		js = append(js, '\n')
	}
	if jsonFile == "-" {
		_, err := out.Write(js)
		return err
	}
	if _, err := io.WriteString(out, r.table()); err != nil {
		return err
	}
	if jsonFile != "" {
		if err := os.WriteFile(jsonFile, js, 0o644); err != nil {
			return fmt.Errorf("write the figures: %w", err)
		}
	}
	return nil
}

// table is the report for people.
func (r *report) table() string {
	var b strings.Builder
	r.Machine.print(&b)
	fmt.Fprintf(&b, "run       %s, %.0f s; pairs: %d (medians, with the smallest and the greatest)\n", r.Began.Format("2006-01-02 15:04 MST"), r.Seconds, r.Pairs)
	if r.Quick {
		b.WriteString("QUICK     the sizes are too small for these figures to mean anything: they show that everything runs\n")
	}
	if r.Interrupted {
		b.WriteString("INTERRUPTED: what follows is what there was\n")
	}
	rows := [][]string{}
	const heading = "\x00" // a line of its own between the rows
	for _, g := range r.Groups {
		rows = append(rows, []string{heading, ""}, []string{heading, wrap(strings.ToUpper(g.Name)+"  "+g.About, 150, "    ")})
		for _, f := range g.Figures {
			rows = append(rows, f.row())
		}
		for _, n := range g.Notes {
			rows = append(rows, []string{heading, wrap("  · "+n, 150, "    ")})
		}
		for _, n := range g.NotMeasured {
			rows = append(rows, []string{heading, wrap("  NOT MEASURED: "+n, 150, "    ")})
		}
		if g.Error != "" {
			rows = append(rows, []string{heading, "  FAILED: " + strings.ReplaceAll(g.Error, "\n", "\n    ")})
		}
	}
	head := []string{"what", "figure", "compared with", "limit", "ratio", "smallest–greatest", "target", ""}
	width := make([]int, len(head))
	for _, row := range append([][]string{head}, rows...) {
		if row[0] == heading {
			continue
		}
		for i, c := range row {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	right := map[int]bool{1: true, 3: true, 4: true, 5: true, 6: true}
	line := func(row []string) {
		var l strings.Builder
		l.WriteString("  ")
		for i, c := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			if right[i] {
				l.WriteString(pad + c)
			} else {
				l.WriteString(c + pad)
			}
			l.WriteString("  ")
		}
		b.WriteString(strings.TrimRight(l.String(), " ") + "\n")
	}
	b.WriteString("\n")
	line(head)
	for _, row := range rows {
		if row[0] == heading {
			b.WriteString(row[1] + "\n")
			continue
		}
		line(row)
	}
	pass, miss, other := r.count()
	fmt.Fprintf(&b, "\n%d targets met, %d missed, %d not measured or failed.\n", pass, miss, other)
	return b.String()
}

// wrap breaks text into lines of at most width characters; those after the first begin with indent.
func wrap(text string, width int, indent string) string {
	var b strings.Builder
	n := 0
	for i, word := range strings.Split(text, " ") {
		w := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case n+1+w > width:
			b.WriteString("\n" + indent)
			n = len(indent)
		default:
			b.WriteByte(' ')
			n++
		}
		b.WriteString(word)
		n += w
	}
	return b.String()
}

// row is a figure's line of the table.
func (f *figure) row() []string {
	what := strings.TrimSuffix(f.What, " / "+f.Against)
	row := []string{what, amount(f.Figure, f.Unit), "", "", "", "", "", f.Verdict}
	spread := f.Unit
	if f.Ratio != nil {
		row[2], row[3], row[4] = f.Against, amount(f.Limit, f.Unit), amount(*f.Ratio, "")
		spread = ""
	}
	if len(f.Samples) > 1 {
		row[5] = number(f.Min, spread) + "–" + amount(f.Max, spread)
	}
	if f.Target != nil {
		row[6] = f.Target.text(spread)
	}
	return row
}

// amount prints a number with its unit; without one it is a ratio.
func amount(x float64, unit string) string {
	if unit == "" {
		return number(x, unit)
	}
	return number(x, unit) + " " + unit
}

// number prints as many digits as tell something.
func number(x float64, unit string) string {
	switch abs := math.Abs(x); {
	case math.IsNaN(x) || math.IsInf(x, 0):
		return "?"
	case unit == "" || abs < 10:
		return fmt.Sprintf("%.2f", x)
	case abs < 100:
		return fmt.Sprintf("%.1f", x)
	}
	s := fmt.Sprintf("%.0f", x)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// count counts targets met and missed, and what there is no figure for.
func (r *report) count() (pass, miss, other int) {
	for _, g := range r.Groups {
		for _, f := range g.Figures {
			switch f.Verdict {
			case "PASS":
				pass++
			case "MISS":
				miss++
			}
		}
		other += len(g.NotMeasured)
		if g.Error != "" {
			other++
		}
	}
	return pass, miss, other
}

func (r *report) exitCode(strict bool) int {
	_, miss, other := r.count()
	if r.Interrupted || strict && miss+other > 0 || slices.ContainsFunc(r.Groups, func(g *group) bool { return g.Error != "" }) {
		return 1
	}
	return 0
}

var began = time.Now()

// progress tells on standard error what goes on.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: %5.0f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
}
