"""The chat tab: text and pictures in, text and pictures out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image as PILImage

from xfusion.apps.chat import with_segment
from xfusion.apps.server.answers import Refused
from xfusion.apps.web.controls import Clearing, Controls, complaint, drawn_as, progress, seeded, status, who
from xfusion.apps.web.desk import Preview


class Chat:
    """A conversation. Its handlers return: what is shown, the messages so far, the input box, and a status line."""

    def __init__(self, controls: Controls):
        self.controls, self.desk, self.limits = controls, controls.desk, controls.limits
        self.clearing = Clearing(controls.desk)

    def lay_out(self) -> None:
        """Create the tab's components."""
        decides = any(model.opening is not None for model in self.desk.models.values())
        talk = gr.Chatbot(
            height=420,
            label="Conversation",
            buttons=["copy"],
            feedback_options=None,
            elem_id="conversation",
            elem_classes="pixels",
            render_markdown=False,
            placeholder="Say something, drop a picture into the message, or have one drawn.",
        )
        said = gr.State([])
        line = gr.HTML(status(), elem_classes="status", elem_id="chat-status")
        message = gr.MultimodalTextbox(
            label="Message",
            placeholder="Message, and pictures",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            elem_id="message",
            max_plain_text_length=self.limits.characters,
        )
        with gr.Row():
            say = gr.Button("Say", variant="primary", min_width=80, elem_id="say")
            draw = gr.Button("Draw it", min_width=80, visible="draw" in self.controls.able)
            self.controls.stop_button()
            new = gr.Button("New conversation", min_width=80)
        with gr.Accordion("Settings", open=False):
            settings = self.controls.settings()
            asked = gr.Checkbox(
                True, label="Draw when asked", info="else only by the button", visible=decides, elem_id="asked"
            )
            with gr.Row():
                longest = gr.Slider(1, self.limits.tokens, min(128, self.limits.tokens), step=1, label="Longest answer")
                temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the likeliest word")
        outputs, inputs = [talk, said, message, line], [self.controls.pack, message, said, *settings]
        for trigger in (say.click, message.submit):
            self.controls.wire(trigger, self.say, [*inputs, asked, longest, temperature], outputs)
        self.controls.wire(draw.click, self.draw, inputs, outputs)
        for trigger in (new.click, talk.clear):  # an answer in progress must not restore the old conversation
            self.controls.wire(trigger, self.forget, [], outputs)

    def forget(self, request: gr.Request) -> tuple[Any, ...]:
        """Start a new conversation."""
        self.clearing.clear(request)
        return [], [], None, status()

    def _heard(self, pack: str, message: dict[str, Any] | None, said: list[Any]) -> tuple[str, list[Any]]:
        """The text of a message, and the conversation with the message appended."""
        words = str((message or {}).get("text") or "").strip()
        files = (message or {}).get("files") or []
        if not words and not files:
            raise Refused(400, "say something first")
        for file in files:
            said = with_segment(said, self.desk.opened(file, pack))
        return words, with_segment(said, words) if words else said

    def say(
        self, pack: str, message: Any, said: Any, seed: str, steps: float, guidance: float, asked: bool,
        longest: float, temperature: float, request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """The streamed answer to a message: text, or a picture if one is requested."""
        with self.clearing.answering(request):
            try:
                _, messages = self._heard(pack, message, said)
                yield self._shown(messages), said, None, status("thinking …")
                settings: dict[str, Any] = {"max_tokens": longest, "temperature": temperature, **seeded(seed)}
                if asked and self.desk.model(pack).opening is not None:
                    settings |= {"draw": "auto", "steps": steps, "guidance": guidance}
                answer: list[Any] = []
                for found in self.desk.say(who(request), pack, messages, **settings):
                    answer = [found.picture] if isinstance(found, Preview) else found
                    line = progress(found) if isinstance(found, Preview) else status("answering …")
                    yield self._shown([*messages, _turn(*answer)]), said, gr.skip(), line
                messages = [*messages, _turn(*answer)]
                yield self._shown(messages), messages, gr.skip(), status()
            except Exception as error:
                if not self.clearing.cleared(error, request):
                    yield self._shown(said), said, message, complaint(error)

    def draw(
        self, pack: str, message: Any, said: Any, seed: str, steps: float, guidance: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """A picture of a message's text, with previews."""
        with self.clearing.answering(request):
            try:
                words, messages = self._heard(pack, message, said)
                yield self._shown(messages), said, None, status("drawing …")
                settings = {"steps": steps, "guidance": guidance, **seeded(seed)}
                for found in self.desk.draw(who(request), pack, words, **settings):
                    if isinstance(found, Preview):
                        yield self._shown([*messages, _turn(found.picture)]), said, gr.skip(), progress(found)
                    else:
                        messages = [*messages, _turn(found.picture)]
                        yield self._shown(messages), messages, gr.skip(), status(drawn_as(found))
            except Exception as error:
                if not self.clearing.cleared(error, request):
                    yield self._shown(said), said, message, complaint(error)

    def _shown(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A conversation in the format of gradio's Chatbot."""
        return [
            {"role": turn["role"], "content": segment if isinstance(segment, str) else self._image(segment)}
            for turn in messages
            for segment in turn["content"]
        ]

    def _image(self, picture: PILImage.Image) -> gr.Image:
        return gr.Image(self.desk.shown(picture), buttons=["download"])


def _turn(*segments: str | PILImage.Image) -> dict[str, Any]:
    return {"role": "assistant", "content": list(segments)}
