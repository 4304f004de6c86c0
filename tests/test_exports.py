"""What is exported gives the logits that the pack gives; what has no class elsewhere is refused in one line."""

import json
import re
import sys
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage
from tokenizers import normalizers, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).parent))

import transformers
from contracts.table import make_model, model_config, randomise, words
from transformers import CLIPConfig, CLIPModel, LlavaForConditionalGeneration, SiglipVisionConfig, SiglipVisionModel

from xfusion.apps import cli
from xfusion.backbone import Backbone
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Sound, Text, XFusionError
from xfusion.exports.base import export
from xfusion.exports.transformers import decoder, layout, nearest
from xfusion.fusion.adaption_prompt import AdaptionPrompt
from xfusion.fusion.connectors.linear import Linear
from xfusion.fusion.connectors.mlp import MLP
from xfusion.fusion.connectors.pooling import Pooling
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.lora import Lora
from xfusion.fusion.prefix import Prefix
from xfusion.generation import conversation
from xfusion.modalities.audio import AudioModality
from xfusion.modalities.codecs.features import Features
from xfusion.modalities.encoders.vision_transformer import VisionTransformer
from xfusion.modalities.encoders.whisper import Whisper
from xfusion.modalities.image import ImageModality
from xfusion.model import Model
from xfusion.objectives.base import NoObjective
from xfusion.recipes import base as recipes

IDS = torch.tensor([words(11, 1).ids, words(11, 2).ids])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_a_low_rank_tower_is_pefts_lora(bases, family, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (extra dev): no adapter can be loaded")
    model = make_model(bases[family], "low-rank tower")
    export(model, tmp_path / "adapter", "peft")
    with pytest.raises(XFusionError, match="adapter is not empty"):  # a pack neither: nothing is replaced by an export
        export(model, tmp_path / "adapter", "peft")

    def tower(index, frozen, x, call):
        return model.fusion.block(index, frozen)(x, **call)

    expected = model.backbone.shadow_model(tower)(IDS).logits
    base = Backbone.load(bases[family].source).model
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=0, atol=1e-5)
    with theirs.disable_adapter():
        assert float((theirs(IDS).logits - expected).abs().max()) > 1e-2


@torch.no_grad()
def test_prompts_of_a_family_without_a_place_in_peft_are_refused(bases, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (extra dev)")
    model = make_model(bases["qwen3"], "llama-adapter")
    for block in model.fusion.blocks.values():
        block.gate.fill_(0.3)
    with pytest.raises(XFusionError, match="peft has such prompts for llama, mistral, and the base is qwen3"):
        export(model, tmp_path / "none", "peft")


@torch.no_grad()
def test_prompts_are_pefts(bases, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (extra dev): no adapter can be loaded")
    connector = Resampler.Config(latents=1, depth=1, heads=1, head_width=8, mlp=1)
    fusion = AdaptionPrompt.Config(prompts=4, layers=(1, 4), connector=connector)
    model = Model(replace(model_config(bases["llama"], "llama-adapter"), fusion=fusion), bases["llama"]).eval()
    randomise(model)
    with pytest.raises(XFusionError, match="one gate per layer, and the heads of layer 1 have their own"):
        export(model, tmp_path / "none", "peft")
    assert not (tmp_path / "none").exists()
    for index, block in model.fusion.blocks.items():
        block.gate.fill_(0.2 + 0.1 * int(index))
    # A picture whose own row is nothing, so that all words stand behind one: as in tests/parity/test_adaption_prompt.py.
    model.fusion.connector.norm.weight.zero_()
    model.fusion.connector.norm.bias.zero_()
    from contracts.table import picture

    batch = pack([[Sequence(segments=(picture((2, 2), 1), words(9, 1)))]])
    rows = replace(batch.text.columns(slice(1, None)), position=torch.arange(9)[None])
    hidden, run = model.run_pass(replace(batch, text=rows, text_ids=batch.text_ids[:, 1:], labels=batch.labels[:, 1:]))
    expected = model.backbone.logits(hidden[:, run.slices["text"]])
    export(model, tmp_path / "adapter", "peft")
    base = Backbone.load(bases["llama"].source).model
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([words(9, 1).ids])
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-5)
    assert float((bases["llama"].model(ids).logits - expected).abs().max()) > 1e-2


SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 4}  # fmt: skip
ENCODERS = {
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=SIZES, text_config={**SIZES, "vocab_size": 99})),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
}


def reader(base, folder, encoder, port, fusion):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ENCODERS[encoder]().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": 16})
    )
    image = ImageModality.Config(
        codec=Features.Config(encoder=VisionTransformer.Config(source=str(folder))),
        patch=1,
        sizes=(16,),
        order="causal",
    )
    config = replace(model_config(base, "prefix"), image=image, port=port, fusion=fusion, media=NoObjective.Config())
    model = Model(config, base).eval()
    randomise(model, by=0.3)
    return model


@pytest.mark.parametrize(
    ("encoder", "port", "family", "fusion"),
    [
        ("clip", MLP.Config(), "llama", Prefix.Config()),
        ("siglip", Linear.Config(), "qwen3", Prefix.Config()),
        ("clip", Linear.Config(), "llama", Prefix.Config()),
        ("siglip", MLP.Config(), "llama", Lora.Config(rank=3, targets=None)),
    ],
)
@torch.no_grad()
def test_features_at_the_input_are_llava(bases, tmp_path, encoder, port, family, fusion):
    model = reader(bases[family], tmp_path / "encoder", encoder, port, fusion)
    model.save_pretrained(tmp_path / "pack")
    assert cli.main(["export", str(tmp_path / "pack"), "--to", "transformers", "-o", str(tmp_path / "llava")]) == 0
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    assert theirs.dtype == model.backbone.dtype

    levels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    tokens = model.image.encode([PILImage.fromarray(levels.numpy())], 16)[0]
    images = levels.permute(2, 0, 1)[None].float() / 127.5 - 1
    media = model.image.segment(tokens, (4, 4))
    before, behind = words(3, 5), words(6, 6)
    batch = pack([[Sequence(segments=(before, media, Text(ids=behind.ids)))]])
    hidden, run = model.run_pass(batch)
    expected = model.backbone.logits(hidden[:, run.slices["text"]])

    encoder_module = model.image.codec.encoder
    pixels = ((images + 1) / 2 - encoder_module.mean) / encoder_module.std
    size = model.backbone.model.get_input_embeddings().num_embeddings
    ids = torch.tensor([[*before.ids, size, *[size + 1] * 16, size + 2, *behind.ids]])
    logits = theirs(input_ids=ids, pixel_values=pixels).logits[..., :size]
    found = torch.cat([logits[:, :3], logits[:, 20:]], dim=1)  # words, [EOI], words
    merged = isinstance(fusion, Lora.Config)  # a sum of matrices is rounded once, a sum of products at each
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if merged else 1e-5)
    blind = theirs(input_ids=ids, pixel_values=-pixels).logits[:, 20:, :size]
    assert float((blind - found[:, 3:]).abs().max()) > 1e-3

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llava")
    assert tokenizer("<begin_of_media><image><end_of_media>", add_special_tokens=False)["input_ids"] == [
        size, size + 1, size + 2]  # fmt: skip
    assert theirs.generation_config.suppress_tokens == [size, size + 1, size + 2]


RATE = 16_000


def listener(base, folder, fusion=None, *, whisper=None, width=24, cells=5, seconds=0.4, window=0.4):
    """A pack that pools frames of a random Whisper of two layers, whose last norm is no plain one, or of a given one."""
    if whisper is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}
            ids = {"vocab_size": 9, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            sizes = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 100, "decoder_ffn_dim": 8}
            config = transformers.WhisperConfig(d_model=width, num_mel_bins=80, **heads, **ids, **sizes)
            made = transformers.WhisperModel(config).encoder
            made.layer_norm.weight.uniform_(0.3, 2)
            made.layer_norm.bias.normal_()
        made.save_pretrained(folder)
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
    codec = Whisper.Config(source=str(whisper or folder), width=width, window=window)
    audio = AudioModality.Config(codec=codec, seconds=seconds, patch=cells, order="causal")
    parts = {"port": Pooling.Config(cells=cells), "fusion": fusion or Prefix.Config(), "media": NoObjective.Config()}
    model = Model(replace(model_config(base, "prefix"), audio=audio, **parts), base).eval()
    randomise(model, by=0.3)
    return model


@pytest.mark.parametrize(
    "kind", ["random Whisper", pytest.param("real Whisper", marks=pytest.mark.full), "low-rank deltas"]
)
@torch.no_grad()
def test_pooled_frames_at_the_input_are_voxtral(bases, tmp_path, kind, request, monkeypatch):
    low_rank = kind == "low-rank deltas"
    base = Backbone.load(bases["qwen2"].source) if low_rank else bases["llama"]
    fusion = Lora.Config(rank=3, targets=None) if low_rank else None
    if kind == "real Whisper":
        given = {"whisper": request.getfixturevalue("assets") / "whisper_tiny_en_encoder", "width": 384}
        model = listener(base, tmp_path / "whisper", seconds=1.0, window=1.0, **given)
    else:
        model = listener(base, tmp_path / "whisper", fusion)
    if low_rank:  # this tiny base's tokenizer brings a word that the base has no row for
        with pytest.raises(XFusionError, match="the tokenizer of its base knows 321 words, and the table has 320"):
            export(model, tmp_path / "none", "transformers")
        monkeypatch.setattr(base, "tokenizer", bases["llama"].tokenizer)
        export(model, tmp_path / "voxtral", "transformers")
    else:
        model.save_pretrained(tmp_path / "pack")
        assert (
            cli.main(["export", str(tmp_path / "pack"), "--to", "transformers", "-o", str(tmp_path / "voxtral")]) == 0
        )
    theirs = transformers.VoxtralForConditionalGeneration.from_pretrained(tmp_path / "voxtral").eval()

    length = model.audio.sizes[0] * 320
    wave = 0.3 * torch.randn(length - 1000, generator=torch.Generator().manual_seed(1))  # silence behind it
    tokens = model.audio.encode([Sound(samples=wave, rate=RATE)], model.audio.sizes[0])[0]
    count = len(tokens)
    before, behind = words(3, 5), words(6, 6)
    media = model.audio.segment(tokens, (count, 1))
    batch = pack([[Sequence(segments=(before, media, Text(ids=behind.ids)))]])
    if low_rank:  # a matrix and its large random delta are summed elsewhere once merged, which float32 rounds otherwise
        for one in (base.model, model, theirs):
            one.double()
        name, rows = next(iter(batch.media.items()))
        batch = batch.with_media(name, tokens=rows.tokens.double(), time=rows.time.double())
    hidden, run = model.run_pass(batch)
    expected = model.backbone.logits(hidden[:, run.slices["text"]])

    spectra = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "voxtral")
    named = {} if length % RATE == 0 else {"padding": "max_length", "max_length": length}
    features = spectra(wave.numpy(), sampling_rate=RATE, return_tensors="pt", **named).input_features.to(theirs.dtype)
    size = model.backbone.model.get_input_embeddings().num_embeddings
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "voxtral")
    around = tokenizer("<begin_of_media><audio><end_of_media>", add_special_tokens=False)["input_ids"]
    assert around == [size, size + 1, size + 2]
    ids = torch.tensor([[*before.ids, size, *[size + 1] * count, size + 2, *behind.ids]])
    logits = theirs(input_ids=ids, input_features=features).logits[..., :size]
    found = torch.cat([logits[:, :3], logits[:, 4 + count :]], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    deaf = theirs(input_ids=ids, input_features=torch.zeros_like(features)).logits[:, 4 + count :, :size]
    assert float((deaf - found[:, 3:]).abs().max()) > 1e-3
    assert theirs.generation_config.suppress_tokens == [size, size + 1, size + 2]


def opening(raw):
    """A sentence piece of a kind: a beginning of text before all that is read, a space before words wherever they begin."""
    raw.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])


def spaced(raw):
    """The newer kind: a space before words at the beginning of all alone."""
    first = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="first", split=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])


TOKENIZERS = {"plain": None, "opens every text": opening, "a space at the beginning": spaced}


@pytest.fixture(params=TOKENIZERS)
def own_ways(bases, request, monkeypatch):
    """A base whose tokenizer and settings of generation are the least like a plain one's."""
    base, tokenizer = bases["llama"], transformers.AutoTokenizer.from_pretrained(bases["llama"].source)
    if change := TOKENIZERS[request.param]:
        change(tokenizer.backend_tokenizer)
        tokenizer.pad_token = None
    tokenizer.chat_template = "{% for m in messages %}\n {{ m.role }}:{{ m.content }}{% endfor %}{{ eos_token }}\n"
    settings = transformers.GenerationConfig(
        do_sample=True, repetition_penalty=1.9, no_repeat_ngram_size=2, eos_token_id=[7, 8], bos_token_id=0
    )
    monkeypatch.setattr(base, "tokenizer", tokenizer)
    monkeypatch.setattr(base.model, "generation_config", settings)
    return base


def asked(kind, shown):
    """Conversations about one medium or two, as processors take them."""

    def user(*content):
        blocks = [{"type": "text", "text": c} if isinstance(c, str) else {"type": kind, kind: c} for c in content]
        return {"role": "user", "content": blocks}

    first, second = shown
    return [
        [user(first)],
        [user(second, "What is this?")],
        [user("Name it: ", first)],
        [user(second, "What is this?"), {"role": "assistant", "content": "a cat"}, user(first, "and this?")],
    ]


def said_by(theirs, processor, inputs):
    made = theirs.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = theirs.generation_config.eos_token_id  # some are words to this tokenizer, which would decode them
    return [
        processor.tokenizer.decode(list(takewhile(lambda i: i not in ends, one)), skip_special_tokens=True)
        for one in made
    ]


@torch.no_grad()
def test_an_exported_listener_says_the_same_words(own_ways, tmp_path):
    model = listener(own_ways, tmp_path / "whisper", seconds=1.0, window=1.0)
    export(model, tmp_path / "voxtral", "transformers")
    theirs = transformers.VoxtralForConditionalGeneration.from_pretrained(tmp_path / "voxtral").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "voxtral")
    tokenizer = processor.tokenizer
    waves = [0.3 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (9_000, 15_000)]
    sounds = [Sound(samples=wave, rate=RATE) for wave in waves]
    ours, found, alone = [], [], []
    for heard, turns in zip(asked("audio", sounds), asked("audio", [wave.numpy() for wave in waves]), strict=True):
        segments = [{**t, "content": [b.get("text", b.get("audio")) for b in t["content"]]} for t in heard[::2]]
        segments = [*segments[:1], *heard[1:2], *segments[1:]]
        ours.append(model.generate(conversation(model, segments), max_tokens=12)[0])
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        audio = [b["audio"] for t in turns[::2] for b in t["content"] if "audio" in b]
        found += said_by(theirs, processor, processor(text=text, audio=audio, sampling_rate=RATE, return_tensors="pt"))
        alone += [(text, audio)] * (len(audio) == 1)
    assert found == ours and len(set(ours)) == 4
    assert ours[1].strip() == model.caption([sounds[1]], question="What is this?", max_tokens=12)[0]
    together = processor(
        text=[text for text, _ in alone],
        audio=[audio[0] for _, audio in alone],
        sampling_rate=RATE,
        text_kwargs={"padding": True},
        return_tensors="pt",
    )
    assert said_by(theirs, processor, together) == ours[:3]
    assert theirs.generation_config.eos_token_id == list(own_ways.end_ids) and 7 in own_ways.end_ids
    words_alone = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(words_alone, tokenize=False) == own_ways.chat_text(words_alone)
    assert tuple(tokenizer.apply_chat_template(words_alone)["input_ids"]) == own_ways.chat(words_alone)
    with pytest.raises(Exception, match="a block of type image is neither text nor audio"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
@torch.no_grad()
def test_an_exported_looker_says_the_same_words(own_ways, encoder, tmp_path):
    model = reader(own_ways, tmp_path / "encoder", encoder, MLP.Config(), Prefix.Config())
    export(model, tmp_path / "llava", "transformers")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "llava")
    levels = torch.randint(256, (2, 40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = [PILImage.fromarray(one.numpy()) for one in levels]
    ours, found = [], []
    for turns in asked("image", pictures):
        blocks = [t["content"] if isinstance(t["content"], str) else
                  [b.get("text", b.get("image")) for b in t["content"]] for t in turns]  # fmt: skip
        messages = [{**turn, "content": content} for turn, content in zip(turns, blocks, strict=True)]
        ours.append(model.generate(conversation(model, messages), max_tokens=12)[0])
        inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
        found += said_by(theirs, processor, inputs)
    assert found == ours and len(set(ours)) == 4
    assert ours[1].strip() == model.caption([pictures[1]], question="What is this?", max_tokens=12)[0]


@torch.no_grad()
def test_words_that_no_template_can_put_behind_a_medium_are_refused(bases, tmp_path, monkeypatch):
    model = listener(bases["llama"], tmp_path / "whisper")
    monkeypatch.setattr(layout, "_is_read_alike", lambda *_: False)
    with pytest.raises(XFusionError, match="reads words behind a special token otherwise than alone"):
        export(model, tmp_path / "out", "transformers")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"seconds": 0.3},
            "tokens of all 0.4 s that its encoder hears, this pack of the first 0.3 s: train one with "
            "--model.audio.seconds 0.4, or with --model.audio.codec.window 0.3",
        ),
        ({"cells": 2}, "a token of 5 frames or more of this Whisper, this pack of 2"),
    ],
)
@torch.no_grad()
def test_what_voxtral_cannot_pool_is_refused(bases, tmp_path, changed, message):
    model = listener(bases["llama"], tmp_path / "whisper", **changed)
    with pytest.raises(XFusionError, match=message):
        export(model, tmp_path / "out", "transformers")


@torch.no_grad()
def test_deltas_are_merged_into_matrices_that_lie_either_way(bases):
    for family in ("llama", "gpt2"):
        model = Model(
            replace(model_config(bases[family], "prefix"), fusion=Lora.Config(rank=3, targets=None)), bases[family]
        )
        randomise(model, by=0.3)
        merged = decoder.merged_weights(model)
        ids, layers = IDS, model.backbone.layers
        expected = model.text_logits(ids, stack="fused")
        before = {name: value.clone() for name, value in model.backbone.decoder.state_dict().items() if name in merged}
        try:
            model.backbone.decoder.load_state_dict(merged, strict=False)
            torch.testing.assert_close(model.backbone.model(ids).logits, expected, rtol=0, atol=1e-4)
        finally:
            model.backbone.decoder.load_state_dict(before, strict=False)
        assert len(merged) == len(layers) * len(next(iter(model.fusion.blocks.values())))


@torch.no_grad()
def test_a_base_that_llava_cannot_tie_is_refused(bases, tmp_path):
    model = reader(bases["gpt2"], tmp_path / "encoder", "clip", MLP.Config(), Prefix.Config())
    with pytest.raises(XFusionError, match="LLaVA ties its head to embed_tokens, which GPT2Model does not have"):
        export(model, tmp_path / "out", "transformers")


@torch.no_grad()
def test_a_base_that_voxtral_cannot_read_is_refused(bases, tmp_path):
    with pytest.raises(XFusionError, match="is read as that of a Llama, and of GPT2Config loses n_embd, n_layer"):
        export(listener(bases["gpt2"], tmp_path / "whisper"), tmp_path / "out", "transformers")


@torch.no_grad()
def test_a_bias_that_cannot_be_folded_exactly_is_refused(bases, tmp_path):
    model = listener(bases["llama"], tmp_path / "whisper")
    model.audio.codec.load()
    model.audio.codec.network.layer_norm.weight[0] = 0
    with pytest.raises(XFusionError, match="Voxtral's way in has no bias"):
        export(model, tmp_path / "out", "transformers")


def test_every_recipe_is_a_class_or_names_the_nearest():
    exported = {"llava", "llava_1_5", "lora", "qwen_audio"}
    for name in set(recipes.names()) - exported:
        said = nearest.reason(recipes.find(name)().model)
        named = re.fullmatch(r"the nearest to \w+ is (\w+|[a-z' ]+ of diffusers|peft's \w+), wh.+", said)
        assert named, f"{name}: {said}"
        assert hasattr(transformers, named[1]) or named[1] in ("peft's AdaptionPrompt", "a pipeline of diffusers"), said
    assert "Queries is Blip2ForConditionalGeneration" in nearest.reason(recipes.find("lora(recipe='blip2')")().model)


@pytest.mark.parametrize(
    ("fusion", "target", "message"),
    [
        ("dual tower", "peft", "its blocks are copies"),
        ("single tower", "peft", "SharedDecoder cannot be exported to peft"),
        ("dual tower", "transformers", "the nearest to DualTower is PI0ForConditionalGeneration, whose second tower"),
        (
            "flamingo",
            "transformers",
            "CrossAttention cannot be exported to transformers: the nearest to CrossAttention is",
        ),
        ("llama-adapter 2", "peft", "its version 2"),
        ("lora", "peft", "deltas on the base's own layers are not taken out of the mechanism"),
        ("low-rank tower", "onnx", "there is no export to 'onnx', only to peft, transformers"),
    ],
)
def test_what_has_no_class_elsewhere_is_refused(bases, tmp_path, fusion, target, message):
    with pytest.raises(XFusionError, match=message) as error:
        export(make_model(bases["llama"], fusion), tmp_path / "out", target)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
