"""Write new captions for the pictures of a source with any captioning model, as a folder of pictures and captions.

Every answer is written at once to a journal, ``recaption.jsonl``, with its model and prompt; a later call resumes after it. An
invalid answer is recorded there too, and its picture left out; a later call asks for it again. ``metadata.jsonl``, which makes
the folder a data source, is written last.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
"""Default prompt for a vision-language model."""
MOST_RUNNING = 20
"""Number of invalid answers at the start after which to stop: the prompt or the model is at fault, not a picture."""
PASSING = (408, 409, 429)
"""HTTP statuses of temporary refusals, besides those from 500 on."""
LONGEST_WAIT = 60.0
"""Longest wait in seconds between two tries, if the server names no time."""
Ask = Callable[[list["Image"], str], list[str]]
"""Pictures and a prompt -> a text for each."""


class Busy(XFusionError):
    """The server refuses requests at the moment.

    Args:
        message: the server's message.
        seconds: seconds until the next try; None if unknown.
    """

    def __init__(self, message: str, seconds: float | None = None):
        super().__init__(message)
        self.seconds = seconds


class Recaptioned(NamedTuple):
    """Result of `recaption`."""

    captions: int
    """Number of captions."""
    asked: int
    """Number of captions that this call requested."""
    skipped: list[str]
    """Pictures without a caption, and why."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Settings of the caption requests."""

    model: str
    """Name of the model, for the record."""
    prompt: str
    """Prompt for each picture."""
    size: int
    """Side in pixels of the pictures that are sent and saved."""
    per_minute: float | None = None
    """Largest number of requests per minute; None is no limit."""
    batch: int = 1
    """Pictures per request."""
    retries: int = 0
    """How often to retry a request if the server is `Busy`, waiting longer each time."""


def recaption(
    source: Source, ask: Ask, asking: Asking, folder: Path, *, progress: Callable[[int, int], None]
) -> Recaptioned:
    """Write new captions for all pictures of a source.

    Args:
        source: the pictures; its own captions are kept as further wordings.
        ask: returns the answers for the pictures of a request.
        asking: settings of the requests.
        folder: folder for the pictures, the journal and the new captions.
        progress: called with the number of pictures done and in total.

    Returns:
        the number of captions, how many of them this call requested, and the pictures without one.

    Raises:
        XFusionError: the folder contains captions of another source, model or prompt, or the first answers are all empty or
            too long.
        Busy: the server refused all tries.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known, turns = _journal(folder, asking, source.spec), _Turns(asking)
    asked, skipped = 0, dict[int, str]()
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        # Batches have the same pictures wherever a call resumes: neighbours in a batch may change the rounding.
        for start in range(0, len(source.examples), asking.batch):
            part = range(start, min(start + asking.batch, len(source.examples)))
            progress(start, len(source.examples))
            if all(index in known for index in part):
                continue
            shown = [source.picture(index, asking.size) for index in part]
            for index, picture, answer in zip(part, shown, turns.answers(ask, shown), strict=True):
                if index in known:
                    continue
                example, words = source.examples[index], " ".join(answer.split())
                line = {"index": index, "id": example.id, "caption": words, "model": asking.model}
                line |= {"prompt": asking.prompt, "source": source.spec, "size": asking.size}
                if words and len(words) <= MAX_CAPTION:
                    with whole_file(folder / _name(index)) as temporary:
                        picture.save(temporary, format="PNG")
                    known[index], asked = words, asked + 1
                else:
                    said = f"{len(words)} characters, from 1 to {MAX_CAPTION} are legal"
                    line |= {"caption": words[:MAX_CAPTION], "skipped": said}
                    skipped[index] = f"{example.origin}: {asking.model} answered {said}"
                with named_in_errors(folder / JOURNAL):
                    journal.write(json.dumps(line, ensure_ascii=False) + "\n")
                    journal.flush()
                    os.fsync(journal.fileno())
            if not known and len(skipped) >= min(MOST_RUNNING, len(source.examples)):
                raise XFusionError(
                    f"none of the first {len(skipped)} answers is a caption, {next(iter(skipped.values()))}: give another"
                    " prompt or model, and another folder"
                )
    lines = [
        {"file_name": _name(i), "captions": [known[i], *(c for c in e.captions if c != known[i])], "group": e.group}
        for i, e in enumerate(source.examples)
        if i in known
    ]
    with whole_file(folder / METADATA) as temporary:
        temporary.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8")
    return Recaptioned(len(known), asked, list(skipped.values()))


class _Turns:
    """Limits the rate of requests, retries included."""

    def __init__(self, asking: Asking):
        self.asking, self.next = asking, time.monotonic()

    def answers(self, ask: Ask, shown: list[Image]) -> list[str]:
        """The answers, after retries."""
        for tried in range(self.asking.retries):
            self._wait()
            try:
                return ask(shown, self.asking.prompt)
            except Busy as busy:
                time.sleep(min(LONGEST_WAIT, 0.5 * 2**tried) if busy.seconds is None else busy.seconds)
        self._wait()
        return ask(shown, self.asking.prompt)

    def _wait(self) -> None:
        if self.asking.per_minute:
            time.sleep(max(0.0, self.next - time.monotonic()))
            self.next = max(self.next, time.monotonic()) + 60 / self.asking.per_minute


def _name(index: int) -> str:
    return f"{index:07}.png"


def _journal(folder: Path, asking: Asking, spec: str) -> dict[int, str]:
    """Answers so far, by the picture's number; an incomplete last line, left by a crash, is dropped."""
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
    for number, text in enumerate(kept.splitlines(), start=1):  # split as bytes: text may contain other line separators
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
        if "skipped" not in line:
            found[line["index"]] = line["caption"]
    return found


def endpoint(url: str, model: str, *, key: str, max_tokens: int, seconds: float = 60.0) -> Ask:
    """A server with OpenAI's API. A response without text, for example because of a filter, is an empty answer.

    Raises:
        XFusionError: the package openai is missing; on a request, the server refuses for good or does not speak this API.
        Busy: on a request, it refuses temporarily (408, 409, 429, 5xx, a lost connection).
    """
    try:
        import openai
        from openai.types.chat import ChatCompletion
    except ImportError as error:
        raise XFusionError("an endpoint is asked through the package openai: pip install openai") from error
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=seconds)

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
            said = f"{url} refuses: {first_line(error)}; the captions so far are kept"
            status = error.status_code if isinstance(error, openai.APIStatusError) else None
            if isinstance(error, openai.APIConnectionError) or (status and (status in PASSING or status >= 500)):
                raise Busy(said, _named_wait(error)) from error
            raise XFusionError(said) from error
        if not isinstance(found, ChatCompletion):
            raise XFusionError(f"{url} answers {str(found)[:60]!r}, which is no chat completion: name a server's /v1")
        choices = getattr(found, "choices", None) or [None]  # the client does not validate the fields of a response
        words = getattr(getattr(choices[0], "message", None), "content", None)
        return words if isinstance(words, str) else ""

    def ask(pictures: list[Image], prompt: str) -> list[str]:
        return [ask_one(picture, prompt) for picture in pictures]

    return ask


def _named_wait(error: Exception) -> float | None:
    """Seconds until the next try, if the server's refusal names them; a date is not read."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    return None
