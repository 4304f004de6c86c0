"""Words after pictures: captions, scores and lists of segments, held to full uncached passes."""

from functools import partial

import pytest
import torch
from contracts.table import ROWS, Noise, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

import xfusion
from xfusion.backbone import Backbone
from xfusion.data.pack import pack
from xfusion.data.sequence import Media, Sequence, Text, XFusionError
from xfusion.data.templates import question_text, with_begin
from xfusion.generation import PLAIN, PLAIN_SAMPLING, TooLong, log_likelihoods, prompt_length, score_names
from xfusion.generation import segments as generation

PICTURES = [Noise().picture(i, 16) for i in range(4)]


@pytest.fixture(scope="module")
def model(bases):
    return make_model(bases["qwen3"])


def media_of(model, picture):
    return Media(tokens=model.image.encode([picture], 16)[0], grid=(4, 4))


@torch.no_grad()
def logits_after(model, segments):
    """Logits of every text row behind the last picture, by one uncached pass on the reference path."""
    batch = pack([[Sequence(segments=with_begin(model.backbone.begin_ids, segments))]])
    with model.using(model.reference_engine()):
        hidden, run = model.run_pass(batch)
        return model.engine.backbone.logits(hidden[:, run.slices["text"]])[0]


def greedy(model, segments, count):
    """Greedy answer, everything computed again for every token."""
    answer = []
    while len(answer) < count:
        token = int(logits_after(model, (*segments, Text(ids=tuple(answer))))[-1].argmax())
        if token in model.backbone.end_ids:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize(("fusion", "family"), ROWS)
@pytest.mark.parametrize("question", ["", "What is this?"])
def test_captions_are_the_uncached_greedy_answers(bases, fusion, family, question, request):
    model = make_model(bases[family], fusion)
    found = model.caption(PICTURES, question=question, max_tokens=9)
    tail = (Text(ids=model.backbone.encode(question_text(question))),) if question else ()
    if request.node.get_closest_marker("full") is None:
        assert len(set(found)) > 1
    # Some random models of the slow tier say the same of all pictures, but what they see of them moves every model's scores.
    one, other = (logits_after(model, (media_of(model, p), *tail, Text(ids=())))[-1] for p in PICTURES[:2])
    assert float((one - other).abs().max()) > 1e-2
    for picture, text in zip(PICTURES, found, strict=True):
        expected = greedy(model, (media_of(model, picture), *tail), 9)
        assert text == model.backbone.decode(expected).strip()
        assert model.caption([picture], question=question, max_tokens=9) == [text]


def test_an_answer_ends_at_the_end_token_without_it(model, monkeypatch):
    free = greedy(model, (media_of(model, PICTURES[0]),), 9)
    stop = free[4]
    monkeypatch.setattr(type(model.backbone), "end_ids", (stop,))
    assert model.caption(PICTURES[:1], max_tokens=9) == [model.backbone.decode(free[: free.index(stop)]).strip()]


def test_sampled_captions_depend_on_their_seed_only(model):
    settings = {"max_tokens": 8, "temperature": 1.5, "top_p": 0.9}
    together = model.caption(PICTURES, seed=5, **settings)
    assert [model.caption([p], seed=5 + k, **settings)[0] for k, p in enumerate(PICTURES)] == together
    assert model.caption(PICTURES, seed=50, **settings) != together


def test_one_picture_where_a_list_is_expected_is_said_in_one_line(model):
    one, names = PICTURES[0], ["red apple", "tree"]
    alone = r"one picture was given where a list of them is expected: write \[picture\]"
    for call, said in (
        (lambda: model.caption(one), alone),
        (lambda: model.score_names(one, names), alone),
        (lambda: log_likelihoods(model, [[one], "what?"], names), r"\(list\) is not a segment: give str"),
        (lambda: model.score([one], names), "a list was given where one picture or sound is expected"),
    ):
        with pytest.raises(XFusionError, match=said):
            call()


def test_captions_in_parts(model, monkeypatch):
    expected = model.caption(PICTURES, max_tokens=5, temperature=1.0)
    monkeypatch.setattr("xfusion.generation.base.BATCH", 3)
    assert model.caption(PICTURES, max_tokens=5, temperature=1.0) == expected
    assert model.caption([]) == []


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(("fusion", "family"), ROWS)
def test_scores_are_the_mean_of_a_full_uncached_pass(bases, fusion, family):
    model = make_model(bases[family], fusion)
    names = ["red apple", "a", "", "two blue birds on a table", "дом 🍎"]
    found = model.score_names(PICTURES[:2], names)
    assert found.shape == (2, 5) and found.dtype == torch.float32
    for picture, row in zip(PICTURES[:2], found, strict=True):
        for name, score in zip(names, row.tolist(), strict=True):
            answer = (*model.backbone.encode(name), model.backbone.end_ids[0])
            logits = logits_after(model, (media_of(model, picture), Text(ids=answer[:-1])))
            told = logits.log_softmax(-1)[range(len(answer)), list(answer)]
            assert score == pytest.approx(float(told.mean()), abs=1e-4)
    lengths = torch.tensor([len(model.backbone.encode(name)) + 1 for name in names])
    assert torch.equal(model.score_names(PICTURES[:2], names, summed=True), found * lengths)
    assert model.score(PICTURES[0], names) == pytest.approx(found[0].tolist(), abs=1e-5)


@torch.no_grad()
def test_many_names_are_scored_in_passes_of_a_bounded_size(bases, monkeypatch):
    """The prefix's keys and values are copied for each name of a pass, and the vocabulary's logits made for each token."""
    model, sizes = make_model(bases["llama"]), []
    names = [f"{'a ' * (i % 3)}red apple {i}" for i in range(20)]
    expected, run_pass = model.score_names(PICTURES[:2], names), model.run_pass

    def run(batch, *, cache, **settings):
        count = len(batch.text_ids)
        sizes.append((count * (cache.rows.count + batch.text.count), count * batch.text.count))
        return run_pass(batch, cache=cache, **settings)

    monkeypatch.setattr(model, "run_pass", run)
    for positions, tokens in ((150, 1000), (1000, 40), (1, 1)):
        monkeypatch.setattr("xfusion.generation.words.SCORED_POSITIONS", positions, raising=False)
        monkeypatch.setattr("xfusion.generation.words.SCORED_TOKENS", tokens, raising=False)
        sizes.clear()
        torch.testing.assert_close(model.score_names(PICTURES[:2], names), expected, rtol=0, atol=1e-5)
        if positions > 1:
            assert max(size for size, _ in sizes) <= positions and max(size for _, size in sizes) <= tokens
        assert len(sizes) > 2 * 5


@torch.no_grad()
def test_scores_without_a_picture_read_the_end_row_alone(model):
    names = ["red apple", "tree"]
    found = model.score_names(None, names)
    assert found.shape == (1, 2)
    assert model.score(None, names) == pytest.approx(found[0].tolist(), abs=1e-5)
    for name, score in zip(names, found[0].tolist(), strict=True):
        ids = model.backbone.encode(name)
        rows = torch.cat([model.port.end[None], model.backbone.embed(torch.tensor(ids))])
        logits = model.backbone.model(inputs_embeds=rows[None]).logits[0].log_softmax(-1)
        answer = [*ids, model.backbone.end_ids[0]]
        assert score == pytest.approx(float(logits[range(len(answer)), answer].mean()), abs=1e-4)


@pytest.mark.parametrize(("fusion", "family"), ROWS)
@torch.no_grad()
def test_likelihoods_behind_any_list_are_those_of_a_full_pass(bases, fusion, family):
    model = make_model(bases[family], fusion)
    answers = ["red apple", "a", "дом 🍎"]
    newline = Text(ids=model.backbone.encode("\n"))
    words = Text(ids=model.backbone.encode("what is this?"))
    one, two = PICTURES[:2]
    for items, context in (
        ([one], (media_of(model, one),)),
        (["look", one, two, "what is this?"],
         (Text(ids=model.backbone.encode("look")), media_of(model, one), media_of(model, two), words, newline)),
    ):  # fmt: skip
        said = model.generate(items, max_tokens=2)[0]
        for answer, (likely, is_greedy) in zip(
            [*answers, said], log_likelihoods(model, items, [*answers, said]), strict=True
        ):
            ids = model.backbone.encode(answer)
            rows = logits_after(model, (*context, Text(ids=ids)))[-len(ids) - 1 : -1]
            assert likely == pytest.approx(float(rows.log_softmax(-1)[range(len(ids)), list(ids)].sum()), abs=1e-3)
            assert is_greedy == (rows.argmax(-1).tolist() == list(ids))


def test_likelihoods_of_words_alone_are_the_bases(model):
    prompt, answer = model.backbone.encode("a red"), model.backbone.encode(" apple tree")
    ((likely, is_greedy),) = log_likelihoods(model, ["a red"], [" apple tree"])
    with torch.no_grad():
        logits = model.backbone.model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    rows = logits[len(prompt) - 1 : -1]
    assert likely == pytest.approx(float(rows[range(len(answer)), list(answer)].sum()), abs=1e-4)
    assert is_greedy == (rows.argmax(-1).tolist() == list(answer))
    for items, answers, message in (
        (["a"], [""], "the answer '' has no tokens"),
        ([""], ["a"], "the prompt is empty"),
        (["a", xfusion.Image()], ["a"], "still to be made"),
    ):
        with pytest.raises(XFusionError, match=message):
            log_likelihoods(model, items, answers)


# ----------------------------------------------------------------------------------------------------------- segments


def base_generate(model, text, count):
    ids = torch.tensor([model.backbone.encode(text)])
    out = model.backbone.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=1
    )
    return model.backbone.decode(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_text_alone_is_continued_by_the_base(bases, family):
    model = make_model(bases[family])
    texts = ["a red apple", "что это? 🍎", "two"]
    assert model.generate([[t] for t in texts], max_tokens=9) == [[base_generate(model, t, 9)] for t in texts]
    assert model.generate(["a red", " apple"], max_tokens=9) == [
        model.backbone.decode(
            model.backbone.model.generate(
                torch.tensor([[*model.backbone.encode("a red"), *model.backbone.encode(" apple")]]),
                max_new_tokens=9,
                do_sample=False,
                pad_token_id=1,
            )[0, len(model.backbone.encode("a red")) + len(model.backbone.encode(" apple")) :].tolist()
        )
    ]


def test_sampling_means_the_same_with_and_without_pictures(bases, monkeypatch):
    """What the base's generation_config adds by itself holds for neither; what is asked for holds for both."""
    model = make_model(bases["llama"])
    base, text = model.backbone.model, "a red apple"
    ids = torch.tensor([model.backbone.encode(text)])

    def by_the_base(seed, **sampling):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out = base.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, pad_token_id=1, **PLAIN, **sampling
            )
        return model.backbone.decode(out[0, ids.shape[1] :].tolist())

    wide = {"max_tokens": 12, "temperature": 3.0}
    free = [model.generate([text], seed=seed, **wide)[0] for seed in range(4)]
    asked = {"do_sample": True, "temperature": 3.0, "top_p": 1.0, "top_k": 0, **PLAIN_SAMPLING}
    assert free == [by_the_base(seed, **asked) for seed in range(4)] and len(set(free)) == 4
    greedy_answer, of_pictures = model.generate([text], max_tokens=12), model.generate([PICTURES[0], "what?"], **wide)
    with monkeypatch.context() as patch:  # what a vendor may have written beside the weights
        patch.setattr(base.generation_config, "top_k", 1)
        patch.setattr(base.generation_config, "repetition_penalty", 1.9)
        patch.setattr(base.generation_config, "no_repeat_ngram_size", 1)
        patch.setattr(base.generation_config, "min_p", 0.9)
        assert [model.generate([text], seed=seed, **wide)[0] for seed in range(4)] == free
        assert model.generate([text], max_tokens=12) == greedy_answer == [by_the_base(0, do_sample=False)]
        assert model.generate([PICTURES[0], "what?"], **wide) == of_pictures
    assert model.generate([text], top_k=1, **wide) == greedy_answer
    assert model.generate([PICTURES[0]], top_k=1, **wide) == model.generate([PICTURES[0]], max_tokens=12)
    assert model.caption(PICTURES, top_k=1, temperature=2.0, max_tokens=6) == model.caption(PICTURES, max_tokens=6)


def test_two_pictures_of_one_list_have_noise_of_their_own(model):
    items = ["a red apple", xfusion.Image(), xfusion.Image(), xfusion.Image()]
    settings = {"steps": 1, "guidance": 1.0}
    seeds, draw_tokens = [], generation.draw_tokens

    def spy(*given, **known):
        seeds.append(known["seeds"])
        return draw_tokens(*given, **known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "draw_tokens", spy)
        drawn = model.generate(items, seed=3, **settings)
        model.generate([items, items], seed=3, **settings)
    assert seeds[0] == [3] and seeds[3] == [3, 4]
    assert len({seed for batch in seeds[3:] for seed in batch}) == 6
    assert [batch[0] for batch in seeds[3:]] == [seed for (seed,) in seeds[:3]]  # a batch is its singles
    assert drawn[0].tobytes() == model.draw(["a red apple"], seed=3, **settings)[0].tobytes()


def test_sampled_text_depends_on_its_seed_and_leaves_the_global_generator(model):
    settings = {"max_tokens": 12, "temperature": 1.0, "seed": 4}
    state = torch.get_rng_state()
    one = model.generate([["a red apple"], ["two birds"]], **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generate(["two birds"], **{**settings, "seed": 5}) == one[1]
    assert model.generate([["a red apple"]], **{**settings, "seed": 6}) != one[:1]


def test_a_mixed_batch_keeps_its_order_and_says_what_its_singles_say(model):
    a, b = PICTURES[:2]
    lists = [
        ["a red apple", xfusion.Image()],
        [a, "What is this?"],
        ["two birds"],
        ["a cat", xfusion.Image(size=32)],
        [b, "What?"],
        [a],
        ["a red", " house", xfusion.Image()],
        ["look", b, "and", xfusion.Image(), "then"],
        [xfusion.Image()],
        ["", xfusion.Image()],
        ["a long prompt of another length", xfusion.Image()],
    ]
    settings = {"steps": 3, "max_tokens": 6}
    together = model.generate(lists, seed=20, **settings)
    kinds = [[type(s).__name__ for s in answer] for answer in together]
    picture, text = ["Image"], ["str"]
    assert kinds == [picture, text, text, picture, text, text, picture, [*picture, *text], picture, picture, picture]
    assert [answer[0].size for answer in together if answer[0].__class__ is PILImage.Image] == [
        (16, 16),
        (32, 32),
        *[(16, 16)] * 5,
    ]
    for k, segments in enumerate(lists):
        alone = model.generate(segments, seed=20 + k, **settings)
        for one, other in zip(alone, together[k], strict=True):
            if isinstance(one, str):
                assert one == other
            else:
                # A picture that was resized or read again may move by another level or two.
                assert max(abs(x - y) for x, y in zip(one.tobytes(), other.tobytes(), strict=True)) <= 2


def test_drawing_in_a_list_is_drawing_and_what_follows_reads_the_clean_picture(model):
    drawn, said = model.generate(["a red apple", xfusion.Image(), "what"], seed=3, steps=3, max_tokens=5)
    (plain,) = model.draw(["a red apple"], seed=3, steps=3)
    assert drawn.tobytes() == plain.tobytes()
    from xfusion.generation import draw_tokens

    prompt = Text(ids=model.backbone.encode("a red apple"))
    tokens = draw_tokens(model, [(prompt,)], 16, seeds=[3], steps=3, guidance=3.0)
    clean = Media(tokens=tokens[0], grid=(4, 4))
    rest = Text(ids=(*model.backbone.encode("what"), *model.backbone.encode("\n")))
    assert said == model.backbone.decode(greedy(model, (prompt, clean, rest), 5))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("a red apple", "generate takes a list of segments"),
        ([], "generate takes a list of segments"),
        ([""], "the prompt is empty"),
        ([[""]], "the prompt is empty"),
        ([xfusion.Audio()], "makes no sound: it can caption, draw, text"),
        ([3], r"3 \(int\) is not a segment"),
        (["a", None], r"None \(NoneType\) is not a segment"),
        (["a" * 2000], "the prompt has .* tokens, more than the 512"),
    ],
)
def test_what_cannot_be_continued_is_refused(model, items, message):
    with pytest.raises(XFusionError, match=message):
        model.generate(items)


def test_words_alone_are_read_as_far_as_the_base_can(model, monkeypatch):
    """Among media there is a bound of our own; the base's own places bound both."""
    monkeypatch.setattr("xfusion.generation.base.MAX_PROMPT_TOKENS", 8)
    words, places = "a red apple on a white table", model.backbone.context_length
    ids = torch.tensor([model.backbone.encode(words)])
    assert 8 < ids.shape[1] < places
    whole = model.backbone.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    expected = model.backbone.decode(whole[0, ids.shape[1] :].tolist())
    assert model.generate([words], max_tokens=3) == model.generate([words[:5], words[5:]], max_tokens=3) == [expected]
    assert prompt_length(model, [words]) == ids.shape[1]
    half = "я" * (places // 4 + 1)  # of two bytes, a token each
    for items, limit in (([PICTURES[0], words], 8), ([words, xfusion.Image()], 8), ([half, half], places)):
        with pytest.raises(TooLong, match=f"tokens, more than the {limit} that are allowed"):
            model.generate(items, max_tokens=3)
        with pytest.raises(TooLong, match=f"tokens, more than the {limit} that are allowed"):
            prompt_length(model, items)


def test_prompts_of_parts_are_held_to_the_context_as_a_whole(model, monkeypatch):
    """Each text alone would be short enough; refused before any picture is drawn or read."""
    places = model.backbone.context_length
    part, question = Text(ids=(50,) * (places // 2 - 4)), "я" * (places // 2)
    monkeypatch.setattr(type(model), "run_pass", None)
    for items in ([PICTURES[0], part, PICTURES[1], part], [part, xfusion.Image(), part], [part, part, xfusion.Image()]):
        with pytest.raises(
            TooLong, match=f"the prompt takes 5[0-9]{{2}} places, more than the {places} that are allowed"
        ):
            model.generate(items, max_tokens=3)
        with pytest.raises(TooLong, match="places, more than"):
            prompt_length(model, items)
    for ask in (model.caption, partial(score_names, model, names=["a"])):
        with pytest.raises(TooLong, match=f"the prompt has {places + 1} tokens, more than the {places}"):
            ask(PICTURES[:1], question=question)
    with pytest.raises(TooLong, match=f"the prompt takes 5[0-9]{{2}} places, more than the {places}"):
        model.caption(PICTURES[:1], question=question[: places // 2 - 6])


def test_an_answer_stays_within_the_learned_positions(bases):
    """Behind the last of them nothing can be computed: said before the first token, not in the middle of a stream."""
    model, heard = make_model(bases["gpt2"]), []

    def listen(index, token):
        heard.append((index, token))
        return True

    text = Text(ids=(50,) * 508)
    assert model.generate([text], max_tokens=5) != [""]
    message = "the prompt takes [0-9]+ places and its answer up to [0-9]+, more than the 512 that the base has learned"
    for items, count in (([text], 6), ([PICTURES[0], Text(ids=(50,) * 480)], 40)):
        with pytest.raises(TooLong, match=message):
            model.generate(items, max_tokens=count, listen=listen)
    with pytest.raises(TooLong, match=message):
        model.caption(PICTURES[:1], question="я" * 230, max_tokens=64)
    assert not heard


def test_a_base_without_an_end_token_answers_and_says_what_it_cannot(bases):
    base = Backbone.load(bases["llama"].source)
    base.tokenizer.eos_token = base.model.generation_config.eos_token_id = None
    model = make_model(base)
    assert model.generate(["a red"], max_tokens=2) and model.caption(PICTURES[:1], max_tokens=2)
    schema = {"enum": ["a", "b"]}
    for ask in (
        lambda: model.score(PICTURES[0], ["a", "b"]),
        lambda: model.generate(["a red"], schema=schema),
        lambda: model.generate([PICTURES[0], "a"], schema=schema),
    ):
        with pytest.raises(
            XFusionError, match=r"names a token that ends an answer: set eos_token in tokenizer_config.json"
        ):
            ask()


def test_a_model_made_in_inference_mode_answers(bases):
    """Its weights have no versions by which a cached prefix could be known to be theirs: nothing is cached."""
    model = make_model(bases["llama"])
    expected = model.caption(PICTURES[:1], max_tokens=4)
    with torch.inference_mode():
        made = make_model(bases["llama"])
        assert made.caption(PICTURES[:1], max_tokens=4) == made.caption(PICTURES[:1], max_tokens=4) == expected
    assert model.engine.turns and not made.engine.turns


def test_special_tokens_in_a_prompt_stay_text(model):
    end = model.backbone.end_ids[0]
    assert model.backbone.special_tokens and "<|end|>" in model.backbone.special_tokens
    ids = model.backbone.encode("say <|end|> twice")
    assert end not in ids and model.backbone.decode(list(ids)) == "say <|end|> twice"


@settings(max_examples=20)
@given(st.text(min_size=1, max_size=12))
def test_any_unicode_prompt_is_continued_and_comes_back(bases, text):
    model = make_model_once(bases)
    assert model.backbone.decode(list(model.backbone.encode(text))) == text
    (said,) = model.generate([PICTURES[0], text], max_tokens=2)
    assert isinstance(said, str)


def make_model_once(bases, kept={}):  # noqa: B006 (one model for all examples)
    if not kept:
        kept["model"] = make_model(bases["llama"])
    return kept["model"]


@pytest.mark.parametrize("media", [[], PICTURES[:1]], ids=["words", "picture"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 must be >= 0"),
        ({"temperature": float("nan")}, "temperature nan must be >= 0"),
        ({"temperature": float("inf")}, "temperature inf must be >= 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p 0.0 within \(0, 1\]"),
        ({"temperature": 1.0, "top_k": -1}, "top_k -1 0 or more"),
        ({"max_tokens": 0}, "max_tokens 0: an answer has at least 1"),
        ({"seed": 2**63}, f"seed {2**63}: choose a whole number"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sampling_settings_out_of_range_are_refused_with_and_without_a_picture(model, media, settings, message):
    with pytest.raises(XFusionError, match=message):
        model.generate([*media, "What is this?"], **settings)


def test_a_batch_is_of_lists_and_none_of_them_is_empty(model):
    with pytest.raises(XFusionError, match=r"\[\] is none: write \[segment\]"):
        model.generate([[]])
    with pytest.raises(XFusionError, match=r"'hello' is none: write \[segment\]"):  # not five texts of one letter
        model.generate([["a red apple"], "hello"])
    with pytest.raises(XFusionError, match="there is no turn to answer"):
        model.answer([], draw="never")


def test_no_text_has_no_score(model):
    assert model.score(PICTURES[0], []) == []
    assert model.score_names(PICTURES, []).shape == (len(PICTURES), 0)


def test_half_a_character_is_refused_in_one_line(model):
    """Bytes of a command line that are not UTF-8, and an escape of JSON cut in two, arrive as lone surrogates."""
    head = {"role": "user", "content": "a \udcff cat"}
    for ask in (
        lambda: model.generate(["a \udcff cat"]),
        lambda: model.generate([PICTURES[0], "a \udcff cat"]),
        lambda: model.draw(["a \udcff cat"]),
        lambda: model.score(PICTURES[0], ["a \udcff cat"]),
        lambda: model.answer([head], draw="never"),
        lambda: model.backbone.encode_spans("a \udcff cat"),
    ):
        with pytest.raises(XFusionError, match=r"is not valid Unicode: '\\udcff' is half a character"):
            ask()


def test_a_drawing_has_a_finite_guidance(model):
    with pytest.raises(XFusionError, match="guidance nan: give a number"):
        model.draw(["a red apple"], guidance=float("nan"))
