"""Judges that are no pack: distances of two sets against their closed forms, a CLIP score against transformers' cosine."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from contracts.pretrained import make_clip
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from xfusion.apps import cli
from xfusion.data.sequence import XFusionError
from xfusion.evaluation import drawn
from xfusion.evaluation.adapters import transformers as adapter
from xfusion.evaluation.metrics import fid
from xfusion.modalities.base import Encoder
from xfusion.storage import file_hash

torchmetrics = pytest.importorskip(
    "torchmetrics", reason="torchmetrics is not installed (extra eval): nothing can judge"
)


def silent(*_):
    pass


def flat(colours, folder):
    """One-coloured pictures in a folder."""
    folder.mkdir(parents=True)
    for index, colour in enumerate(colours):
        Image.new("RGB", (4, 4), colour).save(folder / f"{index:04}.png")
    return folder


def drawing(folder, prompts, num, teachers=()):
    """The pictures of a folder as `draw_folder` would list them."""
    items = [
        {"prompt": i // num, "file": path.name, "sha256": file_hash(path)}
        for i, path in enumerate(sorted(folder.glob("*.png")))
    ]
    facts = {"pack_fingerprint": "artist", "settings": {}, "prompts": list(prompts), "pictures": items}
    facts |= {} if teachers is None else {"teachers": list(teachers)}
    drawn.write_json(folder / drawn.MANIFEST, drawn.sealed(facts))
    return folder


class RedAndGreen(Encoder):
    """Features: the mean of the first two channels, in 255 levels."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        width, fingerprint = 2, "red and green#-2"

        def build(self):
            return RedAndGreen()

    width, side, cells = 2, 4, 1

    def features(self, images):
        return (images[:, :2].mean(dim=(2, 3)) + 1) * 127.5

    def maps(self, images):
        return self.features(images)[..., None, None]


def cross(middle, a, b):
    """Four colours whose mean is the middle and whose covariance is diagonal, 2/3 a^2 and 2/3 b^2."""
    r, g = middle
    return [(r + a, g, 7), (r - a, g, 7), (r, g + b, 7), (r, g - b, 7)]


def test_frechet_distance_has_its_closed_form(tmp_path, monkeypatch):
    one, two = flat(cross((100, 80), 30, 12), tmp_path / "one"), flat(cross((103, 84), 18, 24), tmp_path / "two")
    drawing(one, ["a", "b"], 2)
    by, look = f"fid:{two}", RedAndGreen.Config()
    with pytest.raises(XFusionError, match=r"needs 5,000 .* has 4, .*two 4: .*--by kernel-distance:"):
        drawn.judge_by(one, by, encoder=look, progress=silent)
    monkeypatch.setattr(fid, "FEWEST", 4)
    found = drawn.judge_by(one, by, encoder=look, progress=silent)
    # |difference of means|^2 + the squared difference of deviations, of diagonal covariances: 9 + 16 + 2/3 (12^2 + 12^2)
    assert found["frechet_distance"] == pytest.approx(9 + 16 + 2 / 3 * (144 + 144), rel=1e-5)
    assert (found["num_pictures"], found["num_reference"]) == (4, 4)
    assert found["settings"]["encoder"] == "red and green#-2" and found["settings"]["teachers"] == []
    # Of (9, 4), (3, 8), (15, 4) and (3, 16) apart, between the middle two; all crosses of two stand (18, 24) apart.
    assert found["nearest_distance"] == pytest.approx((97**0.5 + 241**0.5) / 2, abs=1e-5)
    assert found["nearest_distance_reference"] == pytest.approx(30, abs=1e-5)
    same = drawn.judge_by(one, f"fid:{one}", encoder=look, progress=silent)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-3)  # of covariances of 600
    assert same["nearest_distance"] == pytest.approx(0, abs=1e-5)
    assert same["nearest_distance_reference"] == pytest.approx(((30**2 + 12**2) ** 0.5 + 24) / 2, abs=1e-5)
    # The folder is recorded by its name and what is in it, wherever it is and whatever its files are called.
    moved = two.rename(tmp_path / "moved")
    (moved / "0000.png").rename(moved / "first.png")
    settings = drawn.judge_by(one, f"fid:{moved}", encoder=look, progress=silent)["settings"]
    assert (found["settings"]["reference"], settings["reference"]) == ("two", "moved")
    assert settings["reference_sha256"] == found["settings"]["reference_sha256"]
    assert settings["reference_sha256"] != same["settings"]["reference_sha256"]
    by = f"fid:{moved}"
    # Another layer of the same encoder is the same encoder.
    drawing(one, ["a", "b"], 2, teachers=["red and green#-1"])
    with pytest.raises(XFusionError, match="took part in training"):
        drawn.judge_by(one, by, encoder=look, progress=silent)
    with pytest.raises(XFusionError, match="no pictures to compare with"):
        drawn.judge_by(one, "fid:nowhere", encoder=look, progress=silent)


def test_nearest_distances_are_those_of_all_pairs(monkeypatch):
    rows, others = (torch.rand(count, 5, generator=torch.Generator().manual_seed(count)) for count in (8, 11))
    pairs = lambda a, b: (a[:, None] - b[None]).double().norm(dim=2)  # noqa: E731
    for chunk in (3, 8, 100):
        monkeypatch.setattr(fid, "CHUNK", chunk)
        torch.testing.assert_close(
            fid.nearest_distances(rows, others), pairs(rows, others).amin(dim=1), rtol=1e-6, atol=1e-6
        )
        apart = pairs(rows, rows) + torch.eye(8) * 1e9
        torch.testing.assert_close(fid.nearest_distances(rows), apart.amin(dim=1), rtol=1e-6, atol=1e-6)
        assert float(fid.nearest_distances(rows, rows).max()) < 1e-6


def test_inception_is_asked_for_by_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "FEWEST", 4)
    one = drawing(flat(cross((100, 80), 30, 12), tmp_path / "one"), ["a", "b"], 2)
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(XFusionError, match="pip install torch-fidelity"):
        drawn.judge_by(one, f"fid:{one}", progress=silent)
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.fid", None)
    with pytest.raises(XFusionError, match=r"xfusion\[eval\]"):
        drawn.judge_by(one, f"fid:{one}", progress=silent)


def test_kernel_distance_is_unbiased_and_sees_a_shift(tmp_path):
    draws = numpy.random.default_rng(0).integers(60, 120, size=(3, 40, 3))
    near = drawing(flat(map(tuple, draws[0].tolist()), tmp_path / "near"), ["a"], 40)
    far = drawing(flat(map(tuple, (draws[1] + 90).tolist()), tmp_path / "far"), ["a"], 40)
    other = flat(map(tuple, draws[2].tolist()), tmp_path / "other")
    look = RedAndGreen.Config()
    alike, apart = (drawn.judge_by(x, f"kernel-distance:{other}", encoder=look, progress=silent) for x in (near, far))
    assert abs(alike["kernel_distance"]) < 2 * alike["kernel_distance_spread"] < apart["kernel_distance"] / 10
    assert apart == drawn.judge_by(far, f"kernel-distance:{other}", encoder=look, progress=silent)
    assert apart["settings"]["subset_size"] == 20
    levels = [torch.tensor(d[:, :2].astype("float64")) for d in (draws[0], draws[1] + 90, draws[2])]
    for drawings, result in zip(levels, (alike, apart), strict=False):
        nearest = torch.cdist(drawings, levels[2]).amin(dim=1).quantile(0.5)
        assert result["nearest_distance"] == pytest.approx(float(nearest), abs=1e-4)
        assert result["nearest_distance_reference"] == alike["nearest_distance_reference"] < 10
    assert alike["nearest_distance"] < 10 < 60 < apart["nearest_distance"]
    assert apart["settings"]["reference"] == "other"
    # The estimate itself, of one subset that is all there is but for its order: sums without the diagonals.
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(feature=fid.EncoderFeatures(RedAndGreen()), subsets=1, subset_size=40)
    for real, folder in ((True, other), (False, near)):
        for images in fid.batches(map(Image.open, fid.reference(str(folder), "x"))):
            metric.update(images, real=real)
    x, y = (torch.tensor(d[:, :2].astype("float64")) for d in (draws[2], draws[0]))
    kernel = lambda a, b: (a @ b.T / 2 + 1) ** 3  # noqa: E731
    inner = sum((kernel(z, z).sum() - kernel(z, z).diag().sum()) / (40 * 39) for z in (x, y))
    assert float(metric.compute()[0]) == pytest.approx(float(inner - 2 * kernel(x, y).mean()), rel=1e-2)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@torch.no_grad()
def test_clip_score_is_transformers_own_cosine(tiny_clip, tmp_path, capsys):
    levels = torch.randint(0, 255, (6, 20, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (tmp_path / "out").mkdir()
    pictures = [Image.fromarray(one.numpy()) for one in levels]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / "out" / f"{index}.png")
    prompts = ["red apple", "two birds", "a very long prompt of many words"]
    folder = drawing(tmp_path / "out", prompts, 2)
    found = drawn.judge_by(folder, f"clip-score:{tiny_clip}", progress=silent)

    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), AutoProcessor.from_pretrained(tiny_clip)

    def cosines(order):
        text = [prompts[i] for i in order]
        inputs = processor(
            text=text, images=pictures, return_tensors="pt", padding=True, truncation=True, max_length=14
        )
        made = model(**inputs)
        return 100 * (made.text_embeds * made.image_embeds).sum(dim=-1)

    own, others = cosines([0, 0, 1, 1, 2, 2]), cosines([1, 1, 2, 2, 0, 0])
    assert own.mean() > 0 and own.std() > 1  # or a constant would pass
    assert found["clip_score"] == pytest.approx(float(own.mean()), abs=1e-3)
    assert found["clip_score_blind"] == pytest.approx(max(float(others.mean()), 0), abs=1e-3)
    assert (found["num_pictures"], found["num_prompts"], found["num_prompts_cut"]) == (6, 3, 1)

    call = ["judge", str(folder), "--by", f"clip-score:{tiny_clip}", "--device", "cpu"]
    assert cli.main([*call, "--json", "-o", str(tmp_path / "scores.json")]) == 0
    assert json.loads(capsys.readouterr().out) == found == json.loads((tmp_path / "scores.json").read_text())
    assert cli.main([*call, "--encoder", "efficientnet_lite"]) == 2 and "leave --encoder out" in capsys.readouterr().err
    assert cli.main([*call, "--encoder", "whisper"]) == 2 and "is not one of" in capsys.readouterr().err
    # Trained with this very CLIP, through whatever layer: it may not score. Who drew before this was noted is not refused.
    drawing(folder, prompts, 2, teachers=[f"{tiny_clip}@None#-2"])
    assert cli.main(call) == 2 and "took part in training" in capsys.readouterr().err
    drawing(folder, prompts, 2, teachers=None)
    assert drawn.judge_by(folder, f"clip-score:{tiny_clip}", progress=silent)["settings"]["teachers"].startswith("not")


def test_judges_are_found_by_their_files(tiny_clip, tmp_path):
    assert drawn.judge_names() == ["clip_score", "fid", "kernel_distance"]
    folder = drawing(flat(cross((100, 80), 30, 12), tmp_path / "one"), ["a"], 4)
    with pytest.raises(XFusionError, match="there is no judge 'beauty:x': there are clip-score"):
        drawn.judge_by(folder, "beauty:x", progress=silent)
    assert drawn.judge_by(folder, "org/pack", progress=silent) is None
    with pytest.raises(XFusionError, match="name the CLIP"):
        drawn.judge_by(folder, "clip-score", progress=silent)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(XFusionError, match="is a llama, not a CLIP"):
        drawn.judge_by(folder, f"clip-score:{tmp_path / 'llama'}", progress=silent)
    assert (
        adapter.parse_source("org/model@abc") == ("org/model", "abc") and adapter.parse_source(str(tmp_path))[1] is None
    )
    Path(folder / "0000.png").write_bytes(b"")
    with pytest.raises(XFusionError, match="is not the picture that was drawn"):
        drawn.judge_by(folder, f"clip-score:{tiny_clip}", progress=silent)
