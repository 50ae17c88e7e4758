package e2e

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

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
	s.cfg.Log.Rules = f
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
