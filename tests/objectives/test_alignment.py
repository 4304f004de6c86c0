"""Alignment: the formula of its paper, on the clean picture, reaching the media tower below its layer and nothing else."""

from dataclasses import dataclass, replace

import pytest
import torch
from contracts.pretended import PRETENDED, Elsewhere, one_more_device
from contracts.pretrained import make_clip
from contracts.table import (
    LAYERS,
    PATCH,
    SIDE,
    WIDTH,
    Noise,
    corrupted,
    mixed_sequences,
    model_config,
    picture,
    randomise,
    share_left,
    trained,
    words,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPImageProcessor, CLIPModel

import xfusion
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, XFusionError
from xfusion.modalities.base import Encoder
from xfusion.modalities.encoders.efficientnet_lite import SHA256, EfficientNetLite
from xfusion.modalities.encoders.vision_transformer import VisionTransformer
from xfusion.model import Model
from xfusion.objectives import alignment
from xfusion.objectives.alignment import Alignment
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.training.stages import Recipe, Stage


class Corners(Encoder):
    """A fixed random matrix on a coarse grid of pixels."""

    name, fingerprint = "corners", "corners"
    calls: list[int] = []  # noqa: RUF012

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        @property
        def width(self):
            return 10

        @property
        def fingerprint(self):
            return "corners"

        def build(self):
            return Corners()

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))

    def maps(self, images):
        Corners.calls.append(len(images))
        weight = self.weight.to(images.device)
        return torch.einsum("fc,nchw->nfhw", weight, functional.adaptive_avg_pool2d(images, 6))

    def features(self, images):
        return self.maps(images).mean((2, 3))


def make(base, **settings):
    settings = {"layer": 3, "encoder": Corners.Config(), **settings}
    config = replace(
        model_config(base), extra=(Alignment.Config(**settings),), media=FlowMatching.Config(prediction="noise")
    )
    model = Model(config, base)
    randomise(model)
    return model.eval()


def batch():
    """Two pictures to draw in one row, one without words, and clean ones, not all square, that are not held to features."""
    q = mixed_sequences()
    other = Sequence(segments=(words(2, 8), picture((2, 2), 9, noised=True, loss=True)))
    return corrupted(pack([[q["picture behind words"], other], [q["words around picture"]], [q["picture alone"]]]))


def drawn(media, model):
    """(row, columns, clean picture) of each item with a loss."""
    for i in (media.has_loss & media.noised).nonzero()[:, 0].tolist():
        row = int((media.item == i).any(1).nonzero()[0])
        columns = media.item[row] == i
        side = PATCH * (int(media.grid_row[row][columns].max()) + 1)
        yield row, columns, model.image.decode(media.clean[row][columns][None], side)


@pytest.mark.parametrize("patchwise", [False, True])
@torch.no_grad()
def test_the_value_is_the_formula_in_float64(bases, patchwise):
    model = make(bases["llama"], patchwise=patchwise)
    (objective,) = model.extra
    view = batch()
    media, out = view.media["image"], model(view)
    states, weight = out.states["media.3"].double(), objective.projection.weight.double()
    expected = []
    for row, columns, image in drawn(media, model):
        h = states[row][columns]
        side = int(len(h) ** 0.5)
        if patchwise:
            aim = functional.adaptive_avg_pool2d(Corners().maps(image), side).double()[0].flatten(1).T
            pairs = list(zip(h, aim, strict=True))
        else:
            pairs = [(h.mean(0), Corners().maps(image).double().mean((2, 3))[0])]
        cosines = [float((weight @ a) @ f / ((weight @ a).norm() * f.norm())) for a, f in pairs]
        expected.append(1 - sum(cosines) / len(cosines))
    total, count = objective.loss(lambda _: out, view)["alignment"]
    assert int(count) == len(expected) == objective.count(view)["alignment"] == 3
    assert float(total) == pytest.approx(sum(expected), rel=1e-5)
    assert max(expected) - min(expected) > 1e-2


@torch.no_grad()
def test_the_features_are_of_the_clean_picture_whatever_the_head_predicts(bases):
    model = make(bases["llama"])
    (objective,) = model.extra
    rows = [[mixed_sequences()["picture behind words"]]]
    clean = objective.features(pack(rows).media["image"])[0]
    for prediction in ("noise", "velocity", "clean"):
        noised = (
            FlowMatching.Config(prediction=prediction).build().corrupt(pack(rows), torch.Generator().manual_seed(1))
        )
        assert torch.equal(objective.features(noised.media["image"])[0], clean)


@torch.no_grad()
def test_each_picture_is_looked_at_once_and_the_oldest_are_forgotten(bases, monkeypatch):
    model = make(bases["llama"])
    (objective,) = model.extra
    media = batch().media["image"]
    Corners.calls.clear()
    first, again = objective.features(media), objective.features(media)
    assert Corners.calls == [1] * 3
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    monkeypatch.setattr(alignment, "CACHE_BYTES", 4 * 10 * 2)
    objective.features(pack([[Sequence(segments=(picture((2, 2), 50, noised=True, loss=True),))]]).media["image"])
    assert len(objective._cache) == 2


@torch.no_grad()
def test_pictures_are_copied_to_the_host_together_and_encoded_one_by_one(bases, monkeypatch):
    """On a GPU each copy waits for all that was asked of it before. Encoded together, a picture's features would have other bits
    with other pictures, and a resumed run, which has seen none, would differ.
    """
    waits, dispatch = [], Elsewhere.__torch_function__.__func__

    def watched(cls, func, types, args=(), kwargs=None):
        waits.extend([func] * (func in (Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__bool__)))
        return dispatch(cls, func, types, args, kwargs)

    monkeypatch.setattr(Elsewhere, "__torch_function__", classmethod(watched))
    counts = []
    for pictures in (2, 7):
        (objective,) = make(bases["llama"]).extra
        rows = [[Sequence(segments=(picture((2, 2), i, noised=True, loss=True),))] for i in range(pictures)]
        media = corrupted(pack(rows)).media["image"]
        expected = objective.features(media)
        objective._cache.clear()
        Corners.calls.clear()
        with one_more_device(monkeypatch):
            waits.clear()
            found = objective.features(media.to(PRETENDED))
            counts.append(len(waits))
            assert all(torch.equal(found[item].cpu(), feature) for item, feature in expected.items())
        assert Corners.calls == [1] * pictures
    assert counts[0] == counts[1] <= 8


@pytest.mark.parametrize("patchwise", [False, True])
def test_gradients_reach_the_projection_and_the_tower_below_the_layer_alone(bases, patchwise):
    base = bases["llama"]
    before = base.compute_fingerprint()
    model = make(base, patchwise=patchwise)
    total, count = model.losses(batch(), torch.Generator().manual_seed(0))["alignment"]
    (total / count).backward()
    grads = {n: p.grad is not None and float(p.grad.abs().max()) > 0 for n, p in model.named_new_parameters().items()}
    assert grads["extra.0.projection.weight"] and grads["port.project.weight"]
    for index in range(LAYERS):
        block = [g for n, g in grads.items() if n.startswith(f"fusion.blocks.{index}.")]
        assert all(block) if index < 3 else not any(block), index
    assert not grads["port.head.weight"]
    assert all(p.grad is None for p in base.model.parameters()) and base.compute_fingerprint() == before


def test_training_draws_the_states_towards_the_features_and_a_pack_keeps_the_projection(bases, tmp_path):
    base = bases["llama"]
    stage = Stage(steps=20, warmup=2, rate=1e-2, ema=0, mixture=MixtureConfig(draw=6, caption=2, pack=2))
    model, losses = trained(Recipe(model=make(base).config, data="noise", stages=(stage,)), base, tmp_path / "run")
    assert share_left(losses, "alignment") < 0.5, losses
    state = load_file(tmp_path / "run" / "pack" / "model.safetensors")
    assert {n: tuple(v.shape) for n, v in state.items() if n.startswith("extra")} == {
        "extra.0.projection.weight": (10, WIDTH)
    }
    Corners.calls.clear()
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base, trust=True)
    assert torch.equal(loaded.extra[0].projection.weight, model.extra[0].projection.weight)
    assert loaded.teachers == model.teachers == {"corners"}
    assert len(loaded.draw(["a tree"], steps=2)) == len(loaded.caption([Noise().picture(0, SIDE)], max_tokens=2)) == 1
    assert not Corners.calls and not loaded.extra[0]._encoder  # used without its encoder


def test_a_plain_model_has_no_teacher_and_the_default_names_its_own(bases):
    assert Model(model_config(bases["llama"]), bases["llama"]).teachers == frozenset()
    assert Alignment.Config().build().teachers == {SHA256}
    assert Alignment.Config().encoder.width == EfficientNetLite.width


def test_impossible_layers_and_maps_are_refused(bases):
    with pytest.raises(XFusionError, match="layer 0 must be at least 1"):
        Alignment.Config(layer=0).build()
    with pytest.raises(XFusionError, match="alignment layer 9: the base has fewer"):
        make(bases["llama"], layer=9).losses(batch(), torch.Generator())
    wide = corrupted(pack([[Sequence(segments=(picture((8, 8), 1, noised=True, loss=True),))]]))
    (objective,) = make(bases["llama"], patchwise=True).extra
    with pytest.raises(XFusionError, match="8 x 8 tokens are finer than the encoder's map of 6 x 6: set patchwise"):
        objective.features(wide.media["image"])


@pytest.mark.parametrize("patchwise", [False, True])
@torch.no_grad()
def test_layer_8_and_clips_penultimate_features_are_the_papers(bases, tmp_path, patchwise):
    """The second of three layers by transformers' own class, without the class token; the last one's would be seen."""
    assert Alignment.Config().layer == 8 and VisionTransformer.Config().layer == -2
    folder = make_clip(tmp_path / "clip")
    encoder = VisionTransformer.Config(source=str(folder))
    model = make(bases["llama"], encoder=encoder, patchwise=patchwise)
    (objective,) = model.extra
    assert objective.projection.weight.shape == (24, WIDTH) and model.teachers == {encoder.fingerprint}
    media = pack([[mixed_sequences()["picture alone"]]]).media["image"]
    found = objective.features(media)[0]
    means, deviations = (
        torch.tensor(getattr(CLIPImageProcessor.from_pretrained(folder), name))[:, None, None]
        for name in ("image_mean", "image_std")
    )
    pixels = ((model.image.decode(media.tokens[:, 1:], SIDE) + 1) / 2 - means) / deviations
    tower = CLIPModel.from_pretrained(folder).eval().vision_model
    layers = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(layers) == 1 + 3
    penultimate, last = (
        states[0, 1:] if patchwise else functional.normalize(states[0, 1:].mean(0), dim=0) for states in layers[2:]
    )
    torch.testing.assert_close(found, penultimate, rtol=0, atol=1e-5)
    assert float((found - last).abs().max()) > 1e-2
    batch_loss, count = model.losses(batch(), torch.Generator().manual_seed(0))["alignment"]
    assert int(count) == 3 and 0 < float(batch_loss) < 6


@pytest.mark.parametrize("patchwise", [False, True])
def test_the_real_encoder_teaches(bases, patchwise):
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra xfusion[demo]")
    model = make(bases["llama"], encoder=EfficientNetLite.Config(), patchwise=patchwise)
    view = corrupted(pack([[mixed_sequences()["picture alone"]]]))
    total, count = model.losses(view, torch.Generator().manual_seed(0))["alignment"]
    total.backward()
    assert int(count) == 1 and 0 < float(total.detach()) < 2
    assert float(model.extra[0].projection.weight.grad.abs().max()) > 0
