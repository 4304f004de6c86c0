"""LoRA on the base's own layers, combined with any mechanism (Hu et al., arXiv 2106.09685), using peft's layers.

    h = W x + (alpha / r) B A x    with B = 0 at the start, W frozen

The inner mechanism gets layers whose matrices have deltas and treats them like frozen ones. Text passes through the deltas
too, so training changes text-only output: such a model has the regime ``LoRA`` and is never ranked against strictly frozen
ones. The base's weights are not modified, and `Lora.unadapted` computes without the deltas.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width, ``r`` rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.fusion.base import REGIMES, Call, Fusion, Pass, module_from_parts
from xfusion.fusion.prefix import Prefix
from xfusion.layers import Delta, linear_paths, matrix_pieces, shadow


class Adapter(Delta):
    """A peft layer without its base matrix; `bind` adds one."""

    def __init__(self, matrix: nn.Module, rank: int, alpha: float):
        super().__init__()
        try:
            from peft import LoraConfig
            from peft.tuners.lora import Linear
        except ImportError as error:
            raise XFusionError("LoRA on the base's layers needs peft: pip install 'xfusion[lora]'") from error
        config = LoraConfig(r=rank, lora_alpha=alpha)  # type: ignore[arg-type]  # peft takes fractions too
        is_conv = not isinstance(matrix, nn.Linear)
        self.layer = Linear(matrix, "default", config=config, r=rank, lora_alpha=alpha, is_target_conv_1d_layer=is_conv)  # type: ignore[arg-type]
        del self.layer._modules["base_layer"]  # the frozen matrix is not ours: not stored in packs and never trained
        self.layer.float().requires_grad_(True)

    def bind(self, frozen: nn.Module) -> nn.Module:
        """peft's layer around a frozen matrix, which it does not own."""
        layer = shadow(self.layer)
        layer._modules["base_layer"] = frozen
        return layer


class Lora(Fusion):
    """Another mechanism on top of layers with low-rank deltas."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """The inner mechanism and the deltas; ``stride``, ``offset`` and ``layers`` choose the layers with deltas."""

        inner: Fusion.Config = field(default_factory=Prefix.Config)
        """The inner mechanism."""
        rank: int = 8
        """Rank r of the deltas."""
        alpha: float = 16.0
        """Deltas are multiplied by ``alpha / r``."""
        targets: tuple[str, ...] | None = ("query", "value")
        """Matrices with a delta: some of query, key, value, output, in and out (of the MLP); None means all of a layer.
        If the family fuses several in one matrix, the delta covers the whole matrix."""

        def sizes(self, num_layers: int) -> Iterator[Lora.Config]:
            """Sizes by rank."""
            del num_layers
            yield from (replace(self, rank=rank) for rank in range(1, 1025))

        def build(self) -> Lora:
            """The fusion, not yet installed."""
            valid_targets = ("query", "key", "value", "output", "in", "out")
            unknown_targets = [name for name in self.targets or () if name not in valid_targets]
            if unknown_targets or self.targets == ():
                raise XFusionError(
                    f"lora: targets {list(self.targets or ())}: name some of {', '.join(valid_targets)}, or None"
                )
            if self.rank < 1 or not self.alpha > 0:
                raise XFusionError(f"lora: rank {self.rank}, alpha {self.alpha:g}: both must be above 0")
            if isinstance(self.inner, Lora.Config):
                raise XFusionError("lora: the mechanism inside is lora again: give it a larger rank instead")
            return Lora(self)

    def __init__(self, config: Config):
        super().__init__(config)
        self.inner: Any = config.inner.build()
        self.num_towers, self.joins_attention = self.inner.num_towers, self.inner.joins_attention
        self.reads_ahead = self.inner.reads_ahead
        self.deltas_active = True

    @property
    def regime(self) -> str:
        """LoRA, or the regime of the inner mechanism if that trains more of the base."""
        return max("LoRA", self.inner.regime, key=REGIMES.index)

    @property
    def exports(self) -> tuple[str, ...]:
        """The inner mechanism's exports that accept merged deltas."""
        return tuple(name for name in self.inner.exports if name == "transformers")

    def install(self, backbone: Backbone) -> None:
        """Install the inner mechanism, and deltas at every placed layer that uses the base's own matrices.

        Raises:
            XFusionError: there is no such layer.
        """
        self.inner.install(backbone)
        super().install(backbone)
        for index in [name for name in self.blocks if not self.inner.keeps(int(name))]:
            del self.blocks[index]
        if not len(self.blocks):
            raise XFusionError(
                f"lora: {type(self.inner).__name__} trains copies in the place of all these layers, so no matrix of the base"
                " is left to adapt: give it a stride, or leave lora out"
            )

    def begin(self, backbone: Backbone) -> None:
        """Load the weights that the inner mechanism starts from."""
        self.inner.begin(backbone)
        self.taken = self.inner.taken

    def make(self, index: int, backbone: Backbone) -> nn.Module:
        """The deltas of a layer, by path.

        Raises:
            XFusionError: the layer lacks one of the target matrices.
        """
        layer, targets = backbone.layers[index], self.config.targets
        pieces = matrix_pieces(layer)
        missing = [target for target in targets or () if target not in pieces]
        if missing:
            known = ", ".join(sorted(pieces)) or "none"
            raise XFusionError(
                f"lora: {type(layer).__name__} has no matrix of {', '.join(missing)}, only {known}: name some of these, or take"
                " targets None"
            )
        paths = linear_paths(layer) if targets is None else sorted({pieces[target].path for target in targets})
        rank, alpha = self.config.rank, self.config.alpha
        return module_from_parts({path: Adapter(layer.get_submodule(path), rank, alpha) for path in paths})

    def set_attention(self, implementation: str) -> None:
        """Choose the attention implementation of the inner mechanism's blocks."""
        self.inner.set_attention(implementation)

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """Inside the ``with`` block the base's own layers compute, without deltas."""
        previous, self.deltas_active = self.deltas_active, False
        try:
            yield
        finally:
            self.deltas_active = previous

    def keeps(self, index: int) -> bool:
        """Answered by the inner mechanism."""
        return self.inner.keeps(index)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Those of the inner mechanism."""
        return self.inner.state_layers

    def block_widths(self) -> dict[int, int]:
        """Those of the inner mechanism."""
        return self.inner.block_widths()

    def new_modules(self, index: int) -> list[nn.Module]:
        """The deltas of a layer, and the inner mechanism's modules there."""
        return super().new_modules(index) + self.inner.new_modules(index)

    def adapted(self, index: int, frozen: nn.Module) -> nn.Module:
        """A frozen layer with its deltas."""
        block = self.block(index, frozen) if self.deltas_active else None
        return frozen if block is None else block

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The inner mechanism's layer over the adapted one."""
        return self.inner.layer(index, self.adapted(index, frozen), call, run)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The inner mechanism's reference path over the adapted layer."""
        return self.inner.reference_layer(index, self.adapted(index, frozen), call, run)

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """The inner mechanism's text-only layer over the adapted one."""
        return self.inner.text_layer(index, self.adapted(index, frozen), x, call)
