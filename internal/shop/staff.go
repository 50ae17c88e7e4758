package shop

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// tasks are what a session picks from, and how often it picks each compared with the others. Everything that finds nothing to do costs no
// transaction.
var tasks = []struct {
	weight float64
	do     func(*session) error
}{
	{50, visit},
	{25, warehouse},
	{12, carrier},
	{10, support},
	{5, catalogue},
	{2, byHand},
	{4, markCarts},
	{4, cleanUp},
	{2, dunning},
	{3, restock},
	{1, recount},
	{1, priceList},
}

// pick chooses what to do next.
func (x *session) pick() func(*session) error {
	sum := 0.0
	for _, w := range tasks {
		sum += w.weight
	}
	at := x.rand.Float64() * sum
	for _, w := range tasks {
		if at -= w.weight; at < 0 {
			return w.do
		}
	}
	return visit
}

// ago is the moment so many patiences before now.
func (x *session) ago(patiences int) time.Time {
	return now().Add(-time.Duration(patiences) * x.cfg.Patience)
}

// warehouse ships what is paid, oldest first.
func warehouse(x *session) error {
	for range 4 {
		var order int64
		found, err := x.find(`SELECT id FROM orders WHERE status = 'paid' AND paid_at <= $1 ORDER BY id LIMIT 1`, []any{x.ago(1)}, &order)
		if err != nil || !found {
			return err
		}
		err = x.do("ship", x.as("warehouse:"+one(x, []string{"cleo", "dan"}), "packed and handed over"), func(tx pgx.Tx) error {
			n, err := x.exec(tx, `UPDATE orders SET status = 'shipped', shipped_at = $2, tracking_code = $3, lock_version = lock_version + 1, updated_at = $2
				WHERE id = (SELECT id FROM orders WHERE id = $1 AND status = 'paid' FOR UPDATE SKIP LOCKED)`,
				order, now(), fmt.Sprintf("DE%09d", x.rand.IntN(1e9)))
			if err == nil && n == 0 {
				err = refusal("somebody else is at it")
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// carrier tells what has been delivered, several at a time.
func carrier(x *session) error {
	var n int
	due := x.ago(3)
	if _, err := x.find(`SELECT count(*) FROM (SELECT FROM orders WHERE status = 'shipped' AND shipped_at <= $1 LIMIT 5) o`, []any{due}, &n); err != nil || n < 2 {
		return err
	}
	return x.do("deliver", x.as("webhook:carrier", "delivered"), func(tx pgx.Tx) error {
		_, err := x.exec(tx, `UPDATE orders SET status = 'delivered', lock_version = lock_version + 1, updated_at = $2
			WHERE id IN (SELECT id FROM orders WHERE status = 'shipped' AND shipped_at <= $1 ORDER BY id LIMIT 5 FOR UPDATE SKIP LOCKED)`, due, now())
		return err
	})
}

// recent finds one of the latest orders in one of the states.
func (x *session) recent(states ...string) (order int64, version int, found bool, err error) {
	found, err = x.find(`SELECT id, lock_version FROM orders WHERE id > (SELECT max(id) FROM orders) - $1 AND status = ANY ($2) ORDER BY id LIMIT 1`,
		[]any{x.rand.IntN(200), states}, &order, &version)
	return order, version, found, err
}

// support does what customers ask for.
func support(x *session) error {
	agent := x.as("support:"+one(x, []string{"ben", "eva", "joe"}), "")
	switch n := x.rand.IntN(100); {
	case n < 35:
		return changeAddress(x, agent)
	case n < 50:
		return removeLine(x, agent)
	case n < 58:
		order, _, found, err := x.recent("pending")
		if err != nil || !found {
			return err
		}
		return x.cancel(order, agent.because(x, "customer called"))
	case n < 73:
		return refund(x, agent)
	case n < 95:
		return editCustomer(x, agent)
	default:
		return forgetCustomer(x)
	}
}

// changeAddress edits a row as an application with optimistic locking does: reads it, thinks, and writes it if nobody else
// has.
func changeAddress(x *session, agent *who) error {
	order, version, found, err := x.recent("pending", "paid")
	if err != nil || !found {
		return err
	}
	return x.do("change address", agent.because(x, "wrong address"), func(tx pgx.Tx) error {
		n, err := x.exec(tx, `UPDATE orders SET shipping_address = jsonb_set(shipping_address, '{street}', to_jsonb($3::text)), lock_version = lock_version + 1, updated_at = $4
			WHERE id = $1 AND lock_version = $2`, order, version, fmt.Sprintf("%s %d", one(x, streets), 1+x.rand.IntN(150)), now())
		if err == nil && n == 0 {
			if _, err = x.find(`SELECT lock_version FROM orders WHERE id = $1`, []any{order}, &version); err == nil {
				err = errStale
			}
		}
		return err
	})
}

// removeLine takes a line out of an order that is not paid.
func removeLine(x *session, agent *who) error {
	order, _, found, err := x.recent("pending")
	if err != nil || !found {
		return err
	}
	return x.do("remove line", agent.because(x, "ordered twice"), func(tx pgx.Tx) error {
		var status string
		if err := tx.QueryRow(x.work, `SELECT status FROM orders WHERE id = $1 FOR UPDATE`, order).Scan(&status); err != nil {
			return err
		}
		if status != "pending" {
			return refusal("the order is paid by now")
		}
		var product int64
		var quantity int
		err := tx.QueryRow(x.work, `DELETE FROM order_items WHERE id = (SELECT max(id) FROM order_items WHERE order_id = $1 HAVING count(*) > 1)
			RETURNING product_id, quantity`, order).Scan(&product, &quantity)
		if errors.Is(err, pgx.ErrNoRows) {
			return refusal("it is the only line")
		}
		if err != nil {
			return err
		}
		if _, err := x.exec(tx, `UPDATE products SET stock = stock + $2, updated_at = $3 WHERE id = $1`, product, quantity, now()); err != nil {
			return err
		}
		if err := x.total(tx, order, "4.90"); err != nil {
			return err
		}
		_, err = x.exec(tx, `UPDATE payments p SET amount = o.total, updated_at = $2 FROM orders o WHERE o.id = $1 AND p.order_id = o.id AND p.status = 'pending'`, order, now())
		return err
	})
}

// refund gives the money back. The part that the payment service does carries a context of its own, in the same transaction.
func refund(x *session, agent *who) error {
	order, _, found, err := x.recent("paid", "shipped", "delivered")
	if err != nil || !found {
		return err
	}
	agent.Reason = one(x, []string{"arrived broken", "does not fit", "came too late"})
	return x.do("refund", agent, func(tx pgx.Tx) error {
		var shipped bool
		err := tx.QueryRow(x.work, `UPDATE orders SET status = 'refunded', note = $2, lock_version = lock_version + 1, updated_at = $3
			WHERE id = $1 AND status IN ('paid', 'shipped', 'delivered') RETURNING shipped_at IS NOT NULL`, order, "refunded: "+agent.Reason, now()).Scan(&shipped)
		if errors.Is(err, pgx.ErrNoRows) {
			return refusal("it has been refunded already")
		}
		if err != nil {
			return err
		}
		if !shipped {
			if err := x.putBack(tx, order); err != nil {
				return err
			}
		}
		if err := x.emit(tx, &who{Actor: "service:refunds", Reason: agent.Reason, RequestID: agent.RequestID}); err != nil {
			return err
		}
		_, err = x.exec(tx, `UPDATE payments SET status = 'refunded', response = response || '{"refund": "succeeded"}', updated_at = $2 WHERE order_id = $1 AND status = 'paid'`, order, now())
		return err
	})
}

// editCustomer changes one column or another.
func editCustomer(x *session, agent *who) error {
	var id int64
	var status string
	found, err := x.find(`SELECT id, status FROM customers WHERE deleted_at IS NULL AND id >= (SELECT (max(id) * $1::float8)::bigint FROM customers) ORDER BY id LIMIT 1`,
		[]any{x.rand.Float64()}, &id, &status)
	if err == nil && x.chance(0.2) { // somebody who cannot buy any more calls more often
		_, err = x.find(`SELECT id, status FROM customers WHERE status = 'suspended' ORDER BY id LIMIT 1`, nil, &id, &status)
	}
	if err != nil || !found {
		return err
	}
	action, set, value := "change phone", "phone = $2", any(x.phone())
	switch {
	case status == "suspended":
		action, set, value = "reactivate customer", "status = $2", "active"
	case x.chance(0.2):
		action, set, value = "suspend customer", "status = $2", "suspended"
		agent.Reason = "chargeback"
	case x.chance(0.5):
		action, set, value = "change preferences", "preferences = preferences || $2", fmt.Sprintf(`{"newsletter": %t}`, x.chance(0.5))
	}
	return x.do(action, agent, func(tx pgx.Tx) error {
		_, err := x.exec(tx, `UPDATE customers SET `+set+`, lock_version = lock_version + 1, updated_at = $3 WHERE id = $1 AND deleted_at IS NULL`, id, value, now())
		return err
	})
}

// forgetCustomer deletes one softly, and what is known of the person for good.
func forgetCustomer(x *session) error {
	var id int64
	found, err := x.find(`SELECT id FROM customers WHERE deleted_at IS NULL AND id >= (SELECT (max(id) * $1::float8)::bigint FROM customers) ORDER BY id LIMIT 1`,
		[]any{x.rand.Float64()}, &id)
	if err != nil || !found {
		return err
	}
	return x.do("forget customer", x.as("job:privacy", "asked to be forgotten"), func(tx pgx.Tx) error {
		_, err := x.exec(tx, `UPDATE customers SET email = 'deleted-' || id || '@mail.example', name = 'deleted', phone = NULL, preferences = '{}', status = 'deleted',
			deleted_at = $2, lock_version = lock_version + 1, updated_at = $2 WHERE id = $1 AND deleted_at IS NULL`, id, now())
		return err
	})
}

// catalogue is ann's work: prices, texts, tags, products.
func catalogue(x *session) error {
	ann := x.as("ann@shop.example", "")
	if x.chance(0.15) {
		return newProduct(x, ann)
	}
	product, err := x.product()
	if err != nil {
		return err
	}
	var set, reason string
	action, value := "change price", any(nil)
	switch n := x.rand.IntN(100); {
	case n < 45:
		set, value, reason = "price = round(price * $2::numeric, 2)", fmt.Sprintf("%.2f", 0.9+x.rand.Float64()/4), "competitor's price"
	case n < 65:
		action, set, value, reason = "edit description", "description = $2", description(x), "new text"
	case n < 90:
		tag := one(x, []string{"new", "sale", "eco", "gift"})
		action, set, value, reason = "edit tags", "tags = CASE WHEN $2 = ANY (tags) THEN array_remove(tags, $2) ELSE tags || $2::text END", tag, tag+" products"
	default:
		action, set, value, reason = "discontinue", "active = $2", false, "no longer made"
	}
	ann.Reason = reason
	return x.do(action, ann, func(tx pgx.Tx) error {
		_, err := x.exec(tx, `UPDATE products SET `+set+`, lock_version = lock_version + 1, updated_at = $3 WHERE id = $1`, product, value, now())
		return err
	})
}

func newProduct(x *session, ann *who) error {
	ann.Reason = "autumn collection"
	return x.do("new product", ann, func(tx pgx.Tx) error { return x.insertProduct(tx) })
}

func (x *session) insertProduct(tx pgx.Tx) error {
	noun := one(x, nouns)
	name := one(x, adjectives) + " " + noun
	sku := fmt.Sprintf("%s-%06d", strings.ToUpper(noun[:3]), x.rand.IntN(1e6))
	_, err := x.exec(tx, `INSERT INTO products (sku, name, description, price, stock, tags, weight_kg, created_at, updated_at) VALUES ($1, $2, $3, $4::numeric, $5, $6, $7, $8, $8)
		ON CONFLICT (sku) DO NOTHING`, sku, name, description(x), fmt.Sprintf("%d.%d9", 4+x.rand.IntN(90), x.rand.IntN(10)),
		10+x.rand.IntN(50), []string{strings.ToLower(noun), one(x, []string{"home", "garden", "kitchen", "office"})}, 0.05*float64(1+x.rand.IntN(100)), now())
	return err
}

// byHand is somebody in psql: no context, and no updated_at.
func byHand(x *session) error {
	if x.chance(0.3) {
		return x.do("repair by hand", nil, func(tx pgx.Tx) error {
			_, err := x.exec(tx, `UPDATE products SET active = true WHERE id = (SELECT min(id) FROM products WHERE NOT active)`)
			return err
		})
	}
	order, _, found, err := x.recent("pending", "paid", "shipped", "delivered")
	if err != nil || !found {
		return err
	}
	return x.do("repair by hand", nil, func(tx pgx.Tx) error {
		_, err := x.exec(tx, `UPDATE orders SET note = coalesce(note || '; ', '') || 'seen by the auditors' WHERE id = $1`, order)
		return err
	})
}
