"""Outside harnesses, a file per harness; each is imported where it is asked for, since its package is an extra."""
