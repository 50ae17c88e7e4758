// Package kafkaserver starts a real Apache Kafka broker for tests and benchmarks.
//
// # Purpose
//
// What a fake broker would hide (authorisation, acknowledgement, a broker that dies and comes back) is what the Kafka
// sink has to be tested against. One broker in KRaft mode is broker and controller at once; there is no ZooKeeper.
// It is for loopback only and keeps one copy of everything.
//
// Whether tests have a broker is said by one environment variable, BACKSTORY_TEST_KAFKA; see Env.
//
// # Life of a broker
//
// Start looks for java, has Maven fetch Kafka's jars into the cache unless they are there (about 43 MB, once; pom.xml
// names the versions), formats the data directory with Kafka's own StorageTool, starts the broker and waits until it
// lists itself in the cluster's metadata, because topics cannot be created earlier. Ports and data stay the same over
// Restart and Kill. Stop is the end and removes what Start made.
//
// # Listeners
//
// PLAINTEXT is for everybody: its clients are User:ANONYMOUS, the super user. With Config.Users there is a second
// listener, SASL_PLAINTEXT with mechanism PLAIN, whose users may do nothing until Allow lets them: the way to test
// "topic not authorised". CONTROLLER is the broker's own.
//
// # Failure handling
//
//   - java or mvn is missing: ErrNoJava, with the command that installs them where we know it.
//   - The broker does not come up: the error has the end of its log.
//   - ctx ends during Start or Restart: the broker is killed, and nothing is left behind.
//   - A Stop that takes more than 30 seconds becomes a Kill, and the error says so.
//   - We die: the kernel kills the broker (Linux only), and the next Start removes its directory.
//   - Kill is SIGKILL. What the broker acknowledged is in the page cache of the operating system and survives, as
//     it would a crash of the broker, though not one of the machine.
//
// # Tried and rejected
//
// The random-uuid command of the StorageTool: it costs the start of a JVM for 16 random bytes. Kafka's release archive:
// it is not where packages come from. A JVM that starts faster (serial collector, C1 only): benchmarks would measure it.
package kafkaserver
