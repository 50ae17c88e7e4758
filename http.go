package backstory

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/backstory-dev/backstory/eventlog"
)

// Handler serves /livez, /readyz, /metrics and /api/v1/status.
func (s *Sidecar) Handler() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), (*metrics)(s))
	if s.dispatch != nil {
		reg.MustRegister(s.dispatch)
	}
	mux := http.NewServeMux()
	check := func(f func() error) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if err := f(); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ok")
		}
	}
	mux.HandleFunc("GET /livez", check(s.Live))
	mux.HandleFunc("GET /readyz", check(s.Ready))
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /api/v1/status", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
		defer cancel()
		st, err := s.Status(ctx)
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(st)
	})
	return mux
}

// Serve answers HTTP on addr until ctx ends.
func (s *Sidecar) Serve(ctx context.Context, addr string) error {
	l, err := Listen(addr)
	if err != nil {
		return err
	}
	return s.ServeOn(ctx, l)
}

// ServeOn answers HTTP until ctx ends, and closes the listener.
func (s *Sidecar) ServeOn(ctx context.Context, l net.Listener) error {
	srv := &http.Server{Handler: s.Handler(), ReadHeaderTimeout: 10 * time.Second}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve HTTP on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	_ = srv.Shutdown(stop)
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// CheckAddr checks an address for HTTP, host:port. There is no authentication, so only loopback addresses are taken.
func CheckAddr(addr string) error {
	const hint = "Use a loopback address such as 127.0.0.1:8800, since there is no authentication, or off. A proxy, or a container in the same network namespace, can make it reachable."
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return &eventlog.Problem{Err: fmt.Errorf("read HTTP address %q: it is not host:port", addr), Hint: hint}
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return &eventlog.Problem{Err: fmt.Errorf("HTTP address %s could be reached from elsewhere", addr), Hint: hint}
	}
	return nil
}

// Listen opens an address for ServeOn. One that is in use is tried again for two seconds: a process that was killed has it until it is gone.
func Listen(addr string) (net.Listener, error) {
	if err := CheckAddr(addr); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", addr)
	for began := time.Now(); errors.Is(err, syscall.EADDRINUSE) && time.Since(began) < 2*time.Second; {
		time.Sleep(50 * time.Millisecond)
		l, err = net.Listen("tcp", addr)
	}
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		return nil, &eventlog.Problem{Err: fmt.Errorf("listen for HTTP on %s: %w", addr, err),
			Hint: "Another backstory may run on this machine. Choose another address with BACKSTORY_HTTP_ADDR, or switch HTTP off with BACKSTORY_HTTP_ADDR=off."}
	}
	return l, nil
}

// metrics collects what the parts count, when somebody asks.
type metrics Sidecar

var (
	descEvents       = prometheus.NewDesc("backstory_events_appended_total", "Events appended to the log by this process.", nil, nil)
	descTransactions = prometheus.NewDesc("backstory_transactions_appended_total", "Source transactions appended to the log by this process.", nil, nil)
	descFlushes      = prometheus.NewDesc("backstory_log_commits_total", "Transactions of the log itself.", nil, nil)
	descBytes        = prometheus.NewDesc("backstory_log_bytes_total", "Bytes of events sent to the log.", nil, nil)
	descUnattributed = prometheus.NewDesc("backstory_events_unattributed_total", "Events of the application's transactions without who and why.", nil, nil)
	descFirstSeen    = prometheus.NewDesc("backstory_rows_first_seen_total", "Rows that existed before the log first saw them.", nil, nil)
	descRuleErrors   = prometheus.NewDesc("backstory_rule_errors_total", "Row changes that a rule could not be applied to; they have their default events.", nil, nil)
	descMalformed    = prometheus.NewDesc("backstory_context_malformed_total", "Context messages that are not a JSON object.", nil, nil)
	descLookups      = prometheus.NewDesc("backstory_row_lookups_total", "Rows whose last state was read from the log.", nil, nil)
	descPosition     = prometheus.NewDesc("backstory_log_position", "Position of the last event.", nil, nil)
	descSize         = prometheus.NewDesc("backstory_log_size_bytes", "Size of the log on its server's disk, indexes included, at most a minute ago.", nil, nil)
	descStreaming    = prometheus.NewDesc("backstory_streaming", "1 while the source is being streamed.", nil, nil)
	descLagBytes     = prometheus.NewDesc("backstory_lag_bytes", "WAL of the source that may hold changes not yet in the log.", nil, nil)
	descLagSeconds   = prometheus.NewDesc("backstory_lag_seconds", "How long the oldest WAL of the source has been there that may hold changes not yet in the log; 0 if there was none at the last look.", nil, nil)
	descSeen         = prometheus.NewDesc("backstory_source_seen_timestamp_seconds", "When the source was last heard, in Unix time: what is said of it is as of then.", nil, nil)
	descIgnored      = prometheus.NewDesc("backstory_context_ignored_total", "Context messages that were not emitted as transactional, and so belong to no transaction.", nil, nil)
	descRetained     = prometheus.NewDesc("backstory_slot_retained_bytes", "WAL that the source keeps for the replication slot.", nil, nil)
	descConfirmed    = prometheus.NewDesc("backstory_slot_confirmed_bytes_behind", "WAL of the source after the slot's confirmed_flush_lsn: what the log has not taken.", nil, nil)
	descSafe         = prometheus.NewDesc("backstory_slot_safe_bytes", "WAL that may still be written before the slot is lost; -1 without limit.", nil, nil)
)

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descEvents, descTransactions, descFlushes, descBytes, descUnattributed, descFirstSeen, descRuleErrors, descMalformed,
		descIgnored, descLookups, descPosition, descSize, descStreaming, descLagBytes, descLagSeconds, descSeen, descRetained, descConfirmed, descSafe} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	s := (*Sidecar)(m)
	gauge := func(d *prometheus.Desc, v float64) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v)
	}
	st := s.total()
	for _, c := range []struct {
		d *prometheus.Desc
		v int64
	}{{descEvents, st.Events}, {descTransactions, st.Transactions}, {descFlushes, st.Flushes}, {descBytes, st.Bytes},
		{descUnattributed, st.Unattributed}, {descFirstSeen, st.FirstSeen}, {descRuleErrors, st.RuleErrors}, {descMalformed, st.MalformedContext}, {descIgnored, st.IgnoredContext}, {descLookups, st.Lookups}} {
		ch <- prometheus.MustNewConstMetric(c.d, prometheus.CounterValue, float64(c.v))
	}
	streaming := 0.0
	if s.Ready() == nil {
		streaming = 1
	}
	gauge(descStreaming, streaming)
	now := time.Now()
	s.note(now)
	bytes, seconds := s.lag.behind(now)
	gauge(descLagBytes, float64(bytes))
	gauge(descLagSeconds, seconds)
	s.lag.mu.Lock()
	defer s.lag.mu.Unlock()
	if s.lag.head.Epoch > 0 {
		gauge(descPosition, float64(s.lag.head.Position))
	}
	if !s.lag.seen.IsZero() {
		gauge(descSeen, float64(s.lag.seen.UnixMilli())/1000)
	}
	if s.lag.size > 0 {
		gauge(descSize, float64(s.lag.size))
	}
	if sl := s.lag.slot; sl != nil {
		gauge(descRetained, float64(sl.RetainedBytes))
		gauge(descConfirmed, float64(max(0, int64(s.lag.wal)-int64(sl.ConfirmedFlush))))
		gauge(descSafe, float64(sl.SafeBytes))
	}
}
