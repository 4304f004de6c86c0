"""The contract table's bases, for the tests of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import bases

__all__ = ["bases"]
