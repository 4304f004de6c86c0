"""The suite `infilling`: known scores of objectives that know the answer, or that read nothing, and of models that do."""

from dataclasses import dataclass, replace

import pytest
import torch
from contracts.table import SIDE, Noise, model_config, of_other_groups, randomise

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.blind import PERMUTATIONS
from xfusion.evaluation.run import evaluate
from xfusion.evaluation.suites.infilling import fill, gaps
from xfusion.fusion.prefix import Prefix
from xfusion.modalities.base import Codec
from xfusion.modalities.codes import CodePort
from xfusion.modalities.image import ImageModality
from xfusion.model import Model
from xfusion.objectives.codes import NextCode

ENTRIES = 6
GAPS = ("right", "middle", "top")


class Greys(Codec):
    """A code per 4 x 4 pixels: one of six greys, which 256 levels hold exactly."""

    channels, factor = 1, 4

    class Config(Codec.Config):
        def build(self):
            return Greys().freeze()

    def _encode(self, images):
        return ((images[:, :1, ::4, ::4] + 1) / 2 * (ENTRIES - 1)).round()

    def _decode(self, latents):
        grey = latents / (ENTRIES - 1) * 2 - 1
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


class Codes(Noise):
    """Pictures that the codec keeps exactly: 4 x 4 random codes each."""

    def codes(self, index):
        return torch.randint(ENTRIES, (16, 1), generator=torch.Generator().manual_seed(index)).float()

    def picture(self, index, size):
        latents = self.codes(index).view(1, 1, 4, 4)
        return ImageModality.to_pil(Greys()._decode(latents))[0].resize((size, size))


class Knowing(NextCode):
    """Knows every picture by heart, by its rest. What is hidden must not be given to it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(NextCode.Config):
        count: int = 0

        def build(self):
            return Knowing(self)

    def sample(self, predict, noise, *, steps, known=None, keep=None, solver=None):
        assert known is not None and keep is not None and not bool(known[~keep].any())
        pictures = torch.stack([Codes().codes(i) for i in range(self.config.count)])
        same_rest = ((known[:, None] == pictures) | ~keep[:, None, :, None]).all(dim=(2, 3))
        assert bool((same_rest.sum(1) == 1).all())
        whole = pictures[same_rest.int().argmax(1)]
        yield whole, whole


class Deaf(NextCode):
    """Draws the same code everywhere, whatever is around it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(NextCode.Config):
        def build(self):
            return Deaf(self)

    def sample(self, predict, noise, *, steps, known=None, keep=None, solver=None):
        tokens = torch.where(keep[..., None], known, torch.full_like(noise, 2.0))
        yield tokens, tokens


def make(base, objective):
    config = replace(
        model_config(base),
        image=ImageModality.Config(codec=Greys.Config(), patch=1, sizes=(SIDE,), order="causal"),
        port=CodePort.Config(largest_grid=6, entries=ENTRIES, sentinels=2 if objective.infill else 0),
        fusion=Prefix.Config(),
        media=objective,
    )
    model = Model(config, base)
    randomise(model)
    return model.eval()


def permutations(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(count, generator=generator) for _ in range(PERMUTATIONS)]


def test_the_gaps_of_a_grid():
    def drawn(grid):
        return {name: mask.view(grid).int().tolist() for name, mask in gaps(grid).items()}

    assert drawn((4, 4)) == {
        "right": [[0, 0, 1, 1]] * 4,
        "middle": [[0] * 4, [0, 1, 1, 0], [0, 1, 1, 0], [0] * 4],
        "top": [[1] * 4] * 2 + [[0] * 4] * 2,
    }
    assert drawn((3, 5)) == {
        "right": [[0, 0, 1, 1, 1]] * 3,
        "middle": [[0] * 5, [0, 1, 1, 1, 0], [0] * 5],
        "top": [[1] * 5, [0] * 5, [0] * 5],
    }
    with pytest.raises(XFusionError, match="3 x 3 tokens or more, but these pictures have 2 x 4"):
        gaps((2, 4))


def test_one_who_knows_the_answer_scores_all_of_it_and_blind_what_pictures_have_in_common(bases):
    count = 7
    source = Codes(count)
    found = evaluate(make(bases["llama"], Knowing.Config(count=count)), "infilling", source=source)
    codes = torch.stack([source.codes(i) for i in range(count)])[..., 0]
    for name, gap in gaps((4, 4)).items():
        assert found[f"fit_{name}_accuracy"] == 1
        assert found[f"fit_{name}_psnr_db"] == found[f"ceiling_fit_{name}_psnr_db"] == 100
        in_common, decibels = [], []
        for order in permutations(count):
            ours, others = codes[:, gap], codes[order][:, gap]
            in_common.append((ours == others).double().mean())
            error = ((ours - others).double() * 2 / (ENTRIES - 1)).square().mean(1)
            decibels.append((10 * torch.log10(4 / error)).clamp(max=100).mean())
        assert found[f"fit_{name}_accuracy_blind"] == pytest.approx(float(sum(in_common)) / PERMUTATIONS)
        assert found[f"fit_{name}_psnr_db_blind"] == pytest.approx(float(sum(decibels)) / PERMUTATIONS, rel=1e-5)
        assert found[f"fit_{name}_accuracy_blind"] < 0.6
    assert found["settings"]["num_fit"] == count and "num_held" not in found["settings"]


def test_one_who_reads_nothing_scores_the_blind_rate(bases):
    source = Codes(5)
    found = evaluate(make(bases["llama"], Deaf.Config()), "infilling", source=source, held=of_other_groups(Codes(3)))
    codes = torch.stack([source.codes(i) for i in range(5)])[..., 0]
    for name, gap in gaps((4, 4)).items():
        assert found[f"fit_{name}_accuracy"] == pytest.approx(float((codes[:, gap] == 2).double().mean()))
        assert found[f"held_{name}_accuracy"] == pytest.approx(float((codes[:3, gap] == 2).double().mean()))
        for kind in ("accuracy", "psnr_db"):
            assert found[f"fit_{name}_{kind}"] == pytest.approx(found[f"fit_{name}_{kind}_blind"], rel=1e-12)
    assert [found["settings"][key] for key in ("num_fit", "num_held")] == [5, 3]


def test_reading_order_knows_nothing_of_a_gap_at_the_top_and_infilling_does(bases):
    """By real models of random weights: equal scores under other rests only where none of them stands before the gap."""
    plain = evaluate(make(bases["llama"], NextCode.Config()), "infilling", source=Codes(6))
    fills = evaluate(make(bases["llama"], NextCode.Config(infill=0.5)), "infilling", source=Codes(6))
    assert plain["fit_top_psnr_db"] == pytest.approx(plain["fit_top_psnr_db_blind"], rel=1e-12)
    assert plain["fit_right_psnr_db"] != pytest.approx(plain["fit_right_psnr_db_blind"], rel=1e-6)
    for gap in GAPS:
        assert fills[f"fit_{gap}_psnr_db"] != pytest.approx(fills[f"fit_{gap}_psnr_db_blind"], rel=1e-6)


def test_the_name_is_heard_where_it_is_asked_for(bases):
    model, known = make(bases["llama"], NextCode.Config(infill=0.5)), torch.stack([Codes().codes(i) for i in range(2)])
    gap = gaps((4, 4))["middle"]
    settings = {"seeds": [1, 2], "steps": 1, "guidance": 1.0}
    named, unnamed = (fill(model, known, gap, prompts, **settings) for prompts in (["tree", "house"], ["", ""]))
    assert not torch.equal(named[:, gap], unnamed[:, gap])
    assert torch.equal(named[:, ~gap], known[:, ~gap])
    scores = [
        evaluate(model, "infilling", source=Codes(6), named=named)["fit_right_psnr_db"] for named in (True, False)
    ]
    assert scores[0] != pytest.approx(scores[1], rel=1e-6)


def test_a_model_that_denoises_is_scored_in_pixels_alone(bases):
    model = Model(model_config(bases["llama"]), bases["llama"])
    randomise(model)
    found = evaluate(model.eval(), "infilling", source=Noise(3), steps=2)
    assert not any("accuracy" in name for name in found)
    for gap in GAPS:
        assert found[f"ceiling_fit_{gap}_psnr_db"] > 99 and found[f"fit_{gap}_psnr_db"] < 40
