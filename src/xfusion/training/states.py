"""The states of a run (its checkpoints): the newest few and the best, written atomically and verified when read.

``state/step_00000300/`` has ``state.safetensors`` (weights, their average, the optimizer's moments) and ``state.json`` (the
recipe, the position of the run, a hash of the tensor file and one of itself). With sharded weights each process writes a
safetensors file of its own shards through `torch.distributed.checkpoint`, and ``state.json`` has the hash of each. Both kinds
can be read whole or sharded, by any number of processes.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from xfusion import storage
from xfusion.data.sequence import XFusionError
from xfusion.training.processes import Processes

T = TypeVar("T", bound=tuple[Any, ...])
STATE, PLAN = "state.safetensors", "state.json"
PARTS = "state_files"
"""Field of the plan that maps the file of each process to its hash."""
logger = logging.getLogger(__name__)


def list_states(folder: Path) -> list[Path]:
    """A run's states, newest first, intact or not; empty if there is no such folder."""
    storage.restore_folders(folder, "step_*")
    states = sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)
    # Before states were numbered there was a single one, in the folder itself.
    return states + ([folder] if (folder / PLAN).is_file() else [])


def write(
    folder: Path, tensors: dict[str, Tensor], plan: dict[str, Any], keep: int, previous_step: int | None = None
) -> Path:
    """Write the state of ``plan["step"]``, then remove all but the newest ``keep`` and the best.

    Args:
        folder: folder of the states.
        tensors: tensors by name.
        plan: facts about the run.
        keep: how many of the newest states to keep.
        previous_step: step of the state that the run wrote last or resumed from; None if there is none. States of later steps
            were damaged and skipped on resume: they do not count and are removed.

    Raises:
        XFusionError: it cannot be written; existing states stay.
    """
    target = folder / _name(plan["step"])
    with storage.atomic_folder(target) as state:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(state / STATE))
        _seal(state, plan | {"state_sha256": storage.file_hash(state / STATE)})
    _remove_old(folder, keep, target, previous_step)
    return target


def write_sharded(
    folder: Path,
    tensors: dict[str, Tensor],
    plan: dict[str, Any],
    keep: int,
    processes: Processes,
    previous_step: int | None = None,
) -> Path:
    """`write` by all processes together: each writes its shards, and the first creates the folder and renames it.

    Raises:
        XFusionError: one of them cannot write; existing states stay.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    target = folder / _name(plan["step"])
    with ExitStack() as exit_stack, storage.named_in_errors(target):
        with processes.first_alone():
            local_path = exit_stack.enter_context(storage.atomic_folder(target)) if processes.is_first else target
        state = processes.broadcast(local_path)
        with processes.all_or_none():
            try:
                save(tensors, storage_writer=HuggingFaceStorageWriter(str(state), save_distributed=True))
            except CheckpointException as error:  # raised in all processes if any of them fails
                reason = next(iter(error.failures.values()))[0]
                raise XFusionError(
                    f"{target} cannot be written: {reason}; make room, or name another folder"
                ) from error
        with processes.all_or_none(), storage.named_in_errors(target):
            local_hashes = {
                file.name: storage.file_hash(file) for file in state.glob(f"shard-{processes.rank + 1:05d}-*")
            }
        hashes = {
            name: digest for rank_hashes in processes.gather(local_hashes) for name, digest in rank_hashes.items()
        }
        with processes.first_alone():
            if processes.is_first:
                with storage.named_in_errors(target):
                    _seal(state, plan | {PARTS: hashes})
                exit_stack.close()
                _remove_old(folder, keep, target, previous_step)
    return target


def _name(step: int) -> str:
    """Name of a state's folder; names sort like steps."""
    return f"step_{step:08d}"


def _seal(state: Path, plan: dict[str, Any]) -> None:
    (state / PLAN).write_text(json.dumps(storage.sealed(plan), indent=2) + "\n", encoding="utf-8")


def _remove_old(folder: Path, keep: int, written: Path, previous_step: int | None) -> None:
    """Remove all states but the newest ``keep`` and the best. Those later than ``previous_step`` go too, except ``written``."""
    last_name = written.name if previous_step is None else _name(previous_step)
    candidates = [state for state in list_states(folder) if state in (written, folder) or state.name <= last_name]
    retained = {*candidates[:keep], _best(candidates)}
    with storage.named_in_errors(folder):
        for state in list_states(folder):
            if state == folder:
                (state / STATE).unlink(missing_ok=True)
                (state / PLAN).unlink()
            elif state not in retained:
                # Renamed first, so that a kill in between leaves no half-deleted state under this name.
                shutil.rmtree(state.rename(folder / f".{state.name}-dropped"), ignore_errors=True)


def best(folder: Path) -> Path | None:
    """The state with the lowest loss in the latest stage: losses of different stages are not comparable."""
    return _best(list_states(folder))


def _best(states: list[Path]) -> Path | None:
    ranked = []
    for state in states:
        try:
            plan = read_plan(state)
        except XFusionError:
            continue
        if plan.get("loss") is not None:
            ranked.append((-plan["stage"], plan["loss"], state))
    return min(ranked)[2] if ranked else None


def read_plan(state: Path) -> dict[str, Any]:
    """The plan of a state: the facts about its run.

    Raises:
        XFusionError: it is missing, incomplete or altered.
    """
    plan = storage.read_json(state / PLAN)
    is_numbered = state.name.startswith("step_")
    if is_numbered and (storage.SEAL not in plan or not {"state_sha256", PARTS} & set(plan)):
        raise XFusionError(f"{state / PLAN} was altered: a state has hashes, this has none; take an intact copy")
    return plan


def read(state: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plan and unsharded tensors of a state.

    Raises:
        XFusionError: it is missing, incomplete or altered.
    """
    plan = read_plan(state)
    if PARTS not in plan:
        return plan, storage.read_tensors(state / STATE, plan.get("state_sha256"))
    _check_parts(state, plan)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in entries(state).items()}
    fill(state, tensors, single_process=True)
    return plan, tensors


def intact(state: Path) -> dict[str, Any]:
    """Plan of a state whose tensors were verified against their hashes.

    Raises:
        XFusionError: it is missing, incomplete or altered.
    """
    plan = read_plan(state)
    if PARTS in plan:
        _check_parts(state, plan)
    else:
        storage.read_tensors(state / STATE, plan.get("state_sha256"))  # memory-mapped, not loaded
    return plan


def _check_parts(state: Path, plan: dict[str, Any]) -> None:
    for name, expected in plan[PARTS].items():
        storage.read_tensors(state / name, expected)
    if unknown := sorted(file.name for file in state.glob("*.safetensors") if file.name not in plan[PARTS]):
        raise XFusionError(f"{state} was altered: {unknown[0]} is not of this state; take an intact copy")


def entries(state: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Unsharded shape and dtype of each tensor of a state."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    metadata: Any = HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in metadata.items()}


def fill(state: Path, tensors: dict[str, Tensor], *, single_process: bool = False) -> None:
    """Read a state into existing tensors; of sharded ones each process reads only its shards.

    Args:
        state: the state's folder.
        tensors: tensors by their names in the state.
        single_process: whether this process reads alone instead of together with all others.

    Raises:
        XFusionError: a tensor is missing or of another shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():  # about the missing process group, which `single_process` implies
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, storage_reader=HuggingFaceStorageReader(str(state)), no_dist=single_process)
    except (OSError, SafetensorError, ValueError, RuntimeError, CheckpointException) as error:
        raise XFusionError(f"{state} cannot be read: {str(error).strip().splitlines()[-1]}") from error


def newest(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The newest intact state; warns about damaged ones.

    Raises:
        XFusionError: none is intact.
    """
    return _newest(folder, read)[1]


def newest_intact(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Path and plan of the newest intact state; warns about damaged ones.

    Raises:
        XFusionError: none is intact.
    """
    state, (plan,) = _newest(folder, lambda state: (intact(state),))
    return state, plan


def _newest(folder: Path, read_state: Callable[[Path], T]) -> tuple[Path, T]:
    errors: list[str] = []
    for state in list_states(folder):
        try:
            contents = read_state(state)
        except XFusionError as error:
            errors.append(str(error))
            continue
        for line in errors:
            logger.warning("%s: left out, the run goes on from step %d", line, contents[0]["step"])
        return state, contents
    raise XFusionError(f"{folder} holds no intact state: {'; '.join(errors) or 'it is empty'}; start the run again")


def newest_plan(folder: Path) -> dict[str, Any]:
    """The plan of the newest readable state, without its tensors.

    Raises:
        XFusionError: none is readable.
    """
    errors: list[str] = []
    for state in list_states(folder):
        try:
            return read_plan(state)
        except XFusionError as error:
            errors.append(str(error))
    raise XFusionError(f"{folder} holds no intact state: {'; '.join(errors) or 'it is empty'}; start the run again")


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run left half written, and restore a state or pack that it was just replacing."""
    storage.remove_leftovers(run / "state", "step_*")
    storage.remove_leftovers(run, "pack")
