"""What a model sees of a picture file, and which files are refused by name."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from xfusion.data import pictures
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source
from xfusion.modalities.image import middle_square


def save(path: Path, colour="red", size=(40, 30), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three good pictures with captions."""
    root = tmp_path / "photos"
    for number, colour in enumerate(["red", "green", "blue"]):
        save(root / f"{number}.png", colour)
        (root / f"{number}.txt").write_text(f"a {colour} card\n{colour}\n")
    return root


def png_of_size(path: Path, width: int, height: int) -> None:
    """A few bytes that claim to be a large picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def cut(path: Path) -> None:
    whole = path.with_suffix(".whole")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole, format="JPEG" if path.suffix == ".jpg" else "PNG")
    path.write_bytes(whole.read_bytes()[:2000])
    whole.unlink()


def named_pipe(path: Path) -> None:
    os.mkfifo(path)


BAD_PICTURES = {
    "text.png": (
        lambda p: p.write_text("not a picture"),
        "is not a picture: its content is text; save it as PNG, JPEG",
    ),
    "page.jpg": (lambda p: p.write_text("<!DOCTYPE html>"), "is not a picture: its content is a web page"),
    "pointer.png": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "it is a Git LFS pointer"),
    "drawing.svg": (lambda p: p.write_text("<svg></svg>"), "is not a picture: its content is SVG"),
    "phone.heic": (lambda p: p.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)), "its content is HEIC"),
    "zeros.png": (lambda p: p.write_bytes(bytes(99)), "its content is of no known kind"),
    "none.png": (lambda p: p.write_bytes(b""), "is empty (0 bytes)"),
    "cut.png": (cut, "is cut short"),
    "cut.jpg": (cut, "is cut short"),
    "wide.png": (lambda p: png_of_size(p, 8001, 8000), "has 8001 x 8000 pixels, more than 64 million: make it smaller"),
    "bomb.png": (lambda p: png_of_size(p, 60000, 60000), "has more than 64 million pixels: make it smaller"),
    "pipe.png": (named_pipe, "is not a file"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_picture_is_named_with_its_file(folder, name):
    make, message = BAD_PICTURES[name]
    make(folder / name)
    (folder / name).with_suffix(".txt").write_text("a caption")
    with pytest.raises(XFusionError) as caught:
        open_source(str(folder))
    assert str(caught.value).startswith(f"{folder}: 1 of 4 examples are bad: {folder / name}: ")
    assert message in str(caught.value)
    assert str(caught.value).endswith(f"xfusion data check {folder}; to leave them out, allow a share of 0.25")


def test_large_pictures_are_refused_without_decoding(tmp_path, monkeypatch):
    path = tmp_path / "wide.png"
    png_of_size(path, 8001, 8000)
    monkeypatch.setattr(pictures, "_decode", lambda path: pytest.fail("decoded"))
    with pytest.raises(XFusionError, match="more than 64 million"):
        pictures.read(path)


def test_headers_alone_find_no_damage_but_the_picture_does(folder):
    cut(folder / "0.png")
    source = open_source(str(folder), decode=False)
    with pytest.raises(XFusionError, match=r"0\.png is cut short"):
        source.picture(0, 32)


def test_picture_that_vanishes_later_is_named(folder):
    source = open_source(str(folder))
    (folder / "1.png").unlink()
    with pytest.raises(XFusionError, match=r"1\.png: 1\.png no such file"):
        source.picture(1, 32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]),
    place=st.floats(0, 1),
    junk=st.binary(max_size=8),
)
def test_no_damage_to_a_picture_breaks_the_check(tmp_path, kind, place, junk):
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(noise).save(path, format=kind)
    data = bytearray(path.read_bytes())
    start = int(place * len(data))
    data[start : start + len(junk)] = junk
    path.write_bytes(data)
    problem = pictures.header_problem(path) or pictures.decode_problem(path)
    if problem is None:
        assert pictures.read(path).mode == "RGB"
    else:
        assert "\n" not in problem
        with pytest.raises(XFusionError, match=r"a\.png: "):
            pictures.read(path)


def drawn(path: Path, size: int = 8) -> np.ndarray:
    picture = middle_square(pictures.read(path), size)
    assert (picture.mode, picture.size) == ("RGB", (size, size))
    return np.asarray(picture)


def test_deep_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "deep.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("deep.png", "deep.tif", "float.tif"):
        seen = np.asarray(pictures.read(tmp_path / name))[..., 0]
        assert np.abs(seen - ramp / 257.0).max() <= 1, name


def test_print_colours(tmp_path):
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red, green, blue = drawn(tmp_path / "red.jpg")[4, 4]
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("red", (0, 0, 32, 32))  # upright: red at the top left
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    for step in undo.get(orientation, []):
        picture = picture.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    seen = drawn(tmp_path / "turned.jpg")
    assert seen[1, 1, 1] < 40
    assert seen[1, 6, 1] > 200
    assert seen[6, 1, 1] > 200
    assert seen[6, 6, 1] > 200


def test_transparent_parts_are_white(tmp_path):
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 10, 20))
    half.save(tmp_path / "rgba.png")
    half.save(tmp_path / "rgba.webp", lossless=True)
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.paste(0, (0, 0, 10, 20))
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "palette.gif", transparency=1)
    for name in ("rgba.png", "rgba.webp", "palette.png", "palette.gif"):
        seen = np.asarray(pictures.read(tmp_path / name))
        assert seen[10, [2, 17]].tolist() == [[255, 0, 0], [255, 255, 255]], name
    Image.new("LA", (20, 20), (0, 128)).save(tmp_path / "grey.png")
    assert abs(int(drawn(tmp_path / "grey.png")[4, 4, 0]) - 127) <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    how = (
        {"compression": "tiff_lzw"} if mode == "YCbCr" else {}
    )  # Pillow 12 does not read the plain ones that it writes
    Image.new(mode, (12, 9)).save(tmp_path / "any.tif", **how)
    assert drawn(tmp_path / "any.tif").shape == (8, 8, 3)


def test_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert drawn(tmp_path / name)[4, 4].tolist() == [255, 0, 0], name


def test_centre_crop_keeps_the_middle(tmp_path):
    wide = Image.new("RGB", (90, 30), "blue")
    wide.paste("red", (30, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    wide.rotate(90, expand=True).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        assert (drawn(tmp_path / name) == [255, 0, 0]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_tiny_and_thin_pictures(tmp_path, size):
    assert (drawn(save(tmp_path / "thin.png", "red", size)) == [255, 0, 0]).all()
