"""Comparisons: the arithmetic by hand, and runs on a tiny random base."""

import json
import math
import mmap
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from PIL import Image as PILImage

sys.path.insert(0, str(Path(__file__).parent))

from contracts.table import VOCABULARY, Frames, Noise, make_base, make_model, of_other_groups

from xfusion.apps import comparison_page
from xfusion.apps.comparison_page import by_share
from xfusion.backbone import Backbone
from xfusion.checkpoint import differing
from xfusion.comparison import Plan, compare, summarise
from xfusion.comparison import run as walk
from xfusion.comparison.cost import (
    count_flops,
    flops_of_encoder,
    measure_time,
    peak_memory,
    tokens_added,
    trainable_parameters,
)
from xfusion.comparison.intervals import interval, paired, seeds_needed, t_quantile
from xfusion.comparison.plan import (
    GUIDANCES,
    RATE_FACTORS,
    TRIAL_SEED,
    Part,
    recipes_by_label,
    recipes_in_command,
    share_of,
    split_label,
)
from xfusion.comparison.results import portable
from xfusion.comparison.table import contributions, regime_of
from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source
from xfusion.data.templates import Templates
from xfusion.evaluation import verify
from xfusion.evaluation.machine import commit
from xfusion.evaluation.suites import emoji
from xfusion.evaluation.suites.emoji import choose_examples, part_of
from xfusion.evaluation.verify import text_keeping
from xfusion.fusion.connectors.query_transformer import Queries
from xfusion.fusion.dual_tower import DualTower
from xfusion.fusion.prefix import Prefix
from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.modalities.audio import AudioModality
from xfusion.modalities.base import Encoder
from xfusion.modalities.codecs.features import Features
from xfusion.modalities.image import ImageModality
from xfusion.modalities.port import MediaPort
from xfusion.model import BackboneConfig, ModelConfig, build
from xfusion.objectives.alignment import Alignment
from xfusion.objectives.base import NoObjective
from xfusion.objectives.contrastive import Contrastive
from xfusion.objectives.next_token import NextToken
from xfusion.training import loop
from xfusion.training.loop import Interrupted
from xfusion.training.stages import Recipe, Stage

STEP = 12
"""Samples of a step of the tiny recipe."""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return Backbone.load(str(make_base("llama", tmp_path_factory.mktemp("compared"))))


def tiny(base, mlp=40, **stage):
    """A recipe that trains in a second."""
    settings = {"rate": 2e-3, "warmup": 2, "mixture": MixtureConfig(draw=8, caption=4)} | stage
    model = ModelConfig(
        backbone=BackboneConfig(source=base.source),
        fusion=DualTower.Config(stride=2, mlp=mlp),
        image=ImageModality.Config(patch=4, sizes=(16,)),
    )
    return Recipe(model=model, data="noise", stages=(Stage(**settings),))


SCORED = {"features": False, "steps": 2, "max_drawn": 4, "max_captioned": 2}


def plan(**settings):
    return Plan(**{"samples": 3 * STEP, "seeds": (0, 1), "compile": False, "evaluation": SCORED} | settings)


@pytest.fixture(scope="module")
def counted():
    """`count_flops`, once for what several tests train on pictures of noise: it takes longer than their three steps."""
    known = {}

    def count(model, stage, source):
        key = repr((model.config, stage, [example.captions for example in source.examples]))
        if key not in known:
            known[key] = count_flops(model, stage, source)
        return known[key]

    return count


@pytest.fixture
def go(base, counted, tmp_path, monkeypatch):
    """Compare recipes in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "PROMPTS", verify.PROMPTS[:3])
    monkeypatch.setattr(walk, "count_flops", counted)

    def call(recipes, **settings):
        given = {k: settings.pop(k) for k in ("progress", "source", "out", "held", "encoder") if k in settings}
        options = {"out": "comparison/test", "source": Noise(12), "backbone": base} | given
        return compare(recipes, plan(**settings), **options)

    return call


def read(name):
    return json.loads(Path("comparison/test", name).read_text())


# --------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("probability", "degrees", "known"),
    [  # tables of the t-distribution
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 4, 2.7764),
        (0.975, 5, 2.5706),
        (0.975, 9, 2.2622),
        (0.975, 29, 2.0452),
        (0.80, 4, 0.9410),
        (0.80, 9, 0.8834),
        (0.995, 7, 3.4995),
        (0.025, 9, -2.2622),
    ],
)
def test_quantiles_of_t(probability, degrees, known):
    assert t_quantile(probability, degrees) == pytest.approx(known, abs=5e-5)


def test_an_interval_by_hand():
    # mean 3, deviation sqrt(2.5), half width 2.7764 * sqrt(2.5 / 5)
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert low == pytest.approx(3 - 2.776445 * math.sqrt(0.5), abs=1e-5)
    assert high == pytest.approx(3 + 2.776445 * math.sqrt(0.5), abs=1e-5)
    assert interval([1.0, 2.0, 3.0, 4.0]) is None


def test_seeds_needed_by_hand():
    # (2.2622 + 0.8834) / sqrt(10) = 0.9947 reaches a difference of one deviation, (2.3060 + 0.8889) / 3 = 1.065 does not
    assert seeds_needed(1.0, 1.0) == 10
    assert seeds_needed(-1.0, 1.0) == 10
    assert seeds_needed(1.0, 0.0) == 5
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(1e-6, 1.0) is None


def test_differences_are_of_pairs():
    first = {0: 1.0, 1: 5.0, 2: 2.0, 3: 8.0, 4: 3.0, 9: 100.0}
    better = {seed: value + 0.5 + 0.01 * seed for seed, value in first.items() if seed != 9} | {7: -50.0}
    found = paired(better, first)
    assert found["num_pairs"] == 5
    assert found["mean"] == pytest.approx(0.52)
    assert found["deviation"] == pytest.approx(statistics.stdev([0.50, 0.51, 0.52, 0.53, 0.54]))
    assert found["values"] == {str(s): pytest.approx(0.5 + 0.01 * s) for s in range(5)}
    assert found["verdict"] == "better"
    assert paired(better, first, "lower")["verdict"] == "worse"
    assert paired(first, better)["verdict"] == "worse"
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_nothing_is_decided_below_five_pairs_or_across_zero():
    first = dict.fromkeys(range(4), 0.0)
    few = paired({s: 1.0 + 0.001 * s for s in range(4)}, first)
    assert few["interval"] is None and few["verdict"] == "not decidable" and few["seeds_needed"] == 5
    unsure = paired(dict(enumerate([1.0, -1.0, 2.0, -1.0, 0.5])), dict.fromkeys(range(5), 0.0))
    assert unsure["interval"][0] < 0 < unsure["interval"][1]
    assert unsure["verdict"] == "not decidable"
    assert 100 < unsure["seeds_needed"] < 200


def test_differing_names_places():
    one = {"type": "a", "x": [1, {"y": 2}], "z": None}
    assert list(differing(one, {"type": "a", "x": [1, {"y": 3}], "z": None})) == [("x.1.y", 2, 3)]
    assert list(differing({"x": 1}, {"w": 2})) == [("x", 1, None), ("w", None, 2)]
    assert list(differing(one, one)) == []
    assert list(differing([1], [1, 2])) == [("", [1], [1, 2])]


def test_no_path_is_written_down():
    assert portable({"a": ["/home/someone/base", "~/b", "emoji:128", 3]}) == {"a": ["base", "b", "emoji:128", 3]}


# -------------------------------------------------------------------------------------------------------------- parts


def test_shares_are_nested_and_by_group():
    source = Noise(60)
    for i, example in enumerate(source.examples):
        source.examples = (*source.examples[:i], replace(example, group=str(i // 2)), *source.examples[i + 1 :])
    parts = {share: Part(source=source, share=share) for share in (0.1, 0.3, 1.0)}
    ids = {share: {e.id for e in part.examples} for share, part in parts.items()}
    assert [len(ids[s]) for s in (0.1, 0.3, 1.0)] == [6, 18, 60]
    assert ids[0.1] < ids[0.3] < ids[1.0]
    assert all({str(int(i) ^ 1) for i in found} == found for found in ids.values()), "a group was divided"
    third = parts[0.3]
    assert third.picture(4, 8).tobytes() == source.picture(int(third.examples[4].id), 8).tobytes()
    assert third.spec == "noise" and len(third) == 18


def test_validation_and_test_have_no_group_in_common():
    examples = Noise(200).examples
    validation, test = choose_examples(examples, part="validation"), choose_examples(examples, part="test")
    assert sorted([*validation, *test]) == list(range(200)) == choose_examples(examples)
    assert 20 <= len(validation) <= 60
    assert {part_of(examples[i].group) for i in validation} == {"validation"}
    assert choose_examples(examples, 10, "test") == sorted(choose_examples(examples, 10, "test"))
    assert set(choose_examples(examples, 10, "test")) <= set(test)


def test_a_part_is_scored_among_all(base):
    model, source = make_model(base), Noise(12)
    asked = []
    model.draw = lambda prompts, **_: asked.extend(prompts) or [source.picture(0, 16) for _ in prompts]
    found = emoji.run(
        model,
        progress=lambda *_: None,
        source=source,
        part="validation",
        features=False,
        max_captioned=1,
        gallery_size=16,
    )
    assert asked == [source.examples[i].captions[0] for i in choose_examples(source.examples, part="validation")]
    assert 0 < len(asked) < 12
    assert found["chance_fit_retrieval_pixel_at_1"] == pytest.approx(1 / 12), "the gallery stays whole"
    lonely = Noise(1)
    empty = {"test": "validation", "validation": "test"}[part_of(lonely.examples[0].group)]
    with pytest.raises(XFusionError, match="none of 1 pictures falls into the part"):
        emoji.run(model, progress=lambda *_: None, source=lonely, part=empty, features=False)


# -------------------------------------------------------------------------------------------------------------- costs


def test_flops_of_a_forward_pass_through_a_broadcast_parameter(base):
    reads = ModelConfig(
        backbone=BackboneConfig(source=base.source),
        image=ImageModality.Config(patch=4, sizes=(16,), order="causal"),
        port=Queries.Config(queries=16, query_width=32, heads=2, depth=1, mlp=8),
        fusion=Prefix.Config(),
        media=NoObjective.Config(),
    )
    model = build(reads, base)
    counted = count_flops(model, Stage(mixture=MixtureConfig(draw=0, caption=4)), Noise(12))
    assert 0 < counted.forward["caption"] < counted.training["caption"] / 1.5
    assert all(p.requires_grad and p.grad is None for p in model.new_parameters())


def test_flops_of_a_drawing_by_hand(base):
    recipe = tiny(base)
    model = build(recipe.model, base)
    stage = recipe.stages[0]
    counted = count_flops(model, stage, Noise(12))
    n, width, token, frequencies, key, mlp = 17, 64, 48, 256, 32, 40  # 16 tokens and [BOI]
    m = 8  # text positions, padded
    # Forward and backward are 1 + 2 products, or 1 + 1 where the input needs no gradient.
    port = 2 * 2 * n * token * width + 2 * 2 * frequencies * width + 3 * 2 * width * width + 3 * 2 * n * width * token
    own = 2 * (2 * n * width * width) + 2 * (2 * n * width * key) + 3 * (2 * n * width * mlp)  # q and o, k and v, MLP
    text = 2 * (2 * m * width * key)
    queries_nobody_reads = 2 * m * width * width
    attention = 2 * (2 * n * (m + n) * width)
    block = 3 * (own + text + attention) + queries_nobody_reads
    assert counted.training["draw"] == port + 2 * block  # blocks at layers 1 and 3
    assert counted.forward["draw"] < counted.training["draw"] / 2
    assert counted.step == 8 * counted.training["draw"] + 4 * counted.training["caption"]
    twice = count_flops(model, replace(stage, accumulate=2), Noise(12))
    assert twice.step == 2 * counted.step
    assert all(p.grad is None for p in model.new_parameters())


def test_texts_are_paid_once(base):
    recipe = tiny(base)
    model, source = build(recipe.model, base), Noise(3)
    source.examples = tuple(replace(e, captions=e.captions[:1]) for e in source.examples)
    counted = count_flops(model, recipe.stages[0], source)
    # Three names, with and without an article: never more than six texts, however long the run is.
    assert counted.text > 0
    assert counted.texts(1) <= counted.texts(20) == counted.texts(60) <= 6
    assert counted.total(60) - counted.total(20) == 40 * counted.step
    twice = count_flops(model, replace(recipe.stages[0], accumulate=2), source)
    assert [twice.texts(steps) for steps in (0, 1, 2, 10)] == [counted.texts(steps) for steps in (0, 2, 4, 20)]
    assert twice.step == 2 * counted.step


def test_tokens_and_parameters(base):
    model = make_model(base)
    assert tokens_added(model) == 4 * 4 + 2  # [BOI] and [EOI]
    assert trainable_parameters(model) == model.num_new_parameters
    next(iter(model.new_parameters())).requires_grad_(False)
    assert trainable_parameters(model) < model.num_new_parameters


def test_peak_memory_is_of_the_block():
    with peak_memory(torch.device("cpu")) as before:
        pass
    with peak_memory(torch.device("cpu")) as large, mmap.mmap(-1, 64 << 20) as pages:  # an allocator may have some left
        pages.write(bytes([1]) * len(pages))
    with peak_memory(torch.device("cpu")) as after:
        pass
    if before["bytes"] is None:
        pytest.skip("this system does not tell")
    assert large["bytes"] > before["bytes"] + (48 << 20)
    assert after["bytes"] < large["bytes"] - (32 << 20)


def test_time_of_a_step_and_of_a_picture(base, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    taken = measure_time(tiny(base), Noise(12), base, steps=2, compile=False)
    taken.pop("load_before")
    assert taken.pop("threads") == torch.get_num_threads()
    assert set(taken) == {"step_seconds", "draw_seconds_per_picture", "caption_seconds_per_picture"}
    assert all(seconds > 0 for seconds in taken.values())
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_text_that_changed(base, monkeypatch):
    model = make_model(base)
    kept = text_keeping(model)
    assert kept["text_bit_equal"] is True and kept["text_perplexity_change"] == 0
    real = model.text_logits

    def flat(ids, stack="base", attention_mask=None):
        return real(ids, stack, attention_mask) * (stack == "base")

    monkeypatch.setattr(model, "text_logits", flat)
    lost = text_keeping(model)
    assert lost["text_bit_equal"] is False
    assert lost["text_perplexity_fused"] == pytest.approx(VOCABULARY)  # every word is as likely
    assert lost["text_perplexity_change"] == pytest.approx(VOCABULARY - kept["text_perplexity_base"])
    # One text of them all is enough.
    for changed in range(len(verify.PROMPTS)):
        count = iter(range(len(verify.PROMPTS)))

        def once(ids, stack="base", attention_mask=None, *, count=count, changed=changed):
            return real(ids, stack, attention_mask) + (stack == "fused" and next(count) == changed)

        monkeypatch.setattr(model, "text_logits", once)
        assert text_keeping(model)["text_bit_equal"] is False


# --------------------------------------------------------------------------------------------------------------- runs


def test_the_same_recipe_twice_differs_by_nothing(go, base):
    table = go({"one": tiny(base), "same": tiny(base), "other": tiny(base, mlp=8)})
    drawing = next(s for s in table["scores"] if s["score"] == "fit_retrieval_pixel_at_1")
    for score in table["scores"]:
        assert score["rows"][1]["difference"]["values"] == {"0": 0.0, "1": 0.0}, score["score"]
        assert score["rows"][1]["difference"]["verdict"] == "not decidable"
    assert drawing["rows"][0]["interval"] is None and drawing["rows"][0]["num_runs"] == 2
    assert drawing["chance"] == pytest.approx(1 / 12)
    one, same, seed1 = (read(f"{name}.json") for name in ("one-seed0", "same-seed0", "one-seed1"))
    assert one["learning"] == same["learning"] != seed1["learning"]
    assert [n for n, _ in one["learning"]["flow_matching"]] == [12, 24, 36]
    assert Path("comparison/test/one-seed0.png").read_bytes() == Path("comparison/test/same-seed0.png").read_bytes()
    with PILImage.open("comparison/test/real.png") as real:
        assert real.size == (8 * 16, 16)
        first = choose_examples(Noise(12).examples, 8)[0]
        assert real.crop((0, 0, 16, 16)).tobytes() == Noise(12).picture(first, 16).tobytes()
    assert one["budget"] == {"kind": "samples", "asked_samples": 36, "steps": [3], "samples": 36}
    assert {"recipe", "seed", "budget", "settings", "scores", "cost", "machine", "commit"} <= set(one)
    assert one["settings"]["recipe"]["seed"] == one["settings"]["recipe"]["model"]["init_seed"] == 0
    assert seed1["settings"]["recipe"]["seed"] == seed1["settings"]["recipe"]["model"]["init_seed"] == 1
    assert one["scored"]["seed"] == 0 and seed1["scored"]["seed"] == walk.SEEDS_APART
    assert table["text"]["one"] | {"perplexity_base": 0, "perplexity_fused": 0} == {
        "declared": True,
        "bit_equal": 2,
        "num_runs": 2,
        "perplexity_base": 0,
        "perplexity_fused": 0,
    }
    assert [row["trainable_parameters"] for row in table["cost"]] == [75_440, 75_440, 63_152]
    assert any("nothing was tuned" in note for note in table["notes"])
    assert any("n < 5: no interval" in note for note in table["notes"])
    assert table == summarise("comparison/test"), "the files alone give the table"
    written = "".join(p.read_text() for p in Path("comparison/test").glob("*.json"))
    assert str(Path.cwd()) not in written and str(Path(base.source)) not in written


def test_what_is_done_is_not_done_again(go, base, monkeypatch):
    recipes = {"one": tiny(base)}
    first = go(recipes)
    trained = []
    monkeypatch.setattr(
        walk, "train", lambda recipe, **settings: trained.append(recipe.seed) or loop.train(recipe, **settings)
    )
    assert go(recipes) == first
    assert trained == []
    before = read("one-seed1.json")
    Path("comparison/test/one-seed1.json").unlink()
    go(recipes)
    assert trained == [1]
    assert read("one-seed1.json")["scores"] == before["scores"]
    go(recipes | {"two": tiny(base, mlp=8)}, seeds=(0, 1, 2))
    assert trained == [1, 0, 1, 2, 2], "only what is missing: two's three seeds and one's third"


@pytest.mark.full
def test_time_is_measured_once_all_runs_stand(go, base, monkeypatch):
    """So that it can be asked for later, on an idle machine, and is of no moment at which another process trains."""
    recipes, stood = {"one": tiny(base), "two": tiny(base, mlp=8)}, []
    assert all(row["time"] is None for row in go(recipes)["cost"])

    def timed(recipe, part, backbone, **settings):
        stood.append(len(list(Path("comparison/test").glob("*-seed*.json"))))
        return {"threads": 1, "step_seconds": float(recipe.model.fusion.mlp)}

    monkeypatch.setattr(walk, "measure_time", timed)
    table = go(recipes, measure_time=True)
    assert [row["time"]["step_seconds"] for row in table["cost"]] == [40.0, 8.0]
    go(recipes, measure_time=True, seeds=(0, 1, 2))
    assert stood == [4, 4, 6, 6], "timed again only for new runs"
    assert read("one-seed2.json")["cost"]["time"]["step_seconds"] == 40.0


def test_other_settings_are_refused(go, base):
    go({"one": tiny(base)}, seeds=(0,))
    with pytest.raises(XFusionError, match=r"one-seed0\.json was made with settings.*rate = 0\.002, now it is 0\.001"):
        go({"one": tiny(base, rate=1e-3)}, seeds=(0,))
    with pytest.raises(XFusionError, match=r"evaluation\.steps = 2, now it is 3"):
        go({"one": tiny(base)}, seeds=(0,), evaluation=SCORED | {"steps": 3})
    with pytest.raises(XFusionError, match="compares with 'one', and now 'two' comes first"):
        go({"two": tiny(base), "one": tiny(base)}, seeds=(0,))


def test_a_run_that_was_stopped_goes_on(go, base):
    recipes = {"one": tiny(base), "two": tiny(base, mlp=8)}
    whole = go(recipes, out="comparison/whole", seeds=(0,))

    def stop(part, done, total):
        if "two-seed0" in part and (done, total) == (2, 3):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        go(recipes, progress=stop, seeds=(0,))
    assert {p.name for p in Path("comparison/test").glob("*-seed*.json")} == {"one-seed0.json"}
    steps = []
    again = go(
        recipes, progress=lambda part, done, total: steps.append((part, done)) if total == 3 else None, seeds=(0,)
    )
    assert again["scores"] == whole["scores"]
    assert [done for part, done in steps if part.endswith("two-seed0")] == [0, 3], (
        "the first two steps were taken again"
    )
    log = Path("runs/compare/test/two-seed0/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log if '"event": "step"' in line] == [0, 1, 2]


def test_a_run_that_was_stopped_goes_on_at_no_other_rate(go, base):
    """`train` would resume it: a run of a comparison has one rate from its first step to its last."""

    def stop(part, done, total):
        if "one-seed0" in part and (done, total) == (2, 3):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        go({"one": tiny(base)}, progress=stop, seeds=(0,))
    with pytest.raises(XFusionError, match=r"one-seed0/state was made with stages\.0\.rate = 0\.002, now it is 0\.001"):
        go({"one": tiny(base, rate=1e-3)}, seeds=(0,))


def test_processes_share_the_work(go, base):
    """While one holds a run, another takes the other runs; nothing is done twice, and the table is the same."""
    recipes = {"one": tiny(base), "two": tiny(base, mlp=8)}
    whole = go(recipes, out="comparison/whole", seeds=(0,))
    code = """if True:
        import sys
        from filelock import FileLock
        with FileLock("runs/compare/test/.two-seed0.lock", timeout=0):
            print("held", flush=True)
            sys.stdin.read()
    """
    Path("runs/compare/test").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        go(recipes, seeds=(0,))
        assert {p.name for p in Path("comparison/test").glob("*-seed*.json")} == {"one-seed0.json"}
        other.stdin.close()
        other.wait()
    assert go(recipes, seeds=(0,))["scores"] == whole["scores"], "the system frees what a dead process held"


def test_two_recipes_of_one_name_are_told_apart():
    both = recipes_by_label(["single_tower(stride=10)", "slow=single_tower(stride=10, rate=1e-3)"])
    assert {label: recipe.stages[0].rate for label, recipe in both.items()} == {"single_tower": 4e-3, "slow": 1e-3}
    assert split_label("folder/file.py:mine(a=1)") == ("mine", "folder/file.py:mine(a=1)")
    assert split_label("b=folder/file.py:mine(a=1)") == ("b", "folder/file.py:mine(a=1)")
    with pytest.raises(XFusionError, match=r"two of the recipes are called 'xfusion'.*write LABEL=RECIPE"):
        recipes_by_label(["xfusion", "xfusion(stride=10)"])


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("XFUSION_COMMIT", "abc")
    assert commit() == {"id": "abc", "changed_files": None}


def test_unlike_recipes_are_refused(go, base):
    one = tiny(base)
    codec = one.with_model(image=ImageModality.Config(codec=Features.Config(), sizes=(224,)))
    with pytest.raises(XFusionError, match=r"one and two differ in model\.image\.codec"):
        go({"one": one, "two": codec})
    other_base = one.with_model(backbone=BackboneConfig(source="elsewhere"))
    with pytest.raises(XFusionError, match=r"differ in model\.backbone\.source: .* and 'elsewhere'.*--backbone"):
        compare({"one": one, "two": other_base}, plan(), out="comparison/test", source=Noise(12))
    with pytest.raises(XFusionError, match="differ in data: 'noise' and 'photos'.*--data"):
        compare({"one": one, "two": replace(one, data="photos")}, plan(), out="comparison/test", backbone=base)
    with pytest.raises(XFusionError, match="two would train 32 samples in steps of .2., one 36 in .3.: .*multiple"):
        go({"one": one, "two": tiny(base, mixture=MixtureConfig(draw=12, caption=4))})
    with pytest.raises(XFusionError, match="^xfusion is of pictures, slm of sounds: compare those of pictures alone$"):
        compare(["xfusion", "slm"], plan(), out="comparison/test", backbone=base)
    with pytest.raises(XFusionError, match=r"differ in model\.audio\.codec: .* the same codec or encoder"):
        compare(["slm", "audiopalm"], plan(evaluation={}), out="comparison/test", backbone=base)
    assert not Path("comparison/test").exists(), "nothing was trained or written"


def test_what_else_differs_is_said(go, base):
    table = go({"one": tiny(base), "two": tiny(base, mixture=MixtureConfig(draw=4, caption=8))}, seeds=(0,))
    assert table["differences"]["two"] == [
        {"where": "stages.0.mixture.draw", "first": 8, "this": 4},
        {"where": "stages.0.mixture.caption", "first": 4, "this": 8},
    ]
    assert any("two differs from one: stages.0.mixture.draw 8 -> 4" in note for note in table["notes"])


def test_bad_plans(go, base):
    for settings, message in (
        ({"samples": STEP - 1}, f"one: {STEP - 1} samples are less than one step of {STEP}"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (0, TRIAL_SEED)}, "which trials have"),
        ({"shares": (0.0,)}, "shares .0.0.: above 0"),
        ({"trials": 9}, "trials 9: from 1"),
        ({"trials": 2, "evaluation": {"guidance": 2}}, "guidance is tuned by 2 trials and also given"),
        ({"evaluation": {"seed": 3}}, "the setting 'seed' of the evaluation is the comparison's own"),
        ({"evaluation": {"max_drwn": 3}}, "has no setting 'max_drwn' .did you mean 'max_drawn'"),
        ({"evaluation": {"max_drawn": "many"}}, "max_drawn is 'many', and has to be int or null"),
    ):
        with pytest.raises(XFusionError, match=message):
            go({"one": tiny(base)}, **settings)
    Path("results.json").touch()
    with pytest.raises(XFusionError, match=r"^results\.json is a file: name a folder for the results$"):
        go({"one": tiny(base)}, out="results.json")
    with pytest.raises(XFusionError, match="two: stride 0, offset 0 puts no block into 4 layers"):
        go({"one": tiny(base), "two": tiny(base).with_model(fusion=DualTower.Config(stride=0))})
    assert not Path("comparison").exists() and not Path("runs").exists(), "nothing was trained or written before"
    with pytest.raises(XFusionError, match="cannot be part of a file name"):
        go({"../one": tiny(base)})
    with pytest.raises(XFusionError, match="two of the recipes are called 'xfusion'"):
        go(["xfusion", "xfusion"])


def test_equal_flops(go, base):
    table = go({"large": tiny(base), "small": tiny(base, mlp=8)}, samples=60 * STEP, seeds=(0,), budget="flops")
    large, small = (read(f"{label}-seed0.json") for label in ("large", "small"))
    assert large["budget"]["steps"] == [60]
    assert small["budget"]["steps"][0] > 60
    assert small["budget"]["flops"] == pytest.approx(large["budget"]["flops"], rel=0.01)
    recipe = tiny(base)
    counted = count_flops(build(recipe.model, base), recipe.stages[0], Noise(12))
    assert large["budget"]["flops"] == counted.total(60) == 60 * counted.step + counted.texts(60) * counted.text
    assert table["cost"][1]["training_flops"] == small["budget"]["flops"]


@dataclass(frozen=True, kw_only=True)
class Sized(DualTower.Config):
    """A dual tower that comes in sizes."""

    def sizes(self, num_layers: int) -> Iterator["Sized"]:
        del num_layers
        for mlp in (8, 16, 38, 48, 64):
            yield replace(self, mlp=mlp)


def test_parameters_are_matched(go, base):
    first, other = tiny(base, mlp=40), tiny(base)
    sized = other.with_model(fusion=Sized(stride=2, mlp=80))
    go({"one": first, "two": sized}, seeds=(0,), match_parameters=True, samples=STEP)
    found = read("two-seed0.json")
    assert found["settings"]["recipe"]["model"]["fusion"]["mlp"] == 38
    # An MLP unit is three rows of 64 numbers in each of two blocks.
    assert found["settings"]["matched_parameters"] == {
        "own": 75_440 + 40 * 384,
        "matched": 75_440 - 2 * 384,
        "first": 75_440,
    }
    assert found["cost"]["trainable_parameters"] == 75_440 - 768


def test_parameters_that_cannot_be_matched(go, base):
    first = tiny(base, mlp=56)
    sized = first.with_model(fusion=Sized(stride=2, mlp=8))
    with pytest.raises(XFusionError, match=r"two cannot be matched to one: .* trains 78,512 parameters, one 81,584"):
        go({"one": first, "two": sized}, match_parameters=True)


class Averages(Encoder):
    """Colours of a coarse grid."""

    name = fingerprint = "averages"

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        width = 48
        fingerprint = "averages"

        def build(self):
            return Averages()

    def maps(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4)

    def features(self, images):
        return self.maps(images).flatten(1)


def test_a_teacher_does_not_score(go, base):
    plain = tiny(base)
    aligned = Alignment.Config(layer=2, encoder=Averages.Config())
    taught = plain.with_model(extra=(aligned,))
    scored = {k: v for k, v in SCORED.items() if k != "features"}
    table = go({"plain": plain, "taught": taught}, seeds=(0,), encoder=Averages(), evaluation=scored)
    rows = {s["score"]: [row["mean"] for row in s["rows"]] for s in table["scores"]}
    seen = rows["fit_retrieval_feature_at_10"]
    assert seen[0] is not None and seen[1] is None and None not in rows["fit_retrieval_pixel_at_10"]
    assert [read(f"{name}-seed0.json")["scored"]["encoder"] for name in ("plain", "taught")] == ["averages", None]
    assert "No feature score for taught: a frozen encoder took part in training." in table["notes"]


def test_shares_of_the_pictures(go, base):
    table = go({"one": tiny(base)}, seeds=(0,), shares=(0.5, 1.0))
    half, whole = read("one-seed0-share50.json"), read("one-seed0.json")
    assert (half["settings"]["num_pictures"], whole["settings"]["num_pictures"]) == (6, 12)
    assert half["scores"]["num_concepts"] == 6
    assert half["budget"]["samples"] == whole["budget"]["samples"]
    assert table["shares"] == [1.0, 0.5]
    assert [s["share"] for s in table["scores"] if s["score"] == "fit_caption_f1"] == [1.0, 0.5]
    table = go({"one": tiny(base), "two": tiny(base, mlp=8)}, seeds=(0,), shares=(1.0,))  # it has no run of the half
    means = {s["share"]: s["rows"][0]["mean"] for s in table["scores"] if s["score"] == "fit_caption_f1"}
    assert by_share(table, "fit_caption_f1") == {"one": [(50.0, means[0.5]), (100.0, means[1.0])]}


def test_samples_of_a_later_call_are_not_shown_under_other_words(go, base):
    """A smaller share lacks some of the pictures that the first call showed: its drawings are of other prompts."""
    go({"one": tiny(base)}, seeds=(0,))
    before, real = read("comparison.json")["prompts"], Path("comparison/test/real.png").read_bytes()
    table = go({"one": tiny(base)}, seeds=(0, 1), shares=(1.0, 0.5))
    assert read("comparison.json")["prompts"] == table["prompts"] == before
    assert Path("comparison/test/real.png").read_bytes() == real
    small = read("one-seed1-share50.json")["prompts"]
    assert small != before and len(small) <= len(before)
    assert "one-seed1-share50" in table["drawn_otherwise"] and "one-seed0" not in table["drawn_otherwise"]
    shown = comparison_page.render(table, Path("comparison/test")).count('class="strips"')
    assert shown == sum(f"one-seed{seed}" not in table["drawn_otherwise"] for seed in (0, 1))


def test_commands_of_all_calls_are_kept(base, go, monkeypatch):
    recipes = {"one": tiny(base), "two": tiny(base, mlp=8)}
    settings = {"plan": plan(seeds=(0,)), "out": "comparison/test", "source": Noise(12), "backbone": base}
    for command in (
        "xfusion compare one=tiny 'two=tiny(8)'",
        "xfusion compare one=tiny --seeds 1",
        "xfusion compare one=tiny",
    ):
        compare({"one": recipes["one"]}, **settings, command=command)
    table = compare(recipes, **settings, command="xfusion compare one=tiny --seeds 1")
    assert table["command"].splitlines() == [
        "xfusion compare one=tiny 'two=tiny(8)'", "xfusion compare one=tiny --seeds 1", "xfusion compare one=tiny"
    ]  # fmt: skip
    assert recipes_in_command(table["command"]) == {"one": "tiny", "two": "tiny(8)"}


def test_a_run_that_diverges_does_not_keep_the_others_from_theirs(go, base, monkeypatch):
    calls = []

    def diverging(recipe, **settings):
        calls.append(recipe.stages[0].rate)
        if recipe.stages[0].rate > 1e-2:
            raise loop.Diverged("the loss next_token is nan at step 1: training stopped")
        return loop.train(recipe, **settings)

    monkeypatch.setattr(walk, "train", diverging)
    recipes = {"bad": tiny(base, rate=0.5), "good": tiny(base)}
    for _ in range(2):
        with pytest.raises(
            XFusionError, match=r"bad-seed0: the loss next_token is nan at step 1 \(and those of bad-seed1\)"
        ):
            go(recipes)
        assert sorted(p.stem for p in Path("comparison/test").glob("*-seed*.json")) == ["good-seed0", "good-seed1"]
    assert len(calls) == 6, "what is finished is not done again"
    for _ in range(2):
        with pytest.raises(
            XFusionError, match="wild-trials: the loss was not finite at any of 2 rates; the other runs are finished"
        ):
            go({"tame": tiny(base), "wild": tiny(base, rate=0.5)}, trials=2, seeds=(0,), out="comparison/wild")
    assert Path("comparison/wild/tame-seed0.json").exists() and not Path("comparison/wild/wild-seed0.json").exists()


def test_a_rate_that_diverges_is_a_trial_that_lost(go, base, monkeypatch):
    def diverging(recipe, **settings):
        if recipe.stages[0].rate == 2e-3:
            raise loop.Diverged("the loss is nan: training stopped")
        return loop.train(recipe, **settings)

    monkeypatch.setattr(walk, "train", diverging)
    go({"one": tiny(base)}, trials=2, seeds=(0,))
    first, second = read("one-trials.json")["rates"]
    assert first == {"factor": 1.0, "score": None, "diverged": "the loss is nan"} and second["score"] is not None
    assert read("one-seed0.json")["settings"]["tuning"]["rate_factor"] == second["factor"] != 1.0


def test_a_table_of_unfinished_runs(go, base):
    """Another process is not done with the first recipe's run on all pictures; a perplexity was not finite."""
    go({"one": tiny(base), "two": tiny(base, mlp=8)}, seeds=(0,), shares=(1.0, 0.5))
    Path("comparison/test/one-seed0.json").unlink()
    for name in ("two-seed0.json", "two-seed0-share50.json"):
        run = read(name)
        run["scores"] |= {"text_bit_equal": False, "text_perplexity_fused": None, "text_perplexity_change": None}
        Path("comparison/test", name).write_text(json.dumps(run))
    table = summarise("comparison/test")
    assert table["first"] == "one" and table["shares"] == [1.0, 0.5]
    assert "<svg" in comparison_page.render(table, Path("comparison/test"))


def test_trials_choose_on_validation_and_freeze(go, base, monkeypatch):
    """The trial of half the rate and the guidance 1.5 score best; neither the test part nor its seeds are looked at."""
    real, asked, trained = walk.evaluate, [], []

    def scored(model, suite, **settings):
        found = real(model, suite, **settings)
        asked.append({k: settings.get(k) for k in ("part", "seed", "guidance")})
        if settings["part"] == "validation":
            guidance = settings.get("guidance")
            by_guidance = {None: 0.5, 1.5: 0.9, 3.0: 0.1, 1.0: 0.2}[guidance]
            found["fit_retrieval_pixel_at_10"] = by_guidance + (guidance is None) * 0.1 * (trained[-1] < 2e-3)
            found["fit_caption_f1"] = 0.0
        return found

    def noted(recipe, **settings):
        trained.append(recipe.stages[0].rate)
        return loop.train(recipe, **settings)

    monkeypatch.setattr(walk, "evaluate", scored)
    monkeypatch.setattr(walk, "train", noted)
    table = go({"one": tiny(base)}, trials=3)
    assert trained[:3] == [2e-3 * factor for factor in RATE_FACTORS[:3]] and trained[-2:] == [1e-3, 1e-3]
    parts = [a["part"] for a in asked]
    assert parts == ["validation"] * 6 + ["test"] * 2
    assert [a["guidance"] for a in asked] == [None] * 3 + list(GUIDANCES[:3]) + [1.5] * 2
    assert {a["seed"] for a in asked[:6]}.isdisjoint({a["seed"] for a in asked[6:]})
    chosen_file = read("one-trials.json")
    assert chosen_file["chosen"] == {"rate_factor": 0.5, "guidance": 1.5}
    assert [trial["score"] for trial in chosen_file["guidances"]] == pytest.approx([0.05, 0.45, 0.1])
    run = read("one-seed0.json")
    assert run["settings"]["tuning"] == {"trials": 3, "rate_factor": 0.5, "guidance": 1.5}
    assert run["scored"]["guidance"] == 1.5 and run["scored"]["part"] == "test"
    prompts = json.loads(Path("comparison/test/comparison.json").read_text())["prompts"]
    by_name = {e.captions[0]: e.group for e in Noise(12).examples}
    assert {part_of(by_name[p]) for p in prompts} == {"test"}
    assert any("3 rates and 3 strengths" in note for note in table["notes"])
    count = len(trained)
    go({"one": tiny(base)}, trials=3)
    assert len(trained) == count, "frozen: nothing is tried again"


@pytest.fixture
def scored(monkeypatch):
    """Give a score of trials to be measured instead: the numbers of the trials, in turn."""

    def give(name, values):
        real, turns = walk.evaluate, iter(values)

        def evaluate(model, suite, **settings):
            found = real(model, suite, **settings)
            return found | ({name: next(turns)} if settings["part"] == "validation" else {})

        monkeypatch.setattr(walk, "evaluate", evaluate)

    return give


def test_trials_of_a_recipe_that_does_not_draw(go, base, scored):
    """A recipe like clip is chosen by a score of its own; it has no guidance to try."""
    scored("held_caption_mrr", (0.5, 0.2, 0.9))  # the first of a call that asks for other scores
    matches = {"text": NextToken.Config(weight=0.0), "media": NoObjective.Config(), "extra": (Contrastive.Config(),)}
    mixture = MixtureConfig(draw=STEP, caption=0, templates=Templates(caption_dropout=0.0))
    recipe = tiny(base, mixture=mixture).with_model(**matches)
    held = of_other_groups(Noise(12))
    assert {part_of(example.group) for example in held.examples} == {"validation", "test"}
    settings = {"trials": 2, "seeds": (0,), "held": held}
    with pytest.raises(
        XFusionError, match="trials choose by fit_retrieval_pixel_at_10, fit_caption_f1, and one has none of"
    ):
        go({"one": recipe}, **settings)
    go({"one": recipe}, **settings, choose_by=("held_caption_mrr",))
    tried, run = read("one-trials.json"), read("one-seed0.json")
    assert tried["chosen"] == {"rate_factor": 0.5, "guidance": None} and tried["guidances"] == []
    assert run["settings"]["tuning"]["choose_by"] == ["held_caption_mrr"] and "held_caption_mrr" in run["scores"]


def test_runs_that_do_not_belong_together(go, base):
    go({"one": tiny(base), "two": tiny(base, mlp=8)}, seeds=(0,))
    path, kept = Path("comparison/test/two-seed0.json"), read("two-seed0.json")

    def spoilt(*place, value):
        found = json.loads(json.dumps(kept))
        inside = found
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = value
        path.write_text(json.dumps(found))

    for place, value, message in (
        (("budget", "samples"), 48, "two-seed0.json would train 48 samples .* one-seed0.json 36"),
        (("budget", "kind"), "flops", "a budget in flops, one-seed0.json one in samples: they cannot be compared"),
        (
            ("settings", "base", "fingerprint"),
            "other",
            r"two-seed0.json and one-seed0.json cannot .* base\.fingerprint",
        ),
        (("settings", "recipe", "model", "image", "sizes"), [7], r"recipe\.model\.image\.sizes\.0 is 7 and \d+"),
        (("settings", "data"), "photos", "data is 'photos' and 'noise'"),
        (("settings", "tuning", "trials"), 3, "tuning.trials is 3 and 1"),
        (("settings", "evaluation", "steps"), 9, "evaluation.steps is 9 and 2"),
        (("settings", "dtype"), "float64", "dtype is 'float64' and"),
    ):
        spoilt(*place, value=value)
        with pytest.raises(XFusionError, match=message):
            summarise("comparison/test")
    spoilt("scored", "encoder", value="one encoder")
    summarise("comparison/test")
    one = read("one-seed0.json")
    one["scored"]["encoder"] = "another"
    Path("comparison/test/one-seed0.json").write_text(json.dumps(one))
    with pytest.raises(XFusionError, match="scored by two encoders"):
        summarise("comparison/test")
    path.write_text("{")
    with pytest.raises(XFusionError, match="cannot be read"):
        summarise("comparison/test")
    shutil.rmtree("comparison/test")
    with pytest.raises(XFusionError, match="holds no result of a comparison"):
        summarise("comparison/test")


def test_runs_of_several_machines_are_said(go, base):
    go({"one": tiny(base)}, seeds=(0,), samples=STEP)
    assert not any("machines" in note for note in summarise("comparison/test")["notes"])
    run = read("one-seed0.json")
    run["seed"], run["machine"]["gpu"] = 1, "another GPU"
    Path("comparison/test/one-seed1.json").write_text(json.dumps(run))
    (note,) = (note for note in summarise("comparison/test")["notes"] if "machines" in note)
    assert note.startswith("The runs are of 2 machines (") and "another GPU, torch " in note


def test_learned_shares_of_towers_at_other_layers(tmp_path):
    (tmp_path / "shares-one.json").write_text(json.dumps({"share_layer0_word": 0.2, "share_layer2_word": 0.4}))
    (tmp_path / "shares-two.json").write_text(json.dumps({"share_layer0_word": 0.6, "share_layer1_word": 0.8}))
    found = contributions(tmp_path)
    assert found == {"layer 0": {"word": pytest.approx(0.4)}, "layer 2": {"word": 0.4}, "layer 1": {"word": 0.8}}


def test_intervals_from_files(go, base):
    """Five runs by copying one: the table's interval is the one of the hand-made values."""
    go({"one": tiny(base), "two": tiny(base)}, seeds=(0,), samples=STEP)
    scores = {"one": [0.5, 0.6, 0.4, 0.5, 0.5], "two": [0.7, 0.8, 0.6, 0.7, 0.71]}
    for label, values in scores.items():
        for seed, value in enumerate(values):
            run = read(f"{label}-seed0.json")
            run["seed"], run["scores"]["fit_caption_f1"] = seed, value
            run["scores"] |= {"fit_caption_f1_blind": 0.1 * seed, "text_perplexity_change": -value}
            run["cost"]["peak_memory"]["bytes"] = (2, 9, 4, 1, 3)[seed]
            run["cost"] |= {"wall_minutes": (1, 30, 2, 3, 9)[seed], "time": {"step_seconds": (5, 4, 90, 1, 2)[seed]}}
            Path(f"comparison/test/{label}-seed{seed}.json").write_text(json.dumps(run))
    table = summarise("comparison/test")
    cost = table["cost"][0]
    assert (cost["peak_memory"]["bytes"], cost["wall_minutes"], cost["time"]) == (9, 3, {"step_seconds": 4})
    perplexity, f1 = (
        next(s for s in table["scores"] if s["score"] == name) for name in ("text_perplexity_change", "fit_caption_f1")
    )
    assert perplexity["rows"][1]["difference"]["verdict"] == "better, untuned"  # the lower one
    assert f1["blind"] == pytest.approx(0.2)
    one, two = f1["rows"]
    assert one["interval"] == pytest.approx(
        [0.5 - 2.776445 * math.sqrt(0.005 / 5), 0.5 + 2.776445 * math.sqrt(0.005 / 5)]
    )
    assert two["difference"]["mean"] == pytest.approx(0.202)
    # deviations of the differences from 0.202: four of -0.002, one of 0.008
    half = 2.776445 * math.sqrt((4 * 0.002**2 + 0.008**2) / 4 / 5)
    assert two["difference"]["interval"] == pytest.approx([0.202 - half, 0.202 + half])
    assert two["difference"]["verdict"] == "better, untuned"
    assert two["difference"]["seeds_needed"] == 5
    assert not any("n < 5" in note for note in table["notes"])
    for path in Path("comparison/test").glob("*-seed*.json"):
        run = json.loads(path.read_text())
        run["settings"]["tuning"] |= {"trials": 3, "guidance": 1.5}
        path.write_text(json.dumps(run))
    f1 = next(s for s in summarise("comparison/test")["scores"] if s["score"] == "fit_caption_f1")
    assert f1["rows"][1]["difference"]["verdict"] == "better"  # of rates that were tried alike


def test_results_older_than_the_label_are_not_ranked_between_regimes(go, base):
    """What the mechanism that a run recorded trains decides, where the run itself does not say."""
    go(
        {"one": tiny(base), "two": tiny(base), "tower": tiny(base).with_model(fusion=SharedDecoder.Config())},
        seeds=(0,),
    )
    for label, f1 in (("one", 0.5), ("two", 0.7), ("tower", 0.9)):
        for seed in range(5):
            run = read(f"{label}-seed0.json")
            run.pop("regime", None)
            run["seed"], run["scores"]["fit_caption_f1"] = seed, f1 + 0.01 * seed * (label != "one")
            Path(f"comparison/test/{label}-seed{seed}.json").write_text(json.dumps(run))
    table = summarise("comparison/test")
    assert table["regimes"] == {"one": "strictly frozen", "two": "strictly frozen", "tower": "as in the paper"}
    for score in table["scores"]:
        _, two, tower = (row["difference"] for row in score["rows"])
        assert tower["verdict"] == "another regime, not ranked" and tower["seeds_needed"] is None
        assert two["verdict"] in ("better, untuned", "worse, untuned", "not decidable")
    f1 = next(s for s in table["scores"] if s["score"] == "fit_caption_f1")
    assert f1["rows"][1]["difference"]["verdict"] == "better, untuned"
    assert f1["rows"][2]["difference"]["mean"] == pytest.approx(0.42) and f1["rows"][2]["difference"]["interval"]
    told = "Regime, or what of the base is trained: one: strictly frozen; two: strictly frozen; tower: as in the paper."
    assert any(note.startswith(told) for note in table["notes"])
    run = read("tower-seed0.json")  # a mechanism that is not here: nobody knows what it trains
    run["settings"]["recipe"]["model"]["fusion"] = {"type": "elsewhere:Fusion.Config"}
    assert regime_of(run) is None and regime_of(run | {"regime": "LoRA"}) == "LoRA"


def test_the_encoder_is_counted_by_itself_and_said_to_be_left_out(go, base):
    """FLOPs of a step are the same whatever made the tokens; the encoder's own stand beside them."""
    image = ImageModality.Config(codec=Features.Config.of(None), patch=7, sizes=(224,))
    recipe = tiny(base).with_model(image=image, media=NoObjective.Config())
    recipe = replace(recipe, stages=(replace(recipe.stages[0], mixture=MixtureConfig(draw=0, caption=4)),))
    found = flops_of_encoder(recipe.model)
    assert 0.7e9 < found < 0.85e9 and flops_of_encoder(tiny(base).model) == 0  # EfficientNet-Lite0: 0.39 G products
    model, seen = build(recipe.model, base), []
    whole = type(model.modality.codec).encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.modality.codec), "encode", lambda *a: seen.append(len(a[1])) or whole(*a))
        counted = count_flops(model, recipe.stages[0], Noise(12))
    assert sum(seen) == 4 and 0 < counted.training["caption"] < found  # they were read, and none of it was counted
    go({"one": recipe}, seeds=(0,), samples=4, evaluation={"max_captioned": 2, "max_held": 0, "features": False})
    assert read("one-seed0.json")["cost"]["encoder_flops"] == found
    (note,) = [note for note in summarise("comparison/test")["notes"] if "encoder" in note]
    assert "0.77 GFLOPs per picture" in note and "left out" in note


# ------------------------------------------------------------------------------------------------------------- sounds

NAMES = ("low", "high")


def levels(folder, percents):
    """A sound per level, named by its sign."""
    folder.mkdir()
    for percent in percents:
        soundfile.write(folder / f"{percent}.wav", numpy.full(30, percent / 100), 2000)
        (folder / f"{percent}.txt").write_text(NAMES[percent > 0])


def hears(base, **stage):
    """A recipe that hears and trains in a second."""
    settings = {"rate": 1e-2, "warmup": 2, "ema": 0, "mixture": MixtureConfig(draw=0, caption=STEP)} | stage
    model = ModelConfig(
        backbone=BackboneConfig(source=base.source),
        audio=AudioModality.Config(codec=Frames.Config(), seconds=0.015, order="causal"),
        port=MediaPort.Config(largest_grid=6),
        fusion=Prefix.Config(),
        text=NextToken.Config(weight=1.0),
        media=NoObjective.Config(),
    )
    return Recipe(model=model, data="heard", stages=(Stage(**settings),))


@pytest.fixture
def listen(base, tmp_path, monkeypatch):
    """Compare recipes that hear in an empty folder with trained sounds and others."""
    monkeypatch.chdir(tmp_path)
    levels(tmp_path / "heard", [sign * percent for sign in (-1, 1) for percent in range(50, 90, 5)])
    levels(tmp_path / "unheard", (-72, -58, 58, 72))

    def call(recipes, **settings):
        given = {"samples": 30 * STEP, "seeds": (0,), "compile": False, "data": "heard", "held": "unheard"} | settings
        return compare(recipes, Plan(**given), out="comparison/test", backbone=base)

    return call


def test_sounds_are_compared_by_their_own_suite(listen, base):
    table = listen({"one": hears(base), "slow": hears(base, rate=1e-5)})
    scores = {score["score"]: score for score in table["scores"]}
    assert set(scores) == {"fit_at_1", "fit_exact", "held_at_1", "held_exact", "text_perplexity_change"}
    one, slow = scores["held_at_1"]["rows"]
    assert one["mean"] == 1.0, "two kinds of sounds that were not trained on are told apart"
    assert slow["difference"]["values"] == {"0": slow["values"]["0"] - 1}
    run = read("one-seed0.json")
    truth = [NAMES[int(Path(e.id).stem) > 0] for e in open_source("unheard").examples]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(4, generator=generator).tolist() for _ in range(5)]
    blind = sum(truth[i] == truth[j] for order in orders for i, j in enumerate(order)) / 20
    assert blind < 1 and run["scores"]["held_at_1_blind"] == pytest.approx(blind)
    assert scores["held_at_1"]["chance"] == 0.5
    assert (run["scores"]["num_fit"], run["scores"]["num_held"]) == (16, 4)
    assert run["settings"]["held"] == run["scored"]["held"] == "unheard" and run["settings"]["num_pictures"] == 16
    assert run["scored"]["suite"] == "sounds"
    assert table["media"] == "sounds" and table["text"]["one"]["bit_equal"] == 1
    recipe = hears(base)
    counted = count_flops(build(recipe.model, base), recipe.stages[0], open_source("heard"))
    assert run["cost"]["flops_per_sample"] == counted.training and counted.training["caption"] > 0
    assert run["cost"]["tokens_per_picture"] == 5 + 2
    prompts = json.loads(Path("comparison/test/comparison.json").read_text())["prompts"]
    assert len(prompts) == 8 and set(prompts) <= set(NAMES)
    assert not list(Path("comparison/test").glob("*.png")), "nothing is drawn"
    assert "sounds" in "".join(n for n in table["notes"] if "memory" in n)
    page = comparison_page.render(table, Path("comparison/test"))
    assert "16 sounds of" in page and "tokens per sound" in page and "picture" not in page.partition("<h2>Settings")[0]


def test_sounds_that_cannot_be_compared(listen, base):
    one = {"one": hears(base)}
    for settings, message in (
        ({"held": "heard"}, "heard: 16 of 16 held-out examples are trained on in heard, such as .*: name others"),
        ({"data": "emoji:8", "held": None}, "emoji:8 holds no sounds, which one is of: name some by --data"),
        ({"size": 16}, "size 16 is the side of pictures, and these recipes hear sounds: leave it out"),
        (
            {"trials": 2},
            "trials choose by 'fit_retrieval_pixel_at_10', which is no score of sounds: name, by --choose-by, some of fit_at_1,"
            " fit_exact, fit_word_errors, held_at_1, held_exact, held_word_errors, made_at_1$",
        ),
        (
            {"trials": 2, "choose_by": ("held_exact", "held_word_errors")},
            "trials choose by the mean of held_exact, held_word_errors: name at least one score, all higher or all lower",
        ),
        ({"choose_by": ("held_exact",)}, "choose_by held_exact: one trial leaves nothing to choose; give more trials"),
        ({"evaluation": {"max_drawn": 3}}, "suite 'sounds' has no setting 'max_drawn'"),
        ({"evaluation": {"held": "heard"}}, "the setting 'held' of the evaluation is the comparison's own"),
    ):
        with pytest.raises(XFusionError, match=message):
            listen(one, **settings)
    with pytest.raises(XFusionError, match="heard holds no pictures, which one is of"):
        listen({"one": tiny(base)}, held=None)
    assert not Path("comparison").exists() and not Path("runs").exists(), "nothing was trained or written"


def held_parts(folder):
    """Sounds of which some are of the validation part, and others not."""
    levels(folder, [sign * percent for sign in (-1, 1) for percent in range(52, 90, 5)])
    parts = {part_of(example.group) for example in open_source(str(folder)).examples}
    assert parts == {"validation", "test"}


@pytest.mark.parametrize(
    ("name", "values", "factor"), [("held_exact", (0.1, 0.7, 0.3), 0.5), ("held_word_errors", (0.9, 1.7, 0.3), 2.0)]
)
def test_trials_of_sounds_choose_by_a_named_score(listen, base, scored, tmp_path, name, values, factor):
    """The highest share, or the lowest rate of errors; no guidance is tried, and the table says by what was chosen."""
    held_parts(tmp_path / "more")
    scored(name, values)
    table = listen({"one": hears(base)}, trials=3, samples=STEP, choose_by=(name,), held="more")
    tried, run = read("one-trials.json"), read("one-seed0.json")
    assert [trial["score"] for trial in tried["rates"]] == list(values) and tried["guidances"] == []
    assert tried["chosen"] == {"rate_factor": factor, "guidance": None}
    assert run["settings"]["tuning"] == {"trials": 3, "rate_factor": factor, "guidance": None, "choose_by": [name]}
    assert run["scored"]["part"] == "test" and 0 < run["scores"]["num_held"] < 16
    (note,) = [note for note in table["notes"] if note.startswith("3 rates")]
    assert (
        note.startswith(f"3 rates per recipe, chosen by {name} on the validation part") and f"times {factor:g}." in note
    )
    other = "held_at_1" if name == "held_exact" else "fit_word_errors"
    with pytest.raises(XFusionError, match="was made with settings.tuning.choose_by"):
        listen({"one": hears(base)}, trials=3, samples=STEP, choose_by=(other,), held="more")


def test_trials_by_a_score_that_a_recipe_does_not_have(listen, base, tmp_path):
    held_parts(tmp_path / "more")
    with pytest.raises(
        XFusionError,
        match="trials choose by made_at_1, and one has none of these: name, by --choose-by, some of fit_at_1, fit_exact,"
        " held_at_1, held_exact$",
    ):
        listen({"one": hears(base)}, trials=2, samples=STEP, choose_by=("made_at_1",), held="more")
    table = listen({"one": hears(base)}, trials=2, samples=STEP, choose_by=("held_at_1",), held="more")
    assert table["num_runs"] == 1


def test_shares_of_sounds_keep_their_sounds(listen, base):
    whole = open_source("heard")
    half = share_of(whole, 0.5)
    assert len(half) == 8 and half.spec == "heard"
    assert {e.id for e in half.examples} < {e.id for e in whole.examples}
    for index, example in enumerate(half.examples):
        (own,) = [i for i, e in enumerate(whole.examples) if e.id == example.id]
        assert torch.equal(half.sound(index).samples, whole.sound(own).samples)
