"""The proof must hold where text is kept, and must fail where it is not, however little was changed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import FAMILIES, make_base, make_model

from xfusion.backbone import Backbone
from xfusion.evaluation import verify as proof
from xfusion.evaluation.contracts import check_base
from xfusion.evaluation.verify import bit_equal, randomised, verify
from xfusion.fusion.dual_tower import DualTower

LOGITS = ["text path: logits", "fused stack: logits", "fused stack, new weights randomised: logits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_base("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(folder):
    """A model on a base of its own: these tests damage it."""
    return make_model(Backbone.load(str(folder)))


@pytest.fixture
def quick(monkeypatch):
    """Fewer prompts, for tests of failures."""
    monkeypatch.setattr(proof, "PROMPTS", proof.PROMPTS[:3])
    monkeypatch.setattr(proof, "PADDED", ("English", "German"))
    monkeypatch.setattr(proof, "NEW_TOKENS", 4)


def failed(result):
    return [check["name"] for check in result["checks"] if not check["passed"]]


def flip(weight, index=0, bit=0):
    """Change one bit of one number."""
    weight.data.view(-1).view(torch.uint8)[index * weight.element_size() + bit // 8] ^= 1 << (bit % 8)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "llama" else pytest.mark.full) for name in FAMILIES]
)
def test_the_proof_holds(family, tmp_path):
    model = make_model(Backbone.load(str(make_base(family, tmp_path))))
    parts = set()
    result = verify(model, lambda part, done, total: parts.add(part))
    assert failed(result) == []
    assert result["text_identical"] and result["passed"] and result["preserves_text"]
    assert result["perplexity"]["base"] == result["perplexity"]["fused"]
    names = [prompt["name"] for prompt in result["settings"]["prompts"]]
    assert {"one token", "Russian", "Chinese", "Arabic", "code", "long", "chat", "left-padded batch"} <= set(names)
    assert "fused stack" in parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_proof_holds_in_half_precision(folder, dtype, quick):
    assert verify(make_model(Backbone.load(str(folder), dtype=dtype)))["passed"]


def test_nothing_is_left_behind(model, quick):
    before, base = model.fingerprint, model.backbone.compute_fingerprint()
    gradients = [p.requires_grad for p in model.new_parameters()]
    verify(model)
    assert model.fingerprint == before
    assert model.backbone.compute_fingerprint() == base
    assert [p.requires_grad for p in model.new_parameters()] == gradients


def test_weights_come_back_after_an_error(model):
    before = model.fingerprint
    with pytest.raises(RuntimeError, match="on purpose"), randomised(model):  # noqa: PT012
        assert model.fingerprint != before
        raise RuntimeError("on purpose")
    assert model.fingerprint == before


@pytest.mark.parametrize("fingerprinted", [True, False], ids=["fingerprint known", "fingerprint unknown"])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"]
)
def test_one_bit_of_one_frozen_weight(model, quick, name, fingerprinted):
    """The lowest bit of one number: no logit may move, but the weights are not the base's."""
    if fingerprinted:
        assert model.backbone.fingerprint
    flip(dict(model.backbone.model.named_parameters())[name], index=5)
    result = verify(model)
    assert result["text_identical"] is False and result["passed"] is False
    assert "base weights" in failed(result)
    assert name in next(c["detail"] for c in result["checks"] if c["name"] == "base weights")


def test_every_bit_of_a_frozen_weight_is_seen(model):
    weight = model.backbone.layers[0].self_attn.q_proj.weight
    assert model.backbone.fingerprint
    fresh = model.backbone.fresh()
    for bit in range(32):
        flip(weight, index=7, bit=bit)
        assert not proof._base_weights(model, fresh)["passed"]
        flip(weight, index=7, bit=bit)
    assert proof._base_weights(model, fresh)["passed"]


def test_a_changed_sign_is_seen_in_the_logits(model, quick):
    flip(model.backbone.layers[1].self_attn.v_proj.weight, index=3, bit=31)
    assert set(LOGITS) <= set(failed(verify(model)))


class Louder(DualTower):
    """Alters text a little, whatever its weights are."""

    def text_layer(self, index, frozen, x, call):
        return super().text_layer(index, frozen, x, call) * (1 + 1e-6)


class Gated(DualTower):
    """Alters text only once its gate is open: copies of the base do not show it, random weights do."""

    def install(self, backbone):
        super().install(backbone)
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def text_layer(self, index, frozen, x, call):
        return super().text_layer(index, frozen, x, call) + self.gate * x


class Leaky(DualTower):
    """Lets the picture into the text before it."""

    def layer(self, index, frozen, call, run):
        out = super().layer(index, frozen, call, run)
        if "text" in out and run.media:
            out["text"] = out["text"] + 0.01 * out[run.media].mean()
        return out


def fused_by(kind, model):
    """The same model under another fusion."""
    fusion = kind(model.config.fusion)
    fusion.install(model.backbone)
    model.fusion = fusion
    model.use(model.plain_engine())
    return model


def test_a_fusion_that_alters_text(model, quick):
    assert set(LOGITS[1:]) <= set(failed(verify(fused_by(Louder, model))))


def test_a_fusion_that_may_alter_text(model, quick):
    result = verify(fused_by(Gated, model))
    assert result["text_identical"] is False
    assert LOGITS[2] in failed(result) and LOGITS[1] not in failed(result)


def test_a_fusion_that_alters_text_before_a_picture(model, quick):
    result = verify(fused_by(Leaky, model))
    assert result["text_identical"] is True and result["passed"] is False
    assert "text before a picture" in failed(result)


def test_bits_are_compared():
    nan = torch.tensor([float("nan"), 0.0])
    assert bit_equal(nan, nan.clone())
    assert not bit_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not bit_equal(torch.zeros(2), torch.zeros(2, 1)) and not bit_equal(torch.zeros(2), torch.zeros(2).double())


def test_a_fresh_base_is_another_object_at_equal_alignment(model):
    fresh = model.backbone.fresh()
    for one, other in zip(model.backbone.model.parameters(), fresh.parameters(), strict=True):
        assert one.data_ptr() != other.data_ptr()
        assert one.data_ptr() % 64 == other.data_ptr() % 64
        assert torch.equal(one, other)


def test_a_real_language_model(assets, quick):
    backbone = Backbone.load(str(assets / "stories260k-llama"))
    assert check_base(backbone, lambda *_: None)["passed"]
    model = make_model(backbone)
    assert verify(model)["passed"]
    flip(backbone.layers[3].mlp.up_proj.weight, index=11)
    assert verify(model)["text_identical"] is False


def test_a_fast_path_that_is_not_the_reference_is_found(folder, monkeypatch):
    right = DualTower.layer

    def wrong(self, index, frozen, call, run):
        out = right(self, index, frozen, call, run)
        return out if index != self.state_layers[0] or not run.media else out | {run.media: out[run.media] * 1.01}

    monkeypatch.setattr(DualTower, "layer", wrong)
    found = check_base(Backbone.load(str(folder)), lambda *_: None)
    assert [c["name"] for c in found["checks"] if not c["passed"]] == ["the fast path is the reference path"]
