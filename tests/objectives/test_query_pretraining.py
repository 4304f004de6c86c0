"""BLIP-2's first stage: each loss by its equation in float64, and that each is read under its own mask."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from contracts.table import TOKEN_WIDTH, VOCABULARY, WIDTH, in_float64, model_config, picture, randomise, words
from fusion.test_connectors import QFORMER, copied, perturbed
from torch.nn import functional
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text, XFusionError
from xfusion.fusion.connectors import query_transformer
from xfusion.fusion.connectors.query_transformer import Queries, attention_pattern
from xfusion.fusion.prefix import Prefix
from xfusion.model import Model
from xfusion.objectives import contrastive, query_pretraining
from xfusion.objectives.base import NoObjective
from xfusion.objectives.contrastive import symmetric_loss
from xfusion.objectives.next_token import NextToken
from xfusion.objectives.query_pretraining import QueryPretraining

BEGIN, END, QUERIES, HEADS, LENGTH = 0, 1, 3, 2, 5
PORT = Queries.Config(queries=QUERIES, query_width=16, heads=HEADS, depth=4, mlp=24, words=True)
OWN = QueryPretraining.Config(width=10, length=LENGTH)
LOSSES = ("contrastive", "matching", "generation")


def make():
    """A query transformer and the losses on it, in float64, with a word table and a head that differ."""
    torch.manual_seed(0)
    table = 0.3 * torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    head = 0.3 * torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    frozen = SimpleNamespace(
        embed=lambda ids: table[ids], logits=lambda states: states @ head.T, begin_ids=(BEGIN,), end_id=END
    )
    port, objective = PORT.build(WIDTH, TOKEN_WIDTH, 0.1, 4), OWN.build()
    objective.attach(port, lambda: frozen)
    objective.install(WIDTH, None)
    for part in (port, objective):
        part.double()
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    with torch.no_grad():
        objective.log_scale.fill_(math.log(7.0))
    return port, objective, table, head


def pair(ids, seed, *, grid=(2, 2), group=-1):
    return Sequence(segments=(Text(ids=(BEGIN, *ids)), replace(picture(grid, seed), group=group)))


SAME = words(4, 40).ids
PAIRS = [
    pair(words(3, 0).ids, 0, group=7),
    pair(words(5, 1).ids, 1, group=7, grid=(2, 3)),
    pair(SAME, 2),
    pair(SAME, 3, grid=(1, 3)),
    pair(words(8, 4).ids, 4, group=8),  # longer than is read
]
TWINS = {(0, 1), (1, 0), (2, 3), (3, 2)}
"""Pictures of one group, and texts that are equal."""


def batch_of(pairs):
    return in_float64(pack([[sequence] for sequence in pairs]))


# ------------------------------------------------------------------------------------------- the equations, pair by pair


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def perceptron(x, layers):
    return gelu(x @ layers[0].weight.T + layers[0].bias) @ layers[2].weight.T + layers[2].bias


def attend(layer, x, y, sees):
    if layer.in_proj_weight is None:
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    else:
        weights = layer.in_proj_weight.chunk(3)
    q, k, v = (z @ w.T + b for z, w, b in zip((x, y, y), weights, layer.in_proj_bias.chunk(3), strict=True))
    size, heads = q.shape[-1] // HEADS, []
    for i in range(HEADS):
        part = slice(i * size, (i + 1) * size)
        scores = (q[:, part] @ k[:, part].T / math.sqrt(size)).masked_fill(~sees, -math.inf)
        heads.append(scores.softmax(-1) @ v[:, part])
    return torch.cat(heads, -1) @ layer.out_proj.weight.T + layer.out_proj.bias


def transformed(port, tokens, text, sees):
    """Queries and text of one pair, by section 3.1; `sees` says for (position, position) who attends to whom."""
    own, total = port.transformer, QUERIES + len(text)
    sees = torch.tensor([[sees(i, j) for j in range(total)] for i in range(total)])
    x = norm(torch.cat([own.queries, text]), own.norm)
    for index, block in enumerate(own.blocks):
        x = norm(x + attend(block.attention, x, x, sees), block.norm)
        q, w = x[:QUERIES], x[QUERIES:]
        if index % 2 == 0:
            everything = torch.ones(QUERIES, len(tokens), dtype=torch.bool)
            q = norm(q + attend(block.cross, q, tokens, everything), block.cross_norm)
        q = norm(q + perceptron(q, block.query_mlp), block.query_norm)
        x = torch.cat([q, norm(w + perceptron(w, block.word_mlp), block.word_norm)])
    return x[:QUERIES], x[QUERIES:]


def expected(port, objective, table, head):
    """The three losses, summed."""

    def behind(row, ids):
        rows = [row, *(objective.words_in.weight @ table[i] + objective.words_in.bias for i in ids)]
        return torch.stack([x + objective.places.weight[place] for place, x in enumerate(rows)])

    ids = [sequence.segments[0].ids[1:] for sequence in PAIRS]
    read = [i[:LENGTH] for i in ids]
    tokens = [sequence.segments[1].tokens.double() for sequence in PAIRS]

    def is_word(i):
        return i >= QUERIES

    u, v = [], []
    for i in range(5):
        q, w = transformed(port, tokens[i], behind(objective.summary, read[i]), lambda a, b: is_word(a) == is_word(b))
        u.append(torch.nn.functional.normalize(objective.words.weight @ w[0], dim=0))
        v.append([torch.nn.functional.normalize(objective.media.weight @ x, dim=0) for x in q])
    s = [[max(float(u[t] @ x) for x in v[p]) for p in range(5)] for t in range(5)]
    contrastive = 0.0
    for i in range(5):
        for row in ([s[i][j] for j in range(5)], [s[j][i] for j in range(5)]):
            terms = [math.exp(7.0 * row[j]) for j in range(5) if (i, j) not in TWINS]
            contrastive -= 0.5 * math.log(math.exp(7.0 * row[i]) / sum(terms))

    judged = [(i, i, 1) for i in range(5)]
    for i in range(5):
        allowed = [j for j in range(5) if j != i and (i, j) not in TWINS]
        judged.append((i, max(allowed, key=lambda t, i=i: s[t][i]), 0))
        judged.append((max(allowed, key=lambda p, i=i: s[i][p]), i, 0))
    matching = 0.0
    for p, t, truth in judged:
        q, _ = transformed(port, tokens[p], behind(objective.summary, read[t]), lambda a, b: True)
        logits = torch.stack([objective.judge.weight @ x + objective.judge.bias for x in q]).mean(0)
        matching -= float(logits.log_softmax(0)[truth])

    generation, number = 0.0, 0
    for i in range(5):
        _, w = transformed(
            port,
            tokens[i],
            behind(objective.start, read[i]),
            lambda a, b: not is_word(b) or (is_word(a) and b <= a),
        )
        targets = [*ids[i], END][: 1 + LENGTH] if len(ids[i]) <= LENGTH else read[i]
        for state, target in zip(w, targets, strict=False):
            hidden = norm(gelu(objective.guess[0].weight @ state + objective.guess[0].bias), objective.guess[2])
            generation -= float((head @ hidden).log_softmax(0)[target])
            number += 1
    return {"contrastive": (contrastive, 5), "matching": (matching, 15), "generation": (generation, number)}


@torch.no_grad()
def test_the_three_losses_are_their_equations_in_float64():
    made = make()
    _, objective, *_ = made
    batch, by_hand = batch_of(PAIRS), expected(*made)
    for train in (True, False):  # attention has a kernel of its own for each
        made[0].train(train)
        found = objective.loss(None, batch)  # nothing is run: the frozen layers take no part
        assert tuple(found) == LOSSES == tuple(objective.weights)
        for name, (total, number) in by_hand.items():
            assert float(found[name][0]) == pytest.approx(total, rel=1e-9), name
            assert int(found[name][1]) == number
    assert {name: number for name, (_, number) in by_hand.items()} == objective.count(batch)
    assert by_hand["generation"][1] == (3 + 1) + (5 + 1) + 2 * (4 + 1) + 5


class Shown(torch.nn.Module):
    """In place of a vision model: pictures are features already."""

    def forward(self, pixel_values, **_):
        return (pixel_values,)


@torch.no_grad()
def test_scores_and_verdicts_are_those_of_transformers_retrieval_class(monkeypatch):
    """`Blip2ForImageTextRetrieval` on the same weights: the largest cosine over queries, and two-class logits averaged over them.

    Its projections to the joint space have biases, ours have none: they are zero here. It reads no scale and takes no negatives,
    so ours is 1 and the pairs that we judge are given to it.
    """
    torch.manual_seed(0)
    vision = {"hidden_size": TOKEN_WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    own_words = {"use_qformer_text_input": True, "vocab_size": VOCABULARY, "max_position_embeddings": 1 + LENGTH}
    theirs = perturbed(
        Blip2ForImageTextRetrieval(
            Blip2Config(
                vision_config={**vision, "image_size": 16, "patch_size": 4},
                qformer_config={**QFORMER, **own_words, "encoder_hidden_size": TOKEN_WIDTH},
                num_query_tokens=QUERIES,
                image_text_hidden_size=OWN.width,
            )
        )
    )
    theirs.vision_model = Shown()
    table, summary = theirs.embeddings.word_embeddings.weight, 2
    port, objective = PORT.build(WIDTH, TOKEN_WIDTH, 0.1, 4), OWN.build()
    frozen = SimpleNamespace(
        embed=lambda ids: functional.pad(table[ids], (0, WIDTH - table.shape[1])),
        logits=lambda states: states.new_zeros(*states.shape[:-1], VOCABULARY),
        begin_ids=(BEGIN,),
        end_id=END,
    )
    objective.attach(port, lambda: frozen)
    objective.install(WIDTH, None)
    copied(port.transformer, theirs.qformer).queries.copy_(theirs.query_tokens[0])
    objective.words_in.weight.copy_(torch.eye(table.shape[1], WIDTH))
    objective.words_in.bias.zero_()
    objective.places.weight.copy_(theirs.embeddings.position_embeddings.weight)
    objective.summary.copy_(table[summary])
    for ours, projection in ((objective.words, theirs.text_projection), (objective.media, theirs.vision_projection)):
        ours.weight.copy_(projection.weight)
        projection.bias.zero_()
    objective.judge.load_state_dict(theirs.itm_head.state_dict())
    objective.log_scale.zero_()

    texts = [words(length, seed).ids for seed, length in enumerate((3, 5, 4, 2))]
    pairs = [pair(ids, seed) for seed, ids in enumerate(texts)]
    found, cross_entropy = {}, functional.cross_entropy

    def recorded(text_scores, *others):
        found["scores"] = text_scores
        return symmetric_loss(text_scores, *others)

    def judged(logits, *others, **settings):
        if logits.shape[-1] == 2:
            found["verdicts"] = logits
        return cross_entropy(logits, *others, **settings)

    monkeypatch.setattr(query_pretraining, "symmetric_loss", recorded)
    monkeypatch.setattr(functional, "cross_entropy", judged)
    objective.loss(None, pack([[sequence] for sequence in pairs]))

    features = torch.stack([sequence.segments[1].tokens for sequence in pairs])
    ids = torch.tensor([[summary, *ids, *[0] * (LENGTH - len(ids))] for ids in texts])
    said = torch.tensor([[1] * (1 + len(ids)) + [0] * (LENGTH - len(ids)) for ids in texts])
    scores = theirs(features, ids, said).logits_per_image  # of each picture to each text
    torch.testing.assert_close(found["scores"], scores.T, rtol=0, atol=1e-5)
    others = scores.masked_fill(torch.eye(4, dtype=torch.bool), -2.0)
    pictures = torch.cat([torch.arange(4), torch.arange(4), others.argmax(0)])
    judged_texts = torch.cat([torch.arange(4), others.argmax(1), torch.arange(4)])
    verdicts = theirs(features[pictures], ids[judged_texts], said[judged_texts], use_image_text_matching_head=True)
    torch.testing.assert_close(found["verdicts"], verdicts.logits_per_image, rtol=0, atol=1e-5)
    assert float(scores.std()) > 0.1 and float(verdicts.logits_per_image.std()) > 0.1


def test_the_scale_begins_at_clips():
    """ln(1 / 0.07), as in the recipe `clip`."""
    objective = OWN.build()
    objective.attach(PORT.build(WIDTH, TOKEN_WIDTH, 0.1, 4), lambda: None)
    objective.install(WIDTH, None)
    assert float(objective.log_scale.detach()) == pytest.approx(2.6592600, abs=1e-6)


def trapped(monkeypatch, pattern, wrong):
    """Everyone who asks for one mask gets another."""
    own = attention_pattern
    monkeypatch.setattr(
        query_transformer,
        "attention_pattern",
        lambda asked, k, n: wrong(k, n) if asked == pattern else own(asked, k, n),
    )


def queries_hear_words(k, n):
    """Causal for words, but the queries are not kept from them."""
    seen = attention_pattern("causal", k, n)
    seen[:k] = True
    return seen


TRAPS = {
    "contrastive": ("apart", lambda k, n: attention_pattern("together", k, n)),
    "matching": ("together", lambda k, n: attention_pattern("apart", k, n)),
    "generation": ("causal", lambda k, n: attention_pattern("together", k, n)),
    "generation, queries that hear words": ("causal", queries_hear_words),
}


@pytest.mark.parametrize("trap", TRAPS)
@torch.no_grad()
def test_each_loss_has_its_own_mask(monkeypatch, trap):
    _, objective, *_ = make()
    batch = batch_of(PAIRS)
    right = {name: float(total) for name, (total, _) in objective.loss(None, batch).items()}
    trapped(monkeypatch, *TRAPS[trap])
    wrong = {name: float(total) for name, (total, _) in objective.loss(None, batch).items()}
    name = trap.split(",")[0]
    assert abs(wrong[name] - right[name]) > 1e-3
    # Only the hard negatives hang on the contrastive mask too.
    unmoved = set(LOSSES) - {name} - ({"matching"} if name == "contrastive" else set())
    assert all(wrong[other] == right[other] for other in unmoved)


def heard(port, objective, monkeypatch):
    """For each mask: which queries and which rows of the text move with the third token of a text, and which rows of the text
    move with the picture.
    """
    ids = list(PAIRS[0].segments[0].ids[1:])
    changed = [*ids[:2], ids[2] + 1]
    states, read = {}, port.read
    for case, said, seed in (("own", ids, 0), ("word", changed, 0), ("picture", ids, 90)):

        def recorded(features, present, text, mask, pattern, case=case):
            found = read(features, present, text, mask, pattern)
            states[case, pattern] = found
            return found

        monkeypatch.setattr(port, "read", recorded)
        objective.loss(None, batch_of([pair(said, seed)]))

    def moved(case, pattern, part):
        return ((states[case, pattern][part] - states["own", pattern][part])[0].abs().amax(-1) > 1e-9).tolist()

    return {
        pattern: (moved("word", pattern, 0), moved("word", pattern, 1), moved("picture", pattern, 1))
        for pattern in ("apart", "causal", "together")
    }


NONE, ALL = [False] * QUERIES, [True] * QUERIES
HEARD = {
    "apart": (NONE, [True] * 4, [False] * 4),  # no query hears a word, no word hears the picture
    "causal": (
        NONE,
        [False, False, False, True],
        [True] * 4,
    ),  # [DEC] and three tokens; only the changed one is behind itself
    "together": (ALL, [True] * 4, [True] * 4),
}


@torch.no_grad()
def test_who_hears_whom(monkeypatch):
    port, objective, *_ = make()
    with monkeypatch.context() as patch:
        assert heard(port, objective, patch) == HEARD


@pytest.mark.parametrize("trap", TRAPS)
@torch.no_grad()
def test_a_leak_would_be_heard(monkeypatch, trap):
    """The test above fails on a transformer with a wrong mask, and on that mask alone."""
    port, objective, *_ = make()
    trapped(monkeypatch, *TRAPS[trap])
    found = heard(port, objective, monkeypatch)
    assert {pattern for pattern in HEARD if found[pattern] != HEARD[pattern]} == {TRAPS[trap][0]}


def test_gradients_reach_the_query_transformer_and_not_the_way_into_the_language_model():
    port, objective, *_ = make()
    sum(total for total, _ in objective.loss(None, batch_of(PAIRS)).values()).backward()
    still = {
        name
        for part in (port, objective)
        for name, parameter in part.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().any())
    }
    assert still == {"begin", "end", "project.weight", "project.bias"}


# -------------------------------------------------------------------------------------------------------- in a model


def in_model(base, **settings):
    config = replace(
        model_config(base, "prefix"),
        port=PORT,
        fusion=Prefix.Config(),
        text=NextToken.Config(weight=1.0),
        media=NoObjective.Config(),
        extra=(replace(OWN, **settings),),
    )
    model = Model(config, base)
    randomise(model, by=0.1)
    return model.eval()


@torch.no_grad()
def test_pairs_alone_are_learned_from(bases):
    model = in_model(bases["llama"])
    (objective,) = model.extra
    batch = pack([[sequence] for sequence in PAIRS])
    found = model.losses(batch, torch.Generator())
    assert {name: int(number) for name, (_, number) in found.items()} == objective.count(batch)
    assert not model.needs and model.capabilities == {"text", "caption"}
    caption = pack([[Sequence(segments=(picture((1, 3), 1), words(4, 1, loss=True)))]])
    assert objective.count(caption) == {} and set(model.losses(caption, torch.Generator())) == {"next_token"}
    # A packed row, whose texts have one sample each, says the same.
    packed = objective.loss(None, pack([PAIRS[:2], PAIRS[2:]]))
    for name, (total, number) in found.items():
        torch.testing.assert_close(packed[name][0], total, rtol=1e-5, atol=0)
        assert int(packed[name][1]) == int(number)


@torch.no_grad()
def test_words_are_the_frozen_bases_own(bases, monkeypatch):
    """Its embeddings lead in and its head leads out: other ones give another loss."""
    model = in_model(bases["llama"])
    (objective,) = model.extra
    batch = pack([[sequence] for sequence in PAIRS])
    plain = objective.loss(None, batch)
    base = model.backbone
    for verb, changed in (("embed", LOSSES), ("logits", ("generation",))):
        with monkeypatch.context() as patch:
            own = getattr(base, verb)
            patch.setattr(base, verb, lambda x, own=own: 1.5 * own(x))
            found = objective.loss(None, batch)
        assert {name for name in LOSSES if not torch.equal(found[name][0], plain[name][0])} == set(changed)


@torch.no_grad()
def test_under_autocast_the_losses_are_float32_and_near(bases):
    model = in_model(bases["llama"])
    (objective,) = model.extra
    batch = pack([[sequence] for sequence in PAIRS])
    exact = objective.loss(None, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.loss(None, batch)
    for name, (total, number) in exact.items():
        assert found[name][0].dtype == torch.float32
        assert float(found[name][0] / number) == pytest.approx(float(total / number), abs=0.05)


def test_what_cannot_be_trained_is_refused(bases):
    base = bases["llama"]
    model = in_model(base)
    (objective,) = model.extra
    for segments in ((picture((2, 2), 1),), (Text(ids=(BEGIN,)), picture((2, 2), 1))):
        batch = pack([[PAIRS[0]], [Sequence(segments=segments)]])
        for ask in (objective.count, lambda b: objective.loss(None, b)):
            with pytest.raises(XFusionError, match="a picture of the batch has no words: .* caption_dropout to 0"):
                ask(batch)
    with pytest.raises(XFusionError, match="the port Queries reads no words beside queries: .* with words True"):
        Model(replace(model.config, port=replace(PORT, words=False)), base)
    with pytest.raises(XFusionError, match="the port MediaPort reads no words"):
        Model(replace(model_config(base, "prefix"), extra=(OWN,)), base)
    with pytest.raises(XFusionError, match="width 10, length 0: give at least 1"):
        in_model(base, length=0)


@torch.no_grad()
def test_texts_are_told_apart_once(monkeypatch):
    hashed = []
    monkeypatch.setattr(contrastive, "hash", lambda ids: hashed.append(ids) or hash(ids), raising=False)
    _, objective, _, _ = make()
    objective.loss(None, batch_of(PAIRS))
    assert len(hashed) == len(PAIRS)
