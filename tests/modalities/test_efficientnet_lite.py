"""The ImageNet encoder: it sees what it was trained to see."""

import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from xfusion.data.sequence import XFusionError
from xfusion.modalities.encoders import efficientnet_lite
from xfusion.modalities.encoders.efficientnet_lite import EfficientNetLite
from xfusion.modalities.image import ImageModality

pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra xfusion[demo]")
ASSETS = Path(os.environ.get("XFUSION_TEST_ASSETS") or Path(__file__).parents[3] / "shared" / "assets")


@pytest.fixture(scope="module")
def encoder():
    return EfficientNetLite.Config().build()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shapes_and_lengths(encoder, images):
    features, maps = encoder.features(images), encoder.maps(images)
    assert features.shape == (3, 1280) and features.dtype == torch.float32 and maps.shape == (3, 1280, 7, 7)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(torch.nn.functional.normalize(maps.mean(dim=(2, 3)), dim=-1), features)
    assert encoder.features(images[:0]).shape == (0, 1280)


def test_a_batch_gives_the_features_of_its_singles(encoder, images):
    small = EfficientNetLite.Config(batch_size=2).build()
    singles = torch.cat([encoder.features(image[None]) for image in images])
    torch.testing.assert_close(encoder.features(images), singles, atol=1e-5, rtol=0)
    torch.testing.assert_close(small.features(images), singles, atol=1e-5, rtol=0)


def test_folding_the_normalisation_changes_nothing(encoder, images, monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "_fold", lambda module, pairs: None)
    torch.testing.assert_close(EfficientNetLite().logits(images), encoder.logits(images), atol=1e-3, rtol=0)


def test_it_is_frozen_and_its_features_may_be_targets(encoder, images):
    assert not encoder.train().training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    guess = torch.zeros(3, 1280, requires_grad=True)
    (guess * encoder.features(images)).sum().backward()
    assert guess.grad is not None and guess.grad.norm() > 0


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "SHA256", "0" * 64)
    with pytest.raises(XFusionError, match=r"SHA-256 5793.*, not 0000.*xfusion\[demo\]"):
        EfficientNetLite()


def test_a_missing_wheel_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(efficientnet_lite, "import_module", missing)
    with pytest.raises(XFusionError, match=r"not installed.*pip install 'xfusion\[demo\]'"):
        EfficientNetLite()


def test_wrong_shapes_are_named(encoder):
    with pytest.raises(XFusionError, match=r"torch.uint8 \[1, 3, 8, 8\]"):
        encoder.features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_it_names_photographs(encoder):
    """One photo of each of a hundred ImageNet classes, 160 px: at least 75 right at the first guess."""
    photos, classes = ASSETS / "images/imagenet_sample_160.parquet", ASSETS / "text/imagenet1k_wnid_name.tsv"
    if not photos.is_file() or not classes.is_file():
        pytest.skip(f"{photos} is not there; XFUSION_TEST_ASSETS names the folder")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reads the sample photos")
    rows = [line.split("\t") for line in classes.read_text(encoding="utf-8").splitlines()]
    number = {row[1]: int(row[0]) for row in rows if row[0].isdigit()}
    table = parquet.read_table(photos, columns=["image", "source_path"]).to_pylist()[::10]
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in table]
    labels = torch.tensor([number[Path(row["source_path"]).name.split("_")[0]] for row in table])
    right = (encoder.logits(ImageModality.from_pil(pictures, 160)).argmax(dim=-1) == labels).sum().item()
    print(f"{right} of {len(labels)} photographs named")
    assert len(labels) == 100 and right >= 75
