package capture

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// The event trigger, which init makes if it is asked to. The stream does not tell of ALTER TABLE, only of the shape of the next row change,
// and looking at the catalogue shows what has happened some seconds later. An event trigger is called at the end of each command that
// defines something (PostgreSQL manual, Event Triggers): ours leaves in the WAL, as a message of the very transaction, how the published tables
// are that the command has altered, or which ones were dropped. So each shape holds from an exact place on, between the row
// changes of the same transaction too, and a stream that is hours behind the catalogue describes its rows by what was true then.
//
// It cannot make a command of the application fail: whatever goes wrong in it becomes a warning. It runs with the rights of who made it, and does
// nothing but read the catalogue and write that message.

// ddlPrefix is that of the event trigger's messages.
const ddlPrefix = "backstory.ddl"

// ddlEnd follows each message. The server takes the end of a message for its place, which is where the next record of the WAL begins: a row change that
// followed at once, of the transaction around a subtransaction (and the handler of an exception is one), could come before it.
const ddlEnd = `
    PERFORM pg_logical_emit_message(true, '` + ddlPrefix + `', '');`

// ddlName is the schema of the event triggers' functions.
func (c Config) ddlName() string { return c.Publication + "_ddl" }

// ddlTriggers are the names of the event triggers, in their order.
func (c Config) ddlTriggers() []string {
	return []string{c.Publication + "_ddl", c.Publication + "_drop", c.Publication + "_rewrite"}
}

// ddlVersion is an expression for the versions of the event triggers: another text when they were disabled meanwhile, or made anew.
func (c Config) ddlVersion() string {
	var names []string
	for _, n := range c.ddlTriggers() {
		names = append(names, eventlog.QuoteLiteral(n))
	}
	return "coalesce((SELECT string_agg(g.oid || ':' || g.xmin || ':' || g.evtenabled::text, ' ' ORDER BY g.evtname) FROM pg_event_trigger g WHERE g.evtname IN (" + strings.Join(names, ", ") + ")), '')"
}

// ddlSecret is the table that holds what shows a message to be of the event triggers: anybody can leave one in the WAL. The functions can read it, and the
// sidecar's role.
func (c Config) ddlSecret() string {
	return eventlog.QuoteQualified(c.ddlName(), "secret")
}

// ddlFunction wraps what a function does: errors become a warning.
func ddlFunction(declare, do string) string {
	return `
DECLARE` + declare + `
BEGIN` + do + `
EXCEPTION WHEN OTHERS THEN
  RAISE WARNING 'backstory: the place of this change in the history will not be exact: %', SQLERRM;
END
`
}

// ddlTell leaves a message: the members of a JSON object.
func (c Config) ddlTell(members string) string {
	return `
    PERFORM pg_logical_emit_message(true, '` + ddlPrefix + `', convert_to(json_build_object('secret', (SELECT value FROM ` + c.ddlSecret() + `), ` + members + `)::text, 'UTF8'));` + ddlEnd
}

// ddlBody is the body of the function that tells of altered tables, on a server of a version.
//
// It tells of the published tables that the command names, and of those of whose description the catalogue has rows that this transaction has written
// since it was last called: a dropped constraint leaves none. Which rows a transaction writes is told by their xmin, if that is in progress, and in which
// order by their cmin (PostgreSQL manual, System Columns). It locks no table.
func (c Config) ddlBody(version int) string {
	publications := eventlog.QuoteLiteral(c.Publication) + ", " + eventlog.QuoteLiteral(c.InsertPublication())
	published := `SELECT r.prrelid FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid WHERE p.pubname IN (` + publications + `)`
	if version >= 150000 {
		published += `
      UNION SELECT m.oid FROM pg_publication p JOIN pg_publication_namespace r ON r.pnpubid = p.oid JOIN pg_class m ON m.relnamespace = r.pnnspid WHERE p.pubname IN (` + publications + `)`
	}
	written := func(alias string) string {
		return strings.ReplaceAll(`CASE WHEN age(@.xmin) BETWEEN age(own) - 1000000000 AND age(own) AND @.cmin::text::bigint > seen
          THEN pg_xact_status((top - top % 4294967296 + @.xmin::text::bigint + CASE WHEN @.xmin::text::bigint < top % 4294967296 THEN 4294967296 ELSE 0 END)::text::xid8) = 'in progress' ELSE false END`, "@", alias)
	}
	last := func(alias, from string) string {
		return `SELECT ` + alias + `.cmin::text::bigint ` + from + written(alias)
	}
	return ddlFunction(`
  own xid;
  top bigint;
  seen bigint := -1;
  latest bigint;
  told record;`, `
  IF tg_tag ~ '^(CREATE|GRANT|REVOKE|COMMENT|SECURITY LABEL|REFRESH|IMPORT|REINDEX) ?' OR pg_current_xact_id_if_assigned() IS NULL THEN
    RETURN;
  END IF;
  own := pg_current_xact_id_if_assigned()::xid;
  top := pg_current_xact_id_if_assigned()::text::bigint;
  IF split_part(current_setting('backstory.ddl_seen', true), ' ', 1) = top::text THEN
    seen := split_part(current_setting('backstory.ddl_seen', true), ' ', 2)::bigint;
  END IF;
  latest := seen;
  FOR told IN
    SELECT c.oid, n.nspname, c.relname, c.relreplident, w.at
    FROM (`+published+`) p(oid) JOIN pg_class c ON c.oid = p.oid JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_class rc ON c.relispartition AND rc.oid = pg_partition_root(c.oid) LEFT JOIN pg_namespace rn ON rn.oid = rc.relnamespace
    CROSS JOIN LATERAL (SELECT max(s.at) AS at FROM (
      `+last("c", "WHERE ")+` UNION ALL `+last("n", "WHERE ")+` UNION ALL `+last("rc", "WHERE ")+` UNION ALL `+last("rn", "WHERE ")+`
      UNION ALL `+last("a", "FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND ")+`
      UNION ALL `+last("i", "FROM pg_index i WHERE i.indrelid = c.oid AND ")+`) s(at)) w
    WHERE c.relkind = 'r' AND (w.at IS NOT NULL OR EXISTS (SELECT FROM pg_event_trigger_ddl_commands() d WHERE d.classid = 'pg_class'::regclass AND d.objid IN (c.oid, rc.oid)))
  LOOP`+c.ddlTell(`'oid', told.oid::bigint, 'schema', told.nspname, 'name', told.relname, 'identity', told.relreplident::text, 'trigger', `+c.ddlVersion()+`,
      'columns', (SELECT coalesce(json_agg(d), '[]') FROM (`+describedColumns("told.oid", "0")+`) d)`)+`
    latest := greatest(latest, told.at);
  END LOOP;
  PERFORM set_config('backstory.ddl_seen', top || ' ' || latest, true);`)
}

// ddlDropped is the body of the function that tells of dropped tables.
func (c Config) ddlDropped() string {
	return ddlFunction(`
  gone json;`, `
  SELECT json_agg(objid::bigint) INTO gone FROM pg_event_trigger_dropped_objects() WHERE object_type = 'table' AND NOT is_temporary;
  IF gone IS NOT NULL THEN`+c.ddlTell(`'dropped', gone`)+`
  END IF;`)
}

// ddlRewritten is the body of the function that tells of a table that is rewritten: not where only its persistence or its access method changes
// (PostgreSQL manual, Event Trigger Functions).
func (c Config) ddlRewritten() string {
	return ddlFunction("", `
  IF pg_event_trigger_table_rewrite_reason() & 6 <> 0 THEN`+c.ddlTell(`'rewritten', pg_event_trigger_table_rewrite_oid()::bigint`)+`
  END IF;`)
}

// ddlPath is the functions' search_path. They run as a superuser: what is looked for without a schema must never be found in the caller's temporary one,
// which is searched first where it is not named (PostgreSQL manual, CREATE FUNCTION, Writing SECURITY DEFINER Functions Safely).
const ddlPath = "pg_catalog, pg_temp"

// printing are the settings that change how values and names are printed, as clauses of CREATE FUNCTION, and their search_path.
func printing() string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(eventlog.SessionSettings)) {
		switch {
		case strings.HasSuffix(name, "_timeout"), strings.HasPrefix(name, "default_"), name == "client_encoding":
		case name == "search_path":
			out = append(out, "SET "+name+" = "+ddlPath)
		case name == "DateStyle":
			out = append(out, "SET "+name+" = "+eventlog.SessionSettings[name])
		default:
			out = append(out, "SET "+name+" = "+eventlog.QuoteLiteral(eventlog.SessionSettings[name]))
		}
	}
	return strings.Join(out, " ")
}

// eventTrigger is one of ours.
type eventTrigger struct {
	Name    string
	Enabled string // pg_event_trigger.evtenabled; empty: there is none
	body    string
	current bool // it is as we would make it
}

// readTriggers tells of all of ours, in their order, on a server of a version.
func (c Config) readTriggers(ctx context.Context, conn *pgx.Conn, version int) ([]eventTrigger, error) {
	rows, err := conn.Query(ctx, `SELECT n, coalesce(g.evtenabled::text, ''), CASE WHEN p.prosecdef AND 'search_path=`+ddlPath+`' = ANY (p.proconfig) THEN p.prosrc ELSE '' END FROM unnest($1::text[]) WITH ORDINALITY x(n, i)
		LEFT JOIN pg_event_trigger g ON g.evtname = n LEFT JOIN pg_proc p ON p.oid = g.evtfoid ORDER BY i`, c.ddlTriggers())
	if err != nil {
		return nil, fmt.Errorf("look for the event triggers: %w", err)
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (t eventTrigger, err error) {
		return t, row.Scan(&t.Name, &t.Enabled, &t.body)
	})
	if err != nil {
		return nil, fmt.Errorf("look for the event triggers: %w", err)
	}
	for i, body := range []string{c.ddlBody(version), c.ddlDropped(), c.ddlRewritten()} {
		list[i].current = list[i].body == body
	}
	return list, nil
}

// eventTriggers finds those that do not work, where somebody has made them.
func (x *examination) eventTriggers(ctx context.Context) error {
	triggers, err := x.readTriggers(ctx, x.conn, x.sv.Version)
	if err != nil || !slices.ContainsFunc(triggers, func(t eventTrigger) bool { return t.Enabled != "" }) {
		return err
	}
	var may bool
	if err := x.conn.QueryRow(ctx, mayRead, eventlog.QuoteIdent(x.ddlName()), x.sv.Role).Scan(&may); err != nil {
		return fmt.Errorf("look for the event triggers: %w", err)
	}
	if !may {
		x.add(Finding{Check: "ddl-trigger", Severity: Warning, What: "role " + x.sv.Role + " may not read " + x.ddlName() + ".secret, which shows what the event triggers say to be theirs", Risk: "what they say counts for nothing",
			SQL: x.ddlGrant(x.sv.Role), Remedy: "as a superuser", Cost: "none"})
	}
	const risk = "what ALTER TABLE and DROP TABLE do has its place in the history to some seconds only"
	var off []string // where the setting event_triggers, of 17 and later, is off for every session
	rows, err := x.conn.Query(ctx, `SELECT coalesce('role ' || quote_ident(r.rolname), 'every role') || coalesce(' in database ' || quote_ident(d.datname), '')
		FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole LEFT JOIN pg_database d ON d.oid = s.setdatabase CROSS JOIN unnest(s.setconfig) c(setting)
		WHERE (s.setdatabase = 0 OR d.datname = current_database()) AND split_part(c.setting, '=', 1) = 'event_triggers' AND NOT split_part(c.setting, '=', 2)::bool
		UNION ALL SELECT 'the server' FROM pg_settings WHERE name = 'event_triggers' AND reset_val = 'off' AND source IN ('configuration file', 'command line', 'environment variable') ORDER BY 1`)
	if err == nil {
		off, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil {
		return fmt.Errorf("look for the event triggers: %w", err)
	}
	if len(off) > 0 {
		x.add(Finding{Check: "ddl-trigger", Severity: Warning, What: "event_triggers is off for " + strings.Join(off, ", "), Risk: risk, Remedy: "reset it (ALTER ROLE … RESET event_triggers; likewise DATABASE and SYSTEM)"})
	}
	for _, t := range triggers {
		f := Finding{Check: "ddl-trigger", Severity: Warning, Risk: risk, Cost: "each ALTER TABLE or DROP TABLE takes some milliseconds longer"}
		switch {
		case t.Enabled == "":
			f.What, f.Remedy = "event trigger "+t.Name+" is gone", "backstory init --ddl-trigger"
		case t.Enabled == "D":
			f.What, f.SQL = "event trigger "+t.Name+" is disabled", "ALTER EVENT TRIGGER "+eventlog.QuoteIdent(t.Name)+" ENABLE ALWAYS;"
		case t.Enabled != "A":
			f.What, f.SQL = "event trigger "+t.Name+" is not enabled for every session", "ALTER EVENT TRIGGER "+eventlog.QuoteIdent(t.Name)+" ENABLE ALWAYS;"
		case !t.current:
			f.What, f.Remedy = "event trigger "+t.Name+" was made by another version of backstory", "backstory init --ddl-trigger"
		default:
			continue
		}
		x.add(f)
	}
	return nil
}

// mayRead asks whether a role, the second argument, may read the secret in a schema, the first.
const mayRead = `SELECT coalesce(has_schema_privilege($2, to_regnamespace($1)::oid, 'USAGE') AND has_table_privilege($2, c.oid, 'SELECT'), false)
	FROM (SELECT) x LEFT JOIN pg_class c ON c.relname = 'secret' AND c.relnamespace = to_regnamespace($1)`

// ddlGrant lets a role read the secret.
func (c Config) ddlGrant(role string) string {
	role = eventlog.QuoteIdent(role)
	return "GRANT USAGE ON SCHEMA " + eventlog.QuoteIdent(c.ddlName()) + " TO " + role + "; GRANT SELECT ON " + c.ddlSecret() + " TO " + role + ";"
}

// ddlReader finds the role that the sidecar connects as, which has to read the secret: p.DDLReader. A superuser who makes the event triggers mostly is
// another one. The sidecar's role uses the slot, or else it owns the log, or else, which is the case of few others, the publications.
func (c Config) ddlReader(ctx context.Context, conn *pgx.Conn, p *Plan) error {
	p.DDLReader = p.Role
	if !p.Superuser {
		return nil
	}
	pid := 0
	if c.StandbyURL == "" {
		pid = p.Slot.ActivePID
	}
	var uses, owns, publishes string
	err := conn.QueryRow(ctx, `SELECT coalesce((SELECT usename::text FROM pg_stat_activity WHERE pid = $1), ''), coalesce((SELECT pg_get_userbyid(nspowner)::text FROM pg_namespace WHERE nspname = 'backstory'), ''),
		coalesce((SELECT pg_get_userbyid(pubowner)::text FROM pg_publication WHERE pubname = $2), '')`, pid, c.Publication).Scan(&uses, &owns, &publishes)
	if err != nil {
		return fmt.Errorf("look for the role of the sidecar: %w", err)
	}
	for _, as := range []struct{ role, why string }{{uses, "since it uses the replication slot"}, {owns, "since it owns the event log"}, {publishes, "since it owns publication " + c.Publication}} {
		if as.role != "" {
			p.DDLReader, p.DDLReaderWhy = as.role, as.why
			return nil
		}
	}
	return nil
}

// ddlSQL works out which statements make the event triggers, or remove them (Config.DDLTrigger): p.DDL.
func (c Config) ddlSQL(ctx context.Context, conn *pgx.Conn, p *Plan) error {
	if p.DDLTrigger = c.DDLTrigger; p.DDLTrigger == nil {
		return nil
	}
	schema := eventlog.QuoteIdent(c.ddlName())
	triggers, err := c.readTriggers(ctx, conn, p.Server.Version)
	if err != nil {
		return err
	}
	if err := conn.QueryRow(ctx, `SELECT rolsuper FROM pg_roles WHERE rolname = current_user`).Scan(&p.Superuser); err != nil {
		return fmt.Errorf("look for the event triggers: %w", err)
	}
	if *c.DDLTrigger {
		if err := c.ddlReader(ctx, conn, p); err != nil {
			return err
		}
	}
	if *c.DDLTrigger && !slices.ContainsFunc(triggers, func(t eventTrigger) bool { return !t.current || t.Enabled != "A" }) {
		var may bool
		if err := conn.QueryRow(ctx, mayRead, eventlog.QuoteIdent(c.ddlName()), p.DDLReader).Scan(&may); err != nil {
			return fmt.Errorf("look for the event triggers: %w", err)
		}
		if !may {
			p.DDL = append(p.DDL, c.ddlGrant(p.DDLReader))
		}
		return nil
	}
	var schemaThere bool
	if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner WHERE n.nspname = $1 AND r.rolsuper)`, c.ddlName()).Scan(&schemaThere); err != nil {
		return fmt.Errorf("look for the event triggers: %w", err)
	}
	add := func(sql string) { p.DDL = append(p.DDL, sql) }
	for _, t := range triggers {
		if t.Enabled != "" {
			add("DROP EVENT TRIGGER " + eventlog.QuoteIdent(t.Name) + ";")
		}
	}
	if schemaThere {
		add("DROP FUNCTION IF EXISTS " + schema + ".altered(), " + schema + ".dropped(), " + schema + ".rewritten();")
	}
	if !*c.DDLTrigger {
		if schemaThere {
			add("DROP TABLE IF EXISTS " + c.ddlSecret() + ";")
			add("DROP SCHEMA " + schema + ";")
		}
		return nil
	}
	if !schemaThere {
		add("CREATE SCHEMA " + schema + ";")
	}
	add("CREATE TABLE IF NOT EXISTS " + c.ddlSecret() + " AS SELECT gen_random_uuid()::text AS value;")
	add(c.ddlGrant(p.DDLReader))
	for i, f := range []struct{ name, body, on string }{{"altered", c.ddlBody(p.Server.Version), "ddl_command_end"}, {"dropped", c.ddlDropped(), "sql_drop"}, {"rewritten", c.ddlRewritten(), "table_rewrite"}} {
		name := eventlog.QuoteIdent(c.ddlTriggers()[i])
		add("CREATE FUNCTION " + schema + "." + f.name + "() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER " + printing() + " AS $backstory$" + f.body + "$backstory$;")
		add("CREATE EVENT TRIGGER " + name + " ON " + f.on + " EXECUTE FUNCTION " + schema + "." + f.name + "();")
		add("ALTER EVENT TRIGGER " + name + " ENABLE ALWAYS;")
	}
	return nil
}

// ddlMessage is what the event trigger has to say.
type ddlMessage struct {
	Secret   string            `json:"secret"`
	OID      uint32            `json:"oid"`
	Schema   string            `json:"schema"`
	Name     string            `json:"name"`
	Identity string            `json:"identity"`
	Trigger  string            `json:"trigger"` // ddlVersion
	Columns  []describedColumn `json:"columns"`
	Dropped  []uint32          `json:"dropped"`
	// Rewritten is a table that the command is about to rewrite whose definition comes next.
	Rewritten uint32 `json:"rewritten"`
}

// readSecret reads what shows a message to be of the event triggers; empty: there are none, or the role may not know it.
func (x *session) readSecret(ctx context.Context) (secret string, err error) {
	err = x.sql.QueryRow(ctx, `SELECT value FROM `+x.cfg.ddlSecret()).Scan(&secret)
	switch eventlog.SQLState(err) {
	case "42P01", "3F000": // undefined_table, invalid_schema_name
		return "", nil
	case "42501": // insufficient_privilege
		if !x.secretMissed {
			x.cfg.Logger.Warn("what the event triggers say counts for nothing: this role may not read "+x.cfg.ddlSecret(), "remedy", "backstory doctor prints the GRANT that a superuser has to run")
			x.secretMissed = true
		}
		return "", nil
	}
	if errors.Is(err, pgx.ErrNoRows) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("look for the event triggers: %w", err)
	}
	return secret, nil
}

// secretEvery is how often the secret is read anew at most: anybody can leave messages that do not have it.
const secretEvery = time.Second

// readAgain reads the secret anew, since a message has another one: init may have made the event triggers meanwhile. What goes wrong costs the exact
// place of an alteration, and nothing else.
func (x *session) readAgain() {
	if x.sql == nil || time.Since(x.secretRead) < secretEvery || x.ask() != nil {
		return
	}
	x.secretRead = time.Now()
	ctx, cancel := context.WithTimeout(x.ctx, time.Second) // somebody's lock on that table holds nothing up
	defer cancel()
	secret, err := x.readSecret(ctx)
	switch {
	case err == nil:
		x.secret = secret
	case ctx.Err() == nil && !x.secretMissed:
		x.cfg.Logger.Warn("it could not be looked for the event triggers: ALTER TABLE and DROP TABLE have their places in the history to some seconds only", "err", err)
		x.secretMissed = true
	}
}

// defined takes a message of the event trigger. One of a table that is not captured means nothing, and neither does one that somebody else has
// left.
func (x *session) defined(content []byte) {
	if len(content) == 0 { // ddlEnd
		return
	}
	var m ddlMessage
	if err := json.Unmarshal(content, &m); err != nil || m.Secret == "" {
		return
	}
	if m.Secret != x.secret {
		x.readAgain()
	}
	if m.Secret != x.secret {
		return
	}
	for _, oid := range m.Dropped {
		if cap, ok := x.captured[oid]; ok {
			gone := *cap.Relation
			gone.Dropped = true
			delete(x.relations, oid)
			delete(x.definitions, oid)
			x.batch.Add(eventlog.Item{Kind: eventlog.ItemDefinition, Relation: &gone})
		}
	}
	if m.Rewritten != 0 {
		x.rewritten = append(x.rewritten, m.Rewritten)
	}
	cap, ok := x.captured[m.OID]
	if !ok || len(m.Identity) != 1 {
		return
	}
	r := &eventlog.Relation{OID: m.OID, Schema: m.Schema, Name: m.Name, ReplicaIdentity: m.Identity[0], InsertOnly: cap.InsertOnly, Told: true}
	fillIn(r, m.Columns, nil)
	if x.definitions == nil {
		x.definitions = map[uint32]*ddlMessage{}
	}
	x.definitions[m.OID] = &m
	x.batch.Add(eventlog.Item{Kind: eventlog.ItemDefinition, Relation: r, Rewritten: slices.Contains(x.rewritten, m.OID)})
	x.rewritten = slices.DeleteFunc(x.rewritten, func(oid uint32) bool { return oid == m.OID })
	// What comes of it without another description is of this shape, too.
	if old := x.relations[m.OID]; old != nil && slices.EqualFunc(old.Columns, r.Columns, func(a, b eventlog.Column) bool {
		return a.Name == b.Name && a.Type.OID == b.Type.OID && a.Identity == b.Identity
	}) && old.ReplicaIdentity == r.ReplicaIdentity {
		x.relations[m.OID] = r
	}
}

// toldBy gives what the event trigger has said of a table, if the stream's description of it is of that shape, and nobody can have altered
// it since without the event trigger.
func (x *session) toldBy(oid uint32, identity byte, stream []relationColumn) (*ddlMessage, error) {
	d := x.definitions[oid]
	if d == nil || d.Identity != string(identity) {
		return nil, nil
	}
	if !sameColumns(d.Columns, stream) {
		return nil, nil
	}
	var now string
	if err := x.sql.QueryRow(x.ctx, "SELECT "+x.cfg.ddlVersion()).Scan(&now); err != nil {
		return nil, fmt.Errorf("look for the event trigger: %w", err)
	}
	if now != d.Trigger {
		return nil, nil
	}
	return d, nil
}
