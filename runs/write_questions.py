"""Write questions about pictures, with their answers, to train on: how many, whether a sentence is true, or where a thing stands.

    python runs/write_questions.py counting -o runs/counting --count 4000
    python runs/write_questions.py nlvr --source nlvr_dev.parquet -o runs/nlvr
    python runs/write_questions.py boxes -o runs/boxes --count 12000
    python runs/write_questions.py boxes --source nlvr_dev.parquet -o runs/nlvr_boxes

writes ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` and their pictures beside them: the questions of the suites
``understanding`` and ``grounding`` (``boxes``), by their own parts, so that what is trained on is never asked there. No picture
is in two parts, nor are NLVR's with their boxes in another order, nor two spellings of a sentence. ``--count`` pictures are
drawn to train on, and a tenth as many for each other part; NLVR (Suhr et al. 2017, CC-BY-4.0) has what its parquet file holds,
with the columns image (bytes), sentence, label and structured_rep.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

from xfusion.evaluation.suites.grounding import Scene, drawn_scenes, nlvr_scenes
from xfusion.evaluation.suites.understanding import ASKED, Part, Question, counting, nlvr

MOST = {"counting": 5, "boxes": 2}
PARTS: tuple[Part, ...] = ("train", *ASKED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=("counting", "nlvr", "boxes"))
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="NLVR's parquet file")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--most", type=int, help="things of a drawn picture, at most (5 to count, 2 to find)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.kind != "boxes" and (options.kind == "nlvr") != (options.source is not None):
        parser.error("nlvr needs --source, a parquet file; counting draws its own pictures")
    most = options.most or MOST.get(options.kind, 0)
    (options.out / "pictures").mkdir(parents=True)
    for part in PARTS:
        num_pictures = options.count if part == "train" else max(1, options.count // 10)
        if options.kind == "boxes":
            scenes = (
                nlvr_scenes(options.source, seed=options.seed, parts=(part,))
                if options.source
                else drawn_scenes(num_pictures, most, options.seed, parts=(part,))
            )
            questions, answers = list(map(as_question, scenes)), Counter(scene.name for scene in scenes)
        else:
            questions = (
                nlvr(options.source, seed=options.seed, parts=(part,))
                if options.source
                else counting(num_pictures, most, options.seed, parts=(part,))
            )
            answers = Counter(question.answer for question in questions)
        write(options.out, part, questions)
        counts = ", ".join(f"{answer} {count}" for answer, count in sorted(answers.items()))
        print(f"{part}: {len(questions)} questions, {len({question.id for question in questions})} ids, {counts}")


def as_question(scene: Scene) -> Question:
    return Question(id=scene.id, picture=scene.picture, text=scene.question, answer=scene.answer)


def write(out: Path, part: str, questions: list[Question]) -> None:
    """A manifest and its pictures; the same picture with the same question is written once."""
    lines: dict[tuple[str, bytes], str] = {}
    for number, question in enumerate(questions):
        key = question.text, hashlib.sha256(question.picture.tobytes()).digest()
        if key in lines:
            continue
        name = f"pictures/{part}_{number:05d}.png"
        question.picture.save(out / name)
        line = {"image": name, "question": question.text, "caption": question.answer, "group": question.id}
        lines[key] = json.dumps(line)
    (out / f"{part}.jsonl").write_text("\n".join(lines.values()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
