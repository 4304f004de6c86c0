"""Frozen encoders as codecs that only read, and strips of their features as tokens."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import xfusion
from xfusion.data.sequence import XFusionError
from xfusion.modalities.codecs.features import Features
from xfusion.modalities.encoders.efficientnet_lite import EfficientNetLite
from xfusion.modalities.encoders.vision_transformer import VisionTransformer
from xfusion.modalities.image import ImageModality
from xfusion.model import build
from xfusion.recipes.llava import llava

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
MODELS = {
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=SIZES, text_config={**SIZES, "vocab_size": 99})),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
    "dino": lambda: Dinov2Model(Dinov2Config(**SIZES)),
}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A random model of the class, as its makers save it."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    model.save_pretrained(folder)
    settings = {"image_mean": MEAN, "image_std": STD, "size": 16, "image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder, getattr(model, "vision_model", model), request.param == "siglip"


@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_maps_are_the_patches_of_the_models_own_hidden_states(saved, layer):
    folder, model, no_class_token = saved
    encoder = VisionTransformer.Config(source=str(folder), layer=layer).build()
    assert encoder.config.width == 24 and (encoder.side, encoder.cells) == (16, 4)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    states = model(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    patches = states if no_class_token else states[:, 1:]
    torch.testing.assert_close(encoder.maps(images).flatten(2).transpose(1, 2), patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.features(images).norm(dim=1), torch.ones(3))
    assert encoder.maps(images[:0]).shape == (0, 24, 4, 4)
    assert not any(p.requires_grad for p in encoder.parameters())


@torch.no_grad()
def test_pictures_are_prepared_as_by_the_models_own_preprocessor(saved):
    folder, model, no_class_token = saved
    encoder = VisionTransformer.Config(source=str(folder), layer=-1).build()
    levels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    picture = Image.fromarray(levels.numpy())
    own = CLIPImageProcessorPil(image_mean=MEAN, image_std=STD, do_resize=False, do_center_crop=False)
    states = model(**own(picture, return_tensors="pt"), output_hidden_states=True).hidden_states[-1]
    found = encoder.maps(ImageModality.from_pil([picture], 16)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, states if no_class_token else states[:, 1:], rtol=0, atol=1e-5)


def test_an_encoder_that_is_not_there_or_lacks_weights_is_refused_in_one_line(saved, tmp_path):
    with pytest.raises(XFusionError, match=r"encoder '.*nowhere' cannot be loaded: ") as caught:
        VisionTransformer.Config(source=str(tmp_path / "nowhere")).build()
    assert "\n" not in str(caught.value)
    half = shutil.copytree(saved[0], tmp_path / "half")
    weights = load_file(half / "model.safetensors")
    gone = max(name for name in weights if name.endswith(".1.mlp.fc1.weight"))  # of CLIP's two, that which sees
    save_file({name: value for name, value in weights.items() if name != gone}, half / "model.safetensors")
    with pytest.raises(XFusionError, match=r"encoder '.*half' lacks weights: .*\.1\.mlp\.fc1\.weight$"):
        VisionTransformer.Config(source=str(half)).build()


def test_features_are_tokens_of_a_picture_and_cannot_be_turned_back(saved):
    folder, _, _ = saved
    config = VisionTransformer.Config(source=str(folder))
    image = ImageModality.Config(codec=Features.Config(encoder=config), patch=1, sizes=(16,)).build()
    assert image.grid(16) == (4, 4) and image.token_width == 24
    picture = Image.new("RGB", (20, 16), "red")
    tokens = image.encode([picture], 16)
    maps = config.build().maps(image.from_pil([picture], 16))
    assert torch.equal(tokens, maps.flatten(2).transpose(1, 2))
    assert image.codec.encoders == {config.fingerprint}
    with pytest.raises(XFusionError, match="cannot be turned back into pictures"):
        image.decode(tokens, 16)
    with pytest.raises(XFusionError, match=r"an image of 32x32 pixels is not what .* looks at: set sizes to \(16,\)"):
        image.encode([picture], 32)


def test_features_of_the_wheels_encoder():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the wheel of the encoder is not installed")
    image = ImageModality.Config(codec=Features.Config(), patch=1, patch_width=7, sizes=(224,)).build()
    assert image.grid(224) == (7, 1) and image.token_width == 7 * 1280
    tokens = image.encode([Image.new("RGB", (224, 224), "red")], 224)
    maps = EfficientNetLite().maps(image.from_pil([Image.new("RGB", (224, 224), "red")], 224))
    assert torch.equal(tokens[0].view(7, 1280, 7), maps[0].transpose(0, 1))


@pytest.mark.parametrize(("patch", "patch_width"), [(1, 8), (2, 4), (4, 1), (8, 2)])
def test_strips_are_an_exact_inverse_and_in_reading_order(patch, patch_width):
    image = ImageModality.Config(patch=patch, patch_width=patch_width, sizes=(8,)).build()
    pictures = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = image.encode(pictures, 8)
    assert image.grid(8) == (8 // patch, 8 // patch_width)
    assert tokens.shape == (2, 64 // (patch * patch_width), 3 * patch * patch_width)
    assert torch.equal(image.decode(tokens, 8), pictures)
    first = pictures[:, :, :patch, :patch_width].flatten(1)
    assert torch.equal(tokens[:, 0], first)


def test_strips_that_do_not_divide_are_refused():
    with pytest.raises(XFusionError, match="image size 9 is not legal: it must be a multiple of 6"):
        ImageModality.Config(patch=2, patch_width=3, sizes=(9,)).build()


def test_a_pack_is_not_loaded_on_an_encoder_with_other_weights(bases, saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "encoder")
    build(llava(encoder=str(folder), side=16).model, bases["llama"]).save_pretrained(tmp_path / "pack")
    xfusion.load(tmp_path / "pack", backbone=bases["llama"])
    weights = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(XFusionError, match="codec whose weights have the hash .* put back the one of its training"):
        xfusion.load(tmp_path / "pack", backbone=bases["llama"])
