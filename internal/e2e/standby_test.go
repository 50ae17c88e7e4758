package e2e

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestSecondSidecarTakesOver: a second process for the same log waits; when the first is killed it goes on within seconds, and no event comes
// twice or is missing.
func TestSecondSidecarTakesOver(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text)`)
	s.init()
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	wg.Go(func() {
		db := s.sql()
		for ctx.Err() == nil {
			db.do(`INSERT INTO public.things (v) VALUES ('a'), ('b'); UPDATE public.things SET v = 'c' WHERE id = (SELECT max(id) FROM public.things)`)
			time.Sleep(2 * time.Millisecond)
		}
	})
	s.env = []string{"BACKSTORY_HTTP_ADDR=off"}
	first, l := s.command(false, "run"), s.logSQL()
	position := func() int64 { return atoi(t, l.one(`SELECT position FROM backstory.head`)) }
	eventually(t, time.Minute, "the first is at work", func() (bool, error) { return position() > 100, nil })
	second := s.command(false, "run")
	eventually(t, time.Minute, "the second waits", func() (bool, error) {
		return strings.Contains(second.out.String(), "waiting to take over"), nil
	})
	for range 3 {
		first.kill()
		killed, at := time.Now(), position()
		eventually(t, time.Minute, "the other one has taken over", func() (bool, error) {
			if !second.running() {
				t.Fatalf("it ended:\n%s", second.out.tail(20))
			}
			return position() > at+50, nil
		})
		took := time.Since(killed)
		t.Logf("took over after %s", took.Round(10*time.Millisecond))
		if took > 15*time.Second {
			t.Errorf("it took %s", took)
		}
		first, second = second, s.command(false, "run")
		eventually(t, time.Minute, "another one waits", func() (bool, error) {
			return strings.Contains(second.out.String(), "waiting to take over"), nil
		})
	}
	stop()
	wg.Wait()
	first.kill()
	second.kill()
	s.once()
	checkLog(t, s.openLog()).sameTables(t, db, "n.nspname = 'public'")
	if got, want := l.one(`SELECT count(*) FILTER (WHERE op = 'insert') || ' inserts, ' || count(*) FILTER (WHERE op = 'update') FROM backstory.events`),
		db.one(`SELECT count(*) || ' inserts, ' || count(*) / 2 FROM public.things`); got != want {
		t.Errorf("the log has %s updates, there were %s", got, want)
	}
}

// TestSlotIsInvalidated: the server gives up a slot that keeps more WAL than it may.
func TestSlotIsInvalidated(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, settings: map[string]string{"max_slot_wal_keep_size": "32MB", "max_wal_size": "64MB", "min_wal_size": "32MB"}})
	db := s.sql()
	db.do(simple)
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	s.once()
	db.do(`UPDATE public.things SET v = 'unseen'; CREATE TABLE public.noise (v text)`)
	eventually(t, time.Minute, "the slot is lost", func() (bool, error) {
		db.do(`INSERT INTO public.noise SELECT repeat(md5(i::text), 30) FROM generate_series(1, 20000) i`)
		db.do(`CHECKPOINT`)
		return db.one(`SELECT wal_status FROM pg_replication_slots`) == "lost", nil
	})
	s.gapFound("the slot is lost", "removed WAL")
	s.healed("1 unseen")
}

// TestSlotIsIdleForTooLong: so does one of 18 that has a limit for how long nobody may use a slot.
func TestSlotIsIdleForTooLong(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, version: "18", settings: map[string]string{"idle_replication_slot_timeout": "1s"}})
	db := s.sql()
	db.do(simple)
	s.init()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	s.once()
	db.do(`UPDATE public.things SET v = 'unseen'`)
	eventually(t, 2*time.Minute, "the slot is lost", func() (bool, error) {
		time.Sleep(time.Second)
		db.do(`CHECKPOINT`)
		return db.one(`SELECT coalesce(max(invalidation_reason), '') FROM pg_replication_slots`) == "idle_timeout", nil
	})
	db.do(`ALTER SYSTEM SET idle_replication_slot_timeout = 0`)
	db.do(`SELECT pg_reload_conf()`)
	s.gapFound("the slot is lost", "idle_timeout")
	s.healed("1 unseen")
}
