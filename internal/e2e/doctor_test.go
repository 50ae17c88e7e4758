package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
)

// patient examines a system again and again.
type patient struct {
	t *testing.T
	*system
	db     *session // as a superuser
	readme string
	// always is found whatever else is, unless it is empty: the rest has been looked at, too.
	always string
}

func newPatient(t *testing.T, s *system, always string) *patient {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, checks, _ := strings.Cut(string(readme), "\n## What doctor looks for\n")
	checks, _, _ = strings.Cut(checks, "\n## ")
	return &patient{t, s, s.sql(), checks, always}
}

var checkName = regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)

// look examines it. Each finding says why, what to do, what that costs, where it is SQL or init, and has a name that the README explains.
func (p *patient) look() []capture.Finding {
	p.t.Helper()
	list, err := backstory.Examine(p.t.Context(), p.cfg)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, f := range list {
		if f.Risk == "" || f.Mend() == "" || !checkName.MatchString(f.Check) || !strings.Contains(p.readme, "`"+f.Check+"`") {
			p.t.Errorf("%+v does not say why, or what to do, or README does not explain it", f)
		}
		if (f.SQL != "" || strings.Contains(f.Remedy, "backstory init")) && f.Cost == "" {
			p.t.Errorf("%+v does not say what it costs to mend it", f)
		}
	}
	return list
}

func written(list []capture.Finding) string {
	var out []string
	for _, f := range list {
		out = append(out, string(f.Severity)+": "+f.What+" → "+f.Mend())
	}
	return strings.Join(out, "\n")
}

// with makes something so, and wants it to be found then, and only then. Without undo, what mends it is the SQL of the finding.
func (p *patient) with(what string, makeSo, undo func()) {
	p.t.Helper()
	if got := written(p.look()); strings.Contains(got, what) {
		p.t.Errorf("without reason doctor says %q:\n%s", what, got)
	}
	makeSo()
	list := p.look()
	got := written(list)
	if !strings.Contains(got, what) {
		p.t.Errorf("doctor does not say %q:\n%s", what, got)
	}
	if !strings.Contains(got, p.always) {
		p.t.Errorf("besides %q doctor says only:\n%s", what, got)
	}
	if undo == nil {
		undo = func() { p.t.Helper(); p.mend(list, what) }
	}
	undo()
	eventually(p.t, 20*time.Second, "doctor finds no more: "+what, func() (bool, error) { return !strings.Contains(written(p.look()), what), nil })
}

// mend runs the SQL of a finding.
func (p *patient) mend(list []capture.Finding, what string) {
	p.t.Helper()
	for _, f := range list {
		if !strings.Contains(written([]capture.Finding{f}), what) {
			continue
		}
		if f.SQL == "" {
			p.t.Errorf("no SQL mends %q", what)
		}
		for _, q := range f.Statements() {
			if _, err := p.db.Exec(p.t.Context(), q); err != nil {
				p.t.Errorf("what is to mend %q fails: %s: %v", what, q, err)
			}
		}
	}
}

// does gives a function that runs SQL as a superuser.
func (p *patient) does(queries ...string) func() {
	return func() {
		p.t.Helper()
		for _, q := range queries {
			p.db.do("%s", q)
		}
	}
}

// set changes a setting of the server, and waits until it holds.
func (p *patient) set(name, value string) func() {
	return func() {
		p.t.Helper()
		if value == "" {
			p.db.do("ALTER SYSTEM RESET %s", name)
		} else {
			p.db.do("ALTER SYSTEM SET %s = '%s'", name, value)
		}
		loaded := p.db.one(`SELECT pg_conf_load_time()`)
		p.db.do(`SELECT pg_reload_conf()`)
		eventually(p.t, time.Minute, "it is set", func() (bool, error) { return p.sql().one(`SELECT pg_conf_load_time()`) > loaded, nil })
	}
}

// as lets it be examined as another role.
func (p *patient) as(role string) func() {
	return func() { p.t.Helper(); p.cfg.Capture.URL = withUser(p.t, p.cfg.Capture.URL, role) }
}

// TestDoctor: what lies in the way of capture, or will, is found on a server that is really like that, and not before, and not when what doctor
// says has been done.
func TestDoctor(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, settings: map[string]string{"max_replication_slots": "2", "max_wal_senders": "2", "max_slot_wal_keep_size": "48MB", "wal_keep_size": "0"}})
	p := newPatient(t, s, "danger: fsync is off")
	db := p.db
	db.do("%s", simple)
	own := s.cfg.Capture.URL
	superuser := func() { s.cfg.Capture.URL = own }

	// The server.
	p.with("danger: max_slot_wal_keep_size is not set", p.set("max_slot_wal_keep_size", "-1"), nil)
	p.with("warning: max_slot_wal_keep_size is 48MB, less than max_wal_size (1GB)", p.set("max_slot_wal_keep_size", "48MB"), nil)
	p.with("warning: wal_sender_timeout is 0", p.set("wal_sender_timeout", "0"), nil)
	p.with("warning: wal_sender_timeout is 2s → ALTER ROLE", p.does(`ALTER ROLE CURRENT_USER SET wal_sender_timeout = '2s'`), nil)
	p.with("danger: all replication slots are in use → ALTER SYSTEM SET max_replication_slots = 12",
		p.does(`SELECT pg_create_physical_replication_slot('a'), pg_create_physical_replication_slot('b')`), p.does(`SELECT pg_drop_replication_slot('a'), pg_drop_replication_slot('b')`))
	p.with("MB of WAL for replication slot forgotten, which nobody uses → SELECT pg_drop_replication_slot('forgotten')", func() {
		db.do(`SELECT pg_create_physical_replication_slot('forgotten', true)`)
		for range 14 {
			db.do(`SELECT pg_logical_emit_message(false, 'filler', repeat('x', 10000000))`)
		}
	}, nil)
	if s.src.Major() >= 18 {
		p.with("warning: idle_replication_slot_timeout is 10min", p.set("idle_replication_slot_timeout", "10min"), nil)
	}

	// That one WAL sender is left is enough.
	var senders []*pgconn.PgConn
	sender := func() { senders = append(senders, replicating(t, own, "test")) }
	sender()
	p.with("Raise max_wal_senders on the source", sender, func() {
		for _, c := range senders {
			_ = c.Close(t.Context())
		}
		eventually(t, time.Minute, "the senders are gone", func() (bool, error) { return db.one(`SELECT count(*) FROM pg_stat_replication`) == "0", nil })
	})
	db.do(`BEGIN; INSERT INTO public.things VALUES (1, 'a'); PREPARE TRANSACTION 'it''s forgotten'`)
	other := s.sql()
	other.do(`BEGIN; INSERT INTO public.things VALUES (2, 'b')`)
	eventually(t, time.Minute, "they are old", func() (bool, error) {
		got := written(p.look())
		return strings.Contains(got, "info: pid ") && strings.Contains(got, "warning: prepared transaction 'it''s forgotten' has been open for 00:00:1"), nil
	})
	p.mend(p.look(), "has been open for")
	p.mend(p.look(), "has had a transaction open")
	eventually(t, time.Minute, "they are gone", func() (bool, error) {
		got := written(p.look())
		return !strings.Contains(got, "open for"), nil
	})

	// What lies between.
	relay := newRelay(t, s.src.URL(databaseOf(t, own)))
	p.with("danger: a connection pooler lies between here and the source", func() { relay.pools.Store(true); s.cfg.Capture.URL = relay.url(t, own) }, superuser)
	if strings.HasPrefix(relay.l.Addr().String(), "127.") {
		t.Log("this machine has no address of its own: a connection without TLS is not looked for")
	} else {
		p.with("is not encrypted → sslmode=verify-full", func() { s.cfg.Capture.URL = relay.url(t, own) }, superuser)
	}

	// Rights.
	db.do(`CREATE ROLE owner; CREATE ROLE weak LOGIN CONNECTION LIMIT 50; CREATE SCHEMA "Odd ""one"""; CREATE TABLE "Odd ""one""".t (id int PRIMARY KEY); ALTER TABLE "Odd ""one""".t OWNER TO owner`)
	s.cfg.Capture.Tables = []string{"public.*", "Odd*.*"}
	p.with("role weak lacks the right REPLICATION → ALTER ROLE \"weak\" REPLICATION;", p.as("weak"), nil)
	superuser()
	p.with("danger: role weak may not make publications", p.as("weak"), nil)
	superuser()
	db.do(`REVOKE CREATE ON DATABASE %s FROM weak`, databaseOf(t, own))
	p.with("may not make the schema of the event log in database "+databaseOf(t, own)+", nor publish Odd \"one\".t, public.things", p.as("weak"), func() {
		superuser() // no SQL gives away the rights of a superuser, who owns it
		db.do(`ALTER TABLE public.things OWNER TO owner`)
	})
	p.with("may not make the schema of the event log", p.as("weak"), nil)
	superuser()
	db.do(`REVOKE owner FROM weak`)
	p.with(`warning: role weak may not read the existing rows of Odd "one".t → GRANT USAGE ON SCHEMA`, p.as("weak"), nil)
	p.with("warning: row-level security hides rows of public.things from role weak", p.does(`GRANT SELECT ON public.things TO weak`, `ALTER TABLE public.things ENABLE ROW LEVEL SECURITY`), nil)
	p.with("warning: role weak may have only 3 connections", p.does(`ALTER ROLE weak CONNECTION LIMIT 3`), nil)
	superuser()
	db.do(`DROP TABLE "Odd ""one""".t; ALTER TABLE public.things DISABLE ROW LEVEL SECURITY`)
	s.cfg.Capture.Tables = nil

	// Tables.
	p.with("info: public.visits is unlogged", p.does(`CREATE UNLOGGED TABLE public.visits (id int PRIMARY KEY)`), nil)
	db.do(`CREATE TABLE public.sales (id int) PARTITION BY LIST (id); CREATE FOREIGN DATA WRAPPER w; CREATE SERVER far FOREIGN DATA WRAPPER w`)
	p.with("warning: public.sales_1, a partition of public.sales, is unlogged", p.does(`CREATE UNLOGGED TABLE public.sales_1 PARTITION OF public.sales FOR VALUES IN (1)`), nil)
	p.with("warning: public.sales_2, a partition of public.sales, is a foreign table", p.does(`CREATE FOREIGN TABLE public.sales_2 PARTITION OF public.sales FOR VALUES IN (2) SERVER far`), p.does(`DROP TABLE public.sales`))
	p.with("info: the database has large objects", p.does(`SELECT lo_from_bytea(4711, 'x')`), p.does(`SELECT lo_unlink(4711)`))
}

// freeAddress is one that nobody listens at.
func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// replicating opens a connection on which replication commands are understood.
func replicating(t testing.TB, url, application string) *pgconn.PgConn {
	t.Helper()
	cfg, err := pgconn.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	cfg.RuntimeParams["replication"], cfg.RuntimeParams["application_name"] = "database", application
	conn, err := pgconn.ConnectConfig(within(t, time.Minute), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// relay is a network between doctor and a server, on an address of this machine that is not the loopback, if it has one.
type relay struct {
	l      net.Listener
	pools  atomic.Bool // it announces other processes than those that answer, as a pooler does
	target string
}

func newRelay(t testing.TB, url string) *relay {
	t.Helper()
	host := "127.0.0.1"
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && !n.IP.IsLoopback() {
			host = n.IP.String()
		}
	}
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := pgconn.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{l: l, target: net.JoinHostPort(cfg.Host, fmt.Sprint(cfg.Port))}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go r.serve(c)
		}
	}()
	return r
}

func (r *relay) serve(c net.Conn) {
	defer c.Close()
	s, err := net.Dial("tcp", r.target)
	if err != nil {
		return
	}
	defer s.Close()
	go func() { _, _ = io.Copy(s, c); _ = s.Close() }()
	buf := make([]byte, 64<<10)
	for {
		n, err := s.Read(buf)
		if err != nil {
			return
		}
		if i := strings.Index(string(buf[:n]), "K\x00\x00\x00\x0c"); i >= 0 && i+9 <= n && r.pools.Swap(false) { // BackendKeyData
			buf[i+5] ^= 1
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

func (r *relay) url(t testing.TB, raw string) string {
	return strings.Replace(raw, r.target, r.l.Addr().String(), 1)
}

// TestDoctorOfTables: the SQL that doctor gives for a table is what its updates and deletes need to be captured, or to work again.
func TestDoctorOfTables(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true})
	p := newPatient(t, s, "danger: fsync is off")
	db := p.db
	db.do("%s", simple)
	db.do(`CREATE SCHEMA "Shop ""1"""`)
	s.cfg.Capture.Tables = []string{"public.*", "Shop*.*"}
	type table struct{ name, make, want string }
	tables := []table{
		{"plain", `(a int)`, "it has no primary key → ALTER TABLE %s REPLICA IDENTITY FULL; then backstory init"},
		{`Has "Index`, `(a int NOT NULL, b text NOT NULL, c int); CREATE UNIQUE INDEX nullable ON %[1]s (c); CREATE UNIQUE INDEX part ON %[1]s (a) WHERE a > 5; CREATE UNIQUE INDEX expr ON %[1]s ((a + 1));
			ALTER TABLE %[1]s ADD CONSTRAINT late UNIQUE (a) DEFERRABLE; CREATE UNIQUE INDEX "My Key" ON %[1]s (b, a) INCLUDE (c)`, "it has no primary key → ALTER TABLE %s REPLICA IDENTITY USING INDEX \"My Key\";"},
		{"deferred", `(a int PRIMARY KEY DEFERRABLE, b int NOT NULL UNIQUE)`, "its primary key is deferrable → ALTER TABLE %s REPLICA IDENTITY USING INDEX deferred_b_key;"},
		{"nothing", `(a int PRIMARY KEY, b int NOT NULL UNIQUE); ALTER TABLE %[1]s REPLICA IDENTITY NOTHING`, "its replica identity is NOTHING → ALTER TABLE %s REPLICA IDENTITY DEFAULT;"},
		{"gone", `(a int PRIMARY KEY, b int NOT NULL UNIQUE); ALTER TABLE %[1]s REPLICA IDENTITY USING INDEX gone_b_key; ALTER TABLE %[1]s DROP CONSTRAINT gone_b_key`, "the index of its replica identity is gone → ALTER TABLE %s REPLICA IDENTITY DEFAULT;"},
	}
	if s.src.Major() >= 18 {
		tables = append(tables, table{"made", `(a int NOT NULL UNIQUE, b int GENERATED ALWAYS AS (a + 1) STORED); ALTER TABLE %[1]s REPLICA IDENTITY FULL`,
			"it has generated columns and REPLICA IDENTITY FULL → ALTER TABLE %s REPLICA IDENTITY USING INDEX made_a_key;"},
			table{"keyless", `(a int, b int GENERATED ALWAYS AS (a + 1) STORED)`, "it has no primary key → give it a primary key without generated columns"})
	}
	quoted := func(x table) string { return pgx.Identifier{`Shop "1"`, x.name}.Sanitize() }
	for _, x := range tables {
		q := quoted(x)
		p.with(fmt.Sprintf("warning: only inserts of Shop \"1\".%s can be captured: ", x.name)+strings.ReplaceAll(x.want, "%s", q),
			func() { db.do("%s", "CREATE TABLE "+q+" "+strings.ReplaceAll(x.make, "%[1]s", q)) }, func() {
				if x.name != "keyless" {
					p.mend(p.look(), "only inserts of Shop \"1\"."+x.name)
				}
				db.do("%s", "DROP TABLE "+q)
			})
	}
	for _, x := range tables {
		db.do("%s", "CREATE TABLE "+quoted(x)+" "+strings.ReplaceAll(x.make, "%[1]s", quoted(x)))
	}
	db.do(`CREATE TABLE public.keyed (id int PRIMARY KEY, v int)`)
	s.init()
	s.once()

	// What is captured as inserts is captured whole after the SQL and init; UPDATE works before, between and after.
	for _, x := range tables[:5] {
		update := "UPDATE " + quoted(x) + " SET a = a + 1"
		what := "only inserts of Shop \"1\"." + x.name + " are captured"
		db.do("%s", update)
		p.mend(p.look(), what+": ")
		if got := written(p.look()); !strings.Contains(got, what+", though it has a usable key by now → backstory init") {
			t.Errorf("after the SQL, doctor says of %s:\n%s", x.name, got)
		}
		db.do("%s", update)
		s.init()
		if got := written(p.look()); strings.Contains(got, what) {
			t.Errorf("after the SQL and init, doctor says of %s:\n%s", x.name, got)
		}
		db.do("%s", update)
	}
	s.once()

	// A table that loses its key harms the application until it is mended.
	p.with("danger: Postgres refuses the application's UPDATEs and DELETEs of public.keyed", p.does(`ALTER TABLE public.keyed DROP CONSTRAINT keyed_pkey`, `ALTER TABLE public.keyed ALTER id DROP NOT NULL`), nil)
	db.do(`UPDATE public.keyed SET v = 1`)
	p.with("warning: public.later is not captured → backstory init", p.does(`CREATE TABLE public.later (id int PRIMARY KEY)`), func() { s.init() })
	s.cfg.Capture.Exclude = []string{"public.later"}
	p.with("warning: BACKSTORY_EXCLUDE: public.latter matches no table", func() { s.cfg.Capture.Exclude = []string{"public.later", "public.latter"} }, func() { s.cfg.Capture.Exclude = nil })
	p.with("warning: public.later is captured, though", func() { s.cfg.Capture.Exclude = []string{"public.later"} }, func() { s.init() })
	s.once()

	// People who have set nothing may not know that another schema is left out; whoever excludes it does.
	p.with("info: schema billing has 2 tables that BACKSTORY_TABLES leaves out → BACKSTORY_TABLES="+strings.Join(s.cfg.Capture.Tables, ",")+",billing.*, then backstory init",
		p.does(`CREATE SCHEMA billing`, `CREATE TABLE billing.a (id int PRIMARY KEY)`, `CREATE TABLE billing.b (id int) PARTITION BY LIST (id)`, `CREATE TABLE billing.b_1 PARTITION OF billing.b FOR VALUES IN (1)`),
		func() { s.cfg.Capture.Exclude = []string{"billing.*"} })
	s.cfg.Capture.Exclude = nil
	s.says(0, "BACKSTORY_TABLES leaves out schema billing (2 tables). To take them in: BACKSTORY_TABLES="+strings.Join(s.cfg.Capture.Tables, ",")+",billing.*", "init")
	db.do(`DROP SCHEMA billing CASCADE`)

	// Somebody's lock hides the tables, and nothing else.
	locked := s.sql()
	p.with("warning: the source's tables could not be looked at", func() { locked.do(`BEGIN; LOCK TABLE public.things`) }, func() { locked.do(`ROLLBACK`) })
}

// TestDoctorOfRoles: a role that has what README asks for has all it needs; what another one lacks is found, with the GRANT.
func TestDoctorOfRoles(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true})
	p := newPatient(t, s, "danger: fsync is off")
	db, own := p.db, s.cfg.Capture.URL
	db.do("%s", simple)
	db.do(`CREATE ROLE boss LOGIN REPLICATION; GRANT CREATE ON DATABASE %s TO boss; ALTER TABLE public.things OWNER TO boss; CREATE ROLE weak LOGIN REPLICATION`, databaseOf(t, own))
	p.as("boss")()
	writer := open(t, own) // it has just begun, which a role that is no pg_monitor cannot see
	writer.do(`BEGIN; INSERT INTO public.things VALUES (1, 'a')`)
	if got := written(p.look()); strings.Contains(got, "transaction open") {
		t.Errorf("of a transaction that has just begun doctor says:\n%s", got)
	}
	writer.do(`COMMIT`)
	s.init()
	s.once()
	p.mend(p.look(), "max_slot_wal_keep_size is not set")
	eventually(t, time.Minute, "nothing else is found", func() (bool, error) {
		list := p.look()
		return len(list) == 1 && list[0].Check == "fsync", fmt.Errorf("%s", written(list))
	})
	var many []*pgx.Conn
	most := db.one("SELECT current_setting('max_connections')")
	p.with("warning: of "+most+" connections only ", func() {
		for int64(len(many)) < atoi(t, most)-10 {
			many = append(many, open(t, own).Conn)
		}
	}, func() {
		for _, c := range many {
			_ = c.Close(t.Context())
		}
	})
	// Why existing rows are not taken over is what a sidecar at work says.
	db.do(`CREATE TABLE public.secrets (id int PRIMARY KEY); INSERT INTO public.secrets VALUES (1); ALTER TABLE public.secrets OWNER TO boss; REVOKE SELECT ON public.secrets FROM boss`)
	s.init()
	run := s.start()
	says := func() string {
		st, err := run.sc.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return written(st.Findings())
	}
	eventually(t, time.Minute, "it says so", func() (bool, error) {
		return strings.Contains(says(), "warning: existing rows of public.secrets are not taken over: "), nil
	})
	ctx, stop := context.WithCancel(t.Context())
	served, addr := make(chan error, 1), freeAddress(t)
	go func() { served <- run.sc.Serve(ctx, addr) }()
	s.env = []string{"BACKSTORY_HTTP_ADDR=" + addr}
	eventually(t, 20*time.Second, "doctor asks the sidecar", func() (bool, error) {
		d := s.command(false, "doctor", "--json")
		d.wait(time.Minute)
		return strings.Contains(d.out.String(), `"what":"existing rows of public.secrets are not taken over: `), fmt.Errorf("%s", d.out)
	})
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	p.mend(p.look(), "role boss may not read the existing rows of public.secrets")
	eventually(t, time.Minute, "it says nothing more", func() (bool, error) { return says() == "", nil })
	if err := run.end(); err != nil {
		t.Fatal(err)
	}
	db.do(`GRANT USAGE ON SCHEMA backstory TO weak; GRANT SELECT ON ALL TABLES IN SCHEMA backstory TO weak; GRANT SELECT ON public.secrets TO weak; GRANT SELECT ON public.things TO weak`)
	p.with("danger: role weak does not own the log, which belongs to boss → GRANT", p.as("weak"), nil)
	p.with("warning: role weak may not alter the publications backstory, backstory_inserts and the tables of boss → GRANT", p.does(`REVOKE boss FROM weak`), nil)
	db.do(`REVOKE boss FROM weak; ALTER TABLE public.things OWNER TO postgres; ALTER SCHEMA backstory OWNER TO postgres`)
	if got := written(p.look()); strings.Contains(got, "GRANT \"postgres\"") || !strings.Contains(got, "may not alter") || !strings.Contains(got, "does not own the log") || strings.Contains(got, "danger: the log does not go on") {
		t.Errorf("doctor gives away the rights of a superuser:\n%s", got)
	}
}

// TestDoctorOfPublications: whatever is left out of them is found, also when somebody has made them before init, and nothing is when they are
// as they should be.
func TestDoctorOfPublications(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true})
	p := newPatient(t, s, "danger: fsync is off")
	db := p.db
	db.do("%s", simple)
	db.do(`CREATE TABLE public.visits (at text)`)
	drop := func() { db.do(`DROP PUBLICATION IF EXISTS backstory; DROP PUBLICATION IF EXISTS backstory_inserts`) }
	for _, x := range []struct {
		make, want string
		from       int
	}{
		{`CREATE PUBLICATION backstory FOR TABLE public.things WITH (publish = 'insert, update')`, "danger: publication backstory does not publish everything that it should", 14},
		{`CREATE PUBLICATION backstory_inserts FOR TABLE public.visits WITH (publish = 'insert')`, "danger: publication backstory_inserts does not publish everything that it should", 14},
		{`CREATE PUBLICATION backstory_inserts FOR TABLE public.visits`, "danger: publication backstory_inserts publishes updates and deletes", 14},
		{`CREATE PUBLICATION backstory FOR TABLE public.things WITH (publish_via_partition_root = true)`, "danger: publication backstory has publish_via_partition_root", 14},
		{`CREATE PUBLICATION backstory FOR ALL TABLES`, "danger: publication backstory is FOR ALL TABLES", 14},
		{`CREATE PUBLICATION everything FOR ALL TABLES`, "warning: publication everything is FOR ALL TABLES → keep the log in another database", 14},
		{`CREATE PUBLICATION backstory FOR TABLE public.things WHERE (id > 5)`, "danger: publication backstory has only some rows of public.things", 15},
		{`CREATE PUBLICATION backstory FOR TABLE public.things (id, v) WHERE (id > 5)`, "danger: publication backstory has only some rows and some columns of public.things", 15},
		{`CREATE PUBLICATION backstory FOR TABLES IN SCHEMA public`, "danger: publication backstory has all tables of schema public", 15},
		{`CREATE PUBLICATION backstory FOR TABLE public.things WITH (publish_generated_columns = stored)`, "danger: publication backstory has publish_generated_columns", 18},
	} {
		if s.src.Major() < x.from {
			continue
		}
		var undo func()
		if strings.Contains(x.make, "everything") {
			undo = p.does(`DROP PUBLICATION everything`)
		}
		p.with(x.want, p.does(x.make), undo)
		drop()
	}
	s.init()
	s.once()
	if got := written(p.look()); strings.Contains(got, "publication") {
		t.Errorf("doctor says of what init has made:\n%s", got)
	}
	for _, x := range []struct{ do, want string }{
		{`ALTER PUBLICATION backstory DROP TABLE public.things`, "changes are missing of public.things: it was taken out of publication backstory →"},
		{`ALTER PUBLICATION backstory DROP TABLE public.things; ALTER PUBLICATION backstory ADD TABLE public.things`, "changes are missing of public.things: it was taken out of publication backstory and put back"},
	} {
		p.with("warning: "+x.want, p.does(x.do), func() { s.once() })
	}
	for what, q := range map[string]string{
		"publication backstory was altered":                                   `ALTER PUBLICATION backstory SET (publish = 'insert, update')`,
		"publication backstory was dropped":                                   `DROP PUBLICATION backstory`,
		"replication slot " + s.cfg.Capture.Slot + " was moved or made again": `SELECT pg_replication_slot_advance('` + s.cfg.Capture.Slot + `', pg_current_wal_lsn()) FROM pg_logical_emit_message(true, 'x', 'x', true)`,
		"replication slot " + s.cfg.Capture.Slot + " is gone":                 `SELECT pg_drop_replication_slot('` + s.cfg.Capture.Slot + `')`,
	} {
		if s.src.Major() < 17 {
			q = strings.Replace(q, ", 'x', true)", ", 'x')", 1)
		}
		p.with("danger: the log does not go on: ", p.does(q), func() {
			if got := written(p.look()); !strings.Contains(got, what) || strings.Contains(got, "does not exist → backstory init") {
				t.Errorf("doctor does not say %q:\n%s", what, got)
			}
			if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			s.once()
		})
	}
}

// TestDoctorMeanwhile: what goes wrong once there is a log, and that nothing does while a sidecar is at work.
func TestDoctorMeanwhile(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, settings: map[string]string{"max_slot_wal_keep_size": "50GB", "wal_keep_size": "0"}})
	p := newPatient(t, s, "")
	db, slot := p.db, s.cfg.Capture.Slot
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things SELECT i, i FROM generate_series(1, 1000) i`)
	s.init()
	if got := written(p.look()); !strings.Contains(got, "info: the log does not have all rows of public.things yet (0 % read)") {
		t.Errorf("before the rows are read doctor says:\n%s", got)
	}
	s.once()
	p.mend(p.look(), "fsync is off")
	eventually(t, time.Minute, "nothing is wrong", func() (bool, error) { return len(p.look()) == 0, nil })

	// While a sidecar is busy, log and slot move between two looks.
	run := s.start()
	busy, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-busy:
				return
			default:
			}
			if _, err := db.Exec(context.Background(), `UPDATE public.things SET v = v || 'x' WHERE id <= 50`); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		if list := p.look(); len(list) > 0 {
			t.Errorf("while a sidecar is at work doctor says:\n%s", written(list))
		}
	}
	close(busy)
	<-done
	eventually(t, time.Minute, "it has caught up", func() (bool, error) {
		st, err := run.sc.Status(t.Context())
		return err == nil && st.CaughtUp, err
	})
	if err := run.end(); err != nil {
		t.Fatal(err)
	}

	// Others at the slot.
	p.with("(thief) streams from replication slot "+slot, func() {
		c := replicating(t, s.cfg.Capture.URL, "thief")
		// From far ahead, so that nothing is confirmed meanwhile.
		err := c.Exec(t.Context(), "START_REPLICATION SLOT "+slot+" LOGICAL FFFF/0 (proto_version '1', publication_names 'backstory')")
		go func() { _ = err.Close() }()
		eventually(t, time.Minute, "it streams", func() (bool, error) { return db.one(`SELECT count(*) FROM pg_stat_replication`) == "1", nil })
	}, nil)
	p.with("warning: no sidecar has been at work for 3h", p.does(`UPDATE backstory.head SET updated_at = now() - interval '3 hours'`), func() {
		db.do(`INSERT INTO public.things VALUES (0, '')`)
		s.once()
	})
	p.with("danger: default_transaction_read_only is on for role postgres", p.does(`ALTER ROLE postgres SET default_transaction_read_only = on`), func() {
		db.do(`SET default_transaction_read_only = off`)
		p.mend(p.look(), "default_transaction_read_only is on")
	})
	db.do(`ALTER ROLE postgres RESET default_transaction_read_only`)
	p.with("warning: reactor kafka does not get on: broker away", p.does(`INSERT INTO backstory.checkpoint (name, position, error, failed_at) VALUES ('kafka', 1, 'broker away', now())`), p.does(`DELETE FROM backstory.checkpoint`))
	p.with("info: reactor kafka is paused, "+db.one(`SELECT position - 1 FROM backstory.head`)+" events behind → backstory sink resume kafka", p.does(`INSERT INTO backstory.checkpoint (name, position, paused) VALUES ('kafka', 1, true)`), p.does(`DELETE FROM backstory.checkpoint`))

	// What decoding has no memory for.
	p.set("logical_decoding_work_mem", "64kB")()
	p.with("of transactions to its disk, to decode them with logical_decoding_work_mem = 64kB", func() {
		db.do(`INSERT INTO public.things SELECT i, repeat('x', 100) FROM generate_series(2000, 60000) i`)
		s.once()
		eventually(t, time.Minute, "it is counted", func() (bool, error) {
			return db.one(`SELECT sum(spill_bytes) > 0 FROM pg_stat_replication_slots`) == "t", nil
		})
	}, nil)

	// Without a baseline, ALTER TABLE leaves old values in the log.
	db.do(`DELETE FROM public.things WHERE id > 10`)
	s.cfg.NoBaseline = true
	s.init()
	p.with("warning: public.things was altered, and its rows are not compared with the log's", func() {
		db.do(`ALTER TABLE public.things ALTER v TYPE text USING v || '!'; INSERT INTO public.things VALUES (-1, '')`)
		s.once()
	}, func() {
		s.cfg.NoBaseline = false
		s.init()
		s.once()
	})

	if s.src.Major() >= 17 { // the slot is one that standbys keep
		p.with("warning: synchronized_standby_slots is empty", p.does(`SELECT pg_create_physical_replication_slot('standby')`), nil)
		p.with("warning: synchronized_standby_slots names gone, which no standby uses", p.set("synchronized_standby_slots", "gone"), nil)
		p.does(`SELECT pg_drop_replication_slot('standby')`)()
	}

	// The limit of its WAL.
	filler := func() { db.do(`SELECT pg_logical_emit_message(false, 'filler', repeat('x', 10000000))`) }
	caughtUp := func() {
		eventually(t, time.Minute, "the slot keeps little", func() (bool, error) {
			db.do(`CHECKPOINT; INSERT INTO public.things SELECT 1 + max(id) FROM public.things`)
			s.once()
			return db.one(`SELECT pg_current_wal_lsn() - restart_lsn < 3000000 FROM pg_replication_slots WHERE slot_name = '%s'`, slot) == "t", nil
		})
	}
	caughtUp()
	p.set("max_slot_wal_keep_size", "48MB")()
	p.with("before replication slot "+slot+" is in danger → ALTER SYSTEM SET max_slot_wal_keep_size", func() {
		for db.one(`SELECT safe_wal_size > 12000000 FROM pg_replication_slots WHERE slot_name = '%s'`, slot) == "t" {
			db.do(`SELECT pg_logical_emit_message(false, 'filler', repeat('x', 1000000))`)
		}
	}, nil)
	p.set("max_slot_wal_keep_size", "48MB")()
	p.with("danger: replication slot "+slot+" is about to be lost", func() {
		for range 8 {
			filler()
		}
	}, nil)
	caughtUp() // nothing is lost
	p.set("max_slot_wal_keep_size", "48MB")()
	for range 8 {
		filler()
	}
	p.with("danger: the log does not go on: the server has removed WAL that the replication slot "+slot+" needed → ", p.does(`CHECKPOINT`), func() {
		if _, err := backstory.AcceptGap(within(t, time.Minute), s.cfg, nil); err != nil {
			t.Fatal(err)
		}
		s.once()
	})
}

// TestDoctorOfALogElsewhere: the log's own server.
func TestDoctorOfALogElsewhere(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, settings: map[string]string{"fsync": "on", "max_slot_wal_keep_size": "50GB"}})
	p := newPatient(t, s, "")
	p.db.do("%s", simple)
	p.db.do(`CREATE PUBLICATION everything FOR ALL TABLES`) // does not concern a log that is elsewhere
	url := s.cfg.Log.URL
	logs := s.logSQL()
	logs.do(`CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0`)
	p.with("danger: the log's database has encoding LATIN1", func() { s.cfg.Log.URL = strings.Replace(url, databaseOf(t, url), "latin", 1) }, func() { s.cfg.Log.URL = url })
	s.init()
	s.once()
	source := p.db
	p.db = logs // where the SQL belongs
	p.mend(p.look(), "fsync is off at the log's server")
	p.with("danger: fsync is off at the log's server", func() { logs.do(`ALTER SYSTEM SET fsync = off`); logs.do(`SELECT pg_reload_conf()`) }, nil)
	p.db = source
	if list := p.look(); len(list) > 0 {
		t.Errorf("where nothing is wrong doctor says:\n%s", written(list))
	}
}
