"""Each source of a mixture may weigh its losses: sums are weighted, counts are those of the whole step."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from contracts.table import Noise, make_model
from training.runs import StopAt, log, recipe, step_records, train

from xfusion.data import mixture
from xfusion.data.mixed import Mixed
from xfusion.data.mixture import Mixture, MixtureConfig, WeightedBatch
from xfusion.data.sequence import XFusionError
from xfusion.modalities.image import ImageModality
from xfusion.objectives.contrastive import Contrastive
from xfusion.training.loop import Interrupted
from xfusion.training.optimizer import Optimizer

MIXTURE = MixtureConfig(draw=6, caption=6, pack=2)
NAMES = ("flow_matching", "next_token")


class Others(Noise):
    """Other pictures."""

    def picture(self, index, size):
        return super().picture(index + 100, size)


def both():
    return Mixed("many+few", [Noise(6, "many"), Others(4, "few")], [Fraction(2), Fraction(1)])


def step(base, out, weights, **settings):
    """Losses and gradients of the first step; no weight is changed."""
    gradients = {}

    def keep(self, *_):
        gradients.update({name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None})
        self.forget_gradients()
        return 1.0

    config = replace(MIXTURE, loss_weights=weights, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", keep)
        train(base, out, recipe_=recipe(base, steps=1, mixture=config), source=both())
    (event,) = log(out)
    return event["losses"], gradients


@pytest.mark.parametrize("settings", [{}, {"pack": 1}, {"shots": 1}], ids=str)
def test_the_gradient_is_the_weighted_sum_of_those_of_each_source(bases, tmp_path, settings):
    base = bases["llama"]
    names = {"both": (2.0, 0.5), "many": (1.0, 0.0), "few": (0.0, 1.0)}
    runs = {name: step(base, tmp_path / name, weights, **settings) for name, weights in names.items()}
    (losses, gradients), (many, of_many), (few, of_few) = (runs[name] for name in names)
    assert losses.keys() == set(NAMES) and gradients.keys() == of_many.keys() == of_few.keys()
    for name in NAMES:
        assert many[name] > 0 and few[name] > 0
        assert losses[name] == pytest.approx(2 * many[name] + 0.5 * few[name], rel=1e-5)
    for name, gradient in gradients.items():
        wanted = 2 * of_many[name] + 0.5 * of_few[name]
        assert torch.allclose(gradient, wanted, atol=1e-5 * float(wanted.abs().max()) + 1e-9, rtol=1e-4), name


def test_the_sums_of_all_sources_are_divided_by_the_counts_of_the_step(bases, tmp_path):
    """Of captions, whose pictures are clean: without weights, the losses are those of both sources together."""
    base = bases["llama"]
    plain, _ = step(base, tmp_path / "plain", ())
    alike, _ = step(base, tmp_path / "alike", (1.0, 1.0))
    many, _ = step(base, tmp_path / "many", (1.0, 0.0))
    few, _ = step(base, tmp_path / "few", (0.0, 1.0))
    assert alike == plain
    assert plain["next_token"] == pytest.approx(many["next_token"] + few["next_token"], rel=1e-5)
    half, _ = step(base, tmp_path / "half", (0.5, 0.5))
    assert half == pytest.approx({name: 0.5 * value for name, value in plain.items()}, rel=1e-6)


def test_the_number_of_rows_has_few_values(bases, monkeypatch):
    """Each is another compiled graph; empty rows fill a part up."""
    backbone, source = bases["llama"], both()
    image = ImageModality.Config(patch=4, sizes=(16,)).build()

    def heights(weights):
        config = MixtureConfig(draw=40, caption=24, pack=2, loss_weights=weights)
        made = Mixture(source, image, (16,), backbone.encode, backbone.begin_ids, backbone.end_ids[0], config, 3)
        batches = [batch for step in range(40) for batch in made.batches(step)]
        assert sum(batch.num_sequences for batch in batches) == 40 * (40 + 24)
        return {task: {len(b.text_ids) for b in batches if b.text_reads_media == task} for task in (False, True)}

    assert heights(()) == {False: {40}, True: {12}}
    monkeypatch.setattr(mixture, "MOST_HEIGHTS", 1000)
    assert len(heights((1.0, 0.5))[False]) > 5  # as many as the shares that the sources happen to have
    monkeypatch.setattr(mixture, "MOST_HEIGHTS", 4)
    filled = heights((1.0, 0.5))
    assert filled[False] <= {10, 20, 30, 40} and filled[True] <= {3, 6, 9, 12}


def test_empty_rows_change_no_gradient(bases, tmp_path, monkeypatch):
    """Of captions: noise is drawn for whole rows."""
    plain = step(bases["llama"], tmp_path / "plain", (1.0, 0.5), draw=0)
    monkeypatch.setattr(mixture, "MOST_HEIGHTS", 1)
    losses, gradients = step(bases["llama"], tmp_path / "filled", (1.0, 0.5), draw=0)
    assert losses == pytest.approx(plain[0], rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, plain[1][name], atol=1e-5 * float(gradient.abs().max()) + 1e-9, rtol=1e-4), name


@pytest.mark.parametrize("sizes", [(16,), (8, 16)], ids=str)
def test_samples_of_one_weight_are_rows_of_their_own(bases, sizes):
    """The same samples, whatever the weights; few-shot examples count with the picture that they stand before."""
    model, backbone = make_model(bases["llama"]), bases["llama"]
    image = ImageModality.Config(patch=4, sizes=sizes).build()
    source = both()

    def batches(weights):
        config = replace(MIXTURE, loss_weights=weights)
        tail = (backbone.encode, backbone.begin_ids, backbone.end_ids[0], config, 3)
        return [Mixture(source, image, image.sizes, *tail).batches(number) for number in range(3)]

    for plain, weighted in zip(batches(()), batches((1.0, 0.25)), strict=True):
        assert not any(isinstance(batch, WeightedBatch) for batch in plain) and len(plain) == 2
        assert all(isinstance(batch, WeightedBatch) for batch in weighted) and len(weighted) == 4
        assert {batch.loss_weight for batch in weighted} == {1.0, 0.25}
        assert sum(batch.num_sequences for batch in weighted) == sum(batch.num_sequences for batch in plain) == 12
        for batch in weighted:
            media = batch.media["image"]
            sources = {source.part(index)[0].spec for index in indices(source, media, image)}
            assert sources == {{1.0: "many", 0.25: "few"}[batch.loss_weight]}
        for name in ("next_token", "flow_matching"):
            (objective,) = [o for o in model.objectives if o.name == name]
            counts = [sum(objective.count(batch).get(name, 0) for batch in group) for group in (plain, weighted)]
            assert counts[0] == counts[1] > 0


def indices(source, media, image):
    """The examples whose pictures a batch has, found by their tokens."""
    known = {}
    for index in range(len(source)):
        for size in image.sizes:
            known.setdefault(
                image.encode([source.picture(index, size)], size)[0].flatten().numpy().tobytes(), []
            ).append(index)
    found = set()
    for item in range(len(media.noised)):
        own = media.tokens[media.item == item].flatten().numpy().tobytes()
        found.update(known[own])
    return found


def test_a_run_goes_on_with_its_weights_only(bases, tmp_path):
    base = bases["llama"]
    weighted = recipe(base, steps=3, mixture=replace(MIXTURE, loss_weights=(1.0, 0.2)))
    train(base, tmp_path / "straight", recipe_=weighted, source=both())
    with pytest.raises(Interrupted):
        train(base, tmp_path / "run", recipe_=weighted, source=both(), listener=StopAt(0))
    for other, said in (
        ((1.0, 0.4), r"loss_weights\.1 was 0\.2 and is now 0\.4"),
        ((), r"loss_weights was \[1\.0, 0\.2\]"),
    ):
        changed = recipe(base, steps=3, mixture=replace(MIXTURE, loss_weights=other))
        with pytest.raises(XFusionError, match=rf"was started otherwise: stages\.0\.mixture\.{said}"):
            train(base, tmp_path / "run", recipe_=changed, source=both(), resume=True)
    train(base, tmp_path / "run", recipe_=weighted, source=both(), resume=True)
    assert step_records(tmp_path / "run") == step_records(tmp_path / "straight")


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, 2.0, 3.0), (1.0, -0.5), (1.0, math.nan), (1.0, math.inf), (0.0, 0.0)]
)
def test_weights_that_are_not_one_for_each_source_are_refused(bases, tmp_path, weights):
    base = bases["llama"]
    wrong = recipe(base, steps=1, mixture=replace(MIXTURE, loss_weights=weights))
    said = r"loss_weights .*: many\+few has 2 sources: give one weight from 0 on for each, in their order, and not 0 for all"
    with pytest.raises(XFusionError, match=said) as error:
        train(base, tmp_path / "run", recipe_=wrong, source=both())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(XFusionError, match=r"loss_weights 1 0\.5: noise has 1 source: give one weight"):
        train(base, tmp_path / "run", recipe_=recipe(base, mixture=replace(MIXTURE, loss_weights=(1.0, 0.5))))


def test_a_loss_that_compares_all_items_of_a_step_takes_no_weights(bases, tmp_path):
    base = bases["llama"]
    pairs = recipe(base, steps=1, mixture=replace(MIXTURE, loss_weights=(1.0, 0.5)))
    pairs = replace(pairs, model=replace(pairs.model, extra=(Contrastive.Config(width=16),)))
    with pytest.raises(
        XFusionError, match=r"stage 0 weighs .* but the loss contrastive compares .*mixture\.loss-weights out"
    ):
        train(base, tmp_path / "run", recipe_=pairs, source=both())
