"""How the page looks: gradio's components over a `Desk`, in an application of our own that fetches nothing from elsewhere."""

from __future__ import annotations

import io
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path
from typing import Any, cast

import anyio
from fastapi import FastAPI
from PIL import Image as PILImage
from PIL import ImageDraw

# Read when gradio is imported: no word to its makers, no share links, no history of runs.
os.environ.update({"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SHARE": "False"})

import gradio as gr
from gradio.themes import Default

from xfusion.apps import comparison_page
from xfusion.apps.chat import added
from xfusion.apps.server.answers import Refused
from xfusion.apps.server.limits import Limits
from xfusion.apps.web import brush, heat
from xfusion.apps.web.desk import LISTEN_SECONDS, Desk, Drawn, Preview, Stopped
from xfusion.apps.web.guard import Guard
from xfusion.comparison.results import SUMMARY, portable
from xfusion.comparison.table import summarise
from xfusion.data.sequence import XFusionError
from xfusion.model import Model

log = logging.getLogger("xfusion.web")

KEPT = 48
"""Pictures that a gallery keeps."""
FORM = 65_536
"""Bytes of a request beside the file that it brings."""
CLEARED = 200
"""Looks whether what is cleared away has ended, each half of `LISTEN_SECONDS` after the last."""
HANDLERS = 16
"""Calls of one kind that may wait for the queue at once; gradio holds back the others."""
PAINTED = "what I paint"
PAINT = ("#ea5c14", 0.55)
"""A colour, and how much it covers."""
REGIONS = {
    "left half": (0, 0, 0.5, 1),
    "right half": (0.5, 0, 1, 1),
    "upper half": (0, 0, 1, 0.5),
    "lower half": (0, 0.5, 1, 1),
    "middle": (0.25, 0.25, 0.75, 0.75),
}
"""Parts of a picture that may be drawn anew, as left, top, right and bottom."""
ALL_WORDS = "all words"
ABILITIES = {"text": "answers in words", "caption": "describes pictures", "draw": "draws pictures"}
"""What the page lets a pack do, in its words."""
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
#conversation .message img { width: 9rem !important; height: 9rem !important; object-fit: contain !important; }
#conversation [aria-label=Share], #conversation [title=Share] { display: none; }
#redrawn img { width: 100%; height: 100%; object-fit: contain; }
#sheet .toolbar-wrap { left: 2px; }
#sheet [aria-label=Color] { display: none; }
#sheet .empty { font-size: 0; } #sheet .empty::after { content: "drop a picture above first"; font-size: 1rem; }
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
        limits: what may be asked for.
        folder: for uploads and drawn pictures; nothing is written elsewhere.
        comparisons: a folder of comparisons, or None.
        hosts: names that a browser may know this machine by; with none, any.
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

    app.add_middleware(Guard, most=limits.body + FORM, hosts=hosts)
    font = ("system-ui", "sans-serif")  # gradio's own themes fetch theirs from Google
    theme = Default(primary_hue="orange", font=font, font_mono=("ui-monospace", "monospace"))
    deep, grey = "*primary_700", "*neutral_500"  # white on gradio's orange, and its grey on white, are hard to read
    theme.set(
        **{f"button_primary_background_fill{of}": deep for of in ("", "_dark")},
        **{f"button_primary_background_fill_hover{of}": "*primary_800" for of in ("", "_dark")},
        **{f"button_primary_border_color{of}": deep for of in ("", "_dark")},
        body_text_color_subdued=grey,
        block_info_text_color=grey,
        input_placeholder_color=grey,
        input_placeholder_color_dark="*neutral_400",
    )
    blocks = _Page(desk, comparisons).blocks()
    blocks.queue(max_size=limits.queue, default_concurrency_limit=HANDLERS, api_open=False)
    return gr.mount_gradio_app(
        app,
        blocks,
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


def status(text: str = "", *, problem: bool = False) -> str:
    """A line for people, read out by screen readers when it changes."""
    kind = ' class="problem"' if problem else ""
    return f'<div role="status" aria-live="polite"><span{kind}>{escape(" ".join(text.split()))}</span></div>'


def complaint(error: Exception) -> str:
    """An error in one line; what went wrong in here is logged, and not told."""
    if isinstance(error, Stopped):
        return status("stopped")
    if isinstance(error, (Refused, XFusionError)):
        return status(str(error), problem=True)
    log.exception("the page failed", exc_info=error)
    return status("this failed here; the log of `xfusion web` says why", problem=True)


class _Page:
    """The components and what they call."""

    def __init__(self, desk: Desk, comparisons: Path | None):
        self.desk, self.limits, self.comparisons = desk, desk.limits, comparisons
        self.guidance: list[gr.Slider] = []
        """Of every tab; they follow the pack."""
        self.cleared = set[tuple[str, str]]()
        """Who cleared which tab since something was asked for there."""
        self.working = Counter[tuple[str, str]]()
        """Whose answers in which tab are on their way."""
        self.able = set[str]().union(*(model.capabilities for model in desk.models.values()))
        self.decides = any(model.opening is not None for model in desk.models.values())

    def blocks(self) -> gr.Blocks:
        """The page."""
        names = list(self.desk.models)
        with gr.Blocks(title="xfusion", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.Markdown("# xfusion")
            self.pack = gr.Dropdown(
                names, value=names[0], label="Pack", visible=len(names) > 1, elem_id="pack", interactive=True
            )
            gr.HTML(self._facts())
            with gr.Tabs():
                with gr.Tab("Chat"):
                    self._chat_tab()
                if "draw" in self.able:
                    with gr.Tab("Draw"):
                        self._draw_tab()
                if self.able & {"draw", "caption"}:
                    with gr.Tab("Picture"):
                        self._picture_tab()
                if "draw" in self.able:
                    with gr.Tab("Inside"):
                        self._look_tab()
                if self.comparisons is not None:
                    with gr.Tab("Compare"):
                        self._comparison_tab(self.comparisons)
            self._wire(self.pack.change, self._default_guidance, [self.pack], self.guidance)
        return page

    def _facts(self) -> str:
        lines = []
        for name, model in self.desk.models.items():
            able = ", ".join(said for ability, said in ABILITIES.items() if ability in model.capabilities)
            base = portable(model.backbone.source).rstrip("/").split("/")[-1].removesuffix(".gguf")
            lines.append(f"<p><b>{escape(name)}</b> {able}. Language model: {escape(base)}</p>")
        return "".join(lines)

    # -- parts that tabs share

    def _settings(self, *, steps: int = 25) -> list[Any]:
        """Seed, steps and guidance."""
        with gr.Row():
            seed = gr.Textbox(label="Seed", value="0", info="empty: a random one", max_lines=1, min_width=100)
            count = gr.Slider(1, self.limits.steps, min(steps, self.limits.steps), step=1, label="Steps", min_width=140)
            first = next(iter(self.desk.models.values())).guidance
            says = "how closely to follow the words; 1 is off"
            guidance = gr.Slider(0, 12, first, step=0.5, label="Guidance", info=says, min_width=140)
        self.guidance.append(guidance)
        return [seed, count, guidance]

    def _default_guidance(self, pack: str) -> dict[gr.Slider, float]:
        return dict.fromkeys(self.guidance, self.desk.model(pack).guidance)

    def _stop(self, request: gr.Request) -> None:
        self.desk.stop(_who(request))

    def _begin(self, request: gr.Request, tab: str) -> None:
        self.cleared.discard((_who(request), tab))
        self.working[_who(request), tab] += 1

    def _end(self, request: gr.Request, tab: str) -> None:
        self.working[_who(request), tab] -= 1
        if not self.working[_who(request), tab]:
            self.working.pop((_who(request), tab))

    def _clear_away(self, request: gr.Request, tab: str) -> None:
        """Stop what a tab does, and wait for its last word: one that comes after the clearing would stay on the page."""
        self.cleared.add((_who(request), tab))
        for _ in range(CLEARED):
            self._stop(request)
            if (_who(request), tab) not in self.working:
                return
            time.sleep(LISTEN_SECONDS / 2)

    def _was_cleared(self, error: Exception, request: gr.Request, tab: str) -> bool:
        """Whether what failed was cleared away."""
        return isinstance(error, Stopped) and (_who(request), tab) in self.cleared

    def _wire(self, trigger: Any, call: Any, inputs: list[Any], outputs: list[Any], **more: Any) -> Any:
        """A call behind a button; the page alone may make it, and it waits in the bounded queue."""
        return trigger(call, inputs, outputs, show_progress="hidden", api_visibility="private", **more)

    def _stop_button(self) -> None:
        button = gr.Button("Stop", min_width=80)
        button.click(self._stop, None, None, queue=False, show_progress="hidden", api_visibility="private")

    def _shown(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A conversation as gradio's Chatbot takes it."""
        return [
            {"role": turn["role"], "content": segment if isinstance(segment, str) else self._image(segment)}
            for turn in messages
            for segment in turn["content"]
        ]

    def _image(self, picture: PILImage.Image) -> gr.Image:
        return gr.Image(self.desk.shown(picture), buttons=["download"])

    # -- chat

    def _chat_tab(self) -> None:
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
            draw = gr.Button("Draw it", min_width=80, visible="draw" in self.able)
            self._stop_button()
            new = gr.Button("New conversation", min_width=80)
        with gr.Accordion("Settings", open=False):
            settings = self._settings()
            asked = gr.Checkbox(
                True, label="Draw when asked", info="else only by the button", visible=self.decides, elem_id="asked"
            )
            with gr.Row():
                longest = gr.Slider(1, self.limits.tokens, min(128, self.limits.tokens), step=1, label="Longest answer")
                temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the likeliest word")
        outputs, inputs = [talk, said, message, line], [self.pack, message, said, *settings]
        for trigger in (say.click, message.submit):
            self._wire(trigger, self._say, [*inputs, asked, longest, temperature], outputs)
        self._wire(draw.click, self._draw_in_chat, inputs, outputs)
        for trigger in (new.click, talk.clear):  # an answer that is on its way must not bring the old talk back
            self._wire(trigger, self._forget, [], outputs)

    def _forget(self, request: gr.Request) -> tuple[Any, ...]:
        self._clear_away(request, "chat")
        return [], [], None, status()

    def _heard(self, pack: str, message: dict[str, Any] | None, said: list[Any]) -> tuple[str, list[Any]]:
        """The words of a message, and the conversation with the message behind it."""
        words = str((message or {}).get("text") or "").strip()
        files = (message or {}).get("files") or []
        if not words and not files:
            raise Refused(400, "say something first")
        for file in files:
            said = added(said, self.desk.opened(file, pack))
        return words, added(said, words) if words else said

    def _say(
        self, pack: str, message: Any, said: Any, seed: str, steps: float, guidance: float, asked: bool,
        longest: float, temperature: float, request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        self._begin(request, "chat")
        try:
            _, messages = self._heard(pack, message, said)
            yield self._shown(messages), said, None, status("thinking …")
            settings: dict[str, Any] = {"max_tokens": longest, "temperature": temperature, **_seeded(seed)}
            if asked and self.desk.model(pack).opening is not None:
                settings |= {"draw": "auto", "steps": steps, "guidance": guidance}
            answer: list[Any] = []
            for found in self.desk.say(_who(request), pack, messages, **settings):
                answer = [found.picture] if isinstance(found, Preview) else found
                line = _progress(found) if isinstance(found, Preview) else status("answering …")
                yield self._shown([*messages, _turn(*answer)]), said, gr.skip(), line
            messages = [*messages, _turn(*answer)]
            yield self._shown(messages), messages, gr.skip(), status()
        except Exception as error:
            if not self._was_cleared(error, request, "chat"):
                yield self._shown(said), said, message, complaint(error)
        finally:
            self._end(request, "chat")

    def _draw_in_chat(
        self, pack: str, message: Any, said: Any, seed: str, steps: float, guidance: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        self._begin(request, "chat")
        try:
            words, messages = self._heard(pack, message, said)
            yield self._shown(messages), said, None, status("drawing …")
            settings = {"steps": steps, "guidance": guidance, **_seeded(seed)}
            for found in self.desk.draw(_who(request), pack, words, **settings):
                if isinstance(found, Preview):
                    yield self._shown([*messages, _turn(found.picture)]), said, gr.skip(), _progress(found)
                else:
                    messages = [*messages, _turn(found.picture)]
                    yield self._shown(messages), messages, gr.skip(), status(_caption(found))
        except Exception as error:
            if not self._was_cleared(error, request, "chat"):
                yield self._shown(said), said, message, complaint(error)
        finally:
            self._end(request, "chat")

    # -- draw

    def _draw_tab(self) -> None:
        prompt = gr.Textbox(label="Prompt", placeholder="a red heart", max_lines=3, elem_id="prompt")
        settings = self._settings()
        number = gr.Slider(1, self.limits.n, min(4, self.limits.n), step=1, label="Pictures")
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", min_width=80, elem_id="draw")
            self._stop_button()
            clear = gr.Button("Clear", min_width=80)
        line = gr.HTML(status(), elem_classes="status", elem_id="draw-status")
        gallery = gr.Gallery(
            label="Pictures, newest first", columns=4, object_fit="contain", elem_classes="pixels",
            elem_id="gallery", buttons=["download", "fullscreen"], format="png", interactive=False,
        )  # fmt: skip
        kept = gr.State([])
        inputs = [self.pack, prompt, number, *settings, kept]
        outputs = [gallery, kept, line]
        for trigger in (draw.click, prompt.submit):
            self._wire(trigger, self._draw, inputs, outputs)
        self._wire(clear.click, self._clear, [], outputs)

    def _clear(self, request: gr.Request) -> tuple[Any, ...]:
        self._clear_away(request, "draw")
        return [], [], status()

    def _draw(
        self, pack: str, prompt: str, number: float, seed: str, steps: float, guidance: float, kept: list[Any],
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        coming: dict[int, Any] = {}
        whole: set[int] = set()
        kept = [one for one in kept if Path(one[0]).exists()]  # old ones are swept away
        line = status("waiting …")
        self._begin(request, "draw")
        try:
            yield gr.skip(), gr.skip(), line
            settings = {"n": number, "steps": steps, "guidance": guidance, **_seeded(seed)}
            for found in self.desk.draw(_who(request), pack, prompt, **settings):
                if isinstance(found, Preview):
                    coming[found.index] = (self.desk.shown(found.picture), f"step {found.done} of {found.total}")
                    line = _progress(found)
                else:
                    coming[found.index] = (str(found.path), _caption(found))
                    whole.add(found.index)
                    line = status(f"drawn: {prompt or 'anything'}")
                yield [*_in_order(coming), *kept], gr.skip(), line
            kept = [*_in_order(coming), *kept][:KEPT]
            yield kept, kept, line
        except Exception as error:
            if self._was_cleared(error, request, "draw"):
                return
            done = {i: coming[i] for i in whole}
            kept = [*_in_order(done), *kept][:KEPT]
            yield kept, kept, complaint(error)
        finally:
            self._end(request, "draw")

    # -- a picture

    def _picture_tab(self) -> None:
        captions, draws = "caption" in self.able, "draw" in self.able
        with gr.Row():
            given = gr.Image(
                label="Your picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=280,
                elem_id="given", buttons=[],
            )  # fmt: skip
            given.preprocess = _place  # the file is opened by us and not by gradio, within our limits
            with gr.Column(visible=captions):
                question = gr.Textbox(label="Question", placeholder="What is it?", max_lines=2, elem_id="question")
                with gr.Row():
                    ask = gr.Button("Caption", variant="primary", min_width=100, elem_id="caption")
                    self._stop_button()
                answer = gr.Textbox(label="It sees", interactive=False, elem_id="sees")
        line = gr.HTML(status(), elem_classes="status", elem_id="picture-status")
        for trigger in (ask.click, question.submit):
            self._wire(trigger, self._caption, [self.pack, given, question], [answer, line])
        with gr.Column(visible=draws):
            gr.Markdown("### Draw a part of it anew")
            with gr.Row():
                with gr.Column():
                    region = gr.Radio(
                        [PAINTED, *REGIONS], value=PAINTED, label="Which part", elem_id="region",
                        info="the picture is drawn in cells: those that your brush touches are drawn anew, the others stay",
                    )  # fmt: skip
                    sheet = gr.ImageEditor(
                        label="Paint here", type="filepath", sources=(), transforms=(), layers=False, buttons=[],
                        brush=gr.Brush(default_size=24, colors=[PAINT], color_mode="fixed"),
                        eraser=gr.Eraser(default_size=24), canvas_size=(brush.SIDE, brush.SIDE), fixed_canvas=True,
                        height=440, format="png", elem_id="sheet", elem_classes="pixels", interactive=True,
                    )  # fmt: skip
                    sheet.preprocess = _strokes  # as above
                    # Else anyone could have this process keep bytes that nobody asks for.
                    sheet.accept_blobs = cast("Any", None)
                with gr.Column():
                    prompt = gr.Textbox(
                        label="What the whole picture shall show", placeholder="a red heart", max_lines=2,
                        elem_id="repaint-prompt",
                    )  # fmt: skip
                    settings = self._settings()
                    with gr.Row():
                        redraw = gr.Button("Draw anew", variant="primary", min_width=100, elem_id="redraw")
                        self._stop_button()
                    told = gr.HTML(status(), elem_classes="status", elem_id="repaint-status")
                    out = gr.Image(
                        label="Drawn anew", interactive=False, height=280, elem_classes="pixels", elem_id="redrawn",
                        format="png", buttons=["download"], type="filepath",
                    )  # fmt: skip
        inputs = [self.pack, given, region, sheet, prompt, *settings]
        for trigger in (redraw.click, prompt.submit):
            self._wire(trigger, self._repaint, inputs, [out, told])
        self._wire(sheet.clear, self._wiped, [self.pack, given], [sheet], show_progress_on=[line])
        for trigger in (given.change, self.pack.change):
            # A browser sends what is painted whenever it shows the progress of something on the sheet: never, then.
            self._wire(trigger, self._laid, [self.pack, given], [sheet, line], show_progress_on=[line])

    def _caption(self, pack: str, given: str | None, question: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        try:
            picture = self._given(pack, given)
            yield "", status("looking …")
            messages = added(added([], picture), question) if question.strip() else added([], picture)
            for found in self.desk.say(_who(request), pack, messages, max_tokens=min(64, self.limits.tokens)):
                if isinstance(found, list):
                    yield found[-1].strip(), status("answering …")
            yield gr.skip(), status()
        except Exception as error:
            yield "", complaint(error)

    def _laid(self, pack: str, given: str | None) -> tuple[Any, str]:
        """The picture that was dropped, to paint on."""
        try:
            if not given:
                return None, status()
            picture, model = self._given(pack, given), self.desk.model(pack)
            if "draw" not in model.capabilities:
                return None, status()
            laid = self.desk.shown(brush.sheet(picture, model.image.grid(picture.width)))
            return {"background": laid, "layers": [], "composite": None}, status()
        except Exception as error:
            return None, complaint(error)

    def _wiped(self, pack: str, given: str | None) -> Any:
        """The picture again where all was wiped off; with none, another wiping would follow."""
        return self._laid(pack, given)[0] if given else gr.skip()

    def _repaint(
        self, pack: str, given: str | None, region: str, painted: list[str], prompt: str, seed: str, steps: float,
        guidance: float, request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        try:
            self.desk.drawing(pack)
            picture = self._given(pack, given)
            if region == PAINTED:
                mask = self.desk.painted(painted, picture.width)
            elif region in REGIONS:
                mask = _mask(picture.size, REGIONS[region])
            else:
                raise Refused(400, f"there is no part {region[:40]!r}, only {', '.join([PAINTED, *REGIONS])}")
            yield gr.skip(), status("waiting …")
            settings = {"steps": steps, "guidance": guidance, **_seeded(seed)}
            for found in self.desk.repaint(_who(request), pack, _png(picture), _png(mask), prompt, **settings):
                if isinstance(found, Preview):
                    yield self.desk.shown(found.picture), _progress(found)
                else:
                    yield str(found.path), status(_caption(found))
        except Exception as error:
            yield gr.skip(), complaint(error)

    def _given(self, pack: str, given: str | None) -> PILImage.Image:
        if not given:
            raise Refused(400, "drop a picture first")
        return self.desk.opened(given, pack)

    # -- a look inside

    def _look_tab(self) -> None:
        gr.Markdown(
            "How a picture comes out of noise, and how much its parts look at each word, layer by layer "
            "(the weights of the attention, a mean over its heads)."
        )
        prompt = gr.Textbox(label="Prompt", placeholder="a red heart", max_lines=3, elem_id="look-prompt")
        settings = self._settings(steps=16)
        with gr.Row():
            look = gr.Button("Look", variant="primary", min_width=80, elem_id="look")
            self._stop_button()
        line = gr.HTML(status(), elem_classes="status", elem_id="look-status")
        gallery: dict[str, Any] = {"object_fit": "contain", "format": "png", "interactive": False, "buttons": []}
        strip = gr.Gallery(
            label="On its way from noise: estimates of the picture", columns=9, elem_id="strip", elem_classes="pixels",
            **gallery,
        )  # fmt: skip
        word = gr.Dropdown([ALL_WORDS], value=ALL_WORDS, label="Heat maps: how much looks at", interactive=True)
        maps = gr.Gallery(label="By layer", columns=6, elem_id="maps", **gallery)
        shares = gr.HTML(elem_id="shares")
        found = gr.State(None, time_to_live=3600)
        inputs = [self.pack, prompt, *settings]
        for trigger in (look.click, prompt.submit):
            self._wire(trigger, self._look, inputs, [strip, word, maps, shares, found, line])
        self._wire(word.input, self._maps, [found, word], [maps])

    def _look(
        self, pack: str, prompt: str, seed: str, steps: float, guidance: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        strip: list[Any] = []
        same = [gr.skip()] * 4
        try:
            yield [], *same, status("waiting …")
            settings = {"steps": steps, "guidance": guidance, **_seeded(seed)}
            for found in self.desk.look(_who(request), pack, prompt, **settings):
                if isinstance(found, Preview):
                    strip = [*strip, (self.desk.shown(found.picture), f"step {found.done}")]
                    yield strip, *same, _progress(found)
                    continue
                picture, attention = found
                strip = [*strip, (self.desk.shown(picture), "the picture")]
                words = gr.Dropdown([ALL_WORDS, *heat.names(attention)], value=ALL_WORDS)
                maps = self._maps(found, ALL_WORDS)
                yield strip, words, maps, heat.table(attention), found, status()
        except Exception as error:
            yield strip, *same, complaint(error)

    def _maps(self, found: Any, word: str) -> list[tuple[str, str]]:
        if found is None:
            return []
        picture, attention = found
        return [(self.desk.shown(over), text) for over, text in heat.maps(picture, attention, word)]

    # -- comparisons

    def _comparison_tab(self, folder: Path) -> None:
        names = sorted(path.parent.name for path in folder.glob(f"*/{SUMMARY}"))
        chosen = gr.Dropdown(
            names, value=None, label="Comparison", elem_id="comparison", interactive=True,
            info="choose one: ways of teaching a language model to see and draw, side by side",
        )  # fmt: skip
        line = gr.HTML(status(), elem_classes="status")
        page = gr.HTML(elem_id="comparison-page")

        def show(name: str | None) -> tuple[str, str]:
            try:
                if name not in names:
                    raise Refused(404, "there is no such comparison")
                text = comparison_page.render(summarise(folder / name), folder / name)
            except Exception as error:
                return "", complaint(error)
            title = f"comparison {escape(name, quote=True)}"
            frame = f'<iframe class="comparison" sandbox title="{title}" srcdoc="{escape(text, quote=True)}"></iframe>'
            return frame, status()

        self._wire(chosen.input, show, [chosen], [page, line])


def _place(payload: Any) -> str | None:
    """Where an uploaded file is."""
    return None if payload is None else payload.path


def _strokes(payload: Any) -> Any:
    """Where the layers of paint are."""
    return [] if payload is None else [layer.path for layer in payload.layers]


def _who(request: gr.Request) -> str:
    return str(request.session_hash)


def _seeded(text: str | None) -> dict[str, Any]:
    """The seed that was written, or none."""
    text = (text or "").strip()
    if text and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Refused(400, f"seed {text[:40]!r}: a whole number of 0 or more, or nothing")
    return {"seed": int(text)} if text else {}


def _turn(*segments: str | PILImage.Image) -> dict[str, Any]:
    return {"role": "assistant", "content": list(segments)}


def _progress(found: Preview) -> str:
    return status(f"step {found.done} of {found.total}")


def _caption(found: Drawn) -> str:
    facts = found.facts
    return f"{facts['prompt'] or '(no words)'}: seed {facts['seed']}, {facts['steps']} steps, guidance {facts['guidance']:g}"


def _in_order(coming: dict[int, Any]) -> list[Any]:
    return [coming[index] for index in sorted(coming)]


def _png(picture: PILImage.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _mask(size: tuple[int, int], part: tuple[float, float, float, float]) -> PILImage.Image:
    """White where to draw anew, within these shares of the sides."""
    mask = PILImage.new("L", size, "black")
    left, top, right, bottom = (round(share * size[i % 2]) for i, share in enumerate(part))
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill="white")
    return mask
