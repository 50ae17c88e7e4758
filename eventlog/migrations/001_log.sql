-- The event log. Design and figures: package eventlog, doc.go.
CREATE SCHEMA IF NOT EXISTS backstory;

CREATE TABLE backstory.migration (
  number     int PRIMARY KEY,
  applied_at timestamptz NOT NULL DEFAULT now()
);

-- Where events come from: one row per lineage (system, database, incarnation) and timeline. tag is the part of the
-- event id that keeps lineages apart.
CREATE TABLE backstory.source (
  id          int PRIMARY KEY,
  system_id   text NOT NULL,
  database    text NOT NULL,
  incarnation int NOT NULL,
  timeline    bigint NOT NULL,
  tag         int NOT NULL UNIQUE,
  sealed_at   bigint NOT NULL,
  UNIQUE (system_id, database, incarnation, timeline)
);

-- Schema history: every version of a captured table. Events are of it from at_position on. At the source it held from some point after
-- after_lsn, and at at_lsn at the latest (the stream tells of a change of shape only with the next row); with the event trigger both are the same.
CREATE TABLE backstory.relation (
  id          int PRIMARY KEY,
  oid         oid NOT NULL,
  schema      text NOT NULL,
  name        text NOT NULL,
  root_oid    oid NOT NULL,      -- of a partition: the partitioned table that its rows belong to; 0: none
  root_schema text NOT NULL,     -- its name; empty: none
  root_name   text NOT NULL,
  columns     json NOT NULL,     -- each with its number, and of a partition with that in its partitioned table, whose order checkouts have
  key         int[] NOT NULL,
  key_deferrable boolean NOT NULL,
  generated   json NOT NULL,     -- columns that the source computes and does not send, and how
  identity    text NOT NULL,
  insert_only boolean NOT NULL,
  complete    boolean NOT NULL,
  dropped     boolean NOT NULL,  -- the table is gone
  after_lsn   pg_lsn NOT NULL,
  at_lsn      pg_lsn NOT NULL,
  at_position bigint NOT NULL,
  sealed_at   bigint NOT NULL
);

CREATE TABLE backstory.aggregate (
  id        int PRIMARY KEY,
  name      text NOT NULL UNIQUE,
  id_type   text NOT NULL,       -- of its entities' keys: bigint for every integer key, the key's own type, or text
  sealed_at bigint NOT NULL
);

-- What events have in common, so that the event itself stays small.
CREATE TABLE backstory.kind (
  id            int PRIMARY KEY,
  source        int NOT NULL REFERENCES backstory.source,
  relation      int REFERENCES backstory.relation,
  aggregate     int NOT NULL REFERENCES backstory.aggregate, -- of the table
  owner         int REFERENCES backstory.aggregate, -- of the entity that rules file the event under; NULL: the row is its own
  type          text NOT NULL,
  op            text NOT NULL,
  quiet         boolean NOT NULL,
  restates      boolean NOT NULL, -- what it says of the row, another event of the same row change says too: no fold takes it for a change
  rules_version int NOT NULL,     -- 1: those of no file
  sealed_at     bigint NOT NULL
);

-- The rules by which row changes became events, from a position on.
CREATE TABLE backstory.rules (
  id          int PRIMARY KEY,   -- kind.rules_version; 1, which has no row, are those of no file
  text        text NOT NULL,     -- of the file, as far as it says what becomes of row changes
  at_position bigint NOT NULL,
  sealed_at   bigint NOT NULL
);

CREATE TABLE backstory.event (
  position    bigint NOT NULL,
  kind        int NOT NULL,
  stream      int NOT NULL,      -- aggregate.id
  id          bigint NOT NULL,   -- the entity's key where that is an integer, otherwise key_hash(id_text)
  id_text     text,              -- NULL where the key is an integer
  row_id      bigint,            -- identity of the row where it is not the entity's key (REPLICA IDENTITY USING INDEX)
  row_text    text,
  old_id      bigint,            -- the entity's key before, where this event changed it
  old_text    text,
  owner       int,               -- aggregate.id, owner_id and owner_text: the entity that rules file the event under, if that is not the row
  owner_id    bigint,
  owner_text  text,
  also        bigint[],          -- link_hash of further entities that it is found under
  occurred_at timestamptz NOT NULL, -- commit time; a gap has that of the commit before it
  commit_lsn  pg_lsn NOT NULL,
  xid         bigint NOT NULL,
  change      bigint NOT NULL,
  part        int NOT NULL,
  data        text,              -- these five are JSON objects. They are text, since reading JSON once more costs a fifth of
  before      text,              -- an append, and a value whose nesting is too deep for this server would stop it for good
  rest        text,              -- the other attributes, as they are after the change, on some updates: so no look-up folds a history
  extra       text,              -- what the rules added to data: these attributes are no columns of the row
  meta        text,              -- what is known of this event alone: first_seen, unknown …
  seal        bytea              -- on the last event of each append: SHA-256 over what was appended and the seal before
) PARTITION BY RANGE (position);

-- Who and why, by ranges of positions. The latest range that begins at or before an event and ends at or after it holds.
CREATE TABLE backstory.context (
  first_position bigint NOT NULL,
  last_position  bigint NOT NULL,
  sealed_at      bigint NOT NULL,
  metadata       json NOT NULL,
  late           boolean NOT NULL DEFAULT false  -- sealed by itself, after the event at sealed_at
);
CREATE UNIQUE INDEX context_first ON backstory.context (first_position);
-- Somebody else's publication FOR ALL TABLES would refuse a DELETE on a table without identity.
ALTER TABLE backstory.context REPLICA IDENTITY USING INDEX context_first;
CREATE INDEX context_sealed ON backstory.context USING brin (sealed_at);

-- The end of the log, and how far the source is in it. Readers see events up to head.position and nothing beyond it;
-- the writer moves it by compare-and-set on (epoch, position).
CREATE TABLE backstory.head (
  one         boolean PRIMARY KEY DEFAULT true CHECK (one),
  epoch       bigint NOT NULL,
  position    bigint NOT NULL,
  written     bigint NOT NULL,   -- rows exist up to here: beyond position, parts of a transaction still coming in
  seal        bytea NOT NULL,
  system_id   text NOT NULL,
  database    text NOT NULL,
  incarnation int NOT NULL,
  timeline    bigint NOT NULL,
  end_lsn     pg_lsn NOT NULL,   -- everything before it is in the log
  commit_lsn  pg_lsn NOT NULL,   -- of the last transaction in the log
  occurred_at timestamptz,       -- its commit time
  slot        text NOT NULL,
  server_version int NOT NULL DEFAULT 0, -- of the source, as server_version_num: its major version; 0: not known
  closed      boolean NOT NULL DEFAULT false, -- the source was shut down when all of it was in the log, and was not streamed from since
  began_at    timestamptz NOT NULL DEFAULT now(), -- from then on everything is in the log; by the source's clock, as occurred_at
  gap         text,              -- why the log must not go on without a person's word
  baseline    boolean NOT NULL DEFAULT true, -- rows that existed before their table was captured are taken over
  tables      text[] NOT NULL DEFAULT '{}', -- patterns by which init selected what is captured, and
  exclude     text[] NOT NULL DEFAULT '{}', -- what is not; tables that are made later are taken in by them
  updated_at  timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

-- The tables that are captured, in their present shape, and whether the log has every row of them. Not history: it is
-- brought up to date by init and by the sidecar.
CREATE TABLE backstory.captured (
  oid         oid PRIMARY KEY,
  schema      text NOT NULL,
  name        text NOT NULL,
  root_oid    oid NOT NULL DEFAULT 0,   -- of a partition: the partitioned table that its rows belong to
  root_schema text NOT NULL DEFAULT '', -- its name
  root_name   text NOT NULL DEFAULT '',
  columns     json NOT NULL,
  key         int[] NOT NULL,
  key_deferrable boolean NOT NULL,
  generated   json NOT NULL,     -- columns that the source computes and does not send, and how
  identity    text NOT NULL,
  insert_only boolean NOT NULL,
  complete    boolean NOT NULL,
  dropped     boolean NOT NULL DEFAULT false, -- the table is gone, and that is to get its place in the log
  since_lsn   pg_lsn NOT NULL,
  published   text NOT NULL DEFAULT '', -- which rows of the source's catalogue publish it, in which version
  catalogue   text NOT NULL DEFAULT ''  -- what describes its columns and its file there
);

-- Partitions that are not captured, of partitioned tables that are: while there are any, the log does not have all rows of those.
CREATE TABLE backstory.left_out (
  oid            oid NOT NULL,
  schema         text NOT NULL,
  name           text NOT NULL,
  root_schema    text NOT NULL,
  root_name      text NOT NULL,
  why            text NOT NULL,
  since_position bigint NOT NULL,  -- where the log ended when that was seen, or not so before
  gone_lsn       pg_lsn,           -- where the source stood when it was so no longer
  until_position bigint,           -- where the log ended when it had come to that
  PRIMARY KEY (oid, since_position)
);

CREATE SEQUENCE backstory.generation;

-- How far the rows that existed before their table was captured have been taken over, in the order of its key. Moved in the
-- transaction that appends a chunk of them.
CREATE TABLE backstory.baseline (
  oid         oid PRIMARY KEY REFERENCES backstory.captured ON DELETE CASCADE,
  since_lsn   pg_lsn NOT NULL,   -- captured.since_lsn at the beginning: if that is another one by now, it begins anew
  wait_for    bigint NOT NULL,   -- the source's transactions below this had begun when the table was taken in, and have to end first
  chunks      bigint NOT NULL DEFAULT 0,
  after_key   text[],            -- of the last row of the last chunk, as the source prints it
  again       boolean NOT NULL DEFAULT false, -- what rows lack that moved to another key meanwhile takes a second pass
  pass        int NOT NULL DEFAULT 1,
  heal        boolean NOT NULL DEFAULT false, -- the table was altered, and all of its rows are compared with the log's
  altered     boolean NOT NULL DEFAULT false, -- … which no event says yet
  began_position bigint NOT NULL DEFAULT 0,   -- of the log, when it began
  generation  bigint NOT NULL DEFAULT nextval('backstory.generation'), -- another one when it begins anew: what was under way before moves nothing
  done_before timestamptz,       -- done_at before the table was altered
  rows        bigint NOT NULL DEFAULT 0,      -- read, in this pass
  bytes       bigint NOT NULL DEFAULT 0,      -- of these rows, as text
  imported    bigint NOT NULL DEFAULT 0,      -- events made of them; of the others the stream had told more by then
  total_rows  bigint NOT NULL,   -- estimates of the table when it began
  total_bytes bigint NOT NULL,
  changes     text NOT NULL DEFAULT '', -- how many updates and deletes the source had counted of the table then
  began_at    timestamptz NOT NULL DEFAULT now(),
  updated_at  timestamptz NOT NULL DEFAULT now(),
  done_at     timestamptz
) WITH (fillfactor = 50);

-- While the existing rows of a table without a key are read: how often a content is there. It is of use for one reading and not kept
-- through a crash. rows: as the log knew it at the position; seen: read, and what the stream has added and taken away since.
CREATE UNLOGGED TABLE backstory.content (
  oid      oid NOT NULL,
  id       uuid NOT NULL,
  rows     bigint NOT NULL,
  seen     bigint NOT NULL DEFAULT 0,
  position bigint NOT NULL,
  chunk    bigint NOT NULL DEFAULT 0, -- that was counted last, and
  skipped  bigint NOT NULL DEFAULT 0, -- how many of its rows the log had
  PRIMARY KEY (oid, id)
);

-- How far each named reader (reactor, projection) is finished.
CREATE TABLE backstory.checkpoint (
  name       text PRIMARY KEY,
  position   bigint NOT NULL,
  epoch      bigint NOT NULL DEFAULT 0,
  paused     boolean NOT NULL DEFAULT false,
  error      text,
  failed_at  timestamptz,
  updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

CREATE FUNCTION backstory.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF current_setting('backstory.maintenance', true) = 'on'
    AND pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'USAGE') THEN
    IF TG_LEVEL = 'STATEMENT' THEN RETURN NULL; END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    RETURN NEW;
  END IF;
  RAISE EXCEPTION 'the event log is append-only: % on %.% refused', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME
    USING ERRCODE = 'insufficient_privilege',
          HINT = 'What was wrong is put right by what comes after it. Where the past itself has to go, its owner can SET backstory.maintenance = on for that.';
END $$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON backstory.event FOR EACH ROW EXECUTE FUNCTION backstory.refuse();
CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON backstory.event FOR EACH STATEMENT EXECUTE FUNCTION backstory.refuse();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON backstory.context FOR EACH STATEMENT EXECUTE FUNCTION backstory.refuse();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON backstory.rules FOR EACH STATEMENT EXECUTE FUNCTION backstory.refuse();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON backstory.kind FOR EACH STATEMENT EXECUTE FUNCTION backstory.refuse();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON backstory.relation FOR EACH STATEMENT EXECUTE FUNCTION backstory.refuse();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON backstory.aggregate FOR EACH STATEMENT EXECUTE FUNCTION backstory.refuse();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON backstory.source FOR EACH STATEMENT EXECUTE FUNCTION backstory.refuse();

-- The writer's step: moves the head, or fails where another writer has moved it.
CREATE FUNCTION backstory.advance(of_epoch bigint, from_written bigint, to_position bigint, to_written bigint, new_seal bytea,
  new_timeline bigint, new_end pg_lsn, new_commit pg_lsn, new_occurred timestamptz) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  UPDATE backstory.head SET position = to_position, written = to_written, seal = new_seal, timeline = new_timeline,
    end_lsn = new_end, commit_lsn = new_commit, occurred_at = new_occurred, updated_at = clock_timestamp()
  WHERE one AND epoch = of_epoch AND written = from_written;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'another backstory has taken over the event log' USING ERRCODE = 'BS001';
  END IF;
END $$;

-- The event's id: a UUID (version 8) that is a function of where the event comes from, and from which that place can be
-- read again: tag 24 bits, commit LSN 56, change 34, part 8.
CREATE FUNCTION backstory.event_id(tag int, commit_lsn pg_lsn, change bigint, part int) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE STRICT AS $$
  SELECT (lpad(to_hex((tag::bigint << 40) | (((l >> 32) & 16777215) << 16) | 32768 | ((l >> 20) & 4095)), 16, '0') ||
          to_hex((-9223372036854775808)::bigint | ((l & 1048575) << 42) | (change << 8) | part))::uuid
  FROM (SELECT (commit_lsn OPERATOR(pg_catalog.-) '0/0'::pg_lsn)::bigint AS l) x
$$;

-- A context with what is known of one event alone. Not by jsonb, which refuses some json (1e999999, half a surrogate pair).
CREATE FUNCTION backstory.merged(context json, own json) RETURNS json LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE WHEN own IS NULL THEN context
              WHEN context IS NULL OR context::text ~ '^\s*\{\s*\}\s*$' THEN own
              ELSE (left(rtrim(context::text, E' \t\r\n'), -1) || ',' || substr(own::text, 2))::json END
$$;

-- The number under which a key that is not an integer is indexed.
CREATE FUNCTION backstory.key_hash(key text) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE STRICT AS $$
  SELECT ('x' || substr(md5(key), 1, 16))::bit(64)::bigint
$$;

-- The number under which an event is found that is filed under another entity, too.
CREATE FUNCTION backstory.link_hash(stream int, key text) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE STRICT AS $$
  SELECT backstory.key_hash(stream || '/' || key)
$$;

CREATE VIEW backstory.events AS
SELECT e.position,
       backstory.event_id(s.tag, e.commit_lsn, e.change, e.part) AS id,
       a.name AS aggregate,
       CASE WHEN e.owner IS NULL THEN coalesce(e.id_text, e.id::text) ELSE coalesce(e.owner_text, e.owner_id::text) END AS aggregate_id,
       k.type,
       CASE k.op WHEN 'i' THEN 'insert' WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' WHEN 't' THEN 'truncate'
                 WHEN 'b' THEN 'import' WHEN 'n' THEN 'note' WHEN 'g' THEN 'gap' END AS op,
       backstory.merged(e.data::json, e.extra::json) AS data, e.before::json AS before,
       backstory.merged(c.metadata, e.meta::json) AS metadata,
       e.occurred_at,
       CASE WHEN r.id IS NULL THEN NULL WHEN r.root_name <> '' THEN r.root_schema || '.' || r.root_name ELSE r.schema || '.' || r.name END AS relation,
       CASE WHEN r.id IS NOT NULL THEN coalesce(e.id_text, e.id::text) END AS key,
       k.source, e.xid, e.commit_lsn, e.change, e.part,
       k.relation AS schema_version, k.rules_version, k.quiet, k.restates,
       CASE WHEN r.root_name <> '' THEN r.schema || '.' || r.name END AS partition
FROM backstory.event e
JOIN backstory.kind k ON k.id = e.kind
JOIN backstory.aggregate a ON a.id = coalesce(e.owner, e.stream)
JOIN backstory.source s ON s.id = k.source
LEFT JOIN backstory.relation r ON r.id = k.relation
LEFT JOIN LATERAL (
  SELECT x.last_position, x.metadata FROM backstory.context x
  WHERE x.first_position <= e.position ORDER BY x.first_position DESC LIMIT 1
) c ON c.last_position >= e.position
WHERE e.position <= (SELECT h.position FROM backstory.head h);

CREATE TRIGGER append_only INSTEAD OF INSERT OR UPDATE OR DELETE ON backstory.events FOR EACH ROW EXECUTE FUNCTION backstory.refuse();
