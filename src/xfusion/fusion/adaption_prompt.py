"""Adaption prompts with zero-init attention: LLaMA-Adapter (arXiv 2303.16199) and its second version (2304.15010).

    h = O [ softmax(Q K^T) V  +  tanh(g) softmax(Q K_P^T) V_P ]        K_P = W_k P,  V_P = W_v P,  g = 0 at the start

The prompt P of a layer is ``[M, D]``; the frozen attention computes its keys and values, without positions. The two
softmaxes are separate, so that a closed gate (one per head) leaves the frozen layer unchanged. A picture enters as one of:

- ``added``: the connector's output, one row or M, is added to the learned prompt of every layer (version 1, and the
  released code of version 2);
- ``early``: the connector's output is itself the prompt of the first layers; the other layers have only learned prompts
  (the paper of version 2).

With ``affine`` every matrix becomes ``s (W x + b)``, and copies of the layer's norms are trained (version 2).

All of this acts only on text after a picture, whereas the papers let it act on all text: text-only output is preserved.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``k`` media positions that text may read, ``M`` rows of a prompt,
``D`` model width, ``H`` heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.fusion.base import Call, Pass, module_from_parts, parts_from_module
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.modality_experts import ByPosition
from xfusion.fusion.outside import Outside, token_positions
from xfusion.layers import (
    Delta,
    KeysValues,
    assembled,
    attention_mask,
    attention_path,
    keys_values,
    layer_pieces,
    linear_paths,
    linear_shape,
    run_rows,
)


class GatedHeads(Delta):
    """An attention's output projection on gated heads, without its bias, which the frozen attention already adds."""

    def __init__(self, gate: Tensor):
        super().__init__()
        self.gate = gate

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, n, H K]`` -> ``[B, n, D]``."""
        gated = (x.unflatten(-1, (len(self.gate), -1)) * self.gate.tanh()[:, None].to(x.dtype)).flatten(-2)
        return frozen(gated) - frozen(torch.zeros_like(x))


class Prompted(Delta):
    """A frozen attention, plus what its queries read from prompts; created for one pass.

    ``gated`` is that attention with gated heads, assembled beforehand because compiled code cannot copy modules.
    """

    def __init__(self, gated: nn.Module, kv: KeysValues, media_mask: Tensor, attention: str):
        super().__init__()
        self.gated, self.kv, self.media_mask, self.attention = gated, kv, media_mask, attention

    def forward(self, frozen: nn.Module, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The attention's output tuple, whose first element is states ``[B, n, D]``."""
        output, *other_outputs = frozen(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        rotary_tables = kwargs.get("position_embeddings")
        call: Call = {} if rotary_tables is None else {"position_embeddings": rotary_tables}
        return (self.add_prompt_output(x, call, output), *other_outputs)

    def add_prompt_output(self, x: Tensor, call: Call, output: Tensor) -> Tensor:
        """The frozen attention's output plus what its queries read from prompts, ``[B, n, D]``."""
        has_keys = self.media_mask.any(-1, keepdim=True)
        # A softmax needs a key: a token that reads nothing gets an open mask, and its result is discarded.
        mask = attention_mask(self.media_mask | ~has_keys, self.attention, x.dtype)
        k, v = (t.to(x.dtype) for t in self.kv)
        prompt_output, _ = run_rows(self.gated, x, call, mask, [(k, v)], [], splice_own=False)
        return torch.where(has_keys, output + prompt_output, output)


class PromptedByWord(Prompted):
    """The same for one token at a time, each over the rows that it reads: the reference path."""

    def add_prompt_output(self, x: Tensor, call: Call, output: Tensor) -> Tensor:
        """The frozen attention's output plus what its queries read from prompts, ``[B, n, D]``."""
        output = output.clone()
        for b, i in self.media_mask.any(-1).nonzero().tolist():
            key_mask = self.media_mask[b, i]
            k, v = (t[b : b + 1, :, key_mask].to(x.dtype).expand(len(x), -1, -1, -1) for t in self.kv)
            full_mask = torch.ones(*x.shape[:2], k.shape[2], dtype=torch.bool, device=x.device)
            mask = attention_mask(full_mask, self.attention, x.dtype)
            output[b, i] += run_rows(self.gated, x, call, mask, [(k, v)], [], splice_own=False)[0][b, i]
        return output


class Affine(Delta):
    """``s (W x + b)``: a frozen matrix with a trainable scale and bias."""

    def __init__(self, width: int):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[..., inputs]`` -> ``[..., outputs]``."""
        return self.scale * (frozen(x) + self.bias)


class Prompt(nn.Module):
    """The new weights of a layer: optional prompt rows, a gate per head, and tuned parts of the layer."""

    def __init__(self, rows: int, width: int, gates: Tensor, tuned: dict[str, nn.Module]):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(rows, width)) if rows else None
        self.gate = nn.Parameter(gates)
        self.tuned = module_from_parts(tuned)


class AdaptionPrompt(Outside):
    """Gated prompts in frozen attention, for text after a picture."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Outside.Config):
        """Length of prompts and how a picture enters them; ``layers`` chooses the layers with a prompt."""

        prompts: int = 10
        """Rows of a prompt."""
        connector: Resampler.Config | None = Resampler.Config(latents=1, depth=1)
        """Connector from a picture's tokens to rows: one for all rows of a prompt, or as many as a prompt has."""
        picture: Literal["added", "early"] = "added"
        """Whether the picture is added to every layer's learned prompt, or is itself the prompt of the first layers."""
        early: int = 1
        """Number of first layers whose prompt is the picture, with ``picture="early"``."""
        gate: float = 0.0
        """Initial value of the gates, before tanh. The papers' 0 closes them; they open by about a learning rate per step."""
        affine: bool = False
        """Whether matrices get a trainable scale and bias, and norms are trained."""

        def build(self) -> AdaptionPrompt:
            """The fusion, not yet installed.

            Raises:
                XFusionError: the number of rows from the connector does not fit the prompt.
            """
            connector_rows = 0 if self.connector is None else self.connector.latents
            if self.prompts < 1 or connector_rows not in (
                (1, self.prompts) if self.picture == "added" else (self.prompts,)
            ):
                raise XFusionError(
                    f"adaption prompt: the connector makes {connector_rows} rows of a picture for prompts of {self.prompts}: take"
                    " as many" + (", or 1" if self.picture == "added" else "")
                )
            return AdaptionPrompt(self)

    @property
    def num_rows(self) -> int:
        """Rows of a prompt."""
        return self.config.prompts

    @property
    def exports(self) -> tuple[str, ...]:
        """peft, for the first version."""
        return () if self.config.affine or self.config.picture != "added" else ("peft",)

    def connect(self, x: Tensor, present: Tensor) -> Tensor:
        """Media ``[N, P, D]`` and which tokens exist, bool ``[N, P]`` -> prompt rows of a picture ``[N, M, D]``."""
        return self.connector(x, present).expand(-1, self.config.prompts, -1)

    def install(self, backbone: Backbone) -> None:
        """Create the prompts of the placed layers, and find the path of the output matrix within each attention."""
        super().install(backbone)
        self.outputs = {}
        for index in self.state_layers:
            path = layer_pieces(backbone.layers[index])["output"][0].path
            self.outputs[index] = path.removeprefix(f"{attention_path(backbone.layers[index])}.")

    def make(self, index: int, backbone: Backbone) -> Prompt:
        """The prompt of a layer, with its tuned parts by path."""
        config, layer = self.config, backbone.layers[index]
        has_learned_rows = config.picture == "added" or index not in config.placed(backbone.num_layers)[: config.early]
        tuned: dict[str, nn.Module] = {}
        if config.affine:
            layer_copy = backbone.copy_layer(index, self.block_config)
            for path in linear_paths(layer):
                tuned[path] = Affine(linear_shape(layer.get_submodule(path))[1])
            for piece in layer_pieces(layer)["norm"]:
                tuned[piece.path] = layer_copy.get_submodule(piece.path)
        gates = torch.full((backbone.config.num_attention_heads,), config.gate)
        return Prompt(config.prompts if has_learned_rows else 0, backbone.hidden_size, gates, tuned).to(backbone.device)

    def _tuned_layer(self, index: int, frozen: nn.Module, row_mask: Tensor) -> nn.Module:
        """The frozen layer with its tuned parts, active at the rows ``row_mask``, bool ``[B, n]``."""
        tuned: Any = self.blocks[str(index)].tuned
        if not len(tuned):
            return frozen
        return assembled(frozen, {path: ByPosition(part, row_mask) for path, part in parts_from_module(tuned).items()})

    def _prompts(self, index: int, frozen: nn.Module, states: dict[str, Tensor], call: Call, run: Pass) -> KeysValues:
        """Keys and values of the prompts of this pass's pictures, from the frozen attention, at the pictures' positions."""
        assert run.media is not None
        prompt: Any = self.blocks[str(index)]
        learned_rows, x = prompt.rows, states[run.media]
        if learned_rows is not None:
            rows = learned_rows[token_positions(run.media_rows[run.media]).clamp(0, self.num_rows - 1)].to(x.dtype)
            x = rows + x if self.config.picture == "added" else rows
        rotary_tables = run.calls(call)[run.media].get("position_embeddings")
        # A cosine of 1 and a sine of 0 disable the rotary embedding: prompts have no position.
        identity_rotary = (
            {}
            if rotary_tables is None
            else {"position_embeddings": (torch.ones_like(rotary_tables[0]), torch.zeros_like(rotary_tables[1]))}
        )
        return keys_values(frozen.get_submodule(attention_path(frozen)), x, identity_rotary)

    def _block(
        self,
        index: int,
        frozen: nn.Module,
        kv: KeysValues,
        media_mask: Tensor,
        prompted_class: type[Prompted],
        run: Pass,
    ) -> Any:
        """The layer of this pass: its attention reads prompts, and its tuned parts act on text that sees a picture."""
        prompt: Any = self.blocks[str(index)]
        tuned_layer = self._tuned_layer(index, frozen, media_mask.any(-1))
        attention_name = attention_path(frozen)
        gated = assembled(tuned_layer.get_submodule(attention_name), {self.outputs[index]: GatedHeads(prompt.gate)})
        return assembled(tuned_layer, {attention_name: prompted_class(gated, kv, media_mask, run.attention)})

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Only text passes through the frozen layer, whose attention also reads prompts; media rows stay unchanged."""
        states, block = self.with_rows(index, run), frozen
        if str(index) in self.blocks:
            new_kv = self._prompts(index, frozen, states, call, run) if run.media else None
            kv = run.all_keys_values(1, index, new_kv)
            if kv is not None and "text" in states and run.cached_text is None:
                block = self._block(index, frozen, kv, self.reads(run), Prompted, run)
        return states | self.words_alone(0, index, block, call, run)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The same, with each token by itself over the prompt rows that it reads."""
        states, block = self.with_rows(index, run, reference=True), frozen
        if "text" not in states:
            return states
        if str(index) in self.blocks and run.media:
            media_mask = torch.zeros_like(run.seen("text", of="media"))
            for b in range(media_mask.shape[0]):
                for i in range(media_mask.shape[1]):
                    media_mask[b, i, self._media_columns(run, b, i)] = True
            kv = self._prompts(index, frozen, states, call, run)
            block = self._block(index, frozen, kv, media_mask, PromptedByWord, run)
        return states | self.words_alone_reference(index, block, call, run)

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """A text-only layer: there is no prompt, and the tuned parts leave text unchanged."""
        if str(index) not in self.blocks:
            return frozen(x, **call)
        return self._tuned_layer(index, frozen, torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device))(x, **call)
