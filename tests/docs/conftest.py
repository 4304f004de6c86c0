"""What tests of the documents share."""

import importlib.util
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pages():
    """docs/pages.py, which imports its neighbours."""
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(scope="session")
def embedded():
    """The embedded base, loaded once: recipes only read it."""
    from xfusion.backbone import EMBEDDED, Backbone

    base = Backbone.load(EMBEDDED)
    yield base
    assert base.compute_fingerprint() == base.fingerprint
