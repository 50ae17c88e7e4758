package rebuild

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/backstory-dev/backstory/eventlog"
)

// Format is a form in which files hold rows.
type Format int

// The formats.
const (
	// CSV is what COPY … TO … (FORMAT csv, HEADER) writes, RFC 4180 with lines that end in LF: NULL is an empty field, the empty
	// string is "", values are as Postgres prints them.
	CSV Format = iota
	// JSONLines has one JSON object per line, its values in the form of the log.
	JSONLines
)

func (f Format) extension() string { return [...]string{".csv", ".jsonl"}[f] }

// FilesConfig says where and how files are written.
type FilesConfig struct {
	// Dir is the directory. It is made if it does not exist. Required.
	Dir string
	// Format of the files, one per table. Default CSV.
	Format Format
	// Replace lets a checkout that is in Dir already be replaced. Without it Dir must be empty.
	Replace bool
	// Revision is noted beside the files.
	Revision eventlog.Revision
}

// Files makes a target that writes one file for each table, named after it. Each file has its name only once all are
// complete; backstory-checkout.json, which tells what they are, comes last. Rows come in no useful order, but always in the
// same one. Generated columns that the source does not send are left out, with a warning.
func Files(cfg FilesConfig) Target { return &files{cfg: cfg} }

const (
	manifestName  = "backstory-checkout.json"
	partialPrefix = ".backstory-"
	partialSuffix = ".partial"
)

// manifest is what manifestName holds.
type manifest struct {
	Revision string            `json:"revision"`
	Position eventlog.Position `json:"position"`
	Files    map[string]string `json:"files"` // by table
}

type files struct {
	cfg   FilesConfig
	made  bool // the directory
	names map[*Table]string
	old   []string // files of the checkout that is replaced
	open  []*os.File

	warnings []string
}

// Warnings are what people should know of the files.
func (f *files) Warnings() []string { return f.warnings }

func (f *files) Begin(_ context.Context, tables []*Table) error {
	if _, err := os.Stat(f.cfg.Dir); errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(f.cfg.Dir, 0o755); err != nil {
			return fmt.Errorf("make the directory: %w", err)
		}
		f.made = true
	}
	entries, err := os.ReadDir(f.cfg.Dir)
	if err != nil {
		return fmt.Errorf("read the directory: %w", err)
	}
	var others []string
	for _, e := range entries {
		if n := e.Name(); strings.HasPrefix(n, partialPrefix) && strings.HasSuffix(n, partialSuffix) {
			if err := os.Remove(f.path(n)); err != nil { // of one that was killed
				return fmt.Errorf("remove what an earlier checkout left: %w", err)
			}
		} else {
			others = append(others, n)
		}
	}
	if len(others) > 0 {
		if err := f.readOld(); err != nil {
			return err
		}
	}
	f.names = map[*Table]string{}
	for t, name := range placeNames(tables, ".") {
		f.names[t] = fileName(name) + f.cfg.Format.extension()
	}
	return nil
}

// readOld reads what checkout is in the directory already.
func (f *files) readOld() error {
	b, err := os.ReadFile(f.path(manifestName))
	var m manifest
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &eventlog.Problem{Err: fmt.Errorf("the directory %s is not empty, and holds no checkout", f.cfg.Dir),
			Hint: "Name a directory that is empty or does not exist."}
	case err != nil:
		return fmt.Errorf("read %s: %w", f.path(manifestName), err)
	case !f.cfg.Replace:
		return &eventlog.Problem{Err: fmt.Errorf("the directory %s holds a checkout of position %d", f.cfg.Dir, m.Position),
			Hint: "Use --replace to replace it, or name another directory."}
	}
	for _, n := range m.Files {
		if n == filepath.Base(n) {
			f.old = append(f.old, n)
		}
	}
	return nil
}

func (f *files) path(name string) string { return filepath.Join(f.cfg.Dir, name) }

func (f *files) partial(name string) string { return f.path(partialPrefix + name + partialSuffix) }

// Place tells where a table goes.
func (f *files) Place(t *Table) string { return f.path(f.names[t]) }

func (f *files) Table(_ context.Context, t *Table) (TableWriter, error) {
	file, err := os.Create(f.partial(f.names[t]))
	if err != nil {
		return nil, fmt.Errorf("make a file: %w", err)
	}
	f.open = append(f.open, file)
	for _, g := range t.Generated {
		f.warnings = append(f.warnings, fmt.Sprintf("%s: the generated column %s is not in the file: Postgres computes it where the checkout goes to a schema", t, g.Name))
	}
	w := &fileWriter{format: f.cfg.Format, table: t, file: file}
	if f.cfg.Format == CSV {
		var b []byte
		for i, c := range t.Columns {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendCSV(b, []byte(c.Name), len(t.Columns) == 1)
		}
		err = w.Write(append(b, '\n'))
	}
	return w, err
}

func (f *files) Commit(context.Context) error {
	m := manifest{Revision: f.cfg.Revision.How, Position: f.cfg.Revision.Position, Files: map[string]string{}}
	stale := map[string]bool{manifestName: len(f.old) > 0}
	for _, n := range f.old {
		stale[n] = true
	}
	for t, n := range f.names {
		m.Files[t.String()] = n
		stale[n] = false
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = os.WriteFile(f.partial(manifestName), append(b, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", manifestName, err)
	}
	// Whoever finds no manifest finds files of two checkouts, for a moment.
	for n, is := range stale {
		if is {
			if err := os.Remove(f.path(n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove a file of the earlier checkout: %w", err)
			}
		}
	}
	for _, n := range f.names {
		if err := os.Rename(f.partial(n), f.path(n)); err != nil {
			return fmt.Errorf("name a file: %w", err)
		}
	}
	if err := os.Rename(f.partial(manifestName), f.path(manifestName)); err != nil {
		return fmt.Errorf("name a file: %w", err)
	}
	return nil
}

func (f *files) Abort() {
	for _, file := range f.open {
		_ = file.Close()
	}
	for _, n := range f.names {
		_ = os.Remove(f.partial(n))
	}
	_ = os.Remove(f.partial(manifestName))
	if f.made {
		_ = os.Remove(f.cfg.Dir)
	}
}

type fileWriter struct {
	format Format
	table  *Table
	file   *os.File
}

func (w *fileWriter) NewEncoder() Encoder {
	if w.format == CSV {
		return &csvEncoder{}
	}
	return newJSONEncoder(w.table)
}

func (w *fileWriter) Write(p []byte) error {
	if _, err := w.file.Write(p); err != nil {
		return fmt.Errorf("write a file: %w", err)
	}
	return nil
}

func (w *fileWriter) Close(err error) error {
	if err != nil {
		_ = w.file.Close()
		return err
	}
	err = w.file.Sync()
	if e := w.file.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("write a file: %w", err)
	}
	return nil
}

// placeNames gives each table a name of its own: the table's, and where tables of several schemas share one, with the schema's before it. One of
// schema public keeps its name, whatever else there is.
func placeNames(tables []*Table, separator string) map[*Table]string {
	count := map[string]int{}
	for _, t := range tables {
		count[t.Name]++
	}
	names, used := map[*Table]string{}, map[string]bool{}
	for _, t := range tables {
		if count[t.Name] == 1 || t.Schema == "public" && !used[t.Name] { // a table may become a partition of one that gets its name, and the log know of that later
			names[t] = t.Name
			used[t.Name] = true
		}
	}
	for _, t := range tables {
		if names[t] != "" {
			continue
		}
		base := t.Schema + separator + t.Name
		name := base
		for i := 2; used[name]; i++ {
			name = fmt.Sprintf("%s_%d", base, i)
		}
		names[t] = name
		used[name] = true
	}
	return names
}

// fileName makes a name that every file system takes; what it may not take is written as %2F.
func fileName(s string) string {
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if c < ' ' || c == 0x7f || strings.IndexByte(`/\:*?"<>|%`, c) >= 0 || c == '.' && i == 0 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
