"""Conversations that go on: what was read before is not read again, and the answer is that of reading all of it."""

from dataclasses import replace

import pytest
import torch
from contracts.table import LAYERS, SIDE, Noise, hearing_model, make_model, picture, words

from xfusion.composition import together
from xfusion.data.sequence import Sound, Text
from xfusion.generation import caption, turns
from xfusion.generation.words import answer_tokens
from xfusion.modalities.image import ImageModality
from xfusion.training.optimizer import Optimizer

SETTINGS = {"max_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seeds": [0]}


def counted(model, monkeypatch):
    """Positions of each pass from now on."""
    seen, run_pass = [], model.run_pass

    def run(batch, **settings):
        seen.append(batch.text.count + sum(m.rows.count for m in batch.media.values()))
        return run_pass(batch, **settings)

    monkeypatch.setattr(model, "run_pass", run)
    return seen


def conversation(model, *shown):
    """Three turns: each goes on behind the answer of the one before."""
    context, answers, contexts = (shown[0], words(4, 1)), [], []
    for number, media in enumerate((*shown[1:], None), start=1):
        (answer,) = answer_tokens(model, [context], **SETTINGS)
        answers.append(answer)
        contexts.append(context)
        context = (*context, Text(ids=tuple(answer)), words(2, number))
        if media is not None:
            context = (*context, media, words(3, number))
    (answer,) = answer_tokens(model, [context], **SETTINGS)
    return [*answers, answer], [*contexts, context]


@pytest.mark.parametrize(
    ("fusion", "family"),
    [
        ("dual tower, strided", "llama"),
        ("dual tower", "gemma3"),
        ("x-fuse", "llama"),
        ("prefix", "qwen3"),
        ("bagel", "llama"),
        ("gated tower", "llama"),
        ("flamingo", "llama"),
        ("openflamingo, all previous", "gemma3"),
        ("llama-adapter", "llama"),
        ("llama-adapter 2", "llama"),
    ],
)
@torch.no_grad()
def test_a_turn_reads_what_is_new_and_answers_as_if_it_had_read_all(bases, fusion, family, monkeypatch):
    model = make_model(bases[family], fusion)
    seen = counted(model, monkeypatch)
    shown = [picture((4, 4), 1), picture((2, 3), 2)]
    answers, contexts = conversation(model, *shown)
    # [BOI], tokens, [EOI] and words of the first turn; then the last token said, words and the new picture; then words.
    prefills = [n for n in seen if n > 1]
    assert prefills[0] >= 16 + 2 + 4 and max(prefills[1:]) <= 1 + 2 + 8 + 3
    for context, answer in zip(contexts, answers, strict=True):
        model.use(model.plain_engine())
        whole = len(seen)
        assert answer_tokens(model, [context], **SETTINGS) == [answer]
        assert seen[whole] > max(prefills[1:]) - 1, "the comparison read all of it"


@torch.no_grad()
def test_a_conversation_by_its_messages_reads_only_what_is_new(bases, monkeypatch):
    """As chat, page and server ask: the layout of the turns and their tokens must continue those before them."""
    model = make_model(bases["llama"], "dual tower, strided")
    seen, messages = counted(model, monkeypatch), []
    for number in range(3):
        content = ["what is this?"] if number else [Noise().picture(1, SIDE), "what is this?"]
        messages.append({"role": "user", "content": content})
        before = len(seen)
        answer = model.answer(messages, draw="never", max_tokens=4)
        new = max(seen[before:])
        question = len(model.backbone.encode("what is this?"))
        # Later turns: the answer before, which may be tokenised otherwise than it was said, line breaks, and the question.
        said_before = len(model.backbone.encode(messages[-2]["content"][0])) if number else 0
        assert new == 1 + 1 + 16 + 1 + question if number == 0 else new <= said_before + 2 + question
        fresh = make_model(bases["llama"], "dual tower, strided")
        assert fresh.answer(messages, draw="never", max_tokens=4) == answer
        messages.append({"role": "assistant", "content": answer})


@torch.no_grad()
def test_sounds_and_pictures_of_several_packs_go_on_too(bases, monkeypatch):
    model = together(make_model(bases["llama"], "dual tower, strided"), hearing_model(bases["llama"]))
    heard = model.audio
    tokens = torch.randn(5, heard.token_width, generator=torch.Generator().manual_seed(3))
    shown = [picture((4, 4), 1), heard.segment(tokens, (5, 1)), picture((2, 2), 3)]
    seen = counted(model, monkeypatch)
    answers, contexts = conversation(model, *shown)
    assert max(n for n in seen[1:]) <= 1 + 2 + 7 + 3
    for context, answer in zip(contexts, answers, strict=True):
        model.use(model.plain_engine())
        assert answer_tokens(model, [context], **SETTINGS) == [answer]


@pytest.mark.parametrize("fusion", ["dual tower, strided", "cogvlm"])
@pytest.mark.parametrize("shared_position", [False, True])
@torch.no_grad()
def test_keys_and_values_that_go_on_are_those_of_the_whole(bases, fusion, shared_position):
    model = make_model(bases["llama"], fusion)
    shown = [replace(picture(grid, 1), shared_position=shared_position) for grid in ((4, 4), (3, 3))]
    context = (shown[0], words(4, 1))
    (answer,) = answer_tokens(model, [context], **SETTINGS)
    longer = (*context, Text(ids=tuple(answer)), shown[1], words(3, 2))
    cache, rest = turns.resume_prefix(model, longer, turns.units(longer))
    known = cache.rows.count
    hidden, _ = model.run_pass(rest, cache=cache, update=True)
    model.use(model.plain_engine())
    empty, whole = turns.resume_prefix(model, longer, turns.units(longer))
    said, seen = (part.text.count + part.media["image"].rows.count for part in (rest, whole))
    assert empty.rows.count == 0 < known and known + said == seen
    expected, _ = model.run_pass(whole, cache=empty, update=True)
    assert float((hidden[:, rest.text.count - 1] - expected[:, whole.text.count - 1]).abs().max()) < 1e-4
    by_order, by_order_whole = cache.rows.order[0].argsort(), empty.rows.order[0].argsort()
    for slot, other in zip(cache.slots, empty.slots, strict=True):
        assert slot.keys() == other.keys() and slot
        for layer, kept in slot.items():
            for one, two in zip(kept, other[layer], strict=True):
                assert float((one[:, :, by_order] - two[:, :, by_order_whole]).abs().max()) < 1e-4
    assert torch.equal(cache.rows.position[0, by_order], empty.rows.position[0, by_order_whole])


@pytest.mark.parametrize("fusion", ["dual tower", "cogvlm"])
@torch.no_grad()
def test_turns_behind_pictures_at_one_position_go_on_from_there(bases, fusion, monkeypatch):
    """As in CogVLM: a picture moves what follows it by three positions, not by its tokens."""
    model = make_model(bases["llama"], fusion)
    shown = [replace(picture((4, 4), 1), shared_position=True, bidirectional=False) for _ in range(2)]
    seen = counted(model, monkeypatch)
    answers, contexts = conversation(model, *shown)
    assert max(seen[1:]) <= 1 + 2 + 18 + 3, "later turns read what is new"
    known = turns.resume_prefix(model, contexts[-1], turns.units(contexts[-1]))[0].rows
    assert known.count and int(known.position.max()) == int(known.order.max()) - 2 * 15
    in_a_row = (replace(shown[0], shared_position=False), *contexts[-1][1:])
    assert turns.resume_prefix(model, in_a_row, turns.units(in_a_row))[0].rows.count == 0, "another prefix"
    for context, answer in zip(contexts, answers, strict=True):
        model.use(model.plain_engine())
        assert answer_tokens(model, [context], **SETTINGS) == [answer]


def test_other_weights_read_anew(bases):
    model = make_model(bases["llama"], "dual tower, strided")
    context = (picture((4, 4), 1), words(4, 1))
    longer = (*context, words(2, 2))
    optimizer = Optimizer(model.named_new_parameters())

    def by_hand():
        with torch.no_grad():
            next(model.new_parameters()).add_(0.1)

    def by_a_step():
        for parameter in model.new_parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(0.1, 1.0, 0.9)

    def by_loading():
        with torch.no_grad():
            for value in model.learned_state().values():
                value.copy_(value + 0.1)

    for change in (by_hand, by_a_step, optimizer.use_average, by_loading):
        answer_tokens(model, [context], **SETTINGS)
        assert turns.resume_prefix(model, longer, turns.units(longer))[0].rows.count > 0
        change()
        assert turns.resume_prefix(model, longer, turns.units(longer))[0].rows.count == 0, "old keys of new weights"
    assert not model.engine.turns


@torch.no_grad()
def test_only_the_last_conversations_are_kept(bases, monkeypatch):
    """As many as fit: a cache of a long conversation takes gigabytes."""
    model = make_model(bases["llama"])

    def ask(number):
        answer_tokens(model, [(picture((2, 2), number), words(3, number))], **SETTINGS | {"max_tokens": 1})

    ask(0)
    (entry,) = model.engine.turns.values()
    held = sum(t.nbytes for slot in entry.cache.slots for pair in slot.values() for t in pair)
    assert entry.nbytes == held > 4 * LAYERS * 8
    monkeypatch.setattr(turns, "PREFIX_BYTES", 5 * held)
    for number in range(1, 8):
        ask(number)
    assert len(model.engine.turns) == 5
    first = [turns.units((picture((2, 2), number),))[0] for number in range(8)]
    assert [key[0] for key in model.engine.turns] == first[3:]
    monkeypatch.setattr(turns, "PREFIX_BYTES", 1)
    ask(8)
    assert len(model.engine.turns) == 1, "the last one stays, however large"


@torch.no_grad()
def test_what_a_turn_went_on_from_is_all_that_is_kept_of_the_turns_before(bases):
    """Each entry holds the whole of its conversation so far."""
    model = make_model(bases["llama"], "dual tower, strided")
    other = (picture((3, 3), 9), words(3, 9))
    answer_tokens(model, [other], **SETTINGS)
    aside, kept = set(model.engine.turns), []
    context = (picture((4, 4), 1), words(4, 1))
    for number in range(4):
        (answer,) = answer_tokens(model, [context], **SETTINGS)
        kept.append(len(set(model.engine.turns) - aside))
        asked, context = context, (*context, Text(ids=tuple(answer)), words(2, number))
    assert kept == [2, 3, 3, 3] and aside <= set(model.engine.turns)
    # The last question again: what was read before it is not read anew.
    assert turns.resume_prefix(model, asked, turns.units(asked))[0].rows.count > 0


@torch.no_grad()
def test_a_picture_is_encoded_once_and_another_anew(bases, monkeypatch):
    model, calls = make_model(bases["llama"], "prefix"), []
    encode = ImageModality.encode
    monkeypatch.setattr(ImageModality, "encode", lambda *a: calls.append(a[1]) or encode(*a))
    noise = Noise()
    one, other = noise.picture(0, SIDE), noise.picture(1, SIDE)
    said = [caption(model, [shown], max_tokens=3) for shown in (one, other, one, one.copy())]
    assert len(calls) == 2 and said[0] == said[2] == said[3]
    grey = one.convert("P")
    caption(model, [grey], max_tokens=1)
    assert len(calls) == 3
    caption(model, [one, other], max_tokens=1)  # a batch is encoded as one
    assert [len(some) for some in calls] == [1, 1, 1, 2]
    wave = torch.rand(24, generator=torch.Generator().manual_seed(1)) - 0.5
    hearer = hearing_model(bases["llama"])
    answers = [caption(hearer, [Sound(samples=wave * k, rate=2000)], max_tokens=3) for k in (1, 1, 0.5)]
    assert answers[0] == answers[1] and len(hearer.engine.media_tokens) == 2
