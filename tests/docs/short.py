"""Bounds for the commands of the documents: what is printed trains for minutes or hours, what the full tier runs takes two steps
on a few examples. Only numbers and data are changed, never what is done with them.

| command | as it is run |
|---|---|
| `xfusion train RECIPE` | 2 steps a stage of at most 4 drawings and 4 captions, not compiled; `emoji` is `emoji:24` |
| `xfusion train opening PACK` | each wording once |
| `xfusion compare RECIPE...` | one seed of the fewest whole steps, two trials, 4 drawn, 4 named, two scored in two steps |
| `xfusion evaluate PACK` | four questions, two examples, wordings once, by the suite |
| `xfusion data recaption` | captions of 8 tokens |
| `xfusion bench` | a few small rounds, not compiled |
| `python benchmarks/...`, `python runs/...` | with the further options of `SCRIPTS` |
"""

import math
import re
import shlex
from itertools import takewhile

from xfusion.comparison.cost import samples_per_step
from xfusion.comparison.plan import Plan, split_label, with_plan
from xfusion.data.sequence import XFusionError
from xfusion.recipes.base import Recipe, find

COMMAND = re.compile(
    r"(?P<before>.*?(?:\bxfusion|-m xfusion\.apps\.cli) )(?P<verb>train opening|train|compare|bench|evaluate|data recaption) "
)
STEPS, DRAWN, NAMED, SCORED = 2, 4, 4, 2
SCRIPTS = {
    "benchmarks/growth.py": "--tokens 16 --batch 2 --depth 5 --pictures 1 2 --start.batch 2 --start.depth 5 --rounds 1"
    " --seconds 0 --no-compile",
    "benchmarks/memory.py": "--recipes xfusion_lora --data emoji:16 --samples 2 --measured",
    "benchmarks/profile_step.py": "--steps 1 --data emoji:16 --no-compile",
    "benchmarks/serving.py": "--seconds 3 --steps 4",
    "benchmarks/solvers.py": "--data emoji:16 --pictures 2 --steps 2 --fine 3",
    "benchmarks/time_to_loss.py": "--data emoji:16 --seconds 2 --turn 1 --rates 1e-4 --names 4 --no-compile",
    "runs/draw_emoji.py": "--count 2",
    "runs/compare_emoji_codes.py": "--steps 2 --channels 8 8 8 8",
    "runs/write_colours.py": "--things 4",
    "runs/write_questions.py": "--count 40",
}
"""Options behind those that are printed, of which the last of a name counts."""


def shortened(body: str) -> str:
    """A block of commands, each within its bounds."""
    return "\n".join(map(_line, body.splitlines())) + "\n"


def _line(line: str) -> str:
    if line.startswith("python ") and (script := line.split()[1]) in SCRIPTS:
        return f"{line} {SCRIPTS[script]}"
    match = COMMAND.match(line)
    if match is None or "--resume" in line:
        return line
    code, comment, remark = line.partition("  #")
    bounds = {
        "train": _train,
        "train opening": lambda line: f"{line} --repeat 1",
        "compare": _compare,
        "bench": lambda line: f"{line} --quick --no-compile",
        "evaluate": _evaluate,
        "data recaption": lambda line: f"{line} --max-tokens 8",
    }
    return bounds[match["verb"]](code) + comment + remark


def _without(line: str, *options: str) -> str:
    """The line without options that take one value each, given as patterns."""
    for option in options:
        line = re.sub(rf" {option} \S+", "", line)
    return line


def _recipe(name: str) -> Recipe:
    try:
        return find(name)()
    except XFusionError:  # of a file that a block before it wrote: it is made of the recipe xfusion
        return find("xfusion")()


def _train(line: str) -> str:
    recipe = _recipe(shlex.split(COMMAND.sub("", line, count=1))[0])
    line = _without(line, "--minutes", "--steps", r"--stages\.\d+\.steps", r"--stages\.\d+\.mixture\.(?:draw|caption)")
    options = [f"--steps {STEPS}", "--no-compile", "--preview-every 0"]
    for index, stage in enumerate(recipe.stages):
        options += [f"--stages.{index}.steps {STEPS}"] if index < len(recipe.stages) - 1 else []
        for kind, limit in (("draw", DRAWN), ("caption", NAMED)):
            count = getattr(stage.mixture, kind)
            options += [f"--stages.{index}.mixture.{kind} {min(count, limit)}"] if count else []
    if " --data " not in line and recipe.data.partition(":")[0] == "emoji":
        options.append("--data emoji:24")
    return " ".join([line, *options])


_SCORES = {"sounds": ("max_fit", "max_held"), "emoji": ("max_drawn", "max_captioned", "max_held")}
"""What the suites of comparisons score, of which printed commands may name no number."""


def _compare(line: str) -> str:
    """One step of each, of as few samples as all can have: a recipe that only reads, or only draws, keeps doing so."""
    line = re.sub(r"\bfirst_stage=\d+", "first_stage=1", line)
    words = shlex.split(COMMAND.sub("", line, count=1))
    recipes = [_recipe(split_label(word)[1]) for word in takewhile(lambda word: not word.startswith("-"), words)]
    bounds = {
        kind: limit
        for kind, limit in (("draw", DRAWN), ("caption", NAMED))
        if all(getattr(stage.mixture, kind) for recipe in recipes for stage in recipe.stages)
    }
    plan = Plan(samples=1, **bounds)
    planned = [with_plan(recipe, plan).stages for recipe in recipes]
    earlier = (sum(stage.steps * samples_per_step(stage) for stage in stages[:-1]) for stages in planned)
    samples = max(earlier) + math.lcm(*(samples_per_step(stages[-1]) for stages in planned))
    of_sounds = re.search(r" --data (?:digits|speech)/", line)
    scored = (
        {} if re.search(r" --set \w+=", line) else dict.fromkeys(_SCORES["sounds" if of_sounds else "emoji"], SCORED)
    )
    line = re.sub(r"\b(max_\w+)=(\d+)", lambda match: f"{match[1]}={min(int(match[2]), SCORED)}", line)
    line = re.sub(r"\bmax_drawn=\d+", lambda match: f"{match[0]} steps={STEPS}", line)
    line = re.sub(r" --data emoji:\d+", " --data emoji:16", line)
    line = re.sub(r" --trials \d+", " --trials 2", _without(line, "--samples", "--seeds", "--draw", "--caption"))
    line = line.replace(" --no-compile", "")
    options = [f"--samples {samples} --seeds 1 --no-compile", *(f"--{kind} {count}" for kind, count in bounds.items())]
    if " --data " not in line:
        options.append("--data emoji:16")
    line = " ".join([line, *options])
    return _with(line, " ".join(f"{name}={count}" for name, count in scored.items())) if scored else line


FEW = {"requests": "repeat=1", "few_shot": "max_held=2", "sounds": "max_fit=2 max_held=2", "infilling": "max_fit=2"}
"""Settings of suites that ask for much, where a command names no other number."""


def _evaluate(line: str) -> str:
    line = re.sub(r"\bmax_held_drawn=\d+", f"max_held_drawn={SCORED}", line)
    line, suite = re.sub(r"\bcount=\d+", "count=4", line), re.search(r"--suite (\w+)", line)
    return _with(line, FEW[suite[1]]) if suite and suite[1] in FEW else line


def _with(line: str, settings: str) -> str:
    """The line with further settings of a suite, which stand behind one ``--set``."""
    match = re.search(r" --set(?: \w+=\S+)+", line)
    if match is None:
        return f"{line} --set {settings}"
    return f"{line[: match.end()]} {settings}{line[match.end() :]}"
