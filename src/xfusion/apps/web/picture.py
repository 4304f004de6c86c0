"""The tab for the user's own picture: ask about it, and inpaint a part of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, cast

import gradio as gr
from PIL import Image as PILImage
from PIL import ImageDraw

from xfusion.apps.chat import with_segment
from xfusion.apps.server.answers import Refused
from xfusion.apps.web import brush
from xfusion.apps.web.controls import Controls, complaint, drawing_text, progress, seed_setting, status, user_of
from xfusion.apps.web.desk import Preview, Waiting

PAINTED = "what I paint"
PAINT = ("#1f6feb", 0.6)
"""A colour and its opacity: blue is visible on the reds and yellows of most emoji."""
REGIONS = {
    "left half": (0, 0, 0.5, 1),
    "right half": (0.5, 0, 1, 1),
    "upper half": (0, 0, 1, 0.5),
    "lower half": (0, 0.5, 1, 1),
    "middle": (0.25, 0.25, 0.75, 0.75),
}
"""Parts of a picture that can be inpainted, as left, top, right and bottom."""


class Picture:
    """An uploaded picture, its captions, and the sheet to paint on."""

    def __init__(self, controls: Controls):
        self.controls, self.desk, self.limits = controls, controls.desk, controls.limits

    def lay_out(self) -> None:
        """Create the tab's components."""
        can_caption, can_draw = "caption" in self.controls.abilities, "draw" in self.controls.abilities
        with gr.Row():
            upload = gr.Image(
                label="Your picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=280,
                elem_id="given", buttons=[],
            )  # fmt: skip
            upload.preprocess = _uploaded_path  # we open the file, not gradio, within our limits
            with gr.Column(visible=can_caption):
                question = gr.Textbox(label="Question", placeholder="What is it?", max_lines=2, elem_id="question")
                with gr.Row():
                    ask = gr.Button("Caption", variant="primary", min_width=100, elem_id="caption")
                    self.controls.stop_button()
                answer = gr.Textbox(label="It sees", interactive=False, elem_id="sees")
        status_line = gr.HTML(status(), elem_classes="status", elem_id="picture-status")
        for trigger in (ask.click, question.submit):
            self.controls.wire(trigger, self.caption, [self.controls.pack, upload, question], [answer, status_line])
        with gr.Column(visible=can_draw):
            gr.Markdown("### Draw a part of it anew")
            with gr.Row():
                with gr.Column():
                    region = gr.Radio(
                        [PAINTED, *REGIONS], value=PAINTED, label="Which part", elem_id="region",
                        info="the picture is drawn in cells: a cell is drawn anew if paint covers half of one of its pixels, "
                        "else it stays",
                    )  # fmt: skip
                    sheet = gr.ImageEditor(
                        label="Paint here", type="filepath", sources=(), transforms=(), layers=False, buttons=[],
                        brush=gr.Brush(default_size=24, colors=[PAINT], color_mode="fixed"),
                        eraser=gr.Eraser(default_size=24), canvas_size=(brush.SIDE, brush.SIDE), fixed_canvas=True,
                        height=440, format="png", elem_id="sheet", elem_classes="pixels", interactive=True,
                    )  # fmt: skip
                    sheet.preprocess = _strokes  # as above
                    # Otherwise anyone could make this process store bytes that are never used.
                    sheet.accept_blobs = cast("Any", None)
                with gr.Column():
                    prompt = gr.Textbox(
                        label="What the whole picture shall show", placeholder="a red heart", max_lines=2,
                        elem_id="repaint-prompt",
                    )  # fmt: skip
                    settings = self.controls.settings()
                    with gr.Row():
                        redraw = gr.Button("Draw anew", variant="primary", min_width=100, elem_id="redraw")
                        self.controls.stop_button()
                    repaint_status = gr.HTML(status(), elem_classes="status", elem_id="repaint-status")
                    result = gr.Image(
                        label="Drawn anew", interactive=False, height=280, elem_classes="pixels", elem_id="redrawn",
                        format="png", buttons=["download"], type="filepath",
                    )  # fmt: skip
        inputs = [self.controls.pack, upload, region, sheet, prompt, *settings]
        for trigger in (redraw.click, prompt.submit):
            self.controls.wire(trigger, self.inpaint, inputs, [result, repaint_status])
        self.controls.wire(
            sheet.clear, self.restore_sheet, [self.controls.pack, upload], [sheet], show_progress_on=[status_line]
        )
        for trigger in (upload.change, self.controls.pack.change):
            # A browser sends the painting whenever it shows progress on the sheet, so progress is never shown there.
            self.controls.wire(
                trigger, self.canvas, [self.controls.pack, upload], [sheet, status_line], show_progress_on=[status_line]
            )

    def caption(self, pack: str, upload: str | None, question: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """A pack's streamed caption of the picture, or answer to a question about it; and a status line."""
        try:
            picture = self.desk.open_upload(_given(upload), pack)
            yield "", status("looking …")
            messages = (
                with_segment(with_segment([], picture), question) if question.strip() else with_segment([], picture)
            )
            for event in self.desk.say(user_of(request), pack, messages, max_tokens=min(64, self.limits.tokens)):
                if isinstance(event, list):
                    yield event[-1].strip(), status("answering …")
                else:
                    yield gr.skip(), progress(event)
            yield gr.skip(), status()
        except Exception as error:
            yield "", complaint(error)

    def canvas(self, pack: str, upload: str | None) -> tuple[Any, str]:
        """The uploaded picture, to paint on, and a status line."""
        try:
            if not upload:
                return None, status()
            model = self.desk.model(pack)
            if "draw" not in model.capabilities:
                self.desk.open_upload(upload, pack)  # what is wrong with it is said now
                return None, status()
            picture = self.desk.open_canvas(upload, pack)
            sheet_file = self.desk.picture_file(brush.sheet(picture, model.image.grid(picture.width)))
            return {"background": sheet_file, "layers": [], "composite": None}, status()
        except Exception as error:
            return None, complaint(error)

    def restore_sheet(self, pack: str, upload: str | None) -> Any:
        """The picture again after the sheet was cleared; without one, another clear event would follow."""
        return self.canvas(pack, upload)[0] if upload else gr.skip()

    def inpaint(
        self, pack: str, upload: str | None, region: str, layers: list[str], prompt: str, seed: str, steps: float,
        guidance: float, request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """The picture with a part of it inpainted, with previews; and a status line."""
        try:
            self.desk.drawing_model(pack)
            picture = self.desk.open_canvas(_given(upload), pack)
            if region == PAINTED:
                mask = self.desk.painted_mask(layers, picture.width)
            elif region in REGIONS:
                mask = _mask(picture.size, REGIONS[region])
            else:
                raise Refused(400, f"there is no part {region[:40]!r}, only {', '.join([PAINTED, *REGIONS])}")
            yield gr.skip(), status("waiting …")
            settings = {"steps": steps, "guidance": guidance, **seed_setting(seed)}
            for event in self.desk.repaint(user_of(request), pack, _png(picture), _png(mask), prompt, **settings):
                if isinstance(event, Waiting):
                    yield gr.skip(), progress(event)
                elif isinstance(event, Preview):
                    yield self.desk.picture_file(event.picture), progress(event)
                else:
                    yield str(event.path), status(drawing_text(event))
        except Exception as error:
            yield gr.skip(), complaint(error)


def _given(upload: str | None) -> str:
    """The path of the picture that is asked about."""
    if not upload:
        raise Refused(400, "drop a picture first")
    return upload


def _uploaded_path(payload: Any) -> str | None:
    """The path of an uploaded file."""
    return None if payload is None else payload.path


def _strokes(payload: Any) -> Any:
    """The paths of the painted layers."""
    return [] if payload is None else [layer.path for layer in payload.layers]


def _png(picture: PILImage.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _mask(size: tuple[int, int], fractions: tuple[float, float, float, float]) -> PILImage.Image:
    """A mask, white in the part to inpaint, which is given as fractions of the sides."""
    mask = PILImage.new("L", size, "black")
    left, top, right, bottom = (round(share * size[i % 2]) for i, share in enumerate(fractions))
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill="white")
    return mask
