"""Every recipe says which public data its paper used, and by which spec our sources read it."""

import io
import json
import re
import tarfile
from importlib import import_module
from pathlib import Path

import numpy
import pyarrow
import pytest
import soundfile
from contracts.table import Noise
from pyarrow import parquet

from xfusion.data.sources import open_source
from xfusion.recipes.base import find, names


def paragraph(name: str) -> str:
    """What a recipe's docstring says of data, on one line."""
    doc = import_module(f"xfusion.recipes.{name}").__doc__ or ""
    (found,) = [part for part in doc.strip().split("\n\n") if part.startswith("Data: ")]
    assert doc.strip().endswith(found)
    return " ".join(found.split())


def specs(text: str) -> list[str]:
    return [
        spec.strip("'") for spec in re.findall(r"``(?:--data )?((?:'[^']+'|[\w./:=*-]+))``", text) if _is_spec(spec)
    ]


def _is_spec(text: str) -> bool:
    return bool(re.search(r"^emoji|\.(jsonl(:held=[\d.]+)?|tar|parquet)'?$", text))


@pytest.mark.parametrize("name", names())
def test_a_recipe_names_its_public_source_and_what_the_figures_used(name):
    public, _, ours = paragraph(name).partition(" Our figures: ")
    assert re.search(r"``[\w-]+/[\w.-]+``|https://", public), "no hub id and no address"
    assert public.count("--data") == len(specs(public)) >= 1 and 1 <= ours.count("--data") <= len(specs(ours))
    kind = "digits" if find(name)().model.audio else "clothing|emoji"
    assert re.match(kind, specs(ours)[0].removeprefix("runs/"))


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Noise().picture(number, 16).save(file, "PNG")
    return file.getvalue()


def lay_out(spec: str, *, sounds: bool) -> None:
    """Two examples as the public set has them, where a spec looks for them."""
    path = Path(spec.partition(":")[0].replace("*", "0000"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for number, (end, data) in enumerate([("jpg", picture(i)) for i in range(2)]):
                for member, content in ((f"{number:03}.{end}", data), (f"{number:03}.txt", b"a red apple")):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    elif path.suffix == ".parquet":
        images = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(2)]
        parquet.write_table(pyarrow.table({"image": images, "caption": ["a red apple"] * 2, "cocoid": [0, 1]}), path)
    elif sounds:
        for number in range(2):
            soundfile.write(path.parent / f"{number}.wav", numpy.sin(numpy.arange(800) * (0.1 + number)), 8000)
        rows = [{"audio": f"{number}.wav", "caption": "a red apple"} for number in range(2)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        for number in range(2):
            (path.parent / f"{number}.png").write_bytes(picture(number))
        said = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a red apple"}]
        rows = [{"id": str(number), "image": f"{number}.png", "conversations": said} for number in range(2)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_specs_are_read_where_the_public_set_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen = set()
    for name in names():
        for spec in specs(paragraph(name)):
            if spec in seen or spec.startswith("emoji"):
                continue
            seen.add(spec)
            lay_out(spec, sounds=find(name)().model.audio is not None)
            source = open_source(spec, split="all")
            assert [example.captions for example in source.examples] == [("a red apple",)] * 2, spec
    assert {spec.partition(":")[0].rpartition(".")[2] for spec in seen} == {"jsonl", "tar", "parquet"}
