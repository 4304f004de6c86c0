"""Matching: which negatives are taken, the loss by hand, and that a pair is judged by its own words and picture alone."""

from dataclasses import replace

import pytest
import torch
from contracts.table import Noise, model_config, picture, randomise, words

import xfusion
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, XFusionError
from xfusion.data.templates import Templates
from xfusion.model import BackboneConfig, Model
from xfusion.objectives.contrastive import Contrastive, pair_places
from xfusion.objectives.masked_words import MaskedWords
from xfusion.objectives.matching import Matching, hardest_negatives, pairings_batch
from xfusion.objectives.next_token import NextToken
from xfusion.recipes.base import find
from xfusion.training.loop import train


def make(base, fusion="flamingo"):
    config = replace(
        model_config(base, fusion), text=NextToken.Config(weight=1.0), extra=(Matching.Config(width=16, matching=0.5),)
    )
    model = Model(config, base)
    randomise(model, by=0.3)
    return model.eval()


def pair(i, *, text=None, group=-1, grid=(2, 2)):
    return Sequence(segments=(text or words(3 + i % 3, i), replace(picture(grid, i), group=group)))


def test_two_losses_of_one_name_are_refused(bases):
    """Losses are kept by name: of two only the last would be trained, divided by the targets of both."""
    config = make(bases["llama"]).config
    message = "the objectives Matching and MaskedWords both have a loss 'matching': .* leave one of them out"
    with pytest.raises(XFusionError, match=message):
        Model(replace(config, extra=(*config.extra, MaskedWords.Config(width=16, mlp=16))), bases["llama"])
    with pytest.raises(XFusionError, match="Matching and Contrastive both have a loss 'contrastive'"):
        Model(replace(config, extra=(*config.extra, Contrastive.Config())), bases["llama"])


def test_the_hardest_is_most_alike_and_no_twin():
    generator = torch.Generator().manual_seed(0)
    alike, excluded = torch.rand(6, 6, generator=generator), torch.eye(6, dtype=torch.bool)
    for i, j in ((0, 1), (2, 4)):
        excluded[i, j] = excluded[j, i] = True
    found = hardest_negatives(alike, excluded)
    for i in range(6):
        allowed = [j for j in range(6) if not excluded[i, j]]
        assert int(found[0][i]) == max(allowed, key=lambda j, i=i: float(alike[j, i]))
        assert int(found[1][i]) == max(allowed, key=lambda j, i=i: float(alike[i, j]))
    assert all(t.tolist() == [-1, -1] for t in hardest_negatives(alike[:2, :2], torch.ones(2, 2, dtype=torch.bool)))


@pytest.mark.parametrize("fusion", ["flamingo", "dual tower"])
@torch.no_grad()
def test_the_loss_is_that_of_its_equation(bases, fusion):
    model, said = make(bases["llama"], fusion), words(4, 40)
    (objective,) = model.extra
    sequences = [
        pair(0, group=7),
        pair(1, group=7, grid=(2, 3)),
        pair(2, text=said),
        pair(3, text=said),
        pair(4, group=8),
    ]
    batch = pack([[s] for s in sequences])
    twins = {(0, 1), (1, 0), (2, 3), (3, 2)}
    u = objective._embed_text(model, batch, *pair_places(batch.media["image"])).double()
    v = objective.embed_media(model, batch).double()
    chosen = []
    for i in range(5):
        allowed = [j for j in range(5) if j != i and (i, j) not in twins]
        chosen.append((i, max(allowed, key=lambda j, i=i: float(u[j] @ v[i]))))  # picture i, wrong words
        chosen.append((max(allowed, key=lambda j, i=i: float(u[i] @ v[j])), i))
    expected, swapped = 0.0, 0.0
    for p, w, truth in [*((i, i, 1) for i in range(5)), *((p, w, 0) for p, w in chosen)]:
        alone = pack([[Sequence(segments=(sequences[w].segments[0], sequences[p].segments[1]))]])
        with model.using(model.reference_engine()):
            one = torch.zeros(1, dtype=torch.int64)
            view = pairings_batch(alone, one, one)
            state = model(view).states["text"][0, -1].double()
        logits = objective.head.weight.double() @ state + objective.head.bias.double()
        expected -= float(logits[truth] - logits.logsumexp(0))
        swapped -= float(logits[1 - truth] - logits.logsumexp(0))
    found = objective.loss(model, batch)
    assert set(found) == {"contrastive", "matching"} and int(found["matching"][1]) == 15
    assert {name: int(count) for name, (_, count) in found.items()} == objective.count(batch)
    assert float(found["matching"][0]) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - swapped) > 1e-2
    assert objective.weights == {"contrastive": 1.0, "matching": 0.5}


@torch.no_grad()
def test_words_and_the_encode_row_are_the_bases_own_where_the_gates_are_closed(bases):
    model = Model(make(bases["llama"]).config, bases["llama"]).eval()
    batch, own = pack([[pair(0)], [pair(1, grid=(2, 3))]]), torch.arange(2)
    states = model(pairings_batch(batch, own, own.flip(0))).states["text"]
    for row, sequence in enumerate([pair(1), pair(0)]):
        ids = torch.tensor([sequence.segments[0].ids])
        embedded = torch.cat([model.backbone.embed(ids), model.port.end[None, None]], dim=1)
        expected = model.backbone.decoder(inputs_embeds=embedded).last_hidden_state[0]
        torch.testing.assert_close(states[row, : len(expected)], expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_pair_is_judged_by_nothing_else(bases):
    model = make(bases["llama"])
    (objective,) = model.extra
    sequences = [pair(i, grid=(2, 2) if i % 2 else (2, 3)) for i in range(4)]
    whole, packed = pack([[s] for s in sequences]), pack([sequences[:2], sequences[2:]])
    pictures, said = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 2, 1, 3, 3])
    found = objective.match_logits(model, whole, pictures, said)
    torch.testing.assert_close(objective.match_logits(model, packed, pictures, said), found, rtol=0, atol=1e-5)
    for k in range(5):
        alone = objective.match_logits(model, whole, pictures[k : k + 1], said[k : k + 1])
        torch.testing.assert_close(alone, found[k : k + 1], rtol=0, atol=1e-5)
    assert float((found[0] - found[4]).abs().max()) > 1e-3  # other words
    caption = pack([[Sequence(segments=(picture((2, 2), 1), words(4, 1, loss=True)))]])
    assert objective.count(caption) == {} and objective.loss(model, caption) == {}


def tiny(base):
    recipe = find("blip")(every=2, latents=3, pairs=6)
    model = make(base).config
    mixture = MixtureConfig(
        draw=6, caption=6, pack=2, templates=Templates(caption_dropout=0, article_share=0, other_wordings=0)
    )
    stage = replace(recipe.stages[0], steps=20, warmup=2, rate=1e-2, schedule="constant", ema=0, mixture=mixture)
    # The recipe's mechanism and objectives over pixels: no encoder is needed for six pictures.
    model = replace(recipe.model, backbone=BackboneConfig(source=base.source), image=model.image, port=model.port)
    image = replace(model.image, behind_begin=True)
    return replace(recipe, data="noise", model=replace(model, image=image), stages=(stage,))


def test_twenty_steps_of_the_recipe(bases, tmp_path):
    base, losses = bases["llama"], []
    before = base.compute_fingerprint()
    model = train(
        tiny(base),
        out=tmp_path / "run",
        source=Noise(),
        backbone=base,
        compile=False,
        dtype=torch.float32,
        listener=lambda e: losses.append(e["losses"]) if e["event"] == "step" else None,
    )
    assert set(losses[0]) == {"next_token", "contrastive", "matching"}
    for name in losses[0]:
        first, last = (sum(step[name] for step in part) / 4 for part in (losses[:4], losses[-4:]))
        assert last < 0.9 * first, name
    assert model.capabilities == {"text", "caption", "embed", "match"}
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(model.text_logits(ids, stack="fused"), base.model(ids).logits)
    assert base.compute_fingerprint() == before
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    texts = ["red apple", "tree"]
    found = loaded.match(Noise().picture(0, 32), texts)
    assert found == model.eval().match(Noise().picture(0, 32), texts) and all(0 <= p <= 1 for p in found)
    with pytest.raises(XFusionError, match="this model cannot match, only caption, draw, text: train one with a match"):
        Model(model_config(base), base).match(Noise().picture(0, 32), texts)
