package capture

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// Severity of a finding.
type Severity string

// The severities: Danger would lose data or harm the application.
const (
	Danger  Severity = "danger"
	Warning Severity = "warning"
	Info    Severity = "info"
)

// Finding is something about the source or the log that its owner should know.
type Finding struct {
	// Check names what was looked for. It is for scripts and does not change; README, What doctor looks for, has all of them.
	Check    string   `json:"check"`
	Severity Severity `json:"severity"`
	What     string   `json:"what"`
	Risk     string   `json:"risk"` // what would happen
	// SQL mends it, as it stands; Remedy is what is to be done after that, or where SQL does not help, instead.
	SQL    string `json:"sql,omitempty"`
	Remedy string `json:"remedy,omitempty"`
	Cost   string `json:"cost,omitempty"` // of the mending
}

// Mend is SQL and Remedy in one.
func (f Finding) Mend() string { return strings.TrimSpace(f.SQL + " " + f.Remedy) }

// Statements are those of SQL, one by one: some, such as ALTER SYSTEM, cannot be sent together with others.
func (f Finding) Statements() (list []string) {
	var quote rune
	begin := 0
	for i, c := range f.SQL {
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '\'' || c == '"':
			quote = c
		case c == ';':
			list = append(list, strings.TrimSpace(f.SQL[begin:i+1]))
			begin = i + 1
		}
	}
	if rest := strings.TrimSpace(f.SQL[begin:]); rest != "" {
		list = append(list, rest)
	}
	return list
}

// NotLookedAt is found where something could not be looked at.
func NotLookedAt(what string, err error) Finding {
	f := Finding{Check: "not-looked-at", Severity: Warning, What: what + " could not be looked at: " + err.Error(), Risk: "what is wrong there is not found", Remedy: eventlog.Hint(err)}
	if f.Remedy == "" {
		switch eventlog.SQLState(err) {
		case "55P03": // lock_not_available
			f.Remedy = "backstory doctor again, when nobody alters a table"
		case "42501": // insufficient_privilege
			f.Remedy = "as a role that may"
		default:
			f.Remedy = "backstory doctor again, when the server has less to do"
		}
	}
	return f
}

const (
	// examineLimit bounds all of an examination, examineStatement each question and examineLock what it may wait for somebody's
	// ALTER TABLE.
	examineLimit     = 60 * time.Second
	examineStatement = "10s"
	examineLock      = "1s"
)

// examination is one look at a source.
type examination struct {
	Config
	conn   *pgx.Conn
	at     *pgx.Conn // to the server that has the slot, mostly the same; nil: that cannot be reached
	sv     *Server
	slot   *Slot
	tables []*Table // that are selected
	begun  bool     // init has made the publications
	found  []Finding
}

func (x *examination) add(f Finding) { x.found = append(x.found, f) }

// parts are what is looked at. Where one of them fails, the others have their say.
var parts = []struct {
	what string
	look func(*examination, context.Context) error
}{
	{"whether replication is possible", (*examination).replication},
	{"the connection", (*examination).connection},
	{"the source's connections", (*examination).connections},
	{"the replication slots", (*examination).slots},
	{"the standbys", (*examination).otherHosts},
	{"the source's open transactions", (*examination).transactions},
	{"the source's tables", (*examination).selectedTables},
	{"what the role may read", (*examination).reading},
	{"tables that leave nothing in the WAL", (*examination).outside},
	{"the publications", (*examination).publication},
	{"the keys of the published tables", (*examination).published},
	{"what the role may alter", (*examination).altering},
	{"the event triggers", (*examination).eventTriggers},
}

// Examine looks for everything about the source that would lose data, harm the application or surprise its owner. It changes
// nothing, waits for no lock, and takes a minute at most; what cannot be looked at is a finding, too.
func Examine(ctx context.Context, c Config) ([]Finding, error) {
	c = c.WithDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeout(ctx, examineLimit)
	defer cancel()
	conn, err := c.Connect(bounded)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(bounded, "SET statement_timeout = '"+examineStatement+"'; SET lock_timeout = '"+examineLock+"'"); err != nil {
		return nil, fmt.Errorf("prepare to look at the source: %w", err)
	}
	x := &examination{Config: c, conn: conn}
	if x.sv, err = settings(bounded, conn); err != nil {
		return nil, err
	}
	examineServer(x.sv, x.add)
	done := x.slotServers(bounded)
	defer done()
	for _, p := range parts {
		err := p.look(x, bounded)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			x.add(NotLookedAt(p.what, err))
		}
		if conn.IsClosed() {
			x.add(NotLookedAt("what comes after "+p.what, errors.New("the connection has ended")))
			break
		}
	}
	return x.found, nil
}

// lossy are the minor releases before which adding a table to a publication could lose rows for good (release notes of
// 14.18, 15.13, 16.9 and 17.5).
var lossy = map[int]int{14: 18, 15: 13, 16: 9, 17: 5}

func (s *Server) lossy() bool { return s.Version%10000 < lossy[s.Version/10000] }

// set gives the SQL that changes a setting in the place that its present value comes from, or tells where that is.
func (s *Server) set(name, value string) (sql, remedy string) {
	to := name + " = '" + value + "';"
	role, database := eventlog.QuoteIdent(s.Role), eventlog.QuoteIdent(s.Database)
	switch s.sources[name] {
	case "user":
		return "ALTER ROLE " + role + " SET " + to, ""
	case "database":
		return "ALTER DATABASE " + database + " SET " + to, ""
	case "database user":
		return "ALTER ROLE " + role + " IN DATABASE " + database + " SET " + to, ""
	case "client":
		return "", "take " + name + " out of BACKSTORY_SOURCE_URL"
	case "command line", "environment variable":
		return "", "the server is started with " + name + " on its command line: change it there to " + value
	}
	return "ALTER SYSTEM SET " + to + " SELECT pg_reload_conf();", ""
}

// examineServer judges version and settings.
func examineServer(sv *Server, add func(Finding)) {
	setting := func(f Finding, name, value string) {
		f.SQL, f.Remedy = sv.set(name, value)
		add(f)
	}
	if err := checkServer(sv); err != nil {
		f := Finding{Check: "server", Severity: Danger, What: err.Error(), Risk: "nothing can be captured", Remedy: eventlog.Hint(err)}
		if sv.Version >= 140000 && sv.Settings["wal_level"] != "logical" {
			f.Check, f.Cost = "wal-level", "a restart of the server, and a little more WAL"
			if sql, remedy := sv.set("wal_level", "logical"); sql != "" {
				f.SQL, f.Remedy = "ALTER SYSTEM SET wal_level = logical;", "then restart the server (on managed services: the parameter for logical replication)"
			} else {
				f.Remedy = remedy
			}
		}
		add(f)
	}
	if sv.lossy() {
		add(Finding{Check: "minor-version", Severity: Warning, What: fmt.Sprintf("PostgreSQL %d.%d can lose rows of a table that is added to a publication", sv.Version/10000, sv.Version%10000),
			Risk: "rows written by transactions that are open at that moment never reach the log", Remedy: fmt.Sprintf("update the server to %d.%d or later", sv.Version/10000, lossy[sv.Version/10000]), Cost: "a restart of the server"})
	}
	if sv.Settings["fsync"] == "off" {
		setting(Finding{Check: "fsync", Severity: Danger, What: "fsync is off",
			Risk: "after a crash the source may have lost transactions that the log holds, and use their places in the WAL for others: no tool could tell them apart", Cost: "slower commits"}, "fsync", "on")
	}
}

// slotServers finds the server that has the slot, and judges how it keeps what the slot needs. done has to be called when all is over.
func (x *examination) slotServers(ctx context.Context) (done func()) {
	wrong := func(err error) func() {
		x.add(Finding{Check: "decoding-standby", Severity: Danger, What: err.Error(), Risk: "nothing can be captured", Remedy: cmp.Or(eventlog.Hint(err), "see to that server")})
		return func() {}
	}
	if err := x.primary(x.sv); err != nil {
		wrong(err)
	}
	at, done, err := x.connectSlot(ctx, x.conn)
	if err != nil {
		return wrong(err)
	}
	if x.at = at; x.StandbyURL == "" {
		examineKeeping(x.sv, x.add)
	} else if err := x.addStandby(ctx, x.sv, x.conn, at); err != nil {
		wrong(err)
	} else {
		examineStandby(x.sv, x.add)
	}
	return done
}

// examineKeeping judges how the server of the slot keeps what the slot needs, and how it sends.
func examineKeeping(sv *Server, add func(Finding)) {
	setting := func(f Finding, name, value string) {
		f.SQL, f.Remedy = sv.set(name, value)
		if sv.InRecovery && f.SQL != "" {
			f.What, f.SQL, f.Remedy = f.What+" on the standby that decodes", "", "on it: "+f.SQL
		}
		add(f)
	}
	const enough = "50GB"
	switch limit := bytesOf(sv.Settings["max_slot_wal_keep_size"]); {
	case sv.Settings["max_slot_wal_keep_size"] == "-1":
		setting(Finding{Check: "wal-limit", Severity: Danger, What: "max_slot_wal_keep_size is not set",
			Risk: "while the sidecar does not run, the source keeps all WAL and its disk can fill", Cost: "beyond the limit, which the disk has to have room for, the slot is lost, and the log says so"}, "max_slot_wal_keep_size", enough)
	case limit < bytesOf(sv.Settings["max_wal_size"]):
		setting(Finding{Check: "wal-limit", Severity: Warning, What: fmt.Sprintf("max_slot_wal_keep_size is %s, less than max_wal_size (%s)", sv.Settings["max_slot_wal_keep_size"], sv.Settings["max_wal_size"]),
			Risk: "a sidecar that is restarted while much is written can lose its slot: a gap", Cost: "so much of the source's disk, while the sidecar does not run"}, "max_slot_wal_keep_size", enough)
	}
	if idle := sv.Settings["idle_replication_slot_timeout"]; idle != "" && idle != "0" { // 18
		setting(Finding{Check: "idle-slot-timeout", Severity: Warning, What: "idle_replication_slot_timeout is " + idle,
			Risk: "when the sidecar has not run for so long, its slot is lost: a gap", Cost: "other slots that nobody uses stay; max_slot_wal_keep_size limits what they keep"}, "idle_replication_slot_timeout", "0")
	}
	switch timeout := sv.Settings["wal_sender_timeout"]; {
	case timeout == "0":
		setting(Finding{Check: "wal-sender-timeout", Severity: Warning, What: "wal_sender_timeout is 0",
			Risk: "when the sidecar's machine or the network fails, the source takes the connection for alive, and lets no other sidecar have the slot, for hours", Cost: "none: the sidecar answers in time"}, "wal_sender_timeout", "60s")
	case timeout != "" && sv.SenderTimeout < 5*time.Second:
		setting(Finding{Check: "wal-sender-timeout", Severity: Warning, What: "wal_sender_timeout is " + timeout,
			Risk: "a pause of the network that is longer ends the stream, which then begins again", Cost: "a connection that has died is noticed later"}, "wal_sender_timeout", "60s")
	}
}

// bytesOf reads a size as Postgres prints it in a setting; 0 where there is none.
func bytesOf(size string) int64 {
	digits := strings.TrimRight(size, "kMGTB")
	n, _ := strconv.ParseInt(digits, 10, 64)
	return n << map[string]int{"kB": 10, "MB": 20, "GB": 30, "TB": 40}[size[len(digits):]]
}

// replication tries to get a connection on which replication commands are understood.
func (x *examination) replication(ctx context.Context) error {
	repl, err := x.connectReplication(ctx, nil)
	if err == nil {
		return repl.Close(ctx)
	}
	if eventlog.Hint(err) == "" {
		return err
	}
	f := Finding{Check: "replication", Severity: Danger, What: err.Error(), Risk: "nothing can be captured", Remedy: eventlog.Hint(err)}
	if eventlog.SQLState(err) == "42501" || strings.Contains(err.Error(), "REPLICATION") {
		f.SQL, f.Remedy, f.Cost = "ALTER ROLE "+eventlog.QuoteIdent(x.sv.Role)+" REPLICATION;", "as a superuser (on managed services, grant the provider's replication role)", "the role may read every change of the database"
	}
	x.add(f)
	return nil
}

// connection judges what lies between here and the source.
func (x *examination) connection(ctx context.Context) error {
	if f, err := Pooled(ctx, x.conn, "the source"); err != nil {
		return err
	} else if f != nil {
		x.add(*f)
	}
	if f := plainText(x.conn.PgConn().Conn(), "the source"); f != nil {
		x.add(*f)
	}
	return nil
}

// Pooled finds a pooler between here and a server: the process that answers is not the one that was announced (PostgreSQL manual,
// Message Formats, BackendKeyData).
func Pooled(ctx context.Context, conn *pgx.Conn, to string) (*Finding, error) {
	var pid uint32
	if err := conn.QueryRow(ctx, `SELECT pg_backend_pid()::bigint`).Scan(&pid); err != nil {
		return nil, fmt.Errorf("ask for the session's process: %w", err)
	}
	if pid == conn.PgConn().PID() {
		return nil, nil
	}
	return &Finding{Check: "pooler", Severity: Danger, What: "a connection pooler lies between here and " + to,
		Risk: "sessions may lose their settings and locks, and replication is not possible, or ends at any time", Remedy: "give the URL of the Postgres server itself, for source and log"}, nil
}

// plainText finds a connection that others may listen to.
func plainText(conn net.Conn, to string) *Finding {
	if _, ok := conn.(*tls.Conn); ok {
		return nil
	}
	addr, ok := conn.RemoteAddr().(*net.TCPAddr)
	if !ok || addr.IP.IsLoopback() {
		return nil
	}
	f := &Finding{Check: "tls", Severity: Info, What: fmt.Sprintf("the connection to %s (%s) is not encrypted", to, addr.IP),
		Risk: "whoever can listen in between reads every row", Remedy: "sslmode=verify-full&sslrootcert=… in the URL; without TLS on the server, turn it on there (ssl = on)", Cost: "a little CPU on both sides"}
	if !addr.IP.IsPrivate() && !addr.IP.IsLinkLocalUnicast() {
		f.Severity = Warning
	}
	return f
}

// sidecarConnections is about how many connections a sidecar has to source and log, where both are one server.
const sidecarConnections = 12

// connections counts those that are left.
func (x *examination) connections(ctx context.Context) error {
	var left, limit int64
	err := x.conn.QueryRow(ctx, `SELECT current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint - coalesce(current_setting('reserved_connections', true)::bigint, 0)
			- (SELECT sum(numbackends) FROM pg_stat_database)::bigint + (SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'backstory%'), -- others' sessions are hidden from most roles, their number is not
		(SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user)`).Scan(&left, &limit)
	if err != nil {
		return fmt.Errorf("count the connections: %w", err)
	}
	if left < sidecarConnections {
		most, _ := strconv.ParseInt(x.sv.Settings["max_connections"], 10, 64)
		f := Finding{Check: "connections", Severity: Warning, What: fmt.Sprintf("of %d connections only %d are left for the sidecar", most, max(left, 0)),
			Risk: fmt.Sprintf("with the log on the same server it takes up to %d: either it or the application is refused one", sidecarConnections), Cost: "a restart of the server, and a little memory"}
		if f.SQL, f.Remedy = x.sv.set("max_connections", fmt.Sprint(most+2*sidecarConnections)); f.SQL != "" {
			f.Remedy = "then restart the server"
		}
		x.add(f)
	}
	if limit >= 0 && limit < sidecarConnections {
		x.add(Finding{Check: "connections", Severity: Warning, What: fmt.Sprintf("role %s may have only %d connections", x.sv.Role, limit),
			Risk: fmt.Sprintf("the sidecar takes up to %d, and waits where it is refused one", sidecarConnections), SQL: "ALTER ROLE " + eventlog.QuoteIdent(x.sv.Role) + " CONNECTION LIMIT -1;", Cost: "none"})
	}
	return nil
}
