package kafkaserver

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/backstory-dev/backstory/internal/pgserver/localserver"
)

// Version is the version of Kafka, as pom.xml says.
const Version = "4.1.0"

//go:embed pom.xml
var pom []byte

//go:embed log4j2.properties
var log4j2 []byte

// ErrNoJava means that java or mvn is not installed.
var ErrNoJava = errors.New("kafka needs Java 17 or later, and Maven to be fetched")

// lookUp finds a program, or says how to get it.
func lookUp(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err == nil {
		return path, nil
	}
	hint := "install a JDK and Maven"
	if _, aptErr := exec.LookPath("apt-get"); aptErr == nil {
		hint = "run: apt-get install -y --no-install-recommends default-jre-headless maven"
		if os.Geteuid() != 0 {
			hint += " (as root)"
		}
	}
	return "", fmt.Errorf("find %s: %w; %s", program, ErrNoJava, hint)
}

// fetchJars returns the directory with lib and log4j2.properties, fetched if it is not in the cache.
func fetchJars(ctx context.Context, cfg Config) (string, error) {
	return localserver.Install(ctx, cfg.CacheDir, cacheName(), func(ctx context.Context, stage string) error {
		mvn, err := lookUp("mvn")
		if err != nil {
			return err
		}
		cfg.log("fetching Kafka %s (about 43 MB)", Version)
		return runMaven(ctx, mvn, stage)
	})
}

// copyGoal is named in full: Maven then need not ask what "dependency" stands for.
const copyGoal = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"

// cacheName changes with what the directory is made from, so that an old cache is never taken for the new one.
func cacheName() string {
	sum := sha256.Sum256(slices.Concat(pom, log4j2))
	return fmt.Sprintf("kafka/%s-%x", Version, sum[:4])
}

func runMaven(ctx context.Context, mvn, stage string) error {
	err := errors.Join(
		os.WriteFile(filepath.Join(stage, "pom.xml"), pom, 0o644),
		os.WriteFile(filepath.Join(stage, "log4j2.properties"), log4j2, 0o644))
	if err != nil {
		return fmt.Errorf("fetch Kafka %s: %w", Version, err)
	}
	args := []string{"-B", "-q", "-Dstyle.color=never", copyGoal, "-DincludeScope=runtime", "-DoutputDirectory=lib"}
	if !hasHome() { // Maven keeps its repository in the home directory
		repo := filepath.Join(stage, "m2")
		defer os.RemoveAll(repo)
		args = append(args, "-Dmaven.repo.local="+repo)
	}
	cmd := exec.Command(mvn, args...)
	cmd.Dir = stage
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	proc, err := localserver.Start(cmd, syscall.SIGKILL)
	if err != nil {
		return err
	}
	select {
	case <-proc.Done():
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("fetch Kafka %s: %w", Version, context.Cause(ctx)), proc.Kill(nil))
	}
	if err := proc.Err(); err != nil {
		return fmt.Errorf("fetch Kafka %s by mvn: %w\n%s", Version, err, firstLines(out.String(), 3))
	}
	return nil
}

// hasHome reports whether this user's home directory can be written to. Maven asks the password file for it, not HOME.
func hasHome() bool {
	u, err := user.Current()
	return err == nil && syscall.Access(u.HomeDir, 2 /* W_OK */) == nil
}

// firstLines shortens Maven's message, whose beginning tells most.
func firstLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[:min(n, len(lines))], "\n")
}
