"""What is written appears whole or not at all."""

import contextlib
import json
import math

import pytest

from xfusion.storage import whole_file, write_json


def test_an_object_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"score": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"score": math.nan})
    assert json.loads(path.read_text()) == {"score": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_a_file_that_cannot_be_filled_leaves_what_stood_there(tmp_path):
    path = tmp_path / "new" / "page.html"
    with whole_file(path) as temporary:
        temporary.write_text("whole")
        assert temporary.suffix == ".html" and not path.exists()
    with contextlib.suppress(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("ha")
        raise RuntimeError("power cut")
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
