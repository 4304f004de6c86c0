"""Export as LlavaForConditionalGeneration: a vision transformer, a projector, and the frozen decoder.

The projector is one matrix as in LLaVA (arXiv 2304.08485, section 4.1) or an MLP of two as in LLaVA 1.5 (arXiv 2310.03744).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from torch import nn

from xfusion.exports.base import not_exact
from xfusion.exports.transformers.decoder import BEGIN, END, fill_decoder, mechanism, num_words, save, text_config
from xfusion.fusion.connectors.linear import Linear
from xfusion.fusion.connectors.mlp import MLP
from xfusion.fusion.prefix import Prefix
from xfusion.modalities.codecs.features import Features
from xfusion.modalities.encoders.vision_transformer import VisionTransformer
from xfusion.modalities.image import ImageModality
from xfusion.model import Model
from xfusion.storage import write_json

PLACEHOLDER = "<image>"


def is_like(model: Model) -> bool:
    """Whether a model is built like LLaVA: pictures enter as a prefix, through one matrix or an MLP."""
    return (
        isinstance(mechanism(model), Prefix)
        and isinstance(model.port, (Linear, MLP))
        and isinstance(model.modality, ImageModality)
    )


@torch.no_grad()
def export(model: Model, folder: Path) -> list[str]:
    """Write a model that ``LlavaForConditionalGeneration.from_pretrained(folder)`` loads, with tokenizer and image processor.

    Args:
        model: a model for which `is_like` is true.
        folder: output folder; it must exist.

    Returns:
        notes for users: how a prompt is written, and where the image processor differs.

    Raises:
        XFusionError: LLaVA cannot compute the same: the encoder is not a vision transformer of transformers, or has more than
            one token besides its patches; tokens are not one per feature, in causal order, at running positions; or the base
            has a head or a tokenizer that the class does not support.
    """
    port, codec, image = model.port, model.image.codec, model.image
    if not isinstance(codec, Features) or not isinstance(codec.encoder, VisionTransformer):
        reason = "its encoder is not a vision transformer of transformers, which LlavaForConditionalGeneration needs"
        raise not_exact(model, "transformers", reason)
    if (
        image.patch != 1
        or image.patch_width != 1
        or image.config.order != "causal"
        or image.config.position != "running"
    ):
        raise not_exact(model, "transformers", "LLaVA has a token per feature, in causal order, at running positions")
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    encoder, vocabulary_size = codec.encoder, num_words(model)
    num_patches = encoder.cells**2
    blank = torch.zeros(1, 3, encoder.side, encoder.side)
    num_states = encoder.model(pixel_values=blank, output_hidden_states=True).hidden_states[-1].shape[1]
    if num_states not in (num_patches, num_patches + 1):
        raise not_exact(
            model,
            "transformers",
            f"its encoder has {num_states - num_patches} tokens besides its patches, LLaVA 0 or 1",
        )
    text_settings = text_config(model)
    if text_settings.tie_word_embeddings and not hasattr(model.backbone.decoder, "embed_tokens"):
        decoder = type(model.backbone.decoder).__name__
        raise not_exact(model, "transformers", f"LLaVA ties its head to embed_tokens, which {decoder} does not have")
    config = LlavaConfig(
        vision_config=encoder.model.config,
        text_config=text_settings,
        image_token_index=vocabulary_size + 1,
        image_seq_length=num_patches,
        projector_hidden_act="gelu" if isinstance(port, MLP) else "linear",
        vision_feature_layer=encoder.config.layer,
        vision_feature_select_strategy="full" if num_states == num_patches else "default",
        tie_word_embeddings=bool(text_settings.tie_word_embeddings),
    )
    exported = fill_decoder(LlavaForConditionalGeneration(config), model)
    exported.model.vision_tower.load_state_dict(encoder.model.state_dict())
    projector = exported.model.multi_modal_projector
    if isinstance(port, MLP):
        projector.linear_1.load_state_dict(port.into.state_dict())
        projector.linear_2.load_state_dict(port.out.state_dict())
    else:
        _set_projector(projector, port)
    save(exported, model, folder, "image", PLACEHOLDER)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": PLACEHOLDER,
        "patch_size": encoder.config.shape.patch_size,
        "num_additional_image_tokens": num_states - num_patches,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    write_json(folder / "processor_config.json", processor)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessorPil",
        "do_resize": True,
        "resample": int(PILImage.Resampling.LANCZOS),
        "size": {"shortest_edge": encoder.side},
        "do_center_crop": True,
        "crop_size": {"height": encoder.side, "width": encoder.side},
        "image_mean": encoder.mean.flatten().tolist(),
        "image_std": encoder.std.flatten().tolist(),
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    return [
        f"a picture is written {BEGIN}{num_patches} times {PLACEHOLDER}{END}, and a question behind it ends in a new line: the"
        f" processor's chat template writes both; logits of the {vocabulary_size} words are this pack's",
        f"its processor resizes a picture to {encoder.side} px before it cuts the middle square, and this pack behind it (read"
        f" at {image.sizes[0]} px): the pixels are the same where it is square, opaque and {encoder.side} px are read",
    ]


def _set_projector(projector: Any, port: nn.Module) -> None:
    """Set the projector to the port's one matrix ``[D, F]`` followed by the identity, as in the first LLaVA."""
    (matrix,) = (module for module in port.modules() if isinstance(module, nn.Linear))
    projector.linear_1.weight.copy_(matrix.weight)
    projector.linear_1.bias.zero_() if matrix.bias is None else projector.linear_1.bias.copy_(matrix.bias)
    nn.init.eye_(projector.linear_2.weight)
    projector.linear_2.bias.zero_()
