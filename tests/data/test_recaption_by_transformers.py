"""Captions by a vision-language model of transformers: what its own generate says, the same after a break."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import Noise, tokenizer
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from xfusion.apps import cli
from xfusion.data.recaption import JOURNAL, LONG, Asking, recaption
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source
from xfusion.evaluation.adapters.transformers import captioner

TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} answer:"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    words = tokenizer()
    words.add_tokens(["<image>"], special_tokens=True)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=4),
        text_config=LlamaConfig(**sizes, vocab_size=len(words), eos_token_id=1, pad_token_id=2, bos_token_id=0),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def silent(*_):
    pass


@torch.no_grad()
def test_captions_are_what_its_own_generate_says(llava):
    name, ask = captioner(str(llava), device="cpu", max_tokens=12)
    pictures = [Noise(3).picture(i, 32) for i in range(3)]
    found = ask(pictures, "what is this?")
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = AutoProcessor.from_pretrained(llava)
    for picture, words in zip(pictures, found, strict=True):
        inputs = processor(images=picture, text="<image>what is this? answer:", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert words == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(set(found)) == 3  # or a model that is blind would pass
    assert len(name.rpartition("@")[2]) == 64 and captioner(str(llava), device="cpu", max_tokens=1)[0] == name


def test_a_model_without_a_chat_template_is_refused(llava, tmp_path):
    for path in llava.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(XFusionError, match="no chat template"):
        captioner(str(tmp_path), device="cpu", max_tokens=1)


def test_a_break_in_a_batch_makes_the_same_file(llava, tmp_path):
    name, ask = captioner(f"{llava}", device="cpu", max_tokens=12)
    asking = Asking(model=name, prompt=LONG, size=32, batch=2)
    source, whole, broken = Noise(5), tmp_path / "whole", tmp_path / "broken"
    assert recaption(source, ask, asking, whole, progress=silent) == (5, 5, [])
    calls = []

    def stops(pictures, prompt):
        calls.append(len(pictures))
        if len(calls) == 3:
            raise XFusionError("the machine went away")
        return ask(pictures, prompt)

    with pytest.raises(XFusionError, match="went away"):
        recaption(source, stops, asking, broken, progress=silent)
    journal = (broken / JOURNAL).read_text().splitlines(keepends=True)
    (broken / JOURNAL).write_text("".join(journal[:3]))  # the second batch was cut in its middle
    assert calls == [2, 2, 1] and recaption(source, ask, asking, broken, progress=silent) == (5, 2, [])
    for path in whole.iterdir():
        assert path.read_bytes() == (broken / path.name).read_bytes(), path.name


@pytest.mark.full
def test_the_command_asks_for_several_sentences(llava, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    for index in range(3):
        Noise(3).picture(index, 32).save(f"old/{index}.png")
        Path(f"old/{index}.txt").write_text(f"old words {index}\n")
    call = ["data", "recaption", "old", "--with", f"hf:{llava}", "-o", "new", "--size", "32", "--batch", "2"]
    assert cli.main([*call, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"] == 3
    lines = [json.loads(line) for line in Path(f"new/{JOURNAL}").read_text().splitlines()]
    assert {line["prompt"] for line in lines} == {LONG} and lines[0]["model"].startswith(f"{llava}@")
    _, ask = captioner(str(llava), device="cpu", max_tokens=256)
    source = open_source("old", split="all")
    expected = [*ask([source.picture(i, 32) for i in (0, 1)], LONG), *ask([source.picture(2, 32)], LONG)]
    assert [line["caption"] for line in lines] == [" ".join(words.split()) for words in expected]
    made = [json.loads(line) for line in Path("new/metadata.jsonl").read_text().splitlines()]
    assert made[2]["captions"] == [lines[2]["caption"], "old words 2"]
    assert cli.main(["data", "recaption", "old", "--with", "emoji", "-o", "other", "--batch", "2"]) == 2
    assert cli.main(["data", "recaption", "old", "--with", "hf:nowhere/none", "-o", "other"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
