package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	kafkago "github.com/segmentio/kafka-go"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
	"github.com/backstory-dev/backstory/sinks"
)

// stays is the exit code of a sidecar that does not end: it tries again, and status shows why.
const stays = -1

// row is one thing that can be wrong.
type row struct {
	wrong string
	// reads marks a command that only reads a log: all such rows use one site, which has five changes, two of them in the log.
	reads bool
	// server is where the source is; default: one that the rows share.
	server func(*testing.T) *pgservertest.Server
	// set makes it wrong, on a site of its own; begin makes slot and log, and changes that are not in the log yet.
	set func(*site)
	// during makes it wrong while `run` is at work, and then that is the command. Otherwise args is; for a sidecar that stays, it is
	// `run` on what set has made wrong.
	during func(*site, *process)
	args   []string
	// exit is the code with which the command ends, or stays.
	exit int
	// says is part of the message, after "backstory: ", and remedy of the line after it, "  → "; for a sidecar that stays, of
	// what status shows. Where the command succeeds, or finds something, says is part of what it prints.
	// {slot}, {db} and other words stand for what the site has of that name.
	says, remedy string
	// then is what else must hold before the mending.
	then func(*site, result)
	// mend puts it right. Afterwards nothing may be lost: site.whole checks it.
	mend func(*site)
}

func shared(t *testing.T) *pgservertest.Server { return pgservertest.ForTest(t, quick(nil)) }

// own gives a row a server of its own.
func own(settings map[string]string) func(*testing.T) *pgservertest.Server {
	return func(t *testing.T) *pgservertest.Server { return pgservertest.Start(t, quick(settings)) }
}

// with is a fault that is one setting, on a site at work.
func with(name, value string) func(*site) {
	return func(s *site) {
		s.begin()
		s.swap(name, strings.ReplaceAll(value, "SECRET", secret))
	}
}

// before is a fault that is one setting, before init.
func before(name, value string) func(*site) {
	return func(s *site) { s.swap(name, value) }
}

// swap changes the environment for as long as the fault lasts.
func (s *site) swap(name, value string) {
	if s.was == nil {
		s.was = map[string]string{}
	}
	if _, ok := s.was[name]; !ok {
		s.was[name] = s.env[name]
	}
	s.env[name] = value
}

// back undoes swap.
func back(s *site) {
	for name, v := range s.was {
		if s.env[name] = v; v == "" {
			delete(s.env, name)
		}
	}
	s.was = nil
}

// thenBegin undoes swap, and goes on as if nothing had been.
func thenBegin(s *site) {
	back(s)
	s.begin()
}

// asRole makes a role the sidecar's at the source.
func (s *site) asRole(options string) {
	r := s.role(options, false)
	s.words["role"] = r
	s.swap("BACKSTORY_SOURCE_URL", s.url(r, s.db))
}

// acceptedGap lets the log go on, which says so; what the application has written since the last change in the log is found by comparison.
func acceptedGap(s *site) {
	s.t.Helper()
	s.must("init", "--accept-gap")
	if n := s.ask(s.logURL(), `SELECT count(*)::text FROM backstory.events WHERE type = 'SourceGap'`); n == "0" {
		s.t.Error("the log says nothing of the gap")
	}
}

// noGap wants the mending to have lost nothing although there was an error.
func noGap(s *site, _ result) {
	if n := s.ask(s.logURL(), `SELECT count(*)::text FROM backstory.events WHERE type = 'SourceGap'`); n != "0" {
		s.t.Error("a mistake in the settings was recorded as a gap")
	}
}

// badInput is the table of everything that can be wrong.
var badInput = []row{
	// ---- The settings.
	{wrong: "no database is named", args: []string{"run"}, set: with("BACKSTORY_SOURCE_URL", ""), exit: 2,
		says: "no source database is set", remedy: "Set BACKSTORY_SOURCE_URL, for instance postgres://", mend: back},
	{wrong: "no database is named: log", args: []string{"log"}, set: with("BACKSTORY_SOURCE_URL", ""), exit: 2,
		says: "no event log is named", remedy: "Set BACKSTORY_LOG_URL", mend: back},
	{wrong: "a URL whose port is no number", args: []string{"run"}, set: with("BACKSTORY_SOURCE_URL", "postgres://app:SECRET@localhost:abc/shop"), exit: 2,
		says: "BACKSTORY_SOURCE_URL: parse the database URL: invalid port", remedy: "Use the form postgres://user:password@host:5432/database", mend: back},
	{wrong: "a URL whose password has a percent sign", args: []string{"run"}, set: with("BACKSTORY_SOURCE_URL", "postgres://app:Geheim!-7391%zz@localhost/shop"), exit: 2,
		says: "BACKSTORY_SOURCE_URL: parse the database URL: invalid percent-encoded token in password", remedy: "special characters of the password are written as %", mend: back},
	{wrong: "a URL whose password has a blank", args: []string{"init"}, set: with("BACKSTORY_SOURCE_URL", "postgres://app:Geheim!-7391 x@localhost/shop"), exit: 2,
		says: "BACKSTORY_SOURCE_URL: parse the database URL: ", remedy: "special characters of the password are written as %", mend: back},
	{wrong: "a URL whose password has a slash", args: []string{"init"}, set: with("BACKSTORY_SOURCE_URL", "postgres://app:Geheim!-7391/x@localhost/shop"), exit: 2,
		says: "BACKSTORY_SOURCE_URL: parse the database URL: ", remedy: "special characters of the password are written as %", mend: back},
	{wrong: "a URL whose password has an @", args: []string{"init"}, set: with("BACKSTORY_SOURCE_URL", "postgres://app:Geheim!-7391@x@localhost/shop"), exit: 2,
		says: "BACKSTORY_SOURCE_URL: parse the database URL: the password has an @ as it is", remedy: "@ is %40", mend: back},
	{wrong: "a URL of another kind of database", args: []string{"init"}, set: with("BACKSTORY_SOURCE_URL", "mysql://app:SECRET@localhost/shop"), exit: 2,
		says: "BACKSTORY_SOURCE_URL: parse the database URL: ", remedy: "Use the form postgres://", mend: back},
	{wrong: "keywords without a value", args: []string{"verify"}, set: with("BACKSTORY_LOG_URL", "host=localhost password=Geheim!-7391 port"), exit: 2,
		says: "BACKSTORY_LOG_URL: parse the database URL: ", remedy: "host=/var/run/postgresql dbname=…", mend: back},
	{wrong: "an unknown sslmode", args: []string{"log"}, set: with("BACKSTORY_LOG_URL", "postgres://app:SECRET@localhost/shop?sslmode=maybe"), exit: 2,
		says: "BACKSTORY_LOG_URL: parse the database URL: failed to configure TLS (sslmode is invalid)", remedy: "Use the form", mend: back},
	{wrong: "a number that is none", args: []string{"run"}, set: with("BACKSTORY_MAX_BATCH_BYTES", "SECRET"), exit: 2,
		says: "BACKSTORY_MAX_BATCH_BYTES is not a whole number", remedy: "The default is 1048576", mend: back},
	{wrong: "a number that is too small", args: []string{"run"}, set: with("BACKSTORY_MAX_CACHE_BYTES", "-1"), exit: 2,
		says: "BACKSTORY_MAX_CACHE_BYTES has to be more than 0", remedy: "The default is 16777216", mend: back},
	{wrong: "neither true nor false", args: []string{"run"}, set: with("BACKSTORY_KAFKA_TLS", "SECRET"), exit: 2,
		says: "BACKSTORY_KAFKA_TLS is not true or false", remedy: "README, Settings", mend: back},
	{wrong: "an empty setting is not set", args: []string{"run", "--once"}, set: with("BACKSTORY_MAX_BATCH_BYTES", ""), exit: 0,
		says: "everything received is in the log", mend: back},
	{wrong: "a setting that does not exist", args: []string{"run", "--once"}, set: with("BACKSTORY_LOG_ULR", "postgres://app:SECRET@localhost/log"), exit: 0,
		says: `msg="unknown setting" name=BACKSTORY_LOG_ULR meant=BACKSTORY_LOG_URL`, mend: back},
	{wrong: "a setting that does not exist: log", args: []string{"log"}, set: with("BACKSTORY_LOG_ULR", "postgres://app:SECRET@localhost/log"), exit: 0,
		says: `msg="unknown setting" name=BACKSTORY_LOG_ULR meant=BACKSTORY_LOG_URL`, mend: back},
	{wrong: "a file with a setting is missing", args: []string{"run"}, set: with("BACKSTORY_SOURCE_URL_FILE", "/nowhere/url"), exit: 2,
		says: "read BACKSTORY_SOURCE_URL_FILE: open /nowhere/url: no such file or directory", remedy: "It must name a readable file that holds the value of BACKSTORY_SOURCE_URL.", mend: back},
	{wrong: "a file with a setting is empty", args: []string{"run"}, set: with("BACKSTORY_SOURCE_URL_FILE", "/dev/null"), exit: 2,
		says: "BACKSTORY_SOURCE_URL_FILE names a file that is empty (/dev/null)", remedy: "It must hold the value of BACKSTORY_SOURCE_URL.", mend: back},
	{wrong: "a server without TLS", args: []string{"log"}, set: func(s *site) {
		s.begin()
		s.swap("BACKSTORY_LOG_URL", strings.Replace(s.url("postgres", s.db), "sslmode=disable", "sslmode=require", 1))
	}, exit: 1,
		says: "server refused TLS connection", remedy: "The server has no TLS: turn it on there (ssl = on), or say sslmode=disable in the URL.", mend: back},
	{wrong: "a version of Postgres that is none", args: []string{"demo", "--pg", "9"}, set: with("BACKSTORY_LOG_URL", ""), exit: 2,
		says: `--pg: read Postgres version "9": want 14 to 18`, remedy: "For instance --pg 17.", mend: back},
	{wrong: "a way to print times that is none", args: []string{"log", "--date", "unix"}, set: (*site).begin, exit: 2,
		says: `--date cannot be "unix"`, remedy: "Use relative or iso.", mend: back},
	{wrong: "an unknown log level", args: []string{"run"}, set: with("BACKSTORY_LOG_LEVEL", "loud"), exit: 2,
		says: `BACKSTORY_LOG_LEVEL "loud" is not a level`, remedy: "Use debug, info, warn or error.", mend: back},
	{wrong: "an unknown log format", args: []string{"run"}, set: with("BACKSTORY_LOG_FORMAT", "xml"), exit: 2,
		says: `BACKSTORY_LOG_FORMAT "xml" is not a format`, remedy: "Use text or json.", mend: back},
	{wrong: "an unknown time zone", args: []string{"log", "--since", "yesterday"}, set: with("BACKSTORY_TZ", "Mars/Base"), exit: 2,
		says: `BACKSTORY_TZ "Mars/Base" is not a time zone`, remedy: "Use a name such as America/New_York or UTC.", mend: back},
	{wrong: "a slot name that Postgres does not take", args: []string{"init"}, set: before("BACKSTORY_SLOT", "My-Slot"), exit: 2,
		says: `slot name "My-Slot" is not possible`, remedy: "Use a–z, 0–9 and _ only, at most 63 of them (BACKSTORY_SLOT).", mend: thenBegin},
	{wrong: "a publication name that is too long", args: []string{"init"}, set: before("BACKSTORY_PUBLICATION", strings.Repeat("p", 60)), exit: 2,
		says: `publication name "pppp`, remedy: "Use at most 55 bytes (BACKSTORY_PUBLICATION).", mend: thenBegin},
	{wrong: "a table pattern without a table", args: []string{"init"}, set: before("BACKSTORY_TABLES", "public."), exit: 2,
		says: `table pattern "public." is not of the form schema.table`, remedy: "For instance public.*, billing.invoices or *.events (BACKSTORY_TABLES", mend: thenBegin},
	{wrong: "no table matches", args: []string{"init"}, set: before("BACKSTORY_TABLES", "shop.*,billing.*"), exit: 1,
		says: "no table of {db} matches shop.*, billing.*", remedy: "Set BACKSTORY_TABLES to patterns such as public.*", mend: thenBegin},
	{wrong: "an HTTP address that others could reach", args: []string{"run"}, set: with("BACKSTORY_HTTP_ADDR", ":8800"), exit: 2,
		says: "BACKSTORY_HTTP_ADDR: HTTP address :8800 could be reached from elsewhere", remedy: "Use a loopback address such as 127.0.0.1:8800", mend: back},
	{wrong: "an HTTP address that is none", args: []string{"run"}, set: with("BACKSTORY_HTTP_ADDR", "yes"), exit: 2,
		says: `BACKSTORY_HTTP_ADDR: read HTTP address "yes": it is not host:port`, remedy: "Use a loopback address", mend: back},
	{wrong: "the HTTP port is taken", args: []string{"run"}, exit: 1,
		set: func(s *site) {
			s.begin()
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				s.t.Fatal(err)
			}
			s.t.Cleanup(func() { l.Close() })
			s.words["addr"] = l.Addr().String()
			s.swap("BACKSTORY_HTTP_ADDR", s.words["addr"])
		},
		says: "listen for HTTP on {addr}: bind: address already in use", remedy: "Choose another address with BACKSTORY_HTTP_ADDR", mend: back},
	{wrong: "Kafka brokers without a topic", args: []string{"run"}, set: with("BACKSTORY_KAFKA_BROKERS", "localhost:9092"), exit: 2,
		says: "BACKSTORY_KAFKA_BROKERS is set, BACKSTORY_KAFKA_TOPIC is not", remedy: "Set it to a topic", mend: back},
	{wrong: "a Kafka broker without a port", args: []string{"run"}, exit: 2,
		set: func(s *site) {
			with("BACKSTORY_KAFKA_BROKERS", "localhost")(s)
			s.swap("BACKSTORY_KAFKA_TOPIC", "shop")
		},
		says: `read Kafka broker "localhost"`, remedy: "Write each broker as host:port", mend: back},

	// ---- The command line.
	{wrong: "an unknown command", reads: true, args: []string{"rnu"}, exit: 2, says: `there is no command "rnu"`, remedy: "Did you mean backstory run?"},
	{wrong: "an unknown command of a command", reads: true, args: []string{"sink", "stats"}, exit: 2, says: `there is no command "sink stats"`, remedy: "Did you mean backstory sink status?"},
	{wrong: "an unknown flag", reads: true, args: []string{"run", "--ones"}, exit: 2, says: "run has no flag --ones", remedy: "Did you mean --once?"},
	{wrong: "an argument too many", reads: true, args: []string{"run", "now"}, exit: 2, says: `run takes no arguments, but was given "now"`, remedy: "See backstory run --help."},
	{wrong: "an argument too few", reads: true, args: []string{"show"}, exit: 2, says: "show wants POSITION|ID|ENTITY, but was given none", remedy: "See backstory show --help."},
	{wrong: "a flag that wants a number", reads: true, args: []string{"log", "--limit", "many"}, exit: 2, says: `--limit wants a whole number, not "many"`, remedy: "See backstory log --help."},
	{wrong: "a flag without its value", reads: true, args: []string{"log", "--limit"}, exit: 2, says: "flag needs an argument: --limit", remedy: "See backstory log --help."},

	// ---- Revisions, entities, types.
	{wrong: "a revision before the history", reads: true, args: []string{"log", "--until", "2001-01-01"}, exit: 1,
		says: `revision "2001-01-01" lies before the history begins`, remedy: "The history begins at "},
	{wrong: "a revision before the history: checkout", reads: true, args: []string{"checkout", "--at", "100 years ago", "--schema", "x"}, exit: 1,
		says: `revision "100 years ago" lies before the history begins`, remedy: "The history begins at "},
	{wrong: "an event before the first", reads: true, args: []string{"show", "0"}, exit: 2,
		says: "there is no event at position 0", remedy: "Positions begin with 1"},
	{wrong: "a revision beyond the head", reads: true, args: []string{"checkout", "--at", "99999", "--schema", "x"}, exit: 1,
		says: `revision "99999" is beyond the head of the log, position 2`, remedy: "Use HEAD for the newest state"},
	{wrong: "a revision that is none", reads: true, args: []string{"log", "--since", "the other day"}, exit: 2,
		says: `read revision "the other day": it is none of the known forms`, remedy: "Use a position (1234), an LSN"},
	{wrong: "a day that there is not", reads: true, args: []string{"show", "orders/1", "--at", "2026-02-30"}, exit: 2,
		says: `read revision "2026-02-30": there is no such moment`, remedy: "Use a position"},
	{wrong: "an unknown entity", reads: true, args: []string{"log", "ordres/17"}, exit: 1, says: "the log knows nothing of that name: ordres", remedy: "Did you mean Order? The log holds: Order."},
	{wrong: "an entity without a name", reads: true, args: []string{"log", "/17"}, exit: 2, says: `"/17" does not name an entity`, remedy: "Use the form Order/42 or orders/42"},
	{wrong: "an unknown type", reads: true, args: []string{"log", "--type", "OrderCreate"}, exit: 1, says: "the log has no event of type OrderCreate", remedy: "Did you mean OrderCreated?"},
	{wrong: "a type without a name", reads: true, args: []string{"log", "--type", ""}, exit: 2, says: "--type is empty", remedy: "Leave it out, or give it a value."},
	{wrong: "a revision without a value", reads: true, args: []string{"log", "--since", ""}, exit: 2, says: "--since is empty", remedy: "Leave it out, or give it a value."},
	{wrong: "a moment without a value", reads: true, args: []string{"show", "orders/1", "--at", ""}, exit: 2, says: "--at is empty", remedy: "Leave it out, or give it a value."},
	{wrong: "a row that the log does not know", reads: true, args: []string{"show", "orders/4711"}, exit: 1, says: "the log knows nothing of Order/4711", remedy: "backstory log Order shows what it knows of others."},
	{wrong: "an event that there is not", reads: true, args: []string{"show", "4711"}, exit: 1, says: "no event at position 4711", remedy: "backstory log shows what there is"},
	{wrong: "an id that there is not", reads: true, args: []string{"show", "12345678-1234-8234-9234-123456789abc"}, exit: 1, says: "no event with id 12345678-1234-8234-9234-123456789abc", remedy: "backstory log --json shows the ids"},
	{wrong: "neither event nor entity", reads: true, args: []string{"show", "orders"}, exit: 2, says: `"orders" names no event and no entity`, remedy: "Use a position (1234), an event's id, or an entity (orders/17)."},
	{wrong: "a reactor that there is not", reads: true, args: []string{"sink", "pause", "kafak"}, exit: 1, says: `there is no reactor "kafak"`, remedy: "There are none. backstory run makes them"},

	// ---- Checkouts.
	{wrong: "a checkout of no moment", reads: true, args: []string{"checkout", "--schema", "x"}, exit: 2, says: "--at is missing", remedy: "For instance --at '1 hour ago'"},
	{wrong: "a checkout to nowhere", reads: true, args: []string{"checkout", "--at", "HEAD"}, exit: 2, says: "where should the tables go?", remedy: "Name one of --schema NAME"},
	{wrong: "a checkout to two places", reads: true, args: []string{"checkout", "--at", "HEAD", "--schema", "x", "--csv", "y"}, exit: 2, says: "the tables can go to one place only", remedy: "Name one of --schema NAME"},
	{wrong: "a checkout of an unknown table", reads: true, args: []string{"checkout", "--at", "HEAD", "--schema", "x", "ordres"}, exit: 1,
		says: "ordres: no such table at this revision", remedy: "Did you mean public.orders?"},
	{wrong: "a checkout into a schema in use", reads: true, args: []string{"checkout", "--at", "HEAD", "--schema", "public"}, exit: 1,
		says: "schema public is not empty and", remedy: "Check out into a schema that does not exist yet"},
	{wrong: "a checkout over an earlier one", args: []string{"checkout", "--at", "HEAD", "--schema", "past"}, exit: 1,
		set:  func(s *site) { s.begin(); s.must("checkout", "--at", "HEAD", "--schema", "past") },
		says: "schema past", remedy: "Use --replace to replace it, or name another schema.",
		mend: func(s *site) { s.must("checkout", "--at", "HEAD", "--schema", "past", "--replace") }},
	{wrong: "a checkout into a directory in use", args: []string{"checkout", "--at", "HEAD", "--csv", "."}, reads: true, exit: 1,
		says: "the directory . is not empty, and holds no checkout", remedy: "Name a directory that is empty or does not exist."},
	{wrong: "a checkout into a database that does not parse", reads: true, args: []string{"checkout", "--at", "HEAD", "--database", "postgres://app:Geheim!-7391@localhost:abc/x"}, exit: 2,
		says: "parse the database URL: invalid port", remedy: "Use the form postgres://"},
	{wrong: "a checkout by a role that may not make a schema", args: []string{"checkout", "--at", "HEAD", "--schema", "past"}, exit: 1,
		set: func(s *site) {
			s.begin()
			r := s.role("", false)
			s.sql("GRANT USAGE ON SCHEMA backstory TO %s; GRANT SELECT ON ALL TABLES IN SCHEMA backstory TO %s", r, r)
			s.swap("BACKSTORY_LOG_URL", s.url(r, s.db))
		},
		says: "permission denied for database {db}", remedy: "GRANT CREATE ON DATABASE", mend: back},
	{wrong: "a checkout of a table with rows of before the history", args: []string{"checkout", "--at", "HEAD", "--schema", "past"}, exit: 1,
		set:  func(s *site) { s.write(4); s.lost = 4; s.beginWith("--no-baseline") },
		says: "public.orders", remedy: "--partial", mend: func(s *site) { s.must("checkout", "--at", "HEAD", "--schema", "past", "--partial") }},
	{wrong: "a checkout of a table with a gap", args: []string{"checkout", "--at", "HEAD", "--schema", "past"}, exit: 1,
		set: func(s *site) {
			s.begin()
			s.sql("SELECT pg_drop_replication_slot('%s')", s.slot())
			acceptedGap(s)
		},
		then: func(s *site, _ result) {
			if st := s.must("status").out; !strings.Contains(st, "1 table is to be compared with the log: public.orders") || strings.Contains(st, "before the history") {
				s.t.Errorf("status after the gap:\n%s", st)
			}
		},
		says: `the history has a gap at position 3 ("accepted by hand: the replication slot {slot} is gone"), which is not healed at this revision: the log does not have all rows of public.orders`, remedy: "Use --partial all the same, a revision of before: --at 2, or a revision of after it is healed"},

	// ---- Connections.
	{wrong: "a host that does not exist", args: []string{"run", "--once"}, set: with("BACKSTORY_SOURCE_URL", "postgres://app:SECRET@no-such-host.invalid/shop"), exit: 1,
		says: "no such host (user app, database shop)", remedy: "Check host and port in the URL", mend: back},
	{wrong: "a port where nobody listens", args: []string{"run", "--once"}, set: with("BACKSTORY_SOURCE_URL", "postgres://app:SECRET@127.0.0.1:1/shop"), exit: 1,
		says: "127.0.0.1:1: connection refused (user app, database shop)", remedy: "Check host and port in the URL, that Postgres is running", mend: back},
	{wrong: "several hosts, none of which answers", args: []string{"status"}, set: with("BACKSTORY_SOURCE_URL", "postgres://app:SECRET@127.0.0.1:1,127.0.0.1:2/shop"), exit: 1,
		says: "127.0.0.1:1: connection refused; 127.0.0.1:2: connection refused (user app, database shop)", remedy: "Check host and port in the URL", mend: back},
	{wrong: "a wrong password", args: []string{"run"}, exit: 1,
		set: func(s *site) {
			s.begin()
			r := s.role("SUPERUSER", true)
			s.words["role"] = r
			s.swap("BACKSTORY_SOURCE_URL", strings.Replace(s.url(r, s.db), r, r+":"+secret+"-no", 1))
		},
		says: `password authentication failed for user "{role}" (SQLSTATE 28P01)`, remedy: "Check user and password in the URL",
		mend: func(s *site) {
			s.env["BACKSTORY_SOURCE_URL"] = strings.Replace(s.env["BACKSTORY_SOURCE_URL"], "-no@", "@", 1)
		}},
	{wrong: "a database that does not exist", args: []string{"run"}, exit: 1,
		set:  func(s *site) { s.begin(); s.swap("BACKSTORY_SOURCE_URL", s.server.URL("shop_of_nobody")) },
		says: `database "shop_of_nobody" does not exist`, remedy: "Check the database name in the URL.", mend: back},

	// ---- The source's server, and what the role may do there.
	{wrong: "wal_level = replica: init", args: []string{"init"}, exit: 1, server: own(map[string]string{"wal_level": "replica"}),
		says: "the source has wal_level = replica", remedy: "ALTER SYSTEM SET wal_level = logical; and restart the server",
		then: func(s *site, _ result) {
			r := s.run("doctor")
			if r.code != 3 || !strings.Contains(r.out, "danger   the source has wal_level = replica") || !strings.Contains(r.out, "mend: ALTER SYSTEM SET wal_level = logical") {
				s.t.Errorf("doctor: exit code %d\n%s", r.code, r.out)
			}
		},
		mend: func(s *site) { s.reconfigure("wal_level", "logical"); s.begin() }},
	{wrong: "wal_level = replica: run", args: []string{"run"}, exit: 1, server: own(nil),
		set: func(s *site) {
			s.begin()
			s.sql("SELECT pg_drop_replication_slot('%s')", s.slot()) // the server would not start with it
			s.reconfigure("wal_level", "replica")
		},
		says: "the source has wal_level = replica", remedy: "ALTER SYSTEM SET wal_level = logical",
		mend: func(s *site) { s.reconfigure("wal_level", "logical"); acceptedGap(s) }},
	{wrong: "no WAL senders", args: []string{"init"}, exit: 1, server: own(map[string]string{"max_wal_senders": "0"}),
		says: "number of requested standby connections exceeds", remedy: "Raise max_wal_senders on the source (restart needed)",
		mend: func(s *site) { s.reconfigure("max_wal_senders", "10"); s.begin() }},
	{wrong: "no replication slots left", args: []string{"init"}, exit: 1, server: own(map[string]string{"max_replication_slots": "1"}),
		set:  func(s *site) { s.sql(`SELECT pg_create_physical_replication_slot('other')`) },
		says: "create the replication slot: all slots of the server are in use", remedy: "Raise max_replication_slots (restart needed), or drop a slot that nobody uses",
		mend: func(s *site) { s.sql(`SELECT pg_drop_replication_slot('other')`); s.begin() }},
	{wrong: "a role without REPLICATION: init", args: []string{"init"}, exit: 1, set: func(s *site) { s.asRole("") },
		says: "connect to the source for replication: role {role} lacks the right REPLICATION", remedy: `As a superuser: ALTER ROLE "{role}" REPLICATION;`, mend: thenBegin},
	{wrong: "a role without REPLICATION: run --once", args: []string{"run", "--once"}, exit: 1, set: func(s *site) { s.logApart(s.server); s.begin(); s.asRole("") },
		says: "connect to the source for replication: role {role} lacks the right REPLICATION", remedy: `As a superuser: ALTER ROLE "{role}" REPLICATION;`,
		mend: func(s *site) { s.sql("ALTER ROLE %s REPLICATION", s.words["role"]) }},
	{wrong: "a role that loses REPLICATION at work", exit: stays,
		set: func(s *site) { s.logApart(s.server); s.begin(); s.asRole("REPLICATION") },
		during: func(s *site, p *process) {
			s.caughtUp(p)
			s.sql("ALTER ROLE %s NOREPLICATION; SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '%s'", s.words["role"], s.slot())
			s.write(2)
		},
		says: "role {role} lacks the right REPLICATION", remedy: `ALTER ROLE "{role}" REPLICATION;`,
		mend: func(s *site) { s.sql("ALTER ROLE %s REPLICATION", s.words["role"]) }},
	{wrong: "a role without rights on the tables", args: []string{"init"}, exit: 1, set: func(s *site) { s.asRole("REPLICATION") },
		says:   "role {role} may not make the schema of the event log in database {db}, nor publish public.orders, which it does not own",
		remedy: "Let a superuser, or a role that is a member of both {role} and the tables' owner, run what backstory init --print-sql prints; then run backstory init again.",
		mend: func(s *site) { // as the remedy says
			s.sql("%s", s.must("init", "--print-sql").out)
			s.begin()
		}},
	{wrong: "a source that is not in UTF8", args: []string{"init"}, exit: 1,
		set:  func(s *site) { s.swap("BACKSTORY_SOURCE_URL", s.server.URL(s.latin1())) },
		says: "the source's encoding is LATIN1", remedy: "backstory captures databases with encoding UTF8.", mend: thenBegin},
	{wrong: "a transaction that init has to wait for", args: []string{"init"}, exit: 0,
		set: func(s *site) {
			other := s.open(s.server.URL(s.db))
			if _, err := other.Exec(context.Background(), "SET application_name = 'nightly'; BEGIN; SELECT pg_current_xact_id()"); err != nil {
				s.t.Fatal(err)
			}
			ended := make(chan struct{})
			time.AfterFunc(2500*time.Millisecond, func() {
				defer close(ended)
				_, _ = other.Exec(context.Background(), "COMMIT")
			})
			s.t.Cleanup(func() { <-ended })
		},
		says: "waiting for: pid", mend: func(s *site) { s.begin() }},
	{wrong: "the source's server is away", exit: stays, server: own(nil),
		set:    func(s *site) { s.logApart(shared(s.t)); s.begin() },
		during: func(s *site, p *process) { s.caughtUp(p); s.write(2); s.kill() },
		says:   "connection refused", remedy: "Check host and port in the URL, that Postgres is running", mend: func(s *site) { s.restart() }},
	{wrong: "the server of both is restarted", exit: stays, server: own(nil),
		set:    func(s *site) { s.begin() },
		during: func(s *site, p *process) { s.caughtUp(p); s.write(2); s.kill() },
		says:   "connect to the event log: 127.0.0.1:", remedy: "Check host and port in the URL, that Postgres is running", mend: func(s *site) { s.restart() }},

	// ---- The slot.
	{wrong: "a slot of another plugin", args: []string{"init"}, exit: 1,
		set:  func(s *site) { s.sql(`SELECT pg_create_logical_replication_slot('%s', 'test_decoding')`, s.slot()) },
		says: `replication slot {slot} belongs to something else (plugin "test_decoding", database "{db}")`, remedy: "Choose another name with BACKSTORY_SLOT.",
		mend: func(s *site) { s.sql(`SELECT pg_drop_replication_slot('%s')`, s.slot()); s.begin() }},
	{wrong: "a physical slot of the same name", args: []string{"init"}, exit: 1,
		set:  func(s *site) { s.sql(`SELECT pg_create_physical_replication_slot('%s')`, s.slot()) },
		says: "replication slot {slot} belongs to something else", remedy: "Choose another name with BACKSTORY_SLOT.",
		mend: func(s *site) { s.sql(`SELECT pg_drop_replication_slot('%s')`, s.slot()); s.begin() }},
	{wrong: "a slot that another log may need", args: []string{"init"}, exit: 1,
		set:  func(s *site) { s.sql(`SELECT pg_create_logical_replication_slot('%s', 'pgoutput')`, s.slot()) },
		says: "replication slot {slot} exists already, but this log has not made it", remedy: "SELECT pg_drop_replication_slot('{slot}');",
		mend: func(s *site) { s.sql(`SELECT pg_drop_replication_slot('%s')`, s.slot()); s.begin() }}, // it is still there
	{wrong: "a slot from which somebody else streams: init", args: []string{"init"}, exit: 1,
		set: func(s *site) {
			s.sql(`SELECT pg_create_logical_replication_slot('%s', 'pgoutput')`, s.slot())
			s.occupy()
		},
		says: "replication slot {slot} is in use (pid", remedy: "Choose another name with BACKSTORY_SLOT.",
		mend: func(s *site) { s.vacate(); s.sql(`SELECT pg_drop_replication_slot('%s')`, s.slot()); s.begin() }},
	{wrong: "a slot from which somebody else streams: run --once", args: []string{"run", "--once"}, exit: 1,
		set:  func(s *site) { s.begin(); s.occupy() },
		says: "replication slot {slot} is in use: pid", remedy: "If that is another backstory for this log, this one takes over when it ends.",
		mend: func(s *site) { s.vacate() }},
	{wrong: "two sidecars on one log", exit: stays,
		set: func(s *site) { s.begin() },
		during: func(s *site, p *process) {
			s.caughtUp(p)
			s.write(2)
			s.second(p) // becomes the one whose status is looked at
		},
		says: "replication slot {slot} is in use: pid", remedy: "this one takes over when it ends",
		then: func(s *site, _ result) {
			if first := s.first; !first.running() || strings.Contains(first.err.String(), "taken over") {
				s.t.Errorf("the first sidecar was disturbed:\n%s", first.err)
			}
			st, _ := s.status()
			if st == nil || st.Source.State != "standby" {
				s.t.Errorf("the second one's status is %+v", st)
			}
		},
		mend: func(s *site) { s.write(2); s.first.stop() }},
	{wrong: "the wrong slot", args: []string{"run"}, exit: 1, set: with("BACKSTORY_SLOT", "another_slot"),
		says: "not another_slot", remedy: "Set BACKSTORY_SLOT to slot_", then: noGap, mend: back},
	{wrong: "the slot is dropped at work", exit: 1,
		set: func(s *site) { s.begin() },
		during: func(s *site, p *process) {
			s.caughtUp(p)
			eventually(s.t, 20*time.Second, "the slot is dropped", func() bool {
				s.sql(`SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '%s' AND active`, s.slot())
				_, err := s.app.Exec(context.Background(), `SELECT pg_drop_replication_slot('`+s.slot()+`')`)
				return err == nil
			})
			s.write(4)
		},
		says: "possible gap in the history: the replication slot {slot} is gone", remedy: "run backstory init --accept-gap", mend: acceptedGap},
	{wrong: "the slot is gone: init", args: []string{"init"}, exit: 1,
		set:  func(s *site) { s.begin(); s.sql("SELECT pg_drop_replication_slot('%s')", s.slot()) },
		says: "possible gap in the history: the replication slot {slot} is gone", remedy: "run backstory init --accept-gap", mend: acceptedGap},
	{wrong: "the slot is advanced", args: []string{"run"}, exit: 1,
		set: func(s *site) {
			s.begin()
			s.sql("SELECT pg_replication_slot_advance('%s', pg_current_wal_lsn())", s.slot())
		},
		says: "possible gap in the history: the replication slot {slot} was moved", remedy: "run backstory init --accept-gap",
		then: func(s *site, _ result) {
			for _, args := range [][]string{{"run", "--once"}, {"init"}} { // a gap stays until a person has accepted it
				if r := s.run(args...); r.code != 1 || !strings.Contains(r.message(), "possible gap in the history") || !strings.Contains(r.remedy(), "--accept-gap") {
					s.t.Errorf("backstory %s: exit code %d\n%s%s", args, r.code, r.out, r.err)
				}
			}
			if _, r := s.status(); !strings.Contains(r.out, "was moved") {
				s.t.Errorf("status:\n%s", r.out)
			}
			r := s.run("status")
			if _, asJSON := s.status(); r.code != exitFound || asJSON.code != exitFound {
				s.t.Errorf("status at a gap: exit codes %d and %d", r.code, asJSON.code)
			}
			st := r.out
			if !strings.Contains(st, "no sidecar runs, stopped at a gap") || strings.Contains(st, "caught up") || strings.Contains(st, "See backstory status") {
				s.t.Errorf("status:\n%s", st)
			}
		},
		mend: acceptedGap},
	{wrong: "the slot is advanced: status", args: []string{"status"}, exit: 3,
		set: func(s *site) {
			s.begin()
			s.sql("SELECT pg_replication_slot_advance('%s', pg_current_wal_lsn())", s.slot())
		},
		says: "the replication slot {slot} was moved by somebody else", mend: acceptedGap},
	{wrong: "the server has removed WAL that the slot needed", args: []string{"run"}, exit: 1,
		server: own(map[string]string{"max_slot_wal_keep_size": "16MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}),
		set: func(s *site) {
			s.begin()
			for range 8 {
				s.sql("CREATE TABLE IF NOT EXISTS other.junk (x text)")
				s.sql("INSERT INTO other.junk VALUES ('x')")
				s.sql("SELECT pg_switch_wal()")
			}
			s.sql("CHECKPOINT")
		},
		says: "possible gap in the history: the server has removed WAL that the replication slot {slot} needed", remedy: "run backstory init --accept-gap", mend: acceptedGap},
	{wrong: "a gap is accepted while the sidecar works", args: []string{"init", "--accept-gap"}, exit: 1,
		set:  func(s *site) { s.begin(); s.caughtUp(s.sidecar()) },
		says: "replication slot {slot} is in use (pid", remedy: "Stop the sidecar first", then: noGap,
		mend: func(s *site) { s.last.stop() }},
	{wrong: "a gap is accepted with a slot of somebody else", args: []string{"init", "--accept-gap"}, exit: 1,
		set: func(s *site) {
			s.begin()
			s.sql(`SELECT pg_create_logical_replication_slot('%s', 'test_decoding')`, s.slot()+"_x")
			s.swap("BACKSTORY_SLOT", s.slot()+"_x")
		},
		says: "belongs to something else", remedy: "Choose another name with BACKSTORY_SLOT.",
		mend: func(s *site) { s.sql(`SELECT pg_drop_replication_slot('%s')`, s.slot()); back(s) }},

	// ---- The publications.
	{wrong: "a publication FOR ALL TABLES of the same name", args: []string{"init"}, exit: 1,
		set:  func(s *site) { s.sql("CREATE PUBLICATION backstory FOR ALL TABLES") },
		says: "publication backstory is FOR ALL TABLES", remedy: "choose another name with BACKSTORY_PUBLICATION",
		mend: func(s *site) { s.env["BACKSTORY_PUBLICATION"] = "history"; s.begin() }},
	{wrong: "the wrong publication", args: []string{"run"}, exit: 1, set: with("BACKSTORY_PUBLICATION", "histroy"),
		says: "public.orders was captured by publication backstory, not histroy", remedy: "Check BACKSTORY_PUBLICATION.", then: noGap, mend: back},
	{wrong: "the publication is dropped", args: []string{"run"}, exit: 1,
		set:  func(s *site) { s.begin(); s.sql("DROP PUBLICATION backstory"); s.write(2) },
		says: "possible gap in the history: publication backstory was dropped", remedy: "run backstory init --accept-gap", mend: acceptedGap},
	{wrong: "the publication is dropped: init", args: []string{"init"}, exit: 1,
		set:  func(s *site) { s.begin(); s.sql("DROP PUBLICATION backstory"); s.write(2) },
		says: "possible gap in the history: publication backstory was dropped", remedy: "run backstory init --accept-gap", mend: acceptedGap},
	{wrong: "the publication is dropped and made again", args: []string{"run"}, exit: 1,
		set: func(s *site) {
			s.begin()
			s.sql("DROP PUBLICATION backstory")
			s.write(2)
			s.sql("CREATE PUBLICATION backstory FOR TABLE public.orders")
		},
		says: "possible gap in the history: publication backstory was dropped and made again", remedy: "run backstory init --accept-gap", mend: acceptedGap},
	{wrong: "the publication is dropped at work", exit: 1,
		set:    func(s *site) { s.begin() },
		during: func(s *site, p *process) { s.caughtUp(p); s.sql("DROP PUBLICATION backstory"); s.write(2) },
		says:   "possible gap in the history: ", remedy: "run backstory init --accept-gap", mend: acceptedGap},
	{wrong: "the publication publishes less", args: []string{"run"}, exit: 1,
		set:  func(s *site) { s.begin(); s.sql("ALTER PUBLICATION backstory SET (publish = 'delete')"); s.write(2) },
		says: "possible gap in the history: publication backstory was altered", remedy: "run backstory init --accept-gap", mend: acceptedGap},

	// ---- The log.
	{wrong: "no log: run", args: []string{"run"}, exit: 1,
		says: "no event log in this database", remedy: "Run backstory init first, or point BACKSTORY_LOG_URL to the database that holds the event log.", mend: thenBegin},
	{wrong: "no log: log", args: []string{"log"}, exit: 1, says: "no event log in this database", remedy: "Run backstory init first", mend: thenBegin},
	{wrong: "a log that init has not finished", args: []string{"run"}, exit: 1,
		set: func(s *site) {
			s.begin()
			s.sql("CREATE TABLE head AS SELECT * FROM backstory.head; DELETE FROM backstory.head")
		},
		says: "the event log has no source yet", remedy: "Run backstory init",
		mend: func(s *site) { s.sql("INSERT INTO backstory.head SELECT * FROM head; DROP TABLE head") }},
	{wrong: "a log made by a newer version", args: []string{"run"}, exit: 1,
		set:  func(s *site) { s.begin(); s.sql("INSERT INTO backstory.migration (number) VALUES (999)") },
		says: "the event log was made by a newer version of backstory", remedy: "Use the newer backstory for this log.",
		then: func(s *site, _ result) {
			for _, args := range [][]string{{"init"}, {"log"}, {"status"}} {
				if r := s.run(args...); r.code != 1 || !strings.Contains(r.message(), "newer version of backstory") {
					s.t.Errorf("backstory %s: exit code %d\n%s%s", args, r.code, r.out, r.err)
				}
			}
		},
		mend: func(s *site) { s.sql("DELETE FROM backstory.migration WHERE number = 999") }},
	{wrong: "a log in LATIN1", args: []string{"init"}, exit: 1,
		set:  func(s *site) { s.swap("BACKSTORY_LOG_URL", s.server.URL(s.latin1())) },
		says: "the log's database has encoding LATIN1", remedy: "CREATE DATABASE backstory ENCODING 'UTF8' TEMPLATE template0", mend: thenBegin},
	{wrong: "the log of another database: init", args: []string{"init"}, exit: 1, set: func(s *site) { s.begin(); s.swap("BACKSTORY_LOG_URL", s.another(shared(s.t)).logURL()) },
		says: "this event log belongs to another source", remedy: "Give each source a log of its own (BACKSTORY_LOG_URL).", mend: back},
	{wrong: "the log of another database: run", args: []string{"run"}, exit: 1,
		set: func(s *site) {
			s.begin()
			other := s.another(shared(s.t))
			s.swap("BACKSTORY_LOG_URL", other.logURL())
			s.swap("BACKSTORY_SLOT", other.slot())
		},
		says: "the log belongs to database", remedy: "Check BACKSTORY_SOURCE_URL", mend: back},
	{wrong: "the log of another server: run", args: []string{"run"}, exit: 1, server: own(nil),
		set: func(s *site) {
			s.begin()
			other := newSite(s.t, shared(s.t))
			other.env["BACKSTORY_SLOT"] = s.slot()
			other.begin()
			s.swap("BACKSTORY_LOG_URL", other.logURL())
		},
		says: "the source is database {db} of system", remedy: "Check BACKSTORY_SOURCE_URL and BACKSTORY_LOG_URL.", then: noGap, mend: back},
	{wrong: "a log that the role may not read", args: []string{"log"}, exit: 1,
		set:  func(s *site) { s.begin(); s.swap("BACKSTORY_LOG_URL", s.url(s.role("", false), s.db)) },
		says: "permission denied for schema backstory", remedy: "GRANT USAGE ON SCHEMA backstory", mend: back},
	{wrong: "a log that the role may not write", args: []string{"run", "--once"}, exit: 1,
		set: func(s *site) {
			s.begin()
			r := s.role("", false)
			s.sql("GRANT USAGE ON SCHEMA backstory TO %s; GRANT SELECT ON ALL TABLES IN SCHEMA backstory TO %s", r, r)
			s.swap("BACKSTORY_LOG_URL", s.url(r, s.db))
		},
		says: "permission denied for table head", remedy: "to write, it has to own that schema", mend: back},
	{wrong: "a read-only log: init", args: []string{"init"}, exit: 1, set: func(s *site) { s.readOnly() },
		says: "the event log is read-only: ", remedy: "turn default_transaction_read_only off for the role", mend: thenBegin},
	{wrong: "a read-only log: run --once", args: []string{"run", "--once"}, exit: 1, set: func(s *site) { s.begin(); s.readOnly() },
		says: "the event log is read-only: default_transaction_read_only is on", remedy: "turn default_transaction_read_only off for the role", mend: back},
	{wrong: "a log that becomes read-only at work", exit: stays,
		set: func(s *site) {
			s.words["role"] = s.role("SUPERUSER", false)
			s.env["BACKSTORY_LOG_URL"] = s.url(s.words["role"], s.db)
			s.begin()
		},
		during: func(s *site, p *process) {
			s.caughtUp(p)
			s.sql("ALTER ROLE %s SET default_transaction_read_only = on", s.words["role"])
			s.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '%s'", s.words["role"])
			s.write(2)
		},
		says: "the event log is read-only: default_transaction_read_only is on", remedy: "Nothing is lost meanwhile",
		mend: func(s *site) { s.sql("ALTER ROLE %s RESET default_transaction_read_only", s.words["role"]) }},
	{wrong: "a log on a full disk", exit: stays,
		set: func(s *site) {
			s.words["logdb"] = s.logApart(s.server)
			s.begin()
		},
		during: func(s *site, p *process) {
			s.caughtUp(p)
			s.fillDisk()
			s.sql(`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "ann"}')`)
			s.write(5000)
			s.sql("COMMIT")
		},
		says: "No space left on device", remedy: "Make room on the disk of the log's server. Nothing is lost meanwhile",
		mend: (*site).makeRoom},
	{wrong: "the log's server is away at the start", exit: stays,
		set: func(s *site) {
			s.logServer = own(nil)(s.t)
			s.logApart(s.logServer)
			s.begin()
			if err := s.logServer.Kill(); err != nil {
				s.t.Fatal(err)
			}
		},
		says: "connect to the event log: 127.0.0.1:", remedy: "Check host and port in the URL, that Postgres is running",
		mend: func(s *site) {
			if err := s.logServer.Restart(context.Background(), pgserver.Immediate); err != nil {
				s.t.Fatal(err)
			}
		}},
	{wrong: "the log's server is away", exit: stays,
		set: func(s *site) {
			s.logServer = own(nil)(s.t)
			s.logApart(s.logServer)
			s.begin()
		},
		during: func(s *site, p *process) {
			s.caughtUp(p)
			if err := s.logServer.Kill(); err != nil {
				s.t.Fatal(err)
			}
			s.write(2)
		},
		says: "connect to the event log: 127.0.0.1:", remedy: "Check host and port in the URL, that Postgres is running",
		mend: func(s *site) {
			if err := s.logServer.Restart(context.Background(), pgserver.Immediate); err != nil {
				s.t.Fatal(err)
			}
		}},
	{wrong: "an event was changed", args: []string{"verify"}, exit: 3,
		set: func(s *site) {
			s.begin()
			s.sql(`SET backstory.maintenance = 'on'; UPDATE backstory.event SET data = '{"id":1,"status":"paid"}' WHERE position = 1`)
		},
		says: "The log was tampered with or is damaged, at or before position 2: what was appended at positions 1 to 2 is not what was sealed.",
		mend: func(s *site) {
			s.sql(`SET backstory.maintenance = 'on'; UPDATE backstory.event SET data = '{"id":1,"status":"open"}' WHERE position = 1; RESET backstory.maintenance`)
		}},
	{wrong: "an event is changed as the owner would", args: []string{"verify"}, exit: 0,
		set: func(s *site) {
			s.begin()
			if _, err := s.app.Exec(context.Background(), "DELETE FROM backstory.event"); err == nil || !strings.Contains(err.Error(), "append-only") {
				s.t.Errorf("DELETE on the log: %v", err)
			}
		},
		says: "The log is whole."},

	// ---- The context.
	{wrong: "contexts that are not JSON objects", args: []string{"run", "--once"}, exit: 0,
		set: func(s *site) {
			s.begin()
			for _, c := range badContexts {
				s.sql(`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', %s)`, c)
				s.write(1)
				s.sql("COMMIT")
			}
		},
		says: "everything received is in the log",
		then: func(s *site, _ result) {
			raw := s.ask(s.logURL(), `SELECT count(*)::text FROM backstory.events WHERE metadata->>'malformed' IS NOT NULL`)
			if raw != fmt.Sprint(len(badContexts)) {
				s.t.Errorf("%s contexts of %d are kept raw", raw, len(badContexts))
			}
			if first := s.ask(s.logURL(), `SELECT metadata->>'malformed' FROM backstory.events WHERE metadata->>'malformed' LIKE 'by%%'`); first != "by hand" {
				s.t.Errorf("a malformed context is kept as %q", first)
			}
			s.must("log", "--json")
		}},
	{wrong: "a context that is no JSON object, at work", exit: stays,
		set: func(s *site) { s.begin() },
		during: func(s *site, p *process) {
			s.sql(`BEGIN; SELECT pg_logical_emit_message(true, 'backstory', 'by hand')`)
			s.write(1)
			s.sql("COMMIT")
			s.until(20*time.Second, "the malformed context is counted", p, func(st *backstory.Status) bool { return st.Log.MalformedContext == 1 && st.CaughtUp })
			s.quiet = true
		}},

	// ---- Reactors. Capture goes on whatever they do.
	{wrong: "no Kafka broker answers", exit: stays,
		set: func(s *site) {
			s.begin()
			s.swap("BACKSTORY_KAFKA_BROKERS", "127.0.0.1:1")
			s.swap("BACKSTORY_KAFKA_TOPIC", "shop")
		},
		during: func(s *site, p *process) { s.write(3) },
		says:   "127.0.0.1:1", remedy: "Check that the brokers run", then: captureGoesOn},
	{wrong: "the Kafka topic does not exist", exit: stays,
		set: func(s *site) {
			s.begin()
			s.kafka(kafkaBroker(s.t).Brokers())
		},
		during: func(s *site, p *process) { s.write(3) },
		says:   "Kafka topic {topic} does not exist", remedy: "Create it: kafka-topics.sh", then: captureGoesOn,
		mend: func(s *site) {
			if err := kafkaBroker(s.t).CreateTopic(context.Background(), s.words["topic"], 1); err != nil {
				s.t.Fatal(err)
			}
			s.sent()
		}},
	{wrong: "the Kafka topic is not authorised", exit: stays,
		set: func(s *site) {
			b := kafkaBroker(s.t)
			s.begin()
			s.kafka(b.SASLBrokers())
			s.env["BACKSTORY_KAFKA_SASL"], s.env["BACKSTORY_KAFKA_USER"], s.env["BACKSTORY_KAFKA_PASSWORD"] = "plain", "app", kafkaPassword
			if err := b.CreateTopic(context.Background(), s.words["topic"], 1); err != nil {
				s.t.Fatal(err)
			}
		},
		during: func(s *site, p *process) { s.write(3) },
		says:   "not authorised for Kafka topic {topic}", remedy: "Grant Describe, Write and Read", then: captureGoesOn,
		mend: func(s *site) {
			if err := kafkaBroker(s.t).Allow(context.Background(), "app", s.words["topic"], kafkago.ACLOperationTypeDescribe, kafkago.ACLOperationTypeRead, kafkago.ACLOperationTypeWrite); err != nil {
				s.t.Fatal(err)
			}
			s.sent()
		}},
	{wrong: "a wrong Kafka password", exit: stays,
		set: func(s *site) {
			b := kafkaBroker(s.t)
			s.begin()
			s.kafka(b.SASLBrokers())
			s.swap("BACKSTORY_KAFKA_SASL", "plain")
			s.swap("BACKSTORY_KAFKA_USER", "app")
			s.swap("BACKSTORY_KAFKA_PASSWORD", "Geheim!-7391")
		},
		during: func(s *site, p *process) { s.write(3) },
		says:   "Kafka refused the user", remedy: "Check user, password and mechanism", then: captureGoesOn,
		mend: func(s *site) { delete(s.env, "BACKSTORY_KAFKA_BROKERS"); delete(s.env, "BACKSTORY_KAFKA_TOPIC") }},
	{wrong: "a file for events that cannot be written", exit: stays,
		set:    with("BACKSTORY_JSONL", "/nowhere/events.jsonl"),
		during: func(s *site, p *process) { s.write(3) },
		says:   "/nowhere/events.jsonl: no such file or directory", remedy: "Create the file's directory.", then: captureGoesOn},
	{wrong: "run --once with a reactor that does not get on", args: []string{"run", "--once"}, exit: 1, set: with("BACKSTORY_JSONL", "/nowhere/events.jsonl"),
		says: "reactor jsonl stands at position 0 of 5: ", then: func(s *site, _ result) {
			if n := s.count(); n != 5 {
				s.t.Errorf("%d of 5 changes are in the log", n)
			}
		}, mend: back},
}

// badContexts are SQL expressions for contexts that are no JSON objects, or none that a database of UTF8 could hold.
var badContexts = []string{
	`'by hand'`, `''`, `'[1, 2]'`, `'null'`, `'"text"'`, `'{"actor": "a"'`, `'{"actor": "a"} {}'`,
	`'{"actor": "\u0000"}'`,
	`'\x7b2261223a22fffe227d'::bytea`, // not UTF-8
	`'\x7b2261223a2200227d'::bytea`,   // a NUL
	`repeat('{"a":', 20000)`,
	`'{"a":' || repeat('[', 9000) || repeat(']', 9000) || '}'`, // deeper than Postgres takes
}

// captureGoesOn checks that a reactor that does not get on holds back nothing.
func captureGoesOn(s *site, _ result) {
	st := s.until(20*time.Second, "everything is captured", s.last, func(st *backstory.Status) bool {
		return st.CaughtUp && int(st.Log.Position) == s.rows && len(st.Reactors) == 1 && int(st.Reactors[0].LagEvents) == s.rows
	})
	if st.Reactors[0].State != sinks.StateRetrying {
		s.t.Errorf("the reactor's status is %+v", st.Reactors)
	}
	if n := s.ask(s.logURL(), `SELECT count(*)::text FROM backstory.checkpoint WHERE error IS NOT NULL`); n != "1" {
		s.t.Error("the log does not hold the reactor's error, for a status without the sidecar")
	}
}

func TestBadInput(t *testing.T) {
	var readers []row
	seen := map[string]bool{}
	for _, r := range badInput {
		if seen[r.wrong] {
			t.Errorf("two rows are called %q", r.wrong)
		}
		seen[r.wrong] = true
		if r.reads {
			readers = append(readers, r)
			continue
		}
		t.Run(r.wrong, func(t *testing.T) {
			t.Parallel()
			server := r.server
			if server == nil {
				server = shared
			}
			s := newSite(t, server(t))
			if r.set != nil {
				r.set(s)
			}
			r.check(s)
			if r.mend != nil {
				r.mend(s)
			}
			if r.exit == stays {
				s.until(40*time.Second, "the sidecar recovers", s.last, func(st *backstory.Status) bool {
					return st.Source.State == "streaming" && st.CaughtUp && st.Source.Error == ""
				})
				if got := s.last.stop(); got.code != 0 {
					t.Errorf("the sidecar ended with exit code %d:\n%s", got.code, got.err)
				}
				back(s)
			}
			s.whole()
		})
	}
	t.Run("a log to read", func(t *testing.T) {
		t.Parallel()
		s := newSite(t, shared(t))
		s.begin()
		for _, r := range readers {
			t.Run(r.wrong, func(t *testing.T) {
				c := *s
				c.t = t
				r.check(&c)
			})
		}
		s.whole()
	})
}

// check runs the command and compares.
func (r row) check(s *site) {
	t := s.t
	t.Helper()
	says, remedy := s.expand(r.says), s.expand(r.remedy)
	var got result
	var args []string
	switch {
	case r.during == nil && r.exit != stays:
		args = r.args
		got = s.run(args...)
	default:
		args = []string{"run"}
		var p *process
		if r.during == nil {
			p = s.sidecarNow()
		} else {
			p = s.sidecar()
			r.during(s, p)
		}
		says, remedy = s.expand(r.says), s.expand(r.remedy)
		if r.exit != stays {
			got = p.wait(60 * time.Second)
			break
		}
		if s.quiet {
			got.code = stays
			break
		}
		st := s.until(40*time.Second, "status shows "+says, s.last, func(st *backstory.Status) bool {
			message, hint := trouble(st, says)
			return strings.Contains(message, says) && strings.Contains(hint, remedy)
		})
		message, hint := trouble(st, says)
		got = s.run("status")
		t.Logf("$ backstory status\n%s%s", got.out, got.err)
		if !strings.Contains(got.out, message) || !strings.Contains(got.out, "→ "+hint) && hint != "" {
			t.Errorf("for people, status does not say %q with %q:\n%s", message, hint, got.out)
		}
		for range 15 { // also in the middle of another try
			st, last := s.status()
			if st == nil {
				continue
			}
			if message, _ := trouble(st, says); message == "" {
				t.Errorf("status shows nothing while it goes on:\n%s", last.out)
			}
		}
		got.code = stays
	}
	if r.exit != stays {
		t.Logf("$ backstory %s   (exit code %d)\n%.4000s%s", strings.Join(args, " "), got.code, got.out, got.err)
	}
	if got.code != r.exit {
		t.Fatalf("exit code %d, want %d", got.code, r.exit)
	}
	switch r.exit {
	case stays:
	case exitDone, exitFound:
		if !strings.Contains(got.out+got.err, says) {
			t.Errorf("it does not say %q", says)
		}
	default:
		if !strings.Contains(got.message(), says) {
			t.Errorf("message %q\n        want %q", got.message(), says)
		}
		if remedy != "" && !strings.Contains(got.remedy(), remedy) {
			t.Errorf("remedy %q\n       want %q", got.remedy(), remedy)
		}
	}
	if r.then != nil {
		r.then(s, got)
	}
}

// trouble is an error that a status shows, and its remedy: the one that says so, if there is one.
func trouble(st *backstory.Status, says string) (message, hint string) {
	type shown struct{ message, hint string }
	all := []shown{{st.Source.Error, st.Source.Hint}, {st.Log.Error, st.Log.Hint}}
	for _, r := range st.Reactors {
		all = append(all, shown{r.Error, r.Hint})
	}
	for _, e := range all {
		if message == "" || strings.Contains(e.message, says) && !strings.Contains(message, says) {
			message, hint = e.message, e.hint
		}
	}
	return message, hint
}

// A table that init leaves out, or takes in, while the sidecar works, is no gap.
func TestInitBesideTheSidecar(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.sql("CREATE TABLE public.notes (id int PRIMARY KEY)")
	s.begin()
	p := s.sidecar()
	s.caughtUp(p)
	s.env["BACKSTORY_EXCLUDE"] = "public.notes"
	s.must("init")
	time.Sleep(4 * time.Second) // in which the sidecar looks at the publications
	s.write(2)
	s.caughtUp(p)
	delete(s.env, "BACKSTORY_EXCLUDE")
	s.must("init")
	time.Sleep(4 * time.Second)
	s.write(2)
	// One that is made later is taken in by the sidecar, whose role may.
	s.sql("CREATE TABLE public.later (id int PRIMARY KEY)")
	eventually(t, 20*time.Second, "the sidecar takes the new table in", func() bool {
		return strings.Contains(p.err.String(), "public.later is captured from now on")
	})
	s.must("init")
	s.until(20*time.Second, "nothing is left out", p, func(st *backstory.Status) bool { return st.CaughtUp && len(st.Source.NotCaptured) == 0 })
	s.sql("INSERT INTO public.notes VALUES (1)")
	s.until(20*time.Second, "the new table is captured", p, func(st *backstory.Status) bool { return st.CaughtUp && int(st.Log.Position) == s.rows+1 })
	if r := p.stop(); r.code != 0 || strings.Contains(r.err, "gap") {
		t.Errorf("exit code %d:\n%s", r.code, r.err)
	}
	noGap(s, result{})
	s.whole()
}

// A slot that is left over from an init that was killed is made anew by the next.
func TestInitAgainAfterACrash(t *testing.T) {
	t.Parallel()
	s := newSite(t, shared(t))
	s.begin()
	s.sql("DELETE FROM backstory.head; DELETE FROM backstory.captured; SET backstory.maintenance = 'on'; TRUNCATE backstory.event; "+
		"DELETE FROM backstory.kind; DELETE FROM backstory.aggregate; DELETE FROM backstory.relation; DELETE FROM backstory.source; RESET backstory.maintenance; "+
		"COMMENT ON SCHEMA backstory IS 'backstory init is making replication slot %s'", s.slot())
	r := s.must("init")
	if !strings.Contains(r.out, "made replication slot "+s.slot()) {
		t.Errorf("init:\n%s", r.out)
	}
	s.whole() // the rows of before are taken over
}

// occupy streams from the slot as another program would.
func (s *site) occupy() {
	s.t.Helper()
	ctx := context.Background()
	conn, err := pgconn.Connect(ctx, s.server.URL(s.db)+"&replication=database")
	if err != nil {
		s.t.Fatal(err)
	}
	s.other = conn
	s.t.Cleanup(func() { _ = conn.Close(ctx) })
	err = pglogrepl.StartReplication(ctx, conn, s.slot(), 0, pglogrepl.StartReplicationOptions{PluginArgs: []string{"proto_version '1'", "publication_names 'backstory'"}})
	if err != nil {
		s.t.Fatal(err)
	}
}

// vacate ends what occupy began.
func (s *site) vacate() {
	s.t.Helper()
	_ = s.other.Conn().Close()
	eventually(s.t, 20*time.Second, "the slot is free", func() bool {
		return s.ask(s.server.URL(s.db), `SELECT active::text FROM pg_replication_slots WHERE slot_name = '%s'`, s.slot()) == "false"
	})
}

// second starts another sidecar, which is from now on the one that is looked at.
func (s *site) second(first *process) {
	s.first = first
	s.sidecarNow()
}

// latin1 makes a database in LATIN1.
func (s *site) latin1() string {
	db := s.unique("latin")
	s.sql("CREATE DATABASE %s ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0", db)
	s.t.Cleanup(func() { s.at(s.server.URL("postgres"), "DROP DATABASE %s", db) })
	s.words["latin1"] = db
	return db
}

// another is a site with a log of its own.
func (s *site) another(server *pgservertest.Server) *site {
	other := newSite(s.t, server)
	other.begin()
	return other
}

// readOnly makes the log read-only for the role that is used for it.
func (s *site) readOnly() {
	r := s.role("SUPERUSER", false)
	s.sql("ALTER ROLE %s SET default_transaction_read_only = on", r)
	s.swap("BACKSTORY_LOG_URL", s.url(r, s.db))
}

// reconfigure changes a setting that needs a restart.
func (s *site) reconfigure(name, value string) {
	s.t.Helper()
	if err := s.server.SetConfig(map[string]string{name: value}); err != nil {
		s.t.Fatal(err)
	}
	_ = s.app.Close(context.Background())
	if err := s.server.Restart(context.Background(), pgserver.Fast); err != nil {
		s.t.Fatal(err)
	}
}

// fillDisk takes the room from the log's disk, as any user can: the file of a table that is still empty becomes one to which
// nothing can be written since there is no space left on the device.
func (s *site) fillDisk() {
	s.t.Helper()
	if _, err := os.Stat("/dev/full"); err != nil {
		cannot(s.t, "it needs /dev/full, which Linux has")
	}
	if size := s.ask(s.logURL(), "SELECT pg_relation_size('backstory.context')::text"); size != "0" {
		s.t.Fatalf("backstory.context has %s bytes already", size)
	}
	file := filepath.Join(s.server.DataDir(), s.ask(s.logURL(), "SELECT pg_relation_filepath('backstory.context')"))
	s.words["file"] = file
	if err := errors.Join(os.Rename(file, file+".empty"), os.Symlink("/dev/full", file)); err != nil {
		s.t.Fatal(err)
	}
	s.closeFiles()
}

// makeRoom undoes fillDisk.
func (s *site) makeRoom() {
	s.t.Helper()
	if err := os.Rename(s.words["file"]+".empty", s.words["file"]); err != nil {
		s.t.Fatal(err)
	}
	s.closeFiles()
}

// closeFiles ends all sessions with the log's database, which have its files open.
func (s *site) closeFiles() {
	s.at(s.server.URL("postgres"), "SELECT pg_terminate_backend(pid, 20000) FROM pg_stat_activity WHERE datname = '%s'", s.words["logdb"])
}

// cannot ends a test that cannot be run here. In CI that is a failure: nobody sees a test that is skipped.
func cannot(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal("this test cannot be run here: " + why)
	}
	t.Skip("cannot be run here: " + why)
}

func (s *site) kill() {
	s.t.Helper()
	_ = s.app.Close(context.Background())
	if err := s.server.Kill(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) restart() {
	s.t.Helper()
	if err := s.server.Restart(context.Background(), pgserver.Immediate); err != nil {
		s.t.Fatal(err)
	}
}

// kafka gives the sidecar a topic of its own.
func (s *site) kafka(brokers []string) {
	s.words["topic"] = strings.ReplaceAll(s.unique("topic"), "_", "-")
	s.env["BACKSTORY_KAFKA_BROKERS"], s.env["BACKSTORY_KAFKA_TOPIC"] = strings.Join(brokers, ","), s.words["topic"]
}

// sent waits until Kafka has everything, and takes the sink away.
func (s *site) sent() {
	s.t.Helper()
	s.until(60*time.Second, "Kafka has everything", s.last, func(st *backstory.Status) bool {
		return len(st.Reactors) == 1 && st.Reactors[0].State == sinks.StateRunning && int(st.Reactors[0].Position) == s.rows && st.Reactors[0].Error == ""
	})
	conn, err := kafkago.DialLeader(context.Background(), "tcp", kafkaBroker(s.t).Brokers()[0], s.words["topic"], 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	first, last, err := conn.ReadOffsets()
	if err := errors.Join(err, conn.Close()); err != nil || int(last-first) != s.rows {
		s.t.Errorf("Kafka has %d messages of %d (%v)", last-first, s.rows, err)
	}
	for k := range s.env {
		if strings.HasPrefix(k, "BACKSTORY_KAFKA_") {
			delete(s.env, k)
		}
	}
}

// expand puts the site's names in the place of words in braces.
func (s *site) expand(text string) string {
	text = strings.NewReplacer("{slot}", s.slot(), "{db}", s.db).Replace(text)
	for k, v := range s.words {
		text = strings.ReplaceAll(text, "{"+k+"}", v)
	}
	return text
}
