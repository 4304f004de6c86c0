"""One file per suite: a function ``run(model, *, progress, **settings) -> dict``. The folder is the list of suites."""
