package eventlog

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// ConnConfig parses a URL and sets what every connection to a log or a source needs (SessionSettings).
func ConnConfig(url, application string) (*pgx.ConnConfig, error) {
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, cleanURLError(err)
	}
	if strings.Index(cfg.Host, "@") > 0 { // what stands before it belongs to the password
		return nil, badURL("the password has an @ as it is")
	}
	prepare(&cfg.Config, application)
	return cfg, nil
}

// Address tells where a URL leads, without role and password: db.example:5432/shop, or /var/run/postgresql:5432/shop for a Unix
// socket; several hosts are joined by commas. It is "" for a URL that cannot be parsed.
func Address(url string) string {
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return ""
	}
	at := func(host string, port uint16) string {
		if strings.HasPrefix(host, "/") {
			return fmt.Sprintf("%s:%d", host, port)
		}
		return net.JoinHostPort(host, fmt.Sprint(port))
	}
	hosts := []string{at(cfg.Host, cfg.Port)}
	for _, f := range cfg.Fallbacks {
		if a := at(f.Host, f.Port); !slices.Contains(hosts, a) { // twice: with TLS and without
			hosts = append(hosts, a)
		}
	}
	return strings.Join(hosts, ",") + "/" + cfg.Database
}

// deadAfter is for how long nothing of what is sent may be received, or nobody answer for an idle connection, until it counts as dead.
const deadAfter = 45 * time.Second

func prepare(cfg *pgconn.Config, application string) {
	for k, v := range SessionSettings {
		// A URL, or PGTZ, may have named it in other letters; sent twice, chance would decide.
		maps.DeleteFunc(cfg.RuntimeParams, func(have, _ string) bool { return strings.EqualFold(have, k) })
		cfg.RuntimeParams[k] = v
	}
	if cfg.RuntimeParams["application_name"] == "" {
		cfg.RuntimeParams["application_name"] = application
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 15 * time.Second
	}
	// A firewall that forgets a connection tells neither end.
	d := &net.Dialer{Timeout: cfg.ConnectTimeout, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: deadAfter / 3, Interval: deadAfter / 3, Count: 2}, Control: limitUnanswered}
	cfg.DialFunc = d.DialContext
	// A limit for transactions would end a stream in the middle of one that takes long to decode. Servers before 17 do not know the setting, and
	// refuse a connection that names it.
	cfg.AfterConnect = func(ctx context.Context, conn *pgconn.PgConn) error {
		major, _, _ := strings.Cut(conn.ParameterStatus("server_version"), ".")
		if n, err := strconv.Atoi(major); err != nil || n < 17 {
			return nil
		}
		return conn.Exec(ctx, "SET transaction_timeout = 0").Close()
	}
}

var quotation = regexp.MustCompile("\"[^\"]*\"|`[^`]*`")

// cleanURLError says why a URL cannot be parsed, without any piece of it: what looks like a port or a host may be a part of
// the password.
func cleanURLError(err error) error {
	msg := err.Error()
	if i := strings.LastIndex(msg, "`: "); i >= 0 {
		msg = msg[i+3:]
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		msg = ue.Err.Error()
	}
	for _, noise := range []string{"failed to parse as URL ", "failed to parse as keyword/value "} {
		if inner, ok := strings.CutPrefix(msg, noise); ok {
			msg = strings.Trim(inner, "()")
		}
	}
	msg = strings.Join(strings.Fields(quotation.ReplaceAllString(msg, "")), " ")
	var pe *pgconn.ParseConfigError
	if !errors.As(err, &pe) || slices.ContainsFunc(secrets(pe.ConnString), func(s string) bool { return strings.Contains(msg, s) }) {
		msg = "it is not a database URL"
	}
	return badURL(msg)
}

func badURL(why string) error {
	return &Problem{fmt.Errorf("%w: %s", ErrBadURL, why),
		"Use the form postgres://user:password@host:5432/database, or host=/var/run/postgresql dbname=… for a Unix socket. " +
			"In a URL, special characters of the password are written as % and two hexadecimal digits: @ is %40."}
}

// secrets gives the pieces of a connection string that may be a password.
func secrets(conn string) (out []string) {
	add := func(s string) {
		if s = strings.Trim(s, "'"); s != "" {
			out = append(out, s)
		}
	}
	if _, rest, ok := strings.Cut(conn, "://"); ok {
		if i := strings.LastIndexByte(rest, '@'); i >= 0 {
			if _, pass, ok := strings.Cut(rest[:i], ":"); ok {
				for _, p := range append(strings.FieldsFunc(pass, func(r rune) bool { return strings.ContainsRune(" :/?#@%", r) }), pass) {
					add(p)
				}
			}
		}
	}
	if _, rest, ok := strings.Cut(conn, "password"); ok {
		rest = strings.TrimLeft(rest, " =")
		add(rest)
		word, _, _ := strings.Cut(rest, " ")
		add(word)
	}
	return out
}

// Pieces of what pgconn and the resolver say that tell a person nothing.
var (
	dialNoise    = regexp.MustCompile(`(hostname resolving|dial|server) error: |failed SASL auth: |dial (tcp|unix) [^ ]*: |connect: `)
	resolver     = regexp.MustCompile(`(lookup [^ ]+) on [^ ]+: `)
	addressTwice = regexp.MustCompile(`^([^ ]+) \(([^)]*)\): `)
)

// ConnError says why there is no connection: where it was tried, as whom, and what to do about it. It never has the password.
func ConnError(err error) error {
	var pe *pgconn.ConnectError
	if !errors.As(err, &pe) {
		return err
	}
	var tried []string
	for line := range strings.Lines(pe.Unwrap().Error()) {
		line = resolver.ReplaceAllString(dialNoise.ReplaceAllString(strings.TrimSpace(line), ""), "$1: ")
		if m := addressTwice.FindStringSubmatch(line); m != nil {
			host, _, _ := net.SplitHostPort(m[1])
			if line = line[len(m[0]):]; host == m[2] || strings.HasPrefix(m[1], "/") {
				line = m[1] + ": " + line
			} else {
				line = m[2] + " (" + m[1] + "): " + line
			}
		}
		if line != "" && !slices.Contains(tried, line) { // once with TLS, once without
			tried = append(tried, line)
		}
	}
	if plain := slices.DeleteFunc(slices.Clone(tried), func(s string) bool { return strings.HasSuffix(s, "server refused TLS connection") }); len(plain) > 0 {
		tried = plain // it was tried without TLS, too
	}
	hint := "Check host and port in the URL, that Postgres is running, and that it can be reached from here."
	if len(tried) == 1 && strings.HasSuffix(tried[0], "server refused TLS connection") {
		hint = "The server has no TLS: turn it on there (ssl = on), or say sslmode=disable in the URL."
	}
	switch code(err) {
	case "28P01", "28000":
		hint = "Check user and password in the URL, and pg_hba.conf on the server."
	case "3D000":
		hint = "Check the database name in the URL."
	case "53300":
		hint = "The server has no connections left: raise max_connections, or close some."
	case "08P01": // protocol_violation: PgBouncer's "unsupported startup parameter"
		hint = "That is not Postgres itself, but most likely PgBouncer or another connection pooler: sessions need settings, and capture needs replication, that it does not pass on. Give the URL of the Postgres server."
	case "57P03":
		hint = "The server is starting up or shutting down; try again in a moment."
	}
	return &Problem{&connError{fmt.Sprintf("%s (user %s, database %s)", strings.Join(tried, "; "), pe.Config.User, pe.Config.Database), err}, hint}
}

// connError tells in other words what pgconn told.
type connError struct {
	text  string
	cause error
}

func (e *connError) Error() string { return e.text }
func (e *connError) Unwrap() error { return e.cause }

// firstLine puts a text of several lines into one.
func firstLine(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' })
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, " ")
}
