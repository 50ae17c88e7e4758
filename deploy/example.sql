-- A table to try things out with; deploy/compose.yaml loads it.
CREATE TABLE orders (
  id         bigserial PRIMARY KEY,
  customer   text NOT NULL,
  status     text NOT NULL DEFAULT 'pending',
  total      numeric(10,2) NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
