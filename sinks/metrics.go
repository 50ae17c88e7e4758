package sinks

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are what a dispatcher counts. The gauges come from Status at the moment of collection.
type metrics struct {
	lagEvents, lagSeconds, position, retrying, up *prometheus.Desc
	sent, skipped                                 *prometheus.CounterVec
	errors                                        *prometheus.CounterVec
	sendSeconds                                   *prometheus.HistogramVec
}

func newMetrics() *metrics {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("backstory_reactor_"+name, help, []string{"reactor"}, nil)
	}
	counter := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "backstory_reactor_" + name, Help: help}, []string{"reactor"})
	}
	return &metrics{
		lagEvents:  desc("lag_events", "Events of the log that the reactor has not yet sent or passed over."),
		lagSeconds: desc("lag_seconds", "Time since the oldest event happened that the reactor has not yet sent."),
		position:   desc("position", "Position up to which the reactor has sent what it selects."),
		retrying:   desc("retrying_seconds", "Time for which the reactor has not got on because of an error; 0 if it does."),
		up:         desc("running", "1 if this process runs the reactor and it gets on, otherwise 0."),
		sent:       counter("sent_events_total", "Events that the destination has confirmed."),
		skipped:    counter("passed_over_events_total", "Events that were read and not selected."),
		errors:     counter("errors_total", "Failed attempts to open the destination or to send to it."),
		sendSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "backstory_reactor_send_seconds",
			Help: "Time that the destination took to confirm a batch.", Buckets: prometheus.ExponentialBuckets(0.0005, 4, 9)}, []string{"reactor"}),
	}
}

var _ prometheus.Collector = (*Dispatcher)(nil)

// Describe implements prometheus.Collector.
func (d *Dispatcher) Describe(ch chan<- *prometheus.Desc) {
	m := d.metrics
	for _, x := range []*prometheus.Desc{m.lagEvents, m.lagSeconds, m.position, m.retrying, m.up} {
		ch <- x
	}
	m.sent.Describe(ch)
	m.skipped.Describe(ch)
	m.errors.Describe(ch)
	m.sendSeconds.Describe(ch)
}

// Collect implements prometheus.Collector.
func (d *Dispatcher) Collect(ch chan<- prometheus.Metric) {
	m := d.metrics
	for _, s := range d.Status() {
		gauge := func(x *prometheus.Desc, v float64) {
			ch <- prometheus.MustNewConstMetric(x, prometheus.GaugeValue, v, s.Name)
		}
		gauge(m.lagEvents, float64(s.LagEvents))
		gauge(m.lagSeconds, s.LagSeconds)
		gauge(m.position, float64(s.Position))
		failing, up := 0.0, 0.0
		if s.Error != "" && !s.Since.IsZero() {
			failing = time.Since(s.Since).Seconds()
		}
		if s.State == StateRunning {
			up = 1
		}
		gauge(m.retrying, failing)
		gauge(m.up, up)
	}
	m.sent.Collect(ch)
	m.skipped.Collect(ch)
	m.errors.Collect(ch)
	m.sendSeconds.Collect(ch)
}
