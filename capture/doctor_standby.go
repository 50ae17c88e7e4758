package capture

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backstory-dev/backstory/eventlog"
)

// hosts are connections to each of the servers that the source's URL names, of whatever role they are now.
func (c Config) hosts() (names []string, configs []*pgx.ConnConfig, err error) {
	cfg, err := eventlog.ConnConfig(c.URL, "backstory doctor")
	if err != nil {
		return nil, nil, err
	}
	for _, f := range append([]*pgconn.FallbackConfig{{Host: cfg.Host, Port: cfg.Port, TLSConfig: cfg.TLSConfig}}, cfg.Fallbacks...) {
		name := net.JoinHostPort(f.Host, fmt.Sprint(f.Port))
		if slices.Contains(names, name) { // with TLS and without
			continue
		}
		one := cfg.Copy()
		one.Host, one.Port, one.TLSConfig, one.Fallbacks, one.ValidateConnect = f.Host, f.Port, f.TLSConfig, nil, nil
		for _, g := range cfg.Fallbacks {
			if g.Host == f.Host && g.Port == f.Port {
				one.Fallbacks = append(one.Fallbacks, g)
			}
		}
		names, configs = append(names, name), append(configs, one)
	}
	return names, configs, nil
}

// otherHosts looks at the standbys that the source's URL names: whether a failover to them would be one without a gap (17 and later; PostgreSQL
// manual, Logical Replication Failover).
func (x *examination) otherHosts(ctx context.Context) error {
	names, configs, err := x.hosts()
	if err != nil || len(names) < 2 {
		return err
	}
	for i, cfg := range configs {
		if err := x.otherHost(ctx, names[i], cfg); err != nil {
			return err
		}
	}
	return nil
}

func (x *examination) otherHost(ctx context.Context, name string, cfg *pgx.ConnConfig) error {
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	add := func(what, remedy string) {
		x.add(Finding{Check: "standby", Severity: Warning, What: name + " " + what, Risk: "after a failover to it the slot is gone, or the sidecar does not come along: a gap", Remedy: remedy})
	}
	conn, err := pgx.ConnectConfig(short, cfg)
	if err != nil {
		add("cannot be reached: "+eventlog.ConnError(err).Error(), "start it, or take it out of BACKSTORY_SOURCE_URL")
		return nil
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var standby bool
	var version int
	err = conn.QueryRow(short, `SELECT pg_is_in_recovery(), current_setting('server_version_num')::int`).Scan(&standby, &version)
	if err != nil || !standby || version < 170000 || x.slot == nil || !x.slot.Failover {
		return err
	}
	for _, s := range []struct{ name, value string }{{"sync_replication_slots", "on"}, {"hot_standby_feedback", "on"}} {
		var is string
		if err := conn.QueryRow(short, `SELECT current_setting($1)`, s.name).Scan(&is); err != nil {
			return fmt.Errorf("ask %s: %w", name, err)
		}
		if is != s.value {
			add("has "+s.name+" = "+is, "on it: ALTER SYSTEM SET "+s.name+" = "+s.value+"; SELECT pg_reload_conf();")
		}
	}
	var slot, primary string
	if err := conn.QueryRow(short, `SELECT current_setting('primary_slot_name'), coalesce((SELECT setting FROM pg_settings WHERE name = 'primary_conninfo'), 'dbname')`).Scan(&slot, &primary); err != nil {
		return fmt.Errorf("ask %s: %w", name, err)
	}
	if slot == "" {
		add("has no primary_slot_name", "on it: ALTER SYSTEM SET primary_slot_name = 'its physical slot at the primary'; SELECT pg_reload_conf();")
	}
	if !strings.Contains(primary, "dbname") {
		add("has no dbname in primary_conninfo", "add dbname="+x.sv.Database+" to primary_conninfo on it, and SELECT pg_reload_conf();")
	}
	var state string
	err = conn.QueryRow(short, `SELECT coalesce((SELECT CASE WHEN invalidation_reason IS NOT NULL THEN 'has lost replication slot ' || slot_name || ': ' || invalidation_reason
		WHEN NOT synced THEN 'has a replication slot ' || slot_name || ' of its own, in the place of that of the primary'
		WHEN temporary THEN 'has not copied replication slot ' || slot_name || ' yet: it is behind what the slot needs' ELSE '' END
		FROM pg_replication_slots WHERE slot_name = $1), 'does not have replication slot ' || $1)`, x.Slot).Scan(&state)
	if err != nil {
		return fmt.Errorf("ask %s: %w", name, err)
	}
	if state != "" {
		add(state, "see to the settings that copying it takes (README, What Postgres needs); the server's log on it says why it was not copied. It can take a minute")
	}
	return nil
}
