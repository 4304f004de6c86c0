"""The nodes for ComfyUI, driven as its executor drives them: what they take and give, and that they are the model's own calls."""

import inspect

import numpy
import pytest
import torch
from contracts.table import SIDE, SOUND_RATE, hearing_model, make_model
from PIL import Image as PILImage

import xfusion
from xfusion.apps.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from xfusion.data.sequence import Sound, XFusionError

OWN = -1.0
"""The pack's own guidance."""


@pytest.fixture(scope="module")
def model(bases):
    return make_model(bases["llama"])


def execute(name, **inputs):
    """What ComfyUI's executor does with a node: calls the method that it names, every input by name, in inference mode."""
    node = NODE_CLASS_MAPPINGS[name]
    assert inputs.keys() == node.INPUT_TYPES()["required"].keys()
    with torch.inference_mode():
        outputs = getattr(node(), node.FUNCTION)(**inputs)
    assert isinstance(outputs, tuple) and len(outputs) == len(node.RETURN_TYPES)
    return outputs[0]


def pixels(picture):
    return numpy.asarray(picture.convert("RGB"))


def levels(image):
    """An IMAGE as ComfyUI's SaveImage writes it."""
    return (255.0 * image.numpy()).clip(0, 255).astype(numpy.uint8)


def draw(model, **settings):
    settings = {"prompt": "a red heart", "seed": 5, "steps": 3, "guidance": OWN, "size": 0, "batch": 1} | settings
    return execute("XFusionTextToImage", model=model, **settings)


def test_each_node_states_what_comfyui_asks_of_one():
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        required = node.INPUT_TYPES()["required"]
        names = list(inspect.signature(getattr(node, node.FUNCTION)).parameters)
        assert names[1:] == list(required) and node.CATEGORY == "xfusion" and node.DESCRIPTION
        for kind, settings in ((kind, *rest) for kind, *rest in required.values() if rest):
            default = {"INT": int, "FLOAT": float, "STRING": str}[kind]
            assert type(settings["default"]) is default
            assert settings.get("min", default()) <= settings["default"]
    assert NODE_CLASS_MAPPINGS["XFusionTextToImage"].INPUT_TYPES()["required"]["prompt"][1]["multiline"]


def test_a_drawing_is_the_one_of_draw_with_that_seed(model):
    image = draw(model, batch=3)
    assert image.shape == (3, SIDE, SIDE, 3) and image.dtype == torch.float32 and image.device.type == "cpu"
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    expected = model.draw(["a red heart"] * 3, seed=5, steps=3)
    assert all((a == pixels(b)).all() for a, b in zip(levels(image), expected, strict=True))
    assert torch.equal(image, draw(model, batch=3)) and not torch.equal(image[0], draw(model, seed=6)[0])


def test_size_and_guidance_reach_draw(model):
    image = draw(model, size=2 * SIDE, guidance=1.0)
    (expected,) = model.draw(["a red heart"], seed=5, steps=3, size=2 * SIDE, guidance=1.0)
    assert image.shape == (1, 2 * SIDE, 2 * SIDE, 3) and (levels(image)[0] == pixels(expected)).all()
    assert torch.equal(draw(model, guidance=OWN), draw(model, guidance=model.guidance))
    with pytest.raises(XFusionError, match=f"picture size {5 * SIDE} is out of reach"):
        draw(model, size=5 * SIDE)


def edit(model, image, mask, **settings):
    settings = {"prompt": "a red heart", "seed": 5, "steps": 3, "guidance": OWN} | settings
    return execute("XFusionEdit", model=model, image=image, mask=mask, **settings)


def test_a_mask_of_ones_is_drawn_anew_and_the_rest_stays(model):
    image = torch.rand(2, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, :, SIDE // 2 :] = 1
    edited = edit(model, image, mask)
    assert edited.shape == image.shape
    left, right = (slice(None), slice(None), slice(0, SIDE // 2)), (slice(None), slice(None), slice(SIDE // 2, SIDE))
    assert float((edited[left] - image[left]).abs().max()) < 1.1 / 255
    assert float((edited[right] - image[right]).abs().max()) > 0.1
    given = [PILImage.fromarray(picture) for picture in (image * 255).round().to(torch.uint8).numpy()]
    white = PILImage.fromarray((mask[0] * 255).to(torch.uint8).numpy())
    for i in range(2):
        expected = model.inpaint(given[i], white, "a red heart", seed=5 + i, steps=3)
        assert (levels(edited[i]) == pixels(expected)).all()


def test_each_picture_may_have_a_mask_of_its_own(model):
    image = torch.full((2, SIDE, SIDE, 3), 0.5)
    mask = torch.zeros(2, SIDE, SIDE)
    mask[0, :, SIDE // 2 :] = mask[1, :, : SIDE // 2] = 1
    changed = ((edit(model, image, mask) - image).abs().amax(3) > 2 / 255).float()
    assert torch.equal(changed.amax((0, 1)), torch.ones(SIDE)) and not changed[0, :, : SIDE // 2].any()
    assert not changed[1, :, SIDE // 2 :].any()
    assert torch.equal(edit(model, image[:1], mask[0]), edit(model, image[:1], mask[:1]))  # a mask without a batch
    with pytest.raises(XFusionError) as error:
        edit(model, image, torch.ones(3, SIDE, SIDE))
    assert str(error.value) == "3 masks for 2 pictures: give one, or one each"
    with pytest.raises(
        XFusionError, match="give both the same size"
    ):  # what LoadImage gives of a picture without alpha
        edit(model, image, torch.zeros(1, 64, 64))


def test_words_about_pictures_are_those_of_caption(model):
    drawn = draw(model, batch=2)
    for question in ("", "What is this?"):
        texts = execute("XFusionImageToText", model=model, image=drawn, question=question, max_tokens=6)
        pictures = [PILImage.fromarray(picture) for picture in (drawn * 255).round().to(torch.uint8).numpy()]
        assert texts == model.caption(pictures, question=question, max_tokens=6) and len(texts) == 2
    alpha = torch.cat([drawn, torch.zeros(2, SIDE, SIDE, 1)], dim=3)
    assert execute("XFusionImageToText", model=model, image=alpha, question=question, max_tokens=6) == texts
    assert NODE_CLASS_MAPPINGS["XFusionImageToText"].OUTPUT_IS_LIST == (True,)


def test_words_about_sounds_are_those_of_caption(bases):
    model = hearing_model(bases["llama"])
    waves = torch.rand(2, 2, 30, generator=torch.Generator().manual_seed(0)) - 0.5
    audio = {"waveform": waves, "sample_rate": SOUND_RATE}
    texts = execute("XFusionSoundToText", model=model, audio=audio, question="", max_tokens=6)
    sounds = [Sound(samples=wave.mean(0), rate=SOUND_RATE) for wave in waves]
    assert texts == model.caption(sounds, max_tokens=6) and len(texts) == 2


def test_a_pack_that_is_loaded_and_drawn_with_in_inference_mode_draws_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "run" / "pack")
    loaded = execute("XFusionLoad", pack=f" {tmp_path / 'run'} ", device="cpu")
    assert loaded.fingerprint == xfusion.load(tmp_path / "run" / "pack", backbone=model.backbone).fingerprint
    assert torch.equal(draw(loaded), draw(model))
    assert torch.equal(draw(loaded), draw(loaded)) and loaded.capabilities == model.capabilities
    with pytest.raises(XFusionError, match="there is no pack .nothing-of-this-name."):
        execute("XFusionLoad", pack="nothing-of-this-name", device="cpu")
