package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
)

// nemesis does to source, log and sidecar whatever may happen to them in a long life, while applications work: crashes, alterations,
// a standby that takes over, a slot or a publication that somebody has his hands on.
type nemesis struct {
	*crashes
	primary *proxy // leads the applications to whoever is the primary
	began   time.Time
	things  string // what the table is called that is altered
	key     string // … and its primary key
	more    int    // numbers of columns and tables that were added
	parts   string // what the third partition is: "", attached, detached

	moments map[int]moment
	doubt   map[string]bool // tables of which the log may not yet know what was done to them
	gaps    []declared
	missed  []declared // the same, of some tables, which are its reason
	losses  []loss     // what the source may have lost

	units     atomic.Int64 // the number of the last unit of work
	confirmed map[int]int  // units of which the application knows that they are done, and how many entries each has
}

// loss is a stretch of units that may not be in the source any more: after it was put back, or after a standby has taken its place.
type loss struct {
	from, to  int
	confirmed bool // also those that were confirmed; otherwise only what was on its way, which the log may have been quicker to get than the standby
}

// unexplained are the units that the source does not have, and that it should have.
func unexplained[T any](units map[int]T, confirmed bool, losses []loss) (out []int) {
	for id := range units {
		if !slices.ContainsFunc(losses, func(l loss) bool { return l.from <= id && id <= l.to && (l.confirmed || !confirmed) }) {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// TestLossIsExplained: what a source may have lost excuses nothing else.
func TestLossIsExplained(t *testing.T) {
	missing := map[int]bool{4: true, 5: true, 9: true, 10: true}
	losses := []loss{{4, 5, true}, {10, 10, false}}
	if got := fmt.Sprint(unexplained(missing, true, losses), unexplained(missing, false, losses), unexplained(missing, true, nil)); got != "[9 10] [9] [4 5 9 10]" {
		t.Error(got)
	}
}

// revision is a moment that is checked out.
type revision struct {
	moment
	lsn     eventlog.LSN
	doubted []string // what the checkout warns of: gaps that are recorded later begin before it, since nobody knows when changes began to be missing
}

// doubt adds the warning that is due for a gap, if it begins before the revision.
func (r *revision) doubt(e *eventlog.Event) error {
	var gap struct {
		From string `json:"from_lsn"`
	}
	if err := json.Unmarshal(e.Data, &gap); err != nil {
		return fmt.Errorf("event %d, a gap: %s: %w", e.Position, e.Data, err)
	}
	if from, err := eventlog.ParseLSN(gap.From); err != nil || from == 0 || from >= r.lsn {
		return nil
	}
	table := `public\.\w+` // all of them
	if e.Relation != nil {
		table = regexp.QuoteMeta(e.Relation.Own())
	}
	r.doubted = append(r.doubted, fmt.Sprintf(`^%s: changes may be missing, since a gap begins before this position, at %s \(event %d:`, table, gap.From, e.Position))
	return nil
}

// declared is a stretch of the source's WAL of which the log says that it may lack changes.
type declared struct {
	from, to eventlog.LSN
	reason   string
}

const everything = "n.nspname = 'public'"

// senderTimeout is after which the source gives up a sidecar that sleeps.
const senderTimeout = "4s"

// TestNemesis: random operations, in a random order. What validators look at, at the end, is the log: its order (world.place), each event's
// before (world.row), the rows of all tables at moments of which the source itself has printed them, and that each unit of work is
// there once, whole, in one transaction, unless it lies in a gap that the log declares. After every gap the log is to be
// equal to the source again.
func TestNemesis(t *testing.T) {
	t.Parallel()
	seed := seedOf(t)
	s := newSystem(t, where{own: true, apart: true, tables: []string{"public.*"}, settings: map[string]string{"wal_sender_timeout": senderTimeout}, logs: map[string]string{"wal_level": "replica"}})
	s.cfg.Log.PartitionEvents = 20_000
	n := &nemesis{began: time.Now(), things: "things", moments: map[int]moment{}, doubt: map[string]bool{}, confirmed: map[int]int{}}
	n.primary = newProxy(t, s.cfg.Capture.URL)
	s.cfg.Capture.URL = n.primary.through(s.cfg.Capture.URL)
	n.crashes = crashesOf(s, seed, "public.ledger")
	n.source.leadTo(fmt.Sprintf("127.0.0.1:%d", s.src.Port()))
	// Rows that hand a deferrable key on have a test of their own (TestShiftedKeysAreHealed).
	list := slices.DeleteFunc(subjects(), func(s *subject) bool {
		return !slices.Contains([]string{"orders", "orders_full", "orders_by_index", "orders_changing", "index_alone", "composites", "keyless_full", "keyless", "generated", "parted"}, s.name)
	})
	for _, s := range list {
		s.identities = nil // each change of one begins the stream anew: once in a while is enough (identity)
	}
	db := n.direct.sql()
	create(db, list)
	db.do(`CREATE TABLE public.ledger (n int PRIMARY KEY, entries int NOT NULL, at pg_lsn DEFAULT pg_current_wal_insert_lsn()); CREATE TABLE public.entries (n int, i int, PRIMARY KEY (n, i));
		CREATE TABLE public.inserts (id int GENERATED BY DEFAULT AS IDENTITY, k bigserial, v text); ALTER TABLE public.inserts REPLICA IDENTITY NOTHING`)
	n.make(db)
	if n.r.IntN(2) == 0 {
		t.Log("with event triggers")
		n.initialise("--ddl-trigger")
	} else {
		n.initialise()
	}
	db.do(`INSERT INTO public.noops SELECT i, 'v', 'big' FROM generate_series(1, 9) i`)
	_ = db.Close(context.Background())

	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	workers := []*worker{}
	for i := range 2 {
		w := &worker{t: t, id: i, r: rand.New(rand.NewPCG(seed, uint64(i))), list: list}
		workers = append(workers, w)
		wg.Go(func() { n.again(ctx, func() error { return n.random(ctx, w) }) })
	}
	wg.Go(func() { n.again(ctx, func() error { return n.keepBooks(ctx, rand.New(rand.NewPCG(seed, 10))) }) })
	wg.Go(func() { n.again(ctx, func() error { return n.hammer(ctx, rand.New(rand.NewPCG(seed, 11))) }) })
	n.fail(n.operations(), time.Duration(setting(t, "BACKSTORY_NEMESIS_SECONDS", 25))*time.Second)
	n.level()
	n.mark()
	stop()
	wg.Wait()
	if t.Failed() {
		return
	}
	n.says("the end")
	n.settle()
	n.compare()
	n.says("what is in the log")
	n.validate()
	committed := 0
	for _, w := range workers {
		committed += w.committed
	}
	t.Logf("%d random transactions; what was done: %v", committed, n.done)
}

// says what is done now.
func (n *nemesis) says(what string) {
	n.t.Logf("%s: %s", time.Since(n.began).Round(100*time.Millisecond), what)
}

// random runs a worker's transactions until ctx ends or the connection does. What it had prepared before is given up.
func (n *nemesis) random(ctx context.Context, w *worker) error {
	conn, err := dial(ctx, n.direct.cfg.Capture.URL)
	if err != nil {
		time.Sleep(20 * time.Millisecond)
		return err
	}
	defer conn.Close(context.Background())
	w.conn = conn
	left, err := textRows(ctx, conn, fmt.Sprintf(`SET lock_timeout = '2s'; SELECT gid FROM pg_prepared_xacts WHERE gid LIKE 'w%d-%%'`, w.id))
	for _, gid := range left {
		if err == nil {
			err = w.exec("ROLLBACK PREPARED '" + gid[0] + "'")
		}
	}
	for err == nil && ctx.Err() == nil {
		if err = w.transaction(); err == nil && w.chance(15) { // which would grow for ever
			err = n.together(conn, fmt.Sprintf("DELETE FROM public.keyless_full WHERE n = %d", w.r.IntN(3)))
		}
		pause(w.r)
	}
	return err
}

// together runs a statement in a transaction of its own, as workers do. What a workload brings about by itself is no error.
func (n *nemesis) together(conn *pgx.Conn, q string) error {
	_, err := conn.Exec(context.Background(), fmt.Sprintf("BEGIN; SELECT pg_advisory_xact_lock_shared(%d); %s; COMMIT", gate, q))
	state := eventlog.SQLState(err)
	if err != nil && (isExpected(err) || strings.HasPrefix(state, "42") || strings.HasPrefix(state, "22")) { // the table was altered meanwhile
		_, err = conn.Exec(context.Background(), "ROLLBACK")
	}
	if err != nil {
		return fmt.Errorf("%s: %w", q, err)
	}
	return nil
}

// pause is what an application rests after a transaction: a small machine has to read all of its rows again after each gap.
func pause(r *rand.Rand) { time.Sleep(time.Duration(r.IntN(100)) * time.Millisecond) }

// keepBooks does units of work, until ctx ends or the connection does: each has a number of its own, and several rows.
func (n *nemesis) keepBooks(ctx context.Context, r *rand.Rand) error {
	conn, err := dial(ctx, n.direct.cfg.Capture.URL)
	if err != nil {
		time.Sleep(20 * time.Millisecond)
		return err
	}
	defer conn.Close(context.Background())
	for ; ctx.Err() == nil; pause(r) {
		unit := int(n.units.Add(1))
		entries := 1 + r.IntN(5)
		if r.IntN(100) == 0 {
			entries = 300
		}
		if err := n.together(conn, fmt.Sprintf(`INSERT INTO public.ledger VALUES (%d, %d); INSERT INTO public.entries SELECT %[1]d, i FROM generate_series(1, %[2]d) i`, unit, entries)); err != nil {
			return err
		}
		n.confirmed[unit] = entries
	}
	return nil
}

// hammer writes to the table that is altered, whatever it is called and has for columns, until ctx ends or the connection does.
func (n *nemesis) hammer(ctx context.Context, r *rand.Rand) error {
	conn, err := dial(ctx, n.direct.cfg.Capture.URL)
	if err != nil {
		time.Sleep(20 * time.Millisecond)
		return err
	}
	defer conn.Close(context.Background())
	for ; ctx.Err() == nil; pause(r) {
		columns, err := textRows(context.Background(), conn, `SELECT c.relname, quote_ident(a.attname), format_type(a.atttypid, a.atttypmod) FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
			WHERE c.oid IN (to_regclass('public.things'), to_regclass('public.stuff')) AND a.attnum > 0 AND NOT a.attisdropped AND NOT a.attname IN ('id', 'k')`)
		if err != nil {
			return err
		}
		if len(columns) == 0 {
			continue
		}
		c := columns[r.IntN(len(columns))]
		table, some := "public."+c[0], fmt.Sprintf("id = (SELECT id FROM public.%s OFFSET %d LIMIT 1)", c[0], r.IntN(40))
		q := fmt.Sprintf("UPDATE %s SET %s = repeat('%d', %d)::%s WHERE %s", table, c[1], 1+r.IntN(9), 1+r.IntN(8), c[2], some)
		switch k := r.IntN(20); {
		case k < 4:
			q = "INSERT INTO " + table + " DEFAULT VALUES"
		case k < 6:
			q = "DELETE FROM " + table + " WHERE " + some
		case k < 8:
			q = "UPDATE " + table + " SET id = DEFAULT WHERE " + some
		case k < 9 && c[2] == "text":
			q = fmt.Sprintf("UPDATE %s SET %s = repeat('large', 1000) WHERE %s", table, c[1], some)
		}
		if err := n.together(conn, q); err != nil {
			return err
		}
	}
	return nil
}

// mark records a moment. Of tables that are in doubt nobody can say what the log should have.
func (n *nemesis) mark() {
	db := n.direct.sql()
	defer db.Close(context.Background())
	columns := columnsOf(db, everything)
	maps.DeleteFunc(columns, func(name string, _ []string) bool { return name == "public.marker" || n.doubt[name] })
	id := len(n.moments) + 1
	m, err := mark(db, id, columns)
	if err != nil {
		n.t.Fatal(err)
	}
	n.moments[id] = m
}

// level lets another sidecar run until it has nothing left to look for: the log has all of every table, it says.
func (n *nemesis) level() {
	n.t.Helper()
	n.says("the log is to have everything")
	n.program.kill()
	n.start()
	l, db := n.direct.openLog(), n.direct.sql()
	defer l.Close()
	defer db.Close(context.Background())
	eventually(n.t, 4*time.Minute, fmt.Sprintf("after %v the log has everything", n.done), func() (bool, error) {
		time.Sleep(100 * time.Millisecond)
		if !n.program.running() {
			n.t.Fatalf("the sidecar ended by itself after %v:\n%s", n.done, n.program.out.tail(30))
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		captured, err := l.Captured(ctx)
		if err != nil {
			return false, err
		}
		head, err := l.Head(ctx)
		if err != nil {
			return false, err
		}
		begun, err := l.Baselines(ctx)
		if err != nil {
			return false, err
		}
		left := columnsOf(db, everything)
		for _, c := range captured {
			done := !slices.ContainsFunc(begun, func(b eventlog.Baseline) bool { return b.OID == c.OID && !b.Done })
			if done && (c.Complete || c.InsertOnly) {
				delete(left, c.Own())
			}
		}
		altered, err := capture.Altered(ctx, n.direct.cfg.Capture, captured, *head)
		altered = slices.DeleteFunc(altered, func(a eventlog.Alteration) bool { return !a.Heal && !a.Defined }) // TRUNCATE
		return err == nil && len(left) == 0 && len(altered) == 0, fmt.Errorf("altered: %v, incomplete: %v, %v; the sidecar says:\n%s", altered, slices.Sorted(maps.Keys(left)), err, n.program.out.tail(10))
	})
	clear(n.doubt)
}

// compare has the tables compared of which only inserts are in the stream.
func (n *nemesis) compare() {
	n.says("tables of inserts are to be compared")
	l := n.direct.logSQL()
	defer l.Close(context.Background())
	n.env = append(n.env, "BACKSTORY_COMPARE_INTERVAL=1s")
	n.start()
	l.do(`UPDATE backstory.baseline SET began_at = done_at - interval '1 ms', changes = '' WHERE done_at IS NOT NULL`) // as if that had been quick, and somebody had changed something
	eventually(n.t, 2*time.Minute, "they are compared", func() (bool, error) {
		left := l.rows(`SELECT c.name, b.pass, b.rows, b.done_at FROM backstory.captured c LEFT JOIN backstory.baseline b USING (oid) WHERE c.insert_only AND (b.oid IS NULL OR b.changes = '' OR b.done_at IS NULL)`)
		return len(left) == 0, fmt.Errorf("%v; the sidecar says:\n%s", left, n.program.out.tail(10))
	})
	n.settle()
}

// validate looks at the whole log.
func (n *nemesis) validate() {
	t, l := n.t, n.direct.openLog()
	type unit struct {
		times, entries int
		xid            uint32
	}
	db := n.direct.sql()
	n.direct.warned = regexp.MustCompile(`the history has a gap|whose end the log does not have|perhaps dropped`)
	names := []string{"parted", n.things}
	logs := n.direct.logSQL()
	for _, r := range logs.rows(`SELECT name FROM backstory.captured WHERE insert_only AND root_name = '' ORDER BY name`) {
		names = append(names, r[0])
	}
	_ = logs.Close(context.Background())
	n.direct.sameRows(names...)
	head, err := l.Head(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	n.direct.checkoutOfNow(db, head.Position, columnsOf(db, everything))
	units := map[int]*unit{}
	w := newWorld()
	w.byOID = true
	compared, tables, gaps := 0, 0, 0
	again := map[eventlog.Position]*revision{}
	var doubtful []*revision // those of the stretch of WAL that goes on
	w.replay(t, l, func(e *eventlog.Event) error {
		if e.Op == eventlog.OpGap {
			for _, r := range doubtful {
				if err := r.doubt(e); err != nil {
					return err
				}
			}
			if e.Type == "SourceGap" {
				doubtful = nil
				gaps++
				w.gap()
				return nil
			}
			name := e.Relation.Own()
			if !slices.ContainsFunc(n.missed, func(d declared) bool { return slices.Contains(strings.Fields(d.reason), name) }) {
				return fmt.Errorf("a gap of a table: %s of %s: %s", e.Type, name, e.Data)
			}
			w.unseen[name], w.healing = true, true
		}
		if e.Op != eventlog.OpInsert {
			return nil
		}
		var id int
		switch e.Relation.String() {
		case "public.ledger", "public.entries":
			if _, err := fmt.Sscan(strings.Split(e.AggregateID, ",")[0], &id); err != nil {
				return err
			}
			u := units[id]
			if u == nil {
				u = &unit{xid: e.XID}
				units[id] = u
			}
			if u.xid != e.XID {
				return fmt.Errorf("unit %d is in transactions %d and %d", id, u.xid, e.XID)
			}
			if e.Relation.String() == "public.ledger" {
				u.times++
			} else {
				u.entries++
			}
		case "public.marker":
			if _, err := fmt.Sscan(e.AggregateID, &id); err != nil {
				return err
			}
			m, ok := n.moments[id]
			if !ok {
				return fmt.Errorf("moment %d was not recorded", id)
			}
			known := moment{contents{}, map[string][]string{}}
			for name, rows := range m.contents {
				if t := w.tables[name]; w.unseen[name] || t != nil && t.compared {
					continue
				}
				known.contents[name], known.columns[name] = rows, m.columns[name]
			}
			if len(known.contents) == 0 {
				return nil
			}
			compared, tables = compared+1, tables+len(known.contents)
			if len(again) < 2 && (n.r.IntN(4) == 0 || id > len(n.moments)*3/4) {
				again[e.Position] = &revision{moment: known, lsn: e.CommitLSN}
				doubtful = append(doubtful, again[e.Position])
			}
			if err := w.differs(known.contents, known.columns); err != nil {
				return fmt.Errorf("at moment %d: %w", id, err)
			}
		}
		return nil
	})
	n.says("what is in the source")
	lost, missing, confirmed := 0, 0, maps.Clone(n.confirmed)
	ledger := db.rows(`SELECT n, entries, at, coalesce(lead(at) OVER (ORDER BY n), pg_current_wal_lsn()) FROM public.ledger ORDER BY n`)
	for _, r := range ledger {
		id, entries := int(atoi(t, r[0])), int(atoi(t, r[1]))
		u := units[id]
		delete(n.confirmed, id)
		delete(units, id)
		if u != nil && u.times == 1 && u.entries == entries {
			continue
		}
		lost++
		from, _ := eventlog.ParseLSN(r[2])
		to, _ := eventlog.ParseLSN(r[3])
		if u != nil && u.times > 1 || !slices.ContainsFunc(slices.Concat(n.gaps, n.missed), func(g declared) bool { return from <= g.to && to >= g.from }) {
			t.Errorf("unit %d, of %d entries, between %s and %s, is in the log as %+v; gaps %+v, of tables %+v", id, entries, r[2], r[3], u, n.gaps, n.missed)
		}
	}
	if c, u := unexplained(n.confirmed, true, n.losses), unexplained(units, false, n.losses); len(c)+len(u) > 0 {
		t.Errorf("units %v, which were confirmed, and %v, which are in the log, are not in the source; it may have lost %+v", c, u, n.losses)
	}
	if may := len(confirmed) - len(unexplained(confirmed, true, n.losses)); 2*may > len(confirmed) {
		t.Logf("of %d confirmed units %d might be lost: %+v", len(confirmed), may, n.losses)
	}
	missing = len(n.confirmed)
	if gaps != len(n.gaps) {
		t.Errorf("the log has %d gaps, there were %+v", gaps, n.gaps)
	}
	// The last moment always is one of them. Of a short time that is full of gaps there may be no other.
	if len(ledger) < 30 || compared < 1 {
		t.Errorf("%d units, %d moments", len(ledger), compared)
	}
	for name := range columnsOf(db, everything) {
		had := w.tables[name]
		if had != nil && had.rel.InsertOnly && len(had.rel.Key) > 0 {
			continue // no event says that it was compared where nothing was found
		}
		if w.unseen[name] || had != nil && had.compared {
			t.Errorf("the log never came to have all of %s", name)
		}
	}
	w.sameTables(t, db, everything)
	warned := n.direct.warned.String()
	for at, m := range again {
		n.direct.warned = regexp.MustCompile(strings.Join(append(m.doubted, warned), "|"))
		n.direct.checkout(at, n.direct.logURL(), fmt.Sprintf("of_%d", at), m.columns).same(t, at, m.contents, m.columns)
	}
	t.Logf("%d units, of which %d lie in %d gaps, and the source has lost %d; %d events; %d of %d moments, with %d tables, %d of them checked out", len(ledger), lost, gaps, missing, w.position, compared, len(n.moments), tables, len(again))
}
