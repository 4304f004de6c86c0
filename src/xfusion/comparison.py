"""`compare`: recipes against each other at equal budget, equal tuning and paired seeds; one JSON file per run.

What is compared is the mechanism: base, data, codec, picture size, budget, scoring and seeds are the same for all, or the
comparison is refused. What else differs between two recipes is listed beside the scores. Every run goes through the one
training loop and the one evaluation; `summarise` makes the table from the files alone.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from dataclasses import fields as fields_of
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import xfusion
from xfusion import checkpoint
from xfusion.backbone import Backbone
from xfusion.data.mixture import Mixture
from xfusion.data.pack import pack
from xfusion.data.sequence import IGNORE, Batch, Example, Media, Text, XFusionError
from xfusion.data.sequence import Sequence as Sample
from xfusion.data.sources import Source, open_source
from xfusion.evaluation import verify
from xfusion.evaluation.run import evaluate, write_json
from xfusion.evaluation.suites.emoji import chosen
from xfusion.model import TEXT_STATES_KEPT, Model, build, choose_compute_dtype
from xfusion.recipes.base import find
from xfusion.training.loop import PLAN, STATE_BEFORE, WARM_STEPS, train
from xfusion.training.speed import samples_per_second
from xfusion.training.stages import Recipe, Stage

Progress = Callable[[str, int, int], None]
"""Called with the name of a part, how many items of it are done, and how many there are."""

FEWEST_RUNS = 5
"""An interval over fewer runs is not printed."""
POWER = 0.8
"""Chance of finding a difference that is there, for which the number of seeds is computed."""
NEAREST = 0.02
"""How near a matched number of parameters must be to the first recipe's."""
BUDGET_TOLERANCE = 0.01
"""How near counted FLOPs must be to the first recipe's: budgets are whole steps."""
RATE_FACTORS = (1.0, 0.5, 2.0, 0.25, 4.0)
"""What a recipe's own rate is multiplied by, in the order in which trials take them."""
GUIDANCES = (3.0, 1.5, 1.0, 5.0, 2.0)
"""Strengths of guidance, in the order in which trials take them."""
TRIAL_SEED = 1_000_003
"""Seed of every trial run; no test run may have it."""
SEEDS_APART = 100_000
"""Run s draws picture i from the noise of the seed ``s * SEEDS_APART + i``."""
LEARNING_POINTS = 40
"""Points of a learning curve."""
TIMED_STEPS = 20
"""Steps over which the speed of training is measured, behind the warm-up."""
SUMMARY = "comparison.json"
"""What was compared with what, and how; it stands beside the runs' files."""
REAL = "real.png"
"""The real pictures of the sample grids."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a score is called, and which way is better."""

    title: str
    better: Literal["higher", "lower"] = "higher"


SCORES: dict[str, Score] = {
    "fit_retrieval_pixel_at_1": Score(title="drawing, trained pictures: nearest in pixels, R@1"),
    "fit_retrieval_pixel_at_10": Score(title="drawing, trained pictures: nearest in pixels, R@10"),
    "fit_retrieval_feature_at_1": Score(title="drawing, trained pictures: nearest in features, R@1"),
    "fit_retrieval_feature_at_10": Score(title="drawing, trained pictures: nearest in features, R@10"),
    "fit_caption_exact": Score(title="naming, trained pictures: exact answer"),
    "fit_caption_f1": Score(title="naming, trained pictures: token F1"),
    "held_caption_mrr": Score(title="naming, unseen pictures: rank of the true name, MRR"),
    "held_caption_at_1": Score(title="naming, unseen pictures: true name first, R@1"),
    "held_caption_at_10": Score(title="naming, unseen pictures: true name among ten, R@10"),
    "held_caption_exact": Score(title="naming, unseen pictures: exact answer"),
    "held_caption_f1": Score(title="naming, unseen pictures: token F1"),
    "text_perplexity_change": Score(title="text: perplexity of the fused stack minus the base's", better="lower"),
}
"""The scores that recipes are compared by. Other numbers of a suite (chance, ceiling, blind rates) stand in the files."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done with every recipe alike."""

    samples: int
    """Training samples of a run, drawing and naming together."""
    budget: Literal["samples", "flops"] = "samples"
    """What is equal: samples, or the executed FLOPs that the first recipe needs for ``samples``."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Runs of a recipe; the same seed means the same order, wordings, noise and sampling noise for every recipe."""
    shares: tuple[float, ...] = (1.0,)
    """Shares of the pictures that are trained on; a smaller share is part of a larger one."""
    trials: int = 1
    """Rates and strengths of guidance tried per recipe on the validation part; 1 tunes nothing."""
    choose_by: tuple[str, ...] = ("fit_retrieval_pixel_at_10", "fit_caption_f1")
    """Scores whose mean on the validation part chooses."""
    match_parameters: bool = False
    """Take of every mechanism's sizes the one that trains as many parameters as the first recipe."""
    backbone: str | None = None
    """The base of all recipes; None takes their own."""
    data: str | None = None
    """The pictures of all recipes; None takes their own."""
    size: int | None = None
    """Side in pixels for all recipes; None takes their own."""
    draw: int | None = None
    """Drawing samples per step for all recipes; None takes their own."""
    caption: int | None = None
    """Naming samples per step for all recipes; None takes their own."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the suite ``emoji``, such as ``max_drawn`` and ``steps``."""
    num_shown: int = 8
    """Pictures of a sample grid."""
    measure_time: bool = False
    """Measure the time of a step and of sampling; only on a machine that does nothing else."""
    compile: bool = True
    """Whether the per-layer work is compiled in training."""


def compare(
    recipes: Sequence[str] | Mapping[str, Recipe],
    plan: Plan,
    *,
    out: str | os.PathLike[str],
    work: str | os.PathLike[str] | None = None,
    backbone: Backbone | None = None,
    device: torch.device | str = "cpu",
    source: Source | None = None,
    held: Source | None = None,
    encoder: Any = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and score recipes alike, and say what can be said about their difference.

    What was finished before is not done again, and a run that was cut off goes on: call it again with the same settings.

    Args:
        recipes: names as `xfusion.recipes.base.find` takes them, or recipes by name. The others are compared with the first.
        plan: what is done with every recipe.
        out: folder of the results: ``RECIPE-seedS.json`` and ``.png``, ``RECIPE-trials.json``, ``comparison.json``.
        work: folder of the training runs; None takes ``runs/compare/NAME``.
        backbone: an already loaded base.
        device: where the base is loaded to, where none is given.
        source: the opened training pictures instead of a spec.
        held: the held-out pictures of ``source``.
        encoder: pictures to features, for feature scores; None takes the suite's own.
        command: how a person makes it again; written down.
        progress: told how far each part is.

    Returns:
        what `summarise` returns.

    Raises:
        XFusionError: recipes that cannot be compared (base, data, codec, size, budget), a number of parameters that cannot
            be matched, results in ``out`` that were made otherwise.
    """
    run = _Comparison(recipes, plan, Path(out), work, backbone, device, source, held, encoder, command, progress)
    run.go()
    return summarise(out)


# ------------------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A recipe under its label, with all that the plan sets."""

    label: str
    recipe: Recipe
    matched: dict[str, int] | None = None
    """Trainable parameters as the recipe says, as matched, and the first recipe's."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A share of a source's pictures by the hash of their groups: a smaller share is part of a larger one."""

    source: Source
    share: float

    def __post_init__(self) -> None:
        ranked = sorted({example.group for example in self.source.examples}, key=_hash)
        kept = set(ranked[: max(1, round(self.share * len(ranked)))])
        object.__setattr__(self, "indices", [i for i, e in enumerate(self.source.examples) if e.group in kept])
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


def _hash(text: str) -> bytes:
    return hashlib.sha256(f"xfusion share: {text}".encode()).digest()


def _named(recipes: Sequence[str] | Mapping[str, Recipe]) -> dict[str, Recipe]:
    if isinstance(recipes, Mapping):
        named = dict(recipes)
    else:
        labels = [name.rpartition(":")[2] for name in recipes]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise XFusionError(f"two of the recipes are called {twice[0]!r}: results are named by it, rename one")
        named = {label: _recipe(name) for label, name in zip(labels, recipes, strict=True)}
    if not named:
        raise XFusionError("no recipe to compare: name at least one, better two")
    for label in named:
        if not re.fullmatch(r"\w[\w.]*", label) or re.search(r"-seed\d", label):
            raise XFusionError(f"recipe name {label!r} cannot be part of a file name: use letters, digits, _ and .")
    return named


def _recipe(name: str) -> Recipe:
    recipe = find(name)()
    if not isinstance(recipe, Recipe):
        raise XFusionError(f"recipe {name!r} returns a {type(recipe).__name__}, not a Recipe")
    return recipe


def _with(recipe: Recipe, plan: Plan) -> Recipe:
    """A recipe with what the plan sets for all."""
    model, stages = recipe.model, recipe.stages
    if plan.backbone is not None:
        model = replace(model, backbone=replace(model.backbone, source=plan.backbone, revision=None))
    if plan.size is not None:
        model = replace(model, image=replace(model.image, sizes=(plan.size,)))
    set_here = {k: v for k, v in (("draw", plan.draw), ("caption", plan.caption)) if v is not None}
    if set_here:
        stages = tuple(replace(s, mixture=replace(s.mixture, **set_here)) for s in stages)
    return replace(recipe, model=model, stages=stages, data=recipe.data if plan.data is None else plan.data)


SAME = {
    "model.backbone": "the base; --backbone SOURCE puts all on one",
    "data": "the pictures; --data SPEC gives all the same",
    "model.image": "codec, patch or picture size; --size sets the size, the rest must be the same in both recipes",
}
"""Parts of a recipe that must be equal, and what to do where they are not."""


def _refuse_unlike(entries: Sequence[_Entry], open_data: bool) -> None:
    first = entries[0]
    for other in entries[1:]:
        for path, what in SAME.items():
            if path == "data" and open_data:
                continue
            pair = [checkpoint.to_json(_at(e.recipe, path)) for e in (first, other)]
            for where, one, two in differing(*pair):
                raise XFusionError(
                    f"{first.label} and {other.label} differ in {'.'.join(filter(None, (path, where)))}: {one!r} and {two!r}."
                    f" Recipes are compared on the same {what}"
                )


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value


def differing(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: path, and both values; None stands for what one of them lacks."""
    pairs: list[tuple[str, Any, Any]]
    if isinstance(one, dict) and isinstance(other, dict) and one.get("type") == other.get("type"):
        pairs = [(str(k), one.get(k), other.get(k)) for k in dict.fromkeys([*one, *other])]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        if one != other:
            yield path, one, other
        return
    for name, a, b in pairs:
        yield from differing(a, b, f"{path}.{name}" if path else name)


# ---------------------------------------------------------------------------------------------------- executed FLOPs


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Executed FLOPs of a stage's step, by torch's counter on a real forward and backward pass, uncompiled.

    Compiling drops work whose result nobody reads (queries of rows that only give keys and values), so that a compiled
    step executes a little less.
    """

    step: int
    """One optimiser step, with the states of texts at hand that are computed once."""
    training: dict[str, int]
    """Task -> forward and backward, per sample."""
    forward: dict[str, int]
    """Task -> forward alone, per sample."""
    text: int
    """The frozen states of one text, where they are computed once and looked up later."""
    texts: Callable[[int], int]
    """Steps -> how many texts are computed in them."""

    def total(self, steps: int) -> int:
        """FLOPs of so many steps."""
        return steps * self.step + (self.texts(steps) * self.text if self.text else 0)


def count_flops(model: Model, stage: Stage, source: Source, seed: int = 0) -> StageCost:
    """Count one step of a stage.

    Args:
        model: what is trained; its weights stay.
        stage: whose mixture is read.
        source: the pictures.
        seed: of the mixture.
    """
    dtype, reason = choose_compute_dtype(model.backbone.device)
    # The counter does not know the CPU's fused attention; plain products are what training takes there anyway.
    engine = model.training_engine(dtype, reason, "eager", False)
    made = _mixture(model, stage, source, seed)
    training: dict[str, int] = {}
    forward: dict[str, int] = {}
    samples: dict[str, int] = {}
    text = texts = 0

    def losses(batch: Batch) -> Tensor | float:
        with torch.autocast(model.backbone.device.type, engine.dtype, enabled=bool(engine.autocast)):
            found = model.losses(batch, torch.Generator().manual_seed(0))
        return sum(value for value, _ in found.values())

    def both(batch: Batch) -> None:
        loss = losses(batch)
        if isinstance(loss, Tensor):
            loss.backward()

    with model.using(engine):
        for batch in made.batches(0):
            task = "caption" if bool((batch.labels != IGNORE).any()) else "draw"
            known = len(engine.text_states)
            cold, warm = _flops(lambda b=batch: both(b)), _flops(lambda b=batch: both(b))
            with torch.no_grad():
                ahead = _flops(lambda b=batch: losses(b))
            text, texts = text + cold - warm, texts + len(engine.text_states) - known
            training[task] = training.get(task, 0) + warm
            forward[task] = forward.get(task, 0) + ahead
            samples[task] = samples.get(task, 0) + batch.num_sequences
    for parameter in model.new_parameters():
        parameter.grad = None
    return StageCost(
        step=sum(training.values()) * stage.accumulate,
        training={task: value // samples[task] for task, value in training.items()},
        forward={task: value // samples[task] for task, value in forward.items()},
        text=text // texts if texts else 0,
        texts=lambda steps: _texts_computed(made, steps * stage.accumulate),
    )


def _flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


class _Words(Mixture):
    """A mixture whose pictures nobody looks at."""

    def tokens(self, index: int) -> Tensor:
        del index
        return torch.zeros(self.grid[0] * self.grid[1], self.image.token_width)


def _mixture(model: Model, stage: Stage, source: Source, seed: int, kind: type[Mixture] = Mixture) -> Mixture:
    base = model.backbone
    size = model.image.sizes[0]
    return kind(source, model.image, size, base.encode, base.begin_ids, base.end_ids[0], stage.mixture, seed)


def _texts_computed(mixture: Mixture, reads: int) -> int:
    """How many texts of drawing samples are not at hand when they are asked for: the oldest go first."""
    words = _Words(
        mixture.source,
        mixture.image,
        mixture.size,
        mixture.encode,
        mixture.begin,
        mixture.end,
        mixture.config,
        mixture.seed,
    )
    known: OrderedDict[tuple[int, ...], None] = OrderedDict()
    computed = 0
    for read in range(reads):
        for sample in words.drawings(read):
            text = sample.segments[0]
            if isinstance(text, Text) and text.ids not in known:
                known[text.ids] = None
                computed += 1
                if len(known) > TEXT_STATES_KEPT:
                    known.popitem(last=False)
    return computed


def samples_per_step(stage: Stage) -> int:
    """Drawing and naming samples of one optimiser step."""
    return (stage.mixture.draw + stage.mixture.caption) * stage.accumulate


def trainable_parameters(model: Model) -> int:
    """How many numbers training may change."""
    return sum(p.numel() for p in model.new_parameters() if p.requires_grad)


def tokens_added(model: Model) -> int:
    """Positions that one picture adds to a sequence of words, boundaries included."""
    grid = model.image.grid(model.image.sizes[0])
    blank = Media(tokens=torch.zeros(grid[0] * grid[1], model.image.token_width), grid=(grid[0], grid[1]))
    words = Text(ids=model.backbone.end_ids[:1])
    batch = pack([[Sample(segments=(blank, words))]])
    tables = [batch.text, *(media.rows for media in batch.media.values())]
    return sum(int((table.order >= 0).sum()) for table in tables) - len(words.ids)


# -------------------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
            "xfusion": xfusion.__version__,
        },
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def commit() -> dict[str, Any] | None:
    """The commit of the checkout that runs, and whether files differ from it; None outside of one."""
    root = Path(xfusion.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "changed_files": len(git("status", "--porcelain").splitlines())}
    except (OSError, subprocess.SubprocessError):
        return None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Largest memory inside the block: ``bytes`` (None where it cannot be known) and ``what`` it is."""
    found: dict[str, Any] = {"bytes": None, "what": "not measured on this system"}
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            reset.write_text("5", encoding="ascii")  # the high-water mark starts anew
        except OSError:
            yield found
            return
    yield found
    if device.type == "cuda":
        found |= {"bytes": torch.cuda.max_memory_allocated(device), "what": "allocated on the GPU in training"}
        return
    line = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
    if line:
        what = "resident in the whole process in training, the frozen base included; the mark is reset before"
        found |= {"bytes": 1024 * int(line[1]), "what": what}


def measure_time(recipe: Recipe, source: Source, backbone: Backbone, *, steps: int, compile: bool) -> dict[str, Any]:
    """Seconds of a training step and of sampling, by a short run of the one loop that is thrown away.

    Args:
        recipe: its last stage is measured.
        source: the pictures.
        backbone: the base.
        steps: Euler steps of a drawing.
        compile: as in training.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    events: list[dict[str, Any]] = []
    stage = replace(recipe.stages[-1], steps=WARM_STEPS + TIMED_STEPS)
    with tempfile.TemporaryDirectory(prefix="xfusion-compare-") as folder:
        model = train(
            replace(recipe, stages=(stage,)),
            out=folder,
            source=source,
            backbone=backbone,
            compile=compile,
            preview_every=0,
            checkpoint_every=float("inf"),
            listener=events.append,
        )
    rate = samples_per_second([event for event in events if event["event"] == "step"])
    out: dict[str, Any] = {"load_before": load, "step_seconds": rate and samples_per_step(stage) / rate}
    indices = chosen(source.examples, 8)
    prompts = [source.examples[i].captions[0] for i in indices]
    pictures = [source.picture(i, model.image.sizes[0]) for i in indices]
    asked = {"draw": lambda: model.draw(prompts, steps=steps), "caption": lambda: model.caption(pictures)}
    for task in sorted(set(asked) & model.capabilities):
        out[f"{task}_seconds_per_picture"] = _median_seconds(asked[task]) / len(indices)
    return out


def _median_seconds(function: Callable[[], Any], times: int = 3) -> float:
    function()
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


# -------------------------------------------------------------------------------------------------------- text scores


@torch.no_grad()
def text_keeping(model: Model) -> dict[str, float | bool]:
    """What became of the base's text: the texts of `verify` through the base and through the fused stack.

    Returns:
        ``text_bit_equal``, ``text_perplexity_base``, ``text_perplexity_fused`` and ``text_perplexity_change`` (fused minus
        base; per token, over all texts of two or more tokens).
    """
    longest = getattr(model.backbone.config, "max_position_embeddings", None) or 1 << 20
    same, count, total = True, 0, {"base": 0.0, "fused": 0.0}
    for _, text in verify.PROMPTS:
        ids = torch.tensor([model.backbone.encode(text)[:longest]], device=model.backbone.device)
        if not ids.numel():
            continue
        logits = {stack: model.text_logits(ids, stack=stack) for stack in total}
        same = same and verify.bit_equal(logits["base"], logits["fused"])
        count += ids.shape[1] - 1
        for stack, found in logits.items():
            total[stack] += float(cross_entropy(found[0, :-1].double(), ids[0, 1:], reduction="sum"))
    base, fused = (math.exp(min(total[stack] / max(count, 1), 700.0)) for stack in ("base", "fused"))
    return {
        "text_bit_equal": same,
        "text_perplexity_base": base,
        "text_perplexity_fused": fused,
        "text_perplexity_change": fused - base,
    }


# ----------------------------------------------------------------------------------------------------------- the runs


class _Comparison:
    """What `compare` prepares and walks through."""

    def __init__(
        self,
        recipes: Sequence[str] | Mapping[str, Recipe],
        plan: Plan,
        out: Path,
        work: str | os.PathLike[str] | None,
        backbone: Backbone | None,
        device: torch.device | str,
        source: Source | None,
        held: Source | None,
        encoder: Any,
        command: str | None,
        progress: Progress | None,
    ):
        self.plan, self.out, self.command = plan, out, command
        self.work = Path(work) if work is not None else Path("runs") / "compare" / out.name
        self.tell: Progress = progress or (lambda part, done, total: None)
        self.encoder, self.held = encoder, held
        self._check()
        entries = [_Entry(label=label, recipe=_with(recipe, plan)) for label, recipe in _named(recipes).items()]
        if backbone is not None:  # the base that is given is the base of all, as the plan's is
            entries = [replace(e, recipe=_with(e.recipe, replace(plan, backbone=backbone.source))) for e in entries]
        _refuse_unlike(entries, source is not None)
        base = entries[0].recipe.model.backbone
        self.tell("loading the base", 0, 1)
        self.backbone = backbone or Backbone.load(base.source, revision=base.revision, device=device)
        data = entries[0].recipe.data
        self.source = source or open_source(data, special_tokens=self.backbone.special_tokens)
        if source is not None:
            entries = [replace(e, recipe=replace(e.recipe, data=source.spec)) for e in entries]
        self.entries = self._matched(entries) if plan.match_parameters else entries
        self.parts = {share: cast(Source, Part(source=self.source, share=share)) for share in plan.shares}
        self.costs: dict[tuple[str, float], tuple[list[StageCost], dict[str, Any]]] = {}
        self.planned = {(e.label, s): self._planned(e, s) for s in plan.shares for e in self.entries}

    def _check(self) -> None:
        plan = self.plan
        if plan.samples < 1:
            raise XFusionError(f"samples {plan.samples}: at least 1")
        if not plan.seeds or len(set(plan.seeds)) != len(plan.seeds):
            raise XFusionError(f"seeds {list(plan.seeds)}: at least one, each once")
        if TRIAL_SEED in plan.seeds or min(plan.seeds) < 0:
            raise XFusionError(f"seeds {list(plan.seeds)}: from 0 on, without {TRIAL_SEED}, which trials have")
        if not plan.shares or any(not 0 < s <= 1 for s in plan.shares) or len(set(plan.shares)) != len(plan.shares):
            raise XFusionError(f"shares {list(plan.shares)}: above 0 and up to 1, each once, such as 0.1 0.3 1.0")
        if not 1 <= plan.trials <= len(RATE_FACTORS):
            raise XFusionError(f"trials {plan.trials}: from 1 (nothing is tuned) to {len(RATE_FACTORS)}")
        ours = [name for name in ("seed", "part", "source", "held", "encoder") if name in plan.evaluation]
        if ours:
            raise XFusionError(f"the setting {ours[0]!r} of the evaluation is the comparison's own: leave it out")
        if plan.trials > 1 and "guidance" in plan.evaluation:
            raise XFusionError(f"guidance is tuned by {plan.trials} trials and also given: leave one out")

    # -- equal parameters, equal budget

    def _matched(self, entries: list[_Entry]) -> list[_Entry]:
        """Every mechanism in the size whose number of trainable parameters is nearest to the first one's."""

        def count(recipe: Recipe) -> int:
            return trainable_parameters(build(recipe.model, self.backbone))

        wanted = count(entries[0].recipe)
        out = []
        for done, entry in enumerate(entries):
            self.tell("matching parameters", done, len(entries))
            own = count(entry.recipe)
            best, best_recipe = own, entry.recipe
            for fusion in entry.recipe.model.fusion.sizes() if done else ():
                recipe = replace(entry.recipe, model=replace(entry.recipe.model, fusion=fusion))
                size = count(recipe)
                if abs(size - wanted) < abs(best - wanted):
                    best, best_recipe = size, recipe
                if size > wanted:  # smallest first: the next are farther
                    break
            if abs(best - wanted) > NEAREST * wanted:
                raise XFusionError(
                    f"{entry.label} cannot be matched to {entries[0].label}: its nearest size trains {best:,} parameters,"
                    f" {entries[0].label} {wanted:,}, and {NEAREST:.0%} is allowed; give one of them another size"
                )
            matched = {"own": own, "matched": best, "first": wanted}
            out.append(replace(entry, recipe=best_recipe, matched=matched))
        return out

    def _planned(self, entry: _Entry, share: float) -> tuple[Recipe, dict[str, Any]]:
        """The recipe with its number of steps, and its budget."""
        plan, first = self.plan, self.entries[0]
        *before, last = entry.recipe.stages
        spent = sum(stage.steps * samples_per_step(stage) for stage in before)
        per_step = samples_per_step(last)
        if plan.budget == "samples" or entry is first:
            steps = (plan.samples - spent) // per_step
        else:
            steps = self._steps_for(entry, share, self.planned_first[share]["flops"])
        if steps < 1:
            earlier = f" behind {spent} samples of earlier stages" if spent else ""
            raise XFusionError(
                f"{entry.label}: {plan.samples} samples are less than one step of {per_step}{earlier}; give more"
            )
        recipe = replace(entry.recipe, stages=(*before, replace(last, steps=steps)))
        budget: dict[str, Any] = {
            "kind": plan.budget,
            "asked_samples": plan.samples,
            "steps": [stage.steps for stage in recipe.stages],
            "samples": spent + steps * per_step,
        }
        if plan.budget == "flops":
            costs, _ = self._cost(entry, share)
            budget["flops"] = sum(c.total(s.steps) for c, s in zip(costs, recipe.stages, strict=True))
        if entry is first:
            self.planned_first = {**getattr(self, "planned_first", {}), share: budget}
        else:
            _refuse_unequal(entry.label, budget, first.label, self.planned_first[share])
        return recipe, budget

    def _steps_for(self, entry: _Entry, share: float, flops: int) -> int:
        """Steps of the last stage that come nearest to so many FLOPs."""
        costs, _ = self._cost(entry, share)
        left = flops - sum(c.total(s.steps) for c, s in zip(costs[:-1], entry.recipe.stages[:-1], strict=True))
        last = costs[-1]
        steps = left // last.step
        for _ in range(4):  # texts that are computed once are dearer at the beginning
            steps = round((left - (last.total(steps) - steps * last.step)) / last.step)
        return steps

    def _cost(self, entry: _Entry, share: float) -> tuple[list[StageCost], dict[str, Any]]:
        """FLOPs by stage, and the costs that do not depend on a run."""
        key = (entry.label, share)
        if key not in self.costs:
            self.tell(f"{entry.label}: counting", 0, 1)
            model = build(entry.recipe.model, self.backbone)
            stages = [count_flops(model, stage, self.parts[share]) for stage in entry.recipe.stages]
            last = stages[-1]
            facts: dict[str, Any] = {
                "trainable_parameters": trainable_parameters(model),
                "flops_per_sample": last.training,
                "forward_flops_per_sample": last.forward,
                "flops_per_new_text": last.text,
                "tokens_per_picture": tokens_added(model),
                "time": None,
            }
            if self.plan.measure_time:
                self.tell(f"{entry.label}: measuring time", 0, 1)
                steps = self.plan.evaluation.get("steps", 25)
                part, compile = self.parts[share], self.plan.compile
                facts["time"] = measure_time(entry.recipe, part, self.backbone, steps=steps, compile=compile)
            self.costs[key] = stages, facts
        return self.costs[key]

    # -- the walk

    def go(self) -> None:
        plan = self.plan
        self.out.mkdir(parents=True, exist_ok=True)
        self._write_plan()
        settings = {e.label: self._tuned(e) for e in self.entries}
        total = len(plan.shares) * len(plan.seeds) * len(self.entries)
        done = 0
        for share in sorted(plan.shares, reverse=True):
            for seed in plan.seeds:
                for entry in self.entries:
                    self._run(entry, share, seed, settings[entry.label], f"[{done + 1}/{total}]")
                    done += 1

    def _write_plan(self) -> None:
        """What was compared with what. Recipes and seeds may be added later; the first recipe stays the first."""
        path, labels = self.out / SUMMARY, [e.label for e in self.entries]
        if path.exists():
            before = _read(path)["recipes"]
            if before[0] != labels[0]:
                raise XFusionError(
                    f"{self.out} compares with {before[0]!r}, and now {labels[0]!r} comes first: name the same one"
                    " first, or another --out"
                )
            labels = list(dict.fromkeys([*before, *labels]))
        prompts, pictures = self._shown()
        differences = {
            entry.label: [
                {"where": where, "first": one, "this": two}
                for where, one, two in differing(
                    *(
                        checkpoint.to_json(self.planned[e.label, self.plan.shares[0]][0])
                        for e in (self.entries[0], entry)
                    )
                )
                if not where.startswith("model.fusion")
            ]
            for entry in self.entries[1:]
        }
        if path.exists():
            differences = _read(path)["differences"] | differences
        size = self.entries[0].recipe.model.image.sizes[0]
        _write_strip(self.out / REAL, pictures, size)
        content = {
            "recipes": labels,
            "prompts": prompts,
            "differences": differences,
            "command": self.command,
            "licence": self.source.licence,
        }
        write_json(path, _portable(content))

    def _shown(self) -> tuple[list[str], list[PILImage.Image]]:
        """Names and real pictures of the sample grids: of the smallest share, never of the validation part."""
        part = self.parts[min(self.plan.shares)]
        size = self.entries[0].recipe.model.image.sizes[0]
        indices = chosen(part.examples, self.plan.num_shown, self._test_part)
        return [part.examples[i].captions[0] for i in indices], [part.picture(i, size) for i in indices]

    @property
    def _test_part(self) -> Literal["all", "test"]:
        return "test" if self.plan.trials > 1 else "all"

    def _train(self, recipe: Recipe, source: Source, work: Path, title: str) -> Model:
        steps = sum(stage.steps for stage in recipe.stages)
        resume = any((work / folder / PLAN).is_file() for folder in ("state", STATE_BEFORE))

        def listen(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                self.tell(title, event["step"] + 1, steps)

        self.tell(title, 0, steps)
        return train(
            recipe,
            out=work,
            source=source,
            resume=resume,
            backbone=self.backbone,
            compile=self.plan.compile,
            preview_every=0,
            checkpoint_every=120.0,
            listener=listen,
        )

    def _evaluate(self, model: Model, source: Source, title: str, **settings: Any) -> dict[str, Any]:
        settings = {**self.plan.evaluation, **settings}
        if scored_by_its_teacher(model.config):
            settings["features"] = False
        if self.held is not None:
            settings["held"] = self.held
        if self.encoder is not None:
            settings["encoder"] = self.encoder

        def told(part: str, done: int, total: int) -> None:
            self.tell(f"{title}: {part}", done, total)

        return evaluate(model, "emoji", source=source, progress=told, **settings)

    # -- tuning

    def _tuned(self, entry: _Entry) -> dict[str, Any]:
        """Rate and guidance of a recipe, chosen once on the validation part and written down."""
        plan, trials = self.plan, self.plan.trials
        if trials == 1:
            return {"trials": 1, "rate_factor": 1.0, "guidance": plan.evaluation.get("guidance")}
        path, share = self.out / f"{entry.label}-trials.json", max(plan.shares)
        recipe, budget = self.planned[entry.label, share]
        asked = _portable(
            {
                "recipe": entry.label,
                "seed": TRIAL_SEED,
                "budget": budget,
                "settings": self._settings(recipe, share, {"trials": trials, "choose_by": list(plan.choose_by)}),
            }
        )
        content: dict[str, Any] = {**asked, "rates": [], "guidances": [], "chosen": None}
        if path.exists():
            content = _read(path)
            _refuse_changed(path, {k: content.get(k) for k in asked}, asked)
        factors, guidances = RATE_FACTORS[:trials], GUIDANCES[:trials]
        common: dict[str, Any] = {"seed": TRIAL_SEED * SEEDS_APART, "part": "validation"}
        for number, factor in enumerate(factors[len(content["rates"]) :], start=len(content["rates"]) + 1):
            title = f"{entry.label}: trial {number} of {trials}"
            model = self._train(
                _at_rate(recipe, factor, TRIAL_SEED), self.parts[share], self._trial(entry, factor), title
            )
            scores = self._evaluate(model, self.parts[share], title, **common)
            content["rates"].append({"factor": factor, "score": self._choice(scores), "scores": _numbers(scores)})
            write_json(path, content)
        # The first of equals is taken, and the recipe's own rate comes first.
        factor = max(content["rates"], key=lambda trial: trial["score"])["factor"]
        if len(content["guidances"]) < trials:
            title = f"{entry.label}: guidance"
            model = self._train(
                _at_rate(recipe, factor, TRIAL_SEED), self.parts[share], self._trial(entry, factor), title
            )
            for guidance in guidances[len(content["guidances"]) :]:
                scores = self._evaluate(model, self.parts[share], title, guidance=guidance, **common)
                found = {"guidance": guidance, "score": self._choice(scores), "scores": _numbers(scores)}
                content["guidances"].append(found)
                write_json(path, content)
        guidance = max(content["guidances"], key=lambda trial: trial["score"])["guidance"]
        content["chosen"] = {"rate_factor": factor, "guidance": guidance}
        write_json(path, content)
        for each in factors:
            shutil.rmtree(self._trial(entry, each), ignore_errors=True)
        return {"trials": trials, **content["chosen"]}

    def _trial(self, entry: _Entry, factor: float) -> Path:
        return self.work / f"{entry.label}-trial-rate{factor:g}"

    def _choice(self, scores: dict[str, Any]) -> float:
        found = [scores[name] for name in self.plan.choose_by if isinstance(scores.get(name), (int, float))]
        if not found:
            raise XFusionError(f"trials choose by {', '.join(self.plan.choose_by)}, and none of these was measured")
        return sum(found) / len(found)

    # -- one run

    def _settings(self, recipe: Recipe, share: float, tuning: dict[str, Any]) -> dict[str, Any]:
        base = self.backbone
        return {
            "recipe": checkpoint.to_json(recipe),
            "base": {"source": base.source, "revision": base.revision, "fingerprint": base.fingerprint},
            "data": self.source.spec,
            "share": share,
            "num_pictures": len(self.parts[share]),
            "evaluation": dict(self.plan.evaluation),
            "part": self._test_part,
            "tuning": tuning,
            "dtype": str(choose_compute_dtype(base.device)[0]).removeprefix("torch."),
        }

    def _run(self, entry: _Entry, share: float, seed: int, tuning: dict[str, Any], number: str) -> None:
        recipe, budget = self.planned[entry.label, share]
        recipe = _at_rate(recipe, tuning["rate_factor"], seed)
        name = run_name(entry.label, seed, share)
        path, work, title = self.out / f"{name}.json", self.work / name, f"{number} {name}"
        asked = _portable(
            {
                "recipe": entry.label,
                "seed": seed,
                "budget": budget,
                "settings": self._settings(recipe, share, tuning) | {"matched_parameters": entry.matched},
            }
        )
        if path.exists():
            found = _read(path)
            _refuse_changed(path, {k: found.get(k) for k in asked}, asked)
            return
        part, begun = self.parts[share], time.perf_counter()
        with peak_memory(self.backbone.device) as memory:
            model = self._train(recipe, part, work, title)
        trained = time.perf_counter() - begun
        guidance = {} if tuning["guidance"] is None else {"guidance": tuning["guidance"]}
        scores = self._evaluate(model, part, title, seed=seed * SEEDS_APART, part=self._test_part, **guidance)
        scored = scores.pop("settings")
        scores |= text_keeping(model)
        if "draw" in model.capabilities:
            prompts, _ = self._shown()
            steps = {"steps": self.plan.evaluation["steps"]} if "steps" in self.plan.evaluation else {}
            drawn = model.draw(prompts, seed=0, **steps, **guidance)
            _write_strip(path.with_suffix(".png"), drawn, model.image.sizes[0])
        _, cost = self._cost(entry, share)
        result = {
            **asked,
            "scores": _numbers(scores),
            "scored": {k: v for k, v in scored.items() if k != "versions"},
            "preserves_text": bool(model.fusion.preserves_text),
            "cost": cost | {"peak_memory": memory, "wall_minutes": round(trained / 60, 3)},
            "learning": _learning(work / "log.jsonl"),
            "machine": machine(),
            "commit": commit(),
        }
        write_json(path, _portable(result))
        shutil.rmtree(work / "state", ignore_errors=True)  # the pack stays
        del model
        gc.collect()


def run_name(label: str, seed: int, share: float = 1.0) -> str:
    """The name of a run's files: ``xfusion-seed0``, ``xfusion-seed0-share30``."""
    return f"{label}-seed{seed}" + ("" if share == 1 else f"-share{100 * share:g}")


def scored_by_its_teacher(config: Any) -> bool:
    """Whether training sees a frozen encoder: it may not score what it taught."""
    if not is_dataclass(config) or isinstance(config, type):
        return isinstance(config, tuple) and any(map(scored_by_its_teacher, config))
    if ".modalities.encoders." in f".{type(config).__module__}.":
        return True
    return any(scored_by_its_teacher(getattr(config, f.name)) for f in fields_of(config))


def _at_rate(recipe: Recipe, factor: float, seed: int) -> Recipe:
    stages = tuple(replace(stage, rate=stage.rate * factor) for stage in recipe.stages)
    return replace(recipe, stages=stages, seed=seed, model=replace(recipe.model, init_seed=seed))


def _numbers(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of a suite as JSON values; what is not finite is None."""
    kept = {k: v for k, v in scores.items() if k != "settings"}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in kept.items()}


def _portable(value: Any) -> Any:
    """A JSON value in which no absolute path stands: of a file or folder only its name is written."""
    if isinstance(value, Mapping):
        return {str(k): _portable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(v) for v in value]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()) and "\n" not in value:
        return Path(value).name
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise XFusionError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise XFusionError(f"{path} is not a result of a comparison")
    return found


def _refuse_changed(path: Path, found: Any, asked: Any) -> None:
    for where, one, two in differing(found, asked):
        raise XFusionError(
            f"{path} was made with {where} = {one!r}, now it is {two!r}: give the same settings, another --out, or"
            " remove the file"
        )


def _refuse_unequal(name: str, budget: Mapping[str, Any], other: str, wanted: Mapping[str, Any]) -> None:
    """Budgets that are not equal are never set beside each other."""
    kinds = [b["kind"] for b in (budget, wanted)]
    if kinds[0] != kinds[1]:
        raise XFusionError(f"{name} has a budget in {kinds[0]}, {other} one in {kinds[1]}: they cannot be compared")
    key = kinds[0]
    allowed = BUDGET_TOLERANCE * wanted[key] if key == "flops" else 0
    if abs(budget[key] - wanted[key]) > allowed:
        hint = "choose --samples as a multiple of both steps" if key == "samples" else "choose more --samples"
        raise XFusionError(
            f"{name} would train {budget[key]:,} {key} in steps of {budget['steps']}, {other} {wanted[key]:,} in"
            f" {wanted['steps']}: budgets must be equal; {hint}"
        )


def _learning(log: Path) -> dict[str, list[list[float]]]:
    """Loss -> points of samples so far and mean loss, from the log of a whole run."""
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    steps = [event for event in events if event.get("event") == "step"]
    if not steps:
        return {}
    seen, out = 0, {}
    length = math.ceil(len(steps) / LEARNING_POINTS)
    for start in range(0, len(steps), length):
        part = steps[start : start + length]
        seen += sum(event["samples"] for event in part)
        for name in part[0]["losses"]:
            mean = sum(event["losses"].get(name, 0.0) for event in part) / len(part)
            out.setdefault(name, []).append([seen, float(f"{mean:.5g}")])
    return out


def _write_strip(path: Path, pictures: Sequence[PILImage.Image], size: int) -> None:
    """Pictures side by side in one file; it appears whole or not at all."""
    sheet = PILImage.new("RGB", (size * max(len(pictures), 1), size), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture.convert("RGB").resize((size, size)), (i * size, 0))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    sheet.save(temporary, optimize=True)
    temporary.replace(path)


# --------------------------------------------------------------------------------------------------------- statistics


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t-distribution, for whole degrees of freedom, to 1e-12.

    The probability of a range around 0 is a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4); it is inverted by
    halving.
    """
    if degrees < 1 or not 0 < probability < 1:
        raise ValueError(f"t_quantile({probability}, {degrees}): a probability within 0 to 1, and 1 degree or more")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    wanted, low, high = 2 * probability - 1, 0.0, 1.0
    while _t_inside(high, degrees) < wanted:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < wanted else (low, middle)
    return (low + high) / 2


def _t_inside(t: float, degrees: int) -> float:
    """Probability that ``|T| < t``."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = (cosine if degrees > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The t-interval of the mean; None over fewer than five values."""
    if len(values) < FEWEST_RUNS:
        return None
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return mean - half, mean + half


def seeds_needed(difference: float, deviation: float, power: float = POWER) -> int | None:
    """Pairs of runs at which a paired t-test at 95 % finds a difference of this size with this chance.

    Args:
        difference: mean of the paired differences.
        deviation: their standard deviation.
        power: the chance.

    Returns:
        five or more; None where more than 10,000 would be needed, or there is no difference.
    """
    if not difference:
        return None
    for count in range(FEWEST_RUNS, 10_001):
        reach = t_quantile(0.975, count - 1) + t_quantile(power, count - 1)
        if reach * deviation / math.sqrt(count) <= abs(difference):
            return count
    return None


def paired(values: Mapping[int, float], first: Mapping[int, float], better: str = "higher") -> dict[str, Any] | None:
    """The difference of two recipes over the seeds that both ran; None where there is no such seed.

    Args:
        values: seed -> score.
        first: the same of the recipe that it is compared with.
        better: whether a higher or a lower score is better.

    Returns:
        ``num_pairs``, ``mean``, ``deviation``, ``interval`` (None below five pairs), ``verdict`` ("better", "worse" or
        "not decidable") and ``seeds_needed``.
    """
    seeds = sorted(set(values) & set(first))
    if not seeds:
        return None
    differences = [values[seed] - first[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    deviation = statistics.stdev(differences) if len(seeds) > 1 else None
    found, verdict = interval(differences), "not decidable"
    if found and (found[0] > 0 or found[1] < 0):
        verdict = "better" if (mean > 0) == (better == "higher") else "worse"
    return {
        "num_pairs": len(seeds),
        "mean": mean,
        "deviation": deviation,
        "interval": found and list(found),
        "verdict": verdict,
        "seeds_needed": None if deviation is None else seeds_needed(mean, deviation),
    }


# ---------------------------------------------------------------------------------------------------------- the table

EQUAL = ("kind", "asked_samples")
"""Fields of a budget that all runs of a comparison share."""
ALIKE = ("base.fingerprint", "recipe.model.image", "data", "evaluation", "part", "tuning.trials", "dtype")
"""Settings that all runs of a comparison share."""


def summarise(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of a comparison, from its committed files alone.

    Args:
        folder: where the runs' JSON files stand.

    Returns:
        JSON values: ``name``, ``first``, ``recipes``, ``shares``, ``budget``, ``scores`` (per share and score: a row per
        recipe with ``mean``, ``interval``, ``values`` by seed and the paired ``difference`` to the first), ``cost`` per
        recipe, ``learning``, ``prompts``, ``differences``, ``notes``, ``command``, ``settings``.

    Raises:
        XFusionError: no runs, or runs that cannot stand in one table (budget, base, codec, data, scoring).
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*-seed*.json"))
    runs = [_read(path) for path in paths]
    if not runs:
        raise XFusionError(f"{folder} holds no result of a comparison (RECIPE-seedS.json)")
    plan = _read(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    _refuse_mixed(paths, runs)
    present = {run["recipe"] for run in runs}
    known = plan.get("recipes", [])
    recipes = [label for label in known if label in present] + sorted(present - set(known))
    shares = sorted({run["settings"]["share"] for run in runs}, reverse=True)
    scores = [
        table
        for share in shares
        for name in SCORES
        if (table := _score_table(name, recipes, share, [r for r in runs if r["settings"]["share"] == share]))
    ]
    summary = {
        "name": folder.name,
        "first": recipes[0],
        "recipes": recipes,
        "shares": shares,
        "seeds": sorted({run["seed"] for run in runs}),
        "num_runs": len(runs),
        "budget": runs[0]["budget"],
        "scores": scores,
        "text": {label: _text_facts([r for r in runs if r["recipe"] == label]) for label in recipes},
        "cost": [_cost_row(label, [r for r in runs if r["recipe"] == label], shares[0]) for label in recipes],
        "learning": {label: _mean_curve([r for r in runs if _is(r, label, shares[0])]) for label in recipes},
        "prompts": plan.get("prompts", []),
        "differences": {k: v for k, v in plan.get("differences", {}).items() if k in present},
        "command": plan.get("command"),
        "licence": plan.get("licence"),
        "settings": runs[0]["settings"],
        "machine": runs[0]["machine"],
        "commits": sorted({run["commit"]["id"] for run in runs if run["commit"]}),
    }
    return summary | {"notes": _notes(summary, runs)}


def _is(run: Mapping[str, Any], label: str, share: float) -> bool:
    return run["recipe"] == label and run["settings"]["share"] == share


def _refuse_mixed(paths: Sequence[Path], runs: Sequence[dict[str, Any]]) -> None:
    """Runs that were made under other conditions never stand in one table."""
    first: dict[float, int] = {}
    for number, (path, run) in enumerate(zip(paths, runs, strict=True)):
        for key in ("recipe", "seed", "budget", "settings", "scores", "cost", "machine", "commit"):
            if key not in run:
                raise XFusionError(f"{path} is not a result of a comparison: it has no {key!r}")
        wanted = first.setdefault(run["settings"]["share"], number)
        names = path.name, paths[wanted].name
        _refuse_unequal(names[0], run["budget"], names[1], runs[wanted]["budget"])
        pairs = [(f"budget.{k}", run["budget"][k], runs[0]["budget"][k]) for k in EQUAL]
        pairs += [(k, *(_inside(r["settings"], k) for r in (run, runs[0]))) for k in ALIKE]
        for what, one, other in pairs:
            for where, a, b in differing(other, one):
                raise XFusionError(
                    f"{path.name} and {paths[0].name} cannot stand in one table: {'.'.join(filter(None, (what, where)))}"
                    f" is {b!r} and {a!r}"
                )
    encoders = {
        run["scored"].get("encoder"): path.name for path, run in zip(paths, runs, strict=True) if "scored" in run
    }
    encoders.pop(None, None)
    if len(encoders) > 1:
        (one, a), (other, b), *_ = encoders.items()
        raise XFusionError(f"{a} and {b} were scored by two encoders ({one}, {other}): they cannot stand in one table")


def _inside(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _score_table(
    name: str, recipes: Sequence[str], share: float, runs: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """One score of all recipes at one share."""
    values = {
        label: {
            r["seed"]: r["scores"][name] for r in runs if r["recipe"] == label and r["scores"].get(name) is not None
        }
        for label in recipes
    }
    if not any(values.values()):
        return None
    score, first, rows = SCORES[name], values[recipes[0]], []
    for label in recipes:
        own = values[label]
        found = interval(list(own.values()))
        rows.append(
            {
                "recipe": label,
                "num_runs": len(own),
                "mean": statistics.fmean(own.values()) if own else None,
                "interval": found and list(found),
                "values": {str(seed): value for seed, value in sorted(own.items())},
                "difference": None if label == recipes[0] else paired(own, first, score.better),
            }
        )
    beside = {}
    for kind, key in (("chance", f"chance_{name}"), ("ceiling", f"ceiling_{name}"), ("blind", f"{name}_blind")):
        found = [r["scores"][key] for r in runs if isinstance(r["scores"].get(key), (int, float))]
        if found:
            beside[kind] = statistics.fmean(found)
    return {"score": name, "title": score.title, "better": score.better, "share": share, "rows": rows, **beside}


def _text_facts(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "declared": all(r.get("preserves_text") for r in runs),
        "bit_equal": sum(bool(r["scores"].get("text_bit_equal")) for r in runs),
        "num_runs": len(runs),
    }


def _cost_row(label: str, runs: Sequence[dict[str, Any]], share: float) -> dict[str, Any]:
    """What a recipe costs, from its runs at the largest share; what varies by run is a median or the largest."""
    runs = [r for r in runs if r["settings"]["share"] == share] or list(runs)
    cost = runs[0]["cost"]
    peaks = [r["cost"]["peak_memory"]["bytes"] for r in runs if r["cost"]["peak_memory"]["bytes"]]
    times = [r["cost"]["time"] for r in runs if r["cost"]["time"]]
    return {
        "recipe": label,
        "trainable_parameters": cost["trainable_parameters"],
        "flops_per_sample": cost["flops_per_sample"],
        "forward_flops_per_sample": cost["forward_flops_per_sample"],
        "training_flops": runs[0]["budget"].get("flops"),
        "tokens_per_picture": cost["tokens_per_picture"],
        "steps": runs[0]["budget"]["steps"],
        "samples": runs[0]["budget"]["samples"],
        "peak_memory": {"bytes": max(peaks) if peaks else None, "what": cost["peak_memory"]["what"]},
        "wall_minutes": statistics.median(r["cost"]["wall_minutes"] for r in runs),
        "time": {
            k: statistics.median(t[k] for t in times if t.get(k) is not None)
            for k in times[0]
            if times[0][k] is not None
        }
        if times
        else None,
        "tuning": runs[0]["settings"]["tuning"],
        "fusion": runs[0]["settings"]["recipe"]["model"]["fusion"],
    }


def _mean_curve(runs: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Loss -> samples so far and the mean loss over runs."""
    out = {}
    for name in dict.fromkeys(name for run in runs for name in run.get("learning", {})):
        curves = [run["learning"][name] for run in runs if name in run.get("learning", {})]
        length = min(map(len, curves))
        out[name] = [[curves[0][i][0], statistics.fmean(c[i][1] for c in curves)] for i in range(length)]
    return out


def _notes(summary: Mapping[str, Any], runs: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know beside the numbers."""
    budget, tuning = summary["budget"], summary["settings"]["tuning"]
    equal = "executed FLOPs" if budget["kind"] == "flops" else "samples"
    out = [f"Equal budget in {equal}; every difference is to {summary['first']}, over runs of the same seed."]
    if tuning["trials"] == 1:
        out.append("Rate and guidance are each recipe's own: nothing was tuned.")
    else:
        chosen = "; ".join(
            f"{row['recipe']}: rate times {row['tuning']['rate_factor']:g}, guidance {row['tuning']['guidance']:g}"
            for row in summary["cost"]
        )
        out.append(
            f"{tuning['trials']} rates and {tuning['trials']} strengths of guidance per recipe, chosen on the validation part"
            f" (seed {TRIAL_SEED}, groups that are in no test score): {chosen}."
        )
    fewest = min(len([r for r in runs if r["recipe"] == label]) for label in summary["recipes"])
    if len(summary["seeds"]) < FEWEST_RUNS or fewest < FEWEST_RUNS:
        out.append(f"n < {FEWEST_RUNS}: no interval, and nothing is decided.")
    out.append(
        "Intervals are 95 % t-intervals over runs, one by one: of twenty true ties one looks decided. fit_ is memory of"
        " trained pictures, held_ is on groups that no training saw."
    )
    for label, found in summary["differences"].items():
        if found:
            listed = "; ".join(f"{d['where']} {d['first']!r} -> {d['this']!r}" for d in found[:6])
            more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
            out.append(f"Besides the mechanism, {label} differs from {summary['first']}: {listed}{more}.")
    taught = [
        label
        for label in summary["recipes"]
        if any(r["recipe"] == label and r["scored"].get("encoder", 0) is None for r in runs)
    ]
    if taught and not summary["settings"]["evaluation"].get("features", True):
        taught = []
    if taught:
        out.append(f"No feature score for {', '.join(taught)}: a frozen encoder took part in training.")
    if all(row["time"] is None for row in summary["cost"]):
        out.append(
            "Time of a step and of sampling was not measured (--measure-time, on an idle machine); wall minutes are of a"
            " machine that may have done other work."
        )
    return out
