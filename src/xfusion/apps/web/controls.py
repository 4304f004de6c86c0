"""What tabs share: seed, steps and guidance, a stop button, event handlers, clearing, and status lines."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from xfusion.apps.server.answers import Refused
from xfusion.apps.web.desk import LISTEN_SECONDS, Desk, Drawn, Preview, Stopped, Waiting
from xfusion.data.sequence import XFusionError

log = logging.getLogger("xfusion.web")

CLEAR_CHECKS = 200
"""Number of checks whether cleared answers have ended, each half of `LISTEN_SECONDS` after the last."""


class Controls:
    """The list of packs, placed where this is created, and the components that every tab uses.

    Args:
        desk: accepts the requests.
    """

    def __init__(self, desk: Desk):
        self.desk, self.limits = desk, desk.limits
        self.abilities = set[str]().union(*(model.capabilities for model in desk.models.values()))
        """Capabilities that at least one pack has."""
        names = list(desk.models)
        self.pack = gr.Dropdown(
            names, value=names[0], label="Pack", visible=len(names) > 1, elem_id="pack", interactive=True
        )
        self.guidance: list[gr.Slider] = []
        """The guidance sliders of all tabs; they follow the selected pack."""

    def settings(self, *, steps: int = 25) -> list[Any]:
        """Seed, steps and guidance."""
        with gr.Row():
            seed = gr.Textbox(label="Seed", value="0", info="empty: a random one", max_lines=1, min_width=100)
            count = gr.Slider(1, self.limits.steps, min(steps, self.limits.steps), step=1, label="Steps", min_width=200)
            first = next(iter(self.desk.models.values())).guidance
            info = "how closely to follow the words; 1 is off"
            guidance = gr.Slider(0, 12, first, step=0.5, label="Guidance", info=info, min_width=200)
        self.guidance.append(guidance)
        return [seed, count, guidance]

    def default_guidance(self, pack: str) -> dict[gr.Slider, float]:
        """A pack's default guidance, for the slider of every tab."""
        return dict.fromkeys(self.guidance, self.desk.model(pack).guidance)

    def wire(self, trigger: Any, call: Any, inputs: list[Any], outputs: list[Any], **more: Any) -> Any:
        """Attach an event handler; it is private to the page, and its calls wait in the bounded queue."""
        return trigger(call, inputs, outputs, show_progress="hidden", api_visibility="private", **more)

    def stop_button(self) -> None:
        """A button that stops its user's requests, in any tab."""
        button = gr.Button("Stop", min_width=80)
        button.click(self.stop, None, None, queue=False, show_progress="hidden", api_visibility="private")

    def stop(self, request: gr.Request) -> None:
        """Stop a user's requests."""
        self.desk.stop(user_of(request))


class Clearing:
    """Clears a tab, so that no answer in progress writes to the empty tab.

    Args:
        desk: stops the computation.
    """

    def __init__(self, desk: Desk):
        self.desk = desk
        self._cleared = set[str]()
        """Users with answers in progress who cleared the tab since their last request there."""
        self.working = Counter[str]()
        """Users with answers in progress."""
        self._changing = threading.Lock()

    @contextmanager
    def answering(self, request: gr.Request) -> Iterator[None]:
        """Mark an answer as in progress inside the block."""
        user = user_of(request)
        with self._changing:
            self._cleared.discard(user)
            self.working[user] += 1
        try:
            yield
        finally:
            with self._changing:
                self.working[user] -= 1
                if not self.working[user]:
                    self.working.pop(user)
                    self._cleared.discard(user)

    def clear(self, request: gr.Request) -> None:
        """Stop the tab's answers, and wait for their last update: one that comes after clearing would stay on the page."""
        user = user_of(request)
        for _ in range(CLEAR_CHECKS):
            with self._changing:
                if user not in self.working:
                    return
                self._cleared.add(user)
            self.desk.stop(user)
            time.sleep(LISTEN_SECONDS / 2)

    def cleared(self, error: Exception, request: gr.Request) -> bool:
        """Whether the failed answer had been cleared."""
        with self._changing:
            return isinstance(error, Stopped) and user_of(request) in self._cleared


def user_of(request: gr.Request) -> str:
    """The name by which the desk identifies a user."""
    return str(request.session_hash)


def seed_setting(text: str | None) -> dict[str, Any]:
    """The seed that was entered, or none.

    Raises:
        Refused: it is not a whole number.
    """
    text = (text or "").strip()
    if text and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Refused(400, f"seed {text[:40]!r}: a whole number of 0 or more, or nothing")
    return {"seed": int(text)} if text else {}


def status(text: str = "", *, problem: bool = False) -> str:
    """A status line, read out by screen readers when it changes."""
    kind = ' class="problem"' if problem else ""
    return f'<div role="status" aria-live="polite"><span{kind}>{escape(" ".join(text.split()))}</span></div>'


def complaint(error: Exception) -> str:
    """An error in one line; internal errors are logged, and their details are not shown."""
    if isinstance(error, Stopped):
        return status("stopped")
    if isinstance(error, (Refused, XFusionError)):
        return status(str(error), problem=True)
    log.exception("the page failed", exc_info=error)
    return status("this failed here; the log of `xfusion web` says why", problem=True)


def progress(event: Preview | Waiting) -> Any:
    """The progress of a picture, or how many are waited for; what is being computed changes nothing."""
    if isinstance(event, Preview):
        return status(f"step {event.done} of {event.total}")
    return status(f"waiting, {event.before} before you …") if event.before else gr.skip()


def drawing_text(drawn: Drawn) -> str:
    """How a picture was drawn."""
    facts = drawn.facts
    return f"{facts['prompt'] or '(no words)'}: seed {facts['seed']}, {facts['steps']} steps, guidance {facts['guidance']:g}"
