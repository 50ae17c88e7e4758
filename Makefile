# backstory. `make help` lists the targets.
SHELL := /bin/bash
GO ?= go
BIN := bin/backstory
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

.PHONY: help build demo test test-race test-matrix bench lint fmt vet fuzz crash soak memory clean test-kafka java client units pip

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build bin/backstory
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o $(BIN) ./cmd/backstory

demo: build ## a shop at work on an embedded Postgres, with the sidecar on it
	@$(BIN) demo $(ARGS)

# Whether tests have a real Kafka is said by BACKSTORY_TEST_KAFKA (internal/kafkaserver, Env); go test does not show what it skips.
LEFT_OUT := { [ "$$BACKSTORY_TEST_KAFKA" != 0 ] && command -v java >/dev/null && command -v mvn >/dev/null || \
	echo "Left out: the tests against a real Kafka. make test-kafka installs Java and Maven and runs them."; \
	[ "$$BACKSTORY_TEST_PG_UPGRADE" != 0 ] && command -v pip >/dev/null || echo "Left out: pg_upgrade of a source (there is no pip)."; \
	command -v systemd-analyze >/dev/null || echo "Left out: whether systemd takes deploy/backstory.service (there is no systemd-analyze)."; }

test: ## all tests; they fetch and start their own servers
	$(GO) test -timeout 40m ./...
	@$(LEFT_OUT)

test-kafka: java ## the tests against a real Kafka
	BACKSTORY_TEST_KAFKA=1 $(GO) test -count=1 -timeout 20m ./internal/kafkaserver ./sinks/...
	BACKSTORY_TEST_KAFKA=1 $(GO) test -count=1 -timeout 20m -run TestCrashes ./internal/e2e
	BACKSTORY_TEST_KAFKA=1 $(GO) test -count=1 -timeout 20m -run 'TestBadInput/.*Kafka' ./cmd/backstory

test-race: ## with the race detector
	$(GO) test -race -timeout 40m ./...
	@$(LEFT_OUT)

java: # Java and Maven, for a real Kafka
	@command -v java >/dev/null && command -v mvn >/dev/null || { echo "installing Java and Maven (Debian or Ubuntu packages)"; \
	  if [ "$$(id -u)" = 0 ]; then S=; else S=sudo; fi; \
	  $$S apt-get update -qq && $$S apt-get install -y -qq --no-install-recommends default-jre-headless maven >/dev/null; \
	  $(GO) clean -testcache; } # what was skipped without them counts as tested

units: # systemd-analyze, which looks at deploy/backstory.service
	@command -v systemd-analyze >/dev/null || { echo "installing systemd-analyze (Debian or Ubuntu package systemd)"; \
	  if [ "$$(id -u)" = 0 ]; then S=; else S=sudo; fi; \
	  $$S apt-get update -qq && $$S apt-get install -y -qq --no-install-recommends systemd >/dev/null; }

pip: # Python's pip, which fetches a real pg_upgrade
	@command -v pip >/dev/null || { echo "installing Python's pip (Debian or Ubuntu package python3-pip)"; \
	  if [ "$$(id -u)" = 0 ]; then S=; else S=sudo; fi; \
	  $$S apt-get update -qq && $$S apt-get install -y -qq --no-install-recommends python3-pip >/dev/null; }

client: # pg_recvlogical and pgbench, against which the benchmarks compare
	@ls /usr/lib/postgresql/*/bin/pg_recvlogical >/dev/null 2>&1 || command -v pg_recvlogical >/dev/null || { echo "installing PostgreSQL's client programs (Debian or Ubuntu packages)"; \
	  if [ "$$(id -u)" = 0 ]; then S=; else S=sudo; fi; \
	  $$S apt-get update -qq && $$S apt-get install -y -qq --no-install-recommends postgresql-client >/dev/null; }

VERSIONS ?= 14 15 16 17 18
test-matrix: ## the tests on PostgreSQL 14 to 18, or VERSIONS="14 16"
	BACKSTORY_TEST_MATRIX=1 $(GO) test -count=1 -timeout 20m ./internal/pgserver
	@for v in $(VERSIONS); do echo "== PostgreSQL $$v"; BACKSTORY_TEST_PG_VERSION=$$v $(GO) test -count=1 -timeout 30m ./... || exit 1; done
	@$(LEFT_OUT)

crash: ## the crash tests for a minute each, and what they did
	BACKSTORY_CRASH_SECONDS=60 $(GO) test -count=1 -timeout 30m -v -run TestCrashes ./internal/e2e
	@$(LEFT_OUT)

# Runs of two minutes, each with a seed of its own, until the time is over or one fails; build/soak.log has the last one.
SOAK_MINUTES ?= 30
soak: ## crashes, alterations, failovers and gaps at random, with other seeds for half an hour
	@mkdir -p build; end=$$(( $$(date +%s) + 60 * $(SOAK_MINUTES) )); \
	  while [ $$(date +%s) -lt $$end ]; do \
	    BACKSTORY_NEMESIS_SECONDS=120 $(GO) test -count=1 -timeout 30m -v -run '^TestNemesis$$' ./internal/e2e > build/soak.log 2>&1; code=$$?; \
	    grep -aE '^ +nemesis_test.go.*(seed|units|what was done)|^--- |^FAIL' build/soak.log | cut -c1-600; \
	    [ $$code = 0 ] || { echo "all that it said is in build/soak.log"; exit 1; }; \
	  done

memory: ## transactions of 5 million rows and of 1 GB; the sidecar may have 128 MB
	BACKSTORY_MEMORY_ROWS=5000000 BACKSTORY_MEMORY_MB=1000 BACKSTORY_MEMORY_BOUND_MB=128 \
	  $(GO) test -count=1 -timeout 90m -v -parallel 1 -run TestHuge ./internal/e2e

bench: build client ## speed, as ratios against limits taken in the same run; also as JSON in build/bench.json
	@mkdir -p build
	$(GO) run ./internal/bench -json build/bench.json $(ARGS)

# A number of inputs, not a time: when a time ends during an input, go test can fail with "context deadline exceeded".
FUZZTIME ?= 100000x
fuzz: ## each fuzz test with 100 000 inputs
	@for p in ./eventlog ./capture ./internal/expr ./internal/yamlfile; do for f in $$($(GO) test -list 'Fuzz.*' $$p 2>/dev/null | grep ^Fuzz); do $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x $$p || exit 1; done; done

lint: vet ## vet, format and staticcheck (staticcheck.conf gives the reason for what is off)
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo "run make fmt"; exit 1; }
	$(GO) tool staticcheck ./...

vet:
	$(GO) vet ./...

fmt: ## format the code
	gofmt -w $$(git ls-files '*.go')

clean: ## remove what was built
	rm -rf bin build
