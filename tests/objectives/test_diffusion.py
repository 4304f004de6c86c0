"""Diffusion: schedules, noise and steps are diffusers', told in the library's time (t = 0 is clean, t = 1 is noise)."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from contracts.table import Noise, mixed_sequences, model_config
from diffusers import DDIMScheduler, DDPMScheduler

import xfusion
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Media, Sequence, Text, XFusionError
from xfusion.generation import draw_tokens
from xfusion.modalities.codecs.pixels import Pixels
from xfusion.model import Model
from xfusion.objectives.base import Output
from xfusion.objectives.diffusion import LEVELS, Diffusion
from xfusion.objectives.next_token import NextToken
from xfusion.training.loop import train
from xfusion.training.stages import Recipe, Stage

PREDICTIONS = ("noise", "clean", "velocity")
SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
KINDS = {"noise": "epsilon", "clean": "sample", "velocity": "v_prediction"}


def build(prediction="noise", **settings):
    return Diffusion.Config(prediction=prediction, **settings).build()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(*items):
    """One row per item: (tokens, noised, has_loss, largest noise)."""
    rows = []
    for number, (count, noised, loss, largest) in enumerate(items):
        tokens = torch.rand(count, 5, generator=generator(number)) * 2 - 1
        state = "noised" if noised else "clean"
        media = Media(tokens=tokens, grid=(1, count), state=state, has_loss=loss, largest_noise=largest)
        rows.append([Sequence(segments=(Text(ids=(1,)), media))])
    return pack(rows)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_corrupt_is_diffusers_add_noise_and_keeps_clean_pictures_clean(prediction, schedule):
    batch, objective = (
        batch_of((4, True, True, 1.0), (3, False, False, 1.0), (2, True, False, 1.0)),
        build(prediction, schedule=schedule),
    )
    before = batch.media["image"].tokens.clone()
    media = objective.corrupt(batch, generator()).media["image"]
    assert torch.equal(batch.media["image"].tokens, before) and torch.equal(media.clean, before)
    scheduler = DDPMScheduler(num_train_timesteps=LEVELS, beta_schedule=SCHEDULES[schedule])
    g = generator()
    level, noise = objective.draw_level(torch.ones(3), g), torch.randn(before.shape, generator=g)
    assert float(media.time[1]) == 0 and torch.equal(media.tokens[1], before[1])
    for item in (0, 2):
        where, t = media.item == item, level[item : item + 1]
        assert float(media.time[item]) == pytest.approx((int(t) + 1) / LEVELS) and 0 < float(media.time[item]) <= 1
        x, eps = before[where][None], noise[where][None]
        torch.testing.assert_close(media.tokens[where], scheduler.add_noise(x, eps, t)[0], rtol=0, atol=1e-6)
        target = {"noise": eps, "clean": x, "velocity": scheduler.get_velocity(x, eps, t)}[prediction]
        torch.testing.assert_close(media.target[where], target[0], rtol=0, atol=1e-6)
    boundary = media.boundary
    assert torch.equal(media.tokens[boundary], before[boundary])


def test_the_schedules_are_their_papers():
    """Nichol and Dhariwal 2021, equation 17, with betas of at most 0.999; Ho et al. 2020, section 4."""
    f = [math.cos((k / LEVELS + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(LEVELS + 1)]
    kept, cosine, linear = 1.0, [], []
    for k in range(LEVELS):
        kept *= 1 - min(1 - f[k + 1] / f[k], 0.999)
        cosine.append(kept)
    kept = 1.0
    for k in range(LEVELS):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * k / (LEVELS - 1))
        linear.append(kept)
    for schedule, expected in (("cosine", cosine), ("linear", linear)):
        found = build(schedule=schedule).scheduler.alphas_cumprod
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert build().scales(-1) == (1.0, 0.0)


def test_levels_stay_below_an_items_cap_and_fill_it():
    largest = torch.tensor([1.0, 0.25, 0.0]).repeat(4000)
    level = build().draw_level(largest, generator()).view(-1, 3)
    assert level.amin(0).tolist() == [0, 0, 0] and level[:, 2].max() == 0
    assert int(level[:, 0].max()) == 999 and int(level[:, 1].max()) == 249  # pure noise, too
    assert abs(float(level[:, 0].float().mean()) - 499.5) < 15
    batch = batch_of(*((2, True, True, 0.1) for _ in range(50)))
    assert float(build().corrupt(batch, generator()).media["image"].time.max()) <= 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_as_its_paper_says(prediction):
    """Of one clean estimate all predictions cost the same: min(SNR, gamma) times the error of the clean tokens."""
    batch = batch_of((4, True, True, 1.0), (2, True, True, 1.0), (3, True, False, 1.0))
    objective = build(prediction, weighting="min_snr", largest_snr=5.0)
    view = objective.corrupt(batch, generator(4))
    media = view.media["image"]
    level = (media.time * LEVELS).round().long() - 1
    kept = objective.scheduler.alphas_cumprod.double()[level]
    a = media.at(kept.float(), fill=0.5)[..., None].double()
    estimate = media.clean.double() + 0.1
    noise = (media.tokens.double() - a.sqrt() * estimate) / (1 - a).sqrt()
    head = {"noise": noise, "clean": estimate, "velocity": a.sqrt() * noise - (1 - a).sqrt() * estimate}[prediction]
    found, count = objective.loss(lambda _: Output(logits=None, vocabulary=None, media={"image": head.float()}), view)[
        "diffusion"
    ]
    snr = kept / (1 - kept)
    assert int(count) == objective.count(view)["diffusion"] == 2
    assert float(found) == pytest.approx(float((snr.clamp(max=5)[:2] * 0.1**2).sum()), rel=1e-3)
    plain, _ = build(prediction).loss(
        lambda _: Output(logits=None, vocabulary=None, media={"image": media.target + 0.5}), view
    )["diffusion"]
    assert float(plain) == pytest.approx(2 * 0.25, rel=1e-4)


def oracle(objective, prediction, clean):
    """A head that knows the clean tokens."""

    def predict(x, time):
        signal, share = objective.scales(round(time * LEVELS) - 1)
        noise = (x - signal * clean) / share
        return {"noise": noise, "clean": clean, "velocity": signal * noise - share * clean}[prediction]

    return predict


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 3, 7, 25, 1000])
def test_an_oracle_recovers_the_clean_tokens_in_any_number_of_steps(prediction, schedule, steps):
    objective = build(prediction, schedule=schedule)
    clean = (torch.rand(2, 4, 5, generator=generator(1)) * 1.9 - 0.95).double()
    noise = torch.randn(2, 4, 5, generator=generator(2)).double()
    seen = list(objective.sample(oracle(objective, prediction, clean), noise, steps=steps))
    assert len(seen) == objective.num_steps(steps, 4) == steps
    torch.testing.assert_close(seen[-1][0], clean, rtol=0, atol=1e-7)


@pytest.mark.parametrize("largest", [None, 0.8])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_walk_is_diffusers_ddim(prediction, schedule, steps, largest):
    """Where the steps divide the levels; a head that is no oracle."""

    def head(x, time):
        return torch.tanh(x) * (1 + time) - 0.3

    x = noise = torch.randn(2, 4, 5, generator=generator()).double()
    scheduler = DDIMScheduler(
        num_train_timesteps=LEVELS,
        beta_schedule=SCHEDULES[schedule],
        prediction_type=KINDS[prediction],
        clip_sample=largest is not None,
        clip_sample_range=largest or 1.0,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    asked = []
    objective = build(prediction, schedule=schedule, largest_value=largest)
    walk = objective.sample(lambda x, t: asked.append(t) or head(x, t), noise, steps=steps)
    for t, (ours, estimate) in zip(scheduler.timesteps, walk, strict=True):
        step = scheduler.step(head(x, (int(t) + 1) / LEVELS), int(t), x, use_clipped_model_output=True)
        x = step.prev_sample
        torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-6 * float(x.abs().max()))
        torch.testing.assert_close(estimate, step.pred_original_sample, rtol=1e-5, atol=1e-5)
    assert asked == [(int(t) + 1) / LEVELS for t in scheduler.timesteps] and asked[0] == 1


def test_known_tokens_stand_at_their_noise_level_and_exactly_at_the_end():
    objective, keep = build("clean"), torch.tensor([[True, False, True, False]])
    known, noise = torch.rand(1, 4, 5, generator=generator(3)), torch.randn(1, 4, 5, generator=generator())
    seen = list(objective.sample(lambda x, _: torch.zeros_like(x), noise, steps=4, known=known, keep=keep))
    for (x, _), level in zip(seen, (749, 499, 249), strict=False):
        expected = objective.scheduler.add_noise(known, noise, torch.tensor([level]))
        torch.testing.assert_close(x[keep], expected[keep], rtol=0, atol=1e-6)
    assert torch.equal(seen[-1][0][keep], known[keep]) and float(seen[-1][0][~keep].abs().max()) < 1e-6


def test_impossible_settings_are_refused():
    for steps in (0, 1001):
        with pytest.raises(XFusionError, match=f"steps {steps} are not within 1 and the 1000 levels"):
            list(build().sample(lambda x, _: x, torch.zeros(1, 1, 1), steps=steps))
    with pytest.raises(XFusionError, match="largest_snr 0 must be above 0"):
        build(largest_snr=0.0)


class Wide(Pixels):
    """A codec whose latents have no largest value."""

    bounded = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Pixels.Config):
        """Nothing to set."""

        def build(self):
            """The codec."""
            return Wide()


def test_settings_that_latents_cannot_be_drawn_by_are_refused_before_training_and_not_in_a_pack(bases, tmp_path):
    base = bases["llama"]

    def model(media, codec=Wide.Config(), fresh=True):
        plain = model_config(base)
        return Model(replace(plain, media=media, image=replace(plain.image, codec=codec)), base, fresh=fresh)

    latents = [Diffusion.Config(prediction="velocity", largest_value=None), Diffusion.Config(largest_value=4.0)]
    for media in (*latents, Diffusion.Config(schedule="linear", largest_value=None)):
        model(media)
    model(Diffusion.Config(), Pixels.Config())
    cut = Diffusion.Config(prediction="velocity", threshold=0.995)
    refused = {
        cut: "largest_value 1 cuts off what latents of Wide hold, .* set it to None, or to 3 or more",
        Diffusion.Config(
            largest_value=None
        ): r"sqrt\(abar\) = 5e-05 of the schedule 'cosine'; predict 'velocity' or 'clean'",
    }
    for media, message in refused.items():
        with pytest.raises(XFusionError, match=message):
            model(media)
        with pytest.raises(XFusionError, match=message):  # a pack that is trained on
            model(latents[0]).set_objectives(NextToken.Config(), media)
    with pytest.raises(XFusionError, match="with largest_value None"):
        model(Diffusion.Config(largest_value=None), Pixels.Config())
    model(cut, fresh=False).save_pretrained(tmp_path / "old")
    assert xfusion.load(tmp_path / "old", backbone=base, trust=True).config.media == cut


def test_what_a_level_means_belongs_to_the_weights():
    trained = Diffusion.Config(prediction="velocity", schedule="linear", guidance=2.0)
    wanted = Diffusion.Config(weighting="min_snr", guidance=4.0)
    kept = wanted.adapted(trained)
    assert (kept.prediction, kept.schedule, kept.weighting, kept.guidance) == ("velocity", "linear", "min_snr", 4.0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_batch_is_overfitted(bases, prediction):
    """The loss of a fixed batch and noise falls to a third within 60 steps."""
    config = replace(model_config(bases["llama"]), media=Diffusion.Config(prediction=prediction))
    model, history = Model(config, bases["llama"]), []
    rows = [[s] for name, s in mixed_sequences().items() if name in ("picture behind words", "picture alone")]
    adamw = torch.optim.AdamW(model.new_parameters(), lr=4e-3)
    for _ in range(60):
        total, count = model.losses(pack(rows), generator())["diffusion"]
        history.append(float(total.detach()) / int(count))
        (total / count).backward()
        adamw.step()
        adamw.zero_grad()
    assert history[-1] < history[0] / 3, history[::10]


def test_a_model_trains_by_it_in_the_loop_and_draws(bases, tmp_path):
    config = replace(model_config(bases["llama"]), media=Diffusion.Config(weighting="min_snr"))
    stage = Stage(steps=2, warmup=1, mixture=MixtureConfig(draw=4, caption=4, largest_noise=0.5))
    model = train(
        Recipe(model=config, data="noise", stages=(stage,)),
        out=tmp_path / "run",
        source=Noise(),
        backbone=bases["llama"],
        compile=False,
        dtype=torch.float32,
        preview_every=0,
    )
    assert model.capabilities == {"text", "caption", "draw"}
    told = []
    tokens = draw_tokens(
        model, [(), ()], 16, seeds=[1, 2], steps=3, guidance=2.0, progress=lambda *a: told.append(a[:2])
    )
    assert told == [(1, 3), (2, 3), (3, 3)] and float(tokens.abs().max()) <= 1
