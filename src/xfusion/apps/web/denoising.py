"""The tab that looks inside: the denoising of a picture, and what its tokens attend to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from xfusion.apps.web import heat
from xfusion.apps.web.controls import Controls, complaint, progress, seed_setting, status, user_of
from xfusion.apps.web.desk import Preview, Waiting

ALL_WORDS = "all words"


class Denoising:
    """Clean estimates of a picture, step by step, and heat maps of its attention."""

    def __init__(self, controls: Controls):
        self.controls, self.desk = controls, controls.desk

    def lay_out(self) -> None:
        """Create the tab's components."""
        gr.Markdown(
            "How a picture comes out of noise, and how much its parts look at each word, layer by layer "
            "(the weights of the attention, a mean over its heads)."
        )
        prompt = gr.Textbox(label="Prompt", placeholder="a red heart", max_lines=3, elem_id="look-prompt")
        settings = self.controls.settings(steps=16)
        with gr.Row():
            look = gr.Button("Look", variant="primary", min_width=80, elem_id="look")
            self.controls.stop_button()
        status_line = gr.HTML(status(), elem_classes="status", elem_id="look-status")
        gallery: dict[str, Any] = {"object_fit": "contain", "format": "png", "interactive": False, "buttons": []}
        strip = gr.Gallery(
            label="On its way from noise: estimates of the picture", columns=9, elem_id="strip", elem_classes="pixels",
            **gallery,
        )  # fmt: skip
        word = gr.Dropdown([ALL_WORDS], value=ALL_WORDS, label="Heat maps: how much looks at", interactive=True)
        maps = gr.Gallery(label="By layer", columns=6, elem_id="maps", **gallery)
        shares = gr.HTML(elem_id="shares")
        result = gr.State(None, time_to_live=3600)
        inputs = [self.controls.pack, prompt, *settings]
        for trigger in (look.click, prompt.submit):
            self.controls.wire(trigger, self.look, inputs, [strip, word, maps, shares, result, status_line])
        self.controls.wire(word.input, self.maps, [result, word], [maps])

    def look(
        self, pack: str, prompt: str, seed: str, steps: float, guidance: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Streamed estimates, then the words, the maps over all words, the table of shares, the result, and a status line."""
        strip: list[Any] = []
        unchanged = [gr.skip()] * 4
        try:
            yield [], *unchanged, status("waiting …")
            settings = {"steps": steps, "guidance": guidance, **seed_setting(seed)}
            for event in self.desk.look(user_of(request), pack, prompt, **settings):
                if isinstance(event, Waiting):
                    yield strip, *unchanged, progress(event)
                    continue
                if isinstance(event, Preview):
                    strip = [*strip, (self.desk.picture_file(event.picture), f"step {event.done}")]
                    yield strip, *unchanged, progress(event)
                    continue
                picture, attention = event
                strip = [*strip, (self.desk.picture_file(picture), "the picture")]
                words = gr.Dropdown([ALL_WORDS, *heat.names(attention)], value=ALL_WORDS)
                maps = self.maps(event, ALL_WORDS)
                yield strip, words, maps, heat.table(attention), event, status()
        except Exception as error:
            yield strip, *unchanged, complaint(error)

    def maps(self, result: Any, word: str) -> list[tuple[str, str]]:
        """How much each token attends to a word, by layer: files with captions."""
        if result is None:
            return []
        picture, attention = result
        return [(self.desk.picture_file(overlaid), text) for overlaid, text in heat.maps(picture, attention, word)]
