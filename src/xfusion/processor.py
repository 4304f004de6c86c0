"""Conversations of typed blocks, as transformers' processors and OpenAI's clients write them, to segments and back.

    [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]}]

The base tokenizer's own chat template lays the turns out; pictures stand in it where their blocks stood. Words alone are
then, token for token, what the base is asked. `xfusion.generation.conversation` is the other layout, without roles: how a
picture and a question stood in the training of a pack that saw no conversations.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from xfusion.data import pictures
from xfusion.data.sequence import Image, Text, XFusionError
from xfusion.generation import Message, Segment
from xfusion.model import Model

MARK = "\ue000"
"""Where a picture stands in the text of a template: a private-use character, which no words may hold."""
Blocks = list[dict[str, Any]]


class Processor:
    """Typed blocks in and out, for one model."""

    def __init__(self, model: Model):
        self.model = model

    def messages(self, conversation: Seq[Mapping[str, Any]]) -> list[Message]:
        """Turns as `Model.answer` takes them: words and opened pictures in the place of blocks.

        Args:
            conversation: ``role``, and ``content``: words, or blocks ``{"type": "text", "text"}`` and ``{"type": "image",
                "image"}``, the latter a picture or its file. ``{"type": "image"}`` alone is a picture to draw.

        Raises:
            XFusionError: a block of another kind, or a picture that cannot be read.
        """
        out: list[Message] = []
        for turn in conversation:
            content = turn["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            out.append({"role": turn["role"], "content": [_segment(block) for block in blocks]})
        return out

    def __call__(self, conversation: Seq[Mapping[str, Any]]) -> list[Segment]:
        """A conversation as segments for `Model.generate`, in the base tokenizer's own chat template.

        A picture to draw must stand in the last turn; it opens the answer, behind the template's own opening of it.

        Raises:
            XFusionError: see `messages`; or the template refuses the roles, or a picture to draw stands elsewhere.
        """
        turns = self.messages(conversation)
        seen: list[Any] = []
        drawn: list[Any] = []
        words: list[dict[str, str]] = []
        for number, turn in enumerate(turns):
            text = ""
            for segment in turn["content"]:
                if isinstance(segment, Image):
                    if number < len(turns) - 1:
                        raise XFusionError("a picture to draw stands in the last turn alone: give the others as drawn")
                    drawn.append(segment)
                elif isinstance(segment, str):
                    if MARK in segment:
                        raise XFusionError(
                            f"the words of turn {number + 1} hold the private character U+E000: leave it out"
                        )
                    text += segment
                else:
                    seen.append(segment)
                    text += MARK
            words.append({"role": turn["role"], "content": text})
        parts = self.model.backbone.chat_text(words).split(MARK)
        if len(parts) != len(seen) + 1:
            raise XFusionError(
                f"the chat template of {self.model.backbone.source} drops or repeats turns with pictures"
            )
        out: list[Segment] = []
        for number, part in enumerate(parts):
            if part:
                out.append(Text(ids=self.model.backbone.read_chat(part)))
            if number < len(seen):
                out.append(seen[number])
        return [*out, *drawn]

    def blocks(self, answer: Seq[str | PILImage.Image]) -> Blocks:
        """Generated segments as blocks."""
        return [
            {"type": "text", "text": segment} if isinstance(segment, str) else {"type": "image", "image": segment}
            for segment in answer
        ]

    def reply(self, conversation: Seq[Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
        """The assistant's next turn, to be put behind the conversation; settings are `Model.generate`'s."""
        return {"role": "assistant", "content": self.blocks(self.model.generate(self(conversation), **settings))}


def _segment(block: Mapping[str, Any]) -> Any:
    kind = block.get("type")
    if kind == "text" and isinstance(block.get("text"), str):
        return block["text"]
    if kind == "image":
        picture = block.get("image")
        if picture is None:
            return Image(size=block.get("size"))
        return picture if isinstance(picture, PILImage.Image) else pictures.read(Path(picture))
    raise XFusionError(f"a block of type {kind!r} is not one of text (with words) and image")
