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

from xfusion.data.files import MAX_CAPTION, MAX_CAPTIONS, METADATA, control_character
from xfusion.data.sequence import XFusionError, first_line
from xfusion.data.sources import Source
from xfusion.storage import atomic_file, named_in_errors

if TYPE_CHECKING:
    from PIL.Image import Image

JOURNAL = "recaption.jsonl"
LONG = (
    "Describe this picture in several sentences: what it shows, the colours, shapes and numbers of things, where they are, the"
    " background and the style."
)
"""Default prompt for a vision-language model."""
MAX_INVALID = 20
"""Number of invalid answers at the start after which to stop: the prompt or the model is at fault, not a picture."""
TEMPORARY_STATUSES = (408, 409, 429)
"""HTTP statuses of temporary refusals, besides those from 500 on."""
LONGEST_WAIT = 60.0
"""Longest wait in seconds between two tries, if the server names no time."""
LONGEST_ASKED = 600.0
"""Longest wait in seconds that a server may ask for; one that asks for more ends the run, which the same command continues."""
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
        Busy: the server refused all tries. An `XFusionError` of its own says so if it asks to wait too long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answers, requests = _journal(folder, asking, source), _RateLimiter(asking)
    num_requested, skipped = 0, dict[int, str]()
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        # Batches have the same pictures wherever a call resumes: neighbours in a batch may change the rounding.
        for start in range(0, len(source.examples), asking.batch):
            batch = range(start, min(start + asking.batch, len(source.examples)))
            progress(start, len(source.examples))
            if all(index in answers for index in batch):
                continue
            images = [source.picture(index, asking.size) for index in batch]
            for index, picture, answer in zip(batch, images, requests.answers(ask, images), strict=True):
                if index in answers:
                    continue
                example, caption = source.examples[index], _caption_of(answer)
                line = {"index": index, "id": example.id, "caption": caption, "model": asking.model}
                line |= {"prompt": asking.prompt, "source": source.spec, "size": asking.size}
                if (problem := _problem_of(caption)) is None:
                    with atomic_file(folder / _name(index)) as temporary:
                        picture.save(temporary, format="PNG")
                    answers[index], num_requested = caption, num_requested + 1
                else:
                    line |= {"caption": caption[:MAX_CAPTION], "skipped": problem}
                    skipped[index] = f"{example.origin}: {asking.model} answered {problem}"
                with named_in_errors(folder / JOURNAL):
                    journal.write(json.dumps(line, ensure_ascii=False) + "\n")
                    journal.flush()
                    os.fsync(journal.fileno())
            if not answers and len(skipped) >= min(MAX_INVALID, len(source.examples)):
                raise XFusionError(
                    f"none of the first {len(skipped)} answers is a caption, {next(iter(skipped.values()))}: give another"
                    " prompt or model, and another folder"
                )
    lines = [
        {
            "file_name": _name(i),
            "captions": [answers[i], *(c for c in e.captions if c != answers[i])][:MAX_CAPTIONS],
            "group": e.group,
        }
        for i, e in enumerate(source.examples)
        if i in answers
    ]
    with atomic_file(folder / METADATA) as temporary:
        temporary.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8")
    return Recaptioned(len(answers), num_requested, list(skipped.values()))


class _RateLimiter:
    """Limits the rate of requests, retries included."""

    def __init__(self, asking: Asking):
        self.asking, self.next_time = asking, time.monotonic()

    def answers(self, ask: Ask, pictures: list[Image]) -> list[str]:
        """The answers, after retries."""
        for attempt in range(self.asking.retries):
            self._wait()
            try:
                return ask(pictures, self.asking.prompt)
            except Busy as busy:
                if busy.seconds is not None and busy.seconds > LONGEST_ASKED:
                    raise XFusionError(
                        f"{busy}; it asks to wait {busy.seconds:,.0f} s, more than {LONGEST_ASKED:.0f}: give the same command"
                        " again by then, it continues"
                    ) from busy
                time.sleep(min(LONGEST_WAIT, 0.5 * 2**attempt) if busy.seconds is None else busy.seconds)
        self._wait()
        return ask(pictures, self.asking.prompt)

    def _wait(self) -> None:
        if self.asking.per_minute:
            time.sleep(max(0.0, self.next_time - time.monotonic()))
            self.next_time = max(self.next_time, time.monotonic()) + 60 / self.asking.per_minute


def _name(index: int) -> str:
    return f"{index:07}.png"


def _problem_of(caption: str) -> str | None:
    """Why an answer cannot be a caption; None if it can."""
    is_legal = 0 < len(caption) <= MAX_CAPTION
    return None if is_legal else f"{len(caption)} characters, from 1 to {MAX_CAPTION} are legal"


def _caption_of(answer: str) -> str:
    """An answer in one line, without the characters that no caption may have, such as half of an emoji that was cut off."""
    words = ("".join(c for c in word if control_character(c) is None) for word in answer.split())
    return " ".join(filter(None, words))


def _journal(folder: Path, asking: Asking, source: Source) -> dict[int, str]:
    """Answers so far, by the picture's number; an incomplete last line, left by a crash, is dropped.

    Raises:
        XFusionError: the folder holds other files, or captions of another model, prompt or source, or of other pictures than
            the source has at these places now.
    """
    path = folder / JOURNAL
    if not path.is_file():
        if any(folder.iterdir()):
            raise XFusionError(f"{folder} holds other files: name an empty folder")
        return {}
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        path.write_bytes(complete)
    answers: dict[int, str] = {}
    settings = {"model": asking.model, "prompt": asking.prompt, "source": source.spec, "size": asking.size}
    # Split as bytes: text may contain other line separators.
    for number, line_bytes in enumerate(complete.splitlines(), start=1):
        try:
            line = json.loads(line_bytes)
        except ValueError as error:  # undecodable, too
            raise XFusionError(f"{path}, line {number}: is not JSON: {error}; mend the line or take it out") from error
        kinds = {"index": int, "id": str, "caption": str}
        invalid = [
            key for key, kind in kinds.items() if not isinstance(line, dict) or not isinstance(line.get(key), kind)
        ]
        if invalid := invalid + [key for key in settings if isinstance(line, dict) and key not in line]:
            raise XFusionError(
                f"{path}, line {number}: has no legal field {invalid[0]!r}; mend the line or take it out"
            )
        for key, expected in settings.items():
            if line[key] != expected:
                raise XFusionError(
                    f"{path} was made with {key} {line[key]!r}, this call has {expected!r}: name another folder"
                )
        index, examples = line["index"], source.examples
        if (now := examples[index].id if 0 <= index < len(examples) else "none") != line["id"]:
            raise XFusionError(
                f"{path}, line {number}: picture {index} of {source.spec} was {line['id']!r} and is {now!r} now: undo the"
                " change, or name another folder"
            )
        if "skipped" not in line:
            answers[line["index"]] = line["caption"]
    return answers


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
            response = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": content}],
                max_tokens=max_tokens,
                temperature=0,
                seed=0,
            )
        except openai.OpenAIError as error:
            message = f"{url} refuses: {first_line(error)}; the captions so far are kept"
            status = error.status_code if isinstance(error, openai.APIStatusError) else None
            if isinstance(error, openai.APIConnectionError) or (
                status and (status in TEMPORARY_STATUSES or status >= 500)
            ):
                raise Busy(message, _retry_after(error)) from error
            raise XFusionError(message) from error
        if not isinstance(response, ChatCompletion):
            raise XFusionError(
                f"{url} answers {str(response)[:60]!r}, which is no chat completion: name a server's /v1"
            )
        choices = getattr(response, "choices", None) or [None]  # the client does not validate the fields of a response
        text = getattr(getattr(choices[0], "message", None), "content", None)
        return text if isinstance(text, str) else ""

    def ask(pictures: list[Image], prompt: str) -> list[str]:
        return [ask_one(picture, prompt) for picture in pictures]

    return ask


def _retry_after(error: Exception) -> float | None:
    """Seconds until the next try, if the server's refusal names them; a date is not read."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    return None
