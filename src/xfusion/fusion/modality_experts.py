"""Weights by modality, one joint attention: X-Fusion's dual projection (arXiv 2504.20996, figure 3 c) and its kin.

    q_i, k_i, v_i = W_m(i) n_m(i)(x_i)      softmax over all positions      h_i = MLP_m(i)(O_m(i) attention_i)

where m(i) is the modality of position i. Text uses the frozen weights. Which weights media positions share with text and
which are their own is configurable, so that one mechanism covers these systems:

=========================================  =================================  ========================================
system                                     own weights of media               otherwise
=========================================  =================================  ========================================
dual projection, LMFusion (2412.15188)     norms, Q, K, V, O, MLP             bidirectional inside a picture
Mixture-of-Transformers (2411.04996)       all, and text's (`post_norm`)      from scratch, norms after the branches
BAGEL (2505.14683)                         all, for noised pictures only      clean pictures use the frozen weights
CogVLM (2311.03079)                        Q, K, V, O, MLP                    one rotary position per picture, causal
mPLUG-Owl2 (2311.04257)                    norms, K, V
=========================================  =================================  ========================================

There is one set of keys and values: text's come from the frozen weights, media's from their own. A dual tower has two.

On a pretrained base, Mixture-of-Transformers reduces to LMFusion's layer: its own norms come after the branches,
``h_i = x_i + norm_m(i)(O_m(i) attention_i)`` and ``y_i = h_i + norm'_m(i)(MLP_m(i)(h_i))``, which is not the function the
base was trained for. ``post_norm`` is the paper's form, on a base from scratch: text has trained copies too, and only the
base's embeddings, last norm and head remain, frozen at their random initialization (the paper trains them).

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``S`` all rows of a pass, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.backbone import SCRATCH, Backbone
from xfusion.data.sequence import XFusionError
from xfusion.fusion.base import Call, Fusion, Pass, compiled, module_from_parts, parts_from_module
from xfusion.layers import (
    Delta,
    KeysValues,
    Piece,
    assembled,
    keys_values,
    layer_pieces,
    linear_weight,
    post_norm_parts,
    run_rows,
)

Part = Literal["norm", "query", "key", "value", "output", "mlp"]
PARTS: tuple[Part, ...] = ("norm", "query", "key", "value", "output", "mlp")


class OwnRows(Delta):
    """Trainable replacements for some output rows of a matrix, for bases that fuse queries, keys and values in one matrix."""

    def __init__(self, linear: nn.Module, rows: Tensor):
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        self.weight = nn.Parameter(linear_weight(linear)[rows].detach().clone())
        bias = getattr(linear, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias[rows].detach().clone())

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[..., inputs]`` -> ``[..., outputs]``."""
        output = frozen(x)
        return output.index_copy(-1, self.rows, functional.linear(x, self.weight, self.bias).to(output.dtype))


class ByPosition(Delta):
    """A part of a layer computed at all positions with both weights; each position keeps its own: the reference path."""

    def __init__(self, expert: nn.Module, is_own: Tensor):
        super().__init__()
        self.expert, self.is_own = expert, is_own

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, S, ...]`` -> ``[B, S, ...]``."""
        expert_output = self.expert(frozen, x) if isinstance(self.expert, Delta) else self.expert(x)
        output = frozen(x)
        shape = (*self.is_own.shape, *([1] * (output.ndim - 2)))
        mask = self.is_own.view(shape)
        if output.shape[:2] != self.is_own.shape:  # norms after the split into heads, [B, heads, S, width]
            mask = self.is_own[:, None, :, None]
        return torch.where(mask, expert_output.to(output.dtype), output)


def joint_rows(
    frozen: nn.Module,
    expert: nn.Module,
    text: Tensor | None,
    text_call: Call,
    text_mask: Tensor | None,
    media: Tensor | None,
    media_call: Call,
    media_mask: Tensor | None,
    past: list[KeysValues],
    is_own: Tensor | None,
    text_reads_media: bool,
    text_is_cached: bool,
    return_keys_values: bool,
) -> tuple[Tensor | None, Tensor | None, list[KeysValues]]:
    """One layer: text with the frozen weights, media with the expert's, over one set of keys and values.

    Args:
        frozen: the layer for text: the base's, or, from scratch, a trained one.
        expert: the layer for media positions.
        text: states ``[B, n, D]`` or None; with ``text_is_cached`` they are only read.
        media: states ``[B, m, D]`` or None.
        is_own: which media positions use the expert, bool ``[B, m, 1]``; the others use ``frozen``. None means all.
        past: cached keys and values (zero or one).
        text_mask: mask of text queries over [past | text | media], or over [past | text] if text reads no media.
        media_mask: mask of media queries over [past | text | media].
        return_keys_values: whether the pass `appends` keys and values (`xfusion.fusion.base.tower_rows`).

    Returns:
        new text states, new media states, and, with ``return_keys_values``, the keys and values of text and of media.
    """
    media_kv = text_kv = new_text = new_media = None
    if media is not None:
        media_kv = keys_values(expert, media, media_call)
        if is_own is not None:
            frozen_kv = keys_values(frozen, media, media_call)
            own_mask = is_own[:, None]
            media_kv = (
                torch.where(own_mask, media_kv[0], frozen_kv[0]),
                torch.where(own_mask, media_kv[1], frozen_kv[1]),
            )
    if text is not None and text_is_cached:
        text_kv = keys_values(frozen, text, text_call)
    elif text is not None and text_mask is not None:
        keys_after = [media_kv] if media_kv is not None and text_reads_media else []
        new_text, text_kv = run_rows(frozen, text, text_call, text_mask, past, keys_after)
    if media is not None and media_mask is not None and media_kv is not None:
        keys_before = past + ([text_kv] if text_kv is not None else [])
        new_media, _ = run_rows(expert, media, media_call, media_mask, keys_before, [media_kv], splice_own=False)
        if is_own is not None:
            frozen_media, _ = run_rows(frozen, media, media_call, media_mask, keys_before, [media_kv], splice_own=False)
            new_media = torch.where(is_own, new_media, frozen_media)
    return new_text, new_media, [kv for kv in (text_kv, media_kv) if kv is not None] if return_keys_values else []


class ModalityExperts(Fusion):
    """Media positions have their own weights in one joint attention; text keeps the frozen ones, except from scratch."""

    preserves_text = True
    prefix_is_constant = True
    media_blocks = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Which weights media positions have of their own."""

        own: tuple[Part, ...] = PARTS
        """Parts of a layer for which media positions have their own weights, copied from the base; the rest is frozen."""
        noised_only: bool = False
        """Only noised pictures use the new weights; clean ones and [BOI] use the frozen ones (BAGEL)."""
        post_norm: bool = False
        """Norms after the branches, and trained weights for text too (Mixture-of-Transformers as in its paper): only on a
        base from scratch, `model.backbone.source` scratch:SOURCE."""

        def sizes(self, num_layers: int) -> Iterator[Fusion.Config]:
            """Sizes by the number of layers with new weights; from scratch there is one size."""
            return iter(()) if self.post_norm else super().sizes(num_layers)

        def build(self) -> ModalityExperts:
            """The fusion, not yet installed.

            Raises:
                XFusionError: unknown parts, or settings that ``post_norm`` does not allow.
            """
            unknown_parts = [part for part in self.own if part not in PARTS]
            if unknown_parts or not self.own:
                raise XFusionError(f"modality experts: own {self.own}: name some of {', '.join(PARTS)}")
            at_every_layer = self.stride == 1 and not self.offset and self.layers is None
            if self.post_norm and (set(self.own) != set(PARTS) or self.noised_only or not at_every_layer):
                raise XFusionError(
                    "modality experts: post_norm is for models from scratch, which have all parts of their own at every"
                    " layer: leave own, noised_only, stride, offset and layers at their defaults"
                )
            return ModalityExperts(self)

    def __init__(self, config: Config):
        super().__init__(config)
        if config.post_norm:  # text weights are trained too
            self.preserves_text = self.prefix_is_constant = False

    def install(self, backbone: Backbone) -> None:
        """Copy the parts for media, and with ``post_norm`` those for text.

        Raises:
            XFusionError: ``post_norm`` on a pretrained base.
        """
        if self.config.post_norm and backbone.pretrained:
            raise XFusionError(
                f"modality experts: post_norm is another function than {backbone.source} was trained to be: leave it at"
                f" False, or train from scratch on model.backbone.source {SCRATCH}{backbone.source}"
            )
        super().install(backbone)
        layer_names = self.blocks if self.config.post_norm else {}
        self.of_words = nn.ModuleDict({index: self.make(int(index), backbone) for index in layer_names})
        self._text_layers: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def new_modules(self, index: int) -> list[nn.Module]:
        """The parts for media, and from scratch those for text."""
        text_modules = [self.of_words[str(index)]] if str(index) in self.of_words else []
        return super().new_modules(index) + text_modules

    def text_block(self, index: int, frozen: nn.Module) -> Any:
        """The layer for text: the frozen one, or, from scratch, a trained one."""
        if not self.config.post_norm:
            return frozen
        if frozen not in self._text_layers:
            parts: Any = self.of_words[str(index)]
            self._text_layers[frozen] = assembled(frozen, parts_from_module(parts))
        return self._text_layers[frozen]

    def make(self, index: int, backbone: Backbone) -> nn.Module:
        """The parts of a layer that are not shared, by path; only some rows of a matrix if several roles share it."""
        layer_copy, pieces = backbone.copy_layer(index, self.block_config), layer_pieces(backbone.layers[index])
        own_pieces = [piece for part in PARTS if part in self.config.own for piece in pieces[part]]
        pieces_by_path: dict[str, list[Piece]] = {}
        for piece in own_pieces:
            pieces_by_path.setdefault(piece.path, []).append(piece)
        parts: dict[str, nn.Module] = {}
        for path, path_pieces in pieces_by_path.items():
            module = layer_copy.get_submodule(path)
            rows = [piece.rows for piece in path_pieces if piece.rows is not None]
            is_whole_matrix = not rows or sum(map(len, rows)) == linear_weight(module).shape[0]
            parts[path] = module if is_whole_matrix else OwnRows(module, torch.cat(rows).sort().values)
        if self.config.post_norm:
            parts = post_norm_parts(backbone.layers[index], parts)
        return module_from_parts(parts).to(next(layer_copy.parameters()).device)

    def _is_own(self, run: Pass) -> Tensor | None:
        """Which media positions use the new weights, bool ``[B, n, 1]``; None means all."""
        if not self.config.noised_only or run.media is None:
            return None
        media = run.media_rows[run.media]
        return media.at(media.noised)[..., None]

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Fast path: each position uses only its own weights; one set of keys and values in slot 0."""
        expert = self.block(index, frozen)
        if expert is None:
            return self.frozen_layer(index, frozen, call, run)
        frozen = self.text_block(index, frozen)
        calls, window, name = run.calls(call), self.windows[index], run.media
        states = run.inputs(index)
        text, media = states.get("text"), states[name] if name else None
        text_is_cached = run.cached_text is not None
        compute_rows = compiled(joint_rows) if run.compiled else joint_rows
        new_text, new_media, new_kv = compute_rows(
            frozen,
            run.by_noise(expert, [name] if name else []),
            text,
            calls.get("text", {}),
            None if text is None or text_is_cached else run.mask("text", window, others=run.text_reads_media),
            media,
            calls[name] if name else {},
            run.mask(name, window) if name else None,
            run.past(0, index),
            self._is_own(run),
            run.text_reads_media,
            text_is_cached,
            run.appends,
        )
        run.append(0, index, *new_kv)
        new_states = dict(run.states)
        if new_text is not None:
            new_states["text"] = new_text
        if name and new_media is not None:
            new_states[name] = new_media
        return new_states

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The whole frozen layer, in which each unshared part is computed with both weights and selected by position."""
        if str(index) not in self.blocks:
            return self.frozen_reference(index, frozen, call, run)
        is_own = torch.cat([self._own_rows_mask(owner, run) for owner in run.rows], dim=1)
        own_parts: Any = self.blocks[str(index)]
        by_position = {path: ByPosition(part, is_own) for path, part in parts_from_module(own_parts).items()}
        media_is_own = self._is_own(run)
        if media_is_own is not None and run.modulation is not None:
            # Clean pictures use the frozen layer, without modulation.
            run = replace(run, modulation=torch.where(media_is_own[..., None], run.modulation, 0.0))
        return self.whole(index, assembled(self.text_block(index, frozen), by_position), call, run, by_noise=True)

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """A text-only layer: the frozen one, or, from scratch, that for text."""
        if not self.config.post_norm:
            return super().text_layer(index, frozen, x, call)
        cast_states = x.to(next(self.of_words.parameters()).dtype)
        return self.text_block(index, frozen)(cast_states, **call).to(x.dtype)

    def _own_rows_mask(self, owner: str, run: Pass) -> Tensor:
        shape, device = run.rows[owner].order.shape, run.rows[owner].order.device
        if owner == "text":
            return torch.zeros(shape, dtype=torch.bool, device=device)
        media_is_own = self._is_own(run)
        return torch.ones(shape, dtype=torch.bool, device=device) if media_is_own is None else media_is_own[..., 0]
