package main

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// A date ends in BACKSTORY_TZ, by default in the time zone that a new session at the source gets.
func TestZoneOfDates(t *testing.T) {
	t.Parallel()
	inSource := newSite(t, shared(t))
	inSource.begin()
	inSource.sql("ALTER DATABASE %s SET TimeZone = 'Asia/Tokyo'", inSource.db)
	reader := inSource.role("", false)
	inSource.sql("GRANT USAGE ON SCHEMA backstory TO %s; GRANT SELECT ON ALL TABLES IN SCHEMA backstory TO %s", reader, reader)
	berliner := inSource.role("SUPERUSER", false)
	inSource.sql("ALTER ROLE %s SET TimeZone = 'America/Bogota'; ALTER ROLE %s IN DATABASE %s SET TimeZone = 'Europe/Berlin'", berliner, berliner, inSource.db)
	apart := newSite(t, shared(t))
	db := apart.logApart(apart.server)
	apart.begin()
	apart.sql("ALTER DATABASE %s SET TimeZone = 'Asia/Tokyo'; ALTER DATABASE %s SET TimeZone = 'America/New_York'", apart.db, db)
	plain := newSite(t, shared(t))
	plain.begin()
	odd := newSite(t, shared(t))
	odd.begin()
	odd.sql("ALTER DATABASE %s SET TimeZone = '<+03>-03'", odd.db)

	const none = ""
	for _, c := range []struct {
		name               string
		site               *site
		tz, source, logURL string
		zone               string
		warns              string
	}{
		{name: "of the source's database", site: inSource, source: inSource.env["BACKSTORY_SOURCE_URL"], zone: "Asia/Tokyo"},
		{name: "of the role in the source's database", site: inSource, source: inSource.url(berliner, inSource.db), zone: "Europe/Berlin"},
		{name: "of the server", site: plain, source: plain.env["BACKSTORY_SOURCE_URL"], zone: "UTC"},
		{name: "with a log URL alone that may only read", site: inSource, source: none, logURL: inSource.url(reader, inSource.db), zone: "Asia/Tokyo"},
		{name: "of the source, with the log elsewhere", site: apart, source: apart.env["BACKSTORY_SOURCE_URL"], logURL: apart.env["BACKSTORY_LOG_URL"], zone: "Asia/Tokyo"},
		{name: "of the log's database, where the source is not named", site: apart, source: none, logURL: apart.env["BACKSTORY_LOG_URL"], zone: "America/New_York"},
		{name: "of the log's database, where the source is away", site: apart, source: "postgres://app:" + secret + "@127.0.0.1:1/shop", logURL: apart.env["BACKSTORY_LOG_URL"], zone: "America/New_York",
			warns: "warning: the source does not tell its time zone: 127.0.0.1:1: connection refused (user app, database shop). That of the log's database is used; BACKSTORY_TZ sets another."},
		{name: "as set", site: inSource, tz: "Australia/Lord_Howe", source: inSource.env["BACKSTORY_SOURCE_URL"], zone: "Australia/Lord_Howe"},
		{name: "as the URL says", site: inSource, source: inSource.env["BACKSTORY_SOURCE_URL"] + "&timezone=Asia/Kathmandu", zone: "Asia/Kathmandu"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := *c.site
			s.t, s.env = t, map[string]string{"BACKSTORY_SOURCE_URL": c.source, "BACKSTORY_LOG_URL": c.logURL, "BACKSTORY_TZ": c.tz}
			zone, err := time.LoadLocation(c.zone)
			if err != nil {
				t.Fatal(err)
			}
			day := time.Now().In(zone).AddDate(0, 0, 2).Format("2006-01-02")
			r := s.must("log", "--limit", "1", "--until", day)
			if want := day + " is position 2, the head (" + day + " 23:59:59.999999 " + c.zone + " is in the future)"; !strings.Contains(r.err, want) {
				t.Errorf("%s\nwant %s", r.err, want)
			}
			if c.warns != "" && !strings.Contains(r.err, c.warns) || c.warns == "" && strings.Contains(r.err, "warning") {
				t.Errorf("%s\nwant the warning %q", r.err, c.warns)
			}
			// A place in the log has no time zone: nobody is asked for one.
			if r := s.must("show", "orders/1", "--at", "2"); strings.Contains(r.err, "warning") {
				t.Errorf("%s", r.err)
			}
		})
	}
	t.Run("one that has no name", func(t *testing.T) {
		s := *odd
		s.t = t
		r := s.run("log", "--since", "yesterday")
		if r.code != exitUsage || r.message() != `the TimeZone of the source is "<+03>-03", which is not the name of a time zone` || r.remedy() != "Set BACKSTORY_TZ to a name such as America/New_York or UTC." {
			t.Errorf("exit code %d:\n%s", r.code, r.err)
		}
		s.must("log", "--until", "HEAD")
	})
}

// A role with the grants that README names, made before there is any event, reads all of what comes later: new partitions and views, too.
func TestReaderOfWhatIsToCome(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.env["BACKSTORY_PARTITION_EVENTS"] = "1000"
	s.must("init")
	reader := s.role("", false)
	readme, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	grants := regexp.MustCompile(`(?m)^    (GRANT USAGE ON SCHEMA backstory.*|ALTER DEFAULT PRIVILEGES.*)$`).FindAllString(string(readme), -1)
	if len(grants) != 2 {
		t.Fatalf("README has the grants %q", grants)
	}
	for _, g := range grants {
		s.sql("%s", strings.ReplaceAll(g, "reader", reader))
	}
	s.write(2)
	s.must("run", "--once")
	time.Sleep(10 * time.Millisecond)
	between := time.Now().UTC().Format(time.RFC3339Nano)
	s.sql("INSERT INTO orders SELECT i, 'later' FROM generate_series(1000, 3500) i; CREATE TABLE other.late (id int PRIMARY KEY)")
	s.env["BACKSTORY_TABLES"] = "public.*,other.*"
	s.must("init")
	s.sql("INSERT INTO other.late VALUES (1)")
	s.must("run", "--once")
	mine := s.env["BACKSTORY_SOURCE_URL"]
	s.env["BACKSTORY_SOURCE_URL"] = s.url(reader, s.db)
	for _, args := range [][]string{
		{"log", "--limit", "3"}, {"log", "--until", between}, {"show", "orders/1", "--at", between}, {"checkout", "--at", between, "--csv", filepath.Join(t.TempDir(), "csv"), "orders"},
		{"show", "orders/3400"}, {"verify"}, {"status"},
	} {
		s.must(args...)
	}
	if n := s.ask(s.url(reader, s.db), "SELECT count(*)::text FROM backstory.other_late_events"); n != "1" {
		t.Errorf("the view of a table taken in later has %s events", n)
	}
	s.env["BACKSTORY_SOURCE_URL"] = mine
	s.sql("DROP OWNED BY %s", reader)
}

// A role that is no superuser, and owns the database and its tables, does everything by itself: also where row-level security hides rows
// from it, and where a key is dropped while the sidecar runs.
func TestOwnerIsEnough(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	owner := s.role("REPLICATION", false)
	s.sql(`ALTER DATABASE %s OWNER TO %s; ALTER TABLE public.orders OWNER TO %[2]s; ALTER SCHEMA public OWNER TO %[2]s`, s.db, owner)
	s.sql(`CREATE TABLE hidden (id int PRIMARY KEY, v text); ALTER TABLE hidden OWNER TO %s; ALTER TABLE hidden ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY; INSERT INTO hidden VALUES (1, 'a');
		CREATE TABLE keyed (id int PRIMARY KEY, v text); ALTER TABLE keyed OWNER TO %[1]s`, owner)
	super := s.env["BACKSTORY_SOURCE_URL"]
	s.env["BACKSTORY_SOURCE_URL"] = s.url(owner, s.db)
	s.beginWith("--no-baseline") // the rows that it may not see cannot be taken over
	p := s.sidecar()
	s.caughtUp(p)
	s.at(super, `UPDATE hidden SET v = 'b'; INSERT INTO keyed VALUES (1, 'a')`)
	s.at(super, `ALTER TABLE keyed DROP CONSTRAINT keyed_pkey`)
	began := time.Now()
	eventually(t, 20*time.Second, "the application's UPDATE works", func() bool {
		conn := s.open(super)
		defer conn.Close(context.Background())
		_, err := conn.Exec(context.Background(), `UPDATE keyed SET v = 'b'`)
		return err == nil
	})
	t.Logf("UPDATEs failed for %s", time.Since(began).Round(time.Millisecond))
	eventually(t, 20*time.Second, "all of it is in the log", func() bool {
		return s.ask(super, `SELECT string_agg(type, ' ' ORDER BY type) FROM backstory.events WHERE relation IN ('public.hidden', 'public.keyed')`) == "HiddenImported KeyedCreated KeyedGap"
	})
	if r := p.stop(); r.code != 0 {
		t.Errorf("exit code %d:\n%s", r.code, r.err)
	}
	if r := s.run("checkout", "--at", "HEAD", "--csv", filepath.Join(t.TempDir(), "csv"), "hidden"); r.code == 0 {
		t.Error("a table whose rows init could not see counts as complete")
	}
	s.env["BACKSTORY_SOURCE_URL"] = super
}
