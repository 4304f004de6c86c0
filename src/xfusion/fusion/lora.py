"""LoRA on the base's own layers beside any mechanism (Hu et al., arXiv 2106.09685), by peft's own layers.

    h = W x + (alpha / r) B A x    with B = 0 at the start, W frozen

The mechanism inside is handed layers whose matrices carry deltas, and does with them what it does with frozen ones. Words go
through the deltas too, so text is another once they are trained: such a model is of the regime ``LoRA`` and never ranked
beside strictly frozen ones. The base's weights are not touched, and `Lora.unadapted` computes without the deltas.

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
from xfusion.fusion.base import REGIMES, Call, Fusion, Pass, of_paths
from xfusion.fusion.prefix import Prefix
from xfusion.layers import Delta, linear_paths, matrix_pieces, shadow


class Adapter(Delta):
    """A peft layer without the matrix that it stands on; `bound` gives it one."""

    def __init__(self, matrix: nn.Module, rank: int, alpha: float):
        super().__init__()
        try:
            from peft import LoraConfig
            from peft.tuners.lora import Linear
        except ImportError as error:
            raise XFusionError("LoRA on the base's layers needs peft: pip install 'xfusion[lora]'") from error
        config = LoraConfig(r=rank, lora_alpha=alpha)  # type: ignore[arg-type]  # peft takes fractions too
        conv = not isinstance(matrix, nn.Linear)
        self.layer = Linear(matrix, "default", config=config, r=rank, lora_alpha=alpha, is_target_conv_1d_layer=conv)  # type: ignore[arg-type]
        del self.layer._modules["base_layer"]  # the frozen matrix is not ours: it is in no pack and never trained
        self.layer.float().requires_grad_(True)

    def bound(self, frozen: nn.Module) -> nn.Module:
        """peft's layer on a frozen matrix, which it does not own."""
        out = shadow(self.layer)
        out._modules["base_layer"] = frozen
        return out


class Lora(Fusion):
    """Another mechanism over layers with low-rank deltas."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Which mechanism, and the deltas; ``stride``, ``offset`` and ``layers`` say which layers carry some."""

        inner: Fusion.Config = field(default_factory=Prefix.Config)
        """The mechanism."""
        rank: int = 8
        """r."""
        alpha: float = 16.0
        """Deltas are multiplied by ``alpha / r``."""
        targets: tuple[str, ...] | None = ("query", "value")
        """Matrices that carry a delta, of query, key, value, output, in and out (of the MLP); None takes all of a layer.
        Where the family holds several in one matrix, the whole of it does."""

        def sizes(self, num_layers: int) -> Iterator[Lora.Config]:
            """By rank."""
            del num_layers
            yield from (replace(self, rank=rank) for rank in range(1, 1025))

        def build(self) -> Lora:
            """The fusion, not yet installed."""
            known = ("query", "key", "value", "output", "in", "out")
            unknown = [name for name in self.targets or () if name not in known]
            if unknown or self.targets == ():
                raise XFusionError(
                    f"lora: targets {list(self.targets or ())}: name some of {', '.join(known)}, or None"
                )
            if self.rank < 1 or not self.alpha > 0:
                raise XFusionError(f"lora: rank {self.rank}, alpha {self.alpha:g}: both must be above 0")
            if isinstance(self.inner, Lora.Config):
                raise XFusionError("lora: the mechanism inside is lora again: give it a larger rank instead")
            return Lora(self)

    def __init__(self, config: Config):
        super().__init__(config)
        self.inner: Any = config.inner.build()
        self.num_towers = self.inner.num_towers
        self.adapts = True

    @property
    def regime(self) -> str:
        """LoRA; that of the mechanism where it trains more of the base."""
        return max("LoRA", self.inner.regime, key=REGIMES.index)

    @property
    def exports(self) -> tuple[str, ...]:
        """Where the mechanism goes with merged deltas."""
        return tuple(name for name in self.inner.exports if name == "transformers")

    def install(self, backbone: Backbone) -> None:
        """The mechanism, and deltas at every placed layer in which the base's own matrices compute.

        Raises:
            XFusionError: there is none.
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
        """The mechanism reads what it starts from."""
        self.inner.begin(backbone)
        self.taken = self.inner.taken

    def make(self, index: int, backbone: Backbone) -> nn.Module:
        """The deltas of a layer, by path.

        Raises:
            XFusionError: it has none of the matrices.
        """
        layer, targets = backbone.layers[index], self.config.targets
        found = matrix_pieces(layer)
        paths = linear_paths(layer) if targets is None else sorted({found[t].path for t in targets if t in found})
        if not paths:
            raise XFusionError(
                f"lora: {type(layer).__name__} has no matrix of {', '.join(targets or ())}: take targets None"
            )
        rank, alpha = self.config.rank, self.config.alpha
        return of_paths({path: Adapter(layer.get_submodule(path), rank, alpha) for path in paths})

    def set_attention(self, implementation: str) -> None:
        """Choose the attention implementation of the mechanism's blocks."""
        self.inner.set_attention(implementation)

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """The base's own layers inside the block."""
        before, self.adapts = self.adapts, False
        try:
            yield
        finally:
            self.adapts = before

    def keeps(self, index: int) -> bool:
        """As the mechanism inside."""
        return self.inner.keeps(index)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The mechanism's."""
        return self.inner.state_layers

    def block_widths(self) -> dict[int, int]:
        """The mechanism's."""
        return self.inner.block_widths()

    def new_modules(self, index: int) -> list[nn.Module]:
        """The deltas of a layer, and what the mechanism has there."""
        return super().new_modules(index) + self.inner.new_modules(index)

    def adapted(self, index: int, frozen: nn.Module) -> nn.Module:
        """A frozen layer with its deltas."""
        block = self.block(index, frozen) if self.adapts else None
        return frozen if block is None else block

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The mechanism's layer on the adapted one."""
        return self.inner.layer(index, self.adapted(index, frozen), call, run)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The mechanism's reference path on the adapted layer."""
        return self.inner.reference_layer(index, self.adapted(index, frozen), call, run)

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """The mechanism's text-only layer on the adapted one."""
        return self.inner.text_layer(index, self.adapted(index, frozen), x, call)
