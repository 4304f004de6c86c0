"""Text-only prompts as one padded batch, held to transformers' own `generate` of this batch."""

import pytest
import torch
from contracts.table import BASES, make_model

from xfusion.data.sequence import XFusionError
from xfusion.generation import PLAIN, rows_together, text_only_tokens

TEXTS = ("a red apple", "a", "two blue birds and a cat, what is this?", "the green tree")
MAX_TOKENS = (9, 20, 4, 14)


@pytest.fixture(scope="module")
def model(bases):
    return make_model(bases["llama"])


def prompts_of(model):
    return [model.backbone.encode(text) for text in TEXTS]


def of_transformers(model, prompts, count):
    """What the base's own `generate` adds to prompts that are padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": count, "pad_token_id": 1, "do_sample": False, **PLAIN}
    return model.backbone.model.generate(ids, attention_mask=mask, **settings)[:, width:].tolist()


@pytest.mark.parametrize("family", BASES)
def test_a_batch_is_transformers_own_and_says_what_its_rows_say_alone(bases, family):
    model = make_model(bases[family])
    prompts = prompts_of(model)
    found = text_only_tokens(model, prompts, max_tokens=MAX_TOKENS)
    expected = of_transformers(model, prompts, max(MAX_TOKENS))
    assert found == [row[:count] for row, count in zip(expected, MAX_TOKENS, strict=True)]
    for prompt, count, row in zip(prompts, MAX_TOKENS, found, strict=True):
        assert text_only_tokens(model, [prompt], max_tokens=[count]) == [row]
        assert of_transformers(model, [prompt], count) == [row]


def test_each_row_ends_by_itself(model, monkeypatch):
    """At its limit, its end token, or where its listener wants no more, and says so before the others have ended."""
    prompts = prompts_of(model)
    plain = of_transformers(model, prompts, 20)
    heard, ended = [[] for _ in prompts], []
    others = plain[0][:9] + plain[2][:4] + plain[3][:6]
    end = next(token for i, token in enumerate(plain[1]) if i and token not in plain[1][:i] + others)
    monkeypatch.setattr(model.backbone.model.generation_config, "eos_token_id", [1, end])

    def listen(row, token):
        heard[row].append(token)
        return row != 3 or len(heard[3]) < 6

    def note(row, ids):
        ended.append((row, len(ids), max(map(len, heard))))

    found = text_only_tokens(model, prompts, max_tokens=MAX_TOKENS, listen=listen, ended=note)
    until_end = 1 + plain[1].index(end)
    expected = [plain[0][:9], plain[1][:until_end], plain[2][:4], plain[3][:6]]
    assert found == expected
    assert heard == [expected[0], expected[1][:-1], expected[2], expected[3]]
    assert {row: count for row, count, _ in ended} == {0: 9, 1: until_end, 2: 4, 3: 6}
    assert all(longest in (count - 1, count) for _, count, longest in ended)


def test_a_batch_ends_with_its_last_row(model, monkeypatch):
    passes, forward = [], type(model.backbone.model).forward

    def counted(*given, **known):
        passes.append(1)
        return forward(*given, **known)

    monkeypatch.setattr(type(model.backbone.model), "forward", counted)
    left = [1, 3, 2, 1]

    def listen(row, token):
        left[row] -= 1
        return left[row] > 0

    text_only_tokens(model, prompts_of(model), max_tokens=[300] * 4, listen=listen)
    assert len(passes) == 3 and left == [0] * 4


def test_a_base_that_names_no_end_goes_on_to_each_limit(model, monkeypatch):
    monkeypatch.setattr(model.backbone.model.generation_config, "eos_token_id", None)
    prompts = prompts_of(model)
    expected = of_transformers(model, prompts, max(MAX_TOKENS))
    found = text_only_tokens(model, prompts, max_tokens=MAX_TOKENS)
    assert found == [row[:count] for row, count in zip(expected, MAX_TOKENS, strict=True)]
    with pytest.raises(XFusionError, match="^there is nothing to continue: the prompt is empty$"):
        text_only_tokens(model, [(5,), ()], max_tokens=[2, 2])


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "most", "expected"),
    [
        ([40, 30, 50], [16] * 3, 8, [0, 1, 2]),
        ([40, 30, 50], [16] * 3, 1, [0]),
        ([40, 30, 50], [16] * 3, 2, [0, 1]),
        ([40, 400, 30, 50], [16] * 4, 8, [0, 1]),  # 3 x 400 is more than twice 40 + 400 + 50
        ([2000, 10, 10, 1500], [16] * 4, 8, [0, 1, 3]),
        ([9000, 9000, 9000, 9000], [16] * 4, 8, [0, 1, 2]),  # 32,768 positions
        ([9000, 9000, 9000, 9000], [16, 10_000, 16, 16], 8, [0, 2, 3]),
        ([40_000, 40_000], [16] * 2, 8, [0]),
    ],
)
def test_what_shares_a_batch_is_bounded(model, prompts, max_tokens, most, expected):
    assert rows_together(model, prompts, max_tokens, most) == expected


def test_rows_that_ended_stay_within_the_learned_positions(bases):
    model = make_model(bases["gpt2"])
    learned = model.backbone.longest
    assert rows_together(model, [learned - 8, learned - 30], [4, 30], 8) == [0]
    assert rows_together(model, [learned - 8, learned - 30], [4, 8], 8) == [0, 1]
