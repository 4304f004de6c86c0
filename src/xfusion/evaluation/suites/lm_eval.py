"""Text benchmarks of EleutherAI's lm-evaluation-harness, on the text of a pack.

If the fusion preserves text, both stacks give bit-identical logits (`xfusion verify`), so a pack and its base have equal scores.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xfusion.data.sequence import XFusionError, first_line

MAY_BE_ZERO = {"shots"}


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    tasks: str = "",
    stack: str = "fused",
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 1,
) -> dict[str, Any]:
    """Scores of one model.

    Args:
        model: any model.
        progress: see `evaluate`; called once, since the harness shows its own progress bar.
        tasks: names of harness tasks or paths of task files (.yaml), separated by commas.
        stack: the text stack to score, "fused" or "base" (see `Model.text_logits`).
        limit: largest number of items per task; None uses all.
        shots: number of examples before each item; None uses the task's own number.
        batch: items per forward pass; with 1 the bits of an item do not depend on other items.

    Returns:
        ``TASK_METRIC`` for every metric of every task, or ``TASK_METRIC_FILTER`` if the task filters answers before it scores
        them, and its standard error, if the harness gives one.

    Raises:
        XFusionError: no task is named, a task or its file does not exist, the stack is unknown, or the harness is not installed.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from xfusion.evaluation.adapters.lm_eval import PackText
    except ImportError as error:
        raise XFusionError(f"this suite needs the package {error.name}: pip install 'xfusion[eval]'") from error
    names = [name for name in tasks.replace(" ", "").split(",") if name]
    if not names:
        raise XFusionError("name the tasks, such as tasks=arc_easy,lambada_openai or tasks=my_task.yaml")
    files = [Path(name) for name in names if name.endswith(".yaml")]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise XFusionError(f"task file {missing[0]} is not there")
    if stack not in ("base", "fused"):
        raise XFusionError(f"stack {stack!r} is neither 'base' nor 'fused'")
    manager = TaskManager(
        include_path=[str(path.resolve().parent) for path in files] or None, include_defaults=len(files) < len(names)
    )
    progress("tasks of lm-eval", 0, len(names))
    # lm_eval loads both lazily, so type checkers know neither signature.
    simple_evaluate: Any = lm_eval.simple_evaluate
    adapter: Any = PackText
    try:
        output = simple_evaluate(
            model=adapter(model, stack=stack, batch_size=batch),
            tasks=[path.stem if path in files else name for name, path in ((n, Path(n)) for n in names)],
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            random_seed=0,
            numpy_random_seed=0,
            torch_random_seed=0,
            fewshot_random_seed=0,
        )
    except (KeyError, ValueError, OSError) as error:  # no such task, or a hub that cannot be reached
        raise XFusionError(f"lm-eval cannot run {tasks!r}: {first_line(error)}") from error
    scores: dict[str, Any] = {}
    assert output is not None, "the harness returns None only in processes after the first"
    for task, metrics in output["results"].items():
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in key:
                metric, _, answer_filter = key.partition(",")  # one metric may have several filters of the answer
                scores["_".join([task, metric, *([] if answer_filter == "none" else [answer_filter])])] = value
    settings = {"tasks": ",".join(names), "stack": stack, "limit": limit, "shots": shots, "batch": batch}
    return {**scores, "settings": settings | {"lm_eval": lm_eval.__version__}}
