"""Convert conversations of typed blocks, as in transformers' processors and OpenAI's clients, to segments and back.

    [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]}]

A sound is a block too, ``{"type": "audio", "audio": "said.wav"}``. The base tokenizer's own chat template formats the turns,
with pictures and sounds at the places of their blocks. A conversation of text alone therefore has exactly the tokens of the
base's own prompt. `xfusion.generation.conversation` is the other layout, without roles: the layout of a picture and a
question in the training of a pack that saw no conversations.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image as PILImage
from torch import Tensor

from xfusion.data import pictures, sounds
from xfusion.data.sequence import Audio, Image, Sound, Text, XFusionError
from xfusion.generation import Listener, Message, Progress, Segment, Viewer
from xfusion.model import Model
from xfusion.objectives.solvers import Solver

PLACEHOLDER = "\ue000"
"""Placeholder of a picture or a sound in the text of a template: a private-use character, which text must not contain."""
ADDRESSES = ("http://", "https://")
Blocks = list[dict[str, Any]]


class Processor:
    """Accepts and returns typed blocks, for one model."""

    def __init__(self, model: Model):
        self.model = model

    def messages(self, conversation: Seq[Mapping[str, Any]]) -> list[Message]:
        """Convert turns to the form that `Model.answer` accepts: blocks become text, opened pictures and sounds.

        Args:
            conversation: turns with ``role`` and ``content``. The content is text, None, or blocks ``{"type": "text", "text"}``,
                ``{"type": "image", "image"}`` and ``{"type": "audio", "audio"}``. A picture is a Pillow image. A sound is a
                `Sound`, or floats ``[n]`` from -1 to 1 at the model's sample rate, as transformers' processors accept them.
                Either may be a file or a data URL, and then the key may also be ``path`` or ``url``. ``{"type": "image"}``
                and ``{"type": "audio"}`` alone request a picture to draw and a sound to generate.

        Raises:
            XFusionError: a turn has no role, a block has another type, or a picture or a sound cannot be read.
        """
        converted_turns: list[Message] = []
        for number, turn in enumerate(conversation, 1):
            if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
                raise XFusionError(f'turn {number} has no role: write {{"role": "user", "content": ...}}')
            content = turn.get("content")
            blocks = (
                [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
            )  # None says nothing
            if not isinstance(blocks, (list, tuple)):
                raise XFusionError(
                    f"the content of turn {number} is {type(blocks).__name__}: give text or a list of blocks"
                )
            converted_turns.append({"role": turn["role"], "content": [self._segment(block) for block in blocks]})
        return converted_turns

    def __call__(self, conversation: Seq[Mapping[str, Any]]) -> list[Segment]:
        """A conversation as segments for `Model.generate`, in the base tokenizer's own chat template.

        A request for a picture or a sound must be in the last turn. It starts the answer, after the template's own
        generation prompt.

        Raises:
            XFusionError: see `messages`; or the template refuses the roles, or a request is in another turn.
        """
        turns = self.messages(conversation)
        media_inputs: list[Any] = []
        requests: list[Any] = []
        text_turns: list[dict[str, str]] = []
        for number, turn in enumerate(turns):
            text = ""
            for segment in turn["content"]:
                if isinstance(segment, (Image, Audio)):
                    if number < len(turns) - 1:
                        description = "picture to draw" if isinstance(segment, Image) else "sound to make"
                        raise XFusionError(
                            f"a {description} stands in the last turn alone: give the others as they were made"
                        )
                    requests.append(segment)
                elif isinstance(segment, str):
                    if PLACEHOLDER in segment:
                        raise XFusionError(
                            f"the words of turn {number + 1} hold the private character U+E000: leave it out"
                        )
                    text += segment
                else:
                    media_inputs.append(segment)
                    text += PLACEHOLDER
            text_turns.append({"role": turn["role"], "content": text})
        parts = self.model.backbone.chat_text(text_turns).split(PLACEHOLDER)
        if len(parts) != len(media_inputs) + 1:
            raise XFusionError(
                f"the chat template of {self.model.backbone.source} drops or repeats turns with pictures or sounds"
            )
        segments: list[Segment] = []
        for number, part in enumerate(parts):
            if part:
                segments.append(Text(ids=self.model.backbone.read_chat(part)))
            if number < len(media_inputs):
                segments.append(media_inputs[number])
        return [*segments, *requests]

    def blocks(self, answer: Seq[str | PILImage.Image | Tensor]) -> Blocks:
        """Generated segments as blocks; a generated sound is given as the codec's frames, ``{"type": "audio", "frames"}``."""
        segment_blocks: Blocks = []
        for segment in answer:
            kind = "text" if isinstance(segment, str) else "image" if isinstance(segment, PILImage.Image) else "audio"
            segment_blocks.append({"type": kind, "frames" if kind == "audio" else kind: segment})
        return segment_blocks

    def reply(
        self,
        conversation: Seq[Mapping[str, Any]],
        *,
        seed: int = 0,
        seeds: Seq[int] | None = None,
        steps: int = 25,
        guidance: float | None = None,
        solver: Solver | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        schema: dict[str, Any] | None = None,
        one_line: bool = False,
        progress: Progress | None = None,
        listen: Listener | None = None,
        show: Viewer | None = None,
    ) -> dict[str, Any]:
        """Generate the assistant's next turn, to append to the conversation; see `xfusion.generation.generate`."""
        segments = self.model.generate(
            self(conversation),
            seed=seed,
            seeds=seeds,
            steps=steps,
            guidance=guidance,
            solver=solver,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            schema=schema,
            one_line=one_line,
            progress=progress,
            listen=listen,
            show=show,
        )
        return {"role": "assistant", "content": self.blocks(segments)}

    def _segment(self, block: Any) -> Any:
        if not isinstance(block, Mapping):
            raise XFusionError(
                f'{block!r:.60} ({type(block).__name__}) is no block: write {{"type": "text", "text": ...}}, or a type of'
                " image or audio"
            )
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            return block["text"]
        if kind == "image":
            picture = _block_content(block, "image")
            if picture is None:
                return Image(size=block.get("size"))
            return (
                picture
                if isinstance(picture, PILImage.Image)
                else _read_source(picture, "picture", pictures.read, pictures.decode)
            )
        if kind == "audio":
            if "frames" in block:
                raise XFusionError(
                    "a sound that was made is frames of a codec, of which nothing makes one to be heard: leave it out"
                )
            sound = _block_content(block, "audio")
            if sound is None:
                return Audio(seconds=block.get("seconds"))
            if isinstance(sound, (numpy.ndarray, Tensor)):
                return Sound(samples=torch.as_tensor(sound), rate=self.model.audio.codec.rate)
            return sound if isinstance(sound, Sound) else _read_source(sound, "sound", sounds.read_sound, sounds.decode)
        raise XFusionError(f"a block of type {kind!r} is not one of text (with words), image and audio")


def _block_content(block: Mapping[str, Any], key: str) -> Any:
    """The content of a block, under any of the keys that transformers uses for it."""
    return next((block[name] for name in (key, "path", "url") if block.get(name) is not None), None)


def _read_source(
    source: Any, description: str, read_file: Callable[[Path], Any], decode: Callable[[bytes, str], Any]
) -> Any:
    """Read a file or a data URL."""
    if not isinstance(source, (str, Path)):
        raise XFusionError(
            f"a {description} is given as {type(source).__name__}: give its file, a data URL, or the {description} itself"
        )
    text = str(source)
    if text.startswith(ADDRESSES):
        raise XFusionError(
            f"the {description} {text[:100]} is an address, and none is fetched: give a file or a data URL"
        )
    if not text.startswith("data:"):
        return read_file(Path(source))
    try:
        return decode(base64.b64decode(text.partition(",")[2], validate=True), f"the data URL of a {description}")
    except binascii.Error as error:
        raise XFusionError(f"the data URL of a {description} is not base64: {error}") from error
