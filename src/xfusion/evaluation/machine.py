"""Facts about a measurement: the machine, and the commit of the code."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import xfusion


def machine() -> dict[str, Any]:
    """Facts about this machine and the versions of the packages."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
            "xfusion": xfusion.__version__,
        },
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def commit() -> dict[str, Any] | None:
    """The commit of the running checkout, and the number of changed files; None outside a checkout.

    For a copy without history, in a container for example, set the variable ``XFUSION_COMMIT``.
    """
    if commit_id := os.environ.get("XFUSION_COMMIT"):
        return {"id": commit_id, "changed_files": None}
    root = Path(xfusion.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        process = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return process.stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "changed_files": len(git("status", "--porcelain").splitlines())}
    except (OSError, subprocess.SubprocessError):
        return None


def origin(folder: str) -> dict[str, Any]:
    """The header of a script's results: its command, commit, machine and load.

    Args:
        folder: the script's folder in the checkout. Absolute paths in the command are shortened to their names.
    """
    arguments = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    return {
        "command": shlex.join(["python", f"{folder}/{Path(sys.argv[0]).name}", *arguments]),
        "commit": commit(),
        "machine": machine(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
