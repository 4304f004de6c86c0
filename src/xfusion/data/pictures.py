"""Read a picture file with Pillow: upright, RGB, on white; and the facts that a written one stores."""

from __future__ import annotations

import io
import mmap
import re
import threading
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xfusion.data.sequence import Unreadable, XFusionError
from xfusion.modalities.image import on_white

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

MAX_PIXELS = 64_000_000
"""Larger pictures are refused by their header, without decoding: a small file can contain one that fills the memory."""
MAX_SIDE = 131_072
"""Largest side in pixels: decoders of some formats expand a few bytes into whole rows."""
MAX_BYTES = 600_000_000
"""Largest file, a little more than 64 million pixels of four 16-bit channels: some plug-ins read the whole file first."""
MAX_SCANS = 100
"""Largest number of scans of a JPEG: a progressive one has about ten, and each costs a pass over all pixels."""
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""A marker of a JPEG that has a length behind it, or ends the image: not a stuffed byte, a restart, a start or padding, nor a
reserved one, which decoders pass over among restarts."""
LARGE = 4_000_000
"""Pictures with more pixels are decoded one at a time, whatever the number of threads."""
_one_large = threading.Lock()
# fmt: off
SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm",
    ".heic", ".heif", ".svg", ".jxl", ".jp2", ".psd", ".ico",
})
# fmt: on
"""Suffixes of picture files; a file in a format that cannot be read is reported, not ignored."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""Formats that are read, whatever the file's name. The list is closed: Pillow runs outside programs for some formats."""
READABLE = "PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF or PPM"


class Place(Protocol):
    """Where the bytes of a picture are: a file (`pathlib.Path`), or a part of a shard (`xfusion.data.shards`)."""

    @property
    def name(self) -> str:
        """Name of the picture, for messages."""
        ...

    def read_bytes(self) -> bytes:
        """The bytes of the picture's file."""
        ...


def file_problem(path: Path, remedy: str) -> str | None:
    """What is wrong with a user's file before it is opened, or None; ``remedy`` is the advice if it is too large."""
    try:
        if not path.exists():
            return "no such file" + _near_name(path)
        if path.is_dir():
            return "is a folder: name the files in it"
        if not path.is_file():
            return "is not a file"
        if path.stat().st_size == 0:
            return "is empty (0 bytes)"
        if path.stat().st_size > MAX_BYTES:
            return f"has {path.stat().st_size:,} bytes, more than {MAX_BYTES // 1_000_000} million: {remedy}"
    except (OSError, ValueError) as error:  # a name too long, a null byte in it, a folder without permission
        return f"cannot be opened ({one_reason(error)})"
    return None


def header_problem(path: Path) -> str | None:
    """What is wrong with a picture file by its header, or None. Cheap: decodes nothing."""
    return file_problem(path, "make it smaller") or _header_problem(path)


def bytes_problem(content: bytes, *, decode: bool) -> str | None:
    """What is wrong with a picture from a shard, or None; checks only its header, or all of it."""
    if not content:
        return "is empty (0 bytes)"
    return _header_problem(io.BytesIO(content)) or (decode_problem(io.BytesIO(content)) if decode else None)


def _header_problem(file: Path | io.BytesIO, most_pixels: int = MAX_PIXELS) -> str | None:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound, below, is stricter
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
    except Image.UnidentifiedImageError:
        return f"is not a picture: {_guess_content(file)}; save it as {READABLE}"
    except Image.DecompressionBombError:
        return f"has more than {most_pixels / 1_000_000:g} million pixels: make it smaller"
    except Exception as error:  # a broken header may raise anything in Pillow's plug-ins
        return f"cannot be opened ({one_reason(error)})"
    if width * height > most_pixels:
        return f"has {width} x {height} pixels, more than {most_pixels / 1_000_000:g} million: make it smaller"
    if max(width, height) > MAX_SIDE:
        return f"has {width} x {height} pixels, a side longer than {MAX_SIDE:,}: make it smaller"
    return None


def decode_problem(file: Path | io.BytesIO) -> str | None:
    """What is wrong with the rest of a file whose header is valid, or None. Decodes all of it; thread-safe."""
    try:
        _decode(file)
    except Exception as error:  # as above
        return _decoding_problem(error)
    return None


def read(place: Place, origin: str | None = None) -> Image:
    """The whole picture: first frame, EXIF rotation applied, RGB, transparent parts on white.

    Colour profiles are not applied.

    Raises:
        Unreadable: the file is missing, broken, too large or not a picture; the message starts with ``origin``.
    """
    if isinstance(place, Path):
        file, problem = place, header_problem(place)
    else:
        try:
            content = place.read_bytes()
        except XFusionError:
            raise
        except Exception as error:  # what lies in a shard may be broken in any way
            raise Unreadable(f"{origin or place.name}: cannot be read ({one_reason(error)})") from error
        file, problem = io.BytesIO(content), bytes_problem(content, decode=False)
    if problem is None:
        try:
            return _decode(file)
        except Exception as error:  # as above
            problem = _decoding_problem(error)
    raise Unreadable(f"{origin}: {place.name} {problem}" if origin else f"{place}: {problem}")


def decode(data: bytes, origin: str, *, most_pixels: int = MAX_PIXELS) -> Image:
    """Decode a picture from a file's bytes: first frame, EXIF rotation applied, in the mode of the file.

    Args:
        data: content of the file.
        origin: its name in messages.
        most_pixels: a larger picture is refused by its header, without decoding.

    Raises:
        XFusionError: it is broken, too large or not a picture.
    """
    problem = _header_problem(io.BytesIO(data), most_pixels) if data else "is empty (0 bytes)"
    if problem is None:
        try:
            return _upright(io.BytesIO(data))
        except Exception as error:  # as above
            problem = _decoding_problem(error)
    raise XFusionError(f"{origin} {problem}")


def _decode(file: Path | io.BytesIO) -> Image:
    return on_white(_upright(file))


def _upright(file: Path | io.BytesIO) -> Image:
    from PIL import Image

    with Image.open(file, formats=FORMATS) as image:
        if image.format in ("JPEG", "MPO") and (scans := _num_scans(file)) > MAX_SCANS:
            raise ValueError(f"{scans} scans, at most {MAX_SCANS} are legal")
        if image.width * image.height <= LARGE:
            return _load(image)
        with _one_large:
            return _load(image)


def _load(image: Image) -> Image:
    from PIL import ImageOps

    image.load()
    return ImageOps.exif_transpose(image)


def _num_scans(file: Path | io.BytesIO) -> int:
    """Number of scans of a JPEG, up to one more than are legal."""
    if isinstance(file, io.BytesIO):
        return _count_scans(file.getvalue())
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _count_scans(content)


def _count_scans(content: bytes | mmap.mmap) -> int:
    """Walk the markers up to the end of the image: metadata and what is appended, such as a video, may hold any bytes."""
    count = position = 0
    while count <= MAX_SCANS and (marker := _MARKER.search(content, position)) and marker[0] != _END_OF_IMAGE:
        count += marker[0] == _START_OF_SCAN
        # The length, which follows the marker, counts itself; pixels of a scan begin behind its header.
        position = marker.end() + max(2, int.from_bytes(content[marker.end() : marker.end() + 2]))
    return count


def _decoding_problem(error: Exception) -> str:
    reason = one_reason(error)
    return f"is cut short ({reason})" if "truncat" in reason.lower() else f"cannot be decoded ({reason})"


def _guess_content(file: Path | io.BytesIO) -> str:
    """The kind of an unreadable file's content, guessed from its start."""
    if isinstance(file, Path):
        with file.open("rb") as stream:
            start = stream.read(512)
    else:
        start = file.getvalue()[:512]
    if start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        return "its content is HEIC"
    lowercase = start.lstrip().lower()
    for mark, name in ((b"<svg", "SVG"), (b"<!doctype html", "a web page"), (b"<html", "a web page"), (b"%pdf", "PDF")):
        if lowercase.startswith(mark):
            return f"its content is {name}"
    if lowercase.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, fetch the real file"
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        text = start[: error.start].decode("utf-8") if error.start > len(start) - 4 else "\0"
    return "its content is text" if "\0" not in text else "its content is of no known kind"


def _near_name(path: Path) -> str:
    """A hint if a file's name differs only in case: such a data set works on one system and breaks on another."""
    if path.parent.is_dir():
        other_name = _names_by_lower_case(path.parent, path.parent.stat().st_mtime_ns).get(path.name.lower())
        if other_name is not None:
            return f" (there is {other_name}: upper and lower case differ)"
    return ""


@lru_cache(maxsize=4)
def _names_by_lower_case(folder: Path, modified: int) -> dict[str, str]:
    """The names in a folder by their lower case, read once rather than for each of a thousand missing pictures."""
    del modified
    return {entry.name.lower(): entry.name for entry in folder.iterdir()}


def one_reason(error: Exception) -> str:
    """An error's message, in one line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split())[:200] or type(error).__name__


def png_facts(facts: Mapping[str, Any]) -> PngInfo:
    """Facts as text chunks of a PNG."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in facts.items():
        info.add_text(key, str(value).replace("\0", ""))
    return info
