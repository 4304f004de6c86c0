"""Contrast: the equation of its paper, transformers' loss, who is no negative, and vectors that depend on nothing else."""

import math
from dataclasses import replace

import pytest
import torch
from contracts.table import (
    SIDE,
    Noise,
    corrupted,
    model_config,
    picture,
    randomise,
    share_left,
    trained,
    twenty_steps,
    words,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

import xfusion
from xfusion.data.mixture import Mixture, MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Example, Sequence, XFusionError
from xfusion.data.templates import Templates, with_begin
from xfusion.model import Model
from xfusion.objectives import contrastive
from xfusion.objectives.base import NoObjective
from xfusion.objectives.contrastive import Contrastive, duplicates, identities
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.objectives.next_token import NextToken
from xfusion.training.loop import train
from xfusion.training.stages import Recipe, Stage

TEMPLATES = Templates(caption_dropout=0, article_share=0, other_wordings=0)


def make(base, fusion="dual tower", *, randomised=True):
    config = replace(
        model_config(base, fusion),
        text=NextToken.Config(weight=0.0),
        media=NoObjective.Config(),
        extra=(Contrastive.Config(width=16),),
    )
    model = Model(config, base)
    if randomised:
        randomise(model)
    return model.eval()


def pair(i, *, text=None, group=-1, grid=(2, 2)):
    shown = replace(picture(grid, i, noised=True, loss=True), group=group)
    return Sequence(segments=(text or words(3 + i % 3, i), shown))


def vectors(model, sequences, per_row=1, noise=lambda batch: batch):
    rows = [sequences[i : i + per_row] for i in range(0, len(sequences), per_row)]
    batch, (objective,) = noise(pack(rows)), model.extra
    from xfusion.objectives.contrastive import pair_places

    row, sample = pair_places(batch.media["image"])
    return objective._embed_text(model, batch, row, sample), objective.embed_media(model, batch)


def value(model, sequences):
    (objective,) = model.extra
    total, count = objective.loss(model, pack([[s] for s in sequences]))["contrastive"]
    assert int(count) == len(sequences)
    return total / count


@torch.no_grad()
def test_the_loss_is_its_equation_in_float64_and_transformers_loss(bases):
    model = make(bases["llama"])
    sequences = [pair(i) for i in range(5)]
    u, v = (x.double() for x in vectors(model, sequences))
    similarity = math.exp(float(model.extra[0].log_scale)) * u @ v.T
    expected = 0.0
    for s in (similarity, similarity.T):
        for i in range(5):
            expected -= (float(s[i, i]) - math.log(sum(math.exp(float(s[i, j])) for j in range(5)))) / 2
    found = value(model, sequences)
    assert float(found) == pytest.approx(expected / 5, abs=1e-5)
    torch.testing.assert_close(found, image_text_contrastive_loss(similarity.float()), rtol=0, atol=1e-5)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(5).double())


@torch.no_grad()
def test_near_identical_pictures_and_equal_words_are_no_negatives(bases):
    """Pairs 0 and 1 are of one group, 2 and 3 say the same: each pair is left out of the other's sum, and of no other."""
    model, said = make(bases["llama"]), words(4, 9)
    sequences = [pair(0, group=7), pair(1, group=7), pair(2, text=said), pair(3, text=said), pair(4, group=8)]
    batch = pack([[s] for s in sequences])
    alike = torch.zeros(5, 5, dtype=torch.bool)
    for i, j in ((0, 1), (2, 3)):
        alike[i, j] = alike[j, i] = True
    assert torch.equal(duplicates(batch, batch.media["image"]), alike)
    u, v = (x.double() for x in vectors(model, sequences))
    similarity = math.exp(float(model.extra[0].log_scale)) * u @ v.T
    expected = 0.0
    for s in (similarity, similarity.T):
        for i in range(5):
            others = sum(math.exp(float(s[i, j])) for j in range(5) if not alike[i, j])
            expected -= (float(s[i, i]) - math.log(others)) / 2
    assert float(value(model, sequences)) == pytest.approx(expected / 5, abs=1e-5)
    trapped = image_text_contrastive_loss(similarity.float())
    assert abs(float(trapped) - expected / 5) > 1e-2  # counting them would be seen
    lone = [pair(i, group=-1) for i in range(2)]
    assert not duplicates(pack([lone]), pack([lone]).media["image"]).any()  # no group is no kinship


def test_the_texts_of_a_batch_are_copied_to_the_host_together(bases):
    """On a GPU each copy waits for all that was asked of it before."""

    class Copies(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.count += func is Tensor.tolist
            return func(*args, **(kwargs or {}))

    for pairs in (2, 9):
        batch = pack([[pair(i)] for i in range(pairs)])
        with Copies() as copies:
            found = identities(batch, batch.media["image"])
        assert copies.count == 2 and found[:, 0].tolist() == [hash(pair(i).segments[0].ids) for i in range(pairs)]


@torch.no_grad()
def test_matching_tells_texts_apart_once(bases, monkeypatch):
    from objectives import test_matching

    hashed = []
    monkeypatch.setattr(contrastive, "hash", lambda ids: hashed.append(ids) or hash(ids), raising=False)
    model, batch = test_matching.make(bases["llama"]), pack([[test_matching.pair(i)] for i in range(4)])
    model.extra[0].loss(model, batch)
    assert len(hashed) == 4


def test_the_scale_begins_at_clips(bases):
    """CLIP's temperature of 0.07, whose logarithm is learned: ln(1 / 0.07)."""
    (objective,) = make(bases["llama"], randomised=False).extra
    assert float(objective.log_scale.detach()) == pytest.approx(2.6592600, abs=1e-6)


def test_a_scale_beyond_the_bound_is_brought_back_to_it_and_learns_on(bases):
    """The paper clips the parameter. Clipped at its use, it has no gradient above the bound: one step too far is for good."""
    model, sequences = make(bases["llama"]), [pair(i) for i in range(4)]
    scale, bound = model.extra[0].log_scale, math.log(100.0)
    with torch.no_grad():
        scale.fill_(bound)
        at_bound = value(model, sequences)
        scale.fill_(9.0)
        assert float(value(model, sequences)) == pytest.approx(float(at_bound), rel=1e-6)
        assert float(scale) == 9.0  # looking changes no weight
    beyond = value(model, sequences)
    assert float(beyond.detach()) == pytest.approx(float(at_bound), rel=1e-6)
    assert float(scale.detach()) == pytest.approx(bound)
    beyond.backward()
    assert float(scale.grad) > 0  # of random pairs: less certainty would cost less
    torch.optim.SGD([scale], lr=1e-3).step()
    assert float(scale.detach()) < bound and float(value(model, sequences).detach()) < float(at_bound)


@torch.no_grad()
def test_vectors_depend_on_nothing_else_in_the_batch(bases):
    model = make(bases["llama"])
    sequences = [pair(i, grid=(2, 2) if i % 2 else (2, 3)) for i in range(4)]
    alone = [torch.cat(parts) for parts in zip(*(vectors(model, [s]) for s in sequences), strict=True)]
    for per_row in (1, 2, 4):
        for found, expected in zip(vectors(model, sequences, per_row), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for found, expected in zip(vectors(model, sequences, 2, noise=corrupted), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the picture is seen clean
    assert float((alone[0][0] - alone[0][1]).abs().max()) > 1e-2


@pytest.mark.parametrize("fusion", ["dual tower", "prefix"])
@torch.no_grad()
def test_words_are_read_at_the_last_from_the_bases_own_states(bases, fusion):
    """Looked up or walked through the layers, and by the base alone."""
    model = make(bases["llama"], fusion)
    sequences = [pair(i) for i in range(3)]
    found, _ = vectors(model, sequences)
    with model.using(model.reference_engine()):
        torch.testing.assert_close(vectors(model, sequences)[0], found, rtol=0, atol=1e-5)
    for sequence, vector in zip(sequences, found, strict=True):
        states = model.backbone.decoder(input_ids=torch.tensor([sequence.segments[0].ids])).last_hidden_state
        expected = torch.nn.functional.normalize(model.extra[0].words(states[0, -1]), dim=-1)
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
    assert len(model.engine.final_states) == 3


def test_a_picture_without_words_is_refused(bases):
    with pytest.raises(
        XFusionError, match="a picture of the batch has no words: set the templates' caption_dropout to 0"
    ):
        value(make(bases["llama"]), [pair(0), Sequence(segments=(picture((2, 2), 1),))])


@torch.no_grad()
def test_embed_takes_texts_and_pictures_in_any_order(bases):
    model = make(bases["llama"])
    assert model.capabilities == {"text", "embed"}
    shown = [Noise().picture(i, 40) for i in range(2)]
    items = ["a red apple", shown[0], "tree", shown[1], "a red apple"]
    found = model.embed(items)
    assert found.shape == (5, 16) and torch.equal(found[0], found[4])
    torch.testing.assert_close(torch.cat([model.embed([i]) for i in items]), found, rtol=0, atol=1e-5)
    text = with_begin(model.backbone.begin_ids, words_of(model, "tree"))
    tokens = model.image.encode([shown[0]], SIDE)[0]
    item = model.image.segment(tokens, (4, 4), state="noised")
    u, v = vectors(model, [Sequence(segments=(*text, item))])
    torch.testing.assert_close(found[2:3], u, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1:2], v, rtol=0, atol=1e-5)
    with pytest.raises(XFusionError, match=r"embed takes a list of texts and pictures: write \[item\]"):
        model.embed("tree")
    with pytest.raises(XFusionError, match="this model cannot embed, only caption, draw, text: train one with a"):
        Model(model_config(bases["llama"]), bases["llama"]).embed(["tree"])


def words_of(model, text):
    from xfusion.data.sequence import Text

    return (Text(ids=model.backbone.encode(text)),)


def test_a_mixture_numbers_the_groups_of_its_source(bases):
    class Twins(Noise):
        def __init__(self):
            super().__init__()
            self.examples = tuple(
                Example(id=e.id, captions=e.captions, group="twin" if i < 2 else e.group, origin=e.origin)
                for i, e in enumerate(self.examples)
            )

    model = make(bases["llama"])
    base, config = model.backbone, MixtureConfig(draw=6, caption=0, templates=TEMPLATES)
    mixture = Mixture(Twins(), model.image, (SIDE,), base.encode, base.begin_ids, base.end_ids[0], config, 0)
    (batch,) = mixture.batches(0)
    assert duplicates(batch, batch.media["image"]).sum() == 2
    assert (
        mixture.drawing_target(0, SIDE).group
        == mixture.drawing_target(1, SIDE).group
        != mixture.drawing_target(2, SIDE).group
        == mixture.input_picture(2, SIDE).group
    )


def test_twenty_steps_of_the_real_loop_text_bit_equal_and_a_pack(bases, tmp_path):
    base, stage = bases["llama"], twenty_steps(MixtureConfig(draw=6, caption=0, templates=TEMPLATES), rate=2e-3)
    model, losses = trained(Recipe(model=make(base).config, data="noise", stages=(stage,)), base, tmp_path / "run")
    assert set(losses[0]) == {"contrastive"} and losses[-1]["contrastive"] < 0.2 * losses[0]["contrastive"]
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    items = [Noise().picture(0, SIDE), Noise().examples[0].captions[0], Noise().examples[1].captions[0]]
    found = model.eval().embed(items)
    assert torch.equal(loaded.embed(items), found)
    assert float(found[0] @ found[1]) > float(found[0] @ found[2])


def test_contrast_beside_drawing_and_naming(bases, tmp_path):
    """Three losses of one step: the noised picture of a drawing sample is a clean one to the contrast."""
    base = bases["llama"]
    config = replace(
        model_config(base), media=FlowMatching.Config(prediction="velocity"), extra=(Contrastive.Config(),)
    )
    names = {"next_token", "flow_matching", "contrastive"}
    model = Model(config, base)
    randomise(model)
    answered = Sequence(segments=(picture((2, 2), 9), words(4, 9, loss=True)))
    found = model.losses(pack([[s] for s in (pair(0), pair(1))]), torch.Generator().manual_seed(0))
    found |= model.losses(pack([[answered]]), torch.Generator().manual_seed(0))
    assert set(found) == names
    sum(value / count for value, count in found.values()).backward()
    grads = {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in model.named_new_parameters().items()}
    assert [n for n, g in grads.items() if not g > 0] == []
    assert all(p.grad is None for p in base.model.parameters())
    mixture = MixtureConfig(draw=6, caption=6, pack=2, templates=replace(TEMPLATES, question_share=0))
    recipe = Recipe(model=config, data="noise", stages=(twenty_steps(mixture),))
    model, losses = trained(recipe, base, tmp_path / "run")
    assert set(losses[0]) == names and share_left(losses, "contrastive") < 0.8
    assert model.capabilities == {"text", "caption", "draw", "embed"}


def test_words_that_are_said_behind_a_picture_are_no_pair(bases):
    """The language model's samples: what is asked there is the same of every picture."""
    (objective,) = make(bases["llama"]).extra
    asked = [Sequence(segments=(picture((2, 2), i), words(3, 5), words(4, i, loss=True))) for i in range(3)]
    batch = pack([[s] for s in asked])
    assert batch.text_reads_media and objective.count(batch) == {} and objective.loss(None, batch) == {}


def test_a_loss_over_a_batch_is_not_accumulated(bases, tmp_path):
    recipe = Recipe(model=make(bases["llama"]).config, data="noise", stages=(Stage(steps=1, accumulate=2),))
    with pytest.raises(
        XFusionError,
        match=r"stage 0 accumulates 2 batches, but the loss contrastive compares .* set --stages.0.accumulate 1 ",
    ):
        train(recipe, out=tmp_path / "run", source=Noise(), backbone=bases["llama"], compile=False)


def test_pairs_of_a_picture_and_its_words_have_no_shots(bases, tmp_path):
    mixture = MixtureConfig(draw=6, caption=2, pack=2, shots=1, templates=TEMPLATES)
    recipe = Recipe(model=make(bases["llama"]).config, data="noise", stages=(Stage(steps=1, mixture=mixture),))
    with pytest.raises(XFusionError, match=r"the loss contrastive sets each picture .* stage 0 puts 1 solved examples"):
        train(recipe, out=tmp_path / "run", source=Noise(), backbone=bases["llama"], compile=False)
