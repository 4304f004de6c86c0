"""Freed memory stays with the process."""

import resource
import subprocess
import sys

import pytest

from xfusion.training import memory

CODE = """
import resource
import sys
import torch
from xfusion.training.memory import keep_freed_memory
torch.set_num_threads(1)
taken = keep_freed_memory() if sys.argv[1] == "kept" else True
def step():
    return [torch.ones(700_000) for _ in range(20)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(int(taken), (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


def test_a_step_finds_its_buffers_mapped():
    """In processes of their own: the setting is the process's."""
    found = {}
    for way in ("kept", "given back"):
        done = subprocess.run(
            [sys.executable, "-c", CODE, way], capture_output=True, text=True, check=True, timeout=300
        )
        taken, found[way] = map(int, done.stdout.split())
        if not taken:
            pytest.skip("this system's allocator has no such setting")
    pages = 20 * 700_000 * 4 // resource.getpagesize()
    # How many are mapped at a time is the system's choice: with huge pages giving back costs few faults, too.
    assert found["kept"] < 0.02 * pages and found["kept"] <= found["given back"]


def test_a_system_without_it_says_so(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert memory.keep_freed_memory() is False
