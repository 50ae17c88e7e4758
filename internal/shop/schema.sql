CREATE TABLE customers (
  id           bigserial PRIMARY KEY,
  email        varchar NOT NULL,
  name         varchar NOT NULL,
  phone        varchar(40),
  status       varchar NOT NULL DEFAULT 'active',
  preferences  jsonb NOT NULL DEFAULT '{}',
  orders_count integer NOT NULL DEFAULT 0,
  lock_version integer NOT NULL DEFAULT 0,
  deleted_at   timestamp(6),
  created_at   timestamp(6) NOT NULL,
  updated_at   timestamp(6) NOT NULL
);
CREATE UNIQUE INDEX index_customers_on_email ON customers (email);
CREATE INDEX index_customers_on_status ON customers (status, id);

CREATE TABLE products (
  id           bigserial PRIMARY KEY,
  sku          varchar(32) NOT NULL,
  name         varchar NOT NULL,
  description  text,
  price        numeric(10,2) NOT NULL,
  stock        integer NOT NULL DEFAULT 0 CONSTRAINT stock_is_not_negative CHECK (stock >= 0),
  active       boolean NOT NULL DEFAULT true,
  tags         text[] NOT NULL DEFAULT '{}',
  weight_kg    double precision,
  lock_version integer NOT NULL DEFAULT 0,
  created_at   timestamp(6) NOT NULL,
  updated_at   timestamp(6) NOT NULL
);
CREATE UNIQUE INDEX index_products_on_sku ON products (sku);

CREATE TABLE carts (
  id          uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  customer_id bigint REFERENCES customers (id),
  status      varchar NOT NULL DEFAULT 'open',
  items_count integer NOT NULL DEFAULT 0,
  created_at  timestamp(6) NOT NULL,
  updated_at  timestamp(6) NOT NULL
);
CREATE INDEX index_carts_on_customer_id ON carts (customer_id);
CREATE INDEX index_carts_on_status_and_updated_at ON carts (status, updated_at);

CREATE TABLE cart_items (
  id         bigserial PRIMARY KEY,
  cart_id    uuid NOT NULL REFERENCES carts (id),
  product_id bigint NOT NULL REFERENCES products (id),
  quantity   integer NOT NULL DEFAULT 1,
  created_at timestamp(6) NOT NULL,
  updated_at timestamp(6) NOT NULL
);
CREATE UNIQUE INDEX index_cart_items_on_cart_id_and_product_id ON cart_items (cart_id, product_id);

CREATE TABLE orders (
  id               bigserial PRIMARY KEY,
  number           varchar,
  customer_id      bigint NOT NULL REFERENCES customers (id),
  status           varchar NOT NULL DEFAULT 'pending',
  items_count      integer NOT NULL DEFAULT 0,
  subtotal         numeric(12,2) NOT NULL DEFAULT 0,
  shipping         numeric(12,2) NOT NULL DEFAULT 0,
  discount         numeric(12,2) NOT NULL DEFAULT 0,
  total            numeric(12,2) NOT NULL DEFAULT 0,
  coupon_code      varchar,
  shipping_address jsonb NOT NULL,
  tracking_code    varchar,
  note             text,
  lock_version     integer NOT NULL DEFAULT 0,
  paid_at          timestamp(6),
  shipped_at       timestamp(6),
  created_at       timestamp(6) NOT NULL,
  updated_at       timestamp(6) NOT NULL
);
CREATE UNIQUE INDEX index_orders_on_number ON orders (number);
CREATE INDEX index_orders_on_customer_id ON orders (customer_id);
CREATE INDEX index_orders_on_status ON orders (status, id);

CREATE TABLE order_items (
  id           bigserial PRIMARY KEY,
  order_id     bigint NOT NULL REFERENCES orders (id),
  product_id   bigint NOT NULL REFERENCES products (id),
  product_name varchar NOT NULL,
  quantity     integer NOT NULL,
  unit_price   numeric(10,2) NOT NULL,
  created_at   timestamp(6) NOT NULL,
  updated_at   timestamp(6) NOT NULL
);
CREATE INDEX index_order_items_on_order_id ON order_items (order_id);

CREATE TABLE payments (
  id                 bigserial PRIMARY KEY,
  order_id           bigint NOT NULL REFERENCES orders (id),
  method             varchar NOT NULL,
  status             varchar NOT NULL DEFAULT 'pending',
  amount             numeric(12,2) NOT NULL,
  provider_reference varchar,
  response           jsonb,
  failure_reason     text,
  created_at         timestamp(6) NOT NULL,
  updated_at         timestamp(6) NOT NULL
);
CREATE INDEX index_payments_on_order_id ON payments (order_id);
