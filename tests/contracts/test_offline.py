"""Packs load and draw without a network: whatever asks for one is named, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from contracts.table import make_model

import xfusion

DRAWING = """
import json, sys

asked = []

def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        asked.append(f"{event} {arguments[-1] if event == 'socket.connect' else arguments}")
        raise OSError("the network is forbidden")

sys.addaudithook(forbid)
import numpy
import xfusion

drawn = {}
for name in sys.argv[1:]:
    (picture,) = xfusion.load(name).draw(["a red heart"], seed=3, steps=2)
    drawn[name] = numpy.asarray(picture).tolist()
print(json.dumps({"drawn": drawn, "asked": asked}))
"""


def draw_without_a_network(tmp_path, *names, **environment):
    """What a process without a network, without a hub's cache and without a token draws with packs, and what it asked of one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    kept |= {"PYTHONPATH": str(Path(xfusion.__file__).parents[1]), "HF_HOME": str(tmp_path / "home")} | environment
    command = [sys.executable, "-c", DRAWING, *names]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_local_pack_draws_offline(bases, tmp_path):
    model, folder = make_model(bases["llama"]), tmp_path / "pack"
    model.save_pretrained(folder)
    found = draw_without_a_network(tmp_path, str(folder), HF_HUB_OFFLINE="1")
    (expected,) = model.draw(["a red heart"], seed=3, steps=2)
    assert numpy.abs(numpy.asarray(expected).astype(int) - found["drawn"][str(folder)]).max() <= 2
    assert found["asked"] == []


@pytest.mark.full
@pytest.mark.parametrize("offline", ["1", "0"])
def test_the_shipped_pack_draws_offline(tmp_path, offline):
    found = draw_without_a_network(tmp_path, "emoji", HF_HUB_OFFLINE=offline)
    (expected,) = xfusion.load("emoji").draw(["a red heart"], seed=3, steps=2)
    assert numpy.abs(numpy.asarray(expected).astype(int) - found["drawn"]["emoji"]).max() <= 2
    assert found["asked"] == []


@pytest.mark.full
def test_a_pack_of_the_hub_asks_for_a_network(tmp_path):
    """What forbids it sees who asks."""
    with pytest.raises(AssertionError, match="no connection|forbidden"):
        draw_without_a_network(tmp_path, "org/pack", HF_HUB_OFFLINE="0")
