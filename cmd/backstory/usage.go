package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/backstory-dev/backstory/eventlog"
)

// usage is an error of wrong use: a command line or a setting that cannot be right, whatever the databases hold.
func usage(hint, format string, args ...any) error {
	return &exitError{exitUsage, &eventlog.Problem{Err: fmt.Errorf(format, args...), Hint: hint}}
}

// strict makes wrong use of a command, and of those below it, an error of wrong use that says how it is meant.
func strict(c *cobra.Command) {
	c.SetFlagErrorFunc(flagError)
	c.SuggestionsMinimumDistance = 2
	if check := c.Args; check != nil || c.HasSubCommands() {
		c.Args = func(c *cobra.Command, args []string) error {
			if c.HasSubCommands() && len(args) > 0 {
				return usage(didYouMean(c.CommandPath()+" ", c.SuggestionsFor(args[0]), c), "there is no command %q", strings.TrimPrefix(c.CommandPath()+" "+args[0], "backstory "))
			}
			if check == nil || check(c, args) == nil {
				return nil
			}
			if _, form, ok := strings.Cut(c.Use, " "); ok {
				return usage(seeHelp(c), "%s wants %s, but was given %s", name(c), form, listed(args))
			}
			return usage(seeHelp(c), "%s takes no arguments, but was given %s", name(c), listed(args))
		}
	}
	for _, sub := range c.Commands() {
		strict(sub)
	}
}

// notEmpty refuses flags that were given without a value, such as --since "$SINCE" where there is no such variable: they would select everything.
func notEmpty(c *cobra.Command, flags ...string) error {
	for _, name := range flags {
		if f := c.Flags().Lookup(name); f.Changed && (f.Value.String() == "" || f.Value.String() == "[]") {
			return usage("Leave it out, or give it a value. "+seeHelp(c), "--%s is empty", name)
		}
	}
	return nil
}

// name gives a command without the program's name, which stands before every message.
func name(c *cobra.Command) string { return strings.TrimPrefix(c.CommandPath(), "backstory ") }

func listed(args []string) string {
	if len(args) == 0 {
		return "none"
	}
	quoted := make([]string, len(args))
	for i, a := range args {
		quoted[i] = fmt.Sprintf("%q", a)
	}
	return strings.Join(quoted, " ")
}

// flagError tells of a flag that does not exist, or of a value that it does not take.
func flagError(c *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	var value *pflag.InvalidValueError
	switch {
	case errors.As(err, &unknown):
		var names []string
		c.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
		return usage(didYouMean("--", similar(unknown.GetSpecifiedName(), names), c), "%s has no flag %s", name(c), strings.TrimPrefix(err.Error(), "unknown flag: "))
	case errors.As(err, &value):
		f := value.GetFlag()
		want := map[string]string{"int": "a whole number", "int64": "a whole number", "float64": "a number", "bool": "true or false", "duration": "a duration such as 20s or 5m"}[f.Value.Type()]
		if want == "" {
			want = "another value"
		}
		return usage(seeHelp(c), "--%s wants %s, not %q", f.Name, want, value.GetValue())
	}
	return usage(seeHelp(c), "%w", err)
}

func seeHelp(c *cobra.Command) string { return "See " + c.CommandPath() + " --help." }

func didYouMean(prefix string, similar []string, c *cobra.Command) string {
	if len(similar) == 0 {
		return seeHelp(c)
	}
	return "Did you mean " + prefix + strings.Join(similar, " or "+prefix) + "? " + seeHelp(c)
}

// similar finds the words that are like one, as cobra finds commands.
func similar(word string, among []string) []string {
	c := &cobra.Command{SuggestionsMinimumDistance: 2}
	for _, w := range among {
		c.AddCommand(&cobra.Command{Use: w, Run: func(*cobra.Command, []string) {}})
	}
	return c.SuggestionsFor(word)
}
