package kafkaserver

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/segmentio/kafka-go"

	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
)

const (
	scratchPrefix = "backstory-kafka-"
	logTailLines  = 15
	stopLimit     = 30 * time.Second // after which Stop becomes Kill
	portTries     = 5
	pollEvery     = 50 * time.Millisecond
)

// ErrStopped is returned for a broker that Stop has ended.
var ErrStopped = errors.New("kafka broker was stopped for good")

// Server is a Kafka broker. Its methods may be called from several goroutines.
type Server struct {
	cfg       Config
	java      string
	jars      string
	scratch   *localserver.Scratch // has all that the broker writes
	ports     ports
	transport *kafka.Transport
	client    *kafka.Client

	mu      sync.Mutex // guards the following
	proc    *localserver.Process
	stopped bool
}

// Start starts a broker and waits until topics can be created. ctx bounds the start, not the broker's life. The caller
// has to Stop the broker.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg}
	var err error
	if s.java, err = lookUp("java"); err != nil {
		return nil, err
	}
	if s.jars, err = fetchJars(ctx, cfg); err != nil {
		return nil, err
	}
	if s.scratch, err = localserver.NewScratch(scratchPrefix); err != nil {
		return nil, err
	}
	if err := s.firstStart(ctx); err != nil {
		return nil, errors.Join(err, s.scratch.Remove())
	}
	return s, nil
}

func (s *Server) firstStart(ctx context.Context) error {
	for try := 1; ; try++ {
		if err := s.choosePorts(); err != nil {
			return err
		}
		if try == 1 {
			if err := s.format(ctx); err != nil {
				return err
			}
		}
		err := s.start(ctx)
		if err == nil {
			return nil
		}
		s.transport.CloseIdleConnections()
		if ctx.Err() != nil || try == portTries || !s.portTaken() {
			return err
		}
	}
}

// choosePorts writes server.properties with new ports.
func (s *Server) choosePorts() error {
	wanted := []*int{&s.ports.plain, &s.ports.controller}
	if len(s.cfg.Users) > 0 {
		wanted = append(wanted, &s.ports.sasl)
	}
	for _, port := range wanted {
		var err error
		if *port, err = localserver.FreePort(); err != nil {
			return err
		}
	}
	// The client knows brokers by address: new ports, new client.
	s.transport = &kafka.Transport{MetadataTTL: time.Second}
	s.client = &kafka.Client{Addr: kafka.TCP(s.Brokers()...), Transport: s.transport, Timeout: 10 * time.Second}
	text := propertiesText(s.cfg.properties(s.ports, s.DataDir()))
	if err := os.WriteFile(s.propertiesFile(), []byte(text), 0o600); err != nil { // has passwords
		return fmt.Errorf("write server properties: %w", err)
	}
	return nil
}

// portTaken reports whether somebody else has taken one of our ports while the broker does not run.
func (s *Server) portTaken() bool {
	for _, port := range s.ports.each() {
		if !localserver.PortFree(port) {
			return true
		}
	}
	return false
}

func (s *Server) propertiesFile() string { return filepath.Join(s.scratch.Path, "server.properties") }

// command runs one of Kafka's programs. The JVM is told to keep its statistics file out of the temporary directory.
func (s *Server) command(args ...string) *exec.Cmd {
	heap := s.cfg.HeapMB
	if heap == 0 {
		heap = 512
	}
	base := []string{
		fmt.Sprintf("-Xmx%dm", heap), "-XX:-UsePerfData", "-Djava.awt.headless=true",
		"-Dlog4j2.configurationFile=file:" + filepath.Join(s.jars, "log4j2.properties"),
		"-cp", filepath.Join(s.jars, "lib", "*"),
	}
	cmd := exec.Command(s.java, append(base, args...)...)
	cmd.Dir = s.scratch.Path
	return cmd
}

// format makes an empty data directory.
func (s *Server) format(ctx context.Context) error {
	cmd := s.command("kafka.tools.StorageTool", "format", "-t", clusterID(), "-c", s.propertiesFile())
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	proc, err := localserver.Start(cmd, syscall.SIGKILL)
	if err != nil {
		return err
	}
	select {
	case <-proc.Done():
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("format Kafka's data directory: %w", context.Cause(ctx)), proc.Kill(nil))
	}
	if err := proc.Err(); err != nil {
		return fmt.Errorf("format Kafka's data directory: %w%s\n%s", err, javaHint(out.String()), firstLines(out.String(), logTailLines))
	}
	return nil
}

// clusterID is a random id in Kafka's form: 16 bytes in URL base64. A leading dash would look like an option.
func clusterID() string {
	for {
		var id [16]byte
		rand.Read(id[:]) // never fails
		if s := base64.RawURLEncoding.EncodeToString(id[:]); s[0] != '-' {
			return s
		}
	}
}

func javaHint(output string) string {
	if strings.Contains(output, "UnsupportedClassVersionError") {
		return "; this java is too old, Kafka needs 17 or later"
	}
	return ""
}

// start starts the broker and waits until it is ready. If that fails, nothing runs. The caller holds mu, or the only
// reference.
func (s *Server) start(ctx context.Context) error {
	logFile, err := os.OpenFile(s.LogFile(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open broker log: %w", err)
	}
	defer logFile.Close()
	info, err := logFile.Stat()
	if err != nil {
		return fmt.Errorf("open broker log: %w", err)
	}
	cmd := s.command("kafka.Kafka", s.propertiesFile())
	cmd.Stdout, cmd.Stderr = logFile, logFile
	if s.proc, err = localserver.Start(cmd, syscall.SIGKILL); err != nil {
		return err
	}
	if err := s.waitReady(ctx); err != nil {
		err = errors.Join(err, s.kill())
		return fmt.Errorf("start Kafka %s: %w\n%s", Version, err, localserver.LogTail(s.LogFile(), info.Size(), logTailLines))
	}
	return nil
}

// waitReady waits until the broker is in its own metadata: the controller lists those that it has let in.
func (s *Server) waitReady(ctx context.Context) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		// The transport remembers for a while that a broker was not there, so first see that somebody listens.
		if s.listening() {
			ask, cancel := context.WithTimeout(ctx, 2*time.Second)
			meta, err := s.client.Metadata(ask, &kafka.MetadataRequest{})
			cancel()
			if err == nil && len(meta.Brokers) > 0 && meta.Brokers[0].Host != "" {
				return nil
			}
		}
		select {
		case <-s.proc.Done():
			return fmt.Errorf("the broker ended (%v)", s.proc.Err())
		case <-ctx.Done():
			return fmt.Errorf("wait for the broker: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func (s *Server) listening() bool {
	conn, err := net.DialTimeout("tcp", s.Brokers()[0], time.Second)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// Brokers are the addresses of the listener that lets everybody in: one.
func (s *Server) Brokers() []string { return address(s.ports.plain) }

// SASLBrokers are the addresses of the listener for Config.Users; none if there are no users.
func (s *Server) SASLBrokers() []string {
	if s.ports.sasl == 0 {
		return nil
	}
	return address(s.ports.sasl)
}

func address(port int) []string {
	return []string{net.JoinHostPort("127.0.0.1", strconv.Itoa(port))}
}

// Client is a client of the broker, as super user. It is closed by Stop.
func (s *Server) Client() *kafka.Client { return s.client }

// DataDir is where the broker keeps its data.
func (s *Server) DataDir() string { return filepath.Join(s.scratch.Path, "data") }

// LogFile is the broker's own log: warnings and errors.
func (s *Server) LogFile() string { return filepath.Join(s.scratch.Path, "server.log") }

// PID is the broker's process id, 0 if it does not run.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.running() {
		return 0
	}
	return s.proc.PID()
}

func (s *Server) running() bool { return s.proc != nil && !s.proc.Ended() }

// Stop ends the broker for good and removes its data. A second Stop does nothing.
func (s *Server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return nil
	}
	s.transport.CloseIdleConnections()
	err := s.shutDown()
	if s.running() {
		return err
	}
	s.stopped = true
	return errors.Join(err, s.scratch.Remove())
}

// Kill ends the broker with SIGKILL, as a crash would, and returns when it is gone. The data stays: Restart recovers it.
func (s *Server) Kill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kill()
}

func (s *Server) kill() error {
	if !s.running() {
		return nil
	}
	if err := s.proc.Kill(nil); err != nil {
		return fmt.Errorf("kill Kafka: %w", err)
	}
	return nil
}

// Restart stops the broker, unless it was killed or has crashed, and starts it again on the same ports and data. ctx
// bounds the start. After an error PID says whether the broker runs; if it does not, Restart may be tried again.
func (s *Server) Restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return ErrStopped
	}
	err := s.shutDown()
	if s.running() {
		return err
	}
	s.transport.CloseIdleConnections()
	return errors.Join(err, s.start(ctx))
}

func (s *Server) shutDown() error {
	if !s.running() {
		return nil
	}
	if err := s.proc.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if s.proc.WaitFor(stopLimit) {
		return nil
	}
	return errors.Join(fmt.Errorf("stop Kafka: it took more than %s; killed it", stopLimit), s.kill())
}
