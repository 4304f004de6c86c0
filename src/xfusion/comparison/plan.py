"""The settings shared by all recipes of a comparison, and which recipes can be compared at all."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal, cast

from PIL import Image as PILImage

from xfusion import checkpoint
from xfusion.data.sequence import Example, XFusionError
from xfusion.data.sources import Sounds, Source
from xfusion.recipes.base import find
from xfusion.training.stages import Recipe

RATE_FACTORS = (1.0, 0.5, 2.0, 0.25, 4.0)
"""Factors for a recipe's own learning rate, in the order of the trials."""
GUIDANCES = (3.0, 1.5, 1.0, 5.0, 2.0)
"""Guidance strengths, in the order of the trials."""
CHOOSE_BY = ("fit_retrieval_pixel_at_10", "fit_caption_f1")
"""Scores that decide the tuning where none are named."""
TRIAL_SEED = 1_000_003
"""Seed of every trial run; test runs must not use it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings shared by all recipes of a comparison."""

    samples: int
    """Training samples per run, drawing and captioning together."""
    budget: Literal["samples", "flops"] = "samples"
    """What is equal across recipes: samples, or the executed FLOPs that the first recipe needs for ``samples``."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the runs; a seed gives every recipe the same data order, wordings, noise and sampling noise."""
    shares: tuple[float, ...] = (1.0,)
    """Shares of the pictures to train on; a smaller share is part of a larger one."""
    trials: int = 1
    """Learning rates to try per recipe on the validation part, and as many guidance strengths where it draws; 1 tunes nothing."""
    choose_by: tuple[str, ...] = CHOOSE_BY
    """Scores of `xfusion.comparison.table.SCORES`, all higher or all lower is better, whose mean on the validation part decides
    the tuning; those that a recipe does not have are left out."""
    match_parameters: bool = False
    """Choose each mechanism's size so that it trains as many parameters as the first recipe."""
    backbone: str | None = None
    """The base of all recipes; None uses their own."""
    data: str | None = None
    """The pictures, or sounds, of all recipes; None uses their own."""
    held: str | None = None
    """Held-out pictures, or sounds, to score on; None uses the held-out split of the data, if it has one."""
    size: int | None = None
    """Side in pixels for all picture recipes; None uses their own."""
    draw: int | None = None
    """Drawing samples per step for all recipes; None uses their own."""
    caption: int | None = None
    """Captioning samples per step for all recipes; None uses their own."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the modality's suite: ``emoji``, such as ``max_drawn`` and ``steps``, or ``sounds``."""
    num_shown: int = 8
    """Pictures per sample grid."""
    measure_time: bool = False
    """Measure the time of a step and of sampling; only on an otherwise idle machine."""
    compile: bool = True
    """Compile the work of each layer in training."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recipe with its label and the plan's settings applied."""

    label: str
    recipe: Recipe
    matched: dict[str, int] | None = None
    """Trainable parameters of the recipe as given, as matched, and of the first recipe."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A share of a source's pictures by the hash of their groups: a smaller share is part of a larger one."""

    source: Source
    share: float

    def __post_init__(self) -> None:
        groups = sorted({example.group for example in self.source.examples}, key=_hash)
        kept_groups = set(groups[: max(1, round(self.share * len(groups)))])
        object.__setattr__(self, "indices", [i for i, e in enumerate(self.source.examples) if e.group in kept_groups])
        object.__setattr__(self, "examples", tuple(self.source.examples[i] for i in self.indices))

    indices: list[int] = field(init=False)
    examples: Sequence[Example] = field(init=False)

    @property
    def spec(self) -> str:
        return self.source.spec

    @property
    def licence(self) -> str:
        return self.source.licence

    def __len__(self) -> int:
        return len(self.examples)

    def picture(self, index: int, size: int) -> PILImage.Image:
        """As `Source.picture`."""
        return self.source.picture(self.indices[index], size)


def share_of(source: Source, share: float) -> Source:
    """A share of a source's examples, as `Part` chooses them."""
    part = Part(source=source, share=share)
    return source.subset(part.indices) if isinstance(source, Sounds) else cast(Source, part)


def _hash(text: str) -> bytes:
    return hashlib.sha256(f"xfusion share: {text}".encode()).digest()


def recipes_by_label(recipes: Sequence[str] | Mapping[str, Recipe]) -> dict[str, Recipe]:
    if isinstance(recipes, Mapping):
        by_label = dict(recipes)
    else:
        pairs = [split_label(name) for name in recipes]
        labels = [label for label, _ in pairs]
        repeated = [label for label in labels if labels.count(label) > 1]
        if repeated:
            raise XFusionError(
                f"two of the recipes are called {repeated[0]!r}: results are named by it, so write LABEL=RECIPE for one"
            )
        by_label = {label: _recipe(name) for label, name in pairs}
    if not by_label:
        raise XFusionError("no recipe to compare: name at least one, better two")
    for label in by_label:
        if not re.fullmatch(r"\w[\w.]*", label) or re.search(r"-seed\d", label):
            raise XFusionError(f"recipe name {label!r} cannot be part of a file name: use letters, digits, _ and .")
    return by_label


def split_label(name: str) -> tuple[str, str]:
    """Label of a recipe in a comparison, and its name: ``slow=single_tower(rate=1e-3)`` gives both."""
    match = re.match(r"([\w.]+)=(.+)", name)
    return (match[1], match[2]) if match else (name.partition("(")[0].rpartition(":")[2], name)


def recipes_in_command(command: str | None) -> dict[str, str]:
    """Label -> the recipe with its arguments, from the commands of a comparison, one per line."""
    recipes = {}
    for line in (command or "").splitlines():
        for word in takewhile(lambda word: not word.startswith("-"), shlex.split(line)[2:]):
            label, name = split_label(word)
            recipes[label] = name
    return recipes


def heading(label: str, name: str) -> str:
    """Heading of a recipe's figures: its name with its arguments, or its label if one was given."""
    return name if split_label(name)[0] == label else label


def _recipe(name: str) -> Recipe:
    recipe = find(name)()
    if not isinstance(recipe, Recipe):
        raise XFusionError(f"recipe {name!r} returns a {type(recipe).__name__}, not a Recipe")
    return recipe


def with_plan(recipe: Recipe, plan: Plan) -> Recipe:
    """A recipe with the plan's settings applied."""
    model, stages = recipe.model, recipe.stages
    if plan.backbone is not None:
        model = replace(model, backbone=replace(model.backbone, source=plan.backbone, revision=None))
    if plan.size is not None:
        if model.audio is not None:
            raise XFusionError(f"size {plan.size} is the side of pictures, and these recipes hear sounds: leave it out")
        model = replace(model, image=replace(model.image, sizes=(plan.size,)))
    changes = {k: v for k, v in (("draw", plan.draw), ("caption", plan.caption)) if v is not None}
    if changes:
        stages = tuple(replace(stage, mixture=replace(stage.mixture, **changes)) for stage in stages)
    recipe = replace(recipe, model=model, stages=stages)
    return recipe if plan.data is None else replace(recipe, data=plan.data, data_licence=None)


MUST_MATCH = {
    "model.backbone": "the base; --backbone SOURCE puts all on one",
    "data": "the data; --data SPEC gives all the same",
    "model.image.codec": "codec or encoder",
    "model.image.sizes": "picture size; --size sets it for all",
    "model.audio.codec": "codec or encoder",
    "model.audio.seconds": "length of sounds",
}
"""Parts of a recipe that must be equal, and what to do if they are not. How a picture or a sound becomes rows of the
sequence (patch, place, order) may differ: it is recorded as a difference, and the costs include it."""


def refuse_unlike(entries: Sequence[Entry], open_data: bool) -> None:
    reference = entries[0]
    for other in entries[1:]:
        first_value, other_value = (entry.recipe.model.modality.media for entry in (reference, other))
        if first_value != other_value:
            raise XFusionError(
                f"{reference.label} is of {first_value}, {other.label} of {other_value}: compare those of {first_value} alone"
            )
        for path, remedy in MUST_MATCH.items():
            if path == "data" and open_data:
                continue
            values = [checkpoint.to_json(_field_at(compared.recipe, path)) for compared in (reference, other)]
            for subfield, first_value, other_value in checkpoint.differing(*values):
                raise XFusionError(
                    f"{reference.label} and {other.label} differ in {'.'.join(filter(None, (path, subfield)))}: {first_value!r}"
                    f" and {other_value!r}. Recipes are compared on the same {remedy}"
                )


def _field_at(value: Any, path: str) -> Any:
    """A part of a recipe; None if it has no such modality."""
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value
