"""Hostile data: nothing crashes, nothing hangs, memory stays bounded, and every example that does not train is named."""

import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import pyarrow
import pytest
from data.hostile import (
    BAD,
    EITHER,
    GOOD,
    KINDS,
    SPECIAL,
    Case,
    beside,
    cut,
    damaged,
    drawn,
    edited,
    encoded,
    garbled,
    names_and_words,
    pictures_of_all_kinds,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from webdataset.tariterators import base_plus_ext

from xfusion.apps import cli
from xfusion.data.report import one_line
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import check, open_source

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
SECONDS = 60
"""That one case may take on a busy machine; a hang takes for ever."""
NUM_DAMAGED, NUM_GARBLED = 600, 240
PARTS = 21
"""Of which the default tier tries the first."""

FIXED = [*pictures_of_all_kinds(), *names_and_words()]


@pytest.fixture(autouse=True)
def alarm():
    """A case that hangs fails instead of holding up the tests."""

    def late(number, frame):
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def try_it(case: Case, folder: Path) -> None:
    """A case is good, or is reported in one line of its own, by the check and by whoever opens the source."""
    folder.mkdir()
    case.write(folder)
    spec = folder / "data.jsonl" if (folder / "data.jsonl").exists() else folder
    signal.alarm(SECONDS)
    report = check(spec, special_tokens=(SPECIAL,))
    json.dumps(report.to_json())
    for problem in (*report.problems, *report.notes):
        assert problem.isprintable() and len(problem) < 1000, problem[:200]
    assert report.num_bad + (len(report.source) if report.source else 0) == report.num_examples
    if case.expected == GOOD:
        assert report.problems == ()
    if case.expected == BAD:
        assert report.num_bad > 0, "it was not reported"
    if report.num_bad:
        with pytest.raises(XFusionError) as error:
            open_source(spec, special_tokens=(SPECIAL,))
        assert "\n" not in str(error.value) and len(str(error.value)) < 4000
    else:
        source = open_source(spec, special_tokens=(SPECIAL,))
        assert all(source.picture(index, 8).size == (8, 8) for index in range(len(source)))
    signal.alarm(0)


def try_all(cases, tmp_path) -> None:
    """Each case in a folder of its own; all that fail are named together."""
    failed = []
    for number, case in enumerate(cases):
        try:
            try_it(case, tmp_path / str(number))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed.append(f"{case.name}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            signal.alarm(0)
    assert not failed, "\n".join([f"{len(failed)} of {number + 1} cases:", *failed])


@pytest.mark.parametrize("part", range(4))
def test_fixed_cases(tmp_path, part):
    try_all(FIXED[part::4], tmp_path)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.full) for part in range(1, PARTS))])
def test_damaged_pictures_and_lines(tmp_path, part):
    try_all([damaged(n) for n in range(part, NUM_DAMAGED, PARTS)], tmp_path)
    (tmp_path / "lines").mkdir()
    try_all([garbled(n) for n in range(part, NUM_GARBLED, PARTS)], tmp_path / "lines")


def shard_of(folder: Path, kind: str) -> Path:
    """What a case wrote, in a shard: all files as members of a tar, or pictures and their words as rows of a parquet file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    beside = [path for path in files if path.suffix not in (".jsonl", ".txt")]
    shard = folder.parent / f"{folder.name}.{kind}"
    if kind == "tar":
        with tarfile.open(shard, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
            for path in files:
                lines = path.suffix == ".jsonl"
                member = tarfile.TarInfo(f"{beside[0].stem if beside else 'a'}.json" if lines else path.name)
                member.size = path.stat().st_size
                if member.size > 1 << 30:  # by hand: a header, and no content but room
                    tar.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))
                    tar.fileobj.seek(member.size, os.SEEK_CUR)
                    tar.offset += tarfile.BLOCKSIZE + member.size
                else:
                    tar.addfile(member, path.open("rb"))
        return shard
    rows = []
    for path in beside:
        row: dict = {"image": path.read_bytes() if path.stat().st_size < 1 << 30 else b""}
        words, lines = path.with_suffix(".txt"), [file for file in files if file.suffix == ".jsonl"]
        row["text"] = words.read_bytes() if words.is_file() else lines[0].read_bytes() if lines else b""
        rows.append(row)
    images, words = [row["image"] for row in rows], pyarrow.array([row["text"] for row in rows], pyarrow.binary())
    # Parquet's texts need not be UTF-8, whatever its readers expect.
    texts = pyarrow.StringArray.from_buffers(len(words), *words.buffers()[1:], None, words.null_count, 0)
    parquet.write_table(pyarrow.table({"image": pyarrow.array(images, pyarrow.binary()), "text": texts}), shard)
    return shard


def in_shards(cases, tmp_path, kind):
    """The cases as shards; pictures and words of files keep what is expected of them, lines for other readers do not."""
    for number, case in enumerate(cases):
        folder = tmp_path / f"{number:03d}"
        folder.mkdir()
        case.write(folder)
        shard = shard_of(folder, kind)
        named = case.name.startswith("file ")  # a name is only in a tar
        as_files = not list(folder.glob("*.jsonl")) and (not named or (kind == "tar" and case.expected == BAD))
        shutil.rmtree(folder)
        expected = case.expected if as_files else EITHER
        yield Case(f"{case.name} in a {kind}", expected, lambda folder, shard=shard: shard.rename(folder / shard.name))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.full) for part in range(1, 12))])
def test_all_of_it_in_shards(tmp_path, monkeypatch, kind, part):
    """The fixed cases and a part of the damaged ones, through the readers of shards: a twelfth in the default tier."""
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))
    cases = [*FIXED[part::12], *(damaged(n) for n in range(part, NUM_DAMAGED, 121))]
    (tmp_path / "made").mkdir()
    (tmp_path / "tried").mkdir()
    try_all(list(in_shards(cases, tmp_path / "made", kind)), tmp_path / "tried")


def test_there_are_a_thousand():
    assert len(FIXED) + NUM_DAMAGED + NUM_GARBLED >= 1000
    assert len({case.name for case in FIXED}) == len(FIXED)


def test_the_first_part_holds_every_format_cut_off_and_changed():
    """Of each format one that has lost pixels is among them, which has to be reported."""
    cases = [damaged(n) for n in range(0, NUM_DAMAGED, PARTS)]
    found = {(next(kind for kind in KINDS if kind in case.name), "cut" in case.name) for case in cases}
    assert found == {(kind, cut) for kind in KINDS for cut in (True, False)}
    assert {next(kind for kind in KINDS if kind in case.name) for case in cases if case.expected == BAD} == {*KINDS}


TIERS = [40, pytest.param(400, marks=pytest.mark.full)]
"""Examples of a property, in the default tier and in the full one."""


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and date of all files below a folder."""
    stats = ((path, path.lstat()) for path in folder.rglob("*") if not path.is_dir())
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats}


@st.composite
def spoilt(draw) -> Case:
    """A picture of any size in any format, whole but for an edit or a cut."""
    kind, size = draw(st.sampled_from(KINDS)), draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
    is_animated = kind != "JPEG" and draw(st.booleans())
    is_progressive, rng = kind == "JPEG" and draw(st.booleans()), random.Random(draw(st.integers(0, 999)))
    content = drawn(kind, size, rng, is_animated=is_animated, is_progressive=is_progressive)
    if draw(st.booleans()):
        case = cut(content, draw(st.integers(0, len(content) - 1)), is_animated=is_animated)
    else:
        header = st.integers(0, min(64, len(content)) - 1)
        positions = header | st.integers(0, len(content) - 1)
        case = edited(content, draw(st.lists(st.tuples(positions, st.integers(0, 255)), max_size=40)))
    return case._replace(name=f"{'animated ' * is_animated}{kind} {size} {case.name}")


@pytest.mark.parametrize("count", TIERS)
def test_any_damage_of_any_picture_is_named_or_harmless(tmp_path, tmp_path_factory, monkeypatch, count):
    """In a folder and in a tar alike."""
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
    numbers = itertools.count()

    @settings(max_examples=count)
    @given(case=spoilt())
    def holds(case):
        folder = tmp_path / f"{next(numbers)}"
        try_it(case, folder)
        before = contents(tmp_path)
        found = [check(folder)]
        assert contents(tmp_path) == before
        found.append(check(tar := shard_of(folder, "tar")))
        for report, member in zip(found, (folder / "a.png", tar / "a"), strict=True):
            assert all(problem.startswith(f"{member}: ") for problem in report.problems)
        assert found[0].num_bad == found[1].num_bad == len(found[0].problems)
        shutil.rmtree(folder), tar.unlink()

    holds()


FRAGMENTS = b"a|b|..|.|/|../|.png|.JPG|.txt|.json|.mask.png|\n|\r|\0|\x1b[2J|\xff|\xc3|\xe2\x80\xa8|\xc3\xa9| |~|-rf|._"
NAMES = st.lists(st.sampled_from(FRAGMENTS.split(b"|")), max_size=6).map(b"".join) | st.binary()
NAMES = NAMES.map(lambda name: name[:24])  # a note has room for three of them
CONTENTS = st.sampled_from(
    [encoded(Image.new("RGB", (4, 4)), "PNG"), b"words", b'{"caption": "words"}', b"\xff\xfe", b"[]", b""]
)


@pytest.mark.parametrize("count", TIERS)
def test_any_names_of_members_are_examples_or_named(tmp_path, tmp_path_factory, monkeypatch, count):
    """Names that leave the folder, break lines, are no text, or have no suffix or nothing else."""
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
    (tmp_path / "deep" / "within").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    numbers = itertools.count()

    @settings(max_examples=count)
    @given(
        members=st.lists(st.tuples(NAMES, CONTENTS), min_size=1, max_size=3),
        form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    )
    def holds(members, form):
        path = tmp_path / "deep" / "within" / f"{next(numbers)}.tar"
        with tarfile.open(path, "w", format=form, errors="surrogateescape") as tar:
            for name, content in members:
                member = tarfile.TarInfo(os.fsdecode(name))
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        before = contents(tmp_path)
        said = []
        try:
            report = check(path)
        except XFusionError as error:
            said.append(str(error))
        else:
            said += [*report.problems, *report.notes]
            if report.source:
                said += [one_line(example.origin) for example in report.source.examples]
                assert all(report.source.picture(index, 8).size == (8, 8) for index in range(len(report.source)))
            if report.num_bad:
                with pytest.raises(XFusionError):
                    open_source(path)
        assert all(line.isprintable() and len(line) < 1000 for line in said)
        with tarfile.open(path, errors="surrogateescape") as tar:
            for member in tar.getmembers():
                key, _ = base_plus_ext(member.name)
                names = [f"{path}/{key}", f"{path.name}/{member.name}", f"{path}/{member.name}"]
                assert any(one_line(name) in line for name in names for line in said), (member.name, said)
        assert contents(tmp_path) == before
        path.unlink()

    holds()


TEXTS = st.text(max_size=40) | st.text(st.characters(codec=None), max_size=40) | st.sampled_from(["../a.png", SPECIAL])
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXTS, st.lists, max_leaves=4)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["image", "file_name", "text", "captions", "conversations", "group"]), VALUES),
        min_size=1,
        max_size=4,
    )
)
def test_any_row_is_an_example_or_a_problem(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(path, special_tokens=(SPECIAL,))
    assert report.num_examples == len(rows)
    assert all(problem.isprintable() for problem in report.problems)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is counted in another unit elsewhere")
def test_memory_stays_bounded(tmp_path):
    """A folder of nothing but the largest legal pictures and captions: a few are in memory at once, not all."""
    cases = {case.name: case for case in FIXED}
    large = Case("large", GOOD, beside(encoded(Image.new("P", (7900, 7900)), "PNG", transparency=0)))
    rows = Case("rows", GOOD, beside(encoded(Image.new("RGB", (60_000, 1000)), "GIF")))
    heavy = [large, rows, *(cases[name] for name in ("bomb of text", "sparse", "bomb of zeros"))]
    for number in range(4):
        for place, case in enumerate(heavy):
            folder = tmp_path / "data" / f"{number}-{place}"
            folder.mkdir(parents=True)
            case.write(folder)
    for number in range(20):  # four megabytes of words each, and of broken lines
        next(case for case in FIXED if case.name == "one pixel").write(tmp_path / "data")
        (picture,) = (path for path in (tmp_path / "data").glob("*.png") if not path.stem.startswith("words"))
        picture.rename(tmp_path / "data" / f"words{number}.png")
        (tmp_path / "data" / f"words{number}.txt").write_bytes((b"\xff\n" if number % 2 else b"w\n") * 1_900_000)
    line = json.dumps({"image": "a.png", "text": "x" * 3_000_000}) + "\n"
    with (tmp_path / "data" / "metadata.jsonl").open("w") as file:
        for _ in range(100):
            file.write(line)
    child = os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report = check(tmp_path / "data")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        (tmp_path / "told").write_text(json.dumps([grown / 1024, report.num_examples, report.num_bad]))
        os._exit(0)
    until = time.monotonic() + 5 * SECONDS
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("it hangs")
        time.sleep(0.1)
    grown, num_examples, num_bad = json.loads((tmp_path / "told").read_text())
    assert (num_examples, num_bad) == (140, 132)
    assert grown < 1500, f"{grown:.0f} MB"


def test_names_that_are_no_text_are_told_by_the_command_line(tmp_path, capsys, monkeypatch):
    folder = tmp_path / os.fsdecode(b"\xff\n")
    folder.mkdir()
    next(case for case in FIXED if case.name == "one pixel").write(folder)
    (folder / os.fsdecode(b"b\xff.png")).write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("xfusion.backbone.special_tokens", lambda source: ())
    for argv in (["data", "check", folder.name], ["data", "check", folder.name, "--json"]):
        assert cli.main(argv) == 1
        said = capsys.readouterr()
        assert "the name contains the character U+DCFF: rename the file" in said.out + said.err
    assert cli.main(["data", "check", str(tmp_path / ("a" * 5000))]) == 2
    assert capsys.readouterr().err.count("\n") == 1
