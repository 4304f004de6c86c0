"""The comparisons tab: their pages, each in a sandboxed frame."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr

from xfusion.apps import comparison_page
from xfusion.apps.server.answers import Refused
from xfusion.apps.web.controls import Controls, complaint, status
from xfusion.comparison.results import SUMMARY
from xfusion.comparison.table import summarise


class Comparisons:
    """The pages of a folder of comparisons.

    Args:
        controls: the page's controls.
        folder: folder of comparisons.
    """

    def __init__(self, controls: Controls, folder: Path):
        self.controls, self.folder = controls, folder
        self.names = sorted(path.parent.name for path in folder.glob(f"*/{SUMMARY}"))

    def lay_out(self) -> None:
        """Create the tab's components."""
        dropdown = gr.Dropdown(
            self.names, value=None, label="Comparison", elem_id="comparison", interactive=True,
            info="choose one: ways of teaching a language model to see and draw, side by side",
        )  # fmt: skip
        status_line = gr.HTML(status(), elem_classes="status")
        page = gr.HTML(elem_id="comparison-page")
        self.controls.wire(dropdown.input, self.show, [dropdown], [page, status_line])

    def show(self, name: str | None) -> tuple[str, str]:
        """The page of a comparison in a frame, and a status line."""
        try:
            if name not in self.names:
                raise Refused(404, "there is no such comparison")
            text = comparison_page.render(summarise(self.folder / name), self.folder / name)
        except Exception as error:
            return "", complaint(error)
        title = f"comparison {escape(name, quote=True)}"
        frame = f'<iframe class="comparison" sandbox title="{title}" srcdoc="{escape(text, quote=True)}"></iframe>'
        return frame, status()
