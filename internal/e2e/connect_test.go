package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/internal/pgserver/pgservertest"
)

// certificates makes a certificate authority and what it vouches for, 127.0.0.1, as PEM.
func certificates(t *testing.T) (ca, cert, key []byte) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	authority := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, authority, authority, &caKey.PublicKey, caKey)
	must(err)
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	server := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "server"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, server, authority, &own.PublicKey, caKey)
	must(err)
	keyDER, err := x509.MarshalECPrivateKey(own)
	must(err)
	block := func(kind string, b []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}) }
	return block("CERTIFICATE", caDER), block("CERTIFICATE", der), block("EC PRIVATE KEY", keyDER)
}

// useTLS gives a server a certificate, and returns the file of the authority that made it.
func useTLS(t *testing.T, s *pgservertest.Server) string {
	t.Helper()
	ca, cert, key := certificates(t)
	info, err := os.Stat(filepath.Join(s.DataDir(), "PG_VERSION"))
	if err != nil {
		t.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	for name, text := range map[string][]byte{"server.crt": cert, "server.key": key} {
		path := filepath.Join(s.DataDir(), name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, int(owner.Uid), int(owner.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	db := open(t, s.URL("postgres"))
	db.do(`ALTER SYSTEM SET ssl = on`)
	db.do(`SELECT pg_reload_conf()`)
	eventually(t, 10*time.Second, "the server speaks TLS", func() (bool, error) {
		conn, err := pgx.Connect(t.Context(), strings.Replace(s.URL("postgres"), "sslmode=disable", "sslmode=require", 1))
		if err == nil {
			err = conn.Close(t.Context())
		}
		return err == nil, err
	})
	return authorityFile(t, ca)
}

// authorityFile writes the certificate of an authority to a file.
func authorityFile(t *testing.T, ca []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(file, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestTLSPasswordFileAndLeastRights: a server that takes nobody without TLS and a password, which is in a .pgpass file, and a role that
// may do no more than it has to.
func TestTLSPasswordFileAndLeastRights(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, hba: []string{"hostnossl all app 127.0.0.1/32 reject", "hostssl all app 127.0.0.1/32 scram-sha-256"}})
	authority, db, name := useTLS(t, s.src), s.sql(), databaseOf(t, s.cfg.Capture.URL)
	db.do(`SET password_encryption = 'scram-sha-256'`)
	db.do(`CREATE ROLE app LOGIN REPLICATION PASSWORD 'p:ss\ word'; CREATE TABLE public.things (id int PRIMARY KEY, v text); INSERT INTO public.things VALUES (1, 'old');
		GRANT SELECT ON public.things TO app`)
	pass := filepath.Join(t.TempDir(), ".pgpass")
	if err := os.WriteFile(pass, fmt.Appendf(nil, "127.0.0.1:%d:%s:app:p\\:ss\\\\ word\n", s.src.Port(), name), 0o600); err != nil {
		t.Fatal(err)
	}
	s.env = []string{"PGPASSFILE=" + pass}
	s.init() // by the owner
	with := func(mode, ca string) string {
		q := url.Values{"sslmode": {mode}}
		if ca != "" {
			q.Set("sslrootcert", ca)
		}
		return fmt.Sprintf("postgres://app@127.0.0.1:%d/%s?%s", s.src.Port(), name, q.Encode())
	}
	s.cfg.Capture.URL = with("disable", "")
	s.says(1, "rejects connection", "run", "--once")
	other, _, _ := certificates(t) // of an authority that has made no certificate in use
	s.cfg.Capture.URL = with("verify-full", authorityFile(t, other))
	s.says(1, "certificate", "run", "--once")
	s.cfg.Capture.URL = with("verify-full", authority)
	s.says(0, "", "run", "--once")
	p, l := s.command(true, "run"), s.logSQL()
	db.do(`INSERT INTO public.things VALUES (2, 'new')`)
	eventually(t, time.Minute, "the row is in the log", func() (bool, error) {
		if !p.running() {
			t.Fatalf("the sidecar ended:\n%s", p.out)
		}
		return l.one(`SELECT count(*) FROM backstory.events WHERE type = 'ThingCreated'`) == "1", nil
	})
	if got := db.one(`SELECT count(*) FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid) WHERE a.usename = 'app' AND NOT s.ssl`); got != "0" {
		t.Errorf("%s connections without TLS", got)
	}
	p.kill()
	if err := os.WriteFile(pass, []byte("*:*:*:app:wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.says(1, "password authentication failed", "run", "--once")
}

// TestNoConnectionsLeft: an application that has used up all connections keeps the sidecar out for as long as that lasts; a role that may
// use reserved connections (PostgreSQL 16, reserved_connections) gets in.
func TestNoConnectionsLeft(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{own: true, apart: true, version: pgservertest.AtLeast("16"), settings: map[string]string{"max_connections": "20", "superuser_reserved_connections": "2", "reserved_connections": "6"}})
	db := s.sql()
	db.do(`CREATE TABLE public.things (id int PRIMARY KEY, v text); CREATE ROLE app LOGIN; CREATE ROLE plain LOGIN REPLICATION; CREATE ROLE managed LOGIN REPLICATION;
		GRANT SELECT ON public.things TO plain, managed; GRANT pg_use_reserved_connections TO managed`)
	s.init()
	owner := s.cfg.Capture.URL
	var taken []*pgx.Conn
	for {
		conn, err := pgx.Connect(t.Context(), withUser(t, owner, "app"))
		if err != nil {
			if !strings.Contains(err.Error(), "53300") {
				t.Fatal(err)
			}
			break
		}
		taken = append(taken, conn)
	}
	s.cfg.Capture.URL = withUser(t, owner, "plain")
	s.says(1, "no connections left", "run", "--once")
	s.cfg.Capture.URL = withUser(t, owner, "managed")
	s.says(0, "", "run", "--once")
	s.cfg.Capture.URL = withUser(t, owner, "plain")
	p, l := s.command(true, "run"), s.logSQL()
	db.do(`INSERT INTO public.things VALUES (1, 'a')`)
	time.Sleep(2 * time.Second)
	for _, c := range taken {
		if err := c.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, time.Minute, "it gets in", func() (bool, error) {
		if !p.running() {
			t.Fatalf("the sidecar ended:\n%s", p.out)
		}
		return l.one(`SELECT count(*) FROM backstory.events`) == "1", nil
	})
}
