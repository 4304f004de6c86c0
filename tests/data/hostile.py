"""Data sets that mean harm, made by code: damaged and oversized pictures, names that leave the folder, endless captions."""

import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

KINDS = ("JPEG", "PNG", "GIF", "WEBP")
SPECIAL = "<|im_end|>"
GOOD, BAD, EITHER = "good", "bad", "either"


class Case(NamedTuple):
    """One example of a data set."""

    name: str
    expected: str
    """``good``: it trains. ``bad``: it is reported. ``either``: the decoder may save it; it must not crash."""
    write: Callable[[Path], None]
    """Writes into an empty folder what the source ``folder`` shall read, or its ``data.jsonl``."""


def picture(kind: str, rng: random.Random, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    """Noise in a format: what compresses badly is cut in its middle and not behind its end."""
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 255, (size[1], size[0], 3), np.uint8)
    image, file = Image.fromarray(noise), io.BytesIO()
    (image.quantize() if kind == "GIF" else image).save(file, format=kind, **options)
    return file.getvalue()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def beside(content: bytes, caption: bytes = b"a caption", name: str = "a.png") -> Callable[[Path], None]:
    """A picture with a ``.txt``; whatever it is called, its content decides."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_bytes(caption)

    return write


def row(line: object, file: str = "data.jsonl") -> Callable[[Path], None]:
    """A JSON line beside one sound picture, which it may name."""

    def write(folder: Path) -> None:
        (folder / "a.png").write_bytes(picture("PNG", random.Random(0)))
        text = line if isinstance(line, bytes) else json.dumps(line).encode()
        (folder / file).write_bytes(text + b"\n")

    return write


def png(width: int, height: int, body: bytes = b"", text_data: bytes = b"") -> bytes:
    """A PNG of RGB that says it is of this size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    text = chunk(b"zTXt", text_data) if text_data else b""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    )


def bitmap(width: int, height: int, body: bytes) -> bytes:
    """A run-length-encoded BMP."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    palette, start = bytes(1024), 14 + 40 + 1024
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + palette + body


def sparse(folder: Path) -> None:
    """A WebP of a terabyte that takes no room on the disk."""
    with (folder / "a.webp").open("wb") as file:
        file.write(b"RIFF\0\0\0\x40WEBPVP8X" + bytes(64))
        file.truncate(1 << 40)
    (folder / "a.txt").write_text("a caption")


def pictures_of_all_kinds() -> Iterator[Case]:
    """What a decoder has to read, or to refuse."""
    rng = random.Random(0)
    grey = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    frames = [Image.new("RGB", (16, 16), (8 * i, 0, 0)) for i in range(30)]
    exif = Image.Exif()
    exif[0x0112] = 6
    nonsense = Image.Exif()
    nonsense[0x0112] = 77
    readable = {
        "cmyk": encoded(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG"),
        "cmyk tiff": encoded(Image.new("CMYK", (40, 30)), "TIFF"),
        "16 bits": encoded(Image.fromarray(grey), "PNG"),
        "16 bits tiff": encoded(Image.fromarray(grey), "TIFF"),
        "floats": encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
        "rotated": encoded(Image.new("RGB", (40, 30)), "JPEG", exif=exif),
        "rotated by 77": encoded(Image.new("RGB", (40, 30)), "JPEG", exif=nonsense),
        "exif of zeros": encoded(Image.new("RGB", (40, 30)), "JPEG", exif=b"Exif\0\0" + bytes(5000)),
        "thin": encoded(Image.new("L", (1, 100_000)), "PNG"),
        "flat": encoded(Image.new("RGB", (100_000, 1)), "PNG"),
        "one pixel": encoded(Image.new("1", (1, 1)), "PNG"),
        "progressive": picture("JPEG", rng, progressive=True),
        "large": encoded(Image.new("P", (2500, 2500)), "PNG", transparency=0),
        "large in rows": encoded(Image.new("RGB", (60_000, 100)), "GIF"),
        "more behind its end": picture("JPEG", rng) + bytes(100_000),
        "a video behind its end": picture("JPEG", rng) + b"\xff\xda" * 200,  # as in a phone's motion picture
        "scans in its metadata": picture("JPEG", rng, comment=b"\xff\xda" * 200),
    }
    readable |= {
        f"animated {kind}": encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in KINDS[1:]
    }
    for name, content in readable.items():
        yield Case(name, GOOD, beside(content))
    lines = b"P3 30000 30000 255\n"
    broken = {
        "bomb": png(60_000, 60_000),
        "bomb of 65 million": png(8_001, 8_125, b"\0" * 1000),
        "bomb of zeros": png(20_000, 20_000, bytes(30_000_000)),
        "bomb, thin": png(1, 2_000_000_000),
        "bomb gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";",
        "bomb bmp": bitmap(60_000_000, 1, b"\0\2\xff\xff" * 4),
        "bomb ppm": lines + b"0 " * 1000,
        "bomb of text": png(8, 8, bytes(200), b"a\0\0" + zlib.compress(bytes(50_000_000))),
        "many scans": many_scans(),
        "scans behind a reserved marker": many_scans(b"\xff\x02\xff\xff"),
        "nothing": b"",
        "zeros": bytes(1000),
        "ones": b"\xff" * 1000,
        "html": b"<!doctype html>",
        "svg of a file": b'<svg><image href="file:///etc/passwd"/></svg>',
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "zero sides": png(0, 0),
    }
    for name, content in broken.items():
        yield Case(name, BAD, beside(content))
    yield Case("bomb bmp, legal sides", EITHER, beside(bitmap(100_000, 600, b"\0\2\xff\xff" * 4000)))
    yield Case("sparse", BAD, sparse)


def many_scans(between: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan stands there a thousand times: each would cost a walk over all pixels."""
    jpeg = encoded(Image.new("RGB", (64, 64), "red"), "JPEG", progressive=True)
    last_scan = jpeg.rindex(b"\xff\xda")
    scan = jpeg[last_scan:-2]
    return jpeg[:last_scan] + scan + between + scan * 999 + jpeg[-2:]


def names_and_words() -> Iterator[Case]:
    """What stands in the text files."""
    sound = picture("PNG", random.Random(0))
    for number, text in enumerate(
        [
            b"\xff\xfe",
            b"\xc3\x28",
            "caf\xe9".encode("latin-1"),
            "emoji".encode("utf-16"),
            b"a\xed\xa0\x80b",
            b"\x80" * 999,
        ]
    ):
        yield Case(f"no UTF-8 {number}", BAD, beside(sound, text))
        yield Case(f"no UTF-8 in a line {number}", BAD, row(b'{"image": "a.png", "text": "' + text + b'"}'))
    words = {
        "megabyte": "x" * 1_000_000,
        "five megabytes": "x " * 2_500_000,
        "special": f"a {SPECIAL} b",
        "special alone": SPECIAL,
        "empty": "",
        "blank": " \t ",
        "zero": "a\0b",
        "escape": "a\x1b[2Jb",
        "half a pair": "a\ud800b",
        "backspaces": "a\b\b\b",
    }
    for name, text in words.items():
        for key in ("text", "captions", "conversations"):
            value = {"text": text, "captions": [text], "conversations": [{"from": "gpt", "value": text}]}[key]
            yield Case(f"caption {name} as {key}", BAD, row({"image": "a.png", key: value}))
        if name != "half a pair":
            yield Case(f"caption {name} in a file", BAD, beside(sound, text.encode()))
    paths = {
        "newline": "a\n.png",
        "return": "a\r.png",
        "separator": "a\u2028.png",
        "escape": "\x1b]0;title\x07.png",
        "up": "../a.png",
        "up and up": "../../../../../../etc/passwd",
        "down and up": "b/../../a.png",
        "absolute": "/etc/passwd",
        "device": "/dev/zero",
        "process": "/proc/self/environ",
        "itself": ".",
        "empty": "",
        "zero": "a\0.png",
        "half a pair": "\ud800.png",
        "long": "a" * 5000,
        "megabyte": "a/" * 500_000,
        "up for a megabyte": "../" * 300_000,
        "address": "https://example.com/a.png",
        "data": "data:image/png;base64,AAAA",
        "number": 7,
        "nothing": None,
        "list": ["a.png"],
        "truth": True,
    }
    for name, path in paths.items():
        yield Case(f"path {name}", BAD, row({"image": path, "text": "words"}))
        yield Case(f"path {name} in metadata", BAD, row({"file_name": path, "text": "words"}, "metadata.jsonl"))
    deep = b"[" * 800 + b"]" * 800
    rows = {
        "deep": b"[" * 100_000,
        "deep braces": b'{"a":' * 100_000,
        "deep and closed": b'{"image": "a.png", "text": ' + deep + b"}",
        "deep picture": b'{"image": ' + deep + b', "text": "words"}',
        "long number": b'{"image": ' + b"9" * 5000 + b', "text": "words"}',
        "long line": b'{"image": "a.png", "text": "words", "more": "' + b"x" * 9_000_000 + b'"}',
        "no end": b'{"image": "a.png", "text": "words"',
        "no JSON": b"image: a.png",
        "group half a pair": rb'{"image": "a.png", "text": "words", "group": "\ud800"}',
        "zeros": bytes(10_000),
        "list": b'["a.png", "words"]',
        "text": b'"a.png"',
        "numbers": b'{"image": "a.png", "text": 1e999}',
        "objects": b'{"image": "a.png", "text": {"en": "words"}}',
        "turns": b'{"image": "a.png", "conversations": {"from": "gpt"}}',
    }
    for name, line in rows.items():
        yield Case(f"row {name}", BAD, row(line))
    for name in (b"new\nline.png", b"\xff\xfe.png", b"esc\x1b[2J.png", b"back\x08.png"):
        yield Case(f"file {name!r}", BAD, beside(sound, name=name.decode(errors="surrogateescape")))
    for name in ("nbsp\u202f1.png", "é.png", "日本.png", "-rf.png", "$(id).png", "a b.png", "~.png"):
        yield Case(f"file {name!r}", GOOD, beside(sound, name=name))
    good = {"image": "a.png", "text": "words"}
    yield Case("row as it should be", GOOD, row(good))
    yield Case("row with a long list", GOOD, row(good | {"captions": [f"words {n}" for n in range(999)]}))


def drawn(kind: str, size: tuple[int, int], rng: random.Random, *, is_animated: bool, is_progressive: bool) -> bytes:
    """A sound picture to be damaged: noise, or an animation of three frames."""
    if is_animated:
        frames = [Image.new("RGB", size, (80 * i, 0, 0)) for i in range(3)]
        return encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    return picture(kind, rng, size, **({"progressive": True} if is_progressive else {}))


def cut(content: bytes, position: int, *, is_animated: bool) -> Case:
    """One that is cut before its last tenth has lost pixels, whatever its format, and must be reported. Of an animation the
    first frame counts, which may be whole.
    """
    expected = EITHER if is_animated or position >= 0.9 * len(content) else BAD
    return Case(f"cut at {position} of {len(content)}", expected, beside(content[:position]))


def edited(content: bytes, edits: Iterable[tuple[int, int]]) -> Case:
    """Bytes at some positions are others."""
    changed = bytearray(content)
    for position, value in edits:
        changed[position] = value
    return Case("damaged", EITHER, beside(bytes(changed)))


def damaged(number: int) -> Case:
    """A picture that is cut off, or in which bytes are others: format, size and damage are drawn apart from each other."""
    rng = random.Random(f"damaged {number}")
    kind, size = rng.choice(KINDS), rng.choice([(40, 30), (1, 300), (300, 1), (64, 64)])
    is_animated, is_cut = kind != "JPEG" and rng.random() < 1 / 3, rng.random() < 1 / 2
    is_progressive = not is_animated and kind == "JPEG" and rng.random() < 1 / 3
    content = drawn(kind, size, rng, is_animated=is_animated, is_progressive=is_progressive)

    def edits() -> Iterator[tuple[int, int]]:
        for _ in range(rng.choice([1, 4, 40])):
            value = rng.randrange(256)
            yield rng.randrange(len(content) if rng.random() < 0.5 else min(64, len(content))), value

    case = cut(content, rng.randrange(len(content)), is_animated=is_animated) if is_cut else edited(content, edits())
    return case._replace(name=f"{number}: {'animated ' * is_animated}{kind} {case.name}")


def garbled(number: int) -> Case:
    """A JSON line in which some bytes are others, or which ends too early."""
    rng = random.Random(number)
    line = bytearray(json.dumps({"image": "a.png", "captions": ["a red apple", "apple"], "group": "fruit"}).encode())
    for _ in range(rng.choice([1, 3])):
        line[rng.randrange(len(line))] = rng.choice([*b'"\\{}[]:,/.\0u', rng.randrange(256)])
    return Case(
        f"{number}: row garbled", EITHER, row(bytes(line[: rng.choice([len(line), 1 + rng.randrange(len(line) - 1)])]))
    )
