"""What is exported gives the logits that the pack gives; what has no class elsewhere is refused in one line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from contracts.table import make_model, model_config, randomise, words
from transformers import CLIPConfig, CLIPModel, LlavaForConditionalGeneration, SiglipVisionConfig, SiglipVisionModel

from xfusion.apps import cli
from xfusion.backbone import Backbone
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text, XFusionError
from xfusion.exports.base import export
from xfusion.fusion.adaption_prompt import AdaptionPrompt
from xfusion.fusion.connectors.linear import Linear
from xfusion.fusion.connectors.mlp import MLP
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.prefix import Prefix
from xfusion.modalities.codecs.features import Features
from xfusion.modalities.encoders.vision_transformer import VisionTransformer
from xfusion.modalities.image import ImageModality
from xfusion.model import Model
from xfusion.objectives.base import NoObjective

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


def reader(base, folder, encoder, port):
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
    config = replace(
        model_config(base, "prefix"), image=image, port=port, fusion=Prefix.Config(), media=NoObjective.Config()
    )
    model = Model(config, base).eval()
    randomise(model, by=0.3)
    return model


@pytest.mark.parametrize(
    ("encoder", "port", "family"),
    [("clip", MLP.Config(), "llama"), ("siglip", Linear.Config(), "qwen3"), ("clip", Linear.Config(), "llama")],
)
@torch.no_grad()
def test_features_at_the_input_are_llava(bases, tmp_path, encoder, port, family):
    model = reader(bases[family], tmp_path / "encoder", encoder, port)
    model.save_pretrained(tmp_path / "pack")
    assert cli.main(["export", str(tmp_path / "pack"), "--to", "transformers", "-o", str(tmp_path / "llava")]) == 0
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    assert theirs.dtype == model.backbone.dtype

    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = model.image.patches(model.image.codec.encode(images))[0] if hasattr(model.image, "patches") else None
    if tokens is None:
        from PIL import Image

        levels = ((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0)
        picture = Image.fromarray(levels.numpy())
        tokens = model.image.encode([picture], 16)[0]
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
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    blind = theirs(input_ids=ids, pixel_values=-pixels).logits[:, 20:, :size]
    assert float((blind - found[:, 3:]).abs().max()) > 1e-3

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llava")
    assert tokenizer("<begin_of_media><image><end_of_media>", add_special_tokens=False)["input_ids"] == [
        size, size + 1, size + 2]  # fmt: skip
    assert theirs.generation_config.suppress_tokens == [size, size + 1, size + 2]


@pytest.mark.parametrize(
    ("fusion", "target", "message"),
    [
        ("dual tower", "peft", "its blocks are copies"),
        ("single tower", "peft", "SharedDecoder cannot be exported to peft"),
        ("dual tower", "transformers", "no class of transformers is this mechanism"),
        ("flamingo", "transformers", "CrossAttention cannot be exported to transformers"),
        ("llama-adapter 2", "peft", "its version 2"),
        ("lora", "peft", "deltas on the base's own layers are not taken out of the mechanism"),
        ("low-rank tower", "onnx", "there is no export to 'onnx', only to peft, transformers"),
    ],
)
def test_what_has_no_class_elsewhere_is_refused(bases, tmp_path, fusion, target, message):
    with pytest.raises(XFusionError, match=message) as error:
        export(make_model(bases["llama"], fusion), tmp_path / "out", target)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
