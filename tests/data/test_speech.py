"""The script that writes spoken sentences: what is held out, what is left out, and how captions are written."""

import json
import runpy
from pathlib import Path

import pytest

from xfusion.data.sources import open_source
from xfusion.evaluation.metrics.word_errors import normalised

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture
def script(monkeypatch):
    """Run it, as from a command line."""
    monkeypatch.syspath_prepend(RUNS)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["write_speech.py", *map(str, arguments)])
        runpy.run_path(str(RUNS / "write_speech.py"), run_name="__main__")

    return call


def read(folder, part):
    lines = (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def test_captions_and_what_is_left_out(script, tmp_path, capsys):
    from pyarrow import Table, parquet

    texts = [
        ("Press 5, or * to go on.", "press five or star to go on"),
        ("IAX (note: does not say)", "iax"),
        ("It's 10 o'clock! #", "it's 10 o'clock pound"),
        ("Re-enter <beep> [now]", "re enter"),
        ("Thank you.", "thank you"),
        ("... thank you", "thank you"),
    ]
    rows = [{"text": text, "label": "speech", "seconds": 1.0} for text, _ in texts]
    rows += [{"text": "(1 second of silence)", "label": "speech", "seconds": 1.0}]
    rows += [{"text": "[beep]", "label": "sound", "seconds": 1.0}, {"text": "long", "label": "speech", "seconds": 5.5}]
    for number, row in enumerate(rows):
        row |= {"audio": {"bytes": bytes([number]), "path": None}, "source_path": f"prompts/{number % 2}/{number}.wav"}
    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    script(tmp_path / "rows.parquet", "-o", tmp_path / "out")
    lines = [line for part in ("train", "held_sentences") for line in read(tmp_path / "out", part)]
    captions = {line["audio"]: line["caption"] for line in lines}
    assert captions == {f"wav/{n % 2}-{n}.wav": caption for n, (_, caption) in enumerate(texts)}
    assert (tmp_path / "out" / "wav" / "1-3.wav").read_bytes() == bytes([3])
    said = capsys.readouterr().out
    assert "1 longer than 5 s left out" in said and said.endswith("2 sounds that are no speech left out\n")


def test_no_sentence_is_in_both_parts(script, tmp_path, capsys, assets):
    script(assets / "audio" / "asterisk_en_train.parquet", "-o", tmp_path / "speech")
    assert capsys.readouterr().out.splitlines() == [
        "train: 375 sounds, 37 longer than 5 s left out",
        "held_sentences: 53 sounds, 5 longer than 5 s left out",
        "16 sounds that are no speech left out",
    ]
    parts = [
        open_source(str(tmp_path / "speech" / f"{part}.jsonl"), split="all") for part in ("train", "held_sentences")
    ]
    assert [len(part) for part in parts] == [375, 53]
    trained, held = [{normalised(example.captions[0]) for example in part.examples} for part in parts]
    assert not trained & held and len(held) == 50
    assert all(example.captions[0] == normalised(example.captions[0]) for part in parts for example in part.examples)
    assert len(list((tmp_path / "speech" / "wav").iterdir())) == 428
