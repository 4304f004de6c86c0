"""`demo`: in minutes from scratch to a model that draws and names emoji, with a proof and a report page.

Everything uses the public functions: `train`, `draw`, `caption`, `evaluate`, `verify`. The pictures and answers on the
page are the same ones that were scored.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from rich.console import Console
from rich.text import Text
from torch import Tensor

from xfusion import checkpoint
from xfusion.apps import report
from xfusion.apps.commands.base import progress
from xfusion.backbone import Backbone
from xfusion.data.sequence import Example
from xfusion.data.sources import Source, open_source
from xfusion.evaluation.machine import commit, machine
from xfusion.evaluation.metrics import captions, naming, retrieval
from xfusion.evaluation.run import evaluate
from xfusion.evaluation.suites.emoji import choose_examples
from xfusion.evaluation.unseen import held_split
from xfusion.evaluation.verify import PROMPTS, bit_equal, verify
from xfusion.modalities.encoders.efficientnet_lite import EfficientNetLite
from xfusion.model import Model
from xfusion.recipes.base import find, train
from xfusion.storage import write_json
from xfusion.training.loop import Interrupted
from xfusion.training.precision import product_rates
from xfusion.training.speed import drawing_speed, samples_per_second
from xfusion.training.stages import Recipe
from xfusion.training.track import Event

RECIPE = "xfusion.recipes.xfusion:demo"
"""The recipe of the fresh tower, as `xfusion train` accepts it."""
SIZES = ((128, 64), (64, 32), (32, 16), (16, 16))
"""Pictures to learn, and drawing samples per step: few samples take small steps."""
SAMPLES_PER_PICTURE = 200
"""Samples that a picture needs until it is drawn and named from memory."""
GFLOPS_PER_SAMPLE = 2.5
"""Work of a sample, forward and backward: 64 drawings and 32 names take 239 GFLOPs."""
SHARE_OF_RATE = 0.7
"""Share of the rate of large products at which a step works (docs/speed.md)."""
COMPILING = 30.0
"""Seconds of compilation at the start."""
SHIPPED = "emoji"
"""The shipped pack that is compared with it."""
FIRST = "red apple"
"""The first prompt, drawn by the shipped pack if there is one."""
PREVIEWS = ("red apple", "pizza", "cat face", "penguin", "rainbow", "rocket", "house", "red heart")
"""Prompts of the previews during training."""
NUM_SHOWN = 12
"""Concepts shown in full on the page: chosen by the hash of their ids, not by eye."""
MAX_HELD = 50
"""Held-out pictures that the fresh tower is scored on; their names are the candidates. `xfusion evaluate` uses 100."""
SHIPPED_DRAWN, SHIPPED_CAPTIONED = 64, 128
"""Size of the shipped pack's spot check; its full scores take many minutes and are shipped with it."""


def run(
    out: Path = Path("runs/demo"),
    minutes: float = 5.0,
    console: Console | None = None,
    seed: int = 0,
    *,
    pictures: int | None = None,
    recipe: Recipe | None = None,
    encoder: Any = None,
) -> dict[str, Any]:
    """Train a fresh tower, evaluate it and the shipped pack, prove the text unchanged, write the page.

    Args:
        out: folder of ``report.html``, ``metrics.json`` and the run, ``fresh/``.
        minutes: training time, including compilation.
        console: where progress is shown; None is silent.
        seed: seed of the new weights, the data order and the noise.
        pictures: emoji to learn; None takes as many as this machine learns in these minutes (`choose_size`).
        recipe: recipe to train instead of the demo's own.
        encoder: encoder of the feature metrics; None uses EfficientNet-Lite0.

    Returns:
        the content of ``metrics.json``.

    Raises:
        XFusionError: a package of the extra ``demo`` or the embedded base is missing, or training failed.
        Interrupted: Ctrl-C during training; the run's state and pack are in ``out/fresh``.
    """
    start = time.perf_counter()
    reporter = _Reporter(console or Console(quiet=True))
    name = RECIPE
    if recipe is None:
        chosen, draw = choose_size(minutes, pictures)
        name = f"{RECIPE}(pictures={chosen}, draw={draw})"
        recipe = find(name)()
        if pictures is None and chosen < SIZES[0][0]:
            reporter.say(
                f"\nProducts run at {max(product_rates()):.0f} GFLOP/s here, so {minutes:g} minutes are enough to learn {chosen}"
                f" pictures. More take longer: --pictures {SIZES[0][0]} --minutes {minutes_for(SIZES[0][0]):.0f}"
            )
    recipe = replace(recipe.with_model(init_seed=seed), seed=seed)
    reporter.say(_plan(out, minutes, recipe))

    # A missing package must fail now, not after training.
    with reporter.part("loading the base, the pictures and the encoder"):
        backbone = Backbone.load(recipe.model.backbone.source, revision=recipe.model.backbone.revision)
        source = open_source(recipe.data, special_tokens=backbone.special_tokens)
        encoder = encoder or EfficientNetLite()
        shipped = _load_shipped(backbone)
    _first_picture(reporter, shipped)

    out.mkdir(parents=True, exist_ok=True)
    folder = out / "fresh"
    _move_aside(folder, reporter)
    watcher = _Watcher(reporter)
    prompts = _preview_prompts(source)
    try:
        fresh = train(
            recipe,
            out=folder,
            source=source,
            backbone=backbone,
            minutes=minutes,
            preview_prompts=prompts,
            preview_every=max(10.0, 60 * minutes / 5),
            command=f"xfusion demo --pictures {len(source)} --minutes {minutes:g}",
            console=console,
            listener=watcher,
        ).eval()
    except Interrupted:
        reporter.say(
            f"\nWhat was learned so far is kept: {folder / 'pack'} can draw, and the training goes on with\n"
            f"  xfusion train '{name}' --resume -o {folder}"
        )
        raise

    reporter.say("\nThe tower has learned. Now it is looked at.")
    recorder = RecordingModel(fresh)
    with reporter.part("scoring the fresh tower") as report_progress:
        scores = evaluate(
            recorder, "emoji", source=source, max_held=MAX_HELD, encoder=encoder, seed=seed, progress=report_progress
        )
    with reporter.part("proving the fresh tower's text unchanged") as report_progress:
        proof = {"fresh": verify(fresh, progress=report_progress)}
    shipped_recorder, spot_check = None, None
    if shipped is not None:
        shipped_recorder = RecordingModel(shipped)
        with reporter.part("asking the shipped pack the same, and a sample of its own") as report_progress:
            spot_check = _spot_check(shipped_recorder, seed, report_progress)
            _ask_the_same(shipped_recorder, source, seed)
            proof["shipped"] = quick_proof(shipped)
    with reporter.part("measuring the speed of drawing alone"):
        speed = drawing_speed(recipe, source=source, backbone=backbone)

    metrics = {
        "text_identical": all(checked["text_identical"] for checked in proof.values()),
        "minutes_training": round(watcher.seconds / 60, 3),
        "drawing_samples_per_second": _rounded(speed["samples_per_second"], 1),
        "joint_samples_per_second": _rounded(samples_per_second(watcher.steps), 1),
        "tokens_per_image": fresh.image.grid(fresh.image.sizes[0])[0] * fresh.image.grid(fresh.image.sizes[0])[1],
        "codec_psnr_db": scores.get("codec_psnr_db"),
        "fresh": _scores(scores, "measured now, whole"),
        "shipped": _shipped_scores(spot_check),
        "shipped_spot_check": spot_check and _scores(spot_check, "measured now, a sample fixed by hash"),
        "proof": proof,
        "training": watcher.facts(),
        "settings": _settings(recipe, minutes, fresh, speed, scores),
        "seed": seed,
        "base": backbone.identity,
        "num_new_parameters": fresh.num_new_parameters,
        "num_frozen_parameters": backbone.num_parameters,
        "machine": machine(),
        "commit": commit(),
        "minutes_after_training": round((time.perf_counter() - watcher.ended) / 60, 3),
        "minutes_total": round((time.perf_counter() - start) / 60, 3),
    }
    story = report.Story(
        metrics=metrics,
        curve=watcher.curve(),
        frames=watcher.frames(),
        frame_names=prompts,
        frame_real=_real_pictures(source, prompts, fresh.image.sizes[0]),
        concepts=_concepts(recorder, shipped_recorder, source, fresh.image.sizes[0], seed),
        num_shown=NUM_SHOWN,
        held=_held_out(recorder, shipped_recorder, source, fresh.image.sizes[0]),
        commands=_commands(folder, shipped is not None, minutes, len(source.examples), out),
    )
    write_json(out / "metrics.json", metrics)
    report.write(out / "report.html", story)
    reporter.say(_summary(metrics, out))
    return metrics


# ------------------------------------------------------------------------------------------------------------- size


def choose_size(minutes: float, pictures: int | None = None) -> tuple[int, int]:
    """Pictures to learn and drawing samples per step.

    A processor without fast products trains a third of the samples of another one, and would have learned nothing of all
    pictures when the time is over; it then knows a fourth of them (docs/training_log.md).

    Args:
        minutes: training time, including compilation.
        pictures: as many pictures; None takes the most that can be learned in this time, and at least the fewest of `SIZES`.
    """
    if pictures is None:
        pictures = next((number for number, _ in SIZES if minutes_for(number) <= minutes), SIZES[-1][0])
    return pictures, next((draw for number, draw in SIZES if pictures >= number), SIZES[-1][1])


def minutes_for(pictures: int) -> float:
    """Minutes of training in which this processor learns so many pictures."""
    samples_per_second = SHARE_OF_RATE * max(product_rates()) / GFLOPS_PER_SAMPLE
    return (COMPILING + pictures * SAMPLES_PER_PICTURE / samples_per_second) / 60


# --------------------------------------------------------------------------------------------------------- progress


class _Reporter:
    """Progress output for people."""

    def __init__(self, console: Console):
        self.console = console

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def part(self, title: str) -> Iterator[Any]:
        """One part of the demo: a progress bar on a terminal, then a line with its time."""
        start = time.perf_counter()
        with progress(self.console) as report_progress:
            yield report_progress
        self.say(f"{title}: {time.perf_counter() - start:.0f} s")

    def show(self, pictures: Sequence[PILImage.Image], side: int = 16) -> None:
        """Print pictures side by side as coloured half blocks, if the terminal has colours and is wide enough."""
        columns = max(1, (self.console.width - 2) // (side + 2))
        if self.console.is_terminal and self.console.color_system:
            self.console.print(half_blocks(pictures[:columns], side), soft_wrap=True)


def half_blocks(pictures: Sequence[PILImage.Image], side: int) -> Text:
    """Pictures as text, two pixels per character."""
    images = [p.convert("RGB").resize((side, side), PILImage.Resampling.BOX) for p in pictures]
    text = Text()
    for y in range(0, side - side % 2, 2):
        for picture in images:
            text.append("  ")
            for x in range(side):
                upper, lower = (_hexadecimal(picture.getpixel((x, row))) for row in (y, y + 1))
                text.append("▀", style=f"{upper} on {lower}")
        text.append("\n")
    return text


def _hexadecimal(pixel: Any) -> str:
    return "#{:02x}{:02x}{:02x}".format(*pixel)


def _plan(out: Path, minutes: float, recipe: Recipe) -> str:
    return f"""
A language model that has never seen a picture learns to draw and to name {recipe.data}.

  1  load the base; nothing in it will ever change
  2  train new weights beside it for {minutes:g} {"minute" if minutes == 1 else "minutes"}, with pictures on the way
  3  score what they draw and say; ask the pack that ships with xfusion the same
  4  prove that the model's text is the base's, bit for bit
  5  write {out / "report.html"} and {out / "metrics.json"}

Steps 3 to 5 take two to four minutes on two cores. Ctrl-C while it trains keeps what was learned.
"""


def _summary(metrics: dict[str, Any], out: Path) -> str:
    fresh, is_identical = metrics["fresh"], metrics["text_identical"]
    lines = [
        "",
        f"text      {'bit-identical to the base' if is_identical else 'NOT identical to the base: see the report'}",
        f"drawing   {report.percent(fresh['fit_retrieval_pixel_at_1'])} of {fresh['num_concepts']} drawings are nearest to"
        " the picture they should be (memory)",
        f"naming    {report.percent(fresh['fit_caption_exact'])} of the trained pictures are named right (memory)",
        f"unseen    mean reciprocal rank {report.number(fresh['held_caption_mrr'])} on pictures never trained on, blind"
        f" {report.number(fresh['held_caption_mrr_blind'])}",
        f"time      {metrics['minutes_training']:.1f} minutes of training, {metrics['minutes_total']:.1f} in all",
        f"page      {out / 'report.html'}",
    ]
    return "\n".join(lines)


def _commands(folder: Path, has_shipped: bool, minutes: float, pictures: int, out: Path) -> list[tuple[str, str]]:
    pack = folder / "pack"
    rows = [
        (f'xfusion generate {pack} "a red apple" -n 4 -o apples.png', "draw with the tower of this page"),
        (f"xfusion caption {pack} apples.png", "ask it what a picture shows"),
        (f"xfusion verify {pack}", "the proof again"),
        (f"xfusion evaluate {pack} --suite emoji", "all scores"),
        ("xfusion train xfusion --data your_folder --minutes 15 -o runs/mine", "your own pictures with captions"),
        (f"xfusion demo --minutes {minutes:g} --pictures {pictures} -o {out}", "this page again"),
    ]
    if has_shipped:
        rows.insert(0, (f'xfusion generate {SHIPPED} "a red heart" -o heart.png', "draw with the shipped pack"))
    return rows


# ---------------------------------------------------------------------------------------------------- recorded answers


class RecordingModel:
    """A model that records its answers, so that the page can reuse them and nothing is drawn or captioned twice.

    All other attributes are the model's own.
    """

    def __init__(self, model: Model):
        self.model = model
        self.drawings: dict[tuple[str, int], PILImage.Image] = {}
        self.answers: dict[bytes, str] = {}
        self.name_scores: dict[bytes, Tensor] = {}
        self.blind_scores: Tensor | None = None
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def draw(self, prompts: list[str], *, seeds: Sequence[int], **settings: Any) -> list[PILImage.Image]:
        """The model's `draw`, recorded."""
        pictures = self.model.draw(prompts, seeds=seeds, **settings)
        self.drawings.update(zip(zip(prompts, seeds, strict=True), pictures, strict=True))
        return pictures

    def caption(self, pictures: list[PILImage.Image], **settings: Any) -> list[str]:
        """The model's `caption`, recorded."""
        answers = self.model.caption(pictures, **settings)
        self.answers.update(zip([p.tobytes() for p in pictures], answers, strict=True))
        return answers

    def score_names(self, pictures: list[PILImage.Image] | None, names: list[str], **settings: Any) -> Tensor:
        """The model's `score_names`, recorded."""
        scores = self.model.score_names(pictures, names, **settings)
        self.names = list(names)
        if pictures is None:
            self.blind_scores = scores
        else:
            self.name_scores.update(zip([p.tobytes() for p in pictures], scores, strict=True))
        return scores


def _load_shipped(backbone: Backbone) -> Model | None:
    """The shipped pack on the demo's base, if there is one that was trained on this base."""
    if SHIPPED not in checkpoint.shipped():
        return None
    base_fingerprint = checkpoint.read_config(checkpoint.find(SHIPPED))["base"]["fingerprint"]
    return checkpoint.load(SHIPPED, backbone=backbone) if base_fingerprint == backbone.fingerprint else None


def _first_picture(reporter: _Reporter, shipped: Model | None) -> None:
    if shipped is None:
        reporter.say(f"There is no shipped pack {SHIPPED!r} for this base: the page will show the fresh tower alone.\n")
        return
    start = time.perf_counter()
    picture = shipped.draw([FIRST], seed=0)[0]
    reporter.say(f"The shipped pack draws {FIRST!r} in {time.perf_counter() - start:.1f} s.")
    reporter.show([picture], side=32)


def _preview_prompts(source: Source) -> tuple[str, ...]:
    names = {example.captions[0] for example in source.examples}
    return tuple(p for p in PREVIEWS if p in names) or tuple(e.captions[0] for e in source.examples[: len(PREVIEWS)])


def _move_aside(folder: Path, reporter: _Reporter) -> None:
    """Move an earlier run aside; the one moved aside before is deleted."""
    if folder.exists():
        backup = folder.with_name(f"{folder.name}.before")
        shutil.rmtree(backup, ignore_errors=True)
        folder.rename(backup)
        reporter.say(f"The run of last time is now in {backup}.")


def _spot_check(recorder: RecordingModel, seed: int, report_progress: Any) -> dict[str, Any]:
    """Scores on a sample of the shipped pack's own concepts, small enough to draw while the user waits."""
    return evaluate(
        recorder,
        "emoji",
        source=_trained_on(),
        max_drawn=SHIPPED_DRAWN,
        max_captioned=SHIPPED_CAPTIONED,
        max_held=0,
        features=False,  # the features of the whole gallery alone take minutes
        seed=seed,
        progress=report_progress,
    )


def _trained_on() -> str:
    """The shipped pack's training data."""
    facts = checkpoint.read_config(checkpoint.find(SHIPPED)).get("training", {})
    return str(facts.get("data", "emoji"))


def _ask_the_same(recorder: RecordingModel, source: Source, seed: int) -> None:
    """Let the shipped pack draw and name what the page shows of the fresh one."""
    indices = choose_examples(source.examples, NUM_SHOWN)
    size = recorder.model.image.sizes[0]
    recorder.draw([source.examples[i].captions[0] for i in indices], seeds=[seed + i for i in indices])
    recorder.caption([source.picture(i, size) for i in indices])
    held_out = held_split(source)
    if held_out is not None:
        recorder.caption([held_out.picture(i, size) for i in choose_examples(held_out.examples, NUM_SHOWN)])


@torch.no_grad()
def quick_proof(model: Model) -> dict[str, Any]:
    """The bit-exact core of `verify`, in seconds: without reloading the base, greedy tokens and noise.

    Returns:
        ``text_identical`` and ``checks``, as in `verify`.
    """
    backbone, unequal_prompts, positions = model.backbone, [], 0
    for name, text in PROMPTS:
        ids = torch.tensor([backbone.encode(text)], device=backbone.device)
        positions += ids.numel()
        if not bit_equal(model.text_logits(ids, stack="base"), model.text_logits(ids, stack="fused")):
            unequal_prompts.append(name)
    fingerprint = backbone.compute_fingerprint()
    equal_text = f"bit-equal at {positions} positions of {len(PROMPTS)} prompts"
    checks = [
        {
            "name": "base weights",
            "passed": fingerprint == backbone.fingerprint,
            "detail": f"fingerprint {fingerprint[:16]}, recorded {backbone.fingerprint[:16]}",
        },
        {
            "name": "fused stack: logits",
            "passed": not unequal_prompts,
            "detail": f"differ for {', '.join(unequal_prompts)}" if unequal_prompts else equal_text,
        },
    ]
    return {"text_identical": all(check["passed"] for check in checks), "checks": checks, "quick": True}


# ------------------------------------------------------------------------------------------------------ what is written


@dataclass
class _Watcher:
    """Listens to the training."""

    reporter: _Reporter
    steps: list[Event] = field(default_factory=list)
    plan: Event = field(default_factory=dict)
    start: Event = field(default_factory=dict)
    previews: list[tuple[float, int, str]] = field(default_factory=list)
    seconds: float = 0.0
    ended: float = 0.0

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "step":
            self.steps.append(event)
        elif kind == "start":
            self.start = event
        elif kind == "plan":
            self.plan = event
        elif kind == "preview":
            self.previews.append((self.steps[-1]["seconds"] if self.steps else 0.0, event["step"], event["path"]))
            pictures = cut(PILImage.open(event["path"]))
            self.reporter.show(pictures)
            self.reporter.say(f"pictures at step {event['step']}: {event['path']}")
        elif kind == "end":
            self.seconds, self.ended = event["seconds"], time.perf_counter()

    def curve(self) -> list[tuple[float, dict[str, float]]]:
        """Pairs of seconds and losses."""
        return [(event["seconds"], event["losses"]) for event in self.steps]

    def frames(self) -> list[report.Frame]:
        """The previews; if two have the same step, the first."""
        frames_by_step: dict[int, report.Frame] = {}
        for seconds, step, path in self.previews:
            frame = report.Frame(seconds=seconds, step=step, pictures=cut(PILImage.open(path)))
            frames_by_step.setdefault(step, frame)
        return list(frames_by_step.values())

    def facts(self) -> dict[str, Any]:
        """How the budget was spent."""
        last = self.steps[-1] if self.steps else {}
        return {
            "steps": len(self.steps),
            "samples": sum(event["samples"] for event in self.steps),
            "seconds": round(self.seconds, 1),
            "planned_at_step": self.plan.get("step"),
            "dtype": self.start.get("dtype"),
            "threads": self.start.get("threads"),
            "pictures": self.start.get("pictures"),
            "last_losses": last.get("losses"),
        }


def cut(sheet: PILImage.Image) -> list[PILImage.Image]:
    """The square pictures of a one-row sheet."""
    side = sheet.height
    return [sheet.convert("RGB").crop((x, 0, x + side, side)) for x in range(0, sheet.width - side + 1, side)]


def _scores(result: dict[str, Any], provenance: str) -> dict[str, Any]:
    numbers = {k: v for k, v in result.items() if k != "settings"}
    return (
        {name: result.get(name) for name in report.SCORES}
        | numbers
        | {"how": provenance, "settings": result["settings"]}
    )


def _shipped_scores(spot_check: dict[str, Any] | None) -> dict[str, Any] | None:
    """The scores recorded with the shipped pack, or the spot check if there are none."""
    if spot_check is None:
        return None
    recorded_scores = checkpoint.read_config(checkpoint.find(SHIPPED)).get("scores")
    if not isinstance(recorded_scores, dict):
        return _scores(spot_check, "measured now, a sample fixed by hash: the pack has no committed scores")
    return _scores({"settings": None, **recorded_scores}, "committed with the pack, whole")


def _settings(
    recipe: Recipe, minutes: float, model: Model, speed: dict[str, Any], scores: dict[str, Any]
) -> dict[str, Any]:
    stage = recipe.stages[-1]
    mixture = stage.mixture
    return {
        "minutes": minutes,
        "data": recipe.data,
        "draw_per_step": mixture.draw * stage.accumulate,
        "caption_per_step": mixture.caption * stage.accumulate,
        "ratio_draw_to_caption": round(mixture.draw / mixture.caption, 4) if mixture.caption else None,
        "picture_size": model.image.sizes[0],
        "speed_of_drawing": {"batch": speed["batch"], "steps": speed["steps"]},
        "sampling_steps": scores["settings"].get("steps"),
        "guidance": scores["settings"].get("guidance"),
        "recipe": checkpoint.to_json(recipe),
    }


def _real_pictures(source: Source, names: Sequence[str], size: int) -> list[PILImage.Image]:
    indices = {example.captions[0]: i for i, example in reversed(list(enumerate(source.examples)))}
    return [source.picture(indices[name], size) for name in names]


def _concepts(
    recorder: RecordingModel, shipped_recorder: RecordingModel | None, source: Source, size: int, seed: int
) -> list[report.Concept]:
    """Every training picture with the drawings and answers; the ones shown in full first."""
    examples = source.examples
    indices = range(len(examples))
    names = [example.captions[0] for example in examples]
    real = [source.picture(i, size) for i in indices]
    drawings = [recorder.drawings[names[i], seed + i] for i in indices]
    gallery, drawn_images = (recorder.image.from_pil(pictures, size) for pictures in (real, drawings))
    ranks = retrieval.first_hit(drawn_images, gallery, torch.tensor(indices), [e.group for e in examples]).tolist()
    accepted = captions.accepted(examples)
    shipped_accepted = captions.accepted(examples, _shipped_examples(shipped_recorder))
    concepts = []
    for i in indices:
        image_bytes, prompt_seed = real[i].tobytes(), (names[i], seed + i)
        concept = report.Concept(
            name=names[i],
            real=real[i],
            drawn=drawings[i],
            rank=int(ranks[i]),
            answer=_answer(recorder.answers[image_bytes], accepted[i]),
        )
        if shipped_recorder is not None and prompt_seed in shipped_recorder.drawings:
            shipped_caption = shipped_recorder.answers[_shipped_view(shipped_recorder, source, i).tobytes()]
            concept = replace(
                concept,
                shipped=shipped_recorder.drawings[prompt_seed],
                shipped_answer=_answer(shipped_caption, shipped_accepted[i]),
            )
        concepts.append(concept)
    shown = choose_examples(examples, NUM_SHOWN)
    return [concepts[i] for i in shown] + [concepts[i] for i in indices if i not in shown]


def _shipped_examples(shipped_recorder: RecordingModel | None) -> Sequence[Example]:
    """Pictures whose wordings the shipped pack may use as answers."""
    return open_source(_trained_on()).examples if shipped_recorder is not None else ()


def _shipped_view(shipped_recorder: RecordingModel, source: Source, index: int) -> PILImage.Image:
    return source.picture(index, shipped_recorder.model.image.sizes[0])


def _answer(caption: str, accepted: Sequence[str]) -> report.Answer:
    return report.Answer(text=caption, right=captions.exact_match([caption], [accepted]) == 1)


def _held_out(
    recorder: RecordingModel, shipped_recorder: RecordingModel | None, source: Source, size: int
) -> list[report.HeldOut]:
    """The scored held-out pictures with the answers and the rank of the true name; the shown ones first."""
    held_out = held_split(source)
    if held_out is None or recorder.blind_scores is None:
        return []
    indices = choose_examples(held_out.examples, MAX_HELD)
    examples, pictures = [held_out.examples[i] for i in indices], [held_out.picture(i, size) for i in indices]
    name_scores = torch.stack([recorder.name_scores[p.tobytes()] for p in pictures]).float().cpu()
    hits = naming.hits(examples, recorder.names, held_out.examples)
    ranks = naming.ranks(naming.pointwise(name_scores, recorder.blind_scores.float().cpu()), hits).tolist()
    accepted = captions.accepted(examples, held_out.examples)
    items = []
    for position, (i, example, picture) in enumerate(zip(indices, examples, pictures, strict=True)):
        item = report.HeldOut(
            name=example.captions[0],
            picture=picture,
            answer=_answer(recorder.answers[picture.tobytes()], accepted[position]),
            rank=ranks[position],
        )
        view = _shipped_view(shipped_recorder, held_out, i).tobytes() if shipped_recorder is not None else b""
        if shipped_recorder is not None and view in shipped_recorder.answers:
            item = replace(item, shipped_answer=_answer(shipped_recorder.answers[view], accepted[position]))
        items.append(item)
    shown = choose_examples(held_out.examples, NUM_SHOWN)
    positions = sorted(range(len(indices)), key=lambda position: indices[position] not in shown)
    return [items[position] for position in positions]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
