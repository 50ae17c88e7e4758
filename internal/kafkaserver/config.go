package kafkaserver

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// Config says which broker to start. The zero value is a fresh, temporary one.
type Config struct {
	// AutoCreateTopics lets clients create topics by naming them. Default: off.
	AutoCreateTopics bool

	// Users are names and passwords for a listener with SASL PLAIN, and turn authorisation on: these users may do
	// nothing until Allow. Names and passwords are of letters, digits, - and _. Empty: there is no such listener.
	Users map[string]string

	// Properties are server properties beside or instead of ours.
	Properties map[string]string

	// HeapMB limits the broker's heap, in MB. 0: 512.
	HeapMB int

	// CacheDir is where the jars are kept. Empty: localserver.CacheDir.
	CacheDir string

	// Log is told of what takes long, one line at a time: "fetching Kafka 4.1.0 (about 43 MB)". Nil: nobody is.
	Log func(line string)
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

func (c Config) validate() error {
	for name, password := range c.Users {
		if !plainWord.MatchString(name) || !plainWord.MatchString(password) {
			return fmt.Errorf("read user %q: name and password have to be of letters, digits, - and _", name)
		}
	}
	for name, value := range c.Properties {
		if name == "" || strings.ContainsAny(name, " \t=:#!\\\r\n") || strings.ContainsAny(value, "\r\n") {
			return fmt.Errorf("read property %q: not one line of a properties file", name)
		}
	}
	if c.HeapMB < 0 {
		return fmt.Errorf("read heap size: %d MB", c.HeapMB)
	}
	return nil
}

func (c Config) log(format string, args ...any) {
	if c.Log != nil {
		c.Log(fmt.Sprintf(format, args...))
	}
}

// ports are the TCP ports of the listeners; sasl is 0 if there is none.
type ports struct{ plain, controller, sasl int }

func (p ports) each() []int {
	if p.sasl == 0 {
		return []int{p.plain, p.controller}
	}
	return []int{p.plain, p.controller, p.sasl}
}

// properties are those of server.properties.
func (c Config) properties(p ports, dataDir string) map[string]string {
	props := map[string]string{
		"process.roles":             "broker,controller",
		"node.id":                   "1",
		"controller.quorum.voters":  fmt.Sprintf("1@127.0.0.1:%d", p.controller),
		"listeners":                 fmt.Sprintf("PLAINTEXT://127.0.0.1:%d,CONTROLLER://127.0.0.1:%d", p.plain, p.controller),
		"controller.listener.names": "CONTROLLER",
		"log.dirs":                  dataDir,

		"auto.create.topics.enable": fmt.Sprint(c.AutoCreateTopics),
		"delete.topic.enable":       "true",

		// There is one broker.
		"offsets.topic.replication.factor":                 "1",
		"transaction.state.log.replication.factor":         "1",
		"transaction.state.log.min.isr":                    "1",
		"share.coordinator.state.topic.replication.factor": "1",
		"share.coordinator.state.topic.min.isr":            "1",
		"offsets.topic.num.partitions":                     "4", // 50 take a while to be made
		"transaction.state.log.num.partitions":             "4",
		"group.initial.rebalance.delay.ms":                 "0",
		// After a kill the controller waits for the old session's end before the broker may come back.
		"broker.session.timeout.ms":    "2000",
		"broker.heartbeat.interval.ms": "500",
	}
	if len(c.Users) > 0 {
		var jaas strings.Builder
		jaas.WriteString("org.apache.kafka.common.security.plain.PlainLoginModule required")
		for _, name := range slices.Sorted(maps.Keys(c.Users)) {
			fmt.Fprintf(&jaas, ` user_%s="%s"`, name, c.Users[name])
		}
		props["listeners"] += fmt.Sprintf(",SASL_PLAINTEXT://127.0.0.1:%d", p.sasl)
		props["listener.security.protocol.map"] = "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT"
		props["sasl.enabled.mechanisms"] = "PLAIN"
		props["listener.name.sasl_plaintext.plain.sasl.jaas.config"] = jaas.String() + ";"
		props["authorizer.class.name"] = "org.apache.kafka.metadata.authorizer.StandardAuthorizer"
		props["super.users"] = "User:ANONYMOUS"
	}
	maps.Copy(props, c.Properties)
	return props
}

// propertiesText writes a properties file. Backslashes are doubled, as java.util.Properties reads them.
func propertiesText(props map[string]string) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(props)) {
		fmt.Fprintf(&b, "%s=%s\n", name, strings.ReplaceAll(props[name], `\`, `\\`))
	}
	return b.String()
}
