package e2e

import "testing"

func TestSmoke(t *testing.T) {
	s := newSystem(t, where{})
	db := s.sql()
	db.do(`CREATE TABLE public.a (id int PRIMARY KEY, v text); CREATE TABLE public.b (id int PRIMARY KEY, v text)`)
	s.init()
	db.do(`BEGIN; INSERT INTO public.a VALUES (1, 'x'); INSERT INTO public.b VALUES (1, 'x'); UPDATE public.a SET v = 'y'; COMMIT`)
	s.once()
	w := checkLog(t, s.openLog())
	w.sameTables(t, db, "true")
}
