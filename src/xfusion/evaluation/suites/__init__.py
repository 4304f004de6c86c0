"""One file per suite: a function ``run(model, *, progress, **settings) -> dict``. The folder is the list of suites.

Whole numbers among the settings, seeds apart, are 1 or more; a suite names in ``MAY_BE_ZERO`` those of which 0 means none.
"""
