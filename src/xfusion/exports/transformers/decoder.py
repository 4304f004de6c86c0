"""The decoder inside an exported class: the frozen one, with low-rank deltas merged if there are any.

The boundary rows of a media item become tokens, ``<begin_of_media>`` and ``<end_of_media>``, around the class's placeholder:
three more rows in the embedding table, which no text uses.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xfusion.exports.base import not_exact
from xfusion.exports.transformers.layout import generation_settings, lay_out
from xfusion.fusion.base import Fusion, parts_from_module
from xfusion.fusion.lora import Adapter, Lora
from xfusion.model import Model

BEGIN, END = "<begin_of_media>", "<end_of_media>"


def mechanism(model: Model) -> Fusion:
    """The fusion, without the low-rank deltas beside it: they are merged."""
    return model.fusion.inner if isinstance(model.fusion, Lora) else model.fusion


def num_words(model: Model) -> int:
    """Rows of the base's embedding table; the ids of ``<begin_of_media>``, the placeholder and ``<end_of_media>`` follow."""
    return len(model.backbone.model.get_input_embeddings().weight)


def text_config(model: Model) -> Any:
    """The base's configuration, with three more tokens.

    Raises:
        XFusionError: the base has features that no class around a decoder supports.
    """
    if model.backbone.model.get_output_embeddings().bias is not None:
        raise not_exact(model, "transformers", "its base has a bias at the head, which no class around a decoder has")
    config = copy.deepcopy(model.backbone.config)
    config.vocab_size = num_words(model) + 3
    return config


@torch.no_grad()
def fill_decoder(exported: Any, model: Model) -> Any:
    """Fill a class around a decoder with the weights of decoder and head; the three tokens are never generated."""
    backbone, port = model.backbone, model.port
    table: Tensor = backbone.model.get_input_embeddings().weight
    # A narrow dtype would round a merged matrix and so change it.
    exported = exported.to(torch.float32 if isinstance(model.fusion, Lora) else backbone.dtype).eval()
    state = dict(backbone.decoder.state_dict())
    name = next(k for k, v in state.items() if v.shape == table.shape and v.data_ptr() == table.data_ptr())
    rows = torch.stack([port.begin, torch.zeros_like(port.begin), port.end])
    exported.model.language_model.load_state_dict(
        state | merged_weights(model) | {name: torch.cat([table, rows.to(table)])}
    )
    exported.lm_head.weight[: len(table)] = backbone.model.get_output_embeddings().weight
    exported.generation_config = generation_settings(model, [len(table) + offset for offset in range(3)])
    return exported


@torch.no_grad()
def merged_weights(model: Model) -> dict[str, Tensor]:
    """Matrices with their deltas merged, by their names in the decoder; empty if there are no deltas."""
    if not isinstance(model.fusion, Lora):
        return {}
    base, weights = model.backbone, {}
    for index, block in model.fusion.blocks.items():
        assert isinstance(block, nn.ModuleDict)
        for path, adapter in parts_from_module(block).items():
            assert isinstance(adapter, Adapter)
            frozen: Any = base.layers[int(index)].get_submodule(path)
            delta = adapter.layer.get_delta_weight("default")
            delta = delta if isinstance(frozen, nn.Linear) else delta.T  # GPT-2's matrices are transposed
            weights[f"{base.layers_key}.{index}.{path}.weight"] = frozen.weight.float() + delta
    return weights


def save(exported: Any, model: Model, folder: Path, kind: str, placeholder: str, count: int = 1) -> None:
    """The model, and the base's tokenizer with the three tokens at the rows behind its table, which may be the longer one.

    Args:
        exported: the class around the decoder.
        model: the model that is exported.
        folder: output folder.
        kind: type of the content blocks that hold a medium: ``image`` or ``audio``.
        placeholder: the class's token for one state of it.
        count: placeholders that the chat template writes; 1 where a processor repeats it.

    Raises:
        XFusionError: the tokenizer knows more words than the table has rows, or reads words otherwise behind a medium.
    """
    vocabulary_size, tokenizer = num_words(model), copy.deepcopy(model.backbone.tokenizer)
    tokenizer.add_tokens(
        [f"<unused_{number}>" for number in range(vocabulary_size - len(tokenizer))], special_tokens=True
    )
    tokenizer.add_tokens([BEGIN, placeholder, END], special_tokens=True)
    if len(tokenizer) != vocabulary_size + 3:
        reason = f"the tokenizer of its base knows {len(tokenizer) - 3} words, and the table has {vocabulary_size}"
        raise not_exact(model, "transformers", reason)
    lay_out(tokenizer, model, kind, f"{BEGIN}{placeholder * count}{END}")
    exported.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
