package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/rules"
)

// withRules gives a system the rules of a file.
func (s *system) withRules(yaml string) {
	s.t.Helper()
	f, err := rules.Parse("backstory.yaml", []byte(strings.ReplaceAll(yaml, "\t", "  ")))
	if err != nil {
		s.t.Fatal(err)
	}
	s.cfg.Rules = f
}

// story gives one line for each event since a position, and the log's end: Post/1 PostTitleChanged {"title":"b"} from {"title":"a"}.
func story(t testing.TB, l *eventlog.Log, after eventlog.Position) (lines []string, end eventlog.Position) {
	t.Helper()
	err := l.Read(within(t, 20e9), eventlog.Selection{After: after, Quiet: true}, func(e *eventlog.Event) error {
		end = e.Position
		line := e.Entity() + " " + e.Type
		j := e.AppendJSON(nil)
		data := j[bytes.Index(j, []byte(`"data":`))+7 : bytes.Index(j, []byte(`,"before":`))]
		if e.Op != eventlog.OpDelete {
			line += " " + string(data)
		} else if string(data) != "{}" {
			line += " with " + string(data)
		}
		if e.Before != nil {
			line += " from " + string(e.Before)
		}
		for what, is := range map[string]bool{"quiet": e.Quiet, "restates": e.Restates} {
			if is {
				line += " (" + what + ")"
			}
		}
		if bytes.Contains(e.Metadata, []byte("rule_error")) {
			line += " " + string(e.Metadata)
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines, max(end, after)
}

// TestRules: what becomes of row changes, sentence by sentence of what rules mean, with REPLICA IDENTITY DEFAULT and FULL; and whatever the rules are, a checkout is as
// the source.
func TestRules(t *testing.T) {
	t.Parallel()
	const yaml = `
aggregates:
	Post:
		table: posts
		quiet: [updated_at, comments_count]
		events:
			PostTitleChanged:       {on: update, data: [title]}
			PostDescriptionChanged: {on: update, data: [description]}
			PostPublished:     {on: [insert, update], when: 'became("published", true)', data: [published]}
			PostPinned:        {on: [insert, update], when: 'became("pinned", true)', data: [pinned], with: {author_id: after.author_id}}
			PostRenamedTwice:  {on: update, data: [title], when: len(after.title) > 8}
			PostDeleted:       {on: update, when: 'became("deleted_at")', data: [deleted_at]}
			PostRemoved:       {on: delete, with: {headline: 'upper(before.title)'}}
			PostCounted:       {on: update, data: [comments_count], when: after.comments_count > 100}
			PostPriced:        {on: update, data: [price], when: after.n + 9223372036854775000 > 0}
			PostWritten:       {on: insert, data: [title, description], when: after.title != nil}
`
	for _, identity := range []string{"DEFAULT", "FULL"} {
		t.Run(identity, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			s.withRules(yaml)
			db := s.sql()
			db.do(`SET search_path = public; CREATE TABLE posts (id int PRIMARY KEY, title text, description text, published bool, pinned bool, author_id int, deleted_at timestamp,
				comments_count int NOT NULL DEFAULT 0, price numeric, n bigint NOT NULL DEFAULT 0, updated_at timestamp); ALTER TABLE posts REPLICA IDENTITY %s`, identity)
			s.init()
			l := s.openLog()
			at := eventlog.Position(0)
			for _, c := range []struct {
				what string
				do   string
				want []string
			}{
				{"an insert is …Created first, with all columns, and then what rules say of it", `INSERT INTO posts (id, title, published, pinned, author_id) VALUES (1, 'a', false, true, 7)`, []string{
					`Post/1 PostCreated {"id":1,"title":"a","description":null,"published":false,"pinned":true,"author_id":7,"deleted_at":null,"comments_count":0,"price":null,"n":0,"updated_at":null}`,
					`Post/1 PostPinned {"pinned":true,"author_id":7} (restates)`,
					`Post/1 PostWritten {"title":"a","description":null} (restates)`}},
				{"one update becomes what each rule takes of it; updated_at rides in the first", `UPDATE posts SET title = 'b', description = 'd', updated_at = '2026-01-01' WHERE id = 1`, []string{
					`Post/1 PostTitleChanged {"title":"b","updated_at":"2026-01-01T00:00:00"} from {"title":"a","updated_at":null}`,
					`Post/1 PostDescriptionChanged {"description":"d"} from {"description":null}`}},
				{"what is left over is …Updated", `UPDATE posts SET title = 'c', author_id = 8, updated_at = '2026-01-02' WHERE id = 1`, []string{
					`Post/1 PostTitleChanged {"title":"c","updated_at":"2026-01-02T00:00:00"} from {"title":"b","updated_at":"2026-01-01T00:00:00"}`,
					`Post/1 PostUpdated {"author_id":8} from {"author_id":7}`}},
				{"only quiet columns are …Touched", `UPDATE posts SET updated_at = '2026-01-03', comments_count = 1 WHERE id = 1`, []string{
					`Post/1 PostTouched {"comments_count":1,"updated_at":"2026-01-03T00:00:00"} from {"comments_count":0,"updated_at":"2026-01-02T00:00:00"} (quiet)`}},
				{"a quiet column that a rule names is news", `UPDATE posts SET updated_at = '2026-01-04', comments_count = 101 WHERE id = 1`, []string{
					`Post/1 PostCounted {"comments_count":101,"updated_at":"2026-01-04T00:00:00"} from {"comments_count":1,"updated_at":"2026-01-03T00:00:00"}`}},
				{"two rules may take the same column", `UPDATE posts SET title = 'a long title' WHERE id = 1`, []string{
					`Post/1 PostTitleChanged {"title":"a long title"} from {"title":"c"}`,
					`Post/1 PostRenamedTwice {"title":"a long title"} from {"title":"c"}`}},
				{"nothing changed, no event", `UPDATE posts SET title = title, updated_at = updated_at WHERE id = 1`, nil},
				{"a column of data has to have changed, and when has to hold", `UPDATE posts SET published = true, pinned = false WHERE id = 1`, []string{
					`Post/1 PostPublished {"published":true} from {"published":false}`,
					`Post/1 PostUpdated {"pinned":false} from {"pinned":true}`}},
				{"NULL in a boolean place is false", `UPDATE posts SET published = NULL, title = NULL WHERE id = 1`, []string{
					`Post/1 PostTitleChanged {"title":null} from {"title":"a long title"}`,
					`Post/1 PostUpdated {"published":null} from {"published":true}`}},
				{"a rule that fails leaves its change to the default event, marked", `UPDATE posts SET price = 1.50, n = 9223372036854775807 WHERE id = 1`, []string{
					`Post/1 PostUpdated {"price":"1.50","n":9223372036854775807} from {"price":null,"n":0} {"rule_error":{"rule":"PostPriced","error":"integer out of range: 9223372036854775807 + 9223372036854775000"}}`}},
				{"a key that changes comes first", `UPDATE posts SET id = 2, title = 'moved', updated_at = '2026-01-05' WHERE id = 1`, []string{
					`Post/2 PostUpdated {"id":2,"updated_at":"2026-01-05T00:00:00"} from {"id":1,"title":null,"updated_at":"2026-01-04T00:00:00"}`,
					`Post/2 PostTitleChanged {"title":"moved"} from {"title":null} (restates)`}},
				{"soft delete", `UPDATE posts SET deleted_at = '2026-02-01' WHERE id = 2`, []string{
					`Post/2 PostDeleted {"deleted_at":"2026-02-01T00:00:00"} from {"deleted_at":null}`}},
				{"a delete is …Deleted last, with the whole row", `DELETE FROM posts WHERE id = 2`, []string{
					`Post/2 PostRemoved with {"headline":"MOVED"} from {"id":2,"title":"moved","description":"d","published":null,"pinned":false,"author_id":8,"deleted_at":"2026-02-01T00:00:00","comments_count":101,"price":"1.50","n":9223372036854775807,"updated_at":"2026-01-05T00:00:00"} (restates)`,
					`Post/2 PostDeleted from {"id":2,"title":"moved","description":"d","published":null,"pinned":false,"author_id":8,"deleted_at":"2026-02-01T00:00:00","comments_count":101,"price":"1.50","n":9223372036854775807,"updated_at":"2026-01-05T00:00:00"}`}},
			} {
				db.do("%s", c.do)
				s.once()
				var got []string
				got, at = story(t, l, at)
				if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", c.want) {
					t.Errorf("%s:\n%s\nbecame\n%s\nwant\n%s", c.what, c.do, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
				}
				s.says(0, "", "checkout", "--at", "HEAD", "--schema", "now", "--replace")
				if have, want := db.rows(`SELECT p::text FROM now.posts p ORDER BY 1`), db.rows(`SELECT p::text FROM posts p ORDER BY 1`); fmt.Sprint(have) != fmt.Sprint(want) {
					t.Errorf("%s: the log has\n%v, the source\n%v", c.what, have, want)
				}
			}
			verify(t, l)
		})
	}
}

// TestRulesCheck: what is wrong with a file has its place, and what was meant.
func TestRulesCheck(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	s.sql().do(`CREATE TABLE public.posts (id int PRIMARY KEY, title text, published bool, price numeric, twice numeric GENERATED ALWAYS AS (price * 2) STORED, kind text, updated_at timestamp)`)
	file := filepath.Join(t.TempDir(), "rules.yaml")
	s.env = []string{"BACKSTORY_CONFIG=" + file}
	s.says(2, "read the rules: open "+file, "rules", "check")
	for _, c := range []struct {
		code       int
		yaml, want string
	}{
		{0, "", "0 aggregates, 0 events; they fit"},
		{0, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostPublished: {on: [insert, update], when: 'became(\"published\", true)', data: [published]}\n", "1 aggregate, 1 event; they fit"},
		{3, "aggregates:\n  Post:\n    table: post\n", "rules.yaml:3:12: no table post is captured; did you mean posts?"},
		{3, "aggregates:\n  Post:\n    table: posts\n    quit: [title]\n", "rules.yaml:4:5: an aggregate has no quit; did you mean quiet?"},
		{3, "aggregates:\n  Post:\n    table: posts\n    quiet: [titel]\n", "rules.yaml:4:13: posts has no column titel; did you mean title?"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: updte, data: [title]}\n", "rules.yaml:5:19: on is insert, update or delete, not updte; did you mean update?"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {data: [title]}\n", "rules.yaml:5:7: PostX needs on"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, when: after.titel == nil}\n", "rules.yaml:5:39: after has no titel; did you mean title?"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, when: 'became(\"publishd\", true)'}\n", "did you mean published?"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX:\n        on: update\n        when: !after.published\n", "rules.yaml:7:15: !after.published is a YAML tag here: put the text in quotes"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, data: [twice]}\n", "twice is a generated column"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostUpdated: {on: update, data: [title]}\n", "PostUpdated is what an update becomes without a rule"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, data: [title], with: {title: after.kind}}\n", "rules.yaml:5:49: title is in data already"},
		{3, "aggregates:\n  Post:\n    table: posts\n  Article:\n    table: public.posts\n", "rules.yaml:5:12: public.posts is the table of Post already"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update}\n  Other:\n    table: others\n    events:\n      PostX: {on: update}\n", "rules.yaml:9:7: PostX is an event of Post already"},
		{3, "aggregate:\n  Post:\n    table: posts\n", "rules.yaml:1:1: backstory.yaml has no aggregate; did you mean aggregates?"},
		{3, "aggregates: [\n", "rules.yaml:1:13: "},
		{0, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: delete, when: 'became(\"published\", true)'}\n", "rules.yaml:5:34: this is never so on delete"},
		{0, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: insert, when: before.published and after.kind == nil}\n", "rules.yaml:5:33: this is never so on insert"},
	} {
		if err := os.WriteFile(file, []byte(c.yaml), 0o600); err != nil {
			t.Fatal(err)
		}
		s.says(c.code, c.want, "rules", "check")
	}
}

// TestRulesAreReadAgain: other rules hold from a position on that the log has, never within a transaction; a file that is wrong changes nothing, and neither does a
// table that goes away from under its rule.
func TestRulesAreReadAgain(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db, other := s.sql(), s.sql()
	db.do(`SET search_path = public; CREATE TABLE posts (id int PRIMARY KEY, title text, body text)`)
	s.init()
	file := filepath.Join(t.TempDir(), "rules.yaml")
	s.env = []string{"BACKSTORY_CONFIG=" + file}
	write := func(event, more string) {
		t.Helper()
		if err := os.WriteFile(file, []byte("aggregates:\n  Article:\n    table: posts\n    events:\n      "+event+": {on: update, data: [title]"+more+"}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	types := func(want string) {
		t.Helper()
		eventually(t, 20*time.Second, want, func() (bool, error) {
			got := db.one(`SELECT coalesce(string_agg(type || ' ' || rules_version, ', ' ORDER BY position), '') FROM backstory.events WHERE op IN ('insert', 'update')`)
			return got == want, errors.New(got)
		})
	}
	write("TitleGiven", "")
	p := s.command(false, "run")
	db.do(`INSERT INTO posts VALUES (1, 'a', 'x'); UPDATE posts SET title = 'b'`)
	types("ArticleCreated 2, TitleGiven 2")

	said := func(what string) {
		t.Helper()
		eventually(t, 20*time.Second, what, func() (bool, error) { return strings.Contains(p.out.String(), what), errors.New(p.out.tail(5)) })
	}
	hangUp := func() {
		t.Helper()
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	write("TitleTaken", ", when: after.nothing == 1")
	hangUp()
	said("the rules stay as they were")
	db.do(`UPDATE posts SET title = 'c'`)
	types("ArticleCreated 2, TitleGiven 2, TitleGiven 2")

	// A transaction that has begun to arrive ends by the rules with which it began: the source sends it when it is committed.
	write("TitleTaken", "")
	hangUp()
	said("rules read again")
	db.do(`UPDATE posts SET title = 'd'`)
	types("ArticleCreated 2, TitleGiven 2, TitleGiven 2, TitleTaken 3")
	if got := db.one(`SELECT string_agg(concat_ws(' ', id, at_position, position('Taken' in text) > 0), ', ' ORDER BY id) FROM backstory.rules`); got != "2 1 f, 3 4 t" {
		t.Errorf("the log has the rules %s", got)
	}

	// The same file once more is nothing new; one that was taken away under it stops nothing, and is said.
	p.kill()
	other.do(`SET search_path = public; ALTER TABLE posts DROP COLUMN title; ALTER TABLE posts ADD COLUMN headline text; UPDATE posts SET headline = 'e'`)
	p = s.command(false, "run")
	types("ArticleCreated 2, TitleGiven 2, TitleGiven 2, TitleTaken 3, ArticleUpdated 3")
	said("a rule does not fit its table any more")
	s.says(3, "posts has no column title", "rules", "check")
	p.kill()

	// But one that is new has to fit, before anything is done by it.
	write("TitleTakenAway", "")
	p = s.command(false, "run")
	if code := p.wait(20 * time.Second); code != 1 || !strings.Contains(p.out.String(), "the rules do not fit the tables") {
		t.Errorf("run with rules that do not fit returned %d:\n%s", code, p.out)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	s.says(2, "read the rules", "run", "--once")
	s.env = nil
	db.do(`UPDATE posts SET headline = 'f'`)
	s.says(0, "", "run", "--once")
	types("ArticleCreated 2, TitleGiven 2, TitleGiven 2, TitleTaken 3, ArticleUpdated 3, PostUpdated 4")
	s.says(0, "", "checkout", "--at", "HEAD", "--schema", "now")
	if have, want := db.one(`SELECT p::text FROM now.posts p`), db.one(`SELECT p::text FROM posts p`); have != want {
		t.Errorf("the log has %s, the source %s", have, want)
	}
	verify(t, s.openLog())
}
