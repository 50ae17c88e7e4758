// Package yamlfile reads a YAML file strictly and keeps the place of everything, so that whatever is wrong in it, also what is found
// much later, is told with line and column. It refuses what is silently something else than it looks: tags (`when: !x` would be empty), anchors,
// names given twice, and a comment that cuts off the end of an expression.
package yamlfile
