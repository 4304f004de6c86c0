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
from xfusion.fusion.base import Call, Fusion, Pass, by_path, compiled, of_paths
from xfusion.layers import (
    Delta,
    KeysValues,
    Piece,
    assembled,
    keys_values,
    layer_pieces,
    linear_weight,
    post_normed,
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
        out = frozen(x)
        return out.index_copy(-1, self.rows, functional.linear(x, self.weight, self.bias).to(out.dtype))


class Routed(Delta):
    """A part of a layer computed at all positions with both weights; each position keeps its own: the reference path."""

    def __init__(self, own: nn.Module, is_own: Tensor):
        super().__init__()
        self.own, self.is_own = own, is_own

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, S, ...]`` -> ``[B, S, ...]``."""
        own = self.own(frozen, x) if isinstance(self.own, Delta) else self.own(x)
        out = frozen(x)
        shape = (*self.is_own.shape, *([1] * (out.ndim - 2)))
        mine = self.is_own.view(shape)
        if out.shape[:2] != self.is_own.shape:  # norms after the split into heads, [B, heads, S, width]
            mine = self.is_own[:, None, :, None]
        return torch.where(mine, own.to(out.dtype), out)


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
    given: bool,
    keep: bool,
) -> tuple[Tensor | None, Tensor | None, list[KeysValues]]:
    """One layer: text with the frozen weights, media with the expert's, over one set of keys and values.

    Args:
        frozen: the layer for text: the base's, or, from scratch, a trained one.
        expert: the layer for media positions.
        text: states ``[B, n, D]`` or None; with ``given`` they are only read.
        media: states ``[B, m, D]`` or None.
        is_own: which media positions use the expert, bool ``[B, m, 1]``; the others use ``frozen``. None means all.
        past: cached keys and values (zero or one).
        text_mask: mask of text queries over [past | text | media], or over [past | text] if text reads no media.
        media_mask: mask of media queries over [past | text | media].
        keep: whether the pass `appends` keys and values (`xfusion.fusion.base.tower_rows`).

    Returns:
        new text states, new media states, and, with ``keep``, the keys and values of text and of media.
    """
    media_kv = text_kv = new_text = new_media = None
    if media is not None:
        media_kv = keys_values(expert, media, media_call)
        if is_own is not None:
            plain = keys_values(frozen, media, media_call)
            own = is_own[:, None]
            media_kv = (torch.where(own, media_kv[0], plain[0]), torch.where(own, media_kv[1], plain[1]))
    if text is not None and given:
        text_kv = keys_values(frozen, text, text_call)
    elif text is not None and text_mask is not None:
        after = [media_kv] if media_kv is not None and text_reads_media else []
        new_text, text_kv = run_rows(frozen, text, text_call, text_mask, past, after)
    if media is not None and media_mask is not None and media_kv is not None:
        before = past + ([text_kv] if text_kv is not None else [])
        new_media, _ = run_rows(expert, media, media_call, media_mask, before, [media_kv], splice_own=False)
        if is_own is not None:
            plain_media, _ = run_rows(frozen, media, media_call, media_mask, before, [media_kv], splice_own=False)
            new_media = torch.where(is_own, new_media, plain_media)
    return new_text, new_media, [kv for kv in (text_kv, media_kv) if kv is not None] if keep else []


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
            unknown = [part for part in self.own if part not in PARTS]
            if unknown or not self.own:
                raise XFusionError(f"modality experts: own {self.own}: name some of {', '.join(PARTS)}")
            everywhere = self.stride == 1 and not self.offset and self.layers is None
            if self.post_norm and (set(self.own) != set(PARTS) or self.noised_only or not everywhere):
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
        places = self.blocks if self.config.post_norm else {}
        self.of_words = nn.ModuleDict({index: self.make(int(index), backbone) for index in places})
        self._words: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def new_modules(self, index: int) -> list[nn.Module]:
        """The parts for media, and from scratch those for text."""
        own = [self.of_words[str(index)]] if str(index) in self.of_words else []
        return super().new_modules(index) + own

    def words(self, index: int, frozen: nn.Module) -> Any:
        """The layer for text: the frozen one, or, from scratch, a trained one."""
        if not self.config.post_norm:
            return frozen
        if frozen not in self._words:
            parts: Any = self.of_words[str(index)]
            self._words[frozen] = assembled(frozen, by_path(parts))
        return self._words[frozen]

    def make(self, index: int, backbone: Backbone) -> nn.Module:
        """The parts of a layer that are not shared, by path; only some rows of a matrix if several roles share it."""
        copied, pieces = backbone.copy_layer(index, self.block_config), layer_pieces(backbone.layers[index])
        wanted = [piece for part in PARTS if part in self.config.own for piece in pieces[part]]
        together: dict[str, list[Piece]] = {}
        for piece in wanted:
            together.setdefault(piece.path, []).append(piece)
        parts: dict[str, nn.Module] = {}
        for path, found in together.items():
            module = copied.get_submodule(path)
            rows = [piece.rows for piece in found if piece.rows is not None]
            whole = not rows or sum(map(len, rows)) == linear_weight(module).shape[0]
            parts[path] = module if whole else OwnRows(module, torch.cat(rows).sort().values)
        if self.config.post_norm:
            parts = post_normed(backbone.layers[index], parts)
        return of_paths(parts).to(next(copied.parameters()).device)

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
            return run.states | self.tower(0, index, frozen, {"text"}, call, run)
        frozen = self.words(index, frozen)
        calls, window, name = run.calls(call), self.windows[index], run.media
        states = run.inputs(index)
        text, media = states.get("text"), states[name] if name else None
        given = run.given is not None
        work = compiled(joint_rows) if run.compiled else joint_rows
        new_text, new_media, made = work(
            frozen,
            run.by_noise(expert, [name] if name else []),
            text,
            calls.get("text", {}),
            None if text is None or given else run.mask("text", window, others=run.text_reads_media),
            media,
            calls[name] if name else {},
            run.mask(name, window) if name else None,
            run.past(0, index),
            self._is_own(run),
            run.text_reads_media,
            given,
            run.appends,
        )
        run.append(0, index, *made)
        new = dict(run.states)
        if new_text is not None:
            new["text"] = new_text
        if name and new_media is not None:
            new[name] = new_media
        return new

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The whole frozen layer, in which each unshared part is computed with both weights and selected by position."""
        if str(index) not in self.blocks:
            plain = self.whole(index, frozen, call, run)
            return run.states | {o: h for o, h in plain.items() if o == "text"}
        is_own = torch.cat([self._rows_of_their_own(owner, run) for owner in run.rows], dim=1)
        own: Any = self.blocks[str(index)]
        routed = {path: Routed(part, is_own) for path, part in by_path(own).items()}
        chosen = self._is_own(run)
        if chosen is not None and run.modulation is not None:  # the others use the frozen layer without modulation
            run = replace(run, modulation=torch.where(chosen[..., None], run.modulation, 0.0))
        return self.whole(index, assembled(self.words(index, frozen), routed), call, run, by_noise=True)

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """A text-only layer: the frozen one, or, from scratch, that for text."""
        if not self.config.post_norm:
            return super().text_layer(index, frozen, x, call)
        own = x.to(next(self.of_words.parameters()).dtype)
        return self.words(index, frozen)(own, **call).to(x.dtype)

    def _rows_of_their_own(self, owner: str, run: Pass) -> Tensor:
        shape, device = run.rows[owner].order.shape, run.rows[owner].order.device
        if owner == "text":
            return torch.zeros(shape, dtype=torch.bool, device=device)
        chosen = self._is_own(run)
        return torch.ones(shape, dtype=torch.bool, device=device) if chosen is None else chosen[..., 0]
