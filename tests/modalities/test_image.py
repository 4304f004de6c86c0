"""Patches, sizes, and the way between PIL pictures and tensors."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xfusion.data.sequence import XFusionError
from xfusion.modalities import ImageModality, square_picture
from xfusion.modalities.codecs.autoencoder_tiny import AutoencoderTiny
from xfusion.modalities.codecs.pixels import Pixels


def modality(patch=8, sizes=(32,), codec=None):
    return ImageModality.Config(codec=codec or Pixels.Config(), patch=patch, sizes=sizes).build()


@settings(max_examples=40, deadline=None)
@given(patch=st.integers(1, 5), cells=st.integers(1, 5), count=st.integers(0, 3))
def test_tokens_and_latents_are_exact_inverses(patch, cells, count):
    image, size = modality(patch, (patch * cells,)), patch * cells
    latents = torch.randn(count, 3, size, size)
    tokens = image.tokens(latents)
    assert tokens.shape == (count, cells * cells, image.token_width)
    assert torch.equal(image.latents(tokens, size), latents)


def test_a_token_is_one_patch_and_tokens_come_in_reading_order():
    image = modality(patch=2, sizes=(4,))
    latents = torch.arange(48.0).reshape(1, 3, 4, 4)
    tokens = image.tokens(latents)
    assert torch.equal(tokens[0, 1], latents[0, :, 0:2, 2:4].reshape(-1))
    assert torch.equal(tokens[0, 2], latents[0, :, 2:4, 0:2].reshape(-1))


def test_a_modality_with_a_codec_of_factor_8():
    image = modality(patch=2, sizes=(32, 64), codec=AutoencoderTiny.Config())
    assert (image.token_width, image.grid(32), image.grid(64), image.name) == (16, (2, 2), (4, 4), "image")
    tokens = image.encode([Image.new("RGB", (50, 40), "red")], 64)
    assert tokens.shape == (1, 16, 16)
    assert image.decode(tokens, 64).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("size", [0, 7, 33, -8])
def test_an_illegal_size_names_legal_ones(size):
    with pytest.raises(XFusionError, match=rf"image size {size} is not legal.*multiple of 8.*for example \d+ or \d+$"):
        modality().grid(size)
    with pytest.raises(XFusionError, match="not legal"):
        modality(sizes=(32, size))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: image.encode(torch.zeros(1, 3, 16, 16), 32), "not 32x32 pixels"),
        (lambda image: image.tokens(torch.zeros(1, 4, 32, 32)), "3 channels"),
        (lambda image: image.tokens(torch.zeros(1, 3, 30, 32)), "multiples of 8"),
        (lambda image: image.decode(torch.zeros(1, 15, 192), 32), r"these have \[N, 16, 192\]"),
        (lambda image: image.from_pil(Image.new("RGB", (8, 8)), 8), r"write \[picture\]"),
        (lambda image: image.to_pil(torch.zeros(3, 8, 8)), r"\[N, 3, H, W\]"),
        (lambda image: modality(patch=0), "patch must be at least 1"),
        (lambda image: modality(sizes=()), "sizes is empty"),
    ],
)
def test_wrong_input_is_said_in_one_line(call, message):
    with pytest.raises(XFusionError, match=message) as caught:
        call(modality())
    assert "\n" not in str(caught.value)


def test_all_256_levels_survive_the_way_to_a_tensor_and_back():
    levels = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)
    picture = Image.fromarray(numpy.stack([levels, levels.T, 255 - levels], axis=-1))
    images = ImageModality.from_pil([picture], 16)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert ImageModality.to_pil(images)[0].tobytes() == picture.tobytes()


def test_values_outside_the_range_are_clipped_in_pictures():
    picture = ImageModality.to_pil(torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1))[0]
    assert picture.getpixel((0, 0)) == (0, 128, 255)


def test_a_transparent_picture_stands_on_white():
    for picture in (Image.new("RGBA", (9, 9), (0, 0, 0, 0)), Image.new("LA", (9, 9), (0, 0))):
        assert square_picture(picture, 8).getpixel((4, 4)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 0
    assert square_picture(palette, 8).getpixel((4, 4)) == (255, 255, 255)


def test_the_central_square_is_taken_and_the_exif_rotation_applied(tmp_path):
    picture = Image.new("RGB", (30, 10), "blue")
    picture.paste("red", (10, 0, 20, 10))
    assert set(square_picture(picture, 10).get_flattened_data()) == {(255, 0, 0)}
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    picture = Image.new("RGB", (8, 8), "white")
    picture.paste("black", (0, 0, 8, 4))
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = square_picture(Image.open(tmp_path / "turned.png"), 8)
    assert upright.getpixel((0, 7)) == (255, 255, 255)
    assert upright.getpixel((7, 0)) == (0, 0, 0)


def test_16_bit_grey_is_scaled_not_clipped():
    picture = Image.fromarray(numpy.full((8, 8), 0x8000, dtype=numpy.uint16))
    assert square_picture(picture, 8).getpixel((0, 0)) == (128, 128, 128)


def test_no_pictures_give_no_tokens():
    assert modality().encode([], 32).shape == (0, 16, 192)
