package backstory

import (
	"context"
	"fmt"
	"time"

	"github.com/backstory-dev/backstory/eventlog"
	"github.com/backstory-dev/backstory/rules"
)

// SetRules puts other rules into force, from the next transaction on; nil: the default ones. Rules that do not fit the captured tables are refused, with an error that has
// yamlfile's places in it, and those before stay in force.
func (s *Sidecar) SetRules(ctx context.Context, f *rules.File) error {
	if f == nil {
		s.rules.Store(nil)
		s.log.SetRules(nil)
		return nil
	}
	captured, err := s.log.Captured(ctx)
	if err != nil {
		return err
	}
	if err := s.checkRules(f, captured); err != nil {
		return err
	}
	s.rules.Store(f)
	s.log.SetRules(f)
	return nil
}

// checkRules compares rules with the captured tables, and says what can hardly be meant.
func (s *Sidecar) checkRules(f *rules.File, captured []eventlog.Captured) error {
	warnings, err := f.Check(eventlog.RelationsOf(captured))
	for _, w := range warnings {
		s.cfg.Logger.Warn("a rule can hardly be meant so", "what", w.Error())
	}
	if err != nil {
		return &eventlog.Problem{Err: fmt.Errorf("the rules do not fit the tables:\n%w", err), Hint: "backstory rules check tells when they do."}
	}
	return nil
}

// useRules checks the rules with which the sidecar began. Where the log has them already, what has become of the tables since then stops nothing.
func (s *Sidecar) useRules(ctx context.Context, captured []eventlog.Captured) error {
	f := s.rules.Load()
	if s.fit {
		return nil
	}
	_, inForce, err := s.log.RulesInForce(ctx)
	switch {
	case err != nil:
		return err
	case f == nil && inForce != "":
		s.cfg.Logger.Warn("the log was written by rules, and now there are none: row changes become default events", "hint", "BACKSTORY_CONFIG names the file of rules; without it, backstory.yaml in the current directory counts.")
	case f == nil:
	case f.Text() == inForce:
		if _, err := f.Check(eventlog.RelationsOf(captured)); err != nil {
			s.cfg.Logger.Warn("rules do not fit the tables any more: what does not is left out", "what", err.Error(), "hint", "backstory rules check tells when they do.")
		}
	default:
		if err := s.checkRules(f, captured); err != nil {
			return err
		}
	}
	s.fit = true
	return nil
}

// noteRules says which rules do not fit the tables any more.
func (s *Sidecar) noteRules() {
	f := s.rules.Load()
	if f == nil {
		return
	}
	if now := s.total(); now.RuleErrors > s.ruleErrors && time.Since(s.ruleErrorsAt) > time.Minute {
		example := ""
		if r := s.now.Load(); r != nil {
			example = r.writer.RuleError()
		}
		s.cfg.Logger.Warn("rules could not be applied: these changes have their default events", "changes", now.RuleErrors-s.ruleErrors, "for_example", example)
		s.ruleErrors, s.ruleErrorsAt = now.RuleErrors, time.Now()
	}
	list := f.Trouble()
	if f != s.noted {
		s.noted, s.troubles = f, 0
	}
	for ; s.troubles < len(list); s.troubles++ {
		s.cfg.Logger.Warn("a rule does not fit its table any more, and is left out", "what", list[s.troubles])
	}
}
