"""Flow matching: t = 0 is clean, t = 1 is noise, in corruption, loss and sampling alike; held to diffusers."""

from dataclasses import replace

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xfusion.data.pack import pack
from xfusion.data.sequence import Media, Sequence, Text, XFusionError
from xfusion.objectives import solvers
from xfusion.objectives.base import Output
from xfusion.objectives.flow_matching import FlowMatching

PREDICTIONS = ("velocity", "noise", "clean")


def build(prediction="velocity", **settings):
    return FlowMatching.Config(prediction=prediction, **settings).build()


def batch_of(*items):
    """One row per item: (tokens, noised, has_loss)."""
    rows = []
    for number, (count, noised, loss) in enumerate(items):
        tokens = torch.rand(count, 5, generator=torch.Generator().manual_seed(number)) * 2 - 1
        state = "noised" if noised else "clean"
        media = Media(tokens=tokens, grid=(1, count), state=state, has_loss=loss)
        rows.append([Sequence(segments=(Text(ids=(1,)), media))])
    return pack(rows)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------ corrupt


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_corrupt_mixes_by_level_and_keeps_clean_pictures_clean(prediction):
    batch = batch_of((4, True, True), (3, False, False), (2, True, False))
    objective = build(prediction)
    before = batch.media["image"].tokens.clone()
    media = objective.corrupt(batch, generator()).media["image"]
    assert torch.equal(batch.media["image"].tokens, before)  # a derived batch, not a changed one
    assert torch.equal(objective.corrupt(batch, generator()).media["image"].tokens, media.tokens)
    assert not torch.equal(objective.corrupt(batch, generator(1)).media["image"].tokens, media.tokens)

    assert media.time.shape == (3,) and float(media.time[1]) == 0
    assert 0 < float(media.time[0]) < 1 and 0 < float(media.time[2]) < 1
    inside = media.item == 1
    assert torch.equal(media.tokens[inside], before[inside])
    g = generator()
    time, noise = objective.draw_time(3, g), torch.randn(before.shape, generator=g)
    for item in (0, 2):
        where, t = media.item == item, time[item]
        assert float(media.time[item]) == float(t)
        torch.testing.assert_close(media.tokens[where], (1 - t) * before[where] + t * noise[where])
        target = {"velocity": noise - before, "noise": noise, "clean": before}[prediction]
        torch.testing.assert_close(media.target[where], target[where])
        assert torch.equal(media.clean[where], before[where])  # whatever the head predicts


def test_a_batch_of_clean_pictures_is_left_alone():
    batch = batch_of((4, False, False))
    assert build().corrupt(batch, generator()) is batch
    assert build().count(batch) == {}


def test_time_is_diffusers_logit_normal():
    for mean, std in ((0.0, 1.0), (0.7, 0.5)):
        objective = build(time_mean=mean, time_std=std)
        expected = compute_density_for_timestep_sampling(
            "logit_normal", 1000, logit_mean=mean, logit_std=std, generator=generator(3)
        )
        torch.testing.assert_close(objective.draw_time(1000, generator(3)), expected)
    levels = build().draw_time(20_000, generator())
    assert float(levels.min()) > 0 and float(levels.max()) < 1
    normal = torch.logit(levels)
    assert abs(float(normal.mean())) < 0.03 and abs(float(normal.std()) - 1) < 0.03


# --------------------------------------------------------------------------------------------------------------- loss


def loss_of_clean_estimate(prediction, estimate, seed=0, **settings):
    """Loss when the head says what a given estimate of the clean tokens implies."""
    batch, objective = batch_of((4, True, True), (4, True, True), (4, False, False)), build(prediction, **settings)
    view = objective.corrupt(batch, generator(seed))
    media = view.media["image"]
    t = media.at(media.time, fill=1.0)[:, :, None]
    noise = (media.tokens - (1 - t) * estimate) / t
    head = {"velocity": noise - estimate, "noise": noise, "clean": estimate}[prediction]
    found = objective.loss(lambda _: Output(logits=None, vocabulary=None, media={"image": head}), view)
    assert int(found["flow_matching"][1]) == objective.count(view)["flow_matching"] == 2
    return float(found["flow_matching"][0]), media.time, batch.media["image"]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_estimate_costs_nothing(prediction):
    clean = batch_of((4, True, True), (4, True, True), (4, False, False)).media["image"].tokens
    assert loss_of_clean_estimate(prediction, clean)[0] < 1e-10


def test_the_three_predictions_cost_the_same_up_to_their_weights():
    """Of one clean estimate: velocity error = clean error / t^2, noise error = (1 - t)^2 times that."""
    media = batch_of((4, True, True), (4, True, True), (4, False, False)).media["image"]
    estimate = media.tokens + 0.3 * torch.randn(media.tokens.shape, generator=generator(9))
    found = {p: loss_of_clean_estimate(p, estimate, largest_weight=1e9) for p in PREDICTIONS}
    time = found["clean"][1]
    error = (estimate - media.tokens).square().mean(-1)
    per_item = torch.stack([error[media.item == i].mean() for i in (0, 1)])
    expected = {
        "clean": (per_item / time[:2] ** 2).sum(),
        "velocity": (per_item / time[:2] ** 2).sum(),
        "noise": (per_item * ((1 - time[:2]) / time[:2]) ** 2).sum(),
    }
    for prediction, value in expected.items():
        assert found[prediction][0] == pytest.approx(float(value), rel=1e-4), prediction
    capped = loss_of_clean_estimate("clean", estimate, largest_weight=1.5)[0]
    assert capped == pytest.approx(float((per_item * (time[:2] ** -2).clamp(max=1.5)).sum()), rel=1e-4)


def test_losses_of_two_modalities_are_added():
    """As their counts are."""
    objective = build()
    one, other = (
        objective.corrupt(batch_of(*items), generator(seed))
        for seed, items in ((1, [(3, True, True)] * 2), (2, [(4, True, True)]))
    )
    both = replace(one, media={"image": one.media["image"], "audio": other.media["image"]})
    predictions = {name: torch.zeros_like(media.tokens) for name, media in both.media.items()}

    def loss(batch, **media):
        output = Output(logits=lambda mask: mask, vocabulary=lambda states: states, media=media)
        return objective.loss(lambda view: output, batch)[objective.name]

    total, count = loss(both, **predictions)
    parts = loss(one, image=predictions["image"]), loss(other, image=predictions["audio"])
    assert float(total) == pytest.approx(sum(float(part) for part, _ in parts))
    assert int(count) == objective.count(both)[objective.name] == 3


def test_a_picture_counts_once_however_many_tokens_it_has():
    batch, objective = batch_of((1, True, True), (6, True, True), (3, True, False)), build("noise")
    view = objective.corrupt(batch, generator())
    media = view.media["image"]
    head = media.target + media.at(torch.tensor([1.0, 2.0, 50.0]))[:, :, None]
    total, count = objective.loss(lambda _: Output(logits=None, vocabulary=None, media={"image": head}), view)[
        "flow_matching"
    ]
    assert int(count) == 2 and float(total) == pytest.approx(1 + 4, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- sample


def oracle(prediction, clean):
    """A head that knows the clean tokens."""

    def predict(x, time):
        noise = (x - (1 - time) * clean) / time
        return {"velocity": noise - clean, "noise": noise, "clean": clean}[prediction]

    return predict


def walk(objective, predict, noise, **settings):
    return list(objective.sample(predict, noise, **settings))


@settings(max_examples=40)
@given(st.sampled_from(PREDICTIONS), st.integers(1, 30))
def test_an_oracle_recovers_the_clean_tokens_in_any_number_of_steps(prediction, steps):
    assume(prediction != "noise" or steps > 1)  # at t = 1 the noise is all there is: its prediction says nothing else
    objective, clean = build(prediction), torch.randn(2, 4, 5, generator=generator(1)).double()
    noise = torch.randn(2, 4, 5, generator=generator(2)).double()
    seen = walk(objective, oracle(prediction, clean), noise, steps=steps)
    assert len(seen) == steps
    torch.testing.assert_close(seen[-1][0], clean, rtol=0, atol=1e-9)
    for x, estimate in seen[1:] if prediction == "noise" else seen:
        torch.testing.assert_close(estimate, clean, rtol=0, atol=1e-9)
        assert x.shape == noise.shape


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_velocity_and_clean_estimate_follow_from_any_prediction(prediction):
    objective, clean = build(prediction), torch.randn(1, 4, 5, generator=generator(1)).double()
    noise = torch.randn(1, 4, 5, generator=generator(2)).double()
    for time in (0.05, 0.5, 0.95):
        x = objective.mix(clean, noise, torch.tensor(time, dtype=torch.float64))
        head = {"velocity": noise - clean, "noise": noise, "clean": clean}[prediction]
        torch.testing.assert_close(objective.velocity(head, x, time), noise - clean)
        torch.testing.assert_close(objective.clean(head, x, time), clean)


@pytest.mark.parametrize("shift", [1.0, 12.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_steps_and_signs_are_diffusers_euler_scheduler(steps, shift):
    def head(x, time):
        return torch.tanh(x) * (1 + time) - 0.3

    x = noise = torch.randn(2, 4, 5, generator=generator())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=numpy.linspace(1, 1 / steps, steps).tolist())
    seen = walk(build(sampling_shift=shift), head, noise, steps=steps)
    for t, (ours, _) in zip(scheduler.timesteps, seen, strict=True):
        x = scheduler.step(head(x, float(t) / 1000), t, x).prev_sample
        torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)
    clean = torch.rand(2, 4, 5, generator=generator(1))
    t = scheduler.timesteps[-1:]
    torch.testing.assert_close(
        build().mix(clean, noise, t / 1000), scheduler.scale_noise(clean, t, noise), rtol=0, atol=1e-6
    )


def test_a_sample_starts_at_noise_and_the_head_is_asked_at_falling_levels():
    asked = []

    def head(x, time):
        asked.append((time, x.clone()))
        return torch.zeros_like(x)

    noise = torch.randn(1, 2, 3, generator=generator())
    walk(build(), head, noise, steps=4)
    assert [t for t, _ in asked] == [1.0, 0.75, 0.5, 0.25]
    assert torch.equal(asked[0][1], noise)


def test_known_tokens_stand_at_their_noise_level_and_exactly_at_the_end():
    known, keep = torch.rand(1, 4, 5, generator=generator(3)), torch.tensor([[True, False, True, False]])
    noise = torch.randn(1, 4, 5, generator=generator())
    seen = walk(build("velocity"), lambda x, _: torch.ones_like(x), noise, steps=5, known=known, keep=keep)
    for step, (x, _) in enumerate(seen, start=1):
        t = 1 - step / 5
        torch.testing.assert_close(x[keep], ((1 - t) * known + t * noise)[keep])
        torch.testing.assert_close(x[~keep], noise[~keep] - step / 5)
    assert torch.equal(seen[-1][0][keep], known[keep])


def test_a_shift_that_walks_nowhere_is_refused():
    with pytest.raises(XFusionError, match="sampling_shift 0 must be above 0"):
        build(sampling_shift=0.0)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.8, 0.2)])
def test_an_interval_of_guidance_that_holds_no_level_is_refused(interval):
    with pytest.raises(XFusionError, match="guidance_interval"):
        FlowMatching.Config(guidance_interval=interval).build()


@pytest.mark.parametrize("steps", [0, 10**20])
def test_no_steps_and_endless_ones_are_refused(steps):
    with pytest.raises(XFusionError, match=f"steps {steps} are not within 1 and 10000"):
        walk(build(), lambda x, _: x, torch.zeros(1, 1, 1), steps=steps)


# ------------------------------------------------------------------------------------------------------------ solvers


@pytest.mark.parametrize("order", [0, 4])
def test_a_multistep_solver_has_an_order_from_1_to_3(order):
    with pytest.raises(XFusionError, match=f"of order {order}: DPM-Solver"):
        solvers.Multistep(order=order)


def test_heuns_clean_estimate_is_that_of_its_second_look():
    looks = []

    def field(x, time):
        looks.append(3 * x - time)
        return torch.ones_like(x), looks[-1]

    found = [clean for _, clean in solvers.Heun().walk(field, torch.zeros(1, 1, 1), [1.0, 0.5, 0.0], lambda x, _: x)]
    assert len(looks) == 3 and [float(one) for one in found] == [float(looks[1]), float(looks[2])]
    assert float(looks[0]) != float(looks[1])


SOLVERS = (solvers.Euler(), solvers.Heun(), solvers.Multistep(), solvers.Multistep(order=3))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize(
    ("prediction", "steps", "shift"),
    [
        (prediction, steps, shift)
        for prediction in PREDICTIONS
        for steps, shift in ((1, 1.0), (2, 6.0), (9, 100.0))
        if prediction != "noise" or steps > 1  # at t = 1 the noise is all there is: its prediction says nothing else
    ],
)
def test_every_solver_recovers_what_an_oracle_knows(solver, prediction, steps, shift):
    objective, clean = (
        build(prediction, sampling_shift=shift, solver=solver),
        torch.randn(2, 4, 5, generator=generator(1)),
    )
    noise = torch.randn(2, 4, 5, generator=generator(2))
    seen = walk(objective, oracle(prediction, clean), noise, steps=steps)
    assert len(seen) == steps
    # The noise's prediction says little of the picture at t near 1, and Heun reads it there twice.
    torch.testing.assert_close(seen[-1][0], clean, rtol=0, atol=1e-4 if prediction == "noise" else 1e-5)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_solver_asks_at_the_objectives_levels(solver):
    asked = []

    def head(x, time):
        asked.append(round(time, 6))
        return torch.zeros_like(x)

    noise = torch.randn(1, 2, 3, generator=generator())
    walk(build("clean", sampling_shift=3.0), head, noise, steps=3, solver=solver)
    levels = [1.0, 0.857143, 0.6]
    twice = [1.0, 0.857143, 0.857143, 0.6, 0.6]
    assert asked == (twice if isinstance(solver, solvers.Heun) else levels)


def flow_of_a_normal(x, time):
    """The clean estimate where clean tokens are normal with mean 1 and deviation 1/2: the walk is known."""
    share = (1 - time) * 0.25 / ((1 - time) ** 2 * 0.25 + time**2)
    return 1 + share * (x - (1 - time))


@pytest.mark.parametrize("solver", SOLVERS[1:], ids=repr)
def test_solvers_of_higher_order_err_less_at_equal_passes(solver):
    noise = torch.randn(1, 8, 8, generator=generator()).double()
    expected = 1 + 0.5 * noise  # the flow maps quantiles to quantiles
    errors = []
    for chosen, steps in ((solvers.Euler(), 16), (solver, 8 if isinstance(solver, solvers.Heun) else 16)):
        (x, _) = walk(build("clean"), flow_of_a_normal, noise, steps=steps, solver=chosen)[-1]
        errors.append(float((x - expected).abs().max()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_known_tokens_are_kept_by_every_solver(solver):
    known, keep = torch.rand(1, 4, 5, generator=generator(3)), torch.tensor([[True, False, True, False]])
    noise = torch.randn(1, 4, 5, generator=generator())
    seen = walk(build("clean"), lambda x, _: x * 0.5, noise, steps=4, known=known, keep=keep, solver=solver)
    for step, (x, _) in enumerate(seen, start=1):
        t = 1 - step / 4
        torch.testing.assert_close(x[keep], ((1 - t) * known + t * noise)[keep])


def test_solvers_have_names():
    assert [type(solvers.find(name)).__name__.lower() for name in solvers.names()] == ["euler", "heun", "multistep"]
    with pytest.raises(XFusionError, match="solver 'eul' is not one of euler, heun, multistep"):
        solvers.find("eul")
