"""Every codec: contract, scale and shift, strict loading, errors; TAEF2's real weights where they are present."""

import io
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.psnr import psnr
from xfusion.modalities import ImageModality
from xfusion.modalities.codecs.autoencoder_kl import AutoencoderKL
from xfusion.modalities.codecs.autoencoder_tiny import AutoencoderTiny
from xfusion.modalities.codecs.pixels import Pixels

ASSETS = Path(os.environ.get("XFUSION_TEST_ASSETS") or Path(__file__).parents[2].parent / "shared" / "assets")
diffusers = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def kl_model(**changes):
    torch.manual_seed(0)
    arguments = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": 5,
        "scaling_factor": 0.4,
        "shift_factor": 0.25,
    }
    return diffusers.AutoencoderKL(**{**arguments, **changes}).eval()


def images(size=16, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def kl_folder(tmp_path):
    kl_model().save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


@pytest.fixture
def codecs(kl_folder):
    return [
        Pixels.Config().build(),
        AutoencoderKL.Config(source=str(kl_folder)).build(),
        AutoencoderTiny.Config().build(),
    ]


def test_contract(codecs):
    for codec in codecs:
        codec.train()
        assert not codec.training
        assert not any(parameter.requires_grad for parameter in codec.parameters())
        assert not any(module.training for module in codec.modules())
        batch = images().requires_grad_()
        latents = codec.encode(batch)
        assert not latents.requires_grad
        assert latents.dtype == torch.float32
        assert tuple(latents.shape[1:]) == codec.latent_shape(16, 16) == (codec.channels, *[16 // codec.factor] * 2)
        assert torch.equal(latents, codec.encode(batch)), "latents are deterministic"
        decoded = codec.decode(latents * 100)
        assert codec.decode(latents[:0]).shape == (0, 3, 16, 16)
        assert decoded.shape == batch.shape
        assert not decoded.requires_grad
        assert decoded.min() >= -1
        assert decoded.max() <= 1
        assert codec.encode(images(count=0)).shape[0] == 0
        assert codec.encode(images().bfloat16()).dtype == torch.float32


def test_large_pictures_are_encoded_and_decoded_a_few_at_a_time():
    """64 pictures of 256 px, or as many pixels: an autoencoder's memory goes by these."""

    class Recorded(Pixels):
        factor, parts = 256, []

        def _encode(self, images):
            self.parts.append(len(images))
            return images[:, :, ::256, ::256]

        def _decode(self, latents):
            self.parts.append(len(latents))
            return latents

    codec = Recorded()
    for side, count, parts in ((256, 70, [64, 6]), (512, 20, [16, 4]), (2560, 2, [1, 1])):
        codec.parts.clear()
        codec.encode(torch.zeros(1, 1, 1, 1).expand(count, 3, side, side))
        assert codec.parts == parts
        codec.parts.clear()
        codec.decode(torch.zeros(count, 3, side // 256, side // 256))
        assert codec.parts == parts
    codec.parts.clear()
    Pixels.encode(small := type("Small", (Recorded,), {"factor": 1})(), torch.zeros(70, 3, 8, 8))
    assert small.parts == [64, 6], "as before, so that bits stay"


def test_pixels_are_the_identity():
    assert torch.equal(Pixels().decode(Pixels().encode(images())), images())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"these are uint8; .* / 127.5 - 1"),
        (torch.full((1, 3, 8, 8), 255.0), r"lie in \[-1, 1\], but these lie in \[255, 255\]"),
        (torch.full((1, 3, 8, 8), torch.nan), "lie in"),
        (torch.zeros(3, 8, 8), r"\[N, 3, H, W\]"),
        (torch.zeros(1, 4, 8, 8), r"\[N, 3, H, W\]"),
        (torch.zeros(1, 3, 8, 12), "both sides must be multiples of 8"),
        ([Image.new("RGB", (8, 8))], "from_pil"),
    ],
)
def test_wrong_images_are_refused(wrong, message):
    with pytest.raises(XFusionError, match=message):
        AutoencoderTiny.Config().build().encode(wrong)


def test_wrong_latents_are_refused():
    with pytest.raises(XFusionError, match=r"\[N, 3, h, w\]"):
        Pixels().decode(torch.zeros(1, 4, 8, 8))


# ----------------------------------------------------------------------------------------------------- AutoencoderKL


def test_scale_and_shift_are_the_configs(kl_folder):
    codec, model = AutoencoderKL.Config(source=str(kl_folder)).build(), kl_model()
    assert (codec.channels, codec.factor) == (5, 4)
    with torch.no_grad():
        plain = model.encode(images()).latent_dist.mode()
        latents = (plain - 0.25) * 0.4
        decoded = model.decode(latents / 0.4 + 0.25).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.encode(images()), latents)
    torch.testing.assert_close(codec.decode(latents), decoded)


def test_a_missing_shift_is_zero_and_statistics_per_channel_come_first():
    with torch.no_grad():
        plain = kl_model().encode(images()).latent_dist.mode()
    torch.testing.assert_close(AutoencoderKL(kl_model(shift_factor=None)).encode(images()), plain * 0.4)
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0]
    codec = AutoencoderKL(kl_model(latents_mean=mean, latents_std=std))
    expected = (plain - torch.tensor(mean).view(5, 1, 1)) * 0.4 / torch.tensor(std).view(5, 1, 1)
    torch.testing.assert_close(codec.encode(images()), expected)


def test_half_precision_files_compute_in_float32(tmp_path):
    kl_model().half().save_pretrained(tmp_path)
    codec = AutoencoderKL.Config(source=str(tmp_path)).build()
    assert all(parameter.dtype == torch.float32 for parameter in codec.parameters())
    torch.testing.assert_close(codec.encode(images()), AutoencoderKL(kl_model()).encode(images()), atol=5e-3, rtol=0)


def test_subfolder_and_card(tmp_path):
    kl_model().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "README.md").write_text("---\nlicense: mit\npsnr:\n  held: 30.5\n---\n# Card\n")
    codec = AutoencoderKL.Config(source=str(tmp_path), subfolder="vae").build()
    assert (codec.licence, codec.psnr) == ("mit", {"held": 30.5})
    assert AutoencoderKL.Config(source=str(tmp_path), subfolder="vae", licence="own").build().licence == "own"


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_kl_keys_must_match(kl_folder, change):
    weights = load_file(kl_folder / WEIGHTS)
    if change == "missing":
        del weights["encoder.conv_in.weight"]
    else:
        weights["encoder.conv_in.extra"] = torch.zeros(1)
    save_file(weights, kl_folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(XFusionError, match=f"{change} keys encoder.conv_in"):
        AutoencoderKL.Config(source=str(kl_folder)).build()


def test_a_folder_without_safetensors_is_refused(kl_folder):
    (kl_folder / WEIGHTS).rename(kl_folder / "diffusion_pytorch_model.bin")
    with pytest.raises(XFusionError, match="only diffusion_pytorch_model.bin, which is not loaded"):
        AutoencoderKL.Config(source=str(kl_folder)).build()


def test_wrong_sources_are_named(kl_folder, tmp_path):
    with pytest.raises(XFusionError, match="'nothing' is no folder, no shipped codec"):
        AutoencoderKL.Config(source="nothing").build()
    with pytest.raises(XFusionError, match=r"config.json does not exist"):
        AutoencoderKL.Config(source=str(tmp_path)).build()
    with pytest.raises(XFusionError, match="class AutoencoderKL, but this codec loads AutoencoderTiny"):
        AutoencoderTiny.Config(source=str(kl_folder)).build()
    with pytest.raises(XFusionError, match="1 to 3 channels"):
        AutoencoderKL(kl_model(in_channels=1))


def test_a_hub_id_is_downloaded_by_commit_and_a_failure_is_one_line(kl_folder, monkeypatch):
    import huggingface_hub

    asked = []

    def download(source, *, revision, allow_patterns):
        asked.append((source, revision, allow_patterns))
        return str(kl_folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    codec = AutoencoderKL.Config(source="owner/name", subfolder="kl", revision="abc").build()
    assert codec.channels == 5
    assert asked[0][:2] == ("owner/name", "abc")
    assert f"kl/{WEIGHTS}" in asked[0][2]

    def fail(*arguments, **named):
        raise OSError("no connection\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(XFusionError, match=r"\(no connection\); a local folder works offline$"):
        AutoencoderKL.Config(source="owner/name").build()


# --------------------------------------------------------------------------------------------------- AutoencoderTiny


def tiny_folder(folder, *, pool=False, unexpected=False):
    """A small folder of diffusers' class; with `pool` its weights carry the branch that the class lacks."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny(latent_channels=6)
    model.save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    if pool:
        prefix = "encoder.layers.11.pool"
        weights[f"{prefix}.0.weight"] = torch.randn(16, 64, 1, 1) / 8
        weights[f"{prefix}.1.weight"], weights[f"{prefix}.1.bias"] = torch.ones(16), torch.zeros(16)
        weights[f"{prefix}.3.weight"] = torch.randn(64, 16, 1, 1) / 4
    if unexpected:
        weights["encoder.layers.11.other.weight"] = torch.zeros(1)
    save_file(weights, folder / WEIGHTS)
    return model.eval()


def test_tiny_folder_equals_diffusers(tmp_path):
    model = tiny_folder(tmp_path)
    codec = AutoencoderTiny.Config(source=str(tmp_path)).build()
    assert (codec.channels, codec.factor) == (6, 8)
    with torch.no_grad():
        latents = model.encode(images()).latents
        torch.testing.assert_close(codec.encode(images()), latents)
        torch.testing.assert_close(codec.decode(latents), model.decode(latents).sample.clamp(-1, 1))


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, same, other = (AutoencoderTiny.Config(seed=seed, latent_channels=3).build() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.encode(images()), same.encode(images()))
    assert not torch.equal(first.encode(images()), other.encode(images()))
    assert first.channels == 3


def test_pool_keys_are_never_dropped(tmp_path):
    """diffusers' own loader drops the branch (with a warning at most); ours computes with it, without any config."""
    plain = tiny_folder(tmp_path, pool=True)
    dropped = diffusers.AutoencoderTiny.from_pretrained(tmp_path)
    codec = AutoencoderTiny.Config(source=str(tmp_path)).build()
    with torch.no_grad():
        torch.testing.assert_close(dropped.encode(images()).latents, plain.encode(images()).latents)
    assert not torch.allclose(codec.encode(images()), plain.encode(images()).latents, atol=1e-4)
    kept = {key: value for key, value in codec.model.state_dict().items() if ".pool." in key}
    stored = {key: value for key, value in load_file(tmp_path / WEIGHTS).items() if ".pool." in key}
    assert sorted(kept) == sorted(stored)
    assert all(torch.equal(kept[key], stored[key]) for key in kept)


def test_the_pool_branch_adds_to_the_input_of_its_block(tmp_path):
    tiny_folder(tmp_path, pool=True)
    block = AutoencoderTiny.Config(source=str(tmp_path)).build().model.encoder.layers[11]
    features = torch.randn(2, 64, 4, 4)
    with torch.no_grad():
        changed = features + block.pool(features)
        torch.testing.assert_close(block(features), torch.relu(block.conv(changed) + changed))


def test_other_unexpected_keys_are_refused(tmp_path):
    tiny_folder(tmp_path, unexpected=True)
    with pytest.raises(XFusionError, match="encoder.layers.11.other.weight"):
        AutoencoderTiny.Config(source=str(tmp_path)).build()


def test_a_pool_branch_on_something_that_is_no_block_is_refused(tmp_path):
    tiny_folder(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({**weights, "decoder.layers.1.pool.0.weight": torch.zeros(4, 4, 1, 1)}, tmp_path / WEIGHTS)
    with pytest.raises(XFusionError, match=r"decoder\.layers\.1 is not a block"):
        AutoencoderTiny.Config(source=str(tmp_path)).build()


def test_latent_statistics_normalise(tmp_path):
    model = tiny_folder(tmp_path)
    mean, std = [0.1 * index for index in range(6)], [0.5 + 0.1 * index for index in range(6)]
    (tmp_path / "latent_stats.json").write_text(json.dumps({"mean": mean, "std": std}))
    codec = AutoencoderTiny.Config(source=str(tmp_path)).build()
    with torch.no_grad():
        plain = model.encode(images()).latents
        torch.testing.assert_close(
            codec.encode(images()), (plain - torch.tensor(mean).view(6, 1, 1)) / torch.tensor(std).view(6, 1, 1)
        )
        torch.testing.assert_close(codec.decode(codec.encode(images())), model.decode(plain).sample.clamp(-1, 1))
    (tmp_path / "latent_stats.json").write_text(json.dumps({"mean": mean[:5], "std": std}))
    with pytest.raises(XFusionError, match="5 means and 6 deviations for 6 channels"):
        AutoencoderTiny.Config(source=str(tmp_path)).build()


# ---------------------------------------------------------------------------------------------- TAEF2's real weights


@pytest.fixture(scope="module")
def taef2():
    folder = ASSETS / "taef2"
    if not folder.is_dir():
        pytest.skip("TAEF2's weights are not here; set XFUSION_TEST_ASSETS to the folder that holds taef2/")
    return AutoencoderTiny.Config(source=str(folder)).build()


def test_taef2_loads_every_key(taef2):
    stored = load_file(ASSETS / "taef2" / WEIGHTS)
    assert len(stored) == 158
    assert stored.keys() == taef2.model.state_dict().keys()
    assert (taef2.channels, taef2.factor) == (32, 8)


def test_taef2_restores_emoji_as_well_as_its_card_says(taef2):
    """Its README: 28.3 dB at 64 px and 33.0 dB at 128 px over 24 Fluent emoji; other emoji, so within 1.3 dB."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra data) reads the emoji pictures")
    path = ASSETS / "images" / "fluent_emoji_3d_256.parquet"
    if not path.is_file():
        pytest.skip("the Fluent emoji are not here; set XFUSION_TEST_ASSETS to the folder that holds images/")
    rows = parquet.read_table(path, columns=["image"]).slice(0, 1600).take(list(range(0, 1600, 100))).to_pylist()
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    for size, figure in ((64, 28.3), (128, 33.0)):
        batch = ImageModality.from_pil(pictures, size)
        latents = taef2.encode(batch)
        assert 0.7 < latents.std() < 1.3, "latents are normalised to about unit variance"
        measured = psnr(taef2.decode(latents), batch).mean().item()
        assert measured == pytest.approx(figure, abs=1.3), f"{measured:.1f} dB at {size} px"
        assert size != 64 or measured >= 27
