"""`compare`: recipes against each other at equal budget, equal tuning and paired seeds; one JSON file per run.

What is compared is the mechanism: base, data, codec, picture size, budget, scoring and seeds are the same for all, or the
comparison is refused. What else differs between two recipes is listed beside the scores. Every run goes through the one
training loop and the one evaluation; `summarise` makes the table from the files alone.
"""

from xfusion.comparison.plan import Plan
from xfusion.comparison.run import compare
from xfusion.comparison.table import summarise

__all__ = ["Plan", "compare", "summarise"]
