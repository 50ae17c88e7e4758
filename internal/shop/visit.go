package shop

import (
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// visitor is somebody who has come to buy.
type visitor struct {
	*session
	id   int64
	who  *who // nil: came over the old mobile API, which says nothing
	cart string
}

// visit is one customer's way through the shop.
func visit(x *session) error {
	v := &visitor{session: x}
	if err := v.arrive(); err != nil {
		return err
	}
	if err := v.fill(); err != nil {
		return err
	}
	if x.chance(0.3) {
		return nil // walks away; the cart stays
	}
	order, err := v.checkOut()
	if err != nil {
		return err
	}
	return v.pay(order)
}

// arrive signs up or comes back.
func (v *visitor) arrive() error {
	email := ""
	if v.chance(0.7) {
		found, err := v.find(`SELECT id, email FROM customers WHERE deleted_at IS NULL AND status = 'active'
			AND id >= (SELECT (max(id) * $1::float8)::bigint FROM customers) ORDER BY id LIMIT 1`, []any{v.rand.Float64()}, &v.id, &email)
		if err != nil {
			return err
		}
		if found {
			v.identify(email)
			return nil
		}
	}
	first, last := one(v.session, firstNames), one(v.session, lastNames)
	email = strings.ToLower(first + "." + last + "@mail.example")
	v.identify(email)
	return v.do("sign up", v.who.because(v.session, "signed up"), func(tx pgx.Tx) error {
		for {
			err := tx.QueryRow(v.work, `INSERT INTO customers (email, name, phone, preferences, created_at, updated_at) VALUES ($1, $2, $3, $4, $5, $5)
				ON CONFLICT (email) DO NOTHING RETURNING id`, email, first+" "+last, v.phone(),
				fmt.Sprintf(`{"language": "%s", "newsletter": %t}`, one(v.session, []string{"en", "de", "fr", "nl"}), v.chance(0.4)), now()).Scan(&v.id)
			if !errors.Is(err, pgx.ErrNoRows) {
				return err
			}
			email = strings.ToLower(fmt.Sprintf("%s.%s%d@mail.example", first, last, v.rand.IntN(100000))) // the name is taken
		}
	})
}

func (v *visitor) identify(email string) {
	if v.chance(0.9) {
		v.who = v.as(email, "")
	}
}

func (x *session) phone() *string {
	if x.chance(0.4) {
		return nil
	}
	p := fmt.Sprintf("+49 30 %07d", x.rand.IntN(1e7))
	return &p
}

// fill puts things into a cart, and some of them back.
func (v *visitor) fill() error {
	err := v.do("open a cart", v.who.because(v.session, ""), func(tx pgx.Tx) error {
		return tx.QueryRow(v.work, `INSERT INTO carts (id, customer_id, created_at, updated_at) VALUES ($1, $2, $3, $3) RETURNING id::text`,
			v.uuid(), v.id, now()).Scan(&v.cart)
	})
	for n := 1 + v.rand.IntN(5); n > 0 && err == nil; n-- {
		switch {
		case v.chance(0.12):
			err = v.changeCart("remove from cart", func(tx pgx.Tx) error {
				_, err := v.exec(tx, `DELETE FROM cart_items WHERE id = (SELECT id FROM cart_items WHERE cart_id = $1 ORDER BY id LIMIT 1)`, v.cart)
				return err
			})
		case v.chance(0.15):
			err = v.changeCart("change quantity", func(tx pgx.Tx) error {
				_, err := v.exec(tx, `UPDATE cart_items SET quantity = $2, updated_at = $3 WHERE id = (SELECT max(id) FROM cart_items WHERE cart_id = $1)`,
					v.cart, 1+v.rand.IntN(5), now())
				return err
			})
		default:
			err = v.add()
		}
	}
	return err
}

// changeCart runs f with the cart locked, and counts its items afterwards.
func (v *visitor) changeCart(action string, f func(pgx.Tx) error) error {
	return v.do(action, v.who.because(v.session, ""), func(tx pgx.Tx) error {
		var status string
		err := tx.QueryRow(v.work, `SELECT status FROM carts WHERE id = $1 FOR UPDATE`, v.cart).Scan(&status)
		if errors.Is(err, pgx.ErrNoRows) || err == nil && status != "open" {
			return refusal("the cart has been cleared away")
		}
		if err != nil {
			return err
		}
		if err := f(tx); err != nil {
			return err
		}
		_, err = v.exec(tx, `UPDATE carts SET items_count = (SELECT count(*) FROM cart_items WHERE cart_id = $1), updated_at = $2 WHERE id = $1`, v.cart, now())
		return err
	})
}

// add puts a product into the cart as create_or_find_by does: it inserts, and where the product is there already it rolls
// back to a savepoint and raises the quantity.
func (v *visitor) add() error {
	product, err := v.product()
	if err != nil {
		return err
	}
	return v.changeCart("add to cart", func(tx pgx.Tx) error {
		quantity := 1 + v.rand.IntN(3)
		err := pgx.BeginFunc(v.work, tx, func(sub pgx.Tx) error {
			_, err := v.exec(sub, `INSERT INTO cart_items (cart_id, product_id, quantity, created_at, updated_at) VALUES ($1, $2, $3, $4, $4)`,
				v.cart, product, quantity, now())
			return err
		})
		if sqlState(err) == "23505" { // unique_violation
			_, err = v.exec(tx, `UPDATE cart_items SET quantity = quantity + $3, updated_at = $4 WHERE cart_id = $1 AND product_id = $2`, v.cart, product, quantity, now())
		}
		return err
	})
}

// product chooses one; few products make most of the sales.
func (x *session) product() (id int64, err error) {
	var n int64
	if _, err := x.find(`SELECT count(*) FROM products WHERE active`, nil, &n); err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, refusal("nothing is for sale")
	}
	f := x.rand.Float64()
	found, err := x.find(`SELECT id FROM products WHERE active ORDER BY id OFFSET $1 LIMIT 1`, []any{int64(f * f * float64(n))}, &id)
	if err == nil && !found {
		err = refusal("nothing is for sale")
	}
	return id, err
}

// line is an item of the cart on its way into an order.
type line struct {
	product  int64
	name     string
	quantity int
	price    string
}

// checkOut makes an order of the cart, in one transaction.
func (v *visitor) checkOut() (order int64, err error) {
	err = v.do("check out", v.who.because(v.session, "checkout"), func(tx pgx.Tx) error {
		var status string
		err := tx.QueryRow(v.work, `SELECT status FROM carts WHERE id = $1 FOR UPDATE`, v.cart).Scan(&status)
		if errors.Is(err, pgx.ErrNoRows) || err == nil && status != "open" {
			return refusal("the cart has been cleared away")
		}
		if err != nil {
			return err
		}
		rows, err := tx.Query(v.work, `SELECT p.id, p.name, i.quantity, p.price::text FROM cart_items i JOIN products p ON p.id = i.product_id
			WHERE i.cart_id = $1 ORDER BY p.id`, v.cart)
		if err != nil {
			return err
		}
		lines, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (l line, err error) {
			return l, row.Scan(&l.product, &l.name, &l.quantity, &l.price)
		})
		if err != nil {
			return err
		}
		if len(lines) == 0 {
			return refusal("the cart is empty")
		}
		address := fmt.Sprintf(`{"name": "customer %d", "street": "%s %d", "zip": "%05d", "city": "%s", "country": "DE"}`,
			v.id, one(v.session, streets), 1+v.rand.IntN(150), 10000+v.rand.IntN(89999), one(v.session, cities))
		err = tx.QueryRow(v.work, `INSERT INTO orders (customer_id, shipping_address, created_at, updated_at) VALUES ($1, $2, $3, $3) RETURNING id`,
			v.id, address, now()).Scan(&order)
		if err != nil {
			return err
		}
		for _, l := range lines {
			if _, err := v.exec(tx, `INSERT INTO order_items (order_id, product_id, product_name, quantity, unit_price, created_at, updated_at)
				VALUES ($1, $2, $3, $4, $5, $6, $6)`, order, l.product, l.name, l.quantity, l.price, now()); err != nil {
				return err
			}
			_, err := v.exec(tx, `UPDATE products SET stock = stock - $2, updated_at = $3 WHERE id = $1`, l.product, l.quantity, now())
			if sqlState(err) == "23514" { // check_violation: stock_is_not_negative
				return refusal("not enough in stock")
			}
			if err != nil {
				return err
			}
		}
		if err := v.total(tx, order, "4.90"); err != nil {
			return err
		}
		if v.chance(0.2) {
			if err := v.redeem(tx, order); err != nil {
				return err
			}
		}
		if _, err := v.exec(tx, `INSERT INTO payments (order_id, method, amount, created_at, updated_at)
			SELECT id, $2, total, $3, $3 FROM orders WHERE id = $1`, order, one(v.session, []string{"card", "card", "paypal", "transfer"}), now()); err != nil {
			return err
		}
		if _, err := v.exec(tx, `UPDATE carts SET status = 'ordered', updated_at = $2 WHERE id = $1`, v.cart, now()); err != nil {
			return err
		}
		_, err = v.exec(tx, `UPDATE customers SET orders_count = orders_count + 1, updated_at = $2 WHERE id = $1`, v.id, now())
		return err
	})
	return order, err
}

// total brings an order's amounts in line with its lines.
func (x *session) total(tx pgx.Tx, order int64, shipping string) error {
	_, err := x.exec(tx, `UPDATE orders o SET number = 'R' || lpad(o.id::text, 6, '0'), items_count = i.n, subtotal = i.amount, shipping = $2::numeric, discount = 0,
		coupon_code = NULL, total = i.amount + $2::numeric, updated_at = $3
		FROM (SELECT count(*) AS n, sum(quantity * unit_price) AS amount FROM order_items WHERE order_id = $1) i WHERE o.id = $1`, order, shipping, now())
	return err
}

// redeem takes a coupon off the order, and puts it back on where the coupon turns out not to be valid.
func (v *visitor) redeem(tx pgx.Tx, order int64) error {
	coupon := one(v.session, coupons)
	err := pgx.BeginFunc(v.work, tx, func(sub pgx.Tx) error {
		var subtotal float64
		err := sub.QueryRow(v.work, `UPDATE orders SET coupon_code = $2, discount = round(subtotal * 0.10, 2), total = subtotal + shipping - round(subtotal * 0.10, 2), updated_at = $3
			WHERE id = $1 RETURNING subtotal::float8`, order, coupon, now()).Scan(&subtotal)
		if err == nil && subtotal < 60 {
			err = refusal("coupon " + coupon + " is for orders of 60.00 and more")
		}
		return err
	})
	if errors.As(err, new(refusal)) {
		_, err = v.exec(tx, `UPDATE orders SET note = $2, updated_at = $3 WHERE id = $1`, order, err.Error(), now())
	}
	return err
}

// pay tries until the payment service says yes, or the customer has enough.
func (v *visitor) pay(order int64) error {
	if v.chance(0.06) {
		return v.cancel(order, v.who.because(v.session, "changed my mind"))
	}
	for try := 1; ; try++ {
		service := v.as("webhook:payments", "payment confirmed")
		if v.chance(0.05) {
			return nil // never comes back; job:dunning will see
		}
		if v.chance(0.88) {
			return v.do("pay", service, func(tx pgx.Tx) error {
				n, err := v.exec(tx, `UPDATE orders SET status = 'paid', paid_at = $2, lock_version = lock_version + 1, updated_at = $2 WHERE id = $1 AND status = 'pending'`, order, now())
				if err != nil {
					return err
				}
				m, err := v.exec(tx, `UPDATE payments SET status = 'paid', provider_reference = $2, response = $3, updated_at = $4 WHERE order_id = $1 AND status = 'pending'`,
					order, "ch_"+v.uuid()[:13], fmt.Sprintf(`{"outcome": "authorized", "risk": %.3f, "network": {"status": "approved", "seller_message": "Payment complete."}}`, v.rand.Float64()), now())
				if err == nil && (n != 1 || m != 1) {
					err = refusal("the order cannot be paid any more")
				}
				return err
			})
		}
		service.Reason = "payment declined"
		err := v.do("decline payment", service, func(tx pgx.Tx) error {
			n, err := v.exec(tx, `UPDATE payments SET status = 'failed', failure_reason = $2, updated_at = $3 WHERE order_id = $1 AND status = 'pending'`,
				order, one(v.session, []string{"card_declined", "insufficient_funds", "expired_card"}), now())
			if err == nil && n == 0 {
				err = refusal("the order cannot be paid any more")
			}
			return err
		})
		if err != nil {
			return err
		}
		if try == 3 || v.chance(0.2) {
			return v.cancel(order, v.who.because(v.session, "could not pay"))
		}
		err = v.do("try another payment", v.who.because(v.session, "another card"), func(tx pgx.Tx) error {
			n, err := v.exec(tx, `INSERT INTO payments (order_id, method, amount, created_at, updated_at)
				SELECT id, 'card', total, $2, $2 FROM orders WHERE id = $1 AND status = 'pending' FOR UPDATE`, order, now())
			if err == nil && n == 0 {
				err = refusal("the order cannot be paid any more")
			}
			return err
		})
		if err != nil {
			return err
		}
	}
}

// cancel cancels an order that is not paid; its goods go back to the shelves.
func (x *session) cancel(order int64, w *who) error {
	return x.do("cancel", w, func(tx pgx.Tx) error {
		n, err := x.exec(tx, `UPDATE orders SET status = 'cancelled', lock_version = lock_version + 1, updated_at = $2 WHERE id = $1 AND status = 'pending'`, order, now())
		if err == nil && n == 0 {
			err = refusal("the order cannot be cancelled any more")
		}
		if err != nil {
			return err
		}
		if _, err := x.exec(tx, `UPDATE payments SET status = 'void', updated_at = $2 WHERE order_id = $1 AND status = 'pending'`, order, now()); err != nil {
			return err
		}
		return x.putBack(tx, order)
	})
}

// putBack returns an order's goods to the shelves.
func (x *session) putBack(tx pgx.Tx, order int64) error {
	_, err := x.exec(tx, `UPDATE products p SET stock = p.stock + i.quantity, updated_at = $2
		FROM (SELECT product_id, sum(quantity) AS quantity FROM order_items WHERE order_id = $1 GROUP BY product_id ORDER BY product_id) i WHERE p.id = i.product_id`, order, now())
	return err
}
