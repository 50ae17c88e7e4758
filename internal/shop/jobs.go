package shop

import (
	"fmt"

	"github.com/jackc/pgx/v5"
)

// openShop puts the first products on the shelves of a shop that has none.
func (x *session) openShop() error {
	return x.do("open the shop", x.as("deploy:seed", "first products"), func(tx pgx.Tx) error {
		// Several programs may open the same shop.
		if _, err := x.exec(tx, `SELECT pg_advisory_xact_lock(hashtext('open the shop'))`); err != nil {
			return err
		}
		var some bool
		if err := tx.QueryRow(x.work, `SELECT EXISTS (SELECT FROM products)`).Scan(&some); err != nil || some {
			return err
		}
		for range 40 {
			if err := x.insertProduct(tx); err != nil {
				return err
			}
		}
		return nil
	})
}

// markCarts marks carts that were left alone.
func markCarts(x *session) error {
	var some bool
	left := x.ago(4)
	if _, err := x.find(`SELECT EXISTS (SELECT FROM carts WHERE status = 'open' AND updated_at <= $1)`, []any{left}, &some); err != nil || !some {
		return err
	}
	return x.do("mark abandoned carts", x.as("job:carts", "left alone"), func(tx pgx.Tx) error {
		_, err := x.exec(tx, `UPDATE carts SET status = 'abandoned', updated_at = $2
			WHERE id IN (SELECT id FROM carts WHERE status = 'open' AND updated_at <= $1 LIMIT 20 FOR UPDATE SKIP LOCKED)`, left, now())
		return err
	})
}

// cleanUp deletes carts that nobody needs any more, with what is in them.
func cleanUp(x *session) error {
	var n int
	old := x.ago(6)
	if _, err := x.find(`SELECT count(*) FROM (SELECT FROM carts WHERE status IN ('abandoned', 'ordered') AND updated_at <= $1 LIMIT 20) c`, []any{old}, &n); err != nil || n < 10 {
		return err
	}
	return x.do("delete old carts", x.as("job:cleanup", "carts older than a month"), func(tx pgx.Tx) error {
		rows, err := tx.Query(x.work, `SELECT id::text FROM carts WHERE status IN ('abandoned', 'ordered') AND updated_at <= $1 LIMIT 50 FOR UPDATE SKIP LOCKED`, old)
		if err != nil {
			return err
		}
		ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		if _, err := x.exec(tx, `DELETE FROM cart_items WHERE cart_id = ANY ($1::uuid[])`, ids); err != nil {
			return err
		}
		_, err = x.exec(tx, `DELETE FROM carts WHERE id = ANY ($1::uuid[])`, ids)
		return err
	})
}

// dunning cancels the oldest order that nobody pays.
func dunning(x *session) error {
	var order int64
	found, err := x.find(`SELECT id FROM orders WHERE status = 'pending' AND created_at <= $1 ORDER BY id LIMIT 1`, []any{x.ago(8)}, &order)
	if err != nil || !found {
		return err
	}
	return x.cancel(order, x.as("job:dunning", "payment overdue"))
}

// restock fills the shelves that are nearly empty.
func restock(x *session) error {
	var some bool
	if _, err := x.find(`SELECT EXISTS (SELECT FROM products WHERE active AND stock < 5)`, nil, &some); err != nil || !some {
		return err
	}
	return x.do("restock", x.as("job:restock", "delivery arrived"), func(tx pgx.Tx) error {
		_, err := x.exec(tx, `UPDATE products SET stock = stock + $1, updated_at = $2
			WHERE id IN (SELECT id FROM products WHERE active AND stock < 5 ORDER BY id FOR UPDATE)`, 20+x.rand.IntN(30), now())
		return err
	})
}

// recount sets counter caches, right or wrong, as reset_counters does: most of these updates change nothing.
func recount(x *session) error {
	return x.do("recount", x.as("job:counters", "nightly check"), func(tx pgx.Tx) error {
		// Nobody may check out for them meanwhile, or the count would be wrong by the time it is written.
		rows, err := tx.Query(x.work, `SELECT id FROM customers WHERE id >= (SELECT (max(id) * $1::float8)::bigint FROM customers) ORDER BY id LIMIT 5 FOR UPDATE`, x.rand.Float64())
		if err != nil {
			return err
		}
		ids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
		if err != nil {
			return err
		}
		_, err = x.exec(tx, `UPDATE customers c SET orders_count = (SELECT count(*) FROM orders WHERE customer_id = c.id) WHERE id = ANY ($1)`, ids)
		return err
	})
}

// priceList changes all prices in one statement: up by 3 %, and down in a sale when they have become absurd.
func priceList(x *session) error {
	var mean float64
	if _, err := x.find(`SELECT coalesce(avg(price), 0)::float8 FROM products`, nil, &mean); err != nil {
		return err
	}
	factor, reason := "1.03", "price list: +3 %"
	if mean > 80 {
		factor, reason = "0.60", "season sale: -40 %"
	}
	return x.do("new price list", x.as("job:price-list", reason), func(tx pgx.Tx) error {
		_, err := x.exec(tx, `UPDATE products SET price = round(price * $1::numeric, 2), lock_version = lock_version + 1, updated_at = $2 WHERE active`, factor, now())
		if err != nil {
			return err
		}
		if x.chance(0.25) {
			return refusal(fmt.Sprintf("prices times %s: not approved", factor))
		}
		return nil
	})
}
