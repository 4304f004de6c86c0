"""What is written appears whole or not at all."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from xfusion import checkpoint
from xfusion.data.sequence import XFusionError
from xfusion.storage import atomic_file, atomic_folder, check_writable, remove_leftovers, restore_folder, write_json

linux = pytest.mark.skipif(sys.platform != "linux", reason="a process that uses torch is forked safely on Linux alone")


def test_an_object_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"score": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"score": math.nan})
    assert json.loads(path.read_text()) == {"score": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_a_file_that_cannot_be_filled_leaves_what_stood_there(tmp_path):
    path = tmp_path / "new" / "page.html"
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
        assert temporary.suffix == ".html" and not path.exists()
    with contextlib.suppress(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("ha")
        raise RuntimeError("power cut")
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_a_file_has_its_bytes_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a power cut may leave the name with nothing in it. Then the name itself."""
    done, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino) or sync(handle))
    monkeypatch.setattr(Path, "replace", lambda self, target: done.append("named") or replace(self, target))
    with atomic_file(tmp_path / "page.html") as temporary:
        temporary.write_text("whole")
    assert done == [(tmp_path / "page.html").stat().st_ino, "named", tmp_path.stat().st_ino]


def test_a_disk_that_is_full_is_told_with_the_name(tmp_path):
    path = tmp_path / "page.html"
    told = r"page\.html cannot be written: No space left on device; make room, or name another folder$"
    with pytest.raises(XFusionError, match=told), atomic_file(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "file").touch()
    with pytest.raises(XFusionError, match="a file stands where a folder is needed"):
        write_json(tmp_path / "file" / "metrics.json", {})


def test_whether_a_place_can_be_written_is_known_before_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    check_writable(tmp_path / "file")  # would be replaced
    check_writable(tmp_path / "new" / "deeper" / "page.html")
    check_writable(tmp_path / "folder", folder=True)
    check_writable(tmp_path / "new" / "folder", folder=True)
    needs_a_folder = "cannot be written: a file stands where a folder is needed"
    for path, is_folder, told in (
        (tmp_path / "folder", False, "folder cannot be written: a folder stands where a file is needed; make room"),
        (tmp_path / "file", True, needs_a_folder),
        (tmp_path / "file" / "deeper" / "page.html", False, needs_a_folder),
        (Path("/proc/new/page.html"), False, "/proc/new/page.html cannot be written: "),
        (Path("/proc/new"), True, "/proc/new cannot be written: "),
    ):
        with pytest.raises(XFusionError, match=told):
            check_writable(path, folder=is_folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


# ------------------------------------------------------------------------------------------------------------ folders


def fill(folder, content):
    with atomic_folder(folder) as so_far:
        (so_far / "config.json").write_text(content)


def content(folder):
    return (folder / "config.json").read_text()


def test_a_folder_has_its_files_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """And the one that it replaces goes only when the name itself is there."""
    pack = tmp_path / "pack"
    fill(pack, "old")
    done, sync, rename, remove = [], os.fsync, Path.rename, shutil.rmtree

    def removed(path, **how):
        if path.exists():
            done.append(f"{path.name} removed")
        remove(path, **how)

    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino) or sync(handle))
    monkeypatch.setattr(
        Path, "rename", lambda self, target: done.append(f"{target.name} named") or rename(self, target)
    )
    monkeypatch.setattr(shutil, "rmtree", removed)
    fill(pack, "new")
    file, folder, parent = (path.stat().st_ino for path in (pack / "config.json", pack, tmp_path))
    assert done == [file, folder, ".pack-aside named", "pack named", parent, ".pack-aside removed"]


def after_the_first_rename(monkeypatch, then):
    """What happens in the moment in which one folder has lost its name and the other has none."""
    rename, calls = Path.rename, []

    def renamed(self, target):
        calls.append(target)
        found = rename(self, target)
        if len(calls) == 1:
            then()
        return found

    monkeypatch.setattr(Path, "rename", renamed)


@pytest.mark.parametrize("error", [OSError("I/O error"), KeyboardInterrupt()])
def test_an_error_between_two_names_gives_the_old_one_back(tmp_path, monkeypatch, error):
    fill(tmp_path / "pack", "old")

    def fail():
        raise error

    after_the_first_rename(monkeypatch, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else XFusionError):
        fill(tmp_path / "pack", "new")
    assert content(tmp_path / "pack") == "old" and [p.name for p in tmp_path.iterdir()] == ["pack"]


@linux
@pytest.mark.parametrize(
    "reads",
    [
        lambda pack: restore_folder(pack),
        lambda pack: checkpoint.find(str(pack)),
        lambda pack: checkpoint.find(str(pack.parent)),
        lambda pack: remove_leftovers(pack.parent, "p*"),
    ],
    ids=["put back", "a pack", "a run", "rests"],
)
def test_a_kill_between_two_names_loses_nothing(tmp_path, reads):
    pack = tmp_path / "pack"
    fill(pack, "old")
    killed_between_two_names(lambda: fill(pack, "new"))
    assert not pack.exists() and len(list(tmp_path.iterdir())) == 2  # the old one aside, the new one without its name
    reads(pack)
    assert content(pack) == "old"
    remove_leftovers(tmp_path, "pack")
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


@linux
def test_what_a_kill_left_without_its_name_is_replaced_like_any_other(tmp_path, monkeypatch):
    pack = tmp_path / "pack"
    fill(pack, "old")
    killed_between_two_names(lambda: fill(pack, "new"))
    with pytest.raises(RuntimeError, match="no more"), atomic_folder(pack):
        raise RuntimeError("no more")
    assert content(pack) == "old"
    fill(pack, "newer")
    assert content(pack) == "newer"


def killed_between_two_names(work):
    """A process that works and kills itself there."""
    child = os.fork()
    if not child:
        try:
            with pytest.MonkeyPatch.context() as patch:
                after_the_first_rename(patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
                work()
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_reader_in_that_moment_does_not_stop_the_writer(tmp_path, monkeypatch):
    fill(tmp_path / "pack", "old")
    after_the_first_rename(monkeypatch, lambda: restore_folder(tmp_path / "pack"))
    fill(tmp_path / "pack", "new")
    assert content(tmp_path / "pack") == "new" and [p.name for p in tmp_path.iterdir()] == ["pack"]
