package capture

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory/eventlog"
)

// The event trigger, which init makes if it is asked to. The stream does not tell of ALTER TABLE, only of the shape of the next row change,
// and looking at the catalogue shows what has happened some seconds later. An event trigger is called at the end of each command that
// defines something (PostgreSQL manual, Event Triggers): ours leaves in the WAL, as a message of the very transaction, how the published tables
// are that the transaction has altered so far, or which ones were dropped. So each shape holds from an exact place on, between the row
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

// ddlBody is the body of the function that tells of altered tables.
func (c Config) ddlBody() string {
	publications := eventlog.QuoteLiteral(c.Publication) + ", " + eventlog.QuoteLiteral(c.InsertPublication())
	// A row of the catalogue that the transaction has written, or one of its subtransactions, or perhaps another one since: of a table that
	// is as it was nothing is recorded.
	written := func(alias string) string { return "age(" + alias + ".xmin) <= age(own)" }
	return `
DECLARE
  own xid := pg_current_xact_id_if_assigned()::xid;
  told text;
BEGIN
  IF own IS NULL OR tg_tag ~ '^(CREATE|GRANT|REVOKE|COMMENT|SECURITY LABEL|REFRESH|IMPORT|REINDEX) ?' THEN
    RETURN;
  END IF;
  FOR told IN
    SELECT json_build_object('oid', c.oid::bigint, 'schema', n.nspname, 'name', c.relname, 'identity', c.relreplident::text, 'trigger', ` + c.ddlVersion() + `,
      'columns', (SELECT coalesce(json_agg(d), '[]') FROM (` + describedColumns("x.oid", "0") + `) d))::text
    FROM (SELECT DISTINCT schemaname, tablename FROM pg_publication_tables WHERE pubname IN (` + publications + `)) p
    JOIN pg_namespace n ON n.nspname = p.schemaname JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
    CROSS JOIN LATERAL (SELECT c.oid) x -- the alias c means another one where columns are described
    WHERE c.relkind = 'r'
      AND (` + written("c") + ` OR ` + written("n") + `
        OR EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND ` + written("a") + `)
        OR EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND ` + written("i") + `))
  LOOP
    PERFORM pg_logical_emit_message(true, '` + ddlPrefix + `', convert_to(told, 'UTF8'));` + ddlEnd + `
  END LOOP;
EXCEPTION WHEN OTHERS THEN
  RAISE WARNING 'backstory: the place of this change in the history will not be exact: %', SQLERRM;
END
`
}

// ddlDropped is the body of the function that tells of dropped tables.
const ddlDropped = `
DECLARE
  gone json := (SELECT json_agg(objid::bigint) FROM pg_event_trigger_dropped_objects() WHERE object_type = 'table' AND NOT is_temporary);
BEGIN
  IF gone IS NOT NULL THEN
    PERFORM pg_logical_emit_message(true, '` + ddlPrefix + `', convert_to(json_build_object('dropped', gone)::text, 'UTF8'));` + ddlEnd + `
  END IF;
EXCEPTION WHEN OTHERS THEN
  RAISE WARNING 'backstory: the place of this change in the history will not be exact: %', SQLERRM;
END
`

// ddlRewritten is the body of the function that tells of a table that is rewritten: not where only its persistence or its access method changes
// (PostgreSQL manual, Event Trigger Functions).
const ddlRewritten = `
BEGIN
  IF pg_event_trigger_table_rewrite_reason() & 6 <> 0 THEN
    PERFORM pg_logical_emit_message(true, '` + ddlPrefix + `', convert_to(json_build_object('rewritten', pg_event_trigger_table_rewrite_oid()::bigint)::text, 'UTF8'));` + ddlEnd + `
  END IF;
EXCEPTION WHEN OTHERS THEN
  RAISE WARNING 'backstory: the place of this change in the history will not be exact: %', SQLERRM;
END
`

// printing are the settings that change how values and names are printed, as clauses of CREATE FUNCTION.
func printing() string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(eventlog.SessionSettings)) {
		switch {
		case strings.HasSuffix(name, "_timeout"), strings.HasPrefix(name, "default_"), name == "client_encoding":
		case name == "search_path" || name == "DateStyle":
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
	Body    string
	current bool // it is as we would make it
}

// readTriggers tells of all of ours, in their order.
func (c Config) readTriggers(ctx context.Context, conn *pgx.Conn) ([]eventTrigger, error) {
	rows, err := conn.Query(ctx, `SELECT n, coalesce(g.evtenabled::text, ''), coalesce(p.prosrc, '') FROM unnest($1::text[]) WITH ORDINALITY x(n, i)
		LEFT JOIN pg_event_trigger g ON g.evtname = n LEFT JOIN pg_proc p ON p.oid = g.evtfoid ORDER BY i`, c.ddlTriggers())
	if err != nil {
		return nil, fmt.Errorf("look for the event triggers: %w", err)
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (t eventTrigger, err error) {
		return t, row.Scan(&t.Name, &t.Enabled, &t.Body)
	})
	if err != nil {
		return nil, fmt.Errorf("look for the event triggers: %w", err)
	}
	for i, body := range []string{c.ddlBody(), ddlDropped, ddlRewritten} {
		list[i].current = list[i].Body == body
	}
	return list, nil
}

// eventTriggers finds those that do not work, where somebody has made them.
func (x *examination) eventTriggers(ctx context.Context) error {
	triggers, err := x.readTriggers(ctx, x.conn)
	if err != nil || !slices.ContainsFunc(triggers, func(t eventTrigger) bool { return t.Enabled != "" }) {
		return err
	}
	for _, t := range triggers {
		f := Finding{Check: "ddl-trigger", Severity: Warning, Risk: "what ALTER TABLE and DROP TABLE do has its place in the history to some seconds only"}
		switch {
		case t.Enabled == "":
			f.What, f.Remedy = "event trigger "+t.Name+" is gone", "backstory init --ddl-trigger"
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

// ddlSQL works out which statements make the event trigger, or remove it (Config.DDLTrigger).
func (c Config) ddlSQL(ctx context.Context, conn *pgx.Conn, p *Plan) error {
	if c.DDLTrigger == nil {
		return nil
	}
	schema := eventlog.QuoteIdent(c.ddlName())
	triggers, err := c.readTriggers(ctx, conn)
	if err != nil {
		return err
	}
	if err := conn.QueryRow(ctx, `SELECT rolsuper FROM pg_roles WHERE rolname = current_user`).Scan(&p.Superuser); err != nil {
		return fmt.Errorf("look for the event triggers: %w", err)
	}
	if *c.DDLTrigger && !slices.ContainsFunc(triggers, func(t eventTrigger) bool { return !t.current || t.Enabled != "A" }) {
		return nil
	}
	var drop []string
	if slices.ContainsFunc(triggers, func(t eventTrigger) bool { return t.Enabled != "" }) {
		for _, n := range c.ddlTriggers() {
			drop = append(drop, "DROP EVENT TRIGGER IF EXISTS "+eventlog.QuoteIdent(n)+";")
		}
		drop = append(drop, "DROP FUNCTION IF EXISTS "+schema+".altered(), "+schema+".dropped(), "+schema+".rewritten();", "DROP SCHEMA IF EXISTS "+schema+";")
	}
	p.DDL = drop
	if *c.DDLTrigger {
		function := func(name, body string) string {
			return "CREATE FUNCTION " + schema + "." + name + "() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER " + printing() + " AS $backstory$" + body + "$backstory$;"
		}
		p.DDL = append(p.DDL, "CREATE SCHEMA "+schema+";", function("altered", c.ddlBody()), function("dropped", ddlDropped), function("rewritten", ddlRewritten))
		for i, on := range []string{"ddl_command_end EXECUTE FUNCTION " + schema + ".altered();", "sql_drop EXECUTE FUNCTION " + schema + ".dropped();", "table_rewrite EXECUTE FUNCTION " + schema + ".rewritten();"} {
			name := eventlog.QuoteIdent(c.ddlTriggers()[i])
			p.DDL = append(p.DDL, "CREATE EVENT TRIGGER "+name+" ON "+on, "ALTER EVENT TRIGGER "+name+" ENABLE ALWAYS;")
		}
	}
	p.SQL = append(p.SQL, p.DDL...)
	return nil
}

// ddlMessage is what the event trigger has to say.
type ddlMessage struct {
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

// defined takes a message of the event trigger. One of a table that is not captured means nothing, and neither does one that anybody else has
// sent who does not know how.
func (x *session) defined(content []byte) error {
	if len(content) == 0 { // ddlEnd
		return nil
	}
	var m ddlMessage
	if err := json.Unmarshal(content, &m); err != nil {
		x.batch.Ignored++
		return nil
	}
	for _, oid := range m.Dropped {
		if cap, ok := x.captured[oid]; ok {
			gone := *cap.Relation
			gone.Dropped = true
			x.batch.Add(eventlog.Item{Kind: eventlog.ItemDefinition, Relation: &gone})
		}
	}
	if m.Rewritten != 0 {
		x.rewritten = append(x.rewritten, m.Rewritten)
	}
	cap, ok := x.captured[m.OID]
	if !ok || len(m.Identity) != 1 {
		return nil
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
	return nil
}

// toldBy gives what the event trigger has said of a table, if the stream's description of it is of that shape, and nobody can have altered
// it since without the event trigger.
func (x *session) toldBy(oid uint32, identity byte, stream []relationColumn) (*ddlMessage, error) {
	d := x.definitions[oid]
	if d == nil || d.Identity != string(identity) {
		return nil, nil
	}
	var columns []describedColumn
	for _, c := range d.Columns {
		if !c.Generated {
			columns = append(columns, c)
		}
	}
	if !slices.EqualFunc(columns, stream, func(c describedColumn, s relationColumn) bool { return c.Name == s.name && c.Type == s.typeOID }) {
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
