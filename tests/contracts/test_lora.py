"""LoRA beside any mechanism: peft's own numbers, the base untouched, the regime said wherever a model is named."""

from dataclasses import replace

import pytest
import torch
from contracts.table import (
    CORE,
    FUSIONS,
    READERS,
    Noise,
    distance,
    exact,
    float64_base,
    look,
    mixed_sequences,
    model_config,
    randomise,
    view,
)
from contracts.test_paths import FLOAT64, incremental, packings

import xfusion
from xfusion.backbone import Backbone
from xfusion.comparison.table import _remove_unranked_verdicts
from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.evaluation.verify import verify
from xfusion.fusion.lora import Lora
from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.model import Model
from xfusion.recipes.base import find
from xfusion.training.loop import train
from xfusion.training.stages import Recipe, Stage

WRAPPED = {
    name: Lora.Config(inner=config, rank=3, targets=None)
    for name, config in {**FUSIONS, **READERS}.items()
    if name not in ("single tower", "lora")
}
SEQUENCES = mixed_sequences()
pytest.importorskip("peft", reason="peft is not installed (extra lora)")


def lora_model(base, name, *, by=0.1):
    fusion = WRAPPED[name]
    model = Model(replace(model_config(base, name), fusion=fusion), base)
    randomise(model, by=by)
    return model.eval()


def in_float64(base, name):
    return lora_model(float64_base(base), name).double()


@pytest.mark.parametrize("name", WRAPPED)
@torch.no_grad()
def test_without_the_adapters_the_text_is_the_bases_and_with_them_it_is_not(bases, name):
    base = bases["llama"]
    before = base.compute_fingerprint()
    model = lora_model(base, name)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(5))
    plain = base.model(ids).logits
    assert float((model.text_logits(ids, stack="fused") - plain).abs().max()) > 1e-2
    assert model.text_model() is not base.model and torch.equal(model.text_logits(ids), plain)
    kept = model.fusion.inner.preserves_text
    with model.fusion.unadapted():
        assert torch.equal(model.text_logits(ids, stack="fused"), plain) == kept
    assert model.regime == ("LoRA" if kept else "as in the paper")
    assert base.compute_fingerprint() == before
    names = set(model.learned_state())
    assert not [n for n in names if "base_layer" in n] and any("lora_A" in n for n in names)


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "llama" else pytest.mark.full) for f in CORE])
@pytest.mark.parametrize("name", ["prefix", "dual tower, strided", "dual projection", "openflamingo, all previous"])
@torch.no_grad()
def test_fast_path_is_the_reference_path_and_cached_is_one_pass(bases, name, family, monkeypatch):
    with exact(monkeypatch):
        model = in_float64(bases[family], name)
        batch = view(packings()["packed"][0], model)
        fast = [words for words, _ in look(model, batch)]
        with model.using(model.reference_engine()):
            slow = [words for words, _ in look(model, batch)]
        pairs = [(a, b) for a, b in zip(fast, slow, strict=True) if len(a)]
        assert max(float((a - b).abs().max()) for a, b in pairs) <= FLOAT64
        whole = look(model, view([[SEQUENCES["words around picture"]]], model))
        pieces = incremental(model, view([[SEQUENCES["words around picture"]]], model))
        assert distance([(whole[0][0],)], [(pieces[0][0],)]) <= FLOAT64


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_the_deltas_are_pefts(bases, family):
    """The whole model as peft adapts it, weights copied across, gives the same logits."""
    from peft import LoraConfig, get_peft_model

    model = Model(replace(model_config(bases[family]), fusion=Lora.Config(rank=4, alpha=6.0)), bases[family]).eval()
    randomise(model)
    own = {
        name.removeprefix("fusion.blocks."): value for name, value in model.learned_state().items() if "lora" in name
    }
    names = "|".join(sorted({name.split(".")[1].split("/")[1] for name in own}))
    where = rf".*\.(attn|self_attn)\.({names})"  # an MLP may have a matrix of the same name
    config = LoraConfig(r=4, lora_alpha=6, target_modules=where, fan_in_fan_out=family == "gpt2")
    theirs = get_peft_model(Backbone.load(bases[family].source).model, config).eval()
    state = {name: value for name, value in theirs.state_dict().items() if "lora_" in name}
    assert len(state) == len(own)
    for name, value in own.items():
        index, path, _, *rest = name.split(".")
        (found,) = [key for key in state if key.endswith(f".{index}.{path.replace('/', '.')}.{'.'.join(rest)}")]
        state[found].copy_(value)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(5))
    found = model.text_logits(ids, stack="fused")
    torch.testing.assert_close(found, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert float((found - model.text_logits(ids)).abs().max()) > 1e-2


def test_gradients_reach_the_deltas_and_leave_the_base(bases):
    model = lora_model(bases["llama"], "dual tower, strided")
    batch = view(packings()["packed"][0], model)
    out = model(batch)
    loss = model.text_objective.loss(lambda _: out, batch)["next_token"][0]
    loss.backward()
    named = model.named_new_parameters()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for n, p in named.items() if "lora_" in n)
    assert all(p.grad is None for p in bases["llama"].model.parameters())


@pytest.mark.full
def test_compiled_layers_agree(bases):
    model = lora_model(bases["llama"], "dual tower, strided")
    batch = view(packings()["packed"][0], model)
    with model.using(model.training_engine(torch.float32, "as asked", "eager", True)):
        fast = look(model, batch)
    assert distance(fast, look(model, batch)) <= 2e-4


def test_twenty_steps_and_the_regime_everywhere(bases, tmp_path, monkeypatch):
    base, losses = bases["llama"], []
    before = base.compute_fingerprint()
    plain = Recipe(
        model=model_config(base, "prefix"),
        data="noise",
        stages=(Stage(steps=20, warmup=2, rate=1e-2, ema=0, mixture=MixtureConfig(draw=4, caption=6, pack=2)),),
    )
    recipe = plain.with_model(fusion=Lora.Config(inner=plain.model.fusion, targets=None))
    model = train(
        recipe,
        out=tmp_path / "run",
        source=Noise(),
        backbone=base,
        compile=False,
        dtype=torch.float32,
        preview_every=0,
        listener=lambda e: losses.append(e["losses"]) if e["event"] == "step" else None,
    )
    first, last = (sum(step["next_token"] for step in part) / 4 for part in (losses[:4], losses[-4:]))
    assert last < 0.7 * first and base.compute_fingerprint() == before
    pack = tmp_path / "run" / "pack"
    loaded = xfusion.load(pack, backbone=base)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(5))
    assert torch.equal(loaded.text_logits(ids, stack="fused"), model.text_logits(ids, stack="fused"))
    assert not torch.equal(loaded.text_logits(ids, stack="fused"), base.model(ids).logits)
    assert '"regime": "LoRA"' in (pack / "config.json").read_text()
    card = (pack / "README.md").read_text()
    assert "| regime | LoRA |" in card and "Regime: LoRA. Low-rank deltas lie on the base's layers" in card
    assert "any engine" not in card
    monkeypatch.setattr("xfusion.evaluation.verify.NEW_TOKENS", 3)
    found = verify(loaded)
    checks = {check["name"]: check["passed"] for check in found["checks"]}
    assert found["regime"] == "LoRA" and not found["passed"] and checks["base weights"]
    off = [passed for name, passed in checks.items() if "adapters off" in name]
    assert off and all(off) and not any(passed for name, passed in checks.items() if name == "fused stack: logits")


def test_regimes_are_never_ranked_together():
    found = {name: find(name)().model.regime for name in ("llava", "lora", "single_tower")}
    assert found == {"llava": "strictly frozen", "lora": "LoRA", "single_tower": "as in the paper"}
    decided = {"mean": 0.2, "interval": [0.1, 0.3], "verdict": "better", "seeds_needed": 5}

    def ranked(one, other):
        rows = [{"recipe": "a", "difference": None}, {"recipe": "b", "difference": dict(decided)}]
        _remove_unranked_verdicts([{"rows": rows}], {"a": one, "b": other})
        assert rows[1]["regime"] == other
        return rows[1]["difference"]

    assert ranked("LoRA", "LoRA") == decided
    assert ranked("strictly frozen", "LoRA") == decided | {
        "verdict": "another regime, not ranked",
        "seeds_needed": None,
    }
    assert ranked(None, None) == decided  # results that are older than the label


def test_where_copies_stand_the_frozen_layer_does_not_compute(bases):
    fusion = Lora.Config(inner=SharedDecoder.Config(stride=2))
    model = Model(replace(model_config(bases["llama"]), fusion=fusion), bases["llama"])
    kept = [model.fusion.keeps(index) for index in range(4)]
    assert kept == [str(index) in model.fusion.blocks for index in range(4)] and sorted(kept) == [
        False,
        False,
        True,
        True,
    ]


def test_what_cannot_be_adapted_is_refused(bases):
    config = replace(model_config(bases["llama"]), fusion=Lora.Config(inner=FUSIONS["single tower"]))
    with pytest.raises(XFusionError, match="lora: SharedDecoder trains copies in the place of all these layers"):
        Model(config, bases["llama"])
    with pytest.raises(XFusionError, match=r"lora: targets \['queries'\]: name some of query"):
        Lora.Config(targets=("queries",)).build()
