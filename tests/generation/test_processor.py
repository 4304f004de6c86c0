"""Typed blocks in and out, in the base tokenizer's own chat template."""

import pytest
import torch
from contracts.table import Noise, make_model

import xfusion
from xfusion.data.sequence import Image, Text, XFusionError

TEMPLATE = "{% for m in messages %}<|begin|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}<|begin|>assistant "


@pytest.fixture
def model(bases, monkeypatch):
    made = make_model(bases["llama"])
    monkeypatch.setattr(made.backbone.tokenizer, "chat_template", TEMPLATE)
    return made


def text(words):
    return {"type": "text", "text": words}


def test_words_alone_are_what_the_base_is_asked(model):
    processor = xfusion.Processor(model)
    asked = [{"role": "user", "content": [text("a red "), text("apple")]}, {"role": "assistant", "content": "a cat"},
             {"role": "user", "content": "what is this?"}]  # fmt: skip
    plain = [{"role": m["role"], "content": "a red apple" if i == 0 else m["content"]} for i, m in enumerate(asked)]
    own = model.backbone.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    (segment,) = processor(asked)
    assert segment.ids == tuple(own)
    base = model.backbone.model.generate(torch.tensor([own]), max_new_tokens=5, do_sample=False, pad_token_id=1)
    reply = processor.reply(asked, max_tokens=5)
    assert reply == {"role": "assistant", "content": [text(model.backbone.decode(base[0, len(own) :].tolist()))]}


def test_pictures_stand_where_their_blocks_stood(model, tmp_path):
    processor, picture = xfusion.Processor(model), Noise(1).picture(0, 32)
    picture.save(tmp_path / "a.png")
    asked = [
        {"role": "user", "content": [text("look "), {"type": "image", "image": str(tmp_path / "a.png")}, text("what?")]}
    ]
    first, shown, last = processor(asked)
    read = model.backbone.tokenizer
    assert first.ids == tuple(read("<|begin|>user look ", add_special_tokens=False)["input_ids"])
    assert last.ids == tuple(read("what?<|end|><|begin|>assistant ", add_special_tokens=False)["input_ids"])
    assert shown.tobytes() == picture.tobytes() and isinstance(last, Text)
    reply = processor.reply(asked, max_tokens=4)
    assert reply["content"] == [text(model.generate([first, picture, last], max_tokens=4)[0])]
    # A picture out, and the conversation goes on with it.
    drawn = [{"role": "user", "content": [text("two birds"), {"type": "image", "size": 32}]}]
    *_, wanted = processor(drawn)
    assert wanted == Image(size=32)
    answer = processor.reply(drawn, steps=2)
    assert [b["type"] for b in answer["content"]] == ["image"] and answer["content"][0]["image"].size == (32, 32)
    assert (
        len(processor([*drawn[:0], {"role": "user", "content": "two birds"}, answer, {"role": "user", "content": "?"}]))
        == 3
    )


@pytest.mark.parametrize(("conversation", "message"), [
    ([{"role": "user", "content": [{"type": "video"}]}], "a block of type 'video'"),
    ([{"role": "user", "content": [{"type": "text"}]}], "a block of type 'text'"),
    ([{"role": "user", "content": "a \ue000"}], r"turn 1 hold the private character"),
    ([{"role": "user", "content": [{"type": "image"}]}, {"role": "user", "content": "b"}], "in the last turn alone"),
    ([{"role": "user", "content": [{"type": "image", "image": "none.png"}]}], "no such file"),
])  # fmt: skip
def test_what_is_no_conversation_is_refused(model, conversation, message):
    with pytest.raises(XFusionError, match=message):
        xfusion.Processor(model)(conversation)
