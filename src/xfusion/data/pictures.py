"""From a picture file to what a model sees: upright, RGB, on white, square. Decoding is Pillow's job."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from xfusion.data.sequence import XFusionError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000
"""A larger picture is refused from its header, undecoded: a small file can hold a picture that fills the memory."""
# fmt: off
SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm",
    ".heic", ".heif", ".svg", ".jxl", ".jp2", ".psd", ".ico",
})
# fmt: on
"""Files that mean to be pictures; one in a format that we do not read is a problem to name, not a file to pass over."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""What we read, whatever the file is called. A closed list: Pillow hands some formats to outside programs."""
READABLE = "PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF or PPM"


def header_problem(path: Path) -> str | None:
    """What is wrong with a picture file as far as its first bytes tell, or None. Cheap, decodes nothing."""
    from PIL import Image

    try:
        if not path.exists():
            return "no such file" + _near_name(path)
        if not path.is_file():
            return "is not a file"
        if path.stat().st_size == 0:
            return "is empty (0 bytes)"
    except (OSError, ValueError) as error:  # a name too long, a zero byte in it, a folder that may not be entered
        return f"cannot be opened ({_one_line(error)})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound, below, is stricter
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
    except Image.UnidentifiedImageError:
        return f"is not a picture: {_content(path)}; save it as {READABLE}"
    except Image.DecompressionBombError:
        return f"has more than {MAX_PIXELS // 1_000_000} million pixels: make it smaller"
    except Exception as error:  # a broken header may fail in any way: Pillow's plug-ins raise what they please
        return f"cannot be opened ({_one_line(error)})"
    if width * height > MAX_PIXELS:
        return f"has {width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million: make it smaller"
    return None


def decode_problem(path: Path) -> str | None:
    """What is wrong with the rest of a file whose header is sound, or None. Decodes all of it; safe in threads."""
    try:
        _decode(path)
    except Exception as error:  # as above
        return _decoding_failed(error)
    return None


def read(path: Path, origin: str | None = None) -> Image:
    """The whole picture: first frame, EXIF rotation applied, RGB, transparent parts on white.

    Colour profiles are not applied.

    Raises:
        XFusionError: the file is missing, broken, too large or no picture, with ``origin`` in front.
    """
    problem = header_problem(path)
    if problem is None:
        try:
            return _decode(path)
        except Exception as error:  # as above
            problem = _decoding_failed(error)
    raise XFusionError(f"{origin}: {path.name} {problem}" if origin else f"{path}: {problem}")


def square(image: Image, size: int) -> Image:
    """The middle square of a picture, resized to ``size`` x ``size``."""
    from PIL import Image as Pillow

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    middle = image.crop((left, top, left + side, top + side))  # first, so that nothing outside bleeds in
    return middle.resize((size, size), Pillow.Resampling.LANCZOS)


def on_white(image: Image) -> Image:
    """Any of Pillow's modes as RGB; deep grey is scaled down instead of clipped, transparent parts show white."""
    from PIL import Image as Pillow

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        assert converted is not None
        return converted
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Pillow.alpha_composite(Pillow.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _decode(path: Path) -> Image:
    from PIL import Image, ImageOps

    with Image.open(path, formats=FORMATS) as image:
        image.load()
        return on_white(ImageOps.exif_transpose(image))


def _decoding_failed(error: Exception) -> str:
    reason = _one_line(error)
    return f"is cut short ({reason})" if "truncat" in reason.lower() else f"cannot be decoded ({reason})"


def _eight_bits(image: Image) -> Image:
    """Grey of 16 or 32 bits or floats as 8 bits. Pillow's own conversion clips: all but the darkest turns white."""
    import numpy as np
    from PIL import Image as Pillow

    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    largest = float(values.max(initial=0))
    if image.mode == "F":
        full = 1.0 if largest <= 1 else max(largest, 255.0)
    elif image.mode.startswith("I;16"):
        full = 65535.0
    else:  # mode "I" says 32 bits, whatever the file meant: take the smallest usual range that holds the values
        full = next((float(limit) for limit in (255, 65535) if largest <= limit), largest)
    return Pillow.fromarray(np.clip(np.rint(values * (255 / full)), 0, 255).astype(np.uint8))


def _content(path: Path) -> str:
    """What the start of an unreadable file looks like."""
    with path.open("rb") as file:
        start = file.read(512)
    if start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        return "its content is HEIC"
    lowered = start.lstrip().lower()
    for mark, name in ((b"<svg", "SVG"), (b"<!doctype html", "a web page"), (b"<html", "a web page"), (b"%pdf", "PDF")):
        if lowered.startswith(mark):
            return f"its content is {name}"
    if lowered.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, fetch the real file"
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        text = start[: error.start].decode("utf-8") if error.start > len(start) - 4 else "\0"
    return "its content is text" if "\0" not in text else "its content is of no known kind"


def _near_name(path: Path) -> str:
    """A hint where only the case of the name differs: such a data set works on one system and breaks on another."""
    if path.parent.is_dir():
        for entry in path.parent.iterdir():
            if entry.name.lower() == path.name.lower():
                return f" (there is {entry.name}: upper and lower case differ)"
    return ""


def _one_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split())[:200] or type(error).__name__
