"""The emoji suite on a model whose answers are known."""

import json

import pytest
import torch
from PIL import Image

from xfusion.data.sequence import Example, XFusionError
from xfusion.data.sources import content_fingerprint
from xfusion.evaluation.machine import commit
from xfusion.evaluation.run import check, evaluate, suite_names
from xfusion.modalities.codecs.pixels import Pixels
from xfusion.modalities.image import ImageModality

COUNT, SIZE = 12, 8
ISSUE = [
    "num_concepts",
    "fit_retrieval_pixel_at_1",
    "fit_retrieval_pixel_at_10",
    "fit_retrieval_feature_at_1",
    "fit_retrieval_feature_at_10",
    "fit_caption_exact",
    "held_caption_mrr",
    "held_caption_mrr_blind",
    "codec_psnr_db",
]


class Squares:
    """Twelve pictures of random pixels; the last two of the trained ones are one group."""

    licence = "none needed"

    def __init__(self, spec, first):
        self.spec = spec
        self.numbers = range(first, first + COUNT)
        groups = {first + COUNT - 1: f"group {first + COUNT - 2}"}
        self.examples = [
            Example(id=str(i), captions=(f"name {i}", f"other {i}"), group=groups.get(i, f"group {i}"), origin="test")
            for i in self.numbers
        ]

    def picture(self, index, size):
        pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(self.numbers[index]))
        return Image.fromarray(pixels.to(torch.uint8).numpy()).resize((size, size), Image.Resampling.NEAREST)


TRAIN, HELD = Squares("train", 0), Squares("held", 100)


class Knower:
    """Draws and names every picture as it is."""

    capabilities = frozenset({"text", "draw", "caption"})
    num_new_parameters = 0
    guidance = 2.5
    image = ImageModality.Config(codec=Pixels.Config(), patch=8, sizes=(SIZE,)).build()

    def __init__(self):
        self.calls = []
        self.names = {s.picture(i, SIZE).tobytes(): e.captions for s in (TRAIN, HELD) for i, e in enumerate(s.examples)}

    def draw(self, prompts, *, size, seeds, steps, guidance):
        self.calls.append((prompts, seeds, steps, guidance))
        return [TRAIN.picture(int(prompt.split()[1]), size) for prompt in prompts]

    def caption(self, pictures):
        return [f" {self.names[picture.tobytes()][1].upper()}\n" for picture in pictures]

    def score_names(self, pictures, names):
        common = -torch.arange(len(names)).float()[None]
        if pictures is None:
            return common
        return common + torch.tensor([[float(self.names[p.tobytes()][0] == name) for name in names] for p in pictures])


class Ignorer(Knower):
    """Draws one picture, says one name, has one opinion, whatever it is asked."""

    def draw(self, prompts, **settings):
        return [TRAIN.picture(3, SIZE) for _ in prompts]

    def caption(self, pictures):
        return ["name 3" for _ in pictures]

    def score_names(self, pictures, names):
        return -torch.arange(len(names)).float().expand(1 if pictures is None else len(pictures), -1)


class Averages:
    """Pixels of a coarse grid as features."""

    fingerprint = "averages"
    seen = 0

    def features(self, images):
        self.seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def score(model, **settings):
    return evaluate(model, "emoji", source=TRAIN, held=HELD, **{"encoder": Averages(), **settings})


def test_a_model_that_knows_all_scores_all():
    encoder = Averages()
    result = score(Knower(), encoder=encoder)
    assert set(ISSUE) <= result.keys()
    ones = [name for name in ISSUE if name.startswith(("fit_", "held_")) and not name.endswith("_blind")]
    assert {name: result[name] for name in ones} == dict.fromkeys(ones, 1.0)
    assert result["num_concepts"] == COUNT
    assert result["codec_psnr_db"] == 100
    assert encoder.seen == 2 * COUNT, "a codec without loss is looked at once"
    for name in ones[:4]:
        assert result[f"ceiling_{name}"] == 1
        assert 0 < result[f"chance_{name}"] < 1
    assert result["chance_fit_retrieval_pixel_at_1"] == pytest.approx((10 * 1 + 2 * 2) / 12 / 12)
    assert result["held_caption_mrr_blind"] < 0.5
    assert result["held_caption_exact"] == result["held_caption_f1"] == 1 > result["held_caption_exact_blind"]


def test_a_model_that_knows_nothing_scores_nothing():
    result = score(Ignorer())
    assert result["fit_retrieval_pixel_at_1"] == result["fit_retrieval_feature_at_1"] == 1 / COUNT
    assert result["fit_caption_exact"] == result["fit_caption_exact_blind"] == pytest.approx(1 / COUNT)
    # All names are tied once their own likelihood is taken off. Ten names alone, two that share a group of two hits.
    expected = (10 / 6.5 + 2 / (13 / 3)) / COUNT
    assert result["held_caption_mrr"] == pytest.approx(expected)
    assert result["held_caption_mrr_blind"] == pytest.approx(expected)


def test_the_settings_say_how_to_get_the_same_numbers(tmp_path):
    model, events, out = Knower(), [], tmp_path / "new" / "metrics.json"
    limits = {"max_drawn": 5, "max_captioned": 4, "max_held": 3, "batch_size": 2}
    result = score(
        model, seed=7, steps=2, guidance=1.5, out=out, progress=lambda *event: events.append(event), **limits
    )
    settings = result["settings"]
    assert json.loads(out.read_text()) == result
    assert [path.name for path in out.parent.iterdir()] == ["metrics.json"]
    assert settings["suite"] == "emoji" and settings["data"] == "train" and settings["held"] == "held"
    assert settings["data_fingerprint"] == content_fingerprint(TRAIN)
    assert settings["held_fingerprint"] == content_fingerprint(HELD) != settings["data_fingerprint"]
    assert (settings["num_drawn"], settings["num_captioned"], settings["num_held"]) == (5, 4, 3)
    assert (settings["seed"], settings["steps"], settings["guidance"]) == (7, 2, 1.5)
    assert settings["encoder"] == "averages" and settings["versions"]["torch"] == torch.__version__
    assert (
        settings["commit"] == commit() and settings["machine"]["cores"] > 0
    )  # of a file; what is only returned lacks them
    prompts = [prompt for call in model.calls for prompt in call[0]]
    seeds = [seed for call in model.calls for seed in call[1]]
    assert len(prompts) == 5 and seeds == [7 + int(prompt.split()[1]) for prompt in prompts]
    assert {call[2:] for call in model.calls} == {(2, 1.5)}
    assert [event for event in events if event[0] == "draw"] == [("draw", n, 5) for n in (0, 2, 4, 5)]
    again = score(Knower(), max_drawn=5)["settings"]
    assert again["num_drawn"] == 5 and "commit" not in again


def test_a_model_is_asked_only_for_what_it_can_do():
    class Painter(Knower):
        capabilities = frozenset({"draw"})

    class Reader(Knower):
        capabilities = frozenset({"caption"})

    class Matcher(Knower):
        capabilities = frozenset({"match"})

        def match(self, picture, names):
            return [0.9 if name in self.names[picture.tobytes()] else 0.1 for name in names]

    class Writer(Knower):
        capabilities = frozenset({"text"})

    matched = score(Matcher())
    assert matched["held_caption_at_1"] == 1 > matched["held_caption_at_1_blind"]
    assert not [name for name in matched if "exact" in name or "retrieval" in name]
    assert not [name for name in score(Painter()) if "caption" in name]
    assert not [name for name in score(Reader()) if "retrieval" in name or "codec" in name]
    with pytest.raises(XFusionError, match="only do: text"):
        score(Writer())


def test_each_way_to_score_names_is_told_apart():
    class Blip(Knower):
        """Says and matches the right name; its vectors are those of another picture."""

        capabilities = frozenset({"caption", "embed", "match"})

        def embed(self, items):
            first = sorted({names[0] for names in self.names.values()})
            said = [x if isinstance(x, str) else self.names[x.tobytes()][0] for x in items]
            place = [first.index(s) + 2 * (not isinstance(x, str)) for s, x in zip(said, items, strict=True)]
            return torch.eye(len(first))[torch.tensor(place) % len(first)]

        def match(self, picture, names):
            return [0.9 if name in self.names[picture.tobytes()] else 0.1 for name in names]

    found = score(Blip())
    assert found["held_caption_at_1"] == found["held_match_at_1"] == 1 > found["held_match_at_1_blind"]
    assert found["held_embed_at_1"] == 0 and found["chance_held_embed_at_1"] == found["chance_held_caption_at_1"]
    Blip.capabilities = frozenset({"embed", "match"})
    found = score(Blip())
    assert found["held_caption_at_1"] == 0 and found["held_match_at_1"] == 1 and "held_embed_at_1" not in found


def test_an_encoder_that_taught_does_not_score():
    result = score(Knower(), features=False)
    assert not [name for name in result if "feature" in name]
    assert result["fit_retrieval_pixel_at_1"] == 1 and result["settings"]["encoder"] is None


def test_a_model_that_names_its_teachers_is_not_scored_by_them():
    class Aligned(Knower):
        teachers = frozenset({Averages.fingerprint})

    class Deeper(Knower):
        teachers = frozenset({f"{Averages.fingerprint}@main#-3"})  # another layer of the same encoder

    class Other(Knower):
        teachers = frozenset({"another"})

    assert not [name for name in score(Deeper()) if "feature" in name]
    result, other = score(Aligned()), score(Other())
    assert not [name for name in result if "feature" in name] and result["settings"]["encoder"] is None
    assert result["settings"]["features"] == "none: the encoder averages took part in training, it may not score"
    assert "features" not in other["settings"] and other["fit_retrieval_feature_at_1"] == 1


def test_all_names_are_candidates_when_asked():
    narrow, wide = score(Knower(), max_held=4), score(Knower(), max_held=4, candidates="all")
    assert wide["chance_held_caption_mrr"] < narrow["chance_held_caption_mrr"]
    with pytest.raises(XFusionError, match="'held' or 'all'"):
        score(Knower(), candidates="some")


def test_a_larger_gallery_has_a_ceiling_of_its_own():
    result = score(Knower(), gallery_size=2 * SIZE)
    assert result["settings"]["gallery_size"] == 16 and result["ceiling_fit_retrieval_pixel_at_1"] == 1


def test_a_codec_that_loses_everything_has_no_ceiling():
    class Grey(Pixels):
        def _decode(self, latents):
            return torch.zeros_like(latents)

    model = Knower()
    model.image = ImageModality.Config(codec=Pixels.Config(), patch=8, sizes=(SIZE,)).build()
    model.image.codec = Grey()
    result = score(model)
    assert result["ceiling_fit_retrieval_pixel_at_1"] < 1 == result["fit_retrieval_pixel_at_1"]
    assert 0 < result["codec_psnr_db"] < 15


def test_held_out_pictures_are_drawn_if_asked_and_found_among_all():
    class Composer(Knower):
        def draw(self, prompts, *, seeds, **_):
            self.calls.append((prompts, seeds))
            numbers = [int(prompt.split()[1]) for prompt in prompts]
            return [(HELD if n >= 100 else TRAIN).picture(n % 100, SIZE) for n in numbers]

    class Recaller(Knower):
        def draw(self, prompts, **_):
            return [TRAIN.picture(int(prompt.split()[1]) % 100, SIZE) for prompt in prompts]

    composer, encoder = Composer(), Averages()
    knows, recalls = score(composer, max_held_drawn=COUNT, encoder=encoder), score(Recaller(), max_held_drawn=COUNT)
    assert encoder.seen == 4 * COUNT, "every real and every drawn picture is looked at once"
    for kind in ("pixel", "feature"):
        name = f"held_retrieval_{kind}_at_1"
        assert (knows[name], recalls[name]) == (1.0, 0.0), "what was trained on is in the gallery, too"
        assert knows[f"chance_{name}"] == pytest.approx((10 * 1 + 2 * 2) / COUNT / (2 * COUNT))
        assert knows[f"ceiling_{name}"] == 1
    assert composer.calls[1] == ([e.captions[0] for e in HELD.examples], [*range(COUNT)])
    without = score(Composer())
    assert {n for n in knows if n not in without} == {
        f"{what}held_retrieval_{kind}_at_{k}"
        for what in ("", "chance_", "ceiling_")
        for kind in ("pixel", "feature")
        for k in (1, 10)
    }
    assert all(knows[name] == without[name] for name in without if name != "settings")
    few = score(composer, max_held_drawn=4)
    assert few["settings"]["num_held_drawn"] == 4 and len(composer.calls[-1][0]) == 4
    with pytest.raises(XFusionError, match="max_held_drawn 4: train holds nothing out; name held pictures"):
        evaluate(Knower(), "emoji", source=TRAIN, features=False, max_held_drawn=4)


def test_without_held_out_pictures_the_rest_is_scored():
    assert not [name for name in score(Knower(), max_held=0) if name.startswith("held_")]
    result = evaluate(Knower(), "emoji", source=TRAIN, features=False)  # "train" is no spec: nothing is held out
    assert result["settings"]["held"] is None and result["fit_caption_exact"] == 1


def test_wrong_names_are_answered_with_the_nearest():
    assert "emoji" in suite_names()
    with pytest.raises(XFusionError, match="did you mean 'emoji'"):
        evaluate(Knower(), "emojis")
    with pytest.raises(XFusionError, match="did you mean 'guidance'"):
        evaluate(Knower(), "emoji", guidence=2)


def test_a_score_that_is_not_a_number_is_null_in_the_file(tmp_path, monkeypatch):
    """JSON has no such number; a run of hours must not end in a traceback."""
    monkeypatch.setattr(Knower, "capabilities", frozenset({"text", "match"}))
    monkeypatch.setattr(Knower, "match", lambda self, picture, names: [0.9] * len(names), raising=False)
    one = Squares("one", 0)
    one.examples = one.examples[:1]
    found = evaluate(Knower(), "retrieval", source=one, held=HELD, out=tmp_path / "scores.json", max_held=1)
    assert found["fit_match"] is None  # there is no wrong name to refuse
    assert found["fit_naming_at_1"] == 1.0
    assert json.loads((tmp_path / "scores.json").read_text())["fit_match"] is None


@pytest.mark.parametrize(
    ("suite", "name", "value", "least"),
    [
        ("emoji", "batch_size", 0, 1),
        ("emoji", "max_drawn", 0, 1),
        ("emoji", "max_drawn", -1, 1),  # would be all but one
        ("emoji", "max_held", -1, 0),
        ("requests", "repeat", 0, 1),
        ("requests", "max_chats", 0, 1),
        ("few_shot", "most", -1, 0),
    ],
)
def test_numbers_below_their_least_are_refused(suite, name, value, least):
    with pytest.raises(XFusionError, match=f"suite '{suite}': {name} is {value}, and has to be at least {least}"):
        check(suite, {name: value})
    assert check(suite, {name: least, **({} if suite == "requests" else {"seed": -1})})


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5])
def test_a_number_that_need_not_be_whole_has_no_least(value):
    assert check("emoji", {"guidance": value})
