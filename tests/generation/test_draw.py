"""Drawing: a batch is its singles, guidance and cache are what one uncached pass says, known tokens stay."""

import numpy
import pytest
import torch
from contracts.table import (
    ROWS,
    SIDE,
    TOKEN_WIDTH,
    Noise,
    float64_base,
    make_model,
    model_config,
    picture,
    randomise,
    words,
)
from PIL import Image as PILImage

import xfusion
from xfusion.backbone import Backbone
from xfusion.data.pack import pack
from xfusion.data.sequence import Media, Sequence, XFusionError
from xfusion.data.templates import with_begin
from xfusion.generation import BATCH, draw_size, draw_tokens
from xfusion.modalities.image import ImageModality
from xfusion.model import Model

VELOCITY = {"prediction": "velocity"}
PROMPTS = ["a red apple", "", "two blue birds on a table, what is this", "дом 🍎 家"]


@pytest.fixture(scope="module")
def model(bases):
    return make_model(bases["gemma3"])


def apart(one, other):
    """Largest difference of two pictures in levels of 255."""
    assert one.size == other.size and one.mode == other.mode == "RGB"
    return int(numpy.abs(numpy.asarray(one).astype(int) - numpy.asarray(other)).max())


@pytest.mark.parametrize(("fusion", "family"), ROWS)
def test_a_batch_gives_the_pictures_of_its_singles(bases, fusion, family):
    model = make_model(bases[family], fusion)
    together = model.draw(PROMPTS, seed=7, steps=4)
    assert len(together) == 4 and all(p.size == (SIDE, SIDE) for p in together)
    for k, prompt in enumerate(PROMPTS):
        assert apart(model.draw([prompt], seed=7 + k, steps=4)[0], together[k]) <= 2
    assert [apart(a, b) for a, b in zip(together, model.draw(PROMPTS, seed=7, steps=4), strict=True)] == [0] * 4
    assert apart(together[0], model.draw(PROMPTS[:1], seed=8, steps=4)[0]) > 2


def test_more_than_a_batch_is_drawn_in_parts(model, monkeypatch):
    expected = model.draw(PROMPTS, steps=2)
    monkeypatch.setattr("xfusion.generation.base.BATCH", 3)
    assert BATCH >= 4
    assert max(map(apart, model.draw(PROMPTS, steps=2), expected)) <= 2


def test_seeds_may_be_given_one_by_one(model):
    one = model.draw(["a cat", "a cat"], seeds=[3, 3], steps=2)
    assert apart(*one) <= 2
    assert apart(one[0], model.draw(["a cat"], seed=3, steps=2)[0]) <= 2
    with pytest.raises(XFusionError, match="1 seeds for 2 prompts"):
        model.draw(["a", "b"], seeds=[1])


def by_hand(model, context, *, seed, steps, guidance, interval=(0.0, 1.0)):
    """Euler steps with a full pass over [context | picture] each, by the reference path, without any cache."""
    x = torch.randn(16, TOKEN_WIDTH, generator=torch.Generator().manual_seed(seed))

    def velocity(segments, x, t):
        blank = Media(tokens=x, grid=(4, 4), state="noised")
        batch = pack([[Sequence(segments=(*with_begin(model.backbone.begin_ids, segments), blank))]])
        media = batch.media["image"]
        time = torch.zeros(len(media.noised))
        time[-1] = t
        _, run = model.run_pass(batch.with_media("image", time=time))
        return model.media_objective.velocity(model.port.readout(run.states["image"])[0, -16:], x, t)

    with model.using(model.reference_engine()):
        for step in range(steps):
            t = 1 - step / steps
            scale = guidance if interval[0] < t <= interval[1] else 1
            without = velocity((), x, t) if scale != 1 else 0
            x = x - (without + scale * (velocity(context, x, t) - without)) / steps
    return x


SENSITIVE = (("wide tower", "gpt2"), ("wide tower, adaln single", "gpt2"))
"""Random models that lead a walk astray by what float32 alone rounds: they walk in float64."""


def exactly(base, fusion, monkeypatch):
    """A model in float64, that reads the media of its passes in float64, too."""
    run_pass, model = Model.run_pass, make_model(float64_base(base), fusion, **VELOCITY)

    def widened(self, batch, **settings):
        for name, media in batch.media.items():
            batch = batch.with_media(name, tokens=media.tokens.double(), time=media.time.double())
        return run_pass(self, batch, **settings)

    monkeypatch.setattr(Model, "run_pass", widened)
    return model.double()


@pytest.mark.parametrize(("fusion", "family"), ROWS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_the_cached_walk_is_the_uncached_one(bases, fusion, family, guidance, monkeypatch):
    sensitive = (fusion, family) in SENSITIVE
    base = bases[family]
    model = exactly(base, fusion, monkeypatch) if sensitive else make_model(base, fusion, **VELOCITY)
    contexts = [
        (words(5, 1),),
        (),
        (words(2, 2), picture((2, 3), 2), words(3, 3)),
        (picture((4, 4), 4),),
        (picture((2, 2), 5), picture((1, 3), 6), words(1, 5)),
    ]
    found = draw_tokens(model, contexts, SIDE, seeds=[11, 12, 13, 14, 15], steps=3, guidance=guidance)
    for k, context in enumerate(contexts):
        expected = by_hand(model, context, seed=11 + k, steps=3, guidance=guidance)
        assert float((found[k] - expected).detach().abs().max()) < 1e-4


@pytest.mark.parametrize(("family", "passes"), [("llama", 1), ("gpt2", 4)])
def test_the_decoder_around_the_layers_runs_once_unless_it_changes_its_inputs(bases, family, passes, monkeypatch):
    """GPT-2 adds learned positions to its inputs; a Llama's decoder hands them on, and calls all steps' layers alike."""
    model, driven = make_model(bases[family]), []
    decoder_of, drive = Backbone.shadow_decoder, Backbone.drive
    monkeypatch.setattr(Backbone, "drive", lambda self, *args: driven.append(args) or drive(self, *args))
    found = draw_tokens(model, [(words(3, 1),)], SIDE, seeds=[5], steps=4, guidance=2.0)
    assert len(driven) == 1 + passes  # one for the context

    def changed(self, compute_layer):  # hands every layer a copy of its inputs
        return decoder_of(self, lambda index, frozen, x, call: compute_layer(index, frozen, x.clone(), call))

    monkeypatch.setattr(Backbone, "shadow_decoder", changed)
    again = draw_tokens(make_model(bases[family]), [(words(3, 1),)], SIDE, seeds=[5], steps=4, guidance=2.0)
    assert len(driven) == 1 + passes + 5
    assert torch.equal(found, again)


@pytest.mark.parametrize("interval", [(0.5, 1.0), (0.0, 0.6), (0.2, 0.8)])
def test_guidance_acts_within_its_interval_alone(bases, monkeypatch, interval):
    """Levels of four steps are 1, 0.75, 0.5, 0.25; outside of the interval no row stands behind an empty context."""
    model = make_model(bases["gemma3"], guidance_interval=interval, **VELOCITY)
    contexts = [(words(2, 2), picture((2, 3), 2), words(3, 3)), (words(4, 1),), ()]
    rows, run_pass = [], Model.run_pass

    def counted(self, batch, **settings):
        rows.extend(len(media.rows.order) for media in batch.media.values() if not settings["update"])
        return run_pass(self, batch, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Model, "run_pass", counted)
        found = draw_tokens(model, contexts, SIDE, seeds=[11, 12, 13], steps=4, guidance=2.5)
    assert rows == [6 if interval[0] < level <= interval[1] else 3 for level in (1, 0.75, 0.5, 0.25)]
    for k, context in enumerate(contexts):
        expected = by_hand(model, context, seed=11 + k, steps=4, guidance=2.5, interval=interval)
        assert float((found[k] - expected).detach().abs().max()) < 1e-4


def test_guidance_1_asks_only_once_per_step_and_text_is_computed_once(model, monkeypatch):
    passes, run_pass = [], Model.run_pass

    def spy(self, batch, **settings):
        passes.append((batch.text.order.shape[0], batch.text.count, batch.media["image"].rows.count))
        return run_pass(self, batch, **settings)

    monkeypatch.setattr(Model, "run_pass", spy)
    model.draw(["a red apple", "a cat"], steps=3, guidance=1)
    longest = 1 + max(len(model.backbone.encode(p)) for p in ("a red apple", "a cat"))  # behind the beginning of text
    assert passes == [(2, longest, 1), *[(2, 0, 16)] * 3]
    passes.clear()
    model.draw(["a red apple", "a cat"], steps=3, guidance=3)
    assert passes == [(4, longest, 1), *[(4, 0, 16)] * 3]


def test_steps_attend_by_plain_products_and_what_stands_before_by_the_bases_own_attention(model, monkeypatch):
    attends, run_pass, own = [], Model.run_pass, model.engine

    def spy(self, batch, **settings):
        out = run_pass(self, batch, **settings)
        attends.append((out[1].attention, self.fusion.block_config._attn_implementation))
        return out

    monkeypatch.setattr(Model, "run_pass", spy)
    for _ in range(2):
        model.draw(["a cat"], steps=2)
    assert attends == [("sdpa", "sdpa"), *[("grouped", "grouped")] * 2] * 2
    assert model.engine is own and model.fusion.block_config._attn_implementation == "sdpa"
    with model.drawing():
        theirs = model.engine.backbone.model.parameters()
        assert all(one is other for one, other in zip(model.backbone.model.parameters(), theirs, strict=True))


def test_an_empty_prompt_is_the_same_at_any_guidance(model):
    one, other = (model.draw([""], steps=3, guidance=g)[0] for g in (1, 4))
    assert apart(one, other) <= 2
    one, other = (model.draw(["a red apple"], steps=3, guidance=g)[0] for g in (1, 4))
    assert apart(one, other) > 2


@torch.no_grad()
def test_inpainting_keeps_known_tokens_exactly(model):
    known = picture((4, 4), 1).tokens[None]
    keep = torch.zeros(1, 16, dtype=torch.bool)
    keep[0, :7] = True
    settings = {"seeds": [3], "steps": 4, "guidance": 2.0}
    found = draw_tokens(model, [(words(3, 1),)], SIDE, known=known, keep=keep, **settings)
    free = draw_tokens(model, [(words(3, 1),)], SIDE, **settings)
    assert torch.equal(found[keep], known[keep])
    assert not torch.allclose(found[~keep], free[~keep], atol=1e-3)  # the rest was drawn in the light of them
    whole = draw_tokens(model, [(words(3, 1),)], SIDE, known=known, keep=torch.ones_like(keep), **settings)
    assert torch.equal(whole, known)


def test_progress_is_told_after_every_step(model):
    told = []
    model.draw(["a", "b"], steps=3, progress=lambda done, of, estimate: told.append((done, of, tuple(estimate.shape))))
    assert told == [(1, 3, (2, 16, TOKEN_WIDTH)), (2, 3, (2, 16, TOKEN_WIDTH)), (3, 3, (2, 16, TOKEN_WIDTH))]


def test_no_steps_and_too_long_a_prompt_are_refused(model, monkeypatch):
    with pytest.raises(XFusionError, match="steps 0 are not within 1 and 10000"):
        model.draw(["a"], steps=0)
    limit = model.backbone.config.max_position_embeddings
    with pytest.raises(XFusionError, match=rf"the prompt has 6\d\d tokens, more than the {limit} that are allowed"):
        model.draw(["я" * 310], steps=1)
    monkeypatch.setattr("xfusion.generation.base.MAX_PROMPT_TOKENS", 3)
    with pytest.raises(XFusionError, match="more than the 3 that are allowed"):
        model.draw(["a red apple on a table"], steps=1)
    with pytest.raises(XFusionError, match="more than the 3 that are allowed"):
        model.generate(["a red apple on a table", xfusion.Image()], steps=1)


# --------------------------------------------------------------------------------------------------------------- size


@pytest.fixture(scope="module")
def two_sizes(bases):
    import dataclasses

    config = dataclasses.replace(
        model_config(bases["llama"]), image=ImageModality.Config(patch=4, sizes=(SIDE, 2 * SIDE + 8))
    )
    # 16 px in 4 x 4 tokens and 40 px in 10 x 10
    config = dataclasses.replace(config, port=dataclasses.replace(config.port, largest_grid=10))
    model = Model(config, bases["llama"])
    randomise(model)
    return model


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, (16, 16)), (16, (16, 16)), (40, (40, 40)), (20, (16, 20)), (28, (16, 28)), (29, (40, 29)), (4, (16, 4))]
    + [(160, (40, 160))],
)
def test_a_picture_is_drawn_at_the_nearest_trained_size(two_sizes, asked, expected):
    assert draw_size(two_sizes, asked) == expected


@pytest.mark.parametrize("asked", [3, 161, 0, -5])
def test_sizes_out_of_reach_are_refused_with_the_legal_ones(two_sizes, asked):
    message = "choose 4 to 64, 10 to 160 pixels" if asked > 0 else f"picture size {asked} must be at least 1 pixel"
    with pytest.raises(XFusionError, match=message):
        two_sizes.generate(["a", xfusion.Image(size=asked)])


def test_the_output_has_the_size_that_was_asked_for(two_sizes):
    native = two_sizes.draw(["a cat"], size=40, steps=2)[0]
    assert native.size == (40, 40)
    resized = two_sizes.draw(["a cat"], size=80, steps=2)[0]
    assert resized.size == (80, 80)
    assert apart(native.resize((80, 80), PILImage.Resampling.BICUBIC), resized) <= 2


# -------------------------------------------------------------------------------------------------------- inpainting


def test_a_part_is_drawn_anew_and_the_rest_keeps_its_pixels(model):
    known = Noise().picture(0, SIDE)
    mask = PILImage.new("L", (SIDE, SIDE), 0)
    mask.putpixel((6, 9), 255)  # one pixel marks its whole token: columns 4 to 7, rows 8 to 11
    found = numpy.asarray(model.inpaint(known, mask, "a red apple", seed=1, steps=3)).astype(int)
    changed = (found != numpy.asarray(known)).any(axis=2)
    assert changed[8:12, 4:8].any()
    changed[8:12, 4:8] = False
    assert not changed.any()
    with pytest.raises(XFusionError, match=r"the mask of \(16, 16\) pixels has no white one in the middle square"):
        model.inpaint(known, PILImage.new("L", (SIDE, SIDE), 0), "a red apple", steps=2)


def kept_tokens(model, picture, mask, monkeypatch):
    """Which of the 4 x 4 tokens are kept when a picture is painted over."""
    seen = []

    def spy(model, contexts, size, *, keep, known, **_):
        seen.append(keep.view(4, 4))
        return known

    monkeypatch.setattr("xfusion.generation.drawing.draw_tokens", spy)
    model.inpaint(picture, mask, "a cat")
    return seen[0]


def test_a_stroke_of_one_pixel_of_a_large_mask_marks_its_tokens(model, monkeypatch):
    """At full size: shrunk 25 times it would be darker than half. What lies outside of the middle square marks nothing."""
    picture, mask = PILImage.new("RGB", (600, 400), "red"), PILImage.new("L", (600, 400))
    mask.paste(255, (0, 250, 600, 251))  # a line across, in the third row of tokens
    mask.paste(255, (50, 0, 51, 400))  # left of the middle square
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[2] = False
    assert torch.equal(kept_tokens(model, picture, mask, monkeypatch), expected)
    point = PILImage.new("RGB", (600, 400))
    point.putpixel((100 + 399, 399), (0, 0, 130))
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[3, 3] = False
    assert torch.equal(kept_tokens(model, picture, point, monkeypatch), expected)
    outside = PILImage.new("L", (600, 400))
    outside.paste(255, (0, 0, 100, 400))
    with pytest.raises(XFusionError, match="no white one in the middle square"):
        model.inpaint(picture, outside, "a cat")


def test_what_is_white_in_a_mask_of_any_mode(model, monkeypatch):
    """Deep grey is scaled, not clipped; what is transparent is not white; an alpha of 255 everywhere says nothing."""
    first = torch.ones(4, 4, dtype=torch.bool)
    first[0, 0] = False
    picture = PILImage.new("RGB", (16, 16), "red")
    deep = numpy.full((16, 16), 300, dtype=numpy.uint16)  # nearly black
    deep[:4, :4] = 65_000
    clear = PILImage.new("RGBA", (16, 16), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 4, 4))
    opaque = PILImage.new("RGBA", (16, 16), (0, 0, 0, 255))
    opaque.paste((255, 255, 255, 255), (0, 0, 4, 4))
    for mask in (PILImage.fromarray(deep), clear, opaque):
        assert torch.equal(kept_tokens(model, picture, mask, monkeypatch), first), mask.mode


def test_a_pixel_between_two_tokens_marks_both(model, monkeypatch):
    mask = PILImage.new("L", (30, 30))
    mask.putpixel((7, 1), 255)  # a token is 7.5 pixels wide
    kept = kept_tokens(model, PILImage.new("RGB", (30, 30)), mask, monkeypatch)
    assert (~kept).nonzero().tolist() == [[0, 0], [0, 1]]


def test_picture_and_mask_lie_as_their_tags_turn_them(model, monkeypatch):
    """A photograph taken upright, as cameras store it, and a mask painted on it as it is shown; and the other way round."""
    shown = Noise().picture(1, 64).resize((40, 60))
    mask = PILImage.new("L", (40, 60))
    mask.paste(255, (0, 10, 5, 15))  # the first token of the middle square
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[0, 0] = False

    def as_stored(upright):
        stored = upright.transpose(PILImage.Transpose.ROTATE_90)
        stored.getexif()[0x0112] = 6  # turned by 90 degrees clockwise when it is shown
        return stored

    for given, paint in ((as_stored(shown), mask), (shown, as_stored(mask)), (as_stored(shown), as_stored(mask))):
        assert torch.equal(kept_tokens(model, given, paint, monkeypatch), expected)
    with pytest.raises(XFusionError, match=r"the picture has \(40, 60\) pixels, the mask \(60, 40\)"):
        model.inpaint(as_stored(shown), mask.transpose(PILImage.Transpose.ROTATE_90), "a cat")


def test_a_mask_of_another_size_is_refused(model):
    with pytest.raises(XFusionError, match=r"the picture has \(16, 16\) pixels, the mask \(8, 8\)"):
        model.inpaint(Noise().picture(0, SIDE), PILImage.new("L", (8, 8)), "a")
