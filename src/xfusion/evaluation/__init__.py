"""Scores a model: `run.evaluate` finds a suite by name, `suites` holds them, `metrics` computes."""
