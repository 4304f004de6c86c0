"""Several sources as one, each with a share of the samples."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xfusion.data.latents import tokens
from xfusion.data.sequence import Example, XFusionError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from xfusion.data.sources import Source

OPTION = re.compile(r"(.+):(weight|held|caption|image)=([^:]*)")
"""The last option of a source's spec."""
LARGEST_WEIGHT = 1000
"""Largest weight as an integer, so that shares are exact over a short stretch of samples."""


def parts(spec: str) -> list[tuple[str, Fraction]]:
    """``photos:weight=2+emoji`` -> ``[("photos", 2), ("emoji", 1)]``; empty if the spec is a single source.

    Raises:
        XFusionError: a weight is not a number above 0.
    """
    if "+" not in spec or Path(spec).exists():
        return []
    specs = []
    for source_spec in spec.split("+"):
        bare_spec, options = split_options(source_spec.strip())
        weight = options.pop("weight", "1")
        if not bare_spec or not re.fullmatch(r"[0-9]*\.?[0-9]+", weight) or not Fraction(weight):
            raise XFusionError(
                f"{spec}: {source_spec.strip()!r} is no source with a weight: write photos:weight=2+emoji:weight=1"
            )
        specs.append((":".join([bare_spec, *(f"{name}={value}" for name, value in options.items())]), Fraction(weight)))
    return specs


def split_options(spec: str) -> tuple[str, dict[str, str]]:
    """``photos:held=0.1:caption=prompt`` -> ``("photos", {"held": "0.1", "caption": "prompt"})``.

    Raises:
        XFusionError: an option is there twice.
    """
    options: dict[str, str] = {}
    bare_spec = spec
    while not Path(bare_spec).exists() and (match := OPTION.fullmatch(bare_spec)):
        bare_spec, name, value = match.groups()
        if name in options:
            raise XFusionError(f"{spec}: {name}= is there twice: leave one out")
        options = {name: value, **options}
    return bare_spec, options


class Mixed:
    """Several sources concatenated into one `Source`; `xfusion.data.order` gives each its share of every step.

    Args:
        spec: as the user wrote it.
        sources: the sources to mix.
        weights: shares, of any sum.

    Raises:
        XFusionError: the weights are not a ratio of small integers.
    """

    def __init__(self, spec: str, sources: Sequence[Source], weights: Sequence[Fraction]) -> None:
        self.spec, self.sources = spec, tuple(sources)
        self.licence = "; ".join(dict.fromkeys(f"{source.spec}: {source.licence}" for source in sources))
        denominator = math.lcm(*(weight.denominator for weight in weights))
        integers = [int(weight * denominator) for weight in weights]
        divisor = math.gcd(*integers)
        self.weights = tuple(weight // divisor for weight in integers)
        """Samples of each source among every ``sum(weights)`` samples."""
        if max(self.weights) > LARGEST_WEIGHT:
            raise XFusionError(
                f"{spec}: the weights stand as {' : '.join(map(str, self.weights))}, at most {LARGEST_WEIGHT} is legal:"
                " round them"
            )
        self.starts = tuple(accumulate((len(source.examples) for source in sources), initial=0))
        self.examples: Sequence[Example] = tuple(
            replace(example, id=f"{number}/{example.id}")  # two sources may both contain 1.png
            for number, source in enumerate(sources)
            for example in source.examples
        )

    def __len__(self) -> int:
        return len(self.examples)

    def part(self, index: int) -> tuple[Source, int]:
        """The source of an example, and its index there."""
        number = bisect_right(self.starts, index) - 1
        return self.sources[number], index - self.starts[number]

    def picture(self, index: int, size: int) -> Image:
        """As `Source.picture`."""
        source, own_index = self.part(index)
        return source.picture(own_index, size)

    def tokens(self, index: int, image: Any, size: int) -> Tensor:
        """As `xfusion.data.latents.tokens`."""
        return tokens(*self.part(index), image, size)
