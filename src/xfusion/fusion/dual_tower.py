"""X-Fusion's dual tower (arXiv 2504.20996, section 3.2): a frozen text tower and a trainable copy of it for media.

Both towers apply to the same mixed sequence and each position keeps the output of the tower that owns it:

    H_txt = F_txt(E)    H_img = F_img(E)    h_i = H_txt[i] if i is text else H_img[i]

Only kept outputs are computed on the fast path: a tower makes queries and MLP for its own positions, keys and values for
all of them (the text tower from media states by the frozen W_K, W_V; the media tower from text states by its own).
The towers may be asymmetric: with ``stride`` k a media block stands at every k-th layer and media states pass the others
unchanged, while the frozen tower still makes keys and values from them at every layer. With ``rank`` a media block is the
frozen one with low-rank deltas (Hu et al., arXiv 2106.09685), so that the memory holds one language model.

With ``width`` W the media blocks are of another width than the base's D, as a pretrained image model's are (section 5 of
the paper joins Llama-3.1-8B and a diffusion transformer). Media states stay D wide between layers, so the frozen tower
still reads them at every layer, and a block stands between two projections as a residual (`xfusion.layers.Projected`):

    F_img(x) = x + P_out (G(P_in x) - P_in x)          x: all rows, words too; G a block of width W

G is fresh, and P_out P_in starts as a tenth of the scale of the base's embeddings, so F_img starts near the identity.

This is our reading. The paper says that different widths need "linear projections inside X-Fuse" and no more; it leaves
open whether media states stay W wide between layers and meet the frozen tower through a projection, whether P_out brings
back the block's whole output instead of its change, and whether projections are shared by layers. With `fuse` mixing
happens at width D, behind P_out, and ``fuse_projection`` is one more matrix there.

With ``start`` blocks of width W take over what fits of a pretrained diffusion transformer (`xfusion.fusion.pretrained`).

X-Fuse (section 3.2) also computes the other tower's queries and mixes, per position:

    h_i = alpha h_i^own + beta P(h_i^other)

with alpha = 1, beta = 0 at the start, one pair per layer and side; P is a linear projection (``X-Fuse-proj``) or nothing.
With ``fuse_by="token"``, which no paper has, the share is a learned function of the position's own state:
``h_i = h_i^own + tanh(w . norm(x_i) + b) P(h_i^other - h_i^own)``, again starting as the plain dual tower. Words are mixed
only from the first media token on.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``S`` all rows of a pass, ``D`` model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.fusion import pretrained
from xfusion.fusion.base import Call, Fusion, Pass, of_paths
from xfusion.layers import Delta, Projected, linear_paths, linear_shape, narrow_mlp


class LowRank(Delta):
    """``W x + B A x``: a frozen matrix with a trainable delta of low rank, zero at the start."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[..., inputs]`` -> ``[..., outputs]``."""
        return frozen(x) + functional.linear(functional.linear(x, self.down), self.up)


class Mix(nn.Module):
    """X-Fuse of one side at one layer: the own tower's output and the other's, ``[B, n, D]`` each."""

    def __init__(self, width: int, by: Literal["layer", "token"], projected: bool):
        super().__init__()
        self.by = by
        if by == "layer":
            self.alpha, self.beta = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        else:
            self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(()))
        self.projection = nn.Linear(width, width, bias=False) if projected else None
        if self.projection is not None:
            nn.init.eye_(self.projection.weight)

    def gate(self, x: Tensor) -> Tensor:
        """Share of the other tower, ``[B, n, 1]`` for input states ``x``."""
        x = functional.rms_norm(x.to(self.weight.dtype), x.shape[-1:])
        return torch.tanh((x * self.weight).sum(-1, keepdim=True) + self.bias)

    def forward(self, x: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """The mixed states; ``x`` are the layer's input states of the same rows."""
        projected = (lambda h: h) if self.projection is None else self.projection
        if self.by == "layer":
            return (self.alpha * own + self.beta * projected(other)).to(own.dtype)
        return own + (self.gate(x) * projected(other - own)).to(own.dtype)


class DualTower(Fusion):
    """Frozen text tower, trainable media tower; text is bit-identical whatever the media tower holds."""

    preserves_text = True
    prefix_is_constant = True
    media_blocks = True
    num_towers = 2

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Shape of the media tower, and whether the towers' outputs are mixed."""

        mlp: int | None = None
        """Width of the media blocks' MLP: the first rows of gate and up, the first columns of down. None keeps all. Blocks
        of a `width` have an MLP of this width; None takes the base's in proportion.
        """
        width: int | None = None
        """Model width of the media blocks, a multiple of the base's head width; they are then fresh, between projections.
        None copies the base's blocks.
        """
        start: str | None = None
        """Folder or hub id of a diffusers transformer, or of a pipeline with one, that fresh blocks of its width take what
        fits from; every head then has keys of its own. Read only where no pack brings the weights.
        """
        start_revision: str | None = None
        """Hub revision of it (a commit for exact reproduction)."""
        rank: int | None = None
        """Media blocks are the frozen ones with deltas of this rank on every matrix; None copies the blocks."""
        fuse: Literal["image", "text", "both"] | None = None
        """X-Fuse: whose positions also take the other tower's output."""
        fuse_by: Literal["layer", "token"] = "layer"
        """Learn one pair of shares per layer and side, or a share for each position from its state."""
        fuse_projection: bool = False
        """X-Fuse-proj: the other tower's output passes a linear projection, the identity at the start."""

        def build(self) -> DualTower:
            """The fusion, not yet installed."""
            if self.rank is not None and (self.rank < 1 or self.mlp is not None):
                raise XFusionError(
                    f"dual tower: rank {self.rank} with mlp {self.mlp}: a low-rank tower has a rank of at least 1 and"
                    " keeps the frozen MLP, leave mlp at None"
                )
            if self.rank is not None and self.width is not None:
                raise XFusionError(
                    f"dual tower: rank {self.rank} with width {self.width}: deltas stand on the base's own matrices, name"
                    " one of the two"
                )
            if self.start is not None and self.width is None:
                raise XFusionError(
                    f"dual tower: start {self.start!r} without width: blocks that are not the base's copies need the"
                    " width of the source's"
                )
            if self.fuse not in (None, "image", "text", "both") or self.fuse_by not in ("layer", "token"):
                raise XFusionError(
                    f"dual tower: fuse {self.fuse!r}, fuse_by {self.fuse_by!r}: fuse is one of image, text, both or None,"
                    " fuse_by one of layer, token"
                )
            if self.fuse is None and (self.fuse_by != "layer" or self.fuse_projection):
                raise XFusionError(
                    f"dual tower: fuse_by {self.fuse_by!r}, fuse_projection {self.fuse_projection}, but nothing is mixed:"
                    " name whose positions are, with fuse"
                )
            return DualTower(self)

        def sizes(self, num_layers: int) -> Iterator[DualTower.Config]:
            """By rank, or by the width of the MLP."""
            del num_layers
            steps = range(1, 1025) if self.rank is not None else range(16, 65537, 16)
            for step in steps:
                yield replace(self, rank=step) if self.rank is not None else replace(self, mlp=step)

    def install(self, backbone: Backbone) -> None:
        """Copy the frozen blocks at the tower's layers, make fresh ones of another width, or lay deltas beside them."""
        self._scale = 0.1 * backbone.embedding_scale if self.config.width else 1.0
        super().install(backbone)
        fuse, config = self.config.fuse, self.config
        sides = {None: (), "image": ("media",), "text": ("text",), "both": ("text", "media")}[fuse]
        self.mixes = nn.ModuleDict(
            {
                f"{side}_{index}": Mix(backbone.hidden_size, config.fuse_by, config.fuse_projection)
                for side in sides
                for index in self.state_layers
            }
        )

    @property
    def exports(self) -> tuple[str, ...]:
        """As LoRA where the tower is deltas at every layer, and the towers' outputs are not mixed."""
        whole = len(self.blocks) == len(self.windows)
        return ("peft",) if self.config.rank is not None and self.config.fuse is None and whole else ()

    def make_config(self, backbone: Backbone) -> Any:
        """The base's configuration, in the sizes of the tower where its width is another."""
        if self.config.width is None:
            return backbone.tower_config()
        return backbone.tower_config(self.config.width, self.config.mlp, all_keys=self.config.start is not None)

    def begin(self, backbone: Backbone) -> None:
        """Take over what fits of a pretrained diffusion transformer; `taken` says what that was.

        Raises:
            XFusionError: it cannot be read, or its width or the width of its heads is another.
        """
        if self.config.start is None or backbone.device.type == "meta":
            return
        blocks = pretrained.load(self.config.start, self.config.start_revision)
        pretrained.check(blocks, self.config.start, self.config.width, backbone)
        chosen = pretrained.choose(len(blocks), len(self.blocks))
        taken: dict[int, dict[str, str]] = {}
        blocks_here: dict[str, Any] = dict(self.blocks.items())
        for (index, block), number in zip(blocks_here.items(), chosen, strict=True):
            found = pretrained.take(block.layer, blocks[number])
            taken[int(index)] = {own: f"{number}.{name}" for own, name in found.items()}
        self.taken = taken

    def make(self, index: int, backbone: Backbone) -> nn.Module:
        """A copy of the frozen block, narrowed if asked; a fresh one of another width; or the deltas of a low-rank one."""
        if self.config.width is not None:
            fresh = backbone.fresh_layer(index, self.block_config)
            return Projected(fresh, backbone.hidden_size, self.config.width, self._scale)
        if self.config.rank is not None:
            frozen = backbone.layers[index]
            shapes = {path: linear_shape(frozen.get_submodule(path)) for path in linear_paths(frozen)}
            return of_paths({path: LowRank(*shape, self.config.rank) for path, shape in shapes.items()})
        block = backbone.copy_layer(index, self.block_config)
        if self.config.mlp is not None:
            narrow_mlp(block, backbone.config, self.config.mlp)
        return block

    def mix(self, side: str, index: int) -> Mix | None:
        """The learned mix of a side, ``text`` or ``media``, at a layer; None where its positions keep their tower's."""
        name = f"{side}_{index}"
        return self.mixes[name] if name in self.mixes else None  # type: ignore[return-value]  # noqa: SIM401

    def media_block(self, index: int, frozen: nn.Module) -> Any:
        """The tower's.

        Raises:
            XFusionError: the towers are mixed, so that words meet the tower.
        """
        return super().media_block(index, frozen) if self.config.fuse is not None else self.block(index, frozen)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Fast path: kept outputs only, each tower's keys and values for all rows (X-Fusion, section 3.2)."""
        block, media = self.block(index, frozen), set(run.states) - {"text"}
        on_text, on_media = (self.mix(side, index) for side in ("text", "media"))
        by_text = self.tower(0, index, frozen, run.states if on_media else {"text"}, call, run)
        new = run.states | {o: h for o, h in by_text.items() if o == "text"}
        if block is None:
            return new
        # Mixing acts on words only behind a picture: where none is read, the other tower has nothing to add.
        mixes_text = on_text is not None and "text" in run.states and run.mixes("text")
        by_media = self.tower(1, index, block, run.states if mixes_text else media, call, run, by_noise=True)
        new |= {o: h for o, h in by_media.items() if o != "text"}
        return self._mixed(index, run, new, by_text, by_media)

    def _mixed(
        self, index: int, run: Pass, new: dict[str, Tensor], by_text: dict[str, Tensor], by_media: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        for owner, x in run.states.items():
            mix = self.mix("text" if owner == "text" else "media", index)
            other = (by_media if owner == "text" else by_text).get(owner)
            if mix is not None and other is not None and (owner != "text" or run.given is None):
                new[owner] = torch.where(run.after_media(owner), mix(x, new[owner], other), new[owner])
        return new

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Reference path: both whole blocks on the whole sequence, then each position keeps its tower's output."""
        block, by_text = self.block(index, frozen), self.whole(index, frozen, call, run)
        by_media = run.states if block is None else self.whole(index, block, call, run, by_noise=True)
        new = {owner: (by_text if owner == "text" else by_media)[owner] for owner in run.states}
        return new if block is None else self._mixed(index, run, new, by_text, by_media)
