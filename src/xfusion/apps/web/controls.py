"""What tabs share: seed, steps and guidance, a stop, calls behind buttons, what was cleared away, and lines for people."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from xfusion.apps.server.answers import Refused
from xfusion.apps.web.desk import LISTEN_SECONDS, Desk, Drawn, Preview, Stopped
from xfusion.data.sequence import XFusionError

log = logging.getLogger("xfusion.web")

CLEARED = 200
"""Looks whether what is cleared away has ended, each half of `LISTEN_SECONDS` after the last."""


class Controls:
    """The list of packs, which stands where this is made, and what every tab lays out.

    Args:
        desk: takes what is asked for.
    """

    def __init__(self, desk: Desk):
        self.desk, self.limits = desk, desk.limits
        self.able = set[str]().union(*(model.capabilities for model in desk.models.values()))
        """What some pack can do."""
        names = list(desk.models)
        self.pack = gr.Dropdown(
            names, value=names[0], label="Pack", visible=len(names) > 1, elem_id="pack", interactive=True
        )
        self.guidance: list[gr.Slider] = []
        """Of every tab; they follow the pack."""

    def settings(self, *, steps: int = 25) -> list[Any]:
        """Seed, steps and guidance."""
        with gr.Row():
            seed = gr.Textbox(label="Seed", value="0", info="empty: a random one", max_lines=1, min_width=100)
            count = gr.Slider(1, self.limits.steps, min(steps, self.limits.steps), step=1, label="Steps", min_width=200)
            first = next(iter(self.desk.models.values())).guidance
            says = "how closely to follow the words; 1 is off"
            guidance = gr.Slider(0, 12, first, step=0.5, label="Guidance", info=says, min_width=200)
        self.guidance.append(guidance)
        return [seed, count, guidance]

    def default_guidance(self, pack: str) -> dict[gr.Slider, float]:
        """Of a pack, for every tab."""
        return dict.fromkeys(self.guidance, self.desk.model(pack).guidance)

    def wire(self, trigger: Any, call: Any, inputs: list[Any], outputs: list[Any], **more: Any) -> Any:
        """A call behind a button; the page alone may make it, and it waits in the bounded queue."""
        return trigger(call, inputs, outputs, show_progress="hidden", api_visibility="private", **more)

    def stop_button(self) -> None:
        """Ends what its user asked for, in any tab."""
        button = gr.Button("Stop", min_width=80)
        button.click(self.stop, None, None, queue=False, show_progress="hidden", api_visibility="private")

    def stop(self, request: gr.Request) -> None:
        """End what a user asked for."""
        self.desk.stop(who(request))


class Clearing:
    """Clears a tab away, so that no answer on its way writes on the empty tab.

    Args:
        desk: stops what is computed.
    """

    def __init__(self, desk: Desk):
        self.desk = desk
        self._cleared = set[str]()
        """Who cleared the tab since something was asked for there."""
        self.working = Counter[str]()
        """Whose answers are on their way."""

    @contextmanager
    def answering(self, request: gr.Request) -> Iterator[None]:
        """Inside the block an answer is on its way."""
        user = who(request)
        self._cleared.discard(user)
        self.working[user] += 1
        try:
            yield
        finally:
            self.working[user] -= 1
            if not self.working[user]:
                self.working.pop(user)

    def clear(self, request: gr.Request) -> None:
        """Stop what the tab does, and wait for its last word: one that comes after the clearing would stay on the page."""
        self._cleared.add(who(request))
        for _ in range(CLEARED):
            self.desk.stop(who(request))
            if who(request) not in self.working:
                return
            time.sleep(LISTEN_SECONDS / 2)

    def cleared(self, error: Exception, request: gr.Request) -> bool:
        """Whether what failed was cleared away."""
        return isinstance(error, Stopped) and who(request) in self._cleared


def who(request: gr.Request) -> str:
    """The name of a user, as the desk knows it."""
    return str(request.session_hash)


def seeded(text: str | None) -> dict[str, Any]:
    """The seed that was written, or none.

    Raises:
        Refused: it is no whole number.
    """
    text = (text or "").strip()
    if text and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Refused(400, f"seed {text[:40]!r}: a whole number of 0 or more, or nothing")
    return {"seed": int(text)} if text else {}


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


def progress(found: Preview) -> str:
    """How far a picture is."""
    return status(f"step {found.done} of {found.total}")


def drawn_as(found: Drawn) -> str:
    """How a picture was drawn."""
    facts = found.facts
    return f"{facts['prompt'] or '(no words)'}: seed {facts['seed']}, {facts['steps']} steps, guidance {facts['guidance']:g}"
