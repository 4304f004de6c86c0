"""What every test shares: repeatable examples, a fixed number of threads, tiny bases, and where the real test assets are."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")

sys.path.insert(0, str(Path(__file__).parent))  # what tests share is imported as `contracts.table`

if "OMP_NUM_THREADS" not in os.environ:
    # The order of a sum depends on it: the same on one core and on sixty. Most tests compute on tiny matrices, which one
    # thread multiplies several times faster than two that wait for each other. What tests start has as many.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


LONGEST = (
    "training/test_loop.py",
    "test_comparison.py",
    "contracts/test_paths.py",
    "training/test_processes.py",
    "contracts/test_readers.py",
    "generation/test_words.py",
    "apps/test_serve.py",
    "docs/test_docs.py",
    "contracts/test_packs.py",
    "apps/test_cli.py",
    "recipes/test_every_recipe.py",
    "data/test_latents.py",
    "contracts/test_equations.py",
    "contracts/test_device.py",
    "contracts/test_text.py",
    "recipes/test_reading.py",
    "apps/test_web.py",
    "training/test_unreadable.py",
)
"""Files that take longest, by processor time where they do not wait."""


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one of them when the others are done."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish():
    """What is imported stays: without this the garbage collector looks it all over again, a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """One base of each family, shared by all tests: nothing may change them, and that is checked at the end."""
    from contracts.table import Bases

    bases_by_family = Bases(tmp_path_factory.mktemp)
    yield bases_by_family
    bases_by_family.check()


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of real test assets: ``$XFUSION_TEST_ASSETS``, else ``shared/assets`` beside the checkout."""
    variable = os.environ.get("XFUSION_TEST_ASSETS")
    folder = Path(variable) if variable else Path(__file__).parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("real test assets not found: set XFUSION_TEST_ASSETS")
    return folder
