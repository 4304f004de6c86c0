"""The page: its tabs on top of a `Desk`, its style, and our own application, which fetches nothing from other hosts."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path

import anyio
import gradio as gr
from fastapi import FastAPI
from gradio.themes import Default

from xfusion.apps.server.limits import Limits
from xfusion.apps.web.chat import Chat
from xfusion.apps.web.comparisons import Comparisons
from xfusion.apps.web.controls import Controls
from xfusion.apps.web.denoising import Denoising
from xfusion.apps.web.desk import Desk
from xfusion.apps.web.gallery import Gallery
from xfusion.apps.web.guard import Guard
from xfusion.apps.web.picture import Picture
from xfusion.apps.web.uploads import Uploads
from xfusion.comparison.results import portable
from xfusion.model import Model

FORM = 65_536
"""Bytes of a request besides its uploaded file."""
HANDLERS = 16
"""Calls of one kind that may wait for the queue at the same time; gradio delays the others."""
THREADS = 40
"""Threads besides those in which requests wait: stopping, for example, must not wait for one of them."""
ABILITIES = {"text": "answers in words", "caption": "describes pictures", "draw": "draws pictures"}
"""Capability of a pack -> its description on the page."""
STYLE = """
.gradio-container { width: 100% !important; max-width: 62rem !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
.status { min-height: 1.5em; }
#conversation .placeholder-content { padding: 0 1rem; }
.status .problem { color: #b3261e; } .dark .status .problem { color: #ffb4ab; }
.pixels img { image-rendering: pixelated; }
.grid-wrap { max-height: none !important; height: auto !important; min-height: 0 !important; padding-top: 2rem !important; }
.gallery-container, .thumbnail-lg { height: auto !important; aspect-ratio: auto !important; }
.thumbnail-lg img { height: auto !important; aspect-ratio: 1; }
.caption-label { position: static !important; white-space: normal !important; max-width: 100% !important;
  font-size: .75rem !important; text-align: left; border: 0 !important; }
.preview .caption { white-space: normal !important; }
.preview .media-button { flex: 1; height: auto !important; min-height: 0; }
.preview .thumbnails { position: static !important; flex: none; }
#conversation .message img { width: 9rem !important; height: 9rem !important; object-fit: contain !important; }
#conversation [aria-label=Share], #conversation [title=Share], #conversation .message-buttons ::after { display: none; }
#given .image-frame { width: 100%; height: 100%; }
#given img, #redrawn img { width: 100%; height: 100%; object-fit: contain; }
#sheet .toolbar-wrap { left: 2px; }
#sheet [aria-label=Color] { display: none; }
#sheet .empty { font-size: 0; }
#sheet .empty::after { content: "drop a picture above first"; font-size: 1rem; color: #52525b; background: #fff; }
.scroll { overflow-x: auto; }
.grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
table.heat { border-collapse: collapse; border: 0 !important; width: auto;
  font-variant-numeric: tabular-nums; font-size: .85rem; }
table.heat :is(thead, tbody, tr) { border: 0 !important; }
table.heat :is(th, td) { padding: .15rem .4rem !important; border: 0 !important; }
table.heat :is(td, thead th + th) { text-align: right !important; }
table.heat :is(th[scope=row], thead th:first-child) { text-align: left !important; }
table.heat th[scope=row] { white-space: nowrap; position: sticky; left: 0;
  background: var(--body-background-fill); }
table.heat caption { text-align: left; padding: .3rem 0; white-space: nowrap; color: var(--body-text-color); }
iframe.comparison { width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); border-radius: 8px; }
[role=tab][aria-selected=true] { color: var(--primary-700) !important; }
.dark [role=tab][aria-selected=true] { color: var(--primary-500) !important; }
[role=tab][aria-selected=true]::after { background-color: currentColor !important; }
input[type=range]::-webkit-slider-thumb { border: 1px solid var(--neutral-500); }
input[type=range]::-moz-range-thumb { border: 1px solid var(--neutral-500); }
:focus-visible { outline: 2px solid #c2571a; outline-offset: 2px; }
@media (max-width: 34rem) {
  #sheet { height: 350px !important; }
  .tab-container button { padding: 0 .45rem !important; font-size: .85rem !important; }
  .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  table.heat { font-size: .75rem; }
  table.heat th[scope=row], table.heat caption { white-space: normal; }
}
"""


def create(
    models: Mapping[str, Model],
    limits: Limits,
    folder: Path,
    comparisons: Path | None,
    hosts: frozenset[str] = frozenset(),
) -> FastAPI:
    """The page as an ASGI application.

    Args:
        models: packs by name.
        limits: limits of requests.
        folder: folder of uploads and drawn pictures; nothing is written elsewhere.
        comparisons: a folder of comparisons, or None.
        hosts: names accepted in the Host header; if empty, any.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    desk = Desk(models, limits, folder / "drawn")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        desk.batches.start()
        yield
        await anyio.to_thread.run_sync(desk.batches.close, limits.grace)

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.state.desk = app.state.stops = desk

    uploads = Uploads(folder, desk.folder, limits.bodies)
    app.add_middleware(Guard, max_bytes=limits.body + FORM, hosts=hosts, uploads=uploads)
    font = ("system-ui", "sans-serif")  # gradio's own themes fetch theirs from Google
    theme = Default(primary_hue="orange", font=font, font_mono=("ui-monospace", "monospace"))
    # Gradio's own white on orange, grey on white, and empty circles and boxes are hard to see.
    dark_orange, grey = "*primary_700", "*neutral_500"
    theme.set(
        **{f"button_primary_background_fill{suffix}": dark_orange for suffix in ("", "_dark")},
        **{f"button_primary_background_fill_hover{suffix}": "*primary_800" for suffix in ("", "_dark")},
        **{f"button_primary_border_color{suffix}": dark_orange for suffix in ("", "_dark")},
        **{f"checkbox_border_color{suffix}": grey for suffix in ("", "_hover", "_dark", "_hover_dark")},
        body_text_color_subdued=grey,
        block_info_text_color=grey,
        input_placeholder_color=grey,
        input_placeholder_color_dark="*neutral_400",
    )
    page = blocks(desk, comparisons)
    page.max_threads = limits.queue + limits.batch + THREADS
    page.queue(max_size=limits.queue, default_concurrency_limit=HANDLERS, api_open=False)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=limits.body,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme,
        css=STYLE,
        allowed_paths=[str(folder)],
    )


def blocks(desk: Desk, comparisons: Path | None) -> gr.Blocks:
    """Create the components, with a tab for each capability that some pack has.

    Args:
        desk: takes what is asked for.
        comparisons: a folder of comparisons, or None.
    """
    with gr.Blocks(title="xfusion", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# xfusion")
        controls = Controls(desk)
        gr.HTML(_facts(desk.models))
        with gr.Tabs():
            with gr.Tab("Chat"):
                Chat(controls).lay_out()
            if "draw" in controls.abilities:
                with gr.Tab("Draw"):
                    Gallery(controls).lay_out()
            if controls.abilities & {"draw", "caption"}:
                with gr.Tab("Picture"):
                    Picture(controls).lay_out()
            if "draw" in controls.abilities:
                with gr.Tab("Inside"):
                    Denoising(controls).lay_out()
            if comparisons is not None:
                with gr.Tab("Compare"):
                    Comparisons(controls, comparisons).lay_out()
        controls.wire(controls.pack.change, controls.default_guidance, [controls.pack], controls.guidance)
    return page


def _facts(models: Mapping[str, Model]) -> str:
    """One line about each pack."""
    lines = []
    for name, model in models.items():
        abilities = ", ".join(
            description for ability, description in ABILITIES.items() if ability in model.capabilities
        )
        base = portable(model.backbone.source).rstrip("/").split("/")[-1].removesuffix(".gguf")
        lines.append(f"<p><b>{escape(name)}</b> {abilities}. Language model: {escape(base)}</p>")
    return "".join(lines)
