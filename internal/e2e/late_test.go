package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// complete are the tables of which the log claims to have every row.
func (s *system) complete() string {
	s.t.Helper()
	return s.logSQL().one(`SELECT coalesce(string_agg(name, ' ' ORDER BY name), '') FROM backstory.captured WHERE complete`)
}

// TestEmptyTableTakenInLater: a table that is empty when a later init takes it in is complete, as at the first one. One that has rows,
// or may have some that nobody sees yet, or had a history before, is not; and init holds no writer up.
func TestEmptyTableTakenInLater(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do("%s", simple)
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	s.once()
	db.do(`CREATE TABLE public.empty (id int PRIMARY KEY, v text); CREATE TABLE public.filled (id int PRIMARY KEY); CREATE TABLE public.used (id int PRIMARY KEY);
		CREATE TABLE public.prepared (id int PRIMARY KEY); CREATE TABLE public.keyless (v text); INSERT INTO public.filled VALUES (1)`)
	writer := s.sql()
	writer.do(`BEGIN; INSERT INTO public.used VALUES (1)`)
	db.do(`BEGIN; INSERT INTO public.prepared VALUES (1); PREPARE TRANSACTION '%s'`, s.cfg.Capture.Slot)
	began := time.Now()
	s.init()
	t.Logf("init took %s", time.Since(began).Round(time.Millisecond))
	writer.do(`INSERT INTO public.used VALUES (2); COMMIT`)
	db.do(`COMMIT PREPARED '%s'`, s.cfg.Capture.Slot)
	want, events := "empty things", "insert , insert , update a"
	// A minor release that may lose rows of a table that is added to a publication: that it is empty proves nothing. It is read, too.
	if v := int(atoi(t, db.one(`SHOW server_version_num`))); v%10000 < map[int]int{14: 18, 15: 13, 16: 9, 17: 5}[v/10000] {
		want, events = "things", events+", note "
	}
	if got := s.complete(); got != want {
		t.Errorf("complete: %s", got)
	}
	db.do(`INSERT INTO public.empty VALUES (1, 'a'), (2, 'b'); UPDATE public.empty SET v = 'c' WHERE id = 1`)
	s.once()
	if got := db.one(`SELECT string_agg(op || ' ' || coalesce(before->>'v', ''), ', ' ORDER BY position) FROM backstory.events WHERE relation = 'public.empty'`); got != events {
		t.Errorf("the log has %s", got)
	}
	p := s.command(true, "checkout", "--at", "HEAD", "--schema", "of_now", "empty", "things")
	if p.wait(time.Minute) != 0 || db.one(`SELECT string_agg(t::text, ' ' ORDER BY id) FROM of_now.empty t`) != "(1,c) (2,b)" {
		t.Errorf("checkout:\n%s", p.out)
	}

	// It is left out, loses its rows, and is taken in again: the log does not know that.
	s.cfg.Capture.Exclude = []string{"public.empty"}
	s.init()
	db.do(`DELETE FROM public.empty`)
	s.cfg.Capture.Exclude = nil
	s.init()
	if got := s.complete(); got != "filled prepared things used" {
		t.Errorf("complete: %s", got)
	}
}

// TestTablesFilledWhileTheyAreTakenIn: writers begin with new tables at any moment of a later init. What the log then calls complete is.
func TestTablesFilledWhileTheyAreTakenIn(t *testing.T) {
	t.Parallel()
	seed := seedOf(t)
	s := newSystem(t, where{})
	db := s.sql()
	db.do("%s", simple)
	s.init()
	r := s.start()
	const rounds, tables = 6, 8
	for round := range rounds {
		var names []string
		for i := range tables {
			names = append(names, fmt.Sprintf("late_%d_%d", round, i))
			db.do(`CREATE TABLE public.%s (id int PRIMARY KEY, v text)`, names[i])
		}
		ctx, stop := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		for i, name := range names {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(seed, uint64(round*100+i)))
				conn, err := dial(context.Background(), s.cfg.Capture.URL)
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close(context.Background())
				time.Sleep(time.Duration(r.IntN(800)) * time.Millisecond)
				for id := 1; ctx.Err() == nil; id++ {
					err := pgx.BeginFunc(context.Background(), conn, func(tx pgx.Tx) error {
						for _, q := range []string{`INSERT INTO public.%s VALUES (%d, 'a')`, `UPDATE public.%s SET v = 'b' WHERE id = %d`} {
							if _, err := tx.Exec(context.Background(), fmt.Sprintf(q, name, id)); err != nil {
								return err
							}
							time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
						}
						return nil
					})
					if err != nil {
						t.Errorf("the application: %v", err)
						return
					}
				}
			})
		}
		time.Sleep(30 * time.Millisecond)
		s.init()
		time.Sleep(900 * time.Millisecond) // all have begun by then
		stop()
		wg.Wait()
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	s.once()
	l := s.openLog()
	h, err := l.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	source, there := map[string][]string{}, map[string][]string{}
	args := []string{"checkout", "--at", fmt.Sprint(h.Position), "--schema", "of_now"}
	for _, name := range strings.Fields(s.complete()) {
		if strings.HasPrefix(name, "late") {
			source["public."+name], there["of_now."+name] = []string{"id", "v"}, []string{"id", "v"}
			args = append(args, name)
		}
	}
	if complete := len(source); complete != rounds*tables {
		t.Fatalf("%d of %d tables are complete", complete, rounds*tables)
	}
	known := db.one(`SELECT count(*) FROM backstory.captured c WHERE name LIKE 'late%%' AND NOT EXISTS (SELECT FROM backstory.baseline b WHERE b.oid = c.oid)`)
	if p := s.command(true, args...); p.wait(time.Minute) != 0 {
		t.Fatalf("checkout:\n%s", p.out)
	}
	now, err := dump(t.Context(), db, source)
	if err != nil {
		t.Fatal(err)
	}
	have, err := dump(t.Context(), db, there)
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for name := range source {
		_, bare, _ := strings.Cut(name, ".")
		if err := difference(name, "the checkout", have["of_now."+bare], now[name], source[name]); err != nil {
			t.Error(err)
		}
		rows += len(now[name])
	}
	t.Logf("%s of %d tables were complete from the beginning; %d rows", known, rounds*tables, rows)
}
