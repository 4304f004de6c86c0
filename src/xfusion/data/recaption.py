"""New captions for the pictures of a source, by whatever can name them; a folder of pictures and words comes out.

Every answer goes at once into a journal, ``recaption.jsonl``, with the model and the prompt that made it; a call after a
break goes on behind it. ``metadata.jsonl``, which makes the folder a data source, is written last.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xfusion.data.files import MAX_CAPTION, METADATA
from xfusion.data.sequence import XFusionError, first_line
from xfusion.data.sources import Source
from xfusion.storage import named_in_errors, whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

JOURNAL = "recaption.jsonl"
LONG = (
    "Describe this picture in several sentences: what it shows, the colours, shapes and numbers of things, where they are, the"
    " background and the style."
)
"""What a vision-language model is asked, where nobody says otherwise."""
Ask = Callable[[list["Image"], str], list[str]]
"""Pictures and a prompt -> words for each."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How captions are asked for."""

    model: str
    """Who answers, for the record."""
    prompt: str
    """What is asked of each picture."""
    size: int
    """Side in pixels of the pictures that are shown, and kept."""
    per_minute: float | None = None
    """Requests per minute at most; None is no limit."""
    batch: int = 1
    """Pictures of a request."""


def recaption(
    source: Source, ask: Ask, asking: Asking, folder: Path, *, progress: Callable[[int, int], None]
) -> tuple[int, int]:
    """Caption all pictures of a source anew.

    Args:
        source: whose pictures; its own captions are kept as further wordings.
        ask: answers for the pictures of a request.
        asking: what is asked, of whom, and how often.
        folder: pictures, journal and the new captions.
        progress: told pictures done and in all.

    Returns:
        how many captions there are, and how many of them were asked for in this call.

    Raises:
        XFusionError: the folder holds captions of another source, model or prompt; an answer is empty or too long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _journal(folder, asking, source.spec)
    asked, next_time = 0, time.monotonic()
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        # The same pictures stand together whenever a call begins: neighbours in a batch may change the rounding.
        for start in range(0, len(source.examples), asking.batch):
            part = range(start, min(start + asking.batch, len(source.examples)))
            progress(start, len(source.examples))
            if all(index in known for index in part):
                continue
            shown = [source.picture(index, asking.size) for index in part]
            if asking.per_minute:
                time.sleep(max(0.0, next_time - time.monotonic()))
                next_time = max(next_time, time.monotonic()) + 60 / asking.per_minute
            for index, picture, answer in zip(part, shown, ask(shown, asking.prompt), strict=True):
                if index in known:
                    continue
                example, words = source.examples[index], " ".join(answer.split())
                if not words or len(words) > MAX_CAPTION:
                    raise XFusionError(
                        f"{example.origin}: {asking.model} answered {len(words)} characters, from 1 to {MAX_CAPTION} are"
                        " legal: change the prompt; the captions so far are kept"
                    )
                with whole_file(folder / _name(index)) as temporary:
                    picture.save(temporary, format="PNG")
                line = {"index": index, "id": example.id, "caption": words, "model": asking.model}
                line |= {"prompt": asking.prompt, "source": source.spec, "size": asking.size}
                with named_in_errors(folder / JOURNAL):
                    journal.write(json.dumps(line, ensure_ascii=False) + "\n")
                    journal.flush()
                    os.fsync(journal.fileno())
                known[index], asked = words, asked + 1
    lines = [
        {"file_name": _name(i), "captions": [known[i], *(c for c in e.captions if c != known[i])], "group": e.group}
        for i, e in enumerate(source.examples)
    ]
    with whole_file(folder / METADATA) as temporary:
        temporary.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8")
    return len(known), asked


def _name(index: int) -> str:
    return f"{index:07}.png"


def _journal(folder: Path, asking: Asking, spec: str) -> dict[int, str]:
    """What was answered so far, by the picture's number; a last line that a crash cut is dropped."""
    path = folder / JOURNAL
    if not path.is_file():
        if any(folder.iterdir()):
            raise XFusionError(f"{folder} holds other files: name an empty folder")
        return {}
    whole = path.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        path.write_bytes(kept)
    found: dict[int, str] = {}
    asked = {"model": asking.model, "prompt": asking.prompt, "source": spec, "size": asking.size}
    for number, text in enumerate(kept.splitlines(), start=1):  # of bytes: words may hold other ends of lines
        try:
            line = json.loads(text)
        except ValueError as error:  # undecodable, too
            raise XFusionError(f"{path}, line {number}: is not JSON: {error}; mend the line or take it out") from error
        kinds = {"index": int, "caption": str}
        bad = [key for key, kind in kinds.items() if not isinstance(line, dict) or not isinstance(line.get(key), kind)]
        if bad := bad + [key for key in asked if isinstance(line, dict) and key not in line]:
            raise XFusionError(f"{path}, line {number}: has no legal field {bad[0]!r}; mend the line or take it out")
        for key, own in asked.items():
            if line[key] != own:
                raise XFusionError(
                    f"{path} was made with {key} {line[key]!r}, this call has {own!r}: name another folder"
                )
        found[line["index"]] = line["caption"]
    return found


def endpoint(url: str, model: str, *, key: str, retries: int, max_tokens: int, seconds: float = 60.0) -> Ask:
    """A server that speaks OpenAI's API; refusals of the moment (429, 5xx, a lost line) are tried again, ever later.

    Raises:
        XFusionError: the package openai is missing; when asked, the server refuses for good.
    """
    try:
        import openai
    except ImportError as error:
        raise XFusionError("an endpoint is asked through the package openai: pip install openai") from error
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=seconds)

    def ask_one(picture: Image, prompt: str) -> str:
        import base64
        import io

        file = io.BytesIO()
        picture.save(file, format="PNG")
        address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
        content: list = [{"type": "image_url", "image_url": {"url": address}}]
        content += [{"type": "text", "text": prompt}] if prompt else []
        try:
            found = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": content}],
                max_tokens=max_tokens,
                temperature=0,
                seed=0,
            )
        except openai.OpenAIError as error:
            raise XFusionError(f"{url} refuses: {first_line(error)}; the captions so far are kept") from error
        return found.choices[0].message.content or ""

    def ask(pictures: list[Image], prompt: str) -> list[str]:
        return [ask_one(picture, prompt) for picture in pictures]

    return ask
