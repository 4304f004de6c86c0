"""Tasks of EleutherAI's lm-evaluation-harness on a pack's text, whose scores should equal the base's.

If the fusion preserves text, both stacks give bit-identical logits (`xfusion verify`), so their scores are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xfusion.data.sequence import XFusionError


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
        progress: see `evaluate`; the harness draws a bar of its own.
        tasks: names of the harness, or paths of task files (.yaml), with commas between them.
        stack: "fused" or "base".
        limit: items of each task; None is all.
        shots: examples before each item; None takes the task's own.
        batch: items per forward pass; 1 gives bits that no neighbour moves.

    Returns:
        ``TASK_METRIC`` of every task, and the harness's standard error beside it, where it gives one.

    Raises:
        XFusionError: no task, one that is not there, or the harness is not installed.
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
        raise XFusionError(
            f"lm-eval cannot run {tasks!r}: {(str(error).strip() or repr(error)).splitlines()[0]}"
        ) from error
    scores: dict[str, Any] = {}
    assert output is not None, "only other processes than the first get nothing"
    for task, metrics in output["results"].items():
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in key:
                scores[f"{task}_{key.partition(',')[0]}"] = value
    settings = {"tasks": ",".join(names), "stack": stack, "limit": limit, "shots": shots, "batch": batch}
    return {**scores, "settings": settings | {"lm_eval": lm_eval.__version__}}
