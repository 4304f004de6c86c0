"""`xfusion index`, `xfusion search` and `xfusion caption --names` as a user calls them."""

import json
from dataclasses import replace

import pytest
import torch
from contracts.table import Noise, make_base, model_config, randomise

from xfusion.apps import cli
from xfusion.backbone import Backbone
from xfusion.model import Model
from xfusion.objectives.base import NoObjective
from xfusion.objectives.contrastive import Contrastive
from xfusion.objectives.masked_words import MaskedWords
from xfusion.objectives.next_token import NextToken


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Two packs that can embed, one that matches, and one that does neither."""
    folder = tmp_path_factory.mktemp("packs")
    base = Backbone.load(str(make_base("llama", folder / "base")))
    plain = model_config(base)
    reads = replace(plain, text=NextToken.Config(weight=0.0), media=NoObjective.Config(), extra=(Contrastive.Config(),))
    tells = replace(reads, extra=(MaskedWords.Config(),))
    for name, config, seed in (("one", reads, 1), ("other", reads, 2), ("tells", tells, 1), ("draws", plain, 0)):
        model = Model(config, base)
        randomise(model, seed)
        model.eval().save_pretrained(folder / name)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Five pictures, one of them in a folder below, and a file that is none."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for i in range(5):
        Noise().picture(i, 32).save(tmp_path / "photos" / ("below" if i == 4 else ".") / f"{i}.png")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"


def run(capsys, *argv):
    capsys.readouterr()
    code = cli.main([str(a) for a in argv])
    return code, capsys.readouterr()


def test_pictures_are_found_in_the_order_of_their_cosines(packs, photos, tmp_path, capsys):
    index = tmp_path / "photos.index"
    code, said = run(capsys, "index", photos, packs / "one", "-o", index, "--json")
    assert code == 0 and json.loads(said.out)["pictures"] == 5 and index.is_file()
    code, said = run(capsys, "search", index, "a red apple", "-n", 3, "--json")
    assert code == 0
    found = json.loads(said.out)["found"]
    import xfusion

    model = xfusion.load(packs / "one")
    files = sorted(photos.rglob("*.png"))
    vectors = model.embed([Noise().picture(int(f.stem), 32) for f in files])
    cosines = vectors @ model.embed(["a red apple"])[0]
    best = cosines.argsort(descending=True)[:3]
    assert [item["image"] for item in found] == [str(files[i].resolve()) for i in best]
    torch.testing.assert_close(torch.tensor([f["cosine"] for f in found]), cosines[best], rtol=0, atol=1e-3)


def test_what_cannot_be_is_refused_in_one_line(packs, photos, tmp_path, capsys):
    index, text = tmp_path / "photos.index", photos / "notes.txt"
    assert run(capsys, "index", photos, packs / "one", "-o", index)[0] == 0
    (tmp_path / "empty").mkdir()
    for argv, message in (
        (("index", tmp_path / "empty", packs / "one", "-o", index), "holds no picture: PNG, "),
        (("index", text, packs / "one", "-o", index), "is no folder of pictures"),
        (("index", photos, packs / "draws", "-o", index), "this model cannot embed, only caption, draw, text"),
        (("search", text, "tree"), "notes.txt cannot be read as an index (Error while deserializing header: "),
        (("search", tmp_path / "none", "tree"), "none cannot be read as an index (No such file or directory"),
        (("search", index, "tree", "--model", packs / "other"), "make the index again"),
        (("search", index, " "), "name some words to look for"),
        (("search", index, "tree", "-n", 0), "-n 0: at least 1"),
    ):
        code, said = run(capsys, *argv)
        assert code == 2 and message in said.err and said.err.count("\n") == 1, (argv, said.err)


@pytest.mark.parametrize(("pack", "how"), [("one", "cosine"), ("tells", "probability")])
def test_names_are_ranked_for_each_picture(pack, how, packs, photos, capsys):
    names, files = ["a red apple", "tree", "house"], [photos / "0.png", photos / "3.png"]
    code, said = run(capsys, "caption", packs / pack, *files, "--names", *names, "--json")
    assert code == 0
    import xfusion

    model = xfusion.load(packs / pack)
    for file, item in zip(files, json.loads(said.out)["named"], strict=True):
        picture = Noise().picture(int(file.stem), 32)
        wanted = model.match(picture, names) if how == "probability" else model.embed(names) @ model.embed([picture])[0]
        assert item["image"] == str(file) and [set(one) for one in item["names"]] == [{"name", how}] * 3
        scores = [one[how] for one in item["names"]]
        assert scores == sorted(scores, reverse=True)
        found = {one["name"]: one[how] for one in item["names"]}
        assert [found[name] for name in names] == pytest.approx([float(x) for x in wanted], abs=1e-3)
    first = json.loads(said.out)["named"][0]["names"][0]
    assert f"0.png: {first['name']} {first[how]:.3f}, " in said.err


def test_names_are_refused_in_one_line_where_they_cannot_be_ranked(packs, photos, capsys):
    for argv, message in (
        (
            (packs / "draws", photos / "0.png", "--names", "tree"),
            "and this one can only caption, draw, text: leave it out",
        ),
        ((packs / "one", photos / "0.png", "--names", "tree", " "), "--names: one of the names is empty"),
        (
            (packs / "one", photos / "0.png", "--names", "tree", "--question", "What?"),
            "leave --question and --size out",
        ),
    ):
        code, said = run(capsys, "caption", *argv)
        assert code == 2 and message in said.err and said.err.count("\n") == 1, (argv, said.err)
