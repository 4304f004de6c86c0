"""What loading a base and a pack takes of a machine's memory: measured in a process of its own, by the system's word."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contracts.table import make_base, tokenizer

import xfusion
from xfusion.backbone import Backbone
from xfusion.fusion.dual_tower import DualTower
from xfusion.model import BackboneConfig, ModelConfig

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process's own pages from a file's"),
]
LOADING = """
import json, sys
from pathlib import Path
import xfusion
from xfusion.backbone import Backbone

def told():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")}

def taken(load):
    before = told()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    made = load()
    after = told()
    return made, {"peak": after["VmHWM"] - before["VmRSS"], "own": after["RssAnon"] - before["RssAnon"]}

tiny, folder, pack = sys.argv[1:]
Backbone.load(tiny).fingerprint  # what is imported once does not count
base, of_base = taken(lambda: Backbone.load(folder))
_, of_fingerprint = taken(lambda: base.fingerprint)
model, of_pack = taken(lambda: xfusion.load(pack, backbone=base))
print(json.dumps({"base": of_base, "fingerprint": of_fingerprint, "pack": of_pack}))
"""


def make_large_base(folder: Path) -> Path:
    """200 MB of a small Llama's weights, most of them in its layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=7,
        num_attention_heads=12,
        num_key_value_heads=12,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    tiny, base = make_base("llama", folder / "tiny"), make_large_base(folder / "base")
    with torch.random.fork_rng(devices=[]):
        config = ModelConfig(backbone=BackboneConfig(source=str(base)), fusion=DualTower.Config(stride=1, mlp=None))
        xfusion.build(config, Backbone.load(str(base))).save_pretrained(folder / "pack")
    source = str(Path(xfusion.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(tiny), str(base), str(folder / "pack")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr[-3000:]
    sizes = {"base": base / "model.safetensors", "pack": folder / "pack" / "model.safetensors"}
    return {name: path.stat().st_size for name, path in sizes.items()}, json.loads(done.stdout)


def test_a_base_stays_in_its_file(measured):
    """Loading maps it, and reading all of it takes the file's pages alone, which processes share: no copy at any time."""
    sizes, taken = measured
    assert sizes["base"] > 180e6
    assert taken["base"]["peak"] < 0.2 * sizes["base"] and taken["base"]["own"] < 0.05 * sizes["base"]
    assert taken["fingerprint"]["peak"] < 1.15 * sizes["base"] and taken["fingerprint"]["own"] < 0.05 * sizes["base"]


def test_a_pack_takes_its_weights_and_its_file(measured):
    """Its file is mapped while its weights are filled: twice its size, and once behind it."""
    sizes, taken = measured
    assert sizes["pack"] > 180e6
    assert taken["pack"]["peak"] < 2.2 * sizes["pack"] and taken["pack"]["own"] < 1.1 * sizes["pack"]
