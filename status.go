package backstory

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/sinks"
)

// Status is what every part is doing. Its JSON form is what `status --json` prints.
type Status struct {
	// Running tells whether a sidecar process answered; without one, what only a process knows is empty.
	Running bool `json:"running"`
	// CaughtUp: no captured change is outstanding.
	CaughtUp bool           `json:"caught_up"`
	Source   SourceStatus   `json:"source"`
	Log      LogStatus      `json:"log"`
	Baseline BaselineStatus `json:"baseline"`
	// Reactors, by name. Without a running process: their checkpoints.
	Reactors []sinks.Status `json:"reactors"`
}

// SourceStatus is how capture fares.
type SourceStatus struct {
	// State is streaming, connecting, waiting (Error says for what), standby (another process streams), stopped, unreachable, or
	// unknown where no source is named.
	State        string    `json:"state"`
	Since        time.Time `json:"since,omitzero"`
	Error        string    `json:"error,omitempty"`
	Hint         string    `json:"hint,omitempty"`
	Address      string    `json:"address"`           // db.example:5432/shop
	Standby      string    `json:"standby,omitempty"` // of the standby that has the slot
	SystemID     string    `json:"system_id"`
	Database     string    `json:"database"`
	Slot         string    `json:"slot"`
	SlotActive   bool      `json:"slot_active"`
	WALLSN       string    `json:"wal_lsn"` // the end of the source's WAL
	ReceivedLSN  string    `json:"received_lsn"`
	ConfirmedLSN string    `json:"confirmed_lsn"`
	RestartLSN   string    `json:"restart_lsn"`
	// LagBytes of WAL may hold changes that are not in the log yet; LagSeconds is how long the oldest of it has been there. A running
	// sidecar knows that to within two seconds.
	LagBytes      int64   `json:"lag_bytes"`
	LagSeconds    float64 `json:"lag_seconds"`
	RetainedBytes int64   `json:"retained_bytes"` // of WAL that the source keeps for the slot
	SafeBytes     int64   `json:"safe_bytes"`     // that may still be written before the slot is lost; -1: without limit
	WALStatus     string  `json:"wal_status"`
	// HeldBack tells why the source keeps so much WAL, where it is much: open transactions, what is not in the log yet.
	HeldBack []string `json:"held_back,omitempty"`
	// NotCaptured are tables that are selected, but that backstory init has not seen yet: made since, or it had no right to publish them.
	NotCaptured []string `json:"not_captured,omitempty"`
	// InsertsOnly are those of them whose inserts are in the log all the same, since their schema is in the publication of inserts.
	InsertsOnly []string `json:"inserts_only,omitempty"`
	// Refused are tables whose UPDATEs and DELETEs Postgres refuses since they are published and have lost their key, and why. A sidecar
	// that has the right takes them out of there within seconds.
	Refused []string `json:"refused,omitempty"`
	// KeyLost are captured tables that had a usable key and have none: only their inserts are captured until backstory init finds one again.
	KeyLost []string `json:"key_lost,omitempty"`
}

// LogStatus is the end of the log.
type LogStatus struct {
	Address    string            `json:"address"`
	Position   eventlog.Position `json:"position"`
	OccurredAt time.Time         `json:"occurred_at,omitzero"` // commit time of the last transaction
	EndLSN     string            `json:"end_lsn"`
	Seal       string            `json:"seal"`
	Gap        string            `json:"gap,omitempty"`
	SizeBytes  int64             `json:"size_bytes"` // on disk, with indexes
	// GrowthBytesPerDay is the share of that which the events of the last 24 hours have; left out while the history is shorter.
	GrowthBytesPerDay int64  `json:"growth_bytes_per_day,omitempty"`
	Error             string `json:"error,omitempty"` // why the log cannot be read now
	Hint              string `json:"hint,omitempty"`
	// Events counts since the start of the process; ApplicationEvents are those of them that the application's transactions made: not existing rows that were
	// taken over, nor what comparisons found, nor gaps. UnattributedShare is the share of these without who and why.
	Events            int64   `json:"events"`
	ApplicationEvents int64   `json:"application_events"`
	UnattributedShare float64 `json:"unattributed_share"`
	FirstSeen         int64   `json:"first_seen"`
	MalformedContext  int64   `json:"malformed_context"`
	// IgnoredContext counts context messages that belong to no transaction: they were not emitted as transactional.
	IgnoredContext int64 `json:"ignored_context"`
}

// ReadStatus asks the source and the log, without a sidecar process. It may hold the replication slot for up to three seconds, to
// see whether there is anything to come: with a process at hand, ask that (Sidecar.Status).
func ReadStatus(ctx context.Context, cfg Config) (*Status, error) {
	cfg = cfg.withDefaults()
	log, err := eventlog.Open(ctx, cfg.Log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	return readStatus(ctx, cfg, log, nil, capture.Look)
}

// readStatus asks the source by Look, or by Glance where a process may want the slot at the same moment.
func readStatus(ctx context.Context, cfg Config, log *eventlog.Log, imp *capture.Import, ask func(context.Context, capture.Config) (*capture.Sight, error)) (*Status, error) {
	h, err := log.Head(ctx)
	if err != nil {
		return nil, err
	}
	st := &Status{Reactors: []sinks.Status{}}
	st.Log = LogStatus{Address: eventlog.Address(cfg.Log.URL), Position: h.Position, OccurredAt: h.OccurredAt, EndLSN: h.EndLSN.String(), Seal: fmt.Sprintf("%x", h.Seal), Gap: h.Gap}
	st.Source.Slot, st.Source.SystemID, st.Source.Database, st.Source.State = h.Slot, h.SystemID, h.Database, "stopped"
	if st.Log.SizeBytes, err = log.Size(ctx); err != nil {
		return nil, err
	}
	st.Log.GrowthBytesPerDay = growth(ctx, log, h, st.Log.SizeBytes)
	tables, err := log.Captured(ctx)
	if err != nil {
		return nil, err
	}
	if st.Source.KeyLost, err = keyLost(ctx, log, tables); err != nil {
		return nil, err
	}
	begun, err := log.Baselines(ctx)
	if err != nil {
		return nil, err
	}
	history, err := log.Histories(ctx, tables)
	if err != nil {
		return nil, err
	}
	st.Baseline = newBaselineStatus(h, tables, begun, history, imp)
	st.Baseline.Comparisons = comparisons(h, tables, begun, cfg.CompareInterval)
	checkpoints, err := log.Checkpoints(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range checkpoints {
		r := sinks.Status{Name: c.Name, State: sinks.StateStopped, Position: c.Position, Checkpoint: c.Position, LagEvents: int64(h.Position - c.Position), Error: c.Error, Since: c.FailedAt}
		switch {
		case c.Paused:
			r.State = sinks.StatePaused
		case c.Running && c.Error != "":
			r.State = sinks.StateRetrying
		case c.Running:
			r.State = sinks.StateRunning
		}
		st.Reactors = append(st.Reactors, r)
	}
	cfg.Capture.Slot = h.Slot
	if cfg.Capture.URL == "" {
		st.Source.State = "unknown"
		return st, nil
	}
	src := st.look(ctx, cfg.Capture, h, ask)
	if src == nil {
		return st, nil
	}
	st.Baseline.changed(ctx, cfg.Capture, tables, begun)
	st.CaughtUp = h.Gap == "" && src.Slot.Exists && (h.EndLSN >= src.WAL || src.Idle)
	switch {
	case st.CaughtUp:
	case !src.Oldest.IsZero():
		st.Source.LagSeconds = max(0, time.Since(src.Oldest).Seconds())
	case src.Slot.Active && !h.UpdatedAt.IsZero(): // its process knows better
		st.Source.LagSeconds = max(0, time.Since(h.UpdatedAt).Seconds())
	}
	switch {
	case src.Slot.Active:
		st.Source.State = "streaming"
	case src.Slot.ConfirmedFlush > h.EndLSN: // or the log has gone on since it was read
		if h, err := log.Head(ctx); err == nil && src.Slot.ConfirmedFlush > h.EndLSN {
			st.CaughtUp = false
			st.Source.Error, st.Source.Hint = "the replication slot "+h.Slot+" was moved by somebody else beyond the end of the log, "+h.EndLSN.String(), eventlog.GapHint
		}
	}
	return st, nil
}

// keyLost gives the tables of which only inserts are captured, although that was different once.
func keyLost(ctx context.Context, log *eventlog.Log, tables []eventlog.Captured) (lost []string, err error) {
	tables = slices.DeleteFunc(slices.Clone(tables), func(c eventlog.Captured) bool { return !c.InsertOnly })
	if len(tables) == 0 {
		return nil, nil
	}
	versions, err := log.Relations(ctx)
	for _, c := range tables {
		if slices.ContainsFunc(versions, func(v eventlog.RelationVersion) bool { return v.OID == c.OID && !v.InsertOnly && len(v.Key) > 0 }) {
			lost = append(lost, c.String())
		}
	}
	return lost, err
}

// growth is the share of the log's bytes that the events of the last 24 hours have; 0 while the history is shorter.
func growth(ctx context.Context, log *eventlog.Log, h *eventlog.Head, size int64) int64 {
	r, err := log.Resolve(ctx, "24 hours ago", eventlog.RevisionOptions{})
	if err != nil || r.Position == 0 {
		return 0
	}
	return int64(float64(size) * float64(h.Position-r.Position) / float64(h.Position))
}

// look asks the source how it stands; nil if it does not answer.
func (st *Status) look(ctx context.Context, c capture.Config, h *eventlog.Head, ask func(context.Context, capture.Config) (*capture.Sight, error)) *capture.Sight {
	s := &st.Source
	s.Address = eventlog.Address(c.URL)
	if c.StandbyURL != "" {
		s.Standby = eventlog.Address(c.StandbyURL)
	}
	src, err := ask(ctx, c)
	if err != nil {
		s.State, s.Error, s.Hint = "unreachable", err.Error(), eventlog.Hint(err)
		return nil
	}
	s.WALLSN, s.ConfirmedLSN, s.RestartLSN = src.WAL.String(), src.Slot.ConfirmedFlush.String(), src.Slot.Restart.String()
	s.ReceivedLSN = max(src.Received, h.EndLSN).String()
	s.SlotActive, s.RetainedBytes, s.SafeBytes, s.WALStatus = src.Slot.Active, src.Slot.RetainedBytes, src.Slot.SafeBytes, src.Slot.WALStatus
	s.NotCaptured, s.InsertsOnly, s.Refused, s.HeldBack = src.NotCaptured, src.InsertsOnly, src.Refused, src.HeldBack
	if !src.Slot.Exists {
		s.Error, s.Hint = "the replication slot "+s.Slot+" does not exist", eventlog.GapHint
	}
	if done := max(h.EndLSN, src.Slot.ConfirmedFlush); src.WAL > done && !src.Idle {
		s.LagBytes = int64(src.WAL - done)
	}
	return src
}

// Status tells what this process is doing. It waits up to a second and a half for changes that were made just before the call. In that time it also looks, for
// up to a second, which open transactions hold back WAL where the source keeps much of it and the role, outside pg_monitor, cannot see when they began.
func (s *Sidecar) Status(ctx context.Context) (*Status, error) {
	until := time.Now().Add(1500 * time.Millisecond)
	var imp *capture.Import
	if r := s.now.Load(); r != nil {
		imp = r.rows
	}
	st, err := readStatus(ctx, s.cfg, s.log, imp, capture.Glance)
	if err != nil {
		// The log cannot be read: what the process itself knows, and what the source says, is still worth having.
		st = &Status{Reactors: []sinks.Status{}}
		st.Log.Address, st.Log.Error, st.Log.Hint = eventlog.Address(s.cfg.Log.URL), err.Error(), eventlog.Hint(err)
		h := s.lag.lastHead()
		st.Source.Slot, st.Source.SystemID, st.Source.Database, st.Source.SafeBytes = s.cfg.Capture.Slot, h.SystemID, h.Database, -1
		st.Log.Position, st.Log.OccurredAt = h.Position, h.OccurredAt
		st.look(ctx, s.cfg.Capture, &h, capture.Glance)
	}
	st.Running = true
	if s.dispatch != nil {
		st.Reactors = s.dispatch.Status()
	}
	s.note(time.Now())
	if st.Source.LagBytes > 0 {
		_, st.Source.LagSeconds = s.lag.behind(time.Now())
	}
	c := s.total()
	st.Log.Events, st.Log.FirstSeen, st.Log.MalformedContext, st.Log.IgnoredContext = c.Events, c.FirstSeen, c.MalformedContext, c.IgnoredContext
	if st.Log.ApplicationEvents = c.ApplicationEvents; c.ApplicationEvents > 0 {
		st.Log.UnattributedShare = float64(c.Unattributed) / float64(c.ApplicationEvents)
	}
	if r := s.now.Load(); r != nil {
		ss := r.stream.State()
		st.Source.State, st.Source.Since = ss.Doing, ss.Since
		if ss.Error != "" {
			st.Source.Error, st.Source.Hint = ss.Error, ss.Hint
		} else if b := s.bad.Load(); b != nil { // what ended the attempt before has not proved to be over
			st.Source.Since, st.Source.Error, st.Source.Hint = b.since, b.err.Error(), eventlog.Hint(b.err)
		}
		st.Source.ReceivedLSN = r.stream.Received().String()
		if wal, err := eventlog.ParseLSN(st.Source.WALLSN); err == nil && ss.Doing == "streaming" {
			for r.stream.Progress() < wal && time.Now().Before(until) && ctx.Err() == nil {
				time.Sleep(20 * time.Millisecond)
			}
			done := r.stream.Progress()
			st.CaughtUp = done >= wal
			st.Source.LagBytes, st.Source.LagSeconds = 0, 0
			if !st.CaughtUp {
				st.Source.LagBytes = int64(wal - done)
				_, st.Source.LagSeconds = s.lag.behind(time.Now())
			}
			st.Log.Position = r.writer.Head().Position
		}
	} else if b := s.bad.Load(); b != nil {
		st.Source.State, st.Source.Since, st.Source.Error, st.Source.Hint = "waiting", b.since, b.err.Error(), eventlog.Hint(b.err)
		if errors.Is(b.err, capture.ErrSlotInUse) {
			st.Source.State = "standby"
		}
	}
	return st, nil
}

// silentAfter is how long a streaming source may say nothing before the process counts as stuck: long before, the stream
// should have connected again.
const silentAfter = 2 * time.Minute

// Live tells whether the process moves or has nothing to do. A source or a log that cannot be reached is no reason to
// restart it; one batch, or the beginning of a stream, that takes more than two minutes is. Reactors have no say in it: they are
// behind the log and try for ever, which their lag shows.
func (s *Sidecar) Live() error {
	if b := s.busy.Load(); b != nil {
		if d := time.Since(b.since); d > s.stuck {
			return fmt.Errorf("for %s it has been %s", d.Round(time.Second), b.what)
		}
	}
	if r := s.now.Load(); r != nil && r.stream.State().Doing == "streaming" {
		if d := time.Since(r.stream.LastSeen()); d > silentAfter && s.busy.Load() == nil {
			return fmt.Errorf("the source has been silent for %s", d.Round(time.Second))
		}
	}
	return nil
}

// Ready tells whether row changes flow into the log.
func (s *Sidecar) Ready() error {
	if b := s.bad.Load(); b != nil {
		return b.err
	}
	r := s.now.Load()
	if r == nil {
		return errors.New("starting")
	}
	if st := r.stream.State(); st.Doing != "streaming" {
		if st.Error != "" {
			return fmt.Errorf("%s: %s", st.Doing, st.Error)
		}
		return errors.New(st.Doing)
	}
	return nil
}
