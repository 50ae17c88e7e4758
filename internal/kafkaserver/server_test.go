package kafkaserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/sasl/plain"
)

// orphanEnv turns the test binary into a program that starts a broker and waits to be killed.
const orphanEnv = "BACKSTORY_TEST_ORPHAN"

func TestMain(m *testing.M) {
	if os.Getenv(orphanEnv) != "" {
		orphan()
	}
	before := runtime.NumGoroutine()
	code := m.Run()
	StopShared()
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<16)
			fmt.Fprintf(os.Stderr, "goroutines leaked:\n%s\n", buf[:runtime.Stack(buf, true)])
			code = 1
			break
		}
	}
	os.Exit(code)
}

// write writes one message, with a client of its own.
func write(t *testing.T, brokers []string, transport *kafka.Transport, topic, value string) error {
	t.Helper()
	w := &kafka.Writer{
		Addr: kafka.TCP(brokers...), Topic: topic, Transport: transport, RequiredAcks: kafka.RequireAll,
		BatchTimeout: time.Millisecond, MaxAttempts: 3,
	}
	defer transport.CloseIdleConnections()
	defer w.Close()
	err := w.WriteMessages(t.Context(), kafka.Message{Key: []byte("k"), Value: []byte(value)})
	if each, ok := err.(kafka.WriteErrors); ok && len(each) == 1 { // errors.Is does not look into them
		return each[0]
	}
	return err
}

// read reads the first n messages of a topic with one partition.
func read(t *testing.T, s *Server, topic string, n int) (values []string) {
	t.Helper()
	r := kafka.NewReader(kafka.ReaderConfig{Brokers: s.Brokers(), Topic: topic, MaxWait: 100 * time.Millisecond})
	defer r.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range n {
		m, err := r.ReadMessage(ctx)
		if err != nil {
			t.Fatalf("read after %q: %v", values, err)
		}
		values = append(values, string(m.Value))
	}
	return values
}

func TestForTestSharesABroker(t *testing.T) {
	s := ForTest(t)
	if ForTest(t) != s {
		t.Error("another broker")
	}
	var topic string
	t.Run("use", func(t *testing.T) {
		topic = s.NewTopic(t, 1)
		if err := write(t, s.Brokers(), &kafka.Transport{}, topic, "hello"); err != nil {
			t.Fatal(err)
		}
		if got := read(t, s, topic, 1); got[0] != "hello" {
			t.Errorf("read %q", got)
		}
	})
	t.Run("the topic is deleted after its test", func(t *testing.T) {
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(pollEvery) {
			meta, err := s.Client().Metadata(t.Context(), &kafka.MetadataRequest{Topics: []string{topic}})
			if err != nil {
				t.Fatal(err)
			}
			if errors.Is(meta.Topics[0].Error, kafka.UnknownTopicOrPartition) {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("topic %s: %v", topic, meta.Topics[0])
			}
		}
	})
	t.Run("topics are not created by themselves", func(t *testing.T) {
		if err := write(t, s.Brokers(), &kafka.Transport{}, "no-such-topic", "x"); !errors.Is(err, kafka.UnknownTopicOrPartition) {
			t.Errorf("write: %v", err)
		}
	})
	t.Run("a topic takes settings", func(t *testing.T) {
		err := s.CreateTopic(t.Context(), "compacted", 3, kafka.ConfigEntry{ConfigName: "cleanup.policy", ConfigValue: "compact"})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.CreateTopic(t.Context(), "compacted", 3); !errors.Is(err, kafka.TopicAlreadyExists) {
			t.Errorf("created twice: %v", err)
		}
		if err := s.DeleteTopic(t.Context(), "compacted"); err != nil {
			t.Error(err)
		}
		if err := s.DeleteTopic(t.Context(), "never-there"); err != nil {
			t.Error(err)
		}
	})
	t.Run("a consumer group works", func(t *testing.T) {
		topic := s.NewTopic(t, 1)
		if err := write(t, s.Brokers(), &kafka.Transport{}, topic, "hello"); err != nil {
			t.Fatal(err)
		}
		r := kafka.NewReader(kafka.ReaderConfig{Brokers: s.Brokers(), Topic: topic, GroupID: "g", MaxWait: 100 * time.Millisecond, StartOffset: kafka.FirstOffset})
		defer r.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if m, err := r.ReadMessage(ctx); err != nil || string(m.Value) != "hello" {
			t.Errorf("read %q, %v", m.Value, err)
		}
	})
}

func TestDataSurvivesKillAndRestart(t *testing.T) {
	s := StartForTest(t, Config{})
	if err := s.CreateTopic(t.Context(), "kept", 1); err != nil {
		t.Fatal(err)
	}
	brokers, pid := fmt.Sprint(s.Brokers()), s.PID()
	var want []string
	for _, end := range []string{"kill", "restart", "kill again"} {
		if err := write(t, s.Brokers(), &kafka.Transport{}, "kept", end); err != nil {
			t.Fatal(err)
		}
		want = append(want, end)
		if strings.HasPrefix(end, "kill") {
			if err := s.Kill(); err != nil {
				t.Fatal(err)
			}
			if s.PID() != 0 || syscall.Kill(pid, 0) == nil {
				t.Error("killed, but is there")
			}
			if err := s.Kill(); err != nil {
				t.Errorf("second Kill: %v", err)
			}
		}
		began := time.Now()
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Logf("back %s after %s", time.Since(began).Round(time.Millisecond), end)
		if fmt.Sprint(s.Brokers()) != brokers || s.PID() == pid {
			t.Errorf("brokers %s, then %s; pid %d, then %d", brokers, s.Brokers(), pid, s.PID())
		}
		pid = s.PID()
		if got := read(t, s, "kept", len(want)); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("read %q, want %q", got, want)
		}
		if err := s.CreateTopic(t.Context(), "new-"+strings.ReplaceAll(end, " ", "-"), 1); err != nil {
			t.Error(err)
		}
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.scratch.Path); !os.IsNotExist(err) || s.PID() != 0 {
		t.Errorf("something is left of the broker: %v", err)
	}
	if err := s.Stop(); err != nil {
		t.Errorf("second Stop: %v", err)
	}
	if err := s.Restart(t.Context()); !errors.Is(err, ErrStopped) {
		t.Errorf("Restart after Stop: %v", err)
	}
}

func TestUsersMayDoOnlyWhatTheyAreAllowed(t *testing.T) {
	s := StartForTest(t, Config{Users: map[string]string{"alice": "secret", "bob": "hidden"}, AutoCreateTopics: true,
		Properties: map[string]string{"num.partitions": "2"}})
	for _, topic := range []string{"open", "closed"} {
		if err := s.CreateTopic(t.Context(), topic, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Allow(t.Context(), "alice", "open", kafka.ACLOperationTypeWrite); err != nil {
		t.Fatal(err)
	}
	if err := s.Allow(t.Context(), "alice", "closed", kafka.ACLOperationTypeDescribe); err != nil {
		t.Fatal(err)
	}
	as := func(user, password string, topics ...string) *kafka.Transport {
		return &kafka.Transport{SASL: plain.Mechanism{Username: user, Password: password}, MetadataTopics: topics}
	}
	if err := write(t, s.SASLBrokers(), as("alice", "secret"), "open", "from alice"); err != nil {
		t.Errorf("alice into the open topic: %v", err)
	}
	for name, c := range map[string]struct {
		transport *kafka.Transport
		topic     string
		want      kafka.Error
	}{
		"who may describe it but not write":               {as("alice", "secret"), "closed", kafka.TopicAuthorizationFailed},
		"who may do nothing, with a plain transport":      {as("bob", "hidden"), "open", kafka.UnknownTopicOrPartition},
		"who may do nothing, with a transport that names": {as("bob", "hidden", "open"), "open", kafka.TopicAuthorizationFailed},
	} {
		if err := write(t, s.SASLBrokers(), c.transport, c.topic, "x"); !errors.Is(err, c.want) {
			t.Errorf("a user %s: %v, want %v", name, err, c.want)
		}
	}
	if err := write(t, s.SASLBrokers(), as("alice", "guess"), "open", "x"); !errors.Is(err, kafka.SASLAuthenticationFailed) {
		t.Errorf("with a wrong password: %v", err)
	}
	if err := write(t, s.Brokers(), &kafka.Transport{}, "closed", "from the super user"); err != nil {
		t.Errorf("the super user: %v", err)
	}
	if got := read(t, s, "open", 1); got[0] != "from alice" {
		t.Errorf("read %q", got)
	}
}

func TestTopicsAreCreatedByThemselvesIfAsked(t *testing.T) {
	s := StartForTest(t, Config{AutoCreateTopics: true, Properties: map[string]string{"num.partitions": "2"}})
	transport := &kafka.Transport{}
	defer transport.CloseIdleConnections()
	w := &kafka.Writer{
		Addr: kafka.TCP(s.Brokers()...), Topic: "by-itself", Transport: transport, AllowAutoTopicCreation: true,
		BatchTimeout: time.Millisecond,
	}
	defer w.Close()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(pollEvery) { // the first to name it is told that it is not there
		err := w.WriteMessages(t.Context(), kafka.Message{Value: []byte("x")})
		if err == nil {
			break
		}
		if !errors.Is(err, kafka.UnknownTopicOrPartition) && !errors.Is(err, kafka.LeaderNotAvailable) || time.Now().After(end) {
			t.Fatal(err)
		}
	}
	fresh := &kafka.Transport{} // ours remembers for a second that there was no such topic
	defer fresh.CloseIdleConnections()
	client := &kafka.Client{Addr: kafka.TCP(s.Brokers()...), Transport: fresh}
	meta, err := client.Metadata(t.Context(), &kafka.MetadataRequest{Topics: []string{"by-itself"}})
	if err != nil || len(meta.Topics[0].Partitions) != 2 {
		t.Errorf("its metadata: %+v, %v", meta, err)
	}
}

func TestFailedStartTellsTheLog(t *testing.T) {
	ForTest(t) // the jars are there: ctx below bounds the start alone
	_, err := Start(t.Context(), Config{Properties: map[string]string{"log.retention.ms": "soon"}})
	if err == nil || !strings.Contains(err.Error(), "log.retention.ms") {
		t.Errorf("Start: %v", err)
	}
	t.Run("ctx ends", func(t *testing.T) {
		for _, after := range []time.Duration{200 * time.Millisecond, 2 * time.Second} {
			ctx, cancel := context.WithTimeout(t.Context(), after)
			defer cancel()
			if s, err := Start(ctx, Config{}); err == nil { // a fast machine
				s.Stop()
			} else if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("after %s: %v", after, err)
			}
		}
	})
	t.Run("no java", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		if _, err := Start(t.Context(), Config{}); !errors.Is(err, ErrNoJava) || !strings.Contains(err.Error(), "install") {
			t.Errorf("Start: %v", err)
		}
	})
	t.Run("no mvn", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		if _, err := fetchJars(t.Context(), Config{CacheDir: t.TempDir()}); !errors.Is(err, ErrNoJava) {
			t.Errorf("fetch: %v", err)
		}
	})
}

func TestConfigIsValidated(t *testing.T) {
	for name, cfg := range map[string]Config{
		"user":     {Users: map[string]string{`a"`: "b"}},
		"password": {Users: map[string]string{"a": ""}},
		"property": {Properties: map[string]string{"a": "b\nc=d"}},
		"heap":     {HeapMB: -1},
	} {
		if _, err := Start(t.Context(), cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestVersionIsThatOfThePom(t *testing.T) {
	if !strings.Contains(string(pom), "<version>"+Version+"</version>") {
		t.Errorf("pom.xml does not have version %s", Version)
	}
}

// orphan is the program of TestBrokerDiesWithUs: it starts a broker, says its pid and waits to be killed.
func orphan() {
	s, err := Start(context.Background(), Config{})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println(s.PID(), s.scratch.Path)
	select {}
}

func TestBrokerDiesWithUs(t *testing.T) {
	Need(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), orphanEnv+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	var scratch string
	if n, _ := fmt.Sscan(line, &pid, &scratch); n != 2 {
		t.Fatalf("the program said %q", line)
	}
	t.Cleanup(func() { os.RemoveAll(scratch) })
	if err := syscall.Kill(pid, 0); err != nil {
		t.Fatalf("the broker does not run: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the broker outlived its program: %s", stat)
		}
	}
}
