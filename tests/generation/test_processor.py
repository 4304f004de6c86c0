"""Typed blocks in and out, in the base tokenizer's own chat template."""

import base64

import numpy
import pytest
import soundfile
import torch
from contracts.table import SOUND_RATE, Noise, hearing_model, make_model

import xfusion
from xfusion.data.sequence import Audio, Image, Sound, Text, XFusionError

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


@pytest.fixture
def hearing(bases, monkeypatch):
    made = hearing_model(bases["llama"], makes=True)
    monkeypatch.setattr(made.backbone.tokenizer, "chat_template", TEMPLATE)
    return made


def test_sounds_stand_where_their_blocks_stood(hearing, tmp_path):
    processor, file = xfusion.Processor(hearing), tmp_path / "a.wav"
    samples = numpy.round(numpy.random.default_rng(1).uniform(-0.9, 0.9, 28) * 32767).astype("float32") / 32768
    soundfile.write(file, samples, SOUND_RATE, subtype="PCM_16")
    url = "data:audio/wav;base64," + base64.b64encode(file.read_bytes()).decode()
    sound = Sound(samples=torch.from_numpy(samples), rate=SOUND_RATE)
    answers = set()
    # A sound, its file and a data URL, under transformers' names for them; samples alone are at the rate that the model hears.
    for block in ({"audio": sound}, {"audio": file}, {"path": str(file)}, {"url": url}, {"audio": samples}):
        asked = [{"role": "user", "content": [text("hear "), {"type": "audio", **block}, text("what?")]}]
        first, heard, last = processor(asked)
        read = hearing.backbone.tokenizer
        assert first.ids == tuple(read("<|begin|>user hear ", add_special_tokens=False)["input_ids"])
        assert last.ids == tuple(read("what?<|end|><|begin|>assistant ", add_special_tokens=False)["input_ids"])
        assert torch.equal(heard.samples, sound.samples) and heard.rate == SOUND_RATE
        (answer,) = processor.reply(asked, max_tokens=4)["content"]
        answers.add(answer["text"])
    assert answers == {hearing.generate([first, sound, last], max_tokens=4)[0]}
    # A sound to make; what comes out is frames.
    wanted = [{"role": "user", "content": [text("two birds"), {"type": "audio", "seconds": 0.015}]}]
    assert processor(wanted)[-1] == Audio(seconds=0.015)
    reply = processor.reply(wanted, steps=2)
    (made,) = reply["content"]
    assert made["type"] == "audio" and torch.equal(made["frames"], hearing.generate(processor(wanted), steps=2)[0])
    with pytest.raises(XFusionError, match="a sound that was made is frames"):
        processor([*wanted[:0], reply])


@pytest.mark.parametrize(("block", "message"), [
    ({"audio": "none.wav"}, "none.wav: no such file"),
    ({"url": "https://example.org/a.wav"}, "the sound https://example.org/a.wav is an address, and none is fetched"),
    ({"audio": "data:audio/wav;base64,%%"}, "the data URL of a sound is not base64"),
    ({"audio": "data:audio/wav;base64,AAAA"}, "the data URL of a sound is not a sound"),
    ({"audio": 7}, "a sound is given as int: give its file, a data URL, or the sound itself"),
    ({"audio": numpy.zeros((2, 9), "float32")}, "a sound is a row of floats at a rate"),
])  # fmt: skip
def test_what_is_no_sound_is_refused(hearing, block, message):
    with pytest.raises(XFusionError, match=message):
        xfusion.Processor(hearing)([{"role": "user", "content": [{"type": "audio", **block}]}])


def test_samples_alone_need_a_model_that_hears(model):
    block = {"type": "audio", "audio": numpy.zeros(9, "float32")}
    with pytest.raises(XFusionError, match="this model knows pictures, not sounds"):
        xfusion.Processor(model)([{"role": "user", "content": [block]}])


@pytest.mark.parametrize(("conversation", "message"), [
    ([{"role": "user", "content": [{"type": "video"}]}], "a block of type 'video'"),
    ([{"role": "user", "content": [{"type": "text"}]}], "a block of type 'text'"),
    ([{"role": "user", "content": ["hi"]}], r"'hi' \(str\) is no block: write"),
    ([{"role": "user", "content": 7}], "the content of turn 1 is int: give text or a list of blocks"),
    ([{"role": "user", "content": "a"}, {"content": "b"}], "turn 2 has no role: write"),
    (["hi"], "turn 1 has no role: write"),
    ([{"role": "user", "content": "a \ue000"}], r"turn 1 hold the private character"),
    ([{"role": "user", "content": [{"type": "image"}]}, {"role": "user", "content": "b"}], "in the last turn alone"),
    ([{"role": "user", "content": [{"type": "audio"}]}, {"role": "user", "content": "b"}], "a sound to make stands in"),
    ([{"role": "user", "content": [{"type": "image", "image": "none.png"}]}], "no such file"),
])  # fmt: skip
def test_what_is_no_conversation_is_refused(model, conversation, message):
    with pytest.raises(XFusionError, match=message):
        xfusion.Processor(model)(conversation)


def test_a_turn_without_content_says_nothing(model):
    """As OpenAI's clients write an answer that is a call of a tool alone."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}]
    processor = xfusion.Processor(model)
    assert processor(turns) == processor([turns[0], turns[1] | {"content": ""}, turns[2]])
    assert processor([turns[0], {"role": "assistant"}, turns[2]]) == processor(turns)
