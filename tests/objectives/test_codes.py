"""Codes beside a frozen vocabulary: the joint softmax under segment masks, drawing one by one, infilling."""

from dataclasses import replace

import pytest
import torch
from contracts.table import SIDE, exact, model_config, randomise, share_left, trained, twenty_steps, words
from torch.nn.functional import avg_pool2d

from xfusion.backbone import Backbone
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import IGNORE, Media, Sequence, XFusionError
from xfusion.data.templates import with_begin
from xfusion.fusion.prefix import Prefix
from xfusion.generation import draw_tokens
from xfusion.modalities.base import Codec
from xfusion.modalities.codes import CodePort
from xfusion.modalities.image import ImageModality
from xfusion.model import Model
from xfusion.objectives.base import Output
from xfusion.objectives.codes import INFILL, MASK, NextCode, infill_order, reorder_for_infill
from xfusion.objectives.solvers import Heun
from xfusion.training.stages import Recipe

ENTRIES = 11


class Colours(Codec):
    """Two codes per 4 x 4 pixels: levels of red and of green."""

    channels, factor = 2, 4

    class Config(Codec.Config):
        def build(self):
            return Colours().freeze()

    def _encode(self, images):
        return ((avg_pool2d(images[:, :2], 4) + 1) / 2 * ENTRIES).floor().clamp(0, ENTRIES - 1)

    def _decode(self, latents):
        level = ((latents + 0.5) / ENTRIES * 2 - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return torch.cat([level, level[:, :1]], 1)


def make(base, *, dtype=None, randomised=True, tied=False, **settings):
    base = base if dtype is None else Backbone.load(base.source, dtype=dtype)
    objective = NextCode.Config(**settings)
    config = replace(
        model_config(base),
        image=ImageModality.Config(codec=Colours.Config(), patch=1, sizes=(SIDE,), order="causal"),
        port=CodePort.Config(largest_grid=6, entries=ENTRIES, tied=tied, sentinels=2 if objective.infill else 0),
        fusion=Prefix.Config(),
        media=objective,
    )
    model = Model(config, base)
    if randomised:
        randomise(model)
    return (model.double() if dtype == torch.float64 else model).eval()


def codes(grid, seed, *, loss=False, **how):
    tokens = torch.randint(ENTRIES, (grid[0] * grid[1], 2), generator=torch.Generator().manual_seed(seed)).float()
    how = {"state": "noised" if loss else "clean", "has_loss": loss, "bidirectional": False, **how}
    return Media(tokens=tokens, grid=grid, **how)


def batch_of(*sequences):
    return pack([[Sequence(segments=segments)] for segments in sequences])


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_loss_is_the_joint_softmax_under_segment_masks(bases, tied, monkeypatch):
    """``log softmax(h [O_text; O_codes])`` over the whole vocabulary, what does not belong to the segment at minus infinity."""
    with exact(monkeypatch):
        model = make(bases["llama"], dtype=torch.float64, tied=tied)
        drawn, shown = codes((2, 3), 1, loss=True), codes((2, 2), 2)
        batch = batch_of((words(4, 1), drawn), (shown, words(5, 2, loss=True)))
        hidden, run = model.run_pass(batch)
        text = hidden[:, run.slices["text"]] @ model.backbone.model.get_output_embeddings().weight.T
        table = model.port.table.weight if tied else model.port.head.weight
        own = model.port.norm(run.states["image"]) @ table.T + (0 if tied else model.port.head.bias)
        nothing = torch.tensor(float("-inf")).double()

        def picked(scores, lowest, highest, place):
            """Log-probability of a place of the joint vocabulary, of which the segment allows a stretch."""
            masked = nothing.expand(scores.shape).clone()
            masked[lowest:highest] = scores[lowest:highest]
            return float(masked.log_softmax(-1)[place])

        size = text.shape[-1]
        pictures = 0.0
        for i in range(6):  # the row of [BOI], then those of the codes; both codes of a token beside each other
            for slot in range(2):
                joint = torch.cat([torch.zeros(size).double(), own[0, i]])
                first = size + slot * ENTRIES
                pictures -= picked(joint, first, first + ENTRIES, first + int(drawn.tokens[i, slot]))
        answers = 0.0
        for i in range(5):  # [EOI], then the words
            joint = torch.cat([text[1, i], torch.zeros(2 * ENTRIES).double()])
            answers -= picked(joint, 0, size, words(5, 2).ids[i])
        found = model.losses(batch, torch.Generator())
        assert float(found["next_code"][0]) == pytest.approx(pictures, rel=1e-6) and int(found["next_code"][1]) == 12
        assert float(found["next_token"][0]) == pytest.approx(answers, rel=1e-6) and int(found["next_token"][1]) == 5
        assert model.media_objective.count(batch) == {"next_code": 12}


@torch.no_grad()
def test_a_token_enters_by_a_row_of_each_slots_own_table_at_its_row_and_column(bases):
    """DALL-E's axial positions; the two codes of a token are of two tables; sentinels have rows behind them and no place."""
    port = make(bases["llama"], infill=0.5).port
    batch = batch_of((words(2, 1), codes((2, 3), 1)), (codes((3, 1), 2),))
    media = batch.media["image"]
    tokens = media.tokens.clone()
    tokens[0, 2], tokens[0, 5] = MASK, INFILL
    found, table = port(replace(media, tokens=tokens)), port.table.weight
    assert len(table) == 2 * ENTRIES + 2
    for row, column in (media.rows.order >= 0).nonzero().tolist():
        first, second = (int(code) for code in tokens[row, column])
        if media.boundary[row, column]:
            expected = port.begin
        elif first < 0:
            expected = table[2 * ENTRIES - 1 - first]
        else:
            place = port.row.weight[media.grid_row[row, column]] + port.column.weight[media.grid_column[row, column]]
            expected = table[first] + table[ENTRIES + second] + place
        torch.testing.assert_close(found[row, column], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_fresh_head_knows_nothing(bases):
    model = make(bases["llama"], randomised=False)
    total, count = model.losses(batch_of((words(3, 1), codes((3, 3), 1, loss=True))), torch.Generator())["next_code"]
    assert float(total / count) == pytest.approx(torch.tensor(float(ENTRIES)).log().item(), rel=1e-5)


@torch.no_grad()
def test_a_code_hears_nothing_of_itself_and_of_those_behind_it(bases, monkeypatch):
    with exact(monkeypatch):
        model = make(bases["llama"], dtype=torch.float64)

        def scores(drawn):
            run = model.run_pass(batch_of((words(4, 1), drawn)))[1]
            return model.port.readout(run.states["image"])[0]

        drawn = codes((3, 3), 1, loss=True)
        before = scores(drawn)
        for place in range(9):
            tokens = drawn.tokens.clone()
            tokens[place] = (tokens[place] + 3) % ENTRIES
            change = (scores(replace(drawn, tokens=tokens)) - before).abs().amax(-1)
            assert float(change[: place + 1].max()) <= 1e-12 and float(change[place + 1 :].min()) > 1e-6


def test_codes_that_would_read_themselves_are_refused(bases):
    model = make(bases["llama"])
    with pytest.raises(XFusionError, match="see each other both ways .* set the image's order to 'causal'"):
        model.losses(batch_of((codes((2, 2), 1, loss=True, bidirectional=True),)), torch.Generator())


def test_what_does_not_fit_is_said(bases):
    model = make(bases["llama"])
    wrong = replace(codes((2, 2), 1), tokens=torch.full((4, 2), 11.0))
    with pytest.raises(XFusionError, match=r"knows codes 0 to 10, but these go from 0 to 11: set its entries"):
        model.run_pass(batch_of((wrong,)))
    with pytest.raises(XFusionError, match="no noise level"):
        CodePort.Config(time="modulate").build(8, 1, 0.1, 2)
    with pytest.raises(XFusionError, match="drawn one by one, not by heun: name no solver"):
        draw_tokens(make(bases["llama"]), [()], SIDE, seeds=[1], steps=1, guidance=1.0, solver=Heun())
    with pytest.raises(XFusionError, match="temperature -1 must be >= 0"):
        NextCode.Config(temperature=-1).build()


@torch.no_grad()
def test_noise_chooses_by_the_softmax_and_temperature_zero_takes_the_likeliest():
    scores = torch.randn(1, 2 * ENTRIES, generator=torch.Generator().manual_seed(0)) * 2
    noise = torch.randn(40_000, 2, generator=torch.Generator().manual_seed(1))
    for temperature in (1.0, 0.5):
        found = NextCode.Config(temperature=temperature).build().choose(scores.expand(40_000, -1), noise)
        for slot, expected in enumerate((scores.view(2, ENTRIES) / temperature).softmax(-1)):
            share = torch.bincount(found[:, slot], minlength=ENTRIES) / 40_000
            torch.testing.assert_close(share, expected, rtol=0, atol=0.01)
    likeliest = NextCode.Config(temperature=0.0).build().choose(scores, noise[:1])
    assert torch.equal(likeliest, scores.view(1, 2, ENTRIES).argmax(-1))


# --------------------------------------------------------------------------------------------------------- infilling


def test_runs_go_to_the_end():
    def order(kept):
        return infill_order(torch.tensor([c == "1" for c in kept]))

    assert order("111") == [0, 1, 2]
    assert order("100011") == [0, MASK, 4, 5, INFILL, 1, 2, 3]
    assert order("01101") == [MASK, 1, 2, MASK, 4, INFILL, 0, INFILL, 3]
    assert order("00") == [MASK, INFILL, 0, 1]


def test_infilling_moves_codes_with_their_places_and_predicts_each_once(bases):
    model = make(bases["llama"], infill=1.0, runs=2)
    drawn, other = codes((3, 4), 1, loss=True), codes((2, 2), 2, loss=True)
    whole = batch_of((words(3, 1), codes((1, 2), 5), drawn), (other, words(2, 2, loss=True)), (words(1, 1), other))
    objective, generator, seen = model.media_objective, torch.Generator().manual_seed(0), set()
    for _ in range(10):
        batch = objective.corrupt(whole, generator)
        media = batch.media["image"]
        assert objective.count(batch) == objective.count(whole) == {"next_code": 2 * 20}
        assert media.rows.count == whole.media["image"].rows.count + 4 and batch.text is whole.text
        mine = media.item[0] == 1
        places = [
            (r * 4 + c if k >= 0 else int(k))
            for r, c, k in zip(
                media.grid_row[0][mine], media.grid_column[0][mine], media.tokens[0, mine, 0], strict=True
            )
        ]
        seen.add(tuple(int(p) for p in places))
        kept = torch.zeros(12, dtype=torch.bool)
        kept[[int(p) for p in places[: places.index(INFILL)] if p >= 0]] = True
        assert [int(p) for p in places] == infill_order(kept)
        for row, place in zip(media.tokens[0][mine], places, strict=True):
            assert place < 0 or torch.equal(row, drawn.tokens[int(place)])
        # Read one after the other, behind what stood before; the rest of the batch is as it was.
        before = whole.media["image"]
        order, position = media.rows.order[0][mine], media.rows.position[0][mine]
        first = before.rows.order[0][before.item[0] == 1][0]
        assert torch.equal(order, first + torch.arange(len(order)))
        assert torch.equal(position, before.rows.position[0][before.item[0] == 1][0] + torch.arange(len(order)))
        assert torch.equal(media.tokens[1][media.item[1] == 2], other.tokens), "words stand behind it"
        labels = objective.labels(media)[0]
        behind = [int(p) for p in places[1:]] + [MASK]
        for column, place in zip(mine.nonzero()[:, 0].tolist(), behind, strict=True):
            expected = drawn.tokens[place].long() if place >= 0 else torch.full((2,), IGNORE)
            assert torch.equal(labels[column], expected)
    assert len(seen) > 5


@torch.no_grad()
def test_a_picture_is_completed_as_whole_passes_would(bases):
    """The cached walk against passes over what `corrupt` would lay out: same order, same places, same scores."""
    scale, seed = 2.0, 3
    model = make(bases["llama"], infill=0.5, runs=2)
    known, context = codes((4, 4), 7).tokens, (words(4, 1),)
    keep = torch.ones(1, 16, dtype=torch.bool)
    keep[0, [2, 3, 4, 9, 10]] = False
    told = []
    (found,) = draw_tokens(
        model,
        [context],
        SIDE,
        seeds=[seed],
        steps=1,
        guidance=scale,
        known=known[None],
        keep=keep,
        progress=lambda *a: told.append(a[:2]),
    )
    assert told == [(i, 16) for i in range(1, 17)] and torch.equal(found[keep[0]], known[keep[0]])
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(seed))
    places, expected = infill_order(keep[0]), known.clone()
    expected[~keep[0]] = 0
    for at, place in enumerate(places):
        if place < 0 or keep[0, place]:
            continue
        scores = []
        for before in (with_begin(model.backbone.begin_ids, context), ()):
            drawn = Media(tokens=expected, grid=(4, 4), state="noised", has_loss=True, bidirectional=False)
            batch = batch_of((*before, drawn))
            batch.media["image"] = reorder_for_infill(batch.media["image"], {0: keep[0]}, 4)
            states = model.run_pass(batch)[1].states["image"]
            scores.append(model.port.readout(states)[0, at])  # the row before: [BOI] stands first
        guided = scores[1] + scale * (scores[0] - scores[1])
        expected[place] = model.media_objective.choose(guided[None], noise[place : place + 1])[0].float()
    assert torch.equal(found, expected)
    # What stands behind a gap decides what is drawn into it, which reading order cannot hear.
    changed = known.clone()
    changed[11:] = (changed[11:] + 5) % ENTRIES
    drawing = {"seeds": [seed], "steps": 1, "guidance": 1.0, "keep": keep}
    one, two = (draw_tokens(model, [context], SIDE, known=k[None], **drawing)[0] for k in (known, changed))
    assert not torch.equal(one[2:5], two[2:5])
    plain = make(bases["llama"])
    one, two = (draw_tokens(plain, [context], SIDE, known=k[None], **drawing)[0] for k in (known, changed))
    assert torch.equal(one[:11], two[:11])
    both = keep.repeat(2, 1)
    both[1, 0] = False
    with pytest.raises(XFusionError, match="must keep the same places"):
        draw_tokens(
            model, [context] * 2, SIDE, seeds=[1, 2], steps=1, guidance=1.0, known=known.repeat(2, 1, 1), keep=both
        )


@pytest.mark.parametrize("infill", [0.0, 0.5])
def test_twenty_steps_lower_the_loss_and_leave_words_bit_equal(bases, infill, tmp_path):
    base = bases["llama"]
    stage = twenty_steps(MixtureConfig(draw=6, caption=4, pack=2))
    config = make(base, infill=infill, guidance=1.0).config
    model, losses = trained(Recipe(model=config, data="noise", stages=(stage,)), base, tmp_path / "run")
    assert share_left(losses, "next_code") < 0.8
    out = Output(logits=None, vocabulary=None, media={})
    assert model.media_objective.loss(lambda _: out, batch_of((words(3, 1),))) == {}


def test_losses_of_two_modalities_are_added():
    """As their counts are."""
    objective, batches = NextCode.Config().build(), []
    for seed, count in ((1, 4), (2, 6)):
        codes = torch.randint(ENTRIES, (count, 2), generator=torch.Generator().manual_seed(seed)).float()
        item = Media(tokens=codes, grid=(1, count), state="noised", has_loss=True, bidirectional=False)
        batches.append(pack([[Sequence(segments=(item,))]]))
    media = [batch.media["image"] for batch in batches]
    scores = [torch.randn(*m.item.shape, 2 * ENTRIES, generator=torch.Generator().manual_seed(3)) for m in media]

    def loss(batch, **predictions):
        output = Output(logits=lambda mask: mask, vocabulary=lambda states: states, media=predictions)
        return objective.loss(lambda view: output, batch)["next_code"]

    both = replace(batches[0], media=dict(zip(("image", "audio"), media, strict=True)))
    total, count = loss(both, image=scores[0], audio=scores[1])
    parts = [loss(batch, image=logits) for batch, logits in zip(batches, scores, strict=True)]
    assert float(total) == pytest.approx(sum(float(part) for part, _ in parts))
    assert int(count) == objective.count(both)["next_code"] == 20
