"""`chat`: a conversation with a pack in the terminal."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb, choose_device, load_model


@dataclass(frozen=True, kw_only=True)
class Chat(Verb):
    """Talk with a pack: text, pictures or sounds that you show, pictures that it draws.

    Lines are read from the terminal, a file or a pipe. /help lists the commands: /image PATH, /sound PATH, /draw WORDS,
    /look WORDS, /save FILE.
    Pictures are shown if the terminal has colours, and written to a file if it has none.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PACK")]
    """A folder, a shipped pack's name, or a hub id."""
    seed: int = 0
    """Seed of the first answer; each further answer adds 1."""
    steps: int = 25
    """Sampling steps of a picture."""
    guidance: float | None = None
    """Classifier-free guidance of drawing; None uses the pack's own."""
    max_tokens: int = 256
    """Longest answer in tokens."""
    draw: Literal["never", "auto", "always"] | None = None
    """Whether an answer starts with a picture: auto lets the pack's opening head decide, never is the base model. None
    means auto if the pack has that head, else never."""
    temperature: float = 0.0
    """Sampling temperature of text; 0 is greedy."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that a pack names."""

    def run(self, console: Console) -> Answer:
        self._check()
        from xfusion.apps import chat

        model = load_model(self.model, device=self.device, trust=self.trust)
        draw = self.draw or ("auto" if model.opening else "never")
        if draw == "auto" and model.opening is None:
            raise UsageError(f"--draw auto: {self.model} has no opening head; make one with xfusion train opening")
        if draw != "never" and "draw" not in model.capabilities:
            able = ", ".join(sorted(model.capabilities))
            raise UsageError(f"--draw {draw}: {self.model} can {able} only; take a pack of a recipe such as xfusion")
        chat_console = console if self.json else Console(highlight=False, emoji=False)
        session = chat.Chat(
            model=model,
            console=chat_console,
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            draw=draw,
        )
        capabilities = ", ".join(sorted(model.capabilities))
        drawing_note = {"auto": "when asked", "always": "at every turn", "never": "on /draw alone"}[draw]
        drawing_note = f"; draws {drawing_note} (--draw {draw})" if "draw" in model.capabilities else ""
        console.print(f"{self.model} can {capabilities}{drawing_note}; /help lists commands", markup=False)
        # Stdout is for the JSON object alone, prompts included.
        with redirect_stdout(sys.stderr) if self.json else nullcontext():
            session.run(_input_lines())
        messages = [
            {"role": message["role"], "content": [_segment_text(segment) for segment in message["content"]]}
            for message in session.messages
        ]
        return Answer(
            data={"messages": messages, "pack_fingerprint": model.fingerprint}, text=f"{session.answers} answers"
        )

    def _check(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens}: at least 1")
        if self.steps < 1:
            raise UsageError(f"--steps {self.steps}: at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature {self.temperature:g}: 0 or more")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"--guidance {self.guidance}: give a number, such as 3; 1 is off")
        if not 0 <= self.seed < 2**62:
            raise UsageError(f"--seed {self.seed}: choose a whole number from 0 to 2^62 - 1")
        choose_device(self.device)


def _segment_text(segment: object) -> str:
    """A segment as text: pictures and sounds are only named."""
    return segment if isinstance(segment, str) else f"({'sound' if hasattr(segment, 'samples') else 'picture'})"


def _input_lines() -> Iterator[str]:
    """The lines that the user types, with the terminal's line editing, or the lines of a pipe."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # bytes that are not text must not end the conversation
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):  # gives input() arrow keys and history, if available
        import readline  # noqa: F401
    cancelled = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if cancelled:
                print()
                return
            cancelled = True
            print("\n(Ctrl-C once more leaves, and so does Ctrl-D)")
            continue
        cancelled = False
        yield line
