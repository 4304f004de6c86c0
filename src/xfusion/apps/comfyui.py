"""Nodes for ComfyUI: load a pack, draw, edit by a mask, and describe pictures or sounds.

A file in ComfyUI's folder ``custom_nodes`` that imports `NODE_CLASS_MAPPINGS` and `NODE_DISPLAY_NAME_MAPPINGS` from here makes
them known there. ComfyUI itself is not imported. Its pictures are float tensors ``[batch, height, width, channels]`` from 0 to 1,
its masks ``[batch, height, width]``, where 1 marks what is drawn anew, and its sounds waveforms ``[batch, channels, samples]``
with a sample rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from PIL import Image as PILImage
from torch import Tensor

from xfusion.apps.commands.base import load_model
from xfusion.data.sequence import Sound, XFusionError
from xfusion.model import Model

MODEL = "XFUSION_MODEL"
"""Name of the sockets that a model connects."""
_PROMPT = ("STRING", {"multiline": True, "default": "a red heart"})
_DRAWING = {
    "seed": ("INT", {"default": 0, "min": 0, "max": 2**53 - 1, "control_after_generate": True}),
    "steps": ("INT", {"default": 25, "min": 1, "max": 1000}),
    "guidance": (
        "FLOAT",
        {
            "default": -1.0,
            "min": -1.0,
            "max": 100.0,
            "step": 0.1,
            "tooltip": "1 is off; a negative one is the pack's own",
        },
    ),
}
_WORDS = {
    "question": ("STRING", {"multiline": True, "default": ""}),
    "max_tokens": ("INT", {"default": 32, "min": 1, "max": 4096}),
}


class Node:
    """What all nodes share."""

    CATEGORY = "xfusion"
    FUNCTION = "run"


class Load(Node):
    """Load a pack on its frozen base."""

    DESCRIPTION = (
        "A pack on its frozen base: a folder, a shipped pack's name or a hub id; a+b means two packs together."
    )
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"pack": ("STRING", {"default": "emoji"}), "device": ("STRING", {"default": "auto"})}}

    def run(self, pack: str, device: str) -> tuple[Model]:
        """Load it; ComfyUI keeps the model until an input changes."""
        return (load_model(pack.strip(), device=device.strip()),)


class TextToImage(Node):
    """Draw pictures of a prompt."""

    DESCRIPTION = "Draws a prompt; picture i of the batch has the seed seed + i."
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        size = ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": "Side in pixels; 0 is the trained one"})
        batch = ("INT", {"default": 1, "min": 1, "max": 64})
        return {"required": {"model": (MODEL,), "prompt": _PROMPT, **_DRAWING, "size": size, "batch": batch}}

    def run(
        self, model: Model, prompt: str, seed: int, steps: int, guidance: float, size: int, batch: int
    ) -> tuple[Tensor]:
        """Draw them, ``[batch, size, size, 3]``."""
        pictures = model.draw([prompt] * batch, size=size or None, seed=seed, steps=steps, guidance=_own(guidance))
        return (_tensor(pictures),)


class Edit(Node):
    """Draw a part of pictures anew."""

    DESCRIPTION = (
        "Draws anew what the mask marks; the prompt describes the whole picture. Picture i has the seed seed + i."
    )
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        media = {"image": ("IMAGE",), "mask": ("MASK",)}
        return {"required": {"model": (MODEL,), **media, "prompt": _PROMPT, **_DRAWING}}

    def run(
        self, model: Model, image: Tensor, mask: Tensor, prompt: str, seed: int, steps: int, guidance: float
    ) -> tuple[Tensor]:
        """Edit them; one mask may serve all pictures, or each has its own."""
        pictures, masks = _pictures(image), _pictures(mask.reshape(-1, *mask.shape[-2:], 1))
        if len(masks) == 1:
            masks *= len(pictures)
        if len(masks) != len(pictures):
            raise XFusionError(f"{len(masks)} masks for {len(pictures)} pictures: give one, or one each")
        edited = [
            model.inpaint(picture, redraw, prompt, seed=seed + i, steps=steps, guidance=_own(guidance))
            for i, (picture, redraw) in enumerate(zip(pictures, masks, strict=True))
        ]
        return (_tensor(edited),)


class ImageToText(Node):
    """Describe pictures, or answer a question about each."""

    DESCRIPTION = "Describes each picture, or answers the question about it."
    RETURN_TYPES = ("STRING",)
    OUTPUT_IS_LIST = (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": (MODEL,), "image": ("IMAGE",), **_WORDS}}

    def run(self, model: Model, image: Tensor, question: str, max_tokens: int) -> tuple[list[str]]:
        """A text for each picture."""
        return (model.caption(_pictures(image), question=question, max_tokens=max_tokens),)


class SoundToText(Node):
    """Describe sounds, or answer a question about each."""

    DESCRIPTION = "Describes each sound, or answers the question about it."
    RETURN_TYPES = ("STRING",)
    OUTPUT_IS_LIST = (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": (MODEL,), "audio": ("AUDIO",), **_WORDS}}

    def run(self, model: Model, audio: dict[str, Any], question: str, max_tokens: int) -> tuple[list[str]]:
        """A text for each sound, whose channels are mixed."""
        sounds = [Sound(samples=wave.float().mean(0).cpu(), rate=audio["sample_rate"]) for wave in audio["waveform"]]
        return (model.caption(sounds, question=question, max_tokens=max_tokens),)


def _own(guidance: float) -> float | None:
    return None if guidance < 0 else guidance


def _tensor(pictures: Sequence[PILImage.Image]) -> Tensor:
    """Pictures of one size as ComfyUI has them, float32 ``[batch, height, width, 3]`` from 0 to 1."""
    return torch.stack([torch.from_numpy(numpy.array(picture.convert("RGB"))) for picture in pictures]).float() / 255


def _pictures(image: Tensor) -> list[PILImage.Image]:
    """Pictures ``[batch, height, width, channels]``, from 0 to 1; RGB of three channels or more, grey of one."""
    levels = (image[..., :3].float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return [PILImage.fromarray(picture.squeeze(-1).numpy()) for picture in levels]


NODE_CLASS_MAPPINGS = {
    "XFusionLoad": Load,
    "XFusionTextToImage": TextToImage,
    "XFusionImageToText": ImageToText,
    "XFusionEdit": Edit,
    "XFusionSoundToText": SoundToText,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "XFusionLoad": "XFusion: load a pack",
    "XFusionTextToImage": "XFusion: text to image",
    "XFusionImageToText": "XFusion: image to text",
    "XFusionEdit": "XFusion: edit by mask",
    "XFusionSoundToText": "XFusion: sound to text",
}
