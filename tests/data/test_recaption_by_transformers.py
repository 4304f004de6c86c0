"""Captions by a vision-language model of transformers: what its own generate says, the same after a break."""

import json
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.pretrained import make_llava
from contracts.table import Noise
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from xfusion.apps import cli
from xfusion.backbone import EMBEDDED
from xfusion.backbone.sources import resolve_source
from xfusion.data.recaption import JOURNAL, LONG, Asking, recaption
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source
from xfusion.evaluation.adapters.transformers import captioner


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("llava"))


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
    # Random weights also say control characters, which are taken out.
    plain = [[re.sub("[\x00-\x1f\x7f-\x9f]", "", word) for word in words.split()] for words in expected]
    assert [line["caption"] for line in lines] == [" ".join(filter(None, words)) for words in plain]
    made = [json.loads(line) for line in Path("new/metadata.jsonl").read_text().splitlines()]
    assert made[2]["captions"] == [lines[2]["caption"], "old words 2"]
    assert cli.main(["data", "recaption", "old", "--with", "emoji", "-o", "other", "--batch", "2"]) == 2
    assert cli.main(["data", "recaption", "old", "--with", "hf:nowhere/none", "-o", "other"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- Qwen-VL and InternVL

CHAT = (
    "{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n{{% for part in m['content'] %}}{{% if part['type'] == 'image' %}}"
    "{}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
"""The chat template of both families, around the place of a picture."""
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
QWEN_VISION = {"depth": 2, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
QUESTION = "what is this?"


@dataclass
class Family:
    """A tiny random model of a family, saved as the hub has it, and how its own classes read a picture."""

    folder: Path
    model: Any
    tokenizer: Any
    images: Any
    picture_tokens: Any
    """Output of the image processor -> the picture in the prompt."""
    has_token_types: bool

    @torch.no_grad()
    def says(self, picture: Any, prompt: str, max_tokens: int) -> str:
        """The greedy answer by the classes themselves, without the processor."""
        inputs = self.images(picture, return_tensors="pt")
        words = f"<|im_start|>user\n{self.picture_tokens(inputs)}{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = self.tokenizer(words, return_tensors="pt")["input_ids"]
        beside = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        if self.has_token_types:
            beside["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        answer = self.model.generate(input_ids=ids, **beside, max_new_tokens=max_tokens, do_sample=False)
        return self.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


def ids_of(words: Any) -> dict[str, Any]:
    return {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}


def qwen_vl(kind: Any, config: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    words = AutoTokenizer.from_pretrained(resolve_source(EMBEDDED))
    words.add_tokens(list(QWEN_TOKENS), special_tokens=True)
    start, end, image, video = (words.convert_tokens_to_ids(token) for token in QWEN_TOKENS)
    sizes = config(
        text_config={**TEXT, **ids_of(words), "vocab_size": len(words), "rope_parameters": MROPE, **text},
        vision_config={**QWEN_VISION, "hidden_size": 32, **vision},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 4096}, patch_size=4)
    return kind(sizes), words, images, "<|vision_start|><|image_pad|><|vision_end|>", "Qwen2VLImageProcessor"


def internvl() -> Any:
    words = AutoTokenizer.from_pretrained(resolve_source(EMBEDDED), extra_special_tokens=INTERNVL_TOKENS)
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, **ids_of(words), "vocab_size": len(words)},
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True)
    return InternVLForConditionalGeneration(sizes), words, images, "<IMG_CONTEXT>\n", "GotOcr2ImageProcessorFast"


MAKERS = {
    "qwen2_5_vl": lambda: qwen_vl(
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, {}, {"window_size": 16, "fullatt_block_indexes": [1]}
    ),
    "qwen3_vl": lambda: qwen_vl(
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {"head_dim": 16},
        {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "internvl": internvl,
}


@pytest.fixture(scope="module", params=MAKERS)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, words, images, place, images_class = MAKERS[request.param]()
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    images.save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_processor_type": images_class}))
    (folder / "chat_template.jinja").write_text(CHAT.format(place))
    if request.param == "internvl":
        saved = {"image_seq_length": 4, "processor_class": "InternVLProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(saved))

    def picture_tokens(inputs):
        if request.param == "internvl":
            return f"<img>{'<IMG_CONTEXT>' * 4 * int(inputs['num_patches'][0])}</img>\n"
        return f"<|vision_start|>{'<|image_pad|>' * int(inputs['image_grid_thw'].prod() // 4)}<|vision_end|>"

    return Family(folder, model, words, images, picture_tokens, request.param != "internvl")


def test_the_command_captions_with_it_and_goes_on_after_a_break(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    for index in range(3):
        Noise(3).picture(index, 32).save(f"old/{index}.png")
        Path(f"old/{index}.txt").write_text(f"old words {index}\n")
    call = ["data", "recaption", "old", "--with", f"hf:{family.folder}", "-o", "new", "--prompt", QUESTION]
    call += ["--size", "32", "--max-tokens", "8", "--batch", "2", "--device", "cpu", "--json"]
    assert cli.main(call) == 0
    answer, journal = json.loads(capsys.readouterr().out), Path(f"new/{JOURNAL}").read_text()
    assert (answer["captions"], answer["asked"], answer["skipped"]) == (3, 3, [])
    lines = [json.loads(line) for line in journal.splitlines()]
    assert {(line["prompt"], line["model"]) for line in lines} == {(QUESTION, answer["model"])}
    assert answer["model"].startswith(f"{family.folder}@") and len(answer["model"].rpartition("@")[2]) == 64
    captions = [line["caption"] for line in lines]
    expected = [family.says(Noise(3).picture(index, 32), QUESTION, 8) for index in range(3)]
    assert captions == [" ".join(words.split()) for words in expected]
    assert len(set(captions)) == 3  # or a model that is blind would pass

    Path(f"new/{JOURNAL}").write_text(journal.splitlines(keepends=True)[0])
    Path("new/metadata.jsonl").unlink()
    assert cli.main(call) == 0
    assert json.loads(capsys.readouterr().out)["asked"] == 2
    assert Path(f"new/{JOURNAL}").read_text() == journal
    rows = [json.loads(line) for line in Path("new/metadata.jsonl").read_text().splitlines()]
    assert [row["captions"] for row in rows] == [[words, f"old words {i}"] for i, words in enumerate(captions)]


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_model_that_reads_pictures_only_through_torchvision_is_refused_in_one_line(family, tmp_path, capsys):
    for path in family.folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings["image_processor_type"] = "Sam2ImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert cli.main(["data", "recaption", "emoji:4", "--with", f"hf:{tmp_path}", "-o", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"xfusion: model {str(tmp_path)!r} cannot be loaded without torchvision (")
    assert said[0].endswith("): pip install torchvision") and "Sam2ImageProcessor" in said[0]
