"""Contract: Mixture-of-Transformers from scratch, norms behind the branches and weights of their own for words, too."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contracts.table import FAMILIES, distance, exact, look, mixed_sequences, model_config, randomise, view, words
from contracts.test_equations import ATTENTION, MLP, NORMS, Layer, Llama, Vector, Weights, hold_to_equation, of_module
from contracts.test_paths import FLOAT32, FLOAT64, incremental
from torch import nn

import xfusion
from xfusion.backbone import SCRATCH, Backbone
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, XFusionError
from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.model import BackboneConfig, Model

SEQUENCES = mixed_sequences()


def from_scratch(base: Backbone, dtype: torch.dtype | None = None, *, randomised: bool = True) -> Model:
    """A model on a base of the same shape with random weights."""
    scratch = Backbone.load(SCRATCH + base.source, dtype=dtype)
    config = replace(
        model_config(base),
        backbone=BackboneConfig(source=scratch.source),
        fusion=ModalityExperts.Config(post_norm=True),
    )
    model = Model(config, scratch)
    if randomised:
        randomise(model)
    return model.to(scratch.dtype).eval()


class PostNormLlama(Llama):
    """``h = x + norm(O attention(x))``, ``y = h + norm'(MLP(h))`` (arXiv 2411.04996)."""

    def read(self, w: Weights, norm: str, x: Vector) -> Vector:
        return x

    def added(self, w: Weights, norm: str, out: Vector) -> Vector:
        return self.norm(out, w[norm])


def weights(parts: Any) -> dict[str, np.ndarray]:
    """The weights of words or of media by Llama's names."""
    ends = {"self_attn/o_proj.0": "self_attn.o_proj", "self_attn/o_proj.1": NORMS[0], "mlp.1": NORMS[1]}
    ends |= {f"mlp.0.{name.partition('.')[2]}": name for name in MLP}
    found = {ends.get(name, name.replace("/", ".")): values for name, values in of_module(parts).items()}
    assert set(found) == {*NORMS, *ATTENTION, *MLP}
    return found


def mixture_of_transformers(layer: Layer) -> list[Vector]:
    """All weights by modality, one softmax."""
    text, media = (weights(parts[str(layer.index)]) for parts in (layer.fusion.of_words, layer.fusion.blocks))
    assert all(np.abs(text[name] - media[name]).max() > 0.01 for name in text)
    own = replace(layer, llama=layer.llama)
    own.llama.__class__ = PostNormLlama
    return own.by(lambda place: media if place.media else text)


@torch.no_grad()
def test_it_is_the_papers_equation(bases: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    with exact(monkeypatch):
        model = from_scratch(bases["llama"], torch.float64)
        hold_to_equation(model, SEQUENCES, range(4), mixture_of_transformers)


@torch.no_grad()
def test_it_is_the_same_alone_packed_in_pieces_and_in_text_alone(
    bases: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    with exact(monkeypatch):
        model = from_scratch(bases["llama"], torch.float64)
        alone = [look(model, view([[s]], model))[0] for s in SEQUENCES.values()]
        assert distance(look(model, view([list(SEQUENCES.values())], model)), alone) <= FLOAT64
        for sequence, expected in zip(SEQUENCES.values(), alone, strict=True):
            assert distance(incremental(model, view([[sequence]], model)), [expected]) <= FLOAT64
        text = words(9, 1)
        mixed = look(model, pack([[Sequence(segments=(text,))]]))[0][0]
        found = model.text_model()(torch.tensor([text.ids])).logits[0]
        assert float((found - mixed).abs().max()) <= FLOAT64
        assert float((found - model.text_logits(torch.tensor([text.ids]))[0]).abs().max()) > 0.1  # not the base's


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=() if f in ("llama", "gemma3", "olmo2") else pytest.mark.full)
        for f in FAMILIES
        if f != "gpt_neox"
    ],
)
@torch.no_grad()
def test_norms_stand_behind_the_branches_in_every_family(bases: dict[str, Backbone], family: str) -> None:
    """How large a branch's last matrix is makes no difference to what it adds; and the fast path is the reference path."""
    model = from_scratch(bases[family])
    batch = view([[SEQUENCES["words around picture"]]], model)
    fast = look(model, batch)
    with model.using(model.reference_engine()):
        assert distance(look(model, batch), fast) <= FLOAT32
    for parts in (model.fusion.of_words, model.fusion.blocks):
        last = [m for n, m in parts["1"].named_modules() if re.search(r"(o_proj|c_proj|down_proj)(\.0)?$", n)]
        last = [m for m in last if not isinstance(m, nn.Sequential)]
        assert len(last) == 2
        for matrix in last:
            for parameter in matrix.parameters():
                parameter.mul_(4)
    assert distance(look(model, batch), fast) <= 1e-4
    for parameter in model.fusion.blocks["1"].parameters():
        parameter.mul_(4)
    assert distance(look(model, batch), fast) > 1e-2


def test_it_is_trained_and_saved_whole(bases: dict[str, Backbone], tmp_path: Path) -> None:
    model = from_scratch(bases["llama"], randomised=False)
    assert not model.fusion.preserves_text and not model.fusion.prefix_is_constant
    by_layer = [
        id(p) for i in range(model.backbone.num_layers) for m in model.fusion.new_modules(i) for p in m.parameters()
    ]
    assert sorted(by_layer) == sorted(
        map(id, model.fusion.parameters())
    )  # each weight belongs to one layer: it is divided
    batch = view([[SEQUENCES["words around picture"]], [SEQUENCES["picture behind words"]]], model)
    for parameter in model.port.head.parameters():
        nn.init.normal_(parameter)
    found = model.losses(batch, torch.Generator().manual_seed(0))
    sum(value for value, _ in found.values()).backward()  # type: ignore[union-attr]
    assert [n for n, p in model.fusion.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0] == []
    model.save_pretrained(tmp_path / "pack")
    loaded = xfusion.load(tmp_path / "pack")
    with torch.no_grad():
        assert distance(look(loaded, batch), look(model, batch)) == 0


def test_a_base_from_scratch_is_the_same_everywhere_and_nobodys_weights(bases: dict[str, Backbone]) -> None:
    before = torch.get_rng_state()
    one, other = (Backbone.load(SCRATCH + bases["llama"].source) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint == other.fingerprint != bases["llama"].fingerprint
    assert not one.pretrained and bases["llama"].pretrained and not one.working_copy(torch.bfloat16, "sdpa").pretrained
    assert one.encode("a red apple") == bases["llama"].encode("a red apple")
    again = one.fresh()
    for own, same in zip(one.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, same)
    norms = [p for n, p in one.layers.named_parameters() if "norm" in n]
    assert norms and all(torch.equal(p, torch.ones_like(p)) for p in norms)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {}, "post_norm is another function than .* was trained to be.*model.backbone.source scratch:"),
        ("llama", {"own": ("norm", "query")}, "leave own, noised_only, stride, offset and layers at their defaults"),
        ("llama", {"noised_only": True}, "post_norm is for models from scratch"),
        ("llama", {"stride": 2}, "post_norm is for models from scratch"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(
    bases: dict[str, Backbone], family: str, config: Any, message: str
) -> None:
    fusion = ModalityExperts.Config(post_norm=True, **config)
    with pytest.raises(XFusionError, match=message) as error:
        Model(replace(model_config(bases[family]), fusion=fusion), bases[family])
    assert "\n" not in str(error.value)


def test_branches_beside_each_other_are_refused(bases: dict[str, Backbone]) -> None:
    with pytest.raises(XFusionError, match="GPTNeoXLayer: norms .* are not one for each of two branches in turn"):
        from_scratch(bases["gpt_neox"])
