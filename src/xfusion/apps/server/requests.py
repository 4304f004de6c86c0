"""Requests of clients: the supported fields of OpenAI's requests, validated before anything is computed.

An unknown field that would change the answer is refused, not ignored. A field that is null or states the default is
accepted, since clients send such fields by themselves and send earlier turns back as they received them.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import queue
import secrets
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from PIL import Image as PILImage
from PIL import ImageOps
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from xfusion.apps.server.answers import Refused
from xfusion.apps.server.limits import Limits
from xfusion.data import pictures, sounds
from xfusion.data.requests import PICTURE
from xfusion.data.sequence import XFusionError
from xfusion.modalities.image import on_white, square_picture, touched

if TYPE_CHECKING:
    from xfusion.model import Model

FETCH_SECONDS = 10.0
"""How long fetching the pictures of a request may take, from the resolution of a host's name to the last byte."""
STOP_CHARACTERS = 256
"""Longest stop sequence: all of the answer is compared with it."""
LONGEST = 2048
"""Most entries of any list of a request."""
FIELDS = 64
"""Most fields of any object of a request."""
BESIDE_WORDS = 20_000
"""Commas and brackets that a request may contain besides those of its text."""
DATA_HEAD = 200
"""Longest header of a data URL, in characters."""
MAX_QUOTED = 300
"""Characters of the request that an error may quote."""
STEPS = 25
"""Default number of sampling steps, or the server's limit if that is smaller."""
MOST_GUIDANCE = 100.0
"""Largest absolute guidance; far larger values overflow."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields: Any) -> Any:
        """Treat null fields, known or not, as left out."""
        if not isinstance(fields, dict):
            return fields
        if len(fields) > FIELDS:  # each unknown field would be a separate error
            count = {"count": len(fields), "most": FIELDS}
            raise PydanticCustomError("too_many_fields", "an object has {count} fields, more than {most}", count)
        return {key: value for key, value in fields.items() if value is not None}


Empty = Annotated[list[Any], Field(max_length=0)]
"""A list that clients send although it is empty."""
Bounded = Field(max_length=LONGEST, fail_fast=True)
"""A list that is validated up to its first error."""
Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]
"""A stop sequence."""


class _Request(_Strict):
    model: str | None = None
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    user: str | None = None
    """Accepted and ignored."""

    def first_seed(self) -> int:
        """The seed of the first answer; random if the request names none."""
        return secrets.randbelow(2**31) if self.seed is None else self.seed


class _Drawing(_Request):
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(allow_inf_nan=False, ge=-MOST_GUIDANCE, le=MOST_GUIDANCE)] | None = None
    size: str | int | None = None
    """Output side: ``64``, ``64x64`` or ``auto``."""

    def drawing_steps(self, limits: Limits) -> int:
        """The number of sampling steps.

        Raises:
            Refused: more than the server allows.
        """
        if self.steps is None:
            return min(STEPS, limits.steps)
        within(self.steps, limits.steps, "steps")
        return self.steps

    def side(self) -> int | None:
        """The output side in pixels; None for the trained one."""
        if self.size in (None, "auto"):
            return None
        sides = str(self.size).split("x")
        if len(set(sides)) != 1 or len(sides) > 2 or not (sides[0].isascii() and sides[0].isdigit()):
            raise Refused(400, f"size {self.size!r}: pictures are square, such as '64x64'", param="size")
        return int(sides[0][:9])


class Words(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class Address(_Strict):
    """URL of a picture."""

    url: str
    detail: str | None = None
    """Accepted and ignored: pictures are read at the size that the pack was trained at."""


class Picture(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: Address


class Recording(_Strict):
    """A sound file."""

    data: str
    """Base64."""
    format: Literal["wav", "mp3", "flac", "ogg"]
    """Accepted, but the format is read from the file itself."""


class Heard(_Strict):
    """A sound of a message."""

    type: Literal["input_audio"]
    input_audio: Recording


Block = Annotated[Words | Picture | Heard, Field(discriminator="type")]
"""A part of a message."""


class Message(_Strict):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Block], Bounded] | None = None
    images: Annotated[list[Picture], Bounded] = []
    """Pictures that this server drew in an earlier turn, sent back unchanged."""
    name: str | None = None
    annotations: Empty = []
    tool_calls: Empty = []


class PlainText(_Strict):
    """Response format: plain text only."""

    type: Literal["text"]


class StreamOptions(_Strict):
    """What a stream contains besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Chat(_Drawing):
    """A request for the next turn of a conversation."""

    messages: Annotated[list[Message], Field(min_length=1), Bounded]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1), Bounded] = ["text"]
    """``image`` draws a picture; together with ``text``, text follows the picture."""
    draw: Literal["never", "auto"] = "never"
    """``auto`` lets the pack's opening head decide whether the answer starts with a picture; ``modalities`` decides itself."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Bounded] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    """Accepted and ignored."""
    store: bool | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: PlainText | None = None
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    """Accepted and ignored: there are no tools."""
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None

    def stops(self) -> tuple[str, ...]:
        """The sequences that end an answer."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > 4:
            raise Refused(400, f"stop has {len(stops)} sequences: give at most 4", param="stop")
        return stops


class Images(_Drawing):
    """A request for pictures of a prompt or, with a picture in the form, for inpainting a part of it."""

    prompt: str
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Annotated[Literal[False], BeforeValidator(lambda value: False if value == "false" else value)] | None = None
    """A form has it as text."""


class Embeddings(_Strict):
    """A request for embeddings of texts and of pictures; pictures are given as data URLs."""

    model: str | None = None
    input: str | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    """Accepted and ignored."""

    def inputs(self) -> list[str]:
        """The inputs to embed, in order."""
        return [self.input] if isinstance(self.input, str) else self.input


Kind = TypeVar("Kind", bound=BaseModel)


def parse_body(kind: type[Kind], body: bytes, limits: Limits) -> Kind:
    """Parse a JSON body; its values are counted first, since each parsed value takes far more memory than its text.

    Raises:
        Refused: as `parse`, or it has more values than a request within the limits.
    """
    limit = limits.characters + limits.inputs + BESIDE_WORDS
    count = sum(map(body.count, (b",", b"[", b"{")))
    if count > limit:
        message = f"the request holds {count} commas and opening brackets, more than the {limit} that this server reads"
        raise Refused(400, message, code="too_many_values")
    return parse(kind, body)


def parse(kind: type[Kind], body: bytes | Mapping[str, Any]) -> Kind:
    """Parse a JSON body, or the fields of a form.

    Raises:
        Refused: 400 with the first error.
    """
    try:
        return kind.model_validate_json(body) if isinstance(body, bytes) else kind.model_validate(body)
    except ValidationError as error:
        # For a field of several possible kinds, report the error of the kind that matches best: the deepest.
        first = max(error.errors(include_url=False, include_context=False), key=lambda entry: len(entry["loc"]))
    is_unknown = first["type"] == "extra_forbidden"
    *where, last = first["loc"] or ("",)  # an unknown field may have any name
    parts = [part for part in where if not _is_kind(part)] + [last] * (is_unknown or not _is_kind(last))
    param = ".".join(map(str, parts))[:MAX_QUOTED] or None
    if is_unknown:
        raise Refused(
            400, f"{param or repr('')} is not a parameter of this server", param=param, code="unknown_parameter"
        )
    quoted = f", not {str(first['input'])[:50]!r}" if first["type"] == "literal_error" else ""
    message = first["msg"][:MAX_QUOTED]
    raise Refused(400, f"{param}: {message}{quoted}" if param else message, param=param)


def _is_kind(part: str | int) -> bool:
    """Whether a part of an error's location is not from the request, but the kind that was tried."""
    return isinstance(part, str) and (part in ("str", "int") or not part.isidentifier())


def within(value: float, limit: float, name: str) -> None:
    """Refuse a value beyond the server's limit."""
    if value > limit:
        raise Refused(400, f"{name} is {value:g}, more than the {limit:g} that this server allows", param=name)


# ---------------------------------------------------------------------------------------------------------- pictures


def messages(
    params: Chat, model: Model, limits: Limits, hosts: frozenset[str], *, own_pictures: bool = True
) -> list[dict[str, Any]]:
    """The turns of a conversation as `xfusion.generation.conversation` accepts them, with pictures and sounds decoded.

    The assistant's pictures are decoded if the pack reads pictures: the newest ones, as many as the server's limit allows
    besides the user's. The others are replaced by ``(picture)``.

    Args:
        own_pictures: whether the assistant's pictures are read.

    Raises:
        Refused: it is beyond the limits, or a picture or a sound cannot be fetched or decoded.
    """
    turns = [(m.role, [*m.images, *_blocks(m)]) for m in params.messages]  # a drawn picture precedes its text
    blocks = [block for _, turn in turns for block in turn]
    drawn_pictures = [
        block for role, turn in turns if role == "assistant" for block in turn if isinstance(block, Picture)
    ]
    num_sounds = sum(isinstance(block, Heard) for block in blocks)
    num_pictures = sum(isinstance(block, Picture) for block in blocks) - len(drawn_pictures)
    within(num_pictures, limits.pictures, "pictures")
    within(num_sounds, limits.sounds, "sounds")
    num_read = limits.pictures - num_pictures if own_pictures and "caption" in model.capabilities else 0
    placeholder_ids = {id(picture) for picture in drawn_pictures[: max(0, len(drawn_pictures) - num_read)]}
    characters = sum(len(b.text) for b in blocks if isinstance(b, Words)) + len(PICTURE) * len(placeholder_ids)
    within(characters, limits.characters, "characters")
    if num_pictures and "caption" not in model.capabilities:
        raise incapable(model, "read pictures", "llava_1_5")
    if num_sounds and "caption" not in model.capabilities:
        raise incapable(model, "hear", "qwen_audio")
    result, fetching = [], _Fetching(limits, hosts)
    for role, turn in turns:
        content = [
            PICTURE if id(block) in placeholder_ids else _decode_block(block, model, limits, fetching) for block in turn
        ]
        if any(id(block) in placeholder_ids for block in turn):
            content = _join_lines(content)
        result.append({"role": "system" if role == "developer" else role, "content": content})
    return result


def _join_lines(content: list[Any]) -> list[Any]:
    """The texts of a turn, one per line, as turns with ``(picture)`` are written elsewhere."""
    parts = [segment for segment in content if segment != ""]
    if all(isinstance(segment, str) for segment in parts):
        return ["\n".join(parts)]
    return [part for segment in parts for part in ("\n", segment)][1:]


def embedding_inputs(
    params: Embeddings, model: Model, limits: Limits, hosts: frozenset[str]
) -> list[str | PILImage.Image]:
    """The inputs as `Model.embed` accepts them: a base64 data URL is a picture, everything else is text.

    Raises:
        Refused: they are beyond the limits, one is empty, or a picture cannot be read.
    """
    inputs = params.inputs()
    are_pictures = [_is_file(text) for text in inputs]
    within(len(inputs), limits.inputs, "input")
    within(sum(are_pictures), limits.pictures, "pictures")
    within(sum(len(text) for text, is_picture in zip(inputs, are_pictures, strict=True) if not is_picture), limits.characters,
           "characters")  # fmt: skip
    if not all(inputs):
        raise Refused(400, "input: a text is empty, there is nothing to embed", param="input")
    fetching = _Fetching(limits, hosts)
    return [
        _open_picture(text, model, limits, fetching) if is_picture else text
        for text, is_picture in zip(inputs, are_pictures, strict=True)
    ]


def _decode_block(block: Words | Picture | Heard, model: Model, limits: Limits, fetching: _Fetching) -> Any:
    if isinstance(block, Words):
        return block.text
    if isinstance(block, Picture):
        return _open_picture(block.image_url.url, model, limits, fetching)
    try:
        audio = model.audio
    except XFusionError as error:
        raise Refused(400, str(error), code="not_capable", param="model") from error
    try:
        data = _decode_base64(block.input_audio.data, "input_audio", "invalid_audio")
        sound = sounds.decode(data, "input_audio", most_samples=min(limits.samples, sounds.MAX_SAMPLES))
        return audio.as_heard(sound, audio.sizes[0])
    except XFusionError as error:
        raise Refused(400, str(error), param="input_audio", code="invalid_audio") from error


def _blocks(message: Message) -> list[Words | Picture | Heard]:
    if isinstance(message.content, str):
        return [Words(type="text", text=message.content)]
    return list(message.content or [])


def incapable(model: Model, verb: str, recipe: str) -> Refused:
    """The error for something that a model cannot do, and a model of ``recipe`` could."""
    able = ", ".join(sorted(model.capabilities))
    message = f"this model cannot {verb}: it can {able}; take a pack of a recipe such as {recipe}"
    return Refused(400, message, code="not_capable", param="model")


def _open_picture(url: str, model: Model, limits: Limits, fetching: _Fetching) -> PILImage.Image:
    return resize_for_model(decode_picture(fetching.get(url), "image_url", limits), model)


def decode_picture(data: bytes, name: str, limits: Limits) -> PILImage.Image:
    """Decode a picture that was sent; error messages call it ``name``."""
    try:
        return pictures.decode(data, name, most_pixels=limits.pixels)
    except XFusionError as error:
        raise Refused(400, str(error), param=name, code="invalid_image") from error


def resize_for_model(picture: PILImage.Image, model: Model) -> PILImage.Image:
    """A picture resized to the model's input size, so that waiting jobs are small."""
    try:
        side = model.reads(picture).sizes[0]
    except XFusionError as error:
        raise Refused(400, str(error), code="not_capable", param="model") from error
    return _square_picture(picture, side)


def resize_for_drawing(picture: PILImage.Image, model: Model) -> PILImage.Image:
    """A picture as `trained_side` asks for it: a part of it is to be drawn anew."""
    return _square_picture(picture, trained_side(model))


def _square_picture(picture: PILImage.Image, side: int) -> PILImage.Image:
    try:
        return square_picture(picture, side)
    except Exception as error:  # modes that Pillow can read but not convert
        raise Refused(400, f"a picture of mode {picture.mode} cannot be read", code="invalid_image") from error


def trained_side(model: Model) -> int:
    """The side of the pictures that a model draws, and, if it is a single pack, reads.

    Raises:
        Refused: it is an audio model.
    """
    try:
        return model.image.sizes[0]
    except XFusionError as error:
        raise Refused(400, str(error), code="not_capable", param="model") from error


def _decode_base64(data: str, name: str, code: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"{name} is not base64: {error}", code=code) from error


def _is_file(url: str) -> bool:
    """Whether a text is a base64 data URL: plain text may start with ``data:``, too."""
    head, comma, _ = url[:DATA_HEAD].lower().partition(",")
    return bool(comma) and head.startswith("data:") and head.endswith(";base64") and not any(map(str.isspace, head))


class _Fetching:
    """Gets the pictures of one request, which share `FETCH_SECONDS`: a reader must not be held for that long by each."""

    def __init__(self, limits: Limits, hosts: frozenset[str]):
        self.limits, self.hosts, self.seconds = limits, hosts, FETCH_SECONDS

    def get(self, url: str) -> bytes:
        """The bytes at a URL."""
        if url[:5].lower() == "data:":
            if not _is_file(url):
                raise Refused(400, "image_url: a data URL looks like data:image/png;base64,...", code="invalid_image")
            return _decode_base64(url.partition(",")[2], "image_url", "invalid_image")
        try:
            parts = urllib.parse.urlsplit(url)
            host = parts.hostname or ""
        except ValueError as error:
            raise Refused(400, f"image_url is no address: {error}", code="invalid_image") from error
        if host not in self.hosts or parts.scheme not in ("http", "https"):
            raise Refused(400, "image_url: this server takes data URLs only, and fetches no picture from there",
                          code="remote_image", param="image_url")  # fmt: skip
        start = time.monotonic()
        try:
            data = _download(parts, self.limits.body, self.seconds)
        except TimeoutError as error:
            reason = f"its host did not send it within {FETCH_SECONDS:g} seconds, the time of all pictures of a request"
            raise _fetch_refusal(reason) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _fetch_refusal(str(error) or repr(error)) from error
        self.seconds -= time.monotonic() - start
        within(len(data), self.limits.body, "image_url")
        return data


def _download(parts: urllib.parse.SplitResult, limit: int, seconds: float) -> bytes:
    """A host's response, without redirects and proxies, up to one byte more than ``limit``.

    Raises:
        TimeoutError: it did not come within ``seconds``, from the resolution of the host's name to the last byte.
        OSError, ValueError, HTTPException: it cannot be fetched.
    """
    end, host, timed_out = time.monotonic() + seconds, parts.hostname or "", threading.Event()

    def abort(open_socket: socket.socket) -> None:
        timed_out.set()
        with suppress(OSError):  # the bare socket, since TLS would wait for the other side
            socket.socket.shutdown(open_socket, socket.SHUT_RDWR)

    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, parts.port, context=context)
        open_socket = context.wrap_socket(
            _connect(host, connection.port, end), do_handshake_on_connect=False, server_hostname=host
        )
    else:
        connection = http.client.HTTPConnection(host, parts.port)
        open_socket = _connect(host, connection.port, end)
    connection.sock = open_socket
    with closing(connection):
        # A socket timeout applies to each read, so a slow host could hold a reader for hours.
        timer = threading.Timer(_seconds_until(end), abort, [open_socket])
        timer.daemon = True
        timer.start()
        try:
            if isinstance(open_socket, ssl.SSLSocket):
                open_socket.do_handshake()
            connection.request("GET", urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")))
            response = connection.getresponse()
            if response.status != 200:
                raise _fetch_refusal(f"its host answers {response.status} {response.reason}")
            data = response.read(limit + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if timed_out.is_set():
                raise TimeoutError from error
            raise
        finally:
            timer.cancel()
    if timed_out.is_set():
        raise TimeoutError
    return data


def _connect(host: str, port: int, end: float) -> socket.socket:
    """A connection to a host; its addresses share the time until ``end``."""
    addresses, failure = _resolve(host, port, end), OSError(f"{host} has no address")
    for i, (family, kind, protocol, _, address) in enumerate(addresses):
        open_socket = socket.socket(family, kind, protocol)
        try:
            open_socket.settimeout(_seconds_until(end) / (len(addresses) - i))
            open_socket.connect(address)
            open_socket.settimeout(None)
            return open_socket
        except OSError as error:
            open_socket.close()
            failure = error
    raise failure


def _resolve(host: str, port: int, end: float) -> list[Any]:
    """The addresses of a host, asked for in a thread of its own, since resolving a name has no timeout."""
    answers = queue.SimpleQueue[list[Any] | OSError]()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_seconds_until(end))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def _seconds_until(end: float) -> float:
    """The time that is left; a little where none is, since 0 is no timeout."""
    return max(0.001, end - time.monotonic())


def _fetch_refusal(reason: str) -> Refused:
    return Refused(400, f"image_url cannot be fetched: {reason}", code="remote_image", param="image_url")


def picture_and_mask(
    image: bytes, mask: bytes | None, model: Model, limits: Limits
) -> tuple[PILImage.Image, PILImage.Image]:
    """An uploaded picture and its mask, white where it is to be inpainted.

    As with OpenAI, the transparent parts of the mask, or of a picture without one, are inpainted; in a mask without
    transparency, or all opaque, the white parts. Each token is white or black as a whole, decided at full resolution before
    resizing.

    Raises:
        Refused: it is not a picture, the sizes differ, or no part of the drawn area is to be inpainted.
    """
    picture = ImageOps.exif_transpose(decode_picture(image, "image", limits))
    holes = picture if mask is None else ImageOps.exif_transpose(decode_picture(mask, "mask", limits))
    if holes.size != picture.size:
        raise Refused(
            400,
            f"the picture has {picture.width} x {picture.height} pixels, the mask {holes.width} x {holes.height}:"
            " give both the same size",
            param="mask",
        )
    has_alpha = "A" in holes.getbands() or "transparency" in holes.info
    alpha = holes.convert("RGBA").getchannel("A") if has_alpha else None
    if alpha is not None and (mask is None or alpha.getextrema() != (255, 255)):
        holes = alpha.point([255] + [0] * 255)
    elif mask is None:
        raise Refused(400, "there is no mask, and the picture has no transparent part to draw anew", param="mask")
    else:
        holes = on_white(holes).convert("L").point([0] * 128 + [255] * 128)
    side = trained_side(model)
    grid = model.image.grid(side)
    touched_tokens = touched(holes, grid)
    if not bool(touched_tokens.any()):
        source = "the mask" if mask is not None else "the picture"
        raise Refused(400, f"{source} leaves nothing to draw anew in its middle square: mark some of it", param="mask")
    tokens = PILImage.fromarray(touched_tokens.view(grid).byte().mul(255).numpy())
    return resize_for_drawing(picture, model), tokens.resize((side, side), PILImage.Resampling.NEAREST)
