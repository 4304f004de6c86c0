"""A conversation in the terminal: streamed text, pictures in and out, commands that start with a slash."""

from __future__ import annotations

import json
import os
import shlex
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.style import Style
from rich.text import Text as Line

from xfusion.apps.commands.base import UsageError, readable, write_whole
from xfusion.apps.commands.pictures import FORMATS, file_name, save, unused_path
from xfusion.data import pictures, sounds
from xfusion.data.sequence import Image, Sound, XFusionError
from xfusion.generation import DrawMode, TextStream, conversation, draw_size, ends_at_line, opens

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from xfusion.model import Model

HELP = """\
/image PATH   show it a picture; what you say next is about it
/sound PATH   let it hear a sound, likewise, if the pack hears
/draw WORDS   draw a picture of these words
/look WORDS   ask about the last picture that it drew
/save FILE    the last picture (.png, .jpg, .webp), or the whole conversation (.json)
/new          forget the conversation
/help         this
/quit         leave (so do Ctrl-D, and Ctrl-C twice; once it ends an answer, or drops the line)
Anything else is said to the model."""
MAX_COLUMNS = 64
"""Maximum width of a picture in columns, and its maximum height in half lines."""


@dataclass(kw_only=True)
class Chat:
    """A conversation and its commands."""

    model: Model
    console: Console
    seed: int = 0
    """Seed of the first answer; each further answer adds 1."""
    steps: int = 25
    guidance: float | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    draw: DrawMode = "never"
    """Whether an answer may start with a picture."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The conversation so far, as `xfusion.generation.conversation` accepts it."""
    answers: int = 0
    last: tuple[Picture, dict[str, Any]] | None = None
    """The last picture, and the facts to store in its PNG."""

    def run(self, lines: Iterator[str]) -> None:
        """Answer lines until they end or one of them quits."""
        for line in lines:
            if not line.strip():
                continue
            if line.strip() == "/quit":
                return
            try:
                self.answer(line.strip())
            except (UsageError, XFusionError, OSError) as error:
                line = readable(" ".join(str(error).split()))
                self.console.print(line, style="red", markup=False, highlight=False)
            except KeyboardInterrupt:
                self.console.print("(stopped)")

    def answer(self, line: str) -> None:
        """Answer one line or run its command."""
        if not line.startswith("/"):
            self._answer_message(line)
            return
        verb, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/sound": self._sound,
            "/draw": self._draw,
            "/look": self._look,
            "/save": self._save,
            "/new": self._new,
            "/help": self._help,
        }
        if verb not in commands:
            raise UsageError(f"{verb} is not a command: there are {', '.join(commands)} and /quit")
        commands[verb](rest.strip())

    # -- commands

    def _answer_message(self, words: str) -> None:
        """The model's answer: streamed text, or a picture followed by text."""
        messages = with_segment(self.messages, words)
        if (prompt := opens(self.model, messages, self.draw)) is not None:
            picture = self._picture(prompt)
            caption = self._stream_text([picture]) if "caption" in self.model.capabilities else None
            answer = [picture] if caption is None else [picture, caption]
        else:
            reads_own = self.draw == "never" and "caption" in self.model.capabilities
            segments = conversation(self.model, messages, own_pictures=reads_own)
            answer = [self._stream_text(segments, one_line=ends_at_line(messages))]
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _stream_text(self, segments: list[Any], *, one_line: bool = False) -> str:
        """The model's text after some segments, streamed to the console; Ctrl-C ends it."""
        words = TextStream(self.model.backbone.decode)

        def print_token(_: int, token: int) -> bool:
            self._print(words.add(token))
            return True

        settings = {"max_tokens": self.max_tokens, "temperature": self.temperature, "one_line": one_line}
        try:
            (answer,) = self.model.generate(segments, seed=self._next_seed(), listen=print_token, **settings)
        except KeyboardInterrupt:
            answer = words.sent
        else:
            self._print(words.rest())
        self._print("\n")
        return answer

    def _image(self, path: str) -> None:
        """Add a picture to the next turn."""
        if not path:
            raise UsageError("/image PATH: name a picture file")
        self._require("caption", "read pictures", "llava_1_5")
        draw_size(self.model, None)  # refuses an audio pack
        file = Path(_unquote(path)).expanduser()
        picture = pictures.read(file)
        self.messages = with_segment(self.messages, picture)
        self.show(picture)

    def _sound(self, path: str) -> None:
        """Add a sound to the next turn."""
        if not path:
            raise UsageError("/sound PATH: name a sound file")
        audio = self.model.audio  # refuses an image pack
        self._require("caption", "hear", "qwen_audio")
        sound = sounds.read_sound(Path(_unquote(path)).expanduser())
        audio.as_heard(sound, audio.sizes[0])  # a sound that is too long is refused now
        self.messages = with_segment(self.messages, sound)

    def _draw(self, words: str) -> None:
        """Draw a picture of a prompt and add it to the conversation."""
        if not words:
            raise UsageError("/draw WORDS: say what to draw")
        self._require("draw", "draw", "xfusion")
        draw_size(self.model, None)  # refuses an audio pack
        picture = self._picture(words)
        self.messages = [*with_segment(self.messages, words), {"role": "assistant", "content": [picture]}]

    def _look(self, words: str) -> None:
        """Ask about the last picture that was drawn, alone with the question, as packs are trained."""
        if not words:
            raise UsageError("/look WORDS: say what to ask about the last picture")
        self._require("caption", "read pictures", "llava_1_5")
        if self.last is None:
            raise UsageError("/look: nothing was drawn yet; /draw WORDS draws")
        if self.messages and self.messages[-1]["role"] == "user":
            raise UsageError("/look: first ask about what you showed it, or drop that with /new")
        messages = with_segment(self.messages, words)
        answer = self._stream_text([self.last[0], words])
        self.messages = [*messages, {"role": "assistant", "content": [answer]}]

    def _picture(self, words: str) -> Picture:
        """Draw a picture of a prompt, and show it or write it to a file."""
        seed = self._next_seed()
        (picture,) = self.model.generate([words, Image()], seed=seed, steps=self.steps, guidance=self.guidance)
        guidance = self.model.guidance if self.guidance is None else self.guidance
        facts = {"prompt": words, "seed": seed, "steps": self.steps, "guidance": guidance}
        self.last = (picture, facts | {"pack_fingerprint": self.model.fingerprint})
        if not self.show(picture):
            self.console.print(
                str(save(picture, unused_path(Path(f"{file_name(words)}.png")), self.last[1])), markup=False
            )
        return picture

    def _save(self, name: str) -> None:
        """Save the last picture or the conversation, depending on the file's suffix."""
        path = Path(_unquote(name)).expanduser()
        if path.suffix.lower() == ".json":
            text = json.dumps({"messages": [request_message(m) for m in self.messages]}, ensure_ascii=False, indent=1)
            write_whole(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
        elif path.suffix.lower() not in FORMATS:
            raise UsageError(f"/save FILE: {', '.join(FORMATS)} for the last picture, .json for the conversation")
        elif self.last is None:
            raise UsageError("/save: nothing was drawn yet; /draw WORDS draws")
        else:
            save(self.last[0], path, self.last[1])
        self.console.print(f"saved {path}", markup=False)

    def _new(self, _: str) -> None:
        self.messages = []

    def _help(self, _: str) -> None:
        self.console.print(HELP, markup=False, highlight=False)

    # -- parts

    def _next_seed(self) -> int:
        self.answers += 1
        return self.seed + self.answers - 1

    def _require(self, capability: str, verb: str, recipe: str) -> None:
        if capability not in self.model.capabilities:
            able = ", ".join(sorted(self.model.capabilities))
            raise UsageError(f"this pack cannot {verb}: it can {able}; take one of a recipe such as {recipe}")

    def _print(self, text: str) -> None:
        self.console.print(readable(text), end="", markup=False, highlight=False, soft_wrap=True)

    def show(self, picture: Picture) -> bool:
        """Show a picture by the terminal's graphics protocol, or as half blocks if it has colours; False if it has neither."""
        escapes = inline(picture, os.environ) if self.console.is_terminal else None
        if escapes is not None:
            self.console.file.write(f"{escapes}\n")
            self.console.file.flush()
            return True
        if self.console.color_system not in ("256", "truecolor"):
            return False
        self.console.print(half_blocks(picture, min(MAX_COLUMNS, self.console.width)))
        return True


def with_segment(messages: list[dict[str, Any]], segment: str | Picture | Sound) -> list[dict[str, Any]]:
    """A conversation with one more segment from the user."""
    if messages and messages[-1]["role"] == "user":
        return [*messages[:-1], {"role": "user", "content": [*messages[-1]["content"], segment]}]
    return [*messages, {"role": "user", "content": [segment]}]


COLUMNS = 32
"""Most columns of a picture that the terminal draws, and twice the most lines."""
SIDE = 1024
"""Longest side in pixels of a picture that is sent to the terminal."""
CHUNK = 4096
"""Most characters per chunk of kitty's protocol."""


def inline(picture: Picture, environment: Mapping[str, str]) -> str | None:
    """A picture as escape sequences of kitty's graphics protocol or iTerm2's inline images.

    Args:
        picture: sent as PNG, with a longest side of at most `SIDE`.
        environment: environment variables that identify the terminal. Neither protocol works inside tmux or screen.

    Returns:
        the text to write, or None if the terminal identifies itself as neither.
    """
    if environment.get("TMUX") or environment.get("STY"):
        return None
    file, sent = BytesIO(), picture.copy()
    sent.thumbnail((SIDE, SIDE))
    sent.save(file, "PNG")
    data = b64encode(file.getvalue()).decode("ascii")
    if environment.get("KITTY_WINDOW_ID") or environment.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        parts = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        continued = [int(number < len(parts)) for number in range(1, len(parts) + 1)]
        extent = f"c={COLUMNS}" if picture.width >= picture.height else f"r={COLUMNS // 2}"
        keys = [f"a=T,f=100,{extent},m={continued[0]}", *(f"m={value}" for value in continued[1:])]
        return "".join(f"\033_G{key};{part}\033\\" for key, part in zip(keys, parts, strict=True))
    if environment.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        size = len(file.getvalue())
        return f"\033]1337;File=inline=1;size={size};width={COLUMNS};height={COLUMNS // 2}:{data}\a"
    return None


def half_blocks(picture: Picture, columns: int) -> Line:
    """A picture as lines of half blocks: two pixels per character, one above the other; at most ``columns`` pixels a side."""
    image = picture.convert("RGB")
    scale = min(1.0, columns / max(image.size))
    width, height = max(1, round(image.width * scale)), max(2, round(image.height * scale / 2) * 2)
    image = image.resize((width, height))
    lines = Line()
    for row in range(0, height, 2):
        for column in range(width):
            upper, lower = (image.getpixel((column, row + k)) for k in (0, 1))
            lines.append("▀", Style(color=_colour(upper), bgcolor=_colour(lower)))
        lines.append("\n" if row + 2 < height else "")
    return lines


def _colour(pixel: Any) -> str:
    red, green, blue = pixel
    return f"rgb({red},{green},{blue})"


def _unquote(path: str) -> str:
    """A path unquoted as by a shell, since terminals quote dropped files."""
    try:
        parts = shlex.split(path)
    except ValueError:
        return path
    return parts[0] if len(parts) == 1 else path


def request_message(message: dict[str, Any]) -> dict[str, Any]:
    """A turn in the format of `xfusion serve`."""
    from xfusion.apps.server.answers import data_url

    def content_block(segment: Any) -> dict[str, Any]:
        if isinstance(segment, str):
            return {"type": "text", "text": segment}
        if isinstance(segment, Sound):
            data = b64encode(sounds.as_wav(segment)).decode("ascii")
            return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        return {"type": "image_url", "image_url": {"url": data_url(segment, {})}}

    blocks = [content_block(segment) for segment in message["content"]]
    return {"role": message["role"], "content": blocks}
