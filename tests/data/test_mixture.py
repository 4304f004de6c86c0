"""Batches are a pure function of seed and step; epochs hold every picture once; wordings follow their shares."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image as PILImage

from xfusion.data.mixture import LOOKED_AT, Mixture, MixtureConfig
from xfusion.data.sequence import END_OF_MEDIA, IGNORE, Example, Media, Text, XFusionError
from xfusion.data.templates import (
    QUESTIONS,
    Templates,
    as_json,
    captioning,
    drawing,
    in_json,
    question_text,
    with_article,
)
from xfusion.modalities.image import ImageModality
from xfusion.objectives.flow_matching import FlowMatching

BEGIN, END = (9998,), 9999


class Squares:
    spec, licence = "squares", "none needed"

    def __init__(self, count=7):
        self.examples = tuple(
            Example(id=str(i), captions=("word " * (1 + i % 4), f"other {i}"), group=str(i), origin=str(i))
            for i in range(count)
        )
        self.opened = Counter()

    def __len__(self):
        return len(self.examples)

    def picture(self, index, size):
        self.opened[index] += 1
        return PILImage.new("RGB", (size, size), (index, 0, 0))


def encode(text):
    return tuple(map(ord, text))


def mixture(source=None, seed=0, sizes=(8,), **settings):
    image = ImageModality.Config(patch=4, sizes=sizes).build()
    settings = {"draw": 4, "caption": 4, "pack": 2, **settings}
    return Mixture(
        Squares() if source is None else source, image, sizes, encode, BEGIN, END, MixtureConfig(**settings), seed
    )


def flat(batches):
    out = []
    for b in batches:
        media = b.media["image"]
        out += [b.text_ids, b.labels, b.text.order, b.text.position, media.tokens, media.rows.order, media.noised]
    return out


def test_texts_beyond_what_the_base_reads_are_refused_by_origin():
    """By hand: 5 positions of a picture with [BOI], [EOI], 24 of a question, 20 of an answer; a prompt has [BOS], an article."""
    image = ImageModality.Config(patch=4, sizes=(8,)).build()

    def made(context_length, **settings):
        config = MixtureConfig(**{"draw": 4, "caption": 4, "pack": 2, **settings})
        return Mixture(Squares(), image, (8,), encode, BEGIN, END, config, 0, context_length=context_length)

    assert made(50).batches(0) and made(28, caption=0).batches(0)
    assert max(int(batch.text.position.max()) for batch in made(50).largest()) == 49
    with pytest.raises(
        XFusionError, match=r"^3: with its text a sample takes 50 positions, of which 45 are text; the base reads 49: "
    ):
        made(49)
    with pytest.raises(
        XFusionError, match="^3: with its text a sample takes 28 positions, of which 23 are text; the base reads 27: "
    ):
        made(27, caption=0)


def test_batches_are_a_pure_function_of_seed_and_step():
    one, other = mixture(), mixture()
    for step in (0, 1, 2):
        one.batches(step)
    for step in (31, 3, 0):  # in any order, with or without a history
        for a, b in zip(flat(one.batches(step)), flat(other.batches(step)), strict=True):
            assert torch.equal(a, b)
    torch.manual_seed(5)
    random.seed(5)
    assert all(torch.equal(a, b) for a, b in zip(flat(mixture().batches(3)), flat(one.batches(3)), strict=True))
    different = [
        torch.equal(a, b) for a, b in zip(flat(mixture(seed=1).batches(3)), flat(one.batches(3)), strict=False)
    ]
    assert not all(different)


def test_every_epoch_holds_every_picture_once():
    m = mixture()
    for task in ("draw", "caption"):
        places = list(m.order.take(task, 0, 21))
        assert [sorted(places[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
        assert len({tuple(places[i : i + 7]) for i in (0, 7, 14)}) == 3  # and not in the same order
        pieces = [i for start in range(0, 21, 4) for i in m.order.take(task, start, min(4, 21 - start))]
        assert pieces == places
    assert list(m.order.take("draw", 0, 7)) != list(m.order.take("caption", 0, 7))


def test_steps_go_through_an_epoch_and_not_over_the_same_pictures_again():
    """Seven steps of four samples are four epochs of seven pictures, in both tasks."""
    m = mixture()
    for sequences in (m.drawings, m.captionings):
        seen = [
            part.index for step in range(7) for s in sequences(step) for part in s.segments if isinstance(part, Media)
        ]
        assert [sorted(seen[i : i + 7]) for i in (0, 7, 14, 21)] == [list(range(7))] * 4


def test_wordings_are_drawn_anew_in_every_step():
    m = mixture(Squares(1), templates=Templates(question_share=0.5))
    for sequences in (m.drawings, m.captionings):
        said = [[p.ids for s in sequences(step) for p in s.segments if isinstance(p, Text)] for step in range(12)]
        assert len({tuple(ids) for ids in said}) > 6


def test_rows_are_as_wide_as_nine_steps_in_ten_need():
    """One caption in forty is long: the steps that have it are wider, the others are not."""
    source = Squares(40)
    long = replace(source.examples[3], captions=("word " * 60,))
    source.examples = (*source.examples[:3], long, *source.examples[4:])
    plain = Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0)
    m = mixture(source, draw=1, caption=1, pack=1, templates=plain)
    assert m.widths == tuple(24 for _ in m.widths)  # of four words, [EOI], and the end or the beginning
    widths = Counter(m.batches(step)[0].text.count for step in range(40))
    assert widths == {24: 39, 384: 1}  # of 300 letters, one token each
    assert m.further_widths == ((48, 384), (48, 384))
    assert [batch.text.count for batch in m.wide_batches()] == [48, 48], "sixteen times as wide is not worth its graphs"


def test_rare_wide_steps_of_several_sizes_have_the_shapes_that_are_made_ahead():
    source = Squares(200)
    captions = ["word"] * 199 + ["a long word " * 2]
    source.examples = tuple(replace(e, captions=(c,)) for e, c in zip(source.examples, captions, strict=True))
    plain = Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0)
    m = mixture(source, sizes=(24, 8, 16), draw=6, caption=6, pack=2, templates=plain)
    draw, caption = m.widths
    ahead = {tuple(tensor.shape for tensor in flat([batch])) for batch in m.wide_batches()}
    wide = [b for step in range(80) for b, width in zip(m.batches(step), m.widths, strict=True) if b.text.count > width]
    assert {batch.text.count for batch in wide} == {4 * draw, 4 * caption}
    assert len(ahead) == 4 and {tuple(tensor.shape for tensor in flat([batch])) for batch in wide} < ahead


def test_further_widths_are_for_texts_that_the_data_have():
    """Rows of equal texts are never wider; a row of four may have one long text, or four not much longer than usual."""
    plain = Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0)
    equal = Squares(6)
    equal.examples = tuple(replace(e, captions=("six by six",)) for e in equal.examples)
    assert mixture(equal, pack=4, draw=4, caption=4, templates=plain).further_widths == ((), ())
    source = Squares(400)
    captions = ["word"] * 399 + ["word " * 10]
    source.examples = tuple(replace(e, captions=(c,)) for e, c in zip(source.examples, captions, strict=True))
    m = mixture(source, pack=4, draw=4, caption=4, templates=plain)
    draw, caption = m.widths
    assert m.further_widths == ((2 * draw, 8 * draw), (2 * caption, 4 * caption))
    assert 4 * draw < len("word " * 10) < 8 * draw and 2 * caption < caption + len("word " * 10) < 4 * caption


def test_a_drawing_is_words_then_a_noised_target_and_a_captioning_a_clean_picture_then_its_answer():
    m = mixture(
        templates=Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0), draw=7, caption=8
    )
    for (sequence,) in m._fill_pictures([[sequence] for sequence in m.drawings(0)]):
        text, picture = sequence.segments
        assert isinstance(text, Text) and not text.has_loss
        assert isinstance(picture, Media) and picture.state == "noised" and picture.has_loss
        index = round(float((picture.tokens[0, 0] + 1) * 127.5))
        assert text.ids == (*BEGIN, *encode(m.source.examples[index].captions[0]))
    for (sequence,) in m._fill_pictures([[sequence] for sequence in m.captionings(0)]):
        picture, text = sequence.segments
        assert picture.state == "clean" and not picture.has_loss
        index = round(float((picture.tokens[0, 0] + 1) * 127.5))
        assert text.ids == (*encode(m.source.examples[index].captions[0]), END) and text.has_loss
    draw, caption = m.batches(0)
    assert not draw.text_reads_media and draw.media_reads_text and bool(draw.media["image"].noised.all())
    assert (draw.labels == IGNORE).all()
    assert caption.text_reads_media and not caption.media_reads_text
    assert not bool(caption.media["image"].noised.any())
    assert int((caption.labels == END).sum()) == 8


def test_pictures_that_are_read_may_be_noised_up_to_a_cap_and_are_then_drawn_too():
    noised, clean = (mixture(largest_noise=cap).batches(3) for cap in (0.25, 0.0))
    objective = FlowMatching.Config(time_mean=3.0).build()  # most levels lie above the cap
    (draw, read), (draw_before, read_before) = noised, clean
    assert all(map(torch.equal, flat([draw]), flat([draw_before])))
    assert draw.media["image"].largest_noise.tolist() == [1.0] * 4
    media = read.media["image"]
    assert bool(media.noised.all()) and bool(media.has_loss.all())
    assert torch.equal(media.tokens, read_before.media["image"].tokens) and torch.equal(read.labels, read_before.labels)
    assert objective.count(read) == {"flow_matching": 4}
    level = objective.corrupt(read, torch.Generator().manual_seed(0)).media["image"].time
    assert 0.2 < float(level.max()) <= 0.25 and float(level.min()) > 0


def test_without_a_cap_pictures_that_are_read_stay_as_they_are_and_draw_no_noise():
    _, read = mixture(largest_noise=0.0).batches(3)
    objective, generator = FlowMatching.Config().build(), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert objective.corrupt(read, generator) is read and objective.count(read) == {}
    assert torch.equal(
        generator.get_state(), before
    )  # so that what is drawn behind it gets the noise of a run without caps
    assert not bool(read.media["image"].has_loss.any())


def test_shapes_stay_fixed_over_a_run_and_longer_rows_double_the_width(monkeypatch):
    m = mixture()
    counts = [[b.text.count for b in m.batches(step)] for step in range(LOOKED_AT)]
    for found, width in zip(zip(*counts, strict=True), m.widths, strict=True):
        assert found.count(width) >= 0.9 * LOOKED_AT
        assert set(found) <= {width, 2 * width}
    steps = [flat(m.batches(step)) for step in range(60)]
    shapes = {tuple(b.text.count for b in m.batches(i)): tuple(t.shape for t in s) for i, s in enumerate(steps)}
    for i, step in enumerate(steps):  # all other shapes follow from the two widths
        assert tuple(t.shape for t in step) == shapes[tuple(b.text.count for b in m.batches(i))]
    monkeypatch.setattr("xfusion.data.mixture.LOOKED_AT", 1)
    m = mixture(draw=1, caption=2)
    shortest = m.widths
    found = {tuple(b.text.count for b in m.batches(step)) for step in range(60)}
    assert len(found) > 1
    for counts in found:
        for count, width in zip(counts, shortest, strict=True):
            assert count in (width, 2 * width, 4 * width)


def test_a_step_of_several_sizes_has_as_many_of_each_and_one_shape():
    """Sides of 8, 16 and 24 px are 4, 16 and 36 tokens: what one of the largest takes holds two of 16 px or seven of 8."""
    one, other = (mixture(Squares(20), sizes=(24, 8, 16), draw=9, caption=6, pack=2) for _ in range(2))
    shapes, assigned = [], set()
    for step in range(20):
        batches = one.batches(step)
        assert all(torch.equal(a, b) for a, b in zip(flat(batches), flat(other.batches(step)), strict=True))
        shapes.append([tuple(b.media["image"].tokens.shape) for b in batches])
        for batch, samples in zip(batches, (one.drawings(step), one.captionings(step)), strict=True):
            media = batch.media["image"]
            found = [int((media.item == n).sum()) for n in range(len(media.noised))]
            assert Counter(found) == dict.fromkeys((4, 16, 36), len(samples) // 3)
            assert batch.num_sequences == len(samples)
        pictures = [s for q in one.drawings(step) for s in q.segments if isinstance(s, Media)]
        assigned |= {(p.index, p.size) for p in pictures}
    assert len(assigned) > 40  # a picture comes in every size
    # 3 of 37 positions, and 3 of 17 with 3 of 5 in two more rows: 5 rows of at most 37. To name: 2 of each, 74 positions.
    assert shapes == [[(5, 37, 48), (2, 59, 48)]] * 20
    picture = one.source.picture(3, 16)
    assert torch.equal(one.tokens(3, 16), one.image.encode([picture], 16)[0])


def test_pictures_are_encoded_once_and_the_oldest_goes_first(monkeypatch):
    source = Squares(3)
    m = mixture(source)
    for step in range(5):
        m.batches(step)
    assert source.opened == {0: 1, 1: 1, 2: 1}
    monkeypatch.setattr("xfusion.data.mixture.TOKENS_KEPT", 2 * 4 * 48 * 4)  # two pictures of 4 tokens
    source = Squares(3)
    m = mixture(source)
    for index in (0, 1, 2, 1, 0):
        m.tokens(index, 8)
    assert source.opened == {0: 2, 1: 1, 2: 1}


def test_texts_are_tokenised_once_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr("xfusion.data.mixture.TEXTS_KEPT", 2)
    m, asked = mixture(Squares(3)), []
    m.encode = lambda text: asked.append(text) or (len(text),)
    assert [m.ids(text) for text in ("a", "bb", "a", "ccc", "bb", "a")] == [(1,), (2,), (1,), (3,), (2,), (1,)]
    assert asked == ["a", "bb", "ccc", "a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption": 5}, "caption 5 is not a multiple of pack 2"),
        ({"draw": 0, "caption": 0}, "draw and caption are both 0"),
        ({"pack": 0}, "draw 4, caption 4, pack 0: draw and caption are 0 or more samples, pack at least 1"),
        ({"draw": -4}, "draw -4, caption 4, pack 2: "),
        ({"caption": -4}, "draw 4, caption -4, pack 2: "),
        ({"source": Squares(0)}, "squares: no pictures"),
        ({"largest_noise": 1.5}, "largest_noise 1.5 is not within 0 and 1"),
    ],
)
def test_impossible_mixtures_are_refused(settings, message):
    with pytest.raises(XFusionError, match=message):
        mixture(**settings)


def test_one_task_alone():
    assert [len(mixture(**s).batches(0)) for s in ({}, {"draw": 0}, {"caption": 0})] == [2, 1, 1]


def test_wordings_follow_their_shares():
    example = Example(id="0", captions=("red apple", "an apple that is red"), group="0", origin="0")
    templates, rng = Templates(article_share=0.25, other_wordings=0.25), random.Random(0)
    found = Counter(templates.drawing_words(example, rng) for _ in range(4000))
    assert set(found) == {"", "red apple", "a red apple", "an apple that is red", "an an apple that is red"}
    share = {k: v / 4000 for k, v in found.items()}
    assert share[""] == pytest.approx(0.1, abs=0.02)
    assert share["a red apple"] == pytest.approx(0.9 * 0.75 * 0.25, abs=0.025)
    asked = Counter(templates.question(rng) for _ in range(2000))
    assert set(asked) == {"", *QUESTIONS}
    assert asked[""] / 2000 == pytest.approx(0.9, abs=0.03)


def test_articles_and_questions():
    words = ("apple", "Owl", "red apple", "umbrella", "ice", "egg", "yacht")
    articles = ["an", "an", "a", "an", "an", "an", "a"]
    assert [with_article(w) for w in words] == [f"{article} {w}" for article, w in zip(articles, words, strict=True)]
    assert (question_text(" What? "), question_text("  ")) == ("What?\n", "")


def test_a_dropped_prompt_leaves_the_picture_alone_and_a_question_stands_before_the_answer():
    tokens = torch.zeros(4, 3)
    assert len(drawing(encode, BEGIN, "", Media(tokens=tokens, grid=(2, 2))).segments) == 1
    words, _ = drawing(encode, BEGIN, "cat", Media(tokens=tokens, grid=(2, 2))).segments
    assert words == Text(ids=(*BEGIN, *encode("cat")))
    picture, asked, answer = captioning(encode, END, Media(tokens=tokens, grid=(2, 2)), "cat", "What?").segments
    assert asked == Text(ids=encode("What?\n")) and answer == Text(ids=(*encode("cat"), END), has_loss=True)
    assert END_OF_MEDIA < 0 and picture.grid == (2, 2)


def test_a_question_of_the_data_stands_behind_its_picture_and_the_other_samples_stay_as_they_were():
    plain, mixed = Squares(7), Squares(7)
    mixed.examples = tuple(
        replace(e, question="How many squares are there in all?") if i in (1, 4) else e
        for i, e in enumerate(plain.examples)
    )
    asks = Templates(question_share=0.5)
    one, other = (mixture(source, caption=8, templates=asks) for source in (plain, mixed))
    found = []
    for step in range(12):
        assert all(map(torch.equal, flat(one.batches(step)[:1]), flat(other.batches(step)[:1])))  # what is drawn
        for before, now in zip(one.captionings(step), other.captionings(step), strict=True):
            index = now.segments[0].index
            found.append(index)
            if index in (1, 4):
                asked, answer = now.segments[1:]
                assert asked == Text(ids=encode("How many squares are there in all?\n")) and not asked.has_loss
                assert answer == before.segments[-1] and answer.has_loss
            else:
                assert now.segments[1:] == before.segments[1:]
    assert {1, 4} < set(found)
    plain_steps, again = mixture(plain, caption=8, templates=asks), mixture(Squares(7), caption=8, templates=asks)
    for step in range(3):
        assert all(map(torch.equal, flat(plain_steps.batches(step)), flat(again.batches(step))))


def test_the_largest_step_holds_the_longest_question_with_its_answer():
    source = Squares(7)
    source.examples = tuple(replace(e, captions=("x" * 20,)) for e in source.examples)
    source.examples = (*source.examples, replace(source.examples[0], id="7", captions=("yes",), question="q" * 90))
    m = mixture(source, templates=Templates(question_share=0.5), pack=1)
    _, caption = m.largest()
    labels = caption.labels[caption.labels != IGNORE].tolist()
    assert labels == [*encode("yes"), END] * 4 and caption.text.count > 91
    assert max(b.text.count for step in range(20) for b in m.batches(step)) <= caption.text.count


def test_a_share_of_the_questions_of_the_data_is_asked_in_json():
    source = Squares(7)
    source.examples = tuple(
        replace(e, question="How many?", captions=(str(i),)) if i < 4 else e for i, e in enumerate(source.examples)
    )
    plain, asking = (
        mixture(source, caption=8, pack=1, templates=Templates(json_share=share, question_share=0.5))
        for share in (0.0, 0.5)
    )
    in_braces, own = 0, 0
    for step in range(40):
        for before, now in zip(plain.captionings(step), asking.captionings(step), strict=True):
            index = now.segments[0].index
            own += index < 4
            if index < 4 and now.segments[1:] != before.segments[1:]:
                in_braces += 1
                said = Text(ids=(*encode(f'{{"answer": {index}}}'), END), has_loss=True)
                assert now.segments[1:] == (Text(ids=encode("How many? Answer in JSON.\n")), said)
            else:  # what the data does not ask is never in JSON, and what is drawn of questions stays
                assert now.segments[1:] == before.segments[1:]
    assert own > 100 and in_braces / own == pytest.approx(0.5, abs=0.15)
    _, largest = asking.largest()
    assert largest.text.count == max(b.text.count for step in range(20) for b in asking.batches(step)[1:])


def test_an_answer_in_json_keeps_its_kind():
    said = {
        "3": "3",
        "-12": "-12",
        "true": "true",
        "null": "null",
        "red disc": '"red disc"',
        "0.5": '"0.5"',
        "03": '"03"',
    }
    assert {answer: as_json(answer) for answer in said} == {a: f'{{"answer": {v}}}' for a, v in said.items()}
    assert in_json(" How many? ") == "How many? Answer in JSON."


def test_looking_at_lengths_opens_no_picture_and_a_share_opens_its_own():
    source = Squares(40)
    m = mixture(source, draw=8, caption=8)
    assert m.widths and not source.opened
    whole = m.batches(0)
    assert set(source.opened.values()) == {1} and len(source.opened) > 8
    own = Squares(40)
    half = mixture(own, draw=8, caption=8)
    half.row_slice = lambda rows: slice(0, rows // 2)
    for batch, all_rows in zip(half.batches(0), whole, strict=True):
        rows = len(batch.text_ids) // 2
        assert torch.equal(batch.text_ids, all_rows.text_ids)
        tokens = [b.media["image"].tokens for b in (batch, all_rows)]
        assert torch.equal(tokens[0][:rows], tokens[1][:rows])
        assert not tokens[0][rows:].any() and tokens[1][rows:].any()
    assert 0 < len(own.opened) <= 8


def twins(count=8):
    """Pictures two of which are always of one group."""
    source = Squares(count)
    source.examples = tuple(
        Example(id=e.id, captions=(f"name {e.id}",), group=str(int(e.id) // 2), origin=e.id) for e in source.examples
    )
    return source


def indices(sequence):
    return [s.index for s in sequence.segments if isinstance(s, Media)]


def test_shots_are_pictures_with_their_answers_before_what_stood_there_without_them():
    plain, solved = mixture(twins(), draw=4, caption=8), mixture(twins(), draw=4, caption=8, shots=3)
    for step in range(30):
        assert [indices(s) for s in plain.drawings(step)] == [indices(s) for s in solved.drawings(step)]
        for alone, sequence in zip(plain.captionings(step), solved.captionings(step), strict=True):
            *before, picture = sequence.segments[:7]
            assert (picture.index, *sequence.segments[7:]) == (indices(alone)[0], *alone.segments[1:])
            for shown, answer in zip(before[::2], before[1::2], strict=True):
                assert shown.state == "clean" and not shown.has_loss
                assert answer == Text(ids=(*encode(f"name {shown.index}"), END), has_loss=True, unread_end=True)
            groups = [i // 2 for i in indices(sequence)]
            assert len(set(groups)) == 4  # neither a twin of the asked picture nor of another shot
    used = Counter(i for step in range(30) for s in solved.captionings(step) for i in indices(s)[:-1])
    assert set(used) == set(range(8)) and max(used.values()) < 2 * min(used.values())


def test_shots_are_a_pure_function_of_seed_and_step():
    one, other = (mixture(twins(40), shots=2) for _ in range(2))
    for step in (0, 1, 2):
        one.batches(step)
    for step in (31, 3, 0):
        assert all(torch.equal(a, b) for a, b in zip(flat(one.batches(step)), flat(other.batches(step)), strict=True))
    assert [indices(s) for s in one.captionings(3)] != [
        indices(s) for s in mixture(twins(40), 1, shots=2).captionings(3)
    ]
    assert len({tuple(indices(s)[:2]) for step in range(10) for s in one.captionings(step)}) > 30


def test_the_datas_own_question_stands_behind_a_shot_as_well():
    """Without it, one picture with several questions would be taught to have each of their answers."""
    source = twins()
    source.examples = tuple(replace(e, question=f"how many {i}?") for i, e in enumerate(source.examples))
    m = mixture(source, draw=0, caption=4, pack=2, shots=2)
    for sequence in m.captionings(0):
        assert len(sequence.segments) == 9
        for shown, asked, answer in zip(*(sequence.segments[k::3] for k in range(3)), strict=True):
            assert asked == Text(ids=encode(f"how many {shown.index}?\n")) and not asked.has_loss
            assert answer.ids == (*encode(f"name {shown.index}"), END)
    (batch,) = m.largest()
    assert max(b.text.count for step in range(20) for b in m.batches(step)) <= batch.text.count


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5, but it is a share from 0 to 1"),
        ({"question_share": -1}, "question_share is -1"),
        ({"questions": ()}, "question_share is 0.1, but questions is empty"),
    ],
)
def test_templates_that_cannot_be_meant_are_refused(wrong, message):
    with pytest.raises(XFusionError, match=message):
        Templates(**wrong)


def test_all_answers_behind_shots_are_learned_and_their_ends_are_not_read():
    m = mixture(twins(), draw=0, caption=2, pack=1, shots=2, templates=Templates(question_share=1.0))
    (batch,) = m.batches(0)
    for sequence, ids, labels in zip(m.captionings(0), batch.text_ids.tolist(), batch.labels.tolist(), strict=True):
        said = [encode(f"name {i}") for i in indices(sequence)]
        question = sequence.segments[-2].ids
        # [EOI] and all letters but the last each say the next one, and the last says the end.
        shot = [[*answer, END] for answer in said]
        read = [END_OF_MEDIA, *said[0], END_OF_MEDIA, *said[1], END_OF_MEDIA, *question, *said[2]]
        wanted = [*shot[0], *shot[1], *[IGNORE] * len(question), *shot[2]]
        assert ids[: len(read)] == read and not any(ids[len(read) :])
        assert labels == wanted + [IGNORE] * (len(ids) - len(read))
    assert END not in batch.text_ids and int((batch.labels == END).sum()) == 6


def test_shapes_stay_fixed_with_shots_of_several_sizes():
    m = mixture(Squares(20), sizes=(24, 8), draw=0, caption=4, pack=2, shots=2)
    shapes = set()
    for step in range(20):
        (batch,) = m.batches(step)
        media = batch.media["image"]
        shapes.add(tuple(media.tokens.shape))
        found = [int((media.item == n).sum()) for n in range(len(media.noised))]
        assert Counter(found) == {4: 6, 36: 6} and batch.num_sequences == 4
        for sequence in m.captionings(step):  # the pictures of a sample are of one size
            assert len({s.size for s in sequence.segments if isinstance(s, Media)}) == 1
    assert shapes == {(2, 126, 48)}  # two samples of 3 x 37 and of 3 x 5 positions: both sizes in each row
    assert m.largest()[0].media["image"].tokens.shape == (2, 126, 48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": -1}, "shots -1: 0, or how many"),
        ({"source": twins(6), "shots": 3}, "squares: 3 shots and the picture .* there are 3: take fewer shots"),
    ],
)
def test_impossible_shots_are_refused(settings, message):
    with pytest.raises(XFusionError, match=message):
        mixture(**settings)


def test_shots_end_where_too_few_groups_can_be_read():
    """An example may become unreadable during a run: the search for other groups must not go on for ever."""
    made, tried = mixture(Squares(3), shots=2), []

    def watched(index, look=made._readable_index):
        tried.append(index)
        assert len(tried) < 200, "the search goes on"
        return look(index)

    made._readable_index = watched
    assert len(made.captionings(0)) == 4
    made.left_out = {1}
    tried.clear()
    with pytest.raises(XFusionError, match="squares: 2 shots .* of as many groups, but there are 2: take fewer shots"):
        made.captionings(0)


def test_what_was_left_out_still_is_if_the_widths_cannot_be_measured(monkeypatch):
    made = mixture()
    made.left_out = frozenset({1})
    monkeypatch.setattr(made, "drawings", lambda step: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.widths  # noqa: B018
    assert made.left_out == {1}
