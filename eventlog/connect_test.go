package eventlog

import (
	"net"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
)

// PgBouncer 1.18 refuses TLS if it has none, and then, by SQLSTATE 08P01, a session with settings. The person is told what that is.
func TestPoolerIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b := pgproto3.NewBackend(c, c)
			if m, err := b.ReceiveStartupMessage(); err == nil {
				if _, ok := m.(*pgproto3.SSLRequest); ok {
					_, _ = c.Write([]byte{'N'})
				} else {
					b.Send(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "unsupported startup parameter: IntervalStyle"})
					_ = b.Flush()
				}
			}
			_ = c.Close()
		}
	}()
	cfg, err := ConnConfig("postgres://u@"+l.Addr().String()+"/d", "backstory")
	if err != nil {
		t.Fatal(err)
	}
	_, err = pgx.ConnectConfig(t.Context(), cfg)
	if err = ConnError(err); !strings.Contains(Hint(err), "PgBouncer") || strings.Contains(err.Error(), "TLS") || code(err) != "08P01" {
		t.Errorf("%v (%s), SQLSTATE %q", err, Hint(err), code(err))
	}
}

// What a URL or the environment says of a setting that changes the text of values is not sent, in whatever letters: of two values for
// one setting the server would take either.
func TestOurSettingsAreTheOnlyOnes(t *testing.T) {
	t.Setenv("PGTZ", "Asia/Tokyo")
	cfg, err := ConnConfig("postgres://u@h/d?timezone=Asia/Tokyo&datestyle=SQL,DMY&EXTRA_FLOAT_DIGITS=-5&application_name=mine&work_mem=8MB", "backstory")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	for k, v := range cfg.RuntimeParams {
		if old, ok := seen[strings.ToLower(k)]; ok {
			t.Errorf("%s is sent as %q and %q", k, old, v)
		}
		seen[strings.ToLower(k)] = v
	}
	for k, v := range SessionSettings {
		if seen[strings.ToLower(k)] != v {
			t.Errorf("%s is %q, want %q", k, seen[strings.ToLower(k)], v)
		}
	}
	// All that is known to change what pgoutput and COPY print, whether a machine's locales can show it or not.
	for _, k := range []string{"client_encoding", "DateStyle", "IntervalStyle", "TimeZone", "extra_float_digits", "bytea_output", "lc_monetary", "search_path", "quote_all_identifiers"} {
		if _, ok := seen[strings.ToLower(k)]; !ok {
			t.Errorf("%s is left to the server", k)
		}
	}
	if seen["application_name"] != "mine" || seen["work_mem"] != "8MB" {
		t.Errorf("other settings are %v", seen)
	}
}
