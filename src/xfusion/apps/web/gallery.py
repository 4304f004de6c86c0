"""The drawing tab: a prompt, and a gallery of drawn pictures, newest first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

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

KEPT = 48
"""Most pictures in a gallery."""


class Gallery:
    """Pictures of prompts. Its handlers return: what is shown, what is kept, and a status line."""

    def __init__(self, controls: Controls):
        self.controls, self.desk, self.limits = controls, controls.desk, controls.limits
        self.clearing = Clearing(controls.desk)

    def lay_out(self) -> None:
        """Create the tab's components."""
        prompt = gr.Textbox(label="Prompt", placeholder="a red heart", max_lines=3, elem_id="prompt")
        settings = self.controls.settings()
        number = gr.Slider(1, self.limits.n, min(4, self.limits.n), step=1, label="Pictures")
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", min_width=80, elem_id="draw")
            self.controls.stop_button()
            clear = gr.Button("Clear", min_width=80)
        status_line = gr.HTML(status(), elem_classes="status", elem_id="draw-status")
        gallery = gr.Gallery(
            label="Pictures, newest first", columns=4, object_fit="contain", elem_classes="pixels",
            elem_id="gallery", buttons=["download", "fullscreen"], format="png", interactive=False,
        )  # fmt: skip
        history = gr.State([])
        inputs = [self.controls.pack, prompt, number, *settings, history]
        outputs = [gallery, history, status_line]
        for trigger in (draw.click, prompt.submit):
            self.controls.wire(trigger, self.draw, inputs, outputs)
        self.controls.wire(clear.click, self.clear, [], outputs)

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """Empty the gallery."""
        self.clearing.clear(request)
        return [], [], status()

    def draw(
        self, pack: str, prompt: str, number: float, seed: str, steps: float, guidance: float, history: list[Any],
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw pictures of a prompt, with previews, and show them before the kept ones."""
        current: dict[int, Any] = {}
        finished: set[int] = set()
        history = [item for item in history if Path(item[0]).exists()]  # old ones are deleted
        status_line = status("waiting …")
        with self.clearing.answering(request):
            try:
                yield gr.skip(), gr.skip(), status_line
                settings = {"n": number, "steps": steps, "guidance": guidance, **seed_setting(seed)}
                for event in self.desk.draw(user_of(request), pack, prompt, **settings):
                    if isinstance(event, Waiting):
                        yield gr.skip(), gr.skip(), progress(event)
                        continue
                    if isinstance(event, Preview):
                        current[event.index] = (
                            self.desk.picture_file(event.picture),
                            f"step {event.done} of {event.total}",
                        )
                        status_line = progress(event)
                    else:
                        current[event.index] = (str(event.path), drawing_text(event))
                        finished.add(event.index)
                        status_line = status(f"drawn: {prompt or 'anything'}")
                    yield [*_in_order(current), *history], gr.skip(), status_line
                history = [*_in_order(current), *history][:KEPT]
                yield history, history, status_line
            except Exception as error:
                if self.clearing.cleared(error, request):
                    return
                done = {i: current[i] for i in finished}
                history = [*_in_order(done), *history][:KEPT]
                yield history, history, complaint(error)


def _in_order(current: dict[int, Any]) -> list[Any]:
    return [current[index] for index in sorted(current)]
