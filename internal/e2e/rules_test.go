package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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

// programRules gives a system's programs the rules of a file.
func (s *system) programRules(yaml string) {
	s.t.Helper()
	file := filepath.Join(s.t.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.env = []string{"BACKSTORY_CONFIG=" + file}
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
		if _, from, ok := bytes.Cut(e.Metadata, []byte(`"moved_from":"`)); ok {
			from, _, _ := bytes.Cut(from, []byte{'"'})
			line += " moved from " + string(from)
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
	s.sql().do(`CREATE TABLE public.posts (id int PRIMARY KEY, title text, published bool, price numeric, twice numeric GENERATED ALWAYS AS (price * 2) STORED, kind text, updated_at timestamp); CREATE TABLE public.notes (id int PRIMARY KEY, post_id int, body text)`)
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
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: updte, data: [title]}\n", "rules.yaml:5:19: on is insert, update or delete, or items.insert of children, not updte; did you mean update?"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {data: [title]}\n", "rules.yaml:5:7: PostX needs on"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, when: after.titel == nil}\n", "rules.yaml:5:39: after has no titel; did you mean title?"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, when: 'became(\"publishd\", true)'}\n", "did you mean published?"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX:\n        on: update\n        when: !after.published\n", "rules.yaml:7:15: !after.published is a YAML tag here: put the text in quotes"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, data: [twice]}\n", "twice is a generated column"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostUpdated: {on: update, data: [title]}\n", "PostUpdated is a name that the log itself has"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, data: [title], with: {title: after.kind}}\n", "rules.yaml:5:49: title is in data already"},
		{3, "aggregates:\n  Post:\n    table: posts\n  Article:\n    table: public.posts\n", "rules.yaml:5:12: public.posts is the table of Post already"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update}\n  Other:\n    table: others\n    events:\n      PostX: {on: update}\n", "rules.yaml:9:7: PostX is an event of Post already"},
		{3, "aggregate:\n  Post:\n    table: posts\n", "rules.yaml:1:1: backstory.yaml has no aggregate; did you mean aggregates?"},
		{3, "aggregates: [\n", "rules.yaml:1:13: "},
		{3, "# f\xfcr den Versand\naggregates: {}\n", "rules.yaml:1:1: this line is not UTF-8 text"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, with: {title: upper(after.title)}}\n", "rules.yaml:5:34: title is a column"},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, when: 'after.title = \"a\"'}\n", "equal is =="},
		{3, "aggregates:\n  Post:\n    table: posts\n    events:\n      PostX: {on: update, when: after.title != NULL}\n", "NULL is written nil"},
		{3, "aggregates:\n  Post:\n    table: posts\n    children: {notes: {key: [post_id, id]}}\n", "rules.yaml:4:16: the key of posts has 1 columns (id), and this has 2"},
		{0, "aggregates:\n  Post:\n    table: posts\n    children: {notes: {key: body}}\n", "notes.body is text, posts.id is integer: a row whose value is none of that type belongs to nothing"},
		{3, "aggregates:\n  Post:\n    table: posts\n    links: {Author: author_id}\n", "rules.yaml:4:13: the file has no aggregate Author"},
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

	// Nor does a file that is empty, or gone.
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	hangUp()
	said("has no aggregates")

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
	p.kill()
	p = s.command(false, "run")
	said("rules do not fit the tables any more")
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

// TestChildren: the events of rows that belong to an entity are its events, whatever becomes of the reference, and their table comes back all the same.
func TestChildren(t *testing.T) {
	t.Parallel()
	const yaml = `
aggregates:
	Order:
		table: orders
		children: {order_items: {key: order_id, as: items}}
		events:
			ItemAdded:   {on: items.insert, data: [sku]}
			ItemRemoved: {on: items.delete, with: {gone: before.sku}}
			ItemMoved:   {on: items.update, data: [order_id], when: before.order_id != nil}
	Post:
		table: posts
		children:
			comments: {key: commentable_id, where: commentable_type == "Post", as: comments}
		events:
			PostCommented: {on: comments.insert, data: [body]}
	Photo:
		table: photos
		children:
			comments: {key: commentable_id, where: commentable_type == "Photo", quiet: [body]}
`
	for _, identity := range []string{"DEFAULT", "FULL"} {
		t.Run(identity, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			s.withRules(yaml)
			db := s.sql()
			db.do(`SET search_path = public; CREATE TABLE orders (id int PRIMARY KEY, state text);
				CREATE TABLE order_items (id int PRIMARY KEY, order_id int REFERENCES orders ON DELETE CASCADE, sku text, n int NOT NULL DEFAULT 1);
				CREATE TABLE posts (id uuid PRIMARY KEY, title text); CREATE TABLE photos (id int PRIMARY KEY, url text);
				CREATE TABLE comments (id int PRIMARY KEY, commentable_type text, commentable_id text, body text);
				ALTER TABLE order_items REPLICA IDENTITY %[1]s; ALTER TABLE comments REPLICA IDENTITY %[1]s;
				INSERT INTO orders VALUES (1, 'old'); INSERT INTO order_items VALUES (1, 1, 'old'), (2, NULL, 'nobody''s')`, identity)
			s.init()
			l := s.openLog()
			s.once()
			got, at := story(t, l, 0)
			for _, want := range []string{`Order/1 OrderImported {"id":1,"state":"old"}`, `Order/1 OrderItemImported {"id":1,"order_id":1,"sku":"old","n":1}`, `OrderItem/2 OrderItemImported {"id":2,"order_id":null,"sku":"nobody's","n":1}`} {
				if !slices.Contains(got, want) {
					t.Errorf("existing rows became\n%s\nwant\n%s", strings.Join(got, "\n"), want)
				}
			}
			for _, c := range []struct {
				what string
				do   string
				want []string
			}{
				{"events of children are those of their entity", `INSERT INTO orders VALUES (42, 'new'); INSERT INTO order_items VALUES (7, 42, 'tea', 2); UPDATE order_items SET n = 3 WHERE id = 7`, []string{
					`Order/42 OrderCreated {"id":42,"state":"new"}`,
					`Order/42 OrderItemCreated {"id":7,"order_id":42,"sku":"tea","n":2}`,
					`Order/42 ItemAdded {"sku":"tea"} (restates)`,
					`Order/42 OrderItemUpdated {"n":3} from {"n":2}`}},
				{"another parent is one event, in the new stream", `UPDATE order_items SET order_id = 1 WHERE id = 7`, []string{
					`Order/1 ItemMoved {"order_id":1} from {"order_id":42} moved from Order/42`}},
				{"so are the other events of that change", `UPDATE order_items SET order_id = 42, n = 9 WHERE id = 7; UPDATE order_items SET order_id = 1, n = 3 WHERE id = 7`, []string{
					`Order/42 ItemMoved {"order_id":42} from {"order_id":1} moved from Order/1`,
					`Order/42 OrderItemUpdated {"n":9} from {"n":3} moved from Order/1`,
					`Order/1 ItemMoved {"order_id":1} from {"order_id":42} moved from Order/42`,
					`Order/1 OrderItemUpdated {"n":3} from {"n":9} moved from Order/42`}},
				{"no parent: the row's own stream", `UPDATE order_items SET order_id = NULL WHERE id = 7; UPDATE order_items SET n = 4 WHERE id = 7; UPDATE order_items SET order_id = 42 WHERE id = 7`, []string{
					`OrderItem/7 OrderItemUpdated {"order_id":null} from {"order_id":1} moved from Order/1`,
					`OrderItem/7 OrderItemUpdated {"n":4} from {"n":3}`,
					`Order/42 OrderItemUpdated {"order_id":42} from {"order_id":null}`}},
				{"a row's own key", `UPDATE order_items SET id = 8, n = 5 WHERE id = 7`, []string{
					`Order/42 OrderItemUpdated {"id":8,"n":5} from {"id":7,"n":4}`}},
				{"a cascade tells of the parent first", `DELETE FROM orders WHERE id = 42`, []string{
					`Order/42 OrderDeleted from {"id":42,"state":"new"}`,
					`Order/42 ItemRemoved with {"gone":"tea"} from {"id":8,"order_id":42,"sku":"tea","n":5} (restates)`,
					`Order/42 OrderItemDeleted from {"id":8,"order_id":42,"sku":"tea","n":5}`}},
				{"polymorphic children", `INSERT INTO comments VALUES (1, 'Post', '00000000-0000-0000-0000-00000000000a', 'nice'), (2, 'Photo', '9', 'nice, too'), (3, 'Video', '9', 'what?');
					UPDATE comments SET body = 'fine' WHERE id < 3; UPDATE comments SET commentable_type = 'Photo', commentable_id = '9' WHERE id = 1; DELETE FROM comments WHERE id = 1`, []string{
					`Post/00000000-0000-0000-0000-00000000000a CommentCreated {"id":1,"commentable_type":"Post","commentable_id":"00000000-0000-0000-0000-00000000000a","body":"nice"}`,
					`Post/00000000-0000-0000-0000-00000000000a PostCommented {"body":"nice"} (restates)`,
					`Photo/9 CommentCreated {"id":2,"commentable_type":"Photo","commentable_id":"9","body":"nice, too"}`,
					`Comment/3 CommentCreated {"id":3,"commentable_type":"Video","commentable_id":"9","body":"what?"}`,
					`Post/00000000-0000-0000-0000-00000000000a CommentUpdated {"body":"fine"} from {"body":"nice"}`,
					`Photo/9 CommentTouched {"body":"fine"} from {"body":"nice, too"} (quiet)`,
					`Photo/9 CommentUpdated {"commentable_type":"Photo","commentable_id":"9"} from {"commentable_type":"Post","commentable_id":"00000000-0000-0000-0000-00000000000a"} moved from Post/00000000-0000-0000-0000-00000000000a`,
					`Photo/9 CommentDeleted from {"id":1,"commentable_type":"Photo","commentable_id":"9","body":"fine"}`}},
				{"a reference to what cannot be", `INSERT INTO comments VALUES (4, 'Post', 'legacy-17', 'x'), (5, 'Post', '00000000-0000-0000-0000-00000000000B', 'y'), (6, 'Photo', 'nine', 'z')`, []string{
					`Comment/4 CommentCreated {"id":4,"commentable_type":"Post","commentable_id":"legacy-17","body":"x"}`,
					`Post/00000000-0000-0000-0000-00000000000b CommentCreated {"id":5,"commentable_type":"Post","commentable_id":"00000000-0000-0000-0000-00000000000B","body":"y"}`,
					`Post/00000000-0000-0000-0000-00000000000b PostCommented {"body":"y"} (restates)`,
					`Comment/6 CommentCreated {"id":6,"commentable_type":"Photo","commentable_id":"nine","body":"z"}`}},
			} {
				db.do("%s", c.do)
				s.once()
				got, at = story(t, l, at)
				if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", c.want) {
					t.Errorf("%s:\n%s\nbecame\n%s\nwant\n%s", c.what, c.do, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
				}
				s.says(0, "", "checkout", "--at", "HEAD", "--schema", "now", "--replace")
				for _, table := range []string{"orders", "order_items", "comments"} {
					if have, want := db.ask(`SELECT p::text FROM now.`+table+` p ORDER BY 1`), db.ask(`SELECT p::text FROM `+table+` p ORDER BY 1`); fmt.Sprint(have) != fmt.Sprint(want) {
						t.Errorf("%s: the log has\n%v, the source\n%v", c.what, have, want)
					}
				}
			}
			db.do(`INSERT INTO posts VALUES ('00000000-0000-0000-0000-00000000000a', 'p'); INSERT INTO photos VALUES (9, 'u')`)
			s.once()
			// The entity's history has what belonged to it, and what left it; the row's own history is found by the row; the state of an entity is its row alone.
			positions := func(entity string) string {
				t.Helper()
				var list []string
				e, err := l.Entity(t.Context(), entity)
				if err != nil {
					t.Fatal(err)
				}
				if err := l.Read(t.Context(), e.Selection(), func(e *eventlog.Event) error { list = append(list, e.Type); return nil }); err != nil {
					t.Fatal(err)
				}
				return strings.Join(list, " ")
			}
			for entity, want := range map[string]string{
				"Order/42":      "OrderCreated OrderItemCreated ItemAdded OrderItemUpdated ItemMoved ItemMoved OrderItemUpdated ItemMoved OrderItemUpdated OrderItemUpdated OrderItemUpdated OrderDeleted ItemRemoved OrderItemDeleted",
				"order_items/7": "OrderItemCreated ItemAdded OrderItemUpdated ItemMoved ItemMoved OrderItemUpdated ItemMoved OrderItemUpdated OrderItemUpdated OrderItemUpdated OrderItemUpdated OrderItemUpdated",
				"OrderItem/8":   "OrderItemUpdated ItemRemoved OrderItemDeleted",
				"Photo/9":       "CommentCreated CommentUpdated CommentDeleted PhotoCreated",
				"Post/00000000-0000-0000-0000-00000000000a": "CommentCreated PostCommented CommentUpdated CommentUpdated PostCreated",
			} {
				if got := positions(entity); got != want {
					t.Errorf("the history of %s is\n%s, want\n%s", entity, got, want)
				}
			}
			s.says(0, `"row":{"id":1,"state":"old"}`, "show", "Order/1", "--json")
			s.says(0, `"row":{"id":2,"commentable_type":"Photo","commentable_id":"9","body":"fine"}`, "show", "comments/2", "--json")
			s.says(0, "ItemAdded", "log", "Order/42")
			s.says(1, "its key became 8", "show", "order_items/7")
			s.says(1, "backstory show public.order_items/8 shows it", "show", "order_items/7")
			db.do(`INSERT INTO order_items VALUES (9, 1, 'milk', 1); TRUNCATE order_items`)
			s.once()
			s.says(0, "OrderItemTruncated", "log", "order_items/9")
			// Views: what belongs to an entity is among its events, by an index.
			if got := db.one(`SELECT string_agg(type, ' ' ORDER BY id) FROM backstory.order_events WHERE aggregate_id = 42`); got != "OrderCreated OrderItemCreated ItemAdded OrderItemUpdated ItemMoved OrderItemUpdated OrderItemUpdated OrderItemUpdated OrderDeleted ItemRemoved OrderItemDeleted" {
				t.Errorf("the view has %s", got)
			}
			db.do(`SET enable_seqscan = off`)
			for _, q := range []string{`SELECT * FROM orders o JOIN backstory.order_events e ON e.aggregate_id = o.id WHERE o.id = 42`, `SELECT * FROM posts p JOIN backstory.post_events e ON e.aggregate_id = p.id WHERE p.id = '00000000-0000-0000-0000-00000000000a'`, `SELECT * FROM photos p JOIN backstory.photo_events e ON e.aggregate_id = p.id WHERE p.id = 9`} {
				plan := fmt.Sprint(db.ask(`EXPLAIN (COSTS off) ` + q))
				if strings.Contains(plan, "Seq Scan on event") || !strings.Contains(plan, "owner_id") && !strings.Contains(plan, "owner_text") {
					t.Errorf("%s goes by no index of owners:\n%s", q, plan)
				}
			}
			verify(t, l)
		})
	}
}

// TestNamesThatDifferInCase: two aggregates have two views, and an attribute that a rule adds is in an event once.
func TestNamesThatDifferInCase(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`SET search_path = public; CREATE TABLE orders (id int PRIMARY KEY, v text, updated_at int)`)
	s.init()
	db.do(`INSERT INTO orders VALUES (1, 'a', 1)`)
	s.once()
	s.withRules("aggregates:\n\torder:\n\t\ttable: orders\n\t\tevents:\n\t\t\tNamed: {on: update, data: [v], with: {updated_at: after.updated_at}}\n")
	db.do(`UPDATE orders SET v = 'b', updated_at = 2`)
	s.once()
	if got := db.one(`SELECT string_agg(type, ' ' ORDER BY id) FROM backstory.order_events`); got != "OrderCreated" {
		t.Errorf("the view of before has %s", got)
	}
	view := db.one(`SELECT relname FROM pg_class WHERE relname LIKE 'order\_%%\_events'`)
	if got := db.one(`SELECT string_agg(type || ' ' || data, ', ' ORDER BY id) FROM backstory.%s`, view); got != `Named {"v":"b","updated_at":2}` {
		t.Errorf("the view %s has %s", view, got)
	}
	s.says(0, "OrderCreated", "log", "orders/1")
	verify(t, s.openLog())
}

// TestLinks: events of a join table, with a key and without, are found under both of what it joins, and stored once.
func TestLinks(t *testing.T) {
	t.Parallel()
	for _, key := range []string{"PRIMARY KEY (student_id, course_id)", "CHECK (grade > 0)"} {
		t.Run(key, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t, where{})
			s.withRules(`
aggregates:
	Student: {table: students}
	Course: {table: courses}
	Enrolment:
		table: enrolments
		links: {Student: student_id, Course: course_id}
		events:
			Graded: {on: update, data: [grade]}
`)
			db := s.sql()
			db.do(`SET search_path = public; CREATE TABLE students (id int PRIMARY KEY, name text); CREATE TABLE courses (code text PRIMARY KEY, name text);
				CREATE TABLE enrolments (student_id int NOT NULL, course_id text, grade int, %s); ALTER TABLE enrolments REPLICA IDENTITY FULL`, key)
			s.init()
			db.do(`INSERT INTO enrolments VALUES (1, 'math', 5), (2, 'math', 4); UPDATE enrolments SET grade = 3 WHERE student_id = 1; UPDATE enrolments SET course_id = 'art' WHERE student_id = 2; DELETE FROM enrolments WHERE student_id = 1;
				INSERT INTO students VALUES (1, 'Ann'); INSERT INTO courses VALUES ('art', 'Art')`)
			s.once()
			l := s.openLog()
			for entity, want := range map[string]string{
				"Student/1":    "EnrolmentCreated Graded EnrolmentDeleted StudentCreated",
				"students/2":   "EnrolmentCreated EnrolmentUpdated",
				"Course/math":  "EnrolmentCreated EnrolmentCreated Graded EnrolmentUpdated EnrolmentDeleted",
				"courses/art":  "EnrolmentUpdated CourseCreated",
				"Course/Ann":   "",
				"Enrolment/12": "",
			} {
				var list []string
				e, err := l.Entity(t.Context(), entity)
				if err != nil {
					t.Fatal(err)
				}
				if err := l.Read(t.Context(), e.Selection(), func(e *eventlog.Event) error { list = append(list, e.Type); return nil }); err != nil {
					t.Fatal(err)
				}
				if got := strings.Join(list, " "); got != want {
					t.Errorf("the history of %s is\n%s, want\n%s", entity, got, want)
				}
			}
			if n := db.one(`SELECT count(*) FROM backstory.events`); n != "7" {
				t.Errorf("the log has %s events, want 7", n)
			}
			s.says(0, "", "checkout", "--at", "HEAD", "--schema", "now", "enrolments", "students")
			if have, want := db.rows(`SELECT e::text FROM now.enrolments e ORDER BY 1`), db.rows(`SELECT e::text FROM enrolments e ORDER BY 1`); fmt.Sprint(have) != fmt.Sprint(want) {
				t.Errorf("the log has %v, the source %v", have, want)
			}
			s.says(0, "Ann", "show", "students/1", "--json")
			verify(t, l)
		})
	}
}

// TestRulesExplain: which rules make an event of a change, and why others do not.
func TestRulesExplain(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	const yaml = `aggregates:
  Order:
    table: orders
    children: {order_items: {key: order_id, as: items}}
    events:
      OrderPaid:   {on: update, when: 'became("status", "paid")', data: [status, paid_at]}
      OrderNoted:  {on: [insert, update], data: [note]}
      OrderOdd:    {on: update, data: [status], when: after.n + 9223372036854775807 > 0}
      OrderLeft:   {on: delete}
      ItemAmended: {on: items.update, data: [n], when: after.n > before.n}
`
	s.programRules(yaml)
	s.withRules(yaml)
	db := s.sql()
	db.do(`SET search_path = public; CREATE TABLE orders (id int PRIMARY KEY, status text, paid_at timestamp, note text, n int NOT NULL DEFAULT 1, updated_at int);
		CREATE TABLE order_items (id int PRIMARY KEY, order_id int, n int); CREATE TABLE others (id int PRIMARY KEY)`)
	s.init()
	db.do(`INSERT INTO orders VALUES (1, 'new'); UPDATE orders SET status = 'paid', n = 2, updated_at = 5 WHERE id = 1; INSERT INTO order_items VALUES (7, 1, 1); UPDATE order_items SET n = 0 WHERE id = 7;
		INSERT INTO others VALUES (1); UPDATE orders SET updated_at = 6 WHERE id = 1; DELETE FROM orders WHERE id = 1`)
	s.once()
	for _, c := range []struct {
		what string
		want []string
	}{
		{"2", []string{"update of Order/1, a row of Order", `OrderPaid yes: status changed, and became("status", "paid")`, "OrderNoted no: none of its columns changed: note", "OrderOdd no: it failed: integer out of range",
			"OrderLeft no: it is about delete, this is an update", "and …Updated: n"}},
		{"order_items/7", []string{"update of public.order_items/7, a row of Order", "ItemAmended no: this does not hold: after.n > before.n", "and …Updated: n"}},
		{"others/1", []string{"a row of nothing that the file speaks of", "and …Created"}},
		{"orders/1", []string{"delete of Order/1", "OrderLeft yes: on delete", "and …Deleted"}},
		{"1", []string{"insert of Order/1", "OrderNoted no: all of its columns are NULL: note", "OrderPaid no: it is about update, this is an insert", "and …Created"}},
	} {
		p := s.command(false, "rules", "explain", c.what)
		if code := p.wait(time.Minute); code != 0 {
			t.Errorf("rules explain %s returned %d:\n%s", c.what, code, p.out)
		}
		for _, want := range c.want {
			if !strings.Contains(strings.Join(strings.Fields(p.out.String()), " "), want) {
				t.Errorf("rules explain %s lacks %q:\n%s", c.what, want, p.out)
			}
		}
	}
	s.says(0, `{"rule":"OrderLeft","line":9,"fires":true,"why":"on delete"}`, "rules", "explain", "orders/1", "--json")
	s.says(1, "no event at position 99", "rules", "explain", "99")
}

// TestRulesTest: what rules would make of what has happened is what they make of it when it happens.
func TestRulesTest(t *testing.T) {
	t.Parallel()
	s := newSystem(t, where{})
	const yaml = `aggregates:
  Order:
    table: orders
    children: {order_items: {key: order_id, as: items}}
    events:
      OrderPaid:   {on: [insert, update], when: 'became("status", "paid")', data: [status]}
      OrderNoted:  {on: update, data: [note]}
      OrderMoved:  {on: update, data: [id]}
      OrderOdd:    {on: update, data: [n], when: after.n + 9223372036854775800 > 0}
      OrderLeft:   {on: delete, with: {was: before.status}}
      ItemAdded:   {on: items.insert}
      ItemNever:   {on: items.delete, when: before.n > 100000}
`
	s.programRules(yaml)
	db := s.sql()
	db.do(`SET search_path = public; CREATE TABLE orders (id int PRIMARY KEY, status text, note text, n int NOT NULL DEFAULT 1, total numeric, updated_at int);
		CREATE TABLE order_items (id int PRIMARY KEY, order_id int, n int)`)
	s.init()
	work := func(from int) {
		db.do(`INSERT INTO orders (id, status) SELECT i, CASE WHEN i %% 3 = 0 THEN 'paid' ELSE 'new' END FROM generate_series(%[1]d, %[1]d + 29) i;
			UPDATE orders SET status = 'paid', updated_at = 1 WHERE id >= %[1]d; UPDATE orders SET note = repeat('x', 2000) || id, total = id / 7.0 WHERE id >= %[1]d AND id %% 2 = 0; UPDATE orders SET updated_at = 2 WHERE id = %[1]d;
			UPDATE orders SET n = 20, note = NULL WHERE id = %[1]d + 1; UPDATE orders SET id = id + 500, note = 'm' WHERE id = %[1]d + 2;
			INSERT INTO order_items SELECT i, i, i FROM generate_series(%[1]d, %[1]d + 9) i; UPDATE order_items SET n = n + 1, order_id = NULL WHERE id = %[1]d; DELETE FROM order_items WHERE id >= %[1]d; DELETE FROM orders WHERE id >= %[1]d`, from)
	}
	work(1) // by the default rules
	s.once()
	p := s.command(false, "rules", "test", "--json")
	if code := p.wait(time.Minute); code != 3 { // one rule fails
		t.Fatalf("rules test returned %d:\n%s", code, p.out)
	}
	var would struct {
		Changes int
		Types   map[string]int
		Never   []string
		Failed  map[string]int
		Lost    string
	}
	if err := json.Unmarshal([]byte(p.out.String()), &would); err != nil {
		t.Fatalf("%v:\n%s", err, p.out)
	}
	if fmt.Sprint(would.Never) != "[OrderOdd ItemNever]" || would.Lost != "" || len(would.Failed) != 1 || would.Changes != s.changes(db) {
		t.Errorf("rules test says %+v", would)
	}
	l := s.openLog()
	_, at := story(t, l, 0)
	s.withRules(yaml)
	work(3001) // the same, by them
	s.once()
	did := map[string]int{}
	if err := l.Read(t.Context(), eventlog.Selection{After: at, Quiet: true}, func(e *eventlog.Event) error { did[e.Type]++; return nil }); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(did) != fmt.Sprint(would.Types) {
		t.Errorf("the rules would make %v, and made %v", would.Types, did)
	}
	s.says(0, "Every row comes back from these events.", "rules", "test", "--last", "50")
	s.says(2, "--last has to be more than 0", "rules", "test", "--last", "0")
}

// changes counts the row changes in the log.
func (s *system) changes(db *session) int {
	n, err := strconv.Atoi(db.one(`SELECT count(DISTINCT (commit_lsn, change)) FROM backstory.events WHERE op IN ('insert', 'update', 'delete')`))
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}
