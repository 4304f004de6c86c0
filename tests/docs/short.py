"""Bounds for the commands of the documents: what is printed trains for minutes or hours, what the full tier runs takes two steps
on a few examples. Only numbers and data are changed, never what is done with them.

| command | as it is run |
|---|---|
| `xfusion train RECIPE` | 2 steps a stage of at most 4 drawings and 4 captions, not compiled; `emoji` is `emoji:24` |
| `xfusion train opening PACK` | each wording once |
| `xfusion compare RECIPE...` | one seed of 8 samples, 4 drawn and 4 named a step, two scored; `emoji` is `emoji:16` |
| `xfusion evaluate PACK` | four questions, two examples, wordings once, by the suite |
| `xfusion data recaption` | captions of 8 tokens |
| `python runs/write_questions.py` | `--count 40` |
"""

import re
import shlex

from xfusion.data.sequence import XFusionError
from xfusion.recipes.base import find

COMMAND = re.compile(
    r"(?P<before>.*?(?:\bxfusion|-m xfusion\.apps\.cli) )(?P<verb>train opening|train|compare|evaluate|data recaption) "
)
STEPS, DRAWN, NAMED = 2, 4, 4


def shortened(body: str) -> str:
    """A block of commands, each within its bounds."""
    return "\n".join(map(_line, body.splitlines())) + "\n"


def _line(line: str) -> str:
    if line.startswith("python runs/write_questions.py"):
        return re.sub(r"--count \d+", "--count 40", line)
    match = COMMAND.match(line)
    if match is None or "--resume" in line:
        return line
    code, comment, remark = line.partition("  #")
    bounds = {
        "train": _train,
        "train opening": lambda line: f"{line} --repeat 1",
        "compare": _compare,
        "evaluate": _evaluate,
        "data recaption": lambda line: f"{line} --max-tokens 8",
    }
    return bounds[match["verb"]](code) + comment + remark


def _without(line: str, *options: str) -> str:
    """The line without options that take one value each, given as patterns."""
    for option in options:
        line = re.sub(rf" {option} \S+", "", line)
    return line


def _train(line: str) -> str:
    name = shlex.split(COMMAND.sub("", line, count=1))[0]
    line = _without(line, "--minutes", "--steps", r"--stages\.\d+\.steps", r"--stages\.\d+\.mixture\.(?:draw|caption)")
    try:
        recipe = find(name)()
    except XFusionError:  # of a file that the block before it wrote: it is made of the recipe xfusion
        recipe = find("xfusion")()
    options = [f"--steps {STEPS}", "--no-compile", "--preview-every 0"]
    for index, stage in enumerate(recipe.stages):
        options += [f"--stages.{index}.steps {STEPS}"] if index < len(recipe.stages) - 1 else []
        for kind, limit in (("draw", DRAWN), ("caption", NAMED)):
            count = getattr(stage.mixture, kind)
            options += [f"--stages.{index}.mixture.{kind} {min(count, limit)}"] if count else []
    if " --data " not in line and recipe.data.partition(":")[0] == "emoji":
        options.append("--data emoji:24")
    return " ".join([line, *options])


def _compare(line: str) -> str:
    line = re.sub(r" --set( \w+=\S+)+", "", _without(line, "--samples", "--seeds", "--draw", "--caption", "--trials"))
    options = ["--samples 8 --seeds 1 --draw 4 --caption 4 --no-compile"]
    if " --data " not in line:
        options.append("--data emoji:16")
    of_sounds = " --data digits" in line
    return _with(
        " ".join([line, *options]), "max_fit=2 max_held=2" if of_sounds else "max_drawn=2 max_captioned=2 max_held=2"
    )


FEW = {"requests": "repeat=1", "few_shot": "max_held=2", "sounds": "max_fit=2 max_held=2"}
"""Settings of suites that ask for much, where a command names no other number."""


def _evaluate(line: str) -> str:
    line, suite = re.sub(r"\bcount=\d+", "count=4", line), re.search(r"--suite (\w+)", line)
    return _with(line, FEW[suite[1]]) if suite and suite[1] in FEW else line


def _with(line: str, settings: str) -> str:
    """The line with further settings of a suite, which stand behind one ``--set``."""
    match = re.search(r" --set(?: \w+=\S+)+", line)
    if match is None:
        return f"{line} --set {settings}"
    return f"{line[: match.end()]} {settings}{line[match.end() :]}"
