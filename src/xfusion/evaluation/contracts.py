"""Check whether a base satisfies the contracts, by testing a small dual tower on it, as `doctor` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.pack import pack
from xfusion.data.sequence import Batch, Media, Sequence, Text, XFusionError
from xfusion.data.templates import with_begin
from xfusion.evaluation.run import Progress
from xfusion.evaluation.verify import STORY, bit_equal, randomised
from xfusion.fusion.dual_tower import DualTower
from xfusion.generation import draw_tokens
from xfusion.layers import keys_values, slice_call
from xfusion.modalities.image import ImageModality
from xfusion.model import BackboneConfig, Model, ModelConfig

TOLERANCE = 1e-4
"""Largest difference between two paths, relative to the largest value, in float32."""
WORDS = ("a red apple", "The quick brown fox jumps over the lazy dog.", "Зимой и летом одним цветом")
SIDE, PATCH, STEPS = 16, 4, 3


@torch.no_grad()
def check_base(backbone: Backbone, progress: Progress) -> dict[str, Any]:
    """Check the contracts on a base.

    Args:
        backbone: the base; it is not changed.
        progress: called with the name of the current check.

    Returns:
        ``passed`` and ``checks``, each with ``name``, ``passed``, ``detail``. A check that raises counts as failed, with the
        reason. After a layer that cannot be shared, or a tower that cannot be built, no further checks run.
    """
    results: list[dict[str, Any]] = []
    models: list[Model] = []
    float32_model = cache(lambda: _in_float32(models[0]))
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("every layer shares its keys and values", lambda: _check_shared_layers(backbone)),
        ("a small dual tower can be built", lambda: _build_tower(backbone, models)),
        ("text through the fused stack is bit-equal", lambda: _check_text(models[0])),
        ("words before a picture are the base's", lambda: _check_text_before_picture(float32_model())),
        ("the fast path is the reference path", lambda: _check_paths(float32_model())),
        ("drawing with a cache is drawing without", lambda: _check_cache(float32_model())),
    ]
    for done, (name, check) in enumerate(checks):
        progress(name, done, len(checks))
        passed, detail = _attempt(check)
        results.append({"name": name, "passed": passed, "detail": detail})
        if not passed and not models:
            break
    progress("done", len(checks), len(checks))
    return {"passed": all(check["passed"] for check in results), "checks": results}


def _attempt(check: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
    try:
        return check()
    except XFusionError as error:
        return False, str(error)
    except Exception as error:  # an untested model family may fail anywhere; the report names the place
        return False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _check_shared_layers(backbone: Backbone) -> tuple[bool, str]:
    failures: dict[int, str] = {}

    def act(index: int, frozen: nn.Module, x: Tensor, call: dict[str, Any]) -> Tensor:
        try:
            keys_values(frozen, x, slice_call(call, slice(None)))
        except Exception as error:  # a state-space layer expects another kind of cache
            failures[index] = f"{type(frozen).__name__}, {type(error).__name__}"
        return x

    x = backbone.embed(torch.zeros(1, 1, dtype=torch.long, device=backbone.device))
    backbone.drive(backbone.shadow_decoder(act), x, torch.zeros(1, 1, dtype=torch.long, device=backbone.device))
    if not failures:
        return True, f"{backbone.num_layers} layers taken apart: the fast path"
    first_layer = next(iter(failures))
    return (
        False,
        f"{len(failures)} of {backbone.num_layers} have none to share, first layer {first_layer} ({failures[first_layer]})",
    )


def _build_tower(backbone: Backbone, models: list[Model]) -> tuple[bool, str]:
    stride = max(1, backbone.num_layers // 2)
    config = ModelConfig(
        backbone=BackboneConfig(source=backbone.source, revision=backbone.revision),
        image=ImageModality.Config(patch=PATCH, sizes=(SIDE,)),
        fusion=DualTower.Config(stride=stride),
    )
    model = Model(config, backbone).eval()
    models.append(model)
    return (
        True,
        f"blocks at layers {', '.join(map(str, model.fusion.state_layers))}, {model.num_new_parameters:,} weights",
    )


def _check_text(model: Model) -> tuple[bool, str]:
    with randomised(model):
        for words in WORDS:
            ids = torch.tensor([model.backbone.encode(words)], device=model.backbone.device)
            if not bit_equal(model.text_logits(ids), model.text_logits(ids, stack="fused")):
                return False, f"logits differ for {words!r}"
    return True, f"{len(WORDS)} texts, new weights randomised"


def _check_text_before_picture(model: Model) -> tuple[bool, str]:
    ids = model.backbone.encode(STORY)[: (model.backbone.longest or 1 << 20) - 32]
    batch = _packed(model, [Sequence(segments=(Text(ids=ids), _picture(model)))])
    with randomised(model):
        hidden, run = model.run_pass(batch)
        logits = model.backbone.logits(hidden[:, run.slices["text"]])
    passed, detail = _compare(logits, model.text_logits(torch.tensor([ids], device=model.backbone.device)))
    return passed, f"{len(ids)} tokens, {detail}"


def _in_float32(model: Model) -> Model:
    """The same model with float32 weights, so that rounding does not hide differences."""
    base = model.backbone
    if base.dtype == torch.float32:
        return model
    return Model(model.config, base.working_copy(torch.float32, base.attention)).eval()


def _sequences(model: Model) -> list[Sequence]:
    words = [Text(ids=model.backbone.encode(text)) for text in WORDS]
    return [Sequence(segments=(words[0], _picture(model), words[1])), Sequence(segments=(_picture(model), words[2]))]


def _packed(model: Model, sequences: list[Sequence]) -> Batch:
    return pack([[sequence] for sequence in sequences]).to(model.backbone.device)


def _picture(model: Model, *, noised: bool = False) -> Media:
    rows, columns = model.image.grid(SIDE)
    tokens = torch.randn(rows * columns, model.image.token_width, generator=torch.Generator().manual_seed(1))
    return Media(tokens=tokens, grid=(rows, columns), state="noised" if noised else "clean")


def _check_paths(model: Model) -> tuple[bool, str]:
    batch = _packed(model, _sequences(model))
    with randomised(model):
        fast_outputs = _outputs(model, batch)
        with model.using(model.reference_engine()):
            reference_outputs = _outputs(model, batch)
    comparisons = [_compare(fast, reference) for fast, reference in zip(fast_outputs, reference_outputs, strict=True)]
    return all(passed for passed, _ in comparisons), f"words: {comparisons[0][1]}; pictures: {comparisons[1][1]}"


def _outputs(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of all text tokens and predictions of all picture tokens, without padding."""
    hidden, run = model.run_pass(batch)
    logits = model.backbone.logits(hidden[:, run.slices["text"]])
    pictures = model.port.readout(run.states["image"])
    return logits[batch.text.order >= 0], pictures[batch.media["image"].rows.order >= 0]


def _check_cache(model: Model) -> tuple[bool, str]:
    words, size = Text(ids=model.backbone.encode(WORDS[0])), SIDE
    blank = replace(_picture(model, noised=True), tokens=torch.zeros_like(_picture(model).tokens))
    batch = _packed(model, [Sequence(segments=(*with_begin(model.backbone.begin_ids, (words,)), blank))])
    media, device = batch.media["image"], model.backbone.device
    is_token = media.item[0] >= 0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, int(is_token.sum()), model.image.token_width, generator=generator).to(device)

    def predict(x: Tensor, time: float) -> Tensor:
        tokens = media.tokens.clone()
        tokens[:, is_token] = x
        _, run = model.run_pass(batch.with_media("image", tokens=tokens, time=torch.full((1,), time, device=device)))
        return model.port.readout(run.states["image"])[:, is_token].float()

    with randomised(model):
        cached_tokens = draw_tokens(model, [(words,)], size, seeds=[0], steps=STEPS, guidance=1.0)
        *_, (uncached_tokens, _) = model.media_objective.sample(predict, noise, steps=STEPS)
    return _compare(cached_tokens, uncached_tokens)


def _compare(actual: Tensor, expected: Tensor) -> tuple[bool, str]:
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return False, "not all values are finite"
    difference = float((actual - expected).abs().max() / expected.abs().max())
    return difference <= TOLERANCE, f"{difference:.2g} of the largest value apart, {TOLERANCE:g} allowed"
