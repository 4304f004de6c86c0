"""The same code on another device: what is moved, and, where there is a GPU, that it says what the CPU says."""

import copy
from dataclasses import fields, is_dataclass

import numpy
import pytest
import torch
from contracts.pretended import PRETENDED, moved, one_more_device
from contracts.table import (
    Noise,
    make_base,
    make_model,
    mixed_sequences,
    model_config,
    opening_head,
    picture,
    words,
)
from PIL import Image as PILImage
from torch import Tensor

from xfusion.backbone import Backbone
from xfusion.backbone.attention import ATTENTIONS
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.evaluation import verify as proof
from xfusion.evaluation.metrics.clusters import interval
from xfusion.evaluation.metrics.retrieval import first_hit
from xfusion.evaluation.run import evaluate
from xfusion.evaluation.verify import text_keeping, verify
from xfusion.generation import draw_tokens
from xfusion.model import Model
from xfusion.objectives.codes import NextCode
from xfusion.training.loop import train
from xfusion.training.stages import Recipe, Stage

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: what runs on one is not tested here")


def tensors(value):
    """All tensors in a dataclass, a dict or a list, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for f in fields(value):
            yield from tensors(getattr(value, f.name))
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)


def test_a_moved_batch_leaves_nothing_behind():
    batch = pack([[s] for s in mixed_sequences().values()])
    clean = batch.media["image"].tokens.clone()
    batch = batch.with_media("image", clean=clean)
    moved = batch.to("meta")
    assert len(list(tensors(moved))) == len(list(tensors(batch))) > 20
    assert {t.device.type for t in tensors(moved)} == {"meta"}
    assert {t.device.type for t in tensors(batch)} == {"cpu"}
    assert (moved.num_sequences, moved.text_reads_media) == (batch.num_sequences, batch.text_reads_media)


def test_words_that_open_a_sequence_stand_behind_the_bases_own_beginning(bases):
    base = bases["llama"]
    assert base.begin_ids == (base.tokenizer.bos_token_id,) and base.begin_ids[0] not in base.end_ids
    without = copy.deepcopy(base.tokenizer)
    without.bos_token = None
    other = Backbone(base.model, without, base.source)
    assert other.begin_ids == (without.eos_token_id,)  # what stands between two texts


def test_the_pretended_device_refuses_what_a_gpu_refuses(monkeypatch):
    with one_more_device(monkeypatch):
        there, here = torch.arange(3.0).to(PRETENDED), torch.ones(3)
        for mix in (
            lambda: there + here,
            lambda: torch.cat([here, there]),
            lambda: torch.where(here > 0, there, there),
        ):
            with pytest.raises(AssertionError, match="on meta and of .* on the CPU"):
                mix()
        with pytest.raises(TypeError, match="copy it to the CPU first"):
            there.numpy()
        for wide in (there.double, lambda: torch.zeros(2, dtype=torch.float64, device=PRETENDED)):
            with pytest.raises(TypeError, match="no float64: copy to the CPU first"):
                wide()
        assert there.cpu().double().dtype == torch.float64
        for fine in (
            there * 2,
            there[torch.tensor([0, 2])],
            there + here.to(PRETENDED),
            torch.zeros(2, device=PRETENDED),
        ):
            assert fine.device == PRETENDED
        assert there.cpu().device == there.to("cpu").device == there.to(here).device == here.device
        there[1:] = here[1:]
        assert there.tolist() == [0.0, 1.0, 1.0] and float(there.sum()) == 2.0


def test_the_proof_on_another_device(bases, monkeypatch):
    monkeypatch.setattr(proof, "NEW_TOKENS", 3)  # by the prompt, by its cache, and by a cache that grew
    model = make_model(bases["llama"])
    expected, kept = [(check["name"], check["passed"]) for check in verify(model)["checks"]], text_keeping(model)
    with one_more_device(monkeypatch):
        other = Model(model.config, moved(model.backbone)).eval()
        other.load_state_dict({name: weight.to(PRETENDED) for name, weight in model.state_dict().items()}, strict=False)
        monkeypatch.setattr(
            Backbone, "fresh", lambda base: base.model
        )  # transformers cannot load to the pretended device
        found = [(check["name"], check["passed"]) for check in verify(other)["checks"]]
        assert text_keeping(other) == pytest.approx(kept)
    assert len(expected) > 4 and found == expected and all(passed for _, passed in found)


def test_float64_is_of_the_cpu_where_a_device_has_none(monkeypatch):
    """Apple's GPUs. What is chosen and scored is what the CPU chooses and scores."""
    generator = torch.Generator().manual_seed(0)
    scores, noise = torch.randn(3, 2 * 8, generator=generator), torch.randn(3, 2, generator=generator)
    codes, real = NextCode.Config().build(), torch.randn(8, 4, generator=generator)
    groups, target = list("aabbccdd"), torch.arange(8)
    expected = codes.choose(scores, noise), first_hit(real.flip(0), real, target, groups), interval(real[:, 0], groups)
    with one_more_device(monkeypatch):
        scores, noise, other = (t.to(PRETENDED) for t in (scores, noise, real))
        chosen = codes.choose(scores, noise)
        assert chosen.device == PRETENDED and torch.equal(chosen.cpu(), expected[0])
        assert torch.equal(first_hit(other.flip(0), other, target, groups), expected[1])
        assert interval(other[:, 0], groups) == expected[2]


def test_conversations_and_suites_on_another_device(bases, monkeypatch):
    """What recipes are not asked for (`tests/recipes/test_another_device.py`): turns, an opening head, inpainting, suites."""
    model, talk = make_model(bases["llama"]), [{"role": "user", "content": "draw a tree"}]
    model.opening = opening_head(model.backbone, [talk, [{"role": "user", "content": "no"}]], [True, False])
    seen = PILImage.new("RGB", (16, 16), "red")
    mask = PILImage.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 8))

    def found(model):
        answer = model.answer(talk, draw="auto", seed=3, steps=2, max_tokens=4)
        later = [
            *talk,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": [seen, "and what is this?"]},
        ]
        said = (
            model.answer(later, draw="never", max_tokens=4),
            model.answer([*later[:1], talk[0]], draw="always", steps=2),
        )
        drawn = model.inpaint(seen, mask, "a tree", steps=2)
        scores = evaluate(model, source=Noise(), steps=2, features=False, max_held=0)
        texts = [part for turn in (answer, *said) for part in turn if isinstance(part, str)]
        pictures = [part for turn in (answer, *said, [drawn]) for part in turn if isinstance(part, PILImage.Image)]
        return texts, pictures, {name: score for name, score in scores.items() if name != "settings"}

    expected = found(model)
    assert len(expected[1]) >= 3 and expected[2]["fit_caption_f1"] is not None
    with one_more_device(monkeypatch):
        other = Model(model.config, moved(model.backbone)).eval()
        other.load_state_dict({name: weight.to(PRETENDED) for name, weight in model.state_dict().items()}, strict=False)
        other.opening = copy.deepcopy(model.opening).to(PRETENDED)
        texts, pictures, scores = found(other)
    assert texts == expected[0] and scores == pytest.approx(expected[2], abs=1e-3)
    for one, two in zip(pictures, expected[1], strict=True):
        assert numpy.abs(numpy.asarray(one).astype(int) - numpy.asarray(two)).max() <= 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One base on both devices."""
    folder = str(make_base("llama", tmp_path_factory.mktemp("llama")))
    return Backbone.load(folder), Backbone.load(folder, device="cuda")


@needs_gpu
def test_a_gpu_draws_captions_and_scores_what_the_cpu_does(pair):
    cpu, gpu = (make_model(base) for base in pair)
    gpu.load_state_dict(cpu.state_dict())
    contexts = [(words(4, 1),), (), (words(2, 2), picture((4, 4), 3))]
    settings = {"seeds": [3, 4, 5], "steps": 4, "guidance": 2.0}
    drawn = [draw_tokens(m, contexts, m.image.sizes[0], **settings) for m in (cpu, gpu)]
    assert drawn[1].device.type == "cuda"
    torch.testing.assert_close(drawn[1].cpu(), drawn[0], rtol=1e-3, atol=1e-3)
    pictures = [PILImage.new("RGB", (16, 16), color) for color in ("red", "white")]
    assert gpu.caption(pictures, max_tokens=5) == cpu.caption(pictures, max_tokens=5)
    names = ["a red apple", "tree"]
    torch.testing.assert_close(gpu.score_names(pictures, names), cpu.score_names(pictures, names), rtol=1e-3, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_trains_as_the_cpu_does(pair, tmp_path, attention, compile):
    """By every attention implementation, the backward pass included; the CPU by its own."""
    found = []
    for base in pair:
        out, losses = tmp_path / base.device.type, []
        stage = Stage(steps=4, warmup=2, mixture=MixtureConfig(draw=4, caption=4, pack=2))
        recipe = Recipe(model=model_config(base), data="noise", stages=(stage,))
        settings = {"source": Noise(), "backbone": base, "compile": compile, "dtype": torch.float32, "preview_every": 0}
        settings["attention"] = attention if base.device.type == "cuda" else None
        train(recipe, out=out, listener=lambda e, kept=losses: kept.append(e.get("losses")), **settings)
        found.append([loss for loss in losses if loss])
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-2)
