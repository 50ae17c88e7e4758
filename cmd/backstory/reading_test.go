package main

import (
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
