package shop

import (
	"fmt"
	"strings"
)

var (
	firstNames = strings.Fields("Ada Ann Ben Carl Dina Emil Eva Finn Gita Hugo Ida Jan Jule Karim Lea Lena Max Mia Nils Noor Olga Omar Paul Pia Rosa Sami Tara Timo Uma Vera Wim Yara Zoe")
	lastNames  = strings.Fields("Arndt Bauer Bianchi Costa Diaz Eriksen Fischer Garcia Haas Ito Jansen Keller Kaya Lang Lopez Meyer Moreau Novak Okafor Petrov Quist Rossi Sato Schmidt Smit Tanaka Urban Vogel Weber Yilmaz Zimmer")
	streets    = []string{"Hauptstraße", "Gartenweg", "Rue de l'Église", "Kirchgasse", "Am Markt", "Łąkowa", "Long Lane", "Bergstraße"}
	cities     = []string{"Berlin", "Köln", "Zürich", "Wien", "Łódź", "Århus", "Lyon", "Gent"}
	coupons    = []string{"WELCOME10", "SUMMER10", "SORRY10"}
	nouns      = strings.Fields("Teapot Lantern Blanket Basket Kettle Notebook Planter Stool Lamp Clock Tray Vase Mug Rug Bench Mirror")
	adjectives = strings.Fields("Blue Small Round Heavy Woven Folding Quiet Classic Nordic Brass Oak Linen Painted Tall")
	textWords  = strings.Fields("made by hand from solid oak and brass the surface is oiled twice so that it ages well every piece is a little different and the maker signs it " +
		"underneath it is easy to clean with a damp cloth please do not put it into the dishwasher it comes in a box of recycled paper with felt between the parts")
)

// description is a text of one line, or of several kilobytes, which Postgres then keeps out of line.
func description(x *session) string {
	n := 12 + x.rand.IntN(30)
	if x.chance(0.25) {
		n = 1500 + x.rand.IntN(1500)
	}
	var b strings.Builder
	for i := range n {
		if i > 0 {
			b.WriteByte(' ')
		}
		if n > 100 && i%3 == 0 { // so that it does not compress into the row
			fmt.Fprintf(&b, "%x", x.rand.Uint64())
			continue
		}
		b.WriteString(one(x, textWords))
	}
	return b.String()
}
