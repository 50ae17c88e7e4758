package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
)

// TestVerifyFindsTampering does everything to a log that somebody can who has taken all triggers out of the way, and expects
// verify to find each.
func TestVerifyFindsTampering(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{apart: true})
	s.cfg.Log.PartitionEvents = 40
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text, n int); CREATE TABLE public.others (k text PRIMARY KEY)`)
	s.init()
	for i := range 6 {
		db.do(`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "a%[1]d"}'); INSERT INTO public.things SELECT %[1]d * 100 + i, 'v', i FROM generate_series(1, 10) i; COMMIT`, i)
		db.do(`UPDATE public.things SET v = 'w' WHERE id %% 100 = 3`)
		db.do(`INSERT INTO public.others VALUES ('k%d'); DELETE FROM public.things WHERE id = %d`, i, i*100+5)
		s.once() // an append of its own
	}
	l := s.openLog()
	good := verify(t, l)
	if good.Appends < 6 || good.Events < 70 {
		t.Fatalf("%+v", good)
	}
	l.Close()
	name := databaseOf(t, s.cfg.Log.URL) // to which nobody is connected now, so that it can be copied
	admin := open(t, s.log.URL("postgres"))

	last := good.Position
	const withoutUnique = `DO $$ DECLARE i text; BEGIN FOR i IN SELECT indexrelid::regclass FROM pg_index WHERE indrelid = 'backstory.event_p1'::regclass AND indisunique LOOP EXECUTE 'DROP INDEX ' || i; END LOOP; END $$; `
	for i, c := range []struct{ name, sql string }{
		{"nothing", ``},
		{"data of an event", `UPDATE backstory.event SET data = '{"id":999}' WHERE position = 7`},
		{"white space in its data", `UPDATE backstory.event SET data = ' ' || data WHERE position = 7`},
		{"the values before", `UPDATE backstory.event SET before = '{"v":"other"}' WHERE before IS NOT NULL AND position = (SELECT min(position) FROM backstory.event WHERE before IS NOT NULL)`},
		{"the unchanged values", `UPDATE backstory.event SET rest = '{}' WHERE position = (SELECT min(position) FROM backstory.event WHERE rest IS NOT NULL)`},
		{"NULL in place of a value", `UPDATE backstory.event SET rest = NULL WHERE position = (SELECT min(position) FROM backstory.event WHERE rest IS NOT NULL)`},
		{"what is known of one event", `UPDATE backstory.event SET meta = '{"unknown":["v"]}' WHERE position = 7`},
		{"its time", `UPDATE backstory.event SET occurred_at = occurred_at + interval '1 microsecond' WHERE position = 7`},
		{"its transaction", `UPDATE backstory.event SET xid = xid + 1 WHERE position = 7`},
		{"its LSN", `UPDATE backstory.event SET commit_lsn = commit_lsn + 1 WHERE position = 7`},
		{"its ordinal", `UPDATE backstory.event SET change = change + 100 WHERE position = 7`},
		{"its entity", `UPDATE backstory.event SET id = 555 WHERE position = 7`},
		{"its entity's text", `UPDATE backstory.event SET id_text = 'other' WHERE id_text IS NOT NULL`},
		{"its aggregate", `UPDATE backstory.event SET stream = (SELECT max(id) FROM backstory.aggregate) WHERE position = 7`},
		{"its kind", `UPDATE backstory.event SET kind = (SELECT max(id) FROM backstory.kind WHERE id <> kind) WHERE position = 7`},
		{"an event in the middle is deleted", `DELETE FROM backstory.event WHERE position = 7`},
		{"the first event is deleted", `DELETE FROM backstory.event WHERE position = 1`},
		{"the last event is deleted", fmt.Sprintf(`DELETE FROM backstory.event WHERE position = %d`, last)},
		{"the last event is deleted, and the head moved back", fmt.Sprintf(`DELETE FROM backstory.event WHERE position = %[1]d; UPDATE backstory.head SET position = %[1]d - 1, written = %[1]d - 1`, last)},
		{"a whole append is deleted, and the head moved back", `DELETE FROM backstory.event WHERE position > (SELECT max(position) FROM backstory.event WHERE seal IS NOT NULL AND position < (SELECT max(position) FROM backstory.event));
			UPDATE backstory.head SET position = (SELECT max(position) FROM backstory.event), written = (SELECT max(position) FROM backstory.event)`},
		{"an event is deleted, and the others moved up", fmt.Sprintf(`DELETE FROM backstory.event WHERE position = 7; UPDATE backstory.event SET position = position - 1 WHERE position > 7 AND position <= 40;
			UPDATE backstory.head SET position = %[1]d, written = %[1]d`, last)},
		{"an event is inserted at the end", fmt.Sprintf(`INSERT INTO backstory.event SELECT %[1]d + 1, kind, stream, id, id_text, row_id, row_text, old_id, old_text, owner, owner_id, owner_text, also, occurred_at, commit_lsn, xid, change + 1, part, data, before, rest, extra, meta, NULL
			FROM backstory.event WHERE position = %[1]d; UPDATE backstory.head SET position = %[1]d + 1, written = %[1]d + 1`, last)},
		{"an event is there twice", withoutUnique + `INSERT INTO backstory.event SELECT * FROM backstory.event WHERE position = 7`},
		{"an event before the first", `CREATE TABLE backstory.event_p0 PARTITION OF backstory.event FOR VALUES FROM (-10) TO (1);
			INSERT INTO backstory.event SELECT 0, kind, stream, id, id_text, row_id, row_text, old_id, old_text, owner, owner_id, owner_text, also, occurred_at, commit_lsn, xid, change, part, data, before, rest, extra, meta, seal FROM backstory.event WHERE position = 1`},
		{"two events are swapped", withoutUnique + `UPDATE backstory.event SET position = 15 - position WHERE position IN (7, 8)`},
		{"the values of two events are swapped", `UPDATE backstory.event e SET data = o.data FROM backstory.event o WHERE (e.position, o.position) IN ((7, 8), (8, 7))`},
		{"a seal is taken away", `UPDATE backstory.event SET seal = NULL WHERE position = (SELECT min(position) FROM backstory.event WHERE seal IS NOT NULL)`},
		{"a seal is changed", `UPDATE backstory.event SET seal = sha256('x') WHERE position = (SELECT min(position) FROM backstory.event WHERE seal IS NOT NULL)`},
		{"the head's seal", `UPDATE backstory.head SET seal = sha256('x')`},
		{"who did it", `UPDATE backstory.context SET metadata = '{"actor": "somebody else"}' WHERE first_position = (SELECT min(first_position) FROM backstory.context)`},
		{"what else they did", `UPDATE backstory.context SET last_position = last_position + 5 WHERE first_position = (SELECT min(first_position) FROM backstory.context)`},
		{"context is deleted", `DELETE FROM backstory.context WHERE first_position = (SELECT min(first_position) FROM backstory.context)`},
		{"context is inserted, sealed like the rest", `INSERT INTO backstory.context (first_position, last_position, sealed_at, metadata) SELECT 12, 12, min(sealed_at), '{"actor": "eve"}' FROM backstory.context`},
		{"context is inserted, sealed in between", `INSERT INTO backstory.context (first_position, last_position, sealed_at, metadata) VALUES (12, 12, 3, '{"actor": "eve"}')`},
		{"context is inserted, sealed before everything", `INSERT INTO backstory.context (first_position, last_position, sealed_at, metadata) VALUES (12, 12, 0, '{"actor": "eve"}')`},
		{"context is inserted, sealed long ago", `INSERT INTO backstory.context (first_position, last_position, sealed_at, metadata) VALUES (12, 12, -5, '{"actor": "eve"}')`},
		{"context is inserted, sealed in the future", `INSERT INTO backstory.context (first_position, last_position, sealed_at, metadata) VALUES (12, 12, 1000000, '{"actor": "eve"}')`},
		{"context is inserted, sealed late", `INSERT INTO backstory.context (first_position, last_position, sealed_at, metadata, late) SELECT 12, 12, min(sealed_at), '{"actor": "eve"}', true FROM backstory.context`},
		{"context becomes late", `UPDATE backstory.context SET late = true WHERE first_position = (SELECT min(first_position) FROM backstory.context)`},
		{"what a type is called", `UPDATE backstory.kind SET type = 'ThingDestroyed' WHERE op = 'd'`},
		{"what an operation was", `UPDATE backstory.kind SET op = 'n' WHERE op = 'd'`},
		{"what is a change of a row", `UPDATE backstory.kind SET restates = true WHERE op = 'd'`},
		{"under which entity it is filed", `UPDATE backstory.event SET owner = 1, owner_id = 7 WHERE position = 7`},
		{"what rules added", `UPDATE backstory.event SET extra = '{"paid": true}' WHERE position = 7`},
		{"rules are inserted", `INSERT INTO backstory.rules SELECT 2, 'aggregates: {}', 1, min(sealed_at) FROM backstory.kind`},
		{"rules that were never sealed are inserted", `INSERT INTO backstory.rules VALUES (2, 'aggregates: {}', 1, 0)`},
		{"what is quiet", `UPDATE backstory.kind SET quiet = true WHERE op = 'd'`},
		{"of which table a kind is", `UPDATE backstory.kind SET relation = (SELECT max(id) FROM backstory.relation) WHERE id = (SELECT min(id) FROM backstory.kind)`},
		{"a kind is taken out of the seal", `UPDATE backstory.kind SET sealed_at = 0 WHERE id = (SELECT max(id) FROM backstory.kind)`},
		{"a kind is put off", `UPDATE backstory.kind SET sealed_at = 1000000 WHERE id = (SELECT max(id) FROM backstory.kind)`},
		{"a kind is replaced by one that was never sealed", `INSERT INTO backstory.kind SELECT 1000, source, relation, aggregate, owner, 'ThingFaked', op, quiet, restates, rules_version, 0 FROM backstory.kind WHERE id = 1`},
		{"a column's name", `UPDATE backstory.relation SET columns = replace(columns::text, '"v"', '"w"')::json`},
		{"a table's name", `UPDATE backstory.relation SET name = 'somethings'`},
		{"a table's key", `UPDATE backstory.relation SET key = '{1}'`},
		{"an aggregate's name", `UPDATE backstory.aggregate SET name = 'Somebody' WHERE id = 1`},
		{"where events come from", `UPDATE backstory.source SET timeline = 2`},
		{"how ids are made", `UPDATE backstory.source SET tag = tag + 1`},
		{"an append is moved to another one", `UPDATE backstory.event SET seal = (SELECT seal FROM backstory.event WHERE position = (SELECT max(position) FROM backstory.event WHERE seal IS NOT NULL)) WHERE position = (SELECT min(position) FROM backstory.event WHERE seal IS NOT NULL)`},
	} {
		t.Run(c.name, func(t *testing.T) {
			clone := fmt.Sprintf("%s_%d", name, i)
			eventually(t, 30*time.Second, "the log can be copied", func() (bool, error) {
				_, err := admin.Exec(t.Context(), fmt.Sprintf(`CREATE DATABASE %s TEMPLATE %s`, clone, name))
				return err == nil, err
			})
			defer admin.do(`DROP DATABASE %s WITH (FORCE)`, clone)
			url := strings.Replace(s.cfg.Log.URL, "/"+name, "/"+clone, 1)
			x := open(t, url)
			x.do(`SET session_replication_role = replica`)
			if c.sql != "" {
				x.do("%s", c.sql)
			}
			log, err := eventlog.Open(t.Context(), eventlog.Config{URL: url})
			if err != nil {
				t.Fatal(err)
			}
			defer log.Close()
			v, err := log.Verify(t.Context(), nil)
			if err != nil {
				t.Fatalf("verify: %v", err)
			}
			if (v.Broken != "") != (c.sql != "") {
				t.Errorf("verify says %+v", v)
			}
		})
	}
}
