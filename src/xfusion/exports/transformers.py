"""To transformers: a vision transformer's features at the input of the frozen decoder as LlavaForConditionalGeneration.

The rows that open and close a picture become tokens of their own, ``<begin_of_media>`` and ``<end_of_media>``, around
``<image>``: three rows more in the table of embeddings, which no word uses.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xfusion.exports.base import not_exact
from xfusion.fusion.connectors.linear import Linear
from xfusion.fusion.connectors.mlp import MLP
from xfusion.fusion.prefix import Prefix
from xfusion.modalities.codecs.features import Features
from xfusion.modalities.encoders.vision_transformer import VisionTransformer
from xfusion.model import Model

TOKENS = ("<begin_of_media>", "<image>", "<end_of_media>")


@torch.no_grad()
def export(model: Model, folder: Path) -> list[str]:
    """Write a model that ``LlavaForConditionalGeneration.from_pretrained(folder)`` loads, with its tokenizer."""
    fusion, port, codec, image = model.fusion, model.port, model.image.codec, model.image
    if not isinstance(fusion, Prefix) or not isinstance(port, (Linear, MLP)):
        raise not_exact(
            model,
            "transformers",
            "no class of transformers is this mechanism; LLaVA's is a Linear or MLP port at the input",
        )
    if not isinstance(codec, Features) or not isinstance(codec.encoder, VisionTransformer):
        raise not_exact(model, "transformers", "its encoder is not a vision transformer of transformers")
    if (
        image.patch != 1
        or image.patch_width != 1
        or image.config.order != "causal"
        or image.config.position != "running"
    ):
        raise not_exact(model, "transformers", "LLaVA has a token per feature, in causal order, at running positions")
    from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    encoder, base = codec.encoder, model.backbone
    cells = encoder.cells**2
    images = torch.zeros(1, 3, encoder.side, encoder.side)
    states = encoder.model(pixel_values=images, output_hidden_states=True).hidden_states[-1].shape[1]
    if states not in (cells, cells + 1):
        raise not_exact(
            model, "transformers", f"its encoder has {states - cells} tokens besides its patches, LLaVA 0 or 1"
        )
    table: Tensor = base.model.get_input_embeddings().weight
    text = copy.deepcopy(base.config)
    begin, placeholder, end = (len(table) + i for i in range(3))
    text.vocab_size = len(table) + 3
    config = LlavaConfig(
        vision_config=encoder.model.config,
        text_config=text,
        image_token_index=placeholder,
        image_seq_length=cells,
        projector_hidden_act="gelu" if isinstance(port, MLP) else "linear",
        vision_feature_layer=encoder.config.layer,
        vision_feature_select_strategy="full" if states == cells else "default",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    made: Any = LlavaForConditionalGeneration(config)
    made = made.to(base.dtype).eval()
    made.model.vision_tower.load_state_dict(encoder.model.state_dict())
    _fill(made.model.language_model, base.decoder, table, (port.begin, torch.zeros_like(port.begin), port.end))
    head = base.model.get_output_embeddings()
    made.lm_head.weight[: len(table)] = head.weight
    if head.bias is not None:
        raise not_exact(model, "transformers", "its base has a bias at the head, LLaVA's has none")
    projector = made.model.multi_modal_projector
    if isinstance(port, MLP):
        projector.linear_1.load_state_dict(port.into.state_dict())
        projector.linear_2.load_state_dict(port.out.state_dict())
    else:
        _one_matrix(projector, port)
    made.generation_config = copy.deepcopy(base.model.generation_config)
    made.generation_config.suppress_tokens = [begin, placeholder, end]
    made.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _add_tokens(tokenizer, len(table))
    tokenizer.save_pretrained(folder)
    steps = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": encoder.side},
        "do_center_crop": True,
        "crop_size": {"height": encoder.side, "width": encoder.side},
        "image_mean": encoder.mean.flatten().tolist(),
        "image_std": encoder.std.flatten().tolist(),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(steps, indent=2) + "\n", encoding="utf-8")
    layout = f"{TOKENS[0]}{cells} times {TOKENS[1]}{TOKENS[2]}"
    return [f"a picture is written {layout}; logits of the {len(table)} words are this pack's"]


def _fill(language_model: Any, decoder: nn.Module, table: Tensor, rows: tuple[Tensor, ...]) -> None:
    """The frozen decoder's weights, with three rows more in the table of embeddings."""
    state = dict(decoder.state_dict())
    name = next(k for k, v in state.items() if v.shape == table.shape and v.data_ptr() == table.data_ptr())
    state[name] = torch.cat([table, torch.stack(rows).to(table.dtype).to(table.device)])
    language_model.load_state_dict(state)


def _one_matrix(projector: Any, port: Linear) -> None:
    """LLaVA's first version: one matrix, and the identity behind it."""
    found = [module for module in port.modules() if isinstance(module, nn.Linear)]
    (matrix,) = found
    projector.linear_1.weight.copy_(matrix.weight)
    projector.linear_1.bias.zero_() if matrix.bias is None else projector.linear_1.bias.copy_(matrix.bias)
    nn.init.eye_(projector.linear_2.weight)
    projector.linear_2.bias.zero_()


def _add_tokens(tokenizer: Any, size: int) -> None:
    """The three tokens at the rows behind the table, which may be longer than the tokenizer's own list."""
    fillers = [f"<unused_{i}>" for i in range(size - len(tokenizer))]
    tokenizer.add_tokens(fillers, special_tokens=True)
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
