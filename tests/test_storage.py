"""What is written appears whole or not at all."""

import contextlib
import errno
import json
import math
import os
from pathlib import Path

import pytest

from xfusion.data.sequence import XFusionError
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


def test_a_file_has_its_bytes_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a power cut may leave the name with nothing in it. Then the name itself."""
    done, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino) or sync(handle))
    monkeypatch.setattr(Path, "replace", lambda self, target: done.append("named") or replace(self, target))
    with whole_file(tmp_path / "page.html") as temporary:
        temporary.write_text("whole")
    assert done == [(tmp_path / "page.html").stat().st_ino, "named", tmp_path.stat().st_ino]


def test_a_disk_that_is_full_is_told_with_the_name(tmp_path):
    path = tmp_path / "page.html"
    told = r"page\.html cannot be written: No space left on device; make room, or name another folder$"
    with pytest.raises(XFusionError, match=told), whole_file(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "file").touch()
    with pytest.raises(XFusionError, match="a file stands where a folder is needed"):
        write_json(tmp_path / "file" / "metrics.json", {})
