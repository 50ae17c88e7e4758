package kafkaserver

import (
	"fmt"
	"os"
	"testing"
)

// Env names the environment variable that says whether tests have a real Kafka:
//
//	1       they have; without Java and Maven they fail
//	0       they have not
//	empty   they have, if Java and Maven are there, and without -short. Where CI=true that is no reason: without Java and Maven
//	        they fail, since what is left out there is left out on purpose
const Env = "BACKSTORY_TEST_KAFKA"

// Need skips a test that is nothing without a real Kafka, where there is to be none.
func Need(t testing.TB) {
	t.Helper()
	if why := missing(t); why != "" {
		t.Skip(why)
	}
}

// Wanted tells whether a test that goes without it as well has a real Kafka beside it.
func Wanted(t testing.TB) bool {
	t.Helper()
	why := missing(t)
	if why != "" {
		t.Log(why)
	}
	return why == ""
}

// missing tells why there is to be no Kafka. It fails a test for which there has to be one that cannot be had.
func missing(t testing.TB) string {
	t.Helper()
	why, err := rule(os.Getenv(Env), os.Getenv("CI") == "true", testing.Short(), installed())
	if err != nil {
		t.Fatal(err)
	}
	return why
}

// rule is what Env says: why there is to be no Kafka, empty if there is; an error where nobody may do without. absent is why
// there can be none.
func rule(value string, ci, short bool, absent error) (why string, err error) {
	switch {
	case value == "0":
		return "no real Kafka: " + Env + "=0", nil
	case value == "1":
		return "", absent
	case value != "":
		return "", fmt.Errorf("%s=%s: it is 1 or 0, or not set", Env, value)
	case absent != nil && ci:
		return "", fmt.Errorf("%w; or leave these tests out with %s=0", absent, Env)
	case absent != nil:
		return fmt.Sprintf("no real Kafka: %v; %s=1 makes this an error", absent, Env), nil
	case short && !ci:
		return "no real Kafka: -short; " + Env + "=1 runs this all the same", nil
	}
	return "", nil
}

// installed looks for what a broker needs.
func installed() error {
	for _, program := range []string{"java", "mvn"} {
		if _, err := lookUp(program); err != nil {
			return err
		}
	}
	return nil
}
