"""Contract of the port's settings: noise levels that modulate, and pictures at one position or in reading order."""

import json
from dataclasses import replace

import pytest
import torch
from contracts.table import (
    LAYERS,
    SIDE,
    TOKEN_WIDTH,
    WIDTH,
    Noise,
    corrupted,
    distance,
    exact,
    float64_base,
    look,
    mixed_sequences,
    model_config,
    randomise,
    view,
    words,
)
from contracts.test_paths import FLOAT64, incremental
from diffusers.models.embeddings import get_timestep_embedding

import xfusion
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text, XFusionError
from xfusion.data.templates import captioning, with_begin
from xfusion.fusion.connectors.linear import Linear
from xfusion.generation import draw_tokens
from xfusion.generation import words as generated_words
from xfusion.modalities.port import TIME_FREQUENCIES, MediaPort, sinusoids
from xfusion.model import Model
from xfusion.objectives.base import NoObjective
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.objectives.next_token import NextToken
from xfusion.training.loop import train
from xfusion.training.stages import Recipe, Stage

ALL = [[s] for s in mixed_sequences().values()]
MODULATED = ("dual tower", "dual tower, strided", "single tower", "gated tower", "dual projection", "x-fuse", "hybrid")


def make(base, fusion="dual tower", *, time="modulate", randomised=True, exactly=False, **image):
    base = float64_base(base) if exactly else base
    config = model_config(base, fusion)
    config = replace(config, port=replace(config.port, time=time), image=replace(config.image, **image))
    model = Model(replace(config, media=FlowMatching.Config(prediction="velocity")), base)
    if randomised:
        randomise(model)
    return (model.double() if exactly else model).eval()


def drawn_by_full_passes(model, context, seed, steps):
    """The same walk with a pass over [context | picture] each, by the reference path, without any cache."""
    noise = torch.randn(1, 16, TOKEN_WIDTH, generator=torch.Generator().manual_seed(seed))

    def predict(x, time):
        item = model.image.segment(x[0], (4, 4), state="noised")
        batch = pack([[Sequence(segments=(*with_begin(model.backbone.begin_ids, context), item))]])
        batch = batch.with_media("image", time=torch.full((1,), time))
        return model.port.readout(model.run_pass(batch)[1].states["image"])[:, -16:]

    with model.using(model.reference_engine()):
        *_, (x, _) = model.media_objective.sample(predict, noise, steps=steps)
    return x[0]


# --------------------------------------------------------------------------------------------------- noise levels


@torch.no_grad()
def test_noise_levels_are_embedded_by_diffusers_sinusoids_of_a_thousand_times_their_value():
    """Of base 10,000, sines before cosines."""
    time = torch.linspace(0, 1, 101)
    found = sinusoids(time)
    expected, unscaled = (
        get_timestep_embedding(scale * time, 2 * TIME_FREQUENCIES, downscale_freq_shift=0) for scale in (1000, 1)
    )
    assert found.shape == (101, 256)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((found - unscaled).abs().max()) > 0.5


@torch.no_grad()
def test_a_port_is_its_equation_row_by_row():
    """W x + b + row + column + MLP(sinusoids(t)), of a clean picture at t = 0; the trained row alone at [BOI]."""
    torch.manual_seed(0)
    port = MediaPort.Config(largest_grid=6).build(WIDTH, TOKEN_WIDTH, 0.1, LAYERS)
    for parameter in port.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    media = corrupted(pack(ALL)).media["image"]
    assert 0 in media.time and float(media.time.max()) > 0.2
    found, into, out = port(media), port.time[0], port.time[2]
    for b, i in (media.rows.order >= 0).nonzero().tolist():
        if media.boundary[b, i]:
            assert torch.equal(found[b, i], port.begin)
            continue
        time = 1000 * media.time[media.item[b, i]][None]
        level = into.weight @ get_timestep_embedding(time, 256, downscale_freq_shift=0)[0] + into.bias
        expected = port.project.weight @ media.tokens[b, i] + port.project.bias
        expected += port.row.weight[media.grid_row[b, i]] + port.column.weight[media.grid_column[b, i]]
        expected += out.weight @ (level * torch.sigmoid(level)) + out.bias
        torch.testing.assert_close(found[b, i], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_closed_modulation_is_a_pass_without_noise_levels(bases, monkeypatch):
    model = make(bases["llama"], randomised=False)
    batch = view(ALL, model)
    times = batch.with_media("image", time=torch.zeros_like(batch.media["image"].time))
    assert not torch.equal(times.media["image"].time, batch.media["image"].time)
    added = make(bases["llama"], time="add", randomised=False)
    added.port.head.weight.data.normal_()  # a head of zeros says nothing
    model.port.head.weight.data.copy_(added.port.head.weight)
    assert distance(look(model, batch), look(model, times)) == 0
    assert distance(look(model, batch), look(added, batch)) > 1e-3
    monkeypatch.setattr(MediaPort, "embed_time", lambda self, time: torch.zeros(len(time), WIDTH))
    assert distance(look(model, batch), look(added, batch)) == 0


@torch.no_grad()
def test_modulation_is_its_formula_at_tokens_and_leaves_the_beginning_alone(bases):
    model = make(bases["llama"])
    media = view([[mixed_sequences()["pictures between words"]], *ALL[:1]], model).media["image"]
    x = torch.randn(*media.item.shape, WIDTH, generator=torch.Generator().manual_seed(0))
    port, seen = model.port, []
    for index in range(LAYERS):
        found = port.before_layer(index, x, media)
        seen.append(found)
        for b in range(x.shape[0]):
            for i in range(x.shape[1]):
                item = int(media.item[b, i])
                if item < 0:  # [BOI] and padding
                    assert torch.equal(found[b, i], x[b, i])
                    continue
                t = port.embed_time(media.time[item : item + 1])[0]
                both = port.modulation(t * torch.sigmoid(t)) + port.by_layer[index]
                norm = x[b, i] / (x[b, i].square().mean() + torch.finfo(torch.float32).eps).sqrt()
                expected = x[b, i] + both[:WIDTH] * norm + both[WIDTH:]
                torch.testing.assert_close(found[b, i], expected, rtol=0, atol=1e-5)
    assert float((seen[0] - seen[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("fusion", MODULATED)
@torch.no_grad()
def test_modulated_paths_agree_whole_packed_and_in_pieces(bases, fusion, monkeypatch):
    with exact(monkeypatch):
        model = make(bases["llama"], fusion, exactly=True)
        alone = [look(model, view([s], model))[0] for s in ALL]
        with model.using(model.reference_engine()):
            assert distance(look(model, view(ALL, model)), alone) <= FLOAT64
        for (sequence,), expected in zip(ALL, alone, strict=True):
            said = incremental(model, view([[sequence]], model))
            for x, y in zip(said[0], expected, strict=True):
                assert x.shape == y.shape and (not len(x) or float((x - y).abs().max()) <= FLOAT64)


@torch.no_grad()
def test_text_is_bit_equal_and_constant_before_a_modulated_picture(bases):
    model = make(bases["llama"], "dual tower")
    randomise(model, by=1.0)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.text_logits(ids, stack="fused"), model.text_logits(ids))
    kept, batch = [], view([[mixed_sequences()["picture behind words"]]], model)
    for time in (1.0, 0.3):
        cache = model.backbone.new_cache(2, 1)
        model.run_pass(batch.with_media("image", time=torch.tensor([time])), cache=cache, update=True)
        kept.append((cache.rows.order[0], cache.slots))
    before = kept[0][0] <= 5  # five words and [BOI]
    changed = False
    for one, other in zip(kept[0][1], kept[1][1], strict=True):
        for layer in one:
            for a, b in zip(one[layer], other[layer], strict=True):
                assert torch.equal(a[:, :, before], b[:, :, before])
                changed |= not torch.equal(a[:, :, ~before], b[:, :, ~before])
    assert changed


@pytest.mark.parametrize(
    ("fusion", "time"),
    [
        ("dual tower, strided", "modulate"),
        ("dual projection", "modulate"),
        ("gated tower", "modulate"),
        ("x-fuse", "adaln"),
        ("dual projection", "adaln single"),
    ],
)
@torch.no_grad()
def test_a_modulated_picture_is_drawn_as_full_passes_would(bases, fusion, time):
    model = make(bases["llama"], fusion, time=time)
    contexts = [(words(5, 1),), ()]
    found = draw_tokens(model, contexts, SIDE, seeds=[3, 4], steps=3, guidance=1.0)
    for context, seed, tokens in zip(contexts, (3, 4), found, strict=True):
        torch.testing.assert_close(tokens, drawn_by_full_passes(model, context, seed, 3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fusion", ["dual tower", "dual tower, strided"])
def test_gradients_reach_the_modulation_of_every_layer_with_a_block(bases, fusion):
    model = make(bases["llama"], fusion)
    total, count = model.losses(pack(ALL), torch.Generator().manual_seed(0))["flow_matching"]
    (total / count).backward()
    reached = [i for i in range(LAYERS) if float(model.port.by_layer.grad[i].abs().max()) > 0]
    assert reached == list(model.fusion.state_layers)
    assert [n for n, p in model.port.named_parameters() if p.grad is None and n != "end"] == []
    assert float(model.port.time[0].weight.grad.abs().max()) > 0


# ------------------------------------------------------------------------------------------- positions and order


def test_a_picture_of_more_tokens_than_there_are_positions_is_refused_in_one_line(bases):
    config = model_config(bases["llama"])
    with pytest.raises(XFusionError, match="of 7 x 7 tokens, but the port has positions for 6 rows.*largest_grid"):
        Model(replace(config, image=replace(config.image, sizes=(16, 28))), bases["llama"])
    reads = replace(config.image, sizes=(28,))
    Model(replace(config, image=reads, port=Linear.Config(largest_grid=6), media=NoObjective.Config()), bases["llama"])


SETTINGS = {"position": "shared", "order": "causal"}


@pytest.mark.parametrize("fusion", ["dual tower", "cogvlm", "single tower"])
def test_pictures_at_one_position_in_reading_order_are_trained_drawn_and_captioned(bases, fusion, tmp_path):
    base, losses = bases["llama"], []
    model = make(base, fusion, time="add", **SETTINGS)
    trained = train(
        Recipe(
            model=model.config,
            data="noise",
            stages=(Stage(steps=5, warmup=1, mixture=MixtureConfig(draw=4, caption=4, pack=2)),),
        ),
        out=tmp_path / "run",
        source=Noise(),
        backbone=base,
        compile=False,
        dtype=torch.float32,
        preview_every=0,
        listener=lambda e: losses.append(e["losses"]) if e["event"] == "step" else None,
    )
    assert len(losses) == 5 and all(set(step) == {"next_token", "flow_matching"} for step in losses)
    config = json.loads((tmp_path / "run" / "pack" / "config.json").read_text())["model"]["image"]
    assert {key: config[key] for key in SETTINGS} == SETTINGS
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    pictures = trained.draw(["a red apple", "tree"], steps=2)
    assert [p.tobytes() for p in loaded.draw(["a red apple", "tree"], steps=2)] == [p.tobytes() for p in pictures]
    assert loaded.caption(pictures, max_tokens=3) == trained.caption(pictures, max_tokens=3)


@pytest.mark.parametrize("fusion", ["dual tower", "cogvlm", "x-fuse"])
@torch.no_grad()
def test_such_a_picture_is_drawn_as_full_passes_would_and_not_as_others_are(bases, fusion):
    model = make(bases["llama"], fusion, time="add", **SETTINGS)
    contexts = [(words(5, 1),), ()]
    found = draw_tokens(model, contexts, SIDE, seeds=[3, 4], steps=3, guidance=1.0)
    for context, seed, tokens in zip(contexts, (3, 4), found, strict=True):
        torch.testing.assert_close(tokens, drawn_by_full_passes(model, context, seed, 3), rtol=0, atol=1e-4)
    plain = make(bases["llama"], fusion, time="add")
    plain.load_state_dict(model.state_dict())
    assert float((draw_tokens(plain, contexts, SIDE, seeds=[3, 4], steps=3, guidance=1.0) - found).abs().max()) > 1e-2


@pytest.mark.parametrize("fusion", ["dual tower", "cogvlm"])
@torch.no_grad()
def test_what_is_answered_with_such_a_picture_in_a_cache_is_what_a_full_pass_says(bases, fusion, monkeypatch):
    model = make(bases["llama"], fusion, time="add", **SETTINGS)
    shown, chosen_from = Noise().picture(0, SIDE), []
    choose = NextToken.choose
    noted = staticmethod(lambda x, *how: chosen_from.append(x[0]) or choose(x, *how))
    monkeypatch.setattr(NextToken, "choose", noted)
    (answer,) = model.caption([shown], max_tokens=6)
    item, expected = model.image.segment(model.image.encode([shown], SIDE)[0], (4, 4)), []
    assert item.shared_position and not item.bidirectional
    ids: tuple[int, ...] = ()
    for _ in range(6):
        batch = pack([[Sequence(segments=(item, Text(ids=ids)))]])
        assert batch.media["image"].rows.position[0].tolist() == [0] + [1] * 16 and int(batch.text.position[0, 0]) == 2
        hidden, run = model.run_pass(batch)
        expected.append(model.backbone.logits(hidden[:, run.slices["text"]])[0, -1])
        token = int(expected[-1].argmax())
        if token in model.backbone.end_ids:
            break
        ids += (token,)
    assert answer == model.backbone.decode(list(ids)).strip()
    said = torch.stack(chosen_from)
    torch.testing.assert_close(said, torch.stack(expected), rtol=0, atol=1e-4)
    positions_by_index_in_cache(monkeypatch)
    chosen_from.clear()
    model.caption([shown], max_tokens=2)
    assert torch.equal(chosen_from[0], said[0]) and float((chosen_from[1] - said[1]).abs().max()) > 1e-2


def positions_by_index_in_cache(monkeypatch):
    """The trap: words behind a cached picture are counted from its last token, as if each had a position."""
    real = generated_words._continuation_batch
    monkeypatch.setattr(generated_words, "_continuation_batch", lambda ids, order, _: real(ids, order, order))


@pytest.mark.parametrize("fusion", ["dual tower", "cogvlm"])
@torch.no_grad()
def test_names_behind_such_a_picture_in_a_cache_score_as_in_a_full_pass(bases, fusion, monkeypatch):
    model, names = make(bases["llama"], fusion, time="add", **SETTINGS), ["a red apple", "tree", "two blue birds"]
    base, shown = model.backbone, [Noise().picture(i, SIDE) for i in range(2)]
    scores, expected = model.score_names(shown, names), torch.empty(2, 3)
    for i, tokens in enumerate(model.image.encode(shown, SIDE)):
        item = model.image.segment(tokens, (4, 4))
        for j, name in enumerate(names):
            batch = pack([[captioning(base.encode, base.end_id, item, name, begin=base.begin_ids)]])
            total, count = model.text_objective.loss(model, batch)["next_token"]
            assert int(count) == len(base.encode(name)) + 1 >= 2
            expected[i, j] = -total / count
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    positions_by_index_in_cache(monkeypatch)
    assert float((model.score_names(shown, names) - expected).abs().min()) > 1e-3
