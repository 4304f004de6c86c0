"""Suites in two phases: what is drawn can be drawn again, a break changes nothing, a judge finds what it was given."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import make_model, randomise

from xfusion.apps import cli
from xfusion.data.sequence import XFusionError
from xfusion.evaluation import drawn
from xfusion.storage import SEAL, sealed


@pytest.fixture
def packs(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    artist, critic = make_model(bases["llama"]), make_model(bases["llama"], "dual tower, strided")
    randomise(critic, seed=5)
    artist.save_pretrained("artist")
    critic.save_pretrained("critic")
    Path("prompts.jsonl").write_text(
        '{"prompt": "a red apple", "tag": "one"}\n\n{"prompt": "two birds", "tag": "two"}\n'
    )
    return artist, critic


def test_a_folder_is_drawn_in_genevals_layout_and_goes_on_after_a_break(packs, capsys, monkeypatch):
    artist, _ = packs
    call = ["draw", "artist", "--prompts", "prompts.jsonl", "-o", "out", "-n", "2", "--steps", "2", "--seed", "7"]
    assert cli.main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 4
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert [item["seed"] for item in manifest["pictures"]] == [7, 8, 9, 10]
    assert manifest["settings"] == {"steps": 2, "guidance": artist.guidance, "size": None, "num": 2, "seed": 7}
    assert json.loads(Path("out/00001/metadata.jsonl").read_text()) == {"prompt": "two birds", "tag": "two"}
    assert sorted(p.name for p in Path("out").iterdir()) == ["00000", "00001", "manifest.json"]
    with Image.open("out/00001/samples/0001.png") as picture:
        expected = artist.draw(["two birds"], seed=10, steps=2)[0]
        levels = zip(picture.convert("RGB").tobytes(), expected.tobytes(), strict=True)
        assert max(abs(a - b) for a, b in levels) <= 2 and picture.info["seed"] == "10"

    # A break behind two pictures, and the same call again.
    whole = {p: p.read_bytes() for p in Path("out").rglob("*.png")}
    Path("out/manifest.json").unlink()
    for path in list(whole)[:2]:
        path.unlink()
    facts = {k: v for k, v in manifest.items() if k not in ("pictures", "sha256")}
    drawn.write_json(Path("out/begun.json"), drawn.sealed(facts))
    asked = []
    draw = type(artist).draw
    monkeypatch.setattr(
        type(artist), "draw", lambda self, prompts, **s: asked.append(len(prompts)) or draw(self, prompts, **s)
    )
    assert cli.main(call) == 0 and asked == [2]
    assert set(Path("out").rglob("*.png")) == set(whole)
    for number, (path, content) in enumerate(whole.items()):
        with Image.open(path) as now, Image.open(io.BytesIO(content)) as before:
            assert now.info["seed"] == before.info["seed"]
            levels = zip(now.convert("RGB").tobytes(), before.convert("RGB").tobytes(), strict=True)
            assert max(abs(a - b) for a, b in levels) <= 2  # drawn among two, not among four
        assert number < 2 or path.read_bytes() == content
    again = json.loads(Path("out/manifest.json").read_text())
    assert [p["seed"] for p in again["pictures"]] == [7, 8, 9, 10] and again["settings"] == manifest["settings"]
    # Other settings, another pack, other files: nothing is mixed.
    assert cli.main([*call[:-1], "8"]) == 2
    assert cli.main(["draw", "critic", *call[2:]]) == 2
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("")
    assert cli.main([*call[:5], "mine", *call[6:]]) == 2 and sorted(p.name for p in Path("mine").iterdir()) == [
        "thesis.txt"
    ]
    # What cannot be drawn leaves no folder behind.
    assert cli.main(["draw", "artist", "--prompts", "prompts.jsonl", "-o", "none", "--size", "4000"]) == 2
    monkeypatch.setattr(type(artist), "capabilities", {"text", "caption"})
    assert cli.main(["draw", "artist", "--prompts", "prompts.jsonl", "-o", "none"]) == 2
    assert not Path("none").exists()


def test_a_judge_scores_the_folder_and_not_its_own(packs, capsys):
    _, critic = packs
    assert cli.main(["draw", "artist", "--prompts", "prompts.jsonl", "-o", "out", "-n", "2", "--steps", "2"]) == 0
    capsys.readouterr()
    assert cli.main(["judge", "out", "--by", "critic", "--json", "-o", "scores.json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pictures = [Image.open(f"out/{p:05}/samples/{i:04}.png").convert("RGB") for p in range(2) for i in range(2)]
    words = ["a red apple", "two birds"]
    gain = critic.score_names(pictures, words) - critic.score_names(None, words)
    right = [int(row.argmax()) == i // 2 for i, row in enumerate(gain)]
    assert found["at_1"] == sum(right) / 4 and found["chance_at_1"] == pytest.approx(0.5) and found["num_pictures"] == 4
    assert found == json.loads(Path("scores.json").read_text())
    assert cli.main(["judge", "out", "--by", "artist"]) == 2
    assert "may not judge itself" in capsys.readouterr().err
    Image.new("RGB", (16, 16)).save("out/00000/samples/0000.png")
    assert cli.main(["judge", "out", "--by", "critic"]) == 2
    assert "is not the picture that was drawn" in capsys.readouterr().err


class Knows:
    """A judge that embeds, and sees a picture's prompt in its first pixel."""

    capabilities, fingerprint, teachers = {"embed"}, "other", frozenset({"org/clip@1"})

    def embed(self, items, progress=None):
        rows = [0 if "apple" in i else 1 for i in items] if isinstance(items[0], str) else [
            int(i.getpixel((0, 0))[0] > 99) for i in items]  # fmt: skip
        return torch.nn.functional.one_hot(torch.tensor(rows), 2).float()


def test_a_judge_that_knows_is_right(packs):
    artist, _ = packs
    settings = {"steps": 1, "guidance": 1.0, "size": None}
    prompts = drawn.read_prompts(Path("prompts.jsonl"))

    def save(picture, path, facts):
        Image.new("RGB", (4, 4), (200 if "birds" in facts["prompt"] else 0, 0, 0)).save(path)

    drawn.draw_folder(
        artist, prompts, Path("out"), num=3, seed=0, settings=settings, save=save, progress=lambda *_: None
    )
    found = drawn.judge(Path("out"), Knows(), progress=lambda *_: None)
    assert (found["at_1"], found["mrr"], found["num_prompts"]) == (1.0, 1.0, 2) and found["settings"]["by"] == "embed"
    # Where what drew was trained towards the judge's own encoder, it may not judge.
    taught = json.loads(Path("out/manifest.json").read_text())
    del taught[SEAL]
    Path("out/manifest.json").write_text(json.dumps(sealed({**taught, "teachers": ["org/clip@2"]})))
    with pytest.raises(XFusionError, match="'org/clip@1' took part in training what drew"):
        drawn.judge(Path("out"), Knows(), progress=lambda *_: None)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.jsonl", '{"prompt": "a"}\n{"words": "b"}\n', "line 2: has no field 'prompt'"),
    ("a.jsonl", "no json\n", "line 1: is not JSON"),
    ("a.txt", "\n \n", "holds no prompt"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a \\ud83d cat"}\n', "line 2: the prompt has half a character"),
])  # fmt: skip
def test_bad_prompt_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(XFusionError, match=message):
        drawn.read_prompts(tmp_path / name)


def test_a_line_of_json_may_hold_other_line_breaks(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c\u0085d"}\n', encoding="utf-8")
    assert [item["prompt"] for item in drawn.read_prompts(tmp_path / "a.jsonl")] == ["a\u2028b", "c\u0085d"]
