"""Pictures that turn unreadable in mid-run: left out as far as allowed, by all processes and after a break alike, or told."""

import json
import os
import shutil
from pathlib import Path

import pytest
from data.hub_server import hub
from data.test_hub_data import rows
from data.test_shards import png, write_folder, write_parquet, write_tar
from training.runs import StopAt, log, pack_of, plan_of, recipe, same, step_records, train
from training.test_processes import TOLERANCE, furthest, several
from training.test_processes import told as told_in

from xfusion.data import shards as readers
from xfusion.data.mixture import MixtureConfig, order_of
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source
from xfusion.training import loop
from xfusion.training.loop import Interrupted

PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False}
"""A parquet file in which a picture's bytes stand as they are, and once."""
__all__ = ["hub"]
COUNT, STEPS, FOUND = 48, 7, 3
"""Pictures, steps of a run, and the step that first reads the broken one."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))


MIXTURE = MixtureConfig(draw=4, caption=4, pack=2)


def first_read_at(source, step, *, draw=4, caption=4):
    """An example that no earlier step reads, nor the trial of the widest step."""
    order = order_of(source, MIXTURE, 0)
    before = {*order.take("draw", 0, step * draw), *order.take("caption", 0, step * caption)}
    widest = {max(range(len(source)), key=lambda i: (len(c(source, i)), i, c(source, i))) for c in (first, longest)}
    return next(i for i in order.take("draw", step * draw, draw) if i not in before | widest)


def first(source, index):
    return source.examples[index].captions[0]


def longest(source, index):
    return max(source.examples[index].captions, key=len)


def broken(path: Path, number: int) -> None:
    """Zeros over a picture in its shard. The date stays, so that the index still says that all is sound."""
    stat, content, picture = path.stat(), path.read_bytes(), png(number)
    assert content.count(picture) == 1
    path.write_bytes(content.replace(picture, bytes(len(picture))))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def shards(folder, kind):
    path = folder / f"shards.{kind}"
    path = write_tar(path, range(COUNT)) if kind == "tar" else write_parquet(path, range(COUNT), **PLAIN)
    return path, open_source(path)


def run(base, out, path, *, steps=STEPS, **settings):
    chosen = recipe(base, steps=steps, mixture=MIXTURE)
    return train(base, out, recipe_=chosen, source=None, data=str(path), **settings)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_picture_that_turns_unreadable_stops_the_run_with_its_state_or_is_left_out(bases, tmp_path, caplog, kind):
    base, out = bases["llama"], tmp_path / "run"
    path, source = shards(tmp_path, kind)
    index = first_read_at(source, FOUND)
    broken(path, index)
    name = source.examples[index].origin.replace(".", r"\.")
    stopped = (
        rf"{name}: .* is not a picture: .*; with it 1 of 48 examples of .* are bad \(allowed: 0\.0%\): mend it, or allow a"
        rf" share of 0\.03; training stopped behind step {FOUND}, its state is written: go on with --resume"
    )
    with pytest.raises(XFusionError, match=stopped) as error:
        run(base, out, path)
    assert "\n" not in str(error.value)
    assert plan_of(out)["step"] == FOUND == len(step_records(out))
    # Allowed, it is left out and named once; the run is the one that had allowed it from its start.
    caplog.clear()
    run(base, out, path, resume=True, allow_bad=0.05)
    assert [record.message for record in caplog.records if "left out" in record.message] == [
        f"{log(out, 'left_out')[0]['reason']}: left out from step {FOUND} on; another takes its place"
    ]
    assert [(e["step"], e["example"]) for e in log(out, "left_out")] == [(FOUND, source.examples[index].id)]
    run(base, tmp_path / "straight", path, allow_bad=0.05)
    assert len(step_records(out)) == STEPS and step_records(out) == step_records(tmp_path / "straight")
    assert same(pack_of(out), pack_of(tmp_path / "straight"))
    # Broken off behind the damage, and with a shard whose date says that it changed: it keeps its place among the others.
    with pytest.raises(Interrupted):
        run(base, tmp_path / "again", path, allow_bad=0.05, listener=StopAt(FOUND + 1))
    path.touch()
    caplog.clear()
    run(base, tmp_path / "again", path, allow_bad=0.05, resume=True)
    assert step_records(tmp_path / "again") == step_records(out) and same(pack_of(tmp_path / "again"), pack_of(out))
    assert not caplog.records and len(log(tmp_path / "again", "left_out")) == 1


def test_of_a_mixture_the_picture_behind_it_in_the_same_source_takes_its_place(bases, tmp_path):
    one, _ = shards(tmp_path, "tar")
    two = write_parquet(tmp_path / "two.parquet", range(COUNT, 2 * COUNT), **PLAIN)
    source = open_source(f"{one}+{two}")
    index = first_read_at(source, FOUND)
    broken(two if index >= COUNT else one, index)
    run(bases["llama"], tmp_path / "run", f"{one}+{two}", allow_bad=0.05)
    assert [e["example"] for e in log(tmp_path / "run", "left_out")] == [source.examples[index].id]
    with pytest.raises(XFusionError, match="of 48 examples of .* are bad"):  # of its own source, not of both
        run(bases["llama"], tmp_path / "other", f"{one}+{two}", allow_bad=0.015)


def test_a_row_group_that_is_gone_takes_its_rows_with_it_one_by_one(bases, tmp_path):
    path, source = shards(tmp_path, "parquet")
    content, stat = path.read_bytes(), path.stat()
    index = first_read_at(source, FOUND)
    block = next(block for block in source.blocks if index in block)
    start, end = content.index(png(block[0])), content.index(png(block[-1])) + len(png(block[-1]))
    path.write_bytes(content[: start - 60] + b"\xff" * (end - start + 60) + content[end:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run(bases["llama"], tmp_path / "run", path, allow_bad=0.1, steps=24)
    left_out = {e["example"] for e in log(tmp_path / "run", "left_out")}
    assert left_out == {source.examples[i].id for i in block}


def test_a_hub_that_does_not_answer_stops_the_run_with_its_state_and_it_goes_on_to_the_bit(bases, tmp_path, hub):
    """Nothing is left out, whatever is allowed: it may answer tomorrow."""
    hub.commits["datasets/org/cards"] = [("a" * 40, {"train.parquet": rows(tmp_path, range(COUNT))})]
    base, out = bases["llama"], tmp_path / "run"
    run(base, tmp_path / "straight", "hf:org/cards")

    def fails(event):
        if event["event"] == "step" and event["step"] == FOUND:
            readers._row_group.clear()
            hub.out_of_order = True

    stopped = rf"cannot be fetched from the hub: .*; training stopped behind step {FOUND + 1}, its state is written"
    with pytest.raises(XFusionError, match=stopped):
        run(base, out, "hf:org/cards", allow_bad=0.5, listener=fails)
    hub.out_of_order = False
    run(base, out, "hf:org/cards", allow_bad=0.5, resume=True)
    assert len(step_records(out)) == STEPS and step_records(out) == step_records(tmp_path / "straight")
    assert same(pack_of(out), pack_of(tmp_path / "straight")) and not log(out, "left_out")


def test_data_that_changed_while_a_run_stood_still_is_said(bases, tmp_path, caplog):
    path, _ = shards(tmp_path, "tar")
    with pytest.raises(Interrupted):
        run(bases["llama"], tmp_path / "run", path, listener=StopAt(1))
    write_tar(path, range(COUNT + 1))
    run(bases["llama"], tmp_path / "run", path, resume=True, steps=STEPS)
    assert "held 48 examples when" in caplog.text and "and holds 49, not all the same, now" in caplog.text


def test_pictures_words_or_groups_that_changed_under_their_names_are_said(bases, tmp_path, caplog, monkeypatch):
    """Of data with groups of its own, which say nothing of its files. States from before that was asked go on in silence."""
    folder, base = write_folder(tmp_path / "cards", range(8)), bases["llama"]
    lines = [{"image": f"cards/{n:03d}.png", "caption": f"card {n}", "group": f"suit {n % 4}"} for n in range(8)]
    path = tmp_path / "data.jsonl"

    def resumed(name="run"):
        path.write_text("\n".join(map(json.dumps, lines)))
        caplog.clear()
        run(base, tmp_path / name, path, steps=2, resume=(tmp_path / name).exists())
        return [record.message.replace(str(tmp_path), "") for record in caplog.records]

    assert resumed() == resumed() == []
    whole = loop.all_examples
    with monkeypatch.context() as patch:
        patch.setattr(loop, "all_examples", lambda source: whole(source)[:2])
        resumed("old")
    told = (
        "/data.jsonl holds 8 examples of the same names as when /run began, but not the same pictures, words or groups (of the"
        " hub: another commit): its batches from here on are others"
    )
    lines[3]["caption"] = "another card"
    assert resumed() == [told]
    assert resumed("old") == []
    lines[3] |= {"caption": "card 3", "group": "suit 9"}
    assert resumed() == [told]
    lines[3]["group"] = "suit 3"
    assert resumed() == []
    (folder / "003.png").write_bytes(png(99))
    assert resumed() == [told]
    lines.pop()
    assert resumed("old") == ["/data.jsonl held 8 examples when /old began and holds 7, not all the same, now: its batches"
                              " from here on are others"]  # fmt: skip


def test_two_processes_leave_out_the_same_and_stop_together(tmp_path_factory, tmp_path):
    """The picture is in the rows of the second one alone: both put another into its place."""
    path, source = shards(tmp_path, "parquet")
    order = order_of(source, MixtureConfig(draw=6, caption=4, pack=2), 0)
    before = {*order.take("draw", 0, 6 * FOUND), *order.take("caption", 0, 4 * FOUND + 4), COUNT - 1}
    index = next(i for i in list(order.take("draw", 6 * FOUND, 6))[3:] if i not in before)

    def prepare(folder):
        open_source(shutil.copy2(path, folder))
        broken(folder / path.name, index)

    ran = several(tmp_path_factory, "unreadable", prepare)
    one, two = told_in(ran / "of_1"), told_in(ran / "of_2")
    assert len(one) == 6 and furthest(one, two) < TOLERANCE
    for name in ("of_1", "of_2", "refused_2_on_1"):
        assert [(e["step"], e["example"]) for e in log(ran / name, "left_out")] == [(FOUND, source.examples[index].id)]
    assert furthest(told_in(ran / "refused_2_on_1"), one) < TOLERANCE
    said = [(ran / f"refused_2.{rank}.said").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and f"training stopped behind step {FOUND}, its state is written" in said[0]
