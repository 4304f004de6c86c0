"""Contract: however a sequence is computed - fast or whole, packed or alone, in pieces or at once - it says the same."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from contracts.table import (
    LAYERS,
    ROWS,
    TOKEN_WIDTH,
    TOWERS,
    VOCABULARY,
    WINDOW,
    distance,
    exact,
    float64_model,
    look,
    make_model,
    mixed_sequences,
    on_every_family,
    picture,
    rows,
    view,
    words,
)

from xfusion.data.pack import pack
from xfusion.data.sequence import Batch, MediaRows, Rows, Sequence, XFusionError

FLOAT32, FLOAT64 = 2e-5, 1e-9
"""Largest differences: logits of these models lie within 6, predictions within 4."""
SEQUENCES = mixed_sequences()
MIXED = (
    "words around picture",
    "pictures between words",
    "picture beside picture",
    "noised copy beside clean one",
)
"""The sequences of which the others are parts."""


def packings():
    """The same sequences alone, several to a row, and in another order."""
    q = list(SEQUENCES.values())
    return {
        "one to a row": ([[s] for s in q], list(range(len(q)))),
        "packed": ([q[:3], q[3:6], q[6:]], list(range(len(q)))),
        "all in one row": ([q], list(range(len(q)))),
        "beside empty rows": ([q[:5], [], q[5:], []], list(range(len(q)))),
        "reversed": ([q[::-1][:5], q[::-1][5:]], list(range(len(q)))[::-1]),
    }


def losses(model, batch):
    """Both losses of a corrupted batch by one forward pass."""
    out = model(batch)
    found = [o.loss(lambda _: out, batch) for o in model.objectives]
    return {name: value / count for part in found for name, (value, count) in part.items()}


def compare_paths(model, tolerance):
    """Fast and reference path of every packing; what the fast one says of each."""
    found = {}
    for name, (packed, _) in packings().items():
        batch = view(packed, model)
        found[name], fast_losses = look(model, batch), losses(model, batch)
        with model.using(model.reference_engine()):
            whole, whole_losses = look(model, batch), losses(model, batch)
        assert distance(found[name], whole) <= tolerance, name
        assert fast_losses.keys() == whole_losses.keys() == {"next_token", "flow_matching"}
        for key, value in fast_losses.items():
            assert abs(float(value - whole_losses[key])) <= max(tolerance, 1e-6) * max(1, float(value)), (name, key)
    return found


@pytest.mark.full
@pytest.mark.parametrize(("fusion", "family"), ROWS)
@torch.no_grad()
def test_fast_path_is_the_reference_path_in_float32(bases, fusion, family):
    model = make_model(bases[family], fusion)
    compare_paths(model, FLOAT32)


@pytest.mark.parametrize(("fusion", "family"), on_every_family(ROWS))
@torch.no_grad()
def test_paths_and_packings_agree_in_float64(bases, fusion, family, monkeypatch):
    """The fast path is the reference path, packed is unpacked, and a batch is its singles."""
    calls = []
    with exact(monkeypatch):
        model = float64_model(bases[family], fusion)
        kind, reference = type(model.fusion), type(model.fusion).reference_layer
        monkeypatch.setattr(kind, "reference_layer", lambda *a: calls.append(a[1]) or reference(*a))
        found = compare_paths(model, FLOAT64)
        alone = [look(model, view([[s]], model))[0] for s in SEQUENCES.values()]
        for name, (_, order) in packings().items():
            assert distance(found[name], [alone[i] for i in order]) <= FLOAT64, name
    assert set(calls) == set(range(LAYERS))  # otherwise the fast path was compared with itself


@pytest.mark.parametrize(("fusion", "family"), ROWS)
def test_gradients_of_fast_and_reference_path_agree(bases, fusion, family, monkeypatch):
    with exact(monkeypatch):
        model = float64_model(bases[family], fusion)
        batch, grads = view(packings()["beside empty rows"][0], model), []
        for engine in (model.engine, model.reference_engine()):
            model.zero_grad()
            with model.using(engine):
                sum(losses(model, batch).values()).backward()
            grads.append([p.grad.clone() for p in model.new_parameters()])
        # Losses are taken in float32, which is where the difference comes from.
        assert max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True)) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize(("fusion", "family"), TOWERS)
@torch.no_grad()
def test_packed_is_unpacked_in_float32(bases, fusion, family):
    model = make_model(bases[family], fusion)
    alone = [look(model, view([[s]], model))[0] for s in SEQUENCES.values()]
    for name, (packed, order) in packings().items():
        assert distance(look(model, view(packed, model)), [alone[i] for i in order]) <= FLOAT32, name


@torch.no_grad()
def test_padding_says_nothing(bases):
    model = make_model(bases["gemma3"])
    packed = packings()["packed"][0]
    tight, wide = pack(packed), pack(packed, text_width=pack(packed).text.count + 9)
    assert wide.text.count == tight.text.count + 9
    assert distance(look(model, tight), look(model, wide)) <= FLOAT32


@pytest.mark.parametrize(("fusion", "family"), ROWS)
@torch.no_grad()
def test_the_training_engine_agrees_with_the_reference_path(bases, fusion, family):
    """Another attention implementation over a copy of the frozen weights, in float32."""
    model = make_model(bases[family], fusion)
    fresh = getattr(model.config.fusion, "width", None) is not None
    # Fresh blocks begin as the toy GPT-2 did, with matrices 15 times as large as that family's: they round by more.
    tolerance = 2 * FLOAT32 if fresh and family == "gpt2" else FLOAT32
    for _, (packed, _) in packings().items():
        batch = view(packed, model)
        with model.using(model.reference_engine()):
            whole = look(model, batch)
        with model.using(model.training_engine(torch.float32, "as asked", "grouped", False)):
            # Gemma 2 caps its scores, which its own products alone know.
            assert model.engine.backbone.attention == ("eager" if family == "gemma2" else "grouped")
            assert distance(look(model, batch), whole) <= tolerance
        assert distance(look(model, batch), whole) <= tolerance  # and the model is itself again


@pytest.mark.full
@pytest.mark.parametrize(
    ("fusion", "family"),
    [
        ("dual tower, strided", "llama"),
        ("dual tower", "gemma3"),
        ("narrow tower", "llama"),
        ("dual tower, adaln", "llama"),
        ("bagel, adaln", "llama"),
    ],
)
def test_compiled_layers_agree_with_the_reference_path(bases, fusion, family):
    """Losses and gradients; the same graphs serve all layers of a tower."""
    model = make_model(bases[family], fusion)
    batch, grads = view(packings()["packed"][0], model), []
    for engine in (model.training_engine(torch.float32, "as asked", "grouped", True), model.reference_engine()):
        model.zero_grad()
        with model.using(engine):
            found = losses(model, batch)
            sum(found.values()).backward()
        grads.append([p.grad.clone() for p in model.new_parameters()])
    assert max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True)) < 1e-3


# ------------------------------------------------------------------------------------------------- given text states


@pytest.mark.parametrize(("fusion", "family"), rows(prefix_is_constant=True))
@torch.no_grad()
def test_looked_up_text_states_give_the_same_drawing(bases, fusion, family):
    model = make_model(bases[family], fusion)
    drawings = [
        Sequence(segments=(words(n, n), picture((3, 3), n, noised=True, loss=True)))
        if n
        else SEQUENCES["picture alone"]
        for n in (5, 0, 2, 9)
    ]
    for packed in ([[s] for s in drawings], [drawings[:2], drawings[2:]]):
        batch = view(packed, model)
        assert not batch.text_reads_media
        real = batch.media["image"].rows.order >= 0
        whole = model.port.readout(model.run_pass(batch)[1].states["image"])
        for given in (model.cached_text_states(batch), model.cached_text_states(batch)):  # computed, then looked up
            found = model.port.readout(model.run_pass(batch, cached_text=given)[1].states["image"])
            torch.testing.assert_close(found[real], whole[real], rtol=0, atol=FLOAT32)
    assert len(model.engine.text_states) == 3


@torch.no_grad()
def test_looked_up_text_is_never_appended_to_a_cache(bases):
    model = make_model(bases["llama"])
    batch = view([[SEQUENCES["picture behind words"]]], model)
    cache, given = model.backbone.new_cache(model.fusion.num_towers, 1), model.cached_text_states(batch)
    with pytest.raises(XFusionError, match="cached_text with update: looked-up text has no keys and values to append"):
        model.run_pass(batch, cache=cache, update=True, cached_text=given)


@torch.no_grad()
def test_a_training_pass_uses_looked_up_states_only_where_no_word_follows_a_picture(bases, monkeypatch):
    model, asked = make_model(bases["llama"]), []
    real = type(model).text_states
    monkeypatch.setattr(type(model), "text_states", lambda self, ids: asked.append(ids) or real(self, ids))
    model(view([[SEQUENCES["words around picture"]]], model))
    assert asked == []
    sequence = SEQUENCES["picture behind words"]
    model(view([[sequence]], model))
    assert asked == [sequence.segments[0].ids]


@torch.no_grad()
def test_the_loss_of_words_without_a_picture_is_the_bases(bases):
    model = make_model(bases["llama"])
    batch = view([[SEQUENCES["words alone"]]], model)
    ids = [i for s in SEQUENCES["words alone"].segments for i in s.ids]
    logits = model.backbone.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = -sum(float(logits[at - 1, ids[at]]) for at in range(4, len(ids))) / (len(ids) - 4)
    assert float(losses(model, batch)["next_token"]) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_text_states_are_forgotten_oldest_first(bases, monkeypatch):
    model = make_model(bases["llama"])
    token = model.text_bytes(1, torch.float32)
    assert model.text_states((5,)).nbytes == token
    monkeypatch.setattr("xfusion.text_states.TEXT_STATES_BYTES", 3 * token)
    for ids in ((6, 7), (5,), (8,)):
        model.text_states(ids)
    assert list(model.engine.text_states) == [(6, 7), (8,)] and model.engine.text_states.num_bytes == 3 * token
    model.text_states((9, 10, 11, 12))  # more than there is room for stays alone
    assert list(model.engine.text_states) == [(9, 10, 11, 12)]


# ------------------------------------------------------------------------------------------------------------ caches


def piece(batch: Batch, low: int, high: int) -> Batch:
    """Positions ``low <= order < high`` of a batch of one row."""

    def cut(table: Rows):
        where = ((table.order[0] >= low) & (table.order[0] < high)).nonzero()[:, 0]
        names = table.__dataclass_fields__
        return where, Rows(**{n: getattr(table, n)[:, where] for n in names})

    where, text = cut(batch.text)
    media: dict[str, MediaRows] = {}
    for name, m in batch.media.items():
        columns, rows = cut(m.rows)
        if len(columns):
            names = ("tokens", "item", "boundary", "grid_row", "grid_column")
            media[name] = replace(m, rows=rows, **{n: getattr(m, n)[:, columns] for n in names})
    return replace(batch, text=text, text_ids=batch.text_ids[:, where], labels=batch.labels[:, where], media=media)


def pieces(batch: Batch) -> list[tuple[int, int]]:
    """Words one by one; [BOI]; each picture whole, since its tokens see each other."""
    owners = [(int(o), None) for o in batch.text.order[0] if o >= 0]
    media = batch.media["image"] if batch.media else None
    if media is not None:
        owners += [(int(o), int(i)) for o, i in zip(media.rows.order[0], media.item[0], strict=True) if o >= 0]
    owners.sort()
    cuts = [0]
    for (_, one), (at, other) in pairwise(owners):
        if one is None or one < 0 or one != other:
            cuts.append(at)
    return list(zip(cuts, [*cuts[1:], len(owners)], strict=True))


def incremental(model, batch):
    cache = model.backbone.new_cache(model.fusion.num_towers, 1)
    logits, media = [], []
    for low, high in pieces(batch):
        hidden, run = model.run_pass(piece(batch, low, high), cache=cache, update=True)
        if "text" in run.slices:
            logits.append(model.backbone.logits(hidden[:, run.slices["text"]])[0])
        if run.media:
            media.append(model.port.readout(run.states["image"])[0])
    assert cache.rows.count == len(batch.text.order[0]) + sum(m.rows.count for m in batch.media.values())
    none, nothing = hidden.new_empty(0, VOCABULARY), hidden.new_empty(0, TOKEN_WIDTH)
    return [(torch.cat(logits) if logits else none, torch.cat(media) if media else nothing)]


@pytest.mark.full
@pytest.mark.parametrize(("fusion", "family"), TOWERS)
@torch.no_grad()
def test_two_caches_in_pieces_equal_one_full_pass(bases, fusion, family):
    # The toy GPT-2's matrices are large: with branches that a condition changes, float32 alone rounds by more than the bound.
    make = float64_model if (fusion, family) == ("dual tower, adaln", "gpt2") else make_model
    model = make(bases[family], fusion)
    for name, sequence in SEQUENCES.items():
        batch = view([[sequence]], model)
        assert len(pieces(batch)) > 1
        assert distance(incremental(model, batch), look(model, batch)) <= FLOAT32, name


@pytest.mark.parametrize(("fusion", "family"), on_every_family(ROWS))
@torch.no_grad()
def test_caches_agree_in_float64(bases, fusion, family, monkeypatch):
    with exact(monkeypatch):
        model = float64_model(bases[family], fusion)
        for name in MIXED:
            batch = view([[SEQUENCES[name]]], model)
            assert distance(incremental(model, batch), look(model, batch)) <= FLOAT64, name


@torch.no_grad()
def test_a_pass_that_does_not_update_leaves_the_cache_as_it_is(bases):
    """A denoising step must be repeatable."""
    model = make_model(bases["gemma3"])
    batch = view([[SEQUENCES["picture behind words"]]], model)
    cache = model.backbone.new_cache(2, 1)
    model.run_pass(piece(batch, 0, 6), cache=cache, update=True)  # words and [BOI]
    assert {k.shape[2] for slot in cache.slots for k, _ in slot.values()} == {6}
    target = piece(batch, 6, 99)
    first = model.run_pass(target, cache=cache)[1].states["image"]
    assert torch.equal(first, model.run_pass(target, cache=cache)[1].states["image"])
    assert cache.rows.count == 6
    assert {k.shape[2] for slot in cache.slots for k, _ in slot.values()} == {6}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_cache_serves_whatever_comes_next(bases, family):
    """Filled by a prompt in which nobody reads the other kind, it holds what a later picture or word reads."""
    model = make_model(bases[family])
    for first in ((picture((2, 2), 1), words(3, 1)), (words(3, 1), picture((2, 2), 1))):
        whole = view([[Sequence(segments=(*first, picture((2, 3), 2), words(4, 2)))]], model)
        prompt = view([[Sequence(segments=first)]], model)
        assert not (prompt.text_reads_media and prompt.media_reads_text)
        length = int(max(prompt.text.order.max(), prompt.media["image"].rows.order.max())) + 1
        cache = model.backbone.new_cache(2, 1)
        model.run_pass(prompt, cache=cache, update=True)
        found = model.run_pass(piece(whole, length, 99), cache=cache)[1].states
        expected = model.run_pass(whole)[1].states
        for owner, states in found.items():
            torch.testing.assert_close(states, expected[owner][:, -states.shape[1] :], rtol=0, atol=1e-4)


@torch.no_grad()
def test_choosing_rows_of_a_cache_repeats_them(bases):
    model = make_model(bases["llama"])
    batch = view([[SEQUENCES["picture behind words"]], [SEQUENCES["picture alone"]]], model)
    cache = model.backbone.new_cache(2, 2)
    model.run_pass(batch, cache=cache, update=True)
    wide = cache.index(torch.tensor([1, 0, 1]))
    assert wide.rows.order.shape[0] == 3
    for slot, old in zip(wide.slots, cache.slots, strict=True):
        assert slot.keys() == old.keys()
        assert all(torch.equal(slot[i][0], old[i][0][[1, 0, 1]]) for i in slot)
        assert all(torch.equal(slot[i][1], old[i][1][[1, 0, 1]]) for i in slot)


# -------------------------------------------------------------------------------------- what comes later, and masks


@pytest.mark.parametrize(("fusion", "family"), on_every_family(ROWS))
@torch.no_grad()
def test_what_appears_later_changes_nothing_before(bases, fusion, family, monkeypatch):
    with exact(monkeypatch):
        model = float64_model(bases[family], fusion)
        whole = Sequence(
            segments=(*SEQUENCES["pictures between words"].segments[:-1], words(5, 9), picture((2, 2), 20))
        )
        after = look(model, view([[whole]], model))[0]
        for stop in range(1, len(whole.segments)):
            before = look(model, view([[Sequence(segments=whole.segments[:stop])]], model))[0]
            for short, long in zip(before, after, strict=True):
                if len(short):
                    assert float((short - long[: len(short)]).abs().max()) <= FLOAT64, stop


@pytest.mark.full
@pytest.mark.parametrize(("fusion", "family"), ROWS)
@torch.no_grad()
def test_appending_a_picture_changes_no_earlier_logit_in_float32(bases, fusion, family):
    model = make_model(bases[family], fusion)
    text = words(12, 30)
    alone = look(model, view([[Sequence(segments=(text,))]], model))[0][0]
    followed = look(model, view([[Sequence(segments=(text, picture((4, 4), 30)))]], model))[0][0]
    assert float((alone - followed).abs().max()) <= FLOAT32


@pytest.mark.parametrize(("fusion", "family"), ROWS)
@torch.no_grad()
def test_the_picture_is_read_by_the_words_behind_it_and_the_words_by_the_picture(bases, fusion, family):
    """The other way round: what comes before does matter, else every test above holds for a model that is deaf."""
    model = make_model(bases[family], fusion)

    def change(one, other):
        a, b = (look(model, view([[Sequence(segments=s)]], model))[0] for s in (one, other))
        return (a[0] - b[0]).abs().amax(-1), (a[1] - b[1]).abs().amax(-1)

    tail = words(4, 2)
    logits, _ = change((picture((2, 2), 1), tail), (picture((2, 2), 2), tail))
    assert float(logits.min()) > 1e-2
    target = picture((2, 2), 3, noised=True)
    _, media = change((words(4, 1), target), (words(4, 2), target))
    assert float(media.min()) > 1e-2


@pytest.mark.parametrize(("fusion", "family"), ROWS)
@torch.no_grad()
def test_order_inside_a_picture_is_position_not_sequence(bases, fusion, family):
    """Spec 1.12, test 3: permuting patches together with their positions permutes the predictions, nothing else."""
    model = make_model(bases[family], fusion)

    def predict(batch):
        return model.port.readout(model.run_pass(batch)[1].states["image"])

    sequence = Sequence(segments=(words(1, 1), picture((2, 2), 1, noised=True)))  # all of it within the window
    batch = view([[sequence]], model)
    media, swap = batch.media["image"], torch.tensor([0, 4, 2, 1, 3])
    moved = replace(
        media,
        rows=replace(media.rows, position=media.rows.position[:, swap]),
        tokens=media.tokens[:, swap],
        grid_row=media.grid_row[:, swap],
        grid_column=media.grid_column[:, swap],
    )
    found = predict(replace(batch, media={"image": moved}))
    torch.testing.assert_close(found, predict(batch)[:, swap], rtol=0, atol=FLOAT32)


def routed(base, fusion):
    """A model, and how far rows may move that nothing changed: not at all. Rows of one expert are multiplied together, and their
    number rounds sums, so where tokens are routed this is held in float64.
    """
    if fusion == "sparse experts, of the paper":
        return float64_model(base, fusion), 1e-12
    return make_model(base, fusion), 0


@pytest.mark.parametrize(("fusion", "family"), ROWS)
@torch.no_grad()
def test_the_first_patch_sees_the_last_however_far(bases, fusion, family):
    """A sliding window keeps a picture whole."""
    model, still = routed(bases[family], fusion)
    batch = view([[SEQUENCES["picture behind words"]]], model)
    media = batch.media["image"]
    assert media.rows.count - 1 > WINDOW
    states = []
    for change in (0.0, 1.0):
        tokens = media.tokens.clone()
        tokens[0, -1] += change
        _, run = model.run_pass(batch.with_media("image", tokens=tokens))
        states.append(run.states["image"][0])
    moved = (states[1] - states[0]).abs().amax(-1)
    assert float(moved[0]) <= still  # [BOI]
    assert float(moved[1:].min()) > 1e-3


@pytest.mark.parametrize(("fusion", "family"), ROWS)
@torch.no_grad()
def test_the_row_before_a_picture_is_constant_over_noise_levels(bases, fusion, family):
    """[BOI] has no noise level and does not see the picture: its keys and values are kept while the picture is drawn."""
    model, still = routed(bases[family], fusion)
    batch, kept = view([[SEQUENCES["picture behind words"]]], model), []
    for time in (1.0, 0.3):
        media = batch.media["image"]
        noisy = batch.with_media("image", tokens=media.tokens * time, time=media.time.new_tensor([time]))
        cache = model.backbone.new_cache(2, 1)
        model.run_pass(noisy, cache=cache, update=True)
        kept.append((cache.rows.order[0], cache.slots))
    order = kept[0][0]
    before, inside = order <= 5, order > 5  # five words and [BOI]; then the patches
    for one, other in zip(kept[0][1], kept[1][1], strict=True):
        for layer in one:
            for a, b in zip(one[layer], other[layer], strict=True):
                assert float((a - b)[:, :, before].abs().max()) <= still
                assert not torch.equal(a[:, :, inside], b[:, :, inside])


@torch.no_grad()
def test_a_copy_that_is_not_visible_to_later_is_seen_by_nobody_later(bases):
    model = make_model(bases["llama"])
    first, last = words(3, 1), words(4, 2)
    clean = picture((2, 3), 3)

    def say(seed):
        hidden = picture((2, 3), seed, noised=True, loss=True, later=False)
        return look(model, view([[Sequence(segments=(first, hidden, clean, last))]], model))[0]

    one, other = say(4), say(5)
    rows = len(one[1]) // 2
    # Its [EOI] stands between; only that row and what follows could have heard of it.
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=FLOAT32)
    torch.testing.assert_close(one[1][rows:], other[1][rows:], rtol=0, atol=FLOAT32)
    assert float((one[1][1:rows] - other[1][1:rows]).abs().max()) > 1e-2


def paths_agree(model, monkeypatch):
    """Fast, whole, packed and cached say the same in float64."""
    calls = []
    kind, reference = type(model.fusion), type(model.fusion).reference_layer
    monkeypatch.setattr(kind, "reference_layer", lambda *a: calls.append(a[1]) or reference(*a))
    alone = [look(model, view([[s]], model))[0] for s in SEQUENCES.values()]
    for name, (packed, order) in packings().items():
        batch = view(packed, model)
        assert distance(look(model, batch), [alone[i] for i in order]) <= FLOAT64, name
        with model.using(model.reference_engine()):
            assert distance(look(model, batch), [alone[i] for i in order]) <= FLOAT64, name
    for (name, sequence), expected in zip(SEQUENCES.items(), alone, strict=True):
        assert distance(incremental(model, view([[sequence]], model)), [expected]) <= FLOAT64, name
    assert set(calls) == set(range(LAYERS))  # else the fast path was compared with itself
