"""Masked words: the layer is LXMERT's, the masked word never enters, what stands behind it and the picture are heard of."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from contracts.table import (
    VOCABULARY,
    Noise,
    make_model,
    model_config,
    of_other_groups,
    picture,
    randomise,
    trained,
    twenty_steps,
    words,
)
from torch import nn
from transformers.models.lxmert.configuration_lxmert import LxmertConfig
from transformers.models.lxmert.modeling_lxmert import LxmertPooler, LxmertPreTrainingHeads, LxmertXLayer

import xfusion
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import END_OF_MEDIA, Sequence, Text, XFusionError
from xfusion.data.templates import Templates
from xfusion.evaluation.run import evaluate
from xfusion.evaluation.suites.masked_words import by_heart
from xfusion.evaluation.verify import verify
from xfusion.fusion.beside import Beside
from xfusion.generation import fill_tokens, media_segment
from xfusion.model import BackboneConfig, Model
from xfusion.objectives.base import NoObjective
from xfusion.objectives.contrastive import Contrastive, identities
from xfusion.objectives.masked_words import CrossLayer, MaskedWords, next_partner
from xfusion.objectives.next_token import NextToken
from xfusion.recipes.base import find

SIZES = {"width": 24, "heads": 2, "mlp": 40}


def make(base, *more, **settings):
    config = replace(
        model_config(base),
        fusion=Beside.Config(),
        text=NextToken.Config(weight=0.0),
        media=NoObjective.Config(),
        extra=(MaskedWords.Config(**(SIZES | settings)), *more),
    )
    model = Model(config, base)
    randomise(model, by=0.1)
    return model.eval()


def pair(i, *, text=None, group=-1, grid=(2, 2)):
    return Sequence(segments=(text or words(5 + i % 3, i), replace(picture(grid, i), group=group)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------ parity


def copied(ours, theirs):
    """Weights of transformers' layer in ours."""

    def attention(own, other, out):
        own.in_proj_weight.copy_(torch.cat([other.query.weight, other.key.weight, other.value.weight]))
        own.in_proj_bias.copy_(torch.cat([other.query.bias, other.key.bias, other.value.bias]))
        own.out_proj.load_state_dict(out.dense.state_dict())

    attention(ours.cross, theirs.visual_attention.att, theirs.visual_attention.output)
    ours.cross_norm.load_state_dict(theirs.visual_attention.output.LayerNorm.state_dict())
    for own, name in ((ours.words, "lang"), (ours.media, "visn")):
        self_attention = getattr(theirs, f"{name}_self_att")
        attention(own.attention, self_attention.self, self_attention.output)
        own.attention_norm.load_state_dict(self_attention.output.LayerNorm.state_dict())
        own.mlp[0].load_state_dict(getattr(theirs, f"{name}_inter").dense.state_dict())
        own.mlp[2].load_state_dict(getattr(theirs, f"{name}_output").dense.state_dict())
        own.mlp_norm.load_state_dict(getattr(theirs, f"{name}_output").LayerNorm.state_dict())


@torch.no_grad()
def test_a_layer_is_that_of_transformers():
    torch.manual_seed(0)
    theirs = LxmertXLayer(LxmertConfig(hidden_size=24, num_attention_heads=3, intermediate_size=40)).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape))
    ours = CrossLayer(24, 3, 40).eval()
    copied(ours, theirs)
    h, v = torch.randn(3, 5, 24), torch.randn(3, 7, 24)
    said, shown = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 7, dtype=torch.bool)
    said[1, 3:] = shown[2, 4:] = False
    masks = [torch.where(there, 0.0, -1e9)[:, None, None] for there in (said, shown)]
    expected = theirs(h, masks[0], v, masks[1])
    for train in (False, True):  # attention has a kernel of its own for each
        (words_found, _), (media_found, _) = ours.train(train)((h, said), (v, shown))
        torch.testing.assert_close(words_found[said], expected[0][said], rtol=0, atol=1e-5)
        torch.testing.assert_close(media_found[shown], expected[1][shown], rtol=0, atol=1e-5)


@torch.no_grad()
def test_words_and_matches_are_read_off_as_by_transformers(bases):
    """Its pooler of the first position and its heads, here on the base's own word table."""
    model = make(bases["llama"], width=64)
    (objective,), config = model.extra, LxmertConfig(hidden_size=64, vocab_size=VOCABULARY)
    pooler, heads = LxmertPooler(config), LxmertPreTrainingHeads(config)
    for parameter in (*pooler.parameters(), *heads.parameters()):
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded()))
    head, transform = model.backbone.model.get_output_embeddings(), heads.predictions.transform
    heads.predictions.decoder.weight.copy_(head.weight)
    heads.predictions.bias.zero_()
    pairs = [(objective.guess[0], transform.dense), (objective.guess[2], transform.LayerNorm)]
    for own, theirs in [*pairs, (objective.judge[0], pooler.dense), (objective.judge[2], heads.seq_relationship)]:
        own.load_state_dict(theirs.state_dict())
    h = torch.randn(3, 5, 64, generator=seeded())
    read, matched = heads(h, pooler(h))
    torch.testing.assert_close(head(objective.guess(h)), read, rtol=0, atol=1e-5)
    torch.testing.assert_close(objective.judge(h[:, 0]), matched, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(("share", "wanted"), [(0.15, [1, 1, 3]), (0.5, [2, 1, 10]), (1.0, [4, 1, 20])])
def test_of_each_text_a_share_is_masked_and_never_the_first(share, wanted):
    objective = MaskedWords.Config(share=share).build()
    texts = [words(5, 1), words(2, 2), words(21, 3)]
    rows = [[pair(0, text=texts[0]), pair(1, text=texts[1])], [pair(2, text=texts[2])]]
    batch = pack(rows)
    seen = torch.zeros_like(batch.text_ids)
    for seed in range(40):
        found = objective.corrupt(batch, seeded(seed))
        masked = found.text_ids == END_OF_MEDIA
        assert torch.equal(found.clean_ids, batch.text_ids) and torch.equal(found.unmasked().text_ids, batch.text_ids)
        assert torch.equal(found.text_ids[~masked], batch.text_ids[~masked])
        assert torch.equal(found.words_alone().text_ids, batch.text_ids)
        counts = [int(masked[0, batch.text.sample[0] == s].sum()) for s in (0, 1)] + [int(masked[1].sum())]
        assert counts == wanted and objective.count(batch)["masked_words"] == sum(wanted)
        seen += masked
    first = torch.zeros_like(masked)
    for row, sample in ((0, 0), (0, 1), (1, 0)):
        first[row, (batch.text.sample[row] == sample).nonzero()[0, 0]] = True
    assert torch.equal(seen > 0, ~first & (batch.text.order >= 0))  # all others are, sooner or later
    again = objective.corrupt(batch, seeded(3)).text_ids
    assert torch.equal(again, objective.corrupt(batch, seeded(3)).text_ids)
    taken = objective.corrupt(batch, seeded(3)).index(torch.tensor([1]))
    assert torch.equal(taken.text_ids, again[1:]) and torch.equal(taken.clean_ids, batch.text_ids[1:])


def test_captions_and_words_alone_are_left_out():
    objective = MaskedWords.Config().build()
    for segments in ((picture((2, 2), 1), words(4, 1, loss=True)), (words(5, 2),)):
        batch = pack([[Sequence(segments=segments)]])
        assert objective.corrupt(batch, seeded()) is batch
        assert objective.count(batch) == {} == objective.loss(None, batch)
    beside = pack([[Sequence(segments=(words(5, 2),)), pair(0)]])
    masked = objective.corrupt(beside, seeded()).text_ids == END_OF_MEDIA
    assert set(beside.text.sample[masked].tolist()) == {1} and int(masked.sum()) == 1


def test_a_contrast_beside_it_reads_all_words(bases):
    model = make(bases["llama"], Contrastive.Config(width=8), share=0.5)
    batch = pack([[pair(i)] for i in range(3)])
    masked = model.extra[0].corrupt(batch, seeded())
    assert torch.equal(identities(masked, masked.media["image"]), identities(batch, batch.media["image"]))
    with torch.no_grad():
        found, expected = (model.extra[1].loss(model, b)["contrastive"][0] for b in (masked, batch))
    assert torch.equal(found, expected)


def test_the_wrong_words_are_the_next_that_are_no_twins():
    excluded = torch.eye(5, dtype=torch.bool)
    assert next_partner(excluded).tolist() == [1, 2, 3, 4, 0]
    excluded[1, 2] = excluded[2, 1] = excluded[4, 0] = excluded[0, 4] = True
    assert next_partner(excluded).tolist() == [1, 3, 3, 4, 1]
    assert next_partner(torch.ones(2, 2, dtype=torch.bool)).tolist() == [-1, -1]


# ----------------------------------------------------------------------------------------------- what is heard of


def blanked(ids, place):
    return Text(ids=(*ids[:place], END_OF_MEDIA, *ids[place + 1 :]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_the_masked_word_never_enters(bases, family):
    model = make(bases[family])
    (objective,) = model.extra
    batch = pack([[pair(0), pair(1)], [pair(2)]])
    masked = objective.corrupt(batch, seeded(1))
    hidden = masked.text_ids == END_OF_MEDIA
    other = replace(batch, text_ids=torch.where(hidden, (batch.text_ids + 7) % 300, batch.text_ids))
    changed = objective.corrupt(other, seeded(1))
    assert torch.equal(changed.text_ids == END_OF_MEDIA, hidden) and not torch.equal(
        changed.clean_ids, masked.clean_ids
    )
    found = objective.masked_logits(model, masked)
    assert found.shape == (int(hidden.sum()), 320)
    assert torch.equal(objective.masked_logits(model, changed), found)
    one, two = (objective.loss(model, b)["masked_words"][0] for b in (masked, changed))
    assert float((one - two).abs()) > 1e-3  # the labels are others


@torch.no_grad()
def test_what_stands_behind_a_masked_word_is_heard_of_above_the_frozen_states_alone(bases):
    model = make(bases["llama"])
    (objective,) = model.extra
    ids = words(6, 4).ids
    batches = [
        pack([[Sequence(segments=(blanked((*ids[:5], last), 2), picture((2, 2), 0)))]]) for last in (ids[5], ids[5] + 1)
    ]
    frozen = [model(replace(b.words_alone(), text_ids=b.text_ids)).states["text"][0] for b in batches]
    torch.testing.assert_close(frozen[0][:5], frozen[1][:5], rtol=0, atol=1e-6)
    assert float((frozen[0][5] - frozen[1][5]).abs().max()) > 1e-2
    one, two = (objective.masked_logits(model, b) for b in batches)
    assert float((one - two).abs().max()) > 1e-3
    shown = pack([[Sequence(segments=(blanked(ids, 2), picture((2, 2), 9)))]])
    assert float((objective.masked_logits(model, shown) - one).abs().max()) > 1e-3  # another picture


@torch.no_grad()
def test_the_losses_are_those_of_their_equations(bases):
    model, said = make(bases["llama"], matching=0.5, share=0.3), words(6, 40)
    (objective,) = model.extra
    sequences = [pair(0, group=7), pair(1, group=7, grid=(2, 3)), pair(2, text=said), pair(3, text=said), pair(4)]
    batch = pack([sequences[:2], sequences[2:3], sequences[3:]])
    masked = objective.corrupt(batch, seeded(2))
    expected = {"masked_words": 0.0, "matching": 0.0}
    counts = dict.fromkeys(expected, 0)

    def encoder(text, shown):
        """The whole encoder in float64 on one pair, a row of words and a picture."""
        states = model(pack([[Sequence(segments=(text,))]])).states["text"][0].double()
        media = pack([[Sequence(segments=(shown,))]])
        rows = media.media["image"]
        v = model(media.media_alone()).states["media"][0].double()
        assert rows.boundary[0].tolist() == [True] + [False] * len(shown.tokens)
        own = objective.double()
        h = own.words_norm(own.words_in(states))[None]
        v = own.media_norm(own.media_in(v))[None]
        for layer in own.layers:
            a, b = layer.cross(h, v, v)[0], layer.cross(v, h, h)[0]
            h, v = layer.cross_norm(h + a), layer.cross_norm(v + b)
            for stream, kind in ((0, layer.words), (1, layer.media)):
                if kind is None:  # nothing is read of pictures behind the last layer
                    continue
                x = (h, v)[stream]
                x = kind.attention_norm(x + kind.attention(x, x, x)[0])
                x = kind.mlp_norm(x + kind.mlp(x))
                h, v = (x, v) if stream == 0 else (h, x)
        guessed, judged = own.guess(h[0]), own.judge(h[0, 0])
        objective.float()
        return model.backbone.logits(guessed.float()[None])[0].double(), judged

    hidden = {
        s: (masked.text_ids[r] == END_OF_MEDIA)[masked.text.sample[r] == n]
        for s, r, n in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 2, 0), (4, 2, 1))
    }
    wrong = [2, 2, 4, 4, 0]  # 0 and 1 are of one group, 2 and 3 have equal words
    for i, sequence in enumerate(sequences):
        text, shown = sequence.segments
        ids = tuple(END_OF_MEDIA if m else t for t, m in zip(text.ids, hidden[i].tolist(), strict=True))
        logits, _ = encoder(Text(ids=ids), shown)
        for place in hidden[i].nonzero()[:, 0].tolist():
            expected["masked_words"] -= float(logits[place].log_softmax(-1)[text.ids[place]])
            counts["masked_words"] += 1
        for other, truth in ((i, 1), (wrong[i], 0)):
            expected["matching"] -= float(encoder(sequences[other].segments[0], shown)[1].log_softmax(-1)[truth])
            counts["matching"] += 1
    found = objective.loss(model, masked)
    assert {name: int(count) for name, (_, count) in found.items()} == counts == objective.count(batch)
    assert objective.weights == {"masked_words": 1.0, "matching": 0.5}
    for name, value in expected.items():
        assert float(found[name][0]) == pytest.approx(value, rel=1e-5), name


@torch.no_grad()
def test_a_pair_is_judged_and_filled_by_nothing_else(bases):
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
    bare = pack([[pair(0)], [Sequence(segments=(picture((2, 2), 1),))]])
    with pytest.raises(
        XFusionError, match="masked words: a picture of the batch has no words: set .* caption_dropout to 0"
    ):
        objective.match_logits(model, bare, torch.arange(2), torch.arange(2))


def test_gradients_reach_all_that_is_new_and_nothing_else(bases):
    model = make(bases["llama"])
    batch = pack([[pair(i)] for i in range(4)])
    losses = model.losses(batch, seeded())
    sum(value for value, _ in losses.values()).backward()
    unused = {"port.norm.weight", "port.head.weight", "port.head.bias"}  # this port could draw
    for name, parameter in model.named_new_parameters().items():
        assert name in unused or float(parameter.grad.abs().max()) > 0, name
    assert float(model.port.end.grad.abs().max()) > 0  # [MASK]
    assert all(p.grad is None for p in model.backbone.model.parameters())


def test_sizes_that_cannot_be_are_refused():
    for wrong in ({"width": 30, "heads": 4}, {"depth": 0}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(XFusionError, match="masked words: width .* take positive sizes"):
            MaskedWords.Config(**wrong).build()


# ------------------------------------------------------------------------------------------------------------ recipe


def tiny(base):
    """The recipe's mechanism and objectives over pixels: no encoder is needed for six pictures."""
    recipe = find("lxmert")(width=64, picture_depth=1, pairs=6)
    templates = Templates(caption_dropout=0, article_share=0, other_wordings=0)
    stage = replace(twenty_steps(MixtureConfig(draw=6, caption=0, templates=templates), rate=2e-3), steps=80)
    image = replace(model_config(base).image, behind_begin=True)
    model = replace(recipe.model, backbone=BackboneConfig(source=base.source), image=image)
    return replace(recipe, data="noise", model=model, stages=(stage,))


def test_the_recipe_learns_to_use_the_picture(bases, tmp_path, monkeypatch):
    base, source = bases["llama"], Noise()
    model, losses = trained(tiny(base), base, tmp_path / "run")
    assert set(losses[0]) == {"masked_words", "matching"}
    assert model.capabilities == {"text", "fill", "match"} and model.fusion.preserves_text
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    found = evaluate(loaded, "masked_words", source=source, held=of_other_groups(source))
    names = [base.encode(e.captions[0]) for e in source.examples]
    assert found["settings"]["num_fit_tokens"] == sum(map(len, names))
    assert found["fit_nats"] < 0.6 * found["fit_nats_blind"]
    assert found["fit_at_1"] > found["fit_at_1_blind"] + 0.1
    assert (
        found["by_heart_fit_nats"] == 0 and found["by_heart_fit_at_1"] == 1
    )  # no two of these names differ in one token
    assert found["held_nats"] == found["fit_nats"]
    nats, first = [], []
    for i, ids in enumerate(names):
        for place, token in enumerate(ids):
            (scores,) = fill_tokens(loaded, media_segment(loaded, [source.picture(i, 16)]), [blanked(ids, place).ids])
            nats.append(-float(scores[0, token]))
            first.append(int(scores[0].argmax()) == token)
    assert found["fit_nats"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)
    assert found["fit_at_1"] == pytest.approx(sum(first) / len(first))
    pairs = evaluate(loaded, "retrieval", source=source)
    assert pairs["fit_match"] > 0.8 and pairs["fit_naming_at_1"] > 0.5
    monkeypatch.setattr("xfusion.evaluation.verify.NEW_TOKENS", 3)
    assert verify(loaded)["passed"]

    shown, texts = source.picture(0, 32), ["red apple", "tree"]
    match = loaded.match(shown, texts)
    assert match == model.eval().match(shown, texts) and all(0 <= p <= 1 for p in match)
    (one, two) = loaded.fill(shown, ["red ___", "___ on a ___"], most=3)
    assert [len(one), len(two)] == [1, 2] and [len(best) for best in two] == [3, 3]
    (scores,) = fill_tokens(loaded, media_segment(loaded, [shown]), [(*base.encode("red"), END_OF_MEDIA)])
    best = scores[0].topk(3)
    assert [p for _, p in one[0]] == pytest.approx(best.values.exp().tolist(), rel=1e-5)
    assert [w for w, _ in one[0]] == [base.decode([i]).strip() for i in best.indices.tolist()]


def test_a_pack_whose_boxes_entered_behind_the_picture_encoder_is_refused(bases, tmp_path):
    model = make(bases["llama"])
    (objective,) = model.extra
    objective.box_in, objective.box_norm = nn.Linear(4, SIZES["width"]), nn.LayerNorm(SIZES["width"])  # as they were
    model.save_pretrained(tmp_path / "old")
    with pytest.raises(
        XFusionError, match=r"does not fit the model: 4 unexpected \(first: extra.0.box_in.bias\); take"
    ):
        xfusion.load(tmp_path / "old", backbone=bases["llama"])


def test_what_is_known_by_heart():
    known = [(0, (-1, 2), 5), (1, (-1, 2), 5), (2, (-1, 2), 6), (3, (7, -1), 8), (4, (-1,), 1), (5, (-1,), 2)]
    found = by_heart(known, known)
    assert found["at_1"] == pytest.approx((1 + 1 + 0 + 1 + 0.5 + 0.5) / 6)
    assert found["nats"] == pytest.approx((2 * math.log(3 / 2) + math.log(3) + 0 + 2 * math.log(2)) / 6)
    assert by_heart(known[3:4], known) == {"nats": 0.0, "at_1": 1.0}


def test_what_cannot_be_filled_is_refused(bases):
    model, shown = make(bases["llama"]), Noise().picture(0, 16)
    with pytest.raises(XFusionError, match="'red apple' has no blank: write ___ where a word is to be found"):
        model.fill(shown, ["red apple"])
    with pytest.raises(XFusionError, match="fill takes a list of texts"):
        model.fill(shown, "red ___")
    with pytest.raises(XFusionError, match="this model cannot fill, only caption, draw, text: train one .* lxmert"):
        make_model(bases["llama"]).fill(shown, ["red ___"])
    unable = SimpleNamespace(capabilities={"text", "draw"})
    with pytest.raises(XFusionError, match="this suite scores masked words, but the model can only do: draw, text"):
        evaluate(unable, "masked_words", source=Noise())
