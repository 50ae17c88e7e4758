package backstory_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/jackc/pgx/v5"

	"github.com/backstory-dev/backstory"
	"github.com/backstory-dev/backstory/capture"
	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/internal/pgserver"
	"github.com/backstory-dev/backstory/sinks"
)

// each makes a sink of a function that is called for every event. What it has done is not done again after a restart,
// except for the events of the last seconds before a crash: a function that must not do a thing twice remembers
// Event.ID.
type each func(ctx context.Context, e *eventlog.Event) error

func (f each) Open(_ context.Context, start sinks.Start) (eventlog.Position, error) {
	return start.After, nil // this destination cannot tell what it has got: go on after the checkpoint
}

func (f each) Send(ctx context.Context, events []*eventlog.Event) error {
	for _, e := range events {
		if err := f(ctx, e); err != nil {
			return err // all of them come again
		}
	}
	return nil
}

func (f each) Close(context.Context) error { return nil }

// A program embeds the sidecar, and does something of its own with what happens in the database.
func Example() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()

	// A database with an application. Yours is there already.
	server, err := pgserver.Start(ctx, pgserver.Config{Version: os.Getenv("BACKSTORY_TEST_PG_VERSION")})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Stop(pgserver.Immediate)
	shop, err := pgx.Connect(ctx, server.URL("postgres"))
	if err != nil {
		log.Fatal(err)
	}
	defer shop.Close(context.Background())
	do := func(sql string) {
		if _, err := shop.Exec(ctx, sql); err != nil {
			log.Fatal(err)
		}
	}
	do(`CREATE TABLE orders (id bigint PRIMARY KEY, status text, total numeric(8,2))`)

	// What is captured, and who hears of it.
	told := make(chan string)
	cfg := backstory.Config{
		Capture: capture.Config{URL: server.URL("postgres")},
		Reactors: func(d *sinks.Dispatcher) error {
			mail := &sinks.Reactor{Name: "mail", SideEffect: true, CheckpointEvery: -1, Sink: each(func(ctx context.Context, e *eventlog.Event) error {
				told <- fmt.Sprintf("%s %s %s by %s", e.Type, e.Entity(), e.Data, eventlog.WhoOf(e.Metadata).Actor)
				return nil
			})}
			return d.On("Order*", mail)
		},
	}

	// Once: the event log, the publications, the replication slot. Prepare changes nothing.
	plan, err := backstory.Prepare(ctx, cfg)
	if err != nil {
		log.Fatal(err, eventlog.Hint(err))
	}
	if _, err := backstory.Init(ctx, cfg, plan, nil); err != nil {
		log.Fatal(err, eventlog.Hint(err))
	}

	// From now on.
	sidecar, err := backstory.New(ctx, cfg)
	if err != nil {
		log.Fatal(err, eventlog.Hint(err))
	}
	defer sidecar.Close()
	ended := make(chan error)
	go func() { ended <- sidecar.Run(ctx) }()

	// The application says who is at work, in one line, and otherwise goes on as ever.
	do(`BEGIN;
		SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "ann"}');
		INSERT INTO orders VALUES (1, 'open', 12.50);
		COMMIT`)
	do(`BEGIN;
		SELECT pg_logical_emit_message(true, 'backstory', '{"actor": "till 3"}');
		UPDATE orders SET status = 'paid' WHERE id = 1;
		COMMIT`)
	fmt.Println(<-told)
	fmt.Println(<-told)

	// The log can be asked at any time.
	err = sidecar.Log().Read(ctx, eventlog.Selection{Types: []string{"OrderUpdated"}}, func(e *eventlog.Event) error {
		fmt.Printf("%d: status was %s\n", e.Position, e.Before)
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}

	stop() // what was received is appended, confirmed and sent
	fmt.Println("ended:", <-ended)
	// Output:
	// OrderCreated Order/1 {"id":1,"status":"open","total":"12.50"} by ann
	// OrderUpdated Order/1 {"status":"paid"} by till 3
	// 2: status was {"status":"open"}
	// ended: <nil>
}
