"""The chat tab: text and pictures in, text and pictures out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image as PILImage

from xfusion.apps.chat import with_segment
from xfusion.apps.server.answers import Refused
from xfusion.apps.web.controls import (
    Clearing,
    Controls,
    complaint,
    drawing_text,
    progress,
    seed_setting,
    status,
    user_of,
)
from xfusion.apps.web.desk import Preview, Waiting


class Chat:
    """A conversation. Its handlers return: what is shown, the messages so far, the input box, and a status line."""

    def __init__(self, controls: Controls):
        self.controls, self.desk, self.limits = controls, controls.desk, controls.limits
        self.clearing = Clearing(controls.desk)

    def lay_out(self) -> None:
        """Create the tab's components."""
        can_decide = any(model.opening is not None for model in self.desk.models.values())
        chatbot = gr.Chatbot(
            height=420,
            label="Conversation",
            buttons=["copy"],
            feedback_options=None,
            elem_id="conversation",
            elem_classes="pixels",
            render_markdown=False,
            placeholder="Say something, drop a picture into the message, or have one drawn.",
        )
        history = gr.State([])
        status_line = gr.HTML(status(), elem_classes="status", elem_id="chat-status")
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
            draw = gr.Button("Draw it", min_width=80, visible="draw" in self.controls.abilities)
            self.controls.stop_button()
            new = gr.Button("New conversation", min_width=80)
        with gr.Accordion("Settings", open=False):
            settings = self.controls.settings()
            draw_when_asked = gr.Checkbox(
                True, label="Draw when asked", info="else only by the button", visible=can_decide, elem_id="asked"
            )
            with gr.Row():
                max_tokens = gr.Slider(
                    1, self.limits.tokens, min(128, self.limits.tokens), step=1, label="Longest answer"
                )
                temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the likeliest word")
        outputs, inputs = [chatbot, history, message, status_line], [self.controls.pack, message, history, *settings]
        for trigger in (say.click, message.submit):
            self.controls.wire(trigger, self.say, [*inputs, draw_when_asked, max_tokens, temperature], outputs)
        self.controls.wire(draw.click, self.draw, inputs, outputs)
        for trigger in (new.click, chatbot.clear):  # an answer in progress must not restore the old conversation
            self.controls.wire(trigger, self.forget, [], outputs)

    def forget(self, request: gr.Request) -> tuple[Any, ...]:
        """Start a new conversation."""
        self.clearing.clear(request)
        return [], [], None, status()

    def _with_message(self, pack: str, message: dict[str, Any] | None, history: list[Any]) -> tuple[str, list[Any]]:
        """The text of a message, and the conversation with the message appended."""
        text = str((message or {}).get("text") or "").strip()
        files = (message or {}).get("files") or []
        if not text and not files:
            raise Refused(400, "say something first")
        if files and "caption" not in self.desk.model(pack).capabilities:
            raise Refused(400, "this pack reads no pictures: take the picture out and send the words alone")
        for file in files:
            history = with_segment(history, self.desk.open_upload(file, pack))
        return text, with_segment(history, text) if text else history

    def say(
        self, pack: str, message: Any, history: Any, seed: str, steps: float, guidance: float, draw_when_asked: bool,
        max_tokens: float, temperature: float, request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """The streamed answer to a message: text, or a picture if one is requested."""
        with self.clearing.answering(request):
            try:
                _, messages = self._with_message(pack, message, history)
                yield self._chatbot_messages(messages), history, None, status("thinking …")
                settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, **seed_setting(seed)}
                if draw_when_asked and self.desk.model(pack).opening is not None:
                    settings |= {"draw": "auto", "steps": steps, "guidance": guidance}
                answer: list[Any] = []
                for event in self.desk.say(user_of(request), pack, messages, **settings):
                    if isinstance(event, Waiting):
                        yield *[gr.skip()] * 3, progress(event)
                        continue
                    answer = [event.picture] if isinstance(event, Preview) else event
                    status_line = progress(event) if isinstance(event, Preview) else status("answering …")
                    yield self._chatbot_messages([*messages, _turn(*answer)]), history, gr.skip(), status_line
                messages = [*messages, _turn(*answer)]
                yield self._chatbot_messages(messages), messages, gr.skip(), status()
            except Exception as error:
                if not self.clearing.cleared(error, request):
                    yield self._chatbot_messages(history), history, message, complaint(error)

    def draw(
        self, pack: str, message: Any, history: Any, seed: str, steps: float, guidance: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """A picture of a message's text, with previews."""
        with self.clearing.answering(request):
            try:
                text, messages = self._with_message(pack, message, history)
                yield self._chatbot_messages(messages), history, None, status("drawing …")
                settings = {"steps": steps, "guidance": guidance, **seed_setting(seed)}
                for event in self.desk.draw(user_of(request), pack, text, **settings):
                    if isinstance(event, Waiting):
                        yield *[gr.skip()] * 3, progress(event)
                    elif isinstance(event, Preview):
                        yield (
                            self._chatbot_messages([*messages, _turn(event.picture)]),
                            history,
                            gr.skip(),
                            progress(event),
                        )
                    else:
                        messages = [*messages, _turn(event.picture)]
                        yield self._chatbot_messages(messages), messages, gr.skip(), status(drawing_text(event))
            except Exception as error:
                if not self.clearing.cleared(error, request):
                    yield self._chatbot_messages(history), history, message, complaint(error)

    def _chatbot_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A conversation in the format of gradio's Chatbot."""
        return [
            {"role": turn["role"], "content": segment if isinstance(segment, str) else self._image(segment)}
            for turn in messages
            for segment in turn["content"]
        ]

    def _image(self, picture: PILImage.Image) -> gr.Image:
        return gr.Image(self.desk.picture_file(picture), buttons=["download"])


def _turn(*segments: str | PILImage.Image) -> dict[str, Any]:
    return {"role": "assistant", "content": list(segments)}
