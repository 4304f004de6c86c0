"""The drawing tab: a prompt, and a gallery of drawn pictures, newest first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from xfusion.apps.web.controls import Clearing, Controls, complaint, drawn_as, progress, seeded, status, who
from xfusion.apps.web.desk import Preview

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
        line = gr.HTML(status(), elem_classes="status", elem_id="draw-status")
        gallery = gr.Gallery(
            label="Pictures, newest first", columns=4, object_fit="contain", elem_classes="pixels",
            elem_id="gallery", buttons=["download", "fullscreen"], format="png", interactive=False,
        )  # fmt: skip
        kept = gr.State([])
        inputs = [self.controls.pack, prompt, number, *settings, kept]
        outputs = [gallery, kept, line]
        for trigger in (draw.click, prompt.submit):
            self.controls.wire(trigger, self.draw, inputs, outputs)
        self.controls.wire(clear.click, self.clear, [], outputs)

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """Empty the gallery."""
        self.clearing.clear(request)
        return [], [], status()

    def draw(
        self, pack: str, prompt: str, number: float, seed: str, steps: float, guidance: float, kept: list[Any],
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw pictures of a prompt, with previews, and show them before the kept ones."""
        coming: dict[int, Any] = {}
        whole: set[int] = set()
        kept = [one for one in kept if Path(one[0]).exists()]  # old ones are deleted
        line = status("waiting …")
        with self.clearing.answering(request):
            try:
                yield gr.skip(), gr.skip(), line
                settings = {"n": number, "steps": steps, "guidance": guidance, **seeded(seed)}
                for found in self.desk.draw(who(request), pack, prompt, **settings):
                    if isinstance(found, Preview):
                        coming[found.index] = (self.desk.shown(found.picture), f"step {found.done} of {found.total}")
                        line = progress(found)
                    else:
                        coming[found.index] = (str(found.path), drawn_as(found))
                        whole.add(found.index)
                        line = status(f"drawn: {prompt or 'anything'}")
                    yield [*_in_order(coming), *kept], gr.skip(), line
                kept = [*_in_order(coming), *kept][:KEPT]
                yield kept, kept, line
            except Exception as error:
                if self.clearing.cleared(error, request):
                    return
                done = {i: coming[i] for i in whole}
                kept = [*_in_order(done), *kept][:KEPT]
                yield kept, kept, complaint(error)


def _in_order(coming: dict[int, Any]) -> list[Any]:
    return [coming[index] for index in sorted(coming)]
