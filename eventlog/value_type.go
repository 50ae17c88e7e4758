package eventlog

// builtin is one data type that every server has under the same OID.
type builtin struct {
	oid, array uint32 // array: of its array type, zero if there is none
	name       string // as format_type prints it without a modifier
	kind       Kind
	delim      byte
}

// builtins are the data types of a stock server, 14 to 18, that a column can have (pg_type, OIDs below 10000, less the
// row types of the catalogues).
var builtins = [...]builtin{
	{oid: 16, array: 1000, name: "boolean", kind: KindBool},
	{oid: 17, array: 1001, name: "bytea", kind: KindBytea},
	{oid: 18, array: 1002, name: `"char"`},
	{oid: 19, array: 1003, name: "name"},
	{oid: 20, array: 1016, name: "bigint", kind: KindInt},
	{oid: 21, array: 1005, name: "smallint", kind: KindInt},
	{oid: 22, array: 1006, name: "int2vector"},
	{oid: 23, array: 1007, name: "integer", kind: KindInt},
	{oid: 24, array: 1008, name: "regproc"},
	{oid: 25, array: 1009, name: "text"},
	{oid: 26, array: 1028, name: "oid", kind: KindInt},
	{oid: 27, array: 1010, name: "tid"},
	{oid: 28, array: 1011, name: "xid"},
	{oid: 29, array: 1012, name: "cid"},
	{oid: 30, array: 1013, name: "oidvector"},
	{oid: 114, array: 199, name: "json", kind: KindJSON},
	{oid: 142, array: 143, name: "xml"},
	{oid: 194, name: "pg_node_tree"},
	{oid: 600, array: 1017, name: "point"},
	{oid: 601, array: 1018, name: "lseg"},
	{oid: 602, array: 1019, name: "path"},
	{oid: 603, array: 1020, name: "box", delim: ';'},
	{oid: 604, array: 1027, name: "polygon"},
	{oid: 628, array: 629, name: "line"},
	{oid: 650, array: 651, name: "cidr"},
	{oid: 700, array: 1021, name: "real", kind: KindFloat},
	{oid: 701, array: 1022, name: "double precision", kind: KindFloat},
	{oid: 718, array: 719, name: "circle"},
	{oid: 774, array: 775, name: "macaddr8"},
	{oid: 790, array: 791, name: "money"},
	{oid: 829, array: 1040, name: "macaddr"},
	{oid: 869, array: 1041, name: "inet"},
	{oid: 1033, array: 1034, name: "aclitem"},
	{oid: 1042, array: 1014, name: "bpchar"},
	{oid: 1043, array: 1015, name: "character varying"},
	{oid: 1082, array: 1182, name: "date"},
	{oid: 1083, array: 1183, name: "time without time zone"},
	{oid: 1114, array: 1115, name: "timestamp without time zone", kind: KindTimestamp},
	{oid: 1184, array: 1185, name: "timestamp with time zone", kind: KindTimestampTZ},
	{oid: 1186, array: 1187, name: "interval"},
	{oid: 1266, array: 1270, name: "time with time zone"},
	{oid: 1560, array: 1561, name: `"bit"`},
	{oid: 1562, array: 1563, name: "bit varying"},
	{oid: 1700, array: 1231, name: "numeric"},
	{oid: 1790, array: 2201, name: "refcursor"},
	{oid: 2202, array: 2207, name: "regprocedure"},
	{oid: 2203, array: 2208, name: "regoper"},
	{oid: 2204, array: 2209, name: "regoperator"},
	{oid: 2205, array: 2210, name: "regclass"},
	{oid: 2206, array: 2211, name: "regtype"},
	{oid: 2950, array: 2951, name: "uuid"},
	{oid: 2970, array: 2949, name: "txid_snapshot"},
	{oid: 3220, array: 3221, name: "pg_lsn"},
	{oid: 3361, name: "pg_ndistinct"},
	{oid: 3402, name: "pg_dependencies"},
	{oid: 3614, array: 3643, name: "tsvector"},
	{oid: 3615, array: 3645, name: "tsquery"},
	{oid: 3642, array: 3644, name: "gtsvector"},
	{oid: 3734, array: 3735, name: "regconfig"},
	{oid: 3769, array: 3770, name: "regdictionary"},
	{oid: 3802, array: 3807, name: "jsonb", kind: KindJSON},
	{oid: 3904, array: 3905, name: "int4range"},
	{oid: 3906, array: 3907, name: "numrange"},
	{oid: 3908, array: 3909, name: "tsrange"},
	{oid: 3910, array: 3911, name: "tstzrange"},
	{oid: 3912, array: 3913, name: "daterange"},
	{oid: 3926, array: 3927, name: "int8range"},
	{oid: 4072, array: 4073, name: "jsonpath"},
	{oid: 4089, array: 4090, name: "regnamespace"},
	{oid: 4096, array: 4097, name: "regrole"},
	{oid: 4191, array: 4192, name: "regcollation"},
	{oid: 4451, array: 6150, name: "int4multirange"},
	{oid: 4532, array: 6151, name: "nummultirange"},
	{oid: 4533, array: 6152, name: "tsmultirange"},
	{oid: 4534, array: 6153, name: "tstzmultirange"},
	{oid: 4535, array: 6155, name: "datemultirange"},
	{oid: 4536, array: 6157, name: "int8multirange"},
	{oid: 4600, name: "pg_brin_bloom_summary"},
	{oid: 4601, name: "pg_brin_minmax_multi_summary"},
	{oid: 5017, name: "pg_mcv_list"},
	{oid: 5038, array: 5039, name: "pg_snapshot"},
	{oid: 5069, array: 271, name: "xid8"},
}

// TypeKind gives what is known of the built-in type with this OID, its Name without a type modifier. It is false for
// all others, domains, enums and the types of extensions among them: those have to be looked up in the catalogue. Meant
// for once per version of a relation, not once per value.
func TypeKind(oid uint32) (Type, bool) {
	if oid == 0 {
		return Type{}, false
	}
	for i := range builtins {
		switch b := &builtins[i]; oid {
		case b.oid:
			return Type{OID: oid, Name: b.name, Kind: b.kind}, true
		case b.array:
			return Type{OID: oid, Name: b.name + "[]", Kind: b.kind, Array: true, Delim: b.delim}, true
		}
	}
	return Type{}, false
}
