"""Few-shot naming: pictures with their names, then a picture to name, all in one prompt (as in Flamingo).

``held_`` scores are on pictures of groups that were never trained on. The examples are trained pictures; fewer examples are
the first of the larger set. Exact scores come with ``_blind`` (the answers permuted among the pictures) and ``_misnamed``: each
example has the name of another picture, so a model that reads its examples answers differently.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source, content_fingerprint, open_source
from xfusion.data.templates import question_text
from xfusion.evaluation.abilities import refuse_unable
from xfusion.evaluation.metrics import captions
from xfusion.evaluation.metrics.blind import blind
from xfusion.evaluation.suites.emoji import choose_examples
from xfusion.evaluation.unseen import held_out

MAY_BE_ZERO = {"max_held", "most"}


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    source: Source | str = "emoji",
    held: Source | str | None = None,
    most: int = 4,
    question: str = "",
    max_held: int | None = 100,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Few-shot scores of one model.

    Args:
        model: a model that can caption.
        progress: see `evaluate`.
        source: the trained pictures, from which examples are taken: a `Source`, or a spec such as "emoji:128".
        held: the held-out pictures, likewise; None uses the held-out split of the same spec.
        most: largest number of examples; 0, 1, 2, 4, ... up to it are scored.
        question: text after the picture to name; may be empty.
        max_held: name at most this many held-out pictures (always the same ones); None is all.
        seed: seed of the choice of examples.
        batch_size: prompts per call of the model.

    Returns:
        ``held_exact_N_shots`` for each number N of examples: share in [0, 1] of greedy answers that are a name of the picture.

    Raises:
        XFusionError: the model cannot caption, nothing is held out, or there are too few groups or names for the examples.
    """
    refuse_unable(model, {"caption"}, "has pictures named")
    source = open_source(source, split="train") if isinstance(source, str) else source
    held = held_out(held, source)
    scored = choose_examples(held.examples, max_held) if held else []
    if not held or not scored:
        raise XFusionError(
            f"{source.spec}: no picture is held out to be named; give a share, as in {source.spec}:held=0.1"
        )
    groups, names = {e.group for e in source.examples}, {e.captions[0] for e in source.examples}
    if most < 0 or most > len(groups) or (most and len(names) < 2):
        raise XFusionError(
            f"{source.spec}: {most} examples of as many groups, and another name for each, cannot be taken of"
            f" {len(groups)} groups with {len(names)} names"
        )
    size, examples = model.image.sizes[0], [held.examples[i] for i in scored]
    shots_by_query = [_sample_shots(source, most, f"{seed}/{example.id}") for example in examples]
    wordings = captions.accepted(examples, held.examples)
    metrics: dict[str, float] = {}
    for shots in _shot_counts(most):
        for suffix, name_index in (("", 0), ("_misnamed", 1)) if shots else (("", 0),):
            answers: list[str] = []
            for start in range(0, len(scored), batch_size):
                progress(f"{shots} examples{suffix.replace('_', ', ')}", start, len(scored))
                prompts = []
                for query in range(start, min(start + batch_size, len(scored))):
                    prompt: list[Any] = []
                    for index, *shot_names in shots_by_query[query][:shots]:
                        own_question = question_text(source.examples[index].question or "")  # as in training
                        prompt += [source.picture(index, size), own_question + shot_names[name_index]]
                    prompts.append([*prompt, held.picture(scored[query], size), *([question] if question else [])])
                answers += [answer for (answer,) in model.generate(prompts)]
            key = f"held_exact_{shots}_shots{suffix}"
            metrics[key] = captions.exact_match(answers, wordings)
            if not suffix:
                metrics[f"{key}_blind"] = blind(_permuted_exact(answers, wordings), len(answers))
    settings = {"data": source.spec, "held": held.spec, "num_held": len(scored), "most": most, "seed": seed}
    settings |= {"data_fingerprint": content_fingerprint(source), "held_fingerprint": content_fingerprint(held)}
    return {**metrics, "settings": settings | {"question": question}}


def _shot_counts(most: int) -> list[int]:
    """Numbers of examples to score: 0, the powers of 2 up to ``most``, and ``most`` itself."""
    return sorted({0, most, *(2**exponent for exponent in range(most.bit_length()) if 2**exponent <= most)})


def _sample_shots(source: Source, count: int, seed: str) -> list[tuple[int, str, str]]:
    """``count`` examples of different groups: index of the picture, its name, and the name of another picture."""
    rng, examples = random.Random(seed), source.examples
    shots: dict[str, tuple[int, str, str]] = {}
    while len(shots) < count:
        index = rng.randrange(len(examples))
        name = wrong_name = examples[index].captions[0]
        while wrong_name == name:
            wrong_name = rng.choice(examples).captions[0]
        shots.setdefault(examples[index].group, (index, name, wrong_name))
    return list(shots.values())


def _permuted_exact(answers: list[str], wordings: Sequence[Sequence[str]]) -> Callable[[Tensor], float]:
    return lambda order: captions.exact_match([answers[i] for i in order.tolist()], wordings)
