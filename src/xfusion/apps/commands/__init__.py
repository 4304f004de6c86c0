"""The verbs of the command line, one small class each; torch is imported only when a verb runs, not for its help."""
