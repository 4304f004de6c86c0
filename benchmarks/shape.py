"""How close to the machine's own matrix rate X-Fusion trains at the shape of a real base, with random weights.

    python benchmarks/shape.py --shape Llama-3.2-1B --batch 32 --device cuda

A full copy of every layer is trained, as in the paper. Drawing: texts, each before a picture to draw. Joint: two thirds of
the samples draw, one third names a clean picture. One JSON object on standard output, and in ``--out``: seconds per step
(median), the FLOPs that a step needs, the rate of a bf16 product of two square matrices, measured in between, and the step's
share of that rate (MFU). FLOPs are counted on an uncompiled step (`count_flops`): those of attention per visible pair,
whatever kernel is measured, and no queries that compilation removes. ``--attention flex_attention`` uses FlexAttention over
block masks, which is for packed rows (``--packed 4``); ``--no-keep-text`` computes frozen states of prompts in every step,
as for captions that never repeat. ``--profile FILE`` writes where the time of a drawing step goes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from xfusion.backbone import Backbone
from xfusion.backbone.attention import choose_attention
from xfusion.data.pack import pack
from xfusion.data.sequence import Batch, Sequence, Text
from xfusion.evaluation.machine import origin
from xfusion.fusion.dual_tower import DualTower
from xfusion.layers import linear_shape
from xfusion.modalities.image import ImageModality
from xfusion.model import Model, ModelConfig, build
from xfusion.storage import write_json
from xfusion.training.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    shape: str = "Llama-3.2-1B"
    """A shape that `xfusion show --backbone` knows."""
    batch: int = 32
    """Samples per step."""
    side: int = 16
    """A picture has side x side tokens."""
    words: int = 64
    """Text positions of a sample."""
    stride: int = 1
    """A media block stands at every stride-th layer."""
    steps: int = 10
    """Measured steps of each kind, behind three of warm-up."""
    device: str = "cuda"
    """Where it runs."""
    compile: bool = True
    """Compile the per-layer work."""
    square: int = 8192
    """Side of the matrices whose product is the yardstick."""
    attention: str | None = None
    """What layers attend by, of `xfusion.backbone.attention.ATTENTIONS`; None is the device's own."""
    packed: int = 1
    """Samples in a row; they do not see each other."""
    keep_text: bool = True
    """Look up frozen states of prompts that were seen before."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where the result goes besides."""
    profile: Path | None = None
    """Where the profile of a drawing step is written."""


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, times: int, warm: int = 3) -> float:
    """Median time of a call."""
    timings = []
    for number in range(warm + times):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        if number >= warm:
            timings.append(time.perf_counter() - start)
    return statistics.median(timings)


def matrix_rate(side: int, device: torch.device) -> float:
    """FLOP/s of a bf16 product of random matrices."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right, device, 10)


class Attention(TorchFunctionMode):
    """Count attention per visible pair of a query and a key, in place of torch's kernel, whose own count depends on which one
    runs: dense products count pairs that block masks skip, and a fused kernel on a CPU counts nothing.

    A pair costs 2 FLOPs per number of a head in the scores and in the output, and in the backward pass the same for each of the
    gradients of weights, queries, keys and values that is needed. A kernel that computes scores again, or all pairs of a block
    of which some are visible, executes more: it gets no credit for that. The result has the kernel's shape and no products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.queries = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call of attention; everything else runs."""
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, **_: Any) -> Tensor:
        assert attn_mask is not None and attn_mask.dtype == torch.bool, "a mixed sequence has a mask"
        rows, heads, count, width = query.shape
        pairs = int(attn_mask.expand(rows, heads, -1, -1).sum())
        learned = [t.requires_grad for t in (query, key, value)] if torch.is_grad_enabled() else [False]
        products = 2 + (any(learned[:2]) + sum(learned) if any(learned) else 0)
        self.flops += 2 * width * pairs * products
        self.queries += rows * count
        other = (key + value).mean(dim=2, keepdim=True)
        return query + other.repeat_interleave(heads // key.shape[1], dim=1)


def count_flops(step: Callable[[], object], layers: list[nn.Module]) -> int:
    """FLOPs of a forward and backward pass that attends by ``sdpa``, uncompiled: its products and attention (`Attention`).

    Queries of rows that only give keys and values are subtracted: the compiled step has none.

    Args:
        step: the pass.
        layers: the layers that may run in it, frozen and new, all of one shape.
    """
    projected = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal projected
        projected += output[..., 0].numel()

    projections = [layer.get_submodule("self_attn.q_proj") for layer in layers]
    hooks = [projection.register_forward_hook(count) for projection in projections]
    try:
        with FlopCounterMode(display=False) as products, Attention() as attention:
            step()
    finally:
        for hook in hooks:
            hook.remove()
    inputs, outputs = linear_shape(projections[0])
    return products.get_total_flops() + attention.flops - 2 * (projected - attention.queries) * inputs * outputs


def batches(model: Model, settings: Settings, *, joint: bool) -> list[Batch]:
    """Random words and pictures."""
    generator, image = torch.Generator().manual_seed(0), model.image
    words = model.backbone.config.vocab_size

    def text(*, has_loss: bool = False) -> Text:
        ids = torch.randint(3, words, (settings.words,), generator=generator).tolist()
        return Text(ids=tuple(ids), has_loss=has_loss)

    def tokens() -> torch.Tensor:
        return torch.randn(settings.side**2, image.token_width, generator=generator)

    grid, num_captions = (settings.side, settings.side), settings.batch // 3 if joint else 0
    draw = [
        Sequence(segments=(text(), image.segment(tokens(), grid, state="noised", has_loss=True)))
        for _ in range(settings.batch - num_captions)
    ]
    caption = [Sequence(segments=(image.segment(tokens(), grid), text(has_loss=True))) for _ in range(num_captions)]
    size, device = settings.packed, model.backbone.device
    return [
        pack([kind[start : start + size] for start in range(0, len(kind), size)]).to(device)
        for kind in (draw, caption)
        if kind
    ]


def main(settings: Settings) -> None:
    """Measure and print."""
    device = torch.device(settings.device)
    backbone = Backbone.of_shape(settings.shape, device)
    image = ImageModality.Config(patch=4, sizes=(4 * settings.side,))
    model = build(ModelConfig(fusion=DualTower.Config(stride=settings.stride), image=image), backbone)
    optimizer = Optimizer(model.named_new_parameters())
    attention, _ = choose_attention(device, settings.attention)
    result: dict[str, object] = {
        **origin("benchmarks"),
        "shape": settings.shape,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "trainable_parameters": model.num_new_parameters,
        "image_tokens": settings.side**2,
        "text_tokens": settings.words,
        "batch": settings.batch,
        "compiled": settings.compile,
        "attention": attention,
        "packed": settings.packed,
        "keep_text": settings.keep_text,
    }
    for kind in ("drawing", "joint"):
        step_batches = batches(model, settings, joint=kind == "joint")

        def learn(engine, step_batches=step_batches, *, update: bool = True) -> None:
            generator = torch.Generator().manual_seed(0)
            with model.using(engine), torch.autocast(device.type, torch.bfloat16):
                for batch in step_batches:
                    losses = model.losses(batch, generator)
                    torch.stack([value / count for value, count in losses.values() if count]).sum().backward()
            if update:
                optimizer.step(1e-5, 1.0, 0.999)

        plain = model.training_engine(torch.bfloat16, "counted", "sdpa", False)
        plain.keep_text = settings.keep_text
        learn(plain, update=False)  # texts that are computed once are computed here
        flops = count_flops(
            lambda learn=learn, plain=plain: learn(plain, update=False),
            [*plain.backbone.layers, *model.fusion.blocks.values()],
        )
        optimizer.forget_gradients()
        engine = model.training_engine(torch.bfloat16, "measured", attention, settings.compile)
        engine.keep_text = settings.keep_text
        engine.text_states.update(plain.text_states)
        start = time.perf_counter()
        learn(engine)
        synchronise(device)
        first_step_seconds = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = seconds(lambda engine=engine, learn=learn: learn(engine), device, settings.steps)
        rate = matrix_rate(settings.square, device)
        result[kind] = {
            "seconds_per_step": round(step, 4),
            "samples_per_second": round(settings.batch / step, 1),
            "first_step_seconds": round(first_step_seconds, 1),
            "flops_per_step": flops,
            "flops_per_second": round(flops / step),
            "matrix_flops_per_second": round(rate),
            "share_of_peak": round(flops / step / rate, 3),
            "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if device.type == "cuda" else None,
        }
        if settings.profile and kind == "drawing":
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(3):
                    learn(engine)
                synchronise(device)
            order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            table = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
            settings.profile.write_text(table + "\n", encoding="utf-8")
        print(json.dumps({kind: result[kind]}), flush=True)
    print(json.dumps(result, indent=2))
    if settings.out:
        write_json(settings.out, result)


if __name__ == "__main__":
    main(tyro.cli(Settings))
