package shop

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Querier is a connection, a pool or a transaction of pgx.
type Querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// rules are the shop's invariants: each query finds rows that break one.
var rules = []struct{ name, sql string }{
	{"an order's amounts and items_count are what its lines say", `
		SELECT format('order %s: %s items, %s + %s - %s = %s; its lines: %s, %s', o.id, o.items_count, o.subtotal, o.shipping, o.discount, o.total, coalesce(i.n, 0), i.amount)
		FROM orders o LEFT JOIN (SELECT order_id, count(*) AS n, sum(quantity * unit_price) AS amount FROM order_items GROUP BY order_id) i ON i.order_id = o.id
		WHERE o.items_count <> coalesce(i.n, 0) OR o.subtotal <> coalesce(i.amount, 0) OR o.total <> o.subtotal + o.shipping - o.discount`},
	{"a cart's items_count is right", `
		SELECT format('cart %s: %s, really %s', c.id, c.items_count, coalesce(i.n, 0))
		FROM carts c LEFT JOIN (SELECT cart_id, count(*) AS n FROM cart_items GROUP BY cart_id) i ON i.cart_id = c.id
		WHERE c.items_count <> coalesce(i.n, 0)`},
	{"a customer's orders_count is right", `
		SELECT format('customer %s: %s, really %s', c.id, c.orders_count, coalesce(o.n, 0))
		FROM customers c LEFT JOIN (SELECT customer_id, count(*) AS n FROM orders GROUP BY customer_id) o ON o.customer_id = c.id
		WHERE c.orders_count <> coalesce(o.n, 0)`},
	{"an order is paid exactly if a payment of its total is", `
		SELECT format('order %s: %s %s, paid: %s', o.id, o.status, o.total, p.amount)
		FROM orders o LEFT JOIN (SELECT order_id, sum(amount) AS amount FROM payments WHERE status = 'paid' GROUP BY order_id) p ON p.order_id = o.id
		WHERE CASE WHEN o.status IN ('paid', 'shipped', 'delivered') THEN p.amount IS DISTINCT FROM o.total ELSE p.amount IS NOT NULL END`},
	{"an order is refunded exactly if a payment of its total is", `
		SELECT format('order %s: %s %s, refunded: %s', o.id, o.status, o.total, p.amount)
		FROM orders o LEFT JOIN (SELECT order_id, sum(amount) AS amount FROM payments WHERE status = 'refunded' GROUP BY order_id) p ON p.order_id = o.id
		WHERE CASE WHEN o.status = 'refunded' THEN p.amount IS DISTINCT FROM o.total ELSE p.amount IS NOT NULL END`},
	{"an order has the times of its status", `
		SELECT format('order %s: %s, paid at %s, shipped at %s', id, status, paid_at, shipped_at) FROM orders
		WHERE (paid_at IS NULL) <> (status IN ('pending', 'cancelled')) OR (shipped_at IS NULL AND status IN ('shipped', 'delivered'))
		   OR (tracking_code IS NULL) <> (shipped_at IS NULL) OR number IS NULL`},
	{"a line belongs to an order", `SELECT format('order line %s of order %s', i.id, i.order_id) FROM order_items i LEFT JOIN orders o ON o.id = i.order_id WHERE o.id IS NULL`},
	{"a payment belongs to an order", `SELECT format('payment %s of order %s', p.id, p.order_id) FROM payments p LEFT JOIN orders o ON o.id = p.order_id WHERE o.id IS NULL`},
	{"an item belongs to a cart", `SELECT format('item %s of cart %s', i.id, i.cart_id) FROM cart_items i LEFT JOIN carts c ON c.id = i.cart_id WHERE c.id IS NULL`},
	{"no shelf has less than nothing", `SELECT format('product %s: %s', id, stock) FROM products WHERE stock < 0`},
}

// Check looks whether the shop's tables are consistent and returns what is not; of each rule at most five rows. It uses
// the connection's search_path. While the shop is open, q has to be a REPEATABLE READ transaction.
func Check(ctx context.Context, q Querier) (broken []string, err error) {
	for _, r := range rules {
		rows, err := q.Query(ctx, r.sql+" LIMIT 5")
		if err != nil {
			return nil, fmt.Errorf("check that %s: %w", r.name, err)
		}
		found, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return nil, fmt.Errorf("check that %s: %w", r.name, err)
		}
		for _, f := range found {
			broken = append(broken, r.name+": "+f)
		}
	}
	return broken, nil
}
