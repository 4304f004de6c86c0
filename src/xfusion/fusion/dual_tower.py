"""X-Fusion's dual tower (arXiv 2504.20996, section 3.2): a frozen text tower and a trainable copy of it for media.

Both towers process the same mixed sequence, and each position keeps the output of the tower that owns it:

    H_txt = F_txt(E)    H_img = F_img(E)    h_i = H_txt[i] if i is text else H_img[i]

The fast path computes only the kept outputs: a tower computes queries and MLP for its own positions, but keys and values for
all positions (the text tower from media states with the frozen W_K, W_V; the media tower from text states with its own).
The towers may be asymmetric: with ``stride`` k only every k-th layer has a media block. Media states pass the other layers
unchanged, while the frozen tower still computes keys and values from them at every layer. With ``rank`` a media block is
the frozen one with low-rank deltas (Hu et al., arXiv 2106.09685), so that memory holds only one language model.

With ``width`` W the media blocks have another width than the base's D, like those of a pretrained image model (section 5 of
the paper joins Llama-3.1-8B and a diffusion transformer). Media states stay D wide between layers, so the frozen tower
still reads them at every layer. A block is placed between two projections as a residual (`xfusion.layers.Projected`):

    F_img(x) = x + P_out (G(P_in x) - P_in x)          x: all rows, including text; G: a block of width W

G is randomly initialized, and P_out P_in starts at a tenth of the scale of the base's embeddings, so F_img starts near the
identity.

This is our reading. The paper only says that different widths need "linear projections inside X-Fuse". It leaves open
whether media states stay W wide between layers and reach the frozen tower through a projection, whether P_out projects the
block's whole output instead of its change, and whether layers share projections. With `fuse`, mixing happens at width D,
after P_out, and ``fuse_projection`` is one more matrix there.

With ``start``, blocks of width W copy the matching weights of a pretrained diffusion transformer
(`xfusion.fusion.pretrained`).

X-Fuse (section 3.2) also computes the other tower's queries and mixes, per position:

    h_i = alpha h_i^own + beta P(h_i^other)

with alpha = 1, beta = 0 at the start, one pair per layer and side; P is a linear projection (``X-Fuse-proj``) or absent.
With ``fuse_by="token"``, which is in no paper, the share is a learned function of the position's own state:
``h_i = h_i^own + tanh(w . norm(x_i) + b) P(h_i^other - h_i^own)``, again starting as the plain dual tower. Text is mixed
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
from xfusion.fusion.base import Call, Fusion, Pass, module_from_parts
from xfusion.layers import Delta, Projected, linear_paths, linear_shape, narrow_mlp


class LowRank(Delta):
    """``W x + B A x``: a frozen matrix plus a trainable low-rank delta, zero at the start."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[..., inputs]`` -> ``[..., outputs]``."""
        return frozen(x) + functional.linear(functional.linear(x, self.down), self.up)


class Mix(nn.Module):
    """X-Fuse of one side at one layer: mixes the own tower's output with the other's, ``[B, n, D]`` each."""

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

    def forward(self, x: Tensor, own_output: Tensor, other_output: Tensor) -> Tensor:
        """The mixed states; ``x`` is the layer's input for the same rows."""
        project = (lambda h: h) if self.projection is None else self.projection
        if self.by == "layer":
            return (self.alpha * own_output + self.beta * project(other_output)).to(own_output.dtype)
        return own_output + (self.gate(x) * project(other_output - own_output)).to(own_output.dtype)


class DualTower(Fusion):
    """Frozen text tower, trainable media tower; text-only output is bit-identical whatever the media tower's weights are."""

    preserves_text = True
    prefix_is_constant = True
    media_blocks = True
    num_towers = 2

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Shape of the media tower, and whether the towers' outputs are mixed."""

        mlp: int | None = None
        """Width of the media blocks' MLP: keeps the first rows of gate and up and the first columns of down; None keeps all.
        For blocks with a `width`: the width of their MLP; None scales the base's in proportion.
        """
        width: int | None = None
        """Model width of the media blocks, a multiple of the base's head width; they are then randomly initialized and
        placed between projections. None copies the base's blocks.
        """
        start: str | None = None
        """Folder or hub id of a diffusers transformer, or of a pipeline with one, whose matching weights initialize new
        blocks of its width; every head then has its own keys and values. Not read if a pack supplies the weights.
        """
        start_revision: str | None = None
        """Hub revision of `start` (a commit for exact reproduction)."""
        rank: int | None = None
        """Media blocks are the frozen ones with deltas of this rank on every matrix; None copies the blocks."""
        fuse: Literal["image", "text", "both"] | None = None
        """X-Fuse: whose positions also use the other tower's output."""
        fuse_by: Literal["layer", "token"] = "layer"
        """Learn one pair of mixing weights per layer and side, or a share for each position from its state."""
        fuse_projection: bool = False
        """X-Fuse-proj: the other tower's output passes a linear projection, initially the identity."""

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
            """Sizes by rank, or by the width of the MLP."""
            del num_layers
            steps = range(1, 1025) if self.rank is not None else range(16, 65537, 16)
            for step in steps:
                yield replace(self, rank=step) if self.rank is not None else replace(self, mlp=step)

    def install(self, backbone: Backbone) -> None:
        """Copy the frozen blocks at the tower's layers, create new ones of another width, or add deltas to them."""
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
        """peft (as LoRA) if the tower has deltas at every layer and the towers' outputs are not mixed."""
        at_every_layer = len(self.blocks) == len(self.windows)
        return ("peft",) if self.config.rank is not None and self.config.fuse is None and at_every_layer else ()

    def make_config(self, backbone: Backbone) -> Any:
        """The base's configuration, with the tower's sizes if its width differs."""
        if self.config.width is None:
            return backbone.tower_config()
        return backbone.tower_config(self.config.width, self.config.mlp, all_keys=self.config.start is not None)

    def begin(self, backbone: Backbone) -> None:
        """Copy the matching weights of a pretrained diffusion transformer; `taken` records which.

        Raises:
            XFusionError: it cannot be read, or its width or head width differs.
        """
        if self.config.start is None or backbone.device.type == "meta":
            return
        blocks = pretrained.load(self.config.start, self.config.start_revision)
        pretrained.check(blocks, self.config.start, self.config.width, backbone)
        block_numbers = pretrained.choose(len(blocks), len(self.blocks))
        sources: dict[int, dict[str, str]] = {}
        tower_blocks: dict[str, Any] = dict(self.blocks.items())
        for (index, block), number in zip(tower_blocks.items(), block_numbers, strict=True):
            copied = pretrained.copy_weights(block.layer, blocks[number])
            sources[int(index)] = {parameter: f"{number}.{name}" for parameter, name in copied.items()}
        self.taken = sources

    def make(self, index: int, backbone: Backbone) -> nn.Module:
        """A copy of the frozen block, optionally narrowed; a new block of another width; or the deltas of a low-rank one."""
        if self.config.width is not None:
            new_layer = backbone.fresh_layer(index, self.block_config)
            return Projected(new_layer, backbone.hidden_size, self.config.width, self._scale)
        if self.config.rank is not None:
            frozen = backbone.layers[index]
            shapes = {path: linear_shape(frozen.get_submodule(path)) for path in linear_paths(frozen)}
            return module_from_parts({path: LowRank(*shape, self.config.rank) for path, shape in shapes.items()})
        block = backbone.copy_layer(index, self.block_config)
        if self.config.mlp is not None:
            narrow_mlp(block, backbone.config, self.config.mlp)
        return block

    def mix(self, side: str, index: int) -> Mix | None:
        """The learned mix of a side, ``text`` or ``media``, at a layer; None if its positions keep their tower's output."""
        name = f"{side}_{index}"
        return self.mixes[name] if name in self.mixes else None  # type: ignore[return-value]  # noqa: SIM401

    def media_block(self, index: int, frozen: nn.Module) -> Any:
        """The media tower's block.

        Raises:
            XFusionError: the towers are mixed, so text also uses the media tower.
        """
        return super().media_block(index, frozen) if self.config.fuse is not None else self.block(index, frozen)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Fast path: kept outputs only, each tower's keys and values for all rows (X-Fusion, section 3.2)."""
        block, media_owners = self.block(index, frozen), set(run.states) - {"text"}
        text_mix, media_mix = (self.mix(side, index) for side in ("text", "media"))
        text_tower_states = self.tower(0, index, frozen, run.states if media_mix else {"text"}, call, run)
        new_states = run.states | {o: h for o, h in text_tower_states.items() if o == "text"}
        if block is None:
            return new_states
        # Mixing acts only on text after a picture: if no text reads one, the other tower has nothing to add.
        mixes_text = text_mix is not None and "text" in run.states and run.text_reads_media
        media_tower_states = self.tower(
            1, index, block, run.states if mixes_text else media_owners, call, run, by_noise=True
        )
        new_states |= {o: h for o, h in media_tower_states.items() if o != "text"}
        return self._mix_states(index, run, new_states, text_tower_states, media_tower_states)

    def _mix_states(
        self,
        index: int,
        run: Pass,
        new_states: dict[str, Tensor],
        text_tower_states: dict[str, Tensor],
        media_tower_states: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        for owner, x in run.states.items():
            mix = self.mix("text" if owner == "text" else "media", index)
            other_states = (media_tower_states if owner == "text" else text_tower_states).get(owner)
            if mix is not None and other_states is not None and (owner != "text" or run.cached_text is None):
                new_states[owner] = torch.where(
                    run.after_media(owner), mix(x, new_states[owner], other_states), new_states[owner]
                )
        return new_states

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Reference path: both whole blocks run on the whole sequence; each position keeps its tower's output."""
        block, text_tower_states = self.block(index, frozen), self.whole(index, frozen, call, run)
        media_tower_states = run.states if block is None else self.whole(index, block, call, run, by_noise=True)
        new_states = {
            owner: (text_tower_states if owner == "text" else media_tower_states)[owner] for owner in run.states
        }
        return (
            new_states
            if block is None
            else self._mix_states(index, run, new_states, text_tower_states, media_tower_states)
        )
