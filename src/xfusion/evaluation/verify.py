"""`verify`: the proof that a model's text is its base's, bit for bit.

Four computations of the same text are compared: the base freshly loaded by transformers alone, the model's text path, and
the fused stack forced on, before and after every new weight is replaced by noise. Logits and greedy tokens must be
bit-equal. Text before a picture is computed in other tensor shapes, where rounding differs, so it is checked with a tolerance.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text
from xfusion.evaluation.run import Progress, silent
from xfusion.model import Model

NEW_TOKENS = 16
"""Greedy tokens after each prompt."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit before a picture, relative to the largest logit, by precision of the base."""
NOISE = 0.1
"""Standard deviation of the noise that replaces every new weight."""

STORY = (
    "Long before the sun came over the hill, the keeper of the lighthouse had swept the stairs, oiled the great lamp and"
    " written the first line of the day in a heavy book. The wind had turned in the night, she wrote, and two boats that"
    " were out for herring had come home early with torn sails. Nobody was hurt. At seven the baker's boy rowed across"
    " with bread, a bag of apples and a letter from her sister, who lived in the city and could not understand how anyone"
    " could be content with so much water and so little company. She read the letter twice, laughed at the end of it, and"
    " put it under the clock. In the afternoon the fog came in, slowly at first and then all at once, so that the rocks"
    " below the tower were gone before the gulls had stopped complaining about it. She lit the lamp, counted to nine"
    " between each turn of the light, as her father had taught her, and listened. Somewhere in the white a bell answered:"
    " three strokes, a pause, and three again. That was the mail ship, and she was far too close. The keeper took the"
    " horn from its hook, went out on the gallery and blew until her ears rang. After a while the bell grew fainter,"
    " turned, and went slowly round the point towards the open sea. Then she went inside, made tea, and wrote the second"
    " line of the day: fog from four o'clock, one ship, all well."
)
"""Written for this check and free for any use; the long prompt, and the text for the perplexity."""

PROMPTS = (
    ("one token", "The"),
    ("English", "The capital of France is"),
    ("German", "Der schnelle braune Fuchs springt über den faulen Hund, und am Abend schläft er unter der Brücke."),
    ("Russian", "Однажды в студёную зимнюю пору я из лесу вышел; был сильный мороз."),
    ("Chinese", "床前明月光，疑是地上霜。举头望明月，低头思故乡。"),
    ("Arabic", "العلم نور والجهل ظلام، ومن جد وجد ومن زرع حصد."),
    ("code", "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return"),
    ("numbers and signs", "3.14159 * 2 = 6.28318; x² + y² = z² \U0001f600 → \t\"quoted\" <tag/> {'key': [1, 2]}"),
    ("long", STORY),
)
"""The prompts, in several languages and lengths. A chat turn and a left-padded batch are added."""
QUESTION = "Name three things that one can see in the sky."
"""The chat turn, in the tokenizer's own template."""
PADDED = ("English", "Russian", "code")
"""The prompts that are also run as one left-padded batch."""
BEFORE_A_PICTURE = ("English", "Russian", "code")
"""The prompts that are also run before a picture."""


@dataclass(frozen=True)
class Prompt:
    """Token ids ``[B, n]`` and, for a padded batch, their mask."""

    name: str
    ids: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """Output of one stack for a prompt."""

    logits: Tensor
    tokens: Tensor


@torch.no_grad()
def verify(model: Model, progress: Progress | None = None) -> dict[str, Any]:
    """Prove, or disprove, that the text of a model is its base's.

    Args:
        model: any model; its weights are as before when this returns.
        progress: called with the progress of each part.

    Returns:
        JSON values: ``text_identical`` (every bit-exact check passed), ``passed`` (those with a tolerance too), ``checks``
        (each with ``name``, ``passed``, ``detail``), ``perplexity`` of base and fused stack, and under ``settings``
        everything that the equality depends on.

    Raises:
        XFusionError: the base's source no longer exists.
    """
    started, backbone = time.perf_counter(), model.backbone
    prompts, report = _prompts(model), progress or silent
    report("loading the base afresh", 0, 1)
    fresh = backbone.fresh()
    report("loading the base afresh", 1, 1)
    report("base weights", 0, 1)
    exact_checks = [_base_weights(model, fresh)]
    report("base weights", 1, 1)
    expected = _read("base alone", model, fresh, prompts, report)
    perplexity = {"base": _perplexity(model, fresh)}
    del fresh
    readings = _read("text path", model, model.text_only(), prompts, report, "base")
    exact_checks += _compare("text path", prompts, expected, readings)
    readings = _read("fused stack", model, model.fused_text_model(), prompts, report, "fused")
    exact_checks += _compare("fused stack", prompts, expected, readings)
    perplexity["fused"] = _perplexity(model, model.fused_text_model())
    tolerance_checks = [_before_a_picture("text before a picture", model, prompts, expected, report)]
    if model.regime == "LoRA":
        name = "fused stack, adapters off"
        with model.fusion.unadapted():
            unadapted = _read(name, model, model.fused_text_model(), prompts, report, "fused")
        exact_checks += _compare(name, prompts, expected, unadapted)
    fingerprint = model.fingerprint
    with randomised(model):
        name = "fused stack, new weights randomised"
        readings = _read(name, model, model.fused_text_model(), prompts, report, "fused")
        exact_checks += _compare(name, prompts, expected, readings)
        name = "text before a picture, new weights randomised"
        tolerance_checks.append(_before_a_picture(name, model, prompts, expected, report))
    exact_checks.append(
        _check("new weights restored", model.fingerprint == fingerprint, f"fingerprint {fingerprint[:16]}")
    )
    detail = "{base:.6f} (base), {fused:.6f} (fused), over {n} tokens".format(
        **perplexity, n=_longest(prompts).shape[1]
    )
    exact_checks.append(_check("perplexity", perplexity["base"] == perplexity["fused"], detail))
    identical = all(check["passed"] for check in exact_checks)
    return {
        "text_identical": identical,
        "passed": identical and all(check["passed"] for check in tolerance_checks),
        "preserves_text": model.fusion.preserves_text,
        "regime": model.regime,
        "checks": exact_checks + tolerance_checks,
        "perplexity": perplexity,
        "settings": _settings(model, prompts) | {"seconds": round(time.perf_counter() - started, 2)},
    }


@torch.no_grad()
def text_keeping(model: Model) -> dict[str, float | bool]:
    """Whether the base's text is preserved: the bundled prompts through the base and through the fused stack.

    Returns:
        ``text_bit_equal``, ``text_perplexity_base``, ``text_perplexity_fused`` and ``text_perplexity_change`` (fused minus
        base; per token, over all texts of two or more tokens).
    """
    equal, num_tokens, losses = True, 0, {"base": 0.0, "fused": 0.0}
    for _, text in PROMPTS:
        ids = torch.tensor([model.backbone.encode(text)[: model.backbone.context_length]], device=model.backbone.device)
        if not ids.numel():
            continue
        logits = {stack: model.text_logits(ids, stack=stack) for stack in losses}
        equal = equal and bit_equal(logits["base"], logits["fused"])
        num_tokens += ids.shape[1] - 1
        for stack, stack_logits in logits.items():
            nats = cross_entropy(_in_float64(stack_logits[0, :-1]), ids[0, 1:].cpu(), reduction="sum")
            losses[stack] += float(nats)
    base, fused = (math.exp(min(losses[stack] / max(num_tokens, 1), 700.0)) for stack in ("base", "fused"))
    return {
        "text_bit_equal": equal,
        "text_perplexity_base": base,
        "text_perplexity_fused": fused,
        "text_perplexity_change": fused - base,
    }


@contextmanager
def randomised(model: Model, seed: int = 0) -> Iterator[None]:
    """Replace every learned weight by noise inside the block, and restore it bit-identically afterwards."""
    state = {name: value for name, value in model.learned_state().items() if value.is_floating_point()}
    saved = {name: value.detach().clone() for name, value in state.items()}
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for value in state.values():
                value.copy_(NOISE * torch.randn(value.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(saved[name])


# ------------------------------------------------------------------------------------------------------------ prompts


def _prompts(model: Model) -> list[Prompt]:
    """The bundled prompts as this base's tokens, without those for which its tokenizer has no tokens."""
    backbone, device = model.backbone, model.backbone.device
    longest = backbone.context_length or 1 << 20
    ids = {name: backbone.encode(text)[: longest - NEW_TOKENS] for name, text in PROMPTS}
    ids["one token"] = ids["one token"][:1]
    ids["chat"] = backbone.chat(QUESTION)[: longest - NEW_TOKENS]
    prompts = [Prompt(name, torch.tensor([tokens], device=device)) for name, tokens in ids.items() if tokens]
    batch_ids = [ids[name] for name in PADDED if ids[name]]
    width = max(map(len, batch_ids), default=0)
    if len({len(tokens) for tokens in batch_ids}) > 1:
        pad_id = _pad_id(model)
        rows = [[pad_id] * (width - len(tokens)) + list(tokens) for tokens in batch_ids]
        mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in batch_ids]
        prompts.append(
            Prompt("left-padded batch", torch.tensor(rows, device=device), torch.tensor(mask, device=device))
        )
    return prompts


def _pad_id(model: Model) -> int:
    pad_id = model.backbone.tokenizer.pad_token_id
    return pad_id if pad_id is not None else next(iter(model.backbone.end_ids), 0)


def _longest(prompts: list[Prompt]) -> Tensor:
    return max((p.ids for p in prompts), key=lambda ids: ids.shape[1])


# ----------------------------------------------------------------------------------------------------------- readings


def _read(
    part: str, model: Model, stack: Any, prompts: list[Prompt], report: Progress, path: str | None = None
) -> list[Reading]:
    """Logits and greedy tokens of all prompts.

    Args:
        part: name for the progress.
        model: the model of the prompts.
        stack: the model that generates.
        prompts: the prompts.
        report: the progress callback.
        path: the stack of ``model.text_logits`` that computes the logits; None uses ``stack`` itself.
    """
    readings = []
    for done, prompt in enumerate(prompts):
        report(part, done, len(prompts))
        if path is None:
            logits = stack(prompt.ids, attention_mask=prompt.mask).logits
        else:
            logits = model.text_logits(prompt.ids, stack=path, attention_mask=prompt.mask)
        tokens = stack.generate(
            prompt.ids,
            attention_mask=torch.ones_like(prompt.ids) if prompt.mask is None else prompt.mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=_pad_id(model),
        )
        readings.append(Reading(logits, tokens[:, prompt.ids.shape[1] :]))
    report(part, len(prompts), len(prompts))
    return readings


def _perplexity(model: Model, stack: Any) -> float:
    """Perplexity of the story, per token, in float32 from the stack's logits."""
    ids = torch.tensor([model.backbone.encode(STORY)], device=model.backbone.device)
    ids = ids[:, : model.backbone.context_length]
    logits = stack(ids).logits.float()[0, :-1]
    return math.exp(cross_entropy(logits, ids[0, 1:]).item())


def _in_float64(logits: Tensor) -> Tensor:
    """Logits in float64 on the CPU: Apple's GPUs have none."""
    return logits.cpu().double()


def bit_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape, type and bits; unlike `torch.equal`, NaN equals itself and -0 is not 0."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (first, second)))


# ------------------------------------------------------------------------------------------------------------- checks


def _check(name: str, passed: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "passed": bool(passed), "detail": detail}


def _base_weights(model: Model, fresh: Any) -> dict[str, Any]:
    """Compare the weights in memory with those recorded when the model was built, and those that transformers loads."""
    recorded, computed = model.backbone.fingerprint, model.backbone.compute_fingerprint()
    source_weights = dict(fresh.named_parameters())
    changed = [
        n
        for n, p in model.backbone.model.named_parameters()
        if n not in source_weights or not bit_equal(p, source_weights[n])
    ]
    if changed:
        return _check(
            "base weights", False, f"{len(changed)} of {len(source_weights)} differ from the source, first {changed[0]}"
        )
    if computed != recorded:
        return _check("base weights", False, f"fingerprint {computed[:16]}, recorded {recorded[:16]}")
    return _check(
        "base weights", True, f"{len(source_weights)} tensors as in the source; fingerprint {computed[:16]} as recorded"
    )


def _compare(
    part: str, prompts: list[Prompt], expected: list[Reading], readings: list[Reading]
) -> list[dict[str, Any]]:
    logits, tokens = [], []
    for prompt, base_reading, reading in zip(prompts, expected, readings, strict=True):
        if not bit_equal(base_reading.logits, reading.logits):
            logits.append(f"{prompt.name} by {_largest_difference(base_reading.logits, reading.logits):.3g}")
        if not bit_equal(base_reading.tokens, reading.tokens):
            tokens.append(prompt.name)
    positions, num_tokens = sum(p.ids.numel() for p in prompts), sum(r.tokens.numel() for r in expected)
    return [
        _check(
            f"{part}: logits",
            not logits,
            f"differ for {', '.join(logits)}"
            if logits
            else f"bit-equal at {positions} positions of {len(prompts)} prompts",
        ),
        _check(
            f"{part}: greedy tokens",
            not tokens,
            f"differ for {', '.join(tokens)}" if tokens else f"all {num_tokens} equal behind {len(prompts)} prompts",
        ),
    ]


def _largest_difference(first: Tensor, second: Tensor) -> float:
    return float((_in_float64(first) - _in_float64(second)).abs().max()) if first.shape == second.shape else math.inf


def _before_a_picture(
    name: str, model: Model, prompts: list[Prompt], expected: list[Reading], report: Progress
) -> dict[str, Any]:
    """Compare logits of text before a picture and more text with the base's logits for the text alone."""
    tolerance = TOLERANCE[model.backbone.dtype]
    media, generator = model.modality, torch.Generator().manual_seed(0)
    grid = media.grid(media.sizes[0])
    # From 0 to 1, so that rounding also gives valid codes.
    picture = media.segment(torch.rand(grid[0] * grid[1], media.token_width, generator=generator), grid)
    following_text = Text(ids=model.backbone.encode("What is this?\n"))
    dtype = next(model.port.parameters()).dtype
    worst, changed = 0.0, []
    pairs = [pair for pair in zip(prompts, expected, strict=True) if pair[0].name in BEFORE_A_PICTURE]
    with model.using(model.plain_engine()):
        for done, (prompt, base) in enumerate(pairs):
            report(name, done, len(pairs))
            words = tuple(prompt.ids[0].tolist())
            batch = pack([[Sequence(segments=(Text(ids=words), picture, following_text))]]).to(model.device)
            rows = batch.media[media.name]
            batch = batch.with_media(media.name, tokens=rows.tokens.to(dtype), time=rows.time.to(dtype))
            hidden, run = model.run_pass(batch)
            logits = _in_float64(model.backbone.logits(hidden[:, run.slices["text"]][:, : len(words)]))
            base_logits = _in_float64(base.logits)
            scale = float(base_logits.abs().max())
            worst = max(worst, float((logits - base_logits).abs().max()) / scale)
            top = base_logits.topk(2, dim=-1).values
            clear = top[..., 0] - top[..., 1] > 2 * tolerance * scale  # closer ones may swap by rounding alone
            if not torch.equal(logits.argmax(-1)[clear], base_logits.argmax(-1)[clear]):
                changed.append(prompt.name)
    report(name, len(pairs), len(pairs))
    detail = f"largest difference {worst:.2g} of the largest logit, {tolerance:g} allowed"
    if changed:
        detail += f"; another likeliest token for {', '.join(changed)}"
    return _check(name, worst <= tolerance and not changed, detail)


def _settings(model: Model, prompts: list[Prompt]) -> dict[str, Any]:
    backbone = model.backbone
    return {
        "base": backbone.identity,
        "pack_fingerprint": model.fingerprint,
        "fusion": type(model.fusion).__name__,
        "num_new_parameters": model.num_new_parameters,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "attention": backbone.attention,
        "threads": torch.get_num_threads(),
        "new_tokens": NEW_TOKENS,
        "prompts": [{"name": p.name, "shape": list(p.ids.shape)} for p in prompts],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
    }
